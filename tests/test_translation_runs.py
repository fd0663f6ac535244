"""`l2t teach translation` and what its folders are good for, on a toy language."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_translator import toy_corpus

from l2t import StudentState, cli
from l2t.cli import main
from l2t.translation import course, runs
from l2t.translation.batches import Batch
from l2t.translation.corpus import Pairs, read_folder, write_folder
from l2t.translation.windows import WindowRecipe

SMALL = ["--pieces", "60", "--steps", "8", "--window", "2", "--updates", "3", "--students", "2"]
SMALL += ["--set", "stages=2", "refresh=2", "lr_warmup=2", "dim=8", "tokens=60", "dev_batches=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pairs"
    corpus = toy_corpus()
    write_folder(
        corpus._replace(train=corpus.train[:150], dev=corpus.dev[:20], test=corpus.test[:20]), folder
    )
    return folder


def teach(data: Path, out: Path, *more: str) -> list[str]:
    return ["teach", "translation", "--data", str(data), "--out", str(out), "--quiet", *SMALL, *more]


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dynamic and a static run."""
    out = tmp_path_factory.mktemp("taught")
    assert main(teach(data, out / "seed-0", "--smoothing", "0.2", "--weight", "diagonal")) == 0
    assert main(teach(data, out / "static-0", "--slots", "1")) == 0
    return out


def test_a_run_folder_says_all_that_made_it(data: Path, taught: Path) -> None:
    config = json.loads((taught / "seed-0" / "config.json").read_text())
    assert config["task"] == "translation"
    assert config["teacher"] == {"weight": "diagonal", "smoothing": 0.2}
    recipe = WindowRecipe(**config["recipe"])
    assert (recipe.run_steps, recipe.steps, recipe.updates, recipe.students) == (8, 2, 3, 2)
    how = course.Course(**config["course"])
    assert [how.rate(k) for k in range(8)] == [recipe.rate(k) for k in range(8)]
    about = json.loads((data / "corpus.json").read_text())
    assert config["data"]["files"] == about["files"]
    found = runs.load(taught / "seed-0")
    assert found.vocabulary.size == found.teacher.num_classes == 60
    assert found.teacher.kind == "diagonal"
    history = json.loads((taught / "seed-0" / "history.json").read_text())
    assert len(history["updates"]) == 3
    models = [(taught / name / "vocabulary.model").read_bytes() for name in ("seed-0", "static-0")]
    assert models[0] == models[1]


def test_a_teacher_learns_from_training_pairs_and_is_measured_on_dev(
    data: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(runs, "teach_translator", lambda *given, **more: asked.append(given))
    config = json.loads((taught / "seed-0" / "config.json").read_text())
    runs.teach(taught / "seed-0", config, False, False)
    ((teacher, _, batches, dev),) = asked
    corpus, vocabulary = read_folder(data), runs.load(taught / "seed-0").vocabulary

    def pairs_of(found: Iterable[Batch]) -> list[tuple[list[int], list[int]]]:
        rows = [row for batch in found for row in zip(batch.source, batch.target_out, strict=True)]
        return sorted(([i for i in s.tolist() if i > 3], [i for i in t.tolist() if i > 3]) for s, t in rows)

    def wanted(pairs: Pairs) -> list[tuple[list[int], list[int]]]:
        return sorted(zip(*vocabulary.encode_pairs(pairs), strict=True))

    assert pairs_of(dev) == wanted(corpus.dev)
    padding = sum(int((batch.target_out == -100).sum()) for batch in dev)
    assert padding < 0.1 * sum(batch.target_out.numel() for batch in dev)
    course = batches(5)
    first = [course[k] for k in itertools.takewhile(lambda k: course.epoch(k) == 0, itertools.count())]
    assert pairs_of(first) == wanted(corpus.train)
    counts = vocabulary.counts(vocabulary.encode_pairs(corpus.train).target)
    assert teacher.counts == counts.tolist()


def test_seeds_go_beside_one_another_and_their_teachers_differ(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_teach_several", lambda lessons, jobs: max(map(cli._teach_one, lessons)))
    assert main(teach(data, tmp_path, "--seeds", "0", "1", "--updates", "1", "--set", "refresh=1")) == 0
    one, two = (runs.load(tmp_path / f"seed-{seed}").teacher for seed in (0, 1))
    assert not torch.equal(one.keys, two.keys)


def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(
    data: Path,
    taught: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = teach(data, tmp_path, "--smoothing", "0.2", "--weight", "diagonal")
    from l2t.translation import windows

    whole, calls = windows.window, []

    def breaks(*given: object) -> object:
        calls.append(0)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return whole(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(windows, "window", breaks)
        assert main(same) == 130
    assert not (tmp_path / "teacher.safetensors").exists()
    assert main(same) == 2
    assert "directory must hold no run" in capsys.readouterr().err
    assert main([*same, "--resume", "--window", "3"]) == 2
    assert "the same arguments, got different recipe" in capsys.readouterr().err
    assert main([*same, "--resume"]) == 0
    name = "teacher.safetensors"
    assert (tmp_path / name).read_bytes() == (taught / "seed-0" / name).read_bytes()
    again, once = (
        json.loads((folder / "history.json").read_text())["updates"]
        for folder in (tmp_path, taught / "seed-0")
    )
    assert [row["norms"] for row in again] == [row["norms"] for row in once]
    assert [row["after"] for row in again] == [row["after"] for row in once]


def test_a_taught_loss_trains_a_translator(
    data: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "translation", "--data", str(data), "--steps", "3", "--quiet"]
    assert main([*train, "--loss", str(taught / "seed-0"), "--out", str(tmp_path / "out")]) == 0
    assert "test BLEU" in capsys.readouterr().out
    made = course.load(tmp_path / "out")
    found = runs.load(taught / "seed-0")
    assert made.config["loss"] == found.name
    assert made.vocabulary.model == found.vocabulary.model
    state = StudentState(0.5, 2.0, 0.3)
    hidden, head, target = torch.randn(2, 3, 4), torch.randn(60, 4), torch.tensor([[5, 9, 3], [4, 3, -100]])
    assert float(found.loss(hidden, head, None, target, state)) == float(
        found.teacher.loss(hidden, head, None, target, state)
    )
    assert not any(parameter.requires_grad for parameter in found.teacher.parameters())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--regime", "x", "--rank", "2"], "must come without flags of another, got --regime, --rank."),
        (["--device", "cpu"], "got --device"),
        (["--weight", "full"], "weight must be one of shared, diagonal, low-rank, got 'full'"),
        (["--window", "9"], "steps must be at most run_steps=8"),
        (["--measure", "bleu"], "measure must be"),
        (["--smoothing", "1.5"], "smoothing must be"),
        (["--student", "gru"], "student must be one of lstm, lstm-2, transformer"),
        (["--set", "optimizer=sgd"], "optimizer must be adam, by which `l2t train` and `l2t compare` train"),
        (["--features", "progress", "dev_loss"], "features must be some of progress, train_loss, train_acc"),
        (["--set", "dim=abc"], "dim must be an integer of 1 or more, got 'abc'"),
        (["--set", "tokens=1.5"], "tokens must be an integer of 1 or more, got 1.5"),
        (["--set", "dropout=no"], "dropout must be a number in [0, 1], got 'no'"),
        (["--set", "hats=abc"], "hats must be an integer of 2 or more, got 'abc'"),
        (["--set", "prior_range=abc"], "prior_range must be positive and finite, got 'abc'"),
        (["--set", "lr_betas=3"], "lr_betas must be a sequence of 2 positive numbers, got 3"),
        (["--set", "stages=many"], "stages must be an integer of 1 or more, got 'many'"),
        (["--set", "samples=[2]"], "samples must be an integer of 2 or more, got [2]"),
        (["--pieces", "90000"], "size must be a number of pieces that the sentences give, got 90000"),
        (["--set", "sizes=3"], "the field of --set must be one of"),
        (["--data", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_any_work(
    more: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(teach(data, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flags_of_sentence_pairs_are_refused_elsewhere(
    data: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teach", "digits", "--window", "3", "--out", str(tmp_path / "out")]) == 2
    assert "a task must come without flags of another, got --window" in capsys.readouterr().err
    train = ["train", "translation", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*train, "--loss", str(taught / "seed-0"), "--pieces", "70"]) == 2
    assert "a taught loss must come without flags of another, got --pieces" in capsys.readouterr().err
    assert main([*train, "--loss", "hinge"]) == 2
    assert "the loss must be one of maximum-likelihood" in capsys.readouterr().err
    before = (taught / "seed-0" / "config.json").read_bytes()
    assert main([*train, "--out", str(taught / "seed-0"), "--pieces", "60", "--quiet"]) == 1
    assert "directory must hold no run, got" in capsys.readouterr().err
    assert (taught / "seed-0" / "config.json").read_bytes() == before
    assert main([*train, "--pieces", "90000"]) == 2
    assert "size must be a number of pieces that the sentences give, got 90000" in capsys.readouterr().err
    assert main([*train, "--loss", str(data)]) == 2
    assert "must hold a run of `l2t teach translation`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", ["the start", "a checkpoint", "the end"])
def test_a_loss_is_not_taught_in_the_folder_of_a_translator(
    at: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "translation", "--data", str(data), "--pieces", "61", "--steps", "2", "--quiet"]
    with monkeypatch.context() as patch:
        if at != "the end":
            steps = 0 if at == "the start" else 1
            take = course._Running.take
            patch.setattr(course._Running, "take", lambda run: take(run) if run.step < steps else stop())
        assert main([*train, "--out", str(tmp_path)]) == (0 if at == "the end" else 130)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--resume"]):
        assert main(teach(data, tmp_path, *more)) == 2
        assert "l2t.teach: directory must hold no run, got" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if at == "the end":
        assert course.load(tmp_path).vocabulary.size == 61


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("task", ["translation", "digits"])
def test_a_translator_is_not_trained_where_a_loss_is_about_to_be_taught(
    task: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first checkpoint."""
    line = (
        teach(data, tmp_path) if task == "translation" else ["teach", task, "--out", str(tmp_path), "--quiet"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(runs, "teach_translator", stop)
        patch.setattr("l2t.teach_best", stop)
        assert main(line) == 130
    assert not (tmp_path / "checkpoint.json").exists()
    before = (tmp_path / "config.json").read_bytes()
    train = ["train", "translation", "--data", str(data), "--pieces", "60", "--steps", "2", "--quiet"]
    assert main([*train, "--out", str(tmp_path)]) == 1
    assert "l2t.translation: directory must hold no run, got" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == before


def test_other_sentence_pairs_are_not_taken_for_those_of_the_run(
    data: Path, taught: Path, tmp_path: Path
) -> None:
    config = json.loads((taught / "seed-0" / "config.json").read_text())
    corpus = toy_corpus()
    write_folder(corpus._replace(test=corpus.test[:9]), tmp_path / "other")
    config["data"]["folder"] = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be those that the run was begun with, got another train\.de"):
        runs.corpus_of(config)


def test_sentence_pairs_that_moved_are_found_where_data_sets_are(
    data: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes to another machine without a link to where its pairs were."""
    config = json.loads((taught / "seed-0" / "config.json").read_text())
    config["data"]["folder"] = str(tmp_path / "moved")
    monkeypatch.setenv("L2T_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"must be in .*moved, where they were when it was"):
        runs.corpus_of(config)
    home = tmp_path / "sets" / "translation-{source}-{target}".format(**config["data"])
    shutil.copytree(data, home)
    assert runs.corpus_of(config) == read_folder(data)
    (tmp_path / "config.json").write_text(json.dumps(config))
    config["data"]["folder"] = str(home)
    runs.check_same(tmp_path, config)
    config["data"]["pieces"] += 1
    with pytest.raises(ValueError, match="data"):
        runs.check_same(tmp_path, config)


def test_a_flag_of_several_values_that_comes_twice_has_those_of_both(data: Path, tmp_path: Path) -> None:
    line = teach(
        data, tmp_path, "--set", "smoothing_range=2", "--seeds", "3", "--seeds", "4", "3", "--seed", "5"
    )
    options = cli._parser().parse_args(line)
    lessons = cli._lessons_of_tokens(options)
    assert [lesson.config["seed"] for lesson in lessons] == [3, 4, 5]
    assert lessons[0].config["course"]["dim"] == 8
    assert lessons[0].config["teacher"] == {"smoothing_range": 2}
    line = ["compare", "x", "--grid", "0.1", "--arms", "a", "--grid", "0.2", "0.3", "--arms", "b", "c"]
    options = cli._parser().parse_args(line)
    assert (options.grid, options.arms) == ([0.1, 0.2, 0.3], ["a", "b", "c"])
    assert cli._parser().parse_args(line[:2]).grid is None
