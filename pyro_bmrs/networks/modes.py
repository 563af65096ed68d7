"""Training and evaluation mode, and torch's threads, switched for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """`module` in training or evaluation mode within the context; each submodule's own flag comes back."""
    flags = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """As many threads within torch's operations, within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
