"""From a settled trace to groups of structures, and to what stays, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pyro_bmrs.networks.computed import computed, is_computed
from pyro_bmrs.networks.cuts import RootMeanSquare, names_by_tensor
from pyro_bmrs.networks.groups import Count, Member, StructureGroup
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.tracing.labels import distinct, varies
from pyro_bmrs.networks.tracing.noted import Parameter, Reader
from pyro_bmrs.networks.tracing.trace import Trace

SINGLE = "a single structure, and one must stay"
UNREAD = "read by no linear or convolution layer"
# Attributes in which attention modules keep their number of heads, and the width of all of them together.
_HEADS = {
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_key_value_heads", "num_kv_heads",
    "n_kv_heads", "all_head_size", "inner_dim", "attn_dim",
}  # fmt: skip
_NEVER = "never used in a forward pass in evaluation"
_IN_TRAINING = "runs in training alone"


@dataclass(frozen=True)
class Refused:
    """Channels that stay, and why.

    Attributes:
        path: the first module that makes them.
        channels: their number.
        reason: why none of them can be removed without changing the others.
        unsupported: True if they could not be followed, cut or tried; False if that is what the network is.
    """

    path: str
    channels: int
    reason: str
    unsupported: bool = False


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


class Grouping:
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
        self.heads: set[int] = set()

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
                    made = min(self._producers_of(one), key=self._place, default=line)
                    itself = made.parameter.path == line.parameter.path
                    where = line.parameter.path or line.parameter.key
                    self.reasons[one] = (
                        "left out" if itself else f"tied to {where!r}, which is left out",
                        False,
                    )
        for line in self.lines:
            if line.parameter.path in noted.in_training and line.role == "producer":
                for one in distinct(line.classes):
                    self._stays(one, _IN_TRAINING)
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

    def _place(self, line: Line) -> int:
        return self.order[line.made_by or line.parameter.path]

    def _inner(self) -> dict[int, list[int]]:
        """By class: the classes of what an InputSelection passes on of it."""
        inner: dict[int, list[int]] = {}
        for atoms, before, _ in self.trace.noted.selected.values():
            for inside, outside in zip(self.find(atoms).tolist(), self.find(before).tolist(), strict=True):
                if outside:
                    inner.setdefault(outside, []).append(inside)
        return inner

    # -------------------------------------------------------------------------------------------- groups

    def groups(self) -> tuple[dict[str, StructureGroup], list[Refused]]:
        """The groups, by site; and what stays."""
        # those that touch the same lines: while one of them stays no line is empty
        families: dict[tuple[Any, ...], list[int]] = {}
        refused: list[tuple[Line, int, str, bool]] = []
        heads = torch.tensor(sorted(self.trace.noted.heads) or [0], dtype=torch.int32)
        self.heads = set(self.find(heads).tolist()) - {0}
        for one in self.touched:
            first = self._first(one)
            if first is None:
                continue
            count = first.size_of(one)
            if one in self.reasons:
                refused.append((first, count, *self.reasons[one]))
            elif one in self.weak:
                merged = self.merged.get(one)
                refused.append((first, count, *(self.weak[one] if merged is None else (merged, False))))
            elif not self.is_read(one):
                refused.append((first, count, self.merged.get(one, UNREAD), False))
            else:
                made = first.parameter
                whole = made.name == "weight" or made.path in self.trace.noted.selected
                name = first.made_by if whole else made.key
                kind = name, *self.touched[one], one in self.heads, one in self.at_writers
                families.setdefault(kind, []).append(one)
        self._join_single(families)
        groups: dict[str, StructureGroup] = {}
        for (path, *_), classes in sorted(families.items(), key=lambda item: self._place_of(item[1][0])):
            if len(classes) < 2:
                first = self._first(classes[0])
                assert first is not None
                refused.append((first, first.size_of(classes[0]), self.merged.get(classes[0], SINGLE), False))
                continue
            group = self._group(classes, path, groups)
            groups[group.site] = group
        return groups, [*self._refused(refused), *self._untouched()]

    def _join_single(self, families: dict[tuple[str, bool, bool], list[int]]) -> None:
        """A single structure goes to a group that a layer makes together with it, of which another may stay."""
        for kind, classes in list(families.items()):
            if len(classes) > 1:
                continue
            lines = {number for number in self.touched[classes[0]] if self.lines[number].role == "producer"}
            for other, theirs in families.items():
                if (
                    other != kind
                    and other[1:] == kind[1:]
                    and any(lines & {*self.touched[one]} for one in theirs)
                ):
                    theirs += families.pop(kind)
                    break

    def _place_of(self, one: int) -> int:
        first = self._first(one)
        assert first is not None
        return self._place(first)

    def _first(self, one: int) -> Line | None:
        """The first line of those that make a structure."""
        made = (self.lines[number] for number in self.touched[one])
        return min((line for line in made if line.role == "producer"), key=self._place, default=None)

    # --------------------------------------------------------------------------- noise layers written by hand

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
        return any(self.lines[number].role == "producer" for number in self.touched.get(one, ()))

    def is_read(self, one: int) -> bool:
        """Whether some layer reads the structure, or what an InputSelection passes on of it."""
        return any(
            self.lines[number].role in ("consumer", "both") for number in self.touched.get(one, ())
        ) or any(map(self.is_read, self.inner.get(one, ())))

    def group_of(self, site: str, classes: Sequence[int]) -> StructureGroup:
        """The group of structures in this order."""
        return self._group(classes, site, {}, by_hand=True)

    def _group(
        self, classes: Sequence[int], path: str, groups: dict[str, StructureGroup], *, by_hand: bool = False
    ) -> StructureGroup:
        lines = [self.lines[number] for number in sorted({n for one in classes for n in self.touched[one]})]
        made = [line for line in lines if line.role == "producer"]
        if not by_hand:  # in the order in which the first layer makes them
            first = min(made, key=self._place)
            place = {one: number for number, one in reversed(list(enumerate(first.classes.tolist())))}
            classes = sorted(classes, key=lambda one: place.get(one, len(place)))
        unit_of = torch.full((self.trace.classes.count,), -1)
        unit_of[torch.tensor(classes)] = torch.arange(len(classes))
        members = [self._member(line, unit_of) for line in lines]
        members += self._members_inside(classes)
        widths = [
            int(m.units.bincount().max()) for line, m in zip(lines, members, strict=False) if line in made
        ]
        read = [int(m.units.bincount().max()) for m in members if m.role in ("consumer", "both")]
        kind = self._kind(made, bool(self.heads & set(classes)))
        name = path
        if kind == "heads" and not by_hand:
            name = _common([line.made_by for line in made]) or name
        number, unique = 1, name or "(itself)"
        while unique in groups:
            number += 1
            unique = f"{name}:{number}"
        order = ("producer", "writer", "between", "selection", "both", "consumer")
        at_writers = bool(self.at_writers & set(classes))
        if not at_writers:
            members = [replace(m, role="between") if m.role == "writer" else m for m in members]
        norms = dict.fromkeys(norm for one in classes for norm in self.norms.get(one, ()))
        members.sort(key=lambda member: order.index(member.role))
        return StructureGroup(
            unique, len(classes), tuple(members), min([max(widths), *read]), kind,
            self._counts(unit_of, kind, name, members), at_writers, tuple(norms),
        )  # fmt: skip

    def _kind(self, made: list[Line], heads: bool) -> str:
        modules = [self.trace.network.get_submodule(line.parameter.path) for line in made]
        if any(isinstance(module, InputSelection) for module in modules):
            paths = {line.parameter.path for line in made}
            behind = any(
                bool(before.any())
                for path, (_, _, before) in self.trace.noted.selected.items()
                if path in paths
            )
            return "positions" if behind else "inputs"
        if heads:
            return "heads"
        return "filters" if any(isinstance(module, _ConvNd) for module in modules) else "units"

    def _member(self, line: Line, unit_of: Tensor) -> Member:
        places, units = line.places_of(unit_of)
        if line.reader is not None:
            reader = line.reader
            return Member(
                reader.path, reader.name, line.dim, line.role, places, units, reader=reader.reader,
                input_dim=reader.input_dim,
            )  # fmt: skip
        (first, *_) = sorted(self.trace.noted.added.get(line.parameter.key, {line.parameter.path}))
        read_by = None if line.role != "writer" or first == line.parameter.path else first
        return Member(
            line.parameter.path, line.parameter.name, line.dim, line.role, places, units, reader=read_by
        )

    def _members_inside(self, classes: Sequence[int]) -> list[Member]:
        """What an InputSelection passes on of structures goes with them."""
        members: list[Member] = []
        unit_of = torch.full((self.trace.classes.count,), -1)
        unit_of[torch.tensor(classes)] = torch.arange(len(classes))
        for path, (atoms, before, width) in self.trace.noted.selected.items():
            units = unit_of[self.find(width)]
            places = torch.nonzero((units >= 0) & (width > 0)).flatten()
            if not len(places):
                continue
            members.append(Member(path, "index", 0, "selection", places, units[places]))
            inside = torch.full_like(unit_of, -1)
            for one, outer in zip(self.find(atoms).tolist(), self.find(before).tolist(), strict=True):
                inside[one] = unit_of[outer] if outer else -1
            for line in self.lines:
                found = self._member(line, inside)
                if len(found.indices):
                    role = "between" if line.role == "producer" else line.role
                    members.append(Member(**{**vars(found), "role": role}))
        return members

    def _counts(self, unit_of: Tensor, kind: str, site: str, members: Sequence[Member]) -> tuple[Count, ...]:
        """The integers of modules that count these structures."""
        counts = []
        for (path, name), several in self.trace.noted.counted.items():
            candidates = []
            for labels, whole in several:
                found = self.find(labels)
                ours = (unit_of[found] >= 0) & (found > 0)
                if not bool(ours.any()):
                    continue
                if varies(found, 0) and not varies(found, 1):
                    candidates.append(found[:, 0])
                elif whole and bool(ours.all()):
                    # of the same structures it is the size of another axis, which loses nothing
                    candidates = []
                    break
            if candidates:
                units = unit_of[candidates[0]]
                places = torch.nonzero((units >= 0) & (candidates[0] > 0)).flatten()
                counts.append(Count(path, name, len(candidates[0]), places, units[places]))
        if kind == "heads":
            known = {(count.path, count.name) for count in counts}
            counts += [count for count in self._told(site, members) if (count.path, count.name) not in known]
        return tuple(counts)

    def _told(self, site: str, members: Sequence[Member]) -> Iterator[Count]:
        """What an attention module says about its heads, without using it in its forward pass."""
        read = next((member for member in members if member.role == "consumer"), None)
        if read is None or site not in self.order:
            return
        module = self.trace.network.get_submodule(site)
        size = len(read.indices)
        units = read.units[read.indices.argsort()]
        for name, value in vars(module).items():
            if name in _HEADS and type(value) is int and value > 1 and size % value == 0:
                blocks = units.view(value, -1)
                if not varies(blocks, 1):
                    yield Count(site, name, value, torch.arange(value), blocks[:, 0])

    # ---------------------------------------------------------------------------------------- what stays

    def _refused(self, found: list[tuple[Line, int, str, bool]]) -> list[Refused]:
        """One row for each layer and reason."""
        totals: dict[tuple[str, str, bool], int] = {}
        for line, count, reason, unsupported in sorted(found, key=lambda item: self._place(item[0])):
            key = line.made_by or "(itself)", reason, unsupported
            totals[key] = totals.get(key, 0) + count
        return [
            Refused(path, count, reason, unsupported) for (path, reason, unsupported), count in totals.items()
        ]

    def _untouched(self) -> list[Refused]:
        """Modules whose tensors are computed, or that no operation was seen to use."""
        trace = self.trace
        found: list[Refused] = []
        for path, module in trace.network.named_modules():
            own = [p for p in module._parameters.values() if p is not None and p.dim()]
            if path in self.computed:
                reason, unsupported = self.computed[path], True
            elif path in trace.noted.recurrent:
                reason, unsupported = trace.noted.recurrent[path], True
            elif own and not trace.noted.used.intersection(map(id, own)):
                reason, unsupported = (_IN_TRAINING if path in trace.noted.in_training else _NEVER), False
            else:
                continue
            left = matches(path, self.leave_out)
            found.append(
                Refused(
                    path or "(itself)",
                    _rows(module),
                    "left out" if left else reason,
                    unsupported and not left,
                )
            )
        return found


def _rows(module: nn.Module) -> int:
    """Number of channels of a module: rows of its first parameter."""
    first = next(
        (
            p
            for p in (getattr(module, "weight", None), *module.parameters(recurse=False))
            if isinstance(p, Tensor)
        ),
        None,
    )
    return 0 if first is None else int(first.shape[0])


def axis_of(classes: Tensor) -> int | None:
    """The axis on which classes depend, those of 0 aside; None if there is none, or all are one."""
    for axis in range(classes.dim()):
        lines = classes.movedim(axis, 0).reshape(classes.shape[axis], -1)
        of_line = lines.amax(1, keepdim=True)
        if bool(((lines == of_line) | (lines == 0)).all()) and bool((of_line != of_line[0]).any()):
            return axis
    return None


def _common(paths: list[str]) -> str:
    """The innermost module that holds all of these layers."""
    parts = [path.split(".")[:-1] for path in paths]
    common = parts[0]
    for other in parts[1:]:
        while other[: len(common)] != common:
            common = common[:-1]
    return ".".join(common)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module or parameter, or a module above it, is named by one of the patterns."""
    parts = path.split(".")
    above = [".".join(parts[:number]) for number in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in above for pattern in patterns)
