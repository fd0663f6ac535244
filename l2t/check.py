"""Every sentence that a user can be told, and nothing else that a user can be told.

One function a check or a sentence, grouped by the module that calls it. The form is
``l2t.<op>: <argument> must be <requirement>, got <actual>. <What to do>.`` Each is provoked by a test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from l2t.weight import Diagonal, Full, LowRank, Weight

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


# ---- loss: the extension and the ops ---------------------------------------------------------------------------------


def _described(tensor: object) -> str:
    """Shape, dtype and device of a tensor as they stand in a sentence; the type of anything else."""
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__}"
    return f"shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def extension_missing(error: ImportError) -> ImportError:
    """The compiled core cannot be imported."""
    return ImportError(
        f"l2t: the compiled core l2t._native must be installed, got: {error}. "
        "Run `pip install .` in the source directory, or install a wheel."
    )


def no_kernel(device: str) -> str:
    """A device that the compiled core does not know."""
    return (
        f"l2t: logits must be on the CPU for the compiled kernels, got {device}. "
        "The loss runs in plain PyTorch there: right, but slower."
    )


def op_logits(logits: torch.Tensor) -> Exception:
    """What the ops themselves take as logits."""
    return ValueError(
        f"torch.ops.l2t: logits must be of shape (N, C) and float32 or float64, got {_described(logits)}. "
        "Use l2t.dynamic_loss for other shapes and dtypes."
    )


def op_target(target: torch.Tensor, logits: torch.Tensor) -> Exception:
    """What the ops themselves take as target."""
    return ValueError(
        f"torch.ops.l2t: target must be of shape ({logits.shape[0]},), int64 on {logits.device}, got {_described(target)}. "
        "Use l2t.dynamic_loss for other shapes and dtypes."
    )


def op_low_rank(left: torch.Tensor | None, right: torch.Tensor | None) -> Exception:
    """Left and right come together."""
    return ValueError(
        f"torch.ops.l2t: left and right must be two matrices or None both, got {_described(left)} and "
        f"{_described(right)}. Pass l2t.LowRank to l2t.dynamic_loss."
    )


def op_argument(name: str, tensor: torch.Tensor, shape: tuple[int, ...], logits: torch.Tensor) -> Exception:
    """A table or a vector of rows that does not fit the logits."""
    dtype = str(logits.dtype).removeprefix("torch.")
    return ValueError(
        f"torch.ops.l2t: {name} must be of shape {tuple(shape)}, {dtype} on {logits.device}, got {_described(tensor)}. "
        "Use l2t.dynamic_loss, which casts and checks."
    )


def op_wanted(wanted: Sequence[bool]) -> Exception:
    """A gradient to something that is not there."""
    return ValueError(
        f"torch.ops.l2t: wanted must be a bool for each result, true only for arguments that are given, got {list(wanted)}. "
        "Ask for gradients of given tensors."
    )


def target_range(value: int, row: int, num_classes: int, groups: int, ignore_index: int) -> Exception:
    """A target that is neither a class nor ignored; under vmap as the user gave it."""
    if value >= groups * num_classes:
        value -= (groups - 1) * num_classes
        ignore_index -= (groups - 1) * num_classes if ignore_index >= groups * num_classes else 0
    return IndexError(
        f"l2t.dynamic_loss: target must be in [0, {num_classes}) or ignore_index={ignore_index}, got {value} in row {row}. "
        "Number the classes from 0, or give this value as ignore_index."
    )


def third_derivative() -> Exception:
    """More than two derivatives."""
    return NotImplementedError(
        "l2t.dynamic_loss: the order of derivative must be 1 or 2, got a third derivative. "
        "Detach before differentiating again, or take differences of second derivatives."
    )


def forward_twice() -> Exception:
    """Forward over forward."""
    return NotImplementedError(
        "l2t.dynamic_loss: a second derivative must be forward over reverse, reverse over forward or reverse over reverse, "
        "got forward over forward. Use torch.func.jvp of torch.func.grad, or torch.func.hessian."
    )


# ---- loss: what users pass to dynamic_loss ---------------------------------------------------------------------------


def loss_choice(argument: str, name: object, names: Collection[str]) -> None:
    """The link and the reduction."""
    if name not in names:
        raise ValueError(
            f"l2t.dynamic_loss: {argument} must be one of {', '.join(names)}, got {name!r}. Choose one of these."
        )


def loss_tensors(logits: object, target: object) -> None:
    """Logits and target, to each other."""
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.dim() == 0:
        raise _loss_logits(logits)
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int64, torch.uint8):
        raise _loss_target_dtype(target)
    if target.shape != (logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()):
        raise _loss_target_shape(logits, target)
    if target.device != logits.device:
        raise ValueError(
            f"l2t.dynamic_loss: target must be on the device of logits, {logits.device}, got {target.device}. "
            f"Move it there with target.to({str(logits.device)!r})."
        )


def _loss_logits(logits: object) -> Exception:
    if isinstance(logits, torch.Tensor) and logits.is_floating_point():
        return ValueError(
            f"l2t.dynamic_loss: logits must be of shape (N, C), (N, C, d1, ...) or (C,), got {_described(logits)}. "
            "Give one score a class."
        )
    return TypeError(
        f"l2t.dynamic_loss: logits must be a floating-point tensor, got {_described(logits)}. "
        "Pass the raw scores of the student."
    )


def _loss_target_dtype(target: object) -> Exception:
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        return TypeError(
            f"l2t.dynamic_loss: target must be class indices, got {_described(target)}. Class probabilities are not "
            "supported: pass target.argmax(1), or put soft targets into the rows of weight with link='identity'."
        )
    return TypeError(
        f"l2t.dynamic_loss: target must be an int64 or uint8 tensor, got {_described(target)}. "
        "Convert it with target.long()."
    )


def _loss_target_shape(logits: torch.Tensor, target: torch.Tensor) -> Exception:
    shape = tuple(logits.shape[:1] + logits.shape[2:]) if logits.dim() > 1 else ()
    return ValueError(
        f"l2t.dynamic_loss: target must be of shape {shape} for logits of shape {tuple(logits.shape)}, "
        f"got {_described(target)}. The classes are dimension 1 of logits, or dimension 0 of a single sample."
    )


def loss_weight(weight: object) -> Exception:
    """A weight that is none of the structures."""
    return TypeError(
        f"l2t.dynamic_loss: weight must be l2t.Full, l2t.Diagonal, l2t.LowRank, a tensor or None, got {_described(weight)}. "
        "Wrap the coefficients in one of these."
    )


def loss_coefficients(
    logits: torch.Tensor,
    weight: Weight | torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    """Weight, bias and scale, against the logits."""
    if weight is None and bias is None and scale is None:
        return
    num_classes = logits.shape[1 if logits.dim() > 1 else 0]
    line = (num_classes,)
    if isinstance(weight, torch.Tensor):
        if weight.shape not in (line, (num_classes, num_classes)):
            raise ValueError(
                f"l2t.dynamic_loss: weight must be of shape ({num_classes}, {num_classes}) or ({num_classes},) for "
                f"{num_classes} classes, got {_described(weight)}. Give one coefficient a class, or one a pair of classes."
            )
        _loss_dtype("weight", weight, logits)
    elif isinstance(weight, Full):
        _loss_table("weight.weight", weight.weight, (num_classes, num_classes), logits)
    elif isinstance(weight, Diagonal):
        _loss_table("weight.diagonal", weight.diagonal, line, logits)
    elif isinstance(weight, LowRank):
        _loss_table("weight.diagonal", weight.diagonal, line, logits)
        rank = weight.left.shape[-1:] if isinstance(weight.left, torch.Tensor) else (1,)
        _loss_table("weight.left", weight.left, (num_classes, *rank), logits)
        _loss_table("weight.right", weight.right, (num_classes, *rank), logits)
    elif weight is not None:
        raise loss_weight(weight)
    if bias is not None:
        _loss_table("bias", bias, line, logits)
    if scale is not None:
        _loss_table("scale", scale, line, logits)


def loss_sample_weight(logits: torch.Tensor, target: torch.Tensor, sample_weight: object) -> None:
    """A factor a sample."""
    _loss_table("sample_weight", sample_weight, tuple(target.shape), logits)


def _loss_table(name: str, tensor: object, shape: tuple[int, ...], logits: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"l2t.dynamic_loss: {name} must be a tensor, got {_described(tensor)}. Use torch.tensor(...).")
    if tensor.shape != shape:
        raise ValueError(
            f"l2t.dynamic_loss: {name} must be of shape {tuple(shape)} for logits of shape {tuple(logits.shape)}, "
            f"got {_described(tensor)}. Give one entry for each class (or sample)."
        )
    _loss_dtype(name, tensor, logits)


def _loss_dtype(name: str, tensor: torch.Tensor, logits: torch.Tensor) -> None:
    """Coefficients have the dtype of the logits or of the arithmetic; under autocast any float up to float32."""
    if tensor.device != logits.device:
        raise ValueError(
            f"l2t.dynamic_loss: {name} must be on the device of logits, {logits.device}, got {tensor.device}. "
            f"Move it there with .to({str(logits.device)!r})."
        )
    if tensor.dtype is logits.dtype:
        return
    if logits.dtype is not torch.float64 and (
        tensor.dtype is torch.float32
        and logits.dtype is not torch.float32
        or tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and torch.is_autocast_enabled(logits.device.type)
    ):
        return
    dtype = str(logits.dtype).removeprefix("torch.")
    fits = dtype if logits.dtype in (torch.float32, torch.float64) else f"{dtype} or float32"
    raise TypeError(
        f"l2t.dynamic_loss: {name} must be {fits} with {dtype} logits, got {_described(tensor)}. Cast it with .to(torch.{dtype})."
    )
