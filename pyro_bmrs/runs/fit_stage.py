"""The first stage of a run: the fit, after a check that its network can be made smaller."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil

import torch

from pyro_bmrs.files import write_atomically, write_table
from pyro_bmrs.fitting import Fit, fit
from pyro_bmrs.fitting.defaults import SETTLED
from pyro_bmrs.fitting.posterior_file import save_posterior
from pyro_bmrs.networks.inputs import check_finite
from pyro_bmrs.networks.insertion import insert_noise
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.pruning.binding import check_examples
from pyro_bmrs.runs.folder import REMOVAL_COLUMNS, STAGES
from pyro_bmrs.runs.recipe import blamed
from pyro_bmrs.runs.weights import load_into
from pyro_bmrs.runs.workplace import Interrupted, Workplace


def fit_posterior(run: Workplace) -> Fit:
    """Fit the posterior and write it. The folder keeps what it holds until the fit is done."""
    settings = run.settings.of_fit()  # before a file of weights may change
    if run.settings.weights is not None:
        load_into(run.network, run.settings.weights)
    _check_recipe(run)
    checkpoints = run.folder / "checkpoints" / "fit"
    result = fit(
        run.model, run.guide, run.dataset.train, run.dataset.validation, run.settings,
        checkpoints=checkpoints, overwrite=run.overwrite, label=_name(run),
        device=run.device, logger=run.logger_of("fit"), progress=run.progress,
    )  # fmt: skip
    if result.interrupted:
        raise Interrupted(f"interrupted in {_where(run, result)}; the same command goes on from there")
    run.fitted_with = settings
    found = {name: getattr(result.settings, name) for name in SETTLED}
    run.settled = {name: value for name, value in found.items() if value != getattr(run.settings, name)}
    # The posterior marks a folder that holds a fit: it is removed first and written last.
    run.clear("posterior.safetensors")
    run.clear_reduction()
    run.write_settings()
    copied = run.folder / "recipe.py"
    if run.recipe.path.resolve() != copied.resolve():
        write_atomically(copied, lambda beside: shutil.copyfile(run.recipe.path, beside))
    write_table(run.folder / "history.csv", result.history)
    run.clear(STAGES)
    if len(result.stages):
        write_table(run.folder / STAGES, result.stages)
    write_table(run.folder / "removals.csv", result.removals.assign(phase="fit")[REMOVAL_COLUMNS])
    save_posterior(run.folder / "posterior.safetensors", run.model, run.guide)
    if run.settings.weights is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # the sums are in the posterior
    run.show_examples()
    run.overwrite = False
    return result


def _where(run: Workplace, result: Fit) -> str:
    return f"epoch {len(result.history) + 1}" if run.settings.weights is None else "the pass over the data"


def _check_recipe(run: Workplace) -> None:
    """Call the model once and shrink its network once, so that a bad recipe is refused before the fit."""
    recipe, example = f"recipe {run.recipe.path}", run.example()
    check_finite(f"{recipe}: network", run.network)
    with blamed(f"{recipe}: its model"):
        run.traced(copy.deepcopy(run.model)).compute_log_prob()
    if run.settings.weights is not None:
        with blamed(f"{recipe}: finding structures of its network"):
            insert_noise(run.network, example)
        return
    layers = noise_layers(run.network)
    if not layers:
        raise ValueError(f"{recipe}: network must have MultiplicativeNoise layers")
    kept, halves = {}, {}
    for site, layer in layers.items():
        kept[site] = torch.arange(layer.features) < max(1, layer.features - 1)
        halves[site] = torch.full((layer.features,), 0.5, dtype=torch.float64)
    with blamed(f"{recipe}: removing structures of its network"):
        remove_structures(run.network, kept, halves, example[: check_examples(run.network, example)])


def _name(run: Workplace) -> str:
    """A text that differs for each recipe and each settings of a fit, including those that `fit` does not see."""
    content = run.recipe.path.read_bytes() + json.dumps(run.settings.of_fit()).encode()
    return hashlib.sha256(content).hexdigest()
