"""The same networks with torch-pruning, as it comes: no numbers of heads, no hints. Used by any_network.py --peer.

Its BasePruner removes half of the channels of each group, by random importance, in float64. It is told which layers
make the outputs of the network, which it would prune otherwise.

status:
    handled  something was removed, the network runs, and its outputs are right (or were not compared: see compared)
    wrong    it runs, and its outputs differ by more than 1e-6 of their spread, or have another shape
    refused  an error when the graph is made, or in pruning, or no network that runs; or nothing was removed
    timeout, memory, error  as in any_network.py

"Right" is what a network computes in which the removed channels are 0: in a copy of the original, the indices that
torch-pruning reports are set to 0 in all that it cuts (rows, biases, normalisations, and the columns that read them).
Where it cuts a LayerNorm or another normalisation over channels, the copy normalises those that stay, by the pruned
network's own module, since otherwise every pruned transformer would count as wrong.
compared: False where that copy can't be made or fails (recurrent layers); the status then says that it runs, not more.
removed: share of the parameters. seconds: of the processor, for graph and pruning.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning
from any_network_trial import (
    LEAST_SPREAD,
    Budget,
    Report,
    _line,
    cast,
    differ,
    in_double,
    peak,
    randomise,
    spread_of,
)
from output_layers import output_layers
from public_networks import PublicNetwork
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.inputs import call, tensors_of

TOLERANCE = 1e-6


def pruned(network: PublicNetwork, report: Report, budget: Budget) -> None:
    """Prune a half with torch-pruning, and compare."""
    net, example = network.build(), network.inputs()
    before = parameters(net)
    report(parameters=before)
    net, precision = in_double(net, example)
    randomise(net, example, precision)
    example = cast(example, precision)
    net.requires_grad_(True)
    with torch.enable_grad():
        last = output_layers(net, call(net, example), through_sums=True)
    original = copied(net)
    zeroed = Zeroed(original)
    try:
        with budget.spent():
            pruner = torch_pruning.BasePruner(
                net, example, torch_pruning.importance.RandomImportance(), pruning_ratio=0.5, forward_fn=call,
                ignored_layers=[net.get_submodule(path) for path in sorted(last)],
                output_transform=lambda out: [t for t in tensors_of(out) if t.grad_fn is not None],
            )  # fmt: skip
            groups = 0
            for group in pruner.step(interactive=True):
                zeroed.note(pruner.DG, group)
                group.prune()
                groups += 1
    except Exception as error:
        report(status="refused", error=_line(error), seconds=round(budget.used, 2), peak_mb=peak())
        return
    removed = round(1 - parameters(net) / before, 5)
    report(groups=groups, removed=removed, seconds=round(budget.used, 2), peak_mb=peak())
    if not removed:
        report(status="refused", error="nothing is removed")
        return
    torch.manual_seed(2)
    x = cast(network.inputs(), precision)
    try:
        with torch.no_grad():
            found = call(net.eval(), x)
    except Exception as error:
        report(status="refused", error=f"the pruned network fails: {_line(error)}")
        return
    try:
        with torch.no_grad():
            wanted = call(zeroed.finished(net), x)
    except Exception as error:
        report(status="handled", compared=False, error=f"not compared: {_line(error)}")
        return
    if spread_of(wanted) < LEAST_SPREAD:
        report(status="handled", compared=False, error="not compared: outputs hardly depend on inputs")
        return
    apart = differ(wanted, found)
    report(status="handled" if apart <= TOLERANCE else "wrong", compared=True, difference=apart)


class Zeroed:
    """A copy of the network in which what torch-pruning removes becomes 0.

    Args:
        network: the copy, which is changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        # by module (or parameter) and dimension: original numbers of the entries that are still there
        self.there: dict[tuple[str, str], list[int]] = {}
        self.normalised: set[str] = set()
        self.failed = ""

    def note(self, graph: Any, group: Any) -> None:
        """Take note of a group before it is pruned."""
        for dependency, indices in group:
            target, handler = dependency.target, dependency.handler
            module = target.module
            if isinstance(module, nn.Parameter):
                path = graph._param_to_name[module]
                dim = handler.__self__.pruning_dim if hasattr(handler, "__self__") else -1
                chosen = self._removed(path, f"dim {dim}", module.shape[dim], indices)
                _zero(self.network.get_parameter(path), dim, chosen)
                owner = self.network.get_submodule(path.rpartition(".")[0])
                if _normalises(owner) and module.shape[dim] == module.numel():
                    self._normalise(path.rpartition(".")[0], f"dim {dim}")
            elif type(module).__module__ != "torch_pruning.ops":
                path = graph._module2name[module].split(" ")[0]
                inward = graph.is_in_channel_pruning_fn(handler)
                outward = graph.is_out_channel_pruning_fn(handler)
                self._note_module(graph, module, path, indices, columns=inward and not outward)

    def _note_module(
        self, graph: Any, pruned: nn.Module, path: str, indices: list[int], *, columns: bool
    ) -> None:
        side = "columns" if columns else "rows"
        size = graph.get_in_channels(pruned) if columns else graph.get_out_channels(pruned)
        chosen = self._removed(path, side, size, indices)
        module = self.network.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
            thirds = [i + third * width for third in range(3) for i in chosen]
            _zero(module.in_proj_weight, 0, thirds)
            _zero(module.in_proj_weight, 1, chosen)
            for tensor, which in ((module.in_proj_bias, thirds), (module.out_proj.bias, chosen)):
                _zero(tensor, 0, which)
            _zero(module.out_proj.weight, 0, chosen)
            _zero(module.out_proj.weight, 1, chosen)
        elif isinstance(module, nn.Embedding):
            _zero(module.weight, 1, chosen)
        elif isinstance(module, nn.RNNBase):
            self.failed = f"{path!r} is recurrent"
        elif columns and isinstance(module, _ConvNd) and module.groups > 1:
            each, made = module.in_channels // module.groups, module.out_channels // module.groups
            with torch.no_grad():
                for index in chosen:
                    start = index // each * made
                    module.weight[start : start + made, index % each] = 0.0
        elif columns:
            _zero(module.weight, 0 if isinstance(module, _ConvTransposeNd) else 1, chosen)
        else:
            _zero(module.weight, 1 if isinstance(module, _ConvTransposeNd) else 0, chosen)
            _zero(getattr(module, "bias", None), 0, chosen)
            if _normalises(module):
                self._normalise(path, side)

    def _removed(self, path: str, side: str, size: int, indices: list[int]) -> list[int]:
        """Original numbers of what is removed now."""
        there = self.there.setdefault((path, side), list(range(size)))
        gone = {there[int(index)] for index in indices}
        self.there[path, side] = [index for index in there if index not in gone]
        return sorted(gone)

    def _normalise(self, path: str, side: str) -> None:
        self.normalised.add(path)
        self.there[path, "normalised"] = self.there[path if side == "rows" else f"{path}.weight", side]

    def finished(self, small: nn.Module) -> nn.Module:
        """The copy. Raises RuntimeError if it stands for nothing."""
        if self.failed:
            raise RuntimeError(self.failed)
        for path in self.normalised:
            kept = torch.tensor(self.there[path, "normalised"])
            self.network.set_submodule(path, _OfThoseKept(small.get_submodule(path), kept))
        return self.network.eval()


class _OfThoseKept(nn.Module):
    """A normalisation of some of the channels; the others are 0."""

    def __init__(self, inner: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.inner, self.kept = inner, kept
        first = getattr(inner, "data_format", "") == "channels_first" or "2d" in type(inner).__name__.lower()
        self.dim = getattr(inner, "channel_dim", 1 if first or isinstance(inner, nn.GroupNorm) else -1)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        small = self.inner(x.index_select(self.dim, self.kept), *others)
        return torch.zeros_like(x).index_copy(self.dim, self.kept, small)


def _normalises(module: nn.Module) -> bool:
    name = type(module).__name__
    return ("Norm" in name or "GRN" in name) and not any(
        other in name for other in ("BatchNorm", "InstanceNorm")
    )


@torch.no_grad()
def _zero(tensor: Tensor | None, dim: int, indices: list[int]) -> None:
    if tensor is not None and indices:
        tensor.index_fill_(dim, torch.tensor(indices), 0.0)
