"""Optimisers of an unrolled run: an update of the weights, and the transpose of its derivative.

Docs: section 5 of docs/math.md. An optimiser here is a constant description without parameters or state
inside, so one object serves many runs. ``update`` takes the steps of the ``torch.optim`` optimiser of the
same name, to the bit; ``transpose_in`` and ``transpose_out`` carry the adjoint (v_w, v_m) of weights and
momentum back over an update; ``hypergradients`` are the derivatives to the optimiser's own settings. The
student's Hessian is not here (l2t/curvature.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from l2t import check

__all__ = ["SGD", "Hyper", "Hyperparameter", "Point", "Tensors"]

Tensors = tuple[Tensor, ...] | list[Tensor]
Number = float | Tensor
Hyperparameter = Number | Callable[[int], Number]
"""A number, a 0-dim tensor (hypergradients flow to it and beyond), or either as a function of the step."""


class Hyper(NamedTuple):
    """The settings of one step as numbers, and those among their tensors that want a gradient, by name."""

    lr: float
    momentum: float
    weight_decay: float
    wanted: dict[str, Tensor]


class Point(NamedTuple):
    """Where an update is taken: all that it reads. ``momentum`` is None where none is kept."""

    weights: Tensors
    momentum: Tensors | None
    grads: Tensors
    hyper: Hyper


class SGD:
    """Stochastic gradient descent with momentum, Nesterov momentum and weight decay, as ``torch.optim.SGD``.

    With the gradient g of the loss, weight decay λ, momentum μ and learning rate η, a step is
    ``d = g + λ w;  m = μ m + d;  w = w - η m``, and with ``nesterov`` the last is ``w = w - η (d + μ m)``.

    A parameter that a step's loss does not reach keeps its value and its momentum in that step, weight decay
    included, as one whose ``.grad`` is None does in ``torch.optim``.

    Each of ``lr``, ``momentum`` and ``weight_decay`` is a number, a 0-dim tensor, or a function of the step
    (0, 1, ...) that returns either. A tensor that requires a gradient gets one from ``run.backward()``, and
    so does whatever it was computed from. A tensor's value is read once a run, or once a step from a
    function; reading waits for the device that it is on.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013),
    in the form of ``torch.optim.SGD``; the transposes are those of section 5 of docs/math.md.

    Args:
        lr: the learning rate η, not negative where it is a plain number.
        momentum: μ; the plain number 0 keeps no momentum at all.
        weight_decay: λ.
        nesterov: look ahead along the momentum; needs a momentum.

    Raises:
        TypeError: a setting is not a number, a 0-dim floating-point tensor or a function of the step.
        ValueError: a plain number is negative or not finite, or ``nesterov`` is asked for without momentum.

    Example:
        >>> import l2t
        >>> l2t.optim.SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False)
        >>> l2t.optim.SGD(lr=lambda step: 0.5**step).settings()(3).lr
        0.125
    """

    def __init__(
        self,
        lr: Hyperparameter,
        momentum: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        *,
        nesterov: bool = False,
    ) -> None:
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self._constant: dict[str, Number] = {}
        self._by_step: dict[str, Callable[[int], Number]] = {}
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if callable(value) and not isinstance(value, Tensor):
                self._by_step[name] = value
            else:
                self._constant[name] = check.optim_setting(name, value)
        self._keeps_momentum = callable(momentum) or isinstance(momentum, Tensor) or momentum != 0
        check.optim_nesterov(nesterov, self._keeps_momentum)

    def __repr__(self) -> str:
        return (
            f"SGD(lr={self.lr}, momentum={self.momentum}, weight_decay={self.weight_decay}, "
            f"nesterov={self.nesterov})"
        )

    def settings(self) -> Callable[[int], Hyper]:
        """The settings as a function of the step; those that do not depend on it are read here, once."""
        constant = {name: _number(value) for name, value in self._constant.items()}
        wanted = {name: value for name, value in self._constant.items() if _wants_grad(value)}
        if not self._by_step:
            hyper = Hyper(**constant, wanted=cast("dict[str, Tensor]", wanted))
            return lambda step: hyper

        def at(step: int) -> Hyper:
            values = {name: check.optim_setting(name, f(step), step) for name, f in self._by_step.items()}
            numbers = {name: _number(value) for name, value in values.items()}
            wanted_now = wanted | {name: value for name, value in values.items() if _wants_grad(value)}
            return Hyper(**constant, **numbers, wanted=cast("dict[str, Tensor]", wanted_now))

        return at

    def start(self, weights: Tensors) -> Tensors | None:
        """The momentum before the first step: zero, or None where none is kept."""
        return [torch.zeros_like(w) for w in weights] if self._keeps_momentum else None

    def update(self, point: Point) -> tuple[Tensors, Tensors | None]:
        """The weights and the momentum after a step."""
        direction, m = self._direction(point)
        return torch._foreach_add(point.weights, direction, alpha=-point.hyper.lr), m

    def _direction(self, point: Point) -> tuple[Tensors, Tensors | None]:
        """What the learning rate multiplies, and the momentum after the step."""
        w, m, d, (_, mu, weight_decay, _) = point
        if weight_decay:
            d = torch._foreach_add(d, w, alpha=weight_decay)
        if m is None:
            return d, None
        m = torch._foreach_mul(m, mu)
        torch._foreach_add_(m, d)
        return torch._foreach_add(d, m, alpha=mu) if self.nesterov else m, m

    def transpose_in(self, v_w: Tensors, v_m: Tensors, hyper: Hyper) -> Tensors:
        """The cotangent a of the step's gradient, given the adjoint of weights and momentum after the step.

        ``v_m`` is zero where no momentum is kept.
        """
        lr, mu, _, _ = hyper
        return torch._foreach_add(v_m, v_w, alpha=-lr * (1 + mu) if self.nesterov else -lr)

    def transpose_out(self, v_w: Tensors, v_m: Tensors, a: Tensors, hyper: Hyper) -> None:
        """Turns (v_w, v_m) after the step into those before it, in place, up to H a, which v_w lacks yet."""
        lr, mu, weight_decay, _ = hyper
        if self._keeps_momentum:
            torch._foreach_zero_(v_m)
            torch._foreach_add_(v_m, a, alpha=mu)
            if self.nesterov:
                torch._foreach_add_(v_m, v_w, alpha=mu * lr)
        if weight_decay:
            torch._foreach_add_(v_w, a, alpha=weight_decay)

    def hypergradients(self, point: Point, v_w: Tensors, a: Tensors) -> dict[str, Tensor]:
        """The gradients of this step's settings that want one, given the adjoint after the step and a."""
        lr, _, _, wanted = point.hyper
        d: dict[str, Tensor] = {}
        if "weight_decay" in wanted:
            d["weight_decay"] = _dot(a, point.weights)
        if "lr" in wanted or "momentum" in wanted:
            direction, m = self._direction(point)
            d["lr"] = -_dot(v_w, direction)
            if point.momentum is not None and m is not None:
                d["momentum"] = _dot(a, point.momentum)
                if self.nesterov:
                    d["momentum"] += lr * (_dot(v_w, point.momentum) - _dot(v_w, m))
        return {name: d[name] for name in wanted}


def _number(value: Number) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _wants_grad(value: Number) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _dot(xs: Tensors, ys: Tensors) -> Tensor:
    """The inner product over all tensors of two lists, on the device and in the dtype of the first."""
    parts = [torch.linalg.vecdot(x.flatten(), y.flatten()) for x, y in zip(xs, ys, strict=True)]
    return torch.stack([part.to(parts[0]) for part in parts]).sum()
