"""Networks whose attention heads are removed, one mechanism each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from family import NORMALISED, OUTPUT, Family, images, tokens
from torch import Tensor, nn

from pyro_bmrs.networks.inputs import Inputs


def timm_vit() -> tuple[nn.Module, Inputs]:
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5)
    return VisionTransformer(**sizes, num_classes=10), images(3, 32, 32)


class Attention(nn.Module):
    """Query, key and value in one projection, of heads whose total width is not that of the stream."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, head_dim, heads * head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * self.attn_dim), nn.Linear(self.attn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(heads.transpose(1, 2).reshape(batch, count, self.attn_dim))


class Residual(nn.Module):
    """x + part(x)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.part = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x)


class OfTokens(nn.Module):
    """Parts that work on tokens between an embedding and a classifier of their mean. Nothing normalises channels."""

    def __init__(self, width: int, *parts: nn.Module) -> None:
        super().__init__()
        self.embedding, self.parts, self.head = (
            nn.Linear(6, width),
            nn.Sequential(*parts),
            nn.Linear(width, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts(self.embedding(x)).mean(dim=1))


def fused_attention() -> tuple[nn.Module, Inputs]:
    return OfTokens(20, Residual(Attention(20, 4, 6))), images(7, 6)


def gpt2() -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_inner=48, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes)), {"input_ids": tokens()}


class WindowAttention(nn.Module):
    """Attention in windows of 2 by 2 with a table of relative positions, as in Swin."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.shift, self.scale = heads, shift, (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, heads))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]) + 1
        self.register_buffer("index", 3 * apart[0] + apart[1])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3).reshape(-1, 4, channels)
        qkv = self.qkv(x).reshape(len(x), 4, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        scores = (self.scale * query @ key.transpose(-2, -1) + bias.unsqueeze(0)).softmax(dim=-1)
        x = self.proj((scores @ value).transpose(1, 2).reshape(len(x), 4, -1))
        x = x.view(batch, height // 2, width // 2, 2, 2, channels).transpose(2, 3)
        return torch.roll(x.reshape(batch, height, width, channels), (self.shift, self.shift), (1, 2))


class Windows(nn.Module):
    """Patches, blocks of window attention and of hidden units, each behind a LayerNorm."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.LayerNorm(16), nn.Linear(16, 4)
        self.blocks = nn.Sequential()
        for block in range(blocks):
            self.blocks.append(Residual(nn.LayerNorm(16), WindowAttention(16, 4, block % 2)))
            self.blocks.append(Residual(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


def window_attention() -> tuple[nn.Module, Inputs]:
    return Windows(2), images(3, 8, 8)


class Tempered(nn.Module):
    """Attention over channels of one length, with a temperature per head, as in XCiT and Swin-V2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.to_qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


def temperature() -> tuple[nn.Module, Inputs]:
    return OfTokens(16, Residual(Tempered(16, 4))), images(7, 6)


class CrossAttention(nn.Module):
    """One stream asks another one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.asking, self.asked, self.head = nn.Linear(6, 12), nn.Linear(5, 10), nn.Linear(12, 4)
        self.query, self.key, self.value = nn.Linear(12, 24), nn.Linear(10, 24), nn.Linear(10, 24)
        self.out = nn.Linear(24, 12)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.asking(x), torch.tanh(self.asked(memory))
        query, key, value = (
            layer(part).view(len(part), part.shape[1], self.heads, -1).transpose(1, 2)
            for layer, part in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head((x + self.out(found)).mean(dim=1))


def cross_attention() -> tuple[nn.Module, Inputs]:
    return CrossAttention(), (images(7, 6), images(9, 5))


def t5(layers: int = 1) -> tuple[nn.Module, Inputs]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=50, d_model=32, d_kv=6, d_ff=48, num_layers=layers, num_heads=4)
    network = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    return network, {"input_ids": tokens(), "decoder_input_ids": tokens()}


class NormalisedHeads(nn.Module):
    """Queries and keys pass an RMSNorm that all heads share; two query heads ask one key head, as in Qwen3."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.groups = 6, 2
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.q_norm, self.k_norm, self.o_proj = nn.RMSNorm(6), nn.RMSNorm(6), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2).repeat_interleave(self.groups, dim=1)
        value = self.v_proj(x).view(shape).transpose(1, 2).repeat_interleave(self.groups, dim=1)
        return self.o_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def normalised_heads() -> tuple[nn.Module, Inputs]:
    return OfTokens(16, Residual(NormalisedHeads())), images(7, 6)


class Again(nn.Module):
    """The same block several times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Residual(Attention(16, 4, 5))
        self.hidden = Residual(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.hidden(self.attention(x))
        return x


def called_twice() -> tuple[nn.Module, Inputs]:
    return OfTokens(16, Again()), images(7, 6)


def albert() -> tuple[nn.Module, Inputs]:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    return AlbertForSequenceClassification(AlbertConfig(**sizes, embedding_size=16, num_labels=3)), tokens()


HEADS = [
    Family(
        "Vision transformer (timm, small)", "query, key and value in one projection", timm_vit,
        4, {"heads": 8, "units": 96}, {"patch_embed.proj": NORMALISED, "head": OUTPUT},
    ),
    Family(
        "Fused attention on a stream without normalisation (own)", "heads narrower than the stream, which goes too",
        fused_attention, 2, {"heads": 4, "units": 20}, {"head": OUTPUT},
    ),
    Family(
        "GPT-2 (Hugging Face, small)", "a linear layer of its own with its weight the other way round, taken apart by "
        "a stored size; a key-value cache; embeddings tied to the output layer", gpt2,
        4, {"heads": 8, "units": 96}, {"transformer.wte": NORMALISED, "lm_head": OUTPUT},
    ),
    Family(
        "Attention in shifted windows (own)", "heads leave with their column of a table of relative positions",
        window_attention, 4, {"heads": 8, "units": 48}, {"patches": NORMALISED, "head": OUTPUT},
    ),
    Family(
        "Attention with a temperature per head (own)", "a parameter per head; projections taken apart by `chunk`",
        temperature, 2, {"heads": 4, "units": 16}, {"head": OUTPUT},
    ),
    Family(
        "Cross-attention (own)", "heads that ask one stream about another one", cross_attention,
        3, {"heads": 4, "units": 12 + 10}, {"head": OUTPUT},
    ),
    Family(
        "T5 (Hugging Face, small, one layer)", "an encoder and a decoder, tables of relative positions", t5,
        5, {"heads": 12, "units": 96}, {"encoder.embed_tokens": OUTPUT, "lm_head": OUTPUT},
    ),
    Family(
        "Attention with normalised queries and keys (own)", "an RMSNorm that all heads share stays as it is",
        normalised_heads, 2, {"heads": 2, "units": 16}, {"head": OUTPUT},
    ),
    Family(
        "A block that is called twice (own)", "its heads and hidden units leave in both calls", called_twice,
        3, {"heads": 4, "units": 16 + 12}, {"head": OUTPUT},
    ),
    Family(
        "ALBERT (Hugging Face, small)", "one layer for all depths", albert,
        3, {"heads": 4, "units": 48 + 32},
        {
            "albert.embeddings.word_embeddings": NORMALISED,
            "albert.encoder.embedding_hidden_mapping_in": NORMALISED,
            "classifier": OUTPUT,
        },
    ),
]  # fmt: skip
