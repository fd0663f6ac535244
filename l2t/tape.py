"""What is remembered of a step, and how a student is run at weights that are not its own.

Docs: sections 5 and 6 of docs/math.md. :class:`Student` calls a function with the user's module while given tensors
stand in the places of its parameters and buffers; :class:`Step` holds what the walk back needs of one step;
:class:`Randomness` is the state of the random number generators. When a step is stored and dropped is decided in
l2t/schedule.py, and which derivative is taken of it in l2t/curvature.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from l2t import check
from l2t.optim import Hyper, Tensors

__all__ = ["Randomness", "Step", "Student"]

Result = TypeVar("Result")


class Student:
    """A module and the places in which its trainable parameters and its buffers are kept.

    A parameter or buffer that sits in several places (tied embeddings) is one entry of the lists, bound to all of its
    places. Frozen parameters are left where they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        check.unroll_parameters(len(trained))
        self.names = [name for name, _ in trained]
        self.parameters = [p for _, p in trained]
        index = {id(p): i for i, p in enumerate(self.parameters)}
        self._parameter_places: list[tuple[dict[str, Any], str, int]] = []
        self._buffer_places: list[tuple[dict[str, Any], str]] = []
        self.buffer_names: list[str] = []
        for prefix, part in module.named_modules():
            for name, p in part._parameters.items():
                if id(p) in index:
                    self._parameter_places.append((part._parameters, name, index[id(p)]))
            for name, b in part._buffers.items():
                if b is not None:
                    self._buffer_places.append((part._buffers, name))
                    self.buffer_names.append(f"{prefix}.{name}" if prefix else name)
        self.buffers: list[Tensor] = [place[name] for place, name in self._buffer_places]
        self.cuda_devices = sorted({x.device for x in [*self.parameters, *self.buffers] if x.is_cuda}, key=str)

    def call(
        self, function: Callable[..., Result], weights: Tensors, buffers: list[Tensor], *arguments: object
    ) -> tuple[Result, list[Tensor]]:
        """``function(module, *arguments)`` at these weights and at copies of these buffers, and the buffers after it.

        The module's own tensors are back in their places on return, whatever happened.
        """
        copies: dict[int, Tensor] = {}  # one copy a tensor, so that tied buffers stay tied
        try:
            for place, name, i in self._parameter_places:
                place[name] = weights[i]
            for (place, name), b in zip(self._buffer_places, buffers, strict=True):
                if id(b) not in copies:
                    copies[id(b)] = b.clone()
                place[name] = copies[id(b)]
            result = function(self.module, *arguments)
            after = [place[name] for place, name in self._buffer_places]
        finally:
            for place, name, i in self._parameter_places:
                place[name] = self.parameters[i]
            for (place, name), b in zip(self._buffer_places, self.buffers, strict=True):
                place[name] = b
        check.unroll_buffers(self.buffer_names, after)
        return result, after


class Randomness(NamedTuple):
    """The state of PyTorch's default random number generators."""

    cpu: Tensor
    cuda: list[Tensor]

    @staticmethod
    def now(devices: Sequence[torch.device]) -> Randomness:
        """The present state, on the CPU and on these CUDA devices."""
        return Randomness(torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices])

    def restore(self, devices: Sequence[torch.device]) -> None:
        """Make this state the present one."""
        torch.set_rng_state(self.cpu)
        for state, device in zip(self.cuda, devices, strict=True):
            torch.cuda.set_rng_state(state, device)


@dataclass
class Step:
    """One step of a run: the state before it, what it was taken with, and what it gave.

    ``batch``, ``buffers`` and ``randomness`` are there where the step is to be run again, ``grads`` where its graph is
    kept instead, ``momentum`` where a hypergradient reads it. ``reached`` lists the weights that the loss reaches, None
    for all of them.
    """

    index: int
    hyper: Hyper
    weights: Tensors  # leaves that require a gradient
    momentum: Tensors | None
    batch: object = None
    buffers: list[Tensor] | None = None
    randomness: Randomness | None = None
    loss: Tensor | None = None  # 0-dim, detached
    grads: tuple[Tensor | None, ...] | None = None
    reached: list[int] | None = None
