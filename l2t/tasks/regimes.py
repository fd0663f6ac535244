"""What can be wrong with training data: few samples, noisy labels, a long tail, and how a regime is drawn
from a pool.

Every draw takes a ``torch.Generator`` and repeats to the bit. Labels of the dev and the test set are never
changed: noise is put on the training labels alone, after the clean dev samples have been set aside. Where the
data come from and how they are scaled is not here (see ``task.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l2t import check


def symmetric(num_classes: int, rate: float) -> Tensor:
    """Noise matrix of symmetric label noise: with probability `rate` a label becomes any *other* class.

    Returns:
        T of shape (C, C) and dtype float64, ``T[i, j]`` the probability that class i is seen as class j.

    Example:
        >>> symmetric(3, 0.5).tolist()
        [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    """
    check.noise(num_classes, rate)
    matrix = torch.full((num_classes, num_classes), rate / (num_classes - 1), dtype=torch.float64)
    return matrix.fill_diagonal_(1 - rate)


def pair_flip(num_classes: int, rate: float) -> Tensor:
    """Noise matrix of pair flips (Han et al. 2018, Co-teaching, section 4): class i becomes i + 1 with
    probability `rate`.

    The last class becomes the first. Shape, dtype and meaning as in `symmetric`.

    Example:
        >>> pair_flip(3, 0.25).tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.75, 0.25], [0.25, 0.0, 0.75]]
    """
    check.noise(num_classes, rate)
    identity = torch.eye(num_classes, dtype=torch.float64)
    return (1 - rate) * identity + rate * identity.roll(1, dims=1)


def flip(target: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a noisy label for each target (N,) int64 from its row of the noise matrix (C, C)."""
    drawn = torch.rand(target.shape, generator=generator, dtype=torch.float64)  # [N]
    upper = noise.cumsum(1)[target]  # [N, C]
    return (drawn[:, None] >= upper).sum(1).clamp_(max=noise.shape[0] - 1)


def stratified(target: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits the rows of target (N,) at random into `count` rows and the rest, both with the pool's class
    shares.

    Returns:
        Two sorted int64 index tensors, of `count` and N - `count` entries, that share no row.
    """
    check.sample_count(count, len(target))
    sizes = torch.bincount(target)
    wanted = sizes * count // len(target)
    remainder = sizes * count - wanted * len(target)
    wanted[remainder.argsort(descending=True, stable=True)[: count - int(wanted.sum())]] += 1
    return _take(target, wanted, generator)


def balanced(target: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits the rows of target (N,) at random into `count` rows, of every class as many, and the rest.

    Returns:
        Two sorted int64 index tensors that share no row; the first has ``count // C`` rows a class.
    """
    sizes = torch.bincount(target)
    each = count // len(sizes)
    check.balanced_count(count, each, int(sizes.min()))
    return _take(target, torch.full_like(sizes, each), generator)


def long_tail(target: Tensor, imbalance: float, generator: torch.Generator) -> Tensor:
    """Thins the classes exponentially (Cui et al. 2019): class 0 keeps all rows, the last one 1/`imbalance`
    of that.

    Class c of C keeps ``round(n0 * imbalance ** (-c / (C - 1)))`` rows, n0 the count of class 0, but never
    more than it has and at least one.

    Returns:
        The sorted int64 indices of the rows that stay.
    """
    check.imbalance(imbalance)
    sizes = torch.bincount(target)
    share = torch.arange(len(sizes), dtype=torch.float64) / max(1, len(sizes) - 1)
    wanted = (sizes[0] * imbalance**-share).round().to(torch.int64).clamp(min=1)
    return _take(target, torch.minimum(wanted, sizes), generator)[0]


def _take(target: Tensor, wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Takes wanted[c] random rows of each class c; returns the sorted indices of the taken and of the other
    rows.
    """
    taken = torch.zeros(len(target), dtype=torch.bool)
    for label, count in enumerate(wanted.tolist()):
        rows = (target == label).nonzero()[:, 0]
        taken[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


class Draw(NamedTuple):
    """A regime's draw from a pool: row indices into the pool, and the training labels as the student sees
    them.
    """

    train: Tensor  # [N] int64
    train_target: Tensor  # [N] int64, noisy where the regime is
    dev: Tensor | None  # [M] int64, clean; None where every episode splits its own off the training set
    noise: Tensor | None  # [C, C] float64


@dataclass(frozen=True)
class Regime:
    """How the training data of a task are made from its pool. The fields are applied in this order.

    Attributes:
        title: one line for people.
        dev: number of clean dev samples set aside, with the pool's class shares, or as many of every class
            where `imbalance` is not 1; 0 leaves the split to the teaching episodes.
        samples: number of training samples kept, with the pool's class shares; None keeps all.
        imbalance: ratio of the first class's count to the last one's.
        noise: maps the number of classes to the noise matrix of the training labels.
    """

    title: str
    dev: int = 0
    samples: int | None = None
    imbalance: float = 1.0
    noise: Callable[[int], Tensor] | None = None

    @property
    def spoils(self) -> bool:
        """Whether training samples are worse than dev samples: noisy, or with a long tail."""
        return self.noise is not None or self.imbalance != 1.0

    def draw(self, target: Tensor, num_classes: int, generator: torch.Generator) -> Draw:
        """Draws the regime from a pool with clean labels target (N,) int64."""
        train, dev = torch.arange(len(target)), None
        if self.dev:
            split = stratified if self.imbalance == 1.0 else balanced
            dev, train = split(target, self.dev, generator)
        if self.samples is not None:
            train = train[stratified(target[train], self.samples, generator)[0]]
        if self.imbalance != 1.0:
            train = train[long_tail(target[train], self.imbalance, generator)]
        train_target, noise = target[train], None
        if self.noise is not None:
            noise = self.noise(num_classes)
            train_target = flip(train_target, noise, generator)
        return Draw(train, train_target, dev, noise)


def standard(
    pool: int,
    num_classes: int,
    *,
    few: int,
    dev: int,
    imbalance: float,
    small: int | None = None,
) -> dict[str, Regime]:
    """The regimes that every task has, by name; tasks differ in their counts only.

    Args:
        pool: samples to draw from.
        num_classes: number of classes C.
        few: samples of `few`.
        dev: samples of the clean dev set under noise and of the balanced one beside a long tail.
        imbalance: the first class's count over the last one's in `long-tail`.
        small: samples of a regime of that name, and those that noise and the long tail are put on, for pools
            so large that a run on all of them takes hours; None is none and all.

    Example:
        >>> for name, regime in standard(1200, 10, few=150, dev=200, imbalance=20.0).items():
        ...     print(f"{name}: {regime.title}")
        clean: 1,200 training samples with their own labels
        few: 150 training samples
        symmetric: 1,000 training samples, 40% of the labels replaced by another class; 200 clean dev samples
        pair-flip: 1,000 training samples, 40% of the labels moved to the next class; 200 clean dev samples
        long-tail: class counts fall from about 100 to 5 exponentially; 200 dev samples balanced by class
    """
    noisy = pool - dev if small is None else small
    first = noisy / num_classes

    def under(what: str, matrix: Callable[[int, float], Tensor]) -> Regime:
        title = f"{noisy:,} training samples, 40% of the labels {what}; {dev:,} clean dev samples"
        return Regime(title, dev=dev, samples=small, noise=lambda classes: matrix(classes, 0.4))

    return {
        "clean": Regime(f"{pool:,} training samples with their own labels"),
        "few": Regime(f"{few:,} training samples", samples=few),
        **({} if small is None else {"small": Regime(f"{small:,} training samples", samples=small)}),
        "symmetric": under("replaced by another class", symmetric),
        "pair-flip": under("moved to the next class", pair_flip),
        "long-tail": Regime(
            f"class counts fall from about {first:.0f} to {first / imbalance:.0f} exponentially; "
            f"{dev:,} dev samples balanced by class",
            dev=dev,
            samples=small,
            imbalance=imbalance,
        ),
    }
