"""What a run's states and steps take in memory, what of it is free, and the schedule that fits.

Docs: section 6 of docs/math.md. Sizes are read off the first step before the run: a state by its tensors, a
step that keeps its graph by trying it twice. Which plans there are is in l2t/schedule.py.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from l2t import check
from l2t.anchors import anchored, reads_weights
from l2t.compiled import Compiled
from l2t.curvature import Curvature, gradient
from l2t.optim import Slot
from l2t.schedule import Schedule, Segments, StoreAll, TwoLevel, fit, fit_outside
from l2t.tape import Randomness, Roots, State, Student, strided_parts

__all__ = ["Sizes", "choose", "free_memory", "sizes", "state_bytes", "tensors_of"]

# Of a container's memory what it may take, what it has, and what of that are copies of files that are given
# back when they are needed, in the two versions of control groups.
_CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


class Sizes(NamedTuple):
    """Bytes of a state that is remembered, and of a step that is taped."""

    state: int
    step: int


def choose(schedule: str, steps: int, memory: int | None, measured: Callable[[], Sizes]) -> Schedule:
    """The schedule of a name for so many steps and this memory. Sizes are asked for where they matter."""
    if schedule == "all" or (schedule == "auto" and memory is None):
        return StoreAll()
    if schedule == "every" or (schedule == "disk" and memory is None):
        length = max(math.isqrt(steps), 1)
        return Segments(length) if schedule == "every" else TwoLevel(length)
    assert memory is not None
    size = measured()
    if schedule == "auto":
        return fit(steps, size.state, size.step, memory).schedule
    if schedule == "disk":
        return fit_outside(steps, size.state, size.step, memory)
    least = size.step + (size.state if steps > 1 else 0)  # from which steps are taken again
    check.schedule_memory(memory, least)
    return Segments(1, (memory - least) // max(size.state, 1))


def sizes(
    student: Student,
    loss: Callable[..., Tensor],
    batches: tuple[Any, Any],
    state: State,
    curvature: Curvature,
    reads: bool,
    narrows: bool = False,
    micro_batches: int = 1,
    anchors: bool = False,
) -> Sizes:
    """Sizes from the first step.

    Args:
        student: the student.
        loss: the loss of a step.
        batches: the first batch, asked for twice: what is made on demand counts as kept.
        state: the state before the first step.
        curvature: what decides on what a step keeps.
        reads: whether the optimiser's transpose reads weights, slots and gradients.
        narrows: whether states are kept as bfloat16.
        micro_batches: how many a batch is a sequence of; the first one stands for all.
        anchors: whether the graph alone is to keep the weights, where it can.
    """
    slots = tensors_of(state.slots)
    step_bytes = _bytes([*state.weights, *state.buffers, *(slots if reads else ())])
    gradients: int = curvature.keeps_gradient(reads)
    compiled = curvature if isinstance(curvature, Compiled) else None
    if compiled is not None or not curvature.keeps_graph:
        step_bytes += _own_bytes(*batches)
    if micro_batches > 1:
        one, other = (check.unroll_micro_batches(x, micro_batches, 0)[0] for x in batches)
        batches = one, other
        gradients = reads + micro_batches * curvature.keeps_gradient(False)
    step_bytes += _bytes(state.weights) * gradients + _bytes(state.buffers) * (micro_batches - 1)
    if curvature.keeps_graph and compiled is not None:
        of_code = compiled.kept_bytes(state.weights, state.buffers, batches[0], anchors)
        step_bytes += micro_batches * of_code - anchors * _bytes(state.weights)
    elif curvature.keeps_graph:
        of_graph = _graph_bytes(student, loss, batches, state, anchors)
        if of_graph is None:
            anchors, of_graph = False, _graph_bytes(student, loss, batches, state, False)
            assert of_graph is not None
        step_bytes += micro_batches * of_graph - anchors * _bytes(state.weights)
    return Sizes(state_bytes(state, narrows), step_bytes)


def state_bytes(state: State, narrows: bool = False) -> int:
    """Bytes of a state that is remembered."""
    return _bytes([*state.weights, *tensors_of(state.slots), *state.buffers], narrows)


def _graph_bytes(
    student: Student, loss: Callable[..., Tensor], batches: tuple[Any, Any], state: State, anchors: bool
) -> int | None:
    """What the graph of a step keeps alive: what a second one of the same step adds.

    None where it cannot be the only one to keep the weights.
    """
    saved: list[list[weakref.ref[Tensor]]] = []
    kept = []
    randomness = Randomness.now(student.cuda_devices)
    for batch in batches:
        saved.append([])

        def note(x: Tensor) -> Tensor:
            x = x.detach()  # an output that is returned as it is would hold its own graph for ever
            saved[-1].append(weakref.ref(x))
            return x

        leaves, weights = anchored(state.weights) if anchors else (state.weights, state.weights)
        student.bind(weights, state.buffers)
        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                # No name for the loss, or the last one's graph would be there when all is counted.
                kept.append(
                    gradient(check.unroll_loss(student.call(loss, leaves, weights, batch, 0), 0), weights)
                )
        except Exception:
            if anchors:
                return None
            raise
        finally:
            student.release()
            randomness.restore(student.cuda_devices)
        if anchors and reads_weights(student, Roots.of(kept[-1]).edges, state.buffers):
            return None
    first, second = ({x._cdata: x.nbytes() for x in _storages(refs)} for refs in saved)
    return sum(size for at, size in second.items() if at not in first)


def _own_bytes(one: Any, other: Any) -> int:
    """Bytes of the tensors of a batch that are not those of the same batch read before."""
    first, second = (
        {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(batch) if _is_plain(x)}
        for batch in (one, other)
    )
    return sum(size for at, size in second.items() if at not in first)


def _is_plain(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided


def _storages(refs: Sequence[weakref.ref[Tensor]]) -> list[torch.UntypedStorage]:
    """Of the tensors that are alive: graphs of which nothing is left have freed theirs."""
    alive = [x for ref in refs if (x := ref()) is not None]
    return [part.untyped_storage() for x in alive for part in strided_parts(x)]


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that are free where tensors of a device live, within what a container may take; None where the
    system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        available = re.search(r"MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text())
        found = [1024 * int(available[1])] if available else []
        groups = root / "sys/fs/cgroup"
        for limit, taken, parts, name in _CONTAINER:
            if (groups / limit).exists() and (most := (groups / limit).read_text().strip()) != "max":
                text = (groups / parts).read_text() if (groups / parts).exists() else ""
                files = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
                used = int((groups / taken).read_text()) - (int(files[1]) if files else 0)
                found.append(int(most) - used)
        return max(0, min(found)) if found else None
    except (OSError, ValueError):
        return None


def tensors_of(slots: Sequence[Slot]) -> list[Tensor]:
    """The tensors of an optimiser's slots."""
    return [x for slot in slots for x in slot if isinstance(x, Tensor)]


def _bytes(tensors: Sequence[Tensor], narrows: bool = False) -> int:
    def width(x: Tensor) -> int:
        narrow = narrows and x.is_floating_point() and x.layout is torch.strided
        return min(x.element_size(), 2) if narrow else x.element_size()

    return sum(part.numel() * width(part) for x in tensors for part in strided_parts(x))
