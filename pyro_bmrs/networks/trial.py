"""A trace proposes, a trial decides: structures are removed from a copy with random weights, and outputs compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bmrs.networks.copies import copied, fill, is_dense, without_values
from pyro_bmrs.networks.cost import no_fused_layers, parameters
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.examples import exactly
from pyro_bmrs.networks.groups import StructureGroup, cuts_of
from pyro_bmrs.networks.inputs import Inputs, as_double, batch_size, call, map_tensors, repeated
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.surgery import (
    OWN_TOLERANCE,
    TOLERANCE,
    EqualityError,
    check_equal,
    expected,
    fold,
    where_it_fails,
)

# By site: the structures that stay.
type Kept = Mapping[str, Tensor]
_EXAMPLES, _SMALL = 8, 100_000
# A prime, so that rows and columns of a weight differ.
_DRAWN = 8_209


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
        # behind a ReLU a structure may do nothing for two examples; where more cost little, there are more
        some = exactly(network, example, _EXAMPLES) if parameters(network) <= _SMALL else example
        given = map_tensors(lambda tensor: tensor.to(device), some)
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
        error = self._failed(groups, self._tried)
        if error is None:
            return list(groups), {}
        if error.of_all:
            return [], {group.site: error.reason for group in groups}
        good, apart = list(groups), []
        reasons: dict[str, str] = {}
        while error is not None and good:
            suspects = self._suspects(good, error)
            reasons |= {group.site: error.reason for group in suspects}
            apart.append(suspects)
            good = [group for group in good if group not in suspects]
            error = self.error(good) if good else None
        again = [self._fitting(good, group, reasons) for suspects in apart for group in suspects]
        chances = [group for group in again if group is not None]
        # most are right once the others are away: all at once first
        for some in [chances, *([group] for group in chances)]:
            if not some or all(group.site not in reasons for group in some):
                continue
            error = self._failed([*good, *some], self._tried)
            if error is None:
                good += some
                for group in some:
                    reasons.pop(group.site)
            elif len(some) == 1:
                reasons[some[0].site] = error.reason
        order = {group.site: number for number, group in enumerate(groups)}
        return sorted(good, key=lambda group: order[group.site]), reasons

    def _fitting(
        self, good: Sequence[StructureGroup], group: StructureGroup, reasons: dict[str, str]
    ) -> StructureGroup | None:
        """A group that failed with others, as it is or without the integers it changes; None if no shapes fit."""
        for some in (group, replace(group, counts=())) if group.counts else (group,):
            error = self._failed([*good, some], self._shaped)
            if error is None:
                return some
            reasons.setdefault(group.site, error.reason)
        return None

    def error(self, groups: Sequence[StructureGroup]) -> TrialError | None:
        """What goes wrong when a part of each group is removed; None: nothing."""
        return self._failed(groups, self._shaped) or self._failed(groups, self._tried)

    def _failed(
        self,
        groups: Sequence[StructureGroup],
        way: Callable[[Sequence[StructureGroup], Cuts, Kept], TrialError | None],
    ) -> TrialError | None:
        self.generator.manual_seed(0)
        for kept in self._shares(groups):
            error = way(groups, cuts_of(self.network, groups, kept), kept)
            if error is not None:
                return error
        return None

    @cached_property
    def _without_values(self) -> nn.Module | None:
        """The network on the meta device; None if it can't be called there."""
        network = without_values(self.network).eval()
        try:
            with torch.no_grad(), no_fused_layers():
                call(network, self._meta_example)
        except Exception:  # it looks at values
            return None
        return network

    @cached_property
    def _meta_example(self) -> Inputs:
        return map_tensors(lambda tensor: tensor.to("meta"), self._ways[-1][1])

    @torch.no_grad()
    def _shaped(self, groups: Sequence[StructureGroup], cuts: Cuts, kept: Kept) -> TrialError | None:
        """Whether shapes fit. That costs little, so that many groups can be tried one by one."""
        if self._without_values is None:
            return None
        network = copied(self._without_values)
        try:
            cuts.cut(network)
            with where_it_fails(network), no_fused_layers():
                call(network, self._meta_example)
        except (EqualityError, ValueError) as error:
            return TrialError(getattr(error, "path", ""), str(error))
        return None

    def _shares(self, groups: Sequence[StructureGroup]) -> Iterator[dict[str, Tensor]]:
        """What to keep of each group. Groups of equal size lose different numbers, in two rounds if there are many."""
        alike: dict[int, list[StructureGroup]] = {}
        for group in groups:
            alike.setdefault(group.features, []).append(group)
        counts: list[dict[str, int]] = [{}, {}]
        again = False
        for features, some in alike.items():
            # not down to one, which broadcasts; where that leaves few choices some lose nothing in the first round
            if features < 5:
                choices = [*range(2, features + 1)] if features > 2 else [1, 2]
                again |= len(some) > 1
            else:
                choices = [n for n in range(2, features - 1) if features < 9 or 0.2 <= n / features <= 0.8]
            start = int(torch.randint(len(choices), (), generator=self.generator)) if features > 4 else 0
            for place, group in enumerate(some):
                for number in range(2):
                    counts[number][group.site] = choices[(start + place + number) % len(choices)]
        for number in range(1 + again):
            kept = {}
            for group in groups:
                order = torch.randperm(group.features, generator=self.generator)
                if (
                    group.features > 4
                ):  # without the first and the last all others stand elsewhere from either end
                    ends = (order == 0) | (order == group.features - 1)
                    order = torch.cat([order[~ends], order[ends]])
                kept[group.site] = torch.zeros(group.features, dtype=torch.bool)
                kept[group.site][order[: counts[number][group.site]]] = True
            for inner, outers in Nesting.of(groups).owners.items():
                for outer, owner in outers.items():
                    # of a structure that stays some part inside must stay, or there is nothing to compare
                    kept[inner] |= owner == int(torch.nonzero(kept[outer])[0])
            yield kept

    @torch.no_grad()
    def _tried(self, groups: Sequence[StructureGroup], cuts: Cuts, kept: Kept) -> TrialError | None:
        scales = {
            group.site: (0.5 + torch.rand(group.features, generator=self.generator, dtype=torch.float64))
            * kept[group.site]
            for group in groups
        }
        while True:
            double, example = self._ways[0]
            try:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    network = self._varied(example)
                if double:
                    network, example = network.double(), as_double(example)
                fold(network, groups, scales)
                wanted = expected(network, {}, example, groups, cuts)
            except Exception as error:
                if len(self._ways) == 1:
                    return TrialError(
                        "", f"can't be tried: with random weights the network fails with {error}", of_all=True
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
        for parameter in network.parameters():
            # of variance one; of a large one a part, again and again: to draw all takes as long as a pass
            few = parameter.numel() <= _DRAWN or not is_dense(parameter)
            drawn = parameter if few else parameter.new_empty(_DRAWN)
            drawn.uniform_(-(3**0.5), 3**0.5)
            if not few:
                fill(parameter, drawn)
            if parameter.dim() > 1:
                parameter.mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.mul_(0.5).add_(0.5)
        normalisations = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        network.eval()
        for module in normalisations:
            if module.track_running_stats:
                module.reset_running_stats()
                module.momentum = None
                module.train()
        if normalisations:
            # one value per channel has no variance
            call(network, repeated(example, 2) if batch_size(example) == 1 else example)
        return network.eval()

    def _suspects(self, groups: Sequence[StructureGroup], error: TrialError) -> list[StructureGroup]:
        """The groups that touch the place of an error, or the nearest module around it, and those alike; or half."""
        place = error.path
        while place:
            found = [group for group in groups if any(_is_below(path, place) for path in _paths(group))]
            if found:
                kinds = {self._likeness(group) for group in found}
                alike = [group for group in groups if group in found or self._likeness(group) in kinds]
                return alike if len(alike) < len(groups) or len(groups) == 1 else found
            place = place.rpartition(".")[0]
        return list(groups[len(groups) // 2 :])

    def _likeness(self, group: StructureGroup) -> tuple[Any, ...]:
        """What blocks of the same kind have in common."""
        members = {
            (type(self.network.get_submodule(m.path)), m.path.split(".")[-1], m.name, m.dim)
            for m in group.members
        }
        return group.kind, frozenset(members)


class TrialError:
    """How a trial failed: path of the module, the reason in words, and whether it is the same for any groups."""

    def __init__(self, path: str, reason: str, *, of_all: bool = False) -> None:
        self.path, self.reason, self.of_all = path, reason, of_all


def _paths(group: StructureGroup) -> set[str]:
    counting = {count.path for count in group.counts}
    return counting | {path for member in group.consumers for path in (member.path, member.read_by)}


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")
