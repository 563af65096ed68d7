"""Noise at the inputs of the layers that read structures, by hooks: the network's own modules stay unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pyro_bmrs.networks.attention import join_attention
from pyro_bmrs.networks.copies import uncompiled
from pyro_bmrs.networks.cuts import COLUMNS, channel_dimension, channels
from pyro_bmrs.networks.groups import StructureGroup
from pyro_bmrs.networks.inputs import check_module
from pyro_bmrs.networks.noise import (
    LARGE,
    MultiplicativeNoise,
    examples_in_batch,
    noise_layers,
    not_examples,
    scaled,
)

NAME = "structure_noise"


class HookedNoise(nn.Module):
    """A submodule of a network that holds the θ of all its structures and applies them.

    At each forward pass of the network every θ is drawn once. The input of each layer that reads structures is
    multiplied by their θ. Called itself, it returns its input, so that it may stand at the end of an `nn.Sequential`.

    Args:
        network: without noise; `attach` changes it.
        groups: of the network.
    """

    def __init__(self, network: nn.Module, groups: Iterable[StructureGroup]) -> None:
        super().__init__()
        like = next(network.parameters())
        self.layers = nn.ModuleList()
        self.groups = {group.site: group for group in groups}
        for group in self.groups.values():
            layer = MultiplicativeNoise(group.features)
            layer.site, layer.channels = group.site, group.channels
            self.layers.append(layer.to(like.device))
        self.drawn: dict[str, Tensor] = {}
        self.running = False
        # of the pass under way, where several values of θ are drawn for it
        self.examples: int | None = None
        # paths of readers whose input has no entry per example: they need one θ for the whole batch
        self.folded: set[str] = set()
        # by reader: the sites of its columns, in levels (see `_levels`)
        self.readers: dict[str, list[tuple[str, ...]]] = {}
        self._index_readers(network)

    def _index_readers(self, network: nn.Module) -> None:
        """For each layer that reads structures: of which sites, and which θ for each column."""
        device = next(network.parameters()).device
        readers: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        for group in self.groups.values():
            for member in group.consumers:
                readers.setdefault(member.path, []).append((group.site, member.indices, member.units))
        self.readers = {}
        for number, (path, parts) in enumerate(readers.items()):
            size = channels(network.get_submodule(path), COLUMNS)
            assert size is not None
            self.readers[path] = []
            for level, disjoint in enumerate(_levels(parts)):
                self.readers[path].append(tuple(site for site, _, _ in disjoint))
                offset, total = 0, sum(self.groups[site].features for site, _, _ in disjoint)
                columns = torch.full((size,), total)  # behind the last θ stands a 1, for columns without θ
                for site, indices, units in disjoint:
                    columns[indices] = offset + units
                    offset += self.groups[site].features
                plain = len(disjoint) == 1 and torch.equal(columns, torch.arange(total))
                self.register_buffer(
                    f"columns_{number}_{level}", None if plain else columns.to(device), persistent=False
                )

    def attach(self, network: nn.Module) -> None:
        """Make this a submodule of `network`, and add the hooks that draw and apply the noise."""
        setattr(network, NAME, self)
        network.register_forward_pre_hook(self.draw, with_kwargs=True)
        network.register_forward_hook(self.finish, always_call=True)
        for number, path in enumerate(self.readers):
            module, reader = network.get_submodule(path), _Reader(self, path, number)
            module.register_forward_pre_hook(reader.multiply, with_kwargs=True)
            module.register_forward_hook(reader.finish, always_call=True)

    def draw(self, network: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Before a forward pass of the network: one value of every θ for it."""
        self.running, self.examples = True, examples_in_batch.get()
        self.drawn = {str(layer.site): layer.draw() for layer in self.layers}  # type: ignore[operator]

    def finish(self, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """After a forward pass of the network, also of one that failed."""
        self.running = False

    def theta(self, path: str, number: int) -> Tensor:
        """θ for each column of the layer at `path`. Shape: (columns,) or (draws, columns)."""
        # activation checkpointing runs layers again during the backward pass
        if not self.running and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"layer {path!r} has noise that is drawn when the network is called: call the network itself"
            )
        levels = [
            self._theta_of(sites, getattr(self, f"columns_{number}_{level}"))
            for level, sites in enumerate(self.readers[path])
        ]
        return prod(levels[1:], start=levels[0])

    def _theta_of(self, sites: tuple[str, ...], columns: Tensor | None) -> Tensor:
        values = [self.drawn[site] for site in sites]
        if columns is None:
            return values[0]
        shape = max((value.shape[:-1] for value in values), key=len)
        one = values[0].new_ones(())
        parts = [value.expand(*shape, value.shape[-1]) for value in values]
        return torch.cat([*parts, one.expand(*shape, 1)], dim=-1).index_select(-1, columns)

    def forward(self, x: Any) -> Any:
        return x

    def __getstate__(self) -> dict[str, Any]:
        # what was drawn belongs to one pass, and to a graph that can't be copied
        return {**self.__dict__, "drawn": {}, "running": False}

    def shrink(self, network: nn.Module, groups: Iterable[StructureGroup]) -> None:
        """Take these groups, which have become smaller; so have their noise layers."""
        self.groups = {group.site: group for group in groups}
        self._index_readers(network)
        self.drawn = {}  # and the graph behind it, which remembers the old sizes

    def extra_repr(self) -> str:
        return f"{sum(group.features for group in self.groups.values())} structures"


def _levels(parts: list[tuple[str, Tensor, Tensor]]) -> list[list[tuple[str, Tensor, Tensor]]]:
    """The (site, columns, units) of a reader in as few lists as possible, so that no two in a list share a column.

    Columns are shared where structures lie inside others. The θ of both then apply.
    """
    levels: list[list[tuple[str, Tensor, Tensor]]] = []
    for part in parts:
        for level in levels:
            if not any(torch.isin(part[1], indices).any() for _, indices, _ in level):
                level.append(part)
                break
        else:
            levels.append([part])
    return levels


class _Reader:
    """The hooks of one layer that reads structures.

    Bound methods, not functions: a copy of the network gets hooks that know the copied noise.
    """

    def __init__(self, noise: HookedNoise, path: str, number: int) -> None:
        self.noise, self.path, self.number = noise, path, number
        # for each call under way: how its input is remembered, where not as usual
        self.under_way: list[saved_tensors_hooks | None] = []

    def multiply(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the call: the input multiplied by θ."""
        theta = self.noise.theta(self.path, self.number)
        name = next(iter(keywords), "")
        x = arguments[0] if arguments else keywords[name]
        examples = self.noise.examples
        # another dimension may have that length by chance
        if theta.dim() > 1 and examples is not None and self.path in self.noise.folded:
            raise not_examples(f"layer {self.path!r}", x, examples)
        scale = partial(
            scaled, dim=channel_dimension(module), name=f"layer {self.path!r}", examples=examples,
            exclusive=True,
        )  # fmt: skip
        product = scale(x, theta)
        # in a fit only: there θ has a gradient, and nothing looks into tensors as torch.func does
        lean = examples is not None and theta.requires_grad and product.numel() >= LARGE
        self.under_way.append(_as_factors(product, x, theta, scale) if lean else None)
        if arguments:
            return (product, *arguments[1:]), keywords
        return arguments, {**keywords, name: product}

    def finish(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """After the call, also of one that failed."""
        hooks = self.under_way.pop() if self.under_way else None
        if hooks is not None:
            hooks.__exit__()


def _as_factors(
    product: Tensor, x: Tensor, theta: Tensor, scale: Callable[[Tensor, Tensor], Tensor]
) -> saved_tensors_hooks:
    """Enter a context in which autograd saves the factors of `product`, and multiplies them again for the gradient.

    The layer that made x saves it anyway. Saving each product as well would be most of the memory that noise costs.
    """
    x, theta, version = x.detach(), theta.detach(), x._version
    # not the tensor itself, which would then stay alive
    place, shape, stride = product.data_ptr(), product.shape, product.stride()

    def pack(tensor: Tensor) -> Tensor | None:
        same = tensor.data_ptr() == place and tensor.shape == shape and tensor.stride() == stride
        return None if same else tensor

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        if x._version != version:
            raise RuntimeError(
                "the input of a layer with noise was changed in place before its gradient was made"
            )
        return scale(x, theta)

    hooks = saved_tensors_hooks(pack, unpack)
    hooks.__enter__()
    return hooks


def hooked_noise(network: nn.Module) -> dict[str, HookedNoise]:
    """What `insert_noise` put into `network` or its submodules, by path ("" for the network itself)."""
    return {
        path.removesuffix(NAME).removesuffix("."): module
        for path, module in network.named_modules()
        if isinstance(module, HookedNoise)
    }


def without_hooked_noise(network: nn.Module) -> nn.Module:
    """Undo `insert_noise` in place, except for the separate attention projections."""
    for path in hooked_noise(network):
        delattr(network.get_submodule(path), NAME)
    for module in network.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            owners = {number: getattr(hook, "__self__", None) for number, hook in hooks.items()}
            ours = [number for number, owner in owners.items() if isinstance(owner, HookedNoise | _Reader)]
            for number in ours:
                del hooks[number]
                for kind in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, kind).pop(number, None)
    return network


def without_noise(module: nn.Module) -> nn.Module:
    """Take all noise out of `module`, in place, and return it: layers written by hand become identities.

    Attention that was given separate projections is torch's own again, unless heads have been removed.
    """
    check_module("module", module)
    module = uncompiled(module)
    without_hooked_noise(module)
    join_attention(module)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, MultiplicativeNoise):
            if not path:
                return nn.Identity()
            module.set_submodule(path, nn.Identity())
    return module


def network_of(model: nn.Module) -> nn.Module:
    """The network inside a Pyro model: its outermost submodule that holds all of its noise layers.

    The model itself where its noise layers lie in several of its submodules.

    Raises:
        ValueError: if `model` has no noise layer.
    """
    model = uncompiled(model)
    layers = set(noise_layers(model).values())
    if not layers:
        raise ValueError(f"model must hold MultiplicativeNoise layers: {type(model).__name__} has none")
    network = model
    # containers that only store modules have no forward
    while network is model or isinstance(network, nn.ModuleList | nn.ModuleDict):
        inner = [
            child
            for child in network.children()
            if layers <= set(child.modules()) and child not in layers and not isinstance(child, HookedNoise)
        ]
        if not inner:
            return model
        network = inner[0]
    return network
