"""Inputs that people have: what is given, and what comes of it. `tests/test_inputs.py` tries each case.

All are of networks of a few channels and of 24 examples. A case runs in an empty folder of its own.
"""

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from data_files import arrays, bytes_of, write_image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)  # fmt: skip

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.inference.evaluate import evaluate


@dataclass(frozen=True)
class InputCase:
    """An input, and what comes of it.

    Attributes:
        kind: what is given: "data", "labels", "networks", …
        given: the input, in a few words.
        run: does it, and asserts what `works` says.
        works: what happens, in a few words; "" where the input is refused.
        refused: a regular expression for the message, one line; "" where it works. A group named `library` covers what
            another library says.
        note: what was mended, or how the refusal comes.
    """

    kind: str
    given: str
    run: Callable[[], object]
    works: str = ""
    refused: str = ""
    note: str = "as it was"


N = 24
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
IMAGES = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(N, 6, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 9, (N, 6), generator=torch.Generator().manual_seed(0))
TAGS = torch.where(TOKENS == 0, -100, TOKENS % 3)  # 0 is padding
PAIRS = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
POINTS = TensorDataset(X, Y)
TAKEN = Subset(POINTS, range(N))  # example by example, which draws a number more than tensors do

MENDED = "mended: "
FIRST = "refused before the first step"
ANY_CALL = "mended: it was torch's error alone"


# --- what is done with an input ---------------------------------------------------------------------------------


def layers(*modules):
    torch.manual_seed(0)
    return nn.Sequential(*modules)


def noisy(inputs=4, outputs=3, *middle):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, 5), *middle, nn.ReLU(), bmrs.MultiplicativeNoise(5), nn.Linear(5, outputs)
    )


def fit(data, net=None, *, regression=False, of_model=None, **settings):
    """A model of the network, its guide, and the one row of the history after an epoch in batches of 8."""
    net = noisy() if net is None else net
    model = (bmrs.Regressor if regression else bmrs.Classifier)(net, **of_model or {})
    guide = bmrs.AutoTruncatedLogNormal(model)
    result = bmrs.fit(model, guide, data, **{"epochs": 1, "batch_size": 8, "progress": False, **settings})
    assert math.isfinite(result.history.loss.iloc[0])
    return model, guide, result.history.iloc[0]


def loss(data, net=None, **more):
    return float(fit(data, net, **more)[2].loss)


def same(data, *, as_of=(X, Y), net=noisy, **more):
    """The fit is that of other data, up to rounding."""
    assert math.isclose(loss(data, net(), **more), loss(as_of, net(), **more), rel_tol=1e-5)


def measured(data, **more):
    """The loss of a network that is not fitted, in single precision."""
    return round(evaluate(bmrs.Classifier(layers(nn.Linear(4, 3)), **more), data).loss, 5)


def counted(data, examples, net=None, **more):
    """The fit is of so many examples."""
    fit(data, net, **more)
    assert Batches(data, 8, torch.device("cpu"), "train").size == examples


def regress(y, outputs=1, net=None, **more):
    return fit((X, y), noisy(4, outputs) if net is None else net, regression=True, **more)


def predicted(x, shape=(N, 3), **more):
    model, guide, _ = fit((X, Y))
    found = bmrs.predict(model, guide, x, **more)
    assert found.shape == shape
    assert torch.isfinite(found).all()
    return found


def inserted(net, x, **more):
    return bmrs.insert_noise(net, x, **more)


def equal(one, other):
    assert one == other or math.isclose(one, other, rel_tol=1e-5), (one, other)


# --- data sets and networks -------------------------------------------------------------------------------------


class Mappings(Dataset):
    """A mapping for each example, as many libraries give them."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"x": X[index], "label": Y[index]}


class Named(Mappings):
    kind = namedtuple("Example", "inputs label")

    def __getitem__(self, index):
        return self.kind(X[index], Y[index])


class WithNumber(Mappings):
    def __getitem__(self, index):
        return X[index], Y[index], index


class ByKeyword(Mappings):
    def __getitem__(self, index):
        return {"x": X[index]}, Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(PAIRS)


class WithoutLength:
    def __getitem__(self, index):
        return PAIRS[index]


def collate(examples):
    return torch.stack([one["x"] for one in examples]), torch.stack([one["label"] for one in examples])


class Network(nn.Module):
    """Called with x by that name; gives what `form` makes of the logits."""

    def __init__(self, form=lambda logits: logits):
        super().__init__()
        self.body, self.form = noisy(), form

    def forward(self, x):
        return self.form(self.body(x))


@dataclass
class Output:
    logits: torch.Tensor


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 3)
        self.noise, self.head = bmrs.MultiplicativeNoise(5), nn.Linear(5, 3)

    def forward(self, one, other):
        return self.head(self.noise(torch.cat([self.one(one), self.other(other)], 1).relu()))


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.memory, self.first = kind(4, 5, batch_first=batch_first), batch_first
        self.noise, self.head = bmrs.MultiplicativeNoise(5, dim=-1), nn.Linear(5, 3)

    def forward(self, x):
        seen = self.noise(self.memory(x)[0])
        return self.head(seen[:, -1] if self.first else seen[-1])


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 5)
        self.noise, self.head = bmrs.MultiplicativeNoise(5, dim=-1), nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(self.noise(self.hidden(self.embedding(tokens)).relu()))


class Shared(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Linear(4, 5), nn.Linear(5, 5)
        self.third, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.third(self.twice(self.twice(self.first(x).relu()).relu())).relu())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.normal, self.two = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.two(self.normal(self.one(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


def convolutions(dimensions, outputs=3):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return layers(kind(3, 4, 3, padding=1), nn.ReLU(), kind(4, outputs, 1))


def pooled(dimensions=2):
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    return layers(*convolutions(dimensions), pool(1), nn.Flatten())


def of_images(data, **more):
    return fit(data, inserted(pooled(), IMAGES), **more)


# --- rows -------------------------------------------------------------------------------------------------------


def fails(tensors, network="Sequential", error="RuntimeError"):
    """What is said of inputs that the network can't be called with."""
    return (
        rf"^x must be what the network can be called with: {network} fails for {tensors} with {error}: "
        r"(?P<library>.*)$"
    )


def kind_of_data(given):
    return rf"^train must be \(x, y\) tensors, a Dataset or a DataLoader: got {given}$"


def row(kind):
    """Makes rows of a kind: `works` of what is no refusal, else `refused`."""

    def works(given, happens, run, note="as it was"):
        return InputCase(kind, given, run, works=happens, note=note)

    def refused(given, says, run, note=FIRST):
        return InputCase(kind, given, run, refused=says, note=note)

    return works, refused


works, refused = row("tensors and arrays")
TENSORS = [
    refused("x of float64, weights of float32", fails(r"float64 \(8, 4\)"), lambda: fit((X.double(), Y)), ANY_CALL),
    works("x and weights of float64", "fitted in float64", lambda: same((X.double(), Y), as_of=(X.double(), Y),
          net=lambda: noisy().double())),
    refused("x of float16, weights of float32", fails(r"float16 \(8, 4\)"), lambda: fit((X.half(), Y)), ANY_CALL),
    works("x and weights of bfloat16", "fitted; the loss is summed in float32",
          lambda: loss((X.bfloat16(), Y), noisy().bfloat16())),
    refused("x of uint8, as images are stored", fails(r"uint8 \(8, 4\)"), lambda: fit(((X * 9).byte(), Y)), ANY_CALL),
    refused("x of True and False", fails(r"bool \(8, 4\)"), lambda: fit((X > 0, Y)), ANY_CALL),
    refused("NumPy arrays", kind_of_data("a tuple of ndarray, ndarray"), lambda: fit((X.numpy(), Y.numpy()))),
    refused("x a tensor, y a NumPy array", kind_of_data("a tuple of Tensor, ndarray"), lambda: fit((X, Y.numpy()))),
    refused("a pandas DataFrame and a Series", kind_of_data("a tuple of DataFrame, Series"),
            lambda: fit((pd.DataFrame(X.numpy()), pd.Series(Y.numpy())))),
    refused("lists of lists", kind_of_data("a tuple of list, list"), lambda: fit((X.tolist(), Y.tolist()))),
    refused("[x, y], a list of two tensors", kind_of_data("a list of Tensor, Tensor"), lambda: fit([X, Y])),
    refused("(x1, x2, y), three tensors", kind_of_data("a tuple of Tensor, Tensor, Tensor"), lambda: fit((X, X, Y))),
    refused("x that is sparse", r"^train must be dense tensors, such as x\.to_dense\(\): got torch\.sparse_coo$",
            lambda: fit((X.to_sparse(), Y)), MENDED + "it was an error of four lines about a backend"),
    works("x that requires gradients", "fitted as without", lambda: same((X.clone().requires_grad_(), Y))),
    works("x that is not contiguous", "fitted as if it were", lambda: same((X.T.contiguous().T, Y))),
    works("images in channels_last", "fitted as in the usual layout",
          lambda: same((IMAGES.to(memory_format=torch.channels_last), Y), as_of=(IMAGES, Y),
                       net=lambda: inserted(pooled(), IMAGES))),
    refused("images (N, H, W, C)", fails(r"float32 \(8, 8, 8, 3\)"),
            lambda: of_images((IMAGES.permute(0, 2, 3, 1), Y)), ANY_CALL),
    refused("images (N, H, W), without channels", fails(r"float32 \(8, 8, 8\)"),
            lambda: of_images((IMAGES[:, 0], Y)), ANY_CALL),
    refused("x with fewer features than the network takes", fails(r"float32 \(8, 3\)"), lambda: fit((X[:, :3], Y)),
            ANY_CALL),
    refused("x of one feature as (N,)", fails(r"float32 \(8,\)"), lambda: fit((X[:, 0], Y), noisy(1)), ANY_CALL),
    works("one example", "fitted; N is 1", lambda: counted((X[:1], Y[:1]), 1)),
    refused("no example", "^train must not be empty$", lambda: fit((X[:0], Y[:0]))),
    refused("20 labels for 24 examples", "^train must have as many labels as examples: got 24 and 20$",
            lambda: fit((X, Y[:20]))),
    refused("NaN in x", "^loss became nan at batch 1 of epoch 1; the parameters of epoch 0 are back in place.",
            lambda: fit((X * math.nan, Y)), "refused at the first batch that has one"),
    works("fewer examples than batch_size", "one batch of all", lambda: counted((X, Y), N, batch_size=1000)),
    refused("train=None", "^train must be a data set of known length: got NoneType$", lambda: fit(None)),
    refused('train="digits", a name', kind_of_data("str"), lambda: fit("digits")),
    refused("all that load_data gives, for train", "^train must be a data set of known length: got Dataset$",
            lambda: fit(load_data("digits", limit=40)), "its parts are .train, .validation and .test"),
    works("load_data(…).train", "fitted", lambda: counted(
        load_data("digits", limit=60).train, 48, layers(nn.Flatten(), *noisy(64, 10)))),
    refused("validation data of another width", fails(r"float32 \(24, 3\)"),
            lambda: fit((X, Y), validation=(X[:, :3], Y)), ANY_CALL),
    refused("validation data without an example", "^validation must not be empty$",
            lambda: fit((X, Y), validation=(X[:0], Y[:0]))),
]  # fmt: skip

works, refused = row("labels, targets and weights")
OUTSIDE = "^y must hold labels of the 3 classes, 0 to 2: got {} to {}$"
NOT_WHOLE = r"^y must hold numbers of classes, integers: got torch\.float32$"
LABELS = [
    works("labels of int8, int16, int32 and uint8", "as int64", lambda: [
        same((X, Y.to(kind))) for kind in (torch.int8, torch.int16, torch.int32, torch.uint8)]),
    works("labels True and False", "classes 1 and 0", lambda: same((X, Y == 0), as_of=(X, (Y == 0).long()))),
    refused("labels of float32", NOT_WHOLE, lambda: fit((X, Y.float()))),
    refused("labels (N, 1)", r"^y must have shape \(8,\) for logits of shape \(8, 3\) .*: got \(8, 1\)$",
            lambda: fit((X, Y.unsqueeze(1)))),
    refused("one-hot labels of float32", NOT_WHOLE, lambda: fit((X, torch.eye(3)[Y]))),
    refused("one-hot labels of int64", r"^y must have shape \(8,\) for logits of shape \(8, 3\) .*: got \(8, 3\)$",
            lambda: fit((X, torch.eye(3, dtype=torch.long)[Y]))),
    refused("labels that are texts", kind_of_data("a tuple of Tensor, list"), lambda: fit((X, ["a"] * N))),
    refused("a data set whose labels are texts", r"^y must be a tensor; y may be a pair \(y, weights\): got tuple$",
            lambda: fit([(x, "a") for x in X])),
    refused("labels from 1", OUTSIDE.format(1, 3), lambda: fit((X, Y + 1)), FIRST),
    refused("labels from 1, in Pyro's own ELBO", OUTSIDE.format(1, 3), lambda: fit((X, Y + 1), elbo="pyro"),
            MENDED + "it was torch's “index 3 is out of bounds”"),
    refused("labels from 1 in the validation data", OUTSIDE.format(1, 3),
            lambda: fit((X, Y), validation=(X, Y + 1)), MENDED + "it was torch's error after the first epoch"),
    refused("label −1 for what is unknown", OUTSIDE.format(-1, 1), lambda: fit((X, Y - 1)), "ignore_index=-1 takes it"),
    works("label −1 with ignore_index=-1", "not counted; accuracy is of the others", lambda: with_unknown()),
    works("all labels ignored", "log-likelihood 0: the KL alone is left",
          lambda: equal(fit((X, torch.full((N,), -100)))[2].log_likelihood, 0)),
    works("one class only", "fitted", lambda: loss((X, torch.zeros_like(Y)))),
    refused("several labels an example (multi-label)", NOT_WHOLE, lambda: fit((X, (X[:, :3] > 0).float())),
            "a Pyro model that observes a Bernoulli takes it"),
    refused("two classes as one logit", "^y must hold labels of the 1 classes, 0 to 0: got 0 to 1$",
            lambda: fit((X, Y % 2), noisy(4, 1))),
    refused("two classes as logits (N,)", r"^class_dim must be a dimension of the logits, of shape \(8,\): got 1$",
            lambda: fit((X, Y % 2), layers(*noisy(4, 1), nn.Flatten(0)))),
    works("a class for each pixel, (N, H, W)", "each pixel counts, N is of images",
          lambda: counted((IMAGES, torch.randint(0, 3, (N, 8, 8))), N, inserted(convolutions(2), IMAGES))),
    refused("a class for each pixel, (N, 1, H, W)",
            r"^y must have shape \(8, 8, 8\) for logits of shape \(8, 3, 8, 8\) .*: got \(8, 1, 8, 8\)$",
            lambda: fit((IMAGES, torch.zeros(N, 1, 8, 8).long()), inserted(convolutions(2), IMAGES))),
    works("a class for each token, padding −100, class_dim=-1", "padding does not count",
          lambda: loss((TOKENS, TAGS), Tagger(), of_model={"class_dim": -1})),
    refused("a class for each token, without class_dim",
            r"^y must have shape \(8, 3\) for logits of shape \(8, 6, 3\) with class_dim=1: got \(8, 6\)$",
            lambda: fit((TOKENS, TAGS), Tagger())),
    works("targets (N, 1) for an output (N, 1)", "fitted", lambda: regress(X[:, :1])),
    refused("targets (N,) for an output (N, 1)", r"^y must have the output's shape \(8, 1\): got \(8,\)$",
            lambda: regress(X[:, 0])),
    refused("targets (N, 1) for an output (N,)", r"^y must have the output's shape \(8,\): got \(8, 1\)$",
            lambda: regress(X[:, :1], net=layers(*noisy(4, 1), nn.Flatten(0)))),
    works("targets (N,) for an output (N,)", "fitted",
            lambda: regress(X[:, 0], net=layers(*noisy(4, 1), nn.Flatten(0)))),
    works("three targets an example", "fitted, each of them observed", lambda: regress(X[:, :3], 3)),
    works("targets that are integers, or float64", "as float32", lambda: [
        equal(float(regress(kind(X[:, :1].round()))[2].loss), float(regress(X[:, :1].round())[2].loss))
        for kind in (torch.Tensor.int, torch.Tensor.float)] and regress(X[:, :1].double())),
    refused("targets True and False",
            r"^y must be real numbers, such as y\.float\(\) of True and False: got torch\.bool$",
            lambda: regress(X[:, :1] > 0), MENDED + "it was torch's error about a subtraction"),
    refused("NaN for a target that is missing", "^data must have no NaN: 8 of 8 values of 'y' are.",
            lambda: regress(X[:, :1] * math.nan), "a weight of 0 leaves it out, with any number as the target"),
    works("0 for a target that is missing, with a weight of 0", "left out", lambda: equal(
        *(float(regress((X[:, :1] * (torch.arange(N) > 3).unsqueeze(1) + off, (torch.arange(N) > 3).float()))[2].loss)
          for off in (0, torch.arange(N).unsqueeze(1).lt(4) * 9)))),
    works("y = (labels, weights)", "weights of 2 double the log-likelihood",
          lambda: equal(measured((X, (Y, torch.full((N,), 2.0)))), 2 * measured(POINTS))),
    works("weights of integers, float64, or True and False", "as float32", lambda: [
        same((X, (Y, torch.ones(N).to(kind)))) for kind in (torch.int64, torch.float64, torch.bool)]),
    works("weights in a data set of (x, (y, weight))", "as weights in tensors",
          lambda: equal(measured([(x, (y, torch.tensor(2.0))) for x, y in PAIRS]), 2 * measured(POINTS))),
    refused("weights (N, 1)", r"^weights must be of shape \(8,\), one for each example: got \(8, 1\)$",
            lambda: fit((X, (Y, torch.ones(N, 1))))),
    refused("weights that are NaN", "^weights must be not negative: got nan$",
            lambda: fit((X, (Y, torch.full((N,), math.nan))))),
    refused("negative weights behind the first batch", "^weights must be not negative: got -1.0$",
            lambda: fit((X, (Y, (torch.arange(N) < 8) * 2.0 - 1))),
            MENDED + "only the first batch was looked at, and the loss fell without end"),
    works("weights of classes", "as if each example had its class's weight",
          lambda: equal(measured(POINTS, weights=torch.tensor([1.0, 2.0, 0.5])),
                        measured((X, (Y, torch.tensor([1.0, 2.0, 0.5])[Y]))))),
    refused("weights of classes as a list", r"^weights must be a tensor of shape \(classes,\) or None: got list$",
            lambda: fit((X, Y), of_model={"weights": [1, 2, 3]}), "refused when the model is made"),
]  # fmt: skip


def with_unknown():
    fit((X, Y - 1), of_model={"ignore_index": -1})
    net, known = layers(nn.Linear(4, 3)), Y > 0
    found = evaluate(bmrs.Classifier(net, ignore_index=-1), (X, Y - 1)).accuracy
    equal(found, evaluate(bmrs.Classifier(net), (X[known], Y[known] - 1)).accuracy)


works, refused = row("data sets and loaders")
LENGTH = "^train must be a data set of known length: got {}$"
NO_PAIR = (
    r"^train must give batches \(x, y\): got {}\. Each may hold several tensors, as in \(\(x1, x2\), y\)$"
)
LOADERS = [
    works("a TensorDataset", "as its tensors", lambda: same(POINTS)),
    refused("a TensorDataset of x alone", NO_PAIR.format("1 parts"), lambda: fit(TensorDataset(X))),
    works("a StackDataset", "as its tensors", lambda: same(StackDataset(X, Y), as_of=TAKEN)),
    works("a Subset, or a part of random_split", "N is that of the part",
          lambda: [counted(part, 10) for part in (Subset(POINTS, range(10)), random_split(POINTS, [10, 14])[0])]),
    works("a ConcatDataset", "N is the sum", lambda: counted(ConcatDataset([POINTS, POINTS]), 2 * N)),
    works("a list of pairs (x, int)", "as their tensors", lambda: same(PAIRS, as_of=TAKEN)),
    works("a list of pairs of NumPy arrays", "as their tensors",
          lambda: same([(x.numpy(), np.int64(y)) for x, y in PAIRS], as_of=TAKEN)),
    refused("a list of pairs of lists", fails(r"float64 \(8,\), float64 \(8,\), float64 \(8,\), float64 \(8,\)",
            error="TypeError"), lambda: fit([(x.tolist(), y) for x, y in PAIRS]), ANY_CALL),
    refused("pairs with a label None", "^default_collate: (?P<library>.*)$", lambda: fit([(x, None) for x in X]),
            "torch's own words"),
    refused("series of different lengths", "^stack expects each tensor to be equal size, (?P<library>.*)$",
            lambda: fit([(SERIES[i, : 2 + i % 3], 0) for i in range(N)], Recurrent(nn.GRU)),
            "torch's own words; a collate_fn that pads takes them"),
    refused("zip(x, y)", LENGTH.format("zip"), lambda: fit(zip(X, Y, strict=True))),
    refused("a generator of batches", LENGTH.format("generator"), lambda: fit(pair for pair in PAIRS)),
    refused("an IterableDataset, alone or in a loader", LENGTH.format("Stream"), lambda: fit(DataLoader(Stream(), 8))),
    refused("a class with __getitem__ alone", LENGTH.format("WithoutLength"), lambda: fit(WithoutLength())),
    refused("a data set of mappings", NO_PAIR.format("dict"), lambda: fit(Mappings()), "a collate_fn takes it"),
    works("a loader of mappings with a collate_fn that gives (x, y)", "as their tensors",
          lambda: same(DataLoader(Mappings(), 8, collate_fn=collate), as_of=DataLoader(POINTS, 8))),
    works("a loader of a list of mappings with such a collate_fn", "as their tensors",
          lambda: same(DataLoader([{"x": x, "label": torch.tensor(y)} for x, y in PAIRS], 8, collate_fn=collate),
                       as_of=DataLoader(POINTS, 8)), MENDED + "it was refused as a list of mappings"),
    works("a data set of named tuples", "as pairs", lambda: same(Named(), as_of=TAKEN)),
    refused("a data set of (x, y, index)", NO_PAIR.format("3 parts"), lambda: fit(WithNumber())),
    works("a data set of ({name: x}, y)", "x is given by keyword", lambda: same(ByKeyword(), net=Network, as_of=TAKEN)),
    works("a loader with shuffle and drop_last", "fitted; a last batch that is too small is left out",
          lambda: equal(len(Batches(DataLoader(POINTS, 7, shuffle=True, drop_last=True), 1, X.device, "train")), 3)
          or loss(DataLoader(POINTS, 7, shuffle=True, drop_last=True))),
    works("a loader with a WeightedRandomSampler of 40", "N is 40, what an epoch shows",
          lambda: counted(DataLoader(POINTS, 8, sampler=WeightedRandomSampler(torch.ones(N), 40)), 40)),
    works("a loader with a list for a sampler", "N is its length",
          lambda: counted(DataLoader(POINTS, 8, sampler=[0, 1, 2, 3]), 4)),
    works("a loader with a batch_sampler", "N is the sum of its batches",
          lambda: counted(DataLoader(POINTS, batch_sampler=BatchSampler(SequentialSampler(X), 7, False)), N)),
    works("a loader of whole batches, batch_size=None", "examples are counted in one pass",
          lambda: counted(DataLoader([(X[:8], Y[:8]), (X[8:], Y[8:])], batch_size=None), N)),
    refused("a loader of single examples, batch_size=None",
            r"^input of noise layer '2' must have 5 structures in dimension 1: got shape \(5,\)$",
            lambda: fit(DataLoader(POINTS, batch_size=None))),
    works("a loader with a worker process", "as without", lambda: same(DataLoader(POINTS, 8, num_workers=1),
          as_of=DataLoader(POINTS, 8))),
    works("a loader with pin_memory", "as without", lambda: same(DataLoader(POINTS, 8, pin_memory=True),
          as_of=DataLoader(POINTS, 8))),
    refused("a loader without a batch", "^train must give at least one batch: its loader gives none$",
            lambda: fit(DataLoader(POINTS, 50, drop_last=True))),
    refused("a collate_fn that gives NumPy arrays", fails("a ndarray", error="TypeError"),
            lambda: fit(DataLoader(POINTS, 8, collate_fn=lambda batch: (np.stack([x for x, _ in batch]), Y[:8]))),
            ANY_CALL),
    refused("a collate_fn that gives labels in a list",
            r"^y must be a tensor; y may be a pair \(y, weights\): got list$",
            lambda: fit(DataLoader(PAIRS, 8, collate_fn=lambda batch: (X[:8], [y for _, y in batch])))),
]  # fmt: skip

works, refused = row("networks")
FIND = r"^Classifier needs a tensor from the network: got dict; pass a callable that finds it in the output$"
NETWORKS = [
    works("two inputs, ((x1, x2), y)", "fitted", lambda: counted(((X, X), Y), N, TwoInputs())),
    works("two inputs by name, ({\"one\": x1, \"other\": x2}, y)", "as by place",
          lambda: same(({"other": X, "one": X}, Y), as_of=((X, X), Y), net=TwoInputs)),
    refused("one input for a network of two", fails(r"float32 \(8, 4\)", "TwoInputs", "TypeError"),
            lambda: fit((X, Y), TwoInputs()), ANY_CALL),
    refused("an output that is a mapping", FIND, lambda: fit((X, Y), Network(lambda out: {"logits": out}))),
    works("an output that is a mapping, a tuple or a dataclass, with logits=…", "as the tensor alone", lambda: [
        same((X, Y), net=lambda form=form: Network(form), as_of=(X, Y), of_model={"logits": find}) for form, find in (
            (lambda out: {"logits": out}, lambda out: out["logits"]), (lambda out: (out, 0), lambda out: out[0]),
            (Output, lambda out: out.logits))]),
    refused('logits="logits", a name', "^logits must be a function of the network's output, or None: got 'logits'$",
            lambda: bmrs.Classifier(noisy(), logits="logits"), "refused when the model is made"),
    works("a network without noise, guide None", "trained by maximum likelihood", lambda: bmrs.fit(
        bmrs.Classifier(layers(nn.Linear(4, 3))), None, (X, Y), epochs=1, progress=False)),
    refused("a network without noise, with an AutoTruncatedLogNormal",
            "^model must hold MultiplicativeNoise layers: Classifier has none$",
            lambda: fit((X, Y), layers(nn.Linear(4, 3)))),
    refused("a network in place of a model",
            r"^model must be a Pyro model, called as model\(x, y\), such as a Classifier of a network: got Sequential$",
            lambda: bmrs.fit(layers(nn.Linear(4, 3)), None, (X, Y), epochs=1),
            MENDED + "it was “forward() takes 2 positional arguments but 3 were given”"),
    works("frozen weights (requires_grad False)", "θ is fitted, weights stay", lambda: frozen()),
    works("a network in evaluation mode", "fitted in training mode, given back as it was",
          lambda: equal(fit((X, Y), noisy().eval())[0].net.training, False)),
    works("Dropout", "fitted", lambda: loss((X, Y), noisy(4, 3, nn.Dropout()))),
    refused("BatchNorm and a last batch of one example",
            "^Expected more than 1 value per channel when training, (?P<library>.*)$",
            lambda: fit((X[:9], Y[:9]), noisy(4, 3, nn.BatchNorm1d(5))), "torch's own words, at that batch"),
    works("BatchNorm and a loader with drop_last", "fitted",
          lambda: loss(DataLoader(TensorDataset(X[:9], Y[:9]), 8, drop_last=True), noisy(4, 3, nn.BatchNorm1d(5)))),
    works("an LSTM or a GRU, examples first", "fitted", lambda: [
        loss((SERIES, Y), Recurrent(kind)) for kind in (nn.LSTM, nn.GRU)]),
    refused("a GRU with time first, x (time, N, 4)", "^train must have as many labels as examples: got 6 and 24$",
            lambda: fit((SERIES.transpose(0, 1), Y), Recurrent(nn.GRU, False))),
    refused("the same in a loader of whole batches",
            r"^the input of noise layer 'noise' must have examples in its first dimension .*; pass draws_per_batch=1$",
            lambda: fit(DataLoader([(SERIES.transpose(0, 1), Y)], batch_size=None), Recurrent(nn.GRU, False))),
    works("the same with draws_per_batch=1", "fitted; N is 24", lambda: loss(
        DataLoader([(SERIES.transpose(0, 1), Y)], batch_size=None), Recurrent(nn.GRU, False), draws_per_batch=1)),
    refused("tokens of float32", fails(r"float32 \(8, 6\)", "Tagger"),
            lambda: fit((TOKENS.float(), TAGS), Tagger(), of_model={"class_dim": -1}), ANY_CALL),
    refused("tokens beyond the embedding", fails(r"int64 \(8, 6\)", "Tagger", "IndexError"),
            lambda: fit((TOKENS + 5, TAGS), Tagger(), of_model={"class_dim": -1}), ANY_CALL),
    works("Conv1d and Conv3d", "noise is inserted, and fitted", lambda: [
        loss((torch.randn(N, 3, *[4] * size), Y), inserted(pooled(size), torch.randn(2, 3, *[4] * size)))
        for size in (1, 3)]),
    works("a residual block with BatchNorm", "noise is inserted, and fitted",
          lambda: loss((IMAGES, Y), inserted(Residual(), IMAGES))),
    works("a layer that is called twice", "what it makes is removed in both calls",
          lambda: equal("11 structures in 2 groups" in str(bmrs.structures(Shared(), X)), True)),
    works("an example_input of one example", "noise is inserted",
            lambda: inserted(layers(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), X[:1])),
    refused("an example_input without a batch dimension",
            r"^example_input must have examples in its first dimension: got shape \(4,\)$",
            lambda: inserted(layers(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), X[0]),
            MENDED + "it was an error of the trace"),
    refused("a shape as example_input", "^example_input must hold a tensor of examples: got tuple$",
            lambda: inserted(layers(nn.Linear(4, 3)), (1, 4)), "refused before anything is changed"),
    refused("noise where there is noise", r"^network must have no noise layers yet: it has \['2'\]$",
            lambda: inserted(noisy(), X), "refused before anything is changed"),
    refused("a network of float64, x of float32", r"^example_input must be what network can be called with: Sequential "
            "fails with RuntimeError: (?P<library>.*)$", lambda: inserted(layers(nn.Linear(4, 3)).double(), X),
            "refused before anything is changed"),
]  # fmt: skip


def frozen():
    net = noisy().requires_grad_(False)
    before = [part.clone() for part in net.parameters()]
    _, guide, _ = fit((X, Y), net)
    assert all(map(torch.equal, before, net.parameters()))
    assert guide.mean()["2"].std() > 0


works, refused = row("predictions and checks")
PREDICTIONS = [
    works("a data set, a Subset or a loader of pairs to predict on", "predictions for each x; y is not looked at",
            lambda: [
        predicted(POINTS), predicted(DataLoader(POINTS, 7)), predicted(Subset(POINTS, range(5)), (5, 3))]),
    works("a loader of x alone", "predictions for each", lambda: predicted(DataLoader(X, 7))),
    works("a list of pairs to predict on", "as a data set", lambda: predicted(PAIRS),
          MENDED + "it was torch's error about a list"),
    refused("a DataFrame to predict on", "^x must be a tensor, or hold one: got DataFrame$",
            lambda: predicted(pd.DataFrame(X.numpy())), "refused at once"),
    refused("a NumPy array to predict on", "^x must be a tensor, or hold one: got ndarray$",
            lambda: predicted(X.numpy()),
            "refused at once"),
    refused("(x, y) to predict on", fails(r"float32 \(24, 4\), int64 \(24,\)", error="TypeError"),
            lambda: predicted((X, Y)), "a tuple holds the network's arguments; " + ANY_CALL),
    refused("x of float64 to predict on", fails(r"float64 \(24, 4\)"), lambda: predicted(X.double()), ANY_CALL),
    refused("one example without a batch dimension",
            r"^input of noise layer '2' must have 5 structures in dimension 1: got shape \(5,\)$",
            lambda: predicted(X[0]), "refused at once"),
    refused("the same for a network without noise",
            r"^class_dim must be a dimension of the logits, of shape \(3,\): got 1$",
            lambda: bmrs.predict(bmrs.Classifier(layers(nn.Linear(4, 3))), None, X[0]),
            MENDED + "it was torch's error about a dimension"),
    refused("no example to predict on", "^x must not be empty$", lambda: predicted(X[:0]), "refused at once"),
    works("x that requires gradients", "predictions without", lambda: equal(
        predicted(X.clone().requires_grad_()).requires_grad, False)),
    works("a Dataset for to_datatree and check_posterior", "as its tensors", lambda: checked(POINTS)),
    works("a list of pairs for to_datatree and check_posterior", "as its tensors", lambda: checked(PAIRS),
          MENDED + "fit took it, these did not"),
    refused("x alone for to_datatree", "^data must be a tuple of the arguments of model and guide, .*: got Tensor$",
            lambda: checked(X), "refused at once"),
    refused("NumPy arrays for to_datatree", r"^data must be \(x, y\) tensors, .*: got a tuple of ndarray, ndarray$",
            lambda: checked((X.numpy(), Y.numpy())), "refused at once"),
    refused("x alone for recalibrate", r"^data must be \(x, y\) tensors, a Dataset or a DataLoader: got Tensor$",
            lambda: bmrs.recalibrate(layers(nn.BatchNorm1d(4)), X), "refused at once"),
]  # fmt: skip


def checked(data):
    model, guide, _ = fit((X, Y))
    assert bmrs.to_datatree(model, guide, data, draws=10).log_likelihood.y.shape == (1, 10, N)
    assert bmrs.check_posterior(model, guide, data, draws=100).elbo.elbo.notna().all()


works, refused = row("settings and folders")
WHOLE = "^epochs must be a whole number: got {}$"
SETTINGS = [
    works("epochs=np.int64(1), seed=np.int32(0)", "as Python's integers", lambda: same(
        (X, Y), epochs=np.int64(1), seed=np.int32(0)), MENDED + "np.int64(1) was “no whole number”"),
    works("learning_rate=np.float32(0.001)", "as a float", lambda: loss((X, Y), learning_rate=np.float32(0.001))),
    refused('epochs="3"', WHOLE.format("'3'"), lambda: fit((X, Y), epochs="3")),
    refused("epochs=1.0", WHOLE.format(r"1\.0"), lambda: fit((X, Y), epochs=1.0)),
    refused("epochs=True", WHOLE.format("True"), lambda: fit((X, Y), epochs=True)),
    refused("epochs=torch.tensor(1)", WHOLE.format(r"tensor\(1\)"), lambda: fit((X, Y), epochs=torch.tensor(1))),
    refused("lr=0.1", "^settings must be among epochs, .*: got 'lr'$", lambda: fit((X, Y), lr=0.1)),
    refused('settings={"epochs": 1}', "^settings must be a Settings or None: got {'epochs': 1}$",
            lambda: fit((X, Y), settings={"epochs": 1})),
    works("draws=np.int64(3) for predict", "as 3",
          lambda: equal(*(float(predicted(X, draws=draws).sum()) for draws in (np.int64(3), 3)))),
    works("checkpoints of a fit that is done", "its result again", lambda: equal(
        *(loss((X, Y), checkpoints="kept") for _ in range(2)))),
    refused("checkpoints of other data", r"^checkpoints kept holds another fit \(first_batch (?P<library>.*)\): choose "
            "another folder", lambda: [loss((x, Y), checkpoints="kept") for x in (X, X + 1)]),
]  # fmt: skip


def npz(**changed):
    np.savez("some.npz", **{key: part for key, part in {**arrays(), **changed}.items() if part is not None})
    return load_data("some.npz")


def folder(*classes, grey=1, **more):
    """Loads six images a class; every `grey`-th is grey, the others are in colour."""
    for name in classes:
        for index in range(6):
            colours = () if index % grey == 0 else (3,)
            write_image(Path("set", name, f"{index}.png"), bytes_of(8, 8, *colours))
    return load_data("set", **more)


works, refused = row("files and folders")
LABELS_OF_FILES = (
    r"^y_train must be integers of shape \(20,\), a label for each example, or floating point, .*: got '{}'$"
)
FILES = [
    works("an .npz with images (N, H, W, C), (N, C, H, W) or (N, H, W)", "read as (N, C, H, W)", lambda: [
        equal(npz(x_train=bytes_of(20, *shape), x_test=bytes_of(6, *shape)).input_shape, found)
        for shape, found in (((8, 9, 3), (3, 8, 9)), ((3, 8, 9), (3, 8, 9)), ((8, 9), (1, 8, 9)))]),
    works("an .npz of float16", "read as float32", lambda: equal(
        npz(x_train=np.ones((20, 5), np.float16), x_test=np.ones((6, 5), np.float16)).train[:][0].dtype,
        torch.float32)),
    refused("an .npz without y_test", "^name must be a whole .npz file .*: it lacks y_test and holds ",
            lambda: npz(y_test=None), "refused before any work"),
    refused("an .npz with arrays of objects", "^name must be a whole .npz file .*, as arrays without pickles: "
            "got 'some.npz': (?P<library>.*)$", lambda: npz(x_train=np.array([[1], [2, 3]], object)),
            "refused before any work"),
    refused("an .npz with labels from 1", "^y_train must be 0 to the number of classes less 1, .*: got '2 different "
            "labels from 1 to 2'$", lambda: npz(y_train=np.arange(20) % 2 + 1), "refused before any work"),
    refused("an .npz with labels of float64 to train on alone", r"^y_test must be floating point of shape \(6,\) or "
            r"\(6, T\), as y_train is: .*: got 'int64 of shape \(6,\)'$", lambda: npz(y_train=np.arange(20) % 2.0),
            "refused before any work"),
    works("an .npz with y of float64", "a regression", lambda: [
        equal(npz(y_train=np.arange(20) % 2.0, y_test=np.arange(6) % 2.0).preparation.targets.names, ("y",))]),
    refused("an .npz with one-hot labels", LABELS_OF_FILES.format(r"int64 of shape \(20, 2\)"),
            lambda: npz(y_train=np.eye(2, dtype=int)[np.arange(20) % 2]), "refused before any work"),
    refused("an .npz of bytes to train on and of floats to test on",
            r"^x_test must be like x_train, uint8 of shape \(20, 5\): got 'float64 of shape \(6, 5\)'$",
            lambda: npz(x_train=bytes_of(20, 5)), "refused before any work"),
    refused("an .npz with NaN", r"^x_train must be finite in float32: got '100 values that are not'$",
            lambda: npz(x_train=np.full((20, 5), np.nan)), "refused before any work"),
    works("a Path in place of a text", "read", lambda: npz() and load_data(Path("some.npz")),
          MENDED + "it was refused"),
    refused("a .csv file",
            r"^name must be 'digits', .* a path ending in \.npz, or an image folder that exists: got 'a\.csv'$",
            lambda: Path("a.csv").write_text("a,b") and load_data("a.csv"), "refused before any work"),
    works("a folder with grey images beside colour", "all are read as colour",
          lambda: equal(folder("cat", "dog", grey=2).input_shape, (3, 8, 8))),
    refused("a folder with images of two sizes",
            "^image_size must be given in pixels where images differ .*: got None$",
            lambda: two_sizes(), "refused before any work"),
    works("the same with image_size", "all are resized", lambda: equal(two_sizes(image_size=8).input_shape, (1, 8, 8))),
    refused("a folder with one class",
            "^name must be a folder with one folder of images for each class, 2 or more: got 'set'$",
            lambda: folder("cat"), "refused before any work"),
    works("a text file beside the images", "passed over", lambda: equal(
        len(with_text().train), len(folder("cat", "dog").train))),
    refused("one image to prepare, without N",
            r"^inputs must be uint8 of shape .*, with N at least 1: got 'uint8 of shape "
            r"\(8, 8, 3\)'$", lambda: folder("cat", "dog", grey=9).prepare(bytes_of(8, 8, 3)), "refused at once"),
    refused("images to prepare that are scaled already",
            r"^inputs must be uint8 of shape .*: got 'float64 of shape \(2, 8, 8\)'$",
            lambda: folder("cat", "dog").prepare(bytes_of(2, 8, 8) / 255), "refused at once"),
    works("limit=np.int64(60)", "as 60", lambda: equal(len(load_data("digits", limit=np.int64(60)).train), 48)),
    refused("a limit below the number of classes", "^limit must be at least 10, one for each class; .*: got 5$",
            lambda: load_data("digits", limit=5), "refused before any work"),
]  # fmt: skip


def two_sizes(**more):
    write_image(Path("set", "cat", "9.png"), bytes_of(9, 9))
    return folder("cat", "dog", **more)


def with_text():
    folder("cat", "dog")
    Path("set", "cat", "notes.txt").write_text("of 2026")
    return load_data("set")


INPUT_CASES = [*TENSORS, *LABELS, *LOADERS, *NETWORKS, *PREDICTIONS, *SETTINGS, *FILES]
