"""Several teachers to begin with: which start is best, and which family's taught teacher.

    starts    each teacher's neutral loss trains fresh students; of each family (what a teacher sets and its
              link) the one with the least dev error goes on
    teach     each of those is taught (teach.py), with the whole budget each
    choice    what they came to, and known losses that are not worth teaching, train fresh students again; of
              those within a standard error of the least dev error the simplest is the result

That is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section
3.4.3): dev rows that a teacher has been taught on flatter it, and the more, the more it sets. A known loss is
simpler than a taught one, and of taught ones that of fewer numbers. Where nothing that was taught helps, the
result is the best of the known losses that it could start as. Rows for both trials are those of
``Recipe.hold_back``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2t import check
from l2t.files import write_json
from l2t.students import Make, seed_of
from l2t.teach import Data, Recipe, Taught, check_arguments, split_dev, standard_error, teach, threads, trial
from l2t.teacher import AnyTeacher, Teacher

START = ("diagonal_start", "bias_start", "smoothing", "class_weights")
"""Settings of a teacher that say where it starts; teachers that differ in nothing else are one family."""


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
            of the smallest, soft targets may start with class weights of inverse frequency too.
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
    if counts is not None and max(counts) > 2 * min(counts):
        weights = [1.0 / max(1, count) for count in counts]
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
    ``smoothing``, ``class_weights``. Each family costs a run of :func:`l2t.teach`; a start costs
    ``recipe.trial_students`` plain students a learning rate. Tried are the rates of ``recipe.probe_lrs``,
    every second one, or ``recipe.lr`` times ``recipe.trial_rates`` where it is given.

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
        the ``Taught`` that was chosen; its history has ``starts`` and ``choice`` besides: settings and dev
        errors (by rate) of all, and which were taught and chosen; in ``choice`` also how far each is behind
        the best, with the standard error. ``seconds`` are of all families. Where a known loss is chosen, the
        teacher says it in every state, and the history is that of the best taught one.

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
    rates = (
        recipe.probe_lrs[::2] if recipe.lr is None else [recipe.lr * factor for factor in recipe.trial_rates]
    )
    _, held = split_dev(dev, recipe, seed)
    place = None if directory is None else Path(directory)
    trials = _Trials(place, resume, [one.config() for one in [*teachers, *known]], recipe, seed)

    def tried(name: str, candidates: Sequence[AnyTeacher], part: int) -> Tried:
        def by_students() -> Tried:
            with threads(recipe.threads):
                seen = trial(candidates, student, train, held, recipe, rates, seed_of(seed, part))
            return _tried(seen, same_rows=held is not None)

        return trials.once(name, by_students)

    families: dict[str, list[int]] = {}
    for index, teacher in enumerate(teachers):
        own = {name: value for name, value in teacher.config().items() if name not in START}
        families.setdefault(json.dumps(own, sort_keys=True), []).append(index)
    found = torch.tensor(tried("starts", [teacher.neutral() for teacher in teachers], 5).errors)
    chosen = [min(family, key=lambda index: float(found[index].min())) for family in families.values()]

    results = [
        teach(
            teachers[start],
            student,
            train,
            dev,
            recipe=recipe,
            seed=seed,
            directory=None if place is None else place / "families" / str(number),
            resume=resume,
            guard=guard,
            progress=progress,
        )
        for number, start in enumerate(chosen)
    ]
    final = tried("choice", [*(result.teacher for result in results), *(one.neutral() for one in known)], 6)
    numbers = [*(_numbers(result) for result in results), *[0] * len(known)]
    won = _simplest(final, numbers)
    least = [min(row) for row in final.errors[: len(results)]]
    result = results[won if won < len(results) else least.index(min(least))]
    if won >= len(results):
        result = dataclasses.replace(result, teacher=known[won - len(results)].neutral())
    result.history["starts"] = [
        {"teacher": teacher.config(), "dev_error": row.tolist(), "taught": index in chosen}
        for index, (teacher, row) in enumerate(zip(teachers, found, strict=True))
    ]
    result.history["choice"] = [
        {"teacher": config, "dev_error": row, "chosen": index == won, "behind": behind}
        for index, (config, row, behind) in enumerate(
            zip(
                [*(teachers[start].config() for start in chosen), *(one.config() for one in known)],
                final.errors,
                final.behind,
                strict=True,
            )
        )
    ]
    result.history["rates"] = list(rates)
    result.history["seconds"] = {
        **{part: sum(one.history["seconds"][part] for one in results) for part in result.history["seconds"]},
        **trials.content["seconds"],
    }
    if place is not None and not (place / "teacher.safetensors").exists():
        write_json(place / "history.json", result.history)
        result.teacher.save(place)
    return result


class Tried(NamedTuple):
    """What fresh students under some candidates came to, as JSON holds it.

    Attributes:
        errors: mean dev error by candidate and rate.
        behind: of each candidate at its best rate, how far its error is above the least, and the standard
            error of that difference.
    """

    errors: list[list[float]]
    behind: list[list[float]]


def _tried(seen: Tensor, same_rows: bool) -> Tried:
    """Of what students got wrong, (candidates, rates, students, rows)."""
    errors = seen.mean((-2, -1))
    own = seen[torch.arange(len(seen)), errors.argmin(-1)]  # [candidates, students, rows]
    less = own - own[int(own.mean((-2, -1)).argmin())]
    behind = [[float(one.mean()), standard_error(one, same_rows)] for one in less]
    return Tried(errors.tolist(), behind)


def _numbers(taught: Taught) -> int:
    """How many numbers of a teacher were taught: none where the result is the neutral one."""
    trial = taught.history["trial"]
    if trial is not None and trial["chosen"] == "neutral":
        return 0
    return sum(parameter.numel() for parameter in taught.teacher.parameters())


def _simplest(tried: Tried, numbers: Sequence[int]) -> int:
    """Of the candidates within a standard error of the best the one of the fewest taught numbers; of several
    the one ahead.
    """
    near = [index for index, (mean, error) in enumerate(tried.behind) if mean <= error]
    return min(near, key=lambda index: (numbers[index], tried.behind[index][0]))


class _Trials:
    """What trials came to, kept in ``families/trials.json``: a run that goes on does not repeat them."""

    def __init__(
        self, place: Path | None, resume: bool, starts: list[dict[str, Any]], recipe: Recipe, seed: int
    ) -> None:
        self.path = None if place is None else place / "families" / "trials.json"
        self.content: dict[str, Any] = {
            "starts": starts,
            "recipe": recipe.to_json(),
            "seed": seed,
            "tried": {},
            "seconds": {},
        }
        if place is not None and self.path is not None and self.path.exists():
            check.run_may_start(place, resume)
            saved = json.loads(self.path.read_text())
            check.run_is_the_same(
                place, [name for name in ("starts", "recipe", "seed") if saved[name] != self.content[name]]
            )
            self.content = saved

    def once(self, name: str, students: Callable[[], Tried]) -> Tried:
        """What was tried under this name: as it is kept, or found now."""
        if name not in self.content["tried"]:
            began = time.perf_counter()
            self.content["tried"][name] = students()._asdict()
            self.content["seconds"][name] = time.perf_counter() - began
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self.content)
        return Tried(**self.content["tried"][name])
