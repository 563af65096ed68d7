"""The mean-field guide: one truncated log-normal for every latent whose prior is one, or log-uniform."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_bmrs.arguments import check
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.inference.calls import check_ready, in_order, unique_name
from pyro_bmrs.inference.site_posterior import SitePosterior
from pyro_bmrs.inference.sites import elementary, mask_of, read_sites
from pyro_bmrs.networks import name_sites


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

    A latent is supported if its prior is `LogUniform` or `TruncatedLogNormal`, also expanded, masked, `to_event`, or
    inside plates. Other latents need other guides: combine them in Pyro's `AutoGuideList`, each on
    `poutine.block(model, expose=[…])`. As with Pyro's autoguides, the first call traces the model and makes the
    parameters. They are ordinary `nn.Parameter`s of the guide: two guides share nothing.

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
        check(callable(model), "model", "a Pyro model", type(model), TypeError)
        check(math.isfinite(init_loc), "init_loc", "finite", init_loc)
        check(0 < init_scale < math.inf, "init_scale", "positive and finite", init_scale)
        if isinstance(model, nn.Module):
            name_sites(model)
        super().__init__(model, create_plates=create_plates)
        self._pyro_name = unique_name(self)
        self.init_loc, self.init_scale = init_loc, init_scale
        self.sites: tuple[str, ...] = ()
        self.posteriors = nn.ModuleList()
        self.example_arguments: tuple[Any, ...] = ()
        self.kl_weight = 1.0  # of the last fit; it is shown beside every ΔF that is read from this guide

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's removes the model from the guide itself, and not only from the copy
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
        latents = read_sites(self.prototype_trace).latent
        priors: dict[str, LogUniform | TruncatedLogNormal] = {}
        for name, site in latents.items():
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
            for name, site in latents.items()
        )
        for name, site in latents.items():
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
        # each access to a submodule of a PyroModule registers all its parameters again: access them once
        posteriors: list[Any] = list(self.posteriors)
        for name, posterior in zip(self.sites, posteriors, strict=True):
            site = self.prototype_trace.nodes[name]
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
        check_ready(self)
        with torch.no_grad():
            return {name: self.site_posterior(name).distribution() for name in self.sites}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent."""
        half = {name: q.icdf(torch.full_like(q.loc, 0.5)) for name, q in self.posterior().items()}
        return {name: half[name] * self.site_posterior(name).kept for name in half}

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """E[θ] of each latent, and 0 for removed structures: the values to predict with."""
        return {name: q.mean * self.site_posterior(name).kept for name, q in self.posterior().items()}
