"""Does the evidence of a trained network foresee what removal costs? Loss along the path, before and after the refit.

    OMP_NUM_THREADS=1 python analysis/foresight.py NAME RECIPE DATA WEIGHTS [--out analysis/results/foresight]
        [--network '{"patch": 8}'] [--image-size PIXELS] [--limit IMAGES] [--seed 0] [--data-root DIR]

The network is what cells.py, trained_networks.py or large_networks.py have trained and left as WEIGHTS. One curvature
of the training data gives the path. At every size of SIZES, and at the size that `reduce` chooses, the plan is applied
and measured. A network that OUT/foresight.csv has is passed over.

Columns: network, seed, removed (share asked for; "own"), parameters, predicted (rise of the loss, nats an example),
evidence (ΔF of all that left, nats), examples (N of the evidence), train_loss (of as many training examples as there
are validation examples), validation_loss, test_loss, test_accuracy before the refit, refitted_loss (validation),
refitted_accuracy (test).
"""

from __future__ import annotations

import math

import pandas as pd
import tables
from matplotlib.figure import Figure
from torch import nn
from trials import Rows, curvature, of_weights, parser_of_weights

import pyro_bmrs as bmrs
from pyro_bmrs.checks.data import some_of
from pyro_bmrs.figures.style import BLACK, GREY, ORANGE
from pyro_bmrs.inference.evaluate import Evaluation, evaluate

SIZES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def along(net: nn.Module, data: bmrs.Dataset, rows: Rows, name: str, seed: int) -> None:
    """A row at each size of the network's path."""
    plan = curvature(net, data, seed, batch_size=int(min(500, 1.5e6 // data.train[:1][0].numel())))
    full = plan.path.parameters.iloc[0] + plan.path.freed.iloc[0]
    some = some_of(data.train, len(data.validation))
    rises = [0.0, *plan.path.total_loss_rise]
    evidence = pd.Series([0.0, *plan.path.total_evidence_change]).interpolate()  # it is known at some places
    steps = {str(size): int((plan.path.parameters >= full * (1 - size)).sum()) for size in SIZES}
    for size, number in (steps | {"own": plan.steps}).items():  # the last tells that a network is done
        if rows.has(name, seed, size) or (number == len(plan.path) and size != "own"):
            continue  # done, or the path ends before this size
        one = plan.at(-number if number else math.inf)
        cut = _measured(one.apply(), some, data)
        refitted = _measured(one.apply(refit=data.train, progress=False), some, data)
        rows.add(
            name, seed, size, parameters=one.parameters_left(), examples=len(data.train),
            predicted=rises[number] / len(data.train), evidence=evidence[number],
            train_loss=cut["train"].loss, validation_loss=cut["validation"].loss, test_loss=cut["test"].loss,
            test_accuracy=cut["test"].accuracy, refitted_loss=refitted["validation"].loss,
            refitted_accuracy=refitted["test"].accuracy,
        )  # fmt: skip


def _measured(net: nn.Module, train: bmrs.Dataset, data: bmrs.Dataset) -> dict[str, Evaluation]:
    parts = {"train": train, "validation": data.validation, "test": data.test}
    return {name: evaluate(bmrs.Classifier(net.eval()), part) for name, part in parts.items()}


def draw() -> Figure:
    """For each network the loss that was predicted and those that came, and below its evidence."""
    rows = tables.paths()
    rows = rows[rows.seed == 0]
    networks = [*dict.fromkeys(rows.network)]
    lines = math.ceil(len(networks) / 4)
    figure = Figure(figsize=(11, 3.6 * lines), layout="constrained")
    panels = figure.subplots(2 * lines, 4, sharex=True, squeeze=False)
    for place, name in enumerate(networks):
        above, below = panels[2 * (place // 4) : 2 * (place // 4) + 2, place % 4]
        mine = rows[rows.network == name].sort_values("share", kind="stable")
        full, own = mine[mine.removed == "0.0"].iloc[0], mine[mine.removed == "own"].share.iloc[0]
        above.plot(
            mine.share, full.train_loss + mine.predicted, "--", color=BLACK, label="training, predicted"
        )
        above.plot(mine.share, mine.train_loss, color=GREY, label="training")
        above.plot(mine.share, mine.refitted_loss, color=ORANGE, label="validation, refitted")
        above.set_ylim(0, 3 * full.validation_loss)
        gain = mine.evidence / mine.examples
        below.plot(mine.share, gain, color=BLACK)
        below.set_ylim(-3 * gain.max(), 1.3 * gain.max())
        for axes in (above, below):
            axes.axvline(own, color=GREY, lw=1, ls=":")
        above.set_title(name)
        below.tick_params(labelbottom=True)
    for line, axes in enumerate(panels[:, 0]):
        axes.set_ylabel("ΔF (nats an example)" if line % 2 else "loss (nats an example)")
    for axes in panels[2 * (len(networks) // 4) :, len(networks) % 4 or 4 :].flatten():
        axes.axis("off")
    figure.supxlabel("parameters removed (%); dotted: the size that is chosen")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def main() -> None:
    parser = parser_of_weights(__doc__, "foresight")
    seeds = "of the split (of trained_networks.py always 0), and of the curvature"
    parser.add_argument("--seed", type=int, default=0, help=seeds)
    given = parser.parse_args()
    rows = Rows(given.out / "foresight.csv", ("network", "seed", "removed"))
    if not rows.has(given.name, given.seed, "own"):
        along(*of_weights(given, given.seed), rows, given.name, given.seed)


if __name__ == "__main__":
    main()
