"""The posterior of a reduced model, as a guide to predict with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.inference.posteriors import JointNormalBlock, guide_values


@dataclass(frozen=True)
class SitePart:
    """A site whose reduced posterior is a distribution of its own, in the dtype of its values."""

    site: str
    distribution: Distribution

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def sample(self) -> dict[str, Tensor]:
        value: Tensor = pyro.sample(self.site, self.distribution)
        return {self.site: value}


@dataclass(frozen=True)
class JointPart:
    """Sites whose unconstrained values are loc + factor ε, jointly; rows of zeros where a value is a point.

    Attributes:
        block: the posterior that was reduced: where its sites lie.
        loc, factor: Shapes: (coordinates,), (coordinates, coordinates).
        values: for each site the dtype and event dimensions of its values.
    """

    block: JointNormalBlock
    loc: Tensor
    factor: Tensor
    values: Mapping[str, tuple[torch.dtype, int]]

    @property
    def sites(self) -> tuple[str, ...]:
        return self.block.sites

    def sample(self) -> dict[str, Tensor]:
        standard = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        noise = pyro.sample(f"_reduced_{'_'.join(self.sites)}", standard, infer={"is_auxiliary": True})
        drawn = self.block.values(self.loc + noise @ self.factor.mT)
        return {name: _at(name, value, *self.values[name]) for name, value in drawn.items()}


@dataclass(frozen=True)
class WeightedDraws:
    """Joint draws of several sites, each as likely as its weight.

    Attributes:
        draws: Shape of each: (draws, *site).
        log_weights: Shape: (draws,).
        event_dims: of each site.
    """

    draws: Mapping[str, Tensor]
    log_weights: Tensor
    event_dims: Mapping[str, int]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.draws)

    def sample(self) -> dict[str, Tensor]:
        index = pyro.sample(
            f"_reduced_{'_'.join(self.sites)}",
            dist.Categorical(logits=self.log_weights),
            infer={"is_auxiliary": True},
        )
        return {
            name: _at(name, values[index], values.dtype, self.event_dims[name])
            for name, values in self.draws.items()
        }


def _at(site: str, value: Tensor, dtype: torch.dtype, event_dim: int) -> Tensor:
    chosen: Tensor = pyro.sample(site, dist.Delta(value.to(dtype), event_dim=event_dim))
    return chosen


Part = SitePart | JointPart | WeightedDraws


class ReducedPosterior:
    """The posterior of the reduced model, q̃ = q p̃/p · e^-ΔF, as a Pyro guide: the model predicts without a new fit.

    >>> predictive = pyro.infer.Predictive(model, guide=plan.reduced_posterior(), num_samples=100)  # doctest: +SKIP

    Call it where the guide is called. Sites that were not asked about are drawn from the guide itself.
    """

    def __init__(self, guide: Callable[..., Any], parts: Sequence[Part]) -> None:
        self.guide, self.parts = guide, tuple(parts)
        self._own = {name for part in self.parts for name in part.sites}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        others = poutine.trace(poutine.block(self.guide, hide=list(self._own))).get_trace(*args, **kwargs)
        values: dict[str, Tensor] = {
            name: node["value"]
            for name, node in others.iter_stochastic_nodes()
            if not node["infer"].get("is_auxiliary") and not site_is_subsample(node)
        }
        for part in self.parts:
            values |= part.sample()
        return values

    @torch.no_grad()
    def draw(self, draws: int, *args: Any, seed: int = 0) -> dict[str, Tensor]:
        """Values of all latents, with torch's own generator left as it was. Shape of each: (draws, *site).

        Args:
            args: what the guide is called with.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = [guide_values(self, *args) for _ in range(draws)]
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}
