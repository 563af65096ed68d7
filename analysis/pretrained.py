"""From a trained network to a smaller one: train, insert noise, fit, reduce, apply, fine-tune, on CIFAR-10.

    python analysis/pretrained.py resnet OUT [--data-root DIR]
    python analysis/pretrained.py vit OUT

Every stage writes its files to OUT and is skipped where they exist, so the command can be called again after
an interruption. The last stage writes OUT/results.csv: accuracy, parameters, multiply-accumulates and
milliseconds of the trained network, of the fitted one at E[θ], of the smaller one (with BatchNorm statistics
as the fit left them, re-estimated, and after fine-tuning), and of the trained network trained as long in all.
"""

import argparse
import copy
from pathlib import Path

import pandas as pd
import torch

import pyro_bmrs as bmrs
from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.networks.cost import latency_milliseconds, multiply_accumulates, parameters
from pyro_bmrs.networks.export import load_weights, save_weights
from pyro_bmrs.runs.recipe import Recipe

EPOCHS = {
    "resnet": {"train": 12, "fit": 9, "fine-tune": 6},
    "vit": {"train": 12, "fit": 12, "fine-tune": 6},
}
BATCH = 128
RATES = {"resnet": 2e-3, "vit": 1e-3}  # of training; the fit starts from what training found, and goes gently
FIT = {
    "resnet": {"learning_rate": 5e-4, "posterior_learning_rate": 1e-2, "kl_weight": 70.0},
    "vit": {"learning_rate": 2e-4, "posterior_learning_rate": 1e-2, "kl_weight": 100.0},
}


class Study:
    def __init__(self, name: str, out: Path, data_root: str | None) -> None:
        self.name, self.out, self.epochs = name, out, EPOCHS[name]
        out.mkdir(parents=True, exist_ok=True)
        self.recipe = Recipe.read(Path(__file__).parents[1] / "models" / f"{name}.py")
        self.data = bmrs.load_data("cifar10", image_size=32, seed=0, data_root=data_root)

    def plain(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return self.recipe.module.plain(self.data.input_shape, self.data.num_outputs)

    def train(self, net: torch.nn.Module, epochs: int, rate: float, name: str) -> torch.nn.Module:
        """Plain training with a cosine schedule, or what an earlier call has left."""
        weights = self.out / f"{name}.safetensors"
        if not weights.exists():
            result = bmrs.fit(
                bmrs.Classifier(net), None, self.data.train, self.data.validation, epochs=epochs,
                batch_size=BATCH, learning_rate=rate, schedule="cosine",
            )  # fmt: skip
            result.history.to_csv(self.out / f"{name}.csv", index=False)
            save_weights(net, weights)
        net.load_state_dict(load_weights(weights))
        return net

    def fit(self, trained: torch.nn.Module) -> tuple[bmrs.Classifier, bmrs.AutoTruncatedLogNormal]:
        """The trained network with noise, its posterior fitted."""
        net = bmrs.insert_noise(trained, self.data.train[:2][0])
        model = bmrs.Classifier(net)
        guide = bmrs.AutoTruncatedLogNormal(model)
        path = self.out / "posterior.safetensors"
        if not path.exists():
            result = bmrs.fit(
                model, guide, self.data.train, self.data.validation, epochs=self.epochs["fit"], batch_size=BATCH,
                criterion=bmrs.BMRS_N(), **FIT[self.name],
            )  # fmt: skip
            result.history.to_csv(self.out / "fit.csv", index=False)
            save_posterior(path, model, guide)
        else:
            with torch.no_grad():
                guide(*self.data.train[:64])
            load_posterior(path, model, guide)
        return model, guide

    def row(self, name: str, net: torch.nn.Module, epochs: int, full: torch.nn.Module) -> dict[str, object]:
        model = bmrs.Classifier(net)
        x = self.data.test[:BATCH][0]
        old, new = latency_milliseconds([full.eval(), net.eval()], x)
        return {
            "network": name,
            "epochs": epochs,
            "validation_accuracy": evaluate(model, self.data.validation).accuracy,
            "test_accuracy": evaluate(model, self.data.test).accuracy,
            "parameters": parameters(net),
            "multiply_accumulates": multiply_accumulates(net, x),
            "milliseconds_batch_128": new,
            "speed_up": old / new,
        }

    def run(self) -> None:
        epochs = self.epochs
        trained = self.train(self.plain(), epochs["train"], RATES[self.name], "trained")
        model, guide = self.fit(trained)
        plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
        small = plan.apply(example_input=self.data.train[:32][0])
        plan.save(self.out / "plan.json")
        plan.table.to_csv(self.out / "structures.csv", index=False)
        print(plan.summary())
        total = epochs["train"] + epochs["fit"]
        full = bmrs.without_noise(copy.deepcopy(model.net))
        expected = (
            evaluate(model, self.data.test, guide.mean()),
            evaluate(model, self.data.validation, guide.mean()),
        )
        rows = [
            self.row("trained without noise", trained, epochs["train"], trained),
            {
                "network": "with noise, at E[θ]",
                "epochs": total,
                "test_accuracy": expected[0].accuracy,
                "validation_accuracy": expected[1].accuracy,
                "parameters": parameters(full),
            },
            self.row("smaller", small, total, trained),
        ]
        if any(isinstance(module, torch.nn.BatchNorm2d) for module in small.modules()):
            bmrs.recalibrate(small, self.data.train)
            rows.append(self.row("smaller, statistics re-estimated", small, total, trained))
        total += epochs["fine-tune"]
        small = self.train(small, epochs["fine-tune"], RATES[self.name] / 2, "fine_tuned")
        rows.append(self.row("smaller, fine-tuned", small, total, trained))
        pd.DataFrame(rows).to_csv(self.out / "results.csv", index=False)
        longer = self.train(
            copy.deepcopy(trained), epochs["fit"] + epochs["fine-tune"], RATES[self.name] / 2, "longer"
        )
        rows.append(self.row("trained without noise, as long in all", longer, total, trained))
        pd.DataFrame(rows).to_csv(self.out / "results.csv", index=False)
        print(pd.DataFrame(rows).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=["resnet", "vit"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Study(arguments.network, arguments.out, arguments.data_root).run()
