"""loc in [-40, 20], scale in [e⁻²⁰, e⁵], both dtypes: all finite, samples inside, right at random points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import Law, numeric_gradient
from torch.distributions import kl_divergence

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal

LOCS = (-40.0, 20.0)
LOG_SCALES = (-20.0, 5.0)
LOW, HIGH = -20.0, 0.0
DTYPES = [torch.float32, torch.float64]
OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}

# a batch of points an example; the edges of the box and of the support drawn often, shrunk to one point
LOC = st.one_of(
    st.floats(*LOCS), st.sampled_from([-40.0, -20.0, 0.0, 20.0, math.nextafter(-20.0, 0.0), -1e-9])
)
LOG_SCALE = st.one_of(st.floats(*LOG_SCALES), st.sampled_from([-20.0, -10.0, 0.0, 5.0]))
POINTS = st.lists(st.tuples(LOC, LOG_SCALE), min_size=1, max_size=24)
SEED = st.integers(0, 2**31 - 1)
CORNERS = [(loc, log_scale) for loc in (-40.0, -20.0, -10.0, 0.0, 20.0) for log_scale in (*LOG_SCALES, -8.0)]
# probabilities that `rand` gives in float32 (0, and down to 2⁻²⁴) and float64 (2⁻⁵³)
EXTREME = [0.0, 2.0**-53, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-53, 1.0]
BOX = settings(max_examples=40, deadline=None)


def leaves(points, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    loc, log_scale = torch.tensor(points, dtype=torch.float64).unbind(-1)
    return loc.to(dtype).requires_grad_(), log_scale.exp().to(dtype).requires_grad_()


def log_normal(points, dtype, **options) -> TruncatedLogNormal:
    return TruncatedLogNormal(*leaves(points, dtype), validate_args=True, **options)


def assert_finite(name: str, value: torch.Tensor, *inputs: torch.Tensor) -> None:
    """The value, and the gradient of each of its elements (no two share a parameter but along dim 0)."""
    assert bool(torch.isfinite(value).all()), f"{name}: {value}"
    for row in value.unbind(0) if value.ndim > 1 else (value,):
        for gradient in torch.autograd.grad(row.sum(), inputs, retain_graph=True):
            assert bool(torch.isfinite(gradient).all()), f"gradient of {name}: {gradient} at {inputs}"


def assert_inside(q: TruncatedLogNormal, theta: torch.Tensor) -> None:
    # the ends as the distribution's own dtype has them, without the slack of `support`
    low, high = q.log_low.exp(), q.log_high.exp()
    assert bool(((theta >= low) & (theta <= high)).all()), theta
    assert bool(q.support.check(theta).all())


@pytest.mark.parametrize("dtype", DTYPES)
@BOX
@given(points=POINTS, seed=SEED)
@example(points=CORNERS, seed=0)
def test_samples_and_their_log_prob(dtype, points, seed):
    torch.manual_seed(seed)
    q = log_normal(points, dtype)
    parameters = q.loc, q.scale
    theta = q.rsample((3,))
    assert theta.dtype == dtype
    assert_inside(q, theta)
    assert_finite("rsample", theta, *parameters)
    assert_finite("log_prob of a fixed sample", q.log_prob(theta.detach()), *parameters)
    assert_finite("log_prob along the sample", q.log_prob(theta), *parameters)

    x = q.base_dist.rsample((3,))
    assert bool(((x >= LOW) & (x <= HIGH)).all())
    assert_finite("rsample of log θ", x, *parameters)
    assert_finite("log_prob of log θ", q.base_dist.log_prob(x.detach()), *parameters)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@BOX
@given(points=POINTS, seed=SEED)
@example(points=CORNERS, seed=0)
def test_log_prob_of_own_samples_in_the_other_dtype(dtype, points, seed):
    torch.manual_seed(seed)
    q = log_normal(points, dtype)
    twin = log_normal(points, OTHER[dtype])
    # beside random draws, both ends
    draws = torch.cat([q.rsample((2,)), q.icdf(torch.tensor([[0.0], [1.0]], dtype=dtype))]).detach()
    logs = torch.cat([q.base_dist.rsample((2,)), q.log_low.expand(1, -1), q.log_high.expand(1, -1)]).detach()
    for name, law, values in (("θ", lambda d: d, draws), ("log θ", lambda d: d.base_dist, logs)):
        there = values.to(OTHER[dtype])
        back = there.to(dtype)
        assert_finite(f"{name}, converted", law(q).log_prob(there), q.loc, q.scale)
        assert_finite(f"{name}, there and back", law(q).log_prob(back), q.loc, q.scale)
        assert_finite(f"{name}, under the twin", law(twin).log_prob(values), twin.loc, twin.scale)
        assert_finite(f"{name}, converted, under the twin", law(twin).log_prob(there), twin.loc, twin.scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@BOX
@given(points=POINTS)
@example(points=CORNERS)
def test_divergence_and_moments(dtype, points):
    q = log_normal(points, dtype)
    parameters = q.loc, q.scale
    for name, value in (
        ("KL", kl_divergence(q, LogUniform(q.log_low.detach(), q.log_high.detach()))),
        ("mean", q.mean),
        ("log mean", q.log_mean()),
        ("entropy", q.entropy()),
        ("mean of log θ", q.base_dist.mean),
        ("entropy of log θ", q.base_dist.entropy()),
    ):
        assert value.dtype == dtype
        assert_finite(name, value, *parameters)
    assert bool(q.support.check(q.mean).all())
    assert bool((kl_divergence(q, LogUniform(q.log_low, q.log_high)) >= -1e-6).all())
    # float32 cannot hold the variance of the tightest laws, 1e-58
    variance = q.variance
    assert bool((torch.isfinite(variance) & (variance >= 0)).all())
    if dtype == torch.float64:
        assert_finite("variance", variance, *parameters)
        assert bool((variance > 0).all())
        assert_finite("snr", q.snr, *parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@BOX
@given(points=POINTS)
@example(points=CORNERS)
def test_extreme_probabilities(dtype, points):
    """u = 0 and u = 1 give the ends themselves, which no parameter moves."""
    q = log_normal(points, dtype)
    u = torch.tensor(EXTREME, dtype=dtype).unsqueeze(-1).expand(-1, len(points))
    theta, x = q.icdf(u), q.base_dist.icdf(u)
    assert_inside(q, theta)
    assert_finite("quantile", theta, q.loc, q.scale)
    assert_finite("quantile of log θ", x, q.loc, q.scale)
    assert torch.equal(x[0], q.log_low)
    assert torch.equal(x[-1], q.log_high)
    assert torch.equal(theta[0], q.log_low.exp())
    assert torch.equal(theta[-1], q.log_high.exp())
    assert bool((x.diff(dim=0) >= 0).all())
    for end in (0, -1):
        for gradient in torch.autograd.grad(x[end].sum(), (q.loc, q.scale), retain_graph=True):
            assert bool((gradient == 0).all()), gradient


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_from_the_generator_is_a_draw_like_its_neighbours(monkeypatch, dtype):
    """`rand` rounds down: its 0 stands for all u below 2⁻²⁴, and must not land on a bound 20 nats away."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, **options))
    q = log_normal([*CORNERS, (2.5, -1.0)], dtype)
    theta = q.rsample()
    assert_inside(q, theta)
    assert_finite("rsample at u = 0", theta, q.loc, q.scale)
    assert_finite("log_prob at u = 0", q.log_prob(theta), q.loc, q.scale)
    rounding = 0.5 * torch.finfo(dtype).eps
    truth = float(Law(2.5, math.exp(-1.0)).quantile(rounding))
    assert math.log(theta[-1].item()) == pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@BOX
@given(points=POINTS, seed=SEED)
@example(points=CORNERS, seed=0)
def test_log_prob_outside_the_support(dtype, points, seed):
    checked = log_normal(points, dtype)
    unchecked = TruncatedLogNormal(checked.loc, checked.scale, validate_args=False)
    prior, unchecked_prior = (LogUniform(LOW, HIGH, validate_args=check) for check in (True, False))
    generator = np.random.default_rng(seed)
    # one float32 rounding of log θ = -20 is documented to count as inside: up to 2⁻²² · 20 = 4.8e-6
    beyond = float(10 ** generator.uniform(-5, 1))
    logs = [LOW - beyond, HIGH + beyond]
    thetas = [*map(math.exp, logs), 0.0, -1.0, math.inf]
    for q, unchecked_q, values in (
        (checked, unchecked, thetas),
        (checked.base_dist, unchecked.base_dist, [*logs, -math.inf, math.inf]),
        (prior, unchecked_prior, thetas),
    ):
        for value in torch.tensor(values, dtype=dtype):
            log_prob = unchecked_q.log_prob(value)
            assert bool((log_prob == -math.inf).all()), (q, value, log_prob)
            if log_prob.requires_grad:
                for gradient in torch.autograd.grad(log_prob.sum(), (checked.loc, checked.scale)):
                    assert bool(torch.isfinite(gradient).all())
            with pytest.raises(ValueError, match="support"):
                q.log_prob(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bounds", [(-15.9423851528787, -2.7725887222397), (-0.1, 0.3), (5.0, 45.0), (-85.0, -70.0)]
)
def test_other_bounds(dtype, bounds):
    """The same finiteness where neither bound, nor its exponential, is a float32."""
    torch.manual_seed(0)
    q = log_normal(CORNERS, dtype, log_low=bounds[0], log_high=bounds[1])
    twin = log_normal(CORNERS, OTHER[dtype], log_low=bounds[0], log_high=bounds[1])
    ends = torch.tensor([[0.0], [1.0]], dtype=dtype)
    theta = torch.cat([q.rsample((20,)), q.icdf(ends)])
    assert bool(q.support.check(theta).all())
    assert bool(twin.support.check(theta.to(OTHER[dtype])).all())
    assert_finite("rsample", theta, q.loc, q.scale)
    for law in (q, twin):
        for values in (theta.detach(), theta.detach().to(OTHER[dtype])):
            assert_finite("log_prob", law.log_prob(values), law.loc, law.scale)
    assert_finite("KL", kl_divergence(q, LogUniform(q.log_low, q.log_high)), q.loc, q.scale)
    assert_finite("log mean", q.log_mean(), q.loc, q.scale)


# --- random points against the reference -------------------------------------------------------------

NEAR_EDGES = 30
EVERYWHERE = 30


def random_points() -> tuple[torch.Tensor, ...]:
    """30 points over the whole box, and 30 within twelve scales of an edge, where the forms change."""
    generator = np.random.default_rng(20261122)
    scale = np.exp(generator.uniform(*LOG_SCALES, EVERYWHERE + NEAR_EDGES))
    loc = generator.uniform(*LOCS, EVERYWHERE + NEAR_EDGES)
    offset = generator.uniform(-12, 12, NEAR_EDGES) * scale[EVERYWHERE:]
    loc[EVERYWHERE:] = np.where(np.arange(NEAR_EDGES) % 2, LOW + offset, HIGH + offset).clip(*LOCS)
    u = generator.uniform(size=EVERYWHERE + NEAR_EDGES)
    return torch.tensor(loc, requires_grad=True), torch.tensor(scale, requires_grad=True), torch.tensor(u)


LOC_60, SCALE_60, U_60 = random_points()


def as_tensor(values) -> torch.Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def worst_at(error: torch.Tensor) -> str:
    worst = int(torch.where(torch.isnan(error), torch.inf, error).argmax())
    return (
        f"off by {float(error[worst]):.3g} at loc={float(LOC_60.detach()[worst])!r}, "
        f"scale={float(SCALE_60.detach()[worst])!r}, u={float(U_60[worst])!r}"
    )


def check(value, reference, *, tolerance: float, slope_tolerance: float, relative=False):
    """Values within `tolerance` (relative, or absolute below 1); gradients within `slope_tolerance`.

    Gradients are held to a relative bound, down to 1e-9 of that point's larger one.
    """
    points = list(zip(LOC_60.tolist(), SCALE_60.tolist(), strict=True))
    truth = as_tensor(f(Law(*point)) for f, point in zip(reference, points, strict=True))
    error = (value.detach() - truth).abs() / (truth.abs() if relative else truth.abs().clamp(min=1.0))
    assert bool((error <= tolerance).all()), worst_at(error)

    found = torch.autograd.grad(value.sum(), (LOC_60, SCALE_60), retain_graph=True)
    pairs = [numeric_gradient(f, *point) for f, point in zip(reference, points, strict=True)]
    slopes = [as_tensor(pair[i] for pair in pairs) for i in (0, 1)]
    floor = 1e-9 * torch.maximum(*(slope.abs() for slope in slopes))
    for gradient, slope in zip(found, slopes, strict=True):
        bound = (slope_tolerance * torch.maximum(slope.abs(), floor)).clamp(min=1e-280)  # exp underflows
        error = (gradient - slope).abs() / bound
        assert bool((error <= 1).all()), worst_at(error)


def same(method) -> list:
    return [method] * len(LOC_60)


def distribution() -> TruncatedLogNormal:
    return TruncatedLogNormal(LOC_60, SCALE_60)


def test_random_points_divergence():
    """Measured: 1e-14; gradients 4e-10 (at the flattest point, where they vanish)."""
    prior = LogUniform(torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64))
    kl = kl_divergence(distribution(), prior)
    check(kl, same(Law.kl_uniform), tolerance=1e-12, slope_tolerance=1e-8)


def test_random_points_log_mass():
    check(distribution().base_dist.log_mass(), same(Law.log_z), tolerance=1e-12, slope_tolerance=1e-10)


def test_random_points_log_mean():
    """Measured: 3e-15; gradients 1.2e-8 (two cumulants where the law is narrow)."""
    check(distribution().log_mean(), same(Law.log_mean), tolerance=1e-13, slope_tolerance=1e-7)


def test_the_gradient_of_the_mean_survives_a_far_narrow_posterior():
    """∂ log E[θ]/∂loc is 7e-18 here; autograd through the anchored form gave -2, the rounding of 10¹⁶."""
    loc = torch.tensor([8.11283, -33.67, 1.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.2e-8, 3.03e-8, 1e-4], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(TruncatedLogNormal(loc, scale).log_mean().sum(), (loc, scale))
    pairs = [numeric_gradient(Law.log_mean, *p) for p in zip(loc.tolist(), scale.tolist(), strict=True)]
    for i in (0, 1):
        truth = as_tensor(pair[i] for pair in pairs)
        assert torch.allclose(found[i], truth, rtol=1e-7, atol=0), (found[i], truth)


def test_random_points_mean_of_logarithm():
    check(distribution().base_dist.mean, same(Law.mean_of_x), tolerance=1e-12, slope_tolerance=1e-9)


def test_random_points_variance_of_logarithm():
    variance = distribution().base_dist.variance
    check(variance, same(Law.variance_of_x), tolerance=1e-6, slope_tolerance=1e-3, relative=True)


@pytest.mark.parametrize("loc", [-900.0, -25.0, -12.0, -1.0, 0.5, 40.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 7.0, 300.0])
def test_slopes_of_the_variance_hold_in_the_tails(loc, scale):
    """Where the law is nearly uniform they are small differences of large cumulants: 1e-3 of the larger one."""
    parameters = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (loc, scale)]
    for find, reference in (("variance", Law.variance_of_x), ("snr", Law.snr_of_x)):
        value = getattr(TruncatedNormal(*parameters, LOW, HIGH), find)
        found = torch.autograd.grad(value, parameters)
        truth = as_tensor(numeric_gradient(reference, loc, scale))
        assert torch.allclose(torch.stack(found), truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max())), (
            found,
            truth,
        )


def test_random_points_entropy_of_theta():
    reference = same(lambda law: law.entropy() + law.mean_of_x())
    check(distribution().entropy(), reference, tolerance=1e-12, slope_tolerance=1e-8)


def test_random_points_variance_and_snr():
    """Values to 1e-6 relative; gradients to 1e-3 (those of Var(log θ) where θ is narrow)."""
    q = distribution()
    check(q.variance, same(Law.variance), tolerance=1e-6, slope_tolerance=1e-3, relative=True)
    check(q.snr, same(Law.snr), tolerance=1e-6, slope_tolerance=1e-3, relative=True)


def test_random_points_log_prob_of_own_samples():
    """Measured: 2e-15; gradients 6e-13."""
    base = distribution().base_dist
    x = base.icdf(U_60).detach()
    reference = [lambda law, x=value: law.log_density(x) for value in x.tolist()]
    check(base.log_prob(x), reference, tolerance=1e-12, slope_tolerance=1e-10)


def test_random_points_quantile():
    """Measured: 1e-10 of max(|x|, distance to the nearer bound), gradients 2e-8, over u of 1e-8 to 1."""
    x = distribution().base_dist.icdf(U_60)
    points = list(zip(LOC_60.tolist(), SCALE_60.tolist(), U_60.tolist(), strict=True))
    truth = as_tensor(Law(loc, scale).quantile(u) for loc, scale, u in points)
    size = torch.maximum(truth.abs(), torch.minimum(truth - LOW, HIGH - truth))
    error = (x.detach() - truth).abs() / size
    assert bool((error <= 1e-10).all()), worst_at(error)
    found = torch.autograd.grad(x.sum(), (LOC_60, SCALE_60))
    pairs = [Law(loc, scale).quantile_derivatives(u) for loc, scale, u in points]
    slopes = [as_tensor(pair[i] for pair in pairs) for i in (0, 1)]
    for gradient, slope in zip(found, slopes, strict=True):
        negligible = slope.abs() < 1e-9 * torch.maximum(*(s.abs() for s in slopes))
        bound = torch.where(negligible, (1e-6 * slope.abs()).clamp(min=1e-12), 1e-6 * slope.abs())
        assert bool(((gradient - slope).abs() <= bound).all()), worst_at((gradient - slope).abs() / bound)


def test_random_points_cumulative():
    base = distribution().base_dist
    x = base.icdf(U_60).detach()
    points = zip(LOC_60.tolist(), SCALE_60.tolist(), x.tolist(), strict=True)
    truth = as_tensor(Law(loc, scale).cdf(value) for loc, scale, value in points)
    error = (base.cdf(x).detach() - truth).abs()
    assert bool((error <= 1e-12).all()), worst_at(error)


def test_float32_is_the_rounded_float64_of_the_same_numbers():
    """Float32 in, float32 out, and nothing lost between: float64 of the same numbers gives it, rounded."""
    single = TruncatedNormal(LOC_60.detach().float(), SCALE_60.detach().float(), LOW, HIGH)
    double = TruncatedNormal(single.loc.double(), single.scale.double(), LOW, HIGH)
    u = U_60.float()
    assert torch.equal(single.icdf(u), double.icdf(u.double()).float())
    assert torch.equal(single.entropy(), double.entropy().float())
