"""Removing structures for real, and proving that the smaller network is the reduced model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.noise import fixed_scales, noise_layers, without_noise
from pyro_bmrs.networks.structures import structure_groups, weight_of

# The check runs in float64, where the two networks differ by rounding alone.
TOLERANCE = 1e-10


class EqualityError(RuntimeError):
    """The smaller network does not compute what the reduced model computes."""


def outputs_of(value: object) -> list[Tensor]:
    """The tensors in a network's output: itself, or those of a tuple, list or mapping, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in outputs_of(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in outputs_of(item)]
    return []


def check_equal(
    small: nn.Module,
    reduced: nn.Module,
    scales: Mapping[str, Tensor],
    example_input: Tensor,
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """Largest difference of outputs relative to their spread over the examples; raises above `tolerance`.

    Relative to the spread, because an output that hardly depends on its input hides any error.

    Raises:
        EqualityError: naming the largest difference, the spread and the tolerance.
    """
    with torch.no_grad(), fixed_scales(reduced, scales):
        expected = outputs_of(reduced(example_input))
    with torch.no_grad():
        actual = outputs_of(small(example_input))
    worst = 0.0
    for index, (want, have) in enumerate(zip(expected, actual, strict=True)):
        if want.shape != have.shape:
            raise EqualityError(
                f"output {index} of the smaller network has shape {tuple(have.shape)}, "
                f"the reduced model's has {tuple(want.shape)}"
            )
        difference = float((want - have).abs().max())
        spread = float((want - want.mean(dim=0, keepdim=True)).abs().max())
        # of one example there is no spread: fall back on the size of the output
        scale = spread or float(want.abs().max()) or 1.0
        worst = max(worst, difference / scale)
        if not difference <= tolerance * scale:
            raise EqualityError(
                f"the smaller network differs from the reduced model: output {index} by at most "
                f"{difference:.3e} where outputs spread over {scale:.3e} (allowed: {tolerance:g} of it). "
                "A noise layer must stand where its structures are consumed, after every activation "
                "that is not positively homogeneous"
            )
    return worst


def remove_structures(
    network: nn.Module,
    kept: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    example_input: Tensor,
    *,
    tolerance: float = TOLERANCE,
) -> nn.Module:
    """A copy of `network` without noise, with only the kept structures, their scales folded in.

    Args:
        network: holds noise layers; left unchanged.
        kept: per site a bool tensor (features,); at least one structure kept in each.
        scales: per site the E[θ] (features,) that multiplies each kept structure; folded into the columns
            of the layers that read it.
        example_input: (batch, …), of more than one example so that outputs have a spread.
        tolerance: of `check_equal`, which is always run, in float64.

    Returns:
        A plain module of the same class, in eval mode where `network` was, on its device and dtype.

    Raises:
        EqualityError: if its outputs on `example_input` are not those of the reduced model.
        ValueError: if sites don't match, a layer would lose all its structures, or a scale is not finite.
    """
    layers = noise_layers(network)
    for name, given in (("kept", kept), ("scales", scales)):
        if set(given) != set(layers):
            raise ValueError(f"{name} must have the sites {sorted(layers)}: got {sorted(given)}")
    for site, layer in layers.items():
        if kept[site].shape != (layer.features,) or scales[site].shape != (layer.features,):
            raise ValueError(
                f"kept and scales of {site!r} must have shape ({layer.features},): got "
                f"{tuple(kept[site].shape)} and {tuple(scales[site].shape)}"
            )
        if not bool(kept[site].any()):
            raise ValueError(f"kept[{site!r}] must keep at least one of {layer.features} structures")
        if not bool(torch.isfinite(scales[site]).all()):
            raise ValueError(f"scales[{site!r}] must be finite")

    device = next(network.parameters()).device
    dtypes = {name: t.dtype for name, t in [*network.named_parameters(), *network.named_buffers()]}
    groups = structure_groups(network, example_input)
    reduced = copy.deepcopy(network).double().eval()
    for layer in noise_layers(reduced).values():
        layer.kept.fill_(True)  # the scales below say what is removed
    small = copy.deepcopy(reduced)
    reduced_scales = {}
    for site, group in groups.items():
        keep = kept[site].to(device)
        scale = torch.where(keep, scales[site].to(device, torch.float64), 0.0)
        reduced_scales[site] = scale
        for member in group.consumers:
            weight = weight_of(small, member)
            columns = torch.ones(weight.shape[1], dtype=torch.float64, device=device)
            columns[member.indices.to(device)] = scale[member.units.to(device)]
            with torch.no_grad():
                weight.mul_(columns.view(1, -1, *[1] * (weight.dim() - 2)))
    small = without_noise(small)
    for site, group in groups.items():
        removed = torch.nonzero(~kept[site].cpu()).flatten()
        for member in group.members:
            member.cut(small.get_submodule(member.path), removed)
    check_equal(small, reduced, reduced_scales, _as_double(example_input.to(device)), tolerance=tolerance)
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        tensor.data = tensor.data.to(dtypes[name])
    for parameter in small.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    return small.train(network.training)


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
