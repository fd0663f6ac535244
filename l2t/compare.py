"""Fresh students under frozen teachers and every baseline: who is ahead on test, and is it more than luck.

Every arm has the same students, steps, batches, grid of learning rates and budget: a learning rate is tuned
on the dev rows, then ``students`` fresh ones learn with it, and the test set is looked at once, when all of
them are done. Students are paired over the arms by their seed: same start, same order of rows.

Not here: the losses to compare with (baselines.py) and pictures (report.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from l2t import check
from l2t.baselines import Arm, baselines
from l2t.students import (
    Lesson,
    Make,
    Stack,
    TaughtLoss,
    draw_batches,
    judge,
    seed_of,
    split_pools,
)
from l2t.students import (
    train as train_stack,
)
from l2t.teach import Data, Recipe, threads
from l2t.teacher import Teacher

GRID = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)


class _Rows(NamedTuple):
    """All rows that students may see, training rows first, and how many of them those are."""

    inputs: Tensor
    targets: Tensor
    train: int


class _Result(NamedTuple):
    """What the students of one arm came to on the test set."""

    error: Tensor  # [S]
    loss: Tensor  # [S], cross-entropy in nats


def compare(
    teachers: Mapping[str, Teacher],
    student: Make,
    train: Data,
    test: Data,
    dev: Data | None = None,
    *,
    recipe: Recipe,
    arms: Mapping[str, Arm] | None = None,
    also: Mapping[str, Teacher] | None = None,
    noise: Tensor | None = None,
    dev_is_clean: bool = False,
    students: int = 20,
    grid: Sequence[float] = GRID,
    tuning_students: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Compare the students of frozen teachers with those of tuned baselines on the test set.

    Args:
        teachers: by name; each gets a comparison of its own, and all share the baselines' runs.
        student: makes a fresh student.
        train: inputs (N, ...) and targets (N,) to learn from.
        test: rows that neither teachers nor tuning have seen; they are read once, at the end.
        dev: rows to tune on, as in :func:`l2t.teach`; None tunes each student on ``recipe.dev_fraction`` of
            ``train``, drawn at random. Final students learn from all rows, dev rows too.
        recipe: the course; its learning rate is not used.
        arms: the baselines; None is those of :func:`l2t.baselines.baselines` for these data.
        also: more teachers that every comparison has as arms of the given names, a static one for example.
        noise: true noise matrix (C, C) of the training labels, for the oracle arm.
        dev_is_clean: whether ``dev`` has better labels than ``train``: then learning from it alone, and from
            both in equal parts, are baselines.
        students: fresh students an arm.
        grid: learning rates to choose from.
        tuning_students: students a learning rate and arm in tuning.
        seed: of students, batches and splits; they are none that teaching has used.
        progress: show a bar.

    Returns:
        by teacher, a JSON-able dict: ``test_error`` and ``test_loss`` ({arm: [one a student]}, shares and
        nats), ``p`` ({arm: two-sided p of the paired t-test of its errors against taught}), ``summary``
        ({arm: mean, sd, difference (taught less arm), ahead (students of 'taught' with fewer errors),
        behind}), ``tuning`` ({arm: lr, grid, dev_error by lr, at_edge}), ``curves`` ({arm: step,
        dev_error}), ``oracles`` (names), ``recipe``, ``teacher`` (settings), ``students``, ``seed``,
        ``seconds``. The teacher's own arm is ``taught``.

    Raises:
        ValueError: for data that do not fit, or a grid or counts that make no sense.

    Example:
        >>> import torch, l2t
        >>> from l2t.compare import compare
        >>> x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
        >>> y = x[:, :3].argmax(1)
        >>> make, recipe = lambda: torch.nn.Linear(8, 3), l2t.Recipe(steps=10)
        >>> found = compare({"mine": l2t.Teacher(3)}, make, (x[:200], y[:200]), (x[200:], y[200:]),
        ...                 recipe=recipe, students=2, grid=(0.1,), tuning_students=2, progress=False)
        >>> sorted(found["mine"]["test_error"])[-1]
        'taught'
    """
    check.compare_counts(len(teachers), students, tuning_students, grid)
    classes = next(iter(teachers.values())).num_classes
    dtype = next(next(iter(teachers.values())).parameters()).dtype
    for name, data in (("train", train), ("test", test), *((("dev", dev),) if dev is not None else ())):
        check.teach_data(name, data, classes, dtype, "compare")
    check.teach_student_fits(student, train[0], classes, "compare")
    check.compare_dev_is_there(dev is not None, dev_is_clean)

    if arms is None:
        arms = baselines(torch.bincount(train[1], minlength=classes), noise, dev_is_clean)
    taught = {f"taught by {name}": _taught(teacher) for name, teacher in teachers.items()}
    arms = {**arms, **{name: _taught(teacher) for name, teacher in (also or {}).items()}}
    rows = _Rows(
        torch.cat([train[0], dev[0]]) if dev is not None else train[0],
        torch.cat([train[1], dev[1]]) if dev is not None else train[1],
        len(train[1]),
    )
    began = time.perf_counter()
    tuning: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, Any]] = {}
    finals: dict[str, Stack] = {}
    with threads(recipe.threads), tqdm(total=2 * len(arms | taught), disable=not progress, unit="run") as bar:
        for name, arm in (arms | taught).items():
            bar.set_description(f"tuning {name}")
            tuning[name], curves[name] = _tune(
                arm, student, rows, recipe, classes, tuple(sorted(grid)), tuning_students, seed_of(seed, 1)
            )
            bar.update()
            bar.set_description(f"final {name}")
            share = _share(arm, rows, recipe, students, seed_of(seed, 2), final=True)
            finals[name], _ = _run(
                arm, student, rows, share, recipe, classes, [tuning[name]["lr"]], seed_of(seed, 2)
            )
            bar.update()
        # The one look at the test set.
        results = {
            name: _Result(*judge(stack, *(part.expand(stack.size, *part.shape) for part in test)))
            for name, stack in finals.items()
        }
    seconds = time.perf_counter() - began
    return {
        name: {
            **_against(f"taught by {name}", list(arms), results),
            "tuning": _named(name, arms, tuning),
            "curves": _named(name, arms, curves),
            "oracles": [arm for arm, its in arms.items() if its.oracle],
            "recipe": recipe.to_json(),
            "teacher": teacher.config(),
            "students": students,
            "seed": seed,
            "seconds": seconds,
        }
        for name, teacher in teachers.items()
    }


def _taught(teacher: Teacher) -> Arm:
    return Arm(TaughtLoss(teacher), wants_dev=any(name.startswith("dev_") for name in teacher.features))


def _named(teacher: str, arms: Mapping[str, Arm], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one teacher's arms, its own under the name ``taught``."""
    return {"taught": values[f"taught by {teacher}"], **{arm: values[arm] for arm in arms}}


class _Share(NamedTuple):
    """What each student of an arm learns from, in equal parts of a batch, and what it is measured on."""

    learn: list[Tensor]  # [S, N] each
    dev: Tensor  # [S, D]


def _share(arm: Arm, rows: _Rows, recipe: Recipe, students: int, seed: int, *, final: bool) -> _Share:
    """The row numbers of each student: all that there are for a final one, less the dev rows in tuning.

    Arms that learn from dev rows in a way of their own are tuned by holding a part of those back.
    """
    total, train = len(rows.targets), rows.train
    everything = torch.arange(total).expand(students, -1)
    training, clean = everything[:, :train], everything[:, train:]
    if train == total:  # no dev set
        if final and not arm.wants_dev:
            return _Share([training], training[:, :0])
        pools = split_pools(train, students, recipe.dev_fraction, seed_of(seed, 1))
        return _Share([pools.train], pools.dev)
    if arm.rows == "all":
        return _Share([everything if final and not arm.wants_dev else training], clean)
    held = clean
    if not final:
        pools = split_pools(total - train, students, recipe.dev_fraction, seed_of(seed, 1))
        clean, held = pools.train + train, pools.dev + train
    return _Share([clean] if arm.rows == "dev" else [training, clean], held)


def _run(
    arm: Arm,
    student: Make,
    rows: _Rows,
    share: _Share,
    recipe: Recipe,
    classes: int,
    rates: Sequence[float],
    seed: int,
    points: Sequence[int] = (),
) -> tuple[Stack, list[Tensor]]:
    """Students of ``share``, once for each learning rate, side by side; their dev errors at ``points``."""
    size, count = len(share.dev), len(rates)
    parts = len(share.learn)
    sizes = [(recipe.batch_size + part) // parts for part in range(parts)]
    batches = torch.cat(
        [
            draw_batches(pool, recipe.steps, rows_of_pool, seed_of(seed, 3, part))
            for part, (pool, rows_of_pool) in enumerate(zip(share.learn, sizes, strict=True))
        ],
        -1,
    ).repeat(1, count, 1)
    stack = Stack(student, [seed_of(seed, 2, index) for index in range(size)] * count)
    held = share.dev.repeat(count, 1)
    dev = rows.inputs[held], rows.targets[held]
    lesson = Lesson((rows.inputs, rows.targets), batches, arm.loss, classes, dev if arm.wants_dev else None)
    curve: list[Tensor] = []

    def look(step: int) -> None:
        curve.append(judge(stack, *dev)[0])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, 4))
        train_stack(
            stack,
            lesson,
            lr=torch.tensor(rates, dtype=rows.inputs.dtype).repeat_interleave(size),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            decay=recipe.decay,
            at=points,
            then=look,
        )
    return stack, curve


def _tune(
    arm: Arm,
    student: Make,
    rows: _Rows,
    recipe: Recipe,
    classes: int,
    grid: Sequence[float],
    students: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The learning rate with the least mean dev error, and the curve of that error along its runs."""
    share = _share(arm, rows, recipe, students, seed, final=False)
    points = sorted({round(recipe.steps * part / 20) for part in range(1, 21)} - {0})
    _, curve = _run(arm, student, rows, share, recipe, classes, grid, seed, points)
    errors = torch.stack(curve).reshape(len(points), len(grid), students).mean(-1)  # [points, rates]
    best = int(errors[-1].argmin())
    chosen = {
        "lr": grid[best],
        "grid": list(grid),
        "dev_error": errors[-1].tolist(),
        "at_edge": len(grid) > 1 and best in (0, len(grid) - 1),
    }
    return chosen, {"step": points, "dev_error": errors[:, best].tolist()}


def _against(own: str, arms: Sequence[str], results: Mapping[str, _Result]) -> dict[str, Any]:
    """Errors, p and summary of one teacher's arm, called ``taught``, against ``arms``."""
    from scipy import stats

    taught = results[own].error.double()
    named = {"taught": results[own], **{arm: results[arm] for arm in arms}}
    p: dict[str, float | None] = {}
    summary = {}
    for arm, result in named.items():
        errors = result.error.double()
        difference = taught - errors
        summary[arm] = {
            "mean": float(errors.mean()),
            "sd": float(errors.std()) if len(errors) > 1 else None,
            "difference": float(difference.mean()),
            "ahead": int((difference < 0).sum()),
            "behind": int((difference > 0).sum()),
        }
        if arm != "taught":
            same = len(errors) < 2 or bool((difference == difference[0]).all())
            p[arm] = None if same else float(stats.ttest_rel(taught.numpy(), errors.numpy()).pvalue)
    return {
        "test_error": {arm: result.error.tolist() for arm, result in named.items()},
        "test_loss": {
            arm: [value if math.isfinite(value) else None for value in result.loss.tolist()]
            for arm, result in named.items()
        },
        "p": p,
        "summary": summary,
    }
