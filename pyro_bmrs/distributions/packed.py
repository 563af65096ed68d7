"""Draws and KL of many truncated log-normal latents at once, in few operations, for the steps of a fit.

Distribution and gradients are those of `TruncatedLogNormal`. All structures of a network are in one tensor. The
quantile, the exponential and the KL are one autograd node, whose backward pass is four sums over the draws.
Up to α = FAR, where Φ(-α) is still a float64, one direct formula serves every structure. Its cancellations cost
at most nine of sixteen digits there; a training step needs six. Beyond FAR a few terms of asymptotic series
suffice.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmrs.distributions import tail_arithmetic
from pyro_bmrs.distributions.tail_arithmetic import EXPONENT_FLOOR, FAR, LOG_SQRT_2PI, SQRT_HALF

# Half of the last bit of a float32 uniform: no probability comes nearer to 0 or 1.
NEAREST = 2.0**-25


def uniforms(draws: int, units: int, *, stratified: bool, device: torch.device | None = None) -> Tensor:
    """Probabilities in (0, 1) for `draws` draws of each structure, float64. Shape: (draws, structures).

    >>> u = uniforms(8, 3, stratified=True)
    >>> (8 * u).floor().sort(0).values[:, 0].tolist()  # one in each eighth
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

    Args:
        draws, units: number of draws and of structures.
        stratified: True: u_bk = frac(U_k + a_k b/draws), with a_k random and coprime with `draws`. Then one draw
            of a structure falls into each of `draws` equal cells. At any b the structures are independent and
            uniform, so an average over b keeps its expectation and has less variance. False: all are
            independent.
    """
    if not stratified:
        return torch.rand(draws, units, dtype=torch.float64, device=device).clamp_(NEAREST, 1 - NEAREST)
    steps = torch.tensor(_coprime(draws), dtype=torch.float64, device=device) / draws
    step = steps[torch.randint(len(steps), (units,), device=device)]
    b = torch.arange(draws, dtype=torch.float64, device=device).unsqueeze(1)
    u = torch.rand(units, dtype=torch.float64, device=device)
    return torch.addcmul(u, b, step).frac_().clamp_(NEAREST, 1 - NEAREST)


@cache
def _coprime(draws: int) -> tuple[int, ...]:
    return tuple(step for step in range(1, draws + 1) if math.gcd(step, draws) == 1)


class _DrawWithKL(torch.autograd.Function):
    """θ = exp(F⁻¹(u)) and Σ KL(q‖log-uniform), for log θ ~ N(loc, scale²) on [low, high].

    In the frame of the bound nearer to the mass: x = loc ± scale z, α ≤ z ≤ β, Q(z) = Q(α) - v Z, where v is u
    from the lower bound and 1 - u from the upper one. With r = φ(α)/φ(z) and c = φ(β)/φ(α) the implicit
    derivatives at fixed u (Figurnov et al., 2018) are

        ∂x/∂loc = 1 - r (1-v) - r c v,    ∂x/∂scale = ±(z - α r (1-v) - β r c v),

    and those of the entropy ±Cov(z, z²)/(2 scale) and Var(z²)/(2 scale).
    """

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, kept: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = loc.dtype
        loc, scale, low, high = loc.double(), scale.double(), low.double(), high.double()
        below, above = (low - loc) / scale, (loc - high) / scale
        from_low = below >= above
        sign = from_low.double().mul_(2).sub_(1)
        alpha, beta = torch.maximum(below, above), -torch.minimum(below, above)
        far = alpha > FAR
        some_far = not far.is_meta and bool(far.any())
        if some_far:  # the direct results are not used there: any α without overflow will do
            alpha = torch.where(far, FAR, alpha)
            beta = torch.where(far, FAR + 1.0, beta)
        edge = torch.where(alpha > 0, torch.erfc(alpha * SQRT_HALF), torch.erf(alpha * SQRT_HALF))
        end = torch.where(alpha > 0, torch.erfc(beta * SQRT_HALF), torch.erf(beta * SQRT_HALF))
        mass = 0.5 * (end - edge).abs()
        # the draws
        survival = torch.erfc(torch.where(from_low, alpha, beta) * SQRT_HALF).mul_(0.5)  # at u = 0
        z = torch.special.ndtri(torch.addcmul(survival, u, sign * mass, value=-1.0)).neg_()
        ratio = ((z - alpha) * (z + alpha)).mul_(0.5).clamp_(min=EXPONENT_FLOOR).exp_()
        x = torch.addcmul(loc, sign * scale, z)
        # the KL
        near = torch.exp((-0.5 * alpha * alpha).clamp(min=EXPONENT_FLOOR) - LOG_SQRT_2PI) / mass
        decay = torch.exp((-0.5 * (beta - alpha) * (beta + alpha)).clamp(min=EXPONENT_FLOOR))
        a1, b1 = alpha * near, beta * (near * decay)
        a2, b2 = alpha * a1, beta * b1
        m1 = near * (1 - decay)
        m2 = 1 + a1 - b1
        m3 = 2 * m1 + a2 - b2
        m4 = 3 * m2 + alpha * a2 - beta * b2
        entropy = torch.log(scale * mass) + (LOG_SQRT_2PI + 0.5) + 0.5 * (a1 - b1)
        d_loc, d_scale = sign * (m3 - m1 * m2) / (2 * scale), (m4 - m2 * m2) / (2 * scale)
        ctx.far = None
        if some_far:
            columns = torch.nonzero(far).flatten()
            law = _far(u[:, columns], *(t[columns] for t in (loc, scale, low, high)))
            x[:, columns], entropy[columns] = law.x, law.entropy
            d_loc[columns], d_scale[columns] = law.entropy_by_loc, law.entropy_by_scale
            ctx.far = columns, law.by_loc, law.by_scale
        theta = torch.clamp(x, low, high).exp_().mul_(kept)
        kl = ((high - low).log_() - entropy).mul_(kept).sum()
        ctx.save_for_backward(
            theta, z, ratio, u, alpha, beta * decay, decay, from_low, d_loc * kept, d_scale * kept
        )
        ctx.dtype = dtype
        return theta.to(dtype), kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_theta: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        theta, z, ratio, u, alpha, beta_decay, decay, from_low, entropy_loc, entropy_scale = ctx.saved_tensors
        g = grad_theta * theta
        gr = g * ratio
        above = (gr * u).sum(0)
        below = gr.sum(0) - above
        # weighted by the probability on the far and the near side
        far, near = torch.where(from_low, above, below), torch.where(from_low, below, above)
        by_loc = g.sum(0) - near - decay * far
        by_scale = (g * z).sum(0) - alpha * near - beta_decay * far
        by_scale = torch.where(from_low, by_scale, -by_scale)
        if ctx.far is not None:
            columns, d_loc, d_scale = ctx.far
            by_loc[columns] = (g[:, columns] * d_loc).sum(0)
            by_scale[columns] = (g[:, columns] * d_scale).sum(0)
        by_loc -= grad_kl * entropy_loc
        by_scale -= grad_kl * entropy_scale
        return by_loc.to(ctx.dtype), by_scale.to(ctx.dtype), None, None, None, None


class _Law(NamedTuple):
    """Draws x (draws, structures) and the entropy (structures,), each with its derivatives."""

    x: Tensor
    by_loc: Tensor
    by_scale: Tensor
    entropy: Tensor
    entropy_by_loc: Tensor
    entropy_by_scale: Tensor


def _far(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> _Law:
    """Structures whose loc lies more than FAR scales outside of the bounds."""
    below, above = (low - loc) / scale, (loc - high) / scale
    alpha, width = torch.maximum(below, above), (high - low) / scale
    # the bounds are so near that both matter
    if bool((width * (alpha + 0.5 * width) < -EXPONENT_FLOOR).any()):
        exact = tail_arithmetic.quantile_with_slopes(u, loc, scale, low, high)
        return _Law(*exact, *tail_arithmetic.entropy_with_slopes(loc, scale, low, high))
    from_low = below > above
    sign = from_low.double().mul_(2).sub_(1)
    s, by_loc = tail_arithmetic.far_quantile(torch.where(from_low, u, 1 - u), alpha)
    entropy, slope = tail_arithmetic.far_entropy(alpha)
    return _Law(
        x=torch.addcmul(torch.where(from_low, low, high), sign * scale, s),
        by_loc=by_loc,
        by_scale=sign * (s + alpha * by_loc),
        entropy=entropy + torch.log(scale / alpha),
        entropy_by_loc=-sign * slope / (alpha * scale),
        entropy_by_scale=(1 - slope) / scale,
    )


def draw_with_kl(
    loc: Tensor, scale: Tensor, log_low: Tensor, log_high: Tensor, kept: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """θ at the probabilities u, and KL(q‖LogUniform) summed over structures; differentiable in loc and scale.

    >>> loc, scale = torch.tensor([-0.5, -15.0]), torch.tensor([0.02, 2.0])
    >>> bounds = torch.tensor([-20.0, -20.0]), torch.tensor([0.0, 0.0])
    >>> kept, u = torch.tensor([True, True]), torch.full((1, 2), 0.5, dtype=torch.float64)
    >>> theta, kl = draw_with_kl(loc, scale, *bounds, kept, u)
    >>> round(theta[0, 0].item(), 4), round(kl.item(), 3)
    (0.6065, 6.401)

    Args:
        loc, scale: of log θ, before truncation; scale > 0. Shape: (structures,).
        log_low, log_high: bounds of log θ. Shape: (structures,).
        kept: bool; where False, θ is 0 and has no gradient and no KL. Shape: (structures,).
        u: probabilities in (0, 1), float64, from `uniforms`. Shape: (draws, structures).

    Returns:
        θ in the dtype of `loc`, shape (draws, structures), and the KL in nats, a float64 scalar.
    """
    result: tuple[Tensor, Tensor] = _DrawWithKL.apply(loc, scale, log_low, log_high, kept, u)
    return result
