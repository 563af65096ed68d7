"""The truth about a truncated normal in 150-digit arithmetic: slow, literal, unlike the library's forms.

Every formula is the definition (paper.md section 1); precision, not algebra, is what makes it right in
the tails: at the corner of the box log Z is near -10²¹, and 150 digits leave more than a hundred.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from mpmath.ctx_mp import MPContext

mp = MPContext()  # a context of our own: nobody else's precision is touched
mp.dps = 150

GOLDEN = Path(__file__).parents[1] / "golden" / "truncated_log_normal.csv"


def golden_rows() -> list[dict[str, str]]:
    with GOLDEN.open(newline="") as file:
        return list(csv.DictReader(file))


def golden_points() -> list[dict[str, str]]:
    """The rows with distinct parameters, without regard to u."""
    points = {tuple(row[k] for k in ("loc", "scale", "low", "high")): row for row in golden_rows()}
    return list(points.values())


def number(value):
    """An exact mpf from a float (its binary value) or a string (its decimal value)."""
    return mp.mpf(value)


def density(z):
    """φ(z)."""
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


def survival(z):
    """1 - Φ(z)."""
    return mp.erfc(z / mp.sqrt(2)) / 2


def inverse_survival(t):
    """The z with 1 - Φ(z) = t: Newton on log survival, concave, from a point right of the root."""
    if t > 0.5:
        return -inverse_survival(1 - t)
    z = mp.sqrt(-2 * mp.log(2 * t))
    for _ in range(60):
        here = survival(z)
        step = mp.log(here / t) * here / density(z)
        z += step
        if abs(step) <= mp.mpf(10) ** (-mp.dps + 25) * (1 + abs(z)):
            return z
    raise ArithmeticError(f"no convergence at t={t}")


def mass_between(a, b):
    """Φ(b) - Φ(a), b > a, to full relative precision."""
    if a > 0:
        return survival(a) - survival(b)
    if b < 0:
        return survival(-b) - survival(-a)
    return 1 - survival(-a) - survival(b)


class Law:
    """x ~ Normal(loc, scale²) restricted to [low, high], and θ = eˣ."""

    def __init__(self, loc, scale, low=-20, high=0):
        self.loc, self.scale, self.low, self.high = (mp.mpf(v) for v in (loc, scale, low, high))
        self.alpha = (self.low - self.loc) / self.scale
        self.beta = (self.high - self.loc) / self.scale

    @cached_property
    def mass(self):
        return mass_between(self.alpha, self.beta)

    def log_z(self):
        return mp.log(self.mass)

    def log_density(self, x):
        z = (mp.mpf(x) - self.loc) / self.scale
        return -z * z / 2 - mp.log(2 * mp.pi) / 2 - mp.log(self.scale) - self.log_z()

    def cdf(self, x):
        return mass_between(self.alpha, (mp.mpf(x) - self.loc) / self.scale) / self.mass

    def entropy(self):
        """Of x = log θ."""
        edges = self.alpha * density(self.alpha) - self.beta * density(self.beta)
        return mp.log(self.scale * mp.sqrt(2 * mp.pi * mp.e)) + self.log_z() + edges / (2 * self.mass)

    def kl_uniform(self):
        return mp.log(self.high - self.low) - self.entropy()

    def mean_of_x(self):
        return self.loc + self.scale * (density(self.alpha) - density(self.beta)) / self.mass

    def variance_of_x(self):
        near, far = density(self.alpha) / self.mass, density(self.beta) / self.mass
        return self.scale**2 * (1 + self.alpha * near - self.beta * far - (near - far) ** 2)

    def snr_of_x(self):
        return self.mean_of_x() / mp.sqrt(self.variance_of_x())

    def moment(self, order: int):
        """E[θᵏ]."""
        shift = order * self.scale
        tilted = mass_between(self.alpha - shift, self.beta - shift)
        return mp.exp(order * self.loc + shift**2 / 2) * tilted / self.mass

    def log_mean(self):
        return mp.log(self.moment(1))

    def variance(self):
        return self.moment(2) - self.moment(1) ** 2

    def snr(self):
        return self.moment(1) / mp.sqrt(self.variance())

    def quantile(self, u):
        u = mp.mpf(u)
        if self.alpha + self.beta >= 0:  # the lower bound is the nearer one
            target = (1 - u) * survival(self.alpha) + u * survival(self.beta)
            return self.loc + self.scale * inverse_survival(target)
        target = (1 - u) * survival(-self.alpha) + u * survival(-self.beta)
        return self.loc - self.scale * inverse_survival(target)

    def quantile_derivatives(self, u):
        """∂x/∂loc and ∂x/∂scale at fixed u, from F(x; loc, scale) = u by the implicit function theorem."""
        u = mp.mpf(u)
        z = (self.quantile(u) - self.loc) / self.scale
        low, high = (1 - u) * density(self.alpha), u * density(self.beta)
        return 1 - (low + high) / density(z), z - (self.alpha * low + self.beta * high) / density(z)


def numeric_gradient(function: Callable[[Law], object], loc, scale, low=-20, high=0):
    """(∂/∂loc, ∂/∂scale) by central differences with a step of 10⁻³⁰ scales: exact to some 50 digits."""
    loc, scale = mp.mpf(loc), mp.mpf(scale)
    step = scale * mp.mpf(10) ** -30
    return (
        (function(Law(loc + step, scale, low, high)) - function(Law(loc - step, scale, low, high)))
        / (2 * step),
        (function(Law(loc, scale + step, low, high)) - function(Law(loc, scale - step, low, high)))
        / (2 * step),
    )
