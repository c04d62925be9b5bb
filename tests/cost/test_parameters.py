"""Counts of parameters: the numbers that were published, and those of a real decoder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig
from minimoe.cost import parameters
from minimoe.layers import decoder


def test_mixtral_8x7b_has_the_parameters_it_was_published_with() -> None:
    counts = parameters.count(presets.preset("mixtral-8x7b").config)
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248
    assert counts.attention == 32 * 41_943_040
    assert counts.experts == 32 * 8 * 176_160_768
    assert counts.router == 32 * 32_768
    assert counts.norms == 32 * 8_192 + 4_096
    assert counts.embedding == counts.head == 131_072_000
    assert counts.noise == 0
    assert counts.experts / counts.total == pytest.approx(0.9656, abs=5e-5)


def test_mixtral_8x22b_has_the_parameters_it_was_published_with() -> None:
    shape = {"width": 6144, "layers": 56, "heads": 48, "expert_width": 16_384}
    counts = parameters.count(presets.override(presets.preset("mixtral-8x7b"), shape).config)
    assert (counts.total, counts.active) == (140_620_634_112, 39_152_031_744)


CONFIGS = st.builds(
    lambda groups, kv_heads, half_width, experts, share, mixtures, dense_layers, **sizes: ModelConfig(
        layers=dense_layers + mixtures,
        dense_layers=dense_layers,
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        head_width=2 * half_width,
        experts=experts,
        active_experts=max(1, round(share * experts)),
        renormalize=False,
        **sizes,
    ),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    half_width=st.integers(1, 3),
    experts=st.integers(1, 5),
    share=st.floats(0, 1),
    vocab_size=st.integers(1, 9),
    width=st.integers(1, 9),
    mixtures=st.integers(1, 3),
    expert_width=st.integers(1, 9),
    shared_experts=st.integers(0, 3),
    dense_layers=st.integers(0, 2),
    dense_width=st.none() | st.integers(1, 9),
    qk_norm=st.sampled_from(["none", "whole", "per_head"]),
    noisy_gating=st.booleans(),
    tied_embeddings=st.booleans(),
)


@given(CONFIGS)
def test_the_counts_are_those_of_a_real_decoder(config: ModelConfig) -> None:
    params = decoder.init(np.random.default_rng(0), config)
    counts = parameters.count(config)
    assert counts.total + counts.noise == tree.size(params)
    assert counts.embedding == tree.size(params.embedding)
    dense, mixtures = params.blocks[: config.dense_layers], params.blocks[config.dense_layers :]
    assert counts.attention == sum(tree.size(layer.attention[:4]) for layer in params.blocks)
    assert counts.experts == sum(tree.size(layer.moe.experts) for layer in mixtures)
    assert counts.shared_experts == sum(tree.size(layer.moe.shared) for layer in mixtures)
    assert counts.dense_layers == sum(tree.size(layer.moe) for layer in dense)
    assert counts.shared_experts * config.experts == config.shared_experts * counts.experts
    assert counts.router == sum(layer.moe.router.w_gate.size for layer in mixtures)
    assert counts.norms == sum(leaf.size for name, leaf in tree.named_leaves(params) if name.endswith("gain"))
    assert counts.head == tree.size(params.head)
    assert counts.noise == sum(tree.size(layer.moe.router.w_noise) for layer in mixtures)
    idle = counts.experts * (config.experts - config.active_experts) // config.experts
    assert counts.active == counts.total - idle
    assert parameters.by_muon(config) == (
        counts.attention + counts.experts + counts.shared_experts + counts.dense_layers
    )
    assert parameters.state(config) == 0


def test_only_the_routers_that_there_are_have_a_state() -> None:
    config = ModelConfig(router="sigmoid_bias", layers=5, dense_layers=2, experts=6)
    assert parameters.state(config) == 3 * 6
