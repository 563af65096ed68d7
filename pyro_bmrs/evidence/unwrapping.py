"""Unwraps three distributions together (Independent, Masked, Expanded, transforms); parameters in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions import Delta, ExpandedDistribution, MaskedDistribution
from pyro.distributions import Independent as PyroIndependent
from pyro.distributions import TransformedDistribution as PyroTransformed
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    Independent,
    IndependentTransform,
    Transform,
    TransformedDistribution,
)
from torch.distributions.transforms import _InverseTransform, identity_transform

Triple = tuple[Distribution, Distribution, Distribution]
NAMES = ("posterior", "prior", "reduced_prior")


@dataclass(frozen=True)
class Wrapping:
    """A wrapper that was removed from all three.

    Attributes:
        of_change: what it does to ΔF, given ΔF and the number of dimensions (of draws) before its batch shape.
        of_distribution: wraps the reduced posterior again.
    """

    of_change: Callable[[Tensor, int], Tensor]
    of_distribution: Callable[[Any], Distribution]


def check_distributions(triple: Triple) -> None:
    """Raise TypeError, naming the argument, unless all three are distributions."""
    for name, member in zip(NAMES, triple, strict=True):
        if not isinstance(member, Distribution):
            raise TypeError(f"{name} must be a distribution: got {type(member).__name__}")


def unwrapped(
    posterior: Distribution, prior: Distribution, reduced_prior: Distribution, stop: Callable[[Triple], bool]
) -> tuple[Triple, list[Wrapping]]:
    """The elementary distributions inside, and the wrappers that were removed, outermost first.

    Args:
        stop: whether there is a rule for three distributions as they are. Transformations are removed
            only if there is none.

    Raises:
        ValueError: if shapes don't match, or reduced_prior masks elements that the others count.
    """
    triple: Triple = (posterior, prior, reduced_prior)
    wrappings: list[Wrapping] = []
    while True:
        _check_points(triple)
        _check_shapes(triple)
        if any(isinstance(member, ExpandedDistribution) for member in triple):
            wrappings.append(_expanded(batch_shape_of(triple)))
            triple = _each(triple, lambda d: d.base_dist if isinstance(d, ExpandedDistribution) else d)
        elif any(isinstance(member, MaskedDistribution) for member in triple):
            wrappings.append(_mask(triple))
            triple = _each(triple, lambda d: d.base_dist if isinstance(d, MaskedDistribution) else d)
        elif all(isinstance(member, Independent | Delta) for member in triple) and triple[0].event_shape:
            dims = min(_strippable(member) for member in triple)
            triple = _each(triple, partial(_stripped, dims=dims))
            wrappings.append(_independent(dims, batch_shape_of(triple)))
        elif (
            not stop(triple)
            and all(isinstance(member, TransformedDistribution) for member in triple)
            and _same_map(triple)
        ):
            wrappings.append(_transformed(triple[0].transforms))  # type: ignore[attr-defined]
            triple = _each(triple, lambda d: d.base_dist)
        else:
            return triple, wrappings


def _each(triple: Triple, function: Callable[[Any], Distribution]) -> Triple:
    first, second, third = (function(member) for member in triple)
    return first, second, third


def _check_points(triple: Triple) -> None:
    for name, member in zip(NAMES[:2], triple[:2], strict=True):
        if isinstance(member, Delta):
            raise ValueError(f"{name} must have a density, to be compared with others: got a Delta")
    reduced = triple[2]
    if (
        isinstance(reduced, Delta)
        and not reduced.log_density.is_meta
        and bool((reduced.log_density != 0).any())
    ):
        raise ValueError(
            f"reduced_prior must be a point mass of mass one: this Delta has log_density {reduced.log_density}"
        )


def _check_shapes(triple: Triple) -> None:
    shapes = [member.event_shape for member in triple]
    for name, member, shape in zip(NAMES, triple, shapes, strict=True):
        if len(shape) != len(shapes[0]):
            raise ValueError(
                f"{name} must have the posterior's {len(shapes[0])} event dimensions, as an Independent over them "
                f"has: got {len(shape)} of {member}"
            )
        if shape != shapes[0]:
            raise ValueError(
                f"{name} must be of events of the posterior's shape {tuple(shapes[0])}: got {tuple(shape)}"
            )
    batch_shape_of(triple)


def batch_shape_of(triple: Triple) -> torch.Size:
    """The batch shape that the three broadcast to; ValueError if there is none."""
    shapes = [member.batch_shape for member in triple]
    try:
        return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call, no-any-return]
    except RuntimeError:
        given = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(NAMES, shapes, strict=True))
        raise ValueError(f"the three must have batch shapes that broadcast: got {given}") from None


def _mask(triple: Triple) -> Wrapping:
    """Elements that posterior or prior mask don't count: their ΔF is 0."""
    masks = [
        torch.as_tensor(member._mask) if isinstance(member, MaskedDistribution) else None for member in triple
    ]
    counted = [mask for mask in masks[:2] if mask is not None]
    both = torch.ones((), dtype=torch.bool) if not counted else counted[0]
    for mask in counted[1:]:
        both = both & mask.to(both.device)
    if masks[2] is not None and not both.is_meta and bool((both & ~masks[2].to(both.device)).any()):
        raise ValueError("reduced_prior must not mask out elements that posterior and prior count")

    def of_change(change: Tensor, draws: int) -> Tensor:
        hidden = ~both.to(change.device)
        shape = torch.broadcast_shapes(change.shape[draws:], hidden.shape)  # type: ignore[no-untyped-call]
        return torch.where(hidden, 0.0, _widened(change, draws, shape))

    return Wrapping(of_change, lambda distribution: MaskedDistribution(distribution, both))


def _widened(change: Tensor, draws: int, shape: torch.Size) -> Tensor:
    """ΔF expanded to a batch shape, behind the dimensions of draws."""
    missing = len(shape) - (change.dim() - draws)
    lead = change.shape[:draws]
    return change.reshape(lead + (1,) * missing + change.shape[draws:]).expand(lead + shape)


def expanded_to(distribution: Any, shape: torch.Size) -> Distribution:
    """The distribution expanded to a batch shape; itself if it has that shape."""
    same: Distribution = distribution if distribution.batch_shape == shape else distribution.expand(shape)
    return same


def _expanded(shape: torch.Size) -> Wrapping:
    return Wrapping(lambda change, draws: _widened(change, draws, shape), partial(expanded_to, shape=shape))


def _strippable(member: Distribution) -> int:
    return member.reinterpreted_batch_ndims if isinstance(member, Independent) else len(member.event_shape)


def _stripped(member: Any, dims: int) -> Distribution:
    if isinstance(member, Delta):
        same: Distribution = point(member, len(member.event_shape) - dims)
        return same
    left = member.reinterpreted_batch_ndims - dims
    base: Distribution = member.base_dist
    return base if not left else Independent(base, left)


def point(delta: Delta, event_dim: int) -> Delta:
    """The same point mass with another number of event dimensions."""
    return Delta(delta.v, event_dim=event_dim, validate_args=False)


def _independent(dims: int, shape: torch.Size) -> Wrapping:
    return Wrapping(
        lambda change, draws: _widened(change, draws, shape).sum(dim=list(range(-dims, 0))),
        lambda distribution: PyroIndependent(distribution.expand(shape), dims),
    )


def _transformed(transforms: list[Transform]) -> Wrapping:
    # one-to-one maps don't change ΔF
    return Wrapping(lambda change, draws: change, lambda base: PyroTransformed(base, transforms))


def _same_map(triple: Triple) -> bool:
    first, *others = (flat(member.transforms) for member in triple)  # type: ignore[attr-defined]
    return all(part.bijective for part in first) and all(
        len(other) == len(first) and all(map(_equal, other, first)) for other in others
    )


def _equal(one: Transform, other: Transform) -> bool:
    # on the meta device there are no values to compare
    if any(isinstance(value, Tensor) and value.is_meta for value in vars(one).values()):
        return type(one) is type(other)
    return bool(one == other)


def flat(transforms: list[Transform]) -> list[Transform]:
    """The elementary maps that a list of maps is composed of, in order, without identities.

    >>> from torch.distributions import AffineTransform, ExpTransform
    >>> flat([ComposeTransform([ExpTransform(), AffineTransform(0.0, 2.0)])])[0]
    ExpTransform()
    """
    parts: list[Transform] = []
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            parts += flat(transform.parts)
        elif isinstance(transform, IndependentTransform):
            parts += flat([transform.base_transform])
        elif not _is_identity(transform):
            parts.append(transform)
    return parts


def _is_identity(transform: Transform) -> bool:
    """Whether a map is the identity, such as the shift by 0 that ends torch's map to the positive numbers."""
    if transform is identity_transform:
        return True
    if not isinstance(transform, AffineTransform):
        return False

    def everywhere(value: Tensor | float, number: float) -> bool:
        if isinstance(value, Tensor):
            return not value.is_meta and bool((value == number).all())
        return value == number

    return everywhere(transform.loc, 0.0) and everywhere(transform.scale, 1.0)


def with_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution or transform with a function applied to its real parameters; the copy checks nothing."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(member, function) for member in value)
    if isinstance(value, nn.Module) or not isinstance(value, Distribution | Transform):
        return value
    if isinstance(value, _InverseTransform):
        return with_tensors(value.inv, function).inv
    new = copy.copy(value)
    # a transform and its inverse refer to each other
    own = {name: member for name, member in vars(value).items() if name != "_inv"}
    vars(new).update({name: with_tensors(member, function) for name, member in own.items()})
    if isinstance(new, Distribution):
        new._validate_args = False
    return new


def in_float64(value: Any) -> Any:
    """The distribution (or transform) with float64 parameters.

    >>> from torch.distributions import Normal
    >>> in_float64(Normal(0.0, 1.0)).loc.dtype
    torch.float64
    """
    return with_tensors(value, Tensor.double)


def fixed(value: Any) -> Any:
    """The distribution (or transform) with float64 parameters that carry no gradient."""
    return with_tensors(value, lambda tensor: tensor.detach().double())


def device_of(distribution: Distribution) -> torch.device:
    """The device of a distribution's parameters, whatever their names."""
    devices: list[torch.device] = []

    def note(tensor: Tensor) -> Tensor:
        devices.append(tensor.device)
        return tensor

    with_tensors(distribution, note)
    return devices[0] if devices else torch.device("cpu")


def log_density(member: Distribution, value: Tensor) -> Tensor:
    """log_prob in nats, with -inf outside the support, for a distribution that checks nothing. Shape: draws + batch."""
    support = member.support
    if support is None:
        return member.log_prob(value)
    inside = support.check(value)  # type: ignore[no-untyped-call]
    if support.is_discrete and not support.event_dim:  # a table has no place for other numbers
        value = torch.where(inside, value, 0)
    density: Tensor = member.log_prob(value)
    # a support of single entries checks each entry; an event is inside if all its entries are
    missing = len(member.event_shape) - support.event_dim
    inside = inside.flatten(-missing).all(-1) if missing > 0 else inside
    return torch.where(inside, density, -torch.inf)
