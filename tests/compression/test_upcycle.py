"""Upcycling: the mixture computes what the dense model did; its router gets no gradient until the experts part."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import assert_close, drawn

from minimoe.compression import upcycle, vectors
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.losses import objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard

DENSE = ModelConfig(
    vocab_size=7,
    width=4,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=2,
    context=5,
    experts=1,
    active_experts=1,
    expert_width=6,
    noisy_gating=False,
)


def logits(params: Decoder, config: ModelConfig, tokens: Any, mode: Mode | None = None) -> np.ndarray:
    return decoder.forward(params, tokens, config, mode or Mode()).logits


@given(
    experts=st.integers(1, 4), active=st.integers(1, 4), granularity=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99)
)
def test_an_upcycled_model_computes_what_the_dense_one_did(
    experts: int, active: int, granularity: int, seed: int
) -> None:
    """To rounding, for any router."""
    active = min(active, experts)
    if active * granularity == 1 and experts > 1:
        return  # refused: see below
    rng = np.random.default_rng(seed)
    dense, tokens = drawn(rng, DENSE), rng.integers(7, size=(2, 5))
    config = upcycle.config_of(DENSE, experts, active, granularity)
    assert (config.experts, config.active_experts) == (experts * granularity, active * granularity)
    params = upcycle.upcycle(rng, dense, config, granularity)
    shapes = [leaf.shape for leaf in tree.leaves(decoder.blank(config, np.empty))]
    assert [leaf.shape for leaf in tree.leaves(params)] == shapes
    np.testing.assert_allclose(logits(params, config, tokens), logits(dense, DENSE, tokens), atol=1e-11)
    for block in params.blocks:  # another router: still the same
        w = rng.standard_normal((4, experts))
        block.moe.router.w_gate[...] = np.repeat(w, granularity, axis=1)
    np.testing.assert_allclose(logits(params, config, tokens), logits(dense, DENSE, tokens), atol=1e-11)


def test_the_noise_of_training_changes_nothing_either(rng: np.random.Generator) -> None:
    dense, tokens = drawn(rng, DENSE), rng.integers(7, size=(2, 5))
    config = upcycle.config_of(DENSE, 4, 2, noisy_gating=True)
    params = upcycle.upcycle(rng, dense, config)
    noise = decoder.draw_noise(rng, config, 2, 5, np.float64)
    assert noise is not None
    seen = logits(params, config, tokens, Mode(True, noise))
    np.testing.assert_allclose(seen, logits(dense, DENSE, tokens), atol=1e-11)


@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_without_renormalising_it_is_exact_at_a_zero_router(
    rng: np.random.Generator, granularity: int, active: int
) -> None:
    dense, tokens = drawn(rng, DENSE), rng.integers(7, size=(2, 5))
    config = upcycle.config_of(DENSE, 4, active, granularity, renormalize=False)
    params = upcycle.upcycle(rng, dense, config, granularity)
    exact, near = logits(dense, DENSE, tokens), logits(params, config, tokens)
    for block in params.blocks:
        block.moe.router.w_gate[...] = 0
    np.testing.assert_allclose(logits(params, config, tokens), exact, atol=1e-11)
    assert 1e-6 < abs(near - exact).max() < 0.3 * abs(exact).max(), "near, but not equal, with the router of init"


def test_ties_are_decided_between_whole_copies(rng: np.random.Generator) -> None:
    """A zero router sends every token to the first K·G experts: they must be K whole copies."""
    dense, tokens = drawn(rng, DENSE), rng.integers(7, size=(2, 5))
    config = upcycle.config_of(DENSE, 3, 2, 3)
    params = upcycle.upcycle(rng, dense, config, 3)
    for block in params.blocks:
        block.moe.router.w_gate[...] = 0
    np.testing.assert_allclose(logits(params, config, tokens), logits(dense, DENSE, tokens), atol=1e-11)


def gradient(params: Decoder, config: ModelConfig, rng: np.random.Generator, balance: float = 0.0) -> Decoder:
    tokens, targets = rng.integers(7, size=(2, 3, 5))
    noise = decoder.draw_noise(rng, config, 3, 5, np.float64)
    goal = Objective(Coefficients(balance=balance))
    return objective.loss_and_gradient(params, [Shard(tokens, targets, noise)], config, goal)[1]


def largest(grads: Decoder) -> float:
    return max(abs(leaf).max() for block in grads.blocks for leaf in tree.leaves(block.moe.router))


@pytest.mark.parametrize("noisy", [True, False])
def test_the_router_of_equal_experts_gets_no_gradient_from_the_language_model_loss(
    rng: np.random.Generator, noisy: bool
) -> None:
    dense = drawn(rng, DENSE)
    config = upcycle.config_of(DENSE, 4, 2, noisy_gating=noisy)
    params = upcycle.upcycle(rng, dense, config)
    found = gradient(params, config, rng)
    assert largest(found) < 1e-15, "renormalised: exactly zero, but for rounding"
    assert abs(found.blocks[0].moe.experts.w_up).max() > 1e-3
    assert largest(gradient(params, config, rng, balance=1.0)) > 1e-3, "the balancing loss does reach it"
    apart = upcycle.upcycle(rng, dense, config, noise=0.1)
    assert largest(gradient(apart, config, rng)) > 1e-5, "once the experts differ, it learns"
    raw = upcycle.config_of(DENSE, 4, 2, renormalize=False)
    assert largest(gradient(upcycle.upcycle(rng, dense, raw), raw, rng)) > 1e-5, "not renormalised: it learns at once"


def test_all_else_is_copied_and_the_router_is_drawn(rng: np.random.Generator) -> None:
    dense = drawn(rng, DENSE)
    params = upcycle.upcycle(np.random.default_rng(1), dense, upcycle.config_of(DENSE, 4, 2))
    for new, old in zip(params.blocks, dense.blocks, strict=True):
        for kept in ("attention", "attention_norm", "moe_norm"):
            assert_close(getattr(new, kept), getattr(old, kept), 0)
        for mine, theirs in zip(new.moe.experts, old.moe.experts, strict=True):
            assert all((mine[e] == theirs[0]).all() for e in range(4))
    assert_close((params.embedding, params.norm, params.head), (dense.embedding, dense.norm, dense.head), 0)
    drawn_columns = np.concatenate([block.moe.router.w_gate for block in params.blocks])
    assert len(np.unique(drawn_columns)) == drawn_columns.size
    assert 0.01 < drawn_columns.std() < 0.03


def test_noise_is_a_fraction_of_each_matrix(rng: np.random.Generator) -> None:
    config = dataclasses.replace(DENSE, width=40, expert_width=60)
    dense = drawn(rng, config)
    dense.blocks[0].moe.experts.w_up[...] *= 100
    moved = upcycle.upcycle(rng, dense, upcycle.config_of(config, 4, 2), noise=0.25).blocks[0].moe.experts
    for mine, old in zip(moved, dense.blocks[0].moe.experts, strict=True):
        assert (mine - old).std() / old.std() == pytest.approx(0.25, rel=0.05)
        assert abs(mine[0] - mine[1]).max() > 0


def test_branch_train_mix_takes_the_experts_and_averages_the_rest(rng: np.random.Generator) -> None:
    models = [drawn(rng, DENSE) for _ in range(3)]
    params = upcycle.mix(rng, models, upcycle.config_of(DENSE, 3, 2))
    mean = vectors.merge(models)
    assert_close(params.blocks[1].attention, mean.blocks[1].attention, 0)
    assert_close(params.embedding, mean.embedding, 0)
    for e, model in enumerate(models):
        for mine, theirs in zip(params.blocks[1].moe.experts, model.blocks[1].moe.experts, strict=True):
            np.testing.assert_array_equal(mine[e], theirs[0])


def test_branch_train_mix_of_one_model_is_upcycling(rng: np.random.Generator) -> None:
    dense = drawn(rng, DENSE)
    config = upcycle.config_of(DENSE, 3, 2, 2)
    mixed = upcycle.mix(np.random.default_rng(7), [dense] * 3, config, 2)
    assert_close(mixed, upcycle.upcycle(np.random.default_rng(7), dense, config, 2))
    alone = upcycle.mix(rng, [dense], upcycle.config_of(DENSE, 1, 1))
    tokens = rng.integers(7, size=(1, 5))
    np.testing.assert_allclose(
        logits(alone, upcycle.config_of(DENSE, 1, 1), tokens), logits(dense, DENSE, tokens), atol=1e-12
    )


def test_float32_stays(rng: np.random.Generator) -> None:
    low = tree.map(lambda leaf: leaf.astype(np.float32), drawn(rng, DENSE))
    for renormalize in (True, False):
        params = upcycle.upcycle(rng, low, upcycle.config_of(DENSE, 4, 2, renormalize=renormalize), noise=0.1)
        assert {leaf.dtype for leaf in tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"experts": 2}, {}, "a model with 2 experts of kind 'swiglu' and 0 shared experts is not dense"),
        ({"shared_experts": 1}, {}, "1 shared experts is not dense"),
        ({"expert_kind": "zero_computation"}, {}, "kind 'zero_computation'"),
        ({}, {"experts": 0}, "active 2 of experts 0 is not possible"),
        ({}, {"active": 0}, "active 0 of experts 8 is not possible"),
        ({}, {"experts": 2, "active": 3}, "active 3 of experts 2 is not possible"),
        ({}, {"granularity": 4}, "granularity 4 does not cut 6 neurons into equal parts"),
        ({}, {"granularity": 0}, "granularity 0 does not cut"),
        ({}, {"granularity": 2, "noisy_gating": True}, "noisy gating would separate the 2 slices"),
        ({}, {"active": 1}, "active_experts 1 with renormalize on"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(
    changes: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        upcycle.config_of(dataclasses.replace(DENSE, **changes), **arguments)


def test_other_bad_arguments_are_refused(rng: np.random.Generator) -> None:
    dense, config = drawn(rng, DENSE), upcycle.config_of(DENSE, 4, 2)
    for noise in (-0.1, np.inf, np.nan):
        with pytest.raises(UserError, match=f"noise {noise} is not a fraction of the weights"):
            upcycle.upcycle(rng, dense, config, noise=noise)
    with pytest.raises(UserError, match="granularity 2 does not make 4 experts of width 6 from 6 neurons"):
        upcycle.upcycle(rng, dense, config, 2)
    with pytest.raises(UserError, match="granularity 1 does not make 8 experts of width 3 from 6 neurons"):
        upcycle.upcycle(rng, dense, upcycle.config_of(DENSE, 4, 2, 2))
    with pytest.raises(UserError, match="2 models make 2 experts, not 4: set experts to 2"):
        upcycle.mix(rng, [dense, dense], config)


def test_the_noisy_router_is_the_one_of_init(rng: np.random.Generator) -> None:
    config = upcycle.config_of(DENSE, 4, 2, noisy_gating=True)
    params = upcycle.upcycle(np.random.default_rng(3), drawn(rng, DENSE), config)
    expected = noisy_top_k.init(np.random.default_rng(3), config, np.float64)
    assert expected.w_noise is not None
    assert_close(params.blocks[0].moe.router, expected, 0)
