"""The evidence along a path of removals, with the rise of the loss as it is measured at some of its places."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.evidence.kronecker import KroneckerCurvature, Spectrum, log_marginal_likelihood
from pyro_bmrs.inference.evaluate import standard_error
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.cuts import Cuts, joined
from pyro_bmrs.networks.inputs import Inputs, batch_size, taken, tensors_of
from pyro_bmrs.networks.matrices import as_weight, input_dim, positions_of, together
from pyro_bmrs.pruning.layer_states import reduced_weights
from pyro_bmrs.pruning.removal_path import Step, Touched

if TYPE_CHECKING:
    from pyro_bmrs.pruning.network_plan import NetworkPlan

PATH_COLUMNS = [
    "layer", "unit", "outgoing", "incoming", "loss_rise", "freed", "parameters", "total_loss_rise",
    "measured_loss_rise", "measured_loss_error", "total_evidence_change",
]  # fmt: skip
# Places of a path where the evidence is computed: so many at most, and multiplications for all; and shares of the
# parameters at which the loss is measured, every other one of large networks.
_PLACES, _WORK = 100, 2.5e10
_MEASURED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98)
# Parts of the examples, whose losses tell how far chance goes.
_PARTS = 40


class _State:
    """What is away, layer by layer, along a path."""

    def __init__(self, curvatures: Mapping[str, KroneckerCurvature]) -> None:
        def none(one: KroneckerCurvature, shape: Any) -> Tensor:
            return torch.zeros(shape, dtype=torch.bool, device=one.weights.device)

        self.inputs = {path: none(one, one.shape[2]) for path, one in curvatures.items()}
        self.outputs = {path: none(one, one.shape[:2]) for path, one in curvatures.items()}

    def remove(self, parts: Touched, structure: int) -> set[str]:
        """Take a structure away. Returns the layers that have changed."""
        for part in parts.reads:
            self.inputs[part.path][part.places[structure]] = True
        for part in parts.brings:
            self.outputs[part.path].view(-1)[part.places[structure]] = True
        return {part.path for part in (*parts.reads, *parts.brings)}

    def spectrum(self, curvatures: Mapping[str, KroneckerCurvature], paths: Sequence[str]) -> Spectrum:
        """Of what is left of some layers, with the weights that take over what they can."""
        several = []
        for path in paths:
            one, inputs, outputs = curvatures[path], self.inputs[path], self.outputs[path]
            several.append(Spectrum.without(one, reduced_weights(one, inputs), inputs, outputs))
        return Spectrum.together(several)


@torch.no_grad()
def evidence_path(
    plan: NetworkPlan,
    guide: AutoKroneckerLaplace,
    steps: Sequence[Step],
    parts: Mapping[str, Touched],
) -> pd.DataFrame:
    """The path as a table: see `LaplacePlan`.

    ΔF is the difference of two Laplace approximations of log p(data), of the smaller network and of the full one, each
    at its own weights and prior precisions, with the curvature of the full one. The rise of the loss is the predicted
    one, times what the measured one is of it at the nearest places where that is known: second order and layers apart
    are not all that happens where much is removed.
    """
    assert guide.shown is not None
    shown, before = guide.shown, parameters(guide.model.net)
    table = pd.DataFrame(
        {
            "layer": [step.site for step in steps],
            "unit": [step.structure for step in steps],
            "loss_rise": [step.loss for step in steps],
            "freed": [step.freed for step in steps],
            "parameters": before - np.cumsum([step.freed for step in steps]),
            "total_loss_rise": np.cumsum([step.loss for step in steps]),
        },
        columns=PATH_COLUMNS,
    )
    if not steps:
        return table
    numbers = table.parameters.to_numpy()
    work = sum(
        blocks * (inputs**3 + outputs**3)
        for blocks, outputs, inputs in (one.shape for one in guide.curvatures.values())
    )
    looked_at = {
        1 + int(np.argmax(numbers <= (1 - share) * before))
        for share in (_MEASURED if work < _WORK else _MEASURED[1::2])
        if numbers[-1] <= (1 - share) * before
    }
    count = min(max(int(_WORK // work), 1), _PLACES, len(steps))
    places = {*np.linspace(1, len(steps), count).round().astype(int).tolist(), *looked_at}
    state, changed = _State(guide.curvatures), set[str]()
    # layers of one δ
    sets = [tuple(guide.curvatures)] if guide.shared_prior else [(path,) for path in guide.curvatures]
    of_full = {
        paths: sum(log_marginal_likelihood(guide.curvatures[path], guide.deltas[path]) for path in paths)
        for paths in sets
    }
    change = dict.fromkeys(sets, 0.0)
    rest = np.full(len(steps), np.nan)
    measured, error = np.full((2, len(steps)), np.nan)
    full = _losses(reduced_model(Cuts(), guide), shown)
    for number, step in enumerate(steps, 1):
        changed |= state.remove(parts[step.site], step.structure)
        if number in places:
            for paths in sets:
                if changed & {*paths}:
                    left = state.spectrum(guide.curvatures, paths)
                    change[paths] = left.log_marginal_likelihood(left.prior_precision()) - of_full[paths]
            changed.clear()
            rest[number - 1] = sum(change.values())
        if number in looked_at:
            smaller = reduced_model(plan.at(-float(number)).cuts, guide)
            rise = (_losses(smaller, shown) - full) * guide.dataset_size
            measured[number - 1], error[number - 1] = float(rise.mean()), standard_error(rise)
    table["measured_loss_rise"], table["measured_loss_error"] = measured, error
    table["total_evidence_change"] = rest - table.total_loss_rise * _times(
        table.total_loss_rise.to_numpy(), measured
    )
    return table


def _times(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """What the measured rise is of the predicted one, at least 1, between places where it is known by interpolation."""
    known = np.flatnonzero(~np.isnan(measured))
    if not len(known):
        return np.ones_like(predicted)
    ratio = np.maximum(measured[known] / np.maximum(predicted[known], 1e-12), 1.0)
    between: np.ndarray = np.interp(np.arange(len(predicted)), known, np.log(ratio))
    return np.exp(between)


def reduced_model(cuts: Cuts | None, guide: AutoKroneckerLaplace) -> Likelihood:
    """The model with the smaller network in it, with the weights of the reduced posterior."""
    assert cuts is not None
    small = copied(guide.model.net)
    separate_attention(small)
    cuts.cut(small)
    take_over(small, guide, cuts)
    model = copy.copy(guide.model)
    model._modules = {**model._modules, "net": small.eval()}
    model.weight_priors = {}
    return model


def _losses(model: Likelihood, shown: tuple[Inputs, Any]) -> Tensor:
    """−log p(y | x) of an example on average, in nats, in each of some equal parts of the examples. Shape: (parts,).

    Where something else than examples comes first in a tensor, such as time, there is one part.
    """
    x, y = shown
    count = batch_size(y)
    apart = all(len(tensor) == count for tensor in tensors_of((x, y)) if tensor.dim())
    size = count // min(_PARTS, count // 2) if apart and count > 1 else count
    parts = [slice(start, start + size) for start in range(0, count - size + 1, size)]
    with untouched(model):
        sums = [model.log_likelihood(taken(x, part, count), taken(y, part, count)) for part in parts]
        return -torch.stack(sums).cpu().double() / size


@torch.no_grad()
def take_over(small: nn.Module, guide: AutoKroneckerLaplace, cuts: Cuts) -> None:
    """Give layers of a smaller network that read structures, and their biases, the means of the reduced posterior."""
    for path, curvature in guide.curvatures.items():
        module = guide.layer(path)
        dims = cuts.tensors.get(joined(path, "weight"), {})
        left = dims.get(input_dim(module))
        if left is None:
            continue
        channels = torch.ones(module.get_parameter("weight").shape[input_dim(module)], dtype=torch.bool)
        channels[left] = False
        away = channels.to(curvature.weights.device)
        wide = curvature.positions is not None
        own = reduced_weights(curvature, away if wide else away.repeat_interleave(positions_of(module)))
        weight = as_weight(module, together(own) if wide else own)
        for dim, kept in dims.items():
            weight = weight.index_select(dim, torch.tensor(kept, device=weight.device))
        target = small.get_submodule(path)
        target.get_parameter("weight").copy_(weight)
        if curvature.mean is not None:
            change = (curvature.weights - own).flatten(2) @ curvature.mean.flatten(1).unsqueeze(-1)
            rows, bias = cuts.tensors.get(joined(path, "bias"), {}).get(0), target.get_parameter("bias")
            constant = change.flatten() if rows is None else change.flatten()[rows]
            bias.add_(constant.to(bias.device))
