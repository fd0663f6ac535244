"""Teaching by windows: gradients against plain autograd, expected BLEU by brute force, resume to the bit."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import pytest
import sacrebleu
import torch
from scipy import optimize
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from toy_translator import COUNTS, DEV, VOCABULARY, Batches, Toy, batch_of

import l2t
from l2t.files import write_whole
from l2t.teacher import AnyTeacher
from l2t.translation import windows
from l2t.translation.batches import END
from l2t.translation.decode import greedy
from l2t.translation.expected_bleu import (
    expected_bleu,
    log_probabilities,
    sampled,
    score_function,
    sentence_bleu,
)
from l2t.translation.token_teacher import TokenTeacher
from l2t.translation.windows import (
    Stage,
    Window,
    WindowRecipe,
    _Windows,
    advance,
    fresh,
    inverse_temperature,
    make_pool,
    measured,
    read_stages,
    teach_translator,
    window,
    window_level,
    write_stages,
    wrong_tokens,
)

DOUBLE = {"dtype": torch.float64}
SMALL = {
    "run_steps": 12,
    "steps": 3,
    "lr": 0.05,
    "lr_warmup": 2,
    "stages": 3,
    "refresh": 2,
    "updates": 5,
    "students": 2,
    "dev_batches": 2,
    "guard_window": 2,
    "measure": "cross-entropy",
}


def teacher_of(seed: int = 1, **settings) -> TokenTeacher:
    """A teacher whose numbers are all other than zero."""
    teacher = TokenTeacher(COUNTS, slots=2, hats=3, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, **DOUBLE))
    return teacher


def student_of(seed: int = 0, dropout: float = 0.0, double: bool = True) -> Toy:
    torch.manual_seed(seed)
    student = Toy(dropout=dropout)
    return student.double() if double else student


def stage_of(student: Toy, recipe: WindowRecipe, teacher: TokenTeacher) -> Stage:
    """A student that has taken four steps."""
    batches = [batch_of(100 + index) for index in range(4)]
    return advance(student, fresh(student, recipe, VOCABULARY), teacher, batches, recipe, seed=3)


# ---- windows


def by_autograd(teacher, student, stage, batches, dev, recipe) -> tuple[Tensor, Tensor]:
    """The measure after a window and its gradient, with the whole run in one graph of plain formulas."""
    names = [name for name, _ in student.named_parameters()]
    weights = {name: stage.weights[name].clone().requires_grad_() for name in names}
    slots = [list(slot) for slot in stage.slots]
    loss_mean, accuracy = stage.state.train_loss, stage.state.train_accuracy

    def logits(weights, batch):
        hidden = functional_call(student, weights, (batch.source, batch.target_in))
        return F.linear(hidden, weights["head"], weights["head_bias"])

    for index, batch in enumerate(batches):
        at = stage.step + index
        z, kept = logits(weights, batch), batch.target_out != -100
        rows, target = z[kept].log_softmax(-1), batch.target_out[kept]
        weight, _, scale = teacher(l2t.StudentState(at / recipe.run_steps, loss_mean, accuracy))
        loss = -(scale[target] * (weight.dense()[target] * rows).sum(-1)).mean()
        own = rows.detach().gather(-1, target[:, None])[:, 0]
        loss_mean = 0.9 * loss_mean - 0.1 * own.mean().item()
        accuracy = 0.9 * accuracy + 0.1 * own.exp().mean().item()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        factor = (recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0) if recipe.clip_norm else 1.0
        lr = 0.05 * (12 - at) / 10
        for name, g, slot in zip(names, grads, slots, strict=True):
            if recipe.optimizer == "sgd":
                slot[0] = recipe.momentum * slot[0] + factor * g
                weights[name] = weights[name] - lr * slot[0]
            else:
                b1, b2 = recipe.lr_betas
                m, v, k = (
                    b1 * slot[0] + (1 - b1) * factor * g,
                    b2 * slot[1] + (1 - b2) * (factor * g) ** 2,
                    slot[2] + 1,
                )
                slot[:] = m, v, k
                weights[name] = weights[name] - lr / (1 - b1**k) * m / ((v / (1 - b2**k)).sqrt() + 1e-8)
    rows = torch.cat([logits(weights, batch).flatten(0, 1) for batch in dev])
    target = torch.cat([batch.target_out.flatten() for batch in dev])
    measure = F.cross_entropy(rows, target)
    grads = torch.autograd.grad(measure, list(teacher.parameters()))
    return measure.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_the_gradient_of_a_window_is_that_of_autograd_through_all_of_it(optimizer, clip_norm):
    recipe = WindowRecipe(**SMALL | {"optimizer": optimizer, "clip_norm": clip_norm})
    teacher, student = teacher_of(**DOUBLE), student_of()
    stage = stage_of(student, recipe, teacher)
    batches = [batch_of(200 + index) for index in range(3)]
    found = window(teacher, student, stage, batches, DEV, recipe, seed=0)
    measure, gradient = by_autograd(teacher, student, stage, batches, DEV, recipe)
    assert found.after == pytest.approx(float(measure), rel=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 1e-6
    assert len(found.adjoint_norms) == 4
    assert all(x.grad is None for x in teacher.parameters())


def test_with_dropout_the_gradient_is_that_of_differences_whatever_is_remembered():
    teacher, student = teacher_of(**DOUBLE), student_of(dropout=0.3)
    batches = [batch_of(200 + index) for index in range(3)]
    calibrated = {**SMALL, "measure": "calibrated-cross-entropy"}
    recipe = WindowRecipe(**calibrated)
    stage = stage_of(student, recipe, teacher)
    direction = torch.randn(
        sum(x.numel() for x in teacher.parameters()), generator=torch.Generator().manual_seed(5), **DOUBLE
    )

    def after(share: float) -> float:
        moved = copy.deepcopy(teacher)
        parts = direction.split([x.numel() for x in moved.parameters()])
        with torch.no_grad():
            for x, part in zip(moved.parameters(), parts, strict=True):
                x.add_(share * part.reshape(x.shape))
        return window(moved, student, stage, batches, DEV, recipe, seed=7).after

    slope = (after(1e-5) - after(-1e-5)) / 2e-5
    found = window(teacher, student, stage, batches, DEV, recipe, seed=7)
    assert float(found.gradient @ direction) == pytest.approx(slope, rel=1e-5)
    for plan in ({"schedule": "every", "memory": None}, {"curvature": "reverse"}):
        again = window(teacher, student, stage, batches, DEV, WindowRecipe(**calibrated | plan), seed=7)
        assert torch.equal(again.gradient, found.gradient)
    assert window(teacher, student, stage, batches, DEV, recipe, seed=8).after != found.after


def test_pairs_of_perturbed_teachers_give_the_gradient_of_the_mean():
    """Each pair sees the gradient along its own direction; their mean is the gradient of autograd."""
    recipe = WindowRecipe(**SMALL | {"gradient": "evolution", "spread": 1e-4})
    teacher, student = (
        TokenTeacher(COUNTS, "shared", slots=2, features=["progress"], **DOUBLE),
        student_of(dropout=0.3),
    )
    with torch.no_grad():
        teacher.strength.copy_(torch.tensor([[0.3], [-0.2]]))
    stage = stage_of(student, recipe, teacher)
    batches = [batch_of(200 + index) for index in range(3)]
    plain = student_of()
    _, gradient = by_autograd(teacher, plain, stage, batches, DEV, recipe)

    def of(seed: int, student: Toy = plain, **more) -> Window:
        changed = dataclasses.replace(recipe, **more)
        return window(teacher, student, stage, batches, DEV, changed, seed)

    found = torch.stack([of(seed).gradient for seed in range(100)])
    assert (found @ gradient > -1e-9).all()
    # The mean of (e.g) e over n draws is off by sqrt((P + 1) / n) of |g|.
    off = (found.mean(0) - gradient).norm() / gradient.norm()
    assert off < 2.5 * math.sqrt((len(gradient) + 1) / 100)

    one = of(0, student)
    assert torch.equal(one.gradient, of(0, student).gradient)
    assert not torch.equal(one.gradient, of(1, student).gradient)
    assert one.adjoint_norms == []
    # A pair has the dropout and the dev batches of the reverse pass, and ends on either side of it.
    assert one.after == pytest.approx(of(0, student, gradient="reverse").after, rel=1e-6)
    assert one.before == of(0, student, gradient="reverse").before
    assert 0.0 <= one.error <= 1.0
    for name, value in student.state_dict().items():
        assert torch.equal(value, stage.weights[name]), name
    assert all(x.grad is None and x.requires_grad for x in teacher.parameters())

    teacher.keys.requires_grad_(False)  # what is not taught is not perturbed
    for way in ("evolution", "reverse"):
        keys, strengths = of(0, gradient=way).gradient.split([teacher.keys.numel(), teacher.strength.numel()])
        assert not keys.any()
        assert strengths.all()


def test_far_pairs_see_past_a_jag_in_the_measure():
    """The measure of a window along one number of the teacher, with a fast wave on top that no mean shows."""
    recipe = WindowRecipe(**SMALL | {"gradient": "evolution", "spread": 0.5})
    teacher = TokenTeacher(COUNTS, "shared", slots=1, **DOUBLE)
    slopes = []
    with pytest.MonkeyPatch.context() as patch:

        def level(moved, *_):
            x = float(moved.strength.detach())
            return 2.0 * x + 0.1 * math.sin(1000.0 * x)  # of slope 102 at 0

        patch.setattr(windows, "_level", level)
        student = student_of()
        stage = stage_of(student, recipe, teacher)
        for seed in range(200):
            slopes.append(float(window(teacher, student, stage, [], DEV, recipe, seed).gradient))
    assert sum(slopes) / 200 == pytest.approx(2.0, abs=0.6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_on_takes_the_steps_of_a_window_and_those_of_torch(optimizer):
    recipe = WindowRecipe(**SMALL | {"optimizer": optimizer})
    teacher, student = teacher_of(**DOUBLE), student_of(dropout=0.3)
    stage = stage_of(student, recipe, teacher)
    batches = [batch_of(200 + index) for index in range(3)]
    found = window(teacher, student, stage, batches, DEV, recipe, seed=0)
    end = advance(student, stage, teacher, batches, recipe, l2t.students.seed_of(0, 2))
    student.load_state_dict(end.weights)
    assert float(measured(student, DEV, "cross-entropy").detach()) == found.after
    assert end.step == 7

    student = student_of()  # without dropout, by torch's own optimiser, from the start
    start = fresh(student, recipe, VOCABULARY)
    mine = advance(student, start, teacher, batches, recipe, seed=0)
    student.load_state_dict(start.weights)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    other = kind(
        student.parameters(), 1.0, **({"momentum": 0.9} if optimizer == "sgd" else {"betas": (0.9, 0.98)})
    )
    tracker = l2t.translation.token_teacher.TokenTracker(VOCABULARY, recipe.run_steps)
    for step, batch in enumerate(batches):
        given = (student(batch.source, batch.target_in), student.head, student.head_bias, batch.target_out)
        other.zero_grad()
        teacher.fixed().loss(*given, tracker.state(step)).backward()
        tracker.update(step, *given)
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_norm)
        other.param_groups[0]["lr"] = [0.025, 0.05, 0.05][step]
        other.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(mine.weights[name], value, rtol=1e-12, atol=1e-14)


def test_a_pool_has_a_state_of_every_stretch_of_the_run_and_a_file_brings_it_back(tmp_path):
    recipe = WindowRecipe(**SMALL | {"run_steps": 30, "stages": 4})
    pool, end = make_pool(student_of(), teacher_of(**DOUBLE), Batches(0), recipe, seed=1)
    steps = [stage.step for stage in pool]
    assert all(7 * i <= step <= 7 * (i + 1) for i, step in enumerate(steps))
    assert end.step == 30
    assert steps != [
        s.step for s in make_pool(student_of(), teacher_of(**DOUBLE), Batches(0), recipe, seed=2)[0]
    ]
    # One run, not several: the last is what comes of the first by the same batches, without dropout.
    batches = [Batches(0)[step] for step in range(steps[0], 30)]
    straight = advance(student_of(), pool[0], teacher_of(**DOUBLE), batches, recipe, seed=0)
    assert all(torch.equal(x, straight.weights[name]) for name, x in end.weights.items())
    write_stages(tmp_path / "pool.safetensors", pool)
    again = read_stages(tmp_path / "pool.safetensors")
    for one, other in zip(pool, again, strict=True):
        assert (one.step, one.state) == (other.step, other.state)
        assert all(torch.equal(x, other.weights[name]) for name, x in one.weights.items())
        for slot, same in zip(one.slots, other.slots, strict=True):
            assert all(
                torch.equal(x, y) if isinstance(x, Tensor) else x == y
                for x, y in zip(slot, same, strict=True)
            )


@pytest.mark.parametrize(("measure", "of"), [
    ("cross-entropy", lambda p: -p.log()),
    ("expected-error", lambda p: 1 - p),
])  # fmt: skip
def test_measures_are_means_over_all_tokens_without_dropout(measure, of):
    student = student_of(dropout=0.5)
    values = []
    for batch in DEV:
        hidden = student.eval()(batch.source, batch.target_in)
        p = F.linear(hidden, student.head, student.head_bias).softmax(-1)
        values += [
            of(p[i, j, batch.target_out[i, j]]) for i, j in (batch.target_out != -100).nonzero().tolist()
        ]
    student.train()
    torch.testing.assert_close(measured(student, DEV, measure), torch.stack(values).mean())
    assert student.training


def test_wrong_tokens_are_those_that_are_not_the_likeliest():
    student = student_of(dropout=0.5).eval()
    wrong = []
    for batch in DEV:
        logits = F.linear(student(batch.source, batch.target_in), student.head, student.head_bias)
        for i, j in (batch.target_out != -100).nonzero().tolist():
            likeliest = max(range(VOCABULARY), key=logits[i, j].tolist().__getitem__)
            wrong.append(likeliest != int(batch.target_out[i, j]))
    found = wrong_tokens(student.train(), DEV)
    assert found == pytest.approx(sum(wrong) / len(wrong))
    assert 0 < found < 1
    assert student.training


def test_lost_bleu_is_that_of_greedy_translations_as_text():
    student = student_of(dropout=0.5)
    with torch.no_grad():  # words of sources come back, so that some are right
        student.head_bias[4:] += 2.0
    said, wanted = [], []
    for batch in DEV:
        for source, target in zip(batch.source, batch.target_out, strict=True):
            (ids,) = greedy(student.eval(), source[None])
            said.append(" ".join(f"w{x}" for x in ids))
            wanted.append(" ".join(f"w{x}" for x in target.tolist() if x not in (END, -100)))
    expected = sacrebleu.corpus_bleu(said, [wanted]).score
    assert 0 < expected < 100
    assert windows.lost_bleu(student.train(), DEV) == pytest.approx(1 - expected / 100, rel=1e-9)
    assert student.training


def test_the_calibrated_measure_is_cross_entropy_at_the_best_temperature_and_so_is_its_gradient():
    student = student_of(dropout=0.5)

    def best() -> float:
        """By scipy, of all logits at once."""
        z = torch.cat([student.logits(batch).detach().flatten(0, 1) for batch in DEV])
        target = torch.cat([batch.target_out.flatten() for batch in DEV])
        found = optimize.minimize_scalar(
            lambda s: float(F.cross_entropy(math.exp(s) * z, target)), bounds=(-4, 4), method="bounded",
            options={"xatol": 1e-9},
        )  # fmt: skip
        return float(found.fun)

    student.logits = lambda batch: F.linear(
        student.eval()(batch.source, batch.target_in), student.head, student.head_bias
    )
    value = measured(student.train(), DEV, "calibrated-cross-entropy")
    assert student.training
    assert value.item() == pytest.approx(best(), rel=1e-9)
    assert value.item() < measured(student, DEV, "cross-entropy").item() - 1e-3
    for parameter, grad in zip(
        student.parameters(), torch.autograd.grad(value, list(student.parameters())), strict=True
    ):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
        ends = []
        for share in (1e-5, -2e-5):
            parameter.data.add_(share * direction)
            ends.append(best())
        parameter.data.add_(1e-5 * direction)
        slope = float((grad * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_the_sharp_error_is_at_twice_the_best_temperature_and_its_gradient_goes_through_that():
    student = student_of(dropout=0.5)
    wanted = torch.cat([batch.target_out[batch.target_out != -100] for batch in DEV])
    student.head_bias.data = torch.bincount(wanted, minlength=VOCABULARY).double().add(0.5).log()

    def error() -> float:
        """By scipy, of all logits at once."""
        z, target = [], []
        for batch in DEV:
            hidden = student.eval()(batch.source, batch.target_in)
            z.append(F.linear(hidden, student.head, student.head_bias).detach().flatten(0, 1))
            target.append(batch.target_out.flatten())
        logits, wanted = torch.cat(z), torch.cat(target)
        found = optimize.minimize_scalar(
            lambda s: float(F.cross_entropy(math.exp(s) * logits, wanted)), bounds=(-4, 4), method="bounded",
            options={"xatol": 1e-10},
        )  # fmt: skip
        own = F.cross_entropy(2 * math.exp(found.x) * logits, wanted, reduction="none")[wanted != -100]
        return float(1 - own.neg().exp().mean())

    value = measured(student.train(), DEV, "sharp-error")
    assert student.training
    assert value.item() == pytest.approx(error(), rel=1e-4)  # the temperature is found to as much
    assert abs(value.item() - measured(student, DEV, "expected-error").item()) > 1e-3
    with torch.no_grad():
        assert measured(student, DEV, "sharp-error").item() == pytest.approx(value.item(), rel=1e-12)
    for parameter, grad in zip(
        student.parameters(), torch.autograd.grad(value, list(student.parameters())), strict=True
    ):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
        ends = []
        for share in (1e-3, -2e-3):
            parameter.data.add_(share * direction)
            ends.append(error())
        parameter.data.add_(1e-3 * direction)
        slope = float((grad * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("measure", ["sharp-error", "sharp-bleu"])
def test_sharp_measures_have_a_gradient_where_there_is_no_best_temperature(measure):
    student = student_of()
    with torch.no_grad():
        student.head_bias.copy_(100.0 * COUNTS.eq(0))  # sure of what never comes
    value = measured(student, DEV, measure)
    grads = torch.autograd.grad(value, list(student.parameters()), allow_unused=True)
    assert value.isfinite()
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("right", "beta"), [(1.0, 4.0), (-1.0, -4.0)])
def test_a_temperature_stays_in_its_bounds(right, beta):
    hidden, head = torch.full((600, 1), right), torch.tensor([[0.0], [1.0]])
    found = inverse_temperature(hidden, head, None, torch.ones(600, dtype=torch.int64))
    assert math.log(found) == pytest.approx(beta, abs=0.01)


def test_a_temperature_does_not_depend_on_how_many_logits_are_held():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 6, generator=generator, **DOUBLE) for n in (50, 9))
    bias = torch.randn(9, generator=generator, **DOUBLE)
    logits = F.linear(hidden, head, bias)
    target = torch.multinomial((0.5 * logits).softmax(-1), 1, generator=generator)[:, 0]
    found = inverse_temperature(hidden, head, bias, target, rows=7)
    assert 0.2 < found < 1.0
    assert found == pytest.approx(inverse_temperature(hidden, head, bias, target), rel=1e-9)
    (other,) = l2t.students.inverse_temperature(logits[None], target[None]).tolist()
    assert found == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("measure", ["calibrated-cross-entropy", "expected-bleu"])
def test_the_level_of_a_window_is_what_it_ends_with(measure):
    recipe = WindowRecipe(**SMALL | {"measure": measure})
    teacher, student = teacher_of(**DOUBLE), student_of(dropout=0.3)
    stage = stage_of(student, recipe, teacher)
    given = (student, stage, [batch_of(200 + index) for index in range(3)], DEV, recipe, 7)
    assert window(teacher, *given).after == pytest.approx(window_level(teacher, *given), rel=1e-12)
    assert window(teacher, *given).after != pytest.approx(window_level(teacher.neutral(), *given), rel=1e-3)


def test_under_autocast_windows_and_pools_take_the_steps_that_they_take_without_its_cache():
    recipe = WindowRecipe(**SMALL | {"steps": 8, "stages": 1})
    teacher, student = teacher_of(), student_of(double=False)
    batches = [batch_of(index) for index in range(8)]

    def found() -> list[float]:
        given = (student, stage, batches, DEV, recipe, 7)
        one, level = window(teacher, *given), window_level(teacher, *given)
        assert one.after == level
        assert abs(level - one.before) > 0.02  # the steps lead somewhere
        assert window_level(teacher, *given) == level  # from where this one has ended
        _, end = make_pool(student, teacher, Batches(0), recipe, seed=1)
        return [one.before, level, *(float(value.sum()) for value in end.weights.values())]

    stage = fresh(student, recipe, VOCABULARY)
    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        cast = found()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert cast == found()
    assert cast[1] == pytest.approx(plain[1], rel=0.01)


def test_what_the_loss_does_not_reach_stays_as_it_is_in_runs_and_windows():
    class More(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    recipe = WindowRecipe(**SMALL | {"trial_runs": 0, "updates": 1})
    torch.manual_seed(0)
    student, teacher = More().double(), teacher_of(**DOUBLE)
    before = copy.deepcopy(student.more.state_dict())
    plain = student_of()
    plain.load_state_dict({name: x for name, x in student.state_dict().items() if "more" not in name})
    ends = []
    for one in (student, plain):
        stage = stage_of(one, recipe, teacher)
        given = (one, stage, [batch_of(200 + index) for index in range(3)], DEV, recipe, 7)
        found = window(teacher, *given)
        assert found.after == pytest.approx(window_level(teacher, *given), rel=1e-12)
        ends.append((stage, found))
    for name, value in before.items():
        assert torch.equal(ends[0][0].weights[f"more.{name}"], value)
    assert all(torch.equal(x, ends[0][0].weights[name]) for name, x in ends[1][0].weights.items())
    assert torch.equal(ends[0][1].gradient, ends[1][1].gradient)
    result = teach_translator(TokenTeacher(COUNTS), More, Batches, DEV, recipe=recipe, progress=False)
    assert result.history["updates"][0]["skipped"] == 0


# ---- expected BLEU


@pytest.mark.parametrize("measure", ["expected-bleu", "sharp-bleu"])
def test_windows_that_diverge_are_skipped(measure):
    diverging = {"optimizer": "sgd", "lr": 1e25, "clip_norm": None, "lr_warmup": 0, "trial_runs": 0}
    recipe = WindowRecipe(**SMALL | diverging | {"updates": 1, "measure": measure})
    result = teach_translator(TokenTeacher(COUNTS), Toy, Batches, DEV, recipe=recipe, progress=False)
    (row,) = result.history["updates"]
    assert (row["skipped"], row["measure"]) == (2, None)
    assert all(math.isnan(value) for value in row["after"] if value is not None)


def test_a_student_without_probabilities_ends_its_translations_and_those_beside_them_are_the_same():
    student, source = student_of(), batch_of(0).source
    torch.manual_seed(1)
    known = sampled(student, source, 2, longest=3)
    encode = student.encode

    def broken(source):
        state = encode(source).clone()
        state[2:4] = math.nan  # of the second sentence
        return state

    student.encode = broken
    torch.manual_seed(1)
    found = sampled(student, source, 2, longest=3)
    assert found[2:4].tolist() == [[END, -100, -100]] * 2
    others = [0, 1, 4, 5, 6, 7]
    assert torch.equal(found[others], known[others])
    value = expected_bleu(student, source, batch_of(0).target_out, 2, 3)
    assert value.isnan().tolist() == [False, True, False, False]


def test_sentence_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    known = sacrebleu.BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(4, 9, (2,), generator=generator).tolist()
        ours, theirs = (torch.randint(4, 9, (n,), generator=generator).tolist() for n in lengths)
        text = [" ".join(map(str, ids)) for ids in (ours, theirs)]
        expected = known.sentence_score(text[0], [text[1]]).score / 100
        if set(ours) & set(theirs):
            assert sentence_bleu(ours, theirs) == pytest.approx(expected, abs=1e-9)
    assert sentence_bleu([5, 6], [7]) == sentence_bleu([], [7]) == 0.0


def every_translation(vocabulary: int, longest: int) -> Tensor:
    """All sequences that end or are as long as allowed, padded with -100."""
    rows = []
    for length in range(1, longest + 1):
        for ids in itertools.product(range(vocabulary), repeat=length):
            if END not in ids[:-1] and (ids[-1] == END or length == longest):
                rows.append([*ids, *[-100] * (longest - length)])
    return torch.tensor(rows)


def brute_force(student: Toy, source: Tensor, reference: list[int], longest: int, sharpness=1.0):
    """Every translation's probability and BLEU, the expected BLEU and its gradient."""
    rows = every_translation(len(student.head), longest)
    state = student.encode(source)
    log_p = []
    for row in rows.tolist():
        total, token = 0.0, torch.tensor([2])
        for now in row:
            if now == -100:
                break
            logits, _ = student.step(state, token)
            total = total + (sharpness * logits).log_softmax(-1)[0, now]
            token = torch.tensor([now])
        log_p.append(total)
    log_p = torch.stack(log_p)
    rewards = torch.tensor(
        [sentence_bleu([x for x in row if x not in (-100, END)], reference) for row in rows.tolist()],
        **DOUBLE,
    )
    value = (log_p.exp() * rewards).sum()
    gradient = torch.autograd.grad(value, student.head, retain_graph=True)[0]
    return rows, log_p, rewards, value.detach(), gradient


def small_student() -> Toy:
    torch.manual_seed(4)
    return Toy(vocabulary=5, dim=3).double()


def test_the_score_function_gradient_is_right_on_the_average_over_all_samples():
    student, source = small_student(), torch.tensor([[4, 1]])
    rows, log_p, rewards, value, gradient = brute_force(student, source, [4, 1], longest=2)
    assert log_p.exp().sum().item() == pytest.approx(1.0)
    found = log_probabilities(student, source.expand(len(rows), -1), rows)
    torch.testing.assert_close(found, log_p)
    # All pairs of samples, each as often as it is drawn.
    first, second = (x.flatten() for x in torch.meshgrid(*[torch.arange(len(rows))] * 2, indexing="ij"))
    pairs = torch.stack([first, second], 1)
    often = log_p.detach().exp()[pairs].prod(1)
    estimate = (often * score_function(rewards[pairs], found[pairs])).sum()
    assert estimate.item() == pytest.approx(value.item())
    torch.testing.assert_close(torch.autograd.grad(estimate, student.head)[0], gradient)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("sharp", [False, True])
def test_sampled_translations_give_expected_bleu_and_its_gradient(sharp):
    student, source = small_student(), torch.tensor([[4, 1]])
    sharpness = 2.0 + 0.3 * student.head.sum() if sharp else 1.0
    *_, value, gradient = brute_force(student, source, [4, 1], 3, sharpness)
    torch.manual_seed(0)
    target_out = torch.tensor([[4, 1, END]])
    estimate = expected_bleu(student, source, target_out, 20_000, 3, sharpness)
    assert estimate.item() == pytest.approx(value.item(), abs=0.01)
    found = torch.autograd.grad(estimate.sum(), student.head)[0]
    assert (found - gradient).norm() < 0.1 * gradient.norm()


def test_samples_end_once_and_come_from_the_seed():
    student, batch = student_of(), batch_of(0)
    torch.manual_seed(1)
    one = sampled(student, batch.source, 3, longest=6)
    torch.manual_seed(1)
    assert torch.equal(one, sampled(student, batch.source, 3, longest=6))
    assert len(one) == 12
    for row in one.tolist():
        ended = row.index(END) if END in row else len(row) - 1
        assert -100 not in row[: ended + 1]
        assert set(row[ended + 1 :]) <= {-100}


@pytest.mark.parametrize("measure", ["expected-bleu", "sharp-bleu"])
def test_a_window_lowers_expected_bleu_by_its_own_gradient(measure):
    recipe = WindowRecipe(**SMALL | {"measure": measure, "samples": 3})
    teacher, student = teacher_of(**DOUBLE), student_of()
    stage = stage_of(student, recipe, teacher)
    batches = [batch_of(200 + index) for index in range(3)]
    one, other = (window(teacher, student, stage, batches, DEV, recipe, seed=s) for s in (0, 0))
    assert torch.equal(one.gradient, other.gradient)
    assert one.gradient.isfinite().all()
    assert one.gradient.norm() > 0
    assert 0.0 < one.after < 1.0


# ---- the whole


def taught(directory=None, **more):
    given = {"recipe": WindowRecipe(**SMALL), "progress": False, "seed": 4, "directory": directory} | more
    teacher = TokenTeacher(COUNTS, slots=2, hats=3)
    return teach_translator(teacher, lambda: Toy(dropout=0.1), Batches, DEV, **given)


def same(one, other) -> bool:
    def without_seconds(history):
        plain = json.loads(json.dumps(history))
        plain.pop("seconds")
        for row in plain["updates"]:
            row.pop("students_per_second")
        return plain

    weights = zip(one.teacher.parameters(), other.teacher.parameters(), strict=True)
    return without_seconds(one.history) == without_seconds(other.history) and all(
        torch.equal(x, y) for x, y in weights
    )


def test_a_run_is_the_same_to_the_bit_broken_off_anywhere_and_its_history_says_what_was(
    tmp_path, monkeypatch
):
    whole = taught(tmp_path / "whole", guard=False)
    rows = whole.history["updates"]
    assert len(rows) == 5
    assert all(len(row[name]) == 2 for row in rows for name in ("before", "after", "neutral", "steps"))
    assert rows[0]["after"] == pytest.approx(rows[0]["neutral"], rel=1e-5)  # the start says what it starts as
    assert rows[4]["after"] != pytest.approx(rows[4]["neutral"], rel=1e-5)
    moved = [after - own for after, own in zip(rows[4]["after"], rows[4]["neutral"], strict=True)]
    assert rows[4]["measure"] == pytest.approx(sum(rows[0]["neutral"] + moved) / 2, rel=1e-6)
    assert [row["update"] for row in whole.history["pools"]] == [0, 2, 4]
    assert all(len(row["measure"]) == 4 for row in whole.history["pools"])
    assert same(whole, taught(guard=False))
    other = taught(guard=False, seed=5, recipe=WindowRecipe(**SMALL | {"updates": 1}))
    assert other.history["updates"][0]["after"] != rows[0]["after"]
    commit, refill = _Windows._commit, _Windows._refill

    def stop(at, where):
        def raising(self):
            if self.update == at and where == "before the commit":
                raise KeyboardInterrupt
            (commit if where != "in a pool" else refill)(self)
            if self.update == at:
                raise KeyboardInterrupt

        return raising

    for at, where in ((1, "before the commit"), (2, "in a pool"), (3, "after")):
        with monkeypatch.context() as patch:
            patch.setattr(_Windows, "_refill" if where == "in a pool" else "_commit", stop(at, where))
            with pytest.raises(KeyboardInterrupt):
                taught(tmp_path / "parts", guard=False, resume=True)
    parts = taught(tmp_path / "parts", guard=False, resume=True)
    assert same(whole, parts)
    again = AnyTeacher.load(tmp_path / "parts")
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), whole.teacher.parameters(), strict=True))
    assert json.loads((tmp_path / "parts" / "history.json").read_text()) == parts.history
    assert len(list((tmp_path / "parts").glob("pool-*.safetensors"))) == 1


def test_teaching_by_pairs_over_whole_runs_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    recipe = WindowRecipe(**SMALL | {"gradient": "evolution", "steps": 12, "updates": 3, "trial_runs": 0})
    whole = taught(tmp_path / "whole", recipe=recipe)
    assert whole.history["adjoint_norms"] == {}
    for row in whole.history["updates"]:
        assert (row["steps"], row["neutral"]) == ([0, 0], [])  # whole runs begin alike
        assert row["measure"] == pytest.approx(sum(row["after"]) / 2)
    commit = _Windows._commit

    def stop(self):
        commit(self)
        if self.update == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Windows, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            taught(tmp_path / "parts", recipe=recipe, resume=True)
    assert same(whole, taught(tmp_path / "parts", recipe=recipe, resume=True))


@pytest.mark.parametrize("gradient", ["reverse", "evolution"])
def test_what_is_frozen_of_a_teacher_of_tokens_stays(gradient):
    teacher = TokenTeacher(COUNTS, "shared", slots=2)
    teacher.keys.requires_grad_(False)
    recipe = WindowRecipe(**SMALL | {"gradient": gradient, "updates": 2})
    found = teach_translator(teacher, Toy, Batches, DEV, recipe=recipe, guard=False, progress=False).teacher
    assert torch.equal(found.keys, teacher.keys)
    assert not found.keys.requires_grad
    assert not torch.equal(found.strength, teacher.strength)


def test_a_pool_that_was_made_is_kept_whatever_comes_in_its_first_update(tmp_path, monkeypatch):
    recipe = WindowRecipe(**SMALL | {"updates": 3, "trial_runs": 0})
    made, make, taken = [], windows.make_pool, windows.window

    def run(name=None, **more):
        folder = None if name is None else tmp_path / name
        return taught(folder, recipe=recipe, guard=False, resume=True, **more)

    whole = run()

    def counted(*given):
        made.append(given)
        return make(*given)

    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(windows, "make_pool", counted)
    monkeypatch.setattr(windows, "window", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("other", seed=9)
    (tmp_path / "own").mkdir()
    stale = tmp_path / "own" / "pool-000000.safetensors"  # of another run, without its checkpoint
    (tmp_path / "other" / stale.name).rename(stale)
    made.clear()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("own")
        assert len(made) == 1
    seconds = json.loads((tmp_path / "own" / "history.json").read_text())["seconds"]
    assert seconds["updates"] >= seconds["pools"] > 0
    calls = []

    def fifth(*given):  # the first window of the second pool
        calls.append(0)
        return (stopped if len(calls) == 5 else taken)(*given)

    monkeypatch.setattr(windows, "window", fifth)
    with pytest.raises(KeyboardInterrupt):
        run("own")
    assert same(run("own"), whole)
    assert len(made) == 2


@pytest.mark.parametrize(("file", "content"), [
    ("pool-000000.safetensors", None),
    ("pool-000000.safetensors", b"cut short"),
    ("trial.safetensors", b"cut short"),
])  # fmt: skip
def test_a_file_of_states_that_is_missing_or_not_whole_is_named(file, content, tmp_path, monkeypatch):
    recipe = WindowRecipe(**SMALL | {"updates": 1})
    write = windows.write_stages

    def stops(to, *given):
        write(to, *given)
        if to.name == "trial.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(windows, "write_stages", stops)
        if file != "trial.safetensors":
            patch.setattr(windows, "window", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            taught(tmp_path, recipe=recipe)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"l2t.teach_translator: .*{file} must be a safetensors file, whole"
    ):
        taught(tmp_path, recipe=recipe, resume=True)


def test_at_the_end_whole_runs_of_the_same_students_choose(tmp_path, monkeypatch):
    recipe = WindowRecipe(**SMALL | {"updates": 4, "guard_window": 1, "trial_runs": 2})
    monkeypatch.setattr(windows, "_PIECE", 5)
    result = taught(tmp_path / "whole", recipe=recipe)
    trial = result.history["trial"]
    names = {f"label-smoothing-{strength:g}": strength for strength in windows.KNOWN if strength != 0.1}
    known = {"neutral": 0.1, **names}
    assert (trial["by"], trial["runs"]) == ("1 - BLEU", 2)
    assert [*trial["measure"]][: len(known)] == [*known]
    assert len(trial["measure"]) > len(known)  # and what was taught
    means = {name: sum(values) / 2 for name, values in trial["measure"].items()}
    assert trial["chosen"] == min(means, key=lambda name: means[name])
    for name, strength in known.items():
        teacher = TokenTeacher(COUNTS, slots=2, hats=3, smoothing=strength)
        for index, value in enumerate(trial["measure"][name]):
            seed = l2t.students.seed_of(4, 4, index)
            with l2t.students.seeded(l2t.students.seed_of(seed, 1)):
                student = Toy(dropout=0.1)
            stage, source = fresh(student, recipe, VOCABULARY), Batches(l2t.students.seed_of(seed, 2))
            for begin, end in ((0, 5), (5, 10), (10, 12)):
                part = [source[step] for step in range(begin, end)]
                own = l2t.students.seed_of(seed, 3, begin)
                stage = advance(student, stage, teacher, part, recipe, own)
            student.load_state_dict(stage.weights)
            assert value == pytest.approx(windows.lost_bleu(student, DEV), rel=1e-6)
    write, calls = windows.write_stages, []

    def stops(file, *given):
        write(file, *given)
        if file.name == "trial.safetensors":
            calls.append(0)
            if len(calls) in (2, 3, 9, 20):  # within a run, at its end, in another, of another student
                raise KeyboardInterrupt

    monkeypatch.setattr(windows, "write_stages", stops)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            taught(tmp_path / "parts", recipe=recipe, resume=True)
    assert same(result, taught(tmp_path / "parts", recipe=recipe, resume=True))
    assert len(calls) == 3 * 2 * len(means)  # no piece twice
    assert not list((tmp_path / "parts").glob("trial*"))


def test_what_is_taught_must_be_ahead_of_every_known_loss(capsys):
    """From far too much smoothing, a known loss is better than where teaching began."""

    class Worse(_Windows):
        def _finish(self):
            bad = {name: 9.0 * torch.ones_like(x) for name, x in self.start.named_parameters()}
            self._try({"good": bad})

    recipe = WindowRecipe(**SMALL | {"updates": 1, "run_steps": 40})
    run = Worse(TokenTeacher(COUNTS, slots=2, smoothing=0.9), Toy, Batches, DEV, recipe, 0, None, True, False)
    run.run(resume=False)
    measure = run.history["trial"]["measure"]
    chosen = min(measure, key=lambda name: measure[name][0])
    assert chosen.startswith("label-smoothing-")
    assert run.history["trial"]["chosen"] == chosen
    assert run.taught.smoothing == float(chosen.removeprefix("label-smoothing-"))
    assert all(bool((x == 0).all()) for name, x in run.taught.named_parameters() if name != "keys")
    assert "under what was taught (1 - BLEU on dev: neutral" in capsys.readouterr().err


def test_a_finished_run_gives_the_known_loss_that_its_trial_chose(tmp_path, monkeypatch):
    whole_run = _Windows._whole_run

    def best(self, teacher, *given):
        found = whole_run(self, teacher, *given)
        return 0.0 if teacher.smoothing == 0.2 else found

    monkeypatch.setattr(_Windows, "_whole_run", best)
    recipe = WindowRecipe(**SMALL | {"updates": 1})
    first = taught(tmp_path, recipe=recipe)
    assert (first.history["trial"]["chosen"], first.teacher.smoothing) == ("label-smoothing-0.2", 0.2)
    again = taught(tmp_path, recipe=recipe, resume=True)
    assert again.teacher.config() == first.teacher.config()
    assert same(first, again)


def test_without_whole_runs_what_was_taught_is_tried_on_windows(tmp_path, capsys, monkeypatch):
    recipe = WindowRecipe(**SMALL | {"updates": 3, "trial_runs": 0})
    result = taught(recipe=recipe)
    trial = result.history["trial"]
    assert "neutral" in trial["measure"]
    assert all(len(values) == 3 for values in trial["measure"].values())
    means = {name: sum(values) / 3 for name, values in trial["measure"].items()}
    assert trial["chosen"] in means
    with monkeypatch.context() as patch:  # broken off after the last update, the first of its pool
        patch.setattr(_Windows, "_try", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            taught(tmp_path, recipe=recipe)
    assert same(result, taught(tmp_path, recipe=recipe, resume=True))

    class Worse(_Windows):
        def _finish(self):
            bad = {name: 9.0 * torch.ones_like(x) for name, x in self.start.named_parameters()}
            self._try({"good": bad})

    recipe = WindowRecipe(**SMALL | {"updates": 1, "trial_runs": 0})
    run = Worse(TokenTeacher(COUNTS, slots=2), Toy, Batches, DEV, recipe, 0, None, True, False)
    run.run(resume=False)
    assert run.history["trial"]["chosen"] == "neutral"
    assert all(bool((x == 0).all()) for name, x in run.teacher.named_parameters() if name != "keys")
    assert "windows from the last pool do not end lower under what was taught" in capsys.readouterr().err


@pytest.mark.parametrize("effect", [-0.01, 0.0, 0.01])
def test_what_is_judged_is_what_a_teacher_changes_and_not_where_windows_begin(effect, monkeypatch):
    """Stages are a thousand times as far apart as teachers."""
    names = [name for name, _ in TokenTeacher(COUNTS, slots=2).named_parameters()]

    def stage_level(student, stage, *_):
        return 10.0 - stage.step / 2

    def level(teacher, *given):
        assert all(bool((x == 0).all()) for name, x in teacher.named_parameters() if name != "keys")
        return stage_level(*given)

    def seen(teacher, *given):
        gradient = torch.ones(sum(x.numel() for x in teacher.parameters()))
        return Window(0.0, stage_level(*given) + effect * run.update, 0.5, gradient, [1.0])

    monkeypatch.setattr(windows, "window", seen)
    monkeypatch.setattr(windows, "window_level", level)
    recipe = WindowRecipe(**SMALL | {"updates": 20, "stages": 6, "guard_window": 5})
    run = _Windows(TokenTeacher(COUNTS, slots=2), Toy, Batches, DEV, recipe, 0, None, True, False)
    monkeypatch.setattr(run, "_descend", lambda *_: None)
    monkeypatch.setattr(run, "_weights", lambda: {name: torch.tensor(float(run.update)) for name in names})
    run._updates()
    rows = run.history["updates"]
    first = sum(rows[0]["neutral"]) / 2
    for row in rows:
        assert row["measure"] == pytest.approx(first + effect * row["update"], abs=1e-5)
        assert row["after"] == pytest.approx([x + effect * row["update"] for x in row["neutral"]], abs=1e-5)
    assert len({level for row in rows for level in row["neutral"]}) > 5
    assert run.guard.memory["found"] == (effect < 0)
    assert effect >= 0 or run.guard.good[names[0]] == 17.0  # the mean of the last five
    assert not run.history["events"]


def test_a_run_that_is_shorter_than_its_warm_up_reaches_its_rate():
    recipe = WindowRecipe(run_steps=8, steps=2, lr=1.0, lr_warmup=200)
    assert [recipe.rate(step) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert WindowRecipe(run_steps=1, steps=1, lr=1.0).rate(0) == 1.0


def test_a_window_is_measured_on_short_and_long_sentences_alike():
    recipe = WindowRecipe(**SMALL | {"dev_batches": 3})
    dev = [batch_of(index) for index in range(9)]
    run = _Windows(TokenTeacher(COUNTS), Toy, Batches, dev, recipe, 0, None, True, False)
    drawn = [[next(i for i, x in enumerate(dev) if x is one) for one in run._draw(s)[1]] for s in range(20)]
    assert all([index // 3 for index in places] == [0, 1, 2] for places in drawn)
    assert len({tuple(places) for places in drawn}) > 5


@pytest.mark.parametrize("gradient", ["reverse", "evolution"])
def test_teaching_lowers_the_measure(gradient):
    more = {"updates": 8, "refresh": 100, "teacher_lr": 0.2, "students": 4, "steps": 8}
    recipe = WindowRecipe(**SMALL | more | {"gradient": gradient})
    result = teach_translator(
        TokenTeacher(COUNTS, "shared", slots=1, smoothing=0.5),
        Toy,
        Batches,
        DEV,
        recipe=recipe,
        guard=False,
        progress=False,
    )
    start = TokenTeacher(COUNTS, "shared", slots=1, smoothing=0.5)
    for seed in range(4):
        after: list[float] = []
        for teacher in (start, result.teacher):
            student = student_of(seed, double=False)
            _, end = make_pool(student, teacher, Batches(77 + seed), recipe, seed)
            student.load_state_dict(end.weights)
            after.append(float(measured(student, DEV, "cross-entropy").detach()))
        assert after[1] < after[0] - 0.02


def test_another_run_in_the_directory_is_refused(tmp_path):
    recipe = WindowRecipe(**SMALL | {"updates": 1})
    taught(tmp_path, recipe=recipe, guard=False)
    with pytest.raises(ValueError, match="directory must hold no run"):
        taught(tmp_path, recipe=recipe, guard=False)
    with pytest.raises(ValueError, match="got different seed"):
        taught(tmp_path, recipe=recipe, guard=False, resume=True, seed=9)
    write_whole(tmp_path / ".pool-000000.safetensors.1.part", b"cut short")
    taught(tmp_path, recipe=recipe, guard=False, resume=True)
    assert not list(tmp_path.glob(".*.part"))


def test_a_run_of_another_student_is_not_resumed(tmp_path):
    class Other(Toy):
        pass

    given = {"recipe": WindowRecipe(**SMALL | {"updates": 1}), "guard": False, "progress": False}
    teacher = TokenTeacher(COUNTS, slots=2, hats=3)
    teach_translator(teacher, Toy, Batches, DEV, directory=tmp_path, **given)
    for make in (lambda: Toy(dropout=0.5), Other, lambda: Toy().eval()):
        with pytest.raises(ValueError, match=r"got different student's modules\."):
            teach_translator(teacher, make, Batches, DEV, directory=tmp_path, resume=True, **given)
    marker = tmp_path / "checkpoint.json"
    content = json.loads(marker.read_text())
    del content["identity"]["student's modules"]  # as an older version has written it
    marker.write_text(json.dumps(content))
    teach_translator(teacher, Toy, Batches, DEV, directory=tmp_path, resume=True, **given)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"steps": 0}, r"l2t.WindowRecipe: steps must be an integer of 1 or more, got 0"),
    ({"steps": 40, "run_steps": 30}, r"l2t.WindowRecipe: steps must be at most run_steps=30, got 40"),
    ({"samples": 1}, r"l2t.WindowRecipe: samples must be an integer of 2 or more, got 1"),
    ({"trial_runs": -1}, r"l2t.WindowRecipe: trial_runs must be an integer of 0 or more, got -1"),
    ({"optimizer": "lion"}, r"l2t.WindowRecipe: optimizer must be one of adam, sgd, got 'lion'"),
    ({"measure": "bleu"}, r"l2t.WindowRecipe: measure must be one of calibrated-cross-entropy, cross-en"),
    ({"clip_norm": 0.0}, r"l2t.WindowRecipe: clip_norm must be a number in \(0"),
    ({"lr": math.inf}, r"l2t.WindowRecipe: lr must be a number in"),
    ({"updates": 0}, r"l2t.WindowRecipe: updates must be an integer of 1 or more"),
    ({"gradient": "forward"}, r"l2t.WindowRecipe: gradient must be one of reverse, evolution, got 'forward'"),
    ({"gradient": "evolution", "growth": 4.0}, r"growth has no part in gradient='evolution', which"),
    ({"gradient": "evolution", "truncate": 9}, r"truncate has no part in gradient='evolution'"),
    ({"gradient": "evolution", "damping": 0.9}, r'damping .* Leave it out, or set gradient="reverse"\.'),
    ({"spread": 0.0}, r"l2t.WindowRecipe: spread must be a number in \(0"),
    ({"averaging": "mode"}, r"l2t.WindowRecipe: averaging must be one of mean, median, direction"),
])  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        WindowRecipe(**settings)


def test_what_does_not_fit_together_is_refused():
    seeing = TokenTeacher(COUNTS, features=("progress", "dev_loss", "dev_accuracy"))
    with pytest.raises(
        ValueError, match=r"l2t.teach_translator: features must be some .*, got dev_loss, dev_acc"
    ):
        teach_translator(seeing, Toy, Batches, DEV)
    with pytest.raises(ValueError, match="smoothing must be above 0 and below 1, got 'abc'"):
        TokenTeacher(COUNTS, smoothing="abc")
    with pytest.raises(ValueError, match=r"dev must be one or more batches, got none"):
        teach_translator(TokenTeacher(COUNTS), Toy, Batches, [])
    with pytest.raises(ValueError, match=r"student must have a head of the teacher's 9 tokens, got one of 5"):
        teach_translator(TokenTeacher(COUNTS), lambda: Toy(vocabulary=5), Batches, DEV)
