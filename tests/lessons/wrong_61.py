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


def solved(left, right):
    return lambda x, h, y: np.linalg.solve((left(h)[:, None] * x).T @ x, (right(h)[:, None] * x).T @ y)


def leaf(fit=None, variance=None):
    """The right M-step but for one: U is a function of x, h and y, and σ² one of the residual and h."""

    def fit_leaf(x, y, h):
        U = (solved(np.array, np.array) if fit is None else fit)(x, h, y)
        r = y - x @ solved(np.array, np.array)(x, h, y)
        return U, h @ (r**2).mean(1) / h.sum() if variance is None else variance(r, h)

    return fit_leaf


def leaf_by_lstsq(x, y, h):
    root = np.sqrt(h)[:, None]
    U, *_ = np.linalg.lstsq(root * x, root * y, rcond=None)
    return U, ((root * (y - x @ U)) ** 2).sum() / (y.shape[1] * h.sum())


def leaf_by_loop(x, y, h):
    D, M = x.shape[1], y.shape[1]
    gram, moment = np.zeros((D, D)), np.zeros((D, M))
    for n in range(len(x)):
        gram += h[n] * np.outer(x[n], x[n])
        moment += h[n] * np.outer(x[n], y[n])
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
    ],
    check.fit_leaf: [
        (leaf(fit=solved(np.ones_like, np.ones_like)), "every case counts alike"),
        (leaf(fit=solved(np.square, np.square)), "counts twice"),
        (leaf(fit=solved(np.sqrt, np.sqrt)), "counts half"),
        (leaf(fit=solved(np.ones_like, np.array)), "missing in xᵀ h x"),
        (leaf(fit=solved(np.array, np.ones_like)), "missing in xᵀ h y"),
        (leaf(variance=lambda r, h: (r**2).mean()), "weighted with h too"),
        (leaf(variance=lambda r, h: h @ (r**2).mean(1) / len(h)), "not N"),
        (leaf(variance=lambda r, h: np.sqrt(h @ (r**2).mean(1) / h.sum())), "not σ²"),
        (leaf(variance=lambda r, h: h @ (r**2).sum(1) / h.sum()), "divide by M"),
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
    ],
}

RIGHT = {
    check.posteriors: [tree_by_loop, tree_from_all_leaves],
    check.fit_leaf: [leaf_by_lstsq, leaf_by_loop],
    check.newton_gate: [newton_as_least_squares, newton_by_loop],
}
