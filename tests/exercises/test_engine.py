"""The instant checks: right for the solution, patient with an empty cell, and knowing the usual wrong answers."""

import ast
import builtins
import importlib
import inspect
import json
import re
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
OTHER_RIGHT_ANSWERS = [
    (check, answer)
    for answers in ANSWERS.values()
    for check, others in answers.get("RIGHT", {}).items()
    for answer in others
]
WRONG_ANSWERS = [
    (number, check, wrong, words)
    for number, answers in WRONG.items()
    for check, pairs in answers.items()
    for wrong, words in pairs
]


def name_of(value: Any) -> str | None:
    return value.__name__ if inspect.isfunction(value) else None


every_exercise = pytest.mark.parametrize(("number", "check"), EXERCISES, ids=name_of)


@every_exercise
def test_a_check_passes_its_solution_quickly(number: str, check: Check):
    (path,) = (ROOT / "lessons" / "solutions").glob(f"{number}_*.py")
    solution = runpy.run_path(str(path))[check.__name__]
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
def test_an_exercise_has_two_usual_wrong_answers(number: str, check: Check):
    assert len(WRONG.get(number, {}).get(check, [])) >= 2, f"tests/lessons/wrong_{number}.py lacks {check.__name__}"


@pytest.mark.parametrize(("number", "check", "wrong", "words"), WRONG_ANSWERS, ids=name_of)
def test_a_usual_wrong_answer_gets_its_hint(number: str, check: Check, wrong: Callable[..., Any], words: str):
    report = check(wrong)
    assert report.state == "wrong"
    assert words in report.sentence


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


@pytest.mark.parametrize(
    ("dx", "words"),
    [
        (lambda right: -right, "wrong sign"),
        (lambda right: right / N, "3 times too small, and 3 is N"),
        (lambda right: right * 2, "2 times too large, as in the derivative of a square"),
        (lambda right: right * np.sqrt(F), "√F"),
        (lambda right: right * D * F, "D·F"),
        (lambda right: right * 1.7, "1.7 times"),
        (lambda right: right * 0, "zero everywhere"),
        (lambda right: right * np.nan, "not finite"),
        (lambda right: right.T, "looks transposed"),
        (lambda right: right[..., None], "keepdims"),
        (lambda right: right.sum(0), "an axis is missing"),
        (lambda right: right + right.mean(1, keepdims=True), "every row is off by its own constant"),
        (lambda right: right * np.array([[1], [2], [3]]), "every row is right except for its own constant factor"),
        (lambda right: right * np.array([1, 2, 3, 4]), "every column is right except for its own"),
        (lambda right: right[::-1], "wrong places"),
        (lambda right: right + 1e-5 * np.sin(np.arange(12)).reshape(3, 4), "nearly right"),
        (lambda right: np.where(right == right[1, 2], 9, right), "11 of 12 entries are right; the first wrong"),
        (lambda right: np.sin(9 * right), "right shape, wrong values"),
    ],
)
def test_a_wrong_gradient_is_described(dx: Callable[..., Any], words: str):
    report = check_linear(lambda x, W, dy: (dx(dy @ W.T), x.T @ dy))
    assert report.state == "wrong"
    assert report.sentence.startswith("dx: ")
    assert words in report.sentence
    assert report.rows[1].verdict == "ok"


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


def test_too_few_results_are_counted():
    assert "returns 1 value, expected 2: dx, dW" in check_linear(lambda x, W, dy: dy @ W.T).sentence


def test_an_answer_may_not_change_its_arguments():
    def answer(x: Any, W: Any, dy: Any) -> Any:
        dx = dy @ W.T
        x *= 2
        return dx, x.T @ dy / 2

    before = X.copy()
    assert "in place" in check_linear(answer).sentence
    assert (before == X).all(), "a check must hand out copies"


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


def test_a_wrong_number_is_not_said_to_be_a_multiple_of_the_right_one():
    report = values(lambda: 2.5, (), {"x": 2.0})
    assert report.state == "wrong"
    assert "times" not in report.sentence
    assert "wrong sign" in values(lambda: -2.0, (), {"x": 2.0}).sentence


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
