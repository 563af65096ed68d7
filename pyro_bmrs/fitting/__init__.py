"""Fitting: the loop that learns weights and posterior, removes what the evidence removes, and survives.

Names are loaded when first used, so that the settings can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_bmrs.fitting.settings import Settings

if TYPE_CHECKING:
    from pyro_bmrs.fitting.fits import Fit, fit
    from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior

__all__ = ["Fit", "Settings", "fit", "load_posterior", "save_posterior"]

_FILE_OF = {
    "Fit": "fits",
    "fit": "fits",
    "load_posterior": "posterior_file",
    "save_posterior": "posterior_file",
}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'pyro_bmrs.fitting' has no attribute {name!r}")
    return getattr(import_module(f"pyro_bmrs.fitting.{_FILE_OF[name]}"), name)
