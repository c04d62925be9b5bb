"""Checks of lesson 51: distillation and pruning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def soft_backward(answer: Answer) -> Report:
    """(z, told, tau) → dz of the mean over tokens of τ² KL(p_t‖p_s), with p = softmax(logits/τ)."""
    return first_failure(_soft_backward(answer, tau) for tau in (2.5, 0.4))


def _soft_backward(answer: Answer, tau: float) -> Report:
    rng = np.random.default_rng(51)
    N, V = 4, 6
    z, told = rng.standard_normal((2, N, V))
    p, q = np.exp(_log_softmax(z / tau)), np.exp(_log_softmax(told / tau))
    ratio = np.log(p / q)
    right = tau * (p - q) / N
    wrong = {
        "the factor τ² of the loss is missing.": right / tau**2,
        "the logits are divided by τ, so the chain rule gives another 1/τ.": right * tau,
        "KL is a sum over the vocabulary; the mean is over the tokens alone.": right / V,
        "the loss is a mean over the tokens: divide by their number.": right * N,
        "this goes the wrong way: the student's probabilities come first.": -right,
        "this is the gradient of KL(p_s‖p_t); here the teacher's distribution comes first.": (
            tau * p * (ratio - (p * ratio).sum(-1, keepdims=True)) / N
        ),
        "the teacher's logits must be divided by τ too.": tau * (p - np.exp(_log_softmax(told))) / N,
        "the student's logits must be divided by τ too.": tau * (np.exp(_log_softmax(z)) - q) / N,
        "both logits must be divided by τ before the softmax.": (
            tau * (np.exp(_log_softmax(z)) - np.exp(_log_softmax(told))) / N
        ),
        "the logits are divided by τ, not multiplied with it.": (
            tau * (np.exp(_log_softmax(z * tau)) - np.exp(_log_softmax(told * tau))) / N
        ),
        "the softmax is over the vocabulary, which is the last axis.": (
            tau * (np.exp(_log_softmax(z.T / tau)) - np.exp(_log_softmax(told.T / tau))).T / N
        ),
        "the mean is over the N tokens, not over the V entries of the vocabulary.": right * N / V,
    }

    def loss(z: Array) -> Any:
        return tau**2 * (q * (np.log(q) - _log_softmax(z / tau))).sum() / N

    return gradients(
        answer, (z, told, tau), loss, {"z": z}, sizes={"N": N, "V": V}, mistakes={"dz": _others(wrong, right)}
    )


def reverse_backward(answer: Answer) -> Report:
    """(z, told) → dz of the mean over tokens of KL(p_s‖p_t), at temperature 1."""
    rng = np.random.default_rng(52)
    N, V = 4, 6
    z, told = rng.standard_normal((2, N, V))
    p, log_q = np.exp(_log_softmax(z)), _log_softmax(told)
    q, ratio = np.exp(log_q), _log_softmax(z) - log_q
    kl = (p * ratio).sum(-1, keepdims=True)
    right = p * (ratio - kl) / N
    wrong = {
        "this is the gradient of KL(p_t‖p_s); here the student's distribution comes first.": (p - q) / N,
        "raising one logit lowers all other probabilities: subtract the KL of the token.": p * ratio / N,
        "the 1 from the derivative of p log p cancels: Σ dp = 0.": p * (ratio + 1 - kl) / N,
        "the mean term of the softmax is missing: dz = p_s ⊙ (dp − Σ p_s dp).": p * (ratio + 1) / N,
        "the factor p_s is missing.": (ratio - kl) / N,
        "the mean that is subtracted must be weighted with p_s.": p * (ratio - ratio.mean(-1, keepdims=True)) / N,
        "each token has its own KL; this subtracts that of all tokens.": p * (ratio - kl.mean()) / N,
        "the KL that is subtracted is KL(p_s‖p_t), weighted with p_s.": p
        * (ratio + (q * ratio).sum(-1, keepdims=True))
        / N,
        "the term with log p_t is missing: the derivative of p log(p/q) with respect to p is log(p/q) + 1.": (
            p * (np.log(p) - (p * np.log(p)).sum(-1, keepdims=True)) / N
        ),
        "the mean is over the N tokens, not over the V entries of the vocabulary.": right * N / V,
        "the softmax that carries the gradient is that of the student, not of the teacher.": q * (ratio - kl) / N,
        "the loss is a mean over the tokens: divide by their number.": right * N,
        "this goes the wrong way.": -right,
    }

    def loss(z: Array) -> Any:
        log_p = _log_softmax(z)
        return (np.exp(log_p) * (log_p - log_q)).sum() / N

    return gradients(answer, (z, told), loss, {"z": z}, sizes={"N": N, "V": V}, mistakes={"dz": _others(wrong, right)})


def best_experts(answer: Answer) -> Report:
    """(logits, outputs, r) → the r experts with the least ‖F'(x) − F(x)‖: two per token, softmax over the two."""
    return first_failure(_best_experts(answer, seed, r) for seed, r in CASES)


CASES = ((1005, 4), (37, 3))
"""Seeds and r for which the usual mistakes find other experts than the best."""


def _best_experts(answer: Answer, seed: int, r: int) -> Report:
    rng = np.random.default_rng(seed)
    N, E, D = 12, 8, 3
    logits, outputs = 1.5 * rng.standard_normal((N, E)), rng.standard_normal((E, N, D))
    right, wrong = _experts_of(logits, outputs, r)
    return values(
        answer,
        (logits, outputs, r),
        {"kept": right},
        sizes={"N": N, "E": E, "D": D},
        mistakes={"kept": _others(wrong, np.array(right))},
        reference="The full search",
    )


def _experts_of(logits: Array, outputs: Array, r: int) -> tuple[list[int], dict[str, Any]]:
    """The best experts, and what the usual mistakes find."""
    N, E = logits.shape
    subsets = [list(subset) for subset in combinations(range(E), r)]

    def layer(kept: Sequence[int], whole_softmax: bool = False, old_choice: bool = False, active: int = 2) -> Array:
        shown = logits.copy()
        if not old_choice:
            shown[:, [e for e in range(E) if e not in kept]] = -np.inf
        best = np.argsort(-shown, axis=1, kind="stable")[:, :active]
        z = np.take_along_axis(logits, best, 1)
        w = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        if whole_softmax:
            w = np.exp(z) / np.exp(logits).sum(1, keepdims=True)
        if old_choice:  # the entries of a removed expert are lost, and nobody takes their place
            w = w * np.isin(best, kept)
        return (w[..., None] * outputs[best, np.arange(N)[:, None]]).sum(1)

    def found(measure: Any, most: bool = False, **changes: Any) -> list[int]:
        whole = layer(range(E), **{name: value for name, value in changes.items() if name != "old_choice"})
        scores = [measure(layer(kept, **changes) - whole) for kept in subsets]
        return subsets[int(np.argmax(scores) if most else np.argmin(scores))]

    def error(kept: Sequence[int]) -> Any:
        return np.linalg.norm(layer(kept) - layer(range(E)))

    def one_after_the_other() -> list[int]:
        kept = list(range(E))
        while len(kept) > r:
            kept = min(([e for e in kept if e != gone] for gone in kept), key=error)
        return kept

    right = found(np.linalg.norm)
    alone = np.array([error([e for e in range(E) if e != gone]) for gone in range(E)])
    counts = np.bincount(np.argsort(-logits, axis=1)[:, :2].reshape(-1), minlength=E)
    used = np.sort(np.argsort(-counts, kind="stable")[:r])
    sizes = np.linalg.norm(outputs, axis=(1, 2))
    wrong = {
        "these experts are used most, which does not mean that the others cannot replace the rest.": used,
        "this subset has the largest error, not the smallest.": found(np.linalg.norm, most=True),
        "the weights are the softmax over the two chosen experts, in F and in F'.": found(
            np.linalg.norm, whole_softmax=True
        ),
        "a token whose expert was removed goes to its next best one; here it loses the weight.": found(
            np.linalg.norm, old_choice=True
        ),
        "differences of opposite sign must not cancel: square them before you add them up.": found(
            lambda difference: abs(difference.sum())
        ),
        "this removes one expert after the other; try all subsets, because two experts may replace each other.": (
            one_after_the_other()
        ),
        "this removes those that are missed least when each is removed alone; two of them may replace each other.": (
            np.sort(np.argsort(-alone)[:r])
        ),
        "the norm is the root of the sum of all squares; this adds up sizes, or the norms of the tokens.": found(
            lambda difference: np.linalg.norm(difference, axis=1).sum()
        ),
        "the norm is the root of the sum of all squares, not the largest size.": found(
            lambda difference: abs(difference).max()
        ),
        "each token has two experts, in F and in F'.": found(np.linalg.norm, active=1),
        "these are the experts to remove; return the ones that are kept.": [e for e in range(E) if e not in right],
        "the norm of an expert's output says little about who can replace it.": np.sort(np.argsort(-sizes)[:r]),
    }
    return right, wrong


def skip_second(answer: Answer) -> Report:
    """(w,) → the weights (N, 2) where the second expert is skipped if its ratio to the first is below the median."""
    cases = (
        [[0.51, 0.46], [0.56, 0.43], [0.62, 0.07], [0.52, 0.47], [0.37, 0.32]],
        [[0.32, 0.11], [0.41, 0.18], [0.64, 0.25], [0.34, 0.29], [0.77, 0.18], [0.37, 0.32], [0.7, 0.05]],
    )
    return first_failure(_skip_second(answer, np.array(w)) for w in cases)


def _skip_second(answer: Answer, w: Array) -> Report:
    ratio = w[:, 1] / w[:, 0]

    def skipped(where: Array, first: Array) -> Array:
        return np.where(where[:, None], np.stack([first, np.zeros(len(w))], 1), w)

    below, total = ratio < np.median(ratio), w.sum(1)
    right = skipped(below, total)
    wrong = {
        "the first expert takes over the weight of the second, so that the sum stays the same.": skipped(
            below, w[:, 0]
        ),
        "the sum of the two weights must stay what it was, which need not be 1.": skipped(below, np.ones(len(w))),
        "β is the median of the ratios, not their mean.": skipped(ratio < ratio.mean(), total),
        "the second expert is skipped where it is weak; this skips it where it is strong.": skipped(
            ratio > np.median(ratio), total
        ),
        "a ratio of exactly β is not below β.": skipped(ratio <= np.median(ratio), total),
        "compare the ratio of the two weights with the median ratio, not the second weight alone.": skipped(
            w[:, 1] < np.median(w[:, 1]), total
        ),
        "the second weight is compared with β times the first weight, not with β itself.": skipped(
            w[:, 1] < np.median(ratio), total
        ),
        "only the second expert may be skipped.": np.where(below[:, None], np.stack([np.zeros(len(w)), total], 1), w),
    }
    return values(
        answer, (w,), {"weights": right}, sizes={"N": len(w)}, mistakes={"weights": _others(wrong, right)},
        reference="The definition",
    )  # fmt: skip


def _others(wrong: dict[str, Any], right: Array) -> dict[str, Any]:
    """The wrong values that are not, in this case, right."""
    return {
        hint: value
        for hint, value in wrong.items()
        if np.shape(value) != np.shape(right) or not np.allclose(value, right)
    }


def _log_softmax(z: Array) -> Array:
    z = z - z.max(-1, keepdims=True)
    shifted: Array = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return shifted
