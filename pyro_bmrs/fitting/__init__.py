"""Fitting: the loop that learns weights and posterior, removes what the evidence removes, and survives.

Names are loaded when first used, so that the settings can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_bmrs.fitting.settings import Settings

if TYPE_CHECKING:
    from pyro_bmrs.fitting.fits import Fit, fit

__all__ = ["Fit", "Settings", "fit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pyro_bmrs.fitting' has no attribute {name!r}")
    from pyro_bmrs.fitting import fits

    return getattr(fits, name)
