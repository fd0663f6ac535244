"""The pieces that sentences are cut into: byte-pair encoding of both languages together, by sentencepiece.

The model is kept as its bytes, which are all that there is to a vocabulary. Training is on one thread and
draws nothing, so the same sentences give the same bytes. Characters are taken as they are: a translation is
scored beside references that nothing was done to.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t import check
from l2t.files import write_whole
from l2t.tasks.places import digest
from l2t.translation.batches import BEGIN, END, PAD, UNKNOWN, Encoded, Ids
from l2t.translation.corpus import Corpus, Pairs


class Vocabulary:
    """V pieces of words with ids; those of padding, unknown, begin and end are 0, 1, 2 and 3.

    Args:
        model: the bytes of a sentencepiece model.

    Attributes:
        model: these bytes.
        size: V.
        checksum: of the bytes.

    Raises:
        ImportError: sentencepiece is not installed.
        ValueError: the bytes are no model, or one with other ids.

    Source: Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units" (ACL
    2016); Kudo and Richardson, "SentencePiece" (EMNLP 2018).

    Example:
        >>> from l2t.translation.corpus import Corpus
        >>> from l2t.translation.vocabulary import Vocabulary
        >>> pairs = [("ein Haus", "a house"), ("ein Hut", "a hat")]
        >>> vocabulary = Vocabulary.train(Corpus(pairs, [], [], "de", "en", {}), size=24)
        >>> vocabulary.size, vocabulary.decode(vocabulary.encode(["a house", "ein Hut"]))
        (24, ['a house', 'ein Hut'])
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._pieces: Any = _sentencepiece().SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise check.vocabulary_bytes(len(model)) from error
        special = ("pad_id", "unk_id", "bos_id", "eos_id")
        found = [getattr(self._pieces, name)() for name in special]
        check.vocabulary_ids(found, [PAD, UNKNOWN, BEGIN, END])
        self.size: int = self._pieces.GetPieceSize()
        self.checksum = digest(model, "sha256:")

    @classmethod
    def train(cls, corpus: Corpus, size: int = 3000) -> Vocabulary:
        """The vocabulary of ``size`` pieces for both sides of the training pairs.

        Raises:
            ImportError: sentencepiece is not installed.
            ValueError: the sentences do not give so many pieces, or have more characters than that.
        """
        package, model = _sentencepiece(), io.BytesIO()
        try:
            package.SentencePieceTrainer.train(
                sentence_iterator=(text for pair in corpus.train for text in pair),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                character_coverage=1.0,
                normalization_rule_name="identity",
                max_sentence_length=2**30,
                num_threads=1,
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=BEGIN,
                eos_id=END,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise check.vocabulary_size(size, error) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """The vocabulary that :meth:`save` wrote."""
        return cls(Path(path).read_bytes())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file, whole."""
        write_whole(path, self.model)

    def encode(self, sentences: Sequence[str]) -> Ids:
        """The ids of each sentence's pieces, white space folded, without BEGIN and END."""
        ids: Ids = self._pieces.EncodeAsIds([" ".join(text.split()) for text in sentences])
        return ids

    def encode_pairs(self, pairs: Pairs) -> Encoded:
        """A split as ids."""
        return Encoded(self.encode([pair[0] for pair in pairs]), self.encode([pair[1] for pair in pairs]))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The sentences that ids stand for; BEGIN, END and PAD say nothing."""
        return [self._pieces.DecodeIds([i for i in row if i not in (PAD, BEGIN, END)]) for row in ids]

    def counts(self, target: Sequence[Sequence[int]]) -> Tensor:
        """How often each piece is a target, (V,) int64: END once a sentence."""
        flat = torch.tensor([i for row in target for i in (*row, END)], dtype=torch.int64)
        return flat.bincount(minlength=self.size)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise check.missing_package("translation", "sentencepiece", "translation") from error
    return sentencepiece
