"""Every parser against files that nobody should have written; 100,000 of them: `python analysis/fuzz.py`."""

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import attempt, prepared, temporary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyro_bmrs import files
from pyro_bmrs.data import DataError, load_data
from pyro_bmrs.pruning import NetworkPlan
from pyro_bmrs.runs.study import Study

INPUTS = 150
FORMATS = (
    "plan.json", "plan.numbers.safetensors", "study.yaml", "data.npz", "checkpoint", "posterior.safetensors",
    "settings.json", "diagnosis.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def formats():
    with temporary() as folder:
        yield prepared(Path(folder))


def test_all_formats_are_tried_and_read_where_they_are_whole(formats):
    assert set(formats) == set(FORMATS)
    for target in formats.values():
        assert attempt(target, target.valid)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_or_refused_by_a_value_error(name, formats):
    target = formats[name]

    @settings(
        max_examples=INPUTS,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
        derandomize=True,
    )
    @given(st.data())
    def tried(data):
        attempt(target, data.draw(target.inputs))

    tried()


# --- hostile files -----------------------------------------------------------------------------------------


def test_a_studys_aliases_are_refused_before_they_are_expanded(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in pairwise("abcdefghi")]
    (tmp_path / "study.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="must have no aliases"):
        Study.read(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    "text", ["out: !!python/object/apply:os.system ['touch ran']", "out: !!python/name:os.system"]
)
def test_no_tag_of_a_study_makes_an_object(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not YAML"):
        Study.read("study.yaml")
    assert not Path("ran").exists()


def test_an_archive_that_unpacks_to_more_than_memory_is_refused_unread(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", b"\0" * 2**20)
    content = path.read_bytes()
    # sizes as the folder of the archive has them: 3 GiB for each
    path.write_bytes(content.replace((2**20).to_bytes(4, "little"), (3 * 2**30).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"its arrays have 12,884,901,888 bytes, of 8,589,934,592 at most"):
        load_data(str(path))


def test_pickles_are_not_unpacked(tmp_path):
    path = tmp_path / "pickled.npz"
    parts = ("x_train", "y_train", "x_test", "y_test")
    np.savez(path, **{name: np.array([Opened(tmp_path / "ran")], dtype=object) for name in parts})
    with pytest.raises(DataError, match="pickled"):
        load_data(str(path))
    assert not (tmp_path / "ran").exists()


class Opened:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_text_without_end_is_refused_after_a_bounded_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_TEXT", 1000)
    path = tmp_path / "plan.json"
    path.write_text(f'{{"format": "{"x" * 1000}"}}')
    with pytest.raises(ValueError, match=r"plan\.json is no JSON \(it has more than 1,000 bytes\)"):
        NetworkPlan.load(path)


@pytest.mark.parametrize("layer", ["../../outside", "/etc/passwd", "..", "a/../../b"])
def test_names_of_layers_in_a_plan_are_no_paths(layer, formats, tmp_path):
    """What a plan calls a layer is compared with the network's names, and read or written nowhere."""
    document = json.loads(formats["plan.json"].valid)
    for entry in ("layers", "channels"):
        document[entry] = dict(zip([layer], document[entry].values(), strict=False))
    document["cuts"] = None
    content = json.dumps(document).encode()
    before = set(tmp_path.parent.rglob("*"))
    assert attempt(formats["plan.json"], content)
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"path must be a whole plan with plan\.numbers\.safetensors beside it"
    ):
        NetworkPlan.load(tmp_path / "plan.json")
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "plan.json"}


@pytest.mark.parametrize("entry", ["guide.posteriors.0.removed_units", "model.net.2.units"])
@pytest.mark.parametrize("broken", ["missing", "a number", "a table"])
def test_a_posteriors_numbers_of_structures_are_looked_at(entry, broken, formats, tmp_path):
    """Found by fuzzing: an AssertionError without the first, and torch's own for a number."""
    path = tmp_path / "posterior.safetensors"
    path.write_bytes(formats["posterior.safetensors"].valid)
    header, tensors = files.read_tensors(path)
    shapes = {"a number": (), "a table": (2, 3)}
    if broken == "missing":
        del tensors[entry]
    else:
        tensors[entry] = torch.zeros(shapes[broken], dtype=torch.int64)
    files.write_tensors(path, tensors, header)
    with pytest.raises(ValueError, match="belongs to another network"):
        formats["posterior.safetensors"].read(path.read_bytes())
