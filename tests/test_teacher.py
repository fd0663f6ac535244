"""The teacher: bounds, calibration, start, gradients, vmap, files, sentences (docs/math.md, section 8)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F

import l2t
from l2t.files import write_tensors

STATE = l2t.StudentState(progress=0.3, train_loss=1.1, train_accuracy=0.6)
EVERY = [
    (kind, link, emphasis)
    for kind in ("shared", "per-class", "low-rank", "full")
    for link in ("sigmoid", "identity", "log-sigmoid")
    for emphasis in (0.0, 1.0)
    if not (link == "identity" and (kind == "shared" or (kind == "per-class" and not emphasis)))
]
DOUBLE = {"dtype": torch.float64}


def pull_at_uniform(teacher: l2t.Teacher, state: l2t.StudentState) -> Tensor:
    """-d loss / d z_y at uniform p for every class y, by autograd through the loss itself."""
    classes = teacher.num_classes
    logits = torch.zeros(classes, classes, dtype=torch.float64, requires_grad=True)
    teacher.loss(logits, torch.arange(classes), state, reduction="sum").backward()
    return -logits.grad.diagonal()


def wild(teacher: l2t.Teacher, spread: float, seed: int) -> l2t.Teacher:
    """The teacher with all of its numbers drawn anew, from a normal distribution of this width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return teacher


@pytest.mark.parametrize(("kind", "link", "emphasis"), EVERY)
@settings(max_examples=8, deadline=None)
@given(
    classes=st.integers(2, 12),
    spread=st.floats(0.01, 30.0),
    seed=st.integers(0, 2**31),
    progress=st.floats(0, 1),
    loss=st.floats(0, 20),
)
def test_the_pull_is_that_of_cross_entropy_whatever_the_raw_numbers(
    kind, link, emphasis, classes, spread, seed, progress, loss
):
    teacher = wild(l2t.Teacher(classes, kind, link=link, emphasis=emphasis, **DOUBLE), spread, seed)
    pull = pull_at_uniform(teacher, l2t.StudentState(progress, loss, 0.5)) / (1 - 1 / classes)
    assert pull.mean().item() == pytest.approx(1.0, rel=1e-8)
    if not emphasis or kind == "shared":
        torch.testing.assert_close(pull, torch.ones_like(pull), rtol=1e-8, atol=0)
    else:
        assert pull.min() > math.exp(-2.0)
        assert pull.max() < math.exp(2.0)


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(2, 30), spread=st.floats(0.01, 1e4), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("kind", ["full", "low-rank"])
def test_coefficients_stay_in_their_bounds(kind, classes, spread, seed):
    teacher = l2t.Teacher(classes, kind, diagonal_start=0.5, diagonal_range=1.5, bias_range=4.0, **DOUBLE)
    wild(teacher, spread, seed)
    weight, bias, scale = teacher(STATE)
    dense = weight.dense()
    own = dense.diagonal()
    assert own.min() >= 0.5 * math.exp(-1.5) * (1 - 1e-6)
    assert own.max() <= 0.5 * math.exp(1.5) * (1 + 1e-6)
    outside = dense.abs().sum(1) - own.abs()
    assert (outside <= min(2.0, (classes - 1) / 2) * own * (1 + 1e-6)).all()
    assert bias.abs().max() <= 4.0
    assert scale.isfinite().all()
    assert (scale > 0).all()


def test_full_puts_its_numbers_where_they_belong():
    teacher = l2t.static_teacher(3, "full", link="identity", off_diagonal_scale=1e-5, **DOUBLE)
    with torch.no_grad():
        teacher.off_diagonal.copy_(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))
    weight = teacher(STATE).weight.weight
    expected = torch.tensor([[1, 1e-5, 2e-5], [3e-5, 1, 4e-5], [5e-5, 6e-5, 1]], dtype=torch.float64)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=0)


def test_low_rank_is_the_full_matrix_of_its_factors():
    teacher = l2t.static_teacher(5, "low-rank", link="identity", rank=2, **DOUBLE)
    dense = teacher(STATE).weight.dense()
    product = (teacher.left[0] @ teacher.right.T).detach()
    off = ~torch.eye(5, dtype=torch.bool)
    ratio = (dense / product)[off].reshape(5, 4)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(5, 4))  # one factor a row
    torch.testing.assert_close(dense.diagonal(), torch.ones(5, **DOUBLE))


# ---- the start: a loss that trains as cross-entropy does, or a known one that is named


def gradient_by_row(loss, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


@pytest.mark.parametrize("kind", ["shared", "per-class", "low-rank", "full"])
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_it_can_start_as_label_smoothing(kind, classes, smoothing):
    teacher = l2t.Teacher(classes, kind, link="identity", smoothing=smoothing, **DOUBLE).neutral()
    logits, target = torch.randn(40, classes, **DOUBLE), torch.arange(40) % classes
    found = gradient_by_row(lambda z: teacher.loss(z, target, STATE), logits)
    known = gradient_by_row(lambda z: F.cross_entropy(z, target, label_smoothing=smoothing), logits)
    torch.testing.assert_close(found * (1.0 - smoothing), known)


def test_it_can_start_as_generalised_cross_entropy():
    teacher = l2t.Teacher(10, link="sigmoid", diagonal_start=0.7, bias_start=-6.0, **DOUBLE).neutral()
    logits, target = 2.0 * torch.randn(60, 10, **DOUBLE), torch.arange(60) % 10

    def known(z):
        return (1.0 - z.softmax(1)[range(60), target] ** 0.7).mean() / 0.7

    found = gradient_by_row(lambda z: teacher.loss(z, target, STATE), logits)
    factor = (1.0 / 10) ** -0.7  # at uniform p its pull is p^q of cross-entropy's
    torch.testing.assert_close(found, factor * gradient_by_row(known, logits), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["shared", "full"])
def test_it_can_start_with_class_weights(kind):
    weights = torch.tensor([3.0, 1.0, 0.5, 1.5], **DOUBLE)
    teacher = l2t.Teacher(4, kind, link="identity", smoothing=0.0, class_weights=weights, **DOUBLE).neutral()
    logits, target = torch.randn(40, 4, **DOUBLE), torch.arange(40) % 4
    found = gradient_by_row(lambda z: teacher.loss(z, target, STATE), logits)
    known = gradient_by_row(
        lambda z: F.cross_entropy(z, target, weights / weights.mean(), reduction="sum") / 40, logits
    )
    torch.testing.assert_close(found, known)


def test_a_start_survives_a_file(tmp_path):
    teacher = l2t.Teacher(3, "full", link="identity", smoothing=0.2, class_weights=[1, 2, 3])
    teacher.save(tmp_path)
    again = l2t.Teacher.load(tmp_path)
    assert again.config() == teacher.config()
    torch.testing.assert_close(again(STATE).weight.weight, teacher(STATE).weight.weight, rtol=0, atol=0)


@pytest.mark.parametrize("link", ["sigmoid", "identity"])
@pytest.mark.parametrize("kind", ["shared", "per-class"])
def test_one_strength_of_smoothing_is_taught(kind, link):
    teacher = wild(l2t.static_teacher(5, kind, link=link, smoothing=0.1, **DOUBLE), 30.0, 0)
    dense = teacher(STATE).weight.dense()
    off = dense[~torch.eye(5, dtype=torch.bool)].reshape(5, 4)
    torch.testing.assert_close(off, off[:, :1].expand(5, 4))
    assert (off.abs().sum(1) <= 2.0 * dense.diagonal()).all()
    (pull_at_uniform(teacher, STATE).sum() + dense.sum()).backward()
    assert (teacher.even.grad != 0).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"smoothing": -0.1}, "smoothing must be at least 0 and below"),
        ({"smoothing": 0.9}, "smoothing must be at least 0 and below 0.74"),
        ({"bias_start": math.inf}, "bias_start must be finite"),
        ({"bias_start": 1.0}, "bias_start must be finite, and 0 with link='identity'"),
        ({"class_weights": [1.0, 2.0]}, "class_weights must be 10 positive finite numbers"),
        ({"class_weights": [0.0] * 10}, "class_weights must be 10 positive finite numbers"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        l2t.Teacher(10, "full", link="identity", **settings)


@pytest.mark.parametrize(("kind", "link", "emphasis"), EVERY)
def test_it_starts_along_the_gradient_of_cross_entropy(kind, link, emphasis):
    torch.manual_seed(0)
    teacher = l2t.Teacher(10, kind, link=link, emphasis=emphasis)
    logits = torch.randn(256, 10, requires_grad=True)
    target = torch.randint(10, (256,))
    (taught,) = torch.autograd.grad(teacher.loss(logits, target, STATE), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    assert F.cosine_similarity(taught.flatten(), plain.flatten(), 0) > 0.98
    assert taught.norm() / plain.norm() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("make", "kind", "link"),
    [
        (l2t.Teacher, "shared", "sigmoid"),
        (l2t.Teacher, "full", "identity"),
        (l2t.GateTeacher, "low-rank", "log-sigmoid"),
        (l2t.static_teacher, "full", "sigmoid"),
    ],
)
def test_it_starts_training_a_student_as_cross_entropy_does(make, kind, link):
    x = torch.randn(1300, 12, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.randn(12, 5, generator=torch.Generator().manual_seed(2))).argmax(1)

    def train(loss):
        torch.manual_seed(3)
        student = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
        sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        for step in range(60):
            sgd.zero_grad()
            loss(student(x[:300]), y[:300], step).backward()
            sgd.step()
        with torch.no_grad():
            logits = student(x[300:])
            return F.cross_entropy(logits, y[300:]).item(), (
                logits.argmax(1) != y[300:]
            ).float().mean().item()

    teacher = make(5, kind, link=link)
    taught = train(lambda z, y, step: teacher.loss(z, y, l2t.StudentState(step / 60, 1.0, 0.5)))
    plain = train(lambda z, y, step: F.cross_entropy(z, y))
    assert plain[1] < 0.2  # it does learn: guessing is 0.8
    assert taught[0] == pytest.approx(plain[0], rel=0.3)
    assert taught[1] == pytest.approx(plain[1], abs=0.03)


@pytest.mark.parametrize("make", [l2t.Teacher, l2t.GateTeacher, l2t.static_teacher])
@pytest.mark.parametrize(("kind", "link", "emphasis"), EVERY)
def test_every_parameter_gets_a_gradient_through_an_unrolled_run(make, kind, link, emphasis):
    torch.manual_seed(0)
    teacher = make(4, kind, link=link, emphasis=emphasis)
    student = nn.Linear(6, 4)
    x, y = torch.randn(40, 6), torch.randint(4, (40,))
    run = l2t.unroll(
        student,
        [(x[i : i + 10], y[i : i + 10]) for i in (0, 10, 20)],
        lambda model, batch, step: teacher.loss(
            model(batch[0]), batch[1], l2t.StudentState(step / 3, 1.2, 0.4)
        ),
        lambda model: F.cross_entropy(model(x), y),
        optimizer=l2t.optim.SGD(lr=0.5, momentum=0.9),
    )
    run.backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None, name
        # Every number, not only every tensor: none is masked out or divided out.
        assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("make", [l2t.Teacher, l2t.GateTeacher, l2t.static_teacher])
@pytest.mark.parametrize("kind", ["per-class", "low-rank", "full"])
def test_neutral_is_cross_entropy_with_the_identity_link(make, kind):
    teacher = wild(make(5, kind, link="identity", **DOUBLE), 3.0, 0)
    logits, target = torch.randn(30, 5, **DOUBLE), torch.randint(5, (30,))
    before = teacher.loss(logits, target, STATE)
    torch.testing.assert_close(teacher.neutral().loss(logits, target, STATE), F.cross_entropy(logits, target))
    assert torch.equal(teacher.loss(logits, target, STATE), before)


# ---- states


def test_the_state_chooses_the_slot():
    teacher = l2t.Teacher(3, "shared", slots=2, features=["progress"], **DOUBLE)
    with torch.no_grad():
        teacher.keys.copy_(torch.tensor([[50.0, -50.0]]))
        teacher.diagonal.copy_(torch.tensor([[1.0], [-1.0]]))
    late, early = (teacher(l2t.StudentState(progress, 0, 0)).weight.diagonal for progress in (1.0, 0.0))
    torch.testing.assert_close(late, torch.full((3,), 0.3 * math.exp(math.tanh(1.0)), **DOUBLE))
    torch.testing.assert_close(early, torch.full((3,), 0.3 * math.exp(math.tanh(-1.0)), **DOUBLE))


def test_no_gradient_flows_into_the_state():
    loss = torch.tensor(1.0, requires_grad=True)
    teacher = l2t.Teacher(3, "per-class")
    teacher(l2t.StudentState(0.5, loss, 0.5)).scale.sum().backward()
    assert loss.grad is None


def test_dev_features():
    teacher = l2t.Teacher(3, "per-class", features=["dev_loss", "dev_accuracy"])
    a = teacher(STATE._replace(dev_loss=0.1, dev_accuracy=0.9)).scale
    b = teacher(STATE._replace(dev_loss=2.0, dev_accuracy=0.2)).scale
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match=r"must be a number, got None\. Measure it, or make the teacher"):
        teacher(STATE)


def test_a_wild_state_gives_finite_coefficients():
    weight, bias, scale = l2t.Teacher(5, "full")(l2t.StudentState(1.0, 1e30, 0.0))
    assert weight.weight.isfinite().all()
    assert bias.isfinite().all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("make", [l2t.Teacher, l2t.GateTeacher, l2t.static_teacher])
@pytest.mark.parametrize(("kind", "link", "emphasis"), EVERY)
def test_many_states_at_once_are_the_states_one_by_one(make, kind, link, emphasis):
    teacher = make(4, kind, link=link, emphasis=emphasis, **DOUBLE)
    state = l2t.StudentState(
        torch.rand(2, 3, **DOUBLE), 2 * torch.rand(2, 3, **DOUBLE), torch.rand(3, **DOUBLE)
    )
    together = teacher(state)
    for i in range(2):
        for j in range(3):
            alone = teacher(l2t.StudentState(state[0][i, j], state[1][i, j], state[2][j]))
            for one, many in zip([*alone[0], *alone[1:]], [*together[0], *together[1:]], strict=True):
                torch.testing.assert_close(one, many[i, j], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "kind", "link", "emphasis"),
    [
        (make, *choice)
        for number, choice in enumerate(EVERY)
        for make in ((l2t.Teacher, l2t.GateTeacher, l2t.static_teacher)[number % 3],)
    ],
)
def test_vmap_over_teachers_and_states(make, kind, link, emphasis, dtype):
    teachers = [make(4, kind, link=link, emphasis=emphasis, seed=seed, dtype=dtype) for seed in range(3)]
    parameters, _ = stack_module_state(teachers)
    state = l2t.StudentState(*(torch.rand(3, dtype=dtype) for _ in range(3)), None, None)
    logits, target = torch.randn(3, 8, 4, dtype=dtype), torch.randint(4, (3, 8))

    def loss(parameters, progress, train_loss, accuracy, logits, target):
        weight, bias, scale = functional_call(
            teachers[0], parameters, (l2t.StudentState(progress, train_loss, accuracy),)
        )
        return l2t.dynamic_loss(logits, target, weight, bias, scale, link=link)

    def whole(parameters, logits):
        return torch.vmap(loss)(parameters, *state[:3], logits, target).sum()

    found, (d_parameters, d_logits) = torch.func.grad_and_value(whole, argnums=(0, 1))(parameters, logits)[
        ::-1
    ]
    alone = 0.0
    for i, teacher in enumerate(teachers):
        z = logits[i].clone().requires_grad_()
        value = teacher.loss(z, target[i], l2t.StudentState(*(field[i] for field in state[:3])))
        value.backward()
        alone = alone + value.detach()
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-14}
        torch.testing.assert_close(d_logits[i], z.grad, **tolerance)
        for name, parameter in teacher.named_parameters():
            torch.testing.assert_close(d_parameters[name][i], parameter.grad, **tolerance)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [l2t.Teacher, l2t.GateTeacher])
@pytest.mark.parametrize("kind", ["shared", "per-class", "low-rank", "full"])
def test_autocast_leaves_coefficients_alone(kind, make, amp):
    """Their bits, that is; and the loss of logits that a student made under autocast is theirs."""
    teacher = wild(make(5, kind), 0.5, seed=0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator).to(amp)
    target = torch.randint(5, (7,), generator=generator)
    alone = teacher(STATE)
    with torch.autocast("cpu", amp):
        under = teacher(STATE)
        loss = teacher.loss(logits, target, STATE)
    assert loss.dtype is torch.float32
    for a, b in zip((*alone.weight, *alone[1:]), (*under.weight, *under[1:]), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(loss, teacher.loss(logits.float(), target, STATE))


def test_a_double_teacher_is_the_float_one_but_for_rounding():
    single, double = l2t.Teacher(5, "full", seed=3), l2t.Teacher(5, "full", seed=3, **DOUBLE)
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0, atol=0)


# ---- files


@pytest.mark.parametrize("make", [l2t.Teacher, l2t.GateTeacher, l2t.static_teacher])
@pytest.mark.parametrize("to_file", [True, False])
def test_save_and_load(tmp_path, make, to_file):
    teacher = make(6, "low-rank", link="log-sigmoid", features=["progress"], rank=2, seed=9, **DOUBLE)
    path = tmp_path / "deep" / ("mine.safetensors" if to_file else "run")
    teacher.save(path)
    again = l2t.Teacher.load(path)
    assert type(again) is type(teacher)
    assert again.config() == teacher.config()
    assert (
        json.loads(((path if to_file else path / "teacher.json").with_suffix(".json")).read_text())
        == teacher.config()
    )
    for (name, a), (other, b) in zip(teacher.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    before = sorted(path.parent.iterdir())
    teacher.save(path)
    assert sorted(path.parent.iterdir()) == before  # no temporary file stays


def test_the_same_teacher_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        l2t.Teacher(6, "full", seed=4).save(tmp_path / name)
    a, b = ((tmp_path / name / "teacher.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    l2t.Teacher(6, seed=1).save(tmp_path)
    before = (tmp_path / "teacher.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        l2t.Teacher(6, seed=2).save(tmp_path)
    assert (tmp_path / "teacher.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.json", "teacher.safetensors"]


@pytest.mark.parametrize("smoothing", [np.float32(0.25), torch.tensor(0.25)], ids=["numpy", "torch"])
def test_a_smoothing_of_another_kind_is_a_number(tmp_path, smoothing):
    teacher = l2t.Teacher(6, "full", smoothing=smoothing)
    assert teacher.config() == l2t.Teacher(6, "full", smoothing=0.25).config()
    teacher.save(tmp_path)
    assert l2t.Teacher.load(tmp_path).smoothing == 0.25


@pytest.mark.parametrize(
    ("about", "tensors"),
    [
        ({"newer": 1}, {}),
        ({"num_classes": 4}, {}),
        ({"num_classes": "many"}, {}),
        ({"class": "Module"}, {}),
        ({"class": ["Teacher"]}, {}),
        ({"class": "AttentiveTeacher"}, {}),
        ([1], {}),
        (None, {}),
        ({}, None),
        ({}, {"diagonal": torch.zeros(2)}),
        ({}, {"other": torch.zeros(2)}),
    ],
    ids=str,
)
def test_a_file_of_another_teacher_says_so(tmp_path, about, tensors):
    teacher = l2t.Teacher(6, "full")
    file = tmp_path / "teacher.safetensors"
    about = {**teacher.config(), **about} if isinstance(about, dict) else about
    write_tensors(file, {} if tensors is None else {**teacher.state_dict(), **tensors}, {"teacher": about})
    with pytest.raises(ValueError, match="must be a teacher that this library saved"):
        l2t.Teacher.load(file)


def test_a_file_whose_settings_are_torn_says_so(tmp_path):
    from safetensors.torch import save_file

    for said in ("{", "[]", "3"):
        save_file(l2t.Teacher(6).state_dict(), tmp_path / "teacher.safetensors", {"l2t": said})
        with pytest.raises(ValueError, match="must be a teacher that this library saved"):
            l2t.Teacher.load(tmp_path)


def test_a_class_of_the_same_name_does_not_take_the_place_of_another(tmp_path):
    l2t.Teacher(6).save(tmp_path)
    with pytest.raises(ValueError, match=r"must have a name of its own, got Teacher, which l2t\.teacher has"):
        type("Teacher", (l2t.Teacher,), {"__module__": "elsewhere"})
    assert type(l2t.Teacher.load(tmp_path)) is l2t.Teacher
    for _ in range(2):  # as in a notebook whose cell is run again
        again = type("Mine", (l2t.Teacher,), {"__module__": "notebook"})
        again(6).save(tmp_path)
        assert type(l2t.Teacher.load(tmp_path)) is again


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a teacher file or its directory"):
        l2t.Teacher.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match="must be a teacher that this library saved"):
        l2t.Teacher.load(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="must be a teacher that this library saved"):
        l2t.Teacher.load(tmp_path)


# ---- sentences


@pytest.mark.parametrize(
    ("arguments", "settings_", "sentence"),
    [
        ((10, "matrix"), {}, "weight must be one of shared, per-class, low-rank, full, got 'matrix'"),
        ((10,), {"link": "tanh"}, "link must be one of sigmoid, identity, log-sigmoid, got 'tanh'"),
        ((1,), {}, "num_classes must be an integer of 2 or more, got 1"),
        ((10,), {"slots": 0}, "slots must be an integer of 1 or more, got 0"),
        ((10,), {"rank": 1.5}, "rank must be an integer of 1 or more, got 1.5"),
        ((10,), {"features": ["age"]}, "features must be a non-empty sequence of progress, train_loss"),
        ((10,), {"features": []}, "features must be a non-empty sequence"),
        ((10,), {"features": "progress"}, "features must be a non-empty sequence"),
        ((10,), {"diagonal_start": 0.0}, "diagonal_start must be positive and finite, got 0.0"),
        ((10,), {"emphasis": -1.0}, "emphasis must be positive and finite, got -1.0"),
        ((10,), {"bias_range": math.inf}, "bias_range must be positive and finite, got inf"),
        ((10, "shared"), {"link": "identity"}, "cross-entropy whatever the teacher says. Use weight='full'"),
        ((10, "per-class"), {"link": "identity", "emphasis": 0.0}, "cross-entropy whatever the teacher says"),
    ],
)
def test_bad_arguments_say_so(arguments, settings_, sentence):
    with pytest.raises(ValueError) as caught:
        l2t.Teacher(*arguments, **settings_)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("make", [l2t.Teacher, l2t.static_teacher, l2t.GateTeacher])
def test_a_state_of_another_kind_says_so(make):
    with pytest.raises(
        TypeError, match=r"state must be an l2t\.StudentState, got dict\. Give l2t\.StudentState"
    ):
        make(4)(STATE._asdict())


def test_a_gate_has_two_slots():
    with pytest.raises(ValueError, match=r"slots must be 2, got 3\. Use l2t.Teacher for more slots"):
        l2t.GateTeacher(10, slots=3)


def test_repr_names_the_settings():
    assert "weight='full', slots=4, link='sigmoid'" in repr(l2t.Teacher(10, "full"))
