"""Writing the small network for other programs."""

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
    """Write the network's state_dict as safetensors."""
    from safetensors.torch import save_file

    return write_atomically(path, lambda beside: save_file(weights(network), beside))


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(path)
    return state


def export_program(network: nn.Module, example_input: Inputs, path: Path | str) -> Path:
    """Write `network` as a torch.export program with any batch size: `torch.export.load(path).module()(x)`.

    Such a file can hold code: load it only from people you trust.

    Args:
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments. Each tensor in it
            with one entry per example gets a dynamic first dimension.
    """
    arguments, keywords, shapes = _export_arguments(network, example_input)
    with torch.no_grad(), in_mode(network, training=False):
        program = torch.export.export(network, arguments, keywords, dynamic_shapes=shapes)
    return write_atomically(path, lambda beside: torch.export.save(program, beside))


def export_onnx(
    network: nn.Module, example_input: Inputs, path: Path | str, *, tolerance: float = 1e-5
) -> Path:
    """Write `network` as an ONNX file with any batch size, checked by onnxruntime. Needs the extra `onnx`.

    >>> import onnxruntime  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("small.onnx")  # doctest: +SKIP
    >>> logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})  # doctest: +SKIP

    Args:
        example_input: as for `export_program`.
        tolerance: allowed difference of outputs; relative to the largest output if that is above 1.

    Raises:
        ImportError: naming the extra, if onnx, onnxscript or onnxruntime is not installed.
        ValueError: if the outputs of onnxruntime and of the network differ, on the examples or on one of
            them alone. Then nothing is written.
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
                    finite = want.isfinite()  # infinities of a mask are compared below
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
    """(positional arguments, keyword arguments, dynamic dimensions) of two examples."""
    # from a batch of one, export would conclude that the batch size is always one
    example = map_tensors(lambda tensor: tensor.contiguous(), repeated(example_input, 2))
    size = batch_size(example)
    # without a maximum, torch 2.6 finds that the batch size must not be 2**63 - 1, and refuses
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
