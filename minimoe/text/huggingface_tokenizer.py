"""The tokenizer of a Hugging Face folder, with the methods of ``minimoe.text.tokenizer``.

tokenizer.json holds a whole tokenizer, including its vocabulary of word pieces and its rules. It is read by the
``tokenizers`` library, an optional dependency: ``pip install "minimoe[hf]"``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minimoe.core.errors import UserError
from minimoe.core.files import write_atomically
from minimoe.text.tokenizer import AnyIds, ByteTokenizer, Ids, Tokenizer

FILE = "tokenizer.json"


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer of word pieces. Encoding adds the special tokens that the model expects; decoding leaves them out."""

    kind: ClassVar[str] = "pretrained"
    library: Any  # tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's V may be larger, and then its last rows are unused."""
        return 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> Ids:
        """The ids of ``text`` as an int32 array, after a beginning-of-text token if the model expects one.

        Raises:
            UserError: the tokenizer cannot encode this text.
        """
        try:
            return np.array(self.library.encode(text).ids, dtype=np.int32)
        except Exception as error:  # the library has no exception class of its own
            raise UserError(f"The tokenizer cannot encode {text[:40]!r} ({error}): use other characters.") from None

    def decode(self, ids: AnyIds) -> str:
        """The text of a one-dimensional array of ids, without special tokens.

        Raises:
            UserError: ``ids`` is not one-dimensional, not integer, or holds a negative id.
        """
        array = np.asarray(ids, dtype=None if len(ids) else np.int32)
        if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any():
            raise UserError(f"Token ids to decode must be one row of whole numbers from 0 up, got {array!r:.80}.")
        return str(self.library.decode(array.tolist()))

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
        """The number of UTF-8 bytes that the ids, of any shape, stand for; of a cut character, those that are there."""
        text = self.decode(np.asarray(ids).reshape(-1))
        return len(text.replace("\ufffd", "?").encode())  # U+FFFD: one for each byte that is not part of a character


def load(folder: str | Path) -> PretrainedTokenizer:
    """Reads tokenizer.json.

    Raises:
        UserError: the ``tokenizers`` library is not installed, or the file is missing or damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: save the model's tokenizer there as a fast tokenizer of transformers.")
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise UserError(f'{path} needs the tokenizers library: run `pip install "minimoe[hf]"`.') from None
    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library has no exception class of its own
        raise UserError(f"{path} is not a tokenizer ({error}): download it again.") from None
    library.no_truncation()
    library.no_padding()
    return PretrainedTokenizer(library)


def write(path: Path, tokenizer: Tokenizer | PretrainedTokenizer) -> None:
    """Writes tokenizer.json, and tokenizer_config.json, which names the transformers class that reads it unchanged.

    Without that name, transformers uses its default class for a Mixtral, which adds a beginning-of-text token.

    Raises:
        UserError: a file cannot be written.
    """
    if isinstance(tokenizer, PretrainedTokenizer):
        content = tokenizer.library.to_str(pretty=True)
    else:
        content = json.dumps(_to_dict(tokenizer), indent=2, ensure_ascii=False)
    write_atomically(path / FILE, content.encode())
    write_atomically(path / "tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


def _to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of one of minimoe's own tokenizers: a vocabulary, and no rule that joins two tokens.

    There is no token for characters that the char tokenizer does not know, so the library refuses them too.
    """
    model: dict[str, Any]
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
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
