"""Arithmetic of a normal distribution restricted to an interval, accurate far into both tails.

Every function takes the normal's loc and scale before truncation and the two bounds. All arithmetic is in
float64, whatever the inputs are: a difference of Φ underflows at 5.4 standard deviations in float32 and
at 8.3 in float64, and the literal `log Z` cancels against the quadratic beside it long before.

There are two ideas.

*The near edge.* The edge is the bound nearer to the mass, and all is measured from it. Let
α be the signed distance, in standard deviations, from `loc` to that bound, and β to the other one. Then α ≤ β,
and α > 0 means that `loc` lies outside the interval. The mirror image needs no second formula.

*The anchor.* On the interval the normal's density is largest at the anchor
max(α, 0). Log-masses are stored relative to it,

    K = log Z + max(α, 0)²/2,    Z = Φ(β) - Φ(α),

so that two of them can be subtracted. For α > 0, K = log(½ erfcx(α/√2)) + (far edge) is of size log α,
while log Z is of size α²/2.

Beyond α = 8 the differences λ - α (λ the inverse Mills ratio) and the moments of the excess
S = (x - bound)/scale come from the continued fraction r_n = n / (α + r_{n+1}) of the ratios
r_n = E[Sⁿ]/E[Sⁿ⁻¹]. All its terms are positive (Abramowitz & Stegun 7.1.14; the recurrence of
repeated integrals of erfc, 7.2.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
SQRT_HALF_PI = math.sqrt(math.pi / 2)
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)

# Above this α the continued fraction replaces the direct formulas. At 8 these still have 13 digits,
# and the fraction reaches the last bit with the depths below.
TAIL = 8.0
MOMENT_DEPTH = 18
MILLS_DEPTH = 14
# Above this α, Φ(-α) underflows in float64, and a few terms of the asymptotic series reach single precision.
FAR = 37.0
# Below this standard deviation of x, two cumulants give log E[θ²] - 2 log E[θ] to 2e-7, relative.
NARROW = 2e-4
# Below this standard deviation of order · x, two cumulants give the derivatives of log E[exp(order · x)]
# to 1e-8, relative. Above it a difference of moments does.
NARROW_TILT = 1e-4
# exp of anything smaller is nearly zero in float64; clamping there keeps 0 · inf out of products.
EXPONENT_FLOOR = -700.0


class _AttachDerivatives(torch.autograd.Function):
    """`value` with the given derivatives, instead of those of its computation."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_derivatives: Tensor) -> Tensor:
        half = len(inputs_and_derivatives) // 2
        ctx.shapes = [x.shape for x in inputs_and_derivatives[:half]]
        ctx.save_for_backward(*inputs_and_derivatives[half:])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            (grad * derivative).sum_to_size(shape) if needed else None
            for derivative, shape, needed in zip(
                ctx.saved_tensors, ctx.shapes, ctx.needs_input_grad[1:], strict=False
            )
        ]
        return (None, *gradients, *(None for _ in gradients))


def attach_derivatives(value: Tensor, derivatives: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`value` with d value / d input given for each (input, derivative); all broadcast with `value`."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x, _ in derivatives)):
        return value
    inputs, slopes = zip(*derivatives, strict=True)
    result: Tensor = _AttachDerivatives.apply(value, *inputs, *slopes)
    return result


def _in_float64[Result](function: Callable[..., Result]) -> Callable[..., Result]:
    @wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Result:
        return function(*(a.double() if isinstance(a, Tensor) else a for a in arguments), **options)

    return wrapper


class NearFrame(NamedTuple):
    """α and β from the near edge, and whether that edge is the lower bound."""

    alpha: Tensor
    beta: Tensor
    from_low: Tensor


def near_frame(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> NearFrame:
    """The frame of the bound nearer to the mass. All arguments broadcast."""
    below, above = (low - loc) / scale, (loc - high) / scale
    from_low = below >= above
    return NearFrame(
        alpha=torch.where(from_low, below, above),
        beta=torch.where(from_low, -above, -below),
        from_low=from_low,
    )


def _occurs(mask: Tensor) -> bool:
    """Whether a branch is needed. Always True on accelerators, where reading the mask costs more than the branch."""
    return mask.device.type != "cpu" or bool(mask.any())


def _mills_ratio(a: Tensor) -> Tensor:
    """R(a) = (1 - Φ(a)) / φ(a), for a ≥ 0."""
    scaled: Tensor = torch.special.erfcx(a * SQRT_HALF)
    return SQRT_HALF_PI * scaled


def _density(z: Tensor) -> Tensor:
    return torch.exp((-0.5 * z * z).clamp(min=EXPONENT_FLOOR) - LOG_SQRT_2PI)


def _excess_ratios(a: Tensor, order: int, depth: int) -> list[Tensor]:
    """[r_1, …, r_order], r_n = E[Sⁿ]/E[Sⁿ⁻¹] for density ∝ exp(-a s - s²/2) on s > 0; a ≥ TAIL."""
    ratio = 0.5 * (torch.sqrt(a * a + 4 * (depth + 1)) - a)
    ratios: list[Tensor] = []
    for n in range(depth, 0, -1):
        ratio.add_(a).reciprocal_().mul_(n)  # in place: this loop is most of the cost of a draw
        if n <= order:
            ratios.append(ratio.clone() if n > 1 else ratio)
    return ratios[::-1]


def _mills_deficit(a: Tensor) -> Tensor:
    """T(a) = 1 - a R(a) = R(a) E[S], accurate relative to itself; a ≥ TAIL."""
    (ratio,) = _excess_ratios(a, 1, MILLS_DEPTH)
    return ratio / (a + ratio)


class _EdgeTerms(NamedTuple):
    """The contributions of the two bounds, with λ_α = φ(α)/Z and λ_β = φ(β)/Z."""

    log_mass: Tensor  # K
    near_excess: Tensor  # λ_α - max(α, 0)
    far: Tensor  # λ_β


def _edge_terms(alpha: Tensor, beta: Tensor) -> _EdgeTerms:
    outside = alpha > 0
    a = alpha.clamp(min=0.0)
    # outside the interval: everything relative to the density at the near edge
    decay = torch.exp((-0.5 * (beta - a) * (beta + a)).clamp(min=EXPONENT_FLOOR))
    near_ratio, far_ratio = _mills_ratio(a), _mills_ratio(beta.clamp(min=0.0))
    mass = near_ratio - far_ratio * decay
    deficit = 1 - a * near_ratio
    if _occurs(a > TAIL):
        deficit = torch.where(a > TAIL, _mills_deficit(a.clamp(min=TAIL)), deficit)
    tail_log_mass = torch.log(near_ratio) + torch.log1p(-decay * far_ratio / near_ratio) - LOG_SQRT_2PI
    # inside: the mass is a sum of two positive parts, or 1 minus two small tails
    b = alpha.clamp(max=0.0)
    tails = 0.5 * (torch.erfc(-b * SQRT_HALF) + torch.erfc(beta * SQRT_HALF))
    inner = 0.5 * (torch.erf(beta * SQRT_HALF) - torch.erf(b * SQRT_HALF))
    inner = torch.where(outside, 1.0, inner)
    inner_log_mass = torch.where(inner > 0.5, torch.log1p(-tails.clamp(max=0.75)), torch.log(inner))
    return _EdgeTerms(
        log_mass=torch.where(outside, tail_log_mass, inner_log_mass),
        near_excess=torch.where(outside, (deficit + a * far_ratio * decay) / mass, _density(b) / inner),
        far=torch.where(outside, decay / mass, _density(beta) / inner),
    )


class _Moments(NamedTuple):
    """Central moments of the standardised variable z in the near frame."""

    variance: Tensor
    third: Tensor
    covariance_with_square: Tensor  # Cov(z, z²)
    variance_of_square: Tensor  # Var(z²)
    third_with_square: Tensor  # the joint cumulant κ(z, z, z²) = Var((z - E z)²) + 2 E[z] κ(z, z, z)


def _moments(alpha: Tensor, beta: Tensor, edges: _EdgeTerms) -> _Moments:
    # up to TAIL: raw moments by parts, m_n = (n-1) m_{n-2} + αⁿ⁻¹ λ_α - βⁿ⁻¹ λ_β
    a = alpha.clamp(max=TAIL)
    near, far = edges.near_excess + a.clamp(min=0.0), edges.far
    m1 = near - far
    m2 = 1 + a * near - beta * far
    m3 = 2 * m1 + a**2 * near - beta**2 * far
    m4 = 3 * m2 + a**3 * near - beta**3 * far
    direct = _Moments(
        variance=m2 - m1**2,
        third=m3 - 3 * m1 * m2 + 2 * m1**3,
        covariance_with_square=m3 - m1 * m2,
        variance_of_square=m4 - m2**2,
        third_with_square=m4 - m2**2 - 2 * m1 * (m3 - m1 * m2),
    )
    if not _occurs(alpha > TAIL):
        return direct
    tail = _tail_moments(alpha.clamp(min=TAIL), beta)
    return _Moments(*(torch.where(alpha > TAIL, t, d) for t, d in zip(tail, direct, strict=True)))


def _tail_moments(a: Tensor, beta: Tensor) -> _Moments:
    """From the moments of the excess s over the near edge, minus those past the far edge; a ≥ TAIL."""
    b = torch.maximum(beta, a)
    width = b - a
    decay = torch.exp((-0.5 * width * (b + a)).clamp(min=EXPONENT_FLOOR))
    near_raw, far_raw = [_mills_ratio(a)], [_mills_ratio(b)]
    for ratio in _excess_ratios(a, 4, MOMENT_DEPTH):
        near_raw.append(near_raw[-1] * ratio)
    for ratio in _excess_ratios(b, 4, MOMENT_DEPTH):
        far_raw.append(far_raw[-1] * ratio)
    # where the decay is zero in the result, width⁴ must not overflow
    gap = torch.where(decay > 1e-300, width, 0.0)
    raw = [
        near_raw[n] - decay * sum(math.comb(n, k) * gap ** (n - k) * far_raw[k] for k in range(n + 1))
        for n in range(5)
    ]
    s1, s2, s3, s4 = (moment / raw[0] for moment in raw[1:])
    variance, skew, third = s2 - s1**2, s3 - s1 * s2, s3 - 3 * s1 * s2 + 2 * s1**3
    return _Moments(
        variance=variance,
        third=third,
        covariance_with_square=2 * a * variance + skew,
        variance_of_square=4 * a**2 * variance + 4 * a * skew + s4 - s2**2,
        third_with_square=s4 - s2**2 - 2 * s1 * skew + 2 * a * third,
    )


@_in_float64
def anchored_log_mass(alpha: Tensor, beta: Tensor) -> Tensor:
    """K = log(Φ(β) - Φ(α)) + max(α, 0)²/2 in nats, differentiable in α and β; |α| ≤ β."""
    with torch.no_grad():
        edges = _edge_terms(alpha, beta)
    return attach_derivatives(edges.log_mass, [(alpha, -edges.near_excess), (beta, edges.far)])


@_in_float64
def log_mass(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """log Z = log(Φ((high-loc)/scale) - Φ((low-loc)/scale)), in nats."""
    frame = near_frame(loc, scale, low, high)
    anchor = frame.alpha.clamp(min=0.0)
    return anchored_log_mass(frame.alpha, frame.beta) - 0.5 * anchor * anchor


@_in_float64
def log_integral_from(
    reference_minus_loc: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """log ∫ exp(-((x - loc)² - (e - loc)²) / 2 scale²) dx over [low, high], with e the reference point.

    This is the integral of the bell relative to its height at e. Sums of such terms at one common e cancel no
    quadratics. The evidence is computed from them.
    """
    frame = near_frame(loc, scale, low, high)
    # from loc to the point of [low, high] where the density is largest
    anchor = torch.minimum(torch.maximum(torch.zeros_like(loc), low - loc), high - loc)
    quadratic = (reference_minus_loc - anchor) * (reference_minus_loc + anchor) / (2 * scale**2)
    return quadratic + anchored_log_mass(frame.alpha, frame.beta) + torch.log(scale) + LOG_SQRT_2PI


@_in_float64
def log_density(x: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log-density at x in [low, high], in nats. x is not checked."""
    frame = near_frame(loc, scale, low, high)
    outside = frame.alpha > 0
    z = (x - loc) / scale
    excess = torch.where(frame.from_low, x - low, high - x) / scale
    # (z² - α²)/2 without the cancellation; inside the interval simply z²/2
    quadratic = torch.where(outside, excess * (frame.alpha + 0.5 * excess), 0.5 * z * z)
    return -quadratic - anchored_log_mass(frame.alpha, frame.beta) - torch.log(scale) - LOG_SQRT_2PI


@_in_float64
@torch.no_grad()
def entropy_with_slopes(
    loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differential entropy of x in nats, ∂/∂loc = Cov(z, z²)/(2 scale) and ∂/∂scale = Var(z²)/(2 scale)."""
    alpha, beta, from_low = near_frame(loc, scale, low, high)
    edges = _edge_terms(alpha, beta)
    moments = _moments(alpha, beta, edges)
    value = (
        torch.log(scale)
        + edges.log_mass
        + LOG_SQRT_2PI
        + 0.5
        + 0.5 * (alpha * edges.near_excess - beta * edges.far)
    )
    sign = torch.where(from_low, 1.0, -1.0)
    d_loc = sign * moments.covariance_with_square / (2 * scale)
    d_scale = moments.variance_of_square / (2 * scale)
    return value, d_loc, d_scale


@_in_float64
def entropy(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Differential entropy of x in nats, differentiable in loc and scale."""
    value, d_loc, d_scale = entropy_with_slopes(loc, scale, low, high)
    return attach_derivatives(value, [(loc, d_loc), (scale, d_scale)])


@_in_float64
def mean_from(point: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """E[x] - point, without rounding to the size of x; `point` is a constant."""
    alpha, beta, from_low = near_frame(loc, scale, low, high)
    with torch.no_grad():
        edges = _edge_terms(alpha, beta)
        moments = _moments(alpha, beta, edges)
        shift = edges.near_excess - edges.far  # (E[z] - anchor) in the near frame
        edge = torch.where(from_low, low, high)
        sign = torch.where(from_low, 1.0, -1.0)
        value = (torch.where(alpha > 0, edge, loc) - point) + sign * scale * shift
        value = torch.minimum(torch.maximum(value, low - point), high - point)
        d_scale = sign * moments.covariance_with_square
    # ∂E[x]/∂loc = Var(z), ∂E[x]/∂scale = Cov(z, z²): cumulants of an exponential family
    return attach_derivatives(value, [(loc, moments.variance), (scale, d_scale)])


def mean(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """E[x]."""
    return mean_from(torch.zeros_like(loc), loc, scale, low, high)


@_in_float64
def variance(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Var(x): ∂/∂loc = κ(x, x, x)/scale² and ∂/∂scale = κ(x, x, (x - loc)²)/scale³, with joint cumulants κ."""
    with torch.no_grad():
        alpha, beta, from_low = near_frame(loc, scale, low, high)
        moments = _moments(alpha, beta, _edge_terms(alpha, beta))
        d_loc = torch.where(from_low, 1.0, -1.0) * scale * moments.third
        value, d_scale = scale**2 * moments.variance, scale * moments.third_with_square
    return attach_derivatives(value, [(loc, d_loc), (scale, d_scale)])


@_in_float64
def squared_distance(point: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """E[(x - point)²], differentiable in loc and scale; `point` is a constant."""
    with torch.no_grad():
        alpha, beta, from_low = near_frame(loc, scale, low, high)
        moments = _moments(alpha, beta, _edge_terms(alpha, beta))
        value = scale**2 * moments.variance + mean_from(point, loc, scale, low, high) ** 2
        covariance = torch.where(from_low, 1.0, -1.0) * moments.covariance_with_square
        d_loc = scale * covariance + 2 * (loc - point) * moments.variance
        d_scale = scale * moments.variance_of_square + 2 * (loc - point) * covariance
    return attach_derivatives(value, [(loc, d_loc), (scale, d_scale)])


@_in_float64
def log_exponential_moment(order: int, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """log E[exp(order · x)], in nats: E[θᵏ] = exp(kμ + k²σ²/2) Z(μ + kσ²)/Z(μ), at a common reference.

    Let E_k be the expectation under the density tilted by exp(k x). Then ∂/∂loc = (E_k[x] - E[x])/scale² and
    ∂/∂scale = (E_k[(x - loc)²] - E[(x - loc)²])/scale³. Both are computed from the anchors, or from two cumulants
    where the distribution is so narrow that the tilt hardly moves it.
    """
    differentiable = torch.is_grad_enabled() and (loc.requires_grad or scale.requires_grad)
    with torch.no_grad():
        tilt = order * scale**2
        tilted_from_low = near_frame(loc + tilt, scale, low, high).from_low
        # (low - loc - k scale²)/scale; adding k scale² to loc first would round it away
        shift = torch.where(tilted_from_low, 1.0, -1.0) * order * scale
        below, above = (low - loc) / scale, (loc - high) / scale
        tilted = NearFrame(
            alpha=torch.where(tilted_from_low, below, above) - shift,
            beta=torch.where(tilted_from_low, -above, -below) - shift,
            from_low=tilted_from_low,
        )
        plain = near_frame(loc, scale, low, high)
        start = torch.minimum(torch.maximum(torch.zeros_like(tilt), low - loc), high - loc)
        end = torch.minimum(torch.maximum(tilt, low - loc), high - loc)
        tilted_edges, edges = (_edge_terms(frame.alpha, frame.beta) for frame in (tilted, plain))
        travelled = (end - start) * (end + start)
        value = order * (loc + end) - travelled / (2 * scale**2) + tilted_edges.log_mass - edges.log_mass
        if not differentiable:
            return value

        tilted_sign, sign = (torch.where(frame.from_low, 1.0, -1.0) for frame in (tilted, plain))
        moments, tilted_moments = (
            _moments(frame.alpha, frame.beta, e) for frame, e in ((plain, edges), (tilted, tilted_edges))
        )
        # E[z] minus the anchor, in the near frame
        step, tilted_step = (e.near_excess - e.far for e in (edges, tilted_edges))
        spread, tilted_spread = moments.variance + step**2, tilted_moments.variance + tilted_step**2
        moved = (end - start) / scale + tilted_sign * tilted_step - sign * step
        leverage = end * tilted_sign * tilted_step - start * sign * step
        narrow = order * scale * moments.variance.clamp(min=0.0).sqrt() < NARROW_TILT
        half = 0.5 * order * scale
        d_loc = torch.where(narrow, order * (moments.variance + half * sign * moments.third), moved / scale)
        d_scale = torch.where(
            narrow,
            order * (sign * moments.covariance_with_square + half * moments.third_with_square),
            (travelled / scale**2 + 2 * leverage / scale + tilted_spread - spread) / scale,
        )
    return attach_derivatives(value, [(loc, d_loc), (scale, d_scale)])


@_in_float64
def squared_coefficient_of_variation(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Var(θ)/E[θ]² for θ = exp(x): expm1(log E[θ²] - 2 log E[θ]), or from two cumulants of x where it is narrow.

    There the gradient is that of Var(x) alone, with a relative error of a few NARROW.
    """
    with torch.no_grad():
        alpha, beta, from_low = near_frame(loc, scale, low, high)
        moments = _moments(alpha, beta, _edge_terms(alpha, beta))
        sign = torch.where(from_low, 1.0, -1.0)
        spread = scale**2 * moments.variance
        narrow = spread < NARROW**2
        skew = sign * scale**3 * moments.third
        # ∂Var(x)/∂loc = κ₃(x)/scale², ∂Var(x)/∂scale = κ(x, x, (x - loc)²)/scale³
        slopes = [(loc, sign * scale * moments.third), (scale, scale * moments.third_with_square)]
    log_ratio = log_exponential_moment(2, loc, scale, low, high) - 2 * log_exponential_moment(
        1, loc, scale, low, high
    )
    return torch.expm1(torch.where(narrow, attach_derivatives(spread + skew, slopes), log_ratio))


def _edge_series(mass: Tensor, alpha: Tensor) -> Tensor:
    """The s with ∫₀ˢ exp(-α t - t²/2) dt = mass, if mass · max(1, |α|) is below 1e-3."""
    a2, am = alpha * alpha, alpha * mass
    m2 = mass * mass
    # a₁ … a₅ of the reverted series, in powers of the mass
    return mass * (
        1
        + am / 2
        + (2 * am * am + m2) / 6
        + am * (6 * am * am + 7 * m2) / 24
        + (m2 * m2 * (24 * a2 * a2 + 46 * a2 + 7)) / 120
    )


class Quantile(NamedTuple):
    value: Tensor
    d_loc: Tensor
    d_scale: Tensor


def _implicit_derivatives(
    s: Tensor, z: Tensor, u: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of the quantile at fixed probability u, in the frame of its edge.

    With e_z = φ(β)/φ(z): ∂x/∂loc = 1 - (1-u) φ(α)/φ(z) - u e_z and
    ∂x/∂scale = z - (1-u) α φ(α)/φ(z) - u β e_z. Beyond TAIL the first is a difference of Mills ratios,
    [R_α - R_z - e_z (R_α - R_β) + e_α (R_z - R_β)] / (R_α - R_β e_α), taken from T = 1 - a R(a).
    """
    q = 0.5 * (z - alpha) * (z + alpha)
    q = torch.where(alpha > 0, s * (alpha + 0.5 * s), q).clamp(min=EXPONENT_FLOOR, max=-EXPONENT_FLOOR)
    gap = torch.where(alpha > 0, (beta - alpha) - s, beta - z).clamp(min=0.0)
    r = (-0.5 * gap * (beta + z)).clamp(min=EXPONENT_FLOOR, max=-EXPONENT_FLOOR)
    survive = 1 - u
    d_loc = -survive * torch.expm1(q) - u * torch.expm1(r)
    if _occurs(alpha > TAIL):
        tail = _tail_slope(s.clamp(min=0.0), torch.exp(r.clamp(max=0.0)), alpha.clamp(min=TAIL), beta)
        d_loc = torch.where(alpha > TAIL, tail, d_loc)
    grown, far = survive * torch.exp(q), u * torch.exp(r)
    from_edge = s + alpha * d_loc - (beta - alpha) * far
    from_centre = z - alpha * torch.where(grown > 0, grown, 0.0) - beta * far
    return d_loc, torch.where(alpha > -1, from_edge, from_centre)


def _tail_slope(s: Tensor, decay_z: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """∂x/∂loc at excess s over the near edge, by differences of Mills ratios; a ≥ TAIL, decay_z = e_z."""
    b = torch.maximum(beta, a)
    step = torch.minimum(s, b - a)
    c = a + step
    ta, tb, tc = _mills_deficit(a), _mills_deficit(b), _mills_deficit(c)

    def drop(x: Tensor, y: Tensor, y_minus_x: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
        return (y_minus_x * (1 - tx) + x * (ty - tx)) / (x * y)  # R(x) - R(y)

    decay_a = torch.exp((-0.5 * (b - a) * (b + a)).clamp(min=EXPONENT_FLOOR))
    mass = (1 - ta) / a - decay_a * (1 - tb) / b
    return (
        drop(a, c, step, ta, tc)
        - decay_z * drop(a, b, b - a, ta, tb)
        + decay_a * drop(c, b, (b - a) - step, tc, tb)
    ) / mass


def _tail_excess(u: Tensor, t: Tensor, beta: Tensor) -> Tensor:
    """The excess s over the near edge at probability u, for t ≥ TAIL.

    Newton's method on H(v) = v + log(1 - u (1 - κ)) - log(R_z/R_α), v = α s + s²/2, κ the survival at the
    far edge; H' = 1/(z R_z) is so near 1 that three steps reach the last bit.
    """
    far = torch.maximum(beta, t)
    near_log = torch.log1p(-_mills_deficit(t))
    v_far = 0.5 * (far - t) * (far + t)
    far_ratio = (t / far) * torch.exp(torch.log1p(-_mills_deficit(far)) - near_log)
    kappa = far_ratio * torch.exp((-v_far).clamp(min=EXPONENT_FLOOR))
    exponential = -torch.log1p((-u * (1 - kappa)).clamp(min=-1 + 1e-300))
    v = torch.minimum(exponential.clamp(max=-EXPONENT_FLOOR), v_far)
    for _ in range(3):
        step = 2 * v / (t + torch.sqrt(t * t + 2 * v))
        deficit = _mills_deficit(t + step)
        log_ratio = torch.log1p(-deficit) - near_log - torch.log1p(step / t)
        v = (v - (1 - deficit) * (v - exponential - log_ratio)).clamp(min=0.0)
        v = torch.minimum(v, v_far)
    return 2 * v / (t + torch.sqrt(t * t + 2 * v))


def far_quantile(u: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(excess s, ∂x/∂loc) at probability u from the near edge, for α ≥ FAR and no mass at the far edge.

    With v = α s + s²/2 and ρ = R(z)/R(α), z² = α² + 2v, the survival is exp(-v) ρ = 1 - u, and ∂x/∂loc =
    1 - ρ. log ρ changes with v by at most 1/α², so two rounds from the first-order solution
    reach 1e-9.
    """
    w = 1 / (alpha * alpha)
    exponential = -torch.log1p(-u)
    v, log_ratio = exponential * (1 - w), exponential
    reference = _log_scaled_mills(w)
    for _ in range(2):
        h = v * (2 * w)
        log_ratio = _log_scaled_mills(w / (1 + h)) - reference - 0.5 * torch.log1p(h)
        v = exponential + log_ratio
    return 2 * v / (alpha * (1 + torch.sqrt(1 + v * (2 * w)))), -torch.expm1(log_ratio)


def _log_scaled_mills(w: Tensor) -> Tensor:
    """log(z R(z)) at w = 1/z²: its asymptotic series, to 3e-12 for z ≥ FAR."""
    return w * (w * (2.5 + w * (w * 88.25 - 37 / 3)) - 1)


def far_entropy(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy + log α - log scale, α ∂entropy/∂α) in nats, for α ≥ FAR and no mass at the far edge.

    Here x is nearly exponential with mean scale/α. Asymptotic series in w = 1/α², to 1e-8 and 1e-9.
    """
    w = 1 / (alpha * alpha)
    value = 1 + w * (w * (7.5 + w * (441.25 * w - 148 / 3)) - 2)
    return value, w * (4 + w * (w * (296 - 3530 * w) - 30)) - 1


@torch.no_grad()
def quantile_with_slopes(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Quantile:
    """The x in [low, high] with P(X ≤ x) = u, and its implicit derivatives; all arguments float64."""
    below, above = (low - loc) / scale, (loc - high) / scale
    # loc outside the interval: from the near edge; inside: from the edge nearer in probability
    outside = torch.maximum(below, above) > 1
    from_low = torch.where(outside, below > above, u <= 0.5)
    alpha = torch.where(from_low, below, above)
    beta = torch.where(from_low, -above, -below)
    u = torch.where(from_low, u, 1 - u)
    width = (high - low) / scale

    # moderate α: ndtri of the lower or the upper tail, whichever keeps its digits
    a = alpha.clamp(max=TAIL)
    upper = a > 1
    b = torch.maximum(beta, a)
    lower_near, upper_far = 0.5 * torch.erfc(-a * SQRT_HALF), 0.5 * torch.erfc(b * SQRT_HALF)
    mass = torch.where(
        upper,
        0.5 * torch.erfc(a * SQRT_HALF) - upper_far,
        0.5 * (torch.erf(b * SQRT_HALF) - torch.erf(a * SQRT_HALF)),
    )
    probability = torch.where(upper, upper_far + (1 - u) * mass, lower_near + u * mass)
    z = torch.special.ndtri(probability.clamp(min=1e-300, max=1.0))
    z = torch.where(upper, -z, z)
    z = torch.minimum(torch.maximum(z, a), b)
    s = z - a

    # a sliver at the edge: reverted power series, since z - α has no digits left there
    sliver_mass = u * mass / _density(a)
    sliver = sliver_mass * a.abs().clamp(min=1.0) < 1e-3
    s = torch.where(sliver, _edge_series(torch.where(sliver, sliver_mass, 0.0), a), s)

    beyond = alpha > TAIL
    if _occurs(beyond):
        s = torch.where(beyond, _tail_excess(u, alpha.clamp(min=TAIL), beta), s)
    s = torch.minimum(s.clamp(min=0.0), width)
    z = torch.where(beyond | sliver, alpha + s, z)

    sign = torch.where(from_low, 1.0, -1.0)
    edge = torch.where(from_low, low, high)
    value = torch.where(outside | sliver, edge + sign * scale * s, loc + sign * scale * z)
    value = torch.minimum(torch.maximum(value, low), high)
    d_loc, d_scale = _implicit_derivatives(s, z, u, alpha, beta)
    # the far bound itself: there is no probability left to invert, and no parameter moves it
    end = u >= 1
    return Quantile(
        torch.where(end, torch.where(from_low, high, low), value),
        torch.where(end, 0.0, d_loc),
        torch.where(end, 0.0, sign * d_scale),
    )


@_in_float64
def quantile(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The x in [low, high] with P(X ≤ x) = u, differentiable in loc and scale at fixed u.

    The derivatives are the implicit reparameterisation gradients -(∂F/∂·)/(∂F/∂x) (Figurnov et al., 2018). They
    are computed beside the value, not by differentiating the inversion. Finite for every u in [0, 1].
    """
    result = quantile_with_slopes(u, loc, scale, low, high)
    return attach_derivatives(result.value, [(loc, result.d_loc), (scale, result.d_scale)])


@_in_float64
def cumulative(x: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """P(X ≤ x) for x in [low, high], differentiable in x, loc and scale."""
    with torch.no_grad():
        alpha, beta, from_low = near_frame(loc, scale, low, high)
        s = torch.where(from_low, x - low, high - x) / scale
        z = torch.where(from_low, x - loc, loc - x) / scale
        a = alpha.clamp(min=0.0)
        near, far = _mills_ratio(a), _mills_ratio(torch.maximum(beta, a))
        decay = torch.exp((-0.5 * (beta - a) * (beta + a)).clamp(min=EXPONENT_FLOOR))
        here = torch.exp((-s * (a + 0.5 * s)).clamp(min=EXPONENT_FLOOR))
        upper = (_mills_ratio(a + s) * here - far * decay) / (near - far * decay)
        b = alpha.clamp(max=0.0)
        root = torch.erf(beta * SQRT_HALF)
        inner = (root - torch.erf(z * SQRT_HALF)) / (root - torch.erf(b * SQRT_HALF))
        survival = torch.where(alpha > 0, upper, inner).clamp(0.0, 1.0)
        value = torch.where(from_low, 1 - survival, survival)
        density = torch.exp(log_density(x, loc, scale, low, high))
        d_loc, d_scale = _implicit_derivatives(s, z, 1 - survival, alpha, beta)
        d_scale = torch.where(from_low, 1.0, -1.0) * d_scale
    return attach_derivatives(value, [(x, density), (loc, -density * d_loc), (scale, -density * d_scale)])
