"""What a data set's inputs must look like is told in JSON, and read back without the data."""

import json

import numpy as np
import pytest
import torch
from data_files import arrays, bytes_of, not_loaded, write_image

from pyro_bmrs.data import load_data
from pyro_bmrs.data.preparation import Preparation


def through_json(preparation):
    return Preparation.of(json.loads(json.dumps(preparation.document())))


@pytest.mark.parametrize("image_size", [None, 12])
def test_digits_are_prepared_without_their_data(image_size):
    digits = load_data("digits", image_size=image_size)
    again = through_json(digits.preparation)
    raw = np.random.default_rng(0).integers(0, 17, (5, 8, 8))
    assert torch.equal(again.prepare(raw), digits.prepare(raw))
    assert again.input_shape == digits.input_shape
    assert again.class_names == tuple("0123456789")
    document = again.document()
    assert (document["divisor"], document["channels"], document["image_size"]) == (16.0, "grey", image_size)
    assert document["axes"] == ["channel", "height", "width"]


@pytest.mark.parametrize("inputs", [bytes_of(20, 5), bytes_of(20, 5) / 7.0, bytes_of(20, 6, 7, 3)])
def test_archives_are_prepared_without_their_data(npz, inputs):
    dataset = load_data(npz(arrays(inputs)))
    again = through_json(dataset.preparation)
    assert torch.equal(again.prepare(inputs), dataset.prepare(inputs))
    assert again.document() == dataset.preparation.document()
    assert len(again.document()["mean"]) == dataset.input_shape[0]
    assert again.is_like(dataset.preparation)


def test_folders_of_any_size_are_prepared_without_their_data(tmp_path):
    for index in range(8):
        write_image(tmp_path / "ab"[index % 2] / f"{index}.png", bytes_of(9 + index, 12, 3))
    dataset = load_data(str(tmp_path), image_size=8)
    again = through_json(dataset.preparation)
    assert again.input_shape == dataset.input_shape == (3, 8, 8)
    assert again.class_names == ("a", "b")
    assert (again.document()["channels"], again.document()["raw_shape"]) == ("RGB", [3, None, None])
    assert torch.equal(again.prepare(bytes_of(2, 30, 40, 3)), dataset.prepare(bytes_of(2, 30, 40, 3)))


def test_names_of_classes_come_from_an_archive(npz):
    named = load_data(npz({**arrays(), "class_names": np.array(["sick", "well"])}))
    assert named.class_names == ("sick", "well")
    assert named.num_outputs == 2
    assert load_data(npz(arrays())).class_names == ("0", "1")


@pytest.mark.parametrize(
    "names",
    [
        np.array(["a"]),
        np.array(["a", "a"]),
        np.array([0, 1]),
        np.array([["a"], ["b"]]),
        np.array([b"a", b"b"]),
    ],
)
def test_bad_names_of_classes(npz, names):
    not_loaded("class_names must be 2 different texts", name=npz({**arrays(), "class_names": names}))


@pytest.mark.parametrize(
    "changes",
    [
        {"raw_shape": []}, {"raw_shape": [0, 8, 8]}, {"raw_shape": [3, 8, 8]}, {"raw_shape": [1, 8]},
        {"raw_shape": [1, None, None]}, {"raw_values": "words"}, {"channels": "BGR"}, {"image_size": 0},
        {"mean": [0.0, 1.0]}, {"mean": ["a"]}, {"mean": None}, {"deviation": [0.0]}, {"deviation": [float("inf")]},
        {"class_names": []}, {"class_names": [0, 1]},
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(changes):
    document = load_data("digits").preparation.document()
    with pytest.raises(
        ValueError, match=next(iter(changes)) if "shape" not in str(changes) else "raw_shape|inputs"
    ):
        Preparation.of({**document, **changes})
    del document[next(iter(changes))]
    with pytest.raises(ValueError, match=next(iter(changes))):
        Preparation.of(document)


def test_what_is_not_alike(npz):
    vectors = np.random.default_rng(0).normal(size=(40, 3))
    one = load_data(npz(arrays(vectors))).preparation
    assert one.is_like(load_data(npz(arrays(vectors * (1 + 1e-7)))).preparation)
    for other in (
        arrays(vectors + 0.1),
        arrays(vectors[:, :2]),
        {**arrays(vectors), "class_names": np.array(["a", "b"])},
    ):
        assert not one.is_like(load_data(npz(other)).preparation)
