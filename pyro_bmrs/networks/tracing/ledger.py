"""What a trace knows: labels of tensors, classes of atoms, and what it notes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pyro_bmrs.networks.copies import is_dense
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.tracing.labels import (
    NONE,
    Classes,
    LabelMemory,
    Labels,
    Marked,
    distinct,
    varies,
    without_constant_axes,
)
from pyro_bmrs.networks.tracing.noted import Noted, Parameter, Pending
from pyro_bmrs.networks.tracing.tagged import TaggedInt


class Ledger:
    """Labels, classes and notes of a network while it is traced.

    Args:
        network: in evaluation mode; not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.classes, self.memory, self.noted = Classes(), LabelMemory(), Noted()
        self.paths: dict[nn.Module, str] = {}
        for path, module in network.named_modules():
            self.paths.setdefault(module, path)
        self.parameters: dict[str, Parameter] = {}
        self._at: dict[int, list[Parameter]] = {}
        for path, module in network.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if (tensor is not None and tensor.dim() and tensor.is_floating_point()) or (
                    tensor is not None and isinstance(module, InputSelection)
                ):
                    self._add(Parameter(path, name, tensor))
        # atoms of rows or columns, by name and dimension; of entries, by name
        self.lines: dict[tuple[str, int], Tensor] = {}
        self.entries: dict[str, Tensor] = {}
        # the first atom of each parameter's entries
        self._starts: list[tuple[int, Parameter]] = []
        # by atom: whether it is an entry's
        self._is_entry = torch.zeros(1, dtype=torch.bool)
        self.numbers = torch.randn(8_209, generator=torch.Generator().manual_seed(0))
        self.stack: list[nn.Module] = []
        self.received: dict[nn.Module, Tensor] = {}
        # memory that holds what follows from inputs, and entries of parameters in other places
        self.from_inputs, self.moved = Marked(), Marked()
        # more than 0 while operations are not followed
        self.silent = 0

    def _add(self, parameter: Parameter) -> None:
        key = parameter.tensor.untyped_storage()._cdata
        if all(other.tensor is not parameter.tensor for other in self._at.get(key, ())):
            self._at.setdefault(key, []).append(parameter)
            self.parameters[parameter.key] = parameter

    @property
    def again(self) -> AbstractContextManager[Any]:
        """A context in which operations are followed from within another."""
        raise NotImplementedError

    def labels(self, tensor: Tensor) -> Labels:
        """Labels of each entry, those of parameters included."""
        parameter = self.parameter(tensor)
        if parameter is not None and not self.memory.has(tensor):
            self._label_entries(parameter)
        return self.memory.read(tensor)

    def parameter(self, tensor: Tensor) -> Parameter | None:
        """The parameter that a tensor is, or is a view of."""
        if tensor.layout != torch.strided:
            return None
        found = self._at.get(tensor.untyped_storage()._cdata, ())
        if not found or tensor.dtype != found[0].tensor.dtype:
            return None
        start = tensor.storage_offset()
        for parameter in found:
            first = parameter.tensor.storage_offset()
            if first <= start < first + max(parameter.tensor.numel(), 1):
                return parameter
        return None

    def note_used(self, tensors: list[Tensor]) -> None:
        """Remember the parameters among the tensors of an operation."""
        for tensor in tensors:
            parameter = self.parameter(tensor)
            if parameter is not None:
                self.noted.used.add(id(parameter.tensor))

    def source(self, tensor: Tensor) -> Parameter | None:
        """The parameter whose entries a tensor holds, as a view or moved to other places."""
        if tensor not in self.moved:
            return self.parameter(tensor)
        (labels, *_) = self.memory.read(tensor)
        if labels is None:
            return None
        return self._owner(int(labels.flatten()[0]))

    def _owner(self, atom: int) -> Parameter | None:
        """The parameter of which an atom is an entry."""
        for start, parameter in self._starts:
            if start <= atom < start + parameter.tensor.numel():
                return parameter
        return None

    def _label_entries(self, parameter: Parameter) -> None:
        self._starts.append((self.classes.count, parameter))
        atoms = self.classes.new(parameter.tensor.numel())
        self._note_kind(atoms, entries=True)
        # one for each place in memory, so that any view of the parameter finds its own
        shaped = (
            atoms.as_strided(parameter.tensor.shape, parameter.tensor.stride())
            if is_dense(parameter.tensor)
            else atoms.view(parameter.tensor.shape)
        )
        self.entries[parameter.key] = shaped
        self.memory.write(parameter.tensor, (shaped, *NONE[1:]))

    def line(self, parameter: Parameter, dim: int) -> Tensor:
        """The atoms of a parameter's entries along a dimension."""
        key = parameter.key, dim
        if key not in self.lines:
            self.lines[key] = self.classes.new(parameter.tensor.shape[dim])
            self._note_kind(self.lines[key], entries=False)
        return self.lines[key]

    def _note_kind(self, atoms: Tensor, *, entries: bool) -> None:
        if len(self._is_entry) < self.classes.count:
            more = torch.zeros(2 * self.classes.count - len(self._is_entry), dtype=torch.bool)
            self._is_entry = torch.cat([self._is_entry, more])
        self._is_entry[atoms] = entries

    def are_entries(self, labels: Tensor) -> bool:
        """Whether labels are numbers of a parameter's own entries, not of structures that some layer makes."""
        small = without_constant_axes(labels)[0]
        own = self._is_entry[small]
        return bool(own.any()) and bool((own | (small == 0)).all())

    def unite(self, first: Tensor | None, second: Tensor | None) -> None:
        if first is not None and second is not None:
            self.classes.unite(first, second)

    def varying(self, labels: Tensor) -> list[int]:
        """The axes along which classes differ."""
        found = self.classes.find(labels)
        return [axis for axis in range(found.dim()) if varies(found, axis)]

    def merge(self, labels: Tensor, axes: list[int], reason: str | None = None) -> Tensor:
        """Unite labels along some axes. Returns them with size 1 there."""
        if not axes or not labels.dim():
            return labels
        small, _ = without_constant_axes(labels)
        axes = [axis % labels.dim() for axis in axes]
        rest = [axis for axis in range(labels.dim()) if axis not in axes]
        lines = small.permute(*rest, *axes).reshape(*[small.shape[axis] for axis in rest], -1)
        first = lines.amax(-1, keepdim=True)
        if self.classes.unite(first, lines) and reason:
            changed = first[lines.amin(-1, keepdim=True) != first]
            self.noted.merged += [(atom, reason) for atom in distinct(self.classes.find(changed)) if atom]
        shape = [1 if axis in axes else small.shape[axis] for axis in range(labels.dim())]
        back = first.squeeze(-1).reshape([small.shape[axis] for axis in rest] + [1] * len(axes))
        order = [*rest, *axes]
        if reason and bool(back.all()):
            self.noted.filled.append(torch.tensor(distinct(back), dtype=torch.int32))
        merged = back.permute([order.index(axis) for axis in range(labels.dim())]).reshape(shape)
        return merged.expand([1 if axis in axes else labels.shape[axis] for axis in range(labels.dim())])

    def along(self, labels: Tensor, dim: int) -> Tensor:
        """Labels along one dimension. They are united across the others."""
        merged = self.merge(labels, [d for d in range(labels.dim()) if d != dim % labels.dim()])
        return merged.expand(
            *[labels.shape[d] if d == dim % labels.dim() else 1 for d in range(labels.dim())]
        ).flatten()

    def reduced(self, labels: Tensor, axes: list[int], reason: str) -> Tensor:
        """Labels of a reduction over some axes: with size 1 there."""
        small, _ = without_constant_axes(labels)
        if self.are_entries(small) or not any(varies(self.classes.find(small), axis) for axis in axes):
            return self.merge(labels, axes, reason)
        shape = [1 if axis in axes else size for axis, size in enumerate(small.shape)]
        result = self.classes.new(prod(shape)).view(shape)
        self._note_kind(result.flatten(), entries=False)
        self.noted.pending.append(Pending(small.clone(), tuple(axes), reason, result))
        self.noted.results.update(distinct(result))
        return result.expand([1 if axis in axes else size for axis, size in enumerate(labels.shape)])

    def is_pending(self, labels: Tensor) -> bool:
        """Whether labels are those of reductions that may still be without use. From now on they are used."""
        atoms = set(distinct(labels)) - {0}
        self.noted.results_used |= atoms & self.noted.results
        return bool(atoms) and atoms <= self.noted.results

    def pin(self, labels: Labels, reason: str, unsupported: bool = False, path: str | None = None) -> None:
        """Structures with these labels stay, because of what runs here, or in the module at `path`."""
        here = self.here if path is None else path
        for some in labels:
            if some is not None:
                atoms = distinct(self.classes.find(without_constant_axes(some)[0]))
                self.noted.pinned += [(atom, reason, unsupported, here) for atom in atoms if atom]

    def pin_unknown(self, name: str, tensors: list[Tensor]) -> None:
        """Structures that an operation without a rule reads stay."""
        for tensor in tensors:
            self.pin(
                self.labels(tensor),
                f"read by {name} in {self.by()}, which can't be followed",
                unsupported=True,
            )

    def note_heads(self, labels: Tensor) -> None:
        """Remember structures that activations multiplied with one another consist of."""
        found = distinct(self.classes.find(without_constant_axes(labels)[0]))
        self.noted.heads.update(atom for atom in found if atom)

    def note_added(self, labels: Tensor, path: str | None = None) -> None:
        """Remember that the running module, or that at `path`, adds a parameter, with these entries, to structures."""
        parameter = self._owner(int(labels.max()))
        if parameter is not None:
            self.noted.added.setdefault(parameter.key, set()).add(self.here if path is None else path)

    def note_box(self, labels: Labels) -> None:
        """Remember labels that depend on several axes: what is removed must leave a box."""
        for some in labels:
            if some is not None:
                small, count = without_constant_axes(some)
                # a parameter's own entries have to form a box where they are stored
                if count > 1 and not self.are_entries(small):
                    found = self.classes.find(small)
                    if sum(varies(found, axis) for axis in range(found.dim())) > 1:
                        self.noted.boxes.append(small.squeeze().clone())

    # ------------------------------------------------------------------------------------------- words

    @property
    def here(self) -> str:
        """Path of the module that runs."""
        return self.paths[self.stack[-1]] if self.stack else ""

    def by(self) -> str:
        """The module that runs, in words."""
        module = self.stack[-1] if self.stack else self.network
        return f"{self.paths[module] or '(itself)'!r}, a {type(module).__name__}"

    # ------------------------------------------------------------------------------ integers of modules

    def note_size(self, tensor: Tensor, axis: int, tag: TaggedInt) -> None:
        """Remember that an integer made from attributes of modules is the size of a tensor along an axis."""
        with _disable_current_modes():
            if self.silent or not (self.memory.has(tensor) or self.parameter(tensor) is not None):
                return
            for some in self.labels(tensor):
                if some is None:
                    continue
                small, _ = without_constant_axes(some)
                if small.shape[axis] != int(tag):
                    continue
                lines = small.movedim(axis, 0)
                for path, name, value in tag.sources:
                    if int(tag) % value == 0:
                        own = self.here if path is None else path
                        self.note_count(own, name, lines.reshape(value, -1), whole=int(tag) == value)

    def note_parts(self, parts: list[Tensor]) -> None:
        """Equal parts of a tensor stay equal when each loses what stands in the same place."""
        with _disable_current_modes():
            if not self.silent:
                first = self.labels(parts[0])
                for other in parts[1:]:
                    for one, two in zip(first, self.labels(other), strict=True):
                        self.unite(one, two)

    def note_count(self, path: str, name: str, labels: Tensor, *, whole: bool = True) -> None:
        """labels: (size, …)."""
        known = self.noted.counted.setdefault((path, name), [])
        if not any(labels.shape == other.shape and torch.equal(labels, other) for other, _ in known):
            known.append((labels.clone(), whole))
