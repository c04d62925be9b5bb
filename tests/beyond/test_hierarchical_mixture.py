"""The tree of 1994: its likelihood against a loop, its gradient, and what each step of EM promises."""

import math
from typing import Any

import numpy as np
import pytest
import strict_cupy
from hypothesis import given
from hypothesis import strategies as st

from minimoe.beyond import hierarchical_mixture as trees
from minimoe.beyond.hierarchical_mixture import HierarchicalMixture
from minimoe.core import tree
from minimoe.core.arrays import to_device, to_host
from minimoe.core.errors import UserError
from minimoe.proof.finite_differences import check
from minimoe.proof.results import failed


def drawn(seed: int, cases: int = 30, branches: int = 2, leaves: int = 3, scale: float = 0.7) -> tuple[Any, Any, Any]:
    """Parameters at no special point, x (N, 3) and y (N, 2)."""
    rng = np.random.default_rng(seed)
    x, y = trees.with_one(rng.standard_normal((cases, 2))), rng.standard_normal((cases, 2))
    params = trees.init(rng, x, y, branches, leaves, scale)
    return params._replace(log_variance=rng.uniform(-1, 1, (branches, leaves))), x, y


def weights_of(cache: trees.Cache) -> np.ndarray:
    return np.exp(cache.posterior.joint)


@given(
    cases=st.integers(1, 5),
    branches=st.integers(1, 3),
    leaves=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(cases: int, branches: int, leaves: int, seed: int) -> None:
    params, x, y = drawn(seed, cases, branches, leaves)
    rows = check(
        "tree", lambda params, x: trees.forward(params, x, y), trees.backward, params, x, entries=6, directions=2
    )
    wrong = [row for row in failed(rows) if row.largest > 1e-9]  # a gate of one child has no gradient but rounding
    assert not wrong, wrong


def test_likelihood_posteriors_and_prediction_agree_with_a_loop() -> None:
    params, x, y = drawn(0, cases=5)
    log_likelihood, cache = trees.forward(params, x, y)
    guess = trees.predict(params, x)
    for n in range(5):
        root = np.exp(x[n] @ params.v_root)
        joint, mean = np.zeros((2, 3)), np.zeros(2)
        for i in range(2):
            branch = np.exp(x[n] @ params.v_branch[i])
            for j in range(3):
                mu, variance = x[n] @ params.u_leaf[i, j], math.exp(params.log_variance[i, j])
                g = root[i] / root.sum() * branch[j] / branch.sum()
                square = ((y[n] - mu) ** 2).sum()
                joint[i, j] = g * math.exp(-square / (2 * variance)) / (2 * math.pi * variance)
                mean += g * mu
        assert log_likelihood[n] == pytest.approx(math.log(joint.sum()))
        np.testing.assert_allclose(weights_of(cache)[n], joint / joint.sum())
        np.testing.assert_allclose(np.exp(cache.posterior.branch[n]), joint.sum(1) / joint.sum())
        np.testing.assert_allclose(np.exp(cache.posterior.leaf[n]), joint / joint.sum(1, keepdims=True))
        np.testing.assert_allclose(guess[n], mean)


def test_leaves_in_another_order_are_the_same_tree() -> None:
    params, x, y = drawn(1)
    order = [2, 0, 1]
    turned = HierarchicalMixture(
        params.v_root, params.v_branch[:, :, order], params.u_leaf[:, order], params.log_variance[:, order]
    )
    np.testing.assert_allclose(trees.forward(turned, x, y)[0], trees.forward(params, x, y)[0])
    mine, theirs = trees.em_step(params, x, y)[0], trees.em_step(turned, x, y)[0]
    np.testing.assert_allclose(mine.u_leaf[:, order], theirs.u_leaf, rtol=1e-6)
    np.testing.assert_allclose(trees.predict(mine, x), trees.predict(theirs, x), rtol=1e-6, atol=1e-9)


@given(
    cases=st.integers(1, 40),
    branches=st.integers(1, 3),
    leaves=st.integers(1, 3),
    ridge=st.sampled_from([1e-6, 1e-3, 1.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_the_objective_never_falls(
    cases: int, branches: int, leaves: int, ridge: float, scale: float, seed: int
) -> None:
    """Also from a bad start, with more leaves than cases, and with leaves that fit their cases exactly."""
    params, x, y = drawn(seed, cases, branches, leaves, scale)
    before = trees.objective(params, x, y, ridge)
    for _ in range(4):
        params, _ = trees.em_step(params, x, y, ridge)
        now = trees.objective(params, x, y, ridge)
        assert now >= before - 1e-7 * (1 + abs(before))
        before = now


def test_the_log_likelihood_that_a_step_reports_is_that_before_it() -> None:
    params, x, y = drawn(2)
    before = trees.forward(params, x, y)[0].sum()
    for step in (trees.em_step, trees.least_squares_step):
        assert step(params, x, y)[1] == pytest.approx(before)
    assert trees.gradient_step(params, x, y, 0.1)[1] == pytest.approx(before)


def test_where_em_stands_still_the_gradient_is_zero() -> None:
    """A wrong weight in any part of the M-step would stop at another point, or at none."""
    params, x, y = drawn(3, cases=80)
    for _ in range(3000):
        old = params
        params, _ = trees.em_step(params, x, y, ridge=0.5)
        if max(abs(a - b).max() for a, b in zip(old, params, strict=True)) < 1e-11:
            break
    log_likelihood, cache = trees.forward(params, x, y)
    _, gradient = trees.backward(params, cache, np.ones_like(log_likelihood))
    for name in ("v_root", "v_branch", "u_leaf"):
        np.testing.assert_allclose(getattr(gradient, name), 0.5 * getattr(params, name), atol=1e-6, err_msg=name)
    assert abs(gradient.log_variance).max() < 1e-6
    assert abs(params.v_root).max() > 0.01


def test_a_leaf_is_fitted_as_numpy_would_fit_it() -> None:
    params, x, y = drawn(4)
    h = weights_of(trees.forward(params, x, y)[1])
    new, _ = trees.em_step(params, x, y, ridge=0)
    for i, j in np.ndindex(2, 3):
        root = np.sqrt(h[:, i, j])[:, None]
        fitted = np.linalg.lstsq(root * x, root * y, rcond=None)[0]
        np.testing.assert_allclose(new.u_leaf[i, j], fitted, rtol=1e-7)
        left = (h[:, i, j, None] * (y - x @ fitted) ** 2).sum() / (2 * h[:, i, j].sum())
        assert math.exp(new.log_variance[i, j]) == pytest.approx(left)


def test_a_tree_of_one_leaf_is_linear_regression() -> None:
    params, x, y = drawn(5, branches=1, leaves=1)
    new, _ = trees.em_step(params, x, y, ridge=0)
    np.testing.assert_allclose(trees.predict(new, x), x @ np.linalg.lstsq(x, y, rcond=None)[0])


def test_newton_reaches_the_top_of_a_weighted_classification(rng: np.random.Generator) -> None:
    x, weight = trees.with_one(rng.standard_normal((40, 2))), rng.uniform(0, 2, 40)
    target = rng.dirichlet(np.ones(3), 40)
    v = np.zeros((3, 3))
    for _ in range(3):
        v = trees._newton(v, x, target, weight, ridge=0.1)
    g = np.exp(x @ v) / np.exp(x @ v).sum(1, keepdims=True)
    np.testing.assert_allclose(x.T @ (weight[:, None] * (target - g)), 0.1 * v, atol=1e-7)


def test_a_newton_step_from_far_away_is_halved_until_it_climbs(rng: np.random.Generator) -> None:
    x, weight = trees.with_one(rng.standard_normal((40, 2))), np.ones(40)
    target = np.eye(2)[(x[:, 0] > 0).astype(int)]
    v = np.array([[6.0, -6.0], [0.0, 0.0], [0.0, 0.0]])  # certain, and wrong
    fits = [trees._gate_fit(v, x, target, weight, 1e-3)[0]]
    for _ in range(6):
        v = trees._newton(v, x, target, weight, 1e-3)
        fits.append(trees._gate_fit(v, x, target, weight, 1e-3)[0])
    assert (np.diff(fits) >= 0).all()
    assert fits[-1] > -5 > fits[0]


def test_a_gate_that_separates_its_cases_stays_finite(rng: np.random.Generator) -> None:
    """Two lines without noise: no finite gate is the best one, unless large weights cost something."""
    x = trees.with_one(np.concatenate([rng.uniform(-2, -1, (20, 1)), rng.uniform(1, 2, (20, 1))]))
    y = 3 * abs(x[:, :1])
    params = trees.init(rng, x, y, 2, 1, scale=0.5)
    sizes = []
    for _ in range(60):
        params, _ = trees.em_step(params, x, y, ridge=1e-2)
        sizes.append(abs(params.v_root).max())
    assert all(np.isfinite(leaf).all() for leaf in params)
    assert 1 < sizes[-1] < 20
    assert sizes[-1] - sizes[-10] < 0.01
    np.testing.assert_allclose(trees.predict(params, x), y, atol=0.05)


def test_a_leaf_that_fits_exactly_has_the_least_variance(rng: np.random.Generator) -> None:
    x = trees.with_one(rng.standard_normal((20, 2)))
    y = x @ rng.standard_normal((3, 1))
    params = trees.init(rng, x, y, 1, 2)
    for _ in range(20):
        params, log_likelihood = trees.em_step(params, x, y, floor=1e-4)
    assert np.exp(params.log_variance).min() == pytest.approx(1e-4)
    assert np.isfinite(log_likelihood)


@pytest.mark.parametrize("far", [0.0, 1.0, 1e4])
def test_posteriors_are_finite_where_every_density_is_zero(far: float) -> None:
    params, x, y = drawn(6)
    tiny = params._replace(log_variance=np.full((2, 3), math.log(1e-10)))
    log_likelihood, cache = trees.forward(tiny, x, y + far)
    assert np.isfinite(log_likelihood).all()
    np.testing.assert_allclose(weights_of(cache).sum((1, 2)), 1)
    _, gradient = trees.backward(tiny, cache, np.ones(len(x)))
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    for step in (trees.em_step, trees.least_squares_step):
        assert all(np.isfinite(leaf).all() for leaf in step(tiny, x, y)[0])


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_certain_gates_are_no_trouble(size: float) -> None:
    params, x, y = drawn(7)
    certain = params._replace(v_root=size * np.eye(3, 2), v_branch=size * np.ones((2, 3, 1)) * [1.0, 0.0, -1.0])
    log_likelihood, cache = trees.forward(certain, x, y)
    assert np.isfinite(log_likelihood).all()
    np.testing.assert_allclose(weights_of(cache).sum((1, 2)), 1)
    assert all(np.isfinite(leaf).all() for leaf in trees.em_step(certain, x, y)[0])


def test_the_least_squares_gates_are_fits_of_the_logarithm_of_the_posterior() -> None:
    params, x, y = drawn(8)
    cache = trees.forward(params, x, y)[1]
    new, _ = trees.least_squares_step(params, x, y, ridge=0)
    branch = np.exp(cache.posterior.branch)

    def fitted(target: np.ndarray, weight: np.ndarray) -> Any:
        target = np.log(np.maximum(np.exp(target), 1e-3))
        target = target - target.mean(1, keepdims=True)
        root = np.sqrt(weight)[:, None]
        return np.linalg.lstsq(root * x, root * target, rcond=None)[0]

    np.testing.assert_allclose(new.v_root, fitted(cache.posterior.branch, np.ones(len(x))), rtol=1e-6, atol=1e-9)
    for i in range(2):
        expected = fitted(cache.posterior.leaf[:, i], branch[:, i])
        np.testing.assert_allclose(new.v_branch[i], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(new.u_leaf, trees.em_step(params, x, y, ridge=0)[0].u_leaf)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_recursive_least_squares_ends_where_least_squares_over_all_cases_does(
    rng: np.random.Generator, decay: float
) -> None:
    N = 12
    x, target, weight = rng.standard_normal((N, 3)), rng.standard_normal((N, 2, 4)), rng.uniform(0, 1, (N, 2))
    weight[5, 0] = 0  # a case that has nothing to do with the first fit
    w, inverse = np.zeros((2, 3, 4)), np.tile(np.eye(3) / 0.3, (2, 1, 1))
    for n in range(N):
        w, inverse = trees._recursive(w, inverse, x[n], target[n], weight[n], decay)
    for k in range(2):
        counts = weight[:, k] * decay ** np.arange(N - 1, -1, -1)
        gram = (counts[:, None] * x).T @ x + 0.3 * decay**N * np.eye(3)
        np.testing.assert_allclose(inverse[k], np.linalg.inv(gram), rtol=1e-7)
        np.testing.assert_allclose(w[k], np.linalg.solve(gram, (counts[:, None] * x).T @ target[:, k]), rtol=1e-7)


def test_an_online_step_fits_each_part_with_its_own_weight_and_target() -> None:
    params, x, y = drawn(9)
    memory = trees.online_init(params, ridge=0.5)
    new, after = trees.online_step(params, memory, x[0], y[0], 0.95)
    cache = trees.forward(params, x[:1], y[:1])[1]
    h_branch, h = np.exp(cache.posterior.branch[0]), weights_of(cache)[0]

    def moved(w: np.ndarray, target: np.ndarray, weight: float) -> Any:
        gram = 0.95 * 0.5 * np.eye(3) + weight * np.outer(x[0], x[0])
        return w + np.linalg.solve(gram, weight * np.outer(x[0], target - x[0] @ w))

    def logs(posterior: np.ndarray) -> np.ndarray:
        return np.log(posterior) - np.log(posterior).mean()

    np.testing.assert_allclose(new.v_root, moved(params.v_root, logs(h_branch), 1.0))
    for i in range(2):
        leaf = np.maximum(np.exp(cache.posterior.leaf[0, i]), trees.LEAST_POSTERIOR)
        np.testing.assert_allclose(new.v_branch[i], moved(params.v_branch[i], logs(leaf), h_branch[i]))
        for j in range(3):
            np.testing.assert_allclose(new.u_leaf[i, j], moved(params.u_leaf[i, j], y[0], h[i, j]))
            square = ((y[0] - x[0] @ new.u_leaf[i, j]) ** 2).mean()
            expected = 0.95 * math.exp(params.log_variance[i, j]) + h[i, j] * square
            assert math.exp(new.log_variance[i, j]) == pytest.approx(expected / (0.95 + h[i, j]))
    np.testing.assert_allclose(after.weight, 0.95 + h)


def test_a_small_step_along_the_gradient_climbs_as_far_as_the_gradient_says() -> None:
    params, x, y = drawn(10)
    new, before = trees.gradient_step(params, x, y, 1e-6)
    climbed = trees.forward(new, x, y)[0].sum() - before
    square = sum(((a - b) ** 2).sum() for a, b in zip(new, params, strict=True)) / 1e-12
    assert climbed / len(x) == pytest.approx(1e-6 * square, rel=1e-3)


def test_learning_starts_with_the_spread_of_y(rng: np.random.Generator) -> None:
    x, y = trees.with_one(rng.standard_normal((50, 2))), 3 * rng.standard_normal((50, 2)) + 7
    params = trees.init(rng, x, y, 2, 3)
    np.testing.assert_allclose(np.exp(params.log_variance), y.var(0).mean())
    assert [leaf.shape for leaf in params] == [(3, 2), (2, 3, 3), (2, 3, 3, 2), (2, 3)]


def test_dtype_follows_the_cases(rng: np.random.Generator) -> None:
    x, y = trees.with_one(rng.standard_normal((9, 2)).astype(np.float32)), np.ones((9, 1), np.float32)
    params = trees.init(rng, x, y, 2, 2)
    for step in (trees.em_step, trees.least_squares_step):
        assert {leaf.dtype for leaf in step(params, x, y)[0]} == {np.dtype(np.float32)}


def test_bad_settings_are_refused_in_a_sentence(rng: np.random.Generator) -> None:
    params, x, y = drawn(11)
    with pytest.raises(UserError, match="branches 0 and leaves 3 make no tree"):
        trees.init(rng, x, y, 0, 3)
    with pytest.raises(UserError, match="last column of x is not 1 in all rows.*with_one"):
        trees.init(rng, x[:, :2], y, 2, 3)
    with pytest.raises(UserError, match=r"are no cases: give \(N, D\) and \(N, M\)"):
        trees.init(rng, x[:3], y, 2, 3)
    with pytest.raises(UserError, match="ridge -1 would make weights grow"):
        trees.em_step(params, x, y, ridge=-1)
    with pytest.raises(UserError, match="floor 0 is no variance"):
        trees.least_squares_step(params, x, y, floor=0)
    with pytest.raises(UserError, match="ridge 0 has no inverse"):
        trees.online_init(params, ridge=0)
    for decay in (0.0, 1.1):
        with pytest.raises(UserError, match=f"decay {decay} is not a discount"):
            trees.online_step(params, trees.online_init(params), x[0], y[0], decay)


def test_the_w_has_four_lines(rng: np.random.Generator) -> None:
    x, y = trees.four_lines(rng, 4000)
    assert (x.shape, y.shape) == ((4000, 2), (4000, 1))
    for low, slope, offset in ((-3, -2, -3), (-1.5, 2, 3), (0, -2, 3), (1.5, 2, -3)):
        part = (x[:, 0] > low) & (x[:, 0] < low + 1.5)
        fitted = np.linalg.lstsq(x[part], y[part], rcond=None)[0][:, 0]
        np.testing.assert_allclose(fitted, [slope, offset], atol=0.1)
        assert np.std(y[part, 0] - x[part] @ fitted) == pytest.approx(0.15, rel=0.1)


def test_a_gate_that_no_step_improves_stays_as_it_is(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding can do that at the top; here every place is made worse than the one before."""
    v, x = rng.standard_normal((3, 2)), rng.standard_normal((9, 3))
    fits = iter(range(0, -1000, -1))
    monkeypatch.setattr(trees, "_gate_fit", lambda v, x, target, weight, ridge: (next(fits), np.full((9, 2), 0.5)))
    np.testing.assert_array_equal(trees._newton(v, x, np.eye(2)[[0] * 9], np.ones(9), 1e-3), v)
    assert next(fits) == -trees.HALVINGS - 1, "every shorter step was tried"


def test_cupy_gives_the_same_likelihood_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    strict_cupy.install(monkeypatch)

    def results(params: Any, x: Any, y: Any) -> Any:
        log_likelihood, cache = trees.forward(params, x, y)
        return log_likelihood, trees.backward(params, cache, log_likelihood), trees.predict(params, x)

    host = drawn(12)
    on_gpu = results(*tree.map(lambda leaf: to_device(leaf, "gpu"), host))
    for mine, theirs in zip(tree.leaves(results(*host)), tree.leaves(on_gpu), strict=True):
        np.testing.assert_allclose(to_host(theirs), mine, rtol=1e-12, atol=1e-14)
