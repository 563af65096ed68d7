"""Accuracy against parameters removed: along the plan's own scores, and along those of other criteria."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.checks.data import DataOfModel, some_of
from pyro_bmrs.inference.batches import AT_ONCE
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.progress import bar
from pyro_bmrs.pruning.criteria import BMRS_N, BMRS_U, SNR, ExpectedScale, Random, WeightNorm, text_of
from pyro_bmrs.pruning.reduce import NonFiniteScoreError, reduce_structures
from pyro_bmrs.pruning.scoring import Criterion

if TYPE_CHECKING:
    from pyro_bmrs.inference.batches import Data
    from pyro_bmrs.pruning import NetworkPlan

COMPARED: dict[str, Criterion] = {
    "BMRS_N": BMRS_N(),
    "BMRS_U-8": BMRS_U(bits=8),
    "BMRS_U-4": BMRS_U(bits=4),
    "SNR": SNR(),
    "E[θ]": ExpectedScale(),
    "weight norm": WeightNorm(),
    "random": Random(),
}


def compression_curve(model: nn.Module, plan: NetworkPlan, data: Data, *, points: int = 15) -> pd.DataFrame:
    """Remove more and more structures, highest score first, and look at the accuracy without fine-tuning.

    Args:
        model: the Pyro model that `plan` was made from.
        plan: the reduction; its own decision is one of the points.
        data: (x, y) tensors, a data set or a loader, of examples not used for the fit.
        points: how many, spread evenly over the number of structures removed; a third as many again lie
            between the plan's number and all, where the accuracy falls.

    Returns:
        A row per point: parameters_removed (share, 0 to 1), accuracy (0 to 1, NaN for a
        model without classes), loss (nats per example), score_threshold (removed at or above it), is_plan.

    Raises:
        ValueError: if points < 2, or the plan was loaded from disk and holds no network.
    """
    from pyro_bmrs.pruning import NetworkPlan

    check(isinstance(plan, NetworkPlan), "plan", "a NetworkPlan", type(plan), TypeError)
    check(is_whole(points, 2), "points", "at least 2", points)
    full = plan.parameters_before()
    # a layer that the criterion was not asked about has no scores, and keeps its structures
    asked = plan.table[plan.table.present & np.isfinite(plan.table.score)]
    scores = asked.score.sort_values(ascending=False, ignore_index=True)
    total, own = len(scores), int(asked.removed.sum())
    counts = [round(index * total / (points - 1)) for index in range(points)]
    beyond = points // 3 + 1
    counts += [own + round(index * (total - own) / beyond) for index in range(1, beyond)]
    thresholds = {math.inf if count == 0 else float(scores[count - 1]) for count in counts}
    own_threshold = plan.rule.threshold
    if own_threshold is None:  # no threshold says what a search decided, so the plan is a point by itself
        ranked, variants = replace(plan, rule=replace(plan.rule, threshold=0.0)), [(math.nan, plan)]
    else:
        ranked, variants = plan, [(own_threshold, plan)]
    variants += [(threshold, ranked.at(threshold)) for threshold in thresholds - {own_threshold}]
    variants.sort(key=lambda pair: pair[0], reverse=True)
    rows = []
    left_of = plan.parameters_of([variant for _, variant in variants])
    for (threshold, variant), left in zip(variants, left_of, strict=True):
        result = variant.evaluated(data, model)
        rows.append(
            {
                "parameters_removed": 1 - left / full,
                "accuracy": result.accuracy,
                "loss": result.loss,
                "score_threshold": threshold,
                "is_plan": variant is plan,
            }
        )
    return pd.DataFrame(rows)


def criterion_curves(
    model: nn.Module,
    guide: Callable[..., Any],
    plan: NetworkPlan,
    data: Data,
    criteria: Mapping[str, Criterion] | None = None,
    notes: list[str] | None = None,
    *,
    points: int = 15,
    progress: bool = False,
) -> pd.DataFrame:
    """Accuracy against parameters removed of several criteria on one posterior, without fine-tuning.

    Args:
        model, guide, plan: as of `diagnose`; the plan's own curve comes first, under the criterion's own name.
        data: of examples that were not used for the fit.
        criteria: by name; default the paper's.
        notes: takes a line for each criterion that can't score these structures.
        points: of each curve, as of `compression_curve`.
        progress: show a bar, on a terminal.

    Returns:
        As `compression_curve`, with a column criterion. `is_plan` marks the plan, and of each other criterion the plan
        that it would make. Random removal makes none.
    """
    compared = COMPARED if criteria is None else criteria
    own = plan.rule.criterion.partition(":")[0]
    with bar("curves of criteria", 1 + len(compared), shown=None if progress else False) as advance:
        curves = [compression_curve(model, plan, data, points=points).assign(criterion=f"{own} (this plan)")]
        advance(1)
        # another guide than this one remembers no arguments to be called with
        remembers = isinstance(guide, AutoTruncatedLogNormal)
        arguments = () if remembers else DataOfModel(model, some_of(data, AT_ONCE), AT_ONCE).first()
        for name, criterion in compared.items():
            curves += _other_curve(model, guide, plan, data, name, criterion, arguments, notes, points)
            advance(1)
    return pd.concat(curves, ignore_index=True)


def _other_curve(
    model: nn.Module, guide: Callable[..., Any], plan: NetworkPlan, data: Data, name: str, criterion: Criterion,
    arguments: tuple[Any, ...], notes: list[str] | None, points: int,
) -> list[pd.DataFrame]:  # fmt: skip
    """The curve of one criterion; none of the plan's own, or of one that can't score these structures."""
    rule, odds = plan.rule, getattr(criterion, "prior_log_odds", None)
    if (text_of(criterion), odds, 0.0) == (rule.criterion, rule.prior_log_odds, rule.threshold):
        return []
    try:
        with untouched(model, guide, seed=0):
            other = reduce_structures(
                model, guide, criterion, arguments, min_kept=rule.min_kept, round_to=rule.round_to,
                known=plan._binding,
            )  # fmt: skip
    except (NonFiniteScoreError, ValueError) as error:
        if notes is not None:
            notes.append(f"curve of {name}: {error}")
        return []
    curve = compression_curve(model, other, data, points=points).assign(criterion=name)
    return [curve.assign(is_plan=False) if isinstance(criterion, Random) else curve]
