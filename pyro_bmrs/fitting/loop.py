"""The loop over epochs and batches of one process of a fit, and all of its state."""

from __future__ import annotations

import hashlib
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
from torch.distributions import kl_divergence

from pyro_bmrs.files import held
from pyro_bmrs.fitting.checkpoints import Checkpoints, Progress
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.fitting.posterior_file import restore, state_of
from pyro_bmrs.fitting.programs import check_parameters, local_sites_of, speaks_for_the_data_set
from pyro_bmrs.fitting.progress import EpochProgress
from pyro_bmrs.fitting.resuming import generator_states, load_optimizer, optimizer_tensors, set_generators
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.fitting.signals import StopRequest
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.posteriors import read_posterior
from pyro_bmrs.inference.predict import posterior_point
from pyro_bmrs.inference.traces import elementary
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import tensors_of
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.binding import input_of
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.reduce import reduce_structures
from pyro_bmrs.pruning.shrink import shrink

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Processes agree on whether to stop once in so many steps.
_STEPS_BETWEEN_AGREEMENTS = 16


@dataclass
class Task:
    """What `fit` was asked for: its arguments, checked."""

    model: nn.Module
    guide: Callable[..., Any] | None
    train: Data
    validation: Data | None
    settings: Settings
    checkpoints: Path | None
    keep_checkpoints: int
    overwrite: bool
    label: str
    progress: bool
    validate: bool


@contextmanager
def isolated(seed: int, *, validate: bool) -> Iterator[None]:
    """Nothing leaks to the process; the parameter store is empty, as others' parameters may have the same names."""
    with untouched(seed=seed, gradients=True), pyro.get_param_store().scope():
        pyro.enable_validation(validate)
        yield


class Loop:
    """One fit in one process: what it works on, its state, and its steps.

    Attributes:
        state: how far it has come.
        kept_epoch: the epoch whose parameters the model has at the end.
        interrupted, stopped_early: how it ended.
    """

    def __init__(self, fabric: Fabric, task: Task) -> None:
        self.fabric, self.task = fabric, task
        self.model, self.guide, self.settings = task.model, task.guide, task.settings
        self.phase = "fit" if task.guide is not None else "fine-tune"
        self.state = Progress()
        self.interrupted = self.stopped_early = False
        self.kept_epoch = 0
        settings, home, (rank, world) = task.settings, fabric.device, (fabric.global_rank, fabric.world_size)
        size = settings.batch_size
        self.batches = Batches(task.train, size, home, "train", rank=rank, world=world)
        self.held_out = (
            None if task.validation is None else Batches(task.validation, 1000, home, "validation")
        )
        self.first = self.batches.first()
        self.model.to(home)
        if isinstance(self.guide, nn.Module):
            self.guide.to(home)
        if self.guide is not None:
            with in_mode(self.model, training=False):
                self.guide(*self.first)  # parameters come into being, where the model's are
            check_parameters(self.model, self.guide, self.first)
        countable = isinstance(self.guide, AutoTruncatedLogNormal)
        self.criterion = settings.made_criterion() if countable else None
        self.checkpoints = None
        if task.checkpoints is not None:
            identity = {
                **settings.model_dump(mode="json", include=set(Settings.model_fields)), "phase": self.phase,
                "examples": self.batches.size, "batches": len(self.batches),
                "validation_examples": 0 if self.held_out is None else self.held_out.size, "processes": world,
                # each process has its own share of it: that of the first stands for all
                "first_batch": fabric.broadcast(_digest(self.first)), "label": task.label,
                "schedule": [settings.rate_factor(step / 16) for step in range(17)],
            }  # fmt: skip
            self.checkpoints = Checkpoints(task.checkpoints, task.keep_checkpoints, identity)
        self.objective = self._objective()
        self.optimizer = self._optimizer()
        self.best = state_of(self.model, self.guide)
        self.module: nn.Module = self.objective

    # set-up -----------------------------------------------------------------------------------------

    def _objective(self) -> Objective:
        settings, (x, y) = self.settings, self.first
        with torch.no_grad(), in_mode(self.model, training=False):
            trace = poutine.trace(self.model).get_trace(x, y)
            if self.held_out is not None:  # one that does not fit the model is refused before the first step
                poutine.trace(self.model).get_trace(*self.held_out.first())
        scaled = speaks_for_the_data_set(trace, len(y), self.batches.size)
        draws, world = settings.draws_per_batch, self.fabric.world_size
        elbo = "checked" if settings.elbo == "auto" and self.task.validate else settings.elbo
        with in_mode(self.model, training=False):
            return Objective(
                self.model, self.guide, self.first, dataset_size=self.batches.size,
                draws=None if draws is None else max(draws // world, 1), stratified=settings.stratified,
                elbo=elbo, scaled=scaled, local_sites=local_sites_of(trace, len(y)),
            )  # fmt: skip

    def _optimizer(self) -> torch.optim.Optimizer:
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.settings.freeze_weights:
            weights = []
        # what the model has beside its layers, such as a Regressor's noise scale, is no weight
        beside = set(self.model.parameters(recurse=False))
        guide = self.guide.parameters() if isinstance(self.guide, nn.Module) else ()
        parts: dict[Any, list[nn.Parameter]] = {
            "others": [p for p in weights if p in beside],
            "weights": [p for p in weights if p not in beside],
            "posterior": list(guide),
        }
        groups = [
            {"of": of, "params": parameters, **self.settings.optimizer_options(of)}
            for of, parameters in parts.items()
            if parameters
        ]
        if not groups:
            raise ValueError("there is nothing to fit: no parameter requires a gradient")
        for group in groups:
            group["given_lr"] = group["lr"]
        return torch.optim.AdamW(groups, fused=True)

    def _wrap(self) -> None:
        """Let several processes share the gradients; anew where tensors have changed their shapes."""
        if self.fabric.world_size > 1:
            self.module = self.fabric.strategy.setup_module(self.objective)

    # the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """All epochs, and the parameters of the best of them."""
        for _ in self.epochs():
            pass
        self.kept_epoch = self.state.epoch
        if self.settings.keep_best or self.interrupted:
            restore(self.model, self.guide, self.best)
            self.kept_epoch = self.state.best_epoch
        self.stopped_early = self.state.finished and self.state.epoch < self.settings.epochs

    def epochs(self) -> Iterator[int]:
        """One epoch after the other, from the newest checkpoint on where there is one; yields their numbers."""
        show = self.task.progress and self.fabric.is_global_zero
        with ExitStack() as stack:
            stack.enter_context(self._frozen())
            if self.checkpoints is not None and self.fabric.is_global_zero:
                stack.enter_context(held("checkpoints", self.checkpoints.folder))
            stop = stack.enter_context(StopRequest())
            resumed = self._resume()
            if self.guide is not None:
                self.guide.kl_weight = self.settings.kl_weight  # type: ignore[attr-defined]
            for row in self.state.history:
                self._log(row)
            self._wrap()
            display = stack.enter_context(
                EpochProgress(self.phase, self.settings.epochs, len(self.batches), enabled=show)
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
        """In training mode; with `freeze_weights` no gradient is made for weights, and no statistic moves."""
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
        """What is left of an epoch; `resumed` has the state of the generators in the middle of one."""
        begin = time.perf_counter()
        state, settings, fabric = self.state, self.settings, self.fabric
        epoch, count = state.epoch + 1, len(self.batches)
        torch.manual_seed(_mixed(settings.seed, epoch, fabric.global_rank))
        order = torch.Generator().manual_seed(_mixed(settings.seed, epoch, "order"))
        batches = self.batches.epoch(order, start=state.batch)
        if resumed:
            set_generators(resumed, fabric.global_rank, fabric.device)
        total, ramp = settings.epochs * count, 1.0
        for x, y, weight, examples in batches:
            step = state.epoch * count + state.batch
            if self.guide is not None:  # there is a KL to warm up
                ramp = settings.kl_factor(step, total)
            self._set_rates(settings.rate_factor(step / total))
            with fabric.autocast():
                loss, likelihood = self.module(x, y, settings.kl_weight * ramp)
            # one synchronisation with an accelerator for both
            value, likelihood = (
                float(number) for number in torch.stack([loss.detach(), likelihood]).tolist()
            )
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss became {value} at batch {state.batch + 1} of epoch {epoch}; the parameters of epoch "
                    f"{state.best_epoch} are back in place. Lower learning_rate, or look for NaN in the data"
                )
            state.batch += 1
            self._step(loss * weight, last=state.batch == count)
            state.steps.append((value, likelihood, examples))
            display.step()
            if state.batch < count and self._is_time_to_stop(stop, step):
                self.interrupted = True
                self._check_finite(epoch)
                self._save()
                return
        self._finish_epoch(epoch, ramp, begin, display)
        self.interrupted = self._is_time_to_stop(stop, 0)

    def _step(self, loss: Tensor, *, last: bool) -> None:
        """Gradients of a batch, and a step where as many as `accumulate` are together."""
        accumulate, done = self.settings.accumulate, self.state.batch
        due = last or done % accumulate == 0
        if accumulate > 1:  # the last ones of an epoch may be fewer
            begun = (done - 1) // accumulate * accumulate
            loss = loss / min(accumulate, len(self.batches) - begun)
        if due or self.fabric.world_size == 1:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            with self.module.no_sync():  # type: ignore[operator]
                loss.backward()  # type: ignore[no-untyped-call]
        if not due:
            return
        if self.settings.gradient_clip is not None:
            for of in (("others", "weights"), ("posterior",)):
                groups = [group for group in self.optimizer.param_groups if group["of"] in of]
                parameters = [parameter for group in groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["given_lr"] * factor

    def _is_time_to_stop(self, stop: StopRequest, step: int) -> bool:
        """Whether this process, or of several any, was asked to stop, between two steps of the optimiser."""
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
        self._check_finite(epoch)
        loss, likelihood = self._means()
        state.epoch, state.batch, state.steps = epoch, 0, []
        removed = self._remove(epoch) if settings.removal == "epoch" and ramp >= 1.0 else []
        if removed:  # whatever happens from here on, there is no way back to what had more structures
            state.best_epoch, self.best = epoch, state_of(self.model, self.guide)
        row = self._row(epoch, loss, likelihood, settings.kl_weight * ramp)
        row["seconds"] = time.perf_counter() - begin
        state.history.append(row)
        score = self._score(row)
        # during the warm-up the objective is another one; a removal changes it again
        if ramp < 1.0 or removed or score < state.best_score or not state.best_epoch:
            state.best_score = math.inf if ramp < 1.0 else score
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

    def _log(self, row: Mapping[str, Any]) -> None:
        """A line for the loggers, of what they can plot, on disk at once."""
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

    def _row(self, epoch: int, loss: float, likelihood: float, weight: float) -> dict[str, Any]:
        validation = (math.nan, math.nan)
        if self.held_out is not None:
            validation = evaluate(self.model, self.held_out, self._scales())
        return {
            "phase": self.phase,
            "epoch": epoch,
            "loss": loss,
            "log_likelihood": likelihood,
            "kl": self._kl(),
            "kl_weight": weight if self.guide is not None else math.nan,
            "validation_loss": validation[0],
            "validation_accuracy": validation[1],
            "kept": self._kept(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    def _score(self, row: Mapping[str, Any]) -> float:
        """What the best epoch has least of."""
        if self.held_out is None:  # the training loss has its KL inside
            return float(row["loss"])
        if self.guide is None:
            accuracy = row["validation_accuracy"]
            return float(row["validation_loss"] if math.isnan(accuracy) else -accuracy)
        penalty = 0.0 if math.isnan(row["kl"]) else self.settings.kl_weight * row["kl"] / self.batches.size
        return float(row["validation_loss"] + penalty)

    def _share_buffers(self) -> None:
        """Statistics that each process gathered on its own examples become those of the first."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _check_finite(self, epoch: int) -> None:
        """The last step of an epoch has no loss behind it that would tell."""
        for module in (self.model, self.guide):
            for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
                bad = torch.nonzero(~torch.isfinite(parameter))
                if len(bad):
                    place = ", ".join(map(str, bad[0].tolist()))
                    raise FloatingPointError(
                        f"parameter {name}[{place}] is not finite after epoch {epoch}; the parameters of epoch "
                        f"{self.state.best_epoch} are back in place. Lower learning_rate"
                    )

    def _scales(self) -> dict[str, Tensor]:
        if self.guide is None:
            return {}
        return posterior_point(self.guide, *self.first, without=self.objective.local_sites)

    def _kl(self) -> float:
        """KL of the noise sites over the whole data set, in nats, unweighted."""
        if self.guide is None:
            return math.nan
        posterior = read_posterior(self.guide, *self.first)
        layers = noise_layers(self.model)
        with torch.no_grad():
            return sum(
                float((kl_divergence(posterior[site], elementary(layer.prior())) * layer.kept).sum())
                for site, layer in layers.items()
                if site in posterior
            )

    def _kept(self) -> float:
        """How many structures `reduce` would keep; NaN where they can't be counted."""
        if self.criterion is None:
            return math.nan
        if self.settings.removal == "epoch":
            return sum(int(layer.kept.sum()) for layer in noise_layers(self.model).values())
        try:
            return int(self._plan().widths().after.sum())
        except Exception:
            if "criterion" in self.settings.model_fields_set:
                raise
            return math.nan  # a count that nobody asked for ends no fit

    # removal ----------------------------------------------------------------------------------------

    def _plan(self) -> NetworkPlan:
        assert self.criterion is not None
        assert self.guide is not None
        return reduce_structures(self.model, self.guide, self.criterion, min_kept=self.settings.min_kept)

    def _remove(self, epoch: int) -> list[dict[str, Any]]:
        """Take out what the criterion removes; returns a row for each."""
        assert isinstance(self.guide, AutoTruncatedLogNormal)
        # decided once: what is equal on all processes is still computed on each
        plan = self._plan()
        table = self.fabric.broadcast(plan.table)
        plan = replace(plan, table=table)
        removed = table[table.removed & ~table.removed_in_fit]
        if removed.empty:
            return []
        rows = [
            {
                "epoch": epoch,
                **{name: row[name] for name in ("layer", "unit", "score", "log_evidence_change")},
            }
            for row in removed.to_dict("records")
        ]
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
        generators = self._generators() if self.state.batch else {}
        if self.fabric.is_global_zero:
            tensors = state_of(self.model, self.guide) | optimizer_tensors(self.optimizer) | generators
            self.checkpoints.save(self.state, tensors)

    def _generators(self) -> dict[str, Tensor]:
        """The generators' states of all processes, to go on in the middle of an epoch."""
        state = generator_states(self.fabric.device)
        if self.fabric.world_size == 1:
            return {f"{name}.0": tensor for name, tensor in state.items()}
        gathered: list[dict[str, Tensor]] = [{} for _ in range(self.fabric.world_size)]
        torch.distributed.all_gather_object(gathered, state)
        return {f"{name}.{rank}": t for rank, one in enumerate(gathered) for name, t in one.items()}

    def _resume(self) -> dict[str, Tensor]:
        """Take up the newest checkpoint that can be; returns its generators' states."""
        fabric = self.fabric
        if self.checkpoints is None:
            return {}
        if self.task.overwrite and fabric.is_global_zero:
            self.checkpoints.clear_unless_unfinished()
        fabric.barrier()
        for path, progress, tensors in self.checkpoints.newest():
            try:
                restore(self.model, self.guide, tensors)
                self.optimizer = self._optimizer()
                load_optimizer(self.optimizer, tensors)
            except ValueError as error:
                with suppress(ValueError):  # as it was given; structures that have left stay away
                    restore(self.model, self.guide, self.best)
                raise ValueError(f"checkpoint {path} belongs to another network: {error}") from None
            self.best = self.checkpoints.of_best(progress, tensors) if progress.best_epoch else self.best
            self.state = progress
            if self.fabric.is_global_zero:
                self.checkpoints.start_ledger(progress.removals)
            return {name: t for name, t in tensors.items() if name.startswith("generator.")}
        if self.fabric.is_global_zero:
            self.checkpoints.start_ledger([])
        return {}


def _mixed(*parts: object) -> int:
    """A seed from several numbers, so that what an epoch draws depends on nothing before it."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def _digest(batch: tuple[Any, Any]) -> str:
    """Other for other data, as far as their first batch tells."""
    content = b"".join(part.detach().cpu().double().numpy().tobytes() for part in tensors_of(batch))
    return hashlib.blake2b(content, digest_size=8).hexdigest()
