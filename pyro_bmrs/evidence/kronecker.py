"""Evidence of parts of a layer's weights, from a Laplace posterior with Kronecker-factored curvature.

The posterior of a layer's weights W (outputs × inputs) round their values ŵ is normal, with precision N A ⊗ G + δ I: A
is the second moment of the inputs, G that of the gradients at the outputs, δ the precision of the prior N(0, 1/δ) of
each weight (Ritter, Botev, Barber, 2018; MacKay, 1992). Where the layer has a bias, of flat prior, A is about the mean
of the inputs: the bias is integrated out, and takes over what is constant. Of a wide convolution A is itself a product,
of channels and positions in the kernel (Grosse & Martens, 2016). The functions take a layer as several independent
blocks, which a convolution in groups has. All is in float64, ΔF in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# δ is at least this, and found to this share. Weights have at least this size, ‖w‖².
_LEAST, _PRECISE, _LEAST_SIZE = 1e-12, 1e-12, 1e-200


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class KroneckerCurvature:
    """The curvature of a layer's log-likelihood, N A ⊗ G, and its weights.

    Attributes:
        inputs: A, mean of x xᵀ over examples and positions; of (x − μ)(x − μ)ᵀ where there is a mean. Shape: (blocks,
            inputs, inputs), or (blocks, inputs) where it is diagonal, as of an embedding.
        gradients: G, mean over examples of Σ g gᵀ over positions. Shape: (blocks, outputs, outputs).
        weights: ŵ. Shape: (blocks, outputs, inputs); with positions (blocks, outputs, positions, inputs).
        examples: N, of the whole data set.
        positions: B, where A is B ⊗ inputs, of mean diagonal 1. Shape: (blocks, positions, positions).
        mean: μ, of the inputs of a layer with a bias. Shape: (blocks, inputs), or (blocks, positions, inputs).
        keep: what is done with a large tensor that is kept, such as eigenvectors: `files.on_disk` makes room in memory.
    """

    inputs: Tensor
    gradients: Tensor
    weights: Tensor
    examples: int
    positions: Tensor | None = None
    mean: Tensor | None = None
    keep: Callable[[Tensor], Tensor] = as_it_is

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, outputs, inputs)."""
        return self.weights.shape[0], self.weights.shape[1], self.weights.shape[-1]

    @cached_property
    def given_bias(self) -> KroneckerCurvature:
        """The same about 0: that of the weights where the bias stays at its value."""
        if self.mean is None:
            return self
        mean, positions = self.mean if self.positions is not None else self.mean.unsqueeze(1), None
        inputs = self.inputs + mean.mT @ mean / mean.shape[1]
        if self.positions is not None:
            own = _mean_diagonal(self.inputs) * self.positions + mean @ mean.mT / mean.shape[2]
            positions = self.keep(own / _mean_diagonal(own).clamp(min=1e-300))
        return replace(self, inputs=self.keep(inputs), positions=positions, mean=None)

    @cached_property
    def of_inputs(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues (blocks, inputs), not negative, and eigenvectors of A; None where A is diagonal."""
        return (self.inputs, None) if self.inputs.dim() == 2 else self._eigen(self.inputs)

    @cached_property
    def of_outputs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (blocks, outputs), not negative, and eigenvectors of G."""
        return self._eigen(self.gradients)

    @cached_property
    def of_positions(self) -> tuple[Tensor, Tensor] | None:
        """Eigenvalues (blocks, positions), not negative, and eigenvectors of B."""
        return None if self.positions is None else self._eigen(self.positions)

    def _eigen(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigen(moment)
        return values, self.keep(vectors)

    def rows(self, values: Tensor, vectors: Tensor, weights: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Directions in which a layer's outputs (and positions) are independent.

        Args:
            values, vectors: of G, or of a part of it.
            weights: of these outputs.

        Returns:
            (curvature of each direction, (rows,); weights in these directions, (rows, inputs)).
        """
        if self.of_positions is None:
            return values, vectors.mT @ weights
        b, rotation = self.of_positions[0][block], self.of_positions[1][block]
        turned = torch.einsum("oj,pk,opi->jki", vectors, rotation, weights)
        return (values.unsqueeze(-1) * b).flatten(), turned.flatten(0, 1)

    @cached_property
    def rotated(self) -> list[tuple[Tensor, Tensor]]:
        """`rows` of each block, of all outputs."""
        values, vectors = self.of_outputs
        found = (
            self.rows(values[block], vectors[block], self.weights[block], block)
            for block in range(self.shape[0])
        )
        return [(curved, self.keep(weights)) for curved, weights in found]

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Those of N A ⊗ G. Shape: (blocks, rows, inputs)."""
        values = torch.stack([one for one, _ in self.rotated])
        return self.keep(self.examples * values.unsqueeze(-1) * self.of_inputs[0].unsqueeze(-2))


def _mean_diagonal(matrix: Tensor) -> Tensor:
    """Shape: (blocks, 1, 1)."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


@dataclass(frozen=True)
class Spectrum:
    """What the marginal likelihood of some layers' weights w depends on, beside log p(data | w).

    Attributes:
        eigenvalues: λ, those of N A ⊗ G. Shape: (weights,).
        size: ‖w‖².
    """

    eigenvalues: Tensor
    size: float

    @classmethod
    def of(cls, curvature: KroneckerCurvature) -> Spectrum:
        """Of a layer as it is."""
        return cls(curvature.eigenvalues.flatten(), float(curvature.weights.square().sum()))

    @classmethod
    def together(cls, several: Iterable[Spectrum]) -> Spectrum:
        """Of layers with one prior."""
        every = [*several]
        return cls(torch.cat([one.eigenvalues for one in every]), sum(one.size for one in every))

    @classmethod
    def without(
        cls, curvature: KroneckerCurvature, weights: Tensor, inputs: Tensor, outputs: Tensor
    ) -> Spectrum:
        """Of a layer without some of its inputs and outputs.

        Args:
            weights: what the layer then has. Shape: that of its weights.
            inputs: which are away, in each block. Shape: (inputs,), bool.
            outputs: which are away. Shape: (blocks, outputs), bool.
        """
        stays, found = ~inputs, []
        for block in range(curvature.shape[0]):
            left, moment = ~outputs[block], curvature.inputs[block]
            g = _values(curvature.gradients[block][left][:, left])
            if curvature.of_positions is not None:
                g = (g.unsqueeze(-1) * curvature.of_positions[0][block]).flatten()
            a = moment[stays] if moment.dim() == 1 else _values(moment[stays][:, stays])
            found.append((curvature.examples * g.unsqueeze(-1) * a).flatten())
        return cls(torch.cat(found), float(weights[..., stays].flatten(2).square().sum(-1)[~outputs].sum()))

    def prior_precision(self) -> float:
        """δ at which the Laplace marginal likelihood is largest, for one prior N(0, 1/δ) of all these weights.

        δ ‖w‖² = γ with γ = Σ λ / (λ + δ) (MacKay, 1992): the left side rises with δ, and the right one falls.
        """
        from scipy.optimize import brentq  # type: ignore[import-untyped]  # slow to import

        size = max(self.size, _LEAST_SIZE)

        def missing(log_delta: float) -> float:
            delta = math.exp(log_delta)
            return float((self.eigenvalues / (self.eigenvalues + delta)).sum()) - delta * size

        # γ is at most n; a little above n / ‖w‖² rounding does not matter
        least, most = math.log(_LEAST), math.log(max(len(self.eigenvalues), 1) / size) + 1.0
        if most <= least or missing(least) <= 0:
            return _LEAST
        return math.exp(brentq(missing, least, most, xtol=_PRECISE))

    def log_marginal_likelihood(self, delta: float) -> float:
        """−½ δ ‖w‖² + ½ n log δ − ½ log det(N A ⊗ G + δ I), with n weights, in nats."""
        own = self.eigenvalues + delta
        return 0.5 * (own.numel() * math.log(delta) - delta * self.size - float(own.log().sum()))


def prior_precision(curvatures: Sequence[KroneckerCurvature]) -> float:
    """δ at which the Laplace marginal likelihood of these layers is largest, for one prior N(0, 1/δ) of all weights."""
    return Spectrum.together(map(Spectrum.of, curvatures)).prior_precision()


def log_marginal_likelihood(curvature: KroneckerCurvature, delta: float) -> float:
    """What a layer adds to the log marginal likelihood of its network, beside log p(data | ŵ), in nats."""
    return Spectrum.of(curvature).log_marginal_likelihood(delta)


def evidence_of_inputs(curvature: KroneckerCurvature, delta: float, sets: Tensor) -> Tensor:
    """ΔF of taking each of several sets of inputs away, alone: log q(W_S = 0) − log p(W_S = 0), in nats.

    −½ ŵ_SᵀΣ_SS⁻¹ŵ_S − ½ log det Σ_SS − ½ n log δ, Σ_SS the marginal covariance. The outputs are independent in the
    eigenvectors of G.

    Args:
        sets: inputs of each set. Shape: (sets, inputs of each).

    Returns:
        Shape: (sets,).
    """
    a, vectors = curvature.of_inputs
    assert vectors is not None
    found = torch.zeros(len(sets), dtype=torch.float64, device=a.device)
    for block, (values, weights) in enumerate(curvature.rotated):
        variances = 1 / (curvature.examples * values.unsqueeze(-1) * a[block] + delta)
        if sets.shape[1] == 1:
            own = variances @ vectors[block][sets[:, 0]].square().mT
            found -= 0.5 * (weights[:, sets[:, 0]].square() / own + (own * delta).log()).sum(0)
            continue
        part = vectors[block][sets]
        for variance, w in zip(variances, weights, strict=True):
            factor = torch.linalg.cholesky((part * variance) @ part.mT)
            z = torch.linalg.solve_triangular(factor, w[sets].unsqueeze(-1), upper=False).squeeze(-1)
            logs = factor.diagonal(dim1=-2, dim2=-1).log()
            found -= (0.5 * z.square() + logs + 0.5 * math.log(delta)).sum(-1)
    return found


def evidence_of_outputs(curvature: KroneckerCurvature, delta: float) -> Tensor:
    """ΔF of taking each output away, alone, where nothing reads it any more, in nats. Shape: (blocks, outputs).

    ½ log det(P/δ) + ½ δ ‖ŵ‖² for its weights, P their marginal precision: what an output pays for the weights that it
    brings.
    """
    (a, _), (g, rotation) = curvature.of_inputs, curvature.of_outputs
    if curvature.of_positions is not None:
        a = (curvature.of_positions[0].unsqueeze(-1) * a.unsqueeze(-2)).flatten(1)
    variance = rotation.square() @ (1 / (curvature.examples * g.unsqueeze(-1) * a.unsqueeze(-2) + delta))
    size = curvature.weights.square().flatten(2).sum(-1)
    return 0.5 * (delta * size - (variance * delta).log().sum(-1))


def eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not negative, and eigenvectors of a second moment."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0), vectors


def _values(moment: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(moment)
    return values.clamp(min=0)
