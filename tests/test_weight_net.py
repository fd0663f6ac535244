"""Meta-Weight-Net: its weights, its exact gradient through a run, taught and compared like a teacher."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2t
from l2t.compare import compare
from l2t.students import Lesson, Stack, cross_entropy, draw_batches, evaluate, taught_loss, train

CLASSES = 3
SEEDS = (3, 7)
DOUBLE = {"dtype": torch.float64}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (60,), generator=generator)


def steep(net: l2t.WeightNet) -> l2t.WeightNet:
    """The network with weights that differ more than at the start."""
    with torch.no_grad():
        net.weight_out.mul_(-4.0)
    return net


def weights_of(net: l2t.WeightNet, losses):
    """The network from the layers of torch, (B,) to (B,)."""
    first, last = nn.Linear(1, net.hidden, **DOUBLE), nn.Linear(net.hidden, 1, **DOUBLE)
    with torch.no_grad():
        first.weight.copy_(net.weight_in[:, None]), first.bias.copy_(net.bias_in)
        last.weight.copy_(net.weight_out[None]), last.bias.copy_(net.bias_out)
    return nn.Sequential(first, nn.ReLU(), last, nn.Sigmoid())(losses[:, None])[:, 0]


def test_it_is_the_network_of_the_paper_and_starts_as_torch_starts_layers():
    net = l2t.WeightNet(CLASSES, seed=4, **DOUBLE)
    losses = torch.linspace(0, 9, 7, **DOUBLE)
    torch.testing.assert_close(net(losses), weights_of(net, losses))
    assert sum(parameter.numel() for parameter in net.parameters()) == 301
    assert 0.9 < net.weight_in.abs().max() < 1
    assert 0.09 < net.weight_out.abs().max() < 0.1
    single = l2t.WeightNet(CLASSES, seed=4)
    assert torch.equal(single.weight_out, net.weight_out.float())
    assert not torch.equal(single.weight_out, l2t.WeightNet(CLASSES, seed=5).weight_out)


def test_a_student_steps_along_the_weighed_mean_of_its_rows_gradients():
    net = steep(l2t.WeightNet(CLASSES, **DOUBLE))
    torch.manual_seed(1)
    logits = (3 * torch.randn(2, 8, CLASSES, **DOUBLE)).requires_grad_()
    target = torch.randint(CLASSES, (2, 8))
    found = taught_loss(net)(logits, target, None, 0)
    for i in range(2):
        rows = F.cross_entropy(logits[i], target[i], reduction="none")
        weights = net(rows.detach()).detach()
        assert weights.max() > 1.3 * weights.min()
        expected = (weights * rows).sum() / weights.sum()
        torch.testing.assert_close(found[i], expected)
        both = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found[i], expected)]
        torch.testing.assert_close(*both)


def test_the_neutral_one_is_cross_entropy_and_so_are_weights_that_are_all_zero():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 8, CLASSES), torch.randint(CLASSES, (2, 8))
    net = l2t.WeightNet(CLASSES)
    expected = cross_entropy(logits, target)
    assert not torch.allclose(taught_loss(net)(logits, target, None, 0), expected, rtol=1e-6)
    torch.testing.assert_close(taught_loss(net.neutral())(logits, target, None, 0), expected)
    with torch.no_grad():
        net.bias_out.fill_(-200.0)  # the sigmoid of float32 is zero there
    assert taught_loss(net)(logits, target, None, 0).isfinite().all()


@pytest.mark.parametrize("curvature", ["reverse", "recompute"])
def test_gradients_are_plain_autograd_through_each_run(curvature):
    """Against a graph of the whole run, whose steps are made of rows' gradients and weights by hand."""
    net = steep(l2t.WeightNet(CLASSES, hidden=7, **DOUBLE))
    x, y = data()
    steps = 5
    batches = draw_batches(torch.arange(40).expand(2, -1), steps, 8, 0)
    loss = taught_loss(net, record=True)
    stack = Stack(lambda: mlp().double(), SEEDS)

    def measure(model):
        return cross_entropy(evaluate(model, x[40:].expand(2, 20, 6)), y[40:].expand(2, 20))

    sgd = l2t.optim.SGD(lr=0.5, momentum=0.9)
    run = l2t.unroll(
        stack, batches, Lesson((x, y), batches, loss, CLASSES), measure, optimizer=sgd, curvature=curvature
    )
    run.backward()
    found = loss.gradient()
    assert all(parameter.grad is None for parameter in net.parameters())

    def forward(rows, weights):
        return torch.tanh(x[rows] @ weights[0].T + weights[1]) @ weights[2].T + weights[3]

    def final(i, given):
        """How student i ends; with ``given`` the weights do not depend on its state."""
        torch.manual_seed(SEEDS[i])
        weights = [w.detach().requires_grad_() for w in mlp().double().parameters()]
        moments = [torch.zeros_like(w) for w in weights]
        for step in range(steps):
            rows = batches[step, i]
            losses = F.cross_entropy(forward(rows, weights), y[rows], reduction="none")
            shares = net(losses.detach() if given else losses)
            shares = shares / shares.sum()
            grads = [torch.zeros_like(w) for w in weights]
            for share, row in zip(shares, losses, strict=True):
                of_row = torch.autograd.grad(row, weights, create_graph=True)
                grads = [g + share * part for g, part in zip(grads, of_row, strict=True)]
            moments = [0.9 * m + g for m, g in zip(moments, grads, strict=True)]
            weights = [w - 0.5 * m for w, m in zip(weights, moments, strict=True)]
        return F.cross_entropy(forward(torch.arange(40, 60), weights), y[40:])

    for i in range(2):
        end = final(i, given=False)
        torch.testing.assert_close(run.measure[i], end.detach(), rtol=1e-10, atol=0)
        own, less = (
            torch.cat([g.flatten() for g in torch.autograd.grad(final(i, given), list(net.parameters()))])
            for given in (False, True)
        )
        assert own.norm() > 1e-3
        torch.testing.assert_close(found[i], own, rtol=1e-8, atol=1e-12)
        assert (found[i] - less).norm() > 1e-3 * own.norm()  # the weights' dependence on the state counts


def test_a_recorded_run_and_the_course_are_the_same():
    net = steep(l2t.WeightNet(CLASSES))
    x, y = data(torch.float32)
    batches = draw_batches(torch.arange(40).expand(2, -1), 6, 8, 0)
    run = l2t.unroll(
        Stack(mlp, SEEDS),
        batches,
        Lesson((x, y), batches, taught_loss(net, record=True), CLASSES),
        lambda model: cross_entropy(evaluate(model, x.expand(2, 60, 6)), y.expand(2, 60)),
        optimizer=l2t.optim.SGD(lr=0.2, momentum=0.9),
    )
    stack = Stack(mlp, SEEDS)
    lesson = Lesson((x, y), batches, taught_loss(net), CLASSES)
    train(stack, lesson, lr=0.2, momentum=0.9, weight_decay=0.0, decay="constant")
    for name, weight in stack.named_parameters():
        torch.testing.assert_close(run.weights[name], weight.detach(), rtol=1e-4, atol=1e-6)


# ---- taught and compared


RECIPE = l2t.Recipe(steps=6, updates=3, lr=0.2, teacher_lr=0.05, trial_students=2, batch_size=8)


def taught(**options):
    return l2t.teach(
        l2t.WeightNet(CLASSES), mlp, data(torch.float32), progress=False, **{"recipe": RECIPE, **options}
    )


def test_it_is_taught_resumed_to_the_bit_and_loaded_as_what_it_is(tmp_path):
    whole = taught(guard=False)
    assert whole.history["teacher"] == {"class": "WeightNet", "num_classes": CLASSES, "hidden": 100}
    assert any(
        not torch.equal(a, b)
        for a, b in zip(whole.teacher.parameters(), l2t.WeightNet(CLASSES).parameters(), strict=True)
    )
    from l2t.teach import _Teaching

    stopped = _Teaching._commit

    def stop(self):
        stopped(self)
        if self.update == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Teaching, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            taught(guard=False, directory=tmp_path)
    again = taught(guard=False, directory=tmp_path, resume=True)
    loaded = l2t.Teacher.load(tmp_path)
    assert type(loaded) is l2t.WeightNet
    assert loaded.config() == json.loads((tmp_path / "teacher.json").read_text()) == whole.teacher.config()
    for name, value in whole.teacher.named_parameters():
        assert torch.equal(value, again.teacher.get_parameter(name))
        assert torch.equal(value, loaded.get_parameter(name))


@pytest.mark.parametrize("curvature", ["forward", "central", "one-sided"])
def test_a_derivative_along_a_direction_is_refused(curvature, tmp_path):
    recipe = l2t.Recipe(**{**RECIPE.to_json(), "curvature": curvature})
    with pytest.raises(ValueError, match=f"must be reverse or recompute for a WeightNet, got '{curvature}'"):
        taught(recipe=recipe, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_is_an_arm_and_may_be_the_teacher_of_a_comparison():
    x, y = data(torch.float32)
    net = steep(l2t.WeightNet(CLASSES))
    found = compare(
        {"mine": net}, mlp, (x[:40], y[:40]), (x[40:], y[40:]), recipe=RECIPE, progress=False,
        also={"Meta-Weight-Net": net, "neutral": net.neutral()}, students=3, grid=(0.2,), tuning_students=2,
    )["mine"]  # fmt: skip
    assert found["test_loss"]["taught"] == found["test_loss"]["Meta-Weight-Net"]
    assert found["test_loss"]["neutral"] == pytest.approx(found["test_loss"]["cross-entropy"], rel=1e-4)
    assert found["test_loss"]["taught"] != pytest.approx(found["test_loss"]["cross-entropy"], rel=1e-3)


@pytest.mark.parametrize("argument", ["num_classes", "hidden"])
def test_sizes_are_checked(argument):
    with pytest.raises(ValueError, match=f"l2t.WeightNet: {argument} must be an integer of . or more, got 0"):
        l2t.WeightNet(**{"num_classes": 3, argument: 0})
