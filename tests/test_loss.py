"""dynamic_loss and DynamicLoss: values and derivatives against oracle and F.cross_entropy; every error."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import l2t
from l2t import ops, reference

STRUCTURES, LINKS = oracle.STRUCTURES, oracle.LINKS
REDUCTIONS = ("mean", "sum", "none")
N, C = 6, 4


class Case:
    """Random inputs of one structure; `inputs` are all that can be differentiated, in the order of `loss`."""

    def __init__(
        self, structure, link, dtype=torch.float64, *, n=N, c=C, seed=0, ignore_index=-100, scale_by=1.5
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.link, self.ignore_index = link, ignore_index
        self.target = torch.randint(c, (n,), generator=generator)
        self.target[1] = ignore_index
        parts = oracle.parts_of(structure, c, generator, dtype)
        plain = (scale_by * random(n, c), random(c), 1 + 0.3 * random(c), 0.5 + random(n).abs(), *parts)
        self.inputs = tuple(x.requires_grad_() for x in plain)

    def loss(self, logits, bias, scale, sample_weight, *parts, reduction="mean"):
        return l2t.dynamic_loss(
            logits,
            self.target,
            oracle.weight_of(parts),
            bias,
            scale,
            link=self.link,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=reduction,
        )

    def unweighted(self, logits, bias, scale, *parts, reduction="mean"):
        """Without sample weights, which takes the way past the dispatcher."""
        return self.loss(logits, bias, scale, None, *parts, reduction=reduction)

    def oracle(self, logits, bias, scale, sample_weight, *parts, reduction="mean"):
        return oracle.loss(
            logits,
            self.target,
            parts,
            bias,
            scale,
            link=self.link,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=reduction,
        )


def derivatives(fn, inputs, seed=0):
    """Value, first derivatives, and the derivatives of random combinations of these."""
    generator = torch.Generator().manual_seed(seed)

    def combined(tensors):
        return sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
            for x in tensors
        )

    value = fn(*inputs)
    first = torch.autograd.grad(combined([value]), inputs, create_graph=True)
    assert all(x.requires_grad for x in first)
    second = torch.autograd.grad(combined(first), inputs)
    return (value, *first, *second)


def assert_same(ours, theirs, **tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **tolerance)


# ---- against the oracle ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_agrees_with_the_oracle_to_the_second_derivative(structure, link, reduction, dtype):
    case = Case(structure, link, dtype)
    exact = [x.detach().double().requires_grad_() for x in case.inputs]
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    ours = derivatives(lambda *x: case.loss(*x, reduction=reduction), case.inputs)
    theirs = derivatives(lambda *x: case.oracle(*x, reduction=reduction), exact)
    assert all(x.dtype == dtype for x in ours)
    assert_same(ours, theirs, **tolerance)

    # Without sample weights eager mode takes another way.
    without = [x for i, x in enumerate(exact) if i != 3]
    ours = derivatives(
        lambda *x: case.unweighted(*x, reduction=reduction), [x for i, x in enumerate(case.inputs) if i != 3]
    )
    theirs = derivatives(
        lambda z, b, s, *parts: case.oracle(z, b, s, None, *parts, reduction=reduction), without
    )
    assert_same(ours, theirs, **tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [-100, 2], ids=["ignored", "ignored class"])
def test_the_way_past_the_dispatcher_changes_no_bit(monkeypatch, reduction, ignored):
    case = Case("full", "sigmoid", torch.float32, n=50, ignore_index=ignored)
    inputs = [x for i, x in enumerate(case.inputs) if i != 3]

    def run():
        return derivatives(lambda *x: case.unweighted(*x, reduction=reduction), inputs)

    direct = run()
    monkeypatch.setattr(ops, "unwatched", lambda: False)
    for a, b in zip(direct, run(), strict=True):
        assert torch.equal(a, b)


def test_parts_may_be_left_out_and_tensors_are_full_or_diagonal():
    case = Case("full", "sigmoid")
    logits, bias, scale, sample_weight, matrix = (x.detach() for x in case.inputs)
    target = case.target
    assert torch.equal(
        l2t.dynamic_loss(logits, target, matrix), l2t.dynamic_loss(logits, target, l2t.Full(matrix))
    )
    assert torch.equal(
        l2t.dynamic_loss(logits, target, bias), l2t.dynamic_loss(logits, target, l2t.Diagonal(bias))
    )
    for some in ({"bias": bias}, {"scale": scale}, {"sample_weight": sample_weight}, {}):
        expected = oracle.loss(logits, target, **some)
        torch.testing.assert_close(l2t.dynamic_loss(logits, target, **some), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shapes_strides_and_ignored_classes(data):
    """Class dimension anywhere in memory, any number of trailing dimensions, any ignore_index."""
    shape = data.draw(st.lists(st.integers(0, 3), min_size=0, max_size=3))
    n, c = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
    ignore_index = data.draw(st.sampled_from([-100, 0, c - 1, 255]))
    structure, link = data.draw(st.sampled_from(STRUCTURES)), data.draw(st.sampled_from(LINKS))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    full = torch.randn(n, c, *shape, generator=generator, dtype=torch.float64)
    order = data.draw(st.permutations(range(full.dim())))
    logits = full.permute(order).contiguous().permute([order.index(i) for i in range(full.dim())])
    target = torch.randint(c, (n, *shape), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = ignore_index
    parts = oracle.parts_of(structure, c, generator)
    loss = l2t.dynamic_loss(
        logits, target, oracle.weight_of(parts), link=link, ignore_index=ignore_index, reduction=reduction
    )
    rows = full.movedim(1, -1).reshape(target.numel(), c)
    expected = oracle.loss(
        rows, target.reshape(-1), parts, link=link, ignore_index=ignore_index, reduction="none"
    )
    if reduction == "none":
        expected = expected.reshape(target.shape)
    else:
        expected = expected.sum() / ((target != ignore_index).sum() if reduction == "mean" else 1)
    torch.testing.assert_close(loss, expected, equal_nan=True)


def test_a_negative_view_is_read_with_its_sign():
    logits = torch.randn(N, C, dtype=torch.complex128).conj().imag
    assert logits.is_neg()
    target = torch.randint(C, (N,))
    torch.testing.assert_close(l2t.dynamic_loss(logits, target), oracle.loss(logits.resolve_neg(), target))


# ---- special cases that are known losses ----

SHAPES = [(5, 4), (5, 4, 3), (2, 4, 3, 2), (4,), (0, 4), (2, 4, 0), (1, 1), (0, 0)]


@pytest.mark.parametrize("ignored", [-100, 1, 255, "all"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identity_link_is_cross_entropy(shape, dtype, reduction, ignored):
    generator = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
    num_classes = shape[1] if len(shape) > 1 else shape[0]
    rows = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    target = torch.randint(max(num_classes, 1), rows, generator=generator)
    ignore_index = -100 if ignored == "all" else ignored
    if target.numel():
        target.reshape(-1)[: None if ignored == "all" else 1] = ignore_index
    v = torch.randn(*shape, generator=generator)

    def twice_differentiated(fn, logits, **kwargs):
        loss = fn(logits, target, ignore_index=ignore_index, reduction=reduction, **kwargs)
        (first,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        assert first.requires_grad
        (second,) = torch.autograd.grad((first * v.to(logits.dtype)).sum(), logits)
        return loss, first, second

    ours = twice_differentiated(l2t.dynamic_loss, logits, link="identity")
    theirs = twice_differentiated(F.cross_entropy, logits)
    exact = twice_differentiated(F.cross_entropy, logits.detach().double().requires_grad_())
    for mine, torchs, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torchs.dtype == dtype
        assert mine.shape == torchs.shape
        if dtype in (torch.float64, torch.float32):
            torch.testing.assert_close(mine, torchs, equal_nan=True)
            continue
        # In half precision cross-entropy rounds more often on its way: it is further from the truth.
        assert torch.equal(mine.isnan(), torchs.isnan())
        error, allowed = ((x.double() - truth).nan_to_num().abs().sum() for x in (mine, torchs))
        assert error <= allowed + torch.finfo(dtype).eps * truth.nan_to_num().abs().sum()


@pytest.mark.parametrize("make", [l2t.Full.smoothed, l2t.LowRank.smoothed], ids=["full", "low-rank"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smoothed_weight_is_label_smoothing(make, reduction):
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (7,))
    target[2] = -100

    def ours(z):
        return l2t.dynamic_loss(
            z, target, make(5, 0.1, dtype=torch.float64), link="identity", reduction=reduction
        )

    def theirs(z):
        return F.cross_entropy(z, target, label_smoothing=0.1, reduction=reduction)

    assert_same(derivatives(ours, [logits]), derivatives(theirs, [logits]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weight_is_class_weight_of_cross_entropy(reduction):
    logits, target = torch.randn(7, 5), torch.randint(5, (7,))
    target[0] = -100
    weight = torch.rand(5)
    sample_weight = weight[target.clamp(min=0)]
    ours = l2t.dynamic_loss(logits, target, link="identity", sample_weight=sample_weight, reduction=reduction)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, weight=weight, reduction=reduction))


def test_sigmoid_of_the_identity_is_known_in_closed_form():
    logits, target = torch.randn(50, 9, dtype=torch.float64), torch.randint(9, (50,))
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(l2t.dynamic_loss(logits, target, reduction="none"), -p / (1 + p))


def test_masked_classes():
    """A logit of -inf takes a class out, as it does for cross-entropy."""
    logits = torch.randn(6, 5, dtype=torch.float64)
    logits[:, 2] = -float("inf")
    target = torch.tensor([0, 1, 3, 4, 0, 1])
    z = [logits.clone().requires_grad_() for _ in range(2)]
    ours, theirs = l2t.dynamic_loss(z[0], target, link="identity"), F.cross_entropy(z[1], target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, y)[0] for x, y in zip((ours, theirs), z, strict=True))
    )


@pytest.mark.parametrize("by", [torch.ops.l2t.value.default, reference.value], ids=["kernel", "reference"])
@pytest.mark.parametrize("structure", [l2t.Full, l2t.LowRank, l2t.Diagonal])
def test_masked_classes_of_a_matrix(structure, by):
    """What has no weight and no probability does not exist; the identity matrix is cross-entropy still."""
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 3, 4, 0, 1])
    logits[:, 2] = -float("inf")
    first, left, right = (*structure.identity(5, dtype=torch.float64), None, None)[:3]
    loss, _, d_logits = by(logits, target, first, left, right, None, None, 1, -100, 1, 1, 1, True)
    z = logits.clone().requires_grad_()
    theirs = F.cross_entropy(z, target)
    torch.testing.assert_close(loss.reshape(()), theirs.detach())
    torch.testing.assert_close(d_logits, torch.autograd.grad(theirs, z)[0])


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_ignored_rows_get_zeros_whatever_the_cotangent(factor):
    """As from cross-entropy: a sum over a batch of padding, divided by its tokens, is 0 / 0."""
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(5, 4, requires_grad=True)
    target = torch.full((3,), -100)
    for loss in (
        F.cross_entropy(F.linear(hidden, head), target, reduction="sum"),
        l2t.dynamic_loss(F.linear(hidden, head), target, link="identity", reduction="sum"),
        l2t.dynamic_linear_loss(hidden, head, target, link="identity", reduction="sum"),
    ):
        for grad in torch.autograd.grad(loss * factor, (hidden, head)):
            torch.testing.assert_close(grad, torch.zeros_like(grad))
    target[1] = 2
    logits = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(l2t.dynamic_loss(logits, target, reduction="sum") * factor, logits)
    assert torch.equal(grad[::2], torch.zeros(2, 5))
    assert not grad[1].isfinite().any()


def test_a_class_may_have_a_million_rows():
    """Its equal terms, added one after another in float32, would be off by half a percent."""
    logits, target = (
        torch.tensor([[0.3, -0.2]]).expand(1_000_000, 2),
        torch.zeros(1_000_000, dtype=torch.int64),
    )
    found = []
    for dtype in (torch.float32, torch.float64):
        tables = [torch.ones(2, dtype=dtype, requires_grad=True) for _ in range(3)]
        loss = l2t.dynamic_loss(logits.to(dtype), target, tables[0], tables[1], tables[2])
        found.append([x.double() for x in torch.autograd.grad(loss, tables)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=0)


def test_what_is_made_ahead_goes_by_checkpoints():
    """A checkpoint keeps nothing of size (N, C), and the gradient is the same to the bit."""
    head, target = torch.randn(3, 4), torch.tensor([0, 2])
    z = torch.randn(2, 4, requires_grad=True)

    def whole(z):
        return l2t.dynamic_loss(F.linear(z, head), target)

    def linear(z):
        return l2t.dynamic_linear_loss(z, head, target)

    for function, held in ((whole, "d_logits"), (linear, "ready")):
        found = []
        for loss in (function(z), torch.utils.checkpoint.checkpoint(function, z, use_reentrant=False)):
            nodes, kept = [loss.grad_fn], []
            for node in nodes:
                kept.append(getattr(node, held, None))
                nodes += [x for x, _ in node.next_functions if x is not None]
            found.append((any(x is not None for x in kept), torch.autograd.grad(loss, z)[0]))
        (plain, expected), (checkpointed, grad) = found
        assert plain
        assert not checkpointed
        assert torch.equal(grad, expected)


# ---- gradcheck: the real kernels in float64 ----


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradcheck(structure, link):
    case = Case(structure, link, n=4, c=3)
    for fn, inputs in (
        (case.loss, case.inputs),
        (case.unweighted, [x for i, x in enumerate(case.inputs) if i != 3]),
    ):
        assert gradcheck(fn, inputs, check_forward_ad=True, check_batched_grad=True)
        # gradgradcheck can pass on nothing where the first gradient lost its graph.
        first = torch.autograd.grad(fn(*inputs), inputs, create_graph=True)
        assert all(x.requires_grad for x in first)
        assert gradgradcheck(fn, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("wanted", range(8))
def test_any_subset_of_inputs_may_need_gradients(wanted):
    case = Case("low-rank", "sigmoid", n=3, c=3)
    inputs = [x.detach().requires_grad_(bool(wanted >> (i % 3) & 1)) for i, x in enumerate(case.inputs)]
    if any(x.requires_grad for x in inputs):
        assert gradcheck(case.loss, inputs)
        assert gradgradcheck(case.loss, inputs)
    else:
        assert not case.loss(*inputs).requires_grad


def test_no_gradient_where_nobody_asks():
    logits, target = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    with torch.no_grad():
        assert not l2t.dynamic_loss(logits, target).requires_grad
    with torch.inference_mode():
        inside = l2t.dynamic_loss(logits, target)
        alone = l2t.dynamic_loss(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(3))
    assert torch.equal(inside, l2t.dynamic_loss(logits, target))
    assert alone.isfinite()


def test_changing_an_input_before_backward_is_told():
    """Where backward would read it: the gradient to the logits alone was made before the change."""
    target = torch.randint(C, (N,))
    for weight in (None, torch.eye(C, requires_grad=True)):
        logits = torch.randn(N, C, requires_grad=True)
        expected = torch.autograd.grad(l2t.dynamic_loss(logits, target, weight), logits)
        scores = logits * 1
        loss = l2t.dynamic_loss(scores, target, weight)
        scores.mul_(2)
        if weight is None:
            assert torch.equal(*expected, *torch.autograd.grad(loss, logits))
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_a_second_backward_is_the_first(reduction, factor):
    """The gradient that the forward pass has made is handed on once, scaled, and made anew afterwards."""
    case = Case("full", "sigmoid", torch.float64)
    logits, weight = (case.inputs[i].detach().requires_grad_() for i in (0, -1))
    loss = factor * l2t.dynamic_loss(logits, case.target, weight, reduction=reduction).sum()
    runs = [torch.autograd.grad(loss, (logits, weight), retain_graph=True) for _ in range(3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)
    twice = torch.autograd.grad(loss, (logits, weight), create_graph=True)
    for a, b in zip(runs[0], twice, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-14, atol=1e-16)
        assert b.requires_grad
    loss = l2t.dynamic_loss(logits, case.target, weight)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_the_first_gradient_is_nobody_elses():
    """What backward hands on may be changed by whoever gets it."""
    logits, target = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    loss = l2t.dynamic_loss(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], kept)


# ---- the gradient over the logits ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_may_overwrite_the_logits(dtype, reduction):
    hidden, target = torch.randn(N, C, dtype=dtype), torch.randint(C, (N,))
    weight = torch.eye(C, dtype=torch.float64 if dtype is torch.float64 else torch.float32)

    def run(inplace):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = leaves[0] * 1
        loss = l2t.dynamic_loss(
            logits, target, leaves[1], reduction=reduction, inplace_backward=inplace
        ).sum()
        return logits, (loss.detach(), *torch.autograd.grad(loss, leaves))

    logits, ours = run(True)
    for a, b in zip(ours, run(False)[1], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(logits.detach(), ours[1]), "the gradient lies elsewhere"


def test_overwriting_takes_whatever_else_is_not_contiguous_and_says_what_is_wrong():
    leaf, wide = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 1, 2, 2])
    for options in (
        {"target": wide[::2]},
        {"weight": torch.randn(3, 3).t()},
        {"bias": torch.zeros(()).expand(3)},
        {"scale": torch.ones(6)[::2]},
    ):
        given = {"target": wide[::2].contiguous(), **options}
        found = [
            torch.autograd.grad(l2t.dynamic_loss(leaf * 1, inplace_backward=inplace, **given), leaf)[0]
            for inplace in (True, False)
        ]
        torch.testing.assert_close(*found)
    with pytest.raises(IndexError, match=r"target must be in \[0, 3\)"):
        l2t.dynamic_loss(leaf * 1, torch.tensor([0, 1, 2, 7]), inplace_backward=True)
    none = torch.randn(0, 0, requires_grad=True)
    l2t.dynamic_loss(none * 1, wide[:0], reduction="sum", inplace_backward=True).backward()
    assert none.grad.shape == (0, 0)


def test_whoever_reads_overwritten_logits_is_told():
    hidden, target = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    logits = hidden * 1
    other = logits.exp().sum()  # reads its result in backward
    square = (logits**2).sum()  # reads its input
    l2t.dynamic_loss(logits, target, inplace_backward=True).backward(retain_graph=True)
    other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    loss = l2t.dynamic_loss(hidden * 1, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(C,), (2, C, 1), (2 * C,)], ids=str)
def test_a_leaf_is_not_overwritten_through_a_view(shape):
    leaf = torch.randn(shape, requires_grad=True)
    logits = leaf.view(2, C) if shape == (2 * C,) else leaf
    target = torch.zeros(logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else (), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must be a contiguous \(N, C\) result of the student"):
        l2t.dynamic_loss(logits, target, inplace_backward=True)


def test_logits_that_must_not_be_overwritten_are_refused():
    leaf, target = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    sentence = r"logits must be a contiguous \(N, C\) result of the student"
    for logits in (leaf, (torch.randn(C, N, requires_grad=True) * 1).t()):
        with pytest.raises(ValueError, match=sentence):
            l2t.dynamic_loss(logits, target, inplace_backward=True)
    with pytest.raises(ValueError, match=sentence):
        torch.func.grad(lambda z: l2t.dynamic_loss(z * 1, target, inplace_backward=True))(leaf.detach())
    loss = l2t.dynamic_loss(leaf * 1, target, inplace_backward=True)
    with pytest.raises(NotImplementedError, match="inplace_backward must be False where second derivatives"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# ---- torch.func, and second derivatives by every route ----


def all_hessians(fn, inputs):
    """By forward over reverse, reverse over reverse, reverse over forward, and plain autograd."""
    at = tuple(range(len(inputs)))
    inputs = tuple(x.detach() for x in inputs)
    func = torch.func
    return {
        "forward over reverse": func.hessian(fn, argnums=at)(*inputs),
        "reverse over reverse": func.jacrev(func.jacrev(fn, argnums=at), argnums=at)(*inputs),
        "reverse over forward": func.jacrev(func.jacfwd(fn, argnums=at), argnums=at)(*inputs),
        "autograd": torch.autograd.functional.hessian(fn, inputs),
    }


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_route_to_the_hessian(structure):
    case = Case(structure, "sigmoid", n=3, c=3)
    expected = torch.autograd.functional.hessian(case.oracle, tuple(x.detach() for x in case.inputs))
    for route, hessian in all_hessians(case.loss, case.inputs).items():
        for row, expected_row in zip(hessian, expected, strict=True):
            for block, expected_block in zip(row, expected_row, strict=True):
                torch.testing.assert_close(block, expected_block, msg=lambda m, route=route: f"{route}: {m}")


def test_the_value_beside_a_gradient_is_differentiated_too():
    """What an inner transform returns besides its gradient belongs to the outer one."""
    case = Case("full", "sigmoid")
    logits, *rest = case.inputs
    expected = torch.autograd.grad(case.loss(*case.inputs), logits)[0]

    def value(z):
        return torch.func.grad_and_value(case.loss)(z, *rest)[1]

    torch.testing.assert_close(torch.func.grad(value)(logits.detach()), expected)
    _, tangent = torch.func.jvp(value, (logits.detach(),), (torch.ones_like(logits),))
    torch.testing.assert_close(tangent, expected.sum())


def test_what_a_transform_leaves_behind_can_be_differentiated():
    case = Case("full", "sigmoid")
    logits, *rest = case.inputs
    factor = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    _, pull = torch.func.vjp(lambda z: case.loss(z, *rest), logits)
    (outside,) = pull(factor)
    (expected,) = torch.autograd.grad(case.loss(*case.inputs), logits, factor, create_graph=True)
    for a, b in zip(
        torch.autograd.grad(outside.square().sum(), (logits, factor)),
        torch.autograd.grad(expected.square().sum(), (logits, factor)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)

    leaked = []
    torch.func.grad(lambda z: leaked.append(2 * z) or case.loss(z, *rest))(logits)
    (gradient,) = torch.autograd.grad(case.loss(leaked[0], *rest), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(case.loss(2 * logits, *rest), logits)[0])


def test_no_grad_within_a_transform_is_a_constant_as_it_is_for_torch():
    case = Case("none", "sigmoid")
    logits, *rest = (x.detach() for x in case.inputs)

    def fn(z):
        with torch.no_grad():
            constant = case.loss(z, *rest)
        return constant * z.sum()

    value = case.loss(logits, *rest)
    torch.testing.assert_close(torch.func.grad(fn)(logits), value.expand(N, C))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_per_sample_gradients(structure):
    case = Case(structure, "sigmoid")
    logits, bias, scale, _, *parts = (x.detach() for x in case.inputs)

    def one(z, y, bias, scale, *parts):
        return l2t.dynamic_loss(z, y, oracle.weight_of(parts), bias, scale)

    tables = (bias, scale, *parts)
    argnums = (0, *range(2, 2 + len(tables)))
    keep = case.target != case.ignore_index
    logits, target = logits[keep], case.target[keep]
    batched = torch.vmap(torch.func.grad(one, argnums=argnums), in_dims=(0, 0, *[None] * len(tables)))(
        logits, target, *tables
    )
    for i in range(len(target)):
        alone = torch.func.grad(one, argnums=argnums)(logits[i], target[i], *tables)
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_students_side_by_side(structure, reduction):
    """vmap over coefficients and students, differentiated twice from outside, is a loop over students."""
    cases = [Case(structure, "sigmoid", seed=seed) for seed in range(3)]
    stacked = [
        torch.stack(x).detach().requires_grad_() for x in zip(*(case.inputs for case in cases), strict=True)
    ]
    targets = torch.stack([case.target for case in cases])

    def one(target, logits, bias, scale, sample_weight, *parts):
        return l2t.dynamic_loss(
            logits,
            target,
            oracle.weight_of(parts),
            bias,
            scale,
            sample_weight=sample_weight,
            reduction=reduction,
        )

    together = derivatives(lambda *x: torch.vmap(one)(targets, *x), stacked)
    looped = derivatives(
        lambda *x: torch.stack([one(targets[i], *(part[i] for part in x)) for i in range(3)]), stacked
    )
    assert_same(together, looped, rtol=1e-10, atol=1e-12)


def over_students(loss):
    """Name to what vmap makes of a loss (of logits) that is batched at an outer level only, or at both."""

    def jvp(fn, z, v):
        return torch.func.jvp(fn, (z,), (v,))[1]

    tangents = torch.randn(5, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    five = torch.arange(5.0, dtype=torch.float64)
    gradient = torch.func.grad(loss)
    return {
        "alone": lambda z: torch.vmap(lambda v: loss(z))(five),
        "times": lambda z: torch.vmap(lambda v: loss(z) * v)(five),
        "gradient": lambda z: torch.func.grad(lambda z: torch.vmap(lambda v: loss(z) * v)(five).sum())(z),
        "jacobian": torch.func.jacfwd(loss),
        "hessian": torch.func.hessian(loss),
        "hessian, reverse": torch.func.jacrev(torch.func.jacrev(loss)),
        "tangents": lambda z: torch.vmap(lambda v: jvp(loss, z, v))(tangents),
        "products": lambda z: torch.vmap(lambda v: jvp(gradient, z, v))(tangents),
    }


@pytest.mark.parametrize("name", over_students(F.cross_entropy))
def test_an_inner_vmap_over_nothing_of_the_loss(name):
    case = Case("none", "identity")
    students = torch.stack([case.inputs[0].detach() * factor for factor in (1.0, 2.0, -1.0)])
    ours = over_students(lambda z: l2t.dynamic_loss(z, case.target, link="identity"))[name]
    theirs = over_students(lambda z: F.cross_entropy(z, case.target))[name]
    torch.testing.assert_close(torch.vmap(ours)(students), torch.vmap(theirs)(students))
    nested = torch.vmap(torch.vmap(ours))(students[None])
    torch.testing.assert_close(nested, torch.vmap(theirs)(students)[None])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_hessians_over_some_of_the_arguments(structure):
    """To logits and tables, where targets, logits or tables alone are a student's own."""
    case = Case(structure, "sigmoid")
    logits, bias, _, _, *parts = (x.detach() for x in case.inputs)
    arguments = (case.target, logits, bias, *parts)

    def one(target, logits, bias, *parts):
        return l2t.dynamic_loss(logits, target, oracle.weight_of(parts), bias)

    at = tuple(range(1, len(arguments)))
    for own in (0, *at):
        each = [arguments[own], arguments[own].flip(0)]
        dims = [0 if i == own else None for i in range(len(arguments))]
        given = [torch.stack(each) if i == own else x for i, x in enumerate(arguments)]
        together = torch.vmap(torch.func.hessian(one, at), tuple(dims))(*given)
        for b, x in enumerate(each):
            alone = torch.func.hessian(one, at)(*(x if i == own else y for i, y in enumerate(arguments)))
            for rows, expected in zip(together, alone, strict=True):
                for block, block_alone in zip(rows, expected, strict=True):
                    torch.testing.assert_close(block[b], block_alone)


def test_forward_mode_and_jvp():
    case = Case("low-rank", "log-sigmoid")
    inputs = tuple(x.detach() for x in case.inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    value, tangent = torch.func.jvp(case.loss, inputs, tangents)
    gradients = torch.autograd.grad(case.loss(*case.inputs), case.inputs)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(value, case.loss(*inputs))
    torch.testing.assert_close(tangent, expected)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(case.loss(*dual)).tangent, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reverse_over_forward_of_a_loss_whose_value_nobody_wants(reduction):
    """Its cotangent is torch's promise of zeros, which has no memory."""
    target, factors = torch.randint(C, (N,)), torch.randn(N)
    logits, tangent = torch.randn(N, C), torch.randn(N, C)

    def along(loss):
        def total(z):
            return (loss(z, target, reduction=reduction) * factors).sum()

        return torch.func.grad(lambda z: torch.func.jvp(total, (z,), (tangent,))[1])(logits)

    ours = along(lambda z, y, **options: l2t.dynamic_loss(z, y, link="identity", **options))
    torch.testing.assert_close(ours, along(F.cross_entropy))


def test_promised_zeros_are_zeros():
    promised, target = torch._efficientzerotensor(N, C), torch.arange(N) % C
    torch.testing.assert_close(
        l2t.dynamic_loss(promised, target), l2t.dynamic_loss(torch.zeros(N, C), target)
    )
    nothing = torch._efficientzerotensor(N, dtype=torch.int64)
    logits = torch.randn(N, C)
    assert torch.equal(l2t.dynamic_loss(logits, nothing), l2t.dynamic_loss(logits, torch.zeros_like(target)))


def test_linearize():
    case = Case("full", "sigmoid")
    logits, *rest = (x.detach() for x in case.inputs)
    _, push = torch.func.linearize(lambda z: case.loss(z, *rest), logits)
    expected = torch.func.jvp(lambda z: case.loss(z, *rest), (logits,), (torch.ones_like(logits),))[1]
    torch.testing.assert_close(push(torch.ones_like(logits)), expected)


# ---- what is not there says so ----


def test_a_third_derivative_raises():
    case = Case("full", "sigmoid", n=3, c=3)
    logits = case.inputs[0]
    (first,) = torch.autograd.grad(case.loss(*case.inputs), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits, create_graph=True)
    assert second.requires_grad
    with pytest.raises(NotImplementedError, match="must be 1 or 2, got a third derivative"):
        torch.autograd.grad(second.sum(), logits)
    rest = tuple(x.detach() for x in case.inputs[1:])

    def fn(z):
        return case.loss(z, *rest)

    z = logits.detach()
    for third in (
        lambda: torch.func.jacrev(torch.func.hessian(fn))(z),
        lambda: torch.func.jacfwd(torch.func.jacrev(torch.func.jacrev(fn)))(z),
    ):
        with pytest.raises(NotImplementedError, match="got a third derivative"):
            third()


def test_forward_over_forward_raises():
    case = Case("none", "sigmoid", n=3, c=3)
    rest = tuple(x.detach() for x in case.inputs[1:])
    with pytest.raises(NotImplementedError, match="got forward over forward"):
        torch.func.jacfwd(torch.func.jacfwd(lambda z: case.loss(z, *rest)))(case.inputs[0].detach())


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_is_storage(structure, dtype):
    """Computed in float32, returned in the dtype of logits; coefficients in either."""
    case = Case(structure, "sigmoid", dtype, n=64)
    exact = [x.detach().float().requires_grad_() for x in case.inputs]
    mixed = [case.inputs[0], *exact[1:]]
    expected = case.loss(*exact)
    gradients = torch.autograd.grad(expected, exact)
    for inputs in (case.inputs, mixed):
        loss = case.loss(*inputs)
        assert loss.dtype == dtype
        assert torch.equal(loss, expected.to(dtype))
        for gradient, x, wide in zip(torch.autograd.grad(loss, inputs), inputs, gradients, strict=True):
            assert gradient.dtype == x.dtype
            torch.testing.assert_close(gradient, wide.to(x.dtype))


def test_a_scaled_loss_keeps_gradients_that_float16_could_not_hold():
    """What a GradScaler is for: a mean over many rows and classes has a gradient near 1e-8 here."""
    logits, target = torch.randn(512, 4000).half(), torch.randint(4000, (512,))
    exact, ours = logits.double().requires_grad_(), logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(exact, target), exact)
    with torch.autocast("cpu", torch.float16):
        loss = l2t.dynamic_loss(ours, target, link="identity")
    (found,) = torch.autograd.grad(loss * 2.0**16, ours)
    others = torch.ones_like(expected).scatter_(1, target.unsqueeze(1), 0.0)
    off = (found.double() / 2**16 - expected) * others
    assert off.norm() <= 1e-3 * (expected * others).norm()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_autocast_computes_as_cross_entropy_does(dtype, amp):
    logits, target = torch.randn(N, C).to(dtype).requires_grad_(), torch.randint(C, (N,))
    with torch.autocast("cpu", dtype=amp):
        ours, theirs = l2t.dynamic_loss(logits, target, link="identity"), F.cross_entropy(logits, target)
        half = torch.ones(C, dtype=torch.float64 if dtype == torch.float64 else amp)
        mixed = l2t.dynamic_loss(logits, target, bias=half, sample_weight=half.new_ones(N))
    assert ours.dtype == theirs.dtype == mixed.dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)))


def test_byte_targets_as_cross_entropy_takes_them():
    logits = torch.randn(4, 3)
    target = torch.tensor([0, 2, 255, 1], dtype=torch.uint8)
    ours = l2t.dynamic_loss(logits, target, link="identity", ignore_index=255)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, ignore_index=255))


# ---- accuracy: not worse than plain torch in the same dtype ----


@pytest.mark.parametrize("kind", ["random", "trained", "extreme"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_error_is_not_above_plain_torch(structure, link, kind):
    """Over twelve seeds and all derivatives: that of one derivative hangs on a few rows and is luck."""
    errors = torch.stack([errors_of(structure, link, kind, seed) for seed in range(12)])
    ours, plain = errors.square().mean(0).sqrt() + 1e-8
    assert (ours / plain).log().mean().exp() <= 1.1, (ours / plain).tolist()
    assert (ours / plain).max() <= 2, (ours / plain).tolist()


def errors_of(structure, link, kind, seed):
    """Relative errors in float32, [ours or plain torch, value and derivatives]."""
    size = {"random": 1.0, "trained": 4.0, "extreme": 30.0}[kind]
    case = Case(structure, link, torch.float32, n=200, c=13, scale_by=size, seed=seed)
    if kind == "trained":
        keep = case.target != case.ignore_index
        with torch.no_grad():
            case.inputs[0][keep, case.target[keep]] += 8
    where = [x for i, x in enumerate(case.inputs) if i != 3]

    def plain(logits, bias, scale, *parts):
        tables = (*parts, None, None, None)[:3]
        return reference.rows(logits, case.target, *tables, bias, scale, LINKS.index(link), -100, 1)

    exact = derivatives(plain, [x.detach().double().requires_grad_() for x in where])
    results = derivatives(lambda *x: case.unweighted(*x, reduction="none"), where), derivatives(plain, where)
    return torch.tensor(
        [
            [
                (x.double() - truth).norm() / (truth.norm() + 1e-300)
                for x, truth in zip(each, exact, strict=True)
            ]
            for each in results
        ]
    )


# ---- the module ----


@pytest.mark.parametrize("structure", STRUCTURES)
def test_module_is_the_function(structure):
    case = Case(structure, "log-sigmoid")
    logits, bias, scale, sample_weight, *parts = (x.detach() for x in case.inputs)
    weight = oracle.weight_of(parts)
    module = l2t.DynamicLoss(weight, bias, scale, link="log-sigmoid", ignore_index=-100, reduction="sum")
    expected = l2t.dynamic_loss(
        logits,
        case.target,
        weight,
        bias,
        scale,
        link="log-sigmoid",
        sample_weight=sample_weight,
        reduction="sum",
    )
    assert torch.equal(module(logits, case.target, sample_weight), expected)
    assert type(module.coefficients()) is type(weight)
    module(logits, case.target).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert len(list(module.parameters())) == len(parts) + 2


def test_module_state():
    names = {
        "full": (l2t.Full.identity(3), {"weight"}),
        "diagonal": (l2t.Diagonal.identity(3), {"diagonal"}),
        "low-rank": (l2t.LowRank.identity(3, 2), {"diagonal", "left", "right"}),
    }
    for weight, keys in names.values():
        module = l2t.DynamicLoss(weight, bias=torch.zeros(3))
        assert set(module.state_dict()) == {*keys, "bias"}
        other = l2t.DynamicLoss(type(weight)(*(torch.full_like(x, 7) for x in weight)), bias=torch.ones(3))
        other.load_state_dict(module.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(other.coefficients(), weight, strict=True))
    assert l2t.DynamicLoss(torch.eye(3)).coefficients()[0].shape == (3, 3)
    assert isinstance(l2t.DynamicLoss(torch.ones(3)).coefficients(), l2t.Diagonal)
    assert l2t.DynamicLoss(l2t.Full.identity(3)).double().weight.dtype == torch.float64
    for trainable in (True, False):  # a copy is laid out as the kernels read it
        assert l2t.DynamicLoss(torch.ones(3, 3).tril().t(), trainable=trainable).weight.is_contiguous()
    half = torch.zeros(3, dtype=torch.bfloat16)  # with logits of bfloat16, in whichever order
    l2t.DynamicLoss(l2t.Diagonal.identity(3), bias=half)
    l2t.DynamicLoss(l2t.Diagonal(half), bias=torch.zeros(3))


def test_module_copies_tensors_and_shares_parameters():
    tensor, parameter = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    module = l2t.DynamicLoss(l2t.Diagonal(parameter), bias=tensor)
    assert module.diagonal is parameter
    tensor.add_(1)
    assert torch.equal(module.bias, torch.ones(3))
    fixed = l2t.DynamicLoss(l2t.Diagonal(parameter), bias=tensor, trainable=False)
    assert not list(fixed.parameters())
    assert set(fixed.state_dict()) == {"diagonal", "bias"}
    assert not fixed(torch.zeros(2, 3), torch.tensor([0, 1])).requires_grad


def test_module_says_what_it_is():
    assert repr(l2t.DynamicLoss()) == "DynamicLoss(identity, link='sigmoid')"
    module = l2t.DynamicLoss(
        l2t.LowRank.identity(5, 2), scale=torch.ones(5), ignore_index=0, reduction="sum", trainable=False
    )
    said = "link='sigmoid', ignore_index=0, reduction='sum', trainable=False"
    assert repr(module) == f"DynamicLoss(LowRank, num_classes=5, rank=2, scale, {said})"
    fixed = l2t.DynamicLoss(bias=torch.ones(5), trainable=False)
    assert repr(fixed) == "DynamicLoss(identity, bias, link='sigmoid', trainable=False)"


# ---- errors ----

Z, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
META = torch.ones(3, device="meta")

ERRORS = {
    "sparse logits": (
        (Z.to_sparse(), Y),
        {},
        TypeError,
        "logits must be a dense tensor, got a sparse_coo one",
    ),
    "sparse weight": (
        (Z, Y, torch.eye(3).to_sparse()),
        {},
        TypeError,
        "weight must be a dense tensor, got a sparse_coo one",
    ),
    "sparse bias": (
        (Z, Y),
        {"bias": torch.ones(3).to_sparse()},
        TypeError,
        "bias must be a dense tensor, got a sparse_coo one",
    ),
    "nested logits": (
        (torch.nested.nested_tensor(list(Z), layout=torch.jagged), Y),
        {},
        TypeError,
        "logits must be a dense tensor, got a nested one. Convert it with .to_dense(), or put",
    ),
    "ignore_index None": (
        (Z, Y),
        {"ignore_index": None},
        TypeError,
        "ignore_index must be an integer of 64 bits, got None",
    ),
    "ignore_index 2**63": (
        (Z, Y),
        {"ignore_index": 2**63},
        TypeError,
        "ignore_index must be an integer of 64 bits, got 9223372036854775808",
    ),
    "scalar target of one row": (
        (Z[:1], Y[0]),
        {},
        ValueError,
        "target must be of shape (1,) for logits of shape (1, 3), got shape ()",
    ),
    "scalar bias of one class": (
        (Z[:, :1], Y * 0),
        {"bias": torch.tensor(1.0)},
        ValueError,
        "bias must be of shape (1,) for logits",
    ),
    "integer logits": (
        (Z.long(), Y),
        {},
        TypeError,
        "logits must be a floating-point tensor, got shape (4, 3), int64",
    ),
    "complex logits": (
        (Z.cfloat(), Y),
        {},
        TypeError,
        "logits must be a floating-point tensor, got shape (4, 3), compl",
    ),
    "logits no tensor": (([1.0], Y), {}, TypeError, "logits must be a floating-point tensor, got list"),
    "scalar logits": (
        (Z[0, 0], Y),
        {},
        ValueError,
        "logits must be of shape (N, C), (N, C, d1, ...) or (C,), got",
    ),
    "probabilities": (
        (Z, Z.softmax(1)),
        {},
        TypeError,
        "target must be class indices, got shape (4, 3), float32",
    ),
    "int32 target": (
        (Z, Y.int()),
        {},
        TypeError,
        "target must be an int64 or uint8 tensor, got shape (4,), int32",
    ),
    "target no tensor": ((Z, [0, 1]), {}, TypeError, "target must be an int64 or uint8 tensor, got list"),
    "target shape": (
        (Z, Y[:3]),
        {},
        ValueError,
        "target must be of shape (4,) for logits of shape (4, 3), got",
    ),
    "target of images": (
        (Z[..., None], Y),
        {},
        ValueError,
        "target must be of shape (4, 1) for logits of shape (4, 3, 1)",
    ),
    "target of one": ((Z[0], Y), {}, ValueError, "target must be of shape () for logits of shape (3,), got"),
    "target device": (
        (Z, Y.to("meta")),
        {},
        ValueError,
        "target must be on the device of logits, cpu, got meta",
    ),
    "class too large": (
        (Z, Y + 1),
        {},
        IndexError,
        "target must be in [0, 3) or ignore_index=-100, got 3 at position 2",
    ),
    "class negative": (
        (Z, Y - 1),
        {},
        IndexError,
        "target must be in [0, 3) or ignore_index=-100, got -1 at position 0",
    ),
    "no classes": ((Z[:, :0], Y), {}, IndexError, "target must be in [0, 0) or ignore_index=-100, got 0"),
    "link": (
        (Z, Y),
        {"link": "tanh"},
        ValueError,
        "link must be one of sigmoid, identity, log-sigmoid, got 'tanh'",
    ),
    "link in a list": (
        (Z, Y),
        {"link": ["identity"]},
        ValueError,
        "link must be one of sigmoid, identity, log-sigmoid, got ['identity']",
    ),
    "reduction in a list": (
        (Z, Y),
        {"reduction": ["mean"]},
        ValueError,
        "reduction must be one of mean, sum, none, got ['mean']",
    ),
    "reduction": (
        (Z, Y),
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of mean, sum, none, got 'avg'",
    ),
    "weight type": (
        (Z, Y, [1.0]),
        {},
        TypeError,
        "weight must be l2t.Full, l2t.Diagonal, l2t.LowRank, a tensor or None, got list",
    ),
    "weight shape": (
        (Z, Y, torch.ones(4)),
        {},
        ValueError,
        "weight must be of shape (3, 3) or (3,), got",
    ),
    "full shape": (
        (Z, Y, l2t.Full(torch.ones(3))),
        {},
        ValueError,
        "weight.weight must be of shape (3, 3) for logits",
    ),
    "diagonal shape": (
        (Z, Y, l2t.Diagonal(torch.eye(3))),
        {},
        ValueError,
        "weight.diagonal must be of shape (3,) for",
    ),
    "low-rank diagonal": (
        (Z, Y, l2t.LowRank(torch.ones(4), torch.ones(3, 1), torch.ones(3, 1))),
        {},
        ValueError,
        "weight.diagonal must be of",
    ),
    "low-rank ranks": (
        (Z, Y, l2t.LowRank(torch.ones(3), torch.ones(3, 1), torch.ones(3, 2))),
        {},
        ValueError,
        "weight.right must be of shape (3, 1)",
    ),
    "low-rank left": (
        (Z, Y, l2t.LowRank(torch.ones(3), torch.ones(3), torch.ones(3))),
        {},
        ValueError,
        "weight.left must be of shape (3, 3)",
    ),
    "part no tensor": ((Z, Y, l2t.Full(3.0)), {}, TypeError, "weight.weight must be a tensor, got float"),
    "left no tensor": (
        (Z, Y, l2t.LowRank(torch.ones(3), None, None)),
        {},
        TypeError,
        "weight.left must be a tensor, got NoneType",
    ),
    "bias shape": (
        (Z, Y),
        {"bias": torch.ones(4)},
        ValueError,
        "bias must be of shape (3,) for logits of shape (4, 3)",
    ),
    "bias number": ((Z, Y), {"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "scale dtype": (
        (Z, Y),
        {"scale": torch.ones(3).double()},
        TypeError,
        "scale must be float32 with float32 logits, got",
    ),
    "half bias": (
        (Z, Y),
        {"bias": torch.ones(3).half()},
        TypeError,
        "bias must be float32 with float32 logits, got",
    ),
    "bias of half": (
        (Z.half(), Y),
        {"bias": torch.ones(3).bfloat16()},
        TypeError,
        "bias must be float16 or float32 with float16",
    ),
    "bias of double": (
        (Z.double(), Y),
        {"bias": torch.ones(3)},
        TypeError,
        "bias must be float64 with float64 logits",
    ),
    "integer weight": (
        (Z, Y, torch.ones(3).long()),
        {},
        TypeError,
        "weight must be float32 with float32 logits, got",
    ),
    "bias device": (
        (Z, Y),
        {"bias": META},
        ValueError,
        "bias must be on the device of logits, cpu, got meta",
    ),
    "sample shape": (
        (Z, Y),
        {"sample_weight": torch.ones(3)},
        ValueError,
        "sample_weight must be of shape (4,) for logits",
    ),
    "sample dtype": (
        (Z, Y),
        {"sample_weight": Y},
        TypeError,
        "sample_weight must be float32 with float32 logits, got",
    ),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(args, kwargs, error, sentence):
    with pytest.raises(error) as told:
        l2t.dynamic_loss(*args, **kwargs)
    assert sentence in str(told.value)
    assert str(told.value).startswith("l2t.dynamic_loss: ")
    assert "\n" not in str(told.value)


def test_double_coefficients_under_autocast_still_raise():
    with torch.autocast("cpu"), pytest.raises(TypeError, match="bias must be float32 with float32 logits"):
        l2t.dynamic_loss(Z, Y, bias=torch.ones(3).double())


def test_errors_of_the_module():
    with pytest.raises(ValueError, match="link must be one of sigmoid, identity, log-sigmoid, got 'relu'"):
        l2t.DynamicLoss(link="relu")
    with pytest.raises(TypeError, match=r"weight must be l2t.Full, .* or None, got str. Wrap the"):
        l2t.DynamicLoss("full")
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        l2t.DynamicLoss(reduction="max")
    with pytest.raises(TypeError, match=r"ignore_index must be an integer of 64 bits, got 0\.5"):
        l2t.DynamicLoss(ignore_index=0.5)
    with pytest.raises(ValueError, match="coefficients must be parameters or tensors without gradient"):
        l2t.DynamicLoss(torch.ones(3, requires_grad=True) * 2)
    with pytest.raises(
        TypeError, match="coefficients must be floating-point tensors with an entry for each class"
    ):
        l2t.DynamicLoss(l2t.Diagonal([1.0, 2.0]))
    with pytest.raises(TypeError, match="coefficients must be floating-point tensors"):
        l2t.DynamicLoss(l2t.Full(None))
    with pytest.raises(
        TypeError, match="coefficients must be floating-point tensors with an entry for each class"
    ):
        l2t.DynamicLoss(bias=torch.ones(3).long())
    with pytest.raises(ValueError, match=r"bias must be of shape \(3,\)"):
        l2t.DynamicLoss(l2t.Diagonal.identity(3), bias=torch.ones(4))
    with pytest.raises(TypeError, match="scale must be float32"):
        l2t.DynamicLoss(l2t.Diagonal.identity(3), scale=torch.ones(3).double())


def test_nothing_warns():
    logits, target = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first,) = torch.autograd.grad(l2t.dynamic_loss(logits, target), logits, create_graph=True)
        torch.autograd.grad(first.sum(), logits)
