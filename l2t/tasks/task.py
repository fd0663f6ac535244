"""What a task is: a data source, students, and for each regime the draw, the recipe and the teacher that
suit it.

A task's own file states only those (``digits.py`` is a short example). The test set is cut from the source
by a seed that is part of the task, so it is the same in every regime, for every seed of a run, and nothing
that teaches or tunes gets to see it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from l2t import check
from l2t.tasks import networks
from l2t.tasks.places import Place
from l2t.tasks.regimes import Regime

if TYPE_CHECKING:
    from l2t.teach import Recipe

Samples = tuple[Tensor, Tensor]  # x [N, ...] float32, y [N] int64


class Data(NamedTuple):
    """Data of one regime. Inputs are float32 and standardised by the training set's mean and standard
    deviation.

    Attributes:
        train: inputs (N, ...) and int64 labels (N,), noisy where the regime is.
        dev: clean dev samples set aside from training, or None: then every episode splits them off `train`.
        test: the task's fixed, clean test set.
        num_classes: number of classes C.
        noise: matrix (C, C) float64, ``noise[i, j]`` the probability that class i was seen as class j; None
            without noise. Only the oracle baseline may look at it.
        dev_is_clean: whether `dev` is better than `train`: clean labels where those of `train` are noisy,
            balanced classes where `train` has a long tail. Then training on `dev` is a baseline too.
    """

    train: Samples
    dev: Samples | None
    test: Samples
    num_classes: int
    noise: Tensor | None
    dev_is_clean: bool

    def to(self, device: str | torch.device) -> Data:
        """The same with all samples on ``device``."""

        def moved(samples: Samples) -> Samples:
            return samples[0].to(device), samples[1].to(device)

        dev = None if self.dev is None else moved(self.dev)
        return self._replace(train=moved(self.train), dev=dev, test=moved(self.test))


class Source(NamedTuple):
    """All samples of a task before a regime is drawn: pool and test inputs (N, ...) float32, labels (N,)
    int64.
    """

    pool: Samples
    test: Samples


@dataclass(frozen=True)
class Setting:
    """A regime of a task with what was found to teach well in it."""

    regime: Regime
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A data set with its students and regimes.

    Attributes:
        name: as given to `l2t teach`.
        title: one line for people.
        num_classes: number of classes C.
        source: gives pool and test samples, the same at every call; called once and remembered.
        students: student constructors by name, the first one the default. Each gives a freshly initialised
            module that maps (N, ...) inputs to (N, C) logits and draws its start values from torch's global
            generator.
        settings: regimes by name, the first one the default.
        origin: where the data come from, for people.
        licence: what their makers allow, for people.
        package: the package on PyPI that brings the data, or ``""``.
        place: the files that hold them, or None.
    """

    name: str
    title: str
    num_classes: int
    source: Callable[[], Source]
    students: Mapping[str, Callable[[], nn.Module]]
    settings: Mapping[str, Setting]
    origin: str = ""
    licence: str = ""
    package: str = ""
    place: Place | None = None

    def require(self) -> None:
        """Looks whether the data are there, without reading them.

        Raises:
            FileNotFoundError: files are missing; the sentence names the command that fetches them.
            ValueError: a folder of images does not hold them by class.
            ImportError: the package that brings the data is not installed.
        """
        if self.place is not None:
            self.place.paths()
        if self.package:
            try:
                importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError as error:
                raise check.missing_package(self.name, self.package) from error

    def is_there(self) -> bool:
        """Whether `require` finds the data."""
        with contextlib.suppress(OSError, ValueError, ImportError):
            self.require()
            return True
        return False

    @property
    def regimes(self) -> tuple[str, ...]:
        """Names of the regimes, the default first."""
        return tuple(self.settings)

    def setting(self, regime: str) -> Setting:
        """The setting of a regime by name; an unknown name raises a ValueError that lists the known ones."""
        return self.settings[check.known("tasks", f"regime of {self.name}", regime, self.settings)]

    def student(self, name: str | None = None) -> Callable[[], nn.Module]:
        """A student's constructor by name, the default one for None; an unknown name raises a ValueError.

        Tasks of images know besides their own ``resnet-DEPTH``, ``wrn-DEPTH-WIDTH`` and, where that package
        is installed, ``timm:NAME`` for any of its models.
        """
        name = next(iter(self.students)) if name is None else name
        if name not in self.students and networks.of_any_size(name):
            shape = self._samples.pool[0].shape
            check.task_has_images(self.name, name, shape)
            return networks.by_name(name, shape[1], self.num_classes)
        return self.students[check.known("tasks", f"student of {self.name}", name, self.students)]

    def recipe(self, regime: str) -> Recipe:
        """How to teach in this regime."""
        from l2t.teach import Recipe

        return Recipe(**self.setting(regime).recipe)

    def load(self, regime: str, seed: int = 0) -> Data:
        """Draws a regime's data. `seed` moves subset, noise and dev set, never the test set.

        Raises:
            ValueError: unknown regime, or files that are not what they should be.
            FileNotFoundError, ImportError: as `require`.
        """
        from l2t.teach import threads

        setting = self.setting(regime)
        (x, y), (x_test, y_test) = self._samples
        draw = setting.regime.draw(y, self.num_classes, torch.Generator().manual_seed(seed))
        train = x[draw.train]
        with threads(1):  # a sum over several threads rounds otherwise, and every result with it
            mean, std = train.mean(), train.std()

        def scaled(inputs: Tensor) -> Tensor:
            return (inputs - mean) / std

        return Data(
            train=(scaled(train), draw.train_target),
            dev=None if draw.dev is None else (scaled(x[draw.dev]), y[draw.dev]),
            test=(scaled(x_test), y_test),
            num_classes=self.num_classes,
            noise=draw.noise,
            dev_is_clean=draw.dev is not None and setting.regime.spoils,
        )

    @cached_property
    def _samples(self) -> Source:
        return self.source()
