"""The loop of a fit over epochs and batches, in one process, and its state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmrs.files import held
from pyro_bmrs.fitting.checkpoints import LEDGER_COLUMNS, Checkpoints, FitState, digest_of
from pyro_bmrs.fitting.epochs import Measure
from pyro_bmrs.fitting.generators import generator_states, seed_of, set_generators
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.fitting.optimizer import load_optimizer, make_optimizer, optimizer_tensors, set_rates
from pyro_bmrs.fitting.posterior_file import restore, state_of
from pyro_bmrs.fitting.programs import (
    check_batches_apart,
    check_examples_apart,
    check_latents,
    check_local,
    check_parameters,
    speaks_for_the_data_set,
)
from pyro_bmrs.fitting.progress import EpochProgress
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.fitting.signals import StopRequest, stop_requests
from pyro_bmrs.fitting.stages import Rise, Stages
from pyro_bmrs.fitting.step import Step, check_step
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.sites import read_sites
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.hooked_noise import hooked_noise, network_of
from pyro_bmrs.networks.inputs import tensors_of
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.structures import check_weights
from pyro_bmrs.pruning.binding import input_of
from pyro_bmrs.pruning.shrink import shrink

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# How many steps lie between two occasions at which several processes agree whether to stop.
_STEPS_BETWEEN_AGREEMENTS = 16
# Settings that say how steps are taken, and not what they do.
HOW = {"cuda_graph", "compile"}
# Seconds after which the losses of steps on an accelerator are read.
_BETWEEN_READINGS = 0.5


@dataclass
class Task:
    """The arguments of `fit`, checked."""

    model: nn.Module
    guide: Callable[..., Any] | None
    train: Batches
    validation: Batches | None
    settings: Settings
    checkpoints: Path | None
    keep_checkpoints: int
    overwrite: bool
    label: str
    progress: bool
    validate: bool


@contextmanager
def isolated(seed: int, *, validate: bool) -> Iterator[None]:
    """A context that leaves no trace in the process. Its parameter store is empty: names of others can't clash."""
    with untouched(seed=seed, gradients=True), pyro.get_param_store().scope():
        pyro.enable_validation(validate)
        yield


class Loop:
    """One fit in one process.

    Attributes:
        state: how far the fit has come.
        kept_epoch: the epoch whose parameters the model has at the end.
        interrupted, stopped_early: how the fit ended.
    """

    def __init__(self, fabric: Fabric, task: Task) -> None:
        self.fabric, self.task = fabric, task
        self.model, self.guide, self.settings = task.model, task.guide, task.settings
        self.state = FitState()
        self.interrupted = self.stopped_early = False
        self.kept_epoch = 0
        home = fabric.device
        self.batches = task.train.shared(home, fabric.global_rank, fabric.world_size)
        held_out = None if task.validation is None else task.validation.shared(home, 0, 1)
        self.first = self.batches.first()
        self.model.to(home)
        if isinstance(self.guide, nn.Module):
            self.guide.to(home)
        if self.guide is not None:
            with in_mode(self.model, training=False):
                self.guide(*self.first)  # creates its parameters, on the model's device
            check_parameters(self.model, self.guide, self.first)
        self.objective = self._objective(held_out)
        check_step(fabric, self.model, self.objective.elbo, self.settings)
        self.step: Step | None = None
        self.measure = Measure(
            self.model, self.guide, self.settings, self.first, self.batches.size, held_out,
            self.objective.local_sites,
        )  # fmt: skip
        self.checkpoints = None
        if task.checkpoints is not None:
            self.checkpoints = Checkpoints(task.checkpoints, task.keep_checkpoints, self._identity())
        self.optimizer = make_optimizer(self.model, self.guide, self.settings)
        self.best = state_of(self.model, self.guide)
        self.rise: Rise | None = None
        self.stages: Stages | None = None
        if self.settings.kl_weight == "auto":
            self.rise = Rise.of(self.settings, self.batches.size)

    # set-up -----------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What makes this fit this one and no other: a checkpoint of another is refused."""
        settings, held_out = self.settings, self.measure.held_out
        return {
            **settings.model_dump(mode="json", include=set(Settings.model_fields) - HOW), "phase": self.measure.phase,
            "examples": self.batches.size, "batches": len(self.batches),
            "validation_examples": 0 if held_out is None else held_out.size,
            "processes": self.fabric.world_size,
            # Each process has its own first batch; that of the first process stands for all.
            "first_batch": self.fabric.broadcast(digest_of(tensors_of(self.first))), "label": self.task.label,
            "schedule": [settings.rate_factor(step / 16) for step in range(17)],
        }  # fmt: skip

    def _objective(self, held_out: Batches | None) -> Objective:
        settings, (x, y) = self.settings, self.first
        one = any(noise.for_the_batch for noise in hooked_noise(self.model).values())
        draws = 1 if one else settings.draws_per_batch
        with in_mode(self.model, training=False):
            with torch.no_grad():
                trace = poutine.trace(self.model).get_trace(x, y)
                self.batches.count.settle(x, y, trace)
                if held_out is not None:  # unsuitable validation data are refused before the first step
                    given = held_out.first()
                    held_out.count.settle(*given, poutine.trace(self.model).get_trace(*given))
            examples, sites = self.batches.count(x, y), read_sites(trace)
            check_latents(self.model, self.guide, self.first, sites)
            if noise_layers(self.model):
                check_weights(network_of(self.model), lambda: input_of(self.model, self.first))
            local = sites.local(examples)
            check_local(self.guide, local, self.batches)
            check_batches_apart(self.model, self.first, sites, self.batches)
            if draws is None or draws > 1:
                check_examples_apart(self.model, self.first, sites, examples)
            return Objective(
                self.model, self.guide, self.first, count=self.batches.count, dataset_size=self.batches.size,
                draws=None if draws is None else max(draws // self.fabric.world_size, 1),
                stratified=settings.stratified, elbo=settings.elbo, validate=self.task.validate,
                scaled=speaks_for_the_data_set(sites, examples, self.batches.size),
                local_sites=local,
            )  # fmt: skip

    def _wrap(self) -> None:
        """Make the step. Called again when tensors have changed their shapes."""
        if self.step is not None:
            self.step.close()
        self.step = Step(
            self.fabric, self.objective, self.optimizer, self.settings, self.first, len(self.batches)
        )

    # the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all epochs, and put back the parameters of the best."""
        for _ in self.epochs():
            pass
        self.kept_epoch = self.state.epoch
        if self.stages is not None and len(self.stages):
            chosen = self.stages.choice()
            self.stages.restore(chosen)
            self.kept_epoch = self.stages.epoch(chosen)
        elif self.settings.keep_best or self.interrupted:
            restore(self.model, self.guide, self.best)
            self.kept_epoch = self.state.best_epoch
        self.stopped_early = self.state.finished and self.state.epoch < self.settings.epochs

    def epochs(self) -> Iterator[int]:
        """Run the epochs that the newest checkpoint, if any, has not seen; yields the number of each."""
        show = self.task.progress and self.fabric.is_global_zero
        with ExitStack() as stack:
            stack.enter_context(self._frozen())
            if self.checkpoints is not None and self.fabric.is_global_zero:
                stack.enter_context(held("checkpoints", self.checkpoints.folder))
            stop = stack.enter_context(stop_requests())
            resumed = self._resume()
            if self.rise is not None:
                measure, folder = self.measure, None if self.checkpoints is None else self.checkpoints.folder
                assert measure.held_out is not None
                self.stages = Stages(self.model, self.guide, measure.plan, measure.held_out, folder)
                self.fabric.barrier()  # all have read what is there
                self.stages.forget_after(self.state.epoch, write=self.fabric.is_global_zero)
                self.stages.plan().parameters_left()  # what can't be cut is refused before the first step
            for row in self.state.history:
                self._log(row)
            self._wrap()
            assert self.step is not None
            stack.callback(self.step.close)
            display = stack.enter_context(
                EpochProgress(self.measure.phase, self.settings.epochs, len(self.batches), enabled=show)
            )
            display.resume(self.state.epoch * len(self.batches) + self.state.batch)
            while not self.state.finished and not self.interrupted:
                try:
                    self._epoch(stop, display, resumed)
                except KeyboardInterrupt:
                    self.interrupted = True
                except Exception:
                    restore(self.model, self.guide, self.best)
                    raise
                resumed = {}
                yield self.state.epoch

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Training mode. With `freeze_weights` weights get no gradients, and BatchNorm's statistics stay."""
        freeze = self.settings.freeze_weights
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        if freeze:
            self.model.requires_grad_(False)
        try:
            with in_mode(self.model, training=not freeze):
                yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def _epoch(self, stop: StopRequest, display: EpochProgress, resumed: Mapping[str, Tensor]) -> None:
        """Run the rest of an epoch; `resumed` has the generators' states if it was left in the middle."""
        begin = time.perf_counter()
        state, settings, fabric = self.state, self.settings, self.fabric
        epoch, count = state.epoch + 1, len(self.batches)
        kl_weight = self._kl_weight(epoch)
        if self.guide is not None:
            self.guide.kl_weight = kl_weight  # type: ignore[attr-defined]
        torch.manual_seed(seed_of(settings.seed, epoch, fabric.global_rank))
        order = torch.Generator().manual_seed(seed_of(settings.seed, epoch, "order"))
        # latents of single examples belong to places in the batch; a whole may be a series, whose order says something
        ordered = self.objective.local_sites or count == 1
        batches = self.batches.epoch(None if ordered else order, start=state.batch)
        if resumed:
            set_generators(resumed, fabric)
        total, ramp = settings.epochs * count, 1.0
        unread: list[tuple[Tensor, float]] = []
        read = time.monotonic()
        assert self.step is not None
        for x, y, weight, share in batches:
            number = state.epoch * count + state.batch
            if self.guide is not None:
                ramp = settings.kl_factor(number, total)
            set_rates(self.optimizer, settings.rate_factor(number / total))
            values = self.step(x, y, kl_weight * ramp, weight, state.batch)
            unread.append((values, self.batches.count(x, y) * share))
            state.batch += 1
            display.step()
            stops = state.batch < count and self._is_time_to_stop(stop, number)
            late = time.monotonic() - read > _BETWEEN_READINGS
            if self.reads_at_once or late or stops:
                self._read(unread)
                unread, read = [], time.monotonic()
            if stops:
                self.interrupted = True
                self.measure.check_finite(epoch, state.best_epoch)
                self._save()
                return
        if unread:
            self._read(unread)
        self._finish_epoch(epoch, ramp, begin, display)
        self.interrupted = self._is_time_to_stop(stop, 0)

    def _kl_weight(self, epoch: int) -> float:
        """Of an epoch, from 1, after the warm-up."""
        if self.rise is not None:
            return self.rise.kl_weight(epoch)
        assert not isinstance(self.settings.kl_weight, str)
        return self.settings.kl_weight

    @property
    def reads_at_once(self) -> bool:
        """Whether each loss is read at once. Who waits for an accelerator keeps it waiting for the next step."""
        return self.fabric.device.type == "cpu"

    def _read(self, unread: list[tuple[Tensor, float]]) -> None:
        """Read what steps have found, all in one synchronisation with an accelerator.

        Raises:
            FloatingPointError: for a loss that is not finite.
        """
        found = torch.stack([values for values, _ in unread]).tolist()
        for (value, likelihood), (_, examples) in zip(found, unread, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss became {value} at batch {len(self.state.steps) + 1} of epoch {self.state.epoch + 1}; the "
                    f"parameters of epoch {self.state.best_epoch} are back in place. Lower learning_rate, or look for "
                    "NaN in the data"
                )
            self.state.steps.append((value, likelihood, examples))

    def _is_time_to_stop(self, stop: StopRequest, step: int) -> bool:
        """Whether any process was asked to stop. False between two steps of the optimiser."""
        if self.state.batch % self.settings.accumulate:
            return False
        if self.fabric.world_size == 1:
            return stop.asked
        if step % _STEPS_BETWEEN_AGREEMENTS:
            return False
        return float(self._summed(torch.tensor(float(stop.asked)))) > 0

    # the end of an epoch ----------------------------------------------------------------------------

    def _finish_epoch(self, epoch: int, ramp: float, begin: float, display: EpochProgress) -> None:
        state, settings = self.state, self.settings
        self._share_buffers()
        self.measure.check_finite(epoch, state.best_epoch)
        self.batches.check_whole(sum(examples for *_, examples in state.steps))
        loss, likelihood = self._means()
        state.epoch, state.batch, state.steps = epoch, 0, []
        removed = self._remove(epoch) if settings.removal == "epoch" and ramp >= 1.0 else []
        if removed:  # there is no way back to parameters of more structures, whatever happens next
            state.best_epoch, self.best = epoch, state_of(self.model, self.guide)
        row = self.measure.row(epoch, loss, likelihood, self._kl_weight(epoch) * ramp)
        if self.rise is not None and self.rise.ends(epoch):
            self._add_stage(epoch)
        row["seconds"] = time.perf_counter() - begin
        state.history.append(row)
        # The objective changes during the warm-up, with the weight, and at a removal: earlier scores do not count.
        changes = ramp < 1.0 or self.rise is not None
        score = math.inf if changes else self.measure.score(row)
        if changes or removed or score < state.best_score or not state.best_epoch:
            state.best_score = score
            state.best_epoch = epoch
            self.best = state_of(self.model, self.guide)
        patience = settings.patience
        waited = patience is not None and epoch - state.best_epoch >= patience
        state.finished = waited or epoch == settings.epochs
        if self.checkpoints is not None and removed and self.fabric.is_global_zero:
            self.checkpoints.append_to_ledger(removed)
        self._save()
        self._log(row)
        display.epoch(row)

    def _add_stage(self, epoch: int) -> None:
        """Keep model and guide as they are after an epoch, with what the reduced model loses."""
        assert self.rise is not None
        assert self.stages is not None
        row = self.fabric.broadcast(self.stages.measured())
        row |= {"stage": self.rise.stage(epoch), "epoch": epoch, "kl_weight": self.rise.kl_weight(epoch)}
        self.stages.add(row, write=self.fabric.is_global_zero)

    def _log(self, row: Mapping[str, Any]) -> None:
        """Give the loggers the numbers of a row, and have them written at once."""
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        self.fabric.log_dict(numbers, step=row["epoch"])
        for logger in self.fabric.loggers:
            logger.save()

    def _means(self) -> tuple[float, float]:
        """(loss, log-likelihood) per example over the epoch, of all processes."""
        steps = torch.tensor(self.state.steps, dtype=torch.float64)  # (batches, 3)
        examples = steps[:, 2]
        totals = torch.stack([steps[:, 0] @ examples, steps[:, 1] @ examples, examples.sum()])
        loss, likelihood, seen = self._summed(totals).tolist()
        return loss / seen, likelihood / seen

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        total = self.fabric.all_reduce(tensor.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _share_buffers(self) -> None:
        """Give all processes the BatchNorm statistics of the first."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    # removal ----------------------------------------------------------------------------------------

    def _remove(self, epoch: int) -> list[dict[str, Any]]:
        """Remove what the criterion removes from model, guide and optimiser; returns a row for each structure."""
        assert isinstance(self.guide, AutoTruncatedLogNormal)
        plan = self.measure.plan()
        # Each process computes the same up to rounding. The first decides.
        plan = replace(plan, table=self.fabric.broadcast(plan.table))
        removed = plan.table[plan.table.removed & ~plan.table.removed_in_fit]
        if removed.empty:
            return []
        rows: list[Any] = removed.assign(epoch=epoch)[LEDGER_COLUMNS].to_dict("records")
        self.state.removals += rows
        layers = noise_layers(self.model)
        kept = {site: plan.kept_mask(site).to(layer.kept.device) for site, layer in layers.items()}
        shrink(self.model, self.guide, kept, self.optimizer, input_of(self.model, self.first))
        self._wrap()
        return rows

    # checkpoints ------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        generators = generator_states(self.fabric) if self.state.batch else {}
        if self.fabric.is_global_zero:
            tensors = state_of(self.model, self.guide) | optimizer_tensors(self.optimizer) | generators
            self.checkpoints.save(self.state, tensors)

    def _resume(self) -> dict[str, Tensor]:
        """Go on from the newest checkpoint that can be read; returns its generators' states."""
        if self.checkpoints is None:
            return {}
        if self.task.overwrite and self.fabric.is_global_zero:
            self.checkpoints.clear_unless_unfinished()
        self.fabric.barrier()
        generators: dict[str, Tensor] = {}
        for path, progress, tensors in self.checkpoints.newest():
            try:
                restore(self.model, self.guide, tensors)
                self.optimizer = make_optimizer(self.model, self.guide, self.settings)
                load_optimizer(self.optimizer, tensors)
            except ValueError as error:
                with suppress(ValueError):  # back to what was given, but for structures removed meanwhile
                    restore(self.model, self.guide, self.best)
                raise ValueError(f"checkpoint {path} belongs to another network: {error}") from None
            self.best = self.checkpoints.of_best(progress, tensors) if progress.best_epoch else self.best
            self.state = progress
            generators = {name: t for name, t in tensors.items() if name.startswith("generator.")}
            break
        if self.fabric.is_global_zero:
            self.checkpoints.start_ledger(self.state.removals)
        return generators
