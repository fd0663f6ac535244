"""What is remembered of a step, and how a student is run at weights that are not its own.

Docs: sections 5 and 6 of docs/math.md. :class:`Student` is the user's module, in which given tensors can
stand in the places of its parameters and buffers; :class:`State` is a run between two steps; :class:`Step`
holds what the walk back needs of a step, :class:`Taken` what it needs to take one again;
:class:`Randomness` is the state of the random number generators; :class:`Adjoint` is a vector of the weights'
shape. When a step is stored and dropped is decided in l2t/schedule.py, what is derived from it in
l2t/curvature.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from l2t import check
from l2t.optim import Hyper, Slot, Tensors

__all__ = [
    "Adjoint",
    "Grads",
    "Randomness",
    "Roots",
    "State",
    "Step",
    "Student",
    "Taken",
    "full_precision",
    "holders",
    "modes",
    "strided_parts",
    "versions",
]

Grads = tuple[Tensor | None, ...]

LARGE = 1 << 16
"""Bytes of a buffer from which it is lent: smaller ones, as running statistics are, cost next to nothing."""


class Student:
    """A module and the places in which it keeps its trainable parameters and its buffers.

    A parameter that sits in several places (tied embeddings) is one entry of the list, bound to all of its
    places, plain attributes and lists of a module among them. Frozen parameters are left where they are.
    Modules are in the same mode, train() or eval(), at every binding, whatever the function before it has
    set: in that which they had when this was made.

    Args:
        module: the student.
        meta: the meta tensors, where these are named.

    Attributes:
        still: the places of large buffers that no step has written so far (masks, tables). A binding that
            ``lends`` copies the others only, since each copy may stay in a step's graph.
        went_back: whether the last function that was called has itself called backward().
    """

    def __init__(self, module: nn.Module, meta: Sequence[Tensor] = ()) -> None:
        self.module, self._meta = module, meta
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        index = {id(p): i for i, p in enumerate(self.parameters)}
        self.buffer_names: list[str] = []
        self.buffers: list[Tensor] = []
        self.still: set[int] | None = None  # not known before the first step
        self.went_back = False
        self._parameter_places: list[tuple[Any, Any, int]] = []
        self._buffer_places: list[tuple[dict[str, Any], str]] = []
        self._unset: list[tuple[dict[str, Any], str, str]] = []  # buffers that are None
        self._modes = [(part, part.training) for part in module.modules()]
        self.frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._attributes: list[tuple[dict[str, Any], str]] = []  # that a call of the module may set
        self._bound: list[Tensor] = []  # what stands in the places of buffers since the binding
        self.aliases: list[list[str]] = [[] for _ in trained]  # every name of each, that in names first
        for name, p in module.named_parameters(remove_duplicate=False):
            if id(p) in index:
                self.aliases[index[id(p)]].append(name)
        for part in module.modules():
            for name, own in part._parameters.items():
                if id(own) in index:
                    self._parameter_places.append((part._parameters, name, index[id(own)]))
        known = {(id(place), name) for place, name, _ in self._parameter_places}
        for prefix, part in module.named_modules():
            for name, b in part._buffers.items():
                full = f"{prefix}.{name}" if prefix else name
                if b is None:
                    self._unset.append((part._buffers, name, full))
                else:
                    self._buffer_places.append((part._buffers, name))
                    self.buffer_names.append(full)
                    self.buffers.append(b)
            for name, x in vars(part).items():
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                found = [
                    (holder, key, i)
                    for holder, key, i in holders(name, vars(part), index)
                    if (id(holder), key) not in known  # such as a module's own dict, in a list of places
                ]
                for holder, key, i in found:
                    full = f"{prefix}.{name}" if prefix else name
                    check.unroll_place(self.names[i], full, isinstance(holder, tuple))
                    self._parameter_places.append((holder, key, i))
                # What torch.nn.utils.prune, spectral_norm and weight_norm compute of parameters at each call.
                made = isinstance(x, Tensor) and (x.grad_fn is not None or f"{name}_orig" in part._parameters)
                if found or made:
                    self._attributes.append((vars(part), name))
        self.settle()
        devices = {x.device for x in [*self.parameters, *self.buffers] if x.is_cuda}
        self.cuda_devices = sorted(devices, key=str)

    def bind(self, weights: Tensors, buffers: list[Tensor], *, lends: bool = False) -> None:
        """Puts these weights and copies of these buffers in the module's places, until :meth:`release`.

        Derivatives are taken before that, too: activation checkpoints run the module again in them.
        """
        self._in_modes(self._modes)
        for place, name, i in self._parameter_places:
            place[name] = weights[i]
        if buffers:
            still = self.still if lends and self.still is not None else ()
            copies: dict[int, Tensor] = {}  # one copy a tensor, so that tied buffers stay tied
            self._bound = []
            for i, ((place, name), b) in enumerate(zip(self._buffer_places, buffers, strict=True)):
                if id(b) not in copies:
                    # What is lent shares the memory, and has a version of its own, which tells of a write.
                    copies[id(b)] = b.data if i in still else b.clone()
                place[name] = copies[id(b)]
                self._bound.append(place[name])

    def settle(self) -> None:
        """Takes what stands in the module now, and the mode of its parts, as what is put back in the end.

        Between a run and its walk back the module is the user's, who may give it others.
        """
        places: list[tuple[Any, Any]] = [(place, name) for place, name, _ in self._parameter_places]
        places += [*self._buffer_places, *((place, name) for place, name, _ in self._unset)]
        self._own = [(place, name, _at(place, name)) for place, name in places]
        self._own_modes = [(part, part.training) for part, _ in self._modes]
        self._own_attributes = [(place, name, _at(place, name)) for place, name in self._attributes]

    def release(self) -> None:
        """Puts the module's own parameters and buffers in their places, and the module in its mode."""
        self._in_modes(self._own_modes)
        _put_back(self._own)
        self._bound = []

    def restore(self) -> None:
        """Releases the module, and puts back the plain attributes that its calls have set."""
        self.release()
        _put_back(self._own_attributes)

    @staticmethod
    def _in_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
        for part, training in modes:
            if part.training is not training:
                part.training = training

    def call(
        self, function: Callable[..., Tensor], leaves: Tensors, weights: Tensors, *arguments: object
    ) -> Tensor:
        """What ``function(module, *arguments)`` gives at bound weights, which hang on these leaves.

        The function may call backward() and zero_grad(), and freeze parameters for a time: ``.grad`` and
        ``requires_grad`` of the leaves, and of the meta tensors that are known, are afterwards as before, and
        parameters that were frozen before it are so again. It may not change weights in place, frozen ones
        neither.
        """
        leaves = [*leaves, *self._meta]
        kept = [x.grad for x in leaves]
        for x, grad in zip(leaves, kept, strict=True):
            if grad is not None:
                x.grad = None
        before = [w._version for w in weights]
        frozen = [p._version for p in self.frozen.values()]
        asked = [p for p in self.frozen.values() if p.requires_grad]  # by the caller, since the run
        for p in asked:
            p.requires_grad_(False)
        try:
            value = function(self.module, *arguments)
        finally:
            self.went_back = False
            for x, grad in zip(leaves, kept, strict=True):
                found = x.grad
                if found is not None:
                    self.went_back = True
                if found is not grad:
                    x.grad = grad
                if not x.requires_grad:
                    x.requires_grad_()
            for p in self.frozen.values():
                if p.requires_grad:
                    p.requires_grad_(False)
            for p in asked:
                p.requires_grad_()
        for name, w, version in zip(self.names, weights, before, strict=True):
            check.unroll_in_place(name, w._version != version)
        for (name, p), version in zip(self.frozen.items(), frozen, strict=True):
            check.unroll_frozen_in_place(name, p._version != version)
        return value

    def buffers_after(self, before: Sequence[Tensor]) -> list[Tensor]:
        """The buffers as they stand in the module now; of those that were lent, the ones bound from."""
        for place, name, full in self._unset:
            check.unroll_buffer_appears(full, place[name] is not None)
        present = [place[name] for place, name in self._buffer_places]
        if present:
            check.unroll_buffers(self.buffer_names, present)
        if self.still is None:  # after the first step
            plain = [i for i, b in enumerate(before) if b.layout is torch.strided and b.nbytes >= LARGE]
            large = {i for i in plain if present[i] is self._bound[i]}
            self.still = {i for i in large if torch.equal(present[i], before[i])}
        self.still.difference_update([i for i in self.still if present[i] is not self._bound[i]])
        return [before[i] if i in self.still else x for i, x in enumerate(present)]

    def takes_back(self) -> bool:
        """Whether a lent buffer was written: then it is as before again, and lent no more."""
        if not self.still:
            return False
        written = [i for i in self.still if self._bound[i]._version]
        for i in written:
            self._bound[i].copy_(self.buffers[i])  # as it was at the start, since nobody wrote it before
        self.still.difference_update(written)
        return bool(written)

    def check_lent(self, buffers: list[Tensor]) -> None:
        """Raises if one that was lent has been written unseen: batch_norm does not tell."""
        for i in self.still or ():
            same = torch.equal(buffers[i], self.buffers[i])
            check.unroll_buffer_unseen(self.buffer_names[i], not same)


_ABSENT = object()


def _at(place: Any, key: Any) -> Any:
    """What stands at a place."""
    return place.get(key, _ABSENT) if isinstance(place, dict) else place[key]


def _put_back(own: Sequence[tuple[Any, Any, Any]]) -> None:
    for place, key, x in own:
        if x is _ABSENT:
            place.pop(key, None)
        else:
            place[key] = x


def holders(
    key: Any, holder: Any, index: dict[int, int], above: tuple[int, ...] = ()
) -> Iterator[tuple[Any, Any, int]]:
    """Where parameters are kept at a place, and in the lists, dicts and tuples there: holder, key, which."""
    x = holder[key]
    if isinstance(x, Tensor):
        if id(x) in index:
            yield holder, key, index[id(x)]
    elif isinstance(x, (list, tuple, dict)) and id(x) not in above:
        for inner in x if isinstance(x, dict) else range(len(x)):
            yield from holders(inner, x, index, (*above, id(x)))


def strided_parts(x: Tensor) -> list[Tensor]:
    """The tensors that a sparse one consists of; of any other itself."""
    x = x.detach()
    if x.layout is torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return [x]


class Randomness(NamedTuple):
    """The state of PyTorch's default random number generators."""

    cpu: Tensor
    cuda: list[Tensor]

    @staticmethod
    def now(devices: Sequence[torch.device], before: Randomness | None = None) -> Randomness:
        """The present state, of the CPU's and of these CUDA devices' generators.

        It shares the memory of the state ``before`` if nothing was drawn since.
        """
        now = Randomness(torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices])
        if before is not None and all(map(torch.equal, [now.cpu, *now.cuda], [before.cpu, *before.cuda])):
            return before
        return now

    def restore(self, devices: Sequence[torch.device]) -> None:
        """Makes this state the present one."""
        torch.set_rng_state(self.cpu)
        for state, device in zip(self.cuda, devices, strict=True):
            torch.cuda.set_rng_state(state, device)


class Roots(NamedTuple):
    """Where the graph of a step's gradient begins: without the numbers, which nothing reads again.

    ``moving`` are the positions, among the gradients that are there, of those that have a graph; None for
    all. One without a graph is constant: the loss is linear in that weight.
    """

    edges: list[Tensor | GradientEdge]
    moving: list[int] | None

    @staticmethod
    def of(grads: Grads) -> Roots:
        """The roots of a gradient."""
        present = [g for g in grads if g is not None]
        edges = [
            g if g.grad_fn is None else GradientEdge(g.grad_fn, g.output_nr)
            for g in present
            if g.requires_grad
        ]
        if len(edges) == len(present):
            return Roots(edges, None)
        return Roots(edges, [i for i, g in enumerate(present) if g.requires_grad])


def modes() -> Callable[[], contextlib.ExitStack]:
    """The modes of the present that the numbers of a step depend on, as a function that enters them again."""
    autocast = [(x, torch.get_autocast_dtype(x), torch.is_autocast_enabled(x)) for x in _devices()]
    cache = torch.is_autocast_cache_enabled()

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for device, dtype, enabled in autocast:
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=cache))
        return stack

    return enter


def full_precision() -> contextlib.ExitStack:
    """No autocast: derivatives of a loss have the dtypes of what it computed, whatever is entered around."""
    stack = contextlib.ExitStack()
    for device in _devices():
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def versions(batch: object) -> list[int]:
    """How often each tensor of a batch was written in place."""
    tensors = (x for x in tree_leaves(batch) if isinstance(x, Tensor) and not x.is_inference())
    return [x._version for x in tensors]


class State(NamedTuple):
    """A run between two steps."""

    weights: Tensors  # leaves that require a gradient
    slots: Sequence[Slot]  # what the optimiser keeps of each weight
    buffers: list[Tensor]

    def again(self) -> State:
        """The same state with leaves of its own, for another way from here."""
        return self._replace(weights=[w.detach().requires_grad_() for w in self.weights])


class Taken(NamedTuple):
    """What makes a step happen again bit for bit, beside its batch, its settings and the state before it."""

    randomness: Randomness | None
    loss: Tensor  # 0-dim, detached: what it must come to again
    reached: list[int] | None


@dataclass(slots=True)
class Step:
    """One step of a run: the state before it, what it was taken with, and what it gave.

    ``roots`` are there where the step's graph is kept, ``kept`` where compiled code keeps what it reads,
    ``batch`` and ``randomness`` where a step is to be run again instead; ``slots`` and ``grads`` where the
    transpose of the update or a hypergradient reads them; ``grads`` and ``d_others``, the gradient of the
    loss to leaves beside the weights, where a curvature does. ``anchored`` says that the weights are kept by
    the graph alone (l2t/anchors.py), but for ``copies`` where they are read beside it. ``versions`` tells
    whether the batch was written since. ``reached`` lists the weights that the loss reaches, None for all of
    them. A step of several micro-batches has ``parts``, a step each, at the same weights: these hold what a
    curvature reads, and the step itself holds what the transpose of the update reads.
    """

    index: int
    hyper: Hyper
    weights: Tensors  # leaves that require a gradient: the weights, or their anchors
    buffers: list[Tensor]
    slots: Sequence[Slot]
    anchored: bool = False
    copies: Tensors | None = None
    batch: object = None
    versions: Sequence[int] = ()
    randomness: Randomness | None = None
    loss: Tensor | None = None  # 0-dim, detached
    roots: Roots | None = None
    kept: Sequence[Tensor] = ()
    grads: Grads | None = None
    d_others: list[tuple[Tensor, Tensor]] | None = None
    reached: list[int] | None = None
    parts: Sequence[Step] = ()


class Adjoint:
    """A vector of the weights' shape, zero at first: views of few flat tensors, one for each weight."""

    def __init__(self, weights: Tensors) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, w in enumerate(weights):
            groups.setdefault((w.dtype, w.device), []).append(i)
        parts: dict[int, Tensor] = {}
        self.flats: list[Tensor] = []
        for (dtype, device), members in groups.items():
            sizes = [weights[i].numel() for i in members]
            self.flats.append(torch.zeros(sum(sizes), dtype=dtype, device=device))
            for i, piece in zip(members, self.flats[-1].split(sizes), strict=True):
                parts[i] = piece.view(weights[i].shape)
        self.parts = [parts[i] for i in range(len(weights))]

    def norm(self) -> list[Tensor]:
        """The norm of each flat tensor: one number a dtype and device, not one a weight."""
        return [torch.linalg.vector_norm(x) for x in self.flats]
