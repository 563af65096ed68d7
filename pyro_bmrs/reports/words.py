"""What a report says in words: the verdict, the warnings, the methods."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_bmrs.numerals import finite, number, percent, plain_number
from pyro_bmrs.tables import EVALUATION_COLUMNS, WIDTH_COLUMNS

if TYPE_CHECKING:
    from pyro_bmrs.fitting import Fit
    from pyro_bmrs.pruning import Plan, Rule
    from pyro_bmrs.quality.diagnosis import Diagnosis

# Scores this close to the threshold (criterion's unit) were decided by next to nothing.
NARROW = 0.1
# Removing what has no evidence should cost next to nothing: more than this (nats per example) is no detail.
COSTLY = 0.25


def khat_text(khat: float) -> str:
    """k̂ in two digits; in words where it is no finite number.

    >>> khat_text(0.456), khat_text(float("-inf")), khat_text(float("inf"))
    ('0.46', '−∞', 'above any')
    """
    if math.isnan(khat):
        return "–"
    if math.isinf(khat):
        return "above any" if khat > 0 else "−∞"
    return f"{khat:.2f}".replace("-", "−")


def khat_value(khat: float) -> str:
    """k̂ with all its digits, as scripts read it, infinities too; nothing for NaN.

    >>> khat_value(0.456), khat_value(float("-inf")), khat_value(float("nan"))
    ('0.456', '-Infinity', '')
    """
    if math.isinf(khat):
        return "Infinity" if khat > 0 else "-Infinity"
    return plain_number(khat)


def posterior_warnings(diagnosis: Diagnosis | None) -> list[str]:
    if diagnosis is None or diagnosis.khat is None:
        return []
    joint, parts = diagnosis.khat.iloc[:1], diagnosis.khat.iloc[1:]
    high = pd.concat(
        [table[~table["reliable"].astype(bool) & table["khat"].notna()] for table in (parts, joint)]
    )
    if high.empty:
        return []
    if len(parts) and high.index.tolist() == [0]:
        return [
            f"Pareto k̂ of all latents together is {khat_text(joint['khat'].iloc[0])}, above its threshold of "
            f"{number(joint['threshold'].iloc[0], '.2f')}, though each part alone is fine: many small errors "
            "add up, or parts depend on each other, which the posterior leaves out."
        ]
    if len(parts):
        high = high[high.index > 0]
    named = ", ".join(f"{row['part']} ({khat_text(row['khat'])})" for row in high.to_dict("records"))
    return [
        f"Pareto k̂ is above its threshold of {number(joint['threshold'].iloc[0], '.2f')} for {named}: there the "
        "posterior is a rough approximation, and its spread is not to be taken at its word."
    ]


def decision(rule: Rule) -> str:
    """How a rule decides, in one sentence without its full stop.

    >>> from pyro_bmrs import Rule
    >>> decision(Rule(criterion="BMRS_N", prior_log_odds=0.0).at(-2.0))
    'Structures were removed where ΔF of BMRS_N plus the prior log-odds of 0 nats was at least -2'
    """
    if rule.threshold is None:
        return f"A {rule.criterion} decided about all structures together"
    odds = rule.prior_log_odds
    if odds is None:
        return (
            f"Structures were removed where the score of {rule.criterion} was at least {rule.threshold:.4g}"
        )
    return (
        f"Structures were removed where ΔF of {rule.criterion} plus the prior log-odds of {odds:.4g} nats was at least "
        f"{rule.threshold:.4g}"
    )


def methods(
    fit: Fit | None, plan: Plan, diagnosis: Diagnosis | None, settings: Mapping[str, Any] | None
) -> str:
    """A paragraph for a paper, of nothing but what was done."""
    known = {**(fit.settings if fit is not None else {}), **(settings or {})}
    table, widths = plan.table, plan.widths()
    rule = plan.rule
    history = fit.history if fit is not None else None
    first = (
        "Each structure (neuron, filter or head) carried a multiplicative latent scale θ; its posterior, of truncated "
        "log-normals, was fitted together with the weights by stochastic variational inference (pyro_bmrs on Pyro and "
        "PyTorch)"
    )
    if history is not None and len(history):
        first += f", for {int((history['phase'] == 'fit').sum())} epochs"
        first += f" of batches of {known['batch_size']}" if "batch_size" in known else ""
    first += f" with the KL divergence weighted by {rule.kl_weight:g}"
    first += f", seed {known['seed']}." if "seed" in known else "."
    text = [first]
    if rule.has_evidence and rule.kl_weight not in (0, 1):
        text.append(
            f"Changes in evidence are therefore those of the model with likelihood p(y|θ)^(1/{rule.kl_weight:g})."
        )
    decided = decision(rule)
    if rule.has_evidence:
        decided += " (Bayesian model reduction; Wright, Igel and Selvan, NeurIPS 2024)"
    decided += f"; every layer kept at least {rule.min_kept}" if rule.min_kept else ""
    decided += f", and channels a multiple of {rule.round_to}" if rule.round_to else ""
    text.append(f"{decided}.")
    in_fit = int(table["removed_in_fit"].sum()) if "removed_in_fit" in table else 0
    if in_fit:
        text.append(f"{in_fit:,} of them were removed during the fit, after an epoch, by the same rule then.")
    text.append(
        f"Of {len(table):,} structures {int((~table['removed'].astype(bool)).sum()):,} were kept ("
        + ", ".join(f"{row.after} of {row.before} in {row.layer}" for row in widths.itertuples())
        + "); the others were cut out of the network, with θ = E[θ] folded into the weights that read what was kept."
    )
    tuned = 0 if history is None else int((history["phase"] == "fine-tune").sum())
    if tuned:
        text.append(f"The smaller network was then fine-tuned for {tuned} epochs by maximum likelihood.")
    if diagnosis is not None and diagnosis.quality is not None:
        text.append(
            f"Predictions were averaged over {diagnosis.facts.get('draws', 'some')} draws of the posterior, or made "
            "with E[θ]; expected calibration error is of the top label in 15 bins (Guo et al., 2017), the split of "
            "the predictive entropy that of Depeweg et al. (2018)."
        )
    if diagnosis is not None and diagnosis.khat is not None:
        text.append("The approximation was checked by Pareto k̂ (Yao et al., 2018; Vehtari et al., 2024).")
    return " ".join(text)


def markdown(value: object) -> str:
    """A text in Markdown, on one line, without meaning anything there."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", text)


def verdict(
    history: pd.DataFrame | None,
    plan: Plan,
    curve: pd.DataFrame | None,
    evaluation: pd.DataFrame | None,
    costs: pd.DataFrame | None = None,
) -> str:
    """Say in one sentence how much went and what is left of the accuracy."""
    removed = (
        f"{percent(plan.table['removed'].astype(bool).mean())} of {len(plan.table):,} structures removed"
    )
    if costs is not None and "parameters" in costs.index:
        before = finite(costs["before"]["parameters"])
        after = finite(costs["after"]["parameters"])
        if before and after is not None:
            removed = f"{percent(1 - after / before)} of {before:,.0f} parameters removed"

    stops = None if curve is None else curve[curve["is_plan"].astype(bool)]
    if evaluation is not None and len(evaluation):
        splits = evaluation["split"].astype(str)
        split = "test" if (splits == "test").any() else splits.iloc[-1]
        rows = rows_of(evaluation[splits == split], EVALUATION_COLUMNS)
        rows = [row for row in rows if finite(row["accuracy"]) is not None]
        if rows:
            first, last = rows[0], rows[-1]
            accuracy = f"{split} accuracy {percent(last['accuracy'], 2)} ({last['network']})"
            if len(rows) > 1:
                accuracy += f", from {percent(first['accuracy'], 2)} ({first['network']})"
            return f"{removed}; {accuracy}."
    if history is not None:
        measured = history["validation_accuracy"].dropna()
        if len(measured):
            return f"{removed}; validation accuracy {percent(measured.iloc[-1], 2)} after the last epoch."
    if stops is not None and len(stops) and finite(stops["accuracy"].iloc[0]) is not None:
        return f"{removed}; accuracy {percent(stops['accuracy'].iloc[0], 2)}."
    return f"{removed}."


def warnings_of(plan: Plan, widths: pd.DataFrame) -> list[str]:
    rule = plan.rule
    found = rule.cautions()
    table = plan.table
    removed = table["removed"].astype(bool)
    # of a search no threshold says what it wanted
    wanted = table["score"] >= (math.inf if rule.threshold is None else rule.threshold)
    for row in rows_of(widths, WIDTH_COLUMNS):
        held = int(((table["layer"] == row["layer"]) & ~removed & wanted).sum())
        if row["after"] == 1:
            found.append(
                f"Layer {row['layer']} is at its floor of 1 unit (of {row['before']:,})"
                + (
                    "; the score of its last structure is above the threshold; it stays only because of the floor."
                    if held
                    else "."
                )
            )
        elif held:
            found.append(
                f"Layer {row['layer']} keeps {held:,} of its {row['after']:,} structures only because of its floor or "
                "of rounding: their score is above the threshold."
            )
    if rule.threshold is not None:
        narrow = int((removed & ((table["score"] - rule.threshold).abs() <= NARROW)).sum())
        if narrow:
            found.append(
                f"{narrow:,} of {int(removed.sum()):,} removed structures have a score within {NARROW} of the "
                "threshold: a small change of the criterion or the seed would have kept them."
            )
    unknown = int((~np.isfinite(table["score"].to_numpy(dtype=float, na_value=np.nan))).sum())
    if unknown:
        found.append(f"{unknown:,} of {len(table):,} units: the score is not a finite number.")
    return found


def removal_warnings(evaluation: pd.DataFrame | None) -> list[str]:
    """What to say where the network that was cut predicts far worse than the one that was fitted.

    Each structure is judged alone, with the others as they are. Of hundreds of idle ones each can be done without
    and all of them not: noise that is independent averages out, so that together they carry what none has to.
    """
    if evaluation is None:
        return []
    rows = evaluation.drop_duplicates("network").set_index("network")
    before = next((name for name in ("full, E[θ]", "shrunk in the fit, E[θ]") if name in rows.index), None)
    if before is None or "reduced" not in rows.index:
        return []
    cost = rows["negative_log_likelihood"]["reduced"] - rows["negative_log_likelihood"][before]
    if not cost > COSTLY:
        return []
    accuracy = rows["accuracy"]
    return [
        f"Cutting out what was removed cost {number(cost, '.2f')} nats per example (test accuracy "
        f"{percent(accuracy[before])} → {percent(accuracy['reduced'])}): units that are idle one by one carried "
        'something together. Remove after each epoch (removal "epoch"), so that the fit can answer, or lower the '
        "KL weight."
    ]


def rows_of(table: pd.DataFrame, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    chosen = [table[column].tolist() for column in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*chosen, strict=True)]
