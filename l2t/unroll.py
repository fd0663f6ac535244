"""unroll(): a student's whole training run, and the exact gradient of what it ends in to all that shaped it.

Docs: section 5 of docs/math.md. Here are the arguments and their meaning; the run itself is in l2t/run.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2t import check
from l2t.curvature import CURVATURES
from l2t.measures import Measures
from l2t.optim import SGD, Optimizer
from l2t.preflight import bends, known, remember
from l2t.preflight import preflight as look_closely
from l2t.ranks import Ranks
from l2t.run import Run
from l2t.schedule import Schedule
from l2t.states import States
from l2t.tape import Student

__all__ = ["Run", "unroll"]


ORDERS = ("exact", "first")
VERIFY = ("first", "all")
STORES = ("exact", "bfloat16")
SCHEDULES = ("auto", "all", "every", "binomial", "disk")
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
    damping: float = 1.0,
    growth: float | None = None,
    along: int | Mapping[int, float] | None = None,
    schedule: str | Schedule = "auto",
    memory: int | str | None = None,
    directory: str | os.PathLike[str] | None = None,
    store: str = "exact",
    verify: str | None = None,
    compile: bool = False,
    accumulate: int = 1,
    group: dist.ProcessGroup | None = None,
    preflight: bool | None = None,
) -> Run:
    """Trains a student over batches so that what it ends in can be differentiated to what shaped it.

    ``run.backward()`` then adds the gradient of the final measure, through every step of the training, to
    ``.grad`` of the meta tensors, and any ``torch.optim`` optimiser can step on these. The gradient is exact
    unless asked to be otherwise: that of automatic differentiation through the whole run, whose graph is
    never built.

    ``loss`` and ``measure`` are called with the student module itself, in whose places the weights of the
    step stand for the time of the call, so hooks, submodules and tied parameters work. The student's own
    parameters and buffers are the start of the run and are as they were when the call returns, or raises;
    what the caller then makes of the student, ``backward()`` leaves in place.
    Buffers (BatchNorm's statistics) are carried from step to step without gradient. Parameters that do not
    require a gradient stay constant. ``loss`` and ``measure`` may call ``backward()``, ``zero_grad()`` and
    ``eval()`` and freeze parameters: each call finds ``.grad``, ``requires_grad`` and mode as they were
    before the run. They may not change weights in place.

    Args:
        student: any ``nn.Module`` with a parameter that requires a gradient. Small students leave a machine
            idle: several of one shape run side by side as one :class:`l2t.Stack`, with a loss that sums
            theirs and a measure of shape (S,), each as if it were alone under an optimiser that does not look
            across weights (as clipping by norm does).
        batches: an iterable (list, DataLoader, generator), one batch a step; a batch is what ``loss`` takes.
        loss: ``loss(model, batch, step)``, the 0-dim loss of a step, differentiable twice, or once where
            ``curvature`` is a difference. It reaches earlier steps through the model's weights alone: what
            else it carries from step to step is detached. It is called once a step where no argument asks
            for more, but again from the start for the first step (after the first one) that writes a buffer
            of 64 kB and more, or that needs weights of 1 MB and more to be leaves (as ``backward()`` does).
        measure: ``measure(model)`` at the final weights, 0-dim or of shape (S,), differentiable.
        optimizer: the student's optimiser, from :mod:`l2t.optim`. Default ``SGD(lr=0.1, momentum=0.9)``.
        meta: the tensors whose ``.grad`` is wanted: leaves that require a gradient and sit anywhere in loss,
            measure, optimizer or batches. A parameter of the student among them means its initial value.
            Default: every leaf that is reached, the student's own parameters apart.
        curvature: where the second derivatives of ``loss`` come from. Exact are: ``"reverse"``, which keeps
            each step's graph and its weights (of large ones those that the graph reads), so memory grows with
            its activations; ``"recompute"``, which keeps
            a step's weights and batch and runs it again in the walk back, the same step bit for bit
            (PyTorch's default random numbers and buffers included), for one more run's time and the same
            gradient to the bit, and needs a ``loss`` that depends on model, batch and step alone;
            ``"forward"``, which remembers the same and runs the step again in forward mode, where every
            operation has one and the step's derivative is symmetric, as that of a gradient is unless hooks
            change it (else a warning says so and the run goes on with ``"recompute"``). Inexact are
            differences, which need first derivatives only (fused attention, cuDNN RNNs, compiled models):
            ``"central"`` takes two more gradients a step, ``"one-sided"`` one, and keeps those of the run
            itself, that to the meta tensors included. They move what ``loss`` detaches or computes in
            ``torch.no_grad``, which the exact ones leave constant. ``run.report.curvature_error`` says how
            good they were, and a warning where that is bad.
        order: ``"exact"``, or ``"first"``: a step's gradient counts as independent of the student's weights,
            so H a is left out of the walk back (with plain SGD: the identity in place of a step's Jacobian).
            What the gradient owes to the meta tensors is kept, and all that the optimiser does.
        truncate: walk back over the last so many steps only. Earlier ones give the meta tensors nothing.
            None: all.
        damping: factor of the adjoint at every step back, at most 1: what lies t steps before the end counts
            damping^t of what it does. Below 1 it keeps gradients through a chaotic run small, and biased
            towards the last steps, as a smooth ``truncate``.
        growth: end the walk back where the adjoint has become more than so many times as long as it was after
            the measure, of students side by side each one's for itself: a ``truncate`` that a run sets
            itself, for runs whose beginning is chaotic, where what comes from before is noise that drowns the
            rest. None: nowhere.
        along: judge the path, too. An integer k: the measure is taken after k, 2k, ... steps and after the
            last, and J is their mean. A mapping from numbers of steps taken (1, ..., T) to weights: J is the
            sum of the measures there, each times its weight. ``run.measures`` has them all. Their graphs are
            not kept: the walk back takes a measure again where it comes by, with the same random numbers and
            buffers, so it must depend on the model and these alone. Of a truncated walk count those after its
            first step. None: the measure after the last step alone.
        schedule: what is remembered of the run; the gradient has the same bits whatever it is. ``"all"``:
            every step. ``"every"``: the state before every √T-th step, from which the steps between are
            taken again: O(√T) memory for less than one more run. ``"binomial"``: as many states as
            ``memory`` holds, in the order that takes the fewest steps again. ``"auto"``: the plan that
            takes the fewest steps again within ``memory``, or all without one. ``"disk"``: states are
            written to disk beside the run, as far apart as ``memory`` holds steps (√T steps without one),
            so that no step is taken again more than once. Or an object of :mod:`l2t.schedule`, such as
            ``Segments(length=10, slots=5)``. All but ``"all"`` need a loss as for ``"recompute"``, and
            batches that can be indexed are read again by their index; others are all read before the first
            step, and kept, so what draws random numbers as it is read draws them then.
        memory: bytes for what is remembered, a number or such as ``"64MB"``: beside what a single training
            step and the adjoint need, and 5 kB for each step that draws random numbers. With ``"auto"``,
            ``"binomial"`` and ``"disk"`` the first step is tried twice before the run, to see what it keeps.
        directory: where a run makes a folder for the states that go to disk, which is gone when the run is
            walked back, forgotten or broken off. None: the system's place for temporary files, which on some
            systems lies in memory.
        store: ``"exact"``, or ``"bfloat16"``: states between steps are kept rounded, in half the memory of
            float32. Steps are then taken again from rounded weights, so the gradient is not exact:
            ``run.report.store_error`` says how far the losses of such steps were off.
        verify: compare the states (weights, optimiser state, buffers) that are reached again with those that
            were there, by a hash of their bytes, and raise the name of the first tensor that differs:
            ``"all"`` of them, or the ``"first"``: those of the first steps that are taken again, up to the
            next step back. A loss whose value differs raises without. None: no hashes.
        compile: trace a step's gradient and its products with their derivatives inside, and compile both with
            torch's inductor, which takes tens of seconds once and pays for small students, whose steps are
            short. Code is kept for later runs of the same student, loss (the same function, not one made anew
            in each call), meta tensors and shapes, which read what these tensors hold then, and as long as
            the plain numbers that loss and student read are the same (attributes, closures, globals); each
            run compares its first step with ``loss`` itself, and new code its products, too.
            ``report.compiled`` has the seconds. Of a step it remembers the numbers that its reverse reads, or
            with ``curvature="recompute"`` weights and batch. On the CPU the gradient has the same bits for
            all exact schedules, but not those of ``compile=False``. ``meta`` must be named; batches are
            tensors of one shape in tuples, lists and dicts; ``loss`` does not use ``step``, draws no random
            numbers, reads none from tensors, and is not called where the code runs, so that it has no other
            effects.
        accumulate: micro-batches a step. Each batch is then a sequence of so many things that ``loss`` takes,
            and the step's loss is the mean of theirs: that of one batch of them all, to rounding, where they
            are of one size, losses are means, and nothing such as BatchNorm looks across samples. Activations
            of one micro-batch are alive at a time, in the walk back too; but ``"reverse"`` keeps a step's.
            Buffers and random numbers go from one micro-batch to the next.
        group: a ``torch.distributed`` process group whose ranks take the run together, each with batches of
            its own, as in data-parallel training. The loss of a step is the mean of theirs and J the mean of
            their measures, taken each on its own part of the dev set or all on the same. Weights, measures
            and the gradients of ``meta``, which must be named, are the same on all ranks; buffers, random
            numbers and ``report.losses`` are each rank's own. Number of batches, settings, weights and meta
            tensors are compared before the run, and the weights after it.
        preflight: True looks at the first step with :func:`l2t.preflight` once it is taken, and raises what
            it found where ``curvature`` does not suit: some ten steps, more for a student of many modules.
            The default does so only where an operation of the first step has no second derivative, or has
            one that is not what a difference of gradients shows. That is tried where others than PyTorch and
            l2t have written a derivative or change it (an autograd Function, a custom operator, a hook), once
            for a student and a loss, which is called some five times more with step 0: so a fused loss or
            layer is found that drops its second derivative in silence. Nothing is tried where no second
            derivative is taken: with ``order="first"``, and the curvatures that are not reverse over reverse.
            False looks at nothing.

    Returns:
        A :class:`Run` with ``measure``, ``weights``, ``buffers``, ``report`` and ``backward()``. A value that
        is not finite raises nothing: ``run.report.nonfinite`` says where the first one arose.

    Raises:
        TypeError, ValueError: an argument, or what loss or measure returns, is not as above.
        RuntimeError: inside ``torch.inference_mode``; what ``preflight`` found.
        OSError: the disk does not take a state.

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
    check.unroll_not_transformed()
    check.unroll_student(student)
    check.unroll_functions(loss, measure)
    check.unroll_batches(batches)
    check.unroll_optimizer(optimizer, Optimizer)
    chosen = check.unroll_meta(meta)
    check.known("unroll", "curvature", curvature, CURVATURES)
    check.unroll_schedule(schedule, SCHEDULES)
    budget = check.unroll_memory(memory, schedule)
    check.unroll_directory(directory, schedule)
    check.known("unroll", "order", order, ORDERS)
    check.unroll_compile(compile, meta, curvature)
    check.unroll_truncate(truncate, chosen, student)
    check.unroll_damping(damping)
    check.unroll_growth(growth, along, chosen, student)
    check.unroll_accumulate(accumulate)
    check.unroll_group(group, meta, batches)
    if verify is not None:
        check.known("unroll", "verify", verify, VERIFY)
    check.known("unroll", "store", store, STORES)
    check.unroll_store(store, verify, schedule, memory)
    path = check.unroll_along(along)
    twice = order == "exact" and curvature in {"reverse", "recompute"}
    tries = preflight is None and twice and not known(student, loss)

    def look(batch: Any, doubt: bool) -> None:
        """Raises where the step of this batch does not suit the curvature."""
        if accumulate > 1:
            batch = check.unroll_micro_batches(batch, accumulate, 0)[0]
        if preflight or (doubt and not bends(student, batch, loss, chosen or ())):
            found = look_closely(student, batch, loss, meta=chosen)
            check.preflight_suits(found.suits(curvature), curvature, found)
        elif tries:
            remember(student, loss)

    places, states = Student(student, chosen or ()), States(store == "bfloat16", directory)
    measures = Measures(measure, places, path)
    ranks = None
    if group is not None:
        ranks = Ranks(group)
        plan = re.sub(r" at 0x[0-9a-f]+", "", str(schedule))  # of an object without a name of its own
        settings = (
            f"{plan}, {budget}, {curvature}, {compile}, {order}, {truncate}, {damping}, {growth}, {path}"
        )
        settings += f", {store}, {verify}"
        weights, metas = dict(student.named_parameters()), {str(i): x for i, x in enumerate(chosen or ())}
        number = len(cast("Sequence[Any]", batches))
        ranks.agree("before the run", steps=number, settings=settings, weights=weights, meta=metas)
    run = Run(
        places,
        loss,
        measures,
        optimizer,
        chosen,
        curvature,
        order,
        truncate,
        damping,
        growth,
        verify,
        states,
        accumulate,
        ranks,
        compile,
        look,
        tries,
    )
    try:
        with torch.enable_grad():
            run._forward(batches, schedule, budget)
    except BaseException:
        states.close()
        raise
    finally:
        places.restore()
    return run
