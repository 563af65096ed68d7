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
        f"{len(table)} public networks with random weights, each in a process of its own (one thread, 120 s, 8 GB):",
        "",
        "| source | networks | handled | wrong | refused | seconds (median) |",
        "|---|---|---|---|---|---|",
    ]
    lines += _rows(table)
    if peer is not None:
        lines += ["", "The same with torch-pruning, as it comes:", ""]
        lines += ["| source | networks | handled | silently wrong | refused | seconds (median) |"]
        lines += ["|---|---|---|---|---|---|", *_rows(peer)]
        unseen = int((peer.compared.astype(str) == "False").sum())
        lines += ["", f"Of its handled ones {unseen} run, but could not be compared."] if unseen else []
    lines += [
        "",
        "Share of the parameters that can go, embeddings and output layers aside:",
        "",
        "| kind | networks | least | median | most | below 85 % |",
        "|---|---|---|---|---|---|",
    ]
    for _, row in _shares(table).iterrows():
        shares = " | ".join(f"{row[name]:.0%}".replace("%", " %") for name in ("least", "median", "most"))
        lines.append(
            f"| {row['kind']} | {row.networks} | {shares} | {_below(table, row['kind'], '`') or 'none'} |"
        )
    rest = table[table.status != "handled"]
    if len(rest):
        lines += ["", "Not handled:", "", "| network | what happens |", "|---|---|"]
        told = [(f"{r.source}/{r['name']}", r.status, _text(r.error)) for _, r in rest.iterrows()]
        lines += [f"| `{name}` | {status}: {error.replace('|', '/')} |" for name, status, error in told]
    return "\n".join(lines)


def _rows(table: pd.DataFrame) -> list[str]:
    found = []
    for source in (*SOURCES, "all"):
        part = table if source == "all" else table[table.source == source]
        count = part.status.value_counts()
        # out of time or memory, or an error of another type: a refusal without a word
        refused = len(part) - count.get("handled", 0) - count.get("wrong", 0)
        seconds = part[part.status == "handled"].seconds.median()
        numbers = [
            source,
            len(part),
            count.get("handled", 0),
            count.get("wrong", 0),
            refused,
            f"{seconds:.1f}",
        ]
        found.append(f"| {' | '.join(map(str, numbers))} |")
    return found


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
        + (row.status if pd.isna(row.share_removable) else f"{row.share_removable:.0%}".replace("%", " %"))
        for _, row in part.sort_values("share_removable").iterrows()
    )


def _text(value: object) -> str:
    return "" if pd.isna(value) else str(value)
