"""Convolutions: dense, in groups, depthwise, with a weight that is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_bmrs.networks.tracing.labels import NONE, PLANES, without_constant_axes
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.meeting import is_constant, meet
from pyro_bmrs.networks.tracing.mixing import all_at_once
from pyro_bmrs.networks.tracing.noted import Arguments, Meeting, Parameter, Read
from pyro_bmrs.networks.tracing.reading import at_axis, axis_of, in_planes, note_producer, note_reader


def convolution(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    x, weight, bias, stride, padding, _, transposed, _, groups = args[:9]
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
            some = trace.merge(some, places, all_at_once(trace)).expand(x.shape)
        elif 1 not in (varying := trace.varying(some)) and varying:
            passed[plane] = some.narrow(1, 0, 1).expand(x.shape[0], 1, *x.shape[2:])
            some = None
        here.append(some)
    shape = tuple(out.shape)
    made: Tensor | None = None
    if parameter is None:
        made = _convolve_computed(trace, weight, here, groups, out_dim, shape)
    elif groups > 1 and weight.shape[in_dim] * (groups if not transposed else 1) == groups:
        made = _depthwise(trace, parameter, weight, here, groups, out)
    else:
        made = _dense(trace, parameter, weight, here, groups, in_dim, out_dim, x, out, transposed)
    spread = [None if some is None else some.expand(shape) for some in passed]
    result = in_planes(trace, made, spread, shape)
    if bias is not None:
        wide = [1, -1] + [1] * (out.dim() - 2)
        result = meet(trace, "add", [out, bias.view(wide)], [result, tuple(
            None if some is None else some.view(wide) for some in trace.labels(bias)
        )])  # fmt: skip
    trace.memory.write(out, tuple(None if some is None else some.expand(shape) for some in result))


def _channel_lines(trace: Ledger, labels: Tensor) -> Tensor:
    """Labels of each channel, in each line in which they may differ. Shape: (lines, channels)."""
    small = without_constant_axes(labels)[0].movedim(1, -1)
    lines = small.reshape(-1, small.shape[-1])
    return lines.expand(len(lines), labels.shape[1])


def _dense(
    trace: Ledger, parameter: Parameter, weight: Tensor, here: list[Tensor | None], groups: int, in_dim: int,
    out_dim: int, x: Tensor, out: Tensor, transposed: bool,
) -> Tensor | None:  # fmt: skip
    """A convolution that reads several channels: those of the same number in each of its groups go together."""
    inner = axis_of(trace, parameter, weight, in_dim)
    for labels in here:
        if labels is None:
            continue
        lines = _channel_lines(trace, labels)
        if inner is None:
            trace.merge(labels, [1], all_at_once(trace))
            continue
        dim, places = inner
        atoms = trace.line(parameter, dim)[places]
        if not transposed:
            atoms = atoms.repeat(groups)
        elif groups > 1:
            folded = atoms.view(groups, -1)
            trace.unite(folded[:1].expand_as(folded), folded)
        trace.noted.reads.append(Read(atoms, lines.clone()))
        note_reader(trace, parameter, dim, x.shape[1], -1 - (weight.dim() - 2))
    outer = axis_of(trace, parameter, weight, out_dim, finest=True)
    if outer is None:
        return None
    rows = trace.line(parameter, outer[0])[outer[1]]
    note_producer(trace, parameter, outer[0])
    if transposed:
        rows = rows.repeat(groups)
    elif groups > 1:
        folded = rows.view(groups, -1)
        trace.unite(folded[:1].expand_as(folded), folded)
    return at_axis(rows, 1, out.dim())


def _depthwise(
    trace: Ledger,
    parameter: Parameter,
    weight: Tensor,
    here: list[Tensor | None],
    groups: int,
    out: Tensor,
) -> Tensor | None:
    """Each filter reads one channel, and goes with it."""
    each = out.shape[1] // groups
    axis = axis_of(trace, parameter, weight, 0, finest=True)
    result: Tensor | None = None
    for labels in here:
        if labels is None:
            continue
        if axis is not None:
            atoms = trace.line(parameter, axis[0])[axis[1]]
            # a transposed convolution has the outputs of a channel in another dimension
            met = _channel_lines(trace, labels).repeat_interleave(len(atoms) // groups, dim=1)
            trace.noted.meetings.append(Meeting(atoms.view(1, -1), met.clone(), frozenset({1})))
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
    trace: Ledger,
    weight: Tensor,
    here: list[Tensor | None],
    groups: int,
    out_dim: int,
    shape: tuple[int, ...],
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
                trace.unite(made, at_axis(rows, 1, len(shape)))
            elif not is_constant(weight, 0):
                trace.merge(labels, [1], f"read by fixed numbers for each of them in {trace.by()}")
            return made
        trace.merge(labels, [1], all_at_once(trace))
        trace.pin(
            (labels, *NONE[1:]), f"read by a weight that is computed, in {trace.by()}", unsupported=True
        )
    return None if rows is None else at_axis(rows, 1, len(shape))
