"""What the tests of programs share."""

from importlib import import_module

import pytest


@pytest.fixture
def no_second_opinion(monkeypatch):
    """Guides here are set by hand, far from the posterior: that the model says something else is no news."""
    for module in ("reduce", "space"):
        # by import: `pyro_bmrs.programs.reduce` is the function of that name
        found = import_module(f"pyro_bmrs.programs.{module}")
        monkeypatch.setattr(found, "second_opinion", lambda *_: None)
