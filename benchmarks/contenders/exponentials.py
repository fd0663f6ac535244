"""The arithmetic that is left when memory costs nothing: one exponential a logit, in the first cache.

Beside the bound of triad.py it says how near a kernel can come to that bound: no softmax of float32 logits
with the core's own exp takes less than the longer of the two.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from cases import Case, Inputs, Job
from torch import Tensor

from contenders.triad import compiler, load

OPS = ("value", "value+grad", "grad_vjp", "grad_jvp")
LOSS = "exponentials"
WIDTH = 1024


def why_not(case: Case) -> str | None:
    if case.device != "cpu":
        return "a card computes exponentials while it waits for memory"
    if compiler() is None:
        return "no C++ compiler"
    if case.threads > 1:
        return "it is a loop of one thread"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    return load(Path(__file__).with_suffix(".cpp"), "-DL2T_ISA=alone", "-ffp-contract=off")


def make(case: Case, inputs: Inputs) -> Job:
    z = _numbers(inputs)
    room = z, torch.zeros_like(z)  # both live as long as the loop
    count, width = ctypes.c_long(case.rows * case.classes), ctypes.c_long(len(z))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in room)
    loop = functools.partial(library().exponentials, count, width, *pointers)

    def run() -> tuple[Tensor, ...]:
        loop()
        return room[1:]

    return Job(run)


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    return (_numbers(inputs).double().exp(),)


def _numbers(inputs: Inputs) -> Tensor:
    """The first logits, as a softmax has them: not above zero."""
    z = inputs.logits.flatten()[:WIDTH].float()
    return z - z.max()
