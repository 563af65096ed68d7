"""Whether a classifier's posterior predictive means what it says: scores, reliability, when to abstain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.predict import output_at
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import check_module
from pyro_bmrs.networks.noise import noise_layers

# By how much the rows of probabilities made in float32 may miss 1, and their entropies the bound of Jensen.
_TOLERANCE = 1e-5


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
        if self.probability.ndim != 2 or self.probability.shape[0] < 1 or self.probability.shape[1] < 2:
            raise ValueError(
                "probability must have shape (n, C), n at least 1 and C at least 2: "
                f"got {self.probability.shape}"
            )
        examples, classes = self.probability.shape
        for name in ("expected_entropy", "label"):
            if getattr(self, name).shape != (examples,):
                raise ValueError(f"{name} must have shape ({examples},): got {getattr(self, name).shape}")
        bad = ~((self.probability >= 0) & (self.probability <= 1)).all(1)  # NaN is neither
        bad |= ~(np.abs(self.probability.sum(1) - 1) <= _TOLERANCE)
        if bad.any():
            raise ValueError(
                "probability must be from 0 to 1 and add up to 1 over the classes: "
                f"got {self.probability[bad][0]} among {bad.sum()} such of {examples} examples"
            )
        bad = ~((self.expected_entropy >= 0) & (self.expected_entropy <= self.entropy + _TOLERANCE))
        if bad.any():
            raise ValueError(
                f"expected_entropy must be from 0 to the entropy of the probability, {self.entropy[bad][0]}: "
                f"got {self.expected_entropy[bad][0]}"
            )
        _check_labels("label", self.label, classes)
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
    model: nn.Module, data: Data, scales: Mapping[str, Tensor], *, batch_size: int = 1000
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
        scales: θ of every noise layer by site: (features,) for a point, such as `guide.mean()`, or
            (draws, features). Empty for a network without noise layers.
        batch_size: examples per pass through the network; a loader keeps its own.

    Raises:
        TypeError: if model is no module or returns no logits of shape (n, C), scales are no tensors, or
            labels are no integers, one per example.
        ValueError: if scales leave out a noise layer, name another, or have shapes that do not fit; if a
            label is not among the classes, or all are to be ignored; if batch_size < 1.
        ArithmeticError: if logits have no softmax, for NaN or +∞ among them, with the number of examples.
    """
    check_module("model", model)
    check(is_whole(batch_size, 1), "batch_size", "a positive integer", batch_size)
    device = next(model.parameters()).device
    thetas = _split_draws(model, scales, device)
    draws = len(thetas)
    class_dim, ignore_index = getattr(model, "class_dim", 1), getattr(model, "ignore_index", -100)
    parts = []
    with untouched(model):
        for x, y in Batches(data, batch_size, device, "data"):
            _check_label_tensor(y)
            probability, entropy = torch.zeros(()), torch.zeros(())
            for theta in thetas:
                # logits depend on no label, and 0 is in the support of each classifier as -1 need not be
                logits = output_at(model, theta, x, torch.zeros_like(y))
                p = _softmax(logits, class_dim, len(y))
                probability, entropy = probability + p, entropy + torch.special.entr(p).sum(1)
            label = y.cpu().long()
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


def quality(
    predictions: Predictions, out_of_distribution: Predictions | None = None, *, bins: int = 15
) -> dict[str, float]:
    """Scores of the posterior predictive against the labels, by name.

    >>> import numpy as np
    >>> p = np.array([[0.75, 0.25], [0.5, 0.5]])
    >>> point = Predictions(p, -(p * np.log(p)).sum(1), np.array([0, 1]), draws=1)
    >>> {name: round(value, 4) for name, value in quality(point, bins=4).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'examples': 2.0, 'accuracy': 0.5, 'negative_log_likelihood': 0.4904, 'brier': 0.3125,
     'expected_calibration_error': 0.375, 'entropy': 0.6277, 'aleatoric': 0.6277, 'epistemic': 0.0,
     'out_of_distribution_auroc': nan, 'area_under_risk_coverage': 0.25}

    Args:
        predictions: of examples with labels.
        out_of_distribution: of examples from elsewhere, with or without labels, by the same model.
        bins: of the calibration error, see `reliability`.

    Returns:
        examples: n.
        accuracy: share of examples whose label is the predicted class, 0 to 1.
        negative_log_likelihood: -(1/n) Σ log p(y_i | x_i) in nats per example. Probabilities below the
            smallest normal float64, 2.2e-308, count as that: no example adds more than 708.4 nats.
        brier: (1/n) Σ_i Σ_c (p_ic - [y_i = c])², 0 to 2 (Brier, 1950).
        expected_calibration_error: Σ_b count_b/n |accuracy_b - confidence_b| over the rows of `reliability`,
            0 to 1 (Naeini et al., 2015; Guo et al., 2017).
        entropy, aleatoric, epistemic: means of `entropy`, `expected_entropy` and `epistemic`, nats.
        out_of_distribution_auroc: probability that an example from elsewhere has the larger entropy, ties
            counted half: 0.5 is no better than chance. NaN where none are given.
        area_under_risk_coverage: mean over k = 1 to n of the share of errors among the k most confident
            examples, 0 to 1 (Geifman et al., 2019).

    Raises:
        TypeError: if an argument is no `Predictions`.
        ValueError: if predictions have no labels, out_of_distribution has another number of classes, or
            bins < 1.
    """
    _check_labelled(predictions)
    if out_of_distribution is not None:
        _check_kind("out_of_distribution", out_of_distribution)
        found, classes = out_of_distribution.probability.shape[1], predictions.probability.shape[1]
        if found != classes:
            raise ValueError(f"out_of_distribution must have {classes} classes, as predictions: got {found}")
    table = reliability(predictions, bins=bins)
    p, label = predictions.probability, predictions.label
    examples = len(label)
    # Not scikit-learn's log_loss: it takes every probability below 2.2e-16 for that, and so hides how wrong
    # the surest errors are; and its Brier score of several classes came with 1.7, after the oldest allowed.
    likelihood = np.maximum(p[np.arange(examples), label], np.finfo(np.float64).tiny)
    truth = np.eye(p.shape[1])[label]
    return {
        "examples": float(examples),
        "accuracy": float((predictions.predicted == label).mean()),
        "negative_log_likelihood": float(-np.log(likelihood).mean()),
        "brier": float(((p - truth) ** 2).sum(1).mean()),
        "expected_calibration_error": float(
            (table["count"] / examples * (table["accuracy"] - table["confidence"]).abs()).sum()
        ),
        "entropy": float(predictions.entropy.mean()),
        "aleatoric": float(predictions.expected_entropy.mean()),
        "epistemic": float(predictions.epistemic.mean()),
        "out_of_distribution_auroc": _auroc(predictions, out_of_distribution),
        "area_under_risk_coverage": float(_by_confidence(predictions)[1].mean()),
    }


# Not torchmetrics' calibration error, which rounds to float32: of 50 data sets of 10,000 examples (10
# classes, logits from N(0, 9), 15 bins) it is off by 6e-8 in the median, and in one by 8e-5, where rounding
# moves an example to another bin.
def reliability(predictions: Predictions, *, bins: int = 15) -> pd.DataFrame:
    """Accuracy against confidence, in bins of equal width (Guo et al., 2017).

    The bins are torchmetrics': bin b = 0 to bins - 1 has confidences in [b/bins, (b + 1)/bins), and those of
    exactly 1 have a row of their own.

    >>> import numpy as np
    >>> p = np.array([[0.75, 0.25], [0.5, 0.5], [0.6, 0.4], [1.0, 0.0]])
    >>> point = Predictions(p, np.zeros(4), np.array([0, 1, 0, 0]), draws=1)
    >>> reliability(point, bins=4)
       lower  upper  count  confidence  accuracy
    0   0.00   0.25      0         NaN       NaN
    1   0.25   0.50      0         NaN       NaN
    2   0.50   0.75      2        0.55       0.5
    3   0.75   1.00      1        0.75       1.0
    4   1.00   1.00      1        1.00       1.0

    Args:
        predictions: of examples with labels.
        bins: how many of equal width between 0 and 1.

    Returns:
        A row per bin and one for confidence 1: lower, upper (the first within, the second without, but for
        the last row), count, confidence and accuracy (means over the bin's examples, NaN where it has none).

    Raises:
        TypeError: if predictions are no `Predictions`.
        ValueError: if predictions have no labels, or bins < 1.
    """
    _check_labelled(predictions)
    check(is_whole(bins, 1), "bins", "a positive integer", bins)
    edges = np.arange(bins + 1) / bins  # each the nearest to k/bins, as linspace's are not
    confidence = predictions.confidence
    index = np.searchsorted(edges, confidence, side="right") - 1
    count = np.bincount(index, minlength=bins + 1)
    correct = np.bincount(index, predictions.predicted == predictions.label, minlength=bins + 1)
    total = np.bincount(index, confidence, minlength=bins + 1)
    size = np.where(count > 0, count, np.nan)
    return pd.DataFrame(
        {
            "lower": edges,
            "upper": np.append(edges[1:], 1.0),
            "count": count,
            "confidence": total / size,
            "accuracy": correct / size,
        }
    )


def risk_coverage(predictions: Predictions, *, points: int = 101) -> pd.DataFrame:
    """The share of errors left when the least confident examples get no answer (Geifman & El-Yaniv, 2017).

    risk(k/n) = (1/k) Σ_{i ≤ k} [ŷ_i ≠ y_i], examples in order of falling confidence, equal ones in that of
    the data.

    >>> import numpy as np
    >>> p = np.array([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1], [0.4, 0.6]])
    >>> point = Predictions(p, np.zeros(4), np.array([0, 1, 0, 0]), draws=1)
    >>> risk_coverage(point)
       coverage      risk  threshold
    0      0.25  0.000000       0.90
    1      0.50  0.000000       0.75
    2      0.75  0.333333       0.60
    3      1.00  0.500000       0.50

    Args:
        predictions: of examples with labels.
        points: how many k, evenly spaced from 1 to n; all n where there are no more.

    Returns:
        A row per k: coverage (k/n), risk (share of errors among the k, 0 to 1), threshold (the confidence of
        the least confident of them).

    Raises:
        TypeError: if predictions are no `Predictions`.
        ValueError: if predictions have no labels, or points < 2.
    """
    _check_labelled(predictions)
    check(is_whole(points, 2), "points", "an integer of at least 2", points)
    confidence, risk = _by_confidence(predictions)
    examples = len(risk)
    k = np.linspace(1, examples, min(points, examples)).round().astype(np.int64)
    return pd.DataFrame({"coverage": k / examples, "risk": risk[k - 1], "threshold": confidence[k - 1]})


def _by_confidence(predictions: Predictions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Confidence in falling order, and the share of errors down to each."""
    order = np.argsort(-predictions.confidence, kind="stable")
    errors = np.cumsum((predictions.predicted != predictions.label)[order])
    return predictions.confidence[order], errors / np.arange(1, len(order) + 1)


def _auroc(inside: Predictions, outside: Predictions | None) -> float:
    if outside is None:
        return float("nan")
    with untouched():  # its first import moves Python's generator
        from sklearn.metrics import roc_auc_score  # slow to import

    is_outside = np.repeat([0, 1], [len(inside.label), len(outside.label)])
    return float(roc_auc_score(is_outside, np.concatenate([inside.entropy, outside.entropy])))


def _split_draws(
    model: nn.Module, scales: Mapping[str, Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """θ by site, one mapping per draw, checked against the noise layers of `model`."""
    layers = noise_layers(model)
    if set(scales) != set(layers):
        raise ValueError(f"scales must name the noise sites {sorted(layers)}: got {sorted(scales)}")
    for site, theta in scales.items():
        features = layers[site].features
        if not isinstance(theta, Tensor):
            raise TypeError(f"scales must be tensors: got {type(theta).__name__} for site {site!r}")
        if theta.dim() not in (1, 2) or theta.shape[-1] != features or theta.numel() == 0:
            raise ValueError(
                f"scales must have shape ({features},) or (draws, {features}) for site {site!r}: "
                f"got {tuple(theta.shape)}"
            )
    stacks = {
        site: theta.detach().to(device).reshape(-1, layers[site].features) for site, theta in scales.items()
    }
    counts = {site: len(stack) for site, stack in stacks.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"scales must have the same number of draws for all sites: got {counts}")
    return [
        {site: stack[draw] for site, stack in stacks.items()}
        for draw in range(next(iter(counts.values()), 1))
    ]


def _softmax(logits: object, class_dim: int, examples: int) -> Tensor:
    """Probabilities of shape (examples, C), float64, on the host: not every accelerator has float64."""
    if isinstance(logits, Tensor) and logits.dim() == 2:
        rows = logits.movedim(class_dim, 1)
        if len(rows) == examples:
            return rows.cpu().double().softmax(1)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise TypeError(f"model must return logits of shape ({examples}, C), one label per example: got {found}")


def _check_label_tensor(y: object) -> None:
    if not isinstance(y, Tensor):
        found = type(y).__name__
    elif y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        found = f"{y.dtype} of shape {tuple(y.shape)}"
    else:
        return
    raise TypeError(
        "data must have integer labels of shape (n,), as predictions are for classifiers with one label per "
        f"example: got {found}"
    )


def _check_labels(name: str, label: NDArray[np.int64], classes: int) -> None:
    bad = label[(label < 0) | (label >= classes)]
    if len(bad) and not (label == -1).all():
        raise ValueError(f"{name} must be classes 0 to {classes - 1}, or -1 everywhere: got {bad[0]}")


def _check_kind(name: str, value: object) -> None:
    if not isinstance(value, Predictions):
        raise TypeError(f"{name} must be Predictions: got {type(value).__name__}")


def _check_labelled(predictions: Predictions) -> None:
    _check_kind("predictions", predictions)
    if predictions.label[0] == -1:
        raise ValueError("predictions must have labels: all are -1")
