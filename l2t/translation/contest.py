"""Fresh translators under taught losses and every baseline: who is ahead on the test set, and is it luck.

Every arm trains the same students: same steps, batches and start weights by seed, one grid of learning rates
tuned on dev. Each is kept in a file of its own, and the courses that it is made of resume, so that a
comparison that was broken off loses little; an arm reads the test set once, when its last student is done.

Not here: processes (l2t/contest.py makes arms side by side), and image tasks (l2t/compare.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from l2t import check
from l2t.compare import (
    ALPHA,
    EXTENSIONS,
    GROWS,
    Against,
    arm_stem,
    called,
    grown,
    holm,
    paired,
    rate_cell,
    statistics_of_scipy,
    tuned,
)
from l2t.compare import table as table_of
from l2t.contest import Budget, as_arms, parted
from l2t.files import read_json, to_json, write_json
from l2t.report import Run, find_runs
from l2t.students import seed_of
from l2t.teach import threads
from l2t.translation import runs, scores
from l2t.translation.course import LOSSES, VOCABULARY, Course, Trained, rising, train
from l2t.translation.token_teacher import TokenLoss, TokenTeacher

STUDENTS, TUNING_STUDENTS = 5, 1
_SHARED = ("task", "data", "course")  # of a config: what runs must have in common to meet


class TokenContest(NamedTuple):
    """A comparison of runs of `l2t teach translation`: all that a process needs to set it up.

    Attributes:
        runs: the folders of the teachers.
        budget: what every arm gets; an empty grid is half, one and two times the rate of teaching.
        folder: where ``arms/`` and ``comparison.json`` go.
    """

    runs: tuple[Path, ...]
    budget: Budget
    folder: Path


def of_runs(folders: Sequence[Path], budget: Budget) -> TokenContest:
    """The contest of the runs in the folders, or one level below them, kept in the first.

    Raises:
        FileNotFoundError: for a folder without a run.
        ValueError: for runs of different courses or sentence pairs, and for a budget that makes no sense.
    """
    found = find_runs(*folders)
    told = runs.anywhere(found[0].config)
    for run in found:
        other = [key for key in _SHARED if runs.anywhere(run.config).get(key) != told.get(key)]
        if not other and _pieces_of(run) != _pieces_of(found[0]):
            other = [VOCABULARY]
        check.one_contest(run.directory, other)
    check.recipe_count("students", budget.students, 2, "compare")
    for rate in budget.grid:
        check.recipe_number("grid", rate, 0.0, float("inf"), open_low=True, op="compare")
    for name in budget.only or ():
        check.known("compare", "arm", name, LOSSES)
    return TokenContest(tuple(run.directory for run in found), budget, folders[0])


def _pieces_of(run: Run) -> bytes:
    """The vocabulary of a run: another version of sentencepiece may make another one of the same pairs."""
    file = run.directory / VOCABULARY
    return file.read_bytes() if file.is_file() else b""


def set_up(contest: TokenContest) -> TokenComparison:
    """Load sentence pairs and teachers.

    Raises:
        ValueError: for sentence pairs that are not those of the runs.
    """
    return TokenComparison(contest)


class TokenComparison:
    """A comparison on its way: the arms that there are, those that are missing, and the result.

    Attributes:
        others: the losses of baselines and static teachers, by name.
        taught: those of the teachers that are compared with them.
    """

    def __init__(self, contest: TokenContest) -> None:
        statistics_of_scipy()
        self.budget, self.folder = contest.budget, contest.folder
        self.tuning_students = contest.budget.tuning_students or TUNING_STUDENTS
        dynamic, static = parted(contest.runs)
        first = next(iter(dynamic.values()))
        self.dynamic, self.config = dynamic, first.config
        self.corpus = runs.corpus_of(first.config)
        scores.metric_of("BLEU", self.corpus.target)  # what it lacks is said before any work is done
        self.vocabulary = runs.load(first.directory).vocabulary
        self.course = Course(**first.config["course"])
        rates = contest.budget.grid or [self.course.top * factor for factor in (0.5, 1.0, 2.0)]
        self.grid = tuple(sorted(rates))
        self._teachers: dict[str, TokenTeacher] = {}
        taught = {f"taught by {name}": run.teacher for name, run in dynamic.items()}
        for name, teacher in {**as_arms(static), **taught}.items():
            assert isinstance(teacher, TokenTeacher)
            self._teachers[name] = teacher.fixed()
        known = LOSSES if self.budget.only is None else {name: LOSSES[name] for name in self.budget.only}
        losses = {**known, **{name: teacher.loss for name, teacher in self._teachers.items()}}
        self.taught = {name: losses[name] for name in taught}
        self.others: dict[str, TokenLoss] = {name: losses[name] for name in losses if name not in taught}
        self.arms = {**self.others, **self.taught}

    def missing(self) -> list[str]:
        """The arms that are not done."""
        return [name for name in self.arms if "bleu" not in self._kept(name)]

    def forget(self) -> None:
        """Make all arms missing."""
        for name in self.arms:
            self._file(name).unlink(missing_ok=True)
            shutil.rmtree(self._work(name), ignore_errors=True)

    def run(self, name: str, say: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
        """Make what is missing of an arm; ``say`` is told before each stage what it is.

        Returns:
            JSON-able: ``tuning``, and of each student ``said`` (its translations of the test set), ``bleu``,
            ``chrf``, ``perplexity`` and ``cpu_seconds`` of its course.
        """
        row = self._kept(name)
        if "tuning" not in row:
            row["tuning"] = self._tune(name, say)
            self._keep(name, row)
        if "bleu" not in row:
            made = self._finals(name, row, say)
            with threads(self.course.threads):
                row |= self._read_test(made)
            self._keep(name, row)
            shutil.rmtree(self._work(name))
        return row

    def _tune(self, name: str, say: Callable[[str], None]) -> dict[str, Any]:
        """The learning rate with the highest BLEU on dev."""

        def levels_of(rates: Sequence[float]) -> dict[float, float]:
            return {rate: -self._dev_bleu(name, rate, say) for rate in rates}

        return self._tuning(name, grown(self.grid, levels_of))

    def _tuning(self, name: str, levels: Mapping[float, float]) -> dict[str, Any]:
        """What is chosen at these levels, which are BLEU on dev less than 0, or infinity."""
        check.a_rate_trains(name, sorted(levels), [level < math.inf for level in levels.values()])
        tuning = tuned(levels, self.grid)
        found = [levels[rate] for rate in tuning["grid"]]
        return {**tuning, "dev_bleu": [-level if level < math.inf else None for level in found]}

    def _dev_bleu(self, name: str, rate: float, say: Callable[[str], None]) -> float:
        """Mean BLEU on dev of the tuning students of a rate, minus infinity where one diverges."""
        say(f"tuning {name}, {rate:g}")
        values = []
        try:
            for index in range(self.tuning_students):
                made = self._train(name, rate, seed_of(self.budget.seed, 1, index))
                with threads(self.course.threads):
                    said = made.translate([source for source, _ in self.corpus.dev])
                wanted = [target for _, target in self.corpus.dev]
                values.append(scores.bleu(said, wanted, self.corpus.target).value)
        except check.DivergedError:
            return -math.inf
        return statistics.fmean(values)

    def _finals(self, name: str, row: dict[str, Any], say: Callable[[str], None]) -> list[Trained]:
        """The students that the test set is read with; where one diverges, its rate is out of the running."""
        while True:
            tuning = row["tuning"]
            say(f"final {name}")
            seeds = [seed_of(self.budget.seed, 2, index) for index in range(self.budget.students)]
            try:
                return [self._train(name, tuning["lr"], seed) for seed in seeds]
            except check.DivergedError:
                known = zip(tuning["grid"], tuning["dev_bleu"], strict=True)
                levels = {rate: math.inf if bleu is None else -bleu for rate, bleu in known}
                row["tuning"] = self._tuning(name, {**levels, tuning["lr"]: math.inf})
                self._keep(name, row)

    def _train(self, name: str, rate: float, seed: int) -> Trained:
        course = Course(**{**self.course.to_json(), "lr": rate, "seed": seed})
        where = self._work(name) / f"{rate:g}-{seed}"
        return train(
            self.corpus, self.vocabulary, course, self.arms[name], name=name, directory=where, resume=True,
            progress=False,
        )  # fmt: skip

    def _read_test(self, made: Sequence[Trained]) -> dict[str, Any]:
        """The one look at the test set."""
        sources, wanted = ([pair[side] for pair in self.corpus.test] for side in (0, 1))
        encoded = self.vocabulary.encode_pairs(self.corpus.test)
        said = [one.translate(sources) for one in made]
        return {
            "said": said,
            "bleu": [scores.bleu(texts, wanted, self.corpus.target).value for texts in said],
            "chrf": [scores.chrf(texts, wanted).value for texts in said],
            "perplexity": [scores.fit(one.student, encoded).perplexity for one in made],
            "cpu_seconds": [one.history[-1]["cpu_seconds"] for one in made],
        }

    def _identity(self, name: str) -> dict[str, Any]:
        """What an arm is made of."""
        teacher, digest = self._teachers.get(name), hashlib.sha256()
        for key, value in sorted(teacher.state_dict().items()) if teacher else ():
            digest.update(key.encode() + value.numpy().tobytes())
        about = {
            "arm": name,
            "teacher": {**teacher.config(), "weights": digest.hexdigest()} if teacher else None,
            "vocabulary": hashlib.sha256(self.vocabulary.model).hexdigest(),
            "files": self.config["data"]["files"],
            "course": {**self.course.to_json(), "lr": None, "seed": None},
            "grid": self.grid,
            "extensions": EXTENSIONS,
            "students": self.budget.students,
            "tuning_students": self.tuning_students,
            "seed": self.budget.seed,
        }
        return json.loads(json.dumps(about))  # type: ignore[no-any-return]

    def _work(self, name: str) -> Path:
        """Where the courses of an arm are; its file is beside it."""
        digest = hashlib.sha256(to_json(self._identity(name)).encode()).hexdigest()
        return self.folder / "arms" / arm_stem(name, digest)

    def _file(self, name: str) -> Path:
        work = self._work(name)
        return work.with_name(f"{work.name}.json")

    def _kept(self, name: str) -> dict[str, Any]:
        """What there is of an arm, made of the same things."""
        file = self._file(name)
        row: dict[str, Any] = {}
        if file.is_file():
            with contextlib.suppress(ValueError):  # an arm whose file is not whole is made again
                row = read_json(file)
        identity = self._identity(name)
        return row if row.get("identity") == identity else {"identity": identity}

    def _keep(self, name: str, row: Mapping[str, Any]) -> None:
        write_json(self._file(name), row)

    def result(self) -> dict[str, Any]:
        """The comparison of arms that are done: JSON-able, as ``comparison.json`` has it.

        ``arms`` has for each its ``bleu``, ``chrf`` and ``perplexity`` on test, one a student, and
        ``tuning`` (lr, grid, added, at_edge, and dev_bleu by rate, None where a student diverged); ``tests``
        has for each taught loss and other arm the paired t-test of BLEU over students: ``difference``,
        ``interval``, ``p`` and ``p_corrected``; ``bootstrap`` for each taught loss one test against
        ``best_baseline`` a student; ``teaching`` what a teacher has cost.
        """
        made = {name: self._kept(name) for name in self.arms}
        mean = {name: statistics.fmean(row["bleu"]) for name, row in made.items()}
        best = max(self.others, key=lambda name: mean[name])
        tests: dict[str, dict[str, Any]] = {name: {} for name in self.taught}
        for name, own in tests.items():
            for arm in self.others:
                p, interval = paired(made[name]["bleu"], made[arm]["bleu"])
                own[arm] = {"difference": mean[name] - mean[arm], "interval": list(interval), "p": p}
        every = [test for own in tests.values() for test in own.values()]
        for test, p in zip(every, holm([test["p"] for test in every]), strict=True):
            test["p_corrected"] = p
        wanted = [target for _, target in self.corpus.test]
        bootstrap: dict[str, list[dict[str, float]]] = {name: [] for name in self.taught}
        for index in range(self.budget.students):
            systems = {name: made[name]["said"][index] for name in self.taught}
            found = scores.paired_bootstrap(
                made[best]["said"][index], systems, wanted, target=self.corpus.target
            )
            for name, row in found.items():
                bootstrap[name].append({"difference": row.difference, "p": row.p})
        teaching = {}
        for name, run in zip(self.taught, self.dynamic.values(), strict=True):
            seconds = runs.seconds_of(run.history)
            student = statistics.fmean(made[name]["cpu_seconds"])
            teaching[name] = {"seconds": seconds, "student_runs": seconds / student}
        columns = ("bleu", "chrf", "perplexity", "cpu_seconds", "tuning")
        return {
            "task": runs.TASK,
            "arms": {name: {key: row[key] for key in columns} for name, row in made.items()},
            "taught": list(self.taught),
            "best_baseline": best,
            "tests": tests,
            "bootstrap": bootstrap,
            "teaching": teaching,
            "signatures": {
                "BLEU": scores.bleu(wanted, wanted, self.corpus.target).signature,
                "chrF": scores.chrf(wanted, wanted).signature,
            },
            "protocol": self._protocol(len(every)),
            "course": self.course.to_json(),
            "data": self.config["data"],
            "students": self.budget.students,
            "tuning_students": self.tuning_students,
            "seed": self.budget.seed,
        }

    def _protocol(self, comparisons: int) -> list[str]:
        """What is done, in sentences."""
        course, students, tuning = self.course, self.budget.students, self.tuning_students
        others = f"{tuning} other student{'' if tuning == 1 else 's'}"
        grid = ", ".join(f"{rate:g}" for rate in self.grid)
        return [
            f"Every arm trains the same {students} fresh students ({course.student}), paired over the arms "
            f"by their seed: same start weights, batches and dropout (seed {self.budget.seed}).",
            f"A student takes {course.steps} steps of up to {course.tokens} padded tokens a side by Adam, "
            f"with {rising(course.steps, course.warmup)} steps of warm-up and a rate that falls to 0.",
            f"Each arm's learning rate is the one of {grid} with the highest BLEU on the "
            f"{len(self.corpus.dev):,} dev pairs (greedy), of {others} a "
            f"rate; the grid is the same for every arm. {GROWS} A rate at which a student diverges is out "
            "of the running.",
            f"The test set, {len(self.corpus.test):,} pairs, is read once an arm, when its students are "
            "done; translations are greedy. Perplexity is that of pieces.",
            "p is that of a two-sided paired t-test of test BLEU over the students, corrected by Holm's "
            f"method for all {comparisons} comparisons; an interval is the 95 % interval of the mean "
            f"difference, not corrected. A win or a loss has a corrected p below {ALPHA:g}.",
            "The bootstrap is sacrebleu's paired one over the sentences of the test set, student by student, "
            "against the arm that is not of a dynamic teacher and has the highest mean BLEU on test: the "
            "hardest choice for the teachers.",
            "The cost of teaching is its wall-clock time, in runs of a student by their CPU time.",
        ]


def write(contest: TokenContest, comparison: TokenComparison) -> dict[str, Any]:
    """Write ``comparison.json``; returns it."""
    found = comparison.result()
    write_json(contest.folder / "comparison.json", found)
    return found


def table(title: str, found: Mapping[str, Any]) -> list[str]:
    """The lines that `l2t compare` prints: arms by rows, each teacher's difference, p, verdict."""
    arms, tests = found["arms"], found["tests"]

    def cells(row: Mapping[str, Any]) -> str:
        bleu = row["bleu"]
        return (
            f"{statistics.fmean(bleu):6.2f} ± {statistics.stdev(bleu):4.2f}  "
            f"{statistics.fmean(row['chrf']):6.2f}  {mean_perplexity(row):10.2f}  "
            f"{rate_cell(row['tuning']):>9}"
        )

    def against(test: Mapping[str, Any]) -> Against:
        difference, p = test["difference"], test["p_corrected"]
        return Against(difference, p, called(difference, p))

    return table_of(
        f"{title}: test BLEU, mean ± sd of {found['students']} fresh students an arm",
        f"{'BLEU':>13}  {'chrF':>6}  {'perplexity':>10}  {'rate':>8} ",
        {name: cells(arms[name]) for name in in_order(found)},
        {name: {arm: against(test) for arm, test in own.items()} for name, own in tests.items()},
        sum(len(own) for own in tests.values()),
        notes(found),
    )


def notes(found: Mapping[str, Any]) -> list[str]:
    """What is to be said beside the table: bootstrap, cost of teaching, rates that are out, signatures."""
    arms = found["arms"]
    said = []
    for name, rows in found["bootstrap"].items():
        ahead, behind = told_apart(rows)
        said.append(
            f"{name} against {found['best_baseline']}, paired bootstrap over test sentences, p < 0.05: ahead "
            f"in {ahead} and behind in {behind} of {len(rows)}; taught for the price of "
            f"{found['teaching'][name]['student_runs']:.1f} student runs"
        )
    out = [f"{name} at {rate:g}" for name, row in arms.items() for rate in diverged(row["tuning"])]
    if out:
        said.append(f"diverged, and out of the running: {', '.join(out)}")
    said += [f"{name}: {signature}" for name, signature in found["signatures"].items()]
    return said


def in_order(found: Mapping[str, Any]) -> list[str]:
    """The arms of a comparison, the teachers first, then the others from the highest BLEU on."""
    mean = {name: statistics.fmean(arm["bleu"]) for name, arm in found["arms"].items()}
    return [
        *found["tests"],
        *sorted(mean.keys() - found["tests"].keys(), key=lambda name: (-mean[name], name)),
    ]


def told_apart(rows: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """In how many of these bootstraps a loss is ahead and behind, at p < 0.05."""
    sure = [row["difference"] for row in rows if row["p"] < 0.05]
    return sum(difference > 0 for difference in sure), sum(difference < 0 for difference in sure)


def mean_perplexity(arm: Mapping[str, Any]) -> float:
    """The mean over an arm's students; infinity is null in a file."""
    return statistics.fmean(math.inf if value is None else value for value in arm["perplexity"])


def diverged(tuning: Mapping[str, Any]) -> list[float]:
    """The learning rates that are out of the running."""
    return [rate for rate, bleu in zip(tuning["grid"], tuning["dev_bleu"], strict=True) if bleu is None]
