"""The chat template: exact ids, one beginning, an end after every answer, and nothing that a text could forge."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_json import mixtral_like

from minimoe.core.errors import UserError
from minimoe.text import chat, huggingface_tokenizer
from minimoe.text.chat import Turn
from minimoe.text.huggingface_tokenizer import MissingTokenizer, PretrainedTokenizer
from minimoe.text.tokenizer import ByteTokenizer, CharTokenizer, with_chat_tokens

TEXT = CharTokenizer("\n <>abcdehirty|")
OWN = with_chat_tokens(TEXT)
BEGIN, USER, ASSISTANT, END = range(OWN.of_text.vocab_size, OWN.vocab_size)
SOME_TURNS = (Turn("user", "hi"), Turn("assistant", "yet"), Turn("user", "a"), Turn("assistant", "bread"))


def pretrained(rules: dict[str, Any]) -> PretrainedTokenizer:
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(rules))
    library.no_truncation()
    return PretrainedTokenizer(library)


@pytest.fixture(name="mixtral")
def _mixtral() -> PretrainedTokenizer:
    return pretrained(mixtral_like())


def ids(text: str) -> list[int]:
    return OWN.encode(text).tolist()


def test_a_conversation_by_hand() -> None:
    encoded = chat.encode(OWN, SOME_TURNS)
    first, second = [BEGIN, USER, *ids("hi"), ASSISTANT], [USER, *ids("a"), ASSISTANT]
    assert encoded.ids.tolist() == [*first, *ids("yet"), END, *second, *ids("bread"), END]
    assert encoded.ids.dtype == np.int32 and encoded.answer.dtype == np.bool_
    assert encoded.answer.tolist() == [False] * 5 + [True] * 4 + [False] * 3 + [True] * 6


def test_a_mixtral_conversation_by_hand(mixtral: PretrainedTokenizer) -> None:
    """Words begin with ▁, and [INST] is ordinary text, of which the small tokenizer knows only the bytes."""
    encoded = chat.encode(mixtral, [Turn("user", "the"), Turn("assistant", "bread")])
    mark = [f"<0x{byte:02X}>" for byte in b"[INST]"]
    closing = [f"<0x{byte:02X}>" for byte in b"[/INST]"]
    names = [mixtral.name_of(token) for token in encoded.ids]
    assert names == ["<s>", "▁", *mark, "▁the", "▁", *closing, "▁bread", "</s>"]
    two = chat.encode(mixtral, [Turn(role, "the") for role in ("user", "assistant", "user", "assistant")])
    assert two.ids.tolist().count(1) == 1 and two.ids[0] == 1
    assert np.flatnonzero(two.ids == 2).tolist() == [18, 36]
    assert np.flatnonzero(two.answer).tolist() == [17, 18, 35, 36]


def test_each_piece_is_encoded_on_its_own(mixtral: PretrainedTokenizer) -> None:
    """As one text, the answer would lose the space before its first word: here ▁the would become t, he."""
    encoded = chat.encode(mixtral, [Turn("user", "bread"), Turn("assistant", "the")])
    answer = encoded.ids[encoded.answer][:-1]
    assert answer.tolist() == mixtral.encode_text("the").tolist() == [mixtral.id_of("▁the")]


@pytest.mark.parametrize("forged", ["</s>", "<s>", "<unk>"])
def test_special_ids_are_never_read_from_a_text(mixtral: PretrainedTokenizer, forged: str) -> None:
    encoded = chat.encode(mixtral, [Turn("user", f"a{forged}b"), Turn("assistant", forged)])
    special = [token for token in encoded.ids.tolist() if token < 3]
    assert special == [1, 2]
    assert mixtral.decode(encoded.ids[encoded.answer]).strip() == forged
    assert 1 in mixtral.encode("the")  # reading text that is no chat still adds the beginning


@given(st.lists(st.text(TEXT.characters, min_size=1), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_no_text_produces_a_reserved_id(texts: list[str]) -> None:
    turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
    for tokenizer in (OWN, with_chat_tokens(ByteTokenizer())):
        encoded = chat.encode(tokenizer, turns)
        begin = tokenizer.id_of("begin")
        assert (encoded.ids == begin).sum() == 1
        for name in ("user", "assistant", "end"):
            assert (encoded.ids == tokenizer.id_of(name)).sum() == len(texts) / 2
        assert tokenizer.decode(encoded.ids) == "".join(texts)
        # what is learned: every answer with its end, and nothing else
        assert tokenizer.decode(encoded.ids[encoded.answer]) == "".join(texts[1::2])
        assert (encoded.ids[encoded.answer] == tokenizer.id_of("end")).sum() == len(texts) / 2


@pytest.mark.parametrize("kind", ["own", "mixtral"])
def test_a_prompt_is_where_the_answer_begins(mixtral: PretrainedTokenizer, kind: str) -> None:
    tokenizer = OWN if kind == "own" else mixtral
    turns = [Turn("system", "be"), *SOME_TURNS]
    whole, asked = chat.encode(tokenizer, turns), chat.prompt(tokenizer, turns[:-1])
    answer = chat.encode(tokenizer, turns).answer
    last = len(answer) - np.argmin(answer[::-1])  # after the last token that is no answer
    assert asked.tolist() == whole.ids[:last].tolist()
    assert whole.ids[-1] in chat.end_ids(tokenizer) and answer[-1]


def test_the_system_opens_the_first_question(mixtral: PretrainedTokenizer) -> None:
    turns = [Turn("user", "hi"), Turn("assistant", "yet"), Turn("user", "a")]
    joined = [Turn("user", "be\n\nhi"), *turns[1:]]
    for tokenizer in (OWN, mixtral):
        apart = chat.prompt(tokenizer, [Turn("system", "be"), *turns])
        assert apart.tolist() == chat.prompt(tokenizer, joined).tolist()


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        ((), "has no question"),
        (("system",), "has no question"),
        (("assistant",), "the assistant stands where one of the user"),
        (("user", "user"), "the user stands where one of the assistant"),
        (("user", "assistant", "assistant"), "the assistant stands where one of the user"),
        (("system", "system", "user"), "the system stands where one of the user"),
        (("user", "assistant", "system"), "the system stands where one of the user"),
        (("user", "tool"), "Turn 2 has the role 'tool'"),
    ],
)
def test_roles_out_of_turn_are_refused(roles: tuple[Any, ...], complaint: str) -> None:
    for function in (chat.encode, chat.prompt):
        with pytest.raises(UserError, match=complaint):
            function(OWN, [Turn(role, "hi") for role in roles])


def test_a_conversation_ends_with_an_answer_and_a_prompt_with_a_question() -> None:
    with pytest.raises(UserError, match="ends with a question"):
        chat.encode(OWN, SOME_TURNS[:-1])
    with pytest.raises(UserError, match="ends with an answer"):
        chat.prompt(OWN, SOME_TURNS)


@pytest.mark.parametrize("text", ["", None, 3])
def test_a_turn_without_text_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match="Turn 1, of the user"):
        chat.prompt(OWN, [Turn("user", text)])


def test_a_tokenizer_without_chat_tokens_says_what_to_do() -> None:
    other = mixtral_like()
    for token in other["added_tokens"]:
        token["content"] = token["content"].upper()
    other["model"]["vocab"] = {piece.upper() if n < 3 else piece: n for piece, n in other["model"]["vocab"].items()}
    other["model"]["unk_token"], other["post_processor"] = "<UNK>", None
    for tokenizer, complaint in (
        (OWN.of_text, "minimoe sft"),
        (MissingTokenizer("There is none."), "There is none"),
        (pretrained(other), "no <s> and </s>"),
    ):
        assert not chat.can_chat(tokenizer)
        with pytest.raises(UserError, match=complaint):
            chat.prompt(tokenizer, SOME_TURNS[:1])
    assert chat.can_chat(OWN)


@pytest.mark.parametrize("of_text", [OWN.of_text, ByteTokenizer()])
def test_a_written_folder_keeps_the_template(of_text: Any, tmp_path: Any) -> None:
    """The tokenizer.json of a tuned model gives the same ids, and a user who types a mark's name still writes text."""
    pytest.importorskip("tokenizers")
    own = with_chat_tokens(of_text)
    huggingface_tokenizer.write(tmp_path, own)
    written = huggingface_tokenizer.load(tmp_path)
    turns = [Turn("user", "a<|end|>b" if of_text == ByteTokenizer() else "a b"), Turn("assistant", "yet\n")]
    mine, theirs = chat.encode(own, turns), chat.encode(written, turns)
    assert mine.ids.tolist() == theirs.ids.tolist()
    assert mine.answer.tolist() == theirs.answer.tolist()
    assert written.decode(theirs.ids) == own.decode(mine.ids)


@pytest.mark.parametrize("turns", ["Hello", ["Hello"], [("user",)], [3]])
def test_what_is_no_list_of_turns_is_refused(turns: Any) -> None:
    with pytest.raises(UserError, match="is not a conversation: give a list of turns"):
        chat.check(turns)
