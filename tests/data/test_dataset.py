"""A data set is split, sized and standardised, and new inputs are brought to the same form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_files import arrays, bytes_of, not_loaded, parts, prepared_equals_loaded, refused, write_image
from sklearn.datasets import load_digits

from pyro_bmrs.data import load_data

# splitting


def test_same_seed_same_split_other_seed_other_split():
    first, again, other = (load_data("digits", seed=seed) for seed in (3, np.int64(3), 4))
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


@pytest.mark.parametrize(("fraction", "expected"), [(0.2, 288), (0.5, 719), (0.1, 144)])
def test_validation_fraction(fraction, expected):
    dataset = load_data("digits", validation_fraction=fraction)
    assert [len(part) for part in parts(dataset)] == [1438 - expected, expected, 359]


def test_limit_keeps_a_share_of_each_class_before_the_split():
    limited = load_data("digits", limit=np.int64(100))
    assert [len(part) for part in parts(limited)] == [80, 20, 359]
    labels = torch.cat([limited.train.tensors[1], limited.validation.tensors[1]])
    assert torch.bincount(labels).sub(10).abs().max() <= 1
    assert torch.bincount(limited.validation.tensors[1]).tolist() == [2] * 10
    assert [len(part) for part in parts(load_data("digits", limit=10**6))] == [1150, 288, 359]


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        ({"name": ""}, ["name must be 'digits'", "got ''"]),
        ({"name": None}, ["name must be 'digits'", "got None"]),
        ({"validation_fraction": 0.0}, ["validation_fraction must be strictly between 0 and 1: got 0.0"]),
        ({"validation_fraction": 1}, ["got 1"]),
        ({"validation_fraction": float("nan")}, ["got nan"]),
        ({"validation_fraction": "0.2"}, ["got '0.2'"]),
        ({"validation_fraction": 1e-9}, ["validation_fraction", "1438", "1 or more"]),
        ({"validation_fraction": 0.99, "limit": 20}, ["validation_fraction", "not 0 and 20"]),
        (
            {"validation_fraction": 0.6, "limit": 20},
            ["1 or more of each class", "of 8 there would be none for 8, 0"],
        ),
        ({"limit": 9}, ["limit must be at least 10, one for each class; else it leaves out 8: got 9"]),
        ({"image_size": 0}, ["image_size must be an integer of at least 1", "got 0"]),
        ({"image_size": 8.0}, ["got 8.0"]),
        ({"limit": 1}, ["limit must be an integer of at least 2", "got 1"]),
        ({"seed": -1}, ["seed must be an integer of at least 0", "got -1"]),
        ({"seed": 2**64}, ["seed", "below 2**63"]),
        ({"seed": True}, ["seed", "got True"]),
    ],
)
def test_bad_arguments(call, fragments):
    not_loaded(*fragments, **{"name": "digits", **call})


def labelled(npz, *counts, **contents):
    """Vectors with as many examples of each class; classes are shuffled."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    inputs = np.arange(len(labels) * 2.0).reshape(-1, 2)
    return npz({**arrays(inputs, labels, test_inputs=inputs[:3], test_labels=labels[:3]), **contents})


def test_a_rare_class_is_in_both_parts_at_every_seed(npz):
    """A random split leaves a class of 2 out of validation in most seeds, and out of training in some."""
    file = labelled(npz, 100, 60, 2)
    for seed in range(50):
        dataset = load_data(file, seed=seed)
        counts = [torch.bincount(part.tensors[1], minlength=3).tolist() for part in parts(dataset)[:2]]
        assert counts == [[81, 48, 1], [19, 12, 1]]


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ((5, 5, 5, 5), 0.2, [1, 1, 1, 1]),
        ((7, 7, 6), 0.1, [1, 1, 1]),  # 2 would leave a class out
        ((3, 3, 90), 0.5, [1, 1, 46]),
        ((2, 2, 2), 0.5, [1, 1, 1]),
        ((4, 8), 0.75, [3, 6]),
    ],
)
def test_each_class_has_its_share_of_validation(npz, counts, fraction, expected):
    dataset = load_data(labelled(npz, *counts), validation_fraction=fraction)
    found = torch.bincount(dataset.validation.tensors[1], minlength=len(counts))
    assert (found - torch.tensor(expected)).abs().max() <= (1 if counts == (3, 3, 90) else 0)
    assert found.sum() == sum(expected)
    rows = torch.cat([part.tensors[0] for part in parts(dataset)[:2]])
    assert len(rows.unique(dim=0)) == sum(counts)


def test_a_class_that_would_be_missing_is_named(npz):
    file = labelled(npz, 30, 1, 1, class_names=np.array(["cat", "lynx", "puma"]))
    with pytest.warns(UserWarning, match="no example to validate on for lynx, puma: a class needs 2"):
        dataset = load_data(file)
    assert torch.bincount(dataset.train.tensors[1]).tolist() == [24, 1, 1]
    not_loaded("limit must be at least 3", "leaves out lynx: got 2", name=file, limit=2)
    not_loaded("validation_fraction", "none for lynx", name=file, validation_fraction=0.94)


def test_the_training_part_is_mixed():
    """Class by class it would make bad batches, and a bad example for a trace."""
    labels = load_data("digits").train.tensors[1]
    assert len(labels[:40].unique()) > 7
    assert len(load_data("digits", limit=50).train.tensors[1][:10].unique()) > 3


# standardising


@pytest.mark.parametrize(
    ("shape", "units", "offset"),
    [((40, 3), [1, 10, 100], 0), ((40, 3), 1e-12, 0), ((40, 6, 7, 3), [1, 10, 100], [0, 5, -1000])],
)
def test_each_channel_is_standardised_by_the_training_part(npz, shape, units, offset):
    inputs = np.random.default_rng(1).uniform(size=shape) * units + offset
    dataset = load_data(npz(arrays(inputs)))
    channels = [part.tensors[0].double().movedim(1, -1).reshape(-1, 3) for part in parts(dataset)]
    torch.testing.assert_close(channels[0].mean(0), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels[0].std(0, correction=0), torch.ones(3).double(), atol=1e-4, rtol=0)
    # The others are only near.
    for other in channels[1:]:
        assert 1e-4 < other.mean(0).abs().max() < 2


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 + 0.5])
def test_constant_feature_is_only_centred(npz, constant):
    vectors = np.random.default_rng(1).normal(size=(40, 3))
    vectors[:, 1] = constant
    test_vectors = vectors[:5].copy()
    test_vectors[0, 1] += 2.0
    dataset = load_data(npz(arrays(vectors, test_inputs=test_vectors)))
    assert dataset.train.tensors[0][:, 1].abs().max() <= abs(constant) * 1e-6
    assert dataset.test.tensors[0][0, 1].item() == pytest.approx(2.0, abs=abs(constant) * 1e-6 + 1e-6)


# sizing


@pytest.mark.parametrize(
    ("height", "width", "size", "rows", "columns"),
    [(28, 28, 32, slice(2, 30), slice(2, 30)), (8, 8, 16, slice(4, 12), slice(4, 12)),
     (5, 7, 8, slice(1, 6), slice(0, 7))],
)  # fmt: skip
def test_a_few_missing_pixels_are_zeros_on_all_sides(npz, unscaled, height, width, size, rows, columns):
    images = np.random.default_rng(1).uniform(0.5, 1.0, size=(20, height, width))
    padded = load_data(npz(arrays(images)), image_size=size).test.tensors[0]
    assert padded.shape == (6, 1, size, size)
    assert torch.equal(padded[:, 0, rows, columns], torch.from_numpy(images[:6].astype(np.float32)))
    assert (padded == 0).sum() == 6 * (size * size - height * width)


def test_padding_comes_before_standardising():
    train = load_data("digits", image_size=12).train.tensors[0]
    assert abs(train.double().mean().item()) < 1e-6
    border = train[:, :, :2]
    assert torch.equal(border, border.flatten()[0].expand_as(border))
    assert border.flatten()[0] < -0.4


@pytest.mark.parametrize(("size", "antialias"), [(17, False), (4, True)])
def test_other_sizes_are_interpolated(unscaled, size, antialias):
    original = load_data("digits").test.tensors[0]
    expected = F.interpolate(original, (size, size), mode="bilinear", antialias=antialias)
    assert torch.equal(load_data("digits", image_size=size).test.tensors[0], expected)


def test_vectors_take_no_image_size(npz):
    not_loaded("image_size must be left out for vectors", name=npz(arrays()), image_size=8)


# new inputs


def examples(part):
    """The bytes of each example."""
    return [row.numpy().tobytes() for row in part.tensors[0]]


@pytest.mark.parametrize("image_size", [None, 12])
def test_prepare_digits(image_size):
    dataset = load_data("digits", image_size=image_size)
    digits = load_digits()
    prepared = [row.numpy().tobytes() for row in dataset.prepare(digits.images)]
    label_of = dict(zip(prepared, digits.target.tolist(), strict=True))
    assert sorted(prepared) == sorted(row for part in parts(dataset) for row in examples(part))
    for part in parts(dataset):
        assert [label_of[row] for row in examples(part)] == part.tensors[1].tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16])
def test_digits_may_be_any_numbers(dtype):
    dataset = load_data("digits", limit=50)
    images = load_digits().images
    assert torch.equal(dataset.prepare(images.astype(dtype)), dataset.prepare(images))


@pytest.mark.parametrize(
    ("stored", "dtype", "image_size"),
    [
        ((20, 6, 7), "uint8", None),
        ((20, 6, 7, 1), ">f8", None),
        ((20, 6, 7, 3), "uint8", 9),
        ((20, 3, 6, 7), "float32", 5),
        ((20, 2, 6, 7), "uint8", 5),
        ((20, 5), "uint8", None),
        ((20, 5), "float16", None),
        ((20, 5), "float64", None),
    ],
)
def test_prepare_npz(npz, stored, dtype, image_size):
    inputs = bytes_of(*stored).astype(dtype)
    contents = arrays(inputs)
    dataset = load_data(npz(contents), image_size=image_size, seed=4)
    prepared_equals_loaded(dataset, inputs, contents["x_test"])
    tensors = torch.from_numpy(inputs.astype(inputs.dtype.newbyteorder("=")))
    assert torch.equal(dataset.prepare(tensors), dataset.prepare(inputs))


def test_prepare_takes_images_in_every_layout(npz):
    inputs = bytes_of(20, 6, 7)
    dataset = load_data(npz(arrays(inputs)))
    expected = dataset.prepare(inputs)
    assert torch.equal(dataset.prepare(inputs[:, None]), expected)
    assert torch.equal(dataset.prepare(inputs[..., None]), expected)
    assert torch.equal(dataset.prepare(inputs[:1]), expected[:1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_prepare_leaves_its_argument_alone(npz, dtype):
    inputs = bytes_of(20, 5).astype(dtype)
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
    images = bytes_of(20, 6, 12, 3)
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
        refused(lambda: dataset.prepare(images[:, :5]), "(N, 6, 12, 3)")
    else:
        assert dataset.prepare(images[:, :5]).shape == (20, 3, 8, 8)
        refused(lambda: dataset.prepare(images[..., :2]), "(N, H, W, 3)", "(N, 3, H, W)")


def test_foreign_inputs_are_shown_as_ones_own_would_be():
    digits, patches = load_data("digits"), load_data("patches")
    shown = digits.foreign(patches)
    own, theirs = digits.preparation, patches.preparation
    raw = patches.test.tensors[0] * theirs.deviation + theirs.mean  # in [0, 1]
    torch.testing.assert_close(shown * own.deviation + own.mean, raw)
    large = load_data("digits", image_size=12)
    refused(
        lambda: large.foreign(patches), "other must be a data set with inputs of shape (1, 12, 12)", "patches"
    )
