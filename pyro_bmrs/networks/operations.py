"""What each of torch's operations does to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bmrs.networks.labels import NONE, PLANES, Labels, without_constant_axes
from pyro_bmrs.networks.trace import Meeting, Parameter, Read, Reader, Trace

_Arguments = Sequence[Any]
_Rule = Callable[[Trace, Any, _Arguments, dict[str, Any], Any], None]

# Operations that copy a tensor as it is.
_COPIES = {"clone", "contiguous", "_to_copy", "lift_fresh_copy"}
# Operations that only move entries: they are run on the labels themselves.
_MOVES = {
    "cat", "stack", "roll", "repeat", "flip", "gather", "index", "_unsafe_index", "index_select", "constant_pad_nd",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "copy_",
    "copy", "slice_scatter", "select_scatter", "repeat_interleave", "tril", "triu", "diagonal_copy", "masked_select",
    "unfold_copy", "index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_", "take_along_dim",
    "unsafe_split", "unsafe_split_with_sizes", "split_with_sizes_copy", "unbind_copy", "rot90", "take", "diag_embed",
    "_pad_enum", "_pad_circular", "unsafe_chunk", *_COPIES,
}  # fmt: skip
# Elementwise, though torch does not tag them so.
_POINTWISE = {
    "hardswish", "hardswish_", "_prelu_kernel", "softplus", "log_sigmoid_forward", "rrelu_with_noise", "dropout",
    "native_dropout", "bernoulli_", "complex", "polar", "addcmul_",
    "index_add", "index_add_", "masked_fill_", "_fake_quantize_learnable_per_tensor_affine", "angle", "real", "imag",
    "_softmax_backward_data", "nan_to_num", "celu", "celu_", "elu_", "hardtanh_", "leaky_relu_", "relu6", "glu_jvp",
    "nonzero_static", "isin", "clamp_", "heaviside", "floor_divide", "remainder", "fmod", "copysign",
}  # fmt: skip
# Each mixes all that lies in the last dimensions, so many of them.
_OVER_PLACES = {
    "max_pool1d_with_indices": 1, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool1d": 1,
    "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3, "adaptive_avg_pool1d": 1, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2, "upsample_linear1d": 1, "upsample_trilinear3d": 3, "_upsample_nearest_exact2d": 2,
    "grid_sampler_2d": 2, "grid_sampler_3d": 3, "max_unpool2d": 2, "_adaptive_avg_pool1d": 1, "mkldnn_max_pool2d": 2,
    "max_pool2d": 2, "_upsample_nearest_exact1d": 1, "roi_align": 2, "ps_roi_align": 3, "roi_pool": 2,
}  # fmt: skip
# Over one dimension, the argument after the tensor (its number, or None for all).
_OVER_DIM = {
    "_softmax": 1, "_log_softmax": 1, "_safe_softmax": 1, "cumsum": 1, "cumprod": 1, "cummax": 1, "cummin": 1,
    "sort": 1, "topk": 2, "logcumsumexp": 1, "kthvalue": 2, "cumsum_": 1, "median": 1, "mode": 1, "argsort": 1,
    "min": 1, "max": 1, "logsumexp": 1, "prod": 1, "renorm": 2, "argmax": 1, "argmin": 1, "unique_dim": 1,
}  # fmt: skip


def follow(trace: Trace, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation, and give its outputs labels."""
    name = function._schema.name.split("::")[-1]
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    trace.note_used(tensors)
    quiet = trace._silent > 0
    relevant = not quiet and any(
        trace.memory.has(tensor) or trace.parameter(tensor) is not None for tensor in tensors
    )
    if not relevant:
        out = function(*args, **kwargs)
        _taint(trace, tensors, out)
        return out
    mutates = function._schema.is_mutable
    if (
        function.is_view
        or torch.Tag.inplace_view in function.tags
        or (not mutates and _shares_memory(tensors, function, args, kwargs, name))
    ):
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
            if trace.memory.has(tensor):
                labels = trace.labels(tensor)
                trace.note_box(labels)
        return out
    before = [
        tensor.clone() if mutates and not trace.memory.has(tensor) else tensor for tensor in tensors[:1]
    ]
    rule = _rule_of(function, name)
    if rule is None and function in decomposition_table and not mutates:
        with trace:
            return decomposition_table[function](*args, **kwargs)
    out = (
        _in_place_of_product(trace, function, args, kwargs)
        if name in _PRODUCTS and all(tensor.layout == torch.strided for tensor in tensors)
        else function(*args, **kwargs)
    )
    if rule is None:
        _not_known(trace, name, tensors, out)
        return out
    if mutates and tensors:
        swapped = [*before, *tensors[1:]]
        args, kwargs = _replaced((args, kwargs), tensors, swapped)
    rule(trace, function, args, kwargs, out)
    _taint(trace, tensors, out)
    for tensor in _tensors(out):
        labels = trace.memory.read(tensor)
        if name in _MOVES:
            trace.note_box(labels)
    return out


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}


def _in_place_of_product(
    trace: Trace, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Random numbers in the shape of a product, whose values labels don't depend on: products take most of the time."""
    shaped = function(*tree_map(_without_values, args), **tree_map(_without_values, kwargs))
    like = next(tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor))
    out = torch.empty_strided(shaped.shape, shaped.stride(), dtype=shaped.dtype, device=like.device)
    if not like.is_meta:
        flat = out.as_strided((out.numel(),), (1,))
        numbers = trace.numbers.to(out.device, out.dtype)
        for start in range(0, len(flat), len(numbers)):
            flat[start : start + len(numbers)] = numbers[: len(flat) - start]
    return out


def _without_values(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _shares_memory(
    tensors: list[Tensor], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> bool:
    return name in {
        "_unsafe_view",
        "detach",
        "alias",
        "lift_fresh",
        "_reshape_alias",
        "expand",
        "view_as_real",
        "view_as_complex",
    }


def _replaced(value: Any, old: list[Tensor], new: list[Tensor]) -> Any:
    by_id = {id(one): other for one, other in zip(old, new, strict=True)}
    return tree_map(lambda leaf: by_id.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf, value)


def _tensors(out: Any) -> list[Tensor]:
    return [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]


def _taint(trace: Trace, tensors: list[Tensor], out: Any) -> None:
    if any(tensor in trace.from_inputs for tensor in tensors):
        for tensor in _tensors(out):
            trace.from_inputs.add(tensor)


def _rule_of(function: Any, name: str) -> _Rule | None:
    if name in _RULES:
        return _RULES[name]
    if name in _MOVES:
        return _move
    if torch.Tag.reduction in function.tags or name in {"mean", "sum", "amax", "amin", "any", "all"}:
        return _reduce
    if name in _OVER_PLACES:
        return _over_places
    if name in _OVER_DIM:
        return _over_dim
    if torch.Tag.pointwise in function.tags or name in _POINTWISE:
        return _pointwise
    return None


def _not_known(trace: Trace, name: str, tensors: list[Tensor], out: Any) -> None:
    for tensor in tensors:
        trace.pin(
            trace.labels(tensor), f"read by {name} in {trace.by()}, which can't be followed", unsupported=True
        )


# ------------------------------------------------------------------------------------------------ moving


def _move(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Run the operation on the labels."""
    name = function._schema.name.split("::")[-1]
    data = _data_of(name, args)
    sources = [trace.labels(tensor) for tensor in data]
    outputs = _tensors(out)
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
            id(tensor): _or_zeros(labels[plane], tensor).clone(memory_format=torch.contiguous_format)
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
        for number, tensor in enumerate(_tensors(moved)):
            found[number][plane] = tensor.int()
    for tensor, labels in zip(outputs, found, strict=True):
        trace.memory.write(tensor, tuple(labels))


def _data_of(name: str, args: _Arguments) -> list[Tensor]:
    """The tensors whose entries are moved, not those that say where to."""
    if name in {"cat", "stack"}:
        return [tensor for tensor in args[0]]
    if name in {"copy_", "copy", "slice_scatter", "select_scatter"}:
        return [args[0], args[1]]
    if name in {"index_put", "index_put_"}:
        return [args[0], args[2]]
    if name in {"index_copy", "index_copy_", "scatter", "scatter_"}:
        return [args[0], *(value for value in args[3:4] if isinstance(value, Tensor))]
    if name == "masked_select":
        return [args[0]]
    return [args[0]]


def _or_zeros(labels: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32).expand(like.shape) if labels is None else labels


def _complete(
    trace: Trace,
    name: str,
    args: _Arguments,
    kwargs: dict[str, Any],
    data: list[Tensor],
    sources: list[Labels],
) -> list[Labels]:
    """Give parts without labels, that are joined to others, the labels of these, where they have room for them."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    completed = list(sources)
    own = [any(some is not None for some in labels) and trace.are_entries(_any(labels)) for labels in sources]
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
                trace.note_added(_any(labels))
                small = without_constant_axes(_any(labels))[0]
                full = _full_axes(tensor, small, tensor.dim())
                other = without_constant_axes(reference)[0]
                trace.noted.meetings.append(Meeting(small.clone(), other.clone(), full))
            else:
                _meet_unlabelled(trace, name, tensor, reference, tensor.shape, bare=True)
            mine[plane] = reference.expand(tensor.shape)
        completed[number] = tuple(mine)
    return completed


def _any(labels: Labels) -> Tensor:
    return next(some for some in labels if some is not None)


# --------------------------------------------------------------------------------------------- elementwise


def _pointwise(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Labels that meet in an entry are united."""
    name = function._schema.name.split("::")[-1]
    tensors = [tensor for tensor in tree_leaves((tuple(args), kwargs)) if isinstance(tensor, Tensor)]
    if name in {"index_add", "index_add_"}:
        # entries at some places are added to: each other dimension is met one by one
        _, dim, _, source = args[:4]
        tensors = [args[0], source]
        merged = [
            tuple(None if some is None else trace.merge(some, [dim]) for some in trace.labels(tensor))
            for tensor in tensors
        ]
        result = _meet(trace, name, [t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors], merged)
        for tensor in _tensors(out):
            trace.memory.write(tensor, tuple(None if s is None else s.expand(tensor.shape) for s in result))
        return
    result = _meet(trace, name, tensors, [trace.labels(tensor) for tensor in tensors])
    for tensor in _tensors(out):
        fits = tuple(
            None if some is None or some.dim() > tensor.dim() else some.expand(tensor.shape)
            for some in result
        )
        trace.memory.write(tensor, fits)


def _meet(trace: Trace, name: str, tensors: list[Tensor], labels: list[Labels]) -> Labels:
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
    trace: Trace, name: str, tensors: list[Tensor], labels: list[Tensor | None], all_planes: list[Labels]
) -> Tensor | None:
    labelled = [(tensor, some) for tensor, some in zip(tensors, labels, strict=True) if some is not None]
    if not labelled:
        return None
    dims = max(tensor.dim() for tensor in tensors)
    shape = _common_shape([tensor.shape for tensor in tensors])
    own = [(t, _wide(some, dims)) for t, some in labelled if trace.are_entries(some)]
    activations = [(t, _wide(some, dims)) for t, some in labelled if not trace.are_entries(some)]
    if not activations:
        first = own[0][1]
        for _, other in own[1:]:
            trace.unite(first, other)
            first = torch.maximum(*torch.broadcast_tensors(first, other))
        result = first
    else:
        # entries that depend on a structure as a whole, of one that is broadcast over many: it stays
        kept = []
        for tensor, some in activations:
            others = [other for t, other in activations if t is not tensor]
            if others and _is_broadcast_whole(trace, tensor, some, others, dims):
                trace.pin((some, *NONE[1:]), f"one number for many structures in {trace.by()}")
            else:
                kept.append((tensor, some))
        activations = kept or activations[:1]
        result = activations[0][1]
        for _, other in activations[1:]:
            trace.unite(result, other)
            one, two = torch.broadcast_tensors(result, other)
            alone = torch.where((one == 0) != (two == 0), torch.maximum(one, two), 0)
            if bool(alone.any()):  # what has no label can't be removed with what has
                trace.pin((alone, *NONE[1:]), f"combined with others that stay in {trace.by()}")
            result = torch.maximum(one, two)
        for tensor, some in own:
            small, other = without_constant_axes(some)[0], without_constant_axes(result)[0]
            if name.startswith(("add", "sub", "rsub")):
                trace.note_added(small)
            trace.noted.meetings.append(Meeting(small.clone(), other.clone(), _full_axes(tensor, small, dims)))
    for tensor, some, planes in zip(tensors, labels, all_planes, strict=True):
        if some is None and activations:
            bare = all(other is None for other in planes)
            _meet_unlabelled(trace, name, tensor, result, shape, bare)
    return result.expand(shape) if result.dim() == len(shape) else result


def _common_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape that these broadcast to. (torch's own takes milliseconds.)"""
    dims = max(map(len, shapes))
    padded = [[1] * (dims - len(shape)) + list(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _wide(labels: Tensor, dims: int) -> Tensor:
    return labels.reshape([1] * (dims - labels.dim()) + list(labels.shape)) if labels.dim() < dims else labels


def _is_broadcast_whole(
    trace: Trace, tensor: Tensor, labels: Tensor, others: list[Tensor], dims: int
) -> bool:
    """Whether labels are those of one class, along a dimension of size 1 that others fill with many."""
    if trace.varying(labels):
        return False
    shape = [1] * (dims - tensor.dim()) + list(tensor.shape)
    return any(shape[axis] == 1 for other in others for axis in trace.varying(other))


def _meet_unlabelled(
    trace: Trace, name: str, tensor: Tensor, labels: Tensor, shape: Sequence[int], bare: bool
) -> None:
    """Entries that are no structures': those that they meet one by one must stay together."""
    dims = labels.dim()
    lead = dims - tensor.dim()
    fixed = []
    for axis in trace.varying(labels):
        own = axis - lead
        if own >= 0 and tensor.shape[own] > 1 and not (bare and _is_constant(tensor, own)):
            fixed.append(axis)
    if fixed:
        if tensor in trace.from_inputs:
            verb = "added to" if name.startswith(("add", "sub")) else "combined with"
            reason = f"{verb} an input of the network"
        else:
            reason = f"combined with other numbers of its whole width in {trace.by()}"
        trace.merge(labels, fixed, reason)


def _full_axes(tensor: Tensor, atoms: Tensor, dims: int) -> frozenset[int]:
    """The axes, of so many, along which a parameter, or what was made of one, has values of its own."""
    lead = dims - tensor.dim()
    return frozenset(
        lead + axis
        for axis in range(tensor.dim())
        if atoms.shape[lead + axis] > 1 or (tensor.shape[axis] > 1 and not _is_constant(tensor, axis))
    )


def _is_constant(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor's values are the same along an axis: then it may have any size there."""
    if tensor.stride(axis) == 0:
        return True
    if tensor.is_meta:
        return False
    return torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))


# ------------------------------------------------------------------------------------------------- mixing


def _merged(trace: Trace, tensor: Tensor, axes: list[int], reason: str) -> Labels:
    return tuple(None if some is None else trace.merge(some, axes, reason) for some in trace.labels(tensor))


def _put(trace: Trace, out: Any, labels: Labels) -> None:
    for tensor in _tensors(out):
        trace.memory.write(
            tensor, tuple(None if some is None else some.expand(tensor.shape) for some in labels)
        )


def _reduce(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dims = given.get("dim")
    axes = (
        list(range(tensor.dim()))
        if dims is None or dims == []
        else [dims]
        if isinstance(dims, int)
        else list(dims)
    )
    axes = [axis % max(tensor.dim(), 1) for axis in axes]
    labels = _merged(trace, tensor, axes, _all_at_once(trace))
    for result in _tensors(out):
        if result.dim() == tensor.dim():
            _put(trace, result, labels)
        else:
            rest = [axis for axis in range(tensor.dim()) if axis not in axes]
            _put(trace, result, tuple(
                None if some is None else some.permute(*rest, *axes).reshape([some.shape[axis] for axis in rest])
                for some in labels
            ))  # fmt: skip


def _all_at_once(trace: Trace) -> str:
    return f"read all at once by {trace.by()}"


def _over_dim(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    name = function._schema.name.split("::")[-1]
    position = _OVER_DIM[name]
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dim = given.get("dim", args[position] if len(args) > position and name != "topk" else -1)
    if name in {"min", "max"} and "dim" not in given:
        if len(args) > 1 and isinstance(args[1], Tensor):
            return _pointwise(trace, function, args, kwargs, out)
        dim = None
    axes = list(range(tensor.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    reason = f"softmax over all of them in {trace.by()}" if "softmax" in name else _all_at_once(trace)
    labels = _merged(trace, tensor, axes, reason)
    for result in _tensors(out):
        if not result.is_floating_point():  # places, not values
            trace.memory.write(result, NONE)
        elif result.dim() == tensor.dim():
            _put(trace, result, labels)
        else:
            drop = {axis % tensor.dim() for axis in axes}
            rest = [axis for axis in range(tensor.dim()) if axis not in drop]
            _put(trace, result, tuple(
                None if some is None else some.reshape([some.shape[axis] for axis in rest]) for some in labels
            ))  # fmt: skip


def _over_places(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    count = _OVER_PLACES[function._schema.name.split("::")[-1]]
    axes = list(range(tensor.dim() - count, tensor.dim()))
    labels = _merged(trace, tensor, axes, _all_at_once(trace))
    for result in _tensors(out):
        if result.dim() == tensor.dim():
            batch = tuple(
                None
                if some is None
                else trace.merge(some, [0])
                if result.shape[0] != tensor.shape[0]
                else some
                for some in labels
            )
            _put(trace, result, batch)


def _batch_norm(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor, *parameters = args[:5]
    result = _tensors(out)[0]
    labels: Labels = trace.labels(tensor)
    statistics = args[5] if isinstance(args[5], bool) else False
    if statistics or parameters[2] is None:
        axes = [axis for axis in range(tensor.dim()) if axis != 1]
        labels = tuple(
            None if some is None else trace.merge(some, axes).expand(tensor.shape) for some in labels
        )
    shape = [1, -1] + [1] * (tensor.dim() - 2)
    own = [p.view(shape) for p in parameters if isinstance(p, Tensor)]
    met = _meet(trace, "mul", [tensor, *own], [labels, *[
        tuple(None if some is None else some.view(shape) for some in trace.labels(p))
        for p in parameters if isinstance(p, Tensor)
    ]])  # fmt: skip
    trace.memory.write(result, tuple(None if some is None else some.expand(result.shape) for some in met))


def _layer_norm(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor, normalized, weight, bias = args[:4]
    axes = list(range(tensor.dim() - len(normalized), tensor.dim()))
    labels = _merged(trace, tensor, axes, f"normalised together by {trace.by()}")
    del weight, bias  # what is normalised together is one structure: they lose nothing alone
    trace.memory.write(
        _tensors(out)[0], tuple(None if some is None else some.expand(tensor.shape) for some in labels)
    )


def _group_norm(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor, weight, bias, count, channels, places, groups = args[:7]
    split = [count, groups, channels // groups, places]
    reason = f"normalised together by {trace.by()}"
    result: list[Tensor | None] = []
    for some in trace.labels(tensor):
        if some is None:
            result.append(None)
            continue
        merged = trace.merge(some.reshape(split), [2, 3], reason)
        if trace.stack and hasattr(trace.stack[-1], "num_groups"):
            trace.note_count(trace.here, "num_groups", merged.movedim(1, 0).reshape(groups, -1))
        result.append(merged.expand(split).reshape(tensor.shape))
    shape = [1, -1] + [1] * (tensor.dim() - 2)
    own = [p for p in (weight, bias) if isinstance(p, Tensor)]
    met = _meet(trace, "mul", [tensor, *[p.view(shape) for p in own]], [tuple(result), *[
        tuple(None if some is None else some.view(shape) for some in trace.labels(p)) for p in own
    ]])  # fmt: skip
    trace.memory.write(
        _tensors(out)[0], tuple(None if some is None else some.expand(tensor.shape) for some in met)
    )


# -------------------------------------------------------------------------------------------- contractions


def _mm(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    name = function._schema.name.split("::")[-1]
    bias = args[0] if name in {"addmm", "baddbmm", "addmv", "addbmm"} else None
    first, second = args[1:3] if bias is not None else args[:2]
    result = _product(trace, first, second)
    if bias is not None:
        result = _meet(trace, "add", [out, bias], [result, trace.labels(bias)])
    trace.memory.write(out, tuple(None if some is None else some.expand(out.shape) for some in result))


def _product(trace: Trace, first: Tensor, second: Tensor) -> Labels:
    """Labels of first (…, n, k) times second (…, k, m)."""
    left, right = trace.source(first), trace.source(second)
    if right is not None:
        return _read(trace, first, right, second)
    if left is not None:
        swapped = _read(trace, second.transpose(-1, -2), left, first.transpose(-1, -2))
        return tuple(None if some is None else some.transpose(-1, -2) for some in swapped)
    return _two_activations(trace, first, second)


def _coordinates(trace: Trace, parameter: Parameter, tensor: Tensor, dim: int) -> dict[int, Tensor]:
    """By dimension of a parameter that varies along dimension `dim` of a view of it: where in it each entry is."""
    if tensor.untyped_storage()._cdata == parameter.tensor.untyped_storage()._cdata:
        start = tensor.storage_offset() - parameter.tensor.storage_offset()
        flat = start + torch.arange(tensor.shape[dim]) * tensor.stride(dim)
    else:  # entries of the parameter in another order
        (labels, *_) = trace.memory.read(tensor)
        assert labels is not None
        line = labels[tuple(slice(None) if axis == dim % tensor.dim() else 0 for axis in range(tensor.dim()))]
        flat = line.long() - int(trace.entries[parameter.key].min())
    found: dict[int, Tensor] = {}
    axes = sorted(range(parameter.tensor.dim()), key=parameter.tensor.stride, reverse=True)
    for axis in axes:
        if parameter.tensor.shape[axis] == 1:
            continue
        place = flat // parameter.tensor.stride(axis)
        flat = flat % parameter.tensor.stride(axis)
        if len(place) and bool((place != place[0]).any()):
            found[axis] = place
    return found


def _axis_of(
    trace: Trace, parameter: Parameter, tensor: Tensor, dim: int, met: Labels = NONE, *, finest: bool = False
) -> tuple[int, Tensor] | None:
    """(dimension of a parameter, place of each entry) along dimension `dim` of a view of it, or of a copy in other places.

    Where several dimensions of the parameter are one of the view: that on which the labels that it meets depend; else
    that of the most entries (finest), or the first.
    """
    if tensor.shape[dim] > 1:
        found = _coordinates(trace, parameter, tensor, dim)
        if len(found) > 1:
            for axis, places in found.items():
                if any(some is not None and _depend_on(trace, some, places) for some in met):
                    return axis, places
            if finest:
                return max(found.items(), key=lambda item: len(item[1].unique()))
        return next(iter(found.items()), None)
    # one entry: the dimension of the parameter that no other dimension of the view explains
    explained = {
        axis
        for other in range(tensor.dim())
        if other != dim and tensor.shape[other] > 1
        for axis in _coordinates(trace, parameter, tensor, other)
    }
    left = [axis for axis, size in enumerate(parameter.tensor.shape) if size == 1 and axis not in explained]
    # a weight has its rows before its columns
    return (left[0 if finest else -1], torch.zeros(1, dtype=torch.long)) if left else None


def _depend_on(trace: Trace, labels: Tensor, places: Tensor) -> bool:
    """Whether the labels along the last axis differ, and are the same wherever the places are."""
    line = trace.classes.find(labels).reshape(-1, labels.shape[-1])[0]
    first = torch.zeros(int(places.max()) + 1, dtype=line.dtype).scatter(0, places, line)
    return bool((first[places] == line).all()) and bool((line != line[0]).any())


def _read(trace: Trace, x: Tensor, parameter: Parameter, weight: Tensor) -> Labels:
    """Labels of x (…, n, k) times a view (…, k, m) of a parameter: structures end, and new ones begin."""
    shape = (*_common_shape([x.shape[:-2], weight.shape[:-2]]), x.shape[-2], weight.shape[-1])
    inner = _axis_of(trace, parameter, weight, weight.dim() - 2, trace.labels(x))
    outer = _axis_of(trace, parameter, weight, weight.dim() - 1, finest=True)
    batch = [_axis_of(trace, parameter, weight, dim) for dim in range(weight.dim() - 2)]
    passed: list[Tensor | None] = [None] * PLANES
    for plane, labels in enumerate(trace.labels(x)):
        if labels is None:
            continue
        varying = trace.varying(labels)
        ends = labels.dim() - 1 in varying or not varying
        if ends and inner is not None:
            _note_read(trace, parameter, inner, labels, weight)
        elif ends and labels.shape[-1] > 1:
            trace.merge(labels, [-1], _all_at_once(trace))
        else:
            passed[plane] = labels.narrow(-1, 0, 1)
            for dim, found in enumerate(batch):
                if found is not None and dim in varying:
                    atoms = trace.line(parameter, found[0])[found[1]]
                    trace.noted.meetings.append(
                        Meeting(
                            _at(atoms, dim, labels.dim()), labels.narrow(-1, 0, 1).clone(), frozenset({dim})
                        )
                    )
    made: Tensor | None = None
    if outer is not None:
        made = trace.line(parameter, outer[0])[outer[1]]
        _note_producer(trace, parameter, outer[0])
        made = _at(made, len(shape) - 1, len(shape))
    return _in_planes(trace, made, passed, shape)


def _at(atoms: Tensor, dim: int, dims: int) -> Tensor:
    return atoms.view([-1 if axis == dim else 1 for axis in range(dims)])


def _in_planes(
    trace: Trace, made: Tensor | None, passed: list[Tensor | None], shape: Sequence[int]
) -> Labels:
    """New labels in the first plane that is free."""
    result = [None if some is None else _wide(some, len(shape)).expand(shape) for some in passed]
    if made is not None:
        free = next((plane for plane, some in enumerate(result) if some is None), None)
        if free is None:
            trace.pin(
                (made, *NONE[1:]), f"more than {PLANES} structures meet in {trace.by()}", unsupported=True
            )
        else:
            result[free] = made.expand(shape)
    return tuple(result)


def _note_read(
    trace: Trace, parameter: Parameter, inner: tuple[int, Tensor], labels: Tensor, weight: Tensor
) -> None:
    dim, places = inner
    atoms = trace.line(parameter, dim)[places]
    trace.noted.reads.append(Read(atoms, without_constant_axes(labels)[0].reshape(-1, _last(labels)).clone()))
    _note_reader(trace, parameter, dim, labels.shape[-1])


def _last(labels: Tensor) -> int:
    return without_constant_axes(labels)[0].shape[-1]


def _note_producer(trace: Trace, parameter: Parameter, dim: int) -> None:
    """Remember through which module a parameter makes structures: a shared one has several owners."""
    module = trace.stack[-1] if trace.stack else trace.network
    here = any(tensor is parameter.tensor for tensor in module._parameters.values())
    trace.noted.producers.setdefault((parameter.key, dim), trace.here if here else parameter.path)


def _note_reader(trace: Trace, parameter: Parameter, dim: int, size: int, input_dim: int = -1) -> None:
    """Remember through which module a parameter is read, and whether the module's input has one entry for each of its."""
    module = trace.stack[-1] if trace.stack else trace.network
    path, name, reader = parameter.path, parameter.name, trace.here
    for own, tensor in module._parameters.items():
        if tensor is parameter.tensor:
            path, name = trace.here, own
    x = trace.received.get(module)
    whole: int | None = None
    matrices = [own for own in module._parameters.values() if own is not None and own.dim() > 1]
    # of a layer with one matrix nothing else reads the input
    only = len(matrices) == 1 and next(module.children(), None) is None
    if only and path == trace.here and x is not None and x.dim() >= -input_dim and x.shape[input_dim] == size:
        whole = input_dim
    key = (parameter.key, dim, path, reader)
    known = trace.noted.readers.get(key)
    if known is not None and known.input_dim != whole:
        whole = None
    trace.noted.readers[key] = Reader(
        parameter.key, dim, path, name, None if reader == path else reader, whole
    )


def _grouped_mm(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Rows of x (n, k), each times one of many matrices (experts, k, m)."""
    x, weight = args[:2]
    parameter = trace.source(weight)
    if parameter is None or x.dim() != 2 or weight.dim() != 3:
        _not_known(trace, "grouped_mm", [x, weight], out)
        return
    labels = _read(trace, x, parameter, weight[0])
    trace.memory.write(out, tuple(None if some is None else some.expand(out.shape) for some in labels))


def _two_activations(trace: Trace, first: Tensor, second: Tensor) -> Labels:
    """Labels of first (…, n, k) times second (…, k, m), neither of them a parameter."""
    shape = (*_common_shape([first.shape[:-2], second.shape[:-2]]), first.shape[-2], second.shape[-1])
    result: list[Tensor | None] = []
    for one, other in zip(trace.labels(first), trace.labels(second), strict=True):
        computed = [some is not None and trace.are_entries(some) for some in (one, other)]
        left = None if one is None else trace.merge(one, [-1], _all_at_once(trace))
        right = None if other is None else trace.merge(other, [-2], _all_at_once(trace))
        if left is None or right is None:
            some = left if right is None else right
            result.append(None if some is None else some.expand(shape))
            continue
        if any(computed):
            plain, own = (left, right) if computed[1] else (right, left)
            if trace.varying(plain):
                trace.pin((own, *NONE[1:]), f"computed in {trace.by()}")
                result.append(plain.expand(shape))
            else:
                trace.pin(
                    (plain, *NONE[1:]),
                    f"read by a weight that is computed, in {trace.by()}",
                    unsupported=True,
                )
                result.append(own.expand(shape))
            continue
        along = [set(trace.varying(_wide(some, len(shape)))) for some in (left, right)]
        if along[0] != along[1] and not (along[0] & along[1]):
            # no structure of the one is one of the other: those that vary are followed, over batch entries first
            keep_left = bool(along[0]) and (not along[1] or min(along[0]) < min(along[1]))
            kept, other = (left, right) if keep_left else (right, left)
            if keep_left:
                trace.note_heads(kept)
            trace.pin((other, *NONE[1:]), f"one for many structures in {trace.by()}")
            result.append(kept.expand(shape))
            continue
        trace.unite(left, right)
        trace.note_heads(left)
        result.append(torch.maximum(*torch.broadcast_tensors(left, right)).expand(shape))
    return tuple(result)


def _convolution(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args[:9]
    places = list(range(2, x.dim()))
    one = all(size == 1 for size in weight.shape[2:]) and all(s == 1 for s in stride) and not any(padding)
    parameter = trace.source(weight)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    passed: list[Tensor | None] = [None] * PLANES
    here: list[Tensor | None] = []
    for plane, some in enumerate(trace.labels(x)):
        if some is None:
            here.append(None)
            continue
        if not one:
            some = trace.merge(some, places, _all_at_once(trace)).expand(x.shape)
        elif 1 not in (varying := trace.varying(some)) and varying:
            passed[plane] = some.narrow(1, 0, 1).expand(x.shape[0], 1, *x.shape[2:])
            some = None
        here.append(some)
    shape = tuple(out.shape)
    made: Tensor | None = None
    if parameter is None:
        made = _convolve_computed(trace, weight, here, groups, out_dim, shape)
    elif groups > 1 and weight.shape[in_dim] * (groups if not transposed else 1) == groups:
        made = _depthwise(trace, parameter, weight, here, groups, out, x.shape[1])
    else:
        made = _dense(trace, parameter, weight, here, groups, in_dim, out_dim, x, out, transposed)
    spread = [None if some is None else some.expand(shape) for some in passed]
    result = _in_planes(trace, made, spread, shape)
    if bias is not None:
        wide = [1, -1] + [1] * (out.dim() - 2)
        result = _meet(trace, "add", [out, bias.view(wide)], [result, tuple(
            None if some is None else some.view(wide) for some in trace.labels(bias)
        )])  # fmt: skip
    trace.memory.write(out, tuple(None if some is None else some.expand(shape) for some in result))


def _channel_lines(trace: Trace, labels: Tensor) -> Tensor:
    """Labels of each channel, in each line in which they may differ. Shape: (lines, channels)."""
    small = without_constant_axes(labels)[0].movedim(1, -1)
    lines = small.reshape(-1, small.shape[-1])
    return lines.expand(len(lines), labels.shape[1])


def _dense(
    trace: Trace, parameter: Parameter, weight: Tensor, here: list[Tensor | None], groups: int, in_dim: int,
    out_dim: int, x: Tensor, out: Tensor, transposed: bool,
) -> Tensor | None:  # fmt: skip
    """A convolution that reads several channels: those of the same number in each of its groups go together."""
    inner = _axis_of(trace, parameter, weight, in_dim)
    for labels in here:
        if labels is None:
            continue
        lines = _channel_lines(trace, labels)
        if inner is None:
            trace.merge(labels, [1], _all_at_once(trace))
            continue
        dim, places = inner
        atoms = trace.line(parameter, dim)[places]
        if not transposed:
            atoms = atoms.repeat(groups)
        elif groups > 1:
            folded = atoms.view(groups, -1)
            trace.unite(folded[:1].expand_as(folded), folded)
        trace.noted.reads.append(Read(atoms, lines.clone()))
        _note_reader(trace, parameter, dim, x.shape[1], -1 - (weight.dim() - 2))
    outer = _axis_of(trace, parameter, weight, out_dim, finest=True)
    if outer is None:
        return None
    rows = trace.line(parameter, outer[0])[outer[1]]
    _note_producer(trace, parameter, outer[0])
    if transposed:
        rows = rows.repeat(groups)
    elif groups > 1:
        folded = rows.view(groups, -1)
        trace.unite(folded[:1].expand_as(folded), folded)
    return _at(rows, 1, out.dim())


def _depthwise(
    trace: Trace,
    parameter: Parameter,
    weight: Tensor,
    here: list[Tensor | None],
    groups: int,
    out: Tensor,
    channels: int,
) -> Tensor | None:
    """Each filter reads one channel, and goes with it."""
    each = out.shape[1] // groups
    axis = _axis_of(trace, parameter, weight, 0, finest=True)
    result: Tensor | None = None
    for labels in here:
        if labels is None:
            continue
        result = _channel_lines(trace, labels).repeat_interleave(each, dim=1)
        if axis is not None:
            atoms = trace.line(parameter, axis[0])[axis[1]]
            trace.noted.meetings.append(Meeting(atoms.view(1, -1), result.clone(), frozenset({1})))
        if trace.stack and hasattr(trace.stack[-1], "groups"):
            trace.note_count(trace.here, "groups", _channel_lines(trace, labels).T.reshape(groups, -1))
        small = without_constant_axes(labels)[0]
        result = small.expand(small.shape[0], groups, *small.shape[2:]).repeat_interleave(each, dim=1)
        result = (
            result.reshape(result.shape[0], -1, *[1] * (out.dim() - 2))
            if small.shape[2:].numel() == 1
            else result
        )
    return result


def _convolve_computed(
    trace: Trace, weight: Tensor, here: list[Tensor | None], groups: int, out_dim: int, shape: tuple[int, ...]
) -> Tensor | None:
    """A convolution whose weight is computed, or no parameter."""
    own = trace.labels(weight)[0]
    rows = None if own is None else trace.along(own, out_dim)
    each = None if out_dim else weight.shape[0] // groups
    depthwise = not out_dim and groups > 1 and weight.shape[1] == 1
    for labels in here:
        if labels is None:
            continue
        if depthwise and each is not None:
            small = without_constant_axes(labels)[0]
            made = small.expand(small.shape[0], groups, *small.shape[2:]).repeat_interleave(each, dim=1)
            if rows is not None:
                trace.unite(made, _at(rows, 1, len(shape)))
            elif not _is_constant(weight, 0):
                trace.merge(labels, [1], f"read by fixed numbers for each of them in {trace.by()}")
            return made
        trace.merge(labels, [1], _all_at_once(trace))
        trace.pin(
            (labels, *NONE[1:]), f"read by a weight that is computed, in {trace.by()}", unsupported=True
        )
    return None if rows is None else _at(rows, 1, len(shape))


def _embedding(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    weight, index = args[:2]
    parameter = trace.parameter(weight)
    if parameter is None or weight.dim() != 2:
        one, _ = trace.labels(weight)
        if one is not None:
            trace.memory.write(out, (one[index.cpu()], *NONE[1:]))
        return
    axis = _axis_of(trace, parameter, weight, 1)
    if axis is not None:
        _note_producer(trace, parameter, axis[0])
        atoms = trace.line(parameter, axis[0])[axis[1]]
        trace.memory.write(out, (_at(atoms, out.dim() - 1, out.dim()).expand(out.shape), *NONE[1:]))


def _where(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    _pointwise(trace, function, args, kwargs, out)


def _unlabelled(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Outputs that are filled anew, with no labels."""
    for tensor in _tensors(out):
        trace.memory.write(tensor, NONE)


def _like(trace: Trace, function: Any, args: _Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """A tensor of the shape of another, which loses what that loses."""
    labels = trace.labels(args[0])
    if not any(some is not None and trace.are_entries(some) for some in labels):
        _put(trace, out, labels)


_RULES: dict[str, _Rule] = {
    "_grouped_mm": _grouped_mm, "mm": _mm, "addmm": _mm, "bmm": _mm, "baddbmm": _mm, "convolution": _convolution, "_convolution": _convolution,
    "embedding": _embedding, "native_batch_norm": _batch_norm, "_native_batch_norm_legit_no_training": _batch_norm,
    "native_layer_norm": _layer_norm, "native_group_norm": _group_norm, "zero_": _unlabelled, "fill_": _unlabelled,
    "normal_": _unlabelled, "uniform_": _unlabelled, "zeros_like": _like, "ones_like": _like, "empty_like": _like,
    "full_like": _like, "rand_like": _like, "randn_like": _like, "new_zeros": _unlabelled, "new_ones": _unlabelled,
    "new_empty": _unlabelled, "new_full": _unlabelled, "nonzero": _unlabelled, "_local_scalar_dense": _unlabelled,
    "arange": _unlabelled, "bincount": _unlabelled, "equal": _unlabelled, "_assert_async": _unlabelled,
    "is_nonzero": _unlabelled, "resize_": _unlabelled,
}  # fmt: skip
