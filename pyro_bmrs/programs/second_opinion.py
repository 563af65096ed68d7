"""Is ΔF right? What the model itself says of it, beside what the guide says.

ΔF = log p̃(y) - log p(y). The guide's answer, log E_q[p̃/p], is as good as the guide is where p̃ has its mass, and its
draws can't show what lies beyond them. Here both evidences are integrals of the model's own density, from draws that
reach everywhere: heavy-tailed ones around the guide, and ones of the reduced prior.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bmrs.evidence.importance import UnreliableEstimateWarning
from pyro_bmrs.evidence.log_integral import LogIntegral, Proposal, StudentT, log_integral
from pyro_bmrs.inference.blocks import JointNormalBlock
from pyro_bmrs.inference.traces import guide_values
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.programs.latents import Evidence, Latents
from pyro_bmrs.programs.log_joint import LogJoint, UncheckableError
from pyro_bmrs.programs.sites import LatentSite, Selection

# Bounds of the cost: choices that are checked, draws for each, latents, and numbers that these make of the data.
_MOST_CHECKS, _DRAWS, _GUIDE_DRAWS, _MOST_LATENTS, _MOST_WORK = 16, 500, 100, 200, 10**9
# Where k̂ is too large, once more with so many times the draws.
_AGAIN = 4
_AT_ONCE = 2 * 10**7
# ΔF is wrong by this much, or its sign is and it is wrong by SIGN at least; besides ERRORS standard errors.
_ABSOLUTE, _RELATIVE, _SIGN, _ERRORS = 0.5, 0.25, 0.1, 3.0
# Independent latents whose correlation is ρ have standard deviations too small by √(1 - ρ²): 0.5 nats.
_CORRELATED = 0.8
# Where nothing can be checked: ΔF below the first decides anyway, else this share of the reduced prior is a warning.
_DECISIVE, _UNSEEN = -5.0, 0.5
_NAMED = 3


@dataclass(frozen=True)
class Choice:
    """A choice of elements, what to call it, and ΔF by the guide."""

    name: str
    selection: Selection
    change: float
    standard_error: float


def choices_of(latents: Latents, selections: Mapping[str, Selection]) -> list[Choice]:
    """The first 16 selections that are not empty, with ΔF of each."""
    chosen = {name: latents.chosen(selection) for name, selection in selections.items()}
    first = [(name, selection) for name, selection in chosen.items() if selection][:_MOST_CHECKS]
    return [_choice(name, selection, latents.change(selection)) for name, selection in first]


def _choice(name: str, selection: Selection, found: Evidence) -> Choice:
    return Choice(name, selection, float(found.log_evidence_change), float(found.standard_error))


def choices(latents: Latents, groups: Mapping[str, Selection], log_odds: float) -> list[Choice]:
    """Each site as a whole, the groups, and single elements, those nearest to a decision first; 16 at most."""
    whole: dict[str, Selection] = {
        f"site {name!r}": {name: site.kept} for name, site in latents.sites.items()
    }
    found = choices_of(latents, whole | {f"group {name!r}": group for name, group in groups.items()})
    single = []
    for name, site in latents.sites.items():
        if int(site.kept.sum()) > 1:
            evidence = Evidence(*(part.flatten() for part in latents.elements[name]))
            for number in torch.nonzero(site.kept.flatten()).flatten().tolist():
                single.append(
                    (abs(float(evidence.log_evidence_change[number]) + log_odds), name, number, evidence)
                )
    single.sort(key=lambda entry: entry[0])
    for _, name, number, evidence in single[: _MOST_CHECKS - len(found)]:
        site = latents.sites[name]
        mask = torch.zeros_like(site.kept).flatten()
        mask[number] = True
        own = Evidence(*(part[number] for part in evidence))
        found.append(_choice(f"{name}[{int(site.units[number])}]", {name: mask.reshape(site.shape)}, own))
    return found


def second_opinion(latents: Latents, asked: Sequence[Choice], log_odds: float = 0.0) -> pd.DataFrame | None:
    """ΔF of each choice by the model itself; warns where the guide's is wrong, or may be and can't be checked.

    Returns:
        A row for each choice: name, log_evidence_change (by the guide), checked (by the model; NaN where its k̂ is too
        large), standard_error and khat of the latter. None where the model can't be asked: it has noise layers,
        more than 200 latents, latents that are masked, subsampled or not in the guide, or is no function that
        torch.func.vmap takes.

    Warns:
        UnreliableEstimateWarning: naming the sites, the numbers, and what to do.
    """
    if isinstance(latents.model, nn.Module) and set(latents.sites) & set(noise_layers(latents.model)):
        return None
    table, messages, unsure = None, [], asked
    # RuntimeError: of models that vmap can't take, such as those that look at values
    with suppress(UncheckableError, RuntimeError, NotImplementedError), latents.looking(stream=2):
        with pyro.validation_enabled(False):
            opinion = _Opinion(latents)
            rows = [opinion.row(choice) for choice in asked]
        table = pd.DataFrame(rows)
        unsure = [choice for choice, row in zip(asked, rows, strict=True) if math.isnan(row["checked"])]
        messages = [opinion.correlations(), _disagreements(asked, rows, log_odds)]
    messages.append(_unseen(latents, unsure))
    for message in filter(None, messages):
        warnings.warn(message, UnreliableEstimateWarning, stacklevel=3)
    return table


def _disagreements(asked: Sequence[Choice], rows: Sequence[Mapping[str, Any]], log_odds: float) -> str:
    """Where the guide's ΔF is wrong; empty if it is nowhere."""
    wrong = [
        f"{choice.name}: ΔF is {choice.change:+.3g} nats by the guide and {row['checked']:+.3g} ± "
        f"{row['standard_error']:.2g} by the model itself (k̂ {row['khat']:.2f})"
        for choice, row in zip(asked, rows, strict=True)
        if _wrong(choice, row["checked"], row["standard_error"], log_odds)
    ]
    if not wrong:
        return ""
    more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return (
        f"{'; '.join(wrong[:_NAMED])}{more}. The guide does not fit where the reduced prior has its mass: "
        "use the model's numbers (plan.checked), or fit a guide that does"
    )


def _wrong(choice: Choice, checked: float, standard_error: float, log_odds: float) -> bool:
    """Whether ΔF by the guide is far from that by the model, or on the wrong side. False where the latter is NaN."""
    difference = abs(choice.change - checked)
    error = _ERRORS * math.hypot(standard_error, choice.standard_error)
    decided = abs(checked + log_odds) > _ERRORS * standard_error
    other_side = decided and (choice.change + log_odds >= 0) != (checked + log_odds >= 0)
    far = difference > _ABSOLUTE + _RELATIVE * abs(checked) + error
    return far or (other_side and difference > max(_SIGN, error))


class _Opinion:
    """The model's density, and where the guide is; to be made while looking at them."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents
        drawn = [guide_values(latents.guide, *latents.args) for _ in range(_GUIDE_DRAWS)]
        self.joint = LogJoint(latents.model, latents.args, latents.sites, drawn[0], _MOST_LATENTS)
        work = (self.joint.size + 1) * max(self.joint.observations, 1)
        if work * _DRAWS > _MOST_WORK:
            raise UncheckableError("the data are too many")
        self.chunk = max(1, _AT_ONCE // work)
        points = torch.stack([self.joint.unconstrained(values) for values in drawn])
        if not bool(torch.isfinite(points).all()):
            raise UncheckableError("the guide has values on the border of a support")
        self.start = points.mean(0)
        self.spread = (points - self.start).mT @ (points - self.start) / _GUIDE_DRAWS
        self.full = self.integral({}, 2 * _DRAWS)

    def integral(self, chosen: Selection, draws: int = _DRAWS) -> LogIntegral:
        joint = self.joint
        free = ~joint.coordinates(joint.points(chosen))
        drawn = {name: mask for name, mask in chosen.items() if self._by_draws(name)}
        outer = (joint.outer | joint.coordinates(drawn)) & free
        start, spread = self.start[free], self.spread[outer][:, outer]
        beside = _Beside(self, outer, drawn) if drawn else None
        density = joint.of(chosen)

        def estimate(draws: int) -> LogIntegral:
            return log_integral(
                density, start, spread, outer[free], beside=beside, draws=draws, chunk=self.chunk
            )

        found = estimate(draws)
        return found if found.reliable else estimate(_AGAIN * draws)

    def _by_draws(self, name: str) -> bool:
        """Whether reduced elements are drawn from their reduced prior: all but points and normals."""
        law = self.latents.sites[name].reduced_prior
        at = self.joint.layout.get(name)
        if at is None or isinstance(law, dist.Delta):
            return False
        normal = isinstance(law, torch.distributions.Normal | torch.distributions.MultivariateNormal)
        return at.transform.parts != [] or not normal  # type: ignore[attr-defined]

    def row(self, choice: Choice) -> dict[str, Any]:
        found = self.integral(choice.selection)
        sure = found.reliable and self.full.reliable
        return {
            "name": choice.name,
            "log_evidence_change": choice.change,
            "checked": found.estimate - self.full.estimate if sure else math.nan,
            "standard_error": math.hypot(found.standard_error, self.full.standard_error),
            "khat": max(found.khat, self.full.khat),
        }

    def correlations(self) -> str:
        """The latents that the guide takes for independent and the model does not; empty if there are none."""
        if not self.full.reliable:
            return ""
        weights, draws = self.full.log_weights.exp(), self.full.draws
        away = draws - weights @ draws
        covariance = (weights.unsqueeze(-1) * away).mT @ away
        scale = covariance.diagonal().clamp(min=torch.finfo(covariance.dtype).tiny).sqrt()
        correlation = covariance / scale / scale.unsqueeze(-1)
        pairs = [
            (abs(float(correlation[i, j])), i, j)
            for i, j in (correlation.abs() > _CORRELATED).nonzero().tolist()
            if i != j and self._taken_for_independent(i, j)
        ]
        if not pairs:
            return ""
        _, i, j = max(pairs)
        others = len({frozenset(pair[1:]) for pair in pairs}) - 1
        more = f" (and {others} more pairs are correlated)" if others else ""
        return (
            f"guide takes {self._name(i)} and {self._name(j)} for independent, and the model gives them a "
            f"correlation of {float(correlation[i, j]):.2f}{more}: ΔF of what is reduced there is wrong; fit an "
            "AutoMultivariateNormal guide"
        )

    def _owner(self, number: int) -> tuple[str, int]:
        """The site of a coordinate, and the number within it."""
        for name, at in self.joint.layout.items():
            if at.start <= number < at.start + at.shape.numel():
                return name, number - at.start
        raise IndexError(number)

    def _name(self, number: int) -> str:
        name, place = self._owner(number)
        return f"{name}[{place}]" if self.joint.layout[name].shape.numel() > 1 else repr(name)

    def _taken_for_independent(self, asked: int, other: int) -> bool:
        name, place = self._owner(asked)
        other_name, other_place = self._owner(other)
        site = self.latents.sites.get(name)
        if site is None:
            return False
        if other_name != name:
            return other_name not in site.block.sites
        width = self.joint.layout[name].shape.numel() // max(site.shape.numel(), 1)
        return not isinstance(site.block, JointNormalBlock) and place // width != other_place // width


class _Beside(Proposal):
    """Some outer coordinates from their reduced priors, the others from a t law around the guide."""

    def __init__(self, opinion: _Opinion, outer: Tensor, drawn: Selection) -> None:
        self.parts = []
        numbers = outer.cumsum(0) - 1
        joint = opinion.joint
        for name, mask in drawn.items():
            at, site = joint.layout[name], opinion.latents.sites[name]
            own = at.of(numbers).reshape(mask.numel(), -1)[mask.flatten()].flatten()
            self.parts.append((at, site, mask, own))
        rest = outer & ~joint.coordinates(drawn)
        self.rest, self.size = numbers[rest], int(outer.sum())
        spread = 4 * opinion.spread[rest][:, rest]
        eye = torch.eye(len(self.rest), dtype=spread.dtype)
        self.law = StudentT(opinion.start[rest], torch.linalg.cholesky(spread + 1e-9 * eye))

    def draw(self, draws: int) -> Tensor:
        found = self.law.loc.new_zeros(draws, self.size)
        found[:, self.rest] = self.law.draw(draws)
        for at, site, mask, own in self.parts:
            value = at.transform.inv(site.reduced_prior.sample((draws,)))
            found[:, own] = value.reshape(draws, mask.numel(), -1)[:, mask.flatten()].flatten(1)
        return found

    def log_density(self, outer: Tensor) -> Tensor:
        density = self.law.log_density(outer[:, self.rest])
        for at, site, mask, own in self.parts:
            x = outer.new_zeros(len(outer), mask.numel(), at.shape.numel() // mask.numel())
            x[:, mask.flatten()] = outer[:, own].reshape(len(outer), int(mask.sum()), -1)
            x = x.reshape(-1, *at.shape)
            value = at.transform(x)
            jacobian = at.transform.log_abs_det_jacobian(x, value).reshape(len(x), mask.numel(), -1).sum(-1)  # type: ignore[no-untyped-call]
            each = site.reduced_prior.log_prob(value).reshape(len(x), -1) + jacobian
            density = density + each[:, mask.flatten()].sum(-1)
        return density


# --- where the model can't be asked -----------------------------------------------------------------


def _unseen(latents: Latents, asked: Sequence[Choice]) -> str:
    """A choice near a decision that puts most of a reduced prior's mass beyond all draws of the guide; or empty."""
    with latents.looking(stream=3):
        for choice in asked:
            if choice.change < _DECISIVE:
                continue
            for name, share in _shares(latents, choice.selection):
                if share > _UNSEEN:
                    return (
                        f"{choice.name}: {100 * share:.0f} % of the reduced prior of {name!r} lies beyond "
                        f"{latents.draws} draws of the guide, so ΔF ({choice.change:+.3g} nats) rests on the guide's "
                        "tail, and the model can't check it: fit the reduced model too, or a guide with mass there"
                    )
    return ""


def _shares(latents: Latents, chosen: Selection) -> Iterator[tuple[str, float]]:
    """Of each site, the largest share of the reduced prior of an element that lies beyond the guide's draws."""
    for name, mask in chosen.items():
        site: LatentSite = latents.sites[name]
        posterior, reduced = (law.sample((latents.draws,)) for law in (site.posterior, site.reduced_prior))
        if site.event_dim or not posterior.is_floating_point() or not bool(mask.any()):
            continue
        beyond = (reduced < posterior.amin(0)) | (reduced > posterior.amax(0))
        yield name, float(beyond.double().mean(0)[mask].max())
