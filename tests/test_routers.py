"""What every router is held to, whoever adds it: causality, shards, caches, resumed runs, and inputs at the edge."""

import dataclasses
from pathlib import Path

import numpy as np
import on_devices
import pytest
import small_runs
import strict_cupy
from router_settings import CONFIGS
from small_models import EVERY_LOSS

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder, moe
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routing import experts_by_token
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard

CAUSAL = {name: config for name, config in CONFIGS.items() if config.router in moe.causal_routers()}
every_router = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_causal_router = pytest.mark.parametrize("config", CAUSAL.values(), ids=CAUSAL)

GOAL = Objective(EVERY_LOSS)


def params_of(rng: np.random.Generator, config: ModelConfig) -> decoder.Decoder:
    """A float64 decoder away from the special values that it starts at."""
    fresh = decoder.init(rng, config, np.float64, look_ahead=True)
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), fresh)


def batch_of(rng: np.random.Generator, config: ModelConfig, sequences: int = 5) -> Shard:
    tokens, targets = rng.integers(config.vocab_size, size=(2, sequences, config.context))
    noise = decoder.draw_noise(rng, config, sequences, config.context, np.float64)
    mask = np.ones(tokens.shape)
    mask[-1, -3:] = 0
    return Shard(tokens, targets, noise, mask)


def rows_of(batch: Shard, rows: slice) -> Shard:
    assert batch.mask is not None
    noise = None if batch.noise is None else batch.noise[:, rows]
    return Shard(batch.tokens[rows], batch.targets[rows], noise, batch.mask[rows])


# Who looks ahead


@pytest.mark.parametrize("training", [False, True])
@every_router
def test_only_a_router_that_says_so_lets_the_last_token_change_an_earlier_logit(
    config: ModelConfig, training: bool
) -> None:
    """Many draws, because a router that ranks tokens against each other often keeps its order by chance."""
    moved = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        params, batch = params_of(rng, config), batch_of(rng, config, sequences=2)
        mode = Mode(True, batch.noise, 1.0) if training else EVALUATION
        before = decoder.forward(params, batch.tokens, config, mode).logits[:, :-1]
        batch.tokens[:, -1] = (batch.tokens[:, -1] + rng.integers(1, config.vocab_size, 2)) % config.vocab_size
        after = decoder.forward(params, batch.tokens, config, mode).logits[:, :-1]
        moved += not np.allclose(before, after, rtol=0, atol=1e-12)
    assert (moved > 0) == (config.router not in moe.causal_routers())


@every_router
def test_a_language_model_refuses_a_router_that_looks_ahead(config: ModelConfig, rng: np.random.Generator) -> None:
    if config.router in moe.causal_routers():
        decoder.check(config)
        decoder.init(rng, config)
        return
    for refusal in (lambda: decoder.check(config), lambda: decoder.init(rng, config)):
        with pytest.raises(UserError, match=f"router '{config.router}' looks at later tokens") as caught:
            refusal()
        assert "noisy_top_k" in str(caught.value)
    moe.check(config)


@every_causal_router
def test_a_text_is_written_as_the_whole_model_would(config: ModelConfig, rng: np.random.Generator) -> None:
    """With the cache: in pieces of several tokens, and in the fast form for one token."""
    params = params_of(rng, config)
    tokens = rng.integers(config.vocab_size, size=(1, config.context))
    whole = decoder.forward(params, tokens, config).logits[0]
    cache = kv_cache.init(params, config)
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 7)):
        np.testing.assert_allclose(
            generation.extend(params, cache, tokens[:, start:stop])[0], whole[stop - 1], atol=1e-9
        )


# Shards and state


@every_router
def test_a_batch_in_one_piece_is_the_same_batch_in_pieces(config: ModelConfig, rng: np.random.Generator) -> None:
    params, batch = params_of(rng, config), batch_of(rng, config)
    for goal in (GOAL, GOAL._replace(capacity_factor=0.8)):
        whole = objective.loss_and_gradient(params, [batch], config, goal)
        pieces = [rows_of(batch, rows) for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
        split = objective.loss_and_gradient(params, pieces, config, goal)
        again = objective.loss_and_gradient(params, pieces, config, goal, recompute=True)
        for other in (split, again):
            compared = [(totals.total, totals.stats, gradient) for totals, gradient in (whole, other)]
            on_devices.assert_equal(*compared, 1e-11)
        states = [tree.map(np.copy, params) for _ in range(2)]
        for state, (totals, _) in zip(states, (whole, split), strict=True):
            moe.update_state([block.moe for block in state.blocks], totals.stats, config, TrainConfig())
        on_devices.assert_equal(*states, 1e-12)


@every_router
def test_only_the_state_has_no_gradient_and_only_the_update_changes_it(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, batch = params_of(rng, config), batch_of(rng, config)
    totals, gradient = objective.loss_and_gradient(params, [batch], config, GOAL)
    state = set(tree.marked(params, "state"))
    named = dict(tree.named_leaves(gradient))
    assert all(not named[name].any() for name in state)
    after = tree.map(np.copy, params)
    moe.update_state([block.moe for block in after.blocks], totals.stats, config, TrainConfig())
    changed = {
        name
        for (name, old), new in zip(tree.named_leaves(params), tree.leaves(after), strict=True)
        if (old != new).any()
    }
    assert changed <= state
    assert bool(changed) == bool(state)


@every_causal_router
def test_a_run_that_was_resumed_is_the_run_that_was_not(config: ModelConfig, tmp_path: Path) -> None:
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("vocab_size", "width", "heads", "kv_heads", "head_width", "context", "expert_width")
    }
    whole = small_runs.train(tmp_path / "whole", **changed)
    small_runs.train(tmp_path / "part", steps=2, **changed)
    small_runs.resume(tmp_path / "part", steps=whole.model.run.recipe.steps)
    one, other = small_runs.lasting(tmp_path / "whole"), small_runs.lasting(tmp_path / "part")
    assert {**one, "metrics": None} == {**other, "metrics": None}, "the part has one evaluation more"


# The edge


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("training", [False, True])
@every_router
def test_extreme_equal_and_zero_inputs_give_finite_numbers(config: ModelConfig, experts: int, training: bool) -> None:
    """Logits of ±1e4, ties everywhere, zero vectors, every expert active, one expert."""
    rng = np.random.default_rng(0)
    active = 1 if config.active_experts == 1 else experts
    renormalize = config.renormalize and (active > 1 or experts == 1)
    sizes = dataclasses.replace(config, experts=experts, active_experts=active, renormalize=renormalize)
    try:
        moe.check(sizes)
    except UserError:
        pytest.skip("the router refuses these sizes")
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), moe.init(rng, sizes, dtype=np.float64))
    x = rng.standard_normal((2, 5, sizes.width))
    labels = rng.integers(sizes.vocab_size, size=(2, 5))
    for scaled in (x, 1e4 * x, 0 * x, x[:, :1].repeat(5, axis=1)):
        noise = moe.router_of(sizes).draw_noise(rng, sizes, (2, 5), np.float64) if training else None
        mode = Mode(training, noise, balance_by_sequence=True, labels=labels)
        with np.errstate(all="raise", under="ignore"):
            result = moe.forward(params, scaled, sizes, mode)
            dstats = tree.map(lambda leaf: np.ones_like(np.asarray(leaf, float)), result.stats)
            dx, gradient = moe.backward(params, result.cache, np.ones_like(x), dstats)
        assert all(np.isfinite(leaf).all() for leaf in tree.leaves((result.y, dx, gradient, result.stats[1:])))
        assert result.y.shape == x.shape
        chosen = experts_by_token(result.cache.routing)
        assert ((chosen >= -1) & (chosen < experts)).all()
        assert all(len({e for e in row if e >= 0}) == sum(e >= 0 for e in row) for row in chosen.tolist())


@every_router
def test_the_sums_over_no_tokens_are_zero(config: ModelConfig, rng: np.random.Generator) -> None:
    params, batch = params_of(rng, config), batch_of(rng, config)
    assert batch.mask is not None
    empty = batch._replace(mask=np.zeros_like(batch.mask))
    totals, gradient = objective.loss_and_gradient(params, [empty], config, GOAL)
    assert float(totals.total) == 0
    assert not any(leaf.any() for leaf in tree.leaves(gradient))


@every_router
def test_the_numbers_follow_the_dtype_and_the_device(
    config: ModelConfig, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the whole model on the strict stand-in for CuPy is the one on NumPy, in float32."""
    params = tree.map(lambda leaf: leaf.astype(np.float32), params_of(rng, config))
    batch = batch_of(rng, config)
    noise = None if batch.noise is None else batch.noise.astype(np.float32)
    here = objective.loss_and_gradient(params, [batch._replace(noise=noise)], config, GOAL)
    assert {leaf.dtype for leaf in tree.leaves(here[1])} == {np.dtype(np.float32)}
    strict_cupy.install(monkeypatch)
    move = on_devices.mover("gpu", np.float32)
    shard = Shard(*(None if part is None else move(part) for part in batch))
    there = objective.loss_and_gradient(move(params), [shard], config, GOAL)
    on_devices.assert_equal((here[0].total, here[1]), (there[0].total, there[1]), 1e-5)


@every_router
def test_only_a_router_that_says_so_gives_a_token_more_than_k_experts(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    """Workers that exchange rows reserve memory for this many."""
    params = tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape), moe.init(rng, config, dtype=np.float64))
    labels = rng.integers(config.vocab_size, size=(4, config.context))
    routing = moe.forward(
        params, rng.standard_normal((*labels.shape, config.width)), config, Mode(labels=labels)
    ).cache.routing
    most = (experts_by_token(routing) >= 0).sum(1).max()
    assert most <= moe.most_experts(config)
    assert (most > config.active_experts) <= getattr(moe.router_of(config), "VARIES", False)
