"""What is remembered of a step, and how a student is run at weights that are not its own.

Docs: sections 5 and 6 of docs/math.md. :class:`Student` is the user's module, in which given tensors can
stand in the places of its parameters and buffers; :class:`Step` holds what the walk back needs of a step;
:class:`Randomness` is the state of the random number generators; :class:`Adjoint` is a vector of the weights'
shape. When a step is stored and dropped is decided in l2t/schedule.py, what is derived from it in
l2t/curvature.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from l2t import check
from l2t.optim import Hyper, Tensors

__all__ = ["Adjoint", "Bound", "Randomness", "Step", "Student"]


class Student:
    """A module and the places in which it keeps its trainable parameters and its buffers.

    A parameter that sits in several places (tied embeddings) is one entry of the list, bound to all of its
    places. Frozen parameters are left where they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        index = {id(p): i for i, p in enumerate(self.parameters)}
        self.buffer_names: list[str] = []
        self.buffers: list[Tensor] = []
        self.parameter_places: list[tuple[dict[str, Any], str, int]] = []
        self.buffer_places: list[tuple[dict[str, Any], str]] = []
        for prefix, part in module.named_modules():
            for name, p in part._parameters.items():
                if id(p) in index:
                    self.parameter_places.append((part._parameters, name, index[id(p)]))
            for name, b in part._buffers.items():
                if b is not None:
                    self.buffer_places.append((part._buffers, name))
                    self.buffer_names.append(f"{prefix}.{name}" if prefix else name)
                    self.buffers.append(b)
        devices = {x.device for x in [*self.parameters, *self.buffers] if x.is_cuda}
        self.cuda_devices = sorted(devices, key=str)

    def at(self, weights: Tensors, buffers: list[Tensor]) -> Bound:
        """A context in which the module has these weights and copies of these buffers, then its own again."""
        return Bound(self, weights, buffers)

    def release(self) -> None:
        """Puts the module's own parameters and buffers in their places."""
        for place, name, i in self.parameter_places:
            place[name] = self.parameters[i]
        for (place, name), b in zip(self.buffer_places, self.buffers, strict=True):
            place[name] = b

    def present_buffers(self) -> list[Tensor]:
        """The buffers as they stand in the module now."""
        present = [place[name] for place, name in self.buffer_places]
        if present:
            check.unroll_buffers(self.buffer_names, present)
        return present


class Bound:
    """What :meth:`Student.at` gives. Derivatives belong inside: checkpoints run the module then."""

    __slots__ = ("_buffers", "_student", "_weights")

    def __init__(self, student: Student, weights: Tensors, buffers: list[Tensor]) -> None:
        self._student, self._weights, self._buffers = student, weights, buffers

    def __enter__(self) -> nn.Module:
        student, weights = self._student, self._weights
        try:
            for place, name, i in student.parameter_places:
                place[name] = weights[i]
            copies: dict[int, Tensor] = {}  # one copy a tensor, so that tied buffers stay tied
            for (place, name), b in zip(student.buffer_places, self._buffers, strict=True):
                if id(b) not in copies:
                    copies[id(b)] = b.clone()
                place[name] = copies[id(b)]
        except BaseException:
            student.release()
            raise
        return student.module

    def __exit__(self, *_: object) -> None:
        self._student.release()


class Randomness(NamedTuple):
    """The state of PyTorch's default random number generators."""

    cpu: Tensor
    cuda: list[Tensor]

    @staticmethod
    def now(devices: Sequence[torch.device]) -> Randomness:
        """The present state, of the CPU's and of these CUDA devices' generators."""
        return Randomness(torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices])

    def restore(self, devices: Sequence[torch.device]) -> None:
        """Makes this state the present one."""
        torch.set_rng_state(self.cpu)
        for state, device in zip(self.cuda, devices, strict=True):
            torch.cuda.set_rng_state(state, device)


@dataclass(slots=True)
class Step:
    """One step of a run: the state before it, what it was taken with, and what it gave.

    ``batch`` and ``randomness`` are there where the step is to be run again, ``grads`` where its graph is
    kept instead, ``momentum`` where a hypergradient reads it. ``reached`` lists the weights that the loss
    reaches, None for all of them.
    """

    index: int
    hyper: Hyper
    weights: Tensors  # leaves that require a gradient
    buffers: list[Tensor]
    momentum: Tensors | None
    batch: object = None
    randomness: Randomness | None = None
    loss: Tensor | None = None  # 0-dim, detached
    grads: tuple[Tensor | None, ...] | None = None
    reached: list[int] | None = None


class Adjoint:
    """A vector of the weights' shape, zero at first: one flat tensor a dtype and device, and its parts.

    ``parts`` are views of ``flats``, one for each weight. Arithmetic on the flats, and on their norm, does
    not cost more for a student of many layers.
    """

    def __init__(self, weights: Tensors) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, w in enumerate(weights):
            groups.setdefault((w.dtype, w.device), []).append(i)
        self.flats: list[Tensor] = []
        self._groups: list[tuple[list[int], list[Tensor]]] = []
        for (dtype, device), members in groups.items():
            sizes = [weights[i].numel() for i in members]
            self.flats.append(torch.zeros(sum(sizes), dtype=dtype, device=device))
            pieces = zip(members, self.flats[-1].split(sizes), strict=True)
            self._groups.append((members, [piece.view(weights[i].shape) for i, piece in pieces]))
        self.parts = self.cut(self.flats)

    def cut(self, flats: Tensors) -> Tensors:
        """Views of other flats like these, one for each weight and of its shape."""
        if len(flats) == 1:
            return cast("Tensors", _unflatten_dense_tensors(flats[0], self._groups[0][1]))
        parts: dict[int, Tensor] = {}
        for flat, (members, like) in zip(flats, self._groups, strict=True):
            parts.update(zip(members, _unflatten_dense_tensors(flat, like), strict=True))
        return [parts[i] for i in range(len(parts))]

    def norm(self) -> list[Tensor]:
        """The norm of each flat."""
        return [torch.linalg.vector_norm(x) for x in self.flats]
