"""Where a fit runs: one device, or the processes that torchrun has started. Through Lightning Fabric."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger


def open_fabric(
    device: str | torch.device | None,
    precision: str,
    home: torch.device,
    loggers: Logger | list[Logger] | None = None,
) -> Fabric:
    """Fabric, not yet launched, for this device; under torchrun, for the devices of all its processes.

    Args:
        device: "auto": the accelerator if there is one; None: `home`.
        precision: of the network's forward pass.
        home: the device of the model.
        loggers: for Fabric.

    Raises:
        ValueError: if there is no such device.
    """
    from lightning_fabric import Fabric

    if device == "auto":
        kind, index = "auto", None
    else:
        try:
            chosen = home if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f'device must be "auto", None or what torch.device takes: got {device!r} ({error})'
            ) from None
        kind, index = chosen.type, chosen.index
    options: dict[str, Any] = dict(
        accelerator=kind, precision="32-true" if precision == "32" else precision, loggers=loggers
    )
    if torch.distributed.is_torchelastic_launched():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
        options |= dict(strategy="ddp", devices=here, num_nodes=nodes)
    else:
        options |= dict(devices=1 if kind in ("cpu", "auto") else [index or 0])
    try:
        return Fabric(**options)
    except RuntimeError as error:  # Lightning's own is one too
        raise ValueError(f"device {kind!r} can't be used here: {error}") from error
