"""Teaching: episodes of fresh students, and the teacher's step along their mean hypergradient.

    for each update:   S fresh students take the whole course under the teacher  (students.py)
                       the reverse pass gives each one's gradient to the teacher (unroll.py, math.md
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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from l2t import check, optim
from l2t.files import read_tensors, to_json, write_json, write_tensors
from l2t.students import (
    DECAYS,
    Lesson,
    Make,
    Pools,
    Stack,
    TaughtLoss,
    cross_entropy,
    draw_batches,
    error,
    evaluate,
    learning_rates,
    seed_of,
    split_pools,
)
from l2t.students import (
    train as train_stack,
)
from l2t.teacher import Teacher
from l2t.unroll import unroll

Data = tuple[Tensor, Tensor]
"""Inputs (N, ...) and targets (N,)."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How students are trained and how a teacher learns from them: numbers and names only, JSON-able.

    Args:
        steps: steps T of a student's course.
        batch_size: rows a step.
        lr: learning rate of the students while teaching; None lets a probe choose it.
        momentum: of the students' SGD.
        weight_decay: of the students' SGD.
        decay: of the students' learning rate, ``"linear"`` (to zero) or ``"constant"``.
        students: fresh students an episode S; each update of the teacher takes one episode.
        updates: updates of the teacher.
        teacher_lr: learning rate of the teacher's Adam at its highest.
        betas: of Adam.
        warmup: updates over which the teacher's learning rate rises.
        cooldown: share of the updates, at the end, over which it falls along a line.
        average: share of the updates, at the end, whose teachers are averaged into the result.
        measure: what the teacher lowers on the dev set: ``"cross-entropy"``, ``"expected-error"`` (1 -
            p_y) or ``"smooth-error"`` (2 sigmoid(k (max p - p_y)) - 1), docs/math.md section 7.
        sharpness: k of the smooth error.
        dev_fraction: share of the training rows that each student of an episode is measured on, drawn anew
            every time, where no dev set is given.
        clip: a student's gradient is clipped to this many running median norms.
        skip: a student whose norm is this many running median norms is skipped.
        window: norms that the running median looks back on.
        probe_lrs: learning rates that the probe tries, the largest first.
        probe_students: students a try.
        probe_norm: largest median norm that the probe takes.
        probe_agreement: least agreement that the probe takes.
        guard_norm: the guard goes back when the median norm of an episode is this many times its median over
            the good ones, twice in a row.
        guard_rise: the guard goes back when the measure, a median over three episodes, is this share above
            its best.
        guard_shrink: factor of the teacher's step after each return.
        guard_returns: returns after which teaching stops.
        trial_students: fresh students on whom the result is tried against the start before it is returned.
        threads: torch threads while teaching; bits depend on them. One is fastest for small students. None
            leaves the setting alone.
    """

    steps: int = 300
    batch_size: int = 50
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: str = "linear"
    students: int = 4
    updates: int = 80
    teacher_lr: float = 0.12
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 5
    cooldown: float = 0.4
    average: float = 0.25
    measure: str = "cross-entropy"
    sharpness: float = 50.0
    dev_fraction: float = 0.2
    clip: float = 2.0
    skip: float = 50.0
    window: int = 100
    probe_lrs: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
    probe_students: int = 8
    probe_norm: float = 1.0
    probe_agreement: float = 0.2
    guard_norm: float = 10.0
    guard_rise: float = 0.1
    guard_shrink: float = 0.5
    guard_returns: int = 4
    trial_students: int = 16
    threads: int | None = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "students", "updates", "window", "probe_students"):
            check.recipe_count(name, getattr(self, name), 1)
        for name in ("warmup", "guard_returns", "trial_students"):
            check.recipe_count(name, getattr(self, name), 0)
        for name in ("teacher_lr", "sharpness", "clip", "skip", "probe_norm", "guard_norm", "guard_rise"):
            check.recipe_number(name, getattr(self, name), 0.0, math.inf, open_low=True)
        for name in ("weight_decay",):
            check.recipe_number(name, getattr(self, name), 0.0, math.inf)
        for name in ("momentum", "cooldown", "average", "dev_fraction", "guard_shrink"):
            check.recipe_number(name, getattr(self, name), 0.0, 1.0)
        if self.lr is not None:
            check.recipe_number("lr", self.lr, 0.0, math.inf, open_low=True)
        check.recipe_choice("decay", self.decay, DECAYS)
        check.recipe_choice("measure", self.measure, MEASURES)
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "probe_lrs", tuple(sorted(self.probe_lrs, reverse=True)))

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON-able dict, which ``Recipe(**...)`` takes back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Taught:
    """What :func:`teach` returns.

    Attributes:
        teacher: the taught teacher.
        history: what happened, JSON-able: ``seed``, ``recipe``, ``teacher`` (settings), ``lr``, ``probe`` (a
            row a try), ``updates`` (a row an update), ``events`` (what was said aloud), ``adjoint_norms`` (by
            step, of five updates from the first to the last), ``states`` (the state by step, mean over
            the students of the last episode) and ``trial``.
        recipe: the recipe with the learning rate that was used.
    """

    teacher: Teacher
    history: dict[str, Any]
    recipe: Recipe


def _smooth_error(logits: Tensor, target: Tensor, sharpness: float) -> Tensor:
    p = F.softmax(logits, -1)
    own = p.gather(-1, target[..., None])[..., 0]
    return (2.0 * torch.sigmoid(sharpness * (p.amax(-1) - own)) - 1.0).mean(-1)


def _expected_error(logits: Tensor, target: Tensor, _: float) -> Tensor:
    return 1.0 - F.softmax(logits, -1).gather(-1, target[..., None])[..., 0].mean(-1)


MEASURES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
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


class Class(NamedTuple):
    """Students who are to take a course: their data, batches and what they are measured on."""

    stack: Stack
    batches: Tensor
    dev: Data  # (S, D, ...), (S, D)


def gather_class(student: Make, train: Data, dev: Data | None, recipe: Recipe, seed: int, size: int) -> Class:
    """``size`` fresh students with their splits and batches, all from ``seed``."""
    if dev is None:
        pools = split_pools(len(train[1]), size, recipe.dev_fraction, seed_of(seed, 1))
        held = train[0][pools.dev], train[1][pools.dev]
    else:
        everything = torch.arange(len(train[1])).expand(size, -1)
        pools = Pools(everything, everything[:, :0])
        held = dev[0].expand(size, *dev[0].shape), dev[1].expand(size, -1)
    stack = Stack(student, [seed_of(seed, 2, index) for index in range(size)])
    batches = draw_batches(pools.train, recipe.steps, recipe.batch_size, seed_of(seed, 3))
    return Class(stack, batches, held)


def episode(
    teacher: Teacher,
    student: Make,
    train: Data,
    dev: Data | None,
    recipe: Recipe,
    lr: float,
    seed: int,
    size: int,
) -> Episode:
    """``size`` fresh students take the course under ``teacher``; the gradient of each one's measure to it.

    The same ``seed`` gives the same students, splits, batches and dropout.
    """
    stack, batches, held = gather_class(student, train, dev, recipe, seed, size)
    loss = TaughtLoss(teacher, record=True)
    lesson = Lesson(train, batches, loss, teacher.num_classes, _dev_features(teacher, held))
    errors: list[Tensor] = []

    def measure(model: nn.Module) -> Tensor:
        assert isinstance(model, Stack)
        logits = evaluate(model, held[0])
        errors[:] = [error(logits.detach(), held[1])]
        return MEASURES[recipe.measure](logits, held[1], recipe.sharpness)

    rates = learning_rates(lr, recipe.steps, recipe.decay)
    sgd = optim.SGD(lr=lambda step: rates[step], momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, 4))
        run = unroll(stack, batches, lesson, measure, optimizer=sgd)
        run.backward()
    states = lesson.tracker.states
    return Episode(
        run.measure.detach(),
        errors[0],
        loss.gradient(),
        [float(norm) for norm in run.report.adjoint_norms],
        {
            name: [float(torch.as_tensor(getattr(state, name)).mean()) for state in states[:-1]]
            for name in states[0]._fields
            if getattr(states[0], name) is not None
        },
    )


def _dev_features(teacher: Teacher, held: Data) -> Data | None:
    return held if any(name.startswith("dev_") for name in teacher.features) else None


def trial(
    teachers: Sequence[Teacher],
    student: Make,
    train: Data,
    dev: Data | None,
    recipe: Recipe,
    lr: float,
    seed: int,
) -> Tensor:
    """The measures (teachers, students) of the same ``recipe.trial_students`` fresh students under each."""
    rows = []
    for teacher in teachers:
        stack, batches, held = gather_class(student, train, dev, recipe, seed, recipe.trial_students)
        lesson = Lesson(
            train, batches, TaughtLoss(teacher), teacher.num_classes, _dev_features(teacher, held)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, 4))
            train_stack(
                stack,
                lesson,
                lr=lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                decay=recipe.decay,
            )
        with torch.no_grad():
            row = MEASURES[recipe.measure](evaluate(stack, held[0]), held[1], recipe.sharpness)
        rows.append(row.nan_to_num(nan=math.inf))
    return torch.stack(rows)


class Guard:
    """Judges each episode, and says when the teacher has broken its students.

    Two signs: norms far above those of the good episodes, twice in a row, or a measure (a median over three
    episodes) that has risen clearly above its best. All of its memory is in :attr:`memory`, which is
    JSON-able.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.memory: dict[str, Any] = {"norms": [], "recent": [], "best": None, "high": 0}

    def judge(self, norm: float, measure: float) -> str | None:
        """Why to go back, or None; of an episode the students' median norm and mean measure."""
        memory, recipe = self.memory, self.recipe
        usual = median(memory["norms"]) if memory["norms"] else math.inf
        memory["high"] = (
            memory["high"] + 1 if not norm <= recipe.guard_norm * usual or norm == math.inf else 0
        )
        if memory["high"] >= 2:
            return check.guard_norm(norm, usual)
        if not math.isfinite(measure):
            return None
        memory["recent"] = [*memory["recent"][-2:], measure]
        level = median(memory["recent"])
        best = level if memory["best"] is None else memory["best"]
        if level > best + recipe.guard_rise * abs(best):
            return check.guard_measure(level, best)
        memory["best"] = min(best, level)
        if not memory["high"]:
            memory["norms"] = [*memory["norms"], norm][-recipe.window :]
        return None

    def is_good(self) -> bool:
        """Whether the teacher of the last episode is one to come back to."""
        if self.memory["high"] or not self.memory["recent"]:
            return False
        level, best = median(self.memory["recent"]), self.memory["best"]
        return bool(level <= best + 0.5 * self.recipe.guard_rise * abs(best))

    def forget(self) -> None:
        """After a return: what the broken teacher showed counts no more."""
        self.memory.update(recent=[], high=0)


def teach(
    teacher: Teacher,
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
        teacher: where to start; it is left as it is.
        student: makes a fresh student, ``(B, ...) -> (B, C)``; one that ``torch.vmap`` can run.
        train: inputs (N, ...) floating point and targets (N,) int64.
        dev: rows to measure the students on; None draws ``recipe.dev_fraction`` of ``train`` anew for every
            student of every episode.
        recipe: the settings; None is ``Recipe()``.
        seed: of all that is random.
        directory: where to keep checkpoints, ``teacher.safetensors`` and ``history.json``; None keeps
            nothing.
        resume: go on with the run in ``directory``, or start one where there is none.
        guard: watch the run, go back when it breaks, and do not return a teacher that is worse than the
            start.
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
    check.teach_data("train", train, teacher.num_classes)
    if dev is not None:
        check.teach_data("dev", dev, teacher.num_classes)
    check.teach_student_fits(student, train[0], teacher.num_classes)
    run = _Teaching(teacher, student, train, dev, recipe, seed, directory, guard, progress)
    with threads(recipe.threads):
        return run.go(resume)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run the body with ``count`` torch threads; None leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Teaching:
    """One run of :func:`teach`: its state between updates, and what changes it."""

    def __init__(
        self,
        teacher: Teacher,
        student: Make,
        train: Data,
        dev: Data | None,
        recipe: Recipe,
        seed: int,
        directory: str | Path | None,
        guard: bool,
        progress: bool,
    ) -> None:
        self.start = copy.deepcopy(teacher).requires_grad_(True)
        self.teacher = copy.deepcopy(self.start)
        self.student, self.train, self.dev = student, train, dev
        self.recipe, self.seed, self.progress = recipe, seed, progress
        self.directory = None if directory is None else Path(directory)
        self.guard = Guard(recipe) if guard else None
        self.adam = self._new_adam()
        self.good = self._weights()  # the last good teacher
        self.average = {name: torch.zeros_like(value) for name, value in self.good.items()}
        self.averaged = 0
        self.update = 0
        self.shrink = 1.0
        self.norms: list[float] = []
        self.finished = False
        self.history: dict[str, Any] = {
            "seed": seed,
            "recipe": recipe.to_json(),
            "teacher": teacher.config(),
            "lr": recipe.lr,
            "probe": [],
            "updates": [],
            "events": [],
            "adjoint_norms": {},
            "states": {},
            "trial": None,
        }

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.teacher.named_parameters()}

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.teacher.parameters(), betas=self.recipe.betas, foreach=False)

    def go(self, resume: bool) -> Taught:
        if self.directory is not None:
            self._open(self.directory, resume)
        if self.history["lr"] is None:
            self._probe()
        with tqdm(
            total=self.recipe.updates,
            initial=self.update,
            disable=not self.progress,
            unit="update",
            desc="teaching",
        ) as bar:
            try:
                while self.update < self.recipe.updates and not self.finished:
                    row = self._step()
                    bar.update()
                    bar.set_postfix_str(_postfix(row))
                    self._commit()
                if not self.finished:
                    self._finish()
            except KeyboardInterrupt:
                if self.directory is not None:
                    self._say(check.teach_interrupted(self.update, self.recipe.updates, self.directory))
                raise
        recipe = dataclasses.replace(self.recipe, lr=self.history["lr"])
        return Taught(self.teacher, self.history, recipe)

    def _episode(self, lr: float, seed: int, size: int) -> Episode:
        return episode(self.teacher, self.student, self.train, self.dev, self.recipe, lr, seed, size)

    def _probe(self) -> None:
        """Choose the students' learning rate: the largest with norms of order one and clear agreement."""
        recipe = self.recipe
        tried: list[tuple[float, float, float]] = []  # lr, norm, agreement
        taken = False
        with tqdm(recipe.probe_lrs, disable=not self.progress, desc="probe", unit="rate") as bar:
            for lr in bar:
                seen = self._episode(lr, seed_of(self.seed, 0, 1), recipe.probe_students)
                norm, agreement = median(seen.norms), seen.agreement
                taken = norm <= recipe.probe_norm and agreement >= recipe.probe_agreement
                tried.append((lr, norm, agreement))
                bar.set_postfix_str(f"lr {lr:g} norm {norm:.2g} agreement {agreement:.2f}")
                if taken:
                    break
        if not taken:
            # The best of those with small gradients; where none has, the smallest rate.
            small = [row for row in tried if row[1] <= recipe.probe_norm] or [tried[-1]]
            lr, norm, agreement = max(small, key=lambda row: -1.0 if math.isnan(row[2]) else row[2])
            self._event("probe", check.probe_found_none(lr, norm, agreement))
        self.history["probe"] = _plain(
            [{"lr": lr, "norm": norm, "agreement": agreement} for lr, norm, agreement in tried]
        )
        self.history["lr"] = lr

    def _step(self) -> dict[str, Any]:
        """One episode and what follows from it."""
        began = time.perf_counter()
        recipe, update = self.recipe, self.update
        seen = self._episode(self.history["lr"], seed_of(self.seed, 1, update), recipe.students)
        norms = seen.norms
        usual = median(self.norms) if self.norms else median(norms)
        wild = [not norm <= recipe.skip * usual or not math.isfinite(norm) for norm in norms]
        kept = [index for index, bad in enumerate(wild) if not bad]
        self.norms = [*self.norms, *(norms[index] for index in kept)][-recipe.window :]
        bound = recipe.clip * median(self.norms) if self.norms else 0.0
        rate = recipe.teacher_lr * self.shrink * _rise_and_fall(update, recipe)
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
        }
        if update in _milestones(recipe.updates):
            self.history["adjoint_norms"][str(update)] = _plain(seen.adjoint_norms)
        self.history["states"] = _plain(seen.states)
        if row["skipped"]:
            total = row["skipped"] + sum(one["skipped"] for one in self.history["updates"])
            self._event("skip", check.students_skipped(row["skipped"], len(norms), usual, total))
        broken = self.guard.judge(row["norm"], row["measure"]) if self.guard is not None else None
        if broken is not None:
            self._go_back(broken)
        else:
            if self.guard is None or self.guard.is_good():
                self.good = self._weights()
            if kept:
                factors = torch.tensor([min(1.0, bound / max(norms[index], 1e-300)) for index in kept])
                gradient = (seen.gradient[kept] * factors.to(seen.gradient)[:, None]).mean(0)
                self._descend(gradient, rate)
        if update >= recipe.updates * (1.0 - recipe.average):
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
        self.adam.step()

    def _go_back(self, reason: str) -> None:
        assert self.guard is not None
        self.teacher.load_state_dict(self.good)
        self.adam = self._new_adam()
        self.shrink *= self.recipe.guard_shrink
        self.guard.forget()
        self.norms = []
        for value in self.average.values():
            value.zero_()
        self.averaged = 0
        returns = 1 + sum(event["kind"] == "guard" for event in self.history["events"])
        self._event("guard", check.guard_returns(reason, self.recipe.teacher_lr * self.shrink))
        if returns > self.recipe.guard_returns:
            self._event("stop", check.guard_gives_up(returns))
            self.update = self.recipe.updates - 1

    def _explain_low_agreement(self) -> None:
        recent = [row["agreement"] for row in self.history["updates"][-10:]]
        known = [value for value in recent if value is not None]
        said = any(event["kind"] == "agreement" for event in self.history["events"])
        if len(recent) == 10 and not said and (not known or mean(known) < 0.05):
            self._event("agreement", check.low_agreement(mean(known) if known else math.nan))

    def _finish(self) -> None:
        """The average of the last teachers, unless fresh students do worse under it than at the start."""
        if self.averaged:
            self.teacher.load_state_dict(
                {name: value / self.averaged for name, value in self.average.items()}
            )
        if self.guard is not None and self.recipe.trial_students:
            good, start = copy.deepcopy(self.teacher), self.start
            good.load_state_dict(self.good)
            names = ("average", "last good", "start")
            measures = trial(
                (self.teacher, good, start),
                self.student,
                self.train,
                self.dev,
                self.recipe,
                self.history["lr"],
                seed_of(self.seed, 2),
            )
            level = measures.mean(1)
            noise = (measures - measures[2]).std(1) / math.sqrt(measures.shape[1])
            fine = [index for index in range(2) if level[index] <= level[2] + 2.0 * noise[index]]
            chosen = (fine or [2])[0]
            self.history["trial"] = {
                "measure": _plain(dict(zip(names, measures.tolist(), strict=True))),
                "chosen": names[chosen],
            }
            if chosen:
                self._event("trial", check.trial_chose(names[chosen], float(level[0]), float(level[2])))
                self.teacher = (self.teacher, good, copy.deepcopy(start))[chosen]
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

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one that it goes on with."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *(self.dev or ())):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, value in self.start.named_parameters():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        stack = Stack(self.student, [0])
        shapes = {name: list(value.shape[1:]) for name, value in stack.student.state_dict().items()}
        return {
            "seed": self.seed,
            "recipe": self.recipe.to_json(),
            "teacher": self.start.config(),
            "student": shapes,
            "guard": self.guard is not None,
            "data and start weights": digest.hexdigest(),
        }

    def _open(self, directory: Path, resume: bool) -> None:
        self.identity = self._identity()
        marker = directory / "checkpoint.json"
        if not marker.exists():
            directory.mkdir(parents=True, exist_ok=True)
            return
        check.run_may_start(directory, resume)
        saved = json.loads(marker.read_text())
        differing = [name for name, value in self.identity.items() if saved["identity"].get(name) != value]
        check.run_is_the_same(directory, differing)
        tensors, _ = read_tensors(directory / saved["tensors"])
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = value
        self.teacher.load_state_dict(groups["teacher"])
        self.good, self.average = groups["good"], groups["average"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in groups.get("adam", {}).items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        if state:
            self.adam.load_state_dict(
                {"state": state, "param_groups": self.adam.state_dict()["param_groups"]}
            )
        numbers = saved["numbers"]
        self.update, self.averaged, self.shrink = numbers["update"], numbers["averaged"], numbers["shrink"]
        self.norms, self.finished = numbers["norms"], numbers["finished"]
        if self.guard is not None:
            self.guard.memory = numbers["guard"]
        self.history = saved["history"]

    def _commit(self) -> None:
        if self.directory is None:
            return
        tensors: dict[str, Tensor] = {}
        for group, values in (("teacher", self._weights()), ("good", self.good), ("average", self.average)):
            tensors.update({f"{group}/{name}": value for name, value in values.items()})
        for index, values in self.adam.state_dict()["state"].items():
            tensors.update({f"adam/{index}/{name}": value for name, value in values.items()})
        name = f"checkpoint-{self.update:06d}{'-final' if self.finished else ''}.safetensors"
        write_tensors(self.directory / name, tensors, {"update": self.update})
        numbers = {
            "update": self.update,
            "averaged": self.averaged,
            "shrink": self.shrink,
            "norms": self.norms,
            "finished": self.finished,
            "guard": None if self.guard is None else self.guard.memory,
        }
        content = {
            "tensors": name,
            "identity": self.identity,
            "numbers": numbers,
            "history": self.history,
        }
        write_json(self.directory / "checkpoint.json", content)
        write_json(self.directory / "history.json", self.history)
        for old in self.directory.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink()


def _rise_and_fall(update: int, recipe: Recipe) -> float:
    """Factor of the teacher's learning rate: a warm-up, a plateau, and a line towards zero."""
    rise = (update + 1) / max(1, recipe.warmup)
    fall = (recipe.updates - update) / max(1.0, recipe.cooldown * recipe.updates)
    return min(1.0, rise, fall)


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
