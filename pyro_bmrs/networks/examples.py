"""Batches of another size, where a network can be called with them: in a graph network examples need each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.inputs import Inputs, batch_size, call, first_examples, repeated
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import at_one


def at_most(network: nn.Module, inputs: Inputs, count: int) -> Inputs:
    """The first `count` examples of a batch; the whole batch if the network can't be called with them."""
    return _resized(network, inputs, count, first_examples) if batch_size(inputs) > count else inputs


def exactly(network: nn.Module, inputs: Inputs, count: int) -> Inputs:
    """`count` examples, of a batch that is repeated; the whole batch if the network can't be called with them."""
    return _resized(network, inputs, count, repeated) if batch_size(inputs) != count else inputs


@torch.no_grad()
def _resized(
    network: nn.Module, inputs: Inputs, count: int, resize: Callable[[Inputs, int], Inputs]
) -> Inputs:
    looked_at = copied(network)  # a forward pass may change it
    try:
        wanted = resize(inputs, count)
        with in_mode(looked_at, training=False), torch.random.fork_rng(), at_one(looked_at):
            call(looked_at, wanted)
    except Exception:
        return inputs
    return wanted
