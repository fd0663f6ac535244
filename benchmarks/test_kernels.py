"""The kernels and the pure-PyTorch reference under pytest-benchmark, one group a case, results checked first.

Run: pytest benchmarks/ --benchmark-only [-k "256x1000 and hvp"] [--benchmark-json FILE]; about two minutes.
benchmarks/run.py is the one that lets contenders take turns and measures the bound.
"""

from __future__ import annotations

import pytest
import run
import torch
from cases import STRUCTURES, Case
from contenders import CONTENDERS

SHAPES = ("128x10", "128x100", "256x1000", "64x32000")
OPS = ("value", "value+grad", "grad_vjp", "grad_jvp", "hvp")
NAMES = ("kernel, reused outputs", "kernel, fresh outputs", "l2t.dynamic_loss", "eager")
RUNS = [
    pytest.param(Case(shape, structure, op), name, id=f"{shape} {structure} {op} {name}")
    for shape in SHAPES
    for structure in STRUCTURES
    for op in OPS
    for name in NAMES
    if op in CONTENDERS[name].OPS
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_kernel(benchmark, case: Case, name: str) -> None:
    benchmark.group = f"{case.shape} {case.structure} {case.op}"
    benchmark._max_time, benchmark._min_rounds = 0.3, 5
    (entry,) = run.prepare([case], [name], seed=0)
    assert entry.job, entry.left_out
    benchmark.extra_info["error"] = entry.error
    benchmark(entry.job.call)
