"""All that a report shows beside the plan: the posterior's checks, and predictions before and after."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pyro_bmrs.checks.arviz_io import loo, to_datatree
from pyro_bmrs.checks.draws import check_whole, draw_posterior
from pyro_bmrs.checks.posterior import check_posterior
from pyro_bmrs.evidence.importance import LEAST_DRAWS
from pyro_bmrs.files import (
    NewerFileError,
    check_folder,
    read_table,
    read_text,
    refuse_newer,
    write_atomically,
    write_table,
)
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.criteria import BMRS_N, BMRS_U, SNR, ExpectedScale, Random, WeightNorm, text_of
from pyro_bmrs.pruning.reduce import NonFiniteScoreError, reduce_structures
from pyro_bmrs.pruning.scoring import Criterion, check_criterion
from pyro_bmrs.quality.calibration import Predictions, predictions, quality, reliability, risk_coverage
from pyro_bmrs.quality.curve import compression_curve
from pyro_bmrs.quality.what_if import what_if
from pyro_bmrs.tables import (
    CRITERIA_COLUMNS,
    ENTROPY_COLUMNS,
    MOST_CRITERIA,
    RELIABILITY_COLUMNS,
    RISK_COLUMNS,
    require_columns,
)

if TYPE_CHECKING:
    from pyro_bmrs.pruning import NetworkPlan

FORMAT, VERSION = "pyro_bmrs.diagnosis", 1

DRAWS = 200
# Examples that k̂ and the criteria's curves are made from: they pass through the network once for each draw, or point.
EXAMPLES = 500
CURVE_EXAMPLES = 5000

CRITERIA: dict[str, Criterion] = {
    "BMRS_N": BMRS_N(),
    "BMRS_U-8": BMRS_U(bits=8),
    "BMRS_U-4": BMRS_U(bits=4),
    "SNR": SNR(),
    "E[θ]": ExpectedScale(),
    "weight norm": WeightNorm(),
    "random": Random(),
}


@dataclass
class Diagnosis:
    """What was believed and what was lost, as tables; None where it could not be told, and `notes` say why.

    Attributes:
        khat, elbo, contraction: as of `PosteriorChecks`.
        loo: elpd_loo and its standard_error, in nats, corrected for the approximate posterior.
        quality: a row per network ("full" or "shrunk in the fit", "reduced", "fine-tuned") and
            prediction ("draws" of the posterior, or
            "E[θ]"): examples, accuracy, negative_log_likelihood, brier, expected_calibration_error, entropy with its
            aleatoric and epistemic parts (nats), out_of_distribution_auroc, area_under_risk_coverage.
        reliability, risk_coverage: as the functions of that name, with network and prediction.
        entropy: of the reduced network's predictive, by draws: a row per example, data ("test" or the name of the
            out-of-distribution data) and entropy in nats.
        curves: of each criterion on the same posterior, as `compression_curve` with a column criterion.
        what_if: as the function of that name.
        facts: draws, seed, examples and dataset_size of the checks, kl_weight, name of the out-of-distribution data.
        notes: what was left out, and why.
    """

    khat: pd.DataFrame | None = None
    elbo: pd.DataFrame | None = None
    contraction: pd.DataFrame | None = None
    loo: pd.DataFrame | None = None
    quality: pd.DataFrame | None = None
    reliability: pd.DataFrame | None = None
    risk_coverage: pd.DataFrame | None = None
    entropy: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    what_if: pd.DataFrame | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those that are there, by name."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: table for name, table in found.items() if isinstance(table, pd.DataFrame)}

    def save(self, folder: Path | str) -> Path:
        """Write a CSV per table, and diagnosis.json last; returns the folder."""
        folder = Path(folder)
        check_folder("folder", folder)
        document = dict(
            format=FORMAT, version=VERSION, tables=list(self.tables()), facts=self.facts, notes=self.notes
        )
        (folder / "diagnosis.json").unlink(missing_ok=True)
        for name, table in self.tables().items():
            write_table(folder / f"{name}.csv", table)
        write_atomically(
            folder / "diagnosis.json", lambda beside: beside.write_text(json.dumps(document, indent=1))
        )
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Diagnosis:
        """Read what `save` wrote.

        Raises:
            ValueError: if the folder holds no diagnosis, a damaged one, or one of a newer version.
        """
        path = Path(folder) / "diagnosis.json"
        try:
            document = json.loads(read_text(path))
            if not isinstance(document, dict):
                raise ValueError("it holds no dictionary")
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            refuse_newer(path, "diagnosis", document["version"], VERSION)
            if not set(document["tables"]) <= set(_COLUMNS):
                raise ValueError(f"its tables are {document['tables']}")
            if not set(FACTS) - {"curves_of"} <= set(document["facts"]):  # a later fact
                raise ValueError(f"its facts are {document['facts']}")
            tables = {name: read_table(path.parent / f"{name}.csv", _TEXT) for name in document["tables"]}
            for name, table in tables.items():
                require_columns(f"{name}.csv", table, _COLUMNS[name])
            return cls(**tables, facts=dict(document["facts"]), notes=list(document["notes"]))
        except NewerFileError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"folder must hold a diagnosis: {path} is none, or damaged ({error}); that of a run is made anew by "
                "pyro-bmrs report RUN --draws"
            ) from None


_TEXT = ("site", "part", "model", "network", "prediction", "data", "criterion")
# What readers look for in each table, and among the facts.
_COLUMNS = {
    "khat": ("part", "latents", "khat", "threshold", "reliable"),
    "elbo": ("model", "elbo", "standard_error"),
    "contraction": ("site", "unit", "contraction"),
    "loo": ("elpd_loo", "standard_error"),
    "quality": (
        "network", "prediction", "examples", "accuracy", "negative_log_likelihood", "brier",
        "expected_calibration_error", "entropy", "aleatoric", "epistemic", "out_of_distribution_auroc",
        "area_under_risk_coverage",
    ),
    "reliability": RELIABILITY_COLUMNS,
    "risk_coverage": RISK_COLUMNS,
    "entropy": ENTROPY_COLUMNS,
    "curves": CRITERIA_COLUMNS,
    "what_if": ("score_threshold", "prior_log_odds", "structures", "parameters"),
}  # fmt: skip
FACTS = (
    "draws", "seed", "examples", "dataset_size", "kl_weight", "out_of_distribution", "curves_of",
)  # fmt: skip


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
    check_whole("draws", draws, LEAST_DRAWS)
    check_whole("seed", seed, 0)
    check_whole("batch_size", batch_size, 1)
    if examples is not None:
        check_whole("examples", examples, 1)
    _check_programs(model, guide, plan, fine_tuned, criteria)
    device = next(model.parameters()).device
    size = _batches("train", train, batch_size, device).size
    if validation is not None:
        _batches("validation", validation, batch_size, device)
    foreign = _foreign(out_of_distribution, _batches("test", test, batch_size, device))
    looked_at = first_of(train, examples or size)
    checks = check_posterior(
        model, guide, looked_at, draws=draws, seed=seed, kl_weight=plan.rule.kl_weight,
        dataset_size=size, batch_size=batch_size,
    )  # fmt: skip
    found = Diagnosis(
        facts=dict(
            draws=draws, seed=seed, examples=checks.examples, dataset_size=size, kl_weight=plan.rule.kl_weight,
            out_of_distribution=next(iter(foreign), None),
            curves_of="test" if validation is None else "validation",
        )
    )  # fmt: skip
    found.khat, found.contraction = checks.khat, checks.contraction
    found.elbo = checks.elbo.reset_index(names="model")
    if not len(found.contraction):
        found.contraction = None
        found.notes.append("k̂ by part and contraction: the guide does not show a posterior of each site")
    _leave_one_out(found, model, guide, looked_at, batch_size)
    if plan.rule.threshold is None:
        found.notes.append("what if: a search decided about all structures together, without a threshold")
    else:
        found.what_if = what_if(plan)
    if _predict(found, model, guide, plan, test, fine_tuned, foreign, batch_size):
        curve_data = first_of(test if validation is None else validation, CURVE_EXAMPLES)
        found.curves = criterion_curves(model, guide, plan, curve_data, criteria, found.notes)
    return found


def _check_programs(
    model: object,
    guide: object,
    plan: object,
    fine_tuned: object,
    criteria: object,
) -> None:
    """Refuse what is of the wrong kind, and a plan of another model."""
    from pyro_bmrs.pruning import NetworkPlan

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    if not callable(guide):
        raise TypeError(f"guide must be a Pyro guide: got {type(guide).__name__}")
    if not isinstance(plan, NetworkPlan):
        raise TypeError(f"plan must be a NetworkPlan: got {type(plan).__name__}")
    if not isinstance(fine_tuned, nn.Module | None):
        raise TypeError(f"fine_tuned must be a Pyro model or None: got {type(fine_tuned).__name__}")
    if fine_tuned is not None and not _takes_two(fine_tuned):
        raise ValueError(
            "fine_tuned must be a Pyro model of (x, y), such as Classifier(network): got "
            f"{type(fine_tuned).__name__}, which takes one argument"
        )
    if not isinstance(criteria, Mapping | None):
        raise TypeError(f"criteria must be a mapping from names: got {type(criteria).__name__}")
    most = MOST_CRITERIA - 1  # of a figure, beside the plan's own
    if len(criteria or {}) > most:
        raise ValueError(f"criteria must be at most {most}: got {len(criteria or {})}")
    for name, criterion in (criteria or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"criteria must have names that are text: got {name!r}")
        try:
            check_criterion(criterion)
        except TypeError as error:
            raise TypeError(f"criteria must hold criteria: {name!r} is none; {error}") from None
    widths = {site: layer.features for site, layer in noise_layers(model).items()}
    planned = {layer: len(plan.kept_mask(layer)) for layer in plan.layers}
    if planned != widths:
        raise ValueError(f"plan must be of the model's noise layers {widths}: got one of {planned}")
    try:
        plan.parameters_before()
    except ValueError as error:
        raise ValueError(f"plan must have its network, to count parameters: {error}") from None


def _takes_two(module: nn.Module) -> bool:
    """Whether a module can be called with inputs and targets, as a Pyro model is and a network is not."""
    try:
        inspect.signature(module.forward).bind(None, None)
    except TypeError:
        return False
    return True


def _batches(name: str, data: object, batch_size: int, device: torch.device) -> Batches:
    """The batches of data that are of a kind that has any."""
    if not isinstance(data, tuple | Dataset | DataLoader):
        raise TypeError(
            f"{name} must be (x, y) tensors, a Dataset or a DataLoader: got {type(data).__name__}"
        )
    return Batches(data, batch_size, device, name)


def _foreign(given: object, test: Batches) -> dict[str, Tensor]:
    """The out-of-distribution inputs by name, of the shape of the test inputs."""
    name = "out_of_distribution"
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must be a mapping from the name of a data set to inputs: got {type(given).__name__}"
        )
    if len(given) > 1:
        raise ValueError(f"{name} must be of one data set: got {list(given)}")
    for key, inputs in given.items():
        if not isinstance(key, str) or not isinstance(inputs, Tensor):
            raise TypeError(
                f"{name} must be a tensor by a name that is text: got {type(inputs).__name__} by {key!r}"
            )
        if key == "test":
            raise ValueError(f"{name} must have another name than the test examples: got {key!r}")
        x = _first(test)[0]
        if not len(inputs) or (isinstance(x, Tensor) and inputs.shape[1:] != x.shape[1:]):
            raise ValueError(f"{name} must be inputs like those of test: got shape {tuple(inputs.shape)}")
    return dict(given)


def _first(batches: Batches) -> tuple[Any, Any]:
    """The first batch; what a loader draws for it is drawn again."""
    with untouched():
        return batches.first()


def _leave_one_out(
    found: Diagnosis, model: nn.Module, guide: Callable[..., Any], train: Data, batch_size: int
) -> None:
    """Fill in `loo` where the correction for the approximate posterior holds."""
    assert found.khat is not None
    joint = found.khat.iloc[0]
    if found.facts["examples"] < found.facts["dataset_size"]:
        found.notes.append("leave-one-out: needs all training examples, and only some were looked at")
    elif found.facts["kl_weight"] != 1:
        found.notes.append(
            "leave-one-out: at another KL weight than 1 the draws are not of the model's own posterior"
        )
    elif not joint.reliable:
        found.notes.append(
            f"leave-one-out: k̂ of all latents is {joint.khat:.2f}: the draws can't be reweighted to the exact posterior"
        )
    else:
        tree = to_datatree(
            model,
            guide,
            train,
            found.facts["draws"],
            found.facts["seed"],
            batch_size=batch_size,
            constant_data=False,
        )
        estimate = loo(tree)
        found.loo = pd.DataFrame([dict(elpd_loo=float(estimate.elpd), standard_error=float(estimate.se))])


def _predict(
    found: Diagnosis,
    model: nn.Module,
    guide: Callable[..., Any],
    plan: NetworkPlan,
    test: Data,
    fine_tuned: nn.Module | None,
    foreign: Mapping[str, Tensor],
    batch_size: int,
) -> bool:
    """Fill in the tables of predictive quality; False where noise layers' θ alone make no prediction."""
    layers = noise_layers(model)
    with untouched(model, guide, seed=found.facts["seed"]):
        first = _first(Batches(test, batch_size, next(model.parameters()).device, "test"))
        values = draw_posterior(guide, first, found.facts["draws"]).values
    others = sorted(set(values[0]) - set(layers))
    if others:
        found.notes.append(
            f"predictions and curves: the model has latents beside its noise layers: {', '.join(others)}"
        )
        return False
    drawn = {name: torch.stack([draw[name] for draw in values]) * layers[name].kept for name in layers}
    means = {name: value.float() for name, value in plan.theta_mean().items()}
    full = {name: draws.mean(0) for name, draws in drawn.items()}
    if isinstance(guide, AutoTruncatedLogNormal):
        full = guide.mean()  # not of draws
    # of a network that shrank while it was fitted, the full one was never fitted to its end
    before = "full" if plan.table.present.all() else "shrunk in the fit"
    kept = {name: plan.kept_mask(name).to(draws.device) for name, draws in drawn.items()}
    device = next(model.parameters()).device
    variants: list[tuple[str, str, nn.Module, Mapping[str, Tensor]]] = [
        (before, "draws", model, drawn),
        (before, "E[θ]", model, full),
        ("reduced", "draws", model, {name: draws * kept[name] for name, draws in drawn.items()}),
        ("reduced", "E[θ]", model, {name: value.to(device) for name, value in means.items()}),
    ]
    if fine_tuned is not None:
        variants.append(("fine-tuned", "E[θ]", fine_tuned, {}))
    rows, bins, coverages, entropies = [], [], [], []
    for network, prediction, program, scales in variants:
        try:
            inside = predictions(program, test, scales, batch_size=batch_size)
        except TypeError as error:
            found.notes.append(f"predictions: {error}")
            return True
        outside = {
            name: predictions(program, _unlabelled(inputs), scales, batch_size=batch_size)
            for name, inputs in foreign.items()
        }
        names = dict(network=network, prediction=prediction)
        rows.append({**names, **quality(inside, next(iter(outside.values()), None))})
        bins.append(reliability(inside).assign(**names))
        coverages.append(risk_coverage(inside).assign(**names))
        if names == dict(network="reduced", prediction="draws"):
            entropies = [_entropies(name, seen) for name, seen in {"test": inside, **outside}.items()]
    found.quality = pd.DataFrame(rows)
    found.reliability = pd.concat(bins, ignore_index=True)
    found.risk_coverage = pd.concat(coverages, ignore_index=True)
    found.entropy = pd.concat(entropies, ignore_index=True)
    return True


def _unlabelled(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, torch.full((len(inputs),), -1)


def _entropies(name: str, seen: Predictions) -> pd.DataFrame:
    return pd.DataFrame({"data": name, "entropy": seen.entropy})


def criterion_curves(
    model: nn.Module,
    guide: Callable[..., Any],
    plan: NetworkPlan,
    data: Data,
    criteria: Mapping[str, Criterion] | None = None,
    notes: list[str] | None = None,
) -> pd.DataFrame:
    """Accuracy against parameters removed of several criteria on one posterior, without fine-tuning.

    Args:
        model, guide, plan: as of `diagnose`; the plan's own curve comes first, under the criterion's own name.
        data: of examples that were not used for the fit.
        criteria: by name; default the paper's.
        notes: takes a line for each criterion that can't score these structures.

    Returns:
        As `compression_curve`, with a column criterion. `is_plan` marks where each criterion stops by itself; random
        removal has no such point.
    """
    rule, own = plan.rule, plan.rule.criterion.partition(":")[0]
    curves = [compression_curve(model, plan, data).assign(criterion=f"{own} (this plan)")]
    # another guide than this one remembers no arguments to be called with
    remembers, device = isinstance(guide, AutoTruncatedLogNormal), next(model.parameters()).device
    arguments = () if remembers else _first(Batches(data, 1000, device, "data"))
    for name, criterion in (CRITERIA if criteria is None else criteria).items():
        odds = getattr(criterion, "prior_log_odds", None)
        if (text_of(criterion), odds, 0.0) == (rule.criterion, rule.prior_log_odds, rule.threshold):
            continue
        try:
            with untouched(model, guide, seed=0):
                other = reduce_structures(
                    model, guide, criterion, arguments, min_kept=rule.min_kept, round_to=rule.round_to
                )
        except (NonFiniteScoreError, ValueError) as error:
            if notes is not None:
                notes.append(f"curve of {name}: {error}")
            continue
        curve = compression_curve(model, other, data).assign(criterion=name)
        curves.append(curve.assign(is_plan=False) if isinstance(criterion, Random) else curve)
    return pd.concat(curves, ignore_index=True)


def first_of(data: Data, count: int) -> Dataset[Any] | DataLoader[Any]:
    """The first examples of data, as pairs; a loader as it is, which decides itself what it shows."""
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, tuple):
        data = TensorDataset(*data)
    return data if len(data) <= count else Subset(data, range(count))  # type: ignore[arg-type]
