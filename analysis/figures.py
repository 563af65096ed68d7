"""Every figure and table of README and docs that is made of committed CSVs, made again.

python analysis/figures.py [NAME …]    # of figures; tables are written in any case
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cells_figure
import compression_curves
import diabetes_ranking
import evidence_conscience
import evidence_figure
import fit_figure
import fit_scaling
import foresight
import gallery_figure
import gradient_variance
import matplotlib as mpl
import pandas as pd
import peers_figure
import pretrained_figure
import ranking
import readme_figure
import tables
import trained_networks
from matplotlib.figure import Figure

from pyro_bmrs.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "analysis" / "results"


def _of(draw: Callable[[pd.DataFrame], Figure], csv: str) -> Callable[[], Figure]:
    return lambda: draw(pd.read_csv(RESULTS / csv))


def _curves() -> Figure:
    folder = RESULTS / "compression_curves" / "lenet5_mnist_again"
    return compression_curves.draw(
        pd.read_csv(folder / "peers.csv"), pd.read_csv(folder / "criteria.csv"), "lenet5_mnist"
    )


def _evidence(name: str) -> Figure:
    return evidence_figure.draw()[name]


IMAGES = "docs/images"
FIGURES: dict[str, Callable[[], Figure]] = {
    f"{IMAGES}/lenet5_mnist.svg": partial(readme_figure.draw, RESULTS / "lenet5_mnist"),
    f"{IMAGES}/peers.svg": peers_figure.draw,
    f"{IMAGES}/cells.svg": cells_figure.draw,
    f"{IMAGES}/foresight.svg": foresight.draw,
    f"{IMAGES}/curves.svg": _curves,
    f"{IMAGES}/ranking.svg": _of(ranking.draw, "ranking/units.csv"),
    f"{IMAGES}/pretrained.svg": pretrained_figure.draw,
    f"{IMAGES}/fit_costs.svg": fit_figure.draw,
    **{
        f"{IMAGES}/{name}.svg": partial(_evidence, name)
        for name in ("evidence_reductions", "evidence_models", "evidence_curve")
    },
    f"{IMAGES}/gallery_resnet20.svg": partial(gallery_figure.trained, "resnet20"),
    f"{IMAGES}/gallery_vit.svg": partial(gallery_figure.trained, "vit"),
    f"{IMAGES}/gallery_efficientnet.svg": partial(gallery_figure.large, "EfficientNet-Lite0"),
    f"{IMAGES}/gallery_crepe.svg": gallery_figure.crepe,
    f"{IMAGES}/gallery_minilm.svg": gallery_figure.minilm,
    f"{IMAGES}/gallery_diabetes.svg": gallery_figure.diabetes,
    f"{IMAGES}/gallery_schools.svg": gallery_figure.schools,
    "analysis/results/diabetes/ranking.svg": _of(diabetes_ranking.draw, "diabetes/ranking.csv"),
    "analysis/results/evidence_conscience/cases.svg": _of(
        evidence_conscience.draw, "evidence_conscience/cases.csv"
    ),
    "analysis/results/fit_scaling/fit_scaling.svg": _of(fit_scaling.draw, "fit_scaling/fit_scaling.csv"),
    "analysis/results/gradient_variance/gradient_variance.svg": _of(
        gradient_variance.draw, "gradient_variance/gradient_variance.csv"
    ),
    "analysis/results/trained_lenet5/fashion-mnist.svg": partial(
        trained_networks.draw, RESULTS / "trained_lenet5" / "results.csv", "fashion-mnist"
    ),
}


def main() -> None:
    unknown = set(sys.argv[1:]) - {Path(path).stem for path in FIGURES}
    if unknown:
        sys.exit(
            f"{__doc__}\nno figure {', '.join(sorted(unknown))}: there are {', '.join(map(str, FIGURES))}"
        )
    for path, draw in FIGURES.items():
        if not sys.argv[1:] or Path(path).stem in sys.argv[1:]:
            with mpl.rc_context({"svg.hashsalt": "pyro_bmrs", "hatch.linewidth": 0.6}):
                figure = draw()
                write_atomically(
                    ROOT / path,
                    lambda beside, figure=figure: figure.savefig(
                        beside, format="svg", metadata={"Date": None}
                    ),
                )
            print(path)
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        made = tables.written(text)
        if made != text:
            write_atomically(page, lambda beside, made=made: beside.write_text(made, encoding="utf-8"))
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
