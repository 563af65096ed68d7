"""Several draws per batch, one KL per data set: an unbiased estimate of one and the same ELBO."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_bmrs import (
    AutoTruncatedLogNormal,
    Classifier,
    LogUniform,
    MultiplicativeNoise,
    Regressor,
    TruncatedLogNormal,
)
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.inference.elbo import LatentsPerBatch, LikelihoodELBO

SITES = ("2", "5")


def problem(batch=12):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), MultiplicativeNoise(6), nn.Linear(6, 5), nn.Tanh(), MultiplicativeNoise(5),
        nn.Linear(5, 3),
    )  # fmt: skip
    model = Classifier(net)
    guide = AutoTruncatedLogNormal(model, init_loc=-1.0, init_scale=0.7)
    x, y = torch.randn(batch, 4), torch.randint(3, (batch,))
    guide(x, y)
    return model, guide, x, y


def exact_kl(model, guide):
    return sum(float(kl_divergence(q, LogUniform()).sum()) for q in guide.posterior().values())


@pytest.mark.parametrize("draws", [1, 3, 5, 12])
@pytest.mark.parametrize("weight", [0.0, 1.0, 7.0])
def test_the_kl_part_is_exact_for_any_number_of_draws(draws, weight):
    """Without observation the loss is weight · KL, with zero variance."""
    model, guide, x, _ = problem()
    elbo = TraceMeanField_ELBO()
    values = []
    for _ in range(3):
        with LatentsPerBatch(SITES, draws, len(x), weight, 1.0), torch.no_grad():
            values.append(float(elbo.differentiable_loss(poutine.block(model, hide=["y"]), guide, x)))
    assert values == pytest.approx([weight * exact_kl(model, guide)] * 3, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("draws", [4, *(pytest.param(draws, marks=pytest.mark.slow) for draws in (1, None))])
def test_the_estimate_is_unbiased(draws):
    """Means of 400 estimates agree with Pyro's own one-draw ELBO of the whole batch.

    False-alarm rate: two-sided z-test at |z| < 4.4, 1.1e-5 for each of three cases.
    """
    model, guide, x, y = problem()
    torch.manual_seed(11)
    with torch.no_grad():
        plain = torch.stack(
            [torch.as_tensor(TraceMeanField_ELBO().loss(model, guide, x, y)) for _ in range(400)]
        ) / len(x)
        objective = Objective(model, guide, (x, y), dataset_size=len(x), draws=draws)
        ours = torch.stack([objective(x, y, 1.0)[0] for _ in range(400)])
    error = math.sqrt(float(plain.var() / 400 + ours.var() / 400))
    assert abs(float(plain.mean() - ours.mean())) < 4.4 * error


def test_the_gradient_is_unbiased_too():
    """Mean gradients of loc over 300 steps agree with one shared draw; false-alarm rate below 1e-3 in all."""
    model, guide, x, y = problem()

    def gradients(draws):
        objective, rows = Objective(model, guide, (x, y), dataset_size=len(x), draws=draws), []
        for _ in range(300):
            guide.zero_grad()
            objective(x, y, 1.0)[0].backward()
            rows.append(torch.cat([p.loc.grad for p in guide.posteriors]).clone())
        return torch.stack(rows)

    shared, own = gradients(1), gradients(None)
    error = (shared.var(0) / 300 + own.var(0) / 300).sqrt()
    assert ((shared.mean(0) - own.mean(0)).abs() < 4.5 * error).all()


def test_the_kl_is_counted_once_per_data_set():
    """Batches of any size carry their share of the one KL: the epoch's sum is the ELBO of the data set."""
    model, guide, x, y = problem(12)
    objective = Objective(model, guide, (x, y), dataset_size=12, draws=1)
    total = likelihood = 0.0
    for part in (slice(0, 5), slice(5, 10), slice(10, 12)):
        loss, log_likelihood = objective(x[part], y[part], 3.0)
        size = len(y[part])
        total += float(loss.detach()) * size
        likelihood += log_likelihood * size
    assert total + likelihood == pytest.approx(3.0 * exact_kl(model, guide), rel=1e-5)


def test_a_model_scaled_to_the_data_set_has_the_same_objective():
    model, guide, x, y = problem(12)
    values = []
    for dataset_size in (None, 60):
        model.dataset_size = dataset_size
        objective = Objective(
            model, guide, (x, y), dataset_size=60, draws=1, scaled=dataset_size is not None, elbo="pyro"
        )
        torch.manual_seed(5)
        values.append([float(value) for value in objective(x, y, 2.0)])
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    assert values[0][1] == pytest.approx(values[1][1], rel=1e-5)


def test_validation_of_pyro_passes_with_several_draws():
    model, guide, x, y = problem()
    with pyro.validation_enabled(True), LatentsPerBatch(SITES, 4, len(x), 1.0, 1.0):
        LikelihoodELBO()(model, guide)(x, y).backward()


@pytest.mark.slow
def test_trace_elbo_agrees():
    """The handler is right under the sampled KL of Trace_ELBO as well: z-test at 4.4 (1.1e-5)."""
    model, guide, x, y = problem()
    torch.manual_seed(0)
    with torch.no_grad(), LatentsPerBatch(SITES, 4, len(x), 1.0, 1.0):
        sampled = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(600)])
        closed = torch.tensor([float(TraceMeanField_ELBO().loss(model, guide, x, y)) for _ in range(600)])
    error = math.sqrt(float(sampled.var() + closed.var()) / 600)
    assert abs(float(sampled.mean() - closed.mean())) < 4.4 * error


def test_other_latents_keep_their_own_weight():
    prior = torch.distributions.Normal(0.0, 1.0)

    def model(x):
        pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))
        pyro.sample("theta", LogUniform().expand([3]).to_event(1))

    def guide(x):
        pyro.sample("w", pyro.distributions.Normal(0.5, 0.5))
        pyro.sample("theta", TruncatedLogNormal(-2.0, 0.5).expand([3]).to_event(1))

    with LatentsPerBatch(["theta"], 4, 4, 10.0, 0.25):
        loss = TraceMeanField_ELBO().loss(model, guide, torch.zeros(4))
    other = float(kl_divergence(torch.distributions.Normal(0.5, 0.5), prior))
    noise = 3 * float(kl_divergence(TruncatedLogNormal(-2.0, 0.5), LogUniform()))
    assert float(loss) == pytest.approx(10 * noise + 0.25 * other, rel=1e-5)


def test_regressor_positions_count_in_the_likelihood():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), MultiplicativeNoise(3), nn.Linear(3, 2))
    model = Regressor(net, scale=0.5)
    x, y = torch.randn(7, 2), torch.randn(7, 2)
    trace = poutine.trace(poutine.condition(model, data={"2": torch.ones(3)})).get_trace(x, y)
    trace.compute_log_prob(site_filter=lambda name, site: site["is_observed"])
    expected = torch.distributions.Normal(trace.nodes["_RETURN"]["value"], 0.5).log_prob(y).sum()
    torch.testing.assert_close(trace.nodes["y"]["log_prob_sum"], expected)
