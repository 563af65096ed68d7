"""Weights that are computed from other tensors at each call: they can't be cut, and θ can't be folded into them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyro_bmrs.networks.cuts import tensor_of


def computed(module: nn.Module, name: str, path: str) -> str | None:
    """What is wrong with a tensor to be cut that is computed, and how to make it a parameter; None: nothing."""
    if tensor_of(module, name) is not None:
        return None
    return f"the {name} of {path!r} is computed from other tensors: {_advice(module, name, path)} first"


def has_computed(module: nn.Module) -> bool:
    """Whether a module computes a tensor that might have to be cut."""
    known = ("weight", "bias")
    return parametrize.is_parametrized(module) or any(
        isinstance(vars(module).get(name), Tensor) for name in known
    )


def is_computed(module: nn.Module) -> bool:
    """Whether a module's weight is computed from other tensors."""
    return parametrize.is_parametrized(module, "weight") or isinstance(vars(module).get("weight"), Tensor)


def _advice(module: nn.Module, name: str, path: str) -> str:
    layer = f"network.get_submodule({path!r})"
    if parametrize.is_parametrized(module, name):
        return f"call torch.nn.utils.parametrize.remove_parametrizations({layer}, {name!r})"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return f"call torch.nn.utils.prune.remove({layer}, {name!r})"
        if isinstance(hook, WeightNorm) and hook.name == name:
            return f"call torch.nn.utils.remove_weight_norm({layer}, {name!r})"
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return f"call torch.nn.utils.remove_spectral_norm({layer}, {name!r})"
    return "make it a parameter"
