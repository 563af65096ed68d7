"""What a layer of a trained network loses without some of its inputs, as inputs are removed set by set."""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
from torch import Tensor

from pyro_bmrs.evidence.kronecker import KroneckerCurvature

# The share of the mean of A's diagonal that is added to it, so that it has an inverse.
RIDGE = 1e-3
# Matrices get smaller when fewer than this share of their inputs is left.
_DENSE = 0.75
# Outputs of a layer have at most so many different curvatures where evidence is taken anew at each step.
_LEVELS = 8


class LayerState:
    """Inverses of matrices over a layer's inputs, and moments of its weights, as inputs are removed set by set.

    Without inputs S the others take over what they can (Optimal Brain Surgeon, for a block):
    W ← W − W_S (P⁻¹_SS)⁻¹ P⁻¹_S·, where P is any of the matrices.

    Args:
        inverse: P⁻¹. Shape: (matrices, inputs, inputs).
        curved: Σ w wᵀ over the outputs that belong to it. Shape: that of `inverse`.
    """

    def __init__(self, inverse: Tensor, curved: Tensor) -> None:
        self.inverse, self.curved = inverse, curved
        # which inputs stay, and where each of them stands in the matrices, which get smaller now and then
        self.left = torch.ones(inverse.shape[-1], dtype=torch.bool, device=inverse.device)
        self.place = torch.arange(inverse.shape[-1], device=inverse.device)

    def of_sets(self, sets: Tensor) -> Tensor:
        """What each of these sets of inputs costs, alone. Shape: (sets,)."""
        raise NotImplementedError

    def quadratic(self, sets: Tensor) -> tuple[Tensor, Tensor]:
        """tr (P⁻¹_SS)⁻¹ (Σ w wᵀ)_SS and log det P⁻¹_SS. Shapes: (matrices, sets)."""
        sets = self.place[sets]
        if sets.shape[1] == 1:
            curved, inverse = (
                some.diagonal(dim1=-2, dim2=-1)[:, sets[:, 0]] for some in (self.curved, self.inverse)
            )
            return curved / inverse, inverse.log()
        curved, inverse = (
            some[:, sets.unsqueeze(-1), sets.unsqueeze(-2)] for some in (self.curved, self.inverse)
        )
        solved: Tensor = torch.linalg.solve(inverse, curved)
        return solved.diagonal(dim1=-2, dim2=-1).sum(-1), torch.linalg.slogdet(inverse).logabsdet

    def part(self, inputs: Tensor) -> Self:
        """The same for these inputs alone, numbered from 0: what removals among them cost needs no others."""
        part, places = copy.copy(self), self.place[inputs]
        part.inverse, part.curved = (some[:, places][:, :, places] for some in (self.inverse, self.curved))
        part.left = torch.ones_like(inputs, dtype=torch.bool)
        part.place = torch.arange(len(inputs), device=inputs.device)
        return part

    def remove_inputs(self, inputs: Tensor) -> None:
        """Set the weights of these inputs to 0; the others take over."""
        self.left[inputs] = False
        inputs = self.place[inputs]
        rest = torch.linalg.solve(self.inverse[:, inputs][:, :, inputs], self.inverse[:, inputs])
        # W loses W_S rest
        mixed = self.curved[:, :, inputs] @ rest
        own = rest.mT @ mixed[:, inputs]
        self.curved += own - mixed - mixed.mT
        self.inverse -= self.inverse[:, :, inputs] @ rest
        for tensor in (self.curved, self.inverse):
            tensor[:, inputs] = 0
            tensor[:, :, inputs] = 0
        self.inverse[:, inputs, inputs] = 1  # so that it can still be inverted there
        stays = torch.nonzero(self.left).flatten()
        if 0 < len(stays) < _DENSE * self.inverse.shape[-1]:
            places = self.place[stays]
            self.curved = self.curved[:, places][:, :, places].contiguous()
            self.inverse = self.inverse[:, places][:, :, places].contiguous()
            self.place = torch.zeros_like(self.place).index_copy(
                0, stays, torch.arange(len(stays), device=stays.device)
            )


class LayerLoss(LayerState):
    """What the loss rises by, to second order: ½ N tr(G W_S (A⁻¹_SS)⁻¹ W_Sᵀ) over the data set, in nats.

    What inputs cost outputs that leave too is not taken back: the sum over layers comes nearer to what is measured.
    """

    def __init__(self, curvature: KroneckerCurvature) -> None:
        curved = [
            curvature.examples * (weights.mT * values) @ weights for values, weights in curvature.rotated
        ]
        super().__init__(torch.linalg.inv(_with_ridge(curvature.inputs)), torch.stack(curved))

    def of_sets(self, sets: Tensor) -> Tensor:
        return 0.5 * self.quadratic(sets)[0].sum(0)


class LayerEvidence(LayerState):
    """Minus the outgoing part of ΔF: ½ ŵ_SᵀΣ_SS⁻¹ŵ_S + ½ log det Σ_SS + ½ n log δ, given what is away, in nats.

    Outputs of about the same curvature, in the eigenvectors of G, share one matrix N g A + δ I.
    """

    def __init__(self, curvature: KroneckerCurvature, delta: float) -> None:
        self.delta = delta
        inverses, curved, counts = [], [], []
        for block, (values, weights) in enumerate(curvature.rotated):
            a = curvature.inputs[block]
            eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            for level, rows in _levels(values):
                inverses.append(torch.linalg.inv(curvature.examples * level * a + delta * eye))
                curved.append(weights[rows].mT @ weights[rows])
                counts.append(len(rows))
        super().__init__(torch.stack(inverses), torch.stack(curved))
        self.counts = torch.tensor(counts, dtype=torch.float64, device=curvature.inputs.device).unsqueeze(-1)

    def of_sets(self, sets: Tensor) -> Tensor:
        squares, logs = self.quadratic(sets)
        return 0.5 * (squares + self.counts * (logs + sets.shape[1] * math.log(self.delta))).sum(0)


def _levels(values: Tensor) -> list[tuple[float, Tensor]]:
    """A few values that stand for all: (geometric mean, which are near it)."""
    logs = values.clamp(min=float(values.max()) * 1e-9 + 1e-300).log()
    place = (
        ((logs - logs.min()) / ((logs.max() - logs.min()) / _LEVELS + 1e-12)).long().clamp(max=_LEVELS - 1)
    )
    rows = (torch.nonzero(place == level).flatten() for level in range(_LEVELS))
    return [(float(logs[some].mean().exp()), some) for some in rows if len(some)]


def _with_ridge(a: Tensor) -> Tensor:
    """A with a small multiple of the identity: an input that is always 0 would leave no inverse."""
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
    return a + RIDGE * scale * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def reduced_weights(curvature: KroneckerCurvature, inputs: Tensor) -> Tensor:
    """The weights of a layer when these inputs are away: the others take over what they can.

    W_T̄ + W_T A_TT̄ A_T̄T̄⁻¹, with the same small ridge as the order's.

    Args:
        inputs: which are away. Shape: (inputs,), bool.

    Returns:
        Shape: that of the curvature's weights, 0 for those.
    """
    if not bool(inputs.any()):
        return curvature.weights
    stays = ~inputs
    own = _with_ridge(curvature.inputs)[:, stays][:, :, stays]
    shared = curvature.inputs[:, inputs][:, :, stays]
    before = curvature.weights.flatten(1, -2)
    weights = torch.zeros_like(before)
    moved = torch.linalg.solve(own, (before[:, :, inputs] @ shared).mT).mT
    weights[:, :, stays] = before[:, :, stays] + moved
    return weights.view(curvature.weights.shape)
