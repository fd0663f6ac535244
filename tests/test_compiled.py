"""compile=True of l2t.unroll: eager's gradients, the same bits by every schedule, and what is refused.

The oracle is the run without it. Compiling takes seconds, so most tests stop at the trace, which is what
is ours: `traced` runs its graph as it is.
"""

from __future__ import annotations

import functools
import gc
import random
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import l2t
from l2t import compiled
from l2t.optim import SGD, Adam, RMSprop

CLASSES, BATCH, STEPS = 3, 6, 5
MEASURE = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def traced(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, examples: graph)


def make(dtype=torch.float64):
    """A student, batches, and meta tensors: a table of the fused loss, and a weight for each sample."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES)).to(dtype)
    batches = [(torch.randn(BATCH, 8, dtype=dtype), torch.randint(CLASSES, (BATCH,))) for _ in range(STEPS)]
    table = (torch.eye(CLASSES) + 0.1 * torch.randn(CLASSES, CLASSES)).to(dtype).requires_grad_()
    weight = torch.rand(BATCH, dtype=dtype).requires_grad_()
    return student, batches, table, weight


def measure(model):
    return model(MEASURE.to(next(model.parameters()))).square().mean()


def losses(table, weight):
    def fused(model, batch, step):
        return l2t.dynamic_loss(model(batch[0]), batch[1], table, sample_weight=weight)

    def written_out(model, batch, step):
        u = (table[batch[1]] * F.log_softmax(model(batch[0]), 1)).sum(1)
        return -(weight * torch.sigmoid(u)).mean()

    return {"fused": fused, "written out": written_out}


def gradients(student, batches, loss, meta, **settings):
    """The run, and a copy of the gradient of each meta tensor, whose own is as before."""
    for x in meta:
        x.grad = None
    run = l2t.unroll(student, batches, loss, measure, meta=meta, **settings)
    run.backward()
    found = [x.grad for x in meta]
    for x in meta:
        x.grad = None
    return run, found


def assert_close(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert float((x - y).double().norm()) <= tolerance * float(y.double().norm())


def assert_agrees(student, batches, loss, meta, tolerance=1e-10, **settings):
    run, found = gradients(student, batches, loss, meta, compile=True, **settings)
    eager, expected = gradients(student, batches, loss, meta, **settings)
    assert any(x is not None and x.abs().sum() > 0 for x in expected)
    assert_close(found, expected, tolerance)
    assert_close(list(run.weights.values()), list(eager.weights.values()), tolerance)
    assert_close(list(run.buffers.values()), list(eager.buffers.values()), tolerance)
    assert run.report.losses == pytest.approx(eager.report.losses, rel=tolerance)
    return run


# ---- compiled


def test_compiled_equals_eager_with_the_same_bits_by_every_schedule():
    """The code generator on the fused loss, with buffers, Adam, a learned rate and initial weights."""
    student, batches, table, weight = make()
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    loss, meta = losses(table, weight)["fused"], [table, weight, rate, student[3].weight]
    # BatchNorm makes the bias before it a constant: its gradient is rounding, which Adam would blow up.
    student[0].bias.requires_grad_(False)
    settings = {"optimizer": Adam(lr=rate)}
    run = assert_agrees(student, batches, loss, meta, **settings)
    assert run.report.compiled > 0
    assert (run.report.curvature, run.report.curvature_error) == ("reverse", 0)
    _, first = gradients(student, batches, loss, meta, compile=True, **settings)
    plans = [
        {"schedule": "every"},
        {"schedule": l2t.schedule.Segments(1, 1), "verify": "all"},
        {"schedule": "disk"},
        {"schedule": "binomial", "memory": "20kB"},
    ]
    for plan in plans:
        run, found = gradients(student, batches, loss, meta, compile=True, **settings, **plan)
        assert run.report.compiled == 0
        assert run.report.steps_again > 0
        assert all(map(torch.equal, found, first)), plan

    with torch.no_grad():  # the code that is kept reads what the tensors hold now
        table.mul_(0.5)
        rate.mul_(2)
    assert assert_agrees(student, batches, loss, meta, **settings).report.compiled == 0


def test_compiled_equals_eager_in_float32_around_the_fused_op(monkeypatch):
    """The ops are called by the generated code where the loss is not small."""
    monkeypatch.setattr(compiled, "SMALL", 0)
    student, batches, table, weight = make(torch.float32)
    loss = losses(table, weight)["fused"]
    graphs = []
    monkeypatch.setattr(
        compiled, "BACKEND", lambda graph, x: graphs.append(graph) or compiled._inductor(graph, x)
    )
    assert_agrees(student, batches, loss, [table, weight], 1e-5, optimizer=SGD(0.1, momentum=0.9))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if "l2t" in str(node.target)}
    assert called == {"l2t.value.default", "l2t.grad.default", "l2t.grad_vjp.default"}


@pytest.mark.long
def test_compiled_equals_eager_on_convolutions_and_pooling():
    """With layouts that the generator changes, the gradient of the pooling is read before it is written."""
    torch.manual_seed(4)
    first = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    student = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(800, CLASSES))
    batches = [(torch.randn(64, 1, 28, 28), torch.randint(CLASSES, (64,))) for _ in range(3)]
    table = torch.eye(CLASSES, requires_grad=True)

    def loss(model, batch, step):
        return l2t.dynamic_loss(model(batch[0]), batch[1], table)

    def measured(model):
        return model(batches[0][0]).square().mean()

    settings = {"optimizer": SGD(0.05), "meta": [table]}
    found = []
    for compile in (True, False):
        table.grad = None
        l2t.unroll(student, batches, loss, measured, compile=compile, **settings).backward()
        found.append(table.grad)
    assert_close(found[:1], found[1:], 1e-5)


@pytest.mark.long
def test_the_same_bits_with_several_threads():
    """The gradient of an embedding adds many rows to one place."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Embedding(50, 64), nn.Tanh(), nn.Linear(64, 3))
        batches = [(torch.randint(50, (8192,)), torch.randint(3, (8192,))) for _ in range(6)]
        scale = torch.ones(3, requires_grad=True)

        def loss(model, batch, step):
            return F.cross_entropy(scale * model(batch[0]), batch[1])

        found = []
        for _ in range(3):
            scale.grad = None
            run = l2t.unroll(
                student,
                batches,
                loss,
                lambda model: model(batches[0][0]).square().mean(),
                meta=[scale],
                schedule="every",
                verify="all",
                compile=True,
            )
            run.backward()
            found.append(scale.grad)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


# ---- traced


OPTIMIZERS = {
    "sgd": SGD(0.1, weight_decay=0.01),
    "momentum": SGD(lambda step: 0.2 / (step + 1), momentum=0.9, nesterov=True),
    "rmsprop": RMSprop(0.01, centered=True),
    "clipped": SGD(0.5, clip_norm=0.1, groups=[{"params": "3.*", "lr": 0.2}]),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimisers(traced, optimizer):
    student, batches, table, weight = make()
    student[0].bias.requires_grad_(False)
    meta = [table, weight, student[0].weight]
    assert_agrees(student, batches, losses(table, weight)["written out"], meta, optimizer=optimizer)


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "first"},
        {"truncate": 2},
        {"along": 2},
        {"schedule": "every", "along": {3: 0.5, 5: 2.0}},
        {"curvature": "recompute"},
        {"curvature": "recompute", "order": "first", "schedule": "every"},
    ],
    ids=str,
)
def test_ways_of_a_run(traced, settings):
    student, batches, table, weight = make()
    assert_agrees(student, batches, losses(table, weight)["fused"], [table, weight], **settings)


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_micro_batches(traced, curvature):
    student, batches, table, weight = make()
    loss = losses(table, weight)["fused"]
    pairs = list(zip(batches[::2], batches[1::2], strict=False))
    settings = {"accumulate": 2, "schedule": "every", "curvature": curvature}
    assert_agrees(student, pairs, loss, [table, weight], **settings)


def test_meta_tensors_in_batches_and_nested_batches(traced):
    """Distilled data: another leaf in each step, once in the batch and in the loss, too."""
    student, batches, table, _ = make()
    data = [x.clone().requires_grad_() for x, _ in batches]
    nested = [{"x": [x], "y": (y,)} for x, (_, y) in zip(data, batches, strict=True)]

    def loss(model, batch, step):
        x = batch["x"][0]
        return F.cross_entropy(model(x) @ table, batch["y"][0]) + 0.1 * (data[0] * x).square().mean()

    assert_agrees(student, nested, loss, [table, *data])
    pairs = [(x, y) for x, (_, y) in zip(data, batches, strict=True)]

    def plain(model, batch, step):
        return F.cross_entropy(model(batch[0]), batch[1])

    assert_agrees(student, pairs, plain, data)


def test_weights_that_are_not_reached_tied_or_enter_linearly(traced):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.unused, self.shift = nn.Linear(2, 2), nn.Parameter(torch.zeros(8))
            self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

        def forward(self, x):
            return self.second(self.first(x).tanh()) * self.frozen

    torch.manual_seed(1)
    student, scale = Odd().double(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    batches = torch.randn(4, BATCH, 8, dtype=torch.float64)

    def loss(model, batch, step):
        return scale * model(batch).square().mean() + (scale * model.shift).sum()

    assert_agrees(student, batches, loss, [scale, idle])
    # Linear in all weights: there are no products, but of scale.
    assert_agrees(
        student,
        batches,
        lambda model, batch, step: (scale * model.first.bias).sum(),
        [scale, student.first.bias],
    )
    constant = torch.tensor(2.0).double()
    assert_agrees(
        student, batches, lambda model, batch, step: (constant * model.first.bias).sum(), [student.first.bias]
    )


def test_a_meta_tensor_behind_a_graph_that_was_there_before(traced):
    student, batches, table, _ = make()
    table_of_now = 2 * table.tanh()

    def loss(model, batch, step):
        return l2t.dynamic_loss(model(batch[0]), batch[1], table_of_now)

    assert_agrees(student, batches, loss, [table])


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_lstm_convolution_and_checkpoint(traced, curvature):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.conv = nn.LSTM(2, 4, batch_first=True), nn.Conv1d(4, 2, 2)

        def forward(self, x):
            out = self.cell(x.view(-1, 4, 2))[0].transpose(1, 2)
            return checkpoint(self.conv, out, use_reentrant=False).flatten(1)

    torch.manual_seed(2)
    student, batches = Mixed().double(), make()[1]
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(model, batch, step):
        return scale * model(batch[0]).square().mean()

    assert_agrees(student, batches, loss, [scale], curvature=curvature)


# ---- what is remembered of a step


def bytes_of(tensors):
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(0.01)], ids=["sgd", "adam"])
def test_a_step_keeps_what_its_reverse_reads_and_counts_it(traced, optimizer):
    """The weights of a first layer, which are most of all, only where the optimiser reads them again."""
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(400, 700), nn.Tanh(), nn.Linear(700, CLASSES))
    batches = [(torch.randn(BATCH, 400), torch.randint(CLASSES, (BATCH,))) for _ in range(STEPS)]
    table = torch.eye(CLASSES, requires_grad=True)

    def loss(model, batch, step):
        return l2t.dynamic_loss(model(batch[0]), batch[1], table)

    def measured(model):
        return model(batches[0][0]).square().mean()

    settings = {"optimizer": optimizer, "meta": [table], "compile": True}
    run = l2t.unroll(student, batches, loss, measured, schedule="binomial", memory="40MB", **settings)
    step = run._tape[STEPS - 1]
    own = [p for name, p in student.named_parameters() if name != "0.weight"]
    mine = {x.data_ptr() for x in [table, *batches[STEPS - 1]]}
    slots = [x for slot in step.slots for x in slot if isinstance(x, torch.Tensor)]
    held = bytes_of([*step.weights, *step.kept, *slots, *(step.grads or ())])
    held -= bytes_of([x for x in step.kept if x.data_ptr() in mine])
    sizes = run.report.sizes
    assert sizes.step == pytest.approx(held, rel=0.01)
    assert sizes.state == pytest.approx(bytes_of([*student.parameters(), *slots]), rel=0.01)
    if isinstance(optimizer, SGD):
        assert sizes.step < 2 * bytes_of(own) + 20 * BATCH * 700 * 4 < sizes.state
    run.backward()
    found, table.grad = table.grad, None
    run = l2t.unroll(student, batches, loss, measured, curvature="recompute", **settings)
    run.backward()
    assert_close([found], [table.grad], 1e-5)


# ---- code that is kept


def test_code_is_kept_while_student_and_loss_are_there(traced):
    _, batches, table, weight = make()
    student = nn.Linear(8, CLASSES).double()
    by_name = losses(table, weight)
    first = by_name["fused"]
    loss = functools.partial(first)

    holder = [student]

    def seconds(loss, meta=(table, weight), **settings):
        run, _ = gradients(holder[0], batches, loss, list(meta), compile=True, **settings)
        return run.report.compiled

    assert seconds(loss) > 0
    assert seconds(loss) == 0
    assert seconds(by_name["written out"]) > 0
    assert seconds(loss, meta=[table]) > 0
    assert seconds(loss, order="first") > 0
    student.eval()
    assert seconds(loss) > 0
    student.train()
    assert seconds(loss) == 0
    assert len(compiled._KEPT[student]) == 5
    del loss
    gc.collect()
    assert seconds(first) > 0
    assert len(compiled._KEPT[student]) == 2

    class Owner:
        def method(self, model, batch, step):
            return first(model, batch, step)

    owner = Owner()
    assert seconds(owner.method) > 0
    assert seconds(owner.method) == 0
    kept = weakref.ref(student)
    del student, holder[0]
    gc.collect()
    assert kept() is None


def test_a_loss_that_sees_other_things_is_compiled_anew(traced):
    _, batches, table, weight = make()
    student = nn.Linear(8, CLASSES).double()
    other = torch.tensor(1.0, dtype=torch.float64)
    seen = {"factor": 1.0, "tensor": other, "detached": False}

    def loss(model, batch, step):
        mine = weight.detach() if seen["detached"] else weight
        each = F.cross_entropy(model(batch[0]) @ table, batch[1], reduction="none")
        return seen["factor"] * seen["tensor"] * (mine * each).mean()

    meta = [table, weight]
    assert assert_agrees(student, batches, loss, meta).report.compiled > 0
    other.fill_(1.5)  # the same tensor
    assert assert_agrees(student, batches, loss, meta).report.compiled == 0
    for change in ({"factor": 2.0}, {"tensor": torch.tensor(3.0, dtype=torch.float64)}, {"detached": True}):
        seen |= change
        assert assert_agrees(student, batches, loss, meta).report.compiled > 0


RATE = 1.0


class Held:
    """A loss in whose places numbers are kept that do nothing in the first step."""

    share = 0.0

    def __init__(self, weight):
        self.weight, self.settings, self.calls = weight, types.SimpleNamespace(share=0.0), 0
        self.listed = [{"share": 0.0}]

    def __call__(self, model, batch, step):
        self.calls += 1
        shares = self.share + self.settings.share + self.listed[0]["share"]
        return late(model, batch, self.weight, shares)


def late(model, batch, weight, share):
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (weight * each).mean() + (batch[2] > 0) * share * model(batch[0]).square().mean()


def test_code_is_made_anew_where_plain_numbers_that_it_froze_have_changed(traced, monkeypatch):
    """Numbers that tell in later steps only, where the first step is the same."""
    _, batches, _, weight = make()
    student = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), Scaled(), nn.Linear(7, CLASSES)).double()
    batches = [(*batch, torch.tensor(float(t))) for t, batch in enumerate(batches)]
    free = 0.0

    def closed(model, batch, step, share=0.0):
        return late(model, batch, weight, share + free)

    def by_global(model, batch, step):
        return late(model, batch, weight, RATE)

    class Owner:
        share = 0.0

        def method(self, model, batch, step):
            return late(model, batch, weight, self.share)

    held, owner = Held(weight), Owner()
    partial = functools.partial(closed, share=0.0)

    def set_free():
        nonlocal free
        free = 3.0

    def bind_default():
        closed.__defaults__ = (2.0,)

    changes = [
        (held, lambda: setattr(held.settings, "share", 2.0)),
        (held, lambda: held.listed[0].update(share=3.0)),
        (held, lambda: setattr(Held, "share", 5.0)),
        (closed, set_free),
        (closed, bind_default),
        (partial, lambda: partial.keywords.update(share=4.0)),
        (by_global, lambda: monkeypatch.setitem(globals(), "RATE", 2.0)),
        (owner.method, lambda: setattr(owner, "share", 1.0)),
        (by_global, lambda: setattr(student[2], "slope", 2.0)),
        (by_global, lambda: setattr(student[2], "slope", 2)),
    ]
    monkeypatch.setattr(Held, "share", 0.0)
    for loss, change in changes:
        before = compiled._held(loss, student)
        assert before == compiled._held(loss, student)
        change()
        assert before != compiled._held(loss, student)
    for change in (lambda: setattr(held, "share", 1.0), lambda: setattr(student[2], "slope", 3.0)):
        gradients(student, batches, held, [weight], compile=True)
        assert gradients(student, batches, held, [weight], compile=True)[0].report.compiled == 0
        change()
        assert assert_agrees(student, batches, held, [weight]).report.compiled > 0


class Scaled(nn.Module):
    """A layer with a plain number that tells where its input is large."""

    slope = 1.0

    def __init__(self):
        super().__init__()
        self.slope = 1.0

    def forward(self, x):
        return torch.where(x > 0.9, self.slope * x, x).tanh()


def test_kept_code_is_compared_in_its_derivatives_too(traced):
    """A number in the loss that changes neither value nor gradient, but what is held constant."""
    student, batches, table, _ = make()
    share = 0.0

    def loss(model, batch, step):
        w = share * table.detach() + (1 - share) * table
        return l2t.dynamic_loss(model(batch[0]), batch[1], w)

    run, found = gradients(student, batches, loss, [table], compile=True)
    share = 0.75
    again, less = gradients(student, batches, loss, [table], compile=True)
    assert torch.equal(run.measure, again.measure)
    assert_close(less, [0.25 * x for x in found])


def test_no_seconds_without():
    student, batches, table, weight = make()
    run, _ = gradients(student, batches, losses(table, weight)["fused"], [table])
    assert run.report.compiled is None


# ---- refused


def refused(match, loss=None, error=RuntimeError, batches=None, **settings):
    student, usual, table, weight = make()
    loss = loss or losses(table, weight)["fused"]
    with pytest.raises(error, match=match) as caught:
        gradients(student, batches or usual, loss, [table, weight], compile=True, **settings)
    assert str(caught.value).startswith("l2t.")
    assert all(p.grad is None for p in student.parameters())


def test_refused_arguments():
    student, batches, table, weight = make()
    loss = losses(table, weight)["fused"]
    with pytest.raises(TypeError, match="compile must be True or False, got int"):
        l2t.unroll(student, batches, loss, measure, compile=1)
    with pytest.raises(ValueError, match="meta must be named with compile=True"):
        l2t.unroll(student, batches, loss, measure, compile=True)
    refused(
        "curvature must be 'reverse' or 'recompute' with compile=True", error=ValueError, curvature="central"
    )
    with torch.autocast("cpu"):
        refused("autocast must be off")


def test_refused_batches(traced):
    _, batches, table, _ = make()
    refused("got .*int.* at step 0", error=TypeError, batches=range(3))
    refused("got .*int.* at step 0", error=TypeError, batches=[(*batch, 3) for batch in batches])
    refused("got one with a graph at step 0", error=ValueError, batches=[(2 * table, batches[0][1])])
    refused(
        "same shapes, dtypes and devices.* at step 1",
        error=ValueError,
        batches=[batches[0], tuple(x[:3] for x in batches[1])],
    )


USES = {
    "arithmetic": lambda x, step: x * step,
    "index": lambda x, step: x * [1, 2][step],
    "comparison": lambda x, step: x if step < 3 else 2 * x,
    "key": lambda x, step: x * {0: 1.0}.get(step, 2.0),
    "tensor": lambda x, step: x * torch.tensor([1.0, 2.0])[step],
    "function": lambda x, step: torch.add(x, step),
    "text": lambda x, step: x * len(f"{step}"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_refused_use_of_the_step(traced, use):
    refused(
        "loss must not use the number of the step",
        lambda model, batch, step: use(model(batch[0]).square().mean(), step),
        error=TypeError,
    )


OPERATIONS = {
    "dropout": (lambda x: F.dropout(x), "draws random numbers"),
    "item": (lambda x: x * x.sum().item(), "reads a number"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "reads a number"),
    "list": (lambda x: x * x.tolist()[0][0], "Tensor.tolist, which reads a number"),
    "array": (lambda x: x * float(x.detach().numpy().sum()), "Tensor.numpy, which reads a number"),
    "mask": (lambda x: x[x > 0], "shape depends on numbers"),
}


@pytest.mark.parametrize(("operation", "match"), OPERATIONS.values(), ids=OPERATIONS)
def test_refused_operations(traced, operation, match):
    refused(match, lambda model, batch, step: operation(model(batch[0])).square().mean())


def test_refused_losses(traced):
    draws = random.Random(0)
    refused(
        "got another loss at the first step",
        lambda model, batch, step: draws.random() * model(batch[0]).square().mean(),
    )
    refused(
        "must compute in float32",
        lambda model, batch, step: model(batch[0]).half().square().mean().double(),
        error=ValueError,
    )

    def reentrant(model, batch, step):
        x = batch[0].clone().requires_grad_()
        return F.cross_entropy(model[3](checkpoint(model[0], x, use_reentrant=True)), batch[1])

    refused("got one with use_reentrant=True, whose modules would not be trained", reentrant)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, v):
            return 2 * v

    refused(
        "marked @once_differentiable", lambda model, batch, step: Once.apply(model(batch[0])).square().mean()
    )


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
@pytest.mark.parametrize(
    ("which", "place", "match"),
    [
        (0, 0, "another loss"),
        (0, 1, "another gradient"),
        (0, 9, "another buffer after it"),
        (1, 0, "another product H a"),
        (1, -1, "another derivative to meta"),
    ],
)
def test_refused_code_that_is_wrong(monkeypatch, which, place, match, curvature):
    """A compiler that is off by a thousandth in one result."""
    made = []

    def wrong(graph, examples):
        made.append(graph)
        if len(made) - 1 != which:
            return graph

        def run(*arguments):
            found = list(graph(*arguments))
            off = found[place] if which == 0 else arguments[-5 if place == 0 else -1]
            off.copy_(off * 1.001 + (off.dtype == torch.int64))
            return found

        return run

    monkeypatch.setattr(compiled, "BACKEND", wrong)
    refused(match, curvature=curvature)


def test_refused_without_a_compiler(monkeypatch):
    def absent(graph, examples):
        raise OSError("no compiler here.")

    monkeypatch.setattr(compiled, "BACKEND", absent)
    refused(r"compiled by torch's inductor with compile=True, got OSError \(no compiler here\)")


CHANGES = {
    "recompute": "loss must be the same when a step is run again, got values that are off",
    "reverse": "must stay as they are .* got one that was written in place since step 2",
}


@pytest.mark.parametrize(("curvature", "match"), CHANGES.items(), ids=CHANGES)
def test_refused_changes_between_run_and_walk_back(traced, curvature, match):
    student, batches, table, weight = make()
    loss, meta = losses(table, weight)["fused"], [table, weight]
    settings = {"meta": meta, "curvature": curvature, "compile": True}
    run = l2t.unroll(student, batches, loss, measure, **settings)
    batches[2][0][0] += 1
    with pytest.raises(RuntimeError, match=match):
        run.backward()
    assert table.grad is None


def test_refused_changes_of_what_else_the_reverse_reads(traced):
    student, batches, table, _ = make()
    beside = torch.ones(CLASSES, dtype=torch.float64)

    def loss(model, batch, step):
        return F.cross_entropy(beside * (model(batch[0]) @ table), batch[1])

    for tensor in (table, beside):
        run = l2t.unroll(student, batches, loss, measure, meta=[table], compile=True)
        with torch.no_grad():
            tensor.mul_(2.0)
        with pytest.raises(RuntimeError, match="got one that was written in place since step 4"):
            run.backward()


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_refused_changes_where_the_first_loss_is_zero(traced, first):
    student = nn.Linear(4, 3)
    start, data = student.weight.detach().clone(), torch.randn(3, 4)
    scale = torch.tensor(1.0, requires_grad=True)
    batches = [torch.tensor([x]) for x in (first, 1.0, 1.0)]

    def run(changes):
        taken = l2t.unroll(
            student,
            batches,
            lambda model, batch, step: scale * (model.weight - start - batch * data).square().mean(),
            lambda model: model.weight.square().sum(),
            optimizer=SGD(lr=1.0),
            meta=[scale],
            curvature="recompute",
            compile=True,
        )
        changes()
        taken.backward()

    run(lambda: None)
    with pytest.raises(RuntimeError, match="loss must be the same when a step is run again, got values that"):
        run(lambda: data.add_(3.0))
    data.sub_(3.0)
    with pytest.raises(RuntimeError, match="loss must be the same when a step is run again, got values that"):
        run(lambda: data.fill_(torch.nan))


def test_refused_target_of_a_later_step(traced):
    _, batches, _, _ = make()
    for wrong in (CLASSES, -2):
        batches[3][1][0] = wrong
        refused("target must hold class indices", batches=batches)
