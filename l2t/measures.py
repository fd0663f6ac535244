"""The measure of a run: after which steps it is taken, what it gave, and how the walk back takes it again.

Docs: section 5 of docs/math.md. J is the measure at the end, or a weighted sum of measures along the way. A
measure along the way leaves no graph behind: the walk back takes it again where it comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from l2t import check
from l2t.optim import Tensors
from l2t.tape import Randomness, Student, modes

__all__ = ["Measures"]


class Measures:
    """The measures of a run.

    Args:
        measure: ``measure(model)``.
        student: whose weights it is taken at.
        along: as for :func:`l2t.unroll`, checked.

    Attributes:
        values: what each gave, detached, by the number of steps taken before it.
    """

    def __init__(
        self,
        measure: Callable[[nn.Module], Tensor],
        student: Student,
        along: int | Mapping[int, float] | None,
    ) -> None:
        self._measure, self._student, self.along = measure, student, along
        self._modes = modes()
        self._randomness: dict[int, Randomness] = {}
        self.values: dict[int, Tensor] = {}

    def after(self, taken: int) -> bool:
        """Whether one is asked for after so many steps, be they the last or not."""
        if self.along is None:
            return False
        return taken % self.along == 0 if isinstance(self.along, int) else taken in self.along

    @property
    def at_end(self) -> bool:
        """Whether one is asked for after the last step, however many they are."""
        return not isinstance(self.along, Mapping)

    def take(self, taken: int, weights: Tensors, buffers: list[Tensor]) -> Tensor:
        """Takes the measure after so many steps, with its graph."""
        if self.after(taken):
            before = next(reversed(self._randomness.values()), None)
            self._randomness[taken] = Randomness.now(self._student.cuda_devices, before)
        value = self._value(weights, buffers)
        check.unroll_measure(value, next(iter(self.values.values()), None))
        self.values[taken] = value.detach()
        return value

    def again(self, taken: int, weights: Tensors, buffers: list[Tensor], rounded: bool) -> Tensor:
        """Takes a measure along the way again, with its graph: the same numbers, but at rounded weights."""
        self._randomness.pop(taken).restore(self._student.cuda_devices)
        with torch.enable_grad(), self._modes():
            value = self._value(weights, buffers)
        if not rounded:
            check.unroll_measured_again(value, self.values[taken], taken)
        return value

    def _value(self, weights: Tensors, buffers: list[Tensor]) -> Tensor:
        self._student.bind(weights, buffers)
        return self._student.call(self._measure, weights, weights)

    def shares(self) -> Mapping[int, float]:
        """The weight of each measure in J, by the number of steps taken before it."""
        if isinstance(self.along, Mapping):
            return self.along
        return dict.fromkeys(self.values, 1 / len(self.values))

    def total(self, values: dict[int, Tensor]) -> Tensor:
        """J of these measures."""
        if self.along is None:
            return next(iter(values.values()))
        shares = self.shares()
        parts = [shares[taken] * value for taken, value in values.items()]
        total: Tensor = torch.stack(parts).sum(0)
        return total
