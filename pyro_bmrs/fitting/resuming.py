"""What going on needs beside the weights: the states of generators and optimiser, as tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that noise and dropout draw from."""
    states = {"generator.cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["generator.device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_generators(states: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """Put back the states that the process of this rank had."""
    torch.set_rng_state(states[f"generator.cpu.{rank}"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[f"generator.device.{rank}"], device)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, by the number of the parameter."""
    return {
        f"optimizer.{number}.{name}": value.detach()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: where the state is of other parameters.
    """
    document = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            number, _, name = rest.partition(".")
            state.setdefault(int(number), {})[name] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        if index >= len(parameters) or values["exp_avg"].shape != parameters[index].shape:
            raise ValueError(f"its optimiser has other parameters (number {index})")
    optimizer.load_state_dict({**document, "state": state})
