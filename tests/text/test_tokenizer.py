"""Tokenizers: exact round trips, streams that never tear a character, errors that name what was wrong."""

import json
import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.text.tokenizer import (
    CHAT_TOKENS,
    KINDS,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    build,
    from_dict,
    with_chat_tokens,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)  # Cs: surrogates, which are not characters
MIXED = "deed, été, 中文, 🦊🦊\n\t\0"


@given(TEXT, st.sampled_from(KINDS))
def test_decode_undoes_encode(text: str, kind: str) -> None:
    tokenizer = build(kind, text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert "".join(tokenizer.stream(ids)) == text


@given(TEXT, st.sampled_from(KINDS))
def test_bytes_of_counts_utf8_bytes(text: str, kind: str) -> None:
    tokenizer = build(kind, text)
    assert tokenizer.bytes_of(tokenizer.encode(text)) == len(text.encode())


@given(TEXT, st.sampled_from(KINDS))
def test_from_dict_undoes_to_dict_through_json(text: str, kind: str) -> None:
    tokenizer = build(kind, text)
    assert from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_char_ids_are_indices_into_sorted_characters() -> None:
    tokenizer = build("char", "deed")
    assert tokenizer == CharTokenizer("de")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("char", 2)
    assert tokenizer.encode("deed").tolist() == [0, 1, 1, 0]
    assert tokenizer.decode([1, 0]) == "ed"


@given(TEXT)
def test_char_ids_agree_with_a_dictionary(text: str) -> None:
    id_of = {character: i for i, character in enumerate(sorted(set(text)))}
    tokenizer = build("char", text)
    assert tokenizer.vocab_size == len(id_of)
    assert tokenizer.encode(text).tolist() == [id_of[character] for character in text]


def test_byte_ids_are_utf8() -> None:
    tokenizer = build("byte", "")
    assert tokenizer == ByteTokenizer()
    assert (tokenizer.kind, tokenizer.vocab_size) == ("byte", 256)
    assert tokenizer.encode("aé").tolist() == [0x61, 0xC3, 0xA9]


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer()])
def test_nothing_encodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode([]) == ""
    assert list(tokenizer.stream([])) == []
    assert tokenizer.bytes_of([]) == 0


def test_encoded_ids_can_be_written_to() -> None:
    ids = ByteTokenizer().encode("ab")
    ids[0] = 98
    assert ByteTokenizer().decode(ids) == "bb"


@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_is_encoded_at_once(kind: str) -> None:
    text = "".join(map(chr, range(32, 97))) * 16_000
    tokenizer = build(kind, text)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        tokenizer.encode(text)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_unseen_characters_are_named_quoted_and_counted() -> None:
    tokenizer = build("char", "abc")
    with pytest.raises(UserError) as caught:
        tokenizer.encode("a\tb\x07éXYZé\t")
    message = str(caught.value)
    assert r"'\t', '\x07', 'é', 'X', 'Y' and 1 more" in message
    assert "3 characters" in message
    assert "--tokenizer byte" in message


@pytest.mark.parametrize("unseen", ["\0", "`", "d", "\uffff", "\U0010ffff", "\ud800"])
def test_unseen_characters_below_above_and_beside_the_known_ones(unseen: str) -> None:
    with pytest.raises(UserError, match="knows only the 3 characters"):
        build("char", "abc").encode("ab" + unseen)


def test_a_gap_between_known_characters_is_unseen() -> None:
    with pytest.raises(UserError, match="'b'"):
        build("char", "ac").encode("abc")


def test_all_of_unicode_can_be_known() -> None:
    text = "\0\U0010ffff"
    tokenizer = build("char", text)
    assert tokenizer.encode(text[::-1]).tolist() == [1, 0]


@pytest.mark.parametrize("ids", [[0, 2], [-1], np.array([[300, 0]]), np.array([2**63], dtype=np.uint64)])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    tokenizer = CharTokenizer("ab")
    outside = next(int(i) for i in np.ravel(ids) if not 0 <= i < 2)
    with pytest.raises(UserError, match=f"Token id {outside} .* vocabulary of 2; use ids from 0 to 1"):
        tokenizer.bytes_of(ids)
    with pytest.raises(UserError, match=f"Token id {outside} "):
        tokenizer.decode(np.ravel(ids))
    with pytest.raises(UserError, match=f"Token id {outside} "):
        list(tokenizer.stream(np.ravel(ids)))


@pytest.mark.parametrize("outside", [-1, 256])
def test_ids_that_are_no_bytes_are_refused(outside: int) -> None:
    for use in (ByteTokenizer().decode, ByteTokenizer().bytes_of, lambda ids: list(ByteTokenizer().stream(ids))):
        with pytest.raises(UserError, match=f"Token id {outside} .* vocabulary of 256"):
            use([65, outside])


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer()])
def test_ids_must_be_integers_in_one_row(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="integers, got float64"):
        tokenizer.decode(np.array([0.0, 1.0]))
    with pytest.raises(UserError, match="integers, got bool"):
        tokenizer.bytes_of(np.array([True]))
    with pytest.raises(UserError, match=r"one row, got shape \(2, 1\)"):
        tokenizer.decode(np.array([[0], [1]]))


def test_bytes_of_takes_any_shape() -> None:
    tokenizer = build("char", "aé中🦊")
    ids = tokenizer.encode("aé中🦊").reshape(2, 2)
    assert tokenizer.bytes_of(ids) == 1 + 2 + 3 + 4
    assert ByteTokenizer().bytes_of(ids) == 4


def test_bits_per_byte_of_a_uniform_guess() -> None:
    ids = ByteTokenizer().encode(MIXED)
    nats = len(ids) * math.log(256)
    assert nats / math.log(2) / ByteTokenizer().bytes_of(ids) == pytest.approx(8)


def test_stream_holds_back_the_bytes_of_a_character_until_it_is_whole() -> None:
    arrived: list[int] = []

    def ids() -> Iterator[int]:
        for token in "aé🦊b".encode():
            arrived.append(token)
            yield token

    pieces = [(piece, len(arrived)) for piece in ByteTokenizer().stream(ids())]
    assert pieces == [("a", 1), ("é", 3), ("🦊", 7), ("b", 8)]


@given(st.lists(st.integers(0, 255)))
def test_stream_of_any_bytes_is_what_decode_makes_of_them(ids: list[int]) -> None:
    pieces = list(ByteTokenizer().stream(ids))
    assert "".join(pieces) == ByteTokenizer().decode(ids) == bytes(ids).decode(errors="replace")
    assert "" not in pieces


def test_broken_utf8_becomes_the_replacement_mark() -> None:
    half_a_fox = "🦊".encode()[:2]
    assert ByteTokenizer().decode(list(b"a" + half_a_fox)) == "a\ufffd"
    assert list(ByteTokenizer().stream(b"a" + half_a_fox)) == ["a", "\ufffd"]


def test_surrogates_are_refused() -> None:
    with pytest.raises(UserError, match=r"'\\udc80'.*surrogate"):
        build("char", "a\udc80")
    with pytest.raises(UserError, match=r"'\\udc80'.*surrogate"):
        ByteTokenizer().encode("a\udc80")


@pytest.mark.parametrize(("characters", "problem"), [("", "got none"), ("ba", "in order"), ("aab", "each one once")])
def test_characters_must_be_sorted_and_unique(characters: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        CharTokenizer(characters)


def test_build_refuses_an_unknown_kind_and_an_empty_text() -> None:
    with pytest.raises(UserError, match="'bpe' is unknown; use 'char' or 'byte'"):
        build("bpe", "abc")
    with pytest.raises(UserError, match="at least one character"):
        build("char", "")


@pytest.mark.parametrize(
    "malformed",
    [
        {},
        {"kind": "char"},
        {"kind": "char", "characters": ["a"]},
        {"kind": "char", "characters": "ab", "merges": "ab"},
        {"kind": "byte", "characters": "ab"},
        {"kind": "bpe"},
        {"characters": "ab"},
        ["char"],
        None,
        {"kind": "chat"},
        {"kind": "chat", "of_text": "char"},
        {"kind": "chat", "of_text": {"kind": "chat", "of_text": {"kind": "byte"}}},
        {"kind": "chat", "of_text": {"kind": "byte"}, "roles": 3},
    ],
)
def test_from_dict_refuses_what_to_dict_never_wrote(malformed: object) -> None:
    with pytest.raises(UserError, match="malformed, expected"):
        from_dict(malformed)  # type: ignore[arg-type]


@given(TEXT, st.sampled_from(KINDS))
def test_chat_tokens_come_after_those_of_the_text_and_leave_its_ids_alone(text: str, kind: str) -> None:
    of_text = build(kind, text)
    tokenizer = with_chat_tokens(of_text)
    reserved = [tokenizer.id_of(name) for name in CHAT_TOKENS]
    assert reserved == list(range(of_text.vocab_size, tokenizer.vocab_size))
    assert [tokenizer.name_of(token) for token in reserved] == list(CHAT_TOKENS)
    assert tokenizer.name_of(reserved[0] - 1) is None
    assert tokenizer.encode(text).tolist() == of_text.encode(text).tolist()
    assert with_chat_tokens(tokenizer) is tokenizer
    assert from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


@given(TEXT, st.sampled_from(KINDS), st.data())
def test_chat_tokens_have_no_text_even_inside_of_a_character(text: str, kind: str, data: st.DataObject) -> None:
    tokenizer = with_chat_tokens(build(kind, text))
    ids = tokenizer.encode(text).tolist()
    for name in CHAT_TOKENS:
        ids.insert(data.draw(st.integers(0, len(ids))), tokenizer.id_of(name))
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text
    assert tokenizer.bytes_of([ids, ids]) == 2 * len(text.encode())
    for use in (tokenizer.decode, tokenizer.bytes_of, lambda row: list(tokenizer.stream(row))):
        for outside in (-1, tokenizer.vocab_size):
            with pytest.raises(UserError, match=f"Token id {outside} .* vocabulary of {tokenizer.vocab_size}"):
                use([*ids, outside])


def test_a_stream_gives_a_character_as_soon_as_it_is_there() -> None:
    arrived: list[int] = []
    tokenizer = with_chat_tokens(CharTokenizer("ab"))

    def ids() -> Iterator[int]:
        for token in (0, 5, 1):
            arrived.append(token)
            yield token

    assert [(piece, len(arrived)) for piece in tokenizer.stream(ids())] == [("a", 1), ("b", 3)]


def test_other_tokenizers_get_no_chat_tokens() -> None:
    with pytest.raises(UserError, match="A str cannot be given ids for a chat"):
        with_chat_tokens("char")  # type: ignore[arg-type]


def test_from_dict_checks_the_characters_too() -> None:
    with pytest.raises(UserError, match="in order"):
        from_dict({"kind": "char", "characters": "ba"})


def test_from_dict_shortens_what_it_quotes() -> None:
    with pytest.raises(UserError) as caught:
        from_dict({"kind": "char", "letters": "x" * 10_000})
    assert len(str(caught.value)) < 300


def test_tokenizers_are_frozen_values() -> None:
    tokenizer = CharTokenizer("ab")
    with pytest.raises(AttributeError):
        tokenizer.characters = "abc"  # type: ignore[misc]
    assert hash(tokenizer) == hash(CharTokenizer("ab"))
    assert build("byte", "a") == build("byte", "b")
