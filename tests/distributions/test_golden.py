"""Every row of golden/truncated_log_normal.csv in float64; in float32, 150 digits at the rounded inputs."""

from __future__ import annotations

import pytest
import torch
from reference import Law, golden_points, golden_rows, mp
from torch.distributions import kl_divergence

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal

ROWS = golden_rows()
PARAMETERS = ("loc", "scale", "low", "high")
NAMES = ("log_z", "entropy_log", "kl_loguniform", "log_mean", "variance", "snr")
# float32: the rows within the stated range, u apart
NARROW_ROWS = [row for row in ROWS if 0.01 <= float(row["u"]) <= 0.99 and float(row["scale"]) >= 1e-4]


def column(name: str, rows=ROWS, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor([float(row[name]) for row in rows], dtype=dtype)


def at_rows(rows, dtype) -> tuple[TruncatedNormal, TruncatedLogNormal, LogUniform]:
    loc, scale, low, high = (column(name, rows, dtype) for name in PARAMETERS)
    loc.requires_grad_(), scale.requires_grad_()
    return (
        TruncatedNormal(loc, scale, low, high),
        TruncatedLogNormal(loc, scale, low, high),
        LogUniform(low, high),
    )


def computed(name: str, x: TruncatedNormal, theta: TruncatedLogNormal, prior: LogUniform) -> torch.Tensor:
    value = {
        "log_z": lambda: x.log_mass(),
        "entropy_log": lambda: x.entropy(),
        "kl_loguniform": lambda: kl_divergence(theta, prior),
        "log_mean": lambda: theta.log_mean(),
        "variance": lambda: theta.variance,
        "snr": lambda: theta.snr,
    }[name]()
    return value.detach()


def assert_within(value: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor, rows) -> None:
    excess = (value.double() - truth).abs() / bound
    worst = int(torch.where(torch.isnan(excess), torch.inf, excess).argmax())
    assert bool((excess <= 1).all()), (
        f"{int((~(excess <= 1)).sum())} of {len(rows)} rows miss; worst, {float(excess[worst]):.3g} bounds: "
        f"{float(value[worst])!r} for {float(truth[worst])!r} at {rows[worst]}"
    )


def gradient_bound(truth: torch.Tensor, other: torch.Tensor, relative: float) -> torch.Tensor:
    """Relative; an absolute 1e-12 only where the truth is below 1e-9 of the row's largest gradient."""
    largest = torch.maximum(truth.abs(), other.abs())
    negligible = truth.abs() < 1e-9 * largest
    return torch.where(negligible, (relative * truth.abs()).clamp(min=1e-12), relative * truth.abs())


def nearer_bound(x: torch.Tensor, rows) -> torch.Tensor:
    return torch.minimum((x - column("low", rows)).abs(), (column("high", rows) - x).abs())


def gradients(value: torch.Tensor, q: TruncatedNormal) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value.sum(), (q.loc, q.scale))


def test_the_file_has_every_row():
    assert len(ROWS) == 156
    assert len(golden_points()) == 76
    assert len(NARROW_ROWS) >= 50


@pytest.mark.slow
def test_the_reference_agrees_with_the_file():
    """The independent 150-digit arithmetic gives the file's 25 digits at the file's decimal inputs."""
    for row in ROWS:
        law = Law(*(row[name] for name in PARAMETERS))
        d_loc, d_scale = law.quantile_derivatives(row["u"])
        for name, value in (
            ("log_z", law.log_z()),
            ("entropy_log", law.entropy()),
            ("kl_loguniform", law.kl_uniform()),
            ("mean", law.moment(1)),
            ("variance", law.variance()),
            ("snr", law.snr()),
            ("icdf_log", law.quantile(row["u"])),
            ("d_icdf_d_loc", d_loc),
            ("d_icdf_d_scale", d_scale),
        ):
            truth = mp.mpf(row[name])
            # a derivative that vanishes by symmetry is printed as the noise of 120 digits
            assert abs(value - truth) <= max(abs(truth) * mp.mpf(10) ** -23, mp.mpf(10) ** -90), (name, row)


@pytest.mark.parametrize("name", NAMES)
def test_moments_and_divergences(name):
    truth = column("mean").log() if name == "log_mean" else column(name)
    relative = name in ("variance", "snr")
    bound = 1e-6 * truth.abs() if relative else 1e-10 * truth.abs().clamp(min=1.0)
    assert_within(computed(name, *at_rows(ROWS, torch.float64)), truth, bound, ROWS)


def test_mean_is_the_exponential_of_its_logarithm():
    _, theta, _ = at_rows(ROWS, torch.float64)
    truth = column("mean").log()
    assert_within(theta.mean.detach().log(), truth, 1e-10 * truth.abs().clamp(min=1.0), ROWS)


def test_quantile():
    x, theta, _ = at_rows(ROWS, torch.float64)
    u, truth = column("u"), column("icdf_log")
    relative = torch.where(u == 1 - 1e-7, 1e-8, 1e-10)
    bound = relative * torch.maximum(truth.abs(), nearer_bound(truth, ROWS))
    assert_within(x.icdf(u).detach(), truth, bound, ROWS)
    # θ = eˣ, whose relative error is the error of x
    assert_within(theta.icdf(u).detach(), truth.exp(), (bound + 1e-15) * truth.exp(), ROWS)


@pytest.mark.parametrize("space", ["log θ", "θ"])
def test_reparameterisation_gradients(space):
    x, theta, _ = at_rows(ROWS, torch.float64)
    u = column("u")
    if space == "log θ":
        found = gradients(x.icdf(u), x)
    else:
        sample = theta.icdf(u)
        found = tuple(g / sample.detach() for g in gradients(sample, x))
    truths = column("d_icdf_d_loc"), column("d_icdf_d_scale")
    for value, truth, other in zip(found, truths, truths[::-1], strict=True):
        assert_within(value, truth, gradient_bound(truth, other, 1e-6), ROWS)


def rounded_laws() -> list[Law]:
    return [Law(*(float(column(k, [row], torch.float32)) for k in PARAMETERS)) for row in NARROW_ROWS]


def test_float32_moments_and_divergences():
    laws, q = rounded_laws(), at_rows(NARROW_ROWS, torch.float32)
    reference = {
        "log_z": Law.log_z,
        "entropy_log": Law.entropy,
        "kl_loguniform": Law.kl_uniform,
        "log_mean": Law.log_mean,
        "variance": Law.variance,
        "snr": Law.snr,
    }
    for name in NAMES:
        value = computed(name, *q)
        assert value.dtype == torch.float32
        truth = torch.tensor([float(reference[name](law)) for law in laws], dtype=torch.float64)
        size = truth.abs() if name in ("variance", "snr") else truth.abs().clamp(min=1.0)
        assert_within(value, truth, 1e-4 * size, NARROW_ROWS)
    mean = torch.tensor([float(law.moment(1)) for law in laws], dtype=torch.float64)
    assert_within(q[1].mean.detach(), mean, 1e-4 * mean, NARROW_ROWS)


def test_float32_quantile_and_its_gradients():
    laws, (x, theta, _) = rounded_laws(), at_rows(NARROW_ROWS, torch.float32)
    u = column("u", NARROW_ROWS, torch.float32)
    truth = torch.tensor(
        [float(law.quantile(p)) for law, p in zip(laws, u.tolist(), strict=True)], dtype=torch.float64
    )
    slopes = [law.quantile_derivatives(p) for law, p in zip(laws, u.tolist(), strict=True)]
    quantile, sample = x.icdf(u), theta.icdf(u)
    assert quantile.dtype == sample.dtype == torch.float32
    bound = 1e-4 * torch.maximum(truth.abs(), nearer_bound(truth, NARROW_ROWS))
    assert_within(quantile.detach(), truth, bound, NARROW_ROWS)
    assert_within(sample.detach(), truth.exp(), 1e-4 * truth.exp(), NARROW_ROWS)

    truths = [torch.tensor([float(s[i]) for s in slopes], dtype=torch.float64) for i in (0, 1)]
    direct = gradients(quantile, x)
    through_theta = tuple(g / sample.detach() for g in gradients(sample, x))
    for found in (direct, through_theta):
        for value, truth_of_slope, other in zip(found, truths, truths[::-1], strict=True):
            assert_within(value, truth_of_slope, gradient_bound(truth_of_slope, other, 1e-4), NARROW_ROWS)
