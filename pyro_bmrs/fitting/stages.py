"""A fit along KL weights that rise: its stages, their states, and which of them is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from pyro_bmrs.files import read_tensors, write_tensors
from pyro_bmrs.fitting.checkpoints import stage_file, stage_files
from pyro_bmrs.fitting.posterior_file import restore, state_of
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.evaluate import Evaluation
from pyro_bmrs.pruning.budgets import Budget, TooMuchLostError, first, one_standard_error
from pyro_bmrs.pruning.network_plan import NetworkPlan

FORMAT, VERSION = "pyro_bmrs.stage", 1
STAGE_COLUMNS = [
    "stage", "epoch", "kl_weight", "kept", "parameters", "validation_loss", "standard_error",
    "validation_accuracy",
]  # fmt: skip
# More stages than these would each be kept for little.
MOST_STAGES = 24
# The last weight is N over this. On MNIST it is 960, where LeNet5 has lost 95 % of its parameters and 3 points.
_EXAMPLES_PER_WEIGHT = 50
# The first is 1, the ELBO, but no less than the last over this: below, nothing leaves a network of images.
_RANGE = 100
_UNITS = {"accuracy_drop": "points", "loss_rise": "nats an example"}


@dataclass(frozen=True)
class Rise:
    """The KL weights of the epochs: the first during the warm-up, then one for each stage, in equal ratios.

    Attributes:
        epochs: of the fit.
        first: the first epoch after the warm-up, from 1.
        stages: how many there are.
        lowest, last: the weights of the first and of the last.
    """

    epochs: int
    first: int
    stages: int
    lowest: float
    last: float

    @classmethod
    def of(cls, settings: Settings, examples: int) -> Rise:
        """Of a fit with these settings to so many examples."""
        first = min(-int(-settings.warm_up * settings.epochs // 1), settings.epochs - 1) + 1
        stages = min(settings.epochs - first + 1, MOST_STAGES)
        last = max(examples / _EXAMPLES_PER_WEIGHT, 2.0)
        return cls(settings.epochs, first, stages, max(last / _RANGE, 1.0), last)

    def stage(self, epoch: int) -> int:
        """The number of an epoch's stage, from 1; 0 in the warm-up."""
        return max((epoch - self.first) * self.stages // (self.epochs - self.first + 1) + 1, 0)

    def kl_weight(self, epoch: int) -> float:
        """Of an epoch, in three digits."""
        share = max(self.stage(epoch) - 1, 0) / max(self.stages - 1, 1)
        return float(f"{self.lowest * (self.last / self.lowest) ** share:.3g}")

    def ends(self, epoch: int) -> bool:
        """Whether a stage ends with this epoch."""
        return self.stage(epoch) > 0 and (epoch == self.epochs or self.stage(epoch + 1) > self.stage(epoch))


class Stages:
    """The stages of one fit, each with its state.

    Args:
        model, guide: whose states these are.
        reduce: makes a plan of their present state; also the attribute `plan`.
        held_out: validation data.
        folder: where states are written, a file each; None: they are kept in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: Any,
        reduce: Callable[[], NetworkPlan],
        held_out: Data | Batches,
        folder: Path | None = None,
    ) -> None:
        self.model, self.guide, self.held_out, self.folder = model, guide, held_out, folder
        self.plan = reduce
        self._rows: dict[int, dict[str, Any]] = {}
        self._states: dict[int, dict[str, Tensor]] = {}
        if folder is not None:
            for path in stage_files(folder):
                header, _ = read_tensors(path, header_only=True)
                self._rows[int(header["stage"]["stage"])] = header["stage"]

    def __len__(self) -> int:
        return len(self._rows)

    def table(self) -> pd.DataFrame:
        """A row for each stage; `chosen` marks the one that the rule of one standard error takes."""
        table = pd.DataFrame([*self._rows.values()], columns=STAGE_COLUMNS)
        return table.assign(chosen=table.stage == (self.choice() if len(table) else 0))

    def choice(self) -> int:
        """The number of the stage with the fewest parameters within one standard error of the least loss."""
        rows = [*self._rows.values()]
        losses, errors, sizes = (
            [float(row[name]) for row in rows] for name in ("validation_loss", "standard_error", "parameters")
        )
        return int(rows[one_standard_error(losses, errors, sizes)]["stage"])

    def kl_weight(self, number: int) -> float:
        """Of a stage."""
        return float(self._rows[number]["kl_weight"])

    def epoch(self, number: int) -> int:
        """The last epoch of a stage."""
        return int(self._rows[number]["epoch"])

    def measured(self) -> dict[str, Any]:
        """The present state's part of a row."""
        plan = self.plan()
        found = plan.evaluated(self.held_out, self.model)
        return {
            "kept": int(plan.widths().after.sum()),
            "parameters": plan.parameters_left(),
            "validation_loss": found.loss,
            "standard_error": found.standard_error,
            "validation_accuracy": found.accuracy,
            "rule": _rule(plan),
        }

    def measure_anew(self) -> None:
        """Measure stages by the present rule, where they were measured by another."""
        rule = _rule(self.plan())
        for number, row in self._rows.items():
            if row.get("rule") != rule:
                self.restore(number)
                self._rows[number] = {**row, **self.measured()}

    def add(self, row: dict[str, Any], *, write: bool = True) -> None:
        """Keep the present state, as that of the stage of this row. `write`: this process writes the files."""
        number = int(row["stage"])
        self._rows[number] = row
        state = {name: tensor.cpu() for name, tensor in state_of(self.model, self.guide).items()}
        if self.folder is None:
            self._states[number] = state
        elif write:
            write_tensors(self._path(number), state, {"format": FORMAT, "version": VERSION, "stage": row})

    def restore(self, number: int) -> None:
        """Put model and guide into the state of a stage."""
        state = self._states[number] if self.folder is None else read_tensors(self._path(number))[1]
        restore(self.model, self.guide, state)
        self.guide.kl_weight = self.kl_weight(number)

    def within(
        self, asked: Mapping[str, float | None], *, batch_size: int = 1, progress: bool = True
    ) -> NetworkPlan:
        """As `NetworkPlan.within`, of the stage where the budget costs least; it is restored.

        Tried are the two stages whose own sizes lie around the budget, one halfway to them, whose weights have seen
        less pressure, the one that the rule of one standard error takes, and the last. Where losses are asked for, what
        the evidence keeps of any stage counts too. Losses are counted from the least of all stages. If the budget can't
        be met, model and guide stay as they are.
        """
        before = state_of(self.model, self.guide), self.guide.kl_weight
        try:
            return self._within(asked, batch_size, progress)
        except BaseException:
            restore(self.model, self.guide, before[0])
            self.guide.kl_weight = before[1]
            raise

    def _within(self, asked: Mapping[str, float | None], batch_size: int, progress: bool) -> NetworkPlan:
        rows = [*self._rows.values()]
        numbers = [*self._rows]
        before = Evaluation(
            min(row["validation_loss"] for row in rows),
            max(row["validation_accuracy"] for row in rows),
            math.nan,
        )

        @cache
        def budget() -> Budget:  # of any stage: sizes are the full network's
            return self.plan().budget(asked, self.held_out, batch_size, before)

        def enough(place: int) -> bool:
            self.restore(numbers[place])
            return budget().meets(self.plan())

        has_costs, has_losses = budget().has_costs, budget().has_losses
        # they are known, and need not fall from stage to stage
        losses = [Evaluation(row["validation_loss"], row["validation_accuracy"], math.nan) for row in rows]
        good = [place for place, loss in enumerate(losses) if has_losses and budget().allows(loss)]
        if has_costs:
            turn = first(len(rows), enough)
            tried = {turn // 2, turn - 1, turn, numbers.index(self.choice()), len(rows) - 1}
        else:
            turn = max(good, default=-1)
            tried = {turn, turn + 1}
        found: list[tuple[float, int, NetworkPlan]] = []
        lost, refusal = [], None
        for place in sorted(tried & set(range(len(rows)))):
            self.restore(numbers[place])
            try:
                plan = self.plan().meeting(budget(), progress=progress)
            except TooMuchLostError as error:
                lost.append(error.nearest)
                continue
            except ValueError as error:
                refusal = error
                continue
            loss = plan.evaluated(self.held_out)
            if has_costs or budget().allows(loss):
                found.append((loss.loss if has_costs else plan.parameters_left(), place, plan))
        # losses need not rise along a path: its places that were looked at may lose more than what the evidence keeps
        wanted = "validation_loss" if has_costs else "parameters"
        for place in sorted(good, key=lambda place: rows[place][wanted]):
            self.restore(numbers[place])
            plan = self.plan()
            if not budget().meets(plan):
                continue
            loss = plan.evaluated(self.held_out)
            if budget().allows(loss):
                size_or_loss = loss.loss if has_costs else plan.parameters_left()
                found.append((size_or_loss, place, plan.told(budget())))
                break
        if not found and not has_costs:
            limits = budget().allowed
            least = " and ".join(f"{value:g} {_UNITS[name]}" for name, value in limits.items())
            raise ValueError(f"{' and '.join(limits)} must be larger: no stage loses as little as {least}")
        if not found and lost:
            lost += [losses[place] for place in range(len(rows)) if place not in good and enough(place)]
            raise budget().too_much_lost(lost)
        if not found:
            assert refusal is not None
            raise refusal
        _, place, plan = min(found, key=lambda one: one[:2])
        self.restore(numbers[place])
        return plan

    def forget_after(self, epoch: int, *, write: bool = True) -> None:
        """Drop the stages that ended later: the fit goes on from this epoch."""
        for number in [number for number, row in self._rows.items() if row["epoch"] > epoch]:
            del self._rows[number]
            if self.folder is not None and write:
                self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return stage_file(self.folder, number)


def _rule(plan: NetworkPlan) -> str:
    """How a plan decides, but for the KL weight."""
    rule = plan.rule
    return f"{rule.criterion}, {rule.prior_log_odds}, {rule.threshold}, {rule.min_kept}, {rule.round_to}"
