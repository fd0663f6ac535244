"""What helps a teacher to learn at the edge of chaos? Cures compared by their students.

mnist1d, clean, MLP, soft targets: the setting in which the students' best rate for training, 0.3, gives
teacher gradients that do not agree. Every cure has about the same number of student runs (students an episode
times updates) and the same seeds, and the guard is off, so that a cure has to hold by itself. What teaching
came to is compared with tuned cross-entropy on fresh students, each arm at its own best learning rate.

Run: python benchmarks/cures.py [--seeds 0 1 2] [--jobs 2], which goes on where it was broken off; then
`make results`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

from teaching import ROOT, commit, versions

import l2t
from l2t import tasks
from l2t.baselines import Arm, stateless
from l2t.compare import compare
from l2t.files import write_json
from l2t.students import cross_entropy

OUT = ROOT / "benchmarks" / "results" / "cures.json"
EDGE = {"lr": 0.3, "students": 4, "updates": 40}
CURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # in words, of the recipe, of the teacher
    "none": ("none: the rate at which cross-entropy is best, 0.3", {}, {}),
    "rate": ("half the rate, 0.15", {"lr": 0.15}, {}),
    "third": ("a third of the rate, 0.1", {"lr": 0.1}, {}),
    "students": ("three times the students, a third of the updates", {"students": 12, "updates": 13}, {}),
    "median": (
        "the same, and the median over students in place of the mean",
        {"students": 12, "updates": 13, "averaging": "median"},
        {},
    ),
    "damping": ("adjoint damped by 0.98 a step", {"damping": 0.98}, {}),
    "truncate": ("reverse pass over the last 100 of 300 steps", {"truncate": 100}, {}),
    "smoothing": ("starts as label smoothing 0.05", {}, {"smoothing": 0.05}),
    "shared": (
        "fewer numbers: W per class and one smoothing strength each",
        {},
        {"weight": "per-class", "smoothing": 0.0},
    ),
    "momentum": ("no momentum, ten times the rate", {"momentum": 0.0, "lr": 3.0}, {}),
}


def measure(job: tuple[str, int, int]) -> dict[str, Any]:
    """One cure and teacher seed, taught and compared."""
    name, seed, students = job
    _, recipe, teacher = CURES[name]
    task = tasks.get("mnist1d")
    data = task.load("clean")
    course = l2t.Recipe(steps=300, batch_size=50, **{**EDGE, **recipe})
    start = l2t.Teacher(data.num_classes, **{"weight": "full", "link": "identity", **teacher}, seed=seed)
    taught = l2t.teach(
        start, task.student(), data.train, recipe=course, seed=seed, guard=False, progress=False
    )
    found = compare(
        {"taught": taught.teacher},
        task.student(),
        data.train,
        data.test,
        recipe=l2t.Recipe(steps=300, batch_size=50),
        arms={"cross-entropy": Arm(stateless(cross_entropy))},
        students=students,
        progress=False,
    )["taught"]
    updates = taught.history["updates"]
    return {
        "cure": name,
        "seed": seed,
        "norm": statistics.median(row["norm"] for row in updates if row["norm"] is not None),
        "agreement": statistics.fmean(row["agreement"] or 0.0 for row in updates[:10]),
        "test_error": found["test_error"]["taught"],
        "cross_entropy": found["test_error"]["cross-entropy"],
        "p": found["p"]["cross-entropy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cures", nargs="+", choices=list(CURES), default=list(CURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the teachers")
    parser.add_argument("--students", type=int, default=20, help="fresh students an arm")
    parser.add_argument("--jobs", type=int, default=1, help="teachers at a time")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    content: dict[str, Any] = {"rows": []}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    done = {(row["cure"], row["seed"]) for row in content["rows"]}
    jobs = [
        (cure, seed, options.students)
        for seed in options.seeds
        for cure in options.cures
        if (cure, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap(measure, jobs):
            content["rows"].append(row)
            write_json(
                options.out,
                {
                    "kind": "cures",
                    "command": "python benchmarks/cures.py",
                    "commit": commit(),
                    "versions": versions(),
                    "words": {name: words for name, (words, _, _) in CURES.items()},
                    "rows": content["rows"],
                },
            )
            error = 100 * statistics.fmean(row["test_error"])
            print(f"{row['cure']:<10} {row['seed']} {error:.2f} (p {row['p']:.0e})", flush=True)


if __name__ == "__main__":
    main()
