"""Teaching a long run by short ones: the token teacher's gradient through windows of a translator's run.

    pool      a student is trained for the whole run under the teacher; its states at several stages are kept
              (weights, the optimiser's state, progress, running means), and the pool is made anew every so
              many updates
    window    from a state of the pool a student takes T steps under the teacher; the reverse pass gives the
              gradient of the dev measure where it ends to the teacher (docs/math.md, sections 5 and 9); or,
              where that is noise, an antithetic pair of perturbed teachers gives it of the smoothed measure
    level     the same window under the neutral teacher: stages differ far more than teachers do, so what a
              window says of the teacher is how far it ends from there (whole runs begin alike and need none)
    update    the windows of all stages are clipped, averaged, and Adam takes a step: the outer loop of
              l2t.teach, with its guard, average, checkpoints and history
    trial     at the end whole runs of the same students, under what was taught, what it started as and label
              smoothing of other strengths: the result is what translates dev best

Not here: what the teacher sets (token_teacher.py), and translators that are to be compared (course.py).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from l2t import check
from l2t.files import read_tensors, write_tensors
from l2t.linear import dynamic_linear_loss
from l2t.optim import SGD, Adam, Hyper, Optimizer, Point, Slot, Tensors
from l2t.students import Make, evaluating, seed_of, seeded
from l2t.tape import Student
from l2t.teach import Episode, Outer, Rules, modules_of, threads
from l2t.teacher import AnyTeacher, StudentState
from l2t.translation.batches import IGNORE, Batch
from l2t.translation.course import rise_and_fall
from l2t.translation.decode import greedy
from l2t.translation.expected_bleu import expected_bleu, words
from l2t.translation.scores import ROWS, bleu, metric_of, stretches
from l2t.translation.token_teacher import TRACKED, TokenTeacher, TokenTracker
from l2t.unroll import unroll

OPTIMIZERS = ("adam", "sgd")
GRADIENTS = ("reverse", "evolution")
KNOWN = (0.1, 0.2, 0.4, 0.8)
"""Strengths of label smoothing that what was taught has to be ahead of."""

SHARPNESS = 2.0
"""What calibrated logits are multiplied by in measures that stand for what a greedy search finds."""

_PIECE = 200  # steps of a run of the trial between checkpoints


class Indexed(Protocol):
    """The batches of a course: ``batches[k]`` is the k-th, without end."""

    def __getitem__(self, index: int, /) -> Batch: ...


MakeBatches = Callable[[int], Indexed]
"""The batches of a course of this seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowRecipe(Rules):
    """How translators are trained and how a teacher learns from windows of their runs: JSON-able.

    The other settings are those of :class:`l2t.Recipe` of the same names: ``students`` is the number of
    windows an update.

    Args:
        run_steps: steps of the whole run, over which progress goes from 0 to 1.
        steps: steps T of a window.
        optimizer: of the students, ``"adam"`` or ``"sgd"``.
        lr: its learning rate at the highest.
        lr_warmup: steps over which it rises, half of the run at most; from there it falls along a line that
            would reach 0 at the end.
        lr_betas: of Adam.
        momentum: of SGD.
        clip_norm: the students' gradients are clipped to this norm; None leaves them.
        measure: what the teacher lowers on dev: ``"expected-error"`` (1 - p_y, mean over tokens),
            ``"cross-entropy"`` (nats a token), ``"calibrated-cross-entropy"`` (each student's at its own best
            temperature, so that no teacher gains by making students more or less sure), ``"expected-bleu"``
            (1 - expected sentence BLEU), ``"sharp-error"`` or ``"sharp-bleu"`` (with the logits of twice that
            inverse temperature, near to what a greedy search finds).
        dev_batches: batches of dev that a window is measured on, drawn anew for each, one from each of so
            many equal stretches.
        samples: translations of each sentence, for expected BLEU.
        gradient: how a window gives the teacher's gradient. ``"reverse"``, the reverse pass: exact, and noise
            where a window is chaotic (docs/math.md, section 5). ``"evolution"``: from two runs, whose
            teachers' parameters are moved by a normal perturbation and by its negative, the gradient of the
            measure's mean over such perturbations, for teachers of few numbers. It makes no reverse pass, so
            ``truncate``, ``damping`` and ``growth`` are refused with it, and ``curvature``, ``schedule`` and
            ``memory`` have no part in it; with windows of the whole run it sees all that a loss does to it.
        spread: the perturbation's standard deviation.
        stages: states of a run that a pool holds; windows of an update are spread evenly over them.
        refresh: updates after which a new pool is made, for the price of a run.
        trial_runs: whole runs by which at the end, with a guard, what was taught, what it started as and
            label smoothing of 0.1, 0.2, 0.4 and 0.8 are each judged; 0 judges what was taught on windows.

    Example:
        >>> from l2t.translation.windows import WindowRecipe
        >>> recipe = WindowRecipe(run_steps=400, steps=20)
        >>> WindowRecipe(**recipe.to_json()) == recipe
        True
        >>> [round(recipe.rate(step) / recipe.lr, 4) for step in (0, 199, 200, 399)]
        [0.005, 1.0, 1.0, 0.005]

    Source: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning"
    (arXiv 2017), and Metz et al., "Understanding and correcting pathologies in the training of learned
    optimizers" (ICML 2019), for ``"evolution"``.
    """

    run_steps: int = 5000
    steps: int = 50
    optimizer: str = "adam"
    lr: float = 0.003
    lr_warmup: int = 200
    lr_betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.9
    clip_norm: float | None = 1.0
    measure: str = "sharp-error"
    dev_batches: int = 4
    samples: int = 4
    gradient: str = "reverse"
    spread: float = 0.3
    stages: int = 8
    refresh: int = 25
    trial_runs: int = 1
    teacher_lr: float = 0.05
    curvature: str = "recompute"
    memory: int | str | None = "1GB"

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before any work is done."""
        super().__post_init__()
        op = type(self).__name__
        for name in ("run_steps", "steps", "dev_batches", "stages", "refresh"):
            check.recipe_count(name, getattr(self, name), 1, op)
        for name in ("lr_warmup", "trial_runs"):
            check.recipe_count(name, getattr(self, name), 0, op)
        check.recipe_count("samples", self.samples, 2, op)
        check.recipe_number("lr", self.lr, 0.0, math.inf, open_low=True, op=op)
        check.recipe_number("momentum", self.momentum, 0.0, 1.0, op=op)
        if self.clip_norm is not None:
            check.recipe_number("clip_norm", self.clip_norm, 0.0, math.inf, open_low=True, op=op)
        check.recipe_choice("optimizer", self.optimizer, OPTIMIZERS, op)
        check.recipe_choice("measure", self.measure, MEASURES, op)
        check.recipe_choice("gradient", self.gradient, GRADIENTS, op)
        check.recipe_number("spread", self.spread, 0.0, math.inf, open_low=True, op=op)
        check.recipe_numbers("lr_betas", self.lr_betas, 2, op)
        object.__setattr__(self, "lr_betas", tuple(self.lr_betas))
        check.window_fits(self.steps, self.run_steps)
        if self.gradient == "evolution":
            of_reverse = {"truncate": None, "growth": None, "damping": 1.0}
            unused = [name for name, value in of_reverse.items() if getattr(self, name) != value]
            check.window_gradient(self.gradient, unused)

    def rate(self, step: int) -> float:
        """The students' learning rate at a step of the whole run."""
        return self.lr * rise_and_fall(step, self.run_steps, self.lr_warmup)

    def student_optimizer(self, first: int = 0) -> SGD | Adam:
        """The students' optimiser, whose step 0 is the step ``first`` of the whole run."""

        def lr(step: int) -> float:
            return self.rate(first + step)

        if self.optimizer == "sgd":
            return SGD(lr, self.momentum, clip_norm=self.clip_norm)
        return Adam(lr, self.lr_betas, clip_norm=self.clip_norm)


def _token_error(student: Any, batches: Sequence[Batch], _: int) -> Tensor:
    return _mean_error(student, *_rows_of_tokens(student, batches), 1.0)


def _sharp_error(student: Any, batches: Sequence[Batch], _: int) -> Tensor:
    rows = _rows_of_tokens(student, batches)
    return _mean_error(student, *rows, SHARPNESS * _calibration(student, *rows))


def _mean_error(student: Any, hidden: Tensor, target: Tensor, beta: float | Tensor) -> Tensor:
    return -torch.expm1(-_scaled_loss(student, hidden, target, beta, "none")).mean()


def _cross_entropy(student: Any, batches: Sequence[Batch], _: int) -> Tensor:
    return _scaled_loss(student, *_rows_of_tokens(student, batches), 1.0)


def _calibrated_cross_entropy(student: Any, batches: Sequence[Batch], _: int) -> Tensor:
    rows = _rows_of_tokens(student, batches)
    return _scaled_loss(student, *rows, _inverse_temperature(student, *rows))


def _lost_bleu(student: Any, batches: Sequence[Batch], samples: int) -> Tensor:
    return _mean_lost_bleu(student, batches, samples, 1.0)


def _sharp_lost_bleu(student: Any, batches: Sequence[Batch], samples: int) -> Tensor:
    sharpness = SHARPNESS * _calibration(student, *_rows_of_tokens(student, batches))
    return _mean_lost_bleu(student, batches, samples, sharpness)


def _mean_lost_bleu(
    student: Any, batches: Sequence[Batch], samples: int, sharpness: float | Tensor
) -> Tensor:
    found = [
        expected_bleu(
            student, batch.source, batch.target_out, samples, 2 * batch.target_out.shape[1], sharpness
        )
        for batch in batches
    ]
    return 1.0 - torch.cat(found).mean()


def _rows_of_tokens(student: Any, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:  # [N, D], [N]
    counted = [batch.target_out != IGNORE for batch in batches]
    pairs = list(zip(batches, counted, strict=True))
    hidden = torch.cat([student(batch.source, batch.target_in)[rows] for batch, rows in pairs])
    return hidden, torch.cat([batch.target_out[rows] for batch, rows in pairs])


def _inverse_temperature(student: Any, hidden: Tensor, target: Tensor) -> float:
    return inverse_temperature(hidden, student.head, student.head_bias, target)


def _scaled_loss(
    student: Any, hidden: Tensor, target: Tensor, beta: float | Tensor, reduction: str = "mean"
) -> Tensor:
    bias = None if student.head_bias is None else beta * student.head_bias
    return dynamic_linear_loss(
        beta * hidden, student.head, target, head_bias=bias, link="identity", reduction=reduction
    )


def _calibration(student: Any, hidden: Tensor, target: Tensor) -> Tensor:
    """A student's :func:`inverse_temperature` on tokens, 0-dim, with its derivative where grad is enabled.

    It is where the slope of the loss to it is 0, so a step of Newton's method from there, which leaves its
    value as it is, has the derivative that the implicit function theorem says it has. At a bound of the
    search, where a student that knows nothing ends, it does not move.
    """
    found = hidden.new_tensor(_inverse_temperature(student, hidden, target))
    if not torch.is_grad_enabled() or abs(math.log(found)) > 3.99:
        return found
    beta = found.clone().requires_grad_()
    loss = _scaled_loss(student, hidden, target, beta)
    (slope,) = torch.autograd.grad(loss, beta, create_graph=True)
    (growth,) = torch.autograd.grad(slope, beta, retain_graph=True)
    step = slope / growth
    return found - (step - step.detach())


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int((batch.target_out != IGNORE).sum()) for batch in batches)


@torch.no_grad()
def inverse_temperature(
    hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor, rows: int = ROWS
) -> float:
    """What the logits of tokens are to be multiplied by for the least mean cross-entropy.

    Between exp(-4) and exp(4), to a ten-thousandth; of :func:`l2t.students.inverse_temperature` for logits
    that are never held at once: the derivative to it, the sum of E_p[z] - z_y, grows with it by the sum of
    Var_p[z], so Newton's method finds its zero, held to the bracket that is known.

    Args:
        hidden: (N, D), of which ``head`` makes logits.
        head: (V, D).
        head_bias: (V,) or None.
        target: (N,) int64, every one a token.
        rows: tokens whose logits are held at a time.

    Example:
        >>> import torch
        >>> from l2t.translation.windows import inverse_temperature
        >>> hidden, head = torch.ones(4, 1), torch.tensor([[0.0], [1.0]])
        >>> round(inverse_temperature(hidden, head, None, torch.tensor([1, 1, 1, 0])), 3)  # log 3
        1.099

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; docs/math.md, section 7.
    """
    low, high, beta = math.exp(-4.0), math.exp(4.0), 1.0
    for _ in range(30):
        slope = growth = 0.0
        for z, wanted in stretches(hidden, head, head_bias, target, rows):
            p = torch.softmax(beta * z, -1)
            mean = (p * z).sum(-1)
            slope += float((mean - z.gather(-1, wanted[:, None])[:, 0]).sum())
            growth += float(((p * z * z).sum(-1) - mean * mean).sum())
        low, high = (low, beta) if slope > 0.0 else (beta, high)
        newton = beta - slope / growth if growth > 0.0 else math.nan
        before, beta = beta, newton if low < newton < high else math.sqrt(low * high)
        if abs(beta - before) < 1e-4 * beta:
            break
    return beta


MEASURES: dict[str, Callable[[Any, Sequence[Batch], int], Tensor]] = {
    "calibrated-cross-entropy": _calibrated_cross_entropy,
    "cross-entropy": _cross_entropy,
    "expected-error": _token_error,
    "expected-bleu": _lost_bleu,
    "sharp-error": _sharp_error,
    "sharp-bleu": _sharp_lost_bleu,
}


def measured(student: nn.Module, batches: Sequence[Batch], measure: str, samples: int = 4) -> Tensor:
    """A measure of MEASURES over batches, in evaluation mode: 0-dim, differentiable."""
    with evaluating(student):
        return MEASURES[measure](student, batches, samples)


@torch.no_grad()
def wrong_tokens(student: Any, batches: Sequence[Batch]) -> float:
    """The share of tokens that are not the likeliest, in evaluation mode: no temperature changes it."""
    right = 0
    with evaluating(student):
        for batch in batches:
            hidden = student(batch.source, batch.target_in)
            for logits, wanted in stretches(hidden, student.head, student.head_bias, batch.target_out):
                right += int((logits.argmax(-1) == wanted).sum())
    return 1.0 - right / _tokens(batches)


def lost_bleu(student: Any, batches: Sequence[Batch]) -> float:
    """1 - BLEU, from 0 to 1, of greedy translations of all batches, with pieces for words.

    Raises:
        ImportError: as :func:`l2t.translation.scores.bleu`.
    """

    def texts(rows: Iterable[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, words(row))) for row in rows]

    said, wanted = list[str](), list[str]()
    with evaluating(student):
        for batch in batches:
            said += texts(greedy(student, batch.source))
            wanted += texts(batch.target_out.tolist())
    return 1.0 - bleu(said, wanted).value / 100.0


class Stage(NamedTuple):
    """A student on its way: what a run goes on from.

    Attributes:
        step: how many steps of the whole run it has taken.
        weights: parameters and buffers by name.
        slots: what the optimiser keeps of each trained parameter.
        state: what the teacher sees of it.
    """

    step: int
    weights: dict[str, Tensor]
    slots: list[Slot]
    state: StudentState


class _From(Optimizer):
    """An optimiser that begins with slots that it has been left with."""

    def __init__(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        self._optimizer, self._slots = optimizer, slots
        self.reads, self.slot_names = optimizer.reads, optimizer.slot_names

    def bound(self, names: Sequence[Sequence[str]], weights: Sequence[Tensor]) -> Optimizer:
        return _From(self._optimizer.bound(names, weights), self._slots)

    def settings(self) -> Callable[[int], Hyper]:
        return self._optimizer.settings()

    def start(self, weights: Tensors) -> list[Slot]:
        return [tuple(x.clone() if isinstance(x, Tensor) else x for x in slot) for slot in self._slots]

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        return self._optimizer.update(point)

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> Any:
        return self._optimizer.transpose(point, v_w, v_slots)


class _Taught:
    """The loss of a step from ``stage`` on, as :func:`l2t.unroll` wants it."""

    def __init__(self, teacher: TokenTeacher, recipe: WindowRecipe, stage: Stage) -> None:
        self.teacher, self.first = teacher, stage.step
        self.tracker = TokenTracker(teacher.num_classes, recipe.run_steps, stage.step, stage.state)

    def __call__(self, student: Any, batch: Batch, step: int) -> Tensor:
        at, given = self.first + step, (student.head, student.head_bias, batch.target_out)
        hidden = student(batch.source, batch.target_in)
        state = self.tracker.state(at)
        self.tracker.update(at, hidden, *given)
        return self.teacher.loss(hidden, *given, state)


def fresh(student: nn.Module, recipe: WindowRecipe, vocabulary: int) -> Stage:
    """A student before its first step."""
    slots = recipe.student_optimizer().start([*Student(student).parameters])
    tracker = TokenTracker(vocabulary, recipe.run_steps)
    return Stage(0, _copied(student), slots, tracker.state(0))


def _copied(student: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def _stand(student: nn.Module, stage: Stage) -> None:
    """Give a student the weights of a stage."""
    student.load_state_dict(stage.weights)
    torch.clear_autocast_cache()  # it holds casts of the weights before


def advance(
    student: nn.Module,
    stage: Stage,
    teacher: TokenTeacher,
    batches: Sequence[Batch],
    recipe: WindowRecipe,
    seed: int,
) -> Stage:
    """Train on from ``stage`` over ``batches`` under the teacher; ``student`` is what it runs in.

    The steps are those that a window takes.
    """
    with seeded(seed):
        return _advanced(student, stage, teacher, batches, recipe)


def _advanced(
    student: nn.Module, stage: Stage, teacher: TokenTeacher, batches: Sequence[Batch], recipe: WindowRecipe
) -> Stage:
    """The same, what is random from torch's generator."""
    _stand(student, stage)
    student.train()
    places = Student(student)
    weights: Any = places.parameters
    optimizer = recipe.student_optimizer(stage.step).bound(places.aliases, weights)
    loss, settings, slots = _Taught(teacher.fixed(), recipe, stage), optimizer.settings(), stage.slots
    for step, batch in enumerate(batches):
        grads = torch.autograd.grad(loss(student, batch, step), weights, materialize_grads=True)
        with torch.no_grad():
            point = Point([w.detach() for w in weights], slots, grads, settings(step), range(len(weights)))
            after, slots = optimizer.update(point)  # type: ignore[assignment]
            for weight, value in zip(weights, after, strict=True):
                weight.copy_(value)
        torch.clear_autocast_cache()  # it holds casts of the weights before
    end = stage.step + len(batches)
    return Stage(end, _copied(student), list(slots), loss.tracker.state(end))


def make_pool(
    student: nn.Module,
    teacher: TokenTeacher,
    batches: Indexed,
    recipe: WindowRecipe,
    seed: int,
    progress: bool = False,
) -> tuple[list[Stage], Stage]:
    """Train ``student`` for a whole run under the teacher: its states at stages of it, and the last one.

    The run is cut into ``recipe.stages`` equal parts, with a stage at a random step of each from which a
    window ends within the run.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, 1))
    jitter = torch.rand(recipe.stages, generator=generator, dtype=torch.float64)
    room = (recipe.run_steps - recipe.steps + 1) / recipe.stages
    stops = [int((place + float(x)) * room) for place, x in enumerate(jitter)]
    stage, pool = fresh(student, recipe, teacher.num_classes), []
    for place, stop in enumerate(tqdm([*stops, recipe.run_steps], disable=not progress, desc="pool")):
        part = [batches[step] for step in range(stage.step, stop)]
        stage = advance(student, stage, teacher, part, recipe, seed_of(seed, 2, place))
        pool.append(stage)
    return pool[:-1], pool[-1]


class _Given(NamedTuple):
    """What a window takes, but for the teacher: the arguments of :func:`window`."""

    student: nn.Module
    stage: Stage
    batches: Sequence[Batch]
    dev: Sequence[Batch]
    recipe: WindowRecipe
    seed: int


class Window(NamedTuple):
    """What a window says of the teacher.

    Attributes:
        before: the measure where it begins.
        after: and where it ends; of a pair of perturbed teachers, the mean.
        error: :func:`wrong_tokens` of dev where it ends, as well.
        gradient: of ``after`` to the teacher's parameters, (P,); 0 to those that are frozen.
        adjoint_norms: of its reverse pass; empty without one.
    """

    before: float
    after: float
    error: float
    gradient: Tensor
    adjoint_norms: list[float]


def window(
    teacher: TokenTeacher,
    student: nn.Module,
    stage: Stage,
    batches: Sequence[Batch],
    dev: Sequence[Batch],
    recipe: WindowRecipe,
    seed: int,
) -> Window:
    """Steps from ``stage`` on over ``batches`` under the teacher, and what they say of it.

    Args:
        teacher: its ``.grad`` is left as it was.
        student: what it runs in; its weights are afterwards those of ``stage``.
        stage: where it begins.
        batches: one a step.
        dev: what is measured on.
        recipe: the settings.
        seed: of dropout, and of samples.
    """
    _stand(student, stage)
    with seeded(seed_of(seed, 1)), torch.no_grad():
        before = float(measured(student, dev, recipe.measure, recipe.samples))
    given = _Given(student, stage, batches, dev, recipe, seed_of(seed, 2))
    way = _reversed if recipe.gradient == "reverse" else _evolved
    after, error, gradient, norms = way(teacher, given)
    return Window(before, after, error, gradient, norms)


Gradient = tuple[float, float, Tensor, list[float]]
"""A window's fields but for the first."""


def _reversed(teacher: TokenTeacher, given: _Given) -> Gradient:
    """By the reverse pass."""
    student, stage, batches, dev, recipe, seed = given
    student.train()
    learner = copy.deepcopy(teacher)
    parameters = list(learner.parameters())
    errors: list[float] = []

    def measure(model: nn.Module) -> Tensor:
        errors.append(wrong_tokens(model, dev))
        return measured(model, dev, recipe.measure, recipe.samples)

    with seeded(seed):
        run = unroll(
            student,
            batches,
            _Taught(learner, recipe, stage),
            measure,
            optimizer=_From(recipe.student_optimizer(stage.step), stage.slots),
            meta=[x for x in parameters if x.requires_grad],
            curvature=recipe.curvature,
            schedule=recipe.schedule,
            memory=recipe.memory,
            truncate=recipe.truncate,
            damping=recipe.damping,
            growth=recipe.growth,
        )
        run.backward()
    gradient = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in parameters])
    return float(run.measure), errors[-1], gradient, [float(norm) for norm in run.report.adjoint_norms]


def _evolved(teacher: TokenTeacher, given: _Given) -> Gradient:
    """By an antithetic pair: (M(w + s e) - M(w - s e)) e / 2s, e normal."""
    student, stage, _, dev, recipe, seed = given
    generator = torch.Generator().manual_seed(seed_of(seed, 1))
    moves = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) * x.requires_grad
        for x in teacher.parameters()
    ]
    measures, errors = [], []
    for step in (recipe.spread, -recipe.spread):
        moved = teacher.fixed()
        for parameter, move in zip(moved.parameters(), moves, strict=True):
            parameter.add_(move, alpha=step)
        measures.append(_level(moved, given))
        errors.append(wrong_tokens(student, dev))
    slope = (measures[0] - measures[1]) / (2.0 * recipe.spread)
    gradient = slope * torch.cat([move.flatten() for move in moves])
    _stand(student, stage)
    return statistics.fmean(measures), statistics.fmean(errors), gradient, []


def window_level(
    teacher: TokenTeacher,
    student: nn.Module,
    stage: Stage,
    batches: Sequence[Batch],
    dev: Sequence[Batch],
    recipe: WindowRecipe,
    seed: int,
) -> float:
    """The measure where a :func:`window` of equal arguments ends, but for rounding, and no gradient."""
    return _level(teacher, _Given(student, stage, batches, dev, recipe, seed_of(seed, 2)))


def _level(teacher: TokenTeacher, given: _Given) -> float:
    """The measure where the student ends, which stands there afterwards."""
    student, stage, batches, dev, recipe, seed = given
    with seeded(seed):
        _stand(student, _advanced(student, stage, teacher, batches, recipe))
        with torch.no_grad():
            return float(measured(student, dev, recipe.measure, recipe.samples))


class TaughtTokens(NamedTuple):
    """What :func:`teach_translator` returns.

    Attributes:
        teacher: the taught teacher.
        history: what happened, JSON-able, as :class:`l2t.Taught` has it: ``updates`` has besides, a list of
            one number a window, ``steps`` (where it began), ``before`` and ``after`` (the measure) and
            ``neutral`` (after the same window under the neutral teacher), and its ``measure`` is the mean of
            after less neutral, in which the stages cancel, from the mean of neutral in the first update on
            (windows of whole runs have no neutral: it is empty, and their measure the mean of after);
            ``pools`` has a row a pool: the update before which it was made, its steps, and the dev measure of
            the student that made it at each and at the end of its run; ``states`` is what the teacher saw of
            the last of these students, at the start of its run, at these steps and at the end; ``trial`` has
            ``chosen``, ``runs`` (``trial_runs``), of runs ``by`` (what they are judged by) and ``measure``:
            of each candidate a list of one number a run, or a window where there are no runs. The seconds of
            pools are a part of those of updates.
    """

    teacher: TokenTeacher
    history: dict[str, Any]


def teach_translator(
    teacher: TokenTeacher,
    student: Make,
    batches: MakeBatches,
    dev: Sequence[Batch],
    *,
    recipe: WindowRecipe | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    resume: bool = False,
    guard: bool = True,
    progress: bool = True,
) -> TaughtTokens:
    """Teach a teacher of tokens on windows of a translator's run, for use on whole runs.

    Two runs with equal arguments are the same to the bit on one machine, broken off and resumed or not. With
    ``guard`` the run is watched as :func:`l2t.teach` does it, by how far windows end from where they end
    under the neutral teacher. At the end what was taught, that teacher and label smoothing of the strengths
    KNOWN train the same students for ``recipe.trial_runs`` whole runs, each as long as those that windows
    are cut from, and what ends with the highest BLEU of greedy translations of dev is the result. Without
    such runs what was taught has to be ahead of the neutral teacher by a standard error on windows from the
    last pool, and whether a whole run is better for it is for a comparison to say.

    Args:
        teacher: where to start; it is left as it is.
        student: makes a fresh translator, of the teacher's vocabulary.
        batches: the training batches of a course of a seed, such as
            ``lambda seed: Batches(encoded, tokens=1000, seed=seed)``.
        dev: batches to measure on, best in the order of their sentences' lengths, so that each window sees
            all lengths.
        recipe: the settings; None is ``WindowRecipe()``.
        seed: of all that is random.
        directory: where to keep checkpoints, pools, ``teacher.safetensors`` and ``history.json``; None keeps
            nothing.
        resume: go on with the run in ``directory``, or start one where there is none.
        guard: as above; without one there is no trial either.
        progress: show a bar. What goes wrong is said on the standard error either way.

    Raises:
        ValueError: a translator of another vocabulary, dev without batches, a directory that holds a run when
            ``resume`` is False, and when it is True a run of other arguments, or one that lacks a file.
    """
    recipe = recipe or WindowRecipe()
    run = _Windows(teacher, student, batches, dev, recipe, seed, directory, guard, progress)
    with threads(recipe.threads):
        run.run(resume)
    return TaughtTokens(run.taught, run.history)


T = TypeVar("T")


def _spread(of: Sequence[T], count: int, seed: int) -> list[T]:
    """One at random of each of so many equal stretches."""
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [of[int((index + float(x)) * len(of) / count)] for index, x in enumerate(places)]


class _Windows(Outer):
    """One run of :func:`teach_translator`."""

    unsaid = ("student's modules",)

    def __init__(
        self,
        teacher: TokenTeacher,
        student: Make,
        batches: MakeBatches,
        dev: Sequence[Batch],
        recipe: WindowRecipe,
        seed: int,
        directory: str | Path | None,
        guard: bool,
        progress: bool,
    ) -> None:
        super().__init__(teacher, recipe, seed, directory, guard, progress)
        self.make, self.batches, self.dev, self.recipe = student, batches, dev, recipe
        self.student = self._student(0)  # what windows run in
        check.window_data(dev, tuple(self.student.head.shape), teacher.num_classes)
        assert isinstance(self.start, TokenTeacher)
        self.neutral = self.start.neutral()
        self.pool: list[Stage] = []
        check.tracked_features("teach_translator", teacher.features, TRACKED)
        if guard and recipe.trial_runs:
            metric_of("BLEU")  # what it lacks is said before any work is done
        self.pool_update = -1  # before which update it was made
        self.history["pools"] = []
        self.history["seconds"]["pools"] = 0.0

    @property
    def taught(self) -> TokenTeacher:
        assert isinstance(self.teacher, TokenTeacher)
        return self.teacher

    def _student(self, seed: int) -> Any:
        with seeded(seed):
            return self.make()

    def _gather(self) -> tuple[Episode, dict[str, Any]]:
        self._refill()
        recipe, seed = self.recipe, seed_of(self.seed, 1, self.update)
        found, neutral, steps = [], [], []
        teacher = copy.deepcopy(self.taught)
        for x, begun in zip(teacher.parameters(), self.start.parameters(), strict=True):
            x.requires_grad_(begun.requires_grad)
        for index, stage in enumerate(self._stages(seed_of(seed, 1))):
            own = seed_of(seed, 2, index)
            batches, dev = self._draw(own)
            given = (self.student, stage, batches, dev, recipe, seed_of(own, 3))
            found.append(window(teacher, *given))
            if recipe.steps < recipe.run_steps:  # whole runs begin alike
                neutral.append(window_level(self.neutral, *given))
            steps.append(stage.step)
        befores, afters, errors, gradients, norms = zip(*found, strict=True)
        judged = list(afters)
        if neutral:
            rows = self.history["updates"]
            first = rows[0]["neutral"] if rows else neutral
            finite = [x for x in first if x is not None and math.isfinite(x)]
            level = statistics.fmean(finite or [0.0])
            judged = [level + (after - own) for after, own in zip(afters, neutral, strict=True)]
        measure = torch.tensor(judged, dtype=torch.float64)
        seen = Episode(measure, torch.tensor(errors), torch.stack(gradients), norms[0], {})
        return seen, {"steps": steps, "before": befores, "after": afters, "neutral": neutral}

    def _stages(self, seed: int) -> list[Stage]:
        """Where the windows of an update begin."""
        return _spread(self.pool, self.recipe.students, seed)

    def _draw(self, seed: int) -> tuple[list[Batch], list[Batch]]:
        """The batches of a window, and what it is measured on."""
        source = self.batches(seed_of(seed, 1))
        dev = _spread(self.dev, min(self.recipe.dev_batches, len(self.dev)), seed_of(seed, 2))
        return [source[step] for step in range(self.recipe.steps)], dev

    def _pool_update(self, update: int) -> int:
        """Before which update the pool of an update is made."""
        return update - update % self.recipe.refresh

    def _pool_name(self, update: int) -> str:
        return f"pool-{self._pool_update(update):06d}.safetensors"

    def _refill(self) -> None:
        """The pool of this update: kept, read, or made under the teacher as it is now."""
        first = self._pool_update(self.update)
        if self.pool_update == first:
            return
        pools, seconds = self.history["pools"], self.history["seconds"]
        if self.directory is not None and pools and pools[-1]["update"] == first:  # a run that goes on
            self.pool = read_stages(self.directory / self._pool_name(first))
        else:
            before = seconds["pools"]
            with self._clocked("pools"):
                self._make_pool(first)
            if self.directory is not None:
                took = seconds["pools"] - before
                seconds["updates"] += took  # of which it is a part, should the update be broken off
                self._keep_pool(self.directory / self._pool_name(first))
                seconds["updates"] -= took
        self.pool_update = first

    def _keep_pool(self, file: Path) -> None:
        """Write the pool, whose row in the history says that it is that of this run."""
        write_stages(file, self.pool)
        self._commit()
        for old in file.parent.glob("pool-*.safetensors"):
            if old != file:
                old.unlink()

    def _make_pool(self, update: int) -> None:
        seed = seed_of(self.seed, 2, update)
        student, batches = self._student(seed_of(seed, 1)), self.batches(seed_of(seed, 2))
        self.pool, end = make_pool(
            student, self.taught, batches, self.recipe, seed_of(seed, 3), self.progress
        )
        measures = []
        for stage in (*self.pool, end):
            _stand(student, stage)
            with torch.no_grad(), seeded(seed_of(seed, 4)):
                measures.append(float(measured(student, self.dev, self.recipe.measure, self.recipe.samples)))
        row = {"update": update, "steps": [stage.step for stage in self.pool], "measure": measures}
        self.history["pools"].append(row)
        start = TokenTracker(self.taught.num_classes, self.recipe.run_steps).state(0)
        seen = [start, *(stage.state for stage in (*self.pool, end))]
        names = ("progress", "train_loss", "train_accuracy")
        self.history["states"] = {name: [getattr(state, name) for state in seen] for name in names}

    def _try(self, taught: dict[str, dict[str, Tensor]]) -> None:
        """What whole runs end lowest under, or windows."""
        teachers: dict[str, TokenTeacher] = {}
        for name, weights in taught.items():
            teachers[name] = copy.deepcopy(self.neutral)
            teachers[name].load_state_dict(weights)
        if self.recipe.trial_runs:
            self._try_on_runs(teachers)
        else:
            self._try_on_windows(teachers)

    def _try_on_runs(self, taught: dict[str, TokenTeacher]) -> None:
        """What is ahead after whole runs of the same students; a known loss where it is as good."""
        teachers = {"neutral": self.neutral}
        for strength in KNOWN:
            if strength != self.neutral.smoothing:
                known = copy.deepcopy(self.neutral)
                known.smoothing = strength
                teachers[f"label-smoothing-{strength:g}"] = known
        teachers |= taught
        seconds, runs, steps = self.history["seconds"], self.recipe.trial_runs, self.recipe.run_steps
        before = seconds.setdefault("trial runs", 0.0)  # of a process that was broken off
        if self.history["trial"] is None:
            self.history["trial"] = {
                "chosen": None,
                "runs": runs,
                "by": "1 - BLEU",
                "measure": {name: [] for name in teachers},
            }
        measure = self.history["trial"]["measure"]
        files = [] if self.directory is None else [self.directory / "trial.safetensors"]
        with tqdm(
            total=runs * len(teachers) * steps, disable=not self.progress, unit="step", desc="trial"
        ) as bar:
            for index, name in itertools.product(range(runs), teachers):
                if index < len(measure[name]):
                    bar.update(steps)
                    continue
                with self._clocked("trial runs"):
                    found = self._whole_run(teachers[name], index, files, bar.update)
                measure[name].append(found)
                self._commit()
                for file in files:
                    file.unlink(missing_ok=True)
        means = {name: statistics.fmean(found) for name, found in measure.items()}
        chosen = min(means, key=lambda name: means[name])
        seconds["trial"] += before
        self.teacher = teachers[chosen]
        self.history["trial"]["chosen"] = chosen
        if chosen not in taught:
            self._event("trial", check.runs_chose_known(chosen, means))

    def _whole_run(
        self, teacher: TokenTeacher, index: int, files: Sequence[Path], moved: Callable[[int], object]
    ) -> float:
        """Where student ``index`` of the trial ends on dev; it goes on from a file that there is."""
        seed, steps = seed_of(self.seed, 4, index), self.recipe.run_steps
        student, batches = self._student(seed_of(seed, 1)), self.batches(seed_of(seed, 2))
        stage, digest = fresh(student, self.recipe, teacher.num_classes), _digest_of(teacher, index)
        for file in files:
            if file.exists():
                about = _read(file)[1]
                stage = read_stages(file)[0] if about["of"] == digest else stage
        moved(stage.step)
        while stage.step < steps:
            end = min(stage.step + _PIECE, steps)
            part = [batches[step] for step in range(stage.step, end)]
            stage = advance(student, stage, teacher, part, self.recipe, seed_of(seed, 3, stage.step))
            moved(len(part))
            for file in files:
                write_stages(file, [stage], digest)
        _stand(student, stage)
        return lost_bleu(student, self.dev)

    def _try_on_windows(self, teachers: dict[str, TokenTeacher]) -> None:
        """What windows from every stage of the last pool end lowest under."""
        if not self.pool and self.directory is not None:  # a run that goes on with its trial
            self.pool = read_stages(self.directory / self._pool_name(self.update - 1))
        teachers["neutral"] = self.neutral
        measures: dict[str, list[float]] = {name: [] for name in teachers}
        for index, stage in enumerate(self.pool):
            seed = seed_of(self.seed, 3, index)
            batches, dev = self._draw(seed)
            for name, teacher in teachers.items():
                end = advance(self.student, stage, teacher, batches, self.recipe, seed_of(seed, 3))
                _stand(self.student, end)
                with torch.no_grad(), seeded(seed_of(seed, 4)):
                    now = float(measured(self.student, dev, self.recipe.measure, self.recipe.samples))
                measures[name].append(now if math.isfinite(now) else math.inf)
        means = {name: sum(values) / len(values) for name, values in measures.items()}
        chosen = min(means, key=lambda name: means[name])
        ahead = torch.tensor(measures["neutral"]) - torch.tensor(measures[chosen])
        error = float(ahead.std()) / math.sqrt(len(ahead)) if len(ahead) > 1 else 0.0
        if not float(ahead.mean()) > error:
            chosen = "neutral"
        self.teacher = teachers[chosen]
        self.history["trial"] = {"chosen": chosen, "runs": 0, "measure": measures}
        if chosen == "neutral":
            self._event("trial", check.windows_chose_neutral(self.recipe.measure, means))

    def _open(self, directory: Path, resume: bool) -> None:
        super()._open(directory, resume)
        if self.finished:  # the trial may have chosen another strength of smoothing, which is no parameter
            self.teacher = AnyTeacher.load(directory)

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for batch in (*self.dev, self.batches(self.seed)[0]):
            for tensor in batch:
                digest.update(f"{tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().numpy().tobytes())
        for name, value in (*self.start.named_parameters(), *self.student.named_parameters()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return {
            "seed": self.seed,
            "recipe": self.recipe.to_json(),
            "teacher": self.start.config(),
            "student": {name: list(value.shape) for name, value in self.student.state_dict().items()},
            "student's modules": modules_of(self.student),
            "guard": self.guard is not None,
            "data and start weights": digest.hexdigest(),
        }


def _digest_of(teacher: TokenTeacher, index: int) -> str:
    """Of a run of the trial: whose it is, and the number of its student."""
    digest = hashlib.sha256(f"{index} {teacher.smoothing!r}".encode())
    for value in teacher.parameters():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_stages(file: Path, pool: Sequence[Stage], of: str = "") -> None:
    """Write a pool to a safetensors file, whole; ``of`` says whose it is."""
    tensors: dict[str, Tensor] = {}
    about: list[dict[str, Any]] = []
    for index, stage in enumerate(pool):
        tensors |= {f"{index}/weights/{name}": value for name, value in stage.weights.items()}
        constants = []
        for place, slot in enumerate(stage.slots):
            for part, x in enumerate(slot):
                if isinstance(x, Tensor):
                    tensors[f"{index}/slots/{place}/{part}"] = x
            constants.append([None if isinstance(x, Tensor) else x for x in slot])
        about.append({"step": stage.step, "state": list(stage.state), "slots": constants})
    write_tensors(file, tensors, {"stages": about, "of": of})


def read_stages(file: Path) -> list[Stage]:
    """The pool that :func:`write_stages` wrote.

    Raises:
        ValueError: the file is missing, or not whole.
    """
    tensors, about = _read(file)
    pool = []
    for index, stage in enumerate(about["stages"]):
        prefix = f"{index}/weights/"
        weights = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        slots: list[Slot] = [
            tuple(tensors.get(f"{index}/slots/{place}/{part}", x) for part, x in enumerate(slot))
            for place, slot in enumerate(stage["slots"])
        ]
        pool.append(Stage(stage["step"], weights, slots, StudentState(*stage["state"])))
    return pool


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that were written, with what is said of them."""
    try:
        return read_tensors(file)
    except (OSError, SafetensorError) as error:
        raise check.tensors_whole("teach_translator", file, error) from error
