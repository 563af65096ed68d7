"""The settings of a run: those of its fit, of its data and network, and of the reduction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from pyro_bmrs.fitting.settings import Settings

if TYPE_CHECKING:
    from pyro_bmrs.runs.recipe import Recipe

# Settings of the reduction. The fit does not depend on them, unless it removes structures itself.
BUDGET = ("parameters", "macs", "bytes", "milliseconds", "accuracy_drop", "loss_rise")
OF_REDUCTION = (
    "criterion", "prior_log_odds", "min_kept", "round_to", *BUDGET, "recalibrate", "fine_tune", "baseline",
)  # fmt: skip
# Settings that fine-tuning leaves out: it has no posterior, and always runs all its epochs.
_NOT_OF_TUNING = {
    "kl_weight", "criterion", "prior_log_odds", "min_kept", "removal", "elbo", "freeze_weights", "patience",
}  # fmt: skip
# Settings of a variational fit, and of what follows from it alone.
_OF_VARIATIONAL = {
    "epochs", "posterior_learning_rate", "kl_weight", "warm_up", "draws_per_batch", "stratified", "patience",
    "criterion", "prior_log_odds", "removal", "freeze_weights", "elbo", "recalibrate",
}  # fmt: skip


def _located(data: str) -> str:
    from pyro_bmrs.data.sources import located  # slow to import, and help has no need of it

    return located(data)


def _located_weights(weights: str | None) -> str | None:
    from pyro_bmrs.runs.weights import located_weights

    return None if weights is None else located_weights(weights)


def _share(value: object) -> object:
    """20% is 0.2."""
    if not (isinstance(value, str) and value.endswith("%")):
        return value
    try:
        share = float(value[:-1]) / 100
    except ValueError:
        return value
    if not 0 < share < 1:
        raise ValueError(f"a share must be between 0% and 100%: got {value}")
    return share


_Cost = Annotated[float | None, BeforeValidator(_share)]


def _as_json(network: dict[str, Any] | None) -> dict[str, Any] | None:
    """As read back from settings.json, with lists for tuples."""
    try:
        copy: dict[str, Any] | None = json.loads(json.dumps(network))
    except (TypeError, ValueError) as error:
        raise ValueError(f"network must hold what JSON can: got {network!r} ({error})") from None
    return copy


class RunSettings(Settings):
    """All settings of a run: texts and numbers only, so that a file can hold them.

    >>> settings = RunSettings(kl_weight=3, round_to=8)
    >>> settings.changed(round_to=None, data="mnist").given()
    {'kl_weight': 3.0, 'data': 'mnist', 'round_to': None}
    """

    criterion: str = Field(default="BMRS_N", description=Settings.model_fields["criterion"].description)
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="How the learning rates change: constant, cosine or linear (to zero)."
    )
    weight_decay: float = Field(
        default=0.05, ge=0, description=Settings.model_fields["weight_decay"].description
    )
    data: Annotated[str, AfterValidator(_located)] = Field(
        default="digits",
        description="digits, patches, mnist, fashion-mnist, cifar10, a .npz file or an image folder.",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Pixels a side that images are scaled or padded to. None: as they are.",
    )
    network: Annotated[dict[str, Any] | None, AfterValidator(_as_json)] = Field(
        default=None, description="Arguments of the recipe's network by name; on the command line as JSON."
    )
    weights: Annotated[str | None, AfterValidator(_located_weights)] = Field(
        default=None,
        description="State dict of the trained network, .safetensors or .pt: nothing is fitted; its curvature decides.",
    )
    validation_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of the training examples that are set aside for validation.",
    )
    limit: int | None = Field(default=None, ge=2, description="Use at most this many training examples.")
    round_to: int | None = Field(
        default=None, ge=1, description="Keep channels in multiples of this, such as 8."
    )
    parameters: _Cost = Field(
        default=None, gt=0, description="Parameters left at most: a number, or a share such as 20% or 0.2."
    )
    macs: _Cost = Field(
        default=None, gt=0, description="Multiply-accumulates of one example at most, or a share such as 50%."
    )
    bytes: _Cost = Field(default=None, gt=0, description="Size of small.safetensors at most, or a share.")
    milliseconds: _Cost = Field(
        default=None, gt=0, description="Time of one example at most, on this machine; or a share below 1."
    )
    accuracy_drop: float | None = Field(
        default=None,
        ge=0,
        description="Points of validation accuracy that may be lost before fine-tuning, such as 0.5.",
    )
    loss_rise: float | None = Field(
        default=None,
        ge=0,
        description="Nats an example that the validation loss may rise before fine-tuning.",
    )
    recalibrate: bool = Field(default=True, description="Re-estimate BatchNorm statistics after removal.")
    fine_tune: int = Field(default=0, ge=0, description="Epochs of fine-tuning the small network.")
    baseline: bool = Field(
        default=False,
        description="Train the full network, without noise, as long, to tell what the reduction cost.",
    )

    @property
    def budget(self) -> dict[str, Any]:
        """What was asked for, by the names of `plan.within`; empty: the evidence chooses."""
        return {name: getattr(self, name) for name in BUDGET if getattr(self, name) is not None}

    @property
    def data_name(self) -> str:
        """The name of the data set to show; of a path its last part."""
        return Path(self.data).name if Path(self.data).is_absolute() else self.data

    @property
    def weights_name(self) -> str | None:
        """The name of the file of weights to show, without its folder."""
        return None if self.weights is None else Path(self.weights).name

    @property
    def posterior_text(self) -> str:
        """What made the posterior: weights, or a fit at a KL weight."""
        if self.weights is not None:
            return f"weights {self.weights_name}"
        rises = isinstance(self.kl_weight, str)
        return "rising KL weights" if rises else f"KL weight {self.kl_weight:g}"

    def changed(self, **changes: Any) -> Self:
        found = super().changed(**changes)
        useless = sorted(_OF_VARIATIONAL & changes.keys())
        if found.weights is not None and useless:
            raise ValueError(
                f"{useless[0]} must be left out where weights are given: it is for a variational fit, and there is none"
            )
        return found

    @classmethod
    def of(cls, recipe: Recipe, data: str, changes: Mapping[str, Any]) -> Self:
        """The recipe's settings for `data`, replaced by those in `changes`."""
        known = sorted(cls.model_fields.keys() - {"data"})
        for key, table in recipe.tables.items():
            # A mistake in another data set's settings is told now, not when its turn comes.
            unknown = [str(name) for name in table if name not in known]
            if unknown:
                near = get_close_matches(unknown[0], known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"recipe {recipe.path} must have known names in SETTINGS, {known}: "
                    f"got {unknown} for {key!r}{hint}"
                )
            try:
                cls(**table)
            except ValueError as error:
                raise ValueError(f"recipe {recipe.path}: SETTINGS for {key!r}: {error}") from None
        return cls(**recipe.settings(data), data=data).changed(**changes)

    def of_fit(self) -> dict[str, Any]:
        """The part that a fitted posterior depends on, as JSON has it; of a file of weights what tells its content.

        Raises:
            ValueError: if there is no such file.
        """
        left_out = set(OF_REDUCTION)
        if self.removal != "end":  # the criterion then shapes the fit, too
            left_out -= {"criterion", "prior_log_odds", "min_kept"}
        found = self.model_dump(mode="json", exclude=left_out)
        if self.weights is not None:
            from pyro_bmrs.runs.weights import digest_of

            found["weights"] = digest_of(self.weights)
        return found

    def of_fine_tuning(self, epochs: int | None = None) -> Settings:
        """The settings of the fit that tunes the small network, or of one like it with other epochs."""
        shared = {
            name: value
            for name, value in self.given().items()
            if name in Settings.model_fields and name not in _NOT_OF_TUNING
        }
        own = {"epochs": epochs or self.fine_tune, "schedule": "cosine", "weight_decay": self.weight_decay}
        return Settings(**shared | own)
