"""preflight(): one step of a run, looked at module by module before the run is taken.

Docs: section 5 of docs/math.md. What has no second derivative, none in forward mode or a wrong one is found
by trial: each part is differentiated twice and in forward mode, and the numbers are held against differences
of its first gradient, in which what a step takes as constant stays as it is. So a loss that drops its second
derivative in silence is found as well as one that raises, and no list of operations is kept. Two runs from
the same random state tell what is not deterministic. A run looks by itself, first in the short form of
:func:`bends`, where there is doubt (l2t/curvature.py).

Not here: what is differentiated in a run (l2t/curvature.py), and the sentences (l2t/check.py).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2t import check
from l2t.curvature import NoGradIsConstant, coarsest, first_gradient, gradient, inner, norm, products
from l2t.tape import Randomness, Roots, Student

__all__ = ["Finding", "Preflight", "bends", "known", "preflight", "remember"]

Function = Callable[[list[Tensor]], Tensor]


class Finding(NamedTuple):
    """What a part of a step lacks.

    Attributes:
        where: the module's name, ``"student"`` for the whole of it, or ``"loss"``.
        lacks: ``"second derivative"``, ``"forward mode"`` or ``"determinism"``.
        said: what was seen.
        mend: what to do about it.
    """

    where: str
    lacks: str
    said: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: no {self.lacks} ({self.said}). {self.mend}"


@dataclass(frozen=True)
class Preflight:
    """What :func:`preflight` found. Prints as a line a finding.

    Attributes:
        findings: each :class:`Finding`, of the innermost module that shows it.
        curvature: the ``curvature`` to give to :func:`l2t.unroll`; None where a step is not deterministic and
            has no second derivative, so that no way is left.

    Example:
        >>> import torch, l2t
        >>> student = torch.nn.Linear(3, 1)
        >>> found = l2t.preflight(student, torch.ones(2, 3), lambda model, x, step: model(x).square().mean())
        >>> found.findings, found.curvature, found.suits("forward")
        ((), 'reverse', True)
    """

    findings: tuple[Finding, ...]
    curvature: str | None

    def lacks(self, what: str) -> bool:
        """Whether any part lacks this."""
        return any(finding.lacks == what for finding in self.findings)

    def suits(self, curvature: str) -> bool:
        """Whether a run with this curvature can be walked back."""
        if curvature in {"reverse", "recompute"} and self.lacks("second derivative"):
            return False
        if curvature == "forward" and self.lacks("forward mode"):
            return False
        return curvature == "reverse" or not self.lacks("determinism")

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or [check.preflight_nothing()]
        return "\n".join([*lines, check.preflight_advice(self.curvature)])


def preflight(
    student: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any, int], Tensor],
    *,
    meta: Iterable[Tensor] | None = None,
) -> Preflight:
    """Tries a step of a run and names, module by module, what cannot be differentiated or repeated.

    It takes some ten first gradients of the step and as many of each of its modules alone, so
    :func:`l2t.unroll` does it by itself only where there is doubt. Parameters and buffers of the student,
    ``.grad`` and ``requires_grad`` of its parameters and of the tensors in ``meta``, and the random state are
    as before when it returns, whatever ``loss`` does to them.

    Args:
        student: the module, as for :func:`l2t.unroll`.
        batch: a batch, as ``loss`` takes it.
        loss: ``loss(model, batch, step)``, called with step 0.
        meta: the meta tensors of the run, where ``loss`` calls ``backward()``, which reaches them.

    Returns:
        A :class:`Preflight`. Second derivatives are held against differences in the student's own dtype:
        what is wrong by less than a fiftieth in a module is not seen, nor is what the batch does not touch.

    Raises:
        TypeError, ValueError: an argument, or what loss returns, is not as for :func:`l2t.unroll`.

    Source: the numeric check is that of ``torch.autograd.gradgradcheck`` along a random direction, with the
    noise of the difference told by a second one of twice the length.

    Example:
        >>> import torch, l2t
        >>> student = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> def loss(model, batch, step):
        ...     return torch.nn.functional.cross_entropy(model(batch), torch.tensor([0, 1]))
        >>> print(l2t.preflight(student, torch.ones(2, 3), loss))
        Every part can be differentiated twice and in forward mode, and repeats its numbers.
        Take curvature='reverse' (or any other).
    """
    check.unroll_not_inference()
    check.unroll_not_transformed()
    check.unroll_student(student)
    check.unroll_functions(loss, lambda: None)
    metas = check.unroll_meta(meta) or []
    with _as_before(student, metas) as rewind:
        step = _first_step(student, batch, loss, metas, rewind)
        found = _look(student, step, metas, rewind)
        step.once()
        return found


WRONG = 0.02
"""How far off its difference a derivative counts as wrong, of the size of both."""
DIRECTIONS = 3
"""Along how many it has to be so: a kink between the ends of one difference is no fault."""

_KNOWN: WeakKeyDictionary[Any, WeakSet[nn.Module]] = WeakKeyDictionary()
"""Students by the loss whose steps were found to be right."""


def bends(student: nn.Module, batch: Any, loss: Callable[..., Tensor], metas: Sequence[Tensor]) -> bool:
    """Whether a step has a second derivative, and that which differences of its first one show.

    The first call of the loss and the last are at the student's own weights, so that what a loss keeps from
    call to call is in the end what the run left there, or is found to be counted up with each call.
    """
    with _as_before(student, metas) as rewind:
        step = _first_step(student, batch, loss, metas, rewind)
        value = step.once()
        bent = step.bends()
        check.preflight_keeps_nothing(float(value), float(step.once()))
        return bent


def known(student: nn.Module, loss: Callable[..., Tensor]) -> bool:
    """Whether :func:`remember` was told of them."""
    try:
        return student in _KNOWN.get(loss, ())
    except TypeError:  # no weak reference to this loss, or no hash
        return False


def remember(student: nn.Module, loss: Callable[..., Tensor]) -> None:
    """Keeps in mind, while both live, that steps of this student and loss need no look."""
    with contextlib.suppress(TypeError):
        _KNOWN.setdefault(loss, WeakSet()).add(student)


def _first_step(
    student: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor],
    metas: Sequence[Tensor],
    rewind: Callable[[], None],
) -> _Part:
    def run() -> Tensor:
        value = loss(student, batch, 0)
        check.unroll_loss(value, 0)
        return value

    return _Part(student, rewind, run, meta=metas)


@contextlib.contextmanager
def _as_before(student: nn.Module, metas: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Leaves no trace of what is done in it; gives what sets the random numbers back to its beginning."""
    places = Student(student, metas)
    devices = places.cuda_devices
    start = Randomness.now(devices)
    grads = [(p, p.grad) for p in student.parameters()]
    try:
        with torch.enable_grad():
            yield lambda: start.restore(devices)
    finally:
        places.restore()
        start.restore(devices)
        for p, grad in grads:
            p.grad = grad


def _look(student: nn.Module, step: _Part, metas: Sequence[Tensor], rewind: Callable[[], None]) -> Preflight:
    names = dict(_eager(student, "student"))
    calls, findings = _twice(names, step)
    trials = {names[part]: part for part in calls}
    failed: dict[str, _Trial] = {}
    for name, part in trials.items():
        failed[name] = _Part(part, rewind, *calls[part].function(part)).trial()
    if student in calls:
        # A loss that differentiates the model itself (a gradient penalty) cannot be had without it.
        with contextlib.suppress(Exception):
            failed["loss"] = _of_outputs(student, calls[student], rewind, step.run, metas).trial()
    whole = step.trial()
    for i, lacks in enumerate(("second derivative", "forward mode")):
        named = {name for name, trial in failed.items() if trial[i] is not None}
        inner = [name for name in named if not any(_within(other, name) for other in named)]
        told = [(name, failed[name][i]) for name in failed if name in inner]
        if not told and whole[i] is not None:
            told = [("student with loss", whole[i])]
        for name, said in told:
            assert said is not None
            findings.append(Finding(name, lacks, said, check.preflight_mend(lacks, said)))
    return Preflight(tuple(findings), _advice(findings))


def _eager(part: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose calls can be seen, with their names: none of those inside what is compiled."""
    if part._compiled_call_impl is not None:  # by part.compile()
        return
    yield part, name
    if not hasattr(part, "_orig_mod"):  # by torch.compile(part)
        for inner, child in part.named_children():
            yield from _eager(child, inner if name == "student" else f"{name}.{inner}")


def _within(inner: str, outer: str) -> bool:
    """Whether a module of the first name lies inside one of the second."""
    if outer == "student":
        return inner not in {"student", "loss"}
    return inner.startswith(outer + ".")


def _advice(findings: Sequence[Finding]) -> str | None:
    lacking = {finding.lacks for finding in findings}
    if "second derivative" not in lacking:
        return "reverse"
    if "determinism" in lacking:
        return None
    return "central" if "forward mode" in lacking else "forward"


# ---- two runs


class _Call(NamedTuple):
    """The first call of a module in a step, its tensors detached."""

    args: Any
    output: Any

    def function(self, part: nn.Module) -> tuple[Callable[..., Any], list[Tensor]]:
        """The call as a function of its floating-point tensors, and these."""
        flat, spec = tree_flatten(self.args)
        places = [i for i, x in enumerate(flat) if _is_float(x)]

        def run(*tensors: Tensor) -> Any:
            now = list(flat)
            for i, x in zip(places, tensors, strict=True):
                now[i] = x
            args, kwargs = tree_unflatten(now, spec)
            return part(*args, **kwargs)

        return run, [flat[i] for i in places]


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _copy(tree: Any) -> Any:
    flat, spec = tree_flatten(tree)
    return tree_unflatten([x.detach().clone() if isinstance(x, Tensor) else x for x in flat], spec)


def _same(one: Any, other: Any) -> bool:
    flat, again = tree_flatten(one)[0], tree_flatten(other)[0]
    return len(flat) == len(again) and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        for x, y in zip(flat, again, strict=True)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
    )


def _twice(names: dict[nn.Module, str], step: _Part) -> tuple[dict[nn.Module, _Call], list[Finding]]:
    """The calls of all modules in a step, and what differs when it is run again, innermost first."""
    runs: list[dict[nn.Module, _Call]] = []
    ends: list[list[Tensor]] = []
    for _ in range(2):
        inputs: dict[nn.Module, Any] = {}
        calls: dict[nn.Module, _Call] = {}

        def before(part: nn.Module, args: Any, kwargs: Any, inputs: Any = inputs) -> None:
            if torch._C._functorch.peek_interpreter_stack() is None:  # what torch.vmap runs is no call alone
                inputs.setdefault(part, _copy((args, kwargs)))

        def after(
            part: nn.Module, args: Any, kwargs: Any, out: Any, at: Any = inputs, to: Any = calls
        ) -> None:
            if part in at and part not in to:
                to[part] = _Call(at[part], _copy(out))

        hooks = []
        for part in names:
            hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(part.register_forward_hook(after, with_kwargs=True))
        try:
            with step.value(step.at) as (value, weights):
                for hook in hooks:
                    hook.remove()
                ends.append([value.detach(), *_filled(first_gradient(value, weights), weights)])
        finally:
            for hook in hooks:
                hook.remove()
        runs.append(calls)
    lacks, findings = "determinism", []
    for part, call in runs[0].items():
        if part not in runs[1] or not _same(call.output, runs[1][part].output):
            said = check.preflight_differs("outputs")
            findings.append(Finding(names[part], lacks, said, check.preflight_mend(lacks, said)))
            break
    if not findings and not _same(*ends):
        where = "loss" if not _same(ends[0][0], ends[1][0]) else "student"
        said = check.preflight_differs("values" if where == "loss" else "gradients")
        findings.append(Finding(where, lacks, said, check.preflight_mend(lacks, said)))
    return runs[0], findings


# ---- a part, differentiated in every way

_Trial = tuple[str | None, str | None]
"""Why there is no right second derivative, and why there is none in forward mode; None where there is."""


class _Part:
    """A module, or the whole step, as a scalar function of tensors: inputs and parameters of the module."""

    def __init__(
        self,
        part: nn.Module,
        rewind: Callable[[], None],
        run: Callable[..., Any],
        inputs: Sequence[Tensor] = (),
        parameters: bool = True,
        meta: Sequence[Tensor] = (),
    ) -> None:
        self._student, self._rewind, self.run = Student(part, meta), rewind, run
        self._inputs = len(inputs)
        own = self._student.parameters if parameters else []
        self._parameters = parameters
        self.at = [x.detach() for x in [*inputs, *own]]

    @contextlib.contextmanager
    def value(
        self, at: Sequence[Tensor], constants: _Constants | None = None
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """A scalar at these tensors, and the leaves that stand for them, in the module too meanwhile."""
        leaves = [x if forward_ad.unpack_dual(x).tangent is not None else x.detach() for x in at]
        for x in leaves:
            x.requires_grad_()
        self._rewind()
        weights: list[Tensor] = leaves[self._inputs :] if self._parameters else [*self._student.parameters]
        self._student.bind(weights, self._student.buffers)
        try:
            # An operation in place may not be the first that happens to a leaf.
            inputs = [x.clone() for x in leaves[: self._inputs]]
            mode = NoGradIsConstant() if forward_ad._current_level >= 0 else constants

            def run(_: nn.Module) -> Any:
                with mode or contextlib.nullcontext():
                    return self.run(*inputs)

            out = self._student.call(run, weights, weights)
            outputs = [x for x in tree_flatten(out)[0] if _is_float(x)]
            yield (outputs[0] if len(outputs) == 1 and outputs[0].dim() == 0 else _mixed(outputs)), leaves
        finally:
            self._student.release()

    def trial(self) -> _Trial:
        """Differentiates twice and in forward mode, and compares with differences of the first gradient."""
        constants = _Constants()
        with self.value(self.at, constants) as (value, leaves):
            if not value.requires_grad or not any(x.numel() for x in leaves):
                return None, None
        second, forward = self._along(self._direction(0), constants)
        for number in range(1, DIRECTIONS):
            if second is forward is None:
                break
            again = self._along(self._direction(number), constants)
            second, forward = second and again[0], forward and again[1]
        return second, forward

    def _along(self, a: Sequence[Tensor], constants: _Constants) -> _Trial:
        near, far = (self._difference(a, scale, constants) for scale in (1, 2))
        noise = _noise(near, far)
        found, second = self._reason(self._backward, a, near, noise)
        forward, said = self._reason(self._forward, a, near, noise)
        if found is not None and second is not None:
            right, symmetric = self._compared(a, found, near, constants)
            if right:
                second = None
            if not symmetric and forward is not None:
                said = check.preflight_asymmetric()
        return second, said

    def once(self) -> Tensor:
        """The scalar where the part is."""
        with self.value(self.at) as (value, _):
            return value.detach()

    def bends(self) -> bool:
        """Whether a second derivative is what a difference shows, along one of DIRECTIONS."""
        constants = _Constants()
        for number in range(DIRECTIONS):
            a = self._direction(number)
            with self.value(self.at, constants) as (value, leaves):
                if not value.requires_grad:
                    return True
                try:
                    found = _second(value, leaves, a)
                except RuntimeError:
                    return False
            near = self._difference(a, 1, constants)
            if not _apart(found, near):
                return True
            if not _apart(found, near, _noise(near, self._difference(a, 2, constants))):
                return True
            constants.again()
        return False

    def _direction(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2 + number)
        return [torch.randn(x.shape, generator=generator).to(x) for x in self.at]

    def _compared(
        self,
        a: Sequence[Tensor],
        found: Sequence[Tensor],
        difference: Sequence[Tensor],
        constants: _Constants,
    ) -> tuple[bool, bool]:
        """Whether what was found is Jᵀ a, and whether J a is, which a difference is: ⟨b, Jᵀ a⟩ = ⟨a, J b⟩."""
        off = [x - y for x, y in zip(found, difference, strict=True)]
        right = symmetric = True
        for b in (off, found):
            if not norm(b):  # no direction
                continue
            near, far = (self._difference(b, scale, constants) for scale in (1, 2))
            room = max(WRONG * float(norm(b)) * float(norm(off)), float(norm(a)) * _noise(near, far))
            right &= abs(inner(b, found) - inner(a, near)) <= room
            symmetric &= abs(inner(b, difference) - inner(a, near)) <= room
        return right, symmetric

    def _difference(self, a: Sequence[Tensor], scale: float, constants: _Constants) -> list[Tensor]:
        length = scale * coarsest(self.at) ** (1 / 3) * (1 + float(norm(self.at))) / float(norm(a))
        ends = []
        for sign in (1, -1):
            constants.again()
            moved = [x + sign * length * t for x, t in zip(self.at, a, strict=True)]
            with self.value(moved, constants) as (value, leaves):
                ends.append(_filled(first_gradient(value, leaves), leaves))
        return [(x - y) / (2 * length) for x, y in zip(*ends, strict=True)]

    def _backward(self, a: Sequence[Tensor]) -> list[Tensor]:
        with self.value(self.at) as (value, leaves):
            return _second(value, leaves, a)

    def _forward(self, a: Sequence[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            along = [forward_ad.make_dual(x, t) for x, t in zip(self.at, a, strict=True)]
            with self.value(along) as (value, leaves):
                grads = first_gradient(value, leaves)
            tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]
        return _filled(tangents, leaves)

    @staticmethod
    def _reason(
        way: Callable[[Sequence[Tensor]], list[Tensor]],
        a: Sequence[Tensor],
        difference: Sequence[Tensor],
        noise: float,
    ) -> tuple[list[Tensor] | None, str | None]:
        """What comes of a way, and why it is not right; None where it is."""
        try:
            found = way(a)
        except RuntimeError as error:
            return None, str(error).splitlines()[0].rstrip(". ")
        apart = _apart(found, difference, noise)
        return found, check.preflight_wrong(apart) if apart else None


class _Constants(TorchFunctionMode):
    """What a step takes as constant: recorded in its first call, and given again in those at moved tensors.

    So is all that has no graph though an argument has one (detach, .data, item, a comparison), and what is
    computed in torch.no_grad. What an autograd Function does inside itself is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Any, list[Any]]] = []
        self._next: int | None = None  # of those kept, in a call at moved tensors
        self._off = False  # inside of torch.no_grad

    def again(self) -> None:
        """Begins a call at moved tensors."""
        self._next = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        enabled = torch.is_grad_enabled()
        result = function(*args, **(kwargs or {}))
        if function is torch._C._set_grad_enabled:
            self._off = not args[0] and (self._off or enabled)
            return result
        if not self._off and not enabled:  # an autograd Function, whose backward has the derivatives
            return result
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if not self._off and not any(_bare(x).requires_grad for x in given):
            return result
        if result is None and given:  # such as __setitem__
            self._constant(function, given, given[:1])
            return None
        flat, spec = tree_flatten(result)
        return tree_unflatten(self._constant(function, given, flat), spec)

    def _constant(self, function: Any, given: list[Tensor], results: list[Any]) -> list[Any]:
        """These results, and in a call at moved tensors what they were in the first."""
        places = [i for i, x in enumerate(results) if _is_constant(x)]
        if not places:
            return results
        if self._next is None:
            copies = [
                _bare(results[i]).clone() if isinstance(results[i], Tensor) else results[i] for i in places
            ]
            self._kept.append((function, copies))
            return results
        if self._next >= len(self._kept):
            return results
        known, kept = self._kept[self._next]
        if known != function or not all(_fits(x, results[i]) for x, i in zip(kept, places, strict=False)):
            self._next = len(self._kept)  # it has gone another way
            return results
        self._next += 1
        results = list(results)
        for i, x in zip(places, kept, strict=False):
            result = results[i]
            if not isinstance(result, Tensor):
                results[i] = x
                continue
            # Memory of what has no graph is written as it would have been; of the rest this is a copy.
            shared = [y for y in given if _memory(y) == _memory(result)]
            if not shared or any(_bare(y).requires_grad for y in shared):
                results[i] = result = result.detach().clone()
            _bare(result).copy_(x)
        return results


def _is_constant(x: object) -> bool:
    return isinstance(x, float) or (isinstance(x, Tensor) and not _bare(x).requires_grad)


def _fits(kept: object, now: object) -> bool:
    if isinstance(kept, Tensor) and isinstance(now, Tensor):
        return kept.shape == _bare(now).shape and kept.dtype == now.dtype
    return type(kept) is type(now)


def _bare(x: Tensor) -> Tensor:
    """The tensor under those of torch.vmap and torch.func."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _memory(x: Tensor) -> int:
    x = _bare(x)
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _of_outputs(
    student: nn.Module,
    call: _Call,
    rewind: Callable[[], None],
    run: Callable[[], Tensor],
    metas: Sequence[Tensor],
) -> _Part:
    """The loss as a function of what the student gives, which is put in the place of what it would give."""
    flat, spec = tree_flatten(call.output)
    places = [i for i, x in enumerate(flat) if _is_float(x)]

    def loss(*outputs: Tensor) -> Tensor:
        now = list(flat)
        for i, x in zip(places, outputs, strict=True):
            now[i] = x
        calls = itertools.count()

        def instead(part: nn.Module, args: Any, out: Any) -> Any:
            return tree_unflatten(now, spec) if next(calls) == 0 else out

        hook = student.register_forward_hook(instead)
        try:
            return run()
        finally:
            hook.remove()

    return _Part(student, rewind, loss, [flat[i] for i in places], parameters=False, meta=metas)


def _mixed(outputs: Sequence[Tensor]) -> Tensor:
    """A number of all outputs, bent so that what comes back to a module depends on what it gave."""
    total = torch.zeros((), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator).to(x)
        total = total.to(x) + (weight * (x + x.square() / 2)).sum()
    return total


def _second(value: Tensor, leaves: list[Tensor], a: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives of ⟨g, a⟩, in reverse over reverse."""
    grads = gradient(value, leaves)
    along = [t for g, t in zip(grads, a, strict=True) if g is not None]
    return _filled(products(Roots.of(grads), along, leaves), leaves)


def _apart(found: Sequence[Tensor], difference: Sequence[Tensor], noise: float = 0.0) -> float:
    """How far a product is off its difference, of their size; 0 where it is near, or noise allows for it."""
    off = float(norm([x - y for x, y in zip(found, difference, strict=True)]))
    size = max(float(norm(found)), float(norm(difference)))
    return off / size if off > max(WRONG * size, noise) else 0.0


def _noise(near: Sequence[Tensor], far: Sequence[Tensor]) -> float:
    """How far off a difference may be, by what one of twice the length says."""
    return 4 * float(norm([x - y for x, y in zip(near, far, strict=True)]))


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if d is None else d.detach() for d, x in zip(found, like, strict=True)]
