"""The bound: loops that read and write the bytes of a case and do no arithmetic worth the name.

Compiled here for this machine (triad.cpp), once with ordinary and once with streaming stores; the faster of
the two is the bound of a case. torch's own out= operations are no bound: they know nothing of rows of W, and
the ones for three inputs make two passes.

On a GPU the two are the same: a copy of half the bytes, which reads and writes all of them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from cases import DTYPES, Case, Inputs, Job, bytes_moved
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    loaded = load(SOURCE)
    loaded.triad.restype = ctypes.c_double
    return loaded


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """A source compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{source.stem}.so")
        subprocess.run([compiler(), *FLAGS, *flags, str(source), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class Triad:
    """A contender whose results are those of the loop, not a loss."""

    OPS = ("value", "value+grad", "grad_vjp", "grad_vjp, all", "grad_jvp", "grad_jvp, all", "hvp")
    LOSS = "triad"

    def __init__(self, streaming: bool) -> None:
        self.streaming = streaming

    def why_not(self, case: Case) -> str | None:
        if case.device != "cpu":
            return "one copy is enough on a GPU" if self.streaming else None
        if compiler() is None:
            return "no C++ compiler"
        if case.dtype == "float64" or case.classes * DTYPES[case.dtype].itemsize % 4:
            return "the loops are for rows of float32 numbers, or of what can pass for them"
        if self.streaming and (case.op == "value" or _floats(case) % 4):
            return "nothing to be streamed" if case.op == "value" else "rows are not aligned"
        return None

    def make(self, case: Case, inputs: Inputs) -> Job:
        if case.device != "cpu":
            source = torch.ones(bytes_moved(case) // 2, dtype=torch.uint8, device=case.device)
            room = torch.zeros_like(source)
            return Job(lambda: (room.copy_(source),))
        loops = library()
        m = _floats(case)
        x = None if case.op in ("value", "value+grad") else inputs.direction
        w = inputs.weight if case.structure == "full" else None
        pieces = 0 if w is None else inputs.weight.element_size() * case.classes // (4 * m)
        out = None if case.op == "value" else torch.zeros_like(inputs.logits)
        tables = torch.ones_like(inputs.weight) if case.to_all and w is not None else None
        numbers = map(ctypes.c_long, (pieces, case.rows, m))
        triad = functools.partial(
            loops.triad, self.streaming, *numbers, *map(_pointer, (inputs.logits, x, w, inputs.target, out))
        )
        if tables is None:
            results = () if out is None else (out.view(torch.float32),)

            def run() -> tuple[Tensor, ...]:
                total = triad()
                return results or (total,)

            return Job(run)

        fill = functools.partial(
            loops.fill, self.streaming, ctypes.c_long(tables.nbytes // 4), _pointer(tables)
        )
        both = out.view(torch.float32), tables

        def run_both() -> tuple[Tensor, ...]:
            triad()
            fill()
            return both

        return Job(run_both)


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """What the loops compute, in float64: the check that they moved what they claim to have moved."""
    if case.device != "cpu":
        return (torch.ones(bytes_moved(case) // 2, device=case.device),)
    m = _floats(case)
    total = 3 * inputs.logits.view(torch.float32).double()
    if case.op not in ("value", "value+grad"):
        total += inputs.direction.view(torch.float32)
    if case.structure == "full":
        rows = inputs.weight[inputs.target].view(torch.float32)
        for first in range(0, rows.shape[1], m):
            total += rows[:, first : first + m]
    if case.op == "value":
        return (total.sum(),)
    tables = (torch.zeros_like(inputs.weight),) if case.to_all and case.structure == "full" else ()
    return (total, *tables)


def _floats(case: Case) -> int:
    """How many float32 numbers have the bytes of a row of logits."""
    return case.classes * DTYPES[case.dtype].itemsize // 4


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


PLAIN, STREAMING = Triad(streaming=False), Triad(streaming=True)
