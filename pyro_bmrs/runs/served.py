"""The small network of a run, to be used where the run's data are not."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.data.preparation import Preparation
from pyro_bmrs.files import check_file
from pyro_bmrs.inference import Classifier
from pyro_bmrs.inference.predict import predict
from pyro_bmrs.networks.export import export_onnx, export_program
from pyro_bmrs.networks.hooked_noise import without_noise
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

    def small_network(self) -> nn.Module:
        """The small network, rebuilt from recipe, plan and small.safetensors; in eval mode."""
        self.need("small.safetensors")
        return self.plan().rebuild(self.original_network(), self.folder / "small.safetensors")

    def export(self, path: Path, *, fold_preprocessing: bool = False, tolerance: float | None = None) -> Path:
        """Write the small network as an ONNX file (.onnx) or a torch.export program (.pt2).

        Args:
            path: of the file.
            fold_preprocessing: whether it takes raw inputs, which need no change of size, and gives probabilities.
            tolerance: as of `export_onnx`.
        """
        if path.suffix not in (".onnx", ".pt2"):
            raise ValueError(f"out must end in .onnx or .pt2: got {path}")
        check_file("out", path)
        network, x = self.small_network(), self._examples()
        if fold_preprocessing:
            network, x = Folded(self._model(network), self.preparation), self._raw(x)
        told = {**self.preparation.document(), "folded": fold_preprocessing}
        if path.suffix == ".onnx":
            return export_onnx(network, x, path, tolerance=tolerance, inputs=told)
        if tolerance is not None:
            raise ValueError(
                f"tolerance must be left out for a .pt2, which torch computes itself: got {tolerance:g}"
            )
        return export_program(network, x, path, inputs=told)

    def predict(self, inputs: Tensor) -> pd.DataFrame:
        """Number and name of the predicted class, and its probability, a row each.

        Args:
            inputs: as `Preparation.prepare` gives them.
        """
        probabilities = predict(self._model(self.small_network()), None, inputs)
        probability, label = probabilities.max(dim=1)
        if not math.isfinite(float(probability.sum())):
            raise ValueError("inputs must be finite: a prediction is NaN")
        names = dict(enumerate(self.preparation.class_names))
        return pd.DataFrame({
            "label": label.numpy(),
            "class": [names.get(number, str(number)) for number in label.tolist()],
            "probability": probability.numpy(),
        })  # fmt: skip

    def _model(self, small: nn.Module) -> Classifier:
        """The recipe's model if it is a classifier; for any other model the network's outputs count as logits."""
        model = self.recipe.model(small)
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
    """A classifier from raw inputs, (N, C, H, W) or (N, F), to probabilities (N, classes)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Classifier, preparation: Preparation) -> None:
        super().__init__()
        self.model, self.divisor = model, preparation.form.scale
        self.register_buffer("mean", preparation.mean)
        self.register_buffer("deviation", preparation.deviation)

    def forward(self, raw: Tensor) -> Tensor:
        scaled = raw.to(self.mean.dtype) / self.divisor
        return self.model.prediction(self.model.predict((scaled - self.mean) / self.deviation))
