"""Curvature of a network's layers: second moments of their inputs, and of the gradients at their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.inputs import tensors_of
from pyro_bmrs.networks.matrices import (
    apart,
    computes_its_matrix,
    input_rows,
    is_matrix,
    output_rows,
    positions_of,
    row_count,
    second_moment,
)

# Of a layer with more positions an example, A is taken at so many of them, on average.
_POSITIONS = 256


@dataclass
class Moments:
    """Sums over examples of one layer, in float64.

    Attributes:
        inputs: Σ x xᵀ over examples and positions, or some of these; of a layer with a bias of its own
            Σ (x − μ)(x − μ)ᵀ, since the bias takes over what is constant. Shape: (groups, inputs, inputs); of an
            embedding (1, entries). Of a wide convolution over channels alone, the mean over positions in the kernel.
        gradients: Σ g gᵀ, g the gradient at the layer's output of what `moments` is given. Shape: (groups, outputs,
            outputs).
        rows: number of examples times positions that `inputs` are from.
        positions: of a wide convolution, the same over positions in the kernel, the mean over channels; else None.
            Shape: (groups, positions, positions).
        mean: μ of a layer with a bias of its own, else None. Shape: (groups, inputs), or (groups, positions, channels).
    """

    inputs: Tensor
    gradients: Tensor
    rows: int = 0
    positions: Tensor | None = None
    mean: Tensor | None = None

    def add(self, other: Moments) -> None:
        rows = self.rows + other.rows
        if self.mean is not None and other.mean is not None:
            apart = other.mean - self.mean
            self.move(apart, self.rows * other.rows / max(rows, 1))
            self.mean = self.mean + apart * (other.rows / max(rows, 1))
        self.inputs = self.inputs + other.inputs
        self.gradients = self.gradients + other.gradients
        self.rows = rows
        if self.positions is not None and other.positions is not None:
            self.positions = self.positions + other.positions

    def move(self, by: Tensor, rows: float) -> None:
        """Add what so many rows have about a mean that is so far from their own. Nothing is ever subtracted."""
        by = by if self.positions is not None else by.unsqueeze(1)  # (groups, positions, inputs)
        self.inputs = self.inputs + by.mT @ by * (rows / by.shape[1])
        if self.positions is not None:
            self.positions = self.positions + by @ by.mT * (rows / by.shape[2])

    def kept(self, keep: Callable[[Tensor], Tensor]) -> Moments:
        """The same, with its two large matrices as `keep` gives them."""
        return replace(self, inputs=keep(self.inputs), gradients=keep(self.gradients))


def _owners(network: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its id."""
    return Counter(
        id(p) for module in network.modules() for p in module._parameters.values() if p is not None
    )


def matrix_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that are products with a matrix of their own, by path, each once.

    Not those that share their weight with another layer: its curvature is of both.
    """
    owners = _owners(network)
    return {
        path: module
        for path, module in network.named_modules()
        if is_matrix(module) and owners[id(module.get_parameter("weight"))] == 1
    }


def own_biases(network: nn.Module) -> frozenset[str]:
    """Paths of layers with a bias that is a parameter of theirs alone."""
    owners = _owners(network)
    return frozenset(
        path for path, module in network.named_modules() if owners[id(module._parameters.get("bias"))] == 1
    )


def moments(
    layers: dict[str, nn.Module],
    log_likelihood: Callable[[], Tensor],
    widest: int,
    before: dict[str, Moments] | None = None,
    biased: Collection[str] = (),
) -> dict[str, Moments]:
    """The moments of layers on one batch, added to those of the batches before it.

    Args:
        layers: by path.
        log_likelihood: runs the network, and returns a sum over the batch. The mean of g gᵀ, of its gradients by the
            outputs, is the curvature of log p(y | x): for one, Σ log p(y | x) with labels drawn from the model.
        widest: of a convolution with more inputs, channels and positions are taken apart.
        before: what there is, by path; it is changed in place. None: nothing.
        biased: paths of the layers whose bias takes over what is constant.

    Returns:
        By path; nothing for a layer that does not run, that nothing of the likelihood depends on, or that computes
        something else than its weight says.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.enable_grad(), _kept(layers, seen):
        value = log_likelihood()
    outputs = [(path, x, y) for path, calls in seen.items() for x, y in calls if y.requires_grad]
    gradients = torch.autograd.grad(-value, [y for _, _, y in outputs], allow_unused=True)
    found = {} if before is None else before
    for (path, x, y), gradient in zip(outputs, gradients, strict=True):
        if gradient is None or not computes_its_matrix(layers[path], x, y):
            continue
        rows = _at_least_single(input_rows(layers[path], x, _some_places(layers[path], x)))
        g = _at_least_single(output_rows(layers[path], gradient))
        module, size, mean = layers[path], (g.mT @ g).double(), None
        wide = rows.dim() == 3 and rows.shape[-1] > widest and positions_of(module) > 1
        if wide:
            rows = apart(module, rows)  # (groups, rows, positions, channels)
        if path in biased and rows.is_floating_point():
            mean = rows.sum(1) / max(rows.shape[1], 1)  # none of an expert without tokens
            rows, mean = rows - mean.unsqueeze(1), mean.double()
        if wide:
            channels, positions = rows.flatten(1, 2), rows.mT.flatten(1, 2)
            one = Moments(
                (channels.mT @ channels).double() / rows.shape[2], size, rows.shape[1],
                (positions.mT @ positions).double() / rows.shape[3], mean,
            )  # fmt: skip
        else:
            one = Moments(second_moment(module, rows), size, rows.shape[1], None, mean)
        if path in found:
            found[path].add(one)
        else:
            found[path] = one
    return found


def _some_places(module: nn.Module, x: Tensor) -> Tensor | None:
    """Rows of a layer's input to look at, drawn at random; None: all. A is their mean."""
    if isinstance(module, nn.Embedding):
        return None
    count, most = row_count(module, x), _POSITIONS * x.shape[0]
    return torch.randint(count, (most,), device=x.device) if count > most else None


def _at_least_single(rows: Tensor) -> Tensor:
    """In float32 at least: products in half precision are no second moments. Numbers of entries stay."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) if rows.is_floating_point() else rows


@contextmanager
def _kept(layers: dict[str, nn.Module], seen: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Keeps the input and output of each call of each layer. All outputs have gradients inside."""

    def hook(path: str) -> Any:
        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> Tensor:
            x = tensors_of((arguments, keywords))[0]
            seen.setdefault(path, []).append((x.detach(), y))
            return y.clone()  # what follows may change it in place

        return keep

    frozen = [p for module in layers.values() for p in module.parameters() if not p.requires_grad]
    handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in layers.items()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
