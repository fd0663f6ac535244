"""Augmented images: every crop and mirror image and nothing else; the same again in a step taken again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import l2t
from l2t.augment import augment
from l2t.compare import compare
from l2t.students import Lesson, Stack, cross_entropy
from l2t.teach import episode, trial

X, Y = torch.randn(60, 2, 6, 7, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
RECIPE = l2t.Recipe(steps=12, batch_size=8, lr=0.1, students=2, updates=2, trial_students=2)
CROPPED = dataclasses.replace(RECIPE, augment="crop-flip")


def student() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3))


def outcomes(image: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """All that may become of an image (C, H, W), cut out by slices."""
    _, height, width = image.shape
    found = [image]
    if "crop" in kind:
        wide = torch.zeros(image.shape[0], height + 8, width + 8)
        wide[:, 4 : 4 + height, 4 : 4 + width] = image
        found = [wide[:, i : i + height, j : j + width] for i in range(9) for j in range(9)]
    return [*found, *(one.flip(2) for one in found)] if "flip" in kind else found


@pytest.mark.parametrize(("kind", "count"), [("crop", 81), ("flip", 2), ("crop-flip", 162)])
def test_each_outcome_is_as_likely_as_any_other(kind, count):
    image = torch.arange(1.0, 85.0).reshape(2, 6, 7)
    torch.manual_seed(0)
    made = augment(image.expand(4, 10 * count, 2, 6, 7), kind)
    assert made.shape == (4, 10 * count, 2, 6, 7)
    expected = outcomes(image, kind)
    assert len(expected) == count
    is_it = (made.flatten(0, 1)[:, None] == torch.stack(expected)).flatten(2).all(2)  # [images, outcomes]
    assert (is_it.sum(1) == 1).all()
    seen = is_it.sum(0)  # 40 expected, standard deviation at most 6.3
    assert seen.min() > 12
    assert seen.max() < 75


def test_images_of_a_batch_are_changed_independently():
    torch.manual_seed(0)
    made = augment(torch.arange(1.0, 85.0).reshape(2, 6, 7).expand(3, 4, 2, 6, 7), "crop")
    assert len({one.numpy().tobytes() for one in made.flatten(0, 1)}) > 6


def test_without_augmentation_nothing_is_drawn_and_nothing_changed():
    before = torch.get_rng_state()
    assert augment(X, "none") is X
    lesson = Lesson((X, Y), torch.zeros(1, 2, 4, dtype=torch.long), lambda z, y, *_: cross_entropy(z, y), 3)
    lesson(Stack(student, (0, 1)), lesson.batches[0], 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_taken_again_sees_the_same_images():
    def seen(recipe):
        return episode(l2t.Teacher(3, "full"), student, (X, Y), None, recipe, 0.1, 0, 2)

    recipes = [
        dataclasses.replace(CROPPED, **plan)
        for plan in (
            {"schedule": "all"},
            {"schedule": "every"},
            {"schedule": "binomial", "memory": "40kB"},
            {"schedule": "disk"},
            {"curvature": "recompute"},
        )
    ]
    first, *others = map(seen, recipes)
    for other in others:
        assert torch.equal(other.measure, first.measure)
        assert torch.equal(other.gradient, first.gradient)
    assert not torch.equal(seen(RECIPE).gradient, first.gradient)


def test_dev_rows_stay_as_they_are():
    """Students that do not learn (rate 0) are judged alike, whatever their batches look like."""
    teacher = l2t.Teacher(3, features=["dev_loss", "train_loss"])
    plain, cropped = (
        episode(teacher, student, (X, Y), None, recipe, 0.0, 0, 2) for recipe in (RECIPE, CROPPED)
    )
    assert torch.equal(plain.measure, cropped.measure)
    assert torch.equal(plain.dev_error, cropped.dev_error)
    assert plain.states["dev_loss"] == cropped.states["dev_loss"]
    assert plain.states["train_loss"] != cropped.states["train_loss"]
    tried = [trial([teacher], student, (X, Y), None, recipe, (0.0,), 0) for recipe in (RECIPE, CROPPED)]
    assert torch.equal(*tried)


def test_trials_learn_from_augmented_images():
    tried = [
        trial([l2t.Teacher(3)], student, (X, Y), None, recipe, (0.05, 0.3), 0) for recipe in (RECIPE, CROPPED)
    ]
    assert not torch.equal(*tried)


def test_compared_students_learn_from_augmented_images_and_are_tested_on_plain_ones():
    def loss(recipe, rate):
        found = compare(
            {"mine": l2t.Teacher(3)}, student, (X[:40], Y[:40]), (X[40:], Y[40:]), recipe=recipe, students=2,
            grid=(rate,), tuning_students=2, progress=False,
        )  # fmt: skip
        return found["mine"]["test_loss"]

    plain, cropped = loss(RECIPE, 0.1), loss(CROPPED, 0.1)
    assert all(plain[arm] != cropped[arm] for arm in plain)
    assert loss(RECIPE, 1e-30) == loss(CROPPED, 1e-30)  # none of them learns


def test_only_images_are_augmented(tmp_path):
    flat = X.flatten(1), Y
    sentence = r"train inputs must be images \(N, C, H, W\) with augment='crop-flip', got shape \(60, 84\)\."
    with pytest.raises(ValueError, match=f"l2t.teach: {sentence}"):
        l2t.teach(l2t.Teacher(3), lambda: nn.Linear(84, 3), flat, recipe=CROPPED, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"l2t.compare: {sentence}"):
        compare({"mine": l2t.Teacher(3)}, lambda: nn.Linear(84, 3), flat, flat, recipe=CROPPED)


def test_an_unknown_augmentation_says_so():
    with pytest.raises(ValueError, match="augment must be one of none, crop, flip, crop-flip, got 'mixup'"):
        l2t.Recipe(augment="mixup")


@pytest.mark.parametrize("kind", ["Flip", "crop_flip", ""])
def test_augment_itself_says_so_too(kind):
    with pytest.raises(ValueError, match="kind must be one of none, crop, flip, crop-flip, got"):
        augment(X, kind)
