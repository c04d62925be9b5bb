"""Answers to held-out instructions: exact means exact, and an answer that does not end is wrong."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import small_chats

from minimoe.core.errors import UserError
from minimoe.evaluate import exchanges
from minimoe.inference import conversation
from minimoe.text import chat
from minimoe.text.chat import Turn
from minimoe.text.instructions import Instruction

MODEL = small_chats.tuned()
END = MODEL.tokenizer.vocab_size - 1


def item(kind: str, question: str, answer: str) -> Instruction:
    return Instruction(kind, (Turn("user", question), Turn("assistant", answer)), question)


ITEMS = [
    item("sums", "1 + 1", "2"),
    item("sums", "1 + 2", "3"),
    item("words", "say no", "no"),
    item("sums", "2 + 1", "3"),
    item("words", "say yes", "yes"),
]


@pytest.fixture(name="says")
def _says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the model answer from a dictionary; an answer that ends with … has no end."""

    def script(answers: dict[str, str]) -> list[Any]:
        asked = []

        def reply(model: Any, turns: Any, *, temperature: float, tokens: int) -> Iterator[int]:
            assert temperature == 0 and tokens == exchanges.TOKENS
            asked.append(turns)
            said = answers[turns[-1].text]
            text = said.removesuffix("…")
            return iter([*MODEL.tokenizer.encode(text).tolist(), *[END] * (text == said)])

        monkeypatch.setattr(conversation, "reply", reply)
        return asked

    return script


def test_only_an_exact_answer_that_ends_is_right(says: Any) -> None:
    asked = says({"1 + 1": "2", "1 + 2": "3…", "2 + 1": "3 ", "say no": "yes no", "say yes": "yes"})
    found = exchanges.answer(MODEL, ITEMS, 10)
    assert {kind: marks.tolist() for kind, marks in found.right.items()} == {
        "sums": [True, False, False],
        "words": [False, True],
    }
    assert [turns for turns in asked] == [one.turns[:-1] for one in (*ITEMS[:2], ITEMS[3], ITEMS[2], ITEMS[4])]
    assert found.lengths.tolist() == [1, 1, 2, 6, 3]
    assert found.expected.tolist() == [1, 1, 1, 2, 3]


def test_by_chance_the_commonest_answer_of_a_kind_is_given(says: Any) -> None:
    says({one.turns[0].text: "a" for one in ITEMS})
    assert exchanges.answer(MODEL, ITEMS, 10).chance == {"sums": pytest.approx(2 / 3), "words": 0.5}
    assert exchanges.answer(MODEL, ITEMS, 1).chance == {"sums": 1.0, "words": 1.0}


def test_the_first_questions_of_each_kind_are_asked(says: Any) -> None:
    asked = says({one.turns[0].text: "a" for one in ITEMS})
    exchanges.answer(MODEL, ITEMS, 1)
    assert [turns[0].text for turns in asked] == ["1 + 1", "say no"]


def test_answers_are_greedy_and_the_same_on_any_map() -> None:
    found = exchanges.answer(MODEL, ITEMS, 10)
    again = exchanges.answer(MODEL, ITEMS, 10, lambda function, items: [*map(function, items)])  # type: ignore[arg-type]
    assert found.lengths.tolist() == again.lengths.tolist()
    text = conversation.answer(MODEL, ITEMS[0].turns[:-1])
    assert exchanges.reply(MODEL, ITEMS[0]).text == text and found.lengths[0] == len(text)
    assert not np.isnan(found.lengths).any()


def test_an_instruction_that_does_not_fit_is_left_out(says: Any) -> None:
    room = MODEL.config.context + 1 - 4 - 2  # without the four marks, and an answer of two letters
    fitting, long = item("fits", "a" * room, "no"), item("long", "a" * (room + 1), "no")
    says({one.turns[0].text: "no" for one in (fitting, long)})
    found = exchanges.answer(MODEL, [long, fitting], 9)
    assert list(found.right) == ["fits"] and found.right["fits"].all()


def test_unknown_characters_and_models_without_a_chat_are_refused() -> None:
    with pytest.raises(UserError, match="'Ω'"):
        exchanges.answer(MODEL, [item("sums", "Ω", "1")], 1)
    base = MODEL._replace(tokenizer=MODEL.tokenizer.of_text)  # type: ignore[union-attr]
    assert not chat.can_chat(base.tokenizer)
    with pytest.raises(UserError, match="minimoe sft"):
        exchanges.answer(base, ITEMS, 1)
