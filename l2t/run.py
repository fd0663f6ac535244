"""Run: the walk of a student through its training, and back over it with the adjoint.

Docs: section 5 of docs/math.md. The run is taken as any training loop takes it; ``backward()`` walks back
over its steps with the adjoint (v_w, v_s) of weights and optimiser state, by the formulas of that section in
their order.

The parts: l2t/steps.py (a step, taken for the first time or again), l2t/optim.py (an update and its
transpose), l2t/curvature.py (derivatives of a step's gradient), l2t/tape.py (what is remembered of a step,
the student at given weights), l2t/schedule.py (which steps are remembered). What a student learns, and from
which loss, is the caller's.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from l2t import check
from l2t.anchors import gone
from l2t.budget import Sizes, choose, sizes, state_bytes, tensors_of
from l2t.compiled import Compiled
from l2t.curvature import (
    CURVATURES,
    Wanted,
    accumulate,
    add_scaled,
    dtypes,
    gradient,
    measured_error,
)
from l2t.graph import leaves
from l2t.measures import Measures
from l2t.optim import Optimizer, Point, Slot, Tensors
from l2t.ranks import Ranks
from l2t.record import Report, Trace
from l2t.schedule import Action, Schedule, StoreAll, first_again, playable, tally
from l2t.states import Fingerprints, States
from l2t.steps import Steps, pick, places_of, total_of
from l2t.tape import Adjoint, Randomness, State, Step, Student, full_precision, versions

__all__ = ["Run", "indexed"]

LEAKS = 64
"""Steps back that are looked at for a graph that leads into them, from time to time."""
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
        damping: float,
        growth: float | None,
        verify: str | None,
        states: States,
        micro_batches: int,
        ranks: Ranks | None,
        compiles: bool,
        look: Callable[[object, bool], None],
        tries: bool,
    ) -> None:
        self._student, self._loss, self._measures = student, loss, measures
        self._optimizer = optimizer = optimizer.bound(student.aliases, student.parameters)
        self._meta, self._curvature, self._curvature_name = meta, CURVATURES[curvature], curvature
        self._compiled = None
        if compiles:
            exact, keeps = order == "exact", curvature == "reverse"
            self._compiled, student.still = Compiled(student, loss, meta or [], exact, keeps), set()
        if self._compiled is not None:
            self._curvature = self._compiled
        self._products = self._curvature
        self._order, self._truncate, self._damping, self._first = order, truncate, damping, 0
        self._growth, self._look = growth, look
        self._micro_batches, self._ranks = micro_batches, ranks
        self._data: Sequence[Any] | None = None  # batches by step, where steps may be taken again
        self._seen: Fingerprints | None = None
        if verify is not None:
            self._seen = Fingerprints(student, optimizer.slot_names, () if verify == "first" else None)
        self._trace = Trace(student.names, student.parameters)
        self._steps = Steps(
            student, loss, optimizer, meta, self._curvature, micro_batches, ranks, self._seen, self._trace
        )
        self._steps.tries = tries
        self._states = states
        self._sizes: Sizes | None = None
        self._schedule: Schedule = StoreAll()
        self._tape: dict[int, Step] = {}
        self._rest: Iterator[tuple[Action, int]] = iter(())  # the actions of the walk back
        self._value: Tensor | None = None  # the measure after the last step, with its graph
        self._end: State | None = None
        self._start: State | None = None  # without slots, where steps are taken again from it

    def _forward(
        self,
        batches: Iterable[Any],
        schedule: Schedule | str,
        memory: int | None,
    ) -> None:
        start = perf_counter()
        student = self._student
        state = self._steps.start()
        seen = self._seen
        if indexed(batches):
            check.unroll_along_steps(self._measures.along, len(cast("Sequence[Any]", batches)))
        if schedule == "all" or (schedule == "auto" and memory is None):
            # The number of steps need not be known.
            for t, batch in enumerate(_in_order(batches)):
                state = self._first_time(t, state, batch, tapes=True)
                if self._truncate is not None:
                    self._tape.pop(t - self._truncate, None)
            self._first = self._begin(len(self._steps.course))
            self._rest = ((Action.REVERSE, t) for t in reversed(range(self._first, len(self._steps.course))))
            if seen is not None and seen.states is not None and self._tape:
                last = self._tape[len(self._steps.course) - 1]
                seen.states = {last.index, last.index + 1}
                seen.see(last.index, State(last.weights, (), last.buffers))
                seen.see(last.index + 1, state)
        else:
            self._data = data = cast("Sequence[Any]", batches) if indexed(batches) else _all(batches)
            check.unroll_along_steps(self._measures.along, len(data))
            first = self._first = self._begin(len(data))
            self._schedule = chosen = self._chosen(schedule, memory, data, len(data) - first, state)
            if seen is not None:
                if seen.states is not None:
                    again = {first + t for t in first_again(chosen.actions(len(data) - first))}
                    runs = not self._curvature.keeps_graph  # the last step, by the curvature
                    seen.states = again | ({len(data) - 1, len(data)} if runs else set())
                seen.see(0, state)
            returns = (Action.RESTORE, 0) in chosen.actions(len(data) - first)
            if returns and not first:
                self._start = state._replace(slots=())
            for t in range(first):
                state = self._first_time(t, state, data[t], tapes=False)
            if returns and first:
                self._states.keep(first, state, Action.STORE)
            plan = ((action, first + t) for action, t in chosen.actions(len(data) - first))
            for action, t in plan:
                if action in KEEP:
                    self._states.keep(t, state, action, student.still)
                elif action is Action.REVERSE:
                    plan = itertools.chain([(action, t)], plan)  # type: ignore[assignment]
                    break
                else:
                    state = self._first_time(t, state, data[t], tapes=action is Action.TAPE)
            self._rest = plan
        losses, measures = [taken.loss for taken in self._steps.course], self._measures
        check.unroll_trains(any(taken.reached != [] for taken in self._steps.course) or not losses)
        check.unroll_along_steps(measures.along, len(losses))
        if measures.at_end and len(losses) not in measures.values:
            self._value = measures.take(len(losses), state.weights, state.buffers)
        student.release()
        student.check_lent(state.buffers)
        if self._trace.looks and not all(bool(x.isfinite().all()) for x in measures.values.values()):
            self._trace.to(state.weights)
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
        self.report.nonfinite_tensor = self._trace.name
        self.report.compiled = None if self._compiled is None else self._compiled.seconds
        if self._states.narrows:
            self.report.store, self._steps.rounding = "bfloat16", self.report._rounded

    def _first_time(self, t: int, state: State, batch: object, *, tapes: bool) -> State:
        """Takes step t, and the measure after it where one along the way is asked for."""
        self._value = None
        state = self._take(t, state, batch, tapes)
        if t == 0:
            self._student.release()
            self._look(batch, self._steps.doubt)
        if self._measures.along is not None and self._measures.after(t + 1):
            self._value = self._measures.take(t + 1, state.weights, state.buffers)
            if self._meta is None and len(self._measures.values) == 1:
                for x in leaves([self._value]):
                    check.unroll_hooks_of_leaf(x)
            self._student.release()
        return state

    def _take(self, t: int, state: State, batch: object, tapes: bool) -> State:
        """Takes step t, and puts it on the tape if it is to be remembered."""
        returns = self._data is not None and t >= self._first
        measured = t > 0 and self._measures.after(t)
        state, step = self._steps.take(t, state, batch, tapes=tapes, returns=returns, measured=measured)
        if step is not None:
            self._tape[t] = step
        return state

    def _begin_again(self) -> State:
        """The state before the first step, whatever the caller has made of the student since."""
        assert self._start is not None
        state = self._start.again()
        return state._replace(slots=self._optimizer.start(state.weights))

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
                self._sizes = self._measured((data[0], data[0]), state)
                return self._sizes
            return Sizes(state_bytes(state), 0)

        if steps and not self._curvature.keeps_graph:
            measured()  # without a try
        if isinstance(schedule, str):
            chosen = choose(schedule, steps, memory, measured)
        else:
            check.schedule_actions(playable(schedule, steps), chosen := schedule)
        disk = tally(chosen, steps, state_bytes(state, self._states.narrows), 0).disk
        if disk:
            self._states.open(disk)
        return chosen

    def _slots_later(self, state: State) -> Sequence[Slot]:
        """Slots of the size that they have after a step."""
        w, hyper = state.weights, self._steps.settings(0)
        with torch.no_grad():
            point = Point(w, state.slots, [torch.zeros_like(x) for x in w], hyper, range(len(w)))
            return self._optimizer.update(point)[1]

    def _measured(self, batches: tuple[object, object], state: State) -> Sizes:
        """Bytes of states and steps, from the first step, whose batch was asked for twice."""
        reads = self._optimizer.reads or bool(self._steps.settings(0).wanted)
        narrows, count = self._states.narrows, self._micro_batches
        # A step before which a measure is taken keeps its weights: then all are counted so.
        anchors = not reads and self._measures.along is None and self._steps.anchors(state.weights)
        found = sizes(
            self._student, self._loss, batches, state, self._curvature, reads, narrows, count, anchors
        )
        return found if self._ranks is None else Sizes(*self._ranks.most(found))

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
        student = self._student
        devices = student.cuda_devices
        randomness = Randomness.now(devices)
        # meta=None gives every leaf that is reached its gradient, but the student's own are to be left out.
        own = [*student.parameters, *student.frozen.values()] if self._meta is None else []
        own_grads = [p.grad for p in own]
        metas = self._meta or []
        for i, x in enumerate(metas):
            check.unroll_meta_still(i, x.requires_grad)
        meta_grads = [x.grad for x in metas]
        for x in [*own, *metas]:
            x.grad = None
        student.settle()
        try:
            with torch.no_grad(), full_precision():  # what is taken again enters its own modes
                self._walk_back(v)
                found: Sequence[Tensor | None] = [x.grad for x in metas]
                if self._ranks is not None:
                    found = self._ranks.gradient(found, metas)
                meta_grads = [_added(x, y) for x, y in zip(meta_grads, found, strict=True)]
        finally:
            student.restore()
            self._tape.clear()
            self._states.close()
            self._start = None
            self._steps.forget()
            self._data = None
            for p, kept in zip([*own, *metas], [*own_grads, *meta_grads], strict=True):
                p.grad = kept
            randomness.restore(devices)
        self.report.nonfinite_tensor = self._trace.name
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
        if self._trace.looks and not all(map(math.isfinite, norms[-1])):
            self._trace.to(v_w.parts)
        limit = None if self._growth is None else _Limit(self._growth, v_w.parts, v.shape)
        for action, t in self._rest:
            if action is Action.REVERSE:
                step = self._tape.pop(t)
                if t >= last:
                    _lend(step.weights, v_w, t)
                else:
                    self._reverse(step, v_w, v_slots, v_settings)
                    if self._damping != 1.0:
                        torch._foreach_mul_(
                            [*v_w.parts, *(x for slot in v_slots for x in slot)], self._damping
                        )
                if along and t > self._first and self._measures.after(t):
                    self._measure_again(step, v_w, shares[t] * v)
                del step
                norms.append(v_w.norm())
                if self._trace.looks and not all(map(math.isfinite, norms[-1])):
                    self._trace.to(v_w.parts)
                if limit is not None and limit.ends(v_w.parts, v_slots):
                    break
            elif action in KEEP:
                self._states.keep(t, state, action, self._student.still)
            elif action is Action.RESTORE:
                state = self._states.back(t) if t else self._begin_again()
                if self._seen is not None:
                    self._seen.see(t, state)
            elif action is Action.DROP:
                self._states.drop(t)
            else:
                assert self._data is not None
                begin = perf_counter()
                with torch.enable_grad(), self._steps.modes():
                    state = self._take(t, state, self._data[t], action is Action.TAPE)
                self.report.steps_again += 1
                self.report.seconds_again += perf_counter() - begin
        if self._compiled is not None:
            self._compiled.close()
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
        if self._compiled is None:  # whose code does not call the student
            bound = (step.copies or gone(step.weights)) if step.anchored else step.weights
            self._student.bind(bound, step.buffers)
        point = Point((), (), (), hyper, places_of(step.weights, reached))
        if optimizer.reads or hyper.wanted:
            if step.grads is None:
                step.grads = gradient(self._steps.again(step, step.weights), step.weights)
            grads = [g for g in step.grads if g is not None]
            w, slots = pick(step.weights, reached), pick(step.slots, reached)
            point = point._replace(weights=w, slots=slots, grads=grads)
        v_w, v_slots = pick(adjoint.parts, reached), pick(v_slots, reached)
        a, found = optimizer.transpose(point, v_w, v_slots)
        v_settings += [(x, d.to(x)) for x, d in found]
        if not step.parts:
            self._product(step, a)  # v_w += H a
            return
        with self._sharing(step.weights, adjoint):
            places = places_of(step.weights, reached)
            shares = dict(zip(places, torch._foreach_div(a, len(step.parts)), strict=True))
            for part in step.parts:
                if part.reached != []:
                    self._product(part, [shares[i] for i in places_of(part.weights, part.reached)])

    def _sharing(self, weights: Tensors, adjoint: Adjoint) -> contextlib.AbstractContextManager[None]:
        """In it ranks add to the adjoint the mean of what they find."""
        return contextlib.nullcontext() if self._ranks is None else self._ranks.sharing(weights, adjoint)

    def _measure_again(self, step: Step, adjoint: Adjoint, v: Tensor) -> None:
        """Adds the gradient of the measure that was taken before this step: v_w += ∇M(w_t)."""
        rounded = self._states.narrows
        value = self._measures.again(step.index, step.weights, step.buffers, rounded)
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
        """Adds H a and ∂_Φ⟨g, a⟩; an inexact curvature is measured at the first step that comes, and what is
        wrong in silence is looked for from time to time.
        """
        assert self._steps.replay is not None
        report, wanted = self.report, Wanted(self._order == "exact", self._beside(step.index))
        replay = self._steps.replay._replace(examines=self._looks)
        if not report._measured:
            report._measured = True
            if self._curvature.exact:
                report.curvature_error = 0.0
            else:
                found = measured_error(self._curvature, step, replay, a, wanted)
                report.curvature_error, report.curvature_error_reason = found
                said = check.unroll_difference(report.curvature, report.curvature_error, replay.unit)
                if said is not None:
                    warnings.warn(said, stacklevel=5)
        try:
            self._products.product(step, replay, a, wanted)
        except check.ForwardModeError as error:
            check.unroll_symmetric_so_far(error, len(report._norms) - 1)
            # Steps are taken as before, so that those taken again are the same.
            report.curvature = "recompute"
            self._products = CURVATURES[report.curvature]
            warnings.warn(str(error), stacklevel=5)
            self._products.product(step, replay, a, wanted)

    @property
    def _looks(self) -> bool:
        """Whether this step of the walk is looked at more closely: one after 0, 1, 3, 7, ... others is."""
        walked = len(self.report._norms)
        return not walked & (walked - 1)

    def _finish(self, v_w: Adjoint, v_settings: list[tuple[Tensor, Tensor]]) -> None:
        """Hands the gradients of settings and initial weights to the leaves behind them."""
        ends = v_settings
        if self._meta is not None and not self._first:
            asked = {id(x) for x in self._meta}
            pairs = zip(self._student.parameters, v_w.parts, strict=True)
            ends = [*ends, *((p, part) for p, part in pairs if id(p) in asked)]
        if ends:
            accumulate([x for x, _ in ends], [v for _, v in ends], self._meta or [])

    def _inputs(self, weights: Tensors, index: int) -> Tensors:
        """The leaves whose ``.grad`` the reverse of a step fills; none for every leaf that it reaches."""
        beside = self._beside(index)
        return [] if beside is None else [*weights, *beside]

    def _beside(self, index: int) -> Tensors | None:
        """These leaves without the weights of the step themselves; None for every leaf that it reaches."""
        if self._meta is None:
            return None
        # The weights of steps before are there only so that _lend can tell a graph that leads into them: of
        # the step before, and from time to time of more.
        back = LEAKS if self._looks else 1
        steps = (self._tape.get(t) for t in range(max(index - back, 0), index))
        return [*(w for step in steps if step is not None for w in step.weights), *self._meta]


class _Limit:
    """Ends an adjoint that grows to more than so many times its norm after the measure; of students side by
    side, which have a measure each, every one by itself.
    """

    def __init__(self, growth: float, parts: Tensors, students: torch.Size) -> None:
        stacked = all(x.shape[:1] == students for x in parts)
        self._students = students if stacked else torch.Size()
        self._most = growth * self._norms(parts)
        self._ended = torch.zeros_like(self._most, dtype=torch.bool)

    def _norms(self, parts: Tensors) -> Tensor:
        """Of each student, in float64."""
        count = max(1, math.prod(self._students))
        rows = [x.reshape(*self._students, x.numel() // count) for x in parts]
        norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in rows]
        total: Tensor = torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]), dim=0)
        return total

    def ends(self, parts: Tensors, slots: Sequence[Slot]) -> bool:
        """Makes zero what has grown too long, infinite and NaN among it; whether nothing is left."""
        grown = ~(self._norms(parts) <= self._most)
        if bool(grown.any()):
            self._ended |= grown
            for x in [*parts, *tensors_of(slots)]:
                if x.shape[: grown.dim()] == grown.shape:
                    x[grown.to(x.device)] = 0
        return bool(self._ended.all())


def _lend(weights: Tensors, adjoint: Adjoint, index: int) -> None:
    """Makes the adjoint the ``.grad`` of a step's weights, so that the engine adds H a to it in place."""
    for w, part in zip(weights, adjoint.parts, strict=True):
        if w.grad is not None:
            raise check.unroll_leak(index)
        w.grad = part


def _added(kept: Tensor | None, found: Tensor | None) -> Tensor | None:
    """What a gradient becomes that is added to: as in a backward pass the same tensor, where there is one."""
    if kept is None or found is None or kept.is_sparse or found.is_sparse:
        return total_of(kept, found)
    return kept.add_(found)


def _in_order(batches: Iterable[Any]) -> Iterable[Any]:
    """All of them: what has a length may know no other end."""
    if not indexed(batches):
        return batches
    data = cast("Sequence[Any]", batches)
    return (data[t] for t in range(len(data)))


def _all(batches: Iterable[Any]) -> list[Any]:
    """All of them, none of which may be written while others are read."""
    data: list[Any] = []
    seen: list[list[int]] = []
    for batch in batches:
        data.append(batch)
        seen.append(versions(batch))
    for t, batch in enumerate(data):
        check.unroll_batch_still(t, versions(batch) == seen[t])
    return data


def indexed(batches: object) -> bool:
    """Whether a batch can be read again by its step."""
    known = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    return known and not isinstance(batches, IterableDataset)  # which has the first, and raises in it
