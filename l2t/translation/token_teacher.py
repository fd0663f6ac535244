"""TokenTeacher: the state of a translator in training -> the loss of its tokens (docs/math.md, section 9).

    state -> attention over slots -> raw numbers of each feature of a token
    counts of tokens -> features: hats over the logarithm of the frequency, and the end of a sentence
    raw numbers . features -> emphasis, smoothing strength and smoothing distribution of every token

So a teacher has as many numbers as features, whatever the size of the vocabulary, and a token that another
vocabulary has instead gets the loss of its frequency. The loss itself is l2t.dynamic_linear_loss: a diagonal
and a matrix of rank one.

Not here: how a token teacher learns (windows.py) and how a translator is trained (course.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2t import check
from l2t.linear import dynamic_linear_loss
from l2t.teacher import LINKS, AttentiveTeacher, Coefficients, StudentState, mixed, slope
from l2t.translation.batches import IGNORE
from l2t.weight import LowRank

KINDS = ("shared", "diagonal", "low-rank")
TokenLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, StudentState], Tensor]
"""The mean loss of tokens: of hidden (B, T, D), head (V, D), its bias, targets (B, T) and the state."""

TRACKED = ("progress", "train_loss", "train_accuracy")
"""What a :class:`TokenTracker` knows of a student."""

_TRACKED = 128  # tokens of a batch that a tracker looks at


def token_features(counts: Tensor, hats: int = 6, eos: int = 3) -> Tensor:
    """What a teacher knows of each token of a vocabulary: (V,) counts -> (V, hats + 1) features, float64.

    The first ``hats`` are piecewise linear in log(1 + count), one at each of as many knots from 0 to the most
    frequent token, and sum to 1; the last is 1 for the end of a sentence.

    Example:
        >>> import torch
        >>> token_features(torch.tensor([0, 3, 15, 1]), hats=3, eos=3)
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 1.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    place = torch.log1p(counts.double())
    place = place / place.max() * (hats - 1)
    near = 1.0 - (place[:, None] - torch.arange(hats)).abs()
    end = torch.arange(len(counts))[:, None] == eos
    return torch.cat([near.clamp(min=0.0), end.double()], 1)


class TokenTeacher(AttentiveTeacher):
    """Attention over slots of a loss for the tokens of a vocabulary, by their frequency.

    The loss of a token y is ``-kappa_y phi(sum_j W_yj log p_j + b_y)`` with ``W = diag(d) ((1 - eps_y) I +
    eps_y u)``: smoothed by the strength eps_y towards the distribution u over the vocabulary, and weighed by
    the emphasis kappa_y, whose mean over the tokens of the training set is 1, so that no teacher gains by the
    size of a step. It starts exactly as label smoothing of one strength; with the other links, whose d and b
    are taught, too, as what has its pull at uniform p.

    Works under ``torch.func.functional_call`` and ``torch.vmap``, in float32 and float64.

    Args:
        counts: how often each token occurs among the targets of the training set, (V,), the end of sentences
            included; integers.
        weight: what the teacher sets: ``"shared"``, one strength of smoothing for all tokens (uniform u, no
            emphasis); ``"diagonal"``, an emphasis by frequency at a fixed smoothing; ``"low-rank"``,
            emphasis, strength and distribution by frequency.
        slots: number of slots K; one slot is a static loss.
        link: ``"identity"``, ``"sigmoid"`` or ``"log-sigmoid"``.
        features: which fields of :class:`l2t.StudentState` the teacher sees.
        hats: number of knots over the logarithm of the frequency.
        eos: the token that ends a sentence.
        smoothing: the strength that it starts with, above 0 and below 1.
        smoothing_range: how far the strength's logit may move.
        prior_range: how far the logarithm of u may move from uniform, up to the normalisation.
        emphasis: how far the logarithm of kappa may move, up to the normalisation.
        diagonal_start: d at the start. The default, 1 for the identity link, 0.7 / log V for the sigmoid and
            0.25 / log V for the log-sigmoid, is where the link is close to a line.
        diagonal_range: how far its logarithm may move.
        bias_range: how far b may move.
        seed: of the keys; all other numbers start at zero.
        dtype: of the parameters.

    Raises:
        ValueError: for an unknown name, counts that are none, sizes that make no sense, and "diagonal" with
            an emphasis of 0, under which the identity link would leave nothing to teach.

    Example:
        >>> import torch, l2t
        >>> from l2t.translation.token_teacher import TokenTeacher
        >>> teacher = TokenTeacher(torch.tensor([0, 1, 0, 9, 30, 20, 3]))
        >>> state = l2t.StudentState(progress=0.5, train_loss=1.2, train_accuracy=0.4)
        >>> teacher(state).scale.shape, sum(x.numel() for x in teacher.parameters())
        (torch.Size([7]), 96)
        >>> hidden, head = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5)
        >>> target = torch.tensor([[4, 5, 3], [6, 3, -100]])
        >>> teacher.loss(hidden, head, None, target, state).backward()

    Source: Szegedy et al., "Rethinking the Inception architecture" (CVPR 2016) for label smoothing; the
    attention as in :class:`l2t.Teacher`.
    """

    basis: Tensor  # [V, F], the features of tokens
    shares: Tensor  # [V], of each among all tokens

    def __init__(
        self,
        counts: Tensor | Sequence[int],
        weight: str = "low-rank",
        *,
        slots: int = 4,
        link: str = "identity",
        features: Sequence[str] = TRACKED,
        hats: int = 6,
        eos: int = 3,
        smoothing: float = 0.1,
        smoothing_range: float = 3.0,
        prior_range: float = 4.0,
        emphasis: float = 1.0,
        diagonal_start: float | None = None,
        diagonal_range: float = 1.0,
        bias_range: float = 6.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        op = "TokenTeacher"
        counts = check.token_counts(torch.as_tensor(counts), eos)
        check.teacher_choice("weight", weight, KINDS, op)
        check.teacher_choice("link", link, LINKS, op)
        check.teacher_size("slots", slots, 1, op)
        check.teacher_size("hats", hats, 2, op)
        check.teacher_features(features, StudentState._fields, slots, op)
        self.num_classes = len(counts)
        if diagonal_start is None:
            diagonal_start = {"identity": 1.0, "sigmoid": 0.7, "log-sigmoid": 0.25}[link]
            diagonal_start /= 1.0 if link == "identity" else math.log(self.num_classes)
        self.counts = [int(count) for count in counts]
        self.kind = weight
        self.slots = slots
        self.link = link
        self.features = tuple(features)
        self.hats, self.eos = hats, eos
        self.smoothing = check.token_smoothing(smoothing)
        self.smoothing_range = check.teacher_positive("smoothing_range", smoothing_range, op=op)
        self.prior_range = check.teacher_positive("prior_range", prior_range, op=op)
        self.emphasis = check.teacher_positive("emphasis", emphasis, or_zero=weight != "diagonal", op=op)
        self.diagonal_start = check.teacher_positive("diagonal_start", diagonal_start, op=op)
        self.diagonal_range = check.teacher_positive("diagonal_range", diagonal_range, op=op)
        self.bias_range = check.teacher_positive("bias_range", bias_range, op=op)

        basis = token_features(counts, hats, eos).to(dtype)
        if weight == "shared":
            basis = torch.ones_like(basis[:, :1])
        self.register_buffer("basis", basis, persistent=False)
        shares = counts.double() / counts.double().sum()
        self.register_buffer("shares", shares.to(dtype), persistent=False)

        normal = self._normal(seed, dtype)
        self._make_mix(normal)
        width = basis.shape[1]
        for name in self._tables():
            setattr(self, name, normal(slots, width, std=0.0))

    def _tables(self) -> list[str]:
        """The names of what is taught beside the keys, each a table (K, F)."""
        names = [] if self.link == "identity" else ["diagonal", "bias"]
        if self.kind != "shared" and self.emphasis:
            names.append("emphases")
        if self.kind != "diagonal":
            names.append("strength")
        return [*names, "prior"] if self.kind == "low-rank" else names

    def forward(self, state: StudentState) -> Coefficients:
        """Coefficients for a student in ``state``, differentiable in the teacher's parameters.

        Fields of a shape (...) in place of numbers give the coefficients of a dynamic teacher these leading
        dimensions, where they depend on the state.

        Raises:
            ValueError: when the state lacks a feature that this teacher was made to see.
        """
        mix = self._shares(state)

        def of_tokens(name: str, reach: float) -> Tensor:  # [..., V], zero where nothing is taught
            if not hasattr(self, name):
                return torch.zeros_like(self.shares)
            return reach * (mixed(mix, getattr(self, name)) @ self.basis.mT).tanh()

        logit = math.log(self.smoothing / (1.0 - self.smoothing))
        strength = torch.sigmoid(of_tokens("strength", self.smoothing_range) + logit)
        prior = torch.softmax(of_tokens("prior", self.prior_range), -1)
        emphasis = of_tokens("emphases", self.emphasis).exp()
        scale = emphasis / (emphasis * self.shares).sum(-1, keepdim=True)
        own = self.diagonal_start * of_tokens("diagonal", self.diagonal_range).exp()
        bias = of_tokens("bias", self.bias_range)
        if self.link != "identity":  # the pull at uniform p, where log p is -log V, is that of the identity
            scale = scale / (slope(self.link, bias - math.log(self.num_classes) * own) * own)
        left, right = torch.broadcast_tensors(own * strength, prior)
        weight = LowRank(own * (1.0 - strength), left.unsqueeze(-1), right.unsqueeze(-1))
        return Coefficients(weight, bias, scale)

    def loss(
        self,
        hidden: Tensor,
        head: Tensor,
        head_bias: Tensor | None,
        target: Tensor,
        state: StudentState,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of the tokens of a batch, 0-dim, for a student in ``state``: a :data:`TokenLoss`.

        Differentiable twice, in the teacher's parameters, too; :meth:`fixed` has a loss that is not.

        Args:
            hidden: (B, T, D), of which ``head`` makes logits.
            head: (V, D).
            head_bias: (V,) or None.
            target: (B, T) int64; -100 is no token.
            state: of the student.
            sample_weight: a factor for each token, (B, T).

        Raises:
            ValueError: for shapes that do not fit, as :func:`l2t.dynamic_linear_loss` does.
        """
        weight, bias, scale = self(state)
        return dynamic_linear_loss(
            hidden,
            head,
            target,
            weight,
            None if self.link == "identity" else bias,
            scale,
            head_bias=head_bias,
            link=self.link,
            sample_weight=sample_weight,
            ignore_index=IGNORE,
        )

    def fixed(self) -> TokenTeacher:
        """A copy whose parameters take no gradient: for training students, not the teacher."""
        return copy.deepcopy(self).requires_grad_(False)

    def neutral(self) -> TokenTeacher:
        """A copy that says what it starts as in every state: label smoothing, with the identity link."""
        teacher = copy.deepcopy(self)
        with torch.no_grad():
            for name in self._tables():
                getattr(teacher, name).zero_()
        return teacher

    def config(self) -> dict[str, Any]:
        """What it takes to make this teacher again, but for its numbers: a JSON-able dict."""
        return {
            "class": type(self).__name__,
            "counts": self.counts,
            "weight": self.kind,
            "slots": self.slots,
            "link": self.link,
            "features": list(self.features),
            "hats": self.hats,
            "eos": self.eos,
            "smoothing": self.smoothing,
            "smoothing_range": self.smoothing_range,
            "prior_range": self.prior_range,
            "emphasis": self.emphasis,
            "diagonal_start": self.diagonal_start,
            "diagonal_range": self.diagonal_range,
            "bias_range": self.bias_range,
        }

    def extra_repr(self) -> str:
        return f"{self.num_classes} tokens, weight={self.kind!r}, slots={self.slots}, link={self.link!r}"


class TokenTracker:
    """The state of one student over a run: running means of cross-entropy and token accuracy (decay 0.9).

    Both are taken from up to 128 tokens of a batch, evenly spaced, under the plain head; accuracy is the mean
    of p_y. States are kept by step, so that a step that is run again sees the state that it saw first. Before
    the first step a student counts as one that guesses: loss log V, accuracy 1 / V.

    Args:
        vocabulary: V.
        steps: steps of the whole run, over which progress goes from 0 to 1.
        first: the step with which this record begins.
        state: the state there; None is one that guesses.

    Example:
        >>> import torch
        >>> tracker = TokenTracker(vocabulary=7, steps=10)
        >>> tracker.update(0, torch.randn(2, 3, 5), torch.randn(7, 5), None, torch.tensor([[4, 5, 3]] * 2))
        >>> tracker.state(1).progress
        0.1
    """

    def __init__(
        self, vocabulary: int, steps: int, first: int = 0, state: StudentState | None = None
    ) -> None:
        self.steps, self.first = steps, first
        self.states = [state or StudentState(first / steps, math.log(vocabulary), 1.0 / vocabulary)]

    def state(self, step: int) -> StudentState:
        """The state before ``step``."""
        return self.states[step - self.first]

    @torch.no_grad()
    def update(
        self, step: int, hidden: Tensor, head: Tensor, head_bias: Tensor | None, target: Tensor
    ) -> None:
        """Record what the batch of ``step`` showed; a step that is run again shows nothing new."""
        if len(self.states) != step - self.first + 1:
            return
        tokens = (target != IGNORE).flatten().nonzero()[:, 0]
        tokens = tokens[:: max(1, -(-len(tokens) // _TRACKED))]
        losses = dynamic_linear_loss(
            hidden.reshape(-1, hidden.shape[-1])[tokens],
            head,
            target.flatten()[tokens],
            head_bias=head_bias,
            link="identity",
            reduction="none",
        )
        before = self.states[-1]
        now = StudentState(
            progress=(step + 1) / self.steps,
            train_loss=0.9 * before.train_loss + 0.1 * float(losses.mean()),
            train_accuracy=0.9 * before.train_accuracy + 0.1 * float(losses.neg().exp().mean()),
        )
        self.states.append(now)
