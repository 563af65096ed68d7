"""A diagnosis: what was believed and what was lost, as tables, and how they are kept on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_bmrs.arguments import on_a_screen
from pyro_bmrs.files import (
    NewerFileError,
    check_folder,
    read_table,
    read_text,
    refuse_newer,
    write_atomically,
    write_table,
)
from pyro_bmrs.notebooks import card, grid, lines
from pyro_bmrs.tables import DIAGNOSIS_COLUMNS, NAME_COLUMNS, require_columns

FORMAT, VERSION = "pyro_bmrs.diagnosis", 1

FACTS = (
    "draws", "seed", "examples", "dataset_size", "kl_weight", "out_of_distribution", "curves_of", "predictive_draws",
)  # fmt: skip
# In the order in which they are made: what takes longest is last.
PARTS = ("predictions", "curves", "posterior")


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """What was believed and what was lost, as tables. One that could not be told is None, and `notes` say why.

    Attributes:
        khat, elbo, contraction: as of `PosteriorChecks`.
        loo: elpd_loo and its standard_error, in nats, corrected for the approximate posterior.
        quality: a row per network ("full" or "shrunk in the fit", "reduced", "fine-tuned") and prediction ("draws" of
            the posterior, or "E[θ]"), with the columns of the function `quality`.
        regression: the same of a `Regressor`, with those of `regression_quality`.
        reliability, risk_coverage: as the functions of that name, with network and prediction.
        entropy: of the reduced network's predictive, from draws: a row per example, data ("test" or the name of the
            out-of-distribution data) and entropy in nats.
        curves: of each criterion on the same posterior, as of `criterion_curves`.
        facts: draws, seed, examples and dataset_size of the checks, kl_weight, name of the out_of_distribution data,
            which data the curves are of, and how many draws the predictions are from.
        notes: what was left out, and why.
        parts: which of predictions, curves and posterior were made.
    """

    khat: pd.DataFrame | None = None
    elbo: pd.DataFrame | None = None
    contraction: pd.DataFrame | None = None
    loo: pd.DataFrame | None = None
    quality: pd.DataFrame | None = None
    regression: pd.DataFrame | None = None
    reliability: pd.DataFrame | None = None
    risk_coverage: pd.DataFrame | None = None
    entropy: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parts: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The parts that were not made."""
        return [part for part in PARTS if part not in self.parts]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those that are there, by name."""
        found = {name: getattr(self, name) for name in DIAGNOSIS_COLUMNS}
        return {name: table for name, table in found.items() if table is not None}

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.facts.items() if value is not None)
        lines = [f"Diagnosis ({told})" if told else "Diagnosis"]
        lines += [f"  {name}: {len(table)} rows" for name, table in self.tables().items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def __repr__(self) -> str:
        return on_a_screen(str(self))

    def _repr_html_(self) -> str:
        columns = [
            ("network", "network", "text"), ("prediction", "from", "text"), ("accuracy", "accuracy", "%"),
            ("rmse", "RMSE", ".4g"), ("r2", "R²", ".4f"), ("coverage", "in the 90 % interval", "%"),
            ("negative_log_likelihood", "NLL (nats)", ".4f"),
            ("expected_calibration_error", "calibration error", ".4f"),
        ]  # fmt: skip
        khat = [
            ("part", "part of the posterior", "text"),
            ("khat", "k̂", ".2f"),
            ("threshold", "reliable up to", ".2f"),
        ]
        parts = [(columns, self.quality), (columns, self.regression), (khat, self.khat)]
        tables = [grid(shown, rows.to_dict("records")) for shown, rows in parts if rows is not None]
        return card(str(self).partition("\n")[0], *tables, lines(*self.notes))

    def save(self, folder: Path | str) -> Path:
        """Write a CSV per table, and diagnosis.json last; returns the folder."""
        folder = Path(folder)
        check_folder("folder", folder)
        document = dict(
            format=FORMAT,
            version=VERSION,
            tables=list(self.tables()),
            facts=self.facts,
            notes=self.notes,
            parts=self.parts,
        )
        (folder / "diagnosis.json").unlink(missing_ok=True)
        for name, table in self.tables().items():
            write_table(folder / f"{name}.csv", table)
        write_atomically(
            folder / "diagnosis.json", lambda beside: beside.write_text(json.dumps(document, indent=1))
        )
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Diagnosis:
        """Read what `save` wrote.

        Raises:
            ValueError: if the folder holds no diagnosis, a damaged one, or one of a newer version.
        """
        path = Path(folder) / "diagnosis.json"
        try:
            document = json.loads(read_text(path))
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            refuse_newer(path, "diagnosis", document["version"], VERSION)
            if not set(FACTS) <= set(document["facts"]):
                raise ValueError(f"its facts are {document['facts']}")
            columns = {name: DIAGNOSIS_COLUMNS[name] for name in document["tables"]}
            tables = {name: read_table(path.parent / f"{name}.csv", NAME_COLUMNS) for name in columns}
            for name, table in tables.items():
                require_columns(f"{name}.csv", table, columns[name])
            return cls(
                **tables,
                facts=dict(document["facts"]),
                notes=list(document["notes"]),
                parts=tuple(document["parts"]),
            )
        except NewerFileError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"folder must hold a diagnosis: {path} is none, or damaged ({error}); that of a run is made anew by "
                "pyro-bmrs report RUN --draws"
            ) from None
