"""Networks of tokens, embeddings, experts and shared weights, one mechanism each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from family import EXAMPLES, NORMALISED, OUTPUT, Family, images, tokens
from torch import Tensor, nn
from traced_heads import Residual

from pyro_bmrs.networks.inputs import Inputs


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

    sizes = dict(img_size=32, patch_size=8, num_blocks=2, embed_dim=16, mlp_ratio=(0.75, 1.5))
    return MlpMixer(**sizes, num_classes=10), images(3, 32, 32)


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
        {"stem.proj": NORMALISED, "head": OUTPUT},
    ),
    Family(
        "A linear layer over tokens (own)", "channels pass a layer that does not mix them", over_tokens,
        2, {"filters": 8, "units": 10}, {"over_tokens": OUTPUT, "head": OUTPUT},
    ),
    Family(
        "Convolutions over tokens (own)", "channels that are tokens, hidden ones between them", token_convolutions,
        1, {"filters": 9}, {"second": "", "head": OUTPUT},
    ),
    Family(
        "Summed embeddings (own)", "the width of embeddings that no LayerNorm reads", embeddings,
        2, {"units": 16 + 12}, {"head": OUTPUT},
    ),
    Family(
        "Mixture of experts in one parameter (own)", "hidden units of all experts leave together", experts,
        3, {"units": 10 + 6 + 12}, {"2.router": "", "4": OUTPUT},
    ),
    Family(
        "GRU behind convolutions (own)", "torch runs it as one operation, so that it stays whole", gru,
        1, {"filters": 8}, {"second": "", "memory": "", "head": OUTPUT},
    ),
]  # fmt: skip
