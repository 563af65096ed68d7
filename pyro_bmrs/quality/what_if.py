"""What another prior log-odds would remove: each structure's own threshold, and the parameters left at each."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.pruning.decision import removals

if TYPE_CHECKING:
    from pyro_bmrs.pruning import NetworkPlan

# More thresholds than these are not told apart on a slider, and each costs a look at the dependency graph.
MOST_THRESHOLDS = 300
# Of a layer with more structures the slider shows the count alone.
MOST_CELLS = 2000


def decisions(plan: NetworkPlan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The highest threshold at which each structure is removed, with floors, rounding and nesting.

    `plan.at(t)` removes structure i where t ≤ leaving[i]. That is the structure's own score, with these exceptions:
    -inf where its layer keeps it at any threshold; inf where the fit removed it; a lower score where it has to leave
    together with others, so that the number of channels stays a multiple of `round_to`; a higher one where it lies
    inside others (`InputSelection`). Of structures inside others, one that was removed may stay again at a lower
    threshold, for a floor.

    Returns:
        leaving, in the order of the table, shape (structures,); and all finite thresholds at which something changes,
        falling. Both in the criterion's unit.
    """
    if plan.nesting.owners:
        return _of_nested_layers(plan)
    found = np.full(len(plan.table), -math.inf)
    score = plan.table["score"].to_numpy(dtype=float)
    gone = plan.table["removed_in_fit"].to_numpy(dtype=bool)
    layers = plan.table["layer"].to_numpy()
    for layer in plan.layers:
        least = plan.rule.floor(int((layers == layer).sum()))
        multiple = plan.rule.multiple(plan.channels.get(layer, 1))
        rows = np.flatnonzero((layers == layer) & ~gone)
        rows = rows[np.argsort(score[rows], kind="stable")]
        for rank, row in enumerate(rows):
            # stays as long as the first of its multiple does, which stays as long as its score is below
            first = rank // multiple * multiple
            if first >= least:
                found[row] = score[rows[first]]
    found[gone] = math.inf
    return found, np.unique(found[np.isfinite(found)])[::-1]


def _of_nested_layers(plan: NetworkPlan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same where a layer depends on others: by deciding at every score."""
    layers = plan.candidates(math.inf)
    scores = torch.cat([layer.score[layer.kept] for layer in layers.values()]).numpy()
    leaving = torch.full((len(plan.table),), -math.inf, dtype=torch.float64)
    first = before = torch.cat([*removals(layers, plan.nesting).values()])
    turns = []
    for threshold in np.unique(scores[np.isfinite(scores)])[::-1].tolist():
        asked = {
            site: replace(layer, removed=(layer.score >= threshold) | ~layer.kept)
            for site, layer in layers.items()
        }
        gone = torch.cat([*removals(asked, plan.nesting).values()])
        leaving[gone & (leaving == -math.inf)] = threshold
        if not torch.equal(gone, before):
            turns.append(threshold)
        before = gone
    leaving[first] = math.inf
    return leaving.numpy(), np.array(turns)


def what_if(plan: NetworkPlan, *, most: int = MOST_THRESHOLDS) -> pd.DataFrame:
    """Structures and parameters left at every threshold at which something changes.

    Args:
        plan: with a network to count the parameters of, as `reduce` makes it.
        most: thresholds; of more, so many spread evenly over them, the plan's own always among them.

    Returns:
        A row per threshold, falling: score_threshold (removed at or above it), prior_log_odds (in nats: what the
        criterion would have to be given instead of its own to stop there; NaN without evidence), structures and
        parameters left.

    Raises:
        ValueError: if most < 2, or the plan holds no network.
    """
    check(is_whole(most, 2), "most", "an integer of at least 2", most)
    own = _threshold_of(plan)
    _, changes = decisions(plan)
    if len(changes) > most:
        changes = changes[np.unique(np.linspace(0, len(changes) - 1, most).round().astype(int))]
    thresholds = sorted({math.inf, own, *changes.tolist()}, reverse=True)
    plans = [plan.at(threshold) for threshold in thresholds]
    return pd.DataFrame(
        {
            "score_threshold": thresholds,
            "prior_log_odds": [plan.rule.log_odds_at(threshold) for threshold in thresholds],
            "structures": [int((~other.table.removed).sum()) for other in plans],
            "parameters": plan.parameters_of(plans),
        }
    )


def _threshold_of(plan: NetworkPlan) -> float:
    threshold = plan.rule.threshold
    if threshold is None:
        raise ValueError(
            f"plan must be decided by a threshold, to ask what another one does: got {plan.rule}"
        )
    return threshold


def slider(
    plan: NetworkPlan, changes: pd.DataFrame, curve: pd.DataFrame | None, before: int | None = None
) -> dict[str, Any] | None:
    """What the page's slider needs: each structure's own threshold, parameters at every change, accuracy on a grid.

    Args:
        plan: the plan.
        changes: of `what_if`.
        curve: of `compression_curve`; None or without accuracies: none is shown.
        before: parameters of the full network; None: the plan's network says it.

    Returns:
        evidence (whether the slider is one of prior log-odds, not of a threshold on the score), own (where the plan
        stands) and json, safe inside a script element; None for a plan without structures that could go.
    """
    from markupsafe import Markup

    leaving, values = decisions(plan)
    threshold = _threshold_of(plan)
    log_odds = plan.rule.log_odds_at(0.0)
    evidence = math.isfinite(log_odds)
    if not len(values):
        return None
    asked = log_odds - values if evidence else values
    margin = max(0.1, 0.02 * float(np.abs(asked).max()))
    lowest, highest = float(asked.min()) - margin, float(asked.max()) + margin
    decided = plan.rule.log_odds_at(threshold) if evidence else threshold
    decided = min(max(decided, lowest), highest) if math.isinf(decided) else decided
    rows = plan.table.assign(leaving=leaving).groupby("layer", sort=False)
    # JSON knows no infinity
    layers = [
        {
            "name": layer,
            "units": own.unit.tolist(),
            "leaving": [
                value if math.isfinite(value) else "gone" if value > 0 else None
                for value in own.leaving.tolist()
            ],
        }
        for layer, own in rows
    ]
    shown = ["score_threshold", "accuracy", "parameters_removed"]
    grid = pd.DataFrame(columns=shown) if curve is None else curve[shown].astype(float).dropna()
    # with the two that `what_if` adds, if it has left out none
    every = {math.inf, threshold, *values.tolist()}
    data = {
        "evidence": evidence,
        "own": decided,
        "log_odds": log_odds if evidence else 0.0,
        "lowest": min(lowest, decided),
        "highest": max(highest, decided),
        "most": MOST_CELLS,
        "exact": len(changes) == len(every),
        "before": plan.parameters_before() if before is None else before,
        "layers": layers,
        "parameters": _falling(changes[["score_threshold", "parameters"]]),
        "accuracy": _falling(grid.rename(columns={"parameters_removed": "removed"})),
    }
    # inside a script element only "<" could end it
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return {"evidence": evidence, "own": decided, "json": Markup(text)}


def _falling(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows by falling threshold, None for an infinite one."""
    rows = table.rename(columns={"score_threshold": "threshold"}).sort_values("threshold", ascending=False)
    return [
        {**row, "threshold": row["threshold"] if math.isfinite(row["threshold"]) else None}
        for row in rows.to_dict("records")
    ]
