"""The Laplace posterior of a trained network's weights, a matrix normal for each layer, as a Pyro guide."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.distributions.kronecker_normal import KroneckerNormal
from pyro_bmrs.evidence.kronecker import (
    KroneckerCurvature,
    as_it_is,
    log_marginal_likelihood,
    prior_precision,
)
from pyro_bmrs.files import on_disk
from pyro_bmrs.inference.calls import unique_name
from pyro_bmrs.inference.likelihoods import Likelihood, own_weights
from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.curvature import Moments, matrix_layers
from pyro_bmrs.networks.inputs import Inputs, tensors_of
from pyro_bmrs.networks.matrices import apart, as_matrix, groups_of, input_dim, positions_of
from pyro_bmrs.networks.noise import noise_layers


class AutoKroneckerLaplace(nn.Module):
    """q(W) = Π over layers of Normal(ŵ, (N A ⊗ G + δ I)⁻¹): the Laplace posterior of a trained network's weights.

    A is the second moment of a layer's inputs, G that of the gradients of −log p(y | x) at its outputs, expected over y
    drawn from the model: Kronecker-factored curvature (Martens & Grosse, 2015; Ritter, Botev, Barber, 2018). A draw
    of y stands for the expectation, or for classes random signs, which have the same (Martens, Sutskever, Swersky,
    2012). δ is the precision of the prior N(0, 1/δ) of each weight, at the largest marginal likelihood.

    A bias that belongs to one layer has a flat prior. ΔF is integrated over it, so that A is then about the mean of the
    inputs, and the bias of a smaller network takes over what was constant. Draws of q, and `mean`, leave biases, and
    parameters of normalisations, at their values.

    >>> import torch, pyro_bmrs as bmrs
    >>> from torch import nn
    >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = bmrs.Classifier(net)
    >>> _ = bmrs.fit(model, None, (x, y), epochs=3, progress=False)
    >>> guide = bmrs.AutoKroneckerLaplace(model)
    >>> _ = bmrs.fit(model, guide, (x, y), progress=False)
    >>> guide.posterior()["0.weight"].event_shape
    torch.Size([8, 4])

    `fit(model, guide, train)` makes the posterior in one pass and changes no weight. The model then has a prior for the
    weights of these layers: they are latents of it, as `pyro.infer.Predictive` and `to_datatree` expect, and
    `bmrs.predict(model, guide, x)` uses their means. `torch.nn.MultiheadAttention` in the network is replaced, in
    place, by an equal `SeparateAttention`, whose projections are layers.

    Args:
        model: a `Classifier`, a `Regressor`, or another likelihood of pyro_bmrs, around a network without noise.
        examples: how many examples of the data A and G are taken from at most, and a refit looks at. N is still the
            size of the data.
        shared_prior: whether all layers have one δ. False: each its own.
        widest: of a convolution with more inputs (channels times positions in the kernel) A is taken as a product of
            channels and positions, so that it needs less time and memory.
        memory: GiB for the matrices of all layers; a refit takes as many examples as fit into what they leave. Where
            all need more, they lie in temporary files, layers are summed over in several passes, and the mathematics is
            on the CPU. The environment variable TMPDIR says where the files lie: it must be on a disk. A layer that
            alone needs more gets no curvature, with a warning; what it reads stays.

    Raises:
        TypeError, ValueError: for another model, or one without layers that are products with a matrix.
    """

    def __init__(
        self,
        model: Likelihood,
        *,
        examples: int = 4000,
        shared_prior: bool = False,
        widest: int = 1200,
        memory: float = 4.0,
    ) -> None:
        super().__init__()
        good = isinstance(model, Likelihood)
        check(good, "model", "a Classifier or a Regressor around a network", type(model), TypeError)
        if noise_layers(model):
            raise ValueError(
                "model must have a network without noise layers: this guide is for the weights of a trained one"
            )
        check(is_whole(widest, 1), "widest", "a positive integer", widest)
        check(is_number(memory) and memory > 0, "memory", "a positive number of GiB", memory)
        check(is_whole(examples, 1), "examples", "a positive integer", examples)
        check(isinstance(shared_prior, bool), "shared_prior", "True or False", shared_prior, TypeError)
        separate_attention(model.net)
        layers = matrix_layers(model.net)
        if not layers:
            raise ValueError(
                "model must have linear layers, convolutions or embeddings: its network has none"
            )
        self.examples, self.widest, self.memory = int(examples), int(widest), float(memory)
        self.shared_prior = shared_prior
        self.store_name = unique_name(self)
        self._model = [model]  # no submodule: its parameters are not the guide's
        needs = {path: _need(layer, widest) for path, layer in layers.items()}
        self.paths = tuple(path for path in layers if needs[path] <= memory)
        if len(self.paths) < len(layers):
            left = ", ".join(repr(path) for path in layers if path not in self.paths)
            warnings.warn(
                f"no curvature of {left}: alone it would need more than memory={memory:g} GiB, and what it reads stays",
                stacklevel=2,
            )
        self.keep = on_disk if sum(needs[path] for path in self.paths) > memory else as_it_is
        self.portions = _portions({path: _SUMS * needs[path] for path in self.paths}, memory)
        self.curvatures: dict[str, KroneckerCurvature] = {}
        self.deltas: dict[str, float] = {}
        self.log_likelihood = float("nan")
        self.dataset_size = 0
        # some examples (x, y) of the data, to look at what smaller networks lose
        self.shown: tuple[Inputs, Any] | None = None
        self.kl_weight = 1.0  # ΔF of this guide is that of the model itself

    @property
    def model(self) -> Likelihood:
        return self._model[0]

    def layer(self, path: str) -> nn.Module:
        """A layer of the network."""
        return self.model.net.get_submodule(path)

    @torch.no_grad()
    def set_moments(
        self, moments: Mapping[str, Moments], seen: int, dataset_size: int, log_likelihood: float
    ) -> None:
        """Make the posterior of sums over examples.

        Args:
            moments: by path; layers without any get no posterior.
            seen: number of examples that were summed over.
            dataset_size: N.
            log_likelihood: log p(data | ŵ), of all N, in nats.
        """
        curvatures = {}
        for path in self.paths:
            if path in moments and moments[path].rows:
                sums, module, keep = moments[path], self.layer(path), self.keep
                weights = as_matrix(module, module.get_parameter("weight").detach().double())
                positions = sums.positions
                if positions is not None:
                    # A is the product of both, and its trace that of the sums
                    positions = positions / positions.diagonal(dim1=-2, dim2=-1).mean(-1)[
                        :, None, None
                    ].clamp(min=1e-300)
                    weights, positions = apart(module, weights), keep(positions)
                curvatures[path] = KroneckerCurvature(
                    keep(sums.inputs / sums.rows), keep(sums.gradients / seen), keep(weights), dataset_size, positions,
                    None if sums.mean is None else keep(sums.mean), keep,
                )  # fmt: skip
        self.curvatures = curvatures
        shared = prior_precision(list(curvatures.values())) if self.shared_prior else None
        self.deltas = {path: shared or prior_precision([one]) for path, one in curvatures.items()}
        self.log_likelihood, self.dataset_size = log_likelihood, dataset_size
        self.model.weight_priors = {f"{path}.weight".lstrip("."): self.deltas[path] for path in curvatures}

    def room(self) -> float:
        """GiB of `memory` that the matrices leave, at least a quarter of it."""
        if self.keep is on_disk:
            return self.memory
        held = tensors_of([[*vars(one).values()] for one in self.curvatures.values()])
        size = sum(
            tensor.numel() * tensor.element_size() for tensor in {id(one): one for one in held}.values()
        )
        return max(self.memory - size / 2**30, self.memory / 4)

    def log_marginal_likelihood(self) -> float:
        """log p(data) of the network by Laplace's approximation, but for the flat priors of biases, in nats."""
        self.check_ready()
        layers = (log_marginal_likelihood(one, self.deltas[path]) for path, one in self.curvatures.items())
        return self.log_likelihood + sum(layers)

    def check_ready(self) -> None:
        """Raise RuntimeError before the fit, or where no layer has a posterior."""
        if not self.paths:
            raise RuntimeError(
                f"guide has no layer with a posterior: none fits into memory={self.memory:g} GiB"
            )
        if not self.curvatures:
            raise RuntimeError("guide has no posterior yet: call fit(model, guide, train)")

    @torch.no_grad()
    def posterior(self) -> dict[str, KroneckerNormal]:
        """The posterior of each layer's weights, by site: the name of the parameter in the network.

        Raises:
            RuntimeError: before the fit.
        """
        self.check_ready()
        return {f"{path}.weight".lstrip("."): self._law(path) for path in self.curvatures}

    def _law(self, path: str) -> KroneckerNormal:
        one, weight = self.curvatures[path].given_bias, self.layer(path).get_parameter("weight").detach()
        precision = one.eigenvalues + self.deltas[path]
        first: Tensor | None = one.of_outputs[1]
        second = one.of_inputs[1]
        if one.of_positions is not None:
            assert second is not None
            # (outputs, positions, channels) to (outputs, channels, positions)
            blocks, outputs, channels = one.shape
            precision = precision.view(blocks, outputs, -1, channels).mT.flatten(2)
            second = torch.einsum("bij,bpq->bipjq", second, one.of_positions[1]).flatten(3).flatten(1, 2)
        elif input_dim(self.layer(path)) == 0:
            precision, first, second = precision.mT, second, first

        def like(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(weight.device, weight.dtype)

        return KroneckerNormal(weight, like(first), like(second), precision.to(weight.device, weight.dtype))

    def mean(self) -> dict[str, Tensor]:
        """The mean of each latent: the network's own weights."""
        self.check_ready()
        return own_weights(self.model)

    def median(self, *_: Any) -> dict[str, Tensor]:
        """The median of each latent, which is its mean."""
        return self.mean()

    def forward(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {name: pyro.sample(name, law) for name, law in self.posterior().items()}


# A and G, their eigenvectors, an inverse and a moment of the weights, in float64; a pass needs a quarter of that.
_MATRICES, _BYTES = 4, 8
_SUMS = 0.25


def _need(module: nn.Module, widest: int) -> float:
    """GiB of a layer's matrices."""
    _, outputs, inputs = as_matrix(module, module.get_parameter("weight")).shape
    if isinstance(module, nn.Embedding):
        inputs = 1  # only counts
    elif inputs > widest:
        inputs //= positions_of(module)
    return _MATRICES * _BYTES * groups_of(module) * (inputs**2 + outputs**2) / 2**30


def _portions(needs: Mapping[str, float], memory: float) -> list[tuple[str, ...]]:
    """Layers, in their order, in as few sets as need no more than `memory` each."""
    portions: list[tuple[str, ...]] = []
    used = memory
    for path, need in needs.items():
        if used + need > memory:
            portions.append(())
            used = 0.0
        portions[-1] += (path,)
        used += need
    return portions
