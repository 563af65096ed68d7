"""What a settled trace says of each class: what makes, carries and reads it, and why it stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor

from pyro_bmrs.networks.computed import computed, is_computed
from pyro_bmrs.networks.cuts import RootMeanSquare, names_by_tensor
from pyro_bmrs.networks.tracing.labels import distinct, varies
from pyro_bmrs.networks.tracing.noted import Parameter, Reader
from pyro_bmrs.networks.tracing.trace import Trace

SINGLE = "a single structure, and one must stay"
IN_TRAINING = "runs in training alone"


@dataclass(frozen=True)
class Line:
    """The entries along one dimension of one tensor, and the class of each, 0 for none."""

    parameter: Parameter
    dim: int
    role: str
    classes: Tensor
    reader: Reader | None = None
    made_by: str = ""

    @cached_property
    def _sizes(self) -> Counter[int]:
        return Counter(self.classes.tolist())

    def size_of(self, one: int) -> int:
        """Number of entries of a class."""
        return self._sizes[one]

    def places_of(self, unit_of: Tensor) -> tuple[Tensor, Tensor]:
        """(entries, structure of each), where unit_of[class] is a structure's number, -1 for none."""
        units = unit_of[self.classes]
        places = torch.nonzero((units >= 0) & (self.classes > 0)).flatten()
        return places, units[places]


class Findings:
    """The classes of a settled trace, by what makes, carries and reads them.

    Args:
        trace: settled.
        leave_out: paths of modules or parameters, or patterns. Structures that touch these stay.
    """

    def __init__(self, trace: Trace, leave_out: Sequence[str] = ()) -> None:
        self.trace, self.find, self.leave_out = trace, trace.classes.find, leave_out
        self.order = {path: number for number, (path, _) in enumerate(trace.network.named_modules())}
        self.lines: list[Line] = []
        self.reasons: dict[int, tuple[str, bool]] = {}
        # reasons to be given only where there is no other
        self.weak: dict[int, tuple[str, bool]] = {}
        # classes on which θ acts where they are made
        self.at_writers: set[int] = set()
        # by path: why a layer's weight, which is computed, can't be cut
        self.computed = {
            path: wrong
            for path, module in trace.network.named_modules()
            if is_computed(module) and (wrong := computed(module, "weight", path))
        }
        self._collect_lines()
        self._collect_reasons(leave_out)
        # by class: its lines
        self.touched: dict[int, list[int]] = {}
        for number, line in enumerate(self.lines):
            for one in distinct(line.classes):
                if one:
                    self.touched.setdefault(one, []).append(number)
        self.inner = self._inner()
        # classes that touch the same lines are alike
        self._alike: dict[tuple[int, ...], tuple[Line | None, frozenset[str]]] = {}
        heads = torch.tensor(sorted(trace.noted.heads) or [0], dtype=torch.int32)
        self.heads = set(self.find(heads).tolist()) - {0}

    def _collect_lines(self) -> None:
        trace = self.trace
        readers: dict[tuple[str, int], list[Reader]] = {}
        for reader in trace.noted.readers.values():
            readers.setdefault((reader.key, reader.dim), []).append(reader)
        # entries that were only moved, to be read as rows and columns, are tied to nothing
        alone = (
            self.find(torch.arange(trace.classes.count, dtype=torch.int32)).bincount(
                minlength=trace.classes.count
            )
            == 1
        )
        for (key, dim), atoms in trace.lines.items():
            parameter, classes = trace.parameters[key], self.find(atoms)
            makes = (key, dim) in trace.noted.producers or parameter.path in trace.noted.selected
            reads = readers.get((key, dim), [])
            if makes:
                made_by = trace.noted.producers.get((key, dim), parameter.path)
                self.lines.append(Line(parameter, dim, "producer", classes, made_by=made_by))
            role = "both" if makes else "consumer"
            self.lines += [Line(parameter, dim, role, classes, reader) for reader in reads]
            if not makes and not reads:
                self.lines.append(Line(parameter, dim, "between", classes))
            if makes and reads:
                self.at_writers |= set(distinct(classes))
                if (key, dim) in trace.noted.made_elsewhere:  # where θ would have to act, too
                    for one in distinct(classes):
                        reason = f"read by {key!r}, with which another module makes them"
                        self.weak.setdefault(one, (reason, True))
            if key in trace.entries and not bool(alone[trace.entries[key]].all()):
                for one in distinct(classes):
                    self.weak.setdefault(one, (f"tied to {key!r}, which is used in two ways", True))
        # by class: the modules that divide by its root mean square
        self.norms: dict[int, list[RootMeanSquare]] = {}
        for norm, labels in trace.noted.norms:
            classes = self.find(labels)
            if varies(classes, classes.dim() - 1):
                for one in distinct(classes):
                    if norm not in self.norms.setdefault(one, []):
                        self.norms[one].append(norm)
        self.at_writers |= self.norms.keys()
        made = torch.zeros(trace.classes.count, dtype=torch.bool)
        for line in self.lines:
            made[line.classes] = True
        made[0] = False
        for key, atoms in trace.entries.items():
            classes = self.find(atoms)
            classes = torch.where(made[classes], classes, 0)
            axis = axis_of(classes)
            if axis is not None:
                along = classes.movedim(axis, 0).reshape(classes.shape[axis], -1).amax(1)
                role = "writer" if key in trace.noted.added else "between"
                self.lines.append(Line(trace.parameters[key], axis, role, along))
            else:
                for one in distinct(classes):
                    if one:
                        self.weak.setdefault(one, (f"tied to {key!r} as a whole", False))

    def classes_of_norm(self, path: str) -> list[int]:
        """The classes of the channels that a module divides by their root mean square; none if it reads no stream."""
        return [one for one, norms in self.norms.items() if any(norm.path == path for norm in norms)]

    def _stays(self, one: int, reason: str, *, unsupported: bool = False) -> None:
        self.reasons.setdefault(one, (reason, unsupported))

    def _collect_reasons(self, leave_out: Sequence[str]) -> None:
        noted = self.trace.noted
        names = names_by_tensor(self.trace.network)
        for line in self.lines:
            named = {
                *names[id(line.parameter.tensor)],
                *((line.reader.path, line.reader.reader or "") if line.reader else ()),
            }
            if any(matches(name, leave_out) for name in named if name):
                for one in distinct(line.classes):
                    made = min(self._producers_of(one), key=self.place, default=line)
                    itself = made.parameter.path == line.parameter.path
                    where = line.parameter.path or line.parameter.key
                    self.reasons[one] = (
                        "left out" if itself else f"tied to {where!r}, which is left out",
                        False,
                    )
        for line in self.lines:
            if line.parameter.path in noted.in_training and line.role == "producer":
                for one in distinct(line.classes):
                    self._stays(one, IN_TRAINING)
        pinned = torch.tensor([atom for atom, *_ in noted.pinned] or [0], dtype=torch.int32)
        for one, (_, reason, unsupported, path) in zip(
            self.find(pinned).tolist(), noted.pinned, strict=False
        ):
            left = unsupported and matches(path, leave_out)
            # the layer itself is listed
            unsupported = unsupported and path not in self.computed
            self._stays(
                one,
                f"tied to {path!r}, which is left out" if left else reason,
                unsupported=unsupported and not left,
            )
        merged = torch.tensor([atom for atom, _ in noted.merged] or [0], dtype=torch.int32)
        self.merged: dict[int, str] = {}
        for one, (_, reason) in zip(self.find(merged).tolist(), noted.merged, strict=False):
            # of several reasons that one which people know by name
            if one not in self.merged or (
                reason.startswith("normalised") and not self.merged[one].startswith("normalised")
            ):
                self.merged[one] = reason

        # what would leave an axis empty
        for labels in (*noted.filled, *(read.labels for read in noted.reads)):
            classes = distinct(self.find(labels))
            if len(classes) == 1 and classes[0]:
                self.weak.setdefault(classes[0], (SINGLE, False))

    def _producers_of(self, one: int) -> list[Line]:
        return [line for line in self.lines if line.role == "producer" and line.size_of(one)]

    def place(self, line: Line) -> int:
        return self.order[line.made_by or line.parameter.path]

    def _inner(self) -> dict[int, list[int]]:
        """By class: the classes of what an InputSelection passes on of it."""
        inner: dict[int, list[int]] = {}
        for atoms, before, _ in self.trace.noted.selected.values():
            for inside, outside in zip(self.find(atoms).tolist(), self.find(before).tolist(), strict=True):
                if outside:
                    inner.setdefault(outside, []).append(inside)
        return inner

    def place_of(self, one: int) -> int:
        first = self.first(one)
        assert first is not None
        return self.place(first)

    def first(self, one: int) -> Line | None:
        """The first line of those that make a structure."""
        return self._first_and_roles(one)[0]

    def _first_and_roles(self, one: int) -> tuple[Line | None, frozenset[str]]:
        numbers = tuple(self.touched.get(one, ()))
        if numbers not in self._alike:
            lines = [self.lines[number] for number in numbers]
            made = [line for line in lines if line.role == "producer"]
            roles = frozenset(line.role for line in lines)
            self._alike[numbers] = min(made, key=self.place, default=None), roles
        return self._alike[numbers]

    def noises(self) -> Iterator[tuple[str, list[int]]]:
        """(path, class of each structure) of the noise layers that were called."""
        for path in self.trace.noted.noise:
            yield path, self.noise(path)

    def noise(self, path: str) -> list[int]:
        """The class of each structure of a noise layer, 0 for none; empty if the layer was not called."""
        labels = self.trace.noted.noise.get(path)
        return [] if labels is None else self.find(labels).tolist()

    def reason(self, one: int) -> str | None:
        """Why a structure stays; None if it does not."""
        if one in self.reasons:
            return self.reasons[one][0]
        normalised = self.merged.get(one, "")
        return normalised if normalised.startswith("normalised") else None

    def is_made(self, one: int) -> bool:
        """Whether some layer makes the structure."""
        return "producer" in self._first_and_roles(one)[1]

    def is_read(self, one: int) -> bool:
        """Whether some layer reads the structure, or what an InputSelection passes on of it."""
        roles = self._first_and_roles(one)[1]
        return "consumer" in roles or "both" in roles or any(map(self.is_read, self.inner.get(one, ())))


def axis_of(classes: Tensor) -> int | None:
    """The axis on which classes depend, those of 0 aside; None if there is none, or all are one."""
    for axis in range(classes.dim()):
        lines = classes.movedim(axis, 0).reshape(classes.shape[axis], -1)
        of_line = lines.amax(1, keepdim=True)
        if bool(((lines == of_line) | (lines == 0)).all()) and bool((of_line != of_line[0]).any()):
            return axis
    return None


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module or parameter, or a module above it, is named by one of the patterns."""
    parts = path.split(".")
    above = [".".join(parts[:number]) for number in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in above for pattern in patterns)
