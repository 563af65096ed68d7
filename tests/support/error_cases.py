"""Bad input, a case each: what is called, what is wrong with it, and what must be said.

Everything here is called in a folder of its own that holds the files of `make_place`, by names relative to it.
"""

from __future__ import annotations

import json
import math
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray
import yaml
from command_line import call
from PIL import Image
from pyro.infer.autoguide import AutoNormal
from small_fits import SmallFit, data
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import pyro_bmrs as bmrs
from pyro_bmrs.data import read_inputs
from pyro_bmrs.files import NewerFileError, read_tensors, write_tensors
from pyro_bmrs.networks.cost import compare_costs
from pyro_bmrs.networks.export import export_onnx
from pyro_bmrs.networks.structures import StructureError
from pyro_bmrs.pruning import network_plan
from pyro_bmrs.pruning.reduce import NonFiniteScoreError
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.study import Study

WORKS, WARNS = "works", "warning"


@dataclass(frozen=True, eq=False)
class Case:
    """One mistake.

    Attributes:
        called: the public name, the command line or the file, as the table shows it.
        wrong: what is wrong with it, in a few words.
        provoke: makes the mistake.
        ends: the type of the exception, the exit status of a command, or "works" or "warning".
        says: what the message must match. What a group `library` matches is another library's text, which the
            table leaves out.
        spoil: makes the files that `provoke` meets, before the folder is looked at.
        disk: whether files are read or written, so that the folder must be what it was.
        missing: a module that can't be imported.
    """

    called: str
    wrong: str
    provoke: Callable[[], object]
    ends: type[BaseException] | int | str
    says: str
    spoil: Callable[[], object] | None = None
    disk: bool = False
    missing: str | None = None


def function(called, wrong, provoke, ends, says):
    """A case of a function that leaves the disk alone."""
    return Case(called, wrong, provoke, ends, says)


def command(line, wrong, says, spoil=None, **options):
    """A case of a command line."""
    return Case(
        f"pyro-bmrs {line}".strip(), wrong, lambda: call(*line.split()), 2, says, spoil, disk=True, **options
    )


def on_disk(called, wrong, provoke, ends, says, spoil=None, **options):
    """A case of a function that reads or writes files."""
    return Case(called, wrong, provoke, ends, says, spoil, disk=True, **options)


# --- what the cases have at hand ------------------------------------------------------------------------

NETWORK = """
from torch import nn
from pyro_bmrs import MultiplicativeNoise
SETTINGS = {"default": {"epochs": 2, "batch_size": 16}}
def network(input_shape, num_classes):
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), MultiplicativeNoise(8), nn.Linear(8, num_classes)
    )
"""
X, Y = data(40)


def make_place():
    """The files that cases name: a recipe, data, a study, a complete run and a folder of nothing; by name."""
    Path("net.py").write_text(NETWORK)
    write_npz()
    write_study()
    Path("file").write_text("a line of text\n")
    Path("empty").mkdir()
    # no timings of the networks, which take seconds
    with patch.object(network_plan, "compare_costs", lambda *given, **_: compare_costs(*given, seconds=0.0)):
        command_line("run net.py --data own.npz --out run --draws 100 --quiet")
    command_line("fit net.py --data own.npz --out fitted --quiet")


def command_line(line):
    assert call(*line.split()) == 0


def write_npz(path="own.npz", **changed):
    """Forty examples of six features and two classes, but for what is changed; None: left out."""
    x, y = X.numpy(), Y.numpy()
    parts = dict(x_train=x, y_train=y, x_test=x[:20], y_test=y[:20]) | changed
    np.savez(path, **{name: array for name, array in parts.items() if array is not None})


def write_study(**changed):
    study = {"out": "studies", "recipes": "net.py", "data": "own.npz", "settings": {"epochs": 1}} | changed
    Path("study.yaml").write_text(
        yaml.safe_dump({key: value for key, value in study.items() if value is not None})
    )


def write(path, text=""):
    """Spoils a file: gives it this text."""
    return lambda: Path(path).write_text(text)


def cut(path, share=0.5):
    """Spoils a file: only its beginning is left."""

    def spoil():
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(share * len(content))])

    return spoil


def within_quota(limit, work):
    """Do work while no file may have more than so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def edit(path, **entries):
    """Spoils a JSON file: other values for some of its entries."""
    return lambda: Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | entries))


def edit_header(path, **entries):
    """Spoils a safetensors file: other entries of its header."""

    def spoil():
        header, tensors = read_tensors(path)
        write_tensors(path, tensors, header | entries)

    return spoil


def edit_tensors(path, change):
    """Spoils a safetensors file: other tensors."""

    def spoil():
        header, tensors = read_tensors(path)
        write_tensors(path, change(tensors), header)

    return spoil


def instead(path, source):
    """Spoils a file: it has the content of another."""
    return lambda: shutil.copyfile(source, path)


def folder_instead(path):
    """Spoils a file: a folder has its name."""

    def spoil():
        Path(path).unlink()
        Path(path).mkdir()

    return spoil


def without(path):
    """Spoils a folder: the file is gone."""
    return lambda: Path(path).unlink()


def recipe(text):
    """Spoils net.py."""
    return write("net.py", text)


def images(*classes, size=(8, 8), folder="images"):
    """Makes an image folder: for each class so many grey images."""

    def spoil():
        for label, count in enumerate(classes):
            place = Path(folder) / f"class {label}"
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("L", size, 40 * number).save(place / f"{number}.png")

    return spoil


def both(*spoils):
    """Spoils one after the other."""
    return lambda: [spoil() for spoil in spoils]


@cache
def fitted():
    """A model and its guide, fitted, with a plan; only to be looked at."""
    small = SmallFit("plain")
    small.run(None, epochs=2)
    small.plan = bmrs.reduce(small.model, small.guide, bmrs.BMRS_N())
    return small


def fit(train=(X, Y), validation=None, *, guide=True, **options):
    """A fit of a fresh model."""
    small = SmallFit("plain")
    options = dict(epochs=1, batch_size=20, progress=False) | options
    return bmrs.fit(small.model, small.guide if guide else None, train, validation, **options)


def reduce(criterion=None, **options):
    return bmrs.reduce(fitted().model, fitted().guide, criterion or bmrs.BMRS_N(), **options)


def outlived():
    """A plan of a network that it was bound to, which has shrunk since."""
    small = SmallFit("plain")
    small.guide(X, Y)
    plan = bmrs.reduce(small.model, small.guide, bmrs.Random(0.5)).bound_to(small.model.net, lambda: X)
    plan.shrink(small.model, small.guide)
    return plan


def diagnose(**changed):
    small = fitted()
    options = dict(plan=small.plan, train=(X, Y), test=(X, Y), draws=100) | changed
    return bmrs.diagnose(small.model, small.guide, **options)


def check_posterior(given=(X, Y), **options):
    return bmrs.check_posterior(fitted().model, fitted().guide, given, **options)


def to_datatree(given=(X, Y), **options):
    return bmrs.to_datatree(fitted().model, fitted().guide, given, **options)


def weights_of(x, y=None):
    """A Pyro program beside networks: three weights of a line."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("examples", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


LINE = X[:, :3], X[:, 0]


@cache
def line_guide():
    with pyro.get_param_store().scope():
        guide = AutoNormal(weights_of)
        guide(*LINE)
    return guide


def search(kind, reduced=None, **options):
    """`reduce`, `exhaustive_reduction`, `greedy_reduction` or `evidence_curve` of the three weights."""
    return kind(weights_of, line_guide(), {"weights": 0.0} if reduced is None else reduced, *LINE, **options)


def model_posterior():
    return search(bmrs.exhaustive_reduction)


def tree(**groups):
    """A tree as of `to_datatree`, with so many draws, of three observations."""
    return xarray.DataTree.from_dict({name: xarray.Dataset(variables) for name, variables in groups.items()})


def drawn(log_p):
    """The tree of a posterior whose draws have this log p - log q."""
    count = len(log_p)
    values = (("chain", "draw"), np.asarray(log_p, dtype=float).reshape(1, count))
    zeros = (("chain", "draw"), np.zeros((1, count)))
    likelihood = (("chain", "draw", "y_dim"), np.zeros((1, count, 3)))
    return tree(sample_stats={"log_p": values, "log_q": zeros}, log_likelihood={"y": likelihood})


def plain(*more):
    """A network that noise can be inserted into."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *more, nn.Linear(8, 2))


def noisy():
    """The network of `fitted`, anew."""
    return SmallFit("plain").model.net


def wide():
    """The same with another number of structures in its first layer."""
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), bmrs.MultiplicativeNoise(9), nn.Linear(9, 2))


def broken(network):
    """The network with a weight that is no number."""
    network[0].weight.data[1, 2] = math.nan
    return network


def twins():
    layers = bmrs.MultiplicativeNoise(8), bmrs.MultiplicativeNoise(8)
    for layer in layers:
        layer.site = "same"
    return layers


class Pair(nn.Module):
    """A network whose output is a tuple."""

    def forward(self, x):
        return x, x


def guide_of(**options):
    return bmrs.AutoTruncatedLogNormal(bmrs.Classifier(noisy()), **options)


def fit_of(network):
    model = bmrs.Classifier(network)
    return bmrs.fit(model, bmrs.AutoTruncatedLogNormal(model), (X, Y), epochs=1, progress=False)


def reduce_by(mapping):
    return bmrs.reduce(fitted().model, fitted().guide, mapping)


def curve_of(**parameter):
    return bmrs.evidence_curve(fitted().model, fitted().guide, bmrs.BMRS_U(), **parameter)


def curve(given=(X, Y), **options):
    return bmrs.compression_curve(fitted().model, fitted().plan, given, **options)


def spoiled_loc(tensors):
    tensors["guide.posteriors.0.loc"][1] = math.nan
    return tensors


def spoiled_weight(tensors):
    name = next(name for name in tensors if name.endswith("0.weight"))
    tensors[name][1, 2] = math.nan
    return tensors


def nan_guide():
    """A fitted posterior with a location that is no number."""
    small = SmallFit("plain")
    small.guide(X, Y)
    small.guide.posteriors[0].loc.data[2] = math.nan
    return small.model, small.guide


Q = bmrs.TruncatedLogNormal(torch.tensor([-0.5, -3.0]), torch.tensor([0.1, 1.0]))
P = bmrs.LogUniform()
HOLE = X.clone().index_fill_(0, torch.tensor([3]), math.nan)
NORMAL, VECTOR = dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(2), 1.0)


# --- distributions and evidence -------------------------------------------------------------------------

BOUNDS = r"^{0}low and {0}high must be finite with {0}low < {0}high: got {0}low={1}, {0}high={2}$"

EVIDENCE = [
    function(
        "LogUniform", "log_low above log_high", lambda: bmrs.LogUniform(0.0, -20.0), ValueError,
        BOUNDS.format("log_", "0.0", "-20.0"),
    ),
    function(
        "LogUniform", "log_low is NaN", lambda: bmrs.LogUniform(math.nan, 0.0), ValueError,
        BOUNDS.format("log_", "nan", "0.0"),
    ),
    function(
        "LogUniform", "one of several bounds of no width",
        lambda: bmrs.LogUniform(torch.tensor([-20.0, -1.0]), torch.tensor([0.0, -1.0])), ValueError,
        r"^log_low and log_high must .*: got log_low=\[-20.0, -1.0\], log_high=\[0.0, -1.0\]$",
    ),
    function(
        "LogUniform", "log_low is text", lambda: bmrs.LogUniform("low", 0.0), TypeError,
        r"^log_low must be a number or a tensor: got 'low'$",
    ),
    function(
        "TruncatedNormal", "low equals high", lambda: bmrs.TruncatedNormal(0.0, 1.0, 2.0, 2.0), ValueError,
        BOUNDS.format("", "2.0", "2.0"),
    ),
    function(
        "TruncatedNormal", "scale is negative", lambda: bmrs.TruncatedNormal(0.0, -1.0, -2.0, 2.0),
        ValueError, r"scale.*-1\.0",
    ),
    function(
        "TruncatedNormal", "shapes that do not broadcast",
        lambda: bmrs.TruncatedNormal(torch.zeros(3), torch.ones(2), -2.0, 2.0), ValueError,
        r"^loc, scale, low, high must have shapes that broadcast: got loc \(3,\), scale \(2,\), low \(\), high \(\)$",
    ),
    function(
        "TruncatedLogNormal", "log_low above log_high",
        lambda: bmrs.TruncatedLogNormal(0.0, 1.0, log_low=0.0, log_high=-20.0), ValueError,
        BOUNDS.format("log_", "0.0", "-20.0"),
    ),
    function(
        "TruncatedLogNormal", "scale is negative", lambda: bmrs.TruncatedLogNormal(0.0, -0.5), ValueError,
        r"scale.*-0\.5",
    ),
    function(
        "TruncatedLogNormal", "loc is text", lambda: bmrs.TruncatedLogNormal("here", 1.0), TypeError,
        r"^loc must be a number or a tensor: got 'here'$",
    ),
    function(
        "log_evidence_change", "posterior is a number", lambda: bmrs.log_evidence_change(3.0, P, P),
        TypeError, r"^posterior must be a distribution: got float$",
    ),
    function(
        "log_evidence_change", "no closed form of these types",
        lambda: bmrs.log_evidence_change(dist.Cauchy(0.0, 1.0), NORMAL, NORMAL), NotImplementedError,
        r"^no closed form for \(posterior, prior, reduced_prior\) of types "
        r"\(Cauchy, Normal, Normal\); there is one for: ",
    ),
    function(
        "log_evidence_change", "reduced_prior outside the prior's bounds",
        lambda: bmrs.log_evidence_change(Q, P, bmrs.LogUniform(-25.0, 0.0)), ValueError,
        r"^reduced_prior must lie within the support of the prior: log θ in \[-25.0, 0.0\] is not "
        r"within \[-20.0, 0.0\]$",
    ),
    function(
        "log_evidence_change", "posterior wider than its prior, reduced_prior wider still",
        lambda: bmrs.log_evidence_change(dist.Normal(0.0, 2.0), NORMAL, dist.Normal(0.0, 5.0)), ValueError,
        r"the posterior must be narrower than its prior where the reduced prior is wider",
    ),
    function(
        "log_evidence_change", "prior is a point mass",
        lambda: bmrs.log_evidence_change(NORMAL, dist.Delta(torch.tensor(0.0)), NORMAL), ValueError,
        r"^prior must have a density, to be compared with others: got a Delta$",
    ),
    function(
        "log_evidence_change", "event dimensions differ",
        lambda: bmrs.log_evidence_change(VECTOR.to_event(1), VECTOR, NORMAL), ValueError,
        r"^prior must have the posterior's 1 event dimensions, .*: got 0 of Normal",
    ),
    function(
        "log_evidence_change", "batch shapes that do not broadcast",
        lambda: bmrs.log_evidence_change(Q, P, bmrs.LogUniform(torch.full((3,), -9.0), torch.zeros(3))),
        ValueError, r"^the three must have batch shapes that broadcast: got .*\(2,\).*\(3,\)",
    ),
    function(
        "reduced_posterior", "reduced_prior outside the prior's bounds",
        lambda: bmrs.reduced_posterior(Q, P, bmrs.LogUniform(-20.0, 1.0)), ValueError,
        r"^reduced_prior must lie within the support of the prior: log θ in \[-20.0, 1.0\]",
    ),
    function(
        "reduced_posterior", "prior is None", lambda: bmrs.reduced_posterior(Q, None, P), TypeError,
        r"^prior must be a distribution: got NoneType$",
    ),
    function(
        "estimate_log_evidence_change", "fewer than 100 draws",
        lambda: bmrs.estimate_log_evidence_change(Q, P, P, draws=99), ValueError,
        r"^draws must be an integer of at least 100: got 99$",
    ),
    function(
        "estimate_log_evidence_change", "seed is text",
        lambda: bmrs.estimate_log_evidence_change(Q, P, P, seed="a"), ValueError,
        r"^seed must be an integer of at least 0: got 'a'$",
    ),
    function(
        "estimate_log_evidence_change", "posterior is None",
        lambda: bmrs.estimate_log_evidence_change(None, P, P), TypeError,
        r"^posterior must be a distribution: got NoneType$",
    ),
    function(
        "estimate_log_evidence_change", "reduced_prior where the posterior has hardly any mass",
        lambda: bmrs.estimate_log_evidence_change(NORMAL, dist.Normal(0.0, 9.0), dist.Normal(30.0, 1.0)),
        bmrs.ImportanceError, r"^only \d+ of 4000 draws carry weight, fewer than \d+",
    ),
    function(
        "register_log_evidence_change", "a distribution, not its type",
        lambda: bmrs.register_log_evidence_change(NORMAL, dist.Normal, dist.Normal), TypeError,
        r"^posterior must be a type of distribution: got Normal\(loc: 0\.0, scale: 1\.0\)$",
    ),
    function(
        "register_reduced_posterior", "reduced_prior is a type of something else",
        lambda: bmrs.register_reduced_posterior(dist.Normal, dist.Normal, int), TypeError,
        r"^reduced_prior must be a type of distribution: got <class 'int'>$",
    ),
]  # fmt: skip


# --- networks, models and guides ------------------------------------------------------------------------

NETWORKS = [
    function(
        "InputSelection", "features is 0", lambda: bmrs.InputSelection(0), ValueError,
        r"^features must be a positive integer: got 0$",
    ),
    function(
        "InputSelection", "dim counts examples", lambda: bmrs.InputSelection(8, dim=0), ValueError,
        r"^dim must be an integer other than 0, which counts examples: got 0$",
    ),
    function(
        "InputSelection", "input of another width", lambda: bmrs.InputSelection(8)(torch.zeros(4, 7)), ValueError,
        r"^input must have 8 features in dimension 1: got shape \(4, 7\)$",
    ),
    function(
        "MultiplicativeNoise", "features is 0", lambda: bmrs.MultiplicativeNoise(0), ValueError,
        r"^features must be a positive integer: got 0$",
    ),
    function(
        "MultiplicativeNoise", "dim counts examples", lambda: bmrs.MultiplicativeNoise(8, dim=0), ValueError,
        r"^dim must not be 0, which counts examples: got 0$",
    ),
    function(
        "MultiplicativeNoise", "dim is text", lambda: bmrs.MultiplicativeNoise(8, dim="last"), ValueError,
        r"^dim must be an integer: got 'last'$",
    ),
    function(
        "MultiplicativeNoise", "bounds of no width", lambda: bmrs.MultiplicativeNoise(8, log_low=0.0),
        ValueError, BOUNDS.format("log_", "0.0", "0.0"),
    ),
    function(
        "MultiplicativeNoise", "input of another width",
        lambda: bmrs.Classifier(plain(bmrs.MultiplicativeNoise(9)))(X, Y), ValueError,
        r"^input of noise layer '2' must have 9 structures in dimension 1: got shape \(40, 8\)$",
    ),
    function(
        "MultiplicativeNoise", "called without a model round it",
        lambda: bmrs.MultiplicativeNoise(8)(torch.zeros(4, 8)), RuntimeError,
        r"^this MultiplicativeNoise layer has no site name yet: call pyro_bmrs.name_sites\(model\)",
    ),
    function(
        "name_sites", "two layers of one name", lambda: bmrs.name_sites(nn.Sequential(*twins())), ValueError,
        r"^two noise layers have the site name 'same': set `site` of one of them$",
    ),
    function(
        "name_sites", "no module", lambda: bmrs.name_sites("net"), TypeError,
        r"^module must be a torch\.nn\.Module: got str$",
    ),
    function(
        "without_noise", "no module", lambda: bmrs.without_noise(None), TypeError,
        r"^module must be a torch\.nn\.Module: got NoneType$",
    ),
    function(
        "structures", "no module", lambda: bmrs.structures("net", X), TypeError,
        r"^network must be a torch\.nn\.Module: got str$",
    ),
    function(
        "structures", "network without parameters", lambda: bmrs.structures(nn.ReLU(), X), ValueError,
        r"^network must have parameters: ReLU has none$",
    ),
    function(
        "structures", "example_input of another width", lambda: bmrs.structures(plain(), X[:, :5]),
        ValueError, r"^example_input must be what network can be called with: Sequential fails with "
        r"RuntimeError: (?P<library>.*)$",
    ),
    function(
        "structures", "example_input is text", lambda: bmrs.structures(plain(), "x"), ValueError,
        r"^example_input must hold a tensor of examples: got str$",
    ),
    function(
        "structures", "example_input without examples", lambda: bmrs.structures(plain(), X[:0]), ValueError,
        r"^example_input must hold at least one example: got shape \(0, 6\)$",
    ),
    function(
        "structures", "leave_out matches nothing", lambda: bmrs.structures(plain(), X, leave_out="layer4.*"),
        ValueError, r"^leave_out must name modules or parameters of the network: none matches 'layer4\.\*'$",
    ),
    function(
        "structures", "leave_out is a number", lambda: bmrs.structures(plain(), X, leave_out=3), TypeError,
        r"^leave_out must be a path, a pattern, or a sequence of them: got 3$",
    ),
    function(
        "structures", "strict, and a weight that is computed",
        lambda: bmrs.structures(nn.Sequential(plain(), spectral_norm(nn.Linear(2, 2))), X, strict=True),
        StructureError, r"^network has layers that can't be handled: 1: the weight of '1' is computed from other "
        r"tensors: call torch\.nn\.utils\.parametrize\.remove_parametrizations\(network\.get_submodule\('1'\), "
        r"'weight'\) first\. Leave them as they are with leave_out=\['1'\]$",
    ),
    function(
        "centred", "a network without LayerNorms", lambda: bmrs.centred(plain(), X), StructureError,
        r"^network must have a stream that LayerNorms read: it has none$",
    ),
    function(
        "insert_noise", "a network that has noise",
        lambda: bmrs.insert_noise(plain(bmrs.MultiplicativeNoise(8)), X), ValueError,
        r"^network must have no noise layers yet: it has \['2'\]$",
    ),
    function(
        "insert_noise", "nothing that can be removed",
        lambda: bmrs.insert_noise(nn.Sequential(nn.Linear(6, 2)), X), StructureError,
        r"^network must have something that can be removed: 0: an output of the network$",
    ),
    function(
        "insert_noise", "NaN in the weights", lambda: bmrs.insert_noise(broken(plain()), X), ValueError,
        r"^network must have finite parameters: got NaN or inf in '0\.weight'$",
    ),
    function(
        "Classifier", "net is a function", lambda: bmrs.Classifier(torch.relu), TypeError,
        r"^net must be a torch\.nn\.Module: got builtin_function_or_method$",
    ),
    function(
        "Classifier", "logits is no function", lambda: bmrs.Classifier(plain(), logits="logits"), TypeError,
        r"^logits must be a function of the network's output, or None: got 'logits'$",
    ),
    function(
        "Classifier", "dataset_size is 0", lambda: bmrs.Classifier(plain(), dataset_size=0), ValueError,
        r"^dataset_size must be a positive integer or None: got 0$",
    ),
    function(
        "Classifier", "class_dim that the logits have not",
        lambda: bmrs.Classifier(plain(), class_dim=2)(X, Y), ValueError,
        r"^class_dim must be a dimension of the logits, of shape \(40, 2\): got 2$",
    ),
    function(
        "Classifier", "y of another shape", lambda: bmrs.Classifier(plain())(X, Y[:3]), ValueError,
        r"^y must have shape \(40,\) for logits of shape \(40, 2\) with class_dim=1: got \(3,\)$",
    ),
    function(
        "Classifier.log_likelihood", "labels from 0 to 7, of two classes",
        lambda: bmrs.Classifier(plain()).log_likelihood(X, Y * 7), ValueError,
        r"^y must hold labels of the 2 classes, 0 to 1: got 0 to 7$",
    ),
    function(
        "Classifier", "y of floating point", lambda: bmrs.Classifier(plain())(X, Y.float()), ValueError,
        r"^y must hold numbers of classes, integers: got torch\.float32$",
    ),
    function(
        "Classifier", "a network that gives a tuple", lambda: bmrs.Classifier(Pair())(X, Y), TypeError,
        r"^Classifier needs a tensor from the network: got tuple; pass a callable that finds it",
    ),
    function(
        "Regressor", "scale is negative", lambda: bmrs.Regressor(plain(), scale=-1.0), ValueError,
        r"^scale must be positive or None, and finite: got -1\.0$",
    ),
    function(
        "Regressor", "y of another shape", lambda: bmrs.Regressor(plain())(X, Y), ValueError,
        r"^y must have the output's shape \(40, 2\): got \(40,\)$",
    ),
    function(
        "AutoTruncatedLogNormal", "model is None", lambda: bmrs.AutoTruncatedLogNormal(None), TypeError,
        r"^model must be a Pyro model: got NoneType$",
    ),
    function(
        "AutoTruncatedLogNormal", "init_scale is 0", lambda: guide_of(init_scale=0.0), ValueError,
        r"^init_scale must be positive and finite: got 0\.0$",
    ),
    function(
        "AutoTruncatedLogNormal", "a latent that is no scale",
        lambda: bmrs.AutoTruncatedLogNormal(weights_of)(*LINE), ValueError,
        r"^model has a latent 'weights' with prior Normal: AutoTruncatedLogNormal takes LogUniform or ",
    ),
    function(
        "AutoTruncatedLogNormal", "posterior() before the guide was called", lambda: guide_of().posterior(),
        RuntimeError, r"^guide has no parameters yet: call it once on a batch, or fit it$",
    ),
    function(
        "AutoKroneckerLaplace", "a network with noise",
        lambda: bmrs.AutoKroneckerLaplace(bmrs.Classifier(plain(bmrs.MultiplicativeNoise(8)))), ValueError,
        r"^model must have a network without noise layers: this guide is for the weights of a trained one$",
    ),
    function(
        "AutoKroneckerLaplace", "model is a network", lambda: bmrs.AutoKroneckerLaplace(plain()), TypeError,
        r"^model must be a Classifier or a Regressor around a network: got Sequential$",
    ),
    function(
        "AutoKroneckerLaplace", "examples is 0",
        lambda: bmrs.AutoKroneckerLaplace(bmrs.Classifier(plain()), examples=0), ValueError,
        r"^examples must be a positive integer: got 0$",
    ),
    function(
        "AutoKroneckerLaplace", "posterior() before the fit",
        lambda: bmrs.AutoKroneckerLaplace(bmrs.Classifier(plain())).posterior(), RuntimeError,
        r"^guide has no posterior yet: call fit\(model, guide, train\)$",
    ),
    function(
        "predict", "a guide with a plain network", lambda: bmrs.predict(plain(), fitted().guide, X), ValueError,
        r"^guide must be one of this model, or None: Sequential has none of its latents \[",
    ),
    function(
        "recalibrate", "a network with noise",
        lambda: bmrs.recalibrate(plain(bmrs.MultiplicativeNoise(8)), (X, Y)), ValueError,
        r"^network must have no noise layers: apply the reduction first$",
    ),
    function(
        "recalibrate", "no module", lambda: bmrs.recalibrate(None, (X, Y)), TypeError,
        r"^network must be a torch\.nn\.Module: got NoneType$",
    ),
    function(
        "recalibrate", "batch_size is 1",
        lambda: bmrs.recalibrate(plain(nn.BatchNorm1d(8)), (X, Y), batch_size=1), ValueError,
        r"^batch_size must be an integer of at least 2: got 1$",
    ),
    function(
        "recalibrate", "data without examples",
        lambda: bmrs.recalibrate(plain(nn.BatchNorm1d(8)), (X[:0], Y[:0])), ValueError,
        r"^data must not be empty$",
    ),
    function(
        "recalibrate", "data is a list", lambda: bmrs.recalibrate(plain(nn.BatchNorm1d(8)), [X, Y]),
        TypeError,
        r"^data must be \(x, y\) tensors, a Dataset or a DataLoader: got a list of Tensor, Tensor$",
    ),
    function(
        "recalibrate", "a seed that torch does not take",
        lambda: bmrs.recalibrate(plain(nn.BatchNorm1d(8)), (X, Y), seed=2**63), ValueError,
        r"^seed must be below 2\*\*63: got 9223372036854775808$",
    ),
    function(
        "recalibrate", "seed is text", lambda: bmrs.recalibrate(plain(nn.BatchNorm1d(8)), (X, Y), seed="a"),
        ValueError, r"^seed must be an integer of at least 0: got 'a'$",
    ),
    function(
        "recalibrate", "NaN in the data", lambda: bmrs.recalibrate(plain(nn.BatchNorm1d(8)), (HOLE, Y)),
        ValueError, r"^data must give finite activations: a running mean or variance is NaN or inf$",
    ),
]  # fmt: skip


# --- fitting ---------------------------------------------------------------------------------------------

LOSS = r"^loss became nan at batch \d of epoch 1; the parameters of epoch 0 are back in place\. Lower learning_rate"

FITS = [
    function(
        "fit", "model is a text", lambda: bmrs.fit("lenet5", None, (X, Y)), TypeError,
        r"^model must be a Pyro model: got str$",
    ),
    function(
        "fit", "model observes nothing", lambda: bmrs.fit(lambda x, y: None, None, (X, Y)), ValueError,
        r"^model must observe y when called as model\(x, y\): it has no observed site$",
    ),
    function(
        "fit", "no guide for a model with noise", lambda: fit(guide=False), ValueError,
        r"^guide must be given for a model with noise layers \['2', '5'\]$",
    ),
    function(
        "fit", "train is a list", lambda: fit([X, Y]), TypeError,
        r"^train must be \(x, y\) tensors, a Dataset or a DataLoader: got a list of Tensor, Tensor$",
    ),
    function(
        "fit", "train without examples", lambda: fit((X[:0], Y[:0])), ValueError,
        r"^train must not be empty$",
    ),
    function(
        "fit", "fewer labels than examples", lambda: fit((X, Y[:3])), ValueError,
        r"^train must have as many labels as examples: got 40 and 3$",
    ),
    function(
        "fit", "validation without examples", lambda: fit(validation=(X[:0], Y[:0])), ValueError,
        r"^validation must not be empty$",
    ),
    function(
        "fit", "a seed that torch does not take", lambda: fit(seed=2**63), ValueError,
        r"^seed must be less than 9223372036854775808: got 9223372036854775808$",
    ),
    function("fit", "NaN in the inputs", lambda: fit((HOLE, Y)), FloatingPointError, LOSS),
    function(
        "fit", "NaN in the weights", lambda: fit_of(broken(noisy())), ValueError,
        r"^model must have finite parameters: got NaN or inf in 'net\.0\.weight'$",
    ),
    function(
        "fit", "labels from 0 to 7, of two classes", lambda: fit((X, Y * 7)), ValueError,
        r"^y must hold labels of the 2 classes, 0 to 1: got 0 to 7$",
    ),
    function("fit", "labels of a single class", lambda: fit((X, Y * 0)), WORKS, ""),
    function("fit", "batch_size larger than the data", lambda: fit(batch_size=5000), WORKS, ""),
    function(
        "fit", "batch_size is 0", lambda: fit(batch_size=0), ValueError,
        r"^batch_size must be greater than or equal to 1: got 0$",
    ),
    function(
        "fit", "epochs is a fraction", lambda: fit(epochs=1.5), ValueError,
        r"^epochs must be a whole number: got 1\.5$",
    ),
    function(
        "fit", "learning_rate is NaN", lambda: fit(learning_rate=math.nan), ValueError,
        r"^learning_rate must be a finite number: got nan$",
    ),
    function(
        "fit", "schedule of an unknown name", lambda: fit(schedule="step"), ValueError,
        r"^schedule must be one of constant, cosine, linear or a function: got 'step'$",
    ),
    function(
        "fit", "a setting that there is not", lambda: fit(epoch=3), ValueError,
        r"^settings must be among epochs, .*: got 'epoch'$",
    ),
    function(
        "Settings", "two bad values", lambda: bmrs.Settings(epochs=0, removal="mask"), ValueError,
        r"^epochs must be greater than or equal to 1: got 0; removal must be 'end' or 'epoch': got 'mask'$",
    ),
    function(
        "fit", "criterion is a type", lambda: fit(criterion=bmrs.SNR), TypeError,
        r"^criterion must be made, SNR\(\): got the class <class 'pyro_bmrs\.pruning\.criteria\.SNR'>$",
    ),
    function(
        "fit", "device of an unknown name", lambda: fit(device="toaster"), ValueError,
        r"""^device must be "auto", None or what torch.device takes: got 'toaster' \((?P<library>.*)\)$""",
    ),
    function(
        "fit", "elbo of an unknown name", lambda: fit(elbo="tight"), ValueError,
        r"^elbo must be 'auto', 'fused', 'packed' or 'pyro': got 'tight'$",
    ),
    on_disk(
        "fit", "checkpoints is a file", lambda: fit(checkpoints="file"), ValueError,
        r"^checkpoints must be a folder that can be written to: got file, and file is none$",
    ),
    on_disk(
        "fit", "checkpoints of another fit", lambda: fit(checkpoints="saved", seed=3), ValueError,
        r"^checkpoints saved holds another fit \(seed 0 → 3\): choose another folder, or remove it",
        lambda: fit(checkpoints="saved"),
    ),
    on_disk(
        "checkpoints", "the newest cut short", lambda: fit(checkpoints="saved", epochs=2, keep_checkpoints=9),
        WARNS,
        r"^checkpoint saved/epoch-0002\.safetensors can't be used, the one before it is: .* is damaged or "
        r"no safetensors file: (?P<library>.*)$",
        both(lambda: fit(checkpoints="saved", epochs=2, keep_checkpoints=9), cut("saved/epoch-0002.safetensors")),
    ),
    on_disk(
        "checkpoints", "of a newer version", lambda: fit(checkpoints="saved"), NewerFileError,
        r"^saved/epoch-0001\.safetensors was written by a newer pyro_bmrs \(checkpoint version 99, this one reads "
        r"up to \d+\): upgrade pyro_bmrs$",
        both(lambda: fit(checkpoints="saved"), edit_header("saved/epoch-0001.safetensors", version=99)),
    ),
]  # fmt: skip


# --- reducing -------------------------------------------------------------------------------------------

REDUCTIONS = [
    function(
        "BMRS_N", "scale is 0", lambda: bmrs.BMRS_N(scale=0.0), ValueError,
        r"^scale must be positive and finite: got 0\.0$",
    ),
    function(
        "BMRS_N", "prior_log_odds is NaN", lambda: bmrs.BMRS_N(prior_log_odds=math.nan), ValueError,
        r"^prior_log_odds must be finite: got nan$",
    ),
    function(
        "BMRS_U", "bits is infinite", lambda: bmrs.BMRS_U(bits=math.inf), ValueError,
        r"^bits must be finite: got inf$",
    ),
    function(
        "BMRS_U", "floor_bits below bits", lambda: bmrs.BMRS_U(bits=8, floor_bits=4), ValueError,
        r"^floor_bits must be above bits=8, or None: got 4$",
    ),
    function(
        "BMRS_U", "2^-bits below the prior's bounds", lambda: reduce(bmrs.BMRS_U(bits=60)), ValueError,
        r"^bits must leave an interval above its lower end: 2\^-bits is 8\.67e-19, the lower end 2\.06e-09$",
    ),
    function(
        "SNR", "threshold is 0", lambda: bmrs.SNR(0.0), ValueError,
        r"^threshold must be positive and finite: got 0\.0$",
    ),
    function(
        "ExpectedScale", "threshold above 1", lambda: bmrs.ExpectedScale(1.5), ValueError,
        r"^threshold must be between 0 and 1: got 1\.5$",
    ),
    function(
        "WeightNorm", "fraction above 1", lambda: bmrs.WeightNorm(1.5), ValueError,
        r"^fraction must be in \[0, 1\]: got 1\.5$",
    ),
    function(
        "Random", "fraction is negative", lambda: bmrs.Random(-0.1), ValueError,
        r"^fraction must be in \[0, 1\]: got -0\.1$",
    ),
    function(
        "Random", "seed is a fraction", lambda: bmrs.Random(seed=1.5), ValueError,
        r"^seed must be an integer of at least 0: got 1\.5$",
    ),
    function(
        "reduce", "model is None", lambda: bmrs.reduce(None, fitted().guide, bmrs.BMRS_N()), TypeError,
        r"^model must be a Pyro model: got NoneType$",
    ),
    function(
        "reduce", "guide is None", lambda: bmrs.reduce(fitted().model, None, bmrs.BMRS_N(), X, Y), TypeError,
        r"^guide must be a Pyro guide: got NoneType$",
    ),
    function(
        "reduce", "guide that was never called",
        lambda: bmrs.reduce(SmallFit("plain").model, SmallFit("plain").guide, bmrs.BMRS_N()), RuntimeError,
        r"^guide has no parameters yet: call it once on a batch, or fit it$",
    ),
    function(
        "reduce", "model without noise",
        lambda: bmrs.reduce(bmrs.Classifier(plain()), fitted().guide, bmrs.BMRS_N()), ValueError,
        r"^model must hold MultiplicativeNoise layers: Classifier has none$",
    ),
    function(
        "reduce", "guide of another model",
        lambda: bmrs.reduce(bmrs.Classifier(wide()), fitted().guide, bmrs.BMRS_N()), ValueError,
        r"^guide must have a posterior of the 9 structures of '2': it has one of shape \(12,\)$",
    ),
    function(
        "reduce", "criterion is text", lambda: reduce("BMRS_N"), TypeError,
        r"^criterion must be one of pyro_bmrs's or a function of layers that returns scores: got 'BMRS_N'$",
    ),
    function(
        "reduce", "criterion is an empty mapping", lambda: reduce_by({}), ValueError,
        r"^criterion must name at least one site and its reduced prior: got an empty mapping$",
    ),
    function(
        "reduce", "min_kept is 0", lambda: reduce(min_kept=0), ValueError,
        r"^min_kept must be an integer of at least 1, or a share between 0 and 1: got 0$",
    ),
    function(
        "reduce", "round_to is a fraction", lambda: reduce(round_to=2.5), ValueError,
        r"^round_to must be a positive integer or None: got 2\.5$",
    ),
    function(
        "reduce", "kl_weight is NaN", lambda: reduce(kl_weight=math.nan), ValueError,
        r"^kl_weight must be finite and not negative, or None: got nan$",
    ),
    function(
        "reduce", "groups with a criterion", lambda: reduce(groups={"all": {"2": ...}}), ValueError,
        r"^groups, prior_log_odds and dependent_priors go with a mapping .*: got them with BMRS_N",
    ),
    function(
        "reduce", "NaN in the posterior", lambda: bmrs.reduce(*nan_guide(), bmrs.BMRS_N()),
        NonFiniteScoreError,
        r"^BMRS_N \(prior log-odds 0\.919\) gave structures \[2\] of layer '2' a score that is not finite \(\[nan\]\); "
        r"nothing is removed$",
    ),
    function(
        "reduce", "a site that the model has not", lambda: search(bmrs.reduce, {"bias": 0.0}), ValueError,
        r"^guide must have a posterior of each of \['bias'\]: it has none of \['bias'\], only of \['weights'\]$",
    ),
    function(
        "reduce", "a reduced prior that is text", lambda: search(bmrs.reduce, {"weights": "zero"}), TypeError,
        r"^criterion must give 'weights' a distribution or a number \(a point mass\): got str$",
    ),
    function(
        "reduce", "a reduced prior of another shape",
        lambda: search(bmrs.reduce, {"weights": torch.zeros(4)}), ValueError,
        r"^criterion must give 'weights' a reduced prior that broadcasts to its shape \(3,\): got .* of shape \(4,\) "
        r"\((?P<library>.*)\)$",
    ),
    function(
        "reduce", "fewer than 100 draws", lambda: search(bmrs.reduce, draws=5), ValueError,
        r"^draws must be an integer of at least 100: got 5$",
    ),
    function(
        "reduce", "prior_log_odds is NaN", lambda: search(bmrs.reduce, prior_log_odds=math.nan), ValueError,
        r"^prior_log_odds must be a finite number: got nan$",
    ),
    function(
        "reduce", "a group of no site", lambda: search(bmrs.reduce, groups={"g": {"bias": [0]}}), ValueError,
        r"^groups must name sites of \['weights'\]: 'g' has \['bias'\]$",
    ),
    function(
        "reduce", "an element beyond the site", lambda: search(bmrs.reduce, groups={"g": {"weights": [7]}}),
        ValueError,
        r"^groups must give numbers below 3, a slice, a bool tensor, or \.\.\. .* of 'weights': 'g' has \[7\]$",
    ),
    function(
        "reduce", "dependent_priors of an unknown name",
        lambda: search(bmrs.reduce, dependent_priors="guess"), ValueError,
        r"^dependent_priors must be 'raise' or 'average': got 'guess'$",
    ),
    function(
        "exhaustive_reduction", "an empty mapping", lambda: search(bmrs.exhaustive_reduction, {}), ValueError,
        r"^criterion must name at least one site and its reduced prior: got an empty mapping$",
    ),
    function(
        "exhaustive_reduction", "two groups that share an element",
        lambda: search(bmrs.exhaustive_reduction, groups={"a": {"weights": [0]}, "b": {"weights": [0, 1]}}),
        ValueError, r"^groups must not share elements: elements \[0\] of 'weights' are in two$",
    ),
    function(
        "exhaustive_reduction", "log-odds of an unknown group",
        lambda: search(bmrs.exhaustive_reduction, prior_log_odds={"slope": 1.0}), ValueError,
        r"^prior_log_odds must be of the groups \[.*'weights\[0\]'.*\]: got \['slope'\]$",
    ),
    function(
        "exhaustive_reduction", "model is None",
        lambda: bmrs.exhaustive_reduction(None, line_guide(), {"weights": 0.0}, *LINE), TypeError,
        r"^model must be a Pyro program: got NoneType$",
    ),
    function(
        "greedy_reduction", "guide is None",
        lambda: bmrs.greedy_reduction(weights_of, None, {"weights": 0.0}, *LINE), TypeError,
        r"^guide must be a Pyro program: got NoneType$",
    ),
    function(
        "greedy_reduction", "no arguments for the model",
        lambda: bmrs.greedy_reduction(weights_of, line_guide(), {"weights": 0.0}), ValueError,
        r"^model_args must be what the model is called with: got 0 of them, and the model says: (?P<library>.*)$",
    ),
    function(
        "greedy_reduction", "seed is text", lambda: search(bmrs.greedy_reduction, seed="a"), ValueError,
        r"^seed must be an integer of at least 0: got 'a'$",
    ),
    function(
        "evidence_curve", "no parameter",
        lambda: bmrs.evidence_curve(fitted().model, fitted().guide, bmrs.BMRS_U()), TypeError,
        r"^evidence_curve takes the values of one parameter, such as bits=\[2, 4, 8\]: got none$",
    ),
    function(
        "evidence_curve", "a parameter that the criterion has not", lambda: curve_of(threshold=[1.0]),
        TypeError, r"^BMRS_U has the parameters bits, floor_bits, prior_log_odds: got 'threshold'$",
    ),
    function(
        "evidence_curve", "values with NaN", lambda: curve_of(bits=[2.0, math.nan]), ValueError,
        r"^bits must be finite values, at least one: got \[2\.0, nan\]$",
    ),
    function(
        "evidence_curve", "a criterion without evidence",
        lambda: bmrs.evidence_curve(fitted().model, fitted().guide, bmrs.SNR(), threshold=[1.0]), TypeError,
        r"^criterion must be BMRS_N\(\), BMRS_U\(\) or a mapping of sites: got SNR\(threshold=1\.0\)$",
    ),
    function(
        "ModelPosterior.reduced", "a model that there is none of", lambda: model_posterior().reduced(8),
        ValueError, r"^model must be a number below 8: got 8$",
    ),
    function(
        "ModelPosterior.occams_window", "ratio is 1", lambda: model_posterior().occams_window(1.0),
        ValueError, r"^ratio must be a number above 1: got 1\.0$",
    ),
    function(
        "ModelPosterior.table", "count is negative", lambda: model_posterior().table(-1), ValueError,
        r"^count must be a positive integer: got -1$",
    ),
    function(
        "plot_models", "posterior is None", lambda: bmrs.plot_models(None), TypeError,
        r"^posterior must be what exhaustive_reduction returned: got NoneType$",
    ),
    function(
        "plot_models", "count is 0", lambda: bmrs.plot_models(model_posterior(), count=0), ValueError,
        r"^count must be a positive integer: got 0$",
    ),
    function(
        "plot_reductions", "no reduced priors",
        lambda: bmrs.plot_reductions(NORMAL, NORMAL, {}, torch.linspace(-1, 1, 9)), ValueError,
        r"^reduced_priors must be one or more, by their names: got \{\}$",
    ),
    function(
        "plot_reductions", "several elements", lambda: bmrs.plot_reductions(Q, P, {"half": P}, X[:, 0]),
        ValueError, r"^posterior and priors of 'half' must be of one element: got \(2,\)$",
    ),
    function(
        "plot_evidence_curve", "a table without its columns",
        lambda: bmrs.plot_evidence_curve(pd.DataFrame({"bits": [1.0]})), ValueError,
        r"^curve lacks the columns 'log_evidence_change', 'reduced', 'chosen', 'mixture'; it needs .* and has bits$",
    ),
    function(
        "RemovalOrder", "by is size", lambda: bmrs.RemovalOrder(by="size"), ValueError,
        r'^by must be "loss" or "evidence": got \'size\'$',
    ),
    function(
        "LaplacePlan.load", "no such file", lambda: bmrs.LaplacePlan.load("missing.json"), ValueError,
        r"^path must be a plan written by save: missing\.json can't be read (?P<system>.*)$",
    ),
    function(
        "NetworkPlan.within", "nothing asked for", lambda: fitted().plan.within(), ValueError,
        r"^a budget must be one of parameters, macs, bytes, milliseconds, accuracy_drop, loss_rise: got 'none'$",
    ),
    function(
        "NetworkPlan.within", "more than there is to remove", lambda: fitted().plan.within(parameters=3), ValueError,
        r"^parameters must be at least \d+, which is left at the floors of all layers: got 3$",
    ),
    function(
        "NetworkPlan.within", "a loss without data", lambda: fitted().plan.within(loss_rise=0.1), TypeError,
        r"^data must be \(x, y\) to look at losses on: got None$",
    ),
    function(
        "NetworkPlan.apply", "another network", lambda: fitted().plan.apply(wide(), X), ValueError,
        r"^network must have the noise layers of the plan, \{'2': 12, '5': 8\}: got \{'2': 9\}$",
    ),
    function(
        "NetworkPlan.apply", "example_input of another width",
        lambda: fitted().plan.apply(fitted().model.net, X[:, :5]), ValueError,
        r"^example_input must be what network can be called with: Sequential fails with RuntimeError: (?P<library>.*)$",
    ),
    function(
        "NetworkPlan.costs", "small is a text", lambda: fitted().plan.costs("small.pt2"), TypeError,
        r"^small must be a torch\.nn\.Module: got str$",
    ),
    function(
        "NetworkPlan.costs", "seconds is negative",
        lambda: fitted().plan.costs(fitted().plan.apply(), seconds=-1.0), ValueError,
        r"^seconds must be 0 or more: got -1\.0$",
    ),
    function(
        "NetworkPlan.apply", "NaN in the weights", lambda: fitted().plan.apply(broken(noisy()), X), ValueError,
        r"^network must have finite parameters: got NaN or inf in '0\.weight'$",
    ),
    function(
        "NetworkPlan.at", "threshold is NaN", lambda: fitted().plan.at(math.nan), ValueError,
        r"^threshold must be a number or None: got nan$",
    ),
    function(
        "NetworkPlan.shrink", "guide is None", lambda: fitted().plan.shrink(fitted().model, None), TypeError,
        r"^guide must be an AutoTruncatedLogNormal: got NoneType$",
    ),
    function(
        "NetworkPlan.rebuild", "a plan whose network has shrunk since", lambda: outlived().rebuild(noisy()), ValueError,
        r"^plan must say what to cut: this one was made without a network, or that has shrunk since$",
    ),
    function(
        "ProgramPlan.reduced_posterior", "a plan that was pickled",
        lambda: pickle.loads(pickle.dumps(search(bmrs.reduce))).reduced_posterior(), ValueError,
        r"^plan must be ",
    ),
    function(
        "Rule", "min_kept is negative", lambda: bmrs.Rule(criterion="own", min_kept=-1), ValueError,
        r"^min_kept must be an integer of 0 or more, or a share between 0 and 1: got -1$",
    ),
    function(
        "ReducedPosterior", "whose density is not known, as a guide to be checked",
        lambda: bmrs.check_posterior(weights_of, search(bmrs.reduce).reduced_posterior(), LINE, draws=100),
        ValueError,
        r"^guide must have a density that is known, to be compared with the model's: .* reduced posterior of a plan$",
    ),
]  # fmt: skip


# --- diagnostics ----------------------------------------------------------------------------------------

DIAGNOSTICS = [
    function(
        "check_posterior", "data is a list", lambda: check_posterior([X, Y]), TypeError,
        r"^data must be a tuple of the arguments.*: got list$",
    ),
    function(
        "check_posterior", "fewer than 100 draws", lambda: check_posterior(draws=10), ValueError,
        r"^draws must be an integer of at least 100: got 10$",
    ),
    function(
        "check_posterior", "NaN in the data", lambda: check_posterior((HOLE, Y), draws=100), ValueError,
        r"^Expected parameter logits ",
    ),
    function(
        "check_posterior", "kl_weight is negative", lambda: check_posterior(kl_weight=-1.0), ValueError,
        r"^kl_weight must be a number from 0 on: got -1\.0$",
    ),
    function(
        "check_posterior", "dataset_size below the examples given", lambda: check_posterior(dataset_size=3),
        ValueError,
        r"^dataset_size must be the number of all examples, of which data has 40 in batches: got 3$",
    ),
    function(
        "to_datatree", "draws is 0", lambda: to_datatree(draws=0), ValueError,
        r"^draws must be an integer of at least 1: got 0$",
    ),
    function(
        "to_datatree", "no arguments", lambda: to_datatree(()), TypeError,
        r"^data must be \(x, y\) tensors, a Dataset or a DataLoader: got a tuple of nothing$",
    ),
    function(
        "to_datatree", "guide is None", lambda: bmrs.to_datatree(weights_of, None, LINE), TypeError,
        r"^guide must be a Pyro guide: got NoneType$",
    ),
    function(
        "loo", "a table", lambda: bmrs.loo(pd.DataFrame()), TypeError,
        r"^tree must be an xarray\.DataTree, as to_datatree makes it: got DataFrame$",
    ),
    function(
        "loo", "a tree without log_likelihood", lambda: bmrs.loo(xarray.DataTree()), ValueError,
        r"^tree must have the group log_likelihood, as to_datatree makes it: it has \[\]$",
    ),
    function(
        "loo", "fewer than 100 draws", lambda: bmrs.loo(drawn(np.zeros(20))), ValueError,
        r"^tree must have at least 100 draws: got 20$",
    ),
    function(
        "loo", "a posterior far from the exact one", lambda: bmrs.loo(drawn(np.geomspace(1, 900, 100))),
        ValueError,
        r"^tree must be of a posterior near the exact one: k̂ of its draws is (?P<library>.*), above 0\.50, so",
    ),
    function(
        "loo", "NaN in log_p", lambda: bmrs.loo(drawn(np.full(100, math.nan))), ValueError,
        r"^tree must have log_p - log_q that is finite, or -inf: got NaN or inf$",
    ),
    function(
        "loo", "an unknown var_name", lambda: bmrs.loo(drawn(np.zeros(100)), var_name="z"), ValueError,
        r"^var_name must be one of the observed sites \['y'\]: got 'z'$",
    ),
    function(
        "diagnose", "plan is None", lambda: diagnose(plan=None), TypeError,
        r"^plan must be a NetworkPlan: got NoneType$",
    ),
    function(
        "diagnose", "fine_tuned is a network, no model", lambda: diagnose(fine_tuned=nn.Linear(6, 2)), ValueError,
        r"^fine_tuned must be a Pyro model of \(x, y\), such as Classifier\(network\): got Linear, which takes one "
        r"argument$",
    ),
    function(
        "diagnose", "test without examples", lambda: diagnose(test=(X[:0], Y[:0])), ValueError,
        r"^test must not be empty$",
    ),
    function(
        "diagnose", "out_of_distribution of another shape",
        lambda: diagnose(out_of_distribution={"far": X[:, :2]}), ValueError,
        r"^out_of_distribution must be inputs like those of test: got shape \(40, 2\)$",
    ),
    function(
        "diagnose", "labels from 0 to 7, of two classes", lambda: diagnose(test=(X, Y * 7)), ValueError,
        r"^labels in data must be classes 0 to 1, or -1 everywhere: got 7$",
    ),
    function(
        "frontier", "points is 1", lambda: bmrs.frontier(fitted().plan, (X, Y), points=1), ValueError,
        r"^points must be an integer of at least 2: got 1$",
    ),
    function(
        "frontier", "plan is text", lambda: bmrs.frontier("plan", (X, Y)), TypeError,
        r"^plan must be a NetworkPlan: got str$",
    ),
    function(
        "Frontier.load", "a file without one", lambda: bmrs.Frontier.load("file", fitted().plan), ValueError,
        r"^file is damaged: .*$",
    ),
    function(
        "compression_curve", "points is 1", lambda: curve(points=1), ValueError,
        r"^points must be at least 2: got 1$",
    ),
    function(
        "compression_curve", "plan is text", lambda: bmrs.compression_curve(fitted().model, "plan", (X, Y)),
        TypeError, r"^plan must be a NetworkPlan: got str$",
    ),
    function(
        "compression_curve", "data without examples", lambda: curve((X[:0], Y[:0])), ValueError,
        r"^data must not be empty$",
    ),
    on_disk(
        "report", "plan is None", lambda: bmrs.report(None, None), TypeError,
        r"^plan must be what reduce returned: got NoneType$",
    ),
    on_disk(
        "report of a Fit", "a history without its columns",
        lambda: bmrs.report(bmrs.Fit(pd.DataFrame({"epoch": [1]}), pd.DataFrame(), {}, 1), fitted().plan),
        ValueError, r"^fit\.history lacks the columns 'phase'",
    ),
    on_disk(
        "report", "out below a file", lambda: bmrs.report(None, fitted().plan, "file/report.html"),
        ValueError,
        r"^out must be in a folder that can be written to: got file/report\.html, and file is none$",
    ),
    on_disk(
        "report", "out is a folder", lambda: bmrs.report(None, fitted().plan, "empty"), ValueError,
        r"^out must be a file to write: got the folder empty$",
    ),
    on_disk(
        "report", "a curve with no rows",
        lambda: bmrs.report(None, fitted().plan, curve=pd.DataFrame({"accuracy": []})), ValueError,
        r"^curve lacks the columns",
    ),
]  # fmt: skip


# --- data -----------------------------------------------------------------------------------------------


def load(name="own.npz", **options):
    return bmrs.load_data(name, **options)


def npz_case(wrong, says, **changed):
    """A data file that is read and refused."""
    return on_disk("data .npz", wrong, load, ValueError, says, lambda: write_npz(**changed))


ONE, TWO = X.numpy(), Y.numpy()
DATA = [
    on_disk(
        "load_data", "a name of no data set", lambda: load("nothing"), ValueError,
        r"^name must be 'digits', .* that exists: got 'nothing'$",
    ),
    on_disk(
        "load_data", "validation_fraction is 1", lambda: load(validation_fraction=1.0), ValueError,
        r"^validation_fraction must be strictly between 0 and 1: got 1\.0$",
    ),
    on_disk(
        "load_data", "seed is negative", lambda: load(seed=-1), ValueError,
        r"^seed must be an integer of at least 0: got -1$",
    ),
    on_disk("load_data", "limit beyond the data", lambda: load(limit=5000), WORKS, ""),
    on_disk(
        "load_data", "limit leaves nothing to validate on", lambda: load(limit=2), ValueError,
        r"^validation_fraction must be such that 2 training examples leave 1 or more to .*, not 2 and 0: got 0\.2$",
    ),
    on_disk(
        "load_data", "image_size for vectors", lambda: load(image_size=8), ValueError,
        r"^image_size must be left out for vectors, as 'own\.npz' holds: got 8$",
    ),
    on_disk(
        "load_data", "mnist without torchvision", lambda: load("mnist", data_root="empty"), ValueError,
        r"^name is 'mnist', which needs torchvision: pip install 'pyro-bmrs\[vision\]'$",
        missing="torchvision",
    ),
    on_disk(
        "data .npz", "no such file", lambda: load("gone.npz"), ValueError,
        r"^name must be a file that exists: got 'gone\.npz'$",
    ),
    on_disk(
        "data .npz", "cut short", load, ValueError,
        r"^name must be a whole \.npz file .*: got 'own\.npz': (?P<library>.*)$",
        cut("own.npz"),
    ),
    npz_case(
        "y_test is missing", r"^name must be a whole \.npz file with .*: got 'own\.npz': it lacks y_test and holds ",
        y_test=None,
    ),
    npz_case(
        "NaN in x_train", r"^x_train must be finite in float32: got '6 values that are not'$",
        x_train=HOLE.numpy(),
    ),
    npz_case(
        "x_train has one dimension", r"^x_train must be uint8 .* of shape .*: got 'float32 of shape \(40,\)'$",
        x_train=ONE[:, 0],
    ),
    npz_case(
        "x_test of another width", r"^x_test must be like x_train, .*\(40, 6\): got 'float32 of shape \(20, 5\)'$",
        x_test=ONE[:20, :5],
    ),
    npz_case(
        "fewer labels than examples",
        r"^y_train must be integers of shape \(40,\), a label for each example, or floating point, .*: got "
        r"'int64 of shape \(39,\)'$", y_train=TWO[:39],
    ),
    npz_case(
        "labels 1 and 2", r"^y_train must be 0 to .*: got '2 different labels from 1 to 2'$",
        y_train=TWO + 1,
    ),
    npz_case(
        "a label in y_test that y_train has not",
        r"^y_test must be labels in the range of y_train, 0 to 1: got 'labels from 0 to 7'$", y_test=7 * TWO[:20],
    ),
    on_disk(
        "image folder", "no class folders", lambda: load("empty"), ValueError,
        r"^name must be a folder with one folder of images for each class, 2 or more: got 'empty'$",
    ),
    on_disk(
        "image folder", "a class of one image", lambda: load("images"), ValueError,
        r"^name must be a folder with at least 2 images of .* \(1 of class 1\): got 'images'$", images(4, 1),
    ),
    on_disk(
        "image folder", "an image cut short", lambda: load("images"), ValueError,
        r"^name must lead to readable images of 8 bits a channel: got 'images/class 0/0\.png': (?P<library>.*)$",
        both(images(4, 4), cut("images/class 0/0.png")),
    ),
    on_disk(
        "image folder", "images of two sizes", lambda: load("images"), ValueError,
        r"^image_size must be given in pixels where .* differ .* in 'images' from \(8, 8\) to \(9, 9\): got None$",
        both(images(4, 4), lambda: Image.new("L", (9, 9)).save("images/class 1/9.png")),
    ),
    on_disk(
        "image folder", "train/ without test/", lambda: load("images"), ValueError,
        r"^name must be a folder of classes, or of train/ and test/ both, .*: got 'images with train/ alone'$",
        images(4, 4, folder="images/train"),
    ),
]  # fmt: skip


# --- files ----------------------------------------------------------------------------------------------


def load_plan():
    return bmrs.NetworkPlan.load("run/plan.json")


def rebuild():
    return load_plan().rebuild(Recipe.read("net.py").module.network((6,), 2), "run/small.safetensors")


def posterior_of(folder="run"):
    Run(folder, progress=False).load_posterior()


def load_diagnosis():
    return bmrs.Diagnosis.load("run/diagnosis")


def save_tree(path):
    return bmrs.save_datatree(drawn(np.zeros(100)), path)


def load_tree():
    return bmrs.load_datatree("tree.nc")


def columns(path, **changed):
    """Spoils a CSV file: other columns; None: left out."""

    def spoil():
        table = pd.read_csv(path)
        kept = table.drop(columns=[name for name, values in changed.items() if values is None])
        kept.assign(**{name: values for name, values in changed.items() if values is not None}).to_csv(
            path, index=False
        )

    return spoil


PLAN, NUMBERS = "run/plan.json", "run/plan.numbers.safetensors"
POSTERIOR, SMALL, SETTINGS = "run/posterior.safetensors", "run/small.safetensors", "run/settings.json"
FILES = [
    on_disk(
        "NetworkPlan.load", "a name that does not end in .json", lambda: bmrs.NetworkPlan.load("run/plan"),
        ValueError, r"^path must be a file whose name ends in \.json: got 'run/plan'$",
    ),
    on_disk(
        "NetworkPlan.save", "a name that does not end in .json", lambda: fitted().plan.save("plan.txt"),
        ValueError, r"^path must be a file whose name ends in \.json: got 'plan\.txt'$",
    ),
    on_disk(
        "NetworkPlan.save", "path below a file", lambda: fitted().plan.save("file/plan.json"), ValueError,
        r"^path must be in a folder that can be written to: got file/plan\.json, and file is none$",
    ),
    on_disk(
        "NetworkPlan.save", "no room on the disk, or a full quota",
        lambda: within_quota(100, lambda: fitted().plan.save("plan.json")), OSError,
        r"^plan\.numbers\.safetensors can't be written: File too large; nothing else is lost, and what is done need "
        r"not be done again once there is room$",
    ),
    on_disk(
        "NetworkPlan.save", "path is a folder", lambda: fitted().plan.save("plan.json"), ValueError,
        r"^path must be a file to write: got the folder plan\.json$", lambda: Path("plan.json").mkdir(),
    ),
    on_disk(
        "plan.json", "no such file", load_plan, ValueError,
        r"^path must be a plan written by save: run/plan\.json can't be read \((?P<library>.*)\)$",
        without(PLAN),
    ),
    on_disk(
        "plan.json", "cut short", load_plan, ValueError,
        r"^path must be a plan written by save: run/plan\.json is no JSON \((?P<library>.*)\)$",
        cut(PLAN),
    ),
    on_disk(
        "plan.json", "another JSON file", load_plan, ValueError,
        r"^path must be a plan written by save: run/plan\.json is none$", instead(PLAN, SETTINGS),
    ),
    on_disk(
        "plan.json", "of a newer version", load_plan, NewerFileError,
        r"^run/plan\.json was written by a newer pyro_bmrs \(plan version 99, this one reads up to \d+\): upgrade",
        edit(PLAN, version=99),
    ),
    on_disk(
        "plan.json", "kl_weight is negative", load_plan, ValueError,
        r"^path must be a whole plan: run/plan\.json: kl_weight must be finite and not negative: got -1$",
        lambda: edit(PLAN, rule=json.loads(Path(PLAN).read_text())["rule"] | {"kl_weight": -1})(),
    ),
    on_disk(
        "plan.json", "layers of another network", load_plan, ValueError,
        r"run/plan\.json: its layers can't be \{'2': 3\}$", edit(PLAN, layers={"2": 3}),
    ),
    on_disk(
        "plan.numbers.safetensors", "cut short", load_plan, ValueError,
        r"^path must be a whole plan with plan\.numbers\.safetensors beside it: run/plan\.json: (?P<library>.*)$",
        cut(NUMBERS),
    ),
    on_disk(
        "plan.numbers.safetensors", "the posterior's file", load_plan, ValueError,
        r"^run/plan\.json and plan\.numbers\.safetensors do not belong together: they are of different plans$",
        instead(NUMBERS, POSTERIOR),
    ),
    on_disk(
        "ProgramPlan.load", "the plan of a network", lambda: bmrs.ProgramPlan.load("run/plan.json"), ValueError,
        r"^path must be a plan of a program: run/plan\.json is one of a network$",
    ),
    on_disk(
        "small.safetensors", "cut short", rebuild, ValueError,
        r"^weights run/small\.safetensors are damaged, or not of this plan: (?P<library>.*)$", cut(SMALL),
    ),
    on_disk(
        "small.safetensors", "the posterior's file", rebuild, ValueError,
        r"^weights run/small\.safetensors are damaged, or not of this plan: (?P<library>.*)$",
        instead(SMALL, POSTERIOR),
    ),
    on_disk(
        "small.safetensors", "NaN in the weights", rebuild, ValueError,
        r"^weights run/small\.safetensors must have finite parameters: got NaN or inf in '0\.weight'$",
        edit_tensors(SMALL, spoiled_weight),
    ),
    on_disk(
        "save_posterior", "path below a file",
        lambda: bmrs.save_posterior("file/posterior.safetensors", fitted().model, fitted().guide), ValueError,
        r"^path must be in a folder that can be written to: got file/posterior\.safetensors, and file is none$",
    ),
    on_disk(
        "load_posterior", "guide that was never called",
        lambda: bmrs.load_posterior(POSTERIOR, SmallFit("plain").model, SmallFit("plain").guide), RuntimeError,
        r"^guide has no parameters to load into yet: call it once on a batch, guide\(x, y\)$",
    ),
    on_disk(
        "posterior.safetensors", "cut short", posterior_of, ValueError,
        r"^path must be a posterior written by save_posterior: run/posterior\.safetensors is damaged or no "
        r"safetensors file: (?P<library>.*)$", cut(POSTERIOR),
    ),
    on_disk(
        "posterior.safetensors", "the plan's numbers", posterior_of, ValueError,
        r"^path must be a posterior written by save_posterior: run/posterior\.safetensors is none$",
        instead(POSTERIOR, NUMBERS),
    ),
    on_disk(
        "posterior.safetensors", "of a newer version", posterior_of, NewerFileError,
        r"^run/posterior\.safetensors was written by a newer pyro_bmrs \(posterior version 99, this one reads up to ",
        edit_header(POSTERIOR, version=99),
    ),
    on_disk(
        "posterior.safetensors", "kl_weight is text", posterior_of, ValueError,
        r"^path must be a posterior written by save_posterior: run/posterior\.safetensors has kl_weight 'much'$",
        edit_header(POSTERIOR, kl_weight="much"),
    ),
    on_disk(
        "posterior.safetensors", "of another network", posterior_of, ValueError,
        r"^run/posterior\.safetensors belongs to another network: ",
        lambda: Path("run/recipe.py").write_text(NETWORK.replace("8", "7")),
    ),
    on_disk(
        "Diagnosis.load", "a folder without one", lambda: bmrs.Diagnosis.load("empty"), ValueError,
        r"^folder must hold a diagnosis: empty/diagnosis\.json is none, or damaged \((?P<library>.*)\); that of a run "
        r"is made anew by pyro-bmrs report RUN --draws$",
    ),
    on_disk(
        "Diagnosis.save", "folder below a file", lambda: load_diagnosis().save("file/below"), ValueError,
        r"^folder must be a folder that can be written to: got file/below, and file is none$",
    ),
    on_disk(
        "diagnosis/", "a table cut short", load_diagnosis, ValueError,
        r"^folder must hold a diagnosis: run/diagnosis/diagnosis\.json is none, or damaged \((?P<library>.*)\); that",
        cut("run/diagnosis/khat.csv", 0.02),
    ),
    on_disk(
        "diagnosis/", "a table without a column", load_diagnosis, ValueError,
        r"^folder must hold a diagnosis: run/diagnosis/diagnosis\.json is none, or damaged \(khat\.csv lacks the "
        r"column 'threshold'; ", columns("run/diagnosis/khat.csv", threshold=None),
    ),
    on_disk(
        "diagnosis/", "of a newer version", load_diagnosis, NewerFileError,
        r"^run/diagnosis/diagnosis\.json was written by a newer pyro_bmrs \(diagnosis version 99, this one reads ",
        edit("run/diagnosis/diagnosis.json", version=99),
    ),
    on_disk(
        "save_datatree", "a name that does not end in .nc", lambda: save_tree("tree.txt"), ValueError,
        r"^path must end in \.nc: got tree\.txt$",
    ),
    on_disk(
        "save_datatree", "no tree", lambda: bmrs.save_datatree({}, "tree.nc"), TypeError,
        r"^tree must be an xarray\.DataTree, as to_datatree makes it: got dict$",
    ),
    on_disk(
        "save_datatree", "path below a file", lambda: save_tree("file/tree.nc"), ValueError,
        r"^path must be in a folder that can be written to: got file/tree\.nc, and file is none$",
    ),
    on_disk(
        "load_datatree", "a name that does not end in .nc", lambda: bmrs.load_datatree("file"), ValueError,
        r"^path must end in \.nc: got file$",
    ),
    on_disk(
        "NetCDF", "no such file", load_tree, ValueError,
        r"^path must be a NetCDF file written by save_datatree: there is no file tree\.nc$",
    ),
    on_disk(
        "NetCDF", "cut short", load_tree, ValueError,
        r"^path must be a NetCDF file written by save_datatree: tree\.nc: (?P<library>.*)$",
        both(lambda: save_tree("tree.nc"), cut("tree.nc")),
    ),
    on_disk(
        "Study.read", "out is a number", lambda: Study.read("study.yaml"), ValueError,
        r"^study study\.yaml: out must be text: got 3$", lambda: write_study(out=3),
    ),
    on_disk(
        "read_inputs", "a .npy cut short", lambda: read_inputs("x.npy"), ValueError,
        r"^path must be a whole \.npy file, .*: got 'x\.npy': (?P<library>.*)$",
        both(lambda: np.save("x.npy", ONE), cut("x.npy")),
    ),
    on_disk(
        "export_onnx", "without the extra onnx", lambda: export_onnx(plain(), X, "small.onnx"), ImportError,
        r"^export to ONNX needs the extra: pip install 'pyro-bmrs\[onnx\]' \((?P<library>.*)\)$",
        missing="onnxruntime",
    ),
]  # fmt: skip


# --- the command line -----------------------------------------------------------------------------------

RUN = "run net.py --data own.npz --out new"


def run(options, wrong, says, spoil=None, **more):
    return command(f"{RUN} {options}".strip(), wrong, says, spoil, **more)


BROKEN = """
def broken():
    layer = nn.Linear(6, 8)
    nn.init.constant_(layer.weight, float("nan"))
    return layer
"""


def bad_recipe(text, wrong, says):
    return replace(run("", wrong, says, recipe(text)), called="recipe .py")


def bad_study(wrong, says, spoil=None, **changed):
    spoil = spoil or (lambda: write_study(**changed))
    case = command("sweep study.yaml", wrong, f"study study\\.yaml: {says}", spoil)
    return replace(case, called="study YAML")


COMMANDS = [
    command("", "no command", r"^Missing command\.$"),
    command("walk", "no such command", r"^No such command 'walk'\.$"),
    run("--epoch 3", "no such option", r"^No such option: --epoch (?P<library>.*)$"),
    run("--epochs", "an option without its value", r"^Option '--epochs' requires an argument\.$"),
    run("--epochs many", "no number", r"^Invalid value for '--epochs': epochs must be a whole number: got 'many'$"),
    run("--epochs 0", "out of range", r"epochs must be greater than or equal to 1: got 0$"),
    run("--criterion BMRS", "no such criterion", r"criterion must be one of BMRS_N, .*, Random: got 'BMRS'$"),
    run(
        "--criterion SNR --prior-log-odds 0", "log-odds for a criterion without evidence",
        r"prior_log_odds goes with BMRS_N and BMRS_U only: got it with SNR$",
    ),
    run("--draws 5", "fewer than 100 draws", r"draws must be at least 100, or 0 for no diagnosis: got 5$"),
    run(
        "--foreign own.npz", "the run's own data",
        r"foreign must be another data set than the run's own: got 'own\.npz'$",
    ),
    run("--foreign digits", "data of another form", r"foreign 'digits' can't be used: .*\(6,\)"),
    run(
        "--weights gone.pt", "no such file of weights",
        r"weights must be a file that can be read: (?P<library>.*gone\.pt \(No such file or directory\))$",
    ),
    run(
        "--weights own.npz", "another kind of file",
        r"weights must be a file that ends in \.safetensors, \.pt, \.pth: got 'own\.npz'$",
    ),
    run(
        "--weights gone.pt --kl-weight 3", "a setting of a variational fit",
        r"kl_weight must be left out where weights are given: it is for a variational fit, and there is none$",
    ),
    run(
        "--require-accuracy 98", "percent, not a share",
        r"--require-accuracy must be a share from 0 to 1: got 98$",
    ),
    run(
        "--device toaster", "no such device",
        r"device must be auto, or one that torch can use: got 'toaster' \((?P<library>.*)\)$",
    ),
    run(
        "--logger paper", "no such logger",
        r"logger must be one of \('csv', 'tensorboard'\) or None: got 'paper'$",
    ),
    run(
        "--logger tensorboard", "without the extra tensorboard",
        r"logger tensorboard needs the package: pip install pyro-bmrs\[tensorboard\]$", missing="tensorboard",
    ),
    replace(
        command("fit net.py --data own.npz --out new --batch-size 5000 --quiet", "larger than the data", ""),
        ends=0,
    ),
    command(
        "run net.py --data gone.npz --out new", "no such data",
        r"data 'gone\.npz' can't be used: name must be a file that exists: got 'gone\.npz'$",
    ),
    command(
        "run net.py --data own.npz --out file/new", "out below a file",
        r"out must be a folder that can be written to: got file/new, and file is none$",
    ),
    command(
        "run net.py --data own.npz --out /proc/new", "out where nobody may write",
        r"out must be a folder that can be written to: got /proc/new \(No such file or directory\)$",
    ),
    command(
        "run net.py --data own.npz --out fitted --seed 3", "out holds a fit with other settings",
        r"out fitted holds a fit with other settings \(seed 0 → 3\): choose another folder, or pass --overwrite$",
    ),
    command(
        "fit gone.py --data own.npz --out new", "no such recipe",
        r"recipe must be a Python file: gone\.py is none$",
    ),
    command(
        "fit net.py --data own.npz --out new --removal foo", "no such removal",
        r"removal must be 'end' or 'epoch': got 'foo'$",
    ),
    command(
        "reduce empty", "a folder without a run",
        r"run must be a folder with a settings\.json: empty has none$",
    ),
    command(
        "reduce run --criterion SNR:threshold=high", "no number in the criterion",
        r"criterion SNR needs a number for threshold: got 'high'$",
    ),
    command(
        "reduce run", "the data are gone",
        r"data must be where they were; if they have moved, --data says where they are: got '/moved/own\.npz'$",
        lambda: edit(
            SETTINGS, settings=json.loads(Path(SETTINGS).read_text())["settings"] | {"data": "/moved/own.npz"}
        )(),
    ),
    command(
        "reduce run", "the posterior cut short",
        r"path must be a posterior .*: run/posterior\.safetensors is damaged or no safetensors file: (?P<library>.*)$",
        cut(POSTERIOR),
    ),
    command(
        "reduce run", "the recipe has a syntax error since",
        r"recipe run/recipe\.py fails with SyntaxError: (?P<library>.*)$",
        write("run/recipe.py", "def network(:"),
    ),
    command(
        "reduce run", "NaN in the posterior",
        r"gave structures \[1\] of layer '2' a score that is not finite \(\[nan\]\); nothing is removed$",
        edit_tensors(POSTERIOR, spoiled_loc),
    ),
    command(
        "report fitted", "a run that is not reduced",
        r"run fitted has no plan\.json: call `pyro-bmrs reduce` first$",
    ),
    command("report run run", "a run given twice", r"runs must be different folders: run is given twice$"),
    command(
        "report run fitted", "one of two is not reduced",
        r"run fitted has no evaluation\.csv: call `pyro-bmrs reduce` first$",
    ),
    command(
        "report run run2 --out x.txt", "no .html", r"out must end in \.html: got x\.txt$",
        lambda: shutil.copytree("run", "run2"),
    ),
    command("report run --out x.html", "--out for one run", r"--out is for comparisons, .*: got x\.html$"),
    command(
        "report run", "history.csv lacks a column", r"run/history\.csv is damaged: it has no column phase$",
        columns("run/history.csv", phase=None),
    ),
    command("show gone", "no such folder", r"run must be a folder with a settings\.json: gone has none$"),
    command(
        "show run", "settings.json cut short",
        r"run/settings\.json is not the settings file of a run, or is damaged$", cut(SETTINGS),
    ),
    command(
        "show run", "settings.json of a newer version",
        r"run/settings\.json was written by a newer pyro_bmrs \(run version 99, this one reads up to 1\): upgrade",
        edit(SETTINGS, version=99),
    ),
    command(
        "show run", "a setting out of range",
        r"run/settings\.json is not the settings file of a run, or is damaged: batch_size must be .*: got 0$",
        lambda: edit(SETTINGS, settings=json.loads(Path(SETTINGS).read_text())["settings"] | {"batch_size": 0})(),
    ),
    command(
        "show run", "an unknown setting",
        r"run/settings\.json is not the settings file of a run, or is damaged: .*'depth'",
        lambda: edit(SETTINGS, settings=json.loads(Path(SETTINGS).read_text())["settings"] | {"depth": 0})(),
    ),
    command(
        "show run", "evaluation.csv is empty", r"run/evaluation\.csv is damaged: (?P<library>.*)$",
        write("run/evaluation.csv"),
    ),
    command(
        "show run", "evaluation.csv without rows", r"run/evaluation\.csv is damaged: it has no rows$",
        lambda: Path("run/evaluation.csv").write_text(Path("run/evaluation.csv").read_text().split("\n")[0] + "\n"),
    ),
    command(
        "show run", "evaluation.csv of text",
        r"run/evaluation\.csv is damaged: accuracy must be numbers, got 'good'$",
        columns("run/evaluation.csv", accuracy="good"),
    ),
    command(
        "predict run --inputs gone.npy", "no such file", r"path must be a file that exists: got 'gone\.npy'$",
    ),
    command(
        "predict run --inputs x.npy", "inputs of another width",
        r"inputs must be floating point of shape \(N, 6\), .*: got 'float32 of shape \(40, 5\)'$",
        lambda: np.save("x.npy", ONE[:, :5]),
    ),
    command(
        "predict run --inputs x.npy", "NaN in the inputs",
        r"array in 'x\.npy' must be finite throughout: got '6 values that are not'$",
        lambda: np.save("x.npy", HOLE.numpy()),
    ),
    command(
        "predict run --out file/labels.csv", "out below a file",
        r"out must be in a folder that can be written to: got file/labels\.csv, and file is none$",
    ),
    command(
        "predict run", "a plan of a newer version",
        r"run/plan\.json was written by a newer pyro_bmrs \(plan version 99", edit(PLAN, version=99),
    ),
    command(
        "export run --out small.pkl", "no such format", r"out must end in \.onnx or \.pt2: got small\.pkl$",
    ),
    command(
        "export run --out small.onnx", "without the extra onnx",
        r"export to ONNX needs the extra: pip install 'pyro-bmrs\[onnx\]' \((?P<library>.*)\)$",
        missing="onnxruntime",
    ),
    command(
        "export fitted --out small.pt2", "a run that is not reduced",
        r"run fitted has no small\.safetensors: call `pyro-bmrs reduce` first$",
    ),
    command("sweep gone.yaml", "no such file", r"study gone\.yaml: can't be read \((?P<library>.*)\)$"),
    command(
        "sweep study.yaml --jobs 0", "out of range", r"study study\.yaml: jobs must be 1 or more: got 0$",
    ),
    command(
        "sweep study.yaml --backend slurm", "no such backend",
        r"study study\.yaml: backend must be one of processes, ray: got 'slurm'$",
    ),
    command(
        "sweep study.yaml --backend ray --jobs 2", "without the extra ray",
        r"backend ray needs .*pyro-bmrs\[ray\]", missing="ray",
    ),
    command("sweep study.yaml", "the data are gone", r"data 'own\.npz' can't be used: ", without("own.npz")),
    bad_study("no YAML", r"is not YAML \((?P<library>.*)\)$", write("study.yaml", "recipes: [")),
    bad_study("empty", r"must be a mapping of keys to values: got NoneType$", write("study.yaml")),
    bad_study(
        "bytes that are no text", r"can't be read \(it is no UTF-8 text \((?P<library>.*)\)\)$",
        instead("study.yaml", SMALL),
    ),
    bad_study(
        "a key given twice", r"keys must be given once: got 'seeds' twice$",
        write("study.yaml", "seeds: [0]\nseeds: [1]"),
    ),
    bad_study("an unknown key", r"keys must be of out, .*: got 'seed'$", seed=3),
    bad_study("no recipes", r"recipes must be given$", recipes=None),
    bad_study(
        "a recipe that is not there", r"recipe must be a Python file: gone\.py is none$", recipes="gone.py",
    ),
    bad_study("a seed that is true", r"seeds must be a whole number: got True$", seeds=[True]),
    bad_study("a cell given twice", r".* must give each cell another name .*: got .* twice$", seeds=[0, 0]),
    bad_study("a setting out of range", r"epochs must be greater than or equal to 1: got 0$", settings={"epochs": 0}),
    bad_recipe("def network(:", "a syntax error", r"recipe net\.py fails with SyntaxError: (?P<library>.*)$"),
    bad_recipe(
        "", "empty",
        r"recipe net\.py must define a function network; see models/lenet5\.py for one that does$",
    ),
    bad_recipe(
        "def network(*_): ...", "no SETTINGS",
        r"recipe net\.py must define SETTINGS as a dict of data name to settings$",
    ),
    bad_recipe(
        "1 / 0", "raises when read", r"recipe net\.py fails with ZeroDivisionError: division by zero$",
    ),
    bad_recipe("raise SystemExit(3)", "exits when read", r"recipe net\.py fails with SystemExit: 3$"),
    bad_recipe(
        "SETTINGS = {'default': {'epoch': 3}}\ndef network(*_): ...", "an unknown setting",
        r"recipe net\.py must have known names in SETTINGS, \[.*'epochs'.*\]: got \['epoch'\] for 'default'; did .*$",
    ),
    bad_recipe(
        "SETTINGS = {'default': 3}\ndef network(*_): ...", "settings that are no dict",
        r"recipe net\.py must have in SETTINGS a dict for each data set, such as .*: got int for 'default'$",
    ),
    bad_recipe(
        NETWORK.replace('"epochs": 2', '"epochs": "many"'), "a setting of the wrong type",
        r"epochs must be a whole number: got 'many'$",
    ),
    bad_recipe(
        "SETTINGS = {}\ndef network(*_): return {}['key']", "network raises",
        r"recipe net\.py: network\(\(6,\), 2\) fails with KeyError: 'key'$",
    ),
    bad_recipe(
        "SETTINGS = {}\ndef network(*_): ...", "network returns None",
        r"recipe net\.py: network must return a Module: got NoneType$",
    ),
    bad_recipe(
        f"{NETWORK}\ndef model(network): return 3", "model returns a number",
        r"recipe net\.py: model must return a Module: got int$",
    ),
    bad_recipe(
        f"{NETWORK}\ndef guide(model): ...", "guide returns None",
        r"recipe net\.py: guide must return a AutoTruncatedLogNormal: got NoneType$",
    ),
    bad_recipe(
        NETWORK.replace("MultiplicativeNoise(8)", "nn.Identity()"), "a network without noise",
        r"recipe net\.py: network must have MultiplicativeNoise layers$",
    ),
    bad_recipe(
        NETWORK.replace("nn.Linear(6, 8)", "broken()") + BROKEN, "weights of NaN",
        r"recipe net\.py: network must have finite parameters: got NaN or inf in '0\.weight'$",
    ),
    bad_recipe(
        NETWORK.replace("nn.Linear(6, 8)", "nn.Linear(5, 8)"), "a network of another input",
        r"recipe net\.py: its model fails with ValueError: x must be .* RuntimeError: (?P<library>.*\))$",
    ),
    bad_recipe(
        NETWORK.replace("nn.Tanh(), MultiplicativeNoise(8)", "MultiplicativeNoise(8), nn.Sigmoid()"),
        "noise before the activation",
        r"recipe net\.py: removing structures of its network fails with EqualityError: .* by at most (?P<library>.*)$",
    ),
]  # fmt: skip

SECTIONS = {
    "Distributions and evidence": EVIDENCE,
    "Networks, models and guides": NETWORKS,
    "Fitting": FITS,
    "Reducing": REDUCTIONS,
    "Diagnostics": DIAGNOSTICS,
    "Data": DATA,
    "Files": FILES,
    "The command line, studies and recipes": COMMANDS,
}
