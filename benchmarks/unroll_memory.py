"""What a teacher gradient costs in memory and time by schedule: extra peak resident memory of a process.

The student is an MLP 784-500-10 on random data, batch 64, SGD with momentum 0.9; the meta tensor is a
weight for each sample. Every schedule has a process of its own, since a peak is a process's; its gradient
must have the bits of storing everything. "Extra" is by how much the peak exceeds the memory before the run.
glibc keeps small blocks that were freed, which is not the schedule's doing: MALLOC_MMAP_THRESHOLD_=65536 is
set for each process, at some cost in time; --malloc leaves it as it is.

Examples:
  python benchmarks/unroll_memory.py
  python benchmarks/unroll_memory.py --malloc
  python benchmarks/unroll_memory.py --steps 10000 --schedules auto disk
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import l2t


def one(arguments: argparse.Namespace, schedule: str) -> dict[str, object]:
    """Runs and walks back in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = torch.nn.Sequential(
        torch.nn.Linear(784, arguments.hidden), torch.nn.ReLU(), torch.nn.Linear(arguments.hidden, 10)
    )
    x, y = torch.randn(20, 64, 784), torch.randint(10, (20, 64))
    weight = torch.ones(20, 64, requires_grad=True)

    def loss(model: torch.nn.Module, batch: int, step: int) -> torch.Tensor:
        return l2t.dynamic_loss(model(x[batch]), y[batch], link="identity", sample_weight=weight[batch])

    def measure(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x[0]), y[0])

    def run(steps: int, **plan: object) -> l2t.Run:
        return l2t.unroll(
            student,
            [step % 20 for step in range(steps)],
            loss,
            measure,
            optimizer=l2t.optim.SGD(lr=0.05, momentum=0.9),
            **plan,
        )

    run(2).backward()
    weight.grad = None
    before = resident()
    plan = (
        {"schedule": schedule}
        if schedule in ("all", "every")
        else {
            "schedule": schedule,
            "memory": arguments.memory,
        }
    )
    start = time.perf_counter()
    result = run(arguments.steps, **plan)
    result.backward()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    return {
        "schedule": schedule,
        "extra_mb": peak - before,
        "seconds": seconds,
        "steps_again": result.report.steps_again,
        "bits": hashlib.sha256(weight.grad.numpy().tobytes()).hexdigest()[:12],
    }


def resident(field: str = "VmRSS") -> float:
    """Resident memory of this process in MB; with "VmHWM" at its peak.

    The peak that getrusage tells begins at that of the process which started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="steps T of the student (default 400)")
    parser.add_argument("--hidden", type=int, default=500, help="width of the student (default 500)")
    parser.add_argument("--memory", default="64MB", help="for auto, binomial and disk (default 64MB)")
    parser.add_argument(
        "--schedules", nargs="+", default=["all", "every", "auto", "binomial", "disk"], help="which ones"
    )
    parser.add_argument("--malloc", action="store_true", help="leave glibc's malloc as it is")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(one(arguments, arguments.schedules[0])))
        return
    environment = dict(os.environ) if arguments.malloc else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    own = ["--steps", str(arguments.steps), "--hidden", str(arguments.hidden), "--memory", arguments.memory]
    rows = []
    sizes = f"steps={arguments.steps} hidden={arguments.hidden} memory={arguments.memory}"
    print(f"{sizes} torch={torch.__version__}")
    print("schedule   extra MB   seconds   of the first   steps taken again")
    for schedule in arguments.schedules:
        command = [sys.executable, __file__, "--alone", "--schedules", schedule, *own]
        ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        row = json.loads(ran.stdout)
        rows.append(row)
        ratio = row["seconds"] / rows[0]["seconds"]
        print(
            f"{schedule:9} {row['extra_mb']:9.0f} {row['seconds']:9.2f} {ratio:14.2f} "
            f"{row['steps_again']:19}",
            flush=True,
        )
        if row["bits"] != rows[0]["bits"]:
            raise SystemExit(f"{schedule} gives another gradient: {row['bits']}, not {rows[0]['bits']}")


if __name__ == "__main__":
    main()
