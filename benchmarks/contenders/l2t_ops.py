"""The ops of l2t as the dispatcher has them, for torch.compile and torch.func; without autograd here.

Each call allocates its results.
"""

from __future__ import annotations

import torch
from cases import Case, Inputs, Job
from torch import Tensor

OPS = ("value", "value+grad", "grad_vjp", "grad_vjp, all", "grad_jvp", "grad_jvp, all")
LOSS = "dynamic"
SIGMOID, IGNORE_INDEX, GROUPS, MEAN, SEGMENTS = 0, -100, 1, 1, 1


def why_not(case: Case) -> str | None:
    return None


def common_arguments(inputs: Inputs) -> tuple[object, ...]:
    """What every op is given first: logits, target, the coefficients but for a scale, and the settings."""
    return (*inputs[:6], None, SIGMOID, IGNORE_INDEX, GROUPS, MEAN, SEGMENTS)


def cotangent_of_loss(inputs: Inputs) -> Tensor:
    return torch.ones(SEGMENTS, dtype=inputs.bias.dtype, device=inputs.bias.device)


def make(case: Case, inputs: Inputs) -> Job:
    ops, common = torch.ops.l2t, common_arguments(inputs)
    if case.op == "value":
        return Job(lambda: ops.value.default(*common, False)[:1])
    if case.op == "value+grad":
        return Job(lambda: ops.value.default(*common, True)[::2])

    _, stats, _ = ops.value.default(*common, False)
    v_loss = cotangent_of_loss(inputs)
    wanted = [True, *(case.to_all and x is not None for x in inputs[2:6]), False]
    asked = [i for i, want in enumerate(wanted) if want]
    directions = (inputs.direction, None, None, None, None, None)

    def grad_vjp() -> tuple[Tensor, ...]:
        found = ops.grad_vjp.default(*common, stats, v_loss, *directions, [False, *wanted])
        return tuple(found[1 + i] for i in asked)

    def grad_jvp() -> tuple[Tensor, ...]:
        found = ops.grad_jvp.default(*common, stats, v_loss, None, *directions, wanted)
        return tuple(found[i] for i in asked)

    return Job(grad_vjp if case.op.startswith("grad_vjp") else grad_jvp)
