"""States of an unrolled run between steps: whether they come again, and where they are kept meanwhile."""

from __future__ import annotations

import gc
import itertools
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import l2t
from l2t import schedule, states
from l2t.run import KEEP
from l2t.schedule import Action
from l2t.states import Fingerprints, States
from l2t.tape import State, Student

STEPS = 7
BIT_FLIPS = [(0.0, -0.0), (float("nan"), -float("nan")), (1.0, 1 + 2**-52)]


class Net(nn.Module):
    """Layers, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.spare = nn.Parameter(torch.ones(()))  # the loss does not read it
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.bn(self.fc1(x)).tanh(), 0.2))


@pytest.fixture
def course() -> Callable[..., l2t.Run]:
    """A function that unrolls a student; the loss takes what is given as ``also`` besides."""
    torch.manual_seed(0)
    student, scale = Net().double(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(STEPS, 8, 5, dtype=torch.float64), torch.randint(3, (STEPS, 8))

    def run(
        also: Callable[..., Tensor | float] = lambda model, more, value, step: 0.0, **options: Any
    ) -> l2t.Run:
        torch.manual_seed(1)

        def loss(model: Net, batch: tuple[Tensor, ...], step: int) -> Tensor:
            value = scale * F.cross_entropy(model(batch[0]), batch[1])
            return value + also(model, batch[2], value, step)

        batches = [(a, b, torch.ones(())) for a, b in zip(x, y, strict=True)]
        given = {"optimizer": l2t.optim.SGD(lr=0.1, momentum=0.9)}
        scale.grad = None
        found = l2t.unroll(
            student, batches, loss, lambda model: F.cross_entropy(model(x[0]), y[0]), **(given | options)
        )
        found.scale = scale  # type: ignore[attr-defined]
        return found

    return run


# ---- verify


def hidden_state() -> Callable[..., Tensor]:
    """Adds zero with a gradient that grows from call to call: the value of the loss does not tell."""
    calls = itertools.count()
    return lambda model, more, value, step: next(calls) * (value - value.detach())


def changed_batch(model: Net, more: Tensor, value: Tensor, step: int) -> Tensor:
    """The batch says how steep the loss is, and is changed in place."""
    steepness = float(more.exp_())
    return steepness * (model.fc2.bias.sum() - model.fc2.bias.sum().detach())


def own_numbers() -> Callable[..., float]:
    """A buffer that nothing reads is filled with numbers from elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def also(model: Net, more: Tensor, value: Tensor, step: int) -> float:
        model.calls.fill_(torch.rand((), generator=generator))
        return 0.0

    return also


def touched_weights(model: Net, more: Tensor, value: Tensor, step: int) -> float:
    """A weight that the loss does not read is changed in place."""
    with torch.no_grad():
        model.spare.data.mul_(1.5)  # which PyTorch does not count
    return 0.0


@pytest.mark.parametrize("verify", ["first", "all"])
@pytest.mark.parametrize(
    ("also", "options", "state", "tensor"),
    [
        (hidden_state, {"schedule": "every"}, "after step 4", "weights fc1.weight"),
        (lambda: changed_batch, {"schedule": "every"}, "after step 4", "weights fc2.bias"),
        (own_numbers, {"schedule": "every"}, "after step 4", "buffer calls"),
        (own_numbers, {"curvature": "recompute"}, "after step 6", "buffer calls"),
        (own_numbers, {"curvature": "recompute", "schedule": "every"}, "after step 6", "buffer calls"),
        (lambda: touched_weights, {"curvature": "recompute"}, "after step 5", "weights spare"),
    ],
)
def test_a_state_that_does_not_come_again_is_named(
    course: Callable[..., l2t.Run], also: Any, options: dict[str, Any], state: str, tensor: str, verify: str
) -> None:
    run = course(also(), verify=verify, **options)
    with pytest.raises(
        RuntimeError,
        match=rf"the state {state} must be the same when it is reached again, .* one in {tensor}\. Usual",
    ):
        run.backward()


def test_without_verify_a_value_alone_is_compared(course: Callable[..., l2t.Run]) -> None:
    course(hidden_state(), schedule=schedule.Segments(1)).backward()


@pytest.mark.parametrize("options", [{"verify": "all"}, {"store": "bfloat16"}])
def test_a_student_may_change_before_the_walk_back(
    course: Callable[..., l2t.Run], options: dict[str, Any]
) -> None:
    """As one does that takes the end of the run: steps are taken again from where it began."""
    found = []
    for changes in (False, True):
        run = course(schedule=schedule.Segments(1, 0), **options)
        module = run._student.module
        if changes:
            module.load_state_dict(run.weights | run.buffers)
        run.backward()
        found.append(run.scale.grad)
    assert torch.equal(module.fc1.weight, run.weights["fc1.weight"])
    assert torch.equal(*found)


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_a_parameter_that_is_frozen_no_more_stays_so(course: Callable[..., l2t.Run], curvature: str) -> None:
    found = []
    for thaws in (False, True):
        run = course(curvature=curvature)
        module = run._student.module.requires_grad_(True)
        module.fc1.requires_grad_(False)
        run = course(curvature=curvature)
        module.fc1.requires_grad_(thaws)
        run.backward()
        assert [p.requires_grad for p in module.fc1.parameters()] == [thaws] * 2
        assert module.fc1.weight.grad is None
        found.append(run.scale.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("curvature", ["recompute", "forward", "central", "one-sided"])
def test_a_batch_that_was_written_since_is_told(curvature: str) -> None:
    student, buffer = nn.Linear(3, 1), torch.empty(4, 3)

    def refilled() -> Any:
        for t in range(3):
            yield buffer.fill_(t + 1.0), t

    def loss(model: nn.Module, batch: tuple[Tensor, int], step: int) -> Tensor:
        return model(batch[0]).square().mean()

    def measure(model: nn.Module) -> Tensor:
        return model(torch.ones(3)).sum()

    run = l2t.unroll(student, refilled(), loss, measure, curvature=curvature)
    with pytest.raises(
        RuntimeError, match=r"batches must stay as they are .* that of step 1 changed in place"
    ):
        run.backward()
    with pytest.raises(
        RuntimeError, match=r"batches must stay as they are .* that of step 0 changed in place"
    ):
        l2t.unroll(student, refilled(), loss, measure, schedule="every")
    batches = [(torch.rand(4, 3) - 0.5, t) for t in range(3)]

    def clips(model: nn.Module, batch: tuple[Tensor, int], step: int) -> Tensor:
        return model(batch[0].clamp_(min=0)).square().mean()  # which comes to the same again

    l2t.unroll(student, batches, clips, measure, curvature=curvature).backward()


def test_first_looks_at_the_first_steps_taken_again_and_all_at_every_one(
    course: Callable[..., l2t.Run],
) -> None:
    def later(model: Net, more: Tensor, value: Tensor, step: int) -> Tensor | float:
        seen[step] += 1
        return (seen[step] - 1) * (value - value.detach()) if step == 1 else 0.0

    seen = [0] * STEPS
    course(later, schedule="every", verify="first").backward()
    assert seen == [2] * 6 + [1]
    seen = [0] * STEPS
    run = course(later, schedule="every", verify="all")
    with pytest.raises(RuntimeError, match=r"the state after step 1 must be the same"):
        run.backward()


@pytest.mark.parametrize("verify", ["first", "all"])
@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward", "central", "one-sided"])
@pytest.mark.parametrize("plan", ["all", "every", schedule.Segments(2, 1)])
def test_a_run_that_comes_again_passes(
    course: Callable[..., l2t.Run], curvature: str, plan: Any, verify: str
) -> None:
    optimizer = l2t.optim.Adam(lr=0.01)
    run = course(curvature=curvature, schedule=plan, verify=verify, optimizer=optimizer, truncate=6)
    run.backward()
    found = run.scale.grad
    course(curvature=curvature, schedule=plan, optimizer=optimizer, truncate=6).backward()
    assert torch.equal(found, run.scale.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("was", "now"), BIT_FLIPS)
def test_every_bit_of_a_state_counts(was: float, now: float, dtype: torch.dtype) -> None:
    student = Student(Net())

    def state(value: float, steps: int = 3) -> State:
        weights = [torch.zeros_like(p) for p in student.parameters]
        numbers = torch.zeros(2, 3, dtype=dtype).t()
        numbers[2, 1] = value
        slots = [(torch.zeros(()), 1) for _ in weights]
        slots[0] = (numbers, steps)
        return State(weights, slots, student.buffers)

    def compared(*states: State) -> None:
        seen = Fingerprints(student, ("momentum",))
        for x in states:
            seen.see(4, x)

    compared(state(was), state(was))
    first = re.escape(student.names[0])
    with pytest.raises(RuntimeError, match=rf"after step 3 .* in momentum of {first}\. "):
        compared(state(was), state(now))
    with pytest.raises(RuntimeError, match=rf"after step 3 .* in optimiser state 1 of {first}\. "):
        compared(state(was), state(was, steps=4))


def test_verify_is_checked(course: Callable[..., l2t.Run]) -> None:
    with pytest.raises(ValueError, match=r"verify must be one of first, all"):
        course(verify="some")


# ---- on disk


def folders(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def bits(run: l2t.Run) -> list[Tensor]:
    run.backward()
    norms = torch.tensor(run.report.adjoint_norms)
    return [run.measure, run.scale.grad, norms, *run.weights.values(), *run.buffers.values()]


@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward", "central", "one-sided"])
@pytest.mark.parametrize("level", ["disk", "host"])
def test_states_outside_come_back_bit_for_bit(
    course: Callable[..., l2t.Run], curvature: str, level: str
) -> None:
    options: dict[str, Any] = {"curvature": curvature, "optimizer": l2t.optim.Adam(lr=0.01)}
    expected = bits(course(**options, schedule="all"))
    for inner in (schedule.StoreAll(), schedule.Segments(1, 1)):
        plan = schedule.TwoLevel(3, inner, level)
        found = bits(course(**options, schedule=plan, verify="all"))
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("level", ["disk", "host"])
def test_states_of_a_gpu_come_back_bit_for_bit(level: str) -> None:
    torch.manual_seed(0)
    student, x = Net().cuda(), torch.randn(STEPS, 8, 5, device="cuda")
    scale = torch.ones((), device="cuda", requires_grad=True)
    found = []
    for plan in ("all", schedule.TwoLevel(3, level=level)):
        torch.manual_seed(1)
        scale.grad = None
        run = l2t.unroll(
            student,
            x,
            lambda model, batch, step: scale * model(batch).square().mean(),
            lambda model: model(x[0]).square().mean(),
            schedule=plan,
        )
        run.backward()
        found.append([scale.grad, *run.weights.values(), *run.buffers.values()])
    assert run.report.cuda_peak_bytes > 0
    assert all(torch.equal(a, b) and a.device == b.device for a, b in zip(*found, strict=True))


def test_a_layout_comes_back_as_it_was(tmp_path: Path) -> None:
    student = Student(Net())
    shared = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    whole = torch.arange(6.0)
    odd = [
        torch.tensor(True),
        torch.randn(3, dtype=torch.complex128),
        torch.randn(0, 4),
        torch.randn(3).half(),
    ]
    buffers = [shared, whole, whole.view(2, 3), whole[1:3], shared, *odd]
    weights = [torch.randn(5, 4).t().requires_grad_() for _ in student.parameters]
    state = State(weights, [(torch.randn(3), 4, False)], buffers)
    for action in KEEP:
        states = States(directory=tmp_path)
        states.open(10_000)
        states.keep(3, state, action)
        back = states.back(3)
        assert back.slots[0][1:] == (4, False)
        assert back.buffers[0] is back.buffers[4]
        pairs = [
            *zip(weights, back.weights, strict=True),
            *zip(buffers, back.buffers, strict=True),
            (state.slots[0][0], back.slots[0][0]),
        ]
        for x, y in pairs:
            assert torch.equal(x, y)
            assert (x.dtype, x.stride()) == (y.dtype, y.stride())
        assert all(w.is_leaf and w.requires_grad for w in back.weights)
        assert not {id(w) for w in weights} & {id(w) for w in back.weights}
        states.close()


def test_a_folder_lives_as_long_as_its_run(course: Callable[..., l2t.Run], tmp_path: Path) -> None:
    run = course(schedule=schedule.TwoLevel(2), directory=tmp_path)
    (folder,) = folders(tmp_path)
    assert folder.name.startswith("l2t-states-")
    run.backward()
    assert not folders(tmp_path)

    run = course(schedule="disk", directory=str(tmp_path))
    assert folders(tmp_path)
    del run
    gc.collect()
    assert not folders(tmp_path)

    def breaks(model: Net, more: Tensor, value: Tensor, step: int) -> float:
        if step == 5:
            raise KeyError("out of paper")
        return 0.0

    with pytest.raises(KeyError, match="out of paper"):
        course(breaks, schedule="disk", directory=tmp_path)
    assert not folders(tmp_path)

    run = course(own_numbers(), schedule="disk", directory=tmp_path, verify="all")
    with pytest.raises(RuntimeError, match="in buffer calls"):
        run.backward()
    assert not folders(tmp_path)


def test_files_go_as_states_are_dropped(course: Callable[..., l2t.Run], tmp_path: Path) -> None:
    files: list[int] = []

    def count(model: Net, more: Tensor, value: Tensor, step: int) -> float:
        files.append(len(list(tmp_path.glob("*/*.safetensors"))) if back else 0)
        return 0.0

    back = False
    run = course(count, schedule=schedule.TwoLevel(1), directory=tmp_path)
    run._states._disk._writer.submit(int).result()  # all is written
    back = True
    run.backward()
    assert files == [0] * STEPS + list(range(STEPS - 2, -1, -1))


def test_what_a_killed_process_left_is_removed(course: Callable[..., l2t.Run], tmp_path: Path) -> None:
    code = """if True:
        import os, sys, torch, l2t
        student = torch.nn.Linear(1, 1)
        run = l2t.unroll(student, range(9), lambda model, batch, step: model.weight.sum() ** 2,
                         lambda model: model.weight.sum(), schedule="disk", directory=sys.argv[1])
        print(os.listdir(sys.argv[1]), flush=True)
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), 9)
        if sys.argv[2] == "fork" and not os.fork():
            sys.exit()  # a copy that ends takes nothing with it
        sys.argv[2] == "fork" and os.wait()
        print(os.listdir(sys.argv[1]), flush=True)
    """
    (tmp_path / "l2t-states-of-someone").mkdir()  # without a lock it is not ours

    def ran(how: str) -> list[str]:
        command = [sys.executable, "-c", code, str(tmp_path), how]
        here = Path(__file__).parent  # not the source tree, whose l2t is not built
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here)
        return ended.stdout.split("\n")[:-1]

    mine = course(schedule="disk", directory=tmp_path)  # alive
    assert len(folders(tmp_path)) == 2
    (shown,) = ran("kill")
    assert shown.count("l2t-states") == len(folders(tmp_path)) == 3
    before, after = ran("fork")
    assert before == after
    assert before != shown
    assert before.count("l2t-states") == 3
    assert len(folders(tmp_path)) == 2
    mine.backward()
    assert [x.name for x in folders(tmp_path)] == ["l2t-states-of-someone"]


def test_a_disk_that_does_not_take_a_state(
    course: Callable[..., l2t.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(
            OSError, match=r"directory must be one that can be written to, got '.*(file|nowhere)'"
        ):
            course(schedule="disk", directory=where)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        with pytest.raises(
            OSError,
            match=r"directory must have room for the states of the run, \d{4} bytes, got 1000 free at '.*'",
        ):
            course(schedule="disk", directory=tmp_path)
    assert len(folders(tmp_path)) == 1

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file may be longer than that
    try:
        with pytest.raises(
            OSError, match=r"directory must take the states of the run, got an error .*too large"
        ):
            course(schedule=schedule.TwoLevel(1), directory=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(folders(tmp_path)) == 1


def test_a_directory_is_where_it_was_when_the_process_goes_elsewhere(
    course: Callable[..., l2t.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "states").mkdir()
    monkeypatch.chdir(tmp_path)
    run = course(schedule=schedule.TwoLevel(1), directory="states")
    monkeypatch.chdir(tmp_path / "states")
    run.backward()
    assert not folders(tmp_path / "states")


def test_a_folder_that_was_cleaned_up_is_told(course: Callable[..., l2t.Run], tmp_path: Path) -> None:
    run = course(schedule=schedule.TwoLevel(1), directory=tmp_path)
    run._states._disk._writer.submit(int).result()  # all is written
    shutil.rmtree(folders(tmp_path)[0])
    with pytest.raises(OSError, match=r"keep the states of the run until backward\(\), got an error at '.*'"):
        run.backward()


@pytest.mark.parametrize("size", [6, 200])  # the larger is one that is lent, if it is dense
@pytest.mark.parametrize("kind", ["dense", "to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_buffers(kind: str, size: int, tmp_path: Path) -> None:
    """The adjacency of a graph network."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)
            edges = (torch.rand(size, size, dtype=torch.float64) > 0.5).double()
            self.register_buffer("edges", edges if kind == "dense" else getattr(edges, kind)())

        def forward(self, x: Tensor) -> Tensor:
            return self.edges @ self.layer(x)

    torch.manual_seed(0)
    student, x = Graph(), torch.randn(size, 4, dtype=torch.float64)
    dense, found = student.edges.to_dense(), []

    def loss(model: Graph, batch: int, step: int) -> Tensor:
        return scale * model(x).square().mean()

    for plan in (
        {},
        {"curvature": "recompute"},
        {"schedule": "every", "verify": "all"},
        {"schedule": schedule.TwoLevel(1), "directory": tmp_path},
        {"memory": "200MB"},
        {"schedule": "every", "store": "bfloat16"},
    ):
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        run = l2t.unroll(
            student,
            range(5),
            loss,
            lambda model: model(x).mean(),
            optimizer=l2t.optim.SGD(lr=1e-4),
            **plan,
        )
        run.backward()
        assert torch.equal(run.buffers["edges"].to_dense(), dense)
        found.append(scale.grad)
    *exact, rounded = found
    assert all(torch.equal(x, exact[0]) for x in exact)
    torch.testing.assert_close(rounded, exact[0], rtol=0.1, atol=0)
    assert l2t.plan(student, range(5), loss).sizes.state > 0


@pytest.mark.parametrize("store", ["exact", "bfloat16"])
def test_a_writer_never_sees_a_buffer_that_a_step_has_lent(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """States of before the step that is the first to write it wait to be written while it does."""
    step_writes, waiting = threading.Event(), []
    write = states._write

    def late(path: Path, tensors: Any) -> None:
        waiting.append(step_writes.wait(10))
        write(path, tensors)

    monkeypatch.setattr(states, "_write", late)

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)
            self.register_buffer("bank", torch.zeros(20_000))

        def forward(self, x: Tensor, step: int) -> Tensor:
            if step >= 2:
                self.bank.add_(1.0)
                step_writes.set()
                time.sleep(0.1)
            return self.linear(x) * (1 + self.bank[0])

    torch.manual_seed(0)
    student, x = Bank(), torch.randn(4, 3)
    scale = torch.tensor(1.0, requires_grad=True)
    found = []
    for plan in (schedule.Segments(2), schedule.TwoLevel(2)):
        scale.grad = None
        step_writes.clear()
        run = l2t.unroll(
            student,
            range(6),
            lambda model, batch, step: scale * model(x, step).square().mean(),
            lambda model: model(x, 0).square().mean(),
            optimizer=l2t.optim.SGD(lr=0.01),
            schedule=plan,
            store=store,
        )
        run.backward()
        found.append(scale.grad)
    assert all(waiting)
    assert torch.equal(*found)


def test_an_error_of_the_writer_is_the_run_s(
    course: Callable[..., l2t.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("out of ink")

    monkeypatch.setattr("l2t.states.save_file", broken)
    with pytest.raises(ZeroDivisionError, match="out of ink"):
        course(schedule=schedule.TwoLevel(1))
    run = course(schedule=schedule.TwoLevel(6))
    with pytest.raises(ZeroDivisionError, match="out of ink"):
        run.backward()


def test_few_states_wait_to_be_written(
    course: Callable[..., l2t.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    seen: list[int] = []
    gate = threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> None:
        gate.wait(60)

    def counted(model: Net, more: Tensor, value: Tensor, step: int) -> float:
        steps.append(step)
        return 0.0

    def opens() -> None:
        end = time.monotonic() + 60
        while len(steps) <= schedule.WRITING and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        seen.append(len(steps))
        gate.set()

    monkeypatch.setattr("l2t.states.save_file", slow)
    opener = threading.Thread(target=opens)
    opener.start()
    course(counted, schedule=schedule.TwoLevel(1))
    opener.join()
    assert seen == [schedule.WRITING + 1]


def test_a_directory_needs_a_plan_that_writes(course: Callable[..., l2t.Run], tmp_path: Path) -> None:
    for plan in ("all", "every"):
        with pytest.raises(
            ValueError, match=r"directory must be None with schedule=.*, which writes nothing to disk"
        ):
            course(schedule=plan, directory=tmp_path)
    with pytest.raises(ValueError, match=r"level must be one of disk, host"):
        schedule.TwoLevel(2, level="tape")
    with pytest.raises(ValueError, match=r"length must be an integer of 1 or more, got 0"):
        schedule.TwoLevel(0)


@given(steps=st.integers(1, 60), state=st.integers(1, 9), step=st.integers(1, 9), memory=st.integers(1, 200))
def test_a_plan_with_a_disk_fits_and_takes_no_step_twice_again(
    steps: int, state: int, step: int, memory: int
) -> None:
    if memory < min(steps * step, 3 * state + step):
        with pytest.raises(ValueError, match="memory must hold one step of the run"):
            schedule.fit_outside(steps, state, step, memory)
        return
    plan = schedule.fit_outside(steps, state, step, memory)
    found = schedule.tally(plan, steps, state, step)
    assert found.memory <= memory
    assert found.host == 0
    full = memory // step if steps * step <= memory else (memory - 3 * state) // step
    assert found.steps_again == max(steps - full, 0)
    taken = [t for action, t in plan.actions(steps) if action in (Action.FORWARD, Action.TAPE)]
    assert found.steps_again == len(taken) - steps
    assert max(taken.count(t) for t in range(steps)) <= 2


def test_the_tally_of_a_plan() -> None:
    """Counted by hand: the state before 0, and with two slots that before 4 and then before 2, or on disk."""
    assert schedule.tally(schedule.StoreAll(), 5, 3, 2) == (10, 0, 0, 0)
    assert schedule.tally(schedule.Segments(2), 6, 3, 2) == (3 + 2 * 3 + 2 * 2, 0, 0, 4)
    assert schedule.tally(schedule.TwoLevel(2), 6, 3, 2) == (3 + 2 * 2 + 2 * 3, 0, 2 * 3, 4)
    assert schedule.tally(schedule.TwoLevel(2, level="host"), 6, 3, 2) == (3 + 2 * 2, 2 * 3, 0, 4)


def test_a_plan_drops_what_it_has_stored() -> None:
    """By hand: taken, taped and reversed as it should be, and then a state forgotten."""
    A = Action
    play = [(A.FORWARD, 0), (A.TAPE, 1), (A.REVERSE, 1), (A.RESTORE, 0), (A.TAPE, 0), (A.REVERSE, 0)]
    for more, fits in (([], True), ([(A.DROP, 0)], False), ([(A.DROP, 1)], False)):
        assert schedule.playable(Given([*play, *more]), 2) == fits
    stored = [play[0], (A.STORE, 1), play[1], play[2], (A.DROP, 1), *play[3:]]
    assert schedule.playable(Given(stored), 2)
    assert not schedule.playable(Given([*stored, (A.DROP, 1)]), 2)
    student = nn.Linear(2, 1)
    for refused in (
        lambda plan: l2t.unroll(student, range(2), a_loss, lambda model: a_loss(model, 0, 0), schedule=plan),
        lambda plan: l2t.plan(student, range(2), a_loss, schedule=plan),
    ):
        with pytest.raises(
            ValueError, match=r"schedule must tape each step .* got Given\(\), which does not"
        ):
            refused(Given([*play, (A.DROP, 0)]))


def a_loss(model: nn.Module, batch: Any, step: int) -> Tensor:
    return model(torch.ones(2)).square().mean()


class Given:
    """These actions, as a plan."""

    def __init__(self, actions: list[tuple[Action, int]]) -> None:
        self._actions = actions

    def actions(self, steps: int) -> Any:
        return iter(self._actions)

    def __repr__(self) -> str:
        return "Given()"


# ---- rounded states


@pytest.mark.parametrize(
    "plan", [schedule.Segments(1), schedule.TwoLevel(1), schedule.TwoLevel(1, level="host")]
)
def test_rounded_states_give_the_gradient_through_steps_from_rounded_weights(plan: Any) -> None:
    """The oracle is autograd through each step by itself, of which the one in the middle begins rounded."""
    torch.manual_seed(0)
    student, scale = nn.Linear(4, 1).double(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def value(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return (scale * F.linear(x, w, b).tanh() - 0.5).square().mean()

    def stepped(weights: list[Tensor], t: int) -> list[Tensor]:
        g = torch.autograd.grad(value(*weights, x[t]), weights, create_graph=True)
        return [w - 0.3 * d for w, d in zip(weights, g, strict=True)]

    def leaves(weights: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [w.detach().to(dtype).double().requires_grad_() for w in weights]

    starts = [leaves(student.parameters())]
    for t in range(2):
        starts.append(leaves(stepped(starts[t], t)))
    losses = [value(*start, x[t]) for t, start in enumerate(starts)]
    ends = leaves(stepped(starts[2], 2))
    *v, expected = torch.autograd.grad(value(*ends, x[0]), [*ends, scale])
    starts[1] = leaves(starts[1], torch.bfloat16)
    for t in (2, 1, 0):
        *v, d = torch.autograd.grad(stepped(starts[t], t), [*starts[t], scale], v)
        expected = expected + d

    run = l2t.unroll(
        student,
        x,
        lambda model, batch, step: value(model.weight, model.bias, batch),
        lambda model: value(model.weight, model.bias, x[0]),
        optimizer=l2t.optim.SGD(lr=0.3),
        meta=[scale],
        schedule=plan,
        store="bfloat16",
    )
    assert run.report.store_error is None
    run.backward()
    off = abs(float(value(*starts[1], x[1]) / losses[1]) - 1)
    assert run.report.store_error == pytest.approx(off, rel=1e-6)
    assert run.report.store == "bfloat16"
    assert off > 1e-6
    torch.testing.assert_close(scale.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("curvature", ["reverse", "recompute", "forward", "central", "one-sided"])
def test_rounding_is_mild_and_half_the_bytes(course: Callable[..., l2t.Run], curvature: str) -> None:
    exact = course(schedule="every", curvature=curvature)
    exact.backward()
    expected = exact.scale.grad
    run = course(schedule="every", store="bfloat16", curvature=curvature)
    run.backward()
    assert 0 < abs(float(run.scale.grad / expected) - 1) < 0.1
    assert 0 < run.report.store_error < 0.1
    assert exact.report.store_error == 0
    if curvature != "reverse":
        # Of float64; the count of BatchNorm's batches is an integer.
        assert exact.report.sizes.state - 8 == 4 * (run.report.sizes.state - 8)


def test_a_store_is_checked(course: Callable[..., l2t.Run]) -> None:
    with pytest.raises(ValueError, match=r"store must be one of exact, bfloat16"):
        course(store="float8")
    for options in ({}, {"schedule": "all"}):
        with pytest.raises(
            ValueError, match=r"store must be 'exact' with schedule=.*, which store no states, got"
        ):
            course(store="bfloat16", **options)
    with pytest.raises(
        ValueError, match=r"verify must be None with store='bfloat16', from which no state comes"
    ):
        course(store="bfloat16", schedule="every", verify="all")


# ---- the report


def test_the_report_counts_bytes_and_seconds(course: Callable[..., l2t.Run]) -> None:
    report = course(schedule="all").report
    assert report.sizes is report.peak_bytes is report.seconds_reverse is report.cuda_peak_bytes is None
    assert repr(report.schedule) == "StoreAll()"

    run = course(schedule="auto", memory="20kB", truncate=6)
    run.backward()
    report = run.report
    assert 0 < report.peak_bytes <= 20_000
    assert report.steps_again > 0
    assert 0 < report.seconds_again < report.seconds_backward
    assert report.seconds_reverse == report.seconds_backward - report.seconds_again
    assert f"schedule={report.schedule}, store=exact" in repr(report)

    # By hand: all of 8 bytes; as much momentum as weights; BatchNorm has 13 buffers, and there is another.
    weights, buffers = 8 * (30 + 6 + 6 + 6 + 18 + 3 + 1), 8 * 14
    report = course(schedule=schedule.Segments(2, 1), curvature="recompute").report
    assert report.sizes == (2 * weights + buffers, weights + buffers)
    assert report.peak_bytes == 2 * (2 * weights + buffers) + 2 * (weights + buffers)
