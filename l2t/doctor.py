"""`l2t doctor`: what is installed, what was built in, and whether the compiled loss is right on this machine.

`examine` returns the findings, `main` prints them. Nothing is repaired: a bad finding says what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import NamedTuple

import numpy as np
import torch

import l2t
from l2t import _native, reference

PACKAGES = {  # distribution: what needs it
    "scikit-learn": "the task digits",
    "mnist1d": "the task mnist1d",
    "scipy": "l2t compare",
    "matplotlib": "l2t report",
}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


class Finding(NamedTuple):
    """One line of the examination: `good` is False where something has to be done, None where it may be."""

    section: str
    name: str
    value: str
    good: bool | None = True


def examine() -> list[Finding]:
    """Everything that `l2t doctor` says, in its order."""
    return [*_versions(), *_machine(), *_core(), *_packages()]


def main() -> int:
    """Prints the findings; returns 0 where the compiled loss is right, 1 where it is not."""
    findings, section = examine(), ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(f"\n{section}" if finding is not findings[0] else section)
        mark = {True: " ", False: "!", None: "-"}[finding.good]
        print(f"{mark} {finding.name:<18} {finding.value}")
    wrong = [finding for finding in findings if finding.good is False]
    print(
        f"\nTo be mended: {', '.join(finding.name for finding in wrong)}."
        if wrong
        else "\nThe compiled loss works here."
    )
    return int(bool(wrong))


def versions() -> dict[str, str]:
    """Versions that a run's result may depend on, for its config.json."""
    return {
        "l2t": l2t.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _versions() -> list[Finding]:
    return [
        Finding("versions", "l2t", f"{l2t.__version__}  ({os.path.dirname(l2t.__file__)})"),
        Finding("versions", "python", f"{platform.python_version()}  ({sys.executable})"),
        Finding("versions", "torch", torch.__version__),
        Finding("versions", "numpy", np.__version__),
        Finding("versions", "platform", platform.platform()),
    ]


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        Finding("machine", "processor", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}"),
        Finding(
            "machine", "threads", f"{torch.get_num_threads()} (torch.set_num_threads; the loss follows it)"
        ),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.append(Finding("machine", f"cuda:{index}", torch.cuda.get_device_name(index)))
    else:
        built = (
            f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "a torch without CUDA"
        )
        found.append(Finding("machine", "cuda", f"no device ({built})", None))
    return found


def _core() -> list[Finding]:
    built = _native.build_info()
    found = [
        Finding("compiled core", name.replace("_", " "), str(value).strip() or "-")
        for name, value in built.items()
    ]
    if built["version"] != l2t.__version__:
        found.append(
            Finding(
                "compiled core",
                "same version",
                f"built as {built['version']}: run pip install . again",
                False,
            )
        )
    for dtype, tolerance in TOLERANCE.items():
        error = kernel_error(dtype)
        name = f"agrees in {str(dtype).removeprefix('torch.')}"
        value = f"largest difference to plain torch {error:.1e}, allowed {tolerance:.0e}"
        found.append(Finding("compiled core", name, value, error <= tolerance))
    return found


def kernel_error(dtype: torch.dtype) -> float:
    """Largest relative difference of the compiled ops to plain torch over every link and structure.

    Loss, first and second derivatives of a small batch, each against the norm of what plain torch gives in
    float64.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, classes, rank = 7, 5, 2
    logits, v_loss, bias, scale = normal(rows, classes), normal(rows), normal(classes), normal(classes)
    target = torch.arange(rows) % classes
    left, right = normal(classes, rank), normal(classes, rank)
    worst = 0.0
    structures = (
        (normal(classes, classes), None, None),
        (normal(classes), None, None),
        (normal(classes), left, right),
    )
    for link in range(len(reference.LINKS)):
        for tables in structures:
            present = [tensor is not None for tensor in (logits, *tables, bias, scale)]
            cotangents = [None if x is None else normal(*x.shape) for x in (logits, *tables, bias, scale)]
            results = []
            for ops, kind in ((torch.ops.l2t, dtype), (reference, torch.float64)):
                (
                    z,
                    *coefficients,
                    v,
                ) = (None if x is None else x.to(kind) for x in (logits, *tables, bias, scale, v_loss))
                where = (z, target, *coefficients, link, -100, 1)
                loss, stats = ops.value(*where)
                x = [None if tensor is None else tensor.to(kind) for tensor in cotangents]
                results.append(
                    [
                        loss,
                        *ops.grad(*where, stats, v, present),
                        *ops.grad_vjp(*where, stats, v, *x, [True, *present]),
                    ]
                )
            for got, expected in zip(*results, strict=True):
                if expected.numel():
                    difference = (got.double() - expected).norm() / expected.norm().clamp(min=1e-6)
                    worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def _packages() -> list[Finding]:
    found = []
    for package, purpose in PACKAGES.items():
        try:
            found.append(
                Finding("optional packages", package, f"{importlib.metadata.version(package)}  ({purpose})")
            )
        except importlib.metadata.PackageNotFoundError:
            missing = f"not installed, needed for {purpose}: pip install 'l2t[tasks]'"
            found.append(Finding("optional packages", package, missing, None))
    return found
