"""`folder`: images of your own, a folder a class, all brought to 32 x 32 colour pixels.

They are looked for in the folder ``folder`` of the places (see ``places.py``), which may be a link. Where
that holds ``train`` and ``test`` with the same classes, those are the pool and the test set; otherwise a
fifth of all images is the test set, drawn by a seed of this file alone. Classes are numbered by their sorted
names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from l2t import check
from l2t.tasks.networks import image_students
from l2t.tasks.places import Place
from l2t.tasks.readers import class_files, image, labelled
from l2t.tasks.regimes import standard, stratified
from l2t.tasks.task import Samples, Setting, Source, Task

SIZE = 32
TEST_SEED = 1998
TEST_SHARE = 0.2


class _Split(NamedTuple):
    """The images of a folder and the numbers of their classes, pool and test."""

    classes: tuple[str, ...]
    pool: list[tuple[Path, int]]
    test: list[tuple[Path, int]]


def _rows(files: Mapping[str, Sequence[Path]]) -> list[tuple[Path, int]]:
    return [(path, label) for label, paths in enumerate(files.values()) for path in paths]


@dataclass(frozen=True)
class Folder(Place):
    """A place that holds a folder of images for each class in place of known files."""

    def root(self) -> Path:
        """The folder over the classes.

        Raises:
            FileNotFoundError: there is none.
        """
        for folder in self.folders():
            if os.path.isdir(folder):  # of which Path.is_dir raises where it may not look
                return folder
        raise check.folder_missing(self.folders()[0])

    def split(self) -> _Split:
        """Finds the images without reading them.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it does not hold images by class, or too few for a test set.
        """
        root = self.root()
        if (root / "train").is_dir() and (root / "test").is_dir():
            train, test = class_files(root / "train"), class_files(root / "test")
            if train.keys() != test.keys():
                want = f"a folder with the classes of train, {', '.join(train)}"
                raise check.own_file(root / "test", want, ", ".join(test))
            return _Split(tuple(train), _rows(train), _rows(test))
        files = class_files(root)
        rows = _rows(files)
        target = torch.tensor([label for _, label in rows])
        generator = torch.Generator().manual_seed(TEST_SEED)
        test_rows, pool_rows = stratified(target, round(TEST_SHARE * len(rows)), generator)
        if not len(test_rows):
            want = "a folder of 3 images or more, of which a fifth is the test set"
            raise check.own_file(root, want, f"{len(rows)}")
        learned = set(target[pool_rows].tolist())
        for label, name in enumerate(files):
            if label not in learned:  # its only image is in the test set
                raise check.own_file(root / name, "a folder of two images or more", "1")
        return _Split(tuple(files), [rows[row] for row in pool_rows], [rows[row] for row in test_rows])

    def paths(self) -> dict[str, Path]:
        """The folder over the classes; raises as `split`."""
        self.split()
        return {"": self.root()}

    def checksums(self) -> list[tuple[Path, str, bool]]:
        """The folder over the classes and what was found in it; raises as `split`."""
        classes, pool, test = self.split()
        return [
            (self.root(), f"{len(classes)} classes, {len(pool)} images and {len(test)} for the test", True)
        ]

    def fetch(self) -> None:
        """Nothing can be fetched; raises what is wrong."""
        self.split()


PLACE = Folder("folder", {})


def samples(files: Sequence[tuple[Path, int]], num_classes: int) -> Samples:
    """Reads images, (N, 3, 32, 32), with their classes."""
    pixels = np.stack([image(path, SIZE) for path, _ in files])
    return labelled(pixels, np.array([label for _, label in files]), num_classes, files[0][0].parent)


def source() -> Source:
    """Pool and test set."""
    classes, pool, test = PLACE.split()
    return Source(samples(pool, len(classes)), samples(test, len(classes)))


_RECIPE = {"steps": 300, "batch_size": 50, "updates": 60}


def _task(classes: Sequence[str], pool: Sequence[tuple[Path, int]]) -> Task:
    part = max(1, len(pool) // 10)
    regimes = standard(len(pool), len(classes), few=part, dev=part, imbalance=10.0)
    # A balanced dev set has an image of every class, and leaves one of each where there are two.
    least = min(Counter(label for _, label in pool).values(), default=0)
    each = max(1, min(part // len(classes), least - 1))
    if each != part // len(classes):
        even = standard(len(pool), len(classes), few=part, dev=each * len(classes), imbalance=10.0)
        regimes["long-tail"] = even["long-tail"]
    return Task(
        name="folder",
        title="images of your own, a folder a class, at 32 x 32 colour pixels",
        origin="your files, in the folder that `l2t data folder` names",
        licence="theirs",
        place=PLACE,
        package="pillow",
        num_classes=len(classes),
        source=source,
        students=image_students(3, SIZE, len(classes)),
        settings={name: Setting(regime, _RECIPE) for name, regime in regimes.items()},
    )


OUTLINE = _task(("none",), [])


def __getattr__(name: str) -> Task:
    """``TASK`` is made when it is asked for: its classes and counts are those of the folder that is there."""
    if name != "TASK":
        raise AttributeError(name)
    try:
        classes, pool, _ = PLACE.split()
    except (OSError, ValueError):  # said by Task.require
        return OUTLINE
    return _task(classes, pool)
