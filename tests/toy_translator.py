"""A translator as small as one can be, and toy languages, for tests of teaching and training."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2t.translation.batches import Batch
from l2t.translation.corpus import Corpus

VOCABULARY = 9
COUNTS = torch.tensor([0, 1, 0, 40, 30, 12, 9, 4, 2])


class Toy(nn.Module):
    """The next token from the last one and the mean of the source; one table is embedding and head."""

    def __init__(self, vocabulary: int = VOCABULARY, dim: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(vocabulary, dim))
        self.head_bias = nn.Parameter(torch.zeros(vocabulary))
        self.mix = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def encode(self, source: Tensor) -> Tensor:
        return F.embedding(source, self.head).mean(1)

    def hidden(self, state: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([F.embedding(tokens, self.head), state[:, None].expand(-1, tokens.shape[1], -1)], 2)
        return self.dropout(torch.tanh(self.mix(x)))

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        return self.hidden(self.encode(source), target_in)

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(self.hidden(state, token[:, None])[:, 0], self.head, self.head_bias), state


def batch_of(seed: int, size: int = 4) -> Batch:
    """Sentences whose translation is each token's successor, of up to four tokens."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, VOCABULARY - 1, (size, 4), generator=generator)
    target_out = torch.full((size, 5), -100)
    for row, length in enumerate(torch.randint(1, 5, (size,), generator=generator).tolist()):
        source[row, length:] = 0
        target_out[row, :length] = source[row, :length] + 1
        target_out[row, length] = 3
    target_in = torch.cat([torch.full((size, 1), 2), target_out[:, :-1].clamp(min=0)], 1)
    return Batch(source, target_in, target_out)


class Batches:
    """The batches of a course of a seed, without end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> Batch:
        return batch_of(self.seed % 2**31 * 1000 + index)


DEV = [batch_of(-1 - index, 6) for index in range(3)]

WORDS = {
    "rot": "red", "grau": "grey", "klein": "small", "hund": "dog", "katze": "cat", "baum": "tree",
    "sieht": "sees", "sucht": "seeks", "und": "and", "heute": "today", "dort": "there", "nie": "never",
}  # fmt: skip


def toy_corpus() -> Corpus:
    """Sentences whose translation is each word in English, backwards."""
    draw = random.Random(0)
    sentences = {" ".join(draw.choices([*WORDS], k=draw.randint(2, 4))) for _ in range(700)}
    pairs = [(text, " ".join(WORDS[word] for word in reversed(text.split()))) for text in sorted(sentences)]
    draw.shuffle(pairs)
    return Corpus(pairs[80:], pairs[:40], pairs[40:80], "de", "en", {})
