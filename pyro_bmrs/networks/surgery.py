"""Removing structures physically, and proving that the smaller network equals the reduced model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.networks.copies import copied, left_alone
from pyro_bmrs.networks.cuts import Cuts, joined
from pyro_bmrs.networks.groups import StructureGroup, cuts_of
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
from pyro_bmrs.networks.precision import InDouble, is_double
from pyro_bmrs.networks.structures import structure_groups

# The check runs in float64, where the two networks differ by rounding alone.
TOLERANCE = 1e-10
OWN_TOLERANCE = 1e-5
# Of a network that amplifies rounding: at most so much, and so many times what the last bits of its weights do.
_MOST_ROUNDING, _TIMES_ROUNDING = 1e-6, 10
# Rounding hides errors in an output that varies by less than this share of its size.
_LEAST_SPREAD = 0.01
# Other widths are summed in another order. So many last bits of the largest output are no mistake, which counts where
# a network in its own precision has an output that does not depend on its input.
_LAST_BITS = 16


class EqualityError(RuntimeError):
    """The smaller network does not compute what the reduced model computes.

    Attributes:
        path: of the module where that is seen; empty for the network itself.
        difference: of an output, relative to the spread of outputs; infinite where they can't be compared.
    """

    def __init__(self, message: str, path: str = "", difference: float = math.inf) -> None:
        super().__init__(message)
        self.path, self.difference = path, difference


class Surgery(NamedTuple):
    """A smaller network, and what was cut."""

    network: nn.Module
    cuts: Cuts
    difference: float  # the largest, relative to the spread of the outputs


@dataclass(frozen=True)
class Expected:
    """What a reduced model computes, so far as it is left in the smaller network.

    Attributes:
        outputs: of the layers that read structures, by path, and of the network, by "the network".
        whole: the names of those whose channels that stay are known. Others are compared where shapes agree.
        advice: what to do where the smaller network computes something else.
    """

    outputs: Mapping[str, list[Tensor]]
    whole: frozenset[str]
    advice: str


@torch.no_grad()
def expected(
    reduced: nn.Module,
    scales: Mapping[str, Tensor],
    example_input: Inputs,
    groups: Iterable[StructureGroup],
    cuts: Cuts,
) -> Expected:
    """What `check_equal` compares a smaller network with. `reduced` is left as it is, and may be cut afterwards.

    Args:
        reduced: the network with noise.
        scales: by site, its values of θ, 0 for what is removed.
        example_input: the examples of the check.
        groups: the network's structures. The outputs of the layers that read them are compared too.
        cuts: that make the smaller network.
    """
    readers = dict.fromkeys(member.read_by for group in groups for member in group.consumers)
    kept = {path: _kept_outputs(reduced.get_submodule(path), path, cuts) for path in readers if path}
    outputs: dict[str, list[Tensor]] = {}

    def keep(path: str, output: Any) -> None:
        tensors = tensors_of(output)
        left = kept[path]
        if left is not None and left[1] is not None:
            dim, rows = left[0], torch.tensor(left[1], device=tensors[0].device)
            tensors = [tensor.index_select(dim, rows) for tensor in tensors]
        # what follows may change them in place
        outputs.setdefault(path, []).extend(tensor.clone() for tensor in tensors)

    with (
        left_alone(reduced), fixed_scales(reduced, scales), _outputs_of(reduced, kept, keep), _precise(reduced)
    ):  # fmt: skip
        outputs["the network"] = tensors_of(call(reduced, example_input))
    advice = (
        "; leave out, in insert_noise, what this layer reads"
        if hooked_noise(reduced)
        else ". A noise layer must stand where its structures are consumed, after every activation that is not "
        "positively homogeneous"
    )
    whole = {"the network", *(path for path, left in kept.items() if left is not None)}
    return Expected(outputs, frozenset(whole), advice)


def _kept_outputs(module: nn.Module, path: str, cuts: Cuts) -> tuple[int, list[int] | None] | None:
    """(dimension of its channels, those that stay; None: all) of a layer's output; None if that can't be told."""
    of_weight = cuts.tensors.get(joined(path, "weight"), {})
    if isinstance(module, nn.Linear):
        return -1, of_weight.get(0)
    if not isinstance(module, _ConvNd):
        return None
    dim, kept = -1 - len(module.kernel_size), of_weight.get(0)
    if isinstance(module, _ConvTransposeNd):
        kept, each = of_weight.get(1), module.out_channels // module.groups
        if kept is not None:  # each group makes the same ones
            kept = [group * each + row for group in range(module.groups) for row in kept]
    return dim, kept


@torch.no_grad()
def check_equal(
    small: nn.Module, expected: Expected, example_input: Inputs, *, tolerance: float = TOLERANCE
) -> float:
    """Largest difference of outputs, relative to their spread over the examples; raises above `tolerance`.

    The outputs of the network and of the layers that read structures are compared. The difference is relative to the
    spread (at least 1 % of the largest output), since an output that hardly depends on its input would
    hide any error. What the last bits of the largest output may be off by is allowed.

    Args:
        small: the smaller network.
        expected: what the reduced model computes.
        example_input: the same examples.
        tolerance: allowed relative difference.

    Raises:
        EqualityError: naming the layer, the largest difference, the spread and the tolerance.
    """
    have: dict[str, list[Tensor]] = {}
    there = dict(small.named_modules(remove_duplicate=False))

    def keep(path: str, output: Any) -> None:
        have.setdefault(path, []).extend(tensor.clone() for tensor in tensors_of(output))

    readers = [path for path in expected.outputs if path in there]
    with left_alone(small), _outputs_of(small, readers, keep), where_it_fails(small), _precise(small):
        have["the network"] = tensors_of(call(small, example_input))
    worst = 0.0
    for name, outputs in expected.outputs.items():
        # other code may use a layer's weight, as torch's own attention does, and never call it
        for index, (wanted, found) in enumerate(zip(outputs, have.get(name, outputs), strict=True)):
            if not wanted.is_floating_point():
                continue
            if wanted.shape != found.shape:
                if name not in expected.whole:
                    continue
                raise EqualityError(
                    f"output {index} of {name} has shape {tuple(found.shape)} in the smaller network, "
                    f"{tuple(wanted.shape)} in the reduced model",
                    name,
                )
            distance, scale = difference(wanted, found)
            worst = max(worst, distance / scale)
            if not (distance <= tolerance * scale or distance <= _last_bits(wanted)):
                raise EqualityError(
                    f"the smaller network differs from the reduced model: output {index} of {name} by at most "
                    f"{distance:.3e} where outputs spread over {scale:.3e} (allowed: {tolerance:g} of it)"
                    + expected.advice,
                    name,
                    distance / scale,
                )
    return worst


@torch.no_grad()
def _rounding(
    reduced: nn.Module, scales: Mapping[str, Tensor], example_input: Inputs, groups: Iterable[StructureGroup],
    cuts: Cuts, wanted: Expected,
) -> float:  # fmt: skip
    """How much the outputs of a reduced model change with the last bits of its weights. The weights stay changed."""
    for parameter in reduced.parameters():
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps * torch.randn_like(parameter))
    found = expected(reduced, scales, example_input, groups, cuts)
    pairs = (
        difference(one, other)
        for name, outputs in wanted.outputs.items()
        for one, other in zip(outputs, found.outputs[name], strict=True)
        if one.is_floating_point()
    )
    return max(distance / scale for distance, scale in pairs)


def _precise(network: nn.Module) -> AbstractContextManager[Any]:
    return InDouble() if is_double(network) else nullcontext()


def difference(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """(largest difference, spread of `wanted` over the examples); (0, 1) for outputs without entries."""
    if wanted.shape == found.shape and not wanted.numel():
        return 0.0, 1.0
    finite = wanted.isfinite()
    # infinities, such as those of a mask, must be in the same places
    if not torch.equal(torch.where(finite, 0.0, wanted), torch.where(finite, 0.0, found)):
        return math.inf, 1.0
    distance = float(torch.where(finite, wanted - found, 0.0).abs().max())
    values = torch.where(finite, wanted, 0.0)
    spread = float((values - values.mean(dim=0, keepdim=True)).abs().max())
    return distance, max(spread, _LEAST_SPREAD * float(values.abs().max())) or 1.0


def _last_bits(wanted: Tensor) -> float:
    """What rounding in its own precision may change of an output."""
    largest = torch.where(wanted.isfinite(), wanted, 0.0).abs().max()
    # of half precision they would hide a mistake
    return min(_LAST_BITS * torch.finfo(wanted.dtype).eps, OWN_TOLERANCE) * float(largest)


@contextmanager
def _outputs_of(network: nn.Module, paths: Iterable[str], keep: Callable[[str, Any], None]) -> Iterator[None]:
    """Hands each output of the layers at `paths` to `keep`, while the context lasts."""

    def hook(path: str) -> Any:
        return lambda module, arguments, output: keep(path, output)

    handles = [network.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def where_it_fails(network: nn.Module) -> Any:
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
            f"the smaller network fails in {place} with {type(error).__name__}: {reason}",
            running[-1] if running else "",
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
            checked in its own precision, to 1e-5. A very deep one without normalisation may amplify rounding: outputs
            may then differ by ten times what they change by with the last bits of the weights, and by 1e-6 at most.

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
    example = map_tensors(lambda tensor: tensor.to(device), example_input)
    reduced_scales = {
        site: torch.where(kept[site].to(device), scales[site].to(device, torch.float64), 0.0)
        for site in groups
    }
    reduced = _all_on(copied(network).double())
    try:
        double = as_double(example)
        wanted, example = expected(reduced, reduced_scales, double, groups.values(), cuts), double
    except RuntimeError:  # it has constants of another precision
        reduced, tolerance = _all_on(copied(network)), max(tolerance, OWN_TOLERANCE)
        wanted = expected(reduced, reduced_scales, example, groups.values(), cuts)
    # the same copy: a second one would be the most memory that all this takes
    fold(reduced, groups.values(), reduced_scales)
    cuts.cut(reduced)
    small = without_noise(reduced)
    try:
        largest = check_equal(small, wanted, example, tolerance=tolerance)
    except EqualityError as error:
        if not is_double(small) or error.difference > _MOST_ROUNDING:
            raise
        with torch.random.fork_rng():
            torch.manual_seed(0)
            again = _all_on(copied(network).double())
            rounding = _rounding(again, reduced_scales, example, groups.values(), cuts, wanted)
        allowed = min(_TIMES_ROUNDING * rounding, _MOST_ROUNDING)
        largest = check_equal(small, wanted, example, tolerance=max(tolerance, allowed))
    for name, tensor in _floating(small):
        tensor.data = tensor.data.to(dtypes.get(name, usual))
    cuts.match_precision(small, network)
    gradients = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(gradients.get(name, True))
        parameter.grad = None
    modes = {path: module.training for path, module in network.named_modules()}
    for path, module in small.named_modules():
        module.training = modes.get(path, network.training)
    return Surgery(small, cuts, largest)


def _all_on(network: nn.Module) -> nn.Module:
    """In evaluation, with no structure removed yet: the scales are 0 where one is."""
    for layer in noise_layers(network).values():
        layer.kept.fill_(True)
    return network.eval()


def _floating(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point():
            yield name, tensor


@torch.no_grad()
def fold(network: nn.Module, groups: Iterable[StructureGroup], scales: Mapping[str, Tensor]) -> None:
    """Multiply, in place, the entries on which the θ of each structure acts."""
    for group in groups:
        factors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for member in group.multiplied:
            tensor = member.tensor(network)
            # layers may share a tensor, and read it in several places
            new = tensor.new_ones(tensor.shape[member.dim])
            _, factor = factors.setdefault((id(tensor), member.dim), (tensor, new))
            theta = scales[group.site].to(tensor.device, tensor.dtype)
            factor[member.indices.to(tensor.device)] = theta[member.units.to(tensor.device)]
        for (_, dim), (tensor, factor) in factors.items():
            layout = [1] * tensor.dim()
            layout[dim] = -1
            tensor.mul_(factor.view(layout))
