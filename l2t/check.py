"""Every sentence that a user can be told, and nothing else that a user can be told.

One function a check or a sentence, grouped by the module that calls it. The form is
``l2t.<op>: <argument> must be <requirement>, got <actual>. <What to do>.`` Each is provoked by a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

# ---- tasks, command line, report ----


def known(op: str, what: str, name: str, names: Iterable[str]) -> str:
    """Returns name if it is one of names; raises a ValueError that lists them otherwise."""
    if name not in (names := list(names)):
        raise ValueError(
            f"l2t.{op}: the {what} must be one of {', '.join(names)}, got {name!r}. Choose one of these."
        )
    return name


def noise(num_classes: int, rate: float) -> None:
    """Label noise needs two classes and a rate in [0, 1]."""
    if num_classes < 2:
        raise ValueError(
            f"l2t.tasks: num_classes must be 2 or more, got {num_classes}. Noise needs another class."
        )
    if not 0 <= rate <= 1:
        raise ValueError(
            f"l2t.tasks: the noise rate must be in [0, 1], got {rate}. Give the share of labels to flip."
        )


def sample_count(count: int, available: int) -> None:
    """A subset cannot be larger than what it is taken from."""
    if not 0 <= count <= available:
        raise ValueError(
            f"l2t.tasks: the number of samples must be between 0 and {available}, got {count}. Ask for fewer."
        )


def imbalance(ratio: float) -> None:
    """The first class of a long tail is the largest."""
    if not ratio >= 1:
        raise ValueError(
            f"l2t.tasks: imbalance must be 1 or more, got {ratio}. Give the largest class over the smallest."
        )


def missing_package(user: str, package: str) -> ImportError:
    """An optional package is not installed."""
    return ImportError(
        f"l2t.{user}: the package {package} must be installed, got none. Run: pip install 'l2t[tasks]'."
    )


# ---- teacher ---------------------------------------------------------------------------------------------------------


def teacher_choice(argument: str, name: object, names: Sequence[str]) -> None:
    """An argument of Teacher that is one of a few names."""
    if name not in names:
        raise ValueError(f"l2t.Teacher: {argument} must be one of {', '.join(names)}, got {name!r}. Choose one of these.")


def teacher_size(argument: str, value: object, least: int) -> None:
    """A size of Teacher."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"l2t.Teacher: {argument} must be an integer of {least} or more, got {value!r}. Give a size.")


def teacher_positive(argument: str, value: float) -> None:
    """A bound of Teacher."""
    if not 0 < value < float("inf"):
        raise ValueError(
            f"l2t.Teacher: {argument} must be positive and finite, got {value!r}. Leave it out for the default."
        )


def teacher_features(features: Sequence[str], names: Sequence[str], slots: int) -> None:
    """The features that a teacher sees."""
    if isinstance(features, str) or any(name not in names for name in features) or (slots > 1 and not features):
        raise ValueError(
            f"l2t.Teacher: features must be a non-empty sequence of {', '.join(names)}, got {features!r}. "
            "Choose among the fields of l2t.StudentState."
        )


def teacher_has_a_say(weight: str, link: str, calibration: str) -> None:
    """A choice under which calibration divides out all that the teacher could say."""
    if link == "identity" and (weight == "shared" or (weight == "per-class" and calibration == "class")):
        raise ValueError(
            f"l2t.Teacher: weight must be more than {weight!r} with link='identity' and calibration={calibration!r}, "
            "got a loss that is cross-entropy whatever the teacher says. Use weight='full' or 'low-rank', "
            "link='sigmoid', or weight='per-class' with calibration='mean' (learned class weights)."
        )


def teacher_state(name: str, value: object) -> None:
    """A state that lacks a feature the teacher was made to see."""
    if value is None:
        raise ValueError(
            f"l2t.Teacher: state.{name} must be a number, got None. Measure it, or make the teacher without this feature."
        )


def teacher_file_exists(file: Path) -> None:
    """There is a teacher to load."""
    if not file.is_file():
        raise FileNotFoundError(
            f"l2t.Teacher.load: path must be a teacher file or its directory, got {str(file)!r}, which does not exist. "
            "Give what Teacher.save or `l2t teach` wrote."
        )


def teacher_file_is_one(file: Path, is_one: bool) -> None:
    """The file is a teacher."""
    if not is_one:
        raise ValueError(
            f"l2t.Teacher.load: path must be a teacher that this library saved, got {str(file)!r}, which is not. "
            "Give what Teacher.save or `l2t teach` wrote."
        )


def gate_slots(slots: int) -> None:
    """The gate mixes two sets of coefficients."""
    if slots != 2:
        raise ValueError(f"l2t.GateTeacher: slots must be 2, got {slots!r}. Use l2t.Teacher for more slots.")
