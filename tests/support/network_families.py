"""The kinds of networks that are handled, and those that are not. The tests run them; docs/networks.md lists them.

python tests/support/network_families.py > docs/networks.md
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from family import EXAMPLES, OUTPUT, Family, Unsupported, images, tokens
from torch import Tensor, nn
from traced_channels import CHANNELS, behind_a_layer
from traced_families import TOKENS, lstm
from traced_heads import HEADS

from pyro_bmrs.networks.inputs import Inputs
from pyro_bmrs.networks.selection import InputSelection


def tanh_mlp() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4)
    ), images(12)


def selecting_mlp() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Flatten(), InputSelection(15), nn.Linear(15, 8), nn.Tanh(), nn.Linear(8, 4)
    ), images(3, 5)  # fmt: skip


class SelectingConvolutions(nn.Module):
    """Two branches that read the same selected channels."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = InputSelection(5)
        self.wide = nn.Conv2d(5, 8, 3, padding=1)
        self.narrow = nn.Conv2d(5, 6, 1)
        self.output = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(x)
        both = torch.cat([torch.tanh(self.wide(x)), torch.relu(self.narrow(x))], dim=1)
        return self.output(both.mean((2, 3)))


def selected_positions() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), InputSelection(54), nn.Linear(54, 10), nn.Tanh(),
        InputSelection(10), nn.Linear(10, 4),
    ), images(1, 5, 5)  # fmt: skip


class SelectedBeside(nn.Module):
    """Filters that are read by a convolution as a whole, and position by position by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.positions, self.hidden = InputSelection(6 * 16), nn.Linear(6 * 16, 7)
        self.output = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.first(x))
        pooled = torch.tanh(self.second(first)).mean((2, 3))
        hidden = torch.tanh(self.hidden(self.positions(first.flatten(1))))
        return self.output(torch.cat([pooled, hidden], dim=1))


def lenet5() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    ), images(1, 28, 28)  # fmt: skip


def vgg() -> tuple[nn.Module, Inputs]:
    from torchvision.models.vgg import VGG, make_layers

    network = VGG(make_layers([8, "M", 16, 16, "M", 24, "M"], batch_norm=True), num_classes=10)
    network.avgpool = nn.AdaptiveAvgPool2d(2)
    network.classifier[0] = nn.Linear(24 * 4, 64)
    network.classifier[3] = nn.Linear(64, 32)
    network.classifier[6] = nn.Linear(32, 10)
    return network, images(3, 32, 32)


def resnet18() -> tuple[nn.Module, Inputs]:
    from torchvision.models import resnet18

    return resnet18(num_classes=10), images(3, 32, 32)


def resnet50() -> tuple[nn.Module, Inputs]:
    from torchvision.models import resnet50

    return resnet50(num_classes=10), images(3, 32, 32)


def resnext() -> tuple[nn.Module, Inputs]:
    from torchvision.models.resnet import Bottleneck, ResNet

    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=4)
    return network, images(3, 32, 32)


def mobilenet_v2() -> tuple[nn.Module, Inputs]:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=10), images(3, 64, 64)


def mobilenet_v3() -> tuple[nn.Module, Inputs]:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=10), images(3, 64, 64)


def densenet() -> tuple[nn.Module, Inputs]:
    from torchvision.models import DenseNet

    network = DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=10)
    return network, images(3, 64, 64)


def convnext() -> tuple[nn.Module, Inputs]:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10), images(3, 32, 32)


class UNet(nn.Module):
    """Two levels down, two up, the halves joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
            )  # fmt: skip

        self.pool = nn.MaxPool2d(2)
        self.down_1, self.down_2, self.bottom = twice(3, 8), twice(8, 16), twice(16, 24)
        self.up_2, self.join_2 = nn.ConvTranspose2d(24, 16, 2, stride=2), twice(32, 16)
        self.up_1, self.join_1 = nn.ConvTranspose2d(16, 8, 2, stride=2), twice(16, 8)
        self.mask = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down_1(x)
        coarse = self.down_2(self.pool(fine))
        bottom = self.bottom(self.pool(coarse))
        coarse = self.join_2(torch.cat([self.up_2(bottom), coarse], dim=1))
        return self.mask(self.join_1(torch.cat([self.up_1(coarse), fine], dim=1)))


def u_net() -> tuple[nn.Module, Inputs]:
    return UNet(), images(3, 16, 16)


def swin() -> tuple[nn.Module, Inputs]:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=10), images(3, 32, 32)


def vision_transformer() -> tuple[nn.Module, Inputs]:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    )
    return network, images(3, 32, 32)


class SequenceClassifier(nn.Module):
    """torch's own transformer encoder between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.embedding = nn.Linear(6, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(dim=1))


def transformer_encoder() -> tuple[nn.Module, Inputs]:
    return SequenceClassifier(), images(7, 6)


# What analysis/any_network.py found on public networks.
SURVEY = Path(__file__).parents[2] / "analysis" / "results" / "any_network.md"

_SMALL_TRANSFORMER = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50
)


def hugging_face_vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {name: size for name, size in _SMALL_TRANSFORMER.items() if name != "vocab_size"}
    network = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    return network, {"pixel_values": images(3, 32, 32)}


def hugging_face_bert() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForSequenceClassification

    network = BertForSequenceClassification(BertConfig(**_SMALL_TRANSFORMER, num_labels=3))
    mask = torch.ones(EXAMPLES, 7, dtype=torch.long)
    mask[EXAMPLES // 2 :, 5:] = 0
    return network, {"input_ids": tokens(), "attention_mask": mask}


def hugging_face_llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(**_SMALL_TRANSFORMER, num_key_value_heads=2))
    return network, {"input_ids": tokens()}


class TwoInputs(nn.Module):
    """An image and numbers by keyword, two answers by name."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.numbers = nn.Conv2d(3, 8, 3), nn.Linear(5, 12)
        self.hidden = nn.Linear(8 + 12, 16)
        self.label, self.value = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, *, image: Tensor, numbers: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        seen = F.gelu(self.filters(image)).mean(dim=(2, 3))
        known = torch.tanh(self.numbers(numbers))
        hidden = F.silu(self.hidden(torch.cat([seen, known], dim=1)))
        return {"label": self.label(hidden), "value": gain * self.value(hidden)}


def two_inputs() -> tuple[nn.Module, Inputs]:
    return TwoInputs(), {"image": images(3, 8, 8), "numbers": images(5)}


def instance_norm() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8), nn.Conv2d(8, 12, 3),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True), nn.PReLU(12), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(48, 4),
    ), images(3, 12, 12)  # fmt: skip


FAMILIES = [
    Family(
        "MLP with tanh", "linear layers, an activation that is not homogeneous", tanh_mlp,
        2, {"units": 36}, {"5": OUTPUT},
    ),
    Family(
        "MLP that selects its inputs", "`InputSelection`: one structure per input feature", selecting_mlp,
        2, {"inputs": 15, "units": 8}, {"4": OUTPUT},
    ),
    Family(
        "Convolutions that select their input channels", "`InputSelection` of channels, read by two convolutions",
        lambda: (SelectingConvolutions(), images(5, 8, 8)), 3, {"inputs": 5, "filters": 14}, {"output": OUTPUT},
    ),
    Family(
        "Selected positions of flattened filters", "`InputSelection` behind layers: structures inside structures",
        selected_positions, 4, {"filters": 6, "units": 10, "positions": 64}, {"7": OUTPUT},
    ),
    Family(
        "Selected positions beside a convolution",
        "filters that one layer reads whole and another position by position",
        lambda: (SelectedBeside(), images(2, 4, 4)), 4, {"filters": 11, "positions": 96, "units": 7},
        {"output": OUTPUT},
    ),
    Family(
        "LeNet5", "convolutions, pooling, flatten", lenet5,
        4, {"filters": 22, "units": 204}, {"11": OUTPUT},
    ),
    Family(
        "VGG with BatchNorm (torchvision, small)", "a chain of convolutions, each with BatchNorm", vgg,
        6, {"filters": 64, "units": 96}, {"classifier.6": OUTPUT},
    ),
    Family(
        "ResNet-18 (torchvision)", "residual streams: one structure across all layers of a stage", resnet18,
        12, {"filters": 2880}, {"fc": OUTPUT},
    ),
    Family(
        "ResNet-50 (torchvision)", "bottlenecks, 50 layers deep", resnet50,
        37, {"filters": 11456}, {"fc": OUTPUT},
    ),
    Family(
        "ResNeXt (torchvision, one block a stage)", "grouped convolutions: the same channel of every group",
        resnext, 13, {"filters": 4024}, {"fc": OUTPUT},
    ),
    Family(
        "MobileNetV2 (torchvision)", "depthwise convolutions, inverted residuals", mobilenet_v2,
        25, {"filters": 9128}, {"classifier.1": OUTPUT},
    ),
    Family(
        "MobileNetV3-small (torchvision)", "depthwise convolutions, squeeze-excite", mobilenet_v3,
        27, {"filters": 3848, "units": 1024}, {"classifier.3": OUTPUT},
    ),
    Family(
        "DenseNet (torchvision, small)", "each layer reads the concatenation of all before", densenet,
        20, {"filters": 384}, {"classifier": OUTPUT},
    ),
    Family(
        "ConvNeXt (torchvision, small)", "LayerNorm over channels, linear layers on channels-last images",
        convnext, 2, {"units": 192},
        {
            "features.0.0": "normalised together by 'features.0.1', a LayerNorm2d",
            "features.2.1": "normalised together by 'features.3.0.block.2', a LayerNorm",
            "classifier.2": OUTPUT,
        },
    ),
    Family(
        "U-Net (own, two levels)", "skips by concatenation, transposed convolutions, BatchNorm", u_net,
        12, {"filters": 168}, {"mask": OUTPUT},
    ),
    Family(
        "Vision transformer (torchvision, small)", "`nn.MultiheadAttention`, a class token", vision_transformer,
        4, {"heads": 8, "units": 96},
        {
            "conv_proj": "normalised together by 'encoder.layers.encoder_layer_0.ln_1', a LayerNorm",
            "heads.head": OUTPUT,
        },
    ),
    Family(
        "Swin transformer (torchvision, small)",
        "attention in windows that takes the size of a head from the width: not cut",
        swin, 2, {"units": 192},
        {
            "features.0.0": "normalised together by 'features.0.2', a LayerNorm",
            "features.2.reduction": "normalised together by 'features.3.0.norm1', a LayerNorm",
            "features.?.0.attn.qkv": "the smaller network fails in 'features.",
            "head": OUTPUT,
        },
    ),
    Family(
        "`nn.TransformerEncoder` (torch)", "torch's own layers between an embedding and a classifier",
        transformer_encoder, 4, {"heads": 8, "units": 96},
        {"embedding": "normalised together by 'encoder.layers.0.norm1', a LayerNorm", "head": OUTPUT},
    ),
    Family(
        "ViT (Hugging Face, small)", "attention with separate projections, a dictionary of inputs",
        hugging_face_vit, 4, {"heads": 8, "units": 96},
        {
            "vit.embeddings.patch_embeddings.projection":
                "normalised together by 'vit.layers.0.layernorm_before', a LayerNorm",
            "classifier": OUTPUT,
        },
    ),
    Family(
        "BERT for sequence classification (Hugging Face, small)", "token indices, an attention mask",
        hugging_face_bert, 5, {"heads": 8, "units": 128},
        {
            "bert.embeddings.word_embeddings":
                "normalised together by 'bert.embeddings.LayerNorm', a LayerNorm",
            "classifier": OUTPUT,
        },
    ),
    Family(
        "Llama (Hugging Face, small)",
        "gated linear units; two query heads share a key head and are removed together; a stream that RMSNorms read",
        hugging_face_llama, 5, {"heads": 4, "units": 128}, {"lm_head": OUTPUT},
    ),
    Family(
        "Two inputs by keyword, a dictionary of outputs (own)", "branches that are concatenated, two readers",
        two_inputs, 3, {"filters": 8, "units": 28}, {"label": OUTPUT, "value": OUTPUT},
    ),
    Family(
        "InstanceNorm and PReLU", "normalisation and activations with a parameter per channel", instance_norm,
        2, {"filters": 20}, {"8": OUTPUT},
    ),
    *CHANNELS,
    *HEADS,
    *TOKENS,
]  # fmt: skip


class Literal(nn.Module):
    """Its forward says how wide its hidden layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x)).reshape(len(x), 4, 3).transpose(1, 2).reshape(len(x), 12))


def literal_size() -> tuple[nn.Module, Inputs]:
    return behind_a_layer(Literal(), nn.ReLU())


def weight_norm() -> tuple[nn.Module, Inputs]:
    from torch.nn.utils.parametrizations import weight_norm as parametrised

    return nn.Sequential(
        parametrised(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    ), images(4)


UNSUPPORTED = [
    Unsupported(
        "LSTM behind convolutions",
        lstm,
        "memory",
        "",
        "Recurrent layers are run as one operation. They and what they read stay.",
    ),
    Unsupported(
        "A size that is written into `forward`",
        literal_size,
        "4.hidden",
        "",
        "Make it an attribute of the module, or -1.",
    ),
    Unsupported(
        "`weight_norm` and other computed weights",
        weight_norm,
        "0",
        "computed from other tensors",
        "The weight is no parameter that could be cut. The reason has the line that makes it one.",
    ),
]


def networks_page() -> str:
    """docs/networks.md."""
    lines = [
        "# Networks",
        "",
        "What `structures` and `insert_noise` do with the networks in `tests/support/network_families.py`. This page",
        "is generated from that file. `tests/networks/test_conformance.py` runs every row of its tables.",
        "",
        "## Handled",
        "",
        "The tests insert noise into each of these and remove half of the structures, none of them, and all but one",
        "of each group. Then they compare the smaller network with the one with noise: its outputs, and those of every",
        "layer that reads structures. They agree to 10⁻⁵ of their spread over the examples in float32 and to 10⁻¹⁰ in",
        "float64. Counts are those of the example. An example marked small has fewer layers or channels than the",
        "original network. Units are the outputs of linear layers.",
        "",
        "| network | what it has | structures found | what stays, and why |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        kinds = ", ".join(f"{count} {kind}" for kind, count in family.structures.items())
        stays = "; ".join(f"`{path}`: {reason}".removesuffix(": ") for path, reason in family.stays.items())
        found = f"{kinds} in {family.groups} groups"
        lines.append(f"| {family.name} | {family.stands_for} | {found} | {stays} |")
    lines += [
        "",
        "What stays in every network:",
        "",
        "- **Outputs of the network.** Removing one would change the result.",
        "- **Channels that are normalised together**, by a LayerNorm or a softmax: without one of them the others",
        "  come out different. So a residual stream that LayerNorms read stays, unless it is `centred` first; heads",
        "  and hidden units can be removed. Streams that RMSNorms read lose channels exactly. BatchNorm and",
        "  InstanceNorm treat each channel alone. Of a GroupNorm whole groups can be removed.",
        "- **Channels that are added to an input of the network**, and those that nothing reads.",
        "- **The last structure of a group.**",
        "",
        "## What can't be followed",
        "",
        "Of these networks a part can't be followed, cut or tried. It stays, and `structures` lists it with the",
        "reason; the rest is handled. With `strict=True` it is a `StructureError`.",
        "",
        "| network | what stays | why, and what to do |",
        "|---|---|---|",
    ]
    for network in UNSUPPORTED:
        lines.append(f"| {network.name} | `{network.path}` | {network.why} |")
    lines += [
        "",
        "A network that is not listed is tried in the same way: call `structures` and read its answer.",
        "",
        "What `torch.compile` made is undone: the copy with noise and the smaller network are not compiled, and a",
        "`Classifier` or `Regressor` undoes it in the network it is given. Compile the smaller network again.",
        "TorchScript, traced graphs and `DataParallel` are refused: pass the network that they were made from.",
    ]
    return "\n".join(lines) + "\n\n" + SURVEY.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(networks_page(), end="")
