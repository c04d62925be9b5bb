"""Pruning: nothing removed changes nothing, the cache of outputs gives the error of the real layer, and the best
subset is the best by brute force."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_settings import SMALL, config_of

from minimoe.compression import prune
from minimoe.compression.prune import METHODS
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import reading
from minimoe.layers import decoder, moe, routing
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode

CONFIG = dataclasses.replace(SMALL, experts=5)
PRUNABLE = {
    "noisy_top_k": CONFIG,
    "noisy_top_k, all probabilities": dataclasses.replace(CONFIG, renormalize=False),
    "without noise": dataclasses.replace(CONFIG, noisy_gating=False),
    "switch": config_of("switch", {"active_experts": 1}, CONFIG),
    "gshard": config_of("gshard", {}, CONFIG),
    "expert_threshold": config_of("expert_threshold", {}, CONFIG),
    "sigmoid_bias": config_of("sigmoid_bias", {"shared_experts": 1}, CONFIG),
    "cosine": config_of("cosine", {}, CONFIG),
    "x-moe": config_of("cosine", {"cosine_form": "x-moe"}, CONFIG),
    "remoe": config_of("remoe", {}, CONFIG),
    "as wide as it has experts": dataclasses.replace(CONFIG, experts=8),
}


def drawn(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder in float64 whose routers are not nearly uniform, and whose states are no round numbers."""
    rng = np.random.default_rng(seed)
    params = decoder.init(rng, config, np.float64)
    return tree.map(lambda leaf: leaf + 0.3 * np.abs(rng.standard_normal(leaf.shape)) - 0.1 * (leaf.ndim > 1), params)


def sample(config: ModelConfig = CONFIG, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(config.vocab_size, size=(3, config.context))


def logits(params: Decoder, config: ModelConfig, tokens: Any, mode: Mode = reading.READING) -> Any:
    return decoder.forward(params, tokens, config, mode).logits


def layer_of(params: Decoder, config: ModelConfig, i: int) -> prune.Layer:
    return prune.run(params.blocks[i].moe, prune.inputs(params, config, sample(config))[i], sample(config), config)


@pytest.mark.parametrize("name", PRUNABLE)
@pytest.mark.parametrize("method", METHODS)
def test_pruning_nothing_changes_nothing_to_the_bit(name: str, method: str) -> None:
    config = PRUNABLE[name]
    params = drawn(config)
    done = prune.prune(params, config, sample(config), config.experts, method)
    assert done.config == config
    assert done.kept == [list(range(config.experts))] * config.layers
    for before, after in zip(tree.leaves(params), tree.leaves(done.params), strict=True):
        np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(logits(done.params, config, sample()), logits(params, config, sample()))
    assert done.errors == [0, 0]


@pytest.mark.parametrize("name", PRUNABLE)
def test_what_is_left_is_the_chosen_experts_and_their_columns(name: str) -> None:
    config = PRUNABLE[name]
    params = drawn(config)
    kept = [[0, 2, 4], [1, 2, 3]]
    after, smaller = prune.remove(params, config, kept)
    assert smaller == dataclasses.replace(config, experts=3)
    shapes = [leaf.shape for leaf in tree.leaves(decoder.blank(smaller, np.zeros))]
    assert [leaf.shape for leaf in tree.leaves(after)] == shapes
    for i, of_layer in enumerate(kept):
        was, now = params.blocks[i].moe, after.blocks[i].moe
        for before, left in zip(was.experts, now.experts, strict=True):
            np.testing.assert_array_equal(left, before[of_layer])
        leaves = zip(tree.named_leaves(was.router), tree.leaves(now.router), strict=True)
        for (field, before), left in leaves:
            if field in ("w_gate", "w_noise"):
                before = before[:, of_layer]
            elif field in ("threshold", "directions") or (field, config.router) == ("bias", "sigmoid_bias"):
                before = before[of_layer]
            np.testing.assert_array_equal(left, before, err_msg=field)
        assert (was.shared is None) == (now.shared is None)


def with_idle_expert(params: Decoder, config: ModelConfig) -> Decoder:
    """Nobody chooses expert 3: two experts have the logit v·x, two have −v·x, and expert 3 has 0."""
    for i, block in enumerate(params.blocks):
        if config.router == "sigmoid_bias":
            block.moe.router.bias[3] = -1e3
            continue
        v = np.random.default_rng(i).standard_normal((config.width, 1))
        block.moe.router.w_gate[:] = v * [1, 1, -1, 0, -1]
    return params


@pytest.mark.parametrize("name", ["noisy_top_k", "without noise", "gshard", "sigmoid_bias", "remoe"])
@pytest.mark.parametrize("method", ["reconstruction", "frequency"])
def test_removing_an_expert_that_nobody_chose_changes_nothing(name: str, method: str) -> None:
    """The other weights are shares of the chosen experts, or a number of each expert alone."""
    config = PRUNABLE[name]
    params = with_idle_expert(drawn(config), config)
    assert [layer_of(params, config, i).counts[3] for i in range(2)] == [0, 0]
    done = prune.prune(params, config, sample(), 4, method)
    assert done.kept == [[0, 1, 2, 4]] * 2
    np.testing.assert_allclose(done.errors, 0, atol=1e-12)
    fresh = sample(seed=7)
    before, after = logits(params, config, fresh), logits(done.params, done.config, fresh)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


def test_with_probabilities_of_all_experts_even_an_idle_expert_counts() -> None:
    """Its share of the softmax goes to the others, so their weights grow."""
    config = PRUNABLE["noisy_top_k, all probabilities"]
    params = with_idle_expert(drawn(config), config)
    done = prune.prune(params, config, sample(), 4, "frequency")
    assert done.kept == [[0, 1, 2, 4]] * 2
    assert min(done.errors) > 0.01


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_error_from_the_cache_is_that_of_the_real_layer(name: str) -> None:
    config = PRUNABLE[name]
    params = drawn(config)
    smaller = dataclasses.replace(config, experts=3)
    mode = Mode(labels=sample(config))
    for i, block in enumerate(params.blocks):
        layer = layer_of(params, config, i)
        whole = moe.forward(block.moe._replace(shared=None), layer.x, config, mode).y.reshape(-1, config.width)
        np.testing.assert_allclose(layer.y, whole, rtol=0, atol=1e-12)
        for kept in itertools.combinations(range(config.experts), 3):
            pruned, _ = prune.remove(params, config, [kept] * config.layers)
            alone = pruned.blocks[i].moe._replace(shared=None)
            there = moe.forward(alone, layer.x, smaller, mode).y.reshape(-1, config.width)
            expected = math.sqrt(float(((there - whole) ** 2).sum()))
            np.testing.assert_allclose(prune.error(block.moe, layer, config, kept), expected, rtol=1e-10, atol=1e-12)


def test_each_layer_is_chosen_on_its_own_input() -> None:
    """The input of a mixture is the normalised residual stream after the attention of its own block."""
    params, tokens = drawn(CONFIG), sample()
    found = prune.inputs(params, CONFIG, tokens)
    seen: list[Any] = []
    decoder.hidden(params, tokens, CONFIG, reading.READING, keep=lambda cache: seen.append(cache.moe))
    for x, cache in zip(found, seen, strict=True):
        order = np.argsort(cache.routing.token, kind="stable")
        rows = cache.experts.x[order][:: CONFIG.active_experts]  # each token's row, once
        np.testing.assert_array_equal(x.reshape(-1, CONFIG.width), rows)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_a_long_sample_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    params, tokens = drawn(CONFIG), sample()
    at_once = prune.inputs(params, CONFIG, tokens)
    monkeypatch.setattr(reading, "TOKENS", 6)
    for one, other in zip(prune.inputs(params, CONFIG, tokens), at_once, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**16), keep=st.integers(2, 5))
def test_reconstruction_finds_the_best_subset(seed: int, keep: int) -> None:
    params = drawn(CONFIG, seed)
    done = prune.prune(params, CONFIG, sample(seed=seed), keep)
    for i, block in enumerate(params.blocks):
        layer = prune.run(block.moe, prune.inputs(params, CONFIG, sample(seed=seed))[i], sample(seed=seed), CONFIG)
        by_subset = {
            kept: prune.error(block.moe, layer, CONFIG, kept) for kept in itertools.combinations(range(5), keep)
        }
        assert done.kept[i] == list(min(by_subset, key=lambda kept: by_subset[kept]))
        np.testing.assert_allclose(done.errors[i], min(by_subset.values()) / np.linalg.norm(layer.y))
        own = block.moe.experts.w_up[done.kept[i]]  # each layer loses experts of its own
        np.testing.assert_array_equal(done.params.blocks[i].moe.experts.w_up, own)
        other = prune.prune(params, CONFIG, sample(seed=seed), keep, "random", seed)
        assert done.errors[i] <= other.errors[i]


def test_frequency_keeps_the_experts_that_are_used_most_and_the_first_of_equals() -> None:
    layer = layer_of(drawn(CONFIG), CONFIG, 0)._replace(counts=[3, 9, 3, 0, 9])
    rng = np.random.default_rng(0)
    for keep, expected in ((2, [1, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4])):
        assert prune.choose(drawn(CONFIG).blocks[0].moe, layer, CONFIG, keep, "frequency", rng) == expected


def test_a_layer_counts_how_often_each_expert_was_chosen() -> None:
    params = drawn(CONFIG)
    routed = decoder.forward(params, sample(), CONFIG, reading.READING).routed
    for i, stats in enumerate(routed.stats):
        assert layer_of(params, CONFIG, i).counts == stats.assignments.tolist()


def test_random_takes_every_expert_equally_often_and_repeats_with_its_seed() -> None:
    layer, block = layer_of(drawn(CONFIG), CONFIG, 0), drawn(CONFIG).blocks[0].moe
    rng = np.random.default_rng(0)
    drawn_sets = [prune.choose(block, layer, CONFIG, 3, "random", rng) for _ in range(1000)]
    assert all(kept == sorted(set(kept)) and len(kept) == 3 for kept in drawn_sets)
    counts = np.bincount(np.concatenate(drawn_sets), minlength=5)
    assert np.abs(counts - 600).max() < 80  # five standard deviations
    one, same, other = (prune.prune(drawn(CONFIG), CONFIG, sample(), 3, "random", seed).kept for seed in (1, 1, 3))
    assert one == same != other


@pytest.mark.parametrize("name", ["noisy_top_k", "gshard", "sigmoid_bias", "cosine", "token_hash"])
def test_skipping_is_a_loop_over_tokens(name: str) -> None:
    config = PRUNABLE.get(name) or config_of("token_hash", {"hash_gate": True}, CONFIG)
    params, tokens = drawn(config), sample()
    betas = prune.median_ratios(params, config, tokens)
    for block, x, beta in zip(params.blocks, prune.inputs(params, config, tokens), betas, strict=True):
        mode = Mode(labels=tokens)
        alone = block.moe._replace(shared=None)
        made = moe.router_of(config).forward(alone.router, x, config, mode)[0]
        outputs = prune.run(alone, x, tokens, config).outputs
        experts, weights = routing.experts_by_token(made), routing.by_token(made.weight, made.place)
        y = moe.forward(alone, x, config, mode._replace(skip_below=[beta])).y.reshape(-1, config.width)
        alone_count = 0
        for t, ((a, b), (first, second)) in enumerate(zip(experts, weights, strict=True)):
            if second < beta * first:
                alone_count += 1
                expected = (first + second) * outputs[a, t]
            else:
                expected = first * outputs[a, t] + second * outputs[b, t]
            np.testing.assert_allclose(y[t], expected, rtol=0, atol=1e-12)
        assert abs(alone_count - tokens.size / 2) <= 1  # β is a median


def test_each_layer_skips_by_its_own_ratio() -> None:
    params, tokens = drawn(CONFIG), sample()
    betas = prune.median_ratios(params, CONFIG, tokens)
    assert betas[0] != betas[1]
    done = logits(params, CONFIG, tokens, Mode(skip_below=[0.0, 0.0]))
    np.testing.assert_allclose(done, logits(params, CONFIG, tokens), rtol=0, atol=1e-12)
    first, second = (logits(params, CONFIG, tokens, Mode(skip_below=only)) for only in ([2.0, 0.0], [0.0, 2.0]))
    hidden = [decoder.hidden(params, tokens, CONFIG, Mode(skip_below=[0.0, 2.0]), keep=lambda c: c.moe).blocks]
    assert [sum(cache.routing.counts) for cache in hidden[0]] == [2 * tokens.size, tokens.size]
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "keep", "method", "words"),
    [
        ({}, 1, "frequency", "keep 1 is not possible: .* choose a number from 2 to 5"),
        ({}, 6, "frequency", "keep 6 is not possible"),
        ({}, 3, "best", "there is no method 'best': choose one of reconstruction, frequency, random"),
        ({"router": "token_hash"}, 3, "frequency", "fixed table, from which none can be removed"),
        ({"expert_kind": "zero_computation"}, 3, "frequency", "not alike"),
        (
            {"router": "sigmoid_bias", "experts": 6, "expert_groups": 3, "active_groups": 2},
            3,
            "frequency",
            "3 groups of equal size",
        ),
        ({"experts": 24}, 12, "reconstruction", "2,704,156 ways, and at most 20,000 are compared"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_a_sentence(
    changes: dict[str, Any], keep: int, method: str, words: str
) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=words):
        prune.prune(decoder.init(np.random.default_rng(0), config), config, sample(), keep, method)


def test_a_sample_that_the_model_cannot_read_is_refused() -> None:
    params = drawn(CONFIG)
    for tokens in (sample() + 5, sample()[0], sample() + 0.5, sample()[:0]):
        with pytest.raises(UserError, match="not in a vocabulary|ids of the sample|sample is empty"):
            prune.prune(params, CONFIG, tokens, 3)
        with pytest.raises(UserError, match="not in a vocabulary|ids of the sample|sample is empty"):
            prune.median_ratios(params, CONFIG, tokens)


@pytest.mark.parametrize(
    "changes", [{"active_experts": 3}, {"router": "switch", "active_experts": 1}, {"router": "remoe"}]
)
def test_a_model_without_a_second_expert_skips_nothing(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match="does not have two experts"):
        prune.median_ratios(drawn(config), config, sample())


def test_a_layer_that_answers_nothing_has_no_error() -> None:
    params = drawn(CONFIG)
    for block in params.blocks:
        block.moe.experts.w_down[:] = 0
    assert prune.prune(params, CONFIG, sample(), 3).errors == [0, 0]


def test_a_dense_layer_stays_as_it_is() -> None:
    config = dataclasses.replace(CONFIG, layers=3, dense_layers=1)
    params = drawn(config)
    layers: list[int] = []
    done = prune.prune(params, config, sample(), 3, report=layers.append)
    assert layers == [1, 2]
    assert len(done.kept) == len(done.errors) == 2
    for before, after in zip(tree.leaves(params.blocks[0]), tree.leaves(done.params.blocks[0]), strict=True):
        np.testing.assert_array_equal(after, before)
    for i, kept in enumerate(done.kept, 1):
        own = params.blocks[i].moe.experts.w_up[kept]
        np.testing.assert_array_equal(done.params.blocks[i].moe.experts.w_up, own)
    assert np.isfinite(logits(done.params, done.config, sample())).all()
    betas = prune.median_ratios(params, config, sample())
    assert betas[0] == 0 < min(betas[1:])
    skipped = logits(params, config, sample(), Mode(skip_below=betas))
    assert np.abs(skipped - logits(params, config, sample())).max() > 1e-6


def test_progress_is_reported_by_layer() -> None:
    seen: list[int] = []
    prune.prune(drawn(CONFIG), CONFIG, sample(), 3, report=seen.append)
    assert seen == [0, 1]
