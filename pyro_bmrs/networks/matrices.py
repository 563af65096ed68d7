"""Layers as matrix products: their inputs as rows that a matrix of weights multiplies, and their outputs."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.networks.cuts import tensor_of


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer is a product with one matrix of its own weights: linear, convolution, embedding.

    Not transposed convolutions, and not layers whose weight is computed from other tensors.
    """
    weight = tensor_of(module, "weight")
    if not isinstance(weight, nn.Parameter):
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    if isinstance(module, nn.Linear):
        return True
    return (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)) or _is_transposed(
        module
    )


def _is_transposed(module: nn.Module) -> bool:
    """Whether a layer is linear with its weight the other way round, (inputs, outputs), as in GPT-2."""
    weight = tensor_of(module, "weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2


# Classes of layers that compute what their weight and torch's documentation say; those derived from them may not.
_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_plain(module: nn.Module) -> bool:
    return _is_transposed(module) or any(type(module).forward is plain.forward for plain in _PLAIN)


@torch.no_grad()
def computes_its_matrix(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a layer's output y is what its matrix makes of x: a class with a `forward` of its own may add to that."""
    if _is_plain(module):
        return True
    rows = output_rows(module, y)
    if row_count(module, x) != rows.shape[1]:
        return False
    places = torch.arange(_LOOKED_AT, device=x.device) * (rows.shape[1] - 1) // (_LOOKED_AT - 1)
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    found, rows = input_rows(module, x, places), rows[:, places]
    found = (
        weight[found]
        if isinstance(module, nn.Embedding)
        else found.to(weight.dtype) @ as_matrix(module, weight).mT
    )
    if bias is not None:
        found = found + bias.view(found.shape[0], 1, -1)
    return bool((found - rows).abs().max() <= _NEAR * rows.abs().max())


# Rows that are compared, and by how much they may differ, of the largest: half precision rounds.
_LOOKED_AT, _NEAR = 32, 0.02


def groups_of(module: nn.Module) -> int:
    """Number of matrices: of a convolution in groups there are several, each with its own inputs and outputs."""
    return module.groups if isinstance(module, _ConvNd) else 1


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of a layer, or a tensor like it, as matrices. Shape: (groups, outputs, inputs)."""
    if isinstance(module, nn.Embedding) or _is_transposed(module):
        return weight.mT.unsqueeze(0)
    groups = groups_of(module)
    return weight.reshape(groups, weight.shape[0] // groups, prod(weight.shape[1:]))


def as_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """Matrices in the shape of a layer's weight, with as many outputs and inputs as they have."""
    if isinstance(module, nn.Embedding) or _is_transposed(module):
        return matrix.squeeze(0).mT
    weight = tensor_of(module, "weight")
    assert weight is not None
    kernel = weight.shape[2:]
    return matrix.reshape(matrix.shape[0] * matrix.shape[1], -1, *kernel) if kernel else matrix.squeeze(0)


def kind_of(module: nn.Module) -> str:
    """A layer in two words: its class, and the sides of its kernel.

    >>> kind_of(nn.Conv2d(1, 2, (3, 5))), kind_of(nn.Linear(1, 2))
    ('Conv2d 3×5', 'Linear')
    """
    sides = "×".join(map(str, module.kernel_size)) if isinstance(module, _ConvNd) else ""
    return f"{type(module).__name__} {sides}".strip()


def positions_of(module: nn.Module) -> int:
    """Number of positions in the kernel of a convolution; 1 for other layers."""
    return prod(module.kernel_size) if isinstance(module, _ConvNd) else 1


def apart(module: nn.Module, matrix: Tensor) -> Tensor:
    """Rows or weights of a convolution, (…, channels · positions), as (…, positions, channels)."""
    positions = positions_of(module)
    return matrix.view(*matrix.shape[:-1], matrix.shape[-1] // positions, positions).mT


def together(matrix: Tensor) -> Tensor:
    """What `apart` took apart."""
    return matrix.mT.flatten(-2)


def columns_of(module: nn.Module, channels: Tensor) -> Tensor:
    """The columns of a layer's matrix that read channels of its input, those of the same number in each group.

    Shape: (channels, columns of each).
    """
    each = positions_of(module)
    return channels.unsqueeze(-1) * each + torch.arange(each, device=channels.device)


def input_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight that counts what it reads."""
    return 0 if isinstance(module, nn.Embedding) or _is_transposed(module) else 1


def input_rows(module: nn.Module, x: Tensor, places: Tensor | None = None) -> Tensor:
    """What a layer's matrix multiplies, one row for each example and position. Shape: (groups, rows, inputs).

    Of an embedding: the numbers of the entries that are read. Shape: (1, rows).

    Args:
        places: numbers of rows; None: all. No others are made.
    """
    if not isinstance(module, _ConvNd):
        rows = x.reshape(1, -1) if isinstance(module, nn.Embedding) else x.reshape(1, -1, x.shape[-1])
        return rows if places is None else rows[:, places]
    patches, dims = _patches(module, x), len(module.kernel_size)
    if places is not None:
        patches = patches[torch.unravel_index(places, patches.shape[: 1 + dims])]
    own = patches.shape[-1 - dims :].numel()
    return patches.reshape(-1, module.groups, own // module.groups).transpose(0, 1)


def row_count(module: nn.Module, x: Tensor) -> int:
    """How many rows `input_rows` gives."""
    if isinstance(module, _ConvNd):
        # shapes alone: padding would copy x
        return _patches(module, x.to("meta")).shape[: 1 + len(module.kernel_size)].numel()
    return x.numel() if isinstance(module, nn.Embedding) else x.shape[:-1].numel()


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """A layer's output, or a tensor like it, in the order of `input_rows`. Shape: (groups, rows, outputs)."""
    if not isinstance(module, _ConvNd):
        return y.reshape(1, -1, y.shape[-1])
    channels = -1 - len(module.kernel_size)
    last = y.movedim(channels, -1)
    return last.reshape(-1, module.groups, y.shape[channels] // module.groups).transpose(0, 1)


def _patches(module: _ConvNd, x: Tensor) -> Tensor:
    """What each filter of a convolution sees. Shape: (batch, positions…, channels, kernel…); a view of the padded x."""
    dims = len(module.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    mode: Any = module.padding_mode if module.padding_mode != "zeros" else "constant"
    x = F.pad(x, _padding(module, x), mode=mode)
    for axis in range(dims):
        size, dilation = module.kernel_size[axis], module.dilation[axis]
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, module.stride[axis])[..., ::dilation]
    # (batch, channels, positions…, kernel…)
    positions, kernel = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    return x.permute(0, *positions, 1, *kernel)


def _padding(module: _ConvNd, x: Tensor) -> list[int]:
    """What is put before and behind each dimension of x, the last one first.

    A class without padding that has a `forward` of its own pads there, in all that are known as TensorFlow does: so
    that there are as many positions as steps, and one more behind where the number is odd.
    """
    if _is_plain(module) or any(module._reversed_padding_repeated_twice):
        return module._reversed_padding_repeated_twice
    padding: list[int] = []
    for size, kernel, dilation, stride in zip(
        x.shape[2:], module.kernel_size, module.dilation, module.stride, strict=True
    ):
        whole = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        padding = [whole // 2, whole - whole // 2, *padding]
    return padding


def second_moment(module: nn.Module, rows: Tensor) -> Tensor:
    """Σ x xᵀ over rows, in float64. Shape: (groups, inputs, inputs); of an embedding the counts, (1, entries)."""
    if isinstance(module, nn.Embedding):
        return rows.flatten().bincount(minlength=module.num_embeddings).double().unsqueeze(0)
    return (rows.mT @ rows).double()
