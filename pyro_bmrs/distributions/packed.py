"""Draws and KL of many truncated log-normal latents at once, as one operation, for the steps of a fit.

Distribution and gradients are those of `TruncatedLogNormal`. All structures of a network are in one tensor. From their
parameters to θ and the KL, and back, there are three operations, of which torch's dispatcher and `torch.compile` see no
inside: `uniforms`, `draw_with_kl` and its gradient. On CUDA the last two are compiled. On the CPU each is a sequence of
vectorised ones.

Up to α = FAR, where Φ(-α) is still a float64, one direct formula serves every structure. Its cancellations cost
at most nine of sixteen digits there; a training step needs six. Beyond FAR a few terms of asymptotic series
suffice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmrs.distributions import tail_arithmetic
from pyro_bmrs.distributions.tail_arithmetic import EXPONENT_FLOOR, FAR, LOG_SQRT_2PI, SQRT_HALF

# Half of the last bit of a float32 uniform: no probability comes nearer to 0 or 1.
NEAREST = 2.0**-25
# Within these bounds the distributions' values and gradients are known to be finite, in float32 too. The location
# stays within LOC_MARGIN of the bounds of log θ.
LOG_SCALE_BOUNDS = (-20.0, 5.0)
LOC_MARGIN = 20.0


def bounded(loc: Tensor, log_scale: Tensor, log_low: Tensor, log_high: Tensor) -> tuple[Tensor, Tensor]:
    """(loc, scale) of the law that the parameters of a posterior stand for, clamped to where all is finite.

    The exponential is taken in float64 and rounded. In float32 each device has its own, so that a posterior would
    have another evidence after it is moved.
    """
    loc = torch.clamp(loc, log_low - LOC_MARGIN, log_high + LOC_MARGIN)
    return loc, log_scale.clamp(*LOG_SCALE_BOUNDS).double().exp().to(log_scale.dtype)


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
    device = device or torch.get_default_device()
    strata = _strata(draws, device) if stratified else ()
    result: Tensor = _OPERATIONS.uniforms(strata, draws, units, device)
    return result


def _uniforms(strata: Sequence[Tensor], draws: int, units: int, device: torch.device) -> Tensor:
    if not strata:
        return torch.rand(draws, units, dtype=torch.float64, device=device).clamp_(NEAREST, 1 - NEAREST)
    b, steps = strata
    step = steps[torch.randint(len(steps), (units,), device=device)]
    u = torch.rand(units, dtype=torch.float64, device=device)
    return (b * step).add_(u).frac_().clamp_(NEAREST, 1 - NEAREST)


@cache
def _strata(draws: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """b, shape (draws, 1), and all a/draws: on the device at once, since a CUDA graph can copy nothing there."""
    steps = [step / draws for step in range(1, draws + 1) if math.gcd(step, draws) == 1]
    b = torch.arange(draws, dtype=torch.float64, device=device).unsqueeze(1)
    return b, torch.tensor(steps, dtype=torch.float64, device=device)


def draw_with_kl(
    loc: Tensor, log_scale: Tensor, log_low: Tensor, log_high: Tensor, kept: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """θ at the probabilities u, and KL(q‖LogUniform) summed over structures; differentiable in loc and log_scale.

    >>> loc, log_scale = torch.tensor([-0.5, -15.0]), torch.tensor([-4.0, 0.7])
    >>> bounds = torch.tensor([-20.0, -20.0]), torch.tensor([0.0, 0.0])
    >>> kept, u = torch.tensor([True, True]), torch.full((1, 2), 0.5, dtype=torch.float64)
    >>> theta, kl = draw_with_kl(loc, log_scale, *bounds, kept, u)
    >>> round(theta[0, 0].item(), 4), round(kl.item(), 3)
    (0.6065, 6.483)

    Args:
        loc, log_scale: the parameters of a posterior, which stand for the law of log θ that `bounded` gives, before
            truncation. Shape: (structures,).
        log_low, log_high: bounds of log θ. Shape: (structures,).
        kept: bool; where False, θ is 0 and has no gradient and no KL. Shape: (structures,).
        u: probabilities in (0, 1), float64, from `uniforms`. Shape: (draws, structures).

    Returns:
        θ, shape (draws, structures), and the KL in nats, a scalar; both in the dtype of `loc`.
    """
    theta, kl, *_ = _OPERATIONS.draw(loc, log_scale, log_low, log_high, kept, u)
    return theta, kl


class _Drawn(NamedTuple):
    """θ and the KL; and their slopes by loc and log scale, of θ (2, draws, structures), of the KL (2, structures)."""

    theta: Tensor
    kl: Tensor
    slopes: Tensor
    kl_slopes: Tensor


def _draw(
    loc: Tensor, log_scale: Tensor, low: Tensor, high: Tensor, kept: Tensor, u: Tensor, *, columns: bool
) -> _Drawn:
    """θ = exp(F⁻¹(u)) and Σ KL(q‖log-uniform), for log θ ~ N(loc, scale²) on [low, high], with their slopes.

    In the frame of the bound nearer to the mass: x = loc ± scale z, α ≤ z ≤ β, Q(z) = Q(α) - v Z, where v is u
    from the lower bound and 1 - u from the upper one. With r = φ(α)/φ(z) and c = φ(β)/φ(α) the implicit
    derivatives at fixed u (Figurnov et al., 2018) are

        ∂x/∂loc = 1 - r (1 - v + c v),    ∂x/∂scale = ±(z - r (α (1 - v) + β c v)),

    and those of the entropy ±Cov(z, z²)/(2 scale) and Var(z²)/(2 scale).

    Args:
        columns: whether to look for structures beyond FAR and to compute these by themselves, which an accelerator
            would have to wait for; otherwise all are computed both ways.
    """
    dtype = loc.dtype
    centre, scale = bounded(loc, log_scale, low, high)
    # a parameter that is held at the edge of its box has no gradient
    moves = torch.stack((loc == centre, log_scale == log_scale.clamp(*LOG_SCALE_BOUNDS))).logical_and_(kept)
    loc, scale, low, high = centre.double(), scale.double(), low.double(), high.double()
    below, above = (low - loc).div_(scale), (loc - high).div_(scale)
    from_low = below >= above
    sign = from_low.double().mul_(2).sub_(1)
    alpha, beta = torch.maximum(below, above), torch.minimum(below, above).neg_()
    far = alpha > FAR
    some_far = not columns or (not far.is_meta and bool(far.any()))
    if some_far:  # the direct results are not used there: any α without overflow will do
        alpha = torch.where(far, FAR, alpha)
        beta = torch.where(far, FAR + 1.0, beta)
    # products and sums rather than addcmul, which is slow on the CPU
    edges = torch.stack((alpha, beta)).mul_(SQRT_HALF)
    tails, cores = torch.erfc(edges), torch.erf(edges)
    mass = torch.where(alpha > 0, tails[0] - tails[1], cores[1] - cores[0]).mul_(0.5)
    at_zero = torch.where(from_low, tails[0], tails[1]).mul_(0.5)  # Q at u = 0
    # the draws
    z = torch.special.ndtri((u * (sign * mass).neg_()).add_(at_zero)).neg_()
    square, spread = alpha * alpha, sign * scale
    ratio = (z * z).sub_(square).mul_(0.5).clamp_(min=EXPONENT_FLOOR).exp_()
    x = (z * spread).add_(loc)
    decay = (square - beta * beta).mul_(0.5).clamp_(min=EXPONENT_FLOOR).exp_()
    last = beta * decay
    by_loc = (u * (decay - 1).mul_(sign)).add_(torch.where(from_low, 1.0, decay)).mul_(ratio).neg_().add_(1)
    by_scale = (u * (last - alpha).mul_(sign)).add_(torch.where(from_low, alpha, last)).mul_(ratio)
    by_scale = (z - by_scale).mul_(spread)
    # the KL
    near = square.mul_(-0.5).clamp_(min=EXPONENT_FLOOR).sub_(LOG_SQRT_2PI).exp_().div_(mass)
    end = near * decay
    a1, b1 = alpha * near, beta * end
    a2, b2 = alpha * a1, beta * b1
    m1, slant = near - end, a1 - b1
    m2 = slant + 1
    m3 = (a2 - b2).add_(m1).add_(m1)
    m4 = (alpha * a2).sub_(beta * b2).add_(m2 * 3)
    entropy = torch.log(scale * mass).add_(LOG_SQRT_2PI + 0.5).add_(slant * 0.5)
    entropy_slopes = torch.stack((m3.sub_(m1 * m2).div_(spread), m4.sub_(m2 * m2))).mul_(0.5)
    if some_far and columns:
        at = torch.nonzero(far).flatten()
        law = _far(u[:, at], *(t[at] for t in (loc, scale, low, high)))
        x[:, at], by_loc[:, at], by_scale[:, at], entropy[at], entropy_slopes[:, at] = law
    elif some_far:
        law = _exact(u, loc, scale, low, high)
        x, by_loc, by_scale, entropy, entropy_slopes = (
            torch.where(far, exact, direct)
            for exact, direct in zip(law, (x, by_loc, by_scale, entropy, entropy_slopes), strict=True)
        )
    theta = x.clamp_(low, high).exp_().mul_(kept)
    slopes = torch.stack((by_loc, by_scale)).mul_(theta).mul_(moves.unsqueeze(1))
    kl = (high - low).log_().sub_(entropy).mul_(kept).sum()
    return _Drawn(theta.to(dtype, copy=True), kl.to(dtype), slopes, entropy_slopes.mul_(moves).neg_())


def _gradients(
    theta: Tensor | None, kl: Tensor | None, slopes: Tensor, kl_slopes: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of loc and log scale, of those of θ and the KL."""
    total = kl_slopes * (0.0 if kl is None else kl)
    if theta is not None:
        total += (slopes * theta).sum(1)
    return total[0].to(dtype, copy=True), total[1].to(dtype, copy=True)


class _Law(NamedTuple):
    """Draws x (draws, structures), their slopes by loc and log scale, the entropy (structures,) and its (2, …)."""

    x: Tensor
    by_loc: Tensor
    by_log_scale: Tensor
    entropy: Tensor
    entropy_slopes: Tensor


def _exact(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> _Law:
    x, by_loc, by_scale = tail_arithmetic.quantile_with_slopes(u, loc, scale, low, high)
    entropy, *slopes = tail_arithmetic.entropy_with_slopes(loc, scale, low, high)
    return _Law(x, by_loc, by_scale * scale, entropy, torch.stack((slopes[0], slopes[1] * scale)))


def _far(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> _Law:
    """Structures whose loc lies more than FAR scales outside of the bounds."""
    below, above = (low - loc) / scale, (loc - high) / scale
    alpha, width = torch.maximum(below, above), (high - low) / scale
    # the bounds are so near that both matter
    if bool((width * (alpha + 0.5 * width) < -EXPONENT_FLOOR).any()):
        return _exact(u, loc, scale, low, high)
    from_low = below > above
    spread = torch.where(from_low, scale, -scale)
    s, by_loc = tail_arithmetic.far_quantile(torch.where(from_low, u, 1 - u), alpha)
    entropy, slope = tail_arithmetic.far_entropy(alpha)
    return _Law(
        x=torch.where(from_low, low, high) + spread * s,
        by_loc=by_loc,
        by_log_scale=spread * (s + alpha * by_loc),
        entropy=entropy + torch.log(scale / alpha),
        entropy_slopes=torch.stack((-slope / (alpha * spread), 1 - slope)),
    )


# the operations ------------------------------------------------------------------------------------------


class _Compiled:
    """A formula, compiled; as it is where torch can't compile, such as without a compiler or on an old GPU."""

    def __init__(self, formula: Callable[..., Any]) -> None:
        self.formula = formula
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *given: Any) -> Any:
        # not before it is needed: it takes long to import, and turns off checks of distributions
        self.compiled = self.compiled or torch.compile(self.formula, dynamic=True)
        try:
            return self.compiled(*given)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"the draws of noise are not compiled, and take longer: {error}", stacklevel=2)
            self.compiled = self.formula
            return self.formula(*given)


def _register() -> Any:
    """The formulas as operations of torch: vectorised on the CPU, compiled on CUDA, and as they are elsewhere."""
    laws = "Tensor loc, Tensor log_scale, Tensor low, Tensor high, Tensor kept, Tensor u"
    of_gradients = "Tensor? theta, Tensor? kl, Tensor slopes, Tensor kl_slopes, ScalarType dtype"
    for name, formula, shapes, signature in (
        (
            "uniforms",
            _uniforms,
            _uniforms,
            "(Tensor[] strata, int draws, int units, Device device) -> Tensor",
        ),
        ("draw", _draw_all, _shapes, f"({laws}) -> (Tensor, Tensor, Tensor, Tensor)"),
        ("gradients", _gradients, _gradients, f"({of_gradients}) -> (Tensor, Tensor)"),
    ):
        full = f"pyro_bmrs::{name}"
        torch.library.define(full, signature)
        torch.library.impl(full, "CompositeExplicitAutograd", formula)
        torch.library.register_fake(full, shapes)
        if formula is not _uniforms:  # a few kernels
            torch.library.impl(full, "cuda", _Compiled(formula))
    torch.library.impl("pyro_bmrs::draw", "cpu", _draw_columns)
    torch.library.register_autograd("pyro_bmrs::draw", _backward, setup_context=_keep)
    return torch.ops.pyro_bmrs


def _shapes(
    loc: Tensor, log_scale: Tensor, low: Tensor, high: Tensor, kept: Tensor, u: Tensor
) -> tuple[Tensor, ...]:
    return loc.new_empty(u.shape), loc.new_empty(()), u.new_empty(2, *u.shape), u.new_empty(2, *loc.shape)


def _draw_all(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(_draw(*given, columns=False))


def _draw_columns(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(_draw(*given, columns=True))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, theta: Tensor | None, kl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return *_OPERATIONS.gradients(theta, kl, *ctx.saved_tensors, ctx.dtype), None, None, None, None


_OPERATIONS = _register()
