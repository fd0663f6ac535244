"""What translations are worth: BLEU and chrF by sacrebleu, perplexity, and sacrebleu's paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l2t import check
from l2t.students import evaluating
from l2t.translation.batches import IGNORE, Encoded, batches_of, by_length
from l2t.translation.networks import Translator

ROWS = 512
"""Tokens whose logits are held at a time, where nothing is differentiated."""


class Score(NamedTuple):
    """A score with sacrebleu's signature, by which others can compute the same.

    Attributes:
        value: from 0 to 100, more is better.
        signature: version and settings.
    """

    value: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str], target: str = "") -> Score:
    """BLEU of a test set, with sacrebleu's defaults for the language ``target``.

    They are one way to cut words for all languages but Chinese, Japanese and Korean (zh, ja, ko).

    Raises:
        ImportError: sacrebleu is not installed, or what it cuts words of the language by.
        ValueError: not as many translations as references, or none.

    Source: Papineni et al., "BLEU" (ACL 2002); Post, "A call for clarity in reporting BLEU scores" (WMT
    2018).

    Example:
        >>> from l2t.translation.scores import bleu
        >>> bleu(["the house is very small"], ["the house is very small"]).value
        100.0
    """
    return _score(metric_of("BLEU", target), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """chrF2 of a test set, with sacrebleu's defaults; raises as :func:`bleu` does.

    Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation" (WMT 2015).
    """
    return _score(metric_of("CHRF"), hypotheses, references)


def metric_of(name: str, target: str = "", **settings: Any) -> Any:
    """The metric of sacrebleu for translations into a language; raises ImportError as :func:`bleu` does."""
    made = getattr(_sacrebleu(), name)
    if name != "BLEU":
        return made(**settings)
    language = target.lower().replace("_", "-").split("-")[0]
    try:
        return made(trg_lang=language, **settings)
    except RuntimeError as error:
        raise check.words_of_a_language(language) from error


def _score(measure: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    check.score_sentences(len(hypotheses), len(references))
    value = measure.corpus_score(list(hypotheses), [list(references)]).score
    return Score(round(value, 10), str(measure.get_signature()))


class Paired(NamedTuple):
    """A system beside a baseline on the same test set.

    Attributes:
        value: its score.
        difference: how far it is ahead of the baseline.
        p: of the paired bootstrap, for a difference of this size where there is none; 1 without a difference,
            where sacrebleu would give its least.
        interval: half of the 95 % interval of its score.
    """

    value: float
    difference: float
    p: float
    interval: float


def paired_bootstrap(
    baseline: Sequence[str],
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    metric: str = "BLEU",
    samples: int = 1000,
    target: str = "",
) -> dict[str, Paired]:
    """Each system against a baseline, by sacrebleu's paired bootstrap over the sentences of a test set.

    Args:
        baseline: its translations.
        systems: those of the others, by name.
        references: what they should be.
        metric: ``"BLEU"`` or ``"CHRF"``.
        samples: test sets that are drawn, by sacrebleu's seed.
        target: language code, as of :func:`bleu`.

    Raises:
        ImportError: as :func:`bleu`.
        ValueError: an unknown metric, or not as many translations as references, or none.

    Source: Koehn, "Statistical significance tests for machine translation evaluation" (EMNLP 2004).
    """
    check.known("translation", "metric", metric, ("BLEU", "CHRF"))
    for said in (baseline, *systems.values()):
        check.score_sentences(len(said), len(references))
    measure = metric_of(metric, target, references=[list(references)])
    from sacrebleu.significance import PairedTest

    named: list[Any] = [("baseline", list(baseline))]
    named += [(name, list(said)) for name, said in systems.items()]
    found: Any = PairedTest(named, {metric: measure}, None, test_type="bs", n_samples=samples)()[1]
    own, *others = next(value for name, value in found.items() if name != "System")
    result = {}
    for name, one in zip(systems, others, strict=True):
        ahead = float(one.score - own.score)
        p = float(one.p_value) if ahead else 1.0
        result[name] = Paired(float(one.score), ahead, p, float(one.ci))
    return result


def perplexity(loss: float) -> float:
    """Exp of a loss in nats, infinite where that is beyond what a number holds.

    Example:
        >>> from l2t.translation.scores import perplexity
        >>> perplexity(0.0), perplexity(1000.0)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Fit(NamedTuple):
    """How well a student foretells the tokens of references, END counted.

    Attributes:
        loss: mean cross-entropy a token, in nats.
        accuracy: share of tokens that are the likeliest.
    """

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """What a loss of log V has V of: exp of the loss, or infinity."""
        return perplexity(self.loss)


@torch.no_grad()
def fit(student: Translator, encoded: Encoded) -> Fit:
    """The :class:`Fit` of a student to pairs; it is left in its mode."""
    loss, right, count = 0.0, 0, 0
    with evaluating(student):
        for batch in batches_of(by_length(encoded)):
            source, target_in, target_out = (x.to(student.head.device) for x in batch)
            hidden = student(source, target_in)
            for logits, target in stretches(hidden, student.head, student.head_bias, target_out):
                loss += float(F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum"))
                right += int((logits.argmax(1) == target).sum())
                count += int((target != IGNORE).sum())
    return Fit(loss / count, right / count)


def stretches(
    hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor, rows: int = ROWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (R, V) and targets (R,) of tokens, hidden (..., D) and target (...), so many rows at a time."""
    parts = zip(hidden.flatten(0, -2).split(rows), target.flatten().split(rows), strict=True)
    for part, wanted in parts:
        yield F.linear(part, head, head_bias), wanted


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise check.missing_package("translation", "sacrebleu", "translation") from error
    return sacrebleu.metrics
