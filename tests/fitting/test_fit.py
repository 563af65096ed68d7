"""The fit: what it learns, what it leaves alone, and how it ends when something goes wrong."""

import math

import pyro
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, Regressor
from pyro_bmrs.inference import evaluate
from pyro_bmrs.networks.noise import noise_layers

QUIET = dict(progress=False, validate=True)


def data(examples=200, seed=0):
    """Labels depend on two of six inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 2))


def fitted(**options):
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    settings = {**dict(epochs=4, batch_size=50, learning_rate=1e-2, posterior_learning_rate=5e-2), **QUIET}
    return model, guide, bmrs.fit(model, guide, data(), data(100, 1), **{**settings, **options})


def test_it_learns_and_finds_idle_units():
    model, guide, result = fitted(epochs=80, kl_weight=2.0)
    assert evaluate(model, data(500, 2), guide.mean()).accuracy > 0.93
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    assert 1 <= len(plan.kept["2"]) <= 8
    small = plan.apply()
    assert evaluate(Classifier(small), data(500, 2)).accuracy > 0.9
    history = result.history
    assert list(history.columns) == [
        "phase", "epoch", "loss", "log_likelihood", "kl", "kl_weight", "validation_loss", "validation_accuracy",
        "kept", "parameters", "seconds",
    ]  # fmt: skip
    assert history.kl_weight.iloc[-1] == 2.0
    assert history.kl_weight.iloc[0] < 0.2
    # the loss is what its parts say, up to what the KL moved within the last epoch
    last = history.iloc[-1]
    assert last.loss == pytest.approx(-last.log_likelihood + 2.0 * last.kl / 200, rel=0.05)


def test_same_seed_same_result_and_the_global_generator_is_left_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    _, first, one = fitted()
    torch.set_rng_state(before)
    _, second, two = fitted()
    assert torch.equal(first.posterior()["2"].loc, second.posterior()["2"].loc)
    assert one.history.drop(columns="seconds").equals(two.history.drop(columns="seconds"))
    _, other, _ = fitted(seed=1)
    assert not torch.equal(first.posterior()["2"].loc, other.posterior()["2"].loc)
    state = torch.get_rng_state()
    model = Classifier(nn.Linear(6, 2))
    torch.set_rng_state(state)
    bmrs.fit(model, None, data(), epochs=1, **QUIET)
    assert torch.equal(state, torch.get_rng_state())


def test_pyros_settings_and_store_are_left_as_found():
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(3.0))
    enabled = pyro.settings.get("validate_poutine")
    fitted(validate=False)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.settings.get("validate_poutine") == enabled
    pyro.clear_param_store()


def test_frozen_weights_and_statistics_stay():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 2)
    )
    model = Classifier(net)
    guide = AutoTruncatedLogNormal(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bmrs.fit(model, guide, data(), epochs=2, freeze_weights=True, **QUIET)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert (guide.posterior()["3"].loc != 0).any()


class Robust(nn.Module):
    """A user's own Pyro model: Student-t likelihood, own learned scale, noise layers somewhere inside."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"net": network()})
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, y=None):
        mean = self.body["net"](x)[:, 0]
        with pyro.plate("examples", len(x)):
            return pyro.sample("obs", pyro.distributions.StudentT(4.0, mean, self.log_scale.exp()), obs=y)


def test_weights_decay_apart_from_the_gradient_and_the_posterior_does_not():
    rate, decay = 1e-3, 30.0
    ends = {}
    for given in (0.0, decay):
        start = Classifier(network()).state_dict()
        model, guide, _ = fitted(
            epochs=1, batch_size=200, learning_rate=rate, weight_decay=given, warm_up=0.0
        )
        ends[given] = dict(model.named_parameters()), [p.clone() for p in guide.parameters()]
    for name, without in ends[0.0][0].items():
        expected = without - rate * decay * start[name]
        assert torch.allclose(ends[decay][0][name], expected, atol=1e-6), name
    assert all(map(torch.equal, ends[0.0][1], ends[decay][1]))


def test_the_noise_of_a_regressor_does_not_decay():
    x, _ = data(100)
    scales = []
    for decay in (0.0, 100.0):
        model = Regressor(network())
        guide = AutoTruncatedLogNormal(model)
        y = x[:, :2]
        bmrs.fit(model, guide, (x, y), epochs=1, batch_size=100, weight_decay=decay, **QUIET)
        scales.append([p.detach().clone() for p in model.parameters(recurse=False)])
    assert scales[0]
    assert all(map(torch.equal, *scales))


def test_any_pyro_model_of_x_and_y():
    model = Robust()
    guide = AutoTruncatedLogNormal(model)
    x, labels = data()
    result = bmrs.fit(model, guide, (x, labels.float()), (x, labels.float()), epochs=3, **QUIET)
    assert guide.sites == ("body.net.2",)
    assert math.isnan(result.history.validation_accuracy.iloc[-1])
    assert model.log_scale != 0
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5))
    small = plan.apply()
    assert small[0].out_features == 6


class Doubled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.net, self.factor = network(), factor

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=self.factor):
            pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)


def test_a_likelihood_scaled_in_another_way_is_refused():
    for factor in (2.0, 0.5):
        model = Doubled(factor)
        with pytest.raises(ValueError, match=r"scale its likelihood.*N/batch = 4.*got"):
            bmrs.fit(model, AutoTruncatedLogNormal(model), data(), epochs=1, batch_size=50, **QUIET)

    class Blind(Doubled):
        def forward(self, x, y=None):
            return self.net(x)

    model = Blind(1.0)
    with pytest.raises(ValueError, match="must observe y"):
        bmrs.fit(model, AutoTruncatedLogNormal(model), data(), epochs=1, **QUIET)


class Pairs(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        x, y = data()
        return x[index], y[index]


@pytest.mark.parametrize("source", [TensorDataset(*data()), Pairs(), DataLoader(Pairs(), batch_size=20)])
def test_every_form_of_data(source):
    model = Classifier(network())
    result = bmrs.fit(model, AutoTruncatedLogNormal(model), source, epochs=2, batch_size=30, **QUIET)
    assert len(result.history) == 2
    assert result.history.loss.notna().all()


@pytest.mark.slow
def test_regression_fits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), MultiplicativeNoise(10), nn.Linear(10, 1))
    model = Regressor(net)
    x = torch.randn(200, 6)
    y = x[:, :1] * 2 + 0.1 * torch.randn(200, 1)
    guide = AutoTruncatedLogNormal(model)
    result = bmrs.fit(model, guide, (x, y), epochs=60, batch_size=50, learning_rate=1e-2, **QUIET)
    assert evaluate(model, (x, y), guide.mean()).loss < 0.6
    assert math.isnan(result.history.validation_accuracy.iloc[-1])


@pytest.mark.slow
def test_removal_after_each_epoch_is_for_good_and_logged():
    model, guide, result = fitted(
        epochs=60, kl_weight=5.0, criterion=bmrs.BMRS_N(), removal="epoch", keep_best=True
    )
    layer = noise_layers(model)["2"]
    gone = set(range(12)) - set(layer.units[layer.kept].tolist())
    assert gone
    assert layer.features == model.net[0].out_features == 12 - len(gone)
    assert set(result.removals.unit) == gone
    assert not result.removals.unit.duplicated().any()
    assert (result.removals.score >= 0).all()
    assert result.history.kept.is_monotonic_decreasing
    plan = bmrs.reduce(model, guide, bmrs.SNR(1e-9))  # a criterion that removes nothing by itself
    assert set(plan.table.unit[plan.table.removed]) == gone
    assert int((guide.mean()["2"] > 0).sum()) == 12 - len(gone)
    assert result.history.parameters.iloc[-1] == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_what_is_printed_of_a_fit_is_what_reduce_keeps():
    """Without a word about the criterion, which is `reduce`'s own."""
    model, guide, result = fitted(epochs=60, kl_weight=5.0)
    kept = int(bmrs.reduce(model, guide, bmrs.BMRS_N()).widths().after.sum())
    assert kept < 12
    assert f", {kept} structures kept" in str(result)


def test_nothing_is_printed_that_a_fit_does_not_have():
    x, y = data()
    tuned = bmrs.fit(Classifier(nn.Linear(6, 2)), None, (x, y), (x, y), epochs=1, **QUIET)
    assert tuned.history.kept.isna().all()
    assert "structures" not in str(tuned)
    assert "validation accuracy" in str(tuned)
    regression = bmrs.fit(Regressor(nn.Linear(6, 1)), None, (x, x[:, :1]), (x, x[:, :1]), epochs=1, **QUIET)
    assert "accuracy" not in str(regression)
    assert "nan" not in str(regression)


def test_a_score_that_is_not_finite_is_an_error_and_no_missing_count(monkeypatch):
    def fail(*_, **__):
        raise ArithmeticError("a score is not finite")

    monkeypatch.setattr("pyro_bmrs.fitting.epochs.reduce_structures", fail)
    for named in ({}, {"criterion": "BMRS_N"}):
        with pytest.raises(ArithmeticError, match="not finite"):
            fitted(epochs=2, **named)


def test_settings_are_given_whole_or_by_name_and_kept_with_the_fit():
    settings = bmrs.Settings(epochs=2, batch_size=50, kl_weight=3, posterior_learning_rate=0.01)
    given = dict(epochs=4, batch_size=50, learning_rate=1e-2, posterior_learning_rate=5e-2, kl_weight=1.0)
    _, _, result = fitted(**given)
    assert result.settings == bmrs.Settings(**given)
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    result = bmrs.fit(model, guide, data(), None, settings, epochs=1, **QUIET)
    assert result.settings == settings.changed(epochs=1)
    assert len(result.history) == 1
    assert guide.kl_weight == 3.0
    with pytest.raises(TypeError, match="settings must be a Settings or None"):
        bmrs.fit(model, guide, data(), None, {"epochs": 1}, **QUIET)


def test_an_error_inside_a_fit_is_one_line_without_a_table_of_sites():
    x, y = data()
    model = Classifier(network())
    one_hot = nn.functional.one_hot(y, 2).float()
    with pytest.raises(ValueError, match="y") as caught:
        bmrs.fit(model, AutoTruncatedLogNormal(model), (x, one_hot), epochs=1, **QUIET)
    assert "\n" not in str(caught.value)
    assert "Trace Shapes" not in str(caught.value)
    assert "Trace Shapes" in str(caught.value.__cause__)


def test_ctrl_c_leaves_a_usable_state(monkeypatch):
    from pyro_bmrs.fitting import progress

    def stop(self, row, real=progress.EpochProgress.epoch):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.EpochProgress, "epoch", stop)
    model, guide, result = fitted(epochs=50)
    assert result.interrupted
    assert len(result.history) == 3
    assert result.best_epoch in (1, 2, 3)
    assert bmrs.reduce(model, guide, bmrs.BMRS_N()).apply()(torch.zeros(2, 6)).shape == (2, 2)


def test_nan_in_the_data_stops_with_the_last_good_parameters():
    x, y = data()
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, (x, y), epochs=1, batch_size=50, **QUIET)
    x[150] = math.nan
    with pytest.raises(FloatingPointError, match=r"batch \d+ of epoch 1"):
        bmrs.fit(model, guide, (x, y), epochs=3, batch_size=50, progress=False)
    assert all(torch.isfinite(p).all() for p in [*model.parameters(), *guide.parameters()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs must be greater than or equal to 1: got 0"),
        (dict(epochs=2.5), "epochs must be a whole number: got 2.5"),
        (dict(batch_size=-1), "batch_size must be"),
        (dict(learning_rate=math.nan), "learning_rate must be a finite number: got nan"),
        (dict(posterior_learning_rate=-1.0), "posterior_learning_rate"),
        (dict(kl_weight=-0.5), 'kl_weight must be a finite number of 0 or more, or "auto": got -0.5'),
        (dict(warm_up=1.5), "warm_up must be less than or equal to 1: got 1.5"),
        (dict(draws_per_batch=0), "draws_per_batch"),
        (dict(seed=-1), "seed"),
        (dict(schedule="step"), "schedule must be one of constant, cosine, linear or a function: got 'step'"),
        (dict(removal="sometimes"), "removal must be 'end' or 'epoch': got 'sometimes'"),
        (dict(speed=3), "settings must be among epochs, .*: got 'speed'"),
        (dict(keep_checkpoints=0), "keep_checkpoints must be"),
    ],
)
def test_bad_arguments_are_named_before_any_work(options, message):
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        bmrs.fit(model, guide, data(), **{**QUIET, **options})
    assert guide.prototype_trace is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_data_and_models_are_named():
    x, y = data()
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    plain = Classifier(nn.Linear(6, 2))
    for arguments, error, message in (
        ((model, guide, (x, y[:5])), ValueError, "train must have as many labels"),
        ((model, guide, (x[:0], y[:0])), ValueError, "train must not be empty"),
        ((model, guide, (x, y, y)), TypeError, "train must be"),
        ((model, guide, (x, y), (x[:0], y[:0])), ValueError, "validation must not be empty"),
        ((model, None, (x, y)), ValueError, "guide must be given"),
        ((plain, guide, (x, y)), ValueError, r"guide must have no latents but the model's: it has \['2'\]"),
        (("model", guide, (x, y)), TypeError, "model must be a Pyro model: got str"),
        ((lambda x, y: None, None, (x, y)), ValueError, "model must observe y"),
        ((model, "guide", (x, y)), TypeError, "guide must be"),
    ):
        with pytest.raises(error, match=message):
            bmrs.fit(*arguments, epochs=1, progress=False)


def test_fine_tuning_is_a_fit_without_a_guide():
    model = Classifier(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)))
    result = bmrs.fit(model, None, data(), data(100, 1), epochs=20, batch_size=50, learning_rate=1e-2,
                      schedule="cosine", **QUIET)  # fmt: skip
    assert set(result.history.phase) == {"fine-tune"}
    assert (
        result.history.validation_accuracy.max() == result.history.validation_accuracy[result.best_epoch - 1]
    )
    assert evaluate(model, data(300, 5)).accuracy > 0.9


def test_parameters_that_blow_up_in_the_last_step_are_no_success():
    model = Classifier(nn.Linear(6, 2))
    x, y = data()
    with pytest.raises(FloatingPointError, match=r"not finite after epoch 1|loss became"):
        bmrs.fit(model, None, (x * 1e30, y), epochs=1, batch_size=200, learning_rate=1e38, progress=False)


@pytest.mark.slow
def test_the_floor_holds_while_removing():
    model, guide, _ = fitted(
        epochs=40, kl_weight=500.0, criterion=bmrs.BMRS_N(), removal="epoch", min_kept=3, keep_best=False
    )
    assert int(noise_layers(model)["2"].kept.sum()) >= 3
    assert (guide.mean()["2"] > 0).sum() >= 3


def test_looking_at_a_model_changes_nothing():
    """reduce, apply, evaluate and the curve leave BatchNorm statistics, generators and Pyro's store alone."""
    from pyro_bmrs.quality import compression_curve

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 8), nn.BatchNorm1d(8, affine=False),
        nn.ReLU(), MultiplicativeNoise(8), nn.Linear(8, 2),
    )  # fmt: skip
    model = Classifier(net).train()
    guide = AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, data(), epochs=2, **QUIET)
    pyro.clear_param_store()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    for criterion in (bmrs.WeightNorm(0.3), bmrs.BMRS_N(), bmrs.SNR(1e-9)):
        plan = bmrs.reduce(model, guide, criterion)
        plan.apply()
    compression_curve(model, plan, data(50, 3), points=3)
    evaluate(model, data(50, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())


def test_a_param_that_no_module_holds_is_refused():
    """It would not be trained, and be lost with the fit's parameter store."""

    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, y=None):
            logits = self.net(x) * pyro.param("temperature", torch.tensor(1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)

    model = Loose()
    with pytest.raises(TypeError, match=r"model has the pyro\.param 'temperature'"):
        bmrs.fit(model, AutoTruncatedLogNormal(model), data(), epochs=1, **QUIET)

    def guide(x, y=None):
        loc = pyro.param("loc", torch.zeros(12))
        pyro.sample("2", bmrs.TruncatedLogNormal(loc, torch.tensor(0.1)).to_event(1))

    with pytest.raises(TypeError, match=r"guide has the pyro\.param 'loc'"):
        bmrs.fit(Classifier(network()), guide, data(), epochs=1, **QUIET)


class Mixed(nn.Module):
    """Noise layers beside a Bayesian weight and a latent of each example."""

    def __init__(self, local=False):
        super().__init__()
        self.net, self.local = network(), local

    def forward(self, x, y=None):
        w = pyro.sample("w", pyro.distributions.Normal(0.0, 10.0))
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0)) if self.local else 0.0
            shift = torch.stack([0.0 * w + torch.zeros(len(x)), w + z + torch.zeros(len(x))], 1)
            pyro.sample("y", pyro.distributions.Categorical(logits=logits + shift), obs=y)


def test_other_latents_are_drawn_from_the_guide_in_validation_and_the_weight_is_noted():
    from pyro.infer.autoguide import AutoGuideList, AutoNormal

    model = Mixed()
    guide = AutoGuideList(model)
    guide.append(AutoTruncatedLogNormal(pyro.poutine.block(model, expose=["net.2"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["w"]), init_scale=0.01))
    result = bmrs.fit(model, guide, data(), data(100, 1), epochs=8, kl_weight=3.0, progress=False)
    # a draw of w from its prior costs many nats an example
    assert result.history.validation_loss.max() < 2.0
    assert bmrs.reduce(model, guide, bmrs.BMRS_N(), *data(20)).rule.kl_weight == 3.0


def test_the_kl_of_a_latent_of_one_example_belongs_to_its_batch():
    from pyro_bmrs.fitting.objective import Objective
    from pyro_bmrs.inference.sites import read_sites

    model = Mixed(local=True)
    bmrs.name_sites(model)
    x, y = data(8)
    trace = pyro.poutine.trace(model).get_trace(x, y)
    assert read_sites(trace).local(8) == {"z"}

    def guide(x, y=None):
        pyro.sample("w", pyro.distributions.Normal(0.0, 10.0))
        pyro.sample("net.2", bmrs.LogUniform().expand([12]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(3.0, 1.0))

    loss, likelihood = Objective(
        model, guide, (x, y), dataset_size=800, draws=1, local_sites=frozenset({"z"})
    )(x, y, 1.0)
    assert loss.item() + likelihood == pytest.approx(4.5, rel=1e-4)


def test_nothing_is_touched_where_the_first_epoch_fails():
    x, y = data()
    x[199] = math.nan
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="epoch 1"):
        bmrs.fit(model, guide, (x, y), epochs=1, batch_size=10, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fine_tuning_may_keep_its_first_epochs():
    """There is no KL to warm up without a guide, so every epoch is a candidate."""
    x, y = data(60)
    noise = torch.randint(2, (60,), generator=torch.Generator().manual_seed(0))
    model = Classifier(nn.Linear(6, 2))
    result = bmrs.fit(model, None, (x, noise), (x, y), epochs=12, learning_rate=0.3, progress=False)
    accuracy = result.history.validation_accuracy
    assert accuracy[result.best_epoch - 1] == accuracy.max()


def test_samplers_loaders_and_batches_of_other_forms():
    x, y = data(100)
    dataset = TensorDataset(x, y)
    from torch.utils.data import SubsetRandomSampler

    from pyro_bmrs.inference.batches import Batches

    loader = DataLoader(dataset, sampler=SubsetRandomSampler(range(20)))
    assert Batches(loader, 1, torch.device("cpu"), "train").size == 20
    model = Classifier(network())
    guide = AutoTruncatedLogNormal(model)
    with pytest.raises(ValueError, match="train must give at least one batch"):
        bmrs.fit(model, guide, DataLoader(dataset, batch_size=128, drop_last=True), epochs=1, **QUIET)

    class Dicts(Pairs):
        def __getitem__(self, index):
            return {"x": x[index], "y": y[index]}

    with pytest.raises(TypeError, match=r"train must give batches \(x, y\): got dict"):
        bmrs.fit(model, guide, Dicts(), epochs=1, **QUIET)

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            return x[index] * 0, y[index]

    (first, _) = Batches(Augmented(x, y), 10, torch.device("cpu"), "train").first()
    assert not first.any()


def test_torchs_own_validation_setting_is_left_as_found():
    Distribution = torch.distributions.Distribution  # noqa: N806 a class
    before = Distribution._validate_args
    try:
        for setting in (False, True):
            Distribution.set_default_validate_args(setting)
            fitted(epochs=1)
            assert Distribution._validate_args is setting
    finally:
        Distribution.set_default_validate_args(before)
