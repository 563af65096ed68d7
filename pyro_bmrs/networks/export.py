"""Writing the small network for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_number
from pyro_bmrs.files import write_atomically
from pyro_bmrs.networks.copies import uncompiled
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

# Allowed difference between onnxruntime and torch, by the network's precision. Sums are taken in another order,
# so float32 and float16 get some of their roundings (1.2e-7 and 9.8e-4). What float64 is allowed tells rounding
# from an operation that was computed in float32. From the finest to the coarsest.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}


def save_weights(network: nn.Module, path: Path | str) -> Path:
    """Write the network's state_dict as safetensors."""
    from safetensors.torch import save_file

    return write_atomically(path, lambda beside: save_file(weights(network), beside))


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(path)
    return state


def export_program(
    network: nn.Module, example_input: Inputs, path: Path | str, *, inputs: Mapping[str, Any] | None = None
) -> Path:
    """Write `network` as a torch.export program with any batch size: `torch.export.load(path).module()(x)`.

    Such a file can hold code: load it only from people you trust.

    Args:
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments. Each tensor in it
            with one entry per example gets a dynamic first dimension.
        inputs: what inputs must look like, to be kept in the file as JSON. To read it:
            `extra = {"inputs.json": ""}; torch.export.load(path, extra_files=extra)`.
    """
    network = uncompiled(network)
    arguments, keywords, shapes = _export_arguments(network, example_input)
    with torch.no_grad(), in_mode(network, training=False):
        program = torch.export.export(network, arguments, keywords, dynamic_shapes=shapes)
    extra = {} if inputs is None else {"inputs.json": json.dumps(inputs)}
    return write_atomically(path, lambda beside: torch.export.save(program, beside, extra_files=extra))


def export_onnx(
    network: nn.Module,
    example_input: Inputs,
    path: Path | str,
    *,
    tolerance: float | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Write `network` as an ONNX file with any batch size, checked by onnxruntime. Needs the extra `onnx`.

    >>> import onnxruntime  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("small.onnx")  # doctest: +SKIP
    >>> logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})  # doctest: +SKIP

    Args:
        example_input: as for `export_program`.
        tolerance: allowed difference of outputs; relative to the largest output if that is above 1. None: 1e-5 for
            a float32 network; 1e-2 for float16, whose numbers have 3 digits; 1e-10 for float64.
        inputs: what inputs must look like, to be kept in the file as JSON. To read it:
            `session.get_modelmeta().custom_metadata_map["inputs"]`.

    Raises:
        ImportError: naming the extra, if onnx, onnxscript or onnxruntime is not installed.
        ValueError: if the network or the examples have a precision that onnxruntime has not, such as bfloat16, or
            float64 with convolutions; if the outputs of onnxruntime and of the network differ, on the examples or
            on one of them alone. Then nothing is written.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 what torch.onnx.export needs
    except ImportError as error:
        raise ImportError(
            f"export to ONNX needs the extra: pip install 'pyro-bmrs[onnx]' ({error})"
        ) from error
    network = uncompiled(network)
    precision = _precision(network, example_input)
    if tolerance is None:
        tolerance = TOLERANCES[precision]
    check(is_number(tolerance) and tolerance > 0, "tolerance", "a positive number or None", tolerance)
    arguments, keywords, shapes = _export_arguments(network, example_input)

    def run(path: Path, examples: Inputs) -> list[Any]:
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_inputs()]
            feed = dict(zip(names, (t.cpu().numpy() for t in tensors_of(examples)), strict=True))
            return list(session.run(None, feed))
        except Exception as error:  # onnxruntime's have no base of their own
            reason = " ".join(str(error).split())
            raise ValueError(
                f"network must have operations that onnxruntime has in its precision, here {_name(precision)}: got "
                f"{type(error).__name__}: {reason}"
            ) from error

    def write(beside: Path) -> None:
        with torch.no_grad(), in_mode(network, training=False):
            torch.onnx.export(
                network, arguments, str(beside), kwargs=keywords or None, dynamo=True, dynamic_shapes=shapes,
                external_data=False, verbose=False,
            )  # fmt: skip
            if inputs is not None:
                exported = onnx.load(str(beside))
                onnx.helper.set_model_props(exported, {"inputs": json.dumps(inputs)})
                onnx.save(exported, str(beside))
            for examples in (example_input, first_examples(example_input, 1)):
                wanted = tensors_of(call(network, examples))
                for index, (have, want) in enumerate(zip(run(beside, examples), wanted, strict=True)):
                    _check_same(index, torch.from_numpy(have).double(), want.cpu().double(), tolerance)

    return write_atomically(path, write)


def _precision(network: nn.Module, example_input: Inputs) -> torch.dtype:
    """The coarsest floating-point type of network and examples; raises ValueError for what onnxruntime has not."""
    tensors = [*network.state_dict().values(), *tensors_of(example_input)]
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    allowed = f"of {', '.join(map(_name, TOLERANCES))} for onnxruntime, as network.float() is"
    check(found <= TOLERANCES.keys(), "network", allowed, ", ".join(sorted(map(_name, found))))
    if torch.float64 in found:
        bad = [
            path for path, module in network.named_modules() if isinstance(module, nn.modules.conv._ConvNd)
        ]
        allowed = "of float32 or float16 where it has convolutions, since onnxruntime has none in float64"
        check(not bad, "network", allowed, f"float64 with {', '.join(bad)}")
    return next(dtype for dtype in reversed(TOLERANCES) if dtype in found)


def _check_same(index: int, found: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise ValueError unless an output of onnxruntime is that of the network."""
    finite = want.isfinite()  # infinities of a mask are compared below
    some = bool(finite.any())
    difference = float((found - want)[finite].abs().max()) if some else 0.0
    if not torch.equal(found[~finite], want[~finite]):
        difference = math.inf
    allowed = tolerance * max(1.0, float(want[finite].abs().max()) if some else 1.0)
    if not difference <= allowed:
        raise ValueError(
            f"network must export to ONNX unchanged: output {index} differs by {difference:.3e} "
            f"(allowed: {allowed:.3e}, from tolerance {tolerance:g})"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
