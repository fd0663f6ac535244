"""Any optimiser of torch.optim as one of an unrolled run.

Docs: section 5 of docs/math.md. The steps are those of the optimiser itself. Their transpose is automatic
differentiation of one update in the mode that torch.optim calls ``differentiable``, from the weights, the
state, the gradient and the settings before it; where that mode cuts a derivative or divides zero by zero,
:class:`Whole` does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from l2t import check
from l2t.optim_base import Found, Group, Hyperparameter, Point, Rule, Slot, Tensors

__all__ = ["FromTorch"]

MODES = ("differentiable", "foreach", "fused")  # ways of torch.optim to take one and the same step


class FromTorch(Rule):
    """Any optimiser of ``torch.optim`` that has a ``differentiable`` mode, by its class and its options.

    The steps are those of the optimiser itself, to the bit. The transpose of a step is automatic
    differentiation through one update, whose graph is built and freed in each step of the walk back. That
    takes a few times as long as the transposes that :class:`SGD`, :class:`Adam`, :class:`AdamW` and
    :class:`RMSprop` know, and is as exact: also where the ``differentiable`` mode of ``torch.optim`` by
    itself cuts a derivative off or gives NaN, at the first momentum of SGD, at settings that it reads as
    numbers, and at the root of a second moment that is zero, where the rule of :class:`Adam` holds.

    Settings, groups and clipping are as for :class:`SGD`: a number among the options, or in a tuple of them,
    may be a 0-dim tensor or a function of the step. A derivative that does not exist (of the sign in Rprop,
    of a maximum of two equal numbers in Adamax or amsgrad) is the one that autograd takes. What torch.optim
    keeps in single numbers beside a weight (NAdam, ASGD) has the dtype that it gives them: float32, unless
    ``torch.get_default_dtype()`` is float64.

    Args:
        kind: the class, ``torch.optim.NAdam`` say.
        groups, clip_norm: as for :class:`SGD`.
        options: as ``kind`` takes them, apart from ``differentiable`` and ``capturable``.

    Raises:
        TypeError: ``kind`` is not such a class (LBFGS, which calls the loss itself, Adafactor, Muon and
            SparseAdam have no such mode), or has no such option.
        Exception: what ``kind`` says of its options.

    Source: the optimisers of ``torch.optim``; section 5 of docs/math.md.

    Example:
        >>> import torch, l2t
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(student.weight, 1.0)
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> run = l2t.unroll(student, range(3), lambda model, batch, step: model.weight.square().sum() / 2,
        ...                  lambda model: model.weight.sum(),
        ...                  optimizer=l2t.optim.FromTorch(torch.optim.Adagrad, lr=lr))
        >>> run.backward()
        >>> run.measure, lr.grad
        (tensor(0.4918), tensor(-1.7312))
    """

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        *,
        groups: Sequence[Group] = (),
        clip_norm: Hyperparameter | None = None,
        **options: Any,
    ) -> None:
        check.optim_torch_kind(kind)
        known = inspect.signature(kind).parameters
        self._known = [name for name in known if name not in ("params", "differentiable", "capturable")]
        check.optim_torch_options(kind.__name__, options, self._known)
        self._kind, self._options = kind, options
        self._traced = {name: name == "differentiable" for name in known if name in MODES}
        # Where a setting stands: the name of an option, and its place in that if it is a tuple.
        self._places: dict[str, tuple[str, int | None]] = {}
        for name, value in options.items():
            if _is_setting(value):
                self._places[name] = name, None
            elif isinstance(value, tuple | list):
                self._places |= {f"{name}[{i}]": (name, i) for i, x in enumerate(value) if _is_setting(x)}
        settings = {
            key: options[name] if i is None else options[name][i] for key, (name, i) in self._places.items()
        }
        super().__init__(settings, {"kind": kind, **options}, groups, clip_norm)
        numbers = {key: float(x.detach()) for key, x in settings.items() if isinstance(x, Tensor)}
        if len(numbers) == len(settings):
            kind([torch.zeros(1)], **self._with(numbers))  # type: ignore[call-arg]  # its own checks

    def options(self) -> Sequence[str]:
        """What a group may set for itself."""
        return self._known

    def _with(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options with these values of the settings."""
        options = dict(self._options)
        for key, value in values.items():
            name, i = self._places[key]
            options[name] = value if i is None else (*options[name][:i], value, *options[name][i + 1 :])
        return options

    def start(self, weights: Tensors) -> list[Slot]:
        """Nothing: torch.optim makes what it keeps of a weight in the first step of that."""
        return [()] * len(weights)

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """A step of the optimiser itself."""
        numbers = dict(zip(self._places, point.hyper.values, strict=True))
        params = [_copy(w.detach()) for w in point.weights]
        optimizer: Any = self._kind(params, **self._with(numbers))  # type: ignore[call-arg]
        for p, g, slot in zip(params, point.grads, point.slots, strict=True):
            p.grad = _copy(g.detach())
            if slot:
                optimizer.state[p] = {k: x.clone() for k, x in _state(slot).items()}
        optimizer.step()
        after = [p.view_as(w) for p, w in zip(params, point.weights, strict=True)]
        return after, [_slot(optimizer.state[p]) for p in params]

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """That of automatic differentiation through a step."""
        numbers = dict(zip(self._places, point.hyper.values, strict=True))
        whole = Whole()
        with torch.enable_grad():
            settings = {k: _leaf(torch.tensor(numbers[k], dtype=torch.float64)) for k in point.hyper.wanted}
            weights, grads = ([_leaf(x) for x in xs] for xs in (point.weights, point.grads))
            states = [{k: _leaf(x) for k, x in zip(_names(slot), slot)} for slot in point.slots]  # noqa: B905
            params = [_copy(w) for w in weights]
            optimizer: Any = self._kind(params, **self._with(numbers) | self._traced)  # type: ignore[call-arg]
            options = self._with(numbers | {k: whole.hide(x) for k, x in settings.items()}) | self._traced
            if optimizer.state:  # made with the optimiser: Adagrad's in torch 2.11
                with whole:
                    optimizer = self._kind(params, **options)  # type: ignore[call-arg]
            optimizer.param_groups[0].update(options)
            optimizer.defaults.update(options)
            for p, g, slot, state in zip(params, grads, point.slots, states, strict=True):
                p.grad = _copy(g)
                if slot:
                    optimizer.state[p] = {k: whole.copy(x) for k, x in (_state(slot) | state).items()}
            with whole:
                optimizer.step()
            outputs, cotangents = [], []
            after = [_slot(optimizer.state[p]) for p in params]
            for p, slot, v, v_slot in zip(params, after, v_w, v_slots, strict=True):
                for x, v_x in zip([p, *map(whole.shown, slot[:-1])], [v, *v_slot], strict=True):
                    if x.requires_grad:
                        outputs.append(x)
                        cotangents.append(v_x.to(x).view_as(x))
        inputs = [*weights, *grads, *(x for state in states for x in state.values()), *settings.values()]
        found = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)
        of = {id(x): d for x, d in zip(inputs, found, strict=True)}
        for w, v, slot, state, v_slot in zip(weights, v_w, after, states, v_slots, strict=True):
            v.copy_(of[id(w)])
            for name, v_x in zip(_names(slot), v_slot, strict=True):
                v_x.copy_(of[id(state[name])] if name in state else torch.zeros_like(v_x))
        wanted = [(x, of[id(settings[key])]) for key, x in point.hyper.wanted.items()]
        return [of[id(g)] for g in grads], wanted


def _is_setting(x: object) -> bool:
    return isinstance(x, Tensor) or (callable(x) and not isinstance(x, type))


def _slot(state: Mapping[str, Any]) -> Slot:
    """What torch.optim keeps of a weight: tensors that have an adjoint, then their names and all else."""
    tensors = {
        k: x for k, x in state.items() if k != "step" and isinstance(x, Tensor) and x.is_floating_point()
    }
    return (*tensors.values(), (tuple(tensors), {k: x for k, x in state.items() if k not in tensors}))


def _names(slot: Slot) -> tuple[str, ...]:
    return slot[-1][0] if slot else ()


def _state(slot: Slot) -> dict[str, Any]:
    """Inverts :func:`_slot`."""
    names, others = slot[-1]
    return {**dict(zip(names, slot, strict=False)), **others}


def _copy(x: Tensor) -> Tensor:
    """A copy with a dimension at least, which tells weights from the numbers that are kept of them."""
    return x.clone().view(x.shape or (1,))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


class Whole(TorchFunctionMode):
    """Runs an update of torch.optim so that all of it has a derivative.

    Numbers may be 0-dim tensors wherever Python numbers are meant. Where torch takes a number it refuses a
    tensor with a graph before any mode is asked, so these go hidden, with detached tensors in their places;
    what is computed from them does, too. Numbers that the update makes itself are of float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hidden: dict[int, tuple[Tensor, Tensor]] = {}

    def hide(self, x: Tensor) -> Tensor:
        """What stands for a 0-dim tensor with a graph; any other itself."""
        if x.dim() or not x.requires_grad:
            return x
        disguise = x.detach()
        self._hidden[id(disguise)] = disguise, x
        return disguise

    def copy(self, x: Tensor) -> Tensor:
        """A copy of what is kept of a weight, to be overwritten: numbers in float64."""
        return x.clone() if x.dim() else self.hide(x.to(torch.float64, copy=True))

    def shown(self, x: Any) -> Any:
        """Inverts :meth:`hide`, also in a list."""
        if isinstance(x, tuple | list):
            return [self.shown(y) for y in x]
        return self._hidden[id(x)][1] if id(x) in self._hidden else x

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__
        first, *rest = self.shown(args) or [None]
        named = {key: self.shown(x) for key, x in (kwargs or {}).items()}
        # What is overwritten later may not be what a derivative reads.
        rest = [x.clone() if isinstance(x, Tensor) else x for x in rest]
        if name in ("detach", "item") and first.requires_grad:
            return self.hide(first.clone())
        if name in ("sqrt", "sqrt_"):
            # Nothing passes through the root of zero: the rule of l2t.optim.Adam.
            return self.hide(torch.where(first == 0, first.detach(), first.where(first != 0, 1.0).sqrt()))
        if name == "full_like" and isinstance(rest[0], Tensor):
            return torch.zeros_like(first) + rest[0]
        for key in ("alpha", "value"):
            if isinstance(named.get(key), Tensor):
                rest[0] = rest[0] * named.pop(key)
        if name == "lerp_":
            weight = named.pop("weight", rest[-1])
            rest = [rest[0], weight.to(first) if isinstance(weight, Tensor) else weight]
        if name == "clamp_" and any(isinstance(x, Tensor) for x in rest):
            rest = [torch.as_tensor(x, dtype=first.dtype, device=first.device) for x in rest]
        if named.get("dtype") == torch.float32 and name in ("zeros", "ones", "tensor", "as_tensor"):
            named["dtype"] = torch.float64
        out = function(*[first][: len(args)], *rest, **named)
        return self.hide(out) if isinstance(out, Tensor) else out
