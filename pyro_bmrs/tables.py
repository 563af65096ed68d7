"""The tables that packages hand to each other: the columns that their readers need, and the check of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# of a plan: a row per structure, one per layer, and one per cost
TABLE_COLUMNS = ("layer", "unit", "loc", "scale", "mean", "snr", "score", "log_evidence_change", "removed")
WIDTH_COLUMNS = ("layer", "before", "after")
PATH_COLUMNS = ("parameters", "total_loss_rise", "measured_loss_rise", "total_evidence_change")
COST_COLUMNS = ("before", "after")
# of a fit: a row per epoch, and one per structure that it or the plan removed
HISTORY_COLUMNS = (
    "phase", "epoch", "loss", "log_likelihood", "kl", "validation_loss", "validation_accuracy", "kept", "seconds",
)  # fmt: skip
REMOVAL_COLUMNS = ("phase", "epoch", "layer", "unit")
# accuracy at thresholds, of one criterion and of several
CURVE_COLUMNS = ("parameters_removed", "accuracy", "loss", "is_plan")
CRITERIA_COLUMNS = ("criterion", *CURVE_COLUMNS)
# of networks of all sizes
FRONTIER_COLUMNS = (
    "parameters", "multiply_accumulates", "milliseconds", "loss", "standard_error", "accuracy", "rmse", "is_plan",
    "is_evidence", "is_one_standard_error",
)  # fmt: skip
# of networks: measured, and in bins, by coverage and by example
EVALUATION_COLUMNS = ("network", "split", "accuracy", "negative_log_likelihood", "parameters")
# of a classifier and of a regression, beside these
CALIBRATION_COLUMNS = (
    "expected_calibration_error", "temperature", "calibrated_error", "calibrated_negative_log_likelihood",
)  # fmt: skip
REGRESSION_COLUMNS = ("rmse", "rmse_error", "mae", "r2", "coverage", "width")
RELIABILITY_COLUMNS = ("network", "prediction", "lower", "upper", "count", "confidence", "accuracy")
RISK_COLUMNS = ("network", "prediction", "coverage", "risk")
ENTROPY_COLUMNS = ("data", "entropy")
RUN_COLUMNS = ("run", "parameters", "accuracy")
# along a parameter of a reduced prior, which is the first column
EVIDENCE_COLUMNS = ("log_evidence_change", "reduced", "chosen", "mixture")
# of a diagnosis, by the names of its tables
DIAGNOSIS_COLUMNS = {
    "khat": ("part", "latents", "khat", "threshold", "reliable"),
    "elbo": ("model", "elbo", "standard_error"),
    "contraction": ("site", "unit", "contraction"),
    "loo": ("elpd_loo", "standard_error"),
    "quality": (
        "network", "prediction", "examples", "accuracy", "negative_log_likelihood", "brier",
        "expected_calibration_error", "entropy", "aleatoric", "epistemic", "out_of_distribution_auroc",
        "area_under_risk_coverage",
    ),
    "regression": ("network", "prediction", "examples", "negative_log_likelihood", *REGRESSION_COLUMNS),
    "reliability": RELIABILITY_COLUMNS,
    "risk_coverage": RISK_COLUMNS,
    "entropy": ENTROPY_COLUMNS,
    "curves": CRITERIA_COLUMNS,
}  # fmt: skip
# Names, whatever they look like: read from a file, "1" and "NA" stay text.
NAME_COLUMNS = ("layer", "site", "part", "model", "network", "prediction", "data", "criterion")

# More criteria than this can't be told apart in one figure.
MOST_CRITERIA = 8


def require_columns(name: str, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table has the columns it is read by.

    Args:
        name: what to call the table in the message, e.g. ``"plan.table"``.
        table: any DataFrame; further columns are allowed.
        columns: the names it must have.

    Raises:
        TypeError: unless it is a DataFrame.
        ValueError: names the missing columns and all that are needed.

    Example:
        >>> import pandas as pd
        >>> require_columns("curve", pd.DataFrame({"accuracy": [0.9]}), ("accuracy",))
    """
    if not hasattr(table, "columns"):
        raise TypeError(f"{name} must be a DataFrame: got {type(table).__name__}")
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"{name} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}; "
            f"it needs {', '.join(columns)} and has {', '.join(map(str, table.columns)) or 'none'}"
        )
