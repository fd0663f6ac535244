"""The kernels of l2t with results allocated anew, past the dispatcher: as dynamic_loss calls them."""

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
    common, logits, bias = common_arguments(inputs), inputs.logits, inputs.bias
    rows = len(logits)

    def value() -> tuple[Tensor, ...]:
        loss, stats = bias.new_empty(1), bias.new_empty(rows, 3)
        run("value", *common, loss, stats, None)
        return (loss,)

    def value_and_grad() -> tuple[Tensor, ...]:
        loss, stats, d_logits = bias.new_empty(1), bias.new_empty(rows, 3), torch.empty_like(logits)
        run("value", *common, loss, stats, d_logits)
        return loss, d_logits

    if case.op == "value":
        return Job(value)
    if case.op == "value+grad":
        return Job(value_and_grad)

    stats, none = bias.new_empty(rows, 3), (None,) * 5
    run("value", *common, bias.new_empty(1), stats, None)
    start = (*common, stats, cotangent_of_loss(inputs))
    asked = [x if case.to_all else None for x in inputs[2:6]]

    def second_order() -> tuple[Tensor, ...]:
        outputs = [torch.empty_like(logits), *(x if x is None else torch.empty_like(x) for x in asked)]
        if vjp:
            run("grad_vjp", *start, inputs.direction, *none, None, *outputs, None)
        else:
            run("grad_jvp", *start, None, inputs.direction, *none, *outputs, None)
        return tuple(x for x in outputs if x is not None)

    vjp = case.op.startswith("grad_vjp")
    return Job(second_order)
