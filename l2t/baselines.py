"""The losses that a taught one is compared with, each as people use it, and what each may learn from.

Every loss is written from its paper in plain PyTorch, so that no baseline shares code with what it is
compared with. An arm is a loss and the rows it learns from; compare.py gives every arm the same course
and budget.
"""

from __future__ import annotations

import math
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
        least = torch.finfo(own.dtype).tiny  # at p = 1 a power below 1 has no derivative
        return (-((-torch.expm1(own)).clamp(min=least) ** gamma) * own).mean(-1)

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


def additive_margin(margin: float) -> Plain:
    """Large-margin softmax: cross-entropy with the true logit lowered by ``margin``.

    The additive margin of Wang et al., "Additive Margin Softmax for Face Verification" (IEEE Signal
    Processing Letters 2018) on logits as they are; there features and head are normalised, so that logits
    are cosines. The angular margin of Liu et al. (ICML 2016) needs the features, which a loss of logits does
    not see.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        own = logits.gather(-1, target[..., None])
        lowered = logits.scatter(-1, target[..., None], own - margin)
        return (lowered.logsumexp(-1) - own[..., 0] + margin).mean(-1)

    return loss


def smooth_error(slope: float) -> Plain:
    """The smooth 0/1 loss sigmoid(-k m), k the slope (Nguyen and Sanner, ICML 2013, section 4), times 4 / k.

    m is the margin z_y - max z_j over the other classes j, with two classes the one of the paper. The factor
    makes it as steep as cross-entropy can be, so that the same learning rates are tried. The measure of this
    name in l2t.teach (docs/math.md, section 7) is another one, of probabilities: it has no gradient on rows
    that are right.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        own = logits.gather(-1, target[..., None])[..., 0]
        others = logits.scatter(-1, target[..., None], -math.inf).amax(-1)
        return 4.0 / slope * torch.sigmoid(slope * (others - own)).mean(-1)

    return loss


def class_weighted(weights: Tensor) -> Plain:
    """Cross-entropy of each row times the weight of its class.

    Args:
        weights: (C,).
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        own = F.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
        return -(weights.to(own)[target] * own).mean(-1)

    return loss


def inverse_frequency(counts: Tensor) -> Tensor:
    """Weights N / (C n_y), (C,), of rows per class n_y: every class counts alike, a row 1 on the average.

    C is of classes that occur; the weight of one that does not is that of the rarest.
    """
    occurs = counts > 0
    return counts.sum() / (occurs.sum() * counts.clamp(min=counts[occurs].min()))


def effective_number(counts: Tensor, beta: float) -> Tensor:
    """Weights (1 - beta) / (1 - beta^n_y), (C,), a class 1 on the average (Cui et al., CVPR 2019).

    beta 0 weighs all rows alike, beta to 1 by inverse frequency. The average is over classes that occur; the
    weight of one that does not is that of the rarest.
    """
    occurs = counts > 0
    weights = 1.0 / (1.0 - beta ** counts.clamp(min=counts[occurs].min()).double())
    return weights / weights[occurs].mean()


def baselines(counts: Tensor, noise: Tensor | None = None, dev_is_clean: bool = False) -> dict[str, Arm]:
    """The arms that a regime calls for, by name.

    Args:
        counts: rows of each class in the training set, (C,). Where the largest class has over twice the rows
            of the smallest that occurs, cross-entropy with weights by class is among the arms.
        noise: the true noise matrix, (C, C), where labels are noisy: adds forward correction, marked as an
            oracle.
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
    arms["additive-margin softmax, margin 2"] = Arm(stateless(additive_margin(2.0)))
    arms["smooth 0/1 loss, slope 1"] = Arm(stateless(smooth_error(1.0)))
    arms["generalised cross-entropy, q 0.7"] = Arm(stateless(generalised_cross_entropy(0.7)))
    if counts.max() > 2 * counts[counts > 0].min():
        inverse, effective = inverse_frequency(counts), effective_number(counts, 0.999)
        arms["cross-entropy, class-weighted"] = Arm(stateless(class_weighted(inverse)))
        arms["cross-entropy, class-balanced, beta 0.999"] = Arm(stateless(class_weighted(effective)))
    if dev_is_clean:
        arms["cross-entropy, dev only"] = Arm(stateless(cross_entropy), rows="dev")
        arms["cross-entropy, half dev"] = Arm(stateless(cross_entropy), rows="both")
    if noise is not None:
        arms["forward correction, true noise (oracle)"] = Arm(
            stateless(forward_correction(noise)), oracle=True
        )
    return arms
