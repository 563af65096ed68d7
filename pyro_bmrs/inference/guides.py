"""The mean-field guide: one truncated log-normal for every latent whose prior is one, or log-uniform."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks import name_sites
from pyro_bmrs.networks.cuts import replace_data

# The box in which the distributions' values and gradients are known to be finite, in float32 too: the
# location stays within 20 of the bounds of log θ.
LOG_SCALE_BOUNDS = (-20.0, 5.0)
LOC_MARGIN = 20.0
# Pyro's parameter store shares parameters between modules of one name; ours never have one in common.
_serial = count(1)


def elementary(distribution: Distribution) -> Distribution:
    """The distribution of single elements: Independent, Masked and Expanded taken off."""
    while hasattr(distribution, "base_dist") and not isinstance(
        distribution, torch.distributions.TransformedDistribution
    ):
        distribution = distribution.base_dist
    return distribution


def mask_of(distribution: Distribution) -> object:
    """The mask that a distribution wears, under any Independent; None where there is none."""
    while not isinstance(distribution, MaskedDistribution):
        if not hasattr(distribution, "base_dist"):
            return None
        distribution = distribution.base_dist
    return distribution._mask


# The tensors of a site's posterior with an entry per structure.
PER_UNIT = ("loc", "log_scale", "log_low", "log_high", "kept")


def bounded(loc: Tensor, log_scale: Tensor, log_low: Tensor, log_high: Tensor) -> tuple[Tensor, Tensor]:
    """(loc, scale) of the law that the parameters of a posterior stand for, inside the box of finite values.

    The exponential is taken in float64 and rounded: in float32 each device has its own, and a posterior would
    have another evidence where it is moved to.
    """
    loc = torch.clamp(loc, log_low - LOC_MARGIN, log_high + LOC_MARGIN)
    return loc, log_scale.clamp(*LOG_SCALE_BOUNDS).double().exp().to(log_scale.dtype)


class SitePosterior(nn.Module):
    """Parameters of one site's posterior, over the shape of the site's value."""

    log_low: Tensor
    log_high: Tensor
    kept: Tensor
    removed_units: Tensor
    removed_loc: Tensor
    removed_log_scale: Tensor

    def __init__(self, prior: LogUniform | TruncatedLogNormal, shape: torch.Size, loc: float, scale: float):
        super().__init__()
        like = prior.log_low
        self.loc = nn.Parameter(torch.full(shape, loc, dtype=like.dtype, device=like.device))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(scale)))
        self.register_buffer("log_low", prior.log_low.detach().expand(shape).clone())
        self.register_buffer("log_high", prior.log_high.detach().expand(shape).clone())
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=like.device))
        # of structures that a fit has taken out: their numbers in the original network, their last parameters
        self.register_buffer("removed_units", torch.empty(0, dtype=torch.long, device=like.device))
        for name in ("removed_loc", "removed_log_scale"):
            self.register_buffer(name, torch.empty(*shape[:-1], 0, dtype=like.dtype, device=like.device))

    def select(self, kept: Tensor, units: Tensor) -> None:
        """Become, in place, the posterior of the structures where `kept`; `units` are the numbers of all."""
        stays, goes = (torch.nonzero(mask).flatten().to(self.loc.device) for mask in (kept, ~kept))
        self.removed_units = torch.cat([self.removed_units, units.to(goes.device)[goes]])
        for name in ("loc", "log_scale"):
            last = getattr(self, name).detach().index_select(-1, goes)
            setattr(self, f"removed_{name}", torch.cat([getattr(self, f"removed_{name}"), last], dim=-1))
        for name in PER_UNIT:
            tensor = getattr(self, name)
            replace_data(tensor, tensor.detach().index_select(-1, stays))

    def removed_posterior(self) -> TruncatedLogNormal:
        """The last posterior of each structure that was taken out, in the order of `removed_units`."""
        shape = self.removed_loc.shape
        low, high = (bound[..., :1].expand(shape) for bound in (self.log_low, self.log_high))
        law = bounded(self.removed_loc, self.removed_log_scale, low, high)
        return TruncatedLogNormal(*law, low, high, validate_args=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # as many as the saved one had lost, whatever this one has
        for name in ("removed_units", "removed_loc", "removed_log_scale"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.loc.device))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def distribution(self) -> TruncatedLogNormal:
        return TruncatedLogNormal(
            *bounded(self.loc, self.log_scale, self.log_low, self.log_high),
            self.log_low,
            self.log_high,
            validate_args=False,  # the clamps leave nothing to check but NaN, which reduce and fit look for
        )


class AutoTruncatedLogNormal(AutoGuide):  # type: ignore[misc]
    """Mean-field guide q(θ) = Π TruncatedLogNormal(loc, scale²) for every supported latent of a Pyro model.

    >>> import torch
    >>> from torch import nn
    >>> from pyro_bmrs import Classifier, MultiplicativeNoise
    >>> model = Classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), MultiplicativeNoise(8), nn.Linear(8, 3)))
    >>> guide = AutoTruncatedLogNormal(model)
    >>> guide(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long))["2"].shape
    torch.Size([8])
    >>> guide.posterior()["2"].mean.shape
    torch.Size([8])

    A latent is supported if its prior is `LogUniform` or `TruncatedLogNormal` (also expanded, masked,
    `to_event`, inside plates). Others belong to other guides: combine them in Pyro's `AutoGuideList`, each
    on `poutine.block(model, expose=[…])`. As with Pyro's autoguides the parameters come into being at the
    first call, which traces the model; they are ordinary `nn.Parameter`s of the guide, so two guides in
    one process share nothing.

    Args:
        model: a Pyro model, with any arguments.
        init_loc: first location of log θ; 0 starts every structure near θ = 1.
        init_scale: first scale of log θ, e^-5 as in the paper.
        create_plates: as in Pyro.

    Raises:
        ValueError: at the first call, naming the first latent of another type; if init_scale ≤ 0.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc: float = 0.0,
        init_scale: float = math.exp(-5.0),
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a Pyro model: got {type(model).__name__}")
        if not math.isfinite(init_loc):
            raise ValueError(f"init_loc must be finite: got {init_loc}")
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be positive and finite: got {init_scale}")
        if isinstance(model, nn.Module):
            name_sites(model)
        super().__init__(model, create_plates=create_plates)
        self._pyro_name = f"{type(self).__name__}_{next(_serial)}"
        self.init_loc, self.init_scale = init_loc, init_scale
        self.sites: tuple[str, ...] = ()
        self.posteriors = nn.ModuleList()
        self.example_arguments: tuple[Any, ...] = ()
        self.kl_weight = 1.0  # of the last fit: every ΔF read from this guide is to name it

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's takes the model out of the guide that is copied, not only out of the copy
        taken: dict[str, Any] = {
            name: self.__dict__[name] for name in ("_model", "master") if name in self.__dict__
        }
        try:
            state: dict[str, Any] = super().__getstate__()
        finally:
            self.__dict__.update(taken)
        return state

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():  # the trace is kept, and need not keep a graph
            super()._setup_prototype(*args, **kwargs)
        for frame in self._prototype_frames.values():
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"model has a latent in the subsampled plate {frame.name!r} ({frame.size} of "
                    f"{frame.full_size}): AutoTruncatedLogNormal is for latents of the whole data set"
                )
        latents = list(self.prototype_trace.iter_stochastic_nodes())
        priors: dict[str, LogUniform | TruncatedLogNormal] = {}
        for name, site in latents:
            prior = elementary(site["fn"])
            if not isinstance(prior, LogUniform | TruncatedLogNormal):
                raise ValueError(
                    f"model has a latent {name!r} with prior {type(prior).__name__}: AutoTruncatedLogNormal "
                    "takes LogUniform or TruncatedLogNormal; hide the others with poutine.block and give them "
                    "a guide of their own in an AutoGuideList. If it is what the model observes, call the guide "
                    "with the observations, as guide(x, y)"
                )
            priors[name] = prior
        self.sites = tuple(priors)
        self.posteriors = nn.ModuleList(
            SitePosterior(priors[name], site["value"].shape, self.init_loc, self.init_scale)
            for name, site in latents
        )
        for name, site in latents:
            mask = mask_of(site["fn"])
            if isinstance(mask, Tensor):  # structures that an earlier fit has removed
                self.site_posterior(name).kept.copy_(mask)
        self.example_arguments = in_order(self.model, args, kwargs)

    def site_posterior(self, site: str) -> SitePosterior:
        """The module that holds the parameters of one site."""
        if site not in self.sites:
            raise KeyError(f"site must be one of {list(self.sites)}: got {site!r}")
        posterior = self.posteriors[self.sites.index(site)]
        assert isinstance(posterior, SitePosterior)
        return posterior

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values = {}
        # fetched once: each access to a submodule of a PyroModule registers all its parameters anew
        posteriors: dict[str, Any] = dict(zip(self.sites, self.posteriors, strict=True))
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            posterior = posteriors[name]
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                elements = posterior.distribution().mask(posterior.kept)
                values[name] = pyro.sample(name, elements.to_event(site["fn"].event_dim))
        return values

    def posterior(self) -> dict[str, TruncatedLogNormal]:
        """The posterior of each site, detached, of the shape of the site's value.

        Raises:
            RuntimeError: before the first call of the guide, when there are no parameters yet.
        """
        if self.prototype_trace is None:
            raise RuntimeError("guide has no parameters yet: call it once on a batch, or fit it")
        with torch.no_grad():
            return {name: self.site_posterior(name).distribution() for name in self.sites}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent."""
        half = {name: q.icdf(torch.full_like(q.loc, 0.5)) for name, q in self.posterior().items()}
        return {name: half[name] * self.site_posterior(name).kept for name in half}

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """E[θ] of each latent, 0 for what has been removed: the values to predict with."""
        return {name: q.mean * self.site_posterior(name).kept for name, q in self.posterior().items()}


def in_order(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call of a program by position; those that only have a keyword are left to their defaults."""
    if not kwargs:
        return args
    called = inspect.unwrap(program)  # what poutine.block and its like have wrapped
    bound = inspect.signature(called.forward if isinstance(called, nn.Module) else called).bind(
        *args, **kwargs
    )
    bound.apply_defaults()
    return bound.args


def read_posterior(guide: Callable[..., Any], *args: Any) -> dict[str, TruncatedLogNormal]:
    """The truncated log-normal posteriors of any mean-field guide, detached, by site; no trace is left.

    Raises:
        ValueError: if the guide has none, naming the sites it has and their types.
    """
    if isinstance(guide, AutoTruncatedLogNormal):
        return guide.posterior()
    with untouched(guide):
        trace = poutine.trace(guide).get_trace(*args)
        found = {
            name: elementary(site["fn"])
            for name, site in trace.iter_stochastic_nodes()
            if not site["infer"].get("is_auxiliary")
        }
    posteriors = {name: q for name, q in found.items() if isinstance(q, TruncatedLogNormal)}
    if not posteriors:
        kinds = {name: type(q).__name__ for name, q in found.items()}
        raise ValueError(f"guide must have TruncatedLogNormal sites: it has {kinds}")
    return posteriors
