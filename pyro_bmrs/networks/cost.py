"""What a network costs: parameters, multiply-accumulates, milliseconds."""

from __future__ import annotations

import statistics
import time

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import MultiplicativeNoise


def parameters(network: nn.Module) -> int:
    """Number of parameters, noise layers having none."""
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_accumulates(network: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of one example, as torch's own operation counter sees them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example_input[:1])
    return int(counter.get_total_flops()) // 2


def latency_milliseconds(
    networks: list[nn.Module], example_input: Tensor, *, repeats: int = 30
) -> list[float]:
    """Median time of one forward pass for each network, in milliseconds, runs interleaved in one process.

    On this device with the thread count torch has now; compare ratios, not machines.
    """

    def once(network: nn.Module) -> float:
        start = time.perf_counter()
        network(example_input)
        if example_input.device.type != "cpu":
            torch.accelerator.synchronize(example_input.device)
        return 1e3 * (time.perf_counter() - start)

    with torch.no_grad():
        for network in networks:
            once(network)
        times = [[once(network) for network in networks] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def compare_costs(before: nn.Module, after: nn.Module, example_input: Tensor) -> pd.DataFrame:
    """Costs of two networks without noise; rows parameters, multiply_accumulates, latency_milliseconds.

    The latency is of one batch of `example_input`.
    """
    for name, network in (("before", before), ("after", after)):
        if any(isinstance(module, MultiplicativeNoise) for module in network.modules()):
            raise ValueError(f"{name} must be a network without noise layers: see pyro_bmrs.without_noise")
    with in_mode(before, training=False), in_mode(after, training=False):
        times = latency_milliseconds([before, after], example_input)
        columns = {
            name: {
                "parameters": parameters(network),
                "multiply_accumulates": multiply_accumulates(network, example_input),
                "latency_milliseconds": milliseconds,
            }
            for name, network, milliseconds in zip(("before", "after"), (before, after), times, strict=True)
        }
    return pd.DataFrame(columns)
