"""Curvature of a network's layers: second moments of their inputs, and of the gradients at their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
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
        inputs: Σ x xᵀ over examples and positions, or some of these. Shape: (groups, inputs, inputs); of an embedding
            (1, entries). Of a wide convolution over channels alone, the mean over positions in the kernel.
        gradients: Σ g gᵀ, g the gradient of −log p(y | x) at the layer's output. Shape: (groups, outputs, outputs).
        rows: number of examples times positions that `inputs` are from.
        positions: of a wide convolution, Σ x xᵀ over positions in the kernel, the mean over channels; else None.
            Shape: (groups, positions, positions).
        means: of a layer with a bias, Σ x over the same examples and positions; else None. Shape: (groups, inputs).
    """

    inputs: Tensor
    gradients: Tensor
    rows: int = 0
    positions: Tensor | None = None
    means: Tensor | None = None

    def add(self, other: Moments) -> None:
        self.inputs = self.inputs + other.inputs
        self.gradients = self.gradients + other.gradients
        self.rows += other.rows
        if self.positions is not None and other.positions is not None:
            self.positions = self.positions + other.positions
        if self.means is not None and other.means is not None:
            self.means = self.means + other.means

    def about_the_mean(self) -> Moments:
        """The same with Σ (x − μ)(x − μ)ᵀ, of a layer with a bias, which takes over what is constant in its inputs."""
        if self.means is None:
            return self
        outer = self.means.unsqueeze(-1) * self.means.unsqueeze(-2) / self.rows
        return replace(self, inputs=self.inputs - outer)

    def kept(self, keep: Callable[[Tensor], Tensor]) -> Moments:
        """The same, with its two large matrices as `keep` gives them."""
        return replace(self, inputs=keep(self.inputs), gradients=keep(self.gradients))


def matrix_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that are products with a matrix of their own, by path, each once.

    Not those that share their weight with another layer: its curvature is of both.
    """
    owners = Counter(
        id(p) for module in network.modules() for p in module._parameters.values() if p is not None
    )
    return {
        path: module
        for path, module in network.named_modules()
        if is_matrix(module) and owners[id(module.get_parameter("weight"))] == 1
    }


def moments(
    layers: dict[str, nn.Module],
    log_likelihood: Callable[[], Tensor],
    widest: int,
    before: dict[str, Moments] | None = None,
) -> dict[str, Moments]:
    """The moments of layers on one batch, added to those of the batches before it.

    Args:
        layers: by path.
        log_likelihood: runs the network, and returns Σ log p(y | x) over the batch, with labels drawn from the model.
        widest: of a convolution with more inputs, channels and positions are taken apart.
        before: what there is, by path; it is changed in place. None: nothing.

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
        module, size = layers[path], (g.mT @ g).double()
        if rows.dim() == 3 and rows.shape[-1] > widest and positions_of(module) > 1:
            split = apart(module, rows)  # (groups, rows, positions, channels)
            channels, positions = split.flatten(1, 2), split.mT.flatten(1, 2)
            one = Moments(
                (channels.mT @ channels).double() / split.shape[-2], size, rows.shape[1],
                (positions.mT @ positions).double() / split.shape[-1],
            )  # fmt: skip
        else:
            biased = rows.dim() == 3 and getattr(module, "bias", None) is not None
            second, means = _with_sums(rows) if biased else (second_moment(module, rows), None)
            one = Moments(second, size, rows.shape[1], means=means)
        if path in found:
            found[path].add(one)
        else:
            found[path] = one
    return found


def _with_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ and Σ x, in float64, so that what is left about the mean has the precision of what varies."""
    centre = rows.mean(1, keepdim=True)
    rows = rows - centre
    centre, rest = centre.double(), rows.sum(1, keepdim=True, dtype=torch.float64)
    shift = centre.mT @ rest
    second = (rows.mT @ rows).double() + shift + shift.mT + rows.shape[1] * centre.mT @ centre
    return second, (rest + rows.shape[1] * centre).squeeze(1)


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
