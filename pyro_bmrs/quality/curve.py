"""Accuracy against parameters removed, along a criterion's own ranking."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import nn

from pyro_bmrs.arguments import check, is_whole

if TYPE_CHECKING:
    from pyro_bmrs.inference.batches import Data
    from pyro_bmrs.pruning import NetworkPlan


def compression_curve(model: nn.Module, plan: NetworkPlan, data: Data, *, points: int = 15) -> pd.DataFrame:
    """Remove more and more structures, highest score first, and look at the accuracy without fine-tuning.

    Args:
        model: the Pyro model that `plan` was made from.
        plan: the reduction; its own decision is one of the points.
        data: (x, y) tensors, a data set or a loader, of examples not used for the fit.
        points: how many, spread evenly over the number of structures removed; a third as many again lie
            between the plan's number and all, where the accuracy falls.

    Returns:
        A row per point: parameters_removed (fraction 0 to 1, physically gone), accuracy (0 to 1, NaN for a
        model without classes), loss (nats per example), score_threshold (removed at or above it), is_plan.

    Raises:
        ValueError: if points < 2, or the plan was loaded from disk and holds no network.
    """
    from pyro_bmrs.inference.evaluate import evaluate
    from pyro_bmrs.pruning import NetworkPlan

    check(isinstance(plan, NetworkPlan), "plan", "a NetworkPlan", type(plan), TypeError)
    check(is_whole(points, 2), "points", "at least 2", points)
    full = plan.parameters_before()
    device = next(model.parameters()).device
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
        means = {site: mean.to(device).float() for site, mean in variant.theta_mean().items()}
        result = evaluate(model, data, means)
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
