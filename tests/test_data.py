import ast
import doctest
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import pyro_bmrs.data
import pyro_bmrs.data_sources
from pyro_bmrs.data import DataError, Dataset, load_data, read_inputs
from pyro_bmrs.data_sources import is_at_hand

REAL_ROOT = Path(os.environ.get("PYRO_BMRS_DATA") or "~/.cache/pyro_bmrs").expanduser()


def needs(folder):
    """Marks a test of a published set: slow, and skipped where its folder is absent."""
    absent = pytest.mark.skipif(
        not (REAL_ROOT / folder).is_dir(), reason=f"{folder} is not under {REAL_ROOT}; see PYRO_BMRS_DATA"
    )
    return [pytest.mark.slow, absent]


def no_statistics(_):
    """In the place of `_channel_statistics`: nothing is standardised."""
    return torch.tensor(0.0), torch.tensor(1.0)


def parts(dataset):
    return (dataset.train, dataset.validation, dataset.test)


def rows(part):
    """Each example's bytes, to compare sets of examples."""
    return [row.numpy().tobytes() for row in part.tensors[0]]


def arrays(inputs=None, labels=None, *, test_inputs=None, test_labels=None):
    """The four arrays of a valid .npz, 20 and 6 vectors of 5 features, with replacements."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(20, 5)) if inputs is None else inputs
    labels = np.arange(len(inputs)) % 2 if labels is None else labels
    test_inputs = inputs[:6] if test_inputs is None else test_inputs
    test_labels = np.arange(len(test_inputs)) % 2 if test_labels is None else test_labels
    return {"x_train": inputs, "y_train": labels, "x_test": test_inputs, "y_test": test_labels}


@pytest.fixture
def npz(tmp_path):
    def write(contents):
        path = tmp_path / "some.npz"
        np.savez(path, **contents)
        return str(path)

    return write


def refused(*fragments, **call):
    """load_data(**call) raises a DataError on one line that holds every fragment."""
    with pytest.raises(DataError) as caught:
        load_data(**call)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


@pytest.mark.parametrize("module", [pyro_bmrs.data, pyro_bmrs.data_sources])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted >= 6


@pytest.mark.parametrize("module", [pyro_bmrs.data, pyro_bmrs.data_sources])
def test_libraries_of_single_sources_are_imported_only_when_used(module):
    for statement in ast.parse(Path(module.__file__).read_text()).body:
        names = [getattr(statement, "module", None), *(a.name for a in getattr(statement, "names", []))]
        assert not {str(name).split(".")[0] for name in names} & {"torchvision", "sklearn", "PIL"}


# digits


def test_digits_are_all_there_once():
    dataset = load_data("digits")
    assert [len(part) for part in parts(dataset)] == [1150, 288, 359]
    assert sum(len(part) for part in parts(dataset)) == 1797
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.num_classes == 10
    assert dataset.name == "digits"
    for part in parts(dataset):
        inputs, labels = part.tensors
        assert inputs.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert inputs.shape == (len(part), 1, 8, 8)
        assert labels.shape == (len(part),)

    counts = sum(torch.bincount(part.tensors[1], minlength=10) for part in parts(dataset))
    assert counts.tolist() == np.bincount(load_digits().target).tolist()


def test_digits_keep_their_labels():
    dataset = load_data("digits")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    # One affine map took the images to the data set's: find it from the test part's extremes.
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, digits.target, strict=True)}
    assert len(known) == 1797
    inputs, labels = dataset.test.tensors
    low, high = inputs.min(), inputs.max()
    restored = ((inputs - low) / (high - low) * 16).round() / 16
    assert [known[image.numpy().tobytes()] for image in restored] == labels.tolist()


def test_digits_test_part_is_a_stratified_fifth_for_every_seed():
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert torch.equal(first.test.tensors[1], second.test.tensors[1])
    # The same images, up to each seed's own standardisation.
    rescaled = [
        F.normalize((x - x.mean()).flatten(), dim=0) for x in (first.test.tensors[0], second.test.tensors[0])
    ]
    torch.testing.assert_close(rescaled[0], rescaled[1], atol=1e-6, rtol=0)
    shares = torch.bincount(first.test.tensors[1]) / torch.tensor(np.bincount(load_digits().target))
    assert ((shares - 0.2).abs() < 0.01).all()


def test_dataset_prints_its_sizes():
    assert str(load_data("digits")) == (
        "digits: 1150 train, 288 validation, 359 test, input (1, 8, 8), 10 classes"
    )


def test_dataset_is_frozen():
    dataset = load_data("digits", limit=10)
    with pytest.raises(AttributeError):
        dataset.num_classes = 3  # type: ignore[misc]


# splitting


def test_same_seed_same_split_other_seed_other_split():
    first, again, other = (load_data("digits", seed=seed) for seed in (3, 3, 4))
    for one, two in zip(parts(first), parts(again), strict=True):
        assert torch.equal(one.tensors[0], two.tensors[0])
        assert torch.equal(one.tensors[1], two.tensors[1])
    assert not torch.equal(first.train.tensors[1], other.train.tensors[1])


def test_split_leaves_torch_global_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_data("digits")
    assert torch.equal(torch.rand(3), expected)


def test_train_validation_and_test_do_not_overlap():
    dataset = load_data("digits")
    examples = [row for part in parts(dataset) for row in rows(part)]
    assert len(set(examples)) == 1797  # No two digits are alike.


@pytest.mark.parametrize(("fraction", "expected"), [(0.2, 288), (0.5, 719), (0.1, 144)])
def test_validation_fraction(fraction, expected):
    dataset = load_data("digits", validation_fraction=fraction)
    assert len(dataset.validation) == expected
    assert len(dataset.train) == 1438 - expected


def test_limit_keeps_the_first_of_the_permutation():
    whole, limited = load_data("digits"), load_data("digits", limit=100)
    assert [len(part) for part in parts(limited)] == [80, 20, 359]
    # Before the split: the limited set's examples are the whole one's first hundred.
    labels = torch.cat([limited.train.tensors[1], limited.validation.tensors[1]])
    assert torch.equal(labels, whole.train.tensors[1][:100])
    assert [len(part) for part in parts(load_data("digits", limit=10**6))] == [1150, 288, 359]


# standardising


def test_training_part_has_mean_zero_and_deviation_one():
    dataset = load_data("digits")
    train = dataset.train.tensors[0].double()
    assert abs(train.mean().item()) < 1e-6
    assert abs(train.std(correction=0).item() - 1) < 1e-6
    # The training part's statistics, not all examples': the others are only near.
    for part in (dataset.validation, dataset.test):
        assert 1e-5 < abs(part.tensors[0].double().mean().item()) < 0.1


def test_each_channel_is_standardised_by_itself(npz):
    images = np.random.default_rng(1).uniform(size=(40, 6, 7, 3)) * [1, 10, 100] + [0, 5, -1000]
    dataset = load_data(npz(arrays(images)))
    train = dataset.train.tensors[0].double()
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-4, rtol=0)


def test_each_feature_is_standardised_by_itself(npz):
    vectors = np.random.default_rng(1).normal(size=(40, 3)) * [1, 10, 100]
    train = load_data(npz(arrays(vectors))).train.tensors[0]
    assert train.shape == (32, 3)
    torch.testing.assert_close(train.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 + 0.5])
def test_constant_feature_is_only_centred(npz, constant):
    vectors = np.random.default_rng(1).normal(size=(40, 3))
    vectors[:, 1] = constant
    test_vectors = vectors[:5].copy()
    test_vectors[0, 1] += 2.0
    dataset = load_data(npz(arrays(vectors, test_inputs=test_vectors)))
    assert dataset.train.tensors[0][:, 1].abs().max() <= abs(constant) * 1e-6
    assert dataset.test.tensors[0][0, 1].item() == pytest.approx(2.0, abs=abs(constant) * 1e-6 + 1e-6)


def test_small_units_are_not_taken_for_constant(npz):
    vectors = np.random.default_rng(1).normal(size=(40, 3)) * 1e-12
    train = load_data(npz(arrays(vectors))).train.tensors[0]
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_bytes_are_scaled_and_floats_are_not(npz, monkeypatch):
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)
    images = np.random.default_rng(1).integers(0, 256, size=(20, 6, 7), dtype=np.uint8)
    scaled = load_data(npz(arrays(images))).test.tensors[0]
    torch.testing.assert_close(scaled, torch.from_numpy(images[:6, None] / np.float32(255)))
    plain = load_data(npz(arrays(images.astype(np.float32)))).test.tensors[0]
    assert torch.equal(plain, torch.from_numpy(images[:6, None].astype(np.float32)))


# sizing


def test_padding_places_zeros_on_all_sides(npz, monkeypatch):
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)
    images = np.random.default_rng(1).uniform(0.5, 1.0, size=(20, 28, 28))
    padded = load_data(npz(arrays(images)), image_size=32).test.tensors[0]
    assert padded.shape == (6, 1, 32, 32)
    assert torch.equal(padded[:, 0, 2:30, 2:30], torch.from_numpy(images[:6].astype(np.float32)))
    assert (padded == 0).sum() == 6 * (32 * 32 - 28 * 28)


def test_padding_comes_before_standardising():
    train = load_data("digits", image_size=12).train.tensors[0]
    assert abs(train.double().mean().item()) < 1e-6
    border = train[:, :, :2]
    assert torch.equal(border, border.flatten()[0].expand_as(border))
    assert border.flatten()[0] < -0.4


def test_odd_padding_goes_to_the_bottom_and_the_right(npz, monkeypatch):
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)
    padded = load_data(npz(arrays(np.ones((20, 5, 7)))), image_size=8).test.tensors[0][0, 0]
    rows_filled = padded.any(dim=1).nonzero().squeeze(1).tolist()
    columns_filled = padded.any(dim=0).nonzero().squeeze(1).tolist()
    assert rows_filled == [1, 2, 3, 4, 5]
    assert columns_filled == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("size", "antialias"), [(17, False), (4, True)])
def test_other_sizes_are_interpolated(monkeypatch, size, antialias):
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)
    original = load_data("digits").test.tensors[0]
    expected = F.interpolate(original, (size, size), mode="bilinear", antialias=antialias)
    assert torch.equal(load_data("digits", image_size=size).test.tensors[0], expected)


def test_eight_missing_pixels_are_still_padded(monkeypatch):
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)
    padded = load_data("digits", image_size=16).test.tensors[0]
    assert torch.equal(padded, F.pad(load_data("digits").test.tensors[0], (4, 4, 4, 4)))


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
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", ">f8"])
def test_npz_layouts(npz, monkeypatch, stored, expected, dtype):
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)
    inputs = np.random.default_rng(1).integers(0, 256, size=stored).astype(dtype)
    dataset = load_data(npz(arrays(inputs)))
    assert dataset.input_shape == expected
    assert dataset.num_classes == 2
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


def replaced(**changes):
    return {**arrays(), **changes}


@pytest.mark.parametrize(
    ("contents", "fragments"),
    [
        ({"x_train": np.ones((2, 2))}, ["lacks y_train, x_test, y_test"]),
        (replaced(y_train=np.arange(19) % 2), ["x_train has 20", "y_train has 19"]),
        (replaced(y_test=np.arange(7) % 2), ["x_test has 6", "y_test has 7"]),
        (replaced(x_train=np.ones((0, 5))), ["x_train", "(0, 5)", "empty"]),
        (replaced(x_test=np.ones((6, 0))), ["x_test", "(6, 0)", "empty"]),
        (replaced(y_test=np.zeros(0, int)), ["y_test", "empty"]),
        (replaced(x_test=np.ones((6, 4))), ["x_test", "(4,)", "(5,)"]),
        (replaced(x_train=np.full((20, 5), np.nan)), ["x_train has 100 values", "finite"]),
        (replaced(x_test=np.full((6, 5), np.inf)), ["x_test has 30 values", "finite"]),
        (replaced(x_test=np.full((6, 5), 1e300)), ["x_test has 30 values", "finite"]),
        (replaced(x_train=np.ones(20)), ["x_train", "(20,)", "(N, F)"]),
        (replaced(x_train=np.ones((20, 1, 1, 1, 5))), ["x_train", "(20, 1, 1, 1, 5)"]),
        (replaced(x_train=np.ones((20, 3, 4, 4))), ["x_train", "(20, 3, 4, 4)", "channels"]),
        (replaced(x_train=np.ones((20, 5), np.int32)), ["x_train", "int32", "uint8"]),
        (replaced(x_train=np.ones((20, 5), complex)), ["x_train", "complex128"]),
        (replaced(x_train=np.full((20, 5), "a")), ["x_train", "<U1"]),
        (replaced(x_train=np.ones((20, 5), np.uint8)), ["x_test", "float64", "uint8"]),
        (replaced(y_train=np.arange(20) % 2 + 0.0), ["y_train", "float64", "integers"]),
        (replaced(y_train=np.arange(20) % 2 == 0), ["y_train", "bool", "integers"]),
        (replaced(y_train=np.ones((20, 1), int)), ["y_train", "(20, 1)", "(N,)"]),
        (replaced(y_train=np.arange(20) % 2 + 1), ["y_train", "from 1 to 2"]),
        (replaced(y_train=np.arange(20) % 2 - 1), ["y_train", "from -1 to 0"]),
        (replaced(y_train=np.arange(20) % 2 * 2), ["y_train has 2 different labels from 0 to 2"]),
        (replaced(y_train=np.zeros(20, int)), ["y_train", "at least 2 classes"]),
        (replaced(y_test=np.arange(6) % 3), ["y_test", "from 0 to 2", "0 to 1"]),
        (replaced(y_test=-(np.arange(6) % 2)), ["y_test", "from -1 to 0", "0 to 1"]),
        (replaced(y_train=np.arange(20, dtype=object)), ["some.npz", "pickle"]),
    ],
)
def test_bad_npz_contents(npz, contents, fragments):
    refused(*fragments, name=npz(contents))


def test_pickles_in_npz_are_not_run(npz, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = npz(replaced(x_train=np.array([Bomb()], dtype=object)))
    refused("pickle", name=path)
    assert not (tmp_path / "exploded").exists()


def test_missing_npz(tmp_path):
    refused("absent.npz", "no such file", name=str(tmp_path / "absent.npz"))


@pytest.mark.parametrize("length", [0, 1, 10, 100, 500, 1000, -1, -30])
def test_truncated_npz(npz, length):
    path = Path(npz(arrays()))
    path.write_bytes(path.read_bytes()[:length])
    refused("some.npz", name=str(path))


def test_altered_npz(npz):
    path = Path(npz(arrays()))
    whole = path.read_bytes()
    middle = whole.index(b"\x93NUMPY") + 200
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    refused("some.npz", "CRC", name=str(path))


def test_one_array_is_no_npz(tmp_path):
    path = tmp_path / "some.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refused("some.npz", "one array", name=str(path))


# image folders


def write_image(path, pixels, mode=None):
    image_module = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image_module.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)


def write_class(folder, count, *, level, shape=(6, 7), offset=0):
    """Images of one class, each its own grey level from `level` on."""
    for index in range(count):
        write_image(folder / f"{offset + index:03d}.png", np.full(shape, level + index, np.uint8))


@pytest.fixture
def unscaled(monkeypatch):
    """Pixels in [0, 1], not standardised."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(pyro_bmrs.data, "_channel_statistics", no_statistics)


def grey_levels(part):
    return (part.tensors[0][:, 0, 0, 0] * 255).round().int().tolist()


def test_class_folders(tmp_path, unscaled):
    write_class(tmp_path / "cat", 10, level=0)
    write_class(tmp_path / "dog", 20, level=100)
    first, second = (load_data(str(tmp_path), seed=seed) for seed in (0, 1))
    assert first.input_shape == (1, 6, 7)
    assert first.num_classes == 2
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
    refused("image_size", "(6, 7)", "(30, 40)", name=str(tmp_path))
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
        (["cat/0.png", "cat/1.png"], ["1 class folder", "at least 2"]),
        (["cat/0.png", "cat/1.png", "dog/0.png"], ["only one image: dog"]),
        (["cat/0.png", "dog/notes.txt"], ["dog"]),
        (["train/cat/0.png", "train/dog/0.png"], ["only one of train/ and test/"]),
        (["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"], ["a, b", "a, c", "the same"]),
    ],
)
def test_bad_folders(tmp_path, files, fragments):
    pytest.importorskip("torchvision")
    for file in files:
        path = tmp_path / file
        if path.suffix == ".png":
            write_image(path, np.zeros((6, 7), np.uint8))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("no image")
    refused(str(tmp_path), *fragments, name=str(tmp_path))


def test_broken_image_is_named(tmp_path):
    pytest.importorskip("torchvision")
    for name in ("cat", "dog"):
        write_class(tmp_path / name, 3, level=0)
    broken = tmp_path / "dog" / "001.png"
    broken.write_bytes(broken.read_bytes()[:40])
    refused(str(broken), "no readable image", name=str(tmp_path))


def test_deep_pixels_are_refused_not_clipped(tmp_path):
    pytest.importorskip("torchvision")
    for name in ("cat", "dog"):
        write_class(tmp_path / name, 3, level=0)
    write_image(tmp_path / "dog" / "001.png", np.full((6, 7), 40000, np.uint16))
    refused("001.png", "8 bits", name=str(tmp_path))


# arguments


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (
            {"name": "digit"},
            ["'digit'", "'digits'", "'mnist'", "'fashion-mnist'", "'cifar10'", ".npz", "folder"],
        ),
        ({"name": ""}, ["name is ''", "'digits'"]),
        ({"name": None}, ["name is None", "'digits'"]),
        ({"validation_fraction": 0.0}, ["validation_fraction is 0.0", "between 0 and 1"]),
        ({"validation_fraction": 1}, ["validation_fraction is 1", "between 0 and 1"]),
        ({"validation_fraction": float("nan")}, ["validation_fraction is nan"]),
        ({"validation_fraction": "0.2"}, ["validation_fraction is '0.2'"]),
        ({"validation_fraction": 1e-9}, ["validation_fraction", "1438", "at least 1"]),
        ({"validation_fraction": 0.9, "limit": 2}, ["validation_fraction", "0 to train"]),
        ({"image_size": 0}, ["image_size is 0", "at least 1"]),
        ({"image_size": 8.0}, ["image_size is 8.0"]),
        ({"limit": 1}, ["limit is 1", "at least 2"]),
        ({"limit": -5}, ["limit is -5"]),
        ({"seed": -1}, ["seed is -1", "at least 0"]),
        ({"seed": 2**64}, ["seed is"]),
        ({"seed": True}, ["seed is True"]),
    ],
)
def test_bad_arguments(call, fragments):
    refused(*fragments, **{"name": "digits", **call})


def test_vectors_take_no_image_size(npz):
    refused("image_size is 8", "vectors", name=npz(arrays()), image_size=8)


def test_numpy_integers_are_integers():
    dataset = load_data("digits", seed=np.int64(3), limit=np.int64(10))
    assert torch.equal(dataset.train.tensors[0], load_data("digits", seed=3, limit=10).train.tensors[0])


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)


# torchvision


def test_missing_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(load_data("digits").test) == 359
    refused("pip install 'pyro-bmrs[vision]'", name="mnist", data_root=tmp_path)
    (tmp_path / "cat").mkdir()
    refused("pip install 'pyro-bmrs[vision]'", name=str(tmp_path))


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
    assert [len(part) for part in parts(dataset)] == [24, 6, 10]
    assert dataset.input_shape == (1, 28, 28)
    assert fake_mnist.calls == [(tmp_path, True, False), (tmp_path, True, True), (tmp_path, False, False)]
    fake_mnist.calls.clear()
    load_data("mnist", data_root=tmp_path)
    assert fake_mnist.calls == [(tmp_path, True, False), (tmp_path, False, False)]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("Error downloading train")])
def test_failed_download_says_where_it_looked(fake_mnist, tmp_path, error):
    def fail(root):
        raise error

    fake_mnist.download = staticmethod(fail)
    refused(
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
    refused("'mnist'", f"not whole under {tmp_path}", name="mnist", data_root=tmp_path)


def test_unreadable_files_are_not_downloaded_over(fake_mnist, tmp_path, monkeypatch):
    # torchvision checks some of what it reads by bare assertions.
    def fail(self, root, train, download):
        assert not download
        raise AssertionError

    monkeypatch.setattr(fake_mnist, "__init__", fail)
    refused(f"under {tmp_path} are unreadable (AssertionError)", name="mnist", data_root=tmp_path)


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
    assert dataset.num_classes == 10
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


# prepare


def prepared_equals_loaded(dataset, raw_train, raw_test, *, seed=0):
    """prepare() of the raw arrays is bit for bit what load_data made of them."""
    before = raw_train.copy()
    prepared = dataset.prepare(raw_train)
    assert np.array_equal(raw_train, before)
    assert prepared.dtype == torch.float32
    assert prepared.is_contiguous()
    order = torch.randperm(len(raw_train), generator=torch.Generator().manual_seed(seed))
    loaded = torch.cat([dataset.train.tensors[0], dataset.validation.tensors[0]])
    assert torch.equal(prepared[order], loaded)
    assert torch.equal(dataset.prepare(raw_test), dataset.test.tensors[0])


@pytest.mark.parametrize("image_size", [None, 12, 17, 4])
def test_prepare_digits(image_size):
    dataset = load_data("digits", image_size=image_size)
    assert dataset.image_size == image_size
    digits = load_digits()
    prepared = dataset.prepare(digits.images)
    loaded = [rows(part) for part in parts(dataset)]
    label_of = dict(zip([row.numpy().tobytes() for row in prepared], digits.target.tolist(), strict=True))
    assert sorted(row.numpy().tobytes() for row in prepared) == sorted(
        row for examples in loaded for row in examples
    )
    for part, examples in zip(parts(dataset), loaded, strict=True):
        assert [label_of[row] for row in examples] == part.tensors[1].tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64])
def test_digits_may_be_any_numbers(dtype):
    dataset = load_data("digits", limit=50)
    images = load_digits().images
    assert torch.equal(dataset.prepare(images.astype(dtype)), dataset.prepare(images))


@pytest.mark.parametrize("stored", [(20, 6, 7), (20, 6, 7, 1), (20, 6, 7, 3), (20, 3, 6, 7), (20, 2, 6, 7)])
@pytest.mark.parametrize(
    ("dtype", "image_size"), [("uint8", None), ("uint8", 9), (">f8", None), ("float32", 5)]
)
def test_prepare_npz_images(npz, stored, dtype, image_size):
    inputs = np.random.default_rng(1).integers(0, 256, size=stored).astype(dtype)
    contents = arrays(inputs)
    dataset = load_data(npz(contents), image_size=image_size, seed=4)
    prepared_equals_loaded(dataset, inputs, contents["x_test"], seed=4)
    tensors = torch.from_numpy(inputs.astype(inputs.dtype.newbyteorder("=")))
    assert torch.equal(dataset.prepare(tensors), dataset.prepare(inputs))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float64"])
def test_prepare_npz_vectors(npz, dtype):
    inputs = (np.random.default_rng(1).normal(size=(20, 5)) * 40 + 120).astype(dtype)
    contents = arrays(inputs)
    dataset = load_data(npz(contents))
    assert dataset.image_size is None
    assert dataset.mean.shape == dataset.deviation.shape == (1, 5)
    prepared_equals_loaded(dataset, inputs, contents["x_test"])


def test_statistics_are_the_training_part_s_after_scaling(npz):
    inputs = np.random.default_rng(1).integers(0, 256, size=(20, 6, 7, 3), dtype=np.uint8)
    dataset = load_data(npz(arrays(inputs)))
    assert dataset.mean.shape == dataset.deviation.shape == (1, 3, 1, 1)
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:16].numpy()
    part = inputs[chosen] / 255
    np.testing.assert_allclose(dataset.mean.flatten(), part.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(dataset.deviation.flatten(), part.std((0, 1, 2)), rtol=1e-5)


def test_prepare_takes_images_in_every_layout(npz):
    inputs = np.random.default_rng(1).integers(0, 256, size=(20, 6, 7), dtype=np.uint8)
    dataset = load_data(npz(arrays(inputs)))
    expected = dataset.prepare(inputs)
    assert torch.equal(dataset.prepare(inputs[:, None]), expected)
    assert torch.equal(dataset.prepare(inputs[..., None]), expected)
    assert torch.equal(dataset.prepare(inputs[:1]), expected[:1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_prepare_leaves_its_argument_alone(npz, dtype):
    inputs = np.random.default_rng(1).integers(0, 256, size=(20, 5)).astype(dtype)
    dataset = load_data(npz(arrays(inputs)))
    inputs.flags.writeable = False
    dataset.prepare(inputs)
    dataset.prepare(inputs[::-1])
    tensor = torch.from_numpy(inputs.copy())
    kept = tensor.clone()
    dataset.prepare(tensor)
    assert torch.equal(tensor, kept)


def test_prepare_takes_tensors_of_models(npz):
    inputs = np.random.default_rng(1).integers(0, 9, size=(20, 5)).astype(np.float32)
    dataset = load_data(npz(arrays(inputs)))
    expected = dataset.prepare(inputs)
    assert torch.equal(dataset.prepare(torch.from_numpy(inputs).requires_grad_()), expected)
    assert torch.equal(dataset.prepare(torch.from_numpy(inputs).bfloat16()), expected)


@pytest.mark.parametrize("image_size", [None, 8])
def test_prepare_for_image_folders(tmp_path, image_size):
    pytest.importorskip("torchvision")
    images = np.random.default_rng(1).integers(0, 256, size=(20, 6, 12, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        write_image(tmp_path / "ab"[index % 2] / f"{index:03d}.png", image)
    dataset = load_data(str(tmp_path), image_size=image_size)
    prepared = dataset.prepare(images)
    assert prepared.shape[1:] == dataset.input_shape
    loaded = torch.cat([part.tensors[0] for part in parts(dataset)]).flatten(1)
    distances = torch.cdist(
        prepared.flatten(1).double(), loaded.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert distances.min(dim=1).values.max() < 1e-4
    assert len(distances.argmin(dim=1).unique()) == 20
    if image_size is None:
        refused_inputs(dataset, images[:, :5], "(N, 6, 12, 3)")
    else:
        assert dataset.prepare(images[:, :5]).shape == (20, 3, 8, 8)
        refused_inputs(dataset, images[..., :2], "(N, H, W, 3)", "(N, 3, H, W)")


@pytest.mark.parametrize("name", [pytest.param("mnist", marks=needs("MNIST"))])
@pytest.mark.parametrize("image_size", [None, 32])
def test_prepare_mnist(name, image_size):
    datasets = pytest.importorskip("torchvision.datasets")
    train, test = (datasets.MNIST(REAL_ROOT, train=train).data.numpy() for train in (True, False))
    dataset = load_data(name, data_root=REAL_ROOT, image_size=image_size, seed=2)
    prepared_equals_loaded(dataset, train, test, seed=2)


def refused_inputs(dataset, inputs, *fragments):
    with pytest.raises(DataError) as caught:
        dataset.prepare(inputs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("inputs ")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("inputs", "fragments"),
    [
        (np.zeros((3, 8, 9)), ["(3, 8, 9)", "(N, 8, 8)", "(N, 8, 8, 1)", "(N, 1, 8, 8)"]),
        (np.zeros((8, 8)), ["(8, 8)", "(N, 8, 8)"]),
        (np.zeros((3, 64)), ["(3, 64)", "(N, 8, 8)"]),
        (np.zeros((3, 3, 8, 8)), ["(3, 3, 8, 8)"]),
        (np.zeros((3, 8, 8, 1, 1)), ["(3, 8, 8, 1, 1)"]),
        (np.zeros(()), ["shape ()"]),
        (np.zeros((0, 8, 8)), ["(0, 8, 8)", "N at least 1"]),
        (np.full((3, 8, 8), 17), ["17", "from 0 to 16"]),
        (np.full((3, 8, 8), -0.5), ["-0.5", "from 0 to 16"]),
        (np.full((3, 8, 8), np.nan), ["nan", "from 0 to 16"]),
        (np.zeros((3, 8, 8), bool), ["bool", "numbers from 0 to 16"]),
        (np.zeros((3, 8, 8), object), ["object", "numbers from 0 to 16"]),
        (np.zeros((3, 8, 8), complex), ["complex128"]),
        ([[0.0] * 8] * 8, ["list", "NumPy array or a tensor"]),
        (None, ["NoneType", "NumPy array or a tensor"]),
        (torch.zeros(3, 8, 8, device="meta"), ["meta"]),
    ],
)
def test_bad_inputs_for_digits(inputs, fragments):
    refused_inputs(load_data("digits", limit=20), inputs, *fragments)


def test_bad_inputs_for_npz(npz):
    dataset = load_data(
        npz(arrays(np.random.default_rng(1).integers(0, 256, size=(20, 6, 7, 3), dtype=np.uint8)))
    )
    good = np.zeros((2, 6, 7, 3), np.uint8)
    refused_inputs(dataset, good / 255, "float64", "uint8", "(N, 6, 7, 3) or (N, 3, 6, 7)")
    refused_inputs(dataset, good.astype(np.int64), "int64", "uint8")
    refused_inputs(dataset, good[..., 0], "(2, 6, 7)", "(N, 6, 7, 3)")
    refused_inputs(dataset, good[..., :1], "(2, 6, 7, 1)")
    vectors = load_data(npz(arrays()))
    refused_inputs(vectors, np.zeros((3, 5), np.uint8), "uint8", "floating point", "(N, 5)")
    refused_inputs(vectors, np.zeros((3, 4)), "(3, 4)", "(N, 5)")
    refused_inputs(vectors, np.full((3, 5), np.inf), "15 values", "finite")
    refused_inputs(vectors, np.full((3, 5), 1e300), "15 values", "finite")


# read_inputs


@pytest.fixture
def saved(tmp_path):
    def write(file, **contents):
        path = tmp_path / file
        if path.suffix == ".npz":
            np.savez(path, **contents)
        else:
            np.save(path, **contents)
        return path

    return write


def unreadable(path, *fragments):
    with pytest.raises(DataError) as caught:
        read_inputs(path)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in (Path(path).name, *fragments):
        assert fragment in message


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8"])
def test_read_inputs(saved, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    for path in (saved("new.npy", arr=array), saved("new.npz", x=array, y=np.ones(2))):
        for given in (path, str(path)):
            read = read_inputs(given)
            assert read.dtype == array.dtype
            assert np.array_equal(read, array)


@pytest.mark.parametrize(
    ("array", "fragments"),
    [
        (np.zeros((0, 4)), ["(0, 4)", "empty"]),
        (np.array([1.0, np.nan, np.inf]), ["2 values", "finite"]),
        (np.array(["a"]), ["<U1", "integers or floating point"]),
        (np.array([True]), ["bool"]),
        (np.array([1j]), ["complex128"]),
        (np.array([{}], dtype=object), ["without pickles"]),
    ],
)
def test_unusable_inputs(saved, array, fragments):
    unreadable(saved("new.npy", arr=array), *fragments)
    unreadable(saved("new.npz", x=array), *fragments)


def test_unreadable_inputs(saved, tmp_path):
    unreadable(tmp_path / "absent.npy", "no such file")
    unreadable(tmp_path, "no such file")
    unreadable(saved("new.npz", inputs=np.ones(3)), "holds 'inputs'", "key 'x'")
    unreadable(saved("new.npz"), "holds nothing", "key 'x'")
    (tmp_path / "text.npy").write_text("1, 2, 3")
    unreadable(tmp_path / "text.npy", "whole .npy file")


@pytest.mark.parametrize("length", [0, 1, 7, 60, 130, -1])
def test_truncated_inputs(saved, length):
    for path in (saved("new.npy", arr=np.ones((9, 9))), saved("new.npz", x=np.ones((9, 9)))):
        path.write_bytes(path.read_bytes()[:length])
        unreadable(path, "whole .npy file")


def test_pickled_inputs_are_not_run(tmp_path, saved):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    bomb = np.array([Bomb()], dtype=object)
    unreadable(saved("new.npy", arr=bomb), "without pickles")
    unreadable(saved("new.npz", x=bomb), "without pickles")
    assert not (tmp_path / "exploded").exists()


def test_public_names():
    assert pyro_bmrs.data.__all__ == ["DataError", "Dataset", "load_data", "read_inputs"]
    assert Dataset.__dataclass_params__.frozen


def test_patches_are_squares_of_two_photographs():
    patches = load_data("patches")
    assert (patches.input_shape, patches.num_classes) == ((1, 8, 8), 2)
    parts = (patches.train, patches.validation, patches.test)
    assert sum(map(len, parts)) == 2 * (427 // 8) * (640 // 8)
    assert patches.form.values == "bytes"


def test_foreign_inputs_are_shown_as_ones_own_would_be():
    digits, patches = load_data("digits"), load_data("patches")
    shown = digits.foreign(patches)
    raw = patches.test.tensors[0] * patches.deviation + patches.mean  # in [0, 1]
    torch.testing.assert_close(shown * digits.deviation + digits.mean, raw)


def test_foreign_inputs_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"other is patches.* must have inputs of shape \(1, 12, 12\)"):
        load_data("digits", image_size=12).foreign(load_data("patches"))


def test_what_can_be_read_without_a_download(tmp_path):
    assert is_at_hand("digits")
    assert is_at_hand("patches", tmp_path)
    assert not is_at_hand("mnist", tmp_path)
    assert not is_at_hand("a/path.npz", tmp_path)
