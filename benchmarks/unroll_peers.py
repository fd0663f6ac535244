"""One exact teacher gradient by l2t.unroll and by the libraries that also have one: memory, and time.

The work: a student takes T steps of SGD under the loss -sigmoid(W[y] . log p + b[y]), written out in plain
operations for everybody, on random data; then d (cross-entropy on other data) / d (W, b) through all steps.
The students: the MLP 64-128-10 at batch 32, the MLP 784-500-10 and a LeNet (20 and 50 channels, 500 hidden
units) at batch 64.

The contenders, with --momentum of SGD where they know it:
  autograd           torch.func.functional_call and torch.autograd.grad(create_graph=True), and one backward
  higher, torchopt   their differentiable optimisers: the same graph
  jax scan           jax.grad of a lax.scan, compiled; jax scan, remat: its step under jax.checkpoint
  l2t                l2t.unroll, every step remembered
  l2t 64MB           the same with memory="64MB"
  l2t fused          l2t with l2t.dynamic_loss in the place of the loss that is written out
  l2t compiled       l2t with compile=True; what that takes once is left out, as it is for JAX
  l2t one-sided      curvature="one-sided": not exact, and held to five percent
  plain training     the steps alone, with torch.optim.SGD: what a reverse pass is measured against

Peers are no requirement of l2t and are left out, with a line that says so, where they cannot be imported.
They go into a place of their own, without a torch of theirs, which --peers then names:
  python -m venv peers && peers/bin/pip install --no-deps higher torchopt optree graphviz
  peers/bin/pip install "jax[cpu]"

Each gradient is compared with autograd's in float64 (relative norm, 1e-5; 1e-4 over the long runs of the
memory rows): one that is further off gets no numbers.
Memory: each contender has processes of its own, and "extra" is by how much its peak resident memory exceeds
what was resident after two steps and, for JAX, after compiling: once with glibc's heap as it is, which keeps
freed blocks that live ones lie between, and once with MALLOC_MMAP_THRESHOLD_=65536, by which they are
returned, and the peak is nearly what the run itself remembers.
Time: the contenders take turns in one process on one core, back and forth. A row has the median and quartiles
of one teacher gradient, and the median over turns of its ratio to autograd's in the same turn.

Examples:
  python benchmarks/unroll_peers.py --peers peers --out docs/benchmarks/unroll.jsonl
  python benchmarks/unroll_peers.py --students 64-128-10 --steps 5 --rounds 2 --memory-steps 10
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2t
from l2t.files import write_whole

Row = dict[str, Any]
KEPT = 20  # different batches; longer runs come by them again
AGREEMENT = {"l2t one-sided": 5e-2}  # of the others 1e-5


class Work(NamedTuple):
    layers: nn.Sequential
    x: Tensor  # [batches, samples, ...]
    y: Tensor  # [batches, samples]
    dev: tuple[Tensor, Tensor]
    weight: Tensor
    bias: Tensor
    order: list[int]  # the batch of each step
    lr: float
    momentum: float

    def gradient(self) -> Tensor:
        return torch.cat([self.weight.grad.flatten(), self.bias.grad])


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))


def lenet() -> nn.Sequential:
    features = [
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


class Student(NamedTuple):
    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    batch: int
    steps: int
    memory_steps: int


STUDENTS = {
    "64-128-10": Student(lambda: mlp(64, 128, 10), (64,), 32, 50, 400),
    "784-500-10": Student(lambda: mlp(784, 500, 10), (784,), 64, 50, 400),
    "LeNet": Student(lenet, (1, 28, 28), 64, 30, 40),
}


def make_work(name: str, steps: int, momentum: float, dtype: torch.dtype = torch.float32) -> Work:
    """The same numbers for every dtype."""
    student = STUDENTS[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = student.make().to(dtype)
    x = torch.randn(KEPT, student.batch, *student.shape, generator=generator)
    y = torch.randint(10, (KEPT, student.batch), generator=generator)
    weight = (torch.eye(10) + 0.1 * torch.randn(10, 10, generator=generator)).to(dtype).requires_grad_()
    bias = torch.zeros(10, dtype=dtype, requires_grad=True)
    order, x = [t % (KEPT - 1) for t in range(steps)], x.to(dtype)
    return Work(layers, x, y, (x[-1], y[-1]), weight, bias, order, 0.05, momentum)


def loss_of(logits: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return -torch.sigmoid((weight[target] * F.log_softmax(logits, dim=1)).sum(dim=1) + bias[target]).mean()


# ---- contenders: of the work they make what is called, and timed, for one teacher gradient


def autograd(work: Work) -> Callable[[], Tensor]:
    def run() -> Tensor:
        weights = {name: p.detach().requires_grad_() for name, p in work.layers.named_parameters()}
        moved: dict[str, Tensor] = {}
        for i in work.order:
            logits = torch.func.functional_call(work.layers, weights, (work.x[i],))
            loss = loss_of(logits, work.y[i], work.weight, work.bias)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            for name, g in zip(list(weights), grads, strict=True):
                moved[name] = work.momentum * moved[name] + g if work.momentum and name in moved else g
                weights[name] = weights[name] - work.lr * moved[name]
        measure = F.cross_entropy(
            torch.func.functional_call(work.layers, weights, (work.dev[0],)), work.dev[1]
        )
        measure.backward(inputs=[work.weight, work.bias])
        return work.gradient()

    return run


def unroll(fused: bool = False, **options: Any) -> Callable[[Work], Callable[[], Tensor]]:
    def contender(work: Work) -> Callable[[], Tensor]:
        taught = l2t.dynamic_loss if fused else loss_of

        def run() -> Tensor:
            l2t.unroll(
                work.layers,
                work.order,
                lambda model, i, step: taught(model(work.x[i]), work.y[i], work.weight, work.bias),
                lambda model: F.cross_entropy(model(work.dev[0]), work.dev[1]),
                optimizer=l2t.optim.SGD(lr=work.lr, momentum=work.momentum),
                **options,
            ).backward()
            return work.gradient()

        return run

    return contender


@functools.cache
def loss_on_tensors(weight: Tensor, bias: Tensor) -> Callable[..., Tensor]:
    """The same function for every run, since compiled code is kept with it."""
    return lambda model, batch, step: loss_of(model(batch[0]), batch[1], weight, bias)


def compiled(work: Work) -> Callable[[], Tensor]:
    def run() -> Tensor:
        l2t.unroll(
            work.layers,
            [(work.x[i], work.y[i]) for i in work.order],
            loss_on_tensors(work.weight, work.bias),
            lambda model: F.cross_entropy(model(work.dev[0]), work.dev[1]),
            optimizer=l2t.optim.SGD(lr=work.lr, momentum=work.momentum),
            meta=[work.weight, work.bias],
            compile=True,
        ).backward()
        return work.gradient()

    return run


def higher(work: Work) -> Callable[[], Tensor]:
    peer = importlib.import_module("higher")
    optimizer = torch.optim.SGD(work.layers.parameters(), lr=work.lr, momentum=work.momentum)

    def run() -> Tensor:
        with peer.innerloop_ctx(work.layers, optimizer) as (model, inner):
            for i in work.order:
                inner.step(loss_of(model(work.x[i]), work.y[i], work.weight, work.bias))
            F.cross_entropy(model(work.dev[0]), work.dev[1]).backward(inputs=[work.weight, work.bias])
        return work.gradient()

    return run


def torchopt(work: Work) -> Callable[[], Tensor]:
    peer = importlib.import_module("torchopt")

    def run() -> Tensor:
        start = peer.extract_state_dict(work.layers, by="reference", detach_buffers=True)
        inner = peer.MetaSGD(work.layers, lr=work.lr, momentum=work.momentum)
        for i in work.order:
            inner.step(loss_of(work.layers(work.x[i]), work.y[i], work.weight, work.bias))
        F.cross_entropy(work.layers(work.dev[0]), work.dev[1]).backward(inputs=[work.weight, work.bias])
        peer.recover_state_dict(work.layers, start)
        return work.gradient()

    return run


def jax_scan(remat: bool) -> Callable[[Work], Callable[[], Tensor]]:
    def contender(work: Work) -> Callable[[], Tensor]:
        jax = importlib.import_module("jax")
        lax, np = jax.lax, jax.numpy

        def model(weights: list[Any], x: Any) -> Any:
            rest = iter(weights)
            for layer in work.layers:
                if isinstance(layer, nn.Linear):
                    x = x @ next(rest).T + next(rest)
                elif isinstance(layer, nn.Conv2d):
                    x = lax.conv(x, next(rest), (1, 1), "VALID") + next(rest)[:, None, None]
                elif isinstance(layer, nn.MaxPool2d):
                    x = lax.reduce_window(x, -np.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
                elif isinstance(layer, nn.ReLU):
                    x = jax.nn.relu(x)
                else:
                    assert isinstance(layer, nn.Flatten)
                    x = x.reshape(len(x), -1)
            return x

        def measure(teacher: Any, weights: Any, x: Any, y: Any, order: Any) -> Any:
            def loss(weights: Any, i: Any) -> Any:
                log_p = jax.nn.log_softmax(model(weights, x[i]))
                u = (teacher[0][y[i]] * log_p).sum(axis=1) + teacher[1][y[i]]
                return -jax.nn.sigmoid(u).mean()

            def step(state: Any, i: Any) -> Any:
                weights, moved = state
                moved = [
                    work.momentum * m + g for m, g in zip(moved, jax.grad(loss)(weights, i), strict=True)
                ]
                return ([w - work.lr * m for w, m in zip(weights, moved, strict=True)], moved), None

            start = (weights, [np.zeros_like(w) for w in weights])
            (weights, _), _ = lax.scan(jax.checkpoint(step) if remat else step, start, order)
            return -np.take_along_axis(jax.nn.log_softmax(model(weights, x[-1])), y[-1][:, None], 1).mean()

        def given(x: Tensor) -> Any:
            return np.asarray(x.detach().numpy())

        teacher = given(work.weight), given(work.bias)
        weights = [given(p) for p in work.layers.parameters()]
        arguments = teacher, weights, given(work.x), given(work.y), np.asarray(work.order)
        compiled = jax.jit(jax.grad(measure)).lower(*arguments).compile()

        def run() -> Tensor:
            found = jax.block_until_ready(compiled(*arguments))
            return torch.cat([torch.tensor(x.__array__()).flatten() for x in found])

        return run

    return contender


def plain_training(work: Work) -> Callable[[], None]:
    def run() -> None:
        weights = [p.detach().clone() for p in work.layers.parameters()]
        optimizer = torch.optim.SGD(work.layers.parameters(), lr=work.lr, momentum=work.momentum)
        for i in work.order:
            optimizer.zero_grad()
            loss = loss_of(work.layers(work.x[i]), work.y[i], work.weight.detach(), work.bias.detach())
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, start in zip(work.layers.parameters(), weights, strict=True):
                p.copy_(start)

    return run


CONTENDERS: dict[str, Callable[[Work], Callable[[], Tensor | None]]] = {
    "autograd": autograd,
    "higher": higher,
    "torchopt": torchopt,
    "jax scan": jax_scan(remat=False),
    "jax scan, remat": jax_scan(remat=True),
    "l2t": unroll(),
    "l2t 64MB": unroll(memory="64MB"),
    "l2t fused": unroll(fused=True),
    "l2t compiled": compiled,
    "l2t one-sided": unroll(curvature="one-sided"),
    "plain training": plain_training,
}


# ---- what is measured


def called(work: Work, run: Callable[[], Tensor | None]) -> Tensor | None:
    work.weight.grad = work.bias.grad = None
    return run()


class Entry(NamedTuple):
    name: str
    run: Callable[[], Tensor | None] | None
    error: float | None
    left_out: str | None


def prepare(work: Work, name: str, reference: Tensor) -> Entry:
    """A contender whose gradient has been compared."""
    try:
        run = CONTENDERS[name](work)
        found = called(work, run)
    except ImportError as error:
        return Entry(name, None, None, f"not installed: {error}")
    except Exception as error:  # of a peer: the others are measured all the same
        return Entry(name, None, None, f"failed: {type(error).__name__}: {error}".splitlines()[0])
    off, wrong = compared(name, found, reference, 1e-5)
    return Entry(name, None if wrong else run, off, wrong)


def compared(
    name: str, found: Tensor | None, reference: Tensor, room: float
) -> tuple[float | None, str | None]:
    """How far off a gradient is, and what is said where that is too far."""
    if found is None:
        return None, None
    off = float((found.double() - reference).norm() / reference.norm())
    return off, None if off <= AGREEMENT.get(name, room) else f"wrong by {off:.1e}"


def truth(name: str, steps: int, momentum: float) -> Tensor:
    work = make_work(name, steps, momentum, torch.float64)
    found = called(work, autograd(work))
    assert found is not None
    return found


def times(name: str, steps: int, options: argparse.Namespace) -> Iterator[Row]:
    """A row a contender, all of them in turns."""
    work, reference = make_work(name, steps, options.momentum), truth(name, steps, options.momentum)
    entries = [prepare(work, contender, reference) for contender in options.contenders]
    there = [entry for entry in entries if entry.run]
    ms: dict[str, list[float]] = {entry.name: [] for entry in there}
    for turn in range(options.rounds):
        for entry in there if turn % 2 else reversed(there):
            gc.collect()
            assert entry.run
            start = time.perf_counter()
            called(work, entry.run)
            ms[entry.name].append(1e3 * (time.perf_counter() - start))
    for entry in entries:
        row: Row = {
            "what": "time",
            "student": name,
            "steps": steps,
            "contender": entry.name,
            "error": entry.error,
        }
        if entry.run is None:
            yield row | {"left_out": entry.left_out}
            continue
        low, middle, high = quantiles(ms[entry.name], n=4) if options.rounds > 1 else ms[entry.name] * 3
        row |= {"ms": middle, "q25": low, "q75": high}
        if "autograd" in ms:
            row["of_autograd"] = median(a / b for a, b in zip(ms[entry.name], ms["autograd"], strict=True))
        yield row


def extra_memory(name: str, steps: int, contender: str, options: argparse.Namespace) -> Row:
    """A row of this process, which has not done anything before."""
    short = make_work(name, 2, options.momentum)
    checked = prepare(short, contender, truth(name, 2, options.momentum))
    if checked.run is None:
        return {"error": checked.error, "left_out": checked.left_out}
    work = short._replace(order=make_work(name, steps, options.momentum).order)
    run = CONTENDERS[contender](work)
    del short, checked
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _status("VmRSS"), time.perf_counter()
    found = called(work, run)
    seconds, peak = time.perf_counter() - start, _status("VmHWM")
    off, wrong = compared(contender, found, truth(name, steps, options.momentum), 1e-4)
    row = {"error": off, "extra_mb": peak - before, "seconds": seconds}
    return {"error": off, "left_out": wrong} if wrong else row


def _status(field: str) -> float:
    """A size of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def memory(name: str, steps: int, options: argparse.Namespace) -> Iterator[Row]:
    """Two rows a contender, each from a process of its own."""
    for contender in options.contenders:
        for heap, setting in (("as it is", {}), ("returned", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
            command = [sys.executable, __file__, "--alone", contender, "--students", name]
            command += ["--memory-steps", str(steps), "--momentum", str(options.momentum)]
            command += ["--peers", str(options.peers)] if options.peers else []
            done = subprocess.run(
                command, env=os.environ | setting, capture_output=True, text=True, check=False
            )
            row: Row = {
                "what": "memory",
                "student": name,
                "steps": steps,
                "contender": contender,
                "heap": heap,
            }
            if done.returncode:
                why = (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]
                yield row | {"left_out": f"failed: {why}"}
            else:
                yield row | json.loads(done.stdout.splitlines()[-1])


def shown(row: Row) -> str:
    head = f"{row['what']:7}{row['student']:11} T = {row['steps']:<6}{row['contender']:16}"
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    if "extra_mb" in row:
        return f"{head}{row['extra_mb']:9.0f} MB extra, heap {row['heap']}, {row['seconds']:.2f} s"
    ratio = f"{row['of_autograd']:9.3f} of autograd" if "of_autograd" in row else ""
    return f"{head}{row['ms']:9.2f} ms ({row['q25']:.2f} to {row['q75']:.2f}){ratio}"


def described(options: argparse.Namespace) -> Row:
    """Where and of what the rows are."""
    if options.alone:
        return {}
    from run import describe  # which brings its own contenders

    return describe(options) | {"momentum": options.momentum}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--what", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--steps", type=int, help="T for times (default 50, LeNet 30)")
    parser.add_argument("--memory-steps", type=int, help="T for memory (default 400, LeNet 40)")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the students' SGD (default 0)")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contender (default 11)")
    parser.add_argument("--peers", type=Path, help="a virtual environment with the peers in it")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON lines")
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seed, options.seconds = 0, None
    setting = described(options)  # before this process is bound to a core
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # JAX would take all of them
    if options.peers:
        sys.path += map(str, sorted(options.peers.glob("lib/python*/site-packages")))
    there = [name for name in ("higher", "torchopt", "jax") if importlib.util.find_spec(name)]
    setting["peers"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there) or "none"
    if options.alone:
        name = options.students[0]
        print(json.dumps(extra_memory(name, options.memory_steps, options.alone, options)))
        return
    rows = []
    for name in options.students:
        for what in options.what:
            if what == "time":
                found = times(name, options.steps or STUDENTS[name].steps, options)
            else:
                found = memory(name, options.memory_steps or STUDENTS[name].memory_steps, options)
            for row in found:
                print(shown(row), flush=True)
                rows.append(row | setting)
    if options.out:
        write_whole(options.out, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
