"""The checker checked: right gradients pass, wrong ones do not, and a flip of the routing is neither."""

import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.layers import decoder, embedding, linear, moe, rmsnorm
from minimoe.layers.linear import Linear
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.routers import noisy_top_k
from minimoe.proof import gradcheck
from minimoe.proof.finite_differences import gradient
from minimoe.proof.gradcheck import Ranked, Row, check, failed

LARGE = Linear(np.random.default_rng(0).standard_normal((20, 30)))
X = np.random.default_rng(1).standard_normal((4, 20))


def check_linear(backward: Any, params: Linear = LARGE, x: np.ndarray = X, **options: Any) -> dict[str, Row]:
    return {row.tensor: row for row in check("linear", linear.forward, backward, params, x, **options)}


def test_a_right_gradient_passes_far_inside_its_bound() -> None:
    rows = check_linear(linear.backward)
    assert list(rows) == ["x", "weight"]
    for row in rows.values():
        assert row.passed
        assert row.error < 1e-10
        assert row.largest > 0.1
        assert (row.checked, row.refused, row.margin) == (32 + 4, 0, None)
    assert rows["weight"].shape == (20, 30)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 1 + 1e-6, 2.0])
def test_a_wrong_factor_is_seen_even_in_the_sixth_digit(factor: float) -> None:
    def backward(params: Linear, cache: Any, dy: np.ndarray) -> tuple[Any, Any]:
        dx, grads = linear.backward(params, cache, dy)
        return dx, Linear(factor * grads.weight)

    rows = check_linear(backward)
    assert rows["x"].passed
    assert rows["weight"].problem.startswith("right shape, wrong values: at [")


def test_one_wrong_entry_of_600_is_seen_by_the_directions() -> None:
    def backward(params: Linear, cache: Any, dy: np.ndarray) -> tuple[Any, Any]:
        dx, grads = linear.backward(params, cache, dy)
        grads.weight[7, 7] *= 1.01
        return dx, grads

    row = check_linear(backward, entries=1)["weight"]
    assert "along a random direction" in row.problem
    assert check_linear(backward, entries=0, directions=1)["weight"].problem
    assert check_linear(linear.backward, entries=0, directions=1)["weight"].passed


def test_a_forgotten_term_is_seen_and_both_numbers_are_shown() -> None:
    def backward(params: RMSNorm, cache: rmsnorm.Cache, dy: np.ndarray) -> tuple[Any, Any]:
        return params.gain * dy * cache.inv_rms, rmsnorm.backward(params, cache, dy)[1]

    rows = check("rmsnorm", rmsnorm.forward, backward, rmsnorm.init(3), np.array([[1.0, 2.0, -4.0]]))
    assert [row.passed for row in rows] == [False, True]
    assert "backward says" in rows[0].problem
    assert "finite differences" in rows[0].problem


def test_a_wrong_shape_is_said_in_words() -> None:
    rows = check_linear(lambda params, cache, dy: (dy @ params.weight.T, Linear((cache.x.T @ dy).T)))
    assert rows["x"].passed
    assert rows["weight"].problem == "weight has shape (20, 30), but its gradient has shape (30, 20)"


def test_a_missing_gradient_and_one_too_many_are_said_in_words() -> None:
    rows = check_linear(lambda params, cache, dy: (None, linear.backward(params, cache, dy)[1]))
    assert rows["x"].problem == "backward returns no gradient for x"
    assert rows["weight"].passed
    extra = noisy_top_k.Router(np.zeros((3, 2)), np.zeros((3, 2)))
    rows = {
        row.tensor: row
        for row in check(
            "router",
            lambda params, x: (x @ params.w_gate, x),
            lambda params, x, dy: (dy @ params.w_gate.T, extra._replace(w_gate=x.T @ dy)),
            noisy_top_k.Router(np.ones((3, 2)), None),
            np.ones((1, 3)),
        )
    }
    assert rows["w_gate"].passed
    assert rows["w_noise"].problem == "backward returns a gradient for w_noise, which is not among the parameters"


def test_numbers_that_are_not_finite_fail_wherever_they_come_from() -> None:
    def backward(params: Linear, cache: Any, dy: np.ndarray) -> tuple[Any, Any]:
        dx, grads = linear.backward(params, cache, dy)
        grads.weight[3, 3] = np.nan
        return dx, grads

    assert check_linear(backward)["weight"].problem == "the gradient of weight holds numbers that are not finite"

    def root(params: None, x: np.ndarray) -> tuple[Any, Any]:
        with np.errstate(invalid="ignore"):
            return np.sqrt(x), None

    (row,) = check("root", root, lambda params, cache, dy: (np.zeros(2), None), None, np.array([1e-9, 0.0]), step=1)
    assert not row.passed
    assert row.error == np.inf


def test_a_layer_that_works_in_place_is_found_out() -> None:
    def forward(params: None, x: np.ndarray) -> tuple[Any, Any]:
        x *= 2
        return x.copy(), None

    (row,) = check("twice", forward, lambda params, cache, dy: (2 * dy, None), None, np.ones(3))
    assert row.problem == "forward or backward changed x in place: work on a copy"


def test_a_backward_that_uses_up_dy_disturbs_nothing() -> None:
    def backward(params: Linear, cache: Any, dy: np.ndarray) -> tuple[Any, Any]:
        result = linear.backward(params, cache, dy)
        dy *= 0
        return result

    assert not failed(check_linear(backward).values())


def test_float32_is_lifted_to_float64_and_a_forward_that_falls_back_is_refused() -> None:
    params, x = Linear(LARGE.weight.astype(np.float32)), X.astype(np.float32)
    assert all(row.error < 1e-10 for row in check_linear(linear.backward, params, x).values())
    with pytest.raises(UserError, match="forward turned float64 into float32"):
        check("cast", lambda params, x: (x.astype("f"), None), lambda params, cache, dy: (dy, None), None, np.ones(2))


def test_integers_have_no_gradient_and_no_row() -> None:
    def backward(params: Any, cache: Any, dy: np.ndarray) -> tuple[Any, Any]:
        return None, embedding.backward(params, cache, dy)

    rows = check("embedding", embedding.forward, backward, embedding.Embedding(np.eye(3)), np.array([2, 0, 2]))
    assert [(row.tensor, row.passed) for row in rows] == [("table", True)]


WEIGHT, INPUT = np.arange(1.0, 7).reshape(3, 2), np.arange(1.0, 13).reshape(4, 3)


def product(p: Any, x: Any) -> Any:
    return x @ p, x


def product_backward(p: Any, x: Any, dy: Any) -> Any:
    return dy @ p.T, x.T @ dy


def test_a_gradient_for_integers_is_refused_and_integers_are_not_touched() -> None:
    whole = INPUT.astype(int)
    rows = check("m", product, lambda p, x, dy: (np.ones((9, 9)), x.T @ dy), WEIGHT, whole)
    assert [row.tensor for row in failed(rows)] == ["x"] and "holds integers" in rows[0].problem

    def in_place(p: Any, x: Any) -> Any:
        x %= 3
        return x @ p, x

    rows = check("m", in_place, lambda p, x, dy: (None, x.T @ dy), WEIGHT, whole)
    assert "changed x in place" in failed(rows)[0].problem
    np.testing.assert_array_equal(whole, INPUT, "the caller's own array")


def test_dictionaries_and_plain_numbers_are_parameters_too() -> None:
    rows = check(
        "affine",
        lambda p, x: (x @ p["w"] + p["b"], x),
        lambda p, x, dy: (dy @ p["w"].T, {"w": x.T @ dy, "b": dy.sum()}),
        {"w": WEIGHT, "b": 2.0},
        INPUT,
    )
    assert [row.tensor for row in rows] == ["x", "['w']", "['b']"] and not failed(rows)
    rows = check("affine", lambda p, x: (p * x, x), lambda p, x, dy: (float(dy * p), float(2 * dy * x)), 2.0, 3.0)
    assert [row.tensor for row in failed(rows)] == ["params"]


def test_a_parameter_called_x_is_not_the_input() -> None:
    class Shift(NamedTuple):
        x: Any
        w: Any

    rows = check(
        "shift",
        lambda p, x: (x @ p.w + p.x, x),
        lambda p, x, dy: (dy @ p.w.T, Shift(dy.sum(0), x.T @ dy)),
        Shift(np.ones(2), WEIGHT),
        INPUT,
    )
    assert [row.tensor for row in rows] == ["x", "params.x", "w"] and not failed(rows)


@pytest.mark.parametrize(
    ("forward", "backward", "params", "x", "words"),
    [
        (lambda p, x: x @ p, product_backward, WEIGHT, INPUT, "forward returns a ndarray, expected a pair: y, cache"),
        (lambda p, x: (x @ p, x, 0), product_backward, WEIGHT, INPUT, "forward returns 3 things, expected a pair"),
        (product, lambda p, x, dy: dy @ p.T, WEIGHT, INPUT, "backward returns a ndarray, expected a pair: dx, dparams"),
        (product, lambda p, x, dy: None, WEIGHT, INPUT, "backward returns a NoneType, expected a pair"),
        (lambda p, x: (None, x), product_backward, WEIGHT, INPUT, "y that forward returns holds no floating-point"),
        (lambda p, x: ((x @ p).astype(int), x), product_backward, WEIGHT, INPUT, "holds no floating-point numbers"),
        (product, product_backward, WEIGHT, INPUT[:0], r"x is empty, of shape \(0, 3\)"),
        (product, product_backward, WEIGHT, INPUT + 1j, "x holds complex128, expected real numbers"),
        (product, product_backward, WEIGHT.astype(int), INPUT.astype(int), "no gradient to check: give floats"),
        (product, product_backward, None, None, "no gradient to check: give floats"),
        (product, product_backward, WEIGHT * np.nan, INPUT, "params holds numbers that are not finite"),
        (lambda p, x: (x @ p * np.nan, x), product_backward, WEIGHT, INPUT, "gives numbers that are not finite"),
    ],
)
def test_what_cannot_be_checked_is_told_in_words(forward: Any, backward: Any, params: Any, x: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check("m", forward, backward, params, x)


@pytest.mark.parametrize("setting", [{"step": 0}, {"step": np.nan}, {"entries": 0, "directions": 0}, {"seed": -1}])
def test_settings_that_check_nothing_are_refused(setting: dict[str, Any]) -> None:
    (name,) = list(setting)[:1]
    with pytest.raises(UserError, match=f"^{name} "):
        check("m", product, product_backward, WEIGHT, INPUT, **setting)


def test_a_forward_with_random_numbers_of_its_own_is_found_out() -> None:
    rng = np.random.default_rng(0)

    def dropout(p: Any, x: Any) -> Any:
        kept = x * (rng.random(x.shape) < 0.5)
        return kept @ p, kept

    with pytest.raises(UserError, match="another result each time: fix its random numbers"):
        check("m", dropout, product_backward, WEIGHT, INPUT)


@pytest.mark.parametrize("wrong", [lambda right: right + 0j, lambda right: right.astype(object)])
def test_a_gradient_that_is_no_real_number_fails(wrong: Any) -> None:
    rows = check("m", product, lambda p, x, dy: (dy @ p.T, wrong(x.T @ dy)), WEIGHT, INPUT)
    assert "expected real numbers" in failed(rows)[0].problem


def test_trees_go_in_and_come_out_and_a_result_may_hold_integers() -> None:
    def forward(params: list[np.ndarray], x: Any) -> tuple[Any, Any]:
        a, b = x
        return (a * b * params[0], np.array([1, 2]), float((a * a).sum())), (a, b)

    def backward(params: list[np.ndarray], cache: Any, dy: Any) -> tuple[Any, Any]:
        (a, b), (d, nothing, dsum) = cache, dy
        assert nothing is None
        return (d * b * params[0] + 2 * a * dsum, d * a * params[0]), [(d * a * b).sum()]

    rows = check("product", forward, backward, [np.array(3.0)], (np.array([1.0, 2.0]), np.array([0.5, -1.0])))
    assert [(row.tensor, row.passed) for row in rows] == [("x.0", True), ("x.1", True), ("[0]", True)]


def test_a_bare_array_of_parameters_is_called_params() -> None:
    def backward(scale: np.ndarray, x: np.ndarray, dy: np.ndarray) -> tuple[Any, Any]:
        return scale * dy, (dy * x).sum(0)

    rows = check("scale", lambda scale, x: (scale * x, x), backward, np.ones(2), np.ones((3, 2)))
    assert [(row.tensor, row.passed) for row in rows] == [("x", True), ("params", True)]


def test_a_tensor_of_zeros_is_checked_with_a_step_of_its_own() -> None:
    (row,) = check("triple", lambda p, x: (3 * x, None), lambda p, c, dy: (3 * dy, None), None, np.zeros(3))
    assert row.passed and row.checked == 3


def test_a_gradient_that_is_truly_zero_passes_and_says_so() -> None:
    (row,) = check("shift", lambda p, x: (x - x, None), lambda p, c, dy: (0 * dy, None), None, np.ones(3))
    assert row.passed
    assert row.largest == 0


@pytest.mark.parametrize(("size", "speed"), [(1e-3, 3e3), (1.0, 1.0), (1e4, 1.0)])
def test_the_step_follows_the_size_of_a_small_tensor_but_not_of_a_large_one(size: float, speed: float) -> None:
    def forward(params: None, x: np.ndarray) -> tuple[Any, Any]:
        return np.sin(speed * x), x

    def backward(params: None, x: np.ndarray, dy: np.ndarray) -> tuple[Any, None]:
        return speed * np.cos(speed * x) * dy, None

    assert not failed(check("sine", forward, backward, None, size * np.array([0.3, -1.2, 0.9])))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_rounding_of_a_large_result_is_no_fault_of_a_small_gradient_but_a_wrong_factor_is(factor: float) -> None:
    def forward(params: None, x: np.ndarray) -> tuple[Any, Any]:
        return 1000 + 1e-6 * np.sin(x), x

    def backward(params: None, x: np.ndarray, dy: np.ndarray) -> tuple[Any, None]:
        return factor * 1e-6 * np.cos(x) * dy, None

    (row,) = check("small", forward, backward, None, np.array([0.3, 0.7, 1.1]))
    assert row.passed == (factor == 1)


# Kinks


def relu_expert(params: Any, x: np.ndarray) -> tuple[Any, Any]:
    z = x @ params[0]
    return np.maximum(z, 0) @ params[1], (x, z)


def relu_expert_backward(params: Any, cache: Any, dy: np.ndarray, factor: float = 1.0) -> tuple[Any, Any]:
    x, z = cache
    dz = dy @ params[1].T * (z > 0)
    return factor * dz @ params[0].T, (x.T @ dz, np.maximum(z, 0).T @ dy)


@pytest.mark.parametrize("seed", range(6))
def test_probes_across_a_kink_are_refused_and_an_error_of_a_thousandth_is_still_caught(seed: int) -> None:
    """An expert 256 wide with ReLU has kinks everywhere; a token that is zero has all of them at once."""
    rng = np.random.default_rng(seed)
    params = rng.standard_normal((8, 256)), rng.standard_normal((256, 8))
    x = rng.standard_normal((6, 8))
    if seed % 2:
        x[1] = 0
    right = check("relu", relu_expert, relu_expert_backward, params, x, seed=seed)
    assert failed(right) == []
    assert right[0].kinks == right[0].refused >= 6 * (seed % 2)
    wrong = check("relu", relu_expert, partial(relu_expert_backward, factor=1.001), params, x, seed=seed)
    assert [row.passed for row in wrong] == [False, True, True]


KINKED: dict[str, tuple[Any, Any]] = {
    "abs": (np.abs, np.sign),
    "relu": (lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0)),
    "a kink of the slope": (lambda x: np.maximum(x, 0) ** 2 / 2 + x, lambda x: np.maximum(x, 0) + 1),
    "no kink": (np.sin, np.cos),
}


@pytest.mark.parametrize("distance", [0.0, 1e-9, 3e-5, 7e-5, 1.2e-4, -4e-5])
@pytest.mark.parametrize("name", KINKED)
def test_a_kink_anywhere_near_a_probe_is_no_wrong_gradient(name: str, distance: float) -> None:
    function, slope = KINKED[name]
    x = np.array([1.0, distance, -1.3, 0.8])
    for factor in (1, 1.001):

        def backward(params: None, x: np.ndarray, dy: np.ndarray, factor: float = factor) -> tuple[Any, None]:
            return dy * factor * slope(x), None

        (row,) = check(name, lambda _, x: (function(x), x), backward, None, x)
        assert row.passed == (factor == 1), row.problem
        assert row.refused == row.kinks <= (name != "no kink")


def test_a_point_that_is_nothing_but_kinks_proves_nothing_and_is_said_to() -> None:
    (row,) = check("relu", lambda _, x: (np.maximum(x, 0), x), lambda _, x, dy: (dy * (x > 0), None), None, np.zeros(5))
    assert row.problem.startswith("5 of 5 probes would cross a kink: choose another point")
    assert "5 of 5" in gradcheck.table([row])
    both = gradcheck.table([row._replace(problem="", checked=9, kinks=2)])
    assert "(5 of 14 probes refused: too near a flip or a kink)" in both


# Routing: y = the largest of each row. Its derivative exists wherever the largest is no tie.


def largest_forward(params: None, x: np.ndarray) -> tuple[Any, Any]:
    return x.max(axis=1), x


def largest_backward(params: None, x: np.ndarray, dy: np.ndarray) -> tuple[Any, Any]:
    return dy[:, None] * (np.arange(x.shape[1]) == x.argmax(axis=1)[:, None]), None


def largest_routing(params: None, x: np.ndarray) -> list[Ranked]:
    return [Ranked(x, 1)]


def test_the_margin_is_the_gap_between_the_last_chosen_and_the_first_that_is_not() -> None:
    x = np.array([[5.0, 1.0, 3.0], [0.0, 0.4, 0.1], [9.0, -9.0, 0.0]])
    (row,) = check("largest", largest_forward, largest_backward, None, x, routing=largest_routing)
    assert row.passed
    assert row.margin == pytest.approx(0.3)

    def top_2(params: None, x: np.ndarray) -> list[Ranked]:
        return [Ranked(x, 2), Ranked(x, 3)]

    (row,) = check("largest", largest_forward, largest_backward, None, x, routing=top_2)
    assert row.margin == pytest.approx(0.1)


def test_probes_that_would_flip_the_routing_are_refused_not_failed() -> None:
    """Row 0 is nearly tied; rows 1 to 3 are not."""
    x = np.array([[1.0, 1.0 + 1e-9], [2.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    (unaware,) = check("largest", largest_forward, largest_backward, None, x)
    assert (unaware.refused, unaware.kinks) == (2, 2), "without its ranking there is only a kink"
    (row,) = check("largest", largest_forward, largest_backward, None, x, routing=largest_routing)
    assert row.passed
    assert (row.refused, row.checked, row.kinks) == (2, 6, 0)
    assert row.margin == pytest.approx(1e-9, rel=1e-3)
    assert row.error < 1e-10


def test_near_a_flip_a_shorter_step_is_tried_before_a_probe_is_refused() -> None:
    x = np.array([[1.0, 1.0 + 1e-5]])
    (row,) = check("largest", largest_forward, largest_backward, None, x, routing=largest_routing)
    assert row.passed
    assert (row.refused, row.checked) == (0, 2)


def test_the_first_that_was_not_chosen_counts_too_because_thresholds_are_made_of_it() -> None:
    """y = the second of each row, as the load estimator uses it with K = 1; second and third are nearly tied."""

    def forward(params: None, x: np.ndarray) -> tuple[Any, Any]:
        return np.sort(x, axis=1)[:, -2], x

    def backward(params: None, x: np.ndarray, dy: np.ndarray) -> tuple[Any, None]:
        return dy[:, None] * (np.arange(3) == np.argsort(x, axis=1)[:, -2, None]), None

    x = np.array([[9.0, 1.0, 1.0 + 1e-9], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    (row,) = check("second", forward, backward, None, x, routing=largest_routing)
    assert row.passed
    assert (row.refused, row.checked) == (2, 7)


def test_where_all_probes_would_flip_the_row_fails_with_a_sentence() -> None:
    x = np.ones((3, 2))
    (row,) = check("largest", largest_forward, largest_backward, None, x, routing=largest_routing)
    assert not row.passed
    assert row.margin == 0
    assert row.problem.startswith("6 of 6 probes would change the ranking of the experts")


def test_refusing_hides_no_wrong_gradient() -> None:
    x = np.array([[1.0, 1.0 + 1e-9], [2.0, 0.0], [0.0, 2.0], [3.0, 1.0]])

    def wrong(params: None, x: np.ndarray, dy: np.ndarray) -> tuple[Any, Any]:
        return 1.001 * largest_backward(params, x, dy)[0], None

    (row,) = check("largest", largest_forward, wrong, None, x, routing=largest_routing)
    assert row.problem.startswith("right shape, wrong values")


# gradient(): the plain numeric gradient that exercises compare with


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_numeric_gradient_of_a_number_is_right(rows: int, columns: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, columns))
    np.testing.assert_allclose(gradient(lambda x: np.sin(x).sum(), x.astype("f")), np.cos(x.astype("f")), atol=1e-10)


# Everything in the package


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return gradcheck.run()


def test_every_gradient_of_the_package_is_right_by_far(rows: list[Row]) -> None:
    assert failed(rows) == []
    assert max(row.error for row in rows) < 1e-8
    assert sum(row.refused for row in rows) < 0.05 * sum(row.checked for row in rows)


def test_no_gradient_is_zero_by_accident(rows: list[Row]) -> None:
    assert [row for row in rows if row.largest < 1e-3] == []


def test_every_component_and_every_parameter_of_the_decoder_has_its_row(rows: list[Row]) -> None:
    components = {row.component.split(",")[0] for row in rows}
    assert components >= {"linear", "embedding", "rmsnorm", "rope", "attention", "balance", "moe"}
    assert components >= {"block", "cross-entropy", "decoder", "attention after a past"}
    assert components >= {*moe.ROUTERS, *moe.EXPERTS}, "every router and every kind of expert"
    model = decoder.init(np.random.default_rng(0), gradcheck.CONFIG)
    names = [name for name, _ in tree.named_leaves(model)]
    assert [row.tensor for row in rows if row.component == "decoder"] == names


def test_margins_are_given_where_something_can_flip_and_only_there(rows: list[Row]) -> None:
    routed = {row.component for row in rows if row.margin is not None}
    assert {name.split(",")[0] for name in routed} == {*moe.ROUTERS, "moe", "block", "decoder"} - {"token_hash"}
    assert "noisy_top_k, every expert" not in routed


def test_the_same_seed_gives_the_same_rows(rows: list[Row]) -> None:
    def some(seed: int) -> list[Row]:
        return gradcheck.check_decoder("decoder", gradcheck.CONFIG, np.random.default_rng(seed), entries=0)

    assert some(3) == some(3)
    assert some(3) != some(4)


def test_a_fault_in_one_layer_is_seen_through_the_whole_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path back through the threshold of the load estimate, the one that is easily forgotten."""
    right = noisy_top_k.gate_backward

    def forgetful(params: Any, cache: Any, dweights: Any, dstats: Any) -> Any:
        load = cache.load
        if load is not None:
            load = load._replace(first_out=cache.ranking[:, 0])
        return right(params, cache._replace(load=load), dweights, dstats)

    monkeypatch.setattr(noisy_top_k, "gate_backward", forgetful)
    wrong = gradcheck.check_decoder("decoder", gradcheck.CONFIG, np.random.default_rng(0), entries=1)
    assert {row.tensor for row in failed(wrong)} >= {"embedding.table", "blocks[0].moe.router.w_gate"}
    assert {row.tensor: row.passed for row in wrong}["head.weight"], "no router lies between it and the loss"


def test_the_table_is_aligned_and_ends_with_a_summary(rows: list[Row]) -> None:
    header, *lines, summary = gradcheck.table(rows).splitlines()
    assert len(lines) == len(rows)
    start = header.index("verdict")
    assert all(line[start - 2 : start] == "  " and line[start:].startswith("ok") for line in lines)
    assert [name in header for name in ("component", "tensor", "worst relative error", "flip")] == [True] * 4
    assert summary.startswith(f"{len(rows)} tensors checked, none failed; worst relative error ")


def test_the_table_says_what_failed_and_what_was_refused() -> None:
    bad = Row("moe", "w", (2,), 1e-7, 0.001, checked=1, refused=3, error=0.5, problem="it is wrong")
    good = bad._replace(problem="", refused=1, checked=5)
    lines = gradcheck.table([bad, good]).splitlines()
    assert lines[1].endswith("1.0e-03  FAILED: it is wrong")
    assert lines[2].endswith("1.0e-03  ok (1 of 6 probes refused: too near a flip)")
    assert lines[3] == "2 tensors checked, 1 failed; worst relative error 5.0e-01"


def test_json_holds_every_field_and_is_strict(rows: list[Row]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    infinite = Row("x", "y", (), 1e-7, None, largest=float("nan"), problem="no number at all")
    objects = json.loads(gradcheck.to_json([*rows[:2], infinite]), parse_constant=refuse)
    assert set(objects[0]) == {*Row._fields, "passed"}
    assert [o["passed"] for o in objects] == [True, True, False]
    assert objects[0]["shape"] == list(rows[0].shape)
    assert objects[2]["error"] is objects[2]["largest"] is None


def test_dy_is_not_one_everywhere() -> None:
    """This gradient is right for dy = 1 and for no other."""

    def backward(params: None, cache: None, dy: np.ndarray) -> tuple[np.ndarray, None]:
        return np.full(dy.shape, 2 * dy.mean()), None

    (row,) = check("double", lambda params, x: (2 * x, None), backward, None, np.arange(1.0, 6.0))
    assert row.problem.startswith("right shape, wrong values")


def test_a_row_of_which_more_than_half_is_refused_proves_nothing() -> None:
    """Three of four probes would change the ranking, so the one that is left is not enough."""

    def check_near(close: int) -> Row:
        logits = np.array([[1.0, 1.0 + 1e-9 * (t < close)] for t in range(4)]) + np.array([[0.0, 0.5]]) * (
            np.arange(4) >= close
        ).reshape(-1, 1)

        def forward(params: None, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return 3 * x, logits + np.stack([x, 0 * x], axis=1)

        def routing(params: None, cache: np.ndarray) -> list[Ranked]:
            return [Ranked(cache, 1)]

        (row,) = check("row", forward, lambda p, c, dy: (3 * dy, None), None, np.full(4, 0.0), routing=routing)
        return row

    row = check_near(3)
    assert (row.refused, row.checked) == (3, 1)
    assert row.problem.startswith("3 of 4 probes")
    assert check_near(2).passed


def test_every_case_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: dict[str, tuple[Any, Any]] = {}

    def look(name: str, forward: Any, backward: Any, params: Any, x: Any, **options: Any) -> list[Row]:
        cases[name] = (params, forward(params, x)[1])
        return []

    monkeypatch.setattr(gradcheck, "check", look)
    gradcheck.run()
    decoders = {name: case for name, case in cases.items() if name.startswith("decoder")}
    assert len(decoders) >= 3
    for name, (params, forwards) in decoders.items():
        tokens = sum(int(forward.sums.stats[0].tokens) for forward in forwards)
        dropped = sum(int(count) for forward in forwards for count in forward.sums.dropped)
        block = forwards[0].caches[1].blocks[0]
        assert (tokens < 12) == ("padding" in name), name
        assert (dropped > 0) == ("dropping" in name), name
        assert (len(forwards) == 2) == ("two shards" in name), name
        assert (block.attention.attended.window is not None) == ("window" in name), name
        assert (params.head is None) == ("tied" in name), name
    for name, (_, cache) in cases.items():
        if name.startswith("moe"):
            routing = cache[0].routing
            assert (len(routing.token) < routing.place.size) == ("dropped" in name), name
