"""Copies of networks, and networks out of what `torch.compile` wraps them in; tensors filled anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.inputs import tensors_of

# Where torch.compile keeps the module, and the forward, that it has compiled.
_MODULE, _FORWARD, _IN_PLACE = "_orig_mod", "_torchdynamo_orig_callable", "_compiled_call_impl"


def uncompiled[Network: nn.Module](module: Network) -> Network:
    """The module that was compiled; compiled submodules, and what `module.compile()` did, are undone in place.

    Compiled code can't be followed, has other paths, and stays as it is when weights are cut.
    """
    bare = _bare(module)
    for part in list(bare.modules()):
        for name, child in part._modules.items():
            if child is not None:
                part._modules[name] = _bare(child)
        vars(part).pop(_IN_PLACE, None)
        # a copy's compiled forward would still be that of the original
        if (
            getattr(getattr(vars(part).get("forward"), _FORWARD, None), "__func__", None)
            is type(part).forward
        ):
            del vars(part)["forward"]
    return bare  # type: ignore[return-value]


def _bare(module: nn.Module) -> nn.Module:
    while module._modules.get(_MODULE) is not None:
        module = module._modules[_MODULE]  # type: ignore[assignment]
    return module


def copied[Network: nn.Module](module: Network, memo: dict[int, Any] | None = None) -> Network:
    """A deep copy, not compiled. Tensors with a graph, which torch refuses to copy, lose it.

    A module has such tensors where it remembers an activation, or computes its weight by a hook.

    Args:
        memo: takes the copy of each part, by its identity, as of `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    computed = [
        tensor
        for part in module.modules()
        for name, value in vars(part).items()
        if name != "_modules"
        for tensor in tensors_of(value)
        if not tensor.is_leaf
    ]
    memo |= {id(tensor): tensor.detach().clone() for tensor in computed if id(tensor) not in memo}
    return uncompiled(copy.deepcopy(module, memo))


def sharing_parameters[Network: nn.Module](module: Network) -> Network:
    """A copy, not compiled, with the same parameters: for passes that may change attributes and buffers."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    return copied(module, memo)


def without_values[Network: nn.Module](module: Network) -> Network:
    """A deep copy on the meta device. No value is copied, so that it costs no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return uncompiled(copy.deepcopy(module, memo))


@contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """A context after which each submodule has the attributes and buffers that it had before, whatever ran inside."""
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    values = {b: b.clone() for _, _, buffers in before for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        for buffer, value in values.items():
            buffer.data.copy_(value)
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's entries fill its memory without gaps, in some order of its dimensions."""
    size = 1
    for axis in sorted(range(tensor.dim()), key=tensor.stride):
        if tensor.shape[axis] > 1:
            if tensor.stride(axis) != size:
                return False
            size *= tensor.shape[axis]
    return True


def fill(tensor: Tensor, numbers: Tensor) -> None:
    """Fill a dense tensor, in place, with these numbers, again and again. numbers: (count,)."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    for start in range(0, len(flat), len(numbers)):
        flat[start : start + len(numbers)] = numbers[: len(flat) - start]
