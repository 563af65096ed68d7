"""Noise where structures are read, by hooks: the network's own modules stay unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pyro_bmrs.networks.attention import join_attention
from pyro_bmrs.networks.copies import uncompiled
from pyro_bmrs.networks.cuts import joined
from pyro_bmrs.networks.groups import Member, StructureGroup
from pyro_bmrs.networks.inputs import check_module
from pyro_bmrs.networks.noise import (
    LARGE,
    MultiplicativeNoise,
    examples_in_batch,
    noise_layers,
    not_examples,
    scaled,
)
from pyro_bmrs.networks.seen_tensors import Key, SeenTensors, is_hook, with_plain_tables

NAME = "structure_noise"


class _Place(NamedTuple):
    """A dimension of a layer's input or of a tensor, and which θ is for each of its entries.

    Attributes:
        dim: the dimension.
        levels: the sites whose θ stand one behind the other, and the name of the buffer that holds, for each entry,
            its position among these; several where structures lie inside others.
    """

    dim: int
    levels: tuple[tuple[tuple[str, ...], str], ...]


class HookedNoise(nn.Module):
    """A submodule of a network that holds the θ of all its structures and applies them.

    At each forward pass of the network every θ is drawn once. The input of each layer that reads structures is
    multiplied by their θ. Where no layer's input meets them, the tensor that reads them is multiplied instead, as the
    code that reads it sees it. Called itself, it returns its input, so that it may stand at the end of an
    `nn.Sequential`.

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
        # by layer that reads structures at its input: their place in it
        self.readers: dict[str, _Place] = {}
        # by module that reads structures through tensors: their places in each tensor
        self.tensors: dict[str, dict[Key, list[_Place]]] = {}
        self._index_readers(network)
        keys = {key: None for read in self.tensors.values() for key in read}
        readers = {key: [path for path, read in self.tensors.items() if key in read] for key in keys}
        self.seen = SeenTensors(readers, self.multiplied)

    @property
    def for_the_batch(self) -> bool:
        """Whether some θ multiplies a tensor, of which a batch has one value."""
        return bool(self.tensors)

    def _index_readers(self, network: nn.Module) -> None:
        """For each place where structures are read: of which sites, and which θ for each entry."""
        inputs: dict[str, tuple[int, int, list[tuple[str, Member]]]] = {}
        tensors: dict[str, dict[Key, dict[int, tuple[int, list[tuple[str, Member]]]]]] = {}
        for group in self.groups.values():
            for member in group.multiplied:
                size = member.tensor(network).shape[member.dim]
                if member.input_dim is not None and not group.at_writers:
                    dim, known, found = inputs.setdefault(member.path, (member.input_dim, size, []))
                    if (dim, known) == (member.input_dim, size):
                        found.append((group.site, member))
                        continue
                read = tensors.setdefault(member.read_by, {}).setdefault((member.path, member.name), {})
                read.setdefault(member.dim, (size, []))[1].append((group.site, member))
        self.count = 0
        device = next(network.parameters()).device
        self.readers = {path: self._place(*where, device) for path, where in inputs.items()}
        self.tensors = {
            path: {
                key: [self._place(dim, *where, device) for dim, where in dims.items()]
                for key, dims in read.items()
            }
            for path, read in tensors.items()
        }

    def _place(self, dim: int, size: int, found: list[tuple[str, Member]], device: torch.device) -> _Place:
        levels = []
        for disjoint in _levels(found):
            sites = tuple(disjoint)
            offset, total = 0, sum(self.groups[site].features for site in sites)
            columns = torch.full((size,), total)  # behind the last θ stands a 1, for entries without θ
            for site, members in disjoint.items():
                for member in members:
                    columns[member.indices] = offset + member.units
                offset += self.groups[site].features
            plain = len(sites) == 1 and torch.equal(columns, torch.arange(total))
            name = f"columns_{self.count}"
            self.count += 1
            self.register_buffer(name, None if plain else columns.to(device), persistent=False)
            levels.append((sites, name))
        return _Place(dim, tuple(levels))

    def attach(self, network: nn.Module) -> None:
        """Make this a submodule of `network`, and add the hooks that draw and apply the noise."""
        setattr(network, NAME, self)
        network.register_forward_pre_hook(self.draw, with_kwargs=True)
        network.register_forward_hook(self.finish, always_call=True)
        for path in self.readers:
            module, reader = network.get_submodule(path), _Reader(self, path)
            module.register_forward_pre_hook(reader.multiply, with_kwargs=True)
            module.register_forward_hook(reader.finish, always_call=True)
        self.seen.attach(network)

    def draw(self, network: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Before a forward pass of the network: one value of every θ for it."""
        self.running, self.examples = True, examples_in_batch.get()
        self.seen.under_way.clear()  # a pass that was interrupted may have left something
        self.drawn = {str(layer.site): layer.draw() for layer in self.layers}  # type: ignore[operator]

    def finish(self, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """After a forward pass of the network, also of one that failed."""
        self.running = False

    def theta(self, path: str, place: _Place) -> Tensor:
        """θ for each entry of a place, for the module at `path`. Shape: (entries,) or (draws, entries)."""
        # activation checkpointing runs layers again during the backward pass
        if not self.running and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"layer {path!r} has noise that is drawn when the network is called: call the network itself"
            )
        levels = [self._theta_of(sites, getattr(self, name)) for sites, name in place.levels]
        return prod(levels[1:], start=levels[0])

    def multiplied(self, reader: str, key: Key, stored: Tensor) -> Tensor:
        """A tensor as the module at `reader` sees it: multiplied by θ along each dimension that reads structures."""
        for place in self.tensors[reader][key]:
            theta = self.theta(reader, place).to(stored.dtype)
            if theta.dim() > 1:
                raise ValueError(
                    f"{joined(*key)!r} is multiplied by one θ for the whole batch, since no layer's input meets its "
                    "entries: several values of θ can't be drawn per batch; pass draws_per_batch=1"
                )
            layout = [1] * stored.dim()
            layout[place.dim] = -1
            stored = stored * theta.view(layout)
        return stored

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


def _levels(found: list[tuple[str, Member]]) -> list[dict[str, list[Member]]]:
    """The members of one place by site, in as few dictionaries as possible: no two sites in one share an entry.

    Entries are shared where structures lie inside others. The θ of both then apply.
    """
    members: dict[str, list[Member]] = {}
    for site, member in found:
        members.setdefault(site, []).append(member)
    levels: list[dict[str, list[Member]]] = []
    for site, own in members.items():
        indices = torch.cat([member.indices for member in own])
        for level in levels:
            if not any(torch.isin(indices, m.indices).any() for others in level.values() for m in others):
                level[site] = own
                break
        else:
            levels.append({site: own})
    return levels


class _Reader:
    """The hooks of one layer that reads structures.

    Bound methods, not functions: a copy of the network gets hooks that know the copied noise.
    """

    def __init__(self, noise: HookedNoise, path: str) -> None:
        self.noise, self.path = noise, path
        # for each call under way: how its input is remembered, where not as usual
        self.under_way: list[saved_tensors_hooks | None] = []

    def multiply(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the call: the input multiplied by θ."""
        place = self.noise.readers[self.path]
        theta = self.noise.theta(self.path, place)
        name = next(iter(keywords), "")
        x = arguments[0] if arguments else keywords[name]
        # the groups of a convolution read one after the other, with the same entries
        times = max(x.shape[place.dim] // theta.shape[-1], 1)
        theta = theta if times == 1 else theta.repeat(*[1] * (theta.dim() - 1), times)
        examples = self.noise.examples
        # another dimension may have that length by chance
        if theta.dim() > 1 and examples is not None and self.path in self.noise.folded:
            raise not_examples(f"layer {self.path!r}", x, examples)
        scale = partial(
            scaled, dim=place.dim, name=f"layer {self.path!r}", examples=examples,
            exclusive=True,
        )  # fmt: skip
        product = scale(x, theta)
        # in a fit only: there θ has a gradient, and nothing looks into tensors as torch.func does
        lean = examples is not None and theta.requires_grad and product.numel() >= LARGE
        lean = lean and not torch.compiler.is_compiling()  # which decides itself what is saved
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
    with_plain_tables(network)
    for module in network.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            owners = {number: getattr(hook, "__self__", None) for number, hook in hooks.items()}
            ours = [
                number
                for number, owner in owners.items()
                if isinstance(owner, HookedNoise | _Reader) or is_hook(owner)
            ]
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
