"""l2t.plan: what it says is what the run then does, and it leaves nothing behind."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import l2t
from l2t import schedule
from l2t.budget import free_memory

STEPS = 30


@pytest.fixture
def course() -> dict[str, Any]:
    """Arguments of a run with dropout, BatchNorm and leaves in loss and optimiser."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Dropout(0.2), nn.Linear(30, 3)
    )
    x, y = torch.randn(8, 20), torch.randint(3, (8,))
    scale = torch.tensor(1.5, requires_grad=True)
    lr = torch.tensor(0.1, requires_grad=True)

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        return scale * F.cross_entropy(model(x), y)

    return {
        "student": student,
        "batches": range(STEPS),
        "loss": loss,
        "optimizer": l2t.optim.SGD(lr=lr, momentum=0.9),
        "leaves": [scale, lr],
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "all", "curvature": "forward"},
        {"schedule": "every", "curvature": "recompute"},
        {"schedule": "auto", "memory": "100kB"},
        {"schedule": "auto", "memory": "60kB", "store": "bfloat16", "truncate": 20},
        {"schedule": "binomial", "memory": "60kB", "curvature": "central"},
        {"schedule": "disk", "memory": "100kB"},
        {"schedule": schedule.TwoLevel(7, level="host"), "curvature": "one-sided"},
    ],
)
def test_a_plan_is_what_the_run_does(course: dict[str, Any], options: dict[str, Any]) -> None:
    del course["leaves"]
    found = l2t.plan(**course, **options)
    run = l2t.unroll(**course, **options, measure=lambda model: model[0].weight.sum())
    run.backward()
    report = run.report
    assert repr(found.schedule) == repr(report.schedule)
    assert found.needs.steps_again == report.steps_again
    assert found.steps == report.steps == STEPS
    assert report.sizes in (None, found.sizes)
    assert report.peak_bytes in (None, found.needs.memory)
    assert found.walked == options.get("truncate", STEPS)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("curvature", ["reverse", "recompute", "central"])
def test_all_is_as_before(course: dict[str, Any], named: bool, curvature: str) -> None:
    leaves = course.pop("leaves")
    student = course["student"]
    student[0].weight.grad = torch.ones(30, 20)
    leaves[0].grad = torch.tensor(2.0)
    state = {name: x.clone() for name, x in student.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    l2t.plan(**course, curvature=curvature, meta=[*leaves, student[0].weight] if named else None)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, state[name]) for name, x in student.state_dict().items())
    assert torch.equal(student[0].weight.grad, torch.ones(30, 20))
    assert float(leaves[0].grad) == 2.0
    assert leaves[1].grad is student[4].bias.grad is None


def test_leaves_of_the_second_step_are_as_before_too() -> None:
    student, x = nn.Linear(3, 1), torch.randn(4, 3)
    scales = [torch.tensor(1.0, requires_grad=True) for _ in range(3)]
    rates = [torch.tensor(0.1, requires_grad=True) for _ in range(3)]
    rates[1].grad = torch.tensor(2.0)
    l2t.plan(
        student,
        range(3),
        lambda model, batch, step: scales[step] * model(x).square().mean(),
        optimizer=l2t.optim.SGD(lr=lambda step: rates[step]),
    )
    assert [x.grad for x in scales] == [None] * 3
    assert [x.grad for x in rates] == [None, torch.tensor(2.0), None]


def test_seconds_are_those_of_the_steps(course: dict[str, Any]) -> None:
    del course["leaves"]
    inner = course["loss"]

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        time.sleep(0.05)
        return inner(model, batch, step)

    found = l2t.plan(**(course | {"loss": loss}), curvature="recompute", schedule=schedule.Segments(1, 0))
    assert found.seconds_step > 0.05
    assert found.seconds_reverse > 0.05  # which runs the step again
    again = STEPS * (STEPS - 1) // 2
    assert found.needs.steps_again == again
    assert found.seconds == pytest.approx(
        (STEPS + again) * found.seconds_step + STEPS * found.seconds_reverse
    )
    text = str(found)
    assert f"expected seconds   {found.seconds:.3g} (a step" in text
    assert "steps taken again  435" in text


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_batches_that_are_made_on_demand_count(curvature: str) -> None:
    class Made:
        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, i: int) -> Tensor:
            return torch.ones(1000, 20)

    student = nn.Linear(20, 1)
    arguments: dict[str, Any] = {
        "loss": lambda model, batch, step: model(batch).square().mean(),
        "curvature": curvature,
        "memory": "1MB",
    }
    made = l2t.plan(student, Made(), **arguments)  # type: ignore[arg-type]
    there = l2t.plan(student, [torch.ones(1000, 20)] * STEPS, **arguments)
    assert made.sizes.step - there.sizes.step == 1000 * 20 * 4
    run = l2t.unroll(student, Made(), measure=lambda model: model.weight.sum(), **arguments)  # type: ignore
    assert run.report.sizes == made.sizes


def test_micro_batches(course: dict[str, Any]) -> None:
    del course["leaves"]
    course["batches"] = [[0, 1]] * STEPS
    found = l2t.plan(**course, accumulate=2, schedule="auto", memory="100kB")
    run = l2t.unroll(
        **course, accumulate=2, schedule="auto", memory="100kB", measure=lambda model: model[0].bias.sum()
    )
    assert run.report.sizes == found.sizes


class Streamed(IterableDataset):  # type: ignore[type-arg]
    """A length, and no batch by its number."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize("plan", ["auto", "every"])
def test_a_data_set_that_can_only_be_walked_through_is_taken(course: dict[str, Any], plan: str) -> None:
    del course["leaves"]
    course["batches"] = Streamed()
    run = l2t.unroll(**course, schedule=plan, measure=lambda model: model[0].weight.sum())
    run.backward()
    assert run.report.steps == 3


@pytest.mark.parametrize("batches", [[], iter([1]), 3, Streamed()])
def test_a_plan_needs_a_number_of_steps(course: dict[str, Any], batches: Any) -> None:
    del course["leaves"]
    with pytest.raises(ValueError, match=r"batches must have a length of 1 or more and be indexed, got"):
        l2t.plan(**(course | {"batches": batches}))
    with pytest.raises(ValueError, match=r"store must be 'exact' with schedule='all'"):
        l2t.plan(**course, schedule="all", store="bfloat16")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "nothing of it"}, None),
        ({"proc/meminfo": "MemFree: 1 kB\nMemAvailable:    3000 kB\n"}, 3_072_000),
        (
            {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5"},
            3_072_000,
        ),
        ({"sys/fs/cgroup/memory.max": "9000\n", "sys/fs/cgroup/memory.current": "2000\n"}, 7000),
        ({"sys/fs/cgroup/memory.max": "9000", "sys/fs/cgroup/memory.current": "9001"}, 0),
        (  # what files take that are not in use can be had
            {
                "sys/fs/cgroup/memory.max": "9000",
                "sys/fs/cgroup/memory.current": "8900",
                "sys/fs/cgroup/memory.stat": "anon 700\ninactive_file 8000\nactive_file 200\n",
            },
            8100,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 6000\n",
            },
            7000,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            },
            7999,
        ),
    ],
)
def test_free_memory_is_what_the_machine_and_the_container_have(tmp_path, files, free):
    if any("cgroup" in name for name in files):
        files = {"proc/meminfo": "MemAvailable: 3000 kB", **files}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(torch.device("cpu"), tmp_path) == free


def test_free_memory_of_this_machine_is_some():
    assert free_memory(torch.device("cpu")) > 2**20
