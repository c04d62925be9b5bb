"""Preferred answers: log-probabilities as a loop over tokens gives them, and ties that are no preference."""

import numpy as np
import pytest
import small_chats

from minimoe.core.errors import UserError
from minimoe.evaluate import harness, preferences
from minimoe.layers import decoder
from minimoe.text import chat
from minimoe.text.chat import Turn
from minimoe.text.instructions import Pair

MODEL = small_chats.tuned()
PROMPT = (Turn("user", "2 + 2?"),)


def log_probability(prompt: tuple[Turn, ...], answer: str) -> float:
    """Token by token, from the logits of the whole conversation."""
    encoded = chat.encode(MODEL.tokenizer, [*prompt, Turn("assistant", answer)])
    logits, _, _ = decoder.forward(MODEL.params, encoded.ids[None, :-1], MODEL.config)
    total = 0.0
    for t in range(1, len(encoded.ids)):
        if encoded.answer[t]:
            z = logits[0, t - 1].astype(np.float64)
            total += z[encoded.ids[t]] - z.max() - np.log(np.exp(z - z.max()).sum())
    return float(total)


def test_the_likelier_answer_is_preferred_end_included() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcde"), size=rng.integers(1, 6))) for _ in range(80)]
    pairs = [Pair("a" if n % 3 else "b", PROMPT, *words[n : n + 2], "d") for n in range(0, 80, 2)]
    found = preferences.prefer(MODEL, pairs, 1000)
    assert list(found) == ["b", "a"]
    for kind in found:
        of_kind = [pair for pair in pairs if pair.kind == kind]
        expected = [
            log_probability(pair.prompt, pair.chosen) > log_probability(pair.prompt, pair.rejected) for pair in of_kind
        ]
        assert found[kind].tolist() == expected
        assert 0 < sum(expected) < len(expected)
    few = preferences.prefer(MODEL, pairs, 3)
    assert few["a"].tolist() == found["a"][:3].tolist() and len(few["b"]) == 3


def test_the_end_of_an_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an answer that goes on is worse than one that ends, if the model would have ended."""
    seen: list[tuple[list[int], list[int]]] = []

    def score(model: object, rows: list[tuple[list[int], list[int]]]) -> list[harness.Scored]:
        seen.extend(rows)
        return [harness.Scored(-float(len(after)), False) for _, after in rows]

    monkeypatch.setattr(harness, "score", score)
    earlier = (*PROMPT, Turn("assistant", "no"), Turn("user", "sure?"))
    found = preferences.prefer(MODEL, [Pair("a", earlier, "yes", "yes no", "d"), Pair("a", PROMPT, "ab", "no", "e")], 9)
    assert found["a"].tolist() == [True, False], "two answers that are equally likely are no preference"
    end = MODEL.tokenizer.vocab_size - 1
    asked = chat.prompt(MODEL.tokenizer, earlier).tolist()
    assert seen[0] == (asked, [*MODEL.tokenizer.encode("yes").tolist(), end])
    assert seen[1] == (asked, [*MODEL.tokenizer.encode("yes no").tolist(), end])


def test_a_pair_that_does_not_fit_is_left_out() -> None:
    length = MODEL.config.context + 1 - len(chat.prompt(MODEL.tokenizer, PROMPT)) - 1
    long, whole = (Pair("a", PROMPT, "no", "a" * n, "d") for n in (length + 1, length))
    found = preferences.prefer(MODEL, [long, whole], 1)
    assert found["a"].tolist() == preferences.prefer(MODEL, [whole], 1)["a"].tolist()
    assert preferences.prefer(MODEL, [long], 1) == {}


def test_characters_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="'Ω'"):
        preferences.prefer(MODEL, [Pair("a", PROMPT, "no", "Ω", "d")], 1)
