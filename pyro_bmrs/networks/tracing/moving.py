"""Operations that only move entries: they are run on the labels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_bmrs.networks.tracing.labels import PLANES, Labels, or_zeros, without_constant_axes
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.meeting import full_axes, meet_unlabelled
from pyro_bmrs.networks.tracing.noted import Arguments, Meeting, tensors_in

# Operations that copy a tensor as it is.
_COPIES = {"clone", "contiguous", "_to_copy", "lift_fresh_copy"}


MOVES = {
    "cat", "stack", "roll", "repeat", "flip", "gather", "index", "_unsafe_index", "index_select", "constant_pad_nd",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "copy_",
    "copy", "slice_scatter", "select_scatter", "repeat_interleave", "tril", "triu", "diagonal_copy", "masked_select",
    "unfold_copy", "index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_", "take_along_dim",
    "unsafe_split", "unsafe_split_with_sizes", "split_with_sizes_copy", "unbind_copy", "rot90", "take", "diag_embed",
    "_pad_enum", "_pad_circular", "unsafe_chunk", *_COPIES,
}  # fmt: skip


def move(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Run the operation on the labels."""
    name = function._schema.name.split("::")[-1]
    if name.startswith("index_put") and (kwargs.get("accumulate") or args[3:4] == (True,)):
        raise ValueError("entries are added to others, not moved")
    data = _data_of(name, args)
    sources = [trace.labels(tensor) for tensor in data]
    outputs = tensors_in(out)
    if name.endswith("channel_shuffle"):  # the number of groups stays: each loses the same
        count = int(args[1])
        split = (data[0].shape[0], count, -1, *data[0].shape[2:])
        trace.note_box(tuple(None if some is None else some.reshape(split) for some in sources[0]))
    if name in {"cat", "stack"}:
        sources = _complete(trace, name, args, kwargs, data, sources)
    if all(trace.parameter(tensor) is not None or tensor in trace.moved for tensor in data):
        for tensor in outputs:
            trace.moved.add(tensor)
    if name in _COPIES:
        trace.memory.write(outputs[0], sources[0])
        return
    found: list[list[Tensor | None]] = [[None] * PLANES for _ in outputs]
    for plane in range(PLANES):
        if all(labels[plane] is None for labels in sources):
            continue
        by_id = {
            id(tensor): or_zeros(labels[plane], tensor).clone(memory_format=torch.contiguous_format)
            for tensor, labels in zip(data, sources, strict=True)
        }

        def on_labels(leaf: Any, by_id: dict[int, Tensor] = by_id) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in by_id:
                return by_id[id(leaf)]
            # on the meta device there are no values: the first entry stands for others of its kind
            return torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf.cpu()

        own, keywords = tree_map(on_labels, (tuple(args), kwargs))
        if name == "constant_pad_nd":
            padded = [own[0].dim() - 1 - number for number in range(len(own[1]) // 2)]
            if not set(padded) & set(trace.varying(own[0])):  # what is filled in goes with the rest
                small = without_constant_axes(own[0])[0]
                found[0][plane] = small.expand(outputs[0].shape)
                continue
            own = (*own[:2], 0)
        try:
            moved = function(*own, **keywords)
        except RuntimeError:  # some operations move numbers of floating point only
            own, keywords = tree_map(
                lambda leaf: (
                    leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.int32 else leaf
                ),
                (own, keywords),
            )
            moved = function(*own, **keywords)
        for number, tensor in enumerate(tensors_in(moved)):
            found[number][plane] = tensor.int()
    for tensor, labels in zip(outputs, found, strict=True):
        trace.memory.write(tensor, tuple(labels))


def _data_of(name: str, args: Arguments) -> list[Tensor]:
    """The tensors whose entries are moved, not those that say where to."""
    if name in {"cat", "stack"}:
        return list(args[0])
    if name in {"copy_", "copy", "slice_scatter", "select_scatter"}:
        return [args[0], args[1]]
    if name in {"index_put", "index_put_"}:
        return [args[0], args[2]]
    if name in {"index_copy", "index_copy_", "scatter", "scatter_"}:
        return [args[0], *(value for value in args[3:4] if isinstance(value, Tensor))]
    return [args[0]]


def _complete(
    trace: Ledger,
    name: str,
    args: Arguments,
    kwargs: dict[str, Any],
    data: list[Tensor],
    sources: list[Labels],
) -> list[Labels]:
    """Give parts without labels, that are joined to others, the labels of these, where they have room for them."""
    given: Any = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    dim = int(given)
    completed = list(sources)
    own = [
        any(some is not None for some in labels) and trace.are_entries(any_of(labels)) for labels in sources
    ]
    if all(own):
        return completed
    for number, (tensor, labels) in enumerate(zip(data, sources, strict=True)):
        if not tensor.numel() or (any(some is not None for some in labels) and not own[number]):
            continue
        mine: list[Tensor | None] = [None] * PLANES
        for plane in range(PLANES):
            others = [
                other[plane] for t, other, entries in zip(data, sources, own, strict=True)
                if t.dim() == tensor.dim() and not entries
            ]  # fmt: skip
            reference = next((other for other in others if other is not None), None)
            if reference is None:
                continue
            if name == "cat":
                if dim % tensor.dim() in trace.varying(reference):
                    mine[plane] = labels[plane]
                    continue
                reference = reference.narrow(dim, 0, 1)
            if own[number]:
                trace.note_added(any_of(labels))
                small = without_constant_axes(any_of(labels))[0]
                full = full_axes(tensor, small, tensor.dim())
                other = without_constant_axes(reference)[0]
                trace.noted.meetings.append(Meeting(small.clone(), other.clone(), full))
            else:
                meet_unlabelled(trace, name, tensor, reference, tensor.shape, bare=True)
            mine[plane] = reference.expand(tensor.shape)
        completed[number] = tuple(mine)
    return completed


def any_of(labels: Labels) -> Tensor:
    return next(some for some in labels if some is not None)
