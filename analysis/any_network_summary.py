"""The tables of any_network.py: printed, and as markdown for docs/networks.md."""

from __future__ import annotations

import pandas as pd
from public_networks import SOURCES

ENOUGH = 0.85
KINDS = ("vision transformer", "language model")
STATUSES = ("handled", "refused", "wrong", "timeout", "memory", "error")


def summary(table: pd.DataFrame) -> str:
    """How many are handled, which are not, and the share that can go."""
    parts = [_statuses(table).to_string(), "", _shares(table).to_string(index=False)]
    for kind in KINDS:
        below = _below(table, kind)
        parts.append(f"\nbelow {ENOUGH:.0%}, {kind}: {below or 'none'}")
    rest = table[table.status != "handled"]
    parts += ["", *(f"{r.source}/{r['name']}: {r.status}: {_text(r.error)}" for _, r in rest.iterrows())]
    return "\n".join(parts)


def markdown(table: pd.DataFrame, peer: pd.DataFrame | None) -> str:
    """The same for docs/networks.md, side by side with torch-pruning."""
    lines = [
        f"{len(table)} public networks with random weights, each in a process of its own (one thread, 120 s, 8 GB). "
        "Out of time or memory counts as refused.",
        "",
    ]
    if peer is None:
        lines += [
            "| source | networks | handled | wrong | refused | median seconds |",
            "|---|---|---|---|---|---|",
        ]
    else:
        lines[0] += (
            " Ours with trials, insertion and the check of the removal, torch-pruning as it comes, without any check:"
        )
        lines += [
            "| source | networks | handled | by torch-pruning | wrong | silently wrong by torch-pruning | refused "
            "| by torch-pruning | median seconds | of torch-pruning |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for source in (*SOURCES, "all"):
        ours, other = _counts(table, source), _counts(peer, source) if peer is not None else []
        pairs = zip(ours, other, strict=True) if other else ((value,) for value in ours)
        size = len(table) if source == "all" else int((table.source == source).sum())
        lines.append(f"| {' | '.join([source, str(size), *(value for pair in pairs for value in pair)])} |")
    unseen = 0 if peer is None else int((peer.compared.astype(str) == "False").sum())
    lines += (
        ["", f"Of those that torch-pruning handles, {unseen} run but could not be compared."]
        if unseen
        else []
    )
    lines += [
        "",
        "Share of the parameters that can go, embeddings and output layers aside:",
        "",
        f"| kind | networks | least | median | most | below {ENOUGH:.0%} |".replace("%", " %"),
        "|---|---|---|---|---|---|",
    ]
    for _, row in _shares(table).iterrows():
        shares = " | ".join(_percent(row[name]) for name in ("least", "median", "most"))
        lines.append(
            f"| {row['kind']} | {row.networks} | {shares} | {_below(table, row['kind'], '`') or 'none'} |"
        )
    rest = table[table.status != "handled"]
    if len(rest):
        lines += ["", "Not handled:", "", "| network | what happens |", "|---|---|"]
        told = [(f"{r.source}/{r['name']}", r.status, _text(r.error)) for _, r in rest.iterrows()]
        lines += [f"| `{name}` | {status}: {error.replace('|', '/')} |" for name, status, error in told]
    return "\n".join(lines)


def _counts(table: pd.DataFrame, source: str) -> list[str]:
    """Handled, wrong, refused and seconds of a source."""
    part = table if source == "all" else table[table.source == source]
    handled, wrong = (int((part.status == status).sum()) for status in ("handled", "wrong"))
    seconds = part[part.status == "handled"].seconds.median()
    return [str(handled), str(wrong), str(len(part) - handled - wrong), f"{seconds:.1f}"]


def _statuses(table: pd.DataFrame) -> pd.DataFrame:
    counts = pd.crosstab(table.source, table.status, margins=True, margins_name="all")
    return counts.reindex(index=[*SOURCES, "all"], columns=[*STATUSES, "all"], fill_value=0)


def _shares(table: pd.DataFrame) -> pd.DataFrame:
    handled = table[(table.status == "handled") & table.share_removable.notna()]
    found = handled.groupby("kind").share_removable.agg(["size", "min", "median", "max"]).reset_index()
    return found.set_axis(["kind", "networks", "least", "median", "most"], axis=1).round(3)


def _below(table: pd.DataFrame, kind: str, quote: str = "") -> str:
    """Those of a kind of which too few parameters can go, those that are not handled among them."""
    part = table[(table.kind == kind) & ~(table.share_removable.fillna(0.0) >= ENOUGH)]
    return ", ".join(
        f"{quote}{row['name']}{quote} "
        + (row.status if pd.isna(row.share_removable) else _percent(row.share_removable))
        for _, row in part.sort_values("share_removable").iterrows()
    )


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _text(value: object) -> str:
    return "" if pd.isna(value) else str(value)
