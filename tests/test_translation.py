"""Students that translate: batches, networks and their derivatives, search, scores, a course."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import l2t
from l2t.translation.batches import Batch, Batches, Encoded, batch_of, batches_of
from l2t.translation.networks import LSTMTranslator, TransformerTranslator, Translator

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
    assert all(batches[k].target_out.numel() <= 40 for k in first)
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
    assert [len(batch.source) for batch in batches_of(Encoded([[5]] * 2, [[6] * 9, [7]]), 3)] == [1, 1]


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
