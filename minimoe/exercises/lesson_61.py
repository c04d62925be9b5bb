"""Checks of lesson 61: hierarchies and EM."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, values
from minimoe.exercises.feedback import Report, first_failure


def posteriors(answer: Answer) -> Report:
    """(g_root, g_branch, density) → h_i and h_{j|i}."""
    rng = np.random.default_rng(61)
    N, I, J = 5, 2, 3
    g_root, g_branch = rng.dirichlet(np.ones(I), N), rng.dirichlet(np.ones(J), (N, I))
    density = rng.uniform(0.1, 2, (N, I, J))
    joint = g_root[..., None] * g_branch * density
    branch = joint.sum(2) / joint.sum((1, 2))[:, None]
    leaf = joint / joint.sum(2, keepdims=True)
    unweighted = g_root * density.mean(2)
    return values(
        answer,
        (g_root, g_branch, density),
        {"branch": branch, "leaf": leaf},
        sizes={"N": N, "I": I, "J": J},
        mistakes={
            "branch": {
                "this is the prior of the branches: y has not been used.": g_root,
                "the posteriors of the branches must add up to 1: divide by their sum.": joint.sum(2),
                "the prior of the root is missing.": _shares((g_branch * density).sum(2), 1),
                "the density of a branch is the mean of its leaves' densities, weighted with the branch's gate.": (
                    _shares(unweighted, 1)
                ),
                "a branch is as likely as all its leaves together, not as its best one.": _shares(joint.max(2), 1),
                "a case was made by one of the leaves: add up what they could have made, do not multiply.": _shares(
                    g_root * (g_branch * density).prod(2), 1
                ),
                "the branches of a case must add up to 1 (axis 1), not the cases.": _shares(joint.sum(2), 0),
            },
            "leaf": {
                "this is h_ij, the posterior of a leaf among all leaves; divide by that of its branch.": (
                    joint / joint.sum((1, 2), keepdims=True)
                ),
                "this is the prior within the branch: y has not been used.": g_branch,
                "the leaves of a branch must add up to 1: divide by their sum.": g_branch * density,
                "the gate of the branch is missing.": _shares(density, 2),
                "within a branch, the leaves must add up to 1 (axis 2), not the branches.": _shares(joint, 1),
            },
        },
        shares=("branch", "leaf"),
    )


def fit_leaf(answer: Answer) -> Report:
    """(x, y, h, ridge, variance) → U and the new σ² of one leaf: the M-step with a penalty of ½ ridge ‖U‖²."""
    return first_failure(_fit_leaf(answer, *case) for case in ((9, 3, 2, 0.7, 2.5), (12, 4, 1, 1.5, 0.4)))


def _fit_leaf(answer: Answer, cases: int, inputs: int, outputs: int, ridge: float, variance: float) -> Report:
    rng = np.random.default_rng(62)
    x, y = rng.standard_normal((cases, inputs)), rng.standard_normal((cases, outputs))
    h = rng.uniform(0.05, 1, cases)

    def fitted(left: Array, right: Array, penalty: float) -> Array:
        gram = (left[:, None] * x).T @ x + penalty * np.eye(inputs)
        return np.linalg.solve(gram, (right[:, None] * x).T @ y)

    one, penalty = np.ones(cases), ridge * variance
    U = fitted(h, h, penalty)
    left = h @ ((y - x @ U) ** 2).sum(1)
    new = left / (outputs * h.sum())
    several = {"σ² is that of one entry of y: divide by M too.": left / h.sum()} if outputs > 1 else {}
    return values(
        answer,
        (x, y, h, ridge, variance),
        {"U": U, "variance": new},
        sizes={"N": cases, "D": inputs, "M": outputs},
        mistakes={
            "U": {
                "the weights h are missing: every case counts alike.": fitted(one, one, penalty),
                "h counts twice: it stands once in each sum.": fitted(h**2, h**2, penalty),
                "the weight is missing in xᵀ h x; both sums have it.": fitted(one, h, penalty),
                "the weight is missing in xᵀ h y; both sums have it.": fitted(h, one, penalty),
                "the ridge is missing.": fitted(h, h, 0),
                "the squares are divided by 2σ² and the ridge is not: multiply the ridge with σ².": (
                    fitted(h, h, ridge)
                ),
                "multiply the ridge with σ², do not divide it.": fitted(h, h, ridge / variance),
                "the 2 of 2σ² and the ½ of the ridge cancel.": fitted(h, h, 2 * penalty),
                "the 2 of 2σ² and the ½ of the ridge cancel; here half of the ridge is left.": fitted(
                    h, h, penalty / 2
                ),
                "the ridge is on all of U, its last row included.": np.linalg.solve(
                    (h[:, None] * x).T @ x + penalty * np.diag([1.0] * (inputs - 1) + [0.0]), (h[:, None] * x).T @ y
                ),
                "the weight of a case is h; its root belongs into the rows only if both x and y get it.": fitted(
                    np.sqrt(h), np.sqrt(h), penalty
                ),
            },
            "variance": {
                "the squares must be weighted with h too.": ((y - x @ U) ** 2).mean(),
                "a leaf has Σ h cases, not N: divide by the sum of the weights.": left / (outputs * cases),
                "this is σ, not σ².": np.sqrt(new),
                "this is log σ², not σ².": np.log(new),
                "h counts twice: it stands once in the sum.": h**2 @ ((y - x @ U) ** 2).sum(1) / (outputs * h.sum()),
                "this is the old σ²; fit it to the new U.": variance,
                "the ridge has no part in the new σ²: for a given U, it does not depend on σ².": (
                    (left + ridge * (U**2).sum()) / (outputs * h.sum())
                ),
                "this is the residual of the fit without the ridge.": (
                    h @ ((y - x @ fitted(h, h, 0)) ** 2).mean(1) / h.sum()
                ),
                **several,
            },
        },
    )


def newton_gate(answer: Answer) -> Report:
    """(v, x, h, w) → v after one Newton step on Σ w (h log g + (1 − h) log(1 − g)), with g the sigmoid of x v."""
    rng = np.random.default_rng(63)
    N, D = 8, 3
    x, v = rng.standard_normal((N, D)), 0.7 * rng.standard_normal(D)
    h, w = rng.uniform(0.05, 0.95, N), rng.uniform(0.2, 1, N)
    g = 1 / (1 + np.exp(-x @ v))
    slope = x.T @ (w * (h - g))

    def curve(weight: Array) -> Array:
        return (weight[:, None] * x).T @ x

    step = np.linalg.solve(curve(w * g * (1 - g)), slope)
    return values(
        answer,
        (v, x, h, w),
        {"v": v + step},
        sizes={"N": N, "D": D},
        mistakes={
            "v": {
                "this is the step alone; add it to v.": step,
                "this goes down: the fit is climbed.": v - step,
                "this is a step along the gradient; divide by the curvature.": v + slope,
                "the curvature of a sigmoid is g (1 − g); here 1 − g is missing.": (
                    v + np.linalg.solve(curve(w * g), slope)
                ),
                "the curvature needs the weights w of the cases too.": (v + np.linalg.solve(curve(g * (1 - g)), slope)),
                "the gradient needs the weights w of the cases too.": (
                    v + np.linalg.solve(curve(w * g * (1 - g)), x.T @ (h - g))
                ),
                "this is the curvature of a least-squares fit of h; a sigmoid has the factor g (1 − g).": (
                    v + np.linalg.solve(curve(w), slope)
                ),
                "the curvature is that of the gate, g (1 − g), not that of its target, h (1 − h).": (
                    v + np.linalg.solve(curve(w * h * (1 - h)), slope)
                ),
                "the weights w of the cases are missing, in the gradient and in the curvature.": (
                    v + np.linalg.solve(curve(g * (1 - g)), x.T @ (h - g))
                ),
                "this is the diagonal of the curvature alone; the whole matrix must be inverted.": (
                    v + slope / np.diag(curve(w * g * (1 - g)))
                ),
                "this fits the logits of h by least squares; a Newton step starts from v.": np.linalg.solve(
                    curve(w), x.T @ (w * np.log(h / (1 - h)))
                ),
                "this is half of the step.": v + step / 2,
            }
        },
    )


def _shares(x: Array, axis: int) -> Array:
    return x / x.sum(axis, keepdims=True)
