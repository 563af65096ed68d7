"""Smaller in place: what a plan removes leaves network, guide and optimizer, and fitting goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.groups import StructureGroup, after, gone
from pyro_bmrs.networks.hooked_noise import hooked_noise, network_of
from pyro_bmrs.networks.inputs import Inputs, as_double, first_examples, map_tensors
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.networks.surgery import check_equal, comparable


@torch.no_grad()
def shrink(
    model: nn.Module,
    guide: AutoTruncatedLogNormal,
    kept: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    example_input: Inputs,
) -> None:
    """Take structures out of model, guide and optimizer, in place: see `Reduction.shrink`.

    Args:
        kept: per site a bool tensor (features,).
        example_input: of the model's network, for the equality check.
    """
    network = network_of(model)
    layers = noise_layers(network)
    sizes = {site: layer.features for site, layer in layers.items()}
    posteriors = {site: guide.site_posterior(site) for site in layers if site in guide.sites}
    if {site: len(mask) for site, mask in kept.items()} != sizes:
        raise ValueError(f"model must have the structures of the plan: it has {sizes}")
    if {site: posterior.loc.shape[-1] for site, posterior in posteriors.items()} != sizes:
        raise ValueError(f"guide must have a posterior for each structure of the model: {sizes}")
    groups = structure_groups(network, example_input)
    cuts = gone(network, groups.values(), kept)
    if not cuts:
        return
    _check(network, groups, kept, cuts, example_input)
    if optimizer is not None:
        _select_state(optimizer, network, cuts)
    _shrink_network(network, groups, kept, cuts)
    for site, posterior in posteriors.items():
        units = torch.nonzero(kept[site]).flatten().to(posterior.loc.device)
        for name, tensor in [*posterior.named_parameters(), *posterior.named_buffers()]:
            if optimizer is not None and name in ("loc", "log_scale"):
                _select(optimizer, tensor, -1, units)
            tensor.data = tensor.data.index_select(-1, units)
            tensor.grad = None


def _shrink_network(
    network: nn.Module, groups: Mapping[str, StructureGroup], kept: Mapping[str, Tensor], cuts: Cuts
) -> None:
    cuts.cut(network)
    for site, layer in noise_layers(network).items():
        layer.select(kept[site].to(layer.kept.device))
    for path, noise in hooked_noise(network).items():
        local = cuts.below(path)
        noise.shrink(network.get_submodule(path), after(noise.groups.values(), kept, local))


def _check(
    network: nn.Module,
    groups: Mapping[str, StructureGroup],
    kept: Mapping[str, Tensor],
    cuts: Cuts,
    example_input: Inputs,
) -> None:
    """Raise unless a copy that is cut computes the same, for some θ of what is kept."""
    device = next(network.parameters()).device
    reduced = copy.deepcopy(network).double().eval()
    for layer in noise_layers(reduced).values():
        layer.kept.fill_(True)
    small = copy.deepcopy(reduced)
    _shrink_network(small, groups, kept, cuts)
    scales, left = {}, {}
    for site, mask in kept.items():
        theta = torch.linspace(0.25, 1.0, len(mask), dtype=torch.float64)
        scales[site], left[site] = (theta * mask).to(device), theta[mask].to(device)
    example = as_double(map_tensors(lambda t: t.to(device), first_examples(example_input, 8)))
    with fixed_scales(small, left):
        check_equal(
            small, reduced, scales, example, readers=comparable(groups.values(), small), rows=cuts.rows
        )


def _select_state(optimizer: torch.optim.Optimizer, network: nn.Module, cuts: Cuts) -> None:
    for tensor, dim, kept in cuts.tensors(network):
        _select(optimizer, tensor, dim, kept)


def _select(optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, kept: Tensor) -> None:
    """Keep the entries of an optimizer's state that belong to what is left of a parameter."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        # what has the parameter's dimensions goes with it; a step count has none
        if isinstance(value, Tensor) and value.dim() == parameter.dim() and value.dim() > 0:
            state[name] = value.index_select(dim, kept.to(value.device))
