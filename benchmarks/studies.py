"""What helps a teacher to learn? Choices of a recipe, compared by the students that come out.

A study changes one thing at a time of one setting: every option has about the same number of student runs
(students an episode times updates) and the same seeds, and the guard is off, so that an option has to hold by
itself. What teaching came to is compared with tuned cross-entropy on fresh students, each arm at its own best
learning rate.

    edge       the rate at which students train best is one at which teacher gradients do not agree
    gradients  truncated, damped and difference gradients beside the exact one, at a rate where it agrees
    few-dev    a teacher of many numbers overfits the 200 clean rows that it is taught on
    teachers   what a teacher sets, how many stages it has, and what it sees of the student

Run: python benchmarks/studies.py [edge gradients few-dev teachers] [--seeds 0 1 2] [--jobs 2], which goes on
where it was broken off, with as many students; then `make results`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from teaching import RESULTS, commit, versions

import l2t
from l2t import tasks
from l2t.baselines import Arm, stateless
from l2t.compare import compare
from l2t.files import write_json
from l2t.students import cross_entropy


class Option(NamedTuple):
    """In words, and what it changes of the study's recipe, teacher and student."""

    words: str
    recipe: Mapping[str, Any] = {}
    teacher: Mapping[str, Any] = {}
    student: str = "mlp"


class Study(NamedTuple):
    """What all options share, on mnist1d; the words stand above its table."""

    words: str
    regime: str
    recipe: Mapping[str, Any]
    teacher: Mapping[str, Any]
    options: Mapping[str, Option]


SOFT = {"weight": "full", "link": "identity"}

STUDIES = {
    "edge": Study(
        "The edge of chaos: mnist1d, clean, at the rate at which cross-entropy trains an MLP best. Norm and "
        "agreement are those of the teacher gradient.",
        "clean",
        {"lr": 0.3, "students": 4, "updates": 40},
        SOFT,
        {
            "none": Option("none: the rate at which cross-entropy is best, 0.3"),
            "rate": Option("half the rate, 0.15", {"lr": 0.15}),
            "third": Option("a third of the rate, 0.1", {"lr": 0.1}),
            "students": Option(
                "three times the students, a third of the updates", {"students": 12, "updates": 13}
            ),
            "median": Option(
                "the same, and the median over students in place of the mean",
                {"students": 12, "updates": 13, "averaging": "median"},
            ),
            "damping": Option("adjoint damped by 0.98 a step", {"damping": 0.98}),
            "truncate": Option("reverse pass over the last 100 of 300 steps", {"truncate": 100}),
            "differences": Option("second derivatives by central differences", {"curvature": "central"}),
            "perturb": Option("students perturbed by a twentieth of their weights", {"perturb": 0.05}),
            "smoothing": Option("starts as label smoothing 0.05", {}, {"smoothing": 0.05}),
            "diagonal": Option("fewer numbers: W diagonal, and b", {}, {"weight": "per-class"}),
            "momentum": Option("no momentum, ten times the rate", {"momentum": 0.0, "lr": 3.0}),
            "relu": Option("ReLU in place of tanh", {}, {}, "mlp-relu"),
            "norm": Option("a normalised student", {}, {}, "mlp-norm"),
        },
    ),
    "gradients": Study(
        "Gradients that are not exact: mnist1d, clean, MLP, at half the rate at which cross-entropy trains "
        "best, where the exact ones of different students agree.",
        "clean",
        {"lr": 0.15, "students": 4, "updates": 40},
        SOFT,
        {
            "exact": Option("exact"),
            "central": Option("second derivatives by central differences", {"curvature": "central"}),
            "one-sided": Option("by one-sided differences", {"curvature": "one-sided"}),
            "truncate-200": Option("reverse pass over the last 200 of 300 steps", {"truncate": 200}),
            "truncate-100": Option("over the last 100", {"truncate": 100}),
            "truncate-30": Option("over the last 30", {"truncate": 30}),
            "damping-98": Option("adjoint damped by 0.98 a step", {"damping": 0.98}),
            "damping-90": Option("adjoint damped by 0.9 a step", {"damping": 0.9}),
        },
    ),
    "few-dev": Study(
        "A small dev set: mnist1d with 40 % pair flips and 200 clean rows to teach on. Without a guard, so "
        "that a teacher which overfits them shows it.",
        "pair-flip",
        {"lr": 0.1, "students": 4, "updates": 40},
        SOFT,
        {
            "none": Option("none: W full, 40 updates"),
            "diagonal": Option("fewer numbers: W diagonal", {}, {"weight": "per-class"}),
            "rank": Option("fewer numbers: W of rank 4", {}, {"weight": "low-rank"}),
            "shared": Option(
                "fewest numbers: two for all classes, sigmoid link",
                {},
                {"weight": "shared", "link": "sigmoid", "diagonal_range": 1.5, "bias_range": 4.0},
            ),
            "smoothing": Option("starts as label smoothing 0.1", {}, {"smoothing": 0.1}),
            "early": Option("half the updates", {"updates": 20}),
            "anchor": Option("anchored to the start, 0.3", {"anchor": 0.3}),
            "more-anchor": Option("anchored to the start, 1", {"anchor": 1.0}),
            "perturb": Option("students perturbed by a tenth of their weights", {"perturb": 0.1}),
            "measure": Option("measured by the expected error", {"measure": "expected-error"}),
        },
    ),
    "teachers": Study(
        "Teachers: mnist1d, clean, MLP, at half the rate at which cross-entropy trains best.",
        "clean",
        {"lr": 0.15, "students": 4, "updates": 40},
        SOFT,
        {
            "full": Option("W full; four slots; sees progress, training loss and accuracy"),
            "static": Option("one slot: a static loss", {}, {"slots": 1}),
            "two": Option("two slots", {}, {"slots": 2}),
            "eight": Option("eight slots", {}, {"slots": 8}),
            "progress": Option("sees progress only", {}, {"features": ("progress",)}),
            "dev": Option(
                "sees dev loss and accuracy besides",
                {},
                {"features": ("progress", "train_loss", "train_accuracy", "dev_loss", "dev_accuracy")},
            ),
            "rank": Option("W of rank 4", {}, {"weight": "low-rank"}),
            "diagonal": Option("W diagonal", {}, {"weight": "per-class"}),
            "sigmoid": Option("W full, sigmoid link", {}, {"link": "sigmoid"}),
            "shared": Option(
                "two numbers for all classes, sigmoid link", {}, {"weight": "shared", "link": "sigmoid"}
            ),
        },
    ),
}


def measure(job: tuple[str, str, int, int]) -> dict[str, Any]:
    """One option and teacher seed, taught and compared."""
    name, choice, seed, students = job
    study, option = STUDIES[name], STUDIES[name].options[choice]
    task = tasks.get("mnist1d")
    data, student = task.load(study.regime), task.student(option.student)
    course = l2t.Recipe(steps=300, batch_size=50, **{**study.recipe, **option.recipe})
    start = l2t.Teacher(data.num_classes, **{**study.teacher, **option.teacher}, seed=seed)
    taught = l2t.teach(
        start, student, data.train, data.dev, recipe=course, seed=seed, guard=False, progress=False
    )
    found = compare(
        {"taught": taught.teacher},
        student,
        data.train,
        data.test,
        data.dev,
        dev_is_clean=data.dev_is_clean,
        recipe=l2t.Recipe(steps=300, batch_size=50),
        arms={"cross-entropy": Arm(stateless(cross_entropy))},
        students=students,
        progress=False,
    )["taught"]
    updates = taught.history["updates"]
    return {
        "option": choice,
        "seed": seed,
        "norm": statistics.median(row["norm"] for row in updates if row["norm"] is not None),
        "agreement": statistics.fmean(row["agreement"] or 0.0 for row in updates[:10]),
        "test_error": found["test_error"]["taught"],
        "cross_entropy": found["test_error"]["cross-entropy"],
        "p": found["p"]["cross-entropy"],
    }


def kept(path: Path, students: int) -> list[dict[str, Any]]:
    """The rows that are there already, of as many students."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if len(row["test_error"]) == students]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="names as above; all where none is given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the teachers")
    parser.add_argument("--students", type=int, default=20, help="fresh students an arm")
    parser.add_argument("--jobs", type=int, default=1, help="teachers at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies", help="folder of the rows")
    options = parser.parse_args()
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"{name} must be one of {', '.join(STUDIES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.studies or STUDIES:
        study, path = STUDIES[name], options.out / f"{name}.json"
        rows = kept(path, options.students)
        done = {(row["option"], row["seed"]) for row in rows}
        jobs = [
            (name, choice, seed, options.students)
            for seed in options.seeds
            for choice in study.options
            if (choice, seed) not in done
        ]
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for row in pool.imap(measure, jobs):
                rows.append({**row, "commit": commit()})
                content = {
                    "command": f"python benchmarks/studies.py {name}",
                    "commit": ", ".join(dict.fromkeys(row["commit"] for row in rows)),
                    "versions": versions(),
                    "about": study.words,
                    "words": {choice: option.words for choice, option in study.options.items()},
                    "rows": rows,
                }
                write_json(path, content)
                print(name, row["option"], row["seed"], statistics.fmean(row["test_error"]), flush=True)


if __name__ == "__main__":
    main()
