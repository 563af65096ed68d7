"""What a layer of a trained network loses without some of its inputs, as inputs are removed set by set."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from pyro_bmrs.evidence.kronecker import KroneckerCurvature, as_it_is

# The share of the mean of A's diagonal that is added to it, so that it has an inverse.
RIDGE = 1e-3
# Matrices are brought up to date when so many inputs have been removed since.
_PENDING = 64
# Outputs of a layer have at most so many different curvatures where evidence is taken anew at each step.
_LEVELS = 8


class LayerState:
    """Inverses of matrices over a layer's inputs, and moments of its weights, as inputs are removed set by set.

    Without inputs S the others take over what they can (Optimal Brain Surgeon, for a block):
    W ← W − W_S (P⁻¹_SS)⁻¹ P⁻¹_S·, where P is any of the matrices. With P⁻¹_SS = L Lᵀ and F = P⁻¹_·S L⁻ᵀ,
    P⁻¹ loses F Fᵀ, and C = Σ w wᵀ loses U Fᵀ + F Uᵀ, U = C_·S L⁻ᵀ − ½ F (L⁻¹ C_SS L⁻ᵀ). The factors of several
    removals are kept beside the matrices, which are far larger, until there are many.

    Args:
        inverse: P⁻¹. Shape: (matrices, inputs, inputs).
        curved: Σ w wᵀ over the outputs that belong to it. Shape: that of `inverse`.
        keep: what is done with these matrices, see `KroneckerCurvature`.
    """

    def __init__(self, inverse: Tensor, curved: Tensor, keep: Callable[[Tensor], Tensor] = as_it_is) -> None:
        self._keep = keep
        self._set(keep(inverse), keep(curved))
        # which inputs stay, and where each of them stands in the matrices, which get smaller now and then
        self.left = torch.ones(inverse.shape[-1], dtype=torch.bool, device=inverse.device)
        self.place = torch.arange(inverse.shape[-1], device=inverse.device)

    def _set(self, inverse: Tensor, curved: Tensor) -> None:
        self._inverse, self._curved = inverse, curved
        self._f = self._u = inverse.new_empty(*inverse.shape[:2], 0)

    def of_sets(self, sets: Tensor) -> Tensor:
        """What each of these sets of inputs costs, alone. Shape: (sets,)."""
        raise NotImplementedError

    def quadratic(self, sets: Tensor) -> tuple[Tensor, Tensor]:
        """tr (P⁻¹_SS)⁻¹ (Σ w wᵀ)_SS and log det P⁻¹_SS. Shapes: (matrices, sets)."""
        sets = self.place[sets]
        if sets.shape[1] == 1:
            here = sets[:, 0]
            f, u = self._f[:, here], self._u[:, here]
            curved = self._curved[:, here, here] - 2 * (u * f).sum(-1)
            inverse = self._inverse[:, here, here] - f.square().sum(-1)
            return curved / inverse, inverse.log()
        curved, inverse = self._blocks(sets)
        solved: Tensor = torch.linalg.solve(inverse, curved)
        return solved.diagonal(dim1=-2, dim2=-1).sum(-1), torch.linalg.slogdet(inverse).logabsdet

    def _blocks(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """C and P⁻¹ at some places, (…, of each). Shapes: (matrices, …, of each, of each)."""
        f, u = self._f[:, places], self._u[:, places]
        rows, columns, mixed = places.unsqueeze(-1), places.unsqueeze(-2), u @ f.mT
        return self._curved[:, rows, columns] - mixed - mixed.mT, self._inverse[:, rows, columns] - f @ f.mT

    def part(self, inputs: Tensor) -> Self:
        """The same for these inputs alone, numbered from 0: what removals among them cost needs no others."""
        part = copy.copy(self)
        curved, inverse = self._blocks(self.place[inputs])
        part._set(inverse, curved)
        part.left = torch.ones_like(inputs, dtype=torch.bool)
        part.place = torch.arange(len(inputs), device=inputs.device)
        return part

    def remove_inputs(self, inputs: Tensor) -> None:
        """Set the weights of these inputs to 0; the others take over."""
        self.left[inputs] = False
        places, f, u = self.place[inputs], self._f, self._u
        inverse = self._inverse[:, places] - f[:, places] @ f.mT
        curved = self._curved[:, places] - u[:, places] @ f.mT - f[:, places] @ u.mT
        root = torch.linalg.cholesky(inverse[:, :, places])
        new, curved = (torch.linalg.solve_triangular(root, rows, upper=False) for rows in (inverse, curved))
        both = torch.linalg.solve_triangular(root.mT, curved[:, :, places], upper=True, left=False)
        self._f = torch.cat([f, new.mT], -1)
        self._u = torch.cat([u, curved.mT - 0.5 * new.mT @ both], -1)
        if self._f.shape[-1] >= _PENDING and bool(self.left.any()):
            self._catch_up()

    def _catch_up(self) -> None:
        """Bring the matrices to what they are now, of the inputs that are left."""
        stays = torch.nonzero(self.left).flatten()
        places = self.place[stays]
        f, u = self._f[:, places], self._u[:, places]
        # one after the other: each may be large
        self._inverse = self._keep(self._inverse[:, places[:, None], places].baddbmm_(f, f.mT, alpha=-1))
        curved = self._curved[:, places[:, None], places].baddbmm_(u, f.mT, alpha=-1)
        self._set(self._inverse, self._keep(curved.baddbmm_(f, u.mT, alpha=-1)))
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
        inverse = torch.linalg.inv(_with_ridge(curvature.inputs))
        super().__init__(inverse, torch.stack(curved), curvature.keep)

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
        super().__init__(torch.stack(inverses), torch.stack(curved), curvature.keep)
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
