"""The examination that leads to a diagnosis: the posterior's checks, and predictions before and after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.checks.arviz_io import loo, to_datatree
from pyro_bmrs.checks.data import DataOfModel, first_of
from pyro_bmrs.checks.draws import draw_posterior
from pyro_bmrs.checks.posterior import PosteriorChecks, check_posterior
from pyro_bmrs.evidence.importance import LEAST_DRAWS
from pyro_bmrs.inference.batches import Batches, Data, are_examples
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import check_module
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.scoring import Criterion, check_criterion
from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage
from pyro_bmrs.quality.curves import criterion_curves
from pyro_bmrs.quality.diagnosis import Diagnosis
from pyro_bmrs.quality.predictive import NoClassifierError, predictions
from pyro_bmrs.tables import MOST_CRITERIA

if TYPE_CHECKING:
    from pyro_bmrs.pruning import NetworkPlan

DRAWS = 200
# Examples that k̂ and the criteria's curves are made from: they pass through the network once for each draw, or point.
EXAMPLES = 500
CURVE_EXAMPLES = 5000


def diagnose(
    model: nn.Module,
    guide: Callable[..., Any],
    plan: NetworkPlan,
    train: Data,
    test: Data,
    *,
    validation: Data | None = None,
    fine_tuned: nn.Module | None = None,
    out_of_distribution: Mapping[str, Tensor] | None = None,
    criteria: Mapping[str, Criterion] | None = None,
    draws: int = DRAWS,
    examples: int | None = EXAMPLES,
    seed: int = 0,
    batch_size: int = 1000,
) -> Diagnosis:
    """Check the posterior, and compare predictions before and after the reduction.

    >>> diagnosis = bmrs.diagnose(model, guide, plan, train, test)  # doctest: +SKIP
    >>> bmrs.report(fit, plan, "report.html", diagnosis=diagnosis)  # doctest: +SKIP

    Args:
        model, guide: as they were reduced.
        plan: of `reduce`, with its network.
        train: that the posterior was fitted to: for k̂, the ELBO and leave-one-out.
        test: held out: for the predictions.
        validation: for the curves of the criteria; None: test.
        fine_tuned: the Pyro model round the small network, in its final state; None: there is none.
        out_of_distribution: inputs by the name of their data set, to be told from the test inputs by entropy.
        criteria: by name, whose curves to draw beside the plan's own; default the paper's. {} draws only the plan's.
        draws: S, of the posterior, at least 100.
        examples: of the training data that k̂ is made from, the first ones; None: all.
        seed: of the draws.
        batch_size: examples that the network sees at once.

    Returns:
        The tables. What can't be told, such as the accuracy of a regression, is None, and `notes` say why.

    Raises:
        TypeError, ValueError: for a bad argument, before anything is computed.
    """
    check(is_whole(draws, LEAST_DRAWS), "draws", f"an integer of at least {LEAST_DRAWS}", draws)
    check(is_whole(seed), "seed", "an integer of at least 0", seed)
    check(is_whole(batch_size, 1), "batch_size", "an integer of at least 1", batch_size)
    check(
        examples is None or is_whole(examples, 1), "examples", "an integer of at least 1, or None", examples
    )
    _check_programs(model, guide, plan, fine_tuned)
    _check_criteria(criteria)
    device, given = next(model.parameters()).device, {"train": train, "test": test}
    if validation is not None:
        given["validation"] = validation
    for name, data in given.items():
        known = isinstance(data, tuple | Dataset | DataLoader) or are_examples(data)
        check(known, name, "(x, y) tensors, a Dataset or a DataLoader", type(data), TypeError)
    sizes = {name: Batches(data, batch_size, device, name).size for name, data in given.items()}
    first = DataOfModel(model, first_of(test, batch_size), batch_size).first()
    _check_foreign(out_of_distribution, first[0])
    foreign = dict(out_of_distribution or {})
    looked_at = first_of(train, examples or sizes["train"])

    checks = check_posterior(
        model, guide, looked_at, draws=draws, seed=seed, kl_weight=plan.rule.kl_weight,
        dataset_size=sizes["train"], batch_size=batch_size,
    )  # fmt: skip
    tables = dict(khat=checks.khat, elbo=checks.elbo.reset_index(names="model"))
    notes = []
    if len(checks.contraction):
        tables["contraction"] = checks.contraction
    else:
        notes.append("k̂ by part and contraction: the guide does not show a posterior of each site")
    reason = _no_leave_one_out(checks)
    if reason is None:
        tree = to_datatree(model, guide, looked_at, draws, seed, batch_size=batch_size, constant_data=False)
        found = loo(tree)
        tables["loo"] = pd.DataFrame([dict(elpd_loo=float(found.elpd), standard_error=float(found.se))])
    else:
        notes.append(f"leave-one-out: {reason}")
    with untouched(model, guide, seed=seed):
        drawn = draw_posterior(guide, first, draws).values
    others = sorted(drawn[0].keys() - noise_layers(model).keys())
    if others:
        notes.append(
            f"predictions and curves: the model has latents beside its noise layers: {', '.join(others)}"
        )
    else:
        try:
            tables |= _predictive_tables(model, guide, plan, test, fine_tuned, drawn, foreign, batch_size)
        except NoClassifierError as error:
            notes.append(f"predictions: {error}")
        curve_data = first_of(test if validation is None else validation, CURVE_EXAMPLES)
        tables["curves"] = criterion_curves(model, guide, plan, curve_data, criteria, notes)
    facts = dict(
        draws=draws, seed=seed, examples=checks.examples, dataset_size=checks.dataset_size,
        kl_weight=checks.kl_weight, out_of_distribution=next(iter(foreign), None),
        curves_of="test" if validation is None else "validation",
    )  # fmt: skip
    return Diagnosis(**tables, facts=facts, notes=notes)


def _check_programs(model: object, guide: object, plan: object, fine_tuned: object) -> None:
    """Refuse what is of the wrong kind, and a plan of another model."""
    from pyro_bmrs.pruning import NetworkPlan

    check_module("model", model)
    check(callable(guide), "guide", "a Pyro guide", type(guide), TypeError)
    check(isinstance(plan, NetworkPlan), "plan", "a NetworkPlan", type(plan), TypeError)
    assert isinstance(model, nn.Module)
    assert isinstance(plan, NetworkPlan)
    known = isinstance(fine_tuned, nn.Module | None)
    check(known, "fine_tuned", "a Pyro model or None", type(fine_tuned), TypeError)
    if isinstance(fine_tuned, nn.Module) and not _takes_two(fine_tuned):
        raise ValueError(
            "fine_tuned must be a Pyro model of (x, y), such as Classifier(network): got "
            f"{type(fine_tuned).__name__}, which takes one argument"
        )
    widths = {site: layer.features for site, layer in noise_layers(model).items()}
    planned = {layer: len(plan.kept_mask(layer)) for layer in plan.layers}
    if planned != widths:
        raise ValueError(f"plan must be of the model's noise layers {widths}: got one of {planned}")
    try:
        plan.parameters_before()
    except ValueError as error:
        raise ValueError(f"plan must have its network, to count parameters: {error}") from None


def _check_criteria(criteria: object) -> None:
    check(isinstance(criteria, Mapping | None), "criteria", "a mapping from names", type(criteria), TypeError)
    given = criteria if isinstance(criteria, Mapping) else {}
    most = MOST_CRITERIA - 1  # of a figure, beside the plan's own
    check(len(given) <= most, "criteria", f"at most {most}", len(given))
    for name, criterion in given.items():
        check(isinstance(name, str), "criteria", "called by names that are text", name, TypeError)
        try:
            check_criterion(criterion)
        except TypeError as error:
            raise TypeError(f"criteria must hold criteria: {name!r} is none; {error}") from None


def _takes_two(module: nn.Module) -> bool:
    """Whether a module can be called with inputs and targets, as a Pyro model is and a network is not."""
    try:
        inspect.signature(module.forward).bind(None, None)
    except TypeError:
        return False
    return True


def _check_foreign(given: object, x: object) -> None:
    """Refuse out-of-distribution inputs that are not of the shape of the test inputs `x`, by one name."""
    name = "out_of_distribution"
    if given is None:
        return
    known = isinstance(given, Mapping)
    check(known, name, "a mapping from the name of a data set to inputs", type(given), TypeError)
    assert isinstance(given, Mapping)
    check(len(given) <= 1, name, "of one data set", list(given))
    for key, inputs in given.items():
        known = isinstance(key, str) and isinstance(inputs, Tensor)
        check(known, name, "a tensor by a name that is text", {key: type(inputs).__name__}, TypeError)
        check(key != "test", name, "called something other than the test examples", key)
        if not len(inputs) or (isinstance(x, Tensor) and inputs.shape[1:] != x.shape[1:]):
            raise ValueError(f"{name} must be inputs like those of test: got shape {tuple(inputs.shape)}")


def _no_leave_one_out(checks: PosteriorChecks) -> str | None:
    """Why the correction for the approximate posterior does not hold; None where it does."""
    joint = checks.khat.iloc[0]
    if checks.examples < checks.dataset_size:
        return "needs all training examples, and only some were looked at"
    if checks.kl_weight != 1:
        return "at another KL weight than 1 the draws are not of the model's own posterior"
    if not joint.reliable:
        return f"k̂ of all latents is {joint.khat:.2f}: the draws can't be reweighted to the exact posterior"
    return None


def _predictive_tables(
    model: nn.Module,
    guide: Callable[..., Any],
    plan: NetworkPlan,
    test: Data,
    fine_tuned: nn.Module | None,
    values: list[dict[str, Tensor]],
    foreign: Mapping[str, Tensor],
    batch_size: int,
) -> dict[str, pd.DataFrame]:
    """Quality, reliability, risk and entropy of the networks before and after.

    Args:
        values: draws of θ, by noise layer.

    Raises:
        NoClassifierError: for a model that is no classifier.
    """
    device = next(model.parameters()).device
    drawn = {
        name: torch.stack([draw[name] for draw in values]) * layer.kept
        for name, layer in noise_layers(model).items()
    }
    # the mean of draws only where the guide does not know its own
    full = (
        guide.mean()
        if isinstance(guide, AutoTruncatedLogNormal)
        else {n: d.mean(0) for n, d in drawn.items()}
    )
    reduced = {name: draws * plan.kept_mask(name).to(device) for name, draws in drawn.items()}
    means = {name: mean.to(device).float() for name, mean in plan.theta_mean().items()}
    # of a network that shrank while it was fitted, the full one was never fitted to its end
    before = "full" if plan.table.present.all() else "shrunk in the fit"
    variants: list[tuple[str, str, nn.Module, Mapping[str, Tensor]]] = [
        (before, "draws", model, drawn),
        (before, "E[θ]", model, full),
        ("reduced", "draws", model, reduced),
        ("reduced", "E[θ]", model, means),
    ]
    if fine_tuned is not None:
        variants.append(("fine-tuned", "E[θ]", fine_tuned, {}))
    rows, bins, coverages, entropies = [], [], [], []
    for network, prediction, program, theta in variants:
        seen = {"test": predictions(program, test, theta, batch_size=batch_size)}
        for name, inputs in foreign.items():
            unlabelled = inputs, torch.full((len(inputs),), -1)
            seen[name] = predictions(program, unlabelled, theta, batch_size=batch_size)
        inside, *outside = seen.values()
        names = dict(network=network, prediction=prediction)
        rows.append({**names, **quality(inside, *outside)})
        bins.append(reliability(inside).assign(**names))
        coverages.append(risk_coverage(inside).assign(**names))
        if (network, prediction) == ("reduced", "draws"):
            entropies = [
                pd.DataFrame({"data": name, "entropy": found.entropy}) for name, found in seen.items()
            ]
    return {
        "quality": pd.DataFrame(rows),
        "reliability": pd.concat(bins, ignore_index=True),
        "risk_coverage": pd.concat(coverages, ignore_index=True),
        "entropy": pd.concat(entropies, ignore_index=True),
    }
