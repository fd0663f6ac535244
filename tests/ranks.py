"""What each process of tests/test_ranks.py does: courses of l2t.unroll on its part of the data.

Run as ``python ranks.py RANK SIZE FOLDER``; what it found is written to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import l2t
from l2t.schedule import Segments

STEPS, BATCH, CLASSES = 4, 12, 3

COURSES: dict[str, dict[str, Any]] = {
    "reverse": {},
    "recompute": {"curvature": "recompute"},
    "forward": {"curvature": "forward"},
    "central": {"curvature": "central"},
    "one-sided": {"curvature": "one-sided"},
    "one slot": {"schedule": Segments(1, 1)},
    "auto": {"schedule": "auto", "memory": 20_000},
    "along": {"along": {2: 0.5, 3: 2.0}, "curvature": "recompute", "schedule": "every"},
    "micro-batches": {"accumulate": 2, "along": 3},
    "first order": {"order": "first"},
    "truncated": {"truncate": 2},
}


class Course:
    """A small run with meta tensors of several kinds; a rank has every SIZE-th sample of data and dev set."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()
        self.data = randn(STEPS, BATCH, 8)[:, rank::size]
        self.target = torch.randint(CLASSES, (STEPS, BATCH), generator=generator)[:, rank::size]
        self.dev = randn(BATCH, 8)[rank::size]
        self.dev_target = torch.randint(CLASSES, (BATCH,), generator=generator)[rank::size]
        self.weight = (torch.eye(CLASSES) + 0.1 * randn(CLASSES, CLASSES)).requires_grad_()
        self.lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        self.unused = torch.zeros(2, requires_grad=True)

    def metas(self, initial: bool = True) -> list[Tensor]:
        return [self.weight, self.lr, self.unused, *(self.student.parameters() if initial else ())]

    def loss(self, model: Callable[[Tensor], Tensor], batch: Any, step: int) -> Tensor:
        logits = model(batch[0])
        each = -(self.weight[batch[1]] * logits.log_softmax(1)).sum(1).sigmoid()
        return (each + 0.05 * logits.square().sum(1)).mean()

    def measure(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(self.dev), self.dev_target) + self.weight.square().mean()

    def batches(self, pieces: int = 1) -> list[Any]:
        whole = list(zip(self.data, self.target, strict=True))
        return whole if pieces == 1 else [[(x[i::2], y[i::2]) for i in (0, 1)] for x, y in whole]

    def run(self, group: Any = None, adam: bool = False, **options: Any) -> l2t.Run:
        sgd = l2t.optim.SGD(lr=self.lr, momentum=0.8)
        return l2t.unroll(
            self.student,
            self.batches(options.get("accumulate", 1)),
            self.loss,
            self.measure,
            optimizer=l2t.optim.AdamW(lr=self.lr) if adam else sgd,
            meta=self.metas(initial="truncate" not in options),
            group=group,
            **options,
        )

    def found(self, **options: Any) -> dict[str, Any]:
        """What a run comes to, on top of gradients of one that were there before."""
        for x in self.metas():
            x.grad = torch.ones_like(x) if x is self.weight else None
        run = self.run(**options)
        run.backward()
        return {
            "measure": run.measure,
            "measures": run.measures,
            "weights": run.weights,
            "norms": run.report.adjoint_norms,
            "grads": [None if x.grad is None else x.grad.clone() for x in self.metas()],
        }


def apart(rank: int, group: Any) -> list[float]:
    """Ranks that reach different weights; one is reached by none."""
    torch.manual_seed(0)
    student = nn.ModuleDict({name: nn.Linear(3, 1) for name in ("0", "1", "never")}).double()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64)

    def part(model: Any, name: str) -> Tensor:
        return (scale * model[name](x)).tanh().square().mean()

    def loss(model: Any, batch: Any, step: int) -> Tensor:
        names = ("0", "1") if step == 1 else (str(rank),)
        parts = [part(model, name) for name in names] if group else [part(model, n) for n in ("0", "1")]
        return sum(parts) if group or step == 1 else sum(parts) / 2

    def measure(model: Any) -> Tensor:
        return sum(model[name](x).square().mean() for name in model)

    optimizer = l2t.optim.SGD(lr=0.1, momentum=0.5, weight_decay=0.1)
    run = l2t.unroll(student, range(3), loss, measure, optimizer=optimizer, meta=[scale], group=group)
    run.backward()
    return [float(scale.grad), *(float(w.sum()) for w in run.weights.values())]


def sparse(group: Any) -> list[float]:
    """An embedding whose gradient is sparse, and a meta tensor whose gradient is; all ranks do the same."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(4, 1)).double()
    table = torch.randn(9, 1, dtype=torch.float64, requires_grad=True)
    batches = torch.randint(9, (3, 5, 1))

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        scale = F.embedding(batch, table, sparse=True).flatten()
        return (scale * model(batch).flatten().tanh()).square().mean()

    run = l2t.unroll(
        student,
        batches,
        loss,
        lambda model: model(batches[0]).square().mean(),
        optimizer=l2t.optim.SGD(lr=0.1),
        meta=[table],
        group=group,
    )
    run.backward()
    return [float(run.measure), *table.grad.to_dense().flatten().tolist()]


def refusals(rank: int, group: Any) -> dict[str, str]:
    """What each kind of disagreement says."""

    def other_weights(course: Course) -> dict[str, Any]:
        with torch.no_grad():
            course.student[2].bias += rank
        return {}

    def other_meta(course: Course) -> dict[str, Any]:
        with torch.no_grad():
            course.weight += rank
        return {}

    def fewer_steps(course: Course) -> dict[str, Any]:
        course.data = course.data[rank:]
        course.target = course.target[rank:]
        return {}

    def other_settings(course: Course) -> dict[str, Any]:
        return {"curvature": "recompute" if rank else "reverse"}

    def other_store(course: Course) -> dict[str, Any]:
        return {"schedule": "every", "store": "bfloat16" if rank else "exact"}

    def other_verify(course: Course) -> dict[str, Any]:
        return {"verify": "all" if rank else None}

    def other_plan(course: Course) -> dict[str, Any]:
        return {"schedule": Segments(1 + rank)}

    def other_rate(course: Course) -> dict[str, Any]:
        course.lr = torch.tensor(0.3) if rank else torch.tensor(0.2)
        course.metas = lambda initial=True: [course.weight]  # type: ignore[method-assign]
        return {}

    said = {}
    changes = (other_weights, other_meta, fewer_steps, other_settings, other_store, other_verify, other_plan)
    for change in (*changes, other_rate):
        course = Course(rank, 2)
        try:
            course.run(group, **change(course))
        except ValueError as error:
            said[change.__name__] = str(error)
    return said


def main(rank: int, size: int, folder: Path) -> None:
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD
    course = Course(rank, size)
    found: dict[str, Any] = {name: course.found(group=group, **options) for name, options in COURSES.items()}
    found["adam"] = course.found(group=group, adam=True)
    found["apart"] = apart(rank, group)
    found["sparse"] = sparse(group)
    found["refusals"] = refusals(rank, group)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
