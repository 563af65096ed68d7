"""Stochastic variational inference for networks with noise layers, and fine-tuning of those without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from pyro_bmrs.files import check_folder
from pyro_bmrs.fitting.checkpoints import LEDGER_COLUMNS
from pyro_bmrs.fitting.devices import check_devices, open_fabric, started_by_torchrun
from pyro_bmrs.fitting.loop import SCHEDULES, Loop, Task, isolated
from pyro_bmrs.fitting.objective import ELBOS
from pyro_bmrs.fitting.posterior_file import restore, state_of
from pyro_bmrs.fitting.programs import check_programs
from pyro_bmrs.fitting.signals import passing_on_signals
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.pruning.criteria import Criterion, check_criterion

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger

Schedule = str | Callable[[float], float]


@dataclass
class Fit:
    """What happened in a fit.

    Attributes:
        history: one row per epoch: phase ("fit" or "fine-tune"), epoch (from 1), loss (the objective, nats
            per example), log_likelihood (nats per example, training), kl (nats, whole data set, unweighted),
            kl_weight (of this epoch), validation_loss (nats per example, at θ = E[θ]), validation_accuracy,
            kept (structures the criterion keeps), parameters (of the model, at the end of the epoch), seconds.
        removals: one row per structure removed during the fit: epoch, layer, unit (its number in the
            original network), score, log_evidence_change (nats; NaN for criteria without evidence).
        settings: the arguments that shaped it.
        best_epoch: the epoch whose parameters were kept.
        interrupted: whether Ctrl-C or SIGTERM ended it early; parameters are then those of the best epoch so
            far, and a fit with `checkpoints` goes on when called again.
        stopped_early: whether `patience` ended it.
    """

    history: pd.DataFrame
    removals: pd.DataFrame
    settings: dict[str, Any]
    best_epoch: int
    interrupted: bool = False
    stopped_early: bool = False

    def __str__(self) -> str:
        last = self.history.iloc[self.best_epoch - 1] if self.best_epoch else None
        ending = ", interrupted" if self.interrupted else ", stopped early" if self.stopped_early else ""
        lines = [f"Fit of {len(self.history)} epochs{ending}"]
        if last is not None:
            lines.append(
                f"epoch {self.best_epoch} kept: loss {last.loss:.4f} nats per example, validation accuracy "
                f"{last.validation_accuracy:.4f}, {last.kept:.0f} structures kept"
            )
        return "; ".join(lines)


def fit(
    model: nn.Module,
    guide: Callable[..., Any] | None,
    train: Data,
    validation: Data | None = None,
    *,
    epochs: int = 30,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    posterior_learning_rate: float = 5e-3,
    kl_weight: float = 1.0,
    warm_up: float = 0.25,
    draws_per_batch: int | None = 16,
    stratified: bool = True,
    schedule: Schedule = "constant",
    weight_decay: float = 0.0,
    gradient_clip: float | None = None,
    accumulate: int = 1,
    patience: int | None = None,
    criterion: Criterion | None = None,
    removal: str = "end",
    min_kept: int = 1,
    freeze_weights: bool = False,
    keep_best: bool = True,
    checkpoints: Path | str | None = None,
    keep_checkpoints: int = 2,
    overwrite: bool = False,
    label: str = "",
    seed: int = 0,
    device: str | torch.device | None = None,
    devices: int | str = 1,
    precision: str = "32",
    elbo: str = "auto",
    logger: Logger | list[Logger] | None = None,
    progress: bool = True,
    validate: bool = False,
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
        model: any Pyro model called as model(x, y) that observes y and holds noise layers (or none, with
            guide=None: plain maximum likelihood, as for fine-tuning a reduced network). Its likelihood
            speaks either for the batch alone or, scaled by N/batch, for the data set; both are recognised.
        guide: a Pyro guide of the same arguments, or None.
        train, validation: (x, y) tensors, a Dataset or a DataLoader.
        epochs: passes over `train`.
        batch_size: examples per step, of all processes together (a DataLoader keeps its own).
        learning_rate: AdamW's, of the model's parameters.
        posterior_learning_rate: AdamW's, of the guide's parameters.
        kl_weight: factor w on the KL of the noise sites, uniform over structures.
        warm_up: share of the epochs over which the weight rises linearly from 0 to w.
        draws_per_batch: values of each θ per batch, example i using draw i mod draws; None: one per example.
            Of several processes each draws its share of them.
        stratified: take these draws from equal cells of probability, which needs far fewer of them for the
            same variance of the gradient (docs/guide.md); where sites are drawn together (see `elbo`).
        schedule: factor on the learning rates: "constant", "cosine" or "linear" (from the given rates to
            zero), or a function of the share of steps done, from 0 to 1.
        weight_decay: of the parameters of the model's layers, decoupled from Adam's gradient (Loshchilov & Hutter,
            2019): at each step they lose the share learning_rate · weight_decay of themselves. What the model holds
            beside its layers and the guide's parameters do not. No part of the objective or of ΔF. 0.05 to 0.1 help
            where a network overfits: docs/results.md.
        gradient_clip: largest Euclidean norm of a step's gradient, of weights and of posterior parameters
            each; None: no bound.
        accumulate: batches whose gradients are averaged for one step.
        patience: stop after so many epochs that brought no better validation objective (see `keep_best`),
            counted from the warm-up or the last removal; None: never.
        criterion: counts the structures it would keep in each epoch's row, and is what `removal` uses.
        removal: "end": the caller reduces. "epoch": after each epoch past the warm-up, structures that
            `criterion` gives a score ≥ 0 leave network, guide and optimizer, physically, and the fit goes on
            in what is left. "mask": they are fixed at θ = 0 for good, and leave with the reduction.
        min_kept: structures that every layer keeps, at least 1.
        freeze_weights: fit the posterior alone; weights and normalisation statistics stay as given.
        keep_best: end with the parameters of the epoch with the least validation objective (training
            objective without `validation`), among those after the warm-up and the last removal; without a
            guide and where there is one, of the epoch with the highest validation accuracy.
        checkpoints: folder in which the state is kept after each epoch, and when Ctrl-C or SIGTERM end the
            fit. Called again with it, the fit goes on from there, on the CPU bit for bit as if it had never
            stopped, in a new process and with a freshly made model too (but for what a loader draws from a
            generator of its own). Holds the ledger of removals.
        keep_checkpoints: how many stay, beside that of the best epoch.
        overwrite: start anew where `checkpoints` holds another fit, or this one finished.
        label: whatever else makes this fit this one and no other, such as the hash of a file.
        seed: of initial guide draws, shuffling and noise. The global generators are left as found.
        device: "auto": the accelerator where there is one; None: where the model's parameters are.
        devices: how many, with a process for each (their data-parallel batches make one of `batch_size`), or
            "auto" for all; under torchrun those that it has started.
        precision: of the network: "32" or "bf16-mixed". Noise, KL and evidence are float64 always.
        elbo: how the one ELBO is computed: "fused", "packed" or "pyro" (`fitting.objective`); "auto": the
            first of these that model and guide allow.
        logger: lightning-fabric's CSVLogger or TensorBoardLogger, or several; given a line per epoch.
        progress: show a bar (a line per epoch where output is not a terminal).
        validate: run Pyro's checks of shapes and supports at every step; then "auto" leaves the fused path out,
            where there is nothing to check.

    Returns:
        The `Fit`. Ctrl-C ends early with `interrupted` set and the best parameters so far.

    Raises:
        ValueError, TypeError: for a bad argument, before any work is done.
        RuntimeError: if one of several processes is killed.
        FloatingPointError: if the loss stops being finite; the best parameters so far are put back (of several
            processes only in these: the caller's model is then as it was).
    """
    settings = dict(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        posterior_learning_rate=posterior_learning_rate, kl_weight=kl_weight, warm_up=warm_up,
        draws_per_batch=draws_per_batch, stratified=stratified,
        schedule=schedule if isinstance(schedule, str) else _named(schedule),
        weight_decay=weight_decay, gradient_clip=gradient_clip, accumulate=accumulate, patience=patience,
        criterion=None if criterion is None else _named(criterion), removal=removal, min_kept=min_kept,
        freeze_weights=freeze_weights, keep_best=keep_best, seed=seed, precision=precision, elbo=elbo,
    )  # fmt: skip
    _check_settings(settings, schedule, criterion, keep_checkpoints)
    _check_surroundings(checkpoints, label, logger)
    check_devices(device, devices, precision)
    check_programs(model, guide, criterion)
    home = next(model.parameters()).device
    for name, data in (("train", train), ("validation", validation)):
        if data is not None:
            Batches(data, batch_size, home, name)
    task = Task(
        model, guide, train, validation, settings, schedule,
        criterion, None if checkpoints is None else Path(checkpoints), keep_checkpoints, overwrite, label,
        progress, validate,
    )  # fmt: skip
    fabric = open_fabric(device, devices, precision, home, logger)
    elsewhere = fabric.world_size > 1 and not started_by_torchrun()
    if elsewhere and guide is not None:
        # its parameters come into being here, where the caller's guide is, and travel with it
        with isolated(seed, validate=False), in_mode(model, training=False):
            guide(*Batches(train, batch_size, home, "train").first())
    from safetensors.torch import load

    run: Callable[..., tuple[Fit, bytes]] = _run
    with passing_on_signals() if elsewhere else nullcontext(), _own_errors():
        result, state = fabric.launch(run, _Parcel(task), elsewhere)
    if elsewhere:
        with isolated(seed, validate=False):
            restore(model, guide, load(state))
        if isinstance(guide, AutoTruncatedLogNormal):
            guide.kl_weight = float(kl_weight)
    fitted: Fit = result
    return fitted


class _Parcel:
    """What Fabric's launcher must not look into: it takes dataclasses apart."""

    def __init__(self, content: Task) -> None:
        self.content = content


def _run(fabric: Fabric, parcel: _Parcel, elsewhere: bool) -> tuple[Fit, bytes]:
    """The fit in one process; with the tensors that it ended with where another process asked for them."""
    from safetensors.torch import save

    task = parcel.content
    if elsewhere:
        _unshare(task.model, task.guide)
    with isolated(task.settings["seed"], validate=task.validate):
        loop = Loop(fabric, task)
        loop.run()
    result = Fit(
        history=pd.DataFrame(loop.state.history, columns=HISTORY_COLUMNS),
        removals=pd.DataFrame(loop.state.removals, columns=LEDGER_COLUMNS),
        settings=task.settings,
        best_epoch=loop.kept_epoch,
        interrupted=loop.interrupted,
        stopped_early=loop.stopped_early,
    )
    if not elsewhere:
        return result, b""
    # as bytes: a tensor would be lost with the memory of the process that sends it
    return result, save({name: t.cpu().contiguous() for name, t in state_of(task.model, task.guide).items()})


@contextmanager
def _own_errors() -> Iterator[None]:
    """An error of one of the processes as what it was there, where it is one that `fit` raises."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    try:
        yield
    except ProcessExitedException as error:
        raise _died(error.signal_name or f"exit status {error.exit_code}") from error
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        for kind in (FloatingPointError, ValueError, TypeError):
            if last.startswith(f"{kind.__name__}: "):
                raise kind(last.removeprefix(f"{kind.__name__}: ")) from error
        if "onnection closed by peer" in last or "onnection reset by peer" in last:
            # what another process says that waited for it, where it is the first to say anything
            raise _died("its system") from error
        raise


def _died(by: str) -> RuntimeError:
    return RuntimeError(
        f"one of the processes of the fit was ended by {by} (from outside, or for want of memory); the others are "
        "stopped too. With checkpoints, the same call goes on from the last of them"
    )


def _check_surroundings(checkpoints: object, label: object, logger: object) -> None:
    if checkpoints is not None:
        if not isinstance(checkpoints, str | Path):
            raise TypeError(f"checkpoints must be a folder or None: got {checkpoints!r}")
        check_folder("checkpoints", Path(checkpoints))
    if not isinstance(label, str):
        raise TypeError(f"label must be text: got {label!r}")
    for one in logger if isinstance(logger, list) else [logger]:
        if one is not None and not hasattr(one, "log_metrics"):
            raise TypeError(
                f"logger must be one of lightning-fabric's loggers, or a list of them: got {one!r}"
            )


def _unshare(*programs: Callable[..., Any] | None) -> None:
    """Give this process tensors of its own: what is sent to several processes lies in memory they share."""
    for program in programs:
        if isinstance(program, nn.Module):
            for tensor in (*program.parameters(), *program.buffers()):
                tensor.data = tensor.data.clone()


def _named(value: object) -> str:
    """What to call a criterion or a schedule: the same in every process, so without an address."""
    text = str(value)
    if " at 0x" not in text:
        return text
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_settings(
    settings: dict[str, Any], schedule: object, criterion: object, keep_checkpoints: object
) -> None:
    """One line per bad argument, before anything is touched."""
    whole = {**settings, "keep_checkpoints": keep_checkpoints}
    for name in ("epochs", "batch_size", "min_kept", "accumulate", "keep_checkpoints"):
        if not _whole(whole[name], 1):
            raise ValueError(f"{name} must be a positive integer: got {whole[name]!r}")
    for name in ("stratified", "freeze_weights", "keep_best"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} must be True or False: got {settings[name]!r}")
    for name in ("draws_per_batch", "patience"):
        if settings[name] is not None and not _whole(settings[name], 1):
            raise ValueError(f"{name} must be a positive integer or None: got {settings[name]!r}")
    for name in ("learning_rate", "posterior_learning_rate", "kl_weight", "weight_decay"):
        if not _finite(settings[name]) or settings[name] < 0:
            raise ValueError(f"{name} must be finite and not negative: got {settings[name]!r}")
    clip = settings["gradient_clip"]
    if clip is not None and (not _finite(clip) or clip <= 0):
        raise ValueError(f"gradient_clip must be positive and finite, or None: got {clip!r}")
    if not _finite(settings["warm_up"]) or not 0 <= settings["warm_up"] <= 1:
        raise ValueError(f"warm_up must be a share of the epochs in [0, 1]: got {settings['warm_up']!r}")
    if not _whole(settings["seed"], 0):
        raise ValueError(f"seed must be an integer of 0 or more: got {settings['seed']!r}")
    for name, allowed in (("removal", ("end", "epoch", "mask")), ("elbo", ELBOS)):
        if settings[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}: got {settings[name]!r}")
    if not callable(schedule) and (not isinstance(schedule, str) or schedule not in SCHEDULES):
        raise ValueError(f"schedule must be one of {tuple(SCHEDULES)} or a function: got {schedule!r}")
    if criterion is not None:
        check_criterion(criterion)
    elif settings["removal"] != "end":
        raise ValueError(f'criterion must be given for removal="{settings["removal"]}"')


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


HISTORY_COLUMNS = [
    "phase", "epoch", "loss", "log_likelihood", "kl", "kl_weight", "validation_loss",
    "validation_accuracy", "kept", "parameters", "seconds",
]  # fmt: skip
