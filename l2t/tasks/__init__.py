"""Tasks that can be taught out of the box: one file a task, found by name. See ``task.py`` for what a task
is.

Example:
    >>> names()
    ('cifar10', 'cifar100', 'digits', 'fashion-mnist', 'folder', 'mnist', 'mnist-5k', 'mnist1d')
    >>> data = get("digits").load("pair-flip")
    >>> data.train[0].shape, data.test[0].shape
    (torch.Size([1000, 64]), torch.Size([597, 64]))
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from l2t import check
from l2t.tasks.regimes import Draw, Regime
from l2t.tasks.task import Data, Setting, Source, Task

__all__ = ["Data", "Draw", "Regime", "Setting", "Source", "Task", "get", "names", "outline"]

_HELPERS = ("networks", "places", "readers", "regimes", "task")


def names() -> tuple[str, ...]:
    """Names of the tasks: every file of this folder that is not a helper is one, its ``_`` a ``-``."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in found if name not in _HELPERS))


def get(name: str) -> Task:
    """The task of that name; an unknown name raises a ValueError that lists the known ones."""
    task: Task = _file(name).TASK
    return task


def outline(name: str) -> Task:
    """The task as lists show it, which looks for no data: counts and classes may be another's."""
    file = _file(name)
    task: Task = file.OUTLINE if "OUTLINE" in vars(file) else file.TASK
    return task


def _file(name: str) -> ModuleType:
    return import_module(f"{__name__}.{check.known('tasks', 'task', name, names()).replace('-', '_')}")
