"""What the tests of programs share."""

import pytest


@pytest.fixture
def no_second_opinion(monkeypatch):
    """Guides here are set by hand, far from the posterior: that the model says something else is no news."""
    monkeypatch.setattr("pyro_bmrs.programs.reduce.second_opinion", lambda *_: None)
    monkeypatch.setattr("pyro_bmrs.programs.space.second_opinion", lambda *_: None)
