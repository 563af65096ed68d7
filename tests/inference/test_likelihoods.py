"""Classifier and Regressor as Pyro models: shapes, plates, scaling, outputs of other forms."""

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_bmrs import Classifier, MultiplicativeNoise, Regressor
from pyro_bmrs.inference import evaluate


class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), MultiplicativeNoise(4), nn.Linear(4, 2))

    def forward(self, x):
        return {"hidden": x, "logits": self.body(x)}


def observed(model, x, y):
    trace = poutine.trace(model).get_trace(x, y)
    trace.compute_log_prob(site_filter=lambda name, site: site["is_observed"])
    return trace.nodes["y"]


def test_logits_in_a_dict():
    model = Classifier(DictNet(), lambda out: out["logits"])
    assert model(torch.randn(5, 3)).shape == (5, 2)
    with pytest.raises(TypeError, match=r"needs a tensor.*dict"):
        Classifier(DictNet())(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("net", "shape", "class_dim", "labels"),
    [
        (nn.Conv2d(1, 3, 3, padding=1), (4, 1, 5, 6), 1, (4, 5, 6)),
        (nn.Linear(2, 3), (4, 7, 2), -1, (4, 7)),
        (nn.Linear(2, 3), (4, 2), 1, (4,)),
    ],
)
def test_pixels_and_tokens_are_plates(net, shape, class_dim, labels):
    model = Classifier(net, class_dim=class_dim)
    x, y = torch.randn(shape), torch.randint(3, labels)
    site = observed(model, x, y)
    logits = net(x)
    expected = nn.functional.cross_entropy(logits.movedim(class_dim, 1), y, reduction="sum")
    torch.testing.assert_close(site["log_prob_sum"], -expected)
    assert site["log_prob"].shape == labels
    if len(labels) > 1:
        ignored = y.clone()
        ignored[0] = -100
        want = nn.functional.cross_entropy(logits.movedim(class_dim, 1), ignored, reduction="sum")
        torch.testing.assert_close(observed(model, x, ignored)["log_prob_sum"], -want)
        counted = evaluate(model, (x, ignored))
        assert counted.accuracy == pytest.approx(
            float((logits.argmax(class_dim) == y)[1:].float().mean()), abs=1e-6
        )


def test_a_data_set_size_scales_the_likelihood():
    net = nn.Linear(2, 3)
    x, y = torch.randn(4, 2), torch.randint(3, (4,))
    plain, scaled = observed(Classifier(net), x, y), observed(Classifier(net, dataset_size=100), x, y)
    torch.testing.assert_close(scaled["log_prob_sum"], 25 * plain["log_prob_sum"])
    assert evaluate(Classifier(net), (x, y)) == pytest.approx(
        tuple(evaluate(Classifier(net, dataset_size=100), (x, y))), nan_ok=True
    )


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"y must have shape \(4,\).*got \(4, 1\)"):
        Classifier(nn.Linear(2, 3))(torch.randn(4, 2), torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"output's shape \(4, 1\).*got \(4,\)"):
        Regressor(nn.Linear(2, 1))(torch.randn(4, 2), torch.zeros(4))
    for bad in (0, -3):
        with pytest.raises(ValueError, match="dataset_size"):
            Classifier(nn.Linear(2, 3), dataset_size=bad)
    with pytest.raises(ValueError, match="scale must be positive"):
        Regressor(nn.Linear(2, 1), scale=0.0)
    with pytest.raises(TypeError, match="net must be"):
        Classifier(lambda x: x)


def test_the_regressor_learns_its_scale():
    model = Regressor(nn.Linear(2, 1))
    assert any(name == "log_scale" for name, _ in model.named_parameters())
    fixed = Regressor(nn.Linear(2, 1), scale=2.0)
    assert not any(name == "log_scale" for name, _ in fixed.named_parameters())
    assert float(fixed.log_scale.exp()) == pytest.approx(2.0)


def test_fixed_scales_are_no_observations():
    """Their prior density is no part of the likelihood, and 0 is allowed, whatever Pyro validates."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), MultiplicativeNoise(4), nn.Linear(4, 3))
    x, y = torch.randn(9, 2), torch.randint(3, (9,))
    theta = torch.tensor([0.0, 1.0, 0.5, 1e-9])
    with torch.no_grad():
        logits = net[3](net[1](net[0](x)) * theta)
    expected = float(nn.functional.cross_entropy(logits, y))
    with pyro.validation_enabled(True):
        assert evaluate(Classifier(net), (x, y), {"2": theta}).loss == pytest.approx(expected, rel=1e-5)
