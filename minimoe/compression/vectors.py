"""Merging: several models of one shape become one, by arithmetic on their parameters.

    average             Σ wᵢ θᵢ,  Σ wᵢ = 1
    SLERP               sin((1−t)ω)/sin ω · a + sin(tω)/sin ω · b,    ω the angle between a and b
    task arithmetic     θ₀ + λ · mean of δᵢ,    δᵢ = θᵢ − θ₀ (the task vector of a model that began at θ₀)
    TIES                trim each δᵢ to its largest entries; elect the sign of their sum; average those that agree
    DARE                drop each entry of δᵢ with probability p, and divide what is left by 1 − p

SLERP and TIES look at one matrix at a time: the matrices of a stack of experts are merged one by one.

Merged models must have a common origin. Two models that were initialised with different random numbers have their
neurons and experts in different orders; ``alignment`` undoes this for the experts, but not for the residual stream.

Wortsman et al. 2022, arXiv 2203.05482 (average); Shoemake 1985 (SLERP); Ilharco et al. 2023, arXiv 2212.04089 (task
arithmetic); Yadav et al. 2023, arXiv 2306.01708 (TIES); Yu et al. 2024, arXiv 2311.03099 (DARE).
Lesson: lessons/52_merging_and_upcycling.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.layers.decoder import Decoder

METHODS = ("average", "slerp", "task", "ties", "dare")
NEED_A_BASE = ("task", "ties", "dare")
"""The methods that merge task vectors."""

PARALLEL = 0.9995
"""Above this cosine, SLERP would divide two small numbers by each other; ``lerp`` gives the same up to rounding."""


def average(vectors: Sequence[NDArray[Any]], weights: Sequence[float] | None = None) -> NDArray[Any]:
    """Arrays of one shape → their weighted mean; ``weights`` are first divided by their sum."""
    shares = np.ones(len(vectors)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    return sum((share * v for share, v in zip(shares[1:].tolist(), vectors[1:], strict=True)), shares[0] * vectors[0])


def lerp(a: NDArray[Any], b: NDArray[Any], t: float) -> NDArray[Any]:
    """The point of the straight line from ``a`` (t = 0) to ``b`` (t = 1)."""
    return (1 - t) * a + t * b


def slerp(a: NDArray[Any], b: NDArray[Any], t: float) -> NDArray[Any]:
    """The point of the arc from ``a`` (t = 0) to ``b`` (t = 1), for two arrays of one shape, taken as long vectors.

    Vectors without an angle between them (one is zero, or they are parallel or opposite) are on a straight line.
    """
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / size if size > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return lerp(a, b, t)
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def trim(delta: NDArray[Any], keep: float) -> NDArray[Any]:
    """``delta`` with zeros for all but the largest entries by size: a share ``keep`` of them, and at least one."""
    if keep >= 1:
        return delta
    size = np.abs(delta).reshape(-1)
    largest = np.argsort(-size, kind="stable")[: max(1, int(keep * size.size))]  # the first wins a tie
    trimmed = np.zeros_like(delta).reshape(-1)
    trimmed[largest] = delta.reshape(-1)[largest]
    return trimmed.reshape(delta.shape)


def ties(deltas: Sequence[NDArray[Any]], keep: float, weights: Sequence[float] | None = None) -> NDArray[Any]:
    """Task vectors of one shape → one: trimmed, with an elected sign, averaged over those that have this sign.

    ``weights`` are those of the average, all above 0. They have no part in the vote: the elected sign is that of the
    plain sum of the trimmed vectors. An entry whose sum is 0 elects no sign and becomes 0.
    """
    trimmed = np.stack([trim(delta, keep) for delta in deltas])
    elected = np.sign(trimmed.sum(0))
    agree = (np.sign(trimmed) == elected) & (elected != 0)
    shares = np.ones(len(deltas)) if weights is None else np.asarray(weights, np.float64)
    weighted = agree * shares.reshape(-1, *[1] * deltas[0].ndim)
    return (trimmed * weighted).sum(0) / np.where(agree.any(0), weighted.sum(0), 1)


def dare(rng: np.random.Generator, delta: NDArray[Any], keep: float) -> NDArray[Any]:
    """Each entry of ``delta`` over ``keep`` with probability ``keep``, or else 0: the expectation is ``delta``."""
    return delta * (rng.random(delta.shape) < keep) / keep


def merge(
    models: Sequence[Decoder],
    method: str = "average",
    *,
    base: Decoder | None = None,
    t: float = 0.5,
    keep: float | None = None,
    strength: float = 1.0,
    rng: np.random.Generator | None = None,
) -> Decoder:
    """Models of one shape → one model.

    ``t`` is the place of SLERP between two models. ``base`` is the model with which the training of all of them began.
    ``keep`` is the share of entries that TIES (0.2 by default) and DARE (0.5) keep, and ``strength`` multiplies the
    merged task vector. ``rng`` draws what DARE keeps.

    Raises:
        UserError: there is no such method, the models differ in shape, or an argument is missing or out of range.
    """
    check(method, len(models), base is not None, t, keep, strength)
    for other in [*models[1:], *([] if base is None else [base])]:
        _check_same(models[0], other)
    by_expert = set(tree.marked(models[0], "by_expert"))
    share = {"ties": 0.2, "dare": 0.5}.get(method, 1.0) if keep is None else keep
    draw = np.random.default_rng(0) if rng is None else rng

    def of_deltas(origin: NDArray[Any], found: Sequence[NDArray[Any]]) -> NDArray[Any]:
        deltas = [one - origin for one in found]
        if method == "ties":
            return origin + strength * ties(deltas, share)
        if method == "dare":
            deltas = [dare(draw, delta, share) for delta in deltas]
        return origin + strength * average(deltas)

    def one(origin: NDArray[Any] | None, found: Sequence[NDArray[Any]]) -> NDArray[Any]:
        if origin is not None:
            return of_deltas(origin, found)
        return slerp(found[0], found[1], t) if method == "slerp" else average(found)

    origins: Sequence[NDArray[Any] | None] = [None] * len(tree.leaves(models[0]))
    if base is not None and method in NEED_A_BASE:
        origins = tree.leaves(base)
    names = [name for name, _ in tree.named_leaves(models[0])]
    leaves = []
    for name, origin, *found in zip(names, origins, *map(tree.leaves, models), strict=True):
        leaves.append(_by_matrix(one, name in by_expert, origin, found).astype(found[0].dtype))
    return tree.rebuild(models[0], leaves)


def check(method: str, count: int, has_base: bool, t: float, keep: float | None, strength: float) -> None:
    """Raises ``UserError`` unless ``count`` models can be merged in this way."""
    if method not in METHODS:
        raise UserError(f"there is no method {method!r:.40}: choose one of {', '.join(METHODS)}.")
    if method == "slerp" and count != 2:
        raise UserError(f"slerp merges 2 models, not {count}: give two, or choose another method.")
    if count < 1 or (count == 1 and method == "average"):
        raise UserError(f"{count} models are too few to merge: give at least 2.")
    if method in NEED_A_BASE and not has_base:
        raise UserError(f"{method} merges what models have learned since a common origin: name that run with --base.")
    if not 0 <= t <= 1:
        raise UserError(f"t {t} is not between 0 (the first model) and 1 (the second): choose a number between them.")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"keep {keep} is not a share of the entries: choose a number above 0 and at most 1.")
    if not math.isfinite(strength):
        raise UserError(f"strength {strength} is not a finite number: choose one, such as 1.")


def _by_matrix(
    one: Callable[[NDArray[Any] | None, Sequence[NDArray[Any]]], NDArray[Any]],
    stacked: bool,
    origin: NDArray[Any] | None,
    found: Sequence[NDArray[Any]],
) -> NDArray[Any]:
    """Applies ``one`` to each matrix of a stack of experts, or to the array itself if it is not such a stack."""
    if not stacked:
        return one(origin, found)
    return np.stack([one(None if origin is None else origin[e], [of[e] for of in found]) for e in range(len(found[0]))])


def _check_same(mine: Decoder, other: Decoder) -> None:
    names, others = (dict(tree.named_leaves(params)) for params in (mine, other))
    if names.keys() != others.keys():
        raise UserError(
            f"a model has {min(names.keys() ^ others.keys())} and another has not: merge models of the same shape."
        )
    for name, leaf in names.items():
        if leaf.shape != others[name].shape:
            raise UserError(
                f"{name} has the shape {leaf.shape} in one model and {others[name].shape} in another: merge models of "
                "the same shape."
            )
