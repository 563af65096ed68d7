"""How much do the chosen size, and a network of a given size, depend on the pass that takes the curvature?

    OMP_NUM_THREADS=1 python analysis/passes.py NAME RECIPE DATA WEIGHTS [--out analysis/results/passes]
        [--network JSON] [--seeds 0 1 2 3] [--removed 0.75 0.9 0.95] [--data-root DIR]

WEIGHTS are what cells.py has trained. Each seed draws other signs and other examples; the split is that of seed 0.
Columns of OUT/passes.csv: network, seed, size (share asked for, or "own"), curvature ("signs"; rows of "labels" are of
the version of 30 November 2026 that drew labels), removed, accuracy and loss of the test images after the refit,
without training.
"""

from __future__ import annotations

from trials import Rows, curvature, of_weights, parser_of_weights

import pyro_bmrs as bmrs
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.networks.cost import parameters


def main() -> None:
    parser = parser_of_weights(__doc__, "passes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--removed", nargs="+", default=["0.75", "0.9", "0.95"])
    given = parser.parse_args()
    net, data = of_weights(given, 0)
    rows = Rows(given.out / "passes.csv", ("network", "seed", "size", "curvature"))
    for seed in given.seeds:
        sizes = [size for size in ("own", *given.removed) if not rows.has(given.name, seed, size, "signs")]
        if not sizes:
            continue
        plan = curvature(net, data, seed)
        for size in sizes:
            one = plan if size == "own" else plan.within(parameters=1 - float(size))
            small = one.apply(refit=data.train, progress=False)
            found = evaluate(bmrs.Classifier(small), data.test)
            removed = 1 - parameters(small) / parameters(net)
            rows.add(
                given.name, seed, size, "signs", removed=removed, accuracy=found.accuracy, loss=found.loss
            )


if __name__ == "__main__":
    main()
