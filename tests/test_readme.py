"""The README's ten lines work as they stand."""

import re
from pathlib import Path

import torch

from pyro_bmrs.networks.cost import parameters

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_ten_lines_make_a_smaller_network_that_predicts(capsys):
    (block,) = BLOCKS
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


def test_linked_files_exist():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for text in texts:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text.read_text()):
            assert target.startswith("http") or (text.parent / target).exists(), f"{text.name}: {target}"
