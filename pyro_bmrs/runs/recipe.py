"""A recipe: the Python file that defines the network and how to fit it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyro_bmrs.data import Dataset
from pyro_bmrs.data.preparation import Preparation, Targets
from pyro_bmrs.data.sources import KNOWN_SETS
from pyro_bmrs.inference import AutoTruncatedLogNormal, Classifier, Regressor

_DATA = ("default", *KNOWN_SETS)  # keys of SETTINGS that are no paths


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turns any error of a recipe's code into a ValueError that names the recipe."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # Pyro adds a table of all sites.
        reason = str(error).partition("Trace Shapes:")[0].strip()
        raise ValueError(f"{what} fails with {type(error).__name__}: {reason}") from error


def _check_table(path: Path, table: dict[Any, Any], known: Collection[str]) -> None:
    """Raise ValueError unless every key names data, and every value is a dict."""
    allowed = f"recipe {path} must have in SETTINGS a dict for each data set, such as {{'default': {{'epochs': 9}}}}"
    wrong = [key for key in table if not (isinstance(key, str) and (key in known or _is_path(key)))]
    if wrong:
        near = [match for key in wrong for match in get_close_matches(str(key), known, n=1, cutoff=0.75)]
        raise ValueError(
            f"{allowed}, by 'default', a known name ({', '.join(KNOWN_SETS)}), the path of an .npz file or a folder "
            f"that is there: got {', '.join(map(repr, wrong))}"
            + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")
        )
    for key, value in table.items():
        if not isinstance(value, dict):
            raise ValueError(f"{allowed}: got {type(value).__name__} for {key!r}")


def _is_path(key: str) -> bool:
    return key.endswith(".npz") or os.sep in key or (key != "" and Path(key).is_dir())


@dataclass(frozen=True)
class Recipe:
    """A Python file that defines `network` and `SETTINGS`, and optionally `model` and `guide`.

    Reading a recipe runs it: it is code, unlike every other file of a run.

    Attributes:
        path: the file.
        module: the module that it defines.
        name: its name; a run's folder keeps the file as recipe.py.
    """

    path: Path
    module: ModuleType
    name: str

    @classmethod
    def read(cls, path: Path | str, name: str | None = None) -> Recipe:
        """Raises ValueError, in one line, if the file is missing, fails, or lacks what a recipe defines."""
        path = Path(path)
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"recipe must be a Python file: {path} is none")
        module = ModuleType(f"pyro_bmrs_recipe_{path.stem}")
        module.__file__ = str(path)
        with blamed(f"recipe {path}"):
            # importlib would leave a __pycache__ beside it, also in a run's folder.
            exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
        if not callable(getattr(module, "network", None)):
            raise ValueError(
                f"recipe {path} must define a function network; see models/lenet5.py for one that does"
            )
        if not isinstance(getattr(module, "SETTINGS", None), dict):
            raise ValueError(f"recipe {path} must define SETTINGS as a dict of data name to settings")
        # A run's own copy was checked when the run began; its folders may lie elsewhere now.
        _check_table(path, module.SETTINGS, _DATA if name is None else module.SETTINGS)
        return cls(path, module, name or path.name)

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The recipe's settings by data set."""
        tables: dict[str, dict[str, Any]] = self.module.SETTINGS
        return tables

    def settings(self, data: str) -> dict[str, Any]:
        """The recipe's settings for a data set; those under "default" if it has none for it."""
        if data not in _DATA:
            for name, chosen in self.tables.items():
                # "photos" and "./photos/" are one folder
                if name not in _DATA and Path(name).resolve() == Path(data).resolve():
                    return chosen
        return self.tables.get(data, self.tables.get("default", {}))

    def network(self, dataset: Dataset | Preparation, options: Mapping[str, Any], seed: int) -> nn.Module:
        """The network with noise layers, its initial weights drawn with `seed`."""
        arguments = f"{dataset.input_shape}, {dataset.num_outputs}"
        with torch.random.fork_rng(), self._blamed("network", arguments):
            torch.manual_seed(seed)
            net = self.module.network(dataset.input_shape, dataset.num_outputs, **options)
        return self._checked("network", net, nn.Module)

    def model(self, network: nn.Module, targets: Targets | None = None) -> nn.Module:
        """The Pyro model of a network: the recipe's own, or `Classifier`; for targets of a regression `Regressor`."""
        default = Classifier if targets is None else partial(Regressor, unit=targets.deviation)
        with self._blamed("model", "network"):
            model = getattr(self.module, "model", default)(network)
        return self._checked("model", model, nn.Module)

    def guide(self, model: nn.Module) -> AutoTruncatedLogNormal:
        """The guide of a model: the recipe's own, or `AutoTruncatedLogNormal`."""
        with self._blamed("guide", "model"):
            guide = getattr(self.module, "guide", AutoTruncatedLogNormal)(model)
        return self._checked("guide", guide, AutoTruncatedLogNormal)

    def _blamed(self, function: str, arguments: str) -> Any:
        return blamed(f"recipe {self.path}: {function}({arguments})")

    def _checked[T](self, function: str, result: object, kind: type[T]) -> T:
        if not isinstance(result, kind):
            raise ValueError(
                f"recipe {self.path}: {function} must return a {kind.__name__}: got {type(result).__name__}"
            )
        return result
