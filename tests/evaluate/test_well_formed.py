"""Well-formed texts: what parses, what is closed, and where a written text is cut."""

import re
import warnings

import pytest

from minimoe.evaluate import well_formed
from minimoe.evaluate.well_formed import first_definition, is_closed, parses, whole_lines
from minimoe.text import corpus


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("", True),
        ("(a [b] {c}) «d “e”»", True),
        ("(", False),
        (")", False),
        (")(", False),
        ("([)]", False),
        ("(]", False),
        ("«»»", False),
        ('He said "no" and "yes".', True),
        ('He said "no.', False),
        ("don't", True),
        ("”“", False),
    ],
)
def test_closed_means_by_its_like_and_in_order(text: str, closed: bool) -> None:
    assert is_closed(text) == closed


@pytest.mark.parametrize("bracket", [*"()[]{}«»“”", '"'])
def test_each_of_them_counts(bracket: str) -> None:
    assert well_formed.has_brackets(f"a{bracket}b")
    assert not is_closed(f"a{bracket}b")
    assert not well_formed.has_brackets("don't - <b>")


@pytest.mark.parametrize(
    ("source", "valid"),
    [
        ("def f(x):\n    return x\n", True),
        ("def f(x):\n", False),
        ("def f(x):\nreturn x\n", False),
        ("def f(x:\n    return x\n", False),
        ("", False),
        ("# only a remark\n", False),
        ("x = '\\d'\n", True),
        ("x = 1\0", False),
        ("(" * 5000, False),
    ],
)
def test_python_parses_or_not_and_nothing_is_warned_of(source: str, valid: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parses(source) == valid


def test_a_source_is_parsed_but_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert parses("print('ran')\nraise SystemExit\n")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("written", "cut"),
    [
        ("f(x):\n    return x\n\n\nclass Next:\n    pass\n", "def f(x):\n    return x\n\n\n"),
        ("f(x):\n    return x\n@property\n", "def f(x):\n    return x\n"),
        ("f(\n    x,\n):\n    return x\n# so\n", "def f(\n    x,\n):\n    return x\n"),
        ("f(x):\n    y = x\n    return y + 1 and then it st", "def f(x):\n    y = x\n"),
        ("f(x", ""),
    ],
)
def test_a_definition_ends_where_the_next_thing_begins(written: str, cut: str) -> None:
    assert first_definition(well_formed.DEFINITION + written) == cut


def test_nearly_all_real_definitions_parse_when_cut_like_that() -> None:
    code = corpus.load("python-code").documents["python-code"]
    assert well_formed.has_python(code)
    real = [first_definition(code[found.start() :]) for found in re.finditer(well_formed.DEFINITION, code)]
    assert len(real) > 100
    assert sum(map(parses, real)) > 0.97 * len(real)


@pytest.mark.parametrize("name", ["fables", "dialogues", "contes", "sums"])
def test_the_texts_hold_no_python_and_most_of_their_paragraphs_are_closed(name: str) -> None:
    text = corpus.load(name).documents[name]
    assert not well_formed.has_python(text)
    with_brackets = [line for line in text.split("\n\n") if well_formed.has_brackets(line)]
    assert sum(map(is_closed, with_brackets)) > 0.9 * len(with_brackets)


def test_whole_lines_leave_out_a_last_one_without_end() -> None:
    assert whole_lines("a\nb\nc") == "a\nb\n"
    assert whole_lines("a\n") == "a\n"
    assert whole_lines("abc") == "abc"


@pytest.mark.parametrize(("opening", "closing"), ["[]", "{}", "()"])
def test_a_closing_bracket_at_the_margin_still_belongs_to_the_definition(opening: str, closing: str) -> None:
    code = f"def f(x):\n    return {opening}\n{closing}\n"
    assert first_definition(f"\n\n\n{code}x = 1\n") == code
