"""The random numbers of a fit: seeds, and the generators' states as tensors for a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def seed_of(*parts: object) -> int:
    """A seed made from several parts, so that what an epoch draws depends on nothing before it."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def generator_states(fabric: Fabric) -> dict[str, Tensor]:
    """The states of the generators that noise and dropout draw from, of all processes."""
    state = {"generator.cpu": torch.get_rng_state()}
    if fabric.device.type != "cpu":
        state["generator.device"] = torch.get_device_module(fabric.device).get_rng_state(fabric.device)
    gathered = [state]
    if fabric.world_size > 1:
        gathered = [{} for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(gathered, state)
    return {f"{name}.{rank}": t for rank, one in enumerate(gathered) for name, t in one.items()}


def set_generators(states: Mapping[str, Tensor], fabric: Fabric) -> None:
    """Put back the states that this process had."""
    rank, device = fabric.global_rank, fabric.device
    torch.set_rng_state(states[f"generator.cpu.{rank}"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[f"generator.device.{rank}"], device)
