"""Teaching: episodes of fresh students, and the teacher's step along their mean hypergradient.

    for each update:   S fresh students take the whole course under the teacher  (students.py)
                       the reverse pass gives each one's gradient to the teacher (run.py, math.md
                       section 5) wild ones are skipped, the others clipped, averaged: a step of Adam the
                       guard looks at measure and norms, and goes back where they break (section 8)

Everything random comes from (seed, update), so a run is the same bits whenever and however often it is broken
off: every update ends with a checkpoint, a safetensors file and then the JSON file that names it.

Not here: comparing the taught student with baselines (compare.py).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from l2t import check, optim
from l2t.augment import AUGMENTS
from l2t.budget import free_memory
from l2t.curvature import CURVATURES
from l2t.files import read_json, read_tensors, to_json, write_json, write_tensors
from l2t.plan import Plan, plan
from l2t.students import (
    DECAYS,
    SIDE_BY_SIDE,
    Cohort,
    GivenLoss,
    Lesson,
    Make,
    Stack,
    bytes_of,
    calibrated_cross_entropy,
    calibrated_error,
    cross_entropy,
    draw_batches,
    error,
    evaluate,
    evaluate_again,
    held_rows,
    learning_rates,
    seed_of,
    seeded,
    side_by_side,
    split_pools,
    students_for,
    taught_loss,
    teacher_beside,
    wrong,
)
from l2t.students import (
    train as train_stack,
)
from l2t.teacher import AnyTeacher, StudentState
from l2t.unroll import SCHEDULES, unroll
from l2t.weight_net import TRANSPOSING, WeightNet

Data = tuple[Tensor, Tensor]
"""Inputs (N, ...) and targets (N,)."""

Score = Callable[[Tensor, Tensor], Tensor]
"""How wrong students are, (S, D): of logits (S, D, C) at targets (S, D)."""


AVERAGINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda gradients: gradients.mean(0),
    "median": lambda gradients: gradients.quantile(0.5, 0),
    "direction": lambda gradients: F.normalize(gradients, dim=1, eps=1e-30).mean(0),
}
"""How gradients of an episode, (students, numbers), are brought together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How a teacher learns from the gradients of students, whatever they are: part of :class:`Recipe`."""

    students: int = 4
    updates: int = 80
    teacher_lr: float = 0.12
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 5
    cooldown: float = 0.4
    average: float = 0.25
    clip: float = 2.0
    skip: float = 50.0
    window: int = 100
    guard_window: int = 5
    guard_norm: float = 30.0
    guard_rise: float = 0.05
    guard_shrink: float = 0.5
    guard_returns: int = 5
    curvature: str = "reverse"
    schedule: str = "auto"
    memory: int | str | None = None
    truncate: int | None = None
    damping: float = 1.0
    growth: float | None = None
    anchor: float = 0.0
    averaging: str = "mean"
    threads: int | None = 1

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before any work is done."""
        op = type(self).__name__
        for name in ("students", "updates", "window", "guard_window", "guard_returns"):
            check.recipe_count(name, getattr(self, name), 1, op)
        check.recipe_count("warmup", self.warmup, 0, op)
        for name in ("threads", "truncate"):
            if getattr(self, name) is not None:
                check.recipe_count(name, getattr(self, name), 1, op)
        for name in ("teacher_lr", "clip", "skip", "guard_norm", "guard_rise"):
            check.recipe_number(name, getattr(self, name), 0.0, math.inf, open_low=True, op=op)
        check.recipe_number("anchor", self.anchor, 0.0, math.inf, op=op)
        for name in ("cooldown", "average", "guard_shrink"):
            check.recipe_number(name, getattr(self, name), 0.0, 1.0, op=op)
        check.recipe_number("damping", self.damping, 0.0, 1.0, open_low=True, op=op)
        if self.growth is not None:
            check.recipe_number("growth", self.growth, 1.0, math.inf, op=op)
        check.recipe_choice("averaging", self.averaging, AVERAGINGS, op)
        check.recipe_choice("curvature", self.curvature, CURVATURES, op)
        check.recipe_choice("schedule", self.schedule, SCHEDULES, op)
        check.unroll_memory(self.memory, self.schedule)
        check.recipe_numbers("betas", self.betas, 2, op)
        object.__setattr__(self, "betas", tuple(self.betas))

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON-able dict, which the class takes back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Recipe(Rules):
    """How students are trained and how a teacher learns from them: numbers and names only, JSON-able.

    Args:
        steps: steps T of a student's course.
        batch_size: rows a step.
        lr: learning rate of the students while teaching; None lets a probe choose it.
        momentum: of the students' SGD.
        weight_decay: of the students' SGD.
        decay: of the students' learning rate, ``"linear"`` (to zero) or ``"constant"``.
        augment: what is done to the images of a training batch (:func:`l2t.augment.augment`): ``"none"``,
            ``"crop"``, ``"flip"`` or ``"crop-flip"``.
        students: fresh students an episode S; each update of the teacher takes one episode.
        updates: updates of the teacher.
        teacher_lr: learning rate of the teacher's Adam at its highest.
        betas: of Adam.
        warmup: updates over which the teacher's learning rate rises.
        cooldown: share of the updates, at the end, over which it falls along a line.
        average: share of the updates, at the end, whose teachers are averaged into the result; 0 takes the
            last one.
        measure: what the teacher lowers on the dev set: ``"calibrated-cross-entropy"``, at each student's
            best temperature, so that no teacher gains by making students more or less sure;
            ``"cross-entropy"``; ``"expected-error"`` (1 - p_y); or ``"smooth-error"`` (2 sigmoid(k (max p -
            p_y)) - 1), docs/math.md section 7.
        sharpness: k of the smooth error.
        dev_fraction: share of the training rows that each student of an episode is measured on, drawn anew
            every time, where no dev set is given.
        dev_rows: at most so many of them.
        hold_back: share of a given dev set that teaching does not see, for the trial at the end: it catches a
            teacher that has overfitted the rest, and costs the rest that much.
        clip: a student's gradient is clipped to this many running median norms.
        skip: a student whose norm is this many running median norms is skipped.
        window: norms that the running median looks back on.
        probe_lrs: learning rates that the probe tries, the largest first.
        probe_students: students a try.
        probe_norm: largest median norm that the probe takes; no norm may be ten times the median.
        probe_agreement: least agreement that the probe takes.
        probe_margin: the students' rate is this share of what the probe takes: at the edge itself teachers
            still learn, but what they learn differs from seed to seed.
        guard_window: episodes that the guard looks at together.
        guard_norm: the guard goes back when the median norm of an episode is this many times the least that
            it has seen (the first episode's, or a window's), twice in a row.
        guard_rise: the guard goes back when the mean measure of its window (two episodes or more) is this
            share, and four standard errors of the difference, above the best.
        guard_shrink: factor of the teacher's step after each return.
        guard_returns: returns after which teaching ends.
        trial_students: fresh students on whom the result is tried before it is returned, against the neutral
            teacher (:meth:`l2t.Teacher.neutral`): the loss that teaching started with. They are judged by
            the expected error of their answers on dev, each student's at its own best temperature. None: 10,
            or as many as give a thousand answers where dev rows are fewer than a hundred.
        trial_rates: factors of the students' learning rate; each teacher is tried at its best one.
        trial_margin: standard errors, over students and over dev rows that they share, by which a taught
            teacher has to be ahead of the neutral one there.
        curvature: how a reverse step gets its second derivatives, as in :func:`l2t.unroll`.
        schedule: what is remembered of a run, a name that :func:`l2t.unroll` knows. Long runs want a
            ``memory``; what they cost is told by :func:`plan_episode`.
        memory: bytes for it, a number or such as ``"2GB"``; None: all that the schedule wants, of ``"auto"``
            a quarter of what is free where the run begins. Bits do not depend on it.
        truncate: walk back over the last so many steps only; None: all.
        damping: factor of the adjoint at every step back, as in :func:`l2t.unroll`.
        growth: of the adjoint, where the walk back ends, as there; None: nowhere.
        perturb: the measure is that of students whose weights are moved by this share of their length, each
            along a random direction of its own: a mean over a neighbourhood, by one draw a student. Dev
            errors of episodes are of the same; trials move nothing.
        anchor: pull of the teacher back to its start, as AdamW's weight decay pulls to zero: each update
            takes this share, times the teacher's rate, of the way.
        averaging: how the gradients of an episode's students are brought together: ``"mean"``;
            ``"median"``, number by number, which no single student can move far; or ``"direction"``, the mean
            of each one's over its norm, for students (or windows) whose norms differ far.
        threads: torch threads while teaching; bits depend on them. One is fastest for small students. None
            leaves the setting alone.

    Example:
        >>> import l2t
        >>> recipe = l2t.Recipe(steps=100, updates=20)
        >>> l2t.Recipe(**recipe.to_json()) == recipe
        True
    """

    steps: int = 300
    batch_size: int = 50
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: str = "linear"
    augment: str = "none"
    measure: str = "calibrated-cross-entropy"
    sharpness: float = 50.0
    dev_fraction: float = 0.2
    dev_rows: int = 2000
    hold_back: float = 0.0
    probe_lrs: tuple[float, ...] = (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
    probe_students: int = 8
    probe_norm: float = 1.0
    probe_agreement: float = 0.05
    probe_margin: float = 0.75
    trial_students: int | None = None
    trial_rates: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
    trial_margin: float = 2.0
    perturb: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before any work is done."""
        super().__post_init__()
        for name in ("steps", "batch_size", "dev_rows"):
            check.recipe_count(name, getattr(self, name), 1)
        check.recipe_count("probe_students", self.probe_students, 2)
        if self.trial_students is not None:
            check.recipe_count("trial_students", self.trial_students, 2)
        for name in ("sharpness", "probe_norm", "probe_margin"):
            check.recipe_number(name, getattr(self, name), 0.0, math.inf, open_low=True)
        for name in ("weight_decay", "perturb", "trial_margin"):
            check.recipe_number(name, getattr(self, name), 0.0, math.inf)
        for name in ("momentum", "dev_fraction", "hold_back"):
            check.recipe_number(name, getattr(self, name), 0.0, 1.0)
        if self.lr is not None:
            check.recipe_number("lr", self.lr, 0.0, math.inf, open_low=True)
        check.recipe_choice("decay", self.decay, DECAYS)
        check.recipe_choice("augment", self.augment, AUGMENTS)
        check.recipe_choice("measure", self.measure, MEASURES)
        for name in ("probe_lrs", "trial_rates"):
            check.recipe_numbers(name, getattr(self, name), None)
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Taught:
    """What :func:`teach` returns.

    Attributes:
        teacher: the taught teacher.
        history: what happened, JSON-able: ``seed``, ``recipe``, ``teacher`` (settings), ``lr``, ``probe`` (a
            row a try), ``updates`` (a row an update), ``events`` (what was said aloud), ``adjoint_norms`` (by
            step, of five updates from the first to the last), ``states`` (the state by step, mean over
            the finite students of the last episode), ``trial`` and ``seconds`` (of probe, updates and trial).
        recipe: the recipe with the learning rate that was used.

    Example:
        >>> import torch, l2t
        >>> train = torch.randn(64, 4), torch.randint(3, (64,))
        >>> recipe = l2t.Recipe(steps=3, updates=2, lr=0.1, trial_students=2)
        >>> teacher = l2t.Teacher(3, "full", link="identity")
        >>> taught = l2t.teach(teacher, lambda: torch.nn.Linear(4, 3), train, recipe=recipe, progress=False)
        >>> len(taught.history["updates"]), taught.recipe.lr
        (2, 0.1)
    """

    teacher: AnyTeacher
    history: dict[str, Any]
    recipe: Recipe


def _smooth_error(logits: Tensor, target: Tensor, sharpness: float) -> Tensor:
    p = F.softmax(logits, -1)
    own = p.gather(-1, target[..., None])[..., 0]
    return (2.0 * torch.sigmoid(sharpness * (p.amax(-1) - own)) - 1.0).mean(-1)


def _expected_error(logits: Tensor, target: Tensor, _: float) -> Tensor:
    return 1.0 - F.softmax(logits, -1).gather(-1, target[..., None])[..., 0].mean(-1)


MEASURES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "calibrated-cross-entropy": lambda logits, target, _: calibrated_cross_entropy(logits, target),
    "cross-entropy": lambda logits, target, _: cross_entropy(logits, target),
    "expected-error": _expected_error,
    "smooth-error": _smooth_error,
}


class Episode(NamedTuple):
    """What S fresh students say of a teacher: each one's measure and dev error (S,) and gradient (S, P)."""

    measure: Tensor
    dev_error: Tensor
    gradient: Tensor
    adjoint_norms: list[float]
    states: dict[str, list[float]]

    @property
    def norms(self) -> list[float]:
        """Norm of each student's gradient; infinite where the gradient or the measure is not finite."""
        norms = torch.linalg.vector_norm(self.gradient, dim=1)
        good = norms.isfinite() & self.measure.isfinite()
        return torch.where(good, norms, math.inf).tolist()  # type: ignore[no-any-return]

    @property
    def agreement(self) -> float:
        """Mean cosine between the gradients of different students; NaN where fewer than two are finite."""
        kept = self.gradient[[math.isfinite(norm) for norm in self.norms]]
        if len(kept) < 2:
            return math.nan
        unit = F.normalize(kept, dim=1, eps=torch.finfo(kept.dtype).tiny)
        cosines = unit @ unit.T
        return float((cosines.sum() - cosines.diagonal().sum()) / (len(kept) * (len(kept) - 1)))


class _Course(NamedTuple):
    """What S fresh students are made from, learn from and are measured on."""

    seeds: list[int]
    batches: Tensor  # [T, S, B]
    dev: Data  # [S, D, ...], [S, D]


def _course(train: Data, dev: Data | None, recipe: Recipe, seed: int, size: int) -> _Course:
    """The course of ``size`` students; their splits are their own where there is no dev set."""
    if dev is None:
        pools = split_pools(len(train[1]), size, recipe.dev_fraction, seed_of(seed, 1), recipe.dev_rows)
        learn, held = pools.train, (train[0][pools.dev], train[1][pools.dev])
    else:
        learn = torch.arange(len(train[1])).expand(size, -1)
        held = dev[0].expand(size, *dev[0].shape), dev[1].expand(size, -1)
    seeds = [seed_of(seed, 2, index) for index in range(size)]
    batches = draw_batches(learn, recipe.steps, recipe.batch_size, seed_of(seed, 3))
    return _Course(seeds, batches.to(train[0].device), held)


def episode(
    teacher: AnyTeacher,
    student: Make,
    train: Data,
    dev: Data | None,
    recipe: Recipe,
    lr: float,
    seed: int,
    size: int,
) -> Episode:
    """``size`` fresh students take the course under ``teacher``; the gradient of each one's measure to it.

    The same ``seed`` gives the same students, splits, batches and dropout. They take it where ``train``
    lives; what is returned is on the CPU.
    """
    stack, lesson, loss, held, settings = _unrolled(teacher, student, train, dev, recipe, lr, seed, size)
    errors: list[Tensor] = []
    batch = train[0][: recipe.batch_size]
    of_a_row = max(1, bytes_of(student, batch).step // len(batch))
    rows = max(1, SIDE_BY_SIDE // of_a_row // size)  # dev rows of each student, in the memory that there is

    def measure(model: nn.Module) -> Tensor:
        assert isinstance(model, Stack)

        def moved() -> contextlib.AbstractContextManager[None]:
            return model.perturbed(recipe.perturb, seed_of(seed, 5))

        if held[1].shape[1] > rows:
            logits = evaluate_again(model, held[0], max(1, rows // 8), moved)
        else:
            with moved():
                logits = evaluate(model, held[0])
        errors[:] = [error(logits.detach(), held[1])]
        return MEASURES[recipe.measure](logits, held[1], recipe.sharpness)

    with seeded(seed_of(seed, 4)):
        run = unroll(
            stack, lesson.batches, lesson, measure, damping=recipe.damping, growth=recipe.growth, **settings
        )
        run.backward()
    states = lesson.tracker.states
    return Episode(
        run.measure.detach().cpu(),
        errors[0].cpu(),
        loss.gradient().cpu(),
        [float(norm) for norm in run.report.adjoint_norms],
        _means(states[:-1]),
    )


def _means(states: Sequence[StudentState]) -> dict[str, list[float]]:
    """Each field by step, the mean over the students that are finite there; NaN where none is."""
    fields = [name for name, value in states[0]._asdict().items() if value is not None]
    found: dict[str, list[float]] = {name: [] for name in fields}
    for state in states:
        values = [torch.as_tensor(getattr(state, name)) for name in fields]
        finite = torch.stack([value.isfinite() for value in values]).all(0)
        for name, value in zip(fields, values, strict=True):
            found[name].append(float(value[finite].mean()))
    return found


def plan_episode(
    teacher: AnyTeacher, student: Make, train: Data, dev: Data | None = None, *, recipe: Recipe
) -> Plan:
    """What the run of one episode of :func:`teach` would cost, as :func:`l2t.plan` tells it.

    Example:
        >>> import torch, l2t
        >>> from l2t.teach import plan_episode
        >>> train, recipe = (torch.randn(64, 4), torch.randint(3, (64,))), l2t.Recipe(schedule="every")
        >>> plan_episode(l2t.Teacher(3), lambda: torch.nn.Linear(4, 3), train, recipe=recipe).schedule
        Segments(length=17, slots=None)
    """
    lr = recipe.lr or recipe.probe_lrs[-1]
    stack, lesson, _, _, settings = _unrolled(
        teacher, student, train, dev, recipe, lr, seed_of(0), recipe.students
    )
    with threads(recipe.threads), seeded(0), torch.enable_grad():
        return plan(stack, list(lesson.batches), lesson, **settings)


class _Unrolled(NamedTuple):
    """A run of S fresh students under a teacher: what :func:`l2t.unroll` needs, but for the measure."""

    stack: Stack
    lesson: Lesson
    loss: GivenLoss
    held: Data  # what they are measured on, as in a course
    settings: dict[str, Any]


def _unrolled(
    teacher: AnyTeacher,
    student: Make,
    train: Data,
    dev: Data | None,
    recipe: Recipe,
    lr: float,
    seed: int,
    size: int,
) -> _Unrolled:
    train = train[0].detach(), train[1]  # a leaf that is no teacher's is given no gradient
    dev = None if dev is None else (dev[0].detach(), dev[1])
    seeds, batches, held = _course(train, dev, recipe, seed, size)
    loss = taught_loss(teacher_beside(teacher, train[0]), record=True)
    lesson = Lesson(train, batches, loss, teacher.num_classes, _dev_features(teacher, held), recipe.augment)
    rates = learning_rates(lr, recipe.steps, recipe.decay)
    settings = {
        "optimizer": optim.SGD(
            lr=lambda step: rates[step], momentum=recipe.momentum, weight_decay=recipe.weight_decay
        ),
        "curvature": recipe.curvature,
        "schedule": recipe.schedule,
        "memory": recipe.memory,
        "truncate": recipe.truncate,
    }
    return _Unrolled(Stack(student, seeds).to(train[0].device), lesson, loss, held, settings)


def _dev_features(teacher: AnyTeacher, held: Data) -> Data | None:
    return held if any(name.startswith("dev_") for name in teacher.features) else None


def trial(
    teachers: Sequence[AnyTeacher],
    student: Make,
    train: Data,
    dev: Data | None,
    recipe: Recipe,
    rates: Sequence[float],
    seed: int,
    score: Score = wrong,
) -> Tensor:
    """How wrong the same fresh students are on dev under each teacher and learning rate: 0 or 1, or what else
    ``score`` says, (teachers, rates, students, rows).
    """
    rows = held_rows(len(train[1]), recipe.dev_fraction, recipe.dev_rows) if dev is None else len(dev[1])
    size = students_for(rows, recipe.trial_students)
    seeds, every_batch, every_held = _course(train, dev, recipe, seed, size)
    cohorts = side_by_side(student, train[0][: recipe.batch_size], size, rates)

    def scores(teacher: AnyTeacher, cohort: Cohort) -> list[Tensor]:
        count, mine = len(cohort.rates), cohort.students
        batches = every_batch[:, mine].repeat(1, count, 1)
        inputs, targets = every_held[0][mine], every_held[1][mine]  # the same for every rate
        held = inputs, targets.repeat(count, 1)
        stack = Stack(student, seeds[mine] * count).to(train[0].device)
        taught = taught_loss(teacher_beside(teacher, train[0]))
        lesson = Lesson(
            train, batches, taught, teacher.num_classes, _dev_features(teacher, held), recipe.augment
        )
        with seeded(seed_of(seed, 4)):
            train_stack(
                stack,
                lesson,
                lr=cohort.lr(train[0]),
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                decay=recipe.decay,
            )
        with torch.no_grad():
            logits = evaluate(stack, inputs).split(len(targets))
        return [score(rate, targets) for rate in logits]

    found = [torch.cat([rows for cohort in cohorts for rows in scores(one, cohort)]) for one in teachers]
    return torch.stack(found).reshape(len(teachers), len(rates), size, -1).cpu()


def standard_error(values: Tensor, same_rows: bool) -> float:
    """Of the mean of values (students, rows): over students and, where all have the same rows, over these.

    Rows of their own differ from student to student, and so are in what the students differ in.
    """

    def of_mean(means: Tensor) -> float:
        return float(means.var()) / len(means) if len(means) > 1 else 0.0

    return math.sqrt(of_mean(values.mean(1)) + (of_mean(values.mean(0)) if same_rows else 0.0))


def usual_norm(norms: Sequence[float]) -> float:
    """The median, of those that are not 0: a student with nothing to say is no measure of the others."""
    return median([norm for norm in norms if norm > 0] or [0.0])


class Guard:
    """Looks at a window of episodes, keeps the best teacher it has seen, and says when a run has broken.

    The rules are those of :class:`Recipe`'s ``guard_`` fields; a run breaks, too, when more than half of the
    students of an episode have no finite gradient. The good teacher is the mean of the teachers of the best
    full window, before there is one better than the first episode the start.
    """

    def __init__(self, recipe: Rules, start: dict[str, Tensor]) -> None:
        self.recipe = recipe
        self.good = start
        self.window: list[dict[str, Tensor]] = []  # the teachers of the last episodes
        # Of the same episodes, each student's measure and the median norm; and over the whole run.
        self.memory: dict[str, Any] = {
            "measures": [],
            "norms": [],
            "least_norm": None,
            "best": None,
            "best_spread": 0.0,
            "high": 0,
            "returns": 0,
            "found": False,
        }

    def judge(self, measures: list[float], norms: list[float], teacher: dict[str, Tensor]) -> str | None:
        """Why to go back, or None: measures and norms of an episode's students, infinite where not finite."""
        memory, recipe = self.memory, self.recipe
        finite = [index for index, norm in enumerate(norms) if math.isfinite(norm)]
        if 2 * len(finite) < len(norms):
            return check.guard_not_finite(len(norms) - len(finite), len(norms))
        norm = usual_norm([norms[index] for index in finite])
        self.window = [*self.window, teacher][-recipe.guard_window :]
        memory["measures"] = [*memory["measures"], [measures[i] for i in finite]][-recipe.guard_window :]
        memory["norms"] = [*memory["norms"], norm][-recipe.guard_window :]
        every = [value for values in memory["measures"] for value in values]
        now = mean(every)
        spread = stdev(every) / math.sqrt(len(every)) if len(every) > 1 else 0.0  # of the mean
        if memory["best"] is None:  # the first episode, of the start
            memory.update(best=now, best_spread=spread)
        memory["least_norm"] = memory["least_norm"] or norm  # 0 is no norm to compare with
        memory["high"] = memory["high"] + 1 if norm > recipe.guard_norm * memory["least_norm"] else 0
        if memory["high"] >= 2:
            return check.guard_norm(norm, memory["least_norm"])
        full = len(self.window) == recipe.guard_window
        if full:
            memory["least_norm"] = min(memory["least_norm"], usual_norm(memory["norms"]) or math.inf)
        best = memory["best"]
        if full and now < best and not memory["high"]:
            memory.update(best=now, best_spread=spread, found=True)
            self.good = {
                name: torch.stack([one[name] for one in self.window]).mean(0) for name in self.window[0]
            }
        noise = 4.0 * math.hypot(spread, memory["best_spread"])
        if len(self.window) > 1 and now - best > max(noise, recipe.guard_rise * abs(best)):
            return check.guard_measure(now, best)
        return None

    def returned(self) -> bool:
        """After a return: what the broken teacher showed counts no more. Whether teaching should go on."""
        self.window = []
        self.memory.update(measures=[], norms=[], high=0, returns=self.memory["returns"] + 1)
        return bool(self.memory["returns"] < self.recipe.guard_returns)


def teach(
    teacher: AnyTeacher,
    student: Make,
    train: Data,
    dev: Data | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    resume: bool = False,
    guard: bool = True,
    progress: bool = True,
) -> Taught:
    """Teach a teacher: lower its students' dev measure by exact gradients through their whole training.

    Method: Wu et al., "Learning to Teach with Dynamic Loss Functions" (NeurIPS 2018); the reverse pass is
    docs/math.md section 5, calibration and guard answer section 8. Two runs with equal arguments are the same
    to the bit on one machine, broken off and resumed or not.

    Args:
        teacher: where to start; it is left as it is. What of it is frozen (``requires_grad_(False)``) does
            not learn.
        student: makes a fresh student, ``(B, ...) -> (B, C)``; one that ``torch.vmap`` can run.
        train: inputs (N, ...) floating point and targets (N,) int64. Students learn on the device that they
            are on; all random draws but a student's own (dropout) are the CPU's, so a seed means the same.
        dev: rows to measure the students on; None draws ``recipe.dev_fraction`` of ``train`` anew for every
            student of every episode.
        recipe: the settings; None is ``Recipe()``.
        seed: of all that is random.
        directory: where to keep checkpoints, ``teacher.safetensors`` and ``history.json``; None keeps
            nothing.
        resume: go on with the run in ``directory``, or start one where there is none.
        guard: watch the run, go back when it breaks, and return a taught teacher only where fresh students
            are ahead under it; else the neutral one (:meth:`l2t.Teacher.neutral`).
        progress: show a bar. What goes wrong is said on the standard error either way.

    Raises:
        ValueError: for data that do not fit together, a directory that holds a run when ``resume`` is False,
            and a run of other arguments when it is True.
        RuntimeError: when the student cannot run under ``torch.vmap``.

    Example:
        >>> import torch, l2t
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> recipe = l2t.Recipe(steps=10, updates=2, lr=0.1, trial_students=2)
        >>> make = lambda: torch.nn.Linear(8, 3)
        >>> taught = l2t.teach(l2t.Teacher(3), make, (x, x[:, :3].argmax(1)), recipe=recipe, progress=False)
        >>> len(taught.history["updates"])
        2
    """
    recipe = recipe or Recipe()
    check_arguments(teacher, student, train, dev, recipe)
    run = _Teaching(teacher, student, train, dev, recipe, seed, directory, guard, progress)
    with threads(recipe.threads), torch.enable_grad():
        return run.go(resume)


def check_arguments(
    teacher: AnyTeacher, student: Make, train: Data, dev: Data | None, recipe: Recipe
) -> None:
    """Whether they fit together, before any work is done; raises as :func:`teach` says."""
    dtype = next(teacher.parameters()).dtype
    check.teach_precision(dtype)
    check.teach_tensors("teach", train=train, **({} if dev is None else {"dev": dev}))
    check.teach_data("train", train, teacher.num_classes, dtype)
    if dev is not None:
        check.one_device("teach", train[0], dev=dev[0])
        check.teach_data("dev", dev, teacher.num_classes, dtype)
        check.rows_alike("teach", train[0], dev=dev[0])
    check.teach_learns(any(parameter.requires_grad for parameter in teacher.parameters()))
    check.augments("teach", recipe.augment, train[0])
    check.teach_student_fits(student, train[0], teacher.num_classes, recipe.batch_size)
    if isinstance(teacher, WeightNet):
        check.teach_transposes(recipe.curvature, TRANSPOSING)


def split_dev(dev: Data | None, recipe: Recipe, seed: int) -> tuple[Data | None, Data | None]:
    """The dev rows that teaching sees, and those for trials: all are both, but for ``recipe.hold_back``."""
    if dev is None or not recipe.hold_back:
        return dev, dev
    (rest,), (held,) = split_pools(len(dev[1]), 1, recipe.hold_back, seed_of(seed, 3))
    return (dev[0][rest], dev[1][rest]), (dev[0][held], dev[1][held])


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run the body with ``count`` torch threads, None leaves them alone, and with those algorithms of cuDNN
    that give a step that is taken again the same bits.
    """
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(before[0] if count is None else count)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]


SHARE_OF_FREE = 0.25
"""Of the free memory, that a run remembers at most which says nothing of it: others may run beside it."""

_NUMBERS = ("update", "since", "averaged", "shrink", "norms", "ended", "finished")


class Outer:
    """A teacher on its way: its state between updates, what changes it, and checkpoints of both.

    What it learns from is a subclass's: :meth:`_gather`, the trial of the results and what a run must share
    with the one that it goes on with.

    Attributes:
        unsaid: entries of its identity that checkpoints of older versions lack: these go on all the same.
    """

    unsaid: tuple[str, ...] = ()

    def __init__(
        self,
        teacher: AnyTeacher,
        rules: Rules,
        seed: int,
        directory: str | Path | None,
        guard: bool,
        progress: bool,
    ) -> None:
        self.start = copy.deepcopy(teacher).cpu()  # a copy goes where the data are
        self.teacher = copy.deepcopy(self.start).requires_grad_(True)
        self.rules, self.seed, self.progress = rules, check.seed_number("teach", seed), progress
        self.directory = None if directory is None else Path(directory)
        self.adam = self._new_adam()
        self.guard = Guard(rules, self._weights()) if guard else None
        self.average = {name: torch.zeros_like(value) for name, value in self._weights().items()}
        self.averaged = 0
        self.update = 0
        self.since = 0  # updates since the start or the last return
        self.shrink = 1.0
        self.norms: list[float] = []
        self.ended = False  # before the last update, by the guard
        self.finished = False
        self.history: dict[str, Any] = {
            "seed": self.seed,
            "recipe": rules.to_json(),
            "teacher": teacher.config(),
            "updates": [],
            "events": [],
            "adjoint_norms": {},
            "trial": None,
            "seconds": {"updates": 0.0, "trial": 0.0},
        }

    def _gather(self) -> tuple[Episode, dict[str, Any]]:
        """What the students of this update say of the teacher, and what its row in the history says besides.

        All that is random in it comes from the seed and ``self.update``.
        """
        raise NotImplementedError

    def _try(self, taught: dict[str, dict[str, Tensor]]) -> None:
        """Make the best of these teachers and the neutral one ``self.teacher``."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one that it goes on with."""
        raise NotImplementedError

    def _begin(self) -> None:
        """What comes before the first update, and again in a run that goes on."""

    @contextlib.contextmanager
    def _clocked(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.history["seconds"][part] += time.perf_counter() - began

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.teacher.named_parameters()}

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.teacher.parameters(), betas=self.rules.betas, foreach=False)

    def run(self, resume: bool) -> None:
        """All updates that are left, and the end."""
        if self.directory is not None:
            check.can_be_written("teach", self.directory)
            self._open(self.directory, resume)
        try:
            self._begin()
            self._updates()
            if not self.finished:
                self._finish()
        except KeyboardInterrupt:
            if self.directory is not None:
                self._say(check.teach_interrupted(self.update, self.rules.updates, self.directory))
            raise
        for taught, given in zip(self.teacher.parameters(), self.start.parameters(), strict=True):
            taught.requires_grad_(given.requires_grad)

    def _updates(self) -> None:
        total, shown = self.rules.updates, self.progress
        with tqdm(total=total, initial=self.update, disable=not shown, unit="update", desc="teaching") as bar:
            while self.update < total and not self.ended:
                with self._clocked("updates"):
                    row = self._step()
                bar.update()
                bar.set_postfix_str(_postfix(row))
                self._commit()

    def _learnable(self, seen: Episode) -> Episode:
        """The same without a gradient to what is frozen."""
        if all(value.requires_grad for value in self.start.parameters()):
            return seen
        parts = [torch.full((value.numel(),), value.requires_grad) for value in self.start.parameters()]
        return seen._replace(gradient=torch.where(torch.cat(parts), seen.gradient, 0.0))

    def _step(self) -> dict[str, Any]:
        """One episode and what follows from it."""
        began = time.perf_counter()
        rules, update = self.rules, self.update
        seen, more = self._gather()
        seen = self._learnable(seen)
        norms = seen.norms
        usual = median(self.norms) if self.norms else usual_norm(norms)
        wild = [not norm <= rules.skip * usual or not math.isfinite(norm) for norm in norms]
        kept = [index for index, bad in enumerate(wild) if not bad]
        self.norms = [*self.norms, *(norms[index] for index in kept if norms[index] > 0)][-rules.window :]
        bound = rules.clip * median(self.norms) if self.norms else 0.0
        rate = rules.teacher_lr * self.shrink * self._rise_and_fall()
        row: dict[str, Any] = {
            "update": update,
            "measure": _mean_finite(seen.measure),
            "dev_error": _mean_finite(seen.dev_error),
            "norm": median(norms),
            "norms": norms,
            "agreement": seen.agreement,
            "skipped": len(norms) - len(kept),
            "clipped": sum(norms[index] > bound for index in kept),
            "teacher_lr": rate,
            **more,
        }
        if seen.adjoint_norms and update in _milestones(rules.updates):
            self.history["adjoint_norms"][str(update)] = _plain(seen.adjoint_norms)
        if row["skipped"]:
            total = row["skipped"] + sum(one["skipped"] for one in self.history["updates"])
            self._event("skip", check.students_skipped(row["skipped"], len(norms), usual, total))
        broken = None
        if self.guard is not None:
            broken = self.guard.judge(seen.measure.tolist(), norms, self._weights())
        if broken is not None:
            self._go_back(broken)
        elif kept:
            factors = torch.tensor([min(1.0, bound / max(norms[index], 1e-300)) for index in kept])
            clipped = seen.gradient[kept] * factors.to(seen.gradient)[:, None]
            self._descend(AVERAGINGS[rules.averaging](clipped), rate)
            if update >= rules.updates * (1.0 - rules.average):
                for name, value in self.teacher.named_parameters():
                    self.average[name] += value.detach()
                self.averaged += 1
        row["students_per_second"] = len(norms) / (time.perf_counter() - began)
        self.history["updates"].append(_plain(row))
        self._explain_low_agreement()
        self.update += 1
        return row

    def _descend(self, gradient: Tensor, rate: float) -> None:
        parameters = list(self.teacher.parameters())
        parts = gradient.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()
        for group in self.adam.param_groups:
            group["lr"] = rate
        if self.rules.anchor:
            with torch.no_grad():
                for parameter, start in zip(parameters, self.start.parameters(), strict=True):
                    parameter.lerp_(start, min(1.0, rate * self.rules.anchor))
        self.adam.step()
        self.since += 1

    def _rise_and_fall(self) -> float:
        """Factor of the teacher's learning rate: a warm-up, a plateau, and a line towards zero."""
        rules = self.rules
        rise = (self.since + 1) / max(1, rules.warmup)
        fall = (rules.updates - self.update) / max(1.0, rules.cooldown * rules.updates)
        return min(1.0, rise, fall)

    def _go_back(self, reason: str) -> None:
        assert self.guard is not None
        self.teacher.load_state_dict(self.guard.good)
        self.adam = self._new_adam()
        self.since = 0
        self.shrink *= self.rules.guard_shrink
        self.norms = self.norms[:20]
        for value in self.average.values():
            value.zero_()
        self.averaged = 0
        self._event("guard", check.guard_returns(reason, self.rules.teacher_lr * self.shrink))
        if not self.guard.returned():
            self._event("stop", check.guard_gives_up(self.rules.guard_returns))
            self.ended = True

    def _explain_low_agreement(self) -> None:
        """Once, after ten updates; later agreement falls by itself, as a teacher nears what it can do."""
        first = [row["agreement"] for row in self.history["updates"]]
        known = [value for value in first if value is not None]
        if len(first) == 10 and known and mean(known) < 0.05:
            self._event("agreement", check.low_agreement(mean(known)))

    def _finish(self) -> None:
        """The average of the last teachers, or where none are averaged the last one; with a guard, what a
        trial prefers of that, the guard's good teacher and the neutral one.
        """
        candidates = {}
        if self.averaged:
            candidates["average"] = {name: value / self.averaged for name, value in self.average.items()}
        elif self.since and not self.ended:  # a step was taken, and the guard has not taken it back
            candidates["average"] = self._weights()
        frozen = {name: value for name, value in self.start.named_parameters() if not value.requires_grad}
        if self.guard is None:
            self.teacher.load_state_dict({**candidates.get("average", self._weights()), **frozen})
        else:
            if self.guard.memory["found"]:
                candidates["good"] = self.guard.good
            candidates = {name: {**one, **frozen} for name, one in candidates.items()}  # a mean rounds
            with self._clocked("trial"):
                self._try(candidates)
        self.finished = True
        if self.directory is not None:
            self.teacher.save(self.directory)
            self._commit()

    def _event(self, kind: str, sentence: str) -> None:
        self.history["events"].append({"update": self.update, "kind": kind, "sentence": sentence})
        self._say(sentence)

    def _say(self, sentence: str) -> None:
        tqdm.write(sentence, file=sys.stderr)

    # ---- checkpoints: a safetensors file, then the JSON file that names it, which commits

    def _open(self, directory: Path, resume: bool) -> None:
        self.identity = self._identity()
        marker = directory / "checkpoint.json"
        for left in directory.glob(".*.part"):  # of a write that a kill cut short
            left.unlink()
        if (directory / "families").exists():  # of teach_best
            check.may_start("teach", directory, resume)
            check.is_the_same("teach", directory, ["teacher"])
        if not marker.exists():
            directory.mkdir(parents=True, exist_ok=True)
            return
        check.may_start("teach", directory, resume)
        saved = read_json(marker, "tensors", "identity", "numbers", "history")
        said = {
            name: value
            for name, value in self.identity.items()
            if name in saved["identity"] or name not in self.unsaid
        }
        check.is_the_same("teach", directory, differing(saved["identity"], said))
        file = directory / saved["tensors"]
        try:
            tensors, _ = read_tensors(file)
        except (SafetensorError, OSError) as error:
            raise check.tensors_whole("teach", file, error) from error
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = value
        self.teacher.load_state_dict(groups["teacher"])
        self.average = groups["average"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in groups.get("adam", {}).items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        if state:
            self.adam.load_state_dict(
                {"state": state, "param_groups": self.adam.state_dict()["param_groups"]}
            )
        numbers = saved["numbers"]
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        if self.guard is not None:
            self.guard.memory = numbers["guard"]
            self.guard.good = groups["good"]
            self.guard.window = [groups[f"window{index}"] for index in range(numbers["window"])]
        self.history = saved["history"]
        self._publish(saved["tensors"])
        if self.finished and not (directory / "teacher.safetensors").is_file():
            self.teacher.save(directory)

    def _commit(self) -> None:
        if self.directory is None:
            return
        groups = {"teacher": self._weights(), "average": self.average}
        for index, values in self.adam.state_dict()["state"].items():
            groups[f"adam/{index}"] = values
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        if self.guard is not None:
            groups["good"] = self.guard.good
            groups |= {f"window{index}": weights for index, weights in enumerate(self.guard.window)}
            numbers |= {"guard": self.guard.memory, "window": len(self.guard.window)}
        tensors = {
            f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()
        }
        name = f"checkpoint-{self.update:06d}{'-final' if self.finished else ''}.safetensors"
        write_tensors(self.directory / name, tensors, {"update": self.update})
        content = {
            "tensors": name,
            "identity": self.identity,
            "numbers": numbers,
            "history": self.history,
        }
        write_json(self.directory / "checkpoint.json", content)
        self._publish(name)

    def _publish(self, tensors: str) -> None:
        """What follows from a commitment; done once more by a resume, since a kill may have come between."""
        assert self.directory is not None
        write_json(self.directory / "history.json", self.history)
        for old in self.directory.glob("checkpoint-*.safetensors"):
            if old.name != tensors:
                old.unlink()


class _Teaching(Outer):
    """One run of :func:`teach`: episodes of fresh students."""

    def __init__(
        self,
        teacher: AnyTeacher,
        student: Make,
        train: Data,
        dev: Data | None,
        recipe: Recipe,
        seed: int,
        directory: str | Path | None,
        guard: bool,
        progress: bool,
    ) -> None:
        super().__init__(teacher, recipe, seed, directory, guard, progress)
        self.student, self.train, self.given_dev = student, train, dev
        self.dev, self.trial_dev = split_dev(dev, recipe, self.seed)
        self.recipe = self.fitted = recipe
        self.history |= {"lr": recipe.lr, "probe": [], "states": {}}
        self.history["seconds"]["probe"] = 0.0

    def go(self, resume: bool) -> Taught:
        self.run(resume)
        recipe = dataclasses.replace(self.recipe, lr=self.history["lr"])
        return Taught(self.teacher, self.history, recipe)

    def _begin(self) -> None:
        if not self.finished:
            self.fitted = self._fitted()
        if self.history["lr"] is None:
            with self._clocked("probe"):
                self._probe()

    def _fitted(self) -> Recipe:
        """The recipe of episodes: one that says nothing of memory stays within a share of what is free."""
        recipe, device = self.recipe, self.train[0].device
        free = free_memory(device) if recipe.memory is None and recipe.schedule == "auto" else None
        if free is None:
            return recipe
        size = max(recipe.students, 0 if recipe.lr else recipe.probe_students)
        budget = int(free * SHARE_OF_FREE)
        steps = recipe.steps if recipe.truncate is None else min(recipe.steps, recipe.truncate)
        # A step keeps a few times what a plain one does; where that is little, it is not looked at closely.
        if 16 * size * steps * sum(bytes_of(self.student, self.train[0][: recipe.batch_size])) < budget:
            return recipe
        asked = dataclasses.replace(recipe, students=size)
        whole = plan_episode(self.teacher, self.student, self.train, self.dev, recipe=asked)
        needs, budget = whole.needs.memory, max(budget, 2 * sum(whole.sizes))  # a step has to fit
        if needs <= budget:
            return recipe
        self._say(check.teach_takes_again(needs, free, budget))
        return dataclasses.replace(recipe, memory=budget)

    def _gather(self) -> tuple[Episode, dict[str, Any]]:
        seed = seed_of(self.seed, 1, self.update)
        seen = self._episode(self.history["lr"], seed, self.recipe.students)
        self.history["states"] = _plain(seen.states)
        return seen, {}

    def _episode(self, lr: float, seed: int, size: int) -> Episode:
        return episode(self.teacher, self.student, self.train, self.dev, self.fitted, lr, seed, size)

    def _probe(self) -> None:
        """Choose the students' learning rate: small norms that agree, then down while the dev error falls.

        Small norms alone, or agreement alone, are not enough: far above the edge of stability gradients of
        norm 1e11 can agree, and a little above it small ones do not.
        """
        recipe = self.recipe
        tried: list[dict[str, float]] = []
        chosen: dict[str, float] | None = None
        with tqdm(recipe.probe_lrs, disable=not self.progress, desc="probe", unit="rate") as bar:
            for lr in bar:
                seen = self._learnable(self._episode(lr, seed_of(self.seed, 0), recipe.probe_students))
                norm, wrong = usual_norm(seen.norms), float(seen.dev_error.mean())
                row = {"lr": lr, "norm": norm, "agreement": seen.agreement}
                row |= {"measure": float(seen.measure.mean()), "dev_error": wrong}
                tried.append(row)
                bar.set_postfix_str(f"lr {lr:g}, norm {norm:.2g}, agreement {seen.agreement:.2f}")
                if chosen is not None and not wrong < chosen["dev_error"]:
                    break
                if (
                    norm < recipe.probe_norm
                    and max(seen.norms) < 10.0 * norm
                    and seen.agreement > recipe.probe_agreement
                ):
                    chosen = row
        if chosen is None:
            # The best agreement among small norms; where none is small, the smallest rate.
            small = [row for row in tried if row["norm"] < recipe.probe_norm] or [tried[-1]]
            chosen = max(small, key=lambda row: -1.0 if math.isnan(row["agreement"]) else row["agreement"])
            self._event("probe", check.probe_found_none(chosen["lr"], chosen["norm"], chosen["agreement"]))
        self.history["probe"] = _plain(tried)
        self.history["lr"] = float(f"{recipe.probe_margin * chosen['lr']:.3g}")

    def _try(self, taught: dict[str, dict[str, Tensor]]) -> None:
        """What fresh students do best under.

        Each candidate is tried at its own best learning rate, since a loss that wants another rate than the
        one for teaching is no worse for that. A taught teacher has to be ahead of the neutral one by
        ``trial_margin`` standard errors: other students, and other dev rows, would likely say the same. What
        is judged is the calibrated expected error, as by :func:`l2t.teach_best`, which would else choose
        among what another yardstick has left.
        """
        recipe, neutral = self.recipe, self.start.neutral()
        names = [*taught, "neutral"]
        teachers = [copy.deepcopy(neutral) for _ in taught]
        for teacher, weights in zip(teachers, taught.values(), strict=True):
            teacher.load_state_dict(weights)
        teachers.append(neutral)
        rates = [self.history["lr"] * factor for factor in recipe.trial_rates]
        seed = seed_of(self.seed, 2)
        seen = trial(
            teachers, self.student, self.train, self.trial_dev, recipe, rates, seed, calibrated_error
        )
        means = seen.mean((-2, -1))  # [candidates, rates]
        own = seen[torch.arange(len(names)), means.argmin(-1)]  # [candidates, students, rows]
        levels = own.mean((-2, -1))
        chosen = int(levels.argmin())
        ahead = own[-1] - own[chosen]
        if not float(ahead.mean()) > self.recipe.trial_margin * standard_error(
            ahead, self.trial_dev is not None
        ):
            chosen = len(names) - 1
        self.teacher = teachers[chosen]
        self.history["trial"] = {
            "chosen": names[chosen],
            "rates": rates,
            "expected_error": {name: row.tolist() for name, row in zip(names, means, strict=True)},
        }
        if names[chosen] == "neutral":
            percents = [100.0 * float(level) for level in levels]
            self._event("trial", check.trial_chose_neutral(dict(zip(names, percents, strict=True))))

    def _identity(self) -> dict[str, Any]:
        guarded = self.guard is not None
        of_all = identity(
            self.student, self.train, self.given_dev, self.recipe, self.seed, guarded, [self.start]
        )
        return {**of_all, "teacher": self.start.config()}


def identity(
    student: Make,
    train: Data,
    dev: Data | None,
    recipe: Recipe,
    seed: int,
    guard: bool,
    starts: Sequence[AnyTeacher],
) -> dict[str, Any]:
    """What a run must share with the one that it goes on with, but for the settings of its teachers.

    Students are told by what they are made of, not by what they answer: a run may go on on another machine.
    """
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> None:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    for tensor in (*train, *(dev or ())):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        add(tensor)
    for start in starts:
        for name, value in start.named_parameters():
            digest.update(f"{name}{'' if value.requires_grad else ', frozen'}".encode())
            add(value)
    made = Stack(student, [0]).student
    return {
        "seed": seed,
        "recipe": recipe.to_json(),
        "student": {name: list(value.shape[1:]) for name, value in made.state_dict().items()},
        "student's modules": modules_of(made),
        "device": train[0].device.type,
        "guard": guard,
        "data and start weights": digest.hexdigest(),
    }


def modules_of(student: nn.Module) -> dict[str, Any]:
    """What a student is made of, which the shapes of its weights do not say."""
    return {
        "are": re.sub(r" at 0x[0-9a-f]+", "", repr(student)),
        "frozen": [name for name, weight in student.named_parameters() if not weight.requires_grad],
        "in eval()": [name for name, module in student.named_modules() if not module.training],
    }


def differing(was: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of what is not as it was in a run that is to go on, with the fields of recipe and teacher."""
    found = []
    for name, value in wanted.items():
        before = was.get(name)
        if name in ("recipe", "teacher") and isinstance(before, dict):
            found += [f"{name}.{field}" for field in value if before.get(field) != value[field]]
        elif before != value:
            found.append(name)
    return found


def _milestones(updates: int) -> set[int]:
    return {round((updates - 1) * part / 4) for part in range(5)}


def _mean_finite(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else math.nan


def _plain(content: Any) -> Any:
    """``content`` as JSON holds it, so that a history is the same before and after a resume."""
    return json.loads(to_json(content))


def _postfix(row: dict[str, Any]) -> str:
    return (
        f"measure {row['measure']:.4f}, dev error {100 * row['dev_error']:.1f}%, norm {row['norm']:.2g}, "
        f"agreement {row['agreement']:.2f}, {row['students_per_second']:.1f} students/s"
    )
