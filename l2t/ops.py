"""The dispatcher ops ``l2t::value``, ``grad``, ``grad_vjp``, ``grad_jvp``: schemas, kernels, fakes, vmap.

One op a derivative (docs/design.md, section 2). Each works on rows: logits (N, C), target (N,), coefficient
tables whose row ``target[n]`` belongs to sample n, and returns sums over nothing: a loss for every row. A
table may be a stack of G losses, G·C rows high; the vmap rules fold a batch into rows and, where the batch
has coefficients of its own, into such groups, so that a vmapped loss is one native call.

On the CPU the ops run csrc/; on any other device l2t.reference, with a warning. This is the only file that
knows a data pointer or the extension.

Not here: derivatives of the ops (autograd.py), shapes as users have them, and reductions (functional.py).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from l2t import check, reference

try:
    from l2t import _native
except ImportError as error:
    raise check.extension_missing(error) from error

_ROWS, _TARGET, _TABLE, _CONSTANT = "rows", "target", "table", "constant"

# name -> kind of each argument and of each result, for the schemas and the vmap rules.
_COMMON = {
    "logits": _ROWS,
    "target": _TARGET,
    **dict.fromkeys(("weight", "left", "right", "bias", "scale"), _TABLE),
    **dict.fromkeys(("link", "ignore_index", "groups"), _CONSTANT),
}


_SIX = ("logits", "weight", "left", "right", "bias", "scale")


def _six(prefix: str) -> dict[str, str]:
    return {f"{prefix}_{name}": _ROWS if name == "logits" else _TABLE for name in _SIX}


_STATS = {"stats": _ROWS}
_V_LOSS = {"v_loss": _ROWS}
_WANTED = {"wanted": _CONSTANT}

ARGUMENTS: dict[str, dict[str, str]] = {
    "value": _COMMON,
    "grad": {**_COMMON, **_STATS, **_V_LOSS, **_WANTED},
    "grad_vjp": {**_COMMON, **_STATS, **_V_LOSS, **_six("x"), **_WANTED},
    "grad_jvp": {**_COMMON, **_STATS, **_V_LOSS, "t_v_loss": _ROWS, **_six("t"), **_WANTED},
}
RESULTS: dict[str, dict[str, str]] = {
    "value": {"loss": _ROWS, "stats": _ROWS},
    "grad": _six("d"),
    "grad_vjp": {"d_v_loss": _ROWS, **_six("d")},
    "grad_jvp": _six("d"),
}
OPS = ("value", "grad", "grad_vjp", "grad_jvp")

_TYPES = {"link": "int", "ignore_index": "int", "groups": "int", "wanted": "bool[]"}
_REQUIRED = ("logits", "target", "stats", "v_loss")


def _schema(name: str) -> str:
    arguments = (f"{_TYPES.get(x, 'Tensor' if x in _REQUIRED else 'Tensor?')} {x}" for x in ARGUMENTS[name])
    return f"({', '.join(arguments)}) -> ({', '.join(f'Tensor {x}' for x in RESULTS[name])})"


# ---- the CPU: csrc ----


def _table(name: str, table: Tensor, rows: tuple[int, ...], logits: Tensor) -> Tensor:
    """A coefficient table, its cotangent or its tangent as the core takes it."""
    if table.shape != rows or table.dtype != logits.dtype or table.device != logits.device:
        raise check.op_argument(name, table, rows, logits)
    return table.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Call:
    """The first 17 arguments of every native op, checked, and the tensors that must outlive the call."""

    __slots__ = ("arguments", "kept", "logits", "shapes")

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        link: int,
        ignore_index: int,
        groups: int,
    ) -> None:
        if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
            raise check.op_logits(logits)
        n, c = logits.shape
        if target.shape != (n,) or target.dtype is not torch.int64 or target.device != logits.device:
            raise check.op_target(target, logits)
        if (left is None) != (right is None) or (left is not None and left.dim() != 2):
            raise check.op_low_rank(left, right)
        if c > 1 and logits.stride(1) != 1:
            logits = logits.contiguous()
        classes = groups * c
        full = left is None and weight is not None and weight.dim() == 2
        rank = 0 if left is None else left.shape[1]
        line = (classes,)
        self.shapes = ((n, c), (classes, c) if full else line, (classes, rank), (classes, rank), line, line)
        target = target.contiguous()
        weight = None if weight is None else _table("weight", weight, self.shapes[1], logits)
        left = None if left is None else _table("left", left, self.shapes[2], logits)
        right = None if right is None else _table("right", right, self.shapes[3], logits)
        bias = None if bias is None else _table("bias", bias, line, logits)
        scale = None if scale is None else _table("scale", scale, line, logits)
        self.logits = logits
        self.kept = (target, weight, left, right, bias, scale)
        self.arguments = (
            _native.FLOAT32 if logits.dtype is torch.float32 else _native.FLOAT64,
            link,
            _native.FULL if full else _native.DIAGONAL if left is None else _native.LOW_RANK,
            torch.get_num_threads(),
            n,
            c,
            groups,
            rank,
            ignore_index,
            logits.data_ptr(),
            logits.stride(0) if n > 1 else c,
            target.data_ptr(),
            _pointer(weight),
            _pointer(left),
            _pointer(right),
            _pointer(bias),
            _pointer(scale),
        )
        # Before anything is read or written by it.
        row = _native.check_target(n, classes, ignore_index, target.data_ptr())
        if row >= 0:
            raise check.target_range(int(target[row]), row, c, groups, ignore_index)

    def rows(self, stats: Tensor, v_loss: Tensor) -> tuple[Tensor, Tensor]:
        """What `value` left for the other ops, and the cotangent of the losses, as the core takes them."""
        n = self.arguments[4]
        return _table("stats", stats, (n, 3), self.logits), _table("v_loss", v_loss, (n,), self.logits)

    def six(self, prefix: str, *tensors: Tensor | None) -> list[Tensor | None]:
        """Cotangents or tangents of logits, weight, left, right, bias, scale as the core takes them."""
        return [
            None if x is None else _table(f"{prefix}_{name}", x, shape, self.logits)
            for name, x, shape in zip(_SIX, tensors, self.shapes, strict=True)
        ]

    def outputs(self, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Room for the gradients to logits, weight, left, right, bias, scale: None where not wanted."""
        present = (self.logits, *self.kept[1:])
        if len(wanted) != len(present):
            raise check.op_wanted(wanted)
        outputs: list[Tensor | None] = [None] * len(present)
        for i, want in enumerate(wanted):
            if want:
                if present[i] is None:
                    raise check.op_wanted(wanted)
                outputs[i] = self.logits.new_empty(self.shapes[i])
        return outputs

    def run(
        self,
        kernel: Callable[..., None],
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor | None],
    ) -> None:
        """Calls the core, which has no name for "no classes" or "no groups": then every row is ignored."""
        if self.shapes[-1] == (0,):
            for x in outputs:
                if x is not None:
                    x.zero_()
        else:
            kernel(*self.arguments, *map(_pointer, inputs), *map(_pointer, outputs))


def value_direct(*where: Any) -> tuple[Tensor, Tensor, int]:
    """``l2t::value`` past the dispatcher, where `direct` says so, and the number of rows that count."""
    call = _Call(*where)
    n, target, ignore_index = call.arguments[4], call.kept[0], where[8]
    count = n - int((target == ignore_index).sum()) if _some_ignored(call) else n
    loss, stats = call.logits.new_empty(n), call.logits.new_empty(n, 3)
    call.run(_native.value, (), (loss, stats))
    return loss, stats, count


def _some_ignored(call: _Call) -> bool:
    """Whether a row may be ignored; one quick look at the targets says no where no class is ignored."""
    _, _, _, _, n, c, groups, _, ignore_index, _, _, target, *_ = call.arguments
    return 0 <= ignore_index < groups * c or _native.check_target(n, groups * c, 0, target) >= 0


def _value(*where: Any) -> tuple[Tensor, Tensor]:
    return value_direct(*where)[:2]


def _grad(*arguments: Any) -> list[Tensor | None]:
    *where, stats, v_loss, wanted = arguments
    call = _Call(*where)
    stats, v_loss = call.rows(stats, v_loss)
    outputs = call.outputs(wanted)
    call.run(_native.grad, (stats, v_loss), outputs)
    return outputs


def _grad_vjp(*arguments: Any) -> list[Tensor | None]:
    *where, stats, v_loss, x0, x1, x2, x3, x4, x5, wanted = arguments
    call = _Call(*where)
    stats, v_loss = call.rows(stats, v_loss)
    x = call.six("x", x0, x1, x2, x3, x4, x5)
    outputs = call.outputs(wanted[1:])
    outputs.insert(0, torch.empty_like(v_loss) if wanted[0] else None)
    call.run(_native.grad_vjp, (stats, v_loss, *x), outputs)
    return outputs


def _grad_jvp(*arguments: Any) -> list[Tensor | None]:
    *where, stats, v_loss, t_v_loss, t0, t1, t2, t3, t4, t5, wanted = arguments
    call = _Call(*where)
    stats, v_loss = call.rows(stats, v_loss)
    if t_v_loss is not None:
        t_v_loss = _table("t_v_loss", t_v_loss, v_loss.shape, v_loss)
    t = (t_v_loss, *call.six("t", t0, t1, t2, t3, t4, t5))
    outputs = call.outputs(wanted)
    call.run(_native.grad_jvp, (stats, v_loss, *t), outputs)
    return outputs


def results(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a kernel as an op returns them: empty tensors where not wanted."""
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


def _returning(kernel: Callable[..., Sequence[Tensor | None]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return results(kernel(*arguments), arguments[0])

    return run


# name -> the kernel; a result is None where it is not wanted.
KERNELS: dict[str, Callable[..., Sequence[Tensor | None]]] = {
    "value": _value,
    "grad": _grad,
    "grad_vjp": _grad_vjp,
    "grad_jvp": _grad_jvp,
}

_PLAIN = torch._C._dispatch_keys(torch.empty(0)).raw_repr()
_ORDINARY = (Tensor, torch.nn.Parameter)


def direct(*arguments: Any) -> bool:
    """Whether the CPU kernels may be called past the dispatcher, which costs as much as a small kernel.

    That is so for ordinary CPU tensors while nobody watches, transforms or traces the ops.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and readable(*arguments)
    )


def readable(*arguments: Any) -> bool:
    """Whether the tensors among these are ordinary CPU tensors, whose memory may be looked at now."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    for x in arguments:
        if isinstance(x, Tensor) and (
            type(x) not in _ORDINARY or torch._C._dispatch_keys(x).raw_repr() != _PLAIN
        ):
            return False
    return True


# ---- any other device: reference.py ----


@functools.cache
def _warn_slow(device: str) -> None:
    warnings.warn(check.no_kernel(device), stacklevel=2)


def _by_reference(name: str) -> Callable[..., Any]:
    """The op in plain torch, for a device without a kernel."""
    kernel = getattr(reference, name)

    def run(logits: Tensor, target: Tensor, *rest: Any) -> Any:
        _warn_slow(logits.device.type)
        if name == "value":
            ignore_index, groups = rest[-2:]
            outside = (target != ignore_index) & ((target < 0) | (target >= groups * logits.shape[1]))
            if bool(outside.any()):
                row = int(outside.nonzero()[0])
                raise check.target_range(int(target[row]), row, logits.shape[1], groups, ignore_index)
        # A kernel runs below autograd; the reference differentiates by autograd.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            return kernel(logits, target, *rest)

    return run


# ---- shapes without data ----


def _fake(name: str) -> Callable[..., Any]:
    def run(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        n = logits.shape[0]
        if name == "value":
            return logits.new_empty(n), logits.new_empty(n, 3)
        wanted = rest[-1]
        first = (rest[9],) if name == "grad_vjp" else ()  # v_loss
        like = (*first, logits, *rest[:5])
        return tuple(
            logits.new_empty(x.shape if want and x is not None else 0)
            for x, want in zip(like, wanted, strict=True)
        )

    return run


# ---- vmap ----


def _vmap(name: str) -> Callable[..., Any]:
    """The op's kernel under `torch.vmap`: one call for the whole batch.

    The batch goes into the rows. Where a coefficient table (or its cotangent or tangent) is batched, or a
    gradient to one is wanted, which under vmap is one for every batch element, the batch also becomes groups
    of tables.

    `torch.library.register_vmap` does the same but walks over nested arguments, at twice the cost.
    """
    op = getattr(torch.ops.l2t, name).default
    kinds = tuple(ARGUMENTS[name].values())
    results = tuple(RESULTS[name].values())
    tables = [i for i, kind in enumerate(kinds) if kind == _TABLE]
    batched_key = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)

    def run(*arguments: Any) -> Any:
        level = torch._C._functorch.current_level()
        call = list(arguments)
        dims: list[int | None] = [None] * len(call)
        batch = 0
        for i, x in enumerate(call):
            if isinstance(x, Tensor):
                call[i], dims[i] = torch._C._functorch._unwrap_batched(x, level)
                if dims[i] is not None:
                    batch = call[i].shape[dims[i]]
        wanted = (True,) * len(results) if name == "value" else call[-1]
        grouped = any(dims[i] is not None for i in tables) or any(
            want for kind, want in zip(results, wanted, strict=True) if kind == _TABLE
        )

        for i, kind in enumerate(kinds):
            x = call[i]
            if isinstance(x, Tensor) and (kind != _TABLE or grouped):
                dim = dims[i]
                call[i] = x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0) if dim else x
        groups, ignore_index = call[9], call[8]
        classes = groups * call[0].shape[-1]
        height = {_ROWS: call[0].shape[1], _TABLE: classes}
        if grouped:
            call[1] = _in_group(call[1], classes, ignore_index)
            call[9] = groups * batch
            # An ignore_index beyond the classes moves with the targets beyond them, see _in_group.
            call[8] = ignore_index + (batch - 1) * classes if ignore_index >= classes else ignore_index
        for i, kind in enumerate(kinds):
            if isinstance(call[i], Tensor) and (kind != _TABLE or grouped):
                call[i] = call[i].flatten(0, 1)

        with torch._C._ExcludeDispatchKeyGuard(batched_key):
            outputs = op(*call)
            return tuple(
                torch._C._functorch._add_batch_dim(x.unflatten(0, (batch, height[kind])), 0, level)
                if want
                else x
                for x, kind, want in zip(outputs, results, wanted, strict=True)
            )

    return run


def _in_group(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Targets (B, n) of batch element b moved to the tables of group b.

    What is out of range stays so, negative or beyond the last group, and check.target_range can name it: a
    class beyond `classes` is moved by ``(batch - 1) * classes`` whatever its group.
    """
    batch = target.shape[0]
    moved = target + torch.arange(0, batch * classes, classes, device=target.device).unsqueeze(1)
    if readable(target) and not 0 <= ignore_index < classes:
        target = target.contiguous()
        if _native.check_target(target.numel(), classes, 0, target.data_ptr()) < 0:
            return moved
    moved = torch.where(target < classes, moved, target + (batch - 1) * classes)
    return torch.where((target < 0) | ((target == ignore_index) & (target < classes)), target, moved)


# ---- registration ----

LIBRARY = torch.library.Library("l2t", "DEF")
for _name in OPS:
    LIBRARY.define(_name + _schema(_name), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _returning(KERNELS[_name]), "CPU")
    for _key in ("CUDA", "XPU", "MPS", "HPU", "PrivateUse1"):
        LIBRARY.impl(_name, _by_reference(_name), _key)
    torch.library.register_fake(f"l2t::{_name}", _fake(_name), lib=LIBRARY)
    LIBRARY.impl(_name, _vmap(_name), "FuncTorchBatched")
