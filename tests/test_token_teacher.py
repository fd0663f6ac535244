"""The teacher of tokens: features, start, normalisation, derivatives, files (docs/math.md, section 9)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import l2t
from l2t.teacher import AnyTeacher
from l2t.translation.token_teacher import KINDS, TokenTeacher, TokenTracker, token_features

LINKS = ("identity", "sigmoid", "log-sigmoid")
STATE = l2t.StudentState(progress=0.3, train_loss=1.1, train_accuracy=0.6)
LATER = l2t.StudentState(progress=0.9, train_loss=0.2, train_accuracy=0.9)
COUNTS = torch.tensor([0, 2, 0, 50, 200, 81, 33, 9, 4, 1, 1, 0])
DOUBLE = {"dtype": torch.float64}


def batch(vocabulary: int = len(COUNTS), width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, its bias and targets, some of them padding."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (
        torch.randn(*shape, generator=generator, **DOUBLE)
        for shape in ((3, 4, width), (vocabulary, width), (vocabulary,))
    )
    target = torch.randint(3, vocabulary, (3, 4), generator=generator)
    target[1, 2:] = target[2, 3:] = -100
    return hidden, head, bias, target


def wild(teacher: TokenTeacher, spread: float = 2.0) -> TokenTeacher:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, **DOUBLE))
    return teacher


def by_definition(teacher: TokenTeacher, logits: Tensor, target: Tensor, state: l2t.StudentState) -> Tensor:
    """The mean loss of rows, written out with the matrix W in memory."""
    weight, bias, scale = teacher(state)
    link = {"identity": lambda u: u, "sigmoid": torch.sigmoid, "log-sigmoid": F.logsigmoid}[teacher.link]
    kept = target != -100
    rows, target = logits[kept].log_softmax(-1), target[kept]
    inside = (weight.dense()[target] * rows).sum(-1)
    if teacher.link != "identity":
        inside = inside + bias[target]
    return -(scale[target] * link(inside)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 4])
def test_it_starts_as_label_smoothing(kind, slots):
    teacher = TokenTeacher(COUNTS, kind, slots=slots, **DOUBLE)
    hidden, head, bias, target = batch()
    leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    found = teacher.loss(*leaves, target, STATE)
    known = F.cross_entropy(F.linear(*leaves).flatten(0, 1), target.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, known, rtol=1e-13, atol=1e-13)
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(known, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_uniform_p_every_link_pulls_as_smoothed_cross_entropy_does(link, kind):
    teacher = TokenTeacher(COUNTS, kind, link=link, smoothing=0.25, **DOUBLE)
    with torch.no_grad():
        for name in ("diagonal", "bias"):
            if hasattr(teacher, name):
                getattr(teacher, name).normal_(generator=torch.Generator().manual_seed(2))
    size = len(COUNTS)
    target = torch.arange(size).expand(2, -1)
    hidden, head = torch.zeros(2, size, 3, **DOUBLE), torch.randn(size, 3, **DOUBLE)
    bias = torch.zeros(size, requires_grad=True, **DOUBLE)
    found = torch.autograd.grad(teacher.loss(hidden, head, bias, target, STATE), bias)[0]
    loss = F.cross_entropy(bias.expand(2 * size, -1), target.flatten(), label_smoothing=0.25)
    torch.testing.assert_close(found, torch.autograd.grad(loss, bias)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_derivatives_are_those_of_the_definition(link, kind):
    teacher = wild(TokenTeacher(COUNTS, kind, link=link, **DOUBLE))
    hidden, head, bias, target = batch()
    leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    parameters = list(teacher.parameters())
    results = []
    for loss in (
        teacher.loss(*leaves, target, STATE),
        by_definition(teacher, F.linear(*leaves), target, STATE),
    ):
        first = torch.autograd.grad(loss, [*leaves, *parameters], create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first[:3]), [*leaves, *parameters])
        results.append([loss, *first, *second])
    for found, known in zip(*results, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("link", LINKS)
def test_whatever_it_says_rows_are_distributions_and_the_mean_emphasis_over_tokens_is_one(link):
    teacher = wild(TokenTeacher(COUNTS, link=link, **DOUBLE), spread=30.0)
    weight, bias, scale = teacher(STATE)
    dense = weight.dense()
    size, own = dense.sum(1), dense.sum(1, keepdim=True)
    assert (dense > 0).all()
    assert (dense / own).diagonal().max() < 1.0
    assert size.max() / size.min() <= math.exp(2.0) + 1e-9
    # What scales the gradient at uniform p: the link's slope there, by autograd.
    inside = (bias - math.log(len(COUNTS)) * size).detach().requires_grad_()
    phi = {"identity": lambda u: u, "sigmoid": torch.sigmoid, "log-sigmoid": F.logsigmoid}[link]
    slope = torch.autograd.grad(phi(inside).sum(), inside)[0]
    mean = (COUNTS / COUNTS.sum() * scale * slope * size).sum()
    assert mean.item() == pytest.approx(1.0, rel=1e-5)


def test_features_are_hats_over_the_logarithm_of_the_frequency():
    features = token_features(COUNTS)
    assert features.shape == (len(COUNTS), 7)
    torch.testing.assert_close(features[:, :6].sum(1), torch.ones(len(COUNTS), **DOUBLE))
    assert features[:, 6].tolist() == [0, 0, 0, 1] + [0] * 8
    assert features[0, 0] == features[4, 5] == 1.0  # never seen, and most frequent
    middle = (features[:, :6] * torch.arange(6)).sum(1) / 5  # a hat basis reproduces its own argument
    known = torch.log1p(COUNTS.double()) / math.log(201)
    torch.testing.assert_close(middle, known)


def test_its_size_does_not_grow_with_the_vocabulary_and_its_numbers_fit_another():
    small, large = TokenTeacher(COUNTS), TokenTeacher(torch.arange(3000))
    shapes = [x.shape for x in small.parameters()]
    assert shapes == [x.shape for x in large.parameters()]
    large.load_state_dict(wild(TokenTeacher(COUNTS)).state_dict())
    assert large(STATE).scale.shape == (3000,)


@pytest.mark.parametrize(("kind", "link", "names"), [
    ("shared", "identity", {"strength"}),
    ("diagonal", "identity", {"emphases"}),
    ("low-rank", "identity", {"strength", "emphases", "prior"}),
    ("shared", "sigmoid", {"strength", "diagonal", "bias"}),
])  # fmt: skip
def test_what_a_kind_teaches_and_that_all_of_it_has_a_gradient(kind, link, names):
    teacher = TokenTeacher(COUNTS, kind, slots=1, link=link, **DOUBLE)
    assert {name for name, _ in teacher.named_parameters()} == names
    hidden, head, bias, target = batch()
    teacher.loss(hidden, head, bias, target, STATE).backward()
    assert all(x.grad.abs().max() > 1e-6 for x in teacher.parameters())


def test_a_dynamic_teacher_says_other_things_at_other_times_and_a_static_one_does_not():
    for slots in (1, 4):
        teacher = wild(TokenTeacher(COUNTS, slots=slots, **DOUBLE))
        one, other = teacher(STATE), teacher(LATER)
        assert torch.equal(one.scale, other.scale) is (slots == 1)
        assert torch.equal(one.weight.right, other.weight.right) is (slots == 1)


def test_states_with_leading_dimensions_and_vmap_give_what_each_state_gives():
    teacher = wild(TokenTeacher(COUNTS, link="sigmoid", **DOUBLE))
    states = l2t.StudentState(
        *(torch.tensor(pair, **DOUBLE) for pair in zip(STATE[:3], LATER[:3], strict=True))
    )
    several = teacher(states)
    mapped = torch.vmap(lambda *state: functional_call(teacher, {}, (l2t.StudentState(*state),)))(*states[:3])
    for i, state in enumerate((STATE, LATER)):
        alone = teacher(state)
        for result in (several, mapped):
            torch.testing.assert_close(result.weight.dense()[i], alone.weight.dense())
            torch.testing.assert_close(result.scale[i], alone.scale)
            torch.testing.assert_close(result.bias[i], alone.bias)


def test_the_fixed_copy_and_the_neutral_one():
    teacher = wild(TokenTeacher(COUNTS, **DOUBLE))
    hidden, head, bias, target = batch()
    fixed = teacher.fixed()
    assert not fixed.loss(hidden, head, bias, target, STATE).requires_grad
    assert fixed.loss(hidden, head, bias, target, STATE) == teacher.loss(hidden, head, bias, target, STATE)
    known = F.cross_entropy(F.linear(hidden, head, bias).flatten(0, 1), target.flatten(), label_smoothing=0.1)
    found = teacher.neutral().loss(hidden, head, bias, target, LATER)
    torch.testing.assert_close(found, known)


def test_a_factor_for_each_token():
    teacher = wild(TokenTeacher(COUNTS, **DOUBLE))
    hidden, head, bias, target = batch()
    factor = torch.rand(target.shape, generator=torch.Generator().manual_seed(3), **DOUBLE)
    found = teacher.loss(hidden, head, bias, target, STATE, sample_weight=factor)
    total = torch.zeros((), **DOUBLE)
    for i, j in (target != -100).nonzero().tolist():
        logits = F.linear(hidden[i, j], head, bias)[None]
        total += factor[i, j] * by_definition(teacher, logits, target[i, j][None], STATE)
    torch.testing.assert_close(found, total / factor[target != -100].sum())


@pytest.mark.parametrize("slots", [1, 4])
def test_a_file_brings_the_teacher_back(tmp_path, slots):
    teacher = wild(TokenTeacher(COUNTS, link="sigmoid", slots=slots, hats=4, eos=5, **DOUBLE))
    teacher.save(tmp_path)
    again = AnyTeacher.load(tmp_path)
    assert isinstance(again, TokenTeacher)
    assert again.config() == teacher.config() == json.loads((tmp_path / "teacher.json").read_text())
    torch.testing.assert_close(again(STATE), teacher(STATE), rtol=0, atol=0)


def test_counts_may_be_whole_numbers_of_any_dtype():
    known = wild(TokenTeacher(COUNTS)).counts
    assert known == COUNTS.tolist()
    for counts in (COUNTS.double(), COUNTS.to(torch.int32), COUNTS.tolist()):
        assert TokenTeacher(counts).counts == known


def test_a_seed_gives_the_same_keys_in_both_precisions():
    single, double = TokenTeacher(COUNTS, seed=5), TokenTeacher(COUNTS, seed=5, **DOUBLE)
    torch.testing.assert_close(single.keys, double.keys.float(), rtol=0, atol=0)
    assert not torch.equal(single.keys, TokenTeacher(COUNTS, seed=6).keys)
    assert "12 tokens" in repr(single)


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"weight": "full"}, r"l2t.TokenTeacher: weight must be one of shared, diagonal, low-rank, got 'full'"),
    ({"link": "tanh"}, r"l2t.TokenTeacher: link must be one of"),
    ({"slots": 0}, r"l2t.TokenTeacher: slots must be an integer of 1 or more, got 0"),
    ({"hats": 1}, r"l2t.TokenTeacher: hats must be an integer of 2 or more, got 1"),
    ({"features": ("time",)}, r"l2t.TokenTeacher: features must be a non-empty sequence"),
    ({"smoothing": 0.0}, r"l2t.TokenTeacher: smoothing must be above 0 and below 1, got 0.0"),
    ({"smoothing": 1.0}, r"l2t.TokenTeacher: smoothing must be above 0"),
    ({"prior_range": -1.0}, r"l2t.TokenTeacher: prior_range must be positive and finite, got -1.0"),
    ({"weight": "diagonal", "emphasis": 0.0}, r"l2t.TokenTeacher: emphasis must be positive"),
    ({"counts": torch.zeros(9)}, r"l2t.TokenTeacher: counts must be an integer of 0 or more for each token"),
    ({"counts": [0.1, 0.2, 0.3, 0.4]}, r"counts must be an integer of .*, got shape \(4,\), float32 on cpu"),
    ({"counts": [1.0, 2.0, 3.0, 4.5]}, r"counts must be an integer of 0 or more"),
    ({"counts": [1.0, 2.0, 3.0, math.nan]}, r"counts must be an integer of 0 or more"),
    ({"counts": [1.0, 2.0, 3.0, math.inf]}, r"counts must be an integer of 0 or more"),
    ({"counts": [1, 2, 3]}, r"the end of a sentence \(eos=3\) among them"),
    ({"counts": [1, -2, 3, 4]}, r"Count the target tokens of the training set"),
    ({"counts": [[1, 2, 3, 4]]}, r"not all 0, got shape \(1, 4\)"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        TokenTeacher(**{"counts": COUNTS} | arguments)


def test_a_state_without_a_feature_is_refused():
    teacher = TokenTeacher(COUNTS, features=("progress", "dev_loss"))
    with pytest.raises(ValueError, match=r"state\.dev_loss must be a number, got None"):
        teacher(STATE)


# ---- the state of a student


def test_the_tracker_keeps_running_means_of_the_tokens():
    hidden, head, bias, target = batch()
    tracker = TokenTracker(len(COUNTS), steps=4)
    assert tracker.state(0) == (0.0, math.log(12), 1 / 12, None, None)
    tracker.update(0, hidden, head, bias, target)
    p = F.linear(hidden, head, bias).softmax(-1)
    own = torch.stack([p[i, j, target[i, j]] for i, j in (target != -100).nonzero().tolist()])
    state = tracker.state(1)
    assert state.progress == 0.25
    assert state.train_loss == pytest.approx(0.9 * math.log(12) - 0.1 * own.log().mean().item())
    assert state.train_accuracy == pytest.approx(0.9 / 12 + 0.1 * own.mean().item())


def test_a_step_that_is_run_again_changes_nothing_and_a_record_can_go_on():
    hidden, head, bias, target = batch()
    whole = TokenTracker(len(COUNTS), steps=4)
    for step in (0, 1, 0, 2):
        whole.update(step, (step + 1) * hidden, head, bias, target)
    rest = TokenTracker(len(COUNTS), 4, first=1, state=whole.state(1))
    for step in (1, 2):
        rest.update(step, (step + 1) * hidden, head, bias, target)
    assert [rest.state(step) for step in (1, 2, 3)] == [whole.state(step) for step in (1, 2, 3)]


def test_of_a_large_batch_it_looks_at_128_tokens_from_all_over():
    target = torch.full((2, 300), 4)
    target[:, ::2] = -100
    hidden, head = torch.zeros(2, 300, 3), torch.zeros(12, 3)
    bias = torch.zeros(12)
    bias[4] = 3.0
    hidden[1, :, 0], head[4, 0] = 1.0, 100.0  # the second sentence is known for certain
    tracker = TokenTracker(12, 1)
    tracker.update(0, hidden, head, bias, target)
    first = math.exp(3.0) / (math.exp(3.0) + 11)
    found = (tracker.state(1).train_accuracy - 0.9 / 12) / 0.1
    assert found == pytest.approx((first + 1.0) / 2, abs=1e-5)
