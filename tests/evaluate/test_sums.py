"""Unseen sums: in the text's own form, in none of its facts, and marked exactly."""

import re
import runpy
from pathlib import Path

import pytest

from minimoe.evaluate import sums
from minimoe.text import corpus

DATA = corpus.load("sums").documents["sums"]
MAKE = runpy.run_path(str(Path(__file__).parent.parent.parent / "data/make_sums.py"))


@pytest.mark.parametrize("kind", sums.KINDS)
def test_questions_have_the_form_of_the_text_and_the_right_answer(kind: str) -> None:
    draw = MAKE["Draw"](3)
    lines = {MAKE["missing_number"](draw) for _ in range(20_000)}
    questions = sums.unseen("", kind, 500)
    known = [question.prompt.strip() + " " + question.answer in lines for question in questions]
    assert sum(known) > 450, "20,000 draws hold nearly all of the 4,104 lines that there are"
    for question in questions:
        asked = question.prompt.split("holds ")[1].removesuffix(" = ")
        assert eval(asked) == int(question.answer)  # noqa: S307 - two numbers and a sign
    assert sums.are_in("\n".join(lines))


@pytest.mark.parametrize("kind", sums.KINDS)
def test_no_fact_of_an_unseen_sum_is_in_the_text(kind: str) -> None:
    questions = sums.unseen(DATA, kind, 10_000)
    assert 1000 < len(questions) < len(sums.A) * len(sums.B)
    for question in questions:
        a, b = (
            re.findall(r"\d+", question.prompt)[:2] if kind == "addition" else re.findall(r"\d+", question.prompt)[::3]
        )
        b = int(question.answer) if kind == "subtraction" else int(b)
        a = int(a)
        for fact in (f"{a} + {b}", f"{b} + {a}", f"{a + b} - {a}", f"{a + b} - {b}"):
            assert re.search(rf"(?<!\d){re.escape(fact)}(?!\d)", DATA) is None, fact


@pytest.mark.parametrize("fact", ["36 + 21", "21 + 36", "57 - 36", "57 - 21", "8 + 36 + 21 = 65", "36 + 21 + 4"])
def test_one_fact_makes_its_whole_family_seen(fact: str) -> None:
    prompt = "\n\n[ ] - 36 = 21   The box holds 36 + 21 = "
    assert prompt in {question.prompt for question in sums.unseen("", "addition", 10_000)}
    assert prompt not in {question.prompt for question in sums.unseen(f"so {fact}.", "addition", 10_000)}
    for other in ("136 + 21", "36 + 210", "36 x 21"):
        assert prompt in {question.prompt for question in sums.unseen(f"so {other}.", "addition", 10_000)}


def test_questions_differ_and_a_seed_repeats_itself() -> None:
    asked = sums.unseen(DATA, "addition", 200, seed=1)
    assert len(set(asked)) == 200
    assert asked == sums.unseen(DATA, "addition", 200, seed=1) != sums.unseen(DATA, "addition", 200, seed=2)


@pytest.mark.parametrize(
    ("written", "right"),
    [("57\n\nT", True), ("57", True), ("57, ", True), ("570", False), ("5", False), ("5 7", False), (" 57", False),
     ("057", False), ("-57", False), ("", False), ("75\n", False), ("fifty", False)],
)  # fmt: skip
def test_only_the_exact_number_is_right(written: str, right: bool) -> None:
    assert sums.is_right(written, "57") == right


def test_the_best_constant_is_the_commonest_answer() -> None:
    questions = [sums.Question("", answer) for answer in ("7", "8", "7", "9")]
    assert sums.best_constant(questions) == 0.5


def test_a_text_without_such_lines_is_known() -> None:
    assert sums.are_in(DATA)
    assert not sums.are_in("The box holds 3 + 4 = 7")
    for name in ("fables", "dialogues", "contes"):
        assert not sums.are_in(corpus.load(name).documents[name])


def test_the_tokens_of_an_answer_end_the_longest_number() -> None:
    assert max(sums.A) + max(sums.B) < 10 ** (sums.ANSWER_TOKENS - 1)
