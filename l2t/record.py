"""The report of a run: what it cost and how it went.

The run (l2t/run.py) fills it in as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l2t.budget import Sizes
from l2t.schedule import Schedule, StoreAll, tally

__all__ = ["Report", "Trace"]


class Trace:
    """The parameter with which the first value of a run that is not finite began.

    Attributes:
        looks: whether none has come yet, and a look costs no wait for a device.
        name: the parameter; None where there is none.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        self._names = names
        self.looks = all(p.is_cpu for p in parameters)
        self.name: str | None = None

    def to(self, tensors: Sequence[Tensor]) -> None:
        """Takes the first of the parameters whose tensor is not finite."""
        self.looks = False
        for name, x in zip(self._names, tensors, strict=True):
            if not torch.linalg.vector_norm(x.detach()).isfinite():
                self.name = name
                return


class Report:
    """What a run cost and how it went. Numbers come from the device when they are asked for, not before.

    Attributes:
        steps: the number of steps T.
        seconds_forward: seconds of this process for the run, the measure included.
        seconds_backward: seconds for the walk back; None before it.
        seconds_again: seconds of the walk back for steps that were taken again by the schedule.
        schedule: the schedule of the run, an object of :mod:`l2t.schedule`; ``l2t.report.write_run`` draws
            it.
        sizes: bytes of a state that is remembered and of a taped step, where these were looked at before the
            run: with a schedule that goes by a memory, and with any but ``"all"`` where the curvature keeps
            no graphs. Else None; :func:`l2t.plan` looks for every schedule.
        cuda_peak_bytes: of the student's GPUs, ``torch.cuda.max_memory_allocated`` after the walk back; None
            without one.
        store: ``"exact"`` or ``"bfloat16"``, as asked for.
        steps_again: how many steps the walk back has taken again, by its schedule.
        curvature: the name of the way to second derivatives; where ``"forward"`` had to fall back, the way
            that it fell back to.
        curvature_error: the relative error of the products of an inexact curvature, against the exact ones at
            the last step; 0 for an exact curvature, None before the walk back, and where it cannot be told.
        curvature_error_reason: why ``curvature_error`` cannot be told; None where it can.
        nonfinite_tensor: the parameter with which ``nonfinite`` began, of a student on the CPU. Of a loss or
            a measure, the first one that was itself not finite any more, since its gradient in the step
            before was not; of an adjoint, the first one whose adjoint is not. None where there is none such.
        compiled: with ``compile=True`` the seconds for tracing and compiling, 0 where the code of an earlier
            run was taken; else None.
        order: ``"exact"`` or ``"first"``, as asked for.
        truncate: how many steps the walk back was limited to; None for no limit.
    """

    def __init__(
        self,
        losses: list[Tensor],
        measures: dict[int, Tensor],
        seconds_forward: float,
        curvature: str,
        order: str,
        truncate: int | None,
    ) -> None:
        self.steps = len(losses)
        self.seconds_forward = seconds_forward
        self.seconds_backward: float | None = None
        self.seconds_again = 0.0
        self.steps_again = 0
        self.schedule: Schedule = StoreAll()
        self.sizes: Sizes | None = None
        self.cuda_peak_bytes: int | None = None
        self.store = "exact"
        self.compiled: float | None = None
        self._rounding: Tensor | None = None
        self.curvature, self.order, self.truncate = curvature, order, truncate
        self.curvature_error: float | None = None
        self.curvature_error_reason: str | None = None
        self.nonfinite_tensor: str | None = None
        self._measured = False
        self._losses = losses
        self._measures = measures
        self._norms: list[list[Tensor]] = []  # in the order of the walk back

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [float(x) for x in self._losses]

    @property
    def seconds_reverse(self) -> float | None:
        """Seconds of the walk back without those for steps taken again by the schedule; None before it."""
        return None if self.seconds_backward is None else self.seconds_backward - self.seconds_again

    @property
    def peak_bytes(self) -> int | None:
        """What is remembered of the run at most at a time where the student lives, by the plan's own count:
        states and taped steps; None where ``sizes`` is.
        """
        if self.sizes is None:
            return None
        walked = self.steps if self.truncate is None else min(self.truncate, self.steps)
        return tally(self.schedule, walked, *self.sizes).memory

    @property
    def store_error(self) -> float | None:
        """By how much the loss of a step taken again was off at most, relative to its value in the run: what
        the rounding of stored states does. 0 for exact ones, None before a step was taken again.
        """
        if self.store == "exact":
            return 0.0
        return None if self._rounding is None else float(self._rounding)

    def _rounded(self, again: Tensor, value: Tensor) -> None:
        off = (again - value).abs() / value.abs().clamp(min=torch.finfo(value.dtype).tiny)
        self._rounding = off if self._rounding is None else torch.maximum(off, self._rounding)

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

        ``("loss", t)``: the loss of step t. ``("measure", t)``: a measure after t steps. ``("adjoint", t)``:
        ∂J/∂w_t.
        """
        losses = self.losses
        for t in range(self.steps + 1):
            if t in self._measures and not bool(self._measures[t].isfinite().all()):
                return "measure", t
            if t < self.steps and not math.isfinite(losses[t]):
                return "loss", t
        norms = self.adjoint_norms
        first = self.steps + 1 - len(norms)
        return next(
            (("adjoint", first + t) for t in reversed(range(len(norms))) if not math.isfinite(norms[t])), None
        )

    def __repr__(self) -> str:
        back = "none" if self.seconds_backward is None else f"{self.seconds_backward:.3g} s"
        return (
            f"Report(steps={self.steps}, forward={self.seconds_forward:.3g} s, backward={back}, "
            f"nonfinite={self.nonfinite}, nonfinite_tensor={self.nonfinite_tensor}, "
            f"curvature={self.curvature}, order={self.order}, truncate={self.truncate}, "
            f"schedule={self.schedule}, store={self.store})"
        )
