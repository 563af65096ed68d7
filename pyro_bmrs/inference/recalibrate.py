"""BatchNorm statistics estimated again, for a network that has changed since they were estimated."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmrs.arguments import whole_number
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import batch_size as examples_in
from pyro_bmrs.networks.inputs import call, check_module
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import noise_layers


def recalibrate[Network: nn.Module](
    network: Network, data: Data, *, examples: int = 4096, batch_size: int = 128, seed: int = 0
) -> Network:
    """Re-estimate, in place, the running mean and variance of every BatchNorm layer; returns the network.

    A fit gathers these statistics under noise and before structures are removed. The smaller network's activations
    have other statistics. Here each becomes the plain average over batches of `data`. All other layers stay in
    evaluation mode. A network without running statistics is not changed.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> x = torch.randn(256, 2) + torch.tensor([1.0, -1.0])
    >>> recalibrate(net, (x, torch.zeros(256)))[0].running_mean.round().tolist()
    [1.0, -1.0]

    Args:
        network: without noise layers.
        data: training data, as (x, y) tensors, a data set or a loader. Only x is used.
        examples: about how many to use.
        batch_size: of the batches that the statistics are averaged over.
        seed: of the choice of examples.

    Raises:
        ValueError: if the network has noise layers, examples or batch_size is below 2, or the new statistics are not
            finite. The old ones are then restored.
    """
    check_module("network", network)
    if noise_layers(network):
        raise ValueError("network must have no noise layers: apply the reduction first")
    examples, batch_size = whole_number("examples", examples, 2), whole_number("batch_size", batch_size, 2)
    seed = whole_number("seed", seed)
    layers = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return network
    home = next(itertools.chain(network.parameters(), network.buffers())).device
    batches = Batches(data, batch_size, home, "data")
    momenta = [layer.momentum for layer in layers]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    seen = whole = 0
    try:
        with untouched(), in_mode(network, training=False):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative average
                layer.train()
            for x, *_ in batches.epoch(torch.Generator().manual_seed(seed)):
                count = examples_in(x)
                whole = whole or count
                # a smaller last batch would weigh as much as the others
                if count == whole:
                    call(network, x)
                seen += count
                if seen >= examples:
                    break
        for buffer in (buffer for layer in layers for buffer in layer.buffers()):
            if not bool(buffer.isfinite().all()):
                raise ValueError(
                    "data must give finite activations: a running mean or variance is NaN or inf"
                )
    except BaseException:
        for layer, state in zip(layers, before, strict=True):
            layer.load_state_dict(state, strict=False)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return network
