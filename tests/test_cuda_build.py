"""What nvcc has made of the CUDA kernels: no spills, wide loads, room to run.

The machine code of the installed core is read, for the oldest card of its list and for the H100; no GPU takes
part. The launches of the named cases are those that csrc/cuda makes (benchmarks/launches.cpp). Not here: what
the kernels compute (test_cuda.py) and the wheel (test_build.py).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import built_once

from l2t import _native

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CORE = Path(_native.__file__)
ARCHITECTURES = (75, 90)
BUILT = _native.build_info()["cuda_architectures"].split()
pytestmark = pytest.mark.skipif(
    not {f"sm_{number}" for number in ARCHITECTURES} <= set(BUILT),
    reason="the installed core has no CUDA kernels for sm_75 and sm_90: "
    "it was built without nvcc or for other cards",
)
# What a thread may use: with 128 registers an SM of any card holds 16 warps, with 64 it holds 32.
REGISTERS = {"float": 96, "double": 128}
STATIC_SHARED = 2048
WARPS = 16  # of an H100's 64, at the named cases


@pytest.fixture(scope="session")
def roofline():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("roofline", BENCHMARKS / "roofline.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["roofline"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="session")
def kernels(roofline):
    """Architecture -> name -> kernel."""
    return {architecture: roofline.read_kernels(CORE, architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="session")
def cases(roofline):
    return [
        roofline.Case(shape, structure, op, dtype)
        for op in roofline.OPS
        for shape in roofline.SHAPES
        for structure in roofline.STRUCTURES
        for dtype in roofline.DTYPES
        if not (op.endswith("all") and structure == "full" and shape.endswith("x32000"))
    ]


@pytest.fixture(scope="session")
def launches(roofline, cases, tmp_path_factory):
    """Case -> launches."""
    folder = built_once(tmp_path_factory, "cuda launches", roofline.compile_launches)
    return dict(zip(cases, roofline.launches(cases, folder / "launches"), strict=True))


@pytest.fixture(scope="session")
def machine_code(roofline, kernels):
    """Architecture -> kernel -> its instructions."""
    found = {}
    for architecture, of_card in kernels.items():
        code = roofline.read_machine_code(CORE, architecture)
        found[architecture] = {name: code[kernel.symbol] for name, kernel in of_card.items()}
    return found


LOCAL = re.compile(r"\b(?:LDL|STL)\b")
FLOAT64 = re.compile(r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w*64\w*|F2F\.F(?:64\.F32|32\.F64))\b")
WIDE_LOAD, WIDE_STORE = "LDG.E.128", "STG.E.128"


FAULTS = """
__global__ void faults(const float* from, double* to, const int* at, int n) {
  float stack[32];
  for (int i = 0; i < 32; ++i) stack[i] = from[32 * threadIdx.x + i];
  for (int i = 0; i < n; ++i) stack[at[i] & 31] += stack[at[i + 1] & 31];
  to[threadIdx.x] = stack[n & 31] + 0.1;
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
def test_what_the_other_tests_look_for_is_seen_where_it_is(roofline, tmp_path):
    (tmp_path / "faults.cu").write_text(FAULTS)
    command = ["nvcc", "-arch=sm_90", "-cubin", "faults.cu", "-o", "faults.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (kernel,) = roofline.read_kernels(tmp_path / "faults.cubin", 90).values()
    assert (kernel.name, kernel.stack_bytes, kernel.short) == ("faults", 128, "faults")
    ((symbol, lines),) = roofline.read_machine_code(tmp_path / "faults.cubin", 90).items()
    code = "\n".join(lines)
    assert symbol == kernel.symbol
    assert LOCAL.findall(code)
    assert {"DADD", "F2F.F64.F32"} <= set(FLOAT64.findall(code))
    assert WIDE_LOAD not in code
    assert WIDE_STORE not in code


def arithmetic(kernel: str) -> str:
    return "double" if "double" in kernel else "float"


def test_every_card_has_every_kernel(roofline, kernels):
    assert len(kernels[90]) > 100
    for name in BUILT:
        if name.startswith("sm_"):
            assert roofline.read_kernels(CORE, int(name[3:])).keys() == kernels[90].keys(), name


def test_a_missing_tool_is_one_sentence(roofline, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(RuntimeError, match="There is no cuobjdump: `pip install nvidia-cuda-cuobjdump`"):
        roofline.read_kernels(CORE, 90)


def test_no_kernel_spills_registers_or_has_a_stack_frame(kernels, machine_code):
    for architecture, of_card in kernels.items():
        for name, kernel in of_card.items():
            assert kernel.stack_bytes == 0, (architecture, name)
            assert not LOCAL.findall("\n".join(machine_code[architecture][name])), (architecture, name)


def test_every_kernel_stays_within_its_registers_and_shared_memory(kernels):
    for architecture, of_card in kernels.items():
        for name, kernel in of_card.items():
            assert kernel.registers <= REGISTERS[arithmetic(name)], (architecture, name, kernel.registers)
            assert kernel.shared_bytes <= STATIC_SHARED, (architecture, name, kernel.shared_bytes)


def test_every_launch_of_the_named_cases_fits_an_sm_of_h100_several_warps_deep(roofline, kernels, launches):
    for case, calls in launches.items():
        assert calls, case
        for launch in calls:
            kernel = kernels[90][launch.kernel]
            assert launch.threads % 32 == 0, (case, launch)
            assert launch.shared_bytes + kernel.shared_bytes <= 227 * 1024, (case, launch)
            warps = roofline.resident_warps(kernel, launch)
            assert warps >= WARPS, (case, launch, warps)


def test_rows_that_are_aligned_are_loaded_and_stored_16_bytes_at_a_time(roofline, launches, machine_code):
    seen = set()
    for case, calls in launches.items():
        size = roofline.DTYPES[case.dtype].itemsize
        if case.classes * size % 16:
            continue
        walk = roofline.walk_of(calls).kernel
        seen.add(walk)
        code = "\n".join(machine_code[90][walk])
        assert WIDE_LOAD in code, (case, walk)
        assert WIDE_STORE in code, (case, walk)
    assert len(seen) > 8


def test_float32_rows_know_no_float64_arithmetic(machine_code):
    """Which runs at a 64th of the rate on most cards."""
    walks = [name for name in machine_code[90] if "::rows_" in name]
    assert walks
    for architecture in ARCHITECTURES:
        for name in walks:
            found = FLOAT64.findall("\n".join(machine_code[architecture][name]))
            assert bool(found) == ("double" in name), (architecture, name, found[:3])
