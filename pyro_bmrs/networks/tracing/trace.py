"""One pass of a network in which every operation is followed on the labels of its activations."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
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
    Labels,
    or_zeros,
    without_constant_axes,
)
from pyro_bmrs.networks.tracing.ledger import Ledger
from pyro_bmrs.networks.tracing.noted import Meeting
from pyro_bmrs.networks.tracing.operations import follow
from pyro_bmrs.networks.tracing.root_mean_square import root_mean_square
from pyro_bmrs.networks.tracing.tagged import SizesSeen, tagged_integers


class Trace(Ledger, TorchDispatchMode):
    """Follows one forward pass.

    Args:
        network: in evaluation mode; not changed.
        example: what it is called with.
        through_layer_norms: whether channels are followed through LayerNorms as if these did not mix them.
    """

    def __init__(self, network: nn.Module, example: Inputs, *, through_layer_norms: bool = False) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]
        Ledger.__init__(self, network)
        self.example, self.examples = example, batch_size(example)
        self._root_mean_squares: dict[nn.Module, RootMeanSquare | None] = {}
        self._through_layer_norms = through_layer_norms

    @property
    def again(self) -> AbstractContextManager[Any]:
        return self

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
        self.noted.called.add(self.paths[module])
        given = tensors_of((arguments, keywords))
        if given:
            self.received[module] = given[0]
            if not given[0].dim() or given[0].shape[0] != self.examples:
                self.noted.folded.add(self.paths[module])
        if self._is_whole(module):
            self.silent += 1
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
        self.silent -= 1
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
        before = self.along(or_zeros(labels[0], x), module.dim)
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

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return follow(self, function, args, kwargs)


def _unfollowed(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook whose own operations are not followed."""

    def quiet(*arguments: Any) -> None:
        with _disable_current_modes():
            hook(*arguments)

    return quiet
