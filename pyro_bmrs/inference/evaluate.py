"""How well a model predicts with every structure at its posterior mean."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmrs.inference.batches import AT_ONCE, Batches, Data
from pyro_bmrs.inference.calls import home_of
from pyro_bmrs.inference.elbo import observed_log_prob
from pyro_bmrs.inference.likelihoods import Regressor, own_weights, parts_of
from pyro_bmrs.inference.sites import Sites, plate_scale, read_sites, weights_of
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.noise import FROM_PRIOR, FixedScales, noise_layers


class Evaluation(NamedTuple):
    """Means over the examples.

    Attributes:
        loss: -log p(y | x, θ) in nats.
        accuracy: 0 to 1; NaN where there are no classes.
        standard_error: of the loss; NaN where the likelihood does not tell examples apart, or there is one.
        rmse: root mean square error of a `Regressor`, in its `unit`; else NaN.
    """

    loss: float
    accuracy: float
    standard_error: float
    rmse: float = float("nan")


def evaluate(
    model: nn.Module,
    data: Data | Batches,
    theta: Mapping[str, Tensor] | None = None,
    batch_size: int = AT_ONCE,
) -> Evaluation:
    """Loss and accuracy of a Pyro model of (x, y), with its noise sites at the given values.

    Args:
        model: any Pyro model that observes y; accuracy is given where it returns logits and y is integer.
        data: (x, y) tensors, a data set or a loader.
        theta: θ by site, such as `guide.mean()`. Other sites are drawn from their prior, with a warning.
    """
    theta = {**own_weights(model), **(theta or {})}
    batches = data if isinstance(data, Batches) else Batches(data, batch_size, home_of(model), "data")
    likelihood, correct, counted, examples = 0.0, 0.0, 0.0, 0
    each: list[Tensor | None] = []
    squares: list[Tensor] = []
    if set(noise_layers(model)) - set(theta):
        warnings.warn(FROM_PRIOR, stacklevel=2)
    with untouched(model):
        for x, y in batches:
            with FixedScales(theta):
                trace = poutine.trace(model).get_trace(x, y)
            if not examples:
                batches.count.settle(x, y, trace)
            count = batches.count(x, y)
            sites = read_sites(trace)
            # what belongs to no example is no part of the data
            without = sites.whole(count)
            total, scale = observed_log_prob(trace, without=without), likelihood_scale(sites, count)
            likelihood += float(total) / scale
            of_each = by_example([node for name, node in sites.data.items() if name not in without], count)
            each.append(None if of_each is None else of_each / scale)
            examples += count
            output = trace.nodes["_RETURN"]["value"]
            if isinstance(model, Regressor):
                squares.append(model.errors(output, y).square().flatten())
            right, valid = _count_correct(model, output, y)
            correct, counted = correct + right, counted + valid
    return Evaluation(
        -likelihood / examples,
        correct / counted if counted else math.nan,
        _standard_error(each),
        float(torch.cat(squares).mean().sqrt()) if squares else math.nan,
    )


def by_example(nodes: Iterable[Mapping[str, Any]], count: int) -> Tensor | None:
    """The log-likelihood of each example of a batch, of sites whose log p is computed; None: they don't tell.

    Shape: (count,), float64.
    """
    total: Tensor | None = None
    for node in nodes:
        terms = node["log_prob"].detach()
        places = [dim for dim, size in enumerate(terms.shape) if size == count]
        if not places:
            return None
        own = terms.double().movedim(places[0], 0).reshape(count, -1).sum(1)
        total = own if total is None else total + own
    return total


def _standard_error(each: list[Tensor | None]) -> float:
    """Of the mean over all examples."""
    known = [part for part in each if part is not None]
    return math.nan if len(known) < len(each) else standard_error(torch.cat(known))


def standard_error(values: Tensor) -> float:
    """Of the mean of some values; NaN of a single one. Shape: (values,)."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _count_correct(model: nn.Module, output: object, y: object) -> tuple[float, float]:
    """Right and counted predictions, where the model returns logits for integer labels; else none of either."""
    y, _ = parts_of(model, y)
    if not isinstance(output, Tensor) or not isinstance(y, Tensor):
        return 0.0, 0.0
    if y.is_floating_point() or output.dim() != y.dim() + 1:
        return 0.0, 0.0
    predicted = output.argmax(dim=getattr(model, "class_dim", 1))
    y = y.long()  # a byte would never be a negative ignore_index
    valid = y != getattr(model, "ignore_index", -100)
    return float(((predicted == y) & valid).sum()), float(valid.sum())


def likelihood_scale(sites: Sites, examples: int) -> float:
    """How often the data of a batch are counted: the one scale of a model's observations and factors.

    Weights of single examples are no part of it. Neither is what stands outside of the plate of the examples, if others
    are in it.

    Args:
        sites: of the model on the batch.
        examples: of the batch.

    Raises:
        ValueError: if the model observes nothing, or its sites are scaled differently.
    """
    whole = sites.whole(examples)
    data = {name: node for name, node in sites.data.items() if name not in whole}
    if not data:
        raise ValueError("model must observe y when called as model(x, y): it has no observed site")
    scales = {
        name: round(float(node["scale"] if weights_of(node) is None else plate_scale(node)), 6)
        for name, node in data.items()
    }
    if len(set(scales.values())) > 1:
        raise ValueError(f"model must scale all its observed sites alike: got {scales}")
    return next(iter(scales.values()))
