"""Writing the small network where other programs can use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.files import write_atomically
from pyro_bmrs.networks.cost import weights
from pyro_bmrs.networks.inputs import (
    Inputs,
    batch_size,
    call,
    first_examples,
    map_tensors,
    repeated,
    takes_keywords,
    tensors_of,
)
from pyro_bmrs.networks.modes import in_mode


def save_weights(network: nn.Module, path: Path | str) -> Path:
    """The network's state_dict as safetensors."""
    from safetensors.torch import save_file

    return write_atomically(path, lambda beside: save_file(weights(network), beside))


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(path)
    return state


def export_program(network: nn.Module, example_input: Inputs, path: Path | str) -> Path:
    """`network` as a torch.export program with a dynamic batch: `torch.export.load(path).module()(x)`.

    The one file of a run that torch reads with pickle inside: load it only from whom you trust.

    Args:
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments; every tensor in it
            that has as many entries as there are examples gets a dynamic first dimension.
    """
    arguments, keywords, shapes = _export_arguments(network, example_input)
    with torch.no_grad(), in_mode(network, training=False):
        program = torch.export.export(network, arguments, keywords, dynamic_shapes=shapes)
    return write_atomically(path, lambda beside: torch.export.save(program, beside))


def export_onnx(
    network: nn.Module, example_input: Inputs, path: Path | str, *, tolerance: float = 1e-5
) -> Path:
    """`network` as an ONNX file with a dynamic batch, checked by onnxruntime. Needs the extra `onnx`.

    >>> import onnxruntime  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("small.onnx")  # doctest: +SKIP
    >>> logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})  # doctest: +SKIP

    Args:
        example_input: as for `export_program`.
        tolerance: allowed difference of outputs, relative to the largest output where that is above 1.

    Raises:
        ImportError: naming the extra, if onnx, onnxscript or onnxruntime is not installed.
        ValueError: if onnxruntime computes something else than the network, on the examples or on one of
            them alone; nothing is written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 what torch.onnx.export needs
    except ImportError as error:
        raise ImportError(
            f"export to ONNX needs the extra: pip install 'pyro-bmrs[onnx]' ({error})"
        ) from error

    arguments, keywords, shapes = _export_arguments(network, example_input)

    def write(beside: Path) -> None:
        with torch.no_grad(), in_mode(network, training=False):
            torch.onnx.export(
                network, arguments, str(beside), kwargs=keywords or None, dynamo=True, dynamic_shapes=shapes,
                external_data=False, verbose=False,
            )  # fmt: skip
            session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
            for examples in (example_input, first_examples(example_input, 1)):
                wanted = tensors_of(call(network, examples))
                names = [entry.name for entry in session.get_inputs()]
                feed = dict(zip(names, (t.cpu().numpy() for t in tensors_of(examples)), strict=True))
                for index, (have, want) in enumerate(zip(session.run(None, feed), wanted, strict=True)):
                    found, want = torch.from_numpy(have).double(), want.cpu().double()
                    finite = want.isfinite()  # a mask's infinities are no difference
                    difference = float((found - want)[finite].abs().max()) if bool(finite.any()) else 0.0
                    if not torch.equal(found[~finite], want[~finite]):
                        difference = math.inf
                    allowed = tolerance * max(
                        1.0, float(want[finite].abs().max()) if bool(finite.any()) else 1.0
                    )
                    if not difference <= allowed:
                        raise ValueError(
                            f"network must export to ONNX unchanged: output {index} differs by {difference:.3e} "
                            f"(allowed: {allowed:.3e})"
                        )

    return write_atomically(path, write)


def _export_arguments(
    network: nn.Module, example_input: Inputs
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments of two examples, and which dimensions are dynamic."""
    # of a batch of one, export would conclude that the batch is always one
    example = map_tensors(lambda tensor: tensor.contiguous(), repeated(example_input, 2))
    size = batch_size(example)
    # without a largest, torch 2.6 finds that the batch must not be 2**63 - 1, and refuses
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() and value.shape[0] == size else None
        if isinstance(value, Mapping):
            return {key: dynamic(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(dynamic(item) for item in value)
        return None

    if takes_keywords(network, example):
        return (), dict(example), {key: dynamic(item) for key, item in example.items()}
    arguments = example if isinstance(example, tuple) else (example,)
    return arguments, {}, tuple(dynamic(item) for item in arguments)
