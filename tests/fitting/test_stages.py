"""A fit along rising KL weights: its stages, the one that is taken, and those for a budget."""

import math
import os
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, Regressor
from pyro_bmrs.fitting.defaults import settled
from pyro_bmrs.fitting.progress import EpochProgress
from pyro_bmrs.fitting.stages import MOST_STAGES, Rise, Stages
from pyro_bmrs.inference import evaluate
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.pruning import binding
from pyro_bmrs.pruning.budgets import one_standard_error


def data(examples=400, seed=0):
    """Labels depend on two of six inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


VALIDATION = data(300, 1)
SETTINGS = dict(
    epochs=16, batch_size=25, learning_rate=1e-2, posterior_learning_rate=0.1, progress=False, validate=True
)


def fitted(model=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), MultiplicativeNoise(24), nn.Linear(24, 2))
    model = model or Classifier(net)
    guide = AutoTruncatedLogNormal(model)
    return model, guide, bmrs.fit(model, guide, data(), VALIDATION, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def rising():
    return fitted()


@given(st.integers(1, 300), st.floats(0, 1), st.integers(1, 10**7))
def test_weights_rise_from_one_in_equal_ratios_and_each_stage_ends_once(epochs, warm_up, examples):
    rise = Rise.of(bmrs.Settings(epochs=epochs, warm_up=warm_up), examples)
    weights = [rise.kl_weight(epoch) for epoch in range(1, epochs + 1)]
    stages = [rise.stage(epoch) for epoch in range(1, epochs + 1)]
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(max(examples / 5000, 1.0), rel=0.006)
    ends = [stage for epoch, stage in enumerate(stages, 1) if rise.ends(epoch)]
    assert ends == [*range(1, rise.stages + 1)]
    assert 1 <= rise.stages <= MOST_STAGES
    # the warm-up, and no more than it needs, comes before
    assert stages.count(0) == min(math.ceil(warm_up * epochs), epochs - 1)
    if rise.stages > 1:
        assert weights[-1] == pytest.approx(max(examples / 50, 2), rel=0.006)
        steps = [rise.kl_weight(stages.index(stage) + 1) for stage in ends]
        ratio = (steps[-1] / steps[0]) ** (1 / (rise.stages - 1))
        for stage, weight in enumerate(steps):
            assert weight == pytest.approx(steps[0] * ratio**stage, rel=0.02)


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 1) | st.just(math.nan), st.integers(1, 100)),
        min_size=1,
        max_size=30,
    )
)
def test_no_smaller_network_is_as_good_as_the_one_that_the_rule_takes(rows):
    losses, errors, sizes = zip(*rows, strict=True)
    taken = one_standard_error(losses, errors, sizes)
    # by its neighbours too, a network is as bad as the worse of its loss and the middle one of three
    near = [
        sorted((losses[max(place - 1, 0)], loss, losses[min(place + 1, len(rows) - 1)]))[1]
        for place, loss in enumerate(losses)
    ]
    best = near.index(min(near))
    allowed = near[best] + (0 if math.isnan(errors[best]) else errors[best])
    good = {place for place, loss in enumerate(losses) if max(loss, near[place]) <= allowed}
    assert taken in good or (not good and losses[taken] == min(losses))
    assert all(sizes[taken] <= sizes[place] for place in good)


def test_the_rule_of_one_standard_error():
    sizes = [60, 50, 40, 30, 20, 10]
    assert one_standard_error([0.10, 0.10, 0.11, 0.115, 0.13, 0.5], [0.02] * 6, sizes) == 3
    assert one_standard_error([0.10, 0.10, 0.11, 0.115, 0.13, 0.5], [0.001] * 6, sizes) == 1
    assert one_standard_error([0.10, 0.10, 0.11, 0.115, 0.13, 0.5], [math.nan] * 6, sizes) == 1
    # one lucky epoch sets no bound that its neighbours, which are much the same, are far from
    assert one_standard_error([0.10, 0.10, 0.05, 0.105, 0.11, 0.5], [0.02] * 6, sizes) == 4
    # nor is a network taken whose neighbours are worse
    assert one_standard_error([0.10, 0.10, 0.10, 0.5, 0.10, 0.5], [0.02] * 6, sizes) == 2
    assert one_standard_error([0.3], [math.nan], [5]) == 0
    assert one_standard_error([0.3, 0.2], [0.0, 0.0], [5, 9]) == 1


def test_with_validation_data_weights_rise_and_a_stage_is_taken(rising):
    model, guide, result = rising
    stages = result.stages
    assert result.settings.kl_weight == "auto"
    assert list(stages.epoch) == [*range(5, 17)]
    assert list(stages.kl_weight) == [float(f"{8 ** (n / 11):.3g}") for n in range(12)]
    assert list(result.history.kl_weight[4:]) == list(stages.kl_weight)
    assert stages.chosen.sum() == 1
    result.restore(stages.stage[stages.chosen].iloc[0])  # one of NumPy's numbers
    row = stages[stages.chosen].iloc[0]
    plan = bmrs.reduce(model, guide)
    assert plan.rule.kl_weight == guide.kl_weight == row.kl_weight
    assert plan.parameters_left() == row.parameters < stages.parameters.max()
    assert int((~plan.table.removed).sum()) == row.kept
    found = plan.evaluated(VALIDATION)
    assert found.loss == pytest.approx(row.validation_loss)
    assert found.standard_error == pytest.approx(row.standard_error)
    assert found.accuracy == row.validation_accuracy > 0.9
    assert result.best_epoch == row.epoch


def test_any_stage_can_be_had(rising):
    model, guide, result = rising
    for row in result.stages.itertuples():
        result.restore(row.stage)
        assert bmrs.reduce(model, guide).parameters_left() == row.parameters
        assert bmrs.reduce(model, guide).evaluated(VALIDATION).loss == pytest.approx(row.validation_loss)
    for bad in (0, 13, "2", 1.5):
        with pytest.raises(ValueError, match="stage must be from 1 to 12: got"):
            result.restore(bad)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1])
def test_the_stage_of_a_budget(share, rising):
    _, guide, result = rising
    plan = result.within(parameters=share, macs=0.9, progress=False)
    full = plan.parameters_before()
    assert plan.parameters_left() <= share * full < plan.parameters_left() + 9  # of one structure
    assert plan.rule.budget["parameters"] == share * full
    # model and guide are in the state of the plan
    assert guide.kl_weight == plan.rule.kl_weight
    small = Classifier(plan.apply())
    assert evaluate(small, VALIDATION).loss == pytest.approx(plan.evaluated(VALIDATION).loss, rel=1e-4)


def test_a_loss_that_is_allowed_gives_the_smallest_network_of_any_stage(rising):
    *_, result = rising
    least, best = result.stages.validation_loss.min(), result.stages.validation_accuracy.max()
    plan = result.within(loss_rise=0.05, progress=False)
    assert plan.evaluated(VALIDATION).loss <= least + 0.05
    good = result.stages[result.stages.validation_loss <= least + 0.05]
    assert plan.parameters_left() <= good.parameters.iloc[-1]
    plan = result.within(accuracy_drop=2.0, parameters=0.5, progress=False)
    assert plan.evaluated(VALIDATION).accuracy >= best - 0.02


def test_a_budget_out_of_reach_says_so(rising):
    *_, result = rising
    with pytest.raises(ValueError, match=r"parameters must be at least 11"):
        result.within(parameters=3, progress=False)
    with pytest.raises(ValueError, match=r"accuracy_drop must be at least .*, with parameters within 12"):
        result.within(parameters=12, accuracy_drop=0.0, progress=False)
    both = "accuracy_drop and loss_rise must be larger: no stage loses as little as 0 points and 0 nats an example"
    with pytest.raises(ValueError, match=both):
        result.within(accuracy_drop=0, loss_rise=0, progress=False)
    with pytest.raises(ValueError, match="a budget must be one of"):
        result.within()


def harmful(useful):
    """A network that is wrong with either of its last two units; without, right if the first is useful."""
    net = nn.Sequential(nn.Linear(2, 3), MultiplicativeNoise(3), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight[:, 0] = 1.0
        net[2].weight[1] = torch.tensor([useful, -3.0, -3.0])
    return net


def test_what_the_evidence_keeps_in_a_stage_can_be_had_where_each_place_on_the_path_to_it_loses_more():
    x = data()[0][:, :2]
    held_out = x, (x[:, 0] > 0).long()
    model = Classifier(harmful(1.0))
    guide = AutoTruncatedLogNormal(model)
    guide(*held_out)

    def scores(layers):
        return {name: torch.tensor([-1.0, 1.0, 2.0]) for name in layers}

    stages = Stages(model, guide, lambda: bmrs.reduce(model, guide, scores), held_out)
    for number, useful in enumerate((1.0, -1.0), 1):  # in the second no unit is right
        model.net.load_state_dict(harmful(useful).state_dict())
        guide.kl_weight = float(number)
        stages.add({"stage": number, "epoch": number, "kl_weight": float(number), **stages.measured()})
    assert stages.table().validation_accuracy.tolist() == [1.0, 0.0]
    for asked in (dict(accuracy_drop=0), dict(accuracy_drop=0.5), dict(accuracy_drop=0, parameters=15)):
        plan = stages.within(asked, progress=False)
        assert plan.evaluated(held_out).accuracy == 1.0
        assert plan.parameters_left() == 7
        assert plan.rule.budget == asked
        # model and guide are in the state of the plan
        assert guide.kl_weight == plan.rule.kl_weight == 1.0
        assert bmrs.reduce(model, guide, scores).evaluated(held_out).accuracy == 1.0


def test_a_network_without_classes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 1))
    model = Regressor(net, scale=0.5)
    guide = AutoTruncatedLogNormal(model)
    x, other = data()[0], VALIDATION[0]
    result = bmrs.fit(model, guide, (x, x[:, :1]), (other, other[:, :1]), **SETTINGS)
    assert result.stages.validation_accuracy.isna().all()
    assert result.stages.chosen.sum() == 1
    with pytest.raises(ValueError, match="accuracy_drop must be left out for a model without classes"):
        result.within(accuracy_drop=1.0, progress=False)
    assert result.within(loss_rise=0.2, progress=False).parameters_left() < 13 * 12 / 2


def test_what_has_nothing_to_choose_by_has_weight_one():
    model, guide, _ = fitted(epochs=1)
    alone = bmrs.fit(model, guide, data(), epochs=1, progress=False)
    assert alone.settings.kl_weight == guide.kl_weight == 1.0
    assert alone.stages.empty
    with pytest.raises(ValueError, match='kl_weight must be "auto" for a fit with stages'):
        alone.within(parameters=0.5)
    plain = Classifier(nn.Linear(6, 2))
    assert bmrs.fit(plain, None, data(), VALIDATION, epochs=1, progress=False).settings.kl_weight == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patience=3), 'patience must be None with kl_weight "auto"'),
        (dict(removal="epoch"), "removal must be 'end' with kl_weight \"auto\""),
    ],
)
def test_what_does_not_go_with_rising_weights(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(**options, kl_weight="auto")
    *_, result = fitted(**options, epochs=1)
    assert result.settings.kl_weight == 1.0


def test_a_budget_out_of_reach_leaves_model_and_guide_as_they_are():
    model, guide, result = fitted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight, left = guide.kl_weight, bmrs.reduce(model, guide).parameters_left()
    with pytest.raises(ValueError, match="accuracy_drop must be at least"):
        result.within(parameters=12, accuracy_drop=0.0, progress=False)
    assert guide.kl_weight == weight
    assert bmrs.reduce(model, guide).parameters_left() == left
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Noisy(nn.Module):
    """A regression whose noise is a latent too."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", bmrs.LogUniform(-6.0, 2.0))
        mean = self.net(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)
        return mean


def test_latents_beside_the_structures_have_their_posterior_in_a_stage():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 1))
    model = Noisy(net)
    guide = AutoTruncatedLogNormal(model)
    x, other = data()[0], VALIDATION[0]
    result = bmrs.fit(model, guide, (x, x[:, 0]), (other, other[:, 0]), **SETTINGS | {"elbo": "auto"})
    stages = result.stages.set_index("epoch").validation_loss
    seen = result.history.set_index("epoch").validation_loss[stages.index]
    # nothing that the evidence removes matters much
    assert (stages - seen).abs().max() < 0.5


class Sorted(nn.Module):
    """Sorts its hidden units, so that none of them can be cut."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.last = nn.Linear(6, 8), MultiplicativeNoise(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.noise(self.first(x)).sort(1).values)


def test_what_cannot_be_cut_is_refused_before_the_first_step():
    model = Classifier(Sorted())
    guide = AutoTruncatedLogNormal(model)
    before = model.net.first.weight.clone()
    with pytest.raises(ValueError, match="noise"):
        bmrs.fit(model, guide, data(), VALIDATION, **SETTINGS)
    assert torch.equal(model.net.first.weight, before)


class Sequences(nn.Module):
    """Reads time first."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x.mean(0))


def test_examples_may_stand_behind_time():
    x, y = data(60)
    pairs = [(row.expand(5, 6), label) for row, label in zip(x, y, strict=True)]

    def together(examples):
        rows, labels = zip(*examples, strict=True)
        return torch.stack(rows, 1), torch.stack(labels)

    loader = DataLoader(pairs, batch_size=12, collate_fn=together)
    model = Classifier(Sequences())
    guide = AutoTruncatedLogNormal(model)
    settings = bmrs.fit(model, guide, loader, epochs=1, draws_per_batch=1, progress=False).settings
    assert (settings.learning_rate, settings.batch_size) == (1e-3, 128)


def test_stages_are_measured_anew_by_another_rule(rising, tmp_path):
    model, guide, result = rising
    stages = result._stages
    before = result.stages.parameters.tolist()
    floors = Stages(model, guide, lambda: bmrs.reduce(model, guide, min_kept=0.5), VALIDATION)
    floors._rows, floors._states = dict(stages._rows), stages._states
    floors.measure_anew()
    assert min(floors.table().parameters) >= 12 * 7 + 2 + 12 * 2
    assert result.stages.parameters.tolist() == before
    floors._states = {}  # they are not looked at again
    floors.measure_anew()


def test_weights_that_rise_need_validation_data():
    model, guide, _ = fitted(epochs=1)
    with pytest.raises(ValueError, match="kl_weight must be a number without validation data"):
        bmrs.fit(model, guide, data(), kl_weight="auto", progress=False)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), MultiplicativeNoise(24), nn.Linear(24, 2))


def defaults(model, train, **options):
    settings = bmrs.Settings(**{"epochs": 1, **options})
    batches = Batches(train, settings.batch_size, torch.device("cpu"), "train")
    return settled(settings, model, AutoTruncatedLogNormal(model), batches, None, {})


def test_a_trained_network_keeps_what_it_knows():
    trained = bmrs.without_noise(small_net())
    bmrs.fit(Classifier(trained), None, data(), epochs=30, learning_rate=1e-2, progress=False)
    before = evaluate(Classifier(trained), VALIDATION)
    x, y = data()
    order = y.argsort()  # sorted by class: whole batches of one label
    for train in ((x, y), (x[order], y[order])):
        model = Classifier(bmrs.insert_noise(trained, x[:4]))
        settings = defaults(model, train)
        assert (settings.learning_rate, settings.warm_up) == (pytest.approx(3e-4), 0.1)
    # what is given holds
    assert defaults(model, (x, y), learning_rate=1e-3).warm_up == 0.25
    assert defaults(model, (x, y), warm_up=0.5).learning_rate == 1e-3
    # and a first fit with default settings loses nothing
    model = Classifier(bmrs.insert_noise(trained, x[:4]))
    guide = AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, (x, y), VALIDATION, progress=False)
    found = bmrs.reduce(model, guide).evaluated(VALIDATION)
    assert found.accuracy >= before.accuracy - 0.01


@pytest.mark.parametrize("seed", range(5))
def test_a_network_with_random_weights_is_not_taken_for_trained(seed):
    assert defaults(Classifier(small_net(seed)), data()).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("examples", "batch", "rate"), [(400, 16, 0.05), (1150, 32, 0.05), (4096, 128, 0.05), (48_000, 128, 0.05)]
)
def test_batches_and_rates_follow_the_number_of_examples(examples, batch, rate):
    settings = defaults(Classifier(small_net()), data(examples))
    assert (settings.batch_size, settings.posterior_learning_rate) == (batch, rate)
    given = defaults(Classifier(small_net()), data(examples), batch_size=50, posterior_learning_rate=0.01)
    assert (given.batch_size, given.posterior_learning_rate) == (50, 0.01)


def test_many_steps_need_a_low_rate():
    settings = defaults(Classifier(small_net()), data(800), epochs=60, batch_size=16)
    assert settings.posterior_learning_rate == 0.013  # 40 over 60 times 50


def test_an_interrupted_fit_goes_on_with_a_model_that_it_has_trained(tmp_path, monkeypatch):
    """Which then is taken for trained, and would get other rates."""
    model = Classifier(small_net())
    guide = AutoTruncatedLogNormal(model)
    options = dict(epochs=40, posterior_learning_rate=0.1, checkpoints=tmp_path / "fit", progress=False)
    done = EpochProgress.epoch

    def stop(display, row):
        done(display, row)
        if row["epoch"] == 34:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(EpochProgress, "epoch", stop)
        first = bmrs.fit(model, guide, data(), VALIDATION, **options)
    assert first.interrupted
    assert defaults(model, data()).learning_rate == pytest.approx(3e-4)
    again = bmrs.fit(model, guide, data(), VALIDATION, **options)
    assert again.settings == first.settings
    assert again.settings.learning_rate == 1e-3
    assert len(again.history) == 40


@pytest.mark.parametrize("kl_weight", ["auto", 1.0])
def test_structures_are_found_once_in_a_fit(kl_weight, monkeypatch):
    """Inputs as structures are nested in what reads them, and each epoch counts what is kept."""
    calls = []
    found = binding.structure_groups
    monkeypatch.setattr(binding, "structure_groups", lambda *given: calls.append(1) or found(*given))
    net = nn.Sequential(
        bmrs.InputSelection(6), nn.Linear(6, 12), nn.ReLU(), MultiplicativeNoise(12), nn.Linear(12, 2)
    )
    fitted(Classifier(net), epochs=6, kl_weight=kl_weight)
    assert len(calls) == 1


def test_a_plan_for_a_budget_keeps_to_the_state_of_its_stage():
    model, guide, result = fitted()
    small = result.within(parameters=0.5)
    before, loss = small.apply(), small.evaluated(VALIDATION).loss
    result.restore(1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(before.parameters(), small.apply().parameters(), strict=True)
    )
    assert small.evaluated(VALIDATION).loss == loss
    own = bmrs.reduce(model, guide)
    state = own.apply().state_dict()
    result.restore(len(result.stages))
    assert all(torch.equal(state[name], value) for name, value in own.apply().state_dict().items())
