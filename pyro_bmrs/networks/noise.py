"""The layer that multiplies each structure of a network by a latent θ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro.distributions import Independent
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.distributions import LogUniform
from pyro_bmrs.networks.inputs import check_module

# For tensors of this size or larger, fewer copies are worth some microseconds.
LARGE = 2**16
# The number of examples, where several values of θ are drawn for a batch; None elsewhere. A stack of θ from elsewhere,
# such as `Predictive(parallel=True)`, must not be mistaken for such draws, nor another dimension for the examples.
examples_in_batch: ContextVar[int | None] = ContextVar("examples_in_batch", default=None)
FROM_PRIOR = (
    "this network has noise layers and is called without a guide, so that each θ is drawn from its prior: to predict, "
    "call pyro_bmrs.predict(model, guide, x)"
)
# θ by site, 0 for removed structures, where a fit has drawn the θ of all layers at once.
_drawn_together: ContextVar[Mapping[str, Tensor] | None] = ContextVar("drawn_together", default=None)


@contextmanager
def drawn_together(values: Mapping[str, Tensor], examples: int) -> Iterator[None]:
    """A context in which noise layers use these θ, (draws, features) by site, and don't draw any.

    Args:
        examples: of the batch.
    """
    tokens = _drawn_together.set(values), examples_in_batch.set(examples)
    try:
        yield
    finally:
        _drawn_together.reset(tokens[0])
        examples_in_batch.reset(tokens[1])


class MultiplicativeNoise(nn.Module):
    """Multiplies each of `features` structures by its own latent θ ~ LogUniform, one value per structure.

    >>> import torch, pyro
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), MultiplicativeNoise(8), nn.Linear(8, 2))
    >>> name_sites(net)
    >>> sites = pyro.poutine.trace(net).get_trace(torch.zeros(5, 4)).stochastic_nodes
    >>> sites
    ['2']

    Put it where the structure is *read*: after the activation, at the input of the next linear or convolution layer.
    Pooling, flatten and dropout may stand between. There θ = 0 is exactly removal, and multiplying the columns of the
    next layer by E[θ] is exactly θ = E[θ], whatever activation, bias or normalisation comes before.

    Outside of Pyro, as in `net(x)`, θ is drawn from its prior, with a warning: `predict` uses the posterior.
    In its forward pass the layer is one Pyro sample site. `name_sites` names it after its module; `Classifier`,
    `Regressor` and `AutoTruncatedLogNormal` call that. Its value has the shape (features,), or (draws, features) where
    `fit` draws for groups of examples: example i then uses draw i mod draws.

    Attributes:
        kept: False for structures that a fit has removed, whose θ is 0. Shape: (features,).
        units: number of each structure in the original network. Shape: (features,).
        channels: channels that each structure has, more than 1 for attention heads.

    Args:
        features: number of structures, the size of dimension `dim` of the input.
        dim: dimension of the input that counts structures: 1 for (batch, features) and
            (batch, channels, height, width), -1 for (batch, tokens, features).
        log_low, log_high: bounds of log θ.

    Raises:
        ValueError: if features < 1, log_low ≥ log_high, or the input has another number of structures.
        RuntimeError: in the forward pass, if the layer has no site name yet.
    """

    log_low: Tensor
    log_high: Tensor
    kept: Tensor
    units: Tensor

    def __init__(self, features: int, *, dim: int = 1, log_low: float = -20.0, log_high: float = 0.0) -> None:
        super().__init__()
        check(is_whole(features, 1), "features", "a positive integer", features)
        check(isinstance(dim, int), "dim", "an integer", dim)
        if dim == 0:
            raise ValueError("dim must not be 0, which counts examples: got 0")
        LogUniform(log_low, log_high)  # checks the bounds
        self.features, self.dim = int(features), dim
        self.site: str | None = None
        self.register_buffer("log_low", torch.tensor(float(log_low)))
        self.register_buffer("log_high", torch.tensor(float(log_high)))
        self.register_buffer("kept", torch.ones(features, dtype=torch.bool))
        self.register_buffer("units", torch.arange(features))
        self.channels = 1

    def prior(self) -> Independent:
        """LogUniform over the layer, removed structures masked out. Event shape: (features,)."""
        units = LogUniform(self.log_low, self.log_high).expand([self.features])
        distribution: Independent = units.mask(self.kept).to_event(1)
        return distribution

    def draw(self) -> Tensor:
        """θ, 0 for what has been removed, as one Pyro sample site. Shape: (features,) or (draws, features)."""
        if self.site is None:
            raise RuntimeError(
                "this MultiplicativeNoise layer has no site name yet: call pyro_bmrs.name_sites(model), "
                "or wrap the network in pyro_bmrs.Classifier or Regressor"
            )
        together = _drawn_together.get()
        if together is not None:
            return together[self.site]
        if not am_i_wrapped():
            warnings.warn(FROM_PRIOR, stacklevel=2)
        theta: Tensor = pyro.sample(self.site, self.prior())
        if theta.shape[-1] != self.features:
            raise ValueError(
                f"θ of noise layer {self.site!r} must have shape ({self.features},) or (draws, {self.features}): "
                f"got {tuple(theta.shape)}"
            )
        return theta * self.kept

    def forward(self, x: Tensor) -> Tensor:
        there = x.dim() >= 2 and -x.dim() <= self.dim < x.dim()
        if self.site is not None and (not there or x.shape[self.dim] != self.features):
            raise ValueError(
                f"input of noise layer {self.site!r} must have {self.features} structures in dimension "
                f"{self.dim}: got shape {tuple(x.shape)}"
            )
        return scaled(x, self.draw(), self.dim, f"noise layer {self.site!r}")

    def select(self, kept: Tensor) -> None:
        """Become, in place, the layer of the structures where `kept`, bool (features,), is True."""
        self.features = int(kept.sum())
        self.kept, self.units = self.kept[kept], self.units[kept]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # weights of the network without noise load as well
        for name, tensor in self.named_buffers(recurse=False):
            state_dict.setdefault(f"{prefix}{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}, kept={int(self.kept.sum())}, site={self.site!r}"


def at_one(module: nn.Module) -> FixedScales:
    """A context in which every θ of `module` is 1, as if there were no noise."""
    layers = noise_layers(module)
    return FixedScales(
        {site: torch.ones_like(layer.kept, dtype=torch.float) for site, layer in layers.items()}
    )


def scaled(
    x: Tensor, theta: Tensor, dim: int, name: str, *, examples: int | None = None, exclusive: bool = False
) -> Tensor:
    """x · θ along dimension `dim` of x; of several draws, example i takes draw i mod draws.

    Args:
        x: (batch, …), with as many entries in `dim` as θ has.
        theta: (features,), or (draws, features) with draws ≤ batch.
        name: of the place, for error messages.
        examples: of the batch, where θ may hold several draws. None: as the handler that makes them says.
        exclusive: whether only one linear layer or convolution reads the product.

    Raises:
        ValueError: for several draws where none are expected, or the first dimension of x does not count the examples.
    """
    theta = theta.to(x.dtype)
    layout = [1] * x.dim()
    layout[dim] = theta.shape[-1]
    if theta.dim() == 1:
        return x * theta.view(layout)
    draws, layout[0] = theta.shape[0], x.shape[0]
    examples = examples_in_batch.get() if examples is None else examples
    if theta.dim() == 2 and examples is not None and layout[0] != examples:
        raise not_examples(name, x, examples)
    if theta.dim() != 2 or draws > layout[0] or examples is None:
        raise ValueError(
            f"θ of {name} must have shape ({theta.shape[-1]},) or (draws ≤ {layout[0]}, {theta.shape[-1]}): "
            f"got {tuple(theta.shape)}; "
            "call the network outside of pyro.plate, and Predictive with parallel=False"
        )
    theta = by_example(theta, examples)
    theta = theta if x.dim() == 2 else theta.view(layout)
    if x.numel() < LARGE:
        return x * theta
    product: Tensor = _Scale.apply(x, theta, exclusive)
    return product


def by_example(theta: Tensor, examples: int) -> Tensor:
    """θ of each example, which takes draw i mod draws. Shape: (draws, features) to (examples, features)."""
    whole, rest = examples // len(theta), examples % len(theta)
    repeated = theta if whole == 1 else theta.repeat(whole, 1)
    return torch.cat([repeated, theta[:rest]]) if rest else repeated


def not_examples(name: str, x: Tensor, examples: int) -> ValueError:
    """The error of a place whose input x does not count the examples in its first dimension."""
    return ValueError(
        f"the input of {name} must have examples in its first dimension to draw several values of θ per batch: it "
        f"has shape {tuple(x.shape)} for {examples} examples; pass draws_per_batch=1"
    )


class _Scale(torch.autograd.Function):
    """x · θ, with gradients that allocate as few large tensors as possible: allocating is most of their cost.

    The gradient of θ is a dot product over the positions of a feature map. The gradient of x overwrites the incoming
    one, if nothing else can use that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, exclusive: bool) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.exclusive = exclusive
        return x * theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, theta = ctx.saved_tensors
        by_positions = x.dim() > 2 and theta.shape == (*x.shape[:2], *[1] * (x.dim() - 2))
        if by_positions and grad.is_contiguous() and x.is_contiguous():
            total = torch.linalg.vecdot(grad.flatten(2), x.flatten(2)).view(theta.shape)
        else:
            total = (grad * x).sum_to_size(theta.shape)
        in_place = ctx.exclusive and not torch.is_grad_enabled()
        return grad.mul_(theta) if in_place else grad * theta, total, None


def noise_layers(module: nn.Module) -> dict[str, MultiplicativeNoise]:
    """The noise layers below `module`, by site name, in the order of its modules."""
    name_sites(module)
    return {str(layer.site): layer for layer in module.modules() if isinstance(layer, MultiplicativeNoise)}


def name_sites(module: nn.Module) -> None:
    """Name the site of each unnamed noise layer below `module` after the layer's path in it.

    Raises:
        TypeError: if `module` is none.
        ValueError: if two different layers end up with one name.
    """
    check_module("module", module)
    seen: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, MultiplicativeNoise):
            layer.site = layer.site or path or "noise"
            if seen.setdefault(layer.site, layer) is not layer:
                raise ValueError(
                    f"two noise layers have the site name {layer.site!r}: set `site` of one of them"
                )


class FixedScales(Messenger):  # type: ignore[misc]
    """Effect handler: the sites named in `values` take those values instead of being drawn.

    Unlike `poutine.condition` it leaves them latent: they are no observations, and θ = 0, a removed structure, does not
    count as a value outside the prior's support.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # of two such handlers the inner one decides; it has run before
        if msg["name"] in self.values and not msg["is_observed"] and not msg["done"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def fixed_scales(module: nn.Module, values: Mapping[str, Tensor]) -> FixedScales:
    """A context in which the noise sites of `module` that `values` names take those values.

    Raises:
        ValueError: if `values` names a site that `module` does not have.
    """
    layers = noise_layers(module)
    unknown = sorted(set(values) - set(layers))
    if unknown:
        raise ValueError(f"values must name noise sites {sorted(layers)}: got {unknown}")
    return FixedScales(values)
