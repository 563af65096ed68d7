"""What every stage of a run works with: the folder, and the recipe, data, network, model and guide of its settings."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmrs import __version__
from pyro_bmrs.arguments import check
from pyro_bmrs.data import DataError, Dataset, load_data
from pyro_bmrs.data.sources import KNOWN_SETS
from pyro_bmrs.files import held, write_atomically
from pyro_bmrs.fitting.checkpoints import changes_between
from pyro_bmrs.fitting.curvature_pass import shown_examples
from pyro_bmrs.fitting.posterior_file import load_posterior
from pyro_bmrs.inference import AutoTruncatedLogNormal
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.runs.folder import FORMAT, VERSION, RunFolder
from pyro_bmrs.runs.recipe import Recipe, blamed
from pyro_bmrs.runs.served import Served
from pyro_bmrs.runs.settings import RunSettings

LOGGERS = ("csv", "tensorboard")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run, with a message that says what is kept. All that was finished before is."""


@contextmanager
def interruption(where: str) -> Iterator[None]:
    """Says at Ctrl-C what is kept, unless a stage has said it."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted in {where}, and the same command, without --overwrite, goes on from there"
        ) from None


class Workplace(Served):
    """A run's folder with all that its stages need.

    Args:
        folder: where the files are, or will be.
        recipe: the recipe; default the copy in the folder.
        settings: default those in the folder.
        changes: to the settings in the folder, by name.
        data_root: where the data sets are.
        device: where to compute; "auto": the accelerator if there is one.
        logger: "csv" or "tensorboard": write the history to logs/ in the folder, too, while a fit runs.
        progress: show progress.
        overwrite: let a fit with other settings or another recipe in the folder be replaced.

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
        RunFolder.__init__(self, folder)
        check(logger in (None, *LOGGERS), "logger", f"one of {LOGGERS} or None", logger)
        if logger == "tensorboard" and not find_spec("tensorboard"):
            raise ValueError("logger tensorboard needs the package: pip install pyro-bmrs[tensorboard]")
        self.progress, self.overwrite, self.logger, self.data_root = progress, overwrite, logger, data_root
        self._is_held = False
        stored = None if overwrite else self.stored_settings()
        if recipe is None or settings is None:
            stored = stored or self.needed_settings()
            recipe = recipe or Recipe.read(self.folder / "recipe.py", stored["recipe"])
            settings = settings or stored["settings"].changed(**(changes or {}))
            moved = Path(settings.data).is_absolute() and not Path(settings.data).exists()
            check(
                not moved,
                "data",
                "where they were; if they have moved, --data says where they are",
                settings.data,
            )
        elif stored is not None and self.has("posterior.safetensors"):
            self._check_same_fit(dict(stored["fit"]), recipe, settings)
        self.recipe, self.settings = recipe, settings
        # The settings of the fit in the folder. A later reduction may have others.
        self.fitted_with = settings.of_fit() if stored is None else stored["fit"]
        # What was not given, and followed from model and data.
        self.settled: dict[str, Any] = {} if stored is None else stored["settled"]
        self.device = _usable_device(device)
        self.dataset = dataset_of(settings, data_root)
        self.preparation = self.dataset.preparation
        if settings.accuracy_drop is not None and self.preparation.targets is not None:
            raise ValueError("accuracy_drop must be left out for targets of a regression: give loss_rise")
        if stored is not None and self.has("posterior.safetensors"):
            check(
                self.preparation.is_like(stored["inputs"]),
                "data", f"those that the posterior in {self.folder} was fitted to, with the same shape, classes, means "
                "and deviations", settings.data,
            )  # fmt: skip
        self.network = self.original_network().to(self.device)
        self.parameters_before = parameters(self.network)
        self.model = recipe.model(self.network, self.preparation.targets).to(self.device)
        self.guide = recipe.guide(self.model) if settings.weights is None else self._laplace()

    def _laplace(self) -> AutoKroneckerLaplace:
        """The guide of a trained network."""
        with blamed(f"recipe {self.recipe.path}: AutoKroneckerLaplace(model)"):
            return AutoKroneckerLaplace(self.model)  # type: ignore[arg-type]  # it says what it takes

    def _check_same_fit(self, before: dict[str, Any], recipe: Recipe, settings: RunSettings) -> None:
        if not {before.get("data"), settings.data} & {
            *KNOWN_SETS
        }:  # data may move: they are compared themselves
            before["data"] = settings.data
        changed = changes_between(before, settings.of_fit())
        self.need("recipe.py")
        if recipe.path.read_bytes() != (self.folder / "recipe.py").read_bytes():
            changed.append("another recipe")
        if changed:
            raise ValueError(
                f"out {self.folder} holds a fit with other settings ({'; '.join(changed)}): "
                "choose another folder, or pass --overwrite"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other process works in the folder. Stages that call one another share it."""
        if self._is_held:
            yield
            return
        with held("out", self.folder):
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    def example(self) -> Tensor:
        """Inputs of the first training batch."""
        x: Tensor = self.dataset.train[: self.settings.batch_size][0].to(self.device)
        return x

    def traced(self, program: Callable[[Tensor, Tensor], Any]) -> poutine.Trace:
        """The trace of a model or a guide on the first training batch."""
        x, y = self.dataset.train[: self.settings.batch_size]
        with untouched(self.model):
            return poutine.trace(program).get_trace(x.to(self.device), y.to(self.device))

    def load_posterior(self) -> None:
        """Put the folder's posterior into model and guide."""
        self.need("posterior.safetensors")
        if isinstance(self.guide, AutoTruncatedLogNormal):
            self.traced(self.guide)
        self.guide.to(self.device)
        load_posterior(self.folder / "posterior.safetensors", self.model, self.guide)
        self.show_examples()

    def show_examples(self) -> None:
        """Say on which examples a Laplace plan measures losses: the same in a later process."""
        if isinstance(self.guide, AutoKroneckerLaplace):
            x, y = self.dataset.train[: shown_examples(self.network, self.example())]
            self.guide.shown = x.to(self.device), y.to(self.device)

    def bound(self, plan: NetworkPlan) -> NetworkPlan:
        """A plan of the folder, with the network it is for."""
        if isinstance(plan, LaplacePlan):
            assert isinstance(self.guide, AutoKroneckerLaplace)
            return plan.with_posterior(self.guide)
        return plan.bound_to(self.network, self.example, self.model)

    def model_of(self, small: nn.Module) -> nn.Module:
        """The Pyro model of the small network, with what the fit learned outside the network."""
        model = self.recipe.model(small, self.preparation.targets)
        network = {id(tensor) for tensor in self.network.state_dict(keep_vars=True).values()}
        state = self.model.state_dict(keep_vars=True)
        model.load_state_dict({n: t for n, t in state.items() if id(t) not in network}, strict=False)
        return model.to(self.device)

    def logger_of(self, stage: str) -> Any:
        """A new TensorBoard or CSV logger of a stage; None if none was asked for."""
        if self.logger is None:
            return None
        from lightning_fabric.loggers.csv_logs import CSVLogger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        logs = self.folder / "logs"
        shutil.rmtree(logs / stage, ignore_errors=True)
        if self.logger == "csv":
            return CSVLogger(logs, name=stage, version="", flush_logs_every_n_steps=1)
        return TensorBoardLogger(logs, name=stage, version="")

    def write_settings(self) -> None:
        """Write settings.json."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings.model_dump(mode="json"),
            "fit": self.fitted_with,
            "settled": self.settled,
            "recipe": self.recipe.name,
            "inputs": self.preparation.document(),
            "versions": versions(),
        }
        write_atomically(
            self.folder / "settings.json", lambda beside: beside.write_text(json.dumps(document, indent=1))
        )


def dataset_of(settings: RunSettings, data_root: Path | str | None) -> Dataset:
    """The data of a run; raises ValueError if they can't be used."""
    try:
        return load_data(
            settings.data, data_root=data_root, image_size=settings.image_size, seed=settings.seed,
            limit=settings.limit, validation_fraction=settings.validation_fraction,
        )  # fmt: skip
    except DataError as error:
        raise ValueError(f"data {settings.data!r} can't be used: {error}") from error


def versions() -> dict[str, str]:
    """The versions of what the figures of a run depend on."""
    packages = {"torch": "torch", "pyro": "pyro-ppl", "arviz": "arviz"}
    return {
        "pyro_bmrs": __version__,
        "python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
    }


def _usable_device(name: str) -> torch.device:
    """The device of this name; "auto": the accelerator if there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ValueError(f"device must be auto, or one that torch can use: got {name!r} ({error})") from error
    return device
