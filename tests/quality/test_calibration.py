"""Scores of a classifier's probabilities: against torchmetrics, scikit-learn, sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage, temperature, tempered
from pyro_bmrs.quality.predictive import Predictions


def point(probability, label):
    """Predictions of one draw."""
    probability = np.asarray(probability, dtype=np.float64)
    expected = -(probability * np.log(np.maximum(probability, 1e-300))).sum(1)
    return Predictions(probability, expected, np.asarray(label, dtype=np.int64), 1)


def drawn(examples, classes, seed=0, sharpness=2.0):
    """Probabilities, and labels drawn from them: calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(examples, classes, generator=generator, dtype=torch.float64)
    probability = logits.softmax(1)
    return probability.numpy(), torch.multinomial(probability, 1, generator=generator).squeeze(1).numpy()


# Six examples, whose scores are worked out below; bins of a quarter.
SIX = point(
    [[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [1.0, 0.0], [0.0, 1.0], [0.125, 0.875]], [0, 1, 0, 0, 0, 1]
)


def test_six_examples_by_hand():
    found = quality(SIX, bins=4)
    assert (found["examples"], found["accuracy"]) == (6, pytest.approx(4 / 6, abs=1e-15))
    # the fifth example's label has probability 0, and the smallest normal float64, 2^-1022, in its stead
    likelihood = -math.log(0.75 * 0.5 * 0.625 * 1.0 * 0.875) + 1022 * math.log(2)
    assert found["negative_log_likelihood"] == pytest.approx(likelihood / 6, rel=1e-14)
    squares = 2 * (0.25**2 + 0.5**2 + 0.375**2 + 0 + 1 + 0.125**2)
    assert found["brier"] == pytest.approx(squares / 6, abs=1e-15)
    # [0.5, 0.75): 0.5 wrong, 0.625 right; [0.75, 1): 0.75 and 0.875 right; 1: one right, one wrong
    error = (abs(1 - 1.125) + abs(2 - 1.625) + abs(1 - 2)) / 6
    assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-15)

    def binary(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    entropy = (binary(0.75) + binary(0.5) + binary(0.625) + binary(0.125)) / 6
    assert found["entropy"] == pytest.approx(entropy, abs=1e-14)
    assert found["aleatoric"] == pytest.approx(entropy, abs=1e-14)
    assert found["epistemic"] == pytest.approx(0, abs=1e-14)
    assert math.isnan(found["out_of_distribution_auroc"])
    # in order of confidence: 1 right, 1 wrong, 0.875, 0.75 and 0.625 right, 0.5 wrong
    risks = [0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 2 / 6]
    assert found["area_under_risk_coverage"] == pytest.approx(sum(risks) / 6, abs=1e-15)
    curve = risk_coverage(SIX)
    assert curve["risk"].tolist() == pytest.approx(risks, abs=1e-15)
    assert curve["coverage"].tolist() == pytest.approx([k / 6 for k in range(1, 7)], abs=1e-15)
    assert curve["threshold"].tolist() == [1, 1, 0.875, 0.75, 0.625, 0.5]


def test_the_table_of_six_examples():
    """An edge belongs to the bin above it, and confidence 1 has a row of its own, as in torchmetrics."""
    table = reliability(SIX, bins=4)
    assert table["lower"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert table["upper"].tolist() == [0.25, 0.5, 0.75, 1, 1]
    assert table["count"].tolist() == [0, 0, 2, 2, 2]
    empty = [math.nan, math.nan]
    assert table["confidence"].tolist() == pytest.approx([*empty, 0.5625, 0.8125, 1], nan_ok=True)
    assert table["accuracy"].tolist() == pytest.approx([*empty, 0.5, 1, 0.5], nan_ok=True)


@pytest.mark.parametrize("bins", [3, 6, 7, 10, 15, 49])
def test_every_edge_is_in_the_bin_above(bins):
    """Edges are the float64 nearest to k / bins, where multiples of 1 / bins are not always."""
    confidence = np.array([k / bins for k in range(bins + 1) if 2 * k > bins])
    table = reliability(
        point(np.stack([confidence, 1 - confidence], 1), np.zeros(len(confidence))), bins=bins
    )
    filled = table[table["count"] > 0]
    assert filled["lower"].tolist() == filled["confidence"].tolist() == confidence.tolist()


# torchmetrics computes in float32. What is left of it here are its roundings of means and shares:
# confidences are multiples of 1/64, so that their sums are exact, and the number of examples is a power of 2;
# of bins there are powers of 2, whose edges are exact and hit, or odd numbers, of whose edges only 0 and 1
# are such multiples.
@st.composite
def in_64ths(draw):
    classes = draw(st.integers(2, 5))
    examples = 2 ** draw(st.integers(0, 7))
    cut = st.lists(st.one_of(st.sampled_from([0, 16, 32, 48, 64]), st.integers(0, 64)), min_size=classes - 1,
                   max_size=classes - 1)  # fmt: skip
    cuts = draw(st.lists(cut, min_size=examples, max_size=examples))
    probability = np.diff(np.sort(cuts, axis=1), axis=1, prepend=0, append=64) / 64
    label = draw(st.lists(st.integers(0, classes - 1), min_size=examples, max_size=examples))
    return probability, np.array(label)


@settings(max_examples=100, deadline=None)
@given(in_64ths(), st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16]))
def test_calibration_error_is_that_of_torchmetrics(data, bins):
    probability, label = data
    wanted = multiclass_calibration_error(
        torch.tensor(probability), torch.tensor(label), probability.shape[1], n_bins=bins
    )
    found = quality(point(probability, label), bins=bins)["expected_calibration_error"]
    assert found == pytest.approx(float(wanted), abs=1e-7)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_scores_are_those_of_scikit_learn(classes):
    probability, label = drawn(500, classes)
    assert probability[np.arange(500), label].min() > 1e-15  # below 2.2e-16 log_loss is another
    elsewhere, _ = drawn(300, classes, seed=1, sharpness=1.0)
    inside, outside = point(probability, label), point(elsewhere, np.full(300, -1))
    found = quality(inside, outside)
    labels = list(range(classes))
    both = np.vstack([probability, elsewhere])
    wanted = {
        "accuracy": accuracy_score(label, probability.argmax(1)),
        "negative_log_likelihood": log_loss(label, probability, labels=labels),
        "brier": brier_score_loss(label, probability, labels=labels, scale_by_half=False),
        "out_of_distribution_auroc": roc_auc_score([0] * 500 + [1] * 300, -(both * np.log(both)).sum(1)),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


def test_out_of_distribution_by_hand():
    """Entropies 0 and log 2 inside, log 2 and 0 outside: of four pairs one is right, two are ties."""
    inside, outside = point([[1, 0], [0.5, 0.5]], [0, 0]), point([[0.5, 0.5], [0, 1]], [-1, -1])
    assert quality(inside, outside)["out_of_distribution_auroc"] == 0.5
    sure = point([[1, 0], [0.9, 0.1]], [0, 0])
    unsure = point([[0.5, 0.5], [0.6, 0.4]], [-1, -1])
    assert quality(sure, unsure)["out_of_distribution_auroc"] == 1
    assert quality(point(unsure.probability, [0, 0]), sure)["out_of_distribution_auroc"] == 0


def test_a_small_probability_counts_as_it_is():
    """scikit-learn's log_loss would give 36.04 nats."""
    found = quality(point([[1.0, 1e-100]], [1]))["negative_log_likelihood"]
    assert found == pytest.approx(100 * math.log(10), rel=1e-14)


@pytest.mark.parametrize("examples", [1, 2, 40, 101, 102, 333])
@pytest.mark.parametrize("points", [2, 7, 101])
def test_risk_coverage_by_brute_force(examples, points):
    generator = np.random.default_rng(0)
    probability = generator.multinomial(8, [0.5, 0.3, 0.2], examples) / 8  # many ties
    label = generator.integers(0, 3, examples)
    made = point(probability, label)
    order = sorted(range(examples), key=lambda i: (-probability[i].max(), i))
    wrong = [probability[i].argmax() != label[i] for i in order]
    risks = [sum(wrong[:k]) / k for k in range(1, examples + 1)]
    curve = risk_coverage(made, points=points)
    k = [round(coverage * examples) for coverage in curve["coverage"]]
    assert len(k) == min(points, examples)
    assert curve["coverage"].tolist() == pytest.approx([kept / examples for kept in k], abs=1e-15)
    assert k[-1] == examples
    if examples > 1:
        assert k[0] == 1
        steps = np.diff(k)
        assert steps.max() - steps.min() <= 1
    assert curve["risk"].tolist() == pytest.approx([risks[kept - 1] for kept in k], abs=1e-15)
    assert curve["threshold"].tolist() == [probability[order[kept - 1]].max() for kept in k]
    area = quality(made)["area_under_risk_coverage"]
    assert area == pytest.approx(sum(risks) / examples, abs=1e-14)


# ECE is the largest of the 2^B means (1/n) Σ ±_b (correct_i - confidence_i), a sign for each of the B bins.
# With labels drawn from the probabilities the terms are independent with mean 0, each within an interval of
# length 1, so that by Hoeffding's inequality P(ECE > ε) ≤ 2^B exp(-2 n ε²). With 16 bins (confidence 1 is
# one) and n = 20,000 that is 1e-9 for ε = 0.0282. By the same inequality accuracy is within ε of the mean true
# confidence, and ECE is at least mean confidence minus accuracy: over-confident by 3ε on average, it is
# above 2ε.
BOUND = math.sqrt((16 * math.log(2) + 9 * math.log(10)) / 2 / 20_000)


def test_calibrated_predictions_are_found_so_and_over_confident_ones_not():
    probability, label = drawn(20_000, 10)
    assert quality(point(probability, label))["expected_calibration_error"] < BOUND
    sharp = probability**3 / (probability**3).sum(1, keepdims=True)
    assert sharp.max(1).mean() - probability.max(1).mean() > 3 * BOUND
    assert quality(point(sharp, label))["expected_calibration_error"] > 2 * BOUND


UNLABELLED = point([[0.5, 0.5]], [-1])


@pytest.mark.parametrize("function", [quality, reliability, risk_coverage])
def test_scores_need_labelled_predictions(function):
    with pytest.raises(ValueError, match="predictions must have labels: all are -1"):
        function(UNLABELLED)
    with pytest.raises(TypeError, match="predictions must be Predictions: got dict"):
        function({})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: reliability(SIX, bins=0), ValueError, "bins must be a positive integer: got 0"),
        (lambda: reliability(SIX, bins=1.5), ValueError, "bins must be a positive integer: got 1.5"),
        (lambda: quality(SIX, bins=0), ValueError, "bins must be a positive integer: got 0"),
        (lambda: risk_coverage(SIX, points=1), ValueError, "points must be an integer of at least 2: got 1"),
        (lambda: risk_coverage(SIX, points=2.0), ValueError, "points must be an integer of at least 2: got 2.0"),
        (lambda: quality(SIX, {}), TypeError, "out_of_distribution must be Predictions: got dict"),
        (
            lambda: quality(SIX, point([[0.5, 0.25, 0.25]], [-1])),
            ValueError,
            "out_of_distribution must be of 2 classes, as predictions: got 3",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_of_scores(call, error, match):
    with pytest.raises(error, match=match):
        call()


class Itself(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its logits."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return self.classes_[x.argmax(1)]


@pytest.mark.parametrize(("classes", "sharpness"), [(3, 0.3), (3, 1.0), (10, 3.0)])
def test_the_temperature_is_that_of_scikit_learn(classes, sharpness):
    p, label = drawn(400, classes)
    logits = sharpness * np.log(p)  # so that 1 is right where the sharpness is
    given = point(torch.from_numpy(logits).softmax(1).numpy(), label)
    found = tempered(given, temperature(given))
    model = CalibratedClassifierCV(FrozenEstimator(Itself().fit(logits, label)), method="temperature")
    theirs = model.fit(logits, label).predict_proba(logits)
    assert np.abs(found.probability - theirs).max() < 2e-3
    own, other = (
        quality(point(some, label))["negative_log_likelihood"] for some in (found.probability, theirs)
    )
    assert own <= other + 1e-7  # theirs is found with a coarse tolerance
    assert temperature(given) == pytest.approx(sharpness, rel=0.25)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.floats(0.2, 5.0), st.integers(0, 10_000))
def test_no_other_temperature_is_better_and_no_prediction_changes(classes, sharpness, seed):
    p, label = drawn(60, classes, seed, sharpness)
    given_, at = point(p, label), temperature(point(p, label))
    best = tempered(given_, at)
    assert (best.predicted == given_.predicted).all()
    assert np.allclose(best.expected_entropy, best.entropy)
    least = quality(best)["negative_log_likelihood"]
    for other in np.geomspace(0.05, 20, 60):
        assert quality(tempered(given_, float(other)))["negative_log_likelihood"] >= least - 1e-6
    assert np.allclose(tempered(given_, 1.0).probability, p, atol=1e-12)


def test_bad_arguments_of_temperatures():
    two = Predictions(np.full((1, 2), 0.5), np.zeros(1), np.array([0]), draws=2)
    with pytest.raises(ValueError, match="predictions must be from a point: got '2 draws'"):
        temperature(two)
    with pytest.raises(ValueError, match="predictions must be from a point: got '2 draws'"):
        tempered(two, 1.0)
    with pytest.raises(ValueError, match="temperature must be a positive number: got 0"):
        tempered(SIX, 0)
    with pytest.raises(ValueError, match="must have labels"):
        temperature(point([[0.5, 0.5]], [-1]))
