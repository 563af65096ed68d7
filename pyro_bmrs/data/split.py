"""Examples in parts, with every class in each part that has room for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.data.arrays import InputForm

# The test part of a set without an official one does not depend on `seed`: runs with several seeds would
# otherwise choose their settings on each other's test examples.
TEST_FRACTION = 0.2
TEST_SEED = 20240601

type Examples = tuple[Tensor, Tensor]  # inputs (N, C, H, W) or (N, F), and labels (N,) or targets (N, T)


@dataclass(frozen=True)
class RawData:
    """Checked data with values as stored: uint8, or float32."""

    train: Examples
    test: Examples
    class_names: tuple[str, ...]  # empty: a regression
    form: InputForm
    validation: Examples | None = None  # if the source has this part
    target_names: tuple[str, ...] = ()  # of a regression
    feature_names: tuple[str, ...] = ()  # of vectors, where they are known

    def chosen(self, labels: Tensor, total: int, seed: int, *, leave: int = 0) -> Tensor:
        """Choose examples at random, (N,) true for those chosen: `stratified` by class, where there are classes."""
        if self.class_names:
            return stratified(labels, total, seed, leave=leave)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        return torch.isin(torch.arange(len(labels)), order[:total])


def split_test(examples: Examples, class_names: tuple[str, ...], form: InputForm, **more: Any) -> RawData:
    """Set a fifth aside for the test, of each class its share, the same for every seed."""
    inputs, labels = examples
    raw = RawData(examples, examples, class_names, form, **more)
    test = raw.chosen(labels, round(len(labels) * TEST_FRACTION), TEST_SEED, leave=1)
    return replace(raw, train=(inputs[~test], labels[~test]), test=(inputs[test], labels[test]))


def stratified(labels: Tensor, total: int, seed: int, *, leave: int = 0) -> Tensor:
    """Choose examples at random, of each class its share of `total`, and one at least.

    >>> labels = torch.tensor([0] * 6 + [1] * 2 + [2])
    >>> labels[stratified(labels, 4, seed=0)]
    tensor([0, 0, 1, 2])
    >>> labels[stratified(labels, 4, seed=0, leave=1)]
    tensor([0, 0, 0, 1])

    Args:
        labels: (N,), from 0.
        total: how many are to be chosen. It is raised to the number of classes that can give one, and lowered to
            what may be chosen.
        seed: of the choice within each class.
        leave: how many of each class are not chosen, at least.

    Returns:
        (N,), true for those that are chosen.
    """
    counts = torch.bincount(labels)
    taken = _shares(counts, total, (counts - leave).clamp(min=0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(taken.tolist()):
        members = (labels == label).nonzero().squeeze(1)
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def _shares(counts: Tensor, total: int, most: Tensor) -> Tensor:
    """Whole numbers near counts·total/N that sum to `total`, by largest remainder; from 1 (or 0) to `most`."""
    least = most.clamp(max=1)
    total = min(max(total, int(least.sum())), int(most.sum()))
    quotas = counts.double() * total / counts.sum()
    taken = quotas.floor().long().clamp(least, most)
    while (missing := total - int(taken.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = taken < most if step > 0 else taken > least
        taken[torch.where(free, (quotas - taken) * step, -torch.inf).argmax()] += step
    return taken
