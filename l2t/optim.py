"""Optimisers of an unrolled run: an update of the weights, and the transpose of its derivative.

Docs: section 5 of docs/math.md. An optimiser here is a constant description without parameters or state
inside, so one object serves many runs. ``update`` takes the steps of the ``torch.optim`` optimiser of the
same name, to the bit; ``transpose`` carries the adjoint of the weights and of what the optimiser keeps of
them back over an update, and finds the derivatives to the optimiser's own settings. The student's Hessian is
not here (l2t/curvature.py).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from l2t import check

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Found",
    "Hyper",
    "Hyperparameter",
    "Optimizer",
    "Point",
    "Slot",
    "Tensors",
]

Tensors = tuple[Tensor, ...] | list[Tensor]
Number = float | Tensor
Hyperparameter = Number | Callable[[int], Number]
"""A number, a 0-dim tensor (hypergradients flow to it and beyond), or either as a function of the step."""

Slot = tuple[Any, ...]
"""What an optimiser keeps of one weight: first the tensors, which have an adjoint, then constants."""

Found = list[tuple[Tensor, Tensor]]
"""Settings that want a gradient, each with what a step adds to it."""

Key = TypeVar("Key", bound=Hashable)


class Hyper(NamedTuple):
    """The settings of one step as numbers, and those among their tensors that want a gradient, by name."""

    values: tuple[Any, ...]
    wanted: dict[str, Tensor]


class Point(NamedTuple):
    """Where an update is taken: all that it reads.

    ``which`` are the places of these weights among all trained ones of the student. In a transpose that
    reads nothing but the settings (``Optimizer.reads``), weights, slots and grads are empty.
    """

    weights: Tensors
    slots: Sequence[Slot]
    grads: Tensors
    hyper: Hyper
    which: Sequence[int]

    def of(self, members: list[int]) -> Point:
        """The same for some of the weights."""

        def some(xs: Any) -> Any:
            return [xs[i] for i in members] if xs else xs

        return Point(some(self.weights), some(self.slots), some(self.grads), self.hyper, some(self.which))


class Optimizer(abc.ABC):
    """What :func:`l2t.unroll` asks of an optimiser. All of it is called without autograd.

    To add one, write these methods (``bound`` and ``reads`` have defaults) and test it against autograd, as
    tests/test_optim.py does with all of them.
    """

    reads = True
    """Whether ``transpose`` reads weights, slots and gradients even where no setting wants a gradient."""

    slot_names: Sequence[str] = ()
    """What the entries of a slot are called where one is to be named."""

    def bound(self, names: Sequence[str], weights: Sequence[Tensor]) -> Optimizer:
        """The optimiser for a student with these trained parameters; most do not ask which."""
        return self

    @abc.abstractmethod
    def settings(self) -> Callable[[int], Hyper]:
        """The settings as a function of the step; those that do not depend on it are read here, once."""

    @abc.abstractmethod
    def start(self, weights: Tensors) -> list[Slot]:
        """What is kept of each weight before the first step."""

    @abc.abstractmethod
    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Weights and slots after a step, as tensors of their own."""

    @abc.abstractmethod
    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """The cotangent a of the step's gradient, and the gradients of the settings that want one.

        Turns the adjoint of weights and slots after the step into that before it, in place, up to H a, which
        v_w lacks yet. ``v_slots`` holds a tensor for each tensor of a slot.
        """


class _Rule(Optimizer):
    """An optimiser with settings of its own by name."""

    def __init__(self, settings: dict[str, Hyperparameter], **options: object) -> None:
        self._shown = settings | options
        self._order = list(settings)
        self._constant: dict[str, Number] = {}
        self._by_step: dict[str, Callable[[int], Number]] = {}
        for name, value in settings.items():
            if callable(value) and not isinstance(value, Tensor):
                self._by_step[name] = value
            else:
                self._constant[name] = self._checked(name, value)
                self._number(name, self._constant[name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self._shown.items())})"

    def _checked(self, name: str, value: Number, step: int | None = None) -> Number:
        return check.optim_setting(type(self).__name__, name, value, step)

    def _number(self, name: str, value: Number) -> float:
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        return check.optim_share(type(self).__name__, name, number) if name in SHARES else number

    def settings(self) -> Callable[[int], Hyper]:
        """The settings as a function of the step; those that do not depend on it are read here, once."""
        constant = {name: self._number(name, value) for name, value in self._constant.items()}
        wanted = _wanted(self._constant)
        if not self._by_step:
            hyper = Hyper(tuple(constant[name] for name in self._order), wanted)
            return lambda step: hyper

        def at(step: int) -> Hyper:
            values = {name: self._checked(name, f(step), step) for name, f in self._by_step.items()}
            numbers = constant | {name: self._number(name, value) for name, value in values.items()}
            return Hyper(tuple(numbers[name] for name in self._order), wanted | _wanted(values))

        return at


SHARES = ("beta1", "beta2", "alpha")  # of a running average


def _found(hyper: Hyper, gradients: dict[str, Callable[[], Tensor]]) -> Found:
    """The gradients of the settings that want one."""
    return [(x, gradients[name]()) for name, x in hyper.wanted.items()]


class SGD(_Rule):
    """Stochastic gradient descent with momentum, Nesterov momentum and weight decay, as ``torch.optim.SGD``.

    With the gradient g of the loss, weight decay λ, momentum μ, dampening τ and learning rate η, a step is
    ``d = g + λ w;  m = μ m + (1 - τ) d;  w = w - η m``, and with ``nesterov`` the last is
    ``w = w - η (d + μ m)``. The first step of a weight is not dampened.

    A parameter that a step's loss does not reach keeps its value and its momentum in that step, weight decay
    included, as one whose ``.grad`` is None does in ``torch.optim``. That holds for every optimiser here.

    Each of ``lr``, ``momentum``, ``weight_decay`` and ``dampening`` is a number, a 0-dim tensor, or a
    function of the step (0, 1, ...) that returns either. A tensor that requires a gradient gets one from
    ``run.backward()``, and so does whatever it was computed from. A tensor's value is read once a run, or
    once a step from a function; reading waits for the device that it is on.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013),
    in the form of ``torch.optim.SGD``; the transposes are those of section 5 of docs/math.md.

    Args:
        lr: the learning rate η, not negative where it is a plain number.
        momentum: μ; the plain number 0 keeps no momentum at all.
        weight_decay: λ.
        dampening: τ.
        nesterov: look ahead along the momentum; needs a momentum, and no dampening.

    Raises:
        TypeError: a setting is not a number, a 0-dim floating-point tensor or a function of the step.
        ValueError: a plain number is negative or not finite, or ``nesterov`` is asked for without momentum or
            with dampening.

    Example:
        >>> import l2t
        >>> l2t.optim.SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9, weight_decay=0.0, dampening=0.0, nesterov=False)
        >>> l2t.optim.SGD(lr=lambda step: 0.5**step).settings()(3).values
        (0.125, 0.0, 0.0, 0.0)
    """

    def __init__(
        self,
        lr: Hyperparameter,
        momentum: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        *,
        dampening: Hyperparameter = 0.0,
        nesterov: bool = False,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
        super().__init__(settings, nesterov=nesterov)
        self._nesterov, self._keeps_momentum = nesterov, _given(momentum)
        # With dampening a slot is (m, whether there was a step), else (m,), or () without momentum.
        self.reads = self._dampens = self._keeps_momentum and _given(dampening)
        check.optim_nesterov(nesterov, self._keeps_momentum, _given(dampening))

    slot_names = ("momentum", "begun")

    def start(self, weights: Tensors) -> list[Slot]:
        """Zero momentum, or nothing where none is kept."""
        if not self._keeps_momentum:
            return [()] * len(weights)
        return [(torch.zeros_like(w), False) if self._dampens else (torch.zeros_like(w),) for w in weights]

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Weights and momentum after a step."""
        if self._dampens:
            return _update_apart(point, [slot[1] for slot in point.slots], self._update)
        return self._update(True, point)

    def _update(self, begun: bool, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        _, direction, m = self._direction(begun, point)
        w = torch._foreach_add(point.weights, direction, alpha=-point.hyper.values[0])
        if m is None:
            return w, point.slots
        return w, [(x, True) for x in m] if self._dampens else list(zip(m))

    def _share(self, begun: bool, hyper: Hyper) -> float:
        """How much of d goes into the momentum."""
        return 1 - hyper.values[3] if self._dampens and begun else 1.0

    def _direction(self, begun: bool, point: Point) -> tuple[Tensors, Tensors, Tensors | None]:
        """The decayed gradient d, what the learning rate multiplies, and the momentum after the step."""
        w, slots, d, hyper, _ = point
        _, mu, weight_decay, _ = hyper.values
        if weight_decay:
            d = torch._foreach_add(d, w, alpha=weight_decay)
        if not self._keeps_momentum:
            return d, d, None
        m = torch._foreach_mul([slot[0] for slot in slots], mu)
        torch._foreach_add_(m, d, alpha=self._share(begun, hyper))
        return d, torch._foreach_add(d, m, alpha=mu) if self._nesterov else m, m

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """Section 5 of docs/math.md."""
        if self._dampens:
            begun = [slot[1] for slot in point.slots]
            return _transpose_apart(point, v_w, v_slots, begun, self._transpose)
        return self._transpose(True, point, v_w, v_slots)

    def _transpose(
        self, begun: bool, point: Point, v_w: Tensors, v_slots: Sequence[Slot]
    ) -> tuple[Tensors, Found]:
        hyper = point.hyper
        lr, mu, weight_decay, _ = hyper.values
        share = self._share(begun, hyper)
        if not self._keeps_momentum:
            a = torch._foreach_mul(v_w, -lr)
            found = self._hypergradients(begun, point, v_w, a, a) if hyper.wanted else []
        else:
            v_m = [slot[0] for slot in v_slots]
            if self._nesterov:
                torch._foreach_add_(v_m, v_w, alpha=-lr * mu)
                a = torch._foreach_add(v_m, v_w, alpha=-lr)
            else:
                torch._foreach_add_(v_m, v_w, alpha=-lr)
                a = torch._foreach_mul(v_m, share)
            found = self._hypergradients(begun, point, v_w, v_m, a) if hyper.wanted else []
            torch._foreach_mul_(v_m, mu)
        if weight_decay:
            torch._foreach_add_(v_w, a, alpha=weight_decay)
        return a, found

    def _hypergradients(self, begun: bool, point: Point, v_w: Tensors, v_m: Tensors, a: Tensors) -> Found:
        """Given the adjoint v_w after the step and the whole cotangent v_m of the momentum after it."""
        lr = point.hyper.values[0]
        d, direction, m = self._direction(begun, point)

        def of_momentum() -> Tensor:
            found = _dot(v_m, [slot[0] for slot in point.slots])
            return found - lr * _dot(v_w, m) if self._nesterov and m is not None else found

        return _found(
            point.hyper,
            {
                "lr": lambda: -_dot(v_w, direction),
                "momentum": of_momentum,
                "weight_decay": lambda: _dot(a, point.weights),
                "dampening": lambda: -_dot(v_m, d) * (1.0 if self._dampens and begun else 0.0),
            },
        )


class Adam(_Rule):
    """Adam with bias correction, as ``torch.optim.Adam``.

    With the gradient g of the loss, weight decay λ, the decay rates β₁ and β₂ of the moments, ε, the learning
    rate η and k counting the steps of a weight from 1, a step is ``d = g + λ w;  m = β₁ m + (1 - β₁) d;
    v = β₂ v + (1 - β₂) d²;  w = w - η/(1 - β₁ᵏ) m / (√(v/(1 - β₂ᵏ)) + ε)``.

    **Where v is zero.** The root has no derivative at 0. A coordinate whose v is zero after a step has had no
    gradient but zero, so m is zero too, and the step as a function of the gradient has the derivative
    ``-η (1 - β₁)/((1 - β₁ᵏ) ε)`` there: what reaches it through m alone. So the rule is that nothing passes
    through the root where v is exactly zero. It gives the exact derivative, never NaN, with ε > 0; where
    v is zero because d² is below the smallest number of the dtype, it gives that of the step as computed.

    Settings are as for :class:`SGD`: each is a number, a 0-dim tensor, or a function of the step.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization" (ICLR 2015), in the form of
    ``torch.optim.Adam``; the transposes are those of section 5 of docs/math.md.

    Args:
        lr: the learning rate η.
        betas: the pair (β₁, β₂); plain numbers are below 1.
        eps: ε, added to the root.
        weight_decay: λ, added to the gradient; :class:`AdamW` takes it from the weights instead.
        amsgrad: not here; :class:`FromTorch` has it.

    Raises:
        TypeError: a setting is not a number, a 0-dim floating-point tensor or a function of the step.
        ValueError: a plain number is outside its range, or ``amsgrad`` is asked for.

    Example:
        >>> import l2t
        >>> l2t.optim.Adam(lr=0.01)
        Adam(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.0)
    """

    _decoupled = False

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
        *,
        amsgrad: bool = False,
    ) -> None:
        owner = type(self).__name__
        beta1, beta2 = check.optim_pair(owner, "betas", betas)
        check.optim_amsgrad(owner, amsgrad)
        super().__init__({"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay})

    slot_names = ("first moment", "second moment", "steps")

    def start(self, weights: Tensors) -> list[Slot]:
        """Both moments zero, and no step taken: (m, v, k)."""
        return [(torch.zeros_like(w), torch.zeros_like(w), 0) for w in weights]

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Weights and moments after a step."""
        return _update_apart(point, [slot[2] + 1 for slot in point.slots], self._update)

    def _moments(self, k: int, point: Point) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensors]:
        """The decayed gradient, both moments after the step, the root of the second, and the denominator."""
        _, beta1, beta2, eps, weight_decay = point.hyper.values
        d = point.grads
        if weight_decay and not self._decoupled:
            d = torch._foreach_add(d, point.weights, alpha=weight_decay)
        m = torch._foreach_lerp([slot[0] for slot in point.slots], d, 1 - beta1)
        v = torch._foreach_mul([slot[1] for slot in point.slots], beta2)
        torch._foreach_addcmul_(v, d, d, value=1 - beta2)
        root = torch._foreach_sqrt(v)
        below = torch._foreach_div(root, (1 - beta2**k) ** 0.5)
        torch._foreach_add_(below, eps)
        return d, m, v, root, below

    def _update(self, k: int, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        lr, beta1, _, _, weight_decay = point.hyper.values
        w = point.weights
        _, m, v, _, below = self._moments(k, point)
        if weight_decay and self._decoupled:
            w = torch._foreach_mul(w, 1 - lr * weight_decay)
        w = torch._foreach_addcdiv(w, m, below, value=-(lr / (1 - beta1**k)))
        return w, [(*moments, k) for moments in zip(m, v, strict=True)]

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """Section 5 of docs/math.md."""
        counts = [slot[2] + 1 for slot in point.slots]
        return _transpose_apart(point, v_w, v_slots, counts, self._transpose)

    def _transpose(
        self, k: int, point: Point, v_w: Tensors, v_slots: Sequence[Slot]
    ) -> tuple[Tensors, Found]:
        numbers: tuple[float, ...] = point.hyper.values
        lr, beta1, beta2, _, weight_decay = numbers
        v_m, v_v = ([slot[i] for slot in v_slots] for i in (0, 1))
        d, m, _, root, below = self._moments(k, point)
        rate, scale = lr / (1 - beta1**k), math.sqrt(1 - beta2**k)
        ratio = torch._foreach_div(m, below)
        v_first = torch._foreach_mul(v_w, -rate)
        torch._foreach_div_(v_first, below)
        v_below = torch._foreach_mul(v_first, ratio)
        torch._foreach_neg_(v_below)
        torch._foreach_add_(v_m, v_first)
        torch._foreach_add_(v_v, _through_root(v_below, root), alpha=1 / scale)
        a = torch._foreach_mul(v_m, 1 - beta1)
        torch._foreach_addcmul_(a, d, v_v, value=2 * (1 - beta2))

        def of_lr() -> Tensor:
            found = -_dot(v_w, ratio) / (1 - beta1**k)
            return found - weight_decay * _dot(v_w, point.weights) if self._decoupled else found

        def of_beta1() -> Tensor:
            of_average = _dot(v_m, torch._foreach_sub([slot[0] for slot in point.slots], d))
            return of_average - _dot(v_w, ratio) * (rate * k * beta1 ** (k - 1) / (1 - beta1**k))

        def of_beta2() -> Tensor:
            before = torch._foreach_addcmul([slot[1] for slot in point.slots], d, d, value=-1)
            of_scale = _dot(v_below, root) * (k * beta2 ** (k - 1) / (2 * scale**3))
            return _dot(v_v, before) + of_scale

        def of_weight_decay() -> Tensor:
            return -lr * _dot(v_w, point.weights) if self._decoupled else _dot(a, point.weights)

        found = _found(
            point.hyper,
            {
                "lr": of_lr,
                "beta1": of_beta1,
                "beta2": of_beta2,
                "eps": lambda: torch.stack([x.sum().to(v_below[0]) for x in v_below]).sum(),
                "weight_decay": of_weight_decay,
            },
        )
        torch._foreach_mul_(v_m, beta1)
        torch._foreach_mul_(v_v, beta2)
        if weight_decay and self._decoupled:
            torch._foreach_mul_(v_w, 1 - lr * weight_decay)
        elif weight_decay:
            torch._foreach_add_(v_w, a, alpha=weight_decay)
        return a, found


class AdamW(Adam):
    """Adam with the weight decay taken from the weights, as ``torch.optim.AdamW``.

    :class:`Adam` with ``d = g`` and ``w = (1 - η λ) w`` before the step.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019), in the form of
    ``torch.optim.AdamW``.

    Args:
        lr, betas, eps, amsgrad: as for :class:`Adam`.
        weight_decay: λ, 0.01 by default as in ``torch.optim``.

    Example:
        The weight decay of a run, learned by what the run ends in:

        >>> import torch, l2t
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(student.weight, 1.0)
        >>> decay = torch.tensor(0.5, requires_grad=True)
        >>> def loss(model, batch, step):  # of gradient zero: the decay alone moves the weight
        ...     return 0 * model.weight.sum()
        >>> run = l2t.unroll(student, range(2), loss, lambda model: model.weight.sum(),
        ...                  optimizer=l2t.optim.AdamW(lr=0.5, weight_decay=decay))
        >>> run.backward()
        >>> run.measure, decay.grad  # (1 - λ/2)² and its derivative -(1 - λ/2)
        (tensor(0.5625), tensor(-0.7500))
    """

    _decoupled = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 1e-2,
        *,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, amsgrad=amsgrad)


def _through_root(v_root: Tensors, root: Tensors) -> Tensors:
    """The cotangent of x where ``root`` is √x: zero where x is zero, by the rule of :class:`Adam`."""
    halves = torch._foreach_mul(root, 2.0)
    torch._foreach_reciprocal_(halves)
    for half, x in zip(halves, root, strict=True):
        half.masked_fill_(x == 0, 0.0)
    torch._foreach_mul_(halves, v_root)
    return halves


def _members(keys: Sequence[Key]) -> dict[Key, list[int]]:
    members: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    return members


def _update_apart(
    point: Point, keys: Sequence[Key], update: Callable[[Key, Point], tuple[Tensors, Sequence[Slot]]]
) -> tuple[Tensors, Sequence[Slot]]:
    """Updates the weights of each key apart."""
    parts = _members(keys)
    if len(parts) == 1:
        return update(keys[0], point)
    w, slots = list(point.weights), list(point.slots)
    for key, members in parts.items():
        for i, x, slot in zip(members, *update(key, point.of(members)), strict=True):
            w[i], slots[i] = x, slot
    return w, slots


def _transpose_apart(
    point: Point,
    v_w: Tensors,
    v_slots: Sequence[Slot],
    keys: Sequence[Key],
    transpose: Callable[[Key, Point, Tensors, Sequence[Slot]], tuple[Tensors, Found]],
) -> tuple[Tensors, Found]:
    """Transposes :func:`_update_apart`."""
    parts = _members(keys)
    if len(parts) == 1:
        return transpose(keys[0], point, v_w, v_slots)
    cotangents: dict[int, Tensor] = {}
    found: Found = []
    for key, members in parts.items():
        v_part, v_kept = [v_w[i] for i in members], [v_slots[i] for i in members]
        part, found_here = transpose(key, point.of(members), v_part, v_kept)
        cotangents.update(zip(members, part, strict=True))
        found += found_here
    return [cotangents[i] for i in range(len(v_w))], found


def _given(value: Hyperparameter) -> bool:
    """Whether a setting may be other than zero."""
    return callable(value) or isinstance(value, Tensor) or value != 0


def _wanted(values: dict[str, Number]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if isinstance(x, Tensor) and x.requires_grad}


def _dot(xs: Tensors, ys: Tensors) -> Tensor:
    """The inner product over all tensors of two lists, on the device and in the dtype of the first."""
    parts = [torch.linalg.vecdot(x.flatten(), y.flatten()) for x, y in zip(xs, ys, strict=True)]
    return torch.stack([part.to(parts[0]) for part in parts]).sum()
