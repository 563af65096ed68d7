"""A run: a recipe, data and settings in; a folder with everything that came out."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs import __version__
from pyro_bmrs.data import Dataset, load_data
from pyro_bmrs.diagnostics import compression_curve, report
from pyro_bmrs.inference import AutoTruncatedLogNormal, Classifier, Fit, evaluate, fit
from pyro_bmrs.inference.checkpoint import load_posterior, save_posterior
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import export_program, load_weights, save_weights, write_atomically
from pyro_bmrs.networks.noise import without_noise
from pyro_bmrs.reduction.criteria import parse_criterion
from pyro_bmrs.reduction.reduce import Reduction, reduce

FORMAT, VERSION = "pyro_bmrs.run", 1


class Interrupted(RuntimeError):
    """Ctrl-C during a run; what was finished before stands."""


@dataclass(frozen=True)
class Recipe:
    """A Python file that defines `network` and `SETTINGS`, and optionally `model` and `guide`.

    Reading a recipe runs it: it is code, unlike every other file of a run.
    """

    path: Path
    module: ModuleType

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Raises ValueError, in one line, if the file is missing, fails, or lacks what a recipe defines."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"recipe must be a Python file: {path} is none")
        spec = importlib.util.spec_from_file_location(f"pyro_bmrs_recipe_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"recipe must be a Python file: {path} is none")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"recipe {path} fails with {type(error).__name__}: {error}") from error
        for name in ("network", "SETTINGS"):
            if not hasattr(module, name):
                raise ValueError(f"recipe {path} must define {name}; see models/lenet5.py for one that does")
        if not isinstance(module.SETTINGS, dict):
            raise ValueError(f"recipe {path} must define SETTINGS as a dict of data name to settings")
        return cls(path, module)

    def settings(self, data: str) -> dict[str, Any]:
        """The recipe's settings for a data set, those under "default" where it has none."""
        return dict(self.module.SETTINGS.get(data) or self.module.SETTINGS.get("default") or {})

    def network(self, dataset: Dataset, options: Mapping[str, Any], seed: int) -> nn.Module:
        """The network with noise layers, its initial weights drawn with `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net: nn.Module = self.module.network(dataset.input_shape, dataset.num_classes, **options)
        return net

    def model(self, network: nn.Module) -> nn.Module:
        build: Callable[[nn.Module], nn.Module] = getattr(self.module, "model", Classifier)
        return build(network)

    def guide(self, model: nn.Module) -> AutoTruncatedLogNormal:
        build: Callable[[nn.Module], AutoTruncatedLogNormal] = getattr(
            self.module, "guide", AutoTruncatedLogNormal
        )
        return build(model)


@dataclass(frozen=True)
class Settings:
    """All that shapes a run. Fields up to `limit` shape the fit, the rest what is done with it."""

    data: str = "digits"
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    posterior_learning_rate: float = 5e-3
    kl_weight: float = 1.0
    warm_up: float = 0.25
    draws_per_batch: int | None = None
    removal: str = "end"
    image_size: int | None = None
    network: dict[str, Any] | None = None
    limit: int | None = None
    criterion: str = "BMRS_N"
    prior_log_odds: float | None = None
    min_kept: int = 1
    fine_tune: int = 0

    @classmethod
    def of(cls, recipe: Recipe, data: str, overrides: Mapping[str, Any]) -> Settings:
        """The recipe's settings for `data`, with the given ones (None: not given) laid over them."""
        given = {name: value for name, value in overrides.items() if value is not None}
        known = {field.name for field in fields(cls)}
        merged = {**recipe.settings(data), "data": data, **given}
        unknown = sorted(set(merged) - known)
        if unknown:
            raise ValueError(f"SETTINGS of {recipe.path} has unknown names {unknown}; known are {sorted(known)}")
        settings = cls(**merged)
        if settings.fine_tune < 0:
            raise ValueError(f"fine_tune must be a number of epochs, 0 or more: got {settings.fine_tune}")
        parse_criterion(settings.criterion, settings.prior_log_odds)  # before any work is done
        return settings

    def of_fit(self) -> dict[str, Any]:
        """The part that a fitted posterior depends on, as JSON holds it."""
        names = [field.name for field in fields(self)]
        kept = names[: names.index("limit") + 1]
        part: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in kept}))
        return part


class Run:
    """One run folder and what is in it.

    Args:
        folder: where the files are, or will be.
        recipe: the recipe; default the copy that the folder holds.
        settings: default those that the folder holds.
        data_root: where the data sets are.
        device: where to compute; None: the CPU.
        progress: show progress.

    Raises:
        ValueError: if the folder holds a fit with other settings, another recipe, or no run where one is
            needed, or was written by a newer version.
    """

    def __init__(
        self,
        folder: Path | str,
        recipe: Recipe | None = None,
        settings: Settings | None = None,
        *,
        data_root: Path | str | None = None,
        device: str | None = None,
        progress: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.device, self.progress = torch.device(device or "cpu"), progress
        stored = self._stored_settings()
        if recipe is None or settings is None:
            if stored is None:
                raise ValueError(f"run must be a folder with a settings.json: {self.folder} has none")
            recipe = recipe or Recipe.read(self.folder / "recipe.py")
            settings = settings or Settings(**stored["settings"])
        elif stored is not None and self.has("posterior.safetensors"):
            before, now = Settings(**stored["settings"]).of_fit(), settings.of_fit()
            changed = [f"{name} {before[name]!r} → {now[name]!r}" for name in now if before[name] != now[name]]
            if recipe.path.read_text() != (self.folder / "recipe.py").read_text():
                changed.append("another recipe")
            if changed:
                raise ValueError(
                    f"out {self.folder} holds a fit with other settings ({'; '.join(changed)}): "
                    "choose another folder, or pass --overwrite"
                )
        self.recipe, self.settings = recipe, settings
        self.dataset = load_data(
            settings.data, data_root=data_root, image_size=settings.image_size, seed=settings.seed,
            limit=settings.limit,
        )  # fmt: skip
        self.network = recipe.network(self.dataset, settings.network or {}, settings.seed).to(self.device)
        self.model = recipe.model(self.network)
        self.guide = recipe.guide(self.model)

    def _stored_settings(self) -> dict[str, Any] | None:
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        try:
            document: dict[str, Any] = json.loads(path.read_text())
            version = document["version"] if document["format"] == FORMAT else None
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            version = None
        if version is None:
            raise ValueError(f"{path} is not the settings file of a run")
        if version > VERSION:
            raise ValueError(
                f"{path} was written by a newer pyro_bmrs (run version {version}, this one reads up to {VERSION})"
            )
        return document

    def has(self, name: str) -> bool:
        """Whether the folder holds a file."""
        return (self.folder / name).exists()

    def _write_table(self, name: str, table: pd.DataFrame) -> None:
        write_atomically(self.folder / name, lambda beside: table.to_csv(beside, index=False))

    def _write_settings(self) -> None:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": asdict(self.settings),
            "recipe": self.recipe.path.name,
            "versions": {"pyro_bmrs": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        write_atomically(
            self.folder / "settings.json", lambda beside: beside.write_text(json.dumps(document, indent=1))
        )
        if self.recipe.path.resolve() != (self.folder / "recipe.py").resolve():
            write_atomically(
                self.folder / "recipe.py", lambda beside: shutil.copyfile(self.recipe.path, beside)
            )

    # the stages -------------------------------------------------------------------------------------

    def fit(self) -> Fit | None:
        """Fit the posterior and write it, unless the folder has it. Returns the fit if one was made."""
        if self.has("posterior.safetensors"):
            self.load_posterior()
            return None
        settings = self.settings
        criterion = parse_criterion(settings.criterion, settings.prior_log_odds)
        result = fit(
            self.model, self.guide, self.dataset.train, self.dataset.validation, epochs=settings.epochs,
            batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            posterior_learning_rate=settings.posterior_learning_rate, kl_weight=settings.kl_weight,
            warm_up=settings.warm_up, draws_per_batch=settings.draws_per_batch, criterion=criterion,
            removal=settings.removal, seed=settings.seed, device=self.device, progress=self.progress,
        )  # fmt: skip
        if result.interrupted:
            raise Interrupted(f"interrupted in epoch {len(result.history) + 1}; {self.folder} holds no fit yet")
        self._write_settings()
        self._write_table("history.csv", result.history)
        self._write_table("removals.csv", result.removals)
        save_posterior(self.folder / "posterior.safetensors", self.model, self.guide)
        return result

    def load_posterior(self) -> None:
        """Put the folder's posterior into model and guide."""
        if not self.has("posterior.safetensors"):
            raise ValueError(f"run {self.folder} has no fit yet: call `pyro-bmrs fit` first")
        x, y = self.dataset.train[: self.settings.batch_size]
        self.guide(x.to(self.device), y.to(self.device))
        self.guide.to(self.device)
        load_posterior(self.folder / "posterior.safetensors", self.model, self.guide)

    def reduce(self) -> tuple[Reduction, nn.Module]:
        """Reduce, apply, fine-tune, evaluate, and write plan, tables and the small network."""
        settings = self.settings
        criterion = parse_criterion(settings.criterion, settings.prior_log_odds)
        plan = reduce(self.model, self.guide, criterion, min_kept=settings.min_kept)
        small = plan.apply()
        full = evaluate(self.model, self.dataset.test, self.guide.mean())
        rows = [("full, E[θ]", *full, parameters(self.network))]
        wrapped = self.recipe.model(small)
        rows.append(("reduced", *evaluate(wrapped, self.dataset.test), parameters(small)))
        history = pd.read_csv(self.folder / "history.csv")
        history = history[history.phase == "fit"]
        if settings.fine_tune:
            tuned = fit(
                wrapped, None, self.dataset.train, self.dataset.validation, epochs=settings.fine_tune,
                batch_size=settings.batch_size, learning_rate=settings.learning_rate, schedule="cosine",
                seed=settings.seed, progress=self.progress,
            )  # fmt: skip
            if tuned.interrupted:
                raise Interrupted(f"interrupted while fine-tuning; the fit in {self.folder} stands")
            kept = sum(map(len, plan.kept.values()))
            history = pd.concat([history, tuned.history.assign(kept=kept)], ignore_index=True)
            rows.append(("fine-tuned", *evaluate(wrapped, self.dataset.test), parameters(small)))
        evaluation = pd.DataFrame(
            rows, columns=["network", "negative_log_likelihood", "accuracy", "parameters"]
        ).assign(split="test")
        self._write_settings()
        self._write_table("history.csv", history)
        self._write_table("structures.csv", plan.table)
        if settings.removal == "end":
            gone = plan.table[plan.table.removed].assign(epoch=int((history.phase == "fit").sum()))
            self._write_table("removals.csv", gone[["epoch", "layer", "unit", "score", "log_evidence_change"]])
        self._write_table("evaluation.csv", evaluation)
        plan.save(self.folder / "plan.json")
        save_weights(small, self.folder / "small.safetensors")
        export_program(small, self.dataset.test[:2][0].to(self.device), self.folder / "small.pt2")
        return plan, small

    def report(self) -> Path:
        """Draw the accuracy-against-parameters line and write report.html."""
        for name in ("plan.json", "evaluation.csv", "history.csv"):
            if not self.has(name):
                raise ValueError(f"run {self.folder} has no {name} yet: call `pyro-bmrs reduce` first")
        plan = Reduction.load(self.folder / "plan.json").bound_to(self.network, self._example)
        if self.has("curve.csv") and self._newer("curve.csv", "plan.json"):
            curve = pd.read_csv(self.folder / "curve.csv")
        else:
            curve = compression_curve(self.model, plan, self.dataset.validation)
            self._write_table("curve.csv", curve)
        history = pd.read_csv(self.folder / "history.csv")
        epochs = int((history.phase == "fit").sum())
        shown = Fit(history, pd.DataFrame(), asdict(self.settings), best_epoch=epochs)
        return report(
            shown, plan, self.folder / "report.html", curve=curve,
            evaluation=pd.read_csv(self.folder / "evaluation.csv"),
            settings={"recipe": self.recipe.path.name, "data": str(self.dataset), "pyro_bmrs": __version__,
                      "torch": torch.__version__},
        )  # fmt: skip

    def _newer(self, name: str, than: str) -> bool:
        return (self.folder / name).stat().st_mtime >= (self.folder / than).stat().st_mtime

    def _example(self) -> Tensor:
        return self.dataset.train[: self.settings.batch_size][0].to(self.device)

    def outcome(self) -> dict[str, float]:
        """removed (fraction of parameters) and accuracy (test, 0 to 1) of the final network."""
        table = pd.read_csv(self.folder / "evaluation.csv")
        removed = 1 - table.parameters.iloc[-1] / table.parameters.iloc[0]
        return {"removed": float(removed), "accuracy": float(table.accuracy.iloc[-1])}

    def complete(self) -> bool:
        """Whether every stage has been done with these very settings."""
        stored = self._stored_settings()
        files = ("posterior.safetensors", "plan.json", "small.safetensors", "small.pt2", "report.html")
        same = stored is not None and stored["settings"] == json.loads(json.dumps(asdict(self.settings)))
        return same and all(map(self.has, files))

    def small_network(self) -> nn.Module:
        """The small network, rebuilt from recipe, plan and small.safetensors; in eval mode."""
        plan = Reduction.load(self.folder / "plan.json")
        small = plan.apply(self.network, self._example(), measure=False)
        small.load_state_dict(load_weights(self.folder / "small.safetensors"))
        return without_noise(small).eval()

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> pd.DataFrame:
        """Predicted class and its probability for standardised inputs, one row each."""
        small = self.small_network()
        logits = torch.cat([small(part.to(self.device)).cpu() for part in inputs.split(1000)])
        probability, label = logits.softmax(dim=1).max(dim=1)
        table = pd.DataFrame({"label": label.numpy(), "probability": probability.numpy()})
        if not math.isfinite(float(probability.sum())):
            raise ValueError("inputs must be finite: a prediction is NaN")
        return table
