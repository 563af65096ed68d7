"""The last stage of a run: curve, diagnosis and page."""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import Tensor

from pyro_bmrs.arguments import check
from pyro_bmrs.data import DataError, load_data
from pyro_bmrs.data.sources import is_at_hand, located
from pyro_bmrs.evidence.importance import LEAST_DRAWS
from pyro_bmrs.files import NewerFileError, write_table
from pyro_bmrs.fitting import Fit
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.quality import Diagnosis, Frontier, compression_curve, diagnose, frontier
from pyro_bmrs.quality.examination import DRAWS
from pyro_bmrs.reports import report
from pyro_bmrs.runs.folder import DIAGNOSIS, REMOVAL_COLUMNS
from pyro_bmrs.runs.workplace import Workplace, versions

# By data set: another with inputs of the same form. Does a network know that it does not know these?
FOREIGN = {"digits": "patches", "mnist": "fashion-mnist", "fashion-mnist": "mnist"}
FOREIGN_EXAMPLES = 500
# Of the networks of other sizes, and for all their timings.
POINTS, SECONDS = 16, 2.0


class ReportStage:
    """What the report of a run is made of.

    Args:
        run: the run.
        draws, foreign: as of `Run.report`.

    Raises:
        ValueError: if `draws` or `foreign` can't be used; before any work.
    """

    def __init__(self, run: Workplace, draws: int | None, foreign: str | None) -> None:
        self.run, self.draws, self.foreign = run, draws, None if foreign is None else located(foreign)
        if run.settings.weights is not None:
            for name, asked in (("draws", draws), ("foreign", foreign)):
                # a plan of a path has no diagnosis
                check(not asked, name, "left out for a run of trained weights, which has no diagnosis", asked)
        enough = draws is None or draws == 0 or draws >= LEAST_DRAWS
        check(enough, "draws", f"at least {LEAST_DRAWS}, or 0 for no diagnosis", draws)
        check(self.foreign != run.settings.data, "foreign", "another data set than the run's own", foreign)
        self._foreign_inputs: dict[str, Tensor] = {}
        if self.foreign is not None:
            self._foreign(self.foreign)

    def asks_anew(self) -> bool:
        """Whether a diagnosis is asked for that the folder does not hold."""
        return self._differs(self._stored())

    def write(self) -> Path:
        """Measure what the folder does not hold yet, and write report.html and report.md."""
        run = self.run
        run.need("plan.json")
        history = run.read_table("history.csv", "phase", "epoch")
        removals = run.read_table("removals.csv", *REMOVAL_COLUMNS)
        evaluation = run.read_table("evaluation.csv", "network", "parameters", "accuracy")
        plan = run.bound(run.plan())
        if run.has("curve.csv"):
            curve = run.read_table("curve.csv")
        else:
            curve = compression_curve(run.model, plan, run.dataset.validation)
            write_table(run.folder / "curve.csv", curve)
        if run.has("frontier.csv"):
            sizes = Frontier.load(run.folder / "frontier.csv", plan)
        else:
            sizes = frontier(
                plan, run.dataset.validation, points=POINTS, seconds=SECONDS, progress=run.progress
            )
            sizes.save(run.folder / "frontier.csv")
        trained = run.settings.weights is not None
        epochs = int((history.phase == "fit").sum())
        # A page is given to others: it names data and weights, not where they lie on this machine.
        names = {"data": run.settings.data_name, "weights": run.settings.weights_name}
        shown = run.settings.model_copy(update={**run.settled, **names})
        folder = run.folder.name if run.folder.is_absolute() else str(run.folder)
        others = [f" --{name.replace('_', '-')} none" for name in run.settings.budget if name != "parameters"]
        command = f"pyro-bmrs reduce {shlex.quote(folder)} --parameters {{}}{''.join(others)}"
        return report(
            Fit(history, removals[removals.phase == "fit"], shown, best_epoch=epochs), plan,
            run.folder / "report.html", costs=run.costs(), curve=curve, evaluation=evaluation,
            diagnosis=None if self.draws == 0 or trained else self._diagnosis(plan),
            frontier=sizes, command=command,
            settings={"recipe": run.recipe.name, "data": str(run.dataset), **versions()},
        )  # fmt: skip

    def _diagnosis(self, plan: NetworkPlan) -> Diagnosis:
        """The folder's diagnosis; a new one if there is none, or another is asked for."""
        run, draws, foreign = self.run, self.draws, self.foreign
        found = self._stored()
        if found is not None:
            if not self._differs(found):
                return found
            # What is not asked for stays as it is.
            draws, foreign = draws or found.facts["draws"], foreign or found.facts["out_of_distribution"]
        tuned = run.model_of(run.small_network()) if run.settings.fine_tune else None
        data = run.dataset
        found = diagnose(
            run.model, run.guide, plan, data.train, data.test, validation=data.validation, fine_tuned=tuned,
            out_of_distribution=self._foreign(foreign), draws=draws or DRAWS, seed=run.settings.seed,
        )  # fmt: skip
        found.save(run.folder / DIAGNOSIS)
        return found

    def _stored(self) -> Diagnosis | None:
        """The folder's diagnosis. A damaged one is ignored if `draws` asks for one anyway."""
        try:
            return self.run.diagnosis()
        except NewerFileError:
            raise
        except ValueError:
            if not self.draws:
                raise
            return None

    def _differs(self, found: Diagnosis | None) -> bool:
        facts = {} if found is None else found.facts
        asked = {"draws": self.draws or None, "out_of_distribution": self.foreign}
        return any(value not in (None, facts.get(name)) for name, value in asked.items())

    def _foreign(self, name: str | None) -> dict[str, Tensor]:
        """Inputs of another data set by its name; by default of a known one, if it is on this machine."""
        run = self.run
        asked = name or FOREIGN.get(run.settings.data)
        if asked is None or (name is None and not is_at_hand(asked, run.data_root)):
            return {}
        if asked not in self._foreign_inputs:  # checked before a fit, and used after it
            shape = run.dataset.input_shape
            size = shape[1] if len(shape) == 3 and shape[1] == shape[2] else None
            try:
                other = load_data(asked, data_root=run.data_root, image_size=size)
                self._foreign_inputs[asked] = run.dataset.foreign(other)[:FOREIGN_EXAMPLES]
            except DataError as error:
                raise ValueError(f"foreign {asked!r} can't be used: {error}") from error
        return {asked: self._foreign_inputs[asked]}
