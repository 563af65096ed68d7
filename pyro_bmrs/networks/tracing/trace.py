"""One pass of a network in which every operation is followed on the labels of its activations."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_bmrs.networks.cost import no_fused_layers
from pyro_bmrs.networks.cuts import RootMeanSquare
from pyro_bmrs.networks.inputs import Inputs, batch_size, call, tensors_of
from pyro_bmrs.networks.noise import MultiplicativeNoise, at_one
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.tracing.labels import (
    NONE,
    Classes,
    LabelMemory,
    Labels,
    Marked,
    distinct,
    varies,
    without_constant_axes,
)
from pyro_bmrs.networks.tracing.noted import Meeting, Noted, Parameter, Pending
from pyro_bmrs.networks.tracing.root_mean_square import root_mean_square
from pyro_bmrs.networks.tracing.tagged import SizesSeen, TaggedInt, tagged_integers


class Trace(TorchDispatchMode):
    """Follows one forward pass.

    Args:
        network: in evaluation mode; not changed.
        example: what it is called with.
        through_layer_norms: whether channels are followed through LayerNorms as if these did not mix them.
    """

    def __init__(self, network: nn.Module, example: Inputs, *, through_layer_norms: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network, self.example, self.examples = network, example, batch_size(example)
        self.classes, self.memory, self.noted = Classes(), LabelMemory(), Noted()
        self.paths: dict[nn.Module, str] = {}
        for path, module in network.named_modules():
            self.paths.setdefault(module, path)
        self.parameters: dict[str, Parameter] = {}
        self._at: dict[int, list[Parameter]] = {}
        for path, module in network.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if (tensor is not None and tensor.dim() and tensor.is_floating_point()) or (
                    tensor is not None and isinstance(module, InputSelection)
                ):
                    self._add(Parameter(path, name, tensor))
        # atoms of rows or columns, by name and dimension; of entries, by name
        self.lines: dict[tuple[str, int], Tensor] = {}
        self.entries: dict[str, Tensor] = {}
        # by atom: whether it is an entry's
        self._is_entry = torch.zeros(1, dtype=torch.bool)
        self.numbers = torch.randn(4099, generator=torch.Generator().manual_seed(0))
        self.stack: list[nn.Module] = []
        self.received: dict[nn.Module, Tensor] = {}
        # memory that holds what follows from inputs, and entries of parameters in other places
        self.from_inputs, self.moved = Marked(), Marked()
        self._root_mean_squares: dict[nn.Module, RootMeanSquare | None] = {}
        self._through_layer_norms = through_layer_norms
        self._silent = 0

    def _add(self, parameter: Parameter) -> None:
        key = parameter.tensor.untyped_storage()._cdata
        if all(other.tensor is not parameter.tensor for other in self._at.get(key, ())):
            self._at.setdefault(key, []).append(parameter)
            self.parameters[parameter.key] = parameter

    # ------------------------------------------------------------------------------------------ the pass

    def run(self) -> None:
        """Call the network in evaluation mode and follow it."""
        for tensor in tensors_of(self._call()):
            self.pin(self.labels(tensor), "an output of the network")

    def run_in_training(self, alone: AbstractSet[str]) -> None:
        """Call the network in training mode too. What the modules `alone`, which run in no other, read stays."""
        handles = []
        self.noted.in_training |= alone
        for path in alone:

            def pin(_: nn.Module, given: tuple[Any, ...], words: dict[str, Any], path: str = path) -> None:
                for tensor in tensors_of((given, words)):
                    self.pin(self.labels(tensor), f"read by {path!r}, which runs in training alone")

            handles.append(
                self.network.get_submodule(path).register_forward_pre_hook(_unfollowed(pin), with_kwargs=True)
            )
        self.network.train()
        try:
            self._call()
        finally:
            self.network.eval()
            for handle in handles:
                handle.remove()

    def _call(self) -> Any:
        from pyro_bmrs.networks.tracing.operations import follow

        self._follow = follow
        for tensor in tensors_of(self.example):
            self.from_inputs.add(tensor)
        handles = []
        for module in self.network.modules():
            handles.append(module.register_forward_pre_hook(_unfollowed(self._enter), with_kwargs=True))
            handles.append(module.register_forward_hook(_unfollowed(self._leave), always_call=True))
        self.stack.clear()
        try:
            with (
                torch.no_grad(), torch.random.fork_rng(), at_one(self.network), no_fused_layers(),
                sdpa_kernel(SDPBackend.MATH), tagged_integers(self.network), self,
                SizesSeen(self.note_size, self.note_parts),
            ):  # fmt: skip
                torch.manual_seed(0)
                return call(self.network, self.example)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.stack.append(module)
        self.noted.calls[self.paths[module]] += 1
        given = tensors_of((arguments, keywords))
        if given:
            self.received[module] = given[0]
            if not given[0].dim() or given[0].shape[0] != self.examples:
                self.noted.folded.add(self.paths[module])
        if self._is_whole(module):
            self._silent += 1
            self.noted.used.update(map(id, module.parameters()))

    def _is_whole(self, module: nn.Module) -> bool:
        """Whether a module is followed as one operation."""
        if isinstance(module, InputSelection | MultiplicativeNoise | nn.RNNBase):
            return True
        if module not in self._root_mean_squares:
            x = self.received.get(module)
            path = self.paths[module]
            found = None if x is None else root_mean_square(module, x, path)
            if (
                self._through_layer_norms
                and isinstance(module, nn.LayerNorm)
                and len(module.normalized_shape) == 1
            ):
                found = RootMeanSquare(path, "weight", 0, "eps") if module.weight is not None else None
            self._root_mean_squares[module] = found
        return self._root_mean_squares[module] is not None

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self.stack and self.stack[-1] is module:
            self.stack.pop()
        if not self._is_whole(module):
            return
        self._silent -= 1
        if not isinstance(output, Tensor | tuple):
            return
        path = self.paths[module]
        if isinstance(module, nn.RNNBase):
            reason = f"a recurrent {type(module).__name__}, which is not cut"
            self.noted.recurrent[path] = reason
            for tensor in tensors_of(arguments):
                self.pin(self.labels(tensor), f"read by {path!r}, {reason}", path=path)
            return
        assert isinstance(output, Tensor)
        x = self.received[module]
        labels = self.labels(x)
        norm = self._root_mean_squares.get(module)
        if norm is not None:
            self._leave_norm(norm, labels, output)
            return
        if isinstance(module, MultiplicativeNoise):
            dim = module.dim if hasattr(module, "dim") else 1
            one = labels[0] if labels[0] is not None else torch.zeros((), dtype=torch.int32)
            self.noted.noise[path] = self.along(one.expand(x.shape), dim)
            self.memory.write(output, labels)
            return
        assert isinstance(module, InputSelection)
        shape = [1] * output.dim()
        shape[module.dim] = -1
        atoms = self.line(self.parameters[f"{path}.index".lstrip(".")], 0)
        before = self.along(self._or_none(labels[0], x), module.dim)
        # on the meta device values can't be read, but the first ones are known
        index = torch.arange(module.features) if module.index.is_meta else module.index.cpu().long()
        self.noted.selected[path] = (atoms, before[index], before)
        self.memory.write(output, (atoms.view(shape).expand(output.shape), *NONE[1:]))

    def _leave_norm(self, norm: RootMeanSquare, labels: Labels, output: Tensor) -> None:
        """A root mean square over channels mixes them, but for those that are 0."""
        module = self.network.get_submodule(norm.path)
        for some in labels:
            if some is not None:
                small, _ = without_constant_axes(some)
                for tensor in module.parameters(recurse=False):
                    (own, *_) = self.labels(tensor)
                    assert own is not None
                    self.noted.meetings.append(Meeting(own, small.clone(), frozenset({small.dim() - 1})))
                    if tensor is not module.get_parameter(
                        norm.name
                    ):  # a bias: what reads a channel of 0 reads it
                        self.note_added(own, norm.path)
                self.noted.norms.append((norm, small.clone()))
        self.memory.write(output, labels)

    def along(self, labels: Tensor, dim: int) -> Tensor:
        """Labels along one dimension. They are united across the others."""
        merged = self.merge(labels, [d for d in range(labels.dim()) if d != dim % labels.dim()])
        return merged.expand(
            *[labels.shape[d] if d == dim % labels.dim() else 1 for d in range(labels.dim())]
        ).flatten()

    def _or_none(self, labels: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int32).expand(like.shape) if labels is None else labels

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return self._follow(self, function, args, kwargs)

    # ------------------------------------------------------------------------------------ labels and classes

    def labels(self, tensor: Tensor) -> Labels:
        """Labels of each entry, those of parameters included."""
        parameter = self.parameter(tensor)
        if parameter is not None and not self.memory.has(tensor):
            self._label_entries(parameter)
        return self.memory.read(tensor)

    def parameter(self, tensor: Tensor) -> Parameter | None:
        """The parameter that a tensor is, or is a view of."""
        if tensor.layout != torch.strided:
            return None
        found = self._at.get(tensor.untyped_storage()._cdata, ())
        if not found or tensor.dtype != found[0].tensor.dtype:
            return None
        start = tensor.storage_offset()
        for parameter in found:
            first = parameter.tensor.storage_offset()
            if first <= start < first + max(parameter.tensor.numel(), 1):
                return parameter
        return None

    def note_used(self, tensors: list[Tensor]) -> None:
        """Remember the parameters among the tensors of an operation."""
        for tensor in tensors:
            parameter = self.parameter(tensor)
            if parameter is not None:
                self.noted.used.add(id(parameter.tensor))

    def source(self, tensor: Tensor) -> Parameter | None:
        """The parameter whose entries a tensor holds, as a view or moved to other places."""
        if tensor not in self.moved:
            return self.parameter(tensor)
        (labels, *_) = self.memory.read(tensor)
        if labels is None:
            return None
        first = int(labels.flatten()[0])
        for key, atoms in self.entries.items():
            if int(atoms.min()) <= first <= int(atoms.max()):
                return self.parameters[key]
        return None

    def _label_entries(self, parameter: Parameter) -> None:
        atoms = self.classes.new(parameter.tensor.numel())
        self._note_kind(atoms, entries=True)
        # one for each place in memory, so that any view of the parameter finds its own
        shaped = (
            atoms.as_strided(parameter.tensor.shape, parameter.tensor.stride())
            if _is_dense(parameter.tensor)
            else atoms.view(parameter.tensor.shape)
        )
        self.entries[parameter.key] = shaped
        self.memory.write(parameter.tensor, (shaped, *NONE[1:]))

    def line(self, parameter: Parameter, dim: int) -> Tensor:
        """The atoms of a parameter's entries along a dimension."""
        key = parameter.key, dim
        if key not in self.lines:
            self.lines[key] = self.classes.new(parameter.tensor.shape[dim])
            self._note_kind(self.lines[key], entries=False)
        return self.lines[key]

    def _note_kind(self, atoms: Tensor, *, entries: bool) -> None:
        if len(self._is_entry) < self.classes.count:
            more = torch.zeros(2 * self.classes.count - len(self._is_entry), dtype=torch.bool)
            self._is_entry = torch.cat([self._is_entry, more])
        self._is_entry[atoms] = entries

    def are_entries(self, labels: Tensor) -> bool:
        """Whether labels are numbers of a parameter's own entries, not of structures that some layer makes."""
        small = without_constant_axes(labels)[0]
        own = self._is_entry[small]
        return bool(own.any()) and bool((own | (small == 0)).all())

    def unite(self, first: Tensor | None, second: Tensor | None) -> None:
        if first is not None and second is not None:
            self.classes.unite(first, second)

    def varying(self, labels: Tensor) -> list[int]:
        """The axes along which classes differ."""
        found = self.classes.find(labels)
        return [axis for axis in range(found.dim()) if varies(found, axis)]

    def merge(self, labels: Tensor, axes: list[int], reason: str | None = None) -> Tensor:
        """Unite labels along some axes. Returns them with size 1 there."""
        if not axes or not labels.dim():
            return labels
        small, _ = without_constant_axes(labels)
        axes = [axis % labels.dim() for axis in axes]
        rest = [axis for axis in range(labels.dim()) if axis not in axes]
        lines = small.permute(*rest, *axes).reshape(*[small.shape[axis] for axis in rest], -1)
        first = lines.amax(-1, keepdim=True)
        if self.classes.unite(first, lines) and reason:
            changed = first[lines.amin(-1, keepdim=True) != first]
            self.noted.merged += [(atom, reason) for atom in distinct(self.classes.find(changed)) if atom]
        shape = [1 if axis in axes else small.shape[axis] for axis in range(labels.dim())]
        back = first.squeeze(-1).reshape([small.shape[axis] for axis in rest] + [1] * len(axes))
        order = [*rest, *axes]
        if reason and bool(back.all()):
            self.noted.filled.append(torch.tensor(distinct(back), dtype=torch.int32))
        merged = back.permute([order.index(axis) for axis in range(labels.dim())]).reshape(shape)
        return merged.expand([1 if axis in axes else labels.shape[axis] for axis in range(labels.dim())])

    def reduced(self, labels: Tensor, axes: list[int], reason: str) -> Tensor:
        """Labels of a reduction over some axes: with size 1 there."""
        small, _ = without_constant_axes(labels)
        if self.are_entries(small) or not any(varies(self.classes.find(small), axis) for axis in axes):
            return self.merge(labels, axes, reason)
        shape = [1 if axis in axes else size for axis, size in enumerate(small.shape)]
        result = self.classes.new(prod(shape)).view(shape)
        self._note_kind(result.flatten(), entries=False)
        self.noted.pending.append(Pending(small.clone(), tuple(axes), reason, result))
        return result.expand([1 if axis in axes else size for axis, size in enumerate(labels.shape)])

    def is_pending(self, labels: Tensor) -> bool:
        """Whether labels are those of reductions that may still be without use. From now on they are used."""
        atoms = set(distinct(labels)) - {0}
        results = {atom for pending in self.noted.pending for atom in distinct(pending.result)}
        self.noted.results_used |= atoms & results
        return bool(atoms) and atoms <= results

    def pin(self, labels: Labels, reason: str, unsupported: bool = False, path: str | None = None) -> None:
        """Structures with these labels stay, because of what runs here, or in the module at `path`."""
        here = self.here if path is None else path
        for some in labels:
            if some is not None:
                atoms = distinct(self.classes.find(without_constant_axes(some)[0]))
                self.noted.pinned += [(atom, reason, unsupported, here) for atom in atoms if atom]

    def pin_unknown(self, name: str, tensors: list[Tensor]) -> None:
        """Structures that an operation without a rule reads stay."""
        for tensor in tensors:
            self.pin(
                self.labels(tensor),
                f"read by {name} in {self.by()}, which can't be followed",
                unsupported=True,
            )

    def note_heads(self, labels: Tensor) -> None:
        """Remember structures that activations multiplied with one another consist of."""
        found = distinct(self.classes.find(without_constant_axes(labels)[0]))
        self.noted.heads.update(atom for atom in found if atom)

    def note_added(self, labels: Tensor, path: str | None = None) -> None:
        """Remember that the running module, or that at `path`, adds a parameter, with these entries, to structures."""
        first = int(labels.max())
        for key, atoms in self.entries.items():
            if int(atoms.min()) <= first <= int(atoms.max()):
                self.noted.added.setdefault(key, set()).add(self.here if path is None else path)

    def note_box(self, labels: Labels) -> None:
        """Remember labels that depend on several axes: what is removed must leave a box."""
        for some in labels:
            if some is not None:
                small, count = without_constant_axes(some)
                # a parameter's own entries have to form a box where they are stored
                if count > 1 and not self.are_entries(small):
                    found = self.classes.find(small)
                    if sum(varies(found, axis) for axis in range(found.dim())) > 1:
                        self.noted.boxes.append(small.squeeze().clone())

    # ------------------------------------------------------------------------------------------- words

    @property
    def here(self) -> str:
        """Path of the module that runs."""
        return self.paths[self.stack[-1]] if self.stack else ""

    def by(self) -> str:
        """The module that runs, in words."""
        module = self.stack[-1] if self.stack else self.network
        return f"{self.paths[module] or '(itself)'!r}, a {type(module).__name__}"

    # ------------------------------------------------------------------------------ integers of modules

    def note_size(self, tensor: Tensor, axis: int, tag: TaggedInt) -> None:
        """Remember that an integer made from attributes of modules is the size of a tensor along an axis."""
        with _disable_current_modes():
            if self._silent or not (self.memory.has(tensor) or self.parameter(tensor) is not None):
                return
            for some in self.labels(tensor):
                if some is None:
                    continue
                small, _ = without_constant_axes(some)
                if small.shape[axis] != int(tag):
                    continue
                lines = small.movedim(axis, 0)
                for path, name, value in tag.sources:
                    if int(tag) % value == 0:
                        own = self.here if path is None else path
                        self.note_count(own, name, lines.reshape(value, -1), whole=int(tag) == value)

    def note_parts(self, parts: list[Tensor]) -> None:
        """Equal parts of a tensor stay equal when each loses what stands in the same place."""
        with _disable_current_modes():
            if not self._silent:
                first = self.labels(parts[0])
                for other in parts[1:]:
                    for one, two in zip(first, self.labels(other), strict=True):
                        self.unite(one, two)

    def note_count(self, path: str, name: str, labels: Tensor, *, whole: bool = True) -> None:
        """labels: (size, …)."""
        known = self.noted.counted.setdefault((path, name), [])
        if not any(labels.shape == other.shape and torch.equal(labels, other) for other, _ in known):
            known.append((labels.clone(), whole))


def _unfollowed(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook whose own operations are not followed."""

    def quiet(*arguments: Any) -> None:
        with _disable_current_modes():
            hook(*arguments)

    return quiet


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's entries fill its memory without gaps, in some order of its dimensions."""
    size = 1
    for axis in sorted(range(tensor.dim()), key=tensor.stride):
        if tensor.shape[axis] > 1:
            if tensor.stride(axis) != size:
                return False
            size *= tensor.shape[axis]
    return True
