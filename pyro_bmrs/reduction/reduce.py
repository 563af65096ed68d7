"""From a posterior to a plan, and from a plan to a smaller network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor, nn

from pyro_bmrs.files import refuse_newer, write_atomically
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal, elementary, read_posterior
from pyro_bmrs.networks.cost import compare_costs
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.noise import FixedScales, network_of, noise_layers, without_noise
from pyro_bmrs.networks.structures import StructureGroup, structure_groups, weight_of
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.reduction.criteria import Criterion, EvidenceCriterion, LayerStructures, check_criterion

FORMAT, VERSION = "pyro_bmrs.reduction", 1
# Enough examples for outputs to spread in the equality check, few enough for float64.
CHECK_EXAMPLES = 32


class NonFiniteScoreError(ArithmeticError):
    """A structure's score is NaN or infinite, so nothing can be said about it; it is never removed."""


@dataclass
class Reduction:
    """A plan: which structures stay, which go, and why.

    Attributes:
        table: one row per structure: layer, unit (index in the original network), loc and scale (of log θ),
            mean (E[θ]), snr, score (in the criterion's unit; ≥ 0: remove), log_evidence_change (ΔF in nats,
            NaN for criteria without evidence), kl_weight (of the fit: ΔF is the evidence of the model with
            likelihood p(y|θ)^(1/kl_weight)), removed, removed_in_fit (by the fit, before this plan).
        criterion: what decided, printed.
        kl_weight: of the fit.
        min_kept: structures that every layer keeps at least.
        costs: after `apply`, rows parameters, multiply_accumulates, latency_milliseconds and columns
            before, after.
    """

    table: pd.DataFrame
    criterion: str
    kl_weight: float = 1.0
    min_kept: int = 1
    costs: pd.DataFrame | None = None
    _network: nn.Module | None = field(default=None, repr=False)
    _find_input: Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def layers(self) -> list[str]:
        """Layer names, in the order of the network."""
        return list(dict.fromkeys(self.table.layer))

    @property
    def kept(self) -> dict[str, list[int]]:
        """Per layer the indices, in the original network, of the structures that stay."""
        rows = self.table[~self.table.removed]
        return {layer: rows.unit[rows.layer == layer].tolist() for layer in self.layers}

    def kept_mask(self, layer: str) -> Tensor:
        """True where a structure of `layer` stays. Shape: (features,)."""
        return torch.tensor((~self.table.removed[self.table.layer == layer]).to_numpy())

    def scales(self) -> dict[str, Tensor]:
        """E[θ] of each kept structure and 0 of each removed one, by layer, float64."""
        means = self.table["mean"].where(~self.table.removed, 0.0)
        return {layer: torch.tensor(means[self.table.layer == layer].to_numpy()) for layer in self.layers}

    def widths(self) -> pd.DataFrame:
        """Structures per layer: columns layer, before, after."""
        counts = self.table.groupby("layer", sort=False).removed.agg(["size", "sum"])
        return pd.DataFrame(
            {
                "layer": counts.index,
                "before": counts["size"].to_numpy(),
                "after": (counts["size"] - counts["sum"]).to_numpy(),
            }
        )

    def bound_to(self, network: nn.Module, find_input: Callable[[], Tensor]) -> Reduction:
        """This plan with a network to apply it to and a way to an example input, as `load` can't know them."""
        return replace(self, _network=network, _find_input=find_input)

    def at(self, threshold: float) -> Reduction:
        """The plan that removes where score ≥ threshold, and what the fit had removed before."""
        frames = []
        for _, rows in self.table.groupby("layer", sort=False):
            score = torch.tensor(rows.score.to_numpy())
            before = torch.tensor(rows.removed_in_fit.to_numpy())
            removed = _with_floor((score >= threshold) | before, score, ~before, self.min_kept)
            frames.append(rows.assign(removed=removed.numpy()))
        return replace(
            self, table=pd.concat(frames), criterion=f"{self.criterion} at {threshold:g}", costs=None
        )

    def summary(self) -> str:
        """A few lines for people: widths, costs once `apply` has measured them, and cautions."""
        widths = self.widths()
        before, after = int(widths.before.sum()), int(widths.after.sum())
        lines = [f"{self.criterion} keeps {after} of {before} structures"]
        lines += [f"  {row.layer}: {row.before} → {row.after}" for row in widths.itertuples()]
        if self.costs is not None:
            for name, label in (
                ("parameters", "parameters"),
                ("multiply_accumulates", "multiply-accumulates"),
                ("latency_milliseconds", "milliseconds a batch"),
            ):
                old, new = (float(self.costs[column][name]) for column in ("before", "after"))
                digits = ",.3f" if name == "latency_milliseconds" else ",.0f"
                change = 100 * (1 - new / old)
                word = "less" if change >= 0 else "more"
                lines.append(f"  {label}: {old:{digits}} → {new:{digits}} ({abs(change):.1f} % {word})")
        if before == after:
            lines.append(
                "  nothing to remove: give the posterior more steps or a higher learning rate to travel, or "
                "raise the KL weight"
            )
        if self.kl_weight == 0:
            lines.append("  at KL weight 0 nothing held the posterior to its prior: ΔF has no meaning")
        elif self.kl_weight != 1:
            lines.append(
                f"  at KL weight {self.kl_weight:g}: evidence of the model tempered to p(y|θ)^(1/{self.kl_weight:g})"
            )
        floor = widths.layer[(widths.after <= self.min_kept) & (widths.before > self.min_kept)]
        if len(floor):
            lines.append(f"  at the floor of {self.min_kept} kept: {', '.join(map(str, floor))}")
        return "\n".join(lines)

    __str__ = summary

    def apply(
        self,
        network: nn.Module | None = None,
        example_input: Tensor | None = None,
        *,
        measure: bool = True,
        tolerance: float = 1e-10,
    ) -> nn.Module:
        """The smaller network: a plain module with E[θ] folded in, proved equal to the reduced model.

        Args:
            network: the network with noise layers; default the one that was reduced (a plan that was loaded
                from disk has none).
            example_input: a batch of inputs; default what the guide was first called with.
            measure: also measure `costs` on that batch (some dozen forward passes).
            tolerance: allowed difference of outputs in float64, relative to their spread over the batch.

        Raises:
            ValueError: where a network or an example input is needed and missing, or does not match.
            EqualityError: if the smaller network does not compute what the reduced model computes; the
                message has the largest difference.
        """
        network = network if network is not None else self._network
        if network is None:
            raise ValueError("network must be given: this plan was loaded from disk and holds none")
        if example_input is None:
            if self._find_input is None:
                raise ValueError("example_input must be given: a batch of inputs of the network")
            example_input = self._find_input()
        kept = {layer: self.kept_mask(layer) for layer in self.layers}
        small = remove_structures(
            network, kept, self.scales(), example_input[:CHECK_EXAMPLES], tolerance=tolerance
        )
        if measure:
            full = without_noise(copy.deepcopy(network))
            self.costs = compare_costs(full, small, example_input)
        return small

    def save(self, path: Path | str) -> Path:
        """Write the plan to `path` (JSON) and, beside it, the numbers to the same name with .safetensors.

        Raises:
            ValueError: if `path` does not end in .json.
        """
        from safetensors.torch import save_file

        path = _json_path(path)
        numeric = [name for name in _COLUMNS if name not in ("layer", "kl_weight")]
        columns = {name: torch.tensor(self.table[name].to_numpy()) for name in numeric}
        sizes = {layer: int((self.table.layer == layer).sum()) for layer in self.layers}
        costs = None if self.costs is None else self.costs.to_dict()
        document = dict(
            format=FORMAT, version=VERSION, criterion=self.criterion, kl_weight=self.kl_weight,
            min_kept=self.min_kept, layers=sizes, kept=self.kept, costs=costs,
        )  # fmt: skip
        write_atomically(path.with_suffix(".safetensors"), lambda beside: save_file(columns, beside))
        return write_atomically(path, lambda beside: beside.write_text(json.dumps(document, indent=1)))

    @classmethod
    def load(cls, path: Path | str) -> Reduction:
        """Read what `save` wrote. The plan then needs `apply(network, example_input)`.

        Raises:
            ValueError: if the file is not a plan, contradicts its numbers, or was written by a newer version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = _json_path(path)
        try:
            document = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"path must be a plan written by Reduction.save: {path} is no JSON ({error})"
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"path must be a plan written by Reduction.save: {path} is none")
        if not isinstance(document.get("version"), int):
            raise ValueError(f"path must be a plan written by Reduction.save: {path} has no version")
        refuse_newer(path, "plan", document["version"], VERSION)
        try:
            columns = load_file(path.with_suffix(".safetensors"))
            layers = [layer for layer, size in document["layers"].items() for _ in range(size)]
            table = pd.DataFrame({"layer": layers, **{name: t.numpy() for name, t in columns.items()}})
            table["kl_weight"] = document["kl_weight"]
            costs = document["costs"]
            plan = cls(
                table=table[_COLUMNS],
                criterion=document["criterion"],
                kl_weight=document["kl_weight"],
                min_kept=document["min_kept"],
                costs=None if costs is None else pd.DataFrame(costs),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"path must be a whole plan with its .safetensors beside it: {path}: {error}"
            ) from None
        if plan.kept != document["kept"]:
            raise ValueError(
                f"{path} and its .safetensors do not belong together: they keep different structures"
            )
        return plan


_COLUMNS = [
    "layer", "unit", "loc", "scale", "mean", "snr", "score", "log_evidence_change", "kl_weight", "removed",
    "removed_in_fit",
]  # fmt: skip


def _json_path(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path must end in .json: got {path}")
    return path


def reduce(
    model: nn.Module,
    guide: Callable[..., Any],
    criterion: Criterion,
    *model_args: Any,
    min_kept: int = 1,
    kl_weight: float | None = None,
) -> Reduction:
    """Decide, from the guide's parameters alone, which structures the model is better without.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model)
    >>> _ = guide(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    >>> plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5, seed=1))
    >>> plan.widths().values.tolist()
    [['2', 8, 4]]
    >>> plan.apply(measure=False)[0]
    Linear(in_features=4, out_features=4, bias=True)

    A structure is removed where its score is ≥ 0, or if it was removed during the fit; removal is never
    undone. A layer whose structures would all go keeps the `min_kept` with the lowest scores.

    Args:
        model: a Pyro model with noise layers.
        guide: its mean-field guide.
        criterion: `BMRS_N()`, `BMRS_U()`, `SNR()`, …: any function from layers to scores.
        model_args: arguments to call model and guide with, where the guide is not an
            `AutoTruncatedLogNormal` that remembers its first batch.
        min_kept: structures that every layer keeps, at least 1.
        kl_weight: of the fit, to be named wherever a ΔF is shown; default what `fit` noted in the guide.

    Raises:
        NonFiniteScoreError: naming the layer and the structures with a NaN or infinite score.
        ValueError: for a bad argument, or a noise layer without a posterior in the guide.
    """
    if not isinstance(min_kept, int) or min_kept < 1:
        raise ValueError(f"min_kept must be an integer of at least 1: got {min_kept!r}")
    check_criterion(criterion)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    arguments = model_args
    if not arguments and isinstance(guide, AutoTruncatedLogNormal):
        arguments = guide.example_arguments
    posterior = read_posterior(guide, *arguments)
    layers = noise_layers(model)
    network = network_of(model)

    @cache
    def example_input() -> Tensor:
        return _input_of(network, model, arguments)

    @cache
    def groups() -> dict[str, StructureGroup]:
        return structure_groups(network, example_input())

    structures = {}
    for site, layer in layers.items():
        if site not in posterior:
            raise ValueError(f"guide must have a truncated log-normal posterior of {site!r}: it has none")
        structures[site] = LayerStructures(
            posterior=posterior[site],
            prior=elementary(layer.prior()),  # type: ignore[arg-type]
            kept=layer.kept,
            weight_norm=lambda site=site, layer=layer: (  # type: ignore[misc]
                _weight_norm(network, groups()[site]).to(layer.kept.device)
            ),
        )
    scores = criterion(structures)
    evidence = criterion.log_evidence_change(structures) if isinstance(criterion, EvidenceCriterion) else {}
    frames = []
    for site, view in structures.items():
        score = scores[site].detach().double().cpu()
        bad = torch.nonzero(~torch.isfinite(score)).flatten().tolist()
        if bad:
            raise NonFiniteScoreError(
                f"{criterion} gave structures {bad[:10]} of layer {site!r} a score that is not finite "
                f"({[float(score[index]) for index in bad[:3]]}); nothing is removed"
            )
        removed = (score >= 0) | ~view.kept.cpu()
        removed = _with_floor(removed, score, view.kept.cpu(), min_kept)
        q = view.posterior
        columns = {
            "loc": q.loc,
            "scale": q.scale,
            "mean": q.mean,
            "snr": q.snr,
            "score": score,
            "log_evidence_change": evidence.get(site, torch.full_like(score, torch.nan)),
        }
        numbers = {name: value.detach().double().cpu().numpy() for name, value in columns.items()}
        frame = pd.DataFrame({"layer": site, "unit": range(len(score)), **numbers})
        frame["removed"] = removed.numpy()
        frame["removed_in_fit"] = (~view.kept).cpu().numpy()
        frames.append(frame)
    weight = kl_weight if kl_weight is not None else float(getattr(guide, "kl_weight", 1.0))
    table = pd.concat(frames, ignore_index=True)
    table["kl_weight"] = weight
    return Reduction(
        table=table[_COLUMNS],
        criterion=str(criterion),
        kl_weight=weight,
        min_kept=min_kept,
        _network=network,
        _find_input=example_input,
    )


def _with_floor(removed: Tensor, score: Tensor, kept: Tensor, min_kept: int) -> Tensor:
    """`removed`, but for the `min_kept` structures with the lowest scores where fewer would stay."""
    floor = min(min_kept, int(kept.sum()))
    if int((~removed).sum()) >= floor:
        return removed
    best = score.masked_fill(~kept, torch.inf).argsort()[:floor]
    return removed.index_fill(0, best, False)


def _weight_norm(network: nn.Module, group: StructureGroup) -> Tensor:
    """Root mean square of the weights that make each structure, over all layers that produce it."""
    squares = torch.zeros(group.features, dtype=torch.float64)
    counts = torch.zeros_like(squares)
    for member in group.producers:
        rows = weight_of(network, member).detach().double().cpu().flatten(1).square()
        squares.index_add_(0, member.units, rows.sum(1)[member.indices])
        counts.index_add_(0, member.units, torch.full_like(member.units, rows.shape[1], dtype=torch.float64))
    return (squares / counts).sqrt()


@torch.no_grad()
def _input_of(network: nn.Module, model: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    """What `network` is called with when `model` is called with `arguments`."""
    if not arguments:
        raise ValueError("model_args must be given: a batch to call the model with")
    like = next(model.parameters())
    moved = [
        a.to(like.device, like.dtype if a.is_floating_point() else None) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    ones = {
        site: torch.ones_like(layer.log_low).expand(layer.features)
        for site, layer in noise_layers(model).items()
    }
    caught: list[Any] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: caught.extend(inputs[:1]))
    try:
        # only looking: no statistic, generator or parameter store may notice
        with (
            in_mode(model, training=False),
            torch.random.fork_rng(),
            pyro.get_param_store().scope(),
            FixedScales(ones),
        ):
            model(*moved)
    finally:
        handle.remove()
    if not caught or not isinstance(caught[0], Tensor):
        raise ValueError("the network must be called with one tensor: pass example_input to apply()")
    example: Tensor = caught[0].detach()
    return example
