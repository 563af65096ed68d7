"""Labels: which structure each entry of an activation belongs to.

An atom is a number from 1 on: one row or column of a weight, or one entry of another parameter. A label is an atom; 0
is none. Atoms that can only be removed together form a class.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# An entry can belong to two structures at once, as a token and a channel. Each plane has one label for each entry.
PLANES = 2
# Of one tensor: a label for each entry, or None, by plane.
Labels = tuple[Tensor | None, ...]
NONE: Labels = (None,) * PLANES


class Classes:
    """Classes of atoms, by union-find on whole tensors."""

    def __init__(self) -> None:
        self._parent = torch.zeros(1024, dtype=torch.int32)
        self._count = 1  # atom 0 is no atom

    @property
    def count(self) -> int:
        """Number of atoms, 0 included."""
        return self._count

    def new(self, count: int) -> Tensor:
        """New atoms, each in a class of its own. Shape: (count,)."""
        atoms = torch.arange(self._count, self._count + count, dtype=torch.int32)
        self._count += count
        if self._count > len(self._parent):
            more = torch.zeros(max(self._count, 2 * len(self._parent)) - len(self._parent), dtype=torch.int32)
            self._parent = torch.cat([self._parent, more])
        self._parent[atoms] = atoms
        return atoms

    def find(self, labels: Tensor) -> Tensor:
        """The class of each label, as its least atom. Shape: that of `labels`."""
        small, axes = without_constant_axes(labels)
        flat = small.reshape(-1)
        above = self._parent[flat]
        while True:
            next_above = self._parent[above]
            if torch.equal(next_above, above):
                break
            above = next_above
        self._parent[flat] = above
        found = above.view(small.shape)
        return found.expand(labels.shape) if axes != labels.dim() else found

    def unite(self, first: Tensor, second: Tensor) -> bool:
        """Unite the classes of labels that stand in the same place. Returns whether anything changed."""
        first, second = together(without_constant_axes(first)[0], without_constant_axes(second)[0])
        first, second = first.reshape(-1), second.reshape(-1)
        there = (first != 0) & (second != 0)
        first, second = first[there], second[there]
        changed = False
        while True:
            one, other = self.find(first), self.find(second)
            apart = one != other
            if not bool(apart.any()):
                return changed
            changed = True
            first, second = one[apart], other[apart]
            low, high = torch.minimum(first, second), torch.maximum(first, second)
            self._parent.scatter_reduce_(0, high.long(), low, "amin")


def distinct(labels: Tensor) -> list[int]:
    """The labels that occur, in order; 0 among them, if some entry has none."""
    return labels.flatten().unique().tolist()  # type: ignore[no-any-return, no-untyped-call]


def together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in the shape that they broadcast to."""
    one, other = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
    return one, other


def varies(labels: Tensor, axis: int) -> bool:
    """Whether labels differ along an axis."""
    if labels.shape[axis] < 2 or labels.stride(axis) == 0:
        return False
    return not torch.equal(labels, labels.narrow(axis, 0, 1).expand_as(labels))


def or_zeros(labels: Tensor | None, like: Tensor) -> Tensor:
    """The labels of a tensor, or 0 for each of its entries if there are none."""
    return torch.zeros((), dtype=torch.int32).expand(like.shape) if labels is None else labels


def without_constant_axes(labels: Tensor) -> tuple[Tensor, int]:
    """(labels with size 1 along each axis along which they are constant, number of axes that vary)."""
    count = 0
    # axes without memory first: they cost nothing, and leave less for the others
    for axis in sorted(range(labels.dim()), key=labels.stride):
        if labels.shape[axis] < 2:
            continue
        if varies(labels, axis):
            count += 1
        else:
            labels = labels.narrow(axis, 0, 1)
    return labels, count


class Marked:
    """A set of the memories of tensors, which forgets those that are freed."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return  # a sparse tensor has no memory of its own
        storage = tensor.untyped_storage()
        if storage._cdata not in self._keys:
            self._keys.add(storage._cdata)
            weakref.finalize(storage, self._keys.discard, storage._cdata)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._keys


@dataclass
class _Stored:
    """Labels of one storage: of the tensor that wrote or read them last; of all entries, once another one has asked."""

    entries: int
    geometry: tuple[Sequence[int], Sequence[int], int] | None = None
    given: Tensor | None = None
    flat: Tensor | None = None


class LabelMemory:
    """Labels beside the memory of activations. What shares memory shares labels, so that views need no rule."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], _Stored] = {}
        self._watched: set[int] = set()

    def read(self, tensor: Tensor) -> Labels:
        if tensor.layout != torch.strided:
            return NONE
        return tuple(self._read(tensor, plane) for plane in range(PLANES))

    def write(self, tensor: Tensor, labels: Labels) -> None:
        if tensor.layout != torch.strided:
            return
        for plane, some in enumerate(labels):
            self._write(tensor, plane, some)

    def has(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided:
            return False
        key = tensor.untyped_storage()._cdata
        return any((key, plane) in self._of for plane in range(PLANES))

    def _read(self, tensor: Tensor, plane: int) -> Tensor | None:
        stored = self._of.get((tensor.untyped_storage()._cdata, plane))
        if stored is None:
            return None
        geometry = _geometry(tensor)
        if stored.geometry == geometry:
            assert stored.given is not None
            return stored.given.expand(tensor.shape)
        flat = _flat(stored)
        entries = tensor.untyped_storage().nbytes() // tensor.element_size()
        if entries != stored.entries:
            # seen as another type: complex numbers are pairs of real ones
            if entries > stored.entries:
                flat = flat.repeat_interleave(entries // stored.entries)
            else:
                flat = flat.view(entries, -1).amax(1)
            return flat.as_strided(*geometry)
        small, _ = without_constant_axes(flat.as_strided(*geometry))
        stored.geometry, stored.given = geometry, small
        return small.expand(tensor.shape)

    def _write(self, tensor: Tensor, plane: int, labels: Tensor | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata, plane
        stored = self._of.get(key)
        geometry = _geometry(tensor)
        entries = storage.nbytes() // max(tensor.element_size(), 1)
        if stored is None:
            if labels is None:
                return
            if key[0] not in self._watched:
                self._watched.add(key[0])
                weakref.finalize(storage, self._forget, key[0])
            stored = self._of[key] = _Stored(entries)
        whole = tensor.numel() == entries
        if whole or stored.geometry == geometry or (stored.geometry is None and stored.flat is None):
            if labels is None:
                del self._of[key]
                return
            # a copy: the labels given may be a view of those of another storage
            stored.geometry, stored.flat = geometry, None
            stored.given = without_constant_axes(labels.expand(tensor.shape))[0].int().clone()
            stored.entries = entries
            return
        filled = torch.zeros((), dtype=torch.int32) if labels is None else labels
        _flat(stored).as_strided(*geometry).copy_(filled.expand(tensor.shape))
        stored.geometry = stored.given = None

    def _forget(self, key: int) -> None:
        self._watched.discard(key)
        for plane in range(PLANES):
            self._of.pop((key, plane), None)


def _geometry(tensor: Tensor) -> tuple[Sequence[int], Sequence[int], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _flat(stored: _Stored) -> Tensor:
    """A label for each entry of a storage, which is kept from now on."""
    if stored.flat is None:
        assert stored.given is not None
        assert stored.geometry is not None
        size, stride, offset = stored.geometry
        stored.flat = torch.zeros(stored.entries, dtype=torch.int32)
        stored.flat.as_strided(size, stride, offset).copy_(stored.given.expand(size))
    return stored.flat
