"""Draws and KL of many units at once: the laws of `TruncatedLogNormal`, and uniforms that are what they claim."""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import golden_rows
from torch.distributions import kl_divergence

from pyro_bmrs import LogUniform, TruncatedLogNormal
from pyro_bmrs.distributions.packed import (
    FAR,
    NEAREST,
    _Compiled,
    _draw,
    _draw_all,
    _strata,
    bounded,
    draw_with_kl,
    uniforms,
)

# loc as a distance beyond either bound, or as a place between them; the edges of the box drawn often
BOUNDS = [(-20.0, 0.0), (-3.0, 2.0), (-20.0, -19.0)]
PLACE = st.one_of(
    st.tuples(st.just("below"), st.one_of(st.floats(0.0, 20.0), st.sampled_from([0.0, 1e-9, 20.0]))),
    st.tuples(st.just("above"), st.one_of(st.floats(0.0, 20.0), st.sampled_from([0.0, 1e-9, 20.0]))),
    st.tuples(st.just("between"), st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0]))),
)
LOG_SCALE = st.one_of(st.floats(-20.0, 5.0), st.sampled_from([-20.0, -10.0, 0.0, 5.0]))
UNITS = st.lists(st.tuples(PLACE, LOG_SCALE, st.sampled_from(BOUNDS)), min_size=1, max_size=24)
# where the slopes are of the size of their law; beyond, they vanish with the distance to a bound
INNER = st.floats(1e-3, 1 - 1e-3)
OUTER = st.sampled_from([NEAREST, 2.0**-12, 1 - 2.0**-12, 1 - NEAREST])
CORNERS = [
    (place, log_scale, BOUNDS[0])
    for place in [("below", 20.0), ("below", 0.0), ("between", 0.5), ("above", 0.0), ("above", 20.0)]
    for log_scale in (-20.0, -8.0, -0.6, 0.0, 5.0)
]


class Units:
    """Parameters, float64 or what they are rounded to, and what the reference says of them."""

    def __init__(self, units, u, dtype=torch.float64):
        locs, log_scales, lows, highs = [], [], [], []
        for (where, by), log_scale, (low, high) in units:
            locs.append({"below": low - by, "above": high + by, "between": low + by * (high - low)}[where])
            log_scales.append(log_scale)
            lows.append(low)
            highs.append(high)
        columns = [torch.tensor(column, dtype=torch.float64) for column in (locs, log_scales, lows, highs)]
        self.loc, self.log_scale, self.low, self.high = (column.to(dtype) for column in columns)
        _, self.scale = bounded(self.loc, self.log_scale, self.low, self.high)
        self.u = torch.tensor(u, dtype=torch.float64).unsqueeze(1).expand(len(u), len(units)).contiguous()
        self.kept = torch.ones(len(units), dtype=torch.bool)

    def leaves(self, dtype=None):
        """loc and log scale, which is what a guide has as its parameter."""
        leaves = self.loc.to(dtype, copy=True), self.log_scale.to(dtype, copy=True)
        return leaves[0].requires_grad_(), leaves[1].requires_grad_()

    def packed(self, kept=None):
        """((θ, Σ KL), leaves)."""
        loc, log_scale = self.leaves()
        kept = self.kept if kept is None else kept
        return draw_with_kl(loc, log_scale, self.low, self.high, kept, self.u), (loc, log_scale)

    def reference(self):
        """((θ, KL of each unit), leaves), float64, unit by unit as the distribution has them."""
        loc, log_scale = self.leaves(torch.float64)
        scale = self.scale.double() * (log_scale - log_scale.detach()).exp()
        low, high = self.low.double(), self.high.double()
        q = TruncatedLogNormal(loc, scale, low, high)
        return (q.icdf(self.u), kl_divergence(q, LogUniform(low, high))), (loc, log_scale)


def close(value, expected, relative, absolute=0.0):
    """Elementwise; the message shows the worst."""
    error = (value.double() - expected).abs() - relative * expected.abs() - absolute
    worst = int(error.argmax())
    assert bool((error <= 0).all()), (
        worst,
        value.flatten()[worst].item(),
        expected.flatten()[worst].item(),
    )


def slopes(values, leaves):
    """Gradients of each row of `values`, over the row's own values: of log θ. Shape: (rows, units)."""
    rows = [torch.autograd.grad(row.sum(), leaves, retain_graph=True) for row in values]
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def check(units, u, dtype, relative):
    case = Units(units, u, dtype)
    (theta, kl), leaves = case.packed()
    (expected, divergence), reference_leaves = case.reference()
    assert theta.dtype == dtype
    assert kl.dtype == dtype
    close(theta, expected, relative)
    assert bool(((theta >= case.low.exp()) & (theta <= case.high.exp())).all())
    # the divergence of a unit that is as wide as its bounds is the small difference of two logarithms
    close(kl, divergence.sum(), relative, 1e-11 * len(units))
    inner = ((case.u >= 1e-3) & (case.u <= 1 - 1e-3)).double()
    ours, truth = slopes(theta, leaves), slopes(expected, reference_leaves)
    for one, other in zip(ours, truth, strict=True):
        # of log θ by loc or log scale, so of size 1: where a draw is held by a bound, less
        slope, known = one.double() / expected.detach(), other / expected.detach()
        close(slope, known, relative, relative)
        close(slope * inner, known * inner, relative, 1e-11 if dtype == torch.float64 else 1e-7)
    ours = torch.autograd.grad(kl, leaves)
    truth = torch.autograd.grad(divergence.sum(), reference_leaves)
    for one, other in zip(ours, truth, strict=True):
        close(one, other, relative, 1e-11)


@settings(max_examples=150, deadline=None)
@given(units=UNITS, u=st.lists(st.one_of(INNER, OUTER), min_size=1, max_size=4))
@example(units=CORNERS, u=[NEAREST, 0.5, 1 - NEAREST])
@example(units=CORNERS[:1], u=[0.5])
def test_values_and_gradients_of_the_distribution_over_the_whole_box(units, u):
    check(units, u, torch.float64, 1e-6)


@settings(max_examples=40, deadline=None)
@given(units=UNITS, u=st.lists(INNER, min_size=1, max_size=3))
@example(units=CORNERS, u=[0.001, 0.5, 0.999])
def test_float32_parameters_get_float64_arithmetic(units, u):
    """No more is lost than the rounding of what comes in and goes out."""
    check(units, u, torch.float32, 1e-6)


def test_the_golden_values_of_150_digits():
    """Not only the library's other form: quantiles, their slopes and the KL in mpmath."""
    rows = golden_rows()
    names = (
        "loc",
        "scale",
        "low",
        "high",
        "u",
        "kl_loguniform",
        "icdf_log",
        "d_icdf_d_loc",
        "d_icdf_d_scale",
    )
    numbers = torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64).T
    loc, scale, low, high, u, divergence, log_theta, by_loc, by_scale = numbers
    inside = (loc >= low - 20) & (loc <= high + 20) & (scale >= math.exp(-20)) & (scale <= math.exp(5))
    inside &= (u >= NEAREST) & (u <= 1 - NEAREST)
    assert inside.sum() > 100
    for number in torch.nonzero(inside).flatten().tolist():
        one = slice(number, number + 1)
        leaves = [t[one].clone().requires_grad_() for t in (loc, scale.log())]
        at = u[one, None]
        theta, kl = draw_with_kl(*leaves, low[one], high[one], torch.tensor([True]), at)
        close(kl[None], divergence[one], 1e-6, 1e-13)
        close(theta.log()[0], log_theta[one], 1e-8, 1e-8)
        slope = [g / theta.detach()[0] for g in torch.autograd.grad(theta.sum(), leaves)]
        close(slope[0], by_loc[one], 1e-6, 1e-7)
        close(slope[1], by_scale[one] * scale[one], 1e-6, 1e-7)


@pytest.mark.parametrize("u", [[0.3], [0.3, 0.9, NEAREST]])
def test_what_is_not_kept_is_zero_and_has_no_gradient(u):
    case = Units(CORNERS, u)
    kept = torch.arange(len(CORNERS)) % 3 != 0
    assert bool((((case.low - case.loc) / case.scale)[~kept] > FAR).any())  # of the far ones too
    (theta, kl), leaves = case.packed(kept)
    assert bool((theta[:, ~kept] == 0).all())
    (whole, _), _ = case.packed()
    assert torch.equal(theta[:, kept], whole[:, kept])
    (_, divergence), reference_leaves = case.reference()
    close(kl[None], divergence[kept].sum()[None], 1e-9)
    for value in (theta.sum(), kl, theta.sum() + kl):
        for gradient in torch.autograd.grad(value, leaves, retain_graph=True):
            assert bool(torch.isfinite(gradient).all())
            assert bool((gradient[~kept] == 0).all())
    expected = torch.autograd.grad(divergence[kept].sum(), reference_leaves)
    for one, other in zip(torch.autograd.grad(kl, leaves), expected, strict=True):
        close(one, other, 1e-6, 1e-11)


def test_far_units_among_others_change_nothing_but_themselves():
    """α above 37 takes another way, column by column: as if every unit were drawn by itself."""
    far, near = (("below", 20.0), -10.0, BOUNDS[0]), (("between", 0.7), -1.0, BOUNDS[0])
    above, edge = (("above", 3.0), -4.0, BOUNDS[1]), (("below", FAR), 0.0, (-20.0, 0.0))
    units = [near, far, above, near, edge, far]
    u = [0.2, 0.7]
    together = Units(units, u)
    alpha = torch.maximum(together.low - together.loc, together.loc - together.high) / together.scale
    assert (alpha > FAR).tolist() == [False, True, True, False, False, True]
    (theta, kl), leaves = together.packed()
    weights = torch.linspace(0.5, 1.5, theta.numel(), dtype=torch.float64).view_as(theta)
    gradients = torch.autograd.grad((theta * weights).sum() + kl, leaves)
    total = 0.0
    for number, unit in enumerate(units):
        (alone, divergence), own = Units([unit], u).packed()
        total += divergence.item()
        assert torch.equal(theta[:, number], alone[:, 0])
        expected = torch.autograd.grad((alone[:, 0] * weights[:, number]).sum() + divergence, own)
        for gradient, one in zip(gradients, expected, strict=True):
            assert gradient[number].item() == pytest.approx(one.item(), rel=1e-13)
    assert kl.item() == pytest.approx(total, rel=1e-13)


def test_what_runs_on_accelerators_is_the_same_without_looking():
    """All structures both ways, instead of those beyond FAR by themselves; asymptotic series there have 1e-8."""
    case = Units(
        CORNERS + [(place, log_scale, BOUNDS[2]) for place, log_scale, _ in CORNERS], [NEAREST, 0.3, 0.9]
    )
    given = case.loc, case.log_scale, case.low, case.high, case.kept, case.u
    for looked, blind in zip(_draw(*given, columns=True), _draw(*given, columns=False), strict=True):
        torch.testing.assert_close(blind, looked, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_the_compiled_formulas_are_the_same():
    case = Units(CORNERS, [0.2, 0.7])
    given = case.loc, case.log_scale, case.low, case.high, case.kept, case.u
    for found, wanted in zip(torch.compile(_draw_all)(*given), _draw_all(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_where_torch_can_not_compile_the_formula_itself_is_taken(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def compiled(formula, **options):
        def fails(*given):
            raise TorchDynamoException("no compiler")

        return fails

    monkeypatch.setattr(torch, "compile", compiled)
    doubled = _Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="not compiled, and take longer: no compiler"):
        assert doubled(3) == 6
    with warnings.catch_warnings(action="error"):  # once
        assert doubled(4) == 8


def test_the_operations_keep_torchs_contracts():
    """Schema, fake tensors, gradients and what `torch.compile` asks of an operation, by torch's own checks."""
    case = Units(CORNERS[6:14], [0.2, 0.7])
    leaves = case.leaves()
    given = (*leaves, case.low, case.high, case.kept, case.u)
    torch.library.opcheck(torch.ops.pyro_bmrs.draw.default, given)
    drawn = torch.ops.pyro_bmrs.draw(*(t.detach() for t in given))
    gradients = torch.rand_like(drawn[0]), torch.tensor(0.7, dtype=torch.float64), *drawn[2:], torch.float64
    torch.library.opcheck(torch.ops.pyro_bmrs.gradients.default, gradients)
    cpu = torch.device("cpu")
    for strata in (list(_strata(16, cpu)), []):
        # what it gives is random, which other checks would compare
        checks = "test_schema", "test_faketensor"
        torch.library.opcheck(torch.ops.pyro_bmrs.uniforms.default, (strata, 16, 5, cpu), test_utils=checks)


# the probabilities --------------------------------------------------------------------------------------

DRAWS = [1, 2, 3, 6, 7, 16, 100]


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("lowest", [0.0, 1 - 2.0**-53, None])
def test_uniforms_lie_strictly_inside(draws, stratified, lowest, monkeypatch):
    """Also where the generator gives its very first or its very last number."""
    if lowest is not None:
        monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, lowest, **options))
    torch.manual_seed(0)
    u = uniforms(draws, 50, stratified=stratified)
    assert u.shape == (draws, 50)
    assert u.dtype == torch.float64
    assert bool(((u >= NEAREST) & (u <= 1 - NEAREST)).all())


@pytest.mark.parametrize("draws", DRAWS)
def test_one_draw_in_each_cell(draws):
    """Of every unit. A draw that rounding moves across an edge: below 1e-11 in all."""
    torch.manual_seed(1)
    u = uniforms(draws, 300, stratified=True)
    cells = (draws * u).floor().sort(0).values
    assert torch.equal(cells, torch.arange(draws, dtype=torch.float64).unsqueeze(1).expand(draws, 300))
    if draws > 3:
        assert not torch.equal((draws * uniforms(draws, 300, stratified=False)).floor().sort(0).values, cells)
        # units go through the cells in different orders
        orders = {
            tuple(((draws * u[:, unit]).floor() - (draws * u[0, unit]).floor()) % draws) for unit in range(99)
        }
        assert len({tuple(map(float, order)) for order in orders}) > 1


# One test that fails falsely once in 1e6; there are fewer than 100 below.
RARE = 1e-6


@pytest.mark.parametrize("draws", [1, 5, 16])
@pytest.mark.parametrize("stratified", [True, False])
def test_each_draw_is_uniform(draws, stratified):
    """Kolmogorov's distance at each fixed b; false-alarm rate below 1e-6 each by the inequality of
    Dvoretzky, Kiefer and Wolfowitz, 44 distances.
    """
    torch.manual_seed(2)
    units = 20000
    u = uniforms(draws, units, stratified=stratified).sort(1).values
    steps = torch.arange(units, dtype=torch.float64)
    distance = torch.maximum((steps + 1) / units - u, u - steps / units).amax(1)
    assert bool((distance < math.sqrt(math.log(2 / RARE) / (2 * units))).all()), distance


@pytest.mark.parametrize("draws", [1, 6, 16])
@pytest.mark.parametrize("stratified", [True, False])
def test_units_are_independent_of_each_other_at_each_draw(draws, stratified):
    """χ² of 4 × 4 cells for pairs of units at fixed b; false-alarm rate 1e-6 each, 36 pairs in all."""
    from scipy.stats import chi2

    torch.manual_seed(3)
    repeats = 3000
    u = torch.stack([uniforms(draws, 4, stratified=stratified) for _ in range(repeats)])
    cells = (4 * u).long()  # (repeats, draws, units)
    for b in {0, draws // 2, draws - 1}:
        for one, other in ((0, 1), (0, 3), (1, 2)):
            counts = torch.bincount(4 * cells[:, b, one] + cells[:, b, other], minlength=16).double()
            statistic = float(((counts - repeats / 16) ** 2 / (repeats / 16)).sum())
            assert statistic < chi2.isf(RARE, 15), (b, one, other, statistic)


def test_the_average_over_stratified_draws_keeps_its_expectation_and_loses_variance():
    """Of θ itself: a z-test at 4.9 (1e-6) for the mean, and less variance than independent draws: a
    seventh by (f(1) - f(0))²/(12 draws²), against Var f/draws.
    """
    torch.manual_seed(4)
    units, draws = 4000, 16
    q = TruncatedLogNormal(torch.tensor(-2.0).double(), torch.tensor(1.0).double())
    means = {
        stratified: q.icdf(uniforms(draws, units, stratified=stratified)).mean(0)
        for stratified in (True, False)
    }
    for sample in means.values():
        assert abs(float(sample.mean() - q.mean)) < 4.9 * float(sample.std()) / math.sqrt(units)
    assert float(means[True].var()) < 0.3 * float(means[False].var())
