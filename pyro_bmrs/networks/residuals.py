"""What is added to a layer's output, such as the stream that goes round a block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_bmrs.networks.inputs import Inputs, batch_size, call, taken, tensors_of
from pyro_bmrs.networks.modes import in_mode

_ADDS = {
    torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__,
}  # fmt: skip
# Functions that a tensor may meet before it is added: they ask for its shape, or give it back.
_HARMLESS = {"__get__", "size", "dim", "dropout"}


@dataclass(frozen=True)
class Beside:
    """What is added to a layer's output, known when the layer is called.

    Attributes:
        path: of a module whose input or output it is.
        is_output: which of both.
    """

    path: str
    is_output: bool


class _Adds(TorchFunctionMode):
    """Follows the outputs of layers to the first sum that they are part of.

    Attributes:
        waiting: by id of a layer's output: the layer.
        called: by layer: how many were called before it.
        seen: by id of a tensor: the modules whose input or output it was, and the calls of layers before that.
        last: the id of the last input or output of a module.
        versions: by layer: by id of a tensor, how often it had been changed in place when the layer was called.
        summed: by id of a layer's output that has met its sum: the layer.
        found: by path of a layer.
        kept: all these tensors, so that none gets the id of another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, str] = {}
        self.seen: dict[int, list[tuple[str, bool, int]]] = {}
        self.last: dict[tuple[str, bool], int] = {}
        self.versions: dict[str, dict[int, int]] = {}
        self.summed: dict[int, str] = {}
        self.found: dict[str, Beside] = {}
        self.called: dict[str, int] = {}
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of(args)
        if func in _ADDS and len(given) == 2 and not kwargs and given[0].shape == given[1].shape:
            # the later of two layers knows what the earlier one has made
            mine = sorted(
                (self._called(one), number) for number, one in enumerate(given) if id(one) in self.waiting
            )
            self._use(given)
            for _, number in mine[-1:]:
                self._add(given[number], given[1 - number])
        elif getattr(func, "__name__", "") not in _HARMLESS:
            for tensor in given:
                self.waiting.pop(id(tensor), None)
            self._use(given)
        return func(*args, **kwargs)

    def _use(self, tensors: Iterable[Tensor]) -> None:
        """Forget the sums of outputs that are used again."""
        for tensor in tensors:
            self.found.pop(self.summed.pop(id(tensor), ""), None)

    def _called(self, tensor: Tensor) -> int:
        return self.called[self.waiting[id(tensor)]]

    def _add(self, mine: Tensor, other: Tensor) -> None:
        path = self.waiting.pop(id(mine))
        for source, is_output, before in self.seen.get(id(other), []):
            # modules may be called again, and hold another tensor then
            same = self.versions[path].get(id(other)) == other._version  # not changed in place since
            if before <= self.called[path] and self.last[source, is_output] == id(other) and same:
                self.found[path] = Beside(source, is_output)
                self.summed[id(mine)] = path
                break

    def see(self, path: str, is_output: bool, tensor: Tensor) -> None:
        self.kept.append(tensor)
        self.seen.setdefault(id(tensor), []).append((path, is_output, len(self.called)))
        self.last[path, is_output] = id(tensor)


@torch.no_grad()
def added(network: nn.Module, paths: Collection[str], inputs: Inputs) -> dict[str, Beside]:
    """What is added to the outputs of layers, by path, where a sum is all that they are used for.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(x).relu())
    >>> added(Block(), ["up", "down"], torch.zeros(2, 4))
    {'down': Beside(path='up', is_output=False)}
    """
    some, adds = taken(inputs, slice(0, 2), batch_size(inputs)), _Adds()

    def before(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in tensors_of((args, kwargs))[:1]:
            adds.see(path, False, tensor)

    def after(path: str, module: nn.Module, _: Any, y: Any) -> None:
        if isinstance(y, Tensor):
            if path in paths:
                adds.called[path] = len(adds.called)
                adds.waiting[id(y)] = path
                adds.versions[path] = {id(tensor): tensor._version for tensor in adds.kept}
            adds.see(path, True, y)

    handles = []
    for path, module in network.named_modules():
        if path and not [*module.children()]:
            handles.append(module.register_forward_pre_hook(partial(before, path), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, path)))
    try:
        with in_mode(network, training=False), adds:
            call(network, some)
    finally:
        for handle in handles:
            handle.remove()
    return adds.found


@contextmanager
def kept_beside(
    network: nn.Module, besides: Mapping[str, Beside]
) -> Iterator[Callable[[str], Tensor | None]]:
    """For one pass: gives what is added to a layer's output, by the layer's path, once.

    A tensor is held only until the last of its layers has asked, so that a pass needs no more memory than without.
    None: nothing is added, or the layer is called several times and asks again, or before that was made.
    """
    held: dict[Beside, Tensor] = {}
    asking: dict[Beside, set[str]] = {}
    for path, one in besides.items():
        asking.setdefault(one, set()).add(path)

    def keep(one: Beside) -> Any:
        if one.is_output:
            return lambda module, args, kwargs, y: held.__setitem__(one, y)
        return lambda module, args, kwargs: held.__setitem__(one, tensors_of((args, kwargs))[0])

    def take(path: str) -> Tensor | None:
        one = besides.get(path)
        if one is None or path not in asking[one]:
            return None
        asking[one].discard(path)
        return held.get(one) if asking[one] else held.pop(one, None)

    handles = []
    for one in asking:
        module = network.get_submodule(one.path)
        register = module.register_forward_hook if one.is_output else module.register_forward_pre_hook
        handles.append(register(keep(one), with_kwargs=True))
    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()
