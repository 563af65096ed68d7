"""Writing the small network where other programs can use it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_bmrs.files import write_atomically
from pyro_bmrs.networks.modes import in_mode


def save_weights(network: nn.Module, path: Path | str) -> Path:
    """The network's state_dict as safetensors."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return write_atomically(path, lambda beside: save_file(state, beside))


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(path)
    return state


def export_program(network: nn.Module, example_input: Tensor, path: Path | str) -> Path:
    """`network` as a torch.export program with a dynamic batch: `torch.export.load(path).module()(x)`.

    The one file of a run that torch reads with pickle inside: load it only from whom you trust.
    """
    # of a batch of one, export would conclude that the batch is always one
    example = example_input[:1].expand(2, *example_input.shape[1:]).contiguous()
    with torch.no_grad(), in_mode(network, training=False):
        program = torch.export.export(
            network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
    return write_atomically(path, lambda beside: torch.export.save(program, beside))
