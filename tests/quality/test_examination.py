"""A diagnosis is what its parts say when they are asked one by one; what can't be told is noted, not guessed."""

import copy
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from diagnosed import make_plan
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, Regressor
from pyro_bmrs.checks.data import some_of
from pyro_bmrs.checks.posterior import check_posterior
from pyro_bmrs.quality import Diagnosis, compression_curve, criterion_curves, diagnose, examination
from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage
from pyro_bmrs.quality.curves import COMPARED
from pyro_bmrs.quality.diagnosis import PARTS
from pyro_bmrs.quality.examination import PREDICTIVE_DRAWS
from pyro_bmrs.quality.predictive import predictions
from pyro_bmrs.quality.regression import regression_quality
from pyro_bmrs.reports import report

DRAWS, SEED, EXAMPLES = 100, 3, 50


def data(examples, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long() * (classes > 2)


class HalfDead(AutoTruncatedLogNormal):
    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        for posterior in self.posteriors:
            posterior.loc.data[1::2] = -19.0
            posterior.log_scale.data[1::2] = 0.0


def network(outputs=3):
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), MultiplicativeNoise(8), nn.Linear(8, 6),
        nn.Tanh(), MultiplicativeNoise(6), nn.Linear(6, outputs),
    )  # fmt: skip


def fit(model, guide, train, **options):
    settings = dict(epochs=15, batch_size=20, learning_rate=0.02, warm_up=0.1, progress=False)
    bmrs.fit(model, guide, train, **{**settings, **options})


@pytest.fixture(scope="module")
def fitted():
    """A small classifier as it was reduced, the small network fine-tuned, and all data; to be left as it is."""
    torch.manual_seed(0)
    model = Classifier(network())
    guide = HalfDead(model)
    train, validation, test = data(80, 0), data(40, 1), data(60, 2)
    fit(model, guide, train)
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    tuned = Classifier(plan.apply())
    fit(tuned, None, train, epochs=3)
    foreign = {"far away": 6 + torch.rand(30, 4)}
    return SimpleNamespace(
        model=model, guide=guide, plan=plan, train=train, validation=validation, test=test, tuned=tuned,
        foreign=foreign,
    )  # fmt: skip


def look(given, **changes):
    options = dict(
        train=given.train, test=given.test, validation=given.validation, fine_tuned=given.tuned,
        out_of_distribution=given.foreign, draws=DRAWS, seed=SEED, examples=EXAMPLES,
    )  # fmt: skip
    options |= changes
    return diagnose(
        given.model, given.guide, given.plan, options.pop("train"), options.pop("test"), **options
    )


@pytest.fixture(scope="module")
def found(fitted):
    return look(fitted)


def drawn(given, draws=PREDICTIVE_DRAWS, seed=SEED):
    """θ by site as a seed gives them. Shape of each: (draws, features)."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        values = [given.guide(*given.test) for _ in range(draws)]
    return {site: torch.stack([value[site] for value in values]) for site in values[0]}


def same(one, other):
    pd.testing.assert_frame_equal(
        one.reset_index(drop=True), other.reset_index(drop=True), rtol=1e-12, atol=0
    )


# --- against its parts ---------------------------------------------------------------------------------


def test_the_posterior_is_checked_as_by_hand(fitted, found):
    chosen = [place * 80 // EXAMPLES for place in range(EXAMPLES)]  # evenly spread
    some = fitted.train[0][chosen], fitted.train[1][chosen]
    checks = check_posterior(
        fitted.model, fitted.guide, some, draws=DRAWS, seed=SEED, kl_weight=1.0, dataset_size=80
    )
    same(found.khat, checks.khat)
    same(found.contraction, checks.contraction)
    assert found.elbo.model.tolist() == ["model"]
    same(found.elbo.drop(columns="model"), checks.elbo)
    assert found.facts == dict(
        draws=DRAWS, seed=SEED, examples=EXAMPLES, dataset_size=80, kl_weight=1.0,
        out_of_distribution="far away", curves_of="validation", predictive_draws=PREDICTIVE_DRAWS,
    )  # fmt: skip
    assert found.parts == PARTS
    assert not found.missing()


def test_predictions_are_as_by_hand(fitted, found):
    removed = {
        layer: torch.tensor([unit not in kept for unit in range(len(fitted.guide.posterior()[layer].loc))])
        for layer, kept in fitted.plan.kept.items()
    }
    assert all(mask.any() and not mask.all() for mask in removed.values())
    draws, mean = drawn(fitted), fitted.guide.mean()
    zero = {site: value.masked_fill(removed[site], 0.0) for site, value in mean.items()}
    # removed by its readers: whatever a removed structure is, they do not see it
    blind = copy.deepcopy(fitted.model)
    layers = list(blind.net)
    for site, mask in removed.items():
        layers[int(site) + 1].weight.data[:, mask] = 0.0
    expected = {
        ("full", "draws"): (fitted.model, draws),
        ("full", "E[θ]"): (fitted.model, mean),
        ("reduced", "draws"): (blind, draws),
        ("reduced", "E[θ]"): (fitted.model, zero),
        ("fine-tuned", "E[θ]"): (fitted.tuned, {}),
    }
    texts = ["network", "prediction"]
    assert list(found.quality[texts].itertuples(index=False, name=None)) == list(expected)
    (elsewhere,) = fitted.foreign.values()
    unlabelled = elsewhere, torch.full((len(elsewhere),), -1)
    for (names, (program, scales)), row in zip(
        expected.items(), found.quality.to_dict("records"), strict=True
    ):
        inside = predictions(program, fitted.test, scales)
        outside = predictions(program, unlabelled, scales)
        for name, value in quality(inside, outside).items():
            assert row[name] == pytest.approx(value, rel=1e-6), (names, name)
        for table, function in ((found.reliability, reliability), (found.risk_coverage, risk_coverage)):
            chosen = (table.network == names[0]) & (table.prediction == names[1])
            rows = table[chosen].drop(columns=texts).reset_index(drop=True)
            pd.testing.assert_frame_equal(rows, function(inside), rtol=1e-5)
        if names == ("reduced", "draws"):
            for kind, seen in (("test", inside), ("far away", outside)):
                entropy = found.entropy.entropy[found.entropy.data == kind].to_numpy()
                assert entropy == pytest.approx(seen.entropy, rel=1e-6)
    assert found.entropy.data.unique().tolist() == ["test", "far away"]
    # the networks do differ, or nothing of this would be seen
    assert found.quality.negative_log_likelihood.nunique() == 5


@pytest.mark.slow
def test_by_draws_what_was_removed_is_at_0_and_nothing_is_there_that_was_not_given(fitted, monkeypatch):
    seen = []

    def watched(program, inputs, scales, **options):
        seen.append(scales)
        return predictions(program, inputs, scales, **options)

    monkeypatch.setattr(examination, "predictions", watched)
    found = look(fitted, out_of_distribution=None, fine_tuned=None, criteria={})
    full, _, reduced, mean = seen
    for layer, kept in fitted.plan.kept.items():
        gone = [unit for unit in range(full[layer].shape[1]) if unit not in kept]
        assert (reduced[layer][:, gone] == 0).all()
        assert (mean[layer][gone] == 0).all()
        assert (full[layer][:, gone] > 0).all()
        assert torch.equal(reduced[layer][:, kept], full[layer][:, kept])
        assert full[layer].shape[0] == PREDICTIVE_DRAWS
    assert found.quality.network.tolist() == ["full", "full", "reduced", "reduced"]
    assert found.quality.out_of_distribution_auroc.isna().all()
    assert found.entropy.data.unique().tolist() == ["test"]
    assert found.facts["out_of_distribution"] is None
    assert found.curves.criterion.unique().tolist() == ["BMRS_N (this plan)"]


@pytest.mark.slow
def test_the_curves_are_those_of_the_criteria(fitted, found):
    names = found.curves.criterion.unique().tolist()
    assert names == ["BMRS_N (this plan)", *(name for name in COMPARED if name != "BMRS_N")]
    for name in names:
        plan = fitted.plan
        if name in COMPARED:
            plan = bmrs.reduce(fitted.model, fitted.guide, COMPARED[name])
        expected = compression_curve(fitted.model, plan, fitted.validation, points=8)
        if name == "random":  # it stops nowhere by itself
            expected["is_plan"] = False
        same(found.curves[found.curves.criterion == name].drop(columns="criterion"), expected)
    without = look(fitted, validation=None, criteria={"one": bmrs.SNR(threshold=2.0)})
    assert without.curves.criterion.unique().tolist() == ["BMRS_N (this plan)", "one"]
    own = without.curves[without.curves.criterion == "BMRS_N (this plan)"].drop(columns="criterion")
    same(own, compression_curve(fitted.model, fitted.plan, fitted.test, points=8))
    alone = criterion_curves(fitted.model, fitted.guide, fitted.plan, fitted.test, {}, points=8)
    same(alone.drop(columns="criterion"), own)


def test_the_plans_floors_and_multiples_hold_for_the_other_criteria_too(fitted):
    plan = bmrs.reduce(fitted.model, fitted.guide, bmrs.BMRS_N(), min_kept=3, round_to=2)
    curves = criterion_curves(fitted.model, fitted.guide, plan, fitted.test, {"SNR": bmrs.SNR()})
    least = curves.groupby("criterion").parameters_removed.max()
    other = bmrs.reduce(fitted.model, fitted.guide, bmrs.SNR(), min_kept=3, round_to=2)
    expected = 1 - other.at(-math.inf).parameters_left() / other.parameters_before()
    assert least["SNR"] == pytest.approx(expected)
    assert least["SNR"] == least.iloc[0]


@pytest.mark.slow
def test_a_network_that_shrank_in_the_fit_is_not_called_full(empty_store, tmp_path):
    model, train = Classifier(network()), data(30, 0)
    guide = HalfDead(model)
    guide(*train)
    bmrs.reduce(model, guide, bmrs.BMRS_N()).shrink(model, guide)
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    found = diagnose(model, guide, plan, train, train, draws=DRAWS, criteria={})
    assert found.quality.network.tolist() == ["shrunk in the fit"] * 2 + ["reduced"] * 2
    # numbered as the original network numbers them
    assert found.contraction[found.contraction.site == "4"].unit.tolist() == [0, 2, 4, 6]
    page = report(None, plan, tmp_path / "report.html", diagnosis=found).read_text()
    assert page.count("removed in the fit") >= plan.table.removed_in_fit.sum() == 7


def test_what_is_far_away_is_told_apart(found):
    assert found.quality.out_of_distribution_auroc.between(0, 1).all()
    assert found.quality.out_of_distribution_auroc.nunique() > 1


# --- what can't be told --------------------------------------------------------------------------------


@pytest.mark.slow
def test_leave_one_out_needs_all_examples_the_right_weight_and_a_good_posterior(fitted):
    notes = look(fitted, criteria={}).notes
    assert notes == ["leave-one-out: needs all training examples, and only some were looked at"]
    found = look(fitted, criteria={}, examples=80)
    (note,) = found.notes
    khat = found.khat.khat.iloc[0]
    assert khat > found.khat.threshold.iloc[0]
    assert note.startswith(f"leave-one-out: k̂ of all latents is {khat:.2f}: the draws can't be reweighted")
    heavier = replace(fitted.plan, rule=replace(fitted.plan.rule, kl_weight=2.0))
    found = diagnose(
        fitted.model,
        fitted.guide,
        heavier,
        fitted.train,
        fitted.test,
        draws=DRAWS,
        criteria={},
        examples=80,
    )
    (note,) = found.notes
    assert note.startswith("leave-one-out: at another KL weight than 1")
    assert found.elbo.model.tolist() == ["model", "tempered"]
    assert found.loo is None


@pytest.fixture(scope="module")
def good():
    """A posterior of two latents, which draws can be reweighted from."""
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Linear(4, 2), nn.Tanh(), MultiplicativeNoise(2), nn.Linear(2, 2)))
    guide = AutoTruncatedLogNormal(model, init_loc=-1.0, init_scale=0.5)
    train = data(80, 4, classes=2)
    options = dict(epochs=60, batch_size=80, learning_rate=0.0, posterior_learning_rate=0.05, warm_up=0.0)
    fit(model, guide, train, freeze_weights=True, **options)
    return SimpleNamespace(
        model=model, guide=guide, plan=bmrs.reduce(model, guide, bmrs.BMRS_N()), train=train, test=train,
    )  # fmt: skip


@pytest.mark.slow
def test_leave_one_out_where_the_posterior_allows_it(good):
    found = diagnose(good.model, good.guide, good.plan, good.train, good.test, draws=200, seed=1, criteria={})
    assert found.khat.reliable.all()
    assert found.notes == []
    tree = bmrs.to_datatree(good.model, good.guide, good.train, 200, 1)
    expected = bmrs.loo(tree)
    assert found.loo.to_dict("records") == [
        {"elpd_loo": pytest.approx(float(expected.elpd)), "standard_error": pytest.approx(float(expected.se))}
    ]
    # near the log-likelihood of 80 examples with two classes, and below it
    assert -80 * math.log(2) * 1.5 < found.loo.elpd_loo.item() < 0


class Shifted(nn.Module):
    """A classifier with a latent beside its noise layers."""

    def __init__(self):
        super().__init__()
        self.inner = Classifier(network())

    def forward(self, x, y=None):
        shift = pyro.sample("shift", Normal(0.0, 1.0))
        return self.inner(x + shift, y)


@pytest.fixture
def shifted(empty_store):
    model, train = Shifted(), data(40, 0)
    guide = AutoGuideList(model)
    guide.append(HalfDead(poutine.block(model, hide=["shift"])))
    guide.append(AutoNormal(poutine.block(model, expose=["shift"])))
    guide(*train)
    plan = bmrs.reduce(model, guide, bmrs.ExpectedScale(threshold=0.5), *train)
    return SimpleNamespace(model=model, guide=guide, plan=plan, train=train, test=data(30, 1))


@pytest.mark.slow
def test_other_latents_than_noise_layers(shifted, tmp_path):
    found = diagnose(shifted.model, shifted.guide, shifted.plan, shifted.train, shifted.test, draws=DRAWS)
    assert "predictions and curves: the model has latents beside its noise layers: shift" in found.notes
    assert found.quality is found.reliability is found.risk_coverage is found.entropy is None
    # these would be drawn from their prior
    assert found.curves is None
    assert "shift" in found.contraction.site.tolist()
    assert found.khat.part.tolist() == ["all latents", "4", "7", "shift"]
    page = report(None, shifted.plan, tmp_path / "report.html", diagnosis=found).read_text()
    assert "latents beside its noise layers: shift" in page


@pytest.mark.slow
def test_a_regression_has_no_accuracy_and_a_report_all_the_same(empty_store, tmp_path):
    x = torch.randn(40, 4)
    data = x, x[:, :1]
    model = Regressor(network(1), scale=0.5)
    guide = HalfDead(model)
    fit(model, guide, data, epochs=1)
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    found = diagnose(model, guide, plan, data, data, draws=DRAWS)
    assert not [note for note in found.notes if note.startswith("predictions")]
    assert found.quality is found.reliability is found.risk_coverage is found.entropy is None
    assert found.regression[["network", "prediction"]].to_numpy().tolist() == [
        ["full", "draws"], ["full", "E[θ]"], ["reduced", "draws"], ["reduced", "E[θ]"],
    ]  # fmt: skip
    expected = regression_quality(model, data, guide.mean())
    assert found.regression.iloc[1][[*expected]].astype(float).to_dict() == pytest.approx(expected, rel=1e-6)
    assert found.curves.accuracy.isna().all()
    assert found.curves.loss.notna().all()
    found.save(tmp_path)
    page = report(None, plan, tmp_path / "report.html", diagnosis=Diagnosis.load(tmp_path)).read_text()
    assert "root mean square error" in page
    assert "RMSE" in (tmp_path / "report.md").read_text()
    assert "loss (nats)</text>" in page  # of the curves


class Dependent(nn.Module):
    """A guide that draws the second layer's θ around the first one's: no two parts of it are independent."""

    def __init__(self, model, data):
        super().__init__()
        self.inner = AutoTruncatedLogNormal(model, init_loc=-1.0, init_scale=0.3)
        self.inner(*data)

    def forward(self, x, y=None):
        first, second = self.inner.posterior().items()
        drawn = pyro.sample(first[0], first[1].to_event(1))
        law = bmrs.TruncatedLogNormal(
            second[1].loc + 0.1 * drawn.log().mean(), second[1].scale, second[1].log_low, second[1].log_high
        )
        return {first[0]: drawn, second[0]: pyro.sample(second[0], law.to_event(1))}


@pytest.mark.slow
def test_a_guide_that_does_not_show_its_parts(empty_store):
    model, train = Classifier(network()), data(30, 0)
    guide = Dependent(model, train)
    plan = bmrs.reduce(model, guide, bmrs.ExpectedScale(threshold=0.5), *train)
    before = torch.get_rng_state()
    found = diagnose(model, guide, plan, train, train, draws=DRAWS)
    assert torch.equal(torch.get_rng_state(), before)  # though the guide draws whenever it is read
    assert found.contraction is None
    # every criterion has its curve, though this guide remembers nothing that it was called with
    assert found.curves.criterion.unique().tolist() == ["ExpectedScale (this plan)", *COMPARED]
    assert "k̂ by part and contraction: the guide does not show a posterior of each site" in found.notes
    assert found.khat.part.tolist() == ["all latents"]
    # without E[θ] of its own, the mean of the draws
    means = {
        site: value.mean(0) for site, value in drawn(SimpleNamespace(guide=guide, test=train), seed=0).items()
    }
    expected = quality(predictions(model, train, means))["negative_log_likelihood"]
    row = found.quality[(found.quality.network == "full") & (found.quality.prediction == "E[θ]")]
    assert row.negative_log_likelihood.item() == pytest.approx(expected, rel=1e-5)


class Broken:
    unit = "nothing"

    def __init__(self, value):
        self.value = value

    def __call__(self, layers):
        return {site: torch.full(view.kept.shape, self.value).double() for site, view in layers.items()}


@pytest.mark.slow
def test_a_criterion_that_can_not_score_has_no_curve(fitted):
    found = look(fitted, criteria={"broken": Broken(math.nan), "good": Broken(1.0)}, examples=EXAMPLES)
    assert found.curves.criterion.unique().tolist() == ["BMRS_N (this plan)", "good"]
    (note,) = [note for note in found.notes if note.startswith("curve of broken: ")]
    assert "not finite" in note


# --- it only looks -------------------------------------------------------------------------------------


def state_of(given):
    """All that a look could change."""
    modules = [module for program in (given.model, given.guide, given.tuned) for module in program.modules()]
    tensors = {
        f"{index}.{name}": tensor.clone()
        for index, program in enumerate((given.model, given.guide, given.tuned))
        for name, tensor in program.state_dict().items()
    }
    return dict(
        tensors=tensors,
        training=[module.training for module in modules],
        gradients=[
            (parameter.requires_grad, parameter.grad is None)
            for program in (given.model, given.guide, given.tuned)
            for parameter in program.parameters()
        ],
        torch=torch.get_rng_state(),
        numpy=np.random.get_state()[1].copy(),  # noqa: NPY002 the global one is what is looked at
        python=random.getstate(),
        store={name: value.clone() for name, value in pyro.get_param_store().items()},
        plan=given.plan.table.copy(),
        data=[tensor.clone() for part in (given.train, given.test) for tensor in part],
    )


@pytest.mark.slow
def test_nothing_is_changed(fitted):
    fitted.model.train()
    fitted.model.net[1].eval()  # as one may freeze a normalisation
    assert len({module.training for module in fitted.model.modules()}) == 2
    fitted.guide.train()
    pyro.get_param_store().setdefault("somebody's", torch.tensor(2.0))
    before = state_of(fitted)
    loader = DataLoader(TensorDataset(*fitted.train), batch_size=40, shuffle=True)
    look(fitted)
    look(fitted, train=loader, test=loader, validation=loader, criteria={})
    after = state_of(fitted)
    pyro.get_param_store().clear()
    for name in ("tensors", "store"):
        assert before[name].keys() == after[name].keys()
        assert all(torch.equal(value, after[name][key]) for key, value in before[name].items()), name
    assert before["training"] == after["training"]
    assert before["gradients"] == after["gradients"]
    assert before["python"] == after["python"]
    assert (before["numpy"] == after["numpy"]).all()
    assert torch.equal(before["torch"], after["torch"])
    pd.testing.assert_frame_equal(before["plan"], after["plan"])
    assert all(torch.equal(one, other) for one, other in zip(before["data"], after["data"], strict=True))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_and_another_does_not(fitted, found):
    torch.manual_seed(77)  # whatever the generators say
    again, other = look(fitted), look(fitted, seed=SEED + 1, criteria={})
    assert again.facts == found.facts
    assert again.notes == found.notes
    for name, table in found.tables().items():
        pd.testing.assert_frame_equal(again.tables()[name], table)
    for name in ("khat", "elbo", "quality", "entropy"):
        assert not other.tables()[name].equals(found.tables()[name]), name
    # that no draw has a part in
    same(other.curves, found.curves[: len(other.curves)])


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        lambda x, y: TensorDataset(x, y),
        pytest.param(Pairs, marks=pytest.mark.slow),
        pytest.param(lambda x, y: DataLoader(Pairs(x, y), batch_size=1000), marks=pytest.mark.slow),
    ],
    ids=["tensors", "dataset", "loader"],
)  # fmt: skip
def test_data_sets_and_loaders_give_what_tensors_give(fitted, found, kind):
    changes = {name: kind(*getattr(fitted, name)) for name in ("train", "validation", "test")}
    expected = found
    if isinstance(changes["train"], DataLoader):  # which decides itself what it shows
        expected = look(fitted, criteria={}, examples=80)
    given = look(fitted, criteria={}, **changes)
    assert given.facts == expected.facts
    assert given.notes == expected.notes
    assert given.tables().keys() == expected.tables().keys()
    for name, table in given.tables().items():
        pd.testing.assert_frame_equal(table, expected.tables()[name][: len(table)])


@pytest.mark.slow
def test_the_size_of_batches_changes_nothing(fitted, found):
    given = look(fitted, batch_size=35, criteria={})
    assert given.tables().keys() == found.tables().keys()
    for name, table in given.tables().items():
        if name != "reliability":  # a confidence at an edge may fall to either side
            expected = found.tables()[name][: len(table)]
            pd.testing.assert_frame_equal(table, expected, rtol=1e-3)


class Brightened(TensorDataset):
    """It does more than index its tensors."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 10.0, y


def test_some_examples_are_evenly_spread_and_as_the_data_set_gives_them():
    x, y = data(20, 0)
    # of what does more than index its tensors too
    for whole, brighter in (((x, y), 0), (TensorDataset(x, y), 0), (Pairs(x, y), 0), (Brightened(x, y), 10)):
        for count, places in ((5, [0, 4, 8, 12, 16]), (3, [0, 6, 13]), (20, range(20)), (30, range(20))):
            some = some_of(whole, count)
            assert isinstance(some, Dataset)
            assert len(some) == min(count, 20)
            inputs, labels = map(torch.stack, zip(*(some[index] for index in range(len(some))), strict=True))
            assert torch.equal(inputs, x[list(places)] + brighter)
            assert torch.equal(labels, y[list(places)])
    whole = Pairs(x, y)
    loader = DataLoader(whole)
    assert some_of(loader, 5) is loader


def test_parts_may_be_made_one_after_the_other_from_disk(fitted, found, tmp_path):
    options = dict(
        validation=fitted.validation, fine_tuned=fitted.tuned, out_of_distribution=fitted.foreign, draws=DRAWS,
        seed=SEED, examples=EXAMPLES,
    )  # fmt: skip
    given = fitted.model, fitted.guide, fitted.plan, fitted.train, fitted.test
    again = examination.Examination(*given, **options).begin()
    assert again.missing() == [*PARTS]
    assert not again.tables()
    while again.missing():
        folder = again.save(tmp_path)
        again = Diagnosis.load(folder)
        again = examination.Examination(*given, **options).add(again, again.missing()[0])
    assert again.facts == found.facts
    assert again.notes == found.notes
    assert again.parts == found.parts
    for name, table in found.tables().items():
        same(again.tables()[name], table)


@pytest.mark.parametrize(
    ("work", "seen"), [(1.0, math.inf), (1e12, 3)], ids=["a large network", "a short fit"]
)
def test_fewer_examples_are_looked_at_of(work, seen, fitted, monkeypatch):
    monkeypatch.setattr(examination, "_WORK", work)
    for name, bounds in (("_OF_PREDICTIONS", (7, 60)), ("_OF_CURVES", (9, 40)), ("_OF_POSTERIOR", (11, 80))):
        monkeypatch.setattr(examination, name, bounds)
    looked_at = {}

    def watched(program, inputs, scales, **options):
        looked_at["predictions"] = len(inputs)
        return predictions(program, inputs, scales, **options)

    def curves(*arguments, **options):
        looked_at["curves"] = len(arguments[3])
        return criterion_curves(*arguments, **options)

    monkeypatch.setattr(examination, "predictions", watched)
    monkeypatch.setattr(examination, "criterion_curves", curves)
    looking = examination.Examination(
        fitted.model, fitted.guide, fitted.plan, fitted.train, fitted.test, validation=fitted.validation,
        criteria={}, draws=DRAWS, seen=seen,
    )  # fmt: skip
    found = looking.begin()
    assert found.facts["examples"] == 11
    found = looking.add(looking.add(found, "predictions"), "curves")
    assert looked_at == {"predictions": 7, "curves": 9}
    assert (found.quality.examples == 7).all()


def test_a_report_passes_as_many_examples_as_the_fit_saw(fitted):
    def enough(passes, share, seen):
        return examination.affordable(fitted.plan, passes, (1, 10**9), seen, share)

    shares = examination._SHARE, examination._SHARE, examination._SHARE, examination._SHARE_OF_POSTERIOR
    for seen in (600, 6_000):
        assert sum(10 * enough(10, share, seen) for share in shares) == seen
    assert enough(10, 1 / 6, 10**10) == enough(10, 1 / 6, math.inf)  # as the network's work allows


# --- bad arguments -------------------------------------------------------------------------------------

X, Y = data(20, 0)
BAD = {
    "model": [(lambda x, y: None, TypeError), (None, TypeError)],
    "guide": [(None, TypeError), ("guide", TypeError)],
    "plan": [(None, TypeError), ("plan.json", TypeError), (make_plan({"other": [1.0, -1.0]}), ValueError)],
    **{
        name: [
            ("digits", TypeError),
            ((X,), TypeError),
            ((X, Y, Y), TypeError),
            ((X.numpy(), Y.numpy()), TypeError),
            ((X, Y[:3]), ValueError),
            ((X[:0], Y[:0]), ValueError),
        ]
        for name in ("train", "test", "validation")
    },
    "fine_tuned": [("small.safetensors", TypeError), (lambda x: x, TypeError)],
    "out_of_distribution": [
        ([X], TypeError),
        (X, TypeError),
        ({"one": X, "two": X}, ValueError),
        ({"one": (X, Y)}, TypeError),
        ({"one": X[:0]}, ValueError),
        ({"one": X[:, :2]}, ValueError),
        ({3: X}, TypeError),
        ({"test": X}, ValueError),
    ],
    "criteria": [
        ([bmrs.SNR()], TypeError),
        ({"SNR": "SNR"}, TypeError),
        ({"SNR": bmrs.SNR}, TypeError),
        ({3: bmrs.SNR()}, TypeError),
        ({f"SNR {bar}": bmrs.SNR(threshold=bar) for bar in range(1, 9)}, ValueError),
    ],
    "draws": [
        (99, ValueError),
        (0, ValueError),
        (100.0, ValueError),
        ("100", ValueError),
        (True, ValueError),
    ],
    "examples": [
        (0, ValueError),
        (-3, ValueError),
        (2.5, ValueError),
        ("all", ValueError),
        (True, ValueError),
    ],
    "seed": [(-1, ValueError), (1.5, ValueError), ("0", ValueError), (None, ValueError), (True, ValueError)],
    "batch_size": [
        (0, ValueError),
        (-1, ValueError),
        (2.5, ValueError),
        (None, ValueError),
        (True, ValueError),
    ],
}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [(name, value, kind) for name, values in BAD.items() for value, kind in values],
)
def test_a_bad_argument_is_named_before_any_work(fitted, monkeypatch, name, value, kind):
    for work in (
        "check_posterior",
        "draw_posterior",
        "predictions",
        "criterion_curves",
    ):
        monkeypatch.setattr(examination, work, lambda *_, **__: pytest.fail("it began"))
    given = dict(
        model=fitted.model, guide=fitted.guide, plan=fitted.plan, train=fitted.train, test=fitted.test
    )
    given[name] = value
    programs = [given.pop(argument) for argument in ("model", "guide", "plan", "train", "test")]
    with pytest.raises(kind, match=rf"^{name} must .*"):
        diagnose(*programs, **given)


def test_a_plan_without_its_network_is_refused_before_any_work(fitted, tmp_path, monkeypatch):
    fitted.plan.save(tmp_path / "plan.json")
    monkeypatch.setattr(examination, "check_posterior", lambda *_, **__: pytest.fail("it began"))
    loaded = bmrs.NetworkPlan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"^plan must .*network"):
        diagnose(fitted.model, fitted.guide, loaded, fitted.train, fitted.test)


def test_saved_and_loaded_it_is_the_same(found, tmp_path):
    assert found.save(tmp_path / "new") == tmp_path / "new"
    loaded = Diagnosis.load(tmp_path / "new")
    assert loaded.facts == found.facts
    assert loaded.notes == found.notes
    assert loaded.tables().keys() == found.tables().keys()
    for name, table in found.tables().items():
        same(loaded.tables()[name], table)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"diagnosis.json", *(f"{name}.csv" for name in found.tables())}
