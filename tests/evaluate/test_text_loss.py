"""Evaluation: every token once, the same number each time."""

import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.evaluate import text_loss
from minimoe.inference import reading
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses import cross_entropy
from minimoe.parallel import thread_pool
from minimoe.text import tokenizer


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=4, experts=4, expert_width=8
    )


@pytest.fixture(scope="module")
def params(config: ModelConfig) -> Decoder:
    params = decoder.init(np.random.default_rng(0), config, np.float64)
    for layer in params.blocks:  # strong opinions, so that loads are uneven and tokens differ in their loss
        layer.moe.router.w_gate[...] *= 50
        assert layer.moe.router.w_noise is not None
        layer.moe.router.w_noise[...] = 1
    params.embedding.table[...] *= 30
    return params


def document(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, 11, length).astype(np.int32)


def brute_force(params: Decoder, config: ModelConfig, documents: list[np.ndarray]) -> tuple[float, int, np.ndarray]:
    """One token at a time: what the tokens before it in its piece say about it."""
    losses: list[float] = []
    load = np.zeros((config.layers, config.experts))
    for ids in documents:
        for target in range(1, len(ids)):
            start = (target - 1) // config.context * config.context
            logits, routed, _ = decoder.forward(params, ids[None, start:target], config)
            z = logits[0, -1]
            losses.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[ids[target]])
            without = np.zeros((config.layers, config.experts))
            if target - 1 > start:
                earlier = decoder.forward(params, ids[None, start : target - 1], config)[1]
                without = np.stack([stats.assignments for stats in earlier.stats])
            load += np.stack([stats.assignments for stats in routed.stats]) - without
    return float(np.mean(losses)), len(losses), load / load.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "lengths", [[2], [4], [5], [6], [9], [80], [66, 2, 5], [1, 7]], ids=lambda lengths: "-".join(map(str, lengths))
)
def test_it_equals_a_loop_over_single_tokens(params: Decoder, config: ModelConfig, lengths: list[int]) -> None:
    documents = [document(length, seed) for seed, length in enumerate(lengths)]
    found = text_loss.evaluate(params, config, documents)
    loss, count, load = brute_force(params, config, documents)
    assert found.tokens == count == sum(lengths) - len(lengths)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(found.load, load, atol=1e-12)
    np.testing.assert_allclose(found.load.sum(1), 1)


def test_pieces_add_up_to_the_whole(params: Decoder, config: ModelConfig) -> None:
    ids = document(66)
    pieces = text_loss.by_piece(params, config, ids)
    assert [len(piece.targets) for piece in pieces] == [4] * 16 + [1]
    np.testing.assert_array_equal(np.concatenate([piece.targets for piece in pieces]), ids[1:])
    for number, piece in enumerate(pieces):
        alone = text_loss.evaluate(params, config, [ids[4 * number : 4 * number + 5]])
        assert piece.nats == pytest.approx(alone.loss * alone.tokens, rel=1e-12)


@given(length=st.integers(2, 300), context=st.integers(1, 20))
def test_every_token_but_the_first_is_predicted_exactly_once(length: int, context: int) -> None:
    params = decoder.init(
        np.random.default_rng(0),
        ModelConfig(vocab_size=300, width=2, layers=1, heads=1, kv_heads=1, head_width=2, experts=2, expert_width=1),
    )
    ids = np.arange(length, dtype=np.int32)
    shards = text_loss._shards(params, ids, context)
    np.testing.assert_array_equal(np.concatenate([shard.targets.ravel() for shard in shards]), ids[1:])
    np.testing.assert_array_equal(np.concatenate([shard.tokens.ravel() for shard in shards]), ids[:-1])
    assert all(shard.tokens.shape[1] <= context and len(shard.tokens) <= text_loss.SEQUENCES for shard in shards)


def test_two_evaluations_are_equal_and_threads_change_nothing(params: Decoder, config: ModelConfig) -> None:
    documents = [document(300), document(77, 1)]
    params = decoder.init(np.random.default_rng(2), config)  # float32, where the order of a sum shows
    results = []
    for threads in (1, 1, 2, 3, 7):
        with thread_pool.pool(threads) as pool:
            results.append(text_loss.evaluate(params, config, documents, pool))
    for other in results[1:]:
        assert other.loss == results[0].loss
        assert other.tokens == results[0].tokens
        np.testing.assert_array_equal(other.load, results[0].load)


def test_the_noise_of_training_is_off(params: Decoder, config: ModelConfig) -> None:
    quiet = [
        layer._replace(moe=layer.moe._replace(router=layer.moe.router._replace(w_noise=None)))
        for layer in params.blocks
    ]
    documents = [document(50)]
    noisy = text_loss.evaluate(params, config, documents)
    assert text_loss.evaluate(params._replace(blocks=quiet), config, documents).loss == noisy.loss


def test_a_mode_reaches_the_layers(params: Decoder, config: ModelConfig) -> None:
    ids, mode = document(9), reading.READING._replace(skip_below=[0.6, 0.9])
    found = text_loss.evaluate(params, config, [ids], mode=mode)
    nats = 0.0
    for start in (0, 4):
        logits = decoder.forward(params, ids[None, start : start + 4], config, mode).logits
        nats += float(cross_entropy.forward(logits, ids[None, start + 1 : start + 5])[0].total)
    assert found.loss == pytest.approx(nats / 8, rel=1e-12)
    assert found.loss != text_loss.evaluate(params, config, [ids]).loss


def test_a_loss_that_is_no_number_is_refused(params: Decoder, config: ModelConfig) -> None:
    damaged = tree.map(np.copy, params)
    damaged.blocks[0].moe.router.w_gate[0] = np.nan
    with pytest.raises(UserError, match="the loss is nan, expected a finite number: the model has diverged"):
        text_loss.evaluate(damaged, config, [document(9)])


def test_a_document_that_leaves_nothing_to_predict_is_refused_alone_and_skipped_in_company(
    params: Decoder, config: ModelConfig
) -> None:
    for documents in ([], [document(1)], [document(0), document(1)]):
        with pytest.raises(UserError, match="nothing to predict"):
            text_loss.evaluate(params, config, documents)
    alone = text_loss.evaluate(params, config, [document(9)])
    assert text_loss.evaluate(params, config, [document(1), document(9)]).loss == alone.loss


def test_bits_per_byte_count_bytes_not_characters() -> None:
    """A model that gives each of V tokens the same chance needs log2(V) bits a token, however many bytes that is."""
    uniform = text_loss.Evaluation(math.log(8), 100, np.ones((1, 1)))
    assert text_loss.bits_per_byte(uniform, 100) == pytest.approx(3)
    assert text_loss.bits_per_byte(uniform, 200) == pytest.approx(1.5), "two bytes a character: half the bits a byte"


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_uniform_model_needs_log2_of_its_vocabulary_a_token(kind: str) -> None:
    text = "Où est le cœur ? Ça, c'est là. 🦉🦉\n" * 4
    codec = tokenizer.build(kind, text)
    config = ModelConfig(
        vocab_size=codec.vocab_size, width=4, layers=1, heads=1, kv_heads=1, head_width=2, context=8, expert_width=2
    )
    params = decoder.init(np.random.default_rng(0), config, np.float64)
    assert params.head is not None
    params.head.weight[...] = 0
    ids = codec.encode(text)
    result = text_loss.evaluate(params, config, [ids])
    size = len(text[1:].encode())  # the first character, a single byte, is not predicted
    bits = text_loss.bits_per_byte(result, codec.bytes_of(ids[1:]))
    assert bits == pytest.approx(math.log2(codec.vocab_size) * (len(ids) - 1) / size)
    if kind == "byte":
        assert bits == pytest.approx(8)


# Memory


@pytest.mark.parametrize("window", [None, 3, 9])
def test_slices_of_rows_and_pieces_of_long_sequences_change_nothing(
    params: Decoder, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    config = dataclasses.replace(config, context=23, window=window)
    ids = document(200)
    whole, pieces = text_loss.evaluate(params, config, [ids]), text_loss.by_piece(params, config, ids)
    for tokens, logits in ((2048, 11 * 30), (2048, 11 * 5), (2048, 1), (50, 2**22), (10, 11 * 4), (1, 11)):
        monkeypatch.setattr(reading, "TOKENS", tokens)
        monkeypatch.setattr(text_loss, "LOGITS", logits)
        found = text_loss.evaluate(params, config, [ids])
        assert found.loss == pytest.approx(whole.loss, rel=1e-12) and found.tokens == whole.tokens
        np.testing.assert_array_equal(found.load, whole.load)
        for one, other in zip(text_loss.by_piece(params, config, ids), pieces, strict=True):
            np.testing.assert_array_equal(one.targets, other.targets)
            assert one.nats == pytest.approx(other.nats, rel=1e-12)


def test_the_memory_of_an_evaluation_is_bounded_for_any_vocabulary_and_any_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig(
        vocab_size=50_000, width=2, layers=1, heads=1, kv_heads=1, head_width=2, context=4096, experts=2,
        active_experts=1, renormalize=False, expert_width=1,
    )  # fmt: skip
    params = decoder.init(np.random.default_rng(0), config)
    ids = np.random.default_rng(1).integers(0, 50_000, 2001)
    text_loss.evaluate(params, config, [ids[:3]])
    tracemalloc.start()
    text_loss.evaluate(params, config, [ids])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * text_loss.LOGITS + 8_000_000 < 2000 * 50_000 * 4 / 4

    at_once: list[int] = []
    hidden = decoder.hidden

    def counted(params: Decoder, tokens: np.ndarray, *arguments: Any, **named: Any) -> decoder.Hidden:
        at_once.append(tokens.size)
        return hidden(params, tokens, *arguments, **named)

    monkeypatch.setattr(decoder, "hidden", counted)
    long = np.tile(np.arange(9), 2000)
    small = dataclasses.replace(config, vocab_size=9, context=6000)
    text_loss.evaluate(decoder.init(np.random.default_rng(0), small), small, [long])
    assert max(at_once) <= reading.TOKENS and sum(at_once) == len(long) - 1
