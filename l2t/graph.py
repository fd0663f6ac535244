"""Walks over autograd graphs: their nodes, who has written these, and the leaves at their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

__all__ = ["Hooked", "foreign", "leaves", "nodes_of"]


def nodes_of(roots: Sequence[Tensor | GradientEdge]) -> Iterator[Any]:
    """Every node of the graphs of these, once."""
    begin = [x.node if isinstance(x, GradientEdge) else x.grad_fn for x in roots]
    stack: list[Any] = [node for node in begin if node is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def foreign(roots: Sequence[Tensor | GradientEdge]) -> bool:
    """Whether the graphs of these hold a derivative that neither PyTorch's core nor l2t has written."""
    return any(
        not vars(type(node))["_forward_cls"].__module__.startswith("l2t.")
        if isinstance(node, torch.autograd.function.BackwardCFunction)
        else node.name().startswith("torch::autograd::CppNode")
        for node in nodes_of(roots)
    )


class Hooked(TorchFunctionMode):
    """Notes whether a tensor is given a hook while this is entered: the graph does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.any |= function is Tensor.register_hook
        return function(*args, **(kwargs or {}))


def leaves(roots: Sequence[Tensor | GradientEdge]) -> list[Tensor]:
    """Every leaf that the graphs of these reach, in the order in which they are found."""
    found = {id(x): x for x in roots if isinstance(x, Tensor) and x.grad_fn is None}
    for node in nodes_of(roots):
        if isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            found.setdefault(id(node.variable), node.variable)
    return list(found.values())
