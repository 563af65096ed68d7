"""Everything that model and guide say of joint draws of the posterior, as arrays.

Nothing here is larger than the result: the data pass by in batches, and of each batch and draw only its entries stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bmrs.checks.data import DataOfModel
from pyro_bmrs.checks.densities import log_densities
from pyro_bmrs.checks.draws import PosteriorDraws, draw_posterior, parts_of
from pyro_bmrs.inference.sites import read_sites
from pyro_bmrs.inference.traces import model_at
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.progress import bar

Array = NDArray[Any]


@dataclass
class JointDraws:
    """What model and guide say of joint draws of the posterior, on the host.

    Attributes:
        values: of the latents and of deterministic sites, from the posterior. Shape of each: (draws, *site).
        prior: of the latents; empty where the prior can't be drawn. Shape of each: (draws, *site).
        log_prior: log density of each element. Shape of each: (draws, *elements).
        log_likelihood: in nats, without the scale of plates. Shape of each: (draws, *observations).
        predicted: draws of the posterior predictive. Shape of each: (draws, *observed site).
        observed: what was observed. Shape of each: (*observed site).
        inputs: the other arguments of the model that are tensors, by name.
        log_p, log_q: of all latents and data together, float64, in nats; log_q as in `PosteriorDraws`. Shape:
            (draws,).
        dims: names of the dimensions of each site, None for those without a plate.
        units: numbers of a noise layer's structures in the original network.
    """

    values: dict[str, Array] = field(default_factory=dict)
    prior: dict[str, Array] = field(default_factory=dict)
    log_prior: dict[str, Array] = field(default_factory=dict)
    log_likelihood: dict[str, Array] = field(default_factory=dict)
    predicted: dict[str, Array] = field(default_factory=dict)
    observed: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    log_p: Array = field(default_factory=lambda: np.empty(0))
    log_q: Array | None = None
    dims: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    units: dict[str, Array] = field(default_factory=dict)


def joint_draws(guide: Callable[..., Any], data: DataOfModel, draws: int) -> JointDraws:
    """Everything at joint draws of a guide; to be called within `untouched`.

    Memory: 8 bytes for the log-likelihood and those of a prediction, per draw and observation; 24 at most per
    draw and latent element; the data themselves; and one batch.
    """
    first = data.first()
    posterior, _ = parts_of(data.model, guide, data, first, draw_posterior(guide, first, draws))
    collected = _Collector(data, posterior)
    with bar("joint draws", len(data) * draws) as advance:
        densities = log_densities(data, posterior.values, collected.visit, advance)
    found = collected.result
    layers = noise_layers(data.model) if isinstance(data.model, nn.Module) else {}
    latents: dict[str, Array] = {}
    for name in posterior.values[0]:
        stacked = torch.stack([values[name] for values in posterior.values])
        if name in layers:  # θ of a structure that a fit removed is 0, whatever the guide draws for it
            stacked = stacked * layers[name].kept
            found.units[name] = _host(layers[name].units)
        latents[name] = _host(stacked)
    found.values = {**latents, **found.values}
    found.prior = draw_prior(data.model, first, list(posterior.values[0]), draws)
    found.log_p = (densities.log_prior + densities.log_likelihood).numpy()
    found.log_q = None if posterior.log_q is None else _host(posterior.log_q)
    return found


def _host(value: Tensor) -> Array:
    """A tensor as an array; NumPy knows no bfloat16."""
    value = value.detach().cpu()
    array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


class _Collector:
    """Stores what a model says of each batch and draw in its place among the results."""

    def __init__(self, data: DataOfModel, posterior: PosteriorDraws) -> None:
        self.data, self.posterior, self.result = data, posterior, JointDraws()
        self.draws = len(posterior.values)

    def visit(
        self, draw: int, start: int, arguments: tuple[Any, ...], trace: Trace, terms: Mapping[str, Tensor]
    ) -> None:
        sites, result = trace.nodes, self.result
        read, examples = read_sites(trace), self.data.examples_in(arguments)
        observed = list(read.observed)  # a factor has a density and no value
        if start == 0 and draw == 0:
            named = (*self.posterior.values[0], *read.deterministic, *observed)
            result.dims = {name: dims_of(sites[name]) for name in named}
        if start == 0:
            for name in self.posterior.values[0]:
                self._store(result.log_prior, name, draw, terms[name])
        for name, node in read.deterministic.items():
            of_examples = self.data.batched and node["value"].shape[:1] == (examples,)
            if start == 0 or of_examples:
                self._store(result.values, name, draw, node["value"], start if of_examples else None)
        if draw == 0:
            if self.data.batched:
                _check_examples({name: (sites[name], terms[name]) for name in observed}, examples)
            for name in observed:
                whole = sites[name]["value"].expand(shape_of(sites[name]))
                self._store(result.observed, name, None, whole, start)
            for name, value in _named(self.data.model, arguments).items():
                # what is observed may have been made of the argument of its name, as labels that don't count are
                same = name in observed or any(value is sites[site]["value"] for site in observed)
                per_example = not self.data.batched or value.shape[:1] == (examples,)
                if not same and per_example:
                    self._store(result.inputs, name, None, value, start)
        if len(observed) > 1:  # one may depend on another, so that they have to be drawn in turn
            unconditioned = poutine.uncondition(self.data.model)
            sites_anew = model_at(unconditioned, self.posterior.values[draw], *arguments).nodes
        for name in observed:
            anew = sites_anew[name]["value"] if len(observed) > 1 else sites[name]["fn"].sample()
            self._store(result.log_likelihood, name, draw, terms[name], start)
            self._store(result.predicted, name, draw, anew, start)

    def _store(
        self, into: dict[str, Array], name: str, draw: int | None, value: Tensor, start: int | None = None
    ) -> None:
        """Store a value of a draw (None: of what all draws share), of a part of the data from `start` on."""
        array = _host(value)
        in_batches = self.data.batched and start is not None
        if name not in into:
            rows = (self.data.size, *array.shape[1:]) if in_batches else array.shape
            into[name] = np.empty(rows if draw is None else (self.draws, *rows), dtype=array.dtype)
        place = into[name] if draw is None else into[name][draw, ...]
        if in_batches:
            assert start is not None
            if array.shape[1:] != place.shape[1:]:
                raise ValueError(
                    f"data must have examples of one shape: those of {name!r} have {place.shape[1:]} in one batch and "
                    f"{array.shape[1:]} in another"
                )
            place[start : start + len(array)] = array
        else:
            place[...] = array


def _named(model: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """The arguments that are tensors, by the names that the model gives them."""
    try:
        called = model.forward if isinstance(model, nn.Module) else model
        names = list(inspect.signature(called).parameters)
    except ValueError:  # a callable without a signature
        names = []
    names += [f"argument_{index}" for index in range(len(names), len(arguments))]
    return {name: value for name, value in zip(names, arguments, strict=False) if isinstance(value, Tensor)}


def _check_examples(observed: Mapping[str, tuple[Mapping[str, Any], Tensor]], examples: int) -> None:
    for name, (site, terms) in observed.items():
        for what, shape in (("values", shape_of(site)), ("densities", terms.shape)):
            if shape[:1] != (examples,):
                raise ValueError(
                    "data must be a tuple of whole arguments where what is observed does not count examples in its "
                    f"first dimension: {name!r} has {what} of shape {tuple(shape)} for {examples} examples"
                )


def shape_of(site: Mapping[str, Any]) -> torch.Size:
    """Of a site's value, which may be one for a whole plate where it is observed."""
    law: Distribution = site["fn"]
    shape: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        law.batch_shape + law.event_shape, site["value"].shape
    )
    return shape


def dims_of(site: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The plate of each dimension of a site's value, None where there is none."""
    shape = shape_of(site)
    batch = len(shape) - len(site["fn"].event_shape)
    names: list[str | None] = [None] * len(shape)
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= batch:
            names[batch + frame.dim] = frame.name
    return tuple(names)


def draw_prior(
    model: Callable[..., Any], arguments: tuple[Any, ...], names: Collection[str], draws: int
) -> dict[str, Array]:
    """Draws of latents from the prior; none where they can't be drawn. To be called within `untouched`."""
    layers = noise_layers(model) if isinstance(model, nn.Module) else {}
    if set(names) <= set(layers):  # known without running the network
        return {name: _host(layers[name].prior().sample((draws,)) * layers[name].kept) for name in names}
    unconditioned = poutine.uncondition(model)
    try:
        traces = (poutine.trace(unconditioned).get_trace(*arguments) for _ in range(draws))
        drawn = [[trace.nodes[name]["value"] for name in names] for trace in traces]
    except (RuntimeError, ValueError):  # NotImplementedError too; or the likelihood takes no such draws
        return {}
    stacked = {
        name: torch.stack(list(column)) for name, column in zip(names, zip(*drawn, strict=True), strict=True)
    }
    return {
        name: _host(value * layers[name].kept if name in layers else value) for name, value in stacked.items()
    }
