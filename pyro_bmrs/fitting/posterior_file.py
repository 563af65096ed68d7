"""A fitted posterior on disk, as a safetensors file; the state of a model and a guide, and how to restore it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.files import read_tensors, refuse_newer, write_tensors
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.networks.curvature import Moments
from pyro_bmrs.networks.noise import MultiplicativeNoise
from pyro_bmrs.pruning.binding import input_of
from pyro_bmrs.pruning.shrink import shrink

FORMAT, VERSION = "pyro_bmrs.posterior", 3
# Of a Laplace posterior: what the file holds of each layer, and how their names begin.
_PARTS, _CURVATURE = ("inputs", "gradients", "positions", "mean"), "curvature."


def save_posterior(
    path: Path | str, model: nn.Module, guide: AutoTruncatedLogNormal | AutoKroneckerLaplace
) -> Path:
    """Write a model's weights and its posterior to a safetensors file.

    The file holds all tensors of both and the KL weight of the fit, of a Laplace posterior its curvature, and no code.
    A write that fails leaves no file.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> def made():
    ...     net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
    ...     model = bmrs.Classifier(net)
    ...     guide = bmrs.AutoTruncatedLogNormal(model)
    ...     _ = guide(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long))
    ...     return model, guide
    >>> (model, guide), (fresh_model, fresh_guide) = made(), made()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = bmrs.save_posterior(f"{folder}/posterior.safetensors", model, guide)
    ...     bmrs.load_posterior(path, fresh_model, fresh_guide)
    >>> torch.equal(fresh_model.net[0].weight, model.net[0].weight)
    True

    Args:
        path: of the file; an existing one is replaced.
        model: the Pyro model that was fitted.
        guide: its guide, called once or fitted.

    Returns:
        The path.

    Raises:
        RuntimeError: for a Laplace posterior before its fit.
    """
    header = {"format": FORMAT, "version": VERSION, "kl_weight": guide.kl_weight}
    tensors = state_of(model, guide)
    if isinstance(guide, AutoKroneckerLaplace):
        guide.check_ready()
        header |= {"dataset_size": guide.dataset_size, "log_likelihood": guide.log_likelihood}
        tensors |= {
            f"{_CURVATURE}{part}.{layer}": tensor
            for layer, one in guide.curvatures.items()
            for part in _PARTS
            if (tensor := getattr(one, part)) is not None
        }
    return write_tensors(path, tensors, header)


def load_posterior(
    path: Path | str, model: nn.Module, guide: AutoTruncatedLogNormal | AutoKroneckerLaplace
) -> None:
    """Load what `save_posterior` wrote into a model and a guide, in place.

    If the fit removed structures from the saved network, the model loses them too. A Laplace posterior does not hold
    the examples on which `reduce` measures losses: put some into `guide.shown` before.

    >>> bmrs.load_posterior("posterior.safetensors", model, guide)  # doctest: +SKIP

    Args:
        path: of a file that `save_posterior` wrote.
        model: made as the saved one was made.
        guide: its guide; one with parameters has to be called once on a batch, so that it has them.

    Raises:
        RuntimeError: if a guide with parameters has not been called yet.
        ValueError: if the file is no posterior, is damaged, or belongs to another network or version.
    """
    if isinstance(guide, AutoTruncatedLogNormal) and guide.prototype_trace is None:
        raise RuntimeError("guide has no parameters to load into yet: call it once on a batch, guide(x, y)")
    try:
        header, tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"path must be a posterior written by save_posterior: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"path must be a posterior written by save_posterior: {path} is none")
    refuse_newer(path, "posterior", header.get("version"), VERSION)
    if header["version"] < VERSION:
        raise ValueError(f"{path} was written by an older pyro_bmrs, of which no release was made: fit again")
    weight = header.get("kl_weight")
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(
            f"path must be a posterior written by save_posterior: {path} has kl_weight {weight!r}"
        )
    is_laplace = isinstance(guide, AutoKroneckerLaplace)
    if is_laplace != ("dataset_size" in header):
        kinds = "AutoTruncatedLogNormal", "AutoKroneckerLaplace"
        raise ValueError(
            f"guide must be an {kinds[not is_laplace]}, as {path} has it: got {kinds[is_laplace]}"
        )
    try:
        restore(model, guide, tensors)
        if isinstance(guide, AutoKroneckerLaplace):
            _restore_curvature(guide, header, tensors)
    except ValueError as error:
        raise ValueError(f"{path} belongs to another network: {error}") from None
    guide.kl_weight = weight


def _restore_curvature(
    guide: AutoKroneckerLaplace, header: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Give the guide its posterior; raises ValueError if it does not belong to its layers.

    Its tensors are taken out of `tensors`, so that those that go to disk leave the memory.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith(_CURVATURE)]:
        part, _, layer = name.removeprefix(_CURVATURE).partition(".")
        found.setdefault(layer, {})[part] = tensors.pop(name)
    if not set(found) <= set(guide.paths):
        raise ValueError(
            f"it has curvature of {sorted(set(found) - set(guide.paths))}, which are no layers here"
        )
    moments = {}
    for layer, parts in found.items():
        device = guide.layer(layer).get_parameter("weight").device
        own = {part: guide.keep(parts.pop(part).to(device)) for part in [*parts]}
        try:
            moments[layer] = Moments(
                own["inputs"], own["gradients"], 1, own.get("positions"), own.get("mean")
            )
        except KeyError as error:
            raise ValueError(f"it has no {error} of layer {layer!r}") from None
    guide.set_moments(moments, 1, int(header["dataset_size"]), float(header["log_likelihood"]))


def state_of(model: nn.Module, guide: Callable[..., Any] | None) -> dict[str, Tensor]:
    """Copies of all tensors of a model and a guide, by name."""
    return {
        f"{prefix}.{name}": tensor.detach().clone()
        for prefix, module in (("model", model), ("guide", guide))
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict().items()
    }


def restore(model: nn.Module, guide: Callable[..., Any] | None, state: Mapping[str, Tensor]) -> None:
    """Put a model and a guide into a state that `state_of` gave; other entries are ignored.

    Raises:
        ValueError: if the state belongs to another network, or has structures that the model has lost.
    """
    _shrink_to(model, guide, state)
    for prefix, module in (("model.", model), ("guide.", guide)):
        if isinstance(module, nn.Module):
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(" ".join(str(error).split())) from None


def _shrink_to(model: nn.Module, guide: Callable[..., Any] | None, state: Mapping[str, Tensor]) -> None:
    """Remove from model and guide the structures that the state does not have."""
    if not isinstance(guide, AutoTruncatedLogNormal):
        return
    removed = {
        site: (
            state.get(f"guide.posteriors.{number}.removed_units"),
            guide.site_posterior(site).removed_units,
        )
        for number, site in enumerate(guide.sites)
    }
    kept: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        saved = state.get(f"model.{path}.units")
        if not isinstance(layer, MultiplicativeNoise) or layer.site not in removed:
            continue
        before, since = removed[layer.site]
        if saved is None or before is None or before.dim() != 1 or saved.dim() != 1:
            raise ValueError(f"its numbers of the structures of layer {layer.site!r} are damaged, or missing")
        structures = len(saved) + len(before), len(layer.units) + len(since)
        if structures[0] != structures[1]:
            raise ValueError(
                f"its layer {layer.site!r} had {structures[0]} structures, and here it has {structures[1]}"
            )
        kept[layer.site] = torch.isin(layer.units.cpu(), saved.cpu())
        if int(kept[layer.site].sum()) < len(saved):
            raise ValueError(
                f"layer {layer.site!r} has lost structures that were there when this was saved: start from a "
                "freshly made network"
            )
    if not all(bool(mask.all()) for mask in kept.values()):
        shrink(model, guide, kept, None, input_of(model, guide.example_arguments))
