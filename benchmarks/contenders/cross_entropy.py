"""A yardstick: PyTorch's own cross-entropy, forward and backward, which has no coefficients."""

from __future__ import annotations

import torch.nn.functional as F
from cases import Case, Inputs, Job
from torch import Tensor

from contenders import eager

OPS = ("value", "value+grad", "linear")
LOSS = "cross-entropy"


def why_not(case: Case) -> str | None:
    return None


def loss(logits: Tensor, target: Tensor, *coefficients: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, target)


def make(case: Case, inputs: Inputs) -> Job:
    return eager.make(case, inputs, loss)
