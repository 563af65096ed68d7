"""What a fit requires of a Pyro model and its guide, checked before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.guides import AutoCallable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmrs.arguments import check
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.inference.calls import check_arguments
from pyro_bmrs.inference.evaluate import likelihood_scale
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.sites import (
    Sites,
    check_observed,
    check_same_latents,
    elementary,
    masked_latents,
    read_sites,
    warn_of_masked,
)
from pyro_bmrs.inference.traces import model_at
from pyro_bmrs.networks.inputs import check_finite, check_module, taken
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import noise_layers

_TRIED = 4  # draws of the prior at which examples are looked at apart


def check_programs(model: nn.Module, guide: Callable[..., Any] | None, settings: Settings) -> None:
    """Raise, naming the argument, unless a fit can be made of these."""
    check_module("model", model)
    check(guide is None or callable(guide), "guide", "a Pyro guide or None", type(guide), TypeError)
    try:
        check_arguments(model, (None, None))
    except ValueError:
        raise TypeError(
            "model must be a Pyro model, called as model(x, y), such as a Classifier of a network: got "
            f"{type(model).__name__}"
        ) from None
    check_finite("model", model)
    sites = list(noise_layers(model))
    if guide is None and sites:
        raise ValueError(f"guide must be given for a model with noise layers {sites}")
    if guide is not None and not sites and settings.kl_weight not in (1, "auto"):
        raise ValueError(
            f"kl_weight must be 1 for a model without noise layers, which it weighs: got {settings.kl_weight}"
        )
    asked = "criterion" in settings.model_fields_set or settings.removal == "epoch"
    if asked and not isinstance(guide, AutoTruncatedLogNormal):
        raise TypeError("criterion needs an AutoTruncatedLogNormal guide; use reduce() after the fit instead")


@torch.no_grad()
def check_parameters(model: nn.Module, guide: Callable[..., Any], first: tuple[Any, ...]) -> None:
    """Raise if a `pyro.param` belongs to no module: no optimiser would train it, and it would be lost."""
    for name, program in (("model", model), ("guide", guide)):
        module = program if isinstance(program, nn.Module) else nn.Module()
        own = {parameter.data_ptr() for parameter in [*module.parameters(), *model.parameters()]}
        # of a parameter that is not contiguous, as in channels_last, `pyro.module` keeps a copy that nobody reads
        apart = {path for path, parameter in module.named_parameters() if not parameter.is_contiguous()}
        with in_mode(model, training=False):
            sites = poutine.trace(program, param_only=True).get_trace(*first).nodes.items()
        for site, node in sites:
            of_module = site.partition("$$$")[2] in apart
            if (
                node["type"] == "param"
                and not of_module
                and node["value"].unconstrained().data_ptr() not in own
            ):
                raise TypeError(
                    f"{name} has the pyro.param {site!r}, which no optimiser here would train: make it an "
                    "nn.Parameter or PyroParam of a module"
                )


@torch.no_grad()
def check_latents(
    model: nn.Module, guide: Callable[..., Any] | None, first: tuple[Any, ...], sites: Sites
) -> None:
    """Raise unless the guide draws all latents of the model, and so that gradients reach its parameters; and for NaN.

    Args:
        sites: of the model on the batch `first`.
    """
    check_observed(sites)
    drawn = Sites() if guide is None else read_sites(poutine.trace(guide).get_trace(*first))
    check_same_latents(sites, drawn.latent, guide is not None)
    for name, node in sites.latent.items():
        shapes = [tuple(part["value"].shape) for part in (node, drawn.latent[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"guide must draw {name!r} of shape {shapes[0]}, as the model does: got {shapes[1]}"
            )
    for name, node in (drawn.latent | drawn.auxiliary).items():
        if not node["fn"].has_rsample:
            raise ValueError(
                f"guide must draw {name!r} from a distribution with rsample, through which gradients pass: "
                f"{type(elementary(node['fn'])).__name__} has none. Sum discrete latents out in the model"
            )
    warn_of_masked(masked_latents(sites))


def check_local(guide: Callable[..., Any] | None, local: frozenset[str], batches: Batches) -> None:
    """Raise if a guide has a posterior for each place in a batch, and batches hold other examples each time.

    Args:
        local: the latents of single examples.
    """
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    by_place = sorted(
        {
            name
            for part in parts
            if isinstance(part, AutoGuide) and not isinstance(part, AutoCallable | AutoGuideList)
            for name in local & set(part.prototype_trace.nodes)
        }
    )
    if by_place and (len(batches) > 1 or batches.loader is not None):
        raise ValueError(
            f"batch_size must be {batches.size} or more, with tensors or a Dataset as train, for latents of single "
            f"examples, {by_place}: {type(guide).__name__} has one posterior for each place in a batch. Or write a "
            "guide that makes theirs of x"
        )


@torch.no_grad()
def check_batches_apart(model: nn.Module, first: tuple[Any, Any], sites: Sites, batches: Batches) -> None:
    """Raise unless batches that are cut from the data can stand for themselves.

    The halves of a batch must have the same latents as the whole, and as much log-likelihood together. Those of a time
    series or a Gaussian process have not. A loader's batches may be apart for reasons of its own.

    Args:
        sites: of the model on the batch `first`.
    """
    examples = batches.count(*first)
    half, local, once = examples // 2, sites.local(examples), sites.whole(examples)
    if len(batches) == 1 or batches.loader is not None or not half or noise_layers(model):
        return

    def log_likelihood(fixed: Mapping[str, Tensor], chosen: slice) -> Tensor:
        data = read_sites(model_at(model, fixed, *taken(first, chosen, examples))).data
        parts = [node["fn"].log_prob(node["value"]).sum() for name, node in data.items() if name not in once]
        return torch.stack(parts).sum()

    reason = ""
    with torch.random.fork_rng(), suppress(RuntimeError, ValueError, IndexError, KeyError, TypeError):
        # what raises does not take such a batch
        free = read_sites(poutine.trace(model).get_trace(*taken(first, slice(half), examples))).latent
        shapes = {name: node["value"].shape for name, node in sites.latent.items() if name not in local}
        grown = [name for name, shape in shapes.items() if free[name]["value"].shape != shape]
        if grown:
            reason = f"its latents {grown} have other shapes for fewer. Put those of examples in their plate"
        for _ in range(0 if grown or local else _TRIED):
            drawn = read_sites(poutine.trace(model).get_trace(*first)).latent
            fixed = {name: node["value"] for name, node in drawn.items()}
            chosen = slice(None), slice(half), slice(half, None)
            whole, *halves = (log_likelihood(fixed, one) for one in chosen)
            if (whole - sum(halves)).abs() > 1e-4 * (
                1 + whole.abs()
            ):  # false for NaN, of which the first step tells
                reason = f"the log-likelihood of {examples} is not the sum of that of their halves, as in a time series"
    if reason:
        raise ValueError(
            f"batch_size must be the number of all examples, {batches.size}, for a model whose examples depend on each "
            f"other: {reason}"
        )


@torch.no_grad()
def check_examples_apart(model: nn.Module, first: tuple[Any, Any], sites: Sites, examples: int) -> None:
    """Raise unless what the model says of an example depends on no other example, where each has a θ of its own.

    The second half of the batch is replaced by the first. What the model says of the first must stay as it was.

    Args:
        sites: of the model on the batch `first`.

    Raises:
        ValueError: as for a network of a graph, whose nodes exchange messages.
    """
    half = examples // 2
    layers = noise_layers(model)
    # normalisation by the batch's own statistics mixes examples in training anyway
    by_batch = any(isinstance(part, _BatchNorm) and part.running_mean is None for part in model.modules())
    if not half or not layers or by_batch:
        return
    order = torch.arange(examples)
    order[examples - half :] = order[:half]

    fixed = {name: node["value"] for name, node in sites.latent.items()}
    fixed |= {site: torch.ones_like(layer.kept, dtype=torch.float) for site, layer in layers.items()}
    found = []
    for x in (first[0], taken(first[0], order, examples)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                observed = read_sites(model_at(model, fixed, x, first[1])).observed
                found.append({name: node["fn"].log_prob(node["value"]) for name, node in observed.items()})
            except (RuntimeError, ValueError, IndexError):  # it does not take such a batch
                return
    for name, before in found[0].items():
        after = found[1].get(name)
        if after is None or before.shape[:1] != (examples,) or after.shape != before.shape:
            continue
        moved = (after - before)[: examples - half].abs().max()
        if moved > 1e-3 * (1 + before.abs().max()):  # false for NaN, of which the first step tells
            raise ValueError(
                f"draws_per_batch must be 1 for a model whose examples depend on each other: {name!r} of one example "
                "changes with the inputs of others, which would have other values of θ. Examples may also stand in "
                "another dimension than the first"
            )


def speaks_for_the_data_set(sites: Sites, batch: int, size: int) -> bool:
    """Whether the likelihood of a model on a batch is scaled to the whole data set, and not the batch's own.

    Raises:
        ValueError: if it has another scale, or parts of it belong to no example and would count in each batch.
    """
    scale, full = likelihood_scale(sites, batch), size / batch
    whole = sorted(sites.whole(batch))
    if whole and batch < size and math.isclose(scale, 1.0):
        raise ValueError(
            f"model must not have {whole} outside of the plate of its examples, where it would count in each batch: "
            f"put it into that plate, or make that a plate of N = {size} with the batch as its subsample, beside which "
            "it counts once"
        )
    if math.isclose(scale, 1.0):
        return False
    if not math.isclose(scale, full, rel_tol=1e-4):
        raise ValueError(
            "model must scale its likelihood either by 1 (it speaks for the batch) or by N/batch = "
            f"{full:.6g} (for the data set, N = {size}): got {scale:.6g}"
        )
    return True
