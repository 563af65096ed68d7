"""The parameters of one site's posterior, which lose entries as a fit takes structures out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.distributions.packed import bounded
from pyro_bmrs.networks.cuts import replace_data

# The tensors with an entry per structure.
_PER_STRUCTURE = ("loc", "log_scale", "log_low", "log_high", "kept")


def _law(loc: Tensor, log_scale: Tensor, low: Tensor, high: Tensor) -> TruncatedLogNormal:
    # after the clamps only NaN could be wrong, which reduce and fit look for
    return TruncatedLogNormal(*bounded(loc, log_scale, low, high), low, high, validate_args=False)


class SitePosterior(nn.Module):
    """Parameters of one site's posterior, over the shape of the site's value.

    Attributes:
        loc, log_scale: the parameters.
        log_low, log_high: bounds of log θ.
        kept: False for structures that are removed, but still there.
        removed_units: of structures that a fit has taken out, their numbers in the original network.
        removed_loc, removed_log_scale: their last parameters.
    """

    log_low: Tensor
    log_high: Tensor
    kept: Tensor
    removed_units: Tensor
    removed_loc: Tensor
    removed_log_scale: Tensor

    def __init__(self, prior: LogUniform | TruncatedLogNormal, shape: torch.Size, loc: float, scale: float):
        super().__init__()
        like = prior.log_low
        self.loc = nn.Parameter(torch.full(shape, loc, dtype=like.dtype, device=like.device))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(scale)))
        self.register_buffer("log_low", prior.log_low.detach().expand(shape).clone())
        self.register_buffer("log_high", prior.log_high.detach().expand(shape).clone())
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=like.device))
        self.register_buffer("removed_units", torch.empty(0, dtype=torch.long, device=like.device))
        for name in ("removed_loc", "removed_log_scale"):
            self.register_buffer(name, torch.empty(*shape[:-1], 0, dtype=like.dtype, device=like.device))

    def distribution(self) -> TruncatedLogNormal:
        """The posterior of what is in the network, with gradients."""
        return _law(self.loc, self.log_scale, self.log_low, self.log_high)

    def removed_posterior(self) -> TruncatedLogNormal:
        """The last posterior of each structure that was taken out, in the order of `removed_units`."""
        shape = self.removed_loc.shape
        bounds = (bound[..., :1].expand(shape) for bound in (self.log_low, self.log_high))
        return _law(self.removed_loc, self.removed_log_scale, *bounds)

    def select(self, kept: Tensor, units: Tensor) -> None:
        """Become, in place, the posterior of the structures where `kept`; `units` are the numbers of all."""
        kept = kept.to(self.loc.device)
        stays, leaves = (torch.nonzero(mask).flatten() for mask in (kept, ~kept))
        self.removed_units = torch.cat([self.removed_units, units.to(leaves.device)[leaves]])
        for name in ("loc", "log_scale"):
            last = getattr(self, name).detach().index_select(-1, leaves)
            setattr(self, f"removed_{name}", torch.cat([getattr(self, f"removed_{name}"), last], dim=-1))
        for name in _PER_STRUCTURE:
            tensor = getattr(self, name)
            replace_data(tensor, tensor.detach().index_select(-1, stays))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # as many as the saved one had lost, whatever this one has
        for name in ("removed_units", "removed_loc", "removed_log_scale"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.loc.device))
        super()._load_from_state_dict(state_dict, prefix, *others)
