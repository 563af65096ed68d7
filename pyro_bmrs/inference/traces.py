"""Traces of Pyro programs at given values, and what their distributions depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bmrs.evidence.unwrapping import in_float64
from pyro_bmrs.inference.sites import Node, elementary, is_discrete, read_sites
from pyro_bmrs.networks.noise import FixedScales

NOTHING_KNOWN = "something drawn anew in each call"
# How often a program is run anew to see whether its distributions change.
_TRACES = 7


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
    if law.has_enumerate_support and is_discrete(law):
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
