"""The tokenizer of a Hugging Face folder, with the methods of ``minimoe.text.tokenizer``.

    tokenizer.json                                     the vocabulary of word pieces, and the rules
    tokenizer_config.json, special_tokens_map.json, …  FILES: not used here, but kept, so that they can be written again

tokenizer.json is read by the ``tokenizers`` library, an optional dependency: ``pip install "minimoe[hf]"``. The library
is only ever called through ``_ask``, which turns all its failures into a ``UserError``. The files come from a stranger,
so the rules are examined before they are used: no rule may turn a short text into a very long one.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from minimoe.core.errors import UserError
from minimoe.core.files import read_text, user_path, write_atomically
from minimoe.core.ids import checked
from minimoe.text.tokenizer import CHAT_TOKENS, AnyIds, ByteTokenizer, ChatTokenizer, Ids, Tokenizer

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
FILES = (SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja")
"""The files that may stand beside tokenizer.json and say more about the tokenizer."""

READS_UNCHANGED = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # not the class for a Mixtral, which adds a beginning-of-text token
    "clean_up_tokenization_spaces": False,  # older versions remove the space before punctuation unless told not to
    "model_input_names": ["input_ids", "attention_mask"],  # older versions add what a Mixtral does not accept
}
"""Settings of tokenizer_config.json with which every version of transformers follows tokenizer.json as it is."""

GROWTH = 64
"""How many times as long the rules of a tokenizer may make a text. Unicode's own normal forms reach 18."""

LONGEST_PIECE = 10_000
"""The largest number of letters of a token."""

LONGEST_WORD = 10_000
"""The largest ``max_input_chars_per_word``: WordPiece takes time in proportion to the square of a word's length."""


@dataclass(frozen=True, repr=False, eq=False)
class PretrainedTokenizer:
    """A tokenizer of word pieces. Encoding adds the special tokens that the model expects; decoding leaves them out."""

    kind: ClassVar[str] = "pretrained"
    backend: Any  # tokenizers.Tokenizer
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by name: what was read

    def __eq__(self, other: object) -> bool:
        """Whether both have the same rules: one that is read a second time is another object of the library."""
        return isinstance(other, PretrainedTokenizer) and self._rules == other._rules

    def __hash__(self) -> int:
        return hash(self.vocab_size)

    def __repr__(self) -> str:
        return f"PretrainedTokenizer of {self.vocab_size:,} tokens"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's V may be larger, and the last rows of the model are then unused."""
        return 1 + max(_ask(self.backend, "get_vocab", with_added_tokens=True).values(), default=-1)

    @property
    def text_size(self) -> int:
        """One more than the largest id that plain text can give.

        A special token such as ``<pad>`` results only if the text contains its name. The exceptions are the special
        tokens that are added to every text, and the token for unknown characters.
        """
        ids = set(_ask(self.backend, "get_vocab", with_added_tokens=True).values()) - self._special
        with contextlib.suppress(_LibraryError):
            ids.update(_ask(self.backend, "encode", "").ids)
        model = self._rules.get("model") or {}
        bytes_known = model.get("byte_fallback") and all(
            _ask(self.backend, "token_to_id", f"<0x{byte:02X}>") is not None for byte in range(256)
        )
        if not bytes_known:
            unknown = model.get("unk_token")
            ids.add(_ask(self.backend, "token_to_id", unknown) if isinstance(unknown, str) else model.get("unk_id"))
        return 1 + max((token for token in ids if token is not None), default=-1)

    def encode(self, text: str) -> Ids:
        """The ids of ``text`` as an int32 array, after a beginning-of-text token if the model expects one.

        Raises:
            UserError: the tokenizer cannot encode this text.
        """
        try:
            return np.array(_ask(self.backend, "encode", text).ids, dtype=np.int32)
        except _LibraryError as error:
            raise UserError(
                f"The tokenizer cannot encode {text[:40]!r} ({error.reason}): use other characters."
            ) from None

    def encode_text(self, text: str) -> Ids:
        """The ids of ``text`` and of nothing else: no special id is added, and a text such as "</s>" is only letters.

        Raises:
            UserError: the tokenizer cannot encode this text.
        """
        try:
            return np.array(_ask(self._text_backend, "encode", text, add_special_tokens=False).ids, dtype=np.int32)
        except _LibraryError as error:
            raise UserError(
                f"The tokenizer cannot encode {text[:40]!r} ({error.reason}): use other characters."
            ) from None

    def decode(self, ids: AnyIds) -> str:
        """The text of a one-dimensional array of ids, without special tokens.

        Raises:
            UserError: ``ids`` is not one-dimensional, not integer, or holds a negative id; or the tokenizer cannot
                decode them.
        """
        try:
            array = checked(ids, 2**31, axes=(1,))
        except UserError:
            raise UserError(
                f"Token ids to decode must be one row of whole numbers from 0 up, got {ids!r:.80}: pass what encode "
                "returned."
            ) from None
        try:
            return str(_ask(self.backend, "decode", array.tolist()))
        except _LibraryError as error:
            raise UserError(f"The tokenizer cannot decode {ids!r:.80} ({error.reason}): download it again.") from None

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as ids arrive, never half of a character. The joined pieces are what ``decode`` makes of all ids.

        The text of a piece depends on the piece before it (the first word of a text has no space in front), so a
        continuation must be streamed together with its prompt.
        """
        known: list[int] = []  # the ids of the last piece that was yielded
        new: list[int] = []
        for token in ids:
            new.append(token)
            piece = self.decode(known + new)[len(self.decode(known)) :]
            if piece and not piece.endswith("\ufffd"):  # U+FFFD: the last bytes of a character are still missing
                yield piece
                known, new = new, []
        if rest := self.decode(known + new)[len(self.decode(known)) :]:
            yield rest

    def bytes_of(self, ids: AnyIds) -> int:
        """The number of UTF-8 bytes of the ids, of any shape; an incomplete character counts the bytes that it has."""
        row = np.asarray(ids).reshape(-1)
        text = self.decode(row)
        size = len(text.encode())
        if "\ufffd" in text:  # either the text has this character, or it stands for bytes that are not a character
            pieces = [piece for token in row.tolist() if token not in self._special and (piece := self.name_of(token))]
            size += sum(len(raw) - len(shown.encode()) for raw, shown in self._bytes_in(pieces))
        return size

    def name_of(self, token: int) -> str | None:
        """How the vocabulary writes a token, such as ``▁the``, ``<0x0A>`` or ``<s>``; None for an unknown id."""
        try:
            name = _ask(self.backend, "id_to_token", int(token))
        except _LibraryError as error:
            raise UserError(
                f"The tokenizer has no token {token} ({error.reason}): use an id of its vocabulary."
            ) from None
        return None if name is None else str(name)

    def id_of(self, name: str) -> int | None:
        """The id of the token that the vocabulary writes as ``name``; None if there is none."""
        token = _ask(self.backend, "token_to_id", name)
        return None if token is None else int(token)

    def beside(self, name: str, content: str) -> PretrainedTokenizer:
        """A copy of the tokenizer that also keeps the file ``name``."""
        return dataclasses.replace(self, files={**self.files, name: content})

    @cached_property
    def _text_backend(self) -> Any:
        """A copy of the backend that reads no special token from a text."""
        copy = _ask(type(self.backend), "from_str", _ask(self.backend, "to_str"))
        copy.encode_special_tokens = True  # the library's name: special tokens are encoded like other text
        return copy

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """The object in tokenizer.json."""
        rules: dict[str, Any] = json.loads(self.files.get(FILE) or _ask(self.backend, "to_str"))
        return rules

    @cached_property
    def _special(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(token["id"] for token in self._rules.get("added_tokens") or () if token.get("special"))

    def _bytes_in(self, pieces: list[str]) -> Iterator[tuple[bytes, str]]:
        """The parts of a text that its pieces give as bytes: those bytes, and what the decoder shows for them."""
        kinds = {rule.get("type") for rule in _steps(self._rules.get("decoder"))}
        if "ByteLevel" in kinds:  # each letter stands for a byte
            raw = b"".join(
                bytes(BYTE_OF[letter] for letter in piece) if BYTE_OF.keys() >= set(piece) else piece.encode()
                for piece in pieces
            )
            yield raw, raw.decode(errors="replace")
        elif "ByteFallback" in kinds:  # some pieces stand for a byte; a run of them is shown whole, or byte by byte
            for found, run in groupby(pieces, lambda piece: re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) is not None):
                if found:
                    raw = bytes(int(piece[3:5], 16) for piece in run)
                    try:
                        yield raw, raw.decode()
                    except UnicodeDecodeError:
                        yield raw, "\ufffd" * len(raw)


@dataclass(frozen=True)
class MissingTokenizer:
    """Replaces a tokenizer that is not available: the model can be used with ids, and every text is refused."""

    kind: ClassVar[str] = "missing"
    reason: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)  # as for ``PretrainedTokenizer``

    @property
    def vocab_size(self) -> int:
        """Unknown: raises ``UserError``, as does everything that needs a tokenizer."""
        self._refuse()

    def encode(self, text: str) -> Ids:
        self._refuse()

    def decode(self, ids: AnyIds) -> str:
        self._refuse()

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        self._refuse()

    def bytes_of(self, ids: AnyIds) -> int:
        self._refuse()

    def beside(self, name: str, content: str) -> MissingTokenizer:
        """A copy that also keeps the file ``name``."""
        return dataclasses.replace(self, files={**self.files, name: content})

    def _refuse(self) -> NoReturn:
        raise UserError(self.reason)


class _NoTokenizerError(UserError):
    """There is no tokenizer.json, or no library to read it."""


class _LibraryError(UserError):
    """The library could not do what it was asked to do; ``reason`` is what it said."""

    def __init__(self, method: str, reason: str) -> None:
        super().__init__(f"The tokenizers library fails in {method} ({reason}): download the tokenizer again.")
        self.reason = reason


def _ask(library: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the library; raises ``_LibraryError`` however the call fails, even if the library panics."""
    try:
        return getattr(library, method)(*args, **kwargs)
    except BaseException as error:
        # The library has no exception class of its own, and its panics are not even an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _LibraryError(method, " ".join(str(error).split())[:200] or type(error).__name__) from None
        raise


def load(folder: str | Path) -> PretrainedTokenizer:
    """Reads tokenizer.json and the files beside it.

    Raises:
        UserError: the ``tokenizers`` library is not installed; a file is missing or damaged; or the rules can make a
            text more than ``GROWTH`` times as long.
    """
    path = user_path(folder) / FILE
    if not os.path.lexists(path):
        raise _NoTokenizerError(
            f"{path} does not exist: save the model's tokenizer there as a fast tokenizer of transformers."
        )
    try:
        from tokenizers import Tokenizer as Library
    except ModuleNotFoundError:
        raise _NoTokenizerError(f'{path} needs the tokenizers library: run `pip install "minimoe[hf]"`.') from None
    except Exception as error:
        raise _NoTokenizerError(
            f"{path} needs the tokenizers library, which fails ({error!r:.200}): install it again."
        ) from None
    try:
        content = read_text(path)
        rules = json.loads(content)
        if not isinstance(rules, dict):
            raise ValueError(f"it holds a {type(rules).__name__}, expected an object")
        _check_rules(rules, path)
        library = _ask(Library, "from_str", content)
        _ask(library, "no_truncation")
        _ask(library, "no_padding")
        return PretrainedTokenizer(library, {FILE: content, **_read_beside(path.parent)})
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, UserError) and not isinstance(error, _LibraryError):
            raise
        reason = error.reason if isinstance(error, _LibraryError) else error
        raise UserError(f"{path} is not a tokenizer ({reason}): download it again.") from None


def find(folder: str | Path) -> PretrainedTokenizer | MissingTokenizer:
    """``load``, or a ``MissingTokenizer`` if there is no tokenizer.json, or no library to read it."""
    try:
        return load(folder)
    except _NoTokenizerError as error:
        return MissingTokenizer(str(error), _read_beside(user_path(folder)))


def _read_beside(folder: Path) -> dict[str, str]:
    """The contents of the ``FILES`` that exist; raises ``UserError`` if one cannot be read."""
    contents = {}
    for name in FILES:
        path = folder / name
        if os.path.lexists(path):
            try:
                contents[name] = read_text(path)
                if path.suffix == ".json" and not isinstance(json.loads(contents[name]), dict):
                    raise ValueError("it does not hold an object")
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{path} cannot be read ({error}): download it again, or remove it.") from None
    return contents


def _check_rules(rules: Mapping[str, Any], path: Path) -> None:
    """Raises ``UserError`` if the rules can make a long text of a short one, or take a very long time for a word."""
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1
        for rule in _steps(rules.get(part)):
            growth *= _growth(rule)
            if growth > GROWTH:
                raise UserError(
                    f"{path} has a {part} that can make a text {growth:,} times as long, expected at most {GROWTH}: do "
                    "not use this tokenizer."
                )
    model = rules.get("model") or {}
    pieces = [piece if isinstance(piece, str) else str(piece[0]) for piece in model.get("vocab") or ()]
    pieces += [str(token.get("content", "")) for token in rules.get("added_tokens") or ()]
    if (longest := max(map(len, pieces), default=0)) > LONGEST_PIECE:
        raise UserError(
            f"{path} has a token of {longest:,} letters, expected at most {LONGEST_PIECE:,}: do not use this tokenizer."
        )
    most = model.get("max_input_chars_per_word", 0)
    if isinstance(most, int) and most > LONGEST_WORD:
        raise UserError(
            f"{path} allows words of max_input_chars_per_word {most:,}, expected at most {LONGEST_WORD:,}: do not use "
            "this tokenizer."
        )


def _steps(rule: Any) -> list[dict[str, Any]]:
    """The rules that a rule consists of, in order: a sequence may contain sequences."""
    if not isinstance(rule, dict):
        return []
    inside = [
        step
        for name in ("normalizers", "pretokenizers", "processors", "decoders")
        for one in (rule[name] if isinstance(rule.get(name), list) else ())
        for step in _steps(one)
    ]
    return [rule, *inside]


def _growth(rule: Mapping[str, Any]) -> int:
    """An upper bound of the factor by which a rule can make a text longer."""
    kind = rule.get("type")
    if kind == "Replace":
        content, pattern = len(str(rule.get("content", ""))), rule.get("pattern")
        string = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(string, str) and string:
            return max(1, -(-content // len(string)))
        return 1 + content  # a regular expression may also match between two letters
    if kind == "Prepend":
        return max(1, len(str(rule.get("prepend", ""))))
    if kind == "ByteLevel":
        return 4  # letters for a character of four bytes
    if kind == "Precompiled":  # a table of characters, then the texts that replace them
        data = base64.b64decode(str(rule.get("precompiled_charsmap", "")))
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
        return max(1, *(len(text.decode(errors="replace")) for text in texts))
    if kind == "TemplateProcessing":
        pieces, special = rule.get("single") or [], rule.get("special_tokens") or {}
        added = sum(len(token.get("ids") or ()) for token in special.values())
        return max(1, sum("Sequence" in piece for piece in pieces) + max(len(pieces), added) // GROWTH)
    if kind == "BPEDecoder":
        return 1 if rule.get("suffix", "</w>") else 2  # an empty suffix becomes a space between any two letters
    if kind in ("WordPiece", "CTC"):
        return 1 if rule.get("prefix", "##") and rule.get("word_delimiter_token", "|") else 2
    return 1


def _letters_of_bytes() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: a space, for example, is written Ġ.

    A byte that is a visible Latin-1 character is written as this character; the others follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _letters_of_bytes()


def write(path: Path, tokenizer: Tokenizer | PretrainedTokenizer | MissingTokenizer) -> None:
    """Writes tokenizer.json, tokenizer_config.json, and the other files that were read with them.

    All files are written unchanged, but tokenizer_config.json is completed by ``READS_UNCHANGED``, without which some
    versions of transformers do not follow tokenizer.json.

    Raises:
        UserError: a file cannot be written.
    """
    if isinstance(tokenizer, PretrainedTokenizer | MissingTokenizer):
        contents = {name: tokenizer.files[name] for name in (FILE, *FILES) if name in tokenizer.files}
        if isinstance(tokenizer, PretrainedTokenizer) and FILE not in contents:
            contents[FILE] = _ask(tokenizer.backend, "to_str", pretty=True)
    else:
        contents = {FILE: json.dumps(_to_dict(tokenizer), indent=2, ensure_ascii=False)}
    if FILE in contents:
        settings = READS_UNCHANGED | json.loads(contents.get(SETTINGS, "{}"))
        contents[SETTINGS] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    for name, content in contents.items():
        write_atomically(path / name, content.encode(errors="backslashreplace"))


def written_as(name: str) -> str:
    """How tokenizer.json writes one of ``CHAT_TOKENS``: ``<|user|>``."""
    return f"<|{name}|>"


def _to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of one of minimoe's own tokenizers: a vocabulary, and no rule that joins two tokens.

    There is no token for characters that the char tokenizer does not know, so the library refuses them too. The tokens
    of a chat become special tokens. Unlike minimoe, the library reads these from a text that contains their names.
    """
    model: dict[str, Any]
    added: list[dict[str, Any]] = []
    if isinstance(tokenizer, ChatTokenizer):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": tokenizer.id_of(name), "content": written_as(name), **plain} for name in CHAT_TOKENS]
        tokenizer = tokenizer.of_text
    if isinstance(tokenizer, ByteTokenizer):
        model = {
            "type": "BPE",
            "vocab": {f"<0x{byte:02X}>": byte for byte in range(256)},  # as the library writes a byte
            "merges": [],
            "byte_fallback": True,
        }
        splitter, decoders = None, [{"type": "ByteFallback"}, {"type": "Fuse"}]
    else:
        model = {
            "type": "WordLevel",
            "vocab": {character: i for i, character in enumerate(tokenizer.characters)},
            "unk_token": "",
        }
        every_character = {"Regex": r"[\s\S]"}
        splitter = {"type": "Split", "pattern": every_character, "behavior": "Isolated", "invert": False}
        decoders = [{"type": "Fuse"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
