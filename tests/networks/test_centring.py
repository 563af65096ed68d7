"""Streams that LayerNorms read: centred they can lose channels, and nothing else changes."""

import pytest
import torch
from family import images
from network_families import hugging_face_vit, vision_transformer
from test_conformance import conditioned, plan
from torch import nn
from traced_heads import gpt2

import pyro_bmrs as bmrs
from pyro_bmrs.networks import StructureError
from pyro_bmrs.networks.centring import CentredNorm
from pyro_bmrs.networks.inputs import as_double, call, first_examples, tensors_of
from pyro_bmrs.networks.surgery import remove_structures


class Stream(nn.Module):
    """Layers that add to a stream, each behind a LayerNorm."""

    def __init__(self, width=12, scale=None, after=False):
        super().__init__()
        self.start, self.norms, self.after = nn.Linear(5, width), nn.ModuleList(), after
        self.hidden, self.output = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.norms.append(nn.LayerNorm(width))
            self.hidden.append(nn.Linear(width, 7))
            self.output.append(nn.Linear(7, width))
        self.scale = None if scale is None else nn.Parameter(scale + torch.rand(width))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.start(x)
        for norm, hidden, output in zip(self.norms, self.hidden, self.output, strict=True):
            added = output(torch.tanh(hidden(x if self.after else norm(x))))
            x = x + (added if self.scale is None else self.scale * added)
            x = norm(x) if self.after else x
        return self.head(self.last(x))


def stream():
    return Stream(), images(5)


@pytest.mark.parametrize(
    ("build", "untie", "width"),
    [(stream, False, 12), (vision_transformer, False, 32), (hugging_face_vit, False, 32), (gpt2, True, 32)],
)
def test_channels_of_a_centred_stream_are_removed_exactly(build, untie, width):
    torch.manual_seed(0)
    network, example = build()
    conditioned(network, example)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not any(group.norms for group in bmrs.structures(network, example))
    other = bmrs.centred(network, example, untie=untie)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        for wanted, found in zip(
            tensors_of(call(network.eval(), example)), tensors_of(call(other.eval(), example)), strict=True
        ):
            assert (wanted - found).abs().max() <= 1e-4 * (wanted - wanted.mean(0)).abs().max()
    found = bmrs.structures(other, example)
    assert [group.features for group in found if group.norms] == [width]
    assert not any(refused.unsupported for refused in found.refused)
    noisy = bmrs.insert_noise(other, example)
    small = as_double(first_examples(example, 8))
    kept, scales = plan(noisy, small, "half")
    surgery = remove_structures(noisy, kept, scales, small)
    assert surgery.difference <= 1e-12
    norms = [module for module in surgery.network.modules() if isinstance(module, CentredNorm)]
    assert norms
    assert all(len(norm.weight) == len(norm.bias) == width // 2 for norm in norms)


@pytest.mark.parametrize("kind", ["a layer scale", "normalised afterwards"])
def test_a_stream_that_other_things_write_to_is_refused(kind):
    """A control: these look alike, and centred they would compute something else."""
    torch.manual_seed(0)
    network = Stream(scale=0.5) if kind == "a layer scale" else Stream(after=True)
    for norm in network.norms:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    with pytest.raises(
        StructureError, match=r"can't be centred: output 0 would differ by .* such as a layer scale"
    ):
        bmrs.centred(network, images(5))


def test_a_shared_embedding_is_untied_on_request_alone():
    torch.manual_seed(0)
    network, example = gpt2()
    with pytest.raises(StructureError, match=r"'transformer.wte.weight'.*untie=True"):
        bmrs.centred(network, example)
    other = bmrs.centred(network, example, untie=True)
    assert other.lm_head.weight is not other.transformer.wte.weight
    assert torch.equal(other.lm_head.weight, network.lm_head.weight)


def test_without_a_stream_nothing_is_centred():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StructureError, match="must have a stream that LayerNorms read"):
        bmrs.centred(network, torch.randn(3, 4))
