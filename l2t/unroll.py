"""unroll(): a student's whole training run, and the exact gradient of what it ends in to all that shaped it.

Docs: section 5 of docs/math.md. The run is taken as any training loop takes it; ``run.backward()`` walks back over its
steps with the adjoint (v_w, v_m) of weights and momentum. Each line of :meth:`Run.backward` is a formula of that section.

The parts: l2t/optim.py (an update and its transpose), l2t/curvature.py (derivatives of a step's gradient),
l2t/tape.py (what is remembered of a step, and the student at given weights), l2t/schedule.py (which steps are
remembered). What a student learns, and from which loss, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from l2t import check
from l2t.curvature import CURVATURES, Curvature, Grads, accumulate, gradient
from l2t.optim import SGD, Hyper, Point, Tensors
from l2t.schedule import Drop, Restore, Reverse, Schedule, Store, StoreAll
from l2t.tape import Randomness, Step, Student

__all__ = ["Report", "Run", "unroll"]


class Report:
    """What a run cost and how it went. Numbers are fetched from the device when they are asked for, not before.

    Attributes:
        steps: the number of steps T.
        seconds_forward: seconds of this process in the run, the measure included.
        seconds_backward: seconds in the walk back, None before it.
    """

    def __init__(self, losses: list[Tensor], measure: Tensor, seconds_forward: float) -> None:
        self.steps = len(losses)
        self.seconds_forward = seconds_forward
        self.seconds_backward: float | None = None
        self._losses = losses
        self._measure = measure
        self._norms: list[Tensor] = []  # of the final weights first; [parameters] each

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return torch.stack(self._losses).tolist() if self._losses else []

    @property
    def adjoint_norms(self) -> list[float]:
        """‖∂J/∂w_t‖ for t = 0, ..., T, of the initial weights first; empty before the walk back.

        Many orders of magnitude between its ends tell of a run that forgets (vanishing) or that is not stable (exploding).
        """
        if not self._norms:
            return []
        return torch.stack(self._norms[::-1]).double().norm(dim=1).tolist()  # type: ignore[no-any-return]

    @property
    def nonfinite(self) -> tuple[str, int] | None:
        """Where the first value that is not finite arose, in the order of computation, or None.

        ``("loss", t)``: the loss of step t; ``("measure", T)``: the measure; ``("adjoint", t)``: ∂J/∂w_t, in the walk back.
        """
        finite = torch.tensor(self.losses).isfinite().tolist()
        if not all(finite):
            return "loss", finite.index(False)
        if not self._measure.isfinite().all():
            return "measure", self.steps
        finite = torch.tensor(self.adjoint_norms).isfinite().tolist()[::-1]
        return None if all(finite) else ("adjoint", self.steps - finite.index(False))

    def __repr__(self) -> str:
        back = "not yet" if self.seconds_backward is None else f"{self.seconds_backward:.3g} s"
        return f"Report(steps={self.steps}, forward={self.seconds_forward:.3g} s, backward={back}, nonfinite={self.nonfinite})"


class Run:
    """A run that was taken; :func:`unroll` makes it.

    Attributes:
        measure: the measure at the end, detached: 0-dim or (S,).
        weights: the final trained parameters by name, detached; frozen ones are the student's own.
        buffers: the final buffers by name.
        report: a :class:`Report`.
    """

    measure: Tensor
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    report: Report

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        optimizer: SGD,
        meta: list[Tensor] | None,
        schedule: Schedule,
        curvature: Curvature,
    ) -> None:
        self._student, self._loss, self._optimizer = student, loss, optimizer
        self._meta, self._schedule, self._curvature = meta, schedule, curvature
        self._tape: dict[int, Step] = {}
        self._end: tuple[Tensor, Tensors] | None = None  # the measure with its graph, and the final weights

    def _forward(self, batches: Iterable[Any], measure: Callable[..., Tensor]) -> None:
        start = perf_counter()
        student, optimizer, keeps_graph = self._student, self._optimizer, self._curvature.keeps_graph
        settings = optimizer.settings()
        w: Tensors = [p.detach().clone().requires_grad_() for p in student.parameters]
        m = optimizer.start(w)
        b = student.buffers
        losses: list[Tensor] = []
        trains = False
        for t, batch in enumerate(batches):
            hyper = settings(t)
            for action in self._schedule.forward(t):
                if isinstance(action, Store):
                    self._tape[t] = step = Step(t, hyper, w, m if hyper.wanted else None)
                    if not keeps_graph:
                        step.batch, step.buffers = batch, b
                        step.randomness = Randomness.now(student.cuda_devices)
                else:
                    value, b = student.call(self._loss, w, b, batch, t)
                    check.unroll_loss(value, t)
                    losses.append(value.detach())
                    g = gradient(value, w)
                    w, m, reached = _update(optimizer, w, m, g, hyper)
                    trains |= reached != []
                    if t in self._tape:
                        self._tape[t].loss, self._tape[t].reached = losses[-1], reached
                        self._tape[t].grads = g if keeps_graph else None
        check.unroll_trains(trains or not losses)
        value, _ = student.call(measure, w, b)
        check.unroll_measure(value)
        self._end = value, w
        self.measure = value.detach()
        self.weights = {name: x.detach() for name, x in zip(student.names, w, strict=True)}
        self.buffers = dict(zip(student.buffer_names, b, strict=True))
        self.report = Report(losses, self.measure, perf_counter() - start)

    def backward(self, gradient: Tensor | None = None) -> None:
        """Walks back over the run and adds d measure / d meta to ``.grad`` of the meta tensors.

        A meta tensor that the measure does not depend on keeps its ``.grad``, None included, as in
        ``torch.autograd.backward``. What the steps remember is freed on the way, so this can be done once.

        Args:
            gradient: the cotangent of the measure, of its shape. Default ones: of several measures, the sum.

        Raises:
            RuntimeError: a second call; an operation of the loss that has no second derivative; a loss that carries a
                graph from one step to the next; with ``curvature="recompute"``, a loss that is not the same when the
                step is run again.
        """
        check.unroll_not_inference()
        check.unroll_open(self._end is not None)
        v = check.unroll_cotangent(gradient, self.measure)
        assert self._end is not None
        start = perf_counter()
        (value, w), self._end = self._end, None
        randomness = Randomness.now(self._student.cuda_devices)
        # meta=None lets every leaf that is reached have its gradient, but for the student's own parameters.
        own = self._student.parameters if self._meta is None else []
        own_grads = [p.grad for p in own]
        for p in own:
            p.grad = None
        try:
            with torch.no_grad():
                self._walk_back(value, v, w)
        finally:
            self._tape.clear()
            for p, kept in zip(own, own_grads, strict=True):
                p.grad = kept
            randomness.restore(self._student.cuda_devices)
        self.report.seconds_backward = perf_counter() - start

    def _walk_back(self, value: Tensor, v: Tensor, w: Tensors) -> None:
        """Section 5 of docs/math.md, from the measure to the initial weights."""
        optimizer, norms = self._optimizer, self.report._norms
        accumulate([value], [v], self._inputs(w, self.report.steps))
        v_w: Tensors = [torch.zeros_like(x) if x.grad is None else x.grad for x in w]
        v_m = optimizer.start(v_w)
        norms.append(_norms(v_w))
        v_settings: list[tuple[Tensor, Tensor]] = []
        for action in self._schedule.reverse(self.report.steps):
            if isinstance(action, Restore):
                step = self._tape[action.step]
            elif isinstance(action, Reverse):
                self._reverse(step, v_w, v_m, v_settings)
                norms.append(_norms(v_w))
            elif isinstance(action, Drop):
                del self._tape[action.step]
        if self._meta is not None:
            chosen = {id(x) for x in self._meta}
            v_settings += [(p, x) for p, x in zip(self._student.parameters, v_w, strict=True) if id(p) in chosen]
        if v_settings:
            accumulate([x for x, _ in v_settings], [d for _, d in v_settings], self._meta or [])

    def _reverse(
        self, step: Step, v_w: Tensors, v_m: Tensors | None, v_settings: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Takes the adjoint (v_w, v_m) back over one step, in place."""
        optimizer, hyper, w, m = self._optimizer, step.hyper, step.weights, step.momentum
        check.unroll_no_leak(all(x.grad is None for x in w), step.index)
        if step.reached is not None:
            w, m, v_w, v_m = (_pick(x, step.reached) for x in (w, m, v_w, v_m))
        a = optimizer.transpose_in(v_w, v_m, hyper)
        self._curvature.product(step, self._replay, a, self._inputs(step.weights, step.index))
        if hyper.wanted:
            assert step.grads is not None
            grads = [g for g in step.grads if g is not None]
            for name, d in optimizer.hypergradients(Point(w, m, grads, hyper), v_w, a).items():
                setting = hyper.wanted[name]
                v_settings.append((setting, d.to(setting)))
        optimizer.transpose_out(v_w, v_m, a, [x.grad for x in w], hyper)

    def _replay(self, step: Step) -> Grads:
        """The gradient of a step run again: same weights, buffers, batch and random numbers."""
        assert step.buffers is not None and step.randomness is not None
        step.randomness.restore(self._student.cuda_devices)
        with torch.enable_grad():
            value, _ = self._student.call(self._loss, step.weights, step.buffers, step.batch, step.index)
        check.unroll_replayed(value, step.loss, step.index)
        return gradient(value, step.weights)

    def _inputs(self, weights: Tensors, index: int) -> list[Tensor]:
        """The leaves that want a gradient in the reverse of step ``index``; none given means every leaf reached."""
        if self._meta is None:
            return []
        # The weights of the step before are among them only to find a loss that carries a graph over (no_leak).
        before = self._tape.get(index - 1)
        return [*weights, *(before.weights if before else ()), *self._meta]


def _update(
    optimizer: SGD, w: Tensors, m: Tensors | None, g: Grads, hyper: Hyper
) -> tuple[Tensors, Tensors | None, list[int] | None]:
    """The next weights, as leaves, and momentum, and which weights the loss reaches (None for all)."""
    with torch.no_grad():
        grads = [x for x in g if x is not None]
        if len(grads) == len(w):
            reached = None
            w, m = optimizer.update(Point(w, m, grads, hyper))
        else:
            reached = [i for i, x in enumerate(g) if x is not None]
            w_new, m_new = optimizer.update(Point(_pick(w, reached), _pick(m, reached), grads, hyper))
            w = _put([x.detach() for x in w], reached, w_new)
            m = None if m is None or m_new is None else _put(m, reached, m_new)
    for x in w:
        x.requires_grad_()
    return w, m, reached


def _pick(xs: Tensors | None, indices: list[int]) -> Any:
    return None if xs is None else [xs[i] for i in indices]


def _put(xs: Tensors, indices: list[int], new: Tensors) -> list[Tensor]:
    out = list(xs)
    for i, x in zip(indices, new, strict=True):
        out[i] = x
    return out


def _norms(xs: Tensors) -> Tensor:
    """The norm of each tensor."""
    return torch.stack(torch._foreach_norm(xs))


DEFAULT_OPTIMIZER = SGD(lr=0.1, momentum=0.9)


def unroll(
    student: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any, int], Tensor],
    measure: Callable[[nn.Module], Tensor],
    *,
    optimizer: SGD = DEFAULT_OPTIMIZER,
    meta: Iterable[Tensor] | None = None,
    curvature: str = "reverse",
) -> Run:
    """Trains a student over batches in such a way that what it ends in can be differentiated to what shaped it.

    ``run.backward()`` then adds the gradient of the final measure, through every step of the training, to
    ``.grad`` of the meta tensors, and any ``torch.optim`` optimiser can step on these. The gradient is exact:
    that of automatic differentiation through the whole run, whose graph is never built.

    ``loss`` and ``measure`` are called with the student module itself, in whose places the weights of the
    step stand for the time of the call, so hooks, submodules and tied parameters work. The student's own
    parameters and buffers are the start of the run and are as they were when the call returns, or raises.
    Buffers (BatchNorm's statistics) are carried from step to step without gradient. Parameters that do not
    require a gradient stay constant.

    Args:
        student: any ``nn.Module`` with a parameter that requires a gradient.
        batches: an iterable (list, DataLoader, generator), one batch a step; a batch is whatever ``loss`` takes.
        loss: ``loss(model, batch, step)``, the 0-dim loss of a step, differentiable twice. It reaches earlier
            steps through the model's weights alone: what else it carries from step to step is detached.
        measure: ``measure(model)`` at the final weights, 0-dim or of shape (S,), differentiable.
        optimizer: the student's optimiser, from :mod:`l2t.optim`. Default ``SGD(lr=0.1, momentum=0.9)``.
        meta: the tensors whose ``.grad`` is wanted: leaves that require a gradient and sit anywhere in loss,
            measure, optimizer or batches. A parameter of the student among them means its initial value.
            Default: every leaf that is reached, the student's own parameters apart.
        curvature: ``"reverse"`` keeps each step's graph, so memory grows with the activations of the run;
            ``"recompute"`` keeps a step's weights and batch and runs it again in the walk back, the same step bit
            for bit (PyTorch's default random numbers and buffers included), for one more run's time and the same
            gradient to the bit. ``loss`` must then depend on model, batch and step alone.

    Returns:
        A :class:`Run` with ``measure``, ``weights``, ``buffers``, ``report`` and ``backward()``. Values that are
        not finite raise nothing: ``run.report.nonfinite`` says where the first one arose.

    Raises:
        TypeError, ValueError: an argument, or what loss or measure returns, is not as above.
        RuntimeError: inside ``torch.inference_mode``.

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
    check.unroll_optimizer(optimizer, SGD)
    chosen = check.unroll_meta(meta)
    check.known("unroll", "curvature", curvature, CURVATURES)
    run = Run(Student(student), loss, optimizer, chosen, StoreAll(), CURVATURES[curvature])
    with torch.enable_grad():
        run._forward(batches, measure)
    return run
