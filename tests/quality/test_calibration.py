"""Calibration and uncertainty of a classifier: against torchmetrics, scikit-learn, hand sums, all draws."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise
from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage
from pyro_bmrs.quality.predictive import Predictions, predictions


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


class Switch(nn.Module):
    """Logits ±1000 θ: certain of the first class where θ = 1, of the second where θ = -1."""

    def __init__(self):
        super().__init__()
        self.noise, self.weight = MultiplicativeNoise(1), nn.Parameter(torch.tensor([[1000.0, -1000.0]]))

    def forward(self, x):
        return self.noise(x) @ self.weight


@pytest.mark.parametrize(
    ("draws", "epistemic", "aleatoric"),
    [
        ([1.0, -1.0], math.log(2), 0.0),
        ([1.0, -1.0, -1.0, 1.0], math.log(2), 0.0),
        ([0.0, 0.0, 0.0], 0.0, math.log(2)),
        ([0.001] * 7, 0.0, -sum(p * math.log(p) for p in (1 / (1 + math.e**2), 1 / (1 + math.e**-2)))),
        ([1.0, 0.0], 1.5 * math.log(2) - 0.75 * math.log(3), 0.5 * math.log(2)),
    ],
    ids=["opposite", "opposite twice", "even", "identical", "one of two certain"],
)  # fmt: skip
def test_the_entropy_is_split(draws, epistemic, aleatoric):
    model, data = Classifier(Switch()), (torch.ones(5, 1), torch.zeros(5, dtype=torch.long))
    found = predictions(model, data, {"noise": torch.tensor(draws).unsqueeze(1)})
    assert found.draws == len(draws)
    # θ = 0.001 is rounded to float32
    assert found.expected_entropy == pytest.approx(np.full(5, aleatoric), abs=1e-7)
    assert found.epistemic == pytest.approx(np.full(5, epistemic), abs=1e-7)
    assert (found.epistemic >= 0).all()
    assert found.entropy == pytest.approx(found.expected_entropy + found.epistemic, abs=1e-14)


def network():
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), MultiplicativeNoise(8), nn.Linear(8, 6),
        nn.ReLU(), MultiplicativeNoise(6), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.fixture
def fitted(empty_store):
    """A classifier, data, and 30 draws of θ."""
    model = Classifier(network())
    data = torch.randn(47, 4), torch.randint(3, (47,))
    guide = AutoTruncatedLogNormal(model, init_loc=-1.0, init_scale=1.0)
    guide(*data)
    return model, data, {site: q.sample((30,)) for site, q in guide.posterior().items()}


def all_at_once(model, data, scales):
    """Every draw's probabilities, the noise multiplied by hand. Shape: (draws, n, C)."""
    layers = list(model.net)
    found = []
    with torch.no_grad():
        for draw in range(len(scales["4"])):
            value = data[0]
            for index, layer in enumerate(layers):
                site = str(index)
                layer.eval()
                value = value * scales[site][draw] if site in scales else layer(value)
            found.append(value.double().softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [1, 10, 47, 1000])
def test_streaming_is_all_draws_at_once(fitted, batch_size):
    model, data, scales = fitted
    stack = all_at_once(model, data, scales)
    found = predictions(model, data, scales, batch_size=batch_size)
    # float32 logits of other batch sizes differ in the last digits
    assert found.probability == pytest.approx(stack.mean(0).numpy(), abs=1e-6)
    expected = torch.special.entr(stack).sum(-1).mean(0).numpy()
    assert found.expected_entropy == pytest.approx(expected, abs=1e-6)
    assert found.label.tolist() == data[1].tolist()
    assert found.draws == 30
    assert found.epistemic.min() > 1e-4


def test_in_double_precision_it_is_exact(fitted):
    model, (x, y), scales = fitted
    model, scales = model.double(), {site: theta.double() for site, theta in scales.items()}
    data = x.double(), y
    stack = all_at_once(model, data, scales)
    found = predictions(model, data, scales, batch_size=10)
    assert found.probability == pytest.approx(stack.mean(0).numpy(), abs=1e-14)
    assert found.confidence == pytest.approx(stack.mean(0).amax(-1).numpy(), abs=1e-14)
    assert found.predicted.tolist() == stack.mean(0).argmax(-1).tolist()
    total = torch.special.entr(stack.mean(0)).sum(-1)
    mutual = total - torch.special.entr(stack).sum(-1).mean(0)
    assert found.entropy == pytest.approx(total.numpy(), abs=1e-13)
    assert found.epistemic == pytest.approx(mutual.numpy(), abs=1e-13)
    means = {"entropy": total.mean(), "aleatoric": (total - mutual).mean(), "epistemic": mutual.mean()}
    for name, mean in means.items():
        assert quality(found)[name] == pytest.approx(float(mean), abs=1e-13)


def test_loaders_and_data_sets(fitted):
    model, data, scales = fitted
    wanted = predictions(model, data, scales, batch_size=10)
    for source in (TensorDataset(*data), DataLoader(TensorDataset(*data), batch_size=10)):
        found = predictions(model, source, scales, batch_size=10)
        assert (found.probability == wanted.probability).all()
        assert (found.label == wanted.label).all()


def test_a_point_is_one_draw(fitted):
    model, data, scales = fitted
    one = {site: theta[3] for site, theta in scales.items()}
    found = predictions(model, data, one)
    assert found.draws == 1
    stack = all_at_once(model, data, {site: theta[3:4] for site, theta in scales.items()})
    assert found.probability == pytest.approx(stack[0].numpy(), abs=1e-6)
    assert found.epistemic == pytest.approx(np.zeros(47), abs=1e-14)
    same = predictions(model, data, {site: theta.unsqueeze(0) for site, theta in one.items()})
    assert (same.probability == found.probability).all()


def test_a_network_without_noise(empty_store):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    found = predictions(Classifier(net), (x, y), {})
    assert found.draws == 1
    assert found.probability == pytest.approx(net(x).detach().double().softmax(1).numpy(), abs=1e-6)


class OwnModel(nn.Module):
    """No `Classifier`, and with a likelihood that accepts no label outside the classes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        pyro.module("own", self)
        logits = self.net(x)
        pyro.factor("y", dist.Categorical(logits=logits, validate_args=True).log_prob(y).sum())
        return logits


@pytest.mark.parametrize("label", [0, -1, -100])
def test_any_pyro_model_that_returns_logits(fitted, label):
    classifier, (x, y), scales = fitted
    y = torch.where(torch.arange(47) < 5, label, y) if label != -1 else torch.full_like(y, -1)
    wanted = predictions(classifier, (x, y), scales, batch_size=10)
    model = OwnModel(classifier.net)
    found = predictions(model, (x, y), scales, batch_size=10)
    assert (found.probability == wanted.probability).all()
    assert found.label.tolist() == [value for value in y.tolist() if value != -100]
    assert len(found.probability) == (42 if label == -100 else 47)


def test_ignored_examples_are_left_out(fitted):
    model, (x, y), scales = fitted
    everything = predictions(model, (x, y), scales, batch_size=10)
    model.ignore_index = 7
    ignored = torch.arange(47) % 5 == 0
    found = predictions(model, (x, torch.where(ignored, 7, y)), scales, batch_size=10)
    assert (found.probability == everything.probability[~ignored.numpy()]).all()
    assert (found.expected_entropy == everything.expected_entropy[~ignored.numpy()]).all()
    assert found.label.tolist() == y[~ignored].tolist()


@pytest.mark.parametrize("own", [False, True])
def test_nothing_else_is_changed(fitted, own):
    classifier, data, scales = fitted
    model = OwnModel(classifier.net) if own else classifier
    model.train()
    model.net[1].eval()
    pyro.param("other", torch.ones(2))
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = set(pyro.get_param_store().keys())
    random = torch.get_rng_state()
    loader = DataLoader(TensorDataset(*data), batch_size=10, shuffle=True)
    found = predictions(model, loader, scales)
    assert torch.equal(torch.get_rng_state(), random)
    assert set(pyro.get_param_store().keys()) == parameters
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sorted(found.label) == sorted(data[1].tolist())


def test_the_mode_comes_back_after_an_error(fitted):
    model, (x, y), scales = fitted
    model.train()
    with pytest.raises(ValueError, match="labels in data"):
        predictions(model, (x, y + 1), scales)
    assert model.training


def test_logits_without_a_softmax_are_counted(fitted):
    model, (x, y), scales = fitted
    x[[3, 20, 46]] = math.nan
    with pytest.raises(ArithmeticError, match="for 3 of 47 examples"):
        predictions(model, (x, y), scales, batch_size=10)


def test_a_class_that_is_ruled_out_is_allowed():
    """A logit of -∞ is probability 0, and adds nothing to the entropy."""
    net = nn.Linear(1, 3)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, 0.0, -math.inf]))
    found = predictions(Classifier(net), (torch.ones(2, 1), torch.tensor([0, 2])), {})
    assert found.probability.tolist() == [[0.5, 0.5, 0.0]] * 2
    assert found.expected_entropy == pytest.approx(np.full(2, math.log(2)), abs=1e-15)


X, Y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)
THETA = {"4": torch.ones(8), "7": torch.ones(6)}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": lambda x, y: x}, TypeError, "model must be a torch.nn.Module: got function"),
        ({"data": (X, Y.float())}, TypeError, r"data must have integer labels.*float32 of shape \(6,\)"),
        ({"data": (X, Y.bool())}, TypeError, "data must have integer labels.*torch.bool"),
        ({"data": (X, Y.unsqueeze(1))}, TypeError, r"one label per example: got torch.int64 of shape \(6, 1\)"),
        ({"data": (X, Y + 3)}, ValueError, "labels in data must be classes 0 to 2, or -1 everywhere: got 3"),
        ({"data": (X, Y - 2)}, ValueError, "labels in data must be classes 0 to 2, or -1 everywhere: got -2"),
        ({"data": (X, torch.arange(6) % 3 - 1)}, ValueError, "labels in data must be .* got -1"),
        ({"data": (X, -(torch.arange(6) // 3)), "batch_size": 3}, ValueError, "label must be .* got -1"),
        ({"data": (X, Y - 100)}, ValueError, "data must have labels other than ignore_index=-100"),
        ({"data": (X, Y[:5])}, ValueError, "data must have as many labels"),
        ({"data": (X[:0], Y[:0])}, ValueError, "data must not be empty"),
        ({"theta": {}}, ValueError, r"theta must be of the noise sites \['4', '7'\]: got \[\]"),
        ({"theta": {**THETA, "9": torch.ones(2)}}, ValueError, r"theta must be of.* got \['4', '7', '9'\]"),
        ({"theta": {**THETA, "7": torch.ones(5)}}, ValueError, r"theta of site '7' must.* \(6,\).*got \(5,\)"),
        ({"theta": {**THETA, "7": torch.ones(2, 1, 6)}}, ValueError, r"theta of site .* of shape.*\(2, 1, 6\)"),
        ({"theta": {**THETA, "7": torch.ones(0, 6)}}, ValueError, r"theta of site .* must be of shape.*\(0, 6\)"),
        ({"theta": {**THETA, "7": torch.ones(2, 6)}}, ValueError, "theta must be of the same number of draws"),
        ({"theta": {**THETA, "7": [1.0] * 6}}, TypeError, "theta of site '7' must be a tensor: got list"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer: got 0"),
        ({"batch_size": 2.0}, ValueError, r"batch_size must be a positive integer: got 2\.0"),
    ],
)  # fmt: skip
def test_bad_arguments_of_predictions(change, error, match):
    arguments = {"model": Classifier(network()), "data": (X, Y), "theta": THETA, **change}
    with pytest.raises(error, match=match):
        predictions(**arguments)


class Returning(nn.Module):
    """A Pyro model that observes nothing and returns what it is told to."""

    def __init__(self, value):
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.ones(1))

    def forward(self, x, y=None):
        return self.value


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("shape", [(6,), (6, 2, 2), (4, 6)])
def test_models_that_return_no_logits_per_example(shape, wrapped):
    model = Returning(torch.zeros(shape))
    found = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(TypeError, match=rf"logits of shape \(6, C\), one label per example: got {found}"):
        predictions(Classifier(model) if wrapped else model, (X, Y), {})


def test_models_that_return_no_tensor():
    with pytest.raises(TypeError, match=r"model must return logits .*: got dict"):
        predictions(Returning({}), (X, Y), {})


def test_the_class_dimension_is_the_models():
    logits = torch.randn(6, 3)
    model = Returning(logits.T)
    model.class_dim = 0
    assert predictions(model, (X, Y), {}).probability == pytest.approx(logits.double().softmax(1).numpy())


def test_labels_that_are_no_tensor():
    class Text(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], "cat"

    with pytest.raises(TypeError, match=r"data must have integer labels .*: got (list|tuple)"):
        predictions(Returning(torch.zeros(6, 2)), Text(X, Y), {})


GOOD = {
    "probability": np.array([[0.5, 0.5], [0.25, 0.75]]),
    "expected_entropy": np.array([0.1, 0.2]),
    "label": np.array([0, 1]),
    "draws": 3,
}


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("probability", [[0.5, 0.5]], TypeError, "NumPy array of float64: got list"),
        ("probability", np.full((2, 2), 0.5, dtype=np.float32), TypeError, "NumPy array of float64: got float32"),
        ("probability", np.array([0.5, 0.5]), ValueError, r"shape \(n, C\).*got \(2,\)"),
        ("probability", np.zeros((0, 2)), ValueError, r"n at least 1.*got \(0, 2\)"),
        ("probability", np.ones((2, 1)), ValueError, r"C at least 2: got \(2, 1\)"),
        ("probability", np.array([[0.5, 0.5], [math.nan, 1.0]]), ValueError, "from 0 to 1.*1 such of 2"),
        ("probability", np.array([[0.5, 0.5], [-0.5, 1.5]]), ValueError, "from 0 to 1.*1 such of 2"),
        ("probability", np.array([[0.5, 0.5], [0.5, 0.4]]), ValueError, "add up to 1.*1 such of 2"),
        ("expected_entropy", np.array([0, 0]), TypeError, "NumPy array of float64: got int64"),
        ("expected_entropy", np.zeros(3), ValueError, r"shape \(2,\): got \(3,\)"),
        ("expected_entropy", np.array([0.7, 0.2]), ValueError, r"from 0 to the entropy.*0\.69.*: got 0\.7"),
        ("expected_entropy", np.array([0.1, -0.2]), ValueError, r"from 0 to the entropy.*: got -0\.2"),
        ("expected_entropy", np.array([0.1, math.nan]), ValueError, r"from 0 to the entropy.*: got nan"),
        ("label", np.array([0.0, 1.0]), TypeError, "NumPy array of int64: got float64"),
        ("label", np.array([[0], [1]]), ValueError, r"shape \(2,\): got \(2, 1\)"),
        ("label", np.array([0, 2]), ValueError, "classes 0 to 1, or -1 everywhere: got 2"),
        ("label", np.array([0, -1]), ValueError, "classes 0 to 1, or -1 everywhere: got -1"),
        ("draws", 0, ValueError, "positive integer: got 0"),
        ("draws", 1.5, ValueError, r"positive integer: got 1\.5"),
    ],
)  # fmt: skip
def test_bad_predictions(name, value, error, match):
    Predictions(**GOOD)
    with pytest.raises(error, match=f"^{name} must .*{match}"):
        Predictions(**{**GOOD, name: value})


UNLABELLED = point([[0.5, 0.5]], [-1])


@pytest.mark.parametrize("function", [quality, reliability, risk_coverage])
def test_scores_need_labelled_predictions(function):
    with pytest.raises(ValueError, match="predictions must have labels: all are -1"):
        function(UNLABELLED)
    with pytest.raises(TypeError, match="predictions must be Predictions: got dict"):
        function(GOOD)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: reliability(SIX, bins=0), ValueError, "bins must be a positive integer: got 0"),
        (lambda: reliability(SIX, bins=1.5), ValueError, "bins must be a positive integer: got 1.5"),
        (lambda: quality(SIX, bins=0), ValueError, "bins must be a positive integer: got 0"),
        (lambda: risk_coverage(SIX, points=1), ValueError, "points must be an integer of at least 2: got 1"),
        (lambda: risk_coverage(SIX, points=2.0), ValueError, "points must be an integer of at least 2: got 2.0"),
        (lambda: quality(SIX, GOOD), TypeError, "out_of_distribution must be Predictions: got dict"),
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
