"""Comparisons of run folders: which teachers meet on which task, and their arms on several cores at once.

A :class:`Contest` says all that a process needs to set a comparison up. Arms are kept in files (compare.py),
so processes share nothing: each takes the next arm that is missing, and one that is broken off loses at most
the stage it was in.

Not here: how an arm is made (compare.py), and what is printed (cli.py).
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import l2t
from l2t import check, tasks, weight_net
from l2t.compare import COURSE, Comparison, slug
from l2t.files import read_json, write_json
from l2t.report import Run, find_runs
from l2t.teach import differing
from l2t.teacher import AnyTeacher


class Budget(NamedTuple):
    """What every arm of a comparison gets, and which baselines there are: arguments of :func:`compare`."""

    students: int
    tuning_students: int | None
    grid: tuple[float, ...]
    seed: int
    only: tuple[str, ...] | None


class Contest(NamedTuple):
    """A comparison of taught runs on a task.

    Attributes:
        runs: the folders of the teachers.
        task: where data and students are from.
        regime: of the data.
        student: its name.
        data_seed: of the draw of the regime.
        recipe: the course, as ``Recipe(**recipe)`` takes it.
        budget: what every arm gets.
        folder: where arms are kept, in ``arms/``.
        out: a folder to write the comparison of each teacher below; None is each teacher's own folder.
        device: where students learn.
    """

    runs: tuple[Path, ...]
    task: str
    regime: str
    student: str
    data_seed: int
    recipe: dict[str, Any]
    budget: Budget
    folder: Path
    out: Path | None = None
    device: str = "cpu"


def of_runs(folders: Sequence[Path], budget: Budget) -> list[Contest]:
    """A contest for each course among the runs in the folders, or one level below them.

    Raises:
        FileNotFoundError: for a folder without a run.
        ValueError: for a run that has no task.
    """
    groups: dict[str, list[tuple[Path, Run]]] = {}
    for folder in folders:
        for run in find_runs(folder):
            check.run_has_a_task(run.directory, run.config)
            groups.setdefault(json.dumps(_course(run), sort_keys=True), []).append((folder, run))
    contests = []
    for group in groups.values():
        folder, first = group[0]
        about = {name: first.config[name] for name in ("task", "regime", "student", "data_seed", "recipe")}
        contests.append(
            Contest(tuple(run.directory for _, run in group), **about, budget=budget, folder=folder)
        )
    return contests


def elsewhere(
    folders: Sequence[Path],
    task: str,
    regime: str | None,
    student: str | None,
    steps: int | None,
    budget: Budget,
) -> Contest:
    """The runs in the folders, or one level below them, as teachers of other students, in ``runs/transfer``.

    Args:
        folders: of the runs.
        task: whose data the students learn from.
        regime: of the task; None is its first.
        student: of the task; None is its first.
        steps: of a student; None is what the task's recipe has.
        budget: what every arm gets.

    Raises:
        FileNotFoundError: for a folder without a run.
        ValueError: for a task, regime or student that there is not, or of another number of classes.
    """
    its = tasks.get(task)
    regime = its.regimes[0] if regime is None else regime
    student = next(iter(its.students)) if student is None else student
    its.student(student)
    recipe = its.recipe(regime).to_json() | ({} if steps is None else {"steps": steps})
    runs = find_runs(*folders)
    for run in runs:
        check.transfer_classes(run.directory, run.teacher.num_classes, task, its.num_classes)
    check.transfer_names({name: slug(name) for name in parted([run.directory for run in runs])[0]})
    out = Path(
        "runs", "transfer", f"{task}-{regime}-{student}" + ("" if steps is None else f"-{steps}-steps")
    )
    return Contest(tuple(run.directory for run in runs), task, regime, student, 0, recipe, budget, out, out)


def _course(run: Run) -> dict[str, Any]:
    """What teachers must share to be compared with the same students of the same baselines."""
    names = ("task", "regime", "student", "data_seed")
    recipe = {name: run.config["recipe"].get(name) for name in COURSE}
    return {name: run.config[name] for name in names} | recipe


def set_up(contest: Contest) -> Comparison:
    """Load data and teachers.

    Raises:
        ValueError: for arms or a budget that make no sense.
    """
    task = tasks.get(contest.task)
    data = task.load(contest.regime, contest.data_seed).to(contest.device)
    dynamic, static = parted(contest.runs)
    about = ("task", "regime", "student", "data_seed")
    return Comparison(
        {name: run.teacher for name, run in dynamic.items()},
        task.student(contest.student),
        data.train,
        data.test,
        data.dev,
        recipe=l2t.Recipe(**contest.recipe),
        also=as_arms(static),
        noise=data.noise,
        dev_is_clean=data.dev_is_clean,
        directory=contest.folder / "arms",
        about={name: getattr(contest, name) for name in about},
        **contest.budget._asdict(),
    )


def parted(folders: Sequence[Path]) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs that get a comparison each, and the static ones that are arms of it, by name."""
    runs = find_runs(*folders)
    several = len({run.name for run in runs}) < len(runs)  # of the same name, from different folders
    named = {str(run.directory) if several else run.name: run for run in runs}
    dynamic = {name: run for name, run in named.items() if not run.is_static} or named
    return dynamic, {name: run for name, run in named.items() if name not in dynamic}


def as_arms(static: Mapping[str, Run]) -> dict[str, AnyTeacher]:
    """The teachers of these runs by what they are, and by name where there are several of a kind."""
    kinds = {
        name: weight_net.ARM if isinstance(run.teacher, l2t.WeightNet) else "static taught loss"
        for name, run in static.items()
    }
    return {
        kind + (f", {name}" if list(kinds.values()).count(kind) > 1 else ""): static[name].teacher
        for name, kind in kinds.items()
    }


def make(
    contests: Sequence[Any],
    comparisons: Sequence[Any],
    jobs: int,
    progress: bool,
    of: Callable[[Any], Any] = set_up,
) -> bool:
    """Make all arms that are missing, ``jobs`` at a time, in as many processes; whether all went well.

    A process makes the comparison of a contest anew, by ``of``.

    The numbers do not depend on ``jobs``. A process that fails says why on the standard error.
    """
    missing = [(i, name) for i, comparison in enumerate(comparisons) for name in comparison.missing()]
    with tqdm(total=len(missing), disable=not progress, unit="arm") as bar:
        if jobs > 1 and len(missing) > 1:
            return _in_processes(contests, missing, min(jobs, len(missing)), bar, of)
        for index, name in missing:
            comparisons[index].run(name, bar.set_description)
            bar.update()
    return True


def _in_processes(
    contests: Sequence[Any],
    missing: Sequence[tuple[int, str]],
    jobs: int,
    bar: tqdm[Any],
    of: Callable[[Any], Any],
) -> bool:
    context = multiprocessing.get_context("spawn")
    begun, done = context.Value("i", 0), context.Value("i", 0)
    workers = [context.Process(target=_work, args=(contests, missing, begun, done, of)) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.exitcode is None for worker in workers):
            alive = [worker.sentinel for worker in workers if worker.exitcode is None]
            multiprocessing.connection.wait(alive, timeout=0.5)
            bar.update(done.value - bar.n)
    finally:
        for worker in workers:
            if worker.is_alive():  # Ctrl-C came
                worker.terminate()
        for worker in workers:
            if worker.pid is not None:
                worker.join()
    for worker in workers:
        if worker.exitcode and worker.exitcode < 0:
            print(check.process_killed(worker.name, worker.exitcode, makes_missing=True), file=sys.stderr)
    return all(worker.exitcode == 0 for worker in workers)


def _work(
    contests: Sequence[Any],
    missing: Sequence[tuple[int, str]],
    begun: Synchronized[int],
    done: Synchronized[int],
    of: Callable[[Any], Any],
) -> None:
    """A process of its own: takes one arm after the other until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this process:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # that raises, so that courses keep their steps
    at, comparison = -1, None
    try:
        while True:
            with begun.get_lock():
                turn = begun.value
                begun.value += 1
            if turn >= len(missing):
                return
            index, name = missing[turn]
            if comparison is None or index != at:
                at, comparison = index, of(contests[index])
            comparison.run(name)
            with done.get_lock():
                done.value += 1
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "L2T_TRACEBACK" in os.environ:
            raise
        print(check.command_failed(error), file=sys.stderr)
        sys.exit(1)


def look_at_place(contest: Contest) -> None:
    """Whether what is to be written below ``contest.out`` takes the place of nothing else.

    Raises:
        ValueError: for a folder that holds a taught run or another transfer.
    """
    if contest.out is None:
        return
    for name, run in parted(contest.runs)[0].items():
        folder = contest.out / slug(name)
        taught = [part for part in ("checkpoint.json", "families") if (folder / part).exists()]
        if taught:
            check.transfer_place(folder, "a taught run")
        file = folder / "config.json"
        if file.is_file():
            other = differing(_course_of(read_json(file)), _course_of(_config(contest, run)))
            check.transfer_place(folder, f"one of another {', '.join(other)}" if other else None)
        elif (folder / "teacher.safetensors").is_file():
            check.transfer_place(folder, "a teacher from elsewhere")


def _course_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the folders of one transfer have in common, whatever else a recipe says."""
    recipe = config.get("recipe", {})
    return {
        **{name: config.get(name) for name in ("task", "regime", "student", "data_seed")},
        "teacher": str(Path(config.get("taught in", "")).resolve()),
        "recipe": {name: recipe.get(name) for name in COURSE},
    }


def write(contest: Contest, comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Write ``comparison.json`` for each teacher; returns them by the teacher's name."""
    dynamic, _ = parted(contest.runs)
    found = comparison.result()
    for name, run in dynamic.items():
        folder = run.directory
        if contest.out is not None:
            folder = contest.out / slug(name)
            write_json(folder / "config.json", _config(contest, run))  # first, to be known by
            run.teacher.save(folder)
        write_json(folder / "comparison.json", found[name])
    return found


def _config(contest: Contest, run: Run) -> Mapping[str, Any]:
    """What a report says of a teacher that was taught elsewhere."""
    about = ("task", "regime", "student", "data_seed", "recipe")
    return {
        **{name: getattr(contest, name) for name in about},
        "seed": run.config.get("seed"),
        "taught in": str(run.directory),
        **{f"taught on {name}": run.config.get(name) for name in about[:3]},
    }
