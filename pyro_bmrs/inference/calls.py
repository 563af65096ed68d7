"""How models and guides are called: their arguments, their names in Pyro's store, whether they are ready."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoCallable
from torch import nn

_serial = count(1)


class Program(nn.Module):
    """A Pyro program that is a function, as a module. A method of a module has that module's parameters.

    >>> as_module(lambda x, y: x + y)(1, 2)
    3
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        owner = getattr(function, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def as_module(program: Callable[..., Any]) -> nn.Module:
    """A Pyro program as a module: itself if it is one."""
    return program if isinstance(program, nn.Module) else Program(program)


def home_of(*programs: object) -> torch.device:
    """The device of the first parameter that one of these modules has; the CPU if there is none."""
    modules = (program for program in programs if isinstance(program, nn.Module))
    first = next((parameter for module in modules for parameter in module.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def unique_name(program: object) -> str:
    """A name for Pyro's parameter store, in which programs of one name would share their parameters."""
    return f"{type(program).__name__}_{next(_serial)}"


def check_ready(guide: object) -> None:
    """Raise RuntimeError for an autoguide that has no parameters yet."""
    if isinstance(guide, AutoGuide) and not isinstance(guide, AutoCallable) and guide.prototype_trace is None:
        raise RuntimeError("guide has no parameters yet: call it once on a batch, or fit it")


def _signature(program: Callable[..., Any]) -> inspect.Signature:
    called = inspect.unwrap(program)  # what poutine.block and others have wrapped
    return inspect.signature(called.forward if isinstance(called, nn.Module) else called)


def in_order(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call by position. Those that can only be given by keyword keep their defaults."""
    if not kwargs:
        return args
    bound = _signature(program).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def check_arguments(model: Callable[..., Any], args: tuple[Any, ...], name: str = "model_args") -> None:
    """Raise ValueError, naming the argument that holds them, unless `model` can be called with these."""
    try:
        _signature(model).bind(*args)
    except TypeError as error:
        raise ValueError(
            f"{name} must be what the model is called with: got {len(args)} of them, and the model says: {error}"
        ) from None
    except ValueError:  # a callable without a signature
        return


def without_observations(program: Callable[..., Any], x: Any) -> tuple[Any, ...]:
    """What to call a program with on inputs alone: (x,), or (x, None) if its observations have no default."""
    try:
        _signature(program).bind(x)
    except TypeError:
        return x, None
    except ValueError:  # a callable without a signature
        pass
    return (x,)
