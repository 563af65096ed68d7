"""Inputs and outputs of networks: tensors, tuples of arguments, mappings of keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

# A tensor; a tuple of positional arguments; or a mapping of keyword arguments (one dictionary argument, if forward
# has no such keywords).
Inputs = Any
# Of an image: grey, colour, colour and opacity.
_CHANNELS = (1, 3, 4)


def check_module(name: str, module: object) -> None:
    """Raise TypeError, naming the argument, unless it is a module of Python code, which can be copied and cut."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module: got {kind}")
    if isinstance(module, nn.DataParallel | DistributedDataParallel):
        raise TypeError(f"{name} must be the module itself: got it in a {kind}; pass its .module")
    if isinstance(module, GraphModule):
        raise TypeError(
            f"{name} must be the network itself: got a traced graph of it, whose copies lose hooks"
        )
    compiled = [path for path, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if compiled:
        where = f"in {compiled[0]!r}" if compiled[0] else kind
        raise TypeError(f"{name} must be Python code: got TorchScript {where}; pass what it was made from")


@contextmanager
def blamed_on_input(network: nn.Module, name: str = "example_input") -> Iterator[None]:
    """Turns an error of a call of the network into a one-line ValueError about the argument of that name."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} must be what network can be called with: {type(network).__name__} fails with "
            f"{type(error).__name__}: {reason}"
        ) from error


def check_numbers(name: str, data: object) -> None:
    """Raise ValueError, naming the argument, if a tensor of it holds NaN. Infinities may be those of a mask."""
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors_of(data)):
        raise ValueError(f"{name} must hold no NaN")


def check_finite(name: str, module: nn.Module) -> None:
    """Raise ValueError, naming the argument, if a parameter holds NaN or inf. Outputs could not be compared."""
    bad = [
        path
        for path, parameter in module.named_parameters()
        # a sum is fast, and not finite where one number is not; that of finite ones may overflow
        if not parameter.is_meta
        and not bool(torch.isfinite(parameter.detach().sum()))
        and not bool(torch.isfinite(parameter).all())
    ]
    if bad:
        raise ValueError(
            f"{name} must have finite parameters: got NaN or inf in {', '.join(map(repr, bad[:10]))}"
        )


def call(network: nn.Module, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> Any:
    """`network` called with `inputs`: a tensor, a tuple of arguments, or a mapping of keywords.

    Args:
        weights: by name, tensors to use in place of parameters.
    """
    arguments: tuple[Any, ...] = (inputs,)
    keywords: dict[str, Any] = {}
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):  # a named tuple is one argument
        arguments = inputs
    elif takes_keywords(network, inputs):
        arguments, keywords = (), dict(inputs)
    if weights:
        return functional_call(network, dict(weights), arguments, keywords)
    return network(*arguments, **keywords)


def takes_keywords(network: nn.Module, inputs: Inputs) -> bool:
    """Whether `inputs` is a mapping of keyword arguments of `network`, not one dictionary argument."""
    if not isinstance(inputs, Mapping):
        return False
    try:
        inspect.signature(network.forward).bind(**inputs)
    except TypeError:
        return False
    return True


def bound(network: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Inputs:
    """The inputs with which `call` calls `network` with these arguments."""
    if not keywords:
        return arguments[0] if len(arguments) == 1 else arguments
    if not arguments:
        return dict(keywords)
    return dict(inspect.signature(network.forward).bind(*arguments, **keywords).arguments)


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in a network's input or output, in order: itself, or those in a tuple, list, mapping or dataclass."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [tensor for entry in fields(value) for tensor in tensors_of(getattr(value, entry.name))]
    return []


def described(value: object) -> str:
    """The types and shapes of the tensors in a network's input, for a message.

    >>> described((torch.zeros(8, 4), torch.zeros(8, dtype=torch.int32)))
    'float32 (8, 4), int32 (8,)'
    """
    tensors = tensors_of(value)
    told = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors[:4]]
    return ", ".join([*told, "…"][: len(tensors)]) or f"a {type(value).__name__}"


def map_tensors[T](function: Callable[[Tensor], Tensor], value: T) -> T:
    """`value` with `function` applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    return map_items(lambda item: map_tensors(function, item), value)


def map_items[T](function: Callable[[Any], Any], value: T) -> T:
    """A mapping, list or tuple with `function` applied to each item of it; anything else as it is."""
    result: Any = value
    if isinstance(value, Mapping):
        result = {key: function(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        items = [function(item) for item in value]
        result = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return result  # type: ignore[no-any-return]


def batch_size(inputs: Inputs) -> int:
    """Number of examples: the length of the list of images, or the first dimension of the first tensor.

    Raises:
        ValueError: if there is no tensor with a first dimension.
    """
    lists = _lists_of_images(inputs)
    if lists:
        return len(lists[0])
    for tensor in tensors_of(inputs):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError(f"example_input must hold a tensor of examples: got {type(inputs).__name__}")


def _lists_of_images(value: object) -> list[list[Tensor]]:
    """The batches in a network's input that are lists of images (channels, height, width), as detection takes them.

    Their sizes may differ. A list of other tensors holds several inputs, each with all the examples.
    """
    if isinstance(value, list) and value and all(map(_is_image, value)):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [found for item in items for found in _lists_of_images(item)]


def _is_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] in _CHANNELS


def taken[T](inputs: T, rows: slice | Tensor, examples: int) -> T:
    """Some of the examples: these rows of each tensor that has one entry per example.

    >>> taken((torch.arange(4), torch.tensor(0.5)), slice(2), 4)
    (tensor([0, 1]), tensor(0.5000))

    Of a batch that is a list of images, and of what else is listed for each of them, these entries of the list.

    Args:
        rows: a slice, or their numbers.
        examples: how many there are.
    """
    listed = bool(_lists_of_images(inputs))

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.dim() or len(value) != examples:
                return value
            return value[rows.to(value.device) if isinstance(rows, Tensor) else rows]
        if listed and isinstance(value, list) and len(value) == examples:
            return value[rows] if isinstance(rows, slice) else [value[row] for row in rows.tolist()]
        return map_items(take, value)

    result: T = take(inputs)
    return result


def first_examples[T](inputs: T, count: int) -> T:
    """The first `count` examples of each tensor that has one entry per example."""
    return taken(inputs, slice(count), batch_size(inputs))


def repeated[T](inputs: T, count: int) -> T:
    """Exactly `count` examples: the given ones, repeated."""
    size = batch_size(inputs)
    return taken(inputs, torch.arange(count) % size, size)


def as_double[T](inputs: T) -> T:
    """Floating-point tensors in float64; others, such as token indices, unchanged."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
