"""The first mixture of experts: linear experts, a linear gate, and three errors that train them differently.

    o_i = x U_i + b_i,    p = softmax(x V + c)

    cooperative    ‖d − Σ p_i o_i‖²                 the experts share one residual: each fills what the others leave
    competitive    Σ p_i ‖d − o_i‖²                 each expert learns the whole answer, with the weight p_i
    mixture        −log Σ p_i exp(−½ ‖d − o_i‖²)    one expert made the answer; which of them is not known

The mixture error weights the gradient of an expert by the posterior h_i ∝ p_i exp(−½ ‖d − o_i‖²), the probability that
this expert made the given target. The competitive error weights it by the prior p_i, which does not depend on the
target. For classes, an expert's answer is the softmax π_i of its o_i, and the mixture's error is −log Σ p_i π_i(d).

All experts compute for every case: choosing only a few came later. M is the number of entries of an answer.

Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive mixtures of local experts", Neural Computation 3, 79-87.
Lesson: lessons/60_adaptive_mixtures.ipynb
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from minimoe.beyond.log_space import exp, log_softmax, log_sum_exp
from minimoe.core.arrays import Array, array_module
from minimoe.core.errors import UserError


class AdaptiveMixture(NamedTuple):
    w_expert: Array  # (E, D, M)
    b_expert: Array  # (E, M)
    w_gate: Array  # (D, E)
    b_gate: Array  # (E,)


class Answers(NamedTuple):
    """What the mixture says about N cases, before any softmax."""

    gate: Array  # (N, E)  the logits of p
    output: Array  # (N, E, M)  o, one answer of each expert


class Cache(NamedTuple):
    x: Array  # (N, D)


Error: TypeAlias = Callable[[Answers, Array], tuple[Array, Answers]]
"""(answers, target) → the error of each case (N,), and the gradient of the summed error with respect to the answers."""


def init(
    rng: np.random.Generator, inputs: int, outputs: int, experts: int, scale: float = 0.1, dtype: DTypeLike = np.float64
) -> AdaptiveMixture:
    """Parameters drawn from N(0, ``scale``²): the experts start nearly alike, and the gate nearly undecided.

    Raises:
        UserError: a size is below 1.
    """
    for name, size in (("inputs", inputs), ("outputs", outputs), ("experts", experts)):
        if size < 1:
            raise UserError(f"{name} {size} is not a size: choose a whole number of at least 1.")
    shapes = (experts, inputs, outputs), (experts, outputs), (inputs, experts), (experts,)
    return AdaptiveMixture(*((scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes))


def forward(params: AdaptiveMixture, x: Array) -> tuple[Answers, Cache]:
    """x (N, D) → the answers of the gate and of every expert."""
    output = (x @ params.w_expert).swapaxes(0, 1) + params.b_expert  # (E, N, M) → (N, E, M)
    return Answers(x @ params.w_gate + params.b_gate, output), Cache(x)


def backward(params: AdaptiveMixture, cache: Cache, dy: Answers) -> tuple[Array, AdaptiveMixture]:
    """The gradient with respect to the answers → dx (N, D) and the gradient of the parameters.

    The gate and each expert are linear in x, so with ds the gradient of the gate's logits and do that of the outputs

        dU_i = xᵀ do_i,    dV = xᵀ ds,    dx = ds Vᵀ + Σ_i do_i U_iᵀ
    """
    x = cache.x
    by_expert = dy.output.swapaxes(0, 1)  # (E, N, M)
    dx = dy.gate @ params.w_gate.T + (by_expert @ params.w_expert.swapaxes(1, 2)).sum(0)
    return dx, AdaptiveMixture(x.T @ by_expert, by_expert.sum(1), x.T @ dy.gate, dy.gate.sum(0))


def prior(answers: Answers) -> Array:
    """p (N, E): how much the gate trusts each expert before the target is seen."""
    return exp(log_softmax(answers.gate))


def posterior(answers: Answers, target: Array) -> Array:
    """h (N, E): which expert made the target (N, M), given the target."""
    return exp(log_softmax(log_softmax(answers.gate) - _squares(answers, target) / 2))


def class_posterior(answers: Answers, labels: Array) -> Array:
    """h (N, E): which expert named the class ``labels`` (N,), given the class."""
    return exp(log_softmax(log_softmax(answers.gate) + _log_share(answers, labels)))


def blend(answers: Answers) -> Array:
    """Σ p_i o_i (N, M): what the mixture answers."""
    return (prior(answers)[..., None] * answers.output).sum(1)


def class_blend(answers: Answers) -> Array:
    """Σ p_i π_i (N, M): the probability of each class."""
    return (prior(answers)[..., None] * exp(log_softmax(answers.output))).sum(1)


def alone(answers: Answers) -> Array:
    """The output (N, M) of the expert that the gate trusts most: what the mixture would answer without the others."""
    best = answers.gate.argmax(1)
    return array_module(best).take_along_axis(answers.output, best[:, None, None], axis=1)[:, 0]


def cooperative(answers: Answers, target: Array) -> tuple[Array, Answers]:
    """‖d − Σ p o‖² with target d (N, M) → the error of each case (N,), and its gradient.

    With r = d − Σ p o, each output gets a share of the same residual, and the gradient of a logit shows how it moves
    the blend:

        do_i = −2 p_i r,    ds_i = −2 p_i (o_i − Σ p o) · r
    """
    p = prior(answers)
    mean = (p[..., None] * answers.output).sum(1, keepdims=True)  # (N, 1, M)
    residual = target[:, None] - mean
    dgate = -2 * p * ((answers.output - mean) * residual).sum(2)
    return (residual**2).sum((1, 2)), Answers(dgate, -2 * p[..., None] * residual)


def competitive(answers: Answers, target: Array) -> tuple[Array, Answers]:
    """Σ p ‖d − o‖² with target d (N, M) → the error of each case (N,), and its gradient.

    do_i = −2 p_i (d − o_i),    ds_i = p_i (‖d − o_i‖² − E),    E the error of the case
    """
    p, squares = prior(answers), _squares(answers, target)
    error = (p * squares).sum(1)
    return error, Answers(p * (squares - error[:, None]), -2 * p[..., None] * (target[:, None] - answers.output))


def mixture(answers: Answers, target: Array) -> tuple[Array, Answers]:
    """−log Σ p exp(−½ ‖d − o‖²) with target d (N, M) → the error of each case (N,), and its gradient.

    The derivative of a log of a sum is the mean of the derivatives of the logs, weighted with the posterior h:

        do_i = −h_i (d − o_i),    ds_i = p_i − h_i
    """
    log_joint = log_softmax(answers.gate) - _squares(answers, target) / 2  # (N, E)
    h = exp(log_softmax(log_joint))
    away = answers.output - target[:, None]
    return -log_sum_exp(log_joint)[:, 0], Answers(prior(answers) - h, h[..., None] * away)


def class_cooperative(answers: Answers, labels: Array) -> tuple[Array, Answers]:
    """The cooperative error with d the one-hot form of ``labels`` (N,), and π_i in the place of o_i."""
    return _through_softmax(cooperative, answers, labels)


def class_competitive(answers: Answers, labels: Array) -> tuple[Array, Answers]:
    """The competitive error with d the one-hot form of ``labels`` (N,), and π_i in the place of o_i."""
    return _through_softmax(competitive, answers, labels)


def class_mixture(answers: Answers, labels: Array) -> tuple[Array, Answers]:
    """−log Σ p_i π_i(d) with ``labels`` d (N,) → the error of each case (N,), and its gradient.

    do_i = h_i (π_i − onehot),    ds_i = p_i − h_i,    h_i ∝ p_i π_i(d)
    """
    log_joint = log_softmax(answers.gate) + _log_share(answers, labels)  # (N, E)
    h = exp(log_softmax(log_joint))
    away = exp(log_softmax(answers.output)) - _one_hot(labels, answers)[:, None]
    return -log_sum_exp(log_joint)[:, 0], Answers(prior(answers) - h, h[..., None] * away)


ERRORS: dict[str, Error] = {"cooperative": cooperative, "competitive": competitive, "mixture": mixture}
CLASS_ERRORS: dict[str, Error] = {
    "cooperative": class_cooperative,
    "competitive": class_competitive,
    "mixture": class_mixture,
}


def step(
    params: AdaptiveMixture, x: Array, target: Array, error: Error, rate: float
) -> tuple[AdaptiveMixture, Array, Answers]:
    """A gradient-descent step on the mean error of x (N, D) → new parameters; error (N,), answers before the step."""
    answers, cache = forward(params, x)
    errors, gradient = error(answers, target)
    _, dparams = backward(params, cache, gradient)
    moved = (old - rate / len(x) * change for old, change in zip(params, dparams, strict=True))
    return AdaptiveMixture(*moved), errors, answers


def two_lines(rng: np.random.Generator, cases: int = 200, noise: float = 0.3) -> tuple[Array, Array]:
    """A V shape: x (N, 1) uniform in [−3, 3], d = 2 |x| with Gaussian noise (N, 1). Two lines, slopes −2 and 2."""
    x = rng.uniform(-3, 3, (cases, 1))
    return x, 2 * abs(x) + noise * rng.standard_normal((cases, 1))


def _through_softmax(error: Error, answers: Answers, labels: Array) -> tuple[Array, Answers]:
    """An error of answers, applied to the softmax of each expert's output."""
    share = exp(log_softmax(answers.output))
    value, (dgate, dshare) = error(Answers(answers.gate, share), _one_hot(labels, answers))
    return value, Answers(dgate, share * (dshare - (share * dshare).sum(2, keepdims=True)))


def _squares(answers: Answers, target: Array) -> Array:
    """‖d − o_i‖² (N, E)."""
    return ((target[:, None] - answers.output) ** 2).sum(2)


def _log_share(answers: Answers, labels: Array) -> Array:
    """log π_i(d) (N, E): the log-probability that each expert gives to the right class."""
    xp = array_module(answers.output)
    return xp.take_along_axis(log_softmax(answers.output), _checked(labels, answers)[:, None, None], axis=2)[..., 0]


def _one_hot(labels: Array, answers: Answers) -> Array:
    xp = array_module(answers.output)
    return xp.eye(answers.output.shape[2], dtype=answers.output.dtype)[_checked(labels, answers)]


def _checked(labels: Array, answers: Answers) -> Array:
    """The labels, checked: NumPy would count a negative label from the end."""
    classes = answers.output.shape[2]
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        found = f"labels from {labels.min()} to {labels.max()}"
        raise UserError(f"{found} are not classes: use whole numbers from 0 that are below {classes}.")
    return labels
