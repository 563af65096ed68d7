"""The files of a run's folder, read without its data and its network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_bmrs.data.arrays import one_line
from pyro_bmrs.data.preparation import Preparation
from pyro_bmrs.files import clear_unfinished, read_table, read_text, refuse_newer
from pyro_bmrs.fitting.checkpoints import LEDGER_COLUMNS
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.quality import Diagnosis
from pyro_bmrs.runs.settings import RunSettings
from pyro_bmrs.tables import NAME_COLUMNS

FORMAT, VERSION = "pyro_bmrs.run", 1

# The files of each stage. If all are there, it is done: the last is written last, and a page that lacks something has
# no report.md beside it.
FIT_FILES = ("settings.json", "recipe.py", "history.csv", "removals.csv", "posterior.safetensors")
REDUCE_FILES = (
    "evaluation.csv", "costs.csv", "structures.csv", "small.safetensors", "small.pt2", "plan.numbers.safetensors",
    "plan.json",
)  # fmt: skip
SIZES = "frontier.csv"
REPORT_FILES = (SIZES, "report.md", "report.html")
STAGES = "stages.csv"  # of a fit along rising KL weights
DIAGNOSIS = "diagnosis"  # a folder of tables; a run is complete without it
REMOVAL_COLUMNS = ["phase", *LEDGER_COLUMNS]  # of removals.csv


class RunFolder:
    """The files of one run.

    Args:
        folder: where they are, or will be.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def stored_settings(self) -> dict[str, Any] | None:
        """What settings.json says; None where there is none.

        settings (RunSettings), fit (those of the posterior, as JSON), settled (what followed from model and data),
        recipe (its name), inputs (a Preparation).
        """
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        try:
            document = json.loads(read_text(path))
            version = int(document["version"]) if document["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            version = None
        if version is None:
            raise ValueError(f"{path} is not the settings file of a run, or is damaged")
        refuse_newer(path, "run", version, VERSION)
        try:
            return {
                "settings": RunSettings(**document["settings"]),
                "fit": dict(document["fit"]),
                "settled": dict(document["settled"]),
                "recipe": str(document["recipe"]),
                "inputs": Preparation.of(document["inputs"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the settings file of a run, or is damaged: {one_line(error)}"
            ) from error

    def needed_settings(self) -> dict[str, Any]:
        """As `stored_settings`; raises ValueError if there are none."""
        stored = self.stored_settings()
        if stored is None:
            raise ValueError(f"run must be a folder with a settings.json: {self.folder} has none")
        return stored

    def has(self, *names: str) -> bool:
        """Whether the folder holds these files."""
        return all((self.folder / name).exists() for name in names)

    def after_fit(self) -> list[str]:
        """What the folder holds of reduction and report."""
        return [name for name in (*REDUCE_FILES, *REPORT_FILES, DIAGNOSIS) if self.has(name)]

    def need(self, *names: str) -> None:
        """Raise ValueError, saying which command makes the file, unless the folder holds all of these."""
        for name in names:
            if not self.has(name):
                stage = "fit" if name in FIT_FILES else "reduce"
                raise ValueError(f"run {self.folder} has no {name}: call `pyro-bmrs {stage}` first")

    def read_table(self, name: str, *columns: str) -> pd.DataFrame:
        """A table of the folder; raises ValueError unless it has these columns."""
        self.need(name)
        try:
            table = read_table(self.folder / name, NAME_COLUMNS)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder / name} is damaged: {error}") from error
        missing = [column for column in columns if column not in table]
        if missing:
            raise ValueError(f"{self.folder / name} is damaged: it has no column {', '.join(missing)}")
        return table

    def evaluation(self) -> pd.DataFrame:
        """Loss and accuracy of the networks on the test examples, a row each, the final one last."""
        numbers = ("negative_log_likelihood", "accuracy", "parameters")
        table = self.read_table("evaluation.csv", "network", *numbers)
        path = self.folder / "evaluation.csv"
        if table.empty:
            raise ValueError(f"{path} is damaged: it has no rows")
        for name in numbers:
            if not pd.api.types.is_numeric_dtype(table[name]):
                raise ValueError(f"{path} is damaged: {name} must be numbers, got {table[name].iloc[0]!r}")
        return table

    def outcome(self) -> dict[str, float]:
        """removed (fraction of parameters) and accuracy (test, 0 to 1) of the final network."""
        table = self.evaluation()
        removed = 1 - table.parameters.iloc[-1] / table.parameters.iloc[0]
        return {"removed": float(removed), "accuracy": float(table.accuracy.iloc[-1])}

    def costs(self) -> pd.DataFrame:
        """Costs of the network before and after, a row each."""
        return self.read_table("costs.csv", "cost", "before", "after").set_index("cost")

    def plan(self) -> NetworkPlan:
        """The folder's plan."""
        self.need("plan.json")
        kind = NetworkPlan if self.needed_settings()["settings"].weights is None else LaplacePlan
        return kind.load(self.folder / "plan.json")

    def clear(self, *names: str) -> None:
        """Remove these files."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def clear_reduction(self) -> None:
        """Remove the reduction and its report; the last file of a stage first."""
        shutil.rmtree(self.folder / DIAGNOSIS, ignore_errors=True)
        self.clear(*reversed(REPORT_FILES), *reversed(REDUCE_FILES))

    def clear_unfinished(self) -> None:
        """Remove the half-written files of a process that was killed."""
        clear_unfinished(self.folder, {*FIT_FILES, STAGES, *REDUCE_FILES, *REPORT_FILES}.__contains__)

    def diagnosis(self) -> Diagnosis | None:
        """The folder's diagnosis, None where it has none."""
        folder = self.folder / DIAGNOSIS
        return Diagnosis.load(folder) if (folder / "diagnosis.json").exists() else None
