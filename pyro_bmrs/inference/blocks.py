"""The posterior of a guide in blocks that are independent of each other: single sites, and joint normals of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Transform


@dataclass(frozen=True)
class SiteBlock:
    """The posterior of one site that is independent of all others.

    Attributes:
        site: its name.
        distribution: of its value, over its whole shape, float64.
        kept: False for elements that a fit has removed; None if there are none. Shape: batch.
    """

    site: str
    distribution: Distribution
    kept: Tensor | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)


@dataclass(frozen=True)
class UnconstrainedSite:
    """Where a site lies in a joint normal.

    Attributes:
        start: its first coordinate.
        shape: of its unconstrained value.
        transform: from there to its support, acting on single elements.
    """

    start: int
    shape: torch.Size
    transform: Transform

    def of(self, coordinates: Tensor) -> Tensor:
        """This site's part of all coordinates. Shape: (*batch, coordinates) → (*batch, *shape)."""
        part = coordinates[..., self.start : self.start + self.shape.numel()]
        return part.reshape(coordinates.shape[:-1] + self.shape)


@dataclass(frozen=True)
class JointNormalBlock:
    """A normal posterior of the unconstrained values of several sites, float64.

    Attributes:
        loc: Shape: (coordinates,).
        factor: the covariance is factor · factorᵀ, plus `diagonal`. Shape: (coordinates, rank).
        diagonal: Shape: (coordinates,). None: there is none.
        layout: where each site's coordinates are.
    """

    loc: Tensor
    factor: Tensor
    diagonal: Tensor | None
    layout: Mapping[str, UnconstrainedSite]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.layout)

    @property
    def everything(self) -> Tensor:
        """Numbers of all coordinates. Shape: (coordinates,)."""
        return torch.arange(len(self.loc), device=self.loc.device)

    def covariance(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Between coordinates; of `first` with itself by default. Shape: (len(first), len(second))."""
        same = second is None
        second = first if second is None else second
        value = self.factor[first] @ self.factor[second].mT
        if self.diagonal is not None:
            value = value + (first.unsqueeze(-1) == second) * self.diagonal[first].unsqueeze(-1)
        # symmetric to the last digit
        return 0.5 * (value + value.mT) if same else value

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers a draw takes."""
        return self.factor.shape[1] + (0 if self.diagonal is None else len(self.loc))

    def unconstrained(self, noise: Tensor) -> Tensor:
        """Draws from standard normal numbers. Shape: (*batch, noise_size) → (*batch, coordinates)."""
        rank = self.factor.shape[1]
        value = self.loc + noise[..., :rank] @ self.factor.mT
        return value if self.diagonal is None else value + noise[..., rank:] * self.diagonal.sqrt()

    def draw(self, draws: int) -> Tensor:
        """Unconstrained values. Shape: (draws, coordinates)."""
        return self.unconstrained(
            torch.randn(draws, self.noise_size, dtype=self.loc.dtype, device=self.loc.device)
        )

    def values(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Values of the sites. Shape: (*batch, coordinates) → (*batch, *site)."""
        return {name: at.transform(at.of(unconstrained)) for name, at in self.layout.items()}

    def log_density(self, unconstrained: Tensor) -> Tensor:
        """log q of the sites' values, given as unconstrained ones. Shape: (*batch, coordinates) → batch."""
        normal = MultivariateNormal(self.loc, self.covariance(self.everything), validate_args=False)
        density: Tensor = normal.log_prob(unconstrained)  # type: ignore[no-untyped-call]
        for at in self.layout.values():
            x = at.of(unconstrained)
            jacobian = at.transform.log_abs_det_jacobian(x, at.transform(x))  # type: ignore[no-untyped-call]
            density = density - jacobian.reshape(*density.shape, -1).sum(-1)
        return density


Block = SiteBlock | JointNormalBlock
