"""What a trace notes for later: where parameters are read, what they meet, which axes integers count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_bmrs.networks.cuts import RootMeanSquare

# What an operation is called with.
Arguments = Sequence[Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the network, where it lives in memory, and its first name."""

    path: str
    name: str
    tensor: Tensor

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}".lstrip(".")


@dataclass(frozen=True)
class Read:
    """A contraction of labelled entries with a parameter. Later it is seen whether the entries end there.

    Attributes:
        atoms: of the parameter's entries that are summed over. Shape: (…, k), one line where they are the same in all.
        labels: of the entries that they meet. Shape: (…, k).
    """

    atoms: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Meeting:
    """A parameter that meets labelled entries one by one: atoms and labels, of shapes that broadcast.

    Attributes:
        full: the axes of the labels along which the parameter's values differ.
    """

    atoms: Tensor
    labels: Tensor
    full: frozenset[int]


@dataclass(frozen=True)
class Pending:
    """A reduction over different structures. It ties them if its result is used.

    Attributes:
        labels: of what was reduced.
        axes: over which.
        reason: in words.
        result: atoms of the result, one for each line. Shape: that of `labels`, with size 1 along the axes.
    """

    labels: Tensor
    axes: tuple[int, ...]
    reason: str
    result: Tensor


@dataclass(frozen=True)
class Reader:
    """How a module reads a parameter's dimension: see `Member`."""

    key: str
    dim: int
    path: str
    name: str
    reader: str | None
    input_dim: int | None


@dataclass
class Noted:
    """What a trace has found, besides the classes."""

    reads: list[Read] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    # atoms of their results, and those that were used
    results: set[int] = field(default_factory=set)
    results_used: set[int] = field(default_factory=set)
    # labels of tensors on more than one axis of which they depend
    boxes: list[Tensor] = field(default_factory=list)
    # by module and attribute: labels of an axis, in as many parts as the integer says; and whether it is the whole size
    counted: dict[tuple[str, str], list[tuple[Tensor, bool]]] = field(default_factory=dict)
    # by path of a recurrent layer: why it stays
    recurrent: dict[str, str] = field(default_factory=dict)
    # paths of modules that run in training alone
    in_training: set[str] = field(default_factory=set)
    # (atom, reason) of entries that were united because an operation reads them all at once
    merged: list[tuple[int, str]] = field(default_factory=list)
    # labels of all entries along an axis that would be empty without them
    filled: list[Tensor] = field(default_factory=list)
    # (atom, reason, whether that is because something is not supported, path of the module that ran) of what stays
    pinned: list[tuple[int, str, bool, str]] = field(default_factory=list)
    # parameters that some operation used, by id
    used: set[int] = field(default_factory=set)
    heads: set[int] = field(default_factory=set)
    readers: dict[tuple[str, int, str, str], Reader] = field(default_factory=dict)
    producers: dict[tuple[str, int], str] = field(default_factory=dict)
    # of these, those that a module uses which does not hold the parameter
    made_elsewhere: set[tuple[str, int]] = field(default_factory=set)
    # by path of an InputSelection: (atoms of what it passes on, labels of these before, labels of its input)
    selected: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    # by parameter that is added to structures: paths of the modules that use it
    added: dict[str, set[str]] = field(default_factory=dict)
    # modules that divide by a root mean square, and the labels of its channels
    norms: list[tuple[RootMeanSquare, Tensor]] = field(default_factory=list)
    # paths of the modules that were called
    called: set[str] = field(default_factory=set)
    # paths of modules whose input does not have one entry per example in its first dimension
    folded: set[str] = field(default_factory=set)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what an operation is called with, or returns."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
