"""Data-parallel runs: l2t.unroll(group=) in two processes against autograd and a run on the joined batches.

tests/ranks.py is what the processes do. They meet through a file and talk by gloo.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import COURSES, STEPS, Course, apart, sparse
from torch import Tensor

import l2t

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, HERE / "ranks.py", str(rank), "2", folder], env=environment)
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def close(x: Tensor | None, y: Tensor | None, room: float) -> bool:
    if x is None or y is None:
        return x is y
    return bool((x - y).norm() <= room * y.norm())


@pytest.mark.parametrize("name", [*COURSES, "adam"])
def test_two_ranks_come_to_what_one_process_does_on_the_joined_batch(
    found: list[dict[str, Any]], name: str
) -> None:
    options = {k: v for k, v in COURSES.get(name, {}).items() if k in ("along", "order", "truncate")}
    expected = Course().found(adam=name == "adam", **options)
    room = {"central": 1e-7, "one-sided": 1e-4}.get(name, 1e-12)
    for rank in found:
        assert close(rank[name]["measure"], expected["measure"], 1e-12)
        for key in ("measures", "weights"):
            assert rank[name][key].keys() == expected[key].keys()
            assert all(close(rank[name][key][k], x, 1e-12) for k, x in expected[key].items())
        assert rank[name]["norms"] == pytest.approx(expected["norms"], rel=10 * room)
        assert all(map(close, rank[name]["grads"], expected["grads"], [room] * 9))


def test_two_ranks_come_to_what_autograd_finds_through_the_whole_run(found: list[dict[str, Any]]) -> None:
    course = Course()
    weights = list(course.student.parameters())
    momentum = [torch.zeros_like(w) for w in weights]

    def model(x: Tensor) -> Tensor:
        return (x @ weights[0].T + weights[1]).tanh() @ weights[2].T + weights[3]

    for step, batch in enumerate(course.batches()):
        grads = torch.autograd.grad(course.loss(model, batch, step), weights, create_graph=True)
        momentum = [0.8 * m + g for m, g in zip(momentum, grads, strict=True)]
        weights = [w - course.lr * m for w, m in zip(weights, momentum, strict=True)]
    expected = torch.autograd.grad(course.measure(model), course.metas(), allow_unused=True)
    added = [torch.ones_like(course.weight), *[0] * 8]
    for name in ("reverse", "one slot", "auto", "micro-batches"):
        if "along" not in COURSES[name]:
            for x, y, before in zip(found[0][name]["grads"], expected, added, strict=False):
                assert close(x, y if y is None else y + before, 1e-12), name


def test_ranks_hold_the_same_bits(found: list[dict[str, Any]]) -> None:
    for name in [*COURSES, "adam"]:
        one, other = (rank[name] for rank in found)
        assert torch.equal(one["measure"], other["measure"])
        assert all(torch.equal(one["weights"][k], x) for k, x in other["weights"].items())
        pairs = zip(one["grads"], other["grads"], strict=True)
        assert all(x is y if x is None else torch.equal(x, y) for x, y in pairs), name
        assert one["norms"] == other["norms"]
    for name in ("recompute", "one slot", "auto"):
        pairs = zip(found[0]["reverse"]["grads"], found[0][name]["grads"], strict=True)
        assert all(x is y if x is None else torch.equal(x, y) for x, y in pairs), name
    assert len(found[0]["along"]["measures"]) < STEPS


def test_weights_that_some_ranks_reach(found: list[dict[str, Any]]) -> None:
    expected = apart(0, None)
    for rank in found:
        assert rank["apart"] == pytest.approx(expected, rel=1e-12)


def test_sparse_gradients(found: list[dict[str, Any]]) -> None:
    expected = sparse(None)
    for rank in found:
        assert rank["sparse"] == pytest.approx(expected, rel=1e-12)


def test_ranks_that_disagree_are_all_told(found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank["refusals"]
        before = "must be the same on all ranks of group before the run, got "
        assert f"weights {before}2.bias that differs on rank 1" in said["other_weights"]
        assert f"meta {before}0 that differs on rank 1" in said["other_meta"]
        assert f"steps {before}4 on rank 0 and 3 on rank 1" in said["fewer_steps"]
        for change in ("settings", "store", "verify", "plan"):
            assert f"settings {before}" in said[f"other_{change}"]
        assert "weights must be the same on all ranks of group after the run" in said["other_rate"]


def test_a_group_is_one_that_this_process_is_in(tmp_path: Path) -> None:
    course = Course()
    for group in ("gloo", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(TypeError, match=r"group must be a torch.distributed process group"):
            course.run(group)
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with pytest.raises(ValueError, match=r"meta must be a list of tensors with group"):
            l2t.unroll(course.student, course.batches(), course.loss, course.measure, group=group)
        with pytest.raises(TypeError, match=r"batches must have a length with group"):
            l2t.unroll(
                course.student,
                iter(course.batches()),
                course.loss,
                course.measure,
                meta=course.metas(),
                group=group,
            )
    finally:
        dist.destroy_process_group()
