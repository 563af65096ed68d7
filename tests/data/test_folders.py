"""Folders of images as people have them: hidden files, parts under several names, pictures that are turned."""

import os

import numpy as np
import pytest
import torch
from data_files import not_loaded, parts, refused, write_image
from PIL import Image

from pyro_bmrs.data import load_data
from pyro_bmrs.data.folders import image_files, read_image


def grey(folder, *levels, shape=(6, 7), suffix=".png"):
    for level in levels:
        write_image(folder / f"{level:03d}{suffix}", np.full(shape, level, np.uint8))


def levels(part):
    return sorted((part.tensors[0][:, 0, 0, 0] * 255).round().int().tolist())


def everything(dataset):
    return sorted(level for part in parts(dataset) for level in levels(part))


def test_hidden_names_are_passed_over_at_all_levels(tmp_path, unscaled):
    """Notebooks, file managers and archives leave copies of images beside them."""
    grey(tmp_path / "cat", *range(10))
    grey(tmp_path / "dog", *range(100, 110))
    grey(tmp_path / ".ipynb_checkpoints", 200, 201)
    grey(tmp_path / "__MACOSX" / "cat", 202)
    grey(tmp_path / "cat" / ".ipynb_checkpoints", 203)
    grey(tmp_path / "cat" / "@eaDir", 204)
    grey(tmp_path / "dog" / "kennel", 110)  # not hidden
    grey(tmp_path / "dog" / "kennel" / ".trash", 205)
    (tmp_path / "cat" / "._000.png").write_bytes(b"\0\5\26\7")  # a resource fork, no image
    (tmp_path / "cat" / "Thumbs.db").touch()
    (tmp_path / "cat" / ".DS_Store").touch()
    (tmp_path / "README.md").touch()
    dataset = load_data(str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert everything(dataset) == [*range(10), *range(100, 111)]


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_a_validation_part_is_used(tmp_path, unscaled, validation, train):
    for part, low in ((train, 0), (validation, 50), ("test", 100)):
        grey(tmp_path / part / "cat", *range(low, low + 5))
        grey(tmp_path / part / "dog", *range(low + 10, low + 15))
        grey(tmp_path / part / ".ipynb_checkpoints", 200)
    dataset = load_data(str(tmp_path))
    for part, low in zip(parts(dataset), (0, 50, 100), strict=True):
        assert levels(part) == [*range(low, low + 5), *range(low + 10, low + 15)]
        assert torch.bincount(part.tensors[1]).tolist() == [5, 5]
    # only the training part has a limit
    assert [len(part) for part in parts(load_data(str(tmp_path), limit=4))] == [4, 10, 10]


def test_a_validation_part_without_a_test_part(tmp_path, unscaled):
    """The test part is of the training part, for every seed the same: `val/` is what choices are made on."""
    for part, low in (("train", 0), ("val", 100)):
        grey(tmp_path / part / "cat", *range(low, low + 10))
        grey(tmp_path / part / "dog", *range(low + 20, low + 30))
    first, second = (load_data(str(tmp_path), seed=seed) for seed in (0, 1))
    assert levels(first.validation) == [*range(100, 110), *range(120, 130)]
    assert levels(first.test) == levels(second.test)
    assert torch.bincount(first.test.tensors[1]).tolist() == [2, 2]
    assert sorted(levels(first.train) + levels(first.test)) == [*range(10), *range(20, 30)]


@pytest.mark.parametrize(
    ("folders", "fragments"),
    [
        (["val", "test"], ["of train/, val/ and test/", "test/, val/ alone"]),
        (["Train"], ["train/ and test/ both", "Train/ alone"]),
        (["train", "val", "valid", "test"], ["one part for validation", "/val and ", "/valid"]),
        (["train", "Train", "test"], ["one part for train"]),
    ],
)
def test_parts_that_are_missing_or_twice_there_are_named(tmp_path, folders, fragments):
    for folder in folders:
        grey(tmp_path / folder / "cat", 1, 2)
        grey(tmp_path / folder / "dog", 1, 2)
    not_loaded(*fragments, name=str(tmp_path))


def test_a_folder_beside_the_parts_is_not_left_out_without_a_word(tmp_path):
    for folder in ("train", "test", "dev"):
        grey(tmp_path / folder / "cat", 1, 2, 3)
        grey(tmp_path / folder / "dog", 1, 2, 3)
    with pytest.warns(UserWarning, match="read are test, train, not dev$"):
        load_data(str(tmp_path))


def test_an_empty_class_folder_is_named(tmp_path):
    grey(tmp_path / "cat", 1, 2)
    grey(tmp_path / "dog" / ".hidden", 1, 2)
    (tmp_path / "owl").mkdir()
    not_loaded("without an image in dog, owl", name=str(tmp_path))


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    grey(tmp_path / "cat", 1, 2)
    grey(tmp_path / "dog", 1, 2)
    (tmp_path / "dog" / "lost.png").symlink_to(tmp_path / "gone.png")
    not_loaded("lost.png", "No such file", name=str(tmp_path))


def test_links_are_followed_and_do_not_double_images(tmp_path, unscaled):
    grey(tmp_path / "set" / "cat", *range(5))
    grey(tmp_path / "elsewhere", *range(100, 105))
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "dog")
    os.symlink(tmp_path / "set" / "cat", tmp_path / "set" / "cat" / "again")
    assert everything(load_data(str(tmp_path / "set"))) == [*range(5), *range(100, 105)]


# images


def corners(image):
    """The four corners, as viewers show them: from the top left, clockwise."""
    return [int(image[0, row, column]) for row, column in ((0, 0), (0, -1), (-1, -1), (-1, 0))]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_are_turned_as_viewers_show_them(tmp_path, orientation, suffix):
    """A camera stores the sensor's rows and how it was held."""
    shown = Image.fromarray(np.kron([[0, 80], [240, 160]], np.ones((16, 24))).astype(np.uint8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = shown.transpose(undo[orientation]) if orientation in undo else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if suffix != "png" else {}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape[1:] == (32, 48)
    assert np.abs(np.array(corners(image)) - [0, 80, 160, 240]).max() < 4


def test_kinds_of_images(tmp_path):
    colours = np.zeros((6, 7, 3), np.uint8)
    colours[..., 0], colours[..., 2] = 200, 40
    picture = Image.fromarray(colours)
    picture.save(tmp_path / "RGB.PNG")
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    picture.convert("RGBA").save(tmp_path / "transparent.webp", lossless=True)
    picture.save(
        tmp_path / "moving.GIF",
        save_all=True,
        append_images=[Image.new("RGB", (7, 6), "white")] * 2,
        duration=100,
    )
    picture.save(tmp_path / "photo.JFIF", "jpeg", quality=100)
    files = image_files(tmp_path)
    assert len(files) == 6
    for file in files:
        image = read_image(file)
        assert image.shape == (3, 6, 7), file
        assert (image.float().mean((1, 2)) - torch.tensor([200.0, 0, 40])).abs().max() < 4, file
        assert read_image(file, "L").shape == (1, 6, 7)
    picture.convert("L").convert("1").save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png").shape == (1, 6, 7)


def test_images_that_pillow_does_not_know_are_named_not_left_out(tmp_path):
    grey(tmp_path / "cat", 1, 2)
    grey(tmp_path / "dog", 1, 2)
    (tmp_path / "dog" / "from_a_phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" * 9)
    not_loaded("from_a_phone.HEIC", "cannot identify image file", name=str(tmp_path))


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_more_than_8_bits_are_refused(tmp_path, mode):
    Image.fromarray(np.full((6, 7), 3.0)).convert("F").convert(mode).save(tmp_path / "deep.tif")
    refused(lambda: read_image(tmp_path / "deep.tif"), "8 bits a channel", "deep.tif", "its mode is")


# folders to predict on


def test_a_folder_is_prepared_as_its_images_were(tmp_path):
    for name, low in (("cat", 0), ("dog", 100)):
        for index in range(6):
            write_image(tmp_path / name / f"{index}.png", np.full((20 + index, 30, 3), low + index, np.uint8))
    dataset = load_data(str(tmp_path), image_size=8)
    grey(tmp_path / "dog" / ".hidden", 1)
    inputs, files = dataset.preparation.read(tmp_path)
    assert files == [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(6)]
    rows = {row.numpy().tobytes() for part in parts(dataset) for row in part.tensors[0]}
    assert {row.numpy().tobytes() for row in inputs} == rows
    flat, names = dataset.preparation.read(tmp_path / "cat")
    assert names == [f"{index}.png" for index in range(6)]
    assert torch.equal(flat, inputs[:6])
    grey(tmp_path / "new", 7, shape=(9, 9))  # grey, for a network of colours
    (shade,) = dataset.preparation.read(tmp_path / "new")[0]
    assert torch.equal(shade, dataset.prepare(np.full((1, 9, 9, 3), 7, np.uint8))[0])


def test_folders_that_can_not_be_predicted_on(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, low in (("cat", 0), ("dog", 100)):
        grey(tmp_path / "set" / name, *range(low, low + 5))
    preparation = load_data(str(tmp_path / "set")).preparation
    refused(lambda: preparation.read(tmp_path / "empty"), "a folder with images in it", "empty")
    grey(tmp_path / "large", 5, shape=(60, 70))
    refused(lambda: preparation.read(tmp_path / "large"), "large/005.png", "(N, 6, 7)")
    digits = load_data("digits", limit=20).preparation
    refused(lambda: digits.read(tmp_path / "set"), ".npy or .npz file of numbers from 0 to 16", "set")
