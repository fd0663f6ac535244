"""A run that is killed and resumed is the run that was not, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A few seconds of teaching on two hundred dev rows, with a probe, returns of the guard and a trial.
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from l2t.cli import main; sys.exit(main())",
    *[
        "teach",
        "digits",
        "--regime",
        "pair-flip",
        "--weight",
        "full",
        "--link",
        "identity",
        "--quiet",
        "--seed",
        "7",
    ],
    *[
        "--updates",
        "40",
        "--students",
        "2",
        "--set",
        "steps=15",
        "teacher_lr=0.5",
        "measure=cross-entropy",  # breaks more easily
        "probe_margin=1.0",
        "guard_window=2",
        "guard_rise=0.01",
    ],
    *["probe_lrs=[5.0,0.2,0.1,0.05]", "trial_students=4"],
]


def start(directory: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "--out", str(directory), *more],
        cwd=directory.parent,  # not the clone, whose sources hide the installed package
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(directory: Path, *more: str) -> None:
    process = start(directory, *more)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()


def wait_for(process: subprocess.Popen[bytes], condition) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.002)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def updates(directory: Path) -> int:
    marker = directory / "checkpoint.json"
    return json.loads(marker.read_text())["numbers"]["update"] if marker.exists() else -1


def result(directory: Path) -> tuple[bytes, bytes, list, list]:
    """The teacher's bytes, those of all else that the run has kept, and its history less the clock."""
    history = json.loads((directory / "history.json").read_text())
    rows = [{**row, "students_per_second": None} for row in history["updates"]]
    (kept,) = directory.glob("checkpoint-*.safetensors")
    assert not list(directory.glob(".*.part"))
    return (directory / "teacher.safetensors").read_bytes(), kept.read_bytes(), rows, history["events"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(directory)
    return directory


def test_the_run_has_everything_in_it(whole):
    history = json.loads((whole / "history.json").read_text())
    assert len(history["updates"]) == 40
    assert len(history["probe"]) >= 2
    assert "guard" in {event["kind"] for event in history["events"]}
    assert history["trial"]["chosen"] != "neutral"  # else the teacher's bytes would say little


def test_killed_in_the_probe(whole, tmp_path):
    """Before the first checkpoint: nothing of the run is there yet but its directory."""
    directory = tmp_path / "run"
    process = start(directory)
    wait_for(process, directory.exists)
    time.sleep(0.2)
    kill(process)
    assert updates(directory) == -1
    finish(directory, "--resume")
    assert result(directory) == result(whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_a_random_moment(whole, tmp_path, seed):
    dice = random.Random(seed)
    directory = tmp_path / "run"
    process = start(directory)
    update = dice.randrange(0, 38)
    wait_for(process, lambda: updates(directory) >= update)
    time.sleep(dice.uniform(0, 0.03))  # somewhere in an update or its checkpoint
    kill(process)
    assert updates(directory) < 40 or not (directory / "teacher.safetensors").exists()
    finish(directory, "--resume")
    assert result(directory) == result(whole)


class Killed(BaseException):
    """Stands for a kill: nothing is written after it."""


def test_killed_between_any_two_writes(tmp_path, monkeypatch):
    """Every rename and deletion of a small run is once the moment of the kill."""
    import torch

    import l2t

    recipe = l2t.Recipe(
        steps=3, batch_size=8, updates=2, students=2, lr=0.1, guard_window=1, trial_students=2
    )
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def teach(directory: Path) -> None:
        l2t.teach(
            l2t.Teacher(3), lambda: torch.nn.Linear(4, 3), (x, x[:, :3].argmax(1)), recipe=recipe,
            directory=directory, resume=True, progress=False,
        )  # fmt: skip

    teach(tmp_path / "whole")
    real_replace, real_unlink = os.replace, Path.unlink
    left = [10**9]

    def dying(real):
        def call(*arguments, **keywords):
            if left[0] <= 0:
                raise Killed
            left[0] -= 1
            return real(*arguments, **keywords)

        return call

    monkeypatch.setattr(os, "replace", dying(real_replace))
    monkeypatch.setattr(Path, "unlink", dying(real_unlink))
    deaths = 0
    for allowed in range(100):
        directory = tmp_path / str(allowed)
        left[0] = allowed
        try:
            teach(directory)
        except Killed:
            deaths += 1
            left[0] = 10**9
            teach(directory)
            assert result(directory) == result(tmp_path / "whole"), allowed
            shutil.rmtree(directory)
        else:
            break
    assert deaths > 12  # three checkpoints of a tensor file, two JSON files and a deletion, and the teacher
    assert left[0] == 0
