"""Where a fit runs: one device, several of one machine, or what torchrun has started. Through Fabric."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger

PRECISIONS = ("32", "bf16-mixed")


def check_devices(device: object, devices: object, precision: object) -> None:
    """Raise ValueError, naming the argument, unless `open_fabric` can take these."""
    if device is not None and device != "auto":
        try:
            torch.device(device)  # type: ignore[call-overload]
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f'device must be "auto", None or what torch.device takes: got {device!r} ({error})'
            ) from None
    if devices != "auto" and (not isinstance(devices, int) or isinstance(devices, bool) or devices < 1):
        raise ValueError(f'devices must be a positive number of devices or "auto": got {devices!r}')
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}: got {precision!r}")


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return torch.distributed.is_torchelastic_launched()


def open_fabric(
    device: str | torch.device | None,
    devices: int | str,
    precision: str,
    home: torch.device,
    loggers: Logger | list[Logger] | None = None,
) -> Fabric:
    """Fabric for these devices, not yet launched.

    Args:
        device: "auto": the accelerator where there is one; None: `home`, where the model is.
        devices: how many, each with a process of its own; those of torchrun where it has started this one.
        precision: of the network's forward pass.
        home: where the model is.
        loggers: of Fabric.
    """
    if device == "auto":
        kind, index = "auto", None
    else:
        chosen = home if device is None else torch.device(device)
        kind, index = chosen.type, chosen.index
    options: dict[str, Any] = dict(
        accelerator=kind, precision="32-true" if precision == "32" else precision, loggers=loggers
    )
    try:
        return _opened(kind, index, devices, options)
    except RuntimeError as error:  # Lightning's own is one too
        raise ValueError(f"device {kind!r} with devices={devices!r} can't be used here: {error}") from error


def _opened(kind: str, index: int | None, devices: int | str, options: dict[str, Any]) -> Fabric:
    from lightning_fabric import Fabric

    if started_by_torchrun():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
        return Fabric(strategy="ddp", devices=here, num_nodes=nodes, **options)
    if devices == 1:
        one: int | list[int] = 1 if kind in ("cpu", "auto") else [index or 0]
        return Fabric(devices=one, **options)
    return Fabric(strategy="ddp_spawn", devices=devices, **options)
