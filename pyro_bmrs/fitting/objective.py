"""The loss of a batch: three implementations of the same ELBO, fastest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bmrs.inference.elbo import LatentsPerBatch, LikelihoodELBO, PackedSites
from pyro_bmrs.inference.examples import Counting
from pyro_bmrs.inference.likelihoods import has_own_likelihood
from pyro_bmrs.inference.packed import PackedLatents
from pyro_bmrs.inference.sites import read_sites
from pyro_bmrs.networks.noise import drawn_together, noise_layers


class Objective(nn.Module):
    """Loss per example of a batch, -(log-likelihood)/B + weight · KL/N, in nats.

    Args:
        model, guide: as in `fit`; a guide of None: a model without latents.
        first: a batch to trace them with.
        count: counts the examples of a batch; default: the first dimension of y, which x must share.
        dataset_size: N.
        draws: values of each θ per batch; None: one per example.
        stratified: whether these draws are stratified where latents are packed.
        elbo: the implementation. "fused": θ of all layers drawn at once and the log-likelihood computed without
            Pyro, for `Classifier` and `Regressor` with an `AutoTruncatedLogNormal`; "packed": θ of all layers
            drawn at once, for any Pyro model with that guide; "pyro": for any model and any guide, each site
            by itself; "auto": the first of these that model and guide allow.
        validate: let "auto" leave out "fused", in which Pyro can check nothing.
        scaled: whether the model's likelihood is scaled to the data set, not to the batch.
        local_sites: latents of single examples.

    Raises:
        ValueError: if model and guide do not allow `elbo`.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: Callable[..., Any] | None,
        first: tuple[Any, Any],
        *,
        dataset_size: int,
        count: Callable[[Any, Any], int] | None = None,
        draws: int | None = None,
        stratified: bool = True,
        elbo: str = "auto",
        validate: bool = False,
        scaled: bool = False,
        local_sites: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.count = count or Counting("train")
        self.dataset_size, self.draws, self.scaled = dataset_size, draws, scaled
        self.local_sites = local_sites
        layers = noise_layers(model)
        packable = bool(layers) and PackedLatents.possible(guide, layers)
        plain = guide is None and not layers
        able = {
            "fused": (plain or packable) and has_own_likelihood(model) and self._only_noise(first),
            "packed": packable,
            "pyro": True,
        }
        allowed = [name for name in able if able[name]]
        self.elbo = elbo
        if elbo == "auto":
            self.elbo = next(name for name in allowed if not (validate and name == "fused"))
        if self.elbo not in allowed:
            raise ValueError(
                f"elbo must be one that this model and guide allow, {allowed}: "
                f"got {elbo!r} for {type(model).__name__} with {type(guide).__name__}"
            )
        self.packed = None
        if packable and self.elbo != "pyro":
            self.packed = PackedLatents(guide, layers, stratified=stratified)  # type: ignore[arg-type]
        self.sites = tuple(layers)
        self.pyro_elbo = LikelihoodELBO()
        self.pyro_loss = self.pyro_elbo(model, guide or _no_latents)

    def _only_noise(self, first: tuple[Any, Any]) -> bool:
        """Whether the noise sites are all that model and guide draw, and y all that the model observes."""
        programs = (self.model, self.guide or _no_latents)
        with torch.no_grad():
            read = [read_sites(poutine.trace(program).get_trace(*first)) for program in programs]
        sites = set(noise_layers(self.model))
        data = [name for program in read for name in program.data]
        return data == ["y"] and all({*program.latent, *program.auxiliary} == sites for program in read)

    def forward(self, x: Any, y: Any, kl_weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """(loss, log-likelihood), both in nats per example, the second detached."""
        batch = self.count(x, y)
        draws = min(self.draws or batch, batch)
        if self.elbo == "fused":
            return self._fused(x, y, kl_weight, draws, batch)
        assert not isinstance(kl_weight, Tensor)  # which only a CUDA graph has
        # The likelihood is that of `examples` of the N. The KL gets the same share.
        examples = self.dataset_size if self.scaled else batch
        share = examples / self.dataset_size
        weights = kl_weight * share, share, self.local_sites
        if self.packed is None:
            handler = LatentsPerBatch(self.sites, draws, batch, *weights)
        else:
            handler = PackedSites(self.packed.draw(draws), draws, batch, *weights)
        with handler:
            loss = self.pyro_loss(x, y) / examples
        return loss, self.pyro_elbo.log_likelihood / examples

    def _fused(
        self, x: Any, y: Any, kl_weight: float | Tensor, draws: int, batch: int
    ) -> tuple[Tensor, Tensor]:
        if self.packed is None:
            total = self.model.log_likelihood(x, y)  # type: ignore[operator]
            return total * (-1 / batch), total.detach() / batch
        drawn = self.packed.draw(draws, batch)
        with drawn_together(drawn.values, batch):
            total = self.model.log_likelihood(x, y)  # type: ignore[operator]
        # as few operations as possible, also of the gradient
        loss = torch.add(drawn.kl * (kl_weight / self.dataset_size), total, alpha=-1 / batch)
        return loss, total.detach() / batch


def _no_latents(*_: Any) -> None:
    """The guide of a model without latents."""
