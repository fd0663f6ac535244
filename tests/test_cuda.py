"""The CUDA kernels' source on the CPU, every CUDA thread a fiber: native/cuda_on_cpu.h.

In three builds: plain, where several orders of blocks and threads must give the same bits; with the address
and undefined-behaviour sanitizers; with the thread sanitizer, to which a missing barrier is a race in
whatever order. Each kind of fault is planted once (native/faults.cu) and must be found; the correct twin of
each must not be.

Not here: a GPU (the tests with a `device` run there by themselves), the nvcc build (test_cuda_build.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native_build import (
    NATIVE,
    ROOT,
    SANITIZERS,
    built_once,
    compile_all,
    link,
    require_sanitizer,
    run,
    where_kernels_ran,
)

SHIM = ["-O2", "-g"]  # never with a sanitizer: it speaks for the fibers
# Line tables are enough for the reports.
KERNEL = ["-g1", "-Wno-unknown-pragmas", "-DL2T_CUDA_ON_CPU", "-DL2T_ISA=cuda", f"-I{NATIVE}"]


def optimized(sanitizer: str) -> str:
    """-O1 leaves aliasing alone, as nvcc does. Checks of addresses take the optimiser more than it saves."""
    return "-O0" if sanitizer == "address sanitizer" else "-O1"


@pytest.fixture(scope="session", params=SANITIZERS)
def sanitizer(request, tmp_path_factory):
    require_sanitizer(request.param, tmp_path_factory.mktemp("sanitizer"))
    return request.param


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """build(name, sources, sanitizer): the program of that name, compiled by whoever asks first."""

    def shim(folder: Path) -> None:
        compile_all([NATIVE / "cuda_on_cpu.cpp"], SHIM, folder)

    def build(name: str, sources: list[Path], sanitizer: str) -> Path:
        scheduler = built_once(tmp_path_factory, "cuda_on_cpu", shim) / "cuda_on_cpu.o"

        def whole(folder: Path) -> None:
            objects = compile_all(sources, [optimized(sanitizer), *KERNEL, *SANITIZERS[sanitizer]], folder)
            link([*objects, scheduler], sanitizer, folder / name)

        return built_once(tmp_path_factory, f"{name}, {sanitizer}", whole) / name

    return build


# ---- the shim itself ----

LINE = r"faults\.cu:\d+"
REPORT = "CUDA fault|Sanitizer: |runtime error"
RACE = rf"SUMMARY: ThreadSanitizer: data race \S*{LINE}"
OVERFLOW = rf"SUMMARY: AddressSanitizer: heap-buffer-overflow \S*{LINE}"
AT = rf"{LINE}: CUDA fault: block \(0,0,0\), thread \(\d+,0,0\)"

# Fault, build that finds it, and what it says. Plain: a FAIL is NaN in the results or bits that differ.
FAULTS = [
    ("barrier missing before", "plain", "FAIL barrier missing before, first-warp-ahead"),
    ("barrier missing before", "thread sanitizer", RACE),
    ("barrier missing after", "plain", "FAIL barrier missing after"),
    ("barrier missing after", "thread sanitizer", RACE),
    ("barrier in a branch", "plain", f"{AT} waits at __syncthreads for thread number 40 .* has exited"),
    ("two barriers for one", "plain", f"{AT} waits at __syncthreads for thread number 32 .*{LINE}"),
    (
        "mask of an exited lane",
        "plain",
        f"{AT} waits in a shuffle .* for lane 16, .* has exited",
    ),
    ("mask of an absent lane", "plain", f"{AT} waits in a vote .* for lane 16, .* has only 48 threads"),
    ("mask without oneself", "plain", f"{AT} shuffles from lane 31, which its mask 7fffffff does not"),
    (
        "source outside the mask",
        "plain",
        f"{AT} shuffles from lane 16, which its mask 0000ffff does not",
    ),
    ("one mask, two calls", "plain", f"{AT} waits in a shuffle .* for lane 1, .* at a shuffle, .*{LINE}"),
    ("shuffle for a barrier", "thread sanitizer", RACE),
    ("barrier of half a warp", "thread sanitizer", RACE),
    ("read past the end", "address sanitizer", OVERFLOW),
    ("write past the end", "address sanitizer", OVERFLOW),
    ("static shared past the end", "address sanitizer", OVERFLOW),
    (
        "static shared index",
        "address sanitizer",
        rf"{LINE}:\d+: runtime error: index 63 out of bounds",
    ),
    ("dynamic shared past the end", "address sanitizer", OVERFLOW),
    ("shared of nobody", "plain", "FAIL shared of nobody, lockstep"),
    (
        "misaligned wide load",
        "address sanitizer",
        rf"{LINE}:\d+: runtime error: .* misaligned address",
    ),
    ("two blocks, one cell", "thread sanitizer", RACE),
    ("block too large", "plain", r"CUDA fault: no card runs a block of \(1056,1,1\) threads"),
    ("dynamic shared too large", "plain", "a launch with 49153 bytes of dynamic .* 49152 are allowed"),
    ("all shared too large", "plain", "needs 49408 bytes of shared memory in all, where a block has 49152"),
]


@pytest.mark.parametrize(("fault", "found_by", "words"), FAULTS, ids=[f"{f}-{by}" for f, by, _ in FAULTS])
def test_a_planted_fault_is_found(fault, found_by, words, build, tmp_path):
    require_sanitizer(found_by, tmp_path)
    ran = run(build("faults", [NATIVE / "faults.cu"], found_by), fault)
    assert ran.returncode != 0
    assert re.search(words, ran.stdout + ran.stderr), ran.stdout + ran.stderr


def test_every_planted_fault_is_in_the_list():
    planted = re.findall(r'^    \{"([^"]+)",', (NATIVE / "faults.cu").read_text(), flags=re.M)
    assert len(planted) > 15
    assert set(planted) == {fault for fault, _, _ in FAULTS}


def test_of_the_correct_twins_nothing_is_said(sanitizer, build):
    ran = run(build("faults", [NATIVE / "faults.cu"], sanitizer))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not re.search(REPORT, ran.stderr)
    assert ran.stdout.count("ok ") > 2 * 7 * len({fault for fault, _, _ in FAULTS})


# ---- the kernels ----

KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_the_kernels(sanitizer, build):
    program = build("test_cuda", [NATIVE / "test_cuda.cpp", *KERNELS], sanitizer)
    ran = run(program, *([] if sanitizer == "plain" else ["few"]))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not re.search(REPORT, ran.stderr), ran.stderr
    assert ran.stdout.count("ok ") > 500


# ---- the closing line ----


def test_the_last_line_says_where_kernels_ran():
    here = "tests/test_cuda.py::test_the_kernels[address sanitizer]"
    there = ["tests/test_ops.py::test_ops[cuda-full]", "tests/test_ops.py::test_ops[1-cuda]"]
    neither = ["tests/test_cuda.py::test_a_planted_fault_is_found[read]", "tests/test_ops.py::test_ops[cpu]"]
    assert where_kernels_ran(neither, "") == "CUDA kernels ran nowhere."
    assert where_kernels_ran([here, *neither], "") == "CUDA kernels ran on the CPU emulation only (1 tests)."
    assert where_kernels_ran([here, *there], "a card") == (
        "CUDA kernels ran on a card (2 tests) and on the CPU emulation (1)."
    )
