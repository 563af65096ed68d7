"""Which channels torch's own layers make and read, and in which tensors: what the dependency graph asks."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.networks.selection import InputSelection

ROWS, COLUMNS = "rows", "columns"
# Attributes in which attention modules keep their number of query heads, their number of key and value heads, and
# the width of all query heads together.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
HEADS_WIDTH = ("all_head_size", "inner_dim")


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
