"""The students: an LSTM with attention and a pre-norm Transformer, each with one table of embeddings.

One table (V, D) holds the pieces of both languages and is the head, too (Press and Wolf, "Using the output
embedding to improve language models", EACL 2017). Every part has a right second derivative and one in forward
mode, as :func:`l2t.preflight` finds, so :func:`l2t.unroll` takes them as they are: attention is written out,
since the CPU's fused kernel has no second derivative, and the encoder reads backwards by turning sentences
around. Dropout draws from PyTorch's default random numbers, which a run repeats.

Not here: how a translation is searched for (decode.py) and training (course.py).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2t import check

State = tuple[Tensor, ...]
"""Where a translation stands: tensors of B rows each, in an order that only their network knows."""


class Translator(nn.Module):
    """What both students have in common: the table of embeddings, which is the head, and one bias a piece.

    Attributes:
        head: the embeddings, (V, D), which are the weight of the head.
        head_bias: its bias, (V,).
    """

    def __init__(self, vocab: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.head = nn.Parameter(torch.randn(vocab, dim) / math.sqrt(dim))
        self.head_bias = nn.Parameter(torch.zeros(vocab))
        self.dropout = nn.Dropout(dropout)

    def encode(self, source: Tensor) -> State:
        """Read sentences (B, S), int64, padded with 0 at the end: where their translations begin."""
        raise NotImplementedError

    def decode(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        """What comes after each of the next tokens (B, T): hidden (B, T, D), and where that leaves it."""
        raise NotImplementedError

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Inputs of the head, (B, T, D), for source (B, S) and what stands before each token, (B, T)."""
        return self.decode(self.encode(source), target_in)[0]

    def step(self, state: State, token: Tensor) -> tuple[Tensor, State]:
        """One more token (B,) of each translation: logits (B, V) of the next one, and the state after it."""
        hidden, state = self.decode(state, token[:, None])
        return self.logits(hidden[:, 0]), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Of every piece: (..., D) -> (..., V)."""
        return F.linear(hidden, self.head, self.head_bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of a size of 1 in every number."""
        return F.embedding(tokens, self.head) * math.sqrt(self.dim)


class LSTMTranslator(Translator):
    """LSTM encoder in both directions, LSTM decoder, attention after it.

    The decoder reads the whole target in one call, since nothing that attention finds goes back into it:
    ``hidden = tanh(W [h; c])`` with c the mean of what was encoded, by weights ``softmax(hᵀ K e)``.

    Args:
        vocab: number of pieces V.
        dim: size D of embeddings and states; even, since each direction of the encoder has half.
        layers: of encoder and decoder.
        dropout: of embeddings, between layers, and of what goes into the head.

    Raises:
        ValueError: a size that does not fit.

    Source: Luong, Pham and Manning, "Effective approaches to attention-based neural machine translation"
    (EMNLP 2015), "general" score, without input feeding.

    Example:
        >>> import torch
        >>> from l2t.translation.networks import LSTMTranslator
        >>> student = LSTMTranslator(vocab=50, dim=8)
        >>> student(torch.tensor([[5, 6, 3]]), torch.tensor([[2, 7]])).shape
        torch.Size([1, 2, 8])
        >>> sum(x.numel() for x in LSTMTranslator(3000).parameters())
        1246008
    """

    def __init__(self, vocab: int, dim: int = 192, layers: int = 1, dropout: float = 0.1) -> None:
        check.translator_size("LSTMTranslator", vocab, dim, layers, dropout, divisor=2)
        super().__init__(vocab, dim, dropout)
        self.onwards = nn.ModuleList(_LSTM(dim, dim // 2, batch_first=True) for _ in range(layers))
        self.backwards = nn.ModuleList(_LSTM(dim, dim // 2, batch_first=True) for _ in range(layers))
        self.decoder = nn.ModuleList(_LSTM(dim, dim, batch_first=True) for _ in range(layers))
        self.bridge = nn.Linear(dim, dim)
        self.keys = nn.Linear(dim, dim, bias=False)
        self.combine = nn.Linear(2 * dim, dim)

    def encode(self, source: Tensor) -> State:
        """What was read, its keys, which of it is padding, and each layer's h and c."""
        padding = source == 0
        length = (~padding).sum(1)
        turned = _turned(length, source.shape[1])
        x, begins = self.embed(source), []
        for onwards, backwards in zip(self.onwards, self.backwards, strict=True):
            x = self.dropout(x)
            there, back = onwards(x)[0], backwards(_rows(x, turned))[0]
            last = _rows(torch.cat([there, back], 2), (length - 1)[:, None])[:, 0]
            begins.append(torch.tanh(self.bridge(last)))
            x = torch.cat([there, _rows(back, turned)], 2)
        return (x, self.keys(x), padding, *begins, *(torch.zeros_like(h) for h in begins))

    def decode(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        """As :meth:`Translator.decode` says."""
        values, keys, padding, *begins = state
        layers = len(self.decoder)
        x, ends = self.embed(tokens), []
        for layer, h, c in zip(self.decoder, begins[:layers], begins[layers:], strict=True):
            x, (h, c) = layer(self.dropout(x), (h[None].contiguous(), c[None].contiguous()))
            ends.append((h[0], c[0]))
        scores = (x @ keys.transpose(1, 2)).masked_fill(padding[:, None], -math.inf)
        found = torch.softmax(scores, 2) @ values
        hidden = self.dropout(torch.tanh(self.combine(torch.cat([x, found], 2))))
        return hidden, (values, keys, padding, *(h for h, _ in ends), *(c for _, c in ends))


class _LSTM(nn.LSTM):
    """By oneDNN in :func:`first_order` alone: it has no forward mode, and slow second derivatives.

    Nor has it all of bfloat16 on every machine.
    """

    def forward(self, *args: Any) -> Any:
        full = self.weight_ih_l0.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
        with contextlib.nullcontext() if full and _FIRST_ORDER.get() else _without_onednn():
            return super().forward(*args)


_FIRST_ORDER: ContextVar[bool] = ContextVar("first_order", default=False)


@contextlib.contextmanager
def first_order() -> Iterator[None]:
    """For what is differentiated once at most, and not forwards: LSTMs on the CPU go by oneDNN, faster."""
    before = _FIRST_ORDER.set(True)
    try:
        yield
    finally:
        _FIRST_ORDER.reset(before)


_SWITCH = threading.Lock()
_found: list[bool] = []  # what each call under way found the switch at, which is one for all threads


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Keep oneDNN off while any thread is in here; the last one out puts back what the first one found."""
    mkldnn: Any = torch.backends.mkldnn  # not by its `flags`, which warn of a switch that is none of ours
    with _SWITCH:
        _found.append(mkldnn.enabled)
        mkldnn.enabled = False
    try:
        yield
    finally:
        with _SWITCH:
            before = _found.pop()
            if not _found:
                mkldnn.enabled = before


def _turned(length: Tensor, size: int) -> Tensor:  # [B, S]
    """Places of tokens in sentences that are turned around, their padding left where it is."""
    place = torch.arange(size, device=length.device).expand(len(length), size)
    return torch.where(place < length[:, None], length[:, None] - 1 - place, place)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Of x (B, S, D) the rows at places (B, P): (B, P, D)."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


class TransformerTranslator(Translator):
    """Pre-norm Transformer with sinusoidal positions.

    Args:
        vocab: number of pieces V.
        dim: size D of everything between the layers; a multiple of twice ``heads``.
        layers: of encoder and decoder.
        heads: of each attention.
        dropout: of embeddings, of what each block adds, and of attention's weights.

    Raises:
        ValueError: a size that does not fit.

    Source: Vaswani et al., "Attention is all you need" (NeurIPS 2017), with the norms before the blocks
    (Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020).

    Example:
        >>> import torch
        >>> from l2t.translation.networks import TransformerTranslator
        >>> student = TransformerTranslator(vocab=50, dim=16)
        >>> student(torch.tensor([[5, 6, 3]]), torch.tensor([[2, 7]])).shape
        torch.Size([1, 2, 16])
        >>> sum(x.numel() for x in TransformerTranslator(3000).parameters())
        1313208
    """

    def __init__(
        self, vocab: int, dim: int = 128, layers: int = 2, heads: int = 4, dropout: float = 0.1
    ) -> None:
        check.translator_size("TransformerTranslator", vocab, dim, layers, dropout, divisor=2 * heads)
        super().__init__(vocab, dim, dropout)
        self.encoder: Any = nn.ModuleList(_Layer(dim, heads, dropout, reads=False) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(dim)
        self.decoder: Any = nn.ModuleList(_Layer(dim, heads, dropout, reads=True) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(dim)

    def encode(self, source: Tensor) -> State:
        """Which of the source is padding, and by layer its keys and values and those of no target yet."""
        hidden = (source == 0)[:, None, None]
        x = self.dropout(self.embed(source) + _positions(0, source.shape[1], self.head))
        for layer in self.encoder:
            x = layer(x, layer.own.pairs(layer.own_norm(x)), hidden)
        x = self.encoder_norm(x)
        state = [hidden]
        for layer in self.decoder:
            keys, values = layer.read.pairs(x)
            state += [keys, values, keys[:, :, :0], values[:, :, :0]]
        return tuple(state)

    def decode(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        """As :meth:`Translator.decode` says."""
        padding, *pairs = state
        before, count = pairs[2].shape[2], tokens.shape[1]
        later = torch.ones(count, before + count, dtype=torch.bool, device=tokens.device).triu(before + 1)
        x = self.dropout(self.embed(tokens) + _positions(before, count, self.head))
        after = [padding]
        for i, layer in enumerate(self.decoder):
            read, own = pairs[4 * i : 4 * i + 2], pairs[4 * i + 2 : 4 * i + 4]
            new = layer.own.pairs(layer.own_norm(x))
            own = [torch.cat(both, 2) for both in zip(own, new, strict=True)] if before else [*new]
            x = layer(x, own, later, read, padding)
            after += [*read, *own]
        return self.decoder_norm(x), tuple(after)


class _Layer(nn.Module):
    """A layer of the Transformer: looks at its own sentence, at the source where it ``reads``, and on."""

    def __init__(self, dim: int, heads: int, dropout: float, reads: bool) -> None:
        super().__init__()
        self.own, self.own_norm = _Attention(dim, heads, dropout), nn.LayerNorm(dim)
        if reads:
            self.read, self.read_norm = _Attention(dim, heads, dropout), nn.LayerNorm(dim)
        self.feed = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * dim, dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, own: Any, hidden: Tensor, read: Any = None, padding: Any = None) -> Tensor:
        x = x + self.dropout(self.own(self.own_norm(x), *own, hidden))
        if read is not None:
            x = x + self.dropout(self.read(self.read_norm(x), *read, padding))
        x = x + self.dropout(self.feed(x))
        return x


class _Attention(nn.Module):
    """Attention by H heads, written out: each product has all its derivatives."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.ask, self.offer, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        for linear in (self.ask, self.offer, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.dropout = nn.Dropout(dropout)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is looked at, (B, H, S, D / H) each."""
        keys, values = self.offer(x).chunk(2, 2)
        return self._by_head(keys), self._by_head(values)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """What the rows of x (B, T, D) find in the pairs, of which they do not see the hidden ones."""
        asked = self._by_head(self.ask(x))
        scores = (asked @ keys.transpose(2, 3)) / math.sqrt(keys.shape[3])
        weights = self.dropout(torch.softmax(scores.masked_fill(hidden, -math.inf), 3))
        found: Tensor = self.out((weights @ values).transpose(1, 2).flatten(2))
        return found


def _positions(first: int, count: int, like: Tensor) -> Tensor:  # [count, D]
    """Sines and cosines of the places from ``first`` on."""
    half = like.shape[1] // 2
    rate = torch.exp(torch.arange(half, dtype=like.dtype, device=like.device) * (-math.log(1e4) / half))
    angle = torch.arange(first, first + count, dtype=like.dtype, device=like.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)
