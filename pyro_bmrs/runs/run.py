"""A run: a recipe, data and settings in; a folder with everything that came out."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmrs import __version__
from pyro_bmrs.data import DataError, load_data
from pyro_bmrs.data.sources import is_at_hand
from pyro_bmrs.evidence.importance import LEAST_DRAWS
from pyro_bmrs.files import (
    NewerFileError,
    check_file,
    clear_unfinished,
    held,
    write_atomically,
    write_table,
)
from pyro_bmrs.fitting import Fit, fit
from pyro_bmrs.fitting.checkpoints import LEDGER_COLUMNS
from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior
from pyro_bmrs.inference import Classifier, evaluate, recalibrate
from pyro_bmrs.inference.predict import predict
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import export_onnx, export_program, save_weights
from pyro_bmrs.networks.inputs import check_finite
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.pruning.binding import check_examples
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.reduce import reduce_structures
from pyro_bmrs.quality import Diagnosis, compression_curve, diagnose
from pyro_bmrs.quality.examination import DRAWS
from pyro_bmrs.reports import report
from pyro_bmrs.runs.folder import DIAGNOSIS, FIT_FILES, FORMAT, REDUCE_FILES, REPORT_FILES, VERSION, RunFolder
from pyro_bmrs.runs.recipe import Recipe, blamed
from pyro_bmrs.runs.settings import RunSettings

LOGGERS = ("csv", "tensorboard")
# What is foreign to a data set, of the same form: to see whether a network knows that it does not know.
FOREIGN = {"digits": "patches", "mnist": "fashion-mnist", "fashion-mnist": "mnist"}
FOREIGN_EXAMPLES = 500


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run, saying what stands; what was finished before does."""


def _usable_device(name: str) -> torch.device:
    """The device called `name`; "auto": the accelerator where there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ValueError(f"device must be auto, or one that torch can use: got {name!r} ({error})") from error
    return device


def _versions() -> dict[str, str]:
    """Of what the figures of a run depend on."""
    packages = {"torch": "torch", "pyro": "pyro-ppl", "arviz": "arviz"}
    return {
        "pyro_bmrs": __version__,
        "python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
    }


def _asks_anew(found: Diagnosis | None, draws: int | None, foreign: str | None) -> bool:
    """Whether there is another diagnosis than is asked for, or none where one is."""
    facts = {} if found is None else found.facts
    asked = {"draws": draws or None, "out_of_distribution": foreign}
    return any(value not in (None, facts.get(name)) for name, value in asked.items())


def _alone[**Arguments, Result](
    stage: Callable[Concatenate[Run, Arguments], Result],
) -> Callable[Concatenate[Run, Arguments], Result]:
    """A stage of a run during which no other process works in its folder; stages call one another."""

    @wraps(stage)
    def alone(run: Run, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if run.is_held:
            return stage(run, *arguments, **options)
        with held("out", run.folder):
            run.is_held = True
            try:
                return stage(run, *arguments, **options)
            finally:
                run.is_held = False

    return alone


class Run(RunFolder):
    """One run folder and what is in it.

    Args:
        folder: where the files are, or will be.
        recipe: the recipe; default the copy that the folder holds.
        settings: default those that the folder holds.
        changes: to the settings that the folder holds, by name.
        data_root: where the data sets are.
        device: where to compute: "auto" is the accelerator where there is one.
        logger: "csv" or "tensorboard": also write the history, while it grows, to logs/ in the folder.
        progress: show progress.
        overwrite: whether a fit with other settings or another recipe in the folder may be replaced.

    Raises:
        ValueError: if the folder holds a fit with other settings or another recipe, or no run where one is
            needed, or was written by a newer version; if recipe, data or device can't be used.
    """

    def __init__(
        self,
        folder: Path | str,
        recipe: Recipe | None = None,
        settings: RunSettings | None = None,
        *,
        changes: Mapping[str, Any] | None = None,
        data_root: Path | str | None = None,
        device: str = "auto",
        logger: str | None = None,
        progress: bool = True,
        overwrite: bool = False,
    ) -> None:
        super().__init__(folder)
        self.progress, self.overwrite, self.is_held = progress, overwrite, False
        if logger not in (None, *LOGGERS):
            raise ValueError(f"logger must be one of {LOGGERS} or None: got {logger!r}")
        if logger == "tensorboard" and not find_spec("tensorboard"):
            raise ValueError("logger tensorboard needs the package: pip install pyro-bmrs[tensorboard]")
        self.logger, self.data_root = logger, data_root
        self._foreign_inputs: dict[str, Tensor] = {}
        stored = None if overwrite else self.stored_settings()
        if recipe is None or settings is None:
            if stored is None:
                raise ValueError(f"run must be a folder with a settings.json: {self.folder} has none")
            recipe = recipe or Recipe.read(self.folder / "recipe.py", stored["recipe"])
            settings = settings or stored["settings"].changed(**(changes or {}))
        elif stored is not None and self.has("posterior.safetensors"):
            before, now = stored["fit"], settings.of_fit()
            changed = [
                f"{name} {before.get(name)!r} → {now.get(name)!r}"
                for name in dict.fromkeys([*now, *before])
                if before.get(name) != now.get(name)
            ]
            self._need("recipe.py")
            if recipe.path.read_bytes() != (self.folder / "recipe.py").read_bytes():
                changed.append("another recipe")
            if changed:
                raise ValueError(
                    f"out {self.folder} holds a fit with other settings ({'; '.join(changed)}): "
                    "choose another folder, or pass --overwrite"
                )
        self.recipe, self.settings = recipe, settings
        # what the folder's posterior was fitted with: a later reduction may have other settings
        self.fitted_with = settings.of_fit() if stored is None else stored["fit"]
        self.device = _usable_device(device)
        try:
            self.dataset = load_data(
                settings.data, data_root=data_root, image_size=settings.image_size, seed=settings.seed,
                limit=settings.limit, validation_fraction=settings.validation_fraction,
            )  # fmt: skip
        except DataError as error:
            raise ValueError(f"data {settings.data!r} can't be used: {error}") from error
        self.network = self._original_network().to(self.device)
        self.parameters_before = parameters(self.network)
        self.model = recipe.model(self.network).to(self.device)
        self.guide = recipe.guide(self.model)

    def _original_network(self) -> nn.Module:
        """The recipe's network as it was before the fit, of which nothing has been taken out."""
        return self.recipe.network(self.dataset, self.settings.network or {}, self.settings.seed)

    def _clear(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _clear_reduction(self) -> None:
        """What belongs to the reduction that the folder holds; the last file of a stage goes first."""
        shutil.rmtree(self.folder / DIAGNOSIS, ignore_errors=True)
        self._clear(*reversed(REPORT_FILES), *reversed(REDUCE_FILES))

    def _clear_unfinished(self) -> None:
        clear_unfinished(self.folder, {*FIT_FILES, *REDUCE_FILES, *REPORT_FILES}.__contains__)

    def _write_settings(self) -> None:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings.model_dump(mode="json"),
            "fit": self.fitted_with,
            "recipe": self.recipe.name,
            "versions": _versions(),
        }
        write_atomically(
            self.folder / "settings.json", lambda beside: beside.write_text(json.dumps(document, indent=1))
        )

    # the stages -------------------------------------------------------------------------------------

    @_alone
    def finish(self, *, draws: int | None = None, foreign: str | None = None) -> bool:
        """Do what is not done yet of all stages; returns whether there was anything. Arguments as of `report`."""
        self._check_diagnosis(draws, foreign)
        if self.complete() and not self.overwrite:
            if not _asks_anew(self._stored_diagnosis(draws), draws, foreign):
                return False
            self.load_posterior()
            self.report(draws=draws, foreign=foreign)
            return True
        self.fit()
        if not self.reduced():
            self.reduce()
        self.report(draws=draws, foreign=foreign)
        return True

    @_alone
    def fit(self) -> Fit | None:
        """Fit the posterior and write it, unless the folder has it. Returns the fit if one was made.

        With `overwrite` a fit is always made; the folder keeps what it holds until the new one is done.
        """
        if self.has("posterior.safetensors") and not self.overwrite:
            self.load_posterior()
            return None
        self._clear_unfinished()
        self._check_shrinkable()
        result = fit(
            self.model, self.guide, self.dataset.train, self.dataset.validation, self.settings,
            checkpoints=self.folder / "checkpoints" / "fit", overwrite=self.overwrite, label=self._fit_name(),
            device=self.device, logger=self._logger("fit"), progress=self.progress,
        )  # fmt: skip
        if result.interrupted:
            raise Interrupted(
                f"interrupted in epoch {len(result.history) + 1}; the same command goes on from there"
            )
        self.fitted_with = self.settings.of_fit()
        copied = self.folder / "recipe.py"
        # the posterior is what says that the folder holds a fit: it goes first and comes last
        self._clear("posterior.safetensors")
        self._clear_reduction()
        self._write_settings()
        if self.recipe.path.resolve() != copied.resolve():
            write_atomically(copied, lambda beside: shutil.copyfile(self.recipe.path, beside))
        write_table(self.folder / "history.csv", result.history)
        write_table(self.folder / "removals.csv", result.removals.assign(phase="fit")[_REMOVAL_COLUMNS])
        save_posterior(self.folder / "posterior.safetensors", self.model, self.guide)
        self.overwrite = False
        return result

    def _logger(self, stage: str) -> Any:
        """A TensorBoard or CSV logger of this stage, anew; None where none was asked for."""
        if self.logger is None:
            return None
        from lightning_fabric.loggers.csv_logs import CSVLogger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        logs = self.folder / "logs"
        shutil.rmtree(logs / stage, ignore_errors=True)
        if self.logger == "csv":
            return CSVLogger(logs, name=stage, version="", flush_logs_every_n_steps=1)
        return TensorBoardLogger(logs, name=stage, version="")

    def _check_shrinkable(self) -> None:
        """Call the model once and shrink its network once, so that a bad recipe is refused before the fit."""
        check_finite(f"recipe {self.recipe.path}: network", self.network)
        example = self._example()
        with blamed(f"recipe {self.recipe.path}: its model"):
            self._traced(copy.deepcopy(self.model)).compute_log_prob()
        layers = noise_layers(self.network)
        if not layers:
            raise ValueError(f"recipe {self.recipe.path}: network must have MultiplicativeNoise layers")
        kept, halves = {}, {}
        for site, layer in layers.items():
            kept[site] = torch.arange(layer.features) < max(1, layer.features - 1)
            halves[site] = torch.full((layer.features,), 0.5, dtype=torch.float64)
        with blamed(f"recipe {self.recipe.path}: removing structures of its network"):
            remove_structures(self.network, kept, halves, example[: check_examples(self.network, example)])

    def _traced(self, program: Callable[[Tensor, Tensor], Any]) -> poutine.Trace:
        """The trace of a model or a guide on a batch."""
        x, y = self.dataset.train[: self.settings.batch_size]
        with untouched(self.model):
            return poutine.trace(program).get_trace(x.to(self.device), y.to(self.device))

    def load_posterior(self) -> None:
        """Put the folder's posterior into model and guide."""
        self._need("posterior.safetensors")
        self._traced(self.guide)
        self.guide.to(self.device)
        load_posterior(self.folder / "posterior.safetensors", self.model, self.guide)

    @_alone
    def reduce(self) -> tuple[NetworkPlan, nn.Module]:
        """Reduce, apply, fine-tune, evaluate, and write plan, tables and the small network."""
        settings = self.settings
        self._clear_unfinished()
        plan = reduce_structures(
            self.model, self.guide, settings.made_criterion(),
            min_kept=settings.min_kept, round_to=settings.round_to,
        ).bound_to(self.network, self._example)  # fmt: skip
        small = plan.apply()
        costs = plan.costs(small)
        if settings.recalibrate:
            recalibrate(small, self.dataset.train, batch_size=settings.batch_size, seed=settings.seed)
        model = self._model_of(small)
        test = self.dataset.test
        tuning = self.folder / "checkpoints" / f"fine-tune-{self._reduction_name()}"
        fitted = evaluate(self.model, test, self.guide.mean())
        if parameters(self.network) == self.parameters_before:
            rows = [("full, E[θ]", *fitted, self.parameters_before)]
        else:  # the full network was never fitted to its end
            rows = [
                ("full", math.nan, math.nan, self.parameters_before),
                ("shrunk in the fit, E[θ]", *fitted, parameters(self.network)),
            ]
        rows.append(("reduced", *evaluate(model, test), parameters(small)))
        history = self.read_table("history.csv", "phase", "epoch")
        history = history[history.phase == "fit"]
        removals = self._removals(plan, len(history))
        if settings.fine_tune:
            tuned = fit(
                model, None, self.dataset.train, self.dataset.validation, settings.of_fine_tuning(),
                checkpoints=tuning, logger=self._logger("fine-tune"), progress=self.progress,
            )  # fmt: skip
            if tuned.interrupted:
                raise Interrupted(
                    f"interrupted in epoch {len(tuned.history) + 1} of the fine-tuning; the same command, without "
                    "--overwrite, goes on from there"
                )
            kept = sum(map(len, plan.kept.values()))
            history = pd.concat([history, tuned.history.assign(kept=kept)], ignore_index=True)
            rows.append(("fine-tuned", *evaluate(model, test), parameters(small)))
        columns = ["network", "negative_log_likelihood", "accuracy", "parameters"]
        # never files of two reductions side by side
        self._clear_reduction()
        self._write_settings()
        write_table(self.folder / "history.csv", history)
        write_table(self.folder / "removals.csv", removals)
        write_table(self.folder / "evaluation.csv", pd.DataFrame(rows, columns=columns).assign(split="test"))
        write_table(self.folder / "costs.csv", costs.reset_index(names="cost"))
        write_table(self.folder / "structures.csv", plan.table)
        small.cpu()  # so that the program can be loaded where there is no accelerator
        save_weights(small, self.folder / "small.safetensors")
        export_program(small, test[:2][0], self.folder / "small.pt2")
        plan.save(self.folder / "plan.json")
        shutil.rmtree(tuning, ignore_errors=True)
        return plan, small

    def _fit_name(self) -> str:
        """Other for each recipe and for all settings of a fit, those included that `fit` does not see."""
        content = self.recipe.path.read_bytes() + json.dumps(self.settings.of_fit()).encode()
        return hashlib.sha256(content).hexdigest()

    def _reduction_name(self) -> str:
        """Other for each posterior and each way of reducing it."""
        content = (self.folder / "posterior.safetensors").read_bytes()
        content += self.settings.model_dump_json().encode()
        return hashlib.blake2b(content, digest_size=4).hexdigest()

    def _model_of(self, small: nn.Module) -> nn.Module:
        """The Pyro model round the small network, with what the fit learned outside the network."""
        model = self.recipe.model(small)
        network = {id(tensor) for tensor in self.network.state_dict(keep_vars=True).values()}
        state = self.model.state_dict(keep_vars=True)
        model.load_state_dict({n: t for n, t in state.items() if id(t) not in network}, strict=False)
        return model.to(self.device)

    def _removals(self, plan: NetworkPlan, epochs: int) -> pd.DataFrame:
        """A row per removed structure: those of the fit as it noted them, then those of this reduction."""
        noted = self.read_table("removals.csv", *_REMOVAL_COLUMNS)
        noted = noted[noted.phase == "fit"]
        known = set(zip(noted.layer, noted.unit, strict=True))
        removed = plan.table[plan.table.removed].assign(phase="reduce", epoch=epochs)
        new = [pair not in known for pair in zip(removed.layer, removed.unit, strict=True)]
        removed = removed.loc[new, _REMOVAL_COLUMNS]
        return removed if noted.empty else pd.concat([noted, removed], ignore_index=True)

    @_alone
    def report(self, *, draws: int | None = None, foreign: str | None = None) -> Path:
        """Measure what the folder does not hold yet, and write report.html and report.md.

        Args:
            draws: of the posterior, for the diagnosis, at least 100; 0: leave it out; None: as the folder has it,
                or the default.
            foreign: name of the data set to be told from the test examples; None: as the folder has it, or one
                that is at hand.
        """
        self._need("plan.json")
        self._check_diagnosis(draws, foreign)
        self._clear_unfinished()
        history = self.read_table("history.csv", "phase", "epoch")
        removals = self.read_table("removals.csv", *_REMOVAL_COLUMNS)
        evaluation = self.read_table("evaluation.csv", "network", "parameters", "accuracy")
        plan = self.plan().bound_to(self.network, self._example)
        if self.has("curve.csv"):
            curve = self.read_table("curve.csv")
        else:
            curve = compression_curve(self.model, plan, self.dataset.validation)
            write_table(self.folder / "curve.csv", curve)
        epochs = int((history.phase == "fit").sum())
        return report(
            Fit(history, removals[removals.phase == "fit"], self.settings, best_epoch=epochs), plan,
            self.folder / "report.html", costs=self.read_table("costs.csv").set_index("cost"), curve=curve,
            evaluation=evaluation,
            diagnosis=None if draws == 0 else self._diagnosis(plan, draws, foreign),
            settings={"recipe": self.recipe.name, "data": str(self.dataset), **_versions()},
        )  # fmt: skip

    def _diagnosis(self, plan: NetworkPlan, draws: int | None, foreign: str | None) -> Diagnosis:
        """The folder's diagnosis, made anew where there is none, or another is asked for."""
        found = self._stored_diagnosis(draws)
        if found is not None:
            if not _asks_anew(found, draws, foreign):
                return found
            # what is not asked for stays as it is
            draws, foreign = draws or found.facts["draws"], foreign or found.facts["out_of_distribution"]
        # the small network may have been fine-tuned, or not
        tuned = self._model_of(self.small_network()) if self.settings.fine_tune else None
        data = self.dataset
        try:
            found = diagnose(
                self.model, self.guide, plan, data.train, data.test, validation=data.validation, fine_tuned=tuned,
                out_of_distribution=self._foreign(foreign), draws=draws or DRAWS, seed=self.settings.seed,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted in the diagnosis; fit and reduction stand, and the same command makes it anew"
            ) from None
        found.save(self.folder / DIAGNOSIS)
        return found

    def _stored_diagnosis(self, draws: int | None) -> Diagnosis | None:
        """The folder's diagnosis; a damaged one is no obstacle where `draws` asks for one anew."""
        try:
            return self.diagnosis()
        except NewerFileError:
            raise
        except ValueError:
            if not draws:
                raise
            return None

    def _check_diagnosis(self, draws: int | None, foreign: str | None) -> None:
        if draws is not None and draws != 0 and draws < LEAST_DRAWS:
            raise ValueError(f"draws must be at least {LEAST_DRAWS}, or 0 for no diagnosis: got {draws}")
        if foreign == self.settings.data:
            raise ValueError(f"foreign must be another data set than the run's own: got {foreign!r}")
        if foreign is not None:
            self._foreign(foreign)

    def _foreign(self, name: str | None) -> dict[str, Tensor]:
        """Inputs of another data set, by its name; none where none is known, or none is at hand."""
        asked = name or FOREIGN.get(self.settings.data)
        if asked is None or (name is None and not is_at_hand(asked, self.data_root)):
            return {}
        if asked not in self._foreign_inputs:  # looked at before a fit, and used after it
            shape = self.dataset.input_shape
            size = shape[1] if len(shape) == 3 and shape[1] == shape[2] else None
            try:
                other = load_data(asked, data_root=self.data_root, image_size=size)
                self._foreign_inputs[asked] = self.dataset.foreign(other)[:FOREIGN_EXAMPLES]
            except DataError as error:
                raise ValueError(f"foreign {asked!r} can't be used: {error}") from error
        return {asked: self._foreign_inputs[asked]}

    def _example(self) -> Tensor:
        x: Tensor = self.dataset.train[: self.settings.batch_size][0].to(self.device)
        return x

    def reduced(self) -> bool:
        """Whether the folder holds the reduction by these very settings."""
        stored = self.stored_settings()
        done = self.has(*FIT_FILES, *REDUCE_FILES)
        return done and stored is not None and stored["settings"] == self.settings

    def complete(self) -> bool:
        """Whether every stage has been done with these very settings."""
        return self.reduced() and self.has(*REPORT_FILES)

    def small_network(self) -> nn.Module:
        """The small network, rebuilt from recipe, plan and small.safetensors; in eval mode."""
        self._need("small.safetensors")
        return self.plan().rebuild(self._original_network(), self.folder / "small.safetensors")

    def export(self, path: Path) -> Path:
        """Write the small network as an ONNX file (.onnx) or a torch.export program (.pt2)."""
        kinds = {".onnx": export_onnx, ".pt2": export_program}
        if path.suffix not in kinds:
            raise ValueError(f"out must end in {' or '.join(kinds)}: got {path}")
        check_file("out", path)
        small = self.small_network().cpu()
        return kinds[path.suffix](small, self.dataset.test[:4][0], path)

    def predict(self, inputs: Tensor) -> pd.DataFrame:
        """Predicted class and its probability for inputs as `Dataset.prepare` gives them, one row each."""
        small = self.small_network()
        model = self.recipe.model(small)
        every = (
            predict(model, None, inputs)
            if isinstance(model, Classifier)
            else predict(small, None, inputs).softmax(dim=1)
        )
        probability, label = every.max(dim=1)
        if not math.isfinite(float(probability.sum())):
            raise ValueError("inputs must be finite: a prediction is NaN")
        return pd.DataFrame({"label": label.numpy(), "probability": probability.numpy()})


_REMOVAL_COLUMNS = ["phase", *LEDGER_COLUMNS]
