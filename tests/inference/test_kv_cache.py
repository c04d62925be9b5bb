"""The key/value cache against a list that never forgets: same rows in sight, bounded memory, few copies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import kv_cache
from minimoe.inference.kv_cache import LayerCache, generation_window
from minimoe.layers import decoder

B, G, C = 2, 3, 4
TINY = ModelConfig(
    vocab_size=5, width=8, layers=2, heads=4, kv_heads=2, head_width=2, context=6, experts=2, expert_width=4
)


def layer_cache(window):
    return LayerCache(np.empty((B, 0, G, C)), window)


def rows(start, count):
    """Keys whose every number is its position, and values that are their negatives."""
    keys = np.broadcast_to(np.arange(start, start + count, dtype=float)[:, None, None], (B, count, G, C))
    return keys, -keys


@given(st.integers(1, 9), st.data())
def test_every_append_returns_what_its_tokens_may_see(window, data):
    pieces = data.draw(st.lists(st.integers(1, window), max_size=40))
    cache, position = layer_cache(window), 0
    for count in pieces:
        keys, values = cache.append(*rows(position, count))
        first_seen = max(0, position - window + 1)  # by the first token of the piece
        position += count
        expected_keys, expected_values = rows(first_seen, position - first_seen)
        np.testing.assert_array_equal(keys, expected_keys)
        np.testing.assert_array_equal(values, expected_values)


def test_earlier_views_are_never_written_over():
    cache = layer_cache(window=4)
    views = [cache.append(*rows(position, 1)) for position in range(50)]
    for position, (keys, _) in enumerate(views):
        assert keys[0, :, 0, 0].tolist() == list(range(max(0, position - 3), position + 1))


def test_memory_stays_within_twice_the_window():
    cache = layer_cache(window=10)
    for position in range(1000):
        cache.append(*rows(position, 1))
        assert cache.keys.shape[1] == cache.values.shape[1] <= 20


def test_a_short_text_in_a_long_window_takes_little_memory():
    cache = layer_cache(window=2**20)
    for position in range(100):
        cache.append(*rows(position, 1))
    assert cache.keys.shape[1] <= 200


@pytest.mark.parametrize("window", [1, 2, 10, 10_000])
def test_appending_moves_each_row_about_once(window, monkeypatch):
    moved = 0
    with_room = kv_cache._with_room

    def counting(kept, count):
        nonlocal moved
        moved += kept.shape[1]
        return with_room(kept, count)

    monkeypatch.setattr(kv_cache, "_with_room", counting)
    cache = layer_cache(window)
    for position in range(2000):
        cache.append(*rows(position, 1))
    assert moved <= 2 * 2 * 2000  # keys and values; growing by doubling moves a row at most twice on average


def test_the_cache_has_the_dtype_and_the_shapes_of_the_model():
    params = decoder.init(np.random.default_rng(0), TINY, np.float64)
    cache = kv_cache.init(params, TINY, batch=3)
    assert len(cache.layers) == TINY.layers
    assert {layer.keys.dtype for layer in cache.layers} == {np.dtype(np.float64)}
    assert {layer.keys.shape for layer in cache.layers} == {(3, 0, TINY.kv_heads, TINY.head_width)}


def test_layers_do_not_share_memory():
    cache = kv_cache.init(decoder.init(np.random.default_rng(0), TINY), TINY)
    first, second = cache.layers
    first.append(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
    second.append(np.zeros((1, 1, 2, 2)), np.zeros((1, 1, 2, 2)))
    assert first.keys[0, 0, 0, 0] == first.values[0, 0, 0, 0] == 1


@pytest.mark.parametrize(("window", "context", "seen"), [(None, 6, 6), (4, 6, 4), (6, 6, 6), (9, 6, 6), (1, 6, 1)])
def test_a_token_sees_the_window_but_never_more_than_the_context(window, context, seen):
    config = ModelConfig(window=window, context=context)
    assert generation_window(config) == seen


def test_a_cache_for_no_sequence_is_refused():
    with pytest.raises(UserError, match="batch 0"):
        kv_cache.init(decoder.init(np.random.default_rng(0), TINY), TINY, batch=0)
