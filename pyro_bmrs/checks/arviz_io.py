"""Draws of a variational posterior as the tree that ArviZ reads: the one file that knows ArviZ.

(But for the smoothing of importance weights, which evidence/importance.py takes from arviz-stats.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pyro_bmrs.arguments import check, whole_number
from pyro_bmrs.checks.data import DataOfModel
from pyro_bmrs.checks.joint_draws import JointDraws, joint_draws
from pyro_bmrs.evidence.importance import LEAST_DRAWS, khat_threshold, pareto_khat
from pyro_bmrs.files import write_atomically
from pyro_bmrs.inference.batches import AT_ONCE, Data
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.pruning.reduce import kl_weight_of

if TYPE_CHECKING:
    from arviz import ELPDData
    from xarray import DataTree

NOTE = (
    "independent draws of a variational posterior, not a Markov chain: R-hat and the effective sample size say "
    "nothing about them; Pareto k-hat of log_p - log_q does"
)
_ENGINE: Literal["h5netcdf"] = "h5netcdf"
# Dimensions that every drawn variable has.
_OF_DRAWS = ("chain", "draw")


def to_datatree(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: tuple[Any, ...] | Data,
    draws: int = 1000,
    seed: int = 0,
    *,
    batch_size: int = AT_ONCE,
    constant_data: bool = True,
) -> DataTree:
    """Joint draws of a guide, and what the model says of them, as an xarray.DataTree for ArviZ.

    >>> import arviz, torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> import pyro_bmrs as bmrs
    >>> def line(x, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("points", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
    >>> x = torch.linspace(-1.0, 1.0, 20)
    >>> guide = AutoNormal(line)
    >>> _ = guide(x, 2 * x)
    >>> tree = bmrs.to_datatree(line, guide, (x, 2 * x), draws=200)
    >>> tree.log_likelihood.y.dims, tree.posterior.attrs["inference"]
    (('chain', 'draw', 'points'), 'variational')
    >>> list(arviz.summary(tree, kind="stats").index)
    ['slope']

    Groups: posterior, prior, posterior_predictive, log_likelihood (nats, of each observation), log_prior (nats, of
    each element), sample_stats (log_p = log p(y, θ) and log_q = log q(θ), in nats), observed_data, constant_data.
    The dimensions are chain (of length 1), draw, and those of the site: named after its plates, or `SITE_unit` with
    the numbers of the original network's structures for a noise layer, whatever a fit has taken out. A structure
    that is removed and still there has θ = 0. "/" in a name becomes ".".

    Memory: 8 bytes for the log-likelihood and those of a prediction (8 of a label, 4 of a number), per draw and
    observation; 24 at most per draw and latent element; the data; and what one batch takes in the network. That is 0.2
    GB for 1,000 draws of 10,000 labels; docs/diagnostics.md has what was measured.

    Args:
        model: any Pyro model.
        guide: its guide; also the reduced posterior of a plan, whose density is not known: there is no log_q then, nor
            where all latents are points.
        data: a tuple of the arguments that both are called with. Or a data set or loader of pairs (x, y), for a model
            that can be called on any batch of them; a `Classifier` or `Regressor` takes a tuple (x, y) in batches.
        draws: S, of the posterior.
        seed: of the draws; torch's own generator is left as it was.
        batch_size: examples that the network sees at once.
        constant_data: whether to keep the inputs.

    Returns:
        The tree; its groups' attributes say that the draws are variational, and the KL weight of the fit.

    Raises:
        TypeError: for data of another kind.
        ValueError: for a bad number, arguments that the model does not take, a guide that lacks a latent of the model,
            or latents of single examples in data that come in batches.
    """
    draws, seed = whole_number("draws", draws, 1), whole_number("seed", seed)
    check(callable(guide), "guide", "a Pyro guide", type(guide), TypeError)
    of_model = DataOfModel(model, data, batch_size)
    with untouched(model, guide, seed=seed):
        found = joint_draws(guide, of_model, draws)
    if not constant_data:
        found.inputs.clear()
    return _tree(found, {"kl_weight": kl_weight_of(guide), "draws": draws, "seed": seed})


def save_datatree(tree: DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a tree to a NetCDF file, which is whole or not there; `load_datatree` reads it back identical.

    Raises:
        ValueError: if `path` does not end in .nc.
    """
    _check_tree(tree)
    path = _netcdf_path(path)
    return write_atomically(path, lambda beside: tree.to_netcdf(beside, engine=_ENGINE))


def load_datatree(path: str | os.PathLike[str]) -> DataTree:
    """Read a tree that `save_datatree` wrote, into memory.

    Raises:
        ValueError: if `path` does not end in .nc, is missing, or is no NetCDF file.
    """
    import xarray

    path = _netcdf_path(path)
    if not path.is_file():
        raise ValueError(f"path must be a NetCDF file written by save_datatree: there is no file {path}")
    try:
        with xarray.open_datatree(path, engine=_ENGINE) as tree:
            return tree.load()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"path must be a NetCDF file written by save_datatree: {path}: {error}") from None


def loo(tree: DataTree, *, var_name: str | None = None) -> ELPDData:
    """Leave-one-out predictive density with the correction for the approximate posterior.

    The importance weights of leaving observation i out are those of the exact posterior against the approximate one,
    p(θ, y)/q(θ), over p(yᵢ | θ). They hold where k̂ of p(θ, y)/q(θ) itself is below its threshold. Source: Magnusson,
    Andersen, Jonasson and Vehtari, "Bayesian leave-one-out cross-validation for large data" (2019), equation 8.

    Args:
        tree: of `to_datatree`, on the data that the posterior was fitted to.
        var_name: of the observed site, where there are several.

    Returns:
        ArviZ's ELPDData with pointwise values; its k̂ per observation are those of the corrected weights.

    Raises:
        ValueError: for a tree without log_likelihood, log_p or log_q; an unknown var_name; where the correction does
            not hold, with k̂.
    """
    import arviz

    _check_tree(tree)
    for group in ("log_likelihood", "sample_stats"):
        if group not in tree.children:
            raise ValueError(
                f"tree must have the group {group}, as to_datatree makes it: it has {list(tree.children)}"
            )
    missing = [name for name in ("log_p", "log_q") if name not in tree["sample_stats"].data_vars]
    if missing:
        raise ValueError(
            f"tree must have {' and '.join(missing)}: what it was drawn from has no density that is known"
        )
    sites = list(tree["log_likelihood"].data_vars)
    if var_name not in sites and (var_name is not None or len(sites) > 1):
        raise ValueError(f"var_name must be one of the observed sites {sites}: got {var_name!r}")
    log_p, log_q = (tree["sample_stats"][name] for name in ("log_p", "log_q"))
    weights = torch.as_tensor(np.ascontiguousarray((log_p - log_q).to_numpy().ravel()))
    if bool((weights.isnan() | (weights == math.inf)).any()):
        raise ValueError("tree must have log_p - log_q that is finite, or -inf: got NaN or inf")
    if len(weights) < LEAST_DRAWS:
        raise ValueError(f"tree must have at least {LEAST_DRAWS} draws: got {len(weights)}")
    khat, most = pareto_khat(weights), khat_threshold(len(weights))
    if khat > most:
        raise ValueError(
            f"tree must be of a posterior near the exact one: k̂ of its draws is {khat:.2f}, above {most:.2f}, "
            "so that they can't be reweighted"
        )
    return arviz.loo_approximate_posterior(tree, log_p=log_p, log_q=log_q, pointwise=True, var_name=var_name)


def _check_tree(tree: Any) -> None:
    from xarray import DataTree

    allowed = "an xarray.DataTree, as to_datatree makes it"
    check(isinstance(tree, DataTree), "tree", allowed, type(tree), TypeError)


def _netcdf_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".nc":
        raise ValueError(f"path must end in .nc: got {path}")
    return path


def _tree(found: JointDraws, attributes: dict[str, Any]) -> DataTree:
    import arviz
    from xarray import DataTree

    drawn = {
        "posterior": found.values,
        "prior": found.prior,
        "posterior_predictive": found.predicted,
        "log_likelihood": found.log_likelihood,
        "log_prior": found.log_prior,
        "sample_stats": {"log_p": found.log_p} | ({} if found.log_q is None else {"log_q": found.log_q}),
    }
    given = {"observed_data": found.observed, "constant_data": found.inputs}
    names = _file_names([*found.dims, *found.inputs])
    # an input that is called like a site, in a group of its own, is no clash
    dims, dims_of_inputs = _dimension_names(found, names)
    coords = {f"{names[site]}_unit": units for site, units in found.units.items()}
    datasets = {
        group: arviz.dict_to_dataset(
            {names.get(site, site): array[None] for site, array in arrays.items()},
            dims=dims,
            coords=coords,
            skip_event_dims=True,  # densities have none
        )
        for group, arrays in drawn.items()
        if arrays
    }
    datasets |= {
        group: arviz.dict_to_dataset(
            {names[site]: array for site, array in arrays.items()},
            dims=dims_of_inputs if group == "constant_data" else dims,
            sample_dims=[],
        )
        for group, arrays in given.items()
        if arrays
    }
    tree = DataTree.from_dict(datasets)
    renamed = {name: site for site, name in names.items() if site != name}
    for group in tree.children.values():
        group.attrs.pop("created_at", None)  # the same seed gives the same file
        group.attrs.update(
            inference_library="pyro_bmrs",
            inference_library_version=version("pyro-bmrs"),
            inference="variational",
            note=NOTE,
            **attributes,
        )
        for name in group.data_vars:
            if name in renamed:
                group[name].attrs["site"] = renamed[name]
    return tree


def _file_names(sites: Iterable[str]) -> dict[str, str]:
    """Names that a tree and a NetCDF file allow, all different."""
    names: dict[str, str] = {}
    # those that can keep their names do
    for site in sorted(dict.fromkeys(sites), key=lambda site: "/" in site):
        name = site.replace("/", ".")
        while name in names.values() or name in _OF_DRAWS:
            name += "_"
        names[site] = name
    return names


def _dimension_names(
    found: JointDraws, names: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The names of each variable's dimensions, without chain and draw: of the sites, and of the inputs."""
    sizes: dict[str, int] = {}
    dims: dict[str, list[str]] = {}
    shapes = {site: array.shape[1:] for site, array in found.values.items()}
    shapes |= {site: array.shape for site, array in found.observed.items()}
    for site, shape in shapes.items():
        chosen = []
        for index, (plate, size) in enumerate(zip(found.dims[site], shape, strict=True)):
            name = f"{names[site]}_unit" if site in found.units else f"{names[site]}_dim_{index}"
            if plate is not None and site not in found.units:
                plate = plate.replace("/", ".")
                # NetCDF takes a variable that is called like a dimension for its coordinates
                plate += "_dim" if plate in names.values() or plate in _OF_DRAWS else ""
                if sizes.setdefault(plate, size) == size:
                    name = plate
            chosen.append(name)
        dims[names[site]] = chosen
    # examples are the same in the inputs as in the observations
    examples = next((dims[names[site]][:1] for site in found.observed), [])
    of_inputs = {}
    for name, array in found.inputs.items():
        same = examples and array.ndim and array.shape[0] == sizes.get(examples[0])
        own = [f"{names[name]}_dim_{index}" for index in range(array.ndim)]
        of_inputs[names[name]] = [*examples, *own[1:]] if same else own
    return dims, of_inputs
