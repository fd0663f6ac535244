"""Optimisers of an unrolled run: an update of the weights, and the transpose of its derivative.

Docs: section 5 of docs/math.md. An optimiser here is a constant description without parameters or state
inside, so one object serves many runs. ``update`` takes the steps of the ``torch.optim`` optimiser of the
same name, to the bit; ``transpose`` carries the adjoint of the weights and of what the optimiser keeps of
them back over an update, and finds the derivatives to the optimiser's own settings. What they have in common
is in l2t/optim_base.py. The student's Hessian is not here (l2t/curvature.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l2t import check
from l2t.optim_base import (
    Found,
    Group,
    Hyper,
    Hyperparameter,
    Optimizer,
    Point,
    Rule,
    Slot,
    Tensors,
    dot,
    given,
    only_wanted,
    total,
    transpose_apart,
    update_apart,
)
from l2t.optim_torch import FromTorch

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Found",
    "FromTorch",
    "Hyper",
    "Hyperparameter",
    "Optimizer",
    "Point",
    "RMSprop",
    "Slot",
    "Tensors",
]


class SGD(Rule):
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

    **Groups.** As in ``torch.optim``, a group is a dict of some parameters, under ``"params"``, and settings
    that they have in place of the optimiser's own; parameters in no group have those. They are named by
    patterns (``"head.*"``, ``"*.bias"``: any of a parameter's names in ``student.named_parameters()``), or
    given themselves (``student.head.parameters()``, with frozen ones or not). A meta tensor in a group's
    settings gets its gradient as any other does; a function of the step is asked once a step by each group
    that has it, those of the optimiser itself included.

    **Clipping.** ``clip_norm`` is the most that the norm of the whole gradient, of all groups, may have: what
    ``torch.nn.utils.clip_grad_norm_`` does before a step, to the bit, differentiated through. Where the norm
    is exactly at the limit the derivative is that of a gradient just above it.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013),
    in the form of ``torch.optim.SGD``; the transposes are those of section 5 of docs/math.md.

    Args:
        lr: the learning rate η, not negative where it is a plain number.
        momentum: μ; the plain number 0 keeps no momentum at all.
        weight_decay: λ.
        dampening: τ.
        nesterov: look ahead along the momentum; needs a momentum, and no dampening.
        groups: dicts of parameters and the settings in which they differ.
        clip_norm: clip the norm of the whole gradient to this before a step; None: do not.

    Raises:
        TypeError: a setting is not a number, a 0-dim floating-point tensor or a function of the step; a group
            is not such a dict.
        ValueError: a plain number is negative or not finite, or ``nesterov`` is asked for without momentum or
            with dampening; a group has a setting that the optimiser has not. When a run begins: a group
            names a parameter that the student does not train, or that another group has.

    Example:
        >>> import l2t
        >>> l2t.optim.SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9, weight_decay=0.0, dampening=0.0, nesterov=False)
        >>> l2t.optim.SGD(lr=lambda step: 0.5**step).settings()(3).values
        (0.125, 0.0, 0.0, 0.0)

        No weight decay for biases, a tenth of the rate for the body, and no gradient longer than one:

        >>> optimizer = l2t.optim.SGD(
        ...     lr=0.1, weight_decay=0.01, clip_norm=1.0,
        ...     groups=[{"params": "*.bias", "weight_decay": 0.0}, {"params": "body.*.weight", "lr": 0.01}])
    """

    def __init__(
        self,
        lr: Hyperparameter,
        momentum: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        *,
        dampening: Hyperparameter = 0.0,
        nesterov: bool = False,
        groups: Sequence[Group] = (),
        clip_norm: Hyperparameter | None = None,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
        super().__init__(settings, settings | {"nesterov": nesterov}, groups, clip_norm)
        self._nesterov, self._keeps_momentum = nesterov, given(momentum)
        # With dampening a slot is (m, whether there was a step), else (m,), or () without momentum.
        self.reads = self._dampens = self._keeps_momentum and given(dampening)
        check.optim_nesterov(nesterov, self._keeps_momentum, given(dampening))

    slot_names = ("momentum", "begun")

    def start(self, weights: Tensors) -> list[Slot]:
        """Zero momentum, or nothing where none is kept."""
        if not self._keeps_momentum:
            return [()] * len(weights)
        return [(torch.zeros_like(w), False) if self._dampens else (torch.zeros_like(w),) for w in weights]

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Weights and momentum after a step."""
        if self._dampens:
            return update_apart(point, [slot[1] for slot in point.slots], self._update)
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
            return transpose_apart(point, v_w, v_slots, begun, self._transpose)
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
            found = dot(v_m, [slot[0] for slot in point.slots])
            return found - lr * dot(v_w, m) if self._nesterov and m is not None else found

        return only_wanted(
            point.hyper,
            {
                "lr": lambda: -dot(v_w, direction),
                "momentum": of_momentum,
                "weight_decay": lambda: dot(a, point.weights),
                "dampening": lambda: -dot(v_m, d) * (1.0 if self._dampens and begun else 0.0),
            },
        )


class Adam(Rule):
    """Adam with bias correction, as ``torch.optim.Adam``.

    With the gradient g of the loss, weight decay λ, the decay rates β₁ and β₂ of the moments, ε, the learning
    rate η and k counting the steps of a weight from 1, a step is ``d = g + λ w;  m = β₁ m + (1 - β₁) d;
    v = β₂ v + (1 - β₂) d²;  w = w - η/(1 - β₁ᵏ) m / (√(v/(1 - β₂ᵏ)) + ε)``.

    **Where v is zero.** The root has no derivative at 0. A coordinate whose v is zero after a step has had no
    gradient but zero, so m is zero too, and the step as a function of the gradient has the derivative
    ``-η (1 - β₁)/((1 - β₁ᵏ) ε)`` there: what reaches it through m alone. So the rule is that nothing passes
    through the root where v is exactly zero. It gives the exact derivative, never NaN, with ε > 0; where
    v is zero because d² is below the smallest number of the dtype, it gives that of the step as computed.

    Settings, groups and clipping are as for :class:`SGD`.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization" (ICLR 2015), in the form of
    ``torch.optim.Adam``; the transposes are those of section 5 of docs/math.md.

    Args:
        lr: the learning rate η.
        betas: the pair (β₁, β₂); plain numbers are below 1.
        eps: ε, added to the root.
        weight_decay: λ, added to the gradient; :class:`AdamW` takes it from the weights instead.
        amsgrad: not here; :class:`FromTorch` has it.
        groups, clip_norm: as for :class:`SGD`.

    Raises:
        TypeError: a setting is not a number, a 0-dim floating-point tensor or a function of the step.
        ValueError: a plain number is outside its range, or ``amsgrad`` is asked for.

    Example:
        >>> import l2t
        >>> l2t.optim.Adam(lr=0.01)
        Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)
    """

    shares = ("beta1", "beta2")
    _decoupled = False

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
        *,
        amsgrad: bool = False,
        groups: Sequence[Group] = (),
        clip_norm: Hyperparameter | None = None,
    ) -> None:
        owner = type(self).__name__
        beta1, beta2 = check.optim_pair(owner, "betas", betas)
        check.optim_amsgrad(owner, amsgrad)
        settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        arguments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(settings, arguments, groups, clip_norm)

    slot_names = ("first moment", "second moment", "steps")

    def start(self, weights: Tensors) -> list[Slot]:
        """Both moments zero, and no step taken: (m, v, k)."""
        return [(torch.zeros_like(w), torch.zeros_like(w), 0) for w in weights]

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Weights and moments after a step."""
        return update_apart(point, [slot[2] + 1 for slot in point.slots], self._update)

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
        return transpose_apart(point, v_w, v_slots, counts, self._transpose)

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
            found = -dot(v_w, ratio) / (1 - beta1**k)
            return found - weight_decay * dot(v_w, point.weights) if self._decoupled else found

        def of_beta1() -> Tensor:
            of_average = dot(v_m, torch._foreach_sub([slot[0] for slot in point.slots], d))
            return of_average - dot(v_w, ratio) * (rate * k * beta1 ** (k - 1) / (1 - beta1**k))

        def of_beta2() -> Tensor:
            before = torch._foreach_addcmul([slot[1] for slot in point.slots], d, d, value=-1)
            of_scale = dot(v_below, root) * (k * beta2 ** (k - 1) / (2 * scale**3))
            return dot(v_v, before) + of_scale

        def of_weight_decay() -> Tensor:
            return -lr * dot(v_w, point.weights) if self._decoupled else dot(a, point.weights)

        found = only_wanted(
            point.hyper,
            {
                "lr": of_lr,
                "beta1": of_beta1,
                "beta2": of_beta2,
                "eps": lambda: total(v_below),
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
        lr, betas, eps, amsgrad, groups, clip_norm: as for :class:`Adam`.
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
        groups: Sequence[Group] = (),
        clip_norm: Hyperparameter | None = None,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, amsgrad=amsgrad, groups=groups, clip_norm=clip_norm)


class RMSprop(Rule):
    """A step divided by the root of a running mean of squared gradients, as ``torch.optim.RMSprop``.

    With the gradient g of the loss, weight decay λ, the decay rate α of the means, ε, momentum μ and learning
    rate η, a step is ``d = g + λ w;  v = α v + (1 - α) d²;  q = d / (√v + ε);  w = w - η q``. With momentum
    the last is ``b = μ b + q;  w = w - η b``, and with ``centered`` the root is that of the variance,
    v - m² with ``m = α m + (1 - α) d``.

    **Where the root is zero** nothing passes through it, as in :class:`Adam` and for the same reason: every d
    so far was zero, and the step as a function of d has the derivative ``-η/ε``, what reaches it through the
    numerator alone. A variance may besides be rounded to zero, which gives the derivative of the step as
    computed, or below, which gives NaN as in ``torch.optim``.

    Settings, groups and clipping are as for :class:`SGD`.

    Source: Tieleman and Hinton, "Lecture 6.5: rmsprop" (Coursera, 2012); Graves, "Generating sequences with
    recurrent neural networks" (2013) for the centered form; in the form of ``torch.optim.RMSprop``. The
    transposes are those of section 5 of docs/math.md.

    Args:
        lr: the learning rate η.
        alpha: α; a plain number is below 1.
        eps: ε, added to the root.
        weight_decay: λ, added to the gradient.
        momentum: μ; the plain number 0 keeps no momentum at all.
        centered: divide by the root of the variance.
        groups, clip_norm: as for :class:`SGD`.

    Raises:
        TypeError: a setting is not a number, a 0-dim floating-point tensor or a function of the step.
        ValueError: a plain number is outside its range.

    Example:
        >>> import l2t
        >>> l2t.optim.RMSprop(lr=0.01, centered=True)
        RMSprop(lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, centered=True)
    """

    shares = ("alpha",)

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        alpha: Hyperparameter = 0.99,
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
        momentum: Hyperparameter = 0.0,
        centered: bool = False,
        *,
        groups: Sequence[Group] = (),
        clip_norm: Hyperparameter | None = None,
    ) -> None:
        settings = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(settings, settings | {"centered": centered}, groups, clip_norm)
        self._centered, self._keeps_momentum = centered, given(momentum)
        self.slot_names = ("mean of squares", *("mean",) * centered, *("momentum",) * self._keeps_momentum)

    def start(self, weights: Tensors) -> list[Slot]:
        """All zero: (v,), (v, m), (v, b) or (v, m, b)."""
        return [tuple(torch.zeros_like(w) for _ in self.slot_names) for w in weights]

    def _divided(self, point: Point) -> tuple[Tensors, list[Tensors], Tensors, Tensors]:
        """The decayed gradient, the means v and m after the step, the root, and what divides."""
        _, alpha, eps, weight_decay, _ = point.hyper.values
        d = point.grads
        if weight_decay:
            d = torch._foreach_add(d, point.weights, alpha=weight_decay)
        v = torch._foreach_mul([slot[0] for slot in point.slots], alpha)
        torch._foreach_addcmul_(v, d, d, value=1 - alpha)
        means: list[Tensors] = [v]
        if self._centered:
            m = torch._foreach_lerp([slot[1] for slot in point.slots], d, 1 - alpha)
            means.append(m)
            root = torch._foreach_addcmul(v, m, m, value=-1)
            torch._foreach_sqrt_(root)
        else:
            root = torch._foreach_sqrt(v)
        return d, means, root, torch._foreach_add(root, eps)

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Weights, means and momentum after a step."""
        lr, _, _, _, mu = point.hyper.values
        d, kept, _, below = self._divided(point)
        if not self._keeps_momentum:
            return torch._foreach_addcdiv(point.weights, d, below, value=-lr), list(zip(*kept, strict=True))
        b = torch._foreach_mul([slot[-1] for slot in point.slots], mu)
        torch._foreach_addcdiv_(b, d, below)
        w = torch._foreach_add(point.weights, b, alpha=-lr)
        return w, list(zip(*kept, b, strict=True))

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """Section 5 of docs/math.md."""
        lr, alpha, _, weight_decay, mu = point.hyper.values
        d, means, root, below = self._divided(point)
        q = torch._foreach_div(d, below)
        v_q: Tensors = torch._foreach_mul(v_w, -lr)
        if self._keeps_momentum:
            v_b = [slot[-1] for slot in v_slots]
            torch._foreach_add_(v_b, v_q)
            v_q = v_b
        a = torch._foreach_div(v_q, below)
        v_below = torch._foreach_mul(a, q)
        torch._foreach_neg_(v_below)
        v_square = _through_root(v_below, root)
        v_v = [slot[0] for slot in v_slots]
        torch._foreach_add_(v_v, v_square)
        torch._foreach_addcmul_(a, d, v_v, value=2 * (1 - alpha))
        if self._centered:
            v_m = [slot[1] for slot in v_slots]
            torch._foreach_addcmul_(v_m, means[1], v_square, value=-2)
            torch._foreach_add_(a, v_m, alpha=1 - alpha)

        def of_lr() -> Tensor:
            if not self._keeps_momentum:
                return -dot(v_w, q)
            return -dot(v_w, torch._foreach_add(q, [slot[-1] for slot in point.slots], alpha=mu))

        def of_alpha() -> Tensor:
            before = torch._foreach_addcmul([slot[0] for slot in point.slots], d, d, value=-1)
            if not self._centered:
                return dot(v_v, before)
            return dot(v_v, before) + dot(v_m, torch._foreach_sub([slot[1] for slot in point.slots], d))

        found = only_wanted(
            point.hyper,
            {
                "lr": of_lr,
                "alpha": of_alpha,
                "eps": lambda: total(v_below),
                "weight_decay": lambda: dot(a, point.weights),
                "momentum": lambda: dot(v_q, [slot[-1] for slot in point.slots]),
            },
        )
        for kept in (v_v, v_m) if self._centered else (v_v,):
            torch._foreach_mul_(kept, alpha)
        if self._keeps_momentum:
            torch._foreach_mul_(v_b, mu)
        if weight_decay:
            torch._foreach_add_(v_w, a, alpha=weight_decay)
        return a, found


def _through_root(v_root: Tensors, root: Tensors) -> Tensors:
    """The cotangent of x where ``root`` is √x: zero where x is zero, by the rule of :class:`Adam`."""
    halves = torch._foreach_mul(root, 2.0)
    torch._foreach_reciprocal_(halves)
    for half, x in zip(halves, root, strict=True):
        half.masked_fill_(x == 0, 0.0)
    torch._foreach_mul_(halves, v_root)
    return halves
