"""What a trace has noted, settled: classes of atoms that leave boxes when they are removed."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmrs.networks.tracing.labels import varies
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.noted import Meeting


def settle(trace: Ledger) -> None:
    """Unite what must go together so that every tensor keeps the shape of a box. Changes the trace's classes."""
    _reduce_what_is_used(trace)
    changed = True
    while changed:
        changed = False
        for read in trace.noted.reads:
            changed |= _end(trace, read.atoms, read.labels)
        stays = _classes_that_stay(trace)
        for box in trace.noted.boxes:
            changed |= _make_box(trace, box, stays)
        for meeting in trace.noted.meetings:
            changed |= _tie(trace, meeting)
        for several in trace.noted.counted.values():
            changed |= _make_equal(trace, [labels for labels, whole in several if whole])
        with_lines = _classes_with_lines(trace)
        for entries in trace.entries.values():
            found = trace.classes.find(entries)
            found = torch.where(with_lines[found], found, 0)
            if bool(found.any()):
                changed |= _make_box(trace, found, stays)


def _reduce_what_is_used(trace: Ledger) -> None:
    """Tie the structures that a reduction reads at once, unless nothing uses its result."""
    noted, pending = trace.noted, list(trace.noted.pending)
    used = [labels for read in noted.reads for labels in (read.atoms, read.labels)]
    used += [labels for meeting in noted.meetings for labels in (meeting.atoms, meeting.labels)]
    used += [*noted.noise.values(), *(labels for several in noted.selected.values() for labels in several)]
    used.append(torch.tensor([atom for atom, *_ in noted.pinned] + sorted(noted.results_used) or [0]))
    while True:
        find, count = trace.classes.find, trace.classes.count
        alone = find(torch.arange(count, dtype=torch.int32)).bincount(minlength=count) == 1
        seen = ~alone
        for labels in used:
            seen[find(labels.int())] = True
        now = [some for some in pending if bool(seen[find(some.result)].any())]
        if not now:
            return
        for some in now:
            pending.remove(some)
            trace.unite(some.result, trace.merge(some.labels, list(some.axes), some.reason))
            used.append(some.labels)


def _classes_with_lines(trace: Ledger) -> Tensor:
    """True for the classes of which some layer makes or reads a row or column. Shape: (atoms,)."""
    true = torch.zeros(trace.classes.count, dtype=torch.bool)
    for atoms in trace.lines.values():
        true[trace.classes.find(atoms)] = True
    return true


def _classes_that_stay(trace: Ledger) -> Tensor:
    """True for the classes that stay. Shape: (atoms,)."""
    true = torch.zeros(trace.classes.count, dtype=torch.bool)
    true[
        trace.classes.find(torch.tensor([atom for atom, *_ in trace.noted.pinned] or [0], dtype=torch.int32))
    ] = True
    return true


def _end(trace: Ledger, atoms: Tensor, labels: Tensor) -> bool:
    """Each column belongs to the structure that it meets. labels: (lines, columns), or (lines, 1): the same for all."""
    found = trace.classes.find(labels)
    if not len(found):  # an expert without tokens
        return False
    whole = found.shape[1] == 1 or not varies(found, 1)
    if whole and varies(found, 0) and len(atoms) > 1:
        trace.pin((labels,), "read as a whole by a layer that reads others in the same way")
        return False
    merged = found.amax(0, keepdim=True)
    changed = trace.classes.unite(merged, found)
    return trace.classes.unite(atoms.view(1, -1), merged) or changed


def _make_box(trace: Ledger, labels: Tensor, stays: Tensor) -> bool:
    """Unite labels until they depend on one axis: the one along which most differ, of those that may go."""
    found = trace.classes.find(labels)
    axes = [axis for axis in range(found.dim()) if varies(found, axis)]
    if len(axes) < 2:
        return False
    free = torch.where(stays[found], 0, found)
    most = max(axes, key=lambda axis: (_different(free, axis), free.shape[axis]))
    lines = found.movedim(most, 0).flatten(1)
    return trace.classes.unite(lines.amax(1, keepdim=True), lines)


def _make_equal(trace: Ledger, several: list[Tensor]) -> bool:
    """Unite what stands in the same place of axes whose size is one and the same integer. Each: (size, …)."""
    all_found = [trace.classes.find(labels) for labels in several]
    lines = [found[:, 0] for found in all_found if not varies(found, 1)]
    changed = False
    for other in lines[1:]:
        changed |= trace.classes.unite(lines[0], other)
    return changed


def _different(labels: Tensor, axis: int) -> int:
    """The largest number of different labels in a line along an axis."""
    lines = labels.movedim(axis, -1).flatten(0, -2)
    ordered = lines.sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def _tie(trace: Ledger, meeting: Meeting) -> bool:
    """A parameter is cut with the labels that it meets, along the axes on which both depend."""
    found = trace.classes.find(meeting.labels)
    if not any(varies(found, axis) for axis in meeting.full):
        return False
    return trace.classes.unite(meeting.atoms, meeting.labels)
