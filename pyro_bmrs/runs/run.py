"""A run: a recipe, data and settings give a folder, stage by stage: fit, reduce, report."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pyro_bmrs.fitting import Fit
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.runs.fit_stage import fit_posterior
from pyro_bmrs.runs.folder import FIT_FILES, REDUCE_FILES, REPORT_FILES
from pyro_bmrs.runs.reduce_stage import reduce_network
from pyro_bmrs.runs.report_stage import ReportStage
from pyro_bmrs.runs.workplace import Workplace, interruption


class Run(Workplace):
    """One run: its stages, and what can be done with its result. Arguments as of `Workplace`."""

    def finish(self, *, draws: int | None = None, foreign: str | None = None) -> bool:
        """Do what is missing of all stages; returns whether anything was. Arguments as of `report`."""
        asked = ReportStage(self, draws, foreign)  # refuses bad arguments before the fit
        with self.alone():
            if self.complete() and not self.overwrite:
                if not asked.asks_anew():
                    return False
                self.load_posterior()
            else:
                self.fit()
                if not self.reduced():
                    self.reduce()
            self.report(draws=draws, foreign=foreign)
            return True

    def fit(self) -> Fit | None:
        """Fit the posterior and write it, unless the folder has it. Returns the fit if one was made.

        With `overwrite` a fit is always made.
        """
        with self.alone():
            if self.has("posterior.safetensors") and not self.overwrite:
                self.load_posterior()
                return None
            self.clear_unfinished()
            return fit_posterior(self)

    def reduce(self) -> tuple[NetworkPlan, nn.Module]:
        """Reduce, apply, fine-tune, evaluate, and write plan, tables and the small network."""
        with self.alone(), interruption("the reduction; the fit is kept"):
            self.clear_unfinished()
            return reduce_network(self)

    def report(self, *, draws: int | None = None, foreign: str | None = None) -> Path:
        """Measure what the folder does not hold yet, and write report.html and report.md.

        Args:
            draws: of the posterior, for the diagnosis, at least 100; 0: leave it out; None: as the folder has it,
                or the default.
            foreign: name of the data set to be told from the test examples; None: as the folder has it, or one
                that is on this machine.
        """
        page = ReportStage(self, draws, foreign)
        with self.alone(), interruption("the report; fit and reduction are kept"):
            self.clear_unfinished()
            return page.write()

    def reduced(self) -> bool:
        """Whether the folder holds the reduction by these very settings."""
        stored = self.stored_settings()
        done = self.has(*FIT_FILES, *REDUCE_FILES)
        return done and stored is not None and stored["settings"] == self.settings

    def complete(self) -> bool:
        """Whether every stage has been done with these very settings."""
        return self.reduced() and self.has(*REPORT_FILES)
