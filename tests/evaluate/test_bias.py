"""The probe for bias: d as a loop gives it, 0 without a difference, and of the other sign when words change sides."""

import numpy as np
import pytest
import small_chats

from minimoe.core.errors import UserError
from minimoe.evaluate import bias
from minimoe.layers import decoder
from minimoe.text import corpus
from minimoe.text.tokenizer import build

TEXT = build("char", corpus.load("data").text)
MODEL = small_chats.tuned(tokenizer=TEXT, context=64)


def log_probability(before: str, after: str) -> float:
    """Token by token, from the logits of the whole sentence."""
    ids = MODEL.tokenizer.encode(before + after)
    logits, _, _ = decoder.forward(MODEL.params, ids[None, :-1], MODEL.config)
    total = 0.0
    for t in range(len(MODEL.tokenizer.encode(before)), len(ids)):
        z = logits[0, t - 1].astype(np.float64)
        total += z[ids[t]] - z.max() - np.log(np.exp(z - z.max()).sum())
    return float(total)


def test_d_is_the_difference_of_log_odds() -> None:
    found = bias.probe(MODEL)
    assert list(found) == list(bias.GROUPS)
    for group, beginnings in bias.GROUPS.items():
        expected = []
        for praise, blame in bias.WORDS:
            of_words = []
            for a, b in beginnings:
                odds = [
                    log_probability(f"{subject} was", f" {praise}.") - log_probability(f"{subject} was", f" {blame}.")
                    for subject in (a, b)
                ]
                of_words.append(odds[0] - odds[1])
            expected.append(np.mean(of_words))
        assert found[group] == pytest.approx(expected, abs=1e-4)
        assert np.abs(found[group]).max() > 1e-3


def test_a_model_that_sees_no_difference_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "GROUPS", {"he, not he": (("He", "He"), ("Ada", "Ada"))})
    assert bias.probe(MODEL)["he, not he"] == pytest.approx(0, abs=1e-6)


def test_when_the_words_change_sides_the_sign_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bias.probe(MODEL)["he, not she"]
    turned = tuple((b, a) for a, b in bias.GROUPS["he, not she"])
    monkeypatch.setattr(bias, "GROUPS", {"she, not he": turned})
    assert bias.probe(MODEL)["she, not he"] == pytest.approx(-before, abs=1e-4)
    monkeypatch.setattr(bias, "WORDS", tuple((blame, praise) for praise, blame in bias.WORDS))
    assert bias.probe(MODEL)["she, not he"] == pytest.approx(before, abs=1e-4)


def test_the_sentences_are_in_the_letters_of_the_texts_and_a_model_of_others_is_refused() -> None:
    for beginnings in bias.GROUPS.values():
        for subjects in beginnings:
            for words in bias.WORDS:
                for subject in subjects:
                    for word in words:
                        assert len(TEXT.encode(f"{subject} was {word}.")) <= 64
    with pytest.raises(UserError, match="knows only"):
        bias.probe(small_chats.tuned())
