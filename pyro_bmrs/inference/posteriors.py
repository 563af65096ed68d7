"""The posterior that a guide stands for.

Pyro's autoguides show a Delta at each latent site; the distribution is at an auxiliary site of unconstrained
values, or in `get_posterior()`. This file maps it back to the support of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.infer.autoguide import AutoContinuous, AutoGuideList, AutoNormal
from pyro.infer.autoguide.guides import AutoCallable
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Transform,
    biject_to,
)

from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.evidence.unwrapping import fixed, flat
from pyro_bmrs.inference.blocks import Block, JointNormalBlock, SiteBlock, UnconstrainedSite
from pyro_bmrs.inference.calls import check_ready
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.sites import elementary, read_sites
from pyro_bmrs.inference.traces import latents, parents_of
from pyro_bmrs.inference.untouched import untouched


class UnreadablePosteriorError(ValueError):
    """A guide whose posterior of a site is no distribution that evidence could be read from."""


def read_posterior(guide: Callable[..., Any], *args: Any) -> dict[str, TruncatedLogNormal]:
    """The truncated log-normal posteriors of any mean-field guide, detached, by site; no trace is left.

    Raises:
        ValueError: if the guide has none, naming the sites it has and their types.
    """
    if isinstance(guide, AutoTruncatedLogNormal):
        return guide.posterior()
    with untouched(guide):
        found = {name: elementary(node["fn"]) for name, node in latents(guide, *args).items()}
    posteriors = {name: q for name, q in found.items() if isinstance(q, TruncatedLogNormal)}
    if not posteriors:
        kinds = {name: type(q).__name__ for name, q in found.items()}
        raise ValueError(f"guide must have TruncatedLogNormal sites: it has {kinds}")
    return posteriors


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
    check_ready(guide)
    if not isinstance(guide, AutoNormal | AutoContinuous | AutoTruncatedLogNormal):
        return _of_program(guide, args, sites)
    nodes = read_sites(guide.prototype_trace).latent
    for name in sites & set(nodes):
        _check_whole(name, nodes[name])
    if isinstance(guide, AutoTruncatedLogNormal):
        return [
            SiteBlock(name, fixed(q), guide.site_posterior(name).kept)
            for name, q in guide.posterior().items()
        ]
    if isinstance(guide, AutoNormal):
        return [
            SiteBlock(name, _to_support(node["fn"], *guide._get_loc_and_scale(name)))
            for name, node in nodes.items()
        ]
    return _of_continuous(guide, args, sites)


def _to_support(prior: Any, loc: Tensor, scale: Tensor) -> Distribution:
    """A normal of unconstrained values, on the support of a prior."""
    normal = dist.Normal(loc.detach().double(), scale.detach().double(), validate_args=False)
    return on_support(normal, biject_to(prior.support), len(prior.event_shape))


def on_support(normal: Any, transform: Transform, event_dim: int) -> Distribution:
    """The law of transform(x) for a normal x, with the given number of event dimensions.

    Where the transform acts on single entries, the result is an Independent of single entries: evidence can then be
    read element by element.
    """
    parts = flat([transform])
    law = normal
    if parts:
        # a composition of maps of single entries hides that they are; its parts show it
        whole = any(part.domain.event_dim or part.codomain.event_dim for part in parts)
        maps = [fixed(part) for part in ([transform] if whole else parts)]
        law = dist.TransformedDistribution(normal, maps, validate_args=False)
    missing = event_dim - len(law.event_shape)
    result: Distribution = law.to_event(missing) if missing > 0 else law
    return result


def _of_continuous(guide: AutoContinuous, args: tuple[Any, ...], sites: set[str]) -> list[Block]:
    nodes = guide.prototype_trace.nodes
    own = [name for name in read_sites(guide.prototype_trace).latent if name in guide._unconstrained_shapes]
    layout, start = {}, 0
    for name in own:
        shape = guide._unconstrained_shapes[name]
        # of single elements, so that its Jacobian is that of single elements too
        transform = ComposeTransform(flat([fixed(biject_to(nodes[name]["fn"].support))]))
        layout[name] = UnconstrainedSite(start, shape, transform)
        start += shape.numel()
    base: Any = elementary(fixed(guide.get_posterior(*args)))
    if isinstance(base, dist.Normal):
        return [
            SiteBlock(name, _to_support(nodes[name]["fn"], at.of(base.loc), at.of(base.scale)))
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
    asked = sites & set(latents(guide, *args))
    first, parents = parents_of(guide, {}, args, asked)
    blocks: list[Block] = []
    for name, node in read_sites(first).latent.items():
        if name not in sites:
            continue
        if isinstance(elementary(node["fn"]), dist.Delta):
            raise UnreadablePosteriorError(
                f"guide must have a distribution at {name!r}: that of {type(guide).__name__} is a Delta there. A point "
                "is no posterior, and where the distribution of a transformed value is can be told of AutoNormal, "
                "AutoDiagonalNormal, AutoMultivariateNormal and AutoLowRankMultivariateNormal only"
            )
        _check_whole(name, node)
        if parents[name]:
            raise UnreadablePosteriorError(
                f"guide must have a posterior of {name!r} that does not depend on another latent: it depends on "
                f"{', '.join(parents[name])}"
            )
        blocks.append(_site_block(name, fixed(node["fn"])))
    return blocks


def _check_whole(site: str, node: Mapping[str, Any]) -> None:
    for frame in node["cond_indep_stack"]:
        if frame.full_size is not None and frame.full_size != frame.size:
            raise UnreadablePosteriorError(
                f"guide must have the whole posterior of {site!r}: it is in the subsampled plate "
                f"{frame.name!r} ({frame.size} of {frame.full_size})"
            )


def _site_block(name: str, posterior: Any) -> Block:
    base: Any = elementary(posterior)
    if not isinstance(base, MultivariateNormal | LowRankMultivariateNormal) or base.batch_shape:
        return SiteBlock(name, posterior)
    return _joint_block(base, {name: UnconstrainedSite(0, base.event_shape, ComposeTransform([]))})


def _joint_block(
    law: MultivariateNormal | LowRankMultivariateNormal, layout: Mapping[str, UnconstrainedSite]
) -> JointNormalBlock:
    if isinstance(law, MultivariateNormal):
        return JointNormalBlock(law.loc, law.scale_tril, None, layout)
    return JointNormalBlock(law.loc, law.cov_factor, law.cov_diag, layout)
