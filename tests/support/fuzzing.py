"""Inputs that no writer of ours makes, for every file that is read: damaged, edited and made up.

What a parser may do with one: read it, or raise ValueError (`DataError` and `NewerFileError` are). Anything else, more
than `SECONDS` for one input, or memory that grows with their number, is a failure.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.files import read_tensors
from pyro_bmrs.fitting.checkpoints import Checkpoints
from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior
from pyro_bmrs.pruning import NetworkPlan
from pyro_bmrs.quality import Diagnosis
from pyro_bmrs.runs.folder import RunFolder
from pyro_bmrs.runs.study import Study

SECONDS = 5.0

# --- inputs --------------------------------------------------------------------------------------------------

# Numbers and texts at the edges of what formats and shapes allow; a path out of the folder; tags that make objects.
_EDGES = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "0", "nan",
        "../../../etc/passwd", "/dev/zero", "a\x00b", "\ud800", "é" * 1000, [], {}, [[]], {"": {}},
        "!!python/object/apply:os.system ['true']", "__class__", "épreuve", "BMRS_N", "digits",
    ]
)  # fmt: skip
_VALUES = st.recursive(
    _EDGES | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A few places overwritten, cut out, repeated or cut off."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 8, 64]))
        match draw(st.sampled_from(["overwrite", "cut", "repeat", "insert", "truncate"])):
            case "overwrite":
                content[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del content[start : start + length]
            case "repeat":
                content[start:start] = content[start : start + length]
            case "insert":
                content[start:start] = draw(st.binary(max_size=16))
            case _:
                del content[start:]
    return bytes(content)


@st.composite
def edited(draw: st.DrawFn, valid: Any) -> Any:
    """A document of mappings and lists with some entries replaced, removed or added."""
    document = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = document
        while True:
            keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and draw(st.booleans()):
                holder = holder[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
                case "replace":
                    holder[key] = draw(_VALUES)
                case "remove":
                    del holder[key]
                case _ if isinstance(holder, dict):
                    holder[draw(st.text(max_size=8))] = draw(_VALUES)
                case _:
                    holder.append(draw(_VALUES))
            break
    return document


def _as_json(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _as_yaml(document: Any) -> bytes:
    return yaml.dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


def of_text(valid: Any, write: Callable[[Any], bytes] = _as_json) -> st.SearchStrategy[bytes]:
    """Files of a format of mappings and lists."""
    return st.one_of(
        edited(valid).map(write), edited(valid).map(write), damaged(write(valid)), _VALUES.map(write),
        st.binary(max_size=64),
    )  # fmt: skip


def of_tensors(valid: bytes) -> st.SearchStrategy[bytes]:
    """safetensors files: the header edited, or any byte damaged."""
    size = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + size])

    def written(document: Any) -> bytes:
        text = _as_json(document)
        return len(text).to_bytes(8, "little") + text + valid[8 + size :]

    def inner(document: Any) -> bytes:  # our own header is JSON in a text of theirs
        return written(
            {**header, "__metadata__": {"pyro_bmrs": _as_json(document).decode("utf-8", "replace")}}
        )

    choices = [
        edited(header).map(written),
        damaged(valid),
        damaged(valid[: 8 + size]),
        st.binary(max_size=64),
    ]
    own = header.get("__metadata__", {}).get("pyro_bmrs")
    if own is not None:
        choices += [edited(json.loads(own)).map(inner)] * 2
    return st.one_of(choices)


# --- what reads them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A file format.

    Attributes:
        inputs: files to try.
        read: writes one where it belongs and reads it as the package does.
        valid: one that must be read, so that a parser which refuses all would not pass.
    """

    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes], object]
    valid: bytes


def targets(place: Path) -> dict[str, Target]:
    """The formats by name, each with a folder of its own below `place`."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.arange(40) % 2
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.ReLU(), bmrs.MultiplicativeNoise(6), torch.nn.Linear(6, 2)
    )
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, (x, y), (x, y), epochs=1, batch_size=20, checkpoints=place / "fit", progress=False,
        criterion=bmrs.SNR(),
    )  # fmt: skip
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    plan.save(place / "plan.json")
    save_posterior(place / "posterior.safetensors", model, guide)
    (place / "net.py").write_text("SETTINGS = {}\ndef network(shape, classes): ...\n")
    facts = dict(
        draws=100,
        seed=0,
        examples=9,
        dataset_size=9,
        kl_weight=1.0,
        out_of_distribution=None,
        curves_of="test",
        predictive_draws=20,
    )
    Diagnosis(facts=facts, khat=None).save(place / "diagnosis")
    study = {
        "out": "out", "recipes": ["net.py"], "data": ["digits"], "seeds": [0, 1], "kl_weights": [1, 2.5],
        "criteria": ["BMRS_N", "BMRS_U:bits=4"], "settings": {"epochs": 3, "network": {"a": [1]}}, "jobs": 2,
    }  # fmt: skip
    settings = {
        "format": "pyro_bmrs.run", "version": 1, "settings": {"data": "digits", "epochs": 3, "criterion": "SNR"},
        "fit": {"epochs": 3}, "settled": {"batch_size": 16}, "recipe": "net.py",
        "inputs": {
            "raw_shape": [1, 8, 8], "raw_values": "counts", "channels": "grey", "image_size": None, "mean": [0.3],
            "deviation": [0.4], "class_names": ["odd", "even"], "feature_names": [], "targets": None,
        },
    }  # fmt: skip
    archive = io.BytesIO()
    np.savez(
        archive, x_train=np.ones((6, 4, 4), "float32"), y_train=np.arange(6) % 2,
        x_test=np.ones((4, 4, 4), "float32"), y_test=np.arange(4) % 2,
    )  # fmt: skip

    def file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = place / name

        def written(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return written

    def checkpoints(path: Path) -> list[object]:
        with warnings.catch_warnings(action="ignore"):  # what can't be read is one
            folder = Checkpoints(path.parent, 2, settings_of_fit)
            found = [folder.of_best(progress, tensors) for _, progress, tensors in folder.newest()]
        if not found:
            raise ValueError("none can be used")
        return found

    def bytes_of(name: str) -> bytes:
        return (place / name).read_bytes()

    plan_json = json.loads(bytes_of("plan.json"))
    diagnosis_json = json.loads(bytes_of("diagnosis/diagnosis.json"))
    (checkpoint,) = (place / "fit").glob("epoch-*.safetensors")
    whole = checkpoint.read_bytes()
    settings_of_fit = read_tensors(checkpoint)[0]["settings"]
    return {
        "plan.json": Target(of_text(plan_json), file("plan.json", NetworkPlan.load), _as_json(plan_json)),
        "plan.numbers.safetensors": Target(
            of_tensors(bytes_of("plan.numbers.safetensors")),
            file(
                "numbers/plan.numbers.safetensors", lambda path: NetworkPlan.load(path.with_name("plan.json"))
            ),
            bytes_of("plan.numbers.safetensors"),
        ),
        "study.yaml": Target(of_text(study, _as_yaml), file("study.yaml", Study.read), _as_yaml(study)),
        "data.npz": Target(
            damaged(archive.getvalue()) | st.binary(max_size=64),
            file("data.npz", lambda path: load_data(str(path))),
            archive.getvalue(),
        ),
        "checkpoint": Target(of_tensors(whole), file(f"fit/{checkpoint.name}", checkpoints), whole),
        "posterior.safetensors": Target(
            of_tensors(bytes_of("posterior.safetensors")),
            file("posterior.safetensors", lambda path: load_posterior(path, model, guide)),
            bytes_of("posterior.safetensors"),
        ),
        "settings.json": Target(
            of_text(settings),
            file("settings.json", lambda path: RunFolder(path.parent).stored_settings()),
            _as_json(settings),
        ),
        "diagnosis.json": Target(
            of_text(diagnosis_json),
            file("diagnosis/diagnosis.json", lambda path: Diagnosis.load(path.parent)),
            _as_json(diagnosis_json),
        ),
    }


def prepared(place: Path) -> dict[str, Target]:
    """`targets`, and what they need beside the files that are tried."""
    (place / "numbers").mkdir()
    found = targets(place)
    for suffix in (".json", ".numbers.safetensors"):
        (place / "numbers" / f"plan{suffix}").write_bytes((place / f"plan{suffix}").read_bytes())
    return found


def attempt(target: Target, content: bytes) -> bool:
    """Whether a file was read; raises for what a parser must not do."""
    begin = time.perf_counter()
    try:
        target.read(content)
        read = True
    except ValueError as error:
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            raise AssertionError(f"an error of an inner library: {error!r}") from error
        read = False
    took = time.perf_counter() - begin
    if took > SECONDS:
        raise AssertionError(f"took {took:.1f} s, allowed {SECONDS:g}")
    return read


def temporary() -> tempfile.TemporaryDirectory[str]:
    """A folder for all files that are tried, with a name that says whose it is."""
    return tempfile.TemporaryDirectory(prefix="pyro_bmrs-fuzzing-")
