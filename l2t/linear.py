"""dynamic_linear_loss: the dynamic loss of a linear head, without the (N, C) logits in memory.

The logits of a stretch of rows are made by the library's matrix product, given to the core, and overwritten
by their gradient or by the next stretch. With z = h Aᵀ + c and g = ∂ℓ/∂z (docs/math.md, sections 1 to 4):

    first order    d_h = g A,  d_A = gᵀ h,  d_c = Σ g
    second order   along cotangents or tangents x of h, A, c the logits move along v = x_h Aᵀ + h x_Aᵀ + x_c;
                   with w the core's grad_vjp or grad_jvp of v:
                   h gets w A + g x_A,  A gets wᵀ h + gᵀ x_h,  c gets Σ w

So four ops ``l2t::linear_*`` stand over those of ops.py under the same names, each in stretches, with the
same chain of derivatives (autograd.Chain). Eager mode has a node of its own besides, `_Reduced`, for a
reduced loss: it makes the gradients in the same pass as the loss, with one product for the logits instead of
two, and hands them on scaled; where the backward is to be differentiated they become the results of the op
(`_Ready`).

Sums over stretches are made in the arithmetic's dtype, float32 for half precision. On the CPU products of
float16 are made in float32: the library's own take far longer there.

Not here: arithmetic on logits (csrc), other shapes of logits (functional.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t import check, ops
from l2t.autograd import Chain, Op, only
from l2t.functional import (
    LINKS,
    REDUCTIONS,
    autocast,
    checked_tables,
    dynamic_loss,
    result_dtype,
    without_autocast,
)
from l2t.weight import Weight

__all__ = ["dynamic_linear_loss"]

# What the logits of a stretch may take, in bytes, where chunk_rows does not say.
CHUNK_BYTES = 32 << 20
# How many elements of half precision are widened at a time on the CPU.
PIECE = 1 << 18


def dynamic_linear_loss(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Weight | Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    head_bias: Tensor | None = None,
    link: str = "sigmoid",
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """The `dynamic_loss` of ``torch.nn.functional.linear(hidden, head, head_bias)``, in stretches of rows.

    For many classes: instead of (N, C) logits and their gradient, ``chunk_rows`` rows of them are in memory
    at a time, in the forward pass and in both derivatives. Value and derivatives are those of the two-step
    form up to rounding. It is differentiable twice to hidden, head, head_bias, the coefficients and
    sample_weight, in reverse and forward mode and under `torch.func`; under `torch.compile` it is one op and
    differentiable once. Under `torch.vmap` the elements of the batch are computed one after another.

    Args:
        hidden: inputs of the head, shape (..., D); float32, float64, bfloat16 or float16.
        head: weight of the head as in `torch.nn.Linear`, shape (C, D), of hidden's dtype.
        target: class of each row, of hidden's shape without D; int64 or uint8, in [0, C) or ``ignore_index``.
        weight: the coefficients W, as for `dynamic_loss`: a record, a tensor, or None for the identity.
        bias: b inside the link, shape (C,); None is 0.
        scale: κ, shape (C,); None is 1.
        head_bias: bias of the head as in `torch.nn.Linear`, shape (C,), of hidden's dtype; None is 0.
        link: φ: ``"sigmoid"``, ``"identity"`` or ``"log-sigmoid"``.
        sample_weight: a factor for the loss of each row, of target's shape; None is 1.
        ignore_index: a target that takes no part.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_rows: how many rows have their logits in memory at a time; None is what 32 MB hold. A second
            derivative holds three tensors of this size.

    Returns:
        the loss, 0-dimensional, or of target's shape with ``reduction="none"``.

    dtypes are those of the two-step form: logits have the dtype of hidden, under autocast the lower one, and
    the loss is computed in float64 or float32 as `dynamic_loss` does. Gradients to head and head_bias are
    summed over stretches of rows in float32 for half precision, and rounded once at the end.

    In eager mode the forward pass of a ``"mean"`` or ``"sum"`` also makes the gradients, which take the
    memory that they will take anyway; call it under `torch.no_grad` where none is wanted.

    Raises:
        ValueError: a shape, a device, a link, a reduction or a number of rows that does not fit.
        TypeError: a dtype that does not fit, or a weight that is no coefficient matrix.
        IndexError: a target that is neither a class nor ``ignore_index``.

    Example:
        >>> import torch, l2t
        >>> hidden, head, target = torch.eye(3, 4), torch.nn.Linear(4, 5), torch.tensor([0, 4, 2])
        >>> weight = l2t.LowRank.smoothed(5, 0.1)
        >>> loss = l2t.dynamic_linear_loss(
        ...     hidden, head.weight, target, weight, head_bias=head.bias, link="identity"
        ... )
        >>> loss.backward()
        >>> torch.allclose(loss, l2t.dynamic_loss(head(hidden), target, weight, link="identity"))
        True
    """
    check.loss_choice("link", link, LINKS)
    check.loss_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check.loss_ignore_index(ignore_index)
    check.linear_tensors(hidden, head, head_bias, target)
    chunk_rows = check.linear_chunk_rows(chunk_rows)
    hidden, head = _as_linear_takes_it(hidden), _as_linear_takes_it(head)
    head_bias = None if head_bias is None else _as_linear_takes_it(head_bias)
    check.linear_dtypes(hidden, head, head_bias)

    shape = target.shape
    hidden, target = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(target.numel()).long()
    n, c = hidden.shape[0], head.shape[0]
    stand_in = hidden.new_empty(()).expand(n, c)  # what the logits would be, for the checks
    tables = checked_tables(stand_in, weight, bias, scale)
    if sample_weight is not None:
        check.loss_table("sample_weight", sample_weight, shape, stand_in)
        sample_weight = sample_weight.reshape(target.shape)
    if not n or not c:
        loss = dynamic_loss(
            F.linear(hidden, head, head_bias),
            target,
            weight,
            bias,
            scale,
            link=link,
            sample_weight=sample_weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        return loss.reshape(shape if reduction == "none" else ())

    dtype, number = result_dtype(stand_in), ops.arithmetic(hidden.dtype)
    *tables, sample_weight = [None if x is None else x.to(number) for x in (*tables, sample_weight)]
    where = (hidden, target, head, head_bias, *tables, LINKS.index(link), ignore_index, chunk_rows or 0)
    counted = target != ignore_index
    factor = None if sample_weight is None else torch.where(counted, sample_weight, 0.0)
    if reduction == "none":
        losses: Tensor = torch.ops.l2t.linear_value.default(*where)[0]
        return (losses if factor is None else losses * factor).reshape(shape).to(dtype)
    loss = _sum(where, factor)
    if reduction == "mean":
        # 0 / 0 where no row counts: without this the gradients would be NaN too.
        over = counted.sum().to(number) if factor is None else factor.sum()
        loss = torch.where(counted.any(), loss / torch.where(counted.any(), over, 1.0), math.nan)
    return loss.to(dtype)


def _as_linear_takes_it(x: Tensor) -> Tensor:
    """A tensor as it goes into `torch.nn.functional.linear`: under autocast of the lower dtype."""
    if x.dtype is torch.float64 or not autocast(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _sum(where: tuple[Any, ...], factor: Tensor | None) -> Tensor:
    """The sum of the rows' losses, each times its factor."""
    if ops.unwatched() and torch.is_grad_enabled() and (factor is None or not factor.requires_grad):
        tensors = (*where[:9], factor)
        if any(x is not None and x.requires_grad for x in tensors) and ops.readable(*tensors):
            loss: Tensor = _Reduced.apply(where[9:], *tensors)
            return loss
    losses = torch.ops.l2t.linear_value.default(*where)[0]
    loss = (losses if factor is None else losses * factor).sum()
    return loss


# ---- kernels: rows in stretches ----

_CHAIN = Chain("linear_", tensors=9, common=12)
# Of the arguments that all ops share, those that are differentiated: hidden, head, head_bias, weight, ...
_INPUTS = _CHAIN.inputs
_COMMON = _CHAIN.common


def _check_wanted(where: Sequence[Any], wanted: Sequence[bool]) -> None:
    present = [where[i] is not None for i in _INPUTS]
    if len(wanted) != len(present) or any(
        want and not has for want, has in zip(wanted, present, strict=True)
    ):
        raise check.op_wanted(wanted)


class _Call:
    """The arguments that all ops share, stretch by stretch, and room that all stretches use."""

    def __init__(
        self, hidden: Tensor, target: Tensor, head: Tensor, head_bias: Tensor | None, *rest: Any
    ) -> None:
        *tables, link, ignore_index, chunk_rows = rest
        self.n, self.c = hidden.shape[0], head.shape[0]
        self.dtype, self.number = hidden.dtype, ops.arithmetic(hidden.dtype)
        slow = hidden.dtype is torch.float16 and hidden.device.type == "cpu"
        self.wide = torch.float32 if slow else hidden.dtype  # of the products
        self.hidden, self.head = self.widened(hidden), self.widened(head)
        self.head_bias = self.widened(head_bias)
        self.target = target.contiguous()
        self.tables = [None if x is None else x.contiguous() for x in tables]
        self.constants = (link, ignore_index, 1, ops.NONE, 1)
        if not target.is_cuda:  # of all rows: a stretch of them would be numbered from its own first row
            ops.check_target(target, self.c, 1, ignore_index)
        rows = chunk_rows or max(1, CHUNK_BYTES // max(1, self.c * self.wide.itemsize))
        count = max(1, math.ceil(self.n / rows))
        self.stretch = math.ceil(self.n / count)  # as many stretches, of equal size
        self._room: dict[str, Tensor] = {}

    def widened(self, x: Any) -> Any:
        return None if x is None else x.to(self.wide)

    def stretches(self) -> Iterator[slice]:
        return (slice(i, min(i + self.stretch, self.n)) for i in range(0, self.n, max(1, self.stretch)))

    def room(self, name: str, rows: slice, dtype: torch.dtype | None = None) -> Tensor:  # [rows, C]
        """Memory for something of the size of a stretch's logits."""
        if name not in self._room:
            self._room[name] = self.hidden.new_empty(self.stretch, self.c, dtype=dtype or self.dtype)
        return self._room[name][: rows.stop - rows.start]

    def _products(
        self, name: str, rows: slice, pairs: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None
    ) -> Tensor:
        result = self.room(name, rows)
        exact = result if self.wide is self.dtype else self.room("wide", rows, self.wide)
        for i, (left, right) in enumerate(pairs):
            if i:
                exact.addmm_(left, right.t())
            elif bias is None:
                torch.mm(left, right.t(), out=exact)
            else:
                torch.addmm(bias, left, right.t(), out=exact)
        if not pairs:
            exact.copy_(bias)  # type: ignore[arg-type]
        return result if exact is result else result.copy_(exact)

    def logits(self, rows: slice) -> Tensor:  # [rows, C]
        return self._products("logits", rows, [(self.hidden[rows], self.head)], self.head_bias)

    def direction(self, rows: slice, hidden: Any, head: Any, head_bias: Any) -> Tensor | None:  # [rows, C]
        """Along which the logits move where hidden, head and its bias move along these."""
        pairs = [] if hidden is None else [(hidden[rows], self.head)]
        if head is not None:
            pairs.append((self.hidden[rows], head))
        if not pairs and head_bias is None:
            return None
        return self._products("direction", rows, pairs, head_bias)

    def core(self, name: str, rows: slice, logits: Tensor, inputs: Sequence[Any], outputs: list[Any]) -> None:
        """An op of the core on a stretch, which writes into outputs; into the logits too if they are one."""
        arguments = (logits, self.target[rows], *self.tables, *self.constants, *inputs)
        if ops.has_kernel(logits):
            ops.run(name, *arguments, *outputs)
            return
        wanted = [x is not None for x in outputs]
        results = getattr(torch.ops.l2t, name).default(*arguments, wanted[2] if name == "value" else wanted)
        for room, x in zip(outputs, results, strict=True):
            if room is not None:
                room.copy_(x)


class _Sums:
    """Gradients to hidden, head, its bias and the tables, as the stretches add to them."""

    def __init__(self, call: _Call, wanted: Sequence[bool]) -> None:
        self.call = call
        self.wants_hidden, self.wants_head, self.wants_bias, *self.wants_tables = wanted
        self.hidden = torch.empty_like(call.hidden) if self.wants_hidden else None
        self.head: Tensor | None = None
        self.bias: Tensor | None = None
        self.tables: list[Tensor | None] = [None] * len(self.wants_tables)
        self._part: Tensor | None = None

    @property
    def wants_logits(self) -> bool:
        return self.wants_hidden or self.wants_head or self.wants_bias

    def add(self, rows: slice, d_logits: Tensor, room: Sequence[Tensor | None]) -> None:
        """What a stretch's gradients to logits and to tables come to."""
        call = self.call
        if self.wants_logits:
            d_logits = self.exact(rows, d_logits)
            if self.hidden is not None:
                torch.mm(d_logits, call.head, out=self.hidden[rows])
            if self.wants_head:
                self._add_to_head(d_logits, call.hidden[rows])
            if self.wants_bias:
                part = _column_sums(d_logits, call.number)
                self.bias = part if self.bias is None else self.bias.add_(part)
        for i, x in enumerate(room):
            total = self.tables[i]
            self.tables[i] = x if x is None or total is None else total.add_(x)

    def cross(self, rows: slice, d_logits: Tensor, hidden: Tensor | None, head: Tensor | None) -> None:
        """The part of the second order that comes of the first gradient, after `add`."""
        d_logits = self.exact(rows, d_logits)
        if self.hidden is not None and head is not None:
            self.hidden[rows].addmm_(d_logits, head)
        if self.wants_head and hidden is not None:
            self._add_to_head(d_logits, hidden[rows])

    def exact(self, rows: slice, d_logits: Tensor) -> Tensor:
        """d_logits as the products take them."""
        call = self.call
        if call.wide is call.dtype:
            return d_logits
        return call.room("wide", rows, call.wide).copy_(d_logits)

    def _add_to_head(self, d_logits: Tensor, hidden: Tensor) -> None:
        call = self.call
        if self.head is None:
            self.head = torch.mm(d_logits.t(), hidden).to(call.number)
        elif call.wide is call.number:
            self.head.addmm_(d_logits.t(), hidden)
        else:
            if self._part is None:
                self._part = hidden.new_empty(call.head.shape)
            torch.mm(d_logits.t(), hidden, out=self._part)
            _add(self.head, self._part)

    def table_room(self) -> list[Tensor | None]:
        return [
            None if x is None or not want else torch.empty_like(x)
            for x, want in zip(self.call.tables, self.wants_tables, strict=True)
        ]

    def totals(self) -> list[Tensor | None]:
        """The gradients, those to head and bias in the arithmetic's dtype."""
        if not self.call.n:  # no stretch has made any
            like = (self.call.head, self.call.head[:, :0].sum(1), *self.call.tables)
            wants = (self.wants_head, self.wants_bias, *self.wants_tables)
            return [
                self.hidden,
                *(torch.zeros_like(x) if w else None for x, w in zip(like, wants, strict=True)),
            ]
        return [self.hidden, self.head, self.bias, *self.tables]


def _column_sums(d_logits: Tensor, dtype: torch.dtype) -> Tensor:  # [C]
    """Σ over rows in higher precision; on the CPU in pieces, since torch would cast all rows at once."""
    if d_logits.dtype is dtype or d_logits.device.type != "cpu":
        return d_logits.sum(0, dtype=dtype)
    total = d_logits.new_zeros(d_logits.shape[1], dtype=dtype)
    for x in d_logits.split(max(1, PIECE // d_logits.shape[1])):
        total.add_(x.sum(0, dtype=dtype))
    return total


def _add(total: Tensor, part: Tensor) -> None:
    """Adds a part of lower precision; on the CPU in pieces that stay in cache, which is faster."""
    if total.device.type != "cpu":
        total.add_(part)
        return
    rows = max(1, PIECE // max(1, total.shape[1]))
    for x, y in zip(total.split(rows), part.split(rows), strict=True):
        x.add_(y.to(total.dtype))


def _rounded(totals: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Gradients to hidden, head and its bias in their dtype; those to tables as they are."""
    return [x if x is None or i > 2 else x.to(dtype) for i, x in enumerate(totals)]


def _value(*where: Any) -> list[Tensor | None]:
    call = _Call(*where)
    losses = call.hidden.new_empty(call.n, dtype=call.number)
    stats = call.hidden.new_empty(call.n, 3, dtype=call.number)
    for rows in call.stretches():
        call.core("value", rows, call.logits(rows), (), [losses[rows], stats[rows], None])
    return [losses, stats]


def _value_and_grad(
    where: Sequence[Any], factor: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Σ factor · loss, stats, and the gradients of that sum before they are rounded."""
    with torch._C._AutoDispatchBelowAutograd(), without_autocast(where[0]):
        call = _Call(*where)
        sums = _Sums(call, wanted)
        losses = call.hidden.new_empty(call.n, dtype=call.number)
        stats = call.hidden.new_empty(call.n, 3, dtype=call.number)
        v_loss = torch.ones_like(losses) if factor is None else factor.contiguous()
        for rows in call.stretches():
            logits = call.logits(rows)
            room = sums.table_room()
            d_logits = logits if sums.wants_logits else None
            at_once = factor is None and not any(sums.wants_tables)
            value = [losses[rows], stats[rows], d_logits if at_once else None]
            call.core("value", rows, logits, (), value)
            if not at_once:
                call.core("grad", rows, logits, (stats[rows], v_loss[rows]), [d_logits, *room])
            sums.add(rows, logits, room)
        return (losses * v_loss).sum(), stats, sums.totals()


def _grad(*arguments: Any) -> list[Tensor | None]:
    *where, stats, v_loss, wanted = arguments
    _check_wanted(where, wanted)
    call = _Call(*where)
    sums = _Sums(call, wanted)
    stats, v_loss = stats.contiguous(), v_loss.contiguous()
    for rows in call.stretches():
        logits = call.logits(rows)
        room = sums.table_room()
        outputs = [logits if sums.wants_logits else None, *room]
        call.core("grad", rows, logits, (stats[rows], v_loss[rows]), outputs)
        sums.add(rows, logits, room)
    return _rounded(sums.totals(), call.dtype)


def _grad_vjp(*arguments: Any) -> list[Tensor | None]:
    where, (stats, v_loss, *x, wanted) = arguments[:_COMMON], arguments[_COMMON:]
    return _second("grad_vjp", where, stats, v_loss, None, x, wanted)


def _grad_jvp(*arguments: Any) -> list[Tensor | None]:
    where, (stats, v_loss, t_v_loss, *t, wanted) = arguments[:_COMMON], arguments[_COMMON:]
    return _second("grad_jvp", where, stats, v_loss, t_v_loss, t, [False, *wanted])[1:]


def _second(
    name: str,
    where: Sequence[Any],
    stats: Tensor,
    v_loss: Tensor,
    t_v_loss: Tensor | None,
    directions: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Both second orders: along directions of hidden, head, its bias and the tables."""
    _check_wanted(where, wanted[1:])
    call = _Call(*where)
    sums = _Sums(call, wanted[1:])
    along_hidden, along_head, along_bias = (call.widened(x) for x in directions[:3])
    along_tables = [None if x is None else x.contiguous() for x in directions[3:]]
    stats, v_loss = stats.contiguous(), v_loss.contiguous()
    t_v_loss = None if t_v_loss is None else t_v_loss.contiguous()
    d_v_loss = torch.empty_like(v_loss) if wanted[0] else None
    crosses = (sums.wants_hidden and along_head is not None) or (sums.wants_head and along_hidden is not None)
    for rows in call.stretches():
        logits = call.logits(rows)
        direction = call.direction(rows, along_hidden, along_head, along_bias)
        d_logits = call.room("d_logits", rows) if sums.wants_logits else None
        room = sums.table_room()
        inputs = [stats[rows], v_loss[rows]]
        outputs = [d_logits, *room]
        if name == "grad_jvp":
            more = [None if t_v_loss is None else t_v_loss[rows]]
        else:
            more, outputs = [], [None if d_v_loss is None else d_v_loss[rows], *outputs]
        call.core(name, rows, logits, (*inputs, *more, direction, *along_tables), outputs)
        sums.add(rows, logits if d_logits is None else d_logits, room)
        if crosses:
            call.core("grad", rows, logits, inputs, [logits, *[None] * 5])
            sums.cross(rows, logits, along_hidden, along_head)
    return [d_v_loss, *_rounded(sums.totals(), call.dtype)]


# ---- derivatives ----


class _Reduced(Op):
    """Σ factor · loss and its gradients in one pass, for eager mode on ordinary tensors (`ops.unwatched`)."""

    op = "linear_value"

    @staticmethod
    def forward(ctx: Any, constants: tuple[Any, ...], *tensors: Any) -> Any:
        *inputs, factor = tensors
        wanted, kept = _CHAIN.needs(ctx, 1), ops.kept()
        wanted = wanted if kept else [False] * len(wanted)
        total, stats, ready = _value_and_grad((*inputs, *constants), factor, wanted)
        ctx.ready = ready if kept else None
        ctx.constants = constants
        ctx.save_for_backward(*inputs, factor, stats)
        return total

    @staticmethod
    def backward(ctx: Any, v_total: Any) -> Any:
        ready, ctx.ready = ctx.ready, None  # handed on once: a second backward makes its own
        *inputs, factor, stats = ctx.saved_tensors
        where, wanted = (*inputs, *ctx.constants), _CHAIN.needs(ctx, 1)
        direct = ops.unwatched() and ops.readable(v_total)
        if direct:
            if ready is None:
                *_, ready = _value_and_grad(where, factor, wanted)
            ops.times_(v_total.detach(), *(x for x in ready if x is not None))
            ready = only(wanted, _rounded(ready, inputs[0].dtype))
            if not torch.is_grad_enabled():
                return (None, *_CHAIN.spread(ready)[: _CHAIN.tensors], None)
        v_loss = v_total.expand(stats.shape[0]) if factor is None else v_total * factor
        arguments = (*where, stats, v_loss, wanted)
        results = _Ready.apply(ready, *arguments) if direct else torch.ops.l2t.linear_grad.default(*arguments)
        return (None, *_CHAIN.spread(only(wanted, results))[: _CHAIN.tensors], None)


class _Ready(Op):
    """``l2t::linear_grad``, of which the results are there already."""

    op = "linear_grad"

    @staticmethod
    def forward(ctx: Any, ready: Sequence[Tensor | None], *arguments: Any) -> Any:
        *_, stats, v_loss, wanted = arguments
        ctx.wanted = wanted
        _CHAIN.save(ctx, arguments, stats, v_loss)
        return tuple(ready)

    @staticmethod
    def backward(ctx: Any, *x: Any) -> Any:
        return _CHAIN.back_over_grad(ctx, x, before=1)


# ---- registration ----


def _kernel(kernel: Callable[..., list[Tensor | None]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        with without_autocast(arguments[0]):  # the public function has cast them
            return ops.results(kernel(*arguments), arguments[0])

    return run


def _fake(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        hidden = arguments[0]
        if name == "linear_value":
            n, number = hidden.shape[0], ops.arithmetic(hidden.dtype)
            return hidden.new_empty(n, dtype=number), hidden.new_empty(n, 3, dtype=number)
        wanted = arguments[-1]
        like = [arguments[i] for i in _INPUTS]
        if name == "linear_grad_vjp":
            like = [arguments[_COMMON + 1], *like]
        return tuple(
            x.new_empty(x.shape) if want else hidden.new_empty(0)
            for x, want in zip(like, wanted, strict=True)
        )

    return run


def _vmap(name: str) -> Callable[..., Any]:
    """The elements of the batch one after another: each is a matter of large products."""
    op = getattr(torch.ops.l2t, name).default
    batched_key = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)

    def run(*arguments: Any) -> Any:
        level = torch._C._functorch.current_level()
        call: list[Any] = list(arguments)
        dims: dict[int, int] = {}
        for i, x in enumerate(call):
            if isinstance(x, Tensor):
                call[i], dim = torch._C._functorch._unwrap_batched(x, level)
                if dim is not None:
                    dims[i] = dim
        if not dims:  # every argument is batched at outer levels only
            with torch._C._ExcludeDispatchKeyGuard(batched_key):
                return op(*call)
        batch = next(call[i].shape[dim] for i, dim in dims.items())
        wanted = (True, True) if name == "linear_value" else arguments[-1]

        def element(b: int) -> list[Any]:
            return [x.select(dims[i], b) if i in dims else x for i, x in enumerate(call)]

        with torch._C._ExcludeDispatchKeyGuard(batched_key):
            if batch:
                every = [op(*element(b)) for b in range(batch)]
                stacked = [torch.stack(x) if want else x[0] for *x, want in zip(*every, wanted, strict=True)]
            else:
                for i, dim in dims.items():
                    shape = call[i].shape
                    call[i] = call[i].new_zeros(shape[:dim] + shape[dim + 1 :])
                results = op(*call)
                stacked = [x[None][:0] if want else x for x, want in zip(results, wanted, strict=True)]
            return tuple(
                torch._C._functorch._add_batch_dim(x, 0, level) if want else x
                for x, want in zip(stacked, wanted, strict=True)
            )

    return run


def _names(prefix: str, kind: str = "Tensor?") -> str:
    parts = ("hidden", "head", "head_bias", "weight", "left", "right", "bias", "scale")
    return ", ".join(f"{kind} {prefix}_{part}" for part in parts)


_WHERE = (
    "Tensor hidden, Tensor target, Tensor head, Tensor? head_bias, Tensor? weight, Tensor? left, "
    "Tensor? right, Tensor? bias, Tensor? scale, int link, int ignore_index, int chunk_rows"
)
_FIRST = f"{_WHERE}, Tensor stats, Tensor v_loss"
_GRADIENTS = _names("d", "Tensor")
_SCHEMAS = {
    "linear_value": f"({_WHERE}) -> (Tensor losses, Tensor stats)",
    "linear_grad": f"({_FIRST}, bool[] wanted) -> ({_GRADIENTS})",
    "linear_grad_vjp": f"({_FIRST}, {_names('x')}, bool[] wanted) -> (Tensor d_v_loss, {_GRADIENTS})",
    "linear_grad_jvp": f"({_FIRST}, Tensor? t_v_loss, {_names('t')}, bool[] wanted) -> ({_GRADIENTS})",
}

for _name, _run in zip(_SCHEMAS, (_value, _grad, _grad_vjp, _grad_jvp), strict=True):
    ops.LIBRARY.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    ops.LIBRARY.impl(_name, _kernel(_run), "CompositeExplicitAutograd")
    ops.LIBRARY.impl(_name, _vmap(_name), "FuncTorchBatched")
    torch.library.register_fake(f"l2t::{_name}", _fake(_name), lib=ops.LIBRARY)
_CHAIN.register()
