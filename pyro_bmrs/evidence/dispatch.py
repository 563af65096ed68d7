"""Functions of (posterior, prior, reduced prior), chosen by their three types, as torch chooses KL by two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from torch.distributions import Distribution

Types = tuple[type[Distribution], type[Distribution], type[Distribution]]


class TripleDispatch:
    """Rules for triples of types and their subclasses. If several match, that of the closest types is used."""

    def __init__(self) -> None:
        self.rules: dict[Types, Callable[..., Any]] = {}

    def register[Rule: Callable[..., Any]](
        self,
        posterior: type[Distribution],
        prior: type[Distribution],
        reduced_prior: type[Distribution],
    ) -> Callable[[Rule], Rule]:
        """Decorator: registers the rule for a triple of types."""
        for name, kind in (("posterior", posterior), ("prior", prior), ("reduced_prior", reduced_prior)):
            if not isinstance(kind, type) or not issubclass(kind, Distribution):
                raise TypeError(f"{name} must be a type of distribution: got {kind!r}")

        def decorate(rule: Rule) -> Rule:
            self.rules[posterior, prior, reduced_prior] = rule
            return rule

        return decorate

    def find(self, members: tuple[Distribution, Distribution, Distribution]) -> Callable[..., Any] | None:
        """The rule for three distributions; None if there is none."""
        lineages = [type(member).__mro__ for member in members]
        matches = [key for key in product(*lineages) if key in self.rules]

        def distance(key: tuple[type, ...]) -> int:
            return sum(line.index(kind) for line, kind in zip(lineages, key, strict=True))

        return self.rules[min(matches, key=distance)] if matches else None
