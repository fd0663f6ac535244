"""How a run takes its steps: for the first time, to be remembered or not, and again.

Docs: sections 5 and 6 of docs/math.md. A step is loss, gradient and update at one state. It may be made of
micro-batches and shared by ranks; then what a curvature reads of it lies in parts. In which order steps are
taken is the run's (l2t/run.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from l2t import check
from l2t.anchors import anchored, as_leaves, large, reads_weights, stand_ins
from l2t.compiled import Compiled
from l2t.curvature import Curvature, Replay, checkpoints, coarsest, doubtful, dtypes, precompiled
from l2t.graph import Hooked
from l2t.graph import leaves as leaves_of
from l2t.optim import SGD, Hyper, Optimizer, Point, Slot, Tensors
from l2t.ranks import Ranks
from l2t.record import Trace
from l2t.states import Fingerprints
from l2t.tape import (
    Grads,
    Randomness,
    Roots,
    State,
    Step,
    Student,
    Taken,
    full_precision,
    modes,
    versions,
)

__all__ = ["Steps", "pick", "places_of", "total_of"]

Entry = TypeVar("Entry")

LOOKS = 16
"""Every so many steps it is looked in which dtypes a step computes, and after 0, 1, 2, 4 and 8."""


class Steps:
    """The steps of a run.

    Attributes:
        settings: the optimiser's, as a function of the step that is asked once a step.
        course: what each step is taken again by.
        modes: enters the modes that the run is taken in.
        replay: how a curvature takes a step again; None before the first step.
        rounding: told of the loss of a step taken again from a rounded state and of that in the run; None
            where states are exact, and so are losses.
    """

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        meta: list[Tensor] | None,
        curvature: Curvature,
        micro_batches: int,
        ranks: Ranks | None,
        seen: Fingerprints | None,
        trace: Trace,
    ) -> None:
        self._student, self._loss, self._optimizer, self._meta = student, loss, optimizer, meta
        self._curvature, self._micro_batches, self._ranks = curvature, micro_batches, ranks
        self._seen, self._trace = seen, trace
        self.settings = functools.cache(optimizer.settings())
        self.course: list[Taken] = []
        self.modes = modes()
        self.replay: Replay | None = None
        self._compiled = curvature if isinstance(curvature, Compiled) else None
        if self._compiled is not None:
            self.replay = Replay(self.again, unit=0.0, examines=False)  # which it does not read
        self.rounding: Callable[[Tensor, Tensor], None] | None = None
        self._reached: list[int] | None = None  # by the loss of the step before
        self._anchors: bool | None = None
        self._tried = False
        self.tries = False  # whether the first step is to be looked at for doubt
        self.doubt = False
        self._casts = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))

    def forget(self) -> None:
        """Lets go of the course."""
        self.course.clear()
        self.settings.cache_clear()

    def start(self) -> State:
        """The state before the first step, from the student's own parameters and buffers."""
        w: Tensors = [p.detach().clone().requires_grad_() for p in self._student.parameters]
        b = {id(x): x.clone() for x in self._student.buffers}  # one each, so that tied ones stay tied
        return State(w, self._optimizer.start(w), [b[id(x)] for x in self._student.buffers])

    def take(
        self, t: int, state: State, batch: object, *, tapes: bool, returns: bool, measured: bool = False
    ) -> tuple[State, Step | None]:
        """Takes step t: the state after it, and what is remembered of the step if it is taped.

        A step that is in the course is taken again. ``returns`` says of one that is not whether it will be,
        ``measured`` whether a measure will be taken again at the weights before it.
        """
        w, slots, b = state
        student, hyper, again = self._student, self.settings(t), t < len(self.course)
        randomness = None
        if again:
            taken = self.course[t]
            if taken.randomness is not None:
                taken.randomness.restore(student.cuda_devices)
        elif self._compiled is not None:
            pass  # its steps draw no random numbers
        elif returns or (tapes and not self._curvature.keeps_graph):
            before = self.course[-1].randomness if self.course else None
            randomness = Randomness.now(student.cuda_devices, before)
        reads = self._optimizer.reads or bool(hyper.wanted)
        step = Step(t, hyper, w, b, slots if reads else ()) if tapes else None
        if step is not None and not reads and not measured and self.anchors(w):
            step.anchored = True
        if self._micro_batches == 1 and self._ranks is None:
            value, g, b = self._gradient(step, t, w, b, batch, reads)
        else:
            value, g, b = self._accumulated(step, t, w, b, batch, taken.randomness if again else randomness)
        if self._casts:
            torch.clear_autocast_cache()  # it holds the casts of every step's weights
        with full_precision() if self._casts else contextlib.nullcontext():
            w, slots, reached = _update(self._optimizer, w, slots, g, hyper)
        if again and self.rounding is not None:
            self.rounding(value, taken.loss)
            taken = taken._replace(loss=value)
        elif again:
            check.unroll_replayed(value, taken.loss, t)
        else:
            taken = Taken(randomness, value, reached)
            self.course.append(taken)
            if self._trace.looks and not math.isfinite(value):
                self._trace.to(state.weights)
        if step is not None:
            step.reached, step.loss, step.randomness = reached, taken.loss, taken.randomness
            if step.parts and reads:
                step.grads = g
        state = State(w, slots, b)
        if self._seen is not None:
            self._seen.see(t + 1, state)
        return state, step

    def _gradient(
        self, step: Step | None, t: int, w: Tensors, b: list[Tensor], batch: object, reads: bool
    ) -> tuple[Tensor, Grads, list[Tensor]]:
        """Loss and gradient of a batch, and the buffers after it; a step remembers what curvatures read."""
        if self._compiled is not None:
            value, g, b, kept, written = self._compiled.step(t, w, b, batch)
            self.doubt = self.tries and self._compiled.foreign
            if step is not None:
                step.batch, step.kept, step.versions = batch, kept, written
                step.grads = g if self._curvature.keeps_gradient(reads) else None
                if step.anchored:
                    step.weights = stand_ins(w)
            return value, g, b
        found: Tensor | None = None
        student, own, leaves = self._student, w, w
        anchors = step is not None and step.anchored
        # The step is taken anew where its weights have to be leaves, or a buffer that was lent is written.
        start = Randomness.now(student.cuda_devices) if anchors or student.still else None
        if step is not None and anchors:
            leaves, w = anchored(own)
            step.weights = leaves
        student.bind(w, b, lends=True)
        try:
            with contextlib.ExitStack() as stack:
                if anchors and not self._tried:
                    stack.enter_context(as_leaves())
                if self.tries:
                    stack.enter_context(hooked := Hooked())
                found = student.call(self._loss, leaves, w, batch, t)
        except Exception:
            if not anchors:
                raise
        # A loss that calls backward() may read .grad of its weights; but their anchors have it.
        fails = anchors and (found is None or student.went_back)
        if student.takes_back() or fails:
            return self._anew(start, step, fails, t, own, b, batch, reads)
        value = check.unroll_loss(found, t)
        if self.replay is None:
            checkpoints(value)
            if self._meta is None:
                for leaf in leaves_of([value]):
                    check.unroll_hooks_of_leaf(leaf)
            if self._curvature.exact:
                precompiled(value)
        if t == len(self.course) and (not t & (t - 1) or not t % LOOKS):
            self._look(value)
        # The graph is built in steps that are taken to be forgotten, too: without it some of PyTorch's
        # derivatives come from other kernels, with other bits.
        g, d_others = self._curvature.gradient(value, w, self._meta)
        if (reached := _reached(g)) != self._reached:
            self._reached = reached
            checkpoints(value)
        if self.tries:
            self.tries, randomness = False, Randomness.now(student.cuda_devices)
            self.doubt = hooked.any or doubtful(value, g, w)
            randomness.restore(student.cuda_devices)
        if type(self._optimizer) is not SGD or not self._curvature.exact:
            for name, x in zip(student.names, g, strict=True):
                if x is not None and x.is_sparse:
                    check.unroll_sparse(name)
        after = student.buffers_after(b)
        student.release()
        if step is not None and anchors and not self._tried:
            self._tried = True
            if reads_weights(student, Roots.of(g).edges, b):
                step.copies, self._anchors = w, False
        b = after
        if step is not None:
            if self._curvature.keeps_graph:
                step.roots = Roots.of(g)
            else:
                step.batch, step.versions, step.d_others = batch, versions(batch), d_others
            step.grads = g if self._curvature.keeps_gradient(reads) else None
        return value.detach(), g, b

    def _anew(
        self,
        start: Randomness | None,
        step: Step | None,
        plain: bool,
        t: int,
        w: Tensors,
        b: list[Tensor],
        batch: object,
        reads: bool,
    ) -> tuple[Tensor, Grads, list[Tensor]]:
        """The same from the start, with random numbers as they were; ``plain`` at the weights themselves."""
        assert start is not None
        start.restore(self._student.cuda_devices)
        if step is not None and plain:
            step.weights, step.anchored, self._anchors = w, False, False
        return self._gradient(step, t, w, b, batch, reads)

    def _look(self, value: Tensor) -> None:
        """Takes in what the step of this loss computes in: the coarsest arithmetic so far counts."""
        kinds = dtypes(value)
        unit = max([coarsest(self._student.parameters), *(torch.finfo(x).eps for x in kinds)])
        half = torch.float16 in kinds
        if self.replay is not None:
            unit, half = max(unit, self.replay.unit), half or self.replay.half
        self.replay = Replay(self.again, unit, half)

    def anchors(self, weights: Tensors) -> bool:
        """Whether the graphs of taped steps alone are to keep the weights, where nothing else reads them."""
        if self._anchors is None:
            single = self._micro_batches == 1 and self._ranks is None and self._seen is None
            self._anchors = self._curvature.keeps_graph and single and large(weights)
        return self._anchors

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
                    total[i] = total_of(total[i], x.detach())
            del g
        if step is not None:
            step.parts = parts
        mean: Grads = tuple(None if x is None else x / count for x in total)
        if self._ranks is not None:
            mean = self._ranks.gradient(mean, w)
        return torch.stack(losses).sum(0) / count, mean, b

    def again(self, step: Step, weights: Tensors) -> Tensor:
        """The loss of a step, run again with its batch and random numbers. The student stays bound."""
        assert step.randomness is not None
        check.unroll_batch_still(step.index, versions(step.batch) == step.versions)
        step.randomness.restore(self._student.cuda_devices)
        self._student.bind(weights, step.buffers, lends=True)
        with torch.enable_grad(), self.modes():
            value = self._student.call(self._loss, weights, weights, step.batch, step.index)
            if self._casts:
                torch.clear_autocast_cache()
        step.versions = versions(step.batch)  # a loss may write to it, if it comes to the same
        if weights is step.weights:
            check.unroll_replayed(value, step.loss, step.index)
            if self._seen is not None and self._micro_batches == 1:
                self._seen.see(step.index, State(weights, (), step.buffers))
                after = self._student.buffers_after(step.buffers)
                self._seen.see(step.index + 1, State([], (), after))
        return value


def _update(
    optimizer: Optimizer, w: Tensors, slots: Sequence[Slot], g: Grads, hyper: Hyper
) -> tuple[Tensors, Sequence[Slot], list[int] | None]:
    """Weights after a step, as leaves; slots; and which weights the loss reaches, None for all."""
    grads = [x for x in g if x is not None]
    reached = None if len(grads) == len(g) else _reached(g)
    with torch.no_grad():
        new_w, new_slots = pick(w, reached), pick(slots, reached)
        if grads:
            point = Point(new_w, new_slots, grads, hyper, places_of(w, reached))
            new_w, new_slots = optimizer.update(point)
        if reached is not None:
            # The others stay as they are, but as leaves of their own: a leaf belongs to one step.
            new_w = _put(new_w, reached, [x.detach() for x in w])
            new_slots = _put(new_slots, reached, slots)
    for x in new_w:
        x.requires_grad_()
    return new_w, new_slots, reached


def total_of(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    return x if y is None else y if x is None else x + y


def _reached(g: Sequence[Tensor | None]) -> list[int] | None:
    """The places of the weights that a gradient reaches, None for all."""
    reached = [i for i, x in enumerate(g) if x is not None]
    return None if len(reached) == len(g) else reached


def places_of(weights: Tensors, reached: list[int] | None) -> Sequence[int]:
    """The places of the weights that a step reaches among all."""
    return range(len(weights)) if reached is None else reached


def pick(xs: Any, indices: list[int] | None) -> Any:
    """The entries at these indices; all of them where there is nothing to pick."""
    return xs if indices is None else [xs[i] for i in indices]


def _put(xs: Sequence[Entry], indices: list[int], others: Sequence[Entry]) -> list[Entry]:
    """These entries at these indices among others."""
    by_index = dict(zip(indices, xs, strict=True))
    return [by_index.get(i, x) for i, x in enumerate(others)]
