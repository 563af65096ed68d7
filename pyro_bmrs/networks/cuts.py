"""Cutting: which entries of which tensors stay, and the numbers that modules keep about them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.arguments import is_whole
from pyro_bmrs.networks.selection import InputSelection

_WRONG = "cuts must fit the network"


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter or buffer, as it is stored; None if it has none of that name."""
    stored = module._parameters.get(name)
    return module._buffers.get(name) if stored is None else stored


def joined(path: str, name: str) -> str:
    """The name, in the network, of a tensor or submodule of the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


def names_by_tensor(network: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its id: layers may share one."""
    names: dict[int, list[str]] = {}
    for named in (network.named_parameters, network.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return names


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Replace a tensor's contents by others of another shape. It stays the same object."""
    if tensor.is_floating_point():
        # an autograd graph that still exists remembers the old shape; another dtype makes torch forget it
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        tensor.data = tensor.data.new_empty(0, dtype=other)
    tensor.data = data
    tensor.grad = None


@dataclass(frozen=True)
class RootMeanSquare:
    """A module that divides by the root mean square of d channels: y = x / √(mean(x²) + ε) · (shift + weight).

    Without those of d channels that are 0 everywhere, the d' others come out the same from
    y = x / √(mean(x²) + ε d/d') · √(d/d') (shift + weight), where the mean is over d' channels.

    Attributes:
        path: of the module.
        name: of its weight. Shape: (d,).
        shift: 0, or 1 as in Gemma.
        epsilon: name of the attribute that holds ε; None there is torch's choice, the resolution of the precision.
    """

    path: str
    name: str
    shift: int
    epsilon: str


@dataclass(frozen=True)
class Cuts:
    """What stays of each tensor that loses something. The original network can be cut again from this.

    Attributes:
        tensors: by name of a parameter or buffer and by its dimension, the entries that stay. A tensor that layers
            share stands under each of its names, and is cut once.
        widths: by path of an `InputSelection`, the features that stay of its input.
        numbers: by module path and attribute, what an integer that counts entries becomes, such as a number of heads.
            "name.0" is the first entry of a tuple or list.

        norms: modules that divide by a root mean square over what is cut. Their weight and ε are scaled.

    Integers of torch's own layers, such as in_features, follow from the shapes of their tensors.
    """

    tensors: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)
    widths: Mapping[str, list[int]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    norms: tuple[RootMeanSquare, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tensors or self.widths)

    def selections(self, network: nn.Module) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(tensor, dimension, entries to keep) of each tensor in `network` that gets smaller."""
        seen: set[tuple[int, int]] = set()
        for name, dims in self.tensors.items():
            path, _, own = name.rpartition(".")
            tensor = tensor_of(network.get_submodule(path), own)
            assert tensor is not None
            for dim, kept in dims.items():
                if (id(tensor), dim) not in seen:
                    seen.add((id(tensor), dim))
                    yield tensor, dim, torch.tensor(kept, dtype=torch.long, device=tensor.device)

    def parameters_left(self, network: nn.Module) -> int:
        """Number of parameters of `network` after these cuts."""
        left = {id(parameter): parameter.numel() for parameter in network.parameters()}
        for tensor, dim, kept in self.selections(network):
            if id(tensor) in left:
                left[id(tensor)] = left[id(tensor)] // tensor.shape[dim] * len(kept)
        return sum(left.values())

    @torch.no_grad()
    def cut(self, network: nn.Module) -> None:
        """Make `network` smaller, in place. Its parameters stay the same objects.

        Raises:
            ValueError: if a name or index is not in `network`, or layers would not fit together; nothing is cut then.
        """
        self.check(network)
        changed = list(self._changed(network))
        widths = [tensor.shape[0] for tensor in map(partial(_weight_of, network), self.norms)]
        for tensor, dim, kept in list(self.selections(network)):
            replace_data(tensor, tensor.data.index_select(dim, kept))
        scaled: set[int] = set()
        for norm, width in zip(self.norms, widths, strict=True):
            weight = _weight_of(network, norm)
            _scale(network, norm, width, rescaled=id(weight) not in scaled)
            scaled.add(id(weight))
        for path, kept_inputs in self.widths.items():
            selection = network.get_submodule(path)
            assert isinstance(selection, InputSelection)
            selection.renumber(kept_inputs)
        for path, numbers in self.numbers.items():
            for name, value in numbers.items():
                _set_number(network.get_submodule(path), name, value)
        for _, module in changed:
            for name, size in _sizes(module, _shapes(module), getattr(module, "groups", 1)).items():
                setattr(module, name, size)

    def match_precision(self, network: nn.Module, original: nn.Module) -> None:
        """Set each ε that torch chose by the precision to that of `original`, after cuts in another precision."""
        for norm in self.norms:
            before = original.get_submodule(norm.path)
            if getattr(before, norm.epsilon) is None:
                weight, left = _weight_of(original, norm), _weight_of(network, norm)
                epsilon = torch.finfo(weight.dtype).eps * weight.shape[0] / left.shape[0]
                setattr(network.get_submodule(norm.path), norm.epsilon, epsilon)

    def _changed(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of each module of which a tensor or number changes."""
        changed = {id(tensor) for tensor, _, _ in self.selections(network)}
        for path, module in network.named_modules():
            own = (*module._parameters.values(), *module._buffers.values())
            if path in self.numbers or path in self.widths or any(id(tensor) in changed for tensor in own):
                yield path, module

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the tensor or module, unless the cuts fit `network`."""
        modules = dict(network.named_modules(remove_duplicate=False))
        once: dict[tuple[int, int], list[int]] = {}
        for name, dims in self.tensors.items():
            path, _, own = name.rpartition(".")
            tensor = tensor_of(modules[path], own) if path in modules else None
            if tensor is None:
                raise ValueError(f"{_WRONG}: {name!r} is no tensor of it")
            for dim, kept in dims.items():
                if not is_whole(dim, 0) or dim >= tensor.dim():
                    raise ValueError(
                        f"{_WRONG}: {name!r} of shape {tuple(tensor.shape)} has no dimension {dim!r}"
                    )
                size = tensor.shape[dim]
                if not _is_part(kept, size):
                    raise ValueError(
                        f"{_WRONG}: {name!r} has entries 0 to {size - 1} in dimension {dim}, and increasing "
                        "numbers of them are to be kept"
                    )
                if once.setdefault((id(tensor), dim), kept) != kept:
                    raise ValueError(
                        f"{_WRONG}: {name!r}, which layers share, would be cut twice in dimension {dim}"
                    )
        self._check_widths(modules)
        self._check_numbers(modules)
        for norm in self.norms:
            weight = tensor_of(modules[norm.path], norm.name) if norm.path in modules else None
            epsilon = getattr(modules.get(norm.path), norm.epsilon, "")
            if weight is None or weight.dim() != 1 or not (epsilon is None or isinstance(epsilon, float)):
                raise ValueError(
                    f"{_WRONG}: {norm.path!r} has no weight {norm.name!r} and number {norm.epsilon!r}"
                )
        shapes: dict[int, tuple[int, ...]] = {}
        for tensor, dim, kept_entries in self.selections(network):
            shape = shapes.get(id(tensor), tuple(tensor.shape))
            shapes[id(tensor)] = (*shape[:dim], len(kept_entries), *shape[dim + 1 :])
        for path, module in self._changed(network):
            groups = self.numbers.get(path, {}).get("groups", getattr(module, "groups", 1))
            self._check_fit(path, module, _shapes(module, shapes), groups, once)

    def _check_widths(self, modules: Mapping[str, nn.Module]) -> None:
        for path, kept in self.widths.items():
            selection = modules.get(path)
            if not isinstance(selection, InputSelection):
                raise ValueError(f"{_WRONG}: {path!r} is no InputSelection of it")
            if not _is_part(kept, selection.width):
                raise ValueError(
                    f"{_WRONG}: {path!r} has inputs 0 to {selection.width - 1}, and increasing numbers of them are to "
                    "be kept"
                )
            read = selection.index[self.tensors.get(joined(path, "index"), {}).get(0, slice(None))]
            if not read.is_meta and not set(read.tolist()) <= set(kept):
                raise ValueError(f"{_WRONG}: {path!r} passes on features that its input has lost")

    def _check_numbers(self, modules: Mapping[str, nn.Module]) -> None:
        for path, numbers in self.numbers.items():
            for name, value in numbers.items():
                old = number_of(modules[path], name) if path in modules else None
                if old is None:
                    raise ValueError(f"{_WRONG}: {path!r} has no number {name!r}")
                if not is_whole(value, 1) or value > old:
                    raise ValueError(f"{_WRONG}: {name!r} of {path!r} can become 1 to {old}: got {value!r}")

    def _check_fit(
        self, path: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int,
        kept: Mapping[tuple[int, int], list[int]],
    ) -> None:  # fmt: skip
        """Raise ValueError unless the tensors of one of torch's layers would fit together."""
        weight = tensor_of(module, "weight")
        if isinstance(module, _ConvNd) and weight is not None and max(module.groups, groups) > 1:
            each = weight.shape[0] // module.groups
            rows = kept.get((id(weight), 0), range(weight.shape[0]))
            left = torch.bincount(torch.tensor([row // each for row in rows])).tolist()
            if len({count for count in left if count}) > 1 or sum(map(bool, left)) != groups:
                raise ValueError(f"{_WRONG}: each of the groups of {path!r} must keep equally many rows")
        sizes = _sizes(module, shapes, groups)
        made = next((sizes[name] for name in _MADE if name in sizes), None)
        one_each = {name: shapes[name] for name in _ONE_EACH if name in shapes}
        wanted = made if isinstance(made, tuple) else (made,)
        if made is not None and any(shape != wanted for shape in one_each.values()):
            raise ValueError(f"{_WRONG}: {path!r} would make channels of shape {wanted}, and have {one_each}")
        if isinstance(module, nn.GroupNorm) and shapes.get("weight", (0,))[0] % self.numbers.get(
            path, {}
        ).get("num_groups", module.num_groups):
            raise ValueError(f"{_WRONG}: each of the groups of {path!r} must keep equally many channels")

    def then(self, later: Cuts) -> Cuts:
        """These cuts followed by `later` ones, as cuts of the original network."""

        def composed[Key](
            first: Mapping[Key, list[int]], second: Mapping[Key, list[int]]
        ) -> dict[Key, list[int]]:
            both = {
                key: [first[key][index] for index in kept] for key, kept in second.items() if key in first
            }
            return {**first, **second, **both}

        names, paths = (dict.fromkeys((*a, *b)) for a, b in (
            (self.tensors, later.tensors), (self.numbers, later.numbers),
        ))  # fmt: skip
        return Cuts(
            {name: composed(self.tensors.get(name, {}), later.tensors.get(name, {})) for name in names},
            composed(self.widths, later.widths),
            {path: {**self.numbers.get(path, {}), **later.numbers.get(path, {})} for path in paths},
            tuple(dict.fromkeys((*self.norms, *later.norms))),
        )

    def below(self, path: str) -> Cuts:
        """The cuts of the submodule at `path`, with names relative to it."""
        if not path:
            return self

        def local(table: Mapping[str, Any]) -> dict[str, Any]:
            inside = {f"{name}.": value for name, value in table.items()}
            start = f"{path}."
            return {k.removeprefix(start)[:-1]: value for k, value in inside.items() if k.startswith(start)}

        norms = (norm for norm in self.norms if norm.path.startswith(f"{path}."))
        inner = tuple(replace(norm, path=norm.path.removeprefix(f"{path}.")) for norm in norms)
        return Cuts(local(self.tensors), local(self.widths), local(self.numbers), inner)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary for a JSON file."""
        return {
            "tensors": {name: {str(dim): kept for dim, kept in dims.items()} for name, dims in self.tensors.items()},
            "widths": dict(self.widths),
            "numbers": {path: dict(numbers) for path, numbers in self.numbers.items()},
            "norms": [vars(norm) for norm in self.norms],
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: object) -> Cuts:
        """What `to_json` gave.

        Raises:
            ValueError: if `document` is something else.
        """
        names = ("tensors", "widths", "numbers", "norms")
        if not isinstance(document, dict) or set(document) != set(names):
            raise ValueError(f"cuts must be a dictionary of {', '.join(names)}")
        for name, kind in zip(names, (dict, list, dict), strict=False):
            table = document[name]
            if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
                raise ValueError(f"{name} of cuts must map names to a {kind.__name__} each")
        dimensions = {str(dim): dim for dim in range(10)}
        for name, dims in document["tensors"].items():
            if not dims.keys() <= dimensions.keys() or not all(isinstance(k, list) for k in dims.values()):
                raise ValueError(
                    f"tensors of cuts must map dimensions to a list each: got {name!r}: {dims!r}"[:200]
                )
        tensors = {
            name: {dimensions[dim]: kept for dim, kept in dims.items()}
            for name, dims in document["tensors"].items()
        }
        norms = document["norms"]
        kinds = {"path": str, "name": str, "shift": int, "epsilon": str}
        for norm in norms if isinstance(norms, list) else [None]:
            if not isinstance(norm, dict) or {key: type(value) for key, value in norm.items()} != kinds:
                raise ValueError(
                    f"norms of cuts must be a list of {', '.join(kinds)} each: got {norm!r}"[:200]
                )
        return cls(
            tensors, document["widths"], document["numbers"], tuple(RootMeanSquare(**norm) for norm in norms)
        )


# Of torch's layers: what counts the channels that they make, and tensors with an entry for each.
_MADE = ("out_features", "out_channels", "num_features", "num_channels", "normalized_shape")
_ONE_EACH = ("bias", "running_mean", "running_var")


def _is_part(kept: Any, size: int) -> bool:
    """Whether `kept` are increasing numbers from 0 to size - 1, at least one."""
    return (
        isinstance(kept, list)
        and bool(kept)
        and all(type(index) is int for index in kept)
        and sorted(set(kept)) == kept
        and kept[0] >= 0
        and kept[-1] < size
    )


def _shapes(
    module: nn.Module, after: Mapping[int, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own tensors; of those in `after`, by id, what stands there."""
    own = {**module._parameters, **module._buffers}
    return {
        name: (after or {}).get(id(tensor), tuple(tensor.shape)) for name, tensor in own.items() if tensor is not None
    }  # fmt: skip


def _sizes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int) -> dict[str, Any]:
    """The attributes of one of torch's layers that follow from the shapes of its tensors."""
    if isinstance(module, InputSelection):
        return {"features": shapes["index"][0]}
    if isinstance(module, _NormBase):
        lengths = [shapes[name][0] for name in ("weight", *_ONE_EACH) if name in shapes]
        return {"num_features": lengths[0]} if lengths else {}
    weight = shapes.get("weight")
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, _ConvNd):
        names = ("out_channels", "in_channels")
        names = names[::-1] if isinstance(module, _ConvTransposeNd) else names
        return dict(zip(names, (weight[0], weight[1] * groups), strict=True))
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": weight}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    return {}


def _weight_of(network: nn.Module, norm: RootMeanSquare) -> Tensor:
    weight = tensor_of(network.get_submodule(norm.path), norm.name)
    assert weight is not None
    return weight


def _scale(network: nn.Module, norm: RootMeanSquare, width: int, *, rescaled: bool) -> None:
    """Scale ε after a cut of `width` channels, and the weight, unless another module that shares it did."""
    module, weight = network.get_submodule(norm.path), _weight_of(network, norm)
    share = width / weight.shape[0]
    given = getattr(module, norm.epsilon)
    setattr(module, norm.epsilon, (torch.finfo(weight.dtype).eps if given is None else given) * share)
    if rescaled:
        weight.data = (weight.data + norm.shift) * share**0.5 - norm.shift


def number_of(module: nn.Module, name: str) -> int | None:
    """An integer attribute; "name.0" is an entry of a tuple or list, "config.name" an attribute of a configuration."""
    value: Any = module
    for own in name.split("."):
        if isinstance(value, tuple | list):
            value = value[int(own)] if own in map(str, range(len(value))) else None
        else:
            value = getattr_static(value, own, None)
    return value if type(value) is int else None


def _set_number(holder: Any, name: str, value: int) -> Any:
    """`holder` with another number. Tuples, lists and configurations, which others may share, are copied."""
    own, _, rest = name.partition(".")
    if isinstance(holder, tuple | list):
        new = [*holder[: int(own)], value, *holder[int(own) + 1 :]]
        return new if isinstance(holder, list) else tuple(new)
    if rest:
        value = _set_number(copy.copy(getattr(holder, own)), rest, value)
    setattr(holder, own, value)
    return holder
