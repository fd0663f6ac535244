"""What an unrolled run remembers, and when: plain actions that know nothing of torch.

Docs: section 6 of docs/math.md. A schedule is asked step by step while the run is taken, when the number of
steps may not be known yet (a generator of batches), and once for the walk back, when it is. What an action
does to weights and graphs is in l2t/unroll.py; what is remembered of a step is in l2t/tape.py.

Here is the one schedule that stores every step. Schedules that store fewer steps and run some again fit the
same five actions: ``Restore(s), Forward(s), ..., Forward(t - 1), Reverse(t)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

__all__ = ["Action", "Drop", "Forward", "Restore", "Reverse", "Schedule", "Store", "StoreAll"]


class Store(NamedTuple):
    """Remember the state before ``step``."""

    step: int


class Forward(NamedTuple):
    """Take ``step``: the state before it becomes the state after it."""

    step: int


class Restore(NamedTuple):
    """Make the remembered state before ``step`` the present one."""

    step: int


class Reverse(NamedTuple):
    """Take the adjoint back over ``step``, whose state before it is the present one."""

    step: int


class Drop(NamedTuple):
    """Forget the state before ``step``."""

    step: int


Action = Store | Forward | Restore | Reverse | Drop


class Schedule(Protocol):
    """The order of storing, stepping and reversing in a run."""

    def forward(self, step: int) -> Iterable[Action]:
        """Actions when the run comes to ``step``: ``Forward(step)``, after ``Store(step)`` or not."""

    def reverse(self, steps: int) -> Iterable[Action]:
        """Actions of the walk back over ``steps`` steps, ``Reverse`` once for each, the last one first."""


class StoreAll:
    """Store the state before every step and run none again: O(T) memory, the fewest operations.

    Example:
        >>> list(StoreAll().forward(0))
        [Store(step=0), Forward(step=0)]
        >>> list(StoreAll().reverse(2))
        [Restore(step=1), Reverse(step=1), Drop(step=1), Restore(step=0), Reverse(step=0), Drop(step=0)]
    """

    def forward(self, step: int) -> Iterable[Action]:
        """Store, then step."""
        return Store(step), Forward(step)

    def reverse(self, steps: int) -> Iterable[Action]:
        """Restore, reverse and drop each step, the last one first."""
        for step in reversed(range(steps)):
            yield Restore(step)
            yield Reverse(step)
            yield Drop(step)
