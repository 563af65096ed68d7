"""Integers of modules that are followed to where a forward pass uses them as sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Functions that are given the whole shape of what they return.
_OF_SHAPE = {"view", "reshape", "expand", "repeat", "broadcast_to", "new_zeros", "new_ones", "new_empty"}
# (path of the module, or None; name of the attribute; value)
Source = tuple[str | None, str, int]
# Functions that cut a tensor into parts by their number, or by a size that may follow from the tensor's own.
_IN_PARTS = {"chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit"}


class TaggedInt(int):
    """An integer that knows the attributes it was made from: (path of the module, name, value) of each."""

    sources: tuple[Source, ...]

    @classmethod
    def of(cls, value: int, *sources: Source) -> TaggedInt:
        tagged = cls(value)
        tagged.sources = tuple(dict.fromkeys(sources))
        return tagged

    def __deepcopy__(self, memo: object) -> TaggedInt:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _keeping_sources(name: str) -> Callable[[TaggedInt, Any], Any]:
    plain = getattr(int, name)

    def operation(self: TaggedInt, other: Any) -> Any:
        result = plain(self, other)
        if type(result) is not int:
            return result
        return TaggedInt.of(result, *self.sources, *(other.sources if isinstance(other, TaggedInt) else ()))

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv"):
    setattr(TaggedInt, f"__{_name}__", _keeping_sources(f"__{_name}__"))


@contextmanager
def tagged_integers(network: nn.Module) -> Iterator[None]:
    """A context in which the integers that modules of users store are tagged.

    Alone, in tuples and lists, and in the configurations that modules share: of these the module that uses one is found
    later, and the path is None.
    """
    stored: list[tuple[dict[str, Any], str, Any]] = []
    seen: set[int] = set()

    def tag(table: dict[str, Any], path: str | None, start: str = "") -> None:
        for name, value in list(table.items()):
            if type(value) is int and value > 1:
                new: Any = TaggedInt.of(value, (path, start + name, value))
            elif type(value) in (list, tuple) and value and all(type(entry) is int for entry in value):
                new = type(value)(
                    TaggedInt.of(entry, (path, f"{start}{name}.{place}", entry))
                    for place, entry in enumerate(value)
                )
            else:
                continue
            stored.append((table, name, value))
            table[name] = new

    for path, module in network.named_modules():
        if type(module).__module__.startswith("torch.nn.modules"):
            continue
        for name, value in list(vars(module).items()):
            if is_configuration(value) and id(value) not in seen:
                seen.add(id(value))
                tag(vars(value), None, f"{name}.")
        tag(vars(module), path)
    try:
        yield
    finally:
        for table, name, value in stored:
            table[name] = value


def is_configuration(value: object) -> bool:
    """Whether an attribute of a module is an object that holds settings."""
    return type(value).__name__.endswith(("Config", "Configuration", "Args", "Arguments")) and hasattr(
        value, "__dict__"
    )


class SizesSeen(TorchFunctionMode):
    """Tells of each tensor that a function makes, and the tagged integers it was given that are a size of it.

    Args:
        note: called with the tensor, the dimension and the integer.
        note_parts: called with the parts of a tensor that was cut into equal ones, whatever its size.
    """

    def __init__(
        self, note: Callable[[Tensor, int, TaggedInt], None], note_parts: Callable[[list[Tensor]], None]
    ) -> None:
        super().__init__()
        self.note, self.note_parts = note, note_parts

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _IN_PARTS and not any(
            isinstance(leaf, TaggedInt) for leaf in _integers((args[1:2], kwargs))
        ):
            parts = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
            if len({tuple(part.shape) for part in parts}) == 1 < len(parts):
                self.note_parts(parts)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                for axis, tag in _sizes(name, tensor, args, kwargs):
                    self.note(tensor, axis, tag)
        return out


def _sizes(
    name: str, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[int, TaggedInt]]:
    """(dimension, integer) of each tagged integer that is a size of what a function returns."""
    if name in _OF_SHAPE:
        shape = tree_leaves(args[1:])
        if len(shape) == out.dim():
            yield from ((axis, size) for axis, size in enumerate(shape) if isinstance(size, TaggedInt))
            return
    for tag in _integers((args, kwargs)):
        if isinstance(tag, TaggedInt):
            yield from ((axis, tag) for axis, size in enumerate(out.shape) if size == tag)


def _integers(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if not isinstance(leaf, slice):
            yield leaf
        elif leaf.stop is not None:
            yield leaf.stop if leaf.start is None else leaf.stop - leaf.start if _whole(leaf) else None


def _whole(part: slice) -> bool:
    return isinstance(part.start, int) and isinstance(part.stop, int)
