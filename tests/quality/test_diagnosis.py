"""A diagnosis on disk: what is read is what was written; what is damaged or newer is refused."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from diagnosed import make_diagnosis, make_plan, random_scores

from pyro_bmrs.files import NewerFileError
from pyro_bmrs.quality import Diagnosis
from pyro_bmrs.quality import diagnosis as diagnosis_module


def same(one, other):
    pd.testing.assert_frame_equal(
        one.reset_index(drop=True), other.reset_index(drop=True), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    "layer", ["1", "0x1", "1e3", "NA", "nan", "None", "True", 'a "b", c', "line\nbreak", "名"]
)
def test_names_stay_text(layer, tmp_path):
    plan = make_plan(random_scores({layer: 4, "b": 3}))
    made = make_diagnosis(plan, names=(layer, "reduced"), foreign=layer, notes=[layer])
    made.curves["criterion"] = layer
    made.save(tmp_path)
    loaded = Diagnosis.load(tmp_path)
    assert loaded.contraction.site.tolist() == [layer] * 4 + ["b"] * 3
    assert loaded.khat.part.tolist() == ["all latents", layer, "b"]
    assert loaded.khat.khat.tolist() == [1.3, -math.inf, -0.35]
    for table in (loaded.quality, loaded.reliability, loaded.risk_coverage):
        assert table.network.unique().tolist() == [layer, "reduced"]
    assert set(loaded.entropy.data) == {"test", layer}
    assert set(loaded.curves.criterion) == {layer}
    assert loaded.notes == [layer]
    assert loaded.facts["out_of_distribution"] == layer
    for name, table in made.tables().items():
        same(loaded.tables()[name], table)


def test_what_is_not_there_stays_away(tmp_path):
    plan = make_plan(random_scores({"a": 4}))
    made = make_diagnosis(plan)
    made.save(tmp_path)
    made = replace(made, loo=None, quality=None, contraction=None)
    made.save(tmp_path)  # over the other
    loaded = Diagnosis.load(tmp_path)
    assert loaded.loo is loaded.quality is loaded.contraction is None
    assert loaded.tables().keys() == made.tables().keys()


def test_an_unfinished_save_leaves_no_diagnosis(tmp_path, monkeypatch):
    made = make_diagnosis(make_plan(random_scores({"a": 4})))
    made.save(tmp_path)

    def fail(path, table):
        if path.name == "quality.csv":
            raise OSError("disk full")

    monkeypatch.setattr(diagnosis_module, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        made.save(tmp_path)
    assert not (tmp_path / "diagnosis.json").exists()
    with pytest.raises(ValueError, match="folder must hold a diagnosis"):
        Diagnosis.load(tmp_path)


def edited(folder, change):
    path = folder / "diagnosis.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_newer_version_is_refused(tmp_path):
    folder = tmp_path / "folder"
    make_diagnosis(make_plan(random_scores({"a": 4}))).save(folder)
    edited(folder, lambda document: document.update(version=2))
    with pytest.raises(
        NewerFileError, match=r"newer pyro_bmrs \(diagnosis version 2, this one reads up to 1\)"
    ):
        Diagnosis.load(folder)


DAMAGE = {
    "no file": lambda folder: (folder / "diagnosis.json").unlink(),
    "cut off": lambda folder: (folder / "diagnosis.json").write_text('{"format": "pyro_bmrs.diag'),
    "empty": lambda folder: (folder / "diagnosis.json").write_text(""),
    "bytes": lambda folder: (folder / "diagnosis.json").write_bytes(b"\xff\xfe\x00\xff"),
    "a list": lambda folder: (folder / "diagnosis.json").write_text("[]"),
    "a number": lambda folder: (folder / "diagnosis.json").write_text("3"),
    "another format": lambda folder: edited(folder, lambda d: d.update(format="pyro_bmrs.run")),
    "no format": lambda folder: edited(folder, lambda d: d.pop("format")),
    "a version in words": lambda folder: edited(folder, lambda d: d.update(version="one")),
    "no version": lambda folder: edited(folder, lambda d: d.pop("version")),
    "an unknown table": lambda folder: edited(folder, lambda d: d["tables"].append("../secret")),
    "no tables": lambda folder: edited(folder, lambda d: d.update(tables=None)),
    "tables of tables": lambda folder: edited(folder, lambda d: d.update(tables=[["khat"]])),
    "facts are a list": lambda folder: edited(folder, lambda d: d.update(facts=[1])),
    "a fact is missing": lambda folder: edited(folder, lambda d: d["facts"].pop("draws")),
    "no parts": lambda folder: edited(folder, lambda d: d.pop("parts")),
    "notes are a number": lambda folder: edited(folder, lambda d: d.update(notes=3)),
    "a table is missing": lambda folder: (folder / "quality.csv").unlink(),
    "a table is empty": lambda folder: (folder / "quality.csv").write_text(""),
    "a table is none": lambda folder: (folder / "quality.csv").write_text("something else\n1\n"),
    "a table lacks a column": lambda folder: (folder / "khat.csv").write_text("part,latents\na,3\n"),
    "a table is bytes": lambda folder: (folder / "curves.csv").write_bytes(b"\xff\xfe\x00\xff" * 9),
    "a table is a folder": lambda folder: ((folder / "elbo.csv").unlink(), (folder / "elbo.csv").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_diagnosis_is_refused(damage, tmp_path):
    make_diagnosis(make_plan(random_scores({"a": 4}))).save(tmp_path)
    Diagnosis.load(tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(
        ValueError, match=r"folder must hold a diagnosis: .*diagnosis\.json is none, or damaged"
    ):
        Diagnosis.load(tmp_path)


def test_a_missing_folder_is_no_diagnosis(tmp_path):
    with pytest.raises(ValueError, match="folder must hold a diagnosis"):
        Diagnosis.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["a newer one", "plain"])
def test_a_folders_name_does_not_change_what_is_said(name, tmp_path):
    make_diagnosis(make_plan(random_scores({"a": 4}))).save(tmp_path / name)
    edited(tmp_path / name, lambda document: document.update(format=f"{name}, newer"))
    with pytest.raises(ValueError, match="folder must hold a diagnosis"):
        Diagnosis.load(tmp_path / name)
