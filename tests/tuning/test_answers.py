"""Answers: those of generation one by one, up to the end, and right only if they end."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.text import chat
from minimoe.text.chat import Turn
from minimoe.text.instructions import Instruction
from minimoe.text.tokenizer import ByteTokenizer, CharTokenizer, ChatTokenizer
from minimoe.tuning import answers
from minimoe.tuning.answers import Answer, Score

CODEC = ChatTokenizer(CharTokenizer("abcdef"))
CONFIG = ModelConfig(
    vocab_size=10, width=16, layers=2, heads=2, kv_heads=1, head_width=8, context=16, experts=3, expert_width=8
)


class Model(NamedTuple):
    params: Any
    config: ModelConfig = CONFIG
    tokenizer: Any = CODEC
    end_tokens: tuple[int, ...] = chat.end_ids(CODEC)


@pytest.fixture
def model() -> Model:
    rng = np.random.default_rng(1)
    params = decoder.init(rng, CONFIG)
    params.head.weight[...] = rng.standard_normal(params.head.weight.shape)  # type: ignore[union-attr]
    params.head.weight[:, 9] *= 3  # the end is likely enough for some answers to come to it
    return Model(params)


PROMPTS = [[Turn("user", text)] for text in ("a", "b", "fed", "cab", "abcdef", "ace", "d")]


def test_answers_together_are_those_of_generation_one_by_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "TOGETHER", 2)
    end = chat.end_ids(CODEC)[0]
    expected = []
    for turns in PROMPTS:
        ids = list(
            generation.generate(model.params, CONFIG, chat.prompt(CODEC, turns), tokens=12, temperature=0, seed=0)
        )
        ended = end in ids
        expected.append(Answer(CODEC.decode(ids[: ids.index(end)] if ended else ids), ended))
    assert answers.write(model, PROMPTS, tokens=12) == expected
    assert {answer.ended for answer in expected} == {True, False}, "the test should see both"


def test_a_score_counts_answers_to_the_letter_that_end(model: Model) -> None:
    written = answers.write(model, PROMPTS, tokens=12)
    items = [
        Instruction(f"kind {answer.ended}", (*turns, Turn("assistant", answer.text or "a")), "document")
        for turns, answer in zip(PROMPTS, written, strict=True)
    ]
    scores = answers.score(model, items, tokens=12)
    right = sum(bool(answer.text) and answer.ended for answer in written)
    asked = sum(answer.ended for answer in written)
    assert scores == {"kind False": Score(0, len(items) - asked), "kind True": Score(right, asked)}
    assert right > 0


def test_earlier_turns_are_given(model: Model) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    (answer,) = answers.write(model, [turns], tokens=12)
    score = answers.score(model, [Instruction("k", (*turns, Turn("assistant", answer.text or "x")), "d")], tokens=12)
    assert score == {"k": Score(int(answer.ended and bool(answer.text)), 1)}


def test_what_cannot_answer_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="tokens 0 leaves no room"):
        answers.write(model, PROMPTS, tokens=0)
    with pytest.raises(UserError, match="no tokens for a chat"):
        answers.write(model._replace(tokenizer=ByteTokenizer()), PROMPTS)
    model.params.norm.gain[...] = np.nan
    with pytest.raises(UserError, match="not finite"):
        answers.write(model, PROMPTS)
