"""Fresh students under frozen teachers and every baseline: who is ahead on test, and is it more than luck.

Every arm has the same students, steps, batches, grid of learning rates and budget: a learning rate is tuned
on the dev rows, then ``students`` fresh ones learn with it, and the test set is looked at once, when they are
done. Students are paired over the arms by their seed: same start, same order of rows. An arm knows nothing of
the others, so arms can be made apart, at any time and in any process, and are kept in files of their own.

Not here: the losses to compare with (baselines.py), comparisons of run folders on several cores (contest.py),
and pictures (report.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from l2t import check
from l2t.baselines import Arm, baselines
from l2t.files import read_json, to_json, write_json
from l2t.students import (
    Cohort,
    GivenLoss,
    Lesson,
    Make,
    Stack,
    draw_batches,
    evaluate,
    grade,
    held_rows,
    judge,
    seed_of,
    seeded,
    side_by_side,
    split_pools,
    students_for,
    taught_loss,
    teacher_beside,
)
from l2t.students import (
    train as train_stack,
)
from l2t.teach import Data, Recipe, threads
from l2t.teacher import AnyTeacher, StudentState

GRID = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)
EXTENSIONS = 2  # rates by which a grid may grow where its best rate is at an end
GROWS = (
    "Where the best is at an end of the grid, the grid goes on there by the ratio of its last two rates, at "
    f"most {EXTENSIONS} times, by the same rule for every arm."
)
ALPHA = 0.01  # where a difference is called one
LOOKS, ELEMENTS = 2000, 10**8  # steps at most, and logits in all, by which a loss is known again
CURVE_ROWS = 1000  # dev rows that a point of a learning curve looks at; the last one looks at all

# What of a recipe makes the course of a student, taught or not; the rest is of the teaching.
COURSE = (
    "steps",
    "batch_size",
    "momentum",
    "weight_decay",
    "decay",
    "augment",
    "dev_fraction",
    "dev_rows",
    "threads",
)


class _Rows(NamedTuple):
    """All rows that students may see, training rows first, and how many of them those are."""

    inputs: Tensor
    targets: Tensor
    train: int


def compare(
    teachers: Mapping[str, AnyTeacher],
    student: Make,
    train: Data,
    test: Data,
    dev: Data | None = None,
    *,
    recipe: Recipe,
    arms: Mapping[str, Arm] | None = None,
    also: Mapping[str, AnyTeacher] | None = None,
    noise: Tensor | None = None,
    dev_is_clean: bool = False,
    students: int = 20,
    grid: Sequence[float] = GRID,
    tuning_students: int | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Compare the students of frozen teachers with those of tuned baselines on the test set.

    Args:
        teachers: by name; each gets a comparison of its own, and all share the baselines' runs.
        student: makes a fresh student.
        train: inputs (N, ...) and targets (N,) to learn from; students learn on the device they are on.
        test: rows that neither teachers nor tuning have seen; each arm reads them once, at its end.
        dev: rows to tune on, as in :func:`l2t.teach`; None tunes each student on ``recipe.dev_fraction`` of
            ``train``, drawn at random. Final students learn from all rows, dev rows too, but for those under
            a loss that looks at dev rows on the way (a teacher with the features ``dev_loss`` or
            ``dev_accuracy``): they do not learn from these.
        recipe: the course; its learning rate is not used.
        arms: the baselines; None is those of :func:`l2t.baselines.baselines` for these data.
        also: more teachers that every comparison has as arms of the given names, a static one for example.
        noise: true noise matrix (C, C) of the training labels, for the oracle arm.
        dev_is_clean: whether ``dev`` has better labels than ``train``: then learning from it alone, and from
            both in equal parts, are baselines.
        students: fresh students an arm.
        grid: learning rates to choose from. Where an arm's best is at an end, its grid goes on by the ratio
            of the last two rates there, at most twice.
        tuning_students: students a learning rate and arm in tuning; None: 10, or as many as give a thousand
            answers where dev rows are fewer than a hundred.
        seed: of students, batches and splits; they are none that teaching has used.
        directory: where each arm is kept in a file of its own once it is tuned, and again when it is done; a
            later call takes from there what was made of the same data and settings. None keeps nothing. A
            teacher is known by its settings and numbers, a loss of one's own by what it says of one fixed
            batch at every step (of more than 2,000 steps, or of hundreds of classes, at equal distances), in
            states that go with the steps: one that differs elsewhere only wants another name.
        progress: show a bar.

    Returns:
        by teacher, a JSON-able dict: ``test_error`` and ``test_loss`` ({arm: [one a student]}, shares and
        nats), ``p`` ({arm: two-sided p of the paired t-test of its errors against taught}), ``p_corrected``
        (the same after Holm, Scand. J. Statist. 1979, over all arms of all teachers), ``comparisons`` (how
        many those are), ``interval`` ({arm: [low, high]}, 95 % confidence interval of the mean of taught less
        arm, shares), ``summary`` ({arm: mean, sd, difference (taught less arm), ahead (students of 'taught'
        with fewer errors), behind}), ``tuning`` ({arm: lr, grid, added (rates beyond the given grid),
        dev_error by lr, at_edge}), ``curves`` ({arm: step, dev_error}), ``oracles`` and ``also`` (names),
        ``protocol`` (what was done, in sentences), ``recipe``, ``teacher`` (settings), ``students``,
        ``seed``, ``seconds`` (of all arms, as each was made). The teacher's own arm is ``taught``.

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
    comparison = Comparison(
        teachers,
        student,
        train,
        test,
        dev,
        recipe=recipe,
        arms=arms,
        also=also,
        noise=noise,
        dev_is_clean=dev_is_clean,
        students=students,
        grid=grid,
        tuning_students=tuning_students,
        seed=seed,
        directory=directory,
    )
    with tqdm(total=len(comparison.arms), disable=not progress, unit="arm") as bar:
        for name in comparison.arms:
            comparison.run(name, bar.set_description)
            bar.update()
    return comparison.result()


class Comparison:
    """A comparison whose arms are made one by one: :func:`compare` makes all of them and gives the result.

    Takes the arguments of :func:`compare` but ``progress``, and ``only``: the baselines to keep, by name or
    as :func:`slug` writes it; and ``about``: JSON-able names of what is compared, which arms in files must
    have in common with it.

    Example:
        >>> import torch, l2t
        >>> from l2t.compare import Comparison
        >>> x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
        >>> y = x[:, :3].argmax(1)
        >>> comparison = Comparison({"mine": l2t.Teacher(3)}, lambda: torch.nn.Linear(8, 3),
        ...                         (x[:200], y[:200]), (x[200:], y[200:]), recipe=l2t.Recipe(steps=10),
        ...                         students=2, grid=(0.1,), tuning_students=2)
        >>> len(comparison.run("cross-entropy")["test_error"])
        2
    """

    def __init__(
        self,
        teachers: Mapping[str, AnyTeacher],
        student: Make,
        train: Data,
        test: Data,
        dev: Data | None = None,
        *,
        recipe: Recipe,
        arms: Mapping[str, Arm] | None = None,
        also: Mapping[str, AnyTeacher] | None = None,
        noise: Tensor | None = None,
        dev_is_clean: bool = False,
        students: int = 20,
        grid: Sequence[float] = GRID,
        tuning_students: int | None = None,
        seed: int = 0,
        directory: str | Path | None = None,
        only: Sequence[str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        also = also or {}
        check.unroll_not_inference("compare")
        statistics_of_scipy()
        check.compare_teachers("teachers", teachers, AnyTeacher)
        check.compare_teachers("also", also, AnyTeacher)
        check.compare_counts(len(teachers), students, tuning_students, grid)
        everyone = [*teachers.items(), *also.items()]
        kinds = [(name, one.num_classes, next(one.parameters()).dtype) for name, one in everyone]
        _, self.classes, dtype = kinds[0]
        check.teach_precision(dtype, "compare")
        check.compare_alike(kinds)
        others = {"test": test, **({} if dev is None else {"dev": dev})}
        check.teach_tensors("compare", train=train, **others)
        check.one_device("compare", train[0], **{name: inputs for name, (inputs, _) in others.items()})
        for name, data in {"train": train, **others}.items():
            check.teach_data(name, data, self.classes, dtype, "compare")
        check.rows_alike("compare", train[0], **{name: inputs for name, (inputs, _) in others.items()})
        check.augments("compare", recipe.augment, train[0])
        check.teach_student_fits(student, train[0], self.classes, recipe.batch_size, "compare")
        check.compare_dev_is_there(dev is not None, dev_is_clean)
        if noise is not None:
            check.compare_noise(noise, self.classes)

        if arms is None:
            arms = baselines(torch.bincount(train[1], minlength=self.classes), noise, dev_is_clean)
        check.compare_arms(arms, Arm, dev is not None)
        if only is not None:
            chosen = {check.known("compare", "arm", slug(name), map(slug, arms)) for name in only}
            arms = {name: arm for name, arm in arms.items() if slug(name) in chosen}
        halves = [name for name, arm in arms.items() if arm.rows == "both"]
        check.compare_half_batches(recipe.batch_size, halves)
        self.teachers, self.student, self.test, self.recipe = teachers, student, test, recipe
        rows = held_rows(len(train[1]), recipe.dev_fraction, recipe.dev_rows) if dev is None else len(dev[1])
        self.students, self.tuning_students = students, students_for(rows, tuning_students)
        self.seed = check.seed_number("compare", seed)
        self.grid = tuple(sorted(grid))
        self.also = dict(also)
        check.compare_names([*arms, *also], {"taught", *map(_own, teachers)})
        self.others = {**arms, **{name: _taught(teacher, train[0]) for name, teacher in self.also.items()}}
        self.arms = self.others | {_own(name): _taught(one, train[0]) for name, one in teachers.items()}
        self.rows = _Rows(
            torch.cat([train[0], dev[0]]) if dev is not None else train[0],
            torch.cat([train[1], dev[1]]) if dev is not None else train[1],
            len(train[1]),
        )
        self.directory = None if directory is None else Path(directory)
        self._identity = {} if directory is None else self._identify(about or {})
        self._made: dict[str, dict[str, Any]] = {}
        self._files: dict[str, tuple[Path, dict[str, Any]]] = {}

    def _identify(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What every arm in a file must share with this comparison."""
        from l2t import __version__

        with threads(self.recipe.threads), torch.no_grad():
            stack = Stack(self.student, [seed_of(self.seed, 2)])
            inputs = self.rows.inputs[None, :8].cpu()
            answers = [evaluate(stack, inputs)]
            with seeded(0):
                learning = stack(inputs)
            if not torch.equal(learning, answers[0]):  # dropout, BatchNorm
                answers += [learning, *stack.buffers()]
        shapes = {name: list(value.shape[1:]) for name, value in stack.student.state_dict().items()}
        frozen = [name for name, weight in stack.student.named_parameters() if not weight.requires_grad]
        recipe = self.recipe.to_json()
        return {
            "version": __version__,
            **about,
            "data": _digest(*self.rows[:2], *self.test),
            "training rows": self.rows.train,
            "student": {
                "shapes": shapes,
                "answer": _digest(*answers),
                **({"frozen": frozen} if frozen else {}),
            },
            "course": {name: recipe[name] for name in COURSE},
            "grid": list(self.grid),
            "tuning_students": self.tuning_students,
            "students": self.students,
            "seed": self.seed,
        }

    def _file(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """Where an arm is kept, and what it must say of itself there. A teacher may change its name."""
        if self.directory is None or name in self._files:
            return self._files.get(name)
        arm = self.arms[name]
        its = _describe(arm, self.classes, self.recipe.steps)
        own = {"arm": "taught" if isinstance(arm.loss, GivenLoss) else name, **its}
        of = json.loads(to_json({**self._identity, **own}))
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        self._files[name] = self.directory / f"{arm_stem(own['arm'], digest)}.json", of
        return self._files[name]

    def _kept(self, name: str) -> dict[str, Any]:
        """What there is of an arm, in memory or in its file, where another process may have put it."""
        if name in self._made:
            return self._made[name]
        place = self._file(name)
        if place is None or not place[0].is_file():
            return {}
        try:
            row = read_json(place[0])
        except ValueError:  # not whole: it is made again
            return {}
        if row.pop("of", None) != place[1]:
            return {}
        if "test_error" in row:
            self._made[name] = row
        return row

    def _keep(self, name: str, row: dict[str, Any]) -> None:
        place = self._file(name)
        if place is None or "test_error" in row:
            self._made[name] = row
        if place is not None:
            write_json(place[0], {"of": place[1], **row})

    def missing(self) -> list[str]:
        """The arms that are not done."""
        return [name for name in self.arms if "test_error" not in self._kept(name)]

    def forget(self) -> None:
        """Delete the files of these arms, so that they are made again."""
        for name in self.arms:
            place = self._file(name)
            if place is not None:
                place[0].unlink(missing_ok=True)
        self._made = {}

    def run(self, name: str, say: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
        """Make what is missing of an arm; ``say`` is told before each stage what it is.

        Returns:
            JSON-able: ``tuning``, ``curve``, ``test_error`` and ``test_loss`` (one a student), ``seconds``.
        """
        check.known("compare", "arm", name, self.arms)
        check.unroll_not_inference("compare")
        row, arm = dict(self._kept(name)), self.arms[name]
        if self.directory is not None and "test_error" not in row:
            check.can_be_written("compare", self.directory)
        with threads(self.recipe.threads):
            if "tuning" not in row:
                say(f"tuning {name}")
                began = time.perf_counter()
                row["tuning"], row["curve"] = _tune(
                    arm,
                    self.student,
                    self.rows,
                    self.recipe,
                    self.classes,
                    self.grid,
                    self.tuning_students,
                    seed_of(self.seed, 1),
                )
                row["seconds"] = time.perf_counter() - began
                self._keep(name, row)
            if "test_error" not in row:
                say(f"final {name}")
                began = time.perf_counter()
                seed, rate = seed_of(self.seed, 2), row["tuning"]["lr"]
                share = _share(arm, self.rows, self.recipe, self.students, seed, final=True)
                made = _run(arm, self.student, self.rows, share, self.recipe, self.classes, [rate], seed)
                # The one look at the test set.
                found = [
                    judge(stack, *(part.expand(stack.size, *part.shape) for part in self.test))
                    for stack, _ in made
                ]
                error, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
                row["test_error"] = error.tolist()
                row["test_loss"] = [value if math.isfinite(value) else None for value in loss.tolist()]
                row["seconds"] += time.perf_counter() - began
                self._keep(name, row)
        return row

    def result(self) -> dict[str, dict[str, Any]]:
        """What :func:`compare` returns, once all arms are done."""
        check.compare_done(self.missing())
        made = {name: self._kept(name) for name in self.arms}
        errors = {name: row["test_error"] for name, row in made.items()}
        tests = {
            name: {arm: paired(errors[_own(name)], errors[arm]) for arm in self.others}
            for name in self.teachers
        }
        corrected = holm([test.p for own in tests.values() for test in own.values()])
        protocol = self._protocol(len(corrected))
        found = {}
        for name, teacher in self.teachers.items():
            rows = {"taught": made[_own(name)], **{arm: made[arm] for arm in self.others}}
            own = tests[name]
            found[name] = {
                "test_error": {arm: row["test_error"] for arm, row in rows.items()},
                "test_loss": {arm: row["test_loss"] for arm, row in rows.items()},
                "p": {arm: test.p for arm, test in own.items()},
                "p_corrected": {arm: corrected.pop(0) for arm in own},
                "comparisons": len(tests) * len(own),
                "interval": {arm: list(test.interval) for arm, test in own.items()},
                "summary": {
                    arm: _summary(errors[_own(name)], row["test_error"]) for arm, row in rows.items()
                },
                "tuning": {arm: row["tuning"] for arm, row in rows.items()},
                "curves": {arm: row["curve"] for arm, row in rows.items()},
                "oracles": [arm for arm, its in self.others.items() if its.oracle],
                "also": list(self.also),
                "protocol": protocol,
                "recipe": self.recipe.to_json(),
                "teacher": teacher.config(),
                "students": self.students,
                "seed": self.seed,
                "seconds": sum(row["seconds"] for row in made.values()),
            }
        return found

    def _protocol(self, comparisons: int) -> list[str]:
        """What is done, in sentences."""
        recipe, rows = self.recipe, self.rows
        total = len(rows.targets)
        rate = "constant learning rate" if recipe.decay == "constant" else "learning rate that falls to 0"
        decayed = f", weight decay {recipe.weight_decay:g}" if recipe.weight_decay else ""
        changed = {"crop": "cropped", "flip": "mirrored", "crop-flip": "cropped and mirrored"}
        augmented = (
            f" Its images are {changed[recipe.augment]} at random." if recipe.augment in changed else ""
        )
        said = [
            f"Every arm trains the same {self.students} fresh students, paired over the arms by their seed: "
            f"same start weights, same order of rows (seed {self.seed}).",
            f"A student takes {recipe.steps} steps of {recipe.batch_size} rows by SGD with momentum "
            f"{recipe.momentum:g}{decayed} and a {rate}.{augmented}",
            f"Each arm's learning rate is the one of {', '.join(f'{lr:g}' for lr in self.grid)} with the "
            f"least mean dev error of {self.tuning_students} other students, the same for every arm. {GROWS}",
        ]
        if rows.train == total:
            said.append(
                f"No dev set is given: each tuning student holds {recipe.dev_fraction:.0%} of the {total:,} "
                f"training rows back, {recipe.dev_rows:,} at most, drawn by its seed. Final students learn "
                "from all of them."
            )
        else:
            said.append(
                f"The dev set is {total - rows.train:,} rows beside {rows.train:,} training rows. It tunes; "
                "then final students learn from it, too."
            )
        for kind, how in (("dev", "from the dev rows alone"), ("both", "half of every batch from dev rows")):
            for arm in (name for name, its in self.others.items() if its.rows == kind):
                said.append(f"'{arm}' learns {how}, and is tuned on a part of them that it does not see.")
        for arm in (name for name, its in self.arms.items() if its.wants_dev and its.rows == "all"):
            said.append(
                f"'{arm}' looks at dev rows while a student learns, so its final students do not learn from "
                "them, unlike those of other arms."
            )
        for arm in (name for name, its in self.others.items() if its.oracle):
            said.append(f"'{arm}' knows what nobody has: it is a bound, not a rival.")
        said += [
            f"The test set, {len(self.test[1]):,} rows, is read once an arm, when its final students are "
            "done; nothing is chosen by it.",
            "p is that of a two-sided paired t-test over the students, corrected by Holm's method for all "
            f"{comparisons} comparisons of the table: {_count(len(self.teachers), 'teacher')} against "
            f"{_count(len(self.others), 'arm')} each, oracles included. A win or a loss has a corrected p "
            f"below {ALPHA:g}.",
            "An interval is the 95 % confidence interval of the mean paired difference, not corrected.",
            "Both speak of students of one training set and one teacher, not of other training sets.",
        ]
        return said


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _own(teacher: str) -> str:
    """The name of a teacher's arm among all arms."""
    return f"taught by {teacher}"


def _taught(teacher: AnyTeacher, like: Tensor) -> Arm:
    wants_dev = any(name.startswith("dev_") for name in teacher.features)
    return Arm(taught_loss(teacher_beside(teacher, like)), wants_dev=wants_dev)


def slug(name: str) -> str:
    """An arm's name as a file name and on a command line: ``label smoothing 0.1`` is ``label-smoothing-0.1``.

    Example:
        >>> slug("focal loss, gamma 2")
        'focal-loss-gamma-2'
    """
    return re.sub(r"(?:[^\w.]|_)+", "-", name).strip("-")  # letters of every alphabet stay


def arm_stem(name: str, digest: str) -> str:
    """The name of an arm's file before its ending; of an arm's name that is too long for one, the end."""
    return f"{slug(name).encode()[-180:].decode(errors='ignore')}-{digest[:12]}"


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe(arm: Arm, classes: int, steps: int) -> dict[str, Any]:
    """What an arm is, by its teacher or by what its loss says of a fixed batch along a run."""
    about = {"rows": arm.rows, "wants_dev": arm.wants_dev}
    if isinstance(arm.loss, GivenLoss):
        teacher = arm.loss.teacher
        parameters = [value for _, value in sorted(teacher.named_parameters())]
        return {**about, "teacher": teacher.config(), "weights": _digest(*parameters)}
    logits = 4.0 * torch.linspace(-9.0, 9.0, 2 * 3 * classes * classes).sin().reshape(2, -1, classes)
    target = (torch.arange(logits.shape[1]) % classes).expand(2, -1)
    looks = min(steps, LOOKS, max(20, ELEMENTS // logits.numel()))

    def said(loss: float, part: float, step: int) -> Tensor:
        state = [torch.full((2,), value) for value in (part, loss, part, loss, part)]
        return arm.loss(logits, target, StudentState(*state), step)

    with torch.no_grad():
        first = said(0.5, 0.5, 0)
        along = [
            said(2.0 * math.log(classes) * (1.0 - step / steps), step / steps, step)
            for step in range(0, steps, -(-steps // looks))
        ]
    same = all(torch.equal(first, later) for later in along)
    return {**about, "loss": _digest(first) if same else _digest(first, *along)}


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
        pools = split_pools(train, students, recipe.dev_fraction, seed_of(seed, 1), recipe.dev_rows)
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
) -> Iterator[tuple[Stack, list[Tensor]]]:
    """Students of ``share``, once for each learning rate, a cohort after the other: as many as train side by
    side, and their dev errors at ``points``.
    """
    size = len(share.dev)
    parts = len(share.learn)
    sizes = [(recipe.batch_size + part) // parts for part in range(parts)]
    every_batch = torch.cat(
        [
            draw_batches(pool, recipe.steps, rows_of_pool, seed_of(seed, 3, part))
            for part, (pool, rows_of_pool) in enumerate(zip(share.learn, sizes, strict=True))
        ],
        -1,
    )
    device = rows.inputs.device
    seeds = [seed_of(seed, 2, index) for index in range(size)]

    def run(cohort: Cohort) -> tuple[Stack, list[Tensor]]:
        mine, count = share.dev[cohort.students], len(cohort.rates)
        stack = Stack(student, seeds[cohort.students] * count).to(device)
        held = mine.repeat(count, 1)
        dev = (rows.inputs[mine], rows.targets[held]) if arm.wants_dev else None
        batches = every_batch[:, cohort.students].repeat(1, count, 1).to(device)
        lesson = Lesson((rows.inputs, rows.targets), batches, arm.loss, classes, dev, recipe.augment)
        curve: list[Tensor] = []

        def look(step: int) -> None:
            curve.append(_dev_error(stack, rows, held if step == recipe.steps else held[:, :CURVE_ROWS]))

        with seeded(seed_of(seed, 4)):
            train_stack(
                stack,
                lesson,
                lr=cohort.lr(rows.inputs),
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                decay=recipe.decay,
                at=points,
                then=look,
            )
        return stack, curve

    for cohort in side_by_side(student, rows.inputs[: recipe.batch_size], size, rates):
        yield run(cohort)


@torch.no_grad()
def _dev_error(stack: Stack, rows: _Rows, held: Tensor) -> Tensor:
    """Error (S,) of each student on its rows (S, D), of which a part at a time is brought together."""
    parts = held.split(max(1, 4096 // stack.size), 1)
    return grade(torch.cat([evaluate(stack, rows.inputs[part]) for part in parts], 1), rows.targets[held])[0]


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

    def errors_of(rates: Sequence[float]) -> dict[float, list[float]]:
        made = _run(arm, student, rows, share, recipe, classes, rates, seed, points)
        curve = [torch.cat(errors) for errors in zip(*(errors for _, errors in made), strict=True)]
        by_rate = torch.stack(curve).reshape(len(points), len(rates), students).mean(-1).T  # [rates, points]
        return dict(zip(rates, by_rate.tolist(), strict=True))

    errors: dict[float, list[float]] = {}

    def levels_of(rates: Sequence[float]) -> dict[float, float]:
        made = errors_of(rates)
        errors.update(made)
        return {rate: along[-1] for rate, along in made.items()}

    tuning = tuned(grown(grid, levels_of), grid)
    tuning["dev_error"] = [errors[rate][-1] for rate in tuning["grid"]]
    return tuning, {"step": points, "dev_error": errors[tuning["lr"]]}


def grown(
    grid: Sequence[float], levels_of: Callable[[Sequence[float]], Mapping[float, float]]
) -> dict[float, float]:
    """The levels of learning rates, the lower the better: of a grid, and beyond where its best is at an end.

    Args:
        grid: the rates.
        levels_of: the level of each of some rates; infinity where students diverge.

    Example:
        >>> from l2t.compare import grown
        >>> grown([0.1, 0.2], lambda rates: {rate: abs(10 * rate - 5) for rate in rates})
        {0.1: 4.0, 0.2: 3.0, 0.4: 1.0, 0.8: 3.0}
    """
    levels = dict(levels_of(grid))
    for _ in range(EXTENSIONS):
        further = _beyond(levels)
        if further is None:
            break
        levels |= levels_of([further])
    return levels


def tuned(levels: Mapping[float, float], grid: Sequence[float]) -> dict[str, Any]:
    """What is chosen among :func:`grown` levels: ``lr``, and ``grid`` (all rates), ``added`` and ``at_edge``.

    Example:
        >>> from l2t.compare import tuned
        >>> tuned({0.1: 4.0, 0.2: 3.0, 0.4: 1.0, 0.8: 3.0}, [0.1, 0.2])
        {'lr': 0.4, 'grid': [0.1, 0.2, 0.4, 0.8], 'added': [0.4, 0.8], 'at_edge': False}
    """
    rates = sorted(levels)
    return {
        "lr": min(rates, key=levels.__getitem__),
        "grid": rates,
        "added": [rate for rate in rates if rate not in grid],
        "at_edge": _beyond(levels) is not None,
    }


def _beyond(levels: Mapping[float, float]) -> float | None:
    """The next learning rate beyond the best one, where that is at an end of the grid, in two figures."""
    rates = sorted(levels)
    best = min(rates, key=levels.__getitem__)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.2g}")


ROUNDING = 1e-6  # of the largest error: differences of errors in float32 that are nearer than this are one


class Paired(NamedTuple):
    """A paired t-test: its two-sided p (None where all differences are one), and the 95 % interval."""

    p: float | None
    interval: tuple[float, float]


def statistics_of_scipy() -> ModuleType:
    """scipy.stats, which a comparison asks for before its work.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise check.missing_package("compare", "scipy") from error
    return stats  # type: ignore[no-any-return]


def paired(mine: Sequence[float], other: Sequence[float]) -> Paired:
    """The paired t-test of ``mine`` less ``other``, two values or more each.

    Example:
        >>> paired([0.1, 0.2, 0.4], [0.2, 0.4, 0.5]).interval
        (-0.276..., 0.010...)
    """
    stats = statistics_of_scipy()
    first, *others = (one - two for one, two in zip(mine, other, strict=True))
    bound = ROUNDING * max(map(abs, (*mine, *other)))
    if all(abs(difference - first) <= bound for difference in others):
        return Paired(None, (first, first))
    found = stats.ttest_rel(mine, other)
    low, high = found.confidence_interval(0.95)
    return Paired(float(found.pvalue), (float(low), float(high)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p-values corrected for their number, by Holm's step-down method (Scand. J. Statist. 1979).

    None counts as one more comparison and stays None.

    Example:
        >>> holm([0.01, 0.04, None, 0.02])
        [0.04, 0.08, None, 0.06]
    """
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, (len(ps) - rank) * p))
        corrected[index] = least
    return corrected


def _summary(taught: Sequence[float], errors: Sequence[float]) -> dict[str, Any]:
    mine, other = (torch.tensor(values, dtype=torch.float64) for values in (taught, errors))
    difference = mine - other
    return {
        "mean": float(other.mean()),
        "sd": float(other.std()),
        "difference": float(difference.mean()),
        "ahead": int((difference < 0).sum()),
        "behind": int((difference > 0).sum()),
    }


def called(gain: float, p: float | None) -> str:
    """What a mean difference at a corrected p is called: "win", "loss" or "even".

    Example:
        >>> called(0.3, 0.001), called(-0.3, 0.001), called(0.3, 0.02), called(0.3, None)
        ('win', 'loss', 'even', 'even')
    """
    if p is None or p >= ALPHA or gain == 0:
        return "even"
    return "win" if gain > 0 else "loss"


class Against(NamedTuple):
    """A teacher against an arm: its mean less that of the arm, the corrected p, and what that is called."""

    difference: float
    p: float | None
    verdict: str


def rate_cell(tuning: Mapping[str, Any]) -> str:
    """A tuned learning rate, with a star where it is at the edge of its grid."""
    return f"{tuning['lr']:g}{'*' if tuning['at_edge'] else ' '}"


def table(
    title: str,
    head: str,
    rows: Mapping[str, str],
    teachers: Mapping[str, Mapping[str, Against]],
    comparisons: int,
    notes: Sequence[str] = (),
) -> list[str]:
    """The lines of a table that `l2t compare` prints: arms by rows, how each teacher did against them beside.

    Args:
        title: above it.
        head: of the cells.
        rows: the cells by arm.
        teachers: by the name of each teacher's row, how it did against other arms.
        comparisons: that p is corrected for.
        notes: lines below it.
    """
    width = max(24, *(len(arm) + 2 for arm in rows))
    column = max(24, *(len(f"{name} less this") for name in teachers))
    lines = ["", title, "", f"{'':{width}}{head}"]
    lines[-1] += "".join(f"  {name + ' less this':>{column}}" for name in teachers)
    for arm, cells in rows.items():
        lines.append(f"{arm:{width}}{cells}")
        for difference, p, verdict in (own[arm] for own in teachers.values() if arm in own):
            against = f"{difference:+8.2f}  {'-' if p is None else f'{p:.1e}':>7}  {verdict:<4}"
            lines[-1] += f"  {against:>{column}}"
    edge = " (*: at the edge of the grid)" if any("*" in cells for cells in rows.values()) else ""
    last = (
        f"win, loss: paired t-test over students, p < {ALPHA} after Holm's correction for {comparisons} "
        f"comparisons; rate: each arm's, tuned on dev{edge}"
    )
    return [line.rstrip() for line in (*lines, "", *notes, last)]
