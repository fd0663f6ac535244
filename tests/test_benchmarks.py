"""The benchmarks: every contender is right, a wrong one gets no time, what is drawn is what was measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import cases
import clock
import contenders
import criteria
import draw
import pytest
import run
import torch
import unroll_peers
from cases import OPS, STRUCTURES, Case, Job
from contenders import CONTENDERS, compiled, eager

import l2t

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SHAPES = ("6x5", "16x144")  # rows that no vector fits, and rows that streaming stores and their sums do


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """torch.compile without its code generator, which would take most of a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_contender_is_right(shape, structure, op):
    for dtype in cases.DTYPES:
        if (op, dtype) == ("linear", "float16"):
            assert "underflow" in cases.why_not(Case(shape, structure, op, dtype))
            continue
        entries = run.prepare([Case(shape, structure, op, dtype)], list(CONTENDERS), seed=1)
        assert {entry.contender for entry in entries} == {k for k, c in CONTENDERS.items() if op in c.OPS}
        for entry in entries:
            if entry.contender in ("Liger", "CCE"):
                assert entry.left_out in ("not installed", "runs on a GPU only")
            elif entry.contender in contenders.BOUNDS and not entry.job:
                assert shape == "6x5" or dtype == "float64" or op == "value"
            else:
                assert entry.left_out is None, (entry.contender, dtype, entry.left_out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bound", contenders.BOUNDS)
def test_the_bound_takes_part(bound, dtype):
    (entry,) = run.prepare([Case("16x144", "full", "grad_vjp, all", dtype)], [bound], 0)
    assert entry.job


class Other:
    """A contender whose results are the right ones, changed."""

    OPS, LOSS = ("value+grad",), "dynamic"

    def __init__(self, change):
        self.change = change

    def why_not(self, case):
        return None

    def make(self, case, inputs):
        right = eager.make(case, inputs).call
        return Job(lambda: self.change(*(x.clone() for x in right())))


def one_element(loss, gradient):
    gradient[3, 2] *= 1.01
    return loss, gradient


def not_a_number(loss, gradient):
    gradient[0, 0] = torch.nan
    return loss, gradient


def failing(loss, gradient):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda loss, gradient: (loss, 1.001 * gradient), "wrong by 1.0e-03, more than 1e-04"),
        (lambda loss, gradient: (loss, 0 * gradient), "wrong by 1.0e+00"),
        (lambda loss, gradient: (loss + torch.inf, gradient), "wrong by inf"),
        (one_element, "wrong by "),
        (not_a_number, "wrong by nan"),
        (lambda loss, gradient: (loss,), "failed: ValueError: 1 results instead of 2"),
        (failing, "failed: RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_contender_gets_no_time(change, reason, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CONTENDERS, "eager", Other(change))
    out = tmp_path / "rows.jsonl"
    arguments = ["--shapes", "6x5", "--structures", "full", "--ops", "value+grad", "--dtypes", "float32"]
    arguments += ["--contenders", "l2t ops", "eager", "--seconds", "0", "--out", str(out)]
    assert run.main(arguments) == 1
    right, wrong = criteria.read(out)
    assert right["us"] > 0
    assert "us" not in wrong
    assert wrong["left_out"].startswith(reason)
    assert reason in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(cases, "free_memory", lambda device: 3e9)
    (entry,) = run.prepare([Case("2x32000", "full", "value")], ["eager"], 0)
    assert entry.left_out == "W takes 4.1 GB and 3.0 GB are free"
    (entry,) = run.prepare([Case("2x32000", "full", "grad_vjp, all")], ["eager"], 0)
    assert entry.left_out == "gradients to all coefficients hold another 4 GB"
    assert cases.why_not(Case("2x32000", "low rank", "grad_vjp, all")) is None


def test_inputs_are_the_same_numbers_for_every_dtype_and_op():
    first = cases.make_inputs(Case("6x5", "low rank", "value"), seed=3)
    again = cases.make_inputs(Case("6x5", "low rank", "grad_vjp, all", "float64", threads=2), seed=3)
    other = cases.make_inputs(Case("6x5", "low rank", "value"), seed=4)
    for x, y, z in zip(first, again, other, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y.to(x.dtype), rtol=0, atol=0)
            assert not torch.equal(x, z)


@pytest.mark.parametrize("op", ["value", "value+grad", "grad_vjp", "grad_jvp, all"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors(op, dtype):
    case = Case("7x6", "full", op, dtype)
    inputs = cases.make_inputs(case)
    moved = [inputs.logits, inputs.weight[inputs.target]]
    moved += [inputs.direction] if op.startswith("grad_") else []
    moved += [] if op == "value" else [inputs.logits]  # the gradient
    moved += [inputs.weight] if case.to_all else []
    assert cases.bytes_moved(case) == sum(x.nbytes for x in moved)


class Tape:
    """A clock that tells nothing but remembers who was timed."""

    def __init__(self):
        self.order, self.seconds = [], 0.0

    def warm_up(self, job):
        return 1

    def sample(self, job, calls):
        name, us = job.call()
        self.order.append(name)
        self.seconds += 1e-6 * us
        return us


def entry(name, us):
    return run.Entry(Case("6x5", "full", "value+grad"), name, Job(lambda: (name, us)), 0.0, None)


def test_contenders_take_turns_back_and_forth():
    tape = Tape()
    entries = [entry("eager", 10.0), entry("triad", 2.0), entry("triad, streaming stores", 4.0)]
    rows = run.measure(entries, tape, seconds=0, turns=2)
    there = [entry.contender for entry in entries]
    assert tape.order == [*reversed(there), *there]
    assert [row["us"] for row in rows] == [10.0, 2.0, 4.0]
    assert [row["bound_us"] for row in rows] == [2.0] * 3  # the faster of the two
    assert [row["to_bound"] for row in rows] == [5.0, 1.0, 2.0]


def test_a_slow_contender_has_fewer_turns(monkeypatch):
    tape = Tape()
    monkeypatch.setattr(run.time, "monotonic", lambda: tape.seconds)
    run.measure([entry("eager", 1e6), entry("triad", 1e5)], tape, seconds=1.0, turns=3)
    assert tape.order.count("eager") == 3
    assert tape.order.count("triad") in (10, 11)


def test_the_gpu_is_timed_between_events_behind_a_scrubbed_cache(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 0.25

    class Scrub:
        def zero_(self):
            log.append("scrub")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = object.__new__(clock.CudaClock)
    timer.scrub = Scrub()
    job = Job(lambda: log.append("call"), before=lambda: log.append("before"))
    assert timer.sample(job, 1) == 250.0
    assert log == ["before", "scrub", "event", "call", "event", "wait"]


def row(shape, structure, op, contender, us, dtype="float32", threads=1, **more):
    return {
        "shape": shape,
        "structure": structure,
        "op": op,
        "dtype": dtype,
        "threads": threads,
        "device": "cpu",
        "contender": contender,
        "error": 1e-7,
        "us": us,
        "q25": us,
        "q75": us,
    } | more


def verdict(rows, promise, case):
    (found,) = [v for v in criteria.verdicts(rows) if v.promise.startswith(promise) and v.case == case]
    return found


def test_criteria_are_judged_by_the_rows():
    at = ("128x10", "full")
    rows = [
        row(*at, "value+grad", criteria.FRESH, 10.0),
        row(*at, "value+grad", "eager", 49.0),
        row(*at, "value+grad", "torch.compile", 31.0),
        row(*at, "value+grad", "l2t.dynamic_loss", 33.0),
        row(*at, "value+grad", "F.cross_entropy", 33.0),
        row(*at, "hvp", "l2t.dynamic_loss", 51.0),
        row(*at, "hvp", "eager", 100.0),
        row("256x1000", "diagonal", "value+grad", criteria.REUSED, 50.0, to_bound=1.99),
        row("256x1000", "full", "value+grad", criteria.REUSED, 50.0, to_bound=1.31),
        row("256x1000", "full", "value+grad", criteria.REUSED, 28.0, threads=2),
        row("1024x32000", "full", "value+grad", criteria.REUSED, 32.0),
        row("1024x32000", "full", "value+grad", criteria.REUSED, 20.0, dtype="float16"),
        row("64x32000", "full", "grad_vjp", criteria.REUSED, 20.0, to_bound=1.6),
    ]
    assert (
        verdict(rows, "1. value+gradient, kernel, fresh outputs: times faster than eager", "128x10 full").met
        is False
    )
    assert verdict(
        rows, "1. value+gradient, kernel, fresh outputs: times faster than torch.compile", "128x10 full"
    ).met
    assert verdict(rows, "1. dynamic_loss", "128x10 full").met
    assert verdict(rows, "2. Hessian", "128x10 full").met is False
    assert verdict(rows, "1. value+gradient, kernel:", "256x1000 diagonal").met
    assert verdict(rows, "1. value+gradient, kernel:", "256x1000 full").met is False
    assert verdict(rows, "3. two threads", "256x1000 full").met
    assert verdict(rows, "3. float16:", "1024x32000 full").met
    assert verdict(rows, "2. grad_vjp, kernel", "64x32000 full").met
    assert verdict(rows, "2. grad_jvp, kernel", "64x32000 full").met is None
    words = {v.word for v in criteria.verdicts(rows)}
    assert words == {"met", "**missed**", "not measured"}
    assert f"{sum(v.met is True for v in criteria.verdicts(rows))} met, 3 missed" in criteria.summary(rows)
    assert not any(v.met for v in criteria.verdicts([]))


@pytest.mark.parametrize(
    ("us", "text"), [(0.6543, "0.654 µs"), (999.0, "999 µs"), (1234.0, "1.23 ms"), (2.5e6, "2.5 s")]
)
def test_durations_have_three_digits(us, text):
    assert draw.duration(us) == text
    number, unit = text.split()
    assert draw.duration(us, us, us) == f"{number} ({number}–{number}) {unit}"


def script(name, *arguments, cwd):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_from_the_command_line_to_the_page(tmp_path):
    folder, page = tmp_path / "benchmarks", tmp_path / "benchmarks.md"
    folder.mkdir()
    (folder / "roofline.md").write_text("as the compiler has it\n")
    names = ["kernel, reused outputs", "eager", "triad", "Liger"]
    arguments = ["--shapes", "6x5", "16x144", "--structures", "full", "--ops", "value+grad", "grad_vjp"]
    arguments += ["--contenders", *names, "--seconds", "0.001", "--out", folder / "cpu.jsonl"]
    done = script("run.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "cpu.jsonl").read_text().splitlines()]
    for found in rows:
        assert found["commit"]
        assert found["machine"]
        assert found["torch"] == torch.__version__
        assert found["instruction_set"]
        if "us" in found:
            assert 0 < found["q10"] <= found["q25"] <= found["us"] <= found["q75"] <= found["q90"]
            assert found["gb_per_s"] == pytest.approx(found["bytes"] / found["us"] / 1e3, abs=0.01)
        else:
            assert found["contender"] == "Liger"
    assert {found["dtype"] for found in rows} == {"float32", "bfloat16", "float16"}

    done = script("draw.py", "--folder", folder, "--page", page, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "as the compiler has it" in text
    assert "not measured" in text
    assert "not installed" in text
    for found in rows:
        if found["contender"] == "eager" and found["op"] == "value+grad":
            assert draw.duration(found["us"], found["q25"], found["q75"]) in text
    for name in ("cpu-times.svg", "cpu-bound.svg"):
        first = (folder / name).read_bytes()
        assert f"(benchmarks/{name})" in text
        draw.draw(folder, page)
        assert (folder / name).read_bytes() == first  # the same rows, the same picture

    done = script("criteria.py", folder / "cpu.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not measured." in done.stdout


def peers():
    names = [
        "autograd",
        "l2t",
        "l2t 64MB",
        "l2t fused",
        "l2t compiled",
        "l2t one-sided",
        "plain training",
        "nobody",
    ]
    return argparse.Namespace(contenders=names, momentum=0.5, rounds=1)


@pytest.mark.parametrize("student", ["64-128-10", "LeNet"])
def test_teacher_gradients_agree_and_a_wrong_one_gets_no_time(student, monkeypatch):
    def wrong(work):
        right = unroll_peers.autograd(work)
        return lambda: 1.001 * right()

    def missing(work):
        raise ImportError("No module named 'nobody'")

    monkeypatch.setitem(unroll_peers.CONTENDERS, "l2t", wrong)
    monkeypatch.setitem(unroll_peers.CONTENDERS, "nobody", missing)
    monkeypatch.setattr(l2t.compiled, "BACKEND", lambda graph, examples: graph)  # compiling takes seconds
    steps = 1 if student == "LeNet" else 2
    rows = {row["contender"]: row for row in unroll_peers.times(student, steps, peers())}
    assert rows["l2t"]["left_out"] == "wrong by 1.0e-03"
    assert rows["nobody"]["left_out"] == "not installed: No module named 'nobody'"
    assert rows["plain training"]["error"] is None
    for name in ("autograd", "l2t 64MB", "l2t fused", "l2t compiled", "l2t one-sided", "plain training"):
        assert rows[name]["q25"] <= rows[name]["ms"] <= rows[name]["q75"]
        assert rows[name]["of_autograd"] > 0
    assert rows["autograd"]["of_autograd"] == 1
    assert "left out: wrong" in unroll_peers.shown(rows["l2t"])


def test_plain_training_takes_the_steps_that_are_differentiated():
    work = unroll_peers.make_work("64-128-10", 3, momentum=0.5)
    before = [p.detach().clone() for p in work.layers.parameters()]
    ends = []
    step = torch.optim.SGD.step

    def seen(self, *args):
        step(self, *args)
        ends[:] = [p.detach().clone() for p in work.layers.parameters()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", seen)
        unroll_peers.plain_training(work)()
    assert all(torch.equal(p, w) for p, w in zip(work.layers.parameters(), before, strict=True))
    run = l2t.unroll(
        work.layers,
        work.order,
        lambda model, i, step: unroll_peers.loss_of(model(work.x[i]), work.y[i], work.weight, work.bias),
        lambda model: model(work.dev[0]).sum(),
        optimizer=l2t.optim.SGD(lr=work.lr, momentum=work.momentum),
    )
    for w, end in zip(run.weights.values(), ends, strict=True):
        torch.testing.assert_close(w, end)


def test_memory_of_teacher_gradients_from_the_command_line_to_the_page(tmp_path):
    out = tmp_path / "unroll.jsonl"
    arguments = ["--students", "784-500-10", "--memory-steps", "20", "--steps", "1", "--rounds", "1"]
    done = script("unroll_peers.py", *arguments, "--contenders", "l2t", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = criteria.read(out)
    memory = {(row["contender"], row.get("heap")): row for row in rows if row["what"] == "memory"}
    assert 2 < memory["l2t", "returned"]["extra_mb"] < 25  # the weights of twenty steps would be 32 MB
    assert memory["l2t", "returned"]["error"] < 1e-4
    text = "\n".join(draw.teacher_gradients(rows))
    assert "### 784-500-10, T = 1 for time, T = 20 for memory" in text
    assert f"{memory['l2t', 'returned']['extra_mb']:.0f} MB" in text
    rows[0] = {**rows[0], "contender": "higher", "left_out": "not installed: No module named 'higher'"}
    assert "Left out: higher: not installed: No module named 'higher'." in draw.teacher_gradients(rows)[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shapes", "128-10"], "a shape is rows x classes"),
        (["--gpu"], "--gpu needs a CUDA device"),
        (["--contenders", "nobody"], "invalid choice"),
    ],
)
def test_what_cannot_be_asked_for(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert sentence in capsys.readouterr().err


def test_every_contender_is_a_file():
    files = {path.stem for path in Path(contenders.__file__).parent.glob("*.py")} - {"__init__"}
    modules = {c.__name__.rpartition(".")[2] for c in CONTENDERS.values() if hasattr(c, "__name__")}
    assert files == modules | {"triad"}
