"""Elementwise operations: labels that meet in an entry are united."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_bmrs.networks.tracing.labels import NONE, PLANES, Labels, together, without_constant_axes
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.noted import Arguments, Meeting, tensors_in

# Elementwise, though torch does not tag them so.
POINTWISE = {
    "hardswish", "hardswish_", "_prelu_kernel", "softplus", "log_sigmoid_forward", "rrelu_with_noise", "dropout",
    "native_dropout", "bernoulli_", "complex", "polar", "addcmul_",
    "index_add", "index_add_", "masked_fill_", "_fake_quantize_learnable_per_tensor_affine", "angle", "real", "imag",
    "_softmax_backward_data", "nan_to_num", "celu", "celu_", "elu_", "hardtanh_", "leaky_relu_", "relu6", "glu_jvp",
    "nonzero_static", "isin", "clamp_", "heaviside", "floor_divide", "remainder", "fmod", "copysign",
}  # fmt: skip


def pointwise(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Labels that meet in an entry are united."""
    name = function._schema.name.split("::")[-1]
    tensors = [tensor for tensor in tree_leaves((tuple(args), kwargs)) if isinstance(tensor, Tensor)]
    if name in {"index_add", "index_add_"}:
        # entries at some places are added to: each other dimension is met one by one
        _, dim, _, source = args[:4]
        tensors = [args[0], source] if source.numel() else [args[0]]
        merged = [
            tuple(None if some is None else trace.merge(some, [dim]) for some in trace.labels(tensor))
            for tensor in tensors
        ]
        result = meet(trace, name, [t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors], merged)
        for tensor in tensors_in(out):
            trace.memory.write(tensor, tuple(None if s is None else s.expand(tensor.shape) for s in result))
        return
    result = meet(trace, name, tensors, [trace.labels(tensor) for tensor in tensors])
    for tensor in tensors_in(out):
        fits = tuple(
            None if some is None or some.dim() > tensor.dim() else some.expand(tensor.shape)
            for some in result
        )
        trace.memory.write(tensor, fits)


def meet(trace: Ledger, name: str, tensors: list[Tensor], labels: list[Labels]) -> Labels:
    """Unite what meets entry by entry. Returns the labels of the result."""
    # a parameter may lose entries with structures of any plane
    labels = [
        tuple(some[0] for _ in some) if some[0] is not None and trace.are_entries(some[0]) else some
        for some in labels
    ]
    structures = [
        any(s is not None and not trace.are_entries(s) for s in plane) for plane in zip(*labels, strict=True)
    ]
    labels = [
        tuple(own if structures[plane] or plane == 0 else None for plane, own in enumerate(some))
        for some in labels
    ]
    return tuple(
        _meet_in_plane(trace, name, tensors, [some[plane] for some in labels], labels)
        for plane in range(PLANES)
    )


def _meet_in_plane(
    trace: Ledger, name: str, tensors: list[Tensor], labels: list[Tensor | None], all_planes: list[Labels]
) -> Tensor | None:
    labelled = [(tensor, some) for tensor, some in zip(tensors, labels, strict=True) if some is not None]
    if not labelled:
        return None
    dims = max(tensor.dim() for tensor in tensors)
    shape = common_shape([tensor.shape for tensor in tensors])
    own = [(t, wide(some, dims)) for t, some in labelled if trace.are_entries(some)]
    activations = [(t, wide(some, dims)) for t, some in labelled if not trace.are_entries(some)]
    if not activations:
        first = own[0][1]
        for _, other in own[1:]:
            trace.unite(first, other)
            first = torch.maximum(*together(first, other))
        result = first
    else:
        # entries that depend on a structure as a whole, of one that is broadcast over many: it stays
        kept = []
        for tensor, some in activations:
            others = [other for t, other in activations if t is not tensor]
            if others and _is_broadcast_whole(trace, tensor, some, others, dims):
                if not trace.is_pending(some):
                    trace.pin((some, *NONE[1:]), f"one number for many structures in {trace.by()}")
            else:
                kept.append((tensor, some))
        activations = kept or activations[:1]
        result = activations[0][1]
        for _, other in activations[1:]:
            trace.unite(result, other)
            one, two = together(result, other)
            alone = torch.where((one == 0) != (two == 0), torch.maximum(one, two), 0)
            if bool(alone.any()):  # what has no label can't be removed with what has
                trace.pin((alone, *NONE[1:]), f"combined with others that stay in {trace.by()}")
            result = torch.maximum(one, two)
        for tensor, some in own:
            small, other = without_constant_axes(some)[0], without_constant_axes(result)[0]
            if name.startswith(("add", "sub", "rsub")):
                trace.note_added(small)
            trace.noted.meetings.append(Meeting(small.clone(), other.clone(), full_axes(tensor, small, dims)))
    for tensor, own_labels, planes in zip(tensors, labels, all_planes, strict=True):
        if own_labels is None and activations:
            bare = all(other is None for other in planes)
            meet_unlabelled(trace, name, tensor, result, shape, bare)
    return result.expand(shape) if result.dim() == len(shape) else result


def common_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape that these broadcast to. (torch's own takes milliseconds.)"""
    dims = max(map(len, shapes))
    padded = [[1] * (dims - len(shape)) + list(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def wide(labels: Tensor, dims: int) -> Tensor:
    return labels.reshape([1] * (dims - labels.dim()) + list(labels.shape)) if labels.dim() < dims else labels


def _is_broadcast_whole(
    trace: Ledger, tensor: Tensor, labels: Tensor, others: list[Tensor], dims: int
) -> bool:
    """Whether labels are those of one class, along a dimension of size 1 that others fill with many."""
    if trace.varying(labels):
        return False
    shape = [1] * (dims - tensor.dim()) + list(tensor.shape)
    return any(shape[axis] == 1 for other in others for axis in trace.varying(other))


def meet_unlabelled(
    trace: Ledger, name: str, tensor: Tensor, labels: Tensor, shape: Sequence[int], bare: bool
) -> None:
    """Entries that are no structures': those that they meet one by one must stay together."""
    dims = labels.dim()
    lead = dims - tensor.dim()
    fixed = []
    for axis in trace.varying(labels):
        own = axis - lead
        if own >= 0 and tensor.shape[own] > 1 and not (bare and is_constant(tensor, own)):
            fixed.append(axis)
    if fixed:
        if tensor in trace.from_inputs:
            verb = "added to" if name.startswith(("add", "sub")) else "combined with"
            reason = f"{verb} an input of the network"
        else:
            reason = f"combined with other numbers of its whole width in {trace.by()}"
        trace.merge(labels, fixed, reason)


def full_axes(tensor: Tensor, atoms: Tensor, dims: int) -> frozenset[int]:
    """The axes, of so many, along which a parameter, or what was made of one, has values of its own."""
    lead = dims - tensor.dim()
    return frozenset(
        lead + axis
        for axis in range(tensor.dim())
        if atoms.shape[lead + axis] > 1 or (tensor.shape[axis] > 1 and not is_constant(tensor, axis))
    )


def is_constant(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor's values are the same along an axis: then it may have any size there."""
    if tensor.stride(axis) == 0:
        return True
    if tensor.is_meta:
        return False
    return torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))
