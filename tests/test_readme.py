"""The README's ten lines work as they stand."""

import re
from pathlib import Path

import pyro
import torch

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import export_onnx, export_program, save_weights

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_ten_lines_make_a_smaller_network_that_predicts(capsys):
    block = BLOCKS[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    names = {}
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), names)
    small, digits = names["small"], names["digits"]
    assert not any("bmrs" in type(module).__module__ for module in small.modules())
    assert parameters(small) < 0.7 * parameters(names["net"])
    x, y = digits.test[:]
    with torch.no_grad():
        assert float((small.eval()(x).argmax(1) == y).float().mean()) > 0.9
    assert "BMRS_N" in capsys.readouterr().out
    exec(compile(BLOCKS[2], "README.md", "exec"), names)
    assert "all latents" in capsys.readouterr().out
    assert names["diagnosis"].quality.network.tolist() == ["full", "full", "reduced", "reduced"]
    assert dict(names["tree"].posterior["3"].sizes) == {"chain": 1, "draw": 200, "3_unit": 100}


def test_any_network_gets_its_noise_inserted(capsys):
    names = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert type(names["noisy"]) is type(names["net"])
    assert "not removable:\n  fc: 10 channels, an output of the network" in capsys.readouterr().out


def test_the_small_network_loads_in_all_three_ways(tmp_path, monkeypatch):
    def make_network():
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = bmrs.Classifier(bmrs.insert_noise(make_network(), x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(x, torch.zeros(5, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5))
    small = plan.apply(seconds=0)
    plan.save("plan.json")
    save_weights(small, "small.safetensors")
    export_program(small, x, "small.pt2")
    export_onnx(small, x, "small.onnx")
    with torch.no_grad():
        wanted = small(x)
    for ending in ("logits = small(x)", "module()(x)", "x.numpy()})[0]"):
        names = {"make_network": make_network, "x": x}
        exec(compile(BLOCKS[3].partition(ending)[0] + ending, "README.md", "exec"), names)
        torch.testing.assert_close(torch.as_tensor(names["logits"]), wanted, atol=1e-5, rtol=0)


def test_evidence_for_any_pyro_model(capsys):
    pyro.clear_param_store()
    torch.manual_seed(0)
    names = {}
    exec(compile(BLOCKS[4], "README.md", "exec"), names)
    assert names["plan"].kept == {"weights": [0, 2]}
    assert names["predictive"](names["x"])["y"].shape == (100, 200)
    assert "16 models; the most probable reduce:" in capsys.readouterr().out


def test_the_page_on_evidence(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    names = {}
    text = (ROOT / "docs" / "evidence.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "evidence.md", "exec"), names)
    assert names["plan"].kept == {"weights": [1, 2, 3, 4, 8]}
    assert (tmp_path / "curve.svg").stat().st_size > 10_000
    assert "1,024 models" in capsys.readouterr().out


def test_the_page_on_diagnostics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    torch.manual_seed(0)
    for block in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "diagnostics.md").read_text(), flags=re.DOTALL
    ):
        exec(compile(block, "diagnostics.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html",
        "report.md",
        "diagnosis",
        "posterior.nc",
    }
    assert (tmp_path / "diagnosis" / "quality.csv").exists()
    assert names["diagnosis"].quality.out_of_distribution_auroc.min() > 0.7
    assert "all latents" in capsys.readouterr().out


def test_linked_files_exist():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for text in texts:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text.read_text()):
            assert target.startswith("http") or (text.parent / target).exists(), f"{text.name}: {target}"
