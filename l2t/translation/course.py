"""The training of one translator by any loss: Adam, a warm-up and a falling rate, checkpoints, the result.

    step k:  batch k of the seed -> hidden -> loss(hidden, head, head_bias, target, state) -> clip -> Adam

The state is that of token_teacher.py's tracker, so a taught loss sees here what it saw while it was taught.
Everything random follows from (seed, step), so a course that was broken off goes on with the same bits from
its last checkpoint: one safetensors file with weights, moments, state and history. Ctrl-C leaves one of the
last whole step. A trained translator is a folder: weights, vocabulary and config.json.

Not here: how losses are taught (windows.py) and compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from l2t import check
from l2t.files import read_json, read_tensors, write_json, write_tensors
from l2t.linear import dynamic_linear_loss
from l2t.students import seed_of, seeded
from l2t.teach import threads
from l2t.teacher import StudentState
from l2t.translation.batches import IGNORE, Batches, Encoded
from l2t.translation.corpus import Corpus
from l2t.translation.decode import translate_ids
from l2t.translation.networks import LSTMTranslator, TransformerTranslator, Translator, first_order
from l2t.translation.scores import fit
from l2t.translation.token_teacher import TokenLoss, TokenTracker
from l2t.translation.vocabulary import Vocabulary
from l2t.weight import LowRank

STUDENTS = ("lstm", "lstm-2", "transformer")
_CHECKPOINT = "checkpoint.safetensors"
_WEIGHTS = "translator.safetensors"
_CONFIG = "config.json"
VOCABULARY = "vocabulary.model"


def rise_and_fall(step: int, steps: int, warmup: int) -> float:
    """The share of the highest learning rate at a step: up over the warm-up, half of all at most, then down.

    Example:
        >>> from l2t.translation.course import rise_and_fall
        >>> [rise_and_fall(step, steps=4, warmup=200) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    rise = rising(steps, warmup)
    if step < rise:
        return (step + 1) / rise
    return (steps - step) / max(1, steps - rise)


def rising(steps: int, warmup: int) -> int:
    """Steps over which the rate rises: a short run has no room for a whole warm-up."""
    return min(warmup, steps // 2)


@dataclasses.dataclass(frozen=True)
class Course:
    """How a translator is trained: numbers and names only, JSON-able.

    Args:
        student: ``"lstm"``, ``"lstm-2"`` (of two layers) or ``"transformer"`` (of two layers).
        steps: batches T.
        lr: rate of Adam at its highest; None is 0.003 for an LSTM and 0.002 for a Transformer.
        warmup: steps over which the rate rises along a line, half of all at most; then it falls along one, to
            zero after the last.
        tokens: budget of padded tokens a batch and side.
        betas: of Adam.
        clip: largest norm of a gradient.
        dropout: of the student.
        dim: size of the student; None is 192 for an LSTM and 128 for a Transformer.
        seed: of start weights, batches and dropout.
        save_every: steps between checkpoints, at which the dev set is looked at.
        threads: torch threads; bits depend on them. None leaves the setting alone.

    Raises:
        ValueError: a setting that makes no sense.

    Example:
        >>> from l2t.translation.course import Course
        >>> course = Course("transformer", steps=1000)
        >>> course.rate(0), course.rate(199), course.rate(999)
        (1e-05, 0.002, 2.5e-06)
    """

    student: str = "lstm"
    steps: int = 5000
    lr: float | None = None
    warmup: int = 200
    tokens: int = 1000
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    dropout: float = 0.1
    dim: int | None = None
    seed: int = 0
    save_every: int = 500
    threads: int | None = 1

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before any work is done."""
        check.known("translation", "student", self.student, STUDENTS)
        for name in ("steps", "tokens", "save_every"):
            check.recipe_count(name, getattr(self, name), 1)
        check.recipe_count("warmup", self.warmup, 0)
        if self.dim is not None:
            check.recipe_count("dim", self.dim, 1)
        check.recipe_number("dropout", self.dropout, 0.0, 1.0)
        if self.threads is not None:
            check.recipe_count("threads", self.threads, 1)
        if self.lr is not None:
            check.recipe_number("lr", self.lr, 0.0, float("inf"), open_low=True)
        check.recipe_number("clip", self.clip, 0.0, float("inf"), open_low=True)
        check.recipe_numbers("betas", self.betas, 2)
        object.__setattr__(self, "betas", tuple(self.betas))
        self.make(5)  # sizes are refused by the networks

    def make(self, vocab: int) -> Translator:
        """A fresh student for ``vocab`` pieces, its start weights from the seed."""
        with seeded(seed_of(self.seed, 1)):
            return self.build(vocab)

    def build(self, vocab: int) -> Translator:
        """The same, its start weights from torch's generator."""
        size = {} if self.dim is None else {"dim": self.dim}
        if self.student == "transformer":
            return TransformerTranslator(vocab, dropout=self.dropout, **size)
        return LSTMTranslator(vocab, layers=1 + (self.student == "lstm-2"), dropout=self.dropout, **size)

    @property
    def top(self) -> float:
        """The learning rate at its highest."""
        return (0.002 if self.student == "transformer" else 0.003) if self.lr is None else self.lr

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.top * rise_and_fall(step, self.steps, self.warmup)

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON-able dict, which ``Course(**...)`` takes back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


# ---- losses that are not taught


def likelihood(
    hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor, state: StudentState
) -> Tensor:
    """Maximum likelihood: the mean cross-entropy of tokens, by :func:`l2t.dynamic_linear_loss`."""
    return dynamic_linear_loss(hidden, head, target, head_bias=head_bias, link="identity")


def label_smoothing(strength: float) -> TokenLoss:
    """Cross-entropy with targets smoothed by ``strength`` towards uniform over the vocabulary.

    Source: Szegedy et al., "Rethinking the Inception architecture" (CVPR 2016).
    """
    check.recipe_number("smoothing", strength, 0.0, 1.0)

    def loss(
        hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor, state: StudentState
    ) -> Tensor:
        weight = LowRank.smoothed(len(head), strength, dtype=hidden.dtype, device=hidden.device)
        return dynamic_linear_loss(hidden, head, target, weight, head_bias=head_bias, link="identity")

    return loss


def focal(gamma: float) -> TokenLoss:
    """``-(1 - p)^gamma log p`` of each token, the mean.

    Source: Lin et al., "Focal loss for dense object detection" (ICCV 2017).
    """
    check.recipe_number("gamma", gamma, 0.0, float("inf"))

    def loss(
        hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor, state: StudentState
    ) -> Tensor:
        logits = F.linear(hidden, head, head_bias).flatten(0, 1)
        own = -F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE, reduction="none")
        counted = (target != IGNORE).flatten()
        least = torch.finfo(own.dtype).tiny  # at p = 1 a power below 1 has no derivative
        return -((-torch.expm1(own)).clamp(min=least) ** gamma * own)[counted].mean()

    return loss


LOSSES: dict[str, TokenLoss] = {
    "maximum-likelihood": likelihood,
    "label-smoothing-0.05": label_smoothing(0.05),
    "label-smoothing-0.1": label_smoothing(0.1),
    "label-smoothing-0.2": label_smoothing(0.2),
    "label-smoothing-0.4": label_smoothing(0.4),
    "label-smoothing-0.8": label_smoothing(0.8),
    "focal-1": focal(1.0),
    "focal-2": focal(2.0),
}
"""Known losses by name."""


# ---- the course


class Trained(NamedTuple):
    """A trained translator.

    Attributes:
        student: in ``eval`` mode.
        vocabulary: of both languages.
        history: a row a look at the dev set: ``step`` (steps taken), ``train_loss`` (running mean),
            ``dev_loss``, ``dev_accuracy`` and ``cpu_seconds``.
        config: ``course``, ``loss``, ``source``, ``target``, and checksums of ``pairs`` and ``vocabulary``.
    """

    student: Translator
    vocabulary: Vocabulary
    history: list[dict[str, float]]
    config: dict[str, Any]

    def translate(self, sentences: list[str], width: int = 1) -> list[str]:
        """Translations of sentences, greedy or by a beam; of an empty one there is nothing to say."""
        check.sentences(sentences)
        said = [text for text in sentences if text.strip()]
        found = iter(self.vocabulary.decode(translate_ids(self.student, self.vocabulary.encode(said), width)))
        return [next(found) if text.strip() else "" for text in sentences]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the folder that :func:`load` reads; the weights, which make it one, last."""
        directory = Path(directory)
        self.vocabulary.save(directory / VOCABULARY)
        about = {"config": self.config, "history": self.history}
        write_json(directory / _CONFIG, about)
        write_tensors(directory / _WEIGHTS, self.student.state_dict(), about)


def load(directory: str | os.PathLike[str]) -> Trained:
    """The translator in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file of it is not what was written.
    """
    directory = Path(directory)
    check.translator_there(directory, all((directory / name).is_file() for name in (_WEIGHTS, VOCABULARY)))
    tensors, about = _read(directory / _WEIGHTS)
    vocabulary = Vocabulary.load(directory / VOCABULARY)
    check.translator_fits(directory, vocabulary.checksum, about["config"]["vocabulary"])
    student = Course(**about["config"]["course"]).make(vocabulary.size)
    student.load_state_dict(tensors)
    return Trained(student.eval(), vocabulary, about["history"], about["config"])


def train(
    corpus: Corpus,
    vocabulary: Vocabulary,
    course: Course | None = None,
    loss: TokenLoss = likelihood,
    *,
    name: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Trained:
    """Trains a fresh translator.

    Args:
        corpus: pairs; the test set is not looked at.
        vocabulary: of the pairs.
        course: how; None is ``Course()``.
        loss: ``loss(hidden, head, head_bias, target, state)``, the mean loss of the tokens of a batch: hidden
            (B, T, D), head (V, D), its bias (V,), target (B, T) with -100 where there is no token, and the
            :class:`l2t.StudentState` before the step.
        name: what the loss is called in ``config``, by which a course in ``directory`` knows it again; None
            is its name in LOSSES.
        directory: where checkpoints and the trained translator go, Ctrl-C's too; None keeps neither.
        resume: go on from the checkpoint there, or return the translator that is finished there.
        progress: show a bar.

    Raises:
        ValueError: the directory holds a course and ``resume`` is not set, or one of other settings, pairs
            or vocabulary; it cannot be written, or a file in it is not whole. A loss that is not in LOSSES
            comes with a directory and without a name.
        check.DivergedError: which is a ValueError: the loss, or that of the dev set, is not finite.

    Example:
        >>> from l2t.translation.corpus import Corpus
        >>> from l2t.translation.course import Course, train
        >>> from l2t.translation.vocabulary import Vocabulary
        >>> pairs = [("ein Haus", "a house"), ("ein Hut", "a hat")]
        >>> corpus = Corpus(pairs, pairs, pairs, "de", "en", {})
        >>> trained = train(corpus, Vocabulary.train(corpus, 24), Course(steps=60, warmup=5, dim=16, lr=0.02),
        ...                 progress=False)
        >>> trained.translate(["ein Hut"])
        ['a hat']
    """
    course = course or Course()
    config = {
        "course": course.to_json(),
        "loss": _name_of(loss, directory is not None) if name is None else name,
        "source": corpus.source,
        "target": corpus.target,
        "pairs": corpus.checksum(),
        "vocabulary": vocabulary.checksum,
    }
    folder = None if directory is None else Path(directory)
    kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    if folder is not None and is_begun(folder):
        check.may_start("translation", folder, resume)
        finished = (folder / _WEIGHTS).is_file()
        kept = _read(folder / (_WEIGHTS if finished else _CHECKPOINT))
        was = kept[1]["config"]
        check.is_the_same("translation", folder, [key for key in config if was.get(key) != config[key]])
        if finished:
            return load(folder)
    if folder is not None:
        _settle(folder, config)
    for split in ("train", "dev"):
        check.corpus_pairs(split, getattr(corpus, split), whole=False)
    pairs, dev = vocabulary.encode_pairs(corpus.train), vocabulary.encode_pairs(corpus.dev)
    with threads(course.threads):
        running = _Running(course, vocabulary.size, pairs, dev, loss)
        if kept is not None:
            running.go_on(*kept)
        bar = tqdm(total=course.steps, initial=running.step, disable=not progress, unit="step")
        try:
            with bar:
                while True:
                    if running.look_is_due():
                        running.look()
                        row = running.history[-1]
                        bar.set_postfix(train=f"{row['train_loss']:.3f}", dev=f"{row['dev_loss']:.3f}")
                        if folder is not None:
                            running.keep(folder / _CHECKPOINT, config)
                    if running.step == course.steps:
                        break
                    running.take()
                    bar.update()
        except KeyboardInterrupt:
            if folder is not None and running.step:
                running.keep(folder / _CHECKPOINT, config)
            raise
    trained = Trained(running.student.eval(), vocabulary, running.history, config)
    if folder is not None:
        trained.save(folder)
        (folder / _CHECKPOINT).unlink(missing_ok=True)
    return trained


def _name_of(loss: TokenLoss, kept: bool) -> str:
    """What a loss is called of which nothing is said."""
    known = next((name for name, one in LOSSES.items() if one is loss), None)
    called = str(getattr(loss, "__qualname__", type(loss).__name__))
    check.course_name(called, known is not None or not kept)
    return known or called


def _settle(folder: Path, config: dict[str, Any]) -> None:
    """Write down what is going to be trained, so that a folder that takes nothing is found out at once."""
    teaching = ("checkpoint.json", "families", "teacher.safetensors")
    if any((folder / name).exists() for name in teaching) or _says(folder, "task"):
        check.may_start("translation", folder, False)
    try:
        write_json(folder / _CONFIG, {"config": config, "history": []})
    except OSError as error:
        raise check.folder_takes_nothing("translation", folder, error) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that were written, with what is said of them."""
    try:
        return read_tensors(path)
    except SafetensorError as error:
        raise check.tensors_whole("translation", path, error) from error


def is_begun(directory: Path) -> bool:
    """Whether there is a course in the folder, broken off or finished."""
    return any((directory / name).is_file() for name in (_WEIGHTS, _CHECKPOINT))


def is_settled(directory: Path) -> bool:
    """Whether a folder is that of a course, be it before its first checkpoint."""
    return is_begun(directory) or _says(directory, "config")


def _says(folder: Path, name: str) -> bool:
    """Whether there is an entry of this name in a folder's config.json, if there is one."""
    file = folder / _CONFIG
    return file.is_file() and name in read_json(file)


class _Running:
    """A course between two steps."""

    def __init__(
        self, course: Course, vocab: int, pairs: Encoded, dev: Encoded, loss: Callable[..., Tensor]
    ) -> None:
        self.course, self.dev, self.loss = course, dev, loss
        self.student = course.make(vocab)
        self.names = [name for name, _ in self.student.named_parameters()]
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=1.0, betas=course.betas)
        self.batches = Batches(pairs, course.tokens, seed_of(course.seed, 2))
        self.tracker = TokenTracker(vocab, course.steps)
        self.step, self.history, self._vocab = 0, list[dict[str, float]](), vocab
        self._before, self._began = 0.0, time.process_time()

    def take(self) -> None:
        """One step, whole or not at all."""
        student, step = self.student, self.step
        source, target_in, target = self.batches[step]
        with first_order(), seeded(seed_of(self.course.seed, 3, step)):
            hidden = student(source, target_in)
            value = self.loss(hidden, student.head, student.head_bias, target, self.tracker.state(step))
        check.course_loss(value, step)
        self.optimizer.zero_grad()
        value.backward()
        for weight in student.parameters():
            if weight.grad is None:  # of what the loss does not reach
                weight.grad = torch.zeros_like(weight)
        torch.nn.utils.clip_grad_norm_(student.parameters(), self.course.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.rate(step)
        with _uninterrupted():
            self.tracker.update(step, hidden, student.head, student.head_bias, target)
            self.optimizer.step()
            torch.clear_autocast_cache()  # it holds casts of the weights before
            self.step += 1

    def look_is_due(self) -> bool:
        """Whether the dev set is to be looked at before the next step, or after the last one."""
        looked = self.history[-1]["step"] if self.history else 0
        at_stop = self.step % self.course.save_every == 0 or self.step == self.course.steps
        return at_stop and looked < self.step

    def look(self) -> None:
        """Record what the dev set says."""
        found = fit(self.student, self.dev)
        check.course_finite("dev loss", found.loss, self.step)
        self.history.append(
            {
                "step": self.step,
                "train_loss": float(self.tracker.state(self.step).train_loss),
                "dev_loss": found.loss,
                "dev_accuracy": found.accuracy,
                "cpu_seconds": self._cpu_seconds(),
            }
        )

    def _cpu_seconds(self) -> float:
        return self._before + time.process_time() - self._began

    def keep(self, path: Path, config: dict[str, Any]) -> None:
        """Write a checkpoint."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        for i, name in enumerate(self.names):
            tensors |= {f"{kind}.{name}": value for kind, value in moments[i].items()}
        state = self.tracker.state(self.step)._asdict()
        about = {"config": config, "step": self.step, "history": self.history, "state": state}
        write_tensors(path, tensors, {**about, "cpu_seconds": self._cpu_seconds()})

    def go_on(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Stand where a checkpoint stood."""
        self.step, self.history = about["step"], about["history"]
        self._before = about["cpu_seconds"]
        self.tracker = TokenTracker(self._vocab, self.course.steps, self.step, StudentState(**about["state"]))
        self.student.load_state_dict({name: tensors[f"student.{name}"] for name in self.names})
        kinds = ("step", "exp_avg", "exp_avg_sq")
        moments = {i: {k: tensors[f"{k}.{name}"] for k in kinds} for i, name in enumerate(self.names)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C in the block raises after it; so does SIGTERM in a process that takes it for Ctrl-C."""
    came: list[int] = []
    kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(kind))]
    if threading.current_thread() is not threading.main_thread():
        kinds = []  # signals are the main thread's
    before = {kind: signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if came:
            signal.raise_signal(came[0])
