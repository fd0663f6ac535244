"""Episodes of long runs in bounded memory, and on another device than the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l2t
from l2t.students import Stack, seeded
from l2t.tasks.networks import image_students
from l2t.teach import _unrolled, episode, plan_episode, threads

STUDENT = image_students(3, 32, 10)["resnet-8"]
RECIPE = l2t.Recipe(
    steps=6, batch_size=4, lr=0.05, students=2, updates=1, trial_students=2, trial_rates=(1.0,),
    augment="crop-flip", dev_fraction=0.2,
)  # fmt: skip


def cifar(rows: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers in the shape of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, 32, 32, generator=generator)
    return x.to(device), torch.randint(10, (rows,), generator=generator).to(device)


def test_a_residual_network_is_taught_in_bounded_memory_to_the_same_bits():
    def taught(**plan):
        recipe = dataclasses.replace(RECIPE, **plan)
        return l2t.teach(
            l2t.Teacher(10, "full", link="identity"),
            STUDENT,
            cifar(20),
            recipe=recipe,
            guard=False,
            progress=False,
        )

    whole, bounded = taught(), taught(schedule="binomial", memory="35MB")
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, bounded.teacher.state_dict()[name])
    start = l2t.Teacher(10, "full", link="identity").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in whole.teacher.state_dict().items())


def test_thousands_of_steps_are_a_matter_of_time():
    recipe = dataclasses.replace(RECIPE, steps=3000, memory="40MB", curvature="recompute")
    plan = plan_episode(l2t.Teacher(10), STUDENT, cifar(20), recipe=recipe)
    assert plan.steps == plan.walked == 3000
    assert plan.needs.memory <= 40e6
    assert plan.needs.steps_again > 3000
    whole = plan_episode(l2t.Teacher(10), STUDENT, cifar(20), recipe=dataclasses.replace(recipe, memory=None))
    assert whole.needs.memory > 1e9
    assert whole.needs.steps_again == 0


def test_truncate_walks_back_over_the_last_steps_only():
    x, y = torch.randn(40, 6), torch.arange(40) % 3

    def seen(truncate):
        recipe = dataclasses.replace(RECIPE, truncate=truncate, augment="none")
        return episode(
            l2t.Teacher(3), lambda: torch.nn.Linear(6, 3), (x, y), None, recipe, 0.1, 0, 2
        )  # fmt: skip

    assert len(seen(None).adjoint_norms) == 7  # before each step and at the end
    assert len(seen(2).adjoint_norms) == 3
    assert torch.equal(seen(2).measure, seen(None).measure)
    assert torch.equal(seen(6).gradient, seen(None).gradient)
    assert not torch.equal(seen(2).gradient, seen(None).gradient)


def test_a_step_leaves_nothing_behind_on_the_cpu():
    """On a device whose tensors have no numbers, and which refuse to meet those of the CPU."""
    train = tuple(part.to("meta") for part in cifar(20))
    with pytest.raises(RuntimeError, match="meta"):
        train[0] + torch.ones(32)
    teacher = l2t.Teacher(10, "full", features=("progress", "train_loss", "dev_loss"))
    stack, lesson, loss, held, _ = _unrolled(teacher, STUDENT, train, None, RECIPE, 0.1, 0, 2)
    value = lesson(stack, lesson.batches[0], 0)
    value.backward()
    gradient = loss.gradient()
    found = (value, gradient, *held, *lesson.tracker.state(1)[1:3], *(w.grad for w in stack.parameters()))
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert gradient.shape[0] == 2
    assert next(teacher.parameters()).device.type == "cpu"


def test_an_episode_is_the_same_on_every_device(device):
    """Seeds mean the same: only the rounding of the device differs. What is returned is on the CPU."""
    recipe = dataclasses.replace(RECIPE, steps=3)

    def seen(where):
        return episode(l2t.Teacher(10), STUDENT, cifar(20, where), None, recipe, 0.02, 0, 2)

    here, there = seen("cpu"), seen(device)
    torch.testing.assert_close(there.measure, here.measure, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        there.gradient, here.gradient, rtol=0.05, atol=1e-3 * float(here.gradient.norm())
    )
    assert there.gradient.device.type == "cpu"


def test_a_seed_is_for_the_body_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(7):
        drawn = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), drawn)


def test_a_stack_moves_with_its_weights_and_buffers():
    stack = Stack(STUDENT, (0, 1)).to(torch.float64)
    assert {value.dtype for value in stack.parameters()} == {torch.float64}
    assert stack(torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_replayed_steps_want_the_same_algorithms_of_cudnn():
    assert not torch.backends.cudnn.deterministic
    with threads(None):
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic
