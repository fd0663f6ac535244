"""Readers of the files that image sets come in: IDX, the python version of CIFAR, a folder a class.

Each takes bytes or a folder and returns whole arrays, or raises one sentence that names the file: nothing is
half-loaded. A CIFAR batch is a pickle, which could run anything; it is read by an unpickler that admits
arrays and plain containers and refuses all else. Where the files lie is not here (see ``places.py``).
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2t import check

Samples = tuple[Tensor, Tensor]
"""Images (N, C, H, W) float32 with values from 0 to 255, and labels (N,) int64."""

Bytes = NDArray[np.uint8]


class File(NamedTuple):
    """A file that was read: its path, for sentences, and its content, unpacked."""

    path: Path
    content: bytes


def unpacked(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends in ``.gz``.

    Raises:
        ValueError: for a gzip file that is broken off or corrupted.
    """
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise check.data_file(path, "a whole gzip file", str(error)) from error


def members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of files in a ``.tar.gz``, by name, in one pass; nothing is unpacked to the disk.

    Raises:
        ValueError: for an archive that is broken off or corrupted, or lacks one of them.
    """
    found = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.name in names and (file := archive.extractfile(member)) is not None:
                    found[member.name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise check.data_file(path, "a whole .tar.gz", str(error)) from error
    if missing := [name for name in names if name not in found]:
        raise check.data_file(path, f"an archive with {', '.join(names)}", f"none of {', '.join(missing)}")
    return found


def idx(file: File, dims: int) -> Bytes:
    """The array of bytes in an IDX file (LeCun, Cortes and Burges): two zeros, type 8, the number of
    dimensions, a big-endian 32-bit size for each, then the values.

    Args:
        file: its path and content.
        dims: number of dimensions it must have: 1 for labels, 3 for images.

    Raises:
        ValueError: for another type or number of dimensions, or a file too short or too long.

    Example:
        >>> idx(File(Path("labels"), bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1])), 1)
        array([7, 2, 1], dtype=uint8)
    """
    path, content = file
    magic, head = bytes([0, 0, 8, dims]), 4 + 4 * dims
    if content[:4] != magic:
        raise check.data_file(path, f"IDX with magic {magic.hex()}", content[:4].hex() or "an empty file")
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4)]
    if len(content) != head + math.prod(sizes):
        want = f"{head + math.prod(sizes):,} bytes long, as its head says"
        raise check.data_file(path, want, f"{len(content):,}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes)


def labelled(images: Bytes, labels: Any, num_classes: int, path: Path) -> Samples:
    """Images (N, C, H, W) with their labels as tensors.

    Args:
        images: of any dtype of whole numbers.
        labels: N whole numbers.
        num_classes: labels must be below.
        path: the file of the labels, for sentences.

    Raises:
        ValueError: for another number of labels than images, or a label out of range.
    """
    labels = np.asarray(labels)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} of shape {labels.shape}"
        raise check.data_file(path, f"one whole number for each of {len(images):,} images", found)
    if len(labels) == 0:
        raise check.data_file(path, "labels of one image or more", "none")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        found = f"{labels.min()} to {labels.max()}"
        raise check.data_file(path, f"labels from 0 to {num_classes - 1}", found)
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def idx_samples(images: File, labels: File, num_classes: int) -> Samples:
    """Samples of one channel from an IDX file of images and one of labels.

    Raises:
        ValueError: as `idx` and `labelled` say.
    """
    return labelled(idx(images, 3)[:, None], idx(labels, 1), num_classes, labels.path)


# ---- CIFAR


class _RefusedError(Exception):
    """A pickle names something that is neither an array of numbers nor a plain container."""


def _array(*_: Any) -> Bytes:
    """An array for the pickle to fill; of numpy's own type it could take any bytes for pointers."""
    return np.empty(0, np.uint8)


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    """A dtype of numbers, of those that numpy lets nobody change."""
    found: np.dtype[Any] = np.dtype(code)
    if found.isbuiltin != 1 or found.hasobject:
        named = "numpy", f"dtype {code!r}"
        raise _RefusedError(*named)
    return found


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # an argument of the two below
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(module, name)
        return _ADMITTED[module, name]


def cifar_batch(file: File, key: str, num_classes: int) -> Samples:
    """Samples of a batch of CIFAR-10 or CIFAR-100, python version (Krizhevsky 2009): a pickled dict with
    ``data``, uint8 (N, 3072), each row 32 x 32 red, then green, then blue values, and labels under ``key``.

    Args:
        file: its path and content.
        key: ``"labels"`` or, for CIFAR-100, ``"fine_labels"``.
        num_classes: labels must be below.

    Raises:
        ValueError: for a pickle that is broken or names anything but arrays and plain containers, and for
            data or labels that are not as above.
    """
    path, content = file
    want = f"a CIFAR batch, a pickled dict of arrays and lists with data and {key}"
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError as error:
        raise check.data_file(path, want, f"one that names {'.'.join(error.args)}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise check.data_file(path, want, f"one that cannot be read ({error})") from error
    names = [b"data", key.encode()]
    if not isinstance(batch, dict) or any(name not in batch for name in names):
        raise check.data_file(path, want, f"a {type(batch).__name__} without them")
    data, labels = (batch[name] for name in names)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise check.data_file(path, "a CIFAR batch with data of uint8 and shape (N, 3072)", _described(data))
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise check.data_file(
            path, f"a CIFAR batch with {key} as a list of whole numbers", _described(labels)
        )
    return labelled(data.reshape(-1, 3, 32, 32), np.array(labels, np.int64), num_classes, path)


def _described(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


# ---- folders of images

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def class_files(root: Path) -> dict[str, list[Path]]:
    """The image files of each class: by the names of the folders in ``root``, all in sorted order.

    What is hidden and what has no suffix of an image is passed over.

    Raises:
        ValueError: there are fewer than two folders, or one without images.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise check.own_file(
            root, "a folder with a folder of images for each of two classes or more", f"{len(folders)}"
        )
    found = {}
    for folder in folders:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        found[folder.name] = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not found[folder.name]:
            raise check.own_file(folder, f"a folder of images ({', '.join(SUFFIXES)})", "none")
    return found


def image(path: Path, size: int) -> Bytes:
    """An image as (3, size, size) bytes, cut to a square about its middle and resampled; grey becomes colour.

    Raises:
        ValueError: the file is broken, no image, or has more than 8 bits a channel.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise check.missing_package("folder", "pillow") from error
    try:
        with Image.open(path) as opened:
            opened.load()
            mode, upright = opened.mode, ImageOps.exif_transpose(opened)
    except Exception as error:  # a broken file can raise anything
        raise check.own_file(path, "an image that Pillow can read", str(error)) from error
    if mode[0] in "IF":
        raise check.own_file(path, "an image of 8 bits a channel", f"Pillow's mode {mode}")
    pixels = np.asarray(ImageOps.fit(upright.convert("RGB"), (size, size)))  # [H, W, 3]
    channels: Bytes = pixels.transpose(2, 0, 1)
    return channels
