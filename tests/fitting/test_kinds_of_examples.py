"""Fits with examples of unusual kinds: in other dimensions, mixed, weighted, with labels of all types."""

import pyro
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import pyro_bmrs as bmrs
from pyro_bmrs.inference.evaluate import evaluate

N = 32


def inputs():
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(N) % 3


def layers(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8, dim=-1), nn.Linear(8, classes)
    )


def fitted(net, data=None, **settings):
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    fit = bmrs.fit(
        model, guide, data or (inputs(), LABELS), epochs=1, batch_size=N, progress=False, **settings
    )
    return model, guide, fit


# --- another first dimension --------------------------------------------------------------------------


class Folded(nn.Module):
    """Folds time into the first dimension, as networks do that see each frame by itself."""

    def __init__(self):
        super().__init__()
        self.body = layers()

    def forward(self, x):
        frames = x.unsqueeze(1).expand(-1, 5, -1).flatten(0, 1)
        return self.body(frames).unflatten(0, (-1, 5)).mean(1)


class TimeFirst(Folded):
    """Puts time first, as recurrent layers do."""

    def forward(self, x):
        return self.body(x.unsqueeze(0).expand(5, -1, -1)).mean(0)


class Tokens(Folded):
    """Keeps examples first: this is as it should be."""

    def forward(self, x):
        return self.body(x.unsqueeze(1).expand(-1, 5, -1)).mean(1)


@pytest.mark.parametrize("kind", [Folded, TimeFirst])
@pytest.mark.parametrize("elbo", ["fused", "packed", "pyro"])
def test_several_draws_where_the_noise_does_not_see_examples_first(kind, elbo):
    with pytest.raises(
        ValueError, match=r"input of noise layer 'body.2' must have examples in its first.*for 32 exam"
    ):
        fitted(kind(), elbo=elbo)
    fitted(kind(), elbo=elbo, draws_per_batch=1)


def test_noise_inserted_behind_time_that_comes_first():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):  # (time, examples, 4)
            return self.second(self.first(x).relu()).mean(0)

    x = inputs().unsqueeze(0).expand(5, -1, -1)
    noisy = bmrs.insert_noise(Network(), x)
    loader = DataLoader([(x, LABELS)], batch_size=None)
    with pytest.raises(
        ValueError, match=r"'second' must have examples in its first dimension .*draws_per_batch=1"
    ):
        fitted(noisy, loader)
    fitted(noisy, loader, draws_per_batch=1)


def test_several_draws_where_examples_come_first():
    fitted(Tokens())


# --- examples that depend on each other -------------------------------------------------------------------


class Graph(nn.Module):
    """Nodes of one graph, which pass messages."""

    def __init__(self):
        super().__init__()
        self.body = layers()

    def forward(self, x, adjacency):
        return self.body(adjacency @ x)


class Attends(nn.Module):
    """Each example looks at all others."""

    def __init__(self):
        super().__init__()
        self.body = layers()

    def forward(self, x):
        return self.body((x @ x.mT).softmax(1) @ x)


class Edges(Graph):
    """The same as `Graph`, by a list of edges for all nodes."""

    def forward(self, x, edges):
        return self.body(x.index_add(0, edges[1], x[edges[0]]))


def ring():
    return torch.eye(N).roll(1, 0) + torch.eye(N)


MIXING = {
    "adjacency": lambda: (Graph(), (inputs(), ring())),
    "edges": lambda: (Edges(), (inputs(), torch.stack([torch.arange(N), torch.arange(N).roll(1)]))),
    "attention over the batch": lambda: (Attends(), inputs()),
}


@pytest.mark.parametrize("kind", MIXING)
def test_several_draws_are_refused_where_examples_mix(kind):
    net, x = MIXING[kind]()
    loader = DataLoader([(x, LABELS)], batch_size=None, collate_fn=lambda pair: pair)
    with pytest.raises(
        ValueError, match="draws_per_batch must be 1 for a model whose examples depend on each other: 'y'"
    ):
        fitted(net, loader)
    _, _, fit = fitted(net, loader, draws_per_batch=1)
    assert fit.history.loss.notna().all()


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4), nn.Dropout(0.5)],
)
def test_layers_that_only_normalise_or_drop_are_no_such_thing(layer):
    fitted(nn.Sequential(layer, *layers()))


def test_random_numbers_in_a_forward_pass_are_no_such_thing():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = layers()

        def forward(self, x):
            return self.body(x + torch.randn_like(x))

    fitted(Random())


# --- labels of all types ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("elbo", ["fused", "packed", "pyro"])
def test_labels_of_any_integer_type_are_the_same(dtype, elbo):
    _, _, wanted = fitted(layers(), (inputs(), LABELS), elbo=elbo, validation=(inputs(), LABELS))
    given = (inputs(), LABELS.to(dtype))
    model, guide, found = fitted(layers(), given, elbo=elbo, validation=given)
    for column in ("loss", "validation_loss", "validation_accuracy"):
        assert found.history[column].tolist() == wanted.history[column].tolist()
    assert bmrs.compression_curve(model, bmrs.reduce(model, guide), given).accuracy.notna().all()


@pytest.mark.parametrize("elbo", ["fused", "packed", "pyro"])
def test_true_and_false_are_two_classes(elbo):
    labels = LABELS == 0
    _, _, wanted = fitted(layers(2), (inputs(), labels.long()), elbo=elbo)
    _, _, found = fitted(layers(2), (inputs(), labels), elbo=elbo, validation=(inputs(), labels))
    assert found.history.loss.tolist() == wanted.history.loss.tolist()
    assert found.history.validation_accuracy.notna().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_byte_is_never_a_label_to_ignore(dtype):
    """156 is -100 modulo 256."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.full((20,), 156)
    model = bmrs.Classifier(nn.Linear(4, 200))
    wanted = float(cross_entropy(model.net(x), y))
    assert evaluate(model, (x, y.to(dtype))).loss == pytest.approx(wanted, rel=1e-5)
    fit = bmrs.fit(model, None, (x, y.to(dtype)), epochs=1, learning_rate=0.0, progress=False)
    assert float(fit.history.loss.iloc[0]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (LABELS.float(), "y must hold numbers of classes, integers: got torch.float32"),
        (torch.eye(3)[LABELS], "y must hold numbers of classes, integers: got torch.float32"),
        (
            torch.eye(3, dtype=torch.long)[LABELS],
            r"y must have shape \(32,\) for logits of shape \(32, 3\).*\(32, 3\)",
        ),
        (LABELS.cfloat(), "y must hold numbers of classes, integers: got torch.complex64"),
        (LABELS.unsqueeze(1), r"y must have shape \(32,\) for logits of shape"),
    ],
)
@pytest.mark.parametrize("elbo", ["fused", "packed"])
def test_labels_of_another_kind_are_refused_in_one_line(labels, match, elbo):
    with pytest.raises(ValueError, match=match) as error:
        fitted(layers(), (inputs(), labels), elbo=elbo)
    assert "\n" not in str(error.value)


# --- weights of classes and of examples -----------------------------------------------------------------------


WEIGHTS = torch.tensor([0.5, 2.0, 1.0])
OWN = torch.linspace(0.0, 2.0, N)


def brute_force(net, labels, each):
    with torch.no_grad():
        return float((cross_entropy(net(inputs()), labels, reduction="none") * each).sum() / N)


@pytest.mark.parametrize("kind", ["classes", "examples", "both"])
def test_weights_count_as_often(kind):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    of_class = kind != "examples"
    model = bmrs.Classifier(net, weights=WEIGHTS if of_class else None)
    y = LABELS if kind == "classes" else (LABELS, OWN)
    each = (WEIGHTS[LABELS] if of_class else 1.0) * (1.0 if kind == "classes" else OWN)
    wanted = brute_force(net, LABELS, each)
    assert evaluate(model, (inputs(), y)).loss == pytest.approx(wanted, rel=1e-5)
    assert evaluate(model, (inputs(), y), batch_size=5).loss == pytest.approx(wanted, rel=1e-5)
    for elbo in ("fused", "pyro"):
        fit = bmrs.fit(model, None, (inputs(), y), epochs=1, learning_rate=0.0, elbo=elbo, progress=False)
        assert float(fit.history.loss.iloc[0]) == pytest.approx(wanted, rel=1e-5)
    # a model for the whole data set says the same
    whole = bmrs.Classifier(net, weights=WEIGHTS if of_class else None, dataset_size=N)
    assert evaluate(whole, (inputs(), y), batch_size=8).loss == pytest.approx(wanted, rel=1e-5)
    fit = bmrs.fit(
        whole, None, (inputs(), y), epochs=1, batch_size=8, learning_rate=0.0, elbo="pyro", progress=False
    )
    assert float(fit.history.loss.iloc[0]) == pytest.approx(wanted, rel=1e-5)


def test_a_weight_of_two_is_an_example_twice():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    twice = torch.cat([inputs(), inputs()[:8]]), torch.cat([LABELS, LABELS[:8]])
    weights = torch.ones(N)
    weights[:8] = 2.0
    model = bmrs.Classifier(net)
    once = evaluate(model, (inputs(), (LABELS, weights))).loss * N
    assert once == pytest.approx(evaluate(model, twice).loss * (N + 8), rel=1e-5)


def test_weights_of_a_regression():
    torch.manual_seed(0)
    net, y = nn.Linear(4, 2), torch.randn(N, 2)
    model = bmrs.Regressor(net, scale=0.5)
    with torch.no_grad():
        each = torch.distributions.Normal(net(inputs()), 0.5).log_prob(y).sum(1)
    wanted = -float((each * OWN).sum() / N)
    assert evaluate(model, (inputs(), (y, OWN))).loss == pytest.approx(wanted, rel=1e-5)
    fit = bmrs.fit(
        model, None, (inputs(), (y, OWN)), epochs=1, learning_rate=0.0, batch_size=8, progress=False
    )
    assert float(fit.history.loss.iloc[0]) == pytest.approx(wanted, rel=1e-5)


class Weighted(nn.Module):
    """A model of one's own that weighs examples by `poutine.scale`."""

    def __init__(self, size=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.size = nn.Linear(4, 3), size

    def forward(self, x, y):
        labels, weights = y
        size = self.size or len(x)
        chosen = None if size == len(x) else torch.arange(len(x))
        with pyro.plate("data", size, subsample=chosen), pyro.poutine.scale(scale=weights):
            pyro.sample("y", pyro.distributions.Categorical(logits=self.net(x)), obs=labels)


@pytest.mark.parametrize("size", [None, N])
def test_scale_by_example_in_a_model_of_ones_own(size):
    model = Weighted(size)
    wanted = brute_force(model.net, LABELS, OWN + 0.1)
    data = inputs(), (LABELS, OWN + 0.1)
    assert evaluate(model, data, batch_size=8).loss == pytest.approx(wanted, rel=1e-5)
    fit = bmrs.fit(model, None, data, data, epochs=1, learning_rate=0.0, batch_size=8, progress=False)
    assert float(fit.history.loss.iloc[0]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_weights_in_checks_and_report_tables():
    model, guide, _ = fitted(layers(), (inputs(), (LABELS, OWN)))
    data = inputs(), (LABELS, OWN)
    tree = bmrs.to_datatree(model, guide, data, draws=20, batch_size=5)
    unweighted = torch.as_tensor(tree.log_likelihood.y.to_numpy()[0])
    total = torch.as_tensor((tree.sample_stats.log_p - tree.log_prior["2"].sum("2_unit")).to_numpy()[0])
    torch.testing.assert_close(total, (unweighted * OWN).sum(1).double(), rtol=1e-5, atol=1e-4)
    checks = bmrs.check_posterior(model, guide, data, draws=100)
    assert checks.elbo.elbo.notna().all()
    plan = bmrs.reduce(model, guide)
    assert bmrs.diagnose(model, guide, plan, data, data, draws=100).quality is not None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: bmrs.Classifier(nn.Linear(4, 3), weights=[1.0, 2.0]),
            r"weights must be a tensor of shape \(classes,\)",
        ),
        (
            lambda: evaluate(bmrs.Classifier(nn.Linear(4, 3)), (inputs(), (LABELS, OWN - 1))),
            "weights must be not negative: got -1.0",
        ),
        (
            lambda: bmrs.Classifier(nn.Linear(4, 3), weights=-WEIGHTS),
            "weights must be finite and not negative",
        ),
        (
            lambda: evaluate(bmrs.Classifier(nn.Linear(4, 3), weights=WEIGHTS[:2]), (inputs(), LABELS)),
            r"weights must be of shape \(3,\)",
        ),
        (
            lambda: evaluate(bmrs.Classifier(nn.Linear(4, 3)), (inputs(), (LABELS, torch.ones(N, 4)))),
            r"weights must be of shape \(32,\).*\(32, 4\)",
        ),
    ],
)
def test_bad_weights(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


# --- parts of the likelihood that belong to no example ---------------------------------------------------------


class Belief(nn.Module):
    """Has a factor outside of the plate of its examples."""

    def __init__(self, size=None, inside=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.size, self.inside = nn.Linear(4, 3), size, inside

    def forward(self, x, y):
        size = self.size or len(x)
        chosen = None if size == len(x) else torch.arange(len(x))
        decay = -(self.net.weight**2).sum()
        with pyro.plate("data", size, subsample=chosen):
            pyro.sample("y", pyro.distributions.Categorical(logits=self.net(x)), obs=y)
            if self.inside:
                pyro.factor("decay", (decay / N).expand(len(x)))
        if not self.inside:
            pyro.factor("decay", decay)


def test_a_factor_outside_of_the_plate_counts_once_or_is_refused():
    data = inputs(), LABELS
    model = Belief()
    wanted = brute_force(model.net, LABELS, 1.0) + float((model.net.weight**2).sum()) / N

    def loss(model, size):
        fit = bmrs.fit(model, None, data, epochs=1, learning_rate=0.0, batch_size=size, progress=False)
        return float(fit.history.loss.iloc[0])

    assert loss(model, N) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(
        ValueError, match=r"model must not have \['decay'\] outside of the plate of its examples.*N = 32"
    ):
        loss(model, 8)
    assert loss(Belief(size=N), 8) == pytest.approx(wanted, rel=1e-5)
    assert loss(Belief(inside=True), 8) == pytest.approx(wanted, rel=1e-5)
    # the loss of validation data is of the data alone
    assert evaluate(Belief(size=N), data, batch_size=8).loss == pytest.approx(
        brute_force(model.net, LABELS, 1.0), rel=1e-5
    )


# --- weights that are computed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_weights_that_are_computed_are_refused_before_the_first_step(compute):
    """Noise by hand in front of such a layer could not be folded into it after the fit."""
    net = layers()
    compute(net[3])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"3.*remove"):
        fitted(net)
    assert all(
        torch.equal(value, before[name])
        for name, value in net.state_dict().items()
        if name.endswith("original")
    )
