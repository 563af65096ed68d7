"""The normal distribution of a matrix whose precision is a Kronecker product and a multiple of the identity."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class KroneckerNormal(TorchDistribution):  # type: ignore[misc]
    """vec(W) ~ Normal(vec(loc), (R ⊗ C + δ I)⁻¹), in the eigenvectors of R and C.

    With R = V diag(r) Vᵀ for the rows and C = U diag(c) Uᵀ for the columns, the entries of Vᵀ (W − loc) U are
    independent, with precisions r_i c_j + δ. This is the Laplace posterior of a layer's weights under
    Kronecker-factored curvature (Ritter, Botev, Barber, 2018), with the prior's precision δ kept exact.

    >>> V, U = torch.linalg.qr(torch.randn(2, 2))[0], torch.linalg.qr(torch.randn(3, 3))[0]
    >>> law = KroneckerNormal(torch.zeros(2, 3), V, U, torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 9.0]]))
    >>> law.sample((5,)).shape, law.event_shape
    (torch.Size([5, 2, 3]), torch.Size([2, 3]))

    Args:
        loc: mean. Shape: the event's, of rows × columns entries in all; with a leading dimension of several blocks, one
            law for each.
        row_vectors: V. Shape: (rows, rows), or (blocks, rows, rows); None for the identity.
        column_vectors: U. Shape: (columns, columns), or (blocks, columns, columns); None for the identity.
        precision: r_i c_j + δ, positive. Shape: (rows, columns), or (blocks, rows, columns).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 as torch has it
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        row_vectors: Tensor | None,
        column_vectors: Tensor | None,
        precision: Tensor,
        *,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008 immutable
        validate_args: bool | None = None,
    ) -> None:
        if loc.numel() != precision.numel():
            raise ValueError(
                f"precision must have an entry for each of loc: got {tuple(precision.shape)} and {tuple(loc.shape)}"
            )
        self.loc, self.precision = loc, precision
        self.row_vectors, self.column_vectors = row_vectors, column_vectors
        super().__init__(batch_shape, loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        dims = len(self.event_shape)
        return constraints.independent(constraints.real, dims)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> KroneckerNormal:
        return KroneckerNormal(
            self.loc, self.row_vectors, self.column_vectors, self.precision, batch_shape=torch.Size(batch_shape),
            validate_args=self._validate_args,
        )  # fmt: skip

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    mode = mean

    @property
    def variance(self) -> Tensor:
        own = self.precision.reciprocal()
        if self.row_vectors is not None:
            own = self.row_vectors.square() @ own
        if self.column_vectors is not None:
            own = own @ self.column_vectors.square().mT
        return own.reshape(self.event_shape).expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 immutable
        lead = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(lead + self.precision.shape, dtype=self.loc.dtype, device=self.loc.device)
        own = noise * self.precision.rsqrt()
        if self.row_vectors is not None:
            own = self.row_vectors @ own
        if self.column_vectors is not None:
            own = own @ self.column_vectors.mT
        return self.loc + own.reshape(lead + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = (
            value.expand(self.batch_shape + self.event_shape)
            if value.dim() < len(self._extended_shape())
            else value
        )
        lead = value.shape[: value.dim() - len(self.event_shape)]
        own = (value - self.loc).reshape(lead + self.precision.shape)
        if self.row_vectors is not None:
            own = self.row_vectors.mT @ own
        if self.column_vectors is not None:
            own = own @ self.column_vectors
        squares = (own.square() * self.precision).flatten(len(lead)).sum(-1)
        return 0.5 * (self._log_determinant() - self._constant() - squares)

    def entropy(self) -> Tensor:
        count = self.precision.numel()
        return (0.5 * (self._constant() + count - self._log_determinant())).expand(self.batch_shape)

    def _log_determinant(self) -> Tensor:
        """log det of the precision."""
        return self.precision.log().sum()

    def _constant(self) -> float:
        return self.precision.numel() * math.log(2 * math.pi)
