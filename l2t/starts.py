"""Several teachers to begin with: which start is best, and which family's taught teacher.

    starts    each teacher's neutral loss trains fresh students; of each family (what a teacher sets and its
              link) the one with the least dev error goes on
    choice    every family is taught on a part of the rows, with half of the updates; fresh students under
              what came out, under the losses that it started as and under known losses that are not worth
              teaching are judged on the rest, which no teacher has seen
    teach     the best family is taught on all rows, with all updates (teach.py)

The choice is not made on rows that were taught on, since these flatter a teacher, and the more, the more it
sets. A dev set that is given is cut into halves, and each teaches once and judges once; otherwise three
tenths of the training rows judge, and where these are few, up to three times, by other rows each time. Judged
is by the calibrated expected error (students.py): 0 or 1 for each of 200 rows says too little. The least one
wins. No margin is asked for: what is judged was taught on fewer rows and with fewer updates than the result
will be. Starts are tried by plain errors, on the rows of ``Recipe.hold_back``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from l2t import check
from l2t.files import read_json, write_json
from l2t.students import Make, calibrated_error, seed_of, wrong
from l2t.teach import (
    Data,
    Recipe,
    Score,
    Taught,
    check_arguments,
    differing,
    identity,
    split_dev,
    teach,
    threads,
    trial,
)
from l2t.teacher import AnyTeacher, Teacher

JUDGE, JUDGES = 0.3, 1000
"""Where no dev set is given, the share of the training rows that judge, and how many are to judge in all."""

START = ("diagonal_start", "bias_start", "smoothing", "class_weights")
"""Settings of a teacher that say where it starts; teachers that differ in nothing else are one family."""

Errors = list[list[float]]
"""Mean dev error of fresh students, by candidate and rate; calibrated or plain."""


class Starts(NamedTuple):
    """What :func:`teach_best` chooses from: ``teachers`` to teach, and ``known`` losses to be ahead of.

    Example:
        >>> import l2t
        >>> smooth = [l2t.Teacher(10, "full", link="identity", smoothing=value) for value in (0.0, 0.1)]
        >>> gce = l2t.Teacher(10, diagonal_start=0.7, bias_start=-5.0)
        >>> len(l2t.Starts(smooth, [gce]).teachers)
        2
    """

    teachers: list[Teacher]
    known: list[Teacher]


def default_starts(
    num_classes: int,
    *,
    slots: int = 4,
    counts: Sequence[int] | None = None,
    noisy: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Starts:
    """The starts that need no tuning, by what is known of the training labels.

    Soft targets for each class and stage (identity link, W full, or of rank 4 above 20 classes), which start
    as cross-entropy or label smoothing; with ``noisy`` labels also two numbers for all classes under the
    sigmoid link, which start close to cross-entropy, and generalised cross-entropy as a known loss.

    Args:
        num_classes: C.
        slots: of the attention; 1 gives static teachers.
        counts: rows of each class in the training set, (C,). Where the largest class has over twice the rows
            of the smallest that occurs, soft targets may start with class weights of inverse frequency too;
            that of a class without rows is the mean of the others, which leaves theirs as they are.
        noisy: whether training labels are noisier than the dev set's.
        seed: of the start values.
        settings: more arguments of :class:`Teacher`, for all.

    Example:
        >>> import l2t
        >>> [teacher.smoothing for teacher in l2t.default_starts(10).teachers]
        [0.0, 0.05, 0.1, 0.2]
    """
    soft: dict[str, Any] = {"weight": "full" if num_classes <= 20 else "low-rank", "link": "identity"}
    found: list[dict[str, Any]] = [{**soft, "smoothing": value} for value in (0.0, 0.05, 0.1, 0.2)]
    known: list[dict[str, Any]] = []
    if counts is not None and max(counts) > 2 * min(count for count in counts if count):
        usual = statistics.fmean(1.0 / count for count in counts if count)
        weights = [1.0 / count if count else usual for count in counts]
        found += [{**soft, "smoothing": value, "class_weights": weights} for value in (0.0, 0.1)]
    if noisy:
        robust = {"weight": "shared", "link": "sigmoid", "diagonal_range": 1.5, "bias_range": 4.0}
        found.append(robust)
        known.append({**robust, "diagonal_start": 0.7, "bias_start": -5.0})

    def make(every: list[dict[str, Any]]) -> list[Teacher]:
        return [Teacher(num_classes, **one, slots=slots, seed=seed, **settings) for one in every]

    return Starts(make(found), make(known))


def teach_best(
    starts: Starts,
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
    """Teach the best start of each family of teachers and return what fresh students do best under.

    A family is teachers that differ only in where they start: ``diagonal_start``, ``bias_start``,
    ``smoothing``, ``class_weights``. Each family costs half a run of :func:`l2t.teach` a fold, of which there
    are two where a dev set is given and else one to three, and the best one a run more; a start costs
    ``recipe.trial_students`` plain students a learning rate. Tried are the rates of ``recipe.probe_lrs``, or
    ``recipe.lr`` times ``recipe.trial_rates`` where it is given: starts at every second one, which tells them
    apart, and what competes at the end at all of them, since a taught loss may be best at one between.

    Args:
        starts: teachers, and known losses that compete at the end; :func:`default_starts` gives some that
            need no tuning.
        student: makes a fresh student, as for :func:`l2t.teach`, which has more on the rest.
        train: inputs (N, ...) and targets (N,).
        dev: rows to measure the students on, or None.
        recipe: the settings, of every family.
        seed: of all that is random.
        directory: where the result is kept; the families' own runs are in ``directory/families``.
        resume: go on with the run in ``directory``.
        guard: as for :func:`l2t.teach`.
        progress: show a bar.

    Returns:
        the ``Taught`` that was chosen; its history has ``starts`` and ``choice`` besides: settings of all,
        ``dev_error`` of the ones and ``expected_error``, calibrated, of the others, by the rates of
        ``rates``, and which were taught and chosen; ``seconds`` are of all families. Where a known loss is
        chosen, the teacher says it in every state, and the history is that of the best taught one.

    Raises:
        ValueError: as :func:`l2t.teach`, and for no teachers or teachers of several numbers of classes.

    Example:
        >>> import torch, l2t
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> recipe = l2t.Recipe(steps=5, updates=1, lr=0.1, trial_students=2)
        >>> taught = l2t.teach_best(l2t.default_starts(3), lambda: torch.nn.Linear(8, 3),
        ...                         (x, x[:, :3].argmax(1)), recipe=recipe, progress=False)
        >>> len(taught.history["starts"])
        4
    """
    recipe = recipe or Recipe()
    check.best_starts(starts, Starts)
    teachers, known = starts
    check.best_teachers([teacher.num_classes for teacher in [*teachers, *known]], len(teachers))
    check_arguments(teachers[0], student, train, dev, recipe)
    seed = check.seed_number("teach", seed)
    rates = recipe.probe_lrs if recipe.lr is None else [recipe.lr * factor for factor in recipe.trial_rates]
    seen, held = split_dev(dev, recipe, seed)
    check.best_rows("train", len(train[1]), 3)
    if seen is not None:
        check.best_rows("dev", len(seen[1]), 4)
    place = None if directory is None else Path(directory)
    every = [*teachers, *known]
    same = identity(student, train, dev, recipe, seed, guard, every)
    trials = _Trials(place, resume, {"starts": [one.config() for one in every], **same})

    def judged(
        score: Score,
        rates: Sequence[float],
        candidates: Sequence[AnyTeacher],
        train: Data,
        rows: Data | None,
        *parts: int,
    ) -> Errors:
        with threads(recipe.threads):
            seen = trial(candidates, student, train, rows, recipe, rates, seed_of(seed, *parts), score)
        return seen.double().mean((-2, -1)).tolist()

    def taught(number: int, train: Data, dev: Data | None, recipe: Recipe, *fold: str) -> Taught:
        """The family of this number, taught on these rows."""
        return teach(
            teachers[chosen[number]],
            student,
            train,
            dev,
            recipe=recipe,
            seed=seed,
            directory=None if place is None else Path(place, "families", str(number), *fold),
            resume=resume,
            guard=guard,
            progress=progress,
        )

    families: dict[str, list[int]] = {}
    for index, teacher in enumerate(teachers):
        own = {name: value for name, value in teacher.config().items() if name not in START}
        families.setdefault(json.dumps(own, sort_keys=True), []).append(index)
    starting = [teacher.neutral() for teacher in teachers]
    found = trials.once("starts", judged, wrong, rates[::2], starting, train, held, 5)
    chosen = [min(family, key=lambda index: min(found[index])) for family in families.values()]

    # Runs need no margin over their start, which is among the known losses.
    whole = dataclasses.replace(recipe, trial_margin=0.0)
    known_losses = [*(teachers[start] for start in chosen), *known] if guard else list(known)
    neutrals = [one.neutral() for one in known_losses]
    short = dataclasses.replace(whole, updates=max(1, recipe.updates // 2), hold_back=0.0)
    folds: list[list[Taught]] = []  # each fold's, by family
    verdicts = []
    for fold, (learn, seen_rows, unseen) in enumerate(_folds(train, seen, seed_of(seed, 7))):
        name = f"fold-{fold}"
        folds.append([taught(number, learn, seen_rows, short, name) for number in range(len(chosen))])
        candidates = [*(one.teacher for one in folds[-1]), *neutrals]
        verdicts.append(
            trials.once(name, judged, calibrated_error, rates, candidates, learn, unseen, 6, fold)
        )
    final = torch.tensor(verdicts, dtype=torch.float64).mean(0)
    least = final.amin(1).tolist()
    best = min(range(len(chosen)), key=least.__getitem__)
    won = min([*range(len(chosen), len(least)), best], key=least.__getitem__)  # known, where as good
    if won < len(chosen):
        result = taught(best, train, dev, whole)
    else:  # the history is that of a run that was made
        result = dataclasses.replace(folds[0][best], teacher=neutrals[won - len(chosen)])
    result.history["starts"] = [
        {"teacher": teacher.config(), "dev_error": row, "taught": index in chosen}
        for index, (teacher, row) in enumerate(zip(teachers, found, strict=True))
    ]
    result.history["choice"] = [
        {
            "teacher": one.config(),
            "taught": index < len(chosen),
            "expected_error": row.tolist(),
            "chosen": index == won,
        }
        for index, (one, row) in enumerate(
            zip([*(teachers[start] for start in chosen), *known_losses], final, strict=True)
        )
    ]
    result.history["rates"] = {"starts": list(rates[::2]), "choice": list(rates)}
    runs = [*([result] if won < len(chosen) else []), *(one for fold in folds for one in fold)]
    result.history["seconds"] = {
        **{part: sum(one.history["seconds"][part] for one in runs) for part in result.history["seconds"]},
        **trials.content["seconds"],
    }
    if place is not None:  # of a run that was finished the same bytes
        write_json(place / "history.json", result.history)
        result.teacher.save(place)
    return result


def _folds(train: Data, dev: Data | None, seed: int) -> list[tuple[Data, Data | None, Data]]:
    """Of each fold the training rows, the dev rows for teaching, or None, and rows to judge by."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(data: Data, *sizes: int) -> list[Data]:
        order = torch.randperm(len(data[1]), generator=generator).to(data[1].device)
        return [(data[0][rows], data[1][rows]) for rows in order.split(list(sizes))]

    if dev is not None:
        half = len(dev[1]) // 2
        first, second = drawn(dev, len(dev[1]) - half, half)
        return [(train, first, second), (train, second, first)]
    judge = round(JUDGE * len(train[1]))
    count = min(3, math.ceil(JUDGES / judge))
    rest, *parts = drawn(train, len(train[1]) - count * judge, *[judge] * count)
    folds: list[tuple[Data, Data | None, Data]] = []
    for fold, rows in enumerate(parts):
        x, y = zip(rest, *(part for other, part in enumerate(parts) if other != fold), strict=True)
        folds.append(((torch.cat(x), torch.cat(y)), None, rows))
    return folds


class _Trials:
    """What trials came to, kept in ``families/trials.json``: a run that goes on does not repeat them."""

    def __init__(self, place: Path | None, resume: bool, same: dict[str, Any]) -> None:
        self.path = None if place is None else place / "families" / "trials.json"
        self.content: dict[str, Any] = {**same, "judged": {}, "seconds": {}}
        if place is not None:
            check.can_be_written("teach", place)
        if place is not None and (place / "checkpoint.json").exists():  # of teach
            check.may_start("teach", place, resume)
            check.is_the_same("teach", place, ["starts"])
        if place is not None and self.path is not None and self.path.exists():
            check.may_start("teach", place, resume)
            saved = read_json(self.path, "judged", "seconds")
            known = {name: value for name, value in same.items() if name in saved}  # an older file says less
            check.is_the_same("teach", place, differing(saved, known))
            self.content = saved

    def once(self, name: str, judged: Callable[..., Errors], *arguments: Any) -> Errors:
        """What was found under this name: as it is kept, or what ``judged`` of the arguments finds now."""
        if name not in self.content["judged"]:
            began = time.perf_counter()
            self.content["judged"][name] = judged(*arguments)
            self.content["seconds"][name] = time.perf_counter() - began
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self.content)
        found: Errors = self.content["judged"][name]
        return found
