"""ΔF of any choice of elements of a Pyro model's latents, and the posterior that the choice leads to.

An element is one entry of a site, or one event (a point on a simplex, a vector with a full covariance). Mean-field
posteriors are read element by element. Joint normals are read in their unconstrained values, where the priors are
normal there too or the reduced prior is a point. Everything else is estimated from draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_bmrs.arguments import check, whole_number
from pyro_bmrs.evidence import ImportanceError, estimate_log_mean, log_evidence_change, reduced_posterior
from pyro_bmrs.evidence.importance import (
    DRAWS,
    LEAST_DRAWS,
    HalfAndHalf,
    ImportanceEstimate,
    half_and_half,
    log_ratio,
)
from pyro_bmrs.evidence.joint_normal import Group, as_one
from pyro_bmrs.evidence.unwrapping import with_tensors
from pyro_bmrs.inference.blocks import Block, JointNormalBlock
from pyro_bmrs.inference.calls import check_arguments
from pyro_bmrs.inference.posteriors import read_blocks
from pyro_bmrs.inference.traces import guide_values, parents_of
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.programs.averaging import Averaging, root_of
from pyro_bmrs.programs.reduced_posterior import (
    JointPart,
    Part,
    ReducedPosterior,
    SiteKind,
    SitePart,
    WeightedDraws,
)
from pyro_bmrs.programs.sites import LatentSite, Selection, check_estimable, group_of, latent_site
from pyro_bmrs.pruning.reduce import arguments_of

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
    """Posterior, priors and reduced priors of those latents of a model that are asked about.

    Args:
        model, guide: the Pyro programs.
        args: what both are called with; of an `AutoTruncatedLogNormal` none are needed.
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
        check(
            isinstance(reduced_priors, Mapping), "reduced_priors", "a mapping of sites to reduced priors",
            type(reduced_priors), TypeError,
        )  # fmt: skip
        if not reduced_priors:
            raise ValueError(
                "criterion must name at least one site and its reduced prior: got an empty mapping"
            )
        known = dependent_priors in get_args(DependentPriors)
        check(known, "dependent_priors", "'raise' or 'average'", dependent_priors)
        draws, seed = whole_number("draws", draws, LEAST_DRAWS), whole_number("seed", seed)
        for name, program in (("model", model), ("guide", guide)):
            check(callable(program), name, "a Pyro program", type(program), TypeError)
        args = arguments_of(guide, args)
        check_arguments(model, args)
        self.model, self.guide, self.args, self.given = model, guide, args, dict(reduced_priors)
        self.draws, self.seed = draws, seed
        with self.looking():
            blocks = read_blocks(guide, *args, sites=tuple(reduced_priors))
            drawn = guide_values(guide, *args)
            # the prior of a noise layer depends on nothing: the network need not run many times
            layers = noise_layers(model) if isinstance(model, nn.Module) else {}
            self._example, parents = parents_of(
                model,
                drawn,
                args,
                [name for name in reduced_priors if name not in layers],
                draw=lambda: guide_values(guide, *args),
            )
            self.sites: dict[str, LatentSite] = {}
            for name, reduced in reduced_priors.items():
                node = self._example.nodes.get(name)
                if node is None or node["type"] != "sample" or node["is_observed"]:
                    raise ValueError(f"criterion must name latents of the model: it has none named {name!r}")
                on = parents.get(name, ())
                self._check_parents(name, on, drawn, dependent_priors)
                (block,) = [block for block in blocks if name in block.sites]
                units = layers[name].units if name in layers else None
                self.sites[name] = latent_site(name, block, node, reduced, on, units)

    def looking(self, stream: int = 0) -> AbstractContextManager[None]:
        """A context that leaves no trace. Each stream has its own random numbers."""
        return untouched(self.model, self.guide, seed=self.seed + stream)

    def _check_parents(
        self,
        site: str,
        parents: tuple[str, ...],
        drawn: Mapping[str, Tensor],
        dependent_priors: DependentPriors,
    ) -> None:
        unknown = [name for name in parents if name not in drawn]
        if unknown:
            raise ValueError(
                f"model has a prior of {site!r} that depends on {', '.join(map(repr, unknown))}, of which the guide "
                "has no posterior: sum it out in the model, or give the guide one"
            )
        if parents and dependent_priors == "raise":
            raise ValueError(
                f"model has a prior of {site!r} that depends on {', '.join(map(repr, parents))}: pass "
                "dependent_priors='average' to average over joint draws of the guide, with a standard error"
            )

    # --- per element --------------------------------------------------------------------------------

    @cached_property
    def elements(self) -> dict[str, Evidence]:
        """ΔF of reducing each element alone, of the shape of the site's elements; 0 for what a fit has removed."""
        return {name: self._of_elements(site) for name, site in self.sites.items()}

    def _of_elements(self, site: LatentSite) -> Evidence:
        with self.looking(), _naming(site.name):
            if site.parents:
                found = _estimated(estimate_log_mean(self._averaging.given_all_else(site)))
            else:
                try:
                    found = _exact(log_evidence_change(site.posterior, site.prior, site.reduced_prior))
                except NotImplementedError:
                    found = _estimated(self._of_element_draws(site).estimate())
        nothing = _exact(torch.zeros_like(found.log_evidence_change))
        return Evidence(*(torch.where(site.kept, *pair) for pair in zip(found, nothing, strict=True)))

    @cached_property
    def _averaging(self) -> Averaging:
        return Averaging(self)

    @cached_property
    def _block_draws(self) -> dict[int, dict[str, Tensor]]:
        """Values of the sites of each joint normal asked about, float64. Shape: (draws, *site)."""
        every = [site.block for site in self.sites.values()]
        blocks = {id(block): block for block in every if isinstance(block, JointNormalBlock)}
        with self.looking():
            return {number: block.values(block.draw(self.draws)) for number, block in blocks.items()}

    def _of_element_draws(self, site: LatentSite) -> HalfAndHalf:
        """Draws of each element alone."""
        check_estimable(site, site.prior)
        return half_and_half(site.posterior, site.prior, site.reduced_prior, self.draws)

    def _ratios(self, site: LatentSite) -> Tensor:
        """log p̃(θ) - log p(θ) at draws of the site's joint normal. Shape: (draws, *elements)."""
        check_estimable(site, site.prior)
        return log_ratio(site.prior, site.reduced_prior, self._block_draws[id(site.block)][site.name])

    # --- of a choice of elements ------------------------------------------------------------------------

    def change(self, selection: Selection) -> Evidence:
        """ΔF of reducing all chosen elements together.

        Raises:
            NotImplementedError: where sites whose priors depend on each other are reduced together.
            ImportanceError: where it has to be estimated from draws, and can't.
        """
        averaged, others = self._averaged_apart(self.chosen(selection))
        parts = [self.of_block(block, masks) for block, masks in self.by_block(others)]
        if averaged:
            with self.looking(), _naming(", ".join(averaged)):
                parts.append(_estimated(self._averaging.together(averaged)))
        if not parts:
            return _exact(torch.zeros((), dtype=torch.float64))
        return Evidence(
            torch.stack([part.log_evidence_change for part in parts]).sum(0),
            torch.stack([part.standard_error for part in parts]).square().sum(0).sqrt(),
            _worst(torch.stack([part.khat for part in parts])),
        )

    def chosen(self, selection: Selection) -> dict[str, Tensor]:
        """The selection without elements that a fit has removed, and without sites that have none left."""
        unknown = sorted(set(selection) - set(self.sites))
        if unknown:
            raise ValueError(f"selection must be of the sites {list(self.sites)}: got {unknown}")
        masks = {name: mask & self.sites[name].kept for name, mask in selection.items()}
        return {name: mask for name, mask in masks.items() if bool(mask.any())}

    def _averaged_apart(self, chosen: Selection) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What has to be averaged over joint draws; and the rest, which is independent of it.

        Raises:
            NotImplementedError: where a site is chosen together with one that its prior depends on.
        """
        dependent = [name for name in chosen if self.sites[name].parents]
        for name in dependent:
            parents = sorted(set(self.sites[name].parents) & set(chosen))
            if parents:
                raise NotImplementedError(
                    f"{name!r} can't be reduced together with {parents}, which its prior depends on: "
                    "reduce one, then fit again"
                )
        # these depend on each other: sites in a joint normal with one of them, or with a parent of one
        moving = {*dependent, *(parent for name in dependent for parent in self.sites[name].parents)}
        averaged = {name: mask for name, mask in chosen.items() if moving & set(self.sites[name].block.sites)}
        return averaged, {name: mask for name, mask in chosen.items() if name not in averaged}

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
        with self.looking(), _naming(", ".join(masks)):
            try:
                group = self.group(masks)
                own = group.coordinates
                return _exact(group.change(block.loc[own], block.covariance(own)).log_evidence_change)
            except NotImplementedError:
                if sum(int(mask.sum()) for mask in masks.values()) == 1:
                    ((name, mask),) = masks.items()
                    return Evidence(*(part[mask].squeeze() for part in self.elements[name]))
                return _estimated(self._block_estimate(masks))

    def _block_estimate(self, masks: Mapping[str, Tensor]) -> ImportanceEstimate:
        ratios = [self._ratios(self.sites[name])[:, mask].sum(-1) for name, mask in masks.items()]
        return estimate_log_mean(torch.stack(ratios).sum(0))

    def group(self, masks: Selection, priors: Mapping[str, Any] | None = None) -> Group:
        """The chosen elements of sites of one joint normal as a group of its coordinates.

        Args:
            priors: of the elements of some sites, where they depend on other latents.

        Raises:
            NotImplementedError: where there is no closed form for them.
        """
        groups = []
        for name, mask in masks.items():
            site = self.sites[name]
            prior = site.prior if priors is None else priors.get(name, site.prior)
            groups.append(group_of(site, mask, prior))
        return as_one(groups)

    # --- the reduced posterior ----------------------------------------------------------------------------

    def reduced_posterior(self, selection: Selection) -> ReducedPosterior:
        """The posterior of the model in which all chosen elements are reduced, as a guide."""
        averaged, others = self._averaged_apart(self.chosen(selection))
        with self.looking(stream=1):  # not the random numbers of the joint draws
            parts = [self._reduced_block(block, masks) for block, masks in self.by_block(others)]
            if averaged:
                values, log_weights = self._averaging.reduced(averaged)
                own = {name for part in parts for name in part.sites}
                kept = {name: value for name, value in values.items() if name not in own}
                parts.append(self._weighted(kept, log_weights))
        sites = [name for name, node in self._example.iter_stochastic_nodes() if not site_is_subsample(node)]
        return ReducedPosterior(self.guide, parts, sites)

    def _reduced_block(self, block: Block, masks: Mapping[str, Tensor]) -> Part:
        if not isinstance(block, JointNormalBlock):
            ((name, mask),) = masks.items()
            return self._reduced_site(self.sites[name], mask)
        try:
            group = self.group(masks)
        except NotImplementedError:
            log_weights = self._block_estimate(masks).log_weights
            return self._weighted(self._block_draws[id(block)], log_weights)
        own = group.coordinates
        covariance = block.covariance(own)
        found = group.change(block.loc[own], covariance)
        across = block.covariance(block.everything, own)
        regression: Tensor = torch.linalg.solve(covariance, across.mT).mT
        kinds = {name: self._kind_of(name) for name in block.sites}
        return JointPart(block, own, regression, found.loc, root_of(found.covariance), kinds)

    def _kind_of(self, name: str) -> SiteKind:
        node = self._example.nodes[name]
        frames = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
        return SiteKind(node["value"].dtype, len(node["fn"].event_shape), frames)

    def _reduced_site(self, site: LatentSite, mask: Tensor) -> SitePart:
        before: Any = site.posterior
        try:
            after: Any = reduced_posterior(site.posterior, site.prior, site.reduced_prior)
        except NotImplementedError:
            drawn = self._of_element_draws(site)
            weights = drawn.estimate().log_weights
            elements = len(site.shape)  # Pyro wants the draws behind them
            after = dist.Empirical(
                drawn.values.movedim(0, elements), weights.movedim(0, -1), validate_args=False
            )
        law: Any = after if bool(mask.all()) else dist.MaskedMixture(mask, before, after, validate_args=False)
        kind = self._kind_of(site.name)
        missing = kind.event_dim - len(law.event_shape)
        whole = law.to_event(missing) if missing > 0 else law
        real = kind.dtype if kind.dtype.is_floating_point else torch.float64
        return SitePart(site.name, with_tensors(whole, lambda tensor: tensor.to(real)), kind)

    def _weighted(self, values: Mapping[str, Tensor], log_weights: Tensor) -> WeightedDraws:
        kinds = {name: self._kind_of(name) for name in values if name in self._example.nodes}
        return WeightedDraws({name: values[name] for name in kinds}, log_weights, kinds)


def _worst(khat: Tensor) -> Tensor:
    """The largest k̂; NaN where all have closed forms."""
    known = khat[~khat.isnan()]
    return known.max() if len(known) else khat[0]


@contextmanager
def _naming(site: str) -> Iterator[None]:
    """Errors from inside name the site."""
    try:
        yield
    except (ImportanceError, ValueError) as error:
        raise type(error)(f"site {site!r}: {error}") from None
