"""Criteria: which structures a network is better without.

A criterion gives each structure of each layer a score, in a unit of its own. Structures with a score ≥ 0 are removed.
Any function of `Layers` that returns such scores is a criterion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.arguments import check, name_of, whole_number
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.evidence import log_evidence_change
from pyro_bmrs.pruning.layers import Layers, Scores, by_layer, joined
from pyro_bmrs.pruning.scoring import Criterion

PAPER_LOG_ODDS = 0.0
RELEASED_LOG_ODDS = 0.5 * math.log(2 * math.pi)


class EvidenceCriterion:
    """Base of the BMRS criteria: score = ΔF + prior log-odds, in nats."""

    unit: ClassVar[str] = "nats"
    prior_log_odds: float

    def reduced_prior(self, prior: LogUniform | TruncatedLogNormal, **parameters: Tensor) -> Distribution:
        """The prior of the reduced model, for structures with this prior.

        Args:
            parameters: fields of the criterion that take many values at once, broadcasting with the prior.
        """
        raise NotImplementedError

    def log_evidence_change(self, layers: Layers) -> Scores:
        """ΔF in nats: the log evidence of the model with the reduced prior, less that of the fitted model."""
        changes: Scores = {}
        for kind in {type(layer.prior) for layer in layers.values()}:
            alike = {name: layer for name, layer in layers.items() if type(layer.prior) is kind}
            shapes = [layer.posterior.batch_shape for layer in alike.values()]
            prior = joined([layer.prior for layer in alike.values()], shapes)
            posterior = joined([layer.posterior for layer in alike.values()])
            change = log_evidence_change(posterior, prior, self.reduced_prior(prior))
            changes |= by_layer(change, alike)
        return {name: changes[name] for name in layers}

    def __call__(self, layers: Layers) -> Scores:
        changes = self.log_evidence_change(layers)
        return {name: change + self.prior_log_odds for name, change in changes.items()}


@dataclass(frozen=True)
class BMRS_N(EvidenceCriterion):  # noqa: N801 the paper's name
    """Evidence for a spike: the reduced prior is a truncated log-normal at the lower edge (paper, eq. 8).

    >>> BMRS_N(prior_log_odds=0.0)
    BMRS_N(scale=1e-06, loc=None, prior_log_odds=0.0)

    Args:
        scale: s̃ of the reduced prior in log θ. As it shrinks, ΔF tends to the Savage-Dickey density ratio of the
            posterior at the lower edge; the difference is about 0.8 s̃ (loc - log_low)/scale² nats.
        loc: its location. None: the lower bound of the prior.
        prior_log_odds: log p(reduced)/p(full) per structure before seeing data. A posterior that learned nothing has
            ΔF = 0, so this decides about idle structures. 0, as in the paper's equation, keeps nearly all of them.
            ½ log 2π = 0.919, the default, removes them: the authors' released code leaves the 2π out, which has the
            same effect.
    """

    scale: float = 1e-6
    loc: float | None = None
    prior_log_odds: float = RELEASED_LOG_ODDS

    def __post_init__(self) -> None:
        _check("scale", self.scale, lambda scale: 0 < scale < math.inf, "positive and finite")
        _check("prior_log_odds", self.prior_log_odds, math.isfinite, "finite")
        _check("loc", self.loc, lambda loc: loc is None or math.isfinite(loc), "finite or None")

    def reduced_prior(
        self, prior: LogUniform | TruncatedLogNormal, **parameters: Tensor
    ) -> TruncatedLogNormal:
        low, high = prior.log_low.double(), prior.log_high.double()
        loc = _parameter(self, "loc", parameters, low) if self.loc is not None or "loc" in parameters else low
        return TruncatedLogNormal(loc, _parameter(self, "scale", parameters, low), low, high)


@dataclass(frozen=True)
class BMRS_U(EvidenceCriterion):  # noqa: N801 the paper's name
    """Evidence for a smaller interval: the reduced prior is log-uniform on [a', 2^-bits] (paper, section 3.3).

    >>> BMRS_U(bits=4, floor_bits=23)
    BMRS_U(bits=4, floor_bits=23, prior_log_odds=0.9189385332046727)

    Args:
        bits: the upper end is 2^-bits: θ below it is lost at that precision. The paper uses 8 and 4.
        floor_bits: a' = 2^-floor_bits. The paper has 23, which keeps the structures that are nearest to 0, with mass
            below 2^-23 (ΔF = -9.3 at loc = -20, scale = 1). None, the default: a' is the prior's lower bound, and
            these are removed too.
        prior_log_odds: as in `BMRS_N`, and with the same default, so that both agree about idle structures. At 0, as in
            the paper and its released code, a posterior that equals its prior has a score of 0: in six fits on image
            data, idle structures had ΔF from -0.01 to 0, and none was removed (docs/results/criteria.md).
    """

    bits: float = 8
    floor_bits: float | None = None
    prior_log_odds: float = RELEASED_LOG_ODDS

    def __post_init__(self) -> None:
        _check("bits", self.bits, math.isfinite, "finite")
        _check(
            "floor_bits", self.floor_bits, lambda floor: floor is None or floor > self.bits,
            f"above bits={self.bits}, or None",
        )  # fmt: skip
        _check("prior_log_odds", self.prior_log_odds, math.isfinite, "finite")

    def reduced_prior(self, prior: LogUniform | TruncatedLogNormal, **parameters: Tensor) -> LogUniform:
        low = prior.log_low.double()
        high = -math.log(2.0) * _parameter(self, "bits", parameters, low)
        if self.floor_bits is not None or "floor_bits" in parameters:
            low = -math.log(2.0) * _parameter(self, "floor_bits", parameters, low)
        if not low.is_meta and not bool((low < high).all()):
            raise ValueError(
                "bits must leave an interval above its lower end: 2^-bits is "
                f"{float(high.min().exp()):.3g}, the lower end {float(low.max().exp()):.3g}"
            )
        return LogUniform(low, high)


@dataclass(frozen=True)
class ReducedPriors(EvidenceCriterion):
    """Evidence for given reduced priors, by layer. The scores of other layers are NaN."""

    reduced_priors: Mapping[str, Distribution]
    prior_log_odds: float = PAPER_LOG_ODDS

    def __str__(self) -> str:
        return reduced_priors_text(self.reduced_priors)

    def log_evidence_change(self, layers: Layers) -> Scores:
        return {
            name: log_evidence_change(layer.posterior, layer.prior, self.reduced_priors[name])
            if name in self.reduced_priors
            else torch.full_like(layer.posterior.loc, math.nan, dtype=torch.float64)
            for name, layer in layers.items()
        }


def reduced_priors_text(reduced_priors: Mapping[str, object]) -> str:
    """What to call a reduction by reduced priors."""
    return f"reduced priors of {', '.join(reduced_priors)}"


@dataclass(frozen=True)
class SNR:
    """Remove where E[θ]/sqrt(Var θ) ≤ threshold (Neklyudov et al., 2017); score = threshold - SNR."""

    unit: ClassVar[str] = "signal-to-noise ratio"
    threshold: float = 1.0

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, lambda bar: 0 < bar < math.inf, "positive and finite")

    def __call__(self, layers: Layers) -> Scores:
        snr = joined([layer.posterior for layer in layers.values()]).snr
        return by_layer(self.threshold - snr.double(), layers)


@dataclass(frozen=True)
class ExpectedScale:
    """Remove where E[θ] ≤ threshold; score = threshold - E[θ]. The threshold has no natural value."""

    unit: ClassVar[str] = "E[θ]"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, lambda bar: 0 < bar < 1, "between 0 and 1")

    def __call__(self, layers: Layers) -> Scores:
        mean = joined([layer.posterior for layer in layers.values()]).mean
        return by_layer(self.threshold - mean.double(), layers)


@dataclass(frozen=True)
class WeightNorm:
    """Remove the given fraction of all structures, those with the smallest weights.

    The norm of a structure's incoming weights is divided by the square root of their number. Else it would grow with
    fan-in, and layers could not be compared. Score = cut - norm.
    """

    unit: ClassVar[str] = "root mean square weight"
    fraction: float = 0.5

    def __post_init__(self) -> None:
        _check("fraction", self.fraction, lambda share: 0 <= share <= 1, "in [0, 1]")

    def __call__(self, layers: Layers) -> Scores:
        norms = {name: layer.weight_norm().double() for name, layer in layers.items()}
        return _lowest_share(self.fraction, norms, layers)


@dataclass(frozen=True)
class Random:
    """Remove the given fraction of all structures, chosen at random by `seed`; score = cut - draw."""

    unit: ClassVar[str] = "uniform draw"
    fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check("fraction", self.fraction, lambda share: 0 <= share <= 1, "in [0, 1]")
        whole_number("seed", self.seed)

    def __call__(self, layers: Layers) -> Scores:
        generator = torch.Generator().manual_seed(int(self.seed))
        draws = {
            name: torch.rand(layer.kept.shape, generator=generator, dtype=torch.float64).to(layer.kept.device)
            for name, layer in layers.items()
        }
        return _lowest_share(self.fraction, draws, layers)


def _parameter(criterion: EvidenceCriterion, name: str, given: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """A parameter of a criterion, as given or as its field says, broadcasting with `like`."""
    return given[name] if name in given else torch.full_like(like, getattr(criterion, name))


def _lowest_share(fraction: float, values: Scores, layers: Layers) -> Scores:
    """Scores that remove the given fraction of what is left: the lowest values, of equal ones the first.

    Score = cut - value, with `cut` the highest value that is removed.
    """
    kept = torch.cat([layer.kept for layer in layers.values()])
    pool = torch.cat([*values.values()])
    order = pool.masked_fill(~kept, math.inf).argsort(stable=True)
    count = round(fraction * int(kept.sum()))
    cut = pool[order[count - 1]] if count else pool.new_tensor(torch.finfo(pool.dtype).min)
    scores = cut - pool
    chosen = torch.zeros_like(kept).index_fill(0, order[:count], True)
    # what ties with the last that goes has a score of 0 too, and must stay
    scores = scores.masked_fill(~chosen & (scores >= 0), -torch.finfo(pool.dtype).tiny)
    return by_layer(scores, layers)


def _check(name: str, value: object, allows: Callable[[Any], bool], allowed: str) -> None:
    try:
        good = allows(value)
    except TypeError:  # such as text, which can't be compared
        good = False
    check(good, name, allowed, value)


CRITERIA: dict[str, Any] = {
    kind.__name__: kind for kind in (BMRS_N, BMRS_U, SNR, ExpectedScale, WeightNorm, Random)
}


def text_of(criterion: object) -> str:
    """What to call a criterion: the text that `parse_criterion` takes, or the name of a function.

    Without the prior log-odds, which a `Rule` names separately.

    >>> text_of(BMRS_N()), text_of(BMRS_U(bits=4, prior_log_odds=0.0)), text_of(len)
    ('BMRS_N', 'BMRS_U:bits=4', 'builtins.len')
    """
    if is_dataclass(criterion) and type(criterion) in CRITERIA.values():
        changed = {
            entry.name: getattr(criterion, entry.name)
            for entry in fields(criterion)
            if entry.name != "prior_log_odds" and getattr(criterion, entry.name) != entry.default
        }
        arguments = ",".join(f"{name}={value:g}" for name, value in changed.items())
        return type(criterion).__name__ + (f":{arguments}" if arguments else "")
    return name_of(criterion)


def parse_criterion(text: str, prior_log_odds: float | None = None) -> Criterion:
    """A criterion from its name and, behind a colon, its arguments.

    >>> parse_criterion("BMRS_U:bits=4,floor_bits=23")
    BMRS_U(bits=4.0, floor_bits=23.0, prior_log_odds=0.9189385332046727)

    Raises:
        ValueError: for an unknown name or argument, or log-odds for a criterion without evidence.
    """
    name, _, rest = text.partition(":")
    check(name in CRITERIA, "criterion", f"one of {', '.join(CRITERIA)}", name)
    allowed = [field.name for field in fields(CRITERIA[name])]
    arguments: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in allowed:
            raise ValueError(f"criterion {name} takes {', '.join(allowed)}: got {part!r}")
        try:
            arguments[key] = int(value) if key == "seed" else float(value)
        except ValueError:
            raise ValueError(f"criterion {name} needs a number for {key}: got {value!r}") from None
    if prior_log_odds is not None:
        if not issubclass(CRITERIA[name], EvidenceCriterion):
            raise ValueError(f"prior_log_odds goes with BMRS_N and BMRS_U only: got it with {name}")
        arguments["prior_log_odds"] = prior_log_odds
    criterion: Criterion = CRITERIA[name](**arguments)
    return criterion
