"""ΔF in closed form: the golden file, quadrature in 40 digits, and what must hold for any triple."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath.ctx_mp import MPContext
from only_meta import OnlyMeta
from reference import Law, golden_points
from torch.distributions import Gamma, Independent, Normal, Uniform

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal, log_evidence_change
from pyro_bmrs.evidence import register_log_evidence_change

POINTS = golden_points()
LOW, HIGH = -20.0, 0.0
LOG_2 = math.log(2)


def column(name: str, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor([float(point[name]) for point in POINTS], dtype=dtype)


def posteriors(dtype=torch.float64) -> TruncatedLogNormal:
    return TruncatedLogNormal(
        *(column(name, dtype) for name in ("loc", "scale", "low", "high")), validate_args=True
    )


def float64(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def log_uniform(low: float = LOW, high: float = HIGH) -> LogUniform:
    return LogUniform(*float64(low, high))


def log_normal(loc: float, scale: float, low: float = LOW, high: float = HIGH) -> TruncatedLogNormal:
    return TruncatedLogNormal(*float64(loc, scale, low, high))


def assert_close(change: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    error = (change - truth).abs() / truth.abs().clamp(min=1.0)
    worst = int(torch.where(torch.isnan(error), torch.inf, error).argmax())
    assert bool((error <= tolerance).all()), (
        f"off by {float(error.flatten()[worst])}: {float(change.flatten()[worst])!r} "
        f"for {float(truth.flatten()[worst])!r} at {worst}"
    )


# --- the golden file ---------------------------------------------------------------------------------

REDUCED = {
    "delta_f_n_spike": lambda: log_normal(LOW, 1e-6),
    "delta_f_n_wide": lambda: log_normal(-15.0, 2.0),
    "delta_f_u8": lambda: log_uniform(-23 * LOG_2, -8 * LOG_2),
    "delta_f_u4": lambda: log_uniform(-23 * LOG_2, -4 * LOG_2),
}


@pytest.mark.parametrize("name", REDUCED)
def test_golden(name):
    change = log_evidence_change(posteriors(), log_uniform(), REDUCED[name]())
    assert change.shape == (len(POINTS),)
    assert_close(change, column(name), 1e-10)


@pytest.mark.parametrize("name", REDUCED)
def test_float32_inputs_are_computed_in_float64(name):
    """As exact at the rounded inputs as float64 is at its own: nothing is lost on the way."""
    single = posteriors(torch.float32)
    reduced = REDUCED[name]()
    as_float32 = type(reduced)(*(getattr(reduced, k).float() for k in arguments(reduced)))
    change = log_evidence_change(single, LogUniform(), as_float32)
    widened = TruncatedLogNormal(*(getattr(single, k).double() for k in arguments(single)))
    reduced_widened = type(reduced)(*(getattr(as_float32, k).double() for k in arguments(reduced)))
    assert change.dtype == torch.float64
    assert torch.equal(change, log_evidence_change(widened, log_uniform(), reduced_widened))


def arguments(distribution) -> tuple[str, ...]:
    bounds = ("log_low", "log_high")
    return ("loc", "scale", *bounds) if isinstance(distribution, TruncatedLogNormal) else bounds


# --- quadrature --------------------------------------------------------------------------------------

mp = MPContext()
mp.dps = 40


def log_expectation(q: Law, p: Law | tuple[float, float], reduced: Law | tuple[float, float]):
    """log ∫ q(x) p̃(x)/p(x) dx over p̃'s interval, x = log θ, by Gauss-Legendre on a split at the peak."""

    def constants(law):  # log-density = c - ½ precision (x - loc)²
        if isinstance(law, tuple):
            low, high = map(mp.mpf, law)
            return -mp.log(high - low), mp.mpf(0), mp.mpf(0), low, high
        normaliser = -mp.log(law.scale) - mp.log(2 * mp.pi) / 2 - mp.mpf(law.log_z())
        return normaliser, mp.mpf(law.scale) ** -2, mp.mpf(law.loc), mp.mpf(law.low), mp.mpf(law.high)

    parts = [(1, *constants(q)), (1, *constants(reduced)), (-1, *constants(p))]
    low, high = parts[1][4:]

    def exponent(x):
        return sum(sign * (c - precision * (x - loc) ** 2 / 2) for sign, c, precision, loc, _, _ in parts)

    precision = sum(sign * part for sign, _, part, *_ in parts)
    mode = sum(sign * part * loc for sign, _, part, loc, *_ in parts) / precision
    peak = min(max(mode, low), high)
    # how fast the integrand falls from its peak: by its curvature, or by its slope at a bound
    width = 1 / mp.sqrt(precision + (precision * (peak - mode)) ** 2)
    cuts = {low, high, *(min(max(peak + side * k * width, low), high) for side in (-1, 1) for k in CUTS)}
    top = exponent(peak)
    return top + mp.log(mp.quad(lambda x: mp.exp(exponent(x) - top), sorted(cuts), method="gauss-legendre"))


CUTS = (0, 1, 3, 7, 15, 40, 120)
POSTERIORS = [
    (-0.5, 0.02), (-0.1, 0.0067), (-20.0, 1.0), (-19.0, 3.0), (-10.0, 0.5), (-5.0, 15.0),
    (-26.0, 2.0), (4.0, 1.5), (-35.0, 0.3), (15.0, 0.2), (-16.0, 1e-4), (0.001, 1e-6),
]  # fmt: skip
WHOLE = (LOW, HIGH)


def check_against_quadrature(p, reduced, prior, reduced_prior, points=POSTERIORS):
    laws = [Law(loc, scale) for loc, scale in points]
    truth = torch.tensor([float(log_expectation(q, p, reduced)) for q in laws], dtype=torch.float64)
    loc, scale = torch.tensor(points, dtype=torch.float64).unbind(-1)
    change = log_evidence_change(TruncatedLogNormal(loc, scale), prior, reduced_prior)
    assert_close(change, truth, 1e-10)


@pytest.mark.slow
def test_the_quadrature_agrees_with_the_golden_file():
    for point in POINTS[::7]:
        q = Law(*(point[k] for k in ("loc", "scale", "low", "high")))
        # the file's 8 bits are 2⁻⁸ exactly; its spike has scale 1e-6
        interval = (-23 * mp.log(2), -8 * mp.log(2))
        for name, reduced in (("delta_f_n_wide", Law("-15", "2")), ("delta_f_u8", interval)):
            truth = mp.mpf(point[name])
            assert abs(log_expectation(q, WHOLE, reduced) - truth) <= 1e-15 * max(1, abs(truth)), (
                name,
                point,
            )


@pytest.mark.parametrize("lower", [-23 * LOG_2, LOW], ids=["a' = 2⁻²³", "a' = a"])
@pytest.mark.parametrize("bits", [8, 4])
def test_interval_under_a_log_uniform_prior(lower, bits):
    upper = -bits * LOG_2
    check_against_quadrature(WHOLE, (lower, upper), log_uniform(), log_uniform(lower, upper))


def test_interval_that_reaches_the_lower_edge_removes_the_deadest_units():
    """paper.md: with a' = 2⁻²³ a unit at loc -20, scale 1 scores -9.3; a' = a cures it."""
    dead = log_normal(-20.0, 1.0)
    short = log_evidence_change(dead, log_uniform(), log_uniform(-23 * LOG_2, -8 * LOG_2))
    whole = log_evidence_change(dead, log_uniform(), log_uniform(LOW, -8 * LOG_2))
    assert short.item() == pytest.approx(-9.3, abs=0.05)
    assert whole.item() == pytest.approx(math.log(20 / (20 - 8 * LOG_2)), abs=1e-9)


@pytest.mark.parametrize("spike", [(LOW, 1e-6), (LOW, 0.1), (-15.0, 2.0), (-40.0, 3.0), (5.0, 2.0)])
def test_bell_under_a_log_uniform_prior(spike):
    check_against_quadrature(WHOLE, Law(*spike), log_uniform(), log_normal(*spike))


@pytest.mark.parametrize("prior", [(-12.0, 40.0), (-30.0, 25.0), (3.0, 20.0)])
@pytest.mark.parametrize("reduced", [(LOW, 1e-6), (-15.0, 2.0), (LOW, -8 * LOG_2)], ids=str)
def test_truncated_log_normal_prior(prior, reduced):
    p = Law(*prior)
    if reduced[1] < 0:
        check_against_quadrature(p, reduced, log_normal(*prior), log_uniform(*reduced))
    else:
        check_against_quadrature(p, Law(*reduced), log_normal(*prior), log_normal(*reduced))


def test_reduced_prior_on_a_part_of_the_support():
    reduced = (-18.0, 1.0, -19.0, -12.0)
    check_against_quadrature(WHOLE, Law(*reduced), log_uniform(), log_normal(*reduced))


def test_savage_dickey_limit():
    """scale → 0: the density ratio q(a)/p(a) at the lower edge (paper.md section 1)."""
    loc, scale = torch.tensor(POSTERIORS, dtype=torch.float64).unbind(-1)
    narrow = log_evidence_change(TruncatedLogNormal(loc, scale), log_uniform(), log_normal(LOW, 1e-13))
    ratio = [Law(*point).log_density(LOW) + math.log(20) for point in POSTERIORS]
    assert_close(narrow, torch.tensor([float(r) for r in ratio], dtype=torch.float64), 1e-5)


# --- what must hold for any triple -------------------------------------------------------------------


@pytest.mark.parametrize("prior", [log_uniform, lambda: log_normal(-12.0, 40.0)], ids=["uniform", "normal"])
def test_nothing_changes_when_the_reduced_prior_is_the_prior(prior):
    change = log_evidence_change(posteriors(), prior(), prior())
    assert_close(change, torch.zeros_like(change), 1e-10)


def test_a_posterior_that_is_the_prior_changes_nothing():
    loc = torch.tensor([-40.0, -20.0, -5.0, 5.0, 20.0], dtype=torch.float64)
    for reduced in (make() for make in REDUCED.values()):
        # the posterior differs from flat by up to 40 · 20/scale², in nats
        change = log_evidence_change(TruncatedLogNormal(loc, torch.tensor(1e6)), log_uniform(), reduced)
        assert bool((change.abs() < 2e-9).all()), change
    prior = log_normal(-12.0, 3.0)
    for reduced in (log_normal(LOW, 1e-6), log_normal(-15.0, 1.0), log_uniform(LOW, -8 * LOG_2)):
        assert abs(log_evidence_change(prior, prior, reduced).item()) < 1e-9


def test_figures_of_the_paper_page():
    """At scale 15: -0.9 (loc 5), -0.38 (loc -5), +0.26 (loc -20), under eq. 8 with its 2π."""
    q = TruncatedLogNormal(*torch.tensor([[5.0, -5.0, -20.0], [15.0] * 3], dtype=torch.float64))
    change = log_evidence_change(q, log_uniform(), log_normal(LOW, 1e-6))
    assert change.tolist() == pytest.approx([-0.9, -0.38, 0.26], abs=0.06)


def test_sums_over_independent_dimensions():
    q, spike = posteriors(), log_normal(LOW, 1e-6)
    single = log_evidence_change(q, log_uniform(), spike)
    matrix = q.expand([3, len(POINTS)])
    for dims in (0, 1, 2):
        joint = [
            d.expand(matrix.batch_shape).to_event(dims) if dims else d for d in (matrix, log_uniform(), spike)
        ]
        change = log_evidence_change(*joint)
        expected = single.expand(3, -1).sum(dim=list(range(2 - dims, 2))) if dims else single.expand(3, -1)
        assert change.shape == matrix.batch_shape[: 2 - dims]
        assert torch.allclose(change, expected, rtol=1e-14, atol=0)


def test_independent_dimensions_must_match():
    q = posteriors().to_event(1)
    with pytest.raises(ValueError, match="prior"):
        log_evidence_change(q, log_uniform(), log_normal(LOW, 1e-6).expand([len(POINTS)]).to_event(1))


def test_all_three_broadcast():
    q = TruncatedLogNormal(torch.full((4, 1), -3.0), torch.tensor(0.5))
    change = log_evidence_change(q, LogUniform(), TruncatedLogNormal(torch.tensor([-20.0, -18.0]), 0.1))
    assert change.shape == (4, 2)
    assert log_evidence_change(q.expand([2, 4, 1]), LogUniform(), LogUniform(-20.0, -5.0)).shape == (2, 4, 1)


def test_logarithms_give_the_same():
    q = posteriors()
    spike, part = log_normal(LOW, 1e-6), log_uniform(LOW, -5.0)
    for reduced in (spike, part):
        direct = log_evidence_change(q, log_uniform(), reduced)
        bases = log_evidence_change(q.base_dist, log_uniform().base_dist, reduced.base_dist)
        assert torch.equal(direct, bases)


def test_unsupported_triple_names_the_three_types():
    with pytest.raises(NotImplementedError) as caught:
        log_evidence_change(posteriors(), Gamma(1.0, 1.0), LogUniform(-20.0, -5.0))
    for name in ("TruncatedLogNormal", "Gamma", "LogUniform"):
        assert name in str(caught.value)
    with pytest.raises(NotImplementedError, match=r"\(TruncatedNormal, TruncatedLogNormal, Normal\)"):
        log_evidence_change(TruncatedNormal(-1.0, 1.0, LOW, HIGH), log_normal(LOW, 1.0), Normal(0.0, 1.0))


@pytest.mark.parametrize(
    "reduced",
    [log_uniform(-21.0, -5.0), log_uniform(-20.0, 0.01), log_normal(LOW, 1e-6, -20.0, 1.0)],
    ids=["below", "above", "bell above"],
)
def test_reduced_prior_outside_the_support_raises(reduced):
    with pytest.raises(ValueError, match="reduced_prior"):
        log_evidence_change(posteriors(), log_uniform(), reduced)
    wide = log_uniform(-30.0, 10.0)  # inside the prior, outside the posterior
    with pytest.raises(ValueError, match="reduced_prior"):
        log_evidence_change(posteriors(), wide, reduced)


def test_posterior_wider_than_its_prior_raises():
    with pytest.raises(ValueError, match="posterior"):
        log_evidence_change(log_normal(-3.0, 5.0), log_normal(-3.0, 1.0), log_uniform(-20.0, -5.0))


# --- dispatch ----------------------------------------------------------------------------------------


def test_a_subclass_gets_the_closest_rule():
    class Posterior(TruncatedLogNormal):
        pass

    class Prior(LogUniform):
        pass

    q, spike = Posterior(-3.0, 0.5), TruncatedLogNormal(LOW, 1e-6)
    inherited = log_evidence_change(q, LogUniform(), spike)
    assert torch.equal(inherited, log_evidence_change(TruncatedLogNormal(-3.0, 0.5), LogUniform(), spike))

    @register_log_evidence_change(Posterior, LogUniform, TruncatedLogNormal)
    def closer(posterior, prior, reduced_prior):
        return torch.tensor(1.0, dtype=torch.float64)

    assert log_evidence_change(q, LogUniform(), spike).item() == 1.0

    @register_log_evidence_change(Posterior, Prior, TruncatedLogNormal)
    def closest(posterior, prior, reduced_prior):
        return torch.tensor(2.0, dtype=torch.float64)

    assert log_evidence_change(q, Prior(), spike).item() == 2.0
    assert log_evidence_change(q, LogUniform(), spike).item() == 1.0
    # the parent's rule is untouched
    assert torch.equal(log_evidence_change(TruncatedLogNormal(-3.0, 0.5), LogUniform(), spike), inherited)


# --- over the box, and on another device -------------------------------------------------------------

BOX = st.lists(
    st.tuples(st.floats(-40.0, 20.0), st.floats(-20.0, 5.0)), min_size=1, max_size=24
)  # fmt: skip
CORNERS = [(loc, log_scale) for loc in (-40.0, -20.0, 0.0, 20.0) for log_scale in (-20.0, 5.0)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(points=BOX)
@example(points=CORNERS)
def test_finite_over_the_parameter_box(points):
    for dtype in (torch.float32, torch.float64):
        loc, log_scale = torch.tensor(points, dtype=dtype).unbind(-1)
        q = TruncatedLogNormal(loc, log_scale.exp())
        for reduced in (make() for make in REDUCED.values()):
            for prior in (log_uniform(), log_normal(-12.0, 150.0)):
                change = log_evidence_change(q, prior, reduced)
                assert change.dtype == torch.float64
                assert bool(torch.isfinite(change).all()), change


def test_no_tensor_leaves_the_device():
    def on_meta(*values):
        return [torch.full((3,), value, device="meta") for value in values]

    q = TruncatedLogNormal(*on_meta(-3.0, 0.5, LOW, HIGH), validate_args=False)
    bell = TruncatedLogNormal(*on_meta(LOW, 1.0, LOW, HIGH), validate_args=False)
    flat = LogUniform(*on_meta(LOW, HIGH), validate_args=False)
    with OnlyMeta():
        for prior in (flat, bell):
            for reduced in (flat, bell):
                change = log_evidence_change(q, prior, reduced)
                assert change.is_meta
                assert change.shape == (3,)
                assert change.dtype == torch.float64


def test_uniform_and_independent_are_torchs_own():
    """The rules take torch's Uniform, so a user's own composition of it works too."""
    q = Independent(TruncatedNormal(torch.tensor([-3.0, -19.0]), torch.tensor(0.5), LOW, HIGH), 1)
    p = Independent(Uniform(torch.full((2,), LOW), torch.full((2,), HIGH)), 1)
    reduced = Independent(Uniform(torch.full((2,), LOW), torch.full((2,), -5.0)), 1)
    assert log_evidence_change(q, p, reduced).shape == ()
