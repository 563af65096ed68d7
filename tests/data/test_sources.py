"""Every source is read as it was stored, or refused on one line."""

import ast
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import arrays, not_loaded, parts, prepared_equals_loaded, write_image
from sklearn.datasets import load_digits

import pyro_bmrs.data
from pyro_bmrs.data import load_data
from pyro_bmrs.data.sources import is_at_hand

REAL_ROOT = Path(os.environ.get("PYRO_BMRS_DATA") or "~/.cache/pyro_bmrs").expanduser()


def needs(folder):
    """Marks a test of a published set: slow, and skipped where its folder is absent."""
    absent = pytest.mark.skipif(
        not (REAL_ROOT / folder).is_dir(), reason=f"{folder} is not under {REAL_ROOT}; see PYRO_BMRS_DATA"
    )
    return [pytest.mark.slow, absent]


def test_libraries_of_single_sources_are_imported_only_when_used():
    for file in Path(pyro_bmrs.data.__file__).parent.glob("*.py"):
        for statement in ast.parse(file.read_text()).body:
            names = [getattr(statement, "module", None), *(a.name for a in getattr(statement, "names", []))]
            assert not {str(name).split(".")[0] for name in names} & {"torchvision", "sklearn", "PIL"}


def test_an_unknown_name_is_told_the_known_ones():
    known = ["got 'digit'", "'digits'", "'mnist'", "'fashion-mnist'", "'cifar10'", ".npz", "folder"]
    not_loaded(*known, name="digit")


def test_what_can_be_read_without_a_download(tmp_path):
    assert is_at_hand("digits")
    assert is_at_hand("patches", tmp_path)
    assert not is_at_hand("mnist", tmp_path)
    assert not is_at_hand("a/path.npz", tmp_path)


# scikit-learn's


def test_digits_are_all_there_once_with_their_labels(unscaled):
    dataset = load_data("digits")
    assert str(dataset) == "digits: 1150 train, 288 validation, 359 test, input (1, 8, 8), 10 classes"
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, digits.target, strict=True)}
    assert len(known) == 1797  # no two are alike
    for part in parts(dataset):
        inputs, labels = part.tensors
        assert labels.dtype == torch.int64
        assert [known.pop(image.numpy().tobytes()) for image in inputs] == labels.tolist()
    assert not known


def test_digits_test_part_is_a_stratified_fifth_for_every_seed(unscaled):
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])
    assert torch.equal(first.test.tensors[1], second.test.tensors[1])
    shares = torch.bincount(first.test.tensors[1]) / torch.tensor(np.bincount(load_digits().target))
    assert ((shares - 0.2).abs() < 0.01).all()


def test_patches_are_squares_of_two_photographs():
    patches = load_data("patches")
    assert (patches.input_shape, patches.num_outputs) == ((1, 8, 8), 2)
    assert patches.class_names == ("china", "flower")
    assert sum(map(len, parts(patches))) == 2 * (427 // 8) * (640 // 8)
    assert patches.preparation.form.values == "bytes"


# .npz


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((20, 7), (7,)),
        ((20, 6, 7), (1, 6, 7)),
        ((20, 6, 7, 1), (1, 6, 7)),
        ((20, 6, 7, 3), (3, 6, 7)),
        ((20, 6, 7, 4), (4, 6, 7)),
        ((20, 3, 6, 7), (3, 6, 7)),
        ((20, 2, 6, 7), (2, 6, 7)),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", ">f8"])
def test_npz_layouts(npz, unscaled, stored, expected, dtype):
    inputs = np.random.default_rng(1).integers(0, 256, size=stored).astype(dtype)
    dataset = load_data(npz(arrays(inputs)))
    assert dataset.input_shape == expected
    assert dataset.num_outputs == 2
    assert [len(part) for part in parts(dataset)] == [16, 4, 6]
    scale = 255 if dtype == "uint8" else 1
    channels_last = len(stored) == 4 and stored[3] in (1, 3, 4)
    truth = np.moveaxis(inputs[:6], 3, 1) if channels_last else inputs[:6].reshape(6, *expected)
    test = dataset.test.tensors[0]
    assert test.is_contiguous()
    torch.testing.assert_close(test, torch.from_numpy(truth.astype(np.float32) / np.float32(scale)))


def test_npz_keeps_inputs_and_labels_together(npz):
    labels = np.random.default_rng(2).integers(0, 3, size=60).astype(np.uint16)
    labels[:3] = [0, 1, 2]
    vectors = np.stack([labels * 1.0, np.arange(60.0)], axis=1)
    dataset = load_data(npz(arrays(vectors, labels, test_labels=labels[:6])), seed=9)
    for part in parts(dataset):
        inputs, kept = part.tensors
        levels = inputs[:, 0].unique(sorted=True)
        assert torch.equal(levels[kept], inputs[:, 0])
    positions = torch.cat([dataset.train.tensors[0], dataset.validation.tensors[0]])[:, 1]
    assert len(positions.unique()) == 60


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"x_train": np.ones((0, 5))}, ["x_train must be uint8", "not empty", "(0, 5)"]),
        ({"x_test": np.ones((6, 0))}, ["x_test must", "(6, 0)"]),
        ({"x_train": np.ones(20)}, ["x_train must", "(N, F)", "(20,)"]),
        ({"x_train": np.ones((20, 1, 1, 1, 5))}, ["x_train must", "(20, 1, 1, 1, 5)"]),
        ({"x_train": np.ones((20, 3, 4, 4))}, ["x_train", "channels", "(20, 3, 4, 4)"]),
        ({"x_train": np.ones((20, 5), np.int32)}, ["x_train must be uint8", "int32"]),
        ({"x_train": np.ones((20, 5), complex)}, ["x_train", "complex128"]),
        ({"x_train": np.full((20, 5), "a")}, ["x_train", "<U1"]),
        ({"x_train": np.full((20, 5), np.nan)}, ["x_train must be finite", "100 values"]),
        ({"x_test": np.full((6, 5), 1e300)}, ["x_test must be finite", "30 values"]),
        ({"x_test": np.ones((6, 4))}, ["x_test must be like x_train", "(20, 5)", "(6, 4)"]),
        ({"x_train": np.ones((20, 5), np.uint8)}, ["x_test must be like x_train", "uint8", "float64"]),
        ({"y_train": np.arange(19) % 2}, ["y_train must be integers of shape (20,)", "(19,)"]),
        ({"y_test": np.zeros(0, int)}, ["y_test must be integers of shape (6,)", "(0,)"]),
        ({"y_train": np.arange(20) % 2 + 0.0}, ["y_test must be floating point", "as y_train is", "int64"]),
        ({"y_test": np.zeros(5)}, ["y_test must be integers of shape", "float64"]),
        ({"y_train": np.arange(20) % 2 == 0}, ["y_train", "bool"]),
        ({"y_train": np.ones((20, 1), int)}, ["y_train", "(20, 1)"]),
        ({"y_train": np.arange(20) % 2 + 1}, ["y_train must be 0 to", "from 1 to 2"]),
        ({"y_train": np.arange(20) % 2 - 1}, ["y_train", "from -1 to 0"]),
        ({"y_train": np.arange(20) % 2 * 2}, ["y_train", "2 different labels from 0 to 2"]),
        ({"y_train": np.zeros(20, int)}, ["y_train", "at least 2 classes"]),
        ({"y_test": np.arange(6) % 3}, ["y_test must", "0 to 1", "from 0 to 2"]),
        ({"y_test": -(np.arange(6) % 2)}, ["y_test must", "0 to 1", "from -1 to 0"]),
    ],
)
def test_bad_npz_contents(npz, changes, fragments):
    not_loaded(*fragments, name=npz({**arrays(), **changes}))


# image folders


def write_class(folder, count, *, level, shape=(6, 7), offset=0):
    """Images of one class, each its own grey level from `level` on."""
    for index in range(count):
        write_image(folder / f"{offset + index:03d}.png", np.full(shape, level + index, np.uint8))


def grey_levels(part):
    return (part.tensors[0][:, 0, 0, 0] * 255).round().int().tolist()


def test_class_folders(tmp_path, unscaled):
    write_class(tmp_path / "cat", 10, level=0)
    write_class(tmp_path / "dog", 20, level=100)
    first, second = (load_data(str(tmp_path), seed=seed) for seed in (0, 1))
    assert first.input_shape == (1, 6, 7)
    assert first.num_outputs == 2
    assert [len(part) for part in parts(first)] == [19, 5, 6]
    assert torch.bincount(first.test.tensors[1]).tolist() == [2, 4]
    assert grey_levels(first.test) == grey_levels(second.test)
    assert grey_levels(first.train) != grey_levels(second.train)
    seen = []
    for part in parts(first):
        levels = grey_levels(part)
        assert [int(level >= 100) for level in levels] == part.tensors[1].tolist()
        seen += levels
    assert sorted(seen) == [*range(10), *range(100, 120)]


def test_train_and_test_folders(tmp_path, unscaled):
    write_class(tmp_path / "train" / "cat", 5, level=0)
    write_class(tmp_path / "train" / "dog", 5, level=100)
    write_class(tmp_path / "test" / "cat", 2, level=50)
    write_class(tmp_path / "test" / "dog", 1, level=150)
    dataset = load_data(str(tmp_path))
    assert [len(part) for part in parts(dataset)] == [8, 2, 3]
    assert grey_levels(dataset.test) == [50, 51, 150]
    assert dataset.test.tensors[1].tolist() == [0, 0, 1]


def test_colour_and_grey_images_together(tmp_path, unscaled):
    write_class(tmp_path / "cat", 4, level=10)
    for index in range(4):
        pixels = np.zeros((6, 7, 4), np.uint8)
        pixels[..., 0], pixels[..., 2] = 255, 51 * index
        write_image(tmp_path / "dog" / f"{index}.png", pixels)
    dataset = load_data(str(tmp_path))
    assert dataset.input_shape == (3, 6, 7)
    for part in parts(dataset):
        for image, label in zip(*part.tensors, strict=True):
            red, green, blue = image[:, 0, 0].tolist()
            if label == 0:
                assert red == green == blue
            else:
                assert (red, green) == (1.0, 0.0)
                assert blue * 5 == pytest.approx(round(blue * 5))


def test_images_of_several_sizes_need_an_image_size(tmp_path, unscaled):
    write_class(tmp_path / "cat", 5, level=200, shape=(6, 7))
    write_class(tmp_path / "dog", 5, level=100, shape=(30, 40))
    not_loaded("image_size", "(6, 7)", "(30, 40)", name=str(tmp_path))
    dataset = load_data(str(tmp_path), image_size=8)
    assert dataset.input_shape == (1, 8, 8)
    for part in parts(dataset):
        for image, label in zip(*part.tensors, strict=True):
            # Cats are padded, dogs, all of one grey, are shrunk.
            assert (image == 0).sum() == (64 - 42 if label == 0 else 0)


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ([], ["class"]),
        (["cat/0.png", "cat/1.png"], ["for each class, 2 or more"]),
        (["cat/0.png", "cat/1.png", "dog/0.png"], ["at least 2 images of each class", "(1 of dog)"]),
        (["cat/0.png", "dog/notes.txt"], ["dog"]),
        (["train/cat/0.png", "train/dog/0.png"], ["train/ and test/ both"]),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"],
            ["classes in test/ must be those in train/, a, b", "['a', 'c']"],
        ),
    ],
)
def test_bad_folders(tmp_path, files, fragments):
    for file in files:
        path = tmp_path / file
        if path.suffix == ".png":
            write_image(path, np.zeros((6, 7), np.uint8))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("no image")
    not_loaded(*fragments, name=str(tmp_path))


@pytest.mark.parametrize("fault", ["cut short", "16 bits"])
def test_an_image_that_cant_be_read_is_named(tmp_path, fault):
    for name in ("cat", "dog"):
        write_class(tmp_path / name, 3, level=0)
    broken = tmp_path / "dog" / "001.png"
    if fault == "cut short":
        broken.write_bytes(broken.read_bytes()[:40])
    else:  # which Pillow would clip
        write_image(broken, np.full((6, 7), 40000, np.uint16))
    not_loaded("8 bits a channel", str(broken), name=str(tmp_path))


# torchvision


def test_missing_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(load_data("digits").test) == 359
    not_loaded("pip install 'pyro-bmrs[vision]'", name="mnist", data_root=tmp_path)
    for name in ("cat", "dog"):  # which Pillow reads
        write_class(tmp_path / name, 3, level=0)
    assert len(load_data(str(tmp_path)).test) == 2


class FakeMNIST:
    """Stands for torchvision's class: absent until downloaded, and records each call."""

    def __init__(self, root, train, download):
        self.calls.append((Path(root), train, download))
        if download:
            self.download(Path(root))
        elif not (Path(root) / "here").exists():
            raise RuntimeError("Dataset not found.\nYou can use download=True to download it")
        self.data = torch.randint(0, 256, (30 if train else 10, 28, 28), dtype=torch.uint8)
        self.targets = torch.arange(len(self.data)) % 10
        self.classes = [f"{label} of ten" for label in range(10)]


@pytest.fixture
def fake_mnist(monkeypatch):
    class Reader(FakeMNIST):
        calls: list = []  # noqa: RUF012
        download = staticmethod(lambda root: (root / "here").touch())

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(MNIST=Reader)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return Reader


def test_downloads_only_what_is_absent(fake_mnist, tmp_path):
    dataset = load_data("mnist", data_root=tmp_path)
    assert [len(part) for part in parts(dataset)] == [20, 10, 10]  # one of each class to validate on
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.class_names[:2] == ("0 of ten", "1 of ten")
    assert fake_mnist.calls == [(tmp_path, True, False), (tmp_path, True, True), (tmp_path, False, False)]
    fake_mnist.calls.clear()
    load_data("mnist", data_root=tmp_path)
    assert fake_mnist.calls == [(tmp_path, True, False), (tmp_path, False, False)]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("Error downloading train")])
def test_failed_download_says_where_it_looked(fake_mnist, tmp_path, error):
    def fail(root):
        raise error

    fake_mnist.download = staticmethod(fail)
    not_loaded(
        str(tmp_path),
        "--data-root",
        "PYRO_BMRS_DATA",
        str(error).split("\n")[0],
        name="mnist",
        data_root=tmp_path,
    )


def test_data_root_comes_from_the_argument_then_the_environment_then_the_cache(
    fake_mnist, tmp_path, monkeypatch
):
    argument, environment, home = (tmp_path / name for name in ("argument", "environment", "home"))
    for root in (argument, environment, home / ".cache/pyro_bmrs"):
        root.mkdir(parents=True)
        (root / "here").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYRO_BMRS_DATA", str(environment))
    load_data("mnist", data_root=str(argument))
    load_data("mnist")
    monkeypatch.delenv("PYRO_BMRS_DATA")
    load_data("mnist")
    load_data("mnist", data_root="~/.cache/pyro_bmrs")
    roots = [root for root, train, _ in fake_mnist.calls if train]
    assert roots == [argument, environment, home / ".cache/pyro_bmrs", home / ".cache/pyro_bmrs"]


def test_damaged_files_are_reported(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 28, 0, 0, 0, 28, 1])
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]))
    not_loaded("'mnist'", f"not whole under {tmp_path}", name="mnist", data_root=tmp_path)


def test_unreadable_files_are_not_downloaded_over(fake_mnist, tmp_path, monkeypatch):
    # torchvision checks some of what it reads by bare assertions.
    def fail(self, root, train, download):
        assert not download
        raise AssertionError

    monkeypatch.setattr(fake_mnist, "__init__", fail)
    not_loaded(f"under {tmp_path} are unreadable (AssertionError)", name="mnist", data_root=tmp_path)


@pytest.mark.parametrize(
    ("name", "counts", "shape", "first_test_labels"),
    [
        pytest.param("mnist", [48000, 12000, 10000], (1, 28, 28), [7, 2, 1, 0, 4], marks=needs("MNIST")),
        pytest.param(
            "fashion-mnist", [48000, 12000, 10000], (1, 28, 28), [9, 2, 1, 1, 6], marks=needs("FashionMNIST")
        ),
        pytest.param(
            "cifar10", [40000, 10000, 10000], (3, 32, 32), [3, 8, 8, 0, 6], marks=needs("cifar-10-batches-py")
        ),
    ],
)
def test_published_sets(name, counts, shape, first_test_labels):
    pytest.importorskip("torchvision")
    dataset = load_data(name, data_root=REAL_ROOT)
    assert [len(part) for part in parts(dataset)] == counts
    assert dataset.input_shape == shape
    assert dataset.num_outputs == 10
    assert dataset.test.tensors[1][:5].tolist() == first_test_labels
    train = dataset.train.tensors[0]
    assert all(part.tensors[0].is_contiguous() for part in parts(dataset))
    deviation, mean = torch.std_mean(train, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(shape[0]), atol=1e-5, rtol=0)
    totals = sum(
        torch.bincount(part.tensors[1], minlength=10) for part in (dataset.train, dataset.validation)
    )
    if name != "mnist":  # The other two are balanced: 10 classes alike in the official training set.
        assert set(totals.tolist()) == {sum(counts[:2]) // 10}


@pytest.mark.parametrize("name", [pytest.param("mnist", marks=needs("MNIST"))])
def test_mnist_padded_to_the_paper_s_size(name):
    pytest.importorskip("torchvision")
    test = load_data(name, data_root=REAL_ROOT, image_size=32).test.tensors[0]
    assert test.shape == (10000, 1, 32, 32)
    # The published mean 0.1307 and deviation 0.3081, spread over the wider frame with its zeros.
    share = (28 / 32) ** 2
    mean = 0.1307 * share
    deviation = ((0.3081**2 + 0.1307**2) * share - mean**2) ** 0.5
    assert test[0, 0, 0, 0].item() == pytest.approx(-mean / deviation, rel=5e-3)
    assert test.max().item() == pytest.approx((1 - mean) / deviation, rel=5e-3)


@pytest.mark.parametrize("name", [pytest.param("mnist", marks=needs("MNIST"))])
@pytest.mark.parametrize("image_size", [None, 32])
def test_prepare_mnist(name, image_size):
    datasets = pytest.importorskip("torchvision.datasets")
    train, test = (datasets.MNIST(REAL_ROOT, train=train).data.numpy() for train in (True, False))
    dataset = load_data(name, data_root=REAL_ROOT, image_size=image_size, seed=2)
    prepared_equals_loaded(dataset, train, test)
