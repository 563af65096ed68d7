"""`fit`: variational inference for networks with noise layers, and fine-tuning of networks without."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.files import check_folder
from pyro_bmrs.fitting.checkpoints import LEDGER_COLUMNS, Checkpoints
from pyro_bmrs.fitting.curvature_pass import curvature_pass
from pyro_bmrs.fitting.defaults import SETTLED, settled
from pyro_bmrs.fitting.devices import open_fabric
from pyro_bmrs.fitting.epochs import HISTORY_COLUMNS
from pyro_bmrs.fitting.loop import Loop, Task, isolated
from pyro_bmrs.fitting.programs import check_programs
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.fitting.stages import STAGE_COLUMNS, Stages
from pyro_bmrs.inference.batches import AT_ONCE, Batches, Data
from pyro_bmrs.inference.calls import as_module, home_of
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.notebooks import card, folded, grid, lines
from pyro_bmrs.pruning.network_plan import NetworkPlan

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger


@dataclass
class Fit:
    """What happened in a fit.

    Attributes:
        history: one row per epoch: phase ("fit" or "fine-tune"), epoch (from 1), loss (the objective, nats
            per example), log_likelihood (nats per example, training), kl (nats, whole data set, unweighted),
            kl_weight (of this epoch), validation_loss (nats per example, at θ = E[θ]), validation_accuracy,
            kept (structures that `reduce` would keep by the settings' criterion; NaN unless the guide is an
            AutoTruncatedLogNormal), parameters (of the model, at the end of the epoch), seconds.
        removals: one row per structure removed during the fit: epoch, layer, unit (its number in the
            original network), score, log_evidence_change (nats; NaN for criteria without evidence).
        settings: the settings of the fit.
        best_epoch: the epoch whose parameters were kept.
        interrupted: whether Ctrl-C or SIGTERM ended the fit early. Parameters are then those of the best epoch
            or stage so far, and a fit with `checkpoints` goes on when called again.
        stopped_early: whether `patience` ended the fit.
        stages: at kl_weight="auto" one row per stage: stage, epoch, kl_weight; of what `reduce` would leave kept
            (structures), parameters, validation_loss with its standard_error (nats per example) and
            validation_accuracy; chosen.
    """

    history: pd.DataFrame
    removals: pd.DataFrame
    settings: Settings
    best_epoch: int
    interrupted: bool = False
    stopped_early: bool = False
    stages: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=STAGE_COLUMNS))
    _stages: Stages | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stages": None}  # it holds model, guide and data

    def within(
        self,
        *,
        parameters: float | None = None,
        macs: float | None = None,
        bytes: float | None = None,
        milliseconds: float | None = None,
        accuracy_drop: float | None = None,
        loss_rise: float | None = None,
        batch_size: int = 1,
        progress: bool = True,
    ) -> NetworkPlan:
        """The plan of the stage where a budget costs least; model and guide are put into the state of that stage.

        >>> result = bmrs.fit(model, guide, train, validation)  # doctest: +SKIP
        >>> small = result.within(parameters=0.2).apply()  # doctest: +SKIP

        Args: as of `NetworkPlan.within`. Losses are those on the validation data, from the least of all stages.

        Raises:
            ValueError: if the fit has no stages; naming a budget that can't be met.
        """
        asked = {
            "parameters": parameters, "macs": macs, "bytes": bytes, "milliseconds": milliseconds,
            "accuracy_drop": accuracy_drop, "loss_rise": loss_rise,
        }  # fmt: skip
        return self._known_stages().within(asked, batch_size=batch_size, progress=progress).settled()

    def restore(self, stage: int) -> None:
        """Put model and guide into the state of a stage, by its number in `stages`.

        Raises:
            ValueError: if there is no such stage.
        """
        stages = self._known_stages()
        check(is_whole(stage) and stage in set(self.stages.stage), "stage", f"from 1 to {len(stages)}", stage)
        stages.restore(stage)

    def _known_stages(self) -> Stages:
        if self._stages is None or not len(self._stages):
            raise ValueError('kl_weight must be "auto" for a fit with stages: this one has none')
        return self._stages

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        title, _, told = str(self).partition("; ")
        if self.stages.empty:
            return card(title, lines(told))
        columns = [
            ("kl_weight", "KL weight", ".4g"), ("kept", "structures", ",.0f"), ("parameters", "parameters", ",.0f"),
            ("validation_loss", "validation loss (nats)", ".4f"), ("validation_accuracy", "accuracy", "%"),
            ("taken", "", "text"),
        ]  # fmt: skip
        rows = [{**row, "taken": "taken" if row["chosen"] else ""} for row in self.stages.to_dict("records")]
        return card(title, lines(told), folded(f"{len(rows)} stages", grid(columns, rows, len(rows))))

    def __str__(self) -> str:
        ending = ", interrupted" if self.interrupted else ", stopped early" if self.stopped_early else ""
        epochs = len(self.history)
        text = f"Fit of {epochs} epoch{'s' * (epochs != 1)}{ending}"
        if not self.best_epoch:
            return text
        last = self.history.iloc[self.best_epoch - 1]
        told = [f"loss {last.loss:.4f} nats per example"]
        if last.validation_accuracy == last.validation_accuracy:  # not NaN
            told.append(f"validation accuracy {last.validation_accuracy:.4f}")
        if last.kept == last.kept:
            told.append(f"{last.kept:.0f} structures kept")
        return f"{text}; epoch {self.best_epoch} kept: {', '.join(told)}"


# Settings of the one pass that makes a Laplace posterior.
_OF_A_PASS = {"batch_size", "seed", "precision"}


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    train: Data,
    validation: Data | None = None,
    settings: Settings | None = None,
    *,
    checkpoints: Path | str | None = None,
    keep_checkpoints: int = 2,
    overwrite: bool = False,
    label: str = "",
    device: str | torch.device | None = None,
    logger: Logger | list[Logger] | None = None,
    progress: bool = True,
    validate: bool = False,
    **changes: Any,
) -> Fit:
    """Fit the posterior over structures and the weights by maximising the ELBO; both change in place.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model)
    >>> result = bmrs.fit(model, guide, (x, y), epochs=2, batch_size=32, progress=False)
    >>> list(result.history.epoch), guide.posterior()["2"].mean.shape
    ([1, 2], torch.Size([8]))

    The objective per example is -log p(y|x, θ) + kl_weight · KL(q(θ)‖p(θ))/N with N the size of `train`:
    at kl_weight = 1 the negative ELBO over N, the KL counted once per data set. At another weight w the fit
    is that of the tempered likelihood p(y|θ)^(1/w), and so are all ΔF read from it (docs/guide.md).
    Latents other than noise sites keep weight 1 (beside such latents, w ≠ 1 is no tempering of the whole).

    Args:
        model: any Pyro model, a module or a function, called as model(x, y), that observes y. Its likelihood speaks
            either for the batch alone or, scaled by N/batch, for the data set; both are recognised. What stands
            outside of the plate of the examples counts once.
        guide: a Pyro guide of the same arguments, with all latents of the model, in distributions with `rsample`. None
            for a model without latents: plain maximum likelihood, as for fine-tuning a reduced network.
        train, validation: (x, y), each a tensor or several in a tuple or mapping; a Dataset or a DataLoader of such
            pairs. N is the number of examples. It is counted, or refused where nothing tells it.
        settings: what shapes the fit; default `Settings()`. docs/settings.md lists them all.
        checkpoints: folder for the state after each epoch, and when Ctrl-C or SIGTERM end the fit. Called
            again with the same folder, the fit goes on from there, in a new process and with a freshly made
            model too. On the CPU the result is bit for bit that of a fit that never stopped, unless a loader
            has a random generator of its own. The folder also holds the ledger of removals.
        keep_checkpoints: how many are kept, beside that of the best epoch.
        overwrite: start anew if `checkpoints` holds another fit, or this one finished.
        label: a text that tells this fit from others, such as the hash of a file.
        device: "auto": the accelerator if there is one; None: the device of the model's parameters. Under
            torchrun the fit uses all processes that were started.
        logger: lightning-fabric's CSVLogger or TensorBoardLogger, or several; they get a line per epoch.
        progress: show a bar on a terminal, and a line per epoch elsewhere.
        validate: run Pyro's checks of shapes and supports at every step. elbo="auto" then leaves out the fused
            implementation, in which there is nothing to check.
        changes: settings by name, such as epochs=40, in place of those in `settings`.

    Returns:
        The `Fit`. Ctrl-C ends early with `interrupted` set and the best parameters so far.

    Raises:
        ValueError, TypeError: for a bad argument, before any work is done; after the first epoch for a loader that
            gave another number of examples than it says.
        FloatingPointError: if the loss stops being finite; the best parameters so far are put back.
    """
    check(isinstance(settings, Settings | None), "settings", "a Settings or None", settings, TypeError)
    settings = (settings or Settings()).changed(**changes)
    check(is_whole(keep_checkpoints, 1), "keep_checkpoints", "a positive integer", keep_checkpoints)
    _check_surroundings(checkpoints, label, logger)
    check(callable(model), "model", "a Pyro model", type(model), TypeError)
    model = as_module(model)
    if inspect.ismethod(guide):  # of a module whose parameters it has
        guide = as_module(guide)
    if isinstance(guide, AutoKroneckerLaplace):
        check(model is guide.model, "model", "the one that the guide was made for", type(model))
        unused = sorted(changes.keys() - _OF_A_PASS)
        if unused:
            raise ValueError(
                f"{', '.join(unused)} must be left out with an AutoKroneckerLaplace, which is made in one pass"
            )
        return _laplace(
            guide,
            train,
            validation,
            settings,
            None if checkpoints is None else Path(checkpoints),
            overwrite,
            label,
            device,
            progress,
        )
    if guide is None and isinstance(model, Likelihood):
        model.weight_priors = {}  # training changes the weights that a Laplace posterior was of
    check_programs(model, guide, settings)
    home = home_of(model, guide)
    batches = Batches(train, settings.batch_size, home, "train")
    fabric = open_fabric(device, settings.precision, home, logger)
    fabric.launch()
    with _without_tables_of_sites(), isolated(settings.seed, validate=False):
        before = {} if checkpoints is None else Checkpoints.unfinished(Path(checkpoints))
        settings = settled(settings, model, guide, batches, validation, before)
    if fabric.world_size > 1:  # each process has data of its own, and the first decides
        settings = settings.changed(**fabric.broadcast({name: getattr(settings, name) for name in SETTLED}))
        batches.batch_size = settings.batch_size
    # of examples that need each other there is one batch of training, and of validation
    at_once = max(AT_ONCE, settings.batch_size or 0)
    held_out = None if validation is None else Batches(validation, at_once, home, "validation")
    task = Task(
        model, guide, batches, held_out, settings, None if checkpoints is None else Path(checkpoints),
        keep_checkpoints, overwrite, label, progress, validate,
    )  # fmt: skip
    with _without_tables_of_sites(), isolated(settings.seed, validate=validate):
        loop = Loop(fabric, task)
        loop.run()
    return Fit(
        history=pd.DataFrame(loop.state.history, columns=HISTORY_COLUMNS),
        removals=pd.DataFrame(loop.state.removals, columns=LEDGER_COLUMNS),
        settings=settings,
        best_epoch=loop.kept_epoch,
        interrupted=loop.interrupted,
        stopped_early=loop.stopped_early,
        stages=pd.DataFrame(columns=STAGE_COLUMNS) if loop.stages is None else loop.stages.table(),
        _stages=loop.stages,
    )


def _laplace(
    guide: AutoKroneckerLaplace, train: Data, validation: Data | None, settings: Settings, checkpoints: Path | None,
    overwrite: bool, label: str, device: str | torch.device | None, progress: bool,
) -> Fit:  # fmt: skip
    """The Laplace posterior, by one pass over the data."""
    start, model = time.perf_counter(), guide.model
    home = home_of(model)
    batches = Batches(train, settings.batch_size, home, "train")
    held_out = None if validation is None else Batches(validation, AT_ONCE, home, "validation")
    fabric = open_fabric(device, settings.precision, home, None)
    fabric.launch()
    model.to(fabric.device)
    file = None if checkpoints is None else checkpoints / "curvature.safetensors"
    if file is not None and overwrite:
        for old in file.parent.glob(f"{file.stem}-*{file.suffix}"):
            old.unlink()
    with _without_tables_of_sites(), _kept_if_it_fails(model):
        interrupted = curvature_pass(
            model, guide, batches, held_out, fabric, seed=settings.seed, checkpoint=file, label=label,
            progress=progress,
        )  # fmt: skip
        row: dict[str, Any] = dict.fromkeys(HISTORY_COLUMNS, float("nan")) | {
            "phase": "curvature",
            "epoch": 1,
        }
        if not interrupted:
            each = guide.log_likelihood / guide.dataset_size
            row |= {"loss": -each, "log_likelihood": each, "kl_weight": 1.0}
            if held_out is not None:
                found = evaluate(model, held_out.shared(fabric.device, 0, 1), guide.mean())
                row |= {"validation_loss": found.loss, "validation_accuracy": found.accuracy}
    row |= {
        "parameters": parameters(model),
        "seconds": time.perf_counter() - start,
    }
    return Fit(
        history=pd.DataFrame([row], columns=HISTORY_COLUMNS), removals=pd.DataFrame(columns=LEDGER_COLUMNS),
        settings=settings, best_epoch=0 if interrupted else 1, interrupted=interrupted,
    )  # fmt: skip


@contextmanager
def _kept_if_it_fails(model: Likelihood) -> Iterator[None]:
    """Puts a model's own parameters, such as the scale of a regression, back after an error."""
    before = [(one, one.detach().clone()) for one in model.parameters(recurse=False)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


@contextmanager
def _without_tables_of_sites() -> Iterator[None]:
    """Cuts off the table of all sites that Pyro adds to errors inside a model or a guide."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason, table, _ = str(error).partition("Trace Shapes:")
        if not table:
            raise
        raise type(error)(" ".join(reason.split())) from error


def _check_surroundings(checkpoints: object, label: object, logger: object) -> None:
    if checkpoints is not None:
        check(isinstance(checkpoints, str | Path), "checkpoints", "a folder or None", checkpoints, TypeError)
        check_folder("checkpoints", Path(checkpoints))  # type: ignore[arg-type]
    check(isinstance(label, str), "label", "text", label, TypeError)
    for one in logger if isinstance(logger, list) else [logger]:
        good = one is None or hasattr(one, "log_metrics")
        check(good, "logger", "one of lightning-fabric's loggers, or a list of them", one, TypeError)
