"""Prepares a corpus for training: encodes it, splits it, and reads it in sequences.

A run reads its text in epochs. Each epoch cuts every document into sequences, starting at another offset, shuffles the
sequences and reads each once, so that an epoch reads nothing twice. Both ends of a document may be too short for a
sequence. Such ends are left to another epoch. The two ends together have up to two sequences' worth of tokens: a small
part of a long text, but a large part of a document that is only a few sequences long. If sequences were drawn at random
instead, a fraction e⁻ᵗ of a text of n tokens would still be unread after t·n tokens: a fifth at t = 1.5.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.text import corpus as corpora
from minimoe.text import tokenizer
from minimoe.text.corpus import Corpus, Source
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer
from minimoe.text.tokenizer import Tokenizer

Ids = NDArray[np.int32]

ELSEWHERE = (
    "restore the text, or start a new run; if it is in another place now, give that with --text (in Python, corpus=)"
)
"""What to do if the text of a run cannot be found."""


@brief
class Texts(NamedTuple):
    """The token ids of every document: its beginning for training, its last tenth for validation."""

    names: list[str]
    train: Ids  # the training parts, one after the other
    starts: Ids  # every place in ``train`` where a sequence can begin without crossing into another document
    spans: list[slice]  # for each document, the slice of ``starts`` that is its own
    validation: list[Ids]

    @property
    def longest(self) -> int:
        """The largest length for which a sequence fits at every place in ``starts``: the context given to
        ``prepare``."""
        return len(self.train) - 1 - int(self.starts[-1])

    def only(self, name: str) -> Texts:
        """One of the documents alone, with the same tokens; raises ``UserError`` if there is none of that name."""
        if name not in self.names:
            raise UserError(f"there is no document {name!r:.40}: choose one of {', '.join(self.names)}.")
        place = self.names.index(name)
        starts = self.starts[self.spans[place]]
        first, end = int(starts[0]), int(starts[-1]) + self.longest + 1
        return Texts(
            [name], self.train[first:end], starts - first, [slice(0, len(starts))], [self.validation[place]]
        )

    def draw(self, rng: np.random.Generator, count: int, length: int) -> tuple[Ids, Ids]:
        """``count`` random sequences: tokens and targets, both (count, length); a target is the next token.

        Raises:
            UserError: a sequence of this ``length`` could reach into the next document.
        """
        self._check(length)
        places = self.starts[rng.integers(0, len(self.starts), count)][:, None] + np.arange(length)
        return self.train[places], self.train[places + 1]

    def batches(self, count: int, length: int, seed: int = 0, first: int = 0) -> Iterator[tuple[Ids, Ids]]:
        """Yields batches like those of ``draw`` without end, in the order in which a run with this seed reads its text.

        The first ``first`` batches are skipped, so that a resumed run continues where it stopped.

        Raises:
            UserError: as for ``draw``.
        """
        self._check(length)
        return self._read(count, length, seed, first)

    def _read(self, count: int, length: int, seed: int, first: int) -> Iterator[tuple[Ids, Ids]]:
        epoch, done = divmod(first * count, len(self._epoch(seed, 0, length)))
        order = self._epoch(seed, epoch, length)[done:]
        while True:
            while len(order) < count:
                epoch += 1
                order = np.concatenate([order, self._epoch(seed, epoch, length)])
            places, order = order[:count, None] + np.arange(length), order[count:]
            yield self.train[places], self.train[places + 1]

    def _check(self, length: int) -> None:
        if not 1 <= length <= self.longest:
            raise UserError(
                f"length {length} is not between 1 and {self.longest}, the context that these texts were prepared for: "
                "choose a length in this range, or prepare the texts with a longer context."
            )

    def _epoch(self, seed: int, number: int, length: int) -> Ids:
        """The places where the sequences of an epoch begin, in reading order; every epoch has equally many."""
        rng = np.random.default_rng((seed, number))
        cuts = []
        for span in self.spans:
            starts = self.starts[span]
            sequences = max(len(starts) // length, 1)
            offset = rng.integers(len(starts) - (sequences - 1) * length)
            cuts.append(starts[offset::length][:sequences])
        return rng.permutation(np.concatenate(cuts))


def prepare(corpus: str | Corpus, recipe: TrainConfig, context: int) -> tuple[Texts, Source, Tokenizer]:
    """Reads, encodes and splits a corpus; raises ``UserError`` if a document is too short for one sequence."""
    read = _as_corpus(corpus)
    codec = tokenizer.build(recipe.tokenizer, read.text)
    return *prepare_for(read, codec, context), codec


def prepare_for(corpus: str | Corpus, codec: Tokenizer, context: int) -> tuple[Texts, Source]:
    """``prepare`` with a tokenizer that exists already, such as that of another run.

    Raises:
        UserError: a document is too short for one sequence, or has a character that the tokenizer does not know.
    """
    read = _as_corpus(corpus)
    texts, digest = _encode(read, codec, context)
    return texts, Source(read.name, [str(path) for path in read.paths], digest)


def prepare_again(
    corpus: str | Corpus, codec: Tokenizer | PretrainedTokenizer, context: int
) -> tuple[Texts, Source]:
    """Like ``prepare``, with the tokenizer of an earlier run; ``UserError`` also for a character unknown to it."""
    read = _as_corpus(corpus)
    texts, digest = _encode(read, codec, context)
    return texts, Source(read.name, [str(path) for path in read.paths], digest)


def _as_corpus(corpus: str | Corpus) -> Corpus:
    """The corpus of that name, or the corpus itself; raises ``UserError`` for anything else."""
    if isinstance(corpus, str):
        return corpora.load(corpus)
    if not isinstance(corpus, Corpus):
        raise UserError(
            f"{corpus!r:.60} is not a corpus: give the name of one, or a minimoe.text.corpus.Corpus, which "
            "minimoe.text.corpus.read_files makes from the paths of text files."
        )
    return corpus


def read_source(source: Source) -> Corpus:
    """The corpus that an earlier run names, as it is now; raises ``UserError`` if it is gone or is no longer a file."""
    if not source.is_known:
        raise UserError(
            "this model was trained elsewhere, on a text that is not known here, and only tuned by minimoe: give "
            "another text to a command that has --text; evaluate --suite needs none."
        )
    # The user did not type these paths, so a device or a pipe, which may have no end, is not read.
    for path in source.paths:
        if not os.path.isfile(path):
            problem = "is not a file" if os.path.lexists(path) else "does not exist"
            raise UserError(f"{path}, which the run names as its text, {problem}: {ELSEWHERE}.")
    if not source.paths and source.corpus not in corpora.NAMES:
        raise UserError(f"the corpus {source.corpus!r} was made in Python: resume there, and pass it again as corpus=.")
    return corpora.read_files(source.paths) if source.paths else corpora.load(source.corpus)


def reload(
    source: Source, codec: Tokenizer | PretrainedTokenizer, context: int, corpus: str | Corpus | None = None
) -> Texts:
    """The texts of an earlier run, read from ``corpus`` if it is given; ``UserError`` if they are no longer the
    same."""
    read = read_source(source) if corpus is None else _as_corpus(corpus)
    named = ", ".join(source.paths) or f"the corpus {source.corpus!r}"
    changed = UserError(f"{named} has changed since this run began: {ELSEWHERE}.")
    if corpus is not None and corpus != source.corpus:
        given = ", ".join(map(str, read.paths)) or f"the corpus {read.name!r}"
        changed = UserError(
            f"{given} has changed since this run began, or is another text: give the one that it began with, or start "
            "a new run."
        )
    elif not source.paths:
        changed = UserError(
            f"{named} has changed since this run began, or the run used another one of that name, made in Python: "
            "pass that one again as corpus=, or start a new run."
        )
    try:
        texts, digest = _encode(read, codec, context)
    except UserError:  # it holds a new character, or is now too short
        raise changed from None
    if digest != source.sha256:
        raise changed
    return texts


def where_now(source: Source, corpus: str | Corpus | None) -> Source:
    """The source of a run, with the files of ``corpus`` as its place; ``reload`` has checked that the text is the
    same."""
    if not isinstance(corpus, Corpus) or not corpus.paths:
        return source
    return source._replace(corpus=corpus.name, paths=[str(path) for path in corpus.paths])


def has_moved(source: Source, codec: Tokenizer | PretrainedTokenizer, context: int, corpus: Corpus) -> bool:
    """Whether ``corpus`` is the text of an earlier run, and is no longer at the place that the run names."""
    try:
        reload(source, codec, context, corpus)
    except UserError:
        return False
    try:
        reload(source, codec, context)
    except UserError:
        return True
    return False


def _encode(corpus: Corpus, codec: Tokenizer | PretrainedTokenizer, context: int) -> tuple[Texts, str]:
    encoded = [codec.encode(text) for text in corpus.documents.values()]
    least = max((context + 1) * 10 // 9 + 2, 11)  # of 11 tokens two are held out: one predicts the other
    for name, ids in zip(corpus.documents, encoded, strict=True):
        if len(ids) < least:
            raise UserError(
                f"the text {name!r} has {len(ids)} tokens, too few for a context of {context} and a tenth kept for "
                f"validation: give at least {least}, or a smaller --context."
            )
    train, validation = corpora.split(encoded)
    ends = np.cumsum([len(ids) for ids in train])
    starts = [np.arange(end - len(ids), end - context) for ids, end in zip(train, ends, strict=True)]
    stops = np.cumsum([len(of_document) for of_document in starts]).tolist()
    spans = [slice(begin, stop) for begin, stop in pairwise([0, *stops])]
    digest = hashlib.sha256(b"".join(np.int64(len(ids)).tobytes() + ids.tobytes() for ids in encoded)).hexdigest()
    places = np.concatenate(starts).astype(np.int32)
    return Texts(list(corpus.documents), np.concatenate(train), places, spans, validation), digest
