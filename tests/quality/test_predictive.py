"""The posterior predictive of a classifier: against sums by hand, and all draws at once."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise
from pyro_bmrs.quality.calibration import quality
from pyro_bmrs.quality.predictive import Predictions, predictions


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
        ({"data": (X, Y.cfloat())}, TypeError, "data must have integer labels.*torch.complex64"),
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
