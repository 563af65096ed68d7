"""Whether a classifier's probabilities mean what they say: scores, reliability, when to abstain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.quality.predictive import Predictions

_TEMPERATURES = (0.05, 20.0)


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
        known = isinstance(out_of_distribution, Predictions)
        check(known, "out_of_distribution", "Predictions", type(out_of_distribution), TypeError)
        found, classes = out_of_distribution.probability.shape[1], predictions.probability.shape[1]
        check(found == classes, "out_of_distribution", f"of {classes} classes, as predictions", found)
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


def temperature(predictions: Predictions) -> float:
    """The temperature T of a classifier, fitted to examples that it was not trained on (Guo et al., 2017).

    T is where −(1/n) Σ log p_T(y_i | x_i) is least, p_T ∝ p^(1/T), which for a network is softmax(logits/T): above 1
    where it is too sure. No prediction changes, only how sure it is.

    >>> import numpy as np
    >>> p = np.array([[0.9, 0.1]] * 4)                    # sure of the first class, and right three times of four
    >>> four = Predictions(p, -(p * np.log(p)).sum(1), np.array([0, 0, 0, 1]), draws=1)
    >>> round(temperature(four), 3)
    2.0
    >>> tempered(four, temperature(four)).probability[0].round(3)
    array([0.75, 0.25])

    Args:
        predictions: of held-out examples with labels, from a point.

    Returns:
        T, from 0.05 to 20.

    Raises:
        TypeError: if predictions are no `Predictions`.
        ValueError: if they have no labels, or are from several draws.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]  # slow to import

    _check_labelled(predictions)
    _check_point(predictions)
    label = predictions.label[:, np.newaxis]

    # scikit-learn's temperature scaling is part of a classifier, and does not tell its temperature
    def loss(log_temperature: float) -> float:
        found = _log_tempered(predictions.probability, np.exp(log_temperature))
        return -float(np.take_along_axis(found, label, 1).mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))


def tempered(predictions: Predictions, temperature: float) -> Predictions:
    """The same predictions of a point at another temperature: p_T ∝ p^(1/T).

    Raises:
        TypeError: if predictions are no `Predictions`.
        ValueError: if they are from several draws, or the temperature is not positive.
    """
    check(isinstance(predictions, Predictions), "predictions", "Predictions", type(predictions), TypeError)
    _check_point(predictions)
    check(is_number(temperature) and temperature > 0, "temperature", "a positive number", temperature)
    log_p = _log_tempered(predictions.probability, temperature)
    probability = np.exp(log_p)
    return replace(predictions, probability=probability, expected_entropy=-(probability * log_p).sum(1))


def _log_tempered(probability: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """log p_T. Shape: that of the probabilities."""
    scaled = np.log(np.maximum(probability, np.finfo(np.float64).tiny)) / temperature
    scaled -= scaled.max(1, keepdims=True)
    found: NDArray[np.float64] = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    return found


def _check_point(predictions: Predictions) -> None:
    check(predictions.draws == 1, "predictions", "from a point", f"{predictions.draws} draws")


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
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]  # slow to import

    pairs = len(inside.label) * len(outside.label)
    return float(mannwhitneyu(outside.entropy, inside.entropy, method="asymptotic").statistic / pairs)


def _check_labelled(predictions: Predictions) -> None:
    check(isinstance(predictions, Predictions), "predictions", "Predictions", type(predictions), TypeError)
    if predictions.label[0] == -1:
        raise ValueError("predictions must have labels: all are -1")
