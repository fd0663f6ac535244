"""A yardstick: Liger's cross-entropy in Triton, which writes the gradient over the logits, also of a head."""

from __future__ import annotations

import importlib.util

from cases import Case, Inputs, Job
from torch import Tensor

OPS = ("value+grad", "linear")
LOSS = "cross-entropy"


def why_not(case: Case) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    return None if case.device == "cuda" else "runs on a GPU only"


def make(case: Case, inputs: Inputs) -> Job:
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

    target = inputs.target
    if case.op == "linear":
        features, head = inputs.features.clone().requires_grad_(), inputs.head.clone().requires_grad_()

        def linear() -> tuple[Tensor, ...]:
            features.grad = head.grad = None
            loss = liger_fused_linear_cross_entropy(features, head, target)
            loss.backward()
            return loss.detach(), features.grad, head.grad

        return Job(linear)

    logits = inputs.logits.clone().requires_grad_()

    def value_and_grad() -> tuple[Tensor, ...]:
        logits.grad = None
        loss = liger_cross_entropy(logits, target)
        loss.backward()
        return loss.detach(), logits.grad

    return Job(value_and_grad, before=lambda: logits.data.copy_(inputs.logits))
