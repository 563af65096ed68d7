"""The last stage of a run: other sizes, diagnosis and page."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_bmrs.arguments import check
from pyro_bmrs.checks.data import some_of
from pyro_bmrs.data import DataError, load_data
from pyro_bmrs.data.sources import is_at_hand, located
from pyro_bmrs.evidence.importance import LEAST_DRAWS
from pyro_bmrs.files import NewerFileError
from pyro_bmrs.fitting import Fit
from pyro_bmrs.progress import Progress
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.quality import Diagnosis, Frontier, frontier
from pyro_bmrs.quality.examination import DRAWS, Examination, affordable
from pyro_bmrs.reports import report
from pyro_bmrs.runs.folder import DIAGNOSIS, REMOVAL_COLUMNS, SIZES
from pyro_bmrs.runs.workplace import Workplace, versions

# By data set: another with inputs of the same form. Does a network know that it does not know these?
FOREIGN = {"digits": "patches", "mnist": "fashion-mnist", "fashion-mnist": "mnist"}
FOREIGN_EXAMPLES = 500
# Of the networks of other sizes, and for all their timings.
POINTS, SECONDS = 12, 2.0
OF_SIZES = 1000, 10_000  # examples that they are measured on, at least and at most
# Seconds after which a page that still lacks something is written again.
_EVERY = 30.0
PART_NAMES = {"predictions": "predictions", "curves": "other criteria", "posterior": "k̂ of the posterior"}


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
        """Whether a diagnosis is asked for that the folder does not hold, or holds in part."""
        found = self._stored()
        return self._differs(found) or (found is not None and bool(found.missing()) and self.draws != 0)

    def write(self) -> Path:
        """Measure what the folder does not hold yet, and write report.html and report.md: at once, and at the end."""
        run = self.run
        run.need("plan.json")
        history = run.read_table("history.csv", "phase", "epoch")
        removals = run.read_table("removals.csv", *REMOVAL_COLUMNS)
        evaluation = run.read_table("evaluation.csv", "network", "parameters", "accuracy")
        plan = run.bound(run.plan())
        epochs = int((history.phase == "fit").sum())
        seen = epochs * len(run.dataset.train) or math.inf  # a pass of curvature has no epochs
        # A page is given to others: it names data and weights, not where they lie on this machine.
        names = {"data": run.settings.data_name, "weights": run.settings.weights_name}
        shown = run.settings.model_copy(update={**run.settled, **names})
        folder = run.folder.name if run.folder.is_absolute() else str(run.folder)
        others = [f" --{name.replace('_', '-')} none" for name in run.settings.budget if name != "parameters"]
        out = run.folder / "report.html"
        page = partial(
            report, Fit(history, removals[removals.phase == "fit"], shown, best_epoch=epochs), plan, out,
            costs=run.costs(), evaluation=evaluation, feature_names=run.preparation.feature_names,
            command=f"pyro-bmrs reduce {shlex.quote(folder)} --parameters {{}}{''.join(others)}",
            settings={"recipe": run.recipe.name, "data": str(run.dataset), **versions()},
        )  # fmt: skip
        made: dict[str, Any] = {}
        steps = self._steps(plan, made, seen)
        written = -math.inf
        # without a bar: each step has its own
        with Progress("report", len(steps), shown=run.progress, bar=False) as progress:
            for number, step in enumerate(steps.values()):
                pending = [*steps][number:]
                # alone the other sizes take seconds
                if len(steps) > 1 and time.monotonic() - written > _EVERY:
                    page(**made, pending=pending)
                    out.with_suffix(".md").unlink()  # a file of the stage, which is not done
                    progress.say(f"{out}, yet without {', '.join(pending)}")
                    written = time.monotonic()
                step()
                progress.advance()
            return page(**made)

    def _steps(self, plan: NetworkPlan, made: dict[str, Any], seen: float) -> dict[str, Callable[[], None]]:
        """What is to be measured, by name; each writes files and puts what it finds into `made`, as `report` takes it.

        What the folder holds is in `made` at once. `seen` is as of `affordable`.
        """
        run, steps = self.run, dict[str, Callable[[], None]]()

        def sizes() -> None:
            passes = 2 * POINTS  # a number of parameters is reached in two orders
            data = some_of(run.dataset.validation, affordable(plan, passes, OF_SIZES, seen))
            made["frontier"] = found = frontier(
                plan, data, points=POINTS, seconds=SECONDS, progress=run.progress
            )
            found.save(run.folder / SIZES)

        if run.has(SIZES):
            made["frontier"] = Frontier.load(run.folder / SIZES, plan)
        else:
            steps["other sizes"] = sizes
        if self.draws == 0 or run.settings.weights is not None:
            return steps
        made["diagnosis"], examination = self._begun(plan, seen)
        if examination is not None:

            def add(part: str) -> None:
                made["diagnosis"] = found = examination.add(made["diagnosis"], part)
                found.save(run.folder / DIAGNOSIS)

            steps |= {PART_NAMES[part]: partial(add, part) for part in made["diagnosis"].missing()}
        return steps

    def _begun(self, plan: NetworkPlan, seen: float) -> tuple[Diagnosis, Examination | None]:
        """The diagnosis as far as it is made, and what makes the rest, if there is any."""
        run, found = self.run, self._stored()
        if found is not None and not found.missing() and not self._differs(found):
            return found, None
        # What is not asked for stays as it is.
        facts = {} if found is None else found.facts
        data, small = run.dataset, run.model_of(run.small_network()) if run.settings.fine_tune else None
        examination = Examination(
            run.model, run.guide, plan, data.train, data.test, validation=data.validation, fine_tuned=small,
            out_of_distribution=self._foreign(self.foreign or facts.get("out_of_distribution")),
            draws=self.draws or facts.get("draws", DRAWS), seed=run.settings.seed, progress=run.progress,
            seen=seen,
        )  # fmt: skip
        begun = examination.begin()
        if found is None:
            begun.save(run.folder / DIAGNOSIS)  # so that it is known to be asked for
        # another one stays until a part of the new one is there
        return found if found is not None and found.facts == begun.facts else begun, examination

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
