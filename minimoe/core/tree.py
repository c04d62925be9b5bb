"""Trees: nested NamedTuples, tuples, lists and dictionaries of arrays, walked in one fixed order.

Parameters, gradients and optimiser state are such trees. A leaf is an array; ``None`` is an absent branch, which is
skipped everywhere. The path to a leaf, such as ``blocks[2].moe.experts.w_up``, is its name in code, in a checkpoint and
on a plot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from minimoe.core.arrays import Array, array_module

Tree = TypeVar("Tree")
Kind = TypeVar("Kind")


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Yields ``(name, array)`` for every leaf, with fields in order of declaration."""
    if tree is None:
        return
    if isinstance(tree, list):
        for i, branch in enumerate(tree):
            yield from named_leaves(branch, f"{prefix}[{i}]")
    elif isinstance(tree, dict):
        for key, branch in tree.items():
            yield from named_leaves(branch, f"{prefix}[{key!r}]")
    elif isinstance(tree, tuple):
        for field, branch in zip(_fields(tree), tree, strict=True):
            yield from named_leaves(branch, f"{prefix}.{field}" if prefix else field)
    else:
        yield prefix, tree


def marks(**fields: tuple[str, ...]) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator that marks fields of a component's parameters: for each property, the fields that have it.

        @tree.marks(matrices=("w_gate", "w_up", "w_down"))
        class Experts(NamedTuple): ...

    The marks in use are ``matrices`` (Muon updates them), ``training_only`` (a trained model works without them),
    ``by_expert`` (stacks of experts, of which each worker may own a part), ``state`` (learned without a gradient; the
    optimiser leaves it alone) and ``not_negative`` (state that is never below 0).
    """

    def add(kind: type[Kind]) -> type[Kind]:
        kind._marks = fields  # type: ignore[attr-defined]
        return kind

    return add


def marked(tree: Any, mark: str, prefix: str = "", inside: bool = False) -> Iterator[str]:
    """The names of all leaves in fields that have this ``mark``, in the order of ``named_leaves``."""
    if inside:
        yield from (name for name, _ in named_leaves(tree, prefix))
    elif isinstance(tree, list):
        for i, branch in enumerate(tree):
            yield from marked(branch, mark, f"{prefix}[{i}]")
    elif isinstance(tree, dict):
        for key, branch in tree.items():
            yield from marked(branch, mark, f"{prefix}[{key!r}]")
    elif isinstance(tree, tuple):
        listed = getattr(type(tree), "_marks", {}).get(mark, ())
        for field, branch in zip(_fields(tree), tree, strict=True):
            yield from marked(branch, mark, f"{prefix}.{field}" if prefix else field, field in listed)


def leaves(tree: Any) -> list[Array]:
    """Every array of the tree, in the order of ``named_leaves``."""
    return [leaf for _, leaf in named_leaves(tree)]


def map(function: Callable[..., Any], tree: Tree, *others: Any) -> Tree:
    """The tree of ``function(leaf, leaf of others[0], …)``; all trees must have the same structure."""
    if tree is None:
        return tree
    if isinstance(tree, list):
        return [map(function, *branches) for branches in zip(tree, *others, strict=True)]  # type: ignore[return-value]
    if isinstance(tree, dict):
        for other in others:
            if not isinstance(other, dict) or other.keys() != tree.keys():
                raise ValueError(f"expected a dictionary with the keys {list(tree)}, got {other!r:.80}")
        return {key: map(function, branch, *(other[key] for other in others)) for key, branch in tree.items()}  # type: ignore[return-value]
    if isinstance(tree, tuple):
        branches = (map(function, *branches) for branches in zip(tree, *others, strict=True))
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)  # type: ignore[return-value]
    return function(tree, *others)


def rebuild(tree: Tree, new_leaves: list[Array]) -> Tree:
    """A tree shaped like ``tree`` with ``new_leaves`` in the order of ``leaves``."""
    supply = iter(new_leaves)
    return map(lambda _: next(supply), tree)


def add(*trees: Tree) -> Tree:
    """The sum of trees, leaf by leaf, always from left to right so that the rounding is reproducible."""

    def total(first: Array, *rest: Array) -> Array:
        for other in rest:
            first = first + other
        return first

    return map(total, *trees)


def accumulate(total: Tree, tree: Tree) -> None:
    """Adds ``tree`` to ``total`` in place, leaf by leaf."""
    for mine, other in zip(leaves(total), leaves(tree), strict=True):
        mine += other


def zeros_like(tree: Tree) -> Tree:
    """A tree of the same structure in which every array is zero."""
    return map(lambda leaf: array_module(leaf).zeros_like(leaf), tree)


def size(tree: Any) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in leaves(tree))


def _fields(branch: tuple[Any, ...]) -> tuple[str, ...]:
    """The field names of a NamedTuple, or the positions in a plain tuple."""
    return getattr(branch, "_fields", tuple(str(i) for i in range(len(branch))))
