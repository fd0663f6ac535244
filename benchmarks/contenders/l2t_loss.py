"""What users call: l2t.dynamic_loss with autograd around it."""

from __future__ import annotations

from cases import Case, Inputs, Job
from torch import Tensor

import l2t
from contenders import eager

OPS = ("value", "value+grad", "hvp", "linear")
LOSS = "dynamic"


def why_not(case: Case) -> str | None:
    return None


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor,
) -> Tensor:
    return l2t.dynamic_loss(
        logits, target, weight if left is None else l2t.LowRank(weight, left, right), bias
    )


def make(case: Case, inputs: Inputs) -> Job:
    return eager.make(case, inputs, loss)
