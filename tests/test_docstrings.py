"""Every example in a docstring is run."""

import doctest
import importlib
import pkgutil

import pytest

import pyro_bmrs

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pyro_bmrs.__path__, "pyro_bmrs.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", ["pyro_bmrs", *MODULES])
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
