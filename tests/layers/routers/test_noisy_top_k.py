"""The router against loops over tokens, its gradient on every path, and the faults that routers are known to have."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core import gaussian, tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.layers.routers.noisy_top_k import NOISE_FLOOR, Router
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import Ranked, check, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)


def drawn(rng: np.random.Generator, width: int = 4, experts: int = 5, noisy: bool = True) -> Router:
    w_noise = 0.5 * rng.standard_normal((width, experts)) if noisy else None
    return Router(rng.standard_normal((width, experts)), w_noise)


def ranked(params: Router, x: np.ndarray, top_k: int, noise: Any) -> Ranked:
    """The logits that top-k sees, by the formula of the paper."""
    h = x @ params.w_gate
    if noise is not None and params.w_noise is not None:
        h = h + noise * (np.log1p(np.exp(x @ params.w_noise)) + NOISE_FLOOR)
    return Ranked(h, top_k)


def check_router(
    params: Router,
    x: np.ndarray,
    top_k: int,
    coefficients: Coefficients = EVERY_LOSS,
    weigh: float = 1.0,
    step: float = 1e-4,
    **options: Any,
) -> list[Any]:
    """Checks the chosen weights (times ``weigh``) together with the auxiliary losses."""
    options = {"sequences": 1} | options

    def forward(params: Router, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = noisy_top_k.gate(params, x, top_k, **options)
        losses, dstats = balance.loss(stats, coefficients)
        return (weigh * routing.weights, balance.weighted(losses, coefficients)), (cache, dstats)

    def backward(params: Router, cache: Any, dy: Any) -> tuple[Any, Any]:
        dstats = tree.map(lambda sum: sum * dy[1], cache[1])
        return noisy_top_k.gate_backward(params, cache[0], weigh * dy[0], dstats)

    def routing(params: Router, cache: Any) -> list[Ranked]:
        return [ranked(params, cache[0].x, top_k, options.get("noise"))]

    return check("router", forward, backward, params, x, routing=routing, entries=10, directions=2, step=step)


def passed_or_refused(rows: list[Any]) -> bool:
    """No wrong gradient. A point where most probes would flip a choice proves nothing, which is not a fault."""
    return all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows)


@given(
    tokens=st.integers(1, 6),
    experts=st.integers(1, 5),
    chosen=st.integers(1, 5),
    noisy=st.booleans(),
    renormalize=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
@example(tokens=1, experts=1, chosen=1, noisy=True, renormalize=False, masked=False, seed=0)
@example(tokens=5, experts=5, chosen=5, noisy=True, renormalize=False, masked=True, seed=0)
@example(tokens=4, experts=3, chosen=1, noisy=True, renormalize=True, masked=False, seed=0)
def test_gradient_is_right_on_every_path(
    tokens: int, experts: int, chosen: int, noisy: bool, renormalize: bool, masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(chosen, experts)
    params = drawn(rng, 3, experts, noisy)
    x, noise = rng.standard_normal((tokens, 3)), rng.standard_normal((tokens, experts))
    mask = rng.integers(2, size=tokens) if masked else None
    rows = check_router(params, x, top_k, noise=noise if noisy else None, renormalize=renormalize, mask=mask)
    assert passed_or_refused(rows), failed(rows)


@pytest.mark.parametrize("loss", Coefficients._fields)
def test_each_auxiliary_loss_alone_reaches_the_gate(rng: np.random.Generator, loss: str) -> None:
    """No weight is used here, so all of the gradient is the auxiliary loss's."""
    x, noise = rng.standard_normal((2, 6, 5))
    rows = check_router(drawn(rng, 5), x, 2, Coefficients(**{loss: 1.0}), weigh=0.0, noise=noise)
    assert failed(rows) == []
    assert {row.tensor: row.largest > 0.01 for row in rows}["w_gate"]


def test_the_trainable_noise_learns_from_weights_and_from_the_load_loss(rng: np.random.Generator) -> None:
    x, noise = rng.standard_normal((2, 6, 5))
    params = drawn(rng, 5)
    for coefficients, weigh in ((Coefficients(), 1.0), (Coefficients(load=1.0), 0.0)):
        rows = check_router(params, x, 2, coefficients, weigh, noise=noise)
        assert failed(rows) == []
        assert {row.tensor: row.largest > 0.01 for row in rows}["w_noise"]


def by_loops(params: Router, x: np.ndarray, top_k: int, renormalize: bool, noise: Any, mask: Any) -> Any:
    """Everything a router reports, one token and one expert at a time, from the definitions."""
    tokens, experts = len(x), params.w_gate.shape[1]
    chosen_of, weights_of = [], []
    sums: dict[str, Any] = {name: np.zeros(experts) for name in ("assignments", "probability", "importance", "load")}
    sums |= {"tokens": 0, "squared_lse": 0.0, "entropy": 0.0}
    for t in range(tokens):
        c = [float(x[t] @ params.w_gate[:, e]) for e in range(experts)]
        sigma = None
        if noise is not None and params.w_noise is not None:
            sigma = [math.log1p(math.exp(x[t] @ params.w_noise[:, e])) + 0.01 for e in range(experts)]
        h = c if sigma is None else [c[e] + noise[t, e] * sigma[e] for e in range(experts)]
        chosen = sorted(range(experts), key=lambda e: (-h[e], e))[:top_k]
        over = chosen if renormalize else range(experts)
        weights = [math.exp(h[e]) / sum(math.exp(h[i]) for i in over) for e in chosen]
        chosen_of.append(chosen)
        weights_of.append(weights)
        if mask is not None and not mask[t]:
            continue
        z = sum(math.exp(value) for value in c)
        p = [math.exp(value) / z for value in c]
        sums["tokens"] += 1
        sums["squared_lse"] += math.log(z) ** 2
        sums["entropy"] -= sum(value * math.log(value) for value in p)
        for e in range(experts):
            sums["probability"][e] += p[e]
            others = sorted((h[i] for i in range(experts) if i != e), reverse=True)
            if sigma is None or top_k == experts:
                sums["load"][e] += e in chosen
            else:
                sums["load"][e] += 0.5 * math.erfc((others[top_k - 1] - c[e]) / sigma[e] / math.sqrt(2))
        for e, weight in zip(chosen, weights, strict=True):
            sums["assignments"][e] += 1
            sums["importance"][e] += weight
    return chosen_of, weights_of, sums


@given(
    tokens=st.integers(1, 8),
    experts=st.integers(1, 6),
    chosen=st.integers(1, 6),
    noisy=st.booleans(),
    renormalize=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_choices_weights_and_sums_equal_loops_over_tokens(
    tokens: int, experts: int, chosen: int, noisy: bool, renormalize: bool, masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(chosen, experts)
    params, x = drawn(rng, 3, experts, noisy), rng.standard_normal((tokens, 3))
    noise = rng.standard_normal((tokens, experts)) if noisy else None
    mask = rng.integers(2, size=tokens) if masked else None
    routing, stats, _ = noisy_top_k.gate(params, x, top_k, renormalize=renormalize, noise=noise, mask=mask)
    chosen_of, weights_of, sums = by_loops(params, x, top_k, renormalize, noise, mask)
    assert routing.experts.tolist() == chosen_of
    np.testing.assert_allclose(routing.weights, weights_of, atol=1e-13)
    for name, expected in sums.items():
        np.testing.assert_allclose(getattr(stats, name), expected, atol=1e-12, err_msg=name)


FALSE_ALARM = 5.0
"""Standard deviations: a right router exceeds them in one of 1.7 million comparisons."""


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_load_estimate_agrees_with_drawing_the_noise_again(rng: np.random.Generator, top_k: int) -> None:
    """P(t, i) draws the noise of expert i again and keeps all other noise: so does this, 20,000 times."""
    draws, experts = 20_000, 5
    params = tree.map(lambda w: 0.1 * w, drawn(rng, 4, experts))
    x, noise = rng.standard_normal((1, 4)), 0.5 * rng.standard_normal((1, experts))
    estimate = noisy_top_k.gate(params, x, top_k, noise=noise)[1].load
    for i in range(experts):
        fresh = noise.repeat(draws, axis=0)
        fresh[:, i] = rng.standard_normal(draws)
        routing, _, _ = noisy_top_k.gate(params, x.repeat(draws, axis=0), top_k, noise=fresh)
        frequency = (routing.experts == i).any(axis=1).mean()
        assert abs(frequency - estimate[i]) < FALSE_ALARM * math.sqrt(estimate[i] * (1 - estimate[i]) / draws)
    assert ((estimate > 0.1) & (estimate < 0.9)).sum() >= 3, "a point that would show a difference"


def chance_of_being_chosen(c: np.ndarray, sigma: np.ndarray, top_k: int) -> np.ndarray:
    """c and σ (E,) → for each expert the chance that fewer than K of the others are above it, all noise drawn again.

    If h_i = z, each other expert is above it with a chance of its own, so how many are is a sum of independent coins;
    then z is integrated over, on a grid so fine and wide that the error is below 1e-8.
    """
    steps = np.linspace(-9, 9, 4001)
    chances = []
    for i in range(len(c)):
        z = c[i] + sigma[i] * steps
        above = np.zeros((top_k, len(z)))  # the chance that exactly so many are above
        above[0] = 1
        for j in set(range(len(c))) - {i}:
            coin = 1 - gaussian.cumulative((z - c[j]) / sigma[j])
            above = (1 - coin) * above + coin * np.concatenate([np.zeros((1, len(z))), above[:-1]])
        chances.append((gaussian.density(steps) * above.sum(0)).sum() * (steps[1] - steps[0]))
    return np.array(chances)


def test_of_two_experts_the_chance_is_that_of_the_difference_of_two_normal_numbers() -> None:
    """In closed form: Φ((c₀ − c₁) / √(σ₀² + σ₁²))."""
    c, sigma = np.array([0.3, -0.2]), np.array([0.5, 1.2])
    first = 0.5 * math.erfc(-0.5 / 1.3 / math.sqrt(2))
    np.testing.assert_allclose(chance_of_being_chosen(c, sigma, 1), [first, 1 - first], atol=1e-8)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (5, 1), (5, 2), (5, 4)])
def test_noisy_choices_are_as_frequent_as_theory_says_and_the_load_estimate_has_no_bias(
    rng: np.random.Generator, experts: int, top_k: int
) -> None:
    draws = 50_000
    params, x = drawn(rng, 4, experts), 0.5 * rng.standard_normal((1, 4))
    assert params.w_noise is not None
    sigma = np.log1p(np.exp(x @ params.w_noise))[0] + NOISE_FLOOR
    theory = chance_of_being_chosen((x @ params.w_gate)[0], sigma, top_k)
    assert theory.sum() == pytest.approx(top_k, abs=1e-7)
    assert ((theory > 0.05) & (theory < 0.95)).sum() >= 2, "a point that would show a difference"
    _, stats, _ = noisy_top_k.gate(params, x.repeat(draws, axis=0), top_k, noise=rng.standard_normal((draws, experts)))
    deviation = np.sqrt(theory * (1 - theory) / draws)  # of an estimate between 0 and 1, at most this too
    assert (abs(stats.assignments / draws - theory) < FALSE_ALARM * deviation).all()
    assert (abs(stats.load / draws - theory) < FALSE_ALARM * deviation).all()


def test_ties_go_to_the_lowest_index() -> None:
    gate = np.array([[1.0, 2.0, 2.0, 2.0]])
    assert noisy_top_k.gate(Router(gate, None), np.array([[0.0], [1.0]]), 2)[0].experts.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("experts", [4, 40])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_few_and_many_experts_are_ranked_alike_and_the_first_one_out_behind_them(
    experts: int, top_k: int, rng: np.random.Generator
) -> None:
    """Logits of few different values, so that most have an equal."""
    logits = rng.integers(6, size=(30, experts)).astype(float)
    _, _, cache = noisy_top_k.gate(Router(np.eye(experts), None), logits, top_k)
    expected = [sorted(range(experts), key=lambda e: (-row[e], e))[: top_k + 1] for row in logits]
    assert cache.ranking.tolist() == expected
    assert cache.ranking.shape == (30, min(top_k + 1, experts))


def test_experts_stand_best_first(rng: np.random.Generator) -> None:
    routing, _, _ = noisy_top_k.gate(drawn(rng), rng.standard_normal((20, 4)), 3)
    assert (np.diff(routing.weights, axis=1) <= 0).all()


def test_renormalised_weights_sum_to_one_and_equal_softmax_then_top_k_then_division(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((20, 4))
    over_chosen, _, _ = noisy_top_k.gate(params, x, 2)
    over_all, _, _ = noisy_top_k.gate(params, x, 2, renormalize=False)
    np.testing.assert_allclose(over_chosen.weights.sum(1), 1, atol=1e-15)
    assert (over_all.weights.sum(1) < 0.999).all()
    np.testing.assert_allclose(
        over_chosen.weights, over_all.weights / over_all.weights.sum(1, keepdims=True), atol=1e-14
    )


def test_a_renormalised_top_1_router_learns_nothing_from_the_language_model(rng: np.random.Generator) -> None:
    params, x = drawn(rng, noisy=False), rng.standard_normal((6, 4))
    routing, _, cache = noisy_top_k.gate(params, x, 1)
    dx, grads = noisy_top_k.gate_backward(params, cache, rng.standard_normal((6, 1)), None)
    assert (routing.weights == 1).all()
    assert not grads.w_gate.any()
    assert not dx.any()
    _, _, cache = noisy_top_k.gate(params, x, 1, renormalize=False)
    _, grads = noisy_top_k.gate_backward(params, cache, rng.standard_normal((6, 1)), None)
    assert abs(grads.w_gate).max() > 0.01, "Switch's weight, the plain probability, does teach it"


def test_without_renormalisation_experts_that_were_not_chosen_get_gradient_too(rng: np.random.Generator) -> None:
    params, x = drawn(rng, noisy=False), rng.standard_normal((1, 4))
    for renormalize in (True, False):
        routing, _, cache = noisy_top_k.gate(params, x, 2, renormalize=renormalize)
        _, grads = noisy_top_k.gate_backward(params, cache, np.array([[1.0, -1.0]]), None)
        others = np.setdiff1d(np.arange(5), routing.experts)
        assert grads.w_gate[:, others].any() == (not renormalize)


def test_padding_changes_no_sum_and_no_gradient(rng: np.random.Generator) -> None:
    params, x, noise = drawn(rng), rng.standard_normal((5, 4)), rng.standard_normal((5, 5))
    padding = rng.standard_normal((3, 4)), rng.standard_normal((3, 5))
    dstats = RouterStats(0, np.zeros(5), *rng.standard_normal((3, 5)), *rng.standard_normal((2, 1)), np.zeros(()))
    _, stats, cache = noisy_top_k.gate(params, x, 2, noise=noise)
    dx, grads = noisy_top_k.gate_backward(params, cache, np.zeros((5, 2)), dstats)
    _, padded_stats, cache = noisy_top_k.gate(
        params,
        np.concatenate([x, padding[0]]),
        2,
        noise=np.concatenate([noise, padding[1]]),
        mask=np.array([1, 1, 1, 1, 1, 0, 0, 0]),
    )
    padded_dx, padded_grads = noisy_top_k.gate_backward(params, cache, np.zeros((8, 2)), dstats)
    ours, theirs = tree.named_leaves((stats, grads)), tree.leaves((padded_stats, padded_grads))
    for (name, leaf), padded in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(padded, leaf, atol=1e-13, err_msg=name)
    np.testing.assert_allclose(padded_dx[:5], dx, atol=1e-14)
    assert (padded_dx[5:] == 0).all()


def test_evaluation_has_no_noise_no_division_by_zero_and_no_chance(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((6, 4))
    routing, stats, cache = noisy_top_k.gate(params, x, 2)
    plain, _, _ = noisy_top_k.gate(Router(params.w_gate, None), x, 2)
    again, _, _ = noisy_top_k.gate(params, x, 2)
    assert (routing.experts == plain.experts).all()
    assert (routing.weights == plain.weights).all()
    assert (routing.weights == again.weights).all()
    assert (stats.load == stats.assignments).all()
    losses, dstats = balance.loss(stats, EVERY_LOSS)
    dx, grads = noisy_top_k.gate_backward(params, cache, np.ones((6, 2)), dstats)
    assert all(np.isfinite(leaf).all() for leaf in tree.leaves((losses, dx, grads)))
    assert grads.w_noise is not None
    assert not grads.w_noise.any()


def test_the_estimate_of_the_load_can_be_left_out_without_changing_anything_else(rng: np.random.Generator) -> None:
    params, x, noise = drawn(rng), rng.standard_normal((6, 4)), rng.standard_normal((6, 5))
    routing, stats, _ = noisy_top_k.gate(params, x, 2, noise=noise)
    same, cheaper, _ = noisy_top_k.gate(params, x, 2, noise=noise, estimate_load=False)
    assert (same.weights == routing.weights).all()
    assert (cheaper.load == cheaper.assignments).all()
    assert (stats.load != stats.assignments).any()
    for name in set(RouterStats._fields) - {"load"}:
        assert np.array_equal(getattr(stats, name), getattr(cheaper, name)), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(logits=st.lists(st.sampled_from([-1e4, -1.0, 0.0, 1.0, 1e4]), min_size=3, max_size=3), renormalize=st.booleans())
def test_logits_of_ten_thousand_stay_finite_both_ways(dtype: Any, logits: list[float], renormalize: bool) -> None:
    """In the gate, in the noise scale (softplus), in log-sum-exp and in the load estimate, all at once."""
    params = Router(np.array([logits], dtype), np.array([logits[::-1]], dtype))
    x, noise = np.array([[1.0], [-1.0]], dtype), np.array([[0.5, -0.5, 0.1], [1.0, 0.0, -2.0]], dtype)
    routing, stats, cache = noisy_top_k.gate(params, x, 2, renormalize=renormalize, noise=noise)
    losses, dstats = balance.loss(stats, EVERY_LOSS)
    gradients = noisy_top_k.gate_backward(params, cache, np.ones((2, 2), dtype), dstats)
    for leaf in tree.leaves((routing, stats, losses, gradients)):
        assert np.isfinite(leaf).all()
    assert {leaf.dtype for leaf in tree.leaves((routing.weights, gradients))} == {np.dtype(dtype)}


@given(scale=st.sampled_from([1e2, 1e4]), noisy=st.booleans(), renormalize=st.booleans(), seed=st.integers(0, 99))
def test_gradient_is_right_at_extreme_logits(scale: float, noisy: bool, renormalize: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = Router(scale * rng.standard_normal((3, 4)), rng.standard_normal((3, 4)) if noisy else None)
    x, noise = rng.standard_normal((4, 3)), rng.standard_normal((4, 4)) if noisy else None
    # a step of x moves the logits by as much as their scale, a step of the gate does not
    rows = [
        row
        for step, of_x in ((1e-3 / scale, True), (1e-4, False))
        for row in check_router(params, x, 2, Coefficients(z=1e-4), step=step, noise=noise, renormalize=renormalize)
        if (row.tensor == "x") == of_x
    ]
    assert passed_or_refused(rows), failed(rows)


def test_noise_starts_the_same_for_all_experts(rng: np.random.Generator) -> None:
    params = noisy_top_k.init(rng, ModelConfig(width=200, experts=8))
    assert params.w_noise is not None
    assert not params.w_noise.any()
    assert abs(params.w_gate.std() - 0.02) < 1e-3
    assert noisy_top_k.init(rng, ModelConfig(width=4, experts=3, noisy_gating=False)).w_noise is None


# The interface: what the mixture-of-experts layer and the rest of the package ask of a router


def sizes(noisy: bool = True, active: int = 2, renormalize: bool = True) -> ModelConfig:
    return ModelConfig(width=4, experts=5, active_experts=active, renormalize=renormalize, noisy_gating=noisy)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimate_load", [False, True])
def test_forward_and_backward_are_the_gate_on_sorted_entries(
    rng: np.random.Generator, renormalize: bool, capacity_factor: float | None, masked: bool, estimate_load: bool
) -> None:
    """B 2, T 6. A dropped entry has no weight, so no gradient comes back to it."""
    params, config = drawn(rng), sizes(renormalize=renormalize)
    x, noise = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 5))
    mask = np.arange(12).reshape(2, 6) % 4 > 0 if masked else None
    mode = Mode(True, noise, capacity_factor, estimate_load, mask=mask)
    made, stats, cache = noisy_top_k.forward(params, x, config, mode)

    rows, xi = x.reshape(12, 4), noise.reshape(12, 5)
    choice, same_stats, gate_cache = noisy_top_k.gate(
        params, rows, 2, renormalize=renormalize, noise=xi, estimate_load=estimate_load, mask=mask
    )
    served = experts_by_token(made)
    kept = served >= 0
    assert (served[kept] == choice.experts[kept]).all()
    assert (by_token(made.weight, made.place) == np.where(kept, choice.weights, 0)).all()
    assert all(np.array_equal(ours, its) for ours, its in zip(stats, same_stats, strict=True))
    assert kept.all() == (capacity_factor is None)
    assert made.dropped == (0 if capacity_factor is None else (2 * mask.sum() if masked else 24) - kept.sum())

    dweight = rng.standard_normal(sum(made.counts))
    dstats = balance.loss(stats, EVERY_LOSS)[1]
    dweights = np.zeros((12, 2))
    dweights[kept] = dweight[made.place[kept]]
    expected_dx, expected = noisy_top_k.gate_backward(params, gate_cache, dweights, dstats)
    dx, grads = noisy_top_k.backward(params, cache, dweight, dstats)
    assert (dx == expected_dx.reshape(2, 6, 4)).all()
    assert all((ours == its).all() for ours, its in zip(grads, expected, strict=True))


def test_the_default_mode_of_a_router_is_evaluation(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((2, 3, 4))
    made, stats, _ = noisy_top_k.forward(params, x, sizes())
    choice, _, _ = noisy_top_k.gate(params, x.reshape(6, 4), 2)
    assert (experts_by_token(made) == choice.experts).all()
    assert made.dropped == 0
    assert (stats.load == stats.assignments).all()


@pytest.mark.parametrize("noisy", [True, False])
def test_what_the_proofs_compare_are_the_logits_that_top_k_saw(rng: np.random.Generator, noisy: bool) -> None:
    params, x, noise = drawn(rng, noisy=noisy), rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 5))
    for mode in (Mode(), Mode(training=True, noise=noise)):
        _, _, cache = noisy_top_k.forward(params, x, sizes(noisy, active=3), mode)
        [(logits, k)] = noisy_top_k.compared(params, cache)
        expected = ranked(params, x.reshape(6, 4), 3, None if mode.noise is None else noise.reshape(6, 5))
        np.testing.assert_allclose(logits, expected.logits, atol=1e-13)
        assert k == expected.top_k == 3


@given(active=st.integers(1, 5), renormalize=st.booleans(), seed=st.integers(0, 99))
def test_one_token_chooses_as_a_batch_does(active: int, renormalize: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params, x = drawn(rng), rng.standard_normal((6, 4))
    choice, _, _ = noisy_top_k.gate(params, x, active, renormalize=renormalize)
    for t in range(6):
        chosen, weights = noisy_top_k.decode(params, x[t], sizes(True, active, renormalize))
        assert chosen == choice.experts[t].tolist()
        np.testing.assert_allclose(weights, choice.weights[t], atol=1e-13)


def test_one_token_s_ties_go_to_the_lowest_index_too() -> None:
    chosen, weights = noisy_top_k.decode(Router(np.array([[1.0, 2.0, 2.0, 2.0]]), None), np.array([1.0]), sizes())
    assert (chosen, weights) == ([1, 2], [0.5, 0.5])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_is_drawn_for_every_logit_and_only_with_noisy_gating(dtype: Any) -> None:
    noise = noisy_top_k.draw_noise(np.random.default_rng(0), sizes(), (3, 20, 30), dtype)
    assert noise is not None
    assert (noise.shape, noise.dtype) == ((3, 20, 30, 5), dtype)
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.size)
    assert noisy_top_k.draw_noise(np.random.default_rng(0), sizes(noisy=False), (3, 2, 3), dtype) is None


def test_a_renormalised_top_1_router_is_refused() -> None:
    with pytest.raises(UserError, match="no gradient from the language-model loss: set renormalize to false"):
        noisy_top_k.check(sizes(active=1))
    noisy_top_k.check(sizes(active=1, renormalize=False))
    noisy_top_k.check(ModelConfig(experts=1, active_experts=1))  # a dense model, with nothing to route
    noisy_top_k.check(sizes())


@pytest.mark.parametrize("noisy", [True, False])
def test_the_facts_of_its_parameters(rng: np.random.Generator, noisy: bool) -> None:
    """A blank has the shapes of a fresh router; the noise serves training only; nothing here is Muon's."""
    config = sizes(noisy)
    params, blank = noisy_top_k.init(rng, config), noisy_top_k.blank(config, np.zeros)
    shapes = [(name, leaf.shape) for name, leaf in tree.named_leaves(params)]
    assert [(name, leaf.shape) for name, leaf in tree.named_leaves(blank)] == shapes
    assert list(tree.marked(params, "training_only")) == (["w_noise"] if noisy else [])
    assert list(tree.marked(params, "matrices")) == []
    [(name, weight)] = noisy_top_k.mixtral_tensors(params)
    assert name == "block_sparse_moe.gate.weight"
    assert weight.shape == (5, 4) and np.shares_memory(weight, params.w_gate)
