"""Zero-computation experts: nothing, a copy or a SwiGLU network; and weights, counts and workers with them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.cost import blueprint, memory, parameters
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder, lora, moe
from minimoe.layers.experts import swiglu, zero_computation
from minimoe.layers.experts.zero_computation import ZeroComputation
from minimoe.layers.mode import Mode
from minimoe.layers.routers.noisy_top_k import Router
from minimoe.losses import balance, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer
from minimoe.parallel import exchange
from minimoe.proof.gradcheck import check, failed
from minimoe.storage import huggingface_config


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 9}
    kinds = {"experts": 5, "zero_experts": 1, "copy_experts": 2, "expert_kind": "zero_computation"}
    return ModelConfig(**{**sizes, **kinds, "expert_width": 3, **changes})


def drawn(rng: np.random.Generator, **changes: Any) -> ZeroComputation:
    return zero_computation.init(rng, config_of(**changes), dtype=np.float64)


def answer(params: ZeroComputation, e: int, x: np.ndarray) -> np.ndarray:
    """Expert e on x (D,), written out."""
    computing = len(params.feed_forward.w_gate)
    if e >= computing:
        return x if e >= computing + len(params.zero) else 0 * x
    w_gate, w_up, w_down = (weight[e] for weight in params.feed_forward)
    a = x @ w_gate
    return (a / (1 + np.exp(-a)) * (x @ w_up)) @ w_down


@given(
    kinds=st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 2)).filter(lambda kinds: sum(kinds[1:]) > 0),
    behind=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@example(kinds=(1, 1, 0), behind=1, seed=0)
@example(kinds=(1, 0, 1), behind=1, seed=1)
def test_gradient_is_right_for_every_number_of_each_kind(kinds: tuple[int, int, int], behind: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = drawn(rng, experts=sum(kinds), active_experts=1, zero_experts=kinds[1], copy_experts=kinds[2])
    counts = [1, *rng.integers(0, 4, sum(kinds) - 1).tolist()]
    x = rng.standard_normal((sum(counts) + behind, 4))
    rows = check(
        "zero_computation",
        lambda params, x: zero_computation.forward(params, x, counts),
        zero_computation.backward,
        params,
        x,
        entries=8,
        directions=2,
    )
    assert failed(rows) == []


def test_every_row_goes_through_its_own_expert(rng: np.random.Generator) -> None:
    params, x, counts = drawn(rng), rng.standard_normal((11, 4)), [2, 1, 3, 0, 2]
    y, cache = zero_computation.forward(params, x, counts)
    experts = np.repeat(np.arange(5), counts)
    for row, e in enumerate(experts):
        np.testing.assert_allclose(y[row], answer(params, e, x[row]), atol=1e-14)
    assert (y[3:6] == 0).all()
    assert (y[6:8] == x[6:8]).all()
    assert (y[8:] == 0).all(), "rows behind the last segment belong to no expert"
    dy = rng.standard_normal(x.shape)
    dx, _ = zero_computation.backward(params, cache, dy)
    assert (dx[3:6] == 0).all()
    assert (dx[6:8] == dy[6:8]).all()
    assert (dx[8:] == 0).all()


def test_copies_are_new_rows(rng: np.random.Generator) -> None:
    """The layer weighs the rows of an answer, and of a gradient, in place."""
    params, x = drawn(rng), rng.standard_normal((3, 4))
    y, cache = zero_computation.forward(params, x, [0, 0, 0, 2, 1])
    dy = np.ones_like(y)
    dx, _ = zero_computation.backward(params, cache, dy)
    assert not np.shares_memory(y, x)
    assert not np.shares_memory(dx, dy)


def test_only_rows_of_swiglu_experts_have_a_hidden_layer(rng: np.random.Generator) -> None:
    _, cache = zero_computation.forward(drawn(rng), rng.standard_normal((8, 4)), [2, 1, 3, 0, 2])
    assert cache.feed_forward.a.shape == cache.feed_forward.b.shape == (3, 3)


@pytest.mark.parametrize("counts", [[0, 0, 0, 0, 0], [0, 0, 2, 0, 0], [0, 0, 0, 0, 2]])
def test_nothing_to_compute_gives_zero_gradients(rng: np.random.Generator, counts: list[int]) -> None:
    params, x = drawn(rng), rng.standard_normal((2, 4)).astype(np.float32)
    params = tree.map(lambda leaf: leaf.astype(np.float32), params)
    y, cache = zero_computation.forward(params, x, counts)
    dx, grads = zero_computation.backward(params, cache, np.ones_like(y))
    assert not any(leaf.any() for leaf in tree.leaves(grads))
    assert y.dtype == dx.dtype == np.float32
    assert (y == (x if counts[4] else 0)).all()
    assert (dx == (1 if counts[4] else 0)).all()


# The weight of an expert that answers nothing


def test_the_weight_of_a_zero_expert_is_not_given_to_its_partner(rng: np.random.Generator) -> None:
    """By hand: one token, weights 3/4 for the zero expert and 1/4 for a copy. Public code answers x instead of x/4."""
    config = config_of(experts=4, zero_experts=1, copy_experts=1, noisy_gating=False)
    params = moe.init(rng, config, dtype=np.float64)
    x = rng.standard_normal((1, 1, 4))
    logits = np.array([-9, -9, np.log(3.0), 0.0])
    w_gate = np.outer(x[0, 0], logits) / (x**2).sum()
    y = moe.forward(params._replace(router=Router(w_gate, None)), x, config).y
    np.testing.assert_allclose(y, x / 4, rtol=1e-12)


def test_one_token_through_its_experts_is_the_weighted_sum_of_their_answers(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal(4)
    before = x.copy()
    for chosen, weights in (([2, 0], [0.75, 0.5]), ([4, 1, 3], [0.5, 0.2, 0.1]), ([2], [1.0]), ([0, 1], [0.9, 0.3])):
        y = zero_computation.decode(params, x, chosen, weights)
        expected = sum(w * answer(params, e, x) for e, w in zip(chosen, weights, strict=True))
        np.testing.assert_allclose(y, expected, atol=1e-14)
    assert (x == before).all()


def test_the_router_learns_from_experts_that_compute_nothing(rng: np.random.Generator) -> None:
    """A token whose answer should vanish: each step towards that raises the weight of the zero expert."""
    config = config_of(experts=4, zero_experts=1, copy_experts=1, noisy_gating=False)
    params = moe.init(rng, config, dtype=np.float64)
    x = rng.standard_normal((1, 1, 4))
    w_gate = np.outer(x[0, 0], [-9, -9, 0.0, 0.1]) / (x**2).sum()
    params = params._replace(router=Router(w_gate, None))
    y, stats, _, cache = moe.forward(params, x, config)
    _, grads = moe.backward(params, cache, y, None)  # the gradient of |y|²/2
    slope = x[0, 0] @ grads.router.w_gate
    assert slope[2] < 0 < slope[3]


# The balance loss


def test_experts_with_a_small_weight_may_have_more_to_do(rng: np.random.Generator) -> None:
    """E Σ η f p̄ and its gradient, written out; all other losses stay."""
    config = config_of(cheap_balance=0.25)
    eta = zero_computation.balance_weights(config)
    assert eta == [1, 1, 0.25, 0.25, 0.25] == moe.balance_weights(config)
    x = rng.standard_normal((2, 6, 4))
    _, stats, _ = moe.router_of(config).forward(Router(rng.standard_normal((4, 5)), None), x, config, Mode())
    coefficients = Coefficients(0.5, 0.4, 0.3, 0.2)
    losses, gradient = balance.loss(stats, coefficients, eta)
    plain, of_plain = balance.loss(stats, coefficients)
    f, p = stats.assignments / 24, stats.probability / 12
    assert losses.balance == pytest.approx(5 * sum(eta[e] * f[e] * p[e] for e in range(5)), rel=1e-12)
    np.testing.assert_allclose(gradient.probability, 0.5 * 5 * np.array(eta) * f / 12, rtol=1e-12)
    assert losses[1:] == plain[1:]
    assert (gradient.importance == of_plain.importance).all()
    pooled, of_pooled = balance.pooled([stats, stats], 0.5, eta)
    assert pooled == pytest.approx(2 * losses.balance, rel=1e-12)  # K times, with one layer twice
    np.testing.assert_allclose(of_pooled.probability, gradient.probability, rtol=1e-12)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_objective_uses_these_weights_and_its_gradient_is_right(rng: np.random.Generator, pooled: bool) -> None:
    tokens, targets = rng.integers(11, size=(2, 2, 9))
    goal = Objective(Coefficients(balance=0.5), pooled_balance=pooled)
    totals = []
    for eta in (1.0, 0.0):
        config = config_of(cheap_balance=eta, noisy_gating=False)
        params = decoder.init(np.random.default_rng(1), config, np.float64)
        found, gradient = objective.loss_and_gradient(params, [Shard(tokens, targets)], config, goal)
        totals.append(float(found.total))
        router = params.blocks[0].moe.router.w_gate
        there = []
        for step in (1e-5, -1e-5):
            router[1, 4] += step
            there.append(float(objective.loss_and_gradient(params, [Shard(tokens, targets)], config, goal)[0].total))
            router[1, 4] -= step
        assert gradient.blocks[0].moe.router.w_gate[1, 4] == pytest.approx((there[0] - there[1]) / 2e-5, abs=1e-7)
    assert totals[0] > totals[1] + 0.1


def test_experts_that_are_all_alike_are_weighed_as_before(small: ModelConfig) -> None:
    assert moe.balance_weights(small) is None


# The facts that the rest of the package asks of experts


def test_the_stack_is_shorter_than_the_counts_and_its_weights_are_matrices_for_muon(rng: np.random.Generator) -> None:
    config = config_of()
    params, blank = zero_computation.init(rng, config), zero_computation.blank(config, np.zeros)
    assert [leaf.shape for leaf in tree.leaves(blank)] == [leaf.shape for leaf in tree.leaves(params)]
    assert [leaf.shape for leaf in tree.leaves(params)] == [(2, 4, 3), (2, 4, 3), (2, 3, 4)]
    assert (len(params.zero), len(params.copy)) == (1, 2)
    assert list(tree.marked(params, "matrices")) == [f"feed_forward.{name}" for name in swiglu.Experts._fields]
    assert tree.map(np.copy, params)[1:] == params[1:], "a copy keeps the kinds"
    state = optimizer.init(decoder.init(rng, config), TrainConfig())
    assert "blocks[0].moe.experts.feed_forward.w_up" in state


def test_what_is_counted_as_active_is_an_upper_bound(rng: np.random.Generator) -> None:
    of_one = 3 * 4 * 3
    assert zero_computation.active_parameters(config_of()) == 2 * of_one
    assert zero_computation.active_parameters(config_of(active_experts=4)) == 2 * of_one, "only two experts compute"
    config = config_of(experts=8)
    counts, plan = parameters.count(config), blueprint.of_config("", config)
    assert counts.experts == 2 * 5 * of_one
    assert counts.total - counts.active == 2 * 3 * of_one
    assert {part.name: (part.total, part.active) for part in plan.parts}["experts"] == (2 * 5 * of_one, 2 * 2 * of_one)
    params = decoder.init(rng, config)
    assert counts.total + counts.noise == tree.size(params)
    moments = sum(leaf.nbytes for leaf in tree.leaves(list(optimizer.init(params, TrainConfig()).values())))
    weights = sum(leaf.nbytes for leaf in tree.leaves(params))
    assert memory.training_bytes(config, TrainConfig()) == 2 * weights + moments


def test_a_dense_twin_has_ordinary_experts() -> None:
    tiny = presets.override(presets.preset("tiny"), {"expert_kind": "zero_computation"})
    twin = presets.dense_twin(tiny).config
    moe.check(twin)
    assert twin.expert_kind == "swiglu"
    assert parameters.count(twin).experts == tiny.config.layers * zero_computation.active_parameters(tiny.config)


def test_workers_never_own_a_part_of_such_experts(rng: np.random.Generator) -> None:
    recipe = TrainConfig(batch=8)
    for kind, owned in (("swiglu", True), ("zero_computation", False)):
        config = config_of(expert_kind=kind, experts=64, width=512, expert_width=512)
        assert exchange.worth_exchanging(config, recipe, 2) == owned
    params = drawn(rng)
    with pytest.raises(UserError, match="counts of 2 experts do not fit 2 SwiGLU, 1 zero and 2 copy experts"):
        zero_computation.forward(params, rng.standard_normal((4, 4)), [2, 2])


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_experts": 0, "copy_experts": 0},
        {"zero_experts": 3, "copy_experts": 2},
        {"zero_experts": 9, "copy_experts": 0},
        {"experts": 1, "active_experts": 1},
    ],
)
def test_a_layer_where_all_or_none_compute_is_refused_in_a_sentence(
    rng: np.random.Generator, changes: dict[str, int]
) -> None:
    config = config_of(**changes)
    for refusal in (moe.check, moe.check_forward, lambda config: decoder.init(rng, config)):
        with pytest.raises(
            UserError, match=r"zero_experts \d and copy_experts \d are \d of experts \d, but .*'swiglu'"
        ):
            refusal(config)
    moe.check(dataclasses.replace(config, expert_kind="swiglu", renormalize=False))


def test_the_model_cannot_be_written_as_a_mixtral() -> None:
    with pytest.raises(UserError, match="expert_kind 'zero_computation' cannot be written as a Mixtral"):
        huggingface_config.to_dict(config_of())


def test_a_text_is_written_as_the_whole_model_would(rng: np.random.Generator) -> None:
    """One token at a time with the cache, by ``decode``, gives the logits of the full pass."""
    config = config_of()
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    tokens = rng.integers(11, size=(1, 9))
    whole = decoder.forward(params, tokens, config)
    assert all(layer.assignments[2:].sum() > 0 for layer in whole.routed.stats), "some tokens need no expert"
    cache = kv_cache.init(params, config)
    for position in range(9):
        logits = generation.extend(params, cache, tokens[:, position : position + 1])[0]
        np.testing.assert_allclose(logits, whole.logits[0, position], atol=1e-12)


def test_the_experts_are_counted_with_adapters_too(rng: np.random.Generator) -> None:
    config = ModelConfig(experts=9, zero_experts=1, copy_experts=2, width=4, expert_width=3)
    params = zero_computation.init(rng, config, dtype=np.float64)
    stacks = (lora.init(rng, stack, 2, 1.0) for stack in params.feed_forward)
    adapted = params._replace(feed_forward=type(params.feed_forward)(*stacks))
    x, counts = rng.standard_normal((12, 4)), [2, 0, 3, 0, 0, 1, 2, 3, 1]
    ours, theirs = (zero_computation.forward(one, x, counts)[0] for one in (adapted, params))
    np.testing.assert_array_equal(ours, theirs)
