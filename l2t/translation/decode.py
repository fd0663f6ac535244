"""The search for a translation: greedy and beam, many sentences at a time.

A translation of a source of n tokens has at most 2 n + 10, or ``longest``, END among them; what has not ended
by then ends there. PAD, UNKNOWN and BEGIN are never chosen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from l2t import check
from l2t.students import evaluating
from l2t.translation.batches import BEGIN, END, PAD, UNKNOWN, Ids, padded
from l2t.translation.networks import Translator

L = TypeVar("L", int, Tensor)


@torch.no_grad()
def greedy(student: Translator, source: Tensor, longest: int | None = None) -> Ids:
    """The likeliest token after what stands there, until END.

    Args:
        student: in ``eval`` mode.
        source: (B, S) int64, padded with 0, each sentence with END.
        longest: tokens of a translation at most, END among them; None goes by the length of its source.

    Returns:
        the ids of each translation, without BEGIN and END.

    Example:
        >>> import torch
        >>> from l2t.translation.networks import LSTMTranslator
        >>> found = greedy(LSTMTranslator(9, 4).eval(), torch.tensor([[5, 6, 3], [7, 3, 0]]), longest=4)
        >>> len(found), max(map(len, found)) <= 3
        (2, True)
    """
    check.search_sizes(1, longest, 1.0)
    state = student.encode(source)
    token = torch.full((len(source),), BEGIN, device=source.device)
    ended, found = torch.zeros_like(token, dtype=torch.bool), []
    limits = _limits(source, longest)
    for length in range(1, int(limits.max())):
        logits, state = student.step(state, token)
        token = _allowed(logits).argmax(1).masked_fill(ended | (limits <= length), END)
        ended = ended | (token == END)
        found.append(token)
        if ended.all():
            break
    rows: Ids = torch.stack(found, 1).tolist() if found else [[]] * len(source)
    return [row[: row.index(END)] if END in row else row for row in rows]


@torch.no_grad()
def beam(
    student: Translator, source: Tensor, width: int = 4, longest: int | None = None, penalty: float = 1.0
) -> Ids:
    """The best translation among those that a beam of ``width`` comes by.

    The best is that of the largest ``log p(translation) / tokens ** penalty``, END counted. The search for a
    sentence is over when ``width`` translations have ended.

    Args:
        student: in ``eval`` mode.
        source: (B, S) int64, padded with 0, each sentence with END.
        width: translations that go on at each step.
        longest: tokens of a translation at most, END among them; None goes by the length of its source.
        penalty: power of the length; 0 takes the likeliest, which favours short ones.

    Returns:
        the ids of each translation, without BEGIN and END.

    Raises:
        ValueError: a size is below 1, or the penalty below 0.

    Source: Graves, "Sequence transduction with recurrent neural networks" (2012); the normalisation as in
    Wu et al., "Google's neural machine translation system" (2016), section 7, by a plain power.
    """
    check.search_sizes(width, longest, penalty)
    count, vocab = len(source), len(student.head)
    state = tuple(x.repeat_interleave(width, 0) for x in student.encode(source))
    token = source.new_full((count * width,), BEGIN)
    score = student.head.new_full((count, width), -math.inf)
    score[:, 0] = 0.0
    tokens = source.new_empty(count, width, 0)
    best = [-math.inf] * count
    found: Ids = [[] for _ in range(count)]
    open_places = [width] * count
    first = torch.arange(count, device=source.device)[:, None] * width
    limits = _limits(source, longest)
    for length in range(1, int(limits.max()) + 1):
        logits, state = student.step(state, token)
        after = torch.log_softmax(_allowed(logits), 1).view(count, width, vocab)
        last = (limits <= length)[:, None, None] & (torch.arange(vocab, device=source.device) != END)
        after = after.masked_fill(last, -math.inf)
        total = (score[:, :, None] + after).flatten(1)
        values, places = total.topk(min(2 * width, total.shape[1]), 1)
        beams, chosen = places // vocab, places % vocab
        ends = chosen == END
        ended = ends[:, :width].nonzero().tolist()
        for row, rank in ended:
            value = float(values[row, rank]) / length**penalty
            if open_places[row] > 0 and value > -math.inf:
                open_places[row] -= 1
                if value > best[row]:
                    best[row], found[row] = value, tokens[row, beams[row, rank]].tolist()
        if not any(places > 0 for places in open_places):
            break
        going = values.masked_fill(ends, -math.inf)
        score, ranks = going.topk(width, 1)
        beams, chosen = beams.gather(1, ranks), chosen.gather(1, ranks)
        rows = (first + beams).flatten()
        state = tuple(x.index_select(0, rows) for x in state)
        kept = tokens.gather(1, beams[:, :, None].expand(-1, -1, length - 1))
        tokens, token = torch.cat([kept, chosen[:, :, None]], 2), chosen.flatten()
    return found


def _limits(source: Tensor, longest: int | None) -> Tensor:
    """How many tokens each translation may have, (B,)."""
    lengths = (source != PAD).sum(1) - 1
    return limit_of(lengths) if longest is None else torch.full_like(lengths, longest)


def limit_of(length: L) -> L:
    """How many tokens, END among them, the translation of so many may have."""
    return 2 * length + 10


def _allowed(logits: Tensor) -> Tensor:
    """Logits of what may be chosen, minus infinity elsewhere."""
    return logits.index_fill(1, logits.new_tensor([PAD, UNKNOWN, BEGIN], dtype=torch.int64), -math.inf)


def translate_ids(
    student: Translator, source: Sequence[Sequence[int]], width: int = 1, rows: int = 100
) -> Ids:
    """Translations of sentences as ids, ``rows`` of like length at a time; the student is left in its mode.

    A warning says how many have as many tokens as they may.

    Args:
        student: what translates.
        source: ids of each sentence, without END.
        width: of the beam; 1 is greedy.
        rows: sentences at a time.
    """
    check.search_sizes(width, rows, 1.0)
    order = sorted(range(len(source)), key=lambda row: len(source[row]))
    found: Ids = [[] for _ in source]
    with evaluating(student):
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            batch = padded([[*source[row], END] for row in chosen]).to(student.head.device)
            said = greedy(student, batch) if width == 1 else beam(student, batch, width)
            for row, ids in zip(chosen, said, strict=True):
                found[row] = ids
    full = sum(len(said) + 1 >= limit_of(len(ids)) for said, ids in zip(found, source, strict=True))
    if full:
        warnings.warn(check.translations_cut(full, len(found)), stacklevel=2)
    return found
