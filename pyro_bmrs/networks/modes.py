"""Training and evaluation mode, switched for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
