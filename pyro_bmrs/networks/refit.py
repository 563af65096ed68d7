"""Weights of a smaller network in closed form: each layer is fitted to what the full network has in its place."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmrs.networks.cost import peak_bytes
from pyro_bmrs.networks.curvature import matrix_layers, own_biases
from pyro_bmrs.networks.cuts import Cuts, joined
from pyro_bmrs.networks.inputs import Inputs, batch_size, call, taken, tensors_of
from pyro_bmrs.networks.matrices import (
    as_matrix,
    as_weight,
    computes_its_matrix,
    groups_of,
    input_dim,
    input_rows,
    output_rows,
    row_count,
)
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.residuals import Beside, added, kept_beside

# The share of the mean of the Gram matrix's diagonal that pulls towards the weights before.
RIDGE = 1e-3
# Rows of a layer at most, all examples together.
_ROWS = 100_000
# Shares of the memory: activations of the smaller network, those of the full one, what is kept of its outputs, patches;
# and a Gram matrix with what solving needs, once the full one has run.
_SMALL, _FULL, _KEPT, _PATCHES, _GRAM = 0.3, 0.3, 0.35, 0.1, 0.25
# A Gram matrix, the same with its ridge, and its decomposition.
_COPIES = 3


@dataclass
class _Target:
    """What the full network has at a layer.

    Attributes:
        places: which rows, of all examples and positions.
        outputs: what it has there, of the outputs that stay, with what is added to them: the smaller network's stream
            is to be taken from it, so that the layer makes up for what the sum lacks. Shape: (groups, rows, outputs).
        rows: how many rows there are in all.
    """

    places: Tensor
    outputs: Tensor
    rows: int


@torch.no_grad()
def refit(
    small: nn.Module,
    full: nn.Module,
    cuts: Cuts,
    inputs: Inputs,
    *,
    memory: float = 4.0,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Fit each layer of `small`, in place and in the order of its forward pass, to what `full` has there.

    Of a layer with inputs X as `small` makes them, where those before are refitted, and with Y as `full` has at its
    output, [W b] minimises ‖X Wᵀ + b − Y‖² + λ ‖[W b] − [W₀ b₀]‖², λ a thousandth of the mean of the Gram matrix's
    diagonal, W₀ the weights before. Where a stream is added to the output, Y is what makes the sum that of `full`: the
    layer makes up for what the stream lacks. Statistics of BatchNorm are those of its inputs in `small`. What is called
    several times in a pass stays as it is, and so does a bias that several layers share.

    Args:
        small: the smaller network; it is left in evaluation mode.
        full: the network it was cut from, without noise; not changed.
        cuts: that made it.
        inputs: examples, all of which go through `small` at once: `examples_within` says how many can.
        memory: GiB that it may need beside both networks. A layer with too many inputs for it keeps its weights, with
            a warning.
        advance: called after each layer.
    """
    small.eval()
    layers = {
        path: module for path, module in matrix_layers(small).items() if not isinstance(module, nn.Embedding)
    }
    chunk = examples_within(full, inputs, memory, _FULL)
    besides, biased = added(full, layers, inputs), own_biases(small)
    most = _rows_within(layers, _KEPT * memory * 2**30)
    targets = _targets(full, most, besides, cuts, inputs, chunk)
    too_wide: list[str] = []
    with kept_beside(small, besides) as beside:

        def solve(path: str, module: nn.Module, x: Tensor) -> None:
            target, stream = targets.pop(path, None), beside(path)
            if target is not None:
                if stream is not None:
                    rows = output_rows(module, stream)
                    target.outputs -= rows[:, target.places.to(rows.device)]
                if _COPIES * _gram_bytes(module) > _GRAM * memory * 2**30:
                    too_wide.append(path)
                else:
                    _solve(module, x, target, _PATCHES * memory * 2**30, with_bias=path in biased)
            advance()

        with _before_each(small, layers, solve, _norms_called_once(small, inputs)):
            call(small, inputs)
    if too_wide:
        warnings.warn(
            f"not fitted again: {', '.join(map(repr, too_wide))}, of which the second moments of the inputs need more "
            f"than their share of memory={memory:g} GiB; the weights there are those before the refit",
            stacklevel=2,
        )


def _rows_within(layers: Mapping[str, nn.Module], memory: float) -> dict[str, int]:
    """By layer: of how many rows the outputs are kept in so many bytes. A half is shared alike, one by inputs.

    What is fitted is off by the share of inputs in rows, beside the noise: so rows go where inputs are.
    """
    shapes = {path: as_matrix(layer, layer.get_parameter("weight")).shape for path, layer in layers.items()}
    sizes = [(4 * groups * outputs, inputs) for groups, outputs, inputs in shapes.values()]
    alike = 0.5 * memory / max(sum(each for each, _ in sizes), 1)
    by_input = 0.5 * memory / max(sum(each * inputs for each, inputs in sizes), 1)
    return {path: int(min(_ROWS, max(alike + by_input * shape[2], 1))) for path, shape in shapes.items()}


def _gram_bytes(module: nn.Module) -> int:
    groups, _, inputs = as_matrix(module, module.get_parameter("weight")).shape
    return groups * (inputs + 1) ** 2 * 8


@torch.no_grad()
def examples_within(network: nn.Module, inputs: Inputs, memory: float, share: float = _SMALL) -> int:
    """How many examples can go through a network at once in a share of so many GiB, at least 1."""
    count = batch_size(inputs)
    if count == 1:
        return 1
    few = min(2, count - 1)  # of one a norm without running statistics has no variance
    with in_mode(network, training=False):
        fewer, more = (peak_bytes(network, taken(inputs, slice(0, some), count)) for some in (few, few + 1))
    return max(int(share * memory * 2**30 / max(more - fewer, 1)), 1)


def _targets(
    full: nn.Module,
    all_rows: Mapping[str, int],
    besides: Mapping[str, Beside],
    cuts: Cuts,
    inputs: Inputs,
    chunk: int,
) -> dict[str, _Target]:
    """By path: what the full network has at the outputs of layers that are called once in a pass, and are their matrix.

    Args:
        all_rows: by path of a layer: rows at most.
        chunk: examples at a time.
    """
    count = batch_size(inputs)
    # by layer: rows of its output for each example. Examples may stand in another dimension, such as behind time, and
    # then these differ between chunks of different sizes
    shares: dict[str, set[float]] = {}
    kept: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, int] = {}

    def keep(
        path: str, module: nn.Module, x: Tensor, y: Tensor, stream: Tensor | None, examples: int
    ) -> None:
        if not computes_its_matrix(module, x, y):
            return
        shares.setdefault(path, set()).add(y.shape[0] / examples)
        calls[path] = calls.get(path, 0) + 1
        rows = output_rows(module, y)
        most = max(1, all_rows[path] * examples // count)
        places = torch.arange(rows.shape[1])
        if len(places) > most:
            places = torch.randperm(len(places), generator=generator)[:most].sort().values
        count_of_rows, rows = rows.shape[1], rows[:, places.to(y.device)]
        if stream is not None:
            rows = rows + output_rows(module, stream)[:, places.to(y.device)]
        left = cuts.tensors.get(joined(path, "weight"), {}).get(1 - input_dim(module))
        if left is not None:
            rows = _left(module, rows, left)
        kept.setdefault(path, []).append((places, rows, count_of_rows))

    chunks = 0
    chunk = max(chunk, 2)
    bounds = [0, *range(chunk - 1, count, chunk), count] if chunk < count else [0, count]
    for start, end in itertools.pairwise(bounds):
        some = taken(inputs, slice(start, end), count)
        chunks += 1

        with in_mode(full, training=False), kept_beside(full, besides) as beside, ExitStack() as hooks:

            def hook(path: str, examples: int = batch_size(some), beside: Any = beside) -> Any:
                return lambda module, args, kwargs, y: keep(
                    path, module, tensors_of((args, kwargs))[0], y, beside(path), examples
                )

            for path in all_rows:
                handle = full.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
                hooks.callback(handle.remove)
            call(full, some)
        if chunks > 1 and any(len(found) > 1 for found in shares.values()):
            return _targets(full, all_rows, besides, cuts, inputs, count)
    found = {}
    for path, parts in kept.items():
        if calls[path] == chunks:  # not several times in a pass
            starts = torch.tensor([0, *(rows for _, _, rows in parts)]).cumsum(0)
            places = torch.cat([own + start for (own, _, _), start in zip(parts, starts[:-1], strict=True)])
            outputs, rows = torch.cat([y for _, y, _ in parts], dim=1), int(starts[-1])
            found[path] = _Target(places, outputs, rows)
    return found


def _left(module: nn.Module, rows: Tensor, left: list[int]) -> Tensor:
    """The outputs that stay, of a full layer's: those of each group, of which some may have none."""
    groups = groups_of(module)
    each = rows.shape[-1]
    chosen = torch.tensor(left, device=rows.device)
    per_group = [chosen[chosen // each == group] % each for group in range(groups)]
    return torch.stack([rows[group][:, own] for group, own in enumerate(per_group) if len(own)])


def _solve(module: nn.Module, x: Tensor, target: _Target, memory: float, *, with_bias: bool) -> None:
    """Ridge regression of what the full network has on the inputs of a layer.

    Args:
        memory: bytes for patches.
        with_bias: whether the bias, if there is one, is the layer's own; else it stays.
    """
    weight = module.get_parameter("weight")
    before = as_matrix(module, weight.detach()).double()
    bias = module._parameters.get("bias")
    if bias is not None and not with_bias:
        target.outputs -= bias.view(before.shape[0], 1, -1).to(target.outputs)
        bias = None
    if bias is not None:
        before = torch.cat([before, bias.detach().double().view(*before.shape[:2], 1)], dim=-1)
    if row_count(module, x) != target.rows:  # not the same examples and positions
        return
    gram = before.new_zeros(before.shape[0], before.shape[2], before.shape[2])
    shared = torch.zeros_like(before)
    # patches of all places at once would take much memory
    each = before.shape[0] * before.shape[2] * (x.element_size() + before.element_size())
    for some in torch.split(torch.arange(len(target.places)), max(int(memory / each), 1)):
        chosen = input_rows(module, x, target.places[some].to(x.device)).double()
        if bias is not None:
            chosen = torch.cat([chosen, chosen.new_ones(*chosen.shape[:2], 1)], dim=-1)
        gram += chosen.mT @ chosen
        shared += target.outputs[:, some.to(target.outputs.device)].double().mT @ chosen
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found = torch.linalg.solve(gram + ridge * eye, shared.mT + ridge * before.mT).mT
    if not bool(torch.isfinite(found).all()):
        return
    if bias is not None:
        bias.copy_(found[..., -1].flatten())
        found = found[..., :-1]
    weight.copy_(as_weight(module, found))


def _norms_called_once(network: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """Each BatchNorm that has one input in a pass, whose statistics can be its own."""
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, *_: Any) -> None:
        calls[module] = calls.get(module, 0) + 1

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return []
    with ExitStack() as hooks:
        for module in norms:
            hooks.callback(module.register_forward_pre_hook(count).remove)
        examples = batch_size(inputs)
        call(network, taken(inputs, slice(0, min(2, examples)), examples))
    return [module for module, times in calls.items() if times == 1]


@contextmanager
def _before_each(
    small: nn.Module,
    layers: Mapping[str, nn.Module],
    solve: Callable[[str, nn.Module, Tensor], None],
    norms: Collection[nn.Module],
) -> Iterator[None]:
    """Calls `solve` before each layer, once; and gives each BatchNorm of `norms` the statistics of its input."""

    def fit(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            solve(path, module, tensors_of((arguments, keywords))[0])

        return hook

    def normalise(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(module, _BatchNorm)
        x = tensors_of((arguments, keywords))[0]
        # one value per channel has no variance
        several = x.numel() > 2 * x.shape[1]
        if several and module.running_mean is not None and module.running_var is not None:
            over = [dim for dim in range(x.dim()) if dim != 1]
            variance, mean = torch.var_mean(x, dim=over)
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)

    handles = [
        module.register_forward_pre_hook(fit(path), with_kwargs=True) for path, module in layers.items()
    ]
    handles += [module.register_forward_pre_hook(normalise, with_kwargs=True) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
