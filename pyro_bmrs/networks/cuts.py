"""Cutting: which rows and columns of which tensors are removed when a module loses channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.networks.selection import InputSelection

ROWS, COLUMNS = "rows", "columns"
# Attributes in which attention modules keep their number of query heads, their number of key and value heads, and
# the width of all query heads together.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
HEADS_WIDTH = ("all_head_size", "inner_dim")
COUNTS = (*HEADS, *KEY_HEADS, *HEADS_WIDTH)


def is_depthwise(module: nn.Module) -> bool:
    """Whether each filter of a convolution reads only its own channel."""
    return (
        isinstance(module, _ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def channels(module: nn.Module, side: str) -> int | None:
    """Number of channels that a module makes (rows) or reads (columns); None if it can't be cut there."""
    if isinstance(module, nn.Linear):
        return module.out_features if side == ROWS else module.in_features
    if isinstance(module, _ConvTransposeNd) and module.groups != 1:
        return None
    if isinstance(module, _ConvNd):
        return module.out_channels if side == ROWS else module.in_channels
    if side == COLUMNS:
        return module.width if isinstance(module, InputSelection) else None
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, _NormBase):
        return int(module.num_features)
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if isinstance(module, InputSelection):
        return module.features
    return None


def channel_dimension(module: nn.Module) -> int:
    """Dimension of a module's input and output that counts channels. For most modules it is counted from the end."""
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, InputSelection):
        return module.dim
    return -1


def selections(module: nn.Module, side: str) -> list[tuple[str, int]]:
    """(name, dimension) of each tensor of a module that has its rows or columns in that dimension."""
    if side == COLUMNS and isinstance(module, InputSelection):
        return []  # it holds numbers of columns, which `renumber` changes
    if isinstance(module, nn.Linear | _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        if side == COLUMNS:
            return [("weight", 0 if transposed else 1)]
        found = [("weight", 1 if transposed else 0), ("bias", 0)]
    elif isinstance(module, nn.Embedding):
        found = [("weight", 1)]
    elif isinstance(module, nn.PReLU):
        found = [("weight", 0)]
    elif isinstance(module, InputSelection):
        found = [("index", 0)]
    else:
        found = [(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    return [(name, dim) for name, dim in found if getattr(module, name, None) is not None]


def _attributes(module: nn.Module, side: str, count: int) -> dict[str, int]:
    if isinstance(module, nn.Linear):
        return {"out_features" if side == ROWS else "in_features": count}
    if is_depthwise(module):
        return {"in_channels": count, "out_channels": count, "groups": count}
    if isinstance(module, _ConvNd):
        return {"out_channels" if side == ROWS else "in_channels": count}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": count}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": count}
    if isinstance(module, InputSelection):
        return {"features" if side == ROWS else "width": count}
    return {"num_features": count}


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Replace a tensor's contents by others of another shape. It stays the same object."""
    if tensor.is_floating_point():
        # an autograd graph that still exists remembers the old shape; another dtype makes torch forget it
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        tensor.data = tensor.data.new_empty(0, dtype=other)
    tensor.data = data
    tensor.grad = None


@dataclass(frozen=True)
class Cuts:
    """What stays of each module that loses something. The original network can be cut again from this.

    Attributes:
        rows, columns: by module path, the indices in the original module that stay.
        attributes: by module path, numbers that a module stores about itself, such as its number of heads.
    """

    rows: Mapping[str, list[int]] = field(default_factory=dict)
    columns: Mapping[str, list[int]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows or self.columns)

    def _sides(self, network: nn.Module) -> Iterator[tuple[nn.Module, str, list[int]]]:
        for side, table in ((ROWS, self.rows), (COLUMNS, self.columns)):
            for path, kept in table.items():
                yield network.get_submodule(path), side, kept

    def tensors(self, network: nn.Module) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(tensor, dimension, indices to keep) of each tensor in `network` that gets smaller."""
        for module, side, kept in self._sides(network):
            local = kept
            if side == COLUMNS and isinstance(module, _ConvNd):
                # a grouped convolution numbers input channels within each group
                local = [index for index in kept if index < module.in_channels // module.groups]
            for name, dim in selections(module, side):
                tensor = getattr(module, name)
                yield tensor, dim, torch.tensor(local, dtype=torch.long, device=tensor.device)

    def parameters_left(self, network: nn.Module) -> int:
        """Number of parameters of `network` after these cuts."""
        left = {id(parameter): parameter.numel() for parameter in network.parameters()}
        for tensor, dim, kept in self.tensors(network):
            if id(tensor) in left:
                left[id(tensor)] = left[id(tensor)] // tensor.shape[dim] * len(kept)
        return sum(left.values())

    @torch.no_grad()
    def cut(self, network: nn.Module) -> None:
        """Make `network` smaller, in place. Its parameters stay the same objects.

        Raises:
            ValueError: if a path or index is not in `network`; nothing is cut then.
        """
        self.check(network)
        for tensor, dim, kept in list(self.tensors(network)):
            replace_data(tensor, tensor.data.index_select(dim, kept))
        for module, side, indices in self._sides(network):
            if side == COLUMNS and isinstance(module, InputSelection):
                module.renumber(indices)
            for name, value in _attributes(module, side, len(indices)).items():
                setattr(module, name, value)
        for path, numbers in self.attributes.items():
            for name, value in numbers.items():
                setattr(network.get_submodule(path), name, value)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the module, unless the cuts fit `network`."""
        modules = dict(network.named_modules())
        for side, table in ((ROWS, self.rows), (COLUMNS, self.columns)):
            for path, kept in table.items():
                size = channels(modules[path], side) if path in modules else None
                if size is not None and side == COLUMNS and is_depthwise(modules[path]) and len(kept) < size:
                    size = None  # its columns are cut with its rows
                whole = all(type(index) is int for index in kept) and sorted(set(kept)) == kept
                if size is None or not kept or not whole or kept[0] < 0 or kept[-1] >= size:
                    raise ValueError(
                        f"cuts must fit the network: {path!r} "
                        + ("is no layer of it that can be cut" if size is None else
                           f"has {side} 0 to {size - 1}, and increasing indices of them are to be kept")
                    )  # fmt: skip
                module = modules[path]
                if side == COLUMNS and isinstance(module, InputSelection):
                    read = module.index[self.rows.get(path, slice(None))]
                    if not read.is_meta and not set(read.tolist()) <= set(kept):
                        raise ValueError(
                            f"cuts must fit the network: {path!r} passes on features that its input has lost"
                        )
                groups = getattr(module, "groups", 1)
                if groups > 1 and not is_depthwise(module):
                    step = size // groups
                    parts = [[i % step for i in kept if i // step == group] for group in range(groups)]
                    if any(part != parts[0] for part in parts):
                        raise ValueError(
                            f"cuts must fit the network: each group of {path!r} must keep the same {side}"
                        )
        once = Counter((id(tensor), dim) for tensor, dim, _ in self.tensors(network))
        if once and max(once.values()) > 1:
            raise ValueError("cuts must fit the network: a weight that layers share would be cut twice")
        for path, numbers in self.attributes.items():
            for name, value in numbers.items():
                if not isinstance(getattr(modules.get(path), name, None), int) or type(value) is not int:
                    raise ValueError(f"cuts must fit the network: {path!r} has no number {name!r}")

    def then(self, later: Cuts) -> Cuts:
        """These cuts followed by `later` ones, as cuts of the original network."""

        def composed(first: Mapping[str, list[int]], second: Mapping[str, list[int]]) -> dict[str, list[int]]:
            both = {
                path: [first[path][index] for index in kept] for path, kept in second.items() if path in first
            }
            return {**first, **second, **both}

        attributes = {
            path: {**self.attributes.get(path, {}), **later.attributes.get(path, {})}
            for path in (*self.attributes, *later.attributes)
        }
        return Cuts(composed(self.rows, later.rows), composed(self.columns, later.columns), attributes)

    def below(self, path: str) -> Cuts:
        """The cuts of the submodule at `path`, with paths relative to it."""
        if not path:
            return self
        start = f"{path}."
        tables: list[dict[str, Any]] = [
            {name.removeprefix(start): value for name, value in table.items() if name.startswith(start)}
            for table in (self.rows, self.columns, self.attributes)
        ]
        return Cuts(*tables)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary for a JSON file."""
        return {"rows": dict(self.rows), "columns": dict(self.columns), "attributes": dict(self.attributes)}

    @classmethod
    def from_json(cls, document: object) -> Cuts:
        """What `to_json` gave.

        Raises:
            ValueError: if `document` is something else.
        """
        names = (ROWS, COLUMNS, "attributes")
        if not isinstance(document, dict) or set(document) != set(names):
            raise ValueError(f"cuts must be a dictionary of {', '.join(names)}")
        for name, kind in zip(names, (list, list, dict), strict=True):
            table = document[name]
            if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
                raise ValueError(f"{name} of cuts must map module paths to a {kind.__name__} each")
        numbers = {name for table in document["attributes"].values() for name in table}
        if not numbers <= set(COUNTS):
            raise ValueError(f"attributes of cuts must be among {COUNTS}: got {sorted(map(str, numbers))}")
        return cls(**document)
