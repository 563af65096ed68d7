"""What else makes a network smaller, at the same number of parameters and the same total number of epochs.

The peers of a reduction to P parameters after E epochs of fit and F of fine-tuning:

- those in `METHODS`: the network without noise trained for E epochs, pruned by torch-pruning (its own importance
  of that name, global, its own defaults) to about P parameters, fine-tuned for F;
- `scratch`: the very widths of the reduction, trained from new weights for E + F epochs.

All with the recipe's batch size, learning rate and weight decay, Adam, and the epoch of the best validation accuracy,
as the fine-tuning of a reduction has them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from fisher_peers import AT_ONCE, fisher_masks, posterior_damage, squared_gradients
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.data import Dataset
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import load_weights, save_weights
from pyro_bmrs.quality import predictions, quality, temperature, tempered
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "hessian": torch_pruning.importance.GroupHessianImportance,
    "random": torch_pruning.importance.RandomImportance,
}
# Examples whose gradients Taylor's importance adds up.
GRADIENT_EXAMPLES = 1000
# Pruning ratios tried where all is done in one step.
RATIOS = 200
# What can be asked for: the importance, and in how many steps all channels would go. One step is torch-pruning's
# default, many its guide's advice, and much the better at small sizes.
METHODS = {
    "magnitude": ("magnitude", 1),
    "taylor": ("taylor", 1),
    "taylor in steps": ("taylor", 100),
    "hessian": ("hessian", 1),
    "random": ("random", 1),
}
# Ways of others that torch-pruning does not have; see fisher_peers.
OTHERS: dict[str, Callable[[nn.Module, int, Dataset, int], nn.Module]] = {
    "posterior damage": posterior_damage,
    "fisher masks": fisher_masks,
}


def trained(
    recipe: Recipe,
    settings: RunSettings,
    data: Dataset,
    epochs: int,
    widths: tuple[int, ...] | None = None,
    weights: Path | None = None,
) -> nn.Module:
    """The recipe's network without noise, of its own widths or others, after so many epochs.

    Args:
        weights: a file with what an earlier call has trained, or for it.
    """
    options = dict(settings.network or {}) | ({} if widths is None else {"widths": widths})
    net = bmrs.without_noise(recipe.network(data, options, settings.seed))
    if weights is not None and weights.exists():
        net.load_state_dict(load_weights(weights))
        return net.eval()
    tune(net, settings, data, epochs)
    if weights is not None:
        weights.parent.mkdir(exist_ok=True)
        save_weights(net, weights)
    return net.eval()


def tune(net: nn.Module, settings: RunSettings, data: Dataset, epochs: int) -> None:
    """Train in place, as a reduced network is fine-tuned: Adam, cosine, the best epoch on validation data.

    Raises KeyboardInterrupt if it is told to stop: a network that is half trained must get into no table.
    """
    result = bmrs.fit(
        bmrs.Classifier(net), None, data.train, data.validation, epochs=epochs, batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, schedule="cosine",
        seed=settings.seed, progress=False,
    )  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt


def pruned(net: nn.Module, method: str, target: int, data: Dataset, seed: int) -> nn.Module:
    """A copy of the network with about `target` parameters: of all sizes that the method passes, the nearest."""
    if method in OTHERS:
        return OTHERS[method](net, target, data, seed)
    importance, steps = METHODS[method]
    candidates = (
        _at_once(net, importance, data, seed) if steps == 1 else _in_steps(net, importance, steps, data, seed)
    )
    best = net
    for candidate in candidates:
        if _distance(candidate, target) < _distance(best, target):
            best = copy.deepcopy(candidate)
        if steps > 1 and parameters(candidate) <= target:  # those that follow are smaller still
            break
    best.zero_grad(set_to_none=True)
    return best


def _distance(net: nn.Module, target: int) -> float:
    return abs(math.log(parameters(net) / target))


def _at_once(net: nn.Module, importance: str, data: Dataset, seed: int) -> Iterator[nn.Module]:
    """The network pruned in one step, at each of many ratios.

    A layer whose channels all lie below the global bar is left whole by torch-pruning, so that the sizes do not
    fall with the ratio, and none may be near the one asked for.
    """
    net = copy.deepcopy(net)
    _set_gradients(net, importance, data)
    for index in range(1, RATIOS):
        candidate = copy.deepcopy(net)
        for copied, parameter in zip(candidate.parameters(), net.parameters(), strict=True):
            copied.grad = None if parameter.grad is None else parameter.grad.clone()
        _pruner(candidate, importance, index / RATIOS, 1, data, seed).step()
        yield candidate


def _in_steps(net: nn.Module, importance: str, steps: int, data: Dataset, seed: int) -> Iterator[nn.Module]:
    """The network after each of so many steps, before each of which importances are taken anew."""
    net = copy.deepcopy(net)
    pruner = _pruner(net, importance, 1.0, steps, data, seed)
    for _ in range(steps):
        _set_gradients(net, importance, data)
        pruner.step()
        yield net


def _set_gradients(net: nn.Module, importance: str, data: Dataset) -> None:
    x, y = data.train[:GRADIENT_EXAMPLES]
    if importance == "taylor":
        net.zero_grad()
        for some, labels in zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True):
            (cross_entropy(net(some), labels, reduction="sum") / len(x)).backward()
    if importance == "hessian":
        # torch-pruning 1.6.1 reads mean squared gradients from .grad, but its own sum keeps the last example's only
        for name, square in squared_gradients(net, x, y).items():
            net.get_parameter(name).grad = square


def _pruner(net: nn.Module, importance: str, ratio: float, steps: int, data: Dataset, seed: int) -> Any:
    output = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    torch.manual_seed(seed)  # of random importances
    return torch_pruning.BasePruner(
        net, data.train[:1][0], IMPORTANCES[importance](), global_pruning=True, pruning_ratio=ratio,
        iterative_steps=steps, ignored_layers=[output],
    )  # fmt: skip


def widths_of(net: nn.Module) -> tuple[int, ...]:
    """Outputs of each layer with weights but the last, in order."""
    outputs = [
        module.weight.shape[0] for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return tuple(int(width) for width in outputs[:-1])


def measured(net: nn.Module, data: Dataset) -> dict[str, float]:
    """Scores of a plain network: validation accuracy, and test accuracy, NLL and calibration error."""
    model = bmrs.Classifier(net)
    none: Mapping[str, Tensor] = {}
    held_out, seen = (predictions(model, part, none) for part in (data.validation, data.test))
    test = quality(seen)
    return {
        "validation_accuracy": quality(held_out)["accuracy"],
        "accuracy": test["accuracy"],
        "negative_log_likelihood": test["negative_log_likelihood"],
        "expected_calibration_error": test["expected_calibration_error"],
        "calibrated_error": quality(tempered(seen, temperature(held_out)))["expected_calibration_error"],
    }
