"""What a report says in words: verdict, decision, warnings, methods."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_bmrs.numerals import finite, nats, number, percent, percent_with_error, plain_number, with_error

if TYPE_CHECKING:
    from pyro_bmrs.fitting import Fit
    from pyro_bmrs.pruning import Plan, Rule
    from pyro_bmrs.quality.diagnosis import Diagnosis

# Scores this close to the threshold (criterion's unit) were narrow decisions.
NARROW = 0.1
# Removing structures without evidence should cost little. More than this (nats per example) is worth a warning.
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


def posterior_warnings(khat: pd.DataFrame | None) -> list[str]:
    """Where Pareto k̂ says that the posterior is a rough approximation. `khat` is that of a `Diagnosis`."""
    if khat is None:
        return []
    joint, parts = khat.iloc[0], khat.iloc[1:]
    rough = khat[~khat["reliable"].astype(bool) & khat["khat"].notna()]
    if rough.empty:
        return []
    threshold = number(joint["threshold"], ".2f")
    if len(parts) and rough.index.tolist() == [0]:
        return [
            f"Pareto k̂ of all latents together is {khat_text(joint['khat'])}, above its threshold of {threshold}, "
            "though each part alone is fine: many small errors add up, or parts depend on each other, which the "
            "posterior leaves out."
        ]
    rough = rough[rough.index > 0] if len(parts) else rough
    named = ", ".join(f"{row['part']} ({khat_text(row['khat'])})" for row in rough.to_dict("records"))
    return [
        f"Pareto k̂ is above its threshold of {threshold} for {named}: there the posterior is a rough approximation, "
        "and its spread is not to be taken at its word."
    ]


def decision(rule: Rule) -> str:
    """How a rule decides, in one sentence without its full stop.

    >>> from pyro_bmrs import Rule
    >>> decision(Rule(criterion="BMRS_N", prior_log_odds=0.0).at(-2.0))
    'Structures were removed where ΔF of BMRS_N plus the prior log-odds of 0 nats was at least -2'
    """
    if rule.threshold is None and rule.budget:
        return (
            f"Structures were removed in the order of what they cost by {rule.criterion} for what they free, "
            f"{_budget(rule)}"
        )
    if rule.threshold is None:
        return f"A search decided about all structures together: {rule.criterion}"
    if rule.is_path:
        by = (
            "least predicted rise of the loss"
            if "_loss" in rule.criterion
            else "largest change of the evidence"
        )
        _, per, unit = rule.criterion.partition("_per_")
        each = f" for each {unit.replace('_', '-')} that they free" if per else ""
        asked = f", {_budget(rule)}" if rule.budget else ""
        return f"Structures were removed in the order of the {by}{each}, the first {max(-rule.threshold, 0):.0f}{asked}"
    odds = (
        "" if rule.prior_log_odds is None else f" plus the prior log-odds of {rule.prior_log_odds:.4g} nats"
    )
    what = f"ΔF of {rule.criterion}" if rule.has_evidence else f"the score of {rule.criterion}"
    return f"Structures were removed where {what}{odds} was at least {rule.threshold:.4g}"


# What a budget limits, in words that follow "at most".
_LIMITS = {
    "parameters": "{:,.0f} parameters", "macs": "{:,.0f} multiply-accumulates an example", "bytes": "{:,.0f} bytes",
    "milliseconds": "{:.4g} ms a pass", "accuracy_drop": "{:.4g} points of accuracy lost",
    "loss_rise": "{:.4g} nats an example lost",
}  # fmt: skip


def _budget(rule: Rule) -> str:
    return f"as asked for: {_limits(rule)}"


def _limits(rule: Rule) -> str:
    return "at most " + ", ".join(_LIMITS[name].format(value) for name, value in rule.budget.items())


def methods(
    fit: Fit | None,
    plan: Plan,
    diagnosis: Diagnosis,
    settings: Mapping[str, Any],
    evaluation: pd.DataFrame | None = None,
) -> str:
    """A paragraph for a paper, of nothing but what was done."""
    known = {**({} if fit is None else dict(fit.settings)), **settings}
    table, rule = plan.table, plan.rule
    epochs = {} if fit is None else fit.history["phase"].value_counts().to_dict()
    first = (
        "Each structure (neuron, filter or head) was multiplied by a latent θ; its posterior, a truncated log-normal, "
        "was fitted together with the weights by stochastic variational inference (pyro_bmrs on Pyro and PyTorch)"
    )
    if epochs:
        first += f", for {epochs.get('fit', 0)} epochs"
        first += f" of batches of {known['batch_size']}" if "batch_size" in known else ""
    if known.get("kl_weight") == "auto":
        first += (
            f" along rising weights of the KL divergence, of which the state at {rule.kl_weight:g} was taken by its "
            "loss on validation data"
        )
    else:
        first += f" with the KL divergence weighted by {rule.kl_weight:g}"
    first += f", seed {known['seed']}." if "seed" in known else "."
    if rule.is_path:
        first = (
            "The posterior of the weights of the trained network was a Laplace approximation with Kronecker-factored "
            "curvature (Ritter et al., 2018), with the prior's precision at the largest marginal likelihood (MacKay, "
            "1992) (pyro_bmrs on Pyro and PyTorch)."
        )
    text = [first]
    if rule.has_evidence and rule.kl_weight not in (0, 1):
        text.append(
            f"Changes in evidence are therefore those of the model with likelihood p(y|θ)^(1/{rule.kl_weight:g})."
        )
    decided = decision(rule)
    if rule.has_evidence:
        decided += " (Bayesian model reduction; Wright, Igel and Selvan, NeurIPS 2024)"
    decided += f"; every layer kept at least {rule.floor_text}" if rule.min_kept else ""
    decided += f", and channels a multiple of {rule.round_to}" if rule.round_to else ""
    text.append(f"{decided}.")
    in_fit = int(table["removed_in_fit"].sum()) if "removed_in_fit" in table else 0
    if in_fit:
        text.append(
            f"Before that, {in_fit:,} had been removed during the fit, by their scores after an epoch."
        )
    text.append(
        f"Of {len(table):,} structures {int((~table['removed'].astype(bool)).sum()):,} were kept ("
        + ", ".join(f"{row.after} of {row.before} in {row.layer}" for row in plan.widths().itertuples())
        + "); the others were cut out of the network, "
        + (
            "and the weights that stayed took over what they could (Hassibi and Stork, 1993)."
            if rule.is_path
            else "with θ = E[θ] folded into the weights that read what was kept."
        )
    )
    if evaluation is not None and (evaluation["network"] == "refitted").any():
        text.append(
            "Then, layer by layer, the weights were fitted by ridge regression to what the full network has in their "
            "place, on the inputs that the smaller network gives them."
        )
    if "fine-tune" in epochs:
        text.append(
            f"The smaller network was then fine-tuned for {epochs['fine-tune']} epochs by maximum likelihood."
        )
    if diagnosis.quality is not None:
        draws = diagnosis.facts.get("predictive_draws", "some")
        text.append(
            f"Predictions were averaged over {draws} draws of the posterior, or made with E[θ]; expected calibration "
            "error is of the top label in 15 bins (Guo et al., 2017), the split of the predictive entropy that of "
            "Depeweg et al. (2018)."
        )
    if diagnosis.khat is not None:
        text.append("The approximation was checked by Pareto k̂ (Yao et al., 2018; Vehtari et al., 2024).")
    return " ".join(text)


def markdown(value: object) -> str:
    """A text in Markdown, on one line, without meaning anything there."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", text)


# Rows of an evaluation: the full network that was trained as long as the smaller one; what a fit has left.
BASELINE, SHRUNK = "full, trained as long", "shrunk in the fit, E[θ]"


def asked(rule: Rule) -> str:
    """What was asked for."""
    if rule.budget:
        return f"Asked for: {_limits(rule)}."
    by_evidence = rule.has_evidence and rule.threshold == 0
    return "No size was asked for: the evidence decided." if by_evidence else "No size was asked for."


def verdict(
    history: pd.DataFrame | None,
    plan: Plan,
    curve: pd.DataFrame | None,
    evaluation: pd.DataFrame | None,
    costs: pd.DataFrame | None = None,
) -> str:
    """Say in one sentence how much was removed, how good the rest is, and how the full network trained as long."""
    removed = (
        f"{percent(plan.table['removed'].astype(bool).mean())} of {len(plan.table):,} structures removed"
    )
    if costs is not None and "parameters" in costs.index:
        before, after = (finite(costs[column]["parameters"]) for column in ("before", "after"))
        if before and after is not None:
            removed = f"{percent(1 - after / before)} of {before:,.0f} parameters removed"

    measure, rows = _measured(evaluation)
    if rows:
        name = "accuracy" if measure == "accuracy" else "root mean square error"
        found = f"{removed}; {rows[-1]['split']} {name} {_shown(rows[-1], measure)} ({rows[-1]['network']})"
        baseline = next((row for row in rows if row["network"] == BASELINE), None)
        return found + (
            f", {_shown(baseline, measure)} of the full network trained as long." if baseline else "."
        )
    if evaluation is not None and evaluation["negative_log_likelihood"].notna().any():
        last = evaluation.iloc[-1]
        told = nats(last["negative_log_likelihood"], last.get("standard_error"))
        return f"{removed}; {last['split']} negative log-likelihood {told} nats ({last['network']})."
    if history is not None and history["validation_accuracy"].notna().any():
        measured = history["validation_accuracy"].dropna().iloc[-1]
        return f"{removed}; validation accuracy {percent(measured, 2)} after the last epoch."
    if curve is not None:
        own = curve.loc[curve["is_plan"].astype(bool), "accuracy"].dropna()
        if len(own):
            return f"{removed}; accuracy {percent(own.iloc[0], 2)}."
    return f"{removed}."


def recommendation(plan: Plan, evaluation: pd.DataFrame | None, left: int | None, command: str) -> str | None:
    """What to do now, in a sentence or two; None where nothing is known.

    Args:
        left: parameters of the network that came out; None: not known.
        command: makes the network of a size; "{}" stands for its parameters.
    """
    if not plan.table["removed"].any():
        half = "" if left is None else f", such as half of it by {command.format(left // 2)}"
        return f"Nothing was removed: ask for a size{half}"
    measure, rows = _measured(evaluation)
    if len(rows) < 2:
        return None
    last, before = rows[-1], rows[0]
    if before["network"] == SHRUNK or (last["network"] == "fine-tuned" and before["network"] != BASELINE):
        return "What it costs is not known: the full network was not trained as long. A run with --baseline tells."
    lost, errors = (
        last[measure] - before[measure],
        [finite(row.get(f"{measure}_error")) for row in (last, before)],
    )
    error = None if None in errors else math.hypot(*filter(None, errors))
    against = "the full network trained as long" if before["network"] == BASELINE else "the full network"
    if measure == "accuracy":
        lost = -lost
        points = percent_with_error(abs(lost), error).replace("%", "points")
        found = f"Against {against} it {'loses' if lost > 0 else 'gains'} {points}"
    else:
        change = "larger" if lost > 0 else "smaller"
        found = f"Against {against} its error is {change} by {_with_error(abs(lost), error)}"
    if error is not None and abs(lost) <= 2 * error:
        return f"{found}, which is within the error: use it."
    if lost <= 0:
        return f"{found}: use it."
    if before["network"] == BASELINE:
        return f"{found}. If that is too much, take a larger one."
    return f"{found}: train it for some epochs, with --fine-tune."


def _measured(evaluation: pd.DataFrame | None) -> tuple[str, list[dict[str, Any]]]:
    """The rows of an evaluation with an accuracy, or else an rmse, of its test examples where it has any; and which."""
    if evaluation is None or evaluation.empty:
        return "accuracy", []
    splits = evaluation["split"].astype(str)
    split = "test" if (splits == "test").any() else splits.iloc[-1]
    regression = "rmse" in evaluation and not evaluation["accuracy"].notna().any()
    measure = "rmse" if regression else "accuracy"
    chosen = evaluation[(splits == split) & evaluation[measure].notna()]
    return measure, [{str(name): value for name, value in row.items()} for row in chosen.to_dict("records")]


def _shown(row: Mapping[str, Any], measure: str) -> str:
    shown = percent_with_error if measure == "accuracy" else _with_error
    return shown(row[measure], row.get(f"{measure}_error"))


def _with_error(value: float, error: float | None) -> str:
    return number(value) if not finite(error) else with_error(value, error)


def warnings_of(plan: Plan) -> list[str]:
    """What to keep in mind about a plan: its KL weight, floors, narrow decisions, unknown scores."""
    rule, table = plan.rule, plan.table
    found = plan.cautions()
    removed = table["removed"].astype(bool)
    # where a search decided, no threshold says what it wanted
    threshold = math.inf if rule.threshold is None else rule.threshold
    for row in plan.widths().itertuples():
        held = int(((table["layer"] == row.layer) & ~removed & (table["score"] >= threshold)).sum())
        if row.after == 1:
            only = "; its score is above the threshold, and only the floor keeps it" if held else ""
            found.append(f"Layer {row.layer} is left with 1 structure of {row.before:,}{only}.")
        elif held:
            found.append(
                f"Layer {row.layer} keeps {held:,} of its {row.after:,} structures only because of its floor or "
                "of rounding: their score is above the threshold."
            )
    if rule.is_path:  # its scores are places
        return found
    narrow = int((removed & ((table["score"] - threshold).abs() <= NARROW)).sum())
    if narrow:
        found.append(
            f"{narrow:,} of {int(removed.sum()):,} removed structures have a score within {NARROW} of the "
            "threshold: a small change of the criterion or the seed would have kept them."
        )
    unknown = int((~np.isfinite(table["score"].to_numpy(dtype=float, na_value=np.nan))).sum())
    if unknown:
        found.append(f"{unknown:,} of {len(table):,} structures have a score that is not a finite number.")
    return found


def removal_warnings(evaluation: pd.DataFrame | None) -> list[str]:
    """A warning where the network that was cut predicts far worse than the one that was fitted.

    Each structure is judged alone, with the others in place. A network may do without each of hundreds of idle
    structures, and not without all of them: independent noise averages out, so together they carry what none has to.
    """
    if evaluation is None:
        return []
    rows = evaluation.drop_duplicates("network").set_index("network")
    before = next((name for name in ("full, E[θ]", SHRUNK) if name in rows.index), None)
    if before is None or "reduced" not in rows.index:
        return []
    cost = rows["negative_log_likelihood"]["reduced"] - rows["negative_log_likelihood"][before]
    if not cost > COSTLY:
        return []
    measure, shown = (
        ("rmse", number) if "rmse" in rows and rows["rmse"].notna().any() else ("accuracy", percent)
    )
    both = f"{shown(rows[measure][before])} → {shown(rows[measure]['reduced'])}"
    return [
        f"Cutting out what was removed cost {number(cost, '.2f')} nats per example (test {measure} "
        f"{both}): structures that are idle one by one carried "
        'something together. Remove after each epoch (removal "epoch"), so that the fit can answer, or lower the '
        "KL weight."
    ]
