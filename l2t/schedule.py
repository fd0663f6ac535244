"""What an unrolled run remembers, and when: plans of plain actions that know nothing of torch.

Docs: section 6 of docs/math.md. A schedule turns the number of steps into the actions of a whole run,
printable before it; what they do to weights and graphs is in l2t/run.py, what is remembered of a step in
l2t/tape.py.

A step is taped where its reversal comes next or nearly so; between tapes there are states, from which steps
are taken again. `Segments` covers the known ways: every step taped (one segment), every k-th state stored
(as many slots as segments), and the binomial schedule of Griewank and Walther (segments of one step), which
for a number of slots takes the fewest steps again. `TwoLevel` keeps states outside the memory and plans
between them. `fit` and `fit_outside` pick among them for a memory, and `tally` counts what one needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple, Protocol

from l2t import check

__all__ = [
    "Action",
    "Plan",
    "Schedule",
    "Segments",
    "StoreAll",
    "Tally",
    "TwoLevel",
    "first_again",
    "fit",
    "fit_outside",
    "playable",
    "tally",
]


class Action(Enum):
    """What is done at a step t."""

    STORE = "store"  # remember the present state, which is the one before t
    TO_HOST = "to host"  # the same, in the host's memory
    TO_DISK = "to disk"  # the same, on disk
    FORWARD = "forward"  # take t: the state before it becomes the state after it
    TAPE = "tape"  # take t and remember what its reversal needs
    RESTORE = "restore"  # make the remembered state before t the present one; t = 0 is always remembered
    REVERSE = "reverse"  # take the adjoint back over t, which has been taped
    DROP = "drop"  # forget the state before t


Actions = Iterator[tuple[Action, int]]


class Schedule(Protocol):
    """The order of storing, stepping and reversing in a run."""

    def actions(self, steps: int) -> Actions:
        """All actions of a run: TAPE and REVERSE once for each step, the last step reversed first.

        Asked for more than once: to count through them, and to play them.
        """


class StoreAll:
    """Tape every step as the run is taken and take none again: the fewest operations, memory for all of it.

    Example:
        >>> [(action.value, step) for action, step in StoreAll().actions(2)]
        [('tape', 0), ('tape', 1), ('reverse', 1), ('reverse', 0)]
    """

    def actions(self, steps: int) -> Actions:
        """Tape every step, then reverse every step."""
        for step in range(steps):
            yield Action.TAPE, step
        for step in reversed(range(steps)):
            yield Action.REVERSE, step

    def __repr__(self) -> str:
        return "StoreAll()"


class Segments:
    """Tape a segment of steps at a time; between segments remember at most ``slots`` states besides the
    first.

    A segment is reached by taking steps again from the last state remembered before it. For given segments
    and slots no schedule takes fewer steps again (Griewank and Walther, "Algorithm 799: revolve", 2000).

    Args:
        length: the steps of a segment.
        slots: how many states are remembered at a time; None: the first state of every segment.

    Example:
        Ten steps with one state remembered at a time besides the start:

        >>> plan = Segments(length=2, slots=1)
        >>> sum(action is Action.FORWARD for action, _ in plan.actions(10))
        12
        >>> plan.forward_steps(10)
        12
        >>> print(fit(10_000, state_bytes=3_000_000, step_bytes=2_000_000, memory=64_000_000))
        Segments(length=8, slots=15)
    """

    def __init__(self, length: int = 1, slots: int | None = None) -> None:
        check.schedule_size("length", length, 1)
        check.schedule_size("slots", 0 if slots is None else slots, 0)
        self.length, self.slots = length, slots

    def __repr__(self) -> str:
        return f"Segments(length={self.length}, slots={self.slots})"

    def actions(self, steps: int) -> Actions:
        """Down the run storing states, then back, segment by segment."""
        segments = -(-steps // self.length)
        slots = segments if self.slots is None else self.slots
        if segments:
            yield from self._back_over(segments, slots, steps)

    def forward_steps(self, steps: int) -> int:
        """How many steps are taken to be forgotten, in closed form; each step is besides taped once."""
        segments = -(-steps // self.length)
        slots = segments if self.slots is None else self.slots
        return forwards(segments, slots) * self.length

    def _back_over(self, count: int, slots: int, steps: int) -> Actions:
        """Reverses so many segments from the state before them, present and remembered."""
        # Stretches that wait for the one behind them to be reversed: first segment, segments, slots. No
        # recursion, since there may be as many as there are slots.
        waiting: list[tuple[int, int, int]] = []
        first = 0
        while True:
            begin = first * self.length
            if count > 1:
                ahead = _split(count, slots)
                middle = (first + ahead) * self.length
                for step in range(begin, middle):
                    yield Action.FORWARD, step
                if slots:
                    yield Action.STORE, middle
                    waiting.append((first, ahead, slots))
                    first, count, slots = first + ahead, count - ahead, slots - 1
                else:
                    yield from self._tape(middle, steps)
                    yield Action.RESTORE, begin
                    count = ahead
                continue
            yield from self._tape(begin, steps)
            if not waiting:
                return
            yield Action.DROP, begin
            first, count, slots = waiting.pop()
            yield Action.RESTORE, first * self.length

    def _tape(self, begin: int, steps: int) -> Actions:
        """Tapes the segment from this step on, and reverses it."""
        end = min(begin + self.length, steps)
        for step in range(begin, end):
            yield Action.TAPE, step
        for step in reversed(range(begin, end)):
            yield Action.REVERSE, step


WRITING = 2  # states that may wait in memory to be written


class TwoLevel:
    """Keep the state before every so many steps on disk or in host memory, and reverse the steps between by
    another schedule, from the last to the first.

    Args:
        length: the steps between two states that are kept outside.
        inner: the schedule of these steps; by default all of them are taped.
        level: where the outer states are kept: ``"disk"``, or ``"host"`` for the memory of the machine, which
            is another one for a student on a GPU only.

    Example:
        >>> [(action.value, step) for action, step in TwoLevel(length=1).actions(2)]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('forward', 0), ('to disk', 1), ('tape', 1), ('reverse', 1), ('drop', 1),
         ('restore', 0), ('tape', 0), ('reverse', 0)]
    """

    def __init__(self, length: int, inner: Schedule | None = None, level: str = "disk") -> None:
        check.schedule_size("length", length, 1)
        check.known("schedule", "level", level, LEVELS)
        self.length, self.inner, self.level = length, inner or StoreAll(), level

    def __repr__(self) -> str:
        return f"TwoLevel(length={self.length}, inner={self.inner!r}, level={self.level!r})"

    def actions(self, steps: int) -> Actions:
        """Down the run storing states outside, then back, stretch by stretch."""
        # The last stretch is a full one, since it is not taken again.
        stretches = [(max(end - self.length, 0), end) for end in range(steps, 0, -self.length)]
        for begin, end in reversed(stretches):
            if begin:
                yield LEVELS[self.level], begin
            if end < steps:
                for step in range(begin, end):
                    yield Action.FORWARD, step
        for begin, end in stretches:
            if end < steps:
                yield Action.RESTORE, begin
            for action, step in self.inner.actions(end - begin):
                yield action, begin + step
            if begin:
                yield Action.DROP, begin


LEVELS = {"disk": Action.TO_DISK, "host": Action.TO_HOST}


def _repetitions(count: int, slots: int) -> int:
    """The least r with binomial(slots + 1 + r, r) >= count: how often a step may be taken to be forgotten."""
    r, reach = 0, 1
    while reach < count:
        r += 1
        reach = reach * (slots + 1 + r) // r
    return r


def forwards(count: int, slots: int) -> int:
    """The least number of segments taken to be forgotten in reversing so many, with so many slots.

    ``r n - binomial(s + r, r - 1)`` with s = slots + 1 and r the repetitions (Griewank and Walther, 2000).
    """
    if count < 2:
        return 0
    r = _repetitions(count, slots)
    return r * count - math.comb(slots + 1 + r, r - 1)


def _split(count: int, slots: int) -> int:
    """After how many segments to store the next state.

    The least m at which m + forwards(count - m, slots - 1) + forwards(m, slots) stops falling: one more
    segment costs 1, repetitions of m + 1 on the left, and saves those of count - m on the right.
    """
    if slots == 0:
        return count - 1
    low, high = 1, count - 1
    while low < high:
        m = (low + high) // 2
        if 1 + _repetitions(m + 1, slots) >= _repetitions(count - m, slots - 1):
            high = m
        else:
            low = m + 1
    return low


def first_again(actions: Actions) -> set[int]:
    """The states that the first steps taken again come by, the one that they start from included."""
    found: set[int] = set()
    reversing = False
    for action, step in actions:
        if action is Action.REVERSE:
            if found:
                break
            reversing = True
        elif action is Action.RESTORE:
            found = {step}
        elif reversing and action in (Action.FORWARD, Action.TAPE):
            found.add(step + 1)
    return found


class Tally(NamedTuple):
    """What a plan needs at most at a time, beside a training step's own, and how often it takes a step again.

    ``memory``, ``host`` and ``disk`` are bytes: of states and tapes where the student lives, the state before
    the first step among them where steps are taken again from it, and of the states that are kept outside.
    """

    memory: int
    host: int
    disk: int
    steps_again: int


def tally(schedule: Schedule, steps: int, state_bytes: int, step_bytes: int) -> Tally:
    """Counts through the actions of a plan.

    Example:
        >>> tally(Segments(length=2, slots=1), 10, state_bytes=3, step_bytes=2)
        Tally(memory=10, host=0, disk=0, steps_again=12)
    """
    kept: dict[int, Action] = {}
    now = dict.fromkeys((Action.STORE, Action.TO_HOST, Action.TO_DISK), 0)
    most, memory, tapes, taken, first = dict(now), 0, 0, 0, 0
    for action, step in schedule.actions(steps):
        if action in now:
            kept[step] = action
            now[action] += 1
            most[action] = max(most[action], now[action])
        elif action is Action.DROP:
            now[kept.pop(step)] -= 1
        elif action is Action.TAPE:
            tapes, taken = tapes + 1, taken + 1
        elif action is Action.FORWARD:
            taken += 1
        elif action is Action.REVERSE:
            tapes -= 1
        elif step == 0:  # restored
            first = state_bytes
        memory = max(memory, now[Action.STORE] * state_bytes + tapes * step_bytes)
    host, disk = most[Action.TO_HOST] * state_bytes, most[Action.TO_DISK] * state_bytes
    return Tally(first + memory + min(WRITING * state_bytes, disk), host, disk, taken - steps)


def playable(schedule: Schedule, steps: int) -> bool:
    """Whether a plan takes steps from states that are there, drops what it has stored, and reverses each step
    once, the last first.

    Example:
        >>> playable(Segments(length=2, slots=1), 10)
        True
    """
    kept, taped, at, left = {0}, set(), 0, steps
    stored: set[int] = set()
    for action, step in schedule.actions(steps):
        if action in (Action.TAPE, Action.FORWARD):
            if step != at:
                return False
            at += 1
            if action is Action.TAPE:
                taped.add(step)
        elif action is Action.RESTORE:
            if step not in kept:
                return False
            at = step
        elif action is Action.REVERSE:
            if step != left - 1 or step not in taped:
                return False
            taped.remove(step)
            left = step
        elif action is Action.DROP:
            if step not in stored:
                return False
            stored.remove(step)
            kept.remove(step)
        else:
            if step != at:
                return False
            stored.add(step)
            kept.add(step)
    return left == 0


class Plan(NamedTuple):
    """What a schedule needs: of memory in bytes, beside a training step's own, and of steps taken again."""

    schedule: Schedule
    bytes: int
    forward_steps: int

    def __str__(self) -> str:
        return str(self.schedule)


def fit(steps: int, state_bytes: int, step_bytes: int, memory: int) -> Plan:
    """The plan that takes the fewest steps again within a memory.

    Args:
        steps: T.
        state_bytes: of a state between steps: weights, optimiser state, buffers.
        step_bytes: of a taped step: its weights and what its graph keeps.
        memory: bytes for both together.

    Raises:
        ValueError: the memory does not hold one taped step and the state before the first.
    """
    if steps * step_bytes <= memory:
        return Plan(StoreAll(), steps * step_bytes, 0)
    check.schedule_memory(memory, state_bytes + step_bytes)
    left = memory - state_bytes  # without the first one
    best: tuple[int, int, int] | None = None
    for length in range(1, left // step_bytes + 1):
        segments = -(-steps // length)
        slots = min((left - length * step_bytes) // max(state_bytes, 1), segments - 1)
        cost = forwards(segments, slots) * length
        if best is None or cost < best[0]:
            best = cost, length, slots
    assert best is not None
    cost, length, slots = best
    return Plan(Segments(length, slots), length * step_bytes + (1 + slots) * state_bytes, cost)


def fit_outside(steps: int, state_bytes: int, step_bytes: int, memory: int) -> Schedule:
    """The plan that takes the fewest steps again within a memory where states go to disk: each once.

    Arguments and errors are those of :func:`fit`.
    """
    if steps * step_bytes <= memory:
        return StoreAll()
    states = (1 + WRITING) * state_bytes  # the first one, and those that wait
    check.schedule_memory(memory, states + step_bytes)
    return TwoLevel((memory - states) // step_bytes)
