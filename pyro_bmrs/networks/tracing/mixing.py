"""Operations that read several entries at once: reductions, softmax, pooling, normalisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_bmrs.networks.tracing.labels import NONE, Labels
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.meeting import meet, pointwise
from pyro_bmrs.networks.tracing.noted import Arguments, tensors_in

# Each mixes all that lies in the last dimensions, so many of them.
OVER_PLACES = {
    "max_pool1d_with_indices": 1, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool1d": 1,
    "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3, "adaptive_avg_pool1d": 1, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2, "upsample_linear1d": 1, "upsample_trilinear3d": 3, "_upsample_nearest_exact2d": 2,
    "grid_sampler_2d": 2, "grid_sampler_3d": 3, "max_unpool2d": 2, "_adaptive_avg_pool1d": 1, "mkldnn_max_pool2d": 2,
    "max_pool2d": 2, "_upsample_nearest_exact1d": 1, "roi_align": 2, "ps_roi_align": 3, "roi_pool": 2,
}  # fmt: skip


# Over one dimension, the argument after the tensor (its number, or None for all).
OVER_DIM = {
    "_softmax": 1, "_log_softmax": 1, "_safe_softmax": 1, "cumsum": 1, "cumprod": 1, "cummax": 1, "cummin": 1,
    "sort": 1, "topk": 2, "logcumsumexp": 1, "kthvalue": 2, "cumsum_": 1, "median": 1, "mode": 1, "argsort": 1,
    "min": 1, "max": 1, "logsumexp": 1, "prod": 1, "renorm": 2, "argmax": 1, "argmin": 1, "unique_dim": 1,
}  # fmt: skip


def _merged(trace: Ledger, tensor: Tensor, axes: list[int], reason: str) -> Labels:
    return tuple(None if some is None else trace.merge(some, axes, reason) for some in trace.labels(tensor))


def put(trace: Ledger, out: Any, labels: Labels) -> None:
    for tensor in tensors_in(out):
        trace.memory.write(
            tensor, tuple(None if some is None else some.expand(tensor.shape) for some in labels)
        )


def reduce(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
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
    labels = tuple(
        None if some is None else trace.reduced(some, axes, all_at_once(trace))
        for some in trace.labels(tensor)
    )
    for result in tensors_in(out):
        if result.dim() == tensor.dim():
            put(trace, result, labels)
        else:
            rest = [axis for axis in range(tensor.dim()) if axis not in axes]
            put(trace, result, tuple(
                None if some is None else some.permute(*rest, *axes).reshape([some.shape[axis] for axis in rest])
                for some in labels
            ))  # fmt: skip


def all_at_once(trace: Ledger) -> str:
    return f"read all at once by {trace.by()}"


def over_dim(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    name = function._schema.name.split("::")[-1]
    position = OVER_DIM[name]
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dim = given.get("dim", args[position] if len(args) > position and name != "topk" else -1)
    if name in {"min", "max"} and "dim" not in given:
        if len(args) > 1 and isinstance(args[1], Tensor):
            return pointwise(trace, function, args, kwargs, out)
        dim = None
    axes = list(range(tensor.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    reason = f"softmax over all of them in {trace.by()}" if "softmax" in name else all_at_once(trace)
    labels = _merged(trace, tensor, axes, reason)
    for result in tensors_in(out):
        if not result.is_floating_point():  # places, not values
            trace.memory.write(result, NONE)
        elif result.dim() == tensor.dim():
            put(trace, result, labels)
        else:
            drop = {axis % tensor.dim() for axis in axes}
            rest = [axis for axis in range(tensor.dim()) if axis not in drop]
            put(trace, result, tuple(
                None if some is None else some.reshape([some.shape[axis] for axis in rest]) for some in labels
            ))  # fmt: skip


def over_places(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    count = OVER_PLACES[function._schema.name.split("::")[-1]]
    axes = list(range(tensor.dim() - count, tensor.dim()))
    labels = _merged(trace, tensor, axes, all_at_once(trace))
    for result in tensors_in(out):
        if result.dim() == tensor.dim():
            batch = tuple(
                None
                if some is None
                else trace.merge(some, [0])
                if result.shape[0] != tensor.shape[0]
                else some
                for some in labels
            )
            put(trace, result, batch)


def batch_norm(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor, *parameters = args[:5]
    result = tensors_in(out)[0]
    labels: Labels = trace.labels(tensor)
    statistics = args[5] if isinstance(args[5], bool) else False
    if statistics or parameters[2] is None:
        axes = [axis for axis in range(tensor.dim()) if axis != 1]
        labels = tuple(
            None if some is None else trace.merge(some, axes).expand(tensor.shape) for some in labels
        )
    shape = [1, -1] + [1] * (tensor.dim() - 2)
    own = [p.view(shape) for p in parameters if isinstance(p, Tensor)]
    met = meet(trace, "mul", [tensor, *own], [labels, *[
        tuple(None if some is None else some.view(shape) for some in trace.labels(p))
        for p in parameters if isinstance(p, Tensor)
    ]])  # fmt: skip
    trace.memory.write(result, tuple(None if some is None else some.expand(result.shape) for some in met))


def layer_norm(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    tensor, normalized = args[:2]
    axes = list(range(tensor.dim() - len(normalized), tensor.dim()))
    labels = _merged(trace, tensor, axes, f"normalised together by {trace.by()}")
    # weight and bias too: what is normalised together is one structure, and loses nothing alone
    trace.memory.write(
        tensors_in(out)[0], tuple(None if some is None else some.expand(tensor.shape) for some in labels)
    )


def group_norm(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
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
    met = meet(trace, "mul", [tensor, *[p.view(shape) for p in own]], [tuple(result), *[
        tuple(None if some is None else some.view(shape) for some in trace.labels(p)) for p in own
    ]])  # fmt: skip
    trace.memory.write(
        tensors_in(out)[0], tuple(None if some is None else some.expand(tensor.shape) for some in met)
    )
