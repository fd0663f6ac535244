"""The typed face of the compiled core (csrc/binding.cpp), which only ``l2t.ops`` calls.

Every tensor is passed as its data pointer, an ``int``; 0 means absent. The memory is the caller's, on the
CPU, and stays alive through the call; the GIL is released. Sizes: N rows, C classes, G groups (losses
stacked: row ``g * C + class`` of every coefficient table), r the rank. Everything is contiguous but the
logits, whose rows lie ``logits_stride`` elements apart.

    ============  ================================  ================================================
    argument      shape                             meaning
    ============  ================================  ================================================
    logits        [N, C]
    target        [N] int64                         ``g * C + class``, or ``ignore_index``
    weight        [G*C, C] full, [G*C] otherwise    W, or its diagonal; 0 with a diagonal: the identity
    left, right   [G*C, r]                          U and V, low rank only
    bias, scale   [G*C]                             0: no bias, scale 1
    loss, v_loss  [N]                               loss of each row, its cotangent
    stats         [N, 3]                            (max z, log sum exp(z - max z), u), from `value`
    ============  ================================  ================================================

``v_`` and ``x_`` are cotangents, ``t_`` tangents, ``d_`` outputs; each has the shape of what it is named
after, and an output of 0 is not computed. Outputs are written whole. Ignored rows have loss 0 and gradients
0 whatever their logits. The bits do not depend on ``threads``. A call that cannot be meant raises
ValueError (csrc/status.h).
"""

from typing import TypedDict

FLOAT32: int
FLOAT64: int
SIGMOID: int
IDENTITY: int
LOG_SIGMOID: int
FULL: int
DIAGONAL: int
LOW_RANK: int

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    instruction_set: str
    cuda: bool
    openmp: bool

def build_info() -> BuildInfo:
    """What was built in: version, compiler, instruction set, CUDA, OpenMP."""

def check_target(n: int, table_rows: int, ignore_index: int, target: int, /) -> int:
    """The first row whose target is neither ``ignore_index`` nor in [0, table_rows), or -1."""

def value(
    dtype: int,
    link: int,
    structure: int,
    threads: int,
    n: int,
    c: int,
    groups: int,
    rank: int,
    ignore_index: int,
    logits: int,
    logits_stride: int,
    target: int,
    weight: int,
    left: int,
    right: int,
    bias: int,
    scale: int,
    loss: int,
    stats: int,
    /,
) -> None:
    """The loss of every row and its stats (docs/math.md section 1)."""

def grad(
    dtype: int,
    link: int,
    structure: int,
    threads: int,
    n: int,
    c: int,
    groups: int,
    rank: int,
    ignore_index: int,
    logits: int,
    logits_stride: int,
    target: int,
    weight: int,
    left: int,
    right: int,
    bias: int,
    scale: int,
    stats: int,
    v_loss: int,
    d_logits: int,
    d_weight: int,
    d_left: int,
    d_right: int,
    d_bias: int,
    d_scale: int,
    /,
) -> None:
    """The gradient of <v_loss, loss> to the logits and to every coefficient (section 2)."""

def grad_vjp(
    dtype: int,
    link: int,
    structure: int,
    threads: int,
    n: int,
    c: int,
    groups: int,
    rank: int,
    ignore_index: int,
    logits: int,
    logits_stride: int,
    target: int,
    weight: int,
    left: int,
    right: int,
    bias: int,
    scale: int,
    stats: int,
    v_loss: int,
    x_logits: int,
    x_weight: int,
    x_left: int,
    x_right: int,
    x_bias: int,
    x_scale: int,
    d_v_loss: int,
    d_logits: int,
    d_weight: int,
    d_left: int,
    d_right: int,
    d_bias: int,
    d_scale: int,
    /,
) -> None:
    """The vector-Jacobian product of `grad`: cotangents x_* of its outputs back to its inputs (section 3)."""

def grad_jvp(
    dtype: int,
    link: int,
    structure: int,
    threads: int,
    n: int,
    c: int,
    groups: int,
    rank: int,
    ignore_index: int,
    logits: int,
    logits_stride: int,
    target: int,
    weight: int,
    left: int,
    right: int,
    bias: int,
    scale: int,
    stats: int,
    v_loss: int,
    t_v_loss: int,
    t_logits: int,
    t_weight: int,
    t_left: int,
    t_right: int,
    t_bias: int,
    t_scale: int,
    d_logits: int,
    d_weight: int,
    d_left: int,
    d_right: int,
    d_bias: int,
    d_scale: int,
    /,
) -> None:
    """The Jacobian-vector product of `grad`: tangents t_* of its inputs to its outputs (section 4)."""
