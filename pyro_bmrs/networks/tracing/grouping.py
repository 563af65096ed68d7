"""From what is found of a network to groups of structures, and to what stays, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pyro_bmrs.networks.groups import Count, Member, StructureGroup
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.tracing.findings import IN_TRAINING, SINGLE, Findings, Line, matches
from pyro_bmrs.networks.tracing.labels import varies

UNREAD = "read by no linear or convolution layer"
# Attributes in which attention modules keep their number of heads, and the width of all of them together.
_HEADS = {
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_key_value_heads", "num_kv_heads",
    "n_kv_heads", "all_head_size", "inner_dim", "attn_dim",
}  # fmt: skip
_NEVER = "never used in a forward pass in evaluation"


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


class Grouping(Findings):
    """The structures of a network, by what makes, carries and reads them."""

    def groups(self) -> tuple[dict[str, StructureGroup], list[Refused]]:
        """The groups, by site; and what stays."""
        # those that touch the same lines: while one of them stays no line is empty
        families: dict[tuple[Any, ...], list[int]] = {}
        refused: list[tuple[Line, int, str, bool]] = []
        for one in self.touched:
            first = self.first(one)
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
        groups: dict[str, StructureGroup] = {}
        for (path, *_), classes in sorted(families.items(), key=lambda item: self.place_of(item[1][0])):
            if len(classes) < 2:
                first = self.first(classes[0])
                assert first is not None
                refused.append((first, first.size_of(classes[0]), self.merged.get(classes[0], SINGLE), False))
                continue
            group = self._group(classes, path, groups)
            groups[group.site] = group
        return groups, [*self._refused(refused), *self._untouched()]

    def group_of(self, site: str, classes: Sequence[int]) -> StructureGroup:
        """The group of structures in this order."""
        return self._group(classes, site, {}, by_hand=True)

    def _group(
        self, classes: Sequence[int], path: str, groups: dict[str, StructureGroup], *, by_hand: bool = False
    ) -> StructureGroup:
        lines = [self.lines[number] for number in sorted({n for one in classes for n in self.touched[one]})]
        made = [line for line in lines if line.role == "producer"]
        if not by_hand:  # in the order in which the first layer makes them
            first = min(made, key=self.place)
            place = {one: number for number, one in reversed(list(enumerate(first.classes.tolist())))}
            classes = sorted(classes, key=lambda one: place.get(one, len(place)))
        unit_of = torch.full((self.trace.classes.count,), -1)
        unit_of[torch.tensor(classes)] = torch.arange(len(classes))
        members = [self._member(line, unit_of) for line in lines]
        members += self._members_inside(unit_of)
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

    def _members_inside(self, unit_of: Tensor) -> list[Member]:
        """What an InputSelection passes on of structures goes with them."""
        members: list[Member] = []
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
        for line, count, reason, unsupported in sorted(found, key=lambda item: self.place(item[0])):
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
                reason, unsupported = (IN_TRAINING if path in trace.noted.in_training else _NEVER), False
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


def _common(paths: list[str]) -> str:
    """The innermost module that holds all of these layers."""
    parts = [path.split(".")[:-1] for path in paths]
    common = parts[0]
    for other in parts[1:]:
        while other[: len(common)] != common:
            common = common[:-1]
    return ".".join(common)
