"""A fitted posterior on disk: safetensors, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from pyro_bmrs.files import refuse_newer, write_atomically
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal

FORMAT, VERSION = "pyro_bmrs.posterior", 1


def save_posterior(path: Path | str, model: nn.Module, guide: AutoTruncatedLogNormal) -> Path:
    """Write weights and posterior parameters to a safetensors file, atomically."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"guide.{name}": t for name, t in guide.state_dict().items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # one entry: safetensors writes several in an order that differs from save to save
    header = json.dumps({"format": FORMAT, "version": VERSION, "kl_weight": guide.kl_weight})
    return write_atomically(path, lambda beside: save_file(tensors, beside, metadata={"pyro_bmrs": header}))


def load_posterior(path: Path | str, model: nn.Module, guide: AutoTruncatedLogNormal) -> None:
    """Load what `save_posterior` wrote into a model and a guide that has been called once.

    Raises:
        ValueError: if the file is none, is damaged, belongs to another network, or to a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if guide.prototype_trace is None:
        raise RuntimeError("guide has no parameters to load into yet: call it once on a batch, guide(x, y)")

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("pyro_bmrs", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"path must be a posterior written by save_posterior: {path}: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path must be a posterior written by save_posterior: {path} is none")
    refuse_newer(path, "posterior", metadata["version"], VERSION)
    for prefix, module in (("model.", model), ("guide.", guide)):
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} belongs to another network: {reason}") from None
    guide.kl_weight = metadata["kl_weight"]
