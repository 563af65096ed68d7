"""Two ways to prune a trained network by diagonal curvature, written anew from the formulas of their papers.

- `posterior_damage`: SpaM's importance (Dhahri et al., 2024), the diagonal Laplace posterior's precision times the
  squared weight, Σ (N F_kk + δ) w_k² over all weights that leave with a structure. F is the diagonal of the Fisher
  matrix, labels drawn from the model; δ of each tensor maximises its diagonal marginal likelihood.
- `fisher_masks`: Kwon et al. (2022), a fast framework for post-training pruning. F is the empirical Fisher matrix of
  masks at 1. Masks of the smallest F_uu per parameter go first; then each layer swaps masks by its block of F, one
  pass; then what reads the structures that stay is scaled, by least squares towards the full network's outputs of
  that layer, unless a scale leaves [-10, 10].

Both act on the structures that `insert_noise` finds, but those inside of others, and leave one in each group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.data import Dataset
from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.groups import StructureGroup, after, cuts_of
from pyro_bmrs.networks.matrices import as_matrix, as_weight, input_dim, input_rows, is_matrix, output_rows
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import drawn_together
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.sizes import Sizes

# Examples: of the Fisher matrix, at a time, and of the least squares.
FISHER, AT_ONCE, FITTED = 2000, 50, 1000
# Least and largest scale.
LIMIT = 10.0


class _Masks:
    """The structures of a network, and what is left of it without some of them."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.noisy = bmrs.insert_noise(copied(network).eval(), example)
        self.binding = Binding(self.noisy, lambda: example)
        every = list(self.binding.groups.values())
        inner = Nesting.of(every).owners
        self.every, self.example = every, example
        self.groups = [group for group in every if group.site not in inner]
        self.first = torch.tensor([0, *(group.features for group in self.groups)]).cumsum(0)

    def kept(self, stays: Tensor) -> dict[str, Tensor]:
        """By site, from True or False for each structure of all groups, one behind the other."""
        found = {group.site: torch.ones(group.features, dtype=torch.bool) for group in self.every}
        found |= {
            group.site: stays[start : start + group.features]
            for group, start in zip(self.groups, self.first[:-1].tolist(), strict=True)
        }
        return found

    def left(self, stays: Tensor) -> int:
        return self.binding.parameters_left(self.kept(stays))

    def cheapest(self, scores: Tensor, target: int) -> Tensor:
        """Which stay when structures go by ascending score until about `target` parameters are left."""
        safe = scores.clone()
        for start, end in zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True):
            safe[start + int(scores[start:end].argmax())] = math.inf  # the last one of a group
        order = safe.argsort()

        def without(count: int) -> Tensor:
            stays = torch.ones(len(safe), dtype=torch.bool)
            stays[order[:count]] = False
            return stays

        low, high = 0, int(safe.isfinite().sum())
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.left(without(middle)) > target else (low, middle)
        return min(map(without, (low, high)), key=lambda stays: abs(math.log(self.left(stays) / target)))

    def removed(self, stays: Tensor) -> tuple[nn.Module, list[StructureGroup]]:
        """The smaller network and the groups in it."""
        kept = self.kept(stays)
        ones = {site: torch.ones(len(some), dtype=torch.float64) for site, some in kept.items()}
        found = remove_structures(self.noisy, kept, ones, self.example)
        return found.network.eval(), after(self.every, kept, found.cuts)


def posterior_damage(network: nn.Module, target: int, data: Dataset, seed: int) -> nn.Module:
    """The network with about `target` parameters, by SpaM's importance."""
    masks = _Masks(network, data.train[:8][0])
    plain = copied(network).eval()
    weights = dict(plain.named_parameters())
    torch.manual_seed(seed)  # of the labels
    squares = squared_gradients(plain, data.train[:FISHER][0])
    damage = {}
    for name, weight in weights.items():
        precise, squared = len(data.train) * squares[name].double(), weight.detach().double().square()
        delta = 1.0
        for _ in range(50):
            delta = float((precise / (precise + delta)).sum() / squared.sum().clamp(min=1e-12))
        damage[name] = (precise + delta) * squared
    scores = []
    for group in masks.groups:
        score = torch.zeros(group.features, dtype=torch.float64)
        for member in group.members:
            name = f"{member.path}.{member.name}" if member.path else member.name
            if name in damage and member.role != "selection":
                own = damage[name].movedim(member.dim, 0)
                own = own.reshape(len(own), -1).sum(1)
                score.index_add_(0, member.units, own[member.indices])
        scores.append(score)
    return masks.removed(masks.cheapest(torch.cat(scores), target))[0]


def squared_gradients(net: nn.Module, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """By parameter: the mean over examples of the squared gradient of −log p(y | x); y drawn from the model if None."""
    total = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
    with in_mode(net, training=False):
        if y is None:
            with torch.no_grad():
                y = torch.cat(
                    [torch.multinomial(net(some).softmax(-1), 1).flatten() for some in x.split(AT_ONCE)]
                )
        for one, label in zip(x.split(1), y.split(1), strict=True):
            net.zero_grad()
            cross_entropy(net(one), label).backward()
            for name, weight in net.named_parameters():
                if weight.grad is not None:
                    total[name] += weight.grad.square() / len(x)
    net.zero_grad()
    return total


def fisher_masks(network: nn.Module, target: int, data: Dataset, seed: int) -> nn.Module:
    """The network with about `target` parameters, by Kwon et al.'s search, rearrangement and scales."""
    masks = _Masks(network, data.train[:8][0])
    gradients = _mask_gradients(masks, data)
    sizes = Sizes(masks.noisy, masks.groups)
    frees = torch.cat([sizes.freed(group.site).expand(group.features) for group in masks.groups])
    importance = torch.cat([some.square().mean(0) for some in gradients])
    stays = masks.cheapest(importance / frees.clamp(min=1), target)
    for start, end, some in zip(masks.first[:-1].tolist(), masks.first[1:].tolist(), gradients, strict=True):
        stays[start:end] = _rearranged(stays[start:end], some.mT @ some)
    small, groups = masks.removed(stays)
    _scale(small, groups, network, masks, stays, data)
    return small


def _mask_gradients(masks: _Masks, data: Dataset) -> list[Tensor]:
    """By group: the gradient of each example's loss by each mask at 1. Shape: (examples, structures)."""
    found: dict[str, list[Tensor]] = {}
    for x, y in zip(*(some.split(AT_ONCE) for some in data.train[:FISHER]), strict=True):
        values = {group.site: torch.ones(len(x), group.features, requires_grad=True) for group in masks.every}
        with drawn_together(values, len(x)):
            cross_entropy(masks.noisy(x), y, reduction="sum").backward()
        for site, value in values.items():
            assert value.grad is not None
            found.setdefault(site, []).append(value.grad)
    return [torch.cat(found[group.site]).double() for group in masks.groups]


def _rearranged(stays: Tensor, fisher: Tensor) -> Tensor:
    """One pass over the structures that go: each gives way to the one with which Σ F over all pairs is least."""
    gone = torch.nonzero(~stays).flatten().tolist()
    for structure in list(gone):
        gone.remove(structure)
        cost = fisher.diagonal() + 2 * fisher[:, gone].sum(1)
        cost[gone] = math.inf
        gone.append(int(cost.argmin()))
    found = torch.ones_like(stays)
    found[gone] = False
    return found


@torch.no_grad()
def _scale(
    small: nn.Module,
    groups: Sequence[StructureGroup],
    full: nn.Module,
    masks: _Masks,
    stays: Tensor,
    data: Dataset,
) -> None:
    """Scale what layers read of the structures that stay, in the order of the forward pass, in place."""
    x = data.train[:FITTED][0]
    cuts, plain, outputs = cuts_of(masks.noisy, masks.every, masks.kept(stays)), copied(full).eval(), {}
    separate_attention(plain)  # fused attention calls none of its layers
    readers: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups:
        for member in group.consumers:
            module = small.get_submodule(member.path)
            if is_matrix(module) and member.name == "weight" and member.dim == input_dim(module):
                readers.setdefault(member.path, (member.indices, member.units))

    def keep(path: str) -> Any:
        def hook(module: nn.Module, _: Any, y: Tensor) -> None:
            rows = output_rows(module, y)
            left = cuts.tensors.get(f"{path}.weight", {}).get(1 - input_dim(module))
            outputs[path] = rows if left is None or len(rows) > 1 else rows[:, :, left]

        return hook

    handles = [plain.get_submodule(path).register_forward_hook(keep(path)) for path in readers]
    plain(x)

    def solve(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            indices, units = readers[path]
            weight = module.get_parameter("weight")
            matrix, rows = as_matrix(module, weight).double(), input_rows(module, arguments[0]).double()
            target = outputs[path].double()
            if len(matrix) > 1 or target.shape[-1] != matrix.shape[1]:
                return
            if module.bias is not None:  # type: ignore[union-attr]
                target = target - module.bias.double()  # type: ignore[operator, union-attr]
            # of each column: its structure
            channels = torch.zeros(weight.shape[input_dim(module)], dtype=torch.long)
            channels[indices] = units
            columns = channels.repeat_interleave(matrix.shape[2] // len(channels))
            count = int(columns.max()) + 1
            products = (rows.mT @ rows)[0] * (matrix.mT @ matrix)[0]
            gram = torch.zeros(count, len(columns), dtype=torch.float64).index_add_(0, columns, products)
            gram = torch.zeros(count, count, dtype=torch.float64).index_add_(1, columns, gram)
            shared = ((target.mT @ rows) * matrix)[0].sum(0)
            right = torch.zeros(count, dtype=torch.float64).index_add_(0, columns, shared)
            scales = torch.linalg.lstsq(gram, right.unsqueeze(-1), driver="gelsd").solution.flatten()
            if bool((scales.abs() <= LIMIT).all()):
                weight.copy_(as_weight(module, matrix * scales[columns]))

        return hook

    handles += [small.get_submodule(path).register_forward_pre_hook(solve(path)) for path in readers]
    small(x)
    for handle in handles:
        handle.remove()
