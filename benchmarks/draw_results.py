"""Draws docs/results.md from the rows in benchmarks/results/, and from nothing else.

    benchmarks/results/*.json      rows of benchmarks/teaching.py, a file a setting or transfer
    benchmarks/results/studies     rows of benchmarks/studies.py, a file a study
    benchmarks/results/other.md    what other benchmarks measured, with their commands: carried over as it is

Run: python benchmarks/draw_results.py [--results benchmarks/results] [--page docs/results.md]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scipy import stats

from l2t.compare import ALPHA, called, holm
from l2t.files import write_whole
from l2t.report import static_arms
from l2t.translation.contest import in_order, mean_perplexity, notes
from l2t.translation.course import LOSSES
from l2t.translation.report import by_of
from l2t.translation.runs import seconds_of

ROOT = Path(__file__).resolve().parents[1]
Row = Mapping[str, Any]

HEAD = f"""\
# What taught and what did not

Drawn by `make results` from the rows in benchmarks/results, which hold every student's test error. Beside
each table stands the command that makes its row again; it goes on where it was broken off.

Test error is in percent, mean ± standard deviation over fresh students; in brackets is the 95 % confidence
interval of a mean. A difference is taught less other. *win* and **loss** mean that a paired t-test over the
students has p < {ALPHA:g} after Holm's correction for all comparisons of the setting's table; *even* is
everything else. The best baseline is the one that turned out best on test, oracles and taught losses left
out: it is chosen in hindsight, against the taught loss. So is the best static teacher. \\* marks a rate at an
end of its grid. Where no taught loss was ahead on dev, the result is a known loss, and the table says so."""

PARTS = (
    ("teaching", "teaching"),
    ("updates", "the teachers' updates (probe and trials not counted)"),  # in rows of earlier revisions
    ("comparison", "the comparison"),
)

SUMMARY = (
    "setting",
    "best tuned baseline",
    "its error",
    "taught, by teacher",
    "less baseline",
    "largest p",
    "result",
    "best static",
    "less static",
    "result",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    write_whole(options.page, page(options.results))


def page(results: Path) -> str:
    """The page about all rows in the folder."""
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    translators = [row for row in rows if row["task"] == "translation"]
    transfers = [row for row in rows if "source" in row]
    settings = [row for row in rows if row not in translators and row not in transfers]
    parts = [HEAD, "## Summary", outcome(settings), summary(settings), *kinds(settings)]
    for row in settings:
        parts += [f"## {row['name']}", *section(row)]
    if transfers:
        parts += ["## Transfer", TRANSFER, outcome(transfers), summary(transfers)]
        for row in transfers:
            parts += [f"### {row['name']}", f"Teachers of `{row['source']}`.", *section(row)]
    if translators:
        parts += ["## Translation", TRANSLATION, translators_summary(translators)]
        for row in translators:
            parts += [f"### {row['name']}", *translator(row)]
    looked = results / "translation" / "horizon.json"
    if looked.is_file():
        parts += ["## How far ahead a window must look", *horizon(json.loads(looked.read_text()))]
    for made in sorted((results / "teachers").glob("*/made.json")):
        kept = made.parent
        if not (results / f"{kept.name}.json").is_file():
            parts += [f"## {kept.name}: taught, not yet compared", *taught_alone(kept)]
    for path in sorted((results / "studies").glob("*.json")):
        parts += study(path.stem, json.loads(path.read_text()))
    other = results / "other.md"
    if other.is_file():
        parts.append(other.read_text().strip())
    return "\n\n".join(parts) + "\n"


TRANSFER = """\
Frozen teachers of one setting hand their loss to students of another; each arm's rate is tuned as ever."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(errors: Iterable[float]) -> str:
    errors = [100 * error for error in errors]
    return f"{statistics.fmean(errors):.2f} ± {statistics.stdev(errors):.2f}"


def mean_interval(errors: Iterable[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean."""
    errors = list(errors)
    reach = stats.t.ppf(0.975, len(errors) - 1) * statistics.stdev(errors) / len(errors) ** 0.5
    return statistics.fmean(errors) - reach, statistics.fmean(errors) + reach


def between(interval: Iterable[float], sign: str = "") -> str:
    low, high = interval
    return f"[{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def p_value(p: float | None) -> str:
    return "–" if p is None else re.sub(r"e([+-])0", r"e\1", f"{p:.0e}") if p < 0.001 else f"{p:.2g}"


MARKED = {"win": "*win*", "loss": "**loss**", "even": "even"}


def result(against: Row) -> str:
    """*win*, **loss** or even, of the errors of one teacher against one arm."""
    return MARKED[called(-against["difference"], against["p_corrected"])]


def best(row: Row, arms: Iterable[str]) -> str | None:
    """The arm of least mean test error among some."""
    means = {arm: statistics.fmean(row["arms"][arm]["test_error"]) for arm in arms}
    return min(means, key=means.__getitem__) if means else None


def best_baseline(row: Row) -> str:
    """Of what knows no more than the taught loss and is not one itself; a weight net is among them."""
    out = {*row["oracles"], *static_arms(row["also"])}
    found = best(row, (arm for arm in row["arms"] if arm not in out))  # the first where several are as good
    assert found is not None
    return found


def results(row: Row, arm: str) -> list[str]:
    """The result of each teacher against an arm."""
    return [result(teacher["against"][arm]) for teacher in row["teachers"].values()]


def counted(words: list[str]) -> str:
    """Several teachers' results in short: all, or how many of each."""
    if len(set(words)) == 1:
        return words[0]
    return ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words), key=words.index))


def outcome(rows: list[Row]) -> str:
    """In a sentence or two, how many settings went which way."""
    if not rows:
        return "There are no rows yet."
    against = [results(row, best_baseline(row)) for row in rows]
    every = sum(set(words) == {"*win*"} for words in against)
    some = sum("**loss**" in words for words in against)
    comparisons = sum(row["comparisons"] for row in rows)
    said = (
        f"{len(rows)} settings with {sum(len(words) for words in against)} teachers and {comparisons} "
        f"comparisons. Against the best tuned baseline every teacher wins in {every}, and some teacher loses "
        f"in {some}."
    )
    known = [any(one["chosen"] == "neutral" for one in row["teachers"].values()) for row in rows]
    won = sum(fell and set(words) == {"*win*"} for fell, words in zip(known, against, strict=True))
    lost = sum(fell and "**loss**" in words for fell, words in zip(known, against, strict=True))
    if won or lost:
        said += (
            f" Of the former {won} and of the latter {lost} have a teacher that fell back to a known loss, "
            "and are no merit or fault of teaching alone."
        )
    static = [(row, best(row, static_arms(row["also"]))) for row in rows if static_arms(row["also"])]
    if static:
        ahead = sum(set(results(row, arm)) == {"*win*"} for row, arm in static if arm)
        behind = sum("**loss**" in results(row, arm) for row, arm in static if arm)
        said += (
            f" Against the best static teacher, of {len(static)} settings that have one, every dynamic "
            f"teacher wins in {ahead}, and some loses in {behind}."
        )
    return said


def summary(rows: list[Row]) -> str:
    return table(SUMMARY, [summary_line(row) for row in rows])


def summary_line(row: Row) -> list[str]:
    teachers = row["teachers"].values()
    errors = " / ".join(f"{100 * statistics.fmean(one['test_error']):.2f}" for one in teachers)

    def versus(arm: str) -> list[str]:
        differences = " / ".join(points(one["against"][arm]["difference"]) for one in teachers)
        return [differences, counted(results(row, arm))]

    arm, static = best_baseline(row), best(row, static_arms(row["also"]))
    difference, word = versus(arm)
    ps = [one["against"][arm]["p_corrected"] for one in teachers]
    largest = "–" if None in ps else p_value(max(ps))
    line = [f"[{row['name']}](#{row['name']})", arm, percent(row["arms"][arm]["test_error"]), errors]
    line += [difference, largest, word]
    return (
        [*line, percent(row["arms"][static]["test_error"]), *versus(static)] if static else [*line, *[""] * 3]
    )


KINDS = """\
**Dynamic and static teachers as kinds.** Each student trains under every dynamic and every static teacher of
its setting; what the static ones make of it is taken, on average, from what the dynamic ones do. p is that of
the paired t-test over the students, after Holm's correction for the settings of this table. It speaks of
these teachers, not of others that other seeds would give: how far those of a kind lie apart is beside it."""


def kinds(rows: list[Row]) -> list[str]:
    """The mean of the dynamic teachers against that of the static ones, a line a setting."""
    found = []
    for row in rows:
        dynamic = [teacher["test_error"] for teacher in row["teachers"].values()]
        static = [row["arms"][arm]["test_error"] for arm in static_arms(row["also"])]
        if static:
            each = [
                [statistics.fmean(errors) for errors in zip(*kind, strict=True)] for kind in (dynamic, static)
            ]
            found.append((row["name"], dynamic, static, [a - b for a, b in zip(*each, strict=True)]))
    if not found:
        return []
    # Teachers that all fell back to the same known loss differ in nothing, and in nothing to test.
    ps = holm([float(stats.ttest_1samp(less, 0.0).pvalue) if any(less) else None for *_, less in found])
    lines = []
    for (name, dynamic, static, less), p in zip(found, ps, strict=True):
        means = [
            " / ".join(f"{100 * statistics.fmean(one):.2f}" for one in kind) for kind in (dynamic, static)
        ]
        mean = statistics.fmean(less)
        word = result({"p_corrected": p, "difference": mean})
        lines.append([name, *means, f"{points(mean)} {between(mean_interval(less), '+')}", p_value(p), word])
    head = ["setting", "dynamic, by teacher", "static, by teacher", "dynamic less static", "p", "result"]
    return [KINDS, table(head, lines)]


def section(row: Row) -> list[str]:
    """Of one setting: what it is, its command, its table and its protocol."""
    rates = {arm: rate(of) for arm, of in row["arms"].items()}
    lines = []
    for name, teacher in row["teachers"].items():
        mean = f"**{percent(teacher['test_error'])}** {between(mean_interval(teacher['test_error']))}"
        same = " (a known loss)" if teacher["chosen"] == "neutral" else ""
        lines.append([f"**taught**, {name}{same}", mean, rate(teacher), *[""] * len(row["teachers"])])
    for arm in sorted(row["arms"], key=lambda arm: statistics.fmean(row["arms"][arm]["test_error"])):
        errors = row["arms"][arm]["test_error"]
        cells = []
        for teacher in row["teachers"].values():
            against = teacher["against"][arm]
            cells.append(
                f"{points(against['difference'])} {between(against['interval'], '+')}, "
                f"p {p_value(against['p_corrected'])}, {result(against)}"
            )
        lines.append([arm, f"{percent(errors)} {between(mean_interval(errors))}", rates[arm], *cells])
    head = ["loss", "test error, %", "rate", *(f"{name} less this" for name in row["teachers"])]
    minutes = row["minutes"]
    about = (
        f"`{row['command']}` (task {row['task']}, regime {row['regime']}, student {row['student']}; "
        f"{row['students']} students an arm). Minutes of one core: "
        + ", ".join(f"{minutes[part]:.1f} for {words}" for part, words in PARTS if part in minutes)
        + f"; {made_by(row)}"
    )
    return [about, block(row), table(head, lines), bullets(row["protocol"])]


def made_by(row: Row) -> str:
    """The end of what is said of a row: its commit and versions, and that its commands follow."""
    return f"commit {row['commit']}, {versions_of(row)}. The same as commands:"


def versions_of(made: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in made["versions"].items())


def block(row: Row) -> str:
    return "\n".join(["```", *row["commands"], "```"])


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {sentence}" for sentence in sentences)


TRANSLATION = """\
Translators under taught losses, by BLEU on test: mean ± standard deviation over fresh students, higher is
better. A difference is taught less other, with the 95 % interval of its mean; *win* and **loss** as above."""


def translators_summary(rows: list[Row]) -> str:
    """A line a translator: the best tuned baseline and static teacher, each dynamic one against them."""
    head = ["translator", "best tuned baseline", "its BLEU", "taught, by teacher", "less baseline", "result"]
    lines = []
    for row in rows:
        order = in_order(row)
        baseline = next(arm for arm in order if arm in LOSSES)
        line = [f"[{row['name']}](#{row['name']})", baseline, bleu(row, baseline)]
        line.append(" / ".join(f"{statistics.fmean(row['arms'][arm]['bleu']):.2f}" for arm in row["tests"]))
        line += versus(row, baseline)
        static = next((arm for arm in order if arm not in LOSSES and arm not in row["tests"]), None)
        lines.append([*line, bleu(row, static), *versus(row, static)] if static else [*line, "", "", ""])
    return table([*head, "best static", "less static", "result"], lines)


def bleu(row: Row, arm: str, score: str = "bleu") -> str:
    values = row["arms"][arm][score]
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def versus(row: Row, arm: str) -> list[str]:
    """What each teacher has more of BLEU than an arm, and what that is called."""
    tests = [own[arm] for own in row["tests"].values()]
    words = [MARKED[called(test["difference"], test["p_corrected"])] for test in tests]
    return [" / ".join(f"{test['difference']:+.2f}" for test in tests), counted(words)]


def translator(row: Row) -> list[str]:
    """Of one translator: its command, its table, the bootstrap over sentences and the protocol."""
    arms, tests = row["arms"], row["tests"]
    lines = []
    for arm in in_order(row):
        cells = []
        for own in tests.values():
            test = own.get(arm)
            cells.append("" if test is None else (
                f"{test['difference']:+.2f} [{test['interval'][0]:+.2f}, {test['interval'][1]:+.2f}], "
                f"p {p_value(test['p_corrected'])}, {MARKED[called(test['difference'], test['p_corrected'])]}"
            ))  # fmt: skip
        name = f"**{arm}**" if arm in tests else arm
        perplexity = f"{mean_perplexity(arms[arm]):.2f}"
        lines.append(
            [name, bleu(row, arm), bleu(row, arm, "chrf"), perplexity, rate(arms[arm]["tuning"]), *cells]
        )
    head = ["loss", "BLEU", "chrF", "perplexity", "rate", *(f"{name} less this" for name in tests)]
    minutes, data = row["minutes"], row["data"]
    about = (
        f"`{row['command']}` ({data['source']} to {data['target']}, {data['origin']}: "
        + " / ".join(f"{data['counts'][split]:,}" for split in ("train", "dev", "test"))
        + f" pairs, {data['pieces']:,} pieces; student {row['student']}, {row['students']} an arm). Minutes "
        f"of one core: {minutes['teaching']:.1f} for teaching, {minutes['student']:.1f} for each of the "
        f"{row['courses']} students of the comparison; {made_by(row)}"
    )
    said = list(row["protocol"])
    for name, teacher in row["teachers"].items():
        if teacher["chosen"] == "neutral":
            said.append(f"What was taught in {name} did not end lower on dev, so it says what it started as.")
        elif teacher["chosen"] != "taught":
            said.append(
                f"What was taught in {name} did not end lower on dev than {teacher['chosen']}, which it is."
            )
    made, kept = row["taught_at"], f"benchmarks/results/teachers/{row['name']}"
    said.append(
        f"The teachers were taught at commit {made['commit']} ({versions_of(made)}) and are kept in {kept}: "
        "with `--taught` the command makes the comparison of these alone."
    )
    said += notes(row)
    return [about, block(row), table(head, lines), bullets(said)]


def horizon(content: Row) -> list[str]:
    """Whole runs by strength of smoothing, and what windows say of it."""

    def of(rows: Iterable[Row], key: str, digits: int) -> str:
        return " / ".join(f"{row[key]:.{digits}f}" for row in rows)

    by_job: dict[tuple[str, Any], list[Row]] = {}
    for row in sorted(content["rows"], key=lambda row: row["seed"]):
        about = row["about"] if isinstance(row["about"], str) else tuple(row["about"])
        by_job.setdefault((row["part"], about), []).append(row)
    runs = {about: rows for (part, about), rows in by_job.items() if part == "runs"}
    windows = {about: rows for (part, about), rows in by_job.items() if part == "windows"}
    commits = ", ".join(dict.fromkeys(row["commit"] for row in content["rows"]))
    course = content["course"]
    about = (
        f"`{content['command']}` (commit {commits}, {versions_of(content)}): whole runs of "
        f"{course['steps']} steps at a rate of {course['lr']:g} under label smoothing whose strength moves "
        "from one number to another along a line, by what they come to on dev; one number a seed."
    )
    head = ["strength at the start", "at the end", "BLEU", "sharp error", "calibrated cross-entropy"]
    lines = [
        (f"{start:g}", f"{end:g}", of(rows, "bleu", 2), of(rows, "sharp-error", 4),
         of(rows, "calibrated-cross-entropy", 3))
        for (start, end), rows in runs.items()
    ]  # fmt: skip
    found = [about, table(head, lines)]
    if not windows:  # of a study that goes on
        return found
    first = next(iter(windows.values()))
    places = [
        round(statistics.fmean(row["steps"][i] for row in first)) for i in range(len(first[0]["steps"]))
    ]
    of_windows = (
        f"Windows that begin along such runs under a strength of {content['under']:g}: the slope of a "
        "measure to the strength's logit, in thousandths, one a seed, by the measure, the steps of a window, "
        "and the step at which it begins, the mean over seeds. Below 0 a measure asks for more smoothing."
    )
    slopes = [
        (measure, steps, *(" / ".join(f"{1000 * row['slopes'][steps][i]:+.1f}" for row in rows)
                           for i in range(len(places))))
        for measure, rows in windows.items() for steps in rows[0]["slopes"]
    ]  # fmt: skip
    return [*found, of_windows, table(["measure", "steps", *map(str, places)], slopes)]


def taught_alone(kept: Path) -> list[str]:
    """Of teachers whose comparison has not run: what ended each teaching, which is no test."""
    made = json.loads((kept / "made.json").read_text())
    lines, losses, judged = [], {}, set[str]()
    for file in sorted(kept.glob("*/history.json")):
        history = json.loads(file.read_text())
        trial, hours = history["trial"], seconds_of(history) / 3600
        if trial is None:  # taught without a guard
            continue
        levels = {
            loss: statistics.fmean(math.inf if x is None else x for x in runs)
            for loss, runs in trial["measure"].items()
        }
        losses |= dict.fromkeys(levels)
        lines.append((file.parent.name, trial["chosen"], f"{hours:.1f}", levels))
        judged |= {by_of(trial)}
    static = any(kept.glob("static-*"))
    missing = "" if static else ", once a static teacher is there, too"
    about = (
        f"What `python benchmarks/teaching.py {kept.name} --taught` begins with{missing} "
        f"(commit {made['commit']}, {versions_of(made)})."
    )
    if not lines:
        return [about]
    about += (
        " At the end of a teaching the same student is "
        f"trained for a whole run by each loss, at one rate, and the least {' or '.join(sorted(judged))} on "
        "dev is taken: a first look, on rows that the teacher has learned from. *neutral* is what it started "
        "as, *average* and *good* are its last teachers and its best ones."
    )
    rows = [
        [name, chosen, hours, *(f"{levels[loss]:.3f}" if loss in levels else "" for loss in losses)]
        for name, chosen, hours, levels in lines
    ]
    return [about, table(["teacher", "taken", "hours of a core", *losses], rows)]


def rate(of: Row) -> str:
    return f"{of['lr']:g}" + ("\\*" if of["at_edge"] else "")


OF_STUDIES = {
    "edge": (
        "The default is a smaller rate while teaching: three quarters of the largest at which a probe finds "
        "gradients that are small and agree (`probe_margin`), and every arm's rate is tuned anew afterwards."
    ),
    "gradients": "The default is the exact gradient through the whole run.",
    "few-dev": (
        "The default is W full, starting as the label smoothing that trains best, beside two numbers for all "
        "classes where labels are noisy; rows that neither has seen choose between them (`l2t.teach_best`)."
    ),
    "teachers": (
        "The default is four slots, W full up to 20 classes and of rank 4 above; it sees progress, training "
        "loss and accuracy."
    ),
}
"""What is the default of what a study compares."""


def study(name: str, content: Row) -> list[str]:
    """The options of a study, a row each: what teaching saw, and its students by teacher seed."""
    found = []
    for option, words in content["words"].items():
        rows = sorted(
            (row for row in content["rows"] if row["option"] == option), key=lambda row: row["seed"]
        )
        if not rows:
            continue
        less = [statistics.fmean(row["test_error"]) - statistics.fmean(row["cross_entropy"]) for row in rows]
        each = " / ".join(f"{points(x)} (p {p_value(row['p'])})" for x, row in zip(less, rows, strict=True))
        norm, agreement = (statistics.median(row[key] for row in rows) for key in ("norm", "agreement"))
        mean = statistics.fmean(less)
        found.append((mean, [words, f"{norm:.2g}", f"{agreement:.2f}", each, points(mean)]))
    about = (
        f"{content['about']} `{content['command']}` (commit {content['commit']}): norm is the median of the "
        f"run, agreement the mean of its first ten updates; {len(content['rows'][0]['test_error'])} fresh "
        f"students an arm, each arm at its own best rate; p of the paired t-test, not corrected."
    )
    head = ["option", "norm", "agreement", "test error less cross-entropy's, by teacher", "mean"]
    return [f"## Study: {name}", about, table(head, [line for _, line in sorted(found)]), OF_STUDIES[name]]


if __name__ == "__main__":
    main()
