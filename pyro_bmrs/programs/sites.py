"""The sites of a Pyro model whose evidence is asked for: posterior, prior and reduced prior of their elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from pyro_bmrs.evidence import ImportanceError
from pyro_bmrs.evidence.importance import check_support
from pyro_bmrs.evidence.joint_normal import GroupReduction
from pyro_bmrs.evidence.normal import normal_of_vectors
from pyro_bmrs.evidence.unwrapping import expanded_to, fixed, flat, point
from pyro_bmrs.inference.blocks import Block, JointNormalBlock
from pyro_bmrs.inference.posteriors import on_support
from pyro_bmrs.inference.sites import elementary, is_discrete, mask_of

Selection = Mapping[str, Tensor]  # for each site a bool per element, of its shape


@dataclass(frozen=True, eq=False)  # tensors have no equality
class LatentSite:
    """A site of the model that is asked about.

    Attributes:
        name: of the site.
        block: the part of the posterior that it belongs to.
        value_shape: of the whole site.
        event_dim: of an element.
        prior, reduced_prior: of the elements, batch shape `shape`, float64.
        kept: False for elements that a fit has removed, or the model masks out. Shape: `shape`.
        parents: the latents that the prior depends on.
        units: the numbers of the elements; in a network those of the original one. Shape: (elements,).
    """

    name: str
    block: Block
    value_shape: torch.Size
    event_dim: int
    prior: Any
    reduced_prior: Any
    kept: Tensor
    parents: tuple[str, ...]
    units: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of its elements."""
        return self.kept.shape

    @cached_property
    def coordinates(self) -> Tensor:
        """The numbers of each element's coordinates in the joint normal. Shape: (elements, coordinates of one)."""
        assert isinstance(self.block, JointNormalBlock)
        at = self.block.layout[self.name]
        return at.of(self.block.everything).reshape(self.shape.numel(), -1)

    def law(self, loc: Tensor, covariance: Tensor) -> Any:
        """The distribution of the elements where they are normals of unconstrained values.

        Shapes: (elements, n), (elements, n, n).
        """
        assert isinstance(self.block, JointNormalBlock)
        transform = self.block.layout[self.name].transform
        if covariance.shape[-1] == 1 and not self.event_dim:
            scale = covariance[:, 0, 0].sqrt().reshape(self.shape)
            normal = dist.Normal(loc.reshape(self.shape), scale, validate_args=False)
            return on_support(normal, transform, 0)
        normal = dist.MultivariateNormal(loc, covariance_matrix=covariance, validate_args=False)
        return _reshaped(on_support(normal, transform, self.event_dim), self.shape)

    @cached_property
    def posterior(self) -> Any:
        """Of each element on its own. Batch shape: `shape`."""
        if not isinstance(self.block, JointNormalBlock):
            return per_element(self.block.distribution, self.shape, self.event_dim)
        coordinates = self.coordinates
        covariance = torch.stack([self.block.covariance(row) for row in coordinates])
        return self.law(self.block.loc[coordinates], covariance)


def latent_site(
    name: str,
    block: Block,
    node: Mapping[str, Any],
    reduced: Any,
    parents: tuple[str, ...],
    units: Tensor | None = None,
) -> LatentSite:
    value, prior = node["value"], elementary(node["fn"])
    of_model = node["fn"].batch_shape + node["fn"].event_shape
    if value.shape != of_model:
        raise ValueError(
            f"guide must give {name!r} the shape that it has in the model, {tuple(of_model)}: got {tuple(value.shape)}"
        )
    reduced = elementary_law(name, reduced, value.device)
    laws = [prior, reduced]
    if not isinstance(reduced, dist.Delta) and is_discrete(prior) != is_discrete(reduced):
        kind = "whole" if is_discrete(prior) else "real"
        raise ValueError(
            f"criterion must give {name!r} a reduced prior of {kind} numbers, as its prior is: got {reduced}"
        )
    if not isinstance(block, JointNormalBlock):
        laws.append(elementary(block.distribution))
    event_dim = max(len(law.event_shape) for law in laws)
    shape = value.shape[: value.dim() - event_dim]
    try:
        fitted = per_element(reduced, shape, event_dim, value.shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"criterion must give {name!r} a reduced prior that broadcasts to its shape {tuple(value.shape)}: got "
            f"{reduced} of shape {tuple(reduced.batch_shape + reduced.event_shape)} ({error})"
        ) from None
    kept = torch.ones(shape, dtype=torch.bool, device=value.device)
    # three ways to leave elements out: a fit removed them, the prior masks them, poutine.mask masks them
    for mask in (getattr(block, "kept", None), mask_of(node["fn"]), node["mask"]):
        if mask is not None:
            kept = kept & torch.as_tensor(mask, device=kept.device).expand(shape)
    return LatentSite(
        name=name,
        block=block,
        value_shape=value.shape,
        event_dim=event_dim,
        prior=per_element(prior, shape, event_dim, value.shape),
        reduced_prior=fitted,
        kept=kept,
        parents=parents,
        units=torch.arange(shape.numel(), device=value.device) if units is None else units,
    )


def check_estimable(site: LatentSite, prior: Any) -> None:
    """Raise ImportanceError unless draws can tell of the reduced prior."""
    if isinstance(site.reduced_prior, dist.Delta):
        raise ImportanceError(
            "a point mass can't be estimated from draws: beside others it has no closed form here"
        )
    check_support(site.posterior, prior, site.reduced_prior)


def elementary_law(name: str, given: Any, device: torch.device | None = None) -> Any:
    """A reduced prior as a distribution of single elements. Numbers and tensors are points."""
    if isinstance(given, int | float | Tensor) and not isinstance(given, bool):
        at = torch.as_tensor(given, dtype=torch.float64, device=device)
        if not bool(torch.isfinite(at).all()) or (isinstance(given, Tensor) and given.is_complex()):
            raise ValueError(f"criterion must give {name!r} a finite point: got {given}")
        return dist.Delta(at, validate_args=False)
    if not isinstance(given, Distribution):
        raise TypeError(
            f"criterion must give {name!r} a distribution or a number (a point mass): got {type(given).__name__}"
        )
    mask = mask_of(given)
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError(
            f"criterion must give {name!r} a reduced prior without a mask, since `reduce` chooses the elements, or "
            f"`groups` does: got one with {mask}"
        )
    law = elementary(given)
    if isinstance(law, dist.Delta):
        if bool((law.log_density != 0).any()):
            raise ValueError(
                f"criterion must give {name!r} a point of mass one: got log_density {law.log_density}"
            )
        return point(law, 0)
    return law


def per_element(law: Any, shape: torch.Size, event_dim: int, value_shape: torch.Size | None = None) -> Any:
    """A distribution of elements: batch shape `shape`, `event_dim` event dimensions, float64."""
    law = fixed(elementary(law))
    if value_shape is not None and isinstance(law, dist.Delta):
        return dist.Delta(law.v.expand(value_shape), event_dim=event_dim, validate_args=False)
    missing = event_dim - len(law.event_shape)
    if missing and value_shape is not None:
        shape = shape + value_shape[len(shape) : len(shape) + missing]
    elif missing:
        shape = shape + law.batch_shape[len(law.batch_shape) - missing :]
    law = expanded_to(law, shape)
    return Independent(law, missing) if missing else law


def _reshaped(law: Any, shape: torch.Size) -> Any:
    """A distribution of a row of elements as one of the given batch shape."""
    if law.batch_shape == shape:
        return law
    if isinstance(law, TransformedDistribution):
        return type(law)(_reshaped(law.base_dist, shape), law.transforms, validate_args=False)
    if isinstance(law, Independent):
        return Independent(_reshaped(law.base_dist, shape), law.reinterpreted_batch_ndims)

    def reshaped(value: Tensor) -> Tensor:
        return value.reshape(shape + value.shape[1:])

    if isinstance(law, dist.Normal):
        return dist.Normal(reshaped(law.loc), reshaped(law.scale), validate_args=False)
    assert isinstance(law, dist.MultivariateNormal)
    return dist.MultivariateNormal(
        reshaped(law.loc), scale_tril=reshaped(law.scale_tril), validate_args=False
    )


def group_of(site: LatentSite, mask: Tensor, prior: Any) -> GroupReduction:
    """Chosen elements of one site as a group of coordinates of its joint normal."""
    assert isinstance(site.block, JointNormalBlock)
    transform = site.block.layout[site.name].transform
    coordinates = site.coordinates[mask.flatten()]
    width = coordinates.shape[1]

    def normal(law: Any) -> tuple[Tensor, Tensor] | None:
        """Mean and covariance factor of the unconstrained values, where these are normal under `law`."""
        found = _unconstrained_normal(law, transform, width)
        if found is None:
            return None
        loc, factor = (part.reshape(-1, *part.shape[len(site.shape) :])[mask.flatten()] for part in found)
        return loc.flatten(), torch.block_diag(*factor)  # type: ignore[no-untyped-call]

    of_prior, of_reduced = normal(prior), normal(site.reduced_prior)
    if of_reduced is None:
        raise NotImplementedError(f"the reduced prior of {site.name!r} is not normal where its posterior is")
    loc, factor = of_reduced
    if of_prior is not None:
        prior_loc, prior_factor = of_prior
        return GroupReduction(coordinates.flatten(), loc, factor, prior_loc, prior_factor @ prior_factor.mT)
    if not isinstance(site.reduced_prior, dist.Delta):
        raise NotImplementedError(f"the prior of {site.name!r} is not normal where its posterior is")
    # the Jacobian turns the prior's density at the point into the density of the unconstrained value
    value = site.reduced_prior.v
    jacobian = transform.inv.log_abs_det_jacobian(value, transform.inv(value))  # type: ignore[no-untyped-call]
    density = prior.log_prob(value) - jacobian.reshape(*site.shape, -1).sum(-1)
    if not bool(torch.isfinite(density[mask]).all()):
        raise ValueError(f"reduced_prior must be a point where the prior of {site.name!r} has a density")
    return GroupReduction(coordinates.flatten(), loc, factor, log_prior_density=density[mask].sum())


def _unconstrained_normal(law: Any, transform: Any, width: int) -> tuple[Tensor, Tensor] | None:
    """(mean (*elements, n), factor (*elements, n, n)) of transform⁻¹(θ) for θ of this law, where that is normal."""
    parts = flat([transform])
    if isinstance(law, dist.Delta):
        value = transform.inv(law.v)
        if not bool(torch.isfinite(value).all()):
            raise ValueError("reduced_prior must be a point inside the support")
        loc = value.reshape(*law.batch_shape, width)
        return loc, torch.zeros(*loc.shape, width, dtype=loc.dtype, device=loc.device)
    if parts:
        if not isinstance(law, TransformedDistribution) or flat(law.transforms) != parts:
            return None
        law = law.base_dist
    if isinstance(law, torch.distributions.Normal):
        return law.loc.unsqueeze(-1), law.scale[..., None, None]
    return normal_of_vectors(law)
