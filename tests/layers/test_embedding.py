"""Embedding: a row for every token, and the gradient of a row from everywhere that its token stands."""

from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.layers import embedding
from minimoe.layers.embedding import Cache, Embedding
from minimoe.proof.gradcheck import check, failed


def backward(params: Embedding, cache: Cache, dy: np.ndarray) -> tuple[None, Any]:
    return None, embedding.backward(params, cache, dy)


@given(tokens=st.lists(st.integers(0, 6), min_size=1, max_size=9), seed=st.integers(0, 99))
@example(tokens=[0, 2, 2, 2], seed=0)  # tokens behind the last that occurs
@example(tokens=[6], seed=0)
@example(tokens=[3, 3, 3], seed=0)
def test_gradient_is_right_whichever_tokens_occur(tokens: list[int], seed: int) -> None:
    params = Embedding(np.random.default_rng(seed).standard_normal((7, 2)))
    assert failed(check("embedding", embedding.forward, backward, params, np.array(tokens))) == []


@given(tokens=st.lists(st.integers(0, 6), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_gradient_equals_adding_rows_one_by_one(tokens: list[int], seed: int) -> None:
    dy = np.random.default_rng(seed).standard_normal((len(tokens), 3))
    expected = np.zeros((7, 3))
    for token, row in zip(tokens, dy, strict=True):
        expected[token] += row
    table = embedding.backward(Embedding(np.zeros((7, 3))), Cache(np.array(tokens)), dy).table
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-13)
    assert (table[np.setdiff1d(np.arange(7), tokens)] == 0).all(), "a token that never occurs gets exactly nothing"


def test_sequences_keep_their_shape(rng: np.random.Generator) -> None:
    params = embedding.init(rng, 9, 4)
    tokens = rng.integers(9, size=(2, 5))
    y, cache = embedding.forward(params, tokens)
    assert y.shape == (2, 5, 4)
    assert (y[1, 3] == params.table[tokens[1, 3]]).all()
    assert embedding.backward(params, cache, y).table.shape == (9, 4)


def test_float32_stays_float32(rng: np.random.Generator) -> None:
    params = embedding.init(rng, 9, 4)
    y, cache = embedding.forward(params, np.array([1, 1, 5]))
    assert y.dtype == embedding.backward(params, cache, y).table.dtype == np.float32
