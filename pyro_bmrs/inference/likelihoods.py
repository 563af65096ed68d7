"""Pyro models of (x, y) around a network: how the data are distributed given its output."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from numbers import Real
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import Categorical, Independent, Normal
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyro_bmrs.arguments import check, is_whole, plain
from pyro_bmrs.inference.calls import unique_name
from pyro_bmrs.networks import name_sites
from pyro_bmrs.networks.copies import uncompiled
from pyro_bmrs.networks.inputs import call, check_module, described


class Likelihood(nn.Module):
    """What all likelihoods share: the network, the plates and the scaling to the data set.

    A new one defines `forward`, `log_likelihood` and, where the network's output is no prediction, `prediction`. It
    then has the fast implementation of the ELBO, and `predict`, checks and reports know it.
    """

    finder: ClassVar[str]  # the argument that finds the tensor in the network's output

    def __init__(
        self, net: nn.Module, output: Callable[[Any], Tensor] | None, dataset_size: int | None
    ) -> None:
        super().__init__()
        check_module("net", net)
        good = output is None or callable(output)
        check(good, self.finder, "a function of the network's output, or None", output, TypeError)
        good = dataset_size is None or is_whole(dataset_size, 1)
        check(good, "dataset_size", "a positive integer or None", dataset_size)
        net = uncompiled(net)
        name_sites(net)
        self.net, self.output, self.dataset_size = net, output, plain(dataset_size)
        self.store_name = unique_name(self)
        # by name of a weight that is a latent of the model: the precision of its prior
        self.weight_priors: dict[str, float] = {}

    def predict(self, x: Any) -> Tensor:
        """The network's output tensor for a batch, such as logits.

        Noise layers in the network draw θ from its prior where no guide gives it, with a warning. To predict, call
        `pyro_bmrs.predict(model, guide, x)`.

        Raises:
            ValueError: if the network fails for x, with the types and shapes of what x holds.
        """
        # outside of Pyro the weights are those of the network
        weights = {
            name: pyro.sample(name, _weight_prior(self.net.get_parameter(name), delta))
            for name, delta in (self.weight_priors.items() if am_i_wrapped() else ())
        }
        try:
            value = call(self.net, x, weights)
        except (RuntimeError, TypeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"x must be what the network can be called with: {type(self.net).__name__} fails for {described(x)} "
                f"with {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        if self.output is not None:
            value = self.output(value)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{type(self).__name__} needs a tensor from the network: got {type(value).__name__}; "
                "pass a callable that finds it in the output"
            )
        return value

    def observed(self, y: Any) -> tuple[Tensor, Tensor | None]:
        """What was observed, and the weight of each example: y is a tensor, or a pair of both.

        Raises:
            TypeError, ValueError: naming what is wrong.
        """
        y, weights = y if isinstance(y, list | tuple) and len(y) == 2 else (y, None)
        for name, part in (("y", y), ("weights", weights)):
            good = isinstance(part, Tensor) or (name == "weights" and part is None)
            check(good, name, "a tensor; y may be a pair (y, weights)", type(part), TypeError)
        if weights is not None:
            good = weights.shape == y.shape[: weights.dim()] and weights.dim() > 0
            check(
                good, "weights", f"of shape {tuple(y.shape[:1])}, one for each example", tuple(weights.shape)
            )
            check(bool((weights >= 0).all()), "weights", "not negative", float(weights.min()))
            weights = weights.reshape(weights.shape + (1,) * (y.dim() - weights.dim())).expand(y.shape)
        return y, weights

    def prediction(self, output: Tensor) -> Tensor:
        """What `pyro_bmrs.predict` gives for the network's output, and averages over draws: here the output itself."""
        return output

    def log_likelihood(self, x: Any, y: Any) -> Tensor:
        """Σ w log p(y | x, θ) over the batch in nats, as in `forward` but without Pyro and unscaled."""
        raise NotImplementedError

    def _plates(self, stack: ExitStack, batch: int, positions: torch.Size, device: torch.device) -> None:
        # every example stands for dataset_size / batch examples
        size = self.dataset_size or batch
        indices = torch.arange(batch, device=device) if size != batch else None
        where, dim = str(device), -1 - len(positions)
        stack.enter_context(pyro.plate("data", size, subsample=indices, dim=dim, device=where))
        for index, length in enumerate(positions):
            dim = index - len(positions)
            stack.enter_context(pyro.plate(f"position_{index}", length, dim=dim, device=where))


def _weight_prior(weight: Tensor, delta: float) -> Independent:
    """N(0, 1/δ) for each weight."""
    scale = torch.full((), delta**-0.5, dtype=weight.dtype, device=weight.device)
    law: Independent = Normal(torch.zeros_like(weight), scale).to_event(weight.dim())
    return law


def _weigh(stack: ExitStack, weights: Tensor | None) -> None:
    """Give the observations in a context their weights; what has none does not count."""
    if weights is None:
        return
    counted = weights > 0
    stack.enter_context(pyro.poutine.mask(mask=counted))
    stack.enter_context(pyro.poutine.scale(scale=torch.where(counted, weights, 1.0)))


def own_weights(model: object) -> dict[str, Tensor]:
    """The values in the network of weights that are latents of a model: their means."""
    if not isinstance(model, Likelihood):
        return {}
    return {name: model.net.get_parameter(name).detach() for name in model.weight_priors}


def parts_of(model: object, y: Any) -> tuple[Any, Any]:
    """The observations in y, and the weights of examples where a likelihood is given them; else y and None."""
    return model.observed(y) if isinstance(model, Likelihood) else (y, None)


class Classifier(Likelihood):
    """p(y | x, θ) = Categorical(softmax(net(x))), a Pyro model: `model(x, y=None)`, returning the logits.

    >>> import torch, pyro
    >>> from torch import nn
    >>> from pyro_bmrs import MultiplicativeNoise
    >>> model = Classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), MultiplicativeNoise(8), nn.Linear(8, 3)))
    >>> trace = pyro.poutine.trace(model).get_trace(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long))
    >>> trace.stochastic_nodes, trace.observation_nodes
    (['2', 'data'], ['y'])

    Labels of any integer type count classes from 0; False and True are 0 and 1. With y = (labels, weights) each example
    has a weight: the likelihood is ∏ p(y | x, θ)^w over the examples. N still counts examples. Weights with a mean of 1
    keep the balance between likelihood and KL.

    Args:
        net: the network; its noise layers' sites are named after their modules in it.
        logits: finds the logits in the network's output where that is a dict or a tuple, e.g.
            `lambda out: out["logits"]`.
        class_dim: dimension of the logits that counts classes: 1 for (batch, classes) and per-pixel
            (batch, classes, height, width), -1 for per-token (batch, tokens, classes).
        dataset_size: N. The likelihood of a batch is then scaled by N/batch, as `pyro.plate` does, to stand for the
            whole data set. `fit` needs no N: it scales the KL instead.
        ignore_index: label of positions that do not count, -100 as in torch.
        weights: of each class, (classes,): the weight of an example by its label, for classes of unequal size.
    """

    class_weights: Tensor | None

    finder = "logits"

    def __init__(
        self,
        net: nn.Module,
        logits: Callable[[Any], Tensor] | None = None,
        *,
        class_dim: int = 1,
        dataset_size: int | None = None,
        ignore_index: int = -100,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(net, logits, dataset_size)
        good = weights is None or (isinstance(weights, Tensor) and weights.dim() == 1)
        check(good, "weights", "a tensor of shape (classes,) or None", type(weights), TypeError)
        good = weights is None or bool((torch.isfinite(weights) & (weights >= 0)).all())
        check(good, "weights", "finite and not negative", weights)
        self.register_buffer("class_weights", weights, persistent=False)
        for name, value in (("class_dim", class_dim), ("ignore_index", ignore_index)):
            check(isinstance(value, int), name, "an integer", value)
        self.class_dim, self.ignore_index = class_dim, ignore_index

    def forward(self, x: Any, y: Any = None) -> Tensor:
        pyro.module(self.store_name, self)
        output = self.predict(x)
        labels, weights = (None, None) if y is None else self.observed(y)
        logits = self._class_last(output, labels)
        batch, positions = logits.shape[0], logits.shape[1:-1]
        with ExitStack() as stack:
            self._plates(stack, batch, positions, logits.device)
            if labels is not None:
                counted = labels != self.ignore_index
                self._check_inside(labels, counted, logits.shape[-1])
                stack.enter_context(pyro.poutine.mask(mask=counted))
                labels = torch.where(counted, labels, 0)
                _weigh(stack, weights)
            pyro.sample("y", Categorical(logits=logits), obs=labels)
        return output

    def observed(self, y: Any) -> tuple[Tensor, Tensor | None]:
        """Labels as int64, and the weight of each: of its example times of its class; None where all are 1."""
        labels, weights = super().observed(y)
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"y must hold numbers of classes, integers: got {labels.dtype}")
        labels = labels.long()  # a byte would wrap around where it is compared with ignore_index
        if self.class_weights is None:
            return labels, weights
        inside = (labels >= 0) & (labels < len(self.class_weights))
        of_class = torch.where(inside, self.class_weights[torch.where(inside, labels, 0)], 0.0)
        return labels, of_class if weights is None else of_class * weights

    def _check_class_dim(self, output: Tensor) -> None:
        good = -output.dim() <= self.class_dim < output.dim()
        check(good, "class_dim", f"a dimension of the logits, of shape {tuple(output.shape)}", self.class_dim)

    def _class_last(self, output: Tensor, y: Tensor | None) -> Tensor:
        """The logits as (batch, *positions, classes), checked against the labels."""
        self._check_class_dim(output)
        shape = tuple(output.shape)
        logits = _single(output).movedim(self.class_dim, -1)
        weights = self.class_weights
        good = weights is None or len(weights) == logits.shape[-1]
        check(
            good,
            "weights",
            f"of shape ({logits.shape[-1]},), one for each class",
            () if weights is None else tuple(weights.shape),
        )
        if y is not None and y.shape != logits.shape[:-1]:
            raise ValueError(
                f"y must have shape {tuple(logits.shape[:-1])} for logits of shape {shape} "
                f"with class_dim={self.class_dim}: got {tuple(y.shape)}"
            )
        return logits

    def prediction(self, output: Tensor) -> Tensor:
        """Probabilities of the classes, in single precision at least. Shape: that of the logits."""
        self._check_class_dim(output)
        return output.softmax(self.class_dim, dtype=torch.promote_types(output.dtype, torch.float32))

    def log_likelihood(self, x: Any, y: Any) -> Tensor:
        labels, weights = self.observed(y)
        logits = self._class_last(self.predict(x), labels).flatten(0, -2)
        try:
            if weights is None:
                return -cross_entropy(
                    logits, labels.flatten(), ignore_index=self.ignore_index, reduction="sum"
                )
            each = cross_entropy(logits, labels.flatten(), ignore_index=self.ignore_index, reduction="none")
            return -(each * weights.flatten()).sum()
        except IndexError:  # looked at only then: on an accelerator every look waits for it
            self._check_inside(labels, labels != self.ignore_index, logits.shape[-1])
            raise

    @staticmethod
    def _check_inside(labels: Tensor, counted: Tensor, classes: int) -> None:
        """Raise ValueError for labels that count and are none of the classes."""
        if labels.is_meta or not counted.any():
            return
        least, most = (int(bound) for bound in labels[counted].aminmax())
        if least < 0 or most >= classes:
            raise ValueError(
                f"y must hold labels of the {classes} classes, 0 to {classes - 1}: got {least} to {most}"
            ) from None


class Regressor(Likelihood):
    """p(y | x, θ) = Normal(net(x), scale²) elementwise, a Pyro model: `model(x, y=None)`, returning the mean.

    With y = (y, weights) each example has a weight, as in `Classifier`.

    Args:
        net: the network, with output (batch,) or (batch, *dimensions); y has its shape.
        mean: finds the mean in the network's output where that is a dict or a tuple.
        scale: standard deviation of the observations in the units of y; None learns one, from 1. The curvature of a
            trained network takes the root mean square error on the validation data then, or else on its own.
        dataset_size: as in `Classifier`.
        unit: what 1 in y is worth in reported errors, a number or a tensor that broadcasts with y: the standard
            deviation of the targets, where y is in units of that.
    """

    unit: Tensor

    finder = "mean"

    def __init__(
        self,
        net: nn.Module,
        mean: Callable[[Any], Tensor] | None = None,
        *,
        scale: float | None = None,
        dataset_size: int | None = None,
        unit: float | Tensor = 1.0,
    ) -> None:
        super().__init__(net, mean, dataset_size)
        unit = torch.as_tensor(unit, dtype=torch.float64)
        good = bool((unit.isfinite() & (unit > 0)).all())
        check(good, "unit", "positive and finite", unit)
        self.register_buffer("unit", unit, persistent=False)
        good = scale is None or (isinstance(scale, Real) and 0 < scale < math.inf)
        check(good, "scale", "positive or None, and finite", scale)
        log_scale = torch.tensor(float(scale or 1.0)).log()
        if scale is None:
            self.log_scale: Tensor = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, x: Any, y: Any = None) -> Tensor:
        pyro.module(self.store_name, self)
        given, weights = (None, None) if y is None else self.observed(y)
        mean = self._mean(x, given)
        with ExitStack() as stack:
            self._plates(stack, mean.shape[0], mean.shape[1:], mean.device)
            _weigh(stack, weights)
            pyro.sample("y", self._law(mean), obs=given)
        return mean

    def errors(self, mean: Tensor, y: Any) -> Tensor:
        """y − mean in the units of `unit`, float64, on the CPU. Shape: that of the mean."""
        return (self.observed(y)[0] - mean).cpu().double() * self.unit.cpu()

    def observed(self, y: Any) -> tuple[Tensor, Tensor | None]:
        given, weights = super().observed(y)
        good = given.dtype != torch.bool and not given.is_complex()
        check(good, "y", "real numbers, such as y.float() of True and False", given.dtype)
        return given, weights

    def _mean(self, x: Any, y: Tensor | None) -> Tensor:
        mean = self.predict(x)
        if y is not None and y.shape != mean.shape:
            raise ValueError(f"y must have the output's shape {tuple(mean.shape)}: got {tuple(y.shape)}")
        return mean

    def _law(self, mean: Tensor) -> Normal:
        return Normal(_single(mean), self.log_scale.exp())

    def log_likelihood(self, x: Any, y: Any) -> Tensor:
        given, weights = self.observed(y)
        each: Tensor = self._law(self._mean(x, given)).log_prob(given)
        return each.sum() if weights is None else (each * weights).sum()


def _single(output: Tensor) -> Tensor:
    """In single precision at least: a sum over a batch in bfloat16 has two correct digits."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def has_own_likelihood(model: nn.Module) -> bool:
    """Whether `log_likelihood` is all that the model does: no hook or override changes what `forward` observes."""
    if not isinstance(model, Likelihood):
        return False
    hooks = (model._forward_hooks, model._forward_pre_hooks, model._backward_hooks, model._backward_pre_hooks)
    if any(hooks) or "forward" in vars(model):
        return False
    # one class wrote both: a subclass that redefines one of them may observe something else
    homes = [
        next(kind for kind in type(model).__mro__ if name in vars(kind))
        for name in ("forward", "log_likelihood")
    ]
    return homes[0] is homes[1]
