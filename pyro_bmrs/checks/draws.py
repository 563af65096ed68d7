"""Joint draws of all latents from a guide, with their log density."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_bmrs.checks.data import DataOfModel
from pyro_bmrs.inference.blocks import Block, SiteBlock
from pyro_bmrs.inference.posteriors import read_blocks
from pyro_bmrs.inference.sites import (
    Sites,
    elementary,
    masked_latents,
    plate_scale,
    read_sites,
    warn_of_masked,
)
from pyro_bmrs.inference.traces import model_at
from pyro_bmrs.programs.reduced_posterior import ReducedPosterior


@dataclass(frozen=True)
class PosteriorDraws:
    """Joint draws of all latents of a guide.

    Attributes:
        values: of each draw, by site.
        log_q: log density of the guide there, in nats. None where it has none that is known: all latents are points,
            or it is the posterior of a reduced model. Shape: (draws,), float64.
    """

    values: list[dict[str, Tensor]]
    log_q: Tensor | None


def draw_posterior(guide: Callable[..., Any], arguments: tuple[Any, ...], draws: int) -> PosteriorDraws:
    """Draw all latents jointly; to be called within `untouched`."""
    values: list[dict[str, Tensor]] = []
    densities, points = [], True
    for _ in range(draws):
        trace = poutine.trace(guide).get_trace(*arguments)
        read = read_sites(trace)
        if not values:
            check_scales("guide", read)
        trace.compute_log_prob()
        sites = [*read.latent.values(), *read.auxiliary.values(), *read.data.values()]
        densities.append(sum(site["log_prob_sum"].double() for site in sites))
        points = points and all(isinstance(elementary(site["fn"]), dist.Delta) for site in sites)
        values.append({name: site["value"].detach() for name, site in read.latent.items()})
        changing = sorted(values[-1].keys() ^ values[0].keys())
        if changing:
            raise ValueError(f"guide must have the same latents in each call: it has {changing} in some only")
    if not values[0]:
        raise ValueError("guide must have latents: it samples none")
    # what a reduced posterior draws with is of other dimensions than the latents that it makes of it
    unknown = points or isinstance(guide, ReducedPosterior)
    return PosteriorDraws(
        values, None if unknown else torch.stack([torch.as_tensor(density) for density in densities])
    )


def parts_of(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: DataOfModel,
    arguments: tuple[Any, ...],
    posterior: PosteriorDraws,
) -> tuple[PosteriorDraws, list[Block]]:
    """The draws, and the independent parts of the guide; none where it does not show them.

    The density of both is that of the elements that have one in the model: `poutine.mask` takes it from others.

    Warns:
        MaskedLatentWarning: where these can't be told apart in the guide.
    """
    blocks: list[Block] = []
    with suppress(ValueError, NotImplementedError):  # UnreadablePosteriorError among them
        blocks = read_blocks(guide, *arguments, sites=tuple(posterior.values[0]))
    if data.batched or posterior.log_q is None:
        return posterior, blocks
    trace = model_at(model, posterior.values[0], *arguments)
    masks, log_q = masked_latents(read_sites(trace)), posterior.log_q
    for number, block in enumerate(blocks):
        if isinstance(block, SiteBlock) and block.site in masks:
            mask = masks.pop(block.site)
            values = torch.stack([drawn[block.site] for drawn in posterior.values]).double()
            density = block.distribution.log_prob(values)
            density = density.reshape(len(values), *mask.shape, -1).sum(-1)
            log_q = log_q - torch.where(mask, 0.0, density).flatten(1).sum(1)
            blocks[number] = replace(block, kept=mask if block.kept is None else mask & block.kept)
    warn_of_masked(masks)
    return replace(posterior, log_q=log_q), blocks


def check_scales(name: str, read: Sites) -> None:
    """Refuse what would make a weight of two densities that don't belong together."""
    for site, node in read.plates.items():
        if (node["fn"].subsample_size or node["fn"].size) < node["fn"].size:
            raise ValueError(
                f"{name} must not choose other examples in each call: its plate {site!r} takes "
                f"{node['fn'].subsample_size} of {node['fn'].size}. Give the plate all of them, or always the same"
            )
    for site, node in (read.latent | read.auxiliary).items():
        scale = torch.as_tensor(node["scale"])
        if plate_scale(node) == 1 and bool(((scale - 1).abs() > 1e-6).any()):
            raise ValueError(
                f"{name} must have its latents' own densities: {site!r} is scaled by {float(scale.flatten()[0]):g}. "
                "Leave out poutine.scale; a KL weight is told by kl_weight"
            )
