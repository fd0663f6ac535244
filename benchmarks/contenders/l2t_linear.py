"""l2t.dynamic_linear_loss: a linear head and the loss, a stretch of whose logits is in memory at a time."""

from __future__ import annotations

from cases import Case, Inputs, Job
from torch import Tensor

import l2t

OPS = ("linear",)
LOSS = "dynamic"


def why_not(case: Case) -> str | None:
    return None


def make(case: Case, inputs: Inputs) -> Job:
    features, head = inputs.features.clone().requires_grad_(), inputs.head.clone().requires_grad_()
    weight = inputs.weight if inputs.left is None else l2t.LowRank(inputs.weight, inputs.left, inputs.right)

    def linear() -> tuple[Tensor, ...]:
        features.grad = head.grad = None
        loss = l2t.dynamic_linear_loss(features, head, inputs.target, weight, inputs.bias)
        loss.backward()
        return loss.detach(), features.grad, head.grad

    return Job(linear)
