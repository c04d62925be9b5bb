"""The whole model: every gradient, no look into the future, and each setting where it belongs."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.presets import PRESETS
from minimoe.layers import block, decoder, dense, rmsnorm, rope
from minimoe.layers.attention import KeyValues
from minimoe.layers.linear import Linear
from minimoe.layers.mode import Mode
from minimoe.losses import cross_entropy
from minimoe.proof.gradcheck import check_decoder, failed


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"window": 3, "tied_embeddings": True},
        {"renormalize": False, "active_experts": 1, "kv_heads": 1},
        {"active_experts": 5, "kv_heads": 4, "layers": 1},
        {"noisy_gating": False, "experts": 1, "active_experts": 1},
        {"layers": 3, "dense_layers": 1, "dense_width": 4, "qk_norm": "whole"},
    ],
    ids=["plain", "window-tied", "top-1", "all-experts", "one-expert", "first-dense"],
)
def test_gradient_of_the_training_loss_is_right(
    rng: np.random.Generator, small: ModelConfig, change: dict[str, Any], capacity_factor: float | None
) -> None:
    config = dataclasses.replace(small, **change)
    rows = check_decoder("decoder", config, rng, capacity_factor=capacity_factor, padding=1, entries=2)
    assert failed(rows) == []
    assert len(rows) == len(tree.leaves(decoder.init(rng, config))), "every parameter has its row"


def test_a_tied_table_gets_the_gradients_of_both_its_uses(rng: np.random.Generator, small: ModelConfig) -> None:
    tied = dataclasses.replace(small, tied_embeddings=True)
    params = drawn(rng, tied)
    untied = params._replace(head=Linear(params.embedding.table.T.copy()))
    tokens, dlogits = rng.integers(13, size=(2, 7)), rng.standard_normal((2, 7, 13))
    logits, _, cache = decoder.forward(params, tokens, tied)
    same, _, untied_cache = decoder.forward(untied, tokens, small)
    assert params.head is None
    np.testing.assert_allclose(logits, same, atol=1e-13)
    apart = decoder.backward(untied, untied_cache, dlogits)
    assert apart.head is not None
    together = decoder.backward(params, cache, dlogits).embedding.table
    np.testing.assert_allclose(together, apart.embedding.table + apart.head.weight.T, atol=1e-12)


@given(later=st.integers(1, 6), capacity_factor=st.none() | st.sampled_from([0.3, 0.7]), seed=st.integers(0, 99))
def test_a_later_token_changes_nothing_earlier(
    small: ModelConfig, later: int, capacity_factor: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    params, tokens = drawn(rng, small), rng.integers(13, size=(1, 7))
    other = tokens.copy()
    other[0, later] = (tokens[0, later] + 1) % 13
    before, _, _ = decoder.forward(params, tokens, small, Mode(capacity_factor=capacity_factor))
    after, _, _ = decoder.forward(params, other, small, Mode(capacity_factor=capacity_factor))
    np.testing.assert_allclose(after[:, :later], before[:, :later], atol=1e-12)
    assert (abs(after[:, later] - before[:, later]) > 1e-6).any(), "but it changes what follows from it"


def test_two_evaluations_are_equal_to_the_bit(rng: np.random.Generator, small: ModelConfig) -> None:
    params, tokens = drawn(rng, small), rng.integers(13, size=(2, 7))
    first, routed, _ = decoder.forward(params, tokens, small)
    second, _, _ = decoder.forward(params, tokens, small)
    assert (first == second).all()
    assert routed.dropped == [0, 0]


def test_dense_layers_come_first_and_report_nothing(rng: np.random.Generator, small: ModelConfig) -> None:
    config = dataclasses.replace(small, layers=4, dense_layers=2, dense_width=4)
    params, tokens = drawn(rng, config), rng.integers(13, size=(2, 7))
    assert [dense.is_dense(of.moe) for of in params.blocks] == [True, True, False, False]
    assert decoder.mixtures(params) == [of.moe for of in params.blocks[2:]]
    _, routed, cache = decoder.forward(params, tokens, config)
    assert (len(routed.stats), routed.dropped) == (2, [0, 0])
    assert [of.moe.router is None for of in decoder.blank(config, np.zeros).blocks] == [True, True, False, False]
    # What the losses say about a router reaches that router: the sums are those of the last two layers.
    nothing = [tree.map(np.zeros_like, stats) for stats in routed.stats]
    for layer in (0, 1):
        dstats = list(nothing)
        dstats[layer] = nothing[layer]._replace(squared_lse=np.array(1.0))
        gradient = decoder.backward(params, cache, np.zeros((2, 7, 13)), dstats)
        moved = [bool(of.router.w_gate.any()) for of in decoder.mixtures(gradient)]
        assert moved == [True, layer == 1], "a gradient also reaches the layers before"


def test_every_layer_has_noise_of_its_own(rng: np.random.Generator, small: ModelConfig) -> None:
    params, tokens = drawn(rng, small), rng.integers(13, size=(2, 7))
    noise = rng.standard_normal((2, 2, 7, 5))
    _, routed, _ = decoder.forward(params, tokens, small, Mode(noise=noise))
    noise[1] = -noise[1]
    _, other, _ = decoder.forward(params, tokens, small, Mode(noise=noise))
    assert (routed.stats[0].importance == other.stats[0].importance).all()
    assert (routed.stats[1].importance != other.stats[1].importance).any()


def test_position_matters_by_rope_alone(rng: np.random.Generator, small: ModelConfig) -> None:
    """A sequence of one token repeated: its logits differ by nothing but what attention sees, which is all the same."""
    params = drawn(rng, small)
    logits, _, _ = decoder.forward(params, np.full((1, 7), 3), small)
    np.testing.assert_allclose(logits[0, 1:], logits[0, :1].repeat(6, axis=0), atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_tokens_behind_a_cache_stand_at_their_own_positions(
    rng: np.random.Generator, small: ModelConfig, cut: int, window: int | None
) -> None:
    config = dataclasses.replace(small, window=window)
    params, tokens = drawn(rng, config), rng.integers(13, size=(2, 7))
    whole, _, _ = decoder.forward(params, tokens, config)
    first, _, cache = decoder.forward(params, tokens[:, :cut], config)
    past = [KeyValues(layer.attention.attended.k, layer.attention.attended.v) for layer in cache.blocks]
    second, _, _ = decoder.forward(params, tokens[:, cut:], config, past=past, position=cut)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-12)


def test_a_fresh_model_is_nearly_indifferent(small: ModelConfig) -> None:
    config = dataclasses.replace(small, width=64)
    logits, _, _ = decoder.forward(decoder.init(np.random.default_rng(0), config), np.arange(7)[None], config)
    assert logits.dtype == np.float32
    assert logits.shape == (1, 7, 13)
    assert 0.01 < logits.std() < 0.5


@pytest.mark.parametrize("preset", ["tiny", "toy"])
@pytest.mark.parametrize(("tied", "far"), [(False, 0.25), (True, 0.5)])
def test_at_first_the_loss_is_near_ln_v_and_every_expert_has_its_fair_share(
    preset: str, tied: bool, far: float
) -> None:
    """Nothing is known about the next token, and no expert is preferred by all tokens.

    A tied table starts so small that attention, an average over earlier tokens, makes neighbours alike: they choose
    alike too, so the shares of experts spread twice as ``far``.
    """
    config = dataclasses.replace(PRESETS[preset].config, tied_embeddings=tied)
    rng = np.random.default_rng(0)
    params = decoder.init(rng, config)
    tokens, targets = rng.integers(config.vocab_size, size=(2, 16, config.context))
    noise = rng.standard_normal((config.layers, *tokens.shape, config.experts)).astype("f")
    logits, routed, _ = decoder.forward(params, tokens, config, Mode(noise=noise))
    loss, _ = cross_entropy.forward(logits, targets)
    assert abs(loss.total / loss.tokens - math.log(config.vocab_size)) < 0.05
    for stats in routed.stats:
        fair = stats.tokens * config.active_experts / config.experts
        np.testing.assert_allclose(stats.assignments, fair, rtol=far)
        np.testing.assert_allclose(stats.load, fair, rtol=far)
        assert stats.entropy / stats.tokens == pytest.approx(math.log(config.experts), abs=0.05)


def test_it_is_embedding_blocks_norm_and_head_with_the_settings_of_the_config(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    config = dataclasses.replace(small, rope_theta=100.0, norm_eps=0.1, window=3, renormalize=False)
    params, tokens = drawn(rng, config), rng.integers(13, size=(2, 5))
    rotation = rope.init(np.arange(5), 8, 100.0, np.float64)
    x = params.embedding.table[tokens]
    for layer in params.blocks:
        x, _, _, _ = block.forward(layer, x, rotation, config)
    x, _ = rmsnorm.forward(params.norm, x, 0.1)
    assert params.head is not None
    logits, routed, _ = decoder.forward(params, tokens, config)
    np.testing.assert_allclose(logits, x @ params.head.weight, atol=1e-12)
    assert [stats.tokens for stats in routed.stats] == [10, 10]


@pytest.mark.parametrize(
    "change",
    [{}, {"tied_embeddings": True, "noisy_gating": False}, {"kv_heads": 4, "experts": 1, "active_experts": 1}],
    ids=["plain", "tied, without noise", "multi-head, dense"],
)
def test_a_blank_has_the_names_and_shapes_of_a_fresh_model(small: ModelConfig, change: dict[str, Any]) -> None:
    config = dataclasses.replace(small, **change)
    fresh, blank = decoder.init(np.random.default_rng(0), config), decoder.blank(config, np.zeros)
    shapes = [(name, leaf.shape) for name, leaf in tree.named_leaves(fresh)]
    assert [(name, leaf.shape) for name, leaf in tree.named_leaves(blank)] == shapes
    assert type(blank.blocks[0]) is type(fresh.blocks[0])


def test_the_noise_of_a_step_has_a_number_for_every_logit_of_every_router(small: ModelConfig) -> None:
    noise = decoder.draw_noise(np.random.default_rng(0), small, 3, 7, "float32")
    assert noise is not None
    assert (noise.shape, noise.dtype) == ((2, 3, 7, 5), np.float32)
    assert len(np.unique(noise)) == noise.size, "each drawn for itself"
    silent = dataclasses.replace(small, noisy_gating=False)
    assert decoder.draw_noise(np.random.default_rng(0), silent, 3, 7, "float32") is None


def test_a_router_that_looks_ahead_is_refused_unless_asked_for(rng: np.random.Generator, small: ModelConfig) -> None:
    ahead = dataclasses.replace(small, router="expert_choice")
    for refused in (lambda: decoder.check(ahead), lambda: decoder.init(rng, ahead)):
        with pytest.raises(UserError, match="router 'expert_choice' looks at later tokens"):
            refused()
    assert decoder.init(rng, ahead, look_ahead=True).norm.gain.size == small.width


def test_the_labels_of_a_router_are_the_tokens_unless_others_are_given(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    config = dataclasses.replace(small, router="token_hash", noisy_gating=False, hash_gate=True)
    params = drawn(rng, config)
    tokens, labels = rng.integers(config.vocab_size, size=(2, 2, 7))
    logits = decoder.forward(params, tokens, config).logits
    assert (logits == decoder.forward(params, tokens, config, Mode(labels=tokens)).logits).all()
    assert (logits != decoder.forward(params, tokens, config, Mode(labels=labels)).logits).any()
