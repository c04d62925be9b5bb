"""Checks of lesson 15: the bug museum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers.routing import RouterStats
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients

Model = Callable[[Array], Array]


def library_form(answer: Answer) -> Report:
    """(E, K) → the balance loss with f not divided by K: at perfect balance, and collapsed on K experts."""

    def case(experts: int, top_k: int) -> Report:
        even, few = np.ones(experts), np.zeros(experts)
        few[:top_k] = 1.0
        balanced = _stats(6 * top_k * even / experts, 6 * even / experts, 6)
        collapsed = _stats(6 * few, 6 * few / top_k, 6)
        known = "this is the value with f divided by K, but here f sums to K."
        return values(
            answer,
            (experts, top_k),
            {"balanced": balance.pooled([balanced], 0.0)[0], "collapsed": balance.pooled([collapsed], 0.0)[0]},
            mistakes={
                "balanced": {
                    known: 1.0,
                    "put f = K/E and p̄ = 1/E into the sum of E terms, and multiply the sum by E.": top_k / experts,
                },
                "collapsed": {
                    known: experts / top_k,
                    "this is the sum, and E is missing: multiply the sum by E.": 1.0,
                    "the sum has K terms that are not zero, not one.": experts / top_k**2,
                    "every chosen expert has f = 1, because every token goes to it.": float(top_k),
                },
            },
        )

    return first_failure(case(*sizes) for sizes in ((10, 2), (60, 4)))


def balance_of_parts(answer: Answer) -> Report:
    """(assignments (M, E), probability (M, E), tokens (M,)) → the balance loss of all parts together."""
    rng = np.random.default_rng(15)
    experts, top_k = 5, 2
    tokens = np.array([3, 11, 7])
    logits = [3 * rng.standard_normal((count, experts)) for count in tokens]
    softmax = [np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in logits]
    chosen = [np.argsort(-z, axis=1)[:, :top_k] for z in logits]
    assignments = np.stack([np.bincount(c.reshape(-1), minlength=experts) for c in chosen]).astype(float)
    probability = np.stack([p.sum(0) for p in softmax])
    parts = [_stats(a, p, int(n)) for a, p, n in zip(assignments, probability, tokens, strict=True)]

    def loss(stats: RouterStats) -> float:
        return float(balance.loss(stats, Coefficients())[0].balance)

    each = np.array([loss(part) for part in parts])
    shares = assignments / assignments.sum(1, keepdims=True)
    means = probability / tokens[:, None]
    whole = loss(tree.add(*parts))
    return values(
        answer,
        (assignments, probability, tokens),
        {"loss": whole},
        sizes={"K": top_k, "E": experts, "M": len(tokens)},
        mistakes={
            "loss": {
                "this is the mean of the parts' losses, but products of means do not average: add the sums first.": (
                    each.mean()
                ),
                "this weights the parts' losses by their tokens, but it is still a mean of products: add the sums "
                "first.": (each * tokens).sum() / tokens.sum(),
                "this is the sum of the parts' losses, which is the bug itself.": each.sum(),
                "f is divided by the number of tokens, but each token has K assignments: f must sum to 1.": (
                    top_k * whole
                ),
                "E is missing: the loss is E times the sum, so that it is 1 at perfect balance.": whole / experts,
                "f and p̄ are means of the parts' means, but the parts differ in size: add the sums first.": (
                    experts * (shares.mean(0) * means.mean(0)).sum()
                ),
                "f is a mean of the parts' shares, but the parts differ in size: add the assignments first.": (
                    experts * (shares.mean(0) * probability.sum(0)).sum() / tokens.sum()
                ),
                "p̄ is a mean of the parts' means, but the parts differ in size: add the probabilities first.": (
                    experts * (assignments.sum(0) / assignments.sum() * means.mean(0)).sum()
                ),
                "p̄ is a mean: divide the sum of the probabilities by the number of tokens.": whole * tokens.sum(),
            }
        },
    )


def leaks_the_future(answer: Answer) -> Report:
    """(model, tokens, vocabulary) → whether a later token changes an earlier logit."""
    rng = np.random.default_rng(15)
    vocabulary = 7
    tokens = np.array([2, 6, 0, 6, 3, 6])  # the largest token three times: adding 1 to it leads out of the vocabulary
    vectors = rng.standard_normal((vocabulary, vocabulary))  # (V, V): a token's contribution to every logit

    def contributions(given: Array) -> Array:
        ids = np.asarray(given)
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.size:
            raise ValueError(
                f"the model knows the tokens 0 to {vocabulary - 1}, but is given {outside[0]}: a changed token must "
                "stay in the vocabulary, so use `% vocabulary`."
            )
        result: Array = vectors[ids]
        return result

    def case(model: _Case) -> Report:
        return values(
            answer,
            (lambda given: model.logits(contributions(given)), tokens, vocabulary),
            {"leaks": int(model.leaks)},
            mistakes={"leaks": {model.hint: int(not model.leaks)}},
        )

    return first_failure(case(model) for model in MODELS)


def double_softmax_backward(answer: Answer) -> Report:
    """(z, dp) → dz of p = softmax(softmax(z)), row by row."""
    rng = np.random.default_rng(15)
    z, dp = rng.standard_normal((2, 4, 6))
    inner = _softmax(z)
    outer = _softmax(inner)

    def back(p: Array, dp: Array) -> Array:
        along = (p * dp).sum(1, keepdims=True)
        result: Array = p * (dp - along)
        return result

    return gradients(
        answer,
        (z, dp),
        lambda z: (_softmax(_softmax(z)) * dp).sum(),
        {"z": z},
        sizes={"N": 4, "E": 6},
        mistakes={
            "dz": {
                "this goes back through one softmax of z, but there are two.": back(inner, dp),
                "this goes back through the outer softmax only: it is the gradient with respect to softmax(z).": back(
                    outer, dp
                ),
                "the order is swapped: go back first through the softmax that was applied last.": (
                    back(outer, back(inner, dp))
                ),
                "both steps use the outer probabilities, but the inner softmax has its own.": (
                    back(outer, back(outer, dp))
                ),
                "both steps use the inner probabilities, but the outer softmax has its own.": (
                    back(inner, back(inner, dp))
                ),
            }
        },
    )


class _Case(NamedTuple):
    """A model that maps each token's contribution (T, V) to logits (T, V), and what a test should find."""

    logits: Model
    leaks: bool
    hint: str


def _with_all_of_it(x: Array) -> Array:
    """Every position sees all tokens, the later ones most: another last token changes the largest logit."""
    return x + np.square(np.arange(len(x))) @ x


def _leaking(later: int, earlier: slice, mix: Array) -> Model:
    """A model in which the token at ``later``, and no other, reaches the logits at the positions ``earlier``.

    ``mix`` (V, V) says how much of each of the token's contributions reaches each logit.
    """

    def logits(x: Array) -> Array:
        y = np.cumsum(x, axis=0)
        if later < len(x):
            y[earlier] += x[later] @ mix
        return y

    return logits


def _prefix_from_suffix(x: Array) -> Array:
    """The sum so far, computed as the total minus the later terms: causal, up to rounding."""
    total: Array = x.sum(0) - (np.cumsum(x[::-1], axis=0)[::-1] - x)
    return total


EVERYWHERE = 100 * np.eye(7)  # a leak into all V logits, large enough to change the largest one
ONE_LOGIT = 100 * np.outer(np.eye(7)[3], np.eye(7)[5])
TWO_LOGITS = 100 * np.outer(np.eye(7)[3], np.eye(7)[2] - np.eye(7)[5])  # their sum stays the same
SMALL = 1e-3 * np.eye(7)

MODELS = (
    _Case(
        lambda x: np.cumsum(x, axis=0),
        False,
        "your test accuses a causal model: a token may change its own logits and later ones, but no earlier one.",
    ),
    _Case(_with_all_of_it, True, "your test passes a model in which every position sees every token."),
    _Case(
        _leaking(4, slice(4), EVERYWHERE),
        True,
        "your test misses a model in which the second-to-last token leaks: do not change the last token only.",
    ),
    _Case(
        _leaking(3, slice(2, 3), EVERYWHERE),
        True,
        "your test misses a leak from token 3 to position 2: change each token in turn, and compare all earlier "
        "positions.",
    ),
    _Case(
        _leaking(4, slice(1, 2), EVERYWHERE),
        True,
        "your test misses a leak from token 4 to position 1: compare all earlier positions, not only the one before.",
    ),
    _Case(
        _leaking(2, slice(2), EVERYWHERE),
        True,
        "your test misses a leak from token 2, which is a 0: put a token there that differs from the old one.",
    ),
    _Case(
        _leaking(4, slice(1, 2), ONE_LOGIT),
        True,
        "your test misses a leak into one of the logits: compare all V of them.",
    ),
    _Case(
        _leaking(4, slice(1, 2), TWO_LOGITS),
        True,
        "your test misses a leak that raises one logit and lowers another: compare the logits one by one, not their "
        "sum.",
    ),
    _Case(
        _leaking(4, slice(1, 2), SMALL),
        True,
        "your test misses a small leak, which does not change the most likely token: compare the logits themselves, "
        "with a small tolerance.",
    ),
    _Case(
        _prefix_from_suffix,
        False,
        "your test takes a rounding error for a leak: this causal model adds in another order, so allow a difference "
        "of 1e-9.",
    ),
)


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(1, keepdims=True))
    result: Array = p / p.sum(1, keepdims=True)
    return result


def _stats(assignments: Array, probability: Array, tokens: int) -> RouterStats:
    """The sums that the balance loss is computed from, with zeros for all others."""
    zeros, zero = np.zeros_like(probability), np.zeros(())
    return RouterStats(tokens, assignments, probability, zeros, zeros, zero, zero, zero)
