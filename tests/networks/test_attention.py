"""Attention with separate projections is torch's own attention, in every way that it can be called."""

import copy
import math

import pytest
import torch
from torch import nn

from pyro_bmrs.networks.attention import SeparateAttention, join_attention, separate_attention

EMBEDDING, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 4, 5


def attention(seed=0, **options):
    """An attention whose biases are not the zeros that torch begins with."""
    torch.manual_seed(seed)
    original = nn.MultiheadAttention(EMBEDDING, HEADS, **options)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.4)
    return original


def pair(**options):
    original = attention(**options)
    return original, SeparateAttention.of(original)


def inputs(original, *, batched=True, seed=1):
    torch.manual_seed(seed)
    dtype = original.out_proj.weight.dtype
    sizes = ((QUERIES, EMBEDDING), (KEYS, original.kdim), (KEYS, original.vdim))
    tensors = [torch.randn(BATCH, *size, dtype=dtype) for size in sizes]
    if not batched:
        return [tensor[0] for tensor in tensors]
    return tensors if original.batch_first else [tensor.transpose(0, 1) for tensor in tensors]


def same(separate, original, tensors, **options):
    """Both give the same output and weights; returns them."""
    output, weights = separate(*tensors, **options)
    expected, expected_weights = original(*tensors, **options)
    torch.testing.assert_close(output, expected)
    if expected_weights is None:
        assert weights is None
    else:
        torch.testing.assert_close(weights, expected_weights)
    return output, weights


LAYOUTS = [
    dict(batch_first=batch_first, bias=bias, **sizes)
    for batch_first in (True, False)
    for bias in (True, False)
    for sizes in ({}, dict(kdim=7), dict(vdim=9), dict(kdim=7, vdim=9))
]
# every True forbids; no query may lose all of its keys, for which softmax has no value
FORBIDDEN = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 0]]).bool()
FORBIDDEN_PER_HEAD = torch.stack([FORBIDDEN.roll(shift, 1) for shift in range(BATCH * HEADS)])
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
NEVER_ALL = FORBIDDEN & torch.tensor([1, 1, 1, 0])[:, None].bool()  # goes with PADDING


def added(mask):
    """Numbers to add to the logits, of which none is like another."""
    return torch.linspace(-2, 2, mask.numel()).view(mask.shape).masked_fill(mask, -math.inf)


@pytest.mark.parametrize(
    "options", LAYOUTS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items())
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("call", [{}, dict(average_attn_weights=False), dict(need_weights=False)])
def test_every_layout_computes_the_same(options, training, batched, call):
    original, separate = pair(**options)
    original.train(training), separate.train(training)
    output, weights = same(separate, original, inputs(original, batched=batched), **call)
    assert output.shape[-1] == EMBEDDING
    if call == {}:
        assert weights.shape == ((BATCH,) if batched else ()) + (QUERIES, KEYS)
    if call == dict(average_attn_weights=False):
        assert weights.shape == ((BATCH,) if batched else ()) + (HEADS, QUERIES, KEYS)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", [torch.clone, added], ids=["bool", "float"])
@pytest.mark.parametrize(
    "masks",
    [
        dict(attn_mask=FORBIDDEN),
        dict(attn_mask=FORBIDDEN_PER_HEAD),
        dict(key_padding_mask=PADDING),
        dict(attn_mask=NEVER_ALL, key_padding_mask=PADDING),
        dict(attn_mask=NEVER_ALL.expand(BATCH * HEADS, -1, -1), key_padding_mask=PADDING),
    ],
    ids=["attn", "attn-per-head", "padding", "both", "both-per-head"],
)
def test_every_mask_acts_the_same(batch_first, need_weights, kind, masks):
    original, separate = pair(batch_first=batch_first)
    tensors = inputs(original)
    given = {name: kind(mask) for name, mask in masks.items()}
    output, _ = same(separate, original, tensors, need_weights=need_weights, **given)
    assert output.isfinite().all()
    assert not torch.allclose(output, separate(*tensors)[0])  # the mask did something


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", [torch.clone, added], ids=["bool", "float"])
def test_masks_of_a_single_example(need_weights, kind):
    original, separate = pair()
    tensors = inputs(original, batched=False)
    for masks in (
        dict(attn_mask=FORBIDDEN),
        dict(attn_mask=FORBIDDEN_PER_HEAD[:HEADS]),
        dict(key_padding_mask=PADDING[1]),
        dict(attn_mask=NEVER_ALL, key_padding_mask=PADDING[1]),
    ):
        given = {name: kind(mask) for name, mask in masks.items()}
        same(separate, original, tensors, need_weights=need_weights, **given)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_hint_that_a_mask_is_causal(need_weights):
    original, separate = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, EMBEDDING)
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS)
    same(separate, original, (x, x, x), attn_mask=causal, is_causal=True, need_weights=need_weights)
    with pytest.raises(ValueError, match="attn_mask must be given"):
        separate(x, x, x, is_causal=True)


def test_a_mask_of_other_heads_is_refused():
    _, separate = pair(batch_first=True)
    tensors = inputs(attention(batch_first=True))
    with pytest.raises(ValueError, match=r"2 · 3 heads.*got \(2, 4, 5\)"):
        separate(*tensors, attn_mask=FORBIDDEN_PER_HEAD[:BATCH])


@pytest.mark.parametrize("options", [dict(), dict(kdim=7, vdim=9), dict(bias=False)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_in_training_are_the_same(options, need_weights):
    original, separate = pair(dtype=torch.float64, **options)
    tensors = inputs(original)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.clone().requires_grad_() for tensor in tensors]
    assert separate.training
    weighting = torch.randn(QUERIES, BATCH, EMBEDDING, dtype=torch.float64)
    output = separate(*ours, need_weights=need_weights, attn_mask=FORBIDDEN)[0]
    (output * weighting).sum().backward()
    (original(*theirs, need_weights=need_weights, attn_mask=FORBIDDEN)[0] * weighting).sum().backward()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    layers = (separate.query, separate.key, separate.value)
    if original.in_proj_weight is not None:
        wanted = original.in_proj_weight.grad.chunk(3)
    else:
        wanted = [getattr(original, f"{name}_proj_weight").grad for name in "qkv"]
    for layer, gradient in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer.weight.grad, gradient)
    if original.in_proj_bias is not None:
        biases = torch.cat([layer.bias.grad for layer in layers])
        torch.testing.assert_close(biases, original.in_proj_bias.grad)
    torch.testing.assert_close(separate.out_proj.weight.grad, original.out_proj.weight.grad)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_one_seed_is_the_same(need_weights):
    original, separate = pair(dropout=0.5)
    tensors = inputs(original)
    results = []
    for module in (original, separate):
        torch.manual_seed(4)
        results.append(module(*tensors, need_weights=need_weights)[0])
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], copy.deepcopy(original).eval()(*tensors)[0])
    same(separate.eval(), original.eval(), tensors, need_weights=need_weights)


def test_float64_and_flags_are_kept():
    original = attention(dtype=torch.float64, dropout=0.1).eval()
    original.requires_grad_(False)
    separate = SeparateAttention.of(original)
    assert not separate.training
    assert not separate.query.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in separate.parameters())
    tensors = inputs(original)
    difference = (separate(*tensors)[0] - original(*tensors)[0]).abs().max()
    assert difference < 1e-14
    back = separate.joined()
    assert not back.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in back.parameters())


def test_its_tensors_are_its_own():
    original, separate = pair()
    before = copy.deepcopy(original.state_dict())
    with torch.no_grad():
        for parameter in separate.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize("options", LAYOUTS[:8], ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_weights_of_the_original_load_under_their_names(options):
    original, other = attention(seed=1, **options), attention(seed=2, **options)

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    separate = SeparateAttention.of(other)
    state = Around(original).state_dict()
    names = set(state)
    result = Around(separate).load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert set(state) == names  # the caller's dictionary is not emptied
    same(separate, original, inputs(original))
    # and its own load too
    own = SeparateAttention.of(other)
    own.load_state_dict(separate.state_dict())
    same(own, original, inputs(original))


def test_weights_that_do_not_fit_are_refused():
    _, separate = pair()
    other = nn.MultiheadAttention(2 * EMBEDDING, HEADS).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        separate.load_state_dict(other)
    state = attention().state_dict()
    del state["in_proj_weight"]
    with pytest.raises(RuntimeError, match=r"query\.weight"):
        separate.load_state_dict(state)


@pytest.mark.parametrize(
    "options", LAYOUTS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items())
)
def test_joined_gives_the_original_back(options):
    original, separate = pair(dropout=0.3, **options)
    back = separate.joined()
    assert type(back) is nn.MultiheadAttention
    want, have = original.state_dict(), back.state_dict()
    assert list(have) == list(want)
    assert all(torch.equal(have[name], want[name]) for name in want)
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "training"):
        assert getattr(back, name) == getattr(original, name), name
    assert len(separate.state_dict()) == (4 if options["bias"] is False else 8)


class Layers(nn.Module):
    def __init__(self, **attentions):
        super().__init__()
        for name, module in attentions.items():
            setattr(self, name, module)


def test_what_appends_to_its_keys_stays_as_it_is():
    for options in (dict(add_bias_kv=True), dict(add_zero_attn=True)):
        strange = attention(**options)
        with pytest.raises(ValueError, match="add_bias_kv or add_zero_attn"):
            SeparateAttention.of(strange)
        network = Layers(plain=attention(), strange=strange)
        separate_attention(network)
        assert network.strange is strange
        assert isinstance(network.plain, SeparateAttention)


def test_what_is_separated_is_joined_again():
    class Own(nn.MultiheadAttention):
        """A subclass may compute something else."""

    network = Layers(
        first=attention(seed=1), inner=Layers(second=attention(seed=2)), own=Own(EMBEDDING, HEADS)
    )
    before = copy.deepcopy(network)
    separate_attention(network)
    assert isinstance(network.first, SeparateAttention)
    assert isinstance(network.inner.second, SeparateAttention)
    assert type(network.own) is Own
    join_attention(network)
    assert type(network.first) is type(network.inner.second) is nn.MultiheadAttention
    state = before.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_an_attention_without_some_heads_stays_separate():
    network = Layers(attention=attention(batch_first=True))
    separate_attention(network)
    whole = copy.deepcopy(network)
    separate, size = network.attention, network.attention.head_size
    with torch.no_grad():
        for layer in (separate.query, separate.key, separate.value):
            layer.weight.data, layer.bias.data = layer.weight.data[size:], layer.bias.data[size:]
        separate.out_proj.weight.data = separate.out_proj.weight.data[:, size:]
        whole.attention.out_proj.weight[:, :size] = 0
    separate.out_proj.in_features -= size
    separate.num_heads -= 1
    assert not separate.is_whole
    join_attention(network)
    assert network.attention is separate
    tensors = inputs(attention(batch_first=True))
    output, weights = separate(*tensors, average_attn_weights=False)
    expected, expected_weights = whole.attention(*tensors, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights[:, 1:])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_encoder_layer_works_on_and_off_its_fast_path(norm_first, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        EMBEDDING, HEADS, 16, dropout=0.1, activation=activation, batch_first=True, norm_first=norm_first
    ).eval()
    separate = copy.deepcopy(layer)
    separate_attention(separate)
    assert isinstance(separate.self_attn, SeparateAttention)
    x = torch.randn(BATCH, KEYS, EMBEDDING)
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS)
    for options in ({}, dict(src_key_padding_mask=PADDING), dict(src_mask=causal, is_causal=True)):
        with torch.no_grad():
            expected, output = layer(x, **options), separate(x, **options)
        # on its fast path torch writes zeros where there is padding
        real = ~options.get("src_key_padding_mask", torch.zeros(BATCH, KEYS).bool())
        torch.testing.assert_close(output[real], expected[real])
        torch.testing.assert_close(separate(x, **options), layer(x, **options))


def test_torchs_whole_encoder_and_decoder_work():
    torch.manual_seed(0)
    network = nn.Transformer(EMBEDDING, 4, 2, 1, 16, dropout=0.0, batch_first=True).eval()
    separate = copy.deepcopy(network)
    separate_attention(separate)
    assert sum(isinstance(module, SeparateAttention) for module in separate.modules()) == 4
    source, target = torch.randn(BATCH, KEYS, EMBEDDING), torch.randn(BATCH, QUERIES, EMBEDDING)
    options = dict(src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)
    with torch.no_grad():
        torch.testing.assert_close(separate(source, target, **options), network(source, target, **options))
    join_attention(separate)
    want, have = network.state_dict(), separate.state_dict()
    assert list(have) == list(want)
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_an_encoder_that_makes_ragged_tensors():
    """Of padding at the end torch's encoder makes nested tensors, which its own attention alone takes."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(EMBEDDING, 4, 16, batch_first=True)
            self.embedding, self.encoder = nn.Embedding(9, EMBEDDING), nn.TransformerEncoder(layer, 1)

        def forward(self, tokens):
            there = tokens != 0
            found = self.encoder(self.embedding(tokens), src_key_padding_mask=~there)
            return (found * there[..., None]).sum(1)

    torch.manual_seed(0)
    network = Tagger().eval()
    tokens = torch.randint(1, 9, (6, 5))
    tokens[1, 3:] = tokens[2, 2:] = 0
    with torch.no_grad():
        expected = network(tokens)
        separate_attention(network)
        assert not network.encoder.use_nested_tensor
        torch.testing.assert_close(network(tokens), expected)
        join_attention(network)
        assert network.encoder.use_nested_tensor
        torch.testing.assert_close(network(tokens), expected)
