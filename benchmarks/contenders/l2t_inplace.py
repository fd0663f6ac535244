"""l2t.dynamic_loss where the caller gives up the logits: the gradient takes their memory.

The logits must be a result of the student, so a copy of the case's is made before each call, untimed.
"""

from __future__ import annotations

import torch
from cases import Case, Inputs, Job
from torch import Tensor

import l2t

OPS = ("value+grad",)
LOSS = "dynamic"


def why_not(case: Case) -> str | None:
    return None


def make(case: Case, inputs: Inputs) -> Job:
    parameter = inputs.logits.clone().requires_grad_()
    weight = inputs.weight if inputs.left is None else l2t.LowRank(inputs.weight, inputs.left, inputs.right)
    logits: list[Tensor] = []

    def compute_logits() -> None:
        logits[:] = [parameter.clone()]

    def value_and_grad() -> tuple[Tensor, ...]:
        found = l2t.dynamic_loss(logits[0], inputs.target, weight, inputs.bias, inplace_backward=True)
        return found.detach(), *torch.autograd.grad(found, logits)

    return Job(value_and_grad, before=compute_logits)
