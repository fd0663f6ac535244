"""The same definition through torch.compile: forward and backward as generated code, static shapes.

No second order: PyTorch refuses a second backward through a compiled graph. It needs a C++ compiler, or
Triton on a GPU.
"""

from __future__ import annotations

import importlib.util
import shutil

import torch
from cases import Case, Inputs, Job

from contenders import eager

OPS = ("value+grad",)
LOSS = "dynamic"
BACKEND = "inductor"


def why_not(case: Case) -> str | None:
    if case.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler"
    if case.device == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def make(case: Case, inputs: Inputs) -> Job:
    torch._dynamo.reset()  # shapes of earlier cases would make this one dynamic
    return eager.make(case, inputs, torch.compile(eager.definition, backend=BACKEND, dynamic=False))
