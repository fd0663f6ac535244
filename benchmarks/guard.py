"""Does the guard keep a run that breaks from ending worse than cross-entropy? Three settings that break.

Each is taught twice from the same seed, without and with the guard, and both results are compared with tuned
cross-entropy on the test set: 20 fresh students an arm, each arm at its own best learning rate. What is shown
is the test error less cross-entropy's, in points, with the p of the paired t-test. All are mnist1d, clean:

    rate     students learn at 0.4, beyond the edge of chaos
    step     the teacher's own step is eight times the usual one
    sigmoid  a full W under the sigmoid link, with four times the usual step

Run: python benchmarks/guard.py [--seeds 0 1] [--json FILE]. A seed takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import l2t
from l2t import tasks
from l2t.baselines import Arm, stateless
from l2t.compare import compare
from l2t.students import cross_entropy

SETTINGS = {  # the link, and what is not as it should be
    "rate": ("identity", {"lr": 0.4, "teacher_lr": 0.12}),
    "step": ("identity", {"lr": 0.15, "teacher_lr": 1.0}),
    "sigmoid": ("sigmoid", {"lr": 0.2, "teacher_lr": 0.5}),
}


def measure(name: str, seed: int, students: int) -> dict:
    link, settings = SETTINGS[name]
    task = tasks.get("mnist1d")
    data = task.load("clean")
    recipe = l2t.Recipe(steps=300, batch_size=50, updates=30, **settings)
    teachers, runs = {}, {}
    for kind in ("unguarded", "guarded"):
        began = time.perf_counter()
        taught = l2t.teach(
            l2t.Teacher(data.num_classes, "full", link=link, seed=seed),
            task.student(),
            data.train,
            data.dev,
            recipe=recipe,
            seed=seed,
            guard=kind == "guarded",
        )
        teachers[kind] = taught.teacher
        norms = [row["norm"] for row in taught.history["updates"]]
        trial = taught.history["trial"]
        runs[kind] = {
            "largest_norm": None if None in norms else max(norms),
            "returns": sum(event["kind"] == "guard" for event in taught.history["events"]),
            "chosen": trial["chosen"] if trial else "average",
            "seconds": time.perf_counter() - began,
        }
    found = compare(
        teachers,
        task.student(),
        data.train,
        data.test,
        data.dev,
        recipe=recipe,
        arms={"cross-entropy": Arm(stateless(cross_entropy))},
        students=students,
    )
    for kind, run in runs.items():
        run["test_error"] = found[kind]["summary"]["taught"]["mean"]
        run["cross_entropy"] = found[kind]["summary"]["cross-entropy"]["mean"]
        run["p"] = found[kind]["p"]["cross-entropy"]
    return {"setting": name, "seed": seed, "students": students, **runs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--students", type=int, default=20, help="fresh students an arm")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = []
    print("| setting | teacher seed | cross-entropy, % | unguarded | p | guarded | p | returns | result |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.settings:
        for seed in options.seeds:
            row = measure(name, seed, options.students)
            rows.append(row)
            cells = [name, str(seed), f"{100 * row['guarded']['cross_entropy']:.2f}"]
            for kind in ("unguarded", "guarded"):
                run = row[kind]
                difference = 100 * (run["test_error"] - run["cross_entropy"])
                cells += [f"{difference:+.2f}", "-" if run["p"] is None else f"{run['p']:.1e}"]
            cells += [str(row["guarded"]["returns"]), row["guarded"]["chosen"]]
            print("| " + " | ".join(cells) + " |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
