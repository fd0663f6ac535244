"""The states of a run between its steps: where they are kept, and whether one comes again as it was.

Docs: section 6 of docs/math.md. :class:`States` keeps them as they are, in host memory or on disk, until the
plan of l2t/schedule.py forgets them; what comes back has the layout of what was kept, so that the same
kernels give the same bits. :class:`Fingerprints` tells a state that is reached again from the one that was
there, by the bytes of each tensor, and names the first one that differs.

On disk each state is a file of safetensors in a folder of the run, written by one thread beside the run and
read through memory maps. The folder goes with the run, however that ends; what a killed process has left is
told by its lock, which the system released, and removed by the next run that writes there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from l2t import check
from l2t.schedule import WRITING, Action
from l2t.tape import State, Student, strided_parts

__all__ = ["Fingerprints", "States", "fingerprint"]

_FOLDER = "l2t-states-"


class States:
    """The states that a run remembers, by the step that follows them.

    Args:
        narrows: whether numbers are kept as bfloat16, and come back rounded.
        directory: where the folder of a run is made; None for the system's temporary files.
    """

    def __init__(self, narrows: bool = False, directory: str | os.PathLike[str] | None = None) -> None:
        self.narrows, self.directory = narrows, directory
        self._kept: dict[int, State | _Packed] = {}
        self._disk: _Disk | None = None

    def open(self, size: int) -> None:
        """Makes the folder for so many bytes."""
        self._disk = _Disk(self.directory)
        check.states_room(size, shutil.disk_usage(self._disk.folder).free, self._disk.folder)

    def keep(self, t: int, state: State, action: Action, lent: Collection[int] | None = None) -> None:
        """Keeps the state before step t where the action says.

        Buffers at the places ``lent`` are kept as they are: all states share them, and the first step to
        write one has another value in it for a time, which a writer beside the run must not see.
        """
        if action is Action.STORE and not self.narrows:
            self._kept[t] = state
            return
        packed = _pack(state, self.narrows, action is not Action.STORE, lent or ())
        if action is Action.TO_DISK:
            assert self._disk is not None
            self._disk.write(t, packed.tensors or ())
            packed = packed._replace(tensors=None)
        self._kept[t] = packed

    def back(self, t: int) -> State:
        """The state before step t, with leaves of its own."""
        kept = self._kept[t]
        if isinstance(kept, State):
            return kept.again()
        if kept.tensors is None:
            assert self._disk is not None
            with self._disk.read(t) as tensors:
                return _unpack(kept, tensors)
        return _unpack(kept, kept.tensors)

    def drop(self, t: int) -> None:
        """Forgets the state before step t."""
        kept = self._kept.pop(t)
        if not isinstance(kept, State) and kept.tensors is None:
            assert self._disk is not None
            self._disk.drop(t)

    def close(self) -> None:
        """Forgets all and removes the folder."""
        self._kept.clear()
        if self._disk is not None:
            self._disk.close()


class _Form(NamedTuple):
    """What a tensor was before it was packed."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _At(NamedTuple):
    """Stands for the tensor of this number."""

    number: int


class _Packed(NamedTuple):
    """A state whose tensors are elsewhere, each once: tied ones stay tied."""

    tensors: Sequence[Tensor] | None
    forms: list[_Form]
    weights: list[_At]
    slots: list[tuple[Any, ...]]
    buffers: list[_At | Tensor]


def _pack(state: State, narrows: bool, to_host: bool, lent: Collection[int]) -> _Packed:
    tensors: list[Tensor] = []
    forms: list[_Form] = []
    places: dict[int, _At] = {}

    def put(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:  # sparse ones stay as they are
            return x
        if id(x) not in places:
            places[id(x)] = _At(len(tensors))
            strides = (x if x.is_contiguous() else torch.empty_like(x)).stride()  # as of a clone
            forms.append(_Form(x.shape, strides, x.dtype, x.device))
            narrow = narrows and x.is_floating_point() and x.element_size() > 2
            x = x.detach().to("cpu" if to_host else x.device, torch.bfloat16 if narrow else x.dtype)
            tensors.append(x)
            return _At(len(tensors) - 1)
        return places[id(x)]

    weights = [put(w) for w in state.weights]
    slots = [tuple(map(put, slot)) for slot in state.slots]
    buffers = [b if i in lent else put(b) for i, b in enumerate(state.buffers)]
    return _Packed(tensors, forms, weights, slots, buffers)


def _unpack(packed: _Packed, tensors: Sequence[Tensor]) -> State:
    # Into fresh memory, aligned as any tensor's is: kernels may go by it.
    made = [torch.empty_strided(x.shape, x.strides, dtype=x.dtype, device=x.device) for x in packed.forms]
    for x, kept in zip(made, tensors, strict=True):
        (torch.view_as_real(x) if x.is_complex() and not kept.is_complex() else x).copy_(kept)

    def get(x: Any) -> Any:
        return made[x.number] if isinstance(x, _At) else x

    weights = [get(w).requires_grad_() for w in packed.weights]
    return State(weights, [tuple(map(get, slot)) for slot in packed.slots], [get(b) for b in packed.buffers])


class _Disk:
    """A folder of states, written one after another beside the run."""

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        # Absolute, since the process may go elsewhere before the walk back.
        where = Path(tempfile.gettempdir() if directory is None else directory).absolute()
        try:
            _remove_stale(where)
            # It has its name when it has its lock, so that no other process takes it for a stale one.
            new = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}", dir=where))
            lock = os.open(new / "lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.folder = new.rename(where / new.name[1:])
        except OSError as error:
            raise check.states_directory(where, error) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="l2t-states")
        self._writes: dict[int, Future[None]] = {}
        self._pending: list[Future[None]] = []
        self.close = weakref.finalize(self, _remove, self._writer, self.folder, lock, os.getpid())

    def _file(self, t: int) -> Path:
        return self.folder / f"{t}.safetensors"

    def write(self, t: int, tensors: Sequence[Tensor]) -> None:
        """Writes in the background; waits while others are still to be written, and raises what they met."""
        self._pending = [write for write in self._pending if not write.done() or write.result()]
        if len(self._pending) == WRITING:
            self._pending.pop(0).result()
        self._writes[t] = self._writer.submit(_write, self._file(t), tensors)
        self._pending.append(self._writes[t])

    @contextlib.contextmanager
    def read(self, t: int) -> Iterator[list[Tensor]]:
        """The tensors as the file has them, in memory maps."""
        self._writes[t].result()
        try:
            with safe_open(self._file(t), framework="pt") as file:
                names = map(str, range(len(file.keys())))
                yield [file.get_tensor(name) for name in names]
        except (OSError, SafetensorError) as error:
            raise check.states_read(self.folder, error) from error

    def drop(self, t: int) -> None:
        self._writes.pop(t).result()
        self._file(t).unlink(missing_ok=True)


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
    seen: set[int] = set()

    def alone(x: Tensor) -> Tensor:
        """The tensor as safetensors asks for it: real, contiguous, sharing no memory with others."""
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        storage = x.untyped_storage()
        whole = x.is_contiguous() and storage.nbytes() == x.nbytes and storage._cdata not in seen
        seen.add(storage._cdata)
        return x if whole else x.clone(memory_format=torch.contiguous_format)

    try:
        save_file({str(i): alone(x) for i, x in enumerate(tensors)}, path)
    except (OSError, SafetensorError) as error:
        raise check.states_write(path.parent, error) from error


def _remove(writer: ThreadPoolExecutor, folder: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:  # in a fork of it
        return
    # Where the writer itself collects the garbage it cannot wait for itself.
    with contextlib.suppress(RuntimeError):
        writer.shutdown(cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _remove_stale(where: Path) -> None:
    """Removes the folders of processes that are no more: whose lock is free."""
    for folder in where.glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            lock = os.open(folder / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


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
        now = {name: fingerprint(x) for name, x in self._named(state)}
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


def fingerprint(x: object) -> bytes:
    """A hash of all bytes, so that 0 and -0, and NaNs of other bits, are told apart."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(x, Tensor):
        found.update(f"{x.dtype} {tuple(x.shape)}".encode())
        for part in strided_parts(x):
            plain = part.cpu().resolve_conj().resolve_neg().contiguous()
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    else:
        found.update(repr(x).encode())
    return found.digest()
