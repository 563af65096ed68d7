"""Any network: the structures that can be removed, each tried first; and the same network with noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.copies import copied, left_alone, sharing_parameters
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.hooked_noise import HookedNoise
from pyro_bmrs.networks.inputs import (
    Inputs,
    batch_size,
    blamed_on_input,
    call,
    check_finite,
    check_module,
    first_examples,
    repeated,
    tensors_of,
)
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import at_one, noise_layers
from pyro_bmrs.networks.structures import StructureError, Structures, find_structures
from pyro_bmrs.networks.surgery import difference
from pyro_bmrs.networks.tracing.grouping import Refused
from pyro_bmrs.networks.trial import Trial

# So many of the given examples are looked at, if the network can be called with them; of a large network, whose passes
# are dear, one.
_EXAMPLES, _LARGE = 2, 10_000_000
# (examples, outputs, paths of modules that were not reached)
type _Outcome = tuple[Inputs, list[Tensor], set[str]]


def structures(
    network: nn.Module, example_input: Inputs, *, leave_out: str | Sequence[str] = (), strict: bool = False
) -> Structures:
    """Every structure that can be removed from `network`; and what can't be removed, with the reason.

    A structure is a set of channels that must be removed together: the rows that make it, the normalisation it
    passes, the columns that read it. Examples are hidden units, filters, the channels of a residual stream (one
    structure across all its layers), concatenated channels, depthwise and grouped convolutions (the same
    channel of every group), whole attention heads (query heads that share key and value count as one), the
    hidden units of transformers. Each group is tried before it is listed: on a copy with random weights some of its
    structures are removed, and the outputs are compared.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    >>> print(structures(net, torch.randn(2, 1, 8, 8)))
    4 structures in 1 groups
      0: 4 filters, read by 4
    not removable:
      4: 3 channels, an output of the network

    Args:
        network: any module without noise layers; it is not changed.
        example_input: inputs to call it with: a tensor (batch, …), a tuple of arguments or a mapping of
            keyword arguments. Only shapes matter, and values of integers.
        leave_out: paths of modules or parameters, or patterns ("layer4.*"). Structures that touch these, or modules
            below them, stay.

    Raises:
        StructureError: naming each layer that can't be handled, the reason, and what to pass as
            `leave_out` to continue without it.
        ValueError: if `network` has noise layers or no parameters, can't be called with `example_input`, or
            `leave_out` matches nothing.
    """
    return _found(network, example_input, leave_out, strict).structures


@dataclass(frozen=True)
class _Found:
    """What a search has found, and what it saw on the way.

    Attributes:
        example: some examples of the given ones.
        outputs: of the network for these.
        folded: paths of the layers whose input does not have one entry per example in its first dimension.
    """

    structures: Structures
    example: Inputs
    outputs: list[Tensor]
    folded: AbstractSet[str]


def _found(network: nn.Module, example_input: Inputs, leave_out: str | Sequence[str], strict: bool) -> _Found:
    _check(network, example_input)
    if not isinstance(leave_out, str | Sequence):
        raise TypeError(f"leave_out must be a path, a pattern, or a sequence of them: got {leave_out!r}")
    leave_out = (leave_out,) if isinstance(leave_out, str) else leave_out
    separate = sharing_parameters(network).eval()
    example, outputs, unused = _called_once(network, separate, example_input)
    in_training = _in_training(network, example) & unused if unused else unused
    separate_attention(separate)
    found, folded = find_structures(separate, example, leave_out, in_training)
    if found.groups and not any(tensor.is_meta for tensor in tensors_of(example)):
        found = _tried(separate, found, example)
    culprits = [refused for refused in found.refused if refused.unsupported]
    if strict and culprits:
        raise StructureError(
            "network has layers that can't be handled: "
            f"{'; '.join(f'{refused.path}: {refused.reason}' for refused in culprits)}. Leave them as they are with "
            f"leave_out={sorted({refused.path for refused in culprits})}"
        )
    return _Found(found, example, outputs, folded)


@torch.no_grad()
def _called_once(network: nn.Module, copy: nn.Module, example_input: Inputs) -> _Outcome:
    """(a few examples, the outputs for them, paths of the modules with parameters that they do not reach).

    All examples where a few fail, since they may need each other; more where these reach more modules, as in a mixture
    of experts.
    """
    few, count = example_input, 1 if parameters(network) > _LARGE else _EXAMPLES
    if batch_size(example_input) > count:
        with suppress(Exception):  # what is not a plain tensor may not be taken apart
            few = first_examples(example_input, count)
    # torch's attention uses the weights of its output projection and never calls it
    inside = {
        f"{path}.out_proj".lstrip(".")
        for path, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    looked_at = _with_parameters(network).keys() - inside

    def outcome(some: Inputs) -> _Outcome:
        torch.manual_seed(0)
        with _reached(copy) as reached:
            outputs = tensors_of(call(copy, some))
        return some, outputs, looked_at - reached

    with torch.random.fork_rng(), _reached(network) as original, left_alone(copy):
        found = None
        if few is not example_input:
            with suppress(Exception):
                found = outcome(few)
        if found is None:
            with blamed_on_input(network):
                found = outcome(example_input)
        elif found[2]:
            with suppress(Exception):  # all may be more than there is memory for
                found = _fewest(outcome, example_input, found)
        _check_batch(copy, example_input)
    if original:
        raise StructureError(
            f"network must be copied whole: a copy of it still calls {', '.join(map(repr, sorted(original)))} of "
            "the original, which a function holds that was set as its forward or as a hook. Take modules from "
            "the arguments of hooks, and write forward as a method"
        )
    return found


def _fewest(outcome: Callable[[Inputs], _Outcome], example_input: Inputs, found: _Outcome) -> _Outcome:
    """The outcome of as few examples as reach what all reach."""
    of_all, count = outcome(example_input), batch_size(example_input)
    some = 2 * batch_size(found[0])
    while len(of_all[2]) < len(found[2]) and some < count:
        found, some = outcome(first_examples(example_input, some)), 2 * some
    return of_all if len(of_all[2]) < len(found[2]) else found


@torch.no_grad()
def _in_training(network: nn.Module, example: Inputs) -> set[str]:
    """Paths of the modules with parameters that run in training; none if that fails on these examples."""
    looked_at = sharing_parameters(network).train()
    with torch.random.fork_rng(), _reached(looked_at) as used:
        try:
            call(looked_at, repeated(example, _EXAMPLES))
        except Exception:  # for example BatchNorm with one value per channel: no check is possible
            return set()
    return used


def _tried(network: nn.Module, found: Structures, example_input: Inputs) -> Structures:
    """What a trial has confirmed. The rest stays, with what went wrong."""
    groups = list(found)
    good, reasons = Trial(network, example_input).failures(groups)
    refused = [
        Refused(
            group.producers[0].path, group.channels * group.features, reasons[group.site], unsupported=True
        )
        for group in groups
        if group.site in reasons
    ]
    return Structures({group.site: group for group in good}, (*found.refused, *refused))


def insert_noise[Network: nn.Module](
    network: Network, example_input: Inputs, *, leave_out: str | Sequence[str] = (), strict: bool = False
) -> Network:
    """A copy of the network with one latent θ per structure, which acts wherever the structure is read.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> noisy = bmrs.insert_noise(net, torch.randn(2, 4))
    >>> list(bmrs.networks.noise_layers(noisy)), set(net.state_dict()) <= set(noisy.state_dict())
    (['0', '2'], True)

    The given network is unchanged. The copy has its class, its forward signature and its parameters under
    the same names. `nn.MultiheadAttention` becomes an equal `SeparateAttention`, which loads the original's
    weights too; where `apply` removes no head, torch's own comes back. A latent site has the name of the
    first module that makes its structures.

    Args:
        network, example_input, leave_out: as for `structures`.

    Raises:
        StructureError, ValueError: as `structures`. Also StructureError, with the reasons, if nothing can be removed.
    """
    found = _found(network, example_input, leave_out, strict)
    check_finite("network", network)
    if not found.structures.groups:
        reasons = "; ".join(f"{refused.path}: {refused.reason}" for refused in found.structures.refused)
        raise StructureError(
            f"network must have something that can be removed: {reasons or 'it has no layers'}"
        )
    noisy = copied(network)
    separate_attention(noisy)
    noise = HookedNoise(noisy, list(found.structures))
    noise.attach(noisy)
    noise.folded = set(noise.readers) & found.folded
    if not any(tensor.is_meta for tensor in tensors_of(example_input)):
        noise.folded |= _check_unchanged(noisy, noise, found)
    return noisy


@torch.no_grad()
def _check_unchanged(noisy: nn.Module, noise: HookedNoise, found: _Found) -> set[str]:
    """Raise StructureError unless the network with noise, at θ = 1, has the outputs of the given one.

    Returns:
        Paths of the layers whose input does not have one entry per example in its first dimension.
    """
    folded: set[str] = set()
    size = batch_size(found.example)

    def look(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if tensors_of((arguments, keywords))[0].shape[0] != size:
                folded.add(path)

        return hook

    handles = [
        noisy.get_submodule(path).register_forward_pre_hook(look(path), with_kwargs=True)
        for path in noise.readers
    ]
    with torch.random.fork_rng(), at_one(noisy), left_alone(noisy), in_mode(noisy, training=False):
        torch.manual_seed(0)
        outputs = tensors_of(call(noisy, found.example))
    for handle in handles:
        handle.remove()
    for index, (wanted, have) in enumerate(zip(found.outputs, outputs, strict=True)):
        if wanted.is_floating_point():
            distance, scale = difference(wanted.double(), have.double())
            # only rounding may differ, as in attention that computes in another order
            if not distance <= min(1e4 * torch.finfo(wanted.dtype).eps, 0.1) * scale:
                raise StructureError(
                    f"network can't be given noise: with every θ at 1 output {index} differs by {distance:.3g} from "
                    f"that of the network without noise, where outputs spread over {scale:.3g}"
                )
    return folded


def _check(network: nn.Module, example_input: Inputs) -> None:
    """Raise for what can't be handled at all."""
    check_module("network", network)
    for path, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"network must have all its parameters: {path!r} is made by the first call; call it once"
            )
        if parameter.is_inference():
            raise ValueError(
                f"network must be made outside of torch.inference_mode: {path!r} can't have a gradient"
            )
        if parameter.is_complex():
            raise ValueError(f"network must have real parameters: got {path!r} of type {parameter.dtype}")
    if next(network.parameters(), None) is None:
        raise ValueError(f"network must have parameters: {type(network).__name__} has none")
    if noise_layers(network):
        raise ValueError(f"network must have no noise layers yet: it has {sorted(noise_layers(network))}")
    if not batch_size(example_input):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(example_input))
        raise ValueError(f"example_input must hold at least one example: got shape {shapes}")


@torch.no_grad()
def _check_batch(network: nn.Module, example_input: Inputs) -> None:
    """Refuse numbers of one dimension that are one example, and no batch of them."""
    if (
        not isinstance(example_input, Tensor)
        or example_input.dim() != 1
        or not example_input.is_floating_point()
    ):
        return
    try:
        single, several = (call(network, x) for x in (example_input, example_input.unsqueeze(0)))
    except Exception:  # it takes no batch: each number is an example
        return
    if isinstance(single, Tensor) and several.shape == (1, *single.shape):
        raise ValueError(
            f"example_input must have examples in its first dimension: got shape {tuple(example_input.shape)}"
        )


@contextmanager
def _reached(network: nn.Module) -> Iterator[set[str]]:
    """Collects paths of the modules with parameters that are called within the context, not on empty inputs alone."""
    reached: set[str] = set()

    def note(path: str, inputs: object) -> None:
        tensors = tensors_of(inputs)
        if not tensors or any(tensor.numel() for tensor in tensors):
            reached.add(path)

    handles = [
        module.register_forward_pre_hook(lambda _, *given, path=path: note(path, given), with_kwargs=True)
        for path, module in _with_parameters(network).items()
    ]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _with_parameters(network: nn.Module) -> dict[str, nn.Module]:
    """By path: the modules that have parameters themselves, not only in submodules."""
    return {
        path: module
        for path, module in network.named_modules()
        if any(parameter is not None for parameter in module._parameters.values())
    }
