"""Which channels of a network's layers are tied together, from torch-pruning's dependency graph.

This is the only file that knows torch-pruning. The graph assumes that an operation it does not know
acts on single channels. So it only proposes: `pyro_bmrs.networks.insertion` tries each proposed
removal before it is offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pyro_bmrs.networks.channels import (
    COLUMNS,
    HEADS,
    HEADS_WIDTH,
    KEY_HEADS,
    ROWS,
    channel_dimension,
    channels,
    is_depthwise,
    selections,
)
from pyro_bmrs.networks.computed import computed
from pyro_bmrs.networks.examples import at_most
from pyro_bmrs.networks.groups import Count, Member, StructureGroup
from pyro_bmrs.networks.inputs import Inputs, call, map_tensors, tensors_of
from pyro_bmrs.networks.noise import MultiplicativeNoise, at_one, noise_layers
from pyro_bmrs.networks.selection import InputSelection

# Attributes in which attention modules keep the size of a head.
_HEAD_SIZE = ("head_dim", "attention_head_size", "head_size")
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class StructureError(ValueError):
    """A network has layers that can't be handled. The message names them and says how to leave them out."""


class DependencyGraph:
    """torch-pruning's dependency graph of a network. It changes the network it is given."""

    def __init__(self, network: nn.Module, example_input: Inputs) -> None:
        import torch_pruning

        class NoisePruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
            """Makes the noise layer a node of the graph. It is never cut."""

            def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
                return layer

            prune_in_channels = prune_out_channels

            def get_out_channels(self, layer: Any) -> int:
                return int(layer.features)

            get_in_channels = get_out_channels

        class SelectionPruner(NoisePruner):
            """Makes an InputSelection a node too, where channels begin: its outputs differ from its inputs."""

            def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
                return layer

            def get_in_channels(self, layer: Any) -> int:
                return int(layer.width)

            def get_out_channels(self, layer: Any) -> int:
                return int(layer.features)

        # the graph is read from autograd: parameters must require gradients, and they may be frozen
        self.network = network.requires_grad_(True).eval()
        self.noise = noise_layers(network)
        self.paths = {module: path for path, module in network.named_modules()}
        self.owner = {
            parameter: (module, f"{path}.{name}".lstrip("."))
            for path, module in network.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        self.calls: Counter[nn.Module] = Counter()
        self.outputs: list[Any] = []
        self.received: dict[nn.Module, Tensor] = {}
        example = at_most(network, example_input, 2)
        # an input that requires gradients shows where it is added to channels of the network
        example = map_tensors(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), example)
        self.inputs = {id(tensor) for tensor in tensors_of(example)}
        handles = [
            module.register_forward_pre_hook(self._note)
            for module in network.modules()
            if has_own_parameters(module)
        ]
        try:
            with torch.enable_grad(), torch.random.fork_rng(), at_one(network):
                self.graph = torch_pruning.DependencyGraph().build_dependency(
                    network,
                    example_inputs=example,
                    forward_fn=call,
                    output_transform=self._outputs,
                    customized_pruners={
                        MultiplicativeNoise: NoisePruner(),
                        InputSelection: SelectionPruner(),
                    },
                    verbose=False,
                )
        except Exception as error:
            raise StructureError(
                f"network can't be traced: the dependency graph fails with {type(error).__name__}: {error}. "
                "docs/networks.md lists what is handled; try insert_noise on a part of the network"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        self._ignore_joins_over_other_dimensions()
        self.nodes = self.graph.module2node
        sizes = [channels(module, side) or 0 for module in network.modules() for side in (ROWS, COLUMNS)]
        self.most_channels = max(sizes, default=1)
        weights = Counter(
            id(p) for module in network.modules() for p in module._parameters.values() if p is not None
        )
        self.shared = {
            path
            for module, path in self.paths.items()
            if any(p is not None and weights[id(p)] > 1 for p in module._parameters.values())
        }

    def _outputs(self, value: Any) -> list[Tensor]:
        tensors = [tensor for tensor in tensors_of(value) if tensor.grad_fn is not None]
        if not tensors:
            raise ValueError("the network's output holds no tensor that depends on its parameters")
        self.outputs = [tensor.grad_fn for tensor in tensors]
        return tensors

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.calls[module] += 1
        if inputs and isinstance(inputs[0], Tensor):
            self.received[module] = inputs[0].detach()

    def _ignore_joins_over_other_dimensions(self) -> None:
        """Ignore joins of tokens (a class token) or of halves of a head: they move no channel."""
        import torch_pruning

        for node in self.graph.module2node.values():
            if node.type != torch_pruning.ops.OPTYPE.CONCAT:
                continue
            dims = len(node.grad_fn._input_metadata[0].shape)
            dim = node.grad_fn._saved_dim
            dim = dim - 2**64 if dim >= 2**63 else dim
            if dim % dims == self._channel_dimension(node):
                self._count_what_is_given(node, dim % dims)
            else:
                node.enable_index_mapping = False
                for dependency in node.dependencies:
                    dependency.index_mapping = [None, None]
                for neighbour in (*node.inputs, *node.outputs):
                    for dependency in neighbour.dependencies:
                        if dependency.target is node:
                            dependency.index_mapping = [None, None]

    def _count_what_is_given(self, node: Any, dim: int) -> None:
        """Count the channels of inputs of the network in a join, which the graph ignores."""
        from torch_pruning.dependency.index_mapping import _ConcatIndexMapping

        parts = node.grad_fn.next_functions
        leaves = [function is None or hasattr(function, "variable") for function, _ in parts]
        if not any(leaves):
            return
        sizes: list[int | None] = []
        for function, number in parts:
            if function is None:
                sizes.append(None)
            elif hasattr(function, "variable"):
                sizes.append(function.variable.shape[dim])
            else:
                sizes.append(function._input_metadata[number].shape[dim])
        if sizes.count(None) > 1:
            return  # the trial decides
        total = node.grad_fn._input_metadata[0].shape[dim]
        counted = [total - sum(filter(None, sizes)) if size is None else size for size in sizes]
        node.enable_index_mapping = False
        sources = iter(node.inputs)
        offset = 0
        for size, leaf in zip(counted, leaves, strict=True):
            if not leaf:
                source, span = next(sources), [offset, offset + size]
                for dependency in node.dependencies:
                    if dependency.target is source:
                        dependency.index_mapping[1] = _ConcatIndexMapping(offset=span, reverse=True)
                for dependency in source.dependencies:
                    if dependency.target is node:
                        dependency.index_mapping[1] = _ConcatIndexMapping(offset=span, reverse=False)
            offset += size

    def _channel_dimension(self, node: Any) -> int:
        """Dimension of the channels in a node's output, from the nearest layer that makes them; -1: none."""
        shape = node.grad_fn._input_metadata[0].shape
        level, seen = list(node.inputs), set()
        while level:
            for source in level:
                if isinstance(source.module, nn.Linear | _ConvNd):
                    dim = len(shape) + channel_dimension(source.module)
                    # heads with their own dimension: channels are not in one dimension any more
                    return dim if shape[dim] >= (channels(source.module, ROWS) or 0) else -1
            seen.update(level)
            level = [above for source in level for above in source.inputs if above not in seen]
        return 1 if len(shape) != 3 else 2

    def producers(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, layer) of linear, convolution and InputSelection layers in the graph, in the order of the network."""
        for path, module in self.network.named_modules():
            if (
                isinstance(module, nn.Linear | _ConvNd | InputSelection)
                and module in self.nodes
                and not is_depthwise(module)
                and channels(module, ROWS) is not None
            ):
                yield path, module

    def reach(self, root: nn.Module, rows: list[int]) -> Reach:
        """Everything that is tied to rows of a module (of a noise layer: its structures)."""
        from torch_pruning._helpers import _HybridIndex

        found = Reach(self, root, rows)
        handler = self.graph.get_pruner_of_module(root).prune_out_channels
        stack = [(self.nodes[root], handler, [_HybridIndex(idx=row, root_idx=row) for row in rows])]
        while stack:
            node, handler, pairs = stack.pop()
            known = found.add(node, handler, pairs)
            if isinstance(node.module, InputSelection) and self.is_inward(handler):
                # an InputSelection behind removed channels loses their rows too
                rows_of = self.graph.get_pruner_of_module(node.module).prune_out_channels
                selected = [
                    _HybridIndex(idx=row, root_idx=pair.root_idx)
                    for pair in known
                    for row in node.module.rows_of(pair.idx)
                ]
                stack.append((node, rows_of, selected))
            if known:
                for dependency in node.dependencies:
                    if dependency.is_triggered_by(handler):
                        moved = known
                        for mapping in dependency.index_mapping:
                            if mapping is not None:
                                moved = mapping(moved)
                        if moved:
                            stack.append((dependency.target, dependency.handler, moved))
        return found

    def is_inward(self, handler: Callable[..., Any]) -> bool:
        """Whether a handler prunes only channels that a module reads, not those that it makes."""
        inward: bool = self.graph.is_in_channel_pruning_fn(handler)
        return inward and not self.graph.is_out_channel_pruning_fn(handler)

    def selects_among_made(self, selection: InputSelection) -> bool:
        """Whether an InputSelection stands behind layers, not at an input of the network."""
        level, seen = list(self.nodes[selection].inputs), set()
        while level:
            node = level.pop()
            if node not in seen:
                seen.add(node)
                level += node.inputs
                if node.module in self.paths and channels(node.module, ROWS) is not None:
                    return True
        return False


def function_name(node: Any) -> str:
    """Name of the operation that a node of the graph stands for."""
    return type(node.grad_fn).__name__


def has_own_parameters(module: nn.Module) -> bool:
    """Whether a module has parameters itself, not only in submodules."""
    return any(parameter is not None for parameter in module._parameters.values())


class Reach:
    """The nodes that a traversal of the graph from one root has reached."""

    def __init__(self, graph: DependencyGraph, root: nn.Module, rows: list[int]) -> None:
        self.graph, self.root, self.roots = graph, root, rows
        self.pairs: dict[tuple[Any, str], set[tuple[int, int | None]]] = {}
        self.runs_away: str | None = None

    def add(self, node: Any, handler: Callable[..., Any], pairs: list[Any]) -> list[Any]:
        """Adds (index, root) pairs at a node. Returns the new ones."""
        module = node.module
        side = COLUMNS if self.graph.is_inward(handler) else ROWS
        if module in self.graph.paths:
            size = None if _is_shared(module) else channels(module, side)
            if size == 1 and len({pair.root_idx for pair in pairs}) > 1:
                return []  # one channel that meets many is broadcast over them, and tied to none
            if size is not None:
                pairs = [pair for pair in pairs if pair.idx < size]
        elif any(pair.idx > 4 * self.graph.most_channels for pair in pairs):
            self.runs_away = str(module)
        if self.runs_away is not None:
            return []
        seen = self.pairs.setdefault((node, side), set())
        new = [pair for pair in pairs if (pair.idx, pair.root_idx) not in seen]
        seen.update((pair.idx, pair.root_idx) for pair in new)
        if len(seen) > 8 * max(len(self.roots), self.graph.most_channels):
            self.runs_away = str(module)
        return new

    def _modules(self) -> Iterator[tuple[nn.Module, str, str, set[tuple[int, int | None]]]]:
        """(module, path, side, pairs) of the network's modules that have tensors."""
        for (node, side), pairs in self.pairs.items():
            path = self.graph.paths.get(node.module) if isinstance(node.module, nn.Module) else None
            if (
                path is None
                or not pairs
                or isinstance(node.module, MultiplicativeNoise)
                or _is_shared(node.module)
            ):
                continue
            if has_own_parameters(node.module) or channels(node.module, side) is not None:
                yield node.module, path, side, pairs

    def selections(self) -> set[nn.Module]:
        """The InputSelection layers behind the root."""
        return {module for module, _, side, _ in self._modules() if _role(module, side) == "selection"}

    def _parameters(self) -> Iterator[tuple[nn.Module, str]]:
        """(owner, path) of parameters that are used outside of layers that the graph knows."""
        for node, _ in self.pairs:
            if isinstance(node.module, nn.Parameter):
                yield self.graph.owner[node.module]

    def noise(self) -> list[MultiplicativeNoise]:
        return [node.module for node, _ in self.pairs if isinstance(node.module, MultiplicativeNoise)]

    def rows(self) -> Iterator[tuple[str, set[int]]]:
        """(path, rows) that are only removed together with the root, unlike the rows of an InputSelection behind it."""
        passed = self.selections()
        for module, path, side, pairs in self._modules():
            if side == ROWS and module not in passed:
                yield path, {index for index, _ in pairs}

    def touched(self) -> Iterator[str]:
        for _, path, _, _ in self._modules():
            yield path
        for _, path in self._parameters():
            yield path

    def mixing(self) -> str | None:
        """Description of a layer that reads all channels at once, so that any removal changes it; None: no layer."""
        for module, path, _, _ in self._modules():
            if isinstance(module, _MIXING):
                return f"normalised together by {path!r}, a {type(module).__name__}"
        for owner, _ in self._parameters():
            if _mixes(owner, self.graph.received.get(owner)):
                path = self.graph.paths[owner]
                return f"read all at once by {path!r}, a {type(owner).__name__}"
        return None

    def reason(self) -> str | None:
        """Why these channels can't be removed because of what the network is; None if they can."""
        if any(side == ROWS and node.grad_fn in self.graph.outputs for node, side in self.pairs):
            return "an output of the network"
        mixing = self.mixing()
        if mixing:
            return mixing
        for module, path, _, _ in self._modules():
            if path in self.graph.shared:
                return f"tied to {path!r}, which shares its weight with another layer"
            if self.graph.calls[module] > 1:
                return f"tied to {path!r}, which is used {self.graph.calls[module]} times in one pass"
        for node, _ in self.pairs:
            for function, _ in getattr(node.grad_fn, "next_functions", ()):
                leaf: Any = getattr(function, "variable", None)
                added = node.module not in self.graph.paths and function_name(node).startswith(("Add", "Sub"))
                if (
                    added
                    and id(leaf) in self.graph.inputs
                    and leaf.shape == node.grad_fn._input_metadata[0].shape
                ):
                    return "added to an input of the network"
        if not any(_role(module, side) == "consumer" for module, _, side, _ in self._modules()):
            return "read by no linear or convolution layer"
        return None

    def not_understood(self) -> tuple[str, str] | None:
        """(path, description) of a layer that can't be cut; None if there is none."""
        if self.runs_away is not None:
            path = self.graph.paths[self.root]
            return path, f"{path!r} is tied to itself in an endless loop, through {self.runs_away}"
        for module, path, side, pairs in self._modules():
            if channels(module, side) is None:
                return path, f"{path!r}, a {type(module).__name__}, is no layer that can be cut"
            for name, _ in selections(module, side):
                wrong = computed(module, name, path)
                if wrong:
                    return path, wrong
            groups = module.groups if isinstance(module, _ConvNd) and not is_depthwise(module) else 1
            if side == ROWS and 1 < groups == channels(module, side):
                return path, f"{path!r} makes one channel in each of its {groups} groups"
            if any(root is None for _, root in pairs) and not self.attention():
                return path, f"{path!r} is tied to channels that can't be followed"
        for owner, path in self._parameters():
            kind = type(owner).__name__
            return path, f"parameter {path!r} of a {kind} is used in a way that can't be followed"
        return None

    def attention(self) -> tuple[str, dict[str, int]] | None:
        """(path, rows of each projection by path) of the attention whose query, key and value these channels are."""
        projections: dict[str, dict[str, int]] = {}
        for module, path, side, _ in self._modules():
            if isinstance(module, nn.Linear) and side == ROWS:
                projections.setdefault(path.rpartition(".")[0], {})[path] = module.out_features
        for parent, rows in projections.items():
            if len(rows) >= 3 and self._heads(parent, rows):
                return parent, rows
        return None

    def _heads(self, parent: str, rows: dict[str, int]) -> int:
        """Number of query heads of the attention at `parent`; 0 if it is unknown."""
        module = self.graph.network.get_submodule(parent)
        for names, divide in ((HEADS, False), (_HEAD_SIZE, True)):
            for name in names:
                number = getattr(module, name, None)
                if isinstance(number, int) and number > 0 and max(rows.values()) % number == 0:
                    return max(rows.values()) // number if divide else number
        return 0

    def group(self, name: str, *, by_hand: bool = False) -> StructureGroup:
        """The structures that can be removed alone, as a group."""
        attention = None if by_hand else self.attention()
        if attention:
            return self._heads_group(*attention)
        unit_of, count = self._units()
        members, counts = [], []
        passed = self.selections()
        for module, path, side, pairs in self._modules():
            role = "between" if side == ROWS and module in passed else _role(module, side)
            found = {(index, unit_of[root]) for index, root in pairs if root is not None}
            members += _members(module, path, role, found)
            counts += _counts(module, path, found)
        kind = "units"
        makers = [module for module, _, side, _ in self._modules() if side == ROWS and module not in passed]
        selections = [module for module in makers if isinstance(module, InputSelection)]
        if selections:
            kind = "positions" if any(map(self.graph.selects_among_made, selections)) else "inputs"
        elif any(isinstance(module, _ConvNd) for module in makers):
            kind = "filters"
        share = len(self.roots) // count
        return StructureGroup(name, count, _ordered(members), share, kind, tuple(counts))

    def _units(self) -> tuple[dict[int, int], int]:
        """(number of the structure by root channel, number of structures)."""
        above = {root: root for root in self.roots}

        def top(root: int) -> int:
            while above[root] != root:
                above[root] = above[above[root]]
                root = above[root]
            return root

        def tie(roots: list[int]) -> None:
            tops = sorted({top(root) for root in roots})
            for other in tops[1:]:
                above[other] = tops[0]

        for module, _, side, pairs in self._modules():
            together: dict[int, list[int]] = {}
            step = 0
            if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
                # every group of filters must keep the same channels
                step = (channels(module, side) or 0) // module.groups
            for index, root in pairs:
                if root is not None:
                    together.setdefault(index % step if step else index, []).append(root)
            for roots in together.values():
                tie(roots)
        numbers: dict[int, int] = {}
        unit_of = {root: numbers.setdefault(top(root), len(numbers)) for root in self.roots}
        return unit_of, len(numbers)

    def _heads_group(self, parent: str, rows: dict[str, int]) -> StructureGroup:
        """Whole heads. Query heads that share a key and a value form one structure."""
        heads = self._heads(parent, rows)
        head_size = max(rows.values()) // heads
        count = min(rows.values()) // head_size  # key heads
        members, counts = [], []
        for module, path, side, _ in self._modules():
            size = channels(module, side)
            assert size is not None
            if count < 1 or size % count or heads % count:
                # not divisible: treated as one structure
                count = 1
            each = size // count
            found = {(index, index // each) for index in range(size)}
            members += _members(module, path, _role(module, side), found)
            counts += _counts(module, path, found)
        module = self.graph.network.get_submodule(parent)
        for names, total in ((HEADS, heads), (KEY_HEADS, count), (HEADS_WIDTH, max(rows.values()))):
            for name in names:
                if getattr(module, name, None) == total and isinstance(getattr(module, name), int):
                    units = torch.arange(total) // (total // count)
                    counts.append(Count(parent, name, total, torch.arange(total), units))
        share = max(rows.values()) // count
        return StructureGroup(parent, count, _ordered(members), share, "heads", tuple(counts))


def _is_shared(module: nn.Module) -> bool:
    """Whether a module has one parameter for all channels. Then it has nothing to cut."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _role(module: nn.Module, side: str) -> str:
    if side == COLUMNS:
        return "selection" if isinstance(module, InputSelection) else "consumer"
    makes = isinstance(module, nn.Linear | nn.Embedding | _ConvNd | InputSelection)
    return "producer" if makes and not is_depthwise(module) else "between"


def _members(module: nn.Module, path: str, role: str, found: set[tuple[int, int]]) -> list[Member]:
    """The tensors of a module that rows or columns, (index, structure) each, stand for."""
    if role == "selection":
        return [Member(path, "index", 0, role, *_tensors(found))]
    if role == "consumer":
        # a grouped convolution numbers the columns within each group
        step = (channels(module, COLUMNS) or 0) // getattr(module, "groups", 1)
        entries = _tensors({(index % step, unit) for index, unit in found})
        return [
            Member(path, name, dim, role, *entries, input_dim=channel_dimension(module))
            for name, dim in selections(module, COLUMNS)
        ]
    return [
        Member(path, name, dim, role if name in ("weight", "index") else "between", *_tensors(found))
        for name, dim in selections(module, ROWS)
    ]


def _counts(module: nn.Module, path: str, found: set[tuple[int, int]]) -> list[Count]:
    """The numbers of a module that do not follow from the shapes of its tensors."""
    if is_depthwise(module):
        name = "groups"
    elif isinstance(module, _NormBase) and not selections(module, ROWS):
        name = "num_features"
    else:
        return []
    return [Count(path, name, getattr(module, name), *_tensors(found))]


def _tensors(found: set[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    indices, units = zip(*sorted(found), strict=True)
    return torch.tensor(indices), torch.tensor(units)


def _ordered(members: list[Member]) -> tuple[Member, ...]:
    order = ("producer", "between", "selection", "consumer")
    return tuple(sorted(members, key=lambda member: order.index(member.role)))


@torch.no_grad()
def _mixes(module: nn.Module, received: Tensor | None) -> bool:
    """Whether a change of one input channel of a module changes another output channel."""
    if received is None or not received.is_floating_point():
        return False
    if received.is_meta:
        return True  # can't be tried: such channels stay
    size = max((parameter.numel() for parameter in module.parameters(recurse=False)), default=0)
    dims = [dim for dim in range(1, received.dim()) if received.shape[dim] == size]
    if not dims or size < 2:
        return False
    x = torch.randn(received.shape, generator=torch.Generator().manual_seed(0)).to(received)
    changed = x.clone()
    changed.select(dims[-1], 0).add_(1.0)
    try:
        before, now = module(x), module(changed)
    except Exception:  # a module with more than one input is not a normalisation
        return False
    if not isinstance(before, Tensor) or before.shape != x.shape:
        return False
    others = torch.arange(1, size, device=x.device)
    return not torch.equal(before.index_select(dims[-1], others), now.index_select(dims[-1], others))
