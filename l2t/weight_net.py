"""Meta-Weight-Net: a network that weighs a student's rows by their cross-entropy, taught like any teacher.

A baseline of the taught losses: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample
Weighting" (NeurIPS 2019). The network is theirs; how it learns is l2t.teach's: by the exact gradient through
the whole run of fresh students, where the paper looks one step ahead of the one that it trains.

A student steps along sum_i v_i grad ce_i with v_i = V(ce_i) / sum_j V(ce_j): it takes the weights as given.
That is the gradient of no loss, and its derivative, which has grad v_i in it, is not symmetric; the walk back
needs the transpose, which reverse over reverse gives and a derivative along a direction does not.

Not here: the teacher of dynamic losses (teacher.py), episodes and steps (teach.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2t import check
from l2t.functional import without_autocast
from l2t.teacher import AnyTeacher, StudentState

ARM = "Meta-Weight-Net"  # what comparisons call it: a baseline, where other taught arms are none
TRANSPOSING = ("reverse", "recompute")  # curvatures that give the transpose of a step's derivative


class WeightNet(AnyTeacher):
    """Weights of rows from their cross-entropy: one hidden layer of ReLUs, and a sigmoid.

    It sees a row's loss and nothing of the student's state; l2t.teach teaches it as it teaches a
    :class:`l2t.Teacher`. It starts as PyTorch starts linear layers, with weights that hardly differ.

    Args:
        num_classes: number of classes C of the students, at least 2.
        hidden: width of the hidden layer; the paper has 100.
        seed: of the start values.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes that make no sense.

    Example:
        >>> import torch, l2t
        >>> net = l2t.WeightNet(10)
        >>> logits, target = torch.randn(32, 10), torch.randint(10, (32,))
        >>> rows = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        >>> weights = net(rows)
        >>> weights.shape
        torch.Size([32])
        >>> loss = (weights.detach() * rows).sum() / weights.detach().sum()
    """

    def __init__(
        self, num_classes: int, *, hidden: int = 100, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check.teacher_size("num_classes", num_classes, 2, "WeightNet")
        check.teacher_size("hidden", hidden, 1, "WeightNet")
        self.num_classes = num_classes
        self.features = ()
        self.hidden = hidden
        generator = torch.Generator().manual_seed(seed)

        def uniform(size: int, bound: float) -> nn.Parameter:
            drawn = torch.rand(size, generator=generator, dtype=torch.float64)
            return nn.Parameter((bound * (2.0 * drawn - 1.0)).to(dtype))

        self.weight_in, self.bias_in = uniform(hidden, 1.0), uniform(hidden, 1.0)
        self.weight_out, self.bias_out = uniform(hidden, hidden**-0.5), uniform(1, hidden**-0.5)

    def forward(self, losses: Tensor) -> Tensor:
        """Weights in (0, 1) of rows with these losses (...), in nats: (...)."""
        return _weights(losses, *self.parameters())

    def neutral(self) -> WeightNet:
        """A copy that weighs all rows alike: cross-entropy."""
        net = copy.deepcopy(self)
        with torch.no_grad():
            net.weight_out.zero_()
        return net

    def config(self) -> dict[str, Any]:
        """What it takes to make this network again, but for its numbers: a JSON-able dict."""
        return {"class": type(self).__name__, "num_classes": self.num_classes, "hidden": self.hidden}


def _weights(
    losses: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> Tensor:
    """Weights of rows (..., B); the network's parameters may have the same leading dimensions."""
    hidden = F.relu(losses[..., None] * weight_in[..., None, :] + bias_in[..., None, :])  # [..., B, H]
    with without_autocast(hidden):
        return torch.sigmoid((hidden @ weight_out[..., None])[..., 0] + bias_out)


class WeighedLoss:
    """The mean cross-entropy of S students' rows, each weighed by a :class:`WeightNet`.

    Args:
        net: the network.
        record: weigh each student's rows by a copy of its own, whose gradients :meth:`gradient` gives.
    """

    def __init__(self, net: WeightNet, record: bool = False) -> None:
        self.teacher = net
        self.record = record
        self._own: list[Tensor] = []  # the copies, parameter by parameter

    def __call__(self, logits: Tensor, target: Tensor, state: StudentState, step: int) -> Tensor:
        """Mean loss of each student, (S,): logits (S, B, C), target (S, B)."""
        if self.record and not self._own:
            copies = (value.detach().expand(len(logits), -1).clone() for value in self.teacher.parameters())
            self._own = [copy.requires_grad_() for copy in copies]
        losses: Tensor = _Weighed.apply(logits, target, *(self._own or self.teacher.parameters()))
        return losses

    def gradient(self) -> Tensor:
        """What the reverse pass left, as a gradient to the network's parameters, (S, P): a row a student."""
        return torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in self._own], 1)


class _Weighed(torch.autograd.Function):
    """Weighed mean cross-entropy, (S, B, C), (S, B) -> (S,), in whose gradient the weights are given.

    The gradient is a function of the logits and of the network, and is differentiated as that.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *net: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target, *net)
        losses = _cross_entropies(logits, target)
        return (_shares(losses, *net) * losses).sum(-1)

    @staticmethod
    def backward(ctx: Any, v_losses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, *net = ctx.saved_tensors
        shares = _shares(_cross_entropies(logits, target), *net)  # [S, B]
        d_logits = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
        return (v_losses[:, None] * shares)[..., None] * d_logits, None, *(None for _ in net)


def _cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    return -F.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]


def _shares(losses: Tensor, *net: Tensor) -> Tensor:
    weights = _weights(losses, *net)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
