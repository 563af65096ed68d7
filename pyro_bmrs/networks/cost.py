"""What a network costs: parameters, multiply-accumulates, bytes, milliseconds."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmrs.networks.examples import at_most
from pyro_bmrs.networks.inputs import (
    Inputs,
    batch_size,
    call,
    first_examples,
    map_tensors,
    repeated,
    tensors_of,
)
from pyro_bmrs.networks.modes import in_mode, torch_threads
from pyro_bmrs.networks.noise import MultiplicativeNoise

# Batch sizes at which latency is measured. Memory is measured at the larger one.
BATCHES = (1, 128)
# Timed runs of each network.
_REPEATS = 30


def parameters(network: nn.Module) -> int:
    """Number of parameters. Noise layers have none."""
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_accumulates(network: nn.Module, example_input: Inputs) -> int:
    """Multiply-accumulates of one example, by torch's own operation counter."""
    try:
        return _counted(network, first_examples(example_input, 1))
    except Exception:  # examples may need each other, as the nodes of a graph do
        return _counted(network, example_input) // batch_size(example_input)


def examples_for(network: nn.Module, example_input: Inputs, work: float, least: int, most: int) -> int:
    """How many examples so many multiply-accumulates are enough for, within bounds."""
    each = multiply_accumulates(network, example_input)
    return int(min(max(work / max(each, 1), least), most))


@torch.no_grad()
def _counted(network: nn.Module, inputs: Inputs) -> int:
    return int(_counter(network, inputs).get_total_flops()) // 2


def _counter(network: nn.Module, inputs: Inputs) -> Any:
    inputs = map_tensors(Tensor.detach, inputs)
    counting = FlopCounterMode(display=False, custom_mapping=_FUSED_RECURRENT)
    with _no_gradients(network), _attention_in_steps(), counting as counter:
        call(network, inputs)
    return counter


def _recurrent(steps: Sequence[int], weights: Iterable[Sequence[int]]) -> int:
    """Operations of a recurrent layer, by shapes: each step multiplies by each matrix once; biases have one axis."""
    return 2 * math.prod(steps[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


# Recurrent layers that are computed at once, which the counter does not know: on the CPU and on accelerators.
_FUSED_RECURRENT = {
    torch.ops.aten.mkldnn_rnn_layer: lambda x, of_x, of_state, *_, **__: _recurrent(x, (of_x, of_state)),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
    torch.ops.aten.miopen_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
    torch.ops.aten._lstm_mps: lambda x, _state, weights, *_, **__: _recurrent(x, weights),
}


@torch.no_grad()
def multiply_accumulates_by_entry(network: nn.Module, example_input: Inputs) -> dict[str, float]:
    """By name of a weight: in how many multiply-accumulates of one example each of its entries takes part, on average.

    What is multiplied beside weights, as within attention, is shared by the entries of the weights of that module.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(50, 3))
    >>> multiply_accumulates_by_entry(net, torch.zeros(4, 1, 5, 5))
    {'0.weight': 25.0, '2.weight': 1.0}
    """
    examples = batch_size(example_input)
    counted = {
        name.partition(".")[2]: sum(by_operation.values()) / 2 / examples
        for name, by_operation in _counter(network, example_input).get_flop_counts().items()
        if name != "Global"
    }
    # lists of modules are not called, so what lies in them is part of what holds the list
    own = dict(counted)
    for path in counted:
        above = path
        while above:
            above = above.rpartition(".")[0]
            if above in counted:
                own[above] -= counted[path]
                break
    found: dict[str, float] = {}
    for path, work in own.items():
        matrices = {
            name: parameter.numel()
            for name, parameter in network.named_parameters()
            if parameter.dim() > 1 and name.startswith(f"{path}." if path else "")
        }
        for name in matrices if work > 0 else ():
            found[name] = found.get(name, 0.0) + work / sum(matrices.values())
    return found


@contextmanager
def _no_gradients(network: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient within the context.

    The counter hooks the gradient of each tensor that a module is called with and that asks for one. Where no graph
    is made, a parameter that is handed to a module still asks, and has none.
    """
    asking = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _attention_in_steps() -> Iterator[None]:
    """Attention as matrix products, since the counter does not know the fused kernels."""
    with no_fused_layers(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def no_fused_layers() -> Iterator[None]:
    """Turns off the fast path of torch's attention, on which all is computed at once unless a part was replaced."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def file_bytes(network: nn.Module) -> int:
    """Size in bytes of the network's weights as a safetensors file."""
    from safetensors.torch import save

    return len(save(weights(network)))


def weights(network: nn.Module) -> dict[str, Tensor]:
    """The state_dict as safetensors needs it: on the CPU, each tensor with its own memory."""
    state = network.state_dict().items()
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state
    }


def peak_bytes(network: nn.Module, example_input: Inputs) -> int:
    """Largest number of bytes in use at once in one forward pass: weights, input and intermediate tensors.

    Counted from the tensors that torch's operations return, on any device. Memory that a kernel uses
    while it runs is not counted.
    """
    live = _LiveBytes()
    with torch.no_grad(), no_fused_layers(), live:
        for tensor in (*network.parameters(), *network.buffers(), *tensors_of(example_input)):
            live.watch(tensor)
        call(network, example_input)
    return live.most


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the memory of tensors when they are made, and subtracts it when they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self.known: set[int] = set()

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tensors_of(result):
            self.watch(tensor)
        return result


def latency_milliseconds(
    networks: Sequence[nn.Module],
    example_input: Inputs,
    *,
    repeats: int = _REPEATS,
    seconds: float = math.inf,
) -> list[float]:
    """Median time of one forward pass of each network, in milliseconds; runs are interleaved in one process.

    Measured on this device with torch's current thread count. Compare ratios, not machines.

    Args:
        repeats: timed runs of each network, after one that is not timed.
        seconds: limit for all runs together. If they would take longer, fewer runs are made. If not even three
            fit, the times are NaN.
    """
    times = _latencies(networks, example_input, repeats, seconds)
    return _medians(times) if times else [math.nan] * len(networks)


def _medians(times: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _latencies(
    networks: Sequence[nn.Module], example_input: Inputs, repeats: int, seconds: float
) -> list[list[float]]:
    """The time of each run, a row for all networks; no rows if there is not enough time."""
    devices = {tensor.device for tensor in tensors_of(example_input)}

    def once(network: nn.Module) -> float:
        start = time.perf_counter()
        call(network, example_input)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad():
        expected = 0.0
        for network in networks:
            expected += once(network)
            if 3 * expected > seconds:
                return []
        affordable = min(repeats, int(seconds / expected)) if math.isfinite(seconds) else repeats
        return [[1e3 * once(network) for network in networks] for _ in range(max(affordable, 3))]


def _ratio_error(times: Sequence[Sequence[float]]) -> float:
    """The standard error of the median ratio of the second network's time to the first one's.

    √(π/2) s/√n, with s told from the interquartile range, which is 1.349 s of a normal.
    """
    first, _, third = statistics.quantiles([after / before for before, after in times], n=4)
    return math.sqrt(math.pi / 2 / len(times)) * (third - first) / 1.349


def compare_costs(
    before: nn.Module, after: nn.Module, example_input: Inputs, *, seconds: float = 4.0
) -> pd.DataFrame:
    """Costs of two networks without noise, in columns before and after; and error, of their ratio.

    Rows: parameters, multiply_accumulates (of one example), file_bytes (of the weights as safetensors),
    peak_bytes_batch_128 (weights and activations), and the medians of interleaved runs
    milliseconds_batch_1_one_thread, …_batch_128_one_thread, …_batch_1_all_threads, …_batch_128_all_threads.
    "All threads" is torch's current thread count. On accelerators threads make no
    difference, and only the last two are measured. The error is the standard error of the median of after/before, over
    the runs; 0 for what is counted. Networks with equal counts are timed as one.

    Args:
        example_input: examples; they are repeated to fill the batches.
        seconds: limit for all timings together; 0 for none. What would take longer is NaN.

    Raises:
        ValueError: if a network has noise layers, or seconds is negative.
    """
    for name, network in (("before", before), ("after", after)):
        if any(isinstance(module, MultiplicativeNoise) for module in network.modules()):
            raise ValueError(f"{name} must be a network without noise layers: see pyro_bmrs.without_noise")
    if not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more: got {seconds!r}")
    networks = (before, after)
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors_of(example_input))
    rows: dict[str, list[float]] = {}
    with in_mode(before, training=False), in_mode(after, training=False):
        rows["parameters"] = [parameters(network) for network in networks]
        rows["multiply_accumulates"] = [multiply_accumulates(network, example_input) for network in networks]
        rows["file_bytes"] = [file_bytes(network) for network in networks]
        same = all(one == other for one, other in rows.values())
        timed: dict[str, list[float]] = {}
        # a graph has the size that it has
        batches = batch_size(at_most(before, example_input, 1)) == 1
        for words, count in (("one_thread", 1), ("all_threads", torch.get_num_threads())):
            for batch in BATCHES:
                single = sum(timed.get(f"milliseconds_batch_1_{words}", [0.0])[:2]) / 1e3
                wanted = seconds and batches and (on_cpu or words == "all_threads")
                # a batch takes at least about a quarter of the time of its examples one by one
                times: list[list[float]] = []
                if wanted and 3 * batch * single / 4 <= seconds / 4:
                    with torch_threads(count):
                        examples = repeated(example_input, batch)
                        times = _latencies(networks[: 2 - same], examples, _REPEATS, seconds / 4)
                found = [math.nan] * 3
                if times:
                    found = [*(2 * _medians(times))[:2], 0.0 if same else _ratio_error(times)]
                timed[f"milliseconds_batch_{batch}_{words}"] = found
        largest = BATCHES[-1]
        affordable = not math.isnan(timed[f"milliseconds_batch_{largest}_all_threads"][0])
        rows[f"peak_bytes_batch_{largest}"] = [
            peak_bytes(network, repeated(example_input, largest)) if affordable else math.nan
            for network in networks
        ]
    counted = {name: [*both, 0.0 * both[0]] for name, both in rows.items()}
    return pd.DataFrame.from_dict(counted | timed, orient="index", columns=["before", "after", "error"])
