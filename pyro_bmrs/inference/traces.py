"""What a trace of a Pyro program says: what its sites are, their distributions, and what these depend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution

from pyro_bmrs.evidence.unwrapping import in_float64
from pyro_bmrs.networks.noise import FixedScales

NOTHING_KNOWN = "something drawn anew in each call"
# How often a program is run anew to see whether its distributions change.
_TRACES = 7

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Sites:
    """The sites of one call of a Pyro program by what they are: nodes of its trace, by name.

    Attributes:
        latent: what is drawn and has a posterior. Also where a mask leaves no density.
        observed: data.
        factors: `pyro.factor`, a density without a value.
        deterministic: `pyro.deterministic`, a value without a density. Reparametrised sites, and those with missing
            observations (`obs_mask`), are such.
        auxiliary: what a guide only draws with.
        plates: the indices that subsampled plates choose.
    """

    latent: dict[str, Node] = field(default_factory=dict)
    observed: dict[str, Node] = field(default_factory=dict)
    factors: dict[str, Node] = field(default_factory=dict)
    deterministic: dict[str, Node] = field(default_factory=dict)
    auxiliary: dict[str, Node] = field(default_factory=dict)
    plates: dict[str, Node] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Node]:
        """What makes the likelihood: observations and factors."""
        return self.observed | self.factors

    def shared_plates(self) -> dict[str, int]:
        """The sizes of the plates, by name, that hold all observations; without any, all factors."""
        held = [
            {frame.name: frame.size for frame in node["cond_indep_stack"] if frame.vectorized}
            for node in (self.observed or self.factors).values()
        ]
        return (
            {name: size for name, size in held[0].items() if all(name in other for other in held)}
            if held
            else {}
        )

    def local(self, examples: int) -> frozenset[str]:
        """The latents of single examples: those in a plate that has as many, beside an observation."""
        plates = {
            frame.name
            for node in self.observed.values()
            for frame in node["cond_indep_stack"]
            if frame.vectorized and frame.size == examples
        }
        return frozenset(
            name
            for name, node in self.latent.items()
            if any(frame.name in plates for frame in node["cond_indep_stack"])
        )

    def whole(self, examples: int) -> frozenset[str]:
        """Observations and factors outside of a plate of so many, beside others that are in one."""
        outside = {
            name
            for name, node in self.data.items()
            if all(frame.size != examples for frame in node["cond_indep_stack"] if frame.vectorized)
        }
        return frozenset(outside if len(outside) < len(self.data) else ())


def read_sites(trace: Trace) -> Sites:
    """What the sites of a trace are: the one way in which this package reads a Pyro program.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     pyro.deterministic("square", mean**2)
    ...     pyro.factor("belief", -mean.abs())
    ...     pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.5))
    >>> sites = read_sites(poutine.trace(model).get_trace())
    >>> list(sites.latent), list(sites.observed), list(sites.factors), list(sites.deterministic)
    (['mean'], ['y'], ['belief'], ['square'])
    """
    sites = Sites()
    for name, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        if site_is_subsample(node):
            kind = sites.plates
        elif node["infer"].get("_deterministic"):
            kind = sites.deterministic
        elif isinstance(elementary(node["fn"]), Unit):
            kind = sites.factors
        elif node["is_observed"]:
            kind = sites.observed
        else:
            kind = sites.auxiliary if node["infer"].get("is_auxiliary") else sites.latent
        kind[name] = node
    return sites


def plate_scale(node: Node) -> float:
    """How many elements of the whole each element of a site stands for, by its subsampled plates."""
    scale: float = math.prod(
        (frame.full_size or frame.size) / frame.size for frame in node["cond_indep_stack"]
    )
    return scale


def weights_of(node: Node) -> Tensor | None:
    """The weight of each example that `poutine.scale` gives a site, beside its plates; None if it gives none.

    A scale that is one number is no weight: it says how often the data are counted.
    """
    scale = node["scale"]
    return scale / plate_scale(node) if isinstance(scale, Tensor) and scale.numel() > 1 else None


def elementary(distribution: Distribution) -> Distribution:
    """The distribution of single elements: Independent, Masked and Expanded taken off."""
    while hasattr(distribution, "base_dist") and not isinstance(distribution, TransformedDistribution):
        distribution = distribution.base_dist
    return distribution


def mask_of(distribution: Distribution) -> object:
    """The mask of a distribution, under any Independent; None if it has none."""
    while not isinstance(distribution, MaskedDistribution):
        if not hasattr(distribution, "base_dist"):
            return None
        distribution = distribution.base_dist
    return distribution._mask


def latents(guide: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Node]:
    """The latents that a guide draws in one call, by name, as nodes of its trace."""
    return read_sites(poutine.trace(guide).get_trace(*args, **kwargs)).latent


def guide_values(guide: Callable[..., Any], *args: Any) -> dict[str, Tensor]:
    """One draw of all latents of a guide."""
    return {name: node["value"].detach() for name, node in latents(guide, *args).items()}


def model_at(model: Callable[..., Any], values: Mapping[str, Tensor], *args: Any) -> Trace:
    """The trace of a program at given values of its latents; each keeps its distribution, as `fn`."""
    with FixedScales(values):  # poutine.condition would make observations of them
        return poutine.trace(model).get_trace(*args)


def parents_of(
    program: Callable[..., Any],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    sites: Collection[str],
    *,
    draw: Callable[[], Mapping[str, Tensor]] = dict,
) -> tuple[Trace, dict[str, tuple[str, ...]]]:
    """A trace of a program, and for each of `sites` the latents that its distribution depends on.

    Each other latent is changed in turn, while all others keep their values. It takes the values of other draws; a
    discrete one takes all its values.

    Args:
        values: of latents that are given.
        draw: makes such values anew.

    Raises:
        ValueError: for a site that is not sampled in each call.
    """
    first = model_at(program, values, *args)
    others = [model_at(program, draw(), *args) for _ in range(_TRACES)] if sites else []
    for name in sites:
        if not all(name in trace.nodes for trace in (first, *others)):
            raise ValueError(
                f"site {name!r} must be sampled in each call of model and guide: in some it is not"
            )
    read = read_sites(first)
    own = {name: node["value"] for name, node in (read.latent | read.auxiliary).items()}
    found: dict[str, list[str]] = {name: [] for name in sites}
    for name in own if sites else ():
        for value in _other_values(name, first, others):
            mixed = model_at(program, {**own, name: value}, *args)
            for site in sites:
                if name not in (site, *found[site]) and _differs(first, mixed, site):
                    found[site].append(name)
    for site, parents in found.items():
        if not parents and any(_differs(first, other, site) for other in others):
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
    # of real numbers one draw is enough: all its entries have changed
    return changed[:1] if node["value"].is_floating_point() else changed


def _differs(first: Trace, second: Trace, site: str) -> bool:
    """Whether a site has different distributions in two traces, judged at both its values."""
    if site not in second.nodes:
        return True
    one, other = (trace.nodes[site]["fn"] for trace in (first, second))
    if one.batch_shape != other.batch_shape or one.event_shape != other.event_shape:
        return True
    one, other = in_float64(one), in_float64(other)
    for value in (trace.nodes[site]["value"] for trace in (first, second)):
        wide = value.double() if value.is_floating_point() else value
        with torch.no_grad():
            here, there = one.log_prob(wide), other.log_prob(wide)
        if not bool(((here == there) | (here.isnan() & there.isnan())).all()):
            return True
    return False
