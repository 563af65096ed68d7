"""How good a variational posterior is: k̂ of its draws, its ELBO, and how far it moved from the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import biject_to, kl_divergence

from pyro_bmrs.arguments import check, is_number, is_whole, whole_number
from pyro_bmrs.checks.data import DataOfModel
from pyro_bmrs.checks.densities import LogDensities, Values, log_densities
from pyro_bmrs.checks.draws import draw_posterior, parts_of
from pyro_bmrs.evidence.importance import LEAST_DRAWS, khat_threshold, pareto_khat
from pyro_bmrs.inference.batches import AT_ONCE, Data
from pyro_bmrs.inference.blocks import Block, JointNormalBlock
from pyro_bmrs.inference.sites import elementary, read_sites
from pyro_bmrs.inference.traces import parents_of
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.numerals import with_error
from pyro_bmrs.programs.sites import LatentSite, latent_site
from pyro_bmrs.progress import bar
from pyro_bmrs.pruning.reduce import kl_weight_of

# Log densities are equal if they differ by at most so many rounding errors of their size, and by at most so many nats.
_ROUNDINGS, _MOST = 16, 0.1


@dataclass(frozen=True)
class PosteriorChecks:
    """How near a variational posterior is to the exact one, and to its prior.

    Attributes:
        khat: a row for all latents together, then one for each part of the posterior that is independent of the
            others: part (its sites), latents (how many numbers), khat (-inf: all weights equal, the posterior is
            exact; inf: too unequal for a number), threshold, reliable (khat ≤ threshold).
        elbo: rows "model" and, where the KL weight w is not 1, "tempered", for p(y|θ)^(1/w): columns elbo and
            standard_error, in nats, for the whole data set; of draws, and of examples where only some are looked at.
        contraction: a row per latent number, or event: site, unit (a noise layer's as in the original network),
            contraction, KL(posterior ‖ prior) in nats: what the data said about it; 0: nothing. With
            standard_error, 0 for a closed form. What a fit has removed is NaN.
        draws: S.
        examples, dataset_size: how many were looked at, of how many; the log-likelihood is scaled accordingly.
        kl_weight: of the fit.
    """

    khat: pd.DataFrame
    elbo: pd.DataFrame
    contraction: pd.DataFrame
    draws: int
    examples: int
    dataset_size: int
    kl_weight: float

    def __str__(self) -> str:
        lines = [
            f"k̂ of {row.part}: {row.khat:.2f}, {'fine' if row.reliable else f'above {row.threshold:.2f}'}"
            for row in self.khat.itertuples()
        ]
        if not self.kl_weight:
            lines = ["k̂: nan, as at a KL weight of 0 there is no posterior to compare with"]
        lines += [
            f"ELBO of the {row.model}: {with_error(row.elbo, row.standard_error)} nats"
            for row in self.elbo.reset_index(names="model").itertuples()
        ]
        return "\n".join(lines)


def check_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: tuple[Any, ...] | Data,
    *,
    draws: int = 1000,
    seed: int = 0,
    kl_weight: float | None = None,
    dataset_size: int | None = None,
    batch_size: int = AT_ONCE,
) -> PosteriorChecks:
    """Pareto k̂ of the draws' weights p(y, θ)/q(θ), joint and by part; the ELBO; and the contraction of each latent.

    k̂ says whether the draws could be reweighted to the exact posterior: it is the shape of the generalised Pareto
    law of the largest weights. That of hundreds of latents together exceeds its threshold even for a good
    mean-field posterior; so each part that the guide draws independently of the others is also looked at on its own,
    with the other latents at the median of their draws. At a KL weight w the posterior is one of the model tempered to
    p(y|θ)^(1/w), and that is what its draws are compared with. Latents that the guide has at a
    point are taken as known.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def coins(heads):
    ...     logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
    ...     pyro.sample("heads", dist.Binomial(20, logits=logit), obs=heads)
    >>> guide = AutoNormal(coins, init_loc_fn=lambda site: torch.tensor(0.9), init_scale=0.5)
    >>> heads = torch.tensor(15.0)
    >>> _ = guide(heads)
    >>> checks = check_posterior(coins, guide, (heads,))
    >>> bool(checks.khat.reliable.all()), round(float(checks.elbo.elbo.iloc[0]), 1)
    (True, -2.9)

    Args:
        model, guide, data, batch_size: as of `to_datatree`; the data that the posterior was fitted to, or some of them.
        draws: S, at least 100.
        seed: of the draws.
        kl_weight: of the fit; default what `fit` noted in the guide.
        dataset_size: N, where the data, in batches, are some of N examples; k̂ is then one of a posterior of
            N examples like these, and tends to be too high.

    Raises:
        TypeError, ValueError: as `to_datatree`; for fewer than 100 draws, a dataset_size below what is given, or a
            guide whose density is not known: all latents at a point, or the reduced posterior of a plan.

    Source: Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?" (2018); Vehtari et al., "Pareto smoothed
    importance sampling" (2024).
    """
    draws, seed = whole_number("draws", draws, LEAST_DRAWS), whole_number("seed", seed)
    check(callable(guide), "guide", "a Pyro guide", type(guide), TypeError)
    weight = kl_weight_of(guide) if kl_weight is None else kl_weight
    check(is_number(weight) and weight >= 0, "kl_weight", "a number from 0 on", weight)
    of_model = DataOfModel(model, data, batch_size)
    examples = of_model.size
    size = examples if dataset_size is None else dataset_size
    allowed = f"the number of all examples, of which data has {examples} in batches"
    check(is_whole(size, examples) and (size == examples or of_model.batched), "dataset_size", allowed, size)
    with untouched(model, guide, seed=seed):
        return _Checking(model, guide, of_model, draws, size, weight).result()


class _Checking:
    """One look at a posterior; to be made within `untouched`."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: DataOfModel,
        draws: int,
        size: int,
        kl_weight: float,
    ) -> None:
        self.model, self.guide, self.data, self.draws = model, guide, data, draws
        self.size, self.kl_weight = size, kl_weight
        self.scale = size / data.size
        self.arguments = data.first()
        drawn = draw_posterior(guide, self.arguments, draws)
        self.posterior, self.blocks = parts_of(model, guide, data, self.arguments, drawn)
        if self.posterior.log_q is None:
            raise ValueError(
                "guide must have a density that is known, to be compared with the model's: all its latents are points, "
                "or it is the reduced posterior of a plan"
            )
        self.log_q = self.posterior.log_q.cpu()
        self.names = tuple(self.posterior.values[0])
        self.layers = noise_layers(model) if isinstance(model, nn.Module) else {}
        self.log_prior: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self.example: Trace | None = None
        self.per_example: list[Tensor] = []
        self._seen = 0

    def result(self) -> PosteriorChecks:
        blocks = self.blocks if len(self.blocks) > 1 else []
        # drawn before the data pass by: a loader draws from the same generator
        parts = [(block, *self._draws_of(block)) for block in blocks]
        with bar("k̂ of the posterior", (1 + len(parts)) * self.draws * len(self.data)) as advance:
            densities = log_densities(self.data, self.posterior.values, self._visit, advance)
            rows = [self._khat("all latents", self.names, densities, self.log_q)]
            centre = self._centre() if parts else {}
            for block, values, log_q in parts:
                inside = [{**centre, **chosen} for chosen in values]
                found = log_densities(self.data, inside, advance=advance)
                rows.append(self._khat(", ".join(block.sites), block.sites, found, log_q))
        return PosteriorChecks(
            khat=pd.DataFrame(rows),
            elbo=self._elbo(densities),
            contraction=self._contraction(),
            draws=self.draws,
            examples=self.data.size,
            dataset_size=self.size,
            kl_weight=self.kl_weight,
        )

    def _visit(
        self, draw: int, start: int, arguments: tuple[Any, ...], trace: Trace, terms: Mapping[str, Tensor]
    ) -> None:
        if self.data.batched and self.scale != 1:
            self._add_examples([terms[name] for name in read_sites(trace).data])
        if start:
            return
        self.example = self.example or trace
        for name, found in self.log_prior.items():
            found.append(terms[name].cpu())

    def _add_examples(self, parts: Sequence[Tensor]) -> None:
        """Add to the mean over draws of each example's log-likelihood. All draws of a batch come one after another."""
        sums = [part.flatten(1).sum(1) if part.dim() > 1 else part for part in parts]
        examples = torch.stack(sums).sum(0).cpu() / self.draws
        if self._seen % self.draws == 0:
            self.per_example.append(torch.zeros_like(examples))
        self.per_example[-1] += examples
        self._seen += 1

    def _log_weights(self, densities: LogDensities, log_q: Tensor, kl_weight: float) -> Tensor:
        return densities.log_prior + densities.log_likelihood * (self.scale / kl_weight) - log_q

    def _khat(
        self, part: str, sites: Sequence[str], densities: LogDensities, log_q: Tensor
    ) -> dict[str, Any]:
        values = self.posterior.values[0]
        khat, threshold = math.nan, khat_threshold(self.draws)
        if self.kl_weight:  # at 0 there is no posterior to compare with
            log_weights = self._log_weights(densities, log_q, self.kl_weight)
            size = densities.log_likelihood.abs().max() * self.scale / self.kl_weight + log_q.abs().max()
            kinds = [values[name].dtype for name in self.names if values[name].is_floating_point()]
            rounding = max(torch.finfo(kind).eps for kind in kinds or [torch.float32])
            allowed = min(_ROUNDINGS * rounding * float(size), _MOST)
            equal = log_weights.max() - log_weights.min() <= allowed
            khat = -math.inf if bool(equal) else pareto_khat(log_weights)
        latents = sum(values[name].numel() for name in sites)
        return dict(part=part, latents=latents, khat=khat, threshold=threshold, reliable=khat <= threshold)

    def _elbo(self, densities: LogDensities) -> pd.DataFrame:
        weights = {"model": 1.0}
        if self.kl_weight not in (0.0, 1.0):
            weights["tempered"] = self.kl_weight
        rows = {}
        for name, weight in weights.items():
            term = self._log_weights(densities, self.log_q, weight)
            of_draws = float(term.std()) / math.sqrt(self.draws)
            error = math.hypot(of_draws, self._error_of_sampling() / weight)
            rows[name] = {"elbo": float(term.mean()), "standard_error": error}
        return pd.DataFrame.from_dict(rows, orient="index")

    def _error_of_sampling(self) -> float:
        """Standard error of the log-likelihood of all N examples, told from n of them: N sd √((1 - n/N)/n)."""
        if not self.per_example:
            return 0.0
        found = torch.cat(self.per_example)
        if len(found) < 2:
            return math.nan
        return self.size * float(found.std()) * math.sqrt((1 - len(found) / self.size) / len(found))

    # --- one part at a time -------------------------------------------------------------------------

    def _centre(self) -> dict[str, Tensor]:
        """The median of each latent's draws; of vectors with a support of their own, the mean where it is unbounded,
        and of discrete ones the commonest.
        """
        assert self.example is not None
        centre = {}
        for name in self.names:
            drawn = torch.stack([values[name] for values in self.posterior.values])
            support: Any = elementary(self.example.nodes[name]["fn"]).support
            if support.event_dim == 0:
                centre[name] = drawn.median(0).values
                continue
            try:
                transform = biject_to(support)
                centre[name] = transform(transform.inv(drawn).mean(0))
            except NotImplementedError:
                found, counts = drawn.unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]
                centre[name] = found[counts.argmax()]
        return centre

    def _draws_of(self, block: Block) -> tuple[list[Values], Tensor]:
        """Draws of one part, and its log density there."""
        if isinstance(block, JointNormalBlock):
            flat = block.draw(self.draws)
            values: Mapping[str, Tensor] = block.values(flat)
            log_q = block.log_density(flat)
        else:
            values = {block.site: block.distribution.sample((self.draws,))}
            density: Tensor = block.distribution.log_prob(values[block.site])
            if block.kept is not None:
                density = torch.where(block.kept, density, 0.0)
            log_q = density.flatten(1).sum(1) if density.dim() > 1 else density
        first = self.posterior.values[0]
        return [
            {name: value[draw].to(first[name].dtype) for name, value in values.items() if name in first}
            for draw in range(self.draws)
        ], log_q.cpu()

    # --- each latent ----------------------------------------------------------------------------------

    def _contraction(self) -> pd.DataFrame:
        assert self.example is not None
        asked = [name for name in self.names if name not in self.layers and self.blocks]
        drawn = iter(self.posterior.values)
        _, parents = parents_of(
            self.model, self.posterior.values[0], self.arguments, asked, draw=lambda: next(drawn)
        )
        columns: dict[str, list[Any]] = {"site": [], "unit": [], "contraction": [], "standard_error": []}
        for block in self.blocks:
            for name in block.sites:
                units = self.layers[name].units if name in self.layers else None
                node = self.example.nodes[name]
                site = latent_site(name, block, node, elementary(node["fn"]), parents.get(name, ()), units)
                mean, error = self._information(site)
                kept = site.kept.cpu()
                columns["site"] += [name] * kept.numel()
                columns["unit"] += site.units.tolist()
                columns["contraction"] += torch.where(kept, mean.cpu(), math.nan).flatten().tolist()
                columns["standard_error"] += torch.where(kept, error.cpu(), math.nan).flatten().tolist()
        return pd.DataFrame(columns)

    def _information(self, site: LatentSite) -> tuple[Tensor, Tensor]:
        """KL(q ‖ p) of each element of a site and its standard error, over draws where there is no closed form."""
        if not site.parents:
            with suppress(NotImplementedError):
                closed: Tensor = kl_divergence(site.posterior, site.prior)
                return closed, torch.zeros_like(closed)
        values = torch.stack([drawn[site.name] for drawn in self.posterior.values]).double()
        # events of several numbers have one density
        log_p = torch.stack(self.log_prior[site.name]).reshape(self.draws, *site.shape, -1).sum(-1)
        differences = site.posterior.log_prob(values).cpu() - log_p
        return differences.mean(0), differences.std(0) / np.sqrt(self.draws)
