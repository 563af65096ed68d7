"""The posterior of a reduced model, as a guide that predicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.inference.blocks import JointNormalBlock
from pyro_bmrs.inference.traces import guide_values, latents
from pyro_bmrs.inference.untouched import untouched


class SiteKind(NamedTuple):
    """The values of a site of the model: their dtype and event dimensions, and the plates they lie in."""

    dtype: torch.dtype
    event_dim: int
    frames: tuple[Any, ...]


class _Plates:
    """The plates of the model, each made once in a call."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    @contextmanager
    def around(self, kind: SiteKind) -> Iterator[None]:
        with ExitStack() as stack:
            for frame in kind.frames:
                if frame.name not in self.made:
                    self.made[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                stack.enter_context(self.made[frame.name])
            yield


@dataclass(frozen=True)
class SitePart:
    """A site whose reduced posterior is independent of all others, in the dtype of its values."""

    site: str
    distribution: Distribution
    kind: SiteKind

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def sample(self, plates: _Plates) -> dict[str, Tensor]:
        law: Any = self.distribution
        if len(law.event_shape) > self.kind.event_dim:  # it couples what the model draws in plates
            whole = law.to_event(len(law.batch_shape))
            name = f"_reduced_{self.site}"
            drawn = pyro.sample(name, whole, infer={"is_auxiliary": True})
            shape = whole.event_shape
            batch = drawn.shape[: drawn.dim() - len(shape)]
            return {self.site: _at(self.site, drawn.reshape(-1, *shape), batch, self.kind, plates)}
        with plates.around(self.kind):
            value: Tensor = pyro.sample(self.site, law)
        return {self.site: value}


@dataclass(frozen=True)
class JointPart:
    """Sites of a joint normal. Some coordinates are reduced, and the others move with them.

    A draw x of the posterior becomes x + K (x̃ - x_g), where x̃ is a draw of the reduced coordinates g under the reduced
    posterior and K = Σ_·g Σ_gg⁻¹ (Matheron's rule). No covariance of all coordinates is needed.

    Attributes:
        block: the posterior that was reduced.
        reduced: numbers of the reduced coordinates. Shape: (n,).
        regression: K. Shape: (coordinates, n).
        loc, factor: of x̃ = loc + factor ε. Shapes: (n,), (n, n).
        kinds: of each site.
    """

    block: JointNormalBlock
    reduced: Tensor
    regression: Tensor
    loc: Tensor
    factor: Tensor
    kinds: Mapping[str, SiteKind]

    @property
    def sites(self) -> tuple[str, ...]:
        return self.block.sites

    @property
    def noise_size(self) -> int:
        """Standard normal numbers that a draw takes."""
        return self.block.noise_size + len(self.loc)

    def unconstrained(self, noise: Tensor) -> Tensor:
        """Draws from standard normal numbers. Shape: (*batch, noise_size) → (*batch, coordinates)."""
        before = self.block.unconstrained(noise[..., : self.block.noise_size])
        anew = self.loc + noise[..., self.block.noise_size :] @ self.factor.mT
        after = before + (anew - before[..., self.reduced]) @ self.regression.mT
        return after.index_copy(-1, self.reduced, anew)  # to the last digit

    def sample(self, plates: _Plates) -> dict[str, Tensor]:
        zeros = torch.zeros(self.noise_size, dtype=self.loc.dtype, device=self.loc.device)
        name = f"_reduced_{'_'.join(self.sites)}"
        noise = pyro.sample(name, dist.Normal(zeros, 1.0).to_event(1), infer={"is_auxiliary": True})
        flat = self.unconstrained(noise.reshape(-1, self.noise_size))
        drawn = self.block.values(flat)
        return {
            site: _at(site, drawn[site], noise.shape[:-1], kind, plates) for site, kind in self.kinds.items()
        }


@dataclass(frozen=True)
class WeightedDraws:
    """Joint draws of several sites, each with the probability of its weight.

    Attributes:
        draws: Shape of each: (draws, *site).
        log_weights: Shape: (draws,).
        kinds: of each site.
    """

    draws: Mapping[str, Tensor]
    log_weights: Tensor
    kinds: Mapping[str, SiteKind]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.draws)

    def sample(self, plates: _Plates) -> dict[str, Tensor]:
        name = f"_reduced_{'_'.join(self.sites)}"
        index = pyro.sample(name, dist.Categorical(logits=self.log_weights), infer={"is_auxiliary": True})
        picked = index.flatten()
        return {
            site: _at(site, self.draws[site][picked], index.shape, kind, plates)
            for site, kind in self.kinds.items()
        }


def _at(site: str, values: Tensor, batch: torch.Size, kind: SiteKind, plates: _Plates) -> Tensor:
    """Sample a site at values that are known.

    Args:
        values: Shape: (draws, *site).
        batch: shape of the draws, where plates outside of the model ask for several. It ends in a dimension of size 1
            for each of the model's own plates.
    """
    shape = values.shape[1:]
    own = len(shape) - kind.event_dim
    outer = batch[: max(len(batch) - own, 0)]
    with plates.around(kind):
        chosen: Tensor = pyro.sample(
            site, dist.Delta(values.to(kind.dtype).reshape(outer + shape), event_dim=kind.event_dim)
        )
    return chosen


Part = SitePart | JointPart | WeightedDraws


def _kinds(part: Part) -> Collection[SiteKind]:
    return [part.kind] if isinstance(part, SitePart) else part.kinds.values()


class ReducedPosterior:
    """The posterior of the reduced model, q̃ = q p̃/p · e^-ΔF, as a Pyro guide: the model predicts without a new fit.

    >>> predictive = pyro.infer.Predictive(model, guide=plan.reduced_posterior(), num_samples=100)  # doctest: +SKIP

    Call it as the guide is called. It draws sites that were not asked about from the guide itself, given those that
    were.
    """

    def __init__(self, guide: Callable[..., Any], parts: Sequence[Part], sites: Collection[str]) -> None:
        self.guide, self.parts = guide, tuple(parts)
        own = {name for part in self.parts for name in part.sites}
        self._asks_guide = not set(sites) <= own
        frames = (frame.name for part in self.parts for kind in _kinds(part) for frame in kind.frames)
        self._hidden = sorted(own | set(frames))  # plates that are made here must not be made twice

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        plates = _Plates()
        for part in self.parts:
            values |= part.sample(plates)
        if self._asks_guide:
            given = poutine.condition(self.guide, data=values)
            seen = poutine.block(given, hide=self._hidden)
            values |= {name: node["value"] for name, node in latents(seen, *args, **kwargs).items()}
        return values

    def draw(self, draws: int, *args: Any, seed: int = 0) -> dict[str, Tensor]:
        """Values of all latents; no trace is left. Shape of each: (draws, *site).

        Args:
            args: what the guide is called with.
        """
        with untouched(self.guide, seed=seed):
            found = [guide_values(self, *args) for _ in range(draws)]
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}
