"""The contenders, one a file. Each module has

    OPS     the ops of cases.py that it takes part in
    LOSS    "dynamic", or the name of the other loss that it computes: then it is a yardstick; NO_LOSS has
            what loops compute that are no loss
    why_not(case) -> why it cannot run a case here, or None
    make(case, inputs) -> a Job, whose call returns the results in the order of its op: the loss and the
            gradient to the logits where these are asked for; to features and head for "linear"; for the
            second order the result for the logits and, where all are wanted, for each coefficient

and a line here. Its results are compared with float64 before it is timed, so `make` may do anything but
compute the results beforehand.
"""

from __future__ import annotations

from types import ModuleType

from contenders import (
    cce,
    compiled,
    cross_entropy,
    eager,
    exponentials,
    l2t_fresh,
    l2t_inplace,
    l2t_linear,
    l2t_loss,
    l2t_ops,
    l2t_reused,
    liger,
    triad,
)

CONTENDERS: dict[str, ModuleType] = {
    "kernel, reused outputs": l2t_reused,
    "kernel, fresh outputs": l2t_fresh,
    "l2t ops": l2t_ops,
    "l2t.dynamic_loss": l2t_loss,
    "l2t.dynamic_loss, in place": l2t_inplace,
    "l2t.dynamic_linear_loss": l2t_linear,
    "eager": eager,
    "torch.compile": compiled,
    "F.cross_entropy": cross_entropy,
    "Liger": liger,
    "CCE": cce,
    "exponentials alone": exponentials,
    "triad": triad.PLAIN,
    "triad, streaming stores": triad.STREAMING,
}
BOUNDS = ("triad", "triad, streaming stores")
NO_LOSS = {"triad": triad.expected, "exponentials": exponentials.expected}
