"""Parameters that are summed over: which of their rows and columns belong to which structure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bmrs.networks.tracing.labels import NONE, PLANES, Labels, distinct, without_constant_axes
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.meeting import wide
from pyro_bmrs.networks.tracing.noted import Parameter, Read, Reader


def _coordinates(trace: Ledger, parameter: Parameter, tensor: Tensor, dim: int) -> dict[int, Tensor]:
    """By dimension of a parameter that varies along dimension `dim` of a view of it: where in it each entry is."""
    if tensor.untyped_storage()._cdata == parameter.tensor.untyped_storage()._cdata:
        start = int(tensor.storage_offset()) - int(parameter.tensor.storage_offset())
        flat = torch.arange(tensor.shape[dim]).mul(tensor.stride(dim)).add(start)
    else:  # entries of the parameter in another order
        (labels, *_) = trace.memory.read(tensor)
        assert labels is not None
        line = labels[tuple(slice(None) if axis == dim % tensor.dim() else 0 for axis in range(tensor.dim()))]
        flat = line.long() - int(trace.entries[parameter.key].min())
    return _places(parameter.tensor, flat)


def _places(tensor: Tensor, flat: Tensor) -> dict[int, Tensor]:
    """By dimension along which they differ, the places of entries that are given by their places in memory."""
    found: dict[int, Tensor] = {}
    for axis in sorted(range(tensor.dim()), key=tensor.stride, reverse=True):
        if tensor.shape[axis] == 1:
            continue
        place = torch.div(flat, tensor.stride(axis), rounding_mode="floor")
        flat = torch.remainder(flat, tensor.stride(axis))
        if len(place) and bool((place != place[0]).any()):
            found[axis] = place
    return found


def axis_of(
    trace: Ledger, parameter: Parameter, tensor: Tensor, dim: int, met: Labels = NONE, *, finest: bool = False
) -> tuple[int, Tensor] | None:
    """(dimension of a parameter, place of each entry) along dimension `dim` of a view of it.

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
                return max(found.items(), key=lambda item: len(distinct(item[1])))
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


def _depend_on(trace: Ledger, labels: Tensor, places: Tensor) -> bool:
    """Whether the labels along the last axis differ, and are the same wherever the places are."""
    line = trace.classes.find(labels).reshape(-1, labels.shape[-1])[0]
    first = torch.zeros(int(places.max()) + 1, dtype=line.dtype).scatter(0, places, line)
    return bool((first[places] == line).all()) and bool((line != line[0]).any())


def at_axis(atoms: Tensor, dim: int, dims: int) -> Tensor:
    return atoms.view([-1 if axis == dim else 1 for axis in range(dims)])


def in_planes(
    trace: Ledger, made: Tensor | None, passed: list[Tensor | None], shape: Sequence[int]
) -> Labels:
    """New labels in the first plane that is free."""
    result = [None if some is None else wide(some, len(shape)).expand(shape) for some in passed]
    if made is not None:
        free = next((plane for plane, some in enumerate(result) if some is None), None)
        if free is None:
            trace.pin(
                (made, *NONE[1:]), f"more than {PLANES} structures meet in {trace.by()}", unsupported=True
            )
        else:
            result[free] = made.expand(shape)
    return tuple(result)


def note_read(trace: Ledger, parameter: Parameter, inner: tuple[int, Tensor], labels: Tensor) -> None:
    """Remember that a line of a parameter's entries, each at its place, is summed over with labelled ones."""
    dim, places = inner
    small, _ = without_constant_axes(labels)
    trace.noted.reads.append(
        Read(trace.line(parameter, dim)[places], small.reshape(-1, small.shape[-1]).clone())
    )
    note_reader(trace, parameter, dim, labels.shape[-1])


def note_producer(trace: Ledger, parameter: Parameter, dim: int) -> None:
    """Remember through which module a parameter makes structures: a shared one has several owners."""
    module = trace.stack[-1] if trace.stack else trace.network
    here = any(tensor is parameter.tensor for tensor in module._parameters.values())
    trace.noted.producers.setdefault((parameter.key, dim), trace.here if here else parameter.path)
    if not here:
        trace.noted.made_elsewhere.add((parameter.key, dim))


def note_reader(trace: Ledger, parameter: Parameter, dim: int, size: int, input_dim: int = -1) -> None:
    """Remember through which module a parameter is read, and whether that module's input meets it entry by entry."""
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
