"""What the sites of a Pyro program are, and their distributions: the one way in which a trace is read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Delta, ExpandedDistribution, MaskedDistribution, Unit
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent

Node = Mapping[str, Any]
# Others with a base, such as zero-inflated ones, are laws of their own.
_WRAPPERS = Independent | MaskedDistribution | ExpandedDistribution


class MaskedLatentWarning(UserWarning):
    """A guide has a density of elements of a latent that the model masks: an ELBO of both says nothing."""


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
    >>> from pyro import poutine
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
        elif node["infer"].get("_deterministic") or _is_computed(node):
            kind = sites.deterministic
        elif isinstance(elementary(node["fn"]), Unit):
            kind = sites.factors
        elif node["is_observed"]:
            kind = sites.observed
        else:
            kind = sites.auxiliary if node["infer"].get("is_auxiliary") else sites.latent
        kind[name] = node
    return sites


def check_same_latents(sites: Sites, given: Collection[str], with_guide: bool = True) -> None:
    """Raise unless a guide's latents are those of a model.

    Args:
        sites: of the model.
        given: the latents of the guide.
        with_guide: whether there is a guide.

    Raises:
        ValueError: naming those that one of them lacks.
    """
    unknown = [name for name in sites.latent if name not in given]
    if unknown and not with_guide:
        raise ValueError(f"guide must be given for a model with latents: it has {unknown}")
    if unknown:
        raise ValueError(
            f"guide must have a posterior of every latent of the model: it has none of {unknown}. Sum them out in the "
            "model, or give the guide one"
        )
    foreign = [name for name in given if name not in sites.latent]
    if foreign:
        raise ValueError(
            f"guide must have no latents but the model's: it has {foreign}. Mark what it only draws with as "
            'infer={"is_auxiliary": True}'
        )


def check_observed(sites: Sites) -> None:
    """Raise unless a model observes numbers, one for each element of their law and its plates.

    Raises:
        ValueError: naming the site that has NaN, or whose values (n,) stand beside a law of shape (n, 1).
    """
    for name, node in sites.observed.items():
        law, value = node["fn"], node["value"]
        missing = int(value.isnan().sum()) if value.is_floating_point() else 0
        if missing:
            raise ValueError(
                f"data must have no NaN: {missing} of {value.numel()} values of {name!r} are. Leave them out, or put "
                "another number in their place and mask it"
            )
        shape = value.shape[: value.dim() - law.event_dim]
        whole = torch.broadcast_shapes(law.batch_shape, shape)  # type: ignore[no-untyped-call]
        plates = {frame.dim: frame.size for frame in node["cond_indep_stack"] if frame.vectorized}
        outside = plates and any(
            size > 1 and place - len(whole) not in plates for place, size in enumerate(whole)
        )
        if outside or whole not in (law.batch_shape, shape):
            sizes = f" in plates of {list(plates.values())}" if plates else ""
            raise ValueError(
                f"model must observe a value for each element of its law: {name!r} has values of shape "
                f"{tuple(shape)} and laws of {tuple(law.batch_shape)}{sizes}. Often one is (n, 1) and the other (n,), "
                "or .to_event is missing"
            )


def masked_latents(sites: Sites) -> dict[str, Tensor]:
    """Where `poutine.mask` leaves a latent without a density: False. As `obs_mask` does to what was observed."""
    found = {
        name: torch.as_tensor(node["mask"]).broadcast_to(node["fn"].batch_shape)
        for name, node in sites.latent.items()
        if node["mask"] is not None
    }
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def warn_of_masked(masks: Mapping[str, Tensor]) -> None:
    """Warn of latents of which a guide has elements that the model has not: where these are False."""
    for name, mask in masks.items():
        warnings.warn(
            f"model leaves {int((~mask).sum())} of {mask.numel()} elements of latent {name!r} without a density "
            "(poutine.mask, or obs_mask), and the guide has one of them: log q counts what log p does not. "
            "ELBO and k̂ say nothing then; give the model only the elements that are missing",
            MaskedLatentWarning,
            stacklevel=3,
        )


def _is_computed(node: Node) -> bool:
    """Whether a site is given the value that its law has at a point, as reparametrised sites are."""
    law = elementary(node["fn"])
    return (
        node["is_observed"]
        and isinstance(law, Delta)
        and not bool(torch.as_tensor(law.log_density != 0).any())
    )


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
    while isinstance(distribution, _WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def is_discrete(distribution: Distribution) -> bool:
    """Whether its values can be counted; of a law that does not tell, they can't."""
    support = distribution.support
    return support is not None and bool(support.is_discrete)


def mask_of(distribution: Distribution) -> object:
    """The mask of a distribution, under any Independent; None if it has none."""
    while isinstance(distribution, _WRAPPERS):
        if isinstance(distribution, MaskedDistribution):
            return distribution._mask
        distribution = distribution.base_dist
    return None
