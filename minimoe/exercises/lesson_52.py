"""Checks of lesson 52: merging and upcycling."""

from __future__ import annotations

import math

import numpy as np

from minimoe.compression import vectors
from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, values
from minimoe.exercises.feedback import Report, first_failure


def slerp(answer: Answer) -> Report:
    """(a, b, t) → the point of the arc, and of the straight line if the cosine is above 0.9995 in size."""
    rng = np.random.default_rng(52)
    a, b = rng.standard_normal((2, 6)) / [[2], [5]]  # of different lengths, with a product below 1
    cases = (
        (a, b, 0.3),
        (b, -0.5 * a, 0.8),
        (a, a, 0.25),
        (2 * a, 5 * a, 0.4),
        (a, a + 0.3 * b, 0.7),  # a small angle, but an angle
        (a, 0.2 * b - a, 0.6),
        (a, 0.12 * b - 3 * a, 0.4),  # nearly opposite: the size of the cosine is 0.9997
    )
    return first_failure(_slerp(answer, *case) for case in cases)


def _slerp(answer: Answer, a: Array, b: Array, t: float) -> Report:
    right = vectors.slerp(a, b, t)
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a @ b / (length_a * length_b))
    mistakes = {"this is the point at 1 − t: with t = 0 the result is a.": vectors.slerp(a, b, 1 - t)}
    if abs(cosine) < vectors.PARALLEL:
        angle = math.acos(cosine)
        unit = vectors.slerp(a / length_a, b / length_b, t)
        wrong_angle = math.acos(max(-1.0, min(1.0, float(a @ b))))
        mistakes |= {
            "this is the straight line; the arc needs the sines.": vectors.lerp(a, b, t),
            "the sum must still be divided by sin ω.": right * math.sin(angle),
            "the lengths of a and b are lost: divide by them for the angle only, and weigh a and b themselves.": unit,
            "ω is the angle: the cosine is a·b divided by both lengths.": (
                (math.sin((1 - t) * wrong_angle) * a + math.sin(t * wrong_angle) * b)
                / (math.sin(wrong_angle) or math.inf)
            ),
            "in the weights stand the sines of (1−t)ω and tω, not (1−t) sin ω and t sin ω.": (
                vectors.lerp(a, b, t) * math.sin(angle)
            ),
        }
    elif not np.allclose(a, b):
        if cosine < 0:
            mistakes |= {
                "opposite vectors lie on a line too: compare the size of the cosine with 0.9995.": _arc(a, b, t)
            }
        mistakes |= {"parallel vectors of different lengths lie on a line: weigh both, (1−t) a + t b.": a}
    return values(answer, (a, b, t), {"point": right}, mistakes={"point": _different(mistakes, right)})


def _arc(a: Array, b: Array, t: float) -> Array:
    """The formula of the arc, where it must not be used."""
    angle = math.acos(max(-1.0, min(1.0, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))))
    found: Array = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / (math.sin(angle) or math.inf)
    return found


def ties(answer: Answer) -> Report:
    """(deltas, keep) → the merged task vector."""
    rng = np.random.default_rng(5)
    hand = np.array([[1.0, 5, -1, 3, 0.3, 6], [3, -2, 4, -4, 0.2, -9], [2, -1, -9, 0.1, 7, -1]])
    small = np.array([[9.0, -1, 2, 0.5], [9, -1, 3, 0.1], [0.1, 1.5, 1, -4]])  # the trimmed −1 − 1 would outvote 1.5
    equal = np.array([[3.0, -2, 0.1, 1], [-3, -2.5, 0.2, 2]])  # no sign is elected in the first column
    cases = ((hand, 5 / 6), (small, 0.5), (equal, 0.75), (rng.standard_normal((5, 12)), 0.4))
    return first_failure(_ties(answer, *case) for case in cases)


def _ties(answer: Answer, deltas: Array, keep: float) -> Report:
    right = vectors.ties(list(deltas), keep)
    trimmed = np.stack([vectors.trim(delta, keep) for delta in deltas])
    agree = np.sign(trimmed) == np.sign(trimmed.sum(0))
    kept = trimmed * agree

    def elected(sign: Array) -> Array:
        same = (np.sign(trimmed) == sign) & (sign != 0)
        found: Array = (trimmed * same).sum(0) / np.maximum(same.sum(0), 1)
        return found

    count = np.count_nonzero(trimmed[0])
    by_value = np.stack([np.where(delta >= np.sort(delta)[-count], delta, 0) for delta in deltas])
    half_up = round(keep * deltas.shape[1])
    everywhere = np.where(abs(deltas) >= np.sort(abs(deltas), axis=None)[-int(keep * deltas.size)], deltas, 0)
    mistakes = {
        "a sum of 0 elects no sign, and the result is 0.": elected(np.where(trimmed.sum(0) >= 0, 1.0, -1.0)),
        "a sum of 0 elects no sign; it does not elect the minus.": elected(np.where(trimmed.sum(0) > 0, 1.0, -1.0)),
        "`int` rounds down: of 4.8 entries, 4 are kept.": vectors.ties(
            [np.where(abs(delta) >= np.sort(abs(delta))[-half_up], delta, 0) for delta in deltas], 1
        ),
        "each vector is trimmed on its own; here they are trimmed together.": vectors.ties(list(everywhere), 1),
        "nothing is trimmed: set all but the largest entries of each vector to 0 first.": vectors.ties(list(deltas), 1),
        "this is the sum of those that agree; divide by how many they are.": kept.sum(0),
        "divide by the number of vectors that agree, not by the number of all.": kept.sum(0) / len(deltas),
        "this is the mean of all trimmed vectors; leave out those with the other sign.": trimmed.mean(0),
        "here each vector has one vote; the elected sign is that of the sum of the trimmed values.": (
            elected(np.sign(np.sign(trimmed).sum(0)))
        ),
        "the vote is over the trimmed vectors, not over the whole ones.": elected(np.sign(deltas.sum(0))),
        "keep the entries that are largest by size: −3 is larger than 2.": (vectors.ties(list(by_value), 1)),
    }
    sizes = {"n": len(deltas), "P": deltas.shape[1]}
    return values(
        answer, (deltas, keep), {"merged": right}, sizes=sizes, mistakes={"merged": _different(mistakes, right)}
    )


def w_down_factor(answer: Answer) -> Report:
    """(E, K, G, renormalize) → what W_down is multiplied by."""
    cases = ((8, 2, 1, True), (8, 2, 4, True), (9, 2, 1, False), (8, 3, 5, False), (4, 4, 2, False))
    return first_failure(_w_down_factor(answer, *case) for case in cases)


def _w_down_factor(answer: Answer, E: int, K: int, G: int, renormalize: bool) -> Report:
    right = float(G) if renormalize else E * G / K
    mistakes = {
        "turned round: W_down must become larger, because the weights are small.": 1 / right,
        "each of the G slices has only 1/G of the weight of its copy.": right / G,
        "if the weights are renormalised, those of a token's experts add up to 1 whatever E and K are.": E * G / K,
        "without renormalising, a weight is 1/(number of all experts), and the chosen ones add up to K/E.": float(G),
        "there are E·G experts and K·G of them are chosen, so one G cancels.": right * G,
        "of the E copies, K are added up.": E * G if not renormalize else right / K,
    }
    found = {hint: np.array(wrong) for hint, wrong in mistakes.items() if not np.isclose(wrong, right)}
    return values(answer, (E, K, G, renormalize), {"factor": right}, mistakes={"factor": found})


def _different(mistakes: dict[str, Array], right: Array) -> dict[str, Array]:
    """The mistakes that this case shows."""
    return {hint: wrong for hint, wrong in mistakes.items() if not np.allclose(wrong, right)}
