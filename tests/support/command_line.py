"""Calling the command line in this process."""

import pytest

from pyro_bmrs import cli


def call(*arguments):
    """The exit status of a command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code
