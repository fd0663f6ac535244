"""The report: its figures show the loss itself, its words the result, and it needs nothing but itself."""

import base64
import builtins
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import l2t
from l2t import cli, figures, report, schedule
from l2t.report import Run
from l2t.schedule import Action
from l2t.teacher import GateTeacher, StudentState, static_teacher

STEPS = 30


def teacher_of(kind="full", link="identity", make=l2t.Teacher, **settings):
    teacher = make(4, kind, link=link, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return teacher


def history_of(updates=9, **changes):
    progress = [step / STEPS for step in range(STEPS)]
    rows = [
        {"update": i, "measure": 2.0 - 0.1 * i, "dev_error": 0.5, "norm": 0.1 * (i + 1), "agreement": 0.4}
        for i in range(updates)
    ]
    return {
        "lr": 0.075,  # three quarters of what the probe found
        "recipe": l2t.Recipe(probe_margin=0.75).to_json(),
        "updates": rows,
        "events": [{"update": 3, "kind": "guard", "sentence": "back to the last <good> teacher"}],
        "probe": [
            {"lr": lr, "norm": 1.0, "agreement": None, "measure": 2.0, "dev_error": 0.5} for lr in (0.2, 0.1)
        ],
        "adjoint_norms": {"0": [1.0 + step for step in range(STEPS)], "8": [None] * STEPS},
        "states": {
            "progress": progress,
            "train_loss": [1.4 * math.exp(-p) for p in progress],
            "train_accuracy": [1 - 0.75 * math.exp(-p) for p in progress],
        },
        **changes,
    }


def comparison_of(taught, others, oracles=(), also=()):
    arms = {"taught": taught, **others}
    means = {arm: sum(errors) / len(errors) for arm, errors in arms.items()}
    p = {arm: 1e-5 if abs(means[arm] - means["taught"]) > 0.05 else 0.4 for arm in others}
    return {
        "test_error": arms,
        "p": p,
        "p_corrected": {arm: min(1.0, len(p) * value) for arm, value in p.items()},
        "comparisons": len(p),
        "interval": {
            arm: [means["taught"] - mean - 0.02, means["taught"] - mean + 0.01] for arm, mean in means.items()
        },
        "protocol": ["Every arm has <the same> students.", "The test set is read once."],
        "summary": {arm: {"mean": mean, "difference": means["taught"] - mean} for arm, mean in means.items()},
        "tuning": {arm: {"lr": 0.1, "grid": [0.1, 0.2], "at_edge": arm == "focal"} for arm in arms},
        "curves": {arm: {"step": [10, 20, 30], "dev_error": [0.6, 0.5, 0.4]} for arm in arms},
        "oracles": list(oracles),
        "also": list(also),
    }


def save(directory: Path, teacher, history=None, comparison=None, config=None) -> Path:
    teacher.save(directory)
    for name, content in (("history", history), ("comparison", comparison), ("config", config)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


CONFIG = {"task": "digits", "regime": "clean", "student": "mlp", "seed": 0, "versions": {"torch": "2"}}
BASELINES = {"cross-entropy": [0.30, 0.32], "focal": [0.42, 0.40]}


class Page(HTMLParser):
    """Checks that tags close in the order in which they open, and gathers text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page_of(*runs: Path) -> Page:
    return Page(report.page(report.find_runs(*runs)))


# ---- the figures show the loss itself


def test_the_shapes_of_known_losses_pull_like_cross_entropy_at_a_guess():
    plain, smoothed, robust = figures.known_shapes(4).values()
    p = plain.p
    torch.testing.assert_close(plain.pull, (1 - p).expand(4, -1))
    torch.testing.assert_close(plain.loss, (-p.log() - math.log(4)).expand(4, -1))
    torch.testing.assert_close(smoothed.pull, ((0.925 - p) / 0.9).expand(4, -1))
    torch.testing.assert_close(robust.pull, ((4 * p) ** 0.7 * (1 - p)).expand(4, -1))
    torch.testing.assert_close(robust.loss, ((1 - (4 * p) ** 0.7) / 0.7).expand(4, -1))
    assert [round(shape.rest, 3) if shape.rest else None for shape in (plain, smoothed, robust)] == [
        None,
        0.925,
        None,
    ]
    assert smoothed.pull_at(0.3) == pytest.approx(0.625 / 0.9)


@pytest.mark.parametrize("link", ["sigmoid", "identity", "log-sigmoid"])
def test_the_shape_of_a_taught_loss_is_its_definition(link):
    teacher = teacher_of("full", link, dtype=torch.float64)
    state = StudentState(0.3, 0.8, 0.6)
    shape = figures.shape_of(teacher, state)
    weight, bias, scale = (x.detach() if isinstance(x, torch.Tensor) else x for x in teacher(state))
    dense = weight.weight.detach()
    phi = {"sigmoid": torch.sigmoid, "identity": lambda u: u, "log-sigmoid": torch.nn.functional.logsigmoid}[
        link
    ]

    def loss(label, p):
        rest = torch.full((4,), 1.0, dtype=torch.float64).index_fill(0, torch.tensor([label]), 0.0)
        log_p = rest * math.log((1 - p) / 3) + (1 - rest) * math.log(p)
        u = dense[label] @ log_p + (0 if bias is None else bias[label])
        return float(-(1 if scale is None else scale[label]) * phi(u))

    for label in range(4):
        for column in (3, 40, 90):
            p = float(shape.p[column])
            assert float(shape.loss[label, column]) == pytest.approx(
                loss(label, p) - loss(label, 0.25), abs=1e-9
            )
            step = 1e-5  # of the true logit: p moves by p (1 - p) of it
            moved = [loss(label, p + sign * step * p * (1 - p)) for sign in (1, -1)]
            assert float(shape.pull[label, column]) == pytest.approx(
                (moved[1] - moved[0]) / (2 * step), abs=1e-4
            )


class Smoothing(l2t.Teacher):
    """Label smoothing of 0.1 or what is asked for, whatever the state; classes may count unlike."""

    def __init__(self, smoothing=0.1, counts=None):
        super().__init__(5, "full", link="identity", dtype=torch.float64)
        self.smoothing, self.counts = smoothing, counts

    def forward(self, state):
        weight = l2t.Full.smoothed(5, self.smoothing, dtype=torch.float64)
        return l2t.Coefficients(weight, None, self.counts)


START, END = StudentState(0.0, 1.4, 0.25), StudentState(0.98, 0.3, 0.9)


def test_local_weights_are_what_one_knows_of_known_losses():
    expected = 0.8 * torch.eye(5, dtype=torch.float64) + 0.04
    torch.testing.assert_close(figures.local_weights(Smoothing(0.2), START), expected)


def test_soft_targets_and_emphasis_are_told_apart():
    teacher = Smoothing(counts=torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(figures.soft_targets(teacher, START), figures.smoothed_targets(5))
    torch.testing.assert_close(figures.emphasis(teacher, START), 0.9 * teacher.counts)


def test_the_emphasis_is_the_one_that_a_teacher_sets():
    teacher = teacher_of("full", "sigmoid", static_teacher, dtype=torch.float64)
    counts = (teacher.emphasis * teacher.emphases[0].tanh()).exp().detach()
    torch.testing.assert_close(figures.emphasis(teacher, START), counts / counts.mean())


def panels_of(svg):
    """The images of a figure as colours and opacities between 0 and 1, (rows, columns, 4)."""
    found = re.findall(r'xlink:href="data:image/png;base64,([^"]*)"', svg, flags=re.S)
    images = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA") for data in found]
    return [torch.tensor(np.asarray(image)) / 255 for image in images]


def test_heat_maps_show_the_weights_and_what_they_are_beyond_known_losses():
    teacher = teacher_of("full", "identity", dtype=torch.float64)
    svg, bound = figures.class_by_class(teacher, [START, END])
    panels = panels_of(svg)
    assert len(panels) == 6
    for state, three in zip((START, END), (panels[:3], panels[3:]), strict=True):
        table = teacher(state).weight.weight.detach()
        calibrated = 0.75 * table / (table.diagonal() - table.mean(1))[:, None]
        for panel, less in zip(three, (0.0, torch.eye(4), torch.eye(4) + 0.025 / 0.9), strict=True):
            expected = (calibrated - less) / bound
            shown = panel[..., 3] * torch.where(panel[..., 2] > panel[..., 0], 1.0, -1.0)
            torch.testing.assert_close(shown.double(), expected.clamp(-1, 1), atol=0.031, rtol=0)
    assert svg.count(">taught<") == svg.count(">emphasis<") == 1


def test_heat_maps_are_left_out_where_there_is_nothing_to_see():
    assert figures.class_by_class(teacher_of("full").neutral(), [START, END]) is None
    assert figures.class_by_class(teacher_of("shared", "sigmoid"), [START, END]) is None
    svg, bound = figures.class_by_class(teacher_of("per-class", "sigmoid"), [START, END])
    assert bound == 0.0
    assert ">emphasis<" in svg
    assert "<image" not in svg


def test_heat_maps_of_many_classes_stay_small():
    teacher = l2t.Teacher(100, "full", link="identity")
    with torch.no_grad():
        teacher.off_diagonal += 0.3 * torch.randn(teacher.off_diagonal.shape)
    svg, _ = figures.class_by_class(teacher, [START, START, END])
    assert len(svg) < 1_000_000


def test_local_weights_are_a_derivative():
    teacher = teacher_of("full", "sigmoid", dtype=torch.float64)
    state = StudentState(0.3, 0.8, 0.6)
    weight, bias, scale = (x.detach() if isinstance(x, torch.Tensor) else x for x in teacher(state))
    log_p = torch.full((4, 4), -math.log(4), dtype=torch.float64, requires_grad=True)
    loss = -scale * torch.sigmoid((weight.weight.detach() * log_p).sum(1) + bias)
    (slope,) = torch.autograd.grad(loss.sum(), log_p)
    torch.testing.assert_close(figures.local_weights(teacher, state), -slope)


def test_labels_at_line_ends_keep_apart_and_in_order():
    _, ax = figures._figure(430, 250)
    ax.set_ylim(0, 1)
    heights = [0.5, 0.501, 0.99, 0.5, 1.0]
    figures._label_ends(ax, 1.0, heights, list("abcde"), [figures.colour("ink")] * 5)
    places = {text.get_text(): text.xy[1] for text in ax.texts}
    assert max(places.values()) <= 1 + 1e-9
    rising = sorted(places.values())
    assert all(b - a > 0.06 for a, b in pairwise(rising))
    assert sorted(places, key=places.__getitem__) == ["a", "d", "b", "c", "e"]


@pytest.mark.parametrize("count", [30, 100])
def test_of_many_lines_as_many_have_a_label_as_there_is_room_for(count):
    values = torch.linspace(0.5, 1.5, count).expand(9, count)
    names = [f"class {label}" for label in range(count)]
    svg = figures.over_progress(values, torch.linspace(0, 1, 9).tolist(), "emphasis", names)
    shown = re.findall(r"class \d+", svg)
    assert 10 < len(shown) < 20
    assert {"class 0", f"class {count - 1}"} <= set(shown)
    series = {name: ([1, 2], [100.0, 50.0 + label]) for label, name in enumerate(names[:30])}
    svg = figures.curves(series, ["class 0"], "dev error, %")
    assert set(names[:30]) <= set(re.findall(r"class \d+", svg))


def test_of_many_classes_some_are_drawn_as_lines_and_heat_maps_keep_the_largest(monkeypatch):
    """A page of a thousand classes would have 20 MB, and take gigabytes to make."""
    classes = 301
    teacher = l2t.Teacher(classes, "full", slots=1, link="identity", dtype=torch.float64)
    with torch.no_grad():
        teacher.off_diagonal += 0.01 * torch.arange(teacher.off_diagonal.numel()).sin().reshape(
            teacher.off_diagonal.shape
        )
    svg = figures.pull_by_class(teacher, [START])
    assert figures.LINES < svg.count("<path") < figures.LINES + 40  # cross-entropy, grid and ticks besides
    run = Run("seed-0", Path("seed-0"), teacher, history_of(), {}, None)
    said = [caption for _, caption in report._loss_figures(run)]
    assert ["Of 301 classes 100 are drawn" in caption for caption in said] == [False, False, True, False]
    assert "A cell is the largest weight of 2 by 2 classes." in said[3]

    svg, bound = figures.class_by_class(teacher, [START])
    targets = figures.soft_targets(teacher, START)
    padded = F.pad((targets / bound).abs(), (0, 1, 0, 1))
    most = F.max_pool2d(padded[None], 2)[0]
    (shown, *_) = panels_of(svg)
    assert shown.shape == (151, 151, 4)
    torch.testing.assert_close(shown[..., 3].double(), most.clamp(0.03, 1), atol=0.01, rtol=0)

    whole = figures.shape_of(teacher, START)
    monkeypatch.setattr(figures, "_LOGITS", 7 * 101 * classes)  # seven classes at a time
    for one, other in zip(figures.shape_of(teacher, START), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_panels_side_by_side_have_one_label_between_them():
    """As long as it is, it would reach from one panel into the next."""
    teacher = l2t.Teacher(3, "full", link="identity")
    with torch.no_grad():
        for value in teacher.parameters():
            value.add_(0.2 * torch.arange(value.numel()).sin().reshape(value.shape))
    svg = figures.pull_by_class(teacher, [StudentState(part, 1.0, 0.5) for part in (0.0, 0.5, 1.0)])
    assert svg is not None
    assert svg.count("probability of the true class") == 1


@pytest.mark.parametrize("name", ["costs $5 and $6", r"$\foo$"])
def test_names_with_dollars_are_no_formulas(name):
    assert html.escape(name) in figures.comparison({name: [1.0, 2.0]}, [name])
    assert html.escape(name) in figures.history({name: ([0], [1.0]), "b": ([0], [2.0])}, "norm")


def test_figures_follow_the_theme_and_leave_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg = figures.comparison({"taught": [1.0, 2.0], "a<b": [3.0, 4.0]}, ["taught"])
    assert dict(matplotlib.rcParams) == before
    assert "var(--taught)" in svg
    assert not re.search(r"#0000[0-9a-f]{2}\b", svg)
    assert "font-family" not in svg
    assert "a&lt;b" in svg


@pytest.mark.parametrize("values", [[1e-3, 1e12, None, 0.1], [None, None], [0.0, -1.0, 3.0], [0.5]])
def test_history_is_drawn_whatever_happened(values):
    for log in (False, True):
        svg = figures.history({"a": (range(len(values)), values)}, "norm", log=log, marks={"a": [1]})
        assert "<svg" in svg


# ---- words


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (None, "–"),
        (0.4, "0.40"),
        (0.0123, "0.012"),
        (0.0012, "0.0012"),
        (3.2e-7, "3.2·10<sup>−7</sup>"),
        (0.0, "0"),
        (9.97e-15, "1.0·10<sup>−14</sup>"),
    ],
)
def test_p_values(p, shown):
    assert report.p_value(p) == shown


def test_thinned_keeps_both_ends():
    assert report.thinned(range(100), 5) == [0, 25, 50, 74, 99]
    assert report.thinned(range(3), 5) == [0, 1, 2]
    assert report.thinned(range(7), 1) == [3]


@pytest.mark.parametrize(
    ("taught", "words"),
    [
        ([[0.20, 0.21]], "20.50 % errors on the test set, against 31.00 % under the best tuned baseline, "
         "cross-entropy: fewer (paired t-test over 2 students, p ≤ 4.0·10−5, corrected for 4 comparisons)"),
        ([[0.50, 0.51]], "50.50 % errors on the test set, against 31.00 % under the best tuned baseline, "
         "cross-entropy: more (paired"),
        ([[0.30, 0.31]], "no clear difference (paired t-test over 2 students, p = 1.00, corrected"),
        ([[0.20, 0.21], [0.22, 0.21]], "fewer for each of 2 teachers"),
        ([[0.20, 0.21], [0.30, 0.31]], "fewer for 1, no clear difference for 1 of 2 teachers "
         "(paired t-test over 2 students, p < 0.01"),
        ([[0.20, 0.21], [0.50, 0.51]], "fewer for 1, more for 1 of 2 teachers"),
    ],
)  # fmt: skip
def test_the_headline_says_how_it_went(taught, words, tmp_path):
    for number, errors in enumerate(taught):
        others = {**BASELINES, "told the noise": [0.1, 0.1], "static": [0.15, 0.16]}
        comparison = comparison_of(errors, others, ["told the noise"], ["static"])
        save(tmp_path / f"seed-{number}", teacher_of(), history_of(), comparison, CONFIG)
    said = Page(report.headline(report.find_runs(tmp_path))).text.replace("\u202f", " ")
    assert words in said


def test_the_headline_weighs_cross_entropy_too_where_another_is_best(tmp_path):
    comparison = comparison_of([0.20, 0.21], {"cross-entropy": [0.4, 0.5], "robust": [0.20, 0.21]})
    save(tmp_path, teacher_of(), history_of(), comparison, CONFIG)
    said = Page(report.headline(report.find_runs(tmp_path))).text.replace("\u202f", " ")
    assert "the best tuned baseline, robust: no clear difference" in said
    assert said.endswith(
        "Under cross-entropy they make 45.00 %: fewer (paired t-test over 2 students, p ≤ 2.0·10−5, "
        "corrected for 2 comparisons)."
    )


@pytest.mark.parametrize("others", [{}, {"told the noise": [0.1, 0.1], "static": [0.15, 0.16]}])
def test_a_comparison_without_a_baseline_has_a_page_that_says_so(others, tmp_path):
    comparison = comparison_of(
        [0.20, 0.21], others, ["told the noise"] * bool(others), ["static"] * bool(others)
    )
    save(tmp_path, teacher_of(), history_of(), comparison, CONFIG)
    said = Page(report.headline(report.find_runs(tmp_path))).text.replace("\u202f", " ")
    assert said == (
        "Students under the taught loss make 20.50 % errors on the test set; there is no baseline to compare "
        "them with."
    )
    text = page_of(tmp_path).text
    for arm in others:
        assert arm in text
    lines = cli.comparison_table("digits", {"seed-0": comparison})
    assert any(line.startswith("taught, seed-0") for line in lines)


def test_comparisons_with_other_students_are_not_mixed(tmp_path):
    for number, error in enumerate((0.30, 0.35)):
        comparison = comparison_of([0.2, 0.21], {"cross-entropy": [error, error + 0.02]})
        save(tmp_path / f"seed-{number}", teacher_of(), history_of(), comparison, CONFIG)
    runs = report.find_runs(tmp_path)
    assert [list(group) for group in report.compared_together(runs)] == [["seed-0"], ["seed-1"]]
    text = Page(report.page(runs)).text
    assert "31.00 ± 1.41" in text
    assert "36.00 ± 1.41" in text


def test_the_words_about_the_loss_are_what_one_knows_of_known_losses():
    counts = torch.tensor([0.5, 1.5, 1.25, 0.75, 1.0], dtype=torch.float64)
    teacher = Smoothing(0.25, counts / 0.75)
    said = [sentence.replace("\u202f", " ") for sentence in report.said_of_the_loss(teacher, [START, END])]
    assert said == [
        "Where the student gives the true class 2.0 %, the loss pulls its logit up by 1.04; "
        "cross-entropy by 0.98.",  # (0.8 - 0.02) / 0.75
        "The pull on a true class is over at 80 %; under label smoothing 0.1 at 92 %, "
        "under cross-entropy nowhere.",
        "Near a guess class 1 counts most (1.50) and class 0 least (0.50), "
        "where cross-entropy has 1 for each.",
        "The largest weight of another class is that of class 1 for samples of class 0 (+0.07); "
        "label smoothing 0.1 has 0.022 for all.",  # 0.05 / 0.75, 0.02 / 0.9
        "From the start of the run to its end the loss changes by 0 % of its distance to cross-entropy: "
        "it is nearly one fixed loss.",
    ]


def test_the_words_say_where_nothing_was_learned():
    said = report.said_of_the_loss(teacher_of("full").neutral(), [START, END])
    assert said == ["This is cross-entropy, whatever the state of the student."]


def test_the_words_tell_the_start_of_a_run_from_its_end():
    teacher = teacher_of("full", "identity")
    said = report.said_of_the_loss(teacher, [START, StudentState(0.5, 1.0, 0.5), END])
    assert "at the start of the run and" in said[0] + said[2]
    (moved,) = re.findall(r"changes by (\d+)", said[-1])
    assert int(moved) > 0
    static = report.said_of_the_loss(teacher_of("full", "identity", static_teacher), [START, END])
    assert "at its end" not in " ".join(static)


def test_the_words_about_the_teaching_are_its_first_and_last_updates():
    history = history_of(updates=30)
    history["trial"] = {
        "chosen": "average",
        "rates": [0.1, 0.2],
        "expected_error": {"average": [0.5, 0.41], "neutral": [0.45, 0.6]},
    }
    said = [sentence.replace("\u202f", " ") for sentence in report.said_of_the_teaching(history)]
    assert said == [
        "Over 30 updates the dev calibrated cross-entropy went from 1.900 to -0.800 and the dev error from "
        "50.0 % to 50.0 %.",
        "Independent students agreed about the way with a cosine of 0.40 at first and 0.40 at the end, "
        "with gradients of norm 0.2 and 2.9.",
        "At the end fresh students had these calibrated expected errors on dev, each teacher at its best "
        "rate: 41.0 % under the average of the last teachers, 45.0 % under the loss that it started as. "
        "Taken was the average of the last teachers.",
    ]
    teacher = l2t.Teacher(4).config()
    history["choice"] = [
        {"teacher": teacher, "taught": True, "expected_error": [0.5, 0.41], "chosen": False},
        {
            "teacher": {**teacher, "weight": "full"},
            "taught": True,
            "expected_error": [0.4, 0.43],
            "chosen": True,
        },
        {"teacher": {"class": "WeightNet"}, "taught": False, "expected_error": [0.5], "chosen": False},
    ]
    assert report.said_of_the_teaching(history)[-1].replace("\u202f", " ") == (
        "On rows that were not taught on, fresh students had these calibrated expected errors: "
        "41.0 % (shared weights, sigmoid link), 40.0 % (full weights, sigmoid link, chosen), "
        "50.0 % (WeightNet, as it starts)."
    )
    for row in history["updates"]:
        row["agreement"] = None
    assert "a cosine of – at first and – at the end" in report.said_of_the_teaching(history)[1]


# ---- the page


@pytest.mark.parametrize("kind", ["shared", "per-class", "low-rank", "full", "gate", "static"])
def test_every_kind_of_teacher_has_a_page(kind, tmp_path):
    link = "sigmoid" if kind in ("shared", "per-class") else "identity"
    make = {"gate": GateTeacher, "static": static_teacher}.get(kind, l2t.Teacher)
    teacher = teacher_of("full" if make is not l2t.Teacher else kind, link, make)
    save(tmp_path, teacher, history_of(), comparison_of([0.2, 0.3], BASELINES), CONFIG)
    page = page_of(tmp_path)
    for title in ("Result", "The learned loss", "The teaching", "Settings"):
        assert title in page.text
    assert ("Soft targets" in page.text) == (kind not in ("shared", "per-class"))
    assert ("Attention over the slots" in page.text) == (kind != "static")
    assert ("Bias b" in page.text) == (link == "sigmoid")
    assert ("one line a true class" in page.text) == (kind != "shared")


def test_the_page_asks_for_nothing_and_names_what_it_shows(tmp_path):
    save(tmp_path, teacher_of(), history_of(), comparison_of([0.2, 0.3], BASELINES), CONFIG)
    (run,) = report.find_runs(tmp_path)
    path = report.write(tmp_path, [run])
    text = path.read_text()
    page = Page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    links = [value for name, value in page.attributes if name == "xlink:href"]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    drawn = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    for svg in drawn:
        ElementTree.fromstring(f'<page xmlns:xlink="links">{svg}</page>')
        assert not re.search(r"#[0-9a-f]{6}\b", svg)  # every colour is the page's, light or dark
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == len(drawn) == text.count("<svg") >= 10
    for words in (
        "test error, %",
        "dev error, %",
        "gradient norm",
        "agreement",
        "adjoint norm",
        "pull on the true logit",
    ):
        assert words in page.text
    assert "back to the last <good> teacher" in page.text  # escaped, so it comes back as it was
    assert "At the edge of the grid: focal (0.1)" in page.text
    assert "31.00 ± 1.41" in page.text  # cross-entropy's errors
    (found,) = re.findall(r"<tr class=taught><th>[^<]*</th><td>([\d.]+)</td><td>1</td>", text)
    assert found == "0.1"


def test_the_table_holds_interval_and_corrected_p_and_the_protocol_follows(tmp_path):
    comparison = comparison_of([0.20, 0.30], BASELINES)
    comparison["p"] = {"cross-entropy": 0.004, "focal": 0.002}
    comparison["p_corrected"] = {"cross-entropy": 0.012, "focal": 0.0034}
    save(tmp_path, teacher_of(), history_of(), comparison, CONFIG)
    page = page_of(tmp_path)
    text = page.text.replace("\u202f", " ")
    assert "cross-entropy31.00 ± 1.410.1−6.00−8.00 to −5.000.012" in text  # 0.004 alone would be a win
    assert "focal41.00 ± 1.410.1▲ −16.00−18.00 to −15.000.0034" in text
    assert [value for name, value in page.attributes if name == "title"] == [
        "0.004 before correction",
        "0.002 before correction",
    ]
    assert "after Holm's correction for 2 comparisons" in text
    assert (
        "no clear difference (paired t-test over 2 students, p = 0.012, corrected for 2 comparisons)" in text
    )
    assert "Every arm has <the same> students.The test set is read once." in text


def test_a_teacher_from_elsewhere_has_a_page_without_a_history(tmp_path):
    config = {**CONFIG, "taught in": "runs/a", "taught on task": "mnist1d"}
    save(tmp_path / "a", teacher_of(), None, comparison_of([0.2, 0.3], BASELINES), config)
    text = page_of(tmp_path).text
    assert "Result" in text
    assert "taught on taskmnist1d" in text
    assert "The teaching" not in text


def test_a_run_has_the_comparison_of_its_own_folder_alone(tmp_path):
    save(tmp_path, teacher_of(), history_of(), comparison_of([0.2, 0.3], BASELINES), CONFIG)
    save(tmp_path / "later", teacher_of(), history_of(), None, CONFIG)
    own, later = report.find_runs(tmp_path)
    assert own.comparison["test_error"]["taught"] == [0.2, 0.3]
    assert later.comparison is None


@pytest.mark.parametrize(("broken", "left"), [(range(3, STEPS), 3), (range(STEPS), 0)])
def test_steps_at_which_no_student_was_finite_are_left_out(broken, left, tmp_path):
    history = history_of()
    for step in broken:
        history["states"]["train_loss"][step] = None
    save(tmp_path, teacher_of(), history)
    (run,) = report.find_runs(tmp_path)
    assert [state.progress for state in run.states] == [step / STEPS for step in range(left)]
    assert ("The learned loss" in page_of(tmp_path).text) == (left > 0)


def test_the_same_run_gives_the_same_page(tmp_path):
    save(tmp_path, teacher_of(), history_of(), comparison_of([0.2, 0.3], BASELINES), CONFIG)
    runs = report.find_runs(tmp_path)
    assert report.page(runs) == report.page(runs)


def test_a_run_of_the_library_that_is_not_compared_has_a_page(tmp_path):
    save(tmp_path / "<mine>", teacher_of(), history_of(events=[], probe=[]))
    text = page_of(tmp_path / "<mine>").text
    assert "has not yet compared it with baselines" in text
    assert "<mine>" in text
    assert "The learned loss" in text
    assert "Result" not in text


def test_a_bare_teacher_has_a_page(tmp_path):
    save(tmp_path, teacher_of())
    assert "Settings" in page_of(tmp_path).text


@pytest.mark.parametrize(("content", "got"), [
    (b'{"updates": [', "what breaks off or is none (Expecting value: "), (b"", "what breaks off or is none"),
    (b"[1]", "a list"), (b"\xff", "what breaks off or is none ('utf-8' codec"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["history", "config", "comparison"])
def test_a_file_that_is_not_whole_is_named(name, content, got, tmp_path, capsys):
    save(tmp_path, teacher_of(), history_of(), comparison_of([0.2, 0.3], BASELINES), CONFIG)
    file = tmp_path / f"{name}.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        report.find_runs(tmp_path)
    sentence = f"l2t: {file} must be JSON as this library writes it, got {got}"
    assert str(caught.value).startswith(sentence)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_a_run_of_an_earlier_version_is_named(tmp_path, capsys):
    history = history_of()
    history["trial"] = {
        "chosen": "average",
        "rates": [0.1],
        "dev_error": {"average": [0.5], "neutral": [0.6]},
    }
    save(tmp_path, teacher_of(), history, comparison_of([0.2, 0.3], BASELINES), CONFIG)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert (
        f"must have expected errors, got one of an earlier version in '{tmp_path}'" in capsys.readouterr().err
    )
    assert not (tmp_path / "report.html").exists()


def test_several_teachers_stand_side_by_side_in_the_order_of_their_seeds(tmp_path):
    for seed in (10, 2):
        config = {**CONFIG, "seed": seed}
        comparison = comparison_of([0.2, 0.3], BASELINES)
        save(tmp_path / f"seed-{seed}", teacher_of(seed=seed), history_of(), comparison, config)
    assert [run.name for run in report.find_runs(tmp_path)] == ["seed-2", "seed-10"]
    text = page_of(tmp_path).text
    assert text.index("taught, seed-2") < text.index("taught, seed-10")
    assert "Settings of seed-2; the others differ in seed." in text


def test_without_matplotlib_the_command_is_named(monkeypatch, tmp_path):
    save(tmp_path, teacher_of(), history_of())
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"package matplotlib must be installed.*pip install 'l2t\[tasks\]'"
    ):
        report.page(report.find_runs(tmp_path))


def test_the_course_of_a_plan_is_drawn_as_it_is_played():
    """By hand: forward over 0 and 1, store 2 (slot 0), tape 2 and 3, reverse them, and the same from 0."""
    stretches, states, clock = figures._course(schedule.Segments(2, 1), 4)
    assert stretches == {
        Action.FORWARD: [(0, 0, 2, 2)],
        Action.TAPE: [(2, 2, 4, 4), (6, 0, 8, 2)],
        Action.REVERSE: [(4, 4, 6, 2), (8, 2, 10, 0)],
    }
    assert states == {(Action.STORE, 0): [(2, 2, 6, 2)]}
    assert clock == 10
    _, states, _ = figures._course(schedule.TwoLevel(1), 3)
    assert states == {(Action.TO_DISK, 0): [(1, 1, 6, 1)], (Action.TO_DISK, 1): [(2, 2, 4, 2)]}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (schedule.StoreAll(), ["taped", "reversed"]),
        (schedule.Segments(3, 4), ["taken to be forgotten", "remembered"]),
        (schedule.TwoLevel(90, schedule.Segments(3, 4)), ["remembered", "on disk"]),
        (schedule.TwoLevel(90, level="host"), ["in host memory"]),
    ],
)
def test_a_plan_is_a_picture_of_bounded_size(plan, words):
    every = ["taken to be forgotten", "taped", "reversed", "remembered", "in host memory", "on disk"]
    for steps in (0, 1, 1000):
        svg = figures.schedule(plan, steps)
        assert len(svg) < 500_000
    assert [word for word in every if f">{word}<" in svg and word in words] == words
    assert ">on disk<" not in svg or "on disk" in words


def test_a_run_has_a_page(tmp_path):
    student = torch.nn.Linear(1, 1)
    run = l2t.unroll(
        student,
        range(9),
        lambda model, batch, step: model.weight.square().sum(),
        lambda model: model.weight.sum(),
        schedule="every",
        curvature="recompute",
    )
    report.write_run(tmp_path / "run.html", run.report)
    before = (tmp_path / "run.html").read_text()
    assert "steps reversed" not in before
    run.backward()
    report.write_run(tmp_path / "run.html", run.report)
    page = (tmp_path / "run.html").read_text()
    for word in (
        "Segments(length=3, slots=None)",
        "steps reversed",
        "adjoint norm",
        "student step",
        "recompute",
    ):
        assert word in page
    assert page.count("<svg") == 2 == before.count("<svg") + 1
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_weight_net_is_a_baseline_and_a_static_loss_is_none():
    comparison = {
        "test_error": {
            "taught": [0.1],
            "static taught loss": [0.2],
            "Meta-Weight-Net": [0.3],
            "plain": [0.4],
        },
        "also": ["static taught loss", "Meta-Weight-Net"],
    }
    assert report.best_baseline(comparison) == "Meta-Weight-Net"
