"""Progress: lines with an estimate everywhere, a bar below them on a terminal, nothing where it is not wanted."""

import sys

import pytest

from pyro_bmrs import progress
from pyro_bmrs.fitting.progress import EpochProgress
from pyro_bmrs.progress import Progress, bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def row(epoch, accuracy=0.5):
    return {"epoch": epoch, "loss": 0.25, "validation_accuracy": accuracy, "kept": 7}


def test_a_line_has_the_time_so_far_and_what_is_left_at_this_speed(clock, capsys):
    with Progress("work", 10) as shown:
        shown.say("begun")
        shown.resume(4)  # these took no time of this process
        clock[0] = 60.0
        shown.advance(2)
        shown.note("beside a bar that is not there")
        shown.say("6 of 10")
        shown.advance(4)
        shown.say("done")
    assert capsys.readouterr().err.splitlines() == [
        "begun; 0:00:00 so far", "6 of 10; 0:01:00 so far, about 0:02:00 left", "done; 0:01:00 so far",
    ]  # fmt: skip


def test_a_fit_has_some_lines_however_many_its_epochs_are(clock, capsys):
    with EpochProgress("fit", 200, 5, enabled=True) as shown:
        for epoch in range(1, 201):
            for _ in range(5):
                clock[0] += 0.2
                shown.step()
            shown.epoch(row(epoch, accuracy=float("nan") if epoch > 1 else 0.5))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == [
        "fit epoch 1",
        *(f"fit epoch {n}" for n in range(20, 201, 20)),
    ]
    assert lines[0] == (
        "fit epoch 1/200: loss 0.2500, validation accuracy 50.00 %, 7 structures kept; 0:00:01 so far, "
        "about 0:03:19 left"
    )
    assert lines[-1] == "fit epoch 200/200: loss 0.2500, 7 structures kept; 0:03:20 so far"


def test_on_a_terminal_there_is_a_bar_with_the_same_lines_above(capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with EpochProgress("fine-tune", 2, 1, enabled=True) as shown:
        shown.step()
        shown.epoch(row(1))
    told = capfd.readouterr().err
    assert "\x1b[" in told
    assert "fine-tune epoch 1/2: loss 0.2500, validation accuracy 50.00 %, 7 structures kept; 0:00:0" in told
    with bar("models", 2) as advance:
        advance(1)
    assert "models" in capfd.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_it_is_not_wanted(terminal, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with Progress("work", 2, shown=False) as shown, bar("models", 2, shown=False) as advance:
        shown.advance()
        shown.say("line")
        advance(1)
    with bar("models", 2, shown=None if not terminal else False) as advance:
        advance(1)
    assert capfd.readouterr().err == ""
