"""What a fit requires of a Pyro model and its guide, checked before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import nn

from pyro_bmrs.arguments import check
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.evaluate import likelihood_scale
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.networks.inputs import check_finite, check_module
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import noise_layers


def check_programs(model: nn.Module, guide: Callable[..., Any] | None, settings: Settings) -> None:
    """Raise, naming the argument, unless a fit can be made of these."""
    check_module("model", model)
    check(guide is None or callable(guide), "guide", "a Pyro guide or None", type(guide), TypeError)
    check_finite("model", model)
    sites = list(noise_layers(model))
    if guide is None and sites:
        raise ValueError(f"guide must be given for a model with noise layers {sites}")
    if guide is not None and not sites:
        raise ValueError("model must hold MultiplicativeNoise layers when a guide is given: it has none")
    asked = "criterion" in settings.model_fields_set or settings.removal == "epoch"
    if asked and not isinstance(guide, AutoTruncatedLogNormal):
        raise TypeError("criterion needs an AutoTruncatedLogNormal guide; use reduce() after the fit instead")


@torch.no_grad()
def check_parameters(model: nn.Module, guide: Callable[..., Any], first: tuple[Any, ...]) -> None:
    """Raise if a `pyro.param` belongs to no module: no optimiser would train it, and it would be lost."""
    for name, program in (("model", model), ("guide", guide)):
        module = program if isinstance(program, nn.Module) else nn.Module()
        own = {parameter.data_ptr() for parameter in [*module.parameters(), *model.parameters()]}
        with in_mode(model, training=False):
            sites = poutine.trace(program, param_only=True).get_trace(*first).nodes.items()
        for site, node in sites:
            if node["type"] == "param" and node["value"].unconstrained().data_ptr() not in own:
                raise TypeError(
                    f"{name} has the pyro.param {site!r}, which no optimiser here would train: make it an "
                    "nn.Parameter or PyroParam of a module"
                )


def speaks_for_the_data_set(trace: poutine.Trace, batch: int, size: int) -> bool:
    """Whether the likelihood in a trace of the model is scaled to the whole data set, and not the batch's own.

    Raises:
        ValueError: if it has another scale.
    """
    scale, full = likelihood_scale(trace), size / batch
    if math.isclose(scale, 1.0):
        return False
    if not math.isclose(scale, full, rel_tol=1e-4):
        raise ValueError(
            "model must scale its likelihood either by 1 (it speaks for the batch) or by N/batch = "
            f"{full:.6g} (for the data set, N = {size}): got {scale:.6g}"
        )
    return True
