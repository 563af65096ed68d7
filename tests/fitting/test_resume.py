"""A fit that is interrupted and called again ends as if nothing had happened, bit for bit."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from small_fits import CASES, SmallFit, data

import pyro_bmrs as bmrs
from pyro_bmrs import Classifier
from pyro_bmrs.files import read_tensors, write_tensors
from pyro_bmrs.fitting.checkpoints import Checkpoints
from pyro_bmrs.fitting.epochs import Measure
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.fitting.progress import EpochProgress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each case: result, tensors and folder of a fit that nobody interrupts."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def of(case):
        if case not in made:
            # as a process of its own would make it
            made[case] = (*SmallFit(case).run(folder / case), folder / case)
        return made[case]

    return of


class Ask:
    """Send this process signals when so many steps of a fit are done, or when an epoch is."""

    def __init__(self, number=signal.SIGTERM, *, step=None, epoch=None, times=1):
        self.number, self.at_step, self.at_epoch, self.times, self.steps = number, step, epoch, times, 0

    def send(self):
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        step, epoch = EpochProgress.step, EpochProgress.epoch

        def at_step(display):
            step(display)
            self.steps += 1
            if self.steps == self.at_step:
                self.send()

        def at_epoch(display, row):
            epoch(display, row)
            if row["epoch"] == self.at_epoch:
                self.send()

        self.patch.setattr(EpochProgress, "step", at_step)
        self.patch.setattr(EpochProgress, "epoch", at_epoch)
        return self

    def __exit__(self, *error):
        self.patch.undo()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def newest(folder):
    return Checkpoints(folder, 1, {})._paths()[0]


def without_batches(folder):
    """What stands after each epoch: where a fit was interrupted is not in these names."""
    return [name for name in names(folder) if "batch" not in name]


def state(folder):
    """The tensors of the newest checkpoint, the optimiser's among them, and its progress but for seconds."""
    header, tensors = read_tensors(newest(folder))
    progress = header["progress"]
    for row in progress["history"]:
        del row["seconds"]
    return tensors, progress


def same(one, other, folder, other_folder):
    """Bit for bit: what a fit returns, leaves in model and guide, and leaves on disk."""
    (result, tensors), (expected, expected_tensors) = one, other
    equal(tensors, expected_tensors)
    pd.testing.assert_frame_equal(
        result.history.drop(columns="seconds"), expected.history.drop(columns="seconds"), check_exact=True
    )
    assert (result.history.seconds > 0).all()
    pd.testing.assert_frame_equal(result.removals, expected.removals, check_exact=True)
    assert result.best_epoch == expected.best_epoch
    assert (result.stopped_early, result.interrupted) == (expected.stopped_early, False)
    assert result.settings == expected.settings
    assert (folder / "ledger.csv").read_bytes() == (other_folder / "ledger.csv").read_bytes()
    assert without_batches(folder)[-2:] == without_batches(other_folder)[-2:]
    assert not any(name.startswith(".") for name in names(folder))
    (found, progress), (wanted, wanted_progress) = state(folder), state(other_folder)
    equal(found, wanted)
    assert str(progress) == str(wanted_progress)  # NaN are alike


def interrupted(case, folder, ask, **options):
    fit = SmallFit(case)
    with ask:
        result, tensors = fit.run(folder, **options)
    assert result.interrupted
    return fit, result, tensors


WHEN = {
    "after an epoch": dict(epoch=2),
    "within the first epoch": dict(step=3),
    "within an epoch": dict(step=13),
    "at the last step of an epoch": dict(step=15),
}


def quick_or_slow():
    """Most cases within an epoch, one at every moment; all at all of them among the slow tests."""
    for case in CASES:
        for when in WHEN:
            rare = case in ("packed", "pyro", "bf16", "frozen", "last")
            quick = case == "removal" or (when == "within an epoch" and not rare)
            yield pytest.param(case, when, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "when"), list(quick_or_slow()))
def test_interrupted_and_called_again_it_ends_as_if_never_stopped(case, when, whole, tmp_path):
    """By SIGTERM; the second call has a model with other weights, which is as a new process would be."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole(case)
    _, result, _ = interrupted(case, folder, Ask(**WHEN[when]))
    finished = {"after an epoch": 2, "within the first epoch": 0, "within an epoch": 2}.get(when, 3)
    assert len(result.history) == finished
    assert (folder / "epoch-0002.safetensors").exists() == (finished >= 2)
    steps = {
        "within an epoch": "epoch-0002-batch-00000[34]",
        "within the first epoch": "epoch-0000-batch-00000[34]",
    }
    found = [name for name in names(folder) if "batch" in name]
    assert bool(found) == (when in steps)
    assert all(re.match(steps[when], name) for name in found)
    again = SmallFit(case, seed=5).run(folder)
    same(again, expected, folder, expected_folder)


@pytest.mark.parametrize("case", ["removal", pytest.param("statistics", marks=pytest.mark.slow)])
def test_by_ctrl_c_too_and_any_number_of_times(case, whole, tmp_path):
    folder, when = tmp_path / "fit", [1, 1, 3, 4, 5, 7, 2]
    *expected, expected_folder = whole(case)
    for number, step in zip([signal.SIGINT, signal.SIGTERM] * 4, when, strict=False):
        interrupted(case, folder, Ask(number, step=step))
    again = SmallFit(case).run(folder)
    same(again, expected, folder, expected_folder)


def test_a_second_ctrl_c_ends_it_at_once_and_loses_less_than_an_epoch(whole, tmp_path):
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    _, result, _ = interrupted("removal", folder, Ask(signal.SIGINT, step=13, times=2))
    assert len(result.history) == 2
    assert not any("batch" in name for name in names(folder))
    same(SmallFit("removal").run(folder), expected, folder, expected_folder)


def test_asked_to_stop_when_all_is_done(whole, tmp_path):
    """It was interrupted, so that who called it stops too; the next call has nothing left to do."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    _, result, tensors = interrupted("removal", folder, Ask(signal.SIGINT, epoch=5))
    assert len(result.history) == 5
    equal(tensors, expected[1])
    with Ask() as steps:
        again = SmallFit("removal").run(folder)
    assert steps.steps == 0
    same(again, expected, folder, expected_folder)


def test_a_signal_from_the_data_is_answered_after_the_step(whole, tmp_path):
    """As one that comes while a batch is read."""
    folder, asked = tmp_path / "fit", []
    *expected, expected_folder = whole("dataset")
    fit = SmallFit("dataset")
    source = fit.source

    class Alarming(source):
        def __getitem__(self, index):
            asked.append(index)
            if len(asked) == 20 + 95 + 30:  # the first of all batches is looked at before
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    fit.source = Alarming
    result, _ = fit.run(folder)
    assert result.interrupted
    assert "epoch-0001-batch-000002.safetensors" in names(folder)
    same(SmallFit("dataset").run(folder), expected, folder, expected_folder)


def test_the_handlers_of_the_process_are_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupted("plain", tmp_path / "fit", Ask(step=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_a_fit_runs_without_catching_signals(whole, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(SmallFit("plain").run(tmp_path / "fit")))
    thread.start()
    thread.join(60)
    *expected, expected_folder = whole("plain")
    same(found[0], expected, tmp_path / "fit", expected_folder)


@pytest.mark.parametrize("case", ["plain", "removal", "statistics", "inserted"])
def test_what_an_interrupted_fit_leaves_is_its_best_epoch(case, tmp_path):
    """And it can be used: reduced, cut, asked."""
    folder = tmp_path / "fit"
    fit, result, tensors = interrupted(case, folder, Ask(step=13))
    _, best = read_tensors(folder / f"epoch-{result.best_epoch:04d}.safetensors")
    assert result.best_epoch in (1, 2)
    equal(tensors, {name: t for name, t in best.items() if name.startswith(("model.", "guide."))})
    plan = bmrs.reduce(fit.model, fit.guide, bmrs.BMRS_N())
    assert plan.apply()(torch.zeros(3, 6)).shape == (3, 2)
    assert not any(name.startswith(".") for name in names(folder))
    assert "interrupted" in str(result)


def test_before_its_first_epoch_is_done_it_leaves_what_it_was_given(tmp_path):
    fit = SmallFit("plain")
    given = {name: tensor.clone() for name, tensor in fit.model.state_dict().items()}
    with Ask(step=2):
        fit.run(tmp_path / "fit")
    equal(dict(fit.model.state_dict()), given)
    # stopped twice in it, too
    fit = SmallFit("plain", seed=4)
    given = {name: tensor.clone() for name, tensor in fit.model.state_dict().items()}
    with Ask(step=1):
        fit.run(tmp_path / "fit")
    equal(dict(fit.model.state_dict()), given)


def test_without_checkpoints_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Ask(step=7):
        result, _ = SmallFit("removal").run(None)
    assert result.interrupted
    assert names(tmp_path) == []


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """The folder of a fit that was interrupted in its second epoch; to be copied."""
    folder = tmp_path_factory.mktemp("halfway") / "fit"
    interrupted("removal", folder, Ask(step=8))
    return folder


@pytest.mark.parametrize("case", ["plain", "rising", "removal", "patience", "no guide", "last"])
def test_a_finished_fit_returns_at_once(case, whole, tmp_path, monkeypatch):
    first, tensors, made = whole(case)
    folder = Path(shutil.copytree(made, tmp_path / "fit"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    forward = Objective.forward

    def refuse(*_):
        pytest.fail("a step was made")

    monkeypatch.setattr(Objective, "forward", refuse)
    again = SmallFit(case, seed=3).run(folder)
    monkeypatch.setattr(Objective, "forward", forward)
    same(again, (first, tensors), folder, made)
    assert again[0].history.seconds.tolist() == first.history.seconds.tolist()
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before


IN_A_PROCESS = """
import sys
import torch
from small_fits import SmallFit
torch.set_num_threads(1)
result, _ = SmallFit(sys.argv[1]).run(sys.argv[2], progress=True)
print(len(result.history), result.interrupted)
"""


@pytest.mark.slow
def test_from_process_to_process(whole, tmp_path):
    """The first is stopped by SIGTERM from outside; this one goes on."""
    case, folder = "removal", tmp_path / "fit"
    *expected, expected_folder = whole(case)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS, case, folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert "epoch 1/5" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    told, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    epochs, was_interrupted = told.split()
    assert was_interrupted == "True"
    assert 1 <= int(epochs) < 5
    with Ask() as steps:
        again = SmallFit(case, seed=8).run(folder)
    assert steps.steps <= 5 * (5 - int(epochs))
    same(again, expected, folder, expected_folder)


# which files stay, and which are believed ---------------------------------------------------------------


def with_best(monkeypatch, *scores):
    """Let the epochs have these scores: the least is the best."""
    monkeypatch.setattr(Measure, "score", lambda self, row: scores[row["epoch"] - 1])


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_only_the_newest_and_the_best_stay(keep, tmp_path, monkeypatch):
    with_best(monkeypatch, 1.0, 0.5, 0.7, 0.6, 0.8)
    folder, seen = tmp_path / "fit", []
    save = Checkpoints.save

    def saved(*arguments):
        path = save(*arguments)
        seen.append([name for name in names(folder) if name.startswith("epoch-")])
        return path

    monkeypatch.setattr(Checkpoints, "save", saved)
    result, tensors = SmallFit("plain").run(folder, keep_checkpoints=keep, warm_up=0.0)
    assert result.best_epoch == 2
    for epoch, found in enumerate(seen, 1):
        best = 1 if epoch == 1 else 2
        kept = {*range(max(1, epoch - keep + 1), epoch + 1), best}
        # nor is anything lost that one of these would need
        extra = {1} if epoch - keep + 1 <= 1 else set()
        assert {f"epoch-{n:04d}.safetensors" for n in kept} <= set(found)
        assert set(found) <= {f"epoch-{n:04d}.safetensors" for n in kept | extra}
    _, best = read_tensors(folder / "epoch-0002.safetensors")
    equal(tensors, {name: t for name, t in best.items() if name.startswith(("model.", "guide."))})


def truncate(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize(("case", "share"), [("removal", 0.0), ("removal", 0.0005), ("inserted", 0.6)])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(case, share, whole, tmp_path):
    folder = tmp_path / "fit"
    *expected, expected_folder = whole(case)
    interrupted(case, folder, Ask(step=18))
    damaged = newest(folder)
    assert "epoch-0003-batch-00000" in damaged.name
    truncate(damaged, share)
    with pytest.warns(UserWarning, match=rf"checkpoint .*{damaged.name} can't be used, the one before it is"):
        again = SmallFit(case).run(folder)
    same(again, expected, folder, expected_folder)


def test_the_best_epoch_of_the_checkpoint_before_is_still_there(tmp_path, monkeypatch):
    """The newest, damaged, was the best itself: the one before needs the one that was best before it."""
    with_best(monkeypatch, 0.5, 0.7, 0.2, 0.6, 0.4)
    whole, folder = tmp_path / "whole", tmp_path / "fit"
    expected = SmallFit("plain").run(whole, warm_up=0.0)
    assert expected[0].best_epoch == 3
    interrupted("plain", folder, Ask(epoch=3), warm_up=0.0)
    truncate(folder / "epoch-0003.safetensors")
    with pytest.warns(UserWarning, match=r"epoch-0003\.safetensors can't be used"):
        again = SmallFit("plain").run(folder, warm_up=0.0)
    same(again, expected, folder, whole)


@pytest.mark.parametrize("epoch", [4, 5])
def test_a_damaged_best_epoch_is_named_and_no_other_taken_for_it(epoch, tmp_path, monkeypatch):
    """The best of what is left is kept, and told as what it is; a finished fit has its last epoch."""
    with_best(monkeypatch, 0.5, 0.7, 0.6, 0.8, 0.7)
    folder = tmp_path / "fit"
    with Ask(epoch=epoch):
        result, _ = SmallFit("plain").run(folder, warm_up=0.0)
    assert result.best_epoch == 1
    assert without_batches(folder) == [
        *(f"epoch-000{n}.safetensors" for n in (1, epoch - 1, epoch)), "ledger.csv"
    ]  # fmt: skip
    truncate(folder / "epoch-0001.safetensors")
    with pytest.warns(UserWarning, match=r"best checkpoint .*epoch-0001\.safetensors can't be used"):
        result, tensors = SmallFit("plain").run(folder, warm_up=0.0)
    assert result.best_epoch == 5
    _, last = read_tensors(folder / "epoch-0005.safetensors")
    equal(tensors, {name: t for name, t in last.items() if name.startswith(("model.", "guide."))})


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_do_not_crowd_out_what_is_saved_after_them(keep, whole, tmp_path):
    """The fit starts anew before them, and is stopped again before it has come so far."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    interrupted("removal", folder, Ask(step=24))
    for path in folder.glob("epoch-*"):
        truncate(path)
    with pytest.warns(UserWarning, match="can't be used"):
        interrupted("removal", folder, Ask(step=9), keep_checkpoints=keep)
    with pytest.warns(UserWarning, match="can't be used"), Ask() as steps:
        again = SmallFit("removal").run(folder)
    assert steps.steps == 25 - 9
    same(again, expected, folder, expected_folder)


def test_where_none_is_whole_the_fit_starts_anew(whole, tmp_path):
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    interrupted("removal", folder, Ask(step=18))
    damaged = sorted(folder.glob("epoch-*"))
    for path in damaged:
        truncate(path)
    with pytest.warns(UserWarning, match="can't be used") as caught:
        again = SmallFit("removal").run(folder)
    told = " ".join(str(warning.message) for warning in caught)
    assert all(path.name in told for path in damaged)
    # the ledger does not have the rows of before twice
    assert (folder / "ledger.csv").read_bytes() == (expected_folder / "ledger.csv").read_bytes()
    pd.testing.assert_frame_equal(again[0].removals, expected[0].removals)
    equal(again[1], expected[1])


def test_foreign_files_are_left_alone_and_not_believed(whole, tmp_path):
    folder = tmp_path / "fit"
    *expected, _ = whole("plain")
    interrupted("plain", folder, Ask(step=8))
    foreign = {
        "notes.txt": b"mine", "epoch-0009.txt": b"x", "best.safetensors": b"x", "epoch-.safetensors": b"",
        ".hidden": b"mine", ".epoch": b"mine", "epoch-0009-batch-x.safetensors": b"",
    }  # fmt: skip
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    # of its own name, but not written by a fit, or without what one needs
    save_file({"x": torch.zeros(2)}, folder / "epoch-0008.safetensors")
    write_tensors(folder / "epoch-0009.safetensors", {"x": torch.zeros(2)}, {"format": "another"})
    header, tensors = read_tensors(folder / "epoch-0001.safetensors")
    write_tensors(folder / "epoch-0006.safetensors", tensors, {**header, "progress": {"speed": 7}})
    with pytest.warns(UserWarning, match="can't be used") as caught:
        result, found = SmallFit("plain").run(folder)
    told = " ".join(str(warning.message) for warning in caught)
    assert all(f"epoch-000{n}.safetensors" in told for n in (6, 8, 9))
    assert len(result.history) == 5
    equal(found, expected[1])
    assert all((folder / name).read_bytes() == content for name, content in foreign.items())


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    """It is no damage: going on from before it would throw away what another version has done."""
    folder = tmp_path / "fit"
    interrupted("plain", folder, Ask(epoch=2))
    header, tensors = read_tensors(folder / "epoch-0002.safetensors")
    write_tensors(folder / "epoch-0003.safetensors", tensors, {**header, "version": 99})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"epoch-0003\.safetensors was written by a newer pyro_bmrs"):
            SmallFit("plain").run(folder, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(kl_weight=3.0), "kl_weight 20.0 → 3.0"),
        (dict(epochs=6), "epochs 5 → 6"),
        (dict(seed=4), "seed 0 → 4"),
        (dict(label="another"), "label '' → 'another'"),
        (dict(criterion=bmrs.SNR()), "criterion 'BMRS_N"),
        (dict(gradient_clip=1.0, patience=3), "gradient_clip None → 1.0; patience None → 3"),
        (dict(schedule="cosine"), "schedule"),
        (dict(schedule=lambda done: 1.0 - done / 2), "schedule"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_fit_is_refused_naming_what_differs(options, named, finished, whole, halfway, tmp_path):
    """Nothing on disk and nothing of the model is touched."""
    folder = Path(shutil.copytree(whole("removal")[2] if finished else halfway, tmp_path / "fit"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fit = SmallFit("removal", seed=6)
    weights = {name: tensor.clone() for name, tensor in fit.model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        fit.run(folder, **options)
    assert str(folder) in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    equal(dict(fit.model.state_dict()), weights)


def test_other_examples_and_another_network_are_refused(tmp_path):
    folder = tmp_path / "fit"
    interrupted("plain", folder, Ask(step=8))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fewer = SmallFit("plain")
    fewer.source = lambda: data(80)
    with pytest.raises(ValueError, match="examples 95 → 80"):
        fewer.run(folder)
    for other in ("statistics", "inserted"):
        stranger = SmallFit("plain")
        stranger.model = Classifier(CASES[other][0]())
        stranger.guide = bmrs.AutoTruncatedLogNormal(stranger.model)
        given = {name: tensor.clone() for name, tensor in stranger.model.state_dict().items()}
        with pytest.raises(ValueError, match=r"checkpoint .*epoch-0001-batch-.* belongs to another network"):
            stranger.run(folder)
        equal(dict(stranger.model.state_dict()), given)
    tuning = SmallFit("no guide")
    with pytest.raises(ValueError, match="phase 'fit' → 'fine-tune'"):
        tuning.run(folder, schedule="constant")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_overwrite_starts_anew_but_not_again_and_again(whole, tmp_path):
    """Where the fit is another or done; where it is this very one, interrupted, it goes on."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    # another
    interrupted("removal", folder, Ask(step=23), kl_weight=3.0)
    _, result, _ = interrupted("removal", folder, Ask(step=8), overwrite=True)
    assert len(result.history) == 1
    assert [name for name in names(folder) if "000" in name] == [
        "epoch-0001-batch-000003.safetensors", "epoch-0001.safetensors"
    ]  # fmt: skip
    # this one
    with Ask(step=1) as steps:
        steps.number = signal.SIGTERM
        result, _ = SmallFit("removal").run(folder, overwrite=True)
    assert result.interrupted
    assert "epoch-0001-batch-000004.safetensors" in names(folder)
    same(SmallFit("removal").run(folder, overwrite=True), expected, folder, expected_folder)
    # done
    with Ask() as steps:
        again = SmallFit("removal").run(folder, overwrite=True)
    assert steps.steps == 25
    same(again, expected, folder, expected_folder)


def test_overwrite_removes_damaged_ones_without_a_word(whole, tmp_path):
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("plain")
    interrupted("plain", folder, Ask(step=12), kl_weight=3.0)
    for path in folder.glob("epoch-*"):
        truncate(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SmallFit("plain").run(folder, overwrite=True)
    same(again, expected, folder, expected_folder)


def test_the_ledger_forgets_what_has_to_happen_again(whole, tmp_path, monkeypatch):
    """The process ends after the rows of an epoch are on disk, and before its checkpoint is."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    at = expected[0].removals.epoch.unique().tolist()
    assert len(at) > 2
    save = Checkpoints.save

    class Died(BaseException):
        pass

    for epoch in at:

        def die(checkpoints, progress, tensors, epoch=epoch):
            if progress.epoch == epoch:
                raise Died
            return save(checkpoints, progress, tensors)

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", die)
            with pytest.raises(Died):
                SmallFit("removal").run(folder)
        noted = pd.read_csv(folder / "ledger.csv", dtype={"layer": str})
        assert noted.epoch.max() == epoch
    same(SmallFit("removal").run(folder), expected, folder, expected_folder)


def test_the_ledger_has_the_rows_of_the_result_and_nothing_twice(whole):
    result, _, folder = whole("removal")
    noted = pd.read_csv(folder / "ledger.csv", dtype={"layer": str})
    pd.testing.assert_frame_equal(noted, result.removals, check_exact=True)
    assert not noted.duplicated(["layer", "unit"]).any()


def test_temporary_files_of_a_killed_process_do_not_stay(whole, tmp_path):
    """Half-written ones, as `kill -9` leaves them; what is not ours is left alone."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("plain")
    interrupted("plain", folder, Ask(step=8))
    left = [
        ".epoch-0002-x1_9ab2c.safetensors", ".epoch-0001-batch-000004-abcdefgh.safetensors", ".ledger-abcdefgh.csv",
        ".tmpu9eQlO",
    ]  # fmt: skip
    others = [
        ".ledger-abcdefgh.txt",
        ".epoch-0002.safetensors",
        ".notes-abcdefgh.csv",
        "x-abcdefgh.csv",
        ".tmp",
    ]
    for name in (*left, *others):
        (folder / name).write_bytes(b"half")
    result, tensors = SmallFit("plain").run(folder)
    assert not set(left) & set(names(folder))
    for name in others:
        assert (folder / name).read_bytes() == b"half"
        (folder / name).unlink()
    same((result, tensors), expected, folder, expected_folder)


def test_a_write_that_fails_leaves_the_checkpoints_before_it(whole, tmp_path, monkeypatch):
    """As on a full disk: the fit fails, its folder is whole, and the next call goes on."""
    folder = tmp_path / "fit"
    *expected, expected_folder = whole("removal")
    replace = type(tmp_path).replace

    def full(path, target):
        if "epoch-0003" in str(target):
            raise OSError("disk full")
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "replace", full)
        with pytest.raises(OSError, match="disk full"):
            SmallFit("removal").run(folder)
    assert names(folder) == ["epoch-0001.safetensors", "epoch-0002.safetensors", "ledger.csv"]
    same(SmallFit("removal").run(folder), expected, folder, expected_folder)


def test_a_fit_that_blows_up_can_be_called_again_from_before(tmp_path):
    folder = tmp_path / "fit"
    fit = SmallFit("plain")
    x, y = data()
    bad = x.clone()
    bad[:] = float("nan")
    calls = []

    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            calls.append(index)
            return (bad if len(calls) > 20 + 95 * 2 else x)[index], y[index]

    fit.source = Failing
    with pytest.raises(FloatingPointError, match=r"batch 1 of epoch 3; the parameters of epoch 2"):
        fit.run(folder)
    _, best = read_tensors(folder / "epoch-0002.safetensors")
    equal(fit.tensors(), {name: t for name, t in best.items() if name.startswith(("model.", "guide."))})
    fit = SmallFit("plain")
    fit.source = lambda: data()
    result, _ = fit.run(folder)
    assert len(result.history) == 5
