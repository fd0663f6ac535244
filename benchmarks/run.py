"""Times the contenders of benchmarks/contenders at the cases of benchmarks/cases.py, all in one process.

A group is one shape, structure of W and op. Every contender of a group computes it once, and its results are
compared with float64: a contender that is wrong gets no time and the run ends with status 1. Then the
contenders take turns, back and forth, each until it has had its seconds, so that whatever else the machine
does meets all of them alike. Among them is the bound: loops that read and write the same bytes and compute
nothing (contenders/triad.py).

Every contender runs with the first of --dtypes and of --threads; the kernels with reused outputs run with the
others too, at value+grad, as a comparison within the same turns.

The rows are written as JSON lines, one for each contender and case, the ones left out with their reason.
benchmarks/draw.py makes docs/benchmarks.md from them, benchmarks/criteria.py the table of what was promised.

Examples:
  python benchmarks/run.py --out rows.jsonl
  python benchmarks/run.py --shapes 128x10 256x1000 --ops value+grad hvp --seconds 5
  python benchmarks/run.py --contenders eager "l2t ops" triad --dtypes bfloat16 --threads 1
  python benchmarks/run.py --gpu --out gpu.jsonl
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cases import (
    DTYPES,
    OPS,
    SHAPES,
    STRUCTURES,
    Case,
    Inputs,
    Job,
    bytes_moved,
    in_float64,
    make_inputs,
    why_not,
)
from clock import CpuClock, CudaClock, card
from contenders import BOUNDS, CONTENDERS, NO_LOSS, cross_entropy, eager
from torch import Tensor
from tqdm import tqdm

from l2t import _native
from l2t.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
# Largest error, of the norm and of any element to the largest one. float32 has to bear with eager's sums over
# 32000 classes, half precision with results that are the neighbours of the rounded ones.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 8e-3, "float16": 1e-3}
LINEAR_TOLERANCE = 3e-2  # of a linear head in bfloat16, whose logits are rounded on the way
LOOP_TOLERANCE = 1e-4  # loops of no loss only have to have run
OTHERS = "kernel, reused outputs"  # whom the other dtypes and numbers of threads are for
TURNS = 300  # at most


class Entry(NamedTuple):
    case: Case
    contender: str
    job: Job | None
    error: float | None
    left_out: str | None


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    device = "cuda" if options.gpu else "cpu"
    clock = CudaClock() if options.gpu else CpuClock()
    setting = describe(options) | (card() if options.gpu else {})
    rows, faults = [], []
    groups = plan(options, device)
    for group in (bar := tqdm(groups, unit="group", disable=None)):
        bar.set_description(f"{group[0].shape} {group[0].structure} {group[0].op}")
        entries = prepare(group, options.contenders, options.seed)
        faults += [e for e in entries if e.left_out and e.left_out.startswith(("wrong", "failed"))]
        rows += [row | setting for row in measure(entries, clock, options.seconds, options.turns)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if options.out:
        write_whole(options.out, text)
    else:
        print(text, end="")
    for entry in faults:
        print(f"{entry.contender} at {' '.join(map(str, entry.case))}: {entry.left_out}", file=sys.stderr)
    return 1 if faults else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NxC",
        default=list(SHAPES),
        help=f"rows x classes ({', '.join(SHAPES)})",
    )
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument(
        "--ops",
        nargs="+",
        choices=OPS,
        metavar="OP",
        help="; ".join(f'"{op}": {what}' for op, what in OPS.items()) + " (all, linear with --gpu only)",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="1 2, at most those there are")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=0.2, help="for a contender in a group (0.2)")
    parser.add_argument("--turns", type=int, default=4, help="of a contender at least (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--gpu", action="store_true", help="on the first CUDA device")
    parser.add_argument(
        "--out", type=Path, help="the file for the rows, written whole; else they are printed"
    )
    options = parser.parse_args(argv)
    if bad := [shape for shape in options.shapes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)]:
        parser.error(f"a shape is rows x classes, such as 128x10, got {bad[0]}")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device and a torch that knows it")
    options.ops = options.ops or [op for op in OPS if options.gpu or op != "linear"]
    options.threads = [n for n in options.threads if n <= _cores()] or [1]
    return options


def plan(options: argparse.Namespace, device: str) -> list[list[Case]]:
    """The groups: first the case that all contenders run, then those for `OTHERS` only."""
    dtype, threads = options.dtypes[0], options.threads[0]
    groups = []
    for shape in options.shapes:
        for structure in options.structures:
            for op in options.ops:
                case = Case(shape, structure, op, dtype, threads, device)
                if op == "linear" and device == "cuda":
                    case = case._replace(dtype="bfloat16")  # CCE takes nothing wider
                others = []
                if op == "value+grad":
                    others = [case._replace(dtype=other) for other in options.dtypes[1:]]
                    if device == "cpu":
                        others += [case._replace(threads=other) for other in options.threads[1:]]
                groups.append([case, *others])
    return groups


def prepare(group: list[Case], contenders: Sequence[str], seed: int) -> list[Entry]:
    """Every contender of a group with its results compared, and the ones left out."""
    entries = []
    for case in group:
        for name in contenders:
            contender = CONTENDERS[name]
            if case.op in contender.OPS and (case is group[0] or name == OTHERS):
                entries.append(_prepare(case, name, seed))
    return entries


def _prepare(case: Case, name: str, seed: int) -> Entry:
    contender = CONTENDERS[name]
    if reason := why_not(case) or contender.why_not(case):
        return Entry(case, name, None, None, reason)
    torch.set_num_threads(case.threads)
    try:
        job = contender.make(case, inputs_of(case, seed))
        error = compare(case, contender.LOSS, job, seed)
    except Exception as failure:  # another project's fault must not cost the other rows: it is in this one
        return Entry(case, name, None, None, f"failed: {type(failure).__name__}: {failure}")
    tolerance = LOOP_TOLERANCE if contender.LOSS in NO_LOSS else TOLERANCE[case.dtype]
    if case.op == "linear" and case.dtype == "bfloat16":
        tolerance = LINEAR_TOLERANCE
    if not error <= tolerance:
        return Entry(case, name, None, error, f"wrong by {error:.1e}, more than {tolerance:.0e}")
    return Entry(case, name, job, error, None)


def inputs_of(case: Case, seed: int) -> Inputs:
    return _inputs(case._replace(op="linear" if case.op == "linear" else "value", threads=1), seed)


@functools.lru_cache(maxsize=4)
def _inputs(case: Case, seed: int) -> Inputs:
    return make_inputs(case, seed)


def compare(case: Case, loss: str, job: Job, seed: int) -> float:
    """The largest relative error of a contender's results."""
    if job.before:
        job.before()
    found = job.call()
    if loss in NO_LOSS:
        expected = NO_LOSS[loss](case, inputs_of(case, seed))
    elif case.op == "linear":
        expected = truth(case._replace(threads=1), loss, seed)
    elif case.op in ("value", "value+grad"):
        expected = truth(case._replace(op="value+grad", threads=1), loss, seed)
        expected = expected[:1] if case.op == "value" else expected
    else:  # the Hessian is symmetric, so that all of second order is one product with the same vector
        widest = case._replace(op="grad_vjp, all", threads=1)
        expected = truth(widest._replace(op="grad_vjp") if why_not(widest) else widest, loss, seed)
        expected = expected if case.to_all else expected[:1]
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} results instead of {len(expected)}")
    errors = [_error(x, y) for x, y in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())  # which is NaN if one of them is


@functools.lru_cache(maxsize=4)
def truth(case: Case, loss: str, seed: int) -> tuple[Tensor, ...]:
    """The results in float64, of the same inputs."""
    definition = eager if loss == "dynamic" else cross_entropy
    torch.set_num_threads(_cores())
    exact = in_float64(inputs_of(case, seed))
    results = definition.make(case._replace(dtype="float64"), exact).call()
    torch.set_num_threads(case.threads)
    return tuple(x.detach() for x in results)


def _error(found: Tensor | float, expected: Tensor) -> Tensor:
    found = torch.as_tensor(found).detach()
    if found.dtype in (torch.bfloat16, torch.float16):  # as good as results of this dtype can be is no error
        expected = expected.to(found.dtype).double()
    difference = found.double() - expected
    if not expected.any():
        return difference.abs().max()
    whole = torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected)
    return torch.maximum(whole, difference.abs().max() / expected.abs().max())


def measure(entries: list[Entry], clock: CpuClock | CudaClock, seconds: float, turns: int) -> list[dict]:
    """The rows of a group."""
    running = [entry for entry in entries if entry.job]
    calls = {}
    for entry in running:
        torch.set_num_threads(entry.case.threads)
        calls[entry] = clock.warm_up(entry.job)
    samples: dict[Entry, list[float]] = {entry: [] for entry in running}
    gc.collect()
    gc.disable()
    left = dict.fromkeys(running, seconds)
    playing, turn = running, 0
    while playing:
        for entry in playing if turn % 2 else reversed(playing):
            if torch.get_num_threads() != entry.case.threads:
                torch.set_num_threads(entry.case.threads)
            begin = time.monotonic()
            samples[entry].append(clock.sample(entry.job, calls[entry]))
            left[entry] -= time.monotonic() - begin
        turn += 1
        playing = [entry for entry in playing if turn < turns or (turn < TURNS and left[entry] > 0)]
    gc.enable()

    bounds = [float(np.median(samples[entry])) for entry in running if entry.contender in BOUNDS]
    return [_row(entry, samples.get(entry), calls.get(entry), entries[0].case, bounds) for entry in entries]


def _row(
    entry: Entry, samples: list[float] | None, calls: int | None, of_bounds: Case, bounds: list[float]
) -> dict[str, object]:
    case = entry.case
    row: dict[str, object] = {**case._asdict(), "contender": entry.contender}
    row |= {"loss": CONTENDERS[entry.contender].LOSS, "error": entry.error}
    if samples is None:
        return row | {"left_out": entry.left_out}
    low, lower, middle, upper, high = np.quantile(samples, (0.1, 0.25, 0.5, 0.75, 0.9)).round(3).tolist()
    row |= {"us": middle, "q10": low, "q25": lower, "q75": upper, "q90": high}
    row |= {"turns": len(samples), "calls": calls}
    moved = bytes_moved(case)
    if moved is not None:
        row |= {"bytes": moved, "gb_per_s": round(moved / middle / 1e3, 2)}
    if bounds and case == of_bounds:
        row |= {"bound_us": min(bounds), "to_bound": round(middle / min(bounds), 3)}
    return row


def describe(options: argparse.Namespace) -> dict[str, object]:
    """Where and of what the rows are."""
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "machine": f"{_processor()}, {_cores()} cores",
        "load": round(os.getloadavg()[0], 1),  # before the run adds its own
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_set": _native.instruction_set(),
        "seed": options.seed,
        "seconds": options.seconds,
    }


def commit() -> str:
    """Of the tree that this file is in, with a + where it differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1]} ({platform.machine()})" if found else platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    raise SystemExit(main())
