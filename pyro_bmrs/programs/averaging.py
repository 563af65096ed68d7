"""ΔF where a prior depends on another latent: an average over joint draws of the guide.

With θ the chosen elements and ψ all else, E_q[p̃(θ)/p(θ|ψ)] = E_q(ψ)[ E_q(θ|ψ)[p̃(θ)/p(θ|ψ)] ]. The inner mean has a
closed form wherever log_evidence_change has one. Only the outer one is taken over draws, so that even a point has a ΔF.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_bmrs.evidence import estimate_log_mean, log_evidence_change, reduced_posterior
from pyro_bmrs.evidence.importance import ImportanceEstimate, log_ratio
from pyro_bmrs.evidence.joint_normal import Group
from pyro_bmrs.evidence.normal import MultivariateChange
from pyro_bmrs.inference.blocks import Block, JointNormalBlock
from pyro_bmrs.inference.traces import guide_values, model_at
from pyro_bmrs.programs.sites import LatentSite, Selection, check_estimable, per_element
from pyro_bmrs.progress import bar


class Asked(Protocol):
    """What the average needs of model, guide and sites. `Latents` has it."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    draws: int
    sites: dict[str, LatentSite]

    def looking(self, stream: int = 0) -> AbstractContextManager[None]: ...

    def by_block(self, chosen: Selection) -> list[tuple[Block, dict[str, Tensor]]]: ...

    def group(self, masks: Selection, priors: Mapping[str, Any] | None = None) -> Group: ...


# The priors at all draws are of one type: the support of so many is compared with that of the reduced prior.
_CHECKED = 3


class Averaging:
    """Joint draws of a guide, the priors at each, and ΔF given all else."""

    def __init__(self, latents: Asked) -> None:
        self.latents = latents
        self._given: dict[str, Tensor] = {}

    @cached_property
    def _draws(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Values of all latents of the guide, (draws, *site); and at each draw the priors that depend on them."""
        latents = self.latents
        dependent = {name: site for name, site in latents.sites.items() if site.parents}
        values, priors = [], []
        with latents.looking(), bar("joint draws", latents.draws) as advance:
            for _ in range(latents.draws):
                drawn = guide_values(latents.guide, *latents.args)
                nodes = model_at(latents.model, drawn, *latents.args).nodes
                values.append(drawn)
                priors.append(
                    {
                        name: per_element(nodes[name]["fn"], site.shape, site.event_dim)
                        for name, site in dependent.items()
                    }
                )
                advance(1)
        return {name: torch.stack([drawn[name] for drawn in values]) for name in values[0]}, priors

    def _priors_of(self, site: LatentSite) -> list[Any]:
        """The prior of a site's elements at each draw."""
        return [prior.get(site.name, site.prior) for prior in self._draws[1]]

    def given_all_else(self, site: LatentSite) -> Tensor:
        """ΔF of each element alone, given all else. Shape: (draws, *elements)."""
        if site.name not in self._given:
            try:
                rows = [
                    log_evidence_change(q, prior, site.reduced_prior)
                    for q, prior in zip(self._conditionals(site), self._priors_of(site), strict=True)
                ]
                self._given[site.name] = torch.stack(rows)
            except NotImplementedError:
                self._given[site.name] = self._ratios(site)
        return self._given[site.name]

    def together(self, chosen: Selection) -> ImportanceEstimate:
        """ΔF of all chosen elements together."""
        parts = [self._of_block(block, masks) for block, masks in self.latents.by_block(chosen)]
        return estimate_log_mean(torch.stack(parts).sum(0))

    def _of_block(self, block: Block, masks: Mapping[str, Tensor]) -> Tensor:
        """ΔF of chosen elements given all else. Shape: (draws,)."""
        sites = {self.latents.sites[name]: mask for name, mask in masks.items()}
        if not isinstance(block, JointNormalBlock):
            return torch.stack(
                [self.given_all_else(site)[:, mask].sum(-1) for site, mask in sites.items()]
            ).sum(0)
        try:
            return torch.stack([found.log_evidence_change for found in self._of_coordinates(block, masks)])
        except NotImplementedError:
            return torch.stack([self._ratios(site)[:, mask].sum(-1) for site, mask in sites.items()]).sum(0)

    def _ratios(self, site: LatentSite) -> Tensor:
        """log p̃(θ) - log p(θ|ψ) at the draws themselves. Shape: (draws, *elements)."""
        for prior in self._priors_of(site)[:_CHECKED]:
            check_estimable(site, prior)
        values = self._draws[0][site.name].double()
        return torch.stack(
            [
                log_ratio(prior, site.reduced_prior, value)
                for prior, value in zip(self._priors_of(site), values, strict=True)
            ]
        )

    # --- conditionals of a joint normal --------------------------------------------------------------

    def _conditionals(self, site: LatentSite) -> Iterator[Any]:
        """The posterior of each element given all else, at each draw."""
        block = site.block
        if not isinstance(block, JointNormalBlock):
            yield from (site.posterior for _ in range(self.latents.draws))
            return
        for loc, covariance in self._given_others(block, site.coordinates):
            yield site.law(loc, covariance)

    def _of_coordinates(
        self, block: JointNormalBlock, masks: Mapping[str, Tensor]
    ) -> Iterator[MultivariateChange]:
        """ΔF of the chosen coordinates given all others, and their reduced posterior, at each draw."""
        own = self.latents.group(masks, self._draws[1][0]).coordinates
        conditionals = self._given_others(block, own.unsqueeze(0))
        for (loc, covariance), priors in zip(conditionals, self._draws[1], strict=True):
            yield self.latents.group(masks, priors).change(loc[0], covariance[0])

    def _given_others(self, block: JointNormalBlock, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and covariance of each row of coordinates given all others, at each draw.

        Shapes: (rows, n) → (rows, n), (rows, n, n).
        """
        precision: Tensor = torch.linalg.inv(block.covariance(block.everything))
        covariance = torch.linalg.inv(precision[rows.unsqueeze(-1), rows.unsqueeze(-2)])
        for away in self._unconstrained(block) - block.loc:
            pull = (precision @ away)[rows].unsqueeze(-1)
            yield block.loc[rows] + away[rows] - (covariance @ pull).squeeze(-1), covariance

    def _unconstrained(self, block: JointNormalBlock) -> Tensor:
        """The draws of a block's sites. Shape: (draws, coordinates)."""
        values = self._draws[0]
        parts = [
            at.transform.inv(values[name].double()).reshape(self.latents.draws, -1)
            for name, at in block.layout.items()
        ]
        return torch.cat(parts, -1)

    # --- the reduced posterior -----------------------------------------------------------------------

    def reduced(self, chosen: Selection) -> tuple[dict[str, Tensor], Tensor]:
        """Joint draws, their chosen elements drawn again under the reduced priors, and log-weights."""
        log_weights = self.together(chosen).log_weights
        values = dict(self._draws[0])
        for block, masks in self.latents.by_block(chosen):
            if isinstance(block, JointNormalBlock):
                values |= self._drawn_anew(block, masks)
            else:
                for name, mask in masks.items():
                    values[name] = self._site_drawn_anew(self.latents.sites[name], mask)
        return values, log_weights

    def _site_drawn_anew(self, site: LatentSite, mask: Tensor) -> Tensor:
        before = self._draws[0][site.name]
        try:
            laws = [
                reduced_posterior(site.posterior, prior, site.reduced_prior)
                for prior in self._priors_of(site)
            ]
        except NotImplementedError:
            return before  # without a closed form the draws stay, and their weights tell
        anew = torch.stack([law.sample().expand(before.shape[1:]) for law in laws])
        where = mask.reshape(mask.shape + (1,) * (before.dim() - 1 - mask.dim()))
        return torch.where(where, anew.to(before.dtype), before)

    def _drawn_anew(self, block: JointNormalBlock, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        unconstrained = self._unconstrained(block)
        with suppress(NotImplementedError):  # without a closed form the draws stay, and their weights tell
            own = self.latents.group(masks, self._draws[1][0]).coordinates
            for row, found in zip(unconstrained, self._of_coordinates(block, masks), strict=True):
                row[own] = found.loc + root_of(found.covariance) @ torch.randn_like(found.loc)
        return block.values(unconstrained)


def root_of(covariance: Tensor) -> Tensor:
    """A matrix R with R Rᵀ = covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
