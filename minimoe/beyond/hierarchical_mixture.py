"""A tree of experts, and three ways to train it: by gradient, by expectation-maximisation, and online.

    g = softmax(x V),   g_i = softmax(x V_i),   μ_ij = x U_ij
    p(y | x) = Σ_i g_i Σ_j g_{j|i} N(y; μ_ij, σ²_ij)

The root gate chooses a branch i, the gate of that branch chooses a leaf j, and the leaf's linear expert makes y with
Gaussian noise. It is not known which leaf made y, but once y has been seen, the posterior of each leaf can be computed:

    h_i ∝ g_i Σ_j g_{j|i} N(y; μ_ij, σ²_ij),     h_{j|i} ∝ g_{j|i} N(y; μ_ij, σ²_ij),     h_ij = h_i h_{j|i}

EM uses these posteriors: with all of them given, every leaf is a weighted least-squares problem and every gate is a
weighted classification. No learning rate is needed, and the objective never falls.

The last column of x is 1 in all rows (``with_one``), so the offsets are rows of the weights. I branches have J leaves
each; M is the number of entries of y. The objective is the log-likelihood less ½ ridge ‖gates and experts‖². Without
the ridge, a gate that separates its cases would grow for ever. Variances are at least ``FLOOR``, because the likelihood
of an expert that fits its cases exactly would be infinite.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", Neural Computation 6, 181-214.
Lesson: lessons/61_hierarchies_and_em.ipynb
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from minimoe.beyond.log_space import exp, log_softmax, log_sum_exp
from minimoe.core import tree
from minimoe.core.arrays import Array, array_module
from minimoe.core.errors import UserError

RIDGE = 1e-3
"""The default weight of ½ ‖weights‖², which is subtracted from the sum of the log-likelihoods of all cases."""

FLOOR = 1e-6
"""The least variance of a leaf, in the square of the units of y."""

NEWTON_STEPS = 4
"""The most Newton steps of a gate in one EM step."""

HALVINGS = 30
"""How often a Newton step that does not climb is halved before the gate stays as it is."""

LEAST_POSTERIOR = 1e-3
"""Where the logarithm of a posterior h is fitted by least squares, a smaller h counts as this number. ln h goes to −∞
as h goes to 0, so without a bound the cases that a leaf has nothing to do with would decide its gate."""


class HierarchicalMixture(NamedTuple):
    v_root: Array  # (D, I)
    v_branch: Array  # (I, D, J)
    u_leaf: Array  # (I, J, D, M)
    log_variance: Array  # (I, J)  log σ²


class Beliefs(NamedTuple):
    """Log-probabilities of the branches and leaves for N cases: a posterior if y was used, else a prior."""

    branch: Array  # (N, I)
    leaf: Array  # (N, I, J)  given the branch

    @property
    def joint(self) -> Array:
        """Log of the probability of each leaf (N, I, J)."""
        return self.branch[..., None] + self.leaf


class Cache(NamedTuple):
    x: Array  # (N, D)
    residual: Array  # (N, I, J, M)  y − μ
    prior: Beliefs
    posterior: Beliefs


def with_one(x: Array) -> Array:
    """x (N, D − 1) → (N, D), with a last column of ones."""
    xp = array_module(x)
    return xp.concatenate([x, xp.ones((len(x), 1), x.dtype)], axis=1)


def init(
    rng: np.random.Generator, x: Array, y: Array, branches: int, leaves: int, scale: float = 0.1
) -> HierarchicalMixture:
    """Weights from N(0, ``scale``²), and the variance of y in each leaf. x (N, D) and y (N, M) give sizes and dtype.

    Raises:
        UserError: a size is below 1, x and y have different lengths, or the last column of x is not 1.
    """
    if branches < 1 or leaves < 1:
        raise UserError(f"branches {branches} and leaves {leaves} make no tree: choose whole numbers of at least 1.")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        found = f"x of shape {x.shape} and y of shape {y.shape}"
        raise UserError(f"{found} are no cases: give (N, D) and (N, M) with N of at least 1.")
    if not (x[:, -1] == 1).all():
        raise UserError("the last column of x is not 1 in all rows, so the experts have no offset: use with_one(x).")
    (_, D), M = x.shape, y.shape[1]
    spread = math.log(max(float(((y - y.mean(0)) ** 2).mean()), FLOOR))
    return HierarchicalMixture(
        (scale * rng.standard_normal((D, branches))).astype(x.dtype),
        (scale * rng.standard_normal((branches, D, leaves))).astype(x.dtype),
        (scale * rng.standard_normal((branches, leaves, D, M))).astype(x.dtype),
        np.full((branches, leaves), spread, x.dtype),
    )


def prior(params: HierarchicalMixture, x: Array) -> Beliefs:
    """x (N, D) → log g: what the gates say before y is seen."""
    by_branch = (x @ params.v_branch).swapaxes(0, 1)  # (I, N, J) → (N, I, J)
    return Beliefs(log_softmax(x @ params.v_root), log_softmax(by_branch))


def means(params: HierarchicalMixture, x: Array) -> Array:
    """x (N, D) → μ (N, I, J, M), the mean that each leaf predicts."""
    return array_module(x).moveaxis(x @ params.u_leaf, 2, 0)


def predict(params: HierarchicalMixture, x: Array) -> Array:
    """x (N, D) → Σ g_ij μ_ij (N, M)."""
    return (exp(prior(params, x).joint)[..., None] * means(params, x)).sum((1, 2))


def forward(params: HierarchicalMixture, x: Array, y: Array) -> tuple[Array, Cache]:
    """x (N, D) and y (N, M) → log p(y | x) of each case (N,); the cache holds the posteriors: this is the E-step."""
    before = prior(params, x)
    residual = y[:, None, None] - means(params, x)
    square = (residual**2).sum(3) * exp(-params.log_variance)
    density = -(square + y.shape[1] * (params.log_variance + math.log(2 * math.pi))) / 2  # (N, I, J)
    of_leaf = before.leaf + density
    of_branch = before.branch + log_sum_exp(of_leaf)[..., 0]
    after = Beliefs(log_softmax(of_branch), log_softmax(of_leaf))
    return log_sum_exp(of_branch)[:, 0], Cache(x, residual, before, after)


def backward(params: HierarchicalMixture, cache: Cache, dy: Array) -> tuple[Array, HierarchicalMixture]:
    """dy (N,), the gradient with respect to each log-likelihood → dx (N, D) and the gradient of the parameters.

    The derivative of a log of a sum is the mean of the derivatives of the logs, weighted with the posterior:

        dμ_ij = h_ij (y − μ_ij)/σ²,         d log σ² = ½ h_ij (‖y − μ_ij‖²/σ² − M)
        d(x V) = h − g,                     d(x V_i) = h_i (h_{j|i} − g_{j|i})
    """
    xp = array_module(dy)
    x, h = cache.x, exp(cache.posterior.joint) * dy[:, None, None]
    precision = exp(-params.log_variance)
    dmean = (h * precision)[..., None] * cache.residual  # (N, I, J, M)
    square = (cache.residual**2).sum(3) * precision
    dlog_variance = (h * (square - cache.residual.shape[3])).sum(0) / 2
    droot = (exp(cache.posterior.branch) - exp(cache.prior.branch)) * dy[:, None]
    dbranch = exp(cache.posterior.branch)[..., None] * (exp(cache.posterior.leaf) - exp(cache.prior.leaf))
    dbranch *= dy[:, None, None]
    gradient = HierarchicalMixture(
        x.T @ droot,
        x.T @ dbranch.swapaxes(0, 1),  # (D, N) @ (I, N, J)
        x.T @ xp.moveaxis(dmean, 0, 2),  # (D, N) @ (I, J, N, M)
        dlog_variance,
    )
    dx = droot @ params.v_root.T
    dx += (dbranch.swapaxes(0, 1) @ params.v_branch.swapaxes(1, 2)).sum(0)
    dx += (xp.moveaxis(dmean, 0, 2) @ params.u_leaf.swapaxes(2, 3)).sum((0, 1))
    return dx, gradient


def objective(params: HierarchicalMixture, x: Array, y: Array, ridge: float = RIDGE) -> float:
    """What EM maximises: the log-likelihood of all cases, less ½ ridge ‖gates and experts‖²."""
    weights = sum(float((leaf**2).sum()) for leaf in params[:3])
    return float(forward(params, x, y)[0].sum()) - ridge / 2 * weights


def em_step(
    params: HierarchicalMixture, x: Array, y: Array, ridge: float = RIDGE, floor: float = FLOOR
) -> tuple[HierarchicalMixture, float]:
    """One step of EM on x (N, D), y (N, M) → the new parameters, and the log-likelihood before the step.

    E-step: the posteriors h. M-step: each leaf by weighted least squares, then its variance, and each gate by Newton's
    method, also known as iteratively reweighted least squares (IRLS). ``objective`` cannot fall.

    Raises:
        UserError: ``ridge`` is below 0, or ``floor`` is not above 0.
    """
    _check_settings(ridge, floor)
    log_likelihood, cache = forward(params, x, y)
    h = exp(cache.posterior.joint)
    branch, leaf = exp(cache.posterior.branch), exp(cache.posterior.leaf)
    v_root = _newton(params.v_root, x, branch, _ones(branch[:, 0]), ridge)
    v_branch = [_newton(params.v_branch[i], x, leaf[:, i], branch[:, i], ridge) for i in range(branch.shape[1])]
    new = _fit_leaves(params, x, y, h, ridge, floor)
    return new._replace(v_root=v_root, v_branch=array_module(x).stack(v_branch)), float(log_likelihood.sum())


def least_squares_step(
    params: HierarchicalMixture, x: Array, y: Array, ridge: float = RIDGE, floor: float = FLOOR
) -> tuple[HierarchicalMixture, float]:
    """``em_step`` with a simpler M-step for the gates, Algorithm 2 of the paper: one least-squares fit of ln h.

    If g were equal to h, x V would be ln h up to a constant per case; so x V is fitted to ln h, which takes one
    solution of a linear system and no iteration. What is fitted is no longer the likelihood, and the likelihood may
    fall.
    """
    _check_settings(ridge, floor)
    log_likelihood, cache = forward(params, x, y)
    branch = exp(cache.posterior.branch)
    v_root = _fit(x, _log_target(cache.posterior.branch), _ones(branch[:, 0]), ridge)
    leaf = _log_target(cache.posterior.leaf)
    v_branch = [_fit(x, leaf[:, i], branch[:, i], ridge) for i in range(branch.shape[1])]
    new = _fit_leaves(params, x, y, exp(cache.posterior.joint), ridge, floor)
    return new._replace(v_root=v_root, v_branch=array_module(x).stack(v_branch)), float(log_likelihood.sum())


class Online(NamedTuple):
    """What recursive least squares remembers: the inverse of each weighted sum of x xᵀ, and sums for the variance."""

    root: Array  # (D, D)
    branch: Array  # (I, D, D)
    leaf: Array  # (I, J, D, D)
    weight: Array  # (I, J)  discounted sum of h
    error: Array  # (I, J)  discounted sum of h ‖y − μ‖² / M


def online_init(params: HierarchicalMixture, ridge: float = 1.0) -> Online:
    """The memory before the first case: as if Σ x xᵀ were ``ridge`` times the identity.

    Raises:
        UserError: ``ridge`` is not above 0; the matrix would have no inverse.
    """
    if not ridge > 0:
        raise UserError(f"ridge {ridge} has no inverse: choose a number above 0.")
    (D, I), J = params.v_root.shape, params.v_branch.shape[2]
    inverse = np.eye(D, dtype=params.v_root.dtype) / ridge
    weight = np.ones((I, J), inverse.dtype)
    return Online(
        inverse, np.tile(inverse, (I, 1, 1)), np.tile(inverse, (I, J, 1, 1)), weight, np.exp(params.log_variance)
    )


def online_step(
    params: HierarchicalMixture, memory: Online, x: Array, y: Array, decay: float, floor: float = FLOOR
) -> tuple[HierarchicalMixture, Online]:
    """One case x (D,), y (M,) → new parameters and memory. Each later case multiplies the weight of
    this one by ``decay``, which is at most 1.

    With R the inverse of the weighted Σ x xᵀ, a case of weight h changes U and R, each by a product of vectors:

        k = R x / (decay/h + xᵀ R x),    U ← U + k (y − x U),    R ← (R − k (R x)ᵀ) / decay

    A leaf fits y with the weight h_ij, the root fits ln h_i with the weight 1, and a branch fits ln h_{j|i} with the
    weight h_i.

    Raises:
        UserError: ``decay`` is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise UserError(f"decay {decay} is not a discount: choose a number above 0 and at most 1.")
    log_h = forward(params, x[None], y[None])[1].posterior
    h_branch, h = exp(log_h.branch[0]), exp(log_h.joint[0])  # (I,), (I, J)
    u_leaf, leaf = _recursive(params.u_leaf, memory.leaf, x, y, h, decay)
    one = _ones(h_branch[0])
    v_root, root = _recursive(params.v_root, memory.root, x, _log_target(log_h.branch[0]), one, decay)
    v_branch, branch = _recursive(params.v_branch, memory.branch, x, _log_target(log_h.leaf[0]), h_branch, decay)
    residual = ((y - x @ u_leaf) ** 2).mean(-1)  # (I, J)
    weight = decay * memory.weight + h
    error = decay * memory.error + h * residual
    variance = array_module(x).maximum(error / weight, floor)
    new = HierarchicalMixture(v_root, v_branch, u_leaf, array_module(x).log(variance))
    return new, Online(root, branch, leaf, weight, error)


def gradient_step(params: HierarchicalMixture, x: Array, y: Array, rate: float) -> tuple[HierarchicalMixture, float]:
    """One step of gradient ascent on the mean log-likelihood → new parameters, and the log-likelihood before it."""
    log_likelihood, cache = forward(params, x, y)
    _, gradient = backward(params, cache, _ones(log_likelihood) / len(x))
    moved: Any = tree.map(lambda old, change: old + rate * change, params, gradient)
    return moved, float(log_likelihood.sum())


def four_lines(rng: np.random.Generator, cases: int = 300, noise: float = 0.15) -> tuple[Array, Array]:
    """A W shape: x (N, 2), uniform in [−3, 3] and a column of ones; y = 2 | |x| − 1.5 | with Gaussian noise (N, 1)."""
    x = rng.uniform(-3, 3, (cases, 1))
    return with_one(x), 2 * abs(abs(x) - 1.5) + noise * rng.standard_normal((cases, 1))


def _fit_leaves(
    params: HierarchicalMixture, x: Array, y: Array, h: Array, ridge: float, floor: float
) -> HierarchicalMixture:
    """The M-step of the leaves: U by least squares weighted with h (N, I, J), then σ² from the residuals.

    U maximises −Σ h ‖y − x U‖²/2σ² − ½ ridge ‖U‖² for the σ² that the leaf has, hence ridge times σ².
    """
    xp = array_module(x)
    u_leaf, log_variance = xp.empty_like(params.u_leaf), xp.empty_like(params.log_variance)
    for i, j in np.ndindex(*params.log_variance.shape):
        weight, variance = h[:, i, j], exp(params.log_variance[i, j])
        u_leaf[i, j] = _fit(x, y, weight, ridge * variance)
        left = (weight * ((y - x @ u_leaf[i, j]) ** 2).mean(1)).sum()
        cases = weight.sum()
        if cases > 0:
            log_variance[i, j] = xp.log(xp.maximum(left / cases, floor))
        else:  # nothing to learn the variance from
            log_variance[i, j] = params.log_variance[i, j]
    return params._replace(u_leaf=u_leaf, log_variance=log_variance)


def _fit(x: Array, target: Array, weight: Array, ridge: float | Array) -> Array:
    """x (N, D), target (N, M), weight (N,) → W (D, M), the minimum of Σ weight ‖target − x W‖² + ridge ‖W‖²."""
    xp = array_module(x)
    weighted = x * weight[:, None]
    gram = weighted.T @ x
    # A tiny part of the largest entry keeps the matrix invertible where a leaf has fewer cases than unknowns.
    little = np.finfo(x.dtype).eps * gram.max() + np.finfo(x.dtype).tiny
    return xp.linalg.solve(gram + (ridge + little) * xp.eye(x.shape[1], dtype=x.dtype), weighted.T @ target)


def _newton(v: Array, x: Array, target: Array, weight: Array, ridge: float) -> Array:
    """Climbs Q = Σ weight Σ_j target_j log g_j − ½ ridge ‖V‖² from V (D, J), with target (N, J) and weight (N,).

    Gradient: xᵀ weight (target − g) − ridge V. The matrix of second derivatives has a block for each pair of classes,
    −xᵀ weight g_a (1[a = b] − g_b) x − ridge 1[a = b]. A Newton step is a least-squares fit whose weights depend on V,
    hence the name iteratively reweighted least squares.
    """
    xp = array_module(x)
    D, J = v.shape
    here, g = _gate_fit(v, x, target, weight, ridge)
    for _ in range(NEWTON_STEPS):
        slope = x.T @ (weight[:, None] * (target - g)) - ridge * v  # (D, J)
        # A constant added to all logits of a case changes nothing, so without the last term there is no inverse.
        curve = xp.empty((J, D, J, D), x.dtype)
        for a, b in np.ndindex(J, J):
            curve[a, :, b] = (x * (weight * g[:, a] * ((a == b) - g[:, b]))[:, None]).T @ x
        square = curve.reshape(J * D, J * D)
        square = square + (ridge + 1e-9 * (1 + square.max())) * xp.eye(J * D, dtype=x.dtype)
        step = xp.linalg.solve(square, slope.T.reshape(-1)).reshape(J, D).T
        for _ in range(HALVINGS):
            there, g_there = _gate_fit(v + step, x, target, weight, ridge)
            if there >= here:
                break
            step = step / 2  # far from the top the parabola is a bad guide: a shorter step climbs
        else:
            return v
        gain, v, here, g = there - here, v + step, there, g_there
        if gain <= 1e-9 * abs(here):
            break
    return v


def _gate_fit(v: Array, x: Array, target: Array, weight: Array, ridge: float) -> tuple[float, Array]:
    log_g = log_softmax(x @ v)
    fit = float((weight[:, None] * target * log_g).sum()) - ridge / 2 * float((v**2).sum())
    return fit, exp(log_g)


def _log_target(log_h: Array) -> Array:
    """ln h, of h at least LEAST_POSTERIOR, with a mean of 0: only differences between logits mean anything."""
    bounded = array_module(log_h).maximum(log_h, math.log(LEAST_POSTERIOR))
    return bounded - bounded.mean(-1, keepdims=True)


def _recursive(w: Array, inverse: Array, x: Array, target: Array, weight: Array, decay: float) -> tuple[Array, Array]:
    """One case for each of many fits: w (…, D, M), inverse (…, D, D), target (…, M) or (M,), weight (…)."""
    projected = inverse @ x  # (…, D)
    # weight R x / (decay + weight xᵀ R x): the formula above without a division by the weight, which may be 0
    gain = weight[..., None] * projected / (decay + weight * (projected @ x))[..., None]
    moved = w + gain[..., None] * (target - x @ w)[..., None, :]
    return moved, (inverse - gain[..., None] * projected[..., None, :]) / decay


def _check_settings(ridge: float, floor: float) -> None:
    if not ridge >= 0:
        raise UserError(f"ridge {ridge} would make weights grow: choose a number of at least 0.")
    if not floor > 0:
        raise UserError(f"floor {floor} is no variance: choose a number above 0.")


def _ones(x: Array) -> Array:
    return array_module(x).ones_like(x)
