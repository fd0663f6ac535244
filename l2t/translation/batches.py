"""Batches of sentence pairs as padded ids: of like length, by a budget of tokens, the same for a seed.

Pairs of an epoch are shuffled, sorted by length and cut so that no batch has more padded tokens than its
budget, neither of the source nor of the target; the batches then come in a shuffled order. The k-th batch of
a course follows from the seed and k alone, so a course that was broken off goes on with the batch that it
would have come to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2t import check
from l2t.students import seed_of

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
"""Ids that every vocabulary has."""

IGNORE = -100
"""What a loss does not count, as PyTorch's losses have it."""

Ids = list[list[int]]


class Batch(NamedTuple):
    """Sentence pairs side by side, int64.

    Attributes:
        source: (B, S), each sentence ends with END, then padded with PAD.
        target_in: (B, T), what stands before each token: BEGIN first, padded with PAD.
        target_out: (B, T), the tokens themselves, END last, padded with IGNORE.

    Example:
        >>> from l2t.translation.batches import Encoded, batches_of
        >>> batch = next(batches_of(Encoded(source=[[5, 6], [7]], target=[[8], [9, 10]]), tokens=100))
        >>> batch.source.tolist(), batch.target_in.tolist(), batch.target_out.tolist()
        ([[5, 6, 3], [7, 3, 0]], [[2, 8, 0], [2, 9, 10]], [[8, 3, -100], [9, 10, 3]])
    """

    source: Tensor
    target_in: Tensor
    target_out: Tensor


class Encoded(NamedTuple):
    """The pairs of a split as ids of pieces, without BEGIN and END.

    Attributes:
        source: a list of ids a sentence.
        target: its translation.
    """

    source: Ids
    target: Ids


def padded(sentences: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    """Sentences as one int64 tensor (B, length of the longest)."""
    size = max(map(len, sentences))
    return torch.tensor([[*ids, *[value] * (size - len(ids))] for ids in sentences])


def batch_of(encoded: Encoded, rows: Sequence[int]) -> Batch:
    """The pairs at ``rows`` as one batch."""
    source = [encoded.source[row] for row in rows]
    target = [encoded.target[row] for row in rows]
    return Batch(
        padded([[*ids, END] for ids in source]),
        padded([[BEGIN, *ids] for ids in target]),
        padded([[*ids, END] for ids in target], IGNORE),
    )


def _cut(encoded: Encoded, order: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows of batches, in this order, each of at most so many padded tokens a side, or of one pair."""
    rows: list[int] = []
    longest = 0
    for row in order:
        length = max(len(encoded.source[row]), len(encoded.target[row])) + 1
        longest = max(longest, length)
        if rows and longest * (len(rows) + 1) > tokens:
            yield rows
            rows, longest = [], length
        rows.append(row)
    if rows:
        yield rows


def batches_of(encoded: Encoded, tokens: int = 4000) -> Iterator[Batch]:
    """Every pair once, in order, in batches of at most ``tokens`` padded tokens a side: to evaluate on.

    Raises:
        ValueError: ``tokens`` is below 1, or there are no pairs.
    """
    check.translation_batches(len(encoded.source), len(encoded.target), tokens)
    return (batch_of(encoded, rows) for rows in _cut(encoded, range(len(encoded.source)), tokens))


def by_length(encoded: Encoded) -> Encoded:
    """The pairs with the shortest targets first, so that batches of them have little padding.

    Example:
        >>> from l2t.translation.batches import Encoded, by_length
        >>> by_length(Encoded(source=[[5], [6, 7], [8]], target=[[9, 9], [9], [9]]))
        Encoded(source=[[8], [6, 7], [5]], target=[[9], [9], [9, 9]])
    """
    source, target = encoded
    order = sorted(range(len(source)), key=lambda row: (len(target[row]), len(source[row])))
    return Encoded([source[row] for row in order], [target[row] for row in order])


class Batches:
    """The batches of a course without end: ``batches[k]`` is the k-th, and iterating begins at 0.

    Args:
        encoded: the pairs.
        tokens: budget of padded tokens a batch, of the source as of the target; a pair that is longer makes a
            batch of its own.
        seed: of the order of pairs and batches.

    Raises:
        ValueError: ``tokens`` is below 1, there are no pairs, or not as many targets as sources.

    Example:
        >>> from l2t.translation.batches import Batches, Encoded
        >>> encoded = Encoded(source=[[5]] * 10, target=[[6, 7]] * 10)
        >>> batches = Batches(encoded, tokens=9, seed=0)
        >>> [len(batches[k].source) for k in range(4)], batches.epoch(3), batches.epoch(4)
        ([1, 3, 3, 3], 0, 1)
    """

    def __init__(self, encoded: Encoded, tokens: int = 1000, seed: int = 0) -> None:
        check.translation_batches(len(encoded.source), len(encoded.target), tokens)
        self.encoded, self.tokens, self.seed = encoded, tokens, seed
        self._ends: list[int] = []  # of the epochs seen so far: number of the batch after their last one
        self._rows: tuple[int, list[list[int]]] = (-1, [])  # an epoch and its batches

    def epoch(self, index: int) -> int:
        """The epoch that the batch belongs to."""
        while not self._ends or self._ends[-1] <= index:
            cut = self._epoch(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(cut))
        return next(epoch for epoch, end in enumerate(self._ends) if index < end)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Rows of the batches of an epoch."""
        if self._rows[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            source, target = self.encoded
            order = torch.randperm(len(source), generator=generator).tolist()
            order.sort(key=lambda row: (len(target[row]), len(source[row])))
            cut = list(_cut(self.encoded, order, self.tokens))
            shuffle = torch.randperm(len(cut), generator=generator).tolist()
            self._rows = epoch, [cut[place] for place in shuffle]
        return self._rows[1]

    def __getitem__(self, index: int) -> Batch:
        """The batch ``index``, 0 and up."""
        epoch = self.epoch(index)
        before = self._ends[epoch - 1] if epoch else 0
        return batch_of(self.encoded, self._epoch(epoch)[index - before])

    def __iter__(self) -> Iterator[Batch]:
        """All batches from the first on, without end."""
        index = 0
        while True:
            yield self[index]
            index += 1
