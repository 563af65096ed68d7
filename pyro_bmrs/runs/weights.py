"""Trained weights of a recipe's network, read from a file."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.export import load_weights
from pyro_bmrs.networks.inputs import check_finite

SUFFIXES = (".safetensors", ".pt", ".pth")


def located_weights(path: str) -> str:
    """The path from the root; raises ValueError unless it ends as such a file does."""
    if not path.endswith(SUFFIXES):
        raise ValueError(f"weights must be a file that ends in {', '.join(SUFFIXES)}: got {path!r}")
    return str(Path(path).expanduser().resolve())


def digest_of(path: str) -> str:
    """A text that differs for other content; raises ValueError if there is no such file."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise ValueError(f"weights must be a file that can be read: {path} ({error.strerror})") from None


def load_into(network: nn.Module, path: str) -> None:
    """Give a network the weights of a state_dict file, in place; of a .pt with `weights_only=True`.

    Raises:
        ValueError: if the file is damaged, holds something else, or belongs to another network.
    """
    state = _read(path)
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"weights {path} must be those of the recipe's network without noise: {reason}"
        ) from None
    check_finite(f"weights {path}", network)


def _read(path: str) -> Mapping[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            return load_weights(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise ValueError(
                f"weights {path} can't be read: it is damaged, or no file of torch.save"
            ) from None
        raise ValueError(
            f"weights {path} must hold tensors alone, as torch.save(network.state_dict(), path) writes them: it holds "
            "other objects, which might run code"
        ) from None
    # a damaged pickle may raise anything
    except Exception as error:
        raise ValueError(f"weights {path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and not value.is_complex()
        for name, value in state.items()
    ):
        held = f"a {type(state).__name__}"
        if isinstance(state, Mapping):
            held += f" of {', '.join(map(repr, [*state][:5]))}"
        raise ValueError(f"weights {path} must hold a state_dict, real tensors by name: it holds {held}")
    return state
