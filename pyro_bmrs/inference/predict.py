"""Predictions: at the posterior mean, or averaged over draws of the posterior."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_bmrs.arguments import check, whole_number
from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.inference.batches import AT_ONCE, are_examples, to_device
from pyro_bmrs.inference.calls import check_ready, without_observations
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.likelihoods import Likelihood, own_weights
from pyro_bmrs.inference.sites import elementary
from pyro_bmrs.inference.traces import guide_values, latents
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import Inputs, call, taken, tensors_of
from pyro_bmrs.networks.inputs import batch_size as examples_in
from pyro_bmrs.networks.noise import FixedScales, noise_layers

Values = dict[str, Tensor]


def predict(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    x: Inputs | Dataset[Any] | DataLoader[Any],
    *,
    draws: int | None = None,
    batch_size: int = AT_ONCE,
    seed: int = 0,
) -> Tensor:
    """Predict, with every structure at its posterior mean or averaged over draws of the posterior.

    At the mean this is p(y | x, θ = E[θ]); with draws it is (1/S) Σ_s p(y | x, θ_s), with θ_s ~ q(θ).

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model)
    >>> x = torch.randn(20, 4)
    >>> _ = guide(x, torch.zeros(20, dtype=torch.long))
    >>> bmrs.predict(model, guide, x).sum(1).allclose(torch.ones(20))
    True
    >>> bmrs.predict(model, guide, x, draws=100).shape
    torch.Size([20, 3])

    Without a guide, as in `model.predict(x)`, the network draws θ from its prior.

    Args:
        model: a `Classifier`, a `Regressor`, any other Pyro model of (x, y) that returns a tensor, or a network.
        guide: its guide; also the reduced posterior of a plan. None for a model without latents, such as a
            `Classifier` of the smaller network.
        x: what the network is called with: a tensor, a tuple of arguments or a mapping of keywords. Or a data set
            (also a list of pairs) or loader, of inputs or of pairs (x, y); y is not looked at.
        draws: S. None: a single prediction at E[θ]; latents without a known mean take one draw.
        batch_size: examples per pass through the network; a loader keeps its own.
        seed: of the draws.

    Returns:
        Probabilities of a `Classifier`, of the shape of its logits: (examples, classes). The mean of a `Regressor`, of
        the shape of its output. What any other model returns, averaged over the draws. On the device of `x`.
        No trace is left: training mode, random generators and Pyro's parameters are as before.

    Raises:
        TypeError: if an argument has another type, or the model returns no tensor.
        ValueError: for a bad number; if the guide is missing, is of another model, or has no posterior of a noise
            layer; if it has latents of single examples and `x` is more than one batch.
        RuntimeError: if the guide has no parameters yet.
    """
    check(callable(model), "model", "a Pyro model or a network", type(model), TypeError)
    check(guide is None or callable(guide), "guide", "a Pyro guide or None", type(guide), TypeError)
    draws = None if draws is None else whole_number("draws", draws, 1)
    batch_size, seed = whole_number("batch_size", batch_size, 1), whole_number("seed", seed)
    parts: list[Tensor] = []
    values: list[Values] = []
    asked = _Asked()
    with untouched(model, *([] if guide is None else [guide]), seed=seed):
        for number, (batch, home) in enumerate(_batches(model, x, batch_size)):
            if number == 0:
                values = _values(model, guide, batch, draws, seed)
            elif number == 1:
                _check_global(guide, batch)
            with asked:
                total = sum(
                    (_prediction(model, output_at(model, chosen, batch)) for chosen in values),
                    start=torch.zeros(()),
                )
            if guide is not None and values[0] and not asked.names & values[0].keys():
                raise ValueError(
                    f"guide must be one of this model, or None: {type(model).__name__} has none of its latents "
                    f"{list(values[0])[:10]}"
                )
            parts.append((total / len(values)).to(home))
    if not parts:
        raise ValueError("x must not be empty")
    return torch.cat(parts)


class _Asked(Messenger):  # type: ignore[misc]
    """Effect handler that notes the sites of a model: a network asks for no values, and would ignore a guide."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.names.add(msg["name"])


def output_at(model: Callable[..., Any], values: Mapping[str, Tensor], x: Inputs, *observed: Tensor) -> Any:
    """The output of a model for a batch at given values of its latents.

    That of a likelihood such as `Classifier` is its network's; any other model's is what it returns.

    Args:
        observed: further arguments, for a model that is no such likelihood.
    """
    with FixedScales(values):
        if isinstance(model, Likelihood):
            return model.predict(x)
        if observed:
            return model(x, *observed)
        # a network takes several inputs as arguments, a model of (x, y) as one
        if (
            isinstance(model, nn.Module)
            and not isinstance(x, Tensor)
            and set(values) <= set(noise_layers(model))
        ):
            return call(model, x)
        with _without_y("model", model):
            return model(*without_observations(model, x))


@contextmanager
def _without_y(name: str, program: Callable[..., Any]) -> Iterator[None]:
    """Say of an error in a model or guide that it was called without observations."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if isinstance(program, nn.Module) and noise_layers(program):
            raise
        raise TypeError(
            f"{name} must be callable without observations to predict, as {name}(x, None). It says: {error}"
        ) from error


@torch.no_grad()
def posterior_point(guide: Callable[..., Any], *arguments: Any, without: Collection[str] = ()) -> Values:
    """The values to predict with: E[θ] where it is known; other latents take one draw from the guide.

    Args:
        arguments: what the guide is called with.
        without: latents to leave out, such as those of single examples.
    """
    if isinstance(guide, AutoTruncatedLogNormal | AutoKroneckerLaplace):
        return guide.mean()
    values = {}
    for name, node in latents(guide, *arguments).items():
        law, value = elementary(node["fn"]), node["value"]
        if name not in without:
            values[name] = law.mean.expand(value.shape) if isinstance(law, TruncatedLogNormal) else value
    return values


def _values(
    model: Callable[..., Any], guide: Callable[..., Any] | None, x: Inputs, draws: int | None, seed: int
) -> list[Values]:
    """The values of the latents for each prediction that is averaged."""
    layers = noise_layers(model) if isinstance(model, nn.Module) else {}
    if guide is None:
        if layers:
            raise ValueError(
                f"guide must be given for a model with noise layers {list(layers)}: without it, θ would be drawn from "
                "its prior"
            )
        return [own_weights(model)]
    check_ready(guide)
    remembered = guide.example_arguments if isinstance(guide, AutoTruncatedLogNormal) else ()
    arguments = remembered or without_observations(guide, x)
    with untouched(guide, seed=seed), _without_y("guide", guide):  # a loader may have drawn numbers before
        if draws is None:
            values = [posterior_point(guide, *arguments)]
        else:
            values = [guide_values(guide, *arguments) for _ in range(draws)]
    missing = [site for site in layers if site not in values[0]]
    if missing:
        raise ValueError(f"guide must have a posterior of every noise layer: it has none of {missing}")
    return values


def _check_global(guide: Callable[..., Any] | None, x: Inputs) -> None:
    """Refuse latents in a plate as long as the batch: the values of the first batch say nothing about others."""
    if guide is None or isinstance(guide, AutoTruncatedLogNormal):
        return
    local = [
        name
        for name, node in latents(guide, *without_observations(guide, x)).items()
        if any(frame.vectorized and frame.size == examples_in(x) for frame in node["cond_indep_stack"])
    ]
    if local:
        raise ValueError(
            f"x must be a single batch for a guide with latents of single examples, such as {local}: pass a larger "
            "batch_size"
        )


def _prediction(model: Callable[..., Any], output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor: got {type(output).__name__}")
    return model.prediction(output) if isinstance(model, Likelihood) else output


def _batches(
    model: Callable[..., Any], x: Inputs | Dataset[Any] | DataLoader[Any], size: int
) -> Iterator[tuple[Inputs, torch.device]]:
    """Batches of inputs on the model's device, and the device each came from."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if type(x) is TensorDataset:  # a subclass may do more than index
        x = x.tensors[0]
    if isinstance(x, Dataset) or (are_examples(x) and tensors_of(x[:1])):
        x = DataLoader(x, batch_size=size)  # type: ignore[arg-type]
    for batch in _loaded(x) if isinstance(x, DataLoader) else _sliced(x, size):
        tensors = tensors_of(batch)
        check(bool(tensors), "x", "a tensor, or hold one", type(batch), TypeError)
        yield batch if parameter is None else to_device(batch, parameter.device), tensors[0].device


def _loaded(loader: DataLoader[Any]) -> Iterator[Inputs]:
    for batch in loader:
        # a pair (x, y), or x alone
        yield batch[0] if isinstance(batch, list | tuple) else batch


def _sliced(x: Inputs, size: int) -> Iterator[Inputs]:
    check(bool(tensors_of(x)), "x", "a tensor, or hold one", type(x), TypeError)
    whole = examples_in(x)
    for start in range(0, whole, size):
        yield taken(x, slice(start, start + size), whole)
