"""Expected BLEU of a translator's sampled translations, and its gradient (docs/math.md, section 9).

    B = E_y~p [BLEU(y, r)],  grad B = E[(BLEU(y_s, r) - mean of the other samples' BLEU) grad log p(y_s)]

Not here: translations that are searched for and scored as text (decode.py, scores.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2t.linear import dynamic_linear_loss
from l2t.translation.batches import BEGIN, END, IGNORE

ORDER = 4  # of the longest n-grams


def sentence_bleu(hypothesis: Sequence[int], reference: Sequence[int]) -> float:
    """BLEU in [0, 1] of one sentence of ids, with one added to matches and totals of two-grams and longer.

    0 without a match of single ids.

    Source: Lin and Och, "ORANGE: a method for evaluating automatic evaluation metrics for machine
    translation" (COLING 2004).

    Example:
        >>> sentence_bleu([5, 6, 7, 8], [5, 6, 7, 8]), sentence_bleu([9], [5, 6])
        (1.0, 0.0)
        >>> round(sentence_bleu([5, 6], [5, 6, 7, 8]), 4)  # every n-gram is right, but half are missing
        0.3679
    """
    logs = 0.0
    for n in range(1, ORDER + 1):
        ours, theirs = _ngrams(hypothesis, n), _ngrams(reference, n)
        matches, total = sum((ours & theirs).values()), sum(ours.values())
        if n == 1 and not matches:
            return 0.0
        logs += math.log(matches / total if n == 1 else (matches + 1) / (total + 1)) / ORDER
    brevity = min(0.0, 1.0 - len(reference) / len(hypothesis))
    return math.exp(logs + brevity)


def _ngrams(ids: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))


@torch.no_grad()
def sampled(
    student: Any, source: Tensor, samples: int, longest: int, sharpness: float | Tensor = 1.0
) -> Tensor:
    """Translations drawn from the student, (B samples, L <= longest), END last, padded with -100.

    Those of a sentence of ``source`` (B, S) stand one below the other; one that does not end in time has no
    END, and one of a student that has diverged ends where its probabilities are none. Logits are multiplied
    by ``sharpness``; draws come from PyTorch's default generator.
    """
    state = student.encode(source.repeat_interleave(samples, 0))
    token = source.new_full((len(source) * samples,), BEGIN)
    ended = torch.zeros_like(token, dtype=torch.bool)
    columns: list[Tensor] = []
    while len(columns) < longest and not bool(ended.all()):
        logits, state = student.step(state, token)
        p = (sharpness * logits).softmax(-1)
        lost = ~p.isfinite().all(-1)
        token = torch.multinomial(p.masked_fill(lost[:, None], 1.0), 1)[:, 0].masked_fill(lost, END)
        columns.append(token.masked_fill(ended, IGNORE))
        ended = ended | (token == END)
    return torch.stack(columns, 1)


def token_losses(
    student: Any, source: Tensor, target_in: Tensor, target_out: Tensor, sharpness: float | Tensor = 1.0
) -> Tensor:
    """-log p of each token under the student, its logits times ``sharpness``, (B, T), 0 for padding."""
    hidden, bias = sharpness * student(source, target_in), student.head_bias
    bias = None if bias is None else sharpness * bias
    return dynamic_linear_loss(
        hidden, student.head, target_out, head_bias=bias, link="identity", reduction="none"
    )


def log_probabilities(
    student: Any, source: Tensor, translations: Tensor, sharpness: float | Tensor = 1.0
) -> Tensor:
    """The log-probability of translations (B, L), END last and padded with -100, of source (B, S): (B,)."""
    before = translations[:, :-1].clamp(min=0)
    target_in = torch.cat([torch.full_like(translations[:, :1], BEGIN), before], 1)
    return -token_losses(student, source, target_in, translations, sharpness).sum(1)


def score_function(rewards: Tensor, log_p: Tensor) -> Tensor:
    """The mean reward of the samples of each sentence, (B,): rewards and log p of samples, (B, samples).

    Its gradient is the unbiased one of the expected reward, by the samples' log p with the mean of the other
    samples as baseline; it takes two samples.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning" (Machine Learning 1992); Kool, van Hoof and Welling, "Buy 4 REINFORCE samples, get a baseline
    for free!" (ICLR workshop 2019).

    Example:
        >>> import torch
        >>> log_p = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> value = score_function(torch.tensor([[1.0, 0.0]]), log_p)
        >>> value, torch.autograd.grad(value.sum(), log_p)[0]
        (tensor([0.5000], grad_fn=<AddBackward0>), tensor([[ 0.5000, -0.5000]]))
    """
    count = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)
    moving = ((rewards - others) * log_p).mean(1)
    return rewards.mean(1) + (moving - moving.detach())


def expected_bleu(
    student: nn.Module,
    source: Tensor,
    target_out: Tensor,
    samples: int,
    longest: int,
    sharpness: float | Tensor = 1.0,
) -> Tensor:
    """Expected sentence BLEU of the student's translations, (B,), from ``samples`` of each sentence.

    Args:
        student: in the mode that it is to be sampled and differentiated in: evaluation, without dropout.
        source: (B, S).
        target_out: references, (B, T), END last, padded with -100.
        samples: of each sentence, 2 or more.
        longest: tokens of a translation at most.
        sharpness: what logits are multiplied by; the gradient takes account of it where it has one.
    """
    drawn = sampled(student, source, samples, longest, sharpness)
    references = [words(row) for row in target_out.tolist()]
    rewards = [sentence_bleu(words(row), references[i // samples]) for i, row in enumerate(drawn.tolist())]
    log_p = log_probabilities(student, source.repeat_interleave(samples, 0), drawn, sharpness)
    return score_function(log_p.new_tensor(rewards).reshape(-1, samples), log_p.reshape(-1, samples))


def words(row: Sequence[int]) -> list[int]:
    """What a row of ids says: without END and padding."""
    return [token for token in row if token not in (END, IGNORE)]
