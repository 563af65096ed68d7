"""AdamW for a fit: its groups of parameters, its rates, and its state as tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.fitting.settings import Settings


def make_optimizer(
    model: nn.Module, guide: Callable[..., Any] | None, settings: Settings
) -> torch.optim.Optimizer:
    """AdamW with up to three groups: weights, what the model holds beside its layers, and the posterior.

    Raises:
        ValueError: if no parameter requires a gradient.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    weights = [p for p in model.parameters() if p.requires_grad and not settings.freeze_weights]
    # A parameter of the model itself, such as a Regressor's noise scale, is no weight.
    beside = set(model.parameters(recurse=False))
    own = set(model.parameters())  # model and guide may be methods of one module
    posterior = [p for p in guide.parameters() if p not in own] if isinstance(guide, nn.Module) else []
    parts = (
        ("others", [p for p in weights if p in beside], rate, 0.0),
        ("weights", [p for p in weights if p not in beside], rate, decay),
        ("posterior", posterior, settings.posterior_learning_rate, 0.0),
    )
    groups: list[dict[str, Any]] = [
        {"of": of, "params": parameters, "lr": lr, "given_lr": lr, "weight_decay": weight_decay}
        for of, parameters, lr, weight_decay in parts
        if parameters
    ]
    if not groups:
        raise ValueError("there is nothing to fit: no parameter requires a gradient")
    # a CUDA graph reads its rates from tensors
    on_cuda = groups[0]["params"][0].device.type == "cuda"
    if on_cuda:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
    return torch.optim.AdamW(groups, fused=True, capturable=on_cuda)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the given learning rate of each group by a factor."""
    for group in optimizer.param_groups:
        rate = group["given_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def step(optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    """One step. `clip` bounds the norm of the model's gradient and of the posterior's, each by itself."""
    if clip is not None:
        for of in (("others", "weights"), ("posterior",)):
            groups = [group for group in optimizer.param_groups if group["of"] in of]
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, by the number of the parameter."""
    return {
        f"optimizer.{number}.{name}": value.detach()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: if the state belongs to other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, *rest = key.split(".", 2)
        if kind == "optimizer":
            state.setdefault(int(rest[0]), {})[rest[1]] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        if index >= len(parameters) or values["exp_avg"].shape != parameters[index].shape:
            raise ValueError(f"its optimiser has other parameters (number {index})")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
