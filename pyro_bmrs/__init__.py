"""Make neural networks smaller by Bayesian evidence.

>>> import pyro_bmrs as bmrs
>>> bmrs.BMRS_N().unit
'nats'

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "distributions": ("LogUniform", "TruncatedLogNormal", "TruncatedNormal"),
    "evidence": (
        "ImportanceError", "ImportanceEstimate", "estimate_log_evidence_change", "log_evidence_change",
        "reduced_posterior", "register_log_evidence_change", "register_reduced_posterior",
    ),
    "networks": (
        "InputSelection", "MultiplicativeNoise", "centred", "export_onnx", "insert_noise", "name_sites", "structures",
        "without_noise",
    ),
    "inference": (
        "AutoKroneckerLaplace", "AutoTruncatedLogNormal", "Classifier", "Regressor", "predict", "recalibrate",
    ),
    "pruning": (
        "BMRS_N", "BMRS_U", "SNR", "ExpectedScale", "LaplacePlan", "NetworkPlan", "Random", "RemovalOrder", "Rule",
        "WeightNorm",
    ),
    "programs": (
        "ModelPosterior", "ProgramPlan", "ReducedPosterior", "evidence_curve", "exhaustive_reduction",
        "greedy_reduction", "reduce",
    ),
    "fitting": ("Fit", "Settings", "fit", "load_posterior", "save_posterior"),
    "checks": ("check_posterior", "load_datatree", "loo", "save_datatree", "to_datatree"),
    "quality": ("Diagnosis", "Frontier", "compression_curve", "diagnose", "frontier"),
    "figures": ("plot_evidence_curve", "plot_models", "plot_reductions"),
    "reports": ("report",),
    "data": ("load_data",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "__version__"])

if TYPE_CHECKING:
    from pyro_bmrs.checks import check_posterior, load_datatree, loo, save_datatree, to_datatree
    from pyro_bmrs.data import load_data
    from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal, TruncatedNormal
    from pyro_bmrs.evidence import (
        ImportanceError,
        ImportanceEstimate,
        estimate_log_evidence_change,
        log_evidence_change,
        reduced_posterior,
        register_log_evidence_change,
        register_reduced_posterior,
    )
    from pyro_bmrs.figures import plot_evidence_curve, plot_models, plot_reductions
    from pyro_bmrs.fitting import Fit, Settings, fit, load_posterior, save_posterior
    from pyro_bmrs.inference import (
        AutoKroneckerLaplace,
        AutoTruncatedLogNormal,
        Classifier,
        Regressor,
        predict,
        recalibrate,
    )
    from pyro_bmrs.networks import (
        InputSelection,
        MultiplicativeNoise,
        centred,
        export_onnx,
        insert_noise,
        name_sites,
        structures,
        without_noise,
    )
    from pyro_bmrs.programs import (
        ModelPosterior,
        ProgramPlan,
        ReducedPosterior,
        evidence_curve,
        exhaustive_reduction,
        greedy_reduction,
        reduce,
    )
    from pyro_bmrs.pruning import (
        BMRS_N,
        BMRS_U,
        SNR,
        ExpectedScale,
        LaplacePlan,
        NetworkPlan,
        Random,
        RemovalOrder,
        Rule,
        WeightNorm,
    )
    from pyro_bmrs.quality import Diagnosis, Frontier, compression_curve, diagnose, frontier
    from pyro_bmrs.reports.report import report


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pyro_bmrs' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pyro_bmrs.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
