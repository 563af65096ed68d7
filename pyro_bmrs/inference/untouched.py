"""Running models and guides without leaving a trace in them or in the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

from pyro_bmrs.networks.modes import in_mode


@contextmanager
def untouched(
    *programs: Callable[..., Any], seed: int | None = None, gradients: bool = False
) -> Iterator[None]:
    """A context that leaves no trace: after it, these are as they were before, whatever ran inside.

    - the random generators of torch (CPU and accelerators), Python and NumPy;
    - Pyro's parameter store: inside, its parameters can be used; new ones are forgotten;
    - Pyro's settings and torch's, such as whether arguments of distributions are validated;
    - of each module among the programs: the training mode of each submodule, and all buffers, such as the running
      statistics of a BatchNorm. Inside, the modules are in evaluation mode.

    Parameters are not copied: a program that changes them in place has changed them.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> with untouched(net, seed=0):
    ...     first = net.training, torch.rand(())
    >>> with untouched(net, seed=0):
    ...     second = net.training, torch.rand(())
    >>> first == second, first[0], net.training
    (True, False, True)

    Args:
        programs: models and guides.
        seed: of the draws inside. None: the generators continue from where they are.
        gradients: whether gradients may be computed inside.
    """
    modules = {
        part: None for program in programs if isinstance(program, nn.Module) for part in program.modules()
    }
    buffers = [(part, dict(part._buffers)) for part in modules]
    values = {t: t.clone() for _, own in buffers for t in own.values() if t is not None}
    settings, store = pyro.settings.get(), pyro.get_param_store()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 the global one, as Pyro's seed has it
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.set_grad_enabled(gradients and torch.is_grad_enabled()))
            stack.enter_context(store.scope(store.get_state()))
            for program in programs:
                if isinstance(program, nn.Module):
                    stack.enter_context(in_mode(program, training=False))
            if seed is not None:
                seed = int(seed)  # Python's generator takes none of NumPy's
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        pyro.settings.set(**settings)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for tensor, value in values.items():
            tensor.data.copy_(value)  # `data`, so that a graph that saved the tensor stays valid
        for part, own in buffers:
            part._buffers.update(own)
