"""The page about taught losses of translators: what it says is what the loss and the files hold."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from toy_translator import toy_corpus

import l2t
from l2t import report
from l2t.cli import main
from l2t.translation import report as tokens_report
from l2t.translation.corpus import write_folder
from l2t.translation.token_teacher import TokenTeacher

COUNTS = [0, 3, 0, 40, *range(150, 0, -1), 0, 0]
STATES = {
    "progress": [0.0, 0.5, 1.0],
    "train_loss": [5.0, 2.0, 1.0],
    "train_accuracy": [0.01, 0.3, 0.6],
}


def moved(weight: str = "low-rank", **settings: object) -> TokenTeacher:
    teacher = TokenTeacher(COUNTS, weight, smoothing=0.2, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return teacher


def states() -> list[l2t.StudentState]:
    return [l2t.StudentState(*row) for row in zip(*STATES.values(), strict=True)]


def history_of(**more: object) -> dict:
    """What a teaching of two updates on two pools leaves, made up."""
    from l2t.translation.windows import WindowRecipe

    rows = [
        {"update": i, "measure": 3.0 - i, "dev_error": 0.5, "norm": 0.1, "agreement": 0.2} for i in range(2)
    ]
    return {
        "recipe": WindowRecipe(run_steps=100, updates=2).to_json(),
        "updates": rows,
        "pools": [
            {"update": 0, "steps": [10, 60], "measure": [4.0, 3.0, 2.5]},
            {"update": 1, "steps": [20, 70], "measure": [3.9, None, 2.25]},
        ],
        "states": STATES,
        "seconds": {"updates": 90.0, "pools": 40.0, "trial": 10.0},
        "trial": {"chosen": "average", "runs": 0, "measure": {"average": [2.0, 3.0], "neutral": [2.5, None]}},
        **more,
    }


def arm(bleu: list[float], dev: list[float | None], **tuning: object) -> dict:
    return {
        "bleu": bleu,
        "chrf": [50.0, 52.0],
        "perplexity": [8.0, 9.0],
        "cpu_seconds": [5.0, 5.0],
        "tuning": {
            "lr": 0.2, "grid": [0.1, 0.2, 0.4], "added": [0.4], "at_edge": False, "dev_bleu": dev, **tuning
        },
    }  # fmt: skip


def comparison_of(p: float | None = 1e-3) -> dict:
    def test(difference: float, p_corrected: float | None) -> dict:
        return {
            "difference": difference,
            "interval": [difference - 1, difference + 1],
            "p": 5e-4,
            "p_corrected": p_corrected,
        }

    return {
        "task": "translation",
        "arms": {
            "maximum-likelihood": arm([20.0, 22.0], [10.0, 11.0, None]),
            "focal-1": arm([23.0, 25.0], [10.0, 12.0, 11.0], at_edge=True),
            "taught by seed-0": arm([26.0, 28.0], [13.0, 14.0, 12.0]),
        },
        "taught": ["taught by seed-0"],
        "best_baseline": "focal-1",
        "tests": {"taught by seed-0": {"maximum-likelihood": test(6.0, p), "focal-1": test(3.0, 0.03)}},
        "bootstrap": {"taught by seed-0": [{"difference": 3.0, "p": 0.01}, {"difference": -1.0, "p": 0.2}]},
        "teaching": {"taught by seed-0": {"seconds": 100.0, "student_runs": 20.0}},
        "signatures": {"BLEU": "nrefs:1|tok:13a", "chrF": "nrefs:1"},
        "protocol": ["Every arm trains <the same> students."],
        "students": 2,
    }


CONFIG = {
    "task": "translation",
    "student": "transformer",
    "seed": 0,
    "data": {
        "source": "de", "target": "en", "origin": "tales", "counts": {"train": 1500, "dev": 20, "test": 30},
        "files": {}, "pieces": 156,
    },
    "course": {"student": "transformer", "dim": 16, "tokens": 250, "dropout": 0.25},
}  # fmt: skip


def save(
    folder: Path, teacher: TokenTeacher, history: dict | None = None, config: dict | None = None
) -> Path:
    teacher.save(folder)
    for name, content in (("history", history or history_of()), ("config", config or CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def text_of(page: str) -> str:
    return re.sub(r"<style>.*?</style>|<[^>]*>", "", page, flags=re.S).replace("\u202f", " ")


def page_of(*folders: Path) -> str:
    return text_of(report.page(report.find_runs(*folders)))


# ---- the learned loss


def test_bands_are_ranks_of_the_frequency_and_hold_every_token_once() -> None:
    found = tokens_report.bands(moved())
    assert {name: len(tokens) for name, tokens in found.items()} == {
        "end of sentence": 1, "10 most frequent": 10, "to rank 100": 90, "to rank 1,000": 51,
        "not among targets": 4,
    }  # fmt: skip
    assert found["10 most frequent"].tolist() == list(range(4, 14))
    assert sorted(torch.cat(list(found.values())).tolist()) == list(range(len(COUNTS)))


@pytest.mark.parametrize("link", ["identity", "sigmoid"])
def test_numbers_of_a_loss_are_those_of_its_dense_matrix(link: str) -> None:
    teacher = moved(link=link, dtype=torch.float64)
    state = states()[1]
    weight, bias, scale = teacher(state)
    dense = weight.dense().detach()  # type: ignore[union-attr]
    found = tokens_report.numbers_of(teacher, state)
    torch.testing.assert_close(found.right, scale.detach() * dense.diagonal())  # type: ignore[union-attr]
    torch.testing.assert_close(found.smoothing, 1 - dense.diagonal() / dense.sum(1))
    others = dense[3].clone()  # a row off the diagonal says where the smoothing goes
    others[3] = 0
    assert float(found.prior[5] / found.prior[9]) == pytest.approx(float(others[5] / others[9]))
    assert float(found.prior.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(found.bias, bias.detach())  # type: ignore[union-attr]


def test_bands_count_a_target_as_often_as_it_occurs(tmp_path: Path) -> None:
    teacher = moved(dtype=torch.float64)
    (run,) = report.find_runs(save(tmp_path / "seed-0", teacher))
    found = tokens_report.learned(run)
    assert found is not None
    said, drawn = found
    top = list(range(4, 14))
    ends = []
    for state in (states()[0], states()[-1]):
        scale = teacher.fixed()(state).scale
        assert scale is not None
        ends.append(sum(COUNTS[k] * float(scale[k]) for k in top) / sum(COUNTS[k] for k in top))
    (sentence,) = (one for one in said if one.startswith("Emphasis"))
    assert "Emphasis from the start of a run to its end (label smoothing 0.2 has 1): " in sentence
    assert f"10 most frequent {ends[0]:.3g} → {ends[1]:.3g}, " in sentence
    assert "not among targets" not in sentence  # which no target is
    (prior,) = (one for one in said if one.startswith("Share of smoothing (uniform: 1)"))
    assert "not among targets" in prior
    assert [re.search(r'aria-label="([^&]*)&', svg)[1] for svg, _ in drawn] == [  # type: ignore[index]
        "weight of the right token over the student", "weight of other tokens over the student",
        "emphasis over the student", "share of smoothing (uniform: 1) over the student",
        "Attention over the slots along the student",
    ]  # fmt: skip


def test_a_loss_that_did_not_move_and_one_of_one_strength_say_so(tmp_path: Path) -> None:
    (run,) = report.find_runs(save(tmp_path / "a", moved().neutral()))
    assert tokens_report.learned(run) == (
        ["This is label smoothing of 0.2, whatever the state of the student."],
        [],
    )
    (run,) = report.find_runs(save(tmp_path / "b", moved("shared", slots=1)))
    found = tokens_report.learned(run)
    assert found is not None
    assert len(found[1]) == 2  # the weights of the right and of other tokens; no attention
    assert all("all tokens" in sentence and "→" not in sentence for sentence in found[0])
    (run,) = report.find_runs(save(tmp_path / "c", moved(link="log-sigmoid")))
    found = tokens_report.learned(run)
    assert found is not None
    assert any(sentence.startswith("Bias b from the start") for sentence in found[0])


# ---- words


def test_the_page_says_what_was_taught_and_what_it_cost(tmp_path: Path) -> None:
    save(tmp_path / "seed-0", moved())
    text = page_of(tmp_path)
    assert "translation, de to en" in text
    assert re.search(r"a Transformer with two layers a side of size 16, [\d,]+ numbers, dropout 0.25", text)
    assert "Sentence pairs: 1,500 to learn from, 20 dev, 30 test, from tales." in text
    assert f"one vocabulary of 156; the targets to learn from have {sum(COUNTS):,} of them, and 152" in text
    assert "A whole run is 100 steps of up to 250 padded tokens a side by Adam, whose rate rises" in text
    assert (
        "Teaching took 100 s by the clock: 40 s of 2 whole runs that windows begin on, 50 s of windows, 10 s "
        "of the trial. That is 5.0 times such a run." in text
    )
    assert "A loss has been taught; l2t compare has not yet compared it with baselines." in text
    assert "Independent windows agreed about the way with a cosine of 0.20" in text
    assert (
        "came to a dev sharp error of 2.5000 under the average of the last teachers, 2.5000 "
        "under the loss that it started as. Taken was the average of the last teachers." in text
    )


def test_the_page_says_which_known_loss_was_ahead_after_whole_runs(tmp_path: Path) -> None:
    measure = {"neutral": [0.85], "label-smoothing-0.4": [0.8125], "average": [None], "good": [0.9]}
    trial = {"chosen": "label-smoothing-0.4", "runs": 1, "by": "1 - BLEU", "measure": measure}
    teacher = TokenTeacher(COUNTS, smoothing=0.4)
    save(tmp_path / "seed-0", teacher, history_of(trial=trial, teacher={"smoothing": 0.3}))
    text = page_of(tmp_path)
    assert (
        "At the end 1 whole run of the same students came to a dev 1 - BLEU of 0.8500 under the loss that "
        "it started as, 0.8125 under the label smoothing of 0.4, 0.9000 under the teacher of the best "
        "episodes. Taken was the label smoothing of 0.4." in text
    )
    assert "The loss starts as label smoothing of 0.3." in text
    assert "This is label smoothing of 0.4, whatever the state of the student." in text


def test_a_trial_of_an_earlier_version_is_told_by_its_own_measure(tmp_path: Path) -> None:
    measure = {"neutral": [2.25], "label-smoothing-0.05": [2.125], "average": [2.0]}
    trial = {"chosen": "average", "runs": 1, "measure": measure}
    save(tmp_path / "seed-0", moved(), history_of(trial=trial))
    assert (
        "came to a dev calibrated cross-entropy (nats a piece) of 2.2500 under the loss that it started as, "
        "2.1250 under the label smoothing of 0.05, 2.0000 under the average" in page_of(tmp_path)
    )


def test_the_dev_measure_is_drawn_along_the_runs_of_the_pools(tmp_path: Path) -> None:
    (run,) = report.find_runs(save(tmp_path / "seed-0", moved()))
    ((svg, caption),) = tokens_report.drawn_of_the_teaching(run)
    assert ">before update 0<" in svg
    assert ">before update 1<" in svg
    assert "seed-0: dev measure along whole runs" in caption
    bare = run._replace(history={**run.history, "pools": []})
    assert tokens_report.drawn_of_the_teaching(bare) == []


def test_a_comparison_has_headline_table_tuning_bootstrap_and_protocol(tmp_path: Path) -> None:
    for name in ("seed-0", "seed-1"):
        save(tmp_path / name, moved(), config={**CONFIG, "seed": int(name[-1])})
    (tmp_path / "comparison.json").write_text(json.dumps(comparison_of()))
    text = page_of(tmp_path)
    assert (
        "reach a BLEU of 27.00 on the test set, against 24.00 under the best tuned baseline, focal-1: no "
        "clear difference (paired t-test over 2 students, p = 0.03, corrected for 2 comparisons). Under "
        "maximum likelihood they reach 21.00: higher (paired t-test over 2 students, p ≤ 0.001, corrected"
        in text
    )
    assert "taught by seed-027.00 ± 1.4151.00 ± 1.418.500.2" in text
    assert "focal-124.00 ± 1.4151.00 ± 1.418.500.2*+3.00+2.00 to +4.000.03" in text
    assert "maximum-likelihood21.00 ± 1.4151.00 ± 1.418.500.2▲ +6.00+5.00 to +7.000.001" in text
    assert "loss0.10.20.4" in text
    assert "maximum-likelihood10.0011.00diverged+" in text
    assert (
        "ahead in 1 and behind in 0 of 2 students at p &lt; 0.05: +3.00 (p = 0.01), −1.00 (p = 0.2)." in text
    )
    assert "Every arm trains &lt;the same&gt; students." in text
    assert "BLEU: nrefs:1|tok:13a" in text
    assert "seed-0: Teaching took 100 s" in text
    assert "and 20.0 times the CPU time of training a student under it." in text
    assert text.count("How it was measured") == 1  # two runs, one comparison
    assert "Settings of seed-0; the others differ in seed." in text
    alone = page_of(tmp_path / "seed-0")
    assert "against 24.00 under the best tuned baseline, focal-1" in alone
    assert "seed-1" not in alone.split("How it was measured")[1]


def test_a_static_taught_loss_is_no_baseline(tmp_path: Path) -> None:
    save(tmp_path / "seed-0", moved())
    found = comparison_of()
    found["arms"]["static taught loss"] = arm([25.0, 27.0], [10.0, 11.0, 9.0])
    found["tests"]["taught by seed-0"]["static taught loss"] = found["tests"]["taught by seed-0"]["focal-1"]
    (tmp_path / "comparison.json").write_text(json.dumps({**found, "best_baseline": "static taught loss"}))
    assert "against 24.00 under the best tuned baseline, focal-1" in page_of(tmp_path)


# ---- the command


def test_report_makes_a_page_of_what_teach_and_compare_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = toy_corpus()
    corpus = corpus._replace(train=corpus.train[:150], dev=corpus.dev[:15], test=corpus.test[:15])
    write_folder(corpus, tmp_path / "pairs")
    teach = ["teach", "translation", "--data", str(tmp_path / "pairs"), "--pieces", "60", "--steps", "8"]
    teach += ["--window", "2", "--updates", "2", "--students", "2", "--quiet", "--lr", "0.02", "--no-guard"]
    teach += ["--set", "stages=2", "refresh=1", "lr_warmup=2", "dim=8", "tokens=60", "dev_batches=1"]
    out = tmp_path / "runs"
    assert main([*teach, "--out", str(out / "seed-0")]) == 0
    assert main(["report", str(out)]) == 0
    compare = ["compare", str(out), "--students", "2", "--grid", "0.02", "--arms", "maximum-likelihood"]
    assert main([*compare, "--quiet"]) == 0
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)|\ssrc=|\shref=\"[^#]", page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(f'<page xmlns:xlink="links">{svg}</page>')
    text, history = text_of(page), json.loads((out / "seed-0" / "history.json").read_text())
    found = json.loads((out / "comparison.json").read_text())
    for arm in found["arms"].values():
        assert f"{statistics.fmean(arm['bleu']):.2f} ± {statistics.stdev(arm['bleu']):.2f}" in text
    assert "Sentence pairs: 150 to learn from, 15 dev, 15 test." in text
    for title in ("What was taught", "Result", "The learned loss", "The teaching", "Settings"):
        assert f"<h2>{title}</h2>" in page
    states = history["states"]
    last = history["pools"][-1]
    assert states["progress"] == [0.0, *(step / 8 for step in last["steps"]), 1.0]
    assert states["train_loss"][0] == pytest.approx(math.log(60))
    assert all(0 < value < 1 for value in states["train_accuracy"])
    capsys.readouterr()
    l2t.Teacher(3).save(out / "of-images")
    assert main(["report", str(out)]) == 2
    said = capsys.readouterr().err
    assert "the runs of a page must be of one kind, got some of translators and some of students" in said
