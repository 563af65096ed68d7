"""Folders of images, as people have them: a folder a class, perhaps in parts for training, validation and test."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from mimetypes import guess_type
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_bmrs.arguments import check
from pyro_bmrs.data.arrays import DataError, InputForm, one_line
from pyro_bmrs.data.split import Examples, RawData, split_test

type Resize = Callable[[Tensor], Tensor]  # (N, C, H, W) -> (N, C, size, size)

# The folders of the parts, by what people call them; upper and lower case are alike.
_PARTS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip
# What systems and archives leave beside names that start with a dot.
_HIDDEN = ("__MACOSX", "@eaDir")


def read_folder(path: Path, resize: Resize | None) -> RawData:
    """The images of a folder, as documented at `pyro_bmrs.data.load_data`.

    Args:
        path: of the folder.
        resize: applied to each image as it is read, because images may differ in size.

    Raises:
        DataError: if it is none, or an image can't be read.
    """
    folders = _parts(path)
    classes = _classes(folders["train"])
    check(
        len(classes) >= 2,
        "name",
        "a folder with one folder of images for each class, 2 or more",
        str(folders["train"]),
        DataError,
    )
    found = {part: _images(folder, classes, resize) for part, folder in folders.items()}
    # Grey images become colour where any has colour.
    channels = max(image.shape[0] for images, _ in found.values() for image in images)
    sizes = sorted({tuple(image.shape[1:]) for images, _ in found.values() for image in images})
    check(
        len(sizes) == 1, "image_size",
        f"given in pixels where images differ in height and width, as in '{path}' from {sizes[0]} to {sizes[-1]}",
        None, DataError,
    )  # fmt: skip
    # Files of any size were brought to one, so new images may have any size too.
    extents = sizes[0] if resize is None else (None, None)
    form = InputForm((channels, *extents), "bytes", "grey" if channels == 1 else "RGB")
    parts: dict[str, Examples] = {
        part: (torch.stack([image.expand(channels, -1, -1) for image in images]), torch.tensor(labels))
        for part, (images, labels) in found.items()
    }
    if "test" in parts:
        return RawData(parts["train"], parts["test"], classes, form, parts.get("validation"))
    single = [name for label, name in enumerate(classes) if found["train"][1].count(label) == 1]
    two = (
        f"a folder with at least 2 images of each class, or with train/ and test/ (1 of {', '.join(single)})"
    )
    check(not single, "name", two, str(path), DataError)
    return split_test(parts["train"], classes, form, validation=parts.get("validation"))


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and in those below it, without hidden ones, by name."""
    return sorted(_walk(folder, set()))


def read_image(file: Path, mode: str | None = None) -> Tensor:
    """The bytes of an image, turned as viewers show it; of an animation its first frame.

    Args:
        file: its path.
        mode: "L" for grey or "RGB"; None: as the file has it.

    Returns:
        (1, H, W) if it is grey, else (3, H, W). Transparency is dropped.

    Raises:
        DataError: if it can't be read, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            # Pillow would silently clip 16 bits and more to 8.
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {opened.mode}")
            kind = mode or ("L" if opened.mode in ("1", "L", "LA", "La") else "RGB")
            pixels = np.array(ImageOps.exif_transpose(opened).convert(kind))
            return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)
    except Exception as error:
        # Pillow's plugins raise many kinds of errors for damaged files.
        raise DataError(
            f"name must lead to readable images of 8 bits a channel: got '{file}': {one_line(error)}"
        ) from error


def _parts(path: Path) -> dict[str, Path]:
    """The folders of the parts; the folder itself for "train" if it has none."""
    folders = _folders(path)
    parts: dict[str, Path] = {}
    for folder in folders:
        part = _PARTS.get(folder.name.lower())
        if part is not None:
            once = f"a folder with one part for {part}"
            check(part not in parts, "name", once, f"{parts.get(part)} and {folder}", DataError)
            parts[part] = folder
    if not parts:
        return {"train": path}
    check(
        "train" in parts and len(parts) > 1, "name",
        "a folder of classes, or of train/ and test/ both, of train/, val/ and test/, or of train/ and val/",
        f"{path} with {', '.join(f'{folder.name}/' for folder in parts.values())} alone", DataError,
    )  # fmt: skip
    others = [folder.name for folder in folders if folder not in parts.values()]
    if others:
        warnings.warn(
            f"{path}: read are {', '.join(f.name for f in parts.values())}, not {', '.join(others)}",
            stacklevel=2,
        )
    return parts


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(entry.name for entry in _folders(folder))


def _images(folder: Path, classes: tuple[str, ...], resize: Resize | None) -> tuple[list[Tensor], list[int]]:
    """The images of all classes, and their labels."""
    found = _classes(folder)
    allowed = f"those in train/, {', '.join(classes)}"
    check(found == classes, f"classes in {folder.name}/", allowed, list(found), DataError)
    files = [image_files(folder / name) for name in classes]
    empty = [name for name, members in zip(classes, files, strict=True) if not members]
    check(
        not empty, "name", "a folder with one folder of images for each class",
        f"{folder} without an image in {', '.join(empty)}", DataError,
    )  # fmt: skip
    images, labels = [], []
    for label, members in enumerate(files):
        for file in members:
            image = read_image(file)
            # Resized one by one: a folder of photographs at full size would not fit into memory.
            images.append(image if resize is None else resize(image.unsqueeze(0)).squeeze(0))
            labels.append(label)
    return images, labels


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry))


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """The visible images in a folder. A link to a folder above it does not double them."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for entry in folder.iterdir():
        if entry.is_dir():
            if not _is_hidden(entry):
                yield from _walk(entry, seen)
        elif not _is_hidden(entry) and (guess_type(entry.name, strict=False)[0] or "").startswith("image/"):
            yield entry


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _HIDDEN
