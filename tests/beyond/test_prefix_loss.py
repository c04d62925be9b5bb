"""The decoder with Soft MoE and its gradient, and a loss that is equal on prefixes only if nothing looks ahead."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minimoe.beyond import prefix_loss
from minimoe.beyond.prefix_loss import SOFT, Model
from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import attention, decoder, rmsnorm, rope, soft_moe
from minimoe.losses import cross_entropy
from minimoe.proof import of_beyond
from minimoe.proof.gradcheck import check, failed
from minimoe.text import batches

CONFIG = ModelConfig(
    vocab_size=9, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=8, experts=4, expert_width=5
)


def soft_params(rng: np.random.Generator, config: ModelConfig = CONFIG) -> decoder.Decoder:
    fresh = prefix_loss.init(rng, config, 2, np.float64)
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), fresh)


def model_of(rng: np.random.Generator, router: str) -> Model:
    if router == SOFT:
        return Model(soft_params(rng), CONFIG, SOFT)
    config = dataclasses.replace(CONFIG, router=router)
    fresh = decoder.init(rng, config, np.float64, look_ahead=True)
    return Model(tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), fresh), config, router)


@pytest.mark.parametrize("tied", [False, True])
def test_every_gradient_of_the_soft_decoder_is_right(tied: bool, rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    tokens, targets = rng.integers(9, size=(2, 2, 5))

    def forward(params: Any, x: None) -> tuple[Any, Any]:
        logits, cache = prefix_loss.forward(params, tokens, config)
        loss, at_loss = cross_entropy.forward(logits, targets)
        return loss.total, (cache, at_loss, logits.shape)

    def backward(params: Any, caches: Any, dy: Any) -> tuple[None, Any]:
        cache, at_loss, shape = caches
        return None, prefix_loss.backward(params, cache, cross_entropy.backward(at_loss, dy).reshape(shape))

    rows = check("soft", forward, backward, soft_params(rng, config), None, bound=1e-6, entries=6, directions=2)
    assert not failed(rows), failed(rows)
    names = [row.tensor for row in rows]
    assert "blocks[1].moe.scale" in names
    assert ("head.weight" in names) != tied


def test_its_row_in_the_table_of_proofs_passes(rng: np.random.Generator) -> None:
    rows = [row for row in of_beyond.rows(rng) if row.component == "decoder with Soft MoE"]
    assert rows
    assert not failed(rows), failed(rows)


def test_the_soft_decoder_is_attention_and_soft_moe_on_a_residual_stream(rng: np.random.Generator) -> None:
    params, tokens = soft_params(rng), rng.integers(9, size=(2, 5))
    rotation = rope.init(np.arange(5), 4, CONFIG.rope_theta, np.float64)
    x = params.embedding.table[tokens]
    for block in params.blocks:
        x = x + attention.forward(block.attention, rmsnorm.forward(block.attention_norm, x)[0], rotation, 4)[0]
        x = x + soft_moe.forward(block.moe, rmsnorm.forward(block.moe_norm, x)[0], CONFIG)[0]
    assert params.head is not None
    expected = rmsnorm.forward(params.norm, x)[0] @ params.head.weight
    np.testing.assert_allclose(prefix_loss.forward(params, tokens, CONFIG)[0], expected, atol=1e-12)


@pytest.mark.parametrize("router", ["noisy_top_k", "expert_threshold", "expert_choice", SOFT])
def test_whole_and_prefix_are_equal_only_for_a_causal_model(router: str, rng: np.random.Generator) -> None:
    model, sequences = model_of(rng, router), rng.integers(9, size=(6, 9))
    found = prefix_loss.losses(model, sequences, [2, 5, 7])
    equal = found.whole == pytest.approx(found.prefix, abs=1e-12)
    assert equal == (router in ("noisy_top_k", "expert_threshold"))
    ends = prefix_loss.losses(model, sequences, [8])
    assert ends.whole == pytest.approx(ends.prefix, abs=1e-12), "the longest prefix is the whole"


def test_both_losses_are_about_the_token_after_the_prefix(rng: np.random.Generator) -> None:
    model, sequences = model_of(rng, SOFT), rng.integers(9, size=(3, 9))
    nats: dict[str, list[float]] = {"whole": [], "prefix": []}
    for row in sequences:
        for n in (1, 4):
            for name, seen in (("whole", row[:-1]), ("prefix", row[:n])):
                z = prefix_loss.predict(model, seen[None])[0, n - 1]
                nats[name].append(np.log(np.exp(z).sum()) - z[row[n]])
    found = prefix_loss.losses(model, sequences, [1, 4])
    assert (found.whole, found.prefix) == pytest.approx((np.mean(nats["whole"]), np.mean(nats["prefix"])), rel=1e-12)


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_beyond_the_sequences_is_refused(length: int, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match=f"length {length} is not .* from 1 to 8"):
        prefix_loss.losses(model_of(rng, SOFT), rng.integers(9, size=(2, 9)), [3, length])


def test_windows_are_whole_pieces_of_each_document() -> None:
    found = prefix_loss.windows([np.arange(7), np.arange(10, 12), np.arange(20, 26)], 3)
    np.testing.assert_array_equal(found, [[0, 1, 2], [3, 4, 5], [20, 21, 22], [23, 24, 25]])


@pytest.mark.parametrize("router", ["noisy_top_k", "expert_threshold", "expert_choice", SOFT])
def test_every_kind_learns_and_the_same_seed_gives_the_same_model(router: str) -> None:
    recipe = TrainConfig(steps=12, warmup=2, batch=4, optimizer="adamw", learning_rate=0.01)
    data, _, tokenizer = batches.prepare("fables", recipe, CONFIG.context)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    sequences = prefix_loss.windows(data.validation, 9)[:50]
    trained, course = prefix_loss.train(router, data, config, recipe, 3)
    again, _ = prefix_loss.train(router, data, config, recipe, 3)
    assert all((a == b).all() for a, b in zip(*map(tree.leaves, (trained.params, again.params)), strict=True))
    fresh, _ = prefix_loss.train(router, data, config, dataclasses.replace(recipe, steps=0), 3)
    before, after = (prefix_loss.losses(model, sequences, range(2, 9)).whole for model in (fresh, trained))
    assert after < before - 0.1
    if router != SOFT:
        assert course.assignments.shape == (12, 2, 4)
        assert course.tokens == 32
        assert 0.5 < course.assignments.sum(2).mean() / course.tokens < 4
    moved = [
        not np.array_equal(a.moe.router.threshold, b.moe.router.threshold)
        for a, b in zip(fresh.params.blocks, trained.params.blocks, strict=True)
        if router == "expert_threshold"
    ]
    assert all(moved)
