"""What an unrolled run remembers, and when: plain actions that know nothing of torch.

Docs: section 6 of docs/math.md. A schedule is asked step by step while the run is taken, when the number of
steps may not be known yet (a generator of batches), and once for the walk back, when it is. What an action
does to weights and graphs is in l2t/unroll.py; what is remembered of a step is in l2t/tape.py.

Here is the one schedule that stores every step. Schedules that store fewer steps and run some again fit the
same
five actions: restore s, forward s, ..., forward t - 1, reverse t.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Protocol

__all__ = ["Action", "Schedule", "StoreAll"]


class Action(Enum):
    """What is done at a step t."""

    STORE = "store"  # remember the state before t
    FORWARD = "forward"  # take t: the state before it becomes the state after it
    RESTORE = "restore"  # make the remembered state before t the present one
    REVERSE = "reverse"  # take the adjoint back over t, whose state before it is the present one
    DROP = "drop"  # forget the state before t


class Schedule(Protocol):
    """The order of storing, stepping and reversing in a run."""

    def forward(self, step: int) -> Iterable[tuple[Action, int]]:
        """Actions when the run comes to ``step``: FORWARD, after STORE or not."""

    def reverse(self, steps: int) -> Iterable[tuple[Action, int]]:
        """Actions of the walk back over ``steps`` steps: REVERSE once for each, the last one first."""


class StoreAll:
    """Store the state before every step and run none again: O(T) memory, the fewest operations.

    Example:
        >>> [(action.value, step) for action, step in StoreAll().reverse(2)]
        [('restore', 1), ('reverse', 1), ('drop', 1), ('restore', 0), ('reverse', 0), ('drop', 0)]
    """

    def forward(self, step: int) -> Iterable[tuple[Action, int]]:
        """Store, then step."""
        return (Action.STORE, step), (Action.FORWARD, step)

    def reverse(self, steps: int) -> Iterable[tuple[Action, int]]:
        """Restore, reverse and drop each step, the last one first."""
        for step in reversed(range(steps)):
            yield Action.RESTORE, step
            yield Action.REVERSE, step
            yield Action.DROP, step
