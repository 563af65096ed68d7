"""Which modules divide by the root mean square of their channels, seen from what they do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.cuts import RootMeanSquare

_TOLERANCE = 1e-4


@torch.no_grad()
def root_mean_square(module: nn.Module, x: Tensor, path: str) -> RootMeanSquare | None:
    """What a module is that gives y = x / √(mean(x²) + ε) · (shift + weight) over the last dimension; None: another.

    A bias may be added.

    >>> root_mean_square(nn.RMSNorm(4, eps=1e-6), torch.randn(2, 4), "norm")
    RootMeanSquare(path='norm', name='weight', shift=0, epsilon='eps')
    >>> root_mean_square(nn.LayerNorm(4), torch.randn(2, 4), "norm") is None
    True

    Args:
        module: is called with numbers of its own.
        x: an input of it.
        path: of the module.
    """
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    plain = 0 < len(own) <= 2 and next(module.children(), None) is None
    if not plain or not x.is_floating_point() or not x.dim():
        return None
    name, width = next(iter(own)), x.shape[-1]
    if width < 2 or any(tensor.shape != (width,) for tensor in own.values()):
        return None
    weight = own[name]
    if weight.is_meta:
        module, x = copy.deepcopy(module).to_empty(device="cpu"), torch.zeros(0, dtype=x.dtype)
        weight = module.get_parameter(name)
        weight.fill_(0.5)
    numbers = torch.randn(3, 1, width, generator=torch.Generator().manual_seed(0))
    numbers = (numbers * torch.tensor([1.0, 10.0, 0.01]).view(3, 1, 1)).to(x)
    try:
        # forward: without hooks
        found, bias = module.forward(numbers), module.forward(torch.zeros_like(numbers))
    except Exception:
        return None
    if not isinstance(found, Tensor) or found.shape != numbers.shape:
        return None
    found = found - bias
    epsilons = [
        key
        for key, value in vars(module).items()
        if "eps" in key and (value is None or isinstance(value, float))
    ]
    if not epsilons:
        return None
    given = getattr(module, epsilons[0])
    epsilon = torch.finfo(x.dtype).eps if given is None else float(given)
    expected = numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + epsilon)
    for shift in (0, 1):
        gain = weight + shift
        if torch.allclose(found, expected * gain, rtol=_TOLERANCE, atol=_TOLERANCE * float(gain.abs().max())):
            return RootMeanSquare(path, name, shift, epsilons[0])
    return None
