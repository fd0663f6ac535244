"""What an optimiser of an unrolled run is, and what all of them take: settings, parameter groups, clipping.

Docs: section 5 of docs/math.md. The records of an update, the interface :class:`Optimizer`, and
:class:`Rule`, an optimiser with settings by name, which may differ between groups of parameters
(:class:`Grouped`) and whose gradient may be clipped first (:class:`Clipped`). The rules themselves are in
l2t/optim.py and l2t/optim_torch.py.
"""

from __future__ import annotations

import abc
import fnmatch
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from l2t import check
from l2t.graph import leaves

__all__ = [
    "Clipped",
    "Found",
    "Group",
    "Grouped",
    "Hyper",
    "Hyperparameter",
    "Number",
    "Optimizer",
    "Point",
    "Rule",
    "Slot",
    "Tensors",
    "dot",
    "given",
    "only_wanted",
    "total",
    "transpose_apart",
    "update_apart",
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

    def bound(self, names: Sequence[Sequence[str]], weights: Sequence[Tensor]) -> Optimizer:
        """The optimiser for a student with these trained parameters, each with all of its names."""
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


Group = Mapping[str, Any]
"""Under "params" which parameters: a pattern of names such as ``"head.*"``, a parameter, or several of these;
beside it their settings, by the names of the optimiser's arguments."""


class Settings:
    """Settings by name, each a number, a 0-dim tensor or a function of the step that returns either."""

    def __init__(self, owner: str, given: dict[str, Hyperparameter], shares: Sequence[str] = ()) -> None:
        self._owner, self.names, self._shares = owner, list(given), shares
        self._constant: dict[str, Number] = {}
        self._by_step: dict[str, Callable[[int], Number]] = {}
        for name, value in given.items():
            if callable(value) and not isinstance(value, Tensor):
                self._by_step[name] = value
            else:
                self._constant[name] = check.optim_setting(owner, name, value)
                self._number(name, self._constant[name])
        self._behind = {
            name: [(x, x._version) for x in leaves([value])]
            for name, value in self._constant.items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        }

    def _number(self, name: str, value: Number) -> float:
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        return check.optim_share(self._owner, name, number) if name in self._shares else number

    def by_step(self) -> Callable[[int], Hyper]:
        """The settings as a function of the step; those that do not depend on it are read here, once."""
        for name, behind in self._behind.items():
            check.optim_stale(self._owner, name, any(x._version != version for x, version in behind))
        constant = {name: self._number(name, value) for name, value in self._constant.items()}
        wanted = _wanted(self._constant)
        if not self._by_step:
            hyper = Hyper(tuple(constant[name] for name in self.names), wanted)
            return lambda step: hyper

        def at(step: int) -> Hyper:
            values = {
                name: check.optim_setting(self._owner, name, f(step), step)
                for name, f in self._by_step.items()
            }
            numbers = constant | {name: self._number(name, value) for name, value in values.items()}
            return Hyper(tuple(numbers[name] for name in self.names), wanted | _wanted(values))

        return at


class Rule(Optimizer):
    """An optimiser with settings of its own by name.

    Args:
        settings: the settings by name.
        arguments: what the constructor was called with, these two apart.
        groups: parameters whose settings differ; the others have those of the constructor.
        clip_norm: what the norm of the whole gradient is clipped to; None for no clipping.
    """

    shares: Sequence[str] = ()
    """Those settings that are shares of a running average."""

    def __init__(
        self,
        settings: dict[str, Hyperparameter],
        arguments: dict[str, Any],
        groups: Sequence[Group],
        clip_norm: Hyperparameter | None,
    ) -> None:
        owner = type(self).__name__
        self._settings = Settings(owner, settings, self.shares)
        self._clip = None if clip_norm is None else Settings(owner, {"clip_norm": clip_norm})
        self._shown = arguments | ({"groups": groups} if groups else {})
        self._shown |= {} if clip_norm is None else {"clip_norm": clip_norm}
        self._groups = [
            (params, type(self)(**(arguments | changes)))
            for params, changes in check.optim_groups(owner, groups, self.options())
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self._shown.items())})"

    def options(self) -> Sequence[str]:
        """What a group may set for itself."""
        return [name for name in self._shown if name not in {"groups", "clip_norm"}]

    def settings(self) -> Callable[[int], Hyper]:
        """The settings as a function of the step; those that do not depend on it are read here, once."""
        return self._settings.by_step()

    def bound(self, names: Sequence[Sequence[str]], weights: Sequence[Tensor]) -> Optimizer:
        """With its groups and its clipping, for a student with these trained parameters."""
        bound: Optimizer = self
        if self._groups:
            rule_of = [0] * len(weights)
            for k, (params, _) in enumerate(self._groups, 1):
                for i in _places(type(self).__name__, params, names, weights):
                    check.optim_one_group(type(self).__name__, names[i][0], rule_of[i], k)
                    rule_of[i] = k
            bound = Grouped([self, *(rule for _, rule in self._groups)], rule_of)
        return bound if self._clip is None else Clipped(bound, self._clip)


def _places(
    owner: str, params: Sequence[str | Tensor], names: Sequence[Sequence[str]], weights: Sequence[Tensor]
) -> set[int]:
    """Which trained parameters a group means."""
    places: set[int] = set()
    for entry in params:
        if isinstance(entry, str):
            here = [i for i, known in enumerate(names) if fnmatch.filter(known, entry)]
        else:
            here = [i for i, w in enumerate(weights) if w is entry]
        if isinstance(entry, str) or entry.requires_grad:
            check.optim_in_student(owner, entry, bool(here), [known[0] for known in names])
        places.update(here)
    return places


class Grouped(Optimizer):
    """Rules side by side, each for its own parameters: ``rule_of`` says which one a parameter has.

    A hyper holds those of the rules, in their order.
    """

    def __init__(self, rules: Sequence[Rule], rule_of: Sequence[int]) -> None:
        self._rules, self._rule_of = rules, rule_of
        self.reads = any(rule.reads for rule in rules)
        if len({tuple(rule.slot_names) for rule in rules}) == 1:
            self.slot_names = rules[0].slot_names

    def settings(self) -> Callable[[int], Hyper]:
        """The settings of every rule; a function of the step is asked once a step by each."""
        by_rule = [rule.settings() for rule in self._rules]

        def at(step: int) -> Hyper:
            hypers = tuple(f(step) for f in by_rule)
            return Hyper(
                hypers, {f"{name} {k}": x for k, h in enumerate(hypers) for name, x in h.wanted.items()}
            )

        return at

    def start(self, weights: Tensors) -> list[Slot]:
        """What each parameter's rule keeps of it."""
        return [self._rules[k].start([w])[0] for k, w in zip(self._rule_of, weights, strict=True)]

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """Each parameter after a step of its rule."""
        keys = [self._rule_of[i] for i in point.which]
        return update_apart(point, keys, lambda k, part: self._rules[k].update(_inner(part, k)))

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """The transposes of the rules."""
        keys = [self._rule_of[i] for i in point.which]
        return transpose_apart(
            point, v_w, v_slots, keys, lambda k, part, *v: self._rules[k].transpose(_inner(part, k), *v)
        )


class Clipped(Optimizer):
    """An optimiser whose gradient g, of all parameters that the loss reaches, is clipped to a norm M first.

    g' = c g with c = min(1, M/(‖g‖ + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` has it. A hyper holds that
    of the optimiser, and M.
    """

    reads = True

    def __init__(self, optimizer: Optimizer, limit: Settings) -> None:
        self._optimizer, self._limit, self.slot_names = optimizer, limit, optimizer.slot_names

    def settings(self) -> Callable[[int], Hyper]:
        """Those of the optimiser, and M."""
        inner, limit = self._optimizer.settings(), self._limit.by_step()

        def at(step: int) -> Hyper:
            hypers = inner(step), limit(step)
            return Hyper(hypers, hypers[0].wanted | hypers[1].wanted)

        return at

    def start(self, weights: Tensors) -> list[Slot]:
        """What the optimiser keeps."""
        return self._optimizer.start(weights)

    def update(self, point: Point) -> tuple[Tensors, Sequence[Slot]]:
        """The optimiser's step along the clipped gradient."""
        _, _, share = self._share(point)
        return self._optimizer.update(
            _inner(point, 0)._replace(grads=_scaled(point.grads, share.clamp(max=1.0)))
        )

    def _share(self, point: Point) -> tuple[Tensor, Tensor, Tensor]:
        """‖g‖, ‖g‖ + 1e-6, and what g would be multiplied with if it were never less than one."""
        total = torch.nn.utils.get_total_norm(point.grads)
        below = total + 1e-6
        return total, below, point.hyper.values[1].values[0] / below

    def transpose(self, point: Point, v_w: Tensors, v_slots: Sequence[Slot]) -> tuple[Tensors, Found]:
        """Section 5 of docs/math.md."""
        total, below, share = self._share(point)
        clipped = _scaled(point.grads, share.clamp(max=1.0))
        a, found = self._optimizer.transpose(_inner(point, 0)._replace(grads=clipped), v_w, v_slots)
        of_share = torch.where(share <= 1, dot(a, point.grads).to(share), 0.0)
        of_total = torch.where(total > 0, -of_share * share / (below * total), 0.0)
        a = _scaled(a, share.clamp(max=1.0))
        torch._foreach_add_(a, _scaled(point.grads, of_total))
        return a, found + [(x, of_share / below) for x in point.hyper.values[1].wanted.values()]


def _inner(point: Point, k: int) -> Point:
    """The point with the k-th of the hypers that its own consists of."""
    return point._replace(hyper=point.hyper.values[k])


def _scaled(xs: Tensors, factor: Tensor) -> Tensors:
    """Every tensor times a number that is on one device."""
    if all(x.device == factor.device for x in xs):
        return torch._foreach_mul(xs, factor)
    return [x * factor.to(x.device) for x in xs]


def only_wanted(hyper: Hyper, gradients: dict[str, Callable[[], Tensor]]) -> Found:
    """The gradients of the settings that want one."""
    return [(x, gradients[name]()) for name, x in hyper.wanted.items()]


def _members(keys: Sequence[Key]) -> dict[Key, list[int]]:
    members: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    return members


def update_apart(
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


def transpose_apart(
    point: Point,
    v_w: Tensors,
    v_slots: Sequence[Slot],
    keys: Sequence[Key],
    transpose: Callable[[Key, Point, Tensors, Sequence[Slot]], tuple[Tensors, Found]],
) -> tuple[Tensors, Found]:
    """Transposes :func:`update_apart`."""
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


def given(value: Hyperparameter) -> bool:
    """Whether a setting may be other than zero."""
    return callable(value) or isinstance(value, Tensor) or value != 0


def _wanted(values: dict[str, Number]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if isinstance(x, Tensor) and x.requires_grad}


def dot(xs: Tensors, ys: Tensors) -> Tensor:
    """The inner product over all tensors of two lists, on the device of the first: see :func:`total`."""
    pairs = ((_wide(x), _wide(y)) for x, y in zip(xs, ys, strict=True))
    return _together([torch.linalg.vecdot(x.flatten(), y.flatten()) for x, y in pairs])


def total(xs: Tensors) -> Tensor:
    """The sum over all entries of all tensors, on the device of the first, in the widest dtype.

    Half precision is added up in float32.
    """
    return _together([_wide(x).sum() for x in xs])


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _together(parts: Sequence[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in parts])
    return torch.stack([x.to(parts[0].device, dtype) for x in parts]).sum()
