"""The small network of a run, to be used where the run's data are not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.data.preparation import Preparation
from pyro_bmrs.files import check_file
from pyro_bmrs.inference import Classifier, Regressor
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.inference.predict import predict
from pyro_bmrs.networks.export import export_onnx, export_program
from pyro_bmrs.networks.hooked_noise import without_noise
from pyro_bmrs.numerals import finite
from pyro_bmrs.runs.folder import RunFolder
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings


class Served(RunFolder):
    """A reduced run, without its data.

    Args:
        folder: of the run.

    Raises:
        ValueError: if it holds no run, or one that was written by a newer version.
    """

    recipe: Recipe
    settings: RunSettings
    preparation: Preparation  # of the run's inputs

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        stored = self.needed_settings()
        self.settings, self.preparation = stored["settings"], stored["inputs"]
        self.recipe = Recipe.read(self.folder / "recipe.py", stored["recipe"])

    def original_network(self) -> nn.Module:
        """The recipe's network as it was before the fit, with all its structures; for trained weights without noise."""
        network = self.recipe.network(self.preparation, self.settings.network or {}, self.settings.seed)
        return network if self.settings.weights is None else without_noise(network)

    @property
    def temperature(self) -> float | None:
        """What the small network's logits are divided by, for its probabilities; None: no classifier."""
        return finite(self.evaluation().iloc[-1].get("temperature"))

    def told(self, *, folded: bool) -> dict[str, Any]:
        """What an exported file of the small network tells, as JSON has it.

        Args:
            folded: whether the file itself does what is told.
        """
        return {**self.preparation.document(), "temperature": self.temperature, "folded": folded}

    def small_network(self) -> nn.Module:
        """The small network, rebuilt from recipe, plan and small.safetensors; in eval mode."""
        self.need("small.safetensors")
        return self.plan().rebuild(self.original_network(), self.folder / "small.safetensors")

    def export(self, path: Path, *, fold_preprocessing: bool = False, tolerance: float | None = None) -> Path:
        """Write the small network as an ONNX file (.onnx) or a torch.export program (.pt2).

        Args:
            path: of the file.
            fold_preprocessing: whether it takes raw inputs, which need no change of size, and gives probabilities,
                or targets in their units.
            tolerance: as of `export_onnx`.
        """
        if path.suffix not in (".onnx", ".pt2"):
            raise ValueError(f"out must end in .onnx or .pt2: got {path}")
        check_file("out", path)
        network, x = self.small_network(), self._examples()
        if fold_preprocessing:
            network = Folded(self._model(network), self.preparation, self.temperature or 1.0)
            x = self._raw(x)
        told = self.told(folded=fold_preprocessing)
        if path.suffix == ".onnx":
            return export_onnx(network, x, path, tolerance=tolerance, inputs=told)
        if tolerance is not None:
            raise ValueError(
                f"tolerance must be left out for a .pt2, which torch computes itself: got {tolerance:g}"
            )
        return export_program(network, x, path, inputs=told)

    def predict(self, inputs: Tensor) -> pd.DataFrame:
        """Number and name of the predicted class, and its probability at the `temperature`, a row each; of a regression
        the targets by name.

        Args:
            inputs: as `Preparation.prepare` gives them.
        """
        predicted = predict(self._model(self.small_network()), None, inputs)
        if not math.isfinite(float(predicted.sum())):
            raise ValueError("inputs must be finite: a prediction is NaN")
        targets = self.preparation.targets
        if targets is not None:
            return pd.DataFrame(targets.restored(predicted).numpy(), columns=[*targets.names])
        probability, label = (predicted.log() / (self.temperature or 1.0)).softmax(1).max(dim=1)
        names = dict(enumerate(self.preparation.class_names))
        return pd.DataFrame({
            "label": label.numpy(),
            "class": [names.get(number, str(number)) for number in label.tolist()],
            "probability": probability.numpy(),
        })  # fmt: skip

    def _model(self, small: nn.Module) -> Likelihood:
        """The recipe's model if it is a classifier, or a regression of targets; else such a one of the network."""
        model, targets = self.recipe.model(small, self.preparation.targets), self.preparation.targets
        if targets is not None:
            return model if isinstance(model, Regressor) else Regressor(small)
        return model if isinstance(model, Classifier) else Classifier(small)

    def _examples(self) -> Tensor:
        """Standardised inputs are near standard normal."""
        return torch.randn((4, *self.preparation.input_shape), generator=torch.Generator().manual_seed(0))

    def _raw(self, inputs: Tensor) -> Tensor:
        """The raw values nearest to these inputs."""
        form = self.preparation.form
        raw = (inputs * self.preparation.deviation + self.preparation.mean) * form.scale
        if form.values == "numbers":
            return raw
        raw = raw.round().clamp(0, form.scale)
        return raw.to(torch.uint8) if form.values == "bytes" else raw


class Folded(nn.Module):
    """From raw inputs, (N, C, H, W) or (N, F), to probabilities (N, classes) or targets in their units (N, T)."""

    mean: Tensor
    deviation: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, model: Likelihood, preparation: Preparation, temperature: float) -> None:
        super().__init__()
        self.model, self.divisor, self.temperature = model, preparation.form.scale, temperature
        targets = preparation.targets
        loc, scale = (torch.zeros(1), torch.ones(1)) if targets is None else (targets.mean, targets.deviation)
        values = {"mean": preparation.mean, "deviation": preparation.deviation, "loc": loc, "scale": scale}
        for name, value in values.items():
            self.register_buffer(name, value)

    def forward(self, raw: Tensor) -> Tensor:
        scaled = raw.to(self.mean.dtype) / self.divisor
        output = self.model.predict((scaled - self.mean) / self.deviation)
        found = self.model.prediction(output / self.temperature)
        return found * self.scale + self.loc
