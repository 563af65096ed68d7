"""What an independent reader found by trying: each of these went wrong once."""

import math
import os
import signal
import warnings

import pyro
import pytest
import torch
from torch import nn
from two_processes import data

import pyro_bmrs as bmrs
from pyro_bmrs.files import FolderInUseError, NewerFileError, held, read_tensors, write_tensors
from pyro_bmrs.fitting.epochs import Measure
from pyro_bmrs.fitting.objective import Objective

OPTIONS = dict(
    epochs=6, batch_size=50, learning_rate=1e-2, posterior_learning_rate=5e-2, kl_weight=20.0, progress=False
)


def made(net=None):
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Linear(6, 12), nn.Tanh(), bmrs.MultiplicativeNoise(12), nn.Linear(12, 2))
    model = bmrs.Classifier(net)
    return model, bmrs.AutoTruncatedLogNormal(model)


def test_other_data_of_the_same_size_are_another_fit(tmp_path):
    bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"holds another fit .*first_batch"):
        bmrs.fit(*made(), data(200, 1), checkpoints=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"holds another fit .*validation_examples 0 → 100"):
        bmrs.fit(*made(), data(200, 0), data(100, 1), checkpoints=tmp_path, **OPTIONS)


def test_checkpoints_that_another_process_writes_are_refused(tmp_path):
    with (
        held("checkpoints", tmp_path),
        pytest.raises(FolderInUseError, match="checkpoints must be a folder that no"),
    ):
        bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())
    bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **OPTIONS)


class Half:
    """A schedule, and a criterion, whose text would hold an address."""

    unit = "nothing"

    def __call__(self, given):
        if isinstance(given, float):
            return 0.5
        return {name: torch.full(layer.kept.shape, -1.0) for name, layer in given.items()}


def test_objects_as_schedule_and_criterion_can_go_on_and_two_functions_differ(tmp_path):
    options = {**OPTIONS, "schedule": Half(), "criterion": Half()}
    first = bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **options)
    options |= {"schedule": Half(), "criterion": Half()}
    again = bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **options)
    assert again.history.equals(first.history)
    for name, schedule in (("one", lambda done: 1.0), ("other", lambda done: 1.0 - done)):
        folder = tmp_path / "functions"
        call = dict(checkpoints=folder, **{**OPTIONS, "schedule": schedule})
        if name == "one":
            bmrs.fit(*made(), data(200, 0), **call)
        else:
            with pytest.raises(ValueError, match=r"holds another fit .*schedule"):
                bmrs.fit(*made(), data(200, 0), **call)


def test_a_schedule_of_nonsense_is_named():
    with pytest.raises(ValueError, match="schedule must give finite factors"):
        bmrs.fit(*made(), data(200, 0), **{**OPTIONS, "schedule": lambda done: math.nan})


class Penalised(nn.Sequential):
    def forward(self, x):
        pyro.factor("penalty", -10.0 * self[0].weight.square().sum())
        return super().forward(x)


def test_the_fused_path_is_not_taken_where_the_model_says_more_than_its_likelihood():
    net = Penalised(nn.Linear(6, 12), nn.Tanh(), bmrs.MultiplicativeNoise(12), nn.Linear(12, 2))
    model, guide = made(net)
    x, y = data(50, 0)
    guide(x, y)
    assert Objective(model, guide, (x, y), dataset_size=50).elbo == "packed"
    model, guide = made()
    guide(x, y)
    assert Objective(model, guide, (x, y), dataset_size=50).elbo == "fused"
    model.register_forward_pre_hook(lambda module, arguments: None)
    assert Objective(model, guide, (x, y), dataset_size=50).elbo == "packed"


@pytest.mark.parametrize("error", [RuntimeError("validation failed"), KeyboardInterrupt()])
def test_an_error_in_the_epoch_of_a_shrink_is_itself_and_leaves_a_usable_model(monkeypatch, error):
    real = Measure.row

    def fail(measure, epoch, *others):
        if measure.model.net[0].out_features < 12:
            raise error
        return real(measure, epoch, *others)

    monkeypatch.setattr(Measure, "row", fail)
    model, guide = made()
    options = {**OPTIONS, "epochs": 40, "removal": "epoch", "criterion": bmrs.BMRS_N(), "kl_weight": 5.0}
    if isinstance(error, KeyboardInterrupt):
        assert bmrs.fit(model, guide, data(200, 0), **options).interrupted
    else:
        with pytest.raises(RuntimeError, match="validation failed"):
            bmrs.fit(model, guide, data(200, 0), **options)
    assert model.net[0].out_features < 12
    assert model(torch.zeros(2, 6)).shape == (2, 2)
    assert bmrs.reduce(model, guide, bmrs.BMRS_N()).apply()(torch.zeros(2, 6)).shape == (2, 2)


def test_a_checkpoint_of_a_newer_version_is_refused_and_stays(tmp_path):
    bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **OPTIONS)
    newest = max(tmp_path.glob("epoch-*"))
    header, tensors = read_tensors(newest)
    write_tensors(newest, tensors, {**header, "version": 99})
    before = newest.read_bytes()
    with pytest.raises(NewerFileError, match="99"):
        bmrs.fit(*made(), data(200, 0), checkpoints=tmp_path, **OPTIONS)
    assert newest.read_bytes() == before


def test_a_damaged_best_checkpoint_does_not_stop_the_fit_for_ever(tmp_path):
    options = {**OPTIONS, "keep_checkpoints": 1, "warm_up": 0.0, "kl_weight": 0.0}
    x, y = data(100, 1)
    contrary = x, 1 - y  # the more is learned the worse it is
    first = bmrs.fit(*made(), data(200, 0), contrary, checkpoints=tmp_path, **options)
    assert first.best_epoch < 6
    best = tmp_path / f"epoch-{first.best_epoch:04d}.safetensors"
    best.write_bytes(best.read_bytes()[:100])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = bmrs.fit(*made(), data(200, 0), contrary, checkpoints=tmp_path, **options)
    assert any("best checkpoint" in str(warning.message) for warning in caught)
    assert len(again.history) == 6


def test_a_signal_in_the_last_epoch_is_not_lost(monkeypatch):
    real = Measure.row

    def stopped(measure, epoch, *others):
        if epoch == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(measure, epoch, *others)

    monkeypatch.setattr(Measure, "row", stopped)
    assert bmrs.fit(*made(), data(200, 0), **OPTIONS).interrupted


def test_a_refused_fit_leaves_the_guides_kl_weight(tmp_path):
    model, guide = made()
    bmrs.fit(model, guide, data(200, 0), **OPTIONS)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoints must be a folder"):
        bmrs.fit(model, guide, data(200, 0), checkpoints=tmp_path / "file", epochs=1, progress=False)
    model.register_forward_pre_hook(lambda module, arguments: None)
    with pytest.raises(ValueError, match="elbo must be one"):
        bmrs.fit(model, guide, data(200, 0), elbo="fused", epochs=1, progress=False)
    assert guide.kl_weight == 20.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(checkpoints=5), "checkpoints must be a folder"),
        (dict(label=3), "label must be text"),
        (dict(logger="csv"), "logger must be one of lightning-fabric's"),
        (dict(schedule=[]), "schedule must be one of"),
        (dict(stratified="no"), "stratified must be True or False"),
        (dict(weight_decay=-0.1), "weight_decay must be greater than or equal to 0: got -0.1"),
        (dict(gradient_clip=True), "gradient_clip must be a number or None: got True"),
        (dict(accumulate=0), "accumulate must be greater than or equal to 1: got 0"),
        (dict(patience=0), "patience must be greater than or equal to 1 or None: got 0"),
        (dict(device="cuda" if not torch.cuda.is_available() else "xpu"), "can't be used here"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bmrs.fit(*made(), data(200, 0), **{**OPTIONS, **options})


def test_the_csv_logger_has_a_line_for_each_epoch(tmp_path):
    from lightning_fabric.loggers.csv_logs import CSVLogger

    bmrs.fit(*made(), data(200, 0), logger=CSVLogger(tmp_path), **OPTIONS)
    (path,) = tmp_path.rglob("metrics.csv")
    assert len(path.read_text().splitlines()) == 7


def test_layers_in_place_may_stand_behind_noise():
    net = nn.Sequential(
        nn.Linear(6, 1024), nn.ReLU(), bmrs.MultiplicativeNoise(1024), nn.Dropout(0.1, inplace=True),
        nn.Linear(1024, 2),
    )  # fmt: skip
    result = bmrs.fit(*made(net), data(256, 0), **{**OPTIONS, "epochs": 1, "batch_size": 128})
    assert math.isfinite(result.history.loss.iloc[0])
