"""The losses that a taught one is compared with, each as people use it, and what each may learn from.

Every loss is written from its paper in plain PyTorch, so that no baseline shares code with what it is
compared with. An arm is a loss and the rows it learns from; compare.py gives every arm the same course
and budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l2t.students import Loss, cross_entropy
from l2t.teacher import StudentState

Plain = Callable[[Tensor, Tensor], Tensor]
"""Losses (S,) of S students, whatever their state: of logits (S, B, C) and targets (S, B)."""


class Arm(NamedTuple):
    """One side of a comparison.

    Attributes:
        loss: of the students' batches.
        rows: what its final students learn from: ``"all"`` rows, training and dev alike, ``"dev"`` rows
            alone, or ``"both"``: half of every batch from the one, half from the other.
        oracle: whether it knows what nobody has (the true noise matrix).
        wants_dev: whether its loss looks at the dev set while a student learns.
    """

    loss: Loss
    rows: str = "all"
    oracle: bool = False
    wants_dev: bool = False


def stateless(loss: Plain) -> Loss:
    """A loss for every state and step."""

    def of_state(logits: Tensor, target: Tensor, state: StudentState, step: int) -> Tensor:
        return loss(logits, target)

    return of_state


def label_smoothing(smoothing: float) -> Plain:
    """Cross-entropy with targets (1 - e) onehot + e / C (Szegedy et al., CVPR 2016, section 7)."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1)
        own = log_p.gather(-1, target[..., None])[..., 0]
        return -((1.0 - smoothing) * own + smoothing * log_p.mean(-1)).mean(-1)

    return loss


def focal(gamma: float) -> Plain:
    """-(1 - p_y)^gamma log p_y (Lin et al., ICCV 2017, equation 4)."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        own = F.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
        return (-((-torch.expm1(own)) ** gamma) * own).mean(-1)

    return loss


def generalised_cross_entropy(q: float) -> Plain:
    """(1 - p_y^q) / q, robust to label noise (Zhang and Sabuncu, NeurIPS 2018, equation 6)."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        own = F.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
        return (-torch.expm1(q * own) / q).mean(-1)

    return loss


def forward_correction(noise: Tensor) -> Plain:
    """-log (p T)_y with the class noise T (Patrini et al., CVPR 2017, theorem 2).

    Args:
        noise: T, (C, C): T[i, j] is the probability that class i was seen as class j.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        seen = noise.to(logits).log().T[target]  # [S, B, C], log T[i, y] over i
        return -torch.logsumexp(F.log_softmax(logits, -1) + seen, -1).mean(-1)

    return loss


def class_weighted(counts: Tensor) -> Plain:
    """Cross-entropy weighted by N / (C n_y): every class counts alike.

    Args:
        counts: n_y, (C,), rows of each class in the training set.
    """
    weights = counts.sum() / (len(counts) * counts.clamp(min=1))

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        own = F.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
        return -(weights.to(own)[target] * own).mean(-1)

    return loss


def baselines(counts: Tensor, noise: Tensor | None = None, dev_is_clean: bool = False) -> dict[str, Arm]:
    """The arms that a regime calls for, by name.

    Args:
        counts: rows of each class in the training set, (C,). Where the largest class has over twice the rows
            of the smallest, class-weighted cross-entropy is among the arms.
        noise: the true noise matrix, (C, C), where labels are noisy: adds the generalised cross-entropy and,
            marked as an oracle, forward correction.
        dev_is_clean: whether there is a dev set with better labels than the training set: adds cross-entropy
            on it alone, and with half of every batch from it.

    Example:
        >>> import torch
        >>> from l2t.baselines import baselines
        >>> list(baselines(torch.tensor([50, 50])))[:2]
        ['cross-entropy', 'label smoothing 0.05']
    """
    arms = {"cross-entropy": Arm(stateless(cross_entropy))}
    for smoothing in (0.05, 0.1, 0.2):
        arms[f"label smoothing {smoothing:g}"] = Arm(stateless(label_smoothing(smoothing)))
    arms["focal loss, gamma 2"] = Arm(stateless(focal(2.0)))
    if counts.max() > 2 * counts.min():
        arms["cross-entropy, class-weighted"] = Arm(stateless(class_weighted(counts)))
    if noise is not None:
        arms["generalised cross-entropy, q 0.7"] = Arm(stateless(generalised_cross_entropy(0.7)))
    if dev_is_clean:
        arms["cross-entropy, dev only"] = Arm(stateless(cross_entropy), rows="dev")
        arms["cross-entropy, half dev"] = Arm(stateless(cross_entropy), rows="both")
    if noise is not None:
        arms["forward correction, true noise (oracle)"] = Arm(
            stateless(forward_correction(noise)), oracle=True
        )
    return arms
