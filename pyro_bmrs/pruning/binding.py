"""A live network and a batch to call it with: a plan needs both to count, cut and compare costs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import examples_for, multiply_accumulates_by_entry
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.groups import StructureGroup, cuts_of
from pyro_bmrs.networks.hooked_noise import network_of, without_noise
from pyro_bmrs.networks.inputs import Inputs, blamed_on_input, bound, map_tensors, tensors_of
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import at_one
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.pruning.shrink import earlier_cuts, original_network

# Enough examples for outputs to spread in the equality check, few enough for float64 (of large networks: two).
CHECK_EXAMPLES = 32
_CHECK_MULTIPLY_ACCUMULATES = 1e10


class Binding:
    """A network with noise layers, and a way to a batch of its inputs.

    Args:
        network: the network.
        find_input: makes a batch of inputs; called once, when one is needed. None: there is no batch.
        model: the Pyro model that the network is in.
        arguments: what that was called with.
        others: values of latents beside the noise sites, to predict with.
        known: an earlier binding. What it has found holds for the same network, as long as that has the same shapes.
    """

    def __init__(
        self,
        network: nn.Module,
        find_input: Callable[[], Inputs] | None,
        model: nn.Module | None = None,
        arguments: tuple[Any, ...] = (),
        others: Mapping[str, Tensor] | None = None,
        known: Binding | None = None,
    ) -> None:
        self.network, self._find_input = network, find_input
        self.model, self.arguments, self.others = model, arguments, dict(others or {})
        self._originals: tuple[weakref.ref[nn.Module] | None, ...] = (weakref.ref(network), None)
        self._shapes: dict[str, torch.Size] = {}  # those of the network whose groups were found
        if known is not None and known.belongs_to(network) and known._shapes == shapes_of(network):
            self._shapes, self.groups = known._shapes, known.groups

    def of_a_copy(self) -> Binding:
        """The same of a copy of network and model: whatever is fitted later, a plan keeps to it.

        What has no copy, such as a model that holds an open file, stays as it is.
        """
        find_input, memo = self._find_input, dict[int, Any]()
        try:
            model = None if self.model is None else copied(self.model, memo)
            network = memo[id(self.network)] if id(self.network) in memo else copied(self.network)
        except Exception:
            return self
        if model is not None and self.arguments:
            find_input = partial(input_of, model, self.arguments)
        own = Binding(network, find_input, model, self.arguments, self.others)
        own._originals = self._originals[0], None if self.model is None else weakref.ref(self.model)
        if self.has_groups:
            own._shapes, own.groups = self._shapes, self.groups
        return own

    def belongs_to(self, module: nn.Module) -> bool:
        """Whether it is of this network, or this model, or of a copy of it."""
        return any(one is not None and one() is module for one in self._originals)

    @property
    def has_input(self) -> bool:
        """Whether there is a way to a batch of inputs."""
        return self._find_input is not None

    @property
    def has_groups(self) -> bool:
        """Whether `groups` have been found already, which may take seconds."""
        return "groups" in vars(self)

    @cached_property
    def example_input(self) -> Inputs:
        """A batch of inputs.

        Raises:
            ValueError: if there is none.
        """
        if self._find_input is None:
            raise ValueError("example_input must be given: a batch of inputs of the network")
        return self._find_input()

    @cached_property
    def groups(self) -> dict[str, StructureGroup]:
        """What is removed with the structures of each site. Found once: it tries each removal."""
        self._shapes = shapes_of(self.network)
        return structure_groups(self.network, self.example_input)

    def cuts(self, kept: Mapping[str, Tensor]) -> Cuts:
        """The cuts that keep the structures where kept[site], a bool tensor (features,), is True."""
        return cuts_of(self.network, self.groups.values(), kept)

    def parameters_left(self, kept: Mapping[str, Tensor]) -> int:
        """How many parameters these cuts would leave, counted without cutting."""
        return self.cuts(kept).parameters_left(self.network)

    def multiply_accumulates_by_entry(self) -> dict[str, float]:
        """By name of a weight: in how many multiply-accumulates of one example each of its entries takes part."""
        looked_at = copied(self.network)
        with in_mode(looked_at, training=False), at_one(looked_at):
            return multiply_accumulates_by_entry(looked_at, self.example_input)

    def full_network(self) -> nn.Module:
        """The original network without noise, to measure its costs; with random weights if it has shrunk since."""
        if not earlier_cuts(self.network):
            return without_noise(copied(self.network))
        full = copied(original_network(self.network))
        full = full.to_empty(device=next(self.network.parameters()).device)
        with torch.no_grad(), torch.random.fork_rng():
            for parameter in full.parameters():
                parameter.normal_(0.0, 0.02)
            for buffer in full.buffers():
                # a buffer of indices must be within range
                buffer.fill_(1 if buffer.is_floating_point() else 0)
        return full


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Those of its parameters, by name."""
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def check_examples(network: nn.Module, example_input: Inputs) -> int:
    """How many examples the equality check takes: fewer of a network that is slow in float64."""
    looked_at = copied(network)  # a forward pass may change it
    with in_mode(looked_at, training=False), at_one(looked_at), blamed_on_input(network):
        return examples_for(looked_at, example_input, _CHECK_MULTIPLY_ACCUMULATES, 2, CHECK_EXAMPLES)


def input_of(model: nn.Module, arguments: tuple[Any, ...]) -> Inputs:
    """What the network inside `model` is called with when `model` is called with `arguments`."""
    network = network_of(model)
    if not arguments:
        raise ValueError("model_args must be given: a batch to call the model with")
    like = next(model.parameters())
    moved = map_tensors(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None), arguments)
    caught: list[Inputs] = []
    handle = network.register_forward_pre_hook(
        lambda _, given, keywords: caught.append(bound(network, given, keywords)), with_kwargs=True
    )
    try:
        with untouched(model), at_one(model):
            model(*moved)
    finally:
        handle.remove()
    if not caught or not tensors_of(caught[0]):
        raise ValueError("the network must be called by the model: pass example_input to apply()")
    return map_tensors(Tensor.detach, caught[0])
