"""The dispatcher ops ``l2t::value``, ``grad``, ``grad_vjp``, ``grad_jvp``: schemas, kernels, fakes, vmap.

One op a derivative (docs/design.md, section 2). Each works on rows: logits (N, C), target (N,), coefficient
tables whose row ``target[n]`` belongs to sample n, and reduces the losses of its rows as ``reduction`` says,
in each of ``segments`` equal stretches of rows. A
table may be a stack of G losses, G·C rows high; the vmap rules fold a batch into rows and, where the batch
has coefficients of its own, into such groups, so that a vmapped loss is one native call.

On the CPU and on CUDA devices the ops run csrc/; on any other device l2t.reference, with a warning. This is
the only file that knows the extension.

Not here: derivatives of the ops (autograd.py), shapes as users have them, and reductions (functional.py).
"""

from __future__ import annotations

import functools
import math
import os
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

_ROWS, _TARGET, _TABLE, _LOSSES, _CONSTANT = "rows", "target", "table", "losses", "constant"
NONE, MEAN, SUM = 0, 1, 2  # reduction, by ATen's numbers

# name -> kind of each argument and of each result, for the schemas and the vmap rules.
_COMMON = {
    "logits": _ROWS,
    "target": _TARGET,
    **dict.fromkeys(("weight", "left", "right", "bias", "scale"), _TABLE),
    **dict.fromkeys(("link", "ignore_index", "groups", "reduction", "segments"), _CONSTANT),
}
COMMON = len(_COMMON)

_SIX = ("logits", "weight", "left", "right", "bias", "scale")


def _six(prefix: str) -> dict[str, str]:
    return {f"{prefix}_{name}": _ROWS if name == "logits" else _TABLE for name in _SIX}


_STATS = {"stats": _ROWS}
_V_LOSS = {"v_loss": _LOSSES}
_WANTED = {"wanted": _CONSTANT}

ARGUMENTS: dict[str, dict[str, str]] = {
    "value": {**_COMMON, "with_grad": _CONSTANT},
    "grad": {**_COMMON, **_STATS, **_V_LOSS, **_WANTED},
    "grad_vjp": {**_COMMON, **_STATS, **_V_LOSS, **_six("x"), **_WANTED},
    "grad_jvp": {**_COMMON, **_STATS, **_V_LOSS, "t_v_loss": _LOSSES, **_six("t"), **_WANTED},
}
RESULTS: dict[str, dict[str, str]] = {
    "value": {"loss": _LOSSES, "stats": _ROWS, "d_logits": _ROWS},
    "grad": _six("d"),
    "grad_vjp": {"d_v_loss": _LOSSES, **_six("d")},
    "grad_jvp": _six("d"),
}
OPS = ("value", "grad", "grad_vjp", "grad_jvp")

_TYPES = {
    **dict.fromkeys(("link", "ignore_index", "groups", "reduction", "segments"), "int"),
    "with_grad": "bool",
    "wanted": "bool[]",
}
_REQUIRED = ("logits", "target", "stats", "v_loss")


def _schema(name: str) -> str:
    arguments = (f"{_TYPES.get(x, 'Tensor' if x in _REQUIRED else 'Tensor?')} {x}" for x in ARGUMENTS[name])
    return f"({', '.join(arguments)}) -> ({', '.join(f'Tensor {x}' for x in RESULTS[name])})"


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything but logits, their directions and gradients: float32 for half precision."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def losses(logits: Tensor, reduction: int, segments: int) -> int:
    """How many losses the rows are reduced to."""
    return logits.shape[0] if reduction == NONE else segments


# ---- csrc ----
#
# The core checks each tensor against the logits, in less time than Python would, and refuses what does not
# fit with a ValueError. Only then is the sentence looked for, or the copy that does fit.

_atomics = False


def allow_atomics(allow: bool = True) -> bool:
    """Whether CUDA kernels may add coefficient gradients in any order; returns what was so before.

    That is faster where many rows share few classes, and its last bits differ from run to run. Off at first.

    Example:
        >>> import l2t
        >>> l2t.ops.allow_atomics(), l2t.ops.allow_atomics(False)
        (False, True)
    """
    global _atomics
    before, _atomics = _atomics, allow
    return before


_native.use_exchange_api(Tensor.__dlpack_c_exchange_api__)
if (_forced := os.environ.get("L2T_INSTRUCTION_SET", _native.instruction_set())) != _native.instruction_set():
    warnings.warn(
        check.instruction_set(_forced, _native.instruction_sets(), _native.instruction_set()), stacklevel=2
    )
HAS_CUDA = bool(_native.build_info()["cuda_architectures"])


def run(name: str, *arguments: Any) -> None:
    """Calls the core: the op's arguments, without what is `wanted`, and then room for its results."""
    kernel, logits = getattr(_native, name), arguments[0]
    if not logits.is_cuda:
        kernel(torch.get_num_threads(), _atomics, None, *arguments)
        return
    rank = 0 if arguments[3] is None else arguments[3].shape[-1]
    _, _, groups, reduction, segments = arguments[7:COMMON]
    size = _native.cuda_workspace(
        logits.shape[0],
        logits.shape[1],
        groups,
        rank,
        losses(logits, reduction, segments),
        logits.dtype is torch.float64,
    )
    with torch.cuda.device(logits.device):
        workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
        kernel(1, _atomics, workspace, *arguments)


def loss(with_grad: bool, reduction: int, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """``l2t::value`` past the dispatcher and unchecked but by the core; a single loss is 0-dimensional."""
    rows, dtype = logits.shape[0], logits.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        losses, stats = logits.new_empty(rows if reduction == NONE else ()), logits.new_empty(rows, 3)
    else:
        losses = logits.new_empty(rows if reduction == NONE else (), dtype=torch.float32)
        stats = losses.new_empty(rows, 3)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if with_grad else None
    if logits.is_cuda:
        run("value", logits, *rest, losses, stats, d_logits)
    else:
        _native.value(torch.get_num_threads(), False, None, logits, *rest, losses, stats, d_logits)  # type: ignore[call-arg]
    return losses, stats, d_logits


def scale(d_logits: Tensor, v_loss: Tensor) -> None:
    """d_logits times the cotangent of its loss, which most often is 1, as `times_`."""
    if d_logits.is_cuda:  # where to look at the cotangent would be to wait for it
        with torch.cuda.device(d_logits.device):
            _native.cuda_scale(d_logits, v_loss.contiguous())
    else:
        times_(v_loss, d_logits)


def times_(factor: Tensor, *gradients: Tensor) -> None:
    """Gradients times a factor of one number, in place; the exact zeros of ignored rows stay zeros.

    They do so where it is infinite, too, as that of a sum over a batch of padding divided by its tokens is.
    """
    finite = False
    if not factor.is_cuda:  # on a GPU to look at it would be to wait for it
        number = factor.item()
        if number == 1:
            return
        finite = math.isfinite(number)
    for x in gradients:
        if finite:
            x.mul_(factor)
        else:
            zeros = x == 0
            x.mul_(factor).masked_fill_(zeros, 0)


def kept() -> bool:
    """Whether nobody asked to drop or to move what autograd keeps, as checkpoints and `save_on_cpu` do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _run(name: str, arguments: Sequence[Any], outputs: Sequence[Tensor | None]) -> None:
    """`run`, where anything may be wrong with the arguments."""
    try:
        run(name, *arguments, *outputs)
    except ValueError:
        there = fitted(name, *arguments)
        if there is not None:
            run(name, *there, *outputs)
        else:
            for i, x in enumerate(outputs):
                if x is not None:
                    x.fill_(math.nan if name == "value" and i == 0 and arguments[10] == MEAN else 0)


def fitted(name: str, *arguments: Any) -> list[Any] | None:
    """Arguments that the core refused: an error for what is wrong with them, or else contiguous copies.

    None where there is no class, and so no row that counts, or no loss: the core has no names for these.
    """
    logits, target, weight, left, right, *_, groups, reduction, segments = arguments[:COMMON]
    ignore_index = arguments[8]
    n, c = logits.shape
    dtype, number = logits.dtype, arithmetic(logits.dtype)
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise check.op_logits(logits)
    if target.shape != (n,) or target.dtype is not torch.int64 or target.device != logits.device:
        raise check.op_target(target, logits)
    if (left is None) != (right is None) or (left is not None and left.dim() != 2):
        raise check.op_low_rank(left, right)
    if reduction != NONE and (segments < 0 or n % max(segments, 1) or (n and not segments)):
        raise check.op_segments(segments, n)
    classes = groups * c
    full = left is None and weight is not None and weight.dim() == 2
    factor = (classes, 0 if left is None else left.shape[1])
    shapes: dict[str, tuple[int, ...]] = {
        "logits": (n, c),
        "weight": (classes, c) if full else (classes,),
        **dict.fromkeys(("left", "right"), factor),
        **dict.fromkeys(("bias", "scale"), (classes,)),
        "stats": (n, 3),
        **dict.fromkeys(("v_loss", "t_v_loss"), (losses(logits, reduction, segments),)),
    }
    found = list(arguments)
    for i, (argument, kind) in enumerate(ARGUMENTS[name].items()):
        if i == len(found):
            break
        x = found[i]
        if kind in (_CONSTANT, _TARGET) or x is None:
            continue
        shape = shapes[argument if argument in shapes else argument[2:]]
        want = dtype if argument.endswith("logits") else number
        if x.shape != shape and not (kind == _LOSSES and x.dim() == 0 and shape == (1,)):
            raise check.op_argument(argument, x, shape, want, logits)
        if x.dtype != want or x.device != logits.device:
            raise check.op_argument(argument, x, shape, want, logits)
        found[i] = _in_memory(x)
    found[1] = _in_memory(target)
    if not target.is_cuda:
        row = _native.check_target(found[1], classes, ignore_index)
        if row >= 0:
            raise check.target_range(int(target[row]), row, c, groups, ignore_index)
    return found if classes and (segments or reduction == NONE) else None


def _in_memory(x: Tensor) -> Tensor:
    """What the core can read: contiguous, and with numbers where it is torch's promise of zeros."""
    return x.clone(memory_format=torch.contiguous_format) if torch._is_zerotensor(x) else x.contiguous()


def room(logits: Tensor, tables: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients to logits, weight, left, right, bias, scale: None where not wanted."""
    if len(wanted) != 1 + len(tables):
        raise check.op_wanted(wanted)
    outputs: list[Tensor | None] = [None] * len(wanted)
    for i, want in enumerate(wanted):
        if want:
            x = tables[i - 1] if i else logits
            if x is None:
                raise check.op_wanted(wanted)
            outputs[i] = x.new_empty(x.shape)
    return outputs


def _matrix(logits: Tensor) -> None:
    if logits.dim() != 2:
        raise check.op_logits(logits)


def _value(*arguments: Any) -> list[Tensor | None]:
    *where, with_grad = arguments
    logits = where[0]
    _matrix(logits)
    dtype = arithmetic(logits.dtype)
    loss = logits.new_empty(losses(logits, *where[10:]), dtype=dtype)
    stats = logits.new_empty(logits.shape[0], 3, dtype=dtype)
    outputs = [loss, stats, logits.new_empty(logits.shape) if with_grad else None]
    _run("value", where, outputs)
    return outputs


def _grad(*arguments: Any) -> list[Tensor | None]:
    *inputs, wanted = arguments
    _matrix(inputs[0])
    outputs = room(inputs[0], inputs[2:7], wanted)
    _run("grad", inputs, outputs)
    return outputs


def _grad_vjp(*arguments: Any) -> list[Tensor | None]:
    *inputs, wanted = arguments
    _matrix(inputs[0])
    v_loss = inputs[COMMON + 1]
    if len(wanted) != 7:
        raise check.op_wanted(wanted)
    d_v_loss = v_loss.new_empty(v_loss.shape) if wanted[0] else None
    outputs = [d_v_loss, *room(inputs[0], inputs[2:7], wanted[1:])]
    _run("grad_vjp", inputs, outputs)
    return outputs


def _grad_jvp(*arguments: Any) -> list[Tensor | None]:
    *inputs, wanted = arguments
    _matrix(inputs[0])
    outputs = room(inputs[0], inputs[2:7], wanted)
    _run("grad_jvp", inputs, outputs)
    return outputs


def results(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a kernel as an op returns them: empty tensors where not wanted."""
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


def _returning(kernel: Callable[..., Sequence[Tensor | None]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return results(kernel(*arguments), arguments[0])

    return run


# name -> the kernel; a result is None where it is not wanted.
KERNELS: dict[str, Callable[..., list[Tensor | None]]] = {
    "value": _value,
    "grad": _grad,
    "grad_vjp": _grad_vjp,
    "grad_jvp": _grad_jvp,
}

_ORDINARY = (Tensor, torch.nn.Parameter)
# The dispatch keys of a tensor that is nothing else besides.
_PLAIN = torch._C._dispatch_keys(torch.empty(0)).raw_repr()


@functools.cache
def _plain_cuda() -> int:
    return int(torch._C._dispatch_keys(torch.empty(0, device="cuda")).raw_repr())


def unwatched() -> bool:
    """Whether nobody watches, transforms or traces the ops.

    Then kernels may be called past the dispatcher, which costs as much as a small kernel.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def ordinary(*arguments: Any) -> bool:
    """Whether each is None or a tensor that DLPack either hands over as it is or refuses with a RuntimeError.

    It refuses wrappers and tensors without memory; a lazy negation it would not see.
    """
    for x in arguments:  # noqa: SIM110 (all(...) is slower)
        if x is not None and (type(x) not in _ORDINARY or x.is_neg()):
            return False
    return True


def has_kernel(x: Tensor) -> bool:
    """Whether the core works on the device of this tensor."""
    return x.is_cpu or (HAS_CUDA and x.is_cuda)


def native(*arguments: Any) -> bool:
    """Whether the arguments of an op can be handed to the core, but for what DLPack may refuse."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if not has_kernel(arguments[0]):
        return False
    for x in arguments:  # noqa: SIM110
        if isinstance(x, Tensor) and (type(x) not in _ORDINARY or x.is_neg()):
            return False
    return True


def readable(*arguments: Any) -> bool:
    """Whether the tensors among these are ordinary ones, of a device with kernels, that can be read now."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    for x in arguments:
        if isinstance(x, Tensor):
            if type(x) not in _ORDINARY:
                return False
            keys = torch._C._dispatch_keys(x).raw_repr()
            if keys != _PLAIN and not (HAS_CUDA and x.is_cuda and keys == _plain_cuda()):
                return False
    return True


# ---- any other device: reference.py ----


@functools.cache
def _warn_slow(device: str) -> None:
    warnings.warn(check.no_kernel(device), stacklevel=2)


def check_target(target: Tensor, num_classes: int, groups: int, ignore_index: int) -> None:
    """Raises the sentence for the first target that is out of range, on any device."""
    outside = (target != ignore_index) & ((target < 0) | (target >= groups * num_classes))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise check.target_range(int(target[row]), row, num_classes, groups, ignore_index)


def _by_reference(name: str) -> Callable[..., Any]:
    """The op in plain torch, for a device without a kernel."""
    kernel = getattr(reference, name)

    def run(logits: Tensor, target: Tensor, *rest: Any) -> Any:
        _warn_slow(logits.device.type)
        if name == "value":
            ignore_index, groups = rest[6:8]
            check_target(target, logits.shape[1], groups, ignore_index)
        # A kernel runs below autograd; the reference differentiates by autograd.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            return kernel(logits, target, *rest)

    return run


# ---- shapes without data ----


def _fake(name: str) -> Callable[..., Any]:
    def run(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        if name == "value":
            *_, reduction, segments, with_grad = rest
            number = arithmetic(logits.dtype)
            return (
                logits.new_empty(losses(logits, reduction, segments), dtype=number),
                logits.new_empty(logits.shape[0], 3, dtype=number),
                logits.new_empty(logits.shape if with_grad else 0),
            )
        wanted = rest[-1]
        first = (rest[COMMON - 1],) if name == "grad_vjp" else ()  # v_loss
        like = (*first, logits, *rest[:5])
        return tuple(
            logits.new_empty(0) if x is None or not want else x.new_empty(x.shape)
            for x, want in zip(like, wanted, strict=True)
        )

    return run


# ---- vmap ----


def _vmap(name: str) -> Callable[..., Any]:
    """The op's kernel under `torch.vmap`: one call for the whole batch.

    The batch goes into the rows, and its losses into segments of them. Where a coefficient table (or its
    cotangent or tangent) is batched, or a gradient to one is wanted, which under vmap is one for every batch
    element, the batch also becomes groups of tables.

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
        batch: int | None = None
        for i, x in enumerate(call):
            if isinstance(x, Tensor):
                call[i], dims[i] = torch._C._functorch._unwrap_batched(x, level)
                if dims[i] is not None:
                    batch = call[i].shape[dims[i]]
        if batch is None:  # every argument is batched at outer levels only
            with torch._C._ExcludeDispatchKeyGuard(batched_key):
                return op(*call)
        wanted = (True, True, call[-1]) if name == "value" else call[-1]
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
        rows = call[0].shape[1]
        reduction, segments = call[10], call[11]
        height = {_ROWS: rows, _TABLE: classes, _LOSSES: rows if reduction == NONE else segments}
        call[11] = segments if reduction == NONE else segments * batch
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
    if readable(target) and not target.is_cuda and not 0 <= ignore_index < classes:
        try:
            if _native.check_target(target.reshape(-1).contiguous(), classes, 0) < 0:
                return moved
        except RuntimeError:  # a level of torch.func around the tensor: its memory is not there to be read
            pass
    moved = torch.where(target < classes, moved, target + (batch - 1) * classes)
    return torch.where((target < 0) | ((target == ignore_index) & (target < classes)), target, moved)


# ---- registration ----

LIBRARY = torch.library.Library("l2t", "DEF")
for _name in OPS:
    LIBRARY.define(_name + _schema(_name), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _returning(KERNELS[_name]), "CPU")
    LIBRARY.impl(_name, _returning(KERNELS[_name]) if HAS_CUDA else _by_reference(_name), "CUDA")
    for _key in ("XPU", "MPS", "HPU", "PrivateUse1"):
        LIBRARY.impl(_name, _by_reference(_name), _key)
    torch.library.register_fake(f"l2t::{_name}", _fake(_name), lib=LIBRARY)
    LIBRARY.impl(_name, _vmap(_name), "FuncTorchBatched")
