"""The suite for tuned models: what is held out is asked, and what cannot be asked has a reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import small_chats

from minimoe.core.errors import UserError
from minimoe.evaluate import bias, exchanges, preferences, tuned
from minimoe.evaluate.tuned import Marks, Means, Questions
from minimoe.storage.checkpoint import Tuning
from minimoe.text import corpus, instructions
from minimoe.text.tokenizer import build

MODEL = small_chats.tuned(tokenizer=build("char", corpus.load("data").text), context=128)
HELD_OUT = tuned.questions_for(MODEL.run)


def test_what_is_asked_is_held_out_in_data() -> None:
    assert HELD_OUT.instructions == instructions.split(instructions.read())[1]
    assert HELD_OUT.pairs == instructions.split(instructions.read_pairs())[1]


def test_a_run_with_a_file_of_its_own_is_asked_what_is_held_out_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"kind": "mine", "document": str(n), "turns": [["user", f"{n}?"], ["assistant", "no"]]} for n in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = MODEL.run._replace(tuning=Tuning("sft", {"data": str(path)}))
    found = tuned.questions_for(run)
    assert {item.document for item in found.instructions} == {
        str(n) for n in range(60) if instructions.is_held_out(str(n))
    }
    assert found.pairs == HELD_OUT.pairs
    pairs = [
        {"kind": "mine", "document": str(n), "prompt": [["user", f"{n}?"]], "chosen": "no", "rejected": "yes"}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in pairs))
    found = tuned.questions_for(MODEL.run._replace(tuning=Tuning("dpo", {"data": str(path)})))
    assert {pair.kind for pair in found.pairs} == {"mine"} and found.instructions == HELD_OUT.instructions
    path.unlink()
    with pytest.raises(UserError, match=r"mine\.jsonl cannot be read"):
        tuned.questions_for(run)


def test_results_are_those_of_the_parts() -> None:
    found = tuned.measure(MODEL, HELD_OUT, 3)
    kinds = list(dict.fromkeys(item.kind for item in HELD_OUT.instructions))
    of_pairs = ["length", "truth", "politeness"]
    assert list(found.marks) == [
        *(f"held-out instructions, {kind}" for kind in kinds),
        *(f"preferred answers, {kind}" for kind in of_pairs),
    ]
    answered = exchanges.answer(MODEL, HELD_OUT.instructions, 3)
    likelier = preferences.prefer(MODEL, HELD_OUT.pairs, 3)
    for kind in kinds:
        marks = found.marks[f"held-out instructions, {kind}"]
        assert isinstance(marks, Marks) and marks.right.tolist() == answered.right[kind].tolist()
        assert marks.chance == answered.chance[kind] and len(marks.right) == 3
    for kind in of_pairs:
        marks = found.marks[f"preferred answers, {kind}"]
        assert isinstance(marks, Marks) and marks.right.tolist() == likelier[kind].tolist() and marks.chance == 0.5
    assert list(found.means) == [
        "length of answers, characters: mean",
        *(f"praise and blame, nats: {group}" for group in bias.GROUPS),
    ]
    length = found.means["length of answers, characters: mean"]
    assert isinstance(length, Means) and length.values.tolist() == answered.lengths.tolist()
    assert length.chance is None and length.reachable == answered.expected.mean()
    praise = found.means["praise and blame, nats: he, not she"]
    assert isinstance(praise, Means) and praise.chance == 0 and praise.reachable is None
    np.testing.assert_array_equal(praise.values, bias.probe(MODEL)["he, not she"])


def test_a_model_that_was_not_tuned_has_reasons_in_the_same_places() -> None:
    base = MODEL._replace(tokenizer=MODEL.tokenizer.of_text)  # type: ignore[union-attr]
    assert tuned.is_tuned(MODEL) and not tuned.is_tuned(base)
    found, with_chat = tuned.measure(base, HELD_OUT, 1), tuned.measure(MODEL, HELD_OUT, 1)
    assert list(found.marks) == list(with_chat.marks) and list(found.means) == list(with_chat.means)
    assert all("minimoe sft" in str(reason) for reason in found.marks.values())
    assert "minimoe sft" in str(found.means["length of answers, characters: mean"])
    assert isinstance(found.means["praise and blame, nats: he, not she"], Means), "every model can be probed"


def test_what_does_not_fit_into_the_context_has_a_reason() -> None:
    short = small_chats.tuned(tokenizer=MODEL.tokenizer.of_text, context=8)  # type: ignore[union-attr, arg-type]
    found = tuned.measure(short, Questions(HELD_OUT.instructions[:1], HELD_OUT.pairs[:1]), 1)
    assert set(found.marks.values()) == {tuned.TOO_LONG}
    assert found.means["length of answers, characters: mean"] == tuned.TOO_LONG


def test_a_model_of_other_letters_has_reasons() -> None:
    found = tuned.measure(small_chats.tuned(context=128), Questions(HELD_OUT.instructions[:1], HELD_OUT.pairs[:1]), 1)
    for results in (found.marks, found.means):
        for reason in results.values():
            assert isinstance(reason, str) and "knows only" in reason
