"""Running a model and its guide to look at them, and leaving everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import nn

from pyro_bmrs.networks.modes import in_mode


@contextmanager
def looking(model: Any, seed: int) -> Iterator[None]:
    """A context in which programs run without a trace left: no generator, gradient, mode or parameter store notices.

    Args:
        model: a Pyro model; a module is in evaluation mode within.
        seed: of the draws within.
    """
    store = pyro.get_param_store()
    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        store.scope(store.get_state()),
        in_mode(model, training=False) if isinstance(model, nn.Module) else nullcontext(),
    ):
        torch.manual_seed(seed)
        yield
