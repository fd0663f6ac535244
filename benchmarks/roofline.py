"""The paper roofline of the CUDA kernels on an H100: what is known of them before a GPU is at hand.

For each case of benchmarks/cases.py: the bytes that it has to move and the time that the memory's rate gives
them, and of the kernel that walks over its rows, what it takes of an SM and how many warps of it an SM can
hold. Nothing here is a measurement, and nothing says how near a kernel comes to its bound; that is for
benchmarks/run.py --gpu.

    launches    of csrc/cuda itself, whose sources are compiled for the host with launches that are written
                down instead of run (launches.cpp)
    registers   and static shared memory, read from the installed core's machine code for sm_90

Needs a core with CUDA kernels, a host compiler and cuobjdump (nvidia-cuda-cuobjdump), and no GPU.

Examples:
  python benchmarks/roofline.py --out docs/benchmarks/roofline.md
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cases import DTYPES, RANK, SHAPES, STRUCTURES, Case, bytes_moved

from l2t import _native
from l2t.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
OPS = ("value", "value+grad", "grad_vjp", "grad_vjp, all", "grad_jvp", "grad_jvp, all")
NUMBERS = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}  # l2t_dtype


class Card(NamedTuple):
    """What a kernel meets on a GPU: NVIDIA's data sheet, and the CUDA programming guide's table of limits."""

    name: str
    bytes_per_second: float
    processors: int
    warps: int  # all below are of one processor
    blocks: int
    registers: int
    shared_bytes: int


H100 = Card("H100 SXM", 3.35e12, 132, warps=64, blocks=32, registers=65536, shared_bytes=228 * 1024)


class Kernel(NamedTuple):
    """What a kernel's machine code takes."""

    name: str  # demangled, without parameters
    symbol: str
    registers: int
    shared_bytes: int  # static
    stack_bytes: int  # with what is spilled of the registers

    @property
    def short(self) -> str:
        """Its name without namespaces and template arguments."""
        return re.sub(r"<.*", "", self.name).rpartition("::")[2]


class Launch(NamedTuple):
    """One launch of a call."""

    kernel: str  # as Kernel.name
    blocks: int
    threads: int
    shared_bytes: int  # dynamic


# ---- what nvcc has made ----


def read_kernels(binary: Path, architecture: int) -> dict[str, Kernel]:
    """The kernels that a binary (extension, cubin) has for an architecture, by name."""
    said = cuobjdump("-res-usage", binary, architecture)
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    found = [(symbol, *map(int, numbers)) for symbol, *numbers in re.findall(pattern, said)]
    names = demangled(symbol for symbol, *_ in found)
    # From sm_90 on, what a kernel has of shared memory begins after 1 KB that is the system's.
    of_system = 1024 if architecture >= 90 else 0
    return {
        name: Kernel(name, symbol, registers, max(shared - of_system, 0), stack)
        for name, (symbol, registers, stack, shared) in zip(names, found, strict=True)
    }


def read_machine_code(binary: Path, architecture: int) -> dict[str, list[str]]:
    """The instructions of the same kernels, by symbol."""
    said = cuobjdump("-sass", binary, architecture)
    return {
        part.split()[0]: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?) ;", part, re.M)
        for part in said.split("Function : ")[1:]
    }


def cuobjdump(what: str, binary: Path, architecture: int) -> str:
    """What cuobjdump says of a binary."""
    folders = [
        *os.get_exec_path(),
        *(str(path) for root in sys.path for path in Path(root).glob("nvidia/*/bin")),
    ]
    tools = {name: shutil.which(name, path=os.pathsep.join(folders)) for name in ("cuobjdump", "nvdisasm")}
    for name, path in tools.items():
        if path is None:
            raise RuntimeError(f"There is no {name}: `pip install nvidia-cuda-{name}` brings it on Linux.")
    environment = {**os.environ, "NVDISASM_PATH": str(Path(str(tools["nvdisasm"])).parent)}
    return _run([tools["cuobjdump"], what, "-arch", f"sm_{architecture}", binary], env=environment)


def demangled(symbols: Iterable[str]) -> list[str]:
    """C++ names without parameters, the same from nvcc and from the host compiler."""
    lines = _run(["c++filt"], input="\n".join(symbols)).splitlines()
    names = []
    for line in lines:
        name = line.replace("(anonymous namespace)::", "").removeprefix("void ")
        depth, end = 0, len(name)
        for at, letter in enumerate(name):  # the first parenthesis outside of template arguments
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = at
                break
        names.append(name[:end])
    return names


# ---- what a call launches ----


def compile_launches(folder: Path) -> Path:
    """The program of `launches`, in the folder."""
    program = folder / "launches"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "c++"
    sources = [ROOT / "benchmarks" / "launches.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    settings = [
        "-std=c++17",
        "-no-pie",
        "-fno-pie",
        "-w",
        "-DL2T_CUDA_ON_CPU",
        "-I",
        ROOT / "tests" / "native",
    ]
    _run([compiler, *settings, "-x", "c++", *sources, "-o", program])
    return program


def launches(cases: Sequence[Case], program: Path) -> list[list[Launch]]:
    """The launches of each case."""
    symbols = [line.split() for line in _run(["nm", program]).splitlines()]
    code = [row for row in symbols if len(row) == 3 and row[1] in "tTwW"]
    names = dict(zip((int(row[0], 16) for row in code), demangled(row[2] for row in code), strict=True))
    lines = []
    for case in cases:
        rank = RANK if case.structure == "low rank" else 0
        numbers = (case.to_all, case.rows, case.classes, rank)
        kinds = (STRUCTURES.index(case.structure), NUMBERS[case.dtype])
        lines.append(" ".join([case.op.removesuffix(", all"), *(str(int(x)) for x in (*numbers, *kinds))]))
    found: list[list[Launch]] = []
    for line in _run([program], input="\n".join(lines)).splitlines():
        if line == "case":
            found.append([])
        else:
            address, blocks, threads, shared = line.split()
            found[-1].append(Launch(names[int(address, 16)], int(blocks), int(threads), int(shared)))
    return found


def walk_of(launches: Sequence[Launch]) -> Launch:
    """The one that writes the gradient to the logits, or else the loss: most of the bytes are its."""
    return [launch for launch in launches if "::rows_" in launch.kernel][-1]


# ---- what a processor can hold of it ----


def resident_warps(kernel: Kernel, launch: Launch, card: Card = H100) -> int:
    """Warps of this launch that one processor can hold at once, the CUDA occupancy calculator's way.

    Registers are given to warps in pieces of 256, on a processor of four parts; every block takes 1 KB of
    shared memory beyond its own.
    """
    of_block = -(-launch.threads // 32)
    of_registers = 4 * (card.registers // 4 // (-(-kernel.registers * 32 // 256) * 256)) // of_block
    of_shared = card.shared_bytes // (kernel.shared_bytes + launch.shared_bytes + 1024)
    return of_block * min(card.warps // of_block, card.blocks, of_registers, of_shared)


# ---- the page ----


HOW = """\
What is known of the CUDA kernels without a GPU: no line here is a measurement. `benchmarks/roofline.py` makes
this page from the core's machine code for sm_90 and from the launches that the core itself makes.

* *MB* is what a case has to read and write once in float32: logits, direction, rows of W, gradients. The
  times are those bytes, by dtype, at the 3.35 TB/s of an H100 SXM's memory: what no kernel can beat unless
  the data lie in its 50 MB of cache, and what means nothing where it is less than the launch of a kernel.
* *kernel of the rows* is what writes the gradient to the logits (or the loss), as blocks × threads in
  float32, and *SMs* is how many of the 132 get a block of it. Its registers and shared memory decide how many
  warps an SM can hold, of 64: in float64, float32, bfloat16, float16.
* *other launches* sort the rows by class, add up the gradients to the coefficients, and take the mean."""


def table() -> str:
    """All cases as Markdown: a table for each op."""
    cases = [
        Case(shape, structure, op, dtype)
        for op in OPS
        for shape in SHAPES
        for structure in STRUCTURES
        for dtype in DTYPES
        if not (op.endswith("all") and structure == "full" and shape.endswith("x32000"))  # a second W of 4 GB
    ]
    kernels = read_kernels(Path(_native.__file__), 90)
    with tempfile.TemporaryDirectory() as folder:
        calls = dict(zip(cases, launches(cases, compile_launches(Path(folder))), strict=True))
    lines = [HOW, ""]
    for op in OPS:
        lines += [f"**{op}**", "", _row("shape", "W", *_columns()), _row(*["---"] * (2 + len(_columns())))]
        for shape in SHAPES:
            for structure in STRUCTURES:
                row = [Case(shape, structure, op, dtype) for dtype in DTYPES]
                if row[0] in calls:
                    lines.append(_row(shape, structure, *_cells(row, calls, kernels)))
        lines.append("")
    return "\n".join(lines)


def _columns() -> list[str]:
    return [
        "MB",
        *(f"{dtype}, µs" for dtype in DTYPES),
        "kernel of the rows",
        "SMs",
        "registers",
        "shared, kB",
        "warps an SM",
        "other launches",
    ]


def _cells(row: Sequence[Case], calls: dict[Case, list[Launch]], kernels: dict[str, Kernel]) -> list[str]:
    """One line: the bound in every dtype; bytes and the row kernel in float32, warps in every dtype."""
    walks = {case: walk_of(calls[case]) for case in row}
    (case,) = [case for case in row if case.dtype == "float32"]
    walk = walks[case]
    kernel = kernels[walk.kernel]
    warps = [resident_warps(kernels[walks[case].kernel], walks[case]) for case in row]
    shared = kernel.shared_bytes + walk.shared_bytes
    return [
        _digits(bytes_moved(case) / 1e6),
        *(_digits(bytes_moved(case) / H100.bytes_per_second * 1e6) for case in row),
        f"{kernel.short}, {walk.blocks} × {walk.threads}",
        str(min(walk.blocks, H100.processors)),
        str(kernel.registers),
        f"{shared / 1024:.1f}",
        " ".join(map(str, warps)),
        str(len(calls[case]) - 1),
    ]


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _run(command: Sequence[object], *, stderr: int = subprocess.PIPE, **settings: Any) -> str:
    words = [str(word) for word in command]
    ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=stderr, text=True, **settings)
    if ran.returncode != 0:
        raise RuntimeError(f"{ran.stdout}{ran.stderr}")
    return ran.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a file for the page, in place of standard output")
    options = parser.parse_args()
    page = table()
    if options.out:
        write_whole(options.out, page.encode())
    else:
        print(page)
