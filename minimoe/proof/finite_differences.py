"""Finite differences that know about top-k: is a backward pass the derivative of its forward pass?

A layer's result y is a tensor, so it is turned into a number, L = Σ dy ⊙ y with a random dy. The derivative of L
according to ``backward`` is compared, in float64, with one computed from four values of L on a line through the point:

    L′ ≈ (8 [L(h) − L(−h)] − [L(2h) − L(−2h)]) / 12h,    with an error of h⁴ L⁽⁵⁾/30, plus the rounding of L over h

With top-k, L jumps where two experts change places in the ranking, and at a jump there is no derivative. So all four
points must rank the experts as the centre does. If they do not, the probe is tried again much nearer to the centre; if
that fails too, it is refused, and refusals are reported. In this way an unlucky point does not look like a wrong
gradient, and the tolerance can be narrow enough to find a gradient that is wrong.

At a kink, such as the one of ReLU at 0, the slopes on the two sides differ, and a probe across the kink finds a mean of
the two slopes. So before a difference counts against ``backward``, the slopes ahead and behind, and those of two step
sizes, are compared. Where they disagree as much as ``backward`` does, the probe says nothing and is refused. If
``backward`` is wrong at a smooth point, the slopes agree with each other and not with ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, like, to_host
from minimoe.core.errors import UserError
from minimoe.proof.results import Row

STEP = 1e-4
"""The step h, relative to the tensor's root mean square or to 1, whichever is smaller."""

NEARER = 1 / 30
"""The second step of a probe whose first step changed the ranking, relative to the first step.

With the second step, rounding errors count 30 times as much.
"""

DISPUTED = (1, 1 / 5, NEARER)
"""The steps, relative to the first, whose slopes decide whether ``backward`` is wrong or the probe crosses a kink."""

SMOOTH = 0.1
"""A slope can be trusted if its uncertainty is at most this share of its distance from what ``backward`` says."""

NEGLIGIBLE = 1e-4
"""If no gradient of a tensor is larger than this share of Σ |dy ⊙ y|, errors are relative to that share. A
gradient that small is lost in the rounding of L, and only its absolute error can be known."""


class Ranked(NamedTuple):
    """The logits that a top-k compares, so that a probe can tell whether it changed their order."""

    logits: Array  # (N, E)
    top_k: int


class Loss(NamedTuple):
    """L = Σ dy ⊙ y, and its terms, tensor by tensor: many kinks may cancel in L, but hardly in every term."""

    value: float
    terms: list[Array]


class Slope(NamedTuple):
    """A derivative by finite differences, and the disagreement of its parts, which is large at a kink."""

    value: float
    spread: float


class Probe(NamedTuple):
    """One directional derivative of the loss, by backward and by finite differences."""

    place: str  # "at [2, 3]"
    analytic: float
    numeric: float | None  # None if refused
    kink: bool = False  # refused because of a kink

    @property
    def difference(self) -> float:
        """The distance between the two values: 0 for a refused probe, infinite if one of them is not finite."""
        difference = abs(self.analytic - (self.analytic if self.numeric is None else self.numeric))
        return difference if np.isfinite(difference) else np.inf


def check(
    component: str,
    forward: Callable[[Any, Any], tuple[Any, Any]],
    backward: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    x: Any,
    *,
    routing: Callable[[Any, Any], Sequence[Ranked]] | None = None,
    bound: float = 1e-7,
    step: float = STEP,
    entries: int = 32,
    directions: int = 4,
    seed: int = 0,
) -> list[Row]:
    """Checks ``backward`` against ``forward`` for every input and every parameter. Returns one row per tensor.

    ``forward(params, x)`` → (y, cache) and ``backward(params, cache, dy)`` → (dx, dparams). ``params``, ``x`` and ``y``
    may each be an array, a tree of arrays (``minimoe.core.tree``) or None; dy has the shape of y. Floating-point
    tensors are converted to float64. Integers have no gradient and get no row, unless ``backward`` returns a gradient
    for them. ``routing(params, cache)`` returns what top-k ranks: one ``Ranked`` for every layer that chooses experts.

    A tensor of at most ``entries`` numbers is checked entry by entry. For a larger tensor, ``entries`` of its entries
    are drawn, and ``directions`` random directions test all entries together.

    An error is relative to the largest gradient of the *tensor*. An error relative to each entry would say more about
    rounding than about the formula: an entry that happens to be 10⁻⁹ of its neighbours cannot be known to nine digits.

    A row passes if its error is at most ``bound``. ``step`` is explained at ``STEP``. ``seed`` determines everything
    that is drawn: dy, the entries and the directions.

    Raises:
        UserError: x and params hold no floating-point numbers, numbers that are not finite, or an empty tensor;
            ``forward`` or ``backward`` does not return a pair; ``forward`` does not compute in float64, or returns
            numbers that are not finite or that differ from call to call; a setting is out of its range.
    """
    _check_settings(step, entries, directions, seed)
    rng = np.random.default_rng(seed)
    x, params = tree.map(_own, x), tree.map(_own, params)
    names, leaves = _named(x, params)
    _check_point(names, leaves)
    originals = [leaf.copy() for leaf in leaves]
    y, cache = _pair(forward(params, x), "forward returns", "y, cache")
    dy = tree.map(lambda leaf: _random_weight(rng, leaf), y)
    if not tree.leaves(dy):
        raise UserError("the y that forward returns holds no floating-point numbers, so there is nothing to check.")
    negligible = NEGLIGIBLE * _loss(tree.map(abs, y), tree.map(abs, dy)).value
    margin = None if routing is None else _margin(routing(params, cache))
    returned = backward(params, cache, tree.map(lambda leaf: leaf.copy(), dy))
    gradients = dict(zip(*_named(*_pair(returned, "backward returns", "dx, dparams")), strict=True))

    def evaluate(leaves: Sequence[Array]) -> tuple[Loss, bytes]:
        x_there, params_there = tree.rebuild((x, params), list(leaves))
        y, cache = forward(params_there, x_there)
        return _loss(y, dy), b"" if routing is None else _signature(routing(params_there, cache))

    changed = [not bool((leaf == original).all()) for leaf, original in zip(leaves, originals, strict=True)]
    here, centre = evaluate(leaves)
    if not any(changed) and here.value != evaluate(leaves)[0].value:
        if not np.isfinite(here.value):
            raise UserError("forward gives numbers that are not finite here: choose another point.")
        raise UserError("forward gives another result each time: fix its random numbers, or pass them in.")

    def loss(i: int, moved: Array) -> Loss | None:
        """The loss with the i-th tensor replaced; None if that changes the ranking of the experts."""
        value, signature = evaluate([*leaves[:i], moved, *leaves[i + 1 :]])
        return value if signature == centre else None

    rows = []
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        gradient = None if (given := gradients.pop(name, None)) is None else _as_array(given)
        if leaf.dtype.kind != "f" and not changed[i] and not _misfit(name, leaf, gradient):
            continue
        row = Row(component, name, leaf.shape, bound, margin, problem=_misfit(name, leaf, gradient))
        if gradient is not None and row.passed:
            largest = float(abs(gradient).max())
            tolerance = bound * max(largest, negligible)
            probes = []
            for place, direction in _directions(rng, leaf, entries, directions):
                analytic = float((gradient * direction).sum())
                probes.append(_probe(partial(loss, i), leaf, direction, step, here, place, analytic, tolerance))
            row = _judged(row, probes, largest, negligible)
        if changed[i] or not bool((leaf == originals[i]).all()):
            row = row._replace(problem=f"forward or backward changed {name} in place: work on a copy")
        rows.append(row)
    for name, gradient in gradients.items():
        problem = f"backward returns a gradient for {name}, which is not among the parameters"
        rows.append(Row(component, name, np.shape(gradient), bound, margin, problem=problem))
    return rows


def gradient(loss: Callable[[Array], Any], x: Array, step: float = STEP) -> Array:
    """The gradient of the number ``loss(x)``, entry by entry: x of any shape → float64 of the same shape.

    This function does not look at top-k: stay away from points where the loss jumps.
    """
    x = x.astype(np.float64)
    result = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        direction = np.zeros(x.shape)
        direction[place] = 1.0
        slope = _slope(lambda moved: Loss(float(loss(moved)), []), x, direction, step, Loss(0.0, []))
        result[place] = np.nan if slope is None else slope.value
    return result


def _check_settings(step: float, entries: int, directions: int, seed: int) -> None:
    if not 0 < step < np.inf:
        raise UserError(f"step {step} is not a distance between points: choose a number above 0, such as {STEP}.")
    if entries < 0 or directions < 0 or entries + directions < 1:
        raise UserError(f"entries {entries} and directions {directions} check nothing: choose at least 1 of either.")
    if seed < 0:
        raise UserError(f"seed {seed} is not a seed: choose a whole number of at least 0.")


def _check_point(names: Sequence[str], leaves: Sequence[Array]) -> None:
    """Raises ``UserError`` unless there is something to check and all of it can be checked."""
    if not any(leaf.dtype.kind == "f" for leaf in leaves):
        raise UserError("x and params hold no floating-point numbers, so there is no gradient to check: give floats.")
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.dtype.kind not in "fiub":
            raise UserError(f"{name} holds {leaf.dtype}, expected real numbers: give floats or integers.")
        if not leaf.size:
            raise UserError(f"{name} is empty, of shape {leaf.shape}: give it at least one number.")
        if not array_module(leaf).isfinite(leaf).all():
            raise UserError(f"{name} holds numbers that are not finite: choose another point.")


def _pair(returned: Any, who: str, what: str) -> tuple[Any, Any]:
    """The pair that a learner's function returned; raises ``UserError`` if it is not a pair."""
    if isinstance(returned, tuple | list) and len(returned) == 2:
        return returned[0], returned[1]
    many = f"{len(returned)} things" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
    raise UserError(f"{who} {many}, expected a pair: {what}.")


def _misfit(name: str, leaf: Array, gradient: Array | None) -> str:
    """What is wrong with a gradient, as far as can be seen before numbers are compared; empty if nothing is wrong."""
    if leaf.dtype.kind != "f":
        nothing = gradient is None or (gradient.shape == leaf.shape and not gradient.any())
        return "" if nothing else f"{name} holds integers, which have no gradient: return None or zeros, or give floats"
    if gradient is None:
        return f"backward returns no gradient for {name}"
    if gradient.dtype.kind not in "fiub":
        return f"the gradient of {name} holds {gradient.dtype}, expected real numbers"
    if gradient.shape != leaf.shape:
        return f"{name} has shape {leaf.shape}, but its gradient has shape {gradient.shape}"
    if not array_module(gradient).isfinite(gradient).all():
        return f"the gradient of {name} holds numbers that are not finite"
    return ""


def _judged(row: Row, probes: Sequence[Probe], largest: float, negligible: float) -> Row:
    """The row with its numbers and, if something is wrong, a sentence that says what."""
    refused = sum(probe.numeric is None for probe in probes)
    worst = max(probes, key=lambda probe: probe.difference)
    largest = max([largest, *(abs(probe.numeric) for probe in probes if probe.numeric is not None)])
    kinks = sum(probe.kink for probe in probes)
    row = row._replace(checked=len(probes) - refused, refused=refused, largest=largest, kinks=kinks)
    if 2 * refused > len(probes):
        would = ["change the ranking of the experts"] * (refused > kinks) + ["cross a kink"] * (kinks > 0)
        return row._replace(
            problem=f"{refused} of {len(probes)} probes would {' or '.join(would)}: choose another point or a smaller "
            "step"
        )
    scale = max(largest, negligible)
    row = row._replace(error=worst.difference / scale if scale else 0.0)
    if not row.error <= row.bound:  # written this way so that NaN fails
        return row._replace(
            problem=f"right shape, wrong values: {worst.place} backward says {worst.analytic:.6g}, "
            f"finite differences {worst.numeric:.6g}"
        )
    return row


def _probe(
    loss: Callable[[Array], Loss | None],
    leaf: Array,
    direction: Array,
    step: float,
    centre: Loss,
    place: str,
    analytic: float,
    tolerance: float,
) -> Probe:
    """Compares the derivative along a direction with the ``analytic`` one; ``centre`` is the loss at the point itself.

    If the difference exceeds the ``tolerance``, the slope is computed with all steps of ``DISPUTED``. The difference
    counts if at least two slopes can be trusted and all of these agree; one slope is enough if all other steps change
    the ranking.
    """
    found = {}
    for factor in (1.0, NEARER):
        slope = found[factor] = _slope(loss, leaf, direction, factor * step, centre)
        if slope is not None:
            break
    else:
        return Probe(place, analytic, None)
    if not abs(slope.value - analytic) > tolerance:  # a slope that is not finite is no kink
        return Probe(place, analytic, slope.value)
    for factor in DISPUTED:
        if factor not in found:
            found[factor] = _slope(loss, leaf, direction, factor * step, centre)
    slopes = [slope for slope in found.values() if slope is not None]
    for slope in slopes:
        if abs(slope.value - analytic) <= tolerance:
            return Probe(place, analytic, slope.value)
    trusted = [slope.value for slope in slopes if slope.spread <= SMOOTH * abs(slope.value - analytic)]
    apart = max(trusted, default=0.0) - min(trusted, default=0.0)
    if len(trusted) < min(2, len(slopes)) or apart > SMOOTH * abs(trusted[0] - analytic):
        return Probe(place, analytic, None, kink=True)
    return Probe(place, analytic, trusted[0])


def _slope(
    loss: Callable[[Array], Loss | None], leaf: Array, direction: Array, step: float, centre: Loss
) -> Slope | None:
    """The derivative of the loss along a direction; None if the loss is None at one of the points."""
    h = step * min(_root_mean_square(leaf), 1.0)
    values = []
    for distance in (1, -1, 2, -2):
        value = loss(leaf + distance * h * direction)
        if value is None:
            return None
        values.append(value)
    one, minus_one, two, minus_two = (found.value for found in values)
    sides = steps = 0.0  # squared and times 2h: a slope ahead less the one behind, and a slope over h less one over 2h
    for at, a, b, c, d in zip(centre.terms, *(found.terms for found in values), strict=True):
        sides += float(((4 * (a + b) - (c + d) - 6 * at) ** 2).sum())  # both sides are exact for a parabola
        steps += float(((a - b - (c - d) / 2) ** 2).sum())
    spread = max(sides, steps) ** 0.5 / (2 * h)
    return Slope((8 * one - 8 * minus_one - two + minus_two) / (12 * h), spread)


def _directions(rng: np.random.Generator, leaf: Array, entries: int, directions: int) -> list[tuple[str, Array]]:
    """Unit vectors in the shape of a tensor: along single entries and, if these are not all, in random directions."""
    lines = []
    for entry in np.sort(rng.choice(leaf.size, min(entries, leaf.size), replace=False)):
        place = tuple(int(i) for i in np.unravel_index(entry, leaf.shape))
        direction = np.zeros(leaf.shape)
        direction[place] = 1.0
        lines.append((f"at {list(place)}", like(leaf, direction)))
    for _ in range(directions if leaf.size > entries else 0):
        direction = rng.standard_normal(leaf.shape)
        lines.append(("along a random direction", like(leaf, direction / np.sqrt(np.square(direction).sum()))))
    return lines


def _signature(routing: Sequence[Ranked]) -> bytes:
    """The best K + 1 experts of every token, in order: the chosen ones and the next one.

    Their order matters, not only the set: the K-th and the (K+1)-th logit are the thresholds of the load estimator.
    """
    return b"".join(
        np.argsort(-to_host(logits), axis=1, kind="stable")[:, : top_k + 1].tobytes() for logits, top_k in routing
    )


def _margin(routing: Sequence[Ranked]) -> float | None:
    """The smallest gap between the K-th and the (K+1)-th logit; None if every expert is always chosen."""
    gaps = []
    for logits, top_k in routing:
        if top_k < logits.shape[1]:
            ascending = np.sort(to_host(logits), axis=1)
            gaps.append(float((ascending[:, -top_k] - ascending[:, -top_k - 1]).min()))
    return min(gaps, default=None)


def _named(x: Any, params: Any) -> tuple[list[str], list[Array]]:
    """Names and tensors: the input is called x, and the parameters have their own names."""
    found = list(tree.named_leaves(x, "x"))
    of_input = {name for name, _ in found}
    for name, leaf in tree.named_leaves(params):
        found.append((f"params.{name}" if name in of_input else name or "params", leaf))
    return [name for name, _ in found], [leaf for _, leaf in found]


def _random_weight(rng: np.random.Generator, y: Array) -> Array | None:
    """dy for one tensor of the result; None for integers."""
    y = _as_array(y)
    if y.dtype.kind != "f":
        return None
    if y.dtype != np.float64:
        raise UserError(
            f"forward turned float64 into {y.dtype}, which is too coarse for finite differences: "
            "make it follow the dtype of its input."
        )
    return like(y, rng.standard_normal(y.shape))


def _loss(y: Any, dy: Any) -> Loss:
    """L over all floating-point leaves."""
    terms = tree.leaves(tree.map(lambda leaf, weight: None if weight is None else leaf * weight, y, dy))
    return Loss(float(sum(term.sum() for term in terms)), terms)


def _as_array(number: Any) -> Array:
    """An array unchanged; a plain number, or a list of numbers in place of an array, as an array."""
    return number if hasattr(number, "dtype") else np.asarray(number)


def _own(leaf: Any) -> Array:
    """A copy that the check may change, in float64 if it is floating-point."""
    array = _as_array(leaf)
    return array.astype(np.float64) if array.dtype.kind == "f" else array.copy()


def _root_mean_square(leaf: Array) -> float:
    """The root mean square of the tensor; 1 if it is all zeros, because zeros say nothing about a useful scale."""
    return float(array_module(leaf).sqrt((leaf * leaf).mean())) or 1.0
