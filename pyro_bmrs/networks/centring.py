"""Streams that LayerNorms read, centred, so that the LayerNorms are RMSNorms and the streams can lose channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.copies import copied, sharing_parameters
from pyro_bmrs.networks.cuts import joined, tensor_of
from pyro_bmrs.networks.inputs import Inputs, as_double, call, first_examples, tensors_of
from pyro_bmrs.networks.precision import InDouble
from pyro_bmrs.networks.structures import StructureError, traced
from pyro_bmrs.networks.surgery import TOLERANCE, difference
from pyro_bmrs.networks.tracing.findings import Line

_EXAMPLES = 4


class CentredNorm(nn.Module):
    """What a LayerNorm is for inputs of mean 0: y = x / √(mean(x²) + ε) · weight + bias, over the last dimension.

    >>> x = torch.tensor([[1.0, -3.0, 2.0]])
    >>> torch.equal(CentredNorm.of(nn.LayerNorm(3))(x).round(decimals=5), nn.LayerNorm(3)(x).round(decimals=5))
    True
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.eps = eps

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> CentredNorm:
        """The same for inputs of mean 0."""
        bias = None if norm.bias is None else norm.bias.detach().clone()
        return cls(norm.weight.detach().clone(), bias, norm.eps).train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return scaled if self.bias is None else scaled + self.bias


@torch.no_grad()
def centred[Network: nn.Module](network: Network, example_input: Inputs, *, untie: bool = False) -> Network:
    """A copy that computes the same, in which the streams that LayerNorms read can lose channels.

    A stream is what layers add to, and LayerNorms alone read, as in a ViT or GPT-2. LayerNorm takes the mean of all
    channels away first. If what each layer adds has mean 0 already, only the root mean square is left, and of that a
    channel can be taken out exactly (Ashkboos et al., SliceGPT, 2024). So the mean over channels is taken from the
    weights of each layer that writes to such a stream, from biases, position embeddings and tokens; the LayerNorms
    become `CentredNorm`. Then `structures` finds the channels of the streams.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    >>> x = torch.randn(3, 4)
    >>> torch.allclose(centred(net, x)(x), net(x), atol=1e-5)
    True

    Args:
        network: is not changed.
        example_input: as for `structures`.
        untie: whether an embedding that the output layer shares may be given to it as a copy, since one is centred
            and the other is not.

    Raises:
        StructureError: if no stream is read by LayerNorms alone and written by linear layers, embeddings and added
            parameters alone; or if that takes untying; or if the copy does not compute the same in float64.
    """
    looked_at = sharing_parameters(network).eval()
    separate_attention(looked_at)
    grouping = traced(looked_at, first_examples(example_input, _EXAMPLES), through_layer_norms=True)
    norms = [
        path
        for path, module in looked_at.named_modules()
        if isinstance(module, nn.LayerNorm) and grouping.classes_of_norm(path)
    ]
    streams = {one for path in norms for one in grouping.classes_of_norm(path)}
    if not streams:
        raise StructureError("network must have a stream that LayerNorms read: it has none")
    written = [line for line in grouping.lines if len(line.classes) and set(line.classes.tolist()) <= streams]
    tied = sorted({line.parameter.key for line in written if line.role == "both"})
    if tied and not untie:
        raise StructureError(
            f"network must not share {', '.join(map(repr, tied))} between a layer that writes to a stream and one "
            "that reads it: pass untie=True to give the reader a copy"
        )
    # proved in float64, where the means that are left are rounding of that alone
    _check_equal(network, _changed(copied(network).double(), written, norms), example_input)
    return _changed(copied(network), written, norms)


def _changed[Network: nn.Module](network: Network, written: list[Line], norms: list[str]) -> Network:
    """Take the means away, in place."""
    separate_attention(network)
    for line in written:
        if line.role == "both":
            _untie(network, line)
    for line in written:
        if line.role in ("producer", "writer") and line.parameter.path not in norms:
            tensor = tensor_of(network.get_submodule(line.parameter.path), line.parameter.name)
            assert tensor is not None
            tensor.data = tensor.data - tensor.data.mean(dim=line.dim, keepdim=True)
    for path in norms:
        norm = network.get_submodule(path)
        assert isinstance(norm, nn.LayerNorm)
        network.set_submodule(path, CentredNorm.of(norm))
    return network


def _untie(network: nn.Module, line: Line) -> None:
    """Give the reader of a shared weight a copy of its own."""
    assert line.reader is not None
    shared = network.get_parameter(line.parameter.key)
    if joined(line.reader.path, line.reader.name) != line.parameter.key:
        copy = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        setattr(network.get_submodule(line.reader.path), line.reader.name, copy)


def _check_equal(network: nn.Module, other: nn.Module, example_input: Inputs) -> None:
    """Raise StructureError unless both compute the same in float64."""
    example = as_double(first_examples(example_input, _EXAMPLES))
    outputs = []
    for one in (copied(network).double(), other):
        with torch.random.fork_rng(), InDouble():
            torch.manual_seed(0)
            outputs.append(tensors_of(call(one.eval(), example)))
    for index, (wanted, found) in enumerate(zip(*outputs, strict=True)):
        if wanted.is_floating_point():
            distance, scale = difference(wanted, found)
            if not distance <= TOLERANCE * scale:
                raise StructureError(
                    f"network can't be centred: output {index} would differ by {distance:.3g} where outputs spread "
                    f"over {scale:.3g}, so that something else than LayerNorms reads a stream, or something else "
                    "than linear layers writes to it, such as a layer scale"
                )
