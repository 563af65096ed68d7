"""One step of a fit: loss, gradient, optimiser; compiled, or replayed as a CUDA graph, where settings say so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from pyro_bmrs.arguments import check
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.fitting.optimizer import step
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.networks.hooked_noise import hooked_noise

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Steps before a graph is captured: kernels are compiled and the optimiser makes its state.
_BEFORE_CAPTURE = 3


def check_step(fabric: Fabric, model: nn.Module, elbo: str, settings: Settings) -> str | None:
    """Why a step of this fit can't be a CUDA graph; None: it can.

    Raises:
        ValueError: if the settings ask for a graph or a compiled network that this fit can't have.
    """
    good = not settings.compile or isinstance(model, Likelihood)
    check(good, "compile", "False for a model that is no Classifier or Regressor", settings.compile)
    obstacle = None
    if fabric.device.type != "cuda":
        obstacle = f"a step can be captured on a CUDA device, and this one is {fabric.device.type}"
    elif fabric.world_size > 1:
        obstacle = "several processes share the gradients"
    elif settings.accumulate > 1:
        obstacle = "gradients are accumulated"
    elif elbo != "fused":
        obstacle = f"the ELBO is {elbo}, and not fused"
    good = settings.cuda_graph != "on" or obstacle is None
    check(good, "cuda_graph", f'"auto" or "off": {obstacle}', settings.cuda_graph)
    return obstacle


class Step:
    """What is done with each batch. Made anew where tensors have changed their shapes; `close` the old one.

    Args:
        fabric: of this process.
        objective: of the fit.
        optimizer: of model and guide.
        settings: of the fit, which `check_step` has passed.
        first: a batch; those of its form are replayed.
        batches: in an epoch.
    """

    def __init__(
        self, fabric: Fabric, objective: Objective, optimizer: torch.optim.Optimizer, settings: Settings,
        first: tuple[Any, Any], batches: int,
    ) -> None:  # fmt: skip
        self.fabric, self.optimizer, self.settings, self.batches = fabric, optimizer, settings, batches
        # several processes share the gradients
        self.module: nn.Module = (
            objective if fabric.world_size == 1 else fabric.strategy.setup_module(objective)
        )
        self.network = _compiled_network(objective.model) if settings.compile else None
        self.graph: Replayed | None = None
        if (
            settings.cuda_graph != "off"
            and check_step(fabric, objective.model, objective.elbo, settings) is None
        ):
            self.noise = [*hooked_noise(objective.model).values()]
            self.graph = Replayed(
                self._alone, first, Capture(fabric.device), required=settings.cuda_graph == "on"
            )

    def close(self) -> None:
        """Give the graph and its memory back."""
        self.graph = None

    def __call__(self, x: Any, y: Any, kl_weight: float, weight: float, done: int) -> Tensor:
        """Take a batch; returns (loss, log-likelihood) per example in nats, on the device, nothing waited for.

        Args:
            x, y: the batch.
            kl_weight: of the KL.
            weight: of its gradient among those of all processes.
            done: batches of the epoch that come before it.
        """
        if self.graph is not None:
            return self.graph(x, y, kl_weight)
        accumulate = self.settings.accumulate
        begun = done // accumulate * accumulate  # an epoch may end with fewer
        due = done + 1 == self.batches or (done + 1) % accumulate == 0
        return self._run(x, y, kl_weight, weight, min(accumulate, self.batches - begun), due=due)

    def _alone(self, x: Any, y: Any, kl_weight: float | Tensor) -> Tensor:
        """A whole step by one batch, after which nothing of its graph is left."""
        values = self._run(x, y, kl_weight, 1.0, 1, due=True)
        for noise in self.noise:
            noise.drawn = {}
        return values

    def _run(
        self, x: Any, y: Any, kl_weight: float | Tensor, weight: float, parts: int, *, due: bool
    ) -> Tensor:
        with self.fabric.autocast(), _compiled(self.network):
            loss, likelihood = self.module(x, y, kl_weight)
        share = weight / parts
        scaled = loss if share == 1 else loss * share
        if due or self.fabric.world_size == 1:
            scaled.backward()
        else:
            with self.module.no_sync():  # type: ignore[operator]
                scaled.backward()
        if due:
            step(self.optimizer, self.settings.gradient_clip)
        return torch.stack([loss.detach(), likelihood])


class Replayed:
    """Runs a function of batches as one graph, for batches of the form of the first one; any others as they are.

    Where the graph can't be made, all run as they are.

    Args:
        run: of (x, y, kl_weight).
        first: a batch (x, y).
        capture: runs a function beside what else is done, and makes it a graph.
        required: whether it is an error if no graph can be made.
    """

    def __init__(
        self, run: Callable[[Any, Any, float | Tensor], Tensor], first: tuple[Any, Any], capture: Capture, *,
        required: bool,
    ) -> None:  # fmt: skip
        self.run, self.capture, self.required, self.before = run, capture, required, _BEFORE_CAPTURE
        self.form = _form(first)
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, x: Any, y: Any, kl_weight: float) -> Tensor:
        if self.form is None or _form((x, y)) != self.form:
            return self.run(x, y, kl_weight)
        if self.before:
            self.before -= 1
            return self.capture.aside(lambda: self.run(x, y, kl_weight))
        tensors = tree_leaves((x, y))
        if self.replay is None:
            # what a graph reads stays where it is
            self.places = [tensor.clone() for tensor in tensors]
            self.kl_weight = torch.tensor(kl_weight, device=tensors[0].device)
            try:
                own_x, own_y = tree_unflatten(self.places, tree_structure((x, y)))
                self.replay = self.capture.graph(lambda: self.run(own_x, own_y, self.kl_weight))
            except Exception as error:
                if self.required:
                    raise RuntimeError(
                        f'this step can\'t be a CUDA graph, pass cuda_graph="off": {error}'
                    ) from error
                warnings.warn(
                    f"steps are not replayed as a CUDA graph, which slows small networks: {error}",
                    stacklevel=2,
                )
                self.form = None
                return self.run(x, y, kl_weight)
        for place, tensor in zip(self.places, tensors, strict=True):
            place.copy_(tensor)
        self.kl_weight.fill_(kl_weight)
        return self.replay().clone()  # the next replay overwrites it


def _form(batch: tuple[Any, Any]) -> tuple[Any, ...] | None:
    """What a graph is made for; None: something in the batch is no tensor, and a graph would not see it change."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tree_structure(batch), *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


class Capture:
    """Makes CUDA graphs, on a stream of its own, as CUDA asks for."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def aside(self, run: Callable[[], Tensor]) -> Tensor:
        """Run on the stream: kernels are compiled there, and the optimiser makes its state."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = run()
        current.wait_stream(self.stream)
        return result

    def graph(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The function as a graph: nothing is done now, and each call of what is returned does it."""
        graph = torch.cuda.CUDAGraph()
        # The outer context goes back to the caller's stream, also from a capture that failed. Other threads, such as
        # one that pins memory, do not spoil it.
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def _compiled_network(model: nn.Module) -> tuple[nn.Module, Any]:
    """The network of a model, and its compiled call."""
    assert isinstance(model, Likelihood)
    options: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True  # else other fits of this process count as well, up to a limit
    return model.net, torch.compile(model.net._call_impl, **options)


@contextmanager
def _compiled(network: tuple[nn.Module, Any] | None) -> Iterator[None]:
    """A context in which the network is compiled. Evaluation in between takes it as it is."""
    if network is None:
        yield
        return
    module, call = network
    module._compiled_call_impl = call
    try:
        yield
    finally:
        del module._compiled_call_impl
