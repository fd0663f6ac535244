"""benchmarks/horizon.py and its section of docs/results.md: whole runs beside windows, on a toy language."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import draw_results
import horizon
import pytest
import torch
from toy_translator import toy_corpus

from l2t import StudentState
from l2t.translation.course import Course


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = toy_corpus()
    short = corpus._replace(train=corpus.train[:150], dev=corpus.dev[:15])
    monkeypatch.setattr(horizon.corpora, "find", lambda: Path("none"))
    monkeypatch.setattr(horizon.corpora, "read_folder", lambda _: short)
    monkeypatch.setattr(horizon, "COURSE", Course("lstm", steps=12, lr=0.02, warmup=2, tokens=60, dim=8))
    monkeypatch.setattr(horizon, "PIECES", 60)
    monkeypatch.setattr(horizon, "STRENGTHS", [(0.5, 0.5), (0.9, 0.1)])
    monkeypatch.setattr(horizon, "MEASURES", ("sharp-error", "cross-entropy"))
    monkeypatch.setattr(horizon, "LENGTHS", (1, 3))
    monkeypatch.setattr(horizon, "STAGES", 2)


def look(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["horizon.py", "--out", str(out), *flags])
    horizon.main()
    return json.loads(out.read_text())["rows"]


def test_whole_runs_and_windows_by_seed_are_made_once_and_drawn(small, tmp_path, monkeypatch):
    out = tmp_path / "translation" / "horizon.json"
    first = look(monkeypatch, out, "--seeds", "0")
    assert [(row["part"], row["about"]) for row in first] == [
        ("runs", [0.5, 0.5]), ("runs", [0.9, 0.1]), ("windows", "sharp-error"), ("windows", "cross-entropy"),
    ]  # fmt: skip
    rows = look(monkeypatch, out, "--seeds", "0", "1")
    assert rows[:4] == first  # what is there is not made again
    assert len(rows) == 8
    assert rows[0]["sharp-error"] != rows[1]["sharp-error"] != rows[5]["sharp-error"]
    for row in rows:
        if row["part"] == "windows":
            assert 0 <= row["steps"][0] < row["steps"][1] <= 9
            assert all(x != 0 for slopes in row["slopes"].values() for x in slopes)
    begun = {**json.loads(out.read_text()), "rows": first[:2]}
    assert len(draw_results.horizon(begun)) == 2  # no windows yet
    page = draw_results.page(tmp_path)
    assert "## How far ahead a window must look" in page
    both = " / ".join(f"{row['sharp-error']:.4f}" for row in (rows[1], rows[5]))
    assert f"| 0.9 | 0.1 | {rows[1]['bleu']:.2f} / {rows[5]['bleu']:.2f} | {both} |" in page
    slopes = " / ".join(f"{1000 * row['slopes']['3'][1]:+.1f}" for row in (rows[3], rows[7]))
    assert f"| cross-entropy | 3 | {1000 * rows[3]['slopes']['3'][0]:+.1f} / " in page
    assert f"| {slopes} |" in page


def test_a_moving_strength_is_that_of_its_place_in_the_run():
    hidden, head = torch.randn(1, 3, 4), torch.randn(6, 4)
    target = torch.tensor([[4, 5, 3]])
    for progress, strength in ((0.0, 0.9), (0.25, 0.7), (1.0, 0.1)):
        state = StudentState(progress=progress, train_loss=1.0, train_accuracy=0.5)
        expected = torch.nn.functional.cross_entropy(
            (hidden @ head.mT)[0], target[0], label_smoothing=strength
        )
        found = horizon.moving(0.9, 0.1)(hidden, head, None, target, state)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        horizon.moving(0.3, 0.3)(hidden, head, None, target, state),
        torch.nn.functional.cross_entropy((hidden @ head.mT)[0], target[0], label_smoothing=0.3),
    )
