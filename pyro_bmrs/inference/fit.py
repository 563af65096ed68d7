"""Stochastic variational inference for networks with noise layers, and fine-tuning of those without."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.elbo import LatentsPerBatch, LikelihoodELBO
from pyro_bmrs.inference.evaluate import evaluate, likelihood_scale
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal, elementary, read_posterior
from pyro_bmrs.inference.progress import EpochProgress
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import noise_layers

if TYPE_CHECKING:
    from pyro_bmrs.reduction.criteria import Criterion


@dataclass
class Fit:
    """What happened in a fit.

    Attributes:
        history: one row per epoch: phase ("fit" or "fine-tune"), epoch (from 1), loss (the objective, nats
            per example), log_likelihood (nats per example, training), kl (nats, whole data set, unweighted),
            kl_weight (of this epoch), validation_loss (nats per example, at θ = E[θ]),
            validation_accuracy, kept (structures the criterion keeps), seconds.
        removals: one row per structure removed during the fit: epoch, layer, unit, score.
        settings: the arguments that shaped it.
        best_epoch: the epoch whose parameters were kept.
        interrupted: whether Ctrl-C ended it early; parameters are then those of the best epoch so far.
    """

    history: pd.DataFrame
    removals: pd.DataFrame
    settings: dict[str, Any]
    best_epoch: int
    interrupted: bool = False

    def __str__(self) -> str:
        last = self.history.iloc[self.best_epoch - 1] if self.best_epoch else None
        lines = [f"Fit of {len(self.history)} epochs" + (", interrupted" if self.interrupted else "")]
        if last is not None:
            lines.append(
                f"epoch {self.best_epoch} kept: loss {last.loss:.4f} nats per example, validation accuracy "
                f"{last.validation_accuracy:.4f}, {last.kept:.0f} structures kept"
            )
        return "; ".join(lines)


@dataclass
class _Objective:
    """Loss per example of one batch: -(log-likelihood)/B + weight · KL/N."""

    model: nn.Module
    guide: Callable[..., Any]
    sites: tuple[str, ...]
    dataset_size: int
    draws: int | None
    local_sites: frozenset[str] = frozenset()
    scaled: bool = False  # whether the model's own likelihood speaks for the data set, not the batch
    elbo: LikelihoodELBO = field(default_factory=LikelihoodELBO)

    def __post_init__(self) -> None:
        self.module = self.elbo(self.model, self.guide)

    def __call__(self, x: Any, y: Tensor, kl_weight: float) -> tuple[Tensor, float]:
        """(loss, log-likelihood per example), both in nats."""
        batch = len(y)
        examples = self.dataset_size if self.scaled else batch
        # the batch speaks for `examples` of the N: its share of the one KL
        share = examples / self.dataset_size
        draws = min(self.draws or batch, batch)
        with LatentsPerBatch(self.sites, draws, kl_weight * share, share, self.local_sites):
            loss = self.module(x, y) / examples
        return loss, float(self.elbo.log_likelihood) / examples


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
    draws_per_batch: int | None = None,
    schedule: str = "constant",
    criterion: Criterion | None = None,
    removal: str = "end",
    min_kept: int = 1,
    freeze_weights: bool = False,
    keep_best: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
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
        batch_size: examples per step (a DataLoader keeps its own).
        learning_rate: Adam's, of the model's parameters.
        posterior_learning_rate: Adam's, of the guide's parameters.
        kl_weight: factor w on the KL of the noise sites, uniform over structures.
        warm_up: share of the epochs over which the weight rises linearly from 0 to w.
        draws_per_batch: values of each θ per batch, example i using draw i mod draws; None: one per example.
        schedule: "constant", or "cosine" from the given rates to zero.
        criterion: counts the structures it would keep in each epoch's row, and is what `removal` uses.
        removal: "end" (the caller reduces) or "epoch": after each epoch past the warm-up, structures that
            `criterion` gives a score ≥ 0 are fixed at θ = 0 for good.
        min_kept: structures that every layer keeps, at least 1.
        freeze_weights: fit the posterior alone; weights and normalisation statistics stay as given.
        keep_best: end with the parameters of the epoch with the least validation objective (training
            objective without `validation`), among those after the warm-up and the last removal; without a
            guide and where there is one, of the epoch with the highest validation accuracy.
        seed: of initial guide draws, shuffling and noise. The global generators are left as found.
        device: where to train; None: where the model's parameters are.
        progress: show a bar (a line per epoch where output is not a terminal).
        validate: run Pyro's checks of shapes and supports at every step.

    Returns:
        The `Fit`. Ctrl-C ends early with `interrupted` set and the best parameters so far.

    Raises:
        ValueError, TypeError: for a bad argument, before any work is done.
        FloatingPointError: if the loss stops being finite; the best parameters so far are put back.
    """
    settings = dict(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        posterior_learning_rate=posterior_learning_rate, kl_weight=kl_weight, warm_up=warm_up,
        draws_per_batch=draws_per_batch, schedule=schedule, removal=removal, min_kept=min_kept,
        criterion=None if criterion is None else str(criterion), freeze_weights=freeze_weights,
        keep_best=keep_best, seed=seed,
    )  # fmt: skip
    _check_settings(settings, criterion)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    if guide is not None and not callable(guide):
        raise TypeError(f"guide must be a Pyro guide or None: got {type(guide).__name__}")
    sites = tuple(noise_layers(model))
    if guide is None and sites:
        raise ValueError(f"guide must be given for a model with noise layers {list(sites)}")
    if guide is not None and not sites:
        raise ValueError("model must hold MultiplicativeNoise layers when a guide is given: it has none")
    if criterion is not None and not isinstance(guide, AutoTruncatedLogNormal):
        raise TypeError("criterion needs an AutoTruncatedLogNormal guide; use reduce() after the fit instead")
    home = torch.device(device) if device is not None else next(model.parameters()).device
    batches = Batches(train, batch_size, home, "train")
    held_out = None if validation is None else Batches(validation, 1000, home, "validation")
    model.to(home)

    with _isolated(seed, validate):
        first = batches.first()
        if guide is not None:
            if isinstance(guide, nn.Module):
                guide.to(home)
            with in_mode(model, training=False):
                guide(*first)  # parameters come into being, where the model's are
        with _frozen(model, freeze_weights):
            if guide is not None:
                guide.kl_weight = float(kl_weight)  # type: ignore[attr-defined]
                _check_parameters(model, guide, first)
            loop = _Loop(model, guide, sites, batches, held_out, settings, criterion, first)
            return loop.run(progress)


def _check_settings(settings: dict[str, Any], criterion: object) -> None:
    """One line per bad argument, before anything is touched."""
    for name in ("epochs", "batch_size", "min_kept"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name} must be a positive integer: got {settings[name]!r}")
    for name in ("learning_rate", "posterior_learning_rate", "kl_weight"):
        value = settings[name]
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative: got {value!r}")
    if not isinstance(settings["warm_up"], int | float) or not 0 <= settings["warm_up"] <= 1:
        raise ValueError(f"warm_up must be a share of the epochs in [0, 1]: got {settings['warm_up']!r}")
    draws = settings["draws_per_batch"]
    if draws is not None and (not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws_per_batch must be a positive integer or None: got {draws!r}")
    if not isinstance(settings["seed"], int) or settings["seed"] < 0:
        raise ValueError(f"seed must be an integer of 0 or more: got {settings['seed']!r}")
    for name, allowed in (("schedule", ("constant", "cosine")), ("removal", ("end", "epoch"))):
        if settings[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}: got {settings[name]!r}")
    if criterion is not None:
        from pyro_bmrs.reduction.criteria import check_criterion

        check_criterion(criterion)
    elif settings["removal"] == "epoch":
        raise ValueError('criterion must be given for removal="epoch"')


@contextmanager
def _isolated(seed: int, validate: bool) -> Iterator[None]:
    """Own random numbers, own parameter store, own validation setting: nothing leaks to the process."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(pyro.get_param_store().scope())
        # Pyro puts its own earlier setting back into torch, which may have been another
        torch_setting = torch.distributions.Distribution._validate_args
        stack.callback(torch.distributions.Distribution.set_default_validate_args, torch_setting)
        stack.enter_context(pyro.validation_enabled(validate))
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _check_parameters(model: nn.Module, guide: Callable[..., Any], first: tuple[Any, ...]) -> None:
    """Raise if a `pyro.param` is no parameter of a module: it would not be trained, and be lost at the end."""
    for name, program in (("model", model), ("guide", guide)):
        module = program if isinstance(program, nn.Module) else nn.Module()
        own = {parameter.data_ptr() for parameter in [*module.parameters(), *model.parameters()]}
        with in_mode(model, training=False):
            sites = poutine.trace(program, param_only=True).get_trace(*first).nodes.items()
        for site, node in sites:
            if node["type"] == "param" and node["value"].unconstrained().data_ptr() not in own:
                raise TypeError(
                    f"{name} has the pyro.param {site!r}, which no optimiser here would train: make it an "
                    "nn.Parameter or PyroParam of a module"
                )


@contextmanager
def _frozen(model: nn.Module, freeze: bool) -> Iterator[None]:
    """With `freeze`, no parameter of the model requires a gradient and no statistic is updated."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if freeze:
        model.requires_grad_(False)
    try:
        with in_mode(model, training=not freeze):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class _Loop:
    """The state of one fit: optimiser, history, best parameters."""

    def __init__(
        self,
        model: nn.Module,
        guide: Callable[..., Any] | None,
        sites: tuple[str, ...],
        batches: Batches,
        held_out: Batches | None,
        settings: dict[str, Any],
        criterion: Criterion | None,
        first: tuple[Any, Any],
    ) -> None:
        self.model, self.guide, self.sites = model, guide, sites
        self.batches, self.held_out, self.settings, self.criterion = batches, held_out, settings, criterion
        self.first = first
        self.phase = "fit" if guide is not None else "fine-tune"
        self.history: list[dict[str, Any]] = []
        self.removals: list[dict[str, Any]] = []
        self.best = (math.inf, 0, [_copy_state(module) for module in self.modules])
        with torch.no_grad(), in_mode(model, training=False):
            trace = poutine.trace(model).get_trace(*first)
        scale = likelihood_scale(trace)
        if held_out is not None:  # a data set that does not fit the model is refused before the first step
            with torch.no_grad(), in_mode(model, training=False):
                poutine.trace(model).get_trace(*held_out.first())
        full = batches.size / len(first[1])
        if not (math.isclose(scale, 1.0) or math.isclose(scale, full, rel_tol=1e-4)):
            raise ValueError(
                "model must scale its likelihood either by 1 (it speaks for the batch) or by N/batch = "
                f"{full:.6g} (for the data set, N = {batches.size}): got {scale:.6g}"
            )
        self.objective = _Objective(
            model, guide or _no_latents, sites, batches.size, settings["draws_per_batch"],
            _local_sites(trace, len(first[1])), scaled=not math.isclose(scale, 1.0),
        )  # fmt: skip
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = []
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if weights:
            groups.append({"params": weights, "lr": self.settings["learning_rate"]})
        if isinstance(self.guide, nn.Module):
            parameters = list(self.guide.parameters())
            groups.append({"params": parameters, "lr": self.settings["posterior_learning_rate"]})
        if not groups:
            raise ValueError("there is nothing to fit: no parameter requires a gradient")
        return torch.optim.Adam(groups, fused=True)

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module in (self.model, self.guide) if isinstance(module, nn.Module)]

    def run(self, show: bool) -> Fit:
        epochs = self.settings["epochs"]
        steps = epochs * len(self.batches)
        cosine = self.settings["schedule"] == "cosine"
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))) if cosine else 1.0,
        )
        generator = torch.Generator().manual_seed(self.settings["seed"])
        interrupted = False
        with EpochProgress(self.phase, epochs, len(self.batches), enabled=show) as display:
            try:
                for epoch in range(1, epochs + 1):
                    self._epoch(epoch, generator, scheduler, display)
            except KeyboardInterrupt:
                interrupted = True
            except Exception:
                self._restore()
                raise
        if self.settings["keep_best"] or interrupted:
            self._restore()
        return Fit(
            history=pd.DataFrame(self.history, columns=_HISTORY_COLUMNS),
            removals=pd.DataFrame(self.removals, columns=_REMOVAL_COLUMNS),
            settings=self.settings,
            best_epoch=self.best[1] if self.settings["keep_best"] or interrupted else len(self.history),
            interrupted=interrupted,
        )

    def _epoch(self, epoch: int, generator: torch.Generator, scheduler: Any, display: EpochProgress) -> None:
        start = time.perf_counter()
        settings, count = self.settings, len(self.batches)
        # without latents there is no KL to warm up
        warm_up_steps = round(settings["warm_up"] * settings["epochs"] * count) if self.guide else 0
        loss_sum = likelihood_sum = seen = 0.0
        weight = settings["kl_weight"]
        for index, (x, y) in enumerate(self.batches.epoch(generator)):
            step = (epoch - 1) * count + index
            ramp = min((step + 1) / warm_up_steps, 1.0) if warm_up_steps else 1.0
            weight = settings["kl_weight"] * ramp
            loss, likelihood = self.objective(x, y, weight)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss became {value} at batch {index + 1} of epoch {epoch}; the parameters of epoch "
                    f"{self.best[1]} are back in place. Lower learning_rate, or look for NaN in the data"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            scheduler.step()
            loss_sum += value * len(y)
            likelihood_sum += likelihood * len(y)
            seen += len(y)
            display.step()
        self._check_finite(epoch)
        removed = self._remove(epoch) if settings["removal"] == "epoch" and ramp >= 1.0 else 0
        kl = self._kl()
        row: dict[str, Any] = {
            "phase": self.phase,
            "epoch": epoch,
            "loss": loss_sum / seen,
            "log_likelihood": likelihood_sum / seen,
            "kl": kl,
            "kl_weight": weight if self.guide is not None else math.nan,
            "validation_loss": math.nan,
            "validation_accuracy": math.nan,
            "kept": self._kept(),
        }
        if self.held_out is not None:
            row["validation_loss"], row["validation_accuracy"] = evaluate(
                self.model, self.held_out, self._scales()
            )
        # the training loss has its KL inside
        add_kl = self.held_out is not None and not math.isnan(kl)
        penalty = settings["kl_weight"] * kl / self.batches.size if add_kl else 0.0
        score = (row["loss"] if self.held_out is None else row["validation_loss"]) + penalty
        if self.guide is None and not math.isnan(row["validation_accuracy"]):
            score = -row["validation_accuracy"]
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        # during the warm-up the objective is another one; a removal changes it again
        if ramp < 1.0 or removed or score < self.best[0] or not self.best[1]:
            best = math.inf if ramp < 1.0 else score
            self.best = (best, epoch, [_copy_state(module) for module in self.modules])
        display.epoch(row)

    def _check_finite(self, epoch: int) -> None:
        """The last step of an epoch has no loss behind it that would tell."""
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    raise FloatingPointError(
                        f"parameter {name} is not finite after epoch {epoch}; the parameters of epoch "
                        f"{self.best[1]} are back in place. Lower learning_rate"
                    )

    def _scales(self) -> dict[str, Tensor]:
        """Values to predict with: E[θ] where it is known, one draw from the guide for other latents."""
        if isinstance(self.guide, AutoTruncatedLogNormal):
            return self.guide.mean()
        if self.guide is None:
            return {}
        trace = poutine.trace(self.guide).get_trace(*self.first)
        draws = {
            name: site["value"].detach()
            for name, site in trace.iter_stochastic_nodes()
            if name not in self.objective.local_sites
        }
        return draws | {site: q.mean for site, q in read_posterior(self.guide, *self.first).items()}

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

    def _kept(self) -> int:
        if self.criterion is not None and self.guide is not None and self.settings["removal"] == "end":
            from pyro_bmrs.reduction.reduce import reduce

            plan = reduce(self.model, self.guide, self.criterion, min_kept=self.settings["min_kept"])
            return int(plan.widths().after.sum())
        return sum(int(layer.kept.sum()) for layer in noise_layers(self.model).values())

    def _remove(self, epoch: int) -> int:
        """Fix at θ = 0, for good, what the criterion removes; returns how many structures went."""
        from pyro_bmrs.reduction.reduce import reduce

        assert self.criterion is not None
        assert isinstance(self.guide, AutoTruncatedLogNormal)
        plan = reduce(self.model, self.guide, self.criterion, min_kept=self.settings["min_kept"])
        count = 0
        for site, layer in noise_layers(self.model).items():
            kept = plan.kept_mask(site).to(layer.kept.device)
            rows = plan.table[plan.table.layer == site]
            gone = rows[(layer.kept & ~kept).cpu().numpy()]
            for row in gone.itertuples():
                self.removals.append({"epoch": epoch, "layer": site, "unit": row.unit, "score": row.score})
            layer.kept.logical_and_(kept)
            self.guide.site_posterior(site).kept.copy_(layer.kept)
            count += len(gone)
        return count

    def _restore(self) -> None:
        for module, state in zip(self.modules, self.best[2], strict=False):
            module.load_state_dict(state)


_HISTORY_COLUMNS = [
    "phase", "epoch", "loss", "log_likelihood", "kl", "kl_weight", "validation_loss",
    "validation_accuracy", "kept", "seconds",
]  # fmt: skip
_REMOVAL_COLUMNS = ["epoch", "layer", "unit", "score"]


def _local_sites(trace: poutine.Trace, batch: int) -> frozenset[str]:
    """Latents of single examples: those that share the plate of the batch with the observations."""
    stacks = [trace.nodes[name]["cond_indep_stack"] for name in trace.observation_nodes]
    plates = {frame.name for stack in stacks for frame in stack if frame.vectorized and frame.size == batch}
    return frozenset(
        name
        for name, site in trace.iter_stochastic_nodes()
        if any(frame.name in plates for frame in site["cond_indep_stack"])
    )


def _no_latents(*_: Any) -> None:
    """The guide of a model without latents."""


def _copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
