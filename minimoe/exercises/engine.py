"""The two kinds of check, without an answer key: gradients against finite differences, values against the package.

No two sizes are equal, because mistakes are easiest to see where N, D and E cannot be confused; everything is float64.
An answer that was not attempted (its body is still ``...``) is reported as such and does not count as a mistake.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises import diagnosis
from minimoe.exercises.feedback import Report, Row
from minimoe.proof import finite_differences

Answer = Callable[..., Any]
Mistakes = Mapping[str, Mapping[str, Any]]
"""For each returned value: hint → the wrong value that this hint explains."""


def gradients(
    answer: Answer,
    arguments: Sequence[Any],
    loss: Callable[..., Any],
    inputs: Mapping[str, Array],
    *,
    sizes: Mapping[str, int] | None = None,
    mistakes: Mistakes | None = None,
) -> Report:
    """Checks a backward pass against finite differences of ``loss``.

    ``loss(**inputs)`` is a number, computed with the *true* forward pass, usually Σ dy ⊙ y. ``answer(*arguments)``
    returns the gradient with respect to each of ``inputs``, in that order: ``dx, dgain`` for inputs named x and gain.
    ``sizes`` gives the lengths of axes by name (``{"N": 4, "D": 6}``), so that hints can use the names.
    """
    expected = {}
    for name, value in inputs.items():
        elsewhere = {other: value for other, value in inputs.items() if other != name}
        along = partial(_evaluate, loss, name, elsewhere)
        expected[f"d{name}"] = finite_differences.gradient(along, value)
    return values(answer, arguments, expected, sizes=sizes, mistakes=mistakes, reference="Finite differences")


def values(
    answer: Answer,
    arguments: Sequence[Any],
    expected: Mapping[str, Any],
    *,
    sizes: Mapping[str, int] | None = None,
    mistakes: Mistakes | None = None,
    reference: str = "minimoe",
) -> Report:
    """Checks what ``answer(*arguments)`` returns against ``expected``: name → array or number, in order of return.

    Integers and booleans must be equal; floating-point numbers may differ by 10⁻⁶ of the largest entry. ``reference``
    names the expected values in the sentence for a right answer.
    """
    exercise = getattr(answer, "__name__", "your answer")
    if not callable(answer):
        return Report(exercise, "wrong", f"this is {_kind(answer)}; write a function of that name.")
    given = [_copy(argument) for argument in arguments]
    try:
        returned = answer(*given)
    except NotImplementedError:
        return _not_attempted(exercise)
    except Exception as problem:  # whatever the learner's code raises is reported as a wrong answer
        return Report(exercise, "wrong", _what_stopped(problem))
    if _missing(returned):
        return _not_attempted(exercise)
    results = list(returned) if isinstance(returned, tuple | list) and len(expected) > 1 else [returned]
    if len(expected) == 1 and isinstance(returned, tuple) and len(returned) == 1:
        results = list(returned)
    if results and all(_missing(result) for result in results):
        return _not_attempted(exercise)
    if len(results) != len(expected):
        names = ", ".join(expected)
        return Report(exercise, "wrong", f"it returns {_count(len(results))}, expected {len(expected)}: {names}.")
    for argument, now in zip(arguments, given, strict=True):
        if isinstance(argument, np.ndarray) and not np.array_equal(argument, now, equal_nan=True):
            sentence = "it changes one of its arguments in place, but other code may still need it: work on a copy."
            return Report(exercise, "wrong", sentence)
    return _compare(exercise, results, expected, sizes or {}, mistakes or {}, reference)


def _compare(
    exercise: str,
    results: Sequence[Any],
    expected: Mapping[str, Any],
    sizes: Mapping[str, int],
    mistakes: Mistakes,
    reference: str,
) -> Report:
    """One row for each returned value; the sentence is about the first one that is wrong."""
    rows: list[Row] = []
    problem = ""
    missing = []
    for result, (name, wanted) in zip(results, expected.items(), strict=True):
        if _missing(result):
            missing.append(name)
            rows.append(Row(name, "-", "-", "not attempted yet"))
            continue
        row, sentence = _judge(name, result, np.asarray(wanted), sizes, mistakes.get(name, {}))
        rows.append(row)
        problem = problem or (f"{name}: {sentence}" if sentence else "")
    if problem:
        return Report(exercise, "wrong", problem, tuple(rows))
    if missing:
        return Report(exercise, "not attempted", f"right so far; {', '.join(missing)} not attempted yet.", tuple(rows))
    verb = "agree" if reference.endswith("s") else "agrees"
    return Report(exercise, "right", f"right. {reference} {verb} with your answer.", tuple(rows))


def _judge(
    name: str, result: Any, want: Array, sizes: Mapping[str, int], mistakes: Mapping[str, Any]
) -> tuple[Row, str]:
    """The row of one result and, if the result is wrong, a sentence that says what is wrong."""
    try:
        got = np.asarray(result)
    except ValueError:
        return Row(name, "-", "-", "not numbers"), "its rows have different lengths; expected an array of numbers."
    if got.dtype.kind not in "fiub":
        return Row(name, "-", "-", "not numbers"), f"this is {_kind(result)}; expected an array of numbers."
    shape = str(got.shape)
    if got.shape != want.shape:
        hint = _known(got, mistakes)
        return Row(name, shape, "-", "wrong shape"), hint or diagnosis.wrong_shape(got, want, sizes)
    if want.dtype.kind in "iub":
        different = int((got != want).sum())
        error = f"{different} of {want.size} differ" if want.ndim else ("0" if not different else "-")
        right = different == 0
    else:
        worst = diagnosis.error(got, want)
        error, right = f"{worst:.0e}", worst <= diagnosis.TOLERANCE  # written this way so that NaN is wrong
    if right:
        return Row(name, shape, error, "ok"), ""
    hint = _known(got, mistakes) or diagnosis.wrong_values(got, want, sizes)
    return Row(name, shape, error, "wrong values"), hint or "right shape, wrong values."


def _known(got: Array, mistakes: Mapping[str, Any]) -> str:
    """The hint of the usual mistake that gives exactly these values; empty if there is none."""
    return next((hint for hint, wrong in mistakes.items() if diagnosis.close(got, np.asarray(wrong))), "")


def _evaluate(loss: Callable[..., Any], name: str, elsewhere: Mapping[str, Array], moved: Array) -> float:
    return float(loss(**{name: moved, **elsewhere}))


def _missing(result: Any) -> bool:
    return result is None or result is ... or result is NotImplemented


def _not_attempted(exercise: str) -> Report:
    return Report(exercise, "not attempted", "not attempted yet.")


def _what_stopped(problem: Exception) -> str:
    """The exception, and the line of the learner's code that raised it or led to it."""
    ours = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if Path(frame.filename).parent != ours]
    place = f" at `{frames[0].line}`" if frames and frames[0].line else ""
    return f"it stopped with {type(problem).__name__}{place}: {problem}"


def _copy(argument: Any) -> Any:
    return argument.copy() if isinstance(argument, np.ndarray) else argument


def _kind(thing: Any) -> str:
    return f"an object of type {type(thing).__name__}"


def _count(number: int) -> str:
    return "1 value" if number == 1 else f"{number} values"
