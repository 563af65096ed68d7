"""The second stage of a run: reduce, apply, fine-tune, evaluate, and write plan, tables and small network."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import Any

import pandas as pd
from torch import Tensor, nn

from pyro_bmrs.checks.data import some_of
from pyro_bmrs.files import read_tensors, write_table
from pyro_bmrs.fitting import fit
from pyro_bmrs.fitting.posterior_file import save_posterior
from pyro_bmrs.fitting.stages import Stages
from pyro_bmrs.inference import Regressor, evaluate, recalibrate
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import export_program, save_weights
from pyro_bmrs.networks.hooked_noise import without_noise
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.laplace_plan import LaplacePlan, reduce_by_laplace
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.reduce import reduce_structures
from pyro_bmrs.quality import predictions, quality, regression_quality, temperature, tempered
from pyro_bmrs.quality.predictive import NoClassifierError
from pyro_bmrs.reports.words import BASELINE, SHRUNK
from pyro_bmrs.runs.folder import REMOVAL_COLUMNS
from pyro_bmrs.runs.workplace import Interrupted, Workplace
from pyro_bmrs.tables import CALIBRATION_COLUMNS, REGRESSION_COLUMNS

# Examples that a temperature is fitted on, at most.
_CALIBRATED = 10_000


def reduce_network(run: Workplace) -> tuple[NetworkPlan, nn.Module]:
    """The plan and the small network, both also written to the folder."""
    settings, data = run.settings, run.dataset
    plan = _plan(run)
    small = plan.apply()
    rows, name = _full_network(run), "reduced"
    if isinstance(plan, LaplacePlan):
        rows.append(_row(run, name, small, run.model_of(small)))
        small, name = plan.apply(refit=data.train, progress=run.progress), "refitted"
    elif settings.recalibrate:
        recalibrate(small, data.train, batch_size=settings.batch_size, seed=settings.seed)
    costs = plan.costs(small)
    model = run.model_of(small)
    history = run.read_table("history.csv", "phase", "epoch")
    history = history[history.phase != "fine-tune"]
    removals = _removals(run, plan, len(history))
    rows.append(_row(run, name, small, model))
    tuning = run.folder / "checkpoints" / f"fine-tune-{_name(run)}"
    if settings.fine_tune:
        tuned = fit(
            model, None, data.train, data.validation, settings.of_fine_tuning(),
            checkpoints=tuning, logger=run.logger_of("fine-tune"), progress=run.progress,
        )  # fmt: skip
        if tuned.interrupted:
            raise Interrupted(
                f"interrupted in epoch {len(tuned.history) + 1} of the fine-tuning; the same command, without "
                "--overwrite, goes on from there"
            )
        kept = sum(map(len, plan.kept.values()))
        history = pd.concat([history, tuned.history.assign(kept=kept)], ignore_index=True)
        rows.append(_row(run, "fine-tuned", small, model))
    rows = [*_baseline(run), *rows]
    # Files of two reductions never stand side by side.
    run.clear_reduction()
    run.write_settings()
    posterior = run.folder / "posterior.safetensors"
    if read_tensors(posterior, header_only=True)[0]["kl_weight"] != run.guide.kl_weight:  # of another stage
        save_posterior(posterior, run.model, run.guide)
    write_table(run.folder / "history.csv", history)
    write_table(run.folder / "removals.csv", removals)
    write_table(run.folder / "evaluation.csv", pd.DataFrame(rows).assign(split="test"))
    write_table(run.folder / "costs.csv", costs.reset_index(names="cost"))
    write_table(run.folder / "structures.csv", plan.table)
    small.cpu()  # so that the program can be loaded where there is no accelerator
    save_weights(small, run.folder / "small.safetensors")
    export_program(small, data.test[:2][0], run.folder / "small.pt2", inputs=run.told(folded=False))
    plan.save(run.folder / "plan.json")
    shutil.rmtree(tuning, ignore_errors=True)
    return plan, small


def _plan(run: Workplace) -> NetworkPlan:
    """What the posterior and the settings say; of a fit with stages model and guide are put into the best of these."""
    settings, folder = run.settings, run.folder / "checkpoints" / "fit"
    known: Binding | None = None

    def reduced() -> NetworkPlan:
        nonlocal known
        plan = _reduced(run, known)
        known = plan._binding
        return plan

    if settings.weights is None:
        stages = Stages(run.model, run.guide, reduced, run.dataset.validation, folder)
        if len(stages):
            stages.measure_anew()
            if settings.budget:
                return stages.within(settings.budget, progress=run.progress)
            choice = stages.choice()
            if run.guide.kl_weight != stages.kl_weight(choice):  # as an earlier reduction has left it
                stages.restore(choice)
    plan = reduced()
    if not settings.budget:
        return plan
    return plan.within(run.dataset.validation, **settings.budget, progress=run.progress)


def _reduced(run: Workplace, known: Binding | None) -> NetworkPlan:
    settings, guide = run.settings, run.guide
    floors: dict[str, Any] = {"min_kept": settings.min_kept, "round_to": settings.round_to}
    if isinstance(guide, AutoKroneckerLaplace):
        return reduce_by_laplace(guide, **floors, progress=run.progress)
    plan = reduce_structures(run.model, guide, settings.made_criterion(), **floors, known=known)
    return run.bound(plan)


def _row(
    run: Workplace, name: str, network: nn.Module, model: nn.Module, theta: Any = None
) -> dict[str, Any]:
    """The evaluation of a network on the test examples, each measure with its standard error."""
    found = evaluate(model, run.dataset.test, theta)
    of_noise = {site: theta[site] for site in noise_layers(model)}  # in another guide θ is of weights
    if isinstance(model, Regressor):
        errors = regression_quality(model, run.dataset.test, of_noise)
        more = {name: errors[name] for name in REGRESSION_COLUMNS}
    else:
        more = _calibration(run, model, of_noise)
    spread = math.sqrt(found.accuracy * (1 - found.accuracy) / len(run.dataset.test))
    return {
        "network": name, "negative_log_likelihood": found.loss, "standard_error": found.standard_error,
        "accuracy": found.accuracy, "accuracy_error": spread, **more, "parameters": parameters(network),
    }  # fmt: skip


def _calibration(run: Workplace, model: nn.Module, theta: dict[str, Tensor]) -> dict[str, float]:
    """A temperature that is fitted on the validation examples, and what it does for the test examples."""
    parts = some_of(run.dataset.validation, _CALIBRATED), run.dataset.test
    try:
        held_out, seen = (predictions(model, part, theta) for part in parts)
    except NoClassifierError:
        return {}
    fitted = temperature(held_out)
    before, after = quality(seen), quality(tempered(seen, fitted))
    error = "expected_calibration_error"
    found = before[error], fitted, after[error], after["negative_log_likelihood"]
    return dict(zip(CALIBRATION_COLUMNS, found, strict=True))


def _full_network(run: Workplace) -> list[dict[str, Any]]:
    """Rows of the evaluation for the network before the reduction."""
    name = "full, E[θ]" if run.settings.weights is None else "full"
    if parameters(run.network) == run.parameters_before:
        return [_row(run, name, run.network, run.model, run.guide.mean())]
    # The fit removed structures, so the full network was never fitted to its end.
    return [
        {"network": "full", "parameters": run.parameters_before},
        _row(run, SHRUNK, run.network, run.model, run.guide.mean()),
    ]


def _baseline(run: Workplace) -> list[dict[str, Any]]:
    """A row for the full network without noise, trained as long as the smaller one, if it is asked for."""
    settings, data = run.settings, run.dataset
    if settings.weights is None:
        network, epochs = without_noise(run.original_network()), settings.epochs + settings.fine_tune
    else:
        network, epochs = without_noise(copied(run.network)), settings.fine_tune
    if not (settings.baseline and epochs):
        return []
    training = settings.of_fine_tuning(epochs)
    checkpoints, known = run.folder / "checkpoints", (run.fitted_with, training.model_dump(mode="json"))
    own = checkpoints / f"baseline-{_digest(run.recipe.path.read_bytes(), json.dumps(known).encode())}"
    model = run.recipe.model(network, run.preparation.targets).to(run.device)
    result = fit(
        model, None, data.train, data.validation, training, checkpoints=own, logger=run.logger_of("baseline"),
        progress=run.progress,
    )  # fmt: skip
    if result.interrupted:
        raise Interrupted(
            f"interrupted in epoch {len(result.history) + 1} of the baseline; the same command, without --overwrite, "
            "goes on from there"
        )
    for other in {*checkpoints.glob("baseline-*")} - {own}:
        shutil.rmtree(other)
    return [_row(run, BASELINE, network, model)]


def _digest(*contents: bytes) -> str:
    return hashlib.blake2b(b"".join(contents), digest_size=4).hexdigest()


def _name(run: Workplace) -> str:
    """A text that differs for each posterior and each way of reducing it."""
    posterior = (run.folder / "posterior.safetensors").read_bytes()
    return _digest(posterior, run.settings.model_dump_json().encode())


def _removals(run: Workplace, plan: NetworkPlan, epochs: int) -> pd.DataFrame:
    """A row per removed structure: first those that the fit removed, then those of this reduction."""
    of_fit = run.read_table("removals.csv", *REMOVAL_COLUMNS)
    of_fit = of_fit[of_fit.phase == "fit"]
    known = set(zip(of_fit.layer, of_fit.unit, strict=True))
    removed = plan.table[plan.table.removed].assign(phase="reduce", epoch=epochs)
    new = [pair not in known for pair in zip(removed.layer, removed.unit, strict=True)]
    removed = removed.loc[new, REMOVAL_COLUMNS]
    return removed if of_fit.empty else pd.concat([of_fit, removed], ignore_index=True)
