"""The posterior that a guide stands for, whichever way Pyro's guides hide it.

Pyro's autoguides show a Delta at each latent site; the distribution is at an auxiliary site of unconstrained
values, or in `get_posterior()`. This file maps it back to the support of the site. The posterior comes in
blocks that are independent of each other: single sites, and joint normals over the unconstrained values of
several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoGuideList, AutoNormal
from pyro.infer.autoguide.guides import AutoCallable
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Transform,
    biject_to,
)

from pyro_bmrs.evidence.unwrapping import fixed, flat, in_float64
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal, elementary
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.noise import FixedScales


@dataclass(frozen=True)
class SiteBlock:
    """The posterior of one site that is independent of all others.

    Attributes:
        site: its name.
        distribution: of its value, over its whole shape, float64.
        kept: bool, False for elements that a fit has removed; None where it has none. Shape: batch.
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
        start, size: of its coordinates.
        shape: of its unconstrained value.
        transform: from there to its support, acting on single elements.
    """

    start: int
    size: int
    shape: torch.Size
    transform: Transform


@dataclass(frozen=True)
class JointNormalBlock:
    """A normal posterior of the unconstrained values of several sites, float64.

    Attributes:
        loc: Shape: (coordinates,).
        factor: a matrix whose product with its transpose is the covariance, plus `diagonal`. Shape:
            (coordinates, rank).
        diagonal: Shape: (coordinates,); None where the factor is all.
        layout: where each site's coordinates are.
    """

    loc: Tensor
    factor: Tensor
    diagonal: Tensor | None
    layout: Mapping[str, UnconstrainedSite]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.layout)

    def covariance(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Between coordinates. Shape: (len(first), len(second))."""
        same = second is None
        second = first if second is None else second
        value = self.factor[first] @ self.factor[second].mT
        if self.diagonal is not None:
            value = value + (first.unsqueeze(-1) == second) * self.diagonal[first].unsqueeze(-1)
        # symmetric to the last digit
        return 0.5 * (value + value.mT) if same else value

    @property
    def noise_size(self) -> int:
        """Standard normal numbers that a draw takes."""
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
        batch = unconstrained.shape[:-1]
        return {
            name: at.transform(unconstrained[..., at.start : at.start + at.size].reshape(batch + at.shape))
            for name, at in self.layout.items()
        }

    def log_density(self, unconstrained: Tensor) -> Tensor:
        """Of the values of the sites, at the unconstrained ones. Shape: (*batch, coordinates) → batch."""
        coordinates = torch.arange(len(self.loc), device=self.loc.device)
        normal = MultivariateNormal(self.loc, self.covariance(coordinates), validate_args=False)
        density: Tensor = normal.log_prob(unconstrained)  # type: ignore[no-untyped-call]
        batch = unconstrained.shape[:-1]
        for at in self.layout.values():
            x = unconstrained[..., at.start : at.start + at.size].reshape(batch + at.shape)
            jacobian = at.transform.log_abs_det_jacobian(x, at.transform(x))  # type: ignore[no-untyped-call]
            density = density - jacobian.reshape(*batch, -1).sum(-1)
        return density


Block = SiteBlock | JointNormalBlock


# How often a program is run anew to see whether its distributions change.
_TRACES = 7


class UnreadablePosteriorError(ValueError):
    """A guide whose posterior of a site is no distribution that evidence could be read from."""


def read_blocks(guide: Callable[..., Any], *args: Any, sites: tuple[str, ...]) -> list[Block]:
    """The blocks of a guide's posterior that hold the given sites, detached, in float64; no trace is left.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model():
    ...     pyro.sample("rate", dist.Gamma(2.0, 1.0))
    >>> guide = AutoNormal(model)
    >>> _ = guide()
    >>> read_blocks(guide, sites=("rate",))[0].distribution
    TransformedDistribution()

    Args:
        guide: any of Pyro's normal autoguides (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal,
            AutoLowRankMultivariateNormal), an `AutoTruncatedLogNormal`, an AutoGuideList of those, or a
            program whose sites have the distributions themselves and don't depend on each other.
        args: what the guide is called with.
        sites: the sites that are asked for. Others may have any posterior.

    Raises:
        UnreadablePosteriorError: naming the site and why: it is a Delta, depends on another latent, is
            subsampled, or comes from a flow.
        ValueError: for a site that the guide does not have.
        RuntimeError: for an autoguide without parameters yet.
    """
    with untouched(guide):
        blocks = _read(guide, args, set(sites))
    found = {name for block in blocks for name in block.sites}
    missing = [name for name in sites if name not in found]
    if missing:
        raise ValueError(
            f"guide must have a posterior of each of {list(sites)}: it has none of {missing}, only of {sorted(found)}"
        )
    return [block for block in blocks if set(block.sites) & set(sites)]


def _read(guide: Any, args: tuple[Any, ...], sites: set[str]) -> list[Block]:
    if isinstance(guide, AutoGuideList):
        return [block for part in guide for block in _read(part, args, sites)]
    if isinstance(guide, AutoCallable):
        return _of_program(guide._guide, args, sites)
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise RuntimeError("guide has no parameters yet: call it once on a batch, or fit it")
    if isinstance(guide, AutoNormal | AutoContinuous | AutoTruncatedLogNormal):
        for name, node in guide.prototype_trace.iter_stochastic_nodes():
            for frame in node["cond_indep_stack"] if name in sites else ():
                _check_whole(name, frame)
    if isinstance(guide, AutoTruncatedLogNormal):
        return [
            SiteBlock(name, fixed(q), guide.site_posterior(name).kept)
            for name, q in guide.posterior().items()
        ]
    if isinstance(guide, AutoNormal):
        return [
            SiteBlock(name, _to_support(guide._get_loc_and_scale(name), node["fn"]))
            for name, node in guide.prototype_trace.iter_stochastic_nodes()
        ]
    if isinstance(guide, AutoContinuous):
        return _of_continuous(guide, args, sites)
    return _of_program(guide, args, sites)


def _to_support(loc_and_scale: tuple[Tensor, Tensor], prior: Any) -> Distribution:
    """A normal of unconstrained values, on the support of a prior."""
    loc, scale = loc_and_scale
    normal = dist.Normal(loc.detach().double(), scale.detach().double(), validate_args=False)
    return on_support(normal, biject_to(prior.support), len(prior.event_shape))


def on_support(normal: Any, transform: Transform, event_dim: int) -> Distribution:
    """The law of transform(x) for a normal x, with the given number of event dimensions.

    Where the transform acts on single entries the result is an Independent of single entries, which
    evidence can be read from element by element.
    """
    parts = flat([transform])
    law = normal
    if any(part.domain.event_dim or part.codomain.event_dim for part in parts):
        law = dist.TransformedDistribution(normal, [fixed(transform)], validate_args=False)
    elif parts:
        law = dist.TransformedDistribution(normal, [fixed(part) for part in parts], validate_args=False)
    missing = event_dim - len(law.event_shape)
    result: Distribution = law.to_event(missing) if missing > 0 else law
    return result


def _of_continuous(guide: AutoContinuous, args: tuple[Any, ...], sites: set[str]) -> list[Block]:
    posterior = fixed(guide.get_posterior(*args))
    own = [name for name in guide.prototype_trace.stochastic_nodes if name in guide._unconstrained_shapes]
    layout, start = {}, 0
    for name in own:
        shape = guide._unconstrained_shapes[name]
        transform = biject_to(guide.prototype_trace.nodes[name]["fn"].support)
        # of single elements, so that its Jacobian is that of single elements too
        transform = ComposeTransform(flat([fixed(transform)]))
        layout[name] = UnconstrainedSite(start, math.prod(shape), shape, transform)
        start += math.prod(shape)
    base = elementary(posterior)
    if isinstance(base, dist.Normal):
        return [
            SiteBlock(
                name,
                _to_support(
                    (
                        base.loc[at.start : at.start + at.size].reshape(at.shape),
                        base.scale[at.start : at.start + at.size].reshape(at.shape),
                    ),
                    guide.prototype_trace.nodes[name]["fn"],
                ),
            )
            for name, at in layout.items()
        ]
    if isinstance(base, MultivariateNormal | LowRankMultivariateNormal):
        return [_joint_block(base, layout)]
    if not sites & set(own):
        return []
    hint = "; guide.laplace_approximation(*args) gives the normal one" if isinstance(base, dist.Delta) else ""
    raise UnreadablePosteriorError(
        f"guide must have a normal posterior of {sorted(sites & set(own))}: that of {type(guide).__name__} is a "
        f"{type(base).__name__}{hint}"
    )


def _of_program(guide: Callable[..., Any], args: tuple[Any, ...], sites: set[str]) -> list[Block]:
    asked = sites & set(poutine.trace(guide).get_trace(*args).stochastic_nodes)
    first, parents = parents_of(guide, {}, args, asked)
    blocks: list[Block] = []
    for name, node in first.iter_stochastic_nodes():
        if name not in sites or node["infer"].get("is_auxiliary"):
            continue
        base = elementary(node["fn"])
        if isinstance(base, dist.Delta):
            raise UnreadablePosteriorError(
                f"guide must have a distribution at {name!r}: that of {type(guide).__name__} is a Delta there. A point "
                "is no posterior, and where the distribution of a transformed value is can be told of AutoNormal, "
                "AutoDiagonalNormal, AutoMultivariateNormal and AutoLowRankMultivariateNormal only"
            )
        for frame in node["cond_indep_stack"]:
            _check_whole(name, frame)
        if parents[name]:
            raise UnreadablePosteriorError(
                f"guide must have a posterior of {name!r} that does not depend on another latent: it depends on "
                f"{', '.join(parents[name])}"
            )
        blocks.append(_site_block(name, fixed(node["fn"])))
    return blocks


def _check_whole(site: str, frame: Any) -> None:
    if frame.full_size is not None and frame.full_size != frame.size:
        raise UnreadablePosteriorError(
            f"guide must have the whole posterior of {site!r}: it is in the subsampled plate "
            f"{frame.name!r} ({frame.size} of {frame.full_size})"
        )


NOTHING_KNOWN = "something drawn anew in each call"


def parents_of(
    program: Callable[..., Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    sites: Collection[str],
    *,
    draw: Callable[[], Mapping[str, Tensor]] = dict,
) -> tuple[Trace, dict[str, tuple[str, ...]]]:
    """A trace of a program, and for each site asked about the latents that its distribution depends on.

    Each other latent takes other values in turn, all others being what they are: those of other draws, and of a
    discrete latent all there are.

    Args:
        values: of latents that are given.
        draw: makes such values anew.

    Raises:
        ValueError: for a site that is not there in each call.
    """
    first = model_at(program, values, *args)
    others = [model_at(program, draw(), *args) for _ in range(_TRACES)] if sites else []
    for name in sites:
        if not all(name in trace.nodes for trace in (first, *others)):
            raise ValueError(
                f"site {name!r} must be sampled in each call of model and guide: in some it is not"
            )
    own = {name: node["value"] for name, node in first.iter_stochastic_nodes() if not site_is_subsample(node)}
    found: dict[str, list[str]] = {name: [] for name in sites}
    for name in own if sites else ():
        for value in _other_values(name, first, others):
            mixed = model_at(program, {**own, name: value}, *args)
            for site in sites:
                if name not in (site, *found[site]) and differs(first, mixed, site):
                    found[site].append(name)
    for site, parents in found.items():
        if not parents and any(differs(first, other, site) for other in others):
            parents.append(NOTHING_KNOWN)
    return first, {site: tuple(parents) for site, parents in found.items()}


def _other_values(name: str, first: Trace, others: Sequence[Trace]) -> list[Tensor]:
    node = first.nodes[name]
    law = elementary(node["fn"])
    if getattr(law, "has_enumerate_support", False):
        with suppress(NotImplementedError):  # of elements that have different supports
            support = law.enumerate_support(expand=False)
            return [value.expand(node["value"].shape) for value in support]
    drawn = [trace.nodes[name]["value"] for trace in others if name in trace.nodes]
    changed = [value for value in drawn if not torch.equal(value, node["value"])]
    # of real numbers one will do: all its entries are others
    return changed[:1] if node["value"].is_floating_point() else changed


def _site_block(name: str, posterior: Any) -> Block:
    base: Any = elementary(posterior)
    if not isinstance(base, MultivariateNormal | LowRankMultivariateNormal) or base.batch_shape:
        return SiteBlock(name, posterior)
    layout = {name: UnconstrainedSite(0, len(base.loc), base.event_shape, ComposeTransform([]))}
    return _joint_block(base, layout)


def _joint_block(
    law: MultivariateNormal | LowRankMultivariateNormal, layout: Mapping[str, UnconstrainedSite]
) -> JointNormalBlock:
    if isinstance(law, MultivariateNormal):
        return JointNormalBlock(law.loc, law.scale_tril, None, layout)
    return JointNormalBlock(law.loc, law.cov_factor, law.cov_diag, layout)


def differs(first: Trace, second: Trace, site: str) -> bool:
    """Whether a site's distribution is not the same in two traces, at the values of both."""
    if site not in second.nodes:
        return True
    laws = [trace.nodes[site]["fn"] for trace in (first, second)]
    if laws[0].batch_shape != laws[1].batch_shape or laws[0].event_shape != laws[1].event_shape:
        return True
    values = [trace.nodes[site]["value"] for trace in (first, second)]
    with torch.no_grad():
        for value in values:
            wide = value.double() if value.is_floating_point() else value
            one, other = (in_float64(law).log_prob(wide) for law in laws)
            if not bool(((one == other) | (one.isnan() & other.isnan())).all()):
                return True
    return False


def guide_values(guide: Callable[..., Any], *args: Any) -> dict[str, Tensor]:
    """One draw of all latents of a guide."""
    trace = poutine.trace(guide).get_trace(*args)
    return {
        name: node["value"].detach()
        for name, node in trace.iter_stochastic_nodes()
        if not node["infer"].get("is_auxiliary") and not site_is_subsample(node)
    }


def model_at(model: Callable[..., Any], values: Mapping[str, Tensor], *args: Any) -> Trace:
    """The trace of a program at values of latents: the distribution of each is its `fn` there."""
    with FixedScales(values):  # not poutine.condition: a latent stays one
        return poutine.trace(model).get_trace(*args)


def check_arguments(model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import inspect

    called = model.forward if isinstance(model, nn.Module) else model
    try:
        inspect.signature(called).bind(*args)
    except TypeError as error:
        raise ValueError(
            f"model_args must be what the model is called with: got {len(args)} of them, and the model says: {error}"
        ) from None
    except ValueError:  # a callable without a signature
        return
