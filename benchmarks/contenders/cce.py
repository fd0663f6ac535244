"""A yardstick: Apple's cut cross-entropy, a linear head and cross-entropy without logits in memory.

It takes float16 and bfloat16 features only. `filter_eps=None`, since dropping small gradients would be
another result.
"""

from __future__ import annotations

import importlib.util

from cases import Case, Inputs, Job
from torch import Tensor

OPS = ("linear",)
LOSS = "cross-entropy"


def why_not(case: Case) -> str | None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return "not installed"
    if case.device != "cuda":
        return "runs on a GPU only"
    return None if case.dtype in ("bfloat16", "float16") else f"not for {case.dtype}"


def make(case: Case, inputs: Inputs) -> Job:
    from cut_cross_entropy import linear_cross_entropy

    features, head = inputs.features.clone().requires_grad_(), inputs.head.clone().requires_grad_()

    def linear() -> tuple[Tensor, ...]:
        features.grad = head.grad = None
        loss = linear_cross_entropy(features, head, inputs.target, filter_eps=None)
        loss.backward()
        return loss.detach(), features.grad, head.grad

    return Job(linear)
