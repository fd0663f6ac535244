"""What loss and measure may do with the model they are given, and what they are told not to do.

The oracle is the same loss written without it, or with ``torch.func.functional_call``.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2t
from l2t import schedule, tape
from l2t.optim import SGD

CURVATURES = ["reverse", "recompute", "forward", "central", "one-sided"]
WAYS = [*({"curvature": c} for c in CURVATURES), {"along": 2}, {"schedule": "every"}]
X = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1] * 8)


def mlp(width: int = 4, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def teaching(
    loss: Callable[..., Tensor],
    student: nn.Module | None = None,
    measure: Callable[..., Tensor] | None = None,
    steps: int = 5,
    **arguments: Any,
) -> tuple[Tensor, l2t.Run]:
    """The gradient to a bias of the logits, which ``loss(model, meta, step)`` is given, and the run."""
    meta = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def final(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(X[:4]), Y[:4])

    run = l2t.unroll(
        mlp() if student is None else student,
        range(steps),
        lambda model, batch, step: loss(model, meta, step),
        measure or final,
        **{"meta": [meta], "optimizer": SGD(0.5), **arguments},
    )
    run.backward()
    assert meta.grad is not None
    return meta.grad, run


# ---- .grad, requires_grad and mode of what they are given


def attack(model: nn.Module, how: str) -> Tensor:
    """The sign of the gradient of cross-entropy to the inputs, as people compute it."""
    x = X.clone().requires_grad_()
    value = F.cross_entropy(model(x), Y)
    if how == "grad":
        return torch.autograd.grad(value, x)[0].sign()
    if how == "frozen":
        model.requires_grad_(False)
        g = torch.autograd.grad(F.cross_entropy(model(x), Y), x)[0]
        model.requires_grad_(True)
        return g.sign()
    if how == "copy":
        return torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(x), Y), x)[0].sign()
    value.backward()
    assert x.grad is not None
    if how == "backward and norm":  # which is none where the weights are no leaves
        assert all(p.grad is not None for p in model.parameters())
    if how != "backward":
        model.zero_grad(set_to_none=how != "backward and zeros")
    return x.grad.sign()


HOW = ["backward", "backward and zero_grad", "backward and zeros", "backward and norm", "frozen", "copy"]


@pytest.mark.parametrize("arguments", WAYS)
@pytest.mark.parametrize("how", HOW)
def test_an_adversarial_loss_may_call_backward(how: str, arguments: dict[str, Any]) -> None:
    def loss(model: nn.Module, meta: Tensor, step: int, how: str = how) -> Tensor:
        return F.cross_entropy(model(X + 0.1 * attack(model, how)) + meta, Y)

    def measure(model: nn.Module, how: str = how) -> Tensor:
        return F.cross_entropy(model(X + 0.1 * attack(model, how))[:4], Y[:4])

    expected, _ = teaching(
        lambda *a: loss(*a, how="grad"), measure=lambda model: measure(model, "grad"), **arguments
    )
    found, _ = teaching(loss, measure=measure, **arguments)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
@pytest.mark.parametrize("how", HOW)
def test_a_large_student_is_no_exception(how: str, curvature: str) -> None:
    def loss(model: nn.Module, meta: Tensor, step: int, how: str = how) -> Tensor:
        return F.cross_entropy(model(X + 0.1 * attack(model, how)) + meta, Y)

    width = 24_000  # over 1 MB: steps are taken at copies, which are no leaves
    options: dict[str, Any] = {"steps": 3, "optimizer": SGD(1e-4), "curvature": curvature}
    expected, _ = teaching(lambda *a: loss(*a, how="grad"), mlp(width), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = teaching(loss, mlp(width), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_loss_that_fails_at_a_large_student_says_why() -> None:
    def loss(model: nn.Module, meta: Tensor, step: int) -> Tensor:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        teaching(loss, mlp(24_000))


def test_the_gradient_of_the_meta_tensors_is_theirs() -> None:
    def loss(model: nn.Module, meta: Tensor, step: int, backward: bool = True) -> Tensor:
        if backward:
            F.cross_entropy(model(X) + meta, Y).backward()
            assert meta.grad is not None
        return F.cross_entropy(model(X) + meta, Y)

    for curvature in CURVATURES:
        expected, _ = teaching(lambda *a: loss(*a, backward=False), curvature=curvature)
        found, _ = teaching(loss, curvature=curvature)
        assert torch.equal(found, expected)


def test_an_error_in_the_walk_back_leaves_the_gradients_as_they_were() -> None:
    meta, kept = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.ones(2, dtype=torch.float64)
    fails = False

    def loss(model: nn.Module, batch: int, step: int) -> Tensor:
        if fails and step == 2:
            raise KeyError("late")
        return F.cross_entropy(model(X) + meta, Y)

    for fails in (True, False):
        meta.grad = kept.clone()
        fails, again = False, fails
        run = l2t.unroll(
            mlp(), range(5), loss, lambda m: m(X).square().mean(), meta=[meta], curvature="recompute"
        )
        fails, before = again, meta.grad
        if fails:
            with pytest.raises(KeyError, match="late"):
                run.backward()
            assert torch.equal(meta.grad, kept)
        else:
            run.backward()
            assert not torch.equal(meta.grad, kept)
        assert meta.grad is before  # as torch's own backward() adds to it


@pytest.mark.parametrize("arguments", [{"curvature": c} for c in CURVATURES] + [{"schedule": "every"}])
def test_layers_may_be_frozen_for_some_steps(arguments: dict[str, Any]) -> None:
    def frozen(model: Any, meta: Tensor, step: int) -> Tensor:
        model[0].requires_grad_(step >= 2)
        return F.cross_entropy(model(X) + meta, Y)

    def detached(model: Any, meta: Tensor, step: int) -> Tensor:
        hidden = model[1](model[0](X))
        return F.cross_entropy(model[2](hidden if step >= 2 else hidden.detach()) + meta, Y)

    student = mlp()
    expected, _ = teaching(detached, student, **arguments)
    found, run = teaching(frozen, student, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert all(p.requires_grad for p in student.parameters())
    assert not torch.equal(run.weights["0.weight"], student[0].weight)


@pytest.mark.parametrize("arguments", WAYS)
def test_a_measure_may_switch_to_evaluation(arguments: dict[str, Any]) -> None:
    def student() -> nn.Sequential:
        torch.manual_seed(1)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)]
        return nn.Sequential(*layers).double()

    modes = []

    def loss(model: nn.Module, meta: Tensor, step: int) -> Tensor:
        modes.append(model[1].training)  # type: ignore[index]
        return F.cross_entropy(model(X) + meta, Y)

    def switches(model: nn.Module) -> Tensor:
        model.eval()
        return F.cross_entropy(model(X), Y)

    def switches_back(model: nn.Module) -> Tensor:
        value = switches(model)
        model.train()
        return value

    expected, _ = teaching(loss, student(), switches_back, **arguments)
    taught = student()  # which seeds dropout, too
    found, _ = teaching(loss, taught, switches, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert all(modes)
    assert all(part.training for part in taught.modules())


# ---- weights changed in place


@pytest.mark.parametrize("width", [4, 24_000])
@pytest.mark.parametrize("where", ["loss", "measure"])
def test_weights_are_not_to_be_changed_in_place(where: str, width: int) -> None:
    def clamp(model: Any) -> None:
        with torch.no_grad():
            model[2].weight.clamp_(-0.1, 0.1)

    def loss(model: nn.Module, meta: Tensor, step: int) -> Tensor:
        if where == "loss":
            clamp(model)
        return F.cross_entropy(model(X) + meta, Y)

    def measure(model: nn.Module) -> Tensor:
        clamp(model)
        return F.cross_entropy(model(X), Y)

    with pytest.raises(RuntimeError, match=r"as they are, got a change of 2\.weight in place"):
        teaching(loss, mlp(width), measure, optimizer=SGD(1e-4))


def test_an_embedding_that_renormalises_itself_is_refused() -> None:
    student = nn.Embedding(5, 2, max_norm=0.1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"a change of weight in place.*max_norm"):
        teaching(lambda model, meta, step: F.cross_entropy(model(Y) + meta, Y), student)


# ---- graphs carried from step to step


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("lag", [1, 2, 3, 20])
def test_a_graph_carried_over_steps_is_noticed(lag: int, named: bool) -> None:
    def carrying(detach: bool) -> Callable[..., Tensor]:
        before: deque[Tensor] = deque(maxlen=lag)

        def loss(model: nn.Module, meta: Tensor, step: int) -> Tensor:
            value = F.cross_entropy(model(X) + meta, Y)
            total = value * (1 + before[0]) if len(before) == lag else value
            before.append(value.detach() if detach else value)
            return total

        return loss

    options: dict[str, Any] = {"steps": 25} if named else {"steps": 25, "meta": None}
    teaching(carrying(detach=True), **options)
    with pytest.raises(RuntimeError, match="got a graph that leads into step"):
        teaching(carrying(detach=False), **options)


@pytest.mark.parametrize("named", [True, False])
def test_a_measure_that_reaches_an_earlier_step_is_noticed(named: bool) -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, meta: Tensor, step: int) -> Tensor:
        seen.append(F.cross_entropy(model(X) + meta, Y))
        return seen[-1]

    options: dict[str, Any] = {} if named else {"meta": None}
    with pytest.raises(RuntimeError, match="got a graph that leads into step 2"):
        teaching(loss, measure=lambda model: seen[2] + model(X).square().mean(), **options)


# ---- buffers


class Masked(nn.Module):
    """With a mask of 512 kB that nobody writes, or not before a step."""

    def __init__(self, writes_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.register_buffer("mask", torch.ones(256, 256, dtype=torch.float64))
        self.writes_at, self.step = writes_at, None

    def forward(self, x: Tensor) -> Tensor:
        if self.step is not None and self.step == self.writes_at:
            self.mask *= 0.5
        return self.linear(x) * self.mask[0, 0]


def stepping(model: Any, meta: Tensor, step: int) -> Tensor:
    model.step = step
    value = F.cross_entropy(model(X) + meta, Y)
    model.step = None
    return value


def test_a_buffer_that_nobody_writes_is_kept_once() -> None:
    meta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    masks: list[int] = []

    def loss(model: Any, batch: int, step: int) -> Tensor:
        masks.append(model.mask.data_ptr())
        return F.cross_entropy(model(X) + meta, Y)

    student = Masked()
    run = l2t.unroll(student, range(6), loss, lambda model: model(X).square().mean(), meta=[meta])
    assert len(set(masks[1:])) == 1
    assert run.buffers["mask"].data_ptr() == masks[1] != student.mask.data_ptr()
    run.backward()


@pytest.mark.parametrize("arguments", WAYS)
@pytest.mark.parametrize("writes_at", [None, 0, 3])
def test_a_buffer_may_be_written_late(
    writes_at: int | None, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Masked(writes_at)
    found, run = teaching(stepping, student, **arguments)
    monkeypatch.setattr(tape, "LARGE", 1 << 30)  # a copy for every step
    expected, other = teaching(stepping, Masked(writes_at), **arguments)
    assert torch.equal(found, expected)
    assert torch.equal(run.buffers["mask"], other.buffers["mask"])
    assert torch.equal(student.mask, torch.ones_like(student.mask))


def test_a_large_buffer_that_is_written_unseen_is_named() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(20_000)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.norm(torch.ones(3, 20_000)).mean()

    def loss(model: Any, meta: Tensor, step: int) -> Tensor:
        model.norm.train(step >= 2)
        return F.cross_entropy(model(X.float()), Y) + meta.sum()

    with pytest.raises(
        RuntimeError, match=r"got norm\.running_mean, which a later step was the first to write"
    ):
        teaching(loss, Late(), lambda model: model(X.float()).mean())


def test_a_buffer_that_appears_in_the_run_is_named() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2, dtype=torch.float64)
            self.register_buffer("mean", None)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = x.mean(0)
            return self.linear(x - self.mean)

    student = Lazy()
    with pytest.raises(ValueError, match="must be there before the run, got mean, which was None"):
        teaching(stepping, student)
    assert student.mean is None


def test_autocast_around_a_run_keeps_no_weights() -> None:
    meta = torch.zeros(2, requires_grad=True)
    student = nn.Linear(3, 2)
    seen: list[weakref.ref[Tensor]] = []

    def loss(model: Any, batch: int, step: int) -> Tensor:
        seen.append(weakref.ref(model.weight))
        return F.cross_entropy(model(X.float()).float() + meta, Y)

    with torch.autocast("cpu", torch.bfloat16):
        run = l2t.unroll(
            student, range(100), loss, lambda m: m(X.float()).mean(), meta=[meta], schedule="every"
        )
        gc.collect()
        assert sum(ref() is not None for ref in seen) < 30
        run.backward()


# ---- what else is found before or instead of a wrong number


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_meta_tensors_are_refused(kind: str) -> None:
    meta = torch.zeros(2, requires_grad=True)
    hook = getattr(meta, kind)(lambda *_: None)
    arguments: list[Any] = [
        nn.Linear(3, 2),
        range(2),
        lambda model, batch, step: F.cross_entropy(model(X.float()) + meta, Y),
        lambda model: model(X.float()).mean(),
    ]
    with pytest.raises(ValueError, match="without gradient hooks, got one on that at position 0"):
        l2t.unroll(*arguments, meta=[meta])
    hook.remove()
    l2t.unroll(*arguments, meta=[meta]).backward()


def test_a_meta_tensor_that_wants_its_gradient_no_more_is_named() -> None:
    meta, lr = torch.zeros(2, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    student = nn.Linear(3, 2)
    run = l2t.unroll(
        student,
        range(2),
        lambda model, batch, step: F.cross_entropy(model(X.float()) + meta, Y),
        lambda model: model(X.float()).mean(),
        meta=[lr, meta],
        optimizer=SGD(lr),
    )
    meta.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"until backward\(\), got the one at position 1"):
        run.backward()
    meta.requires_grad_(True)
    student.requires_grad_(False)  # whose own weights nobody asks about
    run.backward()
    assert lr.grad is not None
    assert meta.grad is not None


def test_batches_with_a_length_end_there() -> None:
    class Data:
        """A map-style data set, which need not say where it ends."""

        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> int:
            return i

    for plan in ("all", "every"):
        meta = torch.zeros(2, requires_grad=True)
        run = l2t.unroll(
            nn.Linear(3, 2),
            Data(),  # type: ignore[arg-type]
            lambda model, batch, step, meta=meta: F.cross_entropy(model(X.float()) + meta, Y),
            lambda model: model(X.float()).mean(),
            schedule=plan,
        )
        assert run.report.steps == 5


BAD = {
    "a step left out": [("tape", 0), ("tape", 1), ("reverse", 1)],
    "reversed before it is taped": [("forward", 0), ("tape", 1), ("reverse", 1), ("reverse", 0)],
    "a state that is not there": [("forward", 0), ("tape", 1), ("reverse", 1), ("restore", 1), ("tape", 1)],
    "a step jumped over": [("tape", 1), ("reverse", 1), ("restore", 0), ("tape", 0), ("reverse", 0)],
    "the first one first": [("tape", 0), ("tape", 1), ("reverse", 0), ("reverse", 1)],
    "a state of another time": [("store", 1), ("tape", 0), ("tape", 1), ("reverse", 1), ("reverse", 0)],
}


@pytest.mark.parametrize("bad", list(BAD))
def test_a_schedule_of_ones_own_is_looked_through(bad: str) -> None:
    class Own:
        def actions(self, steps: int) -> Any:
            return ((schedule.Action(action), step) for action, step in BAD[bad])

        def __repr__(self) -> str:
            return "Own()"

    with pytest.raises(ValueError, match=r"schedule must tape each step .* got Own\(\), which does not"):
        teaching(stepping, Masked(), steps=2, schedule=Own())


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"curvature": "recompute"}, True),
        ({"optimizer": l2t.optim.Adam(0.1)}, False),
        ({"curvature": "central"}, False),
        ({"curvature": "one-sided"}, False),
    ],
)
def test_sparse_gradients_are_for_plain_sgd(options: dict[str, Any], fits: bool) -> None:
    def student(sparse: bool) -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(5, 2, sparse=sparse, dtype=torch.float64)

    def loss(model: nn.Module, meta: Tensor, step: int) -> Tensor:
        return F.cross_entropy(model(Y) + meta, Y)

    def measure(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(Y), Y)

    if fits:
        found, _ = teaching(loss, student(True), measure, **options)
        expected, _ = teaching(loss, student(False), measure, **options)
        torch.testing.assert_close(found, expected)
    else:
        with pytest.raises(ValueError, match=r"must be dense .* got a sparse one of weight"):
            teaching(loss, student(True), measure, **options)


@pytest.mark.parametrize("value", [None, (1, 2), torch.zeros(2), torch.zeros(())])
def test_what_is_no_loss_is_said_with_a_memory_too(value: Any) -> None:
    with pytest.raises(ValueError, match="loss must return a"):
        teaching(lambda model, meta, step: value, memory="1MB")


def test_an_optimiser_that_is_a_class_is_told_from_one_that_is_made() -> None:
    with pytest.raises(TypeError, match=r"got the class l2t\.optim\.SGD"):
        teaching(stepping, Masked(), optimizer=SGD)
