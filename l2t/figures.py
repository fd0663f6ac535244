"""The figures of the report: each function draws one and returns it as an inline SVG element.

Colours are names of CSS variables of the page, so that a figure follows its light and its dark theme; text
stays text. What a figure shows is computed elsewhere (report.py) or by the loss itself: `learned_loss`
evaluates the teacher's loss and its gradient, no formula of it is repeated here.
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from l2t import check
from l2t.baselines import Plain, generalised_cross_entropy, label_smoothing
from l2t.reference import LINKS
from l2t.schedule import Action, Schedule
from l2t.students import cross_entropy
from l2t.teacher import StudentState, Teacher

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in these numbers and renamed to the page's variables afterwards.
SERIES = 10
STAGES = 5
LINES = 100  # of one figure: more would say no more, and a page of 1,000 classes would have 20 MB
_LOGITS = 1 << 22  # that a shape is computed by at once
_VARIABLES = (
    *("ink", "muted", "grid", "paper", "taught", "plain"),
    *(f"series-{i}" for i in range(SERIES)),
    *(f"stage-{i}" for i in range(STAGES)),
)
_COLOURS = {name: f"#0000{number + 16:02x}" for number, name in enumerate(_VARIABLES)}


def colour(name: str) -> str:
    """The stand-in that matplotlib draws for the page's colour `name`."""
    return _COLOURS[name]


_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.edgecolor": colour("muted"),
    "axes.labelcolor": colour("ink"),
    "axes.titlecolor": colour("ink"),
    "text.color": colour("ink"),
    "xtick.color": colour("muted"),
    "ytick.color": colour("muted"),
    "xtick.labelcolor": colour("ink"),
    "ytick.labelcolor": colour("ink"),
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "grid.color": colour("grid"),
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs and arms may have dollars
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _styled(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Draws in the style above and leaves the user's own as it was."""

    @functools.wraps(draw)
    def styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise check.missing_package("report", "matplotlib") from error
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of width x height CSS pixels and its axes."""
    figure, (ax,) = _panels(width, height, 1)
    return figure, ax


def _panels(
    width: float, height: float, columns: int, rows: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure of width x height CSS pixels and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 96, height / 96), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True)
    figure.patch.set_alpha(0)
    return figure, list(axes.flat)


def _svg(figure: Figure, label: str, *, broad: bool = False) -> str:
    """The figure as an SVG element that scales with the page, described by `label` for those who cannot see
    it.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": label}):  # the same ids every time
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, stand_in in _COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r"font: ((?:bold )?)([\d.]+)px [^;\"]*", _font, text)
    text = re.sub(r' ?font-family: [^;"]*;| transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r' (?:d|x|y|transform)="(?!matrix)[^"]*"', _rounded, text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    wide = float(size[1]) * 96 / 72
    box = f'viewBox="0 0 {size[1]} {size[2]}" width="{wide:.0f}"'
    kind = ' class="broad"' if broad else ""
    head = f'<svg{kind} role="img" aria-label="{html.escape(label)}" {box}>'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    return re.sub(r'<g id="[^"]*"', "<g", text)


def _font(found: re.Match[str]) -> str:
    """A text's size and weight; its family is the page's."""
    return f"font-size: {found[2]}px" + ("; font-weight: bold" if found[1] else "")


def _rounded(found: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point: a third of the bytes."""
    return re.sub(r"(\.\d\d)\d+", r"\1", found[0])


def _label_ends(
    ax: Axes, x: float, heights: Sequence[float], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Writes each line's label beside its end (x, height), moved apart where they would overlap.

    Where there are more than the axes have room for, some have theirs (`_at_even_ranks`).
    """
    to_screen = ax.transData
    points = to_screen.transform([(x, height) for height in heights])[:, 1]
    low, high = (float(edge) for edge in ax.transAxes.transform([(0, 0), (0, 1)])[:, 1])
    figure = ax.get_figure(root=True)
    assert figure is not None
    gap = 13.0 * (high - low) / (figure.get_figheight() * 96 * 0.78)  # 13 CSS pixels of an axes' height
    places: list[float] = []
    order = _at_even_ranks(points, int((high - low) / gap) + 1)
    for index in order:
        places.append(max(float(points[index]), places[-1] + gap) if places else float(points[index]))
    excess = max(0.0, places[-1] - high) if places else 0.0
    for rank in range(len(places) - 1, -1, -1):  # pushed over the top: move down from there
        ceiling = places[rank + 1] - gap if rank + 1 < len(places) else places[rank] - excess
        places[rank] = min(places[rank], ceiling)
    places = [float(to_screen.inverted().transform((0, place))[1]) for place in places]
    for place, index in zip(places, order, strict=True):
        ax.annotate(
            labels[index], (x, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
            color=colours[index], annotation_clip=False,
        )  # fmt: skip


def _at_even_ranks(ends: Any, count: int) -> Any:
    """The indices of `count` of the ends, at even ranks from the lowest to the highest; of all if they are
    no more.
    """
    order = np.argsort(np.asarray(ends), kind="stable")
    return order if len(order) <= count else order[np.linspace(0, len(order) - 1, count).round().astype(int)]


# ---- results ----


@_styled
def comparison(
    arms: Mapping[str, Sequence[float]],
    taught: Sequence[str],
    oracles: Sequence[str] = (),
    xlabel: str = "test error, %",
) -> str:
    """One row an arm: what its students came to as dots, their mean, and one standard deviation around it.

    Args:
        arms: test errors in percent, or another score, by arm, in the order of the rows from the top.
        taught: the arms to set off, by colour and by a line through their common mean.
        oracles: arms that know what nobody else does, drawn hollow.
        xlabel: what is drawn.
    """
    figure, ax = _figure(680, 52 + 27 * len(arms))
    jitter = np.random.default_rng(0)
    for row, (arm, values) in enumerate(arms.items()):
        errors = np.asarray(values)
        tint = colour("taught" if arm in taught else "plain")
        face = "none" if arm in oracles else tint
        heights = row + jitter.uniform(-0.24, 0.24, len(errors))
        ax.scatter(errors, heights, s=13, c=face, edgecolors=tint, alpha=0.5, linewidths=0.8, zorder=3)
        mean, sd = errors.mean(), errors.std(ddof=1) if len(errors) > 1 else 0.0
        ax.plot([mean - sd, mean + sd], [row, row], color=tint, linewidth=2.2, zorder=2)
        edge: Any = {"markeredgecolor": colour("paper"), "markeredgewidth": 1.4}
        ax.plot(mean, row, "o", markersize=8, color=tint, zorder=4, **edge)
    if taught:
        middle = float(np.mean([arms[arm] for arm in taught]))
        ax.axvline(middle, color=colour("taught"), linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_yticks(range(len(arms)), list(arms))
    for tick, arm in zip(ax.get_yticklabels(), arms, strict=True):
        if arm in taught:
            tick.set_color(colour("taught"))
            tick.set_fontweight("bold")
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(xlabel)
    return _svg(figure, f"{xlabel}: every student by arm, with mean and standard deviation")


@_styled
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], taught: Sequence[str], ylabel: str
) -> str:
    """What students come to over their training steps, one line an arm."""
    figure, ax = _figure(680, max(300, 17 * len(series)))  # room for every label
    others = [arm for arm in series if arm not in taught]
    tints = []
    for arm, (steps, errors) in series.items():
        if arm in taught:
            tints.append(colour("taught"))
            dash = (0, (1, 0)) if arm == taught[0] else (0, (4 + taught.index(arm), 1.5))
            ax.plot(steps, errors, color=tints[-1], linestyle=dash, linewidth=2.0, zorder=3)
        else:
            tints.append(colour(f"series-{others.index(arm) % SERIES}"))
            ax.plot(steps, errors, color=tints[-1], linewidth=1.2, zorder=2)
    final = [float(errors[-1]) for _, errors in series.values()]
    values = [value for _, errors in series.values() for value in errors]
    if min(values) > 0 and max(values) > 4 * max(final):
        _log_axis(ax, min(values), max(values))
    last = max(float(steps[-1]) for steps, _ in series.values())
    ax.set_xlim(0, last)
    ax.set_xlabel("student step")
    ax.set_ylabel(ylabel)
    _label_ends(ax, last, final, list(series), tints)
    return _svg(figure, f"{ylabel} over the students' steps")


def _log_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic y axis with plain numbers, which also has labels where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=8))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}")
    )
    ax.yaxis.set_minor_formatter(NullFormatter())


# ---- the learned loss ----


SMOOTHING = 0.1  # of the label smoothing that stands beside what was learned
ROBUSTNESS = 0.7  # q of the generalised cross-entropy beside it


def _stage_colours(count: int) -> list[str]:
    return [colour(f"stage-{round(i * (STAGES - 1) / max(1, count - 1))}") for i in range(count)]


def _percent(state: StudentState) -> str:
    return f"{float(state.progress):.0%}"


class _Shape(NamedTuple):
    """A loss along the way from wrong to right."""

    p: Tensor  # [P], probability of the true class; the rest is spread evenly
    loss: Tensor  # [C, P], less that at uniform p
    pull: Tensor  # [C, P], on the true logit

    @property
    def guess(self) -> int:
        """The column of uniform p."""
        return int((self.p - 1.0 / len(self.pull)).abs().argmin())

    def pull_at(self, p: float) -> float:
        """The pull where the student gives the true class `p`, mean over the classes."""
        return float(np.interp(p, self.p, self.pull.mean(0)))

    @property
    def rest(self) -> float | None:
        """The least p above a guess where the mean pull is over; None where it never is."""
        pull = self.pull.mean(0)
        over = (pull <= 0).nonzero().flatten()
        over = over[over > self.guess]
        if not len(over):
            return None
        after = int(over[0])
        before = after - 1
        share = float(pull[before] / (pull[before] - pull[after]))
        return float(self.p[before] + share * (self.p[after] - self.p[before]))


def _shape(
    classes: int, loss_of: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, *, alike: bool = False
) -> _Shape:
    """What `loss_of(logits, target)` gives, and by its gradient how it pulls, for each true class; where they
    are all alike, one says it for all.
    """
    p = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    p = torch.cat([p, torch.tensor([1.0 / classes], dtype=torch.float64)]).sort().values
    at_once = max(1, _LOGITS // (len(p) * classes))
    losses, pulls = [], []
    for labels in torch.arange(1 if alike else classes).split(at_once):
        target = labels.repeat_interleave(len(p))  # [labels * P]
        rows = torch.arange(len(target))
        logits = torch.zeros(len(target), classes, dtype=dtype)
        logits[rows, target] = torch.log(p / (1 - p) * (classes - 1)).to(dtype).repeat(len(labels))
        logits.requires_grad_()
        loss = loss_of(logits, target)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        losses.append(loss.detach().double().reshape(len(labels), -1))
        pulls.append(-slope[rows, target].double().reshape(len(labels), -1))
    shape = _Shape(p, torch.cat(losses).expand(classes, -1), torch.cat(pulls).expand(classes, -1))
    return shape._replace(loss=shape.loss - shape.loss[:, shape.guess, None])


def shape_of(teacher: Teacher, state: StudentState) -> _Shape:
    """The shape of the teacher's loss for a student in `state`."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return teacher.loss(logits, target, state, reduction="none")

    return _shape(teacher.num_classes, loss, next(teacher.parameters()).dtype)


def known_shapes(classes: int) -> dict[str, _Shape]:
    """The shapes of known losses by name, cross-entropy first, each times what makes it pull like
    cross-entropy at uniform p, as calibrated losses do: a factor is a matter of the learning rate.
    """
    losses = {
        "cross-entropy": cross_entropy,
        f"label smoothing {SMOOTHING:g}": label_smoothing(SMOOTHING),
        f"generalised cross-entropy, q {ROBUSTNESS:g}": generalised_cross_entropy(ROBUSTNESS),
    }

    def shape(plain: Plain) -> _Shape:
        found = _shape(
            classes, lambda logits, target: plain(logits[:, None], target[:, None]), torch.float64, alike=True
        )
        factor = (1.0 - 1.0 / classes) / found.pull[:, found.guess, None]
        return found._replace(loss=factor * found.loss, pull=factor * found.pull)

    return {name: shape(plain) for name, plain in losses.items()}


def _guess_line(ax: Axes, classes: int) -> None:
    """Marks where the student guesses: there calibrated losses pull alike."""
    tint = colour("muted")
    ax.axvline(1.0 / classes, color=tint, linewidth=0.7, linestyle=(0, (1, 2)))
    where: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    ax.annotate("guess", (1.0 / classes, 0), (3, 4), fontsize=8, color=tint, **where)


# Dashes of the known losses, in the order of `known_shapes`.
_KNOWN = (("ink", (0, (4, 3))), ("muted", (0, (1, 1.5))), ("muted", (0, (6, 2, 1, 2))))


@_styled
def learned_loss(teacher: Teacher, stages: Sequence[StudentState]) -> tuple[str, str]:
    """The pull on the true logit, and the loss, against p_y at several stages, beside those of known losses.

    The student's remaining probability is spread evenly over the other classes; a line is the mean over the
    classes. All come from the losses themselves and their gradients.
    """
    known = known_shapes(teacher.num_classes)
    drawn = [shape_of(teacher, state) for state in stages]
    found = []
    for field, ylabel in (("pull", "pull on the true logit"), ("loss", "loss, less that of a guess")):
        figure, ax = _figure(430, 360)
        for (name, shape), (tint, dash) in zip(known.items(), _KNOWN, strict=True):
            line = getattr(shape, field)[0]
            ax.plot(shape.p, line, color=colour(tint), linestyle=dash, linewidth=1.3, label=name, zorder=4)
        for tint, state, shape in zip(_stage_colours(len(stages)), stages, drawn, strict=True):
            name = f"{_percent(state)} of the run" if len(stages) > 1 else "taught"
            ax.plot(shape.p, getattr(shape, field).mean(0), color=tint, label=name, zorder=3)
        if field == "loss":  # where one leaves for infinity, it may
            shown = torch.stack([shape.loss.mean(0) for shape in (known["cross-entropy"], *drawn)])[:, 2:-2]
            ax.set_ylim(float(shown.min()) - 0.1, float(shown.max()) + 0.1)
        else:
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        _guess_line(ax, teacher.num_classes)
        ax.set_xlim(0, 1)
        ax.set_xlabel("probability that the student gives the true class")
        ax.set_ylabel(ylabel)
        figure.legend(loc="outside lower center", ncols=2)
        found.append(_svg(figure, f"{ylabel} against the probability of the true class, at several stages"))
    return found[0], found[1]


@_styled
def pull_by_class(teacher: Teacher, stages: Sequence[StudentState]) -> str | None:
    """The pull on the true logit against p_y, a line a true class, a panel a stage; None if all are alike.

    Of more than LINES classes as many are drawn, at even ranks of the pull at the last p_y and stage.
    """
    drawn = [shape_of(teacher, state) for state in stages]
    if max(float((shape.pull - shape.pull[:1]).abs().max()) for shape in drawn) < 1e-3:
        return None
    known = known_shapes(teacher.num_classes)["cross-entropy"]
    figure, axes = _panels(70 + 168 * len(stages), 220, len(stages), sharey=True)
    labels = np.sort(_at_even_ranks(drawn[-1].pull[:, -1], LINES))
    tints = [colour(f"series-{label % SERIES}") for label in labels]
    for ax, state, shape in zip(axes, stages, drawn, strict=True):
        for tint, line in zip(tints, shape.pull[labels], strict=True):
            ax.plot(shape.p, line, color=tint, linewidth=1.1)
        ax.plot(known.p, known.pull[0], color=colour("ink"), linestyle=(0, (4, 3)), linewidth=1.2)
        ax.set_title(f"{_percent(state)} of the run" if len(stages) > 1 else "taught")
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    figure.supxlabel("probability of the true class", fontsize=9)  # below one panel it would reach the next
    axes[0].set_ylabel("pull on the true logit")
    _label_ends(axes[-1], 1.0, drawn[-1].pull[labels, -1].tolist(), [str(label) for label in labels], tints)
    return _svg(figure, "Pull on the true logit by class, at several stages", broad=True)


def dense(weight: Any) -> Tensor:
    """The (C, C) matrix of a weight."""
    matrix: Tensor = weight if isinstance(weight, Tensor) else weight.dense()
    return matrix


def local_weights(teacher: Teacher, state: StudentState) -> Tensor:
    """The loss near a guess as weights of the log-probabilities, ``-∂ℓ_y/∂log p_j`` at uniform p: (C, C).

    Cross-entropy has the identity, and so has every calibrated loss without off-diagonals but for a factor a
    row.
    """
    weight, bias, scale = teacher(state)
    table = dense(weight).detach().double()
    zeros = table.new_zeros(len(table))
    bias = zeros if bias is None else bias.detach().double()
    scale = zeros + 1 if scale is None else scale.detach().double()
    u = (bias - table.sum(1) * math.log(len(table))).requires_grad_()
    (slope,) = torch.autograd.grad(LINKS[teacher.link](u).sum(), u)
    return (scale * slope)[:, None] * table


def emphasis(teacher: Teacher, state: StudentState) -> Tensor:
    """How much a sample of each class counts near a guess, (C,): the pull on its true logit at uniform p, in
    that of cross-entropy.
    """
    classes = teacher.num_classes
    logits = torch.zeros(classes, classes, dtype=next(teacher.parameters()).dtype, requires_grad=True)
    losses = teacher.loss(logits, torch.arange(classes), state, reduction="none")
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    return -slope.diagonal().double() / (1.0 - 1.0 / classes)


def soft_targets(teacher: Teacher, state: StudentState) -> Tensor:
    """The weights of the log-probabilities near a guess, (C, C), each row by its emphasis: what a class is
    told to look like, whatever it counts. Cross-entropy has the identity, and so has every loss without
    off-diagonals.
    """
    return local_weights(teacher, state) / emphasis(teacher, state)[:, None]


def smoothed_targets(classes: int) -> Tensor:
    """The same of label smoothing: its targets over the pull 1 - e that they leave at uniform p."""
    return torch.eye(classes, dtype=torch.float64) + SMOOTHING / classes / (1.0 - SMOOTHING)


@_styled
def class_by_class(teacher: Teacher, stages: Sequence[StudentState]) -> tuple[str, float] | None:
    """Heat maps of the soft targets, of their difference to those of known losses, and the emphasis by class:
    a row of panels a stage. Also the weight of full colour, 0 where there are no heat maps. None where every
    class has its own label for a target and all count alike.
    """
    classes = teacher.num_classes
    identity = torch.eye(classes, dtype=torch.float64)
    targets = [soft_targets(teacher, state) for state in stages]
    weights = [emphasis(teacher, state) for state in stages]
    bound = max(float((target - identity).abs().max()) for target in targets)
    width = max(float((weight - 1).abs().max()) for weight in weights)
    maps: dict[str, Tensor] = {}
    if bound > 1e-6:
        maps = {"taught": torch.zeros_like(identity), "less cross-entropy": identity}
        maps[f"less label smoothing {SMOOTHING:g}"] = smoothed_targets(classes)
    count = len(maps) + (width > 1e-4)
    if count == 0:
        return None
    figure, axes = _panels(70 + 172 * count, 40 + 180 * len(stages), count, len(stages), sharey=True)
    every = np.arange(0, classes, 1 + (classes - 1) // 12)
    for number, (state, target, weight) in enumerate(zip(stages, targets, weights, strict=True)):
        row = axes[count * number : count * (number + 1)]
        for ax, (title, less) in zip(row, maps.items(), strict=False):
            _heat(ax, ((target - less) / bound).numpy())
            ax.set_title(title if number == 0 else "")
            ax.set_xticks(every, every)
            ax.set_xlabel("class" if state is stages[-1] else "")
        if len(row) > len(maps):
            ax = row[-1]
            ax.hlines(range(classes), 1.0, weight, color=colour("taught"), linewidth=2.0)
            ax.plot(weight, range(classes), "o", color=colour("taught"), markersize=3.5)
            ax.axvline(1.0, color=colour("ink"), linestyle=(0, (4, 3)), linewidth=1.0)
            ax.set_xlim(1 - 1.1 * width, 1 + 1.1 * width)
            ax.set_title("emphasis" if number == 0 else "")
            ax.set_xlabel("cross-entropy has 1" if state is stages[-1] else "")
        row[0].set_yticks(every, every)
        row[0].set_ylim(classes - 0.5, -0.5)
        when = f"{_percent(state)} of the run\n" if len(stages) > 1 else ""
        row[0].set_ylabel(f"{when}true class")
    return _svg(
        figure, "Soft targets and emphasis class by class, at several stages", broad=True
    ), bound if maps else 0.0


# In the middle of light and dark, so that they are seen on either page: an image cannot follow its theme.
_PLUS, _MINUS = (59, 130, 246), (239, 68, 68)


def block(classes: int) -> int:
    """How many classes a side a cell of a heat map stands for: there are 250 cells a side at most."""
    return -(-classes // 250)


def _heat(ax: Axes, values: Any) -> None:
    """Cells in the colour of their sign, the more opaque the larger; full colour is 1. A cell that stands for
    several values has the largest.
    """
    side = block(len(values))
    cells = -(-len(values) // side)
    padded = np.pad(values, (0, cells * side - len(values)))
    values = padded.reshape(cells, side, cells, side).swapaxes(1, 2).reshape(cells, cells, -1)
    values = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)[..., 0]
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    pixels = np.zeros((*values.shape, 4))
    pixels[..., :3] = np.where((values > 0)[..., None], _PLUS, _MINUS) / np.float64(255)
    pixels[..., 3] = np.abs(values).clip(0.03, 1)
    end = side * cells - 0.5
    ax.imshow(pixels, interpolation="none", aspect="auto", extent=(-0.5, end, end, -0.5))


@_styled
def over_progress(
    values: Tensor,
    progress: Sequence[float],
    ylabel: str,
    names: Sequence[str],
    reference: float | None = None,
    *,
    log: bool = False,
) -> str:
    """Numbers of the teacher along a student's run: values (T, n), one line a column.

    Of more than LINES columns as many are drawn, at even ranks of the last values.
    """
    figure, ax = _figure(430, 250)
    shown = np.sort(_at_even_ranks(values[-1], LINES))
    values, names = values[:, shown], [names[column] for column in shown]
    columns = values.shape[1]
    tints = [colour(f"series-{i % SERIES}") for i in range(columns)]
    if reference is not None:
        ax.axhline(reference, color=colour("ink"), linestyle=(0, (4, 3)), linewidth=1.0)
    for column in range(columns):
        ax.plot(progress, values[:, column], color=tints[column], linewidth=1.4)
    spread = float(values.max() - values.min())
    if reference is not None:
        spread = max(spread, abs(float(values.mean()) - reference))
    if spread < 1e-3 * max(1e-9, float(values.abs().max())):
        middle = float(values.mean())
        ax.set_ylim(middle - 0.05 * max(1.0, abs(middle)), middle + 0.05 * max(1.0, abs(middle)))
    elif log:
        _log_axis(ax, float(values.min()), float(values.max()))
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("share of the student's run")
    ax.set_ylabel(ylabel)
    if columns > 1:
        _label_ends(ax, float(progress[-1]), values[-1].tolist(), names, tints)
    return _svg(figure, f"{ylabel} over the student's run")


@_styled
def mix(shares: Tensor, progress: Sequence[float]) -> str:
    """The attention over the K slots along a student's run: shares (T, K) that sum to one."""
    figure, ax = _figure(430, 250)
    slots = shares.shape[1]
    tints = [colour(f"series-{i % SERIES}") for i in range(slots)]
    ax.stackplot(progress, shares.T, colors=tints, alpha=0.75, linewidth=0)
    upper = shares[-1].cumsum(0)
    middle = upper - shares[-1] / 2
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.grid(False)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("share of the student's run")
    ax.set_ylabel("attention")
    _label_ends(ax, float(progress[-1]), middle.tolist(), [f"slot {i + 1}" for i in range(slots)], tints)
    return _svg(figure, "Attention over the slots along the student's run")


# ---- the teaching ----


@_styled
def history(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    ylabel: str,
    *,
    log: bool = False,
    marks: Mapping[str, Sequence[float]] | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """A number of the teaching over its updates, one line a teacher, faint as measured and bold as a running
    median.

    Args:
        series: updates and values by teacher; None is a gap.
        ylabel: what is drawn.
        log: on a logarithmic scale.
        marks: updates at which a teacher was taken back by the guard, drawn as upright lines.
        limits: of the y axis.
    """
    figure, ax = _figure(430, 240)
    handles = []
    everything: list[float] = []
    for number, (name, (updates, values)) in enumerate(series.items()):
        tint = colour("taught") if len(series) == 1 else colour(f"series-{number % SERIES}")
        numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
        if log:
            numbers[numbers <= 0] = np.nan
        everything.extend(numbers[np.isfinite(numbers)].tolist())
        ax.plot(updates, numbers, color=tint, alpha=0.3, linewidth=0.9)
        handles += ax.plot(updates, _running_median(numbers), color=tint, linewidth=1.7, label=name)
        for update in (marks or {}).get(name, ()):
            ax.axvline(update, color=tint, linewidth=1.0, linestyle=(0, (2, 2)))
    if everything and min(everything) > 0 and (log or max(everything) > 20 * np.median(everything)):
        _log_axis(ax, min(everything), max(everything))
    if limits is not None:
        ax.set_ylim(*limits)
        if limits[0] < 0 < limits[1]:
            ax.axhline(0, color=colour("muted"), linewidth=0.8)
    ax.set_xlabel("teacher update")
    ax.set_ylabel(ylabel)
    if len(series) > 1:
        ax.legend(handles=handles, loc="best")
    return _svg(figure, f"{ylabel} over the teacher's updates")


def _running_median(values: Any, window: int = 7) -> Any:
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmedian(part) if np.isfinite(part).any() else np.nan for part in parts])


@_styled
def adjoint(norms: Mapping[str, Sequence[float]]) -> str:
    """Norm of the adjoint of the student's weights by step, one line an update: how far back the measure
    reaches. Lines without names have no legend.
    """
    figure, ax = _figure(430, 250)
    everything: list[float] = []
    for tint, (name, values) in zip(_stage_colours(len(norms)), norms.items(), strict=True):
        numbers = np.array(values, dtype=float)
        numbers[~(np.isfinite(numbers) & (numbers > 0))] = np.nan
        everything.extend(numbers[np.isfinite(numbers)].tolist())
        ax.plot(range(len(values)), numbers, color=tint, label=name)
    if everything:
        _log_axis(ax, min(everything), max(everything))
    ax.set_xlabel("student step")
    ax.set_ylabel("adjoint norm")
    if any(norms):
        ax.legend(loc="best", title="at update")
    return _svg(figure, "Norm of the adjoint by step" + ", at several updates" * any(norms))


_KINDS = {
    "taken to be forgotten": (Action.FORWARD, colour("plain"), 0.9),
    "taped": (Action.TAPE, colour("series-0"), 1.7),
    "reversed": (Action.REVERSE, colour("taught"), 1.7),
}
_LEVELS: dict[Action, Any] = {Action.STORE: "-", Action.TO_HOST: (0, (5, 1.5)), Action.TO_DISK: (0, (1, 1))}


@_styled
def schedule(plan: Schedule, steps: int) -> str:
    """A plan as a picture: which step is taken or reversed when, and from when to when a state is remembered.

    Each slot has a colour; a state in host memory is dashed, one on disk dotted.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    stretches, states, clock = _course(plan, steps)
    width, height = 640, 300
    figure, ax = _figure(width, height)

    def drawn(lines: Sequence[_Line], tint: str, **style: Any) -> None:
        # Lines that the picture cannot tell apart are drawn once.
        x, y = max(clock, 1) / width, max(steps, 1) / height
        places = dict.fromkeys(
            (round(a / x), round(b / y), round(c / x), round(d / y)) for a, b, c, d in lines
        )
        found = [((a * x, b * y), (c * x, d * y)) for a, b, c, d in places]
        ax.add_collection(LineCollection(found, colors=tint, capstyle="butt", **style))

    handles = []
    for name, (kind, tint, linewidth) in _KINDS.items():
        if stretches[kind]:
            drawn(stretches[kind], tint, linewidths=linewidth)
            handles.append(Line2D([], [], color=tint, linewidth=linewidth, label=name))
    for (kind, slot), lines in states.items():
        tint = colour(f"series-{1 + slot % (SERIES - 1)}")
        drawn(lines, tint, linewidths=1.2, linestyles=[_LEVELS[kind]])
    for kind, style in _LEVELS.items():
        if any(kind is other for other, _ in states):
            where = {Action.STORE: "remembered", Action.TO_HOST: "in host memory", Action.TO_DISK: "on disk"}[
                kind
            ]
            handles.append(
                Line2D([], [], color=colour("series-1"), linewidth=1.2, linestyle=style, label=where)
            )
    ax.set_xlim(0, max(clock, 1))
    ax.set_ylim(0, max(steps, 1))
    ax.set_xlabel("steps taken and reversed so far")
    ax.set_ylabel("student step")
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure, f"The plan {plan} for {steps} steps", broad=True)


_Line = tuple[float, float, float, float]


def _course(
    plan: Schedule, steps: int
) -> tuple[dict[Action, list[_Line]], dict[tuple[Action, int], list[_Line]], int]:
    """The stretches of a plan by kind, the lives of its states by level and slot, and the time it takes.

    A line is (begin, step, end, step); a slot is the lowest number that is free.
    """
    stretches: dict[Action, list[_Line]] = {kind: [] for kind, _, _ in _KINDS.values()}
    states: dict[tuple[Action, int], list[_Line]] = {}
    kept: dict[int, tuple[Action, int, int]] = {}
    clock, last = 0, None
    for action, step in plan.actions(steps):
        if action in stretches:
            begin, end = (step + 1, step) if action is Action.REVERSE else (step, step + 1)
            lines = stretches[action]
            if last is action and lines[-1][3] == begin:
                lines[-1] = (*lines[-1][:2], clock + 1, end)
            else:
                lines.append((clock, begin, clock + 1, end))
            clock += 1
        elif action in _LEVELS:
            taken = {slot for level, slot, _ in kept.values() if level is action}
            kept[step] = action, next(i for i in range(len(taken) + 1) if i not in taken), clock
        elif action is Action.DROP:
            level, slot, begin = kept.pop(step)
            states.setdefault((level, slot), []).append((begin, step, clock, step))
        last = action
    return stretches, states, clock
