"""Tensors that look multiplied by θ to the code that reads them, while what is stored stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.cuts import joined, tensor_of

# (path of the module that owns a tensor, name of it there)
Key = tuple[str, str]


class SeenTensors:
    """Which modules read which tensors through θ, and what each of those sees that is under way.

    Args:
        readers: by tensor, the paths of the modules whose forward reads it through θ.
        multiplied: makes, of a reader, a tensor's key and the tensor as it is stored, what that reader sees.
    """

    def __init__(
        self, readers: Mapping[Key, list[str]], multiplied: Callable[[str, Key, Tensor], Tensor]
    ) -> None:
        self.readers, self.multiplied = readers, multiplied
        self.owners: dict[str, nn.Module] = {}
        # of the modules that run, innermost last: what they see; None: the tensor as it is stored
        self.under_way: list[tuple[str, dict[Key, Tensor | None]]] = []

    def __getstate__(self) -> dict[str, Any]:
        # what was multiplied belongs to one pass, and to a graph that can't be copied
        return {**self.__dict__, "under_way": []}

    def attach(self, network: nn.Module) -> None:
        """From now on `module.name` gives a product while a reader runs."""
        self.owners = {path: network.get_submodule(path) for path, _ in self.readers}
        for path, module in self.owners.items():
            for table in ("_parameters", "_buffers"):
                vars(module)[table] = _Table(getattr(module, table), self, path)
        reading = {reader for readers in self.readers.values() for reader in readers}
        for path in sorted(reading | self.owners.keys()):
            module, hooks = network.get_submodule(path), _Hooks(self, path)
            module.register_forward_pre_hook(hooks.start)
            module.register_forward_hook(hooks.finish, always_call=True)

    def start(self, path: str) -> None:
        """A module begins. It sees its own tensors as they are stored, unless it reads them through θ."""
        seen: dict[Key, Tensor | None] = {key: None for key in self.readers if key[0] == path}
        # made once, and here: not in a part of the forward that runs again in the backward pass
        seen |= {key: self._product(path, key) for key, readers in self.readers.items() if path in readers}
        self.under_way.append((path, seen))

    def finish(self, path: str) -> None:
        """A module has ended, if it began."""
        if self.under_way and self.under_way[-1][0] == path:
            self.under_way.pop()

    def look(self, key: Key, stored: Any) -> Any:
        """What the code that asks a module for this tensor gets."""
        if key not in self.readers:
            return stored
        for _, seen in reversed(self.under_way):
            if key in seen:
                product = seen[key]
                return stored if product is None else product
        # activation checkpointing runs parts of a forward again during the backward pass
        return stored if torch._C._current_graph_task_id() == -1 else self._again(key)

    def _again(self, key: Key) -> Tensor:
        reader, *others = self.readers[key]
        # a checkpoint without re-entrance, which sets hooks, takes values alone from this run: no graph is needed
        if others or torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            raise RuntimeError(
                f"{joined(*key)!r}, which is multiplied by θ while {reader!r} runs, is read in the backward pass: "
                "checkpoint whole modules, with use_reentrant=False"
            )
        with torch.enable_grad():
            wanted = self._product(reader, key).requires_grad
        with torch.no_grad():
            return self._product(reader, key).requires_grad_(wanted)

    def _product(self, reader: str, key: Key) -> Tensor:
        stored = tensor_of(self.owners[key[0]], key[1])
        assert stored is not None
        return self.multiplied(reader, key, stored)


class _Table(dict[str, Any]):
    """A module's parameters or buffers, in the place of its plain dictionary of them.

    `module.name` asks it for one. What goes through all of them, such as `parameters()`, `state_dict()` or
    `to()`, gets what is stored.
    """

    def __init__(self, stored: Mapping[str, Any], tensors: SeenTensors, path: str) -> None:
        super().__init__(stored)
        self.tensors, self.path = tensors, path

    def __getitem__(self, name: str) -> Any:
        return self.tensors.look((self.path, name), super().__getitem__(name))


class _Hooks:
    """The hooks of one module. Bound methods: a copy of the network gets hooks that know the copied noise."""

    def __init__(self, tensors: SeenTensors, path: str) -> None:
        self.tensors, self.path = tensors, path

    def start(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.tensors.start(self.path)

    def finish(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.tensors.finish(self.path)


def is_hook(owner: object) -> bool:
    """Whether `attach` made this, to which a hook is bound."""
    return isinstance(owner, _Hooks)


def with_plain_tables(network: nn.Module) -> None:
    """Undo `attach` in place, but for the hooks."""
    for module in network.modules():
        for table in ("_parameters", "_buffers"):
            if isinstance(getattr(module, table), _Table):
                vars(module)[table] = dict(getattr(module, table).items())
