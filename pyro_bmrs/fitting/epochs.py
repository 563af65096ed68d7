"""What is measured at the end of an epoch, what makes it the best, and which structures would stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.inference.evaluate import Evaluation, evaluate
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.posteriors import read_posterior
from pyro_bmrs.inference.predict import posterior_point
from pyro_bmrs.inference.sites import elementary
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.reduce import reduce_structures

HISTORY_COLUMNS = [
    "phase", "epoch", "loss", "log_likelihood", "kl", "kl_weight", "validation_loss",
    "validation_accuracy", "kept", "parameters", "seconds",
]  # fmt: skip


@dataclass
class Measure:
    """Measures model and guide after an epoch.

    Attributes:
        model, guide, settings: as in `fit`.
        first: a batch to call them with.
        examples: N, the size of the training data.
        held_out: the validation data, if any.
        local_sites: latents of single examples.
    """

    model: nn.Module
    guide: Callable[..., Any] | None
    settings: Settings
    first: tuple[Any, Any]
    examples: int
    held_out: Batches | None
    local_sites: frozenset[str]

    def __post_init__(self) -> None:
        self.phase = "fine-tune" if self.guide is None else "fit"
        countable = isinstance(self.guide, AutoTruncatedLogNormal)
        self.criterion = self.settings.made_criterion() if countable else None
        self._known: Binding | None = None

    def row(self, epoch: int, loss: float, likelihood: float, kl_weight: float) -> dict[str, Any]:
        """The epoch's row of the history, without its seconds."""
        validation = Evaluation(math.nan, math.nan, math.nan)
        if self.held_out is not None:
            point = {}
            if self.guide is not None:
                point = posterior_point(self.guide, *self.first, without=self.local_sites)
            validation = evaluate(self.model, self.held_out, point)
        return {
            "phase": self.phase,
            "epoch": epoch,
            "loss": loss,
            "log_likelihood": likelihood,
            "kl": self._kl(),
            "kl_weight": math.nan if self.guide is None else kl_weight,
            "validation_loss": validation.loss,
            "validation_accuracy": validation.accuracy,
            "kept": self._kept(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    def score(self, row: Mapping[str, Any]) -> float:
        """The number that is least in the best epoch, at one KL weight."""
        if self.held_out is None:  # the training loss includes the KL
            return float(row["loss"])
        if self.guide is None:
            accuracy = row["validation_accuracy"]
            return float(row["validation_loss"] if math.isnan(accuracy) else -accuracy)
        assert not isinstance(self.settings.kl_weight, str)
        penalty = 0.0 if math.isnan(row["kl"]) else self.settings.kl_weight * row["kl"] / self.examples
        return float(row["validation_loss"] + penalty)

    def plan(self) -> NetworkPlan:
        """What the settings' criterion would remove now."""
        assert self.guide is not None
        assert self.criterion is not None
        plan = reduce_structures(
            self.model, self.guide, self.criterion, min_kept=self.settings.min_kept, known=self._known
        )
        self._known = plan._binding
        return plan

    def check_finite(self, epoch: int, best_epoch: int) -> None:
        """Raise FloatingPointError if a parameter is not finite: no later loss would tell of the last step."""
        for module in (self.model, self.guide):
            for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
                bad = torch.nonzero(~torch.isfinite(parameter))
                if len(bad):
                    place = ", ".join(map(str, bad[0].tolist()))
                    raise FloatingPointError(
                        f"parameter {name}[{place}] is not finite after epoch {epoch}; the parameters of epoch "
                        f"{best_epoch} are back in place. Lower learning_rate"
                    )

    @torch.no_grad()
    def _kl(self) -> float:
        """KL of the noise sites over the whole data set, in nats, unweighted."""
        layers = noise_layers(self.model)
        if self.guide is None or not layers:
            return math.nan
        posterior = read_posterior(self.guide, *self.first)
        return sum(
            float((kl_divergence(posterior[site], elementary(layer.prior())) * layer.kept).sum())
            for site, layer in layers.items()
            if site in posterior
        )

    def _kept(self) -> float:
        """How many structures `reduce` would keep; NaN unless the guide is an AutoTruncatedLogNormal."""
        if self.criterion is None:
            return math.nan
        if self.settings.removal == "epoch":
            return sum(int(layer.kept.sum()) for layer in noise_layers(self.model).values())
        return int(self.plan().widths().after.sum())
