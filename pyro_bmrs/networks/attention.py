"""Attention equal to `nn.MultiheadAttention`, with separate projections, so that heads can be removed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class SeparateAttention(nn.Module):
    """`nn.MultiheadAttention` with one linear layer per projection. It is called in the same way.

    torch's module keeps the weights of query, key and value in one tensor, and its heads must fill the
    embedding. Here the number of heads times `head_size` may be less than the embedding. Weights of the
    original load under their old names (`in_proj_weight`, …).

    >>> import torch
    >>> from torch import nn
    >>> original = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> separate, x = SeparateAttention.of(original), torch.randn(3, 5, 8)
    >>> torch.allclose(separate(x, x, x)[0], original(x, x, x)[0], atol=1e-6)
    True
    """

    # torch's transformer layers check these before they take a path that reads the weights directly
    in_proj_weight = None
    in_proj_bias = None
    bias_k = None
    bias_v = None
    add_zero_attn = False
    _qkv_same_embed_dim = False

    def __init__(
        self, projections: tuple[nn.Linear, nn.Linear, nn.Linear], out_proj: nn.Linear, *, num_heads: int,
        dropout: float, batch_first: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query, self.key, self.value = projections
        self.out_proj = out_proj
        self.num_heads, self.head_size = num_heads, self.query.out_features // num_heads
        self.embed_dim = self.query.in_features
        self.dropout, self.batch_first = dropout, batch_first

    @classmethod
    def of(cls, original: nn.MultiheadAttention) -> SeparateAttention:
        """An equal attention with its own tensors.

        Raises:
            ValueError: if the original appends a bias or zeros to its keys.
        """
        if original.bias_k is not None or original.add_zero_attn:
            raise ValueError(
                "attention with add_bias_kv or add_zero_attn can't be given separate projections"
            )
        like = original.out_proj.weight
        if original.in_proj_weight is not None:
            weights = original.in_proj_weight.chunk(3)
        else:
            weights = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
        biases = (None,) * 3 if original.in_proj_bias is None else original.in_proj_bias.chunk(3)
        query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        separate = cls(
            (query, key, value),
            _linear(like, original.out_proj.bias),
            num_heads=original.num_heads,
            dropout=original.dropout,
            batch_first=original.batch_first,
        )
        return separate.train(original.training)

    @property
    def is_whole(self) -> bool:
        """Whether no head is missing. Then torch's own module can hold it."""
        sizes = (self.query.in_features, self.out_proj.in_features, self.out_proj.out_features)
        return all(size == self.embed_dim for size in sizes)

    @torch.no_grad()
    def joined(self) -> nn.MultiheadAttention:
        """An equal `nn.MultiheadAttention`, if no head is missing."""
        like = self.out_proj.weight
        original = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias=self.query.bias is not None,
            kdim=self.key.in_features, vdim=self.value.in_features, batch_first=self.batch_first,
            device="meta", dtype=like.dtype,
        ).to_empty(device=like.device)  # fmt: skip
        layers = (self.query, self.key, self.value)
        if original.in_proj_weight is not None:
            original.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        else:
            for name, layer in zip(("q", "k", "v"), layers, strict=True):
                getattr(original, f"{name}_proj_weight").copy_(layer.weight)
        if original.in_proj_bias is not None:
            original.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        _copy(original.out_proj, like, self.out_proj.bias)
        for name, parameter in original.named_parameters(recurse=False):
            kind = "bias" if name.endswith("bias") else "weight"
            parameter.requires_grad_(any(getattr(layer, kind).requires_grad for layer in layers))
        return original.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`. Attention weights, if wanted, are those of the remaining heads."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given where is_causal is: got None")
        single = query.dim() == 2
        if single:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        # each (batch, heads, tokens, head_size)
        q, k, v = (
            layer(tensor).view(*tensor.shape[:2], self.num_heads, -1).transpose(1, 2)
            for layer, tensor in ((self.query, query), (self.key, key), (self.value, value))
        )
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            context = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if single else weights
        else:
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(context.transpose(1, 2).flatten(2))
        if single:
            return output[0], weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one to add to the logits. Shape: (batch or 1, heads or 1, queries or 1, keys)."""
        total = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q)
            if mask.dim() == 3:
                if mask.shape[0] != q.shape[0] * q.shape[1]:
                    raise ValueError(
                        f"attn_mask must have shape (queries, keys), or ({q.shape[0]} · {q.shape[1]} heads, queries, "
                        f"keys): got {tuple(mask.shape)}"
                    )
                mask = mask.view(*q.shape[:2], *mask.shape[1:])
            total = mask
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None, :]
            total = padding if total is None else total + padding
        return total

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Loads a state_dict of the original too."""
        names = ("query", "key", "value")
        for kind in ("weight", "bias"):
            joint = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if joint is not None:
                for name, part in zip(names, joint.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{kind}"] = part
        for name in names:
            weight = state_dict.pop(f"{prefix}{name[0]}_proj_weight", None)
            if weight is not None:
                state_dict[f"{prefix}{name}.weight"] = weight
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, head_size={self.head_size}"


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add to the logits. A bool mask is True where attention is forbidden."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    # on the meta device nothing is drawn
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
    _copy(linear.to_empty(device=weight.device), weight, bias)
    return linear


@torch.no_grad()
def _copy(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    linear.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        linear.bias.copy_(bias)
        linear.bias.requires_grad_(bias.requires_grad)


def separate_attention(network: nn.Module) -> None:
    """Replace, in place, each `nn.MultiheadAttention` by `SeparateAttention`.

    Not those that append a bias or zeros to their keys, nor those with hooks or parametrisations, which would be lost.
    """
    separate: dict[nn.Module, SeparateAttention] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if type(module) is nn.MultiheadAttention and path:
            hooks = (
                hooks
                for part in (module, module.out_proj)
                for hooks in (part._forward_pre_hooks, part._forward_hooks, part._backward_hooks)
            )
            plain = not any(hooks) and not is_parametrized(module.out_proj)
            if plain and module.bias_k is None and not module.add_zero_attn:
                if module not in separate:
                    separate[module] = SeparateAttention.of(module)
                network.set_submodule(path, separate[module])
    for module in _encoders(network, apart=True):
        if getattr(module, "use_nested_tensor", False):
            # torch's fast path hands ragged tensors to torch's own attention only
            module.use_nested_tensor, module.nested_when_joined = False, True


def join_attention(network: nn.Module) -> None:
    """Put torch's own attention back, in place, wherever no head is missing."""
    joined: dict[nn.Module, nn.MultiheadAttention] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, SeparateAttention) and module.is_whole and path:
            if module not in joined:
                joined[module] = module.joined()
            network.set_submodule(path, joined[module])
    for module in _encoders(network, apart=False):
        if getattr(module, "nested_when_joined", False):
            module.use_nested_tensor, module.nested_when_joined = True, False


def _encoders(network: nn.Module, *, apart: bool) -> list[Any]:
    """Encoders that have, or have not, attention that is separate."""
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.TransformerEncoder)
        and apart == any(isinstance(part, SeparateAttention) for part in module.modules())
    ]
