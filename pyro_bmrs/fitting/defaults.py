"""Settings that were not given, and follow from model and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import tensors_of
from pyro_bmrs.networks.noise import noise_layers

# What may follow from model and data.
SETTLED = ("kl_weight", "batch_size", "learning_rate", "warm_up", "posterior_learning_rate", "keep_best")
# An epoch of a network with noise has at least so many batches, of at least so many examples.
_BATCHES, _LEAST_BATCH = 32, 16
# Of a trained network: its share of the learning rate. At 1 a ResNet-8 lost 1.3 points at KL weight 1, at 0.1 nothing,
# but small weights can't make up any more for what leaves at high KL weights.
_LOOKED_AT, _TRAINED_RATE = 500, 0.3
# log θ goes from 0 to about -20 where a structure is idle. A step moves it by the rate at most.
_TRAVEL, _HIGHEST_RATE = 40.0, 0.05


def settled(
    settings: Settings,
    model: nn.Module,
    guide: Callable[..., Any] | None,
    train: Batches,
    validation: Data | None,
    before: Mapping[str, Any],
) -> Settings:
    """The settings, with those that were not given as model and data need them; `train` gets its batch size.

    Args:
        before: settings of the fit that goes on. A model that it has trained looks like another one.

    Raises:
        ValueError: if a KL weight of "auto" was asked for, and nothing tells how to choose; or other settings don't go
            with it.
    """
    known = {
        name: before[name] for name in SETTLED if name in before and name not in settings.model_fields_set
    }
    settings = settings.changed(**known)
    train.batch_size = settings.batch_size
    sites, given = noise_layers(model), settings.model_fields_set
    structured = isinstance(guide, AutoTruncatedLogNormal) and bool(sites)
    changes: dict[str, Any] = {}
    if guide is not None and not sites and "keep_best" not in given:
        # one draw a batch: the epoch with the least loss is one of luck
        changes["keep_best"] = False
    if settings.kl_weight == "auto" and not (structured and validation is not None):
        if "kl_weight" in given:
            needed = "validation data to choose by, and an AutoTruncatedLogNormal of noise layers"
            raise ValueError(f'kl_weight must be a number without {needed}: got "auto"')
        changes["kl_weight"] = 1.0
    elif settings.kl_weight == "auto" and not _goes_with_auto(settings):
        changes["kl_weight"] = 1.0
    if structured and train.loader is None and "batch_size" not in given:
        changes["batch_size"] = train.batch_size = _batch_size(train.size, settings.batch_size)
    if structured and not {"learning_rate", "warm_up"} & given and _is_trained(model, train):
        changes |= {"learning_rate": _TRAINED_RATE * settings.learning_rate, "warm_up": 0.1}
    if structured and "posterior_learning_rate" not in given:
        steps = settings.epochs * max(len(train) // settings.accumulate, 1)
        rate = min(max(_TRAVEL / steps, settings.posterior_learning_rate), _HIGHEST_RATE)
        changes["posterior_learning_rate"] = float(f"{rate:.2g}")
    return settings.changed(**changes) if changes else settings


def _is_trained(model: nn.Module, train: Batches) -> bool:
    """Whether the network has learned something: labels are likelier than those of other examples, by a factor of two.

    A fit of a network that starts with random weights needs rates at which a trained one would lose much of what it
    knows.
    """
    with suppress(Exception), untouched():  # what is wrong with model or data is told by the fit itself
        x, y = train.first() if train.loader is not None else train.some(_LOOKED_AT, seed=0)
        sizes = {tensor.shape[:1] for tensor in tensors_of((x, y))}
        if len(sizes) > 1 or not isinstance(y, Tensor) or len(y) < 2:
            return False  # nothing tells how to give examples the labels of others
        theta = {
            site: torch.ones(layer.features, dtype=torch.float64, device=train.device)
            for site, layer in noise_layers(model).items()
        }
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        own, other = (evaluate(model, (x, labels), theta).loss for labels in (y, y[order.to(y.device)]))
        return other - own > math.log(2)
    return False


def _goes_with_auto(settings: Settings) -> bool:
    """Whether stages can be compared at the end. Raises ValueError if that was asked for, and can't be."""
    for name, allowed in (("patience", None), ("removal", "end")):
        given = getattr(settings, name)
        if given != allowed:
            if "kl_weight" in settings.model_fields_set:
                raise ValueError(
                    f'{name} must be {allowed!r} with kl_weight "auto", which chooses at the end: got {given!r}'
                )
            return False
    return True


def _batch_size(examples: int, most: int) -> int:
    """A power of 2, or `most`."""
    wanted = max(examples // _BATCHES, _LEAST_BATCH)
    return most if wanted >= most else 2 ** int(math.log2(wanted))
