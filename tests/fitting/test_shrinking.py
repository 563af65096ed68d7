"""After a fit that has shrunk its network: what plans, files and costs still know of the network that was."""

import copy
import math

import pandas as pd
import pytest
import torch
from small_fits import CASES, SmallFit, data, residual

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, NetworkPlan
from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior
from pyro_bmrs.inference import evaluate
from pyro_bmrs.networks import noise_layers
from pyro_bmrs.networks.cost import compare_costs
from pyro_bmrs.networks.export import save_weights
from pyro_bmrs.networks.noise import fixed_scales
from pyro_bmrs.quality import compression_curve

X, Y = data(64, 7)
EVIDENCE = [bmrs.BMRS_N(), bmrs.BMRS_N(prior_log_odds=0.0), bmrs.BMRS_U(), bmrs.BMRS_U(bits=4)]
OF_THE_POSTERIOR = [*EVIDENCE, bmrs.SNR(), bmrs.ExpectedScale()]


class Shrunk:
    """A fit with removal="epoch", and what its network was before."""

    def __init__(self, case, folder):
        self.case, self.folder = case, folder / case
        fit = SmallFit(case)
        self.original = copy.deepcopy(fit.model.net)
        self.sizes = {site: layer.features for site, layer in noise_layers(fit.model).items()}
        self.parameters = sum(parameter.numel() for parameter in fit.model.parameters())
        self.result, _ = fit.run(self.folder)
        self.model, self.guide, self.options = fit.model, fit.guide, fit.options
        self.net = self.model.net

    def reduce(self, criterion=None, **options):
        return bmrs.reduce(self.model, self.guide, criterion or bmrs.BMRS_N(), **options)

    def gone(self):
        return set(zip(self.result.removals.layer, self.result.removals.unit, strict=True))

    def fresh(self):
        """As the original was made, with other weights: without noise where `insert_noise` put it in."""
        torch.manual_seed(50)
        return residual() if self.case == "inserted" else CASES[self.case][0]()

    def unfitted(self):
        """A model and a guide of this class, new."""
        torch.manual_seed(51)
        model = Classifier(CASES[self.case][0]())
        guide = AutoTruncatedLogNormal(model)
        guide(X, Y)
        return model, guide


@pytest.fixture(scope="module", params=["removal", "statistics", "inserted"])
def shrunk(request, tmp_path_factory):
    """To be looked at only."""
    found = Shrunk(request.param, tmp_path_factory.mktemp("shrunk"))
    epochs = found.result.removals.epoch
    assert epochs.nunique() > 1, "it must have shrunk more than once"
    assert any(layer.features > 2 for layer in noise_layers(found.model).values())
    return found


@torch.no_grad()
def outputs(net, x=X):
    return net.eval()(x)


@torch.no_grad()
def predictions(model, guide, x=X):
    model.eval()
    with fixed_scales(model, guide.mean()):
        return model.predict(x)


@pytest.mark.parametrize("criterion", [*OF_THE_POSTERIOR, bmrs.WeightNorm(0.3), bmrs.Random(0.3)], ids=str)
def test_a_plan_lists_every_structure_of_the_original(shrunk, criterion):
    plan = shrunk.reduce(criterion)
    table, gone = plan.table, shrunk.gone()
    assert plan.layers == list(shrunk.sizes)
    layers = noise_layers(shrunk.model)
    for site, size in shrunk.sizes.items():
        rows = table[table.layer == site]
        assert rows.unit.tolist() == list(range(size))
        assert rows.present.tolist() == [(site, unit) not in gone for unit in range(size)]
        assert rows.unit[rows.present].tolist() == layers[site].units.tolist()
        assert (rows.removed_in_fit == ~rows.present).all()
        assert rows.removed[~rows.present].all()
        # what `apply` and `shrink` work with is of the network as it is
        assert len(plan.kept_mask(site)) == len(plan.theta_mean()[site]) == layers[site].features
        assert plan.kept[site] == rows.unit[~rows.removed].tolist()
    assert plan.widths().before.tolist() == list(shrunk.sizes.values())
    # the last parameters of what is gone, those of today of what is there
    mean = shrunk.guide.mean()
    for site in shrunk.sizes:
        rows = table[table.layer == site]
        assert rows["mean"][rows.present].tolist() == pytest.approx(mean[site].tolist(), rel=1e-6)
        assert len(shrunk.guide.site_posterior(site).removed_units) == (~rows.present).sum()


@pytest.mark.parametrize("criterion", OF_THE_POSTERIOR, ids=str)
def test_scores_of_what_is_gone_are_finite(shrunk, criterion):
    table = shrunk.reduce(criterion).table
    numbers = ["loc", "scale", "mean", "snr", "score"]
    if criterion in EVIDENCE:
        numbers.append("log_evidence_change")
    assert table[numbers].map(math.isfinite).all(axis=None)


def test_what_is_gone_has_the_score_it_went_with(shrunk):
    """By the posterior that it had then."""
    removals, table = shrunk.result.removals, shrunk.reduce().table
    both = removals.merge(table, on=["layer", "unit"], suffixes=("", "_now"))
    assert len(both) == len(removals)
    assert not removals.duplicated(["layer", "unit"]).any()
    assert both.score.tolist() == pytest.approx(both.score_now.tolist(), rel=1e-6)
    assert both.log_evidence_change.tolist() == pytest.approx(both.log_evidence_change_now.tolist(), rel=1e-6)
    assert (both.score >= 0).all()


def test_the_ledger_and_the_history_tell_of_the_same_removals(shrunk):
    removals, history = shrunk.result.removals, shrunk.result.history
    noted = pd.read_csv(shrunk.folder / "ledger.csv", dtype={"layer": str})
    pd.testing.assert_frame_equal(noted, removals, check_exact=True)
    assert removals.epoch.is_monotonic_increasing
    total = sum(shrunk.sizes.values())
    for row in history.itertuples():
        assert row.kept == total - (removals.epoch <= row.epoch).sum()
    smaller = history.parameters.diff().fillna(history.parameters.iloc[0] - shrunk.parameters) < 0
    assert history.epoch[smaller].tolist() == sorted(removals.epoch.unique())
    assert history.parameters.iloc[-1] == sum(p.numel() for p in shrunk.model.parameters())


@pytest.mark.parametrize(
    "criterion", [bmrs.BMRS_N(), bmrs.WeightNorm(0.4), bmrs.Random(0.4, seed=2)], ids=str
)
def test_apply_and_rebuild_from_a_fresh_original(shrunk, criterion, tmp_path):
    plan = shrunk.reduce(criterion)
    if not isinstance(criterion, bmrs.BMRS_N):
        assert plan.table.removed.sum() > len(shrunk.gone())
    small = plan.apply()
    with torch.no_grad(), fixed_scales(shrunk.net, {s: t.float() for s, t in plan.theta_mean().items()}):
        expected = shrunk.net.eval()(X)
    torch.testing.assert_close(outputs(small), expected, atol=1e-5, rtol=1e-5)
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.parameters_left()
    path = plan.save(tmp_path / "plan.json")
    weights = save_weights(small, tmp_path / "small.safetensors")
    fresh = shrunk.fresh()
    before = copy.deepcopy(fresh.state_dict())
    for again in (NetworkPlan.load(path).rebuild(fresh, weights), plan.rebuild(shrunk.original, weights)):
        assert torch.equal(outputs(again), outputs(small))
        assert repr(again) == repr(small)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    loaded = NetworkPlan.load(path)
    pd.testing.assert_frame_equal(loaded.table, plan.table, check_exact=True)
    # a loaded plan goes on with the network as it is
    assert torch.equal(outputs(loaded.apply(shrunk.net, X)), outputs(small))


def test_a_posterior_on_disk_shrinks_a_fresh_model(shrunk, tmp_path):
    path = save_posterior(tmp_path / "posterior.safetensors", shrunk.model, shrunk.guide)
    model, guide = shrunk.unfitted()
    load_posterior(path, model, guide)
    assert {site: layer.features for site, layer in noise_layers(model).items()} == {
        site: layer.features for site, layer in noise_layers(shrunk.model).items()
    }
    assert torch.equal(predictions(model, guide), predictions(shrunk.model, shrunk.guide))
    assert evaluate(model, (X, Y), guide.mean()) == evaluate(shrunk.model, (X, Y), shrunk.guide.mean())
    assert guide.kl_weight == shrunk.options["kl_weight"]
    plans = [bmrs.reduce(m, g, bmrs.BMRS_N()) for m, g in ((model, guide), (shrunk.model, shrunk.guide))]
    pd.testing.assert_frame_equal(plans[0].table, plans[1].table, check_exact=True)
    assert torch.equal(outputs(plans[0].apply()), outputs(plans[1].apply()))
    assert plans[0].parameters_before() == shrunk.parameters
    # loaded again it changes nothing
    load_posterior(path, model, guide)
    assert torch.equal(predictions(model, guide), predictions(shrunk.model, shrunk.guide))


def test_a_posterior_of_a_wider_network_is_refused_by_one_that_has_shrunk(shrunk, tmp_path):
    model, guide = shrunk.unfitted()
    path = save_posterior(tmp_path / "posterior.safetensors", model, guide)
    before = {name: tensor.clone() for name, tensor in shrunk.model.state_dict().items()}
    with pytest.raises(ValueError, match="lost structures that were there when this was saved"):
        load_posterior(path, shrunk.model, shrunk.guide)
    assert all(torch.equal(value, before[name]) for name, value in shrunk.model.state_dict().items())


def test_costs_before_are_those_of_the_original(shrunk):
    plan = shrunk.reduce()
    assert plan.parameters_before() == shrunk.parameters
    small = plan.apply()
    costs = plan.costs(small, seconds=0)
    without = bmrs.without_noise(copy.deepcopy(shrunk.original))
    truth = compare_costs(without, small, X, seconds=0)
    for name in ("parameters", "multiply_accumulates", "file_bytes"):
        assert costs.before[name] == truth.before[name], name
        assert costs.after[name] == truth.after[name] < truth.before[name], name
    assert costs.before["parameters"] == shrunk.parameters


def test_weights_of_what_is_gone_are_not_known(shrunk):
    """WeightNorm: NaN there, and only there; its fraction is of what is left."""
    plan = shrunk.reduce(bmrs.WeightNorm(0.5))
    table = plan.table
    assert (table.score.isna() == ~table.present).all()
    left = table[table.present]
    assert (left.score >= 0).sum() == round(0.5 * len(left))  # but for the one that each layer keeps
    assert 0 < left.removed.sum() <= (left.score >= 0).sum()
    # thresholds do not trip over them
    for threshold in (0.0, math.inf, -math.inf, float(left.score.median())):
        variant = plan.at(threshold)
        assert variant.table.removed[~variant.table.present].all()
        assert all(variant.kept.values())
    assert plan.at(0.0).kept == plan.kept
    assert plan.at(math.inf).kept == {
        site: layer.units.tolist() for site, layer in noise_layers(shrunk.net).items()
    }


@pytest.mark.parametrize("criterion", [bmrs.BMRS_N(), bmrs.WeightNorm(0.5)], ids=str)
def test_the_curve_begins_where_the_fit_has_come_to(shrunk, criterion):
    plan = shrunk.reduce(criterion)
    curve = compression_curve(shrunk.model, plan, (X, Y), points=4)
    left = sum(parameter.numel() for parameter in shrunk.model.parameters())
    assert curve.parameters_removed.iloc[0] == pytest.approx(1 - left / shrunk.parameters)
    assert curve.parameters_removed.iloc[0] > 0.1
    assert curve.score_threshold.iloc[0] == math.inf
    assert curve.parameters_removed.is_monotonic_increasing
    assert curve.parameters_removed.iloc[-1] < 1
    (own,) = curve[curve.is_plan].parameters_removed
    assert own == pytest.approx(1 - plan.parameters_left() / shrunk.parameters)
    first = evaluate(shrunk.model, (X, Y), shrunk.guide.mean())
    assert curve.loss.iloc[0] == pytest.approx(first.loss, rel=1e-5)


def test_rounding_counts_what_is_left(shrunk):
    plan = shrunk.reduce(bmrs.Random(0.9, seed=1), round_to=4)
    layers = noise_layers(shrunk.model)
    for site, kept in plan.kept.items():
        assert len(kept) in (4, layers[site].features)
        assert set(kept) <= set(layers[site].units.tolist())


def test_a_second_fit_goes_on_in_what_is_left(tmp_path):
    """And shrinks it further, with the numbers of the original."""
    fit = Shrunk("removal", tmp_path)
    again = bmrs.fit(
        fit.model, fit.guide, data(), epochs=4, batch_size=20, warm_up=0.0, progress=False,
        **{**fit.options, "criterion": bmrs.SNR(2.0)},
    )  # fmt: skip
    second = set(zip(again.removals.layer, again.removals.unit, strict=True))
    assert second
    assert not second & fit.gone()
    table = fit.reduce().table
    assert (
        set(zip(table.layer[~table.present], table.unit[~table.present], strict=True)) == fit.gone() | second
    )
    assert table.groupby("layer").unit.apply(list).map(lambda units: units == list(range(len(units)))).all()
    small = fit.reduce().apply()
    path = fit.reduce()
    path.apply()
    assert repr(path.rebuild(fit.fresh())) == repr(small)
