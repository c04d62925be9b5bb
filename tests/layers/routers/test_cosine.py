"""The cosine router against a loop over tokens, its gradient on every path, and what must not change its scores."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.arrays import placeholder
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import cosine
from minimoe.layers.routers.cosine import Cosine
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import Ranked, check, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
FORMS = ["tutel", "x-moe"]


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 6, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 7}
    return ModelConfig(**{**sizes, "experts": 5, "active_experts": 2, "expert_width": 3, "router": "cosine", **changes})


def drawn(rng: np.random.Generator, config: ModelConfig, temperature: float = 0.5) -> Cosine:
    """Parameters away from where they start, with vectors of unequal lengths."""
    params = tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape), cosine.init(rng, config, np.float64))
    return params._replace(temperature=np.full(1, temperature))


def logits_of(params: Cosine, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return cosine.forward(params, x, config)[2].logits


def check_cosine(params: Cosine, x: np.ndarray, config: ModelConfig, mode: Mode) -> list[Any]:
    """Checks the weights of the entries together with the auxiliary losses."""

    def forward(params: Cosine, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = cosine.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: Cosine, cache: Any, dy: Any) -> tuple[Any, Any]:
        return cosine.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def routing(params: Cosine, cache: Any) -> list[Ranked]:
        return [Ranked(cache[0].logits, config.active_experts)]

    return check("cosine", forward, backward, params, x, routing=routing, entries=10, directions=2)


@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 2),
    context=st.integers(1, 5),
    experts=st.integers(1, 5),
    temperature=st.sampled_from([-1.0, 1.0, 4.7]),  # the last is above ln 100
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    form: str, batch: int, context: int, experts: int, temperature: float, masked: bool, factor: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    config = config_of(experts=experts, active_experts=min(2, experts), cosine_form=form)
    params, x = drawn(rng, config, temperature), rng.standard_normal((batch, context, 6))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    rows = check_cosine(params, x, config, Mode(True, None, factor, balance_by_sequence=True, mask=mask))
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


@pytest.mark.parametrize("form", FORMS)
def test_it_agrees_with_a_loop_over_tokens(rng: np.random.Generator, form: str) -> None:
    config = config_of(cosine_form=form)
    params, x = drawn(rng, config), rng.standard_normal((2, 6, 6))
    mask = np.ones((2, 6))
    mask[1, 4:] = 0
    routing, stats, _ = cosine.forward(params, x, config, Mode(True, mask=mask))
    assignments, probability, importance = np.zeros((3, 5))
    squared_lse = entropy = 0.0
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    for t, token in enumerate(x.reshape(-1, 6)):
        u = [sum(token[d] * params.projection[d, w] for d in range(6)) for w in range(3)]
        u = [one + (0 if params.bias is None else params.bias[w]) for w, one in enumerate(u)]
        z = [math.exp(0.5) * np.dot(u, m) / (math.hypot(*u) * math.hypot(*m)) for m in params.directions]
        best = sorted(range(5), key=lambda e: -z[e])[:2]
        w = [math.exp(z[e]) / (math.exp(z[best[0]]) + math.exp(z[best[1]])) for e in best]
        assert experts[t].tolist() == best
        assert weights[t] == pytest.approx(w)
        if mask.reshape(-1)[t]:
            p = np.exp(z) / np.exp(z).sum()
            assignments[best] += 1
            importance[best] += w
            probability += p
            squared_lse += math.log(np.exp(z).sum()) ** 2
            entropy -= (p * np.log(p)).sum()
    expected = RouterStats(10, assignments, probability, importance, assignments, squared_lse, np.zeros(()), entropy)
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


# What must not change the scores


@pytest.mark.parametrize("times", [3.0, 1e-3])
def test_a_longer_token_has_the_same_scores_in_the_form_without_bias(rng: np.random.Generator, times: float) -> None:
    config = config_of(cosine_form="x-moe")
    params, x = drawn(rng, config), rng.standard_normal((1, 4, 6))
    np.testing.assert_allclose(logits_of(params, times * x, config), logits_of(params, x, config), rtol=1e-12)


def test_with_a_bias_it_is_the_projected_token_whose_length_does_not_count(rng: np.random.Generator) -> None:
    config = config_of()
    params, x = drawn(rng, config), rng.standard_normal((1, 4, 6))
    assert params.bias is not None
    longer = params._replace(projection=3 * params.projection, bias=3 * params.bias)
    np.testing.assert_allclose(logits_of(longer, x, config), logits_of(params, x, config), rtol=1e-12)
    assert abs(logits_of(params, 3 * x, config) - logits_of(params, x, config)).max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_the_length_of_an_experts_vector_does_not_count(rng: np.random.Generator, form: str) -> None:
    config = config_of(cosine_form=form)
    params, x = drawn(rng, config), rng.standard_normal((1, 4, 6))
    longer = params._replace(directions=params.directions * rng.uniform(0.1, 10, (5, 1)))
    np.testing.assert_allclose(logits_of(longer, x, config), logits_of(params, x, config), rtol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_points_along_a_vector_whose_length_does_not_count(rng: np.random.Generator, form: str) -> None:
    config = config_of(cosine_form=form)
    params, x = drawn(rng, config), rng.standard_normal((1, 4, 6))
    routing, _, cache = cosine.forward(params, x, config)
    dx, grads = cosine.backward(params, cache, rng.standard_normal(len(routing.weight)), None)
    np.testing.assert_allclose((grads.directions * params.directions).sum(1), 0, atol=1e-13)
    assert abs(grads.directions).max() > 1e-3
    if form == "x-moe":
        np.testing.assert_allclose((dx * x).sum(2), 0, atol=1e-13)
        assert abs(dx).max() > 1e-3


def test_renamed_experts_are_the_same_experts(rng: np.random.Generator) -> None:
    config = config_of()
    params, x, order = drawn(rng, config), rng.standard_normal((2, 5, 6)), rng.permutation(5)
    one, stats, _ = cosine.forward(params, x, config)
    other, renamed, _ = cosine.forward(params._replace(directions=params.directions[order]), x, config)
    np.testing.assert_array_equal(order[experts_by_token(other)], experts_by_token(one))
    np.testing.assert_allclose(by_token(other.weight, other.place), by_token(one.weight, one.place), rtol=1e-12)
    for name in ("assignments", "probability", "importance", "load"):
        np.testing.assert_allclose(getattr(renamed, name), getattr(stats, name)[order], rtol=1e-12)


# The edge


@pytest.mark.parametrize("form", FORMS)
def test_a_vector_of_zeros_has_scores_of_zero_and_gets_no_gradient(rng: np.random.Generator, form: str) -> None:
    config = config_of(cosine_form=form)
    params, x = drawn(rng, config), rng.standard_normal((1, 3, 6))
    x[0, 1] = 0
    if params.bias is not None:
        params.bias[:] = 0
    params.directions[3] = 0
    with np.errstate(all="raise"):
        routing, stats, cache = cosine.forward(params, x, config)
        dstats = balance.loss(stats, EVERY_LOSS)[1]
        dx, grads = cosine.backward(params, cache, rng.standard_normal(len(routing.weight)), dstats)
    assert not cache.logits[1].any() and not cache.logits[:, 3].any()
    assert experts_by_token(routing)[1].tolist() == [0, 1], "the lowest indices win a tie"
    np.testing.assert_allclose(by_token(routing.weight, routing.place)[1], 0.5)
    assert not dx[0, 1].any() and not grads.directions[3].any()
    assert all(np.isfinite(leaf).all() for leaf in tree.leaves((dx, grads)))


def test_the_scale_starts_at_two_is_learned_and_is_cut_at_a_hundred(rng: np.random.Generator) -> None:
    config = config_of(cosine_form="x-moe")
    assert cosine.init(rng, config).temperature == pytest.approx(math.log(2))
    params, x = drawn(rng, config), rng.standard_normal((1, 40, 6))
    for temperature, scale, learns in ((math.log(2), 2, True), (4.6, math.exp(4.6), True), (4.7, 100, False)):
        moved = params._replace(temperature=np.full(1, temperature))
        routing, _, cache = cosine.forward(moved, x, config)
        cosines = cache.logits / scale
        np.testing.assert_allclose(cosines, logits_of(params._replace(temperature=np.zeros(1)), x, config), rtol=1e-12)
        assert abs(cosines).max() <= 1 + 1e-12
        _, grads = cosine.backward(moved, cache, np.arange(len(routing.weight)) * 1.0, None)
        assert bool(grads.temperature.any()) == learns


# The two forms


def test_the_forms_start_as_published(rng: np.random.Generator) -> None:
    large = config_of(width=1024, experts=12)
    tutel, x_moe = cosine.init(rng, large), cosine.init(rng, dataclasses.replace(large, cosine_form="x-moe"))
    assert (tutel.projection.shape, x_moe.projection.shape) == ((1024, 256), (1024, 16))
    assert tutel.bias is not None and tutel.bias.shape == (256,) and x_moe.bias is None
    assert tutel.directions.std() == pytest.approx(0.01, rel=0.05)
    np.testing.assert_allclose(x_moe.directions @ x_moe.directions.T, np.eye(12), atol=1e-6)
    for params in (tutel, x_moe):
        assert abs(params.projection).max() == pytest.approx(1 / 32, rel=0.01)
        assert params.projection.std() == pytest.approx(1 / 32 / math.sqrt(3), rel=0.02)


def test_of_more_vectors_than_directions_the_columns_are_at_right_angles(rng: np.random.Generator) -> None:
    directions = cosine.init(rng, config_of(width=64, experts=40, cosine_form="x-moe"), np.float64).directions
    assert directions.shape == (40, 16)
    np.testing.assert_allclose(directions.T @ directions, np.eye(16), atol=1e-12)


@pytest.mark.parametrize(
    ("width", "form", "projected"), [(1, "tutel", 1), (7, "x-moe", 3), (20, "x-moe", 10), (400, "tutel", 200)]
)
def test_a_small_model_projects_to_half_its_width(
    rng: np.random.Generator, width: int, form: str, projected: int
) -> None:
    config = config_of(width=width, cosine_form=form)
    params = cosine.init(rng, config)
    assert params.projection.shape == (width, projected)
    blank = cosine.blank(config, placeholder)
    assert [leaf.shape for leaf in tree.leaves(blank)] == [leaf.shape for leaf in tree.leaves(params)]


def test_one_expert_of_weight_one_is_refused_for_training_only() -> None:
    config = config_of(active_experts=1)
    with pytest.raises(UserError, match="active_experts 1 .*'cosine'.*no gradient.*set active_experts to 2"):
        moe.check(config)
    moe.check_forward(config)
    moe.check(config_of(experts=1, active_experts=1))


def test_a_capacity_drops_the_last_comers(rng: np.random.Generator) -> None:
    config = config_of(experts=4)
    params = drawn(rng, config)
    params.directions[:] = [[1, 0, 0], [1, 1e-3, 0], [-1, 0, 0], [-1, 0, 1e-3]]
    params.projection[:], x = 0, rng.standard_normal((1, 8, 6))
    assert params.bias is not None
    params.bias[:] = [1, 0, 0]  # every token chooses experts 0 and 1
    routing, _, _ = cosine.forward(params, x, config, Mode(True, None, 0.5))
    assert (routing.counts, routing.dropped) == ([2, 2, 0, 0], 12)  # ⌈0.5 · 2 · 8 / 4⌉ = 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [-1.0, 1.0, 6.0])
def test_one_token_is_decoded_as_it_is_routed(rng: np.random.Generator, form: str, temperature: float) -> None:
    """With the bias, the scale and its cut at a hundred; of equal scores, the lowest index wins."""
    config = config_of(cosine_form=form)
    params = drawn(rng, config, temperature)
    params.directions[3] = params.directions[1]
    for x in rng.standard_normal((20, 6)):
        routing, _, _ = cosine.forward(params, x[None, None], config)
        experts, weights = cosine.decode(params, x, config)
        assert experts == experts_by_token(routing)[0].tolist()
        assert weights == pytest.approx(by_token(routing.weight, routing.place)[0].tolist(), rel=1e-9)
