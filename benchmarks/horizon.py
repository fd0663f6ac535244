"""How far ahead must a window look? What windows of a translator's run say, and what whole runs come to.

    runs      whole runs under label smoothing whose strength stays or moves along a line, measured on dev
    windows   from states along a run under one strength, the slope of a measure to the strength's logit, by
              measure and by how many steps there are from the loss to the measure

A slope is right where it asks for what makes whole runs better. The data are those of `l2t data translation`;
the test set is not looked at.

Run: python benchmarks/horizon.py [--jobs 2], which goes on where it was broken off; then `make results`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from teaching import RESULTS, commit, versions
from torch import Tensor

from l2t.files import write_json
from l2t.students import seed_of
from l2t.teacher import StudentState
from l2t.translation import corpus as corpora
from l2t.translation.batches import Batch, Batches, batches_of, by_length
from l2t.translation.course import Course, label_smoothing, train
from l2t.translation.token_teacher import TokenLoss, TokenTeacher
from l2t.translation.vocabulary import Vocabulary
from l2t.translation.windows import WindowRecipe, lost_bleu, make_pool, measured, window

OUT = RESULTS / "translation" / "horizon.json"
COURSE = Course("lstm", steps=700, lr=0.006, warmup=100)
PIECES = 3000
STRENGTHS = [(x, x) for x in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)] + [(0.9, 0.1), (0.1, 0.9)]
"""Of whole runs: at the start, and at the end."""

UNDER = 0.8  # the strength under which windows begin
MEASURES = ("calibrated-cross-entropy", "sharp-error", "sharp-bleu")
LENGTHS = (20, 100)
STAGES = 4


class Job(NamedTuple):
    """A whole run (strengths at start and end), or the windows of a measure; JSON-able."""

    part: str
    about: tuple[float, float] | str
    seed: int


def jobs(seeds: Iterable[int]) -> list[Job]:
    found = []
    for seed in seeds:
        found += [Job("runs", strengths, seed) for strengths in STRENGTHS]
        found += [Job("windows", measure, seed) for measure in MEASURES]
    return found


def moving(start: float, end: float) -> TokenLoss:
    """Label smoothing whose strength moves from ``start`` to ``end`` along a line."""

    def loss(
        hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor, state: StudentState
    ) -> Tensor:
        strength = start + (end - start) * float(state.progress)
        return label_smoothing(strength)(hidden, head, head_bias, target, state)

    return loss


def row_of(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    corpus = corpora.read_folder(corpora.find())
    vocabulary = Vocabulary.train(corpus, PIECES)
    dev = list(batches_of(by_length(vocabulary.encode_pairs(corpus.dev)), COURSE.tokens))
    if job.part == "windows":
        return {**job._asdict(), **slopes(job, corpus, vocabulary, dev)}
    assert not isinstance(job.about, str)
    student = train(corpus, vocabulary, course_of(job.seed), moving(*job.about), progress=False).student
    with torch.no_grad():
        calibrated = float(measured(student, dev, "calibrated-cross-entropy"))
        sharp = float(measured(student, dev, "sharp-error"))
    bleu = 100.0 * (1.0 - lost_bleu(student, dev))
    return {**job._asdict(), "bleu": bleu, "calibrated-cross-entropy": calibrated, "sharp-error": sharp}


def course_of(seed: int) -> Course:
    return Course(**{**COURSE.to_json(), "seed": seed})


def slopes(job: Job, corpus: corpora.Corpus, vocabulary: Vocabulary, dev: list[Batch]) -> dict[str, Any]:
    """Of windows from a state of each stretch of a run under one strength, by their length."""
    recipe = WindowRecipe(
        run_steps=COURSE.steps,
        steps=max(LENGTHS),
        lr=COURSE.top,
        lr_warmup=COURSE.warmup,
        lr_betas=COURSE.betas,
        clip_norm=COURSE.clip,
        measure=str(job.about),
        stages=STAGES,
        curvature="one-sided",
        memory="2GB",
    )
    pairs = vocabulary.encode_pairs(corpus.train)
    counts = vocabulary.counts(pairs.target)
    teacher = TokenTeacher(counts, "shared", slots=1, features=(), smoothing=UNDER, smoothing_range=1.0)
    student = course_of(seed_of(job.seed, 1)).make(vocabulary.size)
    source = Batches(pairs, COURSE.tokens, seed_of(job.seed, 2))
    pool, _ = make_pool(student, teacher, source, recipe, seed_of(job.seed, 3))
    found: dict[str, list[float]] = {f"{steps}": [] for steps in LENGTHS}
    for index, stage in enumerate(pool):
        own = seed_of(job.seed, 4, index)
        batches = Batches(pairs, COURSE.tokens, own)
        for steps in LENGTHS:
            short = dataclasses.replace(recipe, steps=steps)
            one = window(teacher, student, stage, [batches[k] for k in range(steps)], dev, short, own)
            found[f"{steps}"].append(float(one.gradient.sum()))
    return {"steps": [stage.step for stage in pool], "slopes": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of students and data")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the rows")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {json.dumps([row["part"], row["about"], row["seed"]]) for row in rows}
    missing = [job for job in jobs(options.seeds) if json.dumps(job) not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if options.jobs == 1:
            made: Iterable[dict[str, Any]] = map(row_of, missing)
        else:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.jobs))
            made = pool.imap(row_of, missing)
        for row in made:
            rows.append({**row, "commit": commit()})
            about = {"command": "python benchmarks/horizon.py", "versions": versions(), "under": UNDER}
            write_json(options.out, {**about, "course": COURSE.to_json(), "rows": rows})
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
