"""A trace proposes, a trial decides: structures are removed from a copy with random weights, and outputs compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.examples import exactly
from pyro_bmrs.networks.groups import StructureGroup, cuts_of
from pyro_bmrs.networks.inputs import Inputs, as_double, call, map_tensors
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.surgery import OWN_TOLERANCE, TOLERANCE, EqualityError, check_equal, expected, fold

_EXAMPLES = 2
# The period of random weights: to fill memory with copies is faster than to draw every number.
_PERIOD = 1_000_003


class Trial:
    """Removes parts of groups from a copy of a network. There is one copy, in float64, at a time.

    Args:
        network: without noise; not changed.
        example: what it can be called with.
    """

    def __init__(self, network: nn.Module, example: Inputs) -> None:
        self.network = network
        self.generator = torch.Generator().manual_seed(0)
        device = next(network.parameters()).device
        given = map_tensors(lambda tensor: tensor.to(device), exactly(network, example, _EXAMPLES))
        drawn = torch.randn(_PERIOD, generator=self.generator)
        self._numbers = torch.cat([drawn, drawn]).to(device)
        # the network may not accept all numbers, as a logarithm does not, nor float64, as some kernels do not
        drawn = map_tensors(self._drawn_like, given)
        self._ways = [(True, drawn), (True, given), (False, drawn), (False, given)]

    def _drawn_like(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        drawn = torch.randn(tensor.shape, generator=self.generator)
        return drawn.to(tensor.device, tensor.dtype)

    def failures(self, groups: Sequence[StructureGroup]) -> tuple[list[StructureGroup], dict[str, str]]:
        """(the groups that can be removed, by site of each other one how the function changes)."""
        good, apart = list(groups), []
        reasons: dict[str, str] = {}
        while good:
            error = self.error(good)
            if error is None:
                break
            suspects = _suspects(good, error) or _half(good)
            reasons |= {group.site: error.reason for group in suspects}
            apart.append(suspects)
            good = [group for group in good if group not in suspects]
        for suspects in apart:
            for again in _second_chances(suspects):
                error = self.error([*good, *again])
                if error is None:
                    good += again
                    for group in again:
                        reasons.pop(group.site, None)
                else:
                    reasons |= {group.site: error.reason for group in again if group.site in reasons}
        order = {group.site: number for number, group in enumerate(groups)}
        return sorted(good, key=lambda group: order[group.site]), reasons

    def error(self, groups: Sequence[StructureGroup]) -> TrialError | None:
        """What goes wrong when a part of each group is removed; None: nothing."""
        for kept in self._shares(groups):
            error = self._tried(groups, kept)
            if error is not None:
                return error
        return None

    def _shares(self, groups: Sequence[StructureGroup]) -> Iterator[dict[str, Tensor]]:
        """What to keep of each group. Groups of equal size lose different numbers, in two rounds if there are many."""
        alike: dict[int, list[StructureGroup]] = {}
        for group in groups:
            alike.setdefault(group.features, []).append(group)
        counts: list[dict[str, int]] = [{}, {}]
        again = False
        for features, some in alike.items():
            possible = torch.arange(1 if features < 5 else 2, features)
            if len(possible) > 6:  # a part that is neither most nor next to nothing
                possible = possible[(possible >= 0.2 * features) & (possible <= 0.8 * features)]
            for number in range(2):
                order = possible[torch.randperm(len(possible), generator=self.generator)]
                for place, group in enumerate(some):
                    counts[number][group.site] = int(
                        order[(place + number * (place // len(order))) % len(order)]
                    )
            again |= len(some) > 1 and len(possible) < 3
        for number in range(1 + again):
            kept = {}
            for group in groups:
                order = torch.randperm(group.features, generator=self.generator)
                kept[group.site] = torch.ones(group.features, dtype=torch.bool)
                kept[group.site][order[counts[number][group.site] :]] = False
            for inner, outers in Nesting.of(groups).owners.items():
                for outer, owner in outers.items():
                    # of a structure that stays some part inside must stay, or there is nothing to compare
                    kept[inner] |= owner == int(torch.nonzero(kept[outer])[0])
            yield kept

    @torch.no_grad()
    def _tried(self, groups: Sequence[StructureGroup], kept: dict[str, Tensor]) -> TrialError | None:
        scales = {
            group.site: (0.5 + torch.rand(group.features, generator=self.generator, dtype=torch.float64))
            * kept[group.site]
            for group in groups
        }
        cuts = cuts_of(self.network, groups, kept)
        while True:
            double, example = self._ways[0]
            try:
                network = self._varied(example)
                if double:
                    network, example = network.double(), as_double(example)
                fold(network, groups, scales)
                wanted = expected(network, {}, example, groups, cuts)
            except Exception as error:
                if len(self._ways) == 1:
                    return TrialError(
                        "", f"can't be tried: with random weights the network fails with {error}"
                    )
                self._ways.pop(0)
            else:
                break
        try:
            cuts.cut(network)
            check_equal(network, wanted, example, tolerance=TOLERANCE if double else OWN_TOLERANCE)
        except (EqualityError, ValueError) as error:  # ValueError: cuts that do not fit together
            return TrialError(getattr(error, "path", ""), str(error))
        return None

    def _varied(self, example: Inputs) -> nn.Module:
        """A copy with random weights, so that every output depends on every structure, and BatchNorm to match."""
        network = copied(self.network)
        for start, parameter in enumerate(network.parameters()):
            size = parameter.numel()
            numbers = self._numbers[7919 * start % _PERIOD :][:_PERIOD]
            drawn = numbers[:size] if size <= _PERIOD else numbers.repeat(-(-size // _PERIOD))[:size]
            drawn = drawn.view(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(drawn).mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(drawn).mul_(0.5).add_(0.5)
        normalisations = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        network.eval()
        for module in normalisations:
            if module.track_running_stats:
                module.reset_running_stats()
                module.momentum = None
                module.train()
        if normalisations:
            call(network, example)
        return network.eval()


class TrialError:
    """How a trial failed: path of the module, and the reason in words."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason


def _suspects(groups: Sequence[StructureGroup], error: TrialError) -> list[StructureGroup]:
    """The groups that touch the place of an error, or the nearest module around it that some touch."""
    place = error.path
    while place:
        found = [group for group in groups if any(_is_below(path, place) for path in _paths(group))]
        if found:
            return found if len(found) < len(groups) or len(groups) == 1 else []
        place = place.rpartition(".")[0]
    return []


def _paths(group: StructureGroup) -> set[str]:
    counting = {count.path for count in group.counts}
    return counting | {path for member in group.consumers for path in (member.path, member.read_by)}


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def _half(groups: list[StructureGroup]) -> list[StructureGroup]:
    return groups[len(groups) // 2 :]


def _second_chances(suspects: list[StructureGroup]) -> Iterator[list[StructureGroup]]:
    """What to try again of groups that failed together: each half, and one by one; and without the integers changed."""
    if len(suspects) > 1:
        if len(suspects) > 4:
            yield suspects[: len(suspects) // 2]
        for group in suspects:
            yield [group]
    for group in suspects:
        if group.counts:
            yield [replace(group, counts=())]
