"""Layers as matrix products, and their curvature against brute force."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, pad

from pyro_bmrs.evidence.kronecker import KroneckerCurvature
from pyro_bmrs.networks import curvature
from pyro_bmrs.networks.curvature import matrix_layers, moments, own_biases
from pyro_bmrs.networks.matrices import (
    apart,
    as_matrix,
    as_weight,
    columns_of,
    input_rows,
    is_matrix,
    output_rows,
    together,
)


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as in GPT-2."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class SamePadded(nn.Conv2d):
    """Pads its input itself, as TensorFlow does: one more behind than before where the padding is odd."""

    def forward(self, x):
        for axis, (size, step, kernel) in enumerate(
            zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ):
            padding = max((math.ceil(size / step) - 1) * step + kernel - size, 0)
            x = pad(x, (0, 0) * (1 - axis) + (padding // 2, padding - padding // 2))
        return conv2d(x, self.weight, self.bias, self.stride)


class WithMore(nn.Linear):
    """Adds what its weight knows nothing of, as adapters do."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


LAYERS = {
    "padded by itself": (lambda: SamePadded(3, 4, 3, stride=2), (2, 3, 8, 9)),
    "padded by itself, even": (lambda: SamePadded(3, 4, 4), (2, 3, 8, 9)),
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear over tokens": (lambda: nn.Linear(5, 3), (4, 7, 5)),
    "the other way round": (lambda: Conv1D(5, 3), (4, 7, 5)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 9)),
    "stride and padding": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 9)),
    "dilation": (lambda: nn.Conv2d(3, 4, (3, 2), dilation=(2, 3), padding=(0, 2)), (2, 3, 9, 10)),
    "same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 8, 9)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 9)),
    "in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "one dimension": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2), (2, 3, 9)),
    "three dimensions": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (2, 2, 3, 5, 6)),
    "without a batch": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_outputs(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    assert is_matrix(layer)
    rows, matrix = input_rows(layer, x), as_matrix(layer, layer.weight)
    with torch.no_grad():
        outputs = output_rows(layer, layer(x))
        bias = layer.bias.view(matrix.shape[0], 1, -1)
        torch.testing.assert_close(rows @ matrix.mT + bias, outputs)
    assert torch.equal(as_weight(layer, matrix), layer.weight)
    assert torch.equal(together(apart(layer, matrix)), matrix)
    channels = torch.tensor([1, 0])
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.shape[1] > 1:
        for channel, columns in zip(channels, columns_of(layer, channels), strict=True):
            kept = torch.zeros_like(layer.weight)
            kept[:, channel] = layer.weight[:, channel].detach()
            expected = torch.zeros_like(matrix)
            expected[:, :, columns] = matrix[:, :, columns].detach()
            assert torch.equal(as_matrix(layer, kept), expected)


def test_what_is_no_product_with_one_matrix():
    computed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    for layer in (
        nn.BatchNorm2d(3),
        nn.ConvTranspose2d(2, 3, 3),
        nn.LSTM(2, 3),
        computed,
        nn.Embedding(4, 3, max_norm=1.0),
    ):
        assert not is_matrix(layer)
    assert is_matrix(nn.Embedding(4, 3))
    shared = nn.Linear(3, 3)
    assert list(matrix_layers(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]


def test_layers_that_compute_something_else_have_no_moments():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), WithMore(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    found = moments(matrix_layers(net), lambda: -cross_entropy(net(x), y, reduction="sum"), 10_000)
    assert list(found) == ["0", "4"]


@pytest.mark.parametrize("widest", [100, 5])
@pytest.mark.parametrize("counts", [(40,), (1, 9, 30), (0, 25, 15)])
def test_moments_of_a_layer_with_a_bias_are_about_the_mean(widest, counts):
    """In batches as at once, far from 0 in float32, and about 0 again as KroneckerCurvature gives them back."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2))
    x = torch.randn(40, 3, 3, 3) + 1000.0
    x[:, 1] = 500.0
    found, start = {}, 0
    for count in counts:
        some = x[start : start + count]
        moments(matrix_layers(net), lambda some=some: net(some).sum(), widest, found, own_biases(net))
        start += count
    one = found["0"]
    rows = input_rows(net[0], x)[0].double()
    split = rows.view(-1, 3, 4).mT - rows.view(-1, 3, 4).mT.mean(0)  # (rows, positions, channels)
    if widest == 100:
        expected, mean = (rows - rows.mean(0)).T @ (rows - rows.mean(0)), rows.mean(0)
    else:
        expected, mean = torch.einsum("rpi,rpj->ij", split, split) / 4, rows.view(-1, 3, 4).mT.mean(0)
        positions = torch.einsum("rpi,rqi->pq", split, split) / 3
        torch.testing.assert_close(one.positions[0], positions, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.inputs[0], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.mean[0], mean, rtol=1e-6, atol=0)
    assert torch.linalg.eigvalsh(one.inputs[0]).min() > -1e-9
    curvature = KroneckerCurvature(
        one.inputs / len(rows), torch.eye(4, dtype=torch.float64)[None], torch.ones(1, 4, 12), 40,
        None if one.positions is None else one.positions / one.positions[0].diagonal().mean(), one.mean,
    )  # fmt: skip
    about_zero = curvature.given_bias
    if widest == 100:
        torch.testing.assert_close(about_zero.inputs[0], rows.T @ rows / len(rows), rtol=1e-5, atol=0)
    else:
        each = rows.view(-1, 3, 4).mT
        second = torch.einsum("rpi,rpj->ij", each, each) / 4 / len(rows)
        torch.testing.assert_close(about_zero.inputs[0], second, rtol=1e-5, atol=0)
        ratio = torch.einsum("rpi,rqi->pq", each, each)
        torch.testing.assert_close(
            about_zero.positions[0], ratio / ratio.diagonal().mean(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("widest", [100, 5])
def test_a_call_without_rows_adds_nothing(widest):
    """As of an expert that gets no tokens."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2))
    x, none, found = torch.randn(5, 3, 4, 4), torch.empty(0, 3, 4, 4), {}
    for some in (none, x, none):
        moments(matrix_layers(net), lambda some=some: net(some).sum(), widest, found, own_biases(net))
    (alone,) = moments(matrix_layers(net), lambda: net(x).sum(), widest, None, own_biases(net)).values()
    assert found["0"].rows == alone.rows
    for name in ("inputs", "gradients", "mean"):
        torch.testing.assert_close(getattr(found["0"], name), getattr(alone, name))


def test_a_bias_of_two_layers_takes_nothing_over():
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    second.bias = first.bias
    plain = nn.Linear(3, 3, bias=False)
    assert own_biases(nn.Sequential(first, second, third, plain)) == {"2"}


def fisher(network, layer, x):
    """Σ over classes p(y | x) g gᵀ of one example, g of −log p(y | x) at a layer's weights, flattened."""
    found = 0.0
    probabilities = network(x).softmax(1)[0].detach()
    for label, probability in enumerate(probabilities):
        (gradient,) = torch.autograd.grad(cross_entropy(network(x), torch.tensor([label])), layer.weight)
        found = found + probability * gradient.flatten().outer(gradient.flatten())
    return found


def expected_moments(network, x):
    """The moments of one example with labels of each class by their probability, in place of drawn ones."""
    layers, total = matrix_layers(network), {}
    probabilities = network(x).softmax(1)[0].detach()
    for label, probability in enumerate(probabilities):
        found = moments(layers, lambda label=label: -cross_entropy(network(x), torch.tensor([label])), 10_000)
        for path, one in found.items():
            g = probability * one.gradients
            total[path] = one.inputs, total[path][1] + g if path in total else g
    return layers, total


@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
def test_one_example_has_the_exact_fisher_blocks(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        network, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(1, 4)
    else:  # one position each: then the product is exact for convolutions too
        network = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 3)
        )
        x = torch.randn(1, 2, 3, 3)
    network, x = network.double(), x.double()
    layers, found = expected_moments(network, x)
    for path, (inputs, gradients) in found.items():
        expected = fisher(network, layers[path], x)
        torch.testing.assert_close(
            torch.kron(gradients[0], inputs[0]), expected.detach(), rtol=1e-9, atol=1e-12
        )


def test_a_linear_network_has_the_exact_fisher_block_over_many_examples():
    """Of y = W x with normal noise G is the same for all examples, so that the product of the means is exact."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    noise = torch.randn(50, 3, dtype=torch.float64)
    noise = torch.linalg.qr(noise)[0] * 50**0.5  # the second moment of the labels is exact too

    def log_likelihood():
        mean = layer(x)
        return torch.distributions.Normal(mean, 1.0).log_prob(mean.detach() + noise).sum()

    (found,) = moments({"layer": layer}, log_likelihood, 10_000).values()
    product = torch.kron(found.gradients[0] / 50, found.inputs[0] / 50)
    torch.testing.assert_close(product, torch.kron(torch.eye(3, dtype=torch.float64), x.T @ x / 50))


def test_channels_and_positions_are_exact_where_patches_are_products():
    """x[c, k] = u[c] v[k] in every patch: then A is the product of both moments."""
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 2, 4, stride=4).double()
    u, v = torch.randn(1, 3, 1, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x = (u * v.repeat(5)).expand(1, 3, 20)
    whole, split = (moments({"": layer}, lambda: layer(x).sum(), widest)[""] for widest in (100, 2))
    positions = split.positions / split.positions.diagonal(dim1=1, dim2=2).mean()
    product = torch.kron(split.inputs[0], positions[0])
    torch.testing.assert_close(product, whole.inputs[0])
    assert whole.positions is None


def test_nothing_of_the_network_is_changed_and_frozen_weights_have_curvature_too():
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    network[0].requires_grad_(False)
    x = torch.randn(6, 4)
    found = moments(matrix_layers(network), lambda: network(x).log_softmax(1)[:, 0].sum(), 100)
    assert list(found) == ["0", "2"]
    assert not network[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_moments_agree_with_laplace_torchs():
    """G from 2,000 examples with drawn labels, and laplace-torch's from all labels: within 5 standard errors."""
    laplace = pytest.importorskip("laplace")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(2000, 4)
    y = network(x).argmax(1)
    draws = 40
    layers = matrix_layers(network)
    found = []
    for _ in range(draws):
        labels = torch.distributions.Categorical(logits=network(x)).sample()
        found.append(
            moments(layers, lambda labels=labels: -cross_entropy(network(x), labels, reduction="sum"), 100)
        )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=500)
    reference = laplace.Laplace(
        network, "classification", "all", hessian_structure="kron", backend=laplace.curvature.CurvlinopsGGN
    )
    reference.fit(loader)
    kron = reference.H_facs.kfacs
    for path, weight in (("0", 0), ("2", 2)):
        their_g, their_a = kron[weight]
        g = torch.stack([one[path].gradients[0] for one in found])
        a = found[0][path].inputs[0]
        product = torch.kron(their_g, their_a).double()
        ours = torch.kron(g.mean(0), a / 2000)
        error = torch.kron(g.std(0) / draws**0.5, (a / 2000).abs())
        assert float(((ours - product).abs() / (error + 1e-6 * product.abs().max())).max()) < 5


def test_of_many_positions_some_are_looked_at_and_the_mean_stays():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(40, 2, 32, 32).cumsum(-1) / 10  # 1,024 positions an example

    def found(positions):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curvature, "_POSITIONS", positions)
            return moments({"0": layer}, lambda: layer(x).square().sum(), 1000)["0"]

    some, whole = found(256), found(1024)
    assert (some.rows, whole.rows) == (40 * 256, 40 * 1024)
    assert torch.equal(some.gradients, whole.gradients)
    near, exact = some.inputs / some.rows, whole.inputs / whole.rows
    # entries are means of 10,240 products: five standard errors
    rows = input_rows(layer, x)[0].detach().double()
    deviation = (rows.square().mT @ rows.square() / len(rows) - exact[0].square()).clamp(min=0).sqrt()
    assert bool(((near - exact)[0].abs() <= 5 * deviation / 10_240**0.5 + 1e-6).all())
    assert not torch.equal(near, exact)
