"""Folders of taught losses for translators: `l2t teach translation` makes them, courses use them.

    FOLDER/seed-N   config.json (data with checksums, student, teacher, recipe, course), vocabulary.model, and
                    what windows.py writes: teacher.safetensors, history.json, checkpoints

Not here: the teaching itself (windows.py), and how a translator is trained (course.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from l2t import check
from l2t.files import read_json
from l2t.teacher import AnyTeacher
from l2t.translation.batches import Batches, batches_of, by_length
from l2t.translation.corpus import Corpus, built, read_folder
from l2t.translation.course import VOCABULARY, Course
from l2t.translation.token_teacher import TRACKED, TokenLoss, TokenTeacher
from l2t.translation.vocabulary import Vocabulary
from l2t.translation.windows import TaughtTokens, WindowRecipe, teach_translator

TASK = "translation"
_OF_COURSE = ("tokens", "dropout", "dim")  # settings of a student that a recipe of windows does not have
_OF_TEACHER = (
    "hats",
    "smoothing_range",
    "prior_range",
    "emphasis",
    "diagonal_start",
    "diagonal_range",
    "bias_range",
)
_RECIPE = tuple(field.name for field in dataclasses.fields(WindowRecipe))
SETTINGS = (*_RECIPE, *_OF_COURSE, *_OF_TEACHER)
"""What --set takes: fields of WindowRecipe and Course, and arguments of TokenTeacher."""


def config_of(
    corpus: Corpus,
    folder: Path,
    pieces: int,
    student: str,
    seed: int,
    teacher: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings of a run, complete and checked, as its ``config.json`` has them.

    Args:
        corpus: the pairs.
        folder: where they are.
        pieces: of the vocabulary.
        student: its name.
        seed: of the teaching.
        teacher: arguments of :class:`TokenTeacher` but for counts and seed.
        settings: more of them, and of the recipe and the course: names of SETTINGS.

    Raises:
        ValueError: for what makes no sense.
    """

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: settings[name] for name in names if name in settings}

    recipe = WindowRecipe(**{"lr": Course(student).top, **given(_RECIPE)})
    check.taught_by_adam(recipe.optimizer)
    course = Course(
        student,
        steps=recipe.run_steps,
        lr=recipe.lr,
        warmup=recipe.lr_warmup,
        betas=recipe.lr_betas,
        clip=1e30 if recipe.clip_norm is None else recipe.clip_norm,  # which clips nothing
        threads=recipe.threads,
        **given(_OF_COURSE),
    )
    wanted = {**teacher, **given(_OF_TEACHER)}
    check.tracked_features("cli", TokenTeacher([0, 1, 0, 1, 1], **wanted).features, TRACKED)
    return {
        "task": TASK,
        "student": student,
        "seed": seed,
        "data": {
            "folder": str(folder.resolve()),
            "source": corpus.source,
            "target": corpus.target,
            "files": corpus.info["files"],
            "origin": corpus.info.get("origin"),
            "counts": {name: len(getattr(corpus, name)) for name in ("train", "dev", "test")},
            "pieces": pieces,
        },
        "teacher": wanted,
        "recipe": recipe.to_json(),
        "course": course.to_json(),
    }


def check_same(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse to go on with the run in a folder where it was begun with other settings.

    Raises:
        ValueError: it was.
    """
    path = directory / "config.json"
    was = anywhere(read_json(path)) if path.is_file() else {}
    wanted = anywhere(json.loads(json.dumps(config)))
    check.is_the_same(
        "teach", directory, [name for name in wanted if name != "versions" and was.get(name) != wanted[name]]
    )


def anywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run but for the folder of its pairs, which may have moved; checksums tell them."""
    data = {name: value for name, value in config.get("data", {}).items() if name != "folder"}
    return {**config, "data": data}


def among(folders: Sequence[Path]) -> bool:
    """Whether there are runs of translators in the folders, or one level below them."""
    configs = [path / "config.json" for folder in folders for path in (folder, *folder.glob("*/"))]
    told = [read_json(config) for config in configs if config.is_file()]
    return any(one.get("task") == TASK for one in told)


def corpus_of(config: Mapping[str, Any]) -> Corpus:
    """The pairs that a run was begun with, where they were then or, on another machine, where data sets are.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are others.
    """
    data, files = config["data"], config["data"]["files"]
    found = [Path(data["folder"]), *built(data["source"], data["target"])]
    there = [folder for folder in found if (folder / "corpus.json").is_file()]
    check.run_data_there(found[0], bool(there))
    folder = there[0]
    corpus = read_folder(folder)
    check.run_data(folder, [name for name in files if corpus.info["files"].get(name) != files[name]])
    return corpus


def teach(directory: Path, config: Mapping[str, Any], resume: bool, progress: bool) -> TaughtTokens:
    """Teach the run of a folder that has its vocabulary.

    Raises:
        ValueError: as :func:`corpus_of` and :func:`l2t.translation.windows.teach_translator` do.
    """
    corpus, course = corpus_of(config), Course(**config["course"])
    vocabulary = Vocabulary.load(directory / VOCABULARY)
    pairs, dev = vocabulary.encode_pairs(corpus.train), vocabulary.encode_pairs(corpus.dev)
    return teach_translator(
        TokenTeacher(vocabulary.counts(pairs.target), seed=config["seed"], **config["teacher"]),
        lambda: course.build(vocabulary.size),
        lambda seed: Batches(pairs, course.tokens, seed),
        list(batches_of(by_length(dev), course.tokens)),
        recipe=WindowRecipe(**config["recipe"]),
        seed=config["seed"],
        directory=directory,
        resume=resume,
        guard=config["guard"],
        progress=progress,
    )


def seconds_of(history: Mapping[str, Any]) -> float:
    """What a teaching has taken by the clock; the seconds of its pools are a part of those of its updates.

    Example:
        >>> from l2t.translation.runs import seconds_of
        >>> seconds_of({"seconds": {"updates": 90.0, "trial": 5.0, "pools": 60.0}})
        95.0
    """
    seconds: dict[str, float] = history["seconds"]
    return seconds["updates"] + seconds["trial"]


class TaughtLoss(NamedTuple):
    """The loss of a taught run.

    Attributes:
        loss: frozen, as a course takes it.
        name: of the teacher's folder and content.
        teacher: which says it.
        vocabulary: whose tokens it is about.
    """

    loss: TokenLoss
    name: str
    teacher: TokenTeacher
    vocabulary: Vocabulary


def load(directory: Path) -> TaughtLoss:
    """The loss that was taught in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is one of another task.
    """
    check.token_teacher_there(
        directory, all((directory / n).is_file() for n in ("teacher.safetensors", VOCABULARY))
    )
    teacher = AnyTeacher.load(directory)
    assert isinstance(teacher, TokenTeacher)
    digest = hashlib.sha256((directory / "teacher.safetensors").read_bytes()).hexdigest()
    fixed = teacher.fixed()
    name = f"taught, {directory.resolve().name}, {digest[:16]}"
    return TaughtLoss(fixed.loss, name, fixed, Vocabulary.load(directory / VOCABULARY))
