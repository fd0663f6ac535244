"""Students side by side, and the course that every one of them takes.

A :class:`Stack` is S students as one module: their weights are stacked and one vectorised call runs them all.
A course is what a student goes through, whatever its loss: batches drawn from a seed, SGD with momentum and
weight decay, a constant or falling learning rate, and a running record of its state. Taught students and
baselines take exactly the same one, here (:func:`train`) as in the unrolled runs of teach.py
(:class:`Lesson`).

Not here: the losses to compare with (baselines.py) and the reverse pass (run.py).
"""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l2t import check
from l2t.augment import augment
from l2t.functional import LINKS, without_autocast
from l2t.ops import MEAN, arithmetic
from l2t.tape import holders
from l2t.teacher import AnyTeacher, Coefficients, StudentState, Teacher
from l2t.weight_net import WeighedLoss, WeightNet

Make = Callable[[], nn.Module]
"""Makes a fresh student; its start weights come from torch's global generator, seeded for the call."""

Loss = Callable[[Tensor, Tensor, StudentState, int], Tensor]
"""Losses (S,) of S students: of logits (S, B, C), targets (S, B), their state (fields (S,)) and the step."""

DECAYS = ("linear", "constant")

ANSWERS = 1000
"""Answers on dev rows that a trial or a tuning wants at each rate, where it is not told its students."""


class Stack(nn.Module):
    """S students side by side as one module: (S, B, ...) -> (S, B, C).

    Each student is made by ``make`` under its own seed, then their weights and buffers are stacked; the
    module has the parameter names of one student (under ``student.``) and shapes (S, ...). Modules with
    running buffers work, BatchNorm's among them; dropout draws differ between the students. What else a
    module keeps, tensors and numbers in its attributes, lists and dicts, must be the same for every seed.

    Args:
        make: makes a fresh student.
        seeds: one seed a student.

    Raises:
        ValueError: when ``make`` returns something else than an nn.Module, or students of different shapes,
            or with different plain tensors or numbers, or with parameters in a tuple.
        RuntimeError: in forward, when ``torch.vmap`` cannot run the student.

    Example:
        >>> import torch, l2t
        >>> stack = l2t.Stack(lambda: torch.nn.Linear(8, 3), seeds=range(5))
        >>> x, weight = torch.randn(5, 16, 8), torch.ones(5, 16, requires_grad=True)
        >>> stack(x).shape
        torch.Size([5, 16, 3])

        Five runs at once, with the gradient of each student's measure to its own sample weights:

        >>> run = l2t.unroll(stack, [x] * 4, lambda model, batch, step:
        ...                  (weight * model(batch).square().sum(2)).mean(1).sum(),
        ...                  lambda model: model(x).square().mean((1, 2)))
        >>> run.backward()
        >>> run.measure.shape, weight.grad.shape
        (torch.Size([5]), torch.Size([5, 16]))
    """

    def __init__(self, make: Make, seeds: Iterable[int]) -> None:
        super().__init__()
        check.student_is_made(make)
        students = []
        for seed in seeds:
            with seeded(seed):
                student = make()
            check.student_is_module(student)
            students.append(student)
        check.students_count(len(students))
        shapes = [{name: value.shape for name, value in student.state_dict().items()} for student in students]
        check.students_alike(all(shape == shapes[0] for shape in shapes))
        plain, *others = map(_plain_values, students)
        for name, value in plain.items():
            alike = all(_alike(value, other[name]) for other in others if name in other)
            if isinstance(value, Tensor):
                check.students_tensor(name, alike)
            else:
                check.students_number(name, value, alike)
        self.size = len(students)
        self.student = students[0]
        # Where the student's tensors live: (a module's own dict, name in it), tied ones at every place.
        self._places: list[tuple[dict[str, Any], str]] = []
        self._weights: list[tuple[dict[str, Any], str]] = []  # those of parameters
        self._aliases: list[tuple[Any, Any, int]]
        stacked: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied
        index: dict[int, int] = {}
        named = [
            *self.student.named_parameters(remove_duplicate=False),
            *self.student.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in named:
            owner, _, leaf = name.rpartition(".")
            module = self.student.get_submodule(owner)
            place: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            if id(tensor) not in stacked:
                every = torch.stack([_tensor_at(student, name) for student in students]).detach()
                is_parameter = isinstance(tensor, nn.Parameter)
                stacked[id(tensor)] = nn.Parameter(every, tensor.requires_grad) if is_parameter else every
            place[leaf] = stacked[id(tensor)]
            self._places.append((place, leaf))
            if isinstance(tensor, nn.Parameter):
                self._weights.append((place, leaf))
            index.setdefault(id(tensor), len(self._places) - 1)
        # And in plain attributes, lists and dicts of modules: (holder, key in it, which of the places).
        self._aliases = []
        for owner, module in self.student.named_modules():
            for name in vars(module).keys() - OWN:
                for holder, key, i in holders(name, vars(module), index):
                    check.students_place(named[i][0], f"{owner}.{name}".removeprefix("."), holder)
                    # A copy of a module has a dict of its own that is no copy of this one.
                    self._aliases.append((module if holder is vars(module) else holder, key, i))
        self._put([place[name] for place, name in self._places])

    def forward(self, inputs: Tensor) -> Tensor:
        """Run student i on ``inputs[i]``."""
        tensors = [place[name] for place, name in self._places]
        try:
            logits: Tensor = torch.vmap(self._one, randomness="different")(tensors, inputs)
            return logits
        except RuntimeError as error:
            raise check.student_cannot_stack(error) from error
        finally:
            self._put(tensors)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        """Puts the tensors of the student in their places."""
        for (place, name), tensor in zip(self._places, tensors, strict=True):
            place[name] = tensor
        for holder, key, i in self._aliases:
            (vars(holder) if isinstance(holder, nn.Module) else holder)[key] = tensors[i]

    @contextlib.contextmanager
    def perturbed(self, share: float, seed: int) -> Iterator[None]:
        """Run the body with every weight tensor of a student moved along a random direction, this share of
        its length; a share of 0 moves nothing. What the body makes is differentiable to the weights.

        Example:
            >>> import torch, l2t
            >>> stack, x = l2t.Stack(lambda: torch.nn.Linear(8, 3), seeds=range(2)), torch.ones(2, 4, 8)
            >>> with stack.perturbed(0.1, seed=0):
            ...     moved = stack(x)
            >>> torch.equal(moved, stack(x)), moved.requires_grad
            (False, True)
        """
        generator = torch.Generator().manual_seed(seed)
        before = [place[name] for place, name in self._weights]
        moved: dict[int, Tensor] = {}  # by identity, so that tied weights move alike
        for tensor in before if share else ():
            if id(tensor) not in moved:
                way = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
                length = tensor.flatten(1).square().mean(1).clamp_min(torch.finfo(tensor.dtype).tiny).sqrt()
                moved[id(tensor)] = tensor + share * length.reshape(-1, *[1] * (tensor.dim() - 1)) * way
        try:
            for (place, name), tensor in zip(self._weights, before, strict=True):
                place[name] = moved.get(id(tensor), tensor)
            yield
        finally:
            for (place, name), tensor in zip(self._weights, before, strict=True):
                place[name] = tensor

    def _one(self, tensors: list[Tensor], inputs: Tensor) -> Tensor:
        # What functional_call does, without its walk through the module at every step.
        self._put(tensors)
        logits: Tensor = self.student(inputs)
        for (place, name), tensor in zip(self._places, tensors, strict=True):
            check.student_keeps_buffer(name, place.get(name) is tensor)
        return logits


OWN = frozenset(vars(nn.Module()))
"""What PyTorch keeps in every module."""


def _plain_values(module: nn.Module) -> dict[str, Tensor | numbers.Number]:
    """Attributes that are tensors but no parameters or buffers, or numbers, and those in their lists, tuples
    and dicts; less what hooks make before each call.
    """
    own = {id(x) for x in [*module.parameters(), *module.buffers()]}
    found: dict[str, Tensor | numbers.Number] = {}

    def look(x: Any, name: str, above: tuple[int, ...] = ()) -> None:
        if isinstance(x, (Tensor, numbers.Number)):
            if id(x) not in own:
                found[name] = x
        elif isinstance(x, (list, tuple, dict)) and id(x) not in above:
            for key, inner in x.items() if isinstance(x, dict) else enumerate(x):
                look(inner, f"{name}[{key!r}]", (*above, id(x)))

    for owner, part in module.named_modules():
        if not part._forward_pre_hooks:
            for name in vars(part).keys() - OWN:
                look(vars(part)[name], f"{owner}.{name}".removeprefix("."))
    return found


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other or (one != one and other != other))


def _tensor_at(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


class Pools(NamedTuple):
    """Which rows each of S students learns from and which it is measured on: index tensors (S, N), (S, D)."""

    train: Tensor
    dev: Tensor


def seed_of(*parts: int) -> int:
    """One seed from several numbers, the same on every machine; different parts give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for part in parts:  # the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with PyTorch's default generators, a GPU's too, at ``seed``; afterwards as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def held_rows(count: int, fraction: float, most: int | None = None) -> int:
    """How many of ``count`` rows are for dev: ``fraction``, from one to ``most``."""
    return min(max(1, round(count * fraction)), count - 1, count if most is None else most)


def students_for(rows: int, given: int | None = None) -> int:
    """How many students tell losses apart by ``rows`` dev rows each: those given; else 10, and more where
    rows are few, 100 at most, up to a thousand answers in all.

    Example:
        >>> students_for(2000), students_for(30), students_for(30, given=5)
        (10, 34, 5)
    """
    return given if given is not None else min(max(10, -(-ANSWERS // max(rows, 1))), 100)


def split_pools(count: int, students: int, fraction: float, seed: int, most: int | None = None) -> Pools:
    """A random split of ``count`` rows for each student: ``fraction`` for dev, from one to ``most``."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(students)])
    held = held_rows(count, fraction, most)
    return Pools(order[:, held:], order[:, :held])


def draw_batches(pools: Tensor, steps: int, batch_size: int, seed: int) -> Tensor:
    """Row indices of every batch, (T, S, B): each student walks through its pool in shuffled epochs.

    Args:
        pools: (S, N), the rows that each student learns from.
        steps: number of batches T.
        batch_size: rows a batch B; may be larger than the pool.
        seed: of the shuffles.
    """
    generator = torch.Generator().manual_seed(seed)
    students, size = pools.shape
    epochs = -(-steps * batch_size // size)
    rows = [
        torch.cat([pool[torch.randperm(size, generator=generator)] for _ in range(epochs)]) for pool in pools
    ]
    return torch.stack(rows)[:, : steps * batch_size].reshape(students, steps, batch_size).transpose(0, 1)


class Tracker:
    """The state of S students over their training: running means of cross-entropy and accuracy (decay 0.9).

    States are kept by step, so that a step that is run again (the reverse pass) sees the state it saw first.
    Before the first batch a student counts as one that guesses: loss log C, accuracy 1/C.
    """

    def __init__(self, students: int, num_classes: int, steps: int, like: Tensor) -> None:
        guess = torch.full((students,), 1.0 / num_classes, dtype=like.dtype, device=like.device)
        self.steps = steps
        self.states = [StudentState(torch.zeros_like(guess), -guess.log(), guess)]

    def state(self, step: int) -> StudentState:
        """The state before ``step``."""
        return self.states[step]

    @torch.no_grad()
    def update(self, step: int, logits: Tensor, target: Tensor) -> None:
        """Record what batch ``step`` showed: logits (S, B, C), target (S, B)."""
        if len(self.states) != step + 1:
            return
        before = self.states[step]
        loss = cross_entropy(logits, target)
        accuracy = 1.0 - error(logits, target)
        self.states.append(
            before._replace(
                progress=torch.full_like(loss, (step + 1) / self.steps),
                train_loss=0.9 * before.train_loss + 0.1 * loss,
                train_accuracy=0.9 * before.train_accuracy + 0.1 * accuracy,
            )
        )

    @torch.no_grad()
    def update_dev(self, step: int, stack: Stack, inputs: Tensor, target: Tensor) -> None:
        """Record the dev set's loss and accuracy before ``step``; they hold until the next such record."""
        if len(self.states) == step + 1:
            logits = evaluate(stack, inputs)
            self.states[step] = self.states[step]._replace(
                dev_loss=cross_entropy(logits, target), dev_accuracy=1.0 - error(logits, target)
            )


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of each student in nats: (S, B, C), (S, B) -> (S,)."""
    return -F.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0].mean(-1)


def error(logits: Tensor, target: Tensor) -> Tensor:
    """Share of rows that each student gets wrong: (S, B, C), (S, B) -> (S,)."""
    return (logits.argmax(-1) != target).to(arithmetic(logits.dtype)).mean(-1)


def teacher_beside(teacher: AnyTeacher, like: Tensor) -> AnyTeacher:
    """The teacher where ``like`` lives: itself, or a copy on that device."""
    there = next(teacher.parameters()).device == like.device
    return teacher if there else copy.deepcopy(teacher).to(like.device)


class TaughtLoss:
    """The loss that a teacher gives S students side by side, each in its own state.

    Coefficients enter each step as constants; with ``record`` as leaves that the reverse pass leaves its
    gradients on, and :meth:`gradient` takes all of them through the teacher at once (docs/math.md,
    section 5).

    Args:
        teacher: the teacher.
        record: keep every step's coefficients, for :meth:`gradient`.
    """

    def __init__(self, teacher: Teacher, record: bool = False) -> None:
        self.teacher = teacher
        self.record = record
        self._given: dict[int, tuple[StudentState, list[Tensor]]] = {}  # by step

    def __call__(self, logits: Tensor, target: Tensor, state: StudentState, step: int) -> Tensor:
        """Mean loss of each student, (S,): logits (S, B, C), target (S, B)."""
        if step in self._given:
            leaves = self._given[step][1]
        else:
            with torch.no_grad():
                leaves = self._leaves(self.teacher(state))
            if self.record:
                leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
                self._given[step] = state, leaves
        return self._rows(logits, target, leaves)

    def _leaves(self, coefficients: Coefficients) -> list[Tensor]:
        """The tables that say something: with the identity link a bias does not."""
        weight, bias, scale = coefficients
        assert isinstance(weight, tuple)
        assert bias is not None
        assert scale is not None
        return [*weight, scale] if self.teacher.link == "identity" else [*weight, bias, scale]

    def _rows(self, logits: Tensor, target: Tensor, leaves: list[Tensor]) -> Tensor:
        """What :func:`l2t.dynamic_loss` gives each student, in one call of the op on all of their rows.

        The op takes the tables of several losses one below the other, and class y of the i-th as i C + y.
        """
        students, rows, classes = logits.shape
        first = torch.arange(0, students * classes, classes, device=target.device)[:, None]
        tables = [leaf.reshape(students * classes, *leaf.shape[2:]) for leaf in leaves]
        scale = tables.pop()
        bias = None if self.teacher.link == "identity" else tables.pop()
        weight, left, right = tables if len(tables) == 3 else (tables[0], None, None)
        losses: Tensor = torch.ops.l2t.value.default(
            logits.reshape(students * rows, classes),
            (target + first).reshape(-1),
            weight,
            left,
            right,
            bias,
            scale,
            LINKS.index(self.teacher.link),
            -100,
            students,
            MEAN,
            students,
            False,
        )[0]
        return losses

    def gradient(self) -> Tensor:
        """What the reverse pass left, as a gradient to the teacher's parameters, (S, P): a row a student."""
        with without_autocast(next(self.teacher.parameters())):
            return self._through_teacher()

    def _through_teacher(self) -> Tensor:
        steps = sorted(self._given)
        states = [self._given[step][0] for step in steps]
        students = len(self._given[steps[0]][1][0])
        own = {  # a copy for each student, so that each has its own gradient
            name: value.detach().expand(students, *value.shape).clone().requires_grad_()
            for name, value in self.teacher.named_parameters()
        }
        known = {
            name: torch.stack([getattr(state, name) for state in states], 1)  # [S, T]
            for name in StudentState._fields
            if getattr(states[0], name) is not None
        }

        def one(parameters: dict[str, Tensor], known: dict[str, Tensor]) -> list[Tensor]:
            state = StudentState(*(known.get(name) for name in StudentState._fields))  # type: ignore[arg-type]
            return self._leaves(functional_call(self.teacher, parameters, (state,)))

        leaves = torch.vmap(one)(own, known)  # [S, T, ...] each
        gradients = [
            torch.stack([_gradient(self._given[step][1][index]) for step in steps], 1)
            for index in range(len(leaves))
        ]
        wanted = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
        found = torch.autograd.grad(
            [leaves[index] for index in wanted],
            list(own.values()),
            [gradients[index] for index in wanted],
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([grad.reshape(students, -1) for grad in found], 1)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


GivenLoss = TaughtLoss | WeighedLoss


def taught_loss(teacher: AnyTeacher, record: bool = False) -> GivenLoss:
    """The loss that a teacher gives S students; with ``record`` for a run whose gradient is wanted."""
    if isinstance(teacher, WeightNet):
        return WeighedLoss(teacher, record)
    assert isinstance(teacher, Teacher)
    return TaughtLoss(teacher, record)


class Lesson:
    """One course of a :class:`Stack`: data, batches, loss and state, as the ``loss`` of :func:`l2t.unroll`.

    Args:
        data: inputs (N, ...) and targets (N,), which batches index.
        batches: row indices (T, S, B).
        loss: the losses of the students, (S,).
        num_classes: C.
        dev: inputs (S, D, ...) and targets (S, D) to take the dev features of the state from, when the loss
            wants them; None otherwise.
        augment: what is done to the images of a batch, as in :func:`l2t.augment.augment`; dev rows stay as
            they are.
    """

    def __init__(
        self,
        data: tuple[Tensor, Tensor],
        batches: Tensor,
        loss: Loss,
        num_classes: int,
        dev: tuple[Tensor, Tensor] | None = None,
        augment: str = "none",
    ) -> None:
        self.inputs, self.targets = data
        self.batches = batches
        self.loss = loss
        self.dev, self.augment = dev, augment
        self.dev_every = max(1, len(batches) // 20)
        self.tracker = Tracker(batches.shape[1], num_classes, len(batches), self.inputs)

    def __call__(self, stack: nn.Module, batch: Tensor, step: int) -> Tensor:
        """Sum of the students' losses on row indices ``batch`` (S, B): their runs do not mix."""
        assert isinstance(stack, Stack)
        if self.dev is not None and step % self.dev_every == 0:
            self.tracker.update_dev(step, stack, *self.dev)
        target = self.targets[batch]
        logits = stack(augment(self.inputs[batch], self.augment))
        state = self.tracker.state(step)
        self.tracker.update(step, logits, target)
        losses = self.loss(logits, target, state, step)
        check.students_losses(losses, stack.size)
        return losses.sum()


SIDE_BY_SIDE = 2 << 30
"""Bytes that students who train side by side may take, and what is kept of their dev rows."""


class Cohort(NamedTuple):
    """Some of the students of a run, each at each of some learning rates: as many as train side by side.

    Attributes:
        students: which of them.
        rates: the learning rates.
    """

    students: slice
    rates: tuple[float, ...]

    def lr(self, like: Tensor) -> Tensor:
        """The learning rate of each, rate by rate."""
        each = self.students.stop - self.students.start
        return like.new_tensor(self.rates).repeat_interleave(each)


def side_by_side(make: Make, inputs: Tensor, students: int, rates: Sequence[float]) -> list[Cohort]:
    """All students at all rates in cohorts that fit SIDE_BY_SIDE bytes, rate by rate; small ones in one.

    Args:
        make: makes a student.
        inputs: a batch of it, (B, ...).
        students: how many there are.
        rates: the learning rates, at each of which all of them train.
    """
    most = max(1, SIDE_BY_SIDE // max(1, sum(bytes_of(make, inputs))))
    if most >= students:
        count = most // students
        return [
            Cohort(slice(0, students), tuple(rates[at : at + count])) for at in range(0, len(rates), count)
        ]
    return [
        Cohort(slice(at, min(at + most, students)), (rate,))
        for rate in rates
        for at in range(0, students, most)
    ]


class Bytes(NamedTuple):
    """What a student takes in training: weights, gradients and moments, and what a step keeps for its
    backward.
    """

    own: int
    step: int


def bytes_of(make: Make, inputs: Tensor) -> Bytes:
    """The :class:`Bytes` of a student, of a step on ``inputs`` (B, ...)."""
    with seeded(0):
        student = make().to(inputs.device)
        own = {
            x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in student.state_dict().values()
        }
        kept: dict[int, Tensor] = {}  # alive until they are counted, or one storage would come after another

        def note(x: Tensor) -> Tensor:
            kept[x.untyped_storage()._cdata] = x.detach()
            return x

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            student(inputs.clone())  # of its own: a batch may be a part of all data
    beside = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in own]
    return Bytes(3 * sum(own.values()), sum(beside))


def learning_rates(lr: float | Tensor, steps: int, decay: str) -> list[float | Tensor]:
    """The learning rate of each step: constant, or falling along a line that would reach 0 at ``steps``."""
    if decay == "constant":
        return [lr] * steps
    return [lr * (1.0 - step / steps) for step in range(steps)]


@torch.enable_grad()
def train(
    stack: Stack,
    lesson: Lesson,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    decay: str,
    at: Sequence[int] = (),
    then: Callable[[int], None] | None = None,
) -> None:
    """Train ``stack`` in place through ``lesson`` by SGD with momentum: m <- mu m + g + wd w, w <- w - lr m.

    ``lr`` is one learning rate, or one a student (S,); ``decay`` is as in :class:`l2t.Recipe`.
    ``then(step)`` is called before each step in ``at``; ``len(lesson.batches)`` is the end.
    """
    weights = [weight for weight in stack.parameters() if weight.requires_grad]
    moments = [torch.zeros_like(weight) for weight in weights]
    stops = set(at)
    for step, now in enumerate(learning_rates(lr, len(lesson.batches), decay)):
        if then is not None and step in stops:
            then(step)
        loss = lesson(stack, lesson.batches[step], step)
        grads = torch.autograd.grad(loss, weights, materialize_grads=True)  # zero where one is not used
        with torch.no_grad():
            for weight, moment, grad in zip(weights, moments, grads, strict=True):
                moment.mul_(momentum).add_(grad.add(weight, alpha=weight_decay) if weight_decay else grad)
                rate = now.reshape(-1, *[1] * (weight.dim() - 1)) if isinstance(now, Tensor) else now
                weight.sub_(rate * moment)
    if then is not None and len(lesson.batches) in stops:
        then(len(lesson.batches))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the body with a module in evaluation mode; afterwards each of its parts is in its own again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        module.train(modes[module])
        for part, mode in modes.items():  # such as a BatchNorm that a student keeps frozen
            part.training = mode


def evaluate(stack: Stack, inputs: Tensor, chunk: int = 4096) -> Tensor:
    """Logits (S, D, C) of the students on inputs (S, D, ...), in evaluation mode.

    Differentiable; wrap it in ``torch.no_grad()`` where that is not wanted.

    Args:
        stack: the students; each of their modules is left in the mode it was in.
        inputs: what each runs on; ``inputs.expand(S, ...)`` gives all the same. Where they are of fewer
            students, the next ones run on them again, and only a part at a time is brought together.
        chunk: rows a call, over all students.
    """
    times = [stack.size // len(inputs), *[1] * (inputs.dim() - 1)]
    parts = inputs.split(max(1, chunk // stack.size), 1)
    with evaluating(stack):
        return torch.cat([stack(part.repeat(times) if times[0] > 1 else part) for part in parts], 1)


def evaluate_again(
    stack: Stack,
    inputs: Tensor,
    rows: int,
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Tensor:
    """The logits of :func:`evaluate`, of so many rows a student at a time: the backward runs these again, so
    that it has the graph of no more than them in memory.

    Args:
        stack: the students.
        inputs: (S, D, ...).
        rows: of each student at a time.
        around: makes what every part is run in, the first time and again.
    """

    def one(part: Tensor) -> Tensor:
        with around(), evaluating(stack):
            logits: Tensor = stack(part)
            return logits

    parts = inputs.split(rows, 1)
    return torch.cat(
        [checkpoint(one, part, use_reentrant=False, preserve_rng_state=False) for part in parts], 1
    )


@torch.no_grad()
def judge(stack: Stack, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Error and cross-entropy (S,) of the students on inputs (S, D, ...), targets (S, D): :func:`grade`."""
    return grade(evaluate(stack, inputs), targets)


def grade(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Error and cross-entropy (S,) of logits (S, D, C) at targets (S, D).

    A student whose logits are not finite is wrong everywhere and has an infinite cross-entropy.
    """
    losses = torch.where(_broken(logits), math.inf, cross_entropy(logits, targets))
    return wrong(logits, targets).mean(-1), losses


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where a student is wrong and 0 elsewhere, (S, D): of logits (S, D, C) at targets (S, D).

    A student whose logits are not finite is wrong everywhere.
    """
    return ((logits.argmax(-1) != targets) | _broken(logits)[:, None]).to(arithmetic(logits.dtype))


@torch.no_grad()
def inverse_temperature(logits: Tensor, targets: Tensor) -> Tensor:
    """What each student's logits (S, D, C) are to be multiplied by, (S,), for the least mean cross-entropy.

    Between exp(-4) and exp(4). The derivative to it, the mean of sum_j p_j z_j - z_y, grows with it, so that
    bisection finds its zero. Where logits are not finite, so is nothing that is made of the result.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; docs/math.md, section 7.
    """
    z = logits.double()
    right = z.gather(-1, targets.unsqueeze(-1)).mean((-2, -1))
    low, high = torch.full_like(right, -4.0), torch.full_like(right, 4.0)
    for _ in range(30):
        middle = (low + high) / 2.0
        p = torch.softmax(middle.exp()[:, None, None] * z, -1)
        low_is_less = (p * z).sum(-1).mean(-1) < right
        low, high = torch.where(low_is_less, middle, low), torch.where(low_is_less, high, middle)
    return high.exp().to(logits.dtype)


def calibrated_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (S,) of logits (S, D, C), each student's at its own best temperature.

    The temperature moves with the logits, but where it is best the loss does not move with it: the gradient
    is that at a fixed temperature, and exact.
    """
    return cross_entropy(inverse_temperature(logits, targets)[:, None, None] * logits, targets)


@torch.no_grad()
def calibrated_error(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - p_y of each row, (S, D), each student's at its own best temperature: of logits (S, D, C).

    The expected error of a classifier that draws its answers. It tells students apart by far fewer rows than
    0 or 1 for each does. A student whose logits are not finite is wrong everywhere.
    """
    scaled = inverse_temperature(logits, targets)[:, None, None] * logits
    own = torch.softmax(scaled, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.where(_broken(logits)[:, None], torch.ones_like(own), 1.0 - own)


def _broken(logits: Tensor) -> Tensor:
    """Which students have logits (S, D, C) that are not finite, (S,)."""
    return ~logits.isfinite().flatten(1).all(1)
