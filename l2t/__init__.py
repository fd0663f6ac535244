"""l2t: learning to teach with dynamic loss functions.

The public names, and nothing else. Start with `dynamic_loss` (the loss), `unroll` (the gradient through a
training run), `Teacher` and `teach` (what hands a student its loss, and how that learns); on the command
line, ``l2t --help``.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

from l2t import check as _check
from l2t import optim
from l2t.functional import dynamic_loss
from l2t.linear import dynamic_linear_loss
from l2t.loss import DynamicLoss
from l2t.plan import Plan, plan
from l2t.preflight import Preflight, preflight
from l2t.starts import Starts, default_starts, teach_best
from l2t.students import Stack
from l2t.teach import Recipe, Taught, teach
from l2t.teacher import Coefficients, GateTeacher, StudentState, Teacher, static_teacher
from l2t.unroll import Run, unroll
from l2t.weight import Diagonal, Full, LowRank
from l2t.weight_net import WeightNet

__version__ = _version("l2t")


def __getattr__(name: str) -> _Any:
    """Modules that most programs do without, at their first use."""
    if name in ("baselines", "compare", "figures", "report", "tasks", "translation"):
        return _import_module(f"l2t.{name}")
    raise _check.no_such_name(name)


__all__ = [
    "Coefficients",
    "Diagonal",
    "DynamicLoss",
    "Full",
    "GateTeacher",
    "LowRank",
    "Plan",
    "Preflight",
    "Recipe",
    "Run",
    "Stack",
    "Starts",
    "StudentState",
    "Taught",
    "Teacher",
    "WeightNet",
    "default_starts",
    "dynamic_linear_loss",
    "dynamic_loss",
    "optim",
    "plan",
    "preflight",
    "static_teacher",
    "teach",
    "teach_best",
    "unroll",
]
