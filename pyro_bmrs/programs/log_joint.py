"""log p(y, θ) of a Pyro program as a function of unbounded numbers, under its own priors or reduced ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import ComposeTransform, biject_to

from pyro_bmrs.evidence.unwrapping import fixed, flat
from pyro_bmrs.inference.blocks import UnconstrainedSite
from pyro_bmrs.inference.sites import elementary, is_discrete, mask_of, plate_scale, read_sites
from pyro_bmrs.inference.traces import model_at
from pyro_bmrs.programs.sites import LatentSite, Selection

# Of values of all discrete latents together, that are summed over one by one.
_MOST_COMBINATIONS = 64


class UncheckableError(ValueError):
    """A model whose log p(y, θ) is no function of a few unbounded numbers."""


class _ReducedPriors(Messenger):  # type: ignore[misc]
    """Effect handler: chosen elements have their reduced priors. A point's density counts as 1."""

    def __init__(self, sites: Mapping[str, LatentSite], chosen: Selection) -> None:
        super().__init__()
        self.sites, self.chosen = sites, chosen

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name not in self.chosen:
            return
        site, law, value = self.sites[name], elementary(msg["fn"]), msg["value"]
        own = law.log_prob(value)
        missing = site.event_dim - len(law.event_shape)
        own = own.flatten(own.dim() - missing).sum(-1) if missing else own
        reduced = (
            torch.zeros_like(own)
            if isinstance(site.reduced_prior, dist.Delta)
            else site.reduced_prior.log_prob(value.double() if value.is_floating_point() else value)
        )
        change = torch.where(self.chosen[name], reduced - own, 0.0)
        events = len(msg["fn"].event_shape) - site.event_dim
        if events > 0:
            change = change.flatten(change.dim() - events).sum(-1)
        elif events < 0:
            # the model draws the element in plates, where each entry counts: each gets its share
            entries = value.shape[change.dim() : change.dim() - events]
            change = change.reshape(change.shape + (1,) * -events).expand(change.shape + entries)
            change = change / entries.numel()
        pyro.factor(f"_{name}_reduced", change)


class LogJoint:
    """The model's log density of data and latents. Discrete latents are summed out.

    Attributes:
        layout: of the unconstrained values of the continuous latents.
        size: their number.
        observations: numbers observed.
        outer: which of them are of latents that can't take all real numbers. Bool, shape: (size,).

    Args:
        model, args: the Pyro program and what it is called with.
        sites: those that may have reduced priors.
        values: a draw of all latents of the guide.
        most: the largest number of unconstrained values.

    Raises:
        UncheckableError: if the density is no function of the guide's latents, or of too many numbers.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        sites: Mapping[str, LatentSite],
        values: Mapping[str, Tensor],
        most: int,
    ) -> None:
        self.model, self.args, self.sites = model, args, sites
        self.layout: dict[str, UnconstrainedSite] = {}
        self.kinds: dict[str, torch.dtype] = {}
        self.size, self.observations, outer, discrete = 0, 0, [], {}
        read = read_sites(model_at(model, values, *args))
        for name, node in {**read.latent, **read.auxiliary, **read.data}.items():
            _check_whole(name, node)
        for node in read.data.values():
            self.observations += max(node["value"].numel(), torch.Size(node["fn"].batch_shape).numel())
        for name, node in {**read.latent, **read.auxiliary}.items():
            if name not in values:
                raise UncheckableError(f"the guide has no {name!r}")
            if mask_of(node["fn"]) is not None or node["mask"] is not None:
                raise UncheckableError(f"{name!r} is masked")
            shape = node["value"].shape
            if is_discrete(node["fn"]):
                discrete[name] = _all_values(name, elementary(node["fn"]), shape)
                continue
            transform = ComposeTransform(flat([fixed(biject_to(node["fn"].support))]))
            shape = torch.Size(transform.inverse_shape(shape))  # type: ignore[no-untyped-call]
            self.layout[name] = UnconstrainedSite(self.size, shape, transform)
            self.kinds[name] = node["value"].dtype
            self.size += shape.numel()
            outer += [bool(transform.parts)] * shape.numel()
        if self.size > most or math.prod(map(len, discrete.values())) > _MOST_COMBINATIONS:
            raise UncheckableError("the latents are too many")
        self.outer = torch.tensor(outer, dtype=torch.bool)
        self.combinations = [
            dict(zip(discrete, chosen, strict=True)) for chosen in product(*discrete.values())
        ]

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Shape of each: site → (size,)."""
        parts = [at.transform.inv(values[name].double()).flatten() for name, at in self.layout.items()]
        return torch.cat([torch.empty(0, dtype=torch.float64), *parts])

    def coordinates(self, chosen: Selection) -> Tensor:
        """Which numbers the chosen elements are. Bool, shape: (size,)."""
        found = torch.zeros(self.size, dtype=torch.bool)
        for name, mask in chosen.items():
            if name in self.layout:
                at = self.layout[name]
                own = at.of(torch.arange(self.size)).reshape(mask.numel(), -1)
                found[own[mask.flatten().cpu()].flatten()] = True
        return found

    def points(self, chosen: Selection) -> dict[str, Tensor]:
        """The chosen elements whose reduced prior is a point."""
        return {
            name: mask
            for name, mask in chosen.items()
            if isinstance(self.sites[name].reduced_prior, dist.Delta)
        }

    def of(self, chosen: Selection) -> Callable[[Tensor], Tensor]:
        """log p̃(y, θ) where the chosen elements have their reduced priors, as a density of unconstrained values.

        Shape: (free,) → (). Points are not among the values that are free.
        """
        points = self.points(chosen)
        free = ~self.coordinates(points)
        # what is not free gets the value behind the last one, which the point replaces
        place = torch.where(free, free.cumsum(0) - 1, free.sum())

        def log_density(x_free: Tensor) -> Tensor:
            u = torch.cat([x_free, x_free.new_zeros(1)])[place]
            values, total = {}, u.new_zeros(())
            for name, at in self.layout.items():
                x = at.of(u)
                value = at.transform(x)
                jacobian = at.transform.log_abs_det_jacobian(x, value)  # type: ignore[no-untyped-call]
                if name in points:
                    value = self._at_point(name, points[name], value)
                    jacobian = torch.where(
                        points[name], 0.0, jacobian.reshape(*points[name].shape, -1).sum(-1)
                    )
                total = total + jacobian.sum()
                values[name] = value.to(self.kinds[name])
            terms = []
            for combination in self.combinations:
                others = {
                    name: self._at_point(name, points[name], value) if name in points else value
                    for name, value in combination.items()
                }
                with _ReducedPriors(self.sites, chosen):
                    terms.append(model_at(self.model, values | others, *self.args).log_prob_sum().double())
            return total + torch.stack(terms).logsumexp(0)

        return log_density

    def _at_point(self, name: str, mask: Tensor, value: Tensor) -> Tensor:
        whole = mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim()))
        return torch.where(whole, self.sites[name].reduced_prior.v.to(value.dtype), value)


def _check_whole(name: str, node: Mapping[str, Any]) -> None:
    """Refuse a site in a plate that takes some of its members."""
    if plate_scale(node) != 1:
        raise UncheckableError(f"{name!r} is subsampled")


def _all_values(name: str, law: Any, shape: torch.Size) -> list[Tensor]:
    """Every value of a discrete site."""
    try:
        single = law.enumerate_support(expand=False)
    except NotImplementedError:
        raise UncheckableError(f"{name!r} has too many values") from None
    if len(single) ** shape.numel() > _MOST_COMBINATIONS:
        raise UncheckableError(f"{name!r} has too many values")
    entries = single.flatten()
    return [torch.stack(chosen).reshape(shape) for chosen in product(entries, repeat=shape.numel())]
