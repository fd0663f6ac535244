"""The dispatcher ops: kernels against the definition, registrations, vmap, devices without a kernel."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import l2t
from l2t import ops, reference

STRUCTURES, LINKS = oracle.STRUCTURES, oracle.LINKS
N, C = 9, 5


NONE, MEAN, SUM = ops.NONE, ops.MEAN, ops.SUM


def case(
    structure,
    link,
    dtype=torch.float64,
    groups=1,
    ignore_index=-100,
    seed=0,
    n=N,
    c=C,
    reduction=NONE,
    segments=1,
    device="cpu",
):
    """Random arguments of `value`, some rows ignored, and of the other ops: (where, six tables or logits)."""
    generator = torch.Generator().manual_seed(seed)
    number = ops.arithmetic(dtype)

    def random(*shape, dtype=number):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    parts = [[x.to(device) for x in oracle.parts_of(structure, c, generator, number)] for _ in range(groups)]
    tables = [torch.cat(x) for x in zip(*parts, strict=True)]
    weight, left, right = (*tables, None, None, None)[:3]
    target = torch.randint(groups * c, (n,), generator=generator).to(device)
    target[1:3] = ignore_index
    bias, scale = random(groups * c), 1 + 0.3 * random(groups * c)
    where = (
        random(n, c, dtype=dtype) * 2,
        target,
        weight,
        left,
        right,
        bias,
        scale,
        LINKS.index(link),
        ignore_index,
        groups,
        reduction,
        segments,
    )
    inputs = (where[0], *where[2:7])
    like = [None if x is None else random(*x.shape, dtype=x.dtype) for x in inputs]
    wanted = [x is not None for x in inputs]
    losses = n if reduction == NONE else segments
    return where, like, wanted, random(losses), random(losses)


def every_op(where, like, wanted, v_loss, t_v_loss, via=torch.ops.l2t):
    """All results of the four ops of one implementation."""
    loss, stats, d_logits = via.value(*where, True)
    return {
        "value": (loss, d_logits),
        "grad": via.grad(*where, stats, v_loss, wanted),
        "grad_vjp": via.grad_vjp(*where, stats, v_loss, *like, [True, *wanted]),
        "grad_jvp": via.grad_jvp(*where, stats, v_loss, t_v_loss, *like, wanted),
    }


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
}


def widened(arguments):
    """The same problem in float64."""

    def widen(x):
        if isinstance(x, (tuple, list)):
            return type(x)(map(widen, x))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return widen(arguments)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("groups", "reduction", "segments"), [(1, NONE, 1), (3, NONE, 1), (1, MEAN, 1), (2, SUM, 7), (1, MEAN, 2)]
)
def test_every_op_agrees_with_the_definition(groups, reduction, segments, structure, link, dtype, device):
    arguments = case(
        structure, link, dtype, groups, n=14, reduction=reduction, segments=segments, device=device
    )
    ours, theirs = every_op(*arguments), every_op(*widened(arguments), via=reference)
    for name, results in ours.items():
        for i, (result, expected) in enumerate(zip(results, theirs[name], strict=True)):
            storage = i == (1 if name in ("value", "grad_vjp") else 0)  # gradients to the logits
            want = dtype if storage else ops.arithmetic(dtype)
            assert result.dtype == want or not result.numel()
            torch.testing.assert_close(
                result.double(), expected, **TOLERANCE[want], msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_a_loss_without_a_row_that_counts(reduction, device):
    where, like, wanted, v_loss, t_v_loss = case(
        "full", "sigmoid", reduction=reduction, segments=2, n=8, device=device
    )
    where[1][:4] = -100
    ours = every_op(where, like, wanted, v_loss, t_v_loss)
    loss, d_logits = ours["value"]
    assert loss[0].isnan() if reduction == MEAN else loss[0] == 0
    assert loss[1].isfinite()
    assert d_logits[:4].eq(0).all()
    for name in ("grad", "grad_vjp", "grad_jvp"):
        *first, d_bias, d_scale = ours[name][-6:]
        assert all(x.isfinite().all() for x in (first[0], first[1], d_bias, d_scale)), name
        assert first[0][:4].eq(0).all()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_may_be_written_over_the_logits(structure, dtype, device):
    where, _, wanted, v_loss, _ = case(structure, "sigmoid", dtype, c=33, device=device)
    _, stats, d_logits = torch.ops.l2t.value(*where, True)
    expected = torch.ops.l2t.grad(*where, stats, v_loss, wanted)
    overwritten = where[0].clone()
    room = [
        overwritten,
        *(x.new_empty(x.shape) if want else None for x, want in zip(where[2:7], wanted[1:], strict=True)),
    ]
    ops.run("grad", overwritten, *where[1:], stats, v_loss, *room)
    for result, other in zip(room, expected, strict=True):
        assert result is None or torch.equal(result, other)
    overwritten = where[0].clone()
    loss = stats.new_empty(N)
    ops.run("value", overwritten, *where[1:], loss, stats, overwritten)
    assert torch.equal(overwritten, d_logits)


@pytest.mark.parametrize("ignore_index", [0, 3, 255, -1])
def test_ignored_rows_do_not_leak(ignore_index, device):
    (logits, *rest), like, wanted, v_loss, t_v_loss = case(
        "full", "sigmoid", ignore_index=ignore_index, device=device
    )
    ignored = rest[0] == ignore_index
    assert ignored.sum() >= 2
    logits[ignored] = torch.tensor([float("nan"), float("inf"), 0.0, 1.0, -float("inf")]).to(logits)
    results = every_op((logits, *rest), like, wanted, v_loss, t_v_loss)
    clean = every_op((logits.nan_to_num(0, 0, 0), *rest), like, wanted, v_loss, t_v_loss)
    for name, tensors in results.items():
        for tensor, expected in zip(tensors, clean[name], strict=True):
            assert torch.equal(tensor, expected)
    assert results["value"][0][ignored].eq(0).all()
    assert results["grad"][0][ignored].eq(0).all()
    assert results["grad_vjp"][0][ignored].eq(0).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_empty_batches_have_zero_gradients(structure):
    where, like, wanted, v_loss, t_v_loss = case(structure, "sigmoid")
    where, v_loss, t_v_loss = (where[0][:0], where[1][:0], *where[2:]), v_loss[:0], t_v_loss[:0]
    like[0] = like[0][:0]
    for results in every_op(where, like, wanted, v_loss, t_v_loss).values():
        for result in results:
            assert result.eq(0).all()


def test_rank_zero_is_the_diagonal():
    where, like, wanted, v_loss, t_v_loss = case("diagonal", "sigmoid")
    empty = torch.zeros(C, 0, dtype=torch.float64)
    low = (*where[:3], empty, empty, *where[5:])
    like_low = [*like[:2], empty, empty, *like[4:]]
    results = every_op(low, like_low, [True] * 6, v_loss, t_v_loss)
    for name, tensors in every_op(where, like, wanted, v_loss, t_v_loss).items():
        for tensor, other in zip(tensors, results[name], strict=True):
            torch.testing.assert_close(other.reshape(tensor.shape), tensor, rtol=1e-12, atol=1e-14)


def test_one_class():
    arguments = case("full", "sigmoid", c=1)
    theirs = every_op(*arguments, via=reference)
    for name, results in every_op(*arguments).items():
        for result, expected in zip(results, theirs[name], strict=True):
            torch.testing.assert_close(result, expected)


def test_no_classes():
    where = (torch.zeros(2, 0), torch.full((2,), -100), None, None, None, None, None, 0, -100, 1, NONE, 1)
    loss, stats, _ = torch.ops.l2t.value(*where, False)
    assert loss.eq(0).all()
    assert torch.ops.l2t.value(*where[:10], MEAN, 1, False)[0].isnan().all()
    assert torch.ops.l2t.grad(*where, stats, torch.ones(2), [True] + [False] * 5)[0].shape == (2, 0)
    with pytest.raises(IndexError, match=r"in \[0, 0\) or ignore_index=3, got -100"):
        torch.ops.l2t.value(*where[:8], 3, 1, NONE, 1, False)


def test_links_have_the_numbers_of_the_core():
    numbers = [ops._native.SIGMOID, ops._native.IDENTITY, ops._native.LOG_SIGMOID]
    assert numbers == [list(reference.LINKS).index(x) for x in ("sigmoid", "identity", "log-sigmoid")]
    assert len(reference.LINKS) == len(numbers)


def test_what_is_not_wanted_is_empty_and_changes_nothing():
    where, like, wanted, v_loss, t_v_loss = case("low-rank", "sigmoid")
    everything = every_op(where, like, wanted, v_loss, t_v_loss)
    _, stats, _ = torch.ops.l2t.value(*where, False)
    for i in range(6):
        only = [j == i for j in range(6)]
        alone = {
            "grad": torch.ops.l2t.grad(*where, stats, v_loss, only),
            "grad_vjp": torch.ops.l2t.grad_vjp(*where, stats, v_loss, *like, [False, *only])[1:],
            "grad_jvp": torch.ops.l2t.grad_jvp(*where, stats, v_loss, t_v_loss, *like, only),
        }
        for name, results in alone.items():
            expected = everything[name][-6:]
            assert torch.equal(results[i], expected[i])
            assert all(x.numel() == 0 for j, x in enumerate(results) if j != i)


def test_the_same_bits_for_every_number_of_threads():
    arguments = case("low-rank", "sigmoid", torch.float32, n=3000, c=33)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(every_op(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensors in other.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, results[0][name], strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stride_and_any_shape(data):
    n, c = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 20))
    structure, link = data.draw(st.sampled_from(STRUCTURES)), data.draw(st.sampled_from(LINKS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    where, like, wanted, v_loss, t_v_loss = case(
        structure, link, dtype, seed=data.draw(st.integers(0, 99)), n=n, c=c
    )
    logits = where[0]
    layout = data.draw(st.sampled_from(["rows apart", "transposed", "every other class", "one row"]))
    if layout == "rows apart":
        other = torch.randn(n, c + 3, dtype=dtype)[:, 1 : c + 1]
    elif layout == "transposed":
        other = torch.randn(c, n, dtype=dtype).T
    elif layout == "every other class":
        other = torch.randn(n, 2 * c, dtype=dtype)[:, ::2]
    else:
        logits = logits[:1].expand(n, c) if n else logits
        other = logits
    if layout != "one row":
        other.copy_(logits)
    expected = every_op(
        (logits.clone(memory_format=torch.contiguous_format), *where[1:]), like, wanted, v_loss, t_v_loss
    )
    for name, results in every_op((other, *where[1:]), like, wanted, v_loss, t_v_loss).items():
        assert all(torch.equal(a, b) for a, b in zip(results, expected[name], strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_extreme_logits_stay_finite(data):
    link = data.draw(st.sampled_from(LINKS))
    structure = data.draw(st.sampled_from(STRUCTURES))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    where, _, wanted, v_loss, _ = case(structure, link, dtype)
    size = data.draw(st.sampled_from([1e-30, 1.0, 80.0, 1e3, 1e4]))
    offset = data.draw(st.sampled_from([0.0, -1e4, 1e4]))
    where = (where[0] * size + offset, *where[1:])
    loss, stats, _ = torch.ops.l2t.value(*where, False)
    assert loss.isfinite().all()
    for gradient in torch.ops.l2t.grad(*where, stats, v_loss, wanted):
        assert gradient.isfinite().all()


# ---- registrations ----


def gradable(arguments):
    return [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("reduction", "segments"), [(NONE, 1), (MEAN, 3)])
def test_opcheck_with_gradients(structure, reduction, segments):
    where, like, wanted, v_loss, t_v_loss = case(structure, "sigmoid", reduction=reduction, segments=segments)
    _, stats, _ = torch.ops.l2t.value(*where, False)
    # stats is an intermediate of value, not something to differentiate by.
    first = (*gradable(where), stats, *gradable([v_loss]))
    for with_grad in (False, True):
        opcheck(torch.ops.l2t.value.default, (*gradable(where), with_grad))
    opcheck(torch.ops.l2t.grad.default, (*first, wanted))
    # A third derivative raises, so these two have no backward to trace; the rest holds with gradients too.
    arguments = {
        "grad_vjp": (*first, *gradable(like), [True, *wanted]),
        "grad_jvp": (*first, *gradable([t_v_loss, *like]), wanted),
    }
    for name, args in arguments.items():
        op = getattr(torch.ops.l2t, name).default
        opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        opcheck(op, [x.detach() if isinstance(x, torch.Tensor) else x for x in args])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_opcheck_without_gradients(structure):
    where, _, wanted, v_loss, _ = case(structure, "log-sigmoid", torch.float32)
    _, stats, _ = torch.ops.l2t.value(*where, False)
    opcheck(torch.ops.l2t.value.default, (*where, False))
    opcheck(torch.ops.l2t.grad.default, (*where, stats, v_loss, wanted))
    opcheck(torch.ops.l2t.grad.default, (*where, stats, v_loss, [False] * 6))


def test_meta_tensors():
    logits, target = torch.empty(4, 3, 5, device="meta"), torch.empty(4, 5, dtype=torch.int64, device="meta")
    assert l2t.dynamic_loss(logits, target, reduction="none").shape == (4, 5)
    assert l2t.dynamic_loss(logits, target).device.type == "meta"


# ---- vmap: against a loop ----


def looped(name, dims, arguments, batch):
    results = [
        getattr(torch.ops.l2t, name)(
            *(x if d is None else x.select(d, i) for x, d in zip(arguments, dims, strict=True))
        )
        for i in range(batch)
    ]
    return [torch.stack(x) for x in zip(*results, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_vmap_is_a_loop(data):
    """Any mix of batched and unbatched arguments, batch dimensions anywhere, nested groups, ignored rows."""
    batch = data.draw(st.integers(1, 3))
    structure, link = data.draw(st.sampled_from(STRUCTURES)), data.draw(st.sampled_from(LINKS))
    groups = data.draw(st.sampled_from([1, 2]))
    reduction, segments = data.draw(st.sampled_from([(NONE, 1), (MEAN, 1), (SUM, 3)]))
    with_grad = data.draw(st.booleans())
    ignore_index = data.draw(st.sampled_from([-100, 2, 255]))
    cases = [
        case(
            structure,
            link,
            torch.float64,
            groups,
            ignore_index,
            seed,
            reduction=reduction,
            segments=segments,
        )
        for seed in range(batch)
    ]
    name = data.draw(st.sampled_from(["value", "grad", "grad_vjp", "grad_jvp"]))

    def arguments(where, like, wanted, v_loss, t_v_loss):
        _, stats, _ = torch.ops.l2t.value(*where, False)
        return {
            "value": (*where, with_grad),
            "grad": (*where, stats, v_loss, wanted),
            "grad_vjp": (*where, stats, v_loss, *like, [True, *wanted]),
            "grad_jvp": (*where, stats, v_loss, t_v_loss, *like, wanted),
        }[name]

    # stats, argument 12, belongs to the arguments before it: batch all of these or none.
    everything = list(zip(*(arguments(*c) for c in cases), strict=True))
    whole = name != "value" and data.draw(st.booleans())
    call, dims = [], []
    for i, values in enumerate(everything):
        free = name == "value" or i > 12
        if isinstance(values[0], torch.Tensor) and (whole or (free and data.draw(st.booleans()))):
            dim = data.draw(st.integers(0, values[0].dim()))
            call.append(torch.stack(values, dim))
            dims.append(dim)
        else:
            call.append(values[0])
            dims.append(None)
    if all(d is None for d in dims):
        return
    tensors = [i for i, x in enumerate(call) if isinstance(x, torch.Tensor)]

    def fn(*given):
        full = list(call)
        for i, x in zip(tensors, given, strict=True):
            full[i] = x
        return getattr(torch.ops.l2t, name)(*full)

    results = torch.vmap(fn, in_dims=tuple(dims[i] for i in tensors))(*(call[i] for i in tensors))
    for i, (result, expected) in enumerate(zip(results, looped(name, dims, call, batch), strict=True)):
        if name == "value" and i == 1:
            continue  # stats
        if result.numel() or expected.numel():
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_a_batch_of_nothing():
    """As torch's own functions: nothing in, nothing out, and a graph to it."""
    logits = torch.randn(0, N, C, requires_grad=True)
    weight = torch.randn(0, C, C, requires_grad=True)
    target = torch.zeros(0, N, dtype=torch.int64)
    loss = torch.vmap(l2t.dynamic_loss)(logits, target, weight)
    assert loss.shape == (0,)
    first = torch.autograd.grad(loss.sum(), (logits, weight), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (logits, weight))
    for each in (first, second):
        assert [x.shape for x in each] == [logits.shape, weight.shape]
    weighted = torch.vmap(lambda z, y, w: l2t.dynamic_loss(z, y, sample_weight=w))
    assert weighted(logits, target, torch.randn(0, N)).shape == (0,)


def test_nested_vmap():
    where, *_ = case("full", "sigmoid")
    logits = torch.randn(2, 3, N, C, dtype=torch.float64)
    weights = torch.randn(2, C, C, dtype=torch.float64)

    def fn(x, weight):
        return torch.ops.l2t.value(x, where[1], weight, *where[3:], False)[0]

    results = torch.vmap(torch.vmap(fn, in_dims=(0, None)))(logits, weights)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(results[i, j], fn(logits[i, j], weights[i]), rtol=1e-12, atol=1e-14)


def test_vmap_is_one_native_call(monkeypatch):
    calls = []
    native = ops._native.value
    monkeypatch.setattr(ops, "_native", type("Counted", (), {**vars(ops._native)}))
    monkeypatch.setattr(ops._native, "value", staticmethod(lambda *x: calls.append(x) or native(*x)))
    logits, target = torch.randn(6, N, C), torch.randint(C, (6, N))
    weight = l2t.Full(torch.randn(6, C, C))
    torch.vmap(lambda x, y, w: l2t.dynamic_loss(x, y, w))(logits, target, weight)
    assert len(calls) == 1


@pytest.mark.parametrize("rows", [1, N])
def test_targets_of_any_stride_under_vmap(rows):
    """One target for all of the batch is expanded, and so not contiguous, even where it is of one row."""
    logits, weight = torch.randn(rows, C), torch.randn(3, C, C)
    shared, own = torch.randint(C, (rows,)), torch.randint(C, (rows, 6))[:, ::2]
    for target, dim in ((shared, None), (own, 1)):
        found = torch.vmap(lambda y, w: l2t.dynamic_loss(logits, y, w), (dim, 0))(target, weight)
        each = [target if dim is None else target[:, b] for b in range(3)]
        expected = [l2t.dynamic_loss(logits, y, w) for y, w in zip(each, weight, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("bad", [C, C + 3, -1, -7])
@pytest.mark.parametrize("ignore_index", [-100, 1, 200])
def test_vmap_names_a_target_out_of_range_as_it_was_given(bad, ignore_index):
    target = torch.zeros(3, N, dtype=torch.int64)
    target[0, 2], target[2, 4] = ignore_index, bad
    weight = l2t.Full(torch.randn(3, C, C))
    with pytest.raises(IndexError, match=rf"in \[0, {C}\) or ignore_index={ignore_index}, got {bad} at"):
        torch.vmap(lambda x, y, w: l2t.dynamic_loss(x, y, w, ignore_index=ignore_index))(
            torch.randn(3, N, C), target, weight
        )


# ---- a device without a kernel ----


@pytest.fixture
def by_reference():
    """The ops on the CPU as any other device has them."""
    with torch.library._scoped_library("l2t", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ops.OPS:
            library.impl(name, ops._by_reference(name), "CPU", allow_override=True)
        yield
    # What was overridden does not come back by itself.
    for name in ops.OPS:
        ops.LIBRARY.impl(name, ops._returning(ops.KERNELS[name]), "CPU", allow_override=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_another_device_runs_the_reference(by_reference, monkeypatch, structure):
    for name in ("readable", "native", "unwatched"):
        monkeypatch.setattr(ops, name, lambda *tensors: False)
    where, like, wanted, v_loss, t_v_loss = case(structure, "sigmoid")
    theirs = every_op(where, like, wanted, v_loss, t_v_loss, via=reference)
    for name, results in every_op(where, like, wanted, v_loss, t_v_loss).items():
        for result, expected in zip(results, theirs[name], strict=True):
            assert torch.equal(result, expected)

    where, *_ = case(structure, "sigmoid", n=4, c=2)
    parts = [x.clone().requires_grad_() for x in where[2:5] if x is not None]
    logits = where[0].clone().requires_grad_()

    def fn(logits, *parts):
        return l2t.dynamic_loss(logits, where[1], oracle.weight_of(parts))

    assert torch.autograd.gradcheck(fn, (logits, *parts), check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(fn, (logits, *parts), check_batched_grad=False)
    with pytest.raises(IndexError, match=r"target must be in \[0, 2\)"):
        l2t.dynamic_loss(logits, torch.full((4,), 5))


def test_another_device_is_told_once():
    ops._warn_slow.cache_clear()
    where, *_ = case("none", "sigmoid")
    run = ops._by_reference("value")
    with pytest.warns(UserWarning, match="for the compiled kernels, got cpu"):
        run(*where, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*where, False)


# ---- errors ----


def test_errors_of_the_ops():
    where, like, wanted, v_loss, _ = case("low-rank", "sigmoid")
    logits, target, weight, left, right, *rest = where
    value, grad = torch.ops.l2t.value, torch.ops.l2t.grad
    _, stats, _ = value(*where, False)
    rest = [*rest, False]
    with pytest.raises(
        ValueError, match=r"logits must be of shape \(N, C\) and float32, .* got shape \(9, 5\), int64"
    ):
        value(logits.long(), *where[1:], False)
    with pytest.raises(ValueError, match=r"logits must be of shape \(N, C\) and float32, .* shape \(9,\)"):
        value(logits[:, 0], *where[1:], False)
    with pytest.raises(ValueError, match=r"target must be of shape \(9,\), int64 on cpu, got shape \(8,\)"):
        value(logits, target[1:], *where[2:], False)
    with pytest.raises(ValueError, match="left and right must be two matrices or None both"):
        value(logits, target, weight, left, None, *rest)
    with pytest.raises(ValueError, match=r"weight must be of shape \(5,\), float64 on cpu, got shape \(4,\)"):
        value(logits, target, weight[1:], left, right, *rest)
    with pytest.raises(ValueError, match=r"weight must be of shape \(5,\), float32 on cpu, got shape"):
        value(logits.half(), *where[1:], False)
    with pytest.raises(ValueError, match="segments must divide the number of rows, got 2 for 9 rows"):
        value(*where[:10], SUM, 2, False)
    rest = rest[:-1]
    with pytest.raises(ValueError, match=r"v_loss must be .* which casts and checks"):
        grad(*where, stats, v_loss[1:], wanted)
    with pytest.raises(ValueError, match="wanted must be a bool for each result"):
        grad(*where, stats, v_loss, wanted[1:])
    with pytest.raises(ValueError, match="wanted must be a bool for each result"):
        grad(logits, target, None, None, None, *rest, stats, v_loss, [True] * 6)
    with pytest.raises(ValueError, match="wanted must be a bool for each result"):
        torch.ops.l2t.grad_vjp(*where, stats, v_loss, *like, [])
    # Nothing is read through a target that is out of range, whichever op it comes to.
    bad = (logits, torch.full((N,), 10**6), *where[2:])
    with pytest.raises(IndexError, match="got 1000000 at position 0"):
        grad(*bad, stats, v_loss, wanted)
    with pytest.raises(IndexError, match="got 1000000 at position 0"):
        torch.ops.l2t.grad_vjp(*bad, stats, v_loss, *like, [True, *wanted])


def test_a_missing_extension_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "l2t._native", None)
    monkeypatch.delattr(l2t, "_native", raising=False)
    spec = importlib.util.spec_from_file_location("l2t_without_core", Path(ops.__file__))
    with pytest.raises(ImportError, match=r"the compiled core l2t\._native must be installed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
