"""Derivatives of ops: one autograd Function an op, the backward of each is the next op.

    value --backward--> grad --backward--> grad_vjp --backward--> raises
      |                   |
      jvp                 jvp (forward over reverse)
      v                   v
    grad_vjp            grad_jvp --backward, jvp--> raises

The derivative of `value` along tangents t is a result of ``grad_vjp``: `grad` is the transpose of the loss's
Jacobian, linear in its cotangent v_loss, so the derivative of ⟨grad(v_loss), t⟩ to v_loss is the Jacobian
times t. Being first order, that result can be differentiated once more (reverse over forward).

`Chain` makes the Functions, for the ops of ops.py and for those of linear.py, which stand in the same order.
They are the ops' kernels at the dispatcher's autograd key. So there is one rule for eager mode,
`torch.func`, `torch.compile` and make_fx, and their graphs hold ops alone. ``stats`` gets no derivative: each
formula is the total one (docs/math.md, sections 2 to 4).

Eager mode on ordinary tensors has a node of its own, `Loss`, which calls the core past the dispatcher. Where
the losses are reduced and logits will want a gradient, it makes that gradient in the same pass as the loss; a
backward that nobody differentiates hands it on, once. A compiled graph must not do so: what it returned would
not depend on the logits for whoever differentiates it, in silence.

Not here: kernels and vmap rules (ops.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

from l2t import check, ops


def _tracked() -> bool:
    """Whether somebody may ask for a derivative of what is computed now."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _below(name: str, arguments: Sequence[Any]) -> Any:
    """The op without derivatives of its own, but for those of the levels of `torch.func` below this one.

    Results that are not wanted are empty or None.
    """
    functorch = torch._C._are_functorch_transforms_active()
    if not functorch and name in ops.KERNELS and ops.native(*arguments):
        try:
            return tuple(ops.KERNELS[name](*arguments))
        except RuntimeError:  # a tensor that has no memory of its own; any other error comes again below
            pass
    op = getattr(torch.ops.l2t, name).default
    with torch._C._AutoDispatchBelowAutograd():
        if not functorch:
            return op(*arguments)
        # Within a Function derivatives are off, at every level.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op(*arguments)


def _op(name: str, *arguments: Any) -> Any:
    """An op from within a derivative: with its own derivatives where somebody may ask for them."""
    if not _tracked():
        return _below(name, arguments)
    # What a transform of torch.func has left behind only the dispatcher connects to the graph outside.
    if torch._C._are_functorch_transforms_active() or not ops.readable(*arguments):
        return getattr(torch.ops.l2t, name).default(*arguments)
    return _FUNCTIONS[name].apply(*arguments)


class Op(_SingleLevelFunction):
    """What the Functions share: an op, and an apply for one level of `torch.func`, which `Function` has not.

    It binds no signature either, which halves its cost in torch 2.13.
    """

    op: ClassVar[str]
    apply: ClassVar[Callable[..., Any]]
    _compiled_autograd_key = Function._compiled_autograd_key


def only(wanted: Sequence[bool], results: Sequence[Any]) -> list[Tensor | None]:
    """Results of an op, None where they are not wanted."""
    return [x if want else None for x, want in zip(results, wanted, strict=True)]


class Chain:
    """Four ops that share their first arguments and are each other's derivatives, as in the diagram above.

    The ops are ``value``, ``grad``, ``grad_vjp`` and ``grad_jvp`` behind a prefix. Their first arguments are
    so many tensors, the second of which is the target and all others are differentiated, and constants, up to
    ``common`` in all. Those of `grad` and its own derivatives go on with stats and v_loss, and end with what
    is wanted.
    """

    def __init__(self, prefix: str, tensors: int, common: int) -> None:
        self.prefix, self.tensors, self.common = prefix, tensors, common
        self.inputs = [i for i in range(tensors) if i != 1]
        self.functions = _functions(self)

    def save(self, ctx: Any, arguments: Sequence[Any], *more: Any) -> None:
        """Keeps the common arguments, and more tensors, for backward and jvp."""
        ctx.constants = arguments[self.tensors : self.common]
        saved = (*arguments[: self.tensors], *more)
        ctx.save_for_backward(*saved)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    def saved(self, ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The common arguments, and the tensors saved beside them."""
        saved = ctx.saved_tensors
        return (*saved[: self.tensors], *ctx.constants), saved[self.tensors :]

    def needs(self, ctx: Any, before: int = 0) -> list[bool]:
        """Whether each input wants a gradient, where so many other arguments come before the common ones."""
        needs = ctx.needs_input_grad
        return [needs[i + before] for i in self.inputs]

    def spread(self, d_inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Gradients to the inputs at their places among the common arguments."""
        first, *others = d_inputs
        return (first, None, *others, *[None] * (self.common - self.tensors))

    def back_over_grad(self, ctx: Any, x: Sequence[Any], before: int = 0) -> tuple[Any, ...]:
        """Cotangents of the results of `grad` back to its arguments, which come behind so many others."""
        where, (stats, v_loss) = self.saved(ctx)
        wanted = [ctx.needs_input_grad[before + self.common + 1], *self.needs(ctx, before)]
        results = _op(f"{self.prefix}grad_vjp", *where, stats, v_loss, *only(ctx.wanted, x), wanted)
        d_v_loss, *d_inputs = only(wanted, results)
        return (*[None] * before, *self.spread(d_inputs), None, d_v_loss, None)

    def register(self) -> None:
        """Makes the Functions the ops' kernels at the dispatcher's autograd key."""
        for cls in self.functions:
            _FUNCTIONS[cls.op] = cls
            ops.LIBRARY.impl(cls.op, _autograd_kernel(cls), "Autograd")


def _functions(chain: Chain) -> tuple[type[Op], ...]:
    """The four Functions of a chain."""
    value, grad, grad_vjp, grad_jvp = (f"{chain.prefix}{name}" for name in ops.OPS)

    class Value(Op):
        """The losses, stats, and whatever else has no derivative."""

        op = value

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            loss, *others = results = _below(value, arguments)
            ctx.mark_non_differentiable(*(x for x in others if x is not None))
            ctx.losses, ctx.behind = loss.shape[0], [None] * (len(arguments) - chain.common)
            chain.save(ctx, arguments, others[0])
            return results

        @staticmethod
        def backward(ctx: Any, v_loss: Any, *v_others: Any) -> Any:
            if v_loss is None:
                return (*[None] * chain.common, *ctx.behind)
            where, (stats,) = chain.saved(ctx)
            wanted = chain.needs(ctx)
            d_inputs = only(wanted, _op(grad, *where, stats, v_loss, wanted))
            return (*chain.spread(d_inputs), *ctx.behind)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            where, (stats,) = chain.saved(ctx)
            t = [tangents[i] for i in chain.inputs]
            wanted = [True] + [False] * len(t)
            along, *_ = _op(grad_vjp, *where, stats, stats.new_ones(ctx.losses), *t, wanted)
            return (along, None, *ctx.behind)

    class Grad(Op):
        """Gradients of ⟨v_loss, loss⟩."""

        op = grad

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *_, stats, v_loss, wanted = arguments
            ctx.wanted = wanted
            chain.save(ctx, arguments, stats, v_loss)
            return _below(grad, arguments)

        @staticmethod
        def backward(ctx: Any, *x: Any) -> Any:
            return chain.back_over_grad(ctx, x)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            where, (stats, v_loss) = chain.saved(ctx)
            t = (tangents[chain.common + 1], *(tangents[i] for i in chain.inputs))
            return _op(grad_jvp, *where, stats, v_loss, *t, ctx.wanted)

    class GradVjp(Op):
        """Cotangents x of `grad`'s results, back to its inputs."""

        op = grad_vjp

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            ctx.wanted = arguments[-1]
            chain.save(ctx, arguments, *arguments[chain.common : -1])
            return _below(grad_vjp, arguments)

        @staticmethod
        def backward(ctx: Any, v: Any, *higher: Any) -> Any:
            if any(x is not None for x in higher):
                raise check.third_derivative()
            # d_v_loss is the Jacobian times x: what remains is a second derivative.
            where, (stats, _, *x) = chain.saved(ctx)
            wanted = [False, *chain.needs(ctx)]
            _, *d_inputs = only(wanted, _op(grad_vjp, *where, stats, v, *x, wanted))
            wanted = list(ctx.needs_input_grad[chain.common + 2 : -1])
            d_x = only(wanted, _op(grad, *where, stats, v, wanted))
            return (*chain.spread(d_inputs), None, None, *d_x, None)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise check.third_derivative() if any(ctx.wanted[1:]) else check.forward_twice()

    class GradJvp(Op):
        """Tangents of `grad`'s results."""

        op = grad_jvp

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return _below(grad_jvp, arguments)

        @staticmethod
        def backward(ctx: Any, *v: Any) -> Any:
            raise check.third_derivative()

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise check.third_derivative()

    return Value, Grad, GradVjp, GradJvp


class Loss(Op):
    """The loss as one node, for eager mode on ordinary tensors (`ops.unwatched`).

    Settings are whether backward may overwrite the logits, whether it will want the gradient to them, and the
    constants of ``l2t::value``; the core checks the rest. A single loss is 0-dimensional.
    """

    op = "value"

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[Any, ...],
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        _, with_grad, constants = settings
        loss, stats, d_logits = ops.loss(
            with_grad and ops.kept(),
            constants[3],
            logits,
            target,
            weight,
            left,
            right,
            bias,
            scale,
            *constants,
        )
        ctx.settings = settings
        ctx.d_logits = d_logits
        ctx.save_for_backward(logits, target, weight, left, right, bias, scale, stats)
        return loss

    @staticmethod
    def backward(ctx: Any, v_loss: Any) -> Any:
        d_logits, ctx.d_logits = ctx.d_logits, None  # handed on once
        _, wants_logits, _, *tables = ctx.needs_input_grad
        inplace, with_grad, constants = ctx.settings
        inplace = inplace and wants_logits
        if not ops.unwatched() or not ops.readable(v_loss):
            return _beyond(ctx, inplace, constants, v_loss)
        if torch.is_grad_enabled():
            check.inplace_once(inplace)
            *saved, stats = ctx.saved_tensors
            wanted = (wants_logits, *tables)
            grads = LossGrad.apply((constants, wanted), *saved, stats, v_loss.contiguous())
            return None, grads[0], None, *grads[1:]
        if with_grad:
            if d_logits is None:  # by the same pass, for the same bits
                *_, d_logits = ops.loss(True, constants[3], *ctx.saved_tensors[:-1], *constants)
            ops.scale(d_logits, v_loss)
            if True not in tables:
                return None, d_logits, None, None, None, None, None, None
        *saved, stats = ctx.saved_tensors
        logits = saved[0]
        room = ops.room(logits, saved[2:], (wants_logits and not with_grad and not inplace, *tables))
        if inplace:
            room[0] = logits.detach()
        ops.run("grad", *saved, *constants, stats, v_loss.contiguous(), *room)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        return None, d_logits if with_grad else room[0], None, *room[1:]


def _beyond(ctx: Any, inplace: bool, constants: tuple[Any, ...], v_loss: Tensor) -> Any:
    """Backward of `Loss` where a cotangent is batched or traced, or somebody watches."""
    check.inplace_once(inplace)
    *saved, stats = ctx.saved_tensors
    _, wants_logits, _, *tables = ctx.needs_input_grad
    wanted = [wants_logits, *tables]
    grads = only(wanted, _op("grad", *saved, *constants, stats, v_loss.reshape(-1), wanted))
    return None, grads[0], None, *grads[1:]


class LossGrad(Op):
    """The gradients of `Loss`, to be differentiated: as `grad`, of tensors that the core has read before."""

    op = "grad"

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *tensors: Any) -> Any:
        constants, wanted = settings
        *saved, stats, v_loss = tensors
        room = ops.room(saved[0], saved[2:], wanted)
        ops.run("grad", *saved, *constants, stats, v_loss, *room)
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(room)

    @staticmethod
    def backward(ctx: Any, *x: Any) -> Any:
        constants, _ = ctx.settings
        *saved, stats, v_loss = ctx.saved_tensors
        _, logits, _, *tables, _, wants_v_loss = ctx.needs_input_grad
        if not _tracked() and ops.readable(*x):
            room = ops.room(saved[0], saved[2:], (logits, *tables))
            d_v_loss = v_loss.new_empty(v_loss.shape) if wants_v_loss else None
            x = tuple(None if each is None else each.contiguous() for each in x)
            ops.run("grad_vjp", *saved, *constants, stats, v_loss, *x, d_v_loss, *room)
        else:
            wanted = [wants_v_loss, logits, *tables]
            results = _op("grad_vjp", *saved, *constants, stats, v_loss.reshape(-1), *x, wanted)
            d_v_loss, *room = only(wanted, results)
            d_v_loss = None if d_v_loss is None else d_v_loss.reshape(v_loss.shape)
        return None, room[0], None, *room[1:], None, d_v_loss


def _autograd_kernel(cls: type[Op]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        if not _tracked():
            return ops.results(_below(cls.op, arguments), arguments[0])
        # Here the dispatcher has already singled out one level of torch.func.
        functorch = torch._C._are_functorch_transforms_active()
        with enable_single_level_autograd_function() if functorch else contextlib.nullcontext():
            return ops.results(cls.apply(*arguments), arguments[0])

    return kernel


_FUNCTIONS: dict[str, type[Op]] = {}

Chain("", tensors=7, common=ops.COMMON).register()
