"""The divergence as Pyro uses it, and between two truncated log-normals."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from reference import Law, mp
from torch.distributions import Uniform, kl_divergence

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal

LOW, HIGH = -20.0, 0.0
LOC = [-3.0, -25.0, 1.5, -10.0, -0.5]
SCALE = [0.3, 1.0, 0.2, 30.0, 0.02]


def model():
    return pyro.sample("scales", LogUniform(LOW, HIGH).expand([5]).to_event(1))


def guide():
    return pyro.sample("scales", TruncatedLogNormal(torch.tensor(LOC), torch.tensor(SCALE)).to_event(1))


def test_mean_field_elbo_uses_the_closed_form():
    """With no observation the loss is the KL: of zero variance, or torch fell back to sampling it."""
    laws = [Law(*point) for point in zip(*torch.tensor([LOC, SCALE]).tolist(), strict=True)]
    truth = float(sum(law.kl_uniform() for law in laws))
    losses = {TraceMeanField_ELBO().differentiable_loss(model, guide).item() for _ in range(20)}
    assert len(losses) == 1, f"the loss varies: {losses}"
    assert losses.pop() == pytest.approx(truth, rel=1e-5)


def test_the_sampled_elbo_agrees_on_average():
    """The check can fail: Trace_ELBO does vary. 6 standard errors: a false alarm of 2e-9."""
    torch.manual_seed(0)
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=0)
    losses = torch.stack([elbo.differentiable_loss(model, guide) for _ in range(20)])
    exact = TraceMeanField_ELBO().differentiable_loss(model, guide)
    assert losses.std() > 0
    assert (losses.mean() - exact).abs() < 6 * losses.std() / math.sqrt(20)


def test_inside_a_plate_with_a_scale():
    def plated(distribution):
        with pyro.plate("units", 5), pyro.poutine.scale(scale=0.25):
            return pyro.sample("scales", distribution)

    losses = {
        TraceMeanField_ELBO()
        .differentiable_loss(
            lambda: plated(LogUniform(LOW, HIGH)),
            lambda: plated(TruncatedLogNormal(torch.tensor(LOC), torch.tensor(SCALE))),
        )
        .item()
        for _ in range(5)
    }
    plain = TraceMeanField_ELBO().differentiable_loss(model, guide).item()
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(0.25 * plain, rel=1e-6)


# --- between two truncated log-normals ---------------------------------------------------------------

PAIRS = [
    # (loc, scale) of q and of p
    ((-3.0, 0.5), (-4.0, 2.0)),
    ((-3.0, 0.5), (-20.0, 1e-2)),
    ((-26.0, 1.0), (-20.0, 3.0)),
    ((-35.0, 0.5), (-40.0, 1.0)),
    ((5.0, 0.8), (10.0, 2.0)),
    ((-10.0, 100.0), (-10.0, 1.0)),
    ((-10.0, 1.0), (-10.0, 100.0)),
    ((-20.0, 1e-6), (-15.0, 2.0)),
    ((-5.0, 1e-4), (-5.0, 1e-4)),
    ((12.0, 1e-2), (-40.0, 3.0)),
]


def exact(q: Law, p: Law):
    """E_q[log q - log p] from the first two moments of x, literally, in 150 digits."""
    m1 = q.mean_of_x()
    from_centre = m1 - p.loc
    edges = q.alpha * mp.npdf(q.alpha) - q.beta * mp.npdf(q.beta)
    variance = q.scale**2 * (1 + edges / q.mass) - (m1 - q.loc) ** 2
    cross = -(variance + from_centre**2) / (2 * p.scale**2) - mp.log(p.scale * mp.sqrt(2 * mp.pi)) - p.log_z()
    return -q.entropy() - cross


def columns(pairs=PAIRS):
    q, p = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    return (*q.unbind(-1), *p.unbind(-1))


def divergence(loc, scale, p_loc, p_scale):
    return kl_divergence(TruncatedLogNormal(loc, scale), TruncatedLogNormal(p_loc, p_scale))


def test_against_the_reference():
    truth = torch.tensor([float(exact(Law(*q), Law(*p))) for q, p in PAIRS], dtype=torch.float64)
    found = divergence(*columns())
    error = (found - truth).abs() / truth.abs().clamp(min=1.0)
    assert bool((error <= 1e-10).all()), (error, found, truth)


def test_the_reference_against_quadrature():
    for q, p in (PAIRS[0], PAIRS[2], PAIRS[4], PAIRS[6]):
        a, b = Law(*q), Law(*p)
        context = mp.clone()
        context.dps = 30

        def integrand(x, a=a, b=b):
            return mp.exp(a.log_density(x)) * (a.log_density(x) - b.log_density(x))

        cuts = [LOW, LOW + 0.5, LOW + 2, -12, -6, -4, -3, -2, -1, -0.3, HIGH]
        integral = context.quad(integrand, cuts)
        assert abs(integral - exact(a, b)) < 1e-10


def test_against_monte_carlo():
    """6 standard errors for each of ten pairs: a false alarm of 2e-8 in all."""
    torch.manual_seed(0)
    loc, scale, p_loc, p_scale = columns()
    q, p = TruncatedLogNormal(loc, scale), TruncatedLogNormal(p_loc, p_scale)
    theta = q.sample((40_000,))
    terms = q.log_prob(theta) - p.log_prob(theta)
    exact_value = kl_divergence(q, p)
    error = (terms.mean(0) - exact_value).abs()
    # log θ of a stored θ is off by an ulp of 20, which the tightest bells see
    assert bool((error <= 6 * terms.std(0) / 200 + 1e-6 * exact_value.abs().clamp(min=1.0)).all()), error


def test_gradients_by_finite_differences():
    pairs = [pair for pair in PAIRS if min(pair[0][1], pair[1][1]) > 0.1]
    inputs = tuple(column.requires_grad_() for column in columns(pairs))
    assert torch.autograd.gradcheck(divergence, inputs, eps=1e-6, atol=1e-5, rtol=1e-5)


def test_gradients_by_high_precision_differences():
    inputs = tuple(column.requires_grad_() for column in columns())
    found = torch.autograd.grad(divergence(*inputs).sum(), inputs)
    for i, gradient in enumerate(found):
        truth = []
        for q, p in PAIRS:
            values = [mp.mpf(v) for v in (*q, *p)]
            step = values[2 * (i // 2) + 1] * mp.mpf(10) ** -30
            sides = []
            for sign in (1, -1):
                moved = [v + sign * step * (k == i) for k, v in enumerate(values)]
                sides.append(exact(Law(*moved[:2]), Law(*moved[2:])))
            truth.append(float((sides[0] - sides[1]) / (2 * step)))
        truth = torch.tensor(truth, dtype=torch.float64)
        # where q = p all four vanish: held to the size of their parts, 1/scale
        size = truth.abs().clamp(min=1e-6)
        parts = 1e-10 / torch.minimum(inputs[1], inputs[3]).detach()
        assert bool(((gradient - truth).abs() <= 1e-7 * size + parts).all()), (i, gradient, truth)


def test_no_divergence_from_itself():
    loc, scale, *_ = columns()
    assert bool((divergence(loc, scale, loc, scale).abs() < 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_where_the_prior_has_no_mass(dtype):
    q = TruncatedLogNormal(torch.tensor([-3.0, -3.0], dtype=dtype), torch.tensor(1.0, dtype=dtype))
    assert kl_divergence(q, LogUniform(-10.0, 0.0)).tolist() == [math.inf] * 2
    assert kl_divergence(q, TruncatedLogNormal(-3.0, 1.0, -10.0, 0.0)).tolist() == [math.inf] * 2
    assert bool(torch.isfinite(kl_divergence(q, LogUniform(-30.0, 3.0))).all())
    assert bool(torch.isfinite(kl_divergence(q, TruncatedLogNormal(-3.0, 1.0, -30.0, 3.0))).all())


def test_a_wider_uniform_costs_its_logarithm():
    x = TruncatedNormal(*torch.tensor([-3.0, 0.5, LOW, HIGH], dtype=torch.float64))
    narrow, wide = (Uniform(*torch.tensor(b, dtype=torch.float64)) for b in ((LOW, HIGH), (-40.0, 20.0)))
    assert (kl_divergence(x, wide) - kl_divergence(x, narrow)).item() == pytest.approx(math.log(3), rel=1e-12)
