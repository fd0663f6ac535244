"""What `l2t report` says and draws of taught losses of translators: the parts of a page that are their own.

A loss over a vocabulary is shown by bands of tokens, from the most frequent ones to those that never occur
among the targets: what the teacher sets for the tokens of a band on average, each counted as often as it
occurs, along the run of a student.

Not here: the page, its look and the course of the teaching (l2t/report.py), and pictures (l2t/figures.py).
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2t import figures
from l2t.compare import ALPHA, called
from l2t.report import (
    CANDIDATES,
    STAGES,
    Kind,
    Picture,
    Run,
    bullets,
    details,
    measure_of,
    outcome,
    p_value,
    said_of_updates,
    section,
    signed,
    table,
    thinned,
)
from l2t.teacher import StudentState
from l2t.translation import runs
from l2t.translation.contest import in_order, mean_perplexity, told_apart
from l2t.translation.course import LOSSES, Course, rising
from l2t.translation.token_teacher import TokenTeacher

_STUDENTS = {
    "lstm": "an LSTM with one layer a side",
    "lstm-2": "an LSTM with two layers a side",
    "transformer": "a Transformer with two layers a side",
}
_SETS = {
    "shared": "one strength of smoothing for all tokens",
    "diagonal": "how much tokens count, by their frequency",
    "low-rank": "how much tokens count, how much their targets are smoothed and towards which tokens, by "
    "their frequency",
}


# ---- the result ----


def comparisons_of(found: Sequence[Run]) -> list[dict[str, Any]]:
    """The comparisons of the runs, each once."""
    every = {json.dumps(run.comparison, sort_keys=True): run.comparison for run in found if run.comparison}
    return list(every.values())


def headline(found: Sequence[Run]) -> str:
    """The result in a sentence or two, whatever it is, as HTML."""
    said = []
    for comparison in comparisons_of(found):
        arms, tests = comparison["arms"], comparison["tests"]
        best = next(arm for arm in in_order(comparison) if arm in LOSSES)  # a static taught loss is none
        bleu = statistics.fmean(value for name in tests for value in arms[name]["bleu"])
        rivals = [best] if best == "maximum-likelihood" else [best, "maximum-likelihood"]
        how = [_outcome(comparison, arm) if arm in arms else "" for arm in rivals]
        said.append(
            f"Students under the taught loss reach a BLEU of <b>{bleu:.2f}</b> on the test set, against "
            f"<b>{statistics.fmean(arms[best]['bleu']):.2f}</b> under the best tuned baseline, "
            f"{html.escape(best)}: {how[0]}."
        )
        if how[1:] and how[1]:
            plain = statistics.fmean(arms[rivals[1]]["bleu"])
            said[-1] += f" Under maximum likelihood they reach {plain:.2f}: {how[1]}."
    return "<br>".join(said) or (
        "A loss has been taught; <code>l2t compare</code> has not yet compared it with baselines."
    )


def _outcome(comparison: Mapping[str, Any], arm: str) -> str:
    """How the taught losses did against an arm."""
    tests = [own[arm] for own in comparison["tests"].values()]
    return outcome(
        [called(test["difference"], test["p_corrected"]) for test in tests],
        [test["p_corrected"] for test in tests],
        {"win": "higher", "even": "no clear difference", "loss": "lower"},
        comparison["students"],
        _count(comparison),
    )


def _count(comparison: Mapping[str, Any]) -> int:
    """How many tests the p of a comparison are corrected for."""
    return sum(len(own) for own in comparison["tests"].values())


def results(found: Sequence[Run]) -> list[str]:
    """What was taught, and each comparison with its picture, table and protocol."""
    said: dict[str, list[str]] = {}
    for run in found:
        for sentence in (*said_of_the_run(run), *said_of_the_cost(run)):
            said.setdefault(sentence, []).append(run.name)
    lines = [
        sentence if len(names) == len(found) else f"{', '.join(names)}: {sentence}"
        for sentence, names in said.items()
    ]
    return [section("What was taught", bullets(lines)), *map(_result, comparisons_of(found))]


def _result(comparison: Mapping[str, Any]) -> str:
    arms, tests = comparison["arms"], comparison["tests"]
    order = in_order(comparison)
    chart = figures.comparison({arm: arms[arm]["bleu"] for arm in order}, list(tests), (), "test BLEU")
    heads = "".join(
        f"<th>{html.escape(name)} less this</th><th>95\u202f% interval</th><th><i>p</i></th>"
        for name in tests
    )
    head = f"<tr><th>loss</th><th>test BLEU</th><th>chrF</th><th>perplexity</th><th>rate</th>{heads}</tr>"
    rows = []
    for arm in order:
        cells = "".join(_against(own[arm]) for own in tests.values() if arm in own)
        cells = cells or f"<td colspan={3 * len(tests)}></td>"
        kind = " class=taught" if arm in tests else ""
        rows.append(f"<tr{kind}><th>{html.escape(arm)}</th>{_means(arms[arm])}{cells}</tr>")
    note = (
        f"BLEU and chrF are mean and standard deviation over {comparison['students']} fresh students an arm, "
        "perplexity is that of pieces, rate the learning rate that was tuned for an arm (*: at the edge "
        "of its grid). A difference is taught less baseline in BLEU, with the confidence interval of its "
        f"mean and the <i>p</i> of a paired <i>t</i>-test after Holm's correction for {_count(comparison)} "
        f"comparisons; ▲ and ▼ mark wins and losses, at such a <i>p</i> &lt; {ALPHA}."
    )
    signatures = [f"{name}: {signature}" for name, signature in comparison["signatures"].items()]
    return section(
        "Result",
        f"<figure class=wide>{chart}</figure>{table(head, rows)}<p class=note>{note}</p>"
        + bullets(said_of_the_bootstrap(comparison))
        + details("Learning rates: BLEU on dev", _tuning(comparison, order))
        + details("How it was measured", bullets([*comparison["protocol"], *signatures]), shown=True),
    )


def _means(arm: Mapping[str, Any]) -> str:
    spread = [f"{statistics.fmean(arm[name]):.2f} ± {statistics.stdev(arm[name]):.2f}" for name in _SCORES]
    star = "*" if arm["tuning"]["at_edge"] else ""
    cells = [*spread, f"{mean_perplexity(arm):.2f}", f"{arm['tuning']['lr']:g}{star}"]
    return "".join(f"<td>{cell}</td>" for cell in cells)


_SCORES = ("bleu", "chrf")


def _against(test: Mapping[str, Any]) -> str:
    word = called(test["difference"], test["p_corrected"])
    mark = {"win": "▲ ", "loss": "▼ ", "even": ""}[word]
    title = "" if test["p"] is None else f' title="{test["p"]:.2g} before correction"'
    return (
        f"<td class={word}>{mark}{signed(test['difference'])}</td>"
        f"<td class=p>{' to '.join(map(signed, test['interval']))}</td>"
        f"<td class=p{title}>{p_value(test['p_corrected'])}</td>"
    )


def _tuning(comparison: Mapping[str, Any], order: Sequence[str]) -> str:
    """Every rate that was tried, by arm."""
    tuned = {arm: comparison["arms"][arm]["tuning"] for arm in order}
    rates = sorted({rate for tuning in tuned.values() for rate in tuning["grid"]})
    rows = []
    for arm, tuning in tuned.items():
        seen = dict(zip(tuning["grid"], tuning["dev_bleu"], strict=True))
        cells = []
        for rate in rates:
            value = seen.get(rate)
            shown = "–" if rate not in seen else "diverged" if value is None else f"{value:.2f}"
            chosen = f"<b>{shown}</b>" if rate == tuning["lr"] else shown
            cells.append(f"<td>{chosen}{'+' if rate in tuning['added'] else ''}</td>")
        rows.append(f"<tr><th>{html.escape(arm)}</th>{''.join(cells)}</tr>")
    head = f"<tr><th>loss</th>{''.join(f'<th>{rate:g}</th>' for rate in rates)}</tr>"
    note = "<p class=note>Bold: chosen. +: beyond the grid, where the best rate was at its end.</p>"
    return table(head, rows) + note


def said_of_the_bootstrap(comparison: Mapping[str, Any]) -> list[str]:
    """How each taught loss did over the sentences of the test set, student by student."""
    said = []
    for name, rows in comparison["bootstrap"].items():
        ahead, behind = told_apart(rows)
        each = ", ".join(f"{signed(row['difference'])} (p = {row['p']:.2g})" for row in rows)
        said.append(
            f"Paired bootstrap over the test sentences, {name} against {comparison['best_baseline']}: "
            f"ahead in {ahead} and behind in {behind} of {len(rows)} students at p < 0.05: {each}."
        )
    return said


# ---- what was taught ----


def said_of_the_run(run: Run) -> list[str]:
    """What a run is: student, sentences, vocabulary, course, teacher, windows."""
    teacher, config = run.teacher, run.config
    assert isinstance(teacher, TokenTeacher)
    said = []
    if config:
        course, data = Course(**config["course"]), config["data"]
        student = course.build(teacher.num_classes)
        numbers = sum(parameter.numel() for parameter in student.parameters())
        counts = data["counts"]
        said = [
            f"The student is {_STUDENTS[course.student]} of size {student.head.shape[1]}, {numbers:,} "
            f"numbers, dropout {course.dropout:g}; it translates {data['source']} into {data['target']}.",
            f"Sentence pairs: {counts['train']:,} to learn from, {counts['dev']:,} dev, "
            f"{counts['test']:,} test"
            f"{'' if data['origin'] is None else ', from ' + data['origin']}.",
        ]
    said.append(
        f"Both languages are cut into pieces of one vocabulary of {teacher.num_classes:,}; the targets to "
        f"learn from have {sum(teacher.counts):,} of them, and {sum(map(bool, teacher.counts)):,} different "
        "ones."
    )
    when = "at every stage alike" if run.is_static else "anew at each stage of a student"
    links = "" if teacher.link == "identity" else f", and what its {teacher.link} link bends"
    start = run.history.get("teacher", {}).get("smoothing", teacher.smoothing)
    said.append(
        f"The loss starts as label smoothing of {start:g}. The teacher sets {_SETS[teacher.kind]}"
        f"{links}, {when}."
    )
    recipe = run.history.get("recipe")
    if recipe:
        optimizer = {"adam": "Adam", "sgd": f"SGD with momentum {recipe['momentum']:g}"}[recipe["optimizer"]]
        tokens = f" of up to {config['course']['tokens']:,} padded tokens a side" if config else ""
        rise = rising(recipe["run_steps"], recipe["lr_warmup"])
        said += [
            f"A whole run is {recipe['run_steps']:,} steps{tokens} by {optimizer}, whose "
            f"rate rises to {recipe['lr']:g} over {rise:,} steps and falls to 0 along a line.",
            f"The teacher learned from {len(run.history['updates']):,} updates of {recipe['students']} "
            f"windows of {recipe['steps']} steps, which begin at {recipe['stages']} stages along whole "
            f"runs under it (made anew every {recipe['refresh']} updates), and lowers dev "
            f"{measure_of(run.history)}.",
        ]
    return said


def said_of_the_cost(run: Run) -> list[str]:
    """What the teaching has cost, in runs of a student."""
    seconds, pools = run.history["seconds"], run.history.get("pools")
    if not seconds or not pools:
        return []
    total = runs.seconds_of(run.history)
    windows = total - seconds["pools"] - seconds["trial"]
    said = (
        f"Teaching took {total:,.0f} s by the clock: {seconds['pools']:,.0f} s of {len(pools)} whole runs "
        f"that windows begin on, {windows:,.0f} s of windows, {seconds['trial']:,.0f} s of the trial. That "
        f"is {total / seconds['pools'] * len(pools):.1f} times such a run"
    )
    found = (run.comparison or {}).get("teaching", {})
    own = [cost for name, cost in found.items() if name == f"taught by {run.name}"]
    more = [
        f", and {cost['student_runs']:.1f} times the CPU time of training a student under it" for cost in own
    ]
    return [f"{said}{''.join(more)}."]


# ---- the learned loss ----


def bands(teacher: TokenTeacher) -> dict[str, Tensor]:
    """The tokens of a vocabulary by name of a band: by rank of their frequency among the targets.

    Example:
        >>> from l2t.translation.report import bands
        >>> from l2t.translation.token_teacher import TokenTeacher
        >>> found = bands(TokenTeacher([0, 0, 0, 4, *range(20, 0, -1)]))
        >>> {name: len(tokens) for name, tokens in found.items()}
        {'end of sentence': 1, '10 most frequent': 10, 'to rank 100': 10, 'not among targets': 3}
    """
    counts = torch.tensor(teacher.counts)
    order = counts.argsort(descending=True, stable=True)
    order = order[order != teacher.eos]
    seen = order[counts[order] > 0]
    found = {
        "end of sentence": torch.tensor([teacher.eos]),
        "10 most frequent": seen[:10],
        "to rank 100": seen[10:100],
        "to rank 1,000": seen[100:1000],
        "rarer": seen[1000:],
        "not among targets": order[len(seen) :],
    }
    return {name: tokens for name, tokens in found.items() if len(tokens)}


class Numbers(NamedTuple):
    """What a loss is for each token in a state of the student, (V,) each, or (T, V) of several.

    Attributes:
        right: the weight of the log-probability of the right token, emphasis included.
        smoothing: the share of its weights that a target gives to other tokens.
        emphasis: the factor of the whole loss of a token.
        prior: what of the smoothing goes to a token, in what a uniform one gives it.
        bias: what the link bends beside; zero with the identity link.
    """

    right: Tensor
    smoothing: Tensor
    emphasis: Tensor
    prior: Tensor
    bias: Tensor


@torch.no_grad()
def numbers_of(teacher: TokenTeacher, state: StudentState) -> Numbers:
    """What the loss is in a state.

    Example:
        >>> import l2t
        >>> from l2t.translation.report import numbers_of
        >>> from l2t.translation.token_teacher import TokenTeacher
        >>> found = numbers_of(TokenTeacher([0, 1, 0, 9, 30], smoothing=0.1), l2t.StudentState(0.5, 1.0, 0.5))
        >>> [round(float(column[3]), 4) for column in found]
        [0.92, 0.08, 1.0, 1.0, 0.0]
    """
    weight, bias, scale = teacher(state)
    diagonal, left, right = (
        part.double() for part in (weight.diagonal, weight.left[:, 0], weight.right[:, 0])
    )
    own, total = diagonal + left * right, diagonal + left * right.sum()
    scale = scale.double()
    return Numbers(scale * own, (total - own) / total, scale, len(right) * right / right.sum(), bias.double())


_CAPTIONS = {
    "right": (
        "weight of the right token",
        "The weight of the log-probability of the right token, emphasis included: how hard it is pulled up.",
    ),
    "smoothing": (
        "weight of other tokens",
        "The share of a target's weights that other tokens have: how much it is smoothed.",
    ),
    "emphasis": (
        "emphasis",
        "How much a target counts; the mean over all of them is that of label smoothing.",
    ),
    "prior": (
        "share of smoothing (uniform: 1)",
        "Where the smoothing goes: what a token of the band gets of it, in what it would get if all got "
        "alike.",
    ),
    "bias": ("bias b", "The lower, the less targets count that the student thinks wrong."),
}


def learned(run: Run) -> tuple[list[str], list[Picture]] | None:
    """Sentences and pictures of the learned loss, by bands of tokens."""
    teacher, states = run.teacher, run.states
    assert isinstance(teacher, TokenTeacher)
    groups = bands(teacher)
    taught, start = _along(teacher, states), _along(teacher.neutral(), states)
    progress = [float(state.progress) for state in states]
    said, drawn = [], []
    for name, (ylabel, caption) in _CAPTIONS.items():
        values = _by_band(teacher, groups, name, getattr(taught, name))
        before = _by_band(teacher, groups, name, getattr(start, name))
        known = [not math.isnan(value) for value in values[0].tolist()]
        names = [band for band, there in zip(groups, known, strict=True) if there]
        values, before = values[:, known], before[:, known]
        if float((values - before).abs().max()) < 1e-4:
            continue
        reference = float(before[0, -1])
        if float((values - values[:, :1]).abs().max()) < 1e-6:
            values, names = values[:, :1], ["all tokens"]
        ends = [[f"{x:.3g}" for x in pair] for pair in values[[0, -1]].T.tolist()]
        shown = [f"{band} {' → '.join(dict.fromkeys(pair))}" for band, pair in zip(names, ends, strict=True)]
        said.append(
            f"{ylabel[0].upper()}{ylabel[1:]} from the start of a run to its end (label smoothing "
            f"{teacher.smoothing:g} has {reference:.3g}): {', '.join(shown)}."
        )
        # A share spans decades; what else is drawn may be 0 or less.
        svg = figures.over_progress(values, progress, ylabel, names, reference, log=name == "prior")
        drawn.append((svg, f"{caption} Dashed: label smoothing {teacher.smoothing:g}, as which it started."))
    if not said:
        return [f"This is label smoothing of {teacher.smoothing:g}, whatever the state of the student."], []
    if not run.is_static:
        with torch.no_grad():
            mix = torch.stack([teacher._mix(teacher._features(state)) for state in states])
        drawn.append((figures.mix(mix, progress), "Attention over the slots along the student's training."))
    return said, drawn


def _along(teacher: TokenTeacher, states: Sequence[StudentState]) -> Numbers:
    return Numbers(*map(torch.stack, zip(*(numbers_of(teacher, state) for state in states), strict=True)))


def _by_band(teacher: TokenTeacher, groups: Mapping[str, Tensor], name: str, values: Tensor) -> Tensor:
    """The mean (T, bands) of values (T, V): each token as often as it occurs, or once where it is what the
    smoothing goes to; NaN where nothing occurs.
    """
    counts = torch.tensor(teacher.counts, dtype=torch.float64)
    weights = torch.ones_like(counts) if name == "prior" else counts
    means = [values[:, at] @ weights[at] / weights[at].sum() for at in groups.values()]
    return torch.stack(means, 1)


# ---- the teaching ----


def said_of_the_teaching(history: Mapping[str, Any]) -> list[str]:
    """What the figures of a teaching show, and what its trial found, in sentences."""
    said = said_of_updates(history, "windows")
    said.append(
        f"The dev {measure_of(history)} of an update is where its windows end, less where the same windows "
        "end under the loss that it started as, from the level of the first ones on: what stages differ in "
        "cancels."
    )
    trial = history.get("trial")
    if trial is not None:
        levels = ", ".join(
            f"{statistics.fmean(known):.4f} under the {_candidate(name)}"
            for name, values in trial["measure"].items()
            if (known := [value for value in values if value is not None])
        )
        count = len(trial["measure"]["neutral"])
        came = (
            f"{count} whole run{'' if count == 1 else 's'} of the same students came to a dev {by_of(trial)}"
            if trial["runs"]
            else f"windows from each of the {count} stages of the last whole run came to a dev "
            f"{measure_of(history)}"
        )
        said.append(f"At the end {came} of {levels}. Taken was the {_candidate(trial['chosen'])}.")
    return said


def by_of(trial: Mapping[str, Any]) -> str:
    """What whole runs of a trial were judged by; earlier ones do not say."""
    return str(trial.get("by", "calibrated cross-entropy (nats a piece)"))


def _candidate(name: str) -> str:
    return CANDIDATES.get(name) or f"label smoothing of {name.removeprefix('label-smoothing-')}"


def drawn_of_the_teaching(run: Run) -> list[Picture]:
    """The dev measure along the whole runs that windows began on."""
    steps = run.history.get("recipe", {}).get("run_steps")
    series = {}
    for pool in thinned(run.history.get("pools", []), STAGES):
        along = zip([*pool["steps"], steps], pool["measure"], strict=True)
        known = [(step, value) for step, value in along if value is not None]
        if known:
            series[f"before update {pool['update']}"] = (
                [step for step, _ in known],
                [value for _, value in known],
            )
    if not series:
        return []
    svg = figures.curves(series, [[*series][-1]], f"dev {measure_of(run.history)}")
    caption = (
        f"{html.escape(run.name)}: dev measure along whole runs of a student under the teacher as it was."
    )
    return [(svg, caption)]


OF_TRANSLATORS = Kind(
    headline=headline,
    results=results,
    loss=learned,
    said=said_of_the_teaching,
    drawn=drawn_of_the_teaching,
    error="Share of dev tokens that are not the likeliest, where windows end.",
)
