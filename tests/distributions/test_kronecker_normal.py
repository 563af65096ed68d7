"""The normal of a matrix with Kronecker-factored precision, against the same as one dense normal."""

import pyro.distributions as dist
import pytest
import torch

from pyro_bmrs.distributions.kronecker_normal import KroneckerNormal


def vectors(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def dense(law, row, column):
    """One multivariate normal for the flattened event, built from the definition."""
    blocks = law.precision.reshape(-1, *law.precision.shape[-2:])
    parts = []
    for number, own in enumerate(blocks):
        r = (
            torch.eye(own.shape[0], dtype=own.dtype)
            if row is None
            else row.reshape(-1, *row.shape[-2:])[number]
        )
        c = (
            torch.eye(own.shape[1], dtype=own.dtype)
            if column is None
            else column.reshape(-1, *column.shape[-2:])[number]
        )
        both = torch.kron(r.contiguous(), c.contiguous())
        parts.append(both @ own.flatten().diag() @ both.T)
    return dist.MultivariateNormal(law.loc.flatten(), precision_matrix=torch.block_diag(*parts))


def made(kind, event):
    torch.manual_seed(0)
    blocks = (2,) if kind == "blocks" else ()
    row = None if kind == "no rows" else vectors(*blocks, 3, 3)
    column = None if kind == "no columns" else vectors(*blocks, 4, 4)
    precision = torch.rand(*blocks, 3, 4, dtype=torch.float64) + 0.2
    loc = torch.randn(event, dtype=torch.float64)
    return KroneckerNormal(loc, row, column, precision), row, column


KINDS = [
    ("plain", (3, 4)),
    ("plain", (3, 2, 2)),
    ("no rows", (3, 4)),
    ("no columns", (3, 4)),
    ("blocks", (6, 2, 2)),
]


@pytest.mark.parametrize(("kind", "event"), KINDS)
def test_it_is_the_dense_normal(kind, event):
    law, row, column = made(kind, event)
    whole = dense(law, row, column)
    value = torch.randn(5, *event, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(value), whole.log_prob(value.flatten(1)))
    torch.testing.assert_close(law.entropy(), whole.entropy())
    torch.testing.assert_close(law.variance.flatten(), whole.variance)
    assert torch.equal(law.mean, law.loc)
    assert law.event_shape == event
    assert law.batch_shape == ()


@pytest.mark.parametrize(("kind", "event"), KINDS)
def test_draws_have_its_covariance(kind, event):
    """Each entry of 20,000 draws' covariance within 6 standard errors: false alarms below 1e-6."""
    law, row, column = made(kind, event)
    draws = 20_000
    sample = law.rsample((draws,)).flatten(1) - law.loc.flatten()
    covariance = dense(law, row, column).covariance_matrix
    scale = ((covariance.diagonal().outer(covariance.diagonal()) + covariance.square()) / draws).sqrt()
    assert ((sample.T @ sample / draws - covariance).abs() / scale).max() < 6


def test_it_expands_and_is_validated():
    law, *_ = made("plain", (3, 4))
    wide = law.expand([5])
    assert wide.rsample((2,)).shape == (2, 5, 3, 4)
    value = law.sample((5,))
    assert torch.equal(wide.log_prob(value), law.log_prob(value))
    assert wide.entropy().shape == (5,)
    assert wide.mean.shape == wide.variance.shape == (5, 3, 4)
    with pytest.raises(
        ValueError, match=r"precision must have an entry for each of loc: got \(2, 2\) and \(3, 4\)"
    ):
        KroneckerNormal(torch.zeros(3, 4), None, None, torch.ones(2, 2))
    checked = KroneckerNormal(law.loc, law.row_vectors, law.column_vectors, law.precision, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        checked.log_prob(torch.full((3, 4), torch.nan, dtype=torch.float64))


def test_gradients_reach_the_mean():
    loc = torch.zeros(3, 4, requires_grad=True)
    KroneckerNormal(loc, None, None, torch.ones(3, 4)).rsample().sum().backward()
    assert torch.equal(loc.grad, torch.ones(3, 4))
