"""Reading a text in pieces: the hidden states of one pass, and never more tokens at once than allowed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import drawn

from minimoe.core.config import ModelConfig
from minimoe.inference import reading
from minimoe.layers import decoder


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    at_once=st.integers(1, 25),
    window=st.none() | st.integers(1, 22),
    seed=st.integers(0, 99),
)
@example(batch=1, length=20, at_once=6, window=None, seed=0)
@example(batch=2, length=20, at_once=6, window=5, seed=0)
def test_pieces_are_one_pass_whatever_their_length(
    small: ModelConfig, batch: int, length: int, at_once: int, window: int | None, seed: int
) -> None:
    rng, config = np.random.default_rng(seed), dataclasses.replace(small, window=window)
    params, tokens = drawn(rng, config), rng.integers(13, size=(batch, length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "TOKENS", at_once)
        pieces = list(reading.read(params, config, tokens))
    assert [position for part, _ in pieces for position in range(length)[part]] == list(range(length))
    assert all(found.x.shape[:2] == (batch, part.stop - part.start) for part, found in pieces)
    assert all(batch * (part.stop - part.start) <= max(at_once, batch) for part, _ in pieces)
    whole = decoder.hidden(params, tokens, config)
    np.testing.assert_allclose(np.concatenate([found.x for _, found in pieces], axis=1), whole.x, atol=1e-11)


@pytest.mark.parametrize("at_once", [4, 100])
def test_of_each_block_is_kept_what_the_caller_asks_for_and_nothing_else(
    rng: np.random.Generator, small: ModelConfig, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(reading, "TOKENS", at_once)
    params, tokens = drawn(rng, small), rng.integers(13, size=(1, 7))
    for _, found in reading.read(params, small, tokens):
        assert found.blocks == [None, None]
    for part, found in reading.read(params, small, tokens, lambda cache: cache.moe.routing.place.shape):
        assert found.blocks == [(part.stop - part.start, small.active_experts)] * 2


@pytest.mark.parametrize(("length", "count"), [(1, 2048), (1000, 2), (2048, 1), (5000, 1)])
def test_as_many_sequences_are_read_together_as_the_tokens_at_once_allow(length: int, count: int) -> None:
    assert reading.sequences_at_once(length) == count
