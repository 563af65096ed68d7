"""Evidence of parts of a layer: exact for a linear layer with normal noise, and against dense matrices."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_bmrs.evidence.kronecker import (
    KroneckerCurvature,
    Spectrum,
    evidence_of_inputs,
    evidence_of_outputs,
    log_marginal_likelihood,
    prior_precision,
)

F64 = torch.float64


def regression(inputs=10, outputs=2, examples=60, noise=0.7, delta=1.3):
    """A linear layer with known noise: (curvature, δ, log marginal likelihood of a subset of inputs)."""
    torch.manual_seed(1)
    x = torch.randn(examples, inputs, dtype=F64)
    y = x @ (0.3 * torch.randn(inputs, outputs, dtype=F64)) + noise * torch.randn(
        examples, outputs, dtype=F64
    )
    precision = x.T @ x / noise**2 + delta * torch.eye(inputs, dtype=F64)
    weights = torch.linalg.solve(precision, x.T @ y / noise**2).T
    curvature = KroneckerCurvature(
        (x.T @ x / examples)[None], (torch.eye(outputs, dtype=F64) / noise**2)[None], weights[None], examples
    )

    def log_marginal(kept):
        covariance = noise**2 * torch.eye(examples, dtype=F64) + x[:, kept] @ x[:, kept].T / delta
        law = torch.distributions.MultivariateNormal(torch.zeros(examples, dtype=F64), covariance)
        return float(law.log_prob(y.T).sum())

    return curvature, delta, log_marginal, x, y


def test_all_subsets_of_ten_inputs_have_the_exact_change_of_evidence():
    curvature, delta, log_marginal, *_ = regression()
    full = log_marginal(torch.ones(10, dtype=torch.bool))
    worst = 0.0
    for size in range(1, 10):
        sets = torch.tensor([*itertools.combinations(range(10), size)])
        for chosen, found in zip(sets, evidence_of_inputs(curvature, delta, sets), strict=True):
            kept = torch.ones(10, dtype=torch.bool).index_fill(0, chosen, False)
            worst = max(worst, abs(float(found) - (log_marginal(kept) - full)))
    assert worst < 1e-9


def test_a_bias_of_flat_prior_is_integrated_out():
    """Inputs far from 0, one of them constant. Exact: contrasts, of which the intercept is no part."""
    examples, noise, delta = 60, 0.7, 1.3
    torch.manual_seed(1)
    x = torch.randn(examples, 6, dtype=F64) + 3.0
    x[:, 2] = -4.0
    y = x @ torch.randn(6, 2, dtype=F64) + 5.0 + noise * torch.randn(examples, 2, dtype=F64)
    contrasts = torch.linalg.svd(torch.ones(1, examples, dtype=F64)).Vh[1:]

    def log_marginal(kept):
        own = contrasts @ x[:, kept]
        covariance = noise**2 * torch.eye(examples - 1, dtype=F64) + own @ own.T / delta
        law = torch.distributions.MultivariateNormal(torch.zeros(examples - 1, dtype=F64), covariance)
        return float(law.log_prob((contrasts @ y).T).sum())

    mean = x.mean(0)
    centred = x - mean
    precision = centred.T @ centred / noise**2 + delta * torch.eye(6, dtype=F64)
    weights = torch.linalg.solve(precision, centred.T @ (y - y.mean(0)) / noise**2).T
    curvature = KroneckerCurvature(
        (centred.T @ centred / examples)[None], (torch.eye(2, dtype=F64) / noise**2)[None], weights[None], examples,
        mean=mean[None],
    )  # fmt: skip
    full = log_marginal(torch.ones(6, dtype=torch.bool))
    for size in range(1, 6):
        sets = torch.tensor([*itertools.combinations(range(6), size)])
        for chosen, found in zip(sets, evidence_of_inputs(curvature, delta, sets), strict=True):
            kept = torch.ones(6, dtype=torch.bool).index_fill(0, chosen, False)
            assert float(found) == pytest.approx(log_marginal(kept) - full, abs=1e-9)
    # a constant says nothing
    assert abs(float(evidence_of_inputs(curvature, delta, torch.tensor([[2]])))) < 1e-9


def dense(curvature, delta):
    """(precision matrix, mean) of all weights of a single block, outputs first."""
    a = curvature.inputs[0] if curvature.inputs.dim() == 3 else curvature.inputs[0].diag()
    if curvature.positions is not None:
        a = torch.kron(curvature.positions[0], a)
    whole = curvature.examples * torch.kron(curvature.gradients[0], a)
    return whole + delta * torch.eye(len(whole), dtype=F64), curvature.weights.flatten()


def random_curvature(outputs, inputs, positions=None, diagonal=False, seed=0):
    torch.manual_seed(seed)

    def moment(size):
        root = torch.randn(size, size + 2, dtype=F64)
        return (root @ root.T / size)[None]

    shape = (1, outputs, inputs) if positions is None else (1, outputs, positions, inputs)
    a = moment(inputs).diagonal(dim1=1, dim2=2) if diagonal else moment(inputs)
    return KroneckerCurvature(
        a,
        moment(outputs),
        0.3 * torch.randn(shape, dtype=F64),
        7,
        None if positions is None else moment(positions),
    )


def by_hand(curvature, delta, inputs, outputs):
    """ΔF of dropping outputs nothing reads and then reducing inputs to 0, from dense matrices."""
    precision, mean = dense(curvature, delta)
    rows = torch.zeros(curvature.weights.shape[1:], dtype=torch.bool)
    rows[outputs[0]] = True
    columns = torch.zeros_like(rows)
    columns[..., inputs] = True
    gone, rest = rows.flatten(), ~rows.flatten()
    found = 0.5 * delta * mean[gone].square().sum() - 0.5 * int(gone.sum()) * math.log(delta)
    found += 0.5 * (torch.logdet(precision) - torch.logdet(precision[rest][:, rest]))
    zero = columns.flatten()[rest]
    if bool(zero.any()):
        covariance = torch.linalg.inv(precision[rest][:, rest])[zero][:, zero]
        own = mean[rest][zero]
        found -= 0.5 * own @ torch.linalg.solve(covariance, own) + 0.5 * torch.logdet(covariance)
        found -= 0.5 * int(zero.sum()) * math.log(delta)
    return float(found)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(3, 4, None), (2, 3, 4), (4, 2, None), (3, 6, 3)]), st.integers(1, 2), st.integers(0, 2**32 - 1),
    st.floats(0.01, 30.0),
)  # fmt: skip
def test_each_alone_is_that_of_dense_matrices(shape, size, seed, delta):
    curvature = random_curvature(*shape, seed=seed % 1000)
    inputs, outputs = torch.zeros(shape[1], dtype=torch.bool), torch.zeros(1, shape[0], dtype=torch.bool)
    sets = torch.tensor([*itertools.combinations(range(shape[1]), size)])
    for one, own in zip(evidence_of_inputs(curvature, delta, sets), sets, strict=True):
        expected = by_hand(curvature, delta, inputs.index_fill(0, own, True), outputs)
        assert float(one) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    for number, one in enumerate(evidence_of_outputs(curvature, delta)[0]):
        expected = by_hand(curvature, delta, inputs, torch.arange(shape[0])[None] == number)
        assert float(one) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_blocks_add_up():
    several = [random_curvature(3, 4, seed=1), random_curvature(3, 4, seed=2)]
    both = KroneckerCurvature(
        *(torch.cat([getattr(c, name) for c in several]) for name in ("inputs", "gradients", "weights")), 7
    )
    sets = torch.tensor([[0, 3], [1, 2]])
    parts = [evidence_of_inputs(c, 0.5, sets) for c in several]
    torch.testing.assert_close(evidence_of_inputs(both, 0.5, sets), sum(parts))
    parts = [evidence_of_outputs(c, 0.5) for c in several]
    torch.testing.assert_close(evidence_of_outputs(both, 0.5), torch.cat(parts))
    parts = [log_marginal_likelihood(c, 0.5) for c in several]
    assert log_marginal_likelihood(both, 0.5) == pytest.approx(sum(parts), rel=1e-10)


def test_what_a_smaller_layer_is_worth_is_that_of_dense_matrices():
    """−½ δ ‖w‖² + ½ n log δ − ½ log det P, of the rows and columns that are left, at the best δ of a grid."""
    curvature = random_curvature(3, 5)
    weights = torch.randn(1, 3, 5, dtype=F64)
    inputs, outputs = torch.tensor([True, False, True, False, False]), torch.tensor([[False, True, False]])
    a, g = curvature.inputs[0][~inputs][:, ~inputs], curvature.gradients[0][~outputs[0]][:, ~outputs[0]]
    own = weights[0][~outputs[0]][:, ~inputs]

    def dense(delta):
        precision = 7 * torch.kron(g, a) + delta * torch.eye(6, dtype=F64)
        return 0.5 * float(6 * math.log(delta) - delta * own.square().sum() - torch.logdet(precision))

    left = Spectrum.without(curvature, weights, inputs, outputs)
    assert left.log_marginal_likelihood(0.8) == pytest.approx(dense(0.8), rel=1e-10)
    best = max(dense(math.exp(step / 50)) for step in range(-500, 500))
    assert best - 1e-9 <= left.log_marginal_likelihood(left.prior_precision()) <= best + 1e-3
    # without any output nothing is left, and nothing is worth nothing
    none = Spectrum.without(curvature, weights, inputs, torch.ones_like(outputs))
    assert none.log_marginal_likelihood(none.prior_precision()) == 0


@given(seed=st.integers(0, 10_000), scale=st.floats(-6, 20), count=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_delta_is_a_fixed_point_whatever_the_scales(seed, scale, count):
    """δ ‖w‖² = Σ λ / (λ + δ), MacKay's condition."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = 10**scale * torch.rand(count, generator=generator, dtype=F64).square()
    spectrum = Spectrum(eigenvalues, 10 ** float(4 * torch.rand((), generator=generator) - 2))
    delta = spectrum.prior_precision()
    known = float((eigenvalues / (eigenvalues + delta)).sum())
    assert delta * spectrum.size == pytest.approx(known, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_delta_has_the_largest_marginal_likelihood(shared):
    curvatures = [random_curvature(5, 6, seed=number) for number in range(1 + shared)]
    delta = prior_precision(curvatures)

    def at(value):
        return sum(log_marginal_likelihood(one, value) for one in curvatures)

    grid = delta * torch.logspace(-3, 3, 301, dtype=F64)
    values = torch.tensor([at(float(value)) for value in grid], dtype=F64)
    assert int(values.argmax()) == 150
    assert at(delta * 1.001) < at(delta) > at(delta / 1.001)


def test_delta_of_a_layer_without_curvature_is_finite():
    nothing = KroneckerCurvature(
        torch.zeros(1, 2, 2, dtype=F64), torch.eye(2, dtype=F64)[None], torch.ones(1, 2, 2, dtype=F64), 5
    )
    assert 0 < prior_precision([nothing]) < 1
