"""What all plans have in common: a table of what stays and what is removed, and the rule that decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pandas as pd
import torch
from torch import Tensor

from pyro_bmrs.arguments import on_a_screen
from pyro_bmrs.notebooks import card, grid, lines
from pyro_bmrs.pruning.plan_file import read_plan, write_plan
from pyro_bmrs.pruning.rule import Rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = [
    "layer", "unit", "loc", "scale", "mean", "snr", "score", "log_evidence_change", "kl_weight", "removed",
    "removed_in_fit", "present",
]  # fmt: skip
# Further columns of plans of Pyro programs, about estimates from draws.
ESTIMATE_COLUMNS = ["standard_error", "khat"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan:
    """What every plan has and does: `NetworkPlan` removes structures, `ProgramPlan` reduces priors.

    A plan is data: it pickles, and can be saved and loaded. It may also refer to a live model, which is not saved.

    Attributes:
        table: a row for each structure (of a program: for each element of a site):
            layer (of a program: the site), unit (index in the original network), loc and scale (of log θ), mean
            (E[θ]), snr, score (in the criterion's unit), log_evidence_change (ΔF in nats, NaN for a criterion without
            evidence), kl_weight, removed, removed_in_fit (before this plan), present (False if a fit has taken it out
            of the network; loc and scale are then the last ones).
        rule: what decided.
    """

    kind: ClassVar[str]

    table: pd.DataFrame
    rule: Rule

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of the table."""
        return list(dict.fromkeys(self.table.layer))

    @property
    def kept(self) -> dict[str, list[int]]:
        """For each layer the indices, in the original network, of the structures that stay."""
        rows = self.table[~self.table.removed]
        return {layer: rows.unit[rows.layer == layer].tolist() for layer in self.layers}

    def kept_mask(self, layer: str) -> Tensor:
        """True where a structure of `layer` stays, of those in the network. Shape: (features,)."""
        return torch.tensor((~self._present(layer).removed).to_numpy())

    def kept_masks(self) -> dict[str, Tensor]:
        """`kept_mask` of every layer."""
        return {layer: self.kept_mask(layer) for layer in self.layers}

    def _present(self, layer: str) -> pd.DataFrame:
        """The rows of the structures of `layer` that are in the network that was reduced."""
        return self.table[self.table.present & (self.table.layer == layer)]

    def widths(self) -> pd.DataFrame:
        """Structures of each layer: columns layer, before, after."""
        counts = self.table.groupby("layer", sort=False).removed.agg(["size", "sum"])
        return pd.DataFrame(
            {
                "layer": counts.index,
                "before": counts["size"].to_numpy(),
                "after": (counts["size"] - counts["sum"]).to_numpy(),
            }
        )

    def at(self, threshold: float) -> Self:
        """The plan that removes where score ≥ threshold, and what was removed before.

        Raises:
            ValueError: for NaN, or where a search decided.
        """
        raise NotImplementedError

    def plot(self) -> Figure:
        """Draw the scores of all structures, kept and removed: see `pyro_bmrs.figures.plot_scores`."""
        from pyro_bmrs.figures.scores import plot_scores

        return plot_scores(self)

    def summary(self) -> str:
        """A few lines of text: the rule, widths, and cautions."""
        widths = self.widths()
        lines = [f"{self.rule} keeps {int(widths.after.sum())} of {int(widths.before.sum())} {self._counted}"]
        lines += [f"  {row.layer}: {row.before} → {row.after}" for row in widths.itertuples()]
        return "\n".join([*lines, *(f"  {line}" for line in (*self._details(), *self.cautions()))])

    _counted: ClassVar[str] = "structures"

    def _details(self) -> list[str]:
        """Lines of the summary that only one kind of plan has."""
        return []

    def cautions(self) -> list[str]:
        """Sentences on what to keep in mind about what the plan says."""
        return self.rule.cautions()

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return on_a_screen(str(self))

    def _repr_html_(self) -> str:
        widths = self.widths()
        rows = widths.assign(left=widths.after / widths.before.where(widths.before > 0)).to_dict("records")
        columns = [
            ("layer", "layer", "text"), ("before", "before", ",.0f"), ("after", "after", ",.0f"),
            ("left", "left", "bar"),
        ]  # fmt: skip
        told = lines(*self._details(), *self.cautions())
        return card(self.summary().partition("\n")[0], grid(columns, rows), told)

    def __getstate__(self) -> dict[str, Any]:
        live = {entry.name for entry in fields(self) if entry.metadata.get("live")}
        return {name: None if name in live else value for name, value in self.__dict__.items()}

    def save(self, path: Path | str) -> Path:
        """Write the plan to `path` (JSON) and the numbers of its table beside it, to NAME.numbers.safetensors.

        Raises:
            ValueError: if `path` does not end in .json, or can't be written to.
        """
        numeric = [name for name in self.table.columns if name not in ("layer", "kl_weight")]
        columns = {name: torch.tensor(self.table[name].to_numpy()) for name in numeric}
        sizes = {layer: int((self.table.layer == layer).sum()) for layer in self.layers}
        document = {"kind": self.kind, "rule": self.rule.to_json(), "layers": sizes, **self._document()}
        return write_plan(path, document, columns)

    def _document(self) -> dict[str, Any]:
        """What JSON holds of one kind of plan, beside the rule and the layers."""
        return {}

    @classmethod
    def _parts(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that `_document` wrote; raises ValueError, KeyError or TypeError for a damaged one."""
        return {}

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote: a plan of this kind, or of one that belongs to it.

        Raises:
            ValueError: if the file is no plan of this kind, is damaged, does not belong to its numbers, or was
                written by a newer version.
        """
        kinds = {one.kind: one for one in cls._and_below()}
        document, columns = read_plan(path, cls.kind, [*kinds])
        try:
            rule = Rule.from_json(document["rule"])
            table = _table(document["layers"], columns, rule.kl_weight)
            own = kinds[document["kind"]]
            return own(table=table, rule=rule, **own._parts(document))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"path must be a whole plan: {path}: {error}") from None

    @classmethod
    def _and_below(cls) -> Iterator[type[Self]]:
        """The classes below it, and itself last."""
        for one in cls.__subclasses__():
            yield from one._and_below()
        yield cls


def _table(sizes: Mapping[str, int], columns: Mapping[str, Tensor], kl_weight: float) -> pd.DataFrame:
    missing = [name for name in COLUMNS if name not in (*columns, "layer", "kl_weight")]
    if missing:
        raise ValueError(f"its numbers lack {', '.join(missing)}")
    if sum(sizes.values()) != len(columns["unit"]):
        raise ValueError(f"its layers can't be {sizes}"[:200])
    layers = [layer for layer, size in sizes.items() for _ in range(size)]
    table = pd.DataFrame({"layer": layers, **{name: column.numpy() for name, column in columns.items()}})
    table["kl_weight"] = kl_weight
    return table[COLUMNS + [name for name in ESTIMATE_COLUMNS if name in columns]]
