"""Records of coefficients: start values, dense form, numbers of parameters, pytrees."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import l2t

RECORDS = {
    "full": l2t.Full(torch.arange(9.0).reshape(3, 3)),
    "diagonal": l2t.Diagonal(torch.arange(3.0)),
    "low-rank": l2t.LowRank(torch.arange(3.0), torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)),
}


@pytest.mark.parametrize(
    "weight",
    [l2t.Full.identity(4), l2t.Diagonal.identity(4), l2t.LowRank.identity(4, 2), l2t.LowRank.identity(4, 0)],
    ids=["full", "diagonal", "low-rank", "rank 0"],
)
def test_identity_is_the_identity(weight):
    assert torch.equal(weight.dense(), torch.eye(4))
    assert weight.num_classes == 4


def test_low_rank_starts_where_it_can_learn_and_is_seeded():
    make = lambda: l2t.LowRank.identity(5, 3, generator=torch.Generator().manual_seed(1))  # noqa: E731
    weight = make()
    assert weight.rank == 3
    assert weight.left.eq(0).all()
    assert weight.right.ne(0).all()
    assert torch.equal(weight.right, make().right)


@pytest.mark.parametrize("cls", [l2t.Full, l2t.LowRank])
def test_smoothed(cls):
    expected = 0.8 * torch.eye(5, dtype=torch.float64) + 0.2 / 5
    torch.testing.assert_close(cls.smoothed(5, 0.2, dtype=torch.float64).dense(), expected)
    for percent in (10.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="smoothing must be between 0 and 1"):
            cls.smoothed(5, percent)


def test_dense():
    assert torch.equal(RECORDS["full"].dense(), RECORDS["full"].weight)
    assert torch.equal(RECORDS["diagonal"].dense(), torch.diag(torch.arange(3.0)))
    low = RECORDS["low-rank"]
    assert torch.equal(low.dense(), torch.diag(low.diagonal) + low.left @ low.right.T)


@pytest.mark.parametrize(("name", "count"), [("full", 9), ("diagonal", 3), ("low-rank", 15)])
def test_num_parameters(name, count):
    assert RECORDS[name].num_parameters == count


@pytest.mark.parametrize("make", [l2t.Full.identity, l2t.Diagonal.identity, l2t.LowRank.identity])
def test_dtype_and_device(make):
    for part in make(3, dtype=torch.float64, device="meta"):
        assert part.dtype == torch.float64
        assert part.device.type == "meta"


@pytest.mark.parametrize("weight", RECORDS.values(), ids=RECORDS)
def test_records_are_pytrees(weight):
    leaves, tree = pytree.tree_flatten(weight)
    assert len(leaves) == len(weight)
    doubled = pytree.tree_map(lambda x: 2 * x, weight)
    assert type(doubled) is type(weight)
    assert torch.equal(doubled[0], 2 * weight[0])
    assert type(pytree.tree_unflatten(leaves, tree)) is type(weight)


def test_functional_transforms_take_records():
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    grads = torch.func.grad(lambda weight: l2t.dynamic_loss(logits, target, weight))(RECORDS["low-rank"])
    assert isinstance(grads, l2t.LowRank)
    stack = l2t.Diagonal(torch.stack([RECORDS["diagonal"].diagonal, torch.ones(3)]))
    losses = torch.vmap(lambda weight: l2t.dynamic_loss(logits, target, weight))(stack)
    assert losses[1] == l2t.dynamic_loss(logits, target)
