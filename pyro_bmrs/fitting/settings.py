"""The settings of a fit: a field each, with type, default, bounds and help, and what follows from them alone.

`fit`, recipes, the command line, studies, checkpoints and the documentation read these fields. A new setting is a
field here and the line that uses it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    model_validator,
)

from pyro_bmrs.arguments import check, is_floor, is_number, name_of

if TYPE_CHECKING:
    from pyro_bmrs.pruning.scoring import Criterion

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}

_CONFIG = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
# What must be given, by the first word of pydantic's name for a wrong type.
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "True or False", "string": "text", "dict": "a mapping",
}  # fmt: skip


class Checked(BaseModel):
    """Frozen fields. A bad value or an unknown field is a ValueError of one line."""

    model_config = _CONFIG

    if not TYPE_CHECKING:  # type checkers take the fields from the class

        def __init__(self, **values: Any) -> None:
            # NumPy's integers are whole numbers too, but none of Python's
            whole = {
                name: int(value)
                for name, value in values.items()
                if isinstance(value, Integral) and not isinstance(value, bool)
            }
            try:
                super().__init__(**values | whole)
            except ValidationError as error:
                problems = [self._problem(str((*one["loc"], "")[0]), one) for one in error.errors()]
                raise ValueError("; ".join(problems)) from None

    @classmethod
    def _problem(cls, name: str, error: Any, *, text: bool = False) -> str:
        """The message for one of pydantic's errors. `text`: the value was given as a text."""
        kind, given = error["type"], error["input"]
        if kind == "value_error":  # from a check of this package, with its own message
            return str(error["ctx"]["error"])
        if kind == "missing":
            return f"{name} must be given"
        if kind == "extra_forbidden":
            return f"settings must be among {', '.join(cls.model_fields)}: got {name!r}"
        allowed = error["msg"].removeprefix("Input should be ")
        bound = kind.startswith(("greater", "less", "finite"))
        if kind == "too_short":
            allowed = "one value or more"
        elif not bound:
            allowed = _KINDS.get(kind.partition("_")[0], allowed)
        if type(None) in get_args(cls.model_fields[name].annotation):
            allowed += " or None"
        return f"{name} must be {allowed}: got {given if text and bound else repr(given)}"

    @classmethod
    def read(cls, name: str, text: str) -> Any:
        """The value of a field from a text: "none" is None, and braces hold JSON.

        Raises:
            ValueError: in one line.
        """
        field = cls.model_fields[name]
        value: Any = text
        if text == "none" and type(None) in get_args(field.annotation):
            value = None
        elif text.startswith("{"):
            try:
                value = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{name} must be JSON: got {text!r} ({error})") from None
        kind: Any = Annotated[field.annotation, field]
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        try:
            return adapter.validate_python(value, strict=False)
        except ValidationError as error:
            raise ValueError(
                "; ".join(cls._problem(name, one, text=True) for one in error.errors())
            ) from None


def _checked_schedule(value: object) -> object:
    known = callable(value) or (isinstance(value, str) and value in SCHEDULES)
    check(known, "schedule", f"one of {', '.join(SCHEDULES)} or a function", value)
    return value


def _checked_floor(value: object, read: Callable[[object], float]) -> float:
    with suppress(ValidationError):  # of the two types that it may have: one message for both
        value = read(value)
    check(is_floor(value), "min_kept", "an integer of at least 1, or a share between 0 and 1", value)
    return cast(float, value)


def _checked_weight(value: object, read: Callable[[object], float]) -> float | str:
    if value != "auto":
        with suppress(ValidationError):
            value = read(value)
        check(
            is_number(value) and cast(float, value) >= 0,
            "kl_weight",
            'a finite number of 0 or more, or "auto"',
            value,
        )
    return cast("float | str", value)


_Weight = Annotated[float | Literal["auto"], WrapValidator(_checked_weight)]
_Floor = Annotated[int | float, WrapValidator(_checked_floor)]
_Criterion = Annotated[
    str | Callable[..., Any], PlainValidator(lambda value: value), PlainSerializer(name_of)
]
_Schedule = Annotated[
    str | Callable[[float], float], PlainValidator(_checked_schedule), PlainSerializer(name_of)
]


class Settings(Checked):
    """All settings of a fit.

    >>> Settings(epochs=40, kl_weight=3).changed(epochs=10).kl_weight
    3.0
    >>> Settings(epochs=0, warm_up=2)
    Traceback (most recent call last):
        ...
    ValueError: epochs must be greater than or equal to 1: got 0; warm_up must be less than or equal to 1: got 2
    """

    epochs: int = Field(default=30, ge=1, description="Passes over the training data.")
    batch_size: int = Field(
        default=128, ge=1,
        description="Examples per step, of all processes together. A DataLoader keeps its own. If not given: a network "
        "with structures gets at least 32 batches an epoch, of 16 examples or more.",
    )  # fmt: skip
    learning_rate: float = Field(
        default=1e-3, ge=0,
        description="Learning rate of AdamW for the model's parameters. If neither it nor warm_up is given: 0.3 times "
        "as much, and a warm-up of 0.1, for a trained network: to it labels are twice as likely as those of others.",
    )  # fmt: skip
    posterior_learning_rate: float = Field(
        default=5e-3, ge=0,
        description="Learning rate of AdamW for the posterior's parameters. If not given: higher for a fit of few "
        "steps, so that log θ can move by 40, up to 0.05.",
    )  # fmt: skip
    kl_weight: _Weight = Field(
        default="auto",
        description="Factor on the KL of the structures. 1 is the ELBO; more removes more. auto: it rises along "
        "the fit, and the stage with the fewest parameters is kept whose validation loss is within one standard error "
        "of the least. If not given: 1 without validation data or structures, with patience or removals in the fit.",
    )  # fmt: skip
    warm_up: float = Field(
        default=0.25, ge=0, le=1,
        description="Share of the steps over which the KL weight rises from 0, from 0 to 1.",
    )  # fmt: skip
    draws_per_batch: int | None = Field(
        default=16, ge=1,
        description="Values of each θ per batch; example i uses draw i mod draws. None: one per example. One, where θ "
        "multiplies a weight.",
    )  # fmt: skip
    stratified: bool = Field(
        default=True,
        description="Take these draws from equal cells of probability, which lowers the gradient's variance.",
    )
    schedule: _Schedule = Field(
        default="constant",
        description="How the learning rates change: constant, cosine or linear (to zero). "
        "In Python also a function from the share of steps done, from 0 to 1, to a factor.",
    )
    rate_warm_up: float = Field(
        default=0.0, ge=0, le=1,
        description="Share of the steps over which the learning rates rise linearly from 0, from 0 to 1.",
    )  # fmt: skip
    weight_decay: float = Field(
        default=0.0, ge=0,
        description="Decay of the weights of the model's layers, decoupled from the gradient (AdamW). "
        "The posterior and parameters that a model holds beside its layers do not decay.",
    )  # fmt: skip
    gradient_clip: float | None = Field(
        default=None, gt=0,
        description="Largest Euclidean norm of a step's gradient, for weights and posterior each.",
    )  # fmt: skip
    accumulate: int = Field(default=1, ge=1, description="Batches whose gradients are averaged for one step.")
    patience: int | None = Field(
        default=None, ge=1,
        description="Stop after this many epochs without a better validation objective, counted from the "
        "warm-up or the last removal.",
    )  # fmt: skip
    criterion: _Criterion = Field(
        default="BMRS_N",
        description="What decides about each structure: BMRS_N, BMRS_U:bits=4, SNR, ExpectedScale, WeightNorm, "
        "Random:fraction=0.5. A fit counts the structures that it keeps after each epoch.",
    )
    prior_log_odds: float | None = Field(
        default=None,
        description="Log-odds of removal before seeing data, in nats per structure: 0 is the paper's equation, "
        "0.919 its released code. None: the criterion's own.",
    )
    removal: Literal["end", "epoch"] = Field(
        default="end",
        description="When structures are removed. epoch: after each epoch past the warm-up, from network, posterior "
        "and optimizer, if their score is 0 or more. end: when the network is reduced.",
    )
    min_kept: _Floor = Field(
        default=1,
        description="Least number of structures that every layer keeps; below 1 the share of its original ones, "
        "such as 0.125.",
    )
    freeze_weights: bool = Field(
        default=False,
        description="Fit the posterior alone. Weights and normalisation statistics stay as they are.",
    )
    keep_best: bool = Field(
        default=True,
        description="At one KL weight, end with the parameters of the best epoch after the warm-up and the last "
        "removal: the least validation objective (without validation data, training objective), or without a posterior "
        "the highest validation accuracy. If not given: False for latents without noise layers, whose loss is one "
        "draw's.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of initial weights, split, order of examples and noise."
    )
    precision: Literal["32", "bf16-mixed"] = Field(
        default="32", description="Precision of the network. Noise, KL and evidence are always float64."
    )
    elbo: Literal["auto", "fused", "packed", "pyro"] = Field(
        default="auto",
        description="Implementation of the ELBO. auto: the fastest that model and guide allow.",
    )

    cuda_graph: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Replay a step as one CUDA graph, which spares small networks most of their time. auto: where that "
        "is possible: on one CUDA device, without accumulation, with the fused ELBO.",
    )  # fmt: skip
    compile: bool = Field(
        default=False,
        description="Compile the network by torch.compile for the steps of the fit. The first step then takes up to "
        "minutes.",
    )

    @model_validator(mode="after")
    def _check_criterion(self) -> Self:
        if self.model_fields_set & {"criterion", "prior_log_odds"}:
            self.made_criterion()
        return self

    def changed(self, **changes: Any) -> Self:
        """These settings with others in place of some.

        Another criterion leaves the prior log-odds behind, which belong to the one before.
        """
        given = self.given()
        if "criterion" in changes:
            given.pop("prior_log_odds", None)
        return type(self)(**{**given, **changes})

    def given(self) -> dict[str, Any]:
        """The settings that were given, without the defaults."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }

    def made_criterion(self) -> Criterion:
        """The criterion; made from its name if a name was given."""
        from pyro_bmrs.pruning.criteria import parse_criterion
        from pyro_bmrs.pruning.scoring import check_criterion

        if isinstance(self.criterion, str):
            return parse_criterion(self.criterion, self.prior_log_odds)
        check_criterion(self.criterion)
        own = self.prior_log_odds is None
        allowed = "None beside a criterion that was made: it has its own"
        check(own, "prior_log_odds", allowed, self.prior_log_odds)
        return cast("Criterion", self.criterion)

    def rate_factor(self, done: float) -> float:
        """Factor on the learning rates when a share `done` of the steps is done, from 0 to 1."""
        factor = (SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule)(done)
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"schedule must give finite factors of 0 or more: got {factor!r}")
        return factor * min(done / self.rate_warm_up, 1.0) if self.rate_warm_up else factor

    def kl_factor(self, step: int, steps: int) -> float:
        """Factor on the KL weight at a step, counted from 0, of a fit of `steps` steps."""
        rising = round(self.warm_up * steps)
        return min((step + 1) / rising, 1.0) if rising else 1.0
