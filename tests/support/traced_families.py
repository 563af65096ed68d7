"""Networks of tokens, heads, tables and shared parameters, one mechanism each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from family import EXAMPLES, NORMALISED, OUTPUT, Family, images, tokens
from torch import Tensor, nn

from pyro_bmrs.networks.inputs import Inputs

_SMALL = dict(img_size=32, patch_size=8, num_classes=10)


def timm_vit() -> tuple[nn.Module, Inputs]:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**_SMALL, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5), images(3, 32, 32)


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
        self.embedding, self.parts, self.head = nn.Linear(6, width), nn.Sequential(*parts), nn.Linear(width, 4)

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


class ClassToken(nn.Module):
    """A class token and position embeddings on a stream that nothing normalises over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.patches, self.head = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 4)
        self.block = Residual(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(torch.tanh(self.block(x)).mean(dim=1))


def class_token() -> tuple[nn.Module, Inputs]:
    return ClassToken(), images(3, 8, 8)


class TiedLanguageModel(nn.Module):
    """The output layer has the weight of the embedding; the channels of both are those of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.block = Residual(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x)))


def tied_embedding() -> tuple[nn.Module, Inputs]:
    return TiedLanguageModel(), tokens()


class TiedAutoencoder(nn.Module):
    """The decoder reads the rows of the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(12, 8), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)


def tied_autoencoder() -> tuple[nn.Module, Inputs]:
    return TiedAutoencoder(), images(12)


def mixer() -> tuple[nn.Module, Inputs]:
    from timm.models.mlp_mixer import MlpMixer

    network = MlpMixer(**_SMALL, num_blocks=2, embed_dim=16, mlp_ratio=(0.75, 1.5))
    return network, images(3, 32, 32)


class OverTokens(nn.Module):
    """A linear layer over the tokens, then one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.over_tokens = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(16, 12)
        self.over_channels, self.head = nn.Linear(8, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.gelu(self.over_tokens(self.patches(x).flatten(2)))
        return self.head(F.gelu(self.over_channels(mixed.transpose(1, 2))))


def over_tokens() -> tuple[nn.Module, Inputs]:
    return OverTokens(), images(3, 8, 8)


class TokenConvolutions(nn.Module):
    """Hidden units over tokens by convolutions of size 1, whose channels are the tokens, as in ResMLP and S2-MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(10), nn.Conv1d(7, 9, 1), nn.Conv1d(9, 7, 1)
        self.embedding, self.head = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.head((x + self.second(F.gelu(self.first(self.norm(x))))).mean(dim=1))


def token_convolutions() -> tuple[nn.Module, Inputs]:
    return TokenConvolutions(), images(7, 6)


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


class Embeddings(nn.Module):
    """Words, positions and kinds, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.kinds = (nn.Embedding(count, 16) for count in (50, 7, 2))
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        x = self.words(x) + self.positions(places) + self.kinds(x % 2)
        return self.head(torch.relu(self.hidden(x)).mean(dim=1))


def embeddings() -> tuple[nn.Module, Inputs]:
    return Embeddings(), tokens()


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


class Experts(nn.Module):
    """Three experts, whose matrices are one parameter each, mixed by what a router says."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(10, 3)
        self.up, self.shift = nn.Parameter(torch.randn(3, 10, 6)), nn.Parameter(torch.randn(3, 1, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 12))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(dim=-1)
        hidden = F.gelu(torch.einsum("bi,eih->ebh", x, self.up) + self.shift)
        return torch.einsum("be,ebo->bo", shares, torch.bmm(hidden, self.down))


def experts() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), Experts(), nn.Tanh(), nn.Linear(12, 4)), images(8)


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

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50)
    return AlbertForSequenceClassification(AlbertConfig(**sizes, embedding_size=16, num_labels=3)), tokens()


class Recurrent(nn.Module):
    """A recurrent layer over what two convolutions make of a sequence."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3)
        self.memory, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.memory(features.transpose(1, 2))[0][:, -1])


def gru() -> tuple[nn.Module, Inputs]:
    return Recurrent(nn.GRU), torch.randn(EXAMPLES, 3, 12)


def lstm() -> tuple[nn.Module, Inputs]:
    return Recurrent(nn.LSTM), torch.randn(EXAMPLES, 3, 12)


TOKENS = [
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
        "Class token and position embeddings (own)", "parameters that are cut with the stream that they join",
        class_token, 2, {"filters": 12, "units": 10}, {"head": OUTPUT},
    ),
    Family(
        "Language model with tied embeddings (own)", "one weight makes the stream and reads it", tied_embedding,
        # θ is folded into a weight that reads and makes: the root of it into all that makes the stream, and what is
        # left of it into the other readers
        2, {"units": 16 + 12}, {"head": OUTPUT},
    ),
    Family(
        "Autoencoder with tied weights (own)", "the decoder reads the rows of the encoder", tied_autoencoder,
        # exact because ReLU passes the root of θ on
        1, {"units": 8}, {"encoder": OUTPUT},
    ),
    Family(
        "MLP-Mixer (timm, small)", "hidden units over tokens and over channels", mixer,
        4, {"units": 2 * (12 + 24)},
        {"stem.proj": NORMALISED, "blocks.?.mlp_tokens.fc2": "", "head": OUTPUT},
    ),
    Family(
        "A linear layer over tokens (own)", "channels pass a layer that does not mix them", over_tokens,
        2, {"filters": 8, "units": 10}, {"over_tokens": OUTPUT, "head": OUTPUT},
    ),
    Family(
        "Convolutions over tokens (own)", "channels that are tokens, hidden ones between them", token_convolutions,
        1, {"filters": 9}, {"embedding": NORMALISED, "second": "", "head": OUTPUT},
    ),
    Family(
        "Attention with a temperature per head (own)", "a parameter per head; projections taken apart by `chunk`",
        temperature, 2, {"heads": 4, "units": 16}, {"head": OUTPUT},
    ),
    Family(
        "Summed embeddings (own)", "the width of embeddings that no LayerNorm reads", embeddings,
        2, {"units": 16 + 12}, {"head": OUTPUT},
    ),
    Family(
        "Cross-attention (own)", "heads that ask one stream about another one", cross_attention,
        3, {"heads": 4, "units": 12 + 10}, {"head": OUTPUT},
    ),
    Family(
        "T5 (Hugging Face, small, one layer)", "an encoder and a decoder, tables of relative positions", t5,
        5, {"heads": 12, "units": 96}, {"shared": "", "lm_head": OUTPUT},
    ),
    Family(
        "Attention with normalised queries and keys (own)", "an RMSNorm that all heads share stays as it is",
        normalised_heads, 2, {"heads": 2, "units": 16}, {"head": OUTPUT},
    ),
    Family(
        "Mixture of experts in one parameter (own)", "hidden units of all experts leave together", experts,
        3, {"units": 10 + 6 + 12}, {"2.router": "", "4": OUTPUT},
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
    Family(
        "GRU behind convolutions (own)", "torch runs it as one operation, so that it stays whole", gru,
        1, {"filters": 8}, {"second": "", "memory": "", "head": OUTPUT},
    ),
]  # fmt: skip
