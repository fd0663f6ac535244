"""A setting or transfer of settings.py from end to end: teachers are taught, compared, written down as a row.

The row goes to benchmarks/results/<setting>.json: commit and commands, versions, seeds, minutes, and of every
arm the tuned learning rate and the test error of each fresh student, or its BLEU, chrF and perplexity, with
the statistics of `l2t compare`.
benchmarks/draw_results.py draws docs/results.md of the rows. What is done already, teachers and arms, is
taken from the folder of runs, so that the same command goes on after Ctrl-C.

Teachers of translators take hours: once taught they are kept beside the rows, in teachers/<setting>/, and
--taught compares those, without teaching anew.

Examples:
  python benchmarks/teaching.py --list
  python benchmarks/teaching.py mnist1d-mlp-clean --jobs 2
  python benchmarks/teaching.py digits-mlp-clean digits-mlp-few
  python benchmarks/teaching.py translation-lstm      of the pairs that `l2t data translation` makes
  python benchmarks/teaching.py translation-lstm --taught      of teachers that are kept
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from settings import KINDS, SETTINGS, TRANSFERS, TRANSLATORS

import l2t
from l2t import _native, cli
from l2t.files import read_json, write_json
from l2t.report import Run, find_runs
from l2t.translation.runs import seconds_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEPT = ("config.json", "history.json", "teacher.json", "teacher.safetensors", "vocabulary.model")
"""What a comparison reads of a teacher's run."""


def commands(name: str, runs: Path) -> list[list[str]]:
    """The `l2t` commands of a setting or transfer, without `--jobs`: each teaching, then the comparison."""
    if name in TRANSFERS:
        to = TRANSFERS[name]
        where = ["--to", to.task, "--regime", to.regime, "--student", to.student, *shlex.split(to.transfer)]
        budget = ["--students", str(to.students), "--out", str(runs / name)]
        return [*commands(to.source, runs)[:-1], ["transfer", str(runs / to.source), *where, *budget]]
    folder, found = runs / name, []
    if name in TRANSLATORS:
        setting, where = TRANSLATORS[name], ["translation"]
    else:
        setting = SETTINGS[name]
        where = [setting.task, "--regime", setting.regime]
    for kind in setting.kinds:
        names = ["teach", *where, "--student", setting.student]
        flags, stem = KINDS[kind]
        words = shlex.split(f"{setting.teach} {flags}")
        seeds = list(map(str, setting.seeds))
        out = folder if len(seeds) > 1 else folder / f"{stem}-{seeds[0]}"
        found.append([*names, *words, "--seeds", *seeds, "--out", str(out), "--resume"])
    students = ["--students", str(setting.students)]
    return [*found, ["compare", str(folder), *students, *shlex.split(setting.compare)]]


def run(
    name: str, runs: Path, jobs: int, kept: Path = RESULTS / "teachers", taught: bool = False
) -> dict[str, Any]:
    """Teach and compare what is missing; the row of it. Teachers of translators go to ``kept``, or where they
    are taught already come from there. Raises SystemExit where a command fails.
    """
    *teaching, comparison = commands(name, runs)

    def make(*steps: list[str]) -> None:
        for step in steps:
            print(f"l2t {shlex.join(step)}", flush=True)
            code = cli.main([*step, "--jobs", str(jobs)])
            if code:
                raise SystemExit(code)

    if taught:
        setting = TRANSLATORS[name]
        wanted = {f"{KINDS[kind][1]}-{seed}" for kind in setting.kinds for seed in setting.seeds}
        take(kept / name, runs / name, wanted)
    else:
        make(*teaching)
        if name in TRANSLATORS:
            keep(runs / name, kept / name)
    make(comparison)
    return {
        "name": name,
        **({"source": TRANSFERS[name].source} if name in TRANSFERS else {}),
        "command": f"python benchmarks/teaching.py {name}",
        "commands": [f"l2t {shlex.join(step)}" for step in commands(name, Path("runs"))],
        **(row_of_translators if name in TRANSLATORS else row_of)(find_runs(runs / name)),
        **({"taught_at": read_json(kept / name / "made.json")} if name in TRANSLATORS else {}),
    }


def keep(folder: Path, kept: Path) -> None:
    """Copy what a comparison reads of the teachers in a folder, and say what made them; once for the same."""
    found = find_runs(folder)
    if {one.name: _teacher(one.directory) for one in found} == _teachers(kept):
        return
    with _whole(kept) as part:
        for one in found:
            to = part / one.name
            to.mkdir()
            for name in KEPT:
                shutil.copyfile(one.directory / name, to / name)
            config = read_json(to / "config.json")  # pairs are found by languages, and known by checksums
            config["data"]["folder"] = Path(config["data"]["folder"]).name
            write_json(to / "config.json", config)
        write_json(part / "made.json", {"commit": commit(), "versions": versions()})


def take(kept: Path, folder: Path, wanted: set[str]) -> None:
    """Copy kept teachers to where none were taught. Raises SystemExit where one is missing or others are."""
    if missing := ", ".join(sorted(wanted - _teachers(kept).keys())):
        raise SystemExit(
            f"teaching.py: {kept} must hold {missing} too. Leave --taught out to teach them all."
        )
    if not folder.exists():
        with _whole(folder) as part:
            shutil.copytree(kept, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("made.json"))
    if _teachers(folder) != _teachers(kept):
        raise SystemExit(f"teaching.py: {folder} must hold the teachers of {kept} alone. Give other --runs.")


def _teacher(run: Path) -> bytes:
    return (run / "teacher.safetensors").read_bytes()


def _teachers(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: _teacher(path.parent) for path in folder.glob("*/teacher.safetensors")}


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of this one when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as made:
        part = Path(made) / folder.name
        part.mkdir()
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def row_of(runs: list[Run]) -> dict[str, Any]:
    """What the teachers of one comparison came to."""
    compared = [run for run in runs if run.comparison is not None]
    comparison = compared[0].comparison
    assert comparison is not None
    arms = [arm for arm in comparison["test_error"] if arm != "taught"]
    config = compared[0].config
    return {
        "task": config["task"],
        "regime": config["regime"],
        "student": config["student"],
        "commit": commit(),
        "versions": versions(),
        "seed": comparison["seed"],
        "students": comparison["students"],
        "minutes": {
            "teaching": round(sum(sum(run.history["seconds"].values()) for run in runs) / 60, 2),
            "comparison": round(comparison["seconds"] / 60, 2),
        },
        "recipe": config["recipe"],
        "protocol": comparison["protocol"],
        "comparisons": comparison["comparisons"],
        "oracles": comparison["oracles"],
        "also": comparison["also"],
        "arms": {arm: arm_of(comparison, arm) for arm in arms},
        "teachers": {run.name: teacher_of(run, arms) for run in compared},
    }


COMPARED = (
    "seed", "students", "arms", "taught", "best_baseline", "tests", "bootstrap", "teaching", "signatures",
    "protocol",
)  # fmt: skip
"""What a row has as the comparison of translators has it."""


def row_of_translators(runs: list[Run]) -> dict[str, Any]:
    """What the teachers of one comparison of translators came to."""
    compared = next(run for run in runs if run.comparison is not None)
    comparison, config = compared.comparison, compared.config
    assert comparison is not None
    arms = comparison["arms"]
    taken = [seconds for arm in arms.values() for seconds in arm["cpu_seconds"]]
    return {
        "task": "translation",
        "student": config["student"],
        "commit": commit(),
        "versions": versions(),
        "minutes": {
            "teaching": round(sum(seconds_of(run.history) for run in runs) / 60, 2),
            "student": round(sum(taken) / len(taken) / 60, 2),
        },
        "courses": len(taken)
        + comparison["tuning_students"] * sum(len(arm["tuning"]["grid"]) for arm in arms.values()),
        "recipe": config["recipe"],
        "course": comparison["course"],
        "data": {name: value for name, value in comparison["data"].items() if name != "folder"},
        "teachers": {
            run.name: {
                "seed": run.config["seed"],
                "settings": {k: x for k, x in run.teacher.config().items() if k != "counts"},
                "chosen": "taught" if is_taught(run.history) else run.history["trial"]["chosen"],
                "updates": len(run.history["updates"]),
            }
            for run in runs
        },
        **{name: comparison[name] for name in COMPARED},
    }


def arm_of(comparison: dict[str, Any], arm: str) -> dict[str, Any]:
    tuning = comparison["tuning"][arm]
    return {
        "test_error": [round(error, 7) for error in comparison["test_error"][arm]],
        **{name: tuning[name] for name in ("lr", "grid", "added", "at_edge")},
        "dev_error": [round(error, 7) for error in tuning["dev_error"]],
    }


def teacher_of(run: Run, arms: list[str]) -> dict[str, Any]:
    """One teacher's own arm, and each difference to another: taught less that arm."""
    comparison, history = run.comparison, run.history
    assert comparison is not None
    return {
        "seed": run.config["seed"],
        "settings": run.teacher.config(),
        "chosen": "taught" if is_taught(history) else "neutral",
        "teaching_lr": history.get("lr"),
        "updates": len(history["updates"]),
        **arm_of(comparison, "taught"),
        "against": {
            arm: {
                "difference": comparison["summary"][arm]["difference"],
                **{name: comparison[name][arm] for name in ("p", "p_corrected", "interval")},
            }
            for arm in arms
        },
    }


def is_taught(history: dict[str, Any]) -> bool:
    """Whether the result was taught, and is no known loss that was ahead of what was."""
    if any(row["chosen"] and not row["taught"] for row in history.get("choice", ())):
        return False
    return (history.get("trial") or {}).get("chosen") in (None, "average", "good")


def commit() -> str:
    """The commit that is checked out; with a + where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "l2t", "csrc", "benchmarks/settings.py"
    )
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def versions() -> dict[str, str]:
    """What the bits may depend on."""
    return {
        "l2t": l2t.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "instruction set": _native.instruction_set(),
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="names of settings.py, translators and transfers too"
    )
    parser.add_argument("--list", action="store_true", help="the settings and their commands")
    parser.add_argument(
        "--taught", action="store_true", help="compare the teachers in teachers/ of --out, teach none"
    )
    parser.add_argument("--jobs", type=int, default=1, help="teachers, then arms, at a time (default 1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs (default runs)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the rows (default benchmarks/results)"
    )
    options = parser.parse_args()
    names = [*SETTINGS, *TRANSLATORS, *TRANSFERS]
    unknown = [name for name in options.settings if name not in names]
    if unknown:
        parser.error(f"{unknown[0]} must be one of {', '.join(names)}")
    if options.list:
        for name in names:
            print(name, *(f"  l2t {shlex.join(step)}" for step in commands(name, Path("runs"))), sep="\n")
        return
    if options.taught and not all(name in TRANSLATORS for name in options.settings):
        parser.error(f"--taught is for settings whose teachers are kept: {', '.join(TRANSLATORS)}")
    for name in options.settings:
        row = run(name, options.runs, options.jobs, options.out / "teachers", options.taught)
        write_json(options.out / f"{name}.json", row)
        print(options.out / f"{name}.json", json.dumps(row["minutes"]), file=sys.stderr)


if __name__ == "__main__":
    main()
