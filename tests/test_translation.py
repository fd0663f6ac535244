"""Students that translate: batches, networks and their derivatives, search, scores, a course."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toy_translator import WORDS, toy_corpus

import l2t
from l2t import check
from l2t.cli import main
from l2t.files import read_tensors
from l2t.graph import nodes_of
from l2t.translation import course, networks, scores
from l2t.translation.batches import BEGIN, END, Batch, Batches, Encoded, batch_of, batches_of, by_length
from l2t.translation.corpus import Corpus, write_folder
from l2t.translation.course import Course
from l2t.translation.decode import beam, greedy, translate_ids
from l2t.translation.networks import LSTMTranslator, TransformerTranslator, Translator
from l2t.translation.vocabulary import Vocabulary

Make = Callable[..., Translator]
STUDENTS: dict[str, Make] = {
    "lstm": lambda vocab, dropout=0.1: LSTMTranslator(vocab, 8, dropout=dropout),
    "lstm-2": lambda vocab, dropout=0.1: LSTMTranslator(vocab, 8, layers=2, dropout=dropout),
    "transformer": lambda vocab, dropout=0.1: TransformerTranslator(vocab, 8, heads=2, dropout=dropout),
}
each_student = pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)


def toy(pairs: int, vocab: int = 12, longest: int = 6, seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(4, vocab, (length,), generator=generator).tolist()

    return Encoded([sentence() for _ in range(pairs)], [sentence() for _ in range(pairs)])


# ---- batches


def test_a_batch_has_begin_before_and_end_after_and_padding_that_losses_ignore() -> None:
    batch = batch_of(Encoded([[5], [6, 7]], [[8, 9], [10]]), [1, 0])
    assert batch.source.tolist() == [[6, 7, 3], [5, 3, 0]]
    assert batch.target_in.tolist() == [[2, 10, 0], [2, 8, 9]]
    assert batch.target_out.tolist() == [[10, 3, -100], [8, 9, 3]]


def pairs_of(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(x for x in s if x > 3), tuple(y for y in t if y > 3))
        for s, t in zip(batch.source.tolist(), batch.target_out.tolist(), strict=True)
    ]


def test_an_epoch_has_every_pair_once_in_batches_of_the_budget_and_of_like_length() -> None:
    encoded = toy(200)
    batches = Batches(encoded, tokens=40, seed=1)
    first = [k for k in range(100) if batches.epoch(k) == 0]
    found = [pair for k in first for pair in pairs_of(batches[k])]
    wanted = [(tuple(s), tuple(t)) for s, t in zip(*encoded, strict=True)]
    assert sorted(found) == sorted(wanted)
    assert found != wanted
    assert all(part.numel() <= 40 for k in first for part in batches[k])
    assert any(batches[k].source.shape[1] > batches[k].target_out.shape[1] for k in first)
    padding = sum(int((batches[k].target_out == -100).sum()) for k in first)
    assert padding < 0.05 * sum(batches[k].target_out.numel() for k in first)
    lengths = [batches[k].target_out.shape[1] for k in first]
    assert lengths != sorted(lengths)
    again = [pair for k in range(len(first), 2 * len(first)) for pair in pairs_of(batches[k])]
    assert again != found


def test_the_batches_of_a_seed_are_the_same_from_wherever_one_begins() -> None:
    encoded = toy(60)
    batches = Batches(encoded, tokens=30, seed=5)
    run = [batch for batch, _ in zip(batches, range(40), strict=False)]
    for k in (39, 0, 17):
        fresh = Batches(encoded, tokens=30, seed=5)[k]
        assert all(torch.equal(x, y) for x, y in zip(fresh, run[k], strict=True))
    other = Batches(encoded, tokens=30, seed=6)
    assert any(pairs_of(other[k]) != pairs_of(run[k]) for k in range(5))


def test_batches_to_evaluate_on_keep_the_order() -> None:
    encoded = toy(50)
    found = [pair for batch in batches_of(encoded, 20) for pair in pairs_of(batch)]
    assert found == [(tuple(s), tuple(t)) for s, t in zip(*encoded, strict=True)]
    for long, short in (([6] * 9, [7]), ([7], [6] * 9)):
        for sides in (([long, short], [[5]] * 2), ([[5]] * 2, [long, short])):
            assert [len(batch.source) for batch in batches_of(Encoded(*sides), 3)] == [1, 1]
    uneven = Encoded([[5]] * 99 + [[5] * 499], [[6]] * 100)
    batches = Batches(uneven, tokens=500)
    assert max(batches[k].source.numel() for k in range(batches.epoch(0), 60) if not batches.epoch(k)) == 500


def test_batches_of_like_length_have_every_pair_and_little_padding() -> None:
    encoded = toy(300, longest=30)
    found = list(batches_of(by_length(encoded), 200))
    wanted = sorted((tuple(s), tuple(t)) for s, t in zip(*encoded, strict=True))
    assert sorted(pair for batch in found for pair in pairs_of(batch)) == wanted
    sizes = sum(batch.target_out.numel() for batch in found)
    assert sum(int((batch.target_out == -100).sum()) for batch in found) < 0.05 * sizes


def test_pairs_that_are_none_and_budgets_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="encoded must be as many sources as targets, and some, got 0 and 0"):
        Batches(Encoded([], []))
    with pytest.raises(ValueError, match="got 2 and 1"):
        batches_of(Encoded([[5], [6]], [[7]]))
    with pytest.raises(ValueError, match="tokens must be 1 or more, got 0"):
        Batches(toy(3), tokens=0)


# ---- networks


@each_student
def test_padding_changes_nothing_of_a_sentence(make: Make) -> None:
    student = make(12).double().eval()
    encoded = toy(7)
    batch = batch_of(encoded, range(7))
    together = student(batch.source, batch.target_in)
    for row in range(7):
        alone = batch_of(encoded, [row])
        hidden = student(alone.source, alone.target_in)[0]
        assert torch.allclose(hidden, together[row, : len(hidden)], atol=1e-12)


@each_student
def test_a_token_sees_the_source_and_what_is_before_it_and_nothing_after(make: Make) -> None:
    student = make(12).double().eval()
    batch = batch_of(Encoded([[5, 6, 7]], [[8, 9, 10, 11]]), [0])
    hidden = student(batch.source, batch.target_in)
    later, earlier, source = batch.target_in.clone(), batch.target_in.clone(), batch.source.clone()
    later[0, 3], earlier[0, 1], source[0, 0] = 4, 4, 4
    changed = (student(batch.source, later) != hidden).any(2)[0].tolist()
    assert changed == [False, False, False, True, True]
    changed = (student(batch.source, earlier) != hidden).any(2)[0].tolist()
    assert changed == [False, True, True, True, True]
    assert (student(source, batch.target_in) != hidden).any(2).all()


@each_student
def test_steps_of_one_token_give_what_the_whole_target_gives(make: Make) -> None:
    student = make(12).double().eval()
    batch = batch_of(toy(5), range(5))
    whole = student.logits(student(batch.source, batch.target_in))
    state = student.encode(batch.source)
    for t in range(batch.target_in.shape[1]):
        logits, state = student.step(state, batch.target_in[:, t])
        assert torch.allclose(logits, whole[:, t], atol=1e-12)


def test_onednn_is_off_while_any_lstm_runs_and_then_as_it_was() -> None:
    """Two calls, of which the first to begin is the first to end, as those of two threads may be."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.enabled
    try:
        for was in (True, False):
            mkldnn.enabled = was
            one, two = networks._without_onednn(), networks._without_onednn()
            seen = []
            for move in (one.__enter__, two.__enter__, lambda: one.__exit__(None, None, None)):  # noqa: B023
                move()
                seen.append(mkldnn.enabled)
            two.__exit__(None, None, None)
            assert seen == [False, False, False]
            assert mkldnn.enabled is was
            with pytest.raises(RuntimeError):
                LSTMTranslator(12, 8).onwards[0](torch.zeros(1, 2, 3))
            assert mkldnn.enabled is was
    finally:
        mkldnn.enabled = before


def test_onednn_takes_the_lstm_where_it_is_differentiated_once() -> None:
    torch.manual_seed(0)
    student, batch = LSTMTranslator(12, 8).eval(), batch_of(toy(4), range(4))

    def taken() -> tuple[bool, list[torch.Tensor]]:
        value = student(batch.source, batch.target_in).square().mean()
        names = {node.name() for node in nodes_of([value])}
        return "MkldnnRnnLayerBackward0" in names, list(
            torch.autograd.grad(value, list(student.onwards.parameters()))
        )

    slow, expected = taken()
    with networks.first_order():
        fast, found = taken()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not taken()[0]
    assert (slow, fast, taken()[0]) == (False, torch.backends.mkldnn.is_available(), False)
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(found, expected, strict=True))


def test_the_lstm_is_torchs_own_in_both_directions_over_packed_sentences() -> None:
    student = LSTMTranslator(12, 8).double().eval()
    plain = torch.nn.LSTM(8, 4, bidirectional=True, batch_first=True).double()
    for suffix, part in (("", student.onwards[0]), ("_reverse", student.backwards[0])):
        for name, value in part.named_parameters():
            getattr(plain, name + suffix).data.copy_(value)
    source = batch_of(toy(6), range(6)).source
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        student.embed(source), (source != 0).sum(1), batch_first=True, enforce_sorted=False
    )
    wanted = torch.nn.utils.rnn.pad_packed_sequence(plain(packed)[0], batch_first=True)[0]
    read = student.encode(source)[0]
    assert torch.allclose(read * (source != 0)[..., None], wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LSTMTranslator(4), "vocab must be 5 or more, got 4"),
        (lambda: LSTMTranslator(9, dim=7), "dim must be a multiple of 2, got 7"),
        (lambda: TransformerTranslator(9, dim=12, heads=4), "dim must be a multiple of 8, got 12"),
        (lambda: LSTMTranslator(9, layers=0), "layers must be 1 or more, got 0"),
        (lambda: LSTMTranslator(9, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_networks_that_cannot_be_made_are_refused(make: Callable[[], Translator], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# ---- the engine


def likelihood(student: Translator, batch: Batch, step: int = 0) -> torch.Tensor:
    logits = student.logits(student(batch.source, batch.target_in))
    return F.cross_entropy(logits.flatten(0, 1), batch.target_out.flatten(), ignore_index=-100)


@each_student
def test_preflight_finds_nothing_that_a_student_lacks(make: Make) -> None:
    found = l2t.preflight(make(12), batch_of(toy(4), range(4)), likelihood)
    assert not found.findings, str(found)
    assert found.suits("reverse")
    assert found.suits("forward")


@each_student
def test_the_hypergradient_through_a_course_is_that_of_plain_autograd(make: Make) -> None:
    """Weights of tokens by place: the engine's replay, dropout and all, against a graph of the whole run."""
    torch.manual_seed(3)
    student, encoded = make(12, dropout=0.2).double(), toy(20)
    batches = [Batches(encoded, tokens=20, seed=2)[k] for k in range(4)]
    dev = batch_of(toy(5, seed=1), range(5))
    weight = torch.ones(7, dtype=torch.float64, requires_grad=True)

    def loss(model: Translator, batch: Batch, step: int) -> torch.Tensor:
        return l2t.dynamic_linear_loss(
            model(batch.source, batch.target_in),
            model.head,
            batch.target_out,
            head_bias=model.head_bias,
            link="identity",
            sample_weight=weight[: batch.target_out.shape[1]].expand(batch.target_out.shape),
        )

    def plain(model: Callable[..., torch.Tensor], head: torch.Tensor, bias: torch.Tensor, batch: Batch):
        logits = F.linear(model(batch.source, batch.target_in), head, bias)
        rows = F.cross_entropy(logits.flatten(0, 1), batch.target_out.flatten(), reduction="none")
        factor = weight[: batch.target_out.shape[1]].expand(batch.target_out.shape).flatten()
        counted = (batch.target_out != -100).flatten()
        return (rows * factor)[counted].sum() / factor[counted].sum()

    start = {name: value.detach().clone() for name, value in student.named_parameters()}
    torch.manual_seed(4)
    run = l2t.unroll(
        student,
        batches,
        loss,
        lambda model: likelihood(model, dev),
        optimizer=l2t.optim.SGD(lr=0.5, momentum=0.9),
        schedule="every",
    )
    run.backward()

    torch.manual_seed(4)
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    speed = {name: torch.zeros_like(value) for name, value in weights.items()}
    for batch in batches:

        def model(source: torch.Tensor, target_in: torch.Tensor, now=weights) -> torch.Tensor:
            return torch.func.functional_call(student, now, (source, target_in))

        value = plain(model, weights["head"], weights["head_bias"], batch)
        grads = torch.autograd.grad(value, weights.values(), create_graph=True)
        speed = {n: 0.9 * v + g for (n, v), g in zip(speed.items(), grads, strict=True)}
        weights = {name: value - 0.5 * speed[name] for name, value in weights.items()}
    hidden = torch.func.functional_call(student, weights, (dev.source, dev.target_in))
    logits = F.linear(hidden, weights["head"], weights["head_bias"])
    measure = F.cross_entropy(logits.flatten(0, 1), dev.target_out.flatten())
    (wanted,) = torch.autograd.grad(measure, weight)
    assert torch.allclose(run.measure, measure, rtol=1e-10)
    assert weight.grad is not None
    assert float(wanted.norm()) > 1e-4
    assert torch.allclose(weight.grad, wanted, rtol=1e-7, atol=1e-12)


# ---- a toy language: each word has one translation, and sentences are turned around


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return toy_corpus()


@pytest.fixture(scope="module")
def vocabulary(corpus: Corpus) -> Vocabulary:
    return Vocabulary.train(corpus, 80)


SMALL = Course(steps=12, warmup=3, lr=0.01, tokens=120, dim=16, dropout=0.2, seed=3, save_every=4)
PLAIN = "maximum-likelihood"


# ---- vocabulary


def test_the_vocabulary_is_the_same_bytes_again_and_gives_back_what_it_was_given(
    corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    assert Vocabulary.train(corpus._replace(dev=[], test=[]), 80).model == vocabulary.model
    vocabulary.save(tmp_path / "v.model")
    again = Vocabulary.load(tmp_path / "v.model")
    texts = [text for pair in corpus.test for text in pair]
    ids = again.encode(texts)
    assert again.decode([[BEGIN, *row, END] for row in ids]) == texts
    assert all(4 <= i < 80 for row in ids for i in row)
    assert again.size == 80


def test_a_vocabulary_changes_no_character_and_takes_sentences_of_any_length() -> None:
    texts = ["das ﬁnale №1 … ½", "请打开文档，然后单击确定。", " ".join(["wort"] * 2000) + " ß€"]
    vocabulary = Vocabulary.train(Corpus([(text, text) for text in texts], [], [], "de", "zh", {}), 60)
    assert vocabulary.decode(vocabulary.encode(texts)) == texts
    assert not any(1 in ids for ids in vocabulary.encode(texts))
    assert vocabulary.encode(["das\n\u00a0wort  "]) == vocabulary.encode(["das wort"])


def test_targets_are_counted_with_their_ends(vocabulary: Vocabulary) -> None:
    counts = vocabulary.counts([[5, 5, 7], [7]])
    assert counts.shape == (80,)
    assert {i: int(n) for i, n in enumerate(counts) if n} == {3: 2, 5: 2, 7: 2}


def test_vocabularies_that_cannot_be_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be a number of pieces that the sentences give, got 9000"):
        Vocabulary.train(corpus, 9000)
    with pytest.raises(ValueError, match="model must be a sentencepiece model, got 4 bytes"):
        Vocabulary(b"none")
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_prefix=str(tmp_path / "x"), vocab_size=25, minloglevel=2
    )
    with pytest.raises(ValueError, match="the ids of padding, unknown, begin and end must be"):
        Vocabulary.load(tmp_path / "x.model")


@pytest.mark.parametrize("package", ["sentencepiece", "sacrebleu"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the package {package} must be installed, got none.*translation"):
        Vocabulary.train(corpus, 80) if package == "sentencepiece" else scores.bleu(["a"], ["a"])


# ---- search


def every_translation(student: Translator, source: list[int], longest: int) -> dict[tuple[int, ...], float]:
    """log p of all translations of at most so many tokens with END, one at a time, by the whole target."""
    found = {}
    for length in range(longest):
        for tokens in itertools.product(range(4, len(student.head)), repeat=length):
            batch = batch_of(Encoded([source], [list(tokens)]), [0])
            logits = student.logits(student(batch.source, batch.target_in))[0]
            logits[:, :3] = -math.inf
            after = logits.log_softmax(1).gather(1, batch.target_out[0][:, None])[:, 0]
            if length == longest - 1:  # there it ends, whatever p of END
                after[-1] = 0.0 if longest == 1 else after[-1]
            found[tokens] = float(after.sum())
    return found


@each_student
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_beam_that_is_wide_enough_finds_what_trying_all_finds(make: Make, penalty: float) -> None:
    torch.manual_seed(0)
    student, sources, longest = make(8).double().eval(), [[5, 6], [7], [4, 4, 6]], 4
    with torch.no_grad():
        student.head.mul_(3)
        source = batch_of(Encoded(sources, sources), range(3)).source
        found = beam(student, source, width=200, longest=longest, penalty=penalty)
        for said, row in zip(found, sources, strict=True):
            values = {
                tokens: value / (len(tokens) + 1) ** penalty
                for tokens, value in every_translation(student, row, longest).items()
            }
            assert tuple(said) == max(values, key=lambda tokens: values[tokens])


@each_student
def test_greedy_takes_the_likeliest_next_token_of_the_whole_target(make: Make) -> None:
    torch.manual_seed(1)
    student, sources = make(9).double().eval(), [[5, 6], [7], [4, 8, 6], [8, 8]]
    with torch.no_grad():
        student.head.mul_(3)
        student.head_bias[END] = 1.0
        source = batch_of(Encoded(sources, sources), range(4)).source
        found = greedy(student, source, longest=6)
        assert found == beam(student, source, width=1, longest=6)
        for said, row in zip(found, sources, strict=True):
            batch = batch_of(Encoded([row], [said]), [0])
            logits = student.logits(student(batch.source, batch.target_in))[0]
            logits[:, :3] = -math.inf
            choices = logits.argmax(1).tolist()
            assert choices[: len(said)] == said
            assert len(said) == 5 or choices[-1] == END


@each_student
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.filterwarnings("ignore:.*a translation must end")  # these have learned nothing
def test_a_translation_is_the_same_among_others_and_alone(make: Make, width: int) -> None:
    torch.manual_seed(2)
    student, source = make(12).double().train(), toy(9).source
    together = translate_ids(student, source, width, rows=4)
    assert student.training
    assert together == [translate_ids(student, [row], width)[0] for row in source]


class Repeats(torch.nn.Module):
    """Says its source ``times`` times, and ends."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.head, self.times = torch.nn.Parameter(torch.zeros(12, 4)), times

    def encode(self, source: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return source, torch.zeros(len(source), dtype=torch.int64), (source > END).sum(1)

    def step(self, state: tuple[torch.Tensor, ...], token: torch.Tensor) -> tuple[torch.Tensor, Any]:
        source, at, length = state
        now = source.gather(1, (at % length)[:, None])[:, 0].masked_fill(at >= self.times * length, END)
        return torch.where(torch.arange(12) == now[:, None], 0.0, -50.0), (source, at + 1, length)


@pytest.mark.parametrize("width", [1, 3])
def test_a_translation_may_be_as_long_as_its_source_needs(width: int) -> None:
    source = [[4 + (row + i) % 8 for i in range(length)] for row, length in enumerate((100, 70, 3, 1))]
    student: Any = Repeats(2)
    assert translate_ids(student, source, width) == [ids * 2 for ids in source]  # and nothing is warned of
    wanted = [(ids * 6)[: 2 * len(ids) + 9] for ids in source]
    student = Repeats(6)  # of one piece six are allowed, of three 18 are not
    with pytest.warns(
        UserWarning, match=r"within 2 n \+ 10 pieces of a source of n, got 3 of 4 that had not"
    ):
        assert translate_ids(student, source, width) == wanted
    assert wanted[3] == source[3] * 6


def test_searches_of_no_size_are_refused() -> None:
    student, source = LSTMTranslator(9, 4), torch.tensor([[5, 3]])
    with pytest.raises(ValueError, match="width and length must be 1 or more, got 0 and None"):
        beam(student, source, width=0)
    with pytest.raises(ValueError, match="penalty must be 0 or more, got -1"):
        beam(student, source, penalty=-1.0)
    assert greedy(student, source, longest=1) == [[]]


# ---- scores


def test_bleu_is_the_geometric_mean_of_precisions_and_a_penalty_for_short_ones() -> None:
    said, wanted = ["a b c d e f"], ["a b c d e g h"]
    precision = math.exp((math.log(5 / 6) + math.log(4 / 5) + math.log(3 / 4) + math.log(2 / 3)) / 4)
    found = scores.bleu(said, wanted)
    assert found.value == pytest.approx(100 * precision * math.exp(1 - 7 / 6))
    assert "tok:13a" in found.signature
    assert scores.chrf(wanted, wanted).value == 100
    assert scores.chrf(said, wanted).signature.startswith("nrefs:1|")
    with pytest.raises(ValueError, match="translations must be as many as references, and some, got 1 for 0"):
        scores.bleu(said, [])


def test_words_are_cut_as_in_the_language_that_is_translated_into(monkeypatch: pytest.MonkeyPatch) -> None:
    said, wanted = (
        ["请打开文件，然后单击确定。", "窗口已关闭。"],
        ["请打开文档，然后单击确定。", "该窗口已关闭。"],
    )
    plain, found = scores.bleu(said, wanted), scores.bleu(said, wanted, "zh_CN")
    assert "|tok:zh|" in found.signature
    assert found.value > 50 > plain.value
    assert scores.bleu(said, wanted, "en") == plain
    (paired,) = scores.paired_bootstrap(wanted, {"x": said}, wanted, samples=5, target="zh").values()
    assert paired.value == pytest.approx(found.value)

    def lacks(*_: object, **settings: str) -> None:
        raise RuntimeError(f"no words of {settings['trg_lang']}")

    import sacrebleu.metrics

    monkeypatch.setattr(sacrebleu.metrics, "BLEU", lacks)
    with pytest.raises(
        ImportError, match=r"BLEU of the language ja must have .* pip install 'sacrebleu\[ja\]'"
    ):
        scores.bleu(said, wanted, "ja")


def test_the_paired_bootstrap_tells_a_difference_from_none() -> None:
    draw = random.Random(1)
    wanted = [" ".join(draw.choices([*WORDS], k=6)) for _ in range(60)]
    worse = [" ".join(w if draw.random() < 0.6 else "x" for w in text.split()) for text in wanted]
    better = [" ".join(w if draw.random() < 0.9 else "x" for w in text.split()) for text in wanted]
    found = scores.paired_bootstrap(worse, {"better": better, "same": worse}, wanted, samples=200)
    assert found["better"].difference == pytest.approx(
        scores.bleu(better, wanted).value - scores.bleu(worse, wanted).value
    )
    assert found["better"].p < 0.02
    assert found["same"].difference == 0
    assert found["same"].p == 1


def test_the_fit_is_the_mean_over_tokens_and_not_over_batches() -> None:
    student, encoded = LSTMTranslator(12, 8).double(), toy(400)
    batch = batch_of(encoded, range(400))
    found = scores.fit(student, encoded)
    assert student.training
    student.eval()
    assert found.loss == pytest.approx(likelihood(student, batch).item(), rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert scores.Fit(1000.0, 0.0).perplexity == math.inf
    right = student.logits(student(batch.source, batch.target_in)).argmax(2) == batch.target_out
    assert found.accuracy == pytest.approx(int(right.sum()) / int((batch.target_out != -100).sum()))


def test_a_fit_holds_the_logits_of_few_tokens_at_a_time() -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.shape[-1:] == (50,):
                self.rows = max(self.rows, found.numel() // 50)
            return found

    student, encoded = LSTMTranslator(50, 8), toy(400, vocab=50)
    assert sum(len(row) + 1 for row in encoded.target) > 1500
    with Largest() as seen:
        scores.fit(student, encoded)
    assert seen.rows == 512


# ---- losses


def test_known_losses_are_those_of_torch() -> None:
    hidden, head = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    bias, target = torch.randn(11, dtype=torch.float64), torch.randint(0, 11, (3, 4))
    target[0, 2:] = -100
    logits, flat = F.linear(hidden, head, bias).flatten(0, 1), target.flatten()
    state = l2t.StudentState(0.0, 1.0, 0.1)
    for name, loss in course.LOSSES.items():
        kind, _, number = name.rpartition("-")
        if kind == "label-smoothing":
            wanted = F.cross_entropy(logits, flat, label_smoothing=float(number))
        elif kind == "focal":
            p = logits.softmax(1)[flat != -100].gather(1, flat[flat != -100][:, None])
            wanted = (-((1 - p) ** float(number)) * p.log()).mean()
        else:
            wanted = F.cross_entropy(logits, flat)
        assert torch.allclose(loss(hidden, head, bias, target, state), wanted, rtol=1e-10), name


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_token_that_is_certain_has_a_focal_gradient_of_nothing(gamma: float) -> None:
    hidden = torch.tensor([[[200.0], [1.0]]], requires_grad=True)  # p of the first is 1
    head, target = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0, 0]])
    course.focal(gamma)(hidden, head, None, target, l2t.StudentState(0.0, 1.0, 0.1)).backward()
    assert hidden.grad is not None
    p = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    own = F.logsigmoid(2 * p)
    (wanted,) = torch.autograd.grad(-((1 - own.exp()) ** gamma) * own / 2, p)
    assert hidden.grad[0, 0, 0] == 0
    assert hidden.grad[0, 1, 0].item() == pytest.approx(wanted.item(), rel=1e-5)


# ---- the course


@pytest.mark.parametrize("student", ["lstm", "transformer"])
def test_a_student_learns_the_toy_language(student: str, corpus: Corpus, vocabulary: Vocabulary) -> None:
    how = Course(student, steps=160, warmup=15, lr=0.01, tokens=200, dim=32, dropout=0.0, save_every=80)
    trained = course.train(corpus, vocabulary, how, progress=False)
    first, last = trained.history
    fitted = scores.fit(trained.student, vocabulary.encode_pairs(corpus.dev))
    assert (last["dev_loss"], last["dev_accuracy"]) == (fitted.loss, fitted.accuracy)
    assert last["dev_loss"] < first["dev_loss"] < 1.5  # a guess by frequency is at 2.4 or more
    said = trained.translate([text for text, _ in corpus.test], width=2)
    assert scores.bleu(said, [text for _, text in corpus.test]).value > 30


@pytest.mark.parametrize("student", ["lstm", "transformer"])
def test_a_course_that_was_broken_off_goes_on_to_the_same_bits(
    student: str, corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    how = Course(**{**SMALL.to_json(), "student": student})
    states: list[l2t.StudentState] = []
    whole = course.train(corpus, vocabulary, how, watched(states), progress=False)
    assert [state.progress for state in states] == [k / 12 for k in range(12)]
    assert states[0].train_loss == pytest.approx(math.log(80))

    def stops(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        if state.progress > 6.5 / 12:
            raise KeyboardInterrupt
        return course.likelihood(hidden, head, bias, target, state)

    with pytest.raises(KeyboardInterrupt):
        course.train(corpus, vocabulary, how, stops, name=PLAIN, directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"l2t\.translation: directory must hold no run, got .* with one"):
        course.train(corpus, vocabulary, how, directory=tmp_path, progress=False)
    other = Course(**{**how.to_json(), "lr": 0.02})
    with pytest.raises(ValueError, match="started with the same arguments, got different course"):
        course.train(corpus, vocabulary, other, directory=tmp_path, resume=True, progress=False)
    rest: list[l2t.StudentState] = []
    again = course.train(
        corpus, vocabulary, how, watched(rest), name=PLAIN, directory=tmp_path, resume=True, progress=False
    )
    assert rest == states[7:]  # the step in which it came is taken again
    assert same(whole, again)
    assert [{**row, "cpu_seconds": 0} for row in again.history] == [
        {**row, "cpu_seconds": 0} for row in whole.history
    ]
    finished = course.train(corpus, vocabulary, how, directory=tmp_path, resume=True, progress=False)
    assert same(whole, finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "translator.safetensors", "vocabulary.model",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "steps"),
    [("begin", None), ("loss", 2), ("update", 6), ("end", 6), ("look", 4), ("last look", 12)],
)
def test_ctrl_c_keeps_every_whole_step_wherever_it_comes(
    where: str, steps: int | None, corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SMALL looks at the dev set after 4, 8 and 12 steps."""
    update, fit, calls = torch.optim.Adam.step, course.fit, {"update": 0, "look": 0}

    def loss(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        if (where, state.progress) in (("begin", 0.0), ("loss", 2 / 12)):
            signal.raise_signal(signal.SIGINT)
        return course.likelihood(hidden, head, bias, target, state)

    def updated(optimizer: torch.optim.Adam) -> None:
        calls["update"] += 1
        if calls["update"] == 6 and where in ("update", "end"):  # in the midst of what changes the student
            signal.raise_signal(signal.SIGINT if where == "update" else signal.SIGTERM)
        update(optimizer)

    def looked(*given: Any) -> scores.Fit:
        calls["look"] += 1
        if (where, calls["look"]) in (("look", 1), ("last look", 3)):
            signal.raise_signal(signal.SIGINT)
        return fit(*given)

    whole = course.train(corpus, vocabulary, SMALL, progress=False)
    # SIGTERM as in a process of a comparison; a job in the background begins with SIGINT ignored.
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, signal.default_int_handler) for kind in kinds]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", updated)
            patch.setattr(course, "fit", looked)
            with pytest.raises(KeyboardInterrupt):
                course.train(corpus, vocabulary, SMALL, loss, name=PLAIN, directory=tmp_path, progress=False)
        assert all(signal.getsignal(kind) is signal.default_int_handler for kind in kinds)
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
    assert course.is_begun(tmp_path) == (steps is not None)
    if steps is not None:
        assert read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == steps
    rest: list[l2t.StudentState] = []
    again = course.train(
        corpus, vocabulary, SMALL, watched(rest), name=PLAIN, directory=tmp_path, resume=True, progress=False
    )
    assert len(rest) == 12 - (steps or 0)
    assert same(whole, again)
    assert [{**row, "cpu_seconds": 0} for row in again.history] == [
        {**row, "cpu_seconds": 0} for row in whole.history
    ]
    assert all(one["cpu_seconds"] <= two["cpu_seconds"] for one, two in itertools.pairwise(again.history))


def test_what_the_loss_does_not_reach_has_a_gradient_of_nothing(
    corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """To the bits of a loss that reaches the bias with a factor of zero, broken off or not."""

    def without_bias(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        if state.progress == stop:
            raise KeyboardInterrupt
        return course.likelihood(hidden, head, None, target, state)

    def times_zero(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        return course.likelihood(hidden, head, None, target, state) + 0 * bias.sum()

    wanted, stop = course.train(corpus, vocabulary, SMALL, times_zero, progress=False), 0.5
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            found = course.train(
                corpus, vocabulary, SMALL, without_bias, name="own", directory=tmp_path, resume=True,
                progress=False,
            )  # fmt: skip
        stop = -1.0
    assert same(found, wanted)
    assert not found.student.head_bias.any()


def test_under_autocast_every_step_is_by_the_weights_of_the_one_before(
    corpus: Corpus, vocabulary: Vocabulary
) -> None:
    """Which its cache would hide; by casts of the first ones 12 steps lead half as far."""
    how = Course(steps=12, warmup=3, lr=0.05, tokens=120, dim=16, dropout=0.0)
    ends = []
    for settings in ({"enabled": False}, {"cache_enabled": False}, {}):
        with torch.autocast("cpu", torch.bfloat16, **settings):
            ends.append(course.train(corpus, vocabulary, how, progress=False).history[-1]["dev_loss"])
    assert ends[2] == pytest.approx(ends[0], rel=0.01)
    assert ends[2] == pytest.approx(ends[1], rel=0.002)


def test_a_course_knows_its_loss_by_name(corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path) -> None:
    how = Course(steps=1, dim=8)

    def trained(loss: course.TokenLoss, **more: Any) -> str:
        made = course.train(corpus, vocabulary, how, loss, progress=False, **more)
        return str(made.config["loss"])

    assert trained(course.likelihood) == PLAIN
    assert trained(course.LOSSES["focal-1"], directory=tmp_path / "focal") == "focal-1"
    assert trained(course.focal(3.0)) == "focal.<locals>.loss"
    assert trained(course.focal(3.0), name="mine", directory=tmp_path / "own") == "mine"
    with pytest.raises(ValueError, match="the same arguments, got different loss"):
        trained(course.likelihood, directory=tmp_path / "own", resume=True)
    for folder in ("own", "new"):
        with pytest.raises(
            ValueError, match=r"name must be given .*, got None for focal\.<locals>\.loss\. Say"
        ):
            trained(course.focal(2.0), directory=tmp_path / folder, resume=True)
    assert not (tmp_path / "new").exists()


def test_a_course_goes_on_with_its_own_pairs_and_vocabulary_alone(
    corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Other words, and a vocabulary of as many pieces."""

    def stops(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        if state.progress > 0.5:
            raise KeyboardInterrupt
        return course.likelihood(hidden, head, bias, target, state)

    with pytest.raises(KeyboardInterrupt):
        course.train(corpus, vocabulary, SMALL, stops, name=PLAIN, directory=tmp_path, progress=False)
    other = swapped(corpus)
    held = corpus._replace(dev=corpus.dev[:-1])
    for pairs, pieces, said in (
        (other, vocabulary, "pairs"),
        (held, vocabulary, "pairs"),
        (corpus, Vocabulary.train(other, 80), "vocabulary"),
    ):
        with pytest.raises(ValueError, match=rf"the same arguments, got different {said}\."):
            course.train(pairs, pieces, SMALL, directory=tmp_path, resume=True, progress=False)
    course.train(corpus, vocabulary, SMALL, directory=tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"the same arguments, got different pairs, vocabulary\."):
        course.train(other, Vocabulary.train(other, 80), SMALL, directory=tmp_path, resume=True)


def swapped(corpus: Corpus) -> Corpus:
    """The same languages with other letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    table = str.maketrans(letters, letters[::-1])
    parts = ([tuple(text.translate(table) for text in pair) for pair in part] for part in corpus[:3])
    return Corpus(*parts, *corpus[3:])  # type: ignore[arg-type]


def watched(states: list[l2t.StudentState]) -> course.TokenLoss:
    def loss(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        states.append(state)
        return course.likelihood(hidden, head, bias, target, state)

    return loss


def same(one: course.Trained, other: course.Trained) -> bool:
    weights = one.student.state_dict()
    return all(torch.equal(weights[name], value) for name, value in other.student.state_dict().items())


def test_a_saved_translator_says_the_same_and_what_is_none_is_refused(
    corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    trained = course.train(corpus, vocabulary, SMALL, progress=False)
    trained.save(tmp_path / "t")
    loaded = course.load(tmp_path / "t")
    texts = [text for text, _ in corpus.test]
    assert loaded.translate(texts) == trained.translate(texts)
    assert same(trained, loaded)
    assert not loaded.student.training
    assert json.loads((tmp_path / "t" / "config.json").read_text())["config"] == loaded.config
    for other in (Vocabulary.train(corpus, 70), Vocabulary.train(swapped(corpus), 80)):
        other.save(tmp_path / "t" / "vocabulary.model")
        with pytest.raises(ValueError, match=f"must be the one of the weights, {vocabulary.checksum}, got"):
            course.load(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="must hold a trained translator, got none"):
        course.load(tmp_path)
    vocabulary.save(tmp_path / "t" / "vocabulary.model")
    weights = tmp_path / "t" / "translator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for reads in (course.load, lambda at: course.train(corpus, vocabulary, SMALL, directory=at, resume=True)):
        with pytest.raises(ValueError, match=r"safetensors must be a safetensors file, whole, got another"):
            reads(tmp_path / "t")


def test_a_folder_that_takes_nothing_is_found_out_before_the_first_step(
    corpus: Corpus, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    for where in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "locked"):
        with monkeypatch.context() as patch:
            if where.name == "locked":  # to root nothing is
                no = PermissionError(13, "Permission denied")
                patch.setattr("l2t.files.os.replace", lambda *_, no=no: (_ for _ in ()).throw(no))
            with pytest.raises(
                ValueError, match=r"must be a folder that can be made and written, got .*\(\w+"
            ):
                course.train(
                    corpus,
                    vocabulary,
                    SMALL,
                    watched(steps := []),
                    name="own",
                    directory=where,
                    progress=False,
                )
        assert not steps
    seen: list[bool] = []

    def looks(hidden, *more):  # type: ignore[no-untyped-def]
        seen.append((tmp_path / "out" / "config.json").is_file())
        return course.likelihood(hidden, *more)

    course.train(corpus, vocabulary, SMALL, looks, name="own", directory=tmp_path / "out", progress=False)
    assert all(seen)


def test_the_rate_rises_and_falls_and_settings_that_make_no_sense_are_refused() -> None:
    how = Course(steps=10, warmup=4, lr=1.0)
    assert [how.rate(k) for k in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, pytest.approx(1 / 6)]
    assert Course(**how.to_json()) == how
    short = Course(steps=100, lr=1.0)  # of which a warm-up of 200 steps is too long
    assert max(short.rate(k) for k in range(100)) == short.rate(49) == 1.0
    assert short.rate(99) == pytest.approx(1 / 50)
    with pytest.raises(ValueError, match="student must be one of lstm, lstm-2, transformer, got 'gru'"):
        Course("gru")
    with pytest.raises(ValueError, match="dim must be a multiple of 8"):
        Course("transformer", dim=12)


def test_a_loss_that_is_no_number_is_refused(corpus: Corpus, vocabulary: Vocabulary) -> None:
    with pytest.raises(TypeError, match="loss must return a 0-dim tensor, got"):
        course.train(corpus, vocabulary, SMALL, lambda hidden, *_: hidden, progress=False)
    with pytest.raises(ValueError, match="the loss must be finite, got nan at step 0"):
        course.train(corpus, vocabulary, SMALL, lambda hidden, *_: hidden.sum() * math.nan, progress=False)
    seen: list[float] = []

    def last(hidden, head, bias, target, state):  # type: ignore[no-untyped-def]
        """A loss whose gradient is no number, before the dev set is looked at."""
        seen.append(state.progress)
        return hidden.mean() if len(seen) < 4 else (hidden * 0).sqrt().sum()

    with pytest.raises(check.DivergedError, match="the dev loss must be finite, got nan at step 4"):
        course.train(corpus, vocabulary, SMALL, last, progress=False)


# ---- the command line


def test_the_commands_train_score_and_translate(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(corpus, tmp_path / "pairs")
    train = ["train", "translation", "--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "out")]
    train += ["--pieces", "80", "--steps", "3", "--loss", "label-smoothing-0.1", "--quiet"]
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "test BLEU" in said
    assert "|version:" in said
    assert "test perplexity" in said
    assert main(["translate", str(tmp_path / "out"), "rot hund", "nie"]) == 0
    both = capsys.readouterr().out
    assert both.count("\n") == 2
    for more in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("rot hund\n\n\x85\u2028\x0c\nnie\n"))  # of one line
        assert main(["translate", str(tmp_path / "out"), *more]) == 0
        first, second = both.splitlines()
        assert capsys.readouterr().out.split("\n") == [first, "", "", second, ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["translate", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="sentences must be a list of strings, got the string 'rot hund'"):
        course.load(tmp_path / "out").translate("rot hund")  # type: ignore[arg-type]
    assert main(train) == 2
    assert "directory must hold no run" in capsys.readouterr().err
    assert main([*train, "--resume"]) == 0
    assert main(["translate", str(tmp_path), "nie"]) == 2
    assert "must hold a trained translator" in capsys.readouterr().err


def test_lines_to_translate_end_in_newlines_alone_and_are_text(
    corpus: Corpus,
    vocabulary: Vocabulary,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    course.train(corpus, vocabulary, Course(steps=1, dim=8), directory=tmp_path, progress=False)

    def said(given: bytes, errors: str = "strict") -> tuple[int, str, str]:
        read = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", read)
        return main(["translate", str(tmp_path)]), *capsys.readouterr()

    plain = said(b"rot hund\nnie\n")
    assert plain[0] == 0
    assert plain[1].count("\n") == 2
    assert said(b"\xef\xbb\xbfrot\rhund\r\nnie\r\n") == plain
    for errors in ("strict", "surrogateescape"):  # the latter is how Python reads in the locale C
        code, out, err = said(b"rot\nStra\xdfe\n", errors)
        assert (code, out) == (2, "")
        assert "the lines to translate must be utf-8 text, got another byte at 8." in err
    assert main(["translate", str(tmp_path), "Stra\udcdfe"]) == 2
    assert r"sentences must be Unicode text, got 'Stra\udcdfe'" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_course_without_pairs_is_refused_before_its_first_step(
    corpus: Corpus, vocabulary: Vocabulary, split: str
) -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError

    with pytest.raises(ValueError, match=f"l2t.translation: {split} must have sentence pairs, got none"):
        course.train(corpus._replace(**{split: []}), vocabulary, SMALL, never, progress=False)
