"""One step of a fit: loss, gradient, optimiser; compiled, or replayed as a CUDA graph, where settings say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_bmrs.arguments import check
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.fitting.optimizer import step
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.networks.inputs import map_tensors, tensors_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Steps before a graph is captured: kernels are compiled and the optimiser makes its state.
_BEFORE_CAPTURE = 3


class Step:
    """What is done with each batch. Made anew where tensors have changed their shapes.

    Args:
        fabric: of this process.
        objective: of the fit.
        optimizer: of model and guide.
        settings: of the fit.
        batches: in an epoch.

    Raises:
        ValueError: if the settings ask for a CUDA graph or a compiled network that this fit can't have.
    """

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        batches: int,
    ) -> None:
        self.fabric, self.optimizer, self.settings, self.batches = fabric, optimizer, settings, batches
        # several processes share the gradients
        self.module: nn.Module = (
            objective if fabric.world_size == 1 else fabric.strategy.setup_module(objective)
        )
        self.network = _compiled_network(objective.model) if settings.compile else None
        obstacle = self._against_a_graph(objective)
        good = settings.cuda_graph != "on" or obstacle is None
        check(good, "cuda_graph", f'"auto" or "off": {obstacle}', settings.cuda_graph)
        self.graph = None
        if settings.cuda_graph != "off" and obstacle is None:
            self.graph = Replayed(
                lambda x, y, kl_weight: self._run(x, y, kl_weight, 1.0, 1, due=True), captured
            )

    def _against_a_graph(self, objective: Objective) -> str | None:
        """Why a step can't be captured."""
        if self.fabric.device.type != "cuda":
            return f"a step can be captured on a CUDA device, and this one is {self.fabric.device.type}"
        if self.fabric.world_size > 1:
            return "several processes share the gradients"
        if self.settings.accumulate > 1:
            return "gradients are accumulated"
        if objective.elbo != "fused":
            return f"the ELBO is {objective.elbo}, and not fused"
        return None

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

    Args:
        run: of (x, y, kl_weight).
        capture: of a function without arguments: makes its graph and runs nothing; gives what replays it.
    """

    def __init__(
        self,
        run: Callable[[Any, Any, float | Tensor], Tensor],
        capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]],
    ) -> None:
        self.run, self.capture, self.before = run, capture, _BEFORE_CAPTURE
        self.form: list[tuple[torch.Size, torch.dtype]] = []
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, x: Any, y: Any, kl_weight: float) -> Tensor:
        form = [(tensor.shape, tensor.dtype) for tensor in (*tensors_of(x), *tensors_of(y))]
        self.form = self.form or form
        if form != self.form:
            return self.run(x, y, kl_weight)
        if self.before:
            self.before -= 1
            return _aside(lambda: self.run(x, y, kl_weight), tensors_of(y)[0].device)
        if self.replay is None:
            # what a graph reads stays where it is
            self.x, self.y = (map_tensors(torch.clone, part) for part in (x, y))
            self.kl_weight = torch.full((), kl_weight, device=tensors_of(y)[0].device)
            self.replay = self.capture(lambda: self.run(self.x, self.y, self.kl_weight))
        for place, tensor in zip(
            (*tensors_of(self.x), *tensors_of(self.y)), (*tensors_of(x), *tensors_of(y)), strict=True
        ):
            place.copy_(tensor)
        self.kl_weight.fill_(kl_weight)
        return self.replay().clone()  # the next replay overwrites it


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function as a CUDA graph: returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _aside(run: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run on another stream than the default one, as CUDA asks for what is captured later."""
    if device.type != "cuda":
        return run()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return result


def _compiled_network(model: nn.Module) -> tuple[nn.Module, Any]:
    """The network of a model, and its compiled call."""
    good = isinstance(model, Likelihood)
    check(good, "compile", "False for a model that is no Classifier or Regressor", True)
    assert isinstance(model, Likelihood)
    return model.net, torch.compile(model.net._call_impl)


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
