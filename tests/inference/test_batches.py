"""Batches of whatever people have, and how many examples they hold."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

import pyro_bmrs as bmrs
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.inference.examples import Counting
from pyro_bmrs.inference.sites import read_sites

CPU = torch.device("cpu")
N = 48


def inputs():
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, classes))


class Boxes(nn.Module):
    """Observes a label and a box of each example."""

    def __init__(self, find=lambda y: (y[0], y[1])):
        super().__init__()
        self.net, self.find = network(7), find

    def forward(self, x, y):
        out = self.net(x)
        label, box = self.find(y)
        with pyro.plate("data", len(out)):
            pyro.sample("label", pyro.distributions.Categorical(logits=out[:, :3]), obs=label)
            pyro.sample("box", pyro.distributions.Normal(out[:, 3:], 1.0).to_event(1), obs=box)
        return out


def first_losses(model, data, **settings):
    """The loss of a first step from the same start, and the history."""
    bmrs.name_sites(model)
    guide = bmrs.AutoTruncatedLogNormal(model)
    fit = bmrs.fit(
        model,
        guide,
        data,
        epochs=1,
        learning_rate=0.0,
        posterior_learning_rate=0.0,
        progress=False,
        **settings,
    )
    return fit.history


LABEL, BOX = torch.arange(N) % 3, torch.zeros(N, 4)
TARGETS = {
    "a tuple": ((LABEL, BOX), lambda y: (y[0], y[1])),
    "a mapping": ({"label": LABEL, "box": BOX}, lambda y: (y["label"], y["box"])),
    "a tuple in a mapping": ({"all": (LABEL, BOX)}, lambda y: y["all"]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_of_several_tensors_count_examples_and_not_parts(kind):
    y, find = TARGETS[kind]
    x = inputs()
    one = Boxes(find)
    bmrs.name_sites(one)
    with torch.no_grad():
        trace = poutine.trace(pyro.poutine.condition(one, data={"net.2": torch.ones(8)})).get_trace(x, y)
    exact = -float(trace.log_prob_sum(lambda name, site: name in ("label", "box"))) / N
    histories = [
        first_losses(Boxes(find), (x, y), batch_size=size, kl_weight=0.0, validation=(x, y))
        for size in (N, 16, 6)
    ]
    for history in histories:
        # noise at its start is within e^-5 of 1
        assert float(history.validation_loss.iloc[0]) == pytest.approx(exact, rel=0.01)
        assert float(-history.log_likelihood.iloc[0]) == pytest.approx(exact, rel=0.01)
    # the KL per example does not depend on the batch size
    weighted = [
        first_losses(Boxes(find), (x, y), batch_size=size, kl_weight=9.0, warm_up=0.0) for size in (N, 6)
    ]
    kl = [float((h.loss + h.log_likelihood).iloc[0]) for h in weighted]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)
    assert kl[0] == pytest.approx(9.0 * float(weighted[0].kl.iloc[0]) / N, rel=1e-4)


def test_targets_of_a_data_set_that_gives_tuples():
    class Pairs(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return inputs()[index], (LABEL[index], BOX[index])

    batches = Batches(Pairs(), 32, CPU, "train")
    x, y = batches.first()
    assert batches.size == N
    assert batches.count(x, y) == 32
    assert [batches.count(*pair) for pair in batches] == [32, 16]


# --- where nothing but the model tells ------------------------------------------------------------------


class Sequences(nn.Module):
    """Reads (time, examples, 4), and observes one label an example."""

    def __init__(self, plate=True):
        super().__init__()
        self.net, self.plate = network(), plate

    def forward(self, x, y):
        logits = self.net(x.mean(0))
        law = pyro.distributions.Categorical(logits=logits)
        if self.plate:
            with pyro.plate("data", len(logits)):
                pyro.sample("y", law, obs=y)
        else:
            pyro.sample("y", law.to_event(1), obs=y)
        return logits


def time_first(batch):
    """Examples as (time, examples, 4)."""
    return torch.stack([x for x, _ in batch]).unsqueeze(0).expand(5, -1, -1), torch.stack(
        [y for _, y in batch]
    )


def test_time_that_comes_first_is_not_counted_where_the_model_has_a_data_plate():
    loader = DataLoader(TensorDataset(inputs(), LABEL), batch_size=16, collate_fn=time_first)
    history = first_losses(Sequences(), loader, kl_weight=9.0, warm_up=0.0, draws_per_batch=4)
    kl = float((history.loss + history.log_likelihood).iloc[0])
    assert kl == pytest.approx(9.0 * float(history.kl.iloc[0]) / N, rel=1e-4)
    assert float(-history.log_likelihood.iloc[0]) == pytest.approx(math.log(3), abs=0.3)


def test_without_a_data_plate_it_is_refused_by_name():
    loader = DataLoader(TensorDataset(inputs(), LABEL), batch_size=16, collate_fn=time_first)
    with pytest.raises(
        ValueError, match=r"train must give batches whose number of examples is known: got y: 16, x: 5"
    ):
        first_losses(Sequences(plate=False), loader)


def test_lists_of_examples_of_any_shape_count_their_entries():
    def model(x, y):
        with pyro.plate("data", len(y)):
            pyro.sample(
                "y",
                pyro.distributions.Normal(torch.zeros(len(y)), 1.0),
                obs=torch.stack([b.sum() for b in y]),
            )

    x, y = torch.zeros(3, 4), [torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(1, 4)]
    count = Counting("train")
    count.settle(x, y, poutine.trace(model).get_trace(x, y))
    assert count(x, y) == 3


# --- N of data sets and loaders -----------------------------------------------------------------------------


def whole_batches(sizes=(16, 16, 16)):
    x, y = inputs(), LABEL
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


class ByList(Dataset):
    """Takes a list of indices, as data sets do that read from a store."""

    def __len__(self):
        return N

    def __getitem__(self, indices):
        return inputs()[indices], LABEL[indices]


LOADERS = {
    "whole batches": lambda: DataLoader(whole_batches(), batch_size=None),
    "unequal batches": lambda: DataLoader(whole_batches((20, 20, 8)), batch_size=None),
    "a batch sampler as the sampler": lambda: DataLoader(
        ByList(), sampler=BatchSampler(RandomSampler(range(N)), 16, drop_last=False), batch_size=None
    ),
    "its own batches": lambda: DataLoader(TensorDataset(inputs(), LABEL), batch_size=16),
    "a batch sampler": lambda: DataLoader(
        TensorDataset(inputs(), LABEL),
        batch_sampler=BatchSampler(SequentialSampler(range(N)), 16, drop_last=False),
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_n_is_the_number_of_examples_however_a_loader_makes_its_batches(kind):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert Batches(LOADERS[kind](), 1, CPU, "train").size == N
    assert torch.equal(torch.get_rng_state(), before)
    history = first_losses(bmrs.Classifier(network()), LOADERS[kind](), kl_weight=9.0, warm_up=0.0)
    kl = float((history.loss + history.log_likelihood).iloc[0])
    assert kl == pytest.approx(9.0 * float(history.kl.iloc[0]) / N, rel=1e-4)


def test_batches_of_a_loader_that_loses_examples_are_refused_after_the_first_epoch():
    loader = DataLoader(
        TensorDataset(inputs(), LABEL), batch_size=16,
        collate_fn=lambda pairs: tuple(torch.stack(part) for part in zip(*pairs[:-1], strict=True)),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"train must give as many examples in an epoch as its sampler says, 48: it gives 45"
    ):
        first_losses(bmrs.Classifier(network()), loader)


def test_examples_that_a_loader_drops_by_its_own_rule_are_none_that_are_missing():
    loader = DataLoader(TensorDataset(inputs(), LABEL), batch_size=20, drop_last=True)
    assert len(first_losses(bmrs.Classifier(network()), loader)) == 1


# --- several inputs -------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, a, b):
        return self.net(a + b)


def as_data_set(x):
    class Pairs(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return tuple(part[index] for part in x), LABEL[index]

    return Pairs()


@pytest.mark.parametrize("kind", ["tensors", "mapping", "data set", "loader"])
def test_a_network_of_two_inputs_is_fitted_from_any_of_them(kind):
    x = (inputs(), inputs())
    data = {
        "tensors": (x, LABEL),
        "mapping": ({"a": x[0], "b": x[1]}, LABEL),
        "data set": as_data_set(x),
        "loader": DataLoader(as_data_set(x), batch_size=16),
    }[kind]
    model = bmrs.Classifier(TwoInputs())
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, data, data, epochs=1, batch_size=16, progress=False)
    tree = bmrs.to_datatree(model, guide, data, draws=5)
    assert tree.log_likelihood.y.shape == (1, 5, N)
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5))
    assert plan.apply().net[3].in_features == 4


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            TensorDataset(inputs(), inputs(), LABEL),
            r"train must give batches \(x, y\): got 3 parts. .*\(\(x1, x2\), y\)",
        ),
        ((inputs(), LABEL[:5]), "train must have as many labels as examples: got 48 and 5"),
        (
            ((inputs(), inputs()[:7]), LABEL),
            "train must have as many labels as examples: got 48 and 7 and 48",
        ),
        (
            (inputs().numpy(), LABEL.numpy()),
            r"train must be \(x, y\) tensors.*: got a tuple of ndarray, ndarray",
        ),
        ({"x": inputs(), "y": LABEL}, r"train must be \(x, y\) tensors, .*: got dict"),
        (inputs(), r"train must be \(x, y\) tensors, .*: got Tensor"),
    ],
)
def test_data_of_another_kind_are_refused(data, match):
    with pytest.raises((TypeError, ValueError), match=match):
        first_losses(bmrs.Classifier(network()), data)


# --- what a program's sites are --------------------------------------------------------------------------


def test_sites_of_all_kinds():
    def model(y):
        level = pyro.sample("level", pyro.distributions.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * level)
        pyro.factor("belief", -level)
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            own = pyro.sample("own", pyro.distributions.Normal(0.0, 1.0))
            mask = torch.tensor([True, True, False, True])
            pyro.sample("y", pyro.distributions.Normal(level + own, 1.0), obs=y, obs_mask=mask)
        pyro.sample("helper", pyro.distributions.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    sites = read_sites(poutine.trace(model).get_trace(torch.zeros(4)))
    assert list(sites.latent) == ["level", "own", "y_unobserved"]
    assert list(sites.observed) == ["y_observed"]
    assert list(sites.factors) == ["belief"]
    assert list(sites.deterministic) == ["twice", "y"]
    assert list(sites.auxiliary) == ["helper"]
    assert list(sites.plates) == ["data"]
    assert sites.shared_plates() == {"data": 4}
    assert sites.local(4) == {"own", "y_unobserved"}
    assert sites.whole(4) == {"belief"}
