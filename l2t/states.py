"""The states of a run between its steps: whether one comes again as it was.

Docs: section 6 of docs/math.md. :class:`Fingerprints` tells a state that is reached again from the one that
was there, by the bytes of each tensor, and names the first one that differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from l2t import check
from l2t.tape import State, Student

__all__ = ["Fingerprints"]


class Fingerprints:
    """What the states of a run looked like when they came first, and a comparison when they come again.

    Args:
        student: gives weights and buffers their names.
        slot_names: what the optimiser calls the entries of a slot.
        states: which states are compared, by the step that follows them; None: every one.
    """

    def __init__(
        self, student: Student, slot_names: Sequence[str], states: Collection[int] | None = None
    ) -> None:
        self._student, self._slot_names = student, slot_names
        self.states = states
        self._seen: dict[int, dict[str, bytes]] = {}

    def see(self, t: int, state: State) -> None:
        """Remembers the state before step t if it comes for the first time, and else compares it.

        Of a state that is not there as a whole (without slots, or without buffers) that which is.
        """
        if self.states is not None and t not in self.states:
            return
        now = {name: _fingerprint(x) for name, x in self._named(state)}
        before = self._seen.setdefault(t, now)
        check.unroll_state_again(t, next((x for x in now if before.get(x, now[x]) != now[x]), None))

    def _named(self, state: State) -> Iterator[tuple[str, Any]]:
        names = self._student.names
        yield from zip((f"weights {name}" for name in names), state.weights, strict=False)
        for name, slot in zip(names, state.slots, strict=False):
            for i, x in enumerate(slot):
                known = i < len(self._slot_names)
                yield f"{self._slot_names[i] if known else f'optimiser state {i}'} of {name}", x
        buffers = self._student.buffer_names
        yield from zip((f"buffer {name}" for name in buffers), state.buffers, strict=False)


def _fingerprint(x: object) -> bytes:
    """A hash of all bytes, so that 0 and -0, and NaNs of other bits, are told apart."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(x, Tensor):
        found.update(f"{x.dtype} {tuple(x.shape)}".encode())
        plain = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    else:
        found.update(repr(x).encode())
    return found.digest()
