"""What must be read for a token, and what a pass needs in memory."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.presets import PRESETS
from minimoe.cost import offloading
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder

MIXTRAL = PRESETS["mixtral-8x7b"].config
SMALL = ModelConfig(
    vocab_size=500, width=64, layers=3, heads=8, kv_heads=2, head_width=16, context=512, experts=4, expert_width=96,
    noisy_gating=False,
)  # fmt: skip


def test_mixtral() -> None:
    """32 layers, 2 experts, three matrices of 4096 × 14336."""
    assert offloading.expert_weights(MIXTRAL) == 176_160_768
    assert offloading.bytes_per_token(MIXTRAL, 16) == 32 * 2 * 176_160_768 * 2
    assert offloading.bytes_per_token(MIXTRAL, 4.125, 0.25) == pytest.approx(32 * 2 * 176_160_768 * 4.125 / 8 * 0.75)
    assert offloading.bytes_per_token(MIXTRAL, 16, 1.0) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("1.5 GB", 1_500_000_000), ("800mb", 8 * 10**8), ("2GiB", 2**31), ("64 KiB", 65536),
     ("1TB", 10**12), ("3KB", 3000)],
)  # fmt: skip
def test_sizes_are_read(text: str, size: int) -> None:
    assert offloading.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8", "8 apples", "-8GB", "0GB", "GB", "nanGB", "8GBs", "0.0001KB", None, 8])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size: give a number and its unit"):
        offloading.parse_bytes(text)


def test_sizes_are_shown() -> None:
    assert [offloading.shown(size) for size in (1_500_000_000, 80_200_000, 3100.0, 0)] == [
        "1.50 GB", "80.2 MB", "3.1 KB", "0.0 KB",
    ]  # fmt: skip


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [[1] * 70, [64, 1, 1, 3, 30], [100]])
def test_room_for_keys_and_values(window: int | None, lengths: list[int]) -> None:
    """Against the arrays that a cache really holds, in use or not, and the two more while one layer is copied."""
    config = dataclasses.replace(SMALL, window=window, context=64)
    params = decoder.init(np.random.default_rng(0), config)
    cache = kv_cache.init(params, config)
    most = 0
    for length in lengths:
        generation.extend(params, cache, np.zeros((1, length), int))
        most = max(most, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    promised = offloading.cache_bytes(config, sum(lengths))
    assert most <= promised <= 6 * most


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [(64, {}), (256, {"experts": 2, "expert_width": 600}), (200, {"expert_width": 9}), (99, {"vocab_size": 3000})],
)
def test_a_pass_needs_no_more_than_is_counted(tokens: int, changes: dict[str, int]) -> None:
    """What NumPy takes for a pass at its peak; all tokens may choose the same experts, as they do with 2 of 2."""
    config = dataclasses.replace(SMALL, **({"vocab_size": 20} | changes))
    params = decoder.init(np.random.default_rng(0), config)
    text = np.random.default_rng(1).integers(20, size=(1, tokens))
    generation.extend(params, kv_cache.init(params, config), text)  # what is taken once
    cache = kv_cache.init(params, config)
    tracemalloc.start()
    try:
        generation.extend(params, cache, text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counted = offloading.pass_bytes(config, tokens, tokens) + offloading.cache_bytes(config, tokens)
    assert 0.2 * counted < peak <= counted
