"""Instructions and preferences: files that are read exactly or refused, and a split that never divides a document."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.text import instructions
from minimoe.text.chat import Turn
from minimoe.text.instructions import Instruction, Pair

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
