"""The teacher: the state of a student in training -> the coefficients of its loss (docs/math.md, section 8).

    state -> features -> attention over slots -> raw numbers q -> bounds -> W, b -> calibration ->
    Coefficients(W, b, scale)

The attention is that of Wu et al., "Learning to Teach with Dynamic Loss Functions" (NeurIPS 2018), section
3.1: every slot holds one set of coefficients, and the state chooses among them. The bounds and the
calibration are ours: without them a teacher changes the student's step size more than its loss, and its
gradients grow without bound.

Bounds, for the raw numbers q, x, b, e of a class y:
    diagonal      d_y = a0 exp(lim tanh q_y)
    off-diagonal  W_yj = d_y rho x_yj / (1 + rho/beta sum_j |x_yj|), so that sum_j |W_yj| < beta d_y; beta
    is at
                  most (C - 1) / 2, which leaves the row at least half of its pull whatever the numbers are
    bias          b_y = b0 + bs tanh b
Calibration. At uniform p a row pulls on its true logit with kappa_y phi'(u0_y) (W_yy - R_y / C), where
u0_y = b_y - R_y log C. kappa_y makes that omega_y times cross-entropy's 1 - 1/C, with the emphasis
omega_y = exp(emph tanh e_y) over its mean over the classes: a teacher says which class matters more and
when, never how large a step is on the average.

The start, all raw numbers at zero, is cross-entropy or close to it; `smoothing` shifts x, `bias_start` is b0
and `class_weights` multiply the emphasis, so that it can be label smoothing, generalised cross-entropy or a
class-weighted loss.

What calibration divides out has no parameter: no d with the identity link, where it cancels, no bias there
and no emphasis for one number for all classes.

Not here: what a state is measured on (students.py) and how a teacher learns (teach.py).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from l2t import check
from l2t.files import read_tensors, write_json, write_tensors
from l2t.functional import dynamic_loss, without_autocast
from l2t.weight import Diagonal, Full, LowRank, Weight

KINDS = ("shared", "per-class", "low-rank", "full")
LINKS = ("sigmoid", "identity", "log-sigmoid")


class Coefficients(NamedTuple):
    """What a teacher sets: the tables of :func:`l2t.dynamic_loss` for C classes.

    ``weight`` is a record of ``l2t.weight`` (full (C, C), diagonal (C,), low rank (C,), (C, r), (C, r)),
    ``bias`` is (C,) or None and ``scale`` is (C,) or None. A teacher gives all three; with the identity link,
    where a bias would change nothing, it is zero.

    Example:
        >>> import torch, l2t
        >>> weight, bias, scale = l2t.Coefficients(l2t.Diagonal.identity(3), None, torch.ones(3))
        >>> l2t.dynamic_loss(torch.zeros(2, 3), torch.tensor([0, 2]), weight, bias, scale, link="identity")
        tensor(1.0986)
    """

    weight: Weight | Tensor | None
    bias: Tensor | None
    scale: Tensor | None


class StudentState(NamedTuple):
    """How far a student is: floats or 0-dim tensors (shape (S,) under ``torch.vmap`` over S students).

    ``progress`` runs from 0 to 1; losses are running means of cross-entropy in nats, accuracies of the
    share of rows that are right, in [0, 1]. In teaching they are those of the batches before the step, 0.9 of
    the mean so far and 0.1 of a batch, from log C and 1 / C on; dev means are those last taken. They are
    constants of the run: no gradient flows through them (docs/math.md, section 5).

    Example:
        >>> import l2t
        >>> l2t.StudentState(progress=0.25, train_loss=1.6, train_accuracy=0.4).dev_loss is None
        True
    """

    progress: float | Tensor
    train_loss: float | Tensor
    train_accuracy: float | Tensor
    dev_loss: float | Tensor | None = None
    dev_accuracy: float | Tensor | None = None


_CLASSES: dict[str, type[AnyTeacher]] = {}  # by name, which is what a file says of its teacher


class AnyTeacher(nn.Module):
    """What :func:`l2t.teach` teaches: it sets a loss for C classes, and is kept in a file.

    What it sets is computed in its own dtype, under ``torch.autocast`` too.

    Attributes:
        num_classes: C.
        features: the fields of :class:`StudentState` that it looks at.
    """

    num_classes: int
    features: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        known = _CLASSES.get(cls.__name__, cls)  # the same one, where its definition is run again
        same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        check.teacher_name(cls.__name__, known.__module__, same)
        _CLASSES[cls.__name__] = cls

    def __call__(self, *arguments: Any) -> Any:
        """What ``forward`` says of these arguments."""
        with without_autocast(next(self.parameters())):
            return super().__call__(*arguments)

    def neutral(self) -> AnyTeacher:
        """A copy that says cross-entropy, or what trains as it does, in every state."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The class and what it takes to make this teacher again, but for its numbers: a JSON-able dict."""
        raise NotImplementedError

    @staticmethod
    def of(config: Mapping[str, Any], **more: Any) -> AnyTeacher:
        """The teacher that :meth:`config` told of, with new start values; ``more`` has seed and dtype."""
        settings = dict(config)
        return _CLASSES[settings.pop("class")](**settings, **more)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the teacher to the file ``path`` (``*.safetensors``) or into the directory ``path``.

        In a directory its name is ``teacher.safetensors``.

        The settings go into the same file, so it is whole or absent; a copy of them is written beside it as
        JSON to read.
        """
        file = _file(path)
        write_tensors(file, dict(self.state_dict()), {"teacher": self.config()})
        write_json(file.with_suffix(".json"), self.config())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> AnyTeacher:
        """The teacher that :meth:`save` wrote to ``path`` (a ``*.safetensors`` file or its directory).

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when the file is not a teacher of this library.
        """
        file = _file(path)
        check.teacher_file_exists(file)
        try:
            tensors, about = read_tensors(file)
            teacher = AnyTeacher.of(about["teacher"], dtype=next(iter(tensors.values())).dtype)
            teacher.load_state_dict(tensors)
        # Settings that are none, or no tensors, or tensors of another teacher.
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, StopIteration) as error:
            raise check.teacher_file_is_none(file) from error
        return teacher

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items() if name != "class")


class AttentiveTeacher(AnyTeacher):
    """A teacher that looks at a student's state and mixes what its slots say by it.

    Attributes:
        slots: number of slots K; one slot looks at nothing.
    """

    slots: int

    @staticmethod
    def _normal(seed: int, dtype: torch.dtype) -> Callable[..., nn.Parameter]:
        """Draws parameters, in float64, so that a float64 teacher is the float32 one but for rounding."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> nn.Parameter:
            return nn.Parameter(
                (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            )

        return normal

    def _make_mix(self, normal: Callable[..., nn.Parameter]) -> None:
        if self.slots > 1:
            self.keys = normal(len(self.features), self.slots)

    def _mix(self, features: Tensor) -> Tensor:
        """Share of each slot, [..., K]: softmax(features . keys)."""
        share: Tensor = torch.softmax(features @ self.keys, -1)
        return share

    def _features(self, state: StudentState) -> Tensor:
        """The chosen fields of ``state`` as numbers of order one, [..., F].

        Bounded, so that no outlier owns the attention.
        """
        units = {  # factor and shift
            "progress": (4.0, 2.0),
            "loss": (2.0 / math.log(self.num_classes), 0.0),
            "accuracy": (2.0, 1.0),
        }
        like = next(self.parameters())
        values = []
        for name in self.features:
            value = getattr(state, name)
            check.teacher_state(name, value)
            factor, shift = units[name.rpartition("_")[2]]
            values.append(
                torch.as_tensor(value, dtype=like.dtype, device=like.device).detach() * factor - shift
            )
        return torch.stack(torch.broadcast_tensors(*values), -1).clamp(-4.0, 4.0)

    def _shares(self, state: StudentState) -> Tensor | None:
        """Share of each slot in ``state``; None where there is one slot, which looks at nothing."""
        check.teacher_states(state, StudentState)
        return self._mix(self._features(state)) if self.slots > 1 else None


def mixed(shares: Tensor | None, slots: Tensor) -> Tensor:
    """What the slots [K, ...] of a table come to with these shares [..., K]."""
    total: Tensor = slots.select(0, 0) if shares is None else torch.tensordot(shares, slots, 1)
    return total


class Teacher(AttentiveTeacher):
    """Attention over slots of loss coefficients, bounded and calibrated (docs/math.md, section 8).

    It starts as a loss that trains a student as cross-entropy does. Works under
    ``torch.func.functional_call`` and ``torch.vmap`` with stacked parameters and states, in float32 and
    float64.

    Args:
        num_classes: number of classes C, at least 2.
        weight: what the teacher sets, which is its capacity against the dev set: ``"shared"`` (one number
            for all classes), ``"per-class"`` (one each), ``"low-rank"`` (these and a rank-``rank`` matrix)
            or ``"full"`` (C x C).
        slots: number of slots K. One slot is a static loss: see :func:`static_teacher`.
        link: ``"sigmoid"`` (the family of the paper), ``"identity"`` or ``"log-sigmoid"``. The identity
            link has no bias to learn, since a constant beside a loss changes nothing.
        features: which fields of :class:`StudentState` the teacher sees.
        rank: columns of the low-rank part.
        diagonal_start: a0. The default, 1 for the identity link, 0.3 for the sigmoid and 0.1 for the
            log-sigmoid, is where the link is close to a line.
        diagonal_range: lim.
        off_diagonal_scale: rho.
        off_diagonal_bound: beta.
        bias_range: bs.
        emphasis: emph; 0 gives every class cross-entropy's pull at uniform p.
        smoothing: the loss that it starts as is label smoothing of this strength (up to a factor, which
            calibration sets). A number, 0 too, gives "shared" and "per-class" an off-diagonal entry of their
            own, the same for all classes j: with the identity link, label smoothing whose strength is taught.
        bias_start: middle of the bias' range. With the sigmoid link, ``diagonal_start=q, bias_start=-5``
            starts as generalised cross-entropy of that q.
        class_weights: one weight a class, (C,), of the loss that it starts as; their mean does not matter.
        spread: standard deviation of the raw numbers at the start, off-diagonals apart. Not zero: slots that
            are all alike give the attention no gradient.
        seed: of the start values.
        dtype: of the parameters.

    Raises:
        ValueError: for an unknown name, sizes that make no sense, and for choices that are cross-entropy
            whatever the teacher says: "shared" with the identity link and no smoothing, "per-class" with it
            and neither smoothing nor emphasis.

    Example:
        >>> import torch, l2t
        >>> teacher = l2t.Teacher(10, "per-class")
        >>> state = l2t.StudentState(progress=0.5, train_loss=0.7, train_accuracy=0.8)
        >>> teacher(state).scale.shape
        torch.Size([10])
        >>> logits = torch.randn(32, 10, requires_grad=True)
        >>> teacher.loss(logits, torch.randint(10, (32,)), state).backward()
    """

    def __init__(
        self,
        num_classes: int,
        weight: str = "shared",
        *,
        slots: int = 4,
        link: str = "sigmoid",
        features: Sequence[str] = ("progress", "train_loss", "train_accuracy"),
        rank: int = 4,
        diagonal_start: float | None = None,
        diagonal_range: float = 1.0,
        off_diagonal_scale: float = 0.2,
        off_diagonal_bound: float = 2.0,
        bias_range: float = 6.0,
        emphasis: float = 1.0,
        smoothing: float | None = None,
        bias_start: float = 0.0,
        class_weights: Sequence[float] | None = None,
        spread: float = 0.02,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check.teacher_choice("weight", weight, KINDS)
        check.teacher_choice("link", link, LINKS)
        check.teacher_size("num_classes", num_classes, 2)
        check.teacher_size("slots", slots, 1)
        check.teacher_size("rank", rank, 1)
        check.teacher_features(features, StudentState._fields, slots)
        check.teacher_has_a_say(weight, link, emphasis, smoothing)
        if diagonal_start is None:
            diagonal_start = {"identity": 1.0, "sigmoid": 0.3, "log-sigmoid": 0.1}[link]
        self.num_classes = num_classes
        self.kind = weight
        self.slots = slots
        self.link = link
        self.features = tuple(features)
        self.rank = rank
        self.diagonal_start = check.teacher_positive("diagonal_start", diagonal_start)
        self.diagonal_range = check.teacher_positive("diagonal_range", diagonal_range)
        self.off_diagonal_scale = check.teacher_positive("off_diagonal_scale", off_diagonal_scale)
        self.off_diagonal_bound = check.teacher_positive("off_diagonal_bound", off_diagonal_bound)
        self.bias_range = check.teacher_positive("bias_range", bias_range)
        self.emphasis = check.teacher_positive("emphasis", emphasis, or_zero=True)
        self.smoothing = None if smoothing is None else float(smoothing)
        self.bias_start = check.teacher_bias_start(bias_start, link)
        self.class_weights = check.teacher_class_weights(class_weights, num_classes)
        self.spread = check.teacher_positive("spread", spread)
        self._even = self._even_start()

        normal = self._normal(seed, dtype)
        each = 1 if weight == "shared" else num_classes
        self._make_mix(normal)
        if link != "identity":
            self.diagonal = normal(slots, each, std=spread)
            self.bias = normal(slots, each, std=spread)
        if weight != "shared" and emphasis:
            self.emphases = normal(slots, num_classes, std=spread)
        # Off-diagonals start at zero: where students separate the data, ones of 0.004 cost accuracy. Where
        # they are all that a teacher has, slots that are alike would leave the attention without a gradient.
        alone = link == "identity" and not emphasis
        if smoothing is not None and weight in ("shared", "per-class"):
            self.even = normal(slots, each, std=spread)
        if weight == "full":
            self.off_diagonal = normal(slots, num_classes, num_classes - 1, std=0.003 if alone else 0.0)
        if weight == "low-rank":  # of two factors at zero neither would ever move
            self.left = normal(slots, num_classes, rank, std=0.003)
            self.right = normal(num_classes, rank)

    def _even_start(self) -> float:
        """The raw number of every off-diagonal entry under which W is that of label smoothing."""
        if not self.smoothing:
            return 0.0
        classes, rho = self.num_classes, self.off_diagonal_scale
        width = classes if self.kind == "low-rank" else classes - 1
        most = min(self.off_diagonal_bound, (classes - 1) / 2) / width
        check.teacher_smoothing(self.smoothing, most / (1.0 / classes + most * (1.0 - 1.0 / classes)))
        share = self.smoothing / classes
        ratio = share / (1.0 - self.smoothing + share)  # W_yj / W_yy
        return ratio / (rho * (1.0 - ratio / most))

    def forward(self, state: StudentState) -> Coefficients:
        """Coefficients of the loss for a student in ``state``, differentiable in the teacher's parameters.

        Fields of a shape (...) in place of numbers give coefficients with these leading dimensions.

        Raises:
            ValueError: when the state lacks a feature that this teacher was made to see.
        """
        mix = self._shares(state)
        classes, rho = self.num_classes, self.off_diagonal_scale
        bound = min(self.off_diagonal_bound, (classes - 1) / 2)
        like = next(self.parameters())
        if mix is None:
            lead = torch.broadcast_shapes(*(value.shape for value in state if isinstance(value, Tensor)))
        else:
            lead = mix.shape[:-1]
        own = like.new_full((*lead, classes), self.diagonal_start)
        bias = torch.zeros_like(own)  # no None: torch.vmap takes tensors only
        if self.link != "identity":
            own = own * (self.diagonal_range * mixed(mix, self.diagonal).tanh()).exp()  # [..., C], W_yy
            bias = self.bias_range * mixed(mix, self.bias).tanh() + (bias + self.bias_start)
        total = own  # [..., C], R_y
        weight: Weight = Diagonal(own)
        if hasattr(self, "even"):
            raw = mixed(mix, self.even) + self._even  # [..., 1 or C], the same for every j
            off = own * rho * raw / (1.0 + rho / bound * (classes - 1) * raw.abs())
            total = own + (classes - 1) * off
            column = off.unsqueeze(-1)
            weight = LowRank(own - off, column, torch.ones_like(column))
        elif self.kind == "full":
            raw = mixed(mix, self.off_diagonal) + self._even  # [..., C, C - 1]
            off = (own * rho / (1.0 + rho / bound * raw.abs().sum(-1))).unsqueeze(-1) * raw
            total = own + off.sum(-1)
            weight = Full(_square(own, off))
        elif self.kind == "low-rank":
            left = mixed(mix, self.left)  # [..., C, r]
            right: Tensor = self.right  # [C, r]
            if self._even:
                left = torch.cat([left, torch.full_like(left[..., :1], self._even)], -1)
                right = torch.cat([right, torch.ones_like(right[:, :1])], -1)
            most = left.abs() @ right.abs().sum(0)  # no less than the sum of |left @ right.T| over a row
            left = (own * rho / (1.0 + rho / bound * most)).unsqueeze(-1) * left
            inner = (left * right).sum(-1)
            total = own + left @ right.sum(0) - inner
            weight = LowRank(own - inner, left, right.expand(left.shape))
        pull = slope(self.link, bias - math.log(classes) * total) * (own - total / classes)
        scale = (1.0 - 1.0 / classes) / pull
        emphasis = None if self.class_weights is None else own.new_tensor(self.class_weights)
        if hasattr(self, "emphases"):
            learned = (self.emphasis * mixed(mix, self.emphases).tanh()).exp()
            emphasis = learned if emphasis is None else learned * emphasis
        if emphasis is not None:
            scale = scale * (emphasis / emphasis.mean(-1, keepdim=True))
        return Coefficients(weight, bias, scale)

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        state: StudentState,
        *,
        sample_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss that the teacher gives a student in ``state``: all that a training loop needs.

        Arguments, result and errors are those of :func:`l2t.dynamic_loss`.
        """
        weight, bias, scale = self(state)
        return dynamic_loss(
            logits,
            target,
            weight,
            bias,
            scale,
            link=self.link,
            sample_weight=sample_weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def neutral(self) -> Teacher:
        """A copy whose slots are all zero: the loss that it starts as, in every state.

        With the identity link and none of ``smoothing`` and ``class_weights``, cross-entropy exactly.
        """
        teacher = copy.deepcopy(self)
        with torch.no_grad():
            for name in ("diagonal", "bias", "off_diagonal", "left", "emphases", "even"):
                if hasattr(teacher, name):
                    getattr(teacher, name).zero_()
        return teacher

    def config(self) -> dict[str, Any]:
        """What it takes to make this teacher again, but for its numbers: a JSON-able dict."""
        return {
            "class": type(self).__name__,
            "num_classes": self.num_classes,
            "weight": self.kind,
            "slots": self.slots,
            "link": self.link,
            "features": list(self.features),
            "rank": self.rank,
            "diagonal_start": self.diagonal_start,
            "diagonal_range": self.diagonal_range,
            "off_diagonal_scale": self.off_diagonal_scale,
            "off_diagonal_bound": self.off_diagonal_bound,
            "bias_range": self.bias_range,
            "emphasis": self.emphasis,
            "smoothing": self.smoothing,
            "bias_start": self.bias_start,
            "class_weights": self.class_weights,
            "spread": self.spread,
        }


class GateTeacher(Teacher):
    """The scalar gate of the authors' published demo: W_t = W_0 + g(s) W_1 in place of attention over slots.

    g(s) = tanh((features . w + c) / 2), and the sum is of raw numbers, bounded and calibrated as every
    teacher's are. The authors start w, c and W_1 at zero, where all three have zero gradient for ever
    (docs/math.md, section 7); here they do not. Arguments as for :class:`Teacher`, less ``slots``: there
    are two.

    Example:
        >>> import l2t
        >>> l2t.GateTeacher(10, "full")(l2t.StudentState(0.0, 2.3, 0.1)).weight.weight.shape
        torch.Size([10, 10])
    """

    def __init__(self, num_classes: int, weight: str = "shared", *, slots: int = 2, **settings: Any) -> None:
        check.gate_slots(slots)
        super().__init__(num_classes, weight, slots=slots, **settings)

    def _make_mix(self, normal: Callable[..., nn.Parameter]) -> None:
        self.gate_weight = normal(len(self.features), 1)
        self.gate_bias = normal(1)

    def _mix(self, features: Tensor) -> Tensor:
        gate = torch.tanh((features @ self.gate_weight + self.gate_bias) / 2.0)
        return torch.cat([torch.ones_like(gate), gate], -1)


def static_teacher(num_classes: int, weight: str = "shared", **settings: Any) -> Teacher:
    """A teacher of one slot: the same loss for every state, to compare a dynamic one with.

    Example:
        >>> import l2t
        >>> teacher = l2t.static_teacher(10, "full", link="identity")
        >>> [name for name, _ in teacher.named_parameters()]
        ['emphases', 'off_diagonal']
    """
    return Teacher(num_classes, weight, slots=1, **settings)


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "teacher.safetensors"


def _square(diagonal: Tensor, off: Tensor) -> Tensor:
    """Matrices [..., C, C] of diagonals [..., C] and of what is off them, rows [..., C, C - 1]."""
    classes = off.shape[-2]
    # Cut into rows of C + 1, a square matrix has its diagonal in the first column, but for the last entry.
    head = diagonal[..., :-1].unsqueeze(-1).expand(*off.shape[:-2], -1, -1)
    body = torch.cat([head, off.reshape(*off.shape[:-2], classes - 1, classes)], -1).flatten(-2)
    tail = diagonal[..., -1:].expand(*off.shape[:-2], -1)
    return torch.cat([body, tail], -1).reshape(*off.shape[:-2], classes, classes)


def slope(link: str, u: Tensor) -> Tensor:
    """First derivative of the link (docs/math.md, section 4), exact where 1 - sigmoid(u) is not."""
    if link == "identity":
        return torch.ones_like(u)
    if link == "log-sigmoid":
        return torch.sigmoid(-u)
    return torch.sigmoid(u) * torch.sigmoid(-u)
