"""The loss of a linear head over many classes: time and peak memory, with the logits whole and in stretches.

The work: hidden (N, D) and the weight (C, D) of a head, random targets; the loss and its gradients to hidden,
head and coefficients (first), or besides these a Hessian-vector product, by a backward of the gradient times
a fixed vector (second).

Contenders, on the same tensors:
  cross-entropy   F.linear and F.cross_entropy, which has no coefficients
  two-step        F.linear and l2t.dynamic_loss
  linear          l2t.dynamic_linear_loss, the logits in stretches of rows
the last two with a diagonal weight and with one of low rank.

Before anything is timed, everything that a contender returns is compared with the two-step form (or with
cross-entropy) in float64; an error (relative norm) above 1e-4, in half precision above 0.02, stops the
benchmark. Then all take turns in one process. The table has the median and the quartiles of the time, the
median over turns of the ratio to the two-step form of the same weight in the same turn, and the peak of what
torch's allocator held beyond what it held before, gradients included. On a machine that is shared, `--clock
cpu` counts the seconds of this process, whose threads are one unless --threads says otherwise.

Examples:
  python benchmarks/linear.py
  python benchmarks/linear.py --order second --rounds 5
  python benchmarks/linear.py --dtype bfloat16 --chunk-rows 256 --json result.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import l2t

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Work(NamedTuple):
    leaves: list[Tensor]  # hidden, head, diagonal, left, right
    target: Tensor
    vectors: list[Tensor]  # of the Hessian-vector product, to hidden and head
    chunk_rows: int | None


def make_work(arguments: argparse.Namespace) -> Work:
    generator = torch.Generator().manual_seed(arguments.seed)
    n, d, c, rank = arguments.rows, arguments.width, arguments.classes, arguments.rank
    dtype = getattr(torch, arguments.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, head = random(n, d).to(dtype), (random(c, d) / d**0.5).to(dtype)
    tables = [1 + 0.1 * random(c), 0.1 * random(c, rank), random(c, rank) * c**-0.5]
    leaves = [x.requires_grad_() for x in (hidden, head, *tables)]
    target = torch.randint(c, (n,), generator=generator)
    return Work(leaves, target, [random(n, d).to(dtype), random(c, d).to(dtype)], arguments.chunk_rows)


def in_float64(work: Work) -> Work:
    return work._replace(
        leaves=[x.detach().double().requires_grad_() for x in work.leaves],
        vectors=[x.double() for x in work.vectors],
    )


def weight_of(work: Work, structure: str) -> l2t.Diagonal | l2t.LowRank:
    _, _, diagonal, left, right = work.leaves
    return l2t.Diagonal(diagonal) if structure == "diagonal" else l2t.LowRank(diagonal, left, right)


def cross_entropy(work: Work, structure: str) -> Tensor:
    hidden, head, *_ = work.leaves
    return F.cross_entropy(F.linear(hidden, head), work.target)


def two_step(work: Work, structure: str) -> Tensor:
    hidden, head, *_ = work.leaves
    return l2t.dynamic_loss(F.linear(hidden, head), work.target, weight_of(work, structure))


def linear(work: Work, structure: str) -> Tensor:
    hidden, head, *_ = work.leaves
    weight = weight_of(work, structure)
    return l2t.dynamic_linear_loss(hidden, head, work.target, weight, chunk_rows=work.chunk_rows)


Case = tuple[str, str]
CONTENDERS = {"cross-entropy": cross_entropy, "two-step": two_step, "linear": linear}
CASES: list[Case] = [
    ("cross-entropy", "none"),
    *itertools.product(("two-step", "linear"), ("diagonal", "low-rank")),
]


def results(work: Work, case: Case, order: str) -> list[Tensor]:
    """The loss and its gradients, and for the second order a Hessian-vector product."""
    contender, structure = case
    count = {"none": 2, "diagonal": 3, "low-rank": 5}[structure]
    leaves = work.leaves[:count]
    loss = CONTENDERS[contender](work, structure)
    first = torch.autograd.grad(loss, leaves, create_graph=order == "second")
    if order == "first":
        return [loss.detach(), *first]
    second = torch.autograd.grad(first[:2], leaves, work.vectors)
    return [loss.detach(), *(x.detach() for x in first), *second]


def check_agreement(work: Work, order: str) -> None:
    allowed = 1e-4 if work.leaves[0].dtype is torch.float32 else 0.02
    exact = in_float64(work)
    for case in CASES:
        truth = results(exact, ("two-step" if case[0] == "linear" else case[0], case[1]), order)
        for i, (found, true) in enumerate(zip(results(work, case, order), truth, strict=True)):
            error = float((found.double() - true).norm() / true.norm())
            if not error < allowed:
                raise SystemExit(f"result {i} of {' '.join(case)} is wrong by {error:.1e}: nothing was timed")


def peak_of(work: Work, case: Case, order: str) -> int:
    """Bytes that torch's allocator holds at most, beyond those that it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        results(work, case, order)
    events = [x for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = (x.nbytes() for x in sorted(events, key=lambda x: x.start_ns()))
    return max(itertools.accumulate(changes))


def measure(work: Work, order: str, rounds: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    seconds: dict[Case, list[float]] = {case: [] for case in CASES}
    for turn in range(rounds + 1):
        for case in CASES if turn % 2 else reversed(CASES):
            gc.collect()
            begin = clock()
            results(work, case, order)
            if turn:  # the first turn warms up
                seconds[case].append(clock() - begin)
    rows = []
    for case in CASES:
        contender, structure = case
        ms = [1e3 * t for t in seconds[case]]
        low, middle, high = quantiles(ms, n=4)
        base = seconds["two-step", "diagonal" if structure == "none" else structure]
        ratio = median(a / b for a, b in zip(seconds[case], base, strict=True))
        row: dict[str, object] = {"contender": contender, "weight": structure}
        row |= {
            "ms": middle,
            "q1": low,
            "q3": high,
            "ratio": ratio,
            "peak_mb": peak_of(work, case, order) / 1e6,
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="rows N of hidden (default 1024)")
    parser.add_argument("--width", type=int, default=512, help="columns D of hidden (default 512)")
    parser.add_argument("--classes", type=int, default=32000, help="classes C (default 32000)")
    parser.add_argument("--rank", type=int, default=4, help="rank of the low-rank weight (default 4)")
    parser.add_argument("--chunk-rows", type=int, help="rows of a stretch (default: the library's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--order", choices=("first", "second"), default="first", help="(default first)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every contender (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="what is counted (default wall)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the tensors (default 0)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    work = make_work(arguments)
    check_agreement(work, arguments.order)
    rows = measure(work, arguments.order, arguments.rounds, CLOCKS[arguments.clock])

    setting = {k: v for k, v in vars(arguments).items() if k != "json"}
    setting |= {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(" ".join(f"{k}={v}" for k, v in setting.items()))
    print(f"{'contender':15}{'weight':10}{'median ms':>10}{'quartiles':>18}{'of two-step':>13}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row['contender']:15}{row['weight']:10}{row['ms']:10.1f}{row['q1']:10.1f}{row['q3']:8.1f}"
            f"{row['ratio']:13.3f}{row['peak_mb']:9.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
