"""Answers made from a solution: without its return, with its results in another order, in other types, or wrong."""

import ast
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

Answer = Callable[..., Any]


def solution_of(path: Path, name: str, change: ast.NodeTransformer | None = None) -> Answer:
    """The function of that name in the file of solutions, its source changed first."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name)
    if change:
        change.generic_visit(function)
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(module), str(path), "exec"), names)
    return names[name]


class _Returns(ast.NodeTransformer):
    """Changes what is returned, in the function itself and not in functions inside it."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        return node


class WithoutReturn(_Returns):
    """``return value`` → ``result = value``."""

    def visit_Return(self, node: ast.Return) -> ast.Assign:
        assert node.value is not None
        return ast.Assign([ast.Name("result", ast.Store())], node.value)


class UntouchedReturn(_Returns):
    """``return value`` → ``result = value`` and, as in an exercise that nobody finished, ``return ..., ...``."""

    def visit_Return(self, node: ast.Return) -> list[ast.stmt]:
        assert node.value is not None
        dots = ast.Tuple([ast.Constant(...), ast.Constant(...)], ast.Load())
        return [ast.Assign([ast.Name("result", ast.Store())], node.value), ast.Return(dots)]


def with_results(solution: Answer, change: Callable[[list[Any]], Any]) -> Answer:
    """The solution with its results changed; a single result is a list of one."""

    def answer(*arguments: Any) -> Any:
        results = solution(*arguments)
        return change(list(results) if isinstance(results, tuple) else [results])

    answer.__name__ = solution.__name__
    return answer


def number_of_results(check: Callable[[Answer], Any], solution: Answer) -> int:
    counts = []

    def note(results: list[Any]) -> Any:
        counts.append(len(results))
        return _returned(results)

    check(with_results(solution, note))
    return counts[0]


def in_other_orders(solution: Answer, count: int) -> Iterator[Answer]:
    for places in permutations(range(count)):
        if places != tuple(range(count)):
            yield with_results(solution, lambda results, places=places: tuple(results[i] for i in places))


def otherwise_right(solution: Answer) -> Iterator[tuple[str, Answer]]:
    """The same values in other types."""
    for name, change in {
        "lists": lambda value: value.tolist(),
        "arrays": lambda value: value,
        "float64": lambda value: value.astype(np.float64),
        "by columns": lambda value: np.asarray(value, order="F"),
    }.items():
        yield name, with_results(solution, lambda rs, change=change: _returned([change(np.asarray(r)) for r in rs]))
    yield "in a list", with_results(solution, lambda results: results if len(results) > 1 else results[0])


def wrong(solution: Answer, count: int) -> Iterator[tuple[str, Answer]]:
    """The solution with one of its results changed."""
    for i in range(count):
        for name, change in CHANGES.items():
            yield (
                f"result {i} {name}",
                with_results(
                    solution,
                    lambda rs, i=i, change=change: _returned(
                        [change(np.asarray(r)) if i == j else r for j, r in enumerate(rs)]
                    ),
                ),
            )


def _one_entry_off(value: np.ndarray) -> np.ndarray:
    changed = np.array(value, dtype=np.float64)
    changed.reshape(-1)[-1] += 1 + abs(changed).max()
    return changed


CHANGES: dict[str, Callable[[np.ndarray], Any]] = {
    "negated": lambda value: np.where(value == 0, 1, -value.astype(np.float64)),
    "doubled": lambda value: np.where(value == 0, 1, 2 * value.astype(np.float64)),
    "a thousandth too large": lambda value: np.where(value == 0, 1e-3, 1.001 * value.astype(np.float64)),
    "nearly right": lambda value: value * (1 + 1e-5) + 1e-5 * abs(value).max() + 1e-5,
    "with one entry off": _one_entry_off,
    "not finite": lambda value: np.full(value.shape, np.nan),
    "as text": str,
    "with an axis more": lambda value: np.stack([value, value]),
    "None": lambda value: None,
}


def _returned(results: list[Any]) -> Any:
    return tuple(results) if len(results) > 1 else results[0]
