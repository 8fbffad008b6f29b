"""Folders of images, each class in a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_bnn.data import splits
from pyro_bnn.data.encoding import ArrayForm, Encoding
from pyro_bnn.data.targets import labels
from pyro_bnn.data.task import Task, listed, reading

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 32
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: modes of Pillow with 16 bits a pixel
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def from_image_folder(
    path: str | Path, size: int = IMAGE_SIZE, encoding: Encoding | None = None, *, split: float | None = None
) -> Task:
    """Reads images from ``train/<class>/`` and ``test/<class>/``, or from ``<class>/`` alone.

    Other spellings such as ``Train``, ``training`` and ``Testing`` are understood, as is ``validation`` if there is no
    test folder. Hidden files and folders are ignored. With folders of classes alone, a fixed 30 % of each class are for
    testing. Images become RGB with ``size`` x ``size`` pixels and values in [0, 1]: see :func:`read_image`.

    :param size: width and height of the images, in pixels.
    :param encoding: the encoding of an earlier task, with which this folder is read; by default it is learned.
    :param split: the share of the images for testing, if there are only folders of classes.
    :raises FileNotFoundError: when there is no folder for any class, or a folder without images.
    :raises ValueError: when one of ``train/`` and ``test/`` is missing, they hold different classes, or a file is not
        an image.
    """
    path = Path(path)
    with reading(path):
        if encoding is not None and (encoding.x_mean or encoding.array and encoding.array.dtype != "image"):
            raise ValueError("the network was not trained on images; give a file of the kind that training had")
        found, notes = _parts(path)
        if found:
            if split is not None:
                raise ValueError("it has folders for training and testing: leave out --split")
            files = {part: _files_by_class(folder) for part, folder in found.items()}
            if differing := set(files["train"]) ^ set(files["test"]):
                raise ValueError(
                    f"only one of {found['train'].name!r} and {found['test'].name!r} has class {min(differing)!r}"
                )
            (x_train, y_train), (x_test, y_test) = (_images(files[part], size) for part in ("train", "test"))
        else:
            x, y = _images(_files_by_class(path), size)
            share = encoding.split if split is None and encoding is not None else split
            train, test = splits.by_share(len(y), share if isinstance(share, float) else None, y)
            x_train, y_train, x_test, y_test = x[train], y[train], x[test], y[test]
        if encoding is None:
            classes = tuple(map(str, np.unique(y_train)))
            if len(classes) < 2:
                raise ValueError(f"a classification needs at least two classes, but there is only {classes[0]!r}")
            form = ArrayForm("image", 1.0, 0.0, 1.0, (3, size, size))
            encoding = Encoding(classes=classes, split=split, array=form)
        known = encoding.classes
        return Task(
            path.resolve().name,
            torch.from_numpy(x_train),
            torch.from_numpy(labels(y_train, known, "a folder")),
            torch.from_numpy(x_test),
            torch.from_numpy(labels(y_test, known, "a folder")),
            encoding,
            notes=notes,
        )


def new_images(path: str | Path, size: int) -> tuple[torch.Tensor, list[str]]:
    """All images in a folder and its subfolders, or one image: ``[N, 3, size, size]``, and their relative paths.

    :raises FileNotFoundError: when there is nothing at that path.
    :raises ValueError: when a file is not an image.
    """
    path = Path(path)
    with reading(path):
        files = _files(path) if path.is_dir() else [path]
        names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
        images = [read_image(file, size) for file in files]
        x = np.stack(images) if images else np.zeros((0, 3, size, size), np.float32)
        return torch.from_numpy(x), names


def read_image(path: str | Path, size: int) -> np.ndarray:
    """Reads one image as float32 ``[3, size, size]`` with values in [0, 1].

    It is rotated as its EXIF data say, and resized to a square by bilinear interpolation. Grey images get three equal
    channels, palettes become colours, and transparent pixels are placed on white. Pixels of 8 bits are divided by 255,
    those of 16 bits by 65535; floats must lie in [0, 1].

    :raises OSError: when there is no such file.
    :raises ValueError: when it is not an image, is truncated, or has values out of range.
    """
    from PIL import Image, ImageOps  # imported only if images are read

    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not an image, or is damaged ({error})") from error
    if image.mode in (*_WIDE, "F"):
        return _wide(image, path, size)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        upon = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", upon.size, "white"), upon)
    small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(255)


def _wide(image: Image.Image, path: str | Path, size: int) -> np.ndarray:
    """A grey image with 16 bits per pixel or floats."""
    from PIL import Image

    pixels = np.asarray(image).astype(np.float64)
    unit = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= unit):
        raise ValueError(
            f"{str(path)!r} has pixels from {pixels.min():g} to {pixels.max():g}; expected 0 to {unit:g} for an image "
            f"in Pillow's mode {image.mode}: save it with 8 or 16 bits"
        )
    grey = Image.fromarray((pixels / unit).astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(grey, np.float32)[None], 3, 0)


def _parts(path: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folders for training and testing, if there are such, and a note about a folder that is not used."""
    folders = _folders(path)
    parts: dict[str, Path] = {}
    for folder in folders:
        part = splits.PARTS.get(folder.name.lower())
        if part in parts:
            raise ValueError(f"it has two folders for one part: {parts[part].name!r} and {folder.name!r}")
        if part is not None:
            parts[part] = folder
    if not parts:
        return {}, ()
    notes: tuple[str, ...] = ()
    validation = parts.pop("validation", None)
    if validation is not None and "test" in parts:
        notes = (f"the folder {validation.name!r} was left out; {parts['test'].name!r} is for testing",)
    elif validation is not None:
        parts["test"] = validation
    if len(parts) == 1:
        (alone,) = parts.values()
        raise ValueError(f"it has only the folder {alone.name!r}; it needs both 'train' and 'test', or neither")
    others = [f.name for f in folders if f.name.lower() not in splits.PARTS]
    if others:
        raise ValueError(
            f"besides the folders for training and testing it has {listed([repr(name) for name in others])}: move "
            "these away"
        )
    return parts, notes


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not _is_hidden(folder.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def _files_by_class(path: Path) -> dict[str, list[Path]]:
    folders = _folders(path)
    if not folders:
        raise FileNotFoundError(f"no folder of a class in {str(path)!r}: expected a folder of images for each class")
    found = {folder.name: _files(folder) for folder in folders}
    if empty := [name for name, files in found.items() if not files]:
        raise FileNotFoundError(
            f"no image in the folder of class {listed([repr(name) for name in empty])} in {str(path)!r}: expected "
            f"files that end in {', '.join(_EXTENSIONS)}"
        )
    return found


def _files(path: Path) -> list[Path]:
    """Images in a folder and its subfolders, in the order of torchvision's ImageFolder."""
    files: list[Path] = []
    for folder, below, names in sorted(os.walk(path, followlinks=True)):
        if any(_is_hidden(part) for part in Path(folder).relative_to(path).parts):
            continue
        del below
        files += [
            Path(folder, name)
            for name in sorted(names)
            if name.lower().endswith(_EXTENSIONS) and not name.startswith(".")
        ]
    return files


def _images(files: dict[str, list[Path]], size: int) -> tuple[np.ndarray, np.ndarray]:
    images = [read_image(file, size) for own in files.values() for file in own]
    return np.stack(images), np.asarray([name for name, own in files.items() for _ in own])
