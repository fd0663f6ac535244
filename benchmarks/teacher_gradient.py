"""One teacher gradient, by plain autograd through the whole run and by l2t.unroll, side by side.

The work: a student MLP 64-128-10 takes T = 50 steps of SGD on scikit-learn's handwritten digits (batch 32)
under the loss -sigmoid(W[y] . log p + b[y]); then d (dev cross-entropy) / d (W, b) through all of its steps.

Contenders, on the same batches from the same start:
  plain      a loop of torch.autograd.grad(create_graph=True) and one backward at the end
  unroll     l2t.unroll: every step's graph is kept
  recompute  l2t.unroll(curvature="recompute"): weights are kept, every step is run again in the walk back
each with the student written in two ways,
  bare       one module that calls torch.nn.functional; the plain loop calls the function on a list of tensors
  layers     nn.Sequential; the plain loop calls it by torch.func.functional_call, as such loops are written
and with the loss in two ways: written out in torch operations ("eager") and as l2t.dynamic_loss ("fused").

Before anything is timed, every contender's gradient is compared with that of a plain loop in float64; one
that differs by more than 1e-5 (relative norm) stops the benchmark. Then all take turns in one process. The
table has the median and the quartiles of the time of one teacher gradient, and the median, over turns, of its
ratio to the plain loop of the same student and loss in the same turn: l2t claims less than 1 for `unroll` of
`layers`, and about 1 for `bare`, where it alone pays for a module. On a machine that is shared, `--clock cpu`
counts the seconds of this process's only thread.

Examples:
  python benchmarks/teacher_gradient.py
  python benchmarks/teacher_gradient.py --momentum 0.9 --lr 0.1 --json result.json
  python benchmarks/teacher_gradient.py --hidden 500 --batch 64 --steps 100 --rounds 10
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import l2t

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
AGREEMENT = 1e-5


class Work(NamedTuple):
    layers: nn.Sequential
    batches: list[tuple[Tensor, Tensor]]
    dev: tuple[Tensor, Tensor]
    weight: Tensor
    bias: Tensor
    lr: float
    momentum: float


def make_work(arguments: argparse.Namespace) -> Work:
    torch.manual_seed(arguments.seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    dev, train = torch.randperm(len(x)).split([256, len(x) - 256])
    rows = [train[torch.randint(len(train), (arguments.batch,))] for _ in range(arguments.steps)]
    layers = nn.Sequential(nn.Linear(64, arguments.hidden), nn.ReLU(), nn.Linear(arguments.hidden, 10))
    weight = (torch.eye(10) + 0.1 * torch.randn(10, 10)).requires_grad_()
    bias = torch.zeros(10, requires_grad=True)
    batches = [(x[i], y[i]) for i in rows]
    return Work(layers, batches, (x[dev], y[dev]), weight, bias, arguments.lr, arguments.momentum)


def in_float64(work: Work) -> Work:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    return work._replace(
        layers=copy.deepcopy(work.layers).double(),
        batches=[(x.double(), y) for x, y in work.batches],
        dev=(work.dev[0].double(), work.dev[1]),
        weight=leaf(work.weight),
        bias=leaf(work.bias),
    )


def eager_loss(logits: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = (weight[target] * F.log_softmax(logits, dim=1)).sum(dim=1) + bias[target]
    return -torch.sigmoid(u).mean()


def fused_loss(logits: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return l2t.dynamic_loss(logits, target, weight, bias)


class Bare(nn.Module):
    """The two layers in one module, without the cost of calling modules inside of it."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        first, _, second = layers
        self.first_weight, self.first_bias = first.weight, first.bias
        self.second_weight, self.second_bias = second.weight, second.bias

    @staticmethod
    def function(w: Sequence[Tensor], x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w[0], w[1])), w[2], w[3])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(list(self._parameters.values()), x)


def call_plainly(student: nn.Module) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """The student as a function of its parameters, as a plain loop calls it."""
    if isinstance(student, Bare):
        return student.function
    names = [name for name, _ in student.named_parameters()]
    return lambda w, x: torch.func.functional_call(student, dict(zip(names, w, strict=True)), (x,))


def plain(work: Work, student: nn.Module, loss: Loss) -> None:
    model = call_plainly(student)
    w = [p.detach().requires_grad_() for p in student.parameters()]
    m = None
    for x, y in work.batches:
        value = loss(model(w, x), y, work.weight, work.bias)
        g = torch.autograd.grad(value, w, create_graph=True)
        m = (
            g
            if m is None or not work.momentum
            else [work.momentum * a + b for a, b in zip(m, g, strict=True)]
        )
        w = [p - work.lr * v for p, v in zip(w, m, strict=True)]
    F.cross_entropy(model(w, work.dev[0]), work.dev[1]).backward(inputs=[work.weight, work.bias])


def unroll(work: Work, student: nn.Module, loss: Loss, curvature: str = "reverse") -> None:
    run = l2t.unroll(
        student,
        work.batches,
        lambda model, batch, step: loss(model(batch[0]), batch[1], work.weight, work.bias),
        lambda model: F.cross_entropy(model(work.dev[0]), work.dev[1]),
        optimizer=l2t.optim.SGD(lr=work.lr, momentum=work.momentum),
        curvature=curvature,
    )
    run.backward()


def recompute(work: Work, student: nn.Module, loss: Loss) -> None:
    unroll(work, student, loss, "recompute")


CONTENDERS: dict[str, Callable[[Work, nn.Module, Loss], None]] = {
    "plain": plain,
    "unroll": unroll,
    "recompute": recompute,
}
STUDENTS: dict[str, Callable[[nn.Sequential], nn.Module]] = {"bare": Bare, "layers": lambda layers: layers}
LOSSES: dict[str, Loss] = {"eager": eager_loss, "fused": fused_loss}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Case = tuple[str, str, str]


def teacher_gradient(
    work: Work, case: Case, clock: Callable[[], float] = time.perf_counter
) -> tuple[Tensor, float]:
    """The gradient, and the seconds it took."""
    contender, student, loss = CONTENDERS[case[0]], STUDENTS[case[1]](work.layers), LOSSES[case[2]]
    work.weight.grad = work.bias.grad = None
    start = clock()
    contender(work, student, loss)
    seconds = clock() - start
    return torch.cat([work.weight.grad.flatten(), work.bias.grad]), seconds


def check_agreement(work: Work, cases: list[Case]) -> None:
    reference, _ = teacher_gradient(in_float64(work), ("plain", "bare", "eager"))
    for case in cases:
        found, _ = teacher_gradient(work, case)
        error = float((found.double() - reference).norm() / reference.norm())
        if not error < AGREEMENT:
            raise SystemExit(f"{' '.join(case)} is wrong by {error:.1e}: nothing was timed")


def measure(
    work: Work, cases: list[Case], rounds: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 1):
        for case in cases if turn % 2 else reversed(cases):
            gc.collect()
            _, taken = teacher_gradient(work, case, clock)
            if turn:  # the first turn warms up
                seconds[case].append(taken)
    rows = []
    for case in cases:
        ms = [1e3 * t for t in seconds[case]]
        low, middle, high = quantiles(ms, n=4)
        base = seconds["plain", case[1], case[2]]
        ratio = median(a / b for a, b in zip(seconds[case], base, strict=True))
        names = dict(zip(("contender", "student", "loss"), case, strict=True))
        rows.append(names | {"ms": middle, "q1": low, "q3": high, "ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="steps T of the student (default 50)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the student (default 128)")
    parser.add_argument("--lr", type=float, default=1.0, help="the student's learning rate (default 1.0)")
    parser.add_argument("--momentum", type=float, default=0.0, help="the student's momentum (default 0)")
    parser.add_argument("--rounds", type=int, default=60, help="turns of every contender (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="what is counted (default wall)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of split, batches and start (default 0)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    work = make_work(arguments)
    cases = [
        (contender, student, loss) for loss in LOSSES for student in STUDENTS for contender in CONTENDERS
    ]
    check_agreement(work, cases)
    rows = measure(work, cases, arguments.rounds, CLOCKS[arguments.clock])

    setting = {k: v for k, v in vars(arguments).items() if k != "json"}
    setting |= {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(" ".join(f"{k}={v}" for k, v in setting.items()))
    print(f"{'loss':7}{'student':9}{'contender':10}{'median ms':>10}{'quartiles':>16}{'of plain':>10}")
    for row in rows:
        print(
            f"{row['loss']:7}{row['student']:9}{row['contender']:10}"
            f"{row['ms']:10.2f}{row['q1']:9.2f}{row['q3']:7.2f}{row['ratio']:10.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
