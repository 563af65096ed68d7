"""The one way to a prediction, and that a network which draws from the prior says so."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.inference.predict import posterior_point, predict
from pyro_bmrs.networks.noise import fixed_scales
from pyro_bmrs.quality.predictive import predictions

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def network(outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, outputs))


def spread(guide, *arguments):
    """A posterior whose mean is far from the prior's, and whose draws differ."""
    guide(*arguments)
    with torch.no_grad():
        for posterior in guide.posteriors:
            posterior.loc.copy_(torch.linspace(-2.0, 0.0, len(posterior.loc)))
            posterior.log_scale.fill_(-0.5)
    return guide


@pytest.fixture
def classifier(empty_store):
    model = bmrs.Classifier(network())
    return model, spread(bmrs.AutoTruncatedLogNormal(model), X, Y)


@pytest.fixture
def regressor(empty_store):
    model = bmrs.Regressor(network(outputs=1), lambda output: output[:, 0])
    return model, spread(bmrs.AutoTruncatedLogNormal(model), X, X[:, 0])


def test_readme_network_is_right_at_the_mean_and_not_from_the_prior():
    digits = bmrs.load_data("digits")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), bmrs.MultiplicativeNoise(100), nn.Linear(100, 10)
    )
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, digits.train, digits.validation, epochs=15, batch_size=32, learning_rate=3e-3,
        posterior_learning_rate=0.02, kl_weight=3, progress=False,
    )  # fmt: skip
    x, y = digits.test[:]
    found = bmrs.predict(model, guide, x)
    assert found.shape == (len(x), 10)
    assert float((found.argmax(1) == y).float().mean()) > 0.9
    assert float((bmrs.predict(model, guide, digits.test, draws=20).argmax(1) == y).float().mean()) > 0.9
    with pytest.warns(UserWarning, match=r"pyro_bmrs\.predict\(model, guide, x\)"), torch.no_grad():
        drawn = model.predict(x)
    assert float((drawn.argmax(1) == y).float().mean()) < 0.8


def test_probabilities_of_a_classifier_at_the_mean(classifier):
    model, guide = classifier
    with fixed_scales(model.net, guide.mean()), torch.no_grad():
        expected = model.predict(X).softmax(1)
    found = predict(model, guide, X)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_draws_average_probabilities_as_the_diagnosis_does(classifier):
    model, guide = classifier
    found = predict(model, guide, X, draws=30, seed=5)
    with pyro.poutine.block():
        torch.manual_seed(5)
        drawn = torch.stack([guide(X, Y)["2"] for _ in range(30)]).detach()
    expected = predictions(model, (X, Y), {"2": drawn}).probability
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert not torch.allclose(found, predict(model, guide, X))
    assert torch.equal(found, predict(model, guide, X, draws=30, seed=5))
    assert not torch.equal(found, predict(model, guide, X, draws=30, seed=6))


def test_the_mean_of_a_regressor(regressor):
    model, guide = regressor
    with fixed_scales(model.net, guide.mean()), torch.no_grad():
        expected = model.net(X)[:, 0]
    torch.testing.assert_close(predict(model, guide, X), expected)
    assert predict(model, guide, X, draws=10).shape == (50,)


class Inputs(Dataset):
    """Inputs alone, without labels."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index]


@pytest.mark.parametrize(
    "source",
    [
        X, (X,), TensorDataset(X, Y), TensorDataset(X), Inputs(), DataLoader(Inputs(), 9),
        DataLoader(TensorDataset(X, Y), 9),
    ],
    ids=["tensor", "arguments", "pairs", "singles", "dataset", "loader", "loader of pairs"],
)  # fmt: skip
@pytest.mark.parametrize("draws", [None, 3])
def test_every_kind_of_data_in_batches_gives_the_same(classifier, source, draws):
    model, guide = classifier
    expected = predict(model, guide, X, draws=draws)
    torch.testing.assert_close(predict(model, guide, source, draws=draws, batch_size=20), expected)


def test_numbers_of_numpy(classifier):
    model, guide = classifier
    whole = {"draws": 3, "batch_size": 20, "seed": 5}
    for source in (X, Inputs()):
        found = predict(model, guide, source, **{name: np.int64(value) for name, value in whole.items()})
        assert torch.equal(found, predict(model, guide, source, **whole))


def test_dimension_of_classes_and_half_precision(empty_store):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(x).unsqueeze(1).expand(-1, 5, -1).half()

    model = bmrs.Classifier(Tokens(), class_dim=-1)
    guide = spread(bmrs.AutoTruncatedLogNormal(model), X, Y.unsqueeze(1).expand(-1, 5))
    found = predict(model, guide, X)
    assert found.shape == (50, 5, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(50, 5))


def test_without_latents_no_guide_is_needed(classifier):
    model, guide = classifier
    small = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5)).apply()
    with torch.no_grad():
        logits = small.eval()(X)
    torch.testing.assert_close(predict(bmrs.Classifier(small), None, X), logits.softmax(1))
    torch.testing.assert_close(predict(small, None, X), logits)


def test_a_guide_of_another_model_is_refused(classifier):
    model, guide = classifier
    torch.testing.assert_close(predict(model.net, guide, X).softmax(1), predict(model, guide, X))
    small = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5)).apply()
    laplace = bmrs.AutoKroneckerLaplace(bmrs.Classifier(small))
    bmrs.fit(laplace.model, laplace, (X, Y), progress=False)
    predict(laplace.model, laplace, X)
    for plain, of_another, latent in (
        (small, guide, "'2'"), (bmrs.Classifier(small), guide, "'2'"), (small, laplace, "'0.weight'"),
    ):  # fmt: skip
        message = rf"guide must be one of this model, or None: {type(plain).__name__} has none of .*{latent}"
        for draws in (None, 2):
            with pytest.raises(ValueError, match=message):
                predict(plain, of_another, X, draws=draws)


def test_inputs_by_keyword(empty_store):
    class Sum(nn.Module):
        def forward(self, first, second):
            return first + 2 * second

    given = {"first": X, "second": X}
    torch.testing.assert_close(predict(Sum(), None, given, batch_size=20), 3 * X)
    torch.testing.assert_close(predict(bmrs.Regressor(Sum()), None, (X, X), batch_size=20), 3 * X)


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0], 1.0), obs=y)
    return slope * x[:, 0]


def test_any_model_is_averaged_over_draws(empty_store):
    guide = AutoNormal(line, init_scale=0.01, init_loc_fn=lambda site: torch.tensor(3.0))
    guide(X, X[:, 0])
    found = predict(line, guide, X, draws=50)
    torch.testing.assert_close(found, 3 * X[:, 0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(predict(line, guide, X, draws=50, batch_size=7), found)


def test_a_model_and_a_guide_that_must_be_given_what_is_observed(empty_store):
    def model(x, y):
        return line(x, y)

    def guide(x, y):
        pyro.sample("slope", dist.Delta(torch.tensor(2.0)))

    torch.testing.assert_close(predict(model, guide, X), 2 * X[:, 0])


class Mixed(nn.Module):
    """Noise beside another latent."""

    def __init__(self):
        super().__init__()
        self.net = network(outputs=1)
        bmrs.name_sites(self.net)

    def forward(self, x, y=None):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        mean = self.net(x)[:, 0] + shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        return mean


def mixed():
    model = Mixed()
    guide = AutoGuideList(model)
    guide.append(bmrs.AutoTruncatedLogNormal(pyro.poutine.block(model, expose=["2"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["shift"]), init_scale=0.1))
    guide(X, X[:, 0])
    spread(guide[0], X, X[:, 0])
    return model, guide


def test_latents_without_a_known_mean_take_one_draw(own_parameters):
    model, guide = mixed()
    point = posterior_point(guide, X, X[:, 0])
    torch.testing.assert_close(point["2"], guide[0].mean()["2"])
    assert point["shift"] != posterior_point(guide, X, X[:, 0])["shift"]
    assert posterior_point(guide, X, X[:, 0], without=["shift"]).keys() == {"2"}
    assert torch.equal(predict(model, guide, X), predict(model, guide, X, batch_size=25))


def test_latents_of_single_examples_need_one_batch(own_parameters):
    def model(x, y=None):
        with pyro.plate("points", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x[:, 0] + shift, 1.0), obs=y)
        return x[:, 0] + shift

    def guide(x, y=None):
        with pyro.plate("points", len(x)):
            pyro.sample("shift", dist.Normal(1.0, 1e-3))

    torch.testing.assert_close(predict(model, guide, X), X[:, 0] + 1, atol=0.01, rtol=0)
    with pytest.raises(
        ValueError, match=r"x must be a single batch .* such as \['shift'\]: pass a larger batch_size"
    ):
        predict(model, guide, X, batch_size=25)


def test_the_reduced_posterior_predicts(classifier):
    model, guide = classifier
    plan = bmrs.reduce(model, guide, {"2": bmrs.LogUniform(-20.0, -10.0)}, X, Y)
    assert predict(model, plan.reduced_posterior(), X, draws=5).shape == (50, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": 3}, TypeError, "model must be a Pyro model or a network"),
        ({"guide": 3}, TypeError, "guide must be a Pyro guide or None"),
        ({"guide": None}, ValueError, r"guide must be given for a model with noise layers \['2'\]"),
        (
            {"guide": lambda x: None},
            ValueError,
            r"guide must have a posterior of every noise layer: .* none of \['2'\]",
        ),
        ({"draws": 0}, ValueError, "draws must be an integer of at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"x": "digits"}, TypeError, "x must be a tensor, or hold one"),
        ({"x": X[:0]}, ValueError, "x must not be empty"),
    ],
)
def test_bad_arguments(classifier, change, error, match):
    model, guide = classifier
    arguments = {"model": model, "guide": guide, "x": X, **change}
    with pytest.raises(error, match=match):
        predict(**arguments)


def test_a_guide_without_parameters_and_a_model_without_a_tensor(empty_store):
    model = bmrs.Classifier(network())
    with pytest.raises(RuntimeError, match="guide has no parameters yet"):
        predict(model, bmrs.AutoTruncatedLogNormal(model), X)
    with pytest.raises(TypeError, match="model must return a tensor: got NoneType"):
        predict(lambda x: None, None, X)


# --- from the prior


@pytest.mark.parametrize("inserted", [False, True])
def test_a_call_outside_of_pyro_says_that_it_draws_from_the_prior(inserted):
    net = network()
    if inserted:
        net = bmrs.insert_noise(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), X)
    model = bmrs.Classifier(net)
    for call in (model.predict, net, lambda x: evaluate(model, (x, Y))):
        with pytest.warns(UserWarning, match="each θ is drawn from its prior"):
            call(X)


def test_nothing_of_ours_warns(empty_store):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        net = bmrs.insert_noise(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), X)
        by_hand = bmrs.Classifier(network())
        for model in (bmrs.Classifier(net), by_hand):
            guide = bmrs.AutoTruncatedLogNormal(model)
            for elbo in ("fused", "packed", "pyro"):
                bmrs.fit(model, guide, (X, Y), (X, Y), epochs=1, elbo=elbo, progress=False)
            plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5))
            plan.apply()
            predict(model, guide, X, draws=2)
            evaluate(model, (X, Y), guide.mean())
            bmrs.to_datatree(model, guide, (X, Y), draws=2)
