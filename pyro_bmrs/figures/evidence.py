"""Figures of evidence: priors, posteriors and their reductions; ΔF along a parameter; the most probable models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pyro_bmrs.arguments import check
from pyro_bmrs.figures.style import BLACK, BLUE, GREEN, LARGEST_LINEAR_RATIO, ORANGE, styled_figure
from pyro_bmrs.tables import EVIDENCE_COLUMNS, require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch.distributions import Distribution


def plot_evidence_curve(curve: pd.DataFrame) -> Figure:
    """The evidence along a parameter of the reduced prior, and how much it reduces.

    Args:
        curve: what `evidence_curve` returned.

    Raises:
        ValueError: if a column is missing.
    """
    require_columns("curve", curve, EVIDENCE_COLUMNS)
    name = str(curve.columns[0])
    values = curve[name].to_numpy()
    with styled_figure(4.4) as figure:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        upper.plot(values, curve.mixture, "-", color=BLUE, label="each element reduced or not (mixture)")
        upper.plot(values, curve.chosen, "--", color=ORANGE, label="all with ΔF + log-odds ≥ 0 reduced")
        best = int(np.argmax(curve.mixture.to_numpy()))
        upper.plot(values[best], curve.mixture.iloc[best], "o", color=BLUE, ms=7, mfc="none", mew=1.6)
        upper.annotate(
            f"{name.replace('_', ' ')} = {values[best]:.3g}", (values[best], curve.mixture.iloc[best]),
            xytext=(0, 8), textcoords="offset points", ha="center", va="bottom",
        )  # fmt: skip
        upper.margins(y=0.2)
        upper.set_ylabel("ΔF against the full model (nats)")
        upper.legend(loc="best")
        lower.plot(values, curve.reduced, drawstyle="steps-mid", color=BLACK)
        lower.set_ylabel("reduced")
        lower.set_xlabel(name.replace("_", " "))
        if values.min() > 0 and values.max() > LARGEST_LINEAR_RATIO * values.min():
            lower.set_xscale("log")
    return figure


def plot_reductions(
    posterior: Distribution,
    prior: Distribution,
    reduced_priors: Mapping[str, Distribution],
    values: torch.Tensor,
) -> Figure:
    """Densities of a prior, a posterior, and reduced priors with the posteriors they lead to and their ΔF.

    Args:
        posterior, prior: of one number.
        reduced_priors: by what to call them; one panel each.
        values: where the densities are drawn. Shape: (points,).
    """
    from pyro_bmrs.evidence import log_evidence_change, reduced_posterior
    from pyro_bmrs.evidence.unwrapping import batch_shape_of, check_distributions

    check(len(reduced_priors) > 0, "reduced_priors", "one or more, by their names", reduced_priors)
    for name, reduced in reduced_priors.items():
        check_distributions((posterior, prior, reduced))
        shape = batch_shape_of((posterior, prior, reduced))
        check(shape.numel() == 1, f"posterior and priors of {name!r}", "of one element", tuple(shape))
    with styled_figure(2.5 * len(reduced_priors) + 0.3) as figure:
        panels = np.atleast_1d(figure.subplots(len(reduced_priors), sharex=True))
        x = values.double()
        for axes, (name, reduced) in zip(panels, reduced_priors.items(), strict=True):
            after = reduced_posterior(posterior, prior, reduced)
            change = float(log_evidence_change(posterior, prior, reduced))
            for law, colour, style, label in (
                (prior, BLACK, ":", "prior"), (posterior, BLUE, "-", "posterior"),
                (reduced, ORANGE, ":", "reduced prior"), (after, GREEN, "-", "reduced posterior"),
            ):  # fmt: skip
                axes.plot(x, law.log_prob(x).exp(), style, color=colour, label=label, lw=1.8)
            axes.set_title(
                f"{name}: ΔF = {change:+.2f} nats, the reduced model is {'better' if change >= 0 else 'worse'}"
            )
            axes.set_ylabel("density")
            axes.set_ylim(bottom=0)
        panels[0].legend(loc="upper left")
        panels[-1].set_xlabel("θ")
    return figure


class ModelPosterior(Protocol):
    """What is read of the posterior of models."""

    @property
    def groups(self) -> Sequence[str]: ...
    def table(self, count: int = ...) -> pd.DataFrame: ...


def plot_models(posterior: ModelPosterior, *, count: int = 12) -> Figure:
    """The most probable models: which groups each reduces (crossed) and its probability.

    Args:
        posterior: what `exhaustive_reduction` returned.
        count: models shown, at most.
    """
    if not hasattr(posterior, "table"):
        raise TypeError(
            f"posterior must be what exhaustive_reduction returned: got {type(posterior).__name__}"
        )
    table = posterior.table(count)
    groups = posterior.groups
    with styled_figure(0.28 * len(groups) + 2.0) as figure:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, max(len(groups), 2)))
        positions = np.arange(len(table))
        upper.bar(positions, table.probability, color=BLUE, width=0.7)
        upper.set_ylabel("probability")
        for position, model in zip(positions, table.model, strict=True):
            for row in range(len(groups)):
                reduced = model >> row & 1
                lower.plot(
                    position, row, "x" if reduced else "s", color=ORANGE if reduced else BLUE, ms=6, mew=1.6
                )
        lower.set_yticks(range(len(groups)), groups)
        lower.set_ylim(len(groups) - 0.5, -0.5)
        lower.set_xticks([])
        lower.set_xlabel("models, the most probable first; ■ kept, × reduced")
    return figure
