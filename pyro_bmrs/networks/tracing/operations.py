"""What each of torch's operations does to labels: the rule of each, by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bmrs.networks.copies import fill
from pyro_bmrs.networks.tracing.convolutions import convolution
from pyro_bmrs.networks.tracing.labels import NONE
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.meeting import POINTWISE, pointwise
from pyro_bmrs.networks.tracing.mixing import (
    OVER_DIM,
    OVER_PLACES,
    batch_norm,
    group_norm,
    layer_norm,
    over_dim,
    over_places,
    put,
    reduce,
)
from pyro_bmrs.networks.tracing.moving import MOVES, move
from pyro_bmrs.networks.tracing.noted import Arguments, tensors_in
from pyro_bmrs.networks.tracing.products import embedding, grouped_mm, matrix_product

Rule = Callable[[Ledger, Any, Arguments, dict[str, Any], Any], None]


def follow(trace: Ledger, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation, and give its outputs labels."""
    name = function._schema.name.split("::")[-1]
    tensors = tensors_in((args, kwargs))
    trace.note_used(tensors)
    quiet = trace.silent > 0
    relevant = not quiet and any(
        trace.memory.has(tensor) or trace.parameter(tensor) is not None for tensor in tensors
    )
    if not relevant:
        out = function(*args, **kwargs)
        _taint(trace, tensors, out)
        return out
    mutates = function._schema.is_mutable
    if function.is_view or torch.Tag.inplace_view in function.tags or (not mutates and name in _SAME_MEMORY):
        out = function(*args, **kwargs)
        for tensor in tensors_in(out):
            if trace.memory.has(tensor):
                labels = trace.labels(tensor)
                trace.note_box(labels)
        return out
    before = [
        tensor.clone() if mutates and not trace.memory.has(tensor) else tensor for tensor in tensors[:1]
    ]
    rule = _rule_of(function, name)
    if rule is None and function in decomposition_table and not mutates:
        with trace.again:
            return decomposition_table[function](*args, **kwargs)
    out = (
        _in_place_of_product(trace, function, args, kwargs)
        if name in _PRODUCTS and all(tensor.layout == torch.strided for tensor in tensors)
        else function(*args, **kwargs)
    )
    if rule is None:
        trace.pin_unknown(name, tensors)
        return out
    if mutates and tensors:
        swapped = [*before, *tensors[1:]]
        args, kwargs = _replaced((args, kwargs), tensors, swapped)
    try:
        rule(trace, function, args, kwargs, out)
    except (RuntimeError, IndexError, ValueError):  # a form of the operation that the rule does not know
        trace.pin_unknown(name, tensors)
        _unlabelled(trace, function, args, kwargs, out)
    _taint(trace, tensors, out)
    for tensor in tensors_in(out):
        labels = trace.memory.read(tensor)
        if name in MOVES:
            trace.note_box(labels)
    return out


# Outputs of these are the memory of an input, though torch does not say so.
_SAME_MEMORY = {
    "_unsafe_view",
    "detach",
    "alias",
    "lift_fresh",
    "_reshape_alias",
    "view_as_real",
    "view_as_complex",
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}


def _in_place_of_product(
    trace: Ledger, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Random numbers in the shape of a product, whose values labels don't depend on: products take most of the time."""
    shaped = function(*tree_map(_without_values, args), **tree_map(_without_values, kwargs))
    like = next(tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor))
    out = torch.empty_strided(shaped.shape, shaped.stride(), dtype=shaped.dtype, device=like.device)
    if not like.is_meta:
        fill(out, trace.numbers.to(out.device, out.dtype))
    return out


def _without_values(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _replaced(value: Any, old: list[Tensor], new: list[Tensor]) -> Any:
    by_id = {id(one): other for one, other in zip(old, new, strict=True)}
    return tree_map(lambda leaf: by_id.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf, value)


def _taint(trace: Ledger, tensors: list[Tensor], out: Any) -> None:
    if any(tensor in trace.from_inputs for tensor in tensors):
        for tensor in tensors_in(out):
            trace.from_inputs.add(tensor)


def _rule_of(function: Any, name: str) -> Rule | None:
    if name in _RULES:
        return _RULES[name]
    if name in MOVES:
        return move
    if torch.Tag.reduction in function.tags or name in {"mean", "sum", "amax", "amin", "any", "all"}:
        return reduce
    if name in OVER_PLACES:
        return over_places
    if name in OVER_DIM:
        return over_dim
    if torch.Tag.pointwise in function.tags or name in POINTWISE:
        return pointwise
    return None


def _unlabelled(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """Outputs that are filled anew, with no labels."""
    for tensor in tensors_in(out):
        trace.memory.write(tensor, NONE)


def _like(trace: Ledger, function: Any, args: Arguments, kwargs: dict[str, Any], out: Any) -> None:
    """A tensor of the shape of another, which loses what that loses."""
    labels = trace.labels(args[0])
    if not any(some is not None and trace.are_entries(some) for some in labels):
        put(trace, out, labels)


_RULES: dict[str, Rule] = {
    "_grouped_mm": grouped_mm, "mm": matrix_product, "addmm": matrix_product,
    "bmm": matrix_product, "baddbmm": matrix_product,
    "convolution": convolution, "_convolution": convolution,
    "embedding": embedding, "native_batch_norm": batch_norm, "_native_batch_norm_legit_no_training": batch_norm,
    "native_layer_norm": layer_norm, "native_group_norm": group_norm, "zero_": _unlabelled, "fill_": _unlabelled,
    "normal_": _unlabelled, "uniform_": _unlabelled, "zeros_like": _like, "ones_like": _like, "empty_like": _like,
    "full_like": _like, "rand_like": _like, "randn_like": _like, "new_zeros": _unlabelled, "new_ones": _unlabelled,
    "new_empty": _unlabelled, "new_full": _unlabelled, "nonzero": _unlabelled, "_local_scalar_dense": _unlabelled,
    "arange": _unlabelled, "bincount": _unlabelled, "equal": _unlabelled, "_assert_async": _unlabelled,
    "is_nonzero": _unlabelled, "resize_": _unlabelled,
}  # fmt: skip
