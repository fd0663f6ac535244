"""Student networks: shapes, the papers' numbers of parameters, stacks, and exact gradients to the teacher."""

from __future__ import annotations

import sys
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import l2t
from l2t.students import Lesson, Stack, TaughtLoss, cross_entropy, draw_batches, evaluate
from l2t.tasks import Source, Task
from l2t.tasks.networks import Mixer, ResNet, ViT, WideResNet, cnn_1d, image_students

SIZES = [(1, 28), (3, 32)]
LARGE = ("wrn-28-10", "wrn-40-10")  # shapes alone: their weights fill a fifth of a gigabyte

# Small enough for a whole graph, of the same classes; LeNet takes nothing below 16 pixels.
TINY = {
    **{name: image_students(1, 8, 3)[name] for name in ("mlp", "mlp-norm", "cnn", "cnn-tanh", "cnn-gelu")},
    "lenet": image_students(1, 16, 3)["lenet"],
    "cnn-1d": partial(cnn_1d, 8, 3),
    "resnet-8": partial(ResNet, 8, 1, 3),
    "wrn-10-1": partial(WideResNet, 10, 1, 1, 3),
    "mixer": partial(Mixer, 1, 8, 3, dim=8),
    "vit": partial(ViT, 1, 8, 3, dim=8, heads=2),
}


def inputs(name: str, *lead: int) -> torch.Tensor:
    size = {"lenet": (1, 16, 16), "cnn-1d": (8,)}.get(name, (1, 8, 8))
    return torch.randn(*lead, *size, dtype=torch.float64)


def alone(make, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


@cache
def parameters(name: str, channels: int, size: int) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in image_students(channels, size, 10)[name]().parameters())


@pytest.mark.parametrize(("channels", "size"), SIZES)
@pytest.mark.parametrize("name", image_students(1, 28, 10))
def test_a_student_maps_images_to_logits(name, channels, size):
    with torch.device("meta" if name in LARGE else "cpu"):
        logits = image_students(channels, size, 7)[name]()(torch.zeros(2, channels, size, size))
    assert logits.shape == (2, 7)
    if name not in LARGE:
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "channels", "size", "millions"),
    [
        ("lenet", 1, 28, "0.431"),  # Caffe's lenet.prototxt: 520 + 25,050 + 400,500 + 5,010
        ("resnet-20", 3, 32, "0.27"),  # He et al. 2016, table 6
        ("resnet-32", 3, 32, "0.46"),
        ("wrn-28-10", 3, 32, "36.5"),  # Zagoruyko and Komodakis 2016, table 4
        ("wrn-40-10", 3, 32, "55.8"),
    ],
)
def test_parameters_are_as_many_as_published(name, channels, size, millions):
    decimals = len(millions.partition(".")[2])
    assert f"{parameters(name, channels, size) / 1e6:.{decimals}f}" == millions


@pytest.mark.parametrize(("depth", "width", "millions"), [(40, 1, "0.6"), (40, 4, "8.9"), (16, 8, "11.0")])
def test_wide_networks_of_other_sizes_have_as_many_parameters_as_published(depth, width, millions):
    with torch.device("meta"):
        network = WideResNet(depth, width, 3, 10)
    assert f"{sum(weight.numel() for weight in network.parameters()) / 1e6:.1f}" == millions


@pytest.mark.parametrize("size", [29, 30, 31])
@pytest.mark.parametrize("make", [Mixer, ViT])
def test_patches_see_every_pixel(make, size):
    image = torch.zeros(1, 1, size, size, requires_grad=True)
    make(1, size, 3)(image).square().sum().backward()
    assert (image.grad != 0).all()


def test_what_a_network_cannot_be_says_so():
    with pytest.raises(
        ValueError, match=r"images for lenet must be at least 16 pixels a side, got 12\. Choose"
    ):
        image_students(1, 12, 10)["lenet"]()
    with pytest.raises(
        ValueError, match=r"depth of resnet must be 6 n \+ 2 with n = 1, 2, \.\.\., got 18\. .*is 20\."
    ):
        ResNet(18, 3, 10)
    with pytest.raises(
        ValueError, match=r"depth of wrn must be 6 n \+ 4 .*, got 4\. The nearest one above is 10\."
    ):
        WideResNet(4, 1, 3, 10)


@pytest.mark.parametrize("name", ["resnet-14", "wrn-10-2"])
def test_a_residual_network_of_any_size_goes_by_its_name(name):
    _, depth, *width = name.split("-")
    direct = WideResNet(int(depth), int(width[0]), 2, 5) if width else ResNet(int(depth), 2, 5)
    found = task().student(name)()
    assert {key: w.shape for key, w in found.state_dict().items()} == {
        key: w.shape for key, w in direct.state_dict().items()
    }


def test_names_that_there_are_not_say_so():
    with pytest.raises(ValueError, match=r"depth of wrn must be 6 n \+ 4"):
        task().student("wrn-20-2")
    with pytest.raises(ValueError, match="student of pictures must be one of mlp, mlp-relu"):
        task().student("resnet")
    with pytest.raises(
        ValueError,
        match=r"inputs must be images \(N, C, H, W\) for student 'resnet-14', got shape \(6, 9\) of",
    ):
        task(torch.zeros(6, 9)).student("resnet-14")


def task(x: torch.Tensor | None = None) -> Task:
    x = torch.randn(6, 2, 12, 12) if x is None else x
    samples = x, torch.zeros(len(x), dtype=torch.long)
    return Task("pictures", "", 5, lambda: Source(samples, samples), image_students(2, 12, 5), {})


class Fused(nn.Linear):
    """What stands in for a transformer of timm."""

    fused_attn = True


def test_models_of_timm_go_by_their_name(monkeypatch):
    """A stand-in for the package: what it is asked for, and that its fused attention is switched off."""
    asked = []

    def create_model(name, **settings):
        asked.append((name, settings))
        return nn.Sequential(nn.Flatten(), Fused(288, settings["num_classes"]))

    timm = SimpleNamespace(create_model=create_model, is_model=lambda name: name == "tiny")
    monkeypatch.setitem(sys.modules, "timm", timm)
    make = task().student("timm:tiny")
    stack = Stack(make, (0, 1))
    assert asked == 2 * [("tiny", {"in_chans": 2, "num_classes": 5})]
    assert not stack.student[1].fused_attn
    assert stack(torch.randn(2, 3, 2, 12, 12)).shape == (2, 3, 5)
    with pytest.raises(
        ValueError, match="student must be timm: and a model that timm knows, got 'timm:huge'"
    ):
        task().student("timm:huge")


def test_without_timm_its_models_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="package timm must be installed for student 'timm:tiny', got none"):
        task().student("timm:tiny")


@pytest.mark.parametrize("name", TINY)
def test_a_stack_is_the_students_alone(name):
    make = TINY[name]
    stack, students = Stack(lambda: make().double(), (3, 4)), [alone(make, seed) for seed in (3, 4)]
    torch.manual_seed(0)
    x = inputs(name, 2, 5)
    for training in (True, False):  # what training leaves in buffers is what evaluation reads
        logits = stack.train(training)(x)
        for i, student in enumerate(students):
            torch.testing.assert_close(logits[i], student.train(training)(x[i]))


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_to_the_teacher_is_that_of_autograd_through_the_whole_run(name):
    make, steps, seeds = TINY[name], 3, (5, 6)
    torch.manual_seed(0)
    teacher = l2t.static_teacher(3, "full", link="sigmoid", dtype=torch.float64)
    x, y = inputs(name, 14), torch.randint(3, (14,))
    batches = draw_batches(torch.arange(10).expand(2, -1), steps, 4, 0)
    loss = TaughtLoss(teacher, record=True)

    def measure(model):
        return cross_entropy(evaluate(model, x[10:].expand(2, *x[10:].shape)), y[10:].expand(2, -1))

    run = l2t.unroll(
        Stack(lambda: make().double(), seeds),
        batches,
        Lesson((x, y), batches, loss, 3),
        measure,
        optimizer=l2t.optim.SGD(lr=0.05, momentum=0.9),
    )
    run.backward()
    found = loss.gradient()

    for i, seed in enumerate(seeds):
        student = alone(make, seed)
        weights = {key: value.detach().requires_grad_() for key, value in student.named_parameters()}
        moments = {key: torch.zeros_like(value) for key, value in weights.items()}
        for rows in batches[:, i]:
            z = functional_call(student, weights, (x[rows],))
            value = teacher.loss(z, y[rows], l2t.StudentState(0.0, 0.0, 0.0))
            grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
            moments = {key: 0.9 * m + g for (key, m), g in zip(moments.items(), grads, strict=True)}
            weights = {key: value - 0.05 * moments[key] for key, value in weights.items()}
        end = F.cross_entropy(functional_call(student.eval(), weights, (x[10:],)), y[10:])
        torch.testing.assert_close(run.measure[i], end.detach(), rtol=1e-9, atol=0)
        own = torch.cat([g.flatten() for g in torch.autograd.grad(end, list(teacher.parameters()))])
        assert own.norm() > 1e-6
        torch.testing.assert_close(found[i], own, rtol=1e-7, atol=1e-10 * float(own.norm()))
