"""Instructions and preferences: files that are read exactly or refused, and a split that never divides a document."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.text import chat, corpus, instructions
from minimoe.text.chat import Turn
from minimoe.text.instructions import Instruction, Pair
from minimoe.text.tokenizer import build, with_chat_tokens

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
DATA = Path(__file__).parent.parent.parent / "data"

GOOD: dict[str, Any] = {"kind": "sum", "document": "1 + 1", "turns": [["user", "1 + 1"], ["assistant", "2"]]}
PAIR: dict[str, Any] = {
    "kind": "right",
    "document": "1 + 1",
    "prompt": [["user", "1 + 1"]],
    "chosen": "2",
    "rejected": "3",
}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "given.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def test_instructions_are_read(tmp_path: Path) -> None:
    turns = (Turn("user", "1 + 1"), Turn("assistant", "2"))
    assert instructions.read(written(tmp_path, GOOD, "", GOOD)) == [Instruction("sum", turns, "1 + 1")] * 2


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, GOOD)
    expected = instructions.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert instructions.read(path) == expected


def test_pairs_are_read(tmp_path: Path) -> None:
    expected = Pair("right", (Turn("user", "1 + 1"),), "2", "3", "1 + 1")
    assert instructions.read_pairs(written(tmp_path, PAIR)) == [expected]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Expecting property name"),
        ("[]", "not an object"),
        ({**GOOD, "kind": 3}, "kind is 3"),
        ({**GOOD, "more": 1}, "unknown field 'more'"),
        ({"kind": "sum", "turns": GOOD["turns"]}, "'document' is missing"),
        ({**GOOD, "turns": []}, r"turns is \[\]"),
        ({**GOOD, "turns": [["user"]]}, r"a turn is \['user'\]"),
        ({**GOOD, "turns": GOOD["turns"][:1]}, "not the assistant's"),
        ({**GOOD, "turns": GOOD["turns"][1:]}, "stands where one of the user is expected: .* in turn; write it"),
        ({**GOOD, "turns": [["robot", "a"], *GOOD["turns"]]}, "has the role 'robot'"),
    ],
)
def test_a_line_that_is_no_instruction_is_refused(tmp_path: Path, line: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"given.jsonl, line 2: .*{complaint}"):
        instructions.read(written(tmp_path, GOOD, line))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"chosen": "3"}, "both answers are the same"),
        ({"rejected": ""}, "rejected is ''"),
        ({"prompt": GOOD["turns"]}, "not the user's"),
    ],
)
def test_a_line_that_is_no_pair_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=rf"line 1: .*{complaint}"):
        instructions.read_pairs(written(tmp_path, PAIR | change))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        instructions.read(written(tmp_path, ""))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    for name in ("none.jsonl", "latin.jsonl"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            instructions.read(tmp_path / name)


@given(st.lists(st.text(min_size=1), min_size=80, unique=True), st.integers(1, 3))
def test_the_split_never_divides_a_document(documents: list[str], times: int) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    items = [Instruction("any", turns, document) for document in documents for _ in range(times)]
    try:
        train, validation = instructions.split(items)
    except UserError:
        assert len({instructions.is_held_out(document) for document in documents}) == 1
        return
    assert not {item.document for item in train} & {item.document for item in validation}
    assert sorted(train + validation) == sorted(items)
    assert instructions.split(items[::-1])[1] == validation[::-1]


def test_a_tenth_of_the_documents_is_held_out_and_always_the_same_ones() -> None:
    held_out = [n for n in range(5000) if instructions.is_held_out(str(n))]
    assert 400 < len(held_out) < 600
    assert held_out[:5] == [9, 39, 49, 51, 55]


def test_too_few_documents_are_refused() -> None:
    one = Instruction("any", (Turn("user", "a"), Turn("assistant", "b")), "only")
    with pytest.raises(UserError, match="1 documents are too few"):
        instructions.split([one])


# The files of data/


@pytest.fixture(name="make")
def _make(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DATA))
    return importlib.import_module("make_instructions")


def test_the_files_are_what_their_generator_writes(make: ModuleType) -> None:
    written = [(DATA / name).read_bytes() for name in (instructions.INSTRUCTIONS, instructions.PREFERENCES)]
    assert [text.encode() for text in make.make()] == written
    assert make.make(seed=make.SEED + 1)[0].encode() != written[0]


def test_the_exchanges_are_short_and_in_the_letters_of_the_texts() -> None:
    exchanges, pairs = instructions.read(), instructions.read_pairs()
    assert len(exchanges) >= 1500 and len(pairs) >= 600
    tokenizer = with_chat_tokens(build("char", corpus.load("data").text))
    whole = [one.turns for one in exchanges]
    whole += [(*one.prompt, Turn("assistant", answer)) for one in pairs for answer in (one.chosen, one.rejected)]
    for turns in whole:
        assert sum(len(turn.text) for turn in turns) <= 110
        assert len(chat.encode(tokenizer, turns).ids) <= 128
    assert set(corpus.load("data").documents) == {"fables", "dialogues", "contes", "sums"}  # exchanges are no text


def test_no_question_is_in_both_parts_and_each_has_one_answer() -> None:
    exchanges, pairs = instructions.read(), instructions.read_pairs()
    answers: dict[tuple[Turn, ...], set[str]] = {}
    for one in exchanges:
        answers.setdefault(one.turns[:-1], set()).add(one.turns[-1].text)
    assert all(len(given) == 1 for given in answers.values())
    assert len(answers) == len(exchanges)
    train, validation = instructions.split(exchanges)
    tuned, judged = instructions.split(pairs)
    known = {one.turns[:-1] for one in train} | {one.prompt for one in tuned}
    asked = {one.turns[:-1] for one in validation} | {one.prompt for one in judged}
    assert not known & asked
    for part in (train, validation):
        assert {one.kind for one in part} == {one.kind for one in exchanges}
        assert {(one.kind, one.turns[-1].text) for one in validation if one.kind in ("facts", "translation")} <= {
            (one.kind, one.turns[-1].text) for one in train
        }
    # a conversation is made of exchanges of its own part
    for part in (train, validation):
        alone = {one.turns for one in part}
        for one in part:
            if one.kind == "conversations":
                assert {one.turns[i : i + 2] for i in range(0, len(one.turns), 2)} <= alone
    # a better answer is the one that the instructions give
    assert all(answers[one.prompt] == {one.chosen} for one in pairs)


def test_sums_and_words_are_right() -> None:
    checked = 0
    for one in instructions.read():
        asked, answer = one.turns[-2].text, one.turns[-1].text
        if one.kind == "sums":
            first, second = map(int, re.findall(r"\d+", asked))
            result = second - first if asked.startswith("Take") else first - second if "-" in asked else first + second
            assert answer == (NUMBERS[result] if one.turns[0].role == "system" else str(result)), asked
        elif one.kind == "words":
            word = one.document
            if "ackwards" in asked or "everse" in asked:
                assert answer == "".join(reversed(word)), asked
            elif "letters" in asked:
                assert answer == str(sum(1 for _ in word)), asked
            else:
                expected = {"First": word[0], "begins": word[0], "Last": word[-1], "ends": word[-1]}
                assert answer == next((letter for cue, letter in expected.items() if cue in asked), word), asked
        else:
            continue
        checked += 1
    assert checked > 1000


def test_comparisons_are_right_and_as_often_yes_as_no() -> None:
    relations = {"more": int.__gt__, "less": int.__lt__, "equal": int.__eq__}
    marks = []
    for one in instructions.read():
        found = re.fullmatch(r"Is (\d) (\w+) \w+ (\d)\?", one.turns[0].text)
        if found and len(one.turns) == 2:
            holds = relations[found[2]](int(found[1]), int(found[3]))
            assert one.turns[1].text == ("Yes." if holds else "No."), one
            marks.append(holds)
    assert len(marks) > 100 and sum(marks) == len(marks) / 2
