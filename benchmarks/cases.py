"""What is timed: the named cases, their seeded inputs, and the bytes that none of them can avoid moving.

A case is a shape, a structure of W, an op, a dtype and a number of threads. The losses are docs/math.md
section 1 with the sigmoid link, W, b and the mean over the rows; logits are those of a student that has
learned something: normal, the true class raised by log C.

A full W at C = 32000 is a matrix of 4 GB. It is asked of the system as zeros, of which only the rows of
classes that occur are filled (no right contender reads another one), and where it would not fit the case is
left out, with a row that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2t.budget import free_memory

SHAPES = {f"{n}x{c}": (n, c) for n, c in ((128, 10), (128, 100), (256, 1000), (64, 32000), (1024, 32000))}
STRUCTURES = ("full", "diagonal", "low rank")
OPS = {
    "value": "the loss",
    "value+grad": "the loss and its gradient to the logits, which for a contender with autograd is forward "
    "and backward",
    "grad_vjp": "a cotangent of that gradient, back to the logits",
    "grad_vjp, all": "the same, back to the logits and all coefficients",
    "grad_jvp": "the tangent of that gradient along one of the logits",
    "grad_jvp, all": "the same, and the tangents of the gradients to all coefficients",
    "hvp": "a Hessian-vector product from the logits on: forward, backward and its backward",
    "linear": "forward and backward of a linear head and the loss, to features and head",
}
SECOND = ("grad_vjp", "grad_vjp, all", "grad_jvp", "grad_jvp, all", "hvp")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
RANK = 8
WIDTH = 256  # features of the op "linear"


class Case(NamedTuple):
    """One thing to be timed, by the names above."""

    shape: str
    structure: str
    op: str
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"

    @property
    def rows(self) -> int:
        return int(self.shape.split("x")[0])

    @property
    def classes(self) -> int:
        return int(self.shape.split("x")[1])

    @property
    def to_all(self) -> bool:
        """Whether the gradients to the coefficients are wanted as well."""
        return self.op.endswith(", all")


class Inputs(NamedTuple):
    """What every contender is given; coefficients are absent as the structure has it."""

    logits: Tensor  # [N, C]
    target: Tensor  # [N]
    weight: Tensor  # [C, C], or the diagonal [C]
    left: Tensor | None  # [C, r]
    right: Tensor | None  # [C, r]
    bias: Tensor  # [C]
    direction: Tensor  # [N, C], a cotangent or a tangent of the logits' gradient
    features: Tensor | None  # [N, WIDTH]
    head: Tensor | None  # [C, WIDTH]

    @property
    def coefficients(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.weight, self.left, self.right, self.bias) if x is not None)


def why_not(case: Case) -> str | None:
    """Why nobody can run this case here; None where it can be run."""
    if case.op == "linear" and case.dtype == "float16":
        return "gradients of a mean underflow in float16"
    if case.structure != "full":
        return None
    matrix = case.classes**2 * (8 if case.dtype == "float64" else 4)
    if case.to_all and matrix > 1e9:
        return f"gradients to all coefficients hold another {matrix / 1e9:.0f} GB"
    free = free_memory(torch.device(case.device))
    if free is not None and matrix > free:
        return f"W takes {matrix / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
    return None


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """The inputs of a case: the same numbers, rounded to the dtype, whatever op, threads and device."""
    n, c = case.rows, case.classes
    dtype, device = DTYPES[case.dtype], case.device
    arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    target = torch.randint(c, (n,), generator=generator)
    logits, direction = 2 * normal(n, c), normal(n, c)
    logits[torch.arange(n), target] += math.log(c)
    bias, left, right, features, head = 0.1 * normal(c), None, None, None, None
    if case.structure == "full":
        classes = target.unique()
        used = 0.1 / math.sqrt(c) * normal(len(classes), c)
        used[torch.arange(len(classes)), classes] += 1
        weight = _zeros(c, arithmetic, device)
        weight[classes.to(device)] = used.to(device, arithmetic)
    else:
        weight = 1 + 0.1 * normal(c)
    if case.structure == "low rank":
        left, right = 0.1 * normal(c, RANK), 0.1 / math.sqrt(c) * normal(c, RANK)
    if case.op == "linear":
        head = normal(c, WIDTH) / math.sqrt(WIDTH)
        features = normal(n, WIDTH) + head[target]
    rows = [x if x is None else x.to(device, dtype) for x in (logits, direction, features, head)]
    tables = [x if x is None else x.to(device, arithmetic) for x in (weight, left, right, bias)]
    return Inputs(rows[0], target.to(device), *tables, rows[1], rows[2], rows[3])


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers for the result that all others are measured against."""
    exact = [
        x.double() if x is not None and x.is_floating_point() else x for x in inputs._replace(weight=None)
    ]
    weight = inputs.weight
    if weight.dim() == 1:
        return Inputs(*exact)._replace(weight=weight.double())
    classes = inputs.target.unique()
    matrix = _zeros(len(weight), torch.float64, weight.device.type)
    matrix[classes] = weight[classes].double()
    return Inputs(*exact)._replace(weight=matrix)


def bytes_moved(case: Case) -> int | None:
    """What a case has to read and write once: logits, direction, rows of W, gradients; None for "linear".

    Left out are what is smaller by a factor of C / r (targets, losses, b, a diagonal, U and V), and a second
    reading where one does not fit the cache.
    """
    n, c, size = case.rows, case.classes, DTYPES[case.dtype].itemsize
    table = 8 if case.dtype == "float64" else 4
    tensors = {"value": 1, "value+grad": 2}.get(case.op, 3)  # of [N, C]: logits, direction, gradient
    if case.op == "linear":
        return None  # bound by arithmetic
    moved = n * c * size * tensors
    if case.structure == "full":
        moved += n * c * table
        if case.to_all:
            moved += c * c * table
    return moved


def _zeros(c: int, dtype: torch.dtype, device: str) -> Tensor:
    """A [C, C], on the CPU one of which the system gives only the pages that are written."""
    if device != "cpu":
        return torch.zeros(c, c, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((c, c), "f8" if dtype is torch.float64 else "f4"))


class Job(NamedTuple):
    """A contender at a case: `call` is timed and returns its results, `before` is not timed."""

    call: Callable[[], tuple[Tensor, ...]]
    before: Callable[[], object] | None = None
