"""plan(): what a run would cost, before it: bytes by level, steps taken again, seconds from two steps tried.

Docs: section 6 of docs/math.md. Sizes and schedules are those that :func:`l2t.unroll` goes by
(l2t/budget.py); the seconds are those of its own steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from l2t import check
from l2t.budget import Sizes, choose, sizes
from l2t.curvature import CURVATURES
from l2t.graph import leaves
from l2t.optim import Optimizer
from l2t.run import Run, indexed
from l2t.schedule import Schedule, Tally, playable, tally
from l2t.tape import Randomness, Student
from l2t.unroll import DEFAULT_OPTIMIZER, SCHEDULES, STORES, unroll

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """What a run would cost. ``print`` shows it as a table.

    Attributes:
        steps: the number of steps T.
        walked: how many of them are walked back over.
        schedule: the schedule, an object of :mod:`l2t.schedule`; :func:`l2t.unroll` takes it as it is, and
            ``l2t.figures.schedule(plan.schedule, plan.walked)`` draws it.
        sizes: bytes of a state that is remembered, and of a taped step.
        needs: bytes that are remembered at most at a time where the student lives (``memory``), in host
            memory (``host``) and on disk (``disk``), and ``steps_again``.
        seconds_step: of a step, as tried.
        seconds_reverse: of the reversal of a taped step, as tried.

    Example:
        >>> import torch, l2t
        >>> def loss(model, batch, step):
        ...     return model.weight.square().sum()
        >>> found = l2t.plan(torch.nn.Linear(2, 2), range(100), loss, schedule="every")
        >>> found.schedule, found.needs.steps_again, found.seconds > 0
        (Segments(length=10, slots=None), 90, True)
    """

    steps: int
    walked: int
    schedule: Schedule
    sizes: Sizes
    needs: Tally
    seconds_step: float
    seconds_reverse: float

    @property
    def seconds(self) -> float:
        """Expected seconds of the run and the walk back, without those that the disk takes."""
        taken = self.steps + self.needs.steps_again
        return taken * self.seconds_step + self.walked * self.seconds_reverse

    def __str__(self) -> str:
        state, step = map(_megabytes, self.sizes)
        rows = {
            "steps": f"{self.steps}",
            "walked back over": f"{self.walked}",
            "schedule": f"{self.schedule}",
            "steps taken again": f"{self.needs.steps_again}",
            "remembered": f"{_megabytes(self.needs.memory)} (a state {state}, a taped step {step})",
            "in host memory": _megabytes(self.needs.host),
            "on disk": _megabytes(self.needs.disk),
            "expected seconds": f"{self.seconds:.3g} (a step {self.seconds_step:.2g}, reversed "
            f"{self.seconds_reverse:.2g})",
        }
        return "\n".join(f"{name:18} {value}" for name, value in rows.items())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.4g} MB"


def plan(
    student: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any, int], Tensor],
    *,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    meta: Iterable[Tensor] | None = None,
    curvature: str = "reverse",
    truncate: int | None = None,
    schedule: str | Schedule = "auto",
    memory: int | str | None = None,
    store: str = "exact",
    accumulate: int = 1,
) -> Plan:
    """What :func:`l2t.unroll` would cost with these arguments, which mean the same there.

    The first batch is taken a few times: to see how much a step keeps, and how long it and its reversal take.
    The student, ``.grad`` of every tensor and PyTorch's default random numbers are afterwards as before.

    Args:
        student: the student.
        batches: with a length; the first one is read.
        loss: the loss of a step.
        optimizer: the student's optimiser.
        meta: the tensors whose ``.grad`` would be wanted.
        curvature: where second derivatives come from.
        truncate: over how many steps the walk back goes.
        schedule: what is remembered of the run.
        memory: bytes for it.
        store: how states are stored.
        accumulate: how many micro-batches a batch is a sequence of.

    Raises:
        TypeError, ValueError: an argument is not as :func:`l2t.unroll` takes it, or ``batches`` is empty or
            has no length.

    Example:
        >>> import torch, l2t
        >>> x, student = torch.randn(8, 100), torch.nn.Linear(100, 1, bias=False)
        >>> def loss(model, batch, step):
        ...     return model(x).square().mean()
        >>> found = l2t.plan(student, range(1000), loss, curvature="recompute", memory="20kB")
        >>> print(str(found).split("expected")[0].rstrip())
        steps              1000
        walked back over   1000
        schedule           Segments(length=25, slots=11)
        steps taken again  1650
        remembered         0.0196 MB (a state 0.0008 MB, a taped step 0.0004 MB)
        in host memory     0 MB
        on disk            0 MB
    """
    check.plan_batches(batches, indexed(batches))
    check.unroll_student(student)
    check.unroll_functions(loss, lambda: None)
    check.unroll_schedule(schedule, SCHEDULES)
    budget = check.unroll_memory(memory, schedule)
    check.known("unroll", "store", store, STORES)
    check.unroll_store(store, None, schedule, memory)
    chosen = check.unroll_meta(meta)
    check.unroll_truncate(truncate, chosen, student)
    places, first = Student(student), batches[0]
    randomness = Randomness.now(places.cuda_devices)
    touched: list[Tensor] = []
    grads: list[Tensor | None] = []
    marks: dict[str, float] = {}  # the first time of each

    def mark(name: str) -> None:
        for device in places.cuda_devices:
            torch.cuda.synchronize(device)
        marks.setdefault(name, perf_counter())

    def noted(model: nn.Module, batch: Any, step: int) -> Tensor:
        if step == 1:
            mark("begin")
        value = loss(model, batch, step)
        if isinstance(value, Tensor):  # gradients will go to the leaves that it reaches
            own = {id(p) for p in [*model.parameters(), *places.parameters]}
            _lay_aside([x for x in leaves([value]) if id(x) not in own], touched, grads)
        return value

    def end(model: nn.Module) -> Tensor:
        mark("after")
        parts = [p.sum().to("cpu", torch.float32) for p in model.parameters() if p.requires_grad]
        return torch.stack(parts).sum()

    def taken(steps: int) -> Run:
        return unroll(
            student,
            [first] * steps,
            noted,
            end,
            optimizer=optimizer,
            meta=chosen,
            curvature=curvature,
            schedule="all",
            accumulate=accumulate,
            preflight=False,
        )

    try:
        _lay_aside(chosen or [], touched, grads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = taken(1)
            wanted = run._steps.settings(0).wanted
            _lay_aside(leaves(list(wanted.values())), touched, grads)
            run.backward()
            marks.clear()
            run = taken(2)
            _lay_aside(leaves(list(run._steps.settings(1).wanted.values())), touched, grads)
            state, reads = run._end, run._optimizer.reads or bool(wanted)
            run.report._measured = True  # an inexact curvature is not to be examined
            mark("back")
            run.backward()
            mark("done")
        with torch.enable_grad():
            assert state is not None
            narrows = store == "bfloat16"
            way, anchors = CURVATURES[curvature], not reads and run._steps.anchors(state.weights)
            size = sizes(places, loss, (first, batches[0]), state, way, reads, narrows, accumulate, anchors)
    finally:
        for x, kept in zip(touched, grads, strict=True):
            x.grad = kept
        randomness.restore(places.cuda_devices)
    steps = len(batches)
    walked = steps if truncate is None else min(steps, truncate)
    if isinstance(schedule, str):
        found = choose(schedule, walked, budget, lambda: size)
    else:
        check.schedule_actions(playable(schedule, walked), found := schedule)
    needs = tally(found, walked, *size)
    seconds = marks["after"] - marks["begin"], (marks["done"] - marks["back"]) / 2
    return Plan(steps, walked, found, size, needs, *seconds)


def _lay_aside(tensors: Iterable[Tensor], touched: list[Tensor], grads: list[Tensor | None]) -> None:
    """Puts ``.grad`` of these aside, once."""
    known = {id(x) for x in touched}
    for x in tensors:
        if id(x) not in known:
            known.add(id(x))
            touched.append(x)
            grads.append(x.grad)
            x.grad = None
