"""The baselines against their papers' formulas, their limits, and which regime gets which."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from l2t.baselines import (
    additive_margin,
    baselines,
    class_weighted,
    effective_number,
    focal,
    forward_correction,
    generalised_cross_entropy,
    inverse_frequency,
    label_smoothing,
    smooth_error,
)
from l2t.students import cross_entropy

CLASSES = 3
NOISE = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.4, 0.0, 0.6]], dtype=torch.float64)
COUNTS = torch.tensor([60, 30, 10])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits = torch.randn(2, 7, CLASSES, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(CLASSES, (2, 7))


def others(z, y):
    """The logits of the other classes."""
    return z[torch.arange(CLASSES) != y]


@pytest.mark.parametrize(
    ("loss", "row"),  # of a row's logits, its probabilities and its class
    [
        (cross_entropy, lambda z, p, y: -p[y].log()),
        (label_smoothing(0.1), lambda z, p, y: -(0.9 * p[y].log() + 0.1 * p.log().mean())),
        (focal(2.0), lambda z, p, y: -((1 - p[y]) ** 2) * p[y].log()),
        (
            additive_margin(1.5),
            lambda z, p, y: -((z[y] - 1.5).exp() / ((z[y] - 1.5).exp() + others(z, y).exp().sum())).log(),
        ),
        (smooth_error(2.0), lambda z, p, y: 2 / (1 + (2 * (z[y] - others(z, y).max())).exp())),
        (generalised_cross_entropy(0.7), lambda z, p, y: (1 - p[y] ** 0.7) / 0.7),
        (forward_correction(NOISE), lambda z, p, y: -(p @ NOISE)[y].log()),
        (
            class_weighted(inverse_frequency(COUNTS)),
            lambda z, p, y: -(100 / (3 * COUNTS[y])) * p[y].log(),
        ),
    ],
)
def test_a_baseline_is_its_formula_and_so_is_its_gradient(batch, loss, row):
    logits, target = batch
    found = loss(logits, target)
    expected = torch.stack(
        [
            torch.stack([row(z, z.softmax(-1), y) for z, y in zip(*of_student, strict=True)]).mean()
            for of_student in zip(logits, target, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)  # students do not mix
    torch.testing.assert_close(
        torch.autograd.grad(found @ weights, logits), torch.autograd.grad(expected @ weights, logits)
    )


@pytest.mark.parametrize(
    ("loss", "rtol"),
    [
        (label_smoothing(0.0), 1e-12),
        (focal(0.0), 1e-12),
        (additive_margin(0.0), 1e-12),
        (generalised_cross_entropy(1e-6), 1e-5),
        (forward_correction(torch.eye(CLASSES, dtype=torch.float64)), 1e-12),
        (class_weighted(effective_number(COUNTS, 0.0)), 1e-12),
        (class_weighted(inverse_frequency(torch.tensor([9, 9, 9]))), 1e-12),
    ],
)
def test_cross_entropy_is_the_limit(batch, loss, rtol):
    logits, target = batch
    expected = torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, target, strict=True)])
    torch.testing.assert_close(loss(logits, target), expected, rtol=rtol, atol=0)


def test_generalised_cross_entropy_at_q_1_is_the_expected_error(batch):
    logits, target = batch
    right = logits.softmax(-1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(generalised_cross_entropy(1.0)(logits, target), (1 - right).mean(-1))


def test_a_steep_smooth_error_counts_errors(batch):
    logits, target = batch
    steep = smooth_error(1e6)(logits, target) * 1e6 / 4
    torch.testing.assert_close(steep, (logits.argmax(-1) != target).double().mean(-1))
    level = smooth_error(7.0)(logits.new_zeros(1, 1, 2).requires_grad_(), torch.zeros(1, 1, dtype=torch.long))
    assert level.item() == pytest.approx(4 / 7 / 2)


def test_a_margin_is_a_larger_loss_of_the_same_answer(batch):
    logits, target = batch
    least, more, most = (additive_margin(margin)(logits, target) for margin in (0.0, 1.0, 2.0))
    assert (least < more).all()
    assert (more < most).all()
    assert (most < least + 2).all()


@pytest.mark.parametrize(
    "loss",
    [
        label_smoothing(0.1),
        focal(2.0),
        focal(0.5),
        additive_margin(2.0),
        smooth_error(1.0),
        generalised_cross_entropy(0.7),
        forward_correction(NOISE),
    ],
)
def test_a_baseline_is_finite_where_students_are_sure(loss):
    logits = (200 * torch.eye(CLASSES)).expand(1, -1, -1).clone().requires_grad_()
    for target in (torch.arange(CLASSES), (torch.arange(CLASSES) + 1) % CLASSES):
        value = loss(logits, target[None])
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_label_smoothing_is_that_of_torch(batch):
    logits, target = batch
    expected = F.cross_entropy(logits[0], target[0], label_smoothing=0.2)
    torch.testing.assert_close(label_smoothing(0.2)(logits, target)[0], expected)


def test_weights_of_classes():
    torch.testing.assert_close(inverse_frequency(COUNTS), torch.tensor([100 / 180, 100 / 90, 100 / 30]))
    # 1 + 0.5 = 1.5 and 1 + 0.5 + 0.25 = 1.75 rows that count, of two and of three
    two, three = effective_number(torch.tensor([2, 3]), 0.5).tolist()
    assert two / three == pytest.approx(1.75 / 1.5)
    assert two + three == pytest.approx(2)
    nearly = effective_number(COUNTS, 1 - 1e-9)
    torch.testing.assert_close(nearly * COUNTS, (nearly * COUNTS).mean().expand(3), rtol=1e-6, atol=0)
    absent = torch.tensor([5, 0])
    assert inverse_frequency(absent).isfinite().all()
    assert effective_number(absent, 0.9).isfinite().all()
    # A class without rows changes no weight of the others; its own is that of the rarest.
    more = torch.cat([COUNTS, torch.tensor([0])])
    for weights in (inverse_frequency, lambda counts: effective_number(counts, 0.99)):
        assert torch.equal(weights(more)[:-1], weights(COUNTS))
        assert weights(more)[-1] == weights(COUNTS).max()


def test_arms_by_regime():
    even, uneven = torch.tensor([50, 50, 50]), torch.tensor([90, 30, 10])
    assert list(baselines(torch.tensor([50, 50, 0]))) == list(baselines(even))
    plain = [
        "cross-entropy",
        "label smoothing 0.05",
        "label smoothing 0.1",
        "label smoothing 0.2",
        "focal loss, gamma 2",
        "additive-margin softmax, margin 2",
        "smooth 0/1 loss, slope 1",
        "generalised cross-entropy, q 0.7",
    ]
    by_class = ["cross-entropy, class-weighted", "cross-entropy, class-balanced, beta 0.999"]
    assert list(baselines(even)) == plain
    assert list(baselines(uneven)) == [*plain, *by_class]
    noisy = baselines(even, NOISE, dev_is_clean=True)
    assert list(noisy) == [
        *plain, "cross-entropy, dev only", "cross-entropy, half dev",
        "forward correction, true noise (oracle)",
    ]  # fmt: skip
    assert [name for name, arm in noisy.items() if arm.oracle] == ["forward correction, true noise (oracle)"]
