"""Text to numbers and back, with one token per character or one token per byte.

    "deed"  →  characters "de"  →  [0, 1, 1, 0]          CharTokenizer: small vocabulary, knows only its own text
    "é"     →  UTF-8 C3 A9      →  [195, 169]            ByteTokenizer: 256 tokens, knows every text

With a small vocabulary, the embedding and the output layer of a model are small, so nearly all of its parameters are in
the experts. Both tokenizers are frozen values with the same few methods, so the rest of the package does not need to
know which one it has.

A model that is tuned to answer reads a few ids that stand for no text: where a conversation begins, who speaks, where
an answer ends. ``with_chat_tokens`` appends them to the ids of the text (``ChatTokenizer``), and ``minimoe.text.chat``
puts them in their places.

Losses with different tokenizers are compared in bits per byte: the summed loss in nats, divided by
``log(2) · tokenizer.bytes_of(targets)``.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from minimoe.core.errors import UserError
from minimoe.core.ids import checked

Ids: TypeAlias = npt.NDArray[np.int32]
AnyIds: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[int]

KINDS = ("char", "byte")


@dataclass(frozen=True, repr=False)
class CharTokenizer:
    """One token for each character that the training text contains.

    Attributes:
        characters: every known character once, in code point order; the id of a character is its index.

    Raises:
        UserError: ``characters`` is empty, not sorted, repeats a character or holds half of a surrogate pair.
    """

    kind: ClassVar[str] = "char"
    characters: str

    def __post_init__(self) -> None:
        if not self.characters:
            raise UserError(
                "A char tokenizer needs at least one character, got none; give it a text that is not empty."
            )
        if self.characters != "".join(sorted(set(self.characters))):
            raise UserError(
                f"The characters of a char tokenizer are {_shown(self.characters)}, expected each one once and in "
                "order; make the tokenizer with build('char', text)."
            )
        if halves := [character for character in self.characters if "\ud800" <= character <= "\udfff"]:
            raise UserError(
                f"The text contains {_shown(halves)}, half of a surrogate pair, which is not a character and cannot be "
                "written as UTF-8; read the text again as UTF-8."
            )

    def __repr__(self) -> str:
        shown = self.characters if len(self.characters) <= 300 else self.characters[:300] + "…"
        return f"CharTokenizer(characters={shown!r})"

    @property
    def vocab_size(self) -> int:
        """The number of different tokens: V."""
        return len(self.characters)

    def encode(self, text: str) -> Ids:
        """The id of every character of ``text``, as an int32 array of length ``len(text)``.

        Raises:
            UserError: a character is not one of ``characters``.
        """
        points = _code_points(text)
        known = _code_points(self.characters)
        # A table from code point to id replaces one dictionary look-up per character. Its last entry stands for every
        # code point above the largest known one.
        id_of = np.full(int(known[-1]) + 2, -1, dtype=np.int32)
        id_of[known] = np.arange(len(known), dtype=np.int32)
        ids: Ids = id_of[np.minimum(points, known[-1] + 1)]
        if ids.size and ids.min() < 0:
            unseen = dict.fromkeys(text[i] for i in np.flatnonzero(ids < 0))  # a dict keeps their order in the text
            raise UserError(
                f"The text contains {_shown(unseen)}, but this model knows only the {self.vocab_size} characters of "
                "its training text; use other characters, or train with --tokenizer byte, which knows every text."
            )
        return ids

    def decode(self, ids: AnyIds) -> str:
        """The text that a one-dimensional array of ids stands for.

        Raises:
            UserError: ``ids`` is not one-dimensional, not integer, or holds an id that is not in the vocabulary.
        """
        points = _code_points(self.characters)[_checked_row(ids, self.vocab_size)]
        return str(points.tobytes(), "utf-32-le")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the character of each id as soon as the id arrives.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        for token in ids:
            yield self.decode([token])

    def bytes_of(self, ids: AnyIds) -> int:
        """The number of UTF-8 bytes that the ids, of any shape, stand for.

        Raises:
            UserError: ``ids`` is not integer, or holds an id that is not in the vocabulary.
        """
        lengths = np.array([len(character.encode()) for character in self.characters], dtype=np.int64)
        return int(lengths[checked(ids, self.vocab_size)].sum())

    def to_dict(self) -> dict[str, str]:
        """A dictionary for JSON; ``from_dict`` makes the tokenizer again."""
        return {"kind": self.kind, "characters": self.characters}


@dataclass(frozen=True)
class ByteTokenizer:
    """One token for each of the 256 bytes: every text can be encoded, and é takes two tokens."""

    kind: ClassVar[str] = "byte"

    @property
    def vocab_size(self) -> int:
        """The number of different tokens: V = 256."""
        return 256

    def encode(self, text: str) -> Ids:
        """The UTF-8 bytes of ``text``, as an int32 array.

        Raises:
            UserError: ``text`` holds half of a surrogate pair, which UTF-8 cannot write.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text contains {text[error.start]!r}, half of a surrogate pair, which is not a character and "
                "cannot be written as UTF-8; remove it, or read the text again as UTF-8."
            ) from None
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: AnyIds) -> str:
        """The text of a one-dimensional array of bytes; bytes that are not UTF-8 become U+FFFD, the character �.

        Raises:
            UserError: ``ids`` is not one-dimensional, not integer, or holds an id outside 0 … 255.
        """
        return _checked_row(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as bytes arrive, never half of a character: its bytes are held back until the last one arrives.

        The joined pieces are what ``decode`` makes of all ids.

        Raises:
            UserError: an id is outside 0 … 255.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if piece := decoder.decode(checked([token], self.vocab_size).astype(np.uint8).tobytes()):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def bytes_of(self, ids: AnyIds) -> int:
        """The number of UTF-8 bytes that the ids, of any shape, stand for: one each.

        Raises:
            UserError: ``ids`` is not integer, or holds an id outside 0 … 255.
        """
        return int(checked(ids, self.vocab_size).size)

    def to_dict(self) -> dict[str, str]:
        """A dictionary for JSON; ``from_dict`` makes the tokenizer again."""
        return {"kind": self.kind}


CHAT_TOKENS = ("begin", "user", "assistant", "end")
"""The ids that a ``ChatTokenizer`` appends, in their order."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer of text, followed by the ids of ``CHAT_TOKENS``, which no text can produce.

    The text "<user>" is encoded letter by letter like every other text, so nobody can end an answer or take another
    role by typing something. Decoding leaves the appended ids out.
    """

    kind: ClassVar[str] = "chat"
    of_text: CharTokenizer | ByteTokenizer

    @property
    def vocab_size(self) -> int:
        """The number of different tokens: V, four more than the text's tokenizer has."""
        return self.of_text.vocab_size + len(CHAT_TOKENS)

    def id_of(self, name: str) -> int:
        """The id of one of ``CHAT_TOKENS``."""
        return self.of_text.vocab_size + CHAT_TOKENS.index(name)

    def name_of(self, token: int) -> str | None:
        """The name of the token among ``CHAT_TOKENS``; None for a token of text."""
        place = int(token) - self.of_text.vocab_size
        return CHAT_TOKENS[place] if place >= 0 else None

    def encode(self, text: str) -> Ids:
        """The ids of ``text``; none of them is a token of the chat.

        Raises:
            UserError: as the ``encode`` of the text's tokenizer.
        """
        return self.of_text.encode(text)

    def decode(self, ids: AnyIds) -> str:
        """The text of a one-dimensional array of ids, without the tokens of the chat.

        Raises:
            UserError: ``ids`` is not one-dimensional, not integer, or holds an id that is not in the vocabulary.
        """
        return self.of_text.decode(self._text_in(_checked_row(ids, self.vocab_size)))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as ids arrive; the joined pieces are what ``decode`` makes of all ids.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        known = (int(token) for row in ids for token in self._text_in(checked([row], self.vocab_size)))
        return self.of_text.stream(known)

    def bytes_of(self, ids: AnyIds) -> int:
        """The number of UTF-8 bytes that the ids, of any shape, stand for; none for a token of the chat.

        Raises:
            UserError: ``ids`` is not integer, or holds an id that is not in the vocabulary.
        """
        return self.of_text.bytes_of(self._text_in(checked(ids, self.vocab_size)))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; ``from_dict`` makes the tokenizer again."""
        return {"kind": self.kind, "of_text": self.of_text.to_dict()}

    def _text_in(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
        """The ids that stand for text, as one row."""
        return ids[ids < self.of_text.vocab_size]


Tokenizer: TypeAlias = CharTokenizer | ByteTokenizer | ChatTokenizer


def with_chat_tokens(tokenizer: Tokenizer) -> ChatTokenizer:
    """The tokenizer with the ids of ``CHAT_TOKENS`` after its own; one that has them already is returned as it is.

    Raises:
        UserError: ``tokenizer`` is not one of minimoe's own.
    """
    if isinstance(tokenizer, ChatTokenizer):
        return tokenizer
    if isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        return ChatTokenizer(tokenizer)
    raise UserError(
        f"A {type(tokenizer).__name__} cannot be given ids for a chat: use a char or a byte tokenizer, since a "
        "pretrained one has ids of its own."
    )


def build(kind: str, text: str) -> Tokenizer:
    """The tokenizer of this kind for a training text; a byte tokenizer does not depend on the text.

    Raises:
        UserError: ``kind`` is neither 'char' nor 'byte', or it is 'char' and the text is empty.
    """
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        # On a long text, this is several times faster than the plain form, sorted(set(text)).
        points = np.flatnonzero(np.bincount(_code_points(text)))
        return CharTokenizer("".join(map(chr, points.tolist())))
    raise UserError(f"The tokenizer {kind!r} is unknown; use 'char' or 'byte'.")


def from_dict(d: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that ``to_dict`` described.

    Raises:
        UserError: ``d`` is not such a description.
    """
    match dict(d) if isinstance(d, Mapping) else d:
        case {"kind": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"kind": "char", "characters": str(characters), **rest} if not rest:
            return CharTokenizer(characters)
        case {"kind": "chat", "of_text": {"kind": "byte" | "char"}, **rest} if not rest:
            of_text: Any = d["of_text"]
            return with_chat_tokens(from_dict(of_text))
    described = repr(d)
    raise UserError(
        f"The tokenizer description {described[:80]}{'…' * (len(described) > 80)} is malformed, expected "
        "{'kind': 'byte'}, {'kind': 'char', 'characters': '…'} or {'kind': 'chat', 'of_text': {…}}; use a file that "
        "minimoe wrote."
    )


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    # Lone surrogates pass here so that they are reported as characters that the tokenizer does not know.
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def _shown(characters: Iterable[str], at_most: int = 5) -> str:
    """Characters for an error message, quoted so that a tab or a control character is visible."""
    found = list(characters)
    more = len(found) - at_most
    return ", ".join(map(repr, found[:at_most])) + (f" and {more} more" if more > 0 else "")


def _checked_row(ids: AnyIds, vocab_size: int) -> npt.NDArray[np.integer[Any]]:
    return checked(ids, vocab_size, axes=(1,), what="Token ids to decode")
