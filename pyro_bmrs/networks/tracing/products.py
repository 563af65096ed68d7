"""Matrix products and embeddings: structures end at the columns of a parameter, and begin at its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.networks.tracing.labels import NONE, PLANES, Labels, together
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.meeting import common_shape, meet, wide
from pyro_bmrs.networks.tracing.mixing import all_at_once
from pyro_bmrs.networks.tracing.noted import Arguments, Meeting, Parameter
from pyro_bmrs.networks.tracing.reading import at_axis, axis_of, in_planes, note_producer, note_read


def matrix_product(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    name = function._schema.name.split("::")[-1]
    bias = args[0] if name in {"addmm", "baddbmm", "addmv", "addbmm"} else None
    first, second = args[1:3] if bias is not None else args[:2]
    result = _product(trace, first, second)
    if bias is not None:
        result = meet(trace, "add", [out, bias], [result, trace.labels(bias)])
    trace.memory.write(out, tuple(None if some is None else some.expand(out.shape) for some in result))


def _product(trace: Ledger, first: Tensor, second: Tensor) -> Labels:
    """Labels of first (…, n, k) times second (…, k, m)."""
    left, right = trace.source(first), trace.source(second)
    if right is not None:
        return _read(trace, first, right, second)
    if left is not None:
        swapped = _read(trace, second.transpose(-1, -2), left, first.transpose(-1, -2))
        return tuple(None if some is None else some.transpose(-1, -2) for some in swapped)
    return _two_activations(trace, first, second)


def _read(trace: Ledger, x: Tensor, parameter: Parameter, weight: Tensor) -> Labels:
    """Labels of x (…, n, k) times a view (…, k, m) of a parameter: structures end, and new ones begin."""
    shape = (*common_shape([x.shape[:-2], weight.shape[:-2]]), x.shape[-2], weight.shape[-1])
    inner = axis_of(trace, parameter, weight, weight.dim() - 2, trace.labels(x))
    outer = axis_of(trace, parameter, weight, weight.dim() - 1, finest=True)
    batch = [axis_of(trace, parameter, weight, dim) for dim in range(weight.dim() - 2)]
    passed: list[Tensor | None] = [None] * PLANES
    for plane, labels in enumerate(trace.labels(x)):
        if labels is None:
            continue
        varying = trace.varying(labels)
        ends = labels.dim() - 1 in varying or not varying
        if ends and inner is not None:
            note_read(trace, parameter, inner, labels)
        elif ends and labels.shape[-1] > 1:
            trace.merge(labels, [-1], all_at_once(trace))
        else:
            passed[plane] = labels.narrow(-1, 0, 1)
            for dim, found in enumerate(batch):
                if found is not None and dim in varying:
                    atoms = trace.line(parameter, found[0])[found[1]]
                    trace.noted.meetings.append(
                        Meeting(
                            at_axis(atoms, dim, labels.dim()),
                            labels.narrow(-1, 0, 1).clone(),
                            frozenset({dim}),
                        )
                    )
    made: Tensor | None = None
    if outer is not None:
        made = trace.line(parameter, outer[0])[outer[1]]
        note_producer(trace, parameter, outer[0])
        made = at_axis(made, len(shape) - 1, len(shape))
    return in_planes(trace, made, passed, shape)


def grouped_mm(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Rows of x (n, k), each times one of many matrices (experts, k, m)."""
    x, weight = args[:2]
    parameter = trace.source(weight)
    if parameter is None or x.dim() != 2 or weight.dim() != 3:
        trace.pin_unknown("grouped_mm", [x, weight])
        return
    labels = _read(trace, x, parameter, weight[0])
    trace.memory.write(out, tuple(None if some is None else some.expand(out.shape) for some in labels))


def _two_activations(trace: Ledger, first: Tensor, second: Tensor) -> Labels:
    """Labels of first (…, n, k) times second (…, k, m), neither of them a parameter."""
    shape = (*common_shape([first.shape[:-2], second.shape[:-2]]), first.shape[-2], second.shape[-1])
    result: list[Tensor | None] = []
    for one, other in zip(trace.labels(first), trace.labels(second), strict=True):
        computed = [some is not None and trace.are_entries(some) for some in (one, other)]
        left = None if one is None else trace.merge(one, [-1], all_at_once(trace))
        right = None if other is None else trace.merge(other, [-2], all_at_once(trace))
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
        along = [set(trace.varying(wide(some, len(shape)))) for some in (left, right)]
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
        result.append(torch.maximum(*together(left, right)).expand(shape))
    return tuple(result)


def embedding(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    weight, index = args[:2]
    parameter = trace.parameter(weight)
    if parameter is None or weight.dim() != 2:
        one, _ = trace.labels(weight)
        if one is not None:
            trace.memory.write(out, (one[index.cpu()], *NONE[1:]))
        return
    axis = axis_of(trace, parameter, weight, 1)
    if axis is not None:
        note_producer(trace, parameter, axis[0])
        atoms = trace.line(parameter, axis[0])[axis[1]]
        trace.memory.write(out, (at_axis(atoms, out.dim() - 1, out.dim()).expand(out.shape), *NONE[1:]))
