"""Arithmetic in float64 throughout, also where a network asks for less in its forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_LESS = (torch.float32, torch.float16, torch.bfloat16)


class InDouble(TorchFunctionMode):
    """A context in which a network in float64 stays in it.

    Some networks convert within their forward pass, as RMSNorm in float32 for one in bfloat16. The rounding of that is
    no part of what a proof of equality is about.

    >>> with InDouble():
    ...     torch.zeros(2, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            function = torch.Tensor.double
        args, kwargs = tree_map(_in_double, (args, kwargs or {}))
        return function(*args, **kwargs)


def _in_double(leaf: Any) -> Any:
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _LESS else leaf


def is_double(network: nn.Module) -> bool:
    """Whether all floating-point parameters of a network are in float64."""
    return all(p.dtype == torch.float64 for p in network.parameters() if p.is_floating_point())
