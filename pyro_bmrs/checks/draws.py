"""Draws of all latents from a guide, and what model and guide say of each: log p and log q, piece by piece.

Nothing here is larger than what comes out: the data pass by in batches, and of each batch and draw only the
entries of the result stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.utils.data import DataLoader, Dataset

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.fitting.programs import local_sites_of
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.calls import check_arguments
from pyro_bmrs.inference.likelihoods import Classifier, Regressor
from pyro_bmrs.inference.traces import elementary, model_at
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.programs.reduced_posterior import ReducedPosterior
from pyro_bmrs.progress import bar

Array = NDArray[Any]
Values = Mapping[str, Tensor]


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError, naming the argument, unless it is an integer of at least `least`."""
    check(is_whole(value, least), name, f"an integer of at least {least}", value)


class DataOfModel:
    """A model's data as the arguments that it is called with, whole or in batches of examples.

    Args:
        model: any Pyro model.
        data: a tuple of the arguments that model and guide are called with. Or a data set or loader of pairs
            (x, y), for a model that can be called on any batch of them; so can a `Classifier` and a
            `Regressor`, and a tuple (x, y) is cut into batches for them.
        batch_size: examples per batch.

    Raises:
        TypeError, ValueError: for data of another kind, or arguments that the model does not take.
    """

    def __init__(self, model: Callable[..., Any], data: tuple[Any, ...] | Data, batch_size: int) -> None:
        if not callable(model):
            raise TypeError(f"model must be a Pyro model: got {type(model).__name__}")
        check(is_whole(batch_size, 1), "batch_size", "a positive integer", batch_size)
        if not isinstance(data, tuple | Dataset | DataLoader):
            raise TypeError(
                "data must be a tuple of the arguments of model and guide, such as (x, y), or a data set or loader of "
                f"pairs (x, y): got {type(data).__name__}"
            )
        self.model = model
        self.batched = isinstance(model, Classifier | Regressor) or not isinstance(data, tuple)
        if not self.batched:
            self._batches, self.arguments, self.size = None, tuple(data), 1  # type: ignore[arg-type]
            check_arguments(model, self.arguments, "data")
            return
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = torch.device("cpu") if parameter is None else parameter.device
        self._batches = Batches(data, batch_size, device, "data")
        self.size = self._batches.size
        if isinstance(data, DataLoader) and data.drop_last and data.batch_size is not None:
            self.size = len(data) * data.batch_size  # what it leaves out is not looked at

    def __len__(self) -> int:
        return 1 if self._batches is None else len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter([self.arguments] if self._batches is None else self._batches)

    def first(self) -> tuple[Any, ...]:
        """The first batch; what a loader draws for it is drawn again."""
        with untouched():
            return next(iter(self))


@dataclass(frozen=True)
class PosteriorDraws:
    """Joint draws of all latents of a guide.

    Attributes:
        values: of each draw, by site.
        log_q: log density of the guide there, in nats. None where it has none that is known: all latents are points,
            or it is the posterior of a reduced model. Shape: (draws,), float64.
    """

    values: list[dict[str, Tensor]]
    log_q: Tensor | None


def draw_posterior(guide: Callable[..., Any], arguments: tuple[Any, ...], draws: int) -> PosteriorDraws:
    """Draw all latents jointly; to be called within `untouched`."""
    values: list[dict[str, Tensor]] = []
    densities, points = [], True
    for _ in range(draws):
        trace = poutine.trace(guide).get_trace(*arguments)
        if not values:
            _check_scales("guide", trace)
        trace.compute_log_prob()
        densities.append(sum(site["log_prob_sum"].double() for site in _samples(trace)))
        laws = [site["fn"] for site in _samples(trace) if not site_is_subsample(site)]
        points = points and all(isinstance(elementary(law), dist.Delta) for law in laws)
        values.append(
            {
                name: site["value"].detach()
                for name, site in trace.iter_stochastic_nodes()
                if not site["infer"].get("is_auxiliary") and not site_is_subsample(site)
            }
        )
    if not values[0]:
        raise ValueError("guide must have latents: it samples none")
    for drawn in values:
        if drawn.keys() != values[0].keys():
            changing = sorted(drawn.keys() ^ values[0].keys())
            raise ValueError(f"guide must have the same latents in each call: it has {changing} in some only")
    # what a reduced posterior draws with is of other dimensions than the latents that it makes of it
    unknown = points or isinstance(guide, ReducedPosterior)
    return PosteriorDraws(
        values, None if unknown else torch.stack([torch.as_tensor(density) for density in densities])
    )


def _check_scales(name: str, trace: Trace) -> None:
    """Refuse what would make a weight of two densities that don't belong together."""
    for site, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        if site_is_subsample(node):
            if (node["fn"].subsample_size or node["fn"].size) < node["fn"].size:
                raise ValueError(
                    f"{name} must not choose other examples in each call: its plate {site!r} takes "
                    f"{node['fn'].subsample_size} of {node['fn'].size}. Give the plate all of them, or always the same"
                )
            continue
        whole = all(frame.full_size in (None, frame.size) for frame in node["cond_indep_stack"])
        scale = torch.as_tensor(node["scale"])
        if not node["is_observed"] and whole and bool(((scale - 1).abs() > 1e-6).any()):
            raise ValueError(
                f"{name} must have its latents' own densities: {site!r} is scaled by {float(scale.flatten()[0]):g}. "
                "Leave out poutine.scale; a KL weight is told by kl_weight"
            )


def _samples(trace: Trace) -> list[dict[str, Any]]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def element_log_prob(site: Mapping[str, Any]) -> Tensor:
    """log density of each element of a site, without the scale of its plates, 0 where it is masked."""
    law = site["fn"]
    while isinstance(law, Independent):
        law = law.base_dist
    value: Tensor = law.log_prob(site["value"])
    mask = site["mask"]
    if mask is None or mask is True:
        return value
    return torch.where(_over_elements(mask, site, value), value, 0.0)


def _scaled(terms: Tensor, site: Mapping[str, Any]) -> Tensor:
    """Densities of elements with the scale of their plates, a number or one for each of a batch."""
    scale = site["scale"]
    many = isinstance(scale, Tensor) and scale.dim() > 0
    return terms * (_over_elements(scale, site, terms) if many else scale)


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
        size = len(arguments[1]) if data.batched else 1
        if start + size > data.size:
            raise _other_size(data, start + size)
        for draw, chosen in enumerate(values):
            try:
                trace = model_at(data.model, chosen, *arguments)
            except RuntimeError:  # of values for all examples, as a batch can't take them
                _check_local(data, _trace_of_prior(data.model, arguments), size)
                raise
            if draw == 0:
                _check_latents(trace, chosen)
                _check_local(data, trace, size)
            terms = {
                name: element_log_prob(site).double()
                for name, site in trace.nodes.items()
                if site["type"] == "sample" and not site_is_subsample(site)
            }
            for name, own in terms.items():
                # batches stand for themselves; a model that is called once says what it stands for
                total = float((own if data.batched else _scaled(own, trace.nodes[name])).sum())
                if name in trace.observation_nodes:
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


def _check_latents(trace: Trace, values: Values) -> None:
    _check_scales("model", trace)
    latents = [name for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]
    unknown = [name for name in latents if name not in values]
    if unknown:
        raise ValueError(
            f"guide must have a posterior of every latent of the model: it has none of {unknown}. Sum them out in the "
            "model, or give the guide one"
        )
    foreign = [name for name in values if name not in latents]
    if foreign:
        raise ValueError(
            f"guide must have no latents but the model's: it has {foreign}. Mark what it only draws with as "
            'infer={"is_auxiliary": True}'
        )


def _trace_of_prior(model: Callable[..., Any], arguments: tuple[Any, ...]) -> Trace:
    """A trace of the model at latents of its prior, without any where that can't be drawn."""
    with suppress(RuntimeError, NotImplementedError):
        return poutine.trace(model).get_trace(*arguments)
    return Trace()


def _check_local(data: DataOfModel, trace: Trace, batch: int) -> None:
    if not data.batched or len(data) == 1:
        return
    # plates are sites too, and no latents
    local = sorted(name for name in local_sites_of(trace, batch) if not site_is_subsample(trace.nodes[name]))
    if local:
        raise ValueError(
            f"data must be a tuple of whole arguments where latents belong to single examples: {local} do, and the "
            "data come in batches"
        )


@dataclass
class JointDraws:
    """What model and guide say of joint draws of the posterior, on the host.

    Attributes:
        values, prior: of the latents, from posterior and prior (empty where the prior can't be drawn). Shape
            of each: (draws, *site).
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
    posterior = draw_posterior(guide, first, draws)
    collected = _Collector(data, posterior)
    with bar("joint draws", len(data) * draws) as advance:
        densities = log_densities(data, posterior.values, collected.visit, advance)
    found = collected.result
    layers = noise_layers(data.model) if isinstance(data.model, nn.Module) else {}
    for name in posterior.values[0]:
        stacked = torch.stack([values[name] for values in posterior.values])
        if name in layers:  # what a fit has removed is 0, whatever the guide still draws for it
            stacked = stacked * layers[name].kept
            found.units[name] = _host(layers[name].units)
        found.values[name] = _host(stacked)
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
    """Puts what is seen of each batch and draw in its place."""

    def __init__(self, data: DataOfModel, posterior: PosteriorDraws) -> None:
        self.data, self.posterior, self.result = data, posterior, JointDraws()
        self.draws = len(posterior.values)

    def visit(
        self, draw: int, start: int, arguments: tuple[Any, ...], trace: Trace, terms: Mapping[str, Tensor]
    ) -> None:
        sites, result = trace.nodes, self.result
        # a factor has a density and no value
        observed = [name for name in trace.observation_nodes if not isinstance(sites[name]["fn"], dist.Unit)]
        if start == 0 and draw == 0:
            result.dims = {name: dims_of(sites[name]) for name in (*self.posterior.values[0], *observed)}
        if start == 0:
            for name in self.posterior.values[0]:
                self._store(result.log_prior, name, draw, terms[name])
        if draw == 0:
            if self.data.batched:
                _check_examples({name: (sites[name], terms[name]) for name in observed}, len(arguments[1]))
            for name in observed:
                whole = sites[name]["value"].expand(shape_of(sites[name]))
                self._store(result.observed, name, None, whole, start)
            for name, value in _named(self.data.model, arguments).items():
                # what is observed may have been made of the argument of its name, as labels that don't count are
                same = name in observed or any(value is sites[site]["value"] for site in observed)
                per_example = not self.data.batched or value.shape[:1] == (len(arguments[1]),)
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
