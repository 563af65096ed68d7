"""Arrays of files and callers are read whole, or refused on one line."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import arrays, bytes_of, refused

from pyro_bmrs.data import DataError, load_data, read_inputs
from pyro_bmrs.data import arrays as module


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)


# files


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8"])
def test_read_inputs(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    np.save(tmp_path / "new.npy", array)
    np.savez(tmp_path / "new.npz", x=array, y=np.ones(2))
    for path in (tmp_path / "new.npy", str(tmp_path / "new.npz")):
        read = read_inputs(path)
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)


@pytest.mark.parametrize(
    ("array", "fragments"),
    [
        (np.zeros((0, 4)), ["(0, 4)", "not empty"]),
        (np.array([1.0, np.nan, np.inf]), ["2 values", "finite"]),
        (np.array(["a"]), ["<U1", "integers or floating point"]),
        (np.array([True]), ["bool"]),
        (np.array([1j]), ["complex128"]),
        (np.array([{}], dtype=object), ["without pickles"]),
    ],
)
def test_unusable_inputs(tmp_path, array, fragments):
    np.save(tmp_path / "new.npy", array)
    np.savez(tmp_path / "new.npz", x=array)
    for file in ("new.npy", "new.npz"):
        refused(lambda file=file: read_inputs(tmp_path / file), file, *fragments)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture(params=["load_data, .npz", "read_inputs, .npz", "read_inputs, .npy"])
def stored(request, tmp_path):
    """A whole file that can be read, and what reads it."""
    reader, ending = request.param.split(", ")
    path = tmp_path / f"some{ending}"
    if reader == "load_data":
        np.savez(path, **arrays())
    elif ending == ".npz":
        np.savez(path, x=np.ones((9, 9)))
    else:
        np.save(path, np.ones((9, 9)))
    read = functools.partial(load_data if reader == "load_data" else read_inputs, str(path))
    read()
    return path, read


@pytest.mark.parametrize("length", [0, 7, 130, -1])
def test_a_file_cut_short_is_refused(stored, length):
    path, read = stored
    path.write_bytes(path.read_bytes()[:length])
    refused(read, path.name, "must be a whole .np")


@pytest.mark.parametrize("kind", ["absent", "a folder", "text", "other keys", "no keys", "pickled"])
def test_another_file_is_refused(stored, tmp_path, kind):
    path, read = stored
    path.unlink()
    expected = {
        "absent": "file that exists", "a folder": "file that exists", "text": "must be a whole .np",
        "other keys": "and holds inputs", "no keys": "and holds nothing", "pickled": "without pickles",
    }[kind]  # fmt: skip
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    if kind == "a folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("1, 2, 3")
    elif kind in ("other keys", "no keys"):
        with path.open("wb") as file:
            np.savez(file, **({"inputs": np.ones(3)} if kind == "other keys" else {}))
    elif kind == "pickled" and path.suffix == ".npy":
        np.save(path, bomb)
    elif kind == "pickled":
        np.savez(path, x=bomb, **{**arrays(), "x_train": bomb})
    refused(read, path.name, expected)
    assert not (tmp_path / "exploded").exists()


def test_an_altered_file_is_refused(npz):
    path = Path(npz(arrays()))
    whole = path.read_bytes()
    middle = whole.index(b"\x93NUMPY") + 200
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    refused(lambda: load_data(str(path)), "some.npz", "CRC")


def test_one_array_is_no_data_set(tmp_path):
    path = tmp_path / "some.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refused(lambda: load_data(str(path)), "some.npz", "one array")


def test_a_file_that_would_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    np.savez_compressed(tmp_path / "new.npz", x=np.zeros(1000))
    refused(lambda: read_inputs(tmp_path / "new.npz"), "new.npz", "1,000 at most")


# the form of raw inputs


@pytest.mark.parametrize(
    ("inputs", "fragments"),
    [
        (np.zeros((3, 8, 9)), ["(3, 8, 9)", "(N, 8, 8), (N, 8, 8, 1) or (N, 1, 8, 8)"]),
        (np.zeros((8, 8)), ["(8, 8)"]),
        (np.zeros((3, 64)), ["(3, 64)"]),
        (np.zeros((3, 3, 8, 8)), ["(3, 3, 8, 8)"]),
        (np.zeros((3, 8, 8, 1, 1)), ["(3, 8, 8, 1, 1)"]),
        (np.zeros(()), ["shape ()"]),
        (np.zeros((0, 8, 8)), ["(0, 8, 8)", "N at least 1"]),
        (np.full((3, 8, 8), 17), ["17", "from 0 to 16"]),
        (np.full((3, 8, 8), -0.5), ["-0.5", "from 0 to 16"]),
        (np.full((3, 8, 8), np.nan), ["nan", "from 0 to 16"]),
        (np.zeros((3, 8, 8), bool), ["bool", "numbers from 0 to 16"]),
        (np.zeros((3, 8, 8), object), ["object"]),
        (np.zeros((3, 8, 8), complex), ["complex128"]),
        ([[0.0] * 8] * 8, ["list", "NumPy array or a tensor"]),
        (torch.zeros(3, 8, 8, device="meta"), ["meta"]),
    ],
)
def test_bad_inputs_for_digits(inputs, fragments):
    digits = load_data("digits", limit=20)
    assert refused(lambda: digits.prepare(inputs), *fragments).startswith("inputs ")


def test_bad_inputs_for_npz(npz):
    images = load_data(npz(arrays(bytes_of(20, 6, 7, 3))))
    good = np.zeros((2, 6, 7, 3), np.uint8)
    refused(lambda: images.prepare(good / 255), "float64", "uint8", "(N, 6, 7, 3) or (N, 3, 6, 7)")
    refused(lambda: images.prepare(good.astype(np.int64)), "int64", "uint8")
    refused(lambda: images.prepare(good[..., 0]), "(2, 6, 7)", "(N, 6, 7, 3)")
    refused(lambda: images.prepare(good[..., :1]), "(2, 6, 7, 1)")
    vectors = load_data(npz(arrays()))
    refused(lambda: vectors.prepare(np.zeros((3, 5), np.uint8)), "uint8", "floating point", "(N, 5)")
    refused(lambda: vectors.prepare(np.zeros((3, 4))), "(3, 4)", "(N, 5)")
    refused(lambda: vectors.prepare(np.full((3, 5), np.inf)), "15 values", "finite")
    refused(lambda: vectors.prepare(np.full((3, 5), 1e300)), "15 values", "finite")
