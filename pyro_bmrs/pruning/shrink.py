"""Take structures out of a network, its guide and the optimizer, in place, in the middle of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.networks.copies import copied, without_values
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.examples import at_most
from pyro_bmrs.networks.groups import StructureGroup, after, cuts_of
from pyro_bmrs.networks.hooked_noise import hooked_noise, network_of, without_noise
from pyro_bmrs.networks.inputs import Inputs, as_double, map_tensors
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.networks.surgery import check_equal, expected


@torch.no_grad()
def shrink(
    model: nn.Module,
    guide: AutoTruncatedLogNormal,
    kept: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    example_input: Inputs,
) -> None:
    """Take structures out of model, guide and optimizer, in place: see `NetworkPlan.shrink`.

    Args:
        kept: per site a bool tensor (features,), on any device.
        example_input: of the model's network, for the equality check.
    """
    if not isinstance(guide, AutoTruncatedLogNormal):
        raise TypeError(f"guide must be an AutoTruncatedLogNormal: got {type(guide).__name__}")
    kept = {site: mask.cpu() for site, mask in kept.items()}
    network = network_of(model)
    layers = noise_layers(network)
    sizes = {site: layer.features for site, layer in layers.items()}
    posteriors = {site: guide.site_posterior(site) for site in layers if site in guide.sites}
    if {site: len(mask) for site, mask in kept.items()} != sizes:
        raise ValueError(f"model must have the structures of the plan: it has {sizes}")
    if {site: posterior.loc.shape[-1] for site, posterior in posteriors.items()} != sizes:
        raise ValueError(f"guide must have a posterior for each structure of the model: {sizes}")
    groups = structure_groups(network, example_input)
    cuts = cuts_of(network, groups.values(), kept)
    if not cuts:
        return
    _check(network, groups, kept, cuts, example_input)
    selections = list(cuts.selections(network))
    for site, posterior in posteriors.items():
        stays = torch.nonzero(kept[site]).flatten().to(posterior.loc.device)
        selections += [(parameter, -1, stays) for parameter in posterior.parameters()]
    states = [] if optimizer is None else _selected_states(optimizer, selections)
    original = _Original(earlier_cuts(network).then(cuts), original_network(network))
    # from here on nothing can fail
    for site, posterior in posteriors.items():
        posterior.select(kept[site], layers[site].units)
    _shrink_network(network, kept, cuts)
    network._original = original  # type: ignore[assignment]
    for parameter, name, value in states:
        assert optimizer is not None
        optimizer.state[parameter][name] = value


@dataclass(frozen=True)
class _Original:
    """What a shrunken network knows of the original: all cuts since, and a copy without values."""

    cuts: Cuts
    network: nn.Module


def earlier_cuts(network: nn.Module) -> Cuts:
    """All cuts that shrinking has made in a network."""
    original = getattr(network, "_original", None)
    return original.cuts if isinstance(original, _Original) else Cuts()


def original_network(network: nn.Module) -> nn.Module:
    """The network without noise as it was before it first shrank, on the meta device."""
    original = getattr(network, "_original", None)
    if isinstance(original, _Original):
        return original.network
    return without_values(without_noise(copied(network)))  # .to("meta") would part tied weights


def _shrink_network(network: nn.Module, kept: Mapping[str, Tensor], cuts: Cuts) -> None:
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
    reduced = copied(network).double().eval()
    for layer in noise_layers(reduced).values():
        layer.kept.fill_(True)
    whole, left = {}, {}
    for site, mask in kept.items():
        theta = torch.linspace(0.25, 1.0, len(mask), dtype=torch.float64)
        whole[site], left[site] = (theta * mask).to(device), theta[mask].to(device)
    given = map_tensors(lambda tensor: tensor.to(device), example_input)
    example = as_double(at_most(network, given, 8))
    wanted = expected(reduced, whole, example, groups.values(), cuts)
    _shrink_network(reduced, kept, cuts)
    with fixed_scales(reduced, left):
        check_equal(reduced, wanted, example)


def _selected_states(
    optimizer: torch.optim.Optimizer, selections: list[tuple[Tensor, int, Tensor]]
) -> list[tuple[Tensor, str, Tensor]]:
    """(parameter, name, entries of the optimizer's state that belong to what is left).

    Raises:
        ValueError: if the optimizer has none of the parameters, or a state that does not follow their shapes.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None: got {type(optimizer).__name__}")
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(tensor) in own for tensor, _, _ in selections):
        raise ValueError("optimizer must have parameters of the model or the guide: it has none of them")
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            number = isinstance(value, int | float) or value is None
            if not number and not (isinstance(value, Tensor) and value.shape in (parameter.shape, ())):
                raise ValueError(
                    f"optimizer must keep its state in the shapes of the parameters, as Adam and SGD do: "
                    f"{name!r} of {type(optimizer).__name__} does not"
                )
    selected: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for tensor, dim, kept in selections:
        for name, value in optimizer.state.get(tensor, {}).items():
            if isinstance(value, Tensor) and value.dim():
                _, so_far = selected.get((id(tensor), name), (tensor, value))
                selected[id(tensor), name] = tensor, so_far.index_select(dim, kept.to(value.device))
    return [(tensor, name, value) for (_, name), (tensor, value) in selected.items()]
