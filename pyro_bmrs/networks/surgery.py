"""Removing structures physically, and proving that the smaller network equals the reduced model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cuts import COLUMNS, Cuts, channel_dimension, channels
from pyro_bmrs.networks.examples import at_most
from pyro_bmrs.networks.groups import StructureGroup, cuts_of, weight_of
from pyro_bmrs.networks.hooked_noise import hooked_noise, without_noise
from pyro_bmrs.networks.inputs import (
    Inputs,
    as_double,
    call,
    check_finite,
    map_tensors,
    tensors_of,
)
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.networks.structures import structure_groups

# The check runs in float64, where the two networks differ by rounding alone.
TOLERANCE = 1e-10
_OWN_TOLERANCE = 1e-5
# Rounding hides errors in an output that varies by less than this share of its size.
_LEAST_SPREAD = 0.01


class EqualityError(RuntimeError):
    """The smaller network does not compute what the reduced model computes."""


class Surgery(NamedTuple):
    """A smaller network, and what was cut."""

    network: nn.Module
    cuts: Cuts
    difference: float  # the largest, relative to the spread of the outputs


def check_equal(
    small: nn.Module,
    reduced: nn.Module,
    scales: Mapping[str, Tensor],
    example_input: Inputs,
    *,
    readers: Iterable[str] = (),
    rows: Mapping[str, list[int]] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Largest difference of outputs, relative to their spread over the examples; raises above `tolerance`.

    The outputs of the networks and of the layers `readers` are compared. The difference is relative to the
    spread (at least 1 % of the largest output), since an output that hardly depends on its input would
    hide any error.

    Args:
        small, reduced: the networks.
        scales: by site, the values of θ in `reduced`.
        example_input: examples of both.
        readers: paths of the layers to compare too.
        rows: by path, the channels of a layer's output in `reduced` that remain in `small`.
        tolerance: allowed relative difference.

    Raises:
        EqualityError: naming the layer, the largest difference, the spread and the tolerance.
    """
    rows = rows or {}
    advice = (
        "; leave out, in insert_noise, what this layer reads"
        if hooked_noise(reduced)
        else ". A noise layer must stand where its structures are consumed, after every activation that is not "
        "positively homogeneous"
    )
    with torch.no_grad():
        with _outputs_of(small, readers) as have, _where(small):
            have["the network"] = tensors_of(call(small, example_input))
        with fixed_scales(reduced, scales), _outputs_of(reduced, readers) as want:
            want["the network"] = tensors_of(call(reduced, example_input))
    worst = 0.0
    for name, expected in want.items():
        for index, (wanted, found) in enumerate(zip(expected, have[name], strict=True)):
            if not wanted.is_floating_point():
                continue
            if name in rows:
                dim = channel_dimension(reduced.get_submodule(name))
                wanted = wanted.index_select(dim, torch.tensor(rows[name], device=wanted.device))
            if wanted.shape != found.shape:
                raise EqualityError(
                    f"output {index} of {name} has shape {tuple(found.shape)} in the smaller network, "
                    f"{tuple(wanted.shape)} in the reduced model"
                )
            distance, scale = difference(wanted, found)
            worst = max(worst, distance / scale)
            if not distance <= tolerance * scale:
                raise EqualityError(
                    f"the smaller network differs from the reduced model: output {index} of {name} by at most "
                    f"{distance:.3e} where outputs spread over {scale:.3e} (allowed: {tolerance:g} of it)"
                    + advice
                )
    return worst


def difference(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """(largest difference, spread of `wanted` over the examples)."""
    finite = wanted.isfinite()
    # infinities, such as those of a mask, must be in the same places
    if not torch.equal(torch.where(finite, 0.0, wanted), torch.where(finite, 0.0, found)):
        return math.inf, 1.0
    distance = float(torch.where(finite, wanted - found, 0.0).abs().max())
    values = torch.where(finite, wanted, 0.0)
    spread = float((values - values.mean(dim=0, keepdim=True)).abs().max())
    return distance, max(spread, _LEAST_SPREAD * float(values.abs().max())) or 1.0


@contextmanager
def _outputs_of(network: nn.Module, paths: Iterable[str]) -> Any:
    """Collects the outputs of the layers at `paths`, by path, while the context lasts."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        return lambda module, arguments, output: found.setdefault(path, []).extend(tensors_of(output))

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _where(network: nn.Module) -> Any:
    """Turns an error in the smaller network's forward pass into an EqualityError that names the module."""
    running: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        running.pop()

    for path, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except Exception as error:
        place = repr(running[-1]) if running and running[-1] else "the network itself"
        reason = " ".join(str(error).split())
        raise EqualityError(
            f"the smaller network fails in {place} with {type(error).__name__}: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def remove_structures(
    network: nn.Module,
    kept: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    example_input: Inputs,
    *,
    groups: Mapping[str, StructureGroup] | None = None,
    tolerance: float = TOLERANCE,
) -> Surgery:
    """A copy of `network` without noise, with only the kept structures and with θ folded into the weights.

    Args:
        network: has noise layers; unchanged.
        kept: by site, a bool tensor (features,) with at least one True.
        scales: by site, the value of θ of each structure, E[θ] in a reduction. Shape: (features,). It is multiplied
            into the columns of the layers that read the structure.
        example_input: more than one example, so that outputs have a spread: a tensor (batch, …), a tuple
            of arguments, or a mapping of keyword arguments.
        groups: the network's structures, by site; None: they are found from the network.
        tolerance: of `check_equal`, which runs in float64. A network that can't run in float64 is
            checked in its own precision, to 1e-5.

    Returns:
        The smaller network (a plain module of the same class, with the device, dtypes, modes and
        `requires_grad` of `network`), the cuts, and the largest relative difference.

    Raises:
        EqualityError: if its outputs on `example_input` are not those of the reduced model.
        ValueError: if sites or shapes don't match, a layer would lose all its structures, or a θ or parameter is not
            finite.
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
    check_finite("network", network)

    device = next(network.parameters()).device
    dtypes = {name: tensor.dtype for name, tensor in _floating(network)}
    usual = next(iter(dtypes.values()))
    groups = structure_groups(network, example_input) if groups is None else groups
    cuts = cuts_of(network, groups.values(), kept)
    reduced = copied(network).eval()
    example = map_tensors(lambda tensor: tensor.to(device), example_input)
    for layer in noise_layers(reduced).values():
        layer.kept.fill_(True)  # the scales below are 0 where a structure is removed
    if _runs_in_double(reduced, example):
        reduced, example = reduced.double(), as_double(example)
    else:
        tolerance = max(tolerance, _OWN_TOLERANCE)
    small = copied(reduced)
    reduced_scales = {
        site: torch.where(kept[site].to(device), scales[site].to(device, torch.float64), 0.0)
        for site in groups
    }
    fold(small, groups.values(), reduced_scales)
    cuts.cut(small)
    small = without_noise(small)
    largest = check_equal(
        small, reduced, reduced_scales, example,
        readers=comparable(groups.values(), small), rows=cuts.rows, tolerance=tolerance,
    )  # fmt: skip
    for name, tensor in _floating(small):
        tensor.data = tensor.data.to(dtypes.get(name, usual))
    gradients = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(gradients.get(name, True))
        parameter.grad = None
    modes = {path: module.training for path, module in network.named_modules()}
    for path, module in small.named_modules():
        module.training = modes.get(path, network.training)
    return Surgery(small, cuts, largest)


@torch.no_grad()
def _runs_in_double(network: nn.Module, example: Inputs) -> bool:
    """Whether a network runs in float64. One with constants of another precision may not."""
    try:
        with fixed_scales(network, {s: layer.kept.double() for s, layer in noise_layers(network).items()}):
            double = copied(network).double()
            call(double, at_most(double, as_double(example), 2))
    except RuntimeError:
        return False
    return True


def _floating(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point():
            yield name, tensor


@torch.no_grad()
def fold(network: nn.Module, groups: Iterable[StructureGroup], scales: Mapping[str, Tensor]) -> None:
    """Multiply, in place, the columns that read each structure by its θ."""
    for group in groups:
        for member in group.consumers:
            module, weight = network.get_submodule(member.path), weight_of(network, member)
            size = channels(module, COLUMNS)
            assert size is not None
            columns = torch.ones(size, dtype=weight.dtype, device=weight.device)
            scale = scales[group.site].to(weight.device, weight.dtype)
            columns[member.indices.to(weight.device)] = scale[member.units.to(weight.device)]
            if isinstance(module, _ConvTransposeNd):
                weight.mul_(columns.view(-1, *[1] * (weight.dim() - 1)))
                continue
            # a row of a grouped convolution reads only its own group's columns
            split = module.groups if isinstance(module, _ConvNd) else 1
            factors = columns.view(split, -1).repeat_interleave(weight.shape[0] // split, dim=0)
            weight.mul_(factors.view(*weight.shape[:2], *[1] * (weight.dim() - 2)))


def comparable(groups: Iterable[StructureGroup], small: nn.Module) -> list[str]:
    """The layers that read structures and whose outputs can be observed in the smaller network.

    Not those in torch's own attention: it uses the weights of its output projection and never calls it.
    """
    modules = dict(small.named_modules())
    readers = dict.fromkeys(member.path for group in groups for member in group.consumers)
    return [
        path
        for path in readers
        if path in modules and not isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)
    ]
