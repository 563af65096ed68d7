"""Accuracy against parameters removed, along a criterion's own ranking."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from torch import nn

if TYPE_CHECKING:
    from pyro_bmrs.inference.batches import Data
    from pyro_bmrs.pruning import Reduction


def compression_curve(model: nn.Module, plan: Reduction, data: Data, *, points: int = 15) -> pd.DataFrame:
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
    from pyro_bmrs.pruning import Reduction

    if not isinstance(plan, Reduction):
        raise TypeError(f"plan must be a Reduction: got {type(plan).__name__}")
    if not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be at least 2: got {points!r}")
    rows_left = plan.table[plan.table.present]
    scores = rows_left.score.sort_values(ascending=False, ignore_index=True)
    total, own = len(scores), int(rows_left.removed.sum())
    counts = [round(index * total / (points - 1)) for index in range(points)]
    beyond = points // 3 + 1
    counts += [own + round(index * (total - own) / beyond) for index in range(1, beyond)]
    thresholds = {float("inf") if count == 0 else float(scores[count - 1]) for count in counts} | {0.0}
    full = plan.parameters_before()
    device = next(model.parameters()).device
    rows = []
    falling = sorted(thresholds, reverse=True)
    variants = [plan if threshold == 0.0 else plan.at(threshold) for threshold in falling]
    for threshold, variant, left in zip(falling, variants, plan.parameters_of(variants), strict=True):
        scales = {site: scale.to(device).float() for site, scale in variant.scales().items()}
        result = evaluate(model, data, scales)
        rows.append(
            {
                "parameters_removed": 1 - left / full,
                "accuracy": result.accuracy,
                "loss": result.loss,
                "score_threshold": threshold,
                "is_plan": threshold == 0.0,
            }
        )
    return pd.DataFrame(rows)
