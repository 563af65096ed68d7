"""One test for all three distributions: what Pyro and torch expect, and quadrature as the judge."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from only_meta import OnlyMeta
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch.distributions import Distribution, biject_to, kl_divergence, transform_to

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal

LOW, HIGH = -20.0, 0.0
BATCH = (3, 2)
KINDS = [TruncatedNormal, TruncatedLogNormal, LogUniform]
DTYPES = [torch.float32, torch.float64]


def make(kind, *, dtype=torch.float64, device="cpu", validate=True, grad=False) -> Distribution:
    """Batch (3, 2): loc inside, below and above; scale narrow and wide; bounds apart for LogUniform."""

    def tensor(values):
        return torch.tensor(values, dtype=dtype, device=device).requires_grad_(grad)

    loc, scale = tensor([[-3.0], [-24.0], [2.0]]), tensor([0.5, 6.0])
    if kind is LogUniform:
        low, high = tensor([[-20.0], [-16.0], [-3.0]]), tensor([0.0, -1.0])
        return LogUniform(low, high, validate_args=validate)
    return kind(loc, scale, LOW, HIGH, validate_args=validate)


def bounds(q: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the variable in whose terms the density is smooth: x itself, or log θ."""
    if isinstance(q, TruncatedNormal):
        return q.low, q.high
    return q.log_low, q.log_high


def quadrature(q: Distribution, function, intervals=200_000) -> torch.Tensor:
    """∫ function(value) · density by Simpson's rule in x or log θ. Shape: batch."""
    low, high = bounds(q)
    grid = torch.linspace(0, 1, intervals + 1, dtype=torch.float64).reshape(-1, *[1] * low.ndim)
    x = (low + (high - low) * grid).clamp(min=low, max=high)
    value = x if isinstance(q, TruncatedNormal) else x.exp()
    jacobian = torch.ones(()) if isinstance(q, TruncatedNormal) else value
    log_prob = q.log_prob(value)
    integrand = function(value, log_prob) * log_prob.exp() * jacobian
    weights = torch.ones_like(grid)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return (weights * integrand).sum(0) * (high - low) / (3 * intervals)


each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_kind
@each_dtype
def test_shapes_and_support(kind, dtype):
    torch.manual_seed(0)
    q = make(kind, dtype=dtype)
    assert isinstance(q, TorchDistributionMixin), "a Pyro distribution: poutine reads its extra methods"
    assert q.has_rsample
    assert q.batch_shape == BATCH
    assert q.event_shape == ()
    assert q.support.event_dim == 0
    for sample_shape in ((), (4,), (4, 5)):
        for draw in (q.sample, q.rsample):
            sample = draw(torch.Size(sample_shape))
            assert sample.shape == (*sample_shape, *BATCH)
            assert sample.dtype == dtype
            assert bool(q.support.check(sample).all())
            assert q.log_prob(sample).shape == sample.shape
            assert q.log_prob(sample).dtype == dtype
    for name in ("mean", "variance", "stddev"):
        assert getattr(q, name).shape == BATCH
        assert getattr(q, name).dtype == dtype
    assert q.entropy().shape == BATCH
    assert q(sample_shape=(7,)).shape == (7, *BATCH)  # as Pyro calls it


@each_kind
def test_expand_and_to_event(kind):
    q = make(kind)
    wide = q.expand([4, *BATCH])
    assert type(wide) is kind
    assert wide.batch_shape == (4, *BATCH)
    assert wide.rsample((2,)).shape == (2, 4, *BATCH)
    value = q.sample((4,))
    assert torch.equal(wide.log_prob(value), q.log_prob(value))
    for name in ("mean", "variance"):
        assert torch.equal(getattr(wide, name), getattr(q, name).expand(4, *BATCH))
    assert torch.equal(wide.entropy(), q.entropy().expand(4, *BATCH))
    assert torch.equal(wide.cdf(value), q.cdf(value))
    joint = wide.to_event(2)
    assert (joint.batch_shape, joint.event_shape) == ((4,), BATCH)
    assert torch.allclose(joint.log_prob(value), q.log_prob(value).sum((-1, -2)))
    assert wide.expand([5, 4, *BATCH]).batch_shape == (5, 4, *BATCH)
    # validation goes along
    for validate in (True, False):
        assert make(kind, validate=validate).expand([4, *BATCH])._validate_args is validate
    assert q.mask(False).log_prob(q.sample()).abs().sum() == 0


@each_kind
@each_dtype
def test_quantile_and_cumulative_are_inverse(kind, dtype):
    torch.manual_seed(0)
    q = make(kind, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    u = torch.linspace(0, 1, 101, dtype=dtype).reshape(-1, 1, 1).expand(-1, *BATCH)
    x = q.icdf(u)
    assert x.shape == u.shape
    assert bool((x.diff(dim=0) > 0).all())
    # rounding x moves the probability by as much as the density there, per unit of x, times its size
    moved = torch.finfo(dtype).eps * (q.log_prob(x).exp() * x.abs()).clamp(min=1.0)
    moved = moved * (1.0 if kind is TruncatedNormal else 30.0)  # the rounding of log θ, up to 20
    assert bool(((q.cdf(x) - u).abs() <= tolerance + 4 * moved).all())
    sample = q.sample((50,))
    again = q.icdf(q.cdf(sample))
    size = sample.abs() * (1.0 if kind is TruncatedNormal else 20.0)
    # rounding the probability moves x by that over the density
    slack = torch.finfo(dtype).eps * (size + 4 / q.log_prob(sample).exp())
    assert bool(((again - sample).abs() <= 8 * slack).all())
    assert bool((q.cdf(q.icdf(torch.zeros(BATCH, dtype=dtype))).abs() <= 1e-6).all())


@each_kind
def test_density_integrates_to_one(kind):
    q = make(kind)
    total = quadrature(q, lambda value, log_prob: 1.0)
    assert torch.allclose(total, torch.ones(BATCH, dtype=total.dtype), rtol=1e-9, atol=0)


@each_kind
def test_moments_and_entropy_by_quadrature(kind):
    q = make(kind)
    mean = quadrature(q, lambda value, log_prob: value)
    assert torch.allclose(q.mean, mean, rtol=1e-9, atol=0)
    variance = quadrature(q, lambda value, log_prob: (value - mean) ** 2)
    assert torch.allclose(q.variance, variance, rtol=1e-6, atol=0)
    assert torch.allclose(q.stddev, variance.sqrt(), rtol=1e-6, atol=0)
    entropy = quadrature(q, lambda value, log_prob: -log_prob)
    assert torch.allclose(q.entropy(), entropy, rtol=1e-9, atol=1e-9)
    if kind is TruncatedLogNormal:
        assert torch.allclose(q.snr, mean / variance.sqrt(), rtol=1e-6, atol=0)
        assert torch.allclose(q.log_mean(), mean.log(), rtol=1e-9, atol=1e-9)


@each_kind
def test_cumulative_by_quadrature(kind):
    q = make(kind)
    low, high = bounds(q)
    at = low + 0.3 * (high - low)
    at = at if kind is TruncatedNormal else at.exp()
    below = quadrature(q, lambda value, log_prob: (value <= at).double())
    assert torch.allclose(q.cdf(at), below, rtol=0, atol=2e-4)  # the cut lies between two nodes


@each_kind
def test_gradients_reach_the_parameters(kind):
    """log_prob, cdf and icdf against finite differences, in the parameters (and the value)."""
    if kind is LogUniform:
        pytest.skip("bounds are constants")
    loc = torch.tensor([-3.0, -24.0, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)
    # steps in log θ, whose size does not depend on where θ is
    x = TruncatedNormal(loc, scale, LOW, HIGH).icdf(u).detach().requires_grad_()
    to_value, from_value = (
        (torch.exp, torch.log) if kind is TruncatedLogNormal else (lambda t: t, lambda t: t)
    )
    for method in ("log_prob", "cdf"):
        assert torch.autograd.gradcheck(
            lambda a, b, c, m=method: getattr(kind(a, b, LOW, HIGH), m)(to_value(c)), (loc, scale, x)
        )
    assert torch.autograd.gradcheck(lambda a, b: from_value(kind(a, b, LOW, HIGH).icdf(u)), (loc, scale))


@pytest.mark.parametrize("kind", [TruncatedNormal, TruncatedLogNormal])
def test_divergence_of_the_expanded_is_the_expanded_divergence(kind):
    q, wide_prior = make(kind, grad=True), make(kind)
    flat = LogUniform(LOW, HIGH) if kind is TruncatedLogNormal else LogUniform(LOW, HIGH).base_dist
    for prior in (flat, wide_prior):
        single = kl_divergence(q, prior)
        # plates to the left, and a prior of another shape
        repeated = kl_divergence(q.expand([4, *BATCH]), prior.expand([4, *BATCH]))
        assert torch.equal(repeated, single.expand(4, *BATCH))
        weights = torch.arange(1.0, 1 + repeated.numel(), dtype=torch.float64).reshape(repeated.shape)
        leaves = [q.loc, q.scale]
        through_expansion = torch.autograd.grad((weights * repeated).sum(), leaves)
        direct = torch.autograd.grad((weights.sum(0) * single).sum(), leaves)
        for a, b in zip(through_expansion, direct, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=0)


@each_kind
def test_gradient_of_every_method_sums_over_an_expansion(kind):
    if kind is LogUniform:
        pytest.skip("bounds are constants")
    loc = torch.tensor([-3.0, -24.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    q = kind(loc, scale, LOW, HIGH)
    wide = q.expand([5, 2])
    value, u = q.sample((5,)), torch.rand(5, 2, dtype=torch.float64)
    for method in (
        lambda d: d.log_prob(value), lambda d: d.cdf(value), lambda d: d.icdf(u),
        lambda d: d.mean.expand(5, 2), lambda d: d.entropy().expand(5, 2),
    ):  # fmt: skip
        for a, b in zip(
            torch.autograd.grad(method(wide).sum(), (loc, scale)),
            torch.autograd.grad(method(q).sum(), (loc, scale)),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@each_kind
@each_dtype
def test_bijections_reach_the_support(kind, dtype):
    torch.manual_seed(0)
    q = make(kind, dtype=dtype)
    for registry in (biject_to, transform_to):
        transform = registry(q.support)
        unconstrained = torch.randn(10, *BATCH, dtype=dtype)
        value = transform(unconstrained)
        assert bool(q.support.check(value).all())
        assert bool(torch.isfinite(q.log_prob(value)).all())
        assert torch.allclose(transform.inv(value), unconstrained, rtol=1e-2, atol=1e-2)


@each_kind
def test_deepcopy(kind):
    q = make(kind)
    twin = copy.deepcopy(q)
    value = q.sample()
    assert type(twin) is kind
    assert torch.equal(twin.log_prob(value), q.log_prob(value))
    assert twin.expand([4, *BATCH]).rsample().shape == (4, *BATCH)


@each_kind
def test_no_tensor_leaves_the_device(kind):
    """The whole interface on `meta`, under a mode that fails on any CPU tensor."""

    def on_meta():
        q = make(kind, device="meta", validate=False)
        prior = make(kind, device="meta", validate=False)
        if kind is LogUniform:
            return q, prior, [q.log_low, q.log_high]
        bound = [torch.full(BATCH, value, dtype=torch.float64, device="meta") for value in (LOW, HIGH)]
        q = kind(q.loc, q.scale, *bound, validate_args=False)
        prior = kind(prior.loc, prior.scale, *bound, validate_args=False)
        return q, prior, bound

    q, prior, bound = on_meta()
    with OnlyMeta():
        for law in (q, q.expand([4, *BATCH])):
            value = law.rsample((3,))
            results = [
                value, law.sample(), law.log_prob(value), law.cdf(value), law.icdf(value), law.mean,
                law.variance, law.entropy(), law.support.check(value), law.to_event(1).log_prob(value),
            ]  # fmt: skip
            if kind is TruncatedLogNormal:
                results += [law.snr, law.log_mean()]
                results.append(
                    kl_divergence(law, LogUniform(*bound, validate_args=False).expand(law.batch_shape))
                )
            if kind is TruncatedNormal:
                results.append(law.log_mass())
            results.append(kl_divergence(law, prior.expand(law.batch_shape)))
            assert all(result.is_meta for result in results)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (TruncatedNormal, ("low", "high")),
        (TruncatedLogNormal, ("log_low", "log_high")),
        (LogUniform, ("log_low", "log_high")),
    ],
)
@pytest.mark.parametrize(
    "pair", [(0.0, 0.0), (1.0, 0.0), (math.nan, 0.0), (-1.0, math.nan), (-math.inf, 0.0)]
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bad_bounds_raise_and_name_the_arguments(kind, names, pair, as_tensor):
    if as_tensor:
        pair = tuple(torch.tensor([-5.0 + 10 * k, value]) for k, value in enumerate(pair))
    leading = () if kind is LogUniform else (-3.0, 0.5)
    with pytest.raises(ValueError, match=rf"{names[0]}.*{names[1]}"):
        kind(*leading, *pair, validate_args=True)


@pytest.mark.parametrize("kind", [TruncatedNormal, TruncatedLogNormal])
@pytest.mark.parametrize(
    ("loc", "scale", "name"),
    [(-3.0, -0.5, "scale"), (-3.0, 0.0, "scale"), (-3.0, math.nan, "scale"), (math.nan, 0.5, "loc")],
)
def test_bad_parameters_raise_and_name_the_argument(kind, loc, scale, name):
    with pytest.raises(ValueError, match=name):
        kind(torch.tensor([-1.0, loc]), torch.tensor([1.0, scale]), LOW, HIGH, validate_args=True)


@each_kind
def test_numbers_are_enough(kind):
    """Python numbers in, default dtype out; the bounds have defaults where the paper gives them."""
    q = LogUniform() if kind is LogUniform else kind(-3.0, 0.5, LOW, HIGH)
    assert q.rsample().dtype == torch.get_default_dtype()
    assert q.batch_shape == ()
    if kind is TruncatedLogNormal:
        assert (
            float(TruncatedLogNormal(-3.0, 0.5).log_low),
            float(TruncatedLogNormal(-3.0, 0.5).log_high),
        ) == (
            LOW,
            HIGH,
        )
