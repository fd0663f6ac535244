"""The kernels of l2t alone: the results go to memory that was there before, as `out=` would have it.

What a fresh output costs beyond this is the system's work: at 131 MB its page faults take longer than the
arithmetic.
"""

from __future__ import annotations

import torch
from cases import Case, Inputs, Job
from torch import Tensor

from contenders.l2t_ops import LOSS, OPS, common_arguments, cotangent_of_loss
from l2t.ops import run

__all__ = ["LOSS", "OPS", "make", "why_not"]


def why_not(case: Case) -> str | None:
    return None


def make(case: Case, inputs: Inputs) -> Job:
    common = common_arguments(inputs)
    logits, bias = inputs.logits, inputs.bias
    loss, stats, d_logits = bias.new_empty(1), bias.new_empty(len(logits), 3), torch.empty_like(logits)
    if case.op == "value":
        return _job((loss,), "value", *common, loss, stats, None)
    if case.op == "value+grad":
        return _job((loss, d_logits), "value", *common, loss, stats, d_logits)

    run("value", *common, loss, stats, None)
    tables = inputs[2:6]
    outputs = [d_logits, *(torch.empty_like(x) if case.to_all and x is not None else None for x in tables)]
    results = tuple(x for x in outputs if x is not None)
    none = (None,) * 5  # directions of the coefficients
    start = (*common, stats, cotangent_of_loss(inputs))
    if case.op.startswith("grad_vjp"):
        return _job(results, "grad_vjp", *start, inputs.direction, *none, None, *outputs, None)
    return _job(results, "grad_jvp", *start, None, inputs.direction, *none, *outputs, None)


def _job(results: tuple[Tensor, ...], *call: object) -> Job:
    def call_core() -> tuple[Tensor, ...]:
        run(*call)
        return results

    return Job(call_core)
