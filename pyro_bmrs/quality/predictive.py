"""The posterior predictive of a classifier, from draws of θ or from one point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.inference.batches import AT_ONCE, Batches, Data
from pyro_bmrs.inference.likelihoods import Likelihood, own_weights
from pyro_bmrs.inference.predict import output_at
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import check_module
from pyro_bmrs.networks.noise import noise_layers

# By how much the rows of probabilities made in float32 may miss 1, and their entropies the bound of Jensen.
_TOLERANCE = 1e-5


class NoClassifierError(TypeError):
    """A model gives no logits, or data have no labels, that predictions of classes could be made of."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The posterior predictive of n examples and C classes, and how much of its entropy each draw has itself.

    The entropy of the predictive is the sum of two parts (Houlsby et al., 2011; Depeweg et al., 2018):
    H[E p(y | x, θ)] = E H[p(y | x, θ)] + I[y; θ], of the data (aleatoric) and of the posterior (epistemic).

    >>> import numpy as np
    >>> certain = np.array([[1.0, 0.0], [0.0, 1.0]])  # of two draws, about one example
    >>> both = Predictions(certain.mean(0, keepdims=True), np.zeros(1), np.array([0]), draws=2)
    >>> both.entropy.round(4), both.epistemic.round(4), both.predicted
    (array([0.6931]), array([0.6931]), array([0]))

    Attributes:
        probability: (1/S) Σ_s p(y | x, θ_s) over S draws. Float64, shape: (n, C).
        expected_entropy: (1/S) Σ_s H[p(y | x, θ_s)] in nats. Float64, shape: (n,).
        label: 0 to C - 1, or -1 everywhere for data without labels. Int64, shape: (n,).
        draws: S, the number of draws of θ; 1 for a point.

    Raises:
        TypeError: if an array has another type.
        ValueError: if an array has another shape, no example or values that are not allowed, naming it: rows
            of `probability` add up to 1, and no expected entropy is above the entropy of the predictive.
    """

    probability: NDArray[np.float64]
    expected_entropy: NDArray[np.float64]
    label: NDArray[np.int64]
    draws: int

    def __post_init__(self) -> None:
        for name, kind in (("probability", "float64"), ("expected_entropy", "float64"), ("label", "int64")):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != kind:
                found = getattr(value, "dtype", type(value).__name__)
                raise TypeError(f"{name} must be a NumPy array of {kind}: got {found}")
        shape = self.probability.shape
        good = len(shape) == 2 and shape[0] >= 1 and shape[1] >= 2
        check(good, "probability", "of shape (n, C), n at least 1 and C at least 2", shape)
        for name in ("expected_entropy", "label"):
            found_shape = getattr(self, name).shape
            check(found_shape == shape[:1], name, f"of shape ({shape[0]},)", found_shape)
        bad = ~((self.probability >= 0) & (self.probability <= 1)).all(1)  # NaN is neither
        bad |= ~(np.abs(self.probability.sum(1) - 1) <= _TOLERANCE)
        if bad.any():
            raise ValueError(
                "probability must be from 0 to 1 and add up to 1 over the classes: "
                f"got {self.probability[bad][0]} among {bad.sum()} such of {shape[0]} examples"
            )
        bad = ~((self.expected_entropy >= 0) & (self.expected_entropy <= self.entropy + _TOLERANCE))
        if bad.any():
            raise ValueError(
                f"expected_entropy must be from 0 to the entropy of the probability, {self.entropy[bad][0]}: "
                f"got {self.expected_entropy[bad][0]}"
            )
        _check_labels("label", self.label, shape[1])
        check(is_whole(self.draws, 1), "draws", "a positive integer", self.draws)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """The largest probability of each example. Shape: (n,)."""
        largest: NDArray[np.float64] = self.probability.max(1)
        return largest

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class with the largest probability, the first of several. Shape: (n,)."""
        return self.probability.argmax(1)

    @property
    def entropy(self) -> NDArray[np.float64]:
        """H = -Σ_c p_c log p_c of the posterior predictive, 0 to log C nats. Shape: (n,)."""
        p = self.probability
        total: NDArray[np.float64] = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(1)
        return total

    @property
    def epistemic(self) -> NDArray[np.float64]:
        """I[y; θ] = entropy - expected_entropy in nats, what is below 0 by rounding set to 0. Shape: (n,)."""
        return np.maximum(self.entropy - self.expected_entropy, 0.0)


def predictions(
    model: nn.Module, data: Data, theta: Mapping[str, Tensor], *, batch_size: int = AT_ONCE
) -> Predictions:
    """The posterior predictive (1/S) Σ_s softmax(f(x; θ_s)) of a classifier, in evaluation mode.

    Softmax, means and entropies are taken in float64 on the host. Batches are the outer loop and draws the
    inner one, so that memory grows with n C and not with the number of draws. Training mode, random numbers
    and Pyro's parameters are as before afterwards.

    >>> import torch
    >>> from torch import nn
    >>> from pyro_bmrs import Classifier, MultiplicativeNoise
    >>> _ = torch.manual_seed(0)
    >>> model = Classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), MultiplicativeNoise(8), nn.Linear(8, 3)))
    >>> data = torch.randn(20, 4), torch.randint(3, (20,))
    >>> point = predictions(model, data, {"2": torch.ones(8)})
    >>> posterior = predictions(model, data, {"2": torch.rand(50, 8)})
    >>> point.probability.shape, point.draws, posterior.draws
    ((20, 3), 1, 50)
    >>> bool((point.epistemic < 1e-12).all()), bool((posterior.epistemic > 1e-4).all())
    (True, True)

    Args:
        model: a Pyro model of (x, y) whose latents are those of its noise layers: a `Classifier`, or any that
            returns logits of shape (n, C), their class dimension in its `class_dim` (1 where it has none).
            One that is no `Classifier` is called with 0 for every label.
        data: (x, y) tensors, a data set or a loader; y are integers of shape (n,), all -1 where there are no
            labels. Examples labelled with the model's `ignore_index` (-100 where it has none) are left out.
        theta: θ of every noise layer by site: (features,) for a point, such as `guide.mean()`, or
            (draws, features). Empty for a network without noise layers.
        batch_size: examples per pass through the network; a loader keeps its own.

    Raises:
        NoClassifierError: if model returns no logits of shape (n, C), or labels are no integers, one per example.
        TypeError: if model is no module, or theta holds no tensors.
        ValueError: if theta leaves out a noise layer, names another, or has shapes that do not fit; if a
            label is not among the classes, or all are to be ignored; if batch_size < 1.
        ArithmeticError: if logits have no softmax, for NaN or +∞ among them, with the number of examples.
    """
    check_module("model", model)
    check(is_whole(batch_size, 1), "batch_size", "a positive integer", batch_size)
    device = next(model.parameters()).device
    thetas = split_draws(model, theta, device)
    draws = len(thetas)
    class_dim, ignore_index = getattr(model, "class_dim", 1), getattr(model, "ignore_index", -100)
    parts = []
    with untouched(model):
        for x, y in Batches(data, batch_size, device, "data"):
            y = _labels(model, y)
            probability, entropy = torch.zeros(()), torch.zeros(())
            for values in thetas:
                # logits depend on no label, and 0 is in the support of each classifier as -1 need not be
                logits = output_at(model, values, x, torch.zeros_like(y))
                p = _softmax(logits, class_dim, len(y))
                probability, entropy = probability + p, entropy + torch.special.entr(p).sum(1)
            label = y.cpu()
            counted = label != ignore_index
            _check_labels("labels in data", label[counted].numpy(), probability.shape[1])
            parts.append([total[counted].numpy() for total in (probability / draws, entropy / draws, label)])
    probabilities, entropies, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not len(labels):
        raise ValueError(f"data must have labels other than ignore_index={ignore_index}: got none")
    broken = int((~np.isfinite(probabilities).all(1)).sum())
    if broken:
        raise ArithmeticError(
            f"model gave logits without a softmax (NaN or infinite) for {broken} of {len(labels)} examples"
        )
    return Predictions(probabilities, entropies, labels, draws)


def split_draws(
    model: nn.Module, theta: Mapping[str, Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """θ by site, one mapping per draw, checked against the noise layers; with the weights where these are latents."""
    layers = noise_layers(model)
    check(set(theta) == set(layers), "theta", f"of the noise sites {sorted(layers)}", sorted(theta))
    stacks = {}
    for site, value in theta.items():
        features = layers[site].features
        check(isinstance(value, Tensor), f"theta of site {site!r}", "a tensor", type(value), TypeError)
        good = value.dim() in (1, 2) and value.shape[-1] == features and value.numel() > 0
        allowed = f"of shape ({features},) or (draws, {features})"
        check(good, f"theta of site {site!r}", allowed, tuple(value.shape))
        stacks[site] = value.detach().to(device).reshape(-1, features)
    counts = {site: len(stack) for site, stack in stacks.items()}
    check(len(set(counts.values())) <= 1, "theta", "of the same number of draws for all sites", counts)
    draws = next(iter(counts.values()), 1)
    own = own_weights(model)
    return [{**own, **{site: stack[draw] for site, stack in stacks.items()}} for draw in range(draws)]


def _softmax(logits: object, class_dim: int, examples: int) -> Tensor:
    """Probabilities of shape (examples, C), float64, on the host: not every accelerator has float64."""
    if isinstance(logits, Tensor) and logits.dim() == 2:
        rows = logits.movedim(class_dim, 1)
        if len(rows) == examples:
            return rows.cpu().double().softmax(1)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise NoClassifierError(
        f"model must return logits of shape ({examples}, C), one label per example: got {found}"
    )


def _labels(model: nn.Module, y: object) -> Tensor:
    """Labels as int64, without weights."""
    if isinstance(model, Likelihood) and isinstance(y, list | tuple) and len(y) == 2:
        y, _ = y
    if not isinstance(y, Tensor):
        found = type(y).__name__
    elif y.dim() != 1 or y.is_floating_point() or y.is_complex():
        found = f"{y.dtype} of shape {tuple(y.shape)}"
    else:
        return y.long()
    raise NoClassifierError(
        "data must have integer labels of shape (n,), as predictions are for classifiers with one label per "
        f"example: got {found}"
    )


def _check_labels(name: str, label: NDArray[np.int64], classes: int) -> None:
    bad = label[(label < 0) | (label >= classes)]
    if len(bad) and not (label == -1).all():
        raise ValueError(f"{name} must be classes 0 to {classes - 1}, or -1 everywhere: got {bad[0]}")
