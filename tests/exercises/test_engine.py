"""The instant checks: right for the solution, patient with an empty cell, and knowing the usual wrong answers."""

import ast
import builtins
import functools
import importlib
import inspect
import json
import re
import runpy
import time
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import derived_answers as derived
import numpy as np
import pytest

from minimoe.exercises.engine import gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.proof import finite_differences

ROOT = Path(__file__).parent.parent.parent
Check = Callable[[Callable[..., Any]], Report]
LONGEST_CHECK = 2  # seconds


def exercises() -> list[tuple[str, Check]]:
    """Every check of every lesson: (number of the lesson, check)."""
    found = []
    for path in sorted((ROOT / "minimoe" / "exercises").glob("lesson_*.py")):
        module = importlib.import_module(f"minimoe.exercises.{path.stem}")
        found += [
            (path.stem[-2:], function)
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__ == module.__name__ and not name.startswith("_")
        ]
    return found


EXERCISES = exercises()
ANSWERS = {
    number: runpy.run_path(str(path))
    for number in sorted({number for number, _ in EXERCISES})
    for path in (ROOT / "tests" / "lessons").glob(f"wrong_{number}.py")
}
WRONG = {number: answers["WRONG"] for number, answers in ANSWERS.items()}
RIGHT = {number: answers.get("RIGHT", {}) for number, answers in ANSWERS.items()}
OTHER_RIGHT_ANSWERS = [(check, answer) for right in RIGHT.values() for check, all in right.items() for answer in all]
WRONG_ANSWERS = [
    (number, check, wrong, words)
    for number, answers in WRONG.items()
    for check, pairs in answers.items()
    for wrong, words in pairs
]


def name_of(value: Any) -> str | None:
    return value.__name__ if inspect.isfunction(value) else None


def solutions_of(number: str) -> Path:
    (path,) = (ROOT / "lessons" / "solutions").glob(f"{number}_*.py")
    return path


every_exercise = pytest.mark.parametrize(("number", "check"), EXERCISES, ids=name_of)


@every_exercise
def test_a_check_passes_its_solution_quickly(number: str, check: Check):
    solution = derived.solution_of(solutions_of(number), check.__name__)
    start = time.perf_counter()
    report = check(solution)
    seconds = time.perf_counter() - start
    assert report.state == "right", report
    assert seconds < LONGEST_CHECK


@pytest.mark.parametrize("path", sorted((ROOT / "lessons" / "solutions").glob("*.py")), ids=lambda path: path.stem)
def test_a_solution_that_is_loaded_alone_finds_all_that_it_needs_in_its_lesson(path: Path):
    """``%load -s name file`` brings the function and none of the file's imports."""
    (notebook,) = (ROOT / "lessons").glob(f"{path.stem}.ipynb")
    cells = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    imported = {
        (name.asname or name.name).partition(".")[0]
        for cell in cells
        for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*%.*$", "pass", "".join(cell["source"]))))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    for function in ast.parse(path.read_text("utf-8")).body:
        if isinstance(function, ast.FunctionDef):
            names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
            bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            bound |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
            bound |= {node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef)}
            missing = {node.id for node in names} - bound - imported - set(dir(builtins))
            assert not missing, f"{function.name} needs {missing}"


@pytest.mark.parametrize(("check", "answer"), OTHER_RIGHT_ANSWERS, ids=name_of)
def test_another_way_to_the_right_answer_is_right_too(check: Check, answer: Callable[..., Any]):
    report = check(answer)
    assert report.passed, report


@every_exercise
def test_a_check_says_when_nothing_was_attempted(number: str, check: Check):
    def unattempted(*arguments: Any) -> None: ...

    report = check(unattempted)
    assert (report.state, report.sentence) == ("not attempted", "not attempted yet.")


@every_exercise
def test_a_check_survives_nonsense(number: str, check: Check):
    for nonsense in (lambda *_: "seven", lambda *_: (), lambda *_: np.full((3, 1, 4, 1, 5), np.nan), lambda: 1, 7):
        assert check(nonsense).state == "wrong"


@every_exercise
def test_a_forgotten_return_is_told(number: str, check: Check):
    path, name = solutions_of(number), check.__name__
    without = check(derived.solution_of(path, name, derived.WithoutReturn()))
    assert (without.state, "returned None: is a `return` missing?" in without.sentence) == ("wrong", True), without
    untouched = check(derived.solution_of(path, name, derived.UntouchedReturn()))
    assert (untouched.state, "still returns `...`" in untouched.sentence) == ("wrong", True), untouched


@every_exercise
def test_results_in_the_wrong_order_are_recognised(number: str, check: Check):
    solution = derived.solution_of(solutions_of(number), check.__name__)
    judged = len(check(solution).rows)
    for swapped in derived.in_other_orders(solution, derived.number_of_results(check, solution)):
        report = check(swapped)
        assert report.state == "wrong"
        assert judged == 1 or "order" in report.sentence, report


@every_exercise
def test_the_right_values_in_another_type_are_right(number: str, check: Check):
    for name, answer in derived.otherwise_right(derived.solution_of(solutions_of(number), check.__name__)):
        report = check(answer)
        assert report.passed, f"{name}: {report}"


@every_exercise
def test_a_solution_with_one_changed_result_is_wrong(number: str, check: Check):
    solution = derived.solution_of(solutions_of(number), check.__name__)
    for name, answer in derived.wrong(solution, derived.number_of_results(check, solution)):
        report = check(answer)
        assert report.state == "wrong", f"{name}: {report}"
        assert re.search(r"\b1 times|[Tt]his is a int|: *$", report.sentence) is None, f"{name}: {report}"


@every_exercise
def test_an_exercise_has_four_wrong_and_two_unusual_right_answers(number: str, check: Check):
    lacking = f"tests/lessons/wrong_{number}.py has too few answers to {check.__name__}"
    assert len(WRONG.get(number, {}).get(check, [])) >= 4, lacking
    assert len(RIGHT.get(number, {}).get(check, [])) >= 2, lacking


@pytest.mark.parametrize(("number", "check", "wrong", "words"), WRONG_ANSWERS, ids=name_of)
def test_a_usual_wrong_answer_gets_its_hint(number: str, check: Check, wrong: Callable[..., Any], words: str):
    report = check(wrong)
    assert report.state == "wrong"
    assert words in report.sentence
    assert " Or: " not in report.sentence, "several hints fit: choose a case in which these mistakes differ"


# The engine, on y = x W, whose gradients are xᵀ dy and dy Wᵀ.

N, D, F = 3, 4, 5
RNG = np.random.default_rng(0)
X, W, DY = RNG.standard_normal((N, D)), RNG.standard_normal((D, F)), RNG.standard_normal((N, F))
SIZES = {"N": N, "D": D, "F": F}


def check_linear(answer: Any, **options: Any) -> Report:
    def loss(x: np.ndarray, W: np.ndarray) -> np.ndarray:
        return (x @ W * DY).sum()

    return gradients(answer, (X, W, DY), loss, {"x": X, "W": W}, sizes=SIZES, **options)


def test_the_right_gradient_is_right():
    report = check_linear(lambda x, W, dy: (dy @ W.T, x.T @ dy))
    assert report.passed
    assert [(row.what, row.shape, row.verdict) for row in report.rows] == [
        ("dx", "(3, 4)", "ok"),
        ("dW", "(4, 5)", "ok"),
    ]
    assert all(float(row.error) < 1e-9 for row in report.rows)


def test_a_gradient_that_was_not_summed_is_told_over_which_axis():
    report = check_linear(lambda x, W, dy: (dy @ W.T, x[:, :, None] * dy[:, None, :]))
    assert "summed over N (axis 0)" in report.sentence


def test_a_known_mistake_comes_before_a_general_one():
    mistakes = {"dW": {"where did the transpose go?": -(X.T @ DY)}}
    report = check_linear(lambda x, W, dy: (dy @ W.T, -(x.T @ dy)), mistakes=mistakes)
    assert report.sentence == "dW: where did the transpose go?"


def test_half_an_answer_is_not_attempted_but_judged_so_far():
    report = check_linear(lambda x, W, dy: (dy @ W.T, ...))
    assert report.state == "not attempted"
    assert "dW not attempted yet" in report.sentence
    wrong = check_linear(lambda x, W, dy: (dy @ W.T / 2, ...))
    assert wrong.state == "wrong"


@pytest.mark.parametrize("nonsense", ["seven", (), [1, "two"], ({}, {}), (object(), X), 7])
def test_nonsense_is_wrong_and_raises_nothing(nonsense: Any):
    assert check_linear(lambda x, W, dy: nonsense).state == "wrong"
    assert check_linear(nonsense).state == "wrong"


@pytest.mark.parametrize("nothing", [None, ..., NotImplemented, (None, None), (..., ...)])
def test_nothing_is_not_attempted(nothing: Any):
    assert check_linear(lambda x, W, dy: nothing).state == "not attempted"


def test_an_unfinished_function_may_raise_not_implemented():
    def answer(x: Any, W: Any, dy: Any) -> Any:
        raise NotImplementedError

    assert check_linear(answer).state == "not attempted"


def test_an_exception_is_reported_with_its_line():
    def answer(x: Any, W: Any, dy: Any) -> Any:
        return dy @ W, None

    report = check_linear(answer)
    assert report.state == "wrong"
    assert "ValueError at `return dy @ W, None`" in report.sentence


def test_too_few_and_too_many_results_are_counted():
    assert "returns 1 value, expected 2: dx, dW" in check_linear(lambda x, W, dy: dy @ W.T).sentence
    assert "returns 2 values, expected 1: size" in values(lambda: (3, 4), (), {"size": 3}).sentence
    assert "returns 3 values, expected 2: a, b" in values(lambda: np.arange(3), (), {"a": 0, "b": 1}).sentence


@pytest.mark.parametrize("several", [tuple, list, np.array])
def test_several_numbers_may_come_in_any_row(several: Callable[..., Any]):
    assert values(lambda: several([3, 4]), (), {"a": 3, "b": 4}).passed
    assert values(lambda: several([3, 4]), (), {"ab": np.array([3, 4])}).passed


def nothing_at_all(x: Any, W: Any, dy: Any) -> Any:
    """Only a docstring."""
    ...


def nothing_but_dots(x: Any, W: Any, dy: Any) -> Any:
    return ..., ...


def prints(x: Any, W: Any, dy: Any) -> Any:
    str(dy @ W.T)


def one_of_two_ways(x: Any, W: Any, dy: Any) -> Any:
    if len(x) > 100:
        return dy @ W.T, x.T @ dy


def work_above_dots(x: Any, W: Any, dy: Any) -> Any:
    dx = dy @ W.T
    dx += x
    return ..., ...


class ByCall:
    def __call__(self, x: Any, W: Any, dy: Any) -> Any:
        x.T @ dy


@pytest.mark.parametrize("answer", [nothing_at_all, nothing_but_dots, functools.partial(nothing_at_all)])
def test_an_untouched_body_is_not_attempted(answer: Any):
    assert check_linear(answer).sentence == "not attempted yet."


@pytest.mark.parametrize("answer", [prints, one_of_two_ways, functools.partial(prints), ByCall(), setattr])
def test_work_without_a_return_is_wrong(answer: Any):
    arguments = (types.SimpleNamespace(), "name", DY) if answer is setattr else (X, W, DY)
    report = values(answer, arguments, {"dx": X})
    assert (report.state, report.sentence) == ("wrong", "it returned None: is a `return` missing?")


def test_work_above_an_untouched_return_is_wrong():
    assert check_linear(work_above_dots).sentence == (
        "it computes something, but still returns `...`: return your results instead."
    )


def test_none_among_results_comes_from_a_function_that_returns_nothing():
    report = check_linear(lambda x, W, dy: (np.add.at(np.zeros(3), [0], 1.0), x.T @ dy))
    assert report.state == "wrong"
    assert report.sentence.startswith("dx: this is None: does it come from a function that changes an array in place")


def test_results_in_the_wrong_order_are_named():
    right = (DY @ W.T, X.T @ DY)
    both = check_linear(lambda x, W, dy: right[::-1])
    assert both.sentence == "the values are right, but they are in the wrong order: return dx, dW, in this order."
    one = check_linear(lambda x, W, dy: (right[1], 2 * right[0]))
    assert one.sentence == "dx: this is dW, so the order is wrong: return dx, dW, in this order."
    assert "order" not in check_linear(lambda x, W, dy: (right[1], right[1])).sentence, "dW stands in its place"
    three = {"a": 1.0, "b": 2.5, "c": 3.5}
    assert "return a, b, c" in values(lambda: (2.5, 3.5, 1.0), (), three).sentence
    assert values(lambda: (2.0, 2.0), (), {"a": 2.0, "b": 2.0}).passed


def test_an_answer_may_not_change_its_arguments():
    def answer(x: Any, W: Any, dy: Any) -> Any:
        dx = dy @ W.T
        x *= 2
        return dx, x.T @ dy / 2

    before = X.copy()
    assert "in place" in check_linear(answer).sentence
    assert (before == X).all(), "a check must hand out copies"


def test_an_answer_may_not_change_a_list():
    def answer(numbers: list[int]) -> int:
        return sum(numbers.pop() for _ in range(2))

    numbers = [1, 2]
    assert "in place" in values(answer, (numbers,), {"sum": 3}).sentence
    assert numbers == [1, 2]


@pytest.mark.parametrize("right", [7, 7.0, np.float32(7), Fraction(7), Decimal(7), np.array(7), 0.7 * 10])
def test_a_number_of_any_type_is_a_number(right: Any):
    assert values(lambda: right, (), {"count": 7}).passed
    assert values(lambda: right, (), {"size": 7.0}).passed
    assert not values(lambda: right, (), {"count": 8}).passed


def test_a_large_whole_number_is_judged_to_the_last_digit_that_a_float_has():
    assert values(lambda: 2**40 * 3, (), {"bytes": 2**40 * 3}).passed
    assert not values(lambda: 2**40 * 3 + 16, (), {"bytes": 2**40 * 3}).passed


@pytest.mark.parametrize("nonsense", ["seven", {}, {1, 2}, [1, "two"], 1j, print])
def test_what_is_not_a_number_is_named(nonsense: Any):
    report = values(lambda: nonsense, (), {"x": 2.0})
    assert f"this is an object of type {type(nonsense).__name__}; expected a number." in report.sentence


def test_a_hint_for_a_number_names_its_case_and_the_size_that_is_missing():
    def answer(N: int, scale: float) -> float:
        return 3.0

    report = values(answer, (5, 0.5), {"x": 15.0})
    assert report.sentence == "x: with N = 5, scale = 0.5, it is 5 times too small, and 5 is N."
    assert report.rows[0].verdict == "wrong value"


def test_two_mistakes_that_look_the_same_are_both_named():
    hints = {"a term is missing.": 2.0, "a sign is wrong.": 2.0}
    assert values(lambda: 2.0, (), {"x": 3.0}, mistakes={"x": hints}).sentence == (
        "x: a term is missing. Or: a sign is wrong."
    )


def test_counts_must_be_equal():
    wanted = {"experts": np.array([2, 0, 1])}
    assert values(lambda: np.array([2, 0, 1]), (), wanted).passed
    wrong = values(lambda: np.array([2, 1, 1]), (), wanted)
    assert wrong.rows[0].error == "1 of 3 differ"


def test_rows_of_different_lengths_are_an_answer_too():
    report = values(lambda: [[1], [2, 3]], (), {"x": np.zeros((2, 2))})
    assert (report.state, report.rows[0].verdict) == ("wrong", "not numbers")
    assert "different lengths" in report.sentence


def test_the_line_that_stopped_is_the_learners_own():
    def multiplier():
        return 1 // 0

    (check,) = (check for _, check in EXERCISES if check.__name__ == "multiplier")
    assert "at `return 1 // 0`" in check(multiplier).sentence


def test_the_first_failure_is_reported_and_ends_the_search():
    right, wrong = Report("f", "right", "right."), Report("f", "wrong", "no.")
    assert first_failure(iter([right, wrong, right])) is wrong
    assert first_failure(iter([right, right])) is right


def test_a_report_reads_as_text_and_as_html():
    report = check_linear(lambda x, W, dy: (dy @ W.T / 3, x.T @ dy))
    lines = repr(report).splitlines()
    assert lines[0].startswith("✗ <lambda>: dx: every value is 3 times too small")
    assert lines[1].split() == ["what", "shape", "worst", "relative", "error", "verdict"]
    assert len({len(re.match(r".*?(?=wrong values|ok|verdict)", line)[0]) for line in lines[1:]}) == 1, "columns align"
    html = report._repr_html_()
    assert "&lt;lambda&gt;" in html
    assert "<lambda>" not in html


def test_the_gradient_by_finite_differences_is_exact_for_a_cubic():
    x = RNG.standard_normal((2, 3))
    np.testing.assert_allclose(finite_differences.gradient(lambda x: (x**3).sum(), x), 3 * x**2, rtol=1e-9, atol=1e-10)
