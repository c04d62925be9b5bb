"""The two kinds of check: gradients against finite differences, values against the package or a closed form.

No two sizes are equal, because mistakes are easiest to see where N, D and E cannot be confused; everything is float64.
An answer that was not attempted (its body is still ``...``) is reported as such and does not count as a mistake. An
answer that computes something and returns nothing is wrong, and the report says that its ``return`` is missing.
"""

from __future__ import annotations

import copy
import dis
import inspect
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import permutations
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises import diagnosis
from minimoe.exercises.feedback import Report, Row
from minimoe.proof import finite_differences

Answer = Callable[..., Any]
Mistakes = Mapping[str, Mapping[str, Any]]
"""For each returned value: hint → the wrong value that this hint explains."""

WORK = ("STORE_", "CALL", "BINARY_", "COMPARE_", "UNARY_", "GET_ITER", "LOAD_ATTR", "LOAD_METHOD", "IMPORT_")
"""Prefixes of the instructions of Python's bytecode that show that a body computes something."""

NONE = "this is None: does it come from a function that changes an array in place, such as `np.add.at`?"

MOST_ORDERED = 5
"""The largest number of results for which all orders are tried."""


class Context(NamedTuple):
    """What hints may use beyond the values themselves."""

    sizes: Mapping[str, int]
    case: str  # the arguments, if all are single numbers
    mistakes: Mistakes
    shares: Collection[str]


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
    shares: Collection[str] = (),
    reference: str = "minimoe",
) -> Report:
    """Checks what ``answer(*arguments)`` returns against ``expected``: name → array or number, in order of return.

    Integers and booleans must be equal; floating-point numbers may differ by 10⁻⁶ of the largest entry. ``shares`` are
    the names of values that lie in [0, 1], such as probabilities. ``reference`` names the expected values in the
    sentence for a right answer.
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
    results = _results(returned, expected)
    if all(_missing(result) for result in results):
        if not _works(answer):
            return _not_attempted(exercise)
        return Report(exercise, "wrong", _no_return(returned))
    if len(results) != len(expected):
        names = ", ".join(expected)
        return Report(exercise, "wrong", f"it returns {_count(len(results))}, expected {len(expected)}: {names}.")
    for argument, now in zip(arguments, given, strict=True):
        if not _same(argument, now):
            sentence = "it changes one of its arguments in place, but other code may still need it: work on a copy."
            return Report(exercise, "wrong", sentence)
    wanted = {name: np.asarray(value) for name, value in expected.items()}
    numbers = _numbers_among(answer, arguments)
    named = {name: number for name, number in numbers.items() if type(number) is int} | dict(sizes or {})
    case = ", ".join(f"{name} = {number}" for name, number in numbers.items())
    context = Context(named, case if len(numbers) == len(arguments) else "", mistakes or {}, shares)
    return _compare(exercise, results, wanted, context, reference)


def _compare(
    exercise: str,
    results: Sequence[Any],
    expected: Mapping[str, Array],
    context: Context,
    reference: str,
) -> Report:
    """One row for each returned value; the sentence is about the first one that is wrong."""
    rows: list[Row] = []
    problem = _wrong_order(results, expected)
    missing = []
    for result, (name, want) in zip(results, expected.items(), strict=True):
        if result is None:
            rows.append(Row(name, "-", "-", "None"))
            problem = problem or f"{name}: {NONE}"
            continue
        if _missing(result):
            missing.append(name)
            rows.append(Row(name, "-", "-", "not attempted yet"))
            continue
        row, sentence = _judge(name, result, want, context)
        rows.append(row)
        problem = problem or (f"{name}: {sentence}" if sentence else "")
    if problem:
        return Report(exercise, "wrong", problem, tuple(rows))
    if missing:
        return Report(exercise, "not attempted", f"right so far; {', '.join(missing)} not attempted yet.", tuple(rows))
    verb = "agree" if reference.endswith("s") else "agrees"
    return Report(exercise, "right", f"right. {reference} {verb} with your answer.", tuple(rows))


def _judge(name: str, result: Any, want: Array, context: Context) -> tuple[Row, str]:
    """The row of one result and, if the result is wrong, a sentence that says what is wrong."""
    got = _array(result)
    if got is None:
        return Row(name, "-", "-", "not numbers"), "its rows have different lengths; expected an array of numbers."
    if got.dtype.kind not in "fiub":
        return Row(name, "-", "-", "not numbers"), f"this is {_kind(result)}; expected {_numbers(want)}."
    shape = str(got.shape)
    mistakes = context.mistakes.get(name, {})
    if got.shape != want.shape:
        hint = _known(got, mistakes)
        return Row(name, shape, "-", "wrong shape"), hint or diagnosis.wrong_shape(got, want, context.sizes)
    if want.dtype.kind in "iub":
        different = ~diagnosis.equal(got, want)
        error = f"{int(different.sum())} of {want.size} differ" if want.ndim else ("0" if not different else "-")
        right = not different.any()
    else:
        worst = diagnosis.error(got, want)
        error, right = f"{worst:.0e}", worst <= diagnosis.TOLERANCE  # written this way so that NaN is wrong
    if right:
        return Row(name, shape, error, "ok"), ""
    hint = _known(got, mistakes)
    if not hint:
        hint = diagnosis.wrong_values(got, want, context.sizes, name in context.shares)
        hint = f"with {context.case}, {hint}" if context.case and not want.ndim else hint
    return Row(name, shape, error, "wrong values" if want.ndim else "wrong value"), hint


def _known(got: Array, mistakes: Mapping[str, Any]) -> str:
    """The hints of the usual mistakes that give exactly these values; empty if there is none."""
    return " Or: ".join(hint for hint, wrong in mistakes.items() if diagnosis.close(got, np.asarray(wrong)))


def _wrong_order(results: Sequence[Any], expected: Mapping[str, Array]) -> str:
    """A sentence about right results in the wrong order, or about one that stands in another's place."""
    names, wanted = list(expected), list(expected.values())
    arrays = [_array(result) for result in results]
    order = f"return {', '.join(names)}, in this order."

    def fits(i: int, j: int) -> bool:
        array = arrays[i]
        return array is not None and array.dtype.kind in "fiub" and diagnosis.close(array, wanted[j])

    right = [i for i in range(len(names)) if fits(i, i)]
    if len(right) == len(names) or len(names) > MOST_ORDERED:
        return ""
    if any(all(fits(i, j) for i, j in enumerate(places)) for places in permutations(range(len(names)))):
        return f"the values are right, but they are in the wrong order: {order}"
    for i, name in enumerate(names):
        others = (j for j, want in enumerate(wanted) if want.ndim and not {i, j} & set(right) and fits(i, j))
        other = next(others, None)  # of arrays only: single numbers may be equal by accident
        if other is not None:
            return f"{name}: this is {names[other]}, so the order is wrong: {order}"
    return ""


def _evaluate(loss: Callable[..., Any], name: str, elsewhere: Mapping[str, Array], moved: Array) -> float:
    return float(loss(**{name: moved, **elsewhere}))


def _results(returned: Any, expected: Mapping[str, Any]) -> list[Any]:
    """The returned values one by one. A tuple or list is several values, unless a single array is expected."""
    if len(expected) > 1:
        numbers = isinstance(returned, np.ndarray) and not any(np.ndim(want) for want in expected.values())
        whole = isinstance(returned, tuple | list) or (numbers and returned.ndim)
        return list(returned) if whole and len(returned) else [returned]
    (want,) = expected.values()
    if isinstance(returned, tuple) and len(returned) == 1:
        return list(returned)
    if isinstance(returned, tuple) and returned and not all(_missing(part) for part in returned):
        array = _array(returned)
        if array is None or array.shape != np.shape(want):
            return list(returned)
    if isinstance(returned, tuple | list) and returned and all(_missing(part) for part in returned):
        return list(returned)
    return [returned]


def _array(result: Any) -> Array | None:
    """The result as an array; None if its rows have different lengths. Fractions and large integers become floats."""
    try:
        array = np.asarray(result)
    except ValueError:
        return None
    if array.dtype.kind == "O" and all(isinstance(entry, Number) for entry in array.flat):
        try:
            return array.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            return array
    return array


def _numbers_among(answer: Answer, arguments: Sequence[Any]) -> dict[str, float]:
    """The single numbers among the arguments, by the names of the answer's parameters."""
    try:
        names = list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):
        return {}
    return {
        name: argument for name, argument in zip(names, arguments, strict=False) if isinstance(argument, int | float)
    }


def _missing(result: Any) -> bool:
    return result is None or result is ... or result is NotImplemented


def _works(answer: Answer) -> bool:
    """Whether the body of the answer computes or calls anything: an untouched body is only ``...``."""
    plain = inspect.unwrap(answer)
    while isinstance(plain, partial):
        plain = inspect.unwrap(plain.func)
    code = getattr(plain, "__code__", None) or getattr(plain.__call__, "__code__", None)
    return code is None or any(step.opname.startswith(WORK) for step in dis.get_instructions(code))


def _no_return(returned: Any) -> str:
    if returned is None:
        return "it returned None: is a `return` missing?"
    return "it computes something, but still returns `...`: return your results instead."


def _not_attempted(exercise: str) -> Report:
    return Report(exercise, "not attempted", "not attempted yet.")


def _what_stopped(problem: Exception) -> str:
    """The exception, and the line of the learner's code that raised it or led to it."""
    ours = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if Path(frame.filename).parent != ours]
    place = f" at `{frames[0].line}`" if frames and frames[0].line else ""
    return f"it stopped with {type(problem).__name__}{place}: {problem}"


def _copy(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.copy()
    return copy.deepcopy(argument) if isinstance(argument, list | dict | set) else argument


def _same(argument: Any, now: Any) -> bool:
    """Whether the answer left its copy of an argument as it was."""
    if isinstance(argument, np.ndarray):
        return np.array_equal(argument, now, equal_nan=True)
    return not isinstance(argument, list | dict | set) or argument == now


def _kind(thing: Any) -> str:
    return f"an object of type {type(thing).__name__}"


def _numbers(want: Array) -> str:
    return "an array of numbers" if want.ndim else "a number"


def _count(number: int) -> str:
    return "1 value" if number == 1 else f"{number} values"
