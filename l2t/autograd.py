"""Derivatives of the ops: one autograd Function an op, the backward of each is the next op.

    value --backward--> grad --backward--> grad_vjp --backward--> raises
      |                   |
      jvp                 jvp (forward over reverse)
      v                   v
    value_jvp           grad_jvp --any--> raises
      |
      backward (reverse over forward): grad_vjp and grad

`value_jvp` is a result of ``grad_vjp``: `grad` is the transpose of the loss's Jacobian, linear in its cotangent v_loss, so
the derivative of ⟨grad(v_loss), t⟩ to v_loss is the Jacobian times t.

Every Function carries one rule for eager mode, `torch.func` and `torch.vmap`; the ops have the same backward registered, so
that a graph of `torch.compile` holds ops alone. ``stats`` gets no derivative: each formula is the total one
(docs/math.md, sections 2 to 4).

Not here: kernels (ops.py) and reductions but for the common ones, `reduced`, which eager mode does inside one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from l2t import check, ops

# Positions among the arguments of every op: those that are differentiated, and where what is particular to an op begins.
_INPUTS = (0, 2, 3, 4, 5, 6)  # logits, weight, left, right, bias, scale
_COMMON = 10


class _Op(Function):
    """What the Functions share: a name among the ops, a lean way through eager mode, a vmap rule."""

    op: str
    _lean: Any

    def __init_subclass__(cls) -> None:
        """Makes the vmap rule, and the form for eager mode, which binds no signature and so costs half."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cls.forward(*arguments)
            cls.setup_context(ctx, arguments, output)
            return output

        lean = type(
            f"l2t_{cls.op}",
            (Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(cls.backward),
                "jvp": staticmethod(cls.jvp),
            },
        )
        cls._lean = super(Function, lean).apply  # type: ignore[misc]

        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            folded, unfold = ops.fold(cls.op, info.batch_size, in_dims, arguments)
            return unfold(cls.apply(*folded))

        cls.vmap = staticmethod(vmap)  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The op with its derivatives; arguments as the op's, all positional."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return cls._lean(*torch._functorch.utils.unwrap_dead_wrappers(arguments))


def _run(op: str, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.l2t, op).default(*arguments)


def _differentiable(cls: type[_Op], *arguments: Any) -> Any:
    """Applies a Function from within a derivative: with its own derivatives only where somebody may ask for them."""
    if (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return cls.apply(*arguments)
    return cls.forward(*arguments)


def _only_wanted(outputs: Any, wanted: Any) -> tuple[Tensor | None, ...]:
    return tuple(x if want else None for x, want in zip(outputs, wanted, strict=True))


def _needs(ctx: Any, *first: int) -> tuple[bool, ...]:
    needs = ctx.needs_input_grad
    return tuple(needs[i] for i in (*first, *_INPUTS))


def _spread(d_inputs: Any) -> tuple[Any, ...]:
    """Gradients to logits and tables at their places among the common arguments."""
    d_logits, *d_tables = d_inputs
    return (d_logits, None, *d_tables, None, None, None)


def _save(ctx: Any, arguments: tuple[Any, ...], *more: Any) -> None:
    """Keeps the common arguments, and more tensors, for backward and jvp."""
    ctx.constants = arguments[7:_COMMON]
    saved = (*arguments[:7], *more)
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The common arguments, and the tensors saved beside them."""
    saved = ctx.saved_tensors
    return (*saved[:7], *ctx.constants), saved[7:]


class Value(_Op):
    """``l2t::value`` with its derivatives: (loss, stats) of every row."""

    op = "value"

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _run("value", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        _save(ctx, inputs, stats)

    @staticmethod
    def backward(ctx: Any, v_loss: Any, v_stats: Any) -> Any:
        if v_loss is None:
            return (None,) * _COMMON
        where, (stats,) = _saved(ctx)
        return _spread(_differentiable(Grad, *where, stats, v_loss, _needs(ctx)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        where, (stats,) = _saved(ctx)
        return _differentiable(ValueJvp, *where, stats, *(tangents[i] for i in _INPUTS)), None


class Grad(_Op):
    """``l2t::grad`` with its derivatives; results that are not wanted are None."""

    op = "grad"

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _only_wanted(_run("grad", *arguments), arguments[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, stats, v_loss, wanted = inputs
        ctx.wanted = wanted
        _save(ctx, inputs, stats, v_loss)

    @staticmethod
    def backward(ctx: Any, *x: Any) -> Any:
        where, (stats, v_loss) = _saved(ctx)
        x = _only_wanted(x, ctx.wanted)
        if all(each is None for each in x):
            return (None,) * (_COMMON + 3)
        wanted = _needs(ctx, _COMMON + 1)
        d_v_loss, *d_inputs = _differentiable(GradVjp, *where, stats, v_loss, *x, wanted)
        return (*_spread(d_inputs), None, d_v_loss, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        where, (stats, v_loss) = _saved(ctx)
        t = (tangents[_COMMON + 1], *(tangents[i] for i in _INPUTS))
        return _differentiable(GradJvp, *where, stats, v_loss, *t, ctx.wanted)


class _Last(_Op):
    """A second derivative: what would differentiate it raises."""

    op = "last"

    @staticmethod
    def forward(*arguments: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise check.third_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise check.third_derivative()


class GradVjp(_Last):
    """``l2t::grad_vjp``; results that are not wanted are None."""

    op = "grad_vjp"

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _only_wanted(_run("grad_vjp", *arguments), arguments[-1])


class GradJvp(_Last):
    """``l2t::grad_jvp``; results that are not wanted are None."""

    op = "grad_jvp"

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _only_wanted(_run("grad_jvp", *arguments), arguments[-1])


class ValueJvp(_Op):
    """The derivative of the loss of every row along tangents of logits and tables, with a backward of its own."""

    op = "value_jvp"

    @staticmethod
    def forward(*arguments: Any) -> Any:
        logits, stats, t = arguments[0], arguments[_COMMON], arguments[_COMMON + 1 :]
        along = (*arguments[:_COMMON], stats, logits.new_ones(logits.shape[0]), *t)
        return _run("grad_vjp", *along, (True, *(False,) * 6))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, *inputs[_COMMON:])

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        where, (stats, *t) = _saved(ctx)
        if v is None:
            return (None,) * (_COMMON + 7)
        _, *d_inputs = _differentiable(GradVjp, *where, stats, v, *t, (False, *_needs(ctx)))
        wanted = tuple(ctx.needs_input_grad[_COMMON + 1 :])
        d_tangents = _differentiable(Grad, *where, stats, v, wanted)
        return (*_spread(d_inputs), None, *d_tangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise check.forward_twice()


for _cls in (Value, Grad, GradVjp, GradJvp):
    torch.library.register_autograd(
        f"l2t::{_cls.op}", _cls.backward, setup_context=_cls.setup_context, lib=ops.LIBRARY
    )


def rows(*arguments: Any) -> Tensor:
    """The loss of every row, shape (N,), differentiable twice; arguments of ``l2t::value``."""
    # A graph holds the op: torch.compile traces it with the backward registered above.
    if torch.compiler.is_compiling():
        return torch.ops.l2t.value(*arguments)[0]
    return Value.apply(*arguments)[0]
