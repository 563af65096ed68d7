"""The examination that leads to a diagnosis: the posterior's checks, and predictions before and after."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_bmrs.arguments import check, whole_number
from pyro_bmrs.checks.arviz_io import loo, to_datatree
from pyro_bmrs.checks.data import DataOfModel, some_of, spread
from pyro_bmrs.checks.draws import draw_posterior
from pyro_bmrs.checks.posterior import PosteriorChecks, check_posterior
from pyro_bmrs.evidence.importance import LEAST_DRAWS
from pyro_bmrs.inference.batches import AT_ONCE, Batches, Data, are_examples
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.likelihoods import Regressor
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.cost import examples_for
from pyro_bmrs.networks.inputs import check_module
from pyro_bmrs.networks.noise import at_one, noise_layers
from pyro_bmrs.progress import bar
from pyro_bmrs.pruning.scoring import Criterion, check_criterion
from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage
from pyro_bmrs.quality.curves import COMPARED, criterion_curves
from pyro_bmrs.quality.diagnosis import PARTS, Diagnosis
from pyro_bmrs.quality.predictive import NoClassifierError, predictions
from pyro_bmrs.quality.regression import regression_quality
from pyro_bmrs.tables import MOST_CRITERIA

if TYPE_CHECKING:
    from pyro_bmrs.pruning import NetworkPlan

DRAWS = 100
# Of predictions: more draws make the mean of their probabilities hardly better, and more examples do.
PREDICTIVE_DRAWS = 20
# Multiply-accumulates of all passes of a part; and examples, at least and at most.
_WORK = 1.7e10
_OF_PREDICTIONS, _OF_CURVES, _OF_POSTERIOR = (400, 10_000), (200, 2_000), (100, 500)
# Of the passes that all parts of a report may take together.
_SHARE, _SHARE_OF_POSTERIOR = 1 / 6, 1 / 2
# Of a curve, as of `compression_curve`.
_POINTS = 8


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
    examples: int | None = None,
    seed: int = 0,
    batch_size: int = AT_ONCE,
    progress: bool = True,
) -> Diagnosis:
    """Check the posterior, and compare predictions before and after the reduction.

    >>> diagnosis = bmrs.diagnose(model, guide, plan, train, test)  # doctest: +SKIP
    >>> bmrs.report(fit, plan, "report.html", diagnosis=diagnosis)  # doctest: +SKIP

    Of large networks and data fewer examples are looked at, evenly spread: at least 400 for predictions, half as many
    out-of-distribution inputs, 200 for curves, 100 for k̂.

    Args:
        model, guide: as they were reduced.
        plan: of `reduce`, with its network.
        train: that the posterior was fitted to: for k̂, the ELBO and leave-one-out.
        test: held out: for the predictions.
        validation: for the curves of the criteria; None: test.
        fine_tuned: the Pyro model round the small network, in its final state; None: there is none.
        out_of_distribution: inputs by the name of their data set, to be told from the test inputs by entropy.
        criteria: by name, whose curves to draw beside the plan's own; default the paper's. {} draws only the plan's.
        draws: S, of the posterior, at least 100. Predictions are from the first 20 of them.
        examples: of the training data that k̂ is made from; None: at most 500.
        seed: of the draws.
        batch_size: examples that the network sees at once.
        progress: show bars, on a terminal.

    Returns:
        The tables. What can't be told, such as the accuracy of a regression, is None, and `notes` say why.

    Raises:
        TypeError, ValueError: for a bad argument, before anything is computed.
    """
    examination = Examination(
        model, guide, plan, train, test, validation=validation, fine_tuned=fine_tuned,
        out_of_distribution=out_of_distribution, criteria=criteria, draws=draws, examples=examples, seed=seed,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    found = examination.begin()
    for part in PARTS:
        found = examination.add(found, part)
    return found


def affordable(
    plan: NetworkPlan, passes: int, bounds: tuple[int, int], seen: float = math.inf, share: float = _SHARE
) -> int:
    """How many examples can pass through a plan's network so often, in the time of a part of a report.

    An example takes a fit at least four times as long as one of these passes, which are of large batches and without a
    gradient (analysis/report_times.py). So a report of as many passes as the fit saw examples takes a quarter of its
    time.

    Args:
        bounds: examples at least and at most.
        seen: examples that the fit saw, over all its epochs.
        share: of the report's passes.
    """
    binding, (least, most) = plan._bound(), bounds
    most = max(least, int(min(most, share * seen / passes)))
    with untouched(binding.network), at_one(binding.network):
        return examples_for(binding.network, binding.example_input, _WORK / passes, least, most)


class Examination:
    """The parts of a diagnosis, which may be made in different processes. Arguments and errors as of `diagnose`.

    Args:
        seen: as of `affordable`.
    """

    def __init__(
        self,
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
        examples: int | None = None,
        seed: int = 0,
        batch_size: int = AT_ONCE,
        progress: bool = True,
        seen: float = math.inf,
    ) -> None:
        draws, seed = whole_number("draws", draws, LEAST_DRAWS), whole_number("seed", seed)
        batch_size = whole_number("batch_size", batch_size, 1)
        examples = None if examples is None else whole_number("examples", examples, 1)
        _check_programs(model, guide, plan, fine_tuned)
        _check_criteria(criteria)
        device, given = next(model.parameters()).device, {"train": train, "test": test}
        if validation is not None:
            given["validation"] = validation
        for name, data in given.items():
            known = isinstance(data, tuple | Dataset | DataLoader) or are_examples(data)
            check(known, name, "(x, y) tensors, a Dataset or a DataLoader", type(data), TypeError)
        sizes = {name: Batches(data, batch_size, device, name).size for name, data in given.items()}
        self._first = DataOfModel(model, some_of(test, batch_size), batch_size).first()
        _check_foreign(out_of_distribution, self._first[0])
        self.model, self.guide, self.plan, self.fine_tuned = model, guide, plan, fine_tuned
        self.foreign, self.criteria = dict(out_of_distribution or {}), criteria
        self.draws, self.seed, self.batch_size, self.progress = draws, seed, batch_size, progress
        self.size, self.test, self.seen = sizes["train"], test, seen
        self.curve_data, self.curves_of = (test, "test") if validation is None else (validation, "validation")
        # together, and each layer alone
        passes = (1 + len(noise_layers(model))) * draws
        enough = examples or affordable(plan, passes, _OF_POSTERIOR, seen, _SHARE_OF_POSTERIOR)
        self.looked_at = some_of(train, enough)

    def begin(self) -> Diagnosis:
        """One that has no part yet."""
        facts = dict(
            draws=self.draws, seed=self.seed,
            examples=DataOfModel(self.model, self.looked_at, self.batch_size).size, dataset_size=self.size,
            kl_weight=self.plan.rule.kl_weight, out_of_distribution=next(iter(self.foreign), None),
            curves_of=self.curves_of, predictive_draws=min(self.draws, PREDICTIVE_DRAWS),
        )  # fmt: skip
        return Diagnosis(facts=facts)

    def add(self, found: Diagnosis, part: str) -> Diagnosis:
        """What was found so far, with another part."""
        notes = [*found.notes]
        make = {"predictions": self._predictions, "curves": self._curves, "posterior": self._posterior}[part]
        tables: dict[str, Any] = {**make(notes)}
        return replace(found, **tables, notes=notes, parts=(*found.parts, part))

    @cached_property
    def _values(self) -> list[dict[str, Tensor]]:
        """Draws of all latents, for predictions."""
        with untouched(self.model, self.guide, seed=self.seed):
            return draw_posterior(self.guide, self._first, min(self.draws, PREDICTIVE_DRAWS)).values

    @property
    def _others(self) -> list[str]:
        """Latents beside those of noise layers: predictions and curves would draw them from their prior."""
        return sorted(self._values[0].keys() - noise_layers(self.model).keys())

    def _predictions(self, notes: list[str]) -> dict[str, pd.DataFrame]:
        if self._others:
            notes.append(
                f"predictions and curves: the model has latents beside its noise layers: {', '.join(self._others)}"
            )
            return {}
        # before and after, by draws; and half as many foreign inputs
        passes = 2 * len(self._values) * (3 if self.foreign else 2) // 2
        enough = affordable(self.plan, passes, _OF_PREDICTIONS, self.seen)
        some = some_of(self.test, enough)
        foreign = {
            name: inputs[spread(len(inputs), (enough + 1) // 2)] for name, inputs in self.foreign.items()
        }
        variants = _variants(self.model, self.guide, self.plan, self.fine_tuned, self._values)
        try:
            if isinstance(self.model, Regressor):
                return _regression_table(variants, some, self.batch_size, self.progress)
            return _predictive_tables(variants, some, foreign, self.batch_size, self.progress)
        except NoClassifierError as error:
            notes.append(f"predictions: {error}")
            return {}

    def _curves(self, notes: list[str]) -> dict[str, pd.DataFrame]:
        if self._others:
            return {}
        criteria = COMPARED if self.criteria is None else self.criteria
        passes = (1 + len(criteria)) * (_POINTS + _POINTS // 3)
        data = some_of(self.curve_data, affordable(self.plan, passes, _OF_CURVES, self.seen))
        return {
            "curves": criterion_curves(
                self.model,
                self.guide,
                self.plan,
                data,
                criteria,
                notes,
                points=_POINTS,
                progress=self.progress,
            )
        }

    def _posterior(self, notes: list[str]) -> dict[str, pd.DataFrame]:
        checks = check_posterior(
            self.model, self.guide, self.looked_at, draws=self.draws, seed=self.seed,
            kl_weight=self.plan.rule.kl_weight, dataset_size=self.size, batch_size=self.batch_size,
        )  # fmt: skip
        tables = dict(khat=checks.khat, elbo=checks.elbo.reset_index(names="model"))
        if len(checks.contraction):
            tables["contraction"] = checks.contraction
        else:
            notes.append("k̂ by part and contraction: the guide does not show a posterior of each site")
        reason = _no_leave_one_out(checks)
        if reason is not None:
            notes.append(f"leave-one-out: {reason}")
            return tables
        tree = to_datatree(
            self.model, self.guide, self.looked_at, self.draws, self.seed, batch_size=self.batch_size,
            constant_data=False,
        )  # fmt: skip
        found = loo(tree)
        tables["loo"] = pd.DataFrame([dict(elpd_loo=float(found.elpd), standard_error=float(found.se))])
        return tables


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


# A network before or after, how it predicts, its Pyro model, and θ.
type Variant = tuple[str, str, nn.Module, Mapping[str, Tensor]]


def _variants(
    model: nn.Module,
    guide: Callable[..., Any],
    plan: NetworkPlan,
    fine_tuned: nn.Module | None,
    values: list[dict[str, Tensor]],
) -> list[Variant]:
    """The networks before and after, by draws and at E[θ].

    Args:
        values: draws of θ, by noise layer.
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
    found: list[Variant] = [
        (before, "draws", model, drawn), (before, "E[θ]", model, full),
        ("reduced", "draws", model, reduced), ("reduced", "E[θ]", model, means),
    ]  # fmt: skip
    return found if fine_tuned is None else [*found, ("fine-tuned", "E[θ]", fine_tuned, {})]


def _looked_at(variants: list[Variant], progress: bool) -> Iterator[Variant]:
    """The variants, one after the other, with a bar."""
    with bar("predictions", len(variants), shown=None if progress else False) as advance:
        for variant in variants:
            yield variant
            advance(1)


def _regression_table(
    variants: list[Variant], test: Data, batch_size: int, progress: bool
) -> dict[str, pd.DataFrame]:
    rows = [
        {
            "network": network,
            "prediction": prediction,
            **regression_quality(program, test, theta, batch_size=batch_size),
        }
        for network, prediction, program, theta in _looked_at(variants, progress)
        if isinstance(program, Regressor)
    ]
    return {"regression": pd.DataFrame(rows)}


def _predictive_tables(
    variants: list[Variant], test: Data, foreign: Mapping[str, Tensor], batch_size: int, progress: bool
) -> dict[str, pd.DataFrame]:
    """Quality, reliability, risk and entropy of the networks before and after.

    Raises:
        NoClassifierError: for a model that is no classifier.
    """
    rows, bins, coverages, entropies = [], [], [], []
    for network, prediction, program, theta in _looked_at(variants, progress):
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
