"""unroll(): a student's whole training run, and the exact gradient of what it ends in to all that shaped it.

Docs: section 5 of docs/math.md. The run is taken as any training loop takes it; ``run.backward()`` walks back
over its steps with the adjoint (v_w, v_s) of weights and optimiser state, by the formulas of that section in
their order.

The parts: l2t/optim.py (an update and its transpose), l2t/curvature.py (derivatives of a step's gradient),
l2t/tape.py (what is remembered of a step, the student at given weights), l2t/schedule.py (which steps are
remembered). What a student learns, and from which loss, is the caller's.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from l2t import check
from l2t.curvature import (
    CURVATURES,
    Replay,
    Wanted,
    accumulate,
    coarsest,
    gradient,
    measured_error,
)
from l2t.optim import SGD, Hyper, Optimizer, Point, Slot, Tensors
from l2t.preflight import preflight as look
from l2t.schedule import Action, Schedule, Segments, fit
from l2t.tape import Adjoint, Grads, Randomness, Roots, State, Step, Student, Taken, modes

__all__ = ["Report", "Run", "unroll"]

Entry = TypeVar("Entry")


class Report:
    """What a run cost and how it went. Numbers come from the device when they are asked for, not before.

    Attributes:
        steps: the number of steps T.
        seconds_forward: seconds of this process for the run, the measure included.
        seconds_backward: seconds for the walk back; None before it.
        steps_again: how many steps the walk back has taken again, by its schedule.
        curvature: the name of the way to second derivatives; where ``"forward"`` had to fall back, the way
            that it fell back to.
        curvature_error: the relative error of the products of an inexact curvature, against the exact ones at
            the last step; 0 for an exact curvature, None before the walk back, and where it cannot be told.
        curvature_error_reason: why ``curvature_error`` cannot be told; None where it can.
        order: ``"exact"`` or ``"first"``, as asked for.
        truncate: how many steps the walk back was limited to; None for no limit.
    """

    def __init__(
        self,
        losses: list[Tensor],
        measure: Tensor,
        seconds_forward: float,
        curvature: str,
        order: str,
        truncate: int | None,
    ) -> None:
        self.steps = len(losses)
        self.seconds_forward = seconds_forward
        self.seconds_backward: float | None = None
        self.steps_again = 0
        self.curvature, self.order, self.truncate = curvature, order, truncate
        self.curvature_error: float | None = None
        self.curvature_error_reason: str | None = None
        self._measured = False
        self._losses = losses
        self._measure = measure
        self._norms: list[list[Tensor]] = []  # in the order of the walk back

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [float(x) for x in self._losses]

    @property
    def adjoint_norms(self) -> list[float]:
        """‖∂J/∂w_t‖ for t = 0, ..., T: of the initial weights first. Empty before the walk back.

        Of a truncated walk the last ones only, and with ``order="first"`` those of the walk, not of J.

        Orders of magnitude between its ends tell of a run that forgets (vanishing towards t = 0) or that is
        not stable (exploding). Taken in the weights' dtype: in float32 a norm beyond 1e19 reads inf.
        """
        return [math.hypot(*(float(x) for x in norms)) for norms in reversed(self._norms)]

    @property
    def nonfinite(self) -> tuple[str, int] | None:
        """The first value that is not finite, in the order of computation; None if all are.

        ``("loss", t)``: the loss of step t. ``("measure", T)``: the measure. ``("adjoint", t)``: ∂J/∂w_t.
        """
        for t, x in enumerate(self.losses):
            if not math.isfinite(x):
                return "loss", t
        if not bool(self._measure.isfinite().all()):
            return "measure", self.steps
        norms = self.adjoint_norms
        first = self.steps + 1 - len(norms)
        return next(
            (("adjoint", first + t) for t in reversed(range(len(norms))) if not math.isfinite(norms[t])), None
        )

    def __repr__(self) -> str:
        back = "none" if self.seconds_backward is None else f"{self.seconds_backward:.3g} s"
        return (
            f"Report(steps={self.steps}, forward={self.seconds_forward:.3g} s, backward={back}, "
            f"nonfinite={self.nonfinite}, curvature={self.curvature}, order={self.order}, "
            f"truncate={self.truncate})"
        )


class Run:
    """A run that was taken; :func:`unroll` makes it.

    Attributes:
        measure: the measure at the end, detached: 0-dim or (S,).
        weights: the final trained parameters by name, detached; frozen ones are the student's own.
        buffers: the final buffers by name, after the last step.
        report: a :class:`Report`.

    Example:
        The gradient of the loss after three steps to the learning rate of these steps:

        >>> import torch, l2t
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(student.weight, 1.0)
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> def measure(model):  # w² / 2: each step multiplies w by 1 - lr
        ...     return model.weight.square().sum() / 2
        >>> optimizer = l2t.optim.SGD(lr=lr)
        >>> run = l2t.unroll(student, range(3), lambda model, batch, step: measure(model), measure,
        ...                  optimizer=optimizer)
        >>> run.backward()
        >>> run.measure, lr.grad  # (1 - lr)⁶ / 2 and its derivative -3 (1 - lr)⁵
        (tensor(0.0890), tensor(-0.7119))
        >>> [round(x, 4) for x in run.report.adjoint_norms]
        [0.178, 0.2373, 0.3164, 0.4219]
    """

    measure: Tensor
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    report: Report

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        meta: list[Tensor] | None,
        curvature: str,
        order: str,
        truncate: int | None,
    ) -> None:
        self._student, self._loss = student, loss
        self._optimizer = optimizer = optimizer.bound(student.names, student.parameters)
        self._meta, self._curvature, self._curvature_name = meta, CURVATURES[curvature], curvature
        self._products = self._curvature
        self._order, self._truncate, self._first = order, truncate, 0
        self._replay = Replay(self._again, coarsest(student.parameters))
        self._modes = modes()
        self._settings = functools.cache(optimizer.settings())  # a function of the step is asked once
        self._data: Sequence[Any] | None = None  # batches by step, where steps may be taken again
        self._course: list[Taken] = []  # what a step is taken again by
        self._states: dict[int, State] = {}
        self._tape: dict[int, Step] = {}
        self._rest: Iterator[tuple[Action, int]] = iter(())  # the actions of the walk back
        self._end: tuple[Tensor, State] | None = None  # measure, last state

    def _forward(
        self,
        batches: Iterable[Any],
        measure: Callable[..., Tensor],
        schedule: Schedule | str,
        memory: int | None,
    ) -> None:
        start = perf_counter()
        student = self._student
        state = self._start()
        if schedule == "all" or (schedule == "auto" and memory is None):
            # The number of steps need not be known.
            for t, batch in enumerate(batches):
                state = self._take(t, state, batch, tapes=True)
                if self._truncate is not None:
                    self._tape.pop(t - self._truncate, None)
            self._first = self._begin(len(self._course))
            self._rest = ((Action.REVERSE, t) for t in reversed(range(self._first, len(self._course))))
        else:
            self._data = data = cast("Sequence[Any]", batches) if _indexed(batches) else list(batches)
            first = self._first = self._begin(len(data))
            chosen = self._chosen(schedule, memory, data, len(data) - first, state)
            for t in range(first):
                state = self._take(t, state, data[t], tapes=False)
            if first:
                self._states[first] = state
            plan = ((action, first + t) for action, t in chosen.actions(len(data) - first))
            for action, t in plan:
                if action is Action.STORE:
                    self._states[t] = state
                elif action is Action.REVERSE:
                    plan = itertools.chain([(action, t)], plan)  # type: ignore[assignment]
                    break
                else:
                    state = self._take(t, state, data[t], tapes=action is Action.TAPE)
            self._rest = plan
        losses = [taken.loss for taken in self._course]
        check.unroll_trains(any(taken.reached != [] for taken in self._course) or not losses)
        student.bind(state.weights, state.buffers)
        value = measure(student.module)
        student.release()
        check.unroll_measure(value)
        self._end = value, state
        self.measure = value.detach()
        self.weights = {name: x.detach() for name, x in zip(student.names, state.weights, strict=True)}
        self.buffers = dict(zip(student.buffer_names, state.buffers, strict=True))
        self.report = Report(
            losses, self.measure, perf_counter() - start, self._curvature_name, self._order, self._truncate
        )

    def _begin(self, steps: int) -> int:
        """The first step that the walk back comes to."""
        return 0 if self._truncate is None else max(steps - self._truncate, 0)

    def _chosen(
        self, schedule: Schedule | str, memory: int | None, data: Sequence[Any], steps: int, state: State
    ) -> Schedule:
        """The schedule of that name for so many steps and this memory."""
        if not isinstance(schedule, str):
            return schedule
        if schedule == "every":
            return Segments(max(math.isqrt(steps), 1))
        assert memory is not None
        state_bytes = _bytes([*state.weights, *_tensors(state.slots), *state.buffers])
        step_bytes = self._step_bytes(data[0], state) if steps else 0
        if schedule == "auto":
            return fit(steps, state_bytes, step_bytes, memory).schedule
        check.schedule_memory(memory, step_bytes)
        return Segments(1, (memory - step_bytes) // state_bytes)

    def _step_bytes(self, batch: object, state: State) -> int:
        """What a taped step keeps alive, from the first step: for a graph, what a second one of it adds."""
        reads = self._optimizer.reads or bool(self._settings(0).wanted)
        own = _bytes([*state.weights, *state.buffers, *(_tensors(state.slots) if reads else ())])
        own += _bytes(state.weights) * self._curvature.keeps_gradient(reads)
        if not self._curvature.keeps_graph:
            return own
        student, seen = self._student, []
        randomness = Randomness.now(student.cuda_devices)
        kept = []
        for _ in range(2):
            storages: dict[int, int] = {}

            def note(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storage = x.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
                return x

            student.bind(state.weights, state.buffers)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                kept.append(gradient(self._loss(student.module, batch, 0), state.weights))
            student.release()
            randomness.restore(student.cuda_devices)
            seen.append(storages)
        return own + sum(size for at, size in seen[1].items() if at not in seen[0])

    def _start(self) -> State:
        """The state before the first step, from the student's own parameters and buffers."""
        w: Tensors = [p.detach().clone().requires_grad_() for p in self._student.parameters]
        return State(w, self._optimizer.start(w), self._student.buffers)

    def _take(self, t: int, state: State, batch: object, *, tapes: bool) -> State:
        """Takes step t, for the first time or again, and returns the state after it."""
        w, slots, b = state
        student, hyper, again = self._student, self._settings(t), t < len(self._course)
        randomness = None
        if again:
            taken = self._course[t]
            assert taken.randomness is not None
            taken.randomness.restore(student.cuda_devices)
        elif (self._data is not None and t >= self._first) or (tapes and not self._curvature.keeps_graph):
            randomness = Randomness.now(student.cuda_devices, self._course[-1:])
        reads = self._optimizer.reads or bool(hyper.wanted)
        step = Step(t, hyper, w, b, slots if reads else ()) if tapes else None
        student.bind(w, b)
        value = self._loss(student.module, batch, t)
        check.unroll_loss(value, t)
        # The graph is built in steps that are taken to be forgotten, too: without it some of PyTorch's
        # derivatives come from other kernels, with other bits.
        g, d_others = self._curvature.gradient(value, w, self._meta)
        b = student.present_buffers()
        student.release()
        w, slots, reached = _update(self._optimizer, w, slots, g, hyper)
        if again:
            check.unroll_replayed(value, taken.loss, t)
        else:
            taken = Taken(randomness, value.detach(), reached)
            self._course.append(taken)
        if step is not None:
            self._tape[t] = step
            step.reached, step.loss = reached, taken.loss
            if self._curvature.keeps_graph:
                step.roots = Roots.of(g)
            else:
                step.batch, step.randomness, step.d_others = batch, taken.randomness, d_others
            step.grads = g if self._curvature.keeps_gradient(reads) else None
        return State(w, slots, b)

    def backward(self, gradient: Tensor | None = None) -> None:
        """Walks back over the run and adds d measure / d meta to ``.grad`` of the meta tensors.

        A meta tensor that the measure does not depend on keeps its ``.grad``, None included, as in
        ``torch.autograd.backward``. What the steps remember is freed on the way, so this can be done once.

        Args:
            gradient: the cotangent of the measure, of its shape. Default ones: of several measures, the sum.

        Raises:
            RuntimeError: a second call; an operation of the loss that has no second derivative; a loss that
                carries a graph from one step to the next; with ``curvature="recompute"``, a loss that is not
                the same when its step is run again.
            ValueError: a cotangent of another shape.
        """
        check.unroll_not_inference()
        check.unroll_open(self._end is not None)
        v = check.unroll_cotangent(gradient, self.measure)
        start = perf_counter()
        devices = self._student.cuda_devices
        randomness = Randomness.now(devices)
        # meta=None gives every leaf that is reached its gradient, but the student's own are to be left out.
        own = self._student.parameters if self._meta is None else []
        own_grads = [p.grad for p in own]
        for p in own:
            p.grad = None
        try:
            with torch.no_grad():
                self._walk_back(v)
        finally:
            self._student.release()
            self._tape.clear()
            self._states.clear()
            self._course.clear()
            self._settings.cache_clear()
            self._data = None
            for p, kept in zip(own, own_grads, strict=True):
                p.grad = kept
            randomness.restore(devices)
        self.report.seconds_backward = perf_counter() - start

    def _walk_back(self, v: Tensor) -> None:
        assert self._end is not None
        (value, state), self._end = self._end, None
        steps, norms = self.report.steps, self.report._norms
        w, b = state.weights, state.buffers
        v_w = Adjoint(w)
        v_slots = [tuple(torch.zeros_like(x) for x in _tensors([slot])) for slot in state.slots]
        v_settings: list[tuple[Tensor, Tensor]] = []

        _lend(w, v_w, steps)
        self._student.bind(w, b)
        accumulate([value], [v], self._inputs(w, steps))  # v_w = ∇M(w_T), v_s = 0
        del value, w
        norms.append(v_w.norm())
        for action, t in self._rest:
            if action is Action.REVERSE:
                self._reverse(self._tape.pop(t), v_w, v_slots, v_settings)
                norms.append(v_w.norm())
            elif action is Action.STORE:
                self._states[t] = state
            elif action is Action.RESTORE:
                state = self._states[t].again() if t else self._start()
            elif action is Action.DROP:
                del self._states[t]
            else:
                assert self._data is not None
                with torch.enable_grad(), self._modes():
                    state = self._take(t, state, self._data[t], tapes=action is Action.TAPE)
                self.report.steps_again += 1
        self._finish(v_w, v_settings)

    def _reverse(
        self,
        step: Step,
        adjoint: Adjoint,
        v_slots: Sequence[Slot],
        v_settings: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Takes the adjoint (v_w, v_s) back over a step."""
        optimizer, hyper, reached = self._optimizer, step.hyper, step.reached
        if reached == []:
            return
        self._student.bind(step.weights, step.buffers)
        _lend(step.weights, adjoint, step.index)
        point = Point((), (), (), hyper, _places(step.weights, reached))
        if optimizer.reads or hyper.wanted:
            if step.grads is None:
                step.grads = gradient(self._again(step, step.weights), step.weights)
            grads = [g for g in step.grads if g is not None]
            w, slots = _pick(step.weights, reached), _pick(step.slots, reached)
            point = point._replace(weights=w, slots=slots, grads=grads)
        v_w, v_slots = _pick(adjoint.parts, reached), _pick(v_slots, reached)
        a, found = optimizer.transpose(point, v_w, v_slots)
        v_settings += [(x, d.to(x)) for x, d in found]
        self._curve(step, a)  # v_w += H a

    def _curve(self, step: Step, a: Tensors) -> None:
        """Adds H a and ∂_Φ⟨g, a⟩, and measures an inexact curvature at the first step that comes."""
        report, wanted = self.report, Wanted(self._order == "exact", self._beside(step.index))
        if not report._measured:
            report._measured = True
            if self._curvature.exact:
                report.curvature_error = 0.0
            else:
                found = measured_error(self._curvature, step, self._replay, a, wanted)
                report.curvature_error, report.curvature_error_reason = found
        try:
            self._products.product(step, self._replay, a, wanted)
        except check.ForwardModeError as error:
            # Steps are taken as before, so that those taken again are the same.
            report.curvature = "recompute"
            self._products = CURVATURES[report.curvature]
            warnings.warn(str(error), stacklevel=5)
            self._products.product(step, self._replay, a, wanted)
        self._replay = self._replay._replace(examines=False)

    def _finish(self, v_w: Adjoint, v_settings: list[tuple[Tensor, Tensor]]) -> None:
        """Hands the gradients of settings and initial weights to the leaves behind them."""
        ends = v_settings
        if self._meta is not None and not self._first:
            ends = [*ends, *zip(self._student.parameters, v_w.parts, strict=True)]
        if ends:
            accumulate([x for x, _ in ends], [v for _, v in ends], self._meta or [])

    def _again(self, step: Step, weights: Tensors) -> Tensor:
        """The loss of a step, run again with its batch and random numbers. The student stays bound."""
        assert step.randomness is not None
        step.randomness.restore(self._student.cuda_devices)
        self._student.bind(weights, step.buffers)
        lent = [w.grad for w in weights]
        with torch.enable_grad(), self._modes():
            value = self._loss(self._student.module, step.batch, step.index)
        if weights is step.weights:
            check.unroll_replayed(value, step.loss, step.index)
        for w, part in zip(weights, lent, strict=True):
            w.grad = part  # the loss may have called model.zero_grad()
        return value

    def _inputs(self, weights: Tensors, index: int) -> Tensors:
        """The leaves whose ``.grad`` the reverse of a step fills; none for every leaf that it reaches."""
        beside = self._beside(index)
        return [] if beside is None else [*weights, *beside]

    def _beside(self, index: int) -> Tensors | None:
        """These leaves without the weights of the step themselves; None for every leaf that it reaches."""
        if self._meta is None:
            return None
        # The weights of the step before are there only so that _lend can tell a graph that leads into it.
        before = self._tape.get(index - 1)
        return [*(before.weights if before else ()), *self._meta]


def _lend(weights: Tensors, adjoint: Adjoint, index: int) -> None:
    """Makes the adjoint the ``.grad`` of a step's weights, so that the engine adds H a to it in place."""
    for w, part in zip(weights, adjoint.parts, strict=True):
        if w.grad is not None:
            raise check.unroll_leak(index)
        w.grad = part


def _update(
    optimizer: Optimizer, w: Tensors, slots: Sequence[Slot], g: Grads, hyper: Hyper
) -> tuple[Tensors, Sequence[Slot], list[int] | None]:
    """Weights after a step, as leaves; slots; and which weights the loss reaches, None for all."""
    grads = [x for x in g if x is not None]
    reached = None if len(grads) == len(g) else [i for i, x in enumerate(g) if x is not None]
    with torch.no_grad():
        new_w, new_slots = _pick(w, reached), _pick(slots, reached)
        if grads:
            point = Point(new_w, new_slots, grads, hyper, _places(w, reached))
            new_w, new_slots = optimizer.update(point)
        if reached is not None:
            # The others stay as they are, but as leaves of their own: a leaf belongs to one step.
            new_w = _put(new_w, reached, [x.detach() for x in w])
            new_slots = _put(new_slots, reached, slots)
    for x in new_w:
        x.requires_grad_()
    return new_w, new_slots, reached


def _places(weights: Tensors, reached: list[int] | None) -> Sequence[int]:
    """The places of the weights that a step reaches among all."""
    return range(len(weights)) if reached is None else reached


def _pick(xs: Any, indices: list[int] | None) -> Any:
    """The entries at these indices; all of them where there is nothing to pick."""
    return xs if indices is None else [xs[i] for i in indices]


def _put(xs: Sequence[Entry], indices: list[int], others: Sequence[Entry]) -> list[Entry]:
    """These entries at these indices among others."""
    by_index = dict(zip(indices, xs, strict=True))
    return [by_index.get(i, x) for i, x in enumerate(others)]


def _tensors(slots: Sequence[Slot]) -> list[Tensor]:
    return [x for slot in slots for x in slot if isinstance(x, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _indexed(batches: object) -> bool:
    """Whether a batch can be read again by its step."""
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _looked_at(
    student: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor], curvature: str
) -> Iterable[Any]:
    """The batches, after a look at the step of the first one."""
    if _indexed(batches):
        first = list(itertools.islice(batches, 1))
    else:
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
        batches = itertools.chain(first, rest)
    for batch in first:
        found = look(student, batch, loss)
        check.preflight_suits(found.suits(curvature), curvature, found)
    return batches


ORDERS = ("exact", "first")
SCHEDULES = ("auto", "all", "every", "binomial")
DEFAULT_OPTIMIZER = SGD(lr=0.1, momentum=0.9)


def unroll(
    student: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any, int], Tensor],
    measure: Callable[[nn.Module], Tensor],
    *,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    meta: Iterable[Tensor] | None = None,
    curvature: str = "reverse",
    order: str = "exact",
    truncate: int | None = None,
    schedule: str | Schedule = "auto",
    memory: int | str | None = None,
    preflight: bool = False,
) -> Run:
    """Trains a student over batches so that what it ends in can be differentiated to what shaped it.

    ``run.backward()`` then adds the gradient of the final measure, through every step of the training, to
    ``.grad`` of the meta tensors, and any ``torch.optim`` optimiser can step on these. The gradient is exact
    unless asked to be otherwise: that of automatic differentiation through the whole run, whose graph is
    never built.

    ``loss`` and ``measure`` are called with the student module itself, in whose places the weights of the
    step stand for the time of the call, so hooks, submodules and tied parameters work. The student's own
    parameters and buffers are the start of the run and are as they were when the call returns, or raises.
    Buffers (BatchNorm's statistics) are carried from step to step without gradient. Parameters that do not
    require a gradient stay constant.

    Args:
        student: any ``nn.Module`` with a parameter that requires a gradient.
        batches: an iterable (list, DataLoader, generator), one batch a step; a batch is what ``loss`` takes.
        loss: ``loss(model, batch, step)``, the 0-dim loss of a step, differentiable twice, or once where
            ``curvature`` is a difference. It reaches earlier steps through the model's weights alone: what
            else it carries from step to step is detached.
        measure: ``measure(model)`` at the final weights, 0-dim or of shape (S,), differentiable.
        optimizer: the student's optimiser, from :mod:`l2t.optim`. Default ``SGD(lr=0.1, momentum=0.9)``.
        meta: the tensors whose ``.grad`` is wanted: leaves that require a gradient and sit anywhere in loss,
            measure, optimizer or batches. A parameter of the student among them means its initial value.
            Default: every leaf that is reached, the student's own parameters apart.
        curvature: where the second derivatives of ``loss`` come from. Exact are: ``"reverse"``, which keeps
            each step's weights and graph, so memory grows with its activations; ``"recompute"``, which keeps
            a step's weights and batch and runs it again in the walk back, the same step bit for bit
            (PyTorch's default random numbers and buffers included), for one more run's time and the same
            gradient to the bit, and needs a ``loss`` that depends on model, batch and step alone;
            ``"forward"``, which remembers the same and runs the step again in forward mode, where every
            operation has one (else a warning names it and the run goes on with ``"recompute"``). Inexact are
            differences, which need first derivatives only (fused attention, cuDNN RNNs, compiled models):
            ``"central"`` takes two more gradients a step, ``"one-sided"`` one, and keeps those of the run
            itself, that to the meta tensors included. ``run.report.curvature_error`` says how good they were.
        order: ``"exact"``, or ``"first"``: a step's gradient counts as independent of the student's weights,
            so H a is left out of the walk back (with plain SGD: the identity in place of a step's Jacobian).
            What the gradient owes to the meta tensors is kept, and all that the optimiser does.
        truncate: walk back over the last so many steps only. Earlier ones give the meta tensors nothing.
            None: all.
        schedule: what is remembered of the run; the gradient has the same bits whatever it is. ``"all"``:
            every step. ``"every"``: the state before every √T-th step, from which the steps between are
            taken again: O(√T) memory for less than one more run. ``"binomial"``: as many states as
            ``memory`` holds, in the order that takes the fewest steps again. ``"auto"``: the plan that
            takes the fewest steps again within ``memory``, or all without one. Or an object of
            :mod:`l2t.schedule`, such as ``Segments(length=10, slots=5)``. All but ``"all"`` need a loss as
            for ``"recompute"``, and batches that can be indexed are read again by their index, others kept.
        memory: bytes for what is remembered, a number or such as ``"64MB"``: beside what a single training
            step and the adjoint need. With ``"auto"`` and ``"binomial"`` the first step is tried twice
            before the run, to see what it keeps.
        preflight: look at the first step with :func:`l2t.preflight` before the run, and raise what it found
            where ``curvature`` does not suit. It costs some ten steps and more for a student of many modules.

    Returns:
        A :class:`Run` with ``measure``, ``weights``, ``buffers``, ``report`` and ``backward()``. A value that
        is not finite raises nothing: ``run.report.nonfinite`` says where the first one arose.

    Raises:
        TypeError, ValueError: an argument, or what loss or measure returns, is not as above.
        RuntimeError: inside ``torch.inference_mode``; what ``preflight`` found.

    Source: section 5 of docs/math.md; Maclaurin et al., "Gradient-based hyperparameter optimization through
    reversible learning" (ICML 2015); Franceschi et al., "Forward and reverse gradient-based hyperparameter
    optimization" (ICML 2017).

    Example:
        The weight of each sample, by its effect on other samples after a short training:

        >>> import torch, l2t
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(8, 3), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
        >>> student = torch.nn.Linear(3, 2)
        >>> weight = torch.ones(8, requires_grad=True)
        >>> def loss(model, batch, step):
        ...     each = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        ...     return (weight * each).mean()
        >>> def measure(model):
        ...     return torch.nn.functional.cross_entropy(model(x[:2]), y[:2])
        >>> run = l2t.unroll(student, range(5), loss, measure, optimizer=l2t.optim.SGD(lr=0.5))
        >>> run.backward()
        >>> weight.grad.shape, run.report.steps, run.report.nonfinite
        (torch.Size([8]), 5, None)
    """
    check.unroll_not_inference()
    check.unroll_student(student)
    check.unroll_functions(loss, measure)
    check.unroll_batches(batches)
    check.unroll_optimizer(optimizer, Optimizer)
    chosen = check.unroll_meta(meta)
    check.known("unroll", "curvature", curvature, CURVATURES)
    check.unroll_schedule(schedule, SCHEDULES)
    budget = check.unroll_memory(memory, schedule)
    check.known("unroll", "order", order, ORDERS)
    check.unroll_truncate(truncate, chosen, student)
    if preflight:
        batches = _looked_at(student, batches, loss, curvature)
    run = Run(Student(student), loss, optimizer, chosen, curvature, order, truncate)
    try:
        with torch.enable_grad():
            run._forward(batches, measure, schedule, budget)
    finally:
        run._student.release()
    return run
