"""Wrong answers to the exercises of lesson 61, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_61 as check


def shares(x, axis):
    return x / x.sum(axis, keepdims=True)


def tree(branch=None, leaf=None):
    """The right posteriors but for one: each is a function of g_root, g_branch, the density and their product."""

    def posteriors(g_root, g_branch, density):
        joint = g_root[..., None] * g_branch * density
        first = shares(joint.sum(2), 1) if branch is None else branch(g_root, g_branch, density, joint)
        return first, shares(joint, 2) if leaf is None else leaf(g_root, g_branch, density, joint)

    return posteriors


def tree_by_loop(g_root, g_branch, density):
    branch, leaf = np.zeros(g_root.shape), np.zeros(g_branch.shape)
    for n in range(len(g_root)):
        for i in range(g_root.shape[1]):
            made = [g * one for g, one in zip(g_branch[n, i], density[n, i], strict=True)]
            branch[n, i] = g_root[n, i] * sum(made)
            leaf[n, i] = [one / sum(made) for one in made]
        branch[n] /= branch[n].sum()
    return branch, leaf


def tree_from_all_leaves(g_root, g_branch, density):
    """h_ij among all leaves first, then the branches as sums, and the leaves as quotients."""
    joint = np.exp(np.log(g_root)[..., None] + np.log(g_branch) + np.log(density))
    h = joint / joint.sum((1, 2), keepdims=True)
    return h.sum(2), h / h.sum(2)[..., None]


def fitted(left=np.array, right=np.array, penalty=lambda ridge, variance: ridge * variance):
    """U with other weights in the two sums, or another penalty."""

    def fit(x, y, h, ridge, variance):
        gram = (left(h)[:, None] * x).T @ x + penalty(ridge, variance) * np.eye(x.shape[1])
        return np.linalg.solve(gram, (right(h)[:, None] * x).T @ y)

    return fit


def leaf(fit=None, variance=None):
    """The right M-step but for one: U, or σ² as a function of the residual and h."""

    def fit_leaf(x, y, h, ridge, old):
        U = fitted()(x, y, h, ridge, old)
        r = y - x @ U
        new = h @ (r**2).mean(1) / h.sum() if variance is None else variance(r, h)
        return U if fit is None else fit(x, y, h, ridge, old), new

    return fit_leaf


def old_variance(x, y, h, ridge, variance):
    return fitted()(x, y, h, ridge, variance), variance


def residual_without_ridge(x, y, h, ridge, variance):
    r = y - x @ fitted(penalty=lambda ridge, variance: 0)(x, y, h, ridge, variance)
    return fitted()(x, y, h, ridge, variance), h @ (r**2).mean(1) / h.sum()


def ridge_without_offset(x, y, h, ridge, variance):
    penalty = ridge * variance * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    return np.linalg.solve((h[:, None] * x).T @ x + penalty, (h[:, None] * x).T @ y)


def ridge_in_variance(x, y, h, ridge, variance):
    U = fitted()(x, y, h, ridge, variance)
    return U, (h @ ((y - x @ U) ** 2).sum(1) + ridge * (U**2).sum()) / (y.shape[1] * h.sum())


def leaf_by_lstsq(x, y, h, ridge, variance):
    """The ridge as D more cases, whose target is 0."""
    root = np.sqrt(h)[:, None]
    more = np.sqrt(ridge * variance) * np.eye(x.shape[1])
    target = np.concatenate([root * y, np.zeros((x.shape[1], y.shape[1]))])
    U, *_ = np.linalg.lstsq(np.concatenate([root * x, more]), target, rcond=None)
    return U, ((root * (y - x @ U)) ** 2).sum() / (y.shape[1] * h.sum())


def leaf_by_loop(x, y, h, ridge, variance):
    D, M = x.shape[1], y.shape[1]
    gram, moment = ridge * np.eye(D), np.zeros((D, M))
    for n in range(len(x)):
        gram += h[n] * np.outer(x[n], x[n]) / variance
        moment += h[n] * np.outer(x[n], y[n]) / variance
    U = np.linalg.inv(gram) @ moment
    return U, sum(h[n] * np.square(y[n] - x[n] @ U).sum() for n in range(len(x))) / (M * sum(h))


def newton(curve=lambda g, h, w: w * g * (1 - g), slope=lambda g, h, w: w * (h - g), old=1, step=1):
    """The right step but for one thing."""

    def newton_gate(v, x, h, w):
        g = 1 / (1 + np.exp(-x @ v))
        found = x.T @ slope(g, h, w)
        if curve is not None:
            found = np.linalg.solve((curve(g, h, w)[:, None] * x).T @ x, found)
        return old * v + step * found

    return newton_gate


def newton_on_the_diagonal(v, x, h, w):
    g = 1 / (1 + np.exp(-x @ v))
    return v + x.T @ (w * (h - g)) / ((w * g * (1 - g)) @ x**2)


def logits_by_least_squares(v, x, h, w):
    root = np.sqrt(w)
    return np.linalg.lstsq(root[:, None] * x, root * np.log(h / (1 - h)), rcond=None)[0]


def newton_as_least_squares(v, x, h, w):
    """IRLS: a weighted least-squares fit of x v + (h − g)/g(1 − g)."""
    g = 1 / (1 + np.exp(-x @ v))
    root = np.sqrt(w * g * (1 - g))
    return np.linalg.lstsq(root[:, None] * x, root * (x @ v + (h - g) / (g * (1 - g))), rcond=None)[0]


def newton_by_loop(v, x, h, w):
    slope, curve = np.zeros(len(v)), np.zeros((len(v), len(v)))
    for n in range(len(x)):
        g = np.exp(x[n] @ v) / (1 + np.exp(x[n] @ v))
        slope += w[n] * (h[n] - g) * x[n]
        curve -= w[n] * (g - g**2) * np.outer(x[n], x[n])
    return v - np.linalg.inv(curve) @ slope


WRONG = {
    check.posteriors: [
        (tree(branch=lambda root, branch, density, joint: root), "has not been used"),
        (tree(branch=lambda root, branch, density, joint: joint.sum(2)), "divide by their sum"),
        (tree(branch=lambda root, branch, density, joint: shares((branch * density).sum(2), 1)), "root is missing"),
        (tree(branch=lambda root, branch, density, joint: shares(root * density.sum(2), 1)), "weighted with"),
        (tree(branch=lambda root, branch, density, joint: shares(joint.max(2), 1)), "not as its best one"),
        (tree(leaf=lambda root, branch, density, joint: joint / joint.sum((1, 2), keepdims=True)), "among all leaves"),
        (tree(leaf=lambda root, branch, density, joint: branch), "has not been used"),
        (tree(leaf=lambda root, branch, density, joint: shares(density, 2)), "gate of the branch is missing"),
        (tree(leaf=lambda root, branch, density, joint: shares(joint, 1)), "not the branches"),
        (tree(branch=lambda root, branch, density, joint: shares(root * (branch * density).prod(2), 1)), "multiply"),
        (tree(branch=lambda root, branch, density, joint: shares(joint.sum(2), 0)), "not the cases"),
        (tree(leaf=lambda root, branch, density, joint: branch * density), "divide by their sum"),
        (tree(branch=lambda root, branch, density, joint: shares(np.exp(joint.sum(2)), 1)), ""),
    ],
    check.fit_leaf: [
        (leaf(fit=fitted(np.ones_like, np.ones_like)), "every case counts alike"),
        (leaf(fit=fitted(np.square, np.square)), "counts twice"),
        (leaf(fit=fitted(np.ones_like, np.array)), "missing in xᵀ h x"),
        (leaf(fit=fitted(np.array, np.ones_like)), "missing in xᵀ h y"),
        (leaf(fit=fitted(penalty=lambda ridge, variance: 0)), "the ridge is missing"),
        (leaf(fit=fitted(penalty=lambda ridge, variance: ridge)), "multiply the ridge with σ²."),
        (leaf(fit=fitted(penalty=lambda ridge, variance: ridge / variance)), "do not divide it"),
        (leaf(fit=fitted(penalty=lambda ridge, variance: 2 * ridge * variance)), "cancel"),
        (leaf(fit=fitted(penalty=lambda ridge, variance: ridge * variance / 2)), "half of the ridge"),
        (leaf(fit=fitted(np.sqrt, np.sqrt)), "the weight of a case is h"),
        (leaf(fit=ridge_without_offset), "its last row included"),
        (leaf(variance=lambda r, h: (r**2).mean()), "weighted with h too"),
        (leaf(variance=lambda r, h: h @ (r**2).mean(1) / len(h)), "not N"),
        (leaf(variance=lambda r, h: np.sqrt(h @ (r**2).mean(1) / h.sum())), "not σ²"),
        (leaf(variance=lambda r, h: h @ (r**2).sum(1) / h.sum()), "divide by M"),
        (leaf(variance=lambda r, h: np.log(h @ (r**2).mean(1) / h.sum())), "log σ²"),
        (leaf(variance=lambda r, h: h**2 @ (r**2).mean(1) / h.sum()), "h counts twice"),
        (leaf(variance=lambda r, h: h @ r**2 / h.sum()), "summed over"),
        (leaf(variance=lambda r, h: h @ (r**2).mean(1) / (h.sum() - 1)), ""),
        (old_variance, "old σ²"),
        (residual_without_ridge, "without the ridge"),
        (ridge_in_variance, "no part in the new σ²"),
    ],
    check.newton_gate: [
        (newton(old=0), "add it to v"),
        (newton(step=-1), "this goes down"),
        (newton(curve=None), "divide by the curvature"),
        (newton(curve=lambda g, h, w: w * g), "1 − g is missing"),
        (newton(curve=lambda g, h, w: g * (1 - g)), "curvature needs the weights"),
        (newton(slope=lambda g, h, w: h - g), "gradient needs the weights"),
        (newton(curve=lambda g, h, w: w), "least-squares fit of h"),
        (newton(curve=lambda g, h, w: w * h * (1 - h)), "not that of its target"),
        (newton(lambda g, h, w: g * (1 - g), lambda g, h, w: h - g), "in the gradient and in the curvature"),
        (newton(step=1 / 2), "half of the step"),
        (newton_on_the_diagonal, "the whole matrix"),
        (logits_by_least_squares, "starts from v"),
        (lambda v, x, h, w: newton()(newton()(v, x, h, w), x, h, w), ""),
    ],
}

RIGHT = {
    check.posteriors: [tree_by_loop, tree_from_all_leaves],
    check.fit_leaf: [leaf_by_lstsq, leaf_by_loop],
    check.newton_gate: [newton_as_least_squares, newton_by_loop],
}
