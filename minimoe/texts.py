"""A corpus made ready for training: encoded, split, and drawn from at random."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe import corpus as corpora
from minimoe import tokenizer
from minimoe.checkpoint import Source
from minimoe.config import TrainConfig
from minimoe.corpus import Corpus
from minimoe.errors import UserError
from minimoe.tokenizer import Tokenizer

Ids = NDArray[np.int32]


class Texts(NamedTuple):
    """Token ids of every document, its beginning to train on and its last tenth to validate on."""

    names: list[str]
    train: Ids  # the training parts, one behind the other
    starts: Ids  # every place in ``train`` where a sequence can begin without crossing into another document
    validation: list[Ids]

    def draw(self, rng: np.random.Generator, count: int, length: int) -> tuple[Ids, Ids]:
        """``count`` random sequences: tokens (count, length), and targets, the same one token later."""
        places = self.starts[rng.integers(0, len(self.starts), count)][:, None] + np.arange(length)
        return self.train[places], self.train[places + 1]


def prepare(corpus: str | Corpus, recipe: TrainConfig, context: int) -> tuple[Texts, Source, Tokenizer]:
    """Reads, encodes and splits a corpus; raises ``UserError`` if a document is too short for one sequence."""
    read = corpora.load(corpus) if isinstance(corpus, str) else corpus
    codec = tokenizer.build(recipe.tokenizer, read.text)
    texts, digest = _encode(read, codec, context)
    return texts, Source(read.name, [str(path) for path in read.paths], digest), codec


def reload(source: Source, codec: Tokenizer, context: int, corpus: Corpus | None = None) -> Texts:
    """The texts of an earlier run; raises ``UserError`` if they are no longer the same."""
    read = corpus or (corpora.read_files(source.paths) if source.paths else corpora.load(source.corpus))
    named = ", ".join(source.paths) or f"the corpus {source.corpus!r}"
    changed = UserError(f"{named} has changed since this run began: restore the text, or train anew.")
    try:
        texts, digest = _encode(read, codec, context)
    except UserError:  # it holds a character that it did not hold, or is now too short
        raise changed from None
    if digest != source.sha256:
        raise changed
    return texts


def _encode(corpus: Corpus, codec: Tokenizer, context: int) -> tuple[Texts, str]:
    encoded = [codec.encode(text) for text in corpus.documents.values()]
    least = max((context + 1) * 10 // 9 + 2, 11)  # 11: two tokens held out, one to predict the other
    for name, ids in zip(corpus.documents, encoded, strict=True):
        if len(ids) < least:
            raise UserError(
                f"the text {name!r} has {len(ids)} tokens, too few for a context of {context} and a tenth kept for "
                f"validation: give at least {least}, or a smaller --context."
            )
    train, validation = corpora.split(encoded)
    ends = np.cumsum([len(ids) for ids in train])
    starts = [np.arange(end - len(ids), end - context) for ids, end in zip(train, ends, strict=True)]
    digest = hashlib.sha256(b"".join(np.int64(len(ids)).tobytes() + ids.tobytes() for ids in encoded)).hexdigest()
    texts = Texts(list(corpus.documents), np.concatenate(train), np.concatenate(starts).astype(np.int32), validation)
    return texts, digest
