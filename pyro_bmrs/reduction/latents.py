"""ΔF of any choice of elements of a Pyro model's latents, and the posterior that the choice leads to.

An element is one entry of a site, or one event where the site's law is of events (a point on a simplex, a
vector with a full covariance). Mean-field posteriors are read element by element; joint normals over their
unconstrained values, where the priors are normal there too or the reduced prior is a point; everything else
is estimated from draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bmrs.evidence import ImportanceError, estimate_log_mean, log_evidence_change, reduced_posterior
from pyro_bmrs.evidence.importance import DRAWS, ImportanceEstimate, check_support, log_ratio
from pyro_bmrs.evidence.joint_normal import GroupReduction, joined, reduce_group
from pyro_bmrs.evidence.unwrapping import with_tensors
from pyro_bmrs.inference.posteriors import (
    Block,
    JointNormalBlock,
    check_arguments,
    differs,
    guide_values,
    model_at,
    read_blocks,
)
from pyro_bmrs.reduction.latent_sites import LatentSite, group_of, latent_site, per_element
from pyro_bmrs.reduction.reduced_posterior import JointPart, Part, ReducedPosterior, SitePart, WeightedDraws

Selection = Mapping[str, Tensor]  # for each site a bool per element, of its shape
DependentPriors = Literal["raise", "average"]


class Evidence(NamedTuple):
    """ΔF in nats with its standard error (0: closed form) and Pareto k̂ (NaN: closed form), of one shape."""

    log_evidence_change: Tensor
    standard_error: Tensor
    khat: Tensor


def _exact(change: Tensor) -> Evidence:
    return Evidence(change, torch.zeros_like(change), torch.full_like(change, math.nan))


def _estimated(found: ImportanceEstimate) -> Evidence:
    return Evidence(found.estimate, found.standard_error, found.khat)


class Latents:
    """A model's posterior with the priors and the reduced priors of the sites asked about.

    Args:
        model, guide, args: the Pyro programs and what they are called with.
        reduced_priors: by site: a distribution that broadcasts to the site, or a number or tensor: a point.
        dependent_priors: what to do where a prior depends on another latent: "raise", or "average" over
            joint draws of the guide.
        draws: of the posterior, where ΔF has no closed form.
        seed: of those draws.

    Raises:
        ValueError: for a site that model or guide don't have, a reduced prior that does not fit it, or a
            prior that depends on another latent with `dependent_priors="raise"`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        reduced_priors: Mapping[str, Any],
        args: tuple[Any, ...],
        *,
        dependent_priors: DependentPriors = "raise",
        draws: int = DRAWS,
        seed: int = 0,
    ) -> None:
        if not reduced_priors:
            raise ValueError(
                "criterion must name at least one site and its reduced prior: got an empty mapping"
            )
        if dependent_priors not in ("raise", "average"):
            raise ValueError(f"dependent_priors must be 'raise' or 'average': got {dependent_priors!r}")
        if not isinstance(draws, int) or draws < 100:
            raise ValueError(f"draws must be an integer of at least 100: got {draws!r}")
        check_arguments(model, args)
        self.model, self.guide, self.args = model, guide, args
        self.draws, self.seed = draws, seed
        with self._looking():
            blocks = read_blocks(guide, *args, sites=tuple(reduced_priors))
            values = [guide_values(guide, *args) for _ in range(2)]
            traces = [model_at(model, drawn, *args) for drawn in values]
            self.sites: dict[str, LatentSite] = {}
            for name, reduced in reduced_priors.items():
                if name not in traces[0].nodes or traces[0].nodes[name]["type"] != "sample":
                    latents = [site for site in values[0] if site in traces[0].nodes]
                    raise ValueError(f"criterion must name latents of the model, of {latents}: got {name!r}")
                parents = self._parents(name, traces, values) if differs(traces[0], traces[1], name) else ()
                if parents and dependent_priors == "raise":
                    raise ValueError(
                        f"model has a prior of {name!r} that depends on {', '.join(map(repr, parents))}: pass "
                        "dependent_priors='average' to average over joint draws of the guide, with a standard error"
                    )
                (block,) = [block for block in blocks if name in block.sites]
                self.sites[name] = latent_site(name, block, traces[0].nodes[name], reduced, parents)

    @contextmanager
    def _looking(self, stream: int = 0) -> Iterator[None]:
        """Looking only: no generator, gradient or parameter store may notice. Other streams, other draws."""
        store = pyro.get_param_store()
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            store.scope(store.get_state()),
            _evaluating(self.model),
        ):
            torch.manual_seed(self.seed + stream)
            yield

    def _parents(
        self, site: str, traces: Sequence[Any], values: Sequence[Mapping[str, Tensor]]
    ) -> tuple[str, ...]:
        """The latents without whose second value the prior of a site is what it was."""
        found = []
        for name in values[0]:
            if name != site:
                mixed = model_at(self.model, {**values[0], name: values[1][name]}, *self.args)
                if differs(traces[0], mixed, site):
                    found.append(name)
        return tuple(found) or ("something drawn anew in each call",)

    # --- per element --------------------------------------------------------------------------------

    @cached_property
    def elements(self) -> dict[str, Evidence]:
        """ΔF of reducing each element alone, of the shape of the site's elements; 0 where a fit has removed it."""
        return {name: self._of_elements(site) for name, site in self.sites.items()}

    def _of_elements(self, site: LatentSite) -> Evidence:
        with self._looking(), _naming(site.name):
            if site.parents:
                found = _estimated(estimate_log_mean(self._inner[site.name]))
            else:
                try:
                    found = _exact(log_evidence_change(site.posterior, site.prior, site.reduced_prior))
                except NotImplementedError:
                    found = _estimated(estimate_log_mean(self._ratios(site)))
        return Evidence(
            *(
                torch.where(site.kept, part, filling)
                for part, filling in zip(found, (0.0, 0.0, math.nan), strict=True)
            )
        )

    @cached_property
    def _block_draws(self) -> dict[int, dict[str, Tensor]]:
        """Values of the sites of each block asked about, float64. Shape: (draws, *site)."""
        drawn: dict[int, dict[str, Tensor]] = {}
        with self._looking():
            for site in self.sites.values():
                block = site.block
                if id(block) not in drawn:
                    drawn[id(block)] = (
                        block.values(block.draw(self.draws))
                        if isinstance(block, JointNormalBlock)
                        else {site.name: block.distribution.sample((self.draws,))}
                    )
        return drawn

    def _ratios(self, site: LatentSite) -> Tensor:
        """log p̃(θ) - log p(θ) at draws of the posterior. Shape: (draws, *elements)."""
        if isinstance(site.reduced_prior, dist.Delta):
            raise ImportanceError(
                "a point mass can't be estimated from draws: beside others it has no closed form here"
            )
        check_support(site.posterior, site.prior, site.reduced_prior)
        return log_ratio(site.prior, site.reduced_prior, self._block_draws[id(site.block)][site.name])

    # --- priors that depend on other latents ----------------------------------------------------------

    @cached_property
    def _joint_draws(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Joint draws of all latents of the guide, and at each the priors of the sites that depend on some."""
        dependent = [name for name, site in self.sites.items() if site.parents]
        values, priors = [], []
        with self._looking():
            for _ in range(self.draws):
                drawn = guide_values(self.guide, *self.args)
                trace = model_at(self.model, drawn, *self.args)
                values.append(drawn)
                priors.append(
                    {
                        name: per_element(
                            trace.nodes[name]["fn"], self.sites[name].shape, self.sites[name].event_dim
                        )
                        for name in dependent
                    }
                )
        stacked = {name: torch.stack([drawn[name] for drawn in values]) for name in values[0]}
        return stacked, priors

    @cached_property
    def _inner(self) -> dict[str, Tensor]:
        """For sites with dependent priors, ΔF of each element given all else. Shape: (draws, *elements).

        The mean of its exponential over the draws is E_q[p̃/p]: what can be integrated in closed form is.
        """
        values, priors = self._joint_draws
        inner = {}
        for name, site in self.sites.items():
            if not site.parents:
                continue
            posteriors = self._conditionals(site, values)
            try:
                rows = [
                    log_evidence_change(q, prior[name], site.reduced_prior)
                    for q, prior in zip(posteriors, priors, strict=True)
                ]
                inner[name] = torch.stack(rows)
            except NotImplementedError:
                inner[name] = self._inner_ratios(name)
        return inner

    def _conditionals(self, site: LatentSite, values: Mapping[str, Tensor]) -> Iterator[Any]:
        """The posterior of each element given all else, at each joint draw."""
        block = site.block
        if not isinstance(block, JointNormalBlock):
            yield from (site.posterior for _ in range(self.draws))
            return
        away = self._unconstrained(block, values) - block.loc
        precision = self._precision(block)
        rows = site.coordinates
        covariance = torch.linalg.inv(precision[rows.unsqueeze(-1), rows.unsqueeze(-2)])
        for row in away:
            pull = (precision @ row)[rows].unsqueeze(-1)
            yield site.law(block.loc[rows] + row[rows] - (covariance @ pull).squeeze(-1), covariance)

    def _precision(self, block: JointNormalBlock) -> Tensor:
        everything = torch.arange(len(block.loc), device=block.loc.device)
        precision: Tensor = torch.linalg.inv(block.covariance(everything))
        return precision

    def _unconstrained(self, block: JointNormalBlock, values: Mapping[str, Tensor]) -> Tensor:
        """Shape: (draws, coordinates)."""
        parts = [
            at.transform.inv(values[name].double()).reshape(self.draws, -1)
            for name, at in block.layout.items()
        ]
        return torch.cat(parts, -1)

    # --- of a choice of elements ------------------------------------------------------------------------

    def change(self, selection: Selection) -> Evidence:
        """ΔF of reducing all chosen elements together.

        Raises:
            NotImplementedError: where sites whose priors depend on each other are reduced together.
            ImportanceError: where it has to be estimated from draws, and can't.
        """
        chosen = self.chosen(selection)
        dependent = {name: mask for name, mask in chosen.items() if self.sites[name].parents}
        parts = []
        if dependent:
            parts.append(_estimated(self._averaged(chosen, dependent)))
        for block, masks in self.by_block({k: v for k, v in chosen.items() if k not in dependent}):
            parts.append(self.of_block(block, masks))
        if not parts:
            return _exact(torch.zeros((), dtype=torch.float64))
        return Evidence(
            torch.stack([part.log_evidence_change for part in parts]).sum(0),
            torch.stack([part.standard_error for part in parts]).square().sum(0).sqrt(),
            _worst(torch.stack([part.khat for part in parts])),
        )

    def chosen(self, selection: Selection) -> dict[str, Tensor]:
        """A selection without what a fit has removed, and without sites of which nothing is chosen."""
        unknown = sorted(set(selection) - set(self.sites))
        if unknown:
            raise ValueError(f"selection must be of the sites {list(self.sites)}: got {unknown}")
        masks = {name: mask & self.sites[name].kept for name, mask in selection.items()}
        return {name: mask for name, mask in masks.items() if bool(mask.any())}

    def by_block(self, chosen: Selection) -> list[tuple[Block, dict[str, Tensor]]]:
        blocks: dict[int, tuple[Block, dict[str, Tensor]]] = {}
        for name, mask in chosen.items():
            block = self.sites[name].block
            blocks.setdefault(id(block), (block, {}))[1][name] = mask
        return list(blocks.values())

    def of_block(self, block: Block, masks: Mapping[str, Tensor]) -> Evidence:
        if not isinstance(block, JointNormalBlock):
            ((name, mask),) = masks.items()
            found = self.elements[name]
            error = found.standard_error[mask].square().sum().sqrt()
            return Evidence(found.log_evidence_change[mask].sum(), error, _worst(found.khat[mask]))
        with self._looking(), _naming(", ".join(masks)):
            try:
                group = self.group(masks)
                own = group.coordinates
                return _exact(group.change(block.loc[own], block.covariance(own)).log_evidence_change)
            except NotImplementedError:
                return _estimated(self._block_estimate(masks))

    def _block_estimate(self, masks: Mapping[str, Tensor]) -> ImportanceEstimate:
        ratios = [self._ratios(self.sites[name])[:, mask].sum(-1) for name, mask in masks.items()]
        return estimate_log_mean(torch.stack(ratios).sum(0))

    def group(self, masks: Selection, priors: Mapping[str, Any] | None = None) -> GroupReduction:
        """The chosen elements of sites of one joint normal as a group of its coordinates.

        Raises:
            NotImplementedError: where there is no closed form for them.
        """
        groups = []
        for name, mask in masks.items():
            site = self.sites[name]
            prior = site.prior if priors is None else priors[name]
            groups.append(group_of(site, mask, prior))
        return joined(groups)

    def _averaged(self, chosen: Selection, dependent: Selection) -> ImportanceEstimate:
        """Of the chosen elements of sites with dependent priors, given all else that is not chosen."""
        crossing = {name: set(self.sites[name].parents) & set(chosen) for name in dependent}
        for name, parents in crossing.items():
            if parents:
                raise NotImplementedError(
                    f"{name!r} can't be reduced together with {sorted(parents)}, which its prior depends on: "
                    "reduce one, then fit again"
                )
        with self._looking(), _naming(", ".join(dependent)):
            return estimate_log_mean(
                torch.stack(
                    [self._inner_of_block(block, masks) for block, masks in self.by_block(dependent)]
                ).sum(0)
            )

    def _inner_of_block(self, block: Block, masks: Mapping[str, Tensor]) -> Tensor:
        """ΔF of the chosen elements given all else. Shape: (draws,)."""
        if not isinstance(block, JointNormalBlock):
            return torch.stack([self._inner[name][:, mask].sum(-1) for name, mask in masks.items()]).sum(0)
        try:
            return torch.stack([change for change, _, _ in self._conditional_groups(block, masks)])
        except NotImplementedError:
            return torch.stack(
                [self._inner_ratios(name)[:, mask].sum(-1) for name, mask in masks.items()]
            ).sum(0)

    def _inner_ratios(self, name: str) -> Tensor:
        """log p̃(θ) - log p(θ) at the joint draws, for a site with a dependent prior. Shape: (draws, *elements)."""
        values, priors = self._joint_draws
        at, reduced = values[name].double(), self.sites[name].reduced_prior
        if isinstance(reduced, dist.Delta):
            raise ImportanceError("a point mass can't be estimated from draws, and has no closed form here")
        return torch.stack([log_ratio(prior[name], reduced, at[k]) for k, prior in enumerate(priors)])

    def _conditional_groups(
        self, block: JointNormalBlock, masks: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(ΔF, mean, covariance) of the chosen coordinates under their reduced prior, given all others, by draw."""
        values, priors = self._joint_draws
        away = self._unconstrained(block, values) - block.loc
        precision = self._precision(block)
        own: Tensor | None = None
        for row, prior in zip(away, priors, strict=True):
            group = self.group(masks, prior)
            if own is None:
                own = group.coordinates
                covariance = torch.linalg.inv(precision[own][:, own])
            loc = block.loc[own] + row[own] - covariance @ (precision @ row)[own]
            found = group.change(loc, covariance)
            yield found.log_evidence_change, found.loc, found.covariance

    # --- the reduced posterior ----------------------------------------------------------------------------

    def reduced_posterior(self, selection: Selection) -> ReducedPosterior:
        """The posterior of the model in which all chosen elements are reduced, as a guide."""
        chosen = self.chosen(selection)
        dependent = {name: mask for name, mask in chosen.items() if self.sites[name].parents}
        with self._looking():
            if dependent:
                rest = {name: mask for name, mask in chosen.items() if name not in dependent}
                if rest:
                    raise NotImplementedError(
                        f"sites with dependent priors {sorted(dependent)} have a reduced posterior on their own, "
                        f"not together with {sorted(rest)}"
                    )
                return ReducedPosterior(self.guide, [self._averaged_part(chosen, dependent)])
            parts = [self._reduced_block(block, masks) for block, masks in self.by_block(chosen)]
        return ReducedPosterior(self.guide, parts)

    def _reduced_block(self, block: Block, masks: Mapping[str, Tensor]) -> Part:
        if not isinstance(block, JointNormalBlock):
            ((name, mask),) = masks.items()
            return self._reduced_site(self.sites[name], mask)
        try:
            group = self.group(masks)
        except NotImplementedError:
            found = self._block_estimate(masks)
            return self._weighted(self._block_draws[id(block)], found.log_weights)
        everything = torch.arange(len(block.loc), device=block.loc.device)
        _, loc, covariance = reduce_group(block.loc, block.covariance(everything), group)
        kinds = {
            name: (self.sites[name].dtype, self.sites[name].value_dims)
            if name in self.sites
            else self._kind_of(name)
            for name in block.sites
        }
        return JointPart(block, loc, _root(covariance), kinds)

    def _kind_of(self, name: str) -> tuple[torch.dtype, int]:
        """Of a site that is not asked about: dtype of its values, and event dimensions."""
        node = model_at(self.model, guide_values(self.guide, *self.args), *self.args).nodes[name]
        return node["value"].dtype, len(node["fn"].event_shape)

    def _reduced_site(self, site: LatentSite, mask: Tensor) -> SitePart:
        before: Any = site.posterior
        try:
            after: Any = reduced_posterior(site.posterior, site.prior, site.reduced_prior)
        except NotImplementedError:
            drawn = self._block_draws[id(site.block)][site.name]
            weights = estimate_log_mean(self._ratios(site)).log_weights
            elements = len(site.shape)  # behind which Pyro wants the draws
            after = dist.Empirical(drawn.movedim(0, elements), weights.movedim(0, -1), validate_args=False)
        law: Any = after if bool(mask.all()) else dist.MaskedMixture(mask, before, after, validate_args=False)
        missing = site.value_dims - len(law.event_shape)
        whole = law.to_event(missing) if missing > 0 else law
        return SitePart(site.name, with_tensors(whole, lambda tensor: tensor.to(site.dtype)))

    def _weighted(self, values: Mapping[str, Tensor], log_weights: Tensor) -> WeightedDraws:
        kinds = {name: self._kind_of(name) for name in values}
        return WeightedDraws(
            {name: value.to(kinds[name][0]) for name, value in values.items()},
            log_weights,
            {name: kinds[name][1] for name in values},
        )

    def _averaged_part(self, chosen: Selection, dependent: Selection) -> WeightedDraws:
        found = self._averaged(chosen, dependent)
        values, priors = self._joint_draws
        values = dict(values)
        for block, masks in self.by_block(dependent):
            if isinstance(block, JointNormalBlock):
                values |= self._drawn_given(block, masks, values)
                continue
            for name, mask in masks.items():
                site = self.sites[name]
                new = torch.stack(
                    [
                        reduced_posterior(site.posterior, prior[name], site.reduced_prior)
                        .sample()
                        .expand(site.shape + values[name].shape[1 + len(site.shape) :])
                        for prior in priors
                    ]
                )
                where = mask.reshape(mask.shape + (1,) * (new.dim() - 1 - mask.dim()))
                values[name] = torch.where(where, new.to(values[name].dtype), values[name])
        return self._weighted(values, found.log_weights)

    def _drawn_given(
        self, block: JointNormalBlock, masks: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        unconstrained = self._unconstrained(block, values)
        own = self.group(masks, self._joint_draws[1][0]).coordinates
        for row, (_, loc, covariance) in zip(
            unconstrained, self._conditional_groups(block, masks), strict=True
        ):
            row[own] = loc + _root(covariance) @ torch.randn_like(loc)
        return {name: value for name, value in block.values(unconstrained).items() if name in values}


def _worst(khat: Tensor) -> Tensor:
    """The largest k̂; NaN where all have closed forms."""
    known = khat[~khat.isnan()]
    return known.max() if len(known) else khat[0]


def _root(covariance: Tensor) -> Tensor:
    """A matrix whose product with its transpose is this one, which may have directions without variance."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _naming(site: str) -> Iterator[None]:
    """Errors of what is done inside say of which site they speak."""
    try:
        yield
    except (ImportanceError, ValueError) as error:
        raise type(error)(f"site {site!r}: {error}") from None
