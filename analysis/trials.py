"""What the trials of the study share: a table that grows, settings by seed, a fit, and the figures of a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peers import measured, widths_of
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.data import Dataset, load_data
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import load_weights
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings


class Rows:
    """A CSV that grows by a row at a time; what it has need not be done again."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys
        # sizes are words too
        self.table = (
            pd.read_csv(path, dtype={"size": str}) if path.exists() else pd.DataFrame(columns=list(keys))
        )

    def has(self, *values: object) -> bool:
        same = pd.Series(True, index=self.table.index)
        for key, value in zip(self.keys, values, strict=True):
            same &= self.table[key].isna() if value is None else self.table[key] == value
        return bool(same.any())

    def add(self, *values: object, **measured: Any) -> None:
        row = pd.DataFrame([dict(zip(self.keys, values, strict=True)) | measured])
        self.table = row if self.table.empty else pd.concat([self.table, row], ignore_index=True)
        write_table(self.path, self.table)
        print(
            ", ".join(f"{name} {value}" for name, value in row.iloc[0].items()), file=sys.stderr, flush=True
        )


def figures(net: nn.Module, data: Dataset, before: int) -> dict[str, Any]:
    """Size and scores of a plain network that had so many parameters before."""
    size = parameters(net)
    return {
        "parameters": size,
        "removed": 1 - size / before,
        "widths": "-".join(map(str, widths_of(net))),
        **measured(net, data),
    }


@dataclass(frozen=True, eq=False)  # the same only as itself, so that what is made of it can be kept
class Trial:
    """A recipe on a data set, with the settings of one seed."""

    recipe: Recipe
    settings: RunSettings
    data: Dataset

    @cached_property
    def before(self) -> int:
        """Parameters of the network that is not reduced."""
        net = self.recipe.network(self.data, self.settings.network or {}, self.settings.seed)
        return parameters(bmrs.without_noise(net))

    def start(self) -> tuple[nn.Module, Any]:
        """Model and guide before any fit."""
        net = self.recipe.network(self.data, self.settings.network or {}, self.settings.seed)
        model = self.recipe.model(net)
        return model, self.recipe.guide(model)

    def fit(self, model: nn.Module, guide: Any, **options: Any) -> None:
        """Fit with the recipe's settings, but for `options`; KeyboardInterrupt if it is told to stop."""
        usual = {"schedule": "cosine", "progress": False}
        result = bmrs.fit(
            model, guide, self.data.train, self.data.validation, self.settings, **{**usual, **options}
        )
        if result.interrupted:
            raise KeyboardInterrupt


def parser_of_trials(described: str, results: str) -> argparse.ArgumentParser:
    """The command line of a script that tries something with a recipe on a data set."""
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("--kl-weight", type=float, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / results)
    parser.add_argument("--data-root", type=Path)
    return parser


def trials(given: argparse.Namespace) -> Iterator[Trial]:
    """One per seed that was asked for, on one thread."""
    torch.set_num_threads(1)
    recipe = Recipe.read(given.recipe)
    for seed in given.seeds:
        # as when the tables of these trials were made, before decay was the recipes' default
        settings = RunSettings.of(recipe, given.data, {"seed": seed, "weight_decay": 0.0})
        if given.kl_weight is not None:
            settings = settings.changed(kl_weight=given.kl_weight)
        if getattr(given, "network", None):
            settings = settings.changed(network={**(settings.network or {}), **given.network})
        data = load_data(
            given.data, data_root=given.data_root, image_size=settings.image_size, seed=seed, limit=settings.limit,
            validation_fraction=settings.validation_fraction,
        )  # fmt: skip
        yield Trial(recipe, settings, data)


def parser_of_weights(described: str, results: str) -> argparse.ArgumentParser:
    """The command line of a script that looks at a network that another script has trained."""
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / results)
    parser.add_argument("--network", type=json.loads, default={}, help="sizes of the network as JSON")
    parser.add_argument("--image-size", type=int, help="default: the recipe's")
    parser.add_argument("--limit", type=int, help="of training examples; default: all")
    parser.add_argument("--data-root", type=Path)
    return parser


def of_weights(given: argparse.Namespace, seed: int) -> tuple[nn.Module, Dataset]:
    """That network, and its data, split by a seed; on one thread."""
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.read(given.recipe)
    changes = {"network": given.network} if given.network else {}
    settings = RunSettings.of(recipe, given.data, {"seed": seed, **changes})
    data = load_data(
        given.data, data_root=given.data_root, image_size=given.image_size or settings.image_size, seed=seed,
        validation_fraction=settings.validation_fraction, limit=given.limit,
    )  # fmt: skip
    net = bmrs.without_noise(recipe.network(data, settings.network or {}, seed))
    net.load_state_dict(load_weights(given.weights))
    return net.eval(), data


def curvature(net: nn.Module, data: Dataset, seed: int, batch_size: int | None = None) -> LaplacePlan:
    """The plan of a trained network, by one pass over the training data."""
    model = bmrs.Classifier(copied(net))
    guide = bmrs.AutoKroneckerLaplace(model)
    options = {} if batch_size is None else {"batch_size": batch_size}
    bmrs.fit(model, guide, data.train, seed=seed, progress=False, **options)
    plan = bmrs.reduce(model, guide)
    assert isinstance(plan, LaplacePlan)
    return plan
