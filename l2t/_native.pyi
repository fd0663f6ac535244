"""The typed face of the compiled core (csrc/binding.cpp), which only ``l2t.ops`` calls.

A tensor is passed as itself and read through DLPack; None means absent. It stays alive through the call; the GIL
is released. Sizes: N rows, C classes, G groups (losses stacked: row ``g * C + class`` of every coefficient
table), r the rank, L losses: N without a reduction, else ``segments``. D is float32, float64, bfloat16 or
float16, A is float64 for float64 and float32 for the others.

    ============  ===================================  =========================================================
    argument      shape and dtype                      meaning
    ============  ===================================  =========================================================
    threads                                            at most so many, on the CPU
    atomics                                            CUDA: coefficient gradients in any order
    workspace     [cuda_workspace(...)] uint8          CUDA only
    logits        [N, C] D                             any stride over rows, unit stride over classes
    target        [N] int64                            ``g * C + class``, or ``ignore_index``
    weight        [G*C, C] A full, [G*C] A otherwise   W, or its diagonal; None with a diagonal: the identity
    left, right   [G*C, r] A                           U and V, low rank only
    bias, scale   [G*C] A                              None: no bias, scale 1
    reduction                                          0 none, 1 mean, 2 sum, in each of the segments of rows
    loss, v_loss  [L] A                                each loss, its cotangent; L = 1: also 0-dimensional
    stats         [N, 3] A                             (max z, log sum exp(z - max z), u), from `value`
    ============  ===================================  =========================================================

``v_`` and ``x_`` are cotangents, ``t_`` tangents, ``d_`` outputs; each has the shape of what it is named after,
is contiguous, and an output of None is not computed. Outputs are written whole; ``d_logits`` may be the logits.
Ignored rows have loss 0 and gradients 0 whatever their logits. The bits do not depend on ``threads``. What does
not fit, and a call that cannot be meant, raises ValueError (csrc/status.h).
"""

from typing import Any, TypedDict

from torch import Tensor

SIGMOID: int
IDENTITY: int
LOG_SIGMOID: int

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    instruction_sets: str
    cuda_architectures: str
    openmp: bool

def build_info() -> BuildInfo:
    """What was built in: version, compiler, instruction sets, CUDA architectures ("" without), OpenMP."""

def use_exchange_api(capsule: Any, /) -> None:
    """The framework's ``__dlpack_c_exchange_api__``, through which tensors are read; once, at import."""

def instruction_sets() -> list[str]:
    """The instruction sets of this build that this machine can run, best last."""

def instruction_set() -> str:
    """The one in use."""

def use_instruction_set(name: str, /) -> bool:
    """Uses another one from now on; False if it is not among `instruction_sets`."""

def cuda_devices() -> int:
    """How many CUDA devices there are for this build."""

def cuda_workspace(n: int, c: int, groups: int, rank: int, losses: int, wide: bool, /) -> int:
    """Bytes of scratch memory that every op needs on CUDA; ``wide``: float64."""

def check_target(target: Tensor, table_rows: int, ignore_index: int, /) -> int:
    """The first row whose target is neither ``ignore_index`` nor in [0, table_rows), or -1; on the CPU."""

def cuda_scale(d_logits: Tensor, v_loss: Tensor, /) -> None:
    """d_logits (N, C) of each row times the cotangent of its loss (L,) or (), in place, untouched where that is 1."""

def value(
    threads: int,
    atomics: bool,
    workspace: Tensor | None,
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
    reduction: int,
    segments: int,
    loss: Tensor,
    stats: Tensor,
    d_logits: Tensor | None,
    /,
) -> None:
    """The losses, the stats of every row, and the gradient of the losses' sum (docs/math.md sections 1, 2)."""

def grad(
    threads: int,
    atomics: bool,
    workspace: Tensor | None,
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
    reduction: int,
    segments: int,
    stats: Tensor,
    v_loss: Tensor | None,
    d_logits: Tensor | None,
    d_weight: Tensor | None,
    d_left: Tensor | None,
    d_right: Tensor | None,
    d_bias: Tensor | None,
    d_scale: Tensor | None,
    /,
) -> None:
    """The gradient of <v_loss, loss> to the logits and to every coefficient (section 2)."""

def grad_vjp(
    threads: int,
    atomics: bool,
    workspace: Tensor | None,
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
    reduction: int,
    segments: int,
    stats: Tensor,
    v_loss: Tensor | None,
    x_logits: Tensor | None,
    x_weight: Tensor | None,
    x_left: Tensor | None,
    x_right: Tensor | None,
    x_bias: Tensor | None,
    x_scale: Tensor | None,
    d_v_loss: Tensor | None,
    d_logits: Tensor | None,
    d_weight: Tensor | None,
    d_left: Tensor | None,
    d_right: Tensor | None,
    d_bias: Tensor | None,
    d_scale: Tensor | None,
    /,
) -> None:
    """The vector-Jacobian product of `grad`: cotangents x_* of its outputs back to its inputs (section 3)."""

def grad_jvp(
    threads: int,
    atomics: bool,
    workspace: Tensor | None,
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
    reduction: int,
    segments: int,
    stats: Tensor,
    v_loss: Tensor | None,
    t_v_loss: Tensor | None,
    t_logits: Tensor | None,
    t_weight: Tensor | None,
    t_left: Tensor | None,
    t_right: Tensor | None,
    t_bias: Tensor | None,
    t_scale: Tensor | None,
    d_logits: Tensor | None,
    d_weight: Tensor | None,
    d_left: Tensor | None,
    d_right: Tensor | None,
    d_bias: Tensor | None,
    d_scale: Tensor | None,
    /,
) -> None:
    """The Jacobian-vector product of `grad`: tangents t_* of its inputs to its outputs (section 4)."""
