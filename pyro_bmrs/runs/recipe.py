"""A recipe, the Python file that says what network to fit and how; and the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyro_bmrs.data import Dataset
from pyro_bmrs.inference import AutoTruncatedLogNormal, Classifier
from pyro_bmrs.pruning.criteria import parse_criterion


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turns any error of a recipe's code into a ValueError of one line that says whose it is."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # Pyro adds a table of all sites, which is no part of one line
        reason = str(error).partition("Trace Shapes:")[0].strip()
        raise ValueError(f"{what} fails with {type(error).__name__}: {reason}") from error


@dataclass(frozen=True)
class Recipe:
    """A Python file that defines `network` and `SETTINGS`, and optionally `model` and `guide`.

    Reading a recipe runs it: it is code, unlike every other file of a run.

    Attributes:
        path: the file.
        module: what it defines.
        name: what to call it; a run's folder keeps it as recipe.py, whatever its name was.
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
            # not through importlib, which would leave a __pycache__ beside it, in a run's folder too
            exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
        if not callable(getattr(module, "network", None)):
            raise ValueError(
                f"recipe {path} must define a function network; see models/lenet5.py for one that does"
            )
        if not isinstance(getattr(module, "SETTINGS", None), dict):
            raise ValueError(f"recipe {path} must define SETTINGS as a dict of data name to settings")
        return cls(path, module, name or path.name)

    def settings(self, data: str) -> dict[str, Any]:
        """The recipe's settings for a data set, those under "default" where it has none."""
        table = self.module.SETTINGS
        chosen = table.get(data, table.get("default", {}))
        if not isinstance(chosen, dict):
            raise ValueError(f"recipe {self.path} must have a dict in SETTINGS for {data!r}: got {chosen!r}")
        return chosen

    def network(self, dataset: Dataset, options: Mapping[str, Any], seed: int) -> nn.Module:
        """The network with noise layers, its initial weights drawn with `seed`."""
        arguments = f"{dataset.input_shape}, {dataset.num_classes}"
        with torch.random.fork_rng(), self._blamed("network", arguments):
            torch.manual_seed(seed)
            net = self.module.network(dataset.input_shape, dataset.num_classes, **options)
        return self._checked("network", net, nn.Module)

    def model(self, network: nn.Module) -> nn.Module:
        """The Pyro model round a network: the recipe's own, or `Classifier`."""
        with self._blamed("model", "network"):
            model = getattr(self.module, "model", Classifier)(network)
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


# Settings that earlier versions did not have, and as what these acted: runs of theirs are the same as with them.
LATER_SETTINGS: dict[str, Any] = {"weight_decay": 0.0, "validation_fraction": 0.2}


def known_before(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that an earlier version had no need to name."""
    return {
        name: value
        for name, value in settings.items()
        if name not in LATER_SETTINGS or value != LATER_SETTINGS[name]
    }


@dataclass(frozen=True)
class Settings:
    """All that shapes a run. Fields up to `limit` shape the fit, the rest what is done with it.

    What `fit` and `load_data` check before any work is done is not checked here again.
    """

    data: str = "digits"
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    posterior_learning_rate: float = 5e-3
    kl_weight: float = 1.0
    warm_up: float = 0.25
    draws_per_batch: int = 16
    removal: str = "end"
    schedule: str = "constant"
    weight_decay: float = 0.0
    gradient_clip: float | None = None
    accumulate: int = 1
    patience: int | None = None
    precision: str = "32"
    image_size: int | None = None
    network: dict[str, Any] | None = None
    validation_fraction: float = 0.2
    limit: int | None = None
    criterion: str = "BMRS_N"
    prior_log_odds: float | None = None
    min_kept: int = 1
    round_to: int | None = None
    recalibrate: bool = True
    fine_tune: int = 0

    def __post_init__(self) -> None:
        for name, least, allowed in (
            ("batch_size", 1, "a number of examples, 1 or more"),
            ("min_kept", 1, "a number of structures, 1 or more"),
            ("draws_per_batch", 0, "a number of draws, 1 or more, or 0 for one per example"),
            ("fine_tune", 0, "a number of epochs, 0 or more"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be {allowed}: got {value!r}")
        if self.round_to is not None and (not isinstance(self.round_to, int) or self.round_to < 1):
            raise ValueError(
                f"round_to must be a number of channels, 1 or more, or None: got {self.round_to!r}"
            )
        if not isinstance(self.recalibrate, bool):
            raise ValueError(f"recalibrate must be True or False: got {self.recalibrate!r}")
        if not isinstance(self.criterion, str):
            raise ValueError(f"criterion must be a name such as 'BMRS_N': got {self.criterion!r}")
        parse_criterion(self.criterion, self.prior_log_odds)
        try:
            # as settings.json will give it back, with lists for tuples
            network = json.loads(json.dumps(self.network))
        except (TypeError, ValueError) as error:
            raise ValueError(f"network must hold what JSON can: got {self.network!r} ({error})") from None
        if not isinstance(network, dict | None):
            raise ValueError(f"network must be a dict of arguments of the recipe's network: got {network!r}")
        object.__setattr__(self, "network", network)

    @classmethod
    def of(cls, recipe: Recipe, data: str, overrides: Mapping[str, Any]) -> Settings:
        """The recipe's settings for `data`, with the given ones (None: not given) laid over them."""
        chosen = recipe.settings(data)
        known = {field.name for field in fields(cls)} - {"data"}
        unknown = sorted(map(str, set(chosen) - known))
        if unknown:
            raise ValueError(
                f"recipe {recipe.path} must have known names in SETTINGS, {sorted(known)}: got {unknown}"
            )
        return cls(**chosen, data=data).changed(overrides)

    def changed(self, overrides: Mapping[str, Any]) -> Settings:
        """These settings with the given ones (None: not given) laid over them.

        Another criterion leaves the prior log-odds behind, which belong to the one before.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        if "criterion" in given:
            given.setdefault("prior_log_odds", None)
        return replace(self, **given)

    def of_fit(self) -> dict[str, Any]:
        """The part that a fitted posterior depends on."""
        names = [field.name for field in fields(self)]
        kept = names[: names.index("limit") + 1]
        if self.removal != "end":  # then the criterion has a hand in the fit
            kept += ["criterion", "prior_log_odds", "min_kept"]
        return {name: getattr(self, name) for name in kept}
