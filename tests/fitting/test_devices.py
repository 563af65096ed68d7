"""Several processes share a fit: the same parameters in all, the same objective as in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from two_processes import data, fitted, tuned

import pyro_bmrs as bmrs
from pyro_bmrs.fitting.devices import open_fabric
from pyro_bmrs.inference.batches import Batches

SUPPORT = Path(__file__).parent.parent / "support"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes under torchrun, gloo on loopback, ended with."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(SUPPORT / "two_processes.py"), str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    states = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    return folder, states


@pytest.mark.slow
def test_parameters_are_equal_to_the_last_bit_and_so_is_the_plan(ranks):
    _, (first, second) = ranks
    for part in ("model", "guide"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    assert first["kept"] == second["kept"]
    assert first["loss"] == second["loss"]
    assert first["removals"] == second["removals"]
    assert 0 < len(first["kept"]["3"]) < 12  # something was removed, physically
    assert first["model"]["net.0.weight"].shape == (len(first["kept"]["3"]), 6)


@pytest.mark.slow
def test_one_process_wrote_the_checkpoints_and_the_ledger(ranks):
    folder, (first, _) = ranks
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names[-1] == "ledger.csv"
    assert "epoch-0030.safetensors" in names
    ledger = (folder / "checkpoints" / "ledger.csv").read_text().splitlines()
    assert len(ledger) == len(first["removals"].splitlines())


@pytest.mark.slow
def test_the_noise_differs_and_the_objective_is_that_of_one_process(ranks):
    """Other draws, the same expectation: the loss of an epoch differs a little, and its KL hardly."""
    _, (state, _) = ranks
    *_, one = fitted()
    losses = torch.tensor([one.history.loss.tolist(), state["loss"]])
    assert not torch.equal(losses[0], losses[1])
    # once the weight of the KL has warmed up it is most of the loss: counted twice it would be far off
    assert (losses[0] - losses[1]).abs().max() < 0.1 * losses[0].max()


@pytest.mark.slow
def test_without_noise_the_loss_is_that_of_one_process(ranks):
    """The same global batches: sums over two halves differ from one sum by rounding alone."""
    _, (state, _) = ranks
    loss, weight = tuned()
    torch.testing.assert_close(torch.tensor(state["tuned"][0]), torch.tensor(loss), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["tuned"][1], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_example_counts_once_whatever_the_number_of_processes(world):
    x = torch.arange(23.0)
    per_rank = [
        list(
            Batches((x, x), 10, CPU, "train").shared(CPU, rank, world).epoch(torch.Generator().manual_seed(1))
        )
        for rank in range(world)
    ]
    for parts in zip(*per_rank, strict=True):
        means = [part.weight * part.x.mean() for part in parts]
        assert sum(len(part.x) * part.share for part in parts) == pytest.approx(
            len(torch.cat([p.x for p in parts]).unique())
        )
        assert sum(means) / world == pytest.approx(float(torch.cat([p.x for p in parts]).unique().mean()))


def test_bf16_mixed_runs_the_network_in_bfloat16_and_the_evidence_in_float64():
    seen = set()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), bmrs.MultiplicativeNoise(12), nn.Linear(12, 2))
    net[3].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    options = dict(epochs=8, batch_size=50, learning_rate=1e-2, progress=False)
    result = bmrs.fit(model, guide, data(200, 0), data(100, 1), precision="bf16-mixed", **options)
    assert torch.bfloat16 in seen
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert result.history.validation_accuracy.iloc[-1] > 0.8
    assert bmrs.reduce(model, guide, bmrs.BMRS_N()).table.score.dtype == "float64"


def test_auto_is_the_accelerator_or_the_cpu_and_a_device_can_be_named():
    wanted = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    assert open_fabric("auto", "32", CPU).device.type == wanted
    assert open_fabric(None, "32", CPU).device.type == "cpu"
    assert open_fabric("cpu", "bf16-mixed", CPU).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(device="gpu7"), r"device must be .* got 'gpu7'"),
        (dict(precision="8"), r"precision must be '32' or 'bf16-mixed': got '8'"),
    ],
)
def test_bad_devices_are_named(options, message):
    model = bmrs.Classifier(nn.Linear(6, 2))
    with pytest.raises(ValueError, match=message):
        bmrs.fit(model, None, data(20, 0), epochs=1, progress=False, **options)
