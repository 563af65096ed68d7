"""The rule of a plan: how it was decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any

from pyro_bmrs.arguments import check, is_floor, is_number, is_whole, plain


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a plan was decided. Tables, curves and the report read this, and assume nothing else.

    >>> print(Rule(criterion="BMRS_N", prior_log_odds=0.0).at(-2.5))
    BMRS_N (prior log-odds 0, threshold -2.5)

    A structure is removed where score ≥ `threshold`. The score of a criterion with evidence is
    ΔF + `prior_log_odds`, in nats.

    Attributes:
        criterion: its name and arguments, as the command line takes them, or the name of a function.
        prior_log_odds: log p(reduced)/p(full) of a structure before seeing data, in nats; by group, where a search
            had groups that differ. None: the criterion has no evidence.
        threshold: in the criterion's unit. None: a search decided about all structures together.
        min_kept: structures that every layer keeps, at least; below 1 the share of those that it had originally.
        round_to: the channels of a layer are a multiple of this number. None: any number.
        kl_weight: w of the fit. ΔF is the evidence of the model with likelihood p(y|θ)^(1/w).
        budget: the largest costs allowed for the smaller network, by name.
    """

    criterion: str
    prior_log_odds: float | Mapping[str, float] | None = None
    threshold: float | None = 0.0
    min_kept: float = 1
    round_to: int | None = None
    kl_weight: float = 1.0
    budget: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(isinstance(self.criterion, str), "criterion", "text", self.criterion)
        odds = self.prior_log_odds
        each = odds.values() if isinstance(odds, Mapping) else [odds]
        check(odds is None or all(map(is_number, each)), "prior_log_odds", "a finite number or None", odds)
        threshold = self.threshold
        good = isinstance(threshold, Real) and not isinstance(threshold, bool)
        check(
            threshold is None or (good and not math.isnan(threshold)),
            "threshold", "a number or None", threshold,
        )  # fmt: skip
        check(
            is_floor(self.min_kept, 0),
            "min_kept",
            "an integer of 0 or more, or a share between 0 and 1",
            self.min_kept,
        )
        check(
            self.round_to is None or is_whole(self.round_to, 1),
            "round_to", "a positive integer or None", self.round_to,
        )  # fmt: skip
        good = is_number(self.kl_weight) and self.kl_weight >= 0
        check(good, "kl_weight", "finite and not negative", self.kl_weight)
        check(isinstance(self.budget, Mapping), "budget", "a mapping of costs", self.budget)
        for name in ("prior_log_odds", "threshold", "min_kept", "round_to", "kl_weight", "budget"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def has_evidence(self) -> bool:
        """Whether scores are changes of evidence."""
        return self.prior_log_odds is not None

    @property
    def is_path(self) -> bool:
        """Whether scores are places on the path of removals of a trained network, so that −n removes the first n."""
        return self.criterion.startswith("laplace_")

    def floor(self, structures: int) -> int:
        """Of so many structures that a layer had originally, so many stay at least.

        >>> Rule(criterion="BMRS_N", min_kept=0.125).floor(64), Rule(criterion="BMRS_N", min_kept=3).floor(64)
        (8, 3)
        """
        if isinstance(self.min_kept, int):
            return self.min_kept
        # 0.07 · 100 is a little above 7
        return max(math.ceil(self.min_kept * structures - 1e-9), 1)

    @property
    def floor_text(self) -> str:
        """The floor in words that follow "at least"."""
        if isinstance(self.min_kept, int):
            return str(self.min_kept)
        return f"{100 * self.min_kept:g} % of its structures"

    def multiple(self, channels: int) -> int:
        """Of structures with so many channels each, a multiple of this number stays."""
        return 1 if self.round_to is None else self.round_to // math.gcd(self.round_to, channels)

    def at(self, threshold: float) -> Rule:
        """The same rule at another threshold.

        Raises:
            ValueError: for NaN, or where a search decided, which has no threshold.
        """
        check(
            self.threshold is not None,
            "plan", "decided by a threshold, to be decided by another one", f"{self}; search again instead",
        )  # fmt: skip
        return replace(self, threshold=threshold, budget={})

    def log_odds_at(self, threshold: float) -> float:
        """The prior log-odds, in nats, at which the threshold 0 decides as this one does; NaN without evidence."""
        odds = self.prior_log_odds
        return math.nan if odds is None or isinstance(odds, Mapping) else odds - threshold

    def cautions(self) -> list[str]:
        """Sentences on what ΔF means at this KL weight."""
        if not self.has_evidence or self.kl_weight == 1:
            return []
        if self.kl_weight == 0:
            return ["At KL weight 0 nothing held the posterior to its prior: ΔF has no meaning."]
        weight = f"{self.kl_weight:g}"
        return [
            f"The KL weight of the fit was {weight}: ΔF is the evidence of the tempered model p(y|θ)^(1/{weight}), "
            "not of the model itself."
        ]

    def __str__(self) -> str:
        odds, parts = self.prior_log_odds, []
        if odds is not None:
            parts.append(f"prior log-odds {'by group' if isinstance(odds, Mapping) else format(odds, '.3g')}")
        if self.threshold is None:
            parts.append("decided together")
        elif self.threshold:
            parts.append(f"threshold {self.threshold:.4g}")
        parts += [f"{name} within {value:g}" for name, value in self.budget.items()]
        return f"{self.criterion} ({', '.join(parts)})" if parts else self.criterion

    def to_json(self) -> dict[str, Any]:
        """For a JSON file, which knows no infinity."""
        document = asdict(self)
        if self.threshold is not None and math.isinf(self.threshold):
            document["threshold"] = str(self.threshold)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Rule:
        """What `to_json` gave.

        Raises:
            ValueError, TypeError: if it is none.
        """
        threshold = document["threshold"]
        return cls(**{**document, "threshold": float(threshold) if isinstance(threshold, str) else threshold})
