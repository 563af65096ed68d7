"""The guide, for networks and for any Pyro model with such latents."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

from pyro_bmrs import AutoTruncatedLogNormal, Classifier, LogUniform, MultiplicativeNoise, TruncatedLogNormal
from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior
from pyro_bmrs.inference.posteriors import read_posterior
from pyro_bmrs.pruning.binding import input_of


def classifier(width=5):
    torch.manual_seed(0)
    return Classifier(
        nn.Sequential(nn.Linear(3, width), nn.ReLU(), MultiplicativeNoise(width), nn.Linear(width, 2))
    )


def own_model(x):
    """A user's Pyro model with latents in several shapes: scalar, vector event, in a plate, other prior."""
    a = pyro.sample("a", LogUniform(-5.0, 0.0))
    b = pyro.sample("b", LogUniform(-10.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("groups", 4):
        c = pyro.sample("c", TruncatedLogNormal(-1.0, 2.0, -8.0, 0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", pyro.distributions.Normal(a * b.sum() + c.mean(), 1.0), obs=x)


def test_any_model_with_such_latents():
    guide = AutoTruncatedLogNormal(own_model, init_loc=-2.0, init_scale=0.5)
    x = torch.randn(6)
    values = guide(x)
    assert {name: value.shape for name, value in values.items()} == {
        "a": torch.Size([]), "b": torch.Size([3]), "c": torch.Size([4])
    }  # fmt: skip
    with pyro.validation_enabled(True):
        loss = TraceMeanField_ELBO()(own_model, guide)(x)
    loss.backward()
    assert all(p.loc.grad is not None and torch.isfinite(p.loc.grad).all() for p in guide.posteriors)
    posterior = guide.posterior()
    assert posterior["b"].log_high.tolist() == [1.0] * 3
    assert posterior["c"].log_low.tolist() == [-8.0] * 4


def test_two_guides_in_one_process_share_nothing():
    pyro.clear_param_store()
    first, second = (AutoTruncatedLogNormal(classifier()) for _ in range(2))
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    for guide in (first, second):
        guide(x, y)
        TraceMeanField_ELBO()(guide.model, guide)(x, y)
    with torch.no_grad():
        first.site_posterior("2").loc.fill_(-3.0)
    second(x, y)
    assert second.posterior()["2"].loc.tolist() == [0.0] * 5


def test_plain_svi_trains_it():
    pyro.clear_param_store()
    model = classifier()
    guide = AutoTruncatedLogNormal(model)
    x, y = torch.randn(16, 3), torch.randint(2, (16,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    before = [p.detach().clone() for p in model.parameters()]
    losses = [svi.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert (guide.posterior()["2"].loc != 0).any()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    pyro.clear_param_store()


def test_svi_of_a_second_model_trains_the_second_model():
    """Without pyro.clear_param_store() between them: Pyro's store shares parameters by name."""
    x, y = torch.randn(16, 3), torch.randint(2, (16,))
    for _ in range(2):
        model = classifier()
        guide = AutoTruncatedLogNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            svi.step(x, y)
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert (guide.posterior()["2"].loc != 0).all()
    pyro.clear_param_store()


def test_other_latents_are_named_and_go_with_another_guide():
    def mixed(x):
        w = pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))
        theta = pyro.sample("theta", LogUniform().expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", pyro.distributions.Normal(w * theta.sum(), 1.0), obs=x)

    x = torch.randn(5)
    with pytest.raises(ValueError, match="'w' with prior Normal"):
        AutoTruncatedLogNormal(mixed)(x)
    guide = AutoGuideList(mixed)
    guide.append(AutoTruncatedLogNormal(poutine.block(mixed, expose=["theta"])))
    guide.append(AutoNormal(poutine.block(mixed, expose=["w"])))
    TraceMeanField_ELBO()(mixed, guide)(x).backward()
    assert list(read_posterior(guide, x)) == ["theta"]


def test_read_posterior_of_a_guide_written_by_hand():
    def guide(x):
        pyro.sample("a", TruncatedLogNormal(torch.tensor([-1.0, -2.0]), 0.3).to_event(1))

    posterior = read_posterior(guide, None)
    assert posterior["a"].loc.tolist() == [-1.0, -2.0]
    with pytest.raises(ValueError, match=r"TruncatedLogNormal sites.*Normal"):
        read_posterior(lambda: pyro.sample("z", pyro.distributions.Normal(0.0, 1.0)))


def test_mean_and_median_are_zero_where_removed():
    guide = AutoTruncatedLogNormal(classifier())
    guide(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    guide.site_posterior("2").kept[1] = False
    for values in (guide.mean()["2"], guide.median()["2"]):
        assert values[1] == 0
        assert (values[[0, 2, 3, 4]] > 0.9).all()


def test_before_the_first_call_there_is_no_posterior():
    with pytest.raises(RuntimeError, match="call it once"):
        AutoTruncatedLogNormal(classifier()).posterior()
    with pytest.raises(ValueError, match="init_scale must be positive"):
        AutoTruncatedLogNormal(classifier(), init_scale=0.0)


def test_predictive_and_render_and_trace_work():
    model = classifier()
    guide = AutoTruncatedLogNormal(model)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"'y' with prior Categorical.*guide\(x, y\)"):
        guide(x)
    guide = AutoTruncatedLogNormal(model)
    guide(x, torch.zeros(4, dtype=torch.long))
    samples = Predictive(model, guide=guide, num_samples=7)(x)
    assert samples["y"].shape == (7, 4)
    assert samples["2"].shape[0] == 7
    assert poutine.trace(model).get_trace(x).nodes["2"]["fn"].event_shape == (5,)
    pytest.importorskip("graphviz")
    graph = pyro.render_model(model, model_args=(x, torch.zeros(4, dtype=torch.long)))
    assert "y" in graph.source


def test_posterior_file_round_trip_and_its_refusals(tmp_path):
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    model = classifier()
    guide = AutoTruncatedLogNormal(model)
    guide(x, y)
    with torch.no_grad():
        guide.site_posterior("2").loc.uniform_(-5, 0)
    guide.kl_weight = 3.5
    path = save_posterior(tmp_path / "posterior.safetensors", model, guide)
    other = classifier()
    fresh = AutoTruncatedLogNormal(other)
    fresh(x, y)
    load_posterior(path, other, fresh)
    assert torch.equal(fresh.posterior()["2"].loc, guide.posterior()["2"].loc)
    assert fresh.kl_weight == 3.5
    wide = classifier(6)
    wrong = AutoTruncatedLogNormal(wide)
    wrong(x, y)
    with pytest.raises(ValueError, match="another network"):
        load_posterior(path, wide, wrong)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="must be a posterior"):
        load_posterior(path, other, fresh)
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.safetensors"]


def test_trace_elbo_needs_no_kl():
    guide = AutoTruncatedLogNormal(own_model)
    x = torch.randn(6)
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(own_model, guide, x)))


def test_a_called_guide_can_be_copied_and_a_new_one_knows_what_is_removed():
    model = classifier()
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    guide = AutoTruncatedLogNormal(model)
    guide(x, y)
    copy.deepcopy(guide.posteriors)
    copy.deepcopy(guide)
    model.net[2].kept[3] = False
    fresh = AutoTruncatedLogNormal(model)
    fresh(x, y)
    assert fresh.mean()["2"][3] == 0


def test_latents_of_a_subsampled_plate_are_refused():
    def model(x):
        with pyro.plate("rows", 10, subsample_size=3):
            pyro.sample("theta", LogUniform())

    with pytest.raises(ValueError, match=r"subsampled plate 'rows' \(3 of 10\)"):
        AutoTruncatedLogNormal(model)(torch.zeros(3))


def test_bounds_far_below_have_room_for_the_location():
    def model(x):
        pyro.sample("theta", LogUniform(-60.0, -30.0).expand([2]).to_event(1))

    guide = AutoTruncatedLogNormal(model, init_loc=-65.0)
    guide(torch.zeros(1))
    assert guide.posterior()["theta"].loc.tolist() == [-65.0, -65.0]


class KeywordNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = classifier(5).net

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_arguments_by_keyword_are_remembered_in_the_order_of_the_model(wrapped):
    model = Classifier(KeywordNetwork())
    guide = AutoTruncatedLogNormal(poutine.block(model, expose=["layers.2"]) if wrapped else model)
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    if wrapped:
        poutine.block(guide)(y=y, x=x)
    else:
        guide(y=y, x=x)
    assert guide.example_arguments[0] is x
    assert guide.example_arguments[1] is y
    assert torch.equal(input_of(model, guide.example_arguments), x)  # not y


def test_arguments_that_only_have_keywords_are_left_to_their_defaults():
    def model(x, y=None, *, scale=1.0):
        theta = pyro.sample("theta", LogUniform(-5.0, 0.0))
        pyro.sample("y", pyro.distributions.Normal(theta, scale).expand([len(x)]).to_event(1), obs=y)

    guide = AutoTruncatedLogNormal(model)
    x = torch.randn(4)
    guide(y=x, x=x, scale=2.0)
    assert len(guide.example_arguments) == 2


def test_a_model_without_named_arguments_remembers_those_by_position():
    def model(*data):
        pyro.sample("theta", LogUniform(-5.0, 0.0))

    guide = AutoTruncatedLogNormal(model)
    x = torch.randn(4)
    guide(x, x)
    assert len(guide.example_arguments) == 2
