"""A run's step and its reverse as compiled code: each traced with its derivatives inside, so a function of
first order.

Docs: section 5 of docs/math.md. Of a step is remembered what its curvature does: as ``Reverse`` the numbers
that its reverse reads, one trace of both being cut in two; or as ``Recompute`` weights and batch, from which
the reverse takes the step again. The trace is that of make_fx over real tensors, in which meta tensors are
known by being themselves wherever the loss has them; other tensors that the loss has beside its arguments are
handed to the code at each call. What a trace would freeze in silence (random numbers, numbers read from
tensors) is refused while it is taken, and what it yields is compared with the loss itself at the first step
of each run. Code is kept as long as the student and the loss that it was made from, and serves again where
the plain numbers that these hold are the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import operator
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2t import check, reference
from l2t.curvature import (
    Recompute,
    Replay,
    Wanted,
    checkpoints,
    coarsest,
    differentiable,
    dtypes,
    first_gradient,
    gradient,
)
from l2t.graph import foreign, leaves
from l2t.optim import Tensors
from l2t.tape import Grads, Roots, Step, Student

__all__ = ["Compiled"]


class Outcome(NamedTuple):
    """What the code of a step gives, and what its reverse reads, if it is to be kept."""

    value: Tensor
    grads: Grads
    buffers: list[Tensor]
    kept: Sequence[Tensor]
    versions: Sequence[int]


class Compiled(Recompute):
    """The step of a run and its products, compiled when the first step is there.

    Args:
        student: the student.
        loss: the loss of a step.
        meta: the leaves beside the weights whose derivatives are wanted.
        hessian: whether H a is.
        keeps: whether what the reverse reads is kept, or the step taken again.

    Attributes:
        seconds: what tracing, compiling and the comparison of new code took.
    """

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        meta: Sequence[Tensor],
        hessian: bool,
        keeps: bool,
    ) -> None:
        self.keeps_graph = keeps
        self._student, self._loss, self._meta, self._hessian = student, loss, list(meta), hessian
        self._ids = {id(x) for x in meta}
        # What has come to a meta tensor, by its id and where it was: the code adds to each of them apart.
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._code: _Code | None = None
        self._form: object = None
        self._first = self._worst = torch.zeros(())
        self._unit = 0.0
        self.seconds = 0.0
        self.foreign = False  # whether the loss has derivatives that others have written

    def keeps_gradient(self, wanted: bool) -> bool:
        """Where the settings read it, as the step's code gives it."""
        return wanted

    def step(self, t: int, w: Tensors, b: list[Tensor], batch: object) -> Outcome:
        """Loss and gradient of a step, and the buffers after it, all detached."""
        code, parts = self._made(t, w, b, batch)
        arguments = [*w, *b, *parts, *self._meta]
        given = code.step(*arguments)
        kept = code.kept_of(arguments, given)
        count = 1 + len(code.reached)
        grads: Grads = tuple(given[1:count])
        if len(grads) < len(w):
            by_place = dict(zip(code.reached, grads, strict=True))
            grads = tuple(by_place.get(i) for i in range(len(w)))
        return Outcome(given[0], grads, list(given[count : count + len(b)]), kept, code.versions(kept))

    def kept_bytes(self, w: Tensors, b: list[Tensor], batch: object, anchors: bool) -> int:
        """What a step keeps beside batch and buffers; with ``anchors``, what is read again of the weights."""
        code, _ = self._made(0, w, b, batch)
        weights = [w[i].nbytes for i in code.kept or () if i < len(w)]
        return code.bytes + anchors * sum(weights)

    def _made(self, t: int, w: Tensors, b: list[Tensor], batch: object) -> tuple[_Code, list[Tensor]]:
        """The code, which is made at the first step, and the tensors of the batch."""
        parts = self._leaves(batch, t)
        if self._code is None:
            try:
                self._code = self._begin(t, w, b, parts, batch)
            finally:
                self._student.release()
        return self._code, parts

    def product(self, step: Step, replay: Replay, a: Tensors, wanted: Wanted) -> None:
        """As :class:`l2t.curvature.Curvature` says."""
        code = self._code
        assert code is not None
        assert step.loss is not None
        if code.reverse is None:
            return
        check.unroll_compiled_still(step.index, step.versions == code.versions(step.kept))
        parts = self._leaves(step.batch, step.index)
        own = [*step.weights, *parts, *self._meta]
        sums = []
        for i in code.targets:
            x = own[i]
            if i < len(step.weights):
                sums.append(x.grad)
            elif (id(x), i) in self._sums:
                sums.append(self._sums[id(x), i])
            else:
                sums.append(x.detach().new_zeros(x.shape))
                self._sums[id(x), i] = sums[-1]
        if code.kept is not None:
            code.reverse(*step.kept, *a, *sums)
            return
        code.reverse(
            *step.weights, *step.buffers, *parts, *self._meta, *a, step.loss, self._first, self._worst, *sums
        )

    def close(self) -> None:
        """Hands on the gradients of the meta tensors, or raises if the walk back met other steps."""
        check.unroll_compiled_again(float(self._worst), self._unit**0.5)
        by_id = {id(x): x for x in self._meta}
        for (key, _), found in self._sums.items():
            x = by_id[key]
            x.grad = found if x.grad is None else x.grad + found

    def _leaves(self, batch: object, t: int) -> list[Tensor]:
        """The tensors of a batch, of the same form in every step."""
        spec: object
        if isinstance(batch, (tuple, list)) and all(type(x) is Tensor for x in batch):
            parts, spec = list(batch), type(batch)  # as most are: five times as fast
        else:
            parts, spec = tree_flatten(batch)
        form = spec, [(x.shape, x.dtype, x.device, id(x) in self._ids) for x in parts if _plain(x, t)]
        if form != self._form:
            if self._form is not None:
                raise check.unroll_compiled_form(t)
            self._form = form
        return parts

    def _begin(self, t: int, w: Tensors, b: list[Tensor], parts: list[Tensor], batch: object) -> _Code:
        """Code that agrees with the loss at this step: that of a run before, or new."""
        trace = _Trace(
            self._student, self._loss, self._meta, self._hessian, self.keeps_graph, len(w), len(b), batch
        )
        # Batches are arguments of their own, be they meta tensors too.
        batch_leaves = [x.detach().requires_grad_(id(x) in self._ids) for x in parts]
        arguments = [*(x.detach().requires_grad_() for x in w), *b, *batch_leaves, *self._meta]
        held = _held(self._loss, self._student.module)
        with torch.enable_grad():
            value, g, buffers = trace.gradient(arguments, gradient, t)
        now = _held(self._loss, self._student.module)
        # What a call changes itself counts calls, and is no part of what it gives, which is the same in each.
        held = {place: x for place, x in held.items() if now.get(place) == x}
        checkpoints(value)
        self.foreign = foreign([value])
        kinds = dtypes(value)
        check.unroll_compiled_dtypes(kinds)
        self._unit = unit = max([coarsest(w), *(torch.finfo(x).eps for x in kinds)])
        self._worst = torch.zeros_like(value)
        self._first = value.detach().nan_to_num(0.0, 0.0, 0.0)  # a size, where it is one
        eager = [value, *(x for x in g if x is not None), *buffers]
        detached = [x.detach() for x in arguments]

        places = {id(x): i for i, x in enumerate(arguments)}
        reaches = {places.get(id(x)) for x in leaves(Roots.of(g).edges)}

        asked = trace.products(arguments, g)

        def differs(code: _Code) -> str | None:
            if code.reached != [i for i, x in enumerate(g) if x is not None] or code.reaches != reaches:
                return "gradient"
            names = ["loss", *["gradient"] * len(code.reached), *["buffer after it"] * len(buffers)]
            given = code.step(*detached)
            different = _differing(names, eager, given[: len(eager)], unit)
            if different is not None or code.reverse is None:
                return different
            if code.targets != asked.targets:
                return "derivative to meta"
            # Contiguous, since the code adds to them in place.
            found = [x.new_zeros(x.shape) for x in asked.expected]
            if code.kept is not None:
                code.reverse(*code.kept_of(detached, given), *asked.a, *found)
            else:
                code.reverse(*detached, *asked.a, *[value.detach()] * 2, self._worst.clone(), *found)
            names = ["product H a" if i < len(w) else "derivative to meta" for i in code.targets]
            return _differing(names, asked.expected, found, unit)

        modes = torch.get_num_threads(), tuple(m.training for m in self._student.module.modules())
        form = [(x.shape, x.dtype, x.device, x.requires_grad) for x in arguments]
        ways = self._hessian, self.keeps_graph
        key = _Key(self._loss, self._meta, (self._form, form, ways, modes, held))
        kept = _KEPT.setdefault(self._student.module, [])
        kept[:] = [entry for entry in kept if entry[0].alive]
        for entry in kept:
            if entry[0].matches(key):
                if differs(entry[1]) is None:
                    return entry[1]
                kept.remove(entry)  # the loss has come to see other things
                break
        start = perf_counter()
        code = trace.code(arguments, value.detach(), g, reaches, asked)
        check.unroll_compiled_agrees(differs(code))
        self.seconds += perf_counter() - start
        with contextlib.suppress(TypeError):  # a loss to which there is no weak reference
            kept.append((key.weak(), code))
            del kept[:-MOST]
        return code


def _plain(x: object, t: int) -> bool:
    if not isinstance(x, Tensor) or x.grad_fn is not None:
        raise check.unroll_compiled_batch(x, t)
    return True


def _differing(
    names: Sequence[str], eager: Sequence[Tensor], compiled: Sequence[Tensor], unit: float
) -> str | None:
    """The name of the first group that differs by more than rounding may, or None."""
    for name in dict.fromkeys(names):
        size = off = 0.0
        for x, y in ((x, y) for other, x, y in zip(names, eager, compiled, strict=True) if other == name):
            x, y = x.detach().double(), y.detach().double()
            if not x.isfinite().all():  # nothing to compare with
                continue
            size, off = size + float(x.square().sum()), off + float((x - y).square().sum())
        if not off**0.5 <= unit**0.5 * size**0.5 + unit:
            return name
    return None


class _Function(NamedTuple):
    """Compiled code, and the tensors that it takes beside its arguments."""

    run: Callable[..., Sequence[Tensor]]
    beside: list[Tensor]

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.run(*[x.contiguous() for x in (*arguments, *self.beside)])


class _Code(NamedTuple):
    """The functions of a step; which weights the loss reaches and which arguments the gradient does; to
    which of weights, batch and meta tensors the products belong; and what is kept for the reverse, by its
    place among arguments and results of the step (None: nothing, it takes the step again), the bytes of the
    results in it, and the places in it that may be written by others.
    """

    step: _Function
    reverse: _Function | None
    reached: list[int]
    reaches: set[int | None]
    targets: list[int]
    kept: list[int] | None = None
    bytes: int = 0
    shared: Sequence[int] = ()

    def kept_of(self, arguments: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """What is kept of a step, of these arguments and results."""
        count = len(arguments)
        return [arguments[i] if i < count else given[i - count] for i in self.kept or ()]

    def versions(self, kept: Sequence[Tensor]) -> list[int]:
        """How often what the reverse reads and others may write was written."""
        if self.kept is None or self.reverse is None:
            return []
        read = [*(kept[i] for i in self.shared), *self.reverse.beside]
        return [x._version for x in read if not x.is_inference()]


class _Asked(NamedTuple):
    """What a reverse has to give: the products of the gradient with ``a``, and to what they belong.

    ``moving`` are the positions of gradients that have a graph, among those that are there.
    """

    moving: list[int]
    targets: list[int]
    a: list[Tensor]
    expected: list[Tensor]


class _Trace:
    """The functions that are traced, of flat arguments: weights, buffers, batch and meta tensors."""

    def __init__(
        self,
        student: Student,
        loss: Callable[..., Tensor],
        meta: Sequence[Tensor],
        hessian: bool,
        keeps: bool,
        weights: int,
        buffers: int,
        batch: object,
    ) -> None:
        self._student, self._loss, self._hessian, self._keeps = student, loss, hessian, keeps
        self._weights, self._buffers = weights, buffers
        _, self._spec = tree_flatten(batch)
        self._count = weights + buffers + self._spec.num_leaves + len(meta)

    def gradient(
        self, arguments: Sequence[Tensor], way: Callable[..., Grads], t: int = 0
    ) -> tuple[Tensor, Grads, list[Tensor]]:
        """Loss, gradient and buffers. The student stays bound, for the derivatives that are still to come."""
        w = list(arguments[: self._weights])
        at = self._weights + self._buffers
        batch = tree_unflatten(list(arguments[at : at + self._spec.num_leaves]), self._spec)
        self._student.bind(w, list(arguments[self._weights : at]))
        value = check.unroll_loss(self._student.call(self._loss, w, w, batch, _NoStep()), t)
        g = way(value, w)
        return value, g, self._student.buffers_after(arguments[self._weights : at])

    def products(self, arguments: list[Tensor], g: Grads) -> _Asked:
        """What the reverse has to give, of a gradient with its graph."""
        own = [arguments[i] for i in self._places()]
        present = [x for x in g if x is not None]
        moving = [i for i, x in enumerate(present) if x.requires_grad]
        asked = [i for i, x in enumerate(own) if x.requires_grad and (self._hessian or i >= self._weights)]
        generator = torch.Generator().manual_seed(0)
        a = [torch.randn(x.shape, generator=generator).to(x) for x in present]
        try:
            differentiable([present[i] for i in moving])
            expected = _products(present, moving, [own[i] for i in asked], a)
        except RuntimeError as error:
            check.unroll_second_derivative(error)
            raise
        targets = [i for i, x in zip(asked, expected, strict=True) if x is not None]
        return _Asked(moving, targets, a, [x.detach() for x in expected if x is not None])

    def _places(self) -> list[int]:
        """Which arguments may have derivatives: all but the buffers."""
        return [*range(self._weights), *range(self._weights + self._buffers, self._count)]

    def code(
        self, arguments: list[Tensor], value: Tensor, g: Grads, reaches: set[int | None], asked: _Asked
    ) -> _Code:
        """Traced and compiled. ``g`` is a gradient with its graph."""
        present = [x for x in g if x is not None]
        reached = [i for i, x in enumerate(g) if x is not None]
        own = [arguments[i] for i in self._places()]
        along = [x.detach() for x in present]
        sums = [own[i].detach().new_zeros(own[i].shape) for i in asked.targets]
        try:
            if not asked.targets:
                return _Code(_compiled(_traced(self._step, arguments), arguments), None, reached, reaches, [])
            if not self._keeps:
                values = [torch.zeros_like(value) for _ in range(3)]
                step = _compiled(_traced(self._step, arguments), arguments)
                more = [*arguments, *along, *values, *sums]
                reverse = functools.partial(self._again, len(present), asked)
                return _Code(step, _compiled(_traced(reverse, more), more), reached, reaches, asked.targets)
            both = _traced(functools.partial(self._both, len(present), asked), [*arguments, *along, *sums])
            first, second, kept = _cut(both, self._count)
            step = _compiled(first, arguments)
            given = step(*arguments)
            code = _Code(step, None, reached, reaches, asked.targets, kept)
            read = code.kept_of(arguments, given)
            results = {i: x.nbytes for i, x in zip(kept, read, strict=True) if i >= self._count}
            batch = range(self._weights + self._buffers, self._count)
            return code._replace(
                reverse=_compiled(second, [*read, *along, *sums]),
                bytes=sum(results.values()),
                shared=[j for j, i in enumerate(kept) if i in batch],
            )
        except Exception as error:
            raise check.unroll_not_compiled(error) from error

    def _step(self, *flat: Tensor) -> list[Tensor]:
        """Loss, gradient and buffers, of weights, buffers, batch and meta tensors."""
        value, g, buffers = self.gradient(flat, first_gradient)
        return [value, *(x for x in g if x is not None), *buffers]

    def _again(self, count: int, asked: _Asked, *flat: Tensor) -> list[Tensor]:
        """Adds the products to sums and finds by how much the loss is off, of the arguments of a step, a
        vector of so many parts, the loss that was, that of the first step, the worst so far, and the sums.
        """
        value, g, _ = self.gradient(flat[: self._count], gradient)
        rest = flat[self._count :]
        a, (recorded, first, worst), sums = rest[:count], rest[count : count + 3], rest[count + 3 :]
        self._add_products(g, asked, flat, a, sums)
        size = (recorded.abs() + first.abs()).clamp(min=torch.finfo(recorded.dtype).tiny)
        off = (value.detach() - recorded).abs() / size
        with torch.no_grad():
            worst.copy_(torch.maximum(worst, torch.where(recorded.isfinite(), off, 0.0)))
        return []

    def _both(self, count: int, asked: _Asked, *flat: Tensor) -> list[Tensor]:
        """The step, which is marked, and then the products with a vector of so many parts, added to sums."""
        value, g, buffers = self.gradient(flat[: self._count], gradient)
        _mark_step()
        rest = flat[self._count :]
        self._add_products(g, asked, flat, rest[:count], rest[count:])
        return [value, *(x for x in g if x is not None), *buffers]

    def _add_products(
        self,
        g: Grads,
        asked: _Asked,
        flat: Sequence[Tensor],
        a: Sequence[Tensor],
        sums: Sequence[Tensor],
    ) -> None:
        places = self._places()
        present = [x for x in g if x is not None]
        found = _products(present, asked.moving, [flat[places[i]] for i in asked.targets], a)
        with torch.no_grad():
            for total, x in zip(sums, found, strict=True):
                total.add_(cast("Tensor", x))


def _products(
    present: Sequence[Tensor], moving: Sequence[int], inputs: Sequence[Tensor], a: Sequence[Tensor]
) -> Grads:
    """The derivatives of ⟨g, a⟩. The graph is kept: parts of it may have been there before the run."""
    if not moving or not inputs:
        return (None,) * len(inputs)
    outputs, v = [present[i] for i in moving], [a[i] for i in moving]
    return torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True)


class _NoStep:
    """Stands for the step's number in a trace, which would freeze it."""

    def _refuses(self, *_: object) -> Any:
        raise check.unroll_compiled_step()

    @classmethod
    def __torch_function__(cls, *_: object) -> Any:
        raise check.unroll_compiled_step()

    __index__ = __int__ = __float__ = __bool__ = __str__ = __hash__ = __neg__ = __array__ = _refuses
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = __rpow__ = _refuses
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuses
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuses
    __and__ = __rand__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __divmod__ = _refuses


_TAGS = {
    torch.Tag.nondeterministic_seeded: "draws random numbers",
    torch.Tag.data_dependent_output: "reads a number from a tensor",
    torch.Tag.dynamic_output_shape: "has a result whose shape depends on numbers",
}
SMALL = 2**15
"""Fused losses of no more logits than this are written out."""
_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}


class _NoRandomOps(TorchDispatchMode):
    """Refuses operations that a trace would not repeat."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tag, does in _TAGS.items():
            if tag in function.tags and not _plain_index(function, args):
                raise check.unroll_compiled_operation(str(function), does)
        return function(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Refuses what reads the numbers of a tensor past the dispatcher, and writes small fused losses out.

    A call of the fused op costs more than all of the arithmetic of a small one, which the compiler fuses with
    what is around it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.l2t.value.default and args[0].numel() <= SMALL:
            logits, target, *_, ignore_index, groups, _, _, _ = args
            there = (target >= 0) & (target < groups * logits.shape[1]) | (target == ignore_index)
            torch._assert_async(there.all(), check.unroll_compiled_target())
            loss = reference.losses(*args[:-1])
            return loss, loss.new_zeros(len(args[0]), 3), loss.new_zeros(0)
        if function in _READS:
            raise check.unroll_compiled_operation(
                f"Tensor.{function.__name__}", _TAGS[torch.Tag.data_dependent_output]
            )
        return function(*args, **(kwargs or {}))


def _plain_index(function: Any, args: Any) -> bool:
    """Whether this is an index by numbers, whose result has their shape."""
    masks = (torch.bool, torch.uint8)
    return function is torch.ops.aten.index.Tensor and not any(
        x is not None and x.dtype in masks for x in args[1]
    )


def _traced(function: Callable[..., list[Tensor]], arguments: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The graph of a function of these arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def watched(*flat: Tensor) -> list[Tensor]:
        with _NoRandomOps(), _Functions():
            return function(*flat)

    with torch.enable_grad():
        return make_fx(watched)(*arguments)


_STEP = "l2t step"


def _mark_step() -> None:
    """Marks what has been traced so far."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is not None:
        for node in mode.tracer.graph.nodes:
            node.meta[_STEP] = True


def _cut(
    both: torch.fx.GraphModule, count: int
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, list[int]]:
    """The step, of the first so many arguments, and its reverse, of what is kept and the other arguments; and
    what is kept, by its place among arguments and results of the step.

    Views, and what depends on nothing, are made again rather than kept.
    """
    nodes = list(both.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"]
    first, others = arguments[:count], arguments[count:]
    inside = [node for node in nodes if node.op in ("call_function", "get_attr")]
    results = list(nodes[-1].args[0])
    kept: dict[torch.fx.Node, int] = {}
    again: set[torch.fx.Node] = set()

    def need(node: torch.fx.Node) -> None:
        if node in kept or node in again or node in others:
            return
        if node in first:
            kept[node] = first.index(node)
        elif _is_view(node) or not node.all_input_nodes:
            again.add(node)
            for source in node.all_input_nodes:
                need(source)
        else:
            if node not in results:
                results.append(node)
            kept[node] = count + results.index(node)

    late = [node for node in inside if _STEP not in node.meta]
    for node in late:
        for source in node.all_input_nodes:
            if source.op == "placeholder" or _STEP in source.meta:
                need(source)

    def part(
        inputs: Sequence[torch.fx.Node], body: Sequence[torch.fx.Node], out: Sequence[torch.fx.Node]
    ) -> Any:
        graph, copies = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
        for node in [*inputs, *body]:
            copies[node] = (
                graph.placeholder(node.name) if node in inputs else graph.node_copy(node, copies.__getitem__)
            )
        graph.output([copies[node] for node in out])
        return torch.fx.GraphModule(both, graph)

    step = part(first, [node for node in inside if _STEP in node.meta], results)
    reverse = part([*kept, *others], [node for node in inside if node in again or _STEP not in node.meta], [])
    return step, reverse, list(kept.values())


def _is_view(node: torch.fx.Node) -> bool:
    """Whether a node of a graph has no memory of its own."""
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _compiled(graph: torch.fx.GraphModule, arguments: Sequence[Tensor]) -> _Function:
    """Compiles a graph for these arguments."""
    # What the loss sees beside its arguments becomes an argument, or its numbers would be those of now.
    beside: list[Tensor] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    places: dict[str, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in places:
            beside.append(getattr(graph, node.target))
            with graph.graph.inserting_after(last):
                last = places[node.target] = graph.graph.placeholder(f"beside_{len(beside)}")
        node.replace_all_uses_with(places[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    with torch.no_grad():
        examples = [x.detach().contiguous() for x in (*arguments, *beside)]
        run = BACKEND(graph, examples)
        run(*examples)  # it is compiled now at the latest
    return _Function(run, beside)


def _inductor(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    from torch._inductor import compile as inductor

    options = {
        # Several threads would add to one place in any order (the gradient of an index), with other bits each
        # time.
        "cpp.threads": 1,
        # Changed layouts of convolutions have max-pooling's gradient read before it is written (torch 2.13).
        "layout_optimization": False,
    }
    return cast("Callable[..., Sequence[Tensor]]", inductor(graph, [*examples], options))


BACKEND = _inductor


MOST = 8
"""Codes that are kept of a student."""


def _held(loss: Any, module: nn.Module) -> dict[tuple[Any, ...], Any]:
    """The plain numbers and texts that a loss and the student's modules hold, which a trace freezes, by where
    they are: in attributes, closures, defaults, arguments of a partial, the globals that the code names; and
    in objects and functions that are found there.
    """
    found: dict[tuple[Any, ...], Any] = {}

    def look(x: Any, place: tuple[Any, ...], levels: int, above: tuple[int, ...] = ()) -> None:
        if x is None or isinstance(x, (numbers.Number, str, bytes)):
            found[place] = type(x), x  # True is 1 otherwise
        elif id(x) in above or isinstance(x, (Tensor, types.ModuleType)):
            return
        elif isinstance(x, (list, tuple, dict)):
            for key, inner in x.items() if isinstance(x, dict) else enumerate(x):
                look(inner, (*place, key if _is_plain(key) else id(key)), levels, (*above, id(x)))
        elif levels:
            for key, inner, own in _members(x):
                look(inner, (*place, key), levels - (not own), (*above, id(x)))

    look(loss, ("loss",), 2)
    look(module, ("student",), 2)
    return found


def _members(x: Any) -> Iterator[tuple[Any, Any, bool]]:
    """What an object or a function holds: a name, the thing, and whether it stands for the object itself."""
    if isinstance(x, functools.partial):
        yield from (("func", x.func, True), ("args", x.args, False), ("keywords", x.keywords, False))
    elif isinstance(x, types.MethodType):
        yield from (("self", x.__self__, True), ("func", x.__func__, True))
    elif isinstance(x, types.FunctionType):
        yield from (("defaults", x.__defaults__, False), ("kwdefaults", x.__kwdefaults__, False))
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # nothing is in it yet
                yield name, cell.cell_contents, False
        names = _names(x.__code__)
        for name in sorted(names & x.__globals__.keys()):
            thing = x.__globals__[name]
            if isinstance(thing, types.ModuleType):
                there = vars(thing)
                plain = {key: there[key] for key in sorted(names & there.keys()) if _is_plain(there[key])}
                yield name, plain, False
            else:
                yield name, thing, False
    elif isinstance(x, nn.Module):
        for name, part in x.named_modules():
            apart = ("_parameters", "_buffers", "_modules")
            yield name, {key: own for key, own in vars(part).items() if key not in apart}, False
            yield (name, "class"), _of_class(type(part)), False
            yield (name, "forward"), type(part).forward, False
    elif isinstance(x, type):
        yield "class", _of_class(x), False
    else:
        yield "attributes", getattr(x, "__dict__", {}), False
        yield "class", _of_class(type(x)), False
        call = inspect.getattr_static(type(x), "__call__", None)
        if isinstance(call, types.FunctionType):
            yield "call", call, True


def _is_plain(x: object) -> bool:
    return isinstance(x, (numbers.Number, str))


def _of_class(kind: type) -> dict[str, Any]:
    """The plain attributes of a class."""
    every = {name: x for part in reversed(kind.__mro__) for name, x in vars(part).items()}
    return {name: x for name, x in every.items() if _is_plain(x) and not name.startswith("__")}


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function, and in those inside it."""
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


class _Key:
    """What code is kept for, held weakly once it is kept."""

    def __init__(self, loss: Any, meta: Sequence[Any], rest: object) -> None:
        self.loss, self.meta, self.rest = loss, meta, rest

    def weak(self) -> _Key:
        """The same without keeping loss and meta tensors alive."""
        bound = hasattr(self.loss, "__self__") and hasattr(self.loss, "__func__")
        loss = weakref.WeakMethod(self.loss) if bound else weakref.ref(self.loss)
        return _Key(loss, [weakref.ref(x) for x in self.meta], self.rest)

    @property
    def alive(self) -> bool:
        """Of a weak one: whether all is still there."""
        return all(ref() is not None for ref in [self.loss, *self.meta])

    def matches(self, other: _Key) -> bool:
        """Of a weak one: whether this is it."""
        mine = [ref() for ref in self.meta]
        same = len(mine) == len(other.meta) and all(x is y for x, y in zip(mine, other.meta, strict=True))
        return same and self.loss() == other.loss and self.rest == other.rest


_KEPT: weakref.WeakKeyDictionary[nn.Module, list[tuple[_Key, _Code]]] = weakref.WeakKeyDictionary()
