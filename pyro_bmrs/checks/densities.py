"""What a model says of draws of its latents: log p, element by element and in all.

The data pass by in batches. Of each batch and draw, only the sums stay, and what a visitor keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent

from pyro_bmrs.checks.data import DataOfModel
from pyro_bmrs.checks.draws import check_scales
from pyro_bmrs.inference.sites import (
    Sites,
    check_observed,
    check_same_latents,
    plate_scale,
    read_sites,
    weights_of,
)
from pyro_bmrs.inference.traces import model_at

Values = Mapping[str, Tensor]


def element_log_prob(site: Mapping[str, Any]) -> Tensor:
    """log density of each element of a site, without scale and weights, 0 where it is masked."""
    law = site["fn"]
    while isinstance(law, Independent):
        law = law.base_dist
    value: Tensor = law.log_prob(site["value"])
    mask = site["mask"]
    if mask is None or mask is True:
        return value
    return torch.where(_over_elements(mask, site, value), value, 0.0)


def _total(terms: Tensor, site: Mapping[str, Any], *, scaled: bool) -> float:
    """The sum of densities of a site's elements with their weights, if `scaled` as often as plates count them."""
    weights = weights_of(site)
    if weights is None:
        return float(terms.sum()) * (float(site["scale"]) if scaled else 1.0)
    total = float((terms * _over_elements(weights, site, terms)).sum())
    return total * (plate_scale(site) if scaled else 1.0)


def _over_elements(part: Any, site: Mapping[str, Any], value: Tensor) -> Tensor:
    """What a site says of its batch, such as a mask, in the shape of the densities of its elements."""
    whole = torch.as_tensor(part, device=value.device)
    elements = value.dim() - max(len(site["fn"].batch_shape), whole.dim())
    return whole.reshape(whole.shape + (1,) * elements)


@dataclass(frozen=True)
class LogDensities:
    """log p at draws, float64, in nats. Shape of each: (draws,).

    Attributes:
        log_prior: of all latents.
        log_likelihood: of all data that were given.
    """

    log_prior: Tensor
    log_likelihood: Tensor


# Of a draw's number, where its batch starts in the data, the batch's arguments, the model's trace, and the log
# density of each element of each site, float64.
Visitor = Callable[[int, int, tuple[Any, ...], Trace, Mapping[str, Tensor]], None]


def log_densities(
    data: DataOfModel,
    values: Sequence[Values],
    visit: Visitor = lambda draw, start, arguments, trace, terms: None,
    advance: Callable[[int], None] = lambda count: None,
) -> LogDensities:
    """log p(θ) and log p(y | θ) at values of all latents; to be called within `untouched`.

    Args:
        values: of all latents, for each draw.
        visit: is shown the model's trace and its densities at each draw, for each batch.
        advance: is told of each batch and draw that is done.

    Raises:
        ValueError: where latents have no value, or belong to single examples of data that come in batches; for a
            loader that gives other examples than it says.
    """
    log_prior = torch.zeros(len(values), dtype=torch.float64)
    log_likelihood = torch.zeros_like(log_prior)
    start = 0
    for arguments in data:
        for draw, chosen in enumerate(values):
            try:
                trace = model_at(data.model, chosen, *arguments)
            except RuntimeError:  # of values for all examples, as a batch can't take them
                free = read_sites(_trace_of_prior(data.model, arguments))
                _check_local(data, free, data.examples_in(arguments))
                raise
            read = read_sites(trace)
            if draw == 0:
                size = data.examples_in(arguments, trace)
                if start + size > data.size:
                    raise _other_size(data, start + size)
                check_scales("model", read)
                check_observed(read)
                check_same_latents(read, chosen)
                _check_local(data, read, size)
            terms = {
                name: element_log_prob(site).double() for name, site in (read.latent | read.data).items()
            }
            for name, own in terms.items():
                # batches stand for themselves; a model that is called once says what it stands for
                total = _total(own, trace.nodes[name], scaled=not data.batched)
                if name in read.data:
                    log_likelihood[draw] += total
                elif start == 0:
                    log_prior[draw] += total
            visit(draw, start, arguments, trace, terms)
            advance(1)
        start += size
    if start != data.size:
        raise _other_size(data, start)
    return LogDensities(log_prior, log_likelihood)


def _other_size(data: DataOfModel, found: int) -> ValueError:
    more = " or more" if found > data.size else ""
    return ValueError(
        f"data must give as many examples as its sampler says, {data.size}: it gives {found}{more}"
    )


def _trace_of_prior(model: Callable[..., Any], arguments: tuple[Any, ...]) -> Trace:
    """A trace of the model at latents of its prior, without any where that can't be drawn."""
    with suppress(RuntimeError, NotImplementedError):
        return poutine.trace(model).get_trace(*arguments)
    return Trace()


def _check_local(data: DataOfModel, sites: Sites, batch: int) -> None:
    if not data.batched or len(data) == 1:
        return
    local = sorted(sites.local(batch))
    if local:
        raise ValueError(
            f"data must be a tuple of whole arguments where latents belong to single examples: {local} do, and the "
            "data come in batches"
        )
    whole = sorted(sites.whole(batch))
    if whole:
        raise ValueError(
            "data must be a tuple of whole arguments where observations or factors belong to no single example: "
            f"{whole} would count in each batch"
        )
