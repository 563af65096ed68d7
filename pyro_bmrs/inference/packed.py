"""All noise sites of a model drawn at once: one draw and one KL for all structures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmrs.distributions import LogUniform
from pyro_bmrs.distributions.packed import draw_with_kl, uniforms
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.sites import elementary
from pyro_bmrs.networks.noise import MultiplicativeNoise, by_example


class Drawn(NamedTuple):
    """θ by site, (draws or examples, features) or of one draw (features,), 0 where removed; and the KL, in nats."""

    values: dict[str, Tensor]
    kl: Tensor


class PackedLatents:
    """The posteriors of a guide's noise sites, drawn together.

    Args:
        guide: with parameters (called once).
        layers: the noise layers by site. Their priors are log-uniform on the guide's bounds.
        stratified: whether the draws of a structure are stratified: see `distributions.packed.uniforms`.
    """

    def __init__(
        self, guide: AutoTruncatedLogNormal, layers: Mapping[str, MultiplicativeNoise], *, stratified: bool
    ) -> None:
        self.sites, self.stratified = tuple(layers), stratified
        self.posteriors = [guide.site_posterior(site) for site in self.sites]
        self._state: list[tuple[object, ...]] = []
        self._last: tuple[list[int], Tensor, Tensor, Tensor]

    @staticmethod
    def possible(guide: object, layers: Mapping[str, MultiplicativeNoise]) -> bool:
        """Whether the guide is an `AutoTruncatedLogNormal` of all these layers, with log-uniform priors."""
        if not isinstance(guide, AutoTruncatedLogNormal) or not set(layers) <= set(guide.sites):
            return False
        if type(guide).forward is not AutoTruncatedLogNormal.forward:
            return False
        return all(
            isinstance(elementary(layer.prior()), LogUniform)
            and guide.site_posterior(site).loc.shape == (layer.features,)
            for site, layer in layers.items()
        )

    def draw(self, draws: int, examples: int | None = None) -> Drawn:
        """`draws` values of every θ, and the KL; where `examples` are given, each of these with its draw."""
        sizes, low, high, kept = self._constants()
        u = uniforms(draws, len(low), stratified=self.stratified, device=low.device)
        theta, kl = draw_with_kl(self._joined("loc"), self._joined("log_scale"), low, high, kept, u)
        theta = theta[0] if draws == 1 else theta if examples is None else by_example(theta, examples)
        parts = torch.split(theta, sizes, dim=-1)
        return Drawn(dict(zip(self.sites, parts, strict=True)), kl)

    def _joined(self, name: str) -> Tensor:
        return torch.cat([getattr(posterior, name) for posterior in self.posteriors])

    def _constants(self) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """Sizes, bounds and kept of all sites. They are joined again only after a removal of structures."""
        # a removal changes the sizes, or the mask in place
        state: list[tuple[object, ...]] = [
            (p.loc.shape, p.loc.device, p.kept._version) for p in self.posteriors
        ]
        if state != self._state:
            sizes = [len(posterior.loc) for posterior in self.posteriors]
            self._last = sizes, self._joined("log_low"), self._joined("log_high"), self._joined("kept")
            self._state = state
        return self._last
