"""The ELBO of a batch: several draws of the noise, and a KL that is counted once per data set."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from pyro_bmrs.inference.packed import Drawn
from pyro_bmrs.inference.sites import elementary, read_sites
from pyro_bmrs.networks.noise import examples_in_batch


class LatentsPerBatch(Messenger):  # type: ignore[misc]
    """Effect handler that gives the noise sites `draws` values per batch, and weights the KL of all latents.

    Enter it around both model and guide. These still have one value per noise site. The handler expands the site over
    a plate of `draws` and scales it by 1/draws. What remains is the mean of the likelihood over draws and one whole
    KL: an unbiased estimate of the same ELBO.

    Args:
        noise_sites: the sites that are drawn several times. They have no batch dimensions of their own.
        draws: values per batch, at least 1.
        examples: of the batch. Noise layers check that these are what they see.
        noise_weight: factor on the KL of the noise sites.
        latent_weight: factor on the KL of every other latent.
        local_sites: latents of single examples. Their KL belongs to the batch and is not weighted.
    """

    def __init__(
        self,
        noise_sites: Collection[str],
        draws: int,
        examples: int,
        noise_weight: float,
        latent_weight: float,
        local_sites: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.noise_sites, self.draws, self.examples = frozenset(noise_sites), draws, examples
        self.noise_weight, self.latent_weight = noise_weight, latent_weight
        self.local_sites = frozenset(local_sites)

    def __enter__(self) -> LatentsPerBatch:
        self._token = examples_in_batch.set(self.examples)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        examples_in_batch.reset(self._token)
        super().__exit__(*error)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or msg["name"] in self.local_sites:
            return
        if msg["name"] not in self.noise_sites:
            msg["scale"] = msg["scale"] * self.latent_weight
            return
        if self.draws > 1 and msg["fn"].batch_shape:
            raise ValueError(
                f"noise site {msg['name']!r} must not lie in a plate to be drawn several times per batch: "
                f"it has batch shape {tuple(msg['fn'].batch_shape)}; pass draws_per_batch=1"
            )
        msg["infer"] = {**msg["infer"], "noise": True}
        self._draw(msg)

    def _draw(self, msg: dict[str, Any]) -> None:
        if self.draws > 1:
            msg["fn"] = msg["fn"].expand((self.draws,))
            frame = CondIndepStackFrame(name="noise_draws", dim=-1, size=self.draws, counter=0)
            msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        msg["scale"] = msg["scale"] * self.noise_weight / self.draws


class PackedSites(LatentsPerBatch):
    """`LatentsPerBatch` in which all noise sites are drawn together, with one KL.

    A stand-in replaces the distribution of each site. The first one holds the whole KL, the others 0.
    """

    def __init__(
        self,
        drawn: Drawn,
        draws: int,
        examples: int,
        noise_weight: float,
        latent_weight: float,
        local_sites: Collection[str] = (),
    ) -> None:
        super().__init__(drawn.values, draws, examples, noise_weight, latent_weight, local_sites)
        self.drawn = drawn
        self.first = next(iter(drawn.values))

    def _draw(self, msg: dict[str, Any]) -> None:
        theta = self.drawn.values[msg["name"]]
        kl = self.drawn.kl
        msg["fn"] = _Packed(theta, kl if msg["name"] == self.first else 0 * kl)
        msg["scale"] = msg["scale"] * self.noise_weight


class _Packed(TorchDistribution):  # type: ignore[misc]
    """Replaces a site's posterior and prior: a draw is `value`, and the KL between the two is `kl`."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, value: Tensor, kl: Tensor) -> None:
        super().__init__(torch.Size(), value.shape, validate_args=False)
        self.value, self.kl = value, kl

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.value.expand(sample_shape + self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero: Pyro asks for it, and then takes the KL."""
        return value.new_zeros(value.shape[: value.dim() - len(self.event_shape)])


@register_kl(_Packed, _Packed)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_packed(p: _Packed, q: _Packed) -> Tensor:
    return p.kl


class LikelihoodELBO(TraceMeanField_ELBO):  # type: ignore[misc]
    """TraceMeanField_ELBO that holds for any guide. It keeps the log-likelihood of its last value, in nats.

    A closed form of KL(q(a) ‖ p(a | b)) holds for a `b` that was drawn before `a`. If the guide draws `b` later, it may
    depend on `a`. Then log q and log p at the draw take the place of the closed form.
    """

    log_likelihood: Tensor

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[Tensor | float, Tensor]:
        self.log_likelihood = observed_log_prob(model_trace)
        _mark_drawn(model_trace, guide_trace)
        result: tuple[Tensor | float, Tensor] = super()._differentiable_loss_particle(
            model_trace, guide_trace
        )
        return result


class _Drawn(Distribution):
    """Replaces a law, of which no KL in closed form is to be taken."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True


def _mark_drawn(model_trace: Trace, guide_trace: Trace) -> None:
    """Mark the latents whose KL has no closed form that holds: what a guide draws too early, and Deltas.

    Raises:
        ValueError: for a latent that only one of the two draws.
    """
    places = {name: place for place, name in enumerate(guide_trace.nodes)}
    latest = -1
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"]:
            continue
        if name not in places:
            raise ValueError(
                f"model must draw the same latents in each call: it has drawn {name!r}, of which the guide has no "
                "posterior"
            )
        drawn = guide_trace.nodes[name]
        # the prior of a noise site depends on nothing; of a Delta Pyro's closed form leaves out the log-density, which
        # is the Jacobian of an autoguide's map to the support
        early = places[name] < latest and not drawn["infer"].get("noise")
        if early or isinstance(elementary(drawn["fn"]), Delta):
            drawn["fn"] = _Drawn(validate_args=False)
        latest = max(latest, places[name])
    alone = [
        name
        for name, node in guide_trace.nodes.items()
        if node["type"] == "sample"
        and name not in model_trace.nodes
        and not node["infer"].get("is_auxiliary")
    ]
    if alone:
        raise ValueError(f"model must draw the same latents in each call: it has not drawn {alone}")


def observed_log_prob(trace: Trace, *, without: Collection[str] = ()) -> Tensor:
    """Sum of the log-likelihoods of the observed sites, with their scales, in nats; detached."""
    trace.compute_log_prob(site_filter=lambda name, site: site["is_observed"])
    parts = [
        node["log_prob_sum"].detach() for name, node in read_sites(trace).data.items() if name not in without
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())
