"""The plan of a reduction: what stays and what goes, and from a plan to a smaller network."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_bmrs.files import check_file, read_text, refuse_newer, write_atomically
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.cost import compare_costs, multiply_accumulates
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.export import load_weights
from pyro_bmrs.networks.groups import gone
from pyro_bmrs.networks.hooked_noise import without_noise
from pyro_bmrs.networks.inputs import Inputs, blamed_on_input, check_finite, first_examples
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import at_one, noise_layers
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.networks.surgery import TOLERANCE, remove_structures
from pyro_bmrs.pruning.decision import Candidates, least_kept, removals
from pyro_bmrs.pruning.shrink import earlier_cuts, original_network, shrink

if TYPE_CHECKING:
    from pyro_bmrs.programs.latents import Evidence, Latents
    from pyro_bmrs.programs.reduced_posterior import ReducedPosterior

FORMAT, VERSION = "pyro_bmrs.reduction", 5
# Enough examples for outputs to spread in the equality check, few enough for float64 (of large networks: two).
CHECK_EXAMPLES = 32
_CHECK_MULTIPLY_ACCUMULATES = 1e10


# Above this log θ, starting at 0, a posterior has had no time to say anything.
LITTLE_TRAVEL = -3.0
COLUMNS = [
    "layer", "unit", "loc", "scale", "mean", "snr", "score", "log_evidence_change", "kl_weight", "removed",
    "removed_in_fit", "present",
]  # fmt: skip
# What the reduction of a Pyro program's latents has beside them: of estimates from draws.
ESTIMATE_COLUMNS = ["standard_error", "khat"]


@dataclass
class Reduction:
    """A plan: which structures stay, which go, and why.

    Attributes:
        table: one row per structure: layer, unit (index in the original network), loc and scale (of log θ),
            mean (E[θ]), snr, score (in the criterion's unit; ≥ 0: remove), log_evidence_change (ΔF in nats,
            NaN for criteria without evidence), kl_weight (of the fit: ΔF is the evidence of the model with
            likelihood p(y|θ)^(1/kl_weight)), removed, removed_in_fit (by the fit, before this plan), present
            (still in the network that was reduced; of others loc and scale are the last ones, and the score
            is NaN where the criterion would look at their weights).
        criterion: what decided, printed.
        kl_weight: of the fit.
        min_kept: structures that every layer keeps at least; 0 where the plan is of no network.
        round_to: the channels of every layer are a multiple of it where the layer has as many; None: any number.
        costs: after `apply`, what `compare_costs` measures: rows parameters, multiply_accumulates, file_bytes,
            milliseconds…, peak_bytes…, columns before, after.
        cuts: after `apply`, what was cut of each module: what `rebuild` needs.
        sites: of `reduce(model, guide, {site: reduced_prior})`, ΔF of reducing all of a site at once: columns site,
            elements, log_evidence_change, standard_error (nats; 0: closed form), khat (NaN: closed form). The
            table then has a row per element of a site (layer: its name, unit: its number, the last dimension
            running fastest), its loc and scale where the posterior has them (of the unconstrained value where
            it is a transformed normal), and the columns standard_error and khat; removed means reduced.
        groups: the same for the groups that were named: column group instead of site.
        steps: of `greedy_reduction`, what was reduced in which order; not saved.
        channels: by layer, channels that one structure has where it is made, if more than 1.
        nesting: which structures lie inside others (`InputSelection`), in the order of the table.
    """

    table: pd.DataFrame
    criterion: str
    kl_weight: float = 1.0
    min_kept: int = 1
    round_to: int | None = None
    costs: pd.DataFrame | None = None
    cuts: Cuts | None = field(default=None, repr=False)
    channels: dict[str, int] = field(default_factory=dict, repr=False)
    nesting: Nesting = field(default_factory=Nesting, repr=False)
    sites: pd.DataFrame | None = field(default=None, repr=False)
    groups: pd.DataFrame | None = field(default=None, repr=False)
    steps: pd.DataFrame | None = field(default=None, repr=False)
    _network: nn.Module | None = field(default=None, repr=False)
    _find_input: Callable[[], Inputs] | None = field(default=None, repr=False)
    _latents: Latents | None = field(default=None, repr=False)
    _asked: dict[str, Tensor] = field(default_factory=dict, repr=False)

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
        """True where a structure of `layer` stays, of those in the network. Shape: (features,)."""
        return torch.tensor((~self._present(layer).removed).to_numpy())

    def _present(self, layer: str) -> pd.DataFrame:
        """The rows of the structures of `layer` that are in the network that was reduced."""
        return self.table[self.table.present & (self.table.layer == layer)]

    def _kept_masks(self) -> dict[str, Tensor]:
        return {layer: self.kept_mask(layer) for layer in self.layers}

    def scales(self) -> dict[str, Tensor]:
        """E[θ] of each kept structure and 0 of each removed one in the network, by layer, float64."""
        rows = {layer: self._present(layer) for layer in self.layers}
        return {
            layer: torch.tensor(present["mean"].where(~present.removed, 0.0).to_numpy())
            for layer, present in rows.items()
        }

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

    def bound_to(self, network: nn.Module, find_input: Callable[[], Inputs]) -> Reduction:
        """This plan with a network to apply it to and a way to an example input, as `load` can't know them."""
        return replace(self, _network=network, _find_input=find_input)

    def at(self, threshold: float) -> Reduction:
        """The plan that removes where score ≥ threshold, and what the fit had removed before."""
        if math.isnan(threshold):
            raise ValueError("threshold must be a number: got nan")
        return self.deciding(self.candidates(threshold), f"{self.criterion} at {threshold:g}")

    def deciding(self, layers: dict[str, Candidates], criterion: str) -> Reduction:
        """The plan that removes of all layers, in the order of the table, what is to go, and what that entails."""
        return replace(
            self,
            table=self.table.assign(removed=torch.cat([*removals(layers, self.nesting).values()]).numpy()),
            criterion=criterion,
            costs=None,
            cuts=None,
            _asked={site: layer.removed for site, layer in layers.items()},
        )

    def candidates(self, threshold: float) -> dict[str, Candidates]:
        """What of each layer is to go where score ≥ threshold, and what may."""
        layers = {}
        for layer, rows in self.table.groupby("layer", sort=False):
            score = torch.tensor(rows.score.to_numpy())
            before = torch.tensor(rows.removed_in_fit.to_numpy())
            least = least_kept(self.min_kept, self.round_to, self.channels.get(str(layer), 1))
            layers[str(layer)] = Candidates((score >= threshold) | before, score, ~before, *least)
        return layers

    def joint_evidence(self) -> Evidence:
        """ΔF in nats of reducing at once all that is removed by its own evidence, with standard error and k̂.

        What leaves only along with other structures (`InputSelection`) is not counted: θ = 0 of those says it all.
        Where the posterior is a joint normal this is not the sum of the single elements' ΔF.

        Raises:
            ValueError: unless the plan is of `reduce(model, guide, {site: reduced_prior, …})`, not loaded.
        """
        latents, selection = self._chosen()
        return latents.change(selection)

    def reduced_posterior(self) -> ReducedPosterior:
        """The posterior of the reduced model as a guide, so that it predicts without fitting again.

        >>> predictive = pyro.infer.Predictive(model, guide=plan.reduced_posterior(), num_samples=100)  # doctest: +SKIP

        Raises:
            ValueError: as `joint_evidence`.
        """
        latents, selection = self._chosen()
        return latents.reduced_posterior(selection)

    def _chosen(self) -> tuple[Latents, dict[str, Tensor]]:
        if self._latents is None:
            raise ValueError(
                "plan must be one of reduce(model, guide, {site: reduced_prior, …}), not loaded from disk, to have a "
                "reduced posterior: this one knows no reduced priors"
            )
        return self._latents, {
            name: (~self.kept_mask(name) & self._asked_of(name)).reshape(site.shape)
            for name, site in self._latents.sites.items()
        }

    def _asked_of(self, name: str) -> Tensor:
        """True where a structure in the network is to go by its own evidence."""
        present = torch.tensor(self.table.present[self.table.layer == name].to_numpy())
        return self._asked[name][present] if name in self._asked else torch.ones_like(present)[present]

    def summary(self) -> str:
        """A few lines for people: widths, costs once `apply` has measured them, and cautions."""
        widths = self.widths()
        before, after = int(widths.before.sum()), int(widths.after.sum())
        verdict = (
            f"keeps {after} of {before} structures" if self.sites is None else f"leaves {after} of {before}"
        )
        lines = [f"{self.criterion} {verdict}"]
        lines += [f"  {row.layer}: {row.before} → {row.after}" for row in widths.itertuples()]
        if self.costs is not None:
            lines += [f"  {line}" for line in _cost_lines(self.costs)]
        if self.round_to is not None:
            lines.append(f"  channels rounded up to multiples of {self.round_to}, by evidence")
        if self.sites is not None:
            lines += _evidence_lines(self.sites, "site")
        if self.groups is not None:
            lines += _evidence_lines(self.groups, "group")
        if before == after and self.sites is None:
            lines.append(_advice(float(self.table["loc"].min())))
        if self.kl_weight == 0:
            lines.append("  at KL weight 0 nothing held the posterior to its prior: ΔF has no meaning")
        elif self.kl_weight != 1:
            lines.append(
                f"  at KL weight {self.kl_weight:g}: evidence of the model tempered to p(y|θ)^(1/{self.kl_weight:g})"
            )
        floor = widths.layer[(widths.after <= self.min_kept) & (widths.before > self.min_kept)]
        if len(floor) and self.min_kept:
            lines.append(f"  at the floor of {self.min_kept} kept: {', '.join(map(str, floor))}")
        return "\n".join(lines)

    __str__ = summary

    def apply(
        self,
        network: nn.Module | None = None,
        example_input: Inputs | None = None,
        *,
        measure: bool = True,
        seconds: float = 4.0,
        tolerance: float = TOLERANCE,
    ) -> nn.Module:
        """The smaller network: a plain module with E[θ] folded in, proved equal to the reduced model.

        Args:
            network: the network with noise layers; default the one that was reduced (a plan that was loaded
                from disk has none).
            example_input: a batch of inputs: a tensor, a tuple of arguments, or a mapping of keyword
                arguments; default what the guide was first called with.
            measure: also measure `costs`.
            seconds: for the timings among them; what would take longer is left out, 0 for none.
            tolerance: allowed difference in float64, of the outputs and of every layer that reads
                structures, relative to their spread over at most 32 examples of the batch.

        Raises:
            ValueError: where a network or an example input is needed and missing, or does not match.
            EqualityError: if the smaller network does not compute what the reduced model computes; the
                message has the largest difference.
        """
        network, example_input = self._bound(network, example_input)
        self._check_layers(network)
        examples = first_examples(example_input, check_examples(network, example_input))
        surgery = remove_structures(network, self._kept_masks(), self.scales(), examples, tolerance=tolerance)
        self.cuts = earlier_cuts(network).then(surgery.cuts)
        if measure:
            self.costs = compare_costs(_full(network), surgery.network, example_input, seconds=seconds)
        return surgery.network

    def _bound(self, network: nn.Module | None, example_input: Inputs | None) -> tuple[nn.Module, Inputs]:
        network = network if network is not None else self._network
        if self.sites is not None and network is None:
            raise ValueError(
                "plan has nothing to remove from a network: it reduces priors of latents that are no noise layers, or "
                "to values other than 0. Predict with plan.reduced_posterior()"
            )
        if network is None:
            raise ValueError("network must be given: this plan was loaded from disk and holds none")
        if example_input is None:
            if self._find_input is None:
                raise ValueError("example_input must be given: a batch of inputs of the network")
            example_input = self._find_input()
        return network, example_input

    def _check_layers(self, network: nn.Module) -> None:
        """Raise ValueError for a network that is not the one that was reduced."""
        planned = {layer: len(self._present(layer)) for layer in self.layers}
        found = {site: layer.features for site, layer in noise_layers(network).items()}
        if found != planned:
            raise ValueError(f"network must have the noise layers of the plan, {planned}: got {found}")

    def parameters_left(self, network: nn.Module | None = None, example_input: Inputs | None = None) -> int:
        """Number of parameters that `apply` would leave, counted without cutting."""
        return self._parameters_of([self], *self._bound(network, example_input))[0]

    def parameters_at(self, thresholds: Sequence[float]) -> list[int]:
        """Number of parameters that the plans `at` these thresholds would leave, counted without cutting."""
        return self.parameters_of([self.at(threshold) for threshold in thresholds])

    def parameters_of(self, plans: Sequence[Reduction]) -> list[int]:
        """Number of parameters that other plans for this one's network would leave, counted without cutting."""
        return self._parameters_of(plans, *self._bound(None, None))

    @staticmethod
    def _parameters_of(plans: Sequence[Reduction], network: nn.Module, example_input: Inputs) -> list[int]:
        groups = structure_groups(network, example_input).values()
        return [gone(network, groups, plan._kept_masks()).parameters_left(network) for plan in plans]

    def parameters_before(self, network: nn.Module | None = None) -> int:
        """Number of parameters of the original network, whatever a fit has taken out since."""
        network = network if network is not None else self._bound(None, None)[0]
        return sum(parameter.numel() for parameter in original_network(network).parameters())

    def rebuild(self, network: nn.Module, weights: Path | str | None = None) -> nn.Module:
        """The smaller network from a fresh one of the original class: no data, no posterior, no pickle.

        >>> plan = Reduction.load("plan.json")  # doctest: +SKIP
        >>> small = plan.rebuild(resnet18(), "small.safetensors")  # doctest: +SKIP

        Args:
            network: as the original was made, with noise or without; left unchanged.
            weights: a safetensors file of the smaller network's weights; None leaves those of `network`,
                without E[θ].

        Returns:
            The network in eval mode.

        Raises:
            ValueError: if this plan was never applied, or network or weights don't belong to it.
        """
        if self.cuts is None:
            raise ValueError("plan must have been applied before it was saved: it does not say what was cut")
        small = copy.deepcopy(network)
        separate_attention(small)
        self.cuts.cut(small)
        small = without_noise(small)
        if weights is not None:
            try:
                small.load_state_dict(load_weights(weights))
            except (OSError, SafetensorError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"weights {weights} are damaged, or not of this plan: {reason}") from error
            check_finite(f"weights {weights}", small)
        return small.eval()

    def shrink(
        self,
        model: nn.Module,
        guide: AutoTruncatedLogNormal,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Take the removed structures out of model, guide and optimizer, in place, so that fitting goes on.

        The noise stays, on what is left; nothing is folded. Parameters stay the same objects with fewer
        entries, and the optimizer's state of each keeps the entries that belong to them. Tables of later
        plans number structures as the original network did.

        Args:
            model: the Pyro model that was reduced.
            guide: its guide.
            optimizer: of their parameters, of your own loop (`fit` makes a new one); one whose state has the
                shapes of the parameters, such as Adam or SGD.

        Raises:
            ValueError, TypeError: if model, guide or optimizer don't match the plan; nothing is changed then.
            EqualityError: if the smaller model would not compute the same; nothing is changed then.
        """
        shrink(
            model,
            guide,
            self._kept_masks(),
            optimizer,
            self._bound(None, None)[1],
        )

    def save(self, path: Path | str) -> Path:
        """Write the plan to `path` (JSON) and, beside it, the numbers to the same name with .safetensors.

        Raises:
            ValueError: if `path` does not end in .json.
        """
        from safetensors.torch import save_file

        path = _json_path(path)
        check_file("path", path)  # before its numbers are beside it
        numeric = [name for name in self.table.columns if name not in ("layer", "kl_weight")]
        columns = {name: torch.tensor(self.table[name].to_numpy()) for name in numeric}
        sizes = {layer: int((self.table.layer == layer).sum()) for layer in self.layers}
        costs = None if self.costs is None else _without_nan(self.costs)
        document = dict(
            format=FORMAT, version=VERSION, criterion=self.criterion, kl_weight=self.kl_weight,
            min_kept=self.min_kept, round_to=self.round_to, channels=self.channels, layers=sizes, kept=self.kept,
            nesting=self.nesting.to_json(), costs=costs, cuts=None if self.cuts is None else self.cuts.to_json(),
            sites=_records(self.sites), groups=_records(self.groups),
        )  # fmt: skip
        write_atomically(path.with_suffix(".safetensors"), lambda beside: save_file(columns, beside))
        return write_atomically(path, lambda beside: beside.write_text(json.dumps(document, indent=1)))

    @classmethod
    def load(cls, path: Path | str) -> Reduction:
        """Read what `save` wrote. The plan then needs `apply(network, example_input)`.

        Raises:
            ValueError: if the file is not a plan, contradicts its numbers, or was written by a newer version.
        """
        from safetensors.torch import load_file

        path = _json_path(path)
        try:
            document = json.loads(read_text(path))
        except OSError as error:
            raise ValueError(
                f"path must be a plan written by Reduction.save: {path} can't be read ({error})"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"path must be a plan written by Reduction.save: {path} is no JSON ({error})"
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"path must be a plan written by Reduction.save: {path} is none")
        if type(document.get("version")) is not int or document["version"] < 1:
            raise ValueError(f"path must be a plan written by Reduction.save: {path} has no version")
        refuse_newer(path, "plan", document["version"], VERSION)
        try:
            columns = load_file(path.with_suffix(".safetensors"))
            if document["version"] == 1:  # when no fit took structures out
                columns["present"] = torch.ones_like(columns["removed"])
            missing = [name for name in COLUMNS if name not in (*columns, "layer", "kl_weight")]
            if missing:
                raise ValueError(f"its numbers lack {', '.join(missing)}")
            _check_document(document, len(columns["unit"]))
            layers = [layer for layer, size in document["layers"].items() for _ in range(size)]
            table = pd.DataFrame({"layer": layers, **{name: t.numpy() for name, t in columns.items()}})
            table["kl_weight"] = document["kl_weight"]
            costs = document["costs"]
            estimates = [name for name in ESTIMATE_COLUMNS if name in columns]
            plan = cls(
                table=table[COLUMNS + estimates],
                criterion=document["criterion"],
                kl_weight=document["kl_weight"],
                min_kept=document["min_kept"],
                round_to=document["round_to"],
                channels=document["channels"],
                nesting=Nesting.from_json(_nesting(document), document["layers"]),
                costs=None if costs is None else pd.DataFrame(costs, dtype=float),
                cuts=None if document["cuts"] is None else Cuts.from_json(document["cuts"]),
                sites=_frame(document.get("sites")),
                groups=_frame(document.get("groups")),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"path must be a whole plan with its .safetensors beside it: {path}: {error}"
            ) from None
        if plan.kept != document["kept"]:
            raise ValueError(
                f"{path} and its .safetensors do not belong together: they keep different structures"
            )
        return plan


def _check_document(document: dict[str, Any], structures: int) -> None:
    """Raise ValueError, naming the entry, if a plan's numbers are of the wrong type or out of range."""

    def whole(value: object, least: int) -> bool:
        return type(value) is int and value >= least

    sizes, channels, weight = (
        document["layers"].values(),
        document["channels"].values(),
        document["kl_weight"],
    )
    for name, good in (
        ("layers", all(whole(size, 1) for size in sizes) and sum(sizes) == structures),
        ("channels", all(whole(count, 1) for count in channels)),
        ("min_kept", whole(document["min_kept"], 0)),
        ("round_to", document["round_to"] is None or whole(document["round_to"], 1)),
        ("kl_weight", type(weight) in (int, float) and 0 <= weight < math.inf),
        ("criterion", isinstance(document["criterion"], str)),
        ("kept", isinstance(document["kept"], dict)),
        ("costs", document["costs"] is None or set(document["costs"]) == {"before", "after"}),
    ):
        if not good:
            raise ValueError(f"its {name} can't be {document[name]!r}"[:200])


def _nesting(document: dict[str, Any]) -> Any:
    """What a plan says of structures inside others; before version 5 not which are read only through those."""
    if document["version"] >= 5:
        return document["nesting"]
    owners = document.get("owners", {})
    outside = {outer for outers in owners.values() for outer in outers}
    return {"owners": owners, "enclosed": {outer: [False] * document["layers"][outer] for outer in outside}}


def _records(table: pd.DataFrame | None) -> list[dict[str, Any]] | None:
    """A table of evidence for JSON, which knows no NaN and no infinity: k̂ as text."""
    if table is None:
        return None
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return [{**row, "khat": str(row["khat"])} for row in rows]


def _frame(records: list[dict[str, Any]] | None) -> pd.DataFrame | None:
    return None if records is None else pd.DataFrame([{**row, "khat": float(row["khat"])} for row in records])


def _evidence_lines(table: pd.DataFrame, kind: str) -> list[str]:
    """ΔF of all of a site or a group, with what is known of its error."""
    lines = []
    for name, change, error in zip(table[kind], table.log_evidence_change, table.standard_error, strict=True):
        give_or_take = f" ± {error:.2g}" if error else ""
        lines.append(f"  ΔF of {kind} {name} as a whole: {change:+.4g}{give_or_take} nats")
    return lines


def _json_path(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path must end in .json: got {path}")
    return path


def _full(network: nn.Module) -> nn.Module:
    """The network without noise as it was made, to measure its costs: with random weights if it has shrunk."""
    if not earlier_cuts(network):
        return without_noise(copy.deepcopy(network))
    full = copy.deepcopy(original_network(network)).to_empty(device=next(network.parameters()).device)
    with torch.no_grad(), torch.random.fork_rng():
        for parameter in full.parameters():
            parameter.normal_(0.0, 0.02)
        for buffer in full.buffers():
            buffer.fill_(1 if buffer.is_floating_point() else 0)  # an index must lie in what it looks up
    return full


def check_examples(network: nn.Module, example_input: Inputs) -> int:
    """How many examples the equality check takes: fewer of a network that is slow in float64."""
    looked_at = copy.deepcopy(network)  # a forward pass may leave its traces
    with in_mode(looked_at, training=False), at_one(looked_at), blamed_on_input(network):
        one = multiply_accumulates(looked_at, example_input)
    return min(max(int(_CHECK_MULTIPLY_ACCUMULATES // max(one, 1)), 2), CHECK_EXAMPLES)


def _advice(lowest: float) -> str:
    """What to do where nothing is to be removed, by the lowest log θ: it has not come far, or it is held there."""
    told = f"  nothing to remove: the lowest log θ is {lowest:.1f}"
    if lowest > LITTLE_TRAVEL:
        return (
            f"{told}, hardly below 0 where it began. A step moves it by at most posterior_learning_rate: give more "
            "epochs, smaller batches or a higher rate, such as 2e-2"
        )
    return (
        f"{told}, and each is needed by the data at this KL weight: raise it, such as to three times as much"
    )


def _without_nan(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """A table for JSON, which knows no NaN."""
    return {
        str(column): {str(row): None if math.isnan(value) else value for row, value in values.items()}
        for column, values in table.to_dict().items()
    }


def _cost_lines(costs: pd.DataFrame) -> list[str]:
    """Costs before and after, in words, where they were measured."""
    lines = []
    for name, values in costs.iterrows():
        before, after = float(values["before"]), float(values["after"])
        if math.isnan(before) or math.isnan(after):
            continue
        label, unit = str(name).replace("_", " "), 1.0
        if "bytes" in label:
            label, unit = label.replace("bytes", "megabytes"), 1e6
        digits = ",.3f" if unit != 1.0 or "milliseconds" in label else ",.0f"
        change = 100 * (1 - after / before) if before else 0.0
        word = "less" if change >= 0 else "more"
        lines.append(
            f"{label.replace('multiply accumulates', 'multiply-accumulates')}: {before / unit:{digits}} → "
            f"{after / unit:{digits}} ({abs(change):.1f} % {word})"
        )
    return lines
