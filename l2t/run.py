"""Run: the walk of a student through its training, and back over it with the adjoint.

Docs: section 5 of docs/math.md. The run is taken as any training loop takes it; ``backward()`` walks back
over its steps with the adjoint (v_w, v_s) of weights and optimiser state, by the formulas of that section in
their order.

The parts: l2t/optim.py (an update and its transpose), l2t/curvature.py (derivatives of a step's gradient),
l2t/tape.py (what is remembered of a step, the student at given weights), l2t/schedule.py (which steps are
remembered). What a student learns, and from which loss, is the caller's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from l2t import check
from l2t.budget import Sizes, choose, sizes, state_bytes, tensors_of
from l2t.curvature import (
    CURVATURES,
    Replay,
    Wanted,
    accumulate,
    add_scaled,
    checkpoints,
    coarsest,
    dtypes,
    gradient,
    leaves,
    measured_error,
    norm,
)
from l2t.measures import Measures
from l2t.optim import Hyper, Optimizer, Point, Slot, Tensors
from l2t.ranks import Ranks
from l2t.record import Report
from l2t.schedule import Action, Schedule, StoreAll, first_again, tally
from l2t.states import Fingerprints, States
from l2t.tape import Adjoint, Grads, Randomness, Roots, State, Step, Student, Taken, modes

__all__ = ["Run", "indexed"]

Entry = TypeVar("Entry")
KEEP = (Action.STORE, Action.TO_HOST, Action.TO_DISK)


class Run:
    """A run that was taken; :func:`unroll` makes it.

    Attributes:
        measure: J, detached: 0-dim or (S,). The measure at the end, or the sum of those along the way.
        measures: the measures that J is made of, detached, by the number of steps taken before each.
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
    measures: dict[int, Tensor]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    report: Report

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        measures: Measures,
        optimizer: Optimizer,
        meta: list[Tensor] | None,
        curvature: str,
        order: str,
        truncate: int | None,
        verify: str | None,
        states: States,
        micro_batches: int,
        ranks: Ranks | None,
    ) -> None:
        self._student, self._loss, self._measures = student, loss, measures
        self._optimizer = optimizer = optimizer.bound(student.aliases, student.parameters)
        self._meta, self._curvature, self._curvature_name = meta, CURVATURES[curvature], curvature
        self._products = self._curvature
        self._order, self._truncate, self._first = order, truncate, 0
        self._micro_batches, self._ranks = micro_batches, ranks
        self._replay: Replay | None = None  # known from the first step on
        self._modes = modes()
        # Values that are not finite are traced to a parameter where a look costs no wait for a device.
        self._looks = all(p.is_cpu for p in student.parameters)
        self._culprit: str | None = None
        self._settings = functools.cache(optimizer.settings())  # a function of the step is asked once
        self._data: Sequence[Any] | None = None  # batches by step, where steps may be taken again
        self._course: list[Taken] = []  # what a step is taken again by
        self._seen: Fingerprints | None = None
        if verify is not None:
            self._seen = Fingerprints(student, optimizer.slot_names, () if verify == "first" else None)
        self._states = states
        self._sizes: Sizes | None = None
        self._schedule: Schedule = StoreAll()
        self._tape: dict[int, Step] = {}
        self._rest: Iterator[tuple[Action, int]] = iter(())  # the actions of the walk back
        self._value: Tensor | None = None  # the measure after the last step, with its graph
        self._end: State | None = None

    def _forward(
        self,
        batches: Iterable[Any],
        schedule: Schedule | str,
        memory: int | None,
    ) -> None:
        start = perf_counter()
        student = self._student
        state = self._start()
        seen = self._seen
        if indexed(batches):
            check.unroll_along_steps(self._measures.along, len(cast("Sequence[Any]", batches)))
        if schedule == "all" or (schedule == "auto" and memory is None):
            # The number of steps need not be known.
            for t, batch in enumerate(batches):
                state = self._first_time(t, state, batch, tapes=True)
                if self._truncate is not None:
                    self._tape.pop(t - self._truncate, None)
            self._first = self._begin(len(self._course))
            self._rest = ((Action.REVERSE, t) for t in reversed(range(self._first, len(self._course))))
            if seen is not None and seen.states is not None and self._tape:
                last = self._tape[len(self._course) - 1]
                seen.states = {last.index, last.index + 1}
                seen.see(last.index, State(last.weights, (), last.buffers))
                seen.see(last.index + 1, state)
        else:
            self._data = data = cast("Sequence[Any]", batches) if indexed(batches) else list(batches)
            check.unroll_along_steps(self._measures.along, len(data))
            first = self._first = self._begin(len(data))
            self._schedule = chosen = self._chosen(schedule, memory, data, len(data) - first, state)
            if seen is not None:
                if seen.states is not None:
                    again = {first + t for t in first_again(chosen.actions(len(data) - first))}
                    runs = not self._curvature.keeps_graph  # the last step, by the curvature
                    seen.states = again | ({len(data) - 1, len(data)} if runs else set())
                seen.see(0, state)
            for t in range(first):
                state = self._first_time(t, state, data[t], tapes=False)
            if first:
                self._states.keep(first, state, Action.STORE)
            plan = ((action, first + t) for action, t in chosen.actions(len(data) - first))
            for action, t in plan:
                if action in KEEP:
                    self._states.keep(t, state, action)
                elif action is Action.REVERSE:
                    plan = itertools.chain([(action, t)], plan)  # type: ignore[assignment]
                    break
                else:
                    state = self._first_time(t, state, data[t], tapes=action is Action.TAPE)
            self._rest = plan
        losses, measures = [taken.loss for taken in self._course], self._measures
        check.unroll_trains(any(taken.reached != [] for taken in self._course) or not losses)
        check.unroll_along_steps(measures.along, len(losses))
        if measures.at_end and len(losses) not in measures.values:
            self._value = measures.take(len(losses), state.weights, state.buffers)
        student.release()
        if self._looks and not all(bool(x.isfinite().all()) for x in measures.values.values()):
            self._trace(state.weights)
        self._end = state
        self.measures = measures.values
        if self._ranks is not None:
            weights = dict(zip(student.names, state.weights, strict=True))
            self._ranks.agree("after the run (is optimizer the same?)", weights=weights)
            self.measures = self._ranks.means(self.measures)
        self.measure = measures.total(self.measures)
        self.weights = {name: x.detach() for name, x in zip(student.names, state.weights, strict=True)}
        self.buffers = dict(zip(student.buffer_names, state.buffers, strict=True))
        self.report = Report(
            losses, self.measures, perf_counter() - start, self._curvature_name, self._order, self._truncate
        )
        self.report.schedule, self.report.sizes = self._schedule, self._sizes
        self.report.nonfinite_tensor = self._culprit
        self.report.store = "bfloat16" if self._states.narrows else "exact"

    def _first_time(self, t: int, state: State, batch: object, *, tapes: bool) -> State:
        """Takes step t, and the measure after it where one along the way is asked for."""
        self._value = None
        state = self._take(t, state, batch, tapes=tapes)
        if self._measures.along is not None and self._measures.after(t + 1):
            self._value = self._measures.take(t + 1, state.weights, state.buffers)
            self._student.release()
        return state

    def _begin(self, steps: int) -> int:
        """The first step that the walk back comes to."""
        return 0 if self._truncate is None else max(steps - self._truncate, 0)

    def _chosen(
        self, schedule: Schedule | str, memory: int | None, data: Sequence[Any], steps: int, state: State
    ) -> Schedule:
        """The schedule of that name for so many steps and this memory, and whether the disk can take it."""
        if steps and not tensors_of(state.slots):  # an optimiser may begin with nothing
            state = state._replace(slots=self._slots_later(state))

        def measured() -> Sizes:
            if steps:
                self._sizes = self._measured(data[0], state)
                return self._sizes
            return Sizes(state_bytes(state), 0)

        if steps and not self._curvature.keeps_graph:
            measured()  # without a try
        chosen = choose(schedule, steps, memory, measured) if isinstance(schedule, str) else schedule
        disk = tally(chosen, steps, state_bytes(state, self._states.narrows), 0).disk
        if disk:
            self._states.open(disk)
        return chosen

    def _slots_later(self, state: State) -> Sequence[Slot]:
        """Slots of the size that they have after a step."""
        w, hyper = state.weights, self._settings(0)
        with torch.no_grad():
            point = Point(w, state.slots, [torch.zeros_like(x) for x in w], hyper, range(len(w)))
            return self._optimizer.update(point)[1]

    def _measured(self, batch: object, state: State) -> Sizes:
        """Bytes of states and steps, from the first step."""
        reads = self._optimizer.reads or bool(self._settings(0).wanted)
        narrows, count = self._states.narrows, self._micro_batches
        found = sizes(self._student, self._loss, batch, state, self._curvature, reads, narrows, count)
        return found if self._ranks is None else Sizes(*self._ranks.most(found))

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
            before = self._course[-1].randomness if self._course else None
            randomness = Randomness.now(student.cuda_devices, before)
        reads = self._optimizer.reads or bool(hyper.wanted)
        step = Step(t, hyper, w, b, slots if reads else ()) if tapes else None
        if self._micro_batches == 1 and self._ranks is None:
            value, g, b = self._gradient(step, t, w, b, batch, reads)
        else:
            value, g, b = self._accumulated(step, t, w, b, batch, taken.randomness if again else randomness)
        w, slots, reached = _update(self._optimizer, w, slots, g, hyper)
        if again and self._states.narrows:
            self.report._rounded(value, taken.loss)
            taken = taken._replace(loss=value)
        elif again:
            check.unroll_replayed(value, taken.loss, t)
        else:
            taken = Taken(randomness, value, reached)
            self._course.append(taken)
            if self._looks and not math.isfinite(value):
                self._trace(state.weights)
        if step is not None:
            self._tape[t] = step
            step.reached, step.loss, step.randomness = reached, taken.loss, taken.randomness
            if step.parts and reads:
                step.grads = g
        state = State(w, slots, b)
        if self._seen is not None:
            self._seen.see(t + 1, state)
        return state

    def _trace(self, tensors: Tensors) -> None:
        """Notes the first parameter whose tensor is not finite, at the first value of a run that is not."""
        self._looks = False
        names = zip(self._student.names, tensors, strict=True)
        self._culprit = next((name for name, x in names if not norm([x.detach()]).isfinite()), None)

    def _gradient(
        self, step: Step | None, t: int, w: Tensors, b: list[Tensor], batch: object, reads: bool
    ) -> tuple[Tensor, Grads, list[Tensor]]:
        """Loss and gradient of a batch, and the buffers after it; a step remembers what curvatures read."""
        student = self._student
        student.bind(w, b)
        value = self._loss(student.module, batch, t)
        check.unroll_loss(value, t)
        if self._replay is None:
            checkpoints(value)
            found = dtypes(value)
            unit = max(coarsest(student.parameters), *(torch.finfo(x).eps for x in found))
            self._replay = Replay(self._again, unit, torch.float16 in found)
        # The graph is built in steps that are taken to be forgotten, too: without it some of PyTorch's
        # derivatives come from other kernels, with other bits.
        g, d_others = self._curvature.gradient(value, w, self._meta)
        b = student.present_buffers()
        student.release()
        if step is not None:
            if self._curvature.keeps_graph:
                step.roots = Roots.of(g)
            else:
                step.batch, step.d_others = batch, d_others
            step.grads = g if self._curvature.keeps_gradient(reads) else None
        return value.detach(), g, b

    def _accumulated(
        self,
        step: Step | None,
        t: int,
        w: Tensors,
        b: list[Tensor],
        batch: object,
        randomness: Randomness | None,
    ) -> tuple[Tensor, Grads, list[Tensor]]:
        """The same of micro-batches, one after another: the means of their losses and gradients.

        Of several ranks the mean gradient, and the rank's own loss.
        """
        count, parts = self._micro_batches, []
        losses: list[Tensor] = []
        total: list[Tensor | None] = [None] * len(w)
        for micro in check.unroll_micro_batches(batch, count, t) if count > 1 else (batch,):
            part = None
            if step is not None:
                part = Step(t, step.hyper, w, b, ())
                if not self._curvature.keeps_graph:
                    part.randomness = randomness = Randomness.now(self._student.cuda_devices, randomness)
                parts.append(part)
            loss, g, b = self._gradient(part, t, w, b, micro, reads=False)
            losses.append(loss)
            if part is not None:
                part.loss, part.reached = loss, _reached(g)
            for i, x in enumerate(g):
                if x is not None:
                    total[i] = _sum(total[i], x.detach())
            del g
        if step is not None:
            step.parts = parts
        mean: Grads = tuple(None if x is None else x / count for x in total)
        if self._ranks is not None:
            mean = self._ranks.gradient(mean, w)
        return torch.stack(losses).sum(0) / count, mean, b

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
        metas = self._meta if self._ranks is not None and self._meta is not None else []
        meta_grads = [x.grad for x in metas]
        for x in [*own, *metas]:
            x.grad = None
        try:
            with torch.no_grad():
                self._walk_back(v)
                if self._ranks is not None:
                    found = self._ranks.gradient([x.grad for x in metas], metas)
                    meta_grads = [_sum(x, y) for x, y in zip(meta_grads, found, strict=True)]
        finally:
            self._student.release()
            self._tape.clear()
            self._states.close()
            self._course.clear()
            self._settings.cache_clear()
            self._data = None
            for p, kept in zip([*own, *metas], [*own_grads, *meta_grads], strict=True):
                p.grad = kept
            randomness.restore(devices)
        self.report.nonfinite_tensor = self._culprit
        self.report.seconds_backward = perf_counter() - start
        if devices:
            self.report.cuda_peak_bytes = sum(map(torch.cuda.max_memory_allocated, devices))

    def _walk_back(self, v: Tensor) -> None:
        assert self._end is not None
        state, self._end = self._end, None
        value, self._value = self._value, None
        shares = self._measures.shares()
        along = self._measures.along is not None
        last = max(shares)  # J does not depend on the steps after the last measure
        steps, norms = self.report.steps, self.report._norms
        w, b = state.weights, state.buffers
        v_w = Adjoint(w)
        v_slots = [tuple(torch.zeros_like(x) for x in tensors_of([slot])) for slot in state.slots]
        v_settings: list[tuple[Tensor, Tensor]] = []

        _lend(w, v_w, steps)
        self._student.bind(w, b)
        if value is not None:
            with self._sharing(w, v_w):
                self._measure_back(value, shares[steps] * v, w, steps)  # v_w = ∇M(w_T), v_s = 0
        del value, w
        norms.append(v_w.norm())
        if self._looks and not all(map(math.isfinite, norms[-1])):
            self._trace(v_w.parts)
        for action, t in self._rest:
            if action is Action.REVERSE:
                step = self._tape.pop(t)
                if t < last:
                    self._reverse(step, v_w, v_slots, v_settings)
                if along and t > self._first and self._measures.after(t):
                    self._measure_again(step, v_w, shares[t] * v)
                del step
                norms.append(v_w.norm())
                if self._looks and not all(map(math.isfinite, norms[-1])):
                    self._trace(v_w.parts)
            elif action in KEEP:
                self._states.keep(t, state, action)
            elif action is Action.RESTORE:
                state = self._states.back(t) if t else self._start()
                if self._seen is not None:
                    self._seen.see(t, state)
            elif action is Action.DROP:
                self._states.drop(t)
            else:
                assert self._data is not None
                begin = perf_counter()
                with torch.enable_grad(), self._modes():
                    state = self._take(t, state, self._data[t], tapes=action is Action.TAPE)
                self.report.steps_again += 1
                self.report.seconds_again += perf_counter() - begin
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
        _lend(step.weights, adjoint, step.index)
        if reached == []:
            return
        self._student.bind(step.weights, step.buffers)
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
        if not step.parts:
            self._product(step, a)  # v_w += H a
            return
        with self._sharing(step.weights, adjoint):
            places = _places(step.weights, reached)
            shares = dict(zip(places, torch._foreach_div(a, len(step.parts)), strict=True))
            for part in step.parts:
                if part.reached != []:
                    self._product(part, [shares[i] for i in _places(part.weights, part.reached)])

    def _sharing(self, weights: Tensors, adjoint: Adjoint) -> contextlib.AbstractContextManager[None]:
        """In it ranks add to the adjoint the mean of what they find."""
        return contextlib.nullcontext() if self._ranks is None else self._ranks.sharing(weights, adjoint)

    def _measure_again(self, step: Step, adjoint: Adjoint, v: Tensor) -> None:
        """Adds the gradient of the measure that was taken before this step: v_w += ∇M(w_t)."""
        rounded = self._states.narrows
        value = self._measures.again(step.index, step.weights, step.buffers, rounded)
        for w, part in zip(step.weights, adjoint.parts, strict=True):
            w.grad = part  # the measure may have called model.zero_grad()
        with self._sharing(step.weights, adjoint):
            self._measure_back(value, v, step.weights, step.index)

    def _measure_back(self, value: Tensor, v: Tensor, weights: Tensors, index: int) -> None:
        """Adds the gradient of a measure; of one in float16 at a larger scale, where that is finite."""
        inputs = self._inputs(weights, index)
        if torch.float16 not in dtypes(value):
            accumulate([value], [v], inputs)
            return
        targets = inputs or leaves([value])

        def add(scale: Tensor) -> None:
            accumulate([value], [(scale * v).to(v)], targets)

        add_scaled(targets, add, [v], (64.0, 1 / 16))

    def _product(self, step: Step, a: Tensors) -> None:
        """Adds H a and ∂_Φ⟨g, a⟩, and measures an inexact curvature at the first step that comes."""
        assert self._replay is not None
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
            if self._seen is not None and self._micro_batches == 1:
                self._seen.see(step.index, State(weights, (), step.buffers))
                self._seen.see(step.index + 1, State([], (), self._student.present_buffers()))
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
    reached = None if len(grads) == len(g) else _reached(g)
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


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y


def _reached(g: Sequence[Tensor | None]) -> list[int] | None:
    """The places of the weights that a gradient reaches, None for all."""
    reached = [i for i, x in enumerate(g) if x is not None]
    return None if len(reached) == len(g) else reached


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


def indexed(batches: object) -> bool:
    """Whether a batch can be read again by its step."""
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
