"""`l2t report`: one self-contained HTML page about a taught teacher, or about several side by side.

`find_runs` looks for runs, `write` reads what `l2t teach` and `l2t compare` left in them and writes
``report.html`` beside it: result, learned loss, course of the teaching, settings. The page asks for nothing
over the network. `write_run` makes such a page about a single run of `l2t.unroll`: its cost and its plan.

What differs between pages about students that classify and about translators is a `Kind`: that of the former
is here, that of the latter in translation/report.py.

Not here: how a figure is drawn (figures.py); what is in the files (teach.py, compare.py).
"""

from __future__ import annotations

import html
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2t import check, figures, weight_net
from l2t.compare import ALPHA, called
from l2t.files import read_json, write_whole
from l2t.record import Report
from l2t.teacher import AnyTeacher, AttentiveTeacher, StudentState, Teacher
from l2t.translation.token_teacher import TokenTeacher

STAGES = 5
MANY = 50  # values of a setting that are not written out


class Run(NamedTuple):
    """A taught teacher and what its folder says of it."""

    name: str
    directory: Path
    teacher: AnyTeacher
    history: dict[str, Any]
    config: dict[str, Any]  # of `l2t teach`; empty for a run of l2t.teach
    comparison: dict[str, Any] | None

    @property
    def is_static(self) -> bool:
        """Whether the teacher has one loss for every stage."""
        return not isinstance(self.teacher, AttentiveTeacher) or self.teacher.slots == 1

    @property
    def states(self) -> list[StudentState]:
        """The states of a student along its training, mean over those of the last episode; none of steps at
        which no student was finite.
        """
        columns = self.history["states"]
        return [
            StudentState(**dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
            if None not in row
        ]


Picture = tuple[str, str]
"""An SVG element, and the caption below it."""


class Kind(NamedTuple):
    """What is said and drawn of runs of one kind of students.

    Attributes:
        headline: of some runs, the result in a sentence or two, as HTML.
        results: of some runs, the sections that come first.
        loss: of a run, sentences and pictures of the learned loss; None where there is nothing to show.
        said: of a history, sentences about the teaching.
        drawn: of a run, more pictures of its teaching.
        error: what the dev error is.
    """

    headline: Callable[[Sequence[Run]], str]
    results: Callable[[Sequence[Run]], list[str]]
    loss: Callable[[Run], tuple[list[str], list[Picture]] | None]
    said: Callable[[Mapping[str, Any]], list[str]]
    drawn: Callable[[Run], list[Picture]]
    error: str


def kind_of(runs: Sequence[Run]) -> Kind:
    """The kind that all runs are of.

    Raises:
        ValueError: some are of translators and some are not, or one is of an earlier version.
    """
    translators = [isinstance(run.teacher, TokenTeacher) for run in runs]
    check.report_of_one_kind(any(translators) and not all(translators))
    if not translators[0]:
        for run in runs:
            check.report_of_trial(run.directory, run.history.get("trial"))
        return _OF_CLASSES
    from l2t.translation.report import OF_TRANSLATORS  # which makes its pages of what is here

    return OF_TRANSLATORS


def find_runs(*directories: Path) -> list[Run]:
    """The finished runs in the folders, or one level below them, in the order of their names.

    Raises:
        FileNotFoundError: for a folder that holds none.
        ValueError: for a file of a run that is not whole.
    """
    found: list[Run] = []
    for directory in directories:
        inside = [directory, *sorted(directory.glob("*/"), key=_by_number)]
        runs = [path for path in inside if (path / "teacher.safetensors").is_file()]
        if not runs:
            raise check.no_run(directory)
        found += map(_read, runs)
    return found


def _by_number(path: Path) -> tuple[str, int]:
    stem, _, number = path.name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (path.name, 0)


def _read(directory: Path) -> Run:
    """The run in a folder; a comparison of several translators is in the one above."""

    def content(path: Path) -> dict[str, Any] | None:
        return read_json(path) if path.is_file() else None

    history, teacher = content(directory / "history.json") or {}, Teacher.load(directory)
    comparison = content(directory / "comparison.json")
    if comparison is None and isinstance(teacher, TokenTeacher):
        comparison = content(directory.resolve().parent / "comparison.json")
    return Run(
        name=directory.resolve().name,
        directory=directory,
        teacher=teacher,
        history={
            "updates": [],
            "events": [],
            "probe": [],
            "states": {},
            "adjoint_norms": {},
            "seconds": {},
            **history,
        },
        config=content(directory / "config.json") or {},
        comparison=comparison,
    )


def write(directory: Path, runs: Sequence[Run]) -> Path:
    """Writes ``directory/report.html`` about the runs, whole, and returns its path."""
    path = directory / "report.html"
    write_whole(path, page(runs))
    return path


def page(runs: Sequence[Run]) -> str:
    """The HTML page about the runs.

    Raises:
        ValueError: some are of translators and some are not.
    """
    kind = kind_of(runs)
    parts = [_header(runs, kind), *kind.results(runs), _learned(runs, kind), _teaching(runs, kind)]
    parts.append(_settings(runs))
    title = f"l2t: {_subject(runs[0])}"
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(parts))


def write_run(path: str | os.PathLike[str], report: Report) -> None:
    """Writes a page about a run of :func:`l2t.unroll`: its cost, its plan, and its adjoint by step.

    Example:
        >>> import tempfile, torch, l2t
        >>> from l2t.report import write_run
        >>> student = torch.nn.Linear(1, 1)
        >>> def loss(model, batch, step):
        ...     return model.weight.square().sum()
        >>> run = l2t.unroll(student, range(9), loss, lambda model: model.weight.sum(), schedule="every")
        >>> run.backward()
        >>> write_run(tempfile.mkdtemp() + "/run.html", run.report)
    """
    walked = report.steps if report.truncate is None else min(report.steps, report.truncate)
    peak = report.peak_bytes
    seconds = {
        "the run": report.seconds_forward,
        "steps taken again": report.seconds_again,
        "steps reversed": report.seconds_reverse,
    }
    rows = {
        "steps": str(report.steps),
        "schedule": str(report.schedule),
        "steps taken again": str(report.steps_again),
        "remembered at most": "not counted" if peak is None else f"{peak / 1e6:.3g} MB",
        "states are stored": f"{report.store}, store error {report.store_error}",
        "curvature": f"{report.curvature}, error {report.curvature_error}",
        **{f"seconds for {name}": f"{value:.3g}" for name, value in seconds.items() if value is not None},
    }
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    drawn = [(figures.schedule(report.schedule, walked), "The plan of the steps that were walked back over.")]
    if report.adjoint_norms:
        norms = figures.adjoint({"": report.adjoint_norms})
        drawn.append(
            (norms, "Norm of the derivative of the measure to the weights before each of these steps.")
        )
    body = f'<table class="settings">{cells}</table>' + gallery(drawn)
    write_whole(Path(path), _PAGE.format(title="l2t: a run", style=_STYLE, body=section("A run", body)))


# ---- words ----


def _subject(run: Run) -> str:
    config = run.config
    if "task" not in config:
        return run.name
    return f"{config['task']}, " + (config.get("regime") or "{source} to {target}".format(**config["data"]))


def percent(value: float, digits: int = 2) -> str:
    """A share as a percentage with a sign that breaks no line."""
    return f"{100 * value:.{digits}f}\u202f%"


def p_value(p: float | None) -> str:
    """A p-value in two figures."""
    if p is None:
        return "–"
    if p >= 0.001:
        return f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
    digits, exponent = f"{p:.1e}".split("e")
    return f"{digits}·10<sup>−{-int(exponent)}</sup>" if p > 0 else "0"


def static_arms(also: Iterable[str]) -> list[str]:
    """Of the arms of other teachers those that are taught losses; a weight net is a baseline."""
    return [arm for arm in also if not arm.startswith(weight_net.ARM)]


def best_baseline(comparison: Mapping[str, Any]) -> str | None:
    """The arm of least mean test error that is neither taught nor told what nobody knows, or None."""
    others = {"taught", *static_arms(comparison.get("also", ())), *comparison.get("oracles", ())}
    errors: dict[str, float] = {
        arm: statistics.fmean(values) for arm, values in comparison["test_error"].items() if arm not in others
    }
    return min(errors, key=errors.__getitem__, default=None)


def verdict(comparison: Mapping[str, Any], arm: str) -> str:
    """The taught loss against an arm at a corrected p < 0.01: "win", "loss" or "even"."""
    errors = comparison["test_error"]
    gain = statistics.fmean(errors[arm]) - statistics.fmean(errors["taught"])
    return called(gain, comparison["p_corrected"].get(arm))


def headline(runs: Sequence[Run]) -> str:
    """The result in a sentence or two, whatever it is, as HTML."""
    groups = compared_together(runs)
    if not groups:
        return "A teacher has been taught; <code>l2t compare</code> has not yet compared it with baselines."
    said = []
    for group in groups:
        comparisons = list(group.values())
        first = comparisons[0]
        arm = best_baseline(first)
        errors = [error for comparison in comparisons for error in comparison["test_error"]["taught"]]
        sentence = (
            f"Students under the taught loss make <b>{percent(statistics.fmean(errors))}</b> errors on the "
            "test set"
        )
        if arm is None:
            said.append(f"{sentence}; there is no baseline to compare them with.")
            continue
        sentence += (
            f", against <b>{percent(statistics.fmean(first['test_error'][arm]))}</b> under the best "
            f"tuned baseline, {html.escape(arm)}: {_outcome(comparisons, arm)}."
        )
        plain = "cross-entropy"
        if arm != plain and plain in first["test_error"]:
            error = percent(statistics.fmean(first["test_error"][plain]))
            sentence += f" Under cross-entropy they make {error}: {_outcome(comparisons, plain)}."
        said.append(sentence)
    return "<br>".join(said)


def _outcome(comparisons: Sequence[Mapping[str, Any]], arm: str) -> str:
    """How the taught loss did against an arm."""
    return outcome(
        [verdict(comparison, arm) for comparison in comparisons],
        [comparison["p_corrected"][arm] for comparison in comparisons],
        {"win": "fewer", "even": "no clear difference", "loss": "more"},
        len(comparisons[0]["test_error"]["taught"]),
        comparisons[0]["comparisons"],
    )


def outcome(
    verdicts: Sequence[str],
    ps: Sequence[float | None],
    words: Mapping[str, str],
    students: int,
    comparisons: int,
) -> str:
    """How several teachers did against an arm: "fewer for each of 3 teachers (paired t-test ...)", as HTML.

    Args:
        verdicts: "win", "even" or "loss" of each teacher.
        ps: its corrected p.
        words: what a verdict is called.
        students: that each has.
        comparisons: that p is corrected for.
    """
    known = [p for p in ps if p is not None]
    if len(set(verdicts)) == 1:
        found = words[verdicts[0]] + (f" for each of {len(verdicts)} teachers" if len(verdicts) > 1 else "")
    else:
        counts = [f"{said} for {verdicts.count(word)}" for word, said in words.items() if word in verdicts]
        found = f"{', '.join(counts)} of {len(verdicts)} teachers"
    if not known:
        return found
    if "even" in verdicts:
        bound = f"= {p_value(known[0])}" if len(verdicts) == 1 else f"&lt; {ALPHA} counts"
    else:
        bound = f"≤ {p_value(max(known))}"
    corrected = f"corrected for {comparisons} comparisons"
    return f"{found} (paired <i>t</i>-test over {students} students, <i>p</i> {bound}, {corrected})"


def compared_together(runs: Sequence[Run]) -> list[dict[str, dict[str, Any]]]:
    """The comparisons by run, those that share the students of their baselines together."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run.comparison is not None:
            shared = {arm: errors for arm, errors in run.comparison["test_error"].items() if arm != "taught"}
            groups.setdefault(json.dumps(shared, sort_keys=True), {})[run.name] = run.comparison
    return list(groups.values())


def said_of_the_loss(teacher: Teacher, states: Sequence[StudentState]) -> list[str]:
    """What the figures of a loss show, in sentences, at the first and the last of the states."""
    classes = teacher.num_classes
    ends = [states[0], states[-1]][: 1 if teacher.slots == 1 else 2]
    shapes = [figures.shape_of(teacher, state) for state in ends]
    weights = [figures.emphasis(teacher, state) for state in ends]
    targets = [figures.soft_targets(teacher, state) for state in ends]
    plain, smoothed = list(figures.known_shapes(classes).values())[:2]
    smoothing = f"label smoothing {figures.SMOOTHING:g}"

    felt = [
        torch.cat([shape.pull, figures.local_weights(teacher, state)], 1)
        for shape, state in zip(shapes, ends, strict=True)
    ]
    identity = torch.eye(classes, dtype=torch.float64)
    distances = [float((one - torch.cat([plain.pull, identity], 1)).norm()) for one in felt]
    if max(distances) < 1e-3:
        return ["This is cross-entropy, whatever the state of the student."]

    wrong = max(0.005, 0.1 / classes)
    said = [
        f"Where the student gives the true class {percent(wrong, 1)}, the loss pulls its logit up by "
        f"{_at_ends([f'{shape.pull_at(wrong):.2f}' for shape in shapes])}; cross-entropy by "
        f"{plain.pull_at(wrong):.2f}."
    ]
    rests = [shape.rest for shape in shapes]
    if any(rest is not None for rest in rests):
        where = _at_ends(["nowhere" if rest is None else f"at {percent(rest, 0)}" for rest in rests])
        assert smoothed.rest is not None
        said.append(
            f"The pull on a true class is over {where}; under {smoothing} at {percent(smoothed.rest, 0)}, "
            "under cross-entropy nowhere."
        )
    if max(float((weight - 1).abs().max()) for weight in weights) > 0.02:
        counts = [
            f"class {int(weight.argmax())} counts most ({float(weight.max()):.2f}) and class "
            f"{int(weight.argmin())} least ({float(weight.min()):.2f})"
            for weight in weights
        ]
        said.append(f"Near a guess {_at_ends(counts)}, where cross-entropy has 1 for each.")
    off = [target * (1 - identity) for target in targets]
    if max(float(one.abs().max()) for one in off) > 1e-3:
        largest = []
        for one in off:
            label, other = divmod(int(one.abs().argmax()), classes)
            largest.append(
                f"that of class {other} for samples of class {label} ({float(one[label, other]):+.2f})"
            )
        each = float(figures.smoothed_targets(classes)[0, 1])
        said.append(
            f"The largest weight of another class is {_at_ends(largest)}; {smoothing} has {each:.3f} for all."
        )
    if len(ends) == 2:
        moved = float((felt[1] - felt[0]).norm()) / max(distances)
        said.append(
            f"From the start of the run to its end the loss changes by {percent(moved, 0)} of its distance "
            f"to cross-entropy{': it is nearly one fixed loss' if moved < 0.1 else ''}."
        )
    return said


def _at_ends(values: Sequence[str]) -> str:
    """A value at the start of a run and at its end; one alone where there is one, or both are the same."""
    if len(set(values)) == 1:
        return values[0]
    return f"{values[0]} at the start of the run and {values[1]} at its end"


def measure_of(history: Mapping[str, Any]) -> str:
    """The dev measure of a teaching in words."""
    name: str = history.get("recipe", {}).get("measure", "measure")
    return name.replace("calibrated-", "calibrated ").replace("sharp-", "sharp ")


def said_of_updates(history: Mapping[str, Any], students: str = "students") -> list[str]:
    """What the figures of a teaching show, in sentences: means over its first and its last updates."""
    rows = history["updates"]
    few = max(1, len(rows) // 10)

    def ends(name: str, shown: Callable[[float], str]) -> list[str]:
        known = [[row[name] for row in part if row[name] is not None] for part in (rows[:few], rows[-few:])]
        return [shown(statistics.fmean(part)) if part else "–" for part in known]

    measure, error = ends("measure", "{:.3f}".format), ends("dev_error", lambda value: percent(value, 1))
    agreement, norm = ends("agreement", "{:.2f}".format), ends("norm", "{:.2g}".format)
    name = measure_of(history)
    return [
        f"Over {len(rows)} updates the dev {name} went from {measure[0]} to "
        f"{measure[1]} and the dev error from {error[0]} to {error[1]}.",
        f"Independent {students} agreed about the way with a cosine of {agreement[0]} at first and "
        f"{agreement[1]} at the end, with gradients of norm {norm[0]} and {norm[1]}.",
    ]


def said_of_the_teaching(history: Mapping[str, Any]) -> list[str]:
    """The same with what came of it in the trial and among other starts."""
    said = said_of_updates(history)
    trial = history.get("trial")
    if trial is not None:
        errors = ", ".join(
            f"{percent(min(errors), 1)} under the {CANDIDATES[name]}"
            for name, errors in trial["expected_error"].items()
        )
        said.append(
            "At the end fresh students had these calibrated expected errors on dev, each teacher at its "
            f"best rate: {errors}. Taken was the {CANDIDATES[trial['chosen']]}."
        )
    choice = history.get("choice")
    if choice is not None:
        errors = ", ".join(
            f"{percent(min(row['expected_error']), 1)} ({_family(row['teacher'])}"
            f"{'' if row['taught'] else ', as it starts'}{', chosen' * row['chosen']})"
            for row in choice
        )
        said.append(
            f"On rows that were not taught on, fresh students had these calibrated expected errors: {errors}."
        )
    return said


def _family(config: Mapping[str, Any]) -> str:
    """What a teacher of such settings sets."""
    return f"{config['weight']} weights, {config['link']} link" if "link" in config else config["class"]


CANDIDATES = {
    "average": "average of the last teachers",
    "good": "teacher of the best episodes",
    "neutral": "loss that it started as",
}


# ---- sections ----


def _header(runs: Sequence[Run], kind: Kind) -> str:
    config = runs[0].config
    about = [f"<b>{html.escape(_subject(runs[0]))}</b>"]
    if "student" in config:
        about.append(f"student {html.escape(config['student'])}")
    about.append(f"teacher: {_kind_of(runs[0].teacher)}")
    about.append(f"{len(runs)} teacher{'s' if len(runs) > 1 else ''}")
    return (
        f"<header><p class=brand>l2t · learning to teach</p><h1>{kind.headline(runs)}</h1>"
        f"<p class=about>{' · '.join(about)}</p></header>"
    )


def _kind_of(teacher: AnyTeacher) -> str:
    if isinstance(teacher, (Teacher, TokenTeacher)):
        return f"{teacher.kind} weights, {teacher.link} link, {teacher.slots} slots"
    return "weights of rows by their loss (Meta-Weight-Net)"


def _results(group: Mapping[str, dict[str, Any]]) -> str:
    """Chart, table and curves of comparisons that share their baselines."""
    first = next(iter(group.values()))
    shared = [arm for arm in first["test_error"] if arm != "taught"]
    comparisons = {"taught" if len(group) == 1 else f"taught, {name}": group[name] for name in group}
    errors = {label: comparison["test_error"]["taught"] for label, comparison in comparisons.items()}
    order = sorted(shared, key=lambda arm: statistics.fmean(first["test_error"][arm]))
    errors |= {arm: first["test_error"][arm] for arm in order}
    chart = figures.comparison(
        {arm: [100 * value for value in values] for arm, values in errors.items()},
        list(comparisons),
        first.get("oracles", ()),
    )
    of_whom = [f"{html.escape(name)} less this" if len(group) > 1 else "difference" for name in group]
    heads = "".join(f"<th>{who}</th><th>95\u202f% interval</th><th><i>p</i></th>" for who in of_whom)
    rows = []
    for label, comparison in comparisons.items():
        rows.append(
            f"<tr class=taught><th>{html.escape(label)}</th>{_mean_cells(comparison, 'taught')}"
            f"<td colspan={3 * len(comparisons)}></td></tr>"
        )
    for arm in order:
        cells = "".join(_against_cells(comparison, arm) for comparison in comparisons.values())
        rows.append(f"<tr><th>{html.escape(arm)}</th>{_mean_cells(first, arm)}{cells}</tr>")
    head = f"<tr><th>loss</th><th>test error</th><th>rate</th>{heads}</tr>"
    arms = table(head, rows)
    series = {}
    for label, comparison in comparisons.items():
        series[label] = comparison["curves"]["taught"]
    series |= {arm: first["curves"][arm] for arm in order}
    curves = figures.curves(
        {
            arm: (curve["step"], [100 * value for value in curve["dev_error"]])
            for arm, curve in series.items()
        },
        list(comparisons),
        "dev error, %",
    )
    students = len(first["test_error"]["taught"])
    edges = [
        f"{label if arm == 'taught' else arm} ({tuning['lr']:g})"
        for label, comparison in comparisons.items()
        for arm, tuning in comparison["tuning"].items()
        if tuning["at_edge"] and (arm == "taught" or comparison is first)
    ]
    note = (
        f"Test error is mean ± standard deviation over {students} fresh students an arm, rate the learning "
        "rate that was tuned for it. A difference is taught less baseline in points, with the confidence "
        "interval of its mean and the <i>p</i> of a paired <i>t</i>-test after Holm's correction for "
        f"{first['comparisons']} comparisons; ▲ and ▼ mark wins and losses, at such a <i>p</i> &lt; {ALPHA}."
    )
    if edges:
        note += f" At the edge of the grid: {html.escape(', '.join(edges))}."
    return section(
        "Result",
        f"<figure class=wide>{chart}</figure>{arms}<p class=note>{note}</p>"
        + f"<figure class=wide>{curves}<figcaption>Learning curves: dev error while tuning, at the chosen "
        "learning rate, mean over students.</figcaption></figure>"
        + details("How it was measured", bullets(first["protocol"]), shown=True),
    )


def _mean_cells(comparison: Mapping[str, Any], arm: str) -> str:
    values = [100 * value for value in comparison["test_error"][arm]]
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"<td>{statistics.fmean(values):.2f}{sd}</td><td>{comparison['tuning'][arm]['lr']:g}</td>"


def _against_cells(comparison: Mapping[str, Any], arm: str) -> str:
    errors = comparison["test_error"]
    difference = 100 * (statistics.fmean(errors["taught"]) - statistics.fmean(errors[arm]))
    word = verdict(comparison, arm)
    mark = {"win": "▲ ", "loss": "▼ ", "even": ""}[word]
    interval = " to ".join(signed(100 * end) for end in comparison["interval"][arm])
    alone = comparison["p"][arm]
    title = "" if alone is None else f' title="{alone:.2g} before correction"'
    return (
        f"<td class={word}>{mark}{signed(difference)}</td><td class=p>{interval}</td>"
        f"<td class=p{title}>{p_value(comparison['p_corrected'][arm])}</td>"
    )


def signed(points: float) -> str:
    """A difference with its sign."""
    return f"{'−' if points < 0 else '+'}{abs(points):.2f}"


def table(head: str, rows: Iterable[str]) -> str:
    """A table that scrolls by itself."""
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def details(summary: str, body: str, *, shown: bool = False) -> str:
    """What opens where it is asked for."""
    return f"<details{' open' if shown else ''}><summary>{html.escape(summary)}</summary>{body}</details>"


def _learned(runs: Sequence[Run], kind: Kind) -> str:
    taught = [(run, kind.loss(run)) for run in runs if run.states]
    shown = [(run.name, bullets(found[0]) + gallery(found[1])) for run, found in taught if found is not None]
    parts = [part for _, part in shown]
    if len(shown) > 1:
        parts = [details(name, part, shown=number == 0) for number, (name, part) in enumerate(shown)]
    text = (
        "<p>What a student feels from the teacher at several points of its training. The states of a student "
        "at these points are those that the teacher saw last.</p>"
    )
    return section("The learned loss", text + "".join(parts)) if parts else ""


def _loss(run: Run) -> tuple[list[str], list[Picture]] | None:
    if not isinstance(run.teacher, Teacher):
        return None
    return said_of_the_loss(run.teacher, run.states), _loss_figures(run)


def _loss_figures(run: Run) -> list[Picture]:
    teacher, states = run.teacher, run.states
    assert isinstance(teacher, Teacher)
    course = thinned(states, 60)
    stages = thinned(states, 1 if run.is_static else STAGES)
    progress = [float(state.progress) for state in course]
    pull, loss = figures.learned_loss(teacher, stages)
    beside = (
        "Known losses are scaled to pull like cross-entropy at a guess, as the taught one does: a factor is "
        "a matter of the learning rate, of which each loss has its own."
    )
    classes = teacher.num_classes
    drawn = f" Of {classes:,} classes {figures.LINES} are drawn, at even ranks of where their lines end."
    drawn = drawn if classes > figures.LINES else ""
    found = [
        (pull, f"How hard the loss pulls the true logit up, mean over the classes. {beside}"),
        (loss, "The loss itself. The rest of the probability is spread evenly over the other classes."),
    ]
    pulls = figures.pull_by_class(teacher, stages)
    if pulls is not None:
        found.append((pulls, f"The pull again, one line a true class; dashed is cross-entropy.{drawn}"))
    maps = figures.class_by_class(teacher, thinned(states, 1 if run.is_static else 3))
    if maps is not None:
        svg, bound = maps
        caption = (
            "Emphasis: how hard the samples of a class pull at a guess, in the pull of cross-entropy; the "
            "mean over the classes is 1."
        )
        if bound > 0:
            caption = (
                "Soft targets near a guess: the weight that samples of the true class give every class. Blue "
                f"raises its logit, red lowers it; full colour is {bound:.2g} and more. Cross-entropy has 1 "
                f"for the true class and 0 for the others. {caption}"
            )
            if (side := figures.block(classes)) > 1:
                caption += f" A cell is the largest weight of {side} by {side} classes."
        found.append((svg, caption))
    if run.is_static:
        return found
    names = [f"class {label}" for label in range(classes)]
    with torch.no_grad():
        mix = torch.stack([teacher._mix(teacher._features(state)) for state in course])
    weights = torch.stack([figures.emphasis(teacher, state) for state in course])
    shown: list[tuple[Tensor, str, str, float | None]] = []
    if float((weights - 1).abs().max()) > 1e-4:
        caption = "Emphasis along the run; cross-entropy has 1 for every class."
        shown.append((weights, "emphasis", caption, 1.0))
    if teacher.link != "identity":
        exponents, biases = [], []
        with torch.no_grad():
            for state in course:  # one matrix at a time
                weight, bias, _ = teacher(state)
                exponents.append(figures.dense(weight).diagonal().clone())
                biases.append(bias)
        caption = "Diagonal a of the coefficients: the smaller, the closer to cross-entropy."
        shown.append((torch.stack(exponents), "a", caption, None))
        caption = "Bias b: the lower, the less samples count that look mislabelled."
        shown.append((torch.stack(biases), "b", caption, None))
    for values, ylabel, caption, reference in shown:
        some = drawn
        if float((values - values[:, :1]).abs().max()) < 1e-6:
            values, some = values[:, :1], ""
        svg = figures.over_progress(values, progress, ylabel, names, reference)
        found.append((svg, caption + some))
    found.append((figures.mix(mix, progress), "Attention over the slots along the student's training."))
    return found


def thinned(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread from the first to the last; the middle one for 1."""
    if count == 1:
        return [items[len(items) // 2]]
    count = min(count, len(items))
    return (
        [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)] if count > 1 else list(items)
    )


def _teaching(runs: Sequence[Run], kind: Kind) -> str:
    def series(name: str, factor: float = 1.0) -> dict[str, tuple[list[int], list[float | None]]]:
        return {
            run.name: (
                [row["update"] for row in run.history["updates"]],
                [None if row[name] is None else factor * row[name] for row in run.history["updates"]],
            )
            for run in runs
        }

    if not any(run.history["updates"] for run in runs):
        return ""
    marks = {
        run.name: [event["update"] for event in run.history["events"] if event["kind"] == "guard"]
        for run in runs
    }
    measure = measure_of(runs[0].history)
    found = [
        (
            figures.history(series("measure"), f"dev {measure}", marks=marks),
            "What the teacher lowers, on rows held back from its students.",
        ),
        (
            figures.history(series("dev_error", 100), "dev error, %", marks=marks),
            kind.error,
        ),
        (
            figures.history(series("norm"), "gradient norm", log=True, marks=marks),
            "Median norm of the students' teacher gradients.",
        ),
        (
            figures.history(series("agreement"), "agreement", marks=marks, limits=(-1.05, 1.05)),
            "Mean cosine between the teacher gradients of independent students: high where there is a clear "
            "way to go, near 0 where one episode is mostly noise.",
        ),
    ]
    for run in runs:
        if run.history["adjoint_norms"]:
            caption = (
                "Norm of the adjoint by step: the more it grows towards the left, the less stable the run."
            )
            if len(runs) > 1:
                caption = f"{html.escape(run.name)}: {caption[0].lower()}{caption[1:]}"
            found.append((figures.adjoint(run.history["adjoint_norms"]), caption))
        found += kind.drawn(run)
    said = [(run, kind.said(run.history)) for run in runs if run.history["updates"]]
    name = "{}: " if len(runs) > 1 else ""
    words = bullets([name.format(run.name) + sentence for run, sentences in said for sentence in sentences])
    text = (
        "<p>Thin lines are single updates, thick ones running medians. Dashed upright lines: the guard went "
        "back to the last good teacher.</p>"
    )
    return section("The teaching", words + text + gallery(found) + _events(runs) + _probes(runs))


def _events(runs: Sequence[Run]) -> str:
    said = [
        f"{run.name}, update {event['update']}: {event['sentence']}"
        for run in runs
        for event in run.history["events"]
    ]
    return details(f"What was said aloud ({len(said)})", bullets(said)) if said else ""


def bullets(sentences: Iterable[str]) -> str:
    """Sentences as a list."""
    return f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _probes(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for row in run.history["probe"]:
            taken = run.history["recipe"]["probe_margin"] * row["lr"]
            chosen = " class=taught" if math.isclose(taken, run.history["lr"], rel_tol=0.01) else ""
            numbers = "".join(
                f"<td>{_number(row[name])}</td>" for name in ("lr", "norm", "agreement", "dev_error")
            )
            rows.append(f"<tr{chosen}><th>{html.escape(run.name)}</th>{numbers}</tr>")
    head = "<tr><th>run</th><th>rate</th><th>norm</th><th>agreement</th><th>dev error</th></tr>"
    return details("How the students' learning rate was probed", table(head, rows)) if rows else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _settings(runs: Sequence[Run]) -> str:
    tables = []
    first = runs[0]
    about = {name: value for name, value in first.config.items() if not isinstance(value, Mapping)}
    if "lr" in first.history:
        about["learning rate while teaching"] = first.history["lr"]
    for title, values in (
        ("Run", about),
        ("Recipe", first.history.get("recipe", {})),
        ("Course", first.config.get("course", {})),
        ("Data", first.config.get("data", {})),
        ("Teacher", first.teacher.config()),
        ("Versions", first.config.get("versions", {})),
    ):
        names = {name: str(name).replace("_", " ") for name in values}
        rows = (
            f"<tr><th>{html.escape(names[name])}</th><td>{html.escape(_value(value))}</td></tr>"
            for name, value in values.items()
        )
        if values:
            tables.append(f"<div><h3>{title}</h3><table class=settings>{''.join(rows)}</table></div>")
    which = ""
    if len(runs) > 1:
        differing = ", ".join(name.replace("_", " ") for name in _differing(runs))
        which = f" of {html.escape(first.name)}; the others differ in {html.escape(differing or 'nothing')}"
    return section("Settings", f"<p>Settings{which}.</p><div class=columns>{''.join(tables)}</div>")


def _differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    flat = []
    for run in runs:
        values = {
            "teacher": run.teacher.config(),
            **{name: value for name, value in run.config.items() if name != "teacher"},
        }
        lines: dict[str, Any] = {}
        for name, value in values.items():
            lines.update(value if isinstance(value, Mapping) else {name: value})
        flat.append({**lines, "rate while teaching": run.history.get("lr")})
    return [name for name in flat[0] if any(values.get(name) != flat[0][name] for values in flat)]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) if len(value) <= MANY else f"{len(value):,} of them"
    if isinstance(value, float):
        return f"{value:g}"
    return (
        {True: "yes", False: "no", None: "–"}.get(value, str(value))
        if isinstance(value, (bool, type(None)))
        else str(value)
    )


_OF_CLASSES = Kind(
    headline=headline,
    results=lambda runs: [_results(group) for group in compared_together(runs)],
    loss=_loss,
    said=said_of_the_teaching,
    drawn=lambda run: [],
    error="Dev error of the update's students.",
)


def section(title: str, body: str) -> str:
    """A section of the page."""
    return f"<section><h2>{title}</h2>{body}</section>"


def gallery(found: Iterable[Picture]) -> str:
    """Pictures side by side, with their captions."""
    return (
        "<div class=grid>"
        + "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in found)
        + "</div>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --paper: #fbfbf9; --card: #ffffff; --ink: #1b1f24; --muted: #687280; --grid: #e7e8ea; --line: #dddfe2;
  --taught: #c2410c; --plain: #5b6b7f; --win: #15803d; --loss: #b91c1c;
  --series-0: #2563eb; --series-1: #d97706; --series-2: #059669; --series-3: #9333ea; --series-4: #db2777;
  --series-5: #0891b2; --series-6: #65a30d; --series-7: #8b5e3c; --series-8: #64748b; --series-9: #dc2626;
  --stage-0: #3730a3; --stage-1: #7e22ce; --stage-2: #be185d; --stage-3: #ea580c; --stage-4: #ca9a04;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131619; --card: #1a1e22; --ink: #e7e9ec; --muted: #949da8; --grid: #2a2f35; --line: #343a41;
    --taught: #fb923c; --plain: #94a3b8; --win: #4ade80; --loss: #f87171;
    --series-0: #60a5fa; --series-1: #fbbf24; --series-2: #34d399; --series-3: #c084fc; --series-4: #f472b6;
    --series-5: #22d3ee; --series-6: #a3e635; --series-7: #d6a77a; --series-8: #a3b1c2; --series-9: #f87171;
    --stage-0: #818cf8; --stage-1: #c084fc; --stage-2: #f472b6; --stage-3: #fb923c; --stage-4: #fde047;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font-size: 16px; line-height: 1.55;
  font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
.brand { color: var(--muted); font-size: .85rem; letter-spacing: .04em; margin: 0 0 1rem; }
h1 { font-size: clamp(1.25rem, 1rem + 1.6vw, 1.85rem); line-height: 1.35; font-weight: 500; margin: 0 0 1rem;
text-wrap: pretty; } h1 b { color: var(--taught); font-weight: 700; white-space: nowrap; }
h1 b ~ b { color: inherit; }
sup { line-height: 0; }
.about { color: var(--muted); margin: 0; }
.about b { color: var(--ink); }
h2 { font-size: 1.25rem; margin: 3.25rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { max-width: 46rem; }
.note, figcaption { color: var(--muted); font-size: .875rem; line-height: 1.45; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem
2rem; align-items: start; } .columns { columns: 24rem 2; column-gap: 2rem; }
.columns > div { margin-bottom: 1.25rem; } .columns h3 { break-after: avoid; margin-top: 0; }
figure { margin: 0; min-width: 0; }
figure.wide { margin: .5rem 0 1.25rem; }
figure:has(svg.broad) { grid-column: 1 / -1; }
figcaption { margin-top: .35rem; max-width: 27rem; }
svg { display: block; max-width: 100%; height: auto; }
figure.wide, .scroll { overflow-x: auto; }
figure:has(svg.broad) { overflow-x: auto; }
figure.wide svg { min-width: 32rem; }
svg.broad { min-width: 46rem; }
.wide figcaption, svg.broad + figcaption { max-width: 46rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .75rem .3rem 0; text-align: right; white-space: nowrap; vertical-align: baseline; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tr.taught > * { color: var(--taught); font-weight: 600; }
td.win { color: var(--win); } td.loss { color: var(--loss); } td.even, td.p { color: var(--muted); }
table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.settings th { color: var(--muted); font-weight: 400; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 500; margin-bottom: .75rem; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
li { margin: .25rem 0; font-size: .9rem; overflow-wrap: anywhere; }
@media print { details { display: block; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
