"""More ids: what the model knew stays to the bit, and the new ids begin as average ones."""

import dataclasses

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.tuning import grow

CONFIG = ModelConfig(
    vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, context=8, experts=4, expert_width=12
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_logits_of_known_ids_stay_to_the_bit(rng: np.random.Generator, tied: bool, dtype: type) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    params = decoder.init(rng, config, dtype)
    grown, wider = grow.vocabulary(params, config, 44, rng)
    assert wider == dataclasses.replace(config, vocab_size=44)
    decoder.check(wider)
    for leaf, blank in zip(tree.leaves(grown), tree.leaves(decoder.blank(wider, np.zeros)), strict=True):
        assert leaf.shape == blank.shape and leaf.dtype == dtype
    tokens = rng.integers(40, size=(2, 8))
    before, after = decoder.forward(params, tokens, config).logits, decoder.forward(grown, tokens, wider).logits
    # a wider product may be summed in another order
    np.testing.assert_allclose(after[..., :40], before, rtol=0, atol=1e-6 if dtype is np.float32 else 1e-14)
    np.testing.assert_array_equal(grown.embedding.table[:40], params.embedding.table)
    assert all(a is b for a, b in zip(tree.leaves(grown.blocks), tree.leaves(params.blocks), strict=True))


def test_new_ids_differ_and_are_about_as_likely_as_an_average_one(rng: np.random.Generator) -> None:
    params = decoder.init(rng, CONFIG)
    params.embedding.table[...] = 3 + 0.5 * rng.standard_normal(params.embedding.table.shape)
    params.embedding.table[:, 0] = 7  # a column without spread
    grown, wider = grow.vocabulary(params, CONFIG, 240, rng)
    new = grown.embedding.table[40:]
    assert (new[:, 0] == 7).all()
    assert abs(new[:, 1:].mean() - 3) < 0.1 and abs(new[:, 1:].std() - 0.5) < 0.1
    assert len(np.unique(new[:, 1])) == 200
    logits = decoder.forward(grown, rng.integers(240, size=(1, 8)), wider).logits
    np.testing.assert_allclose(
        logits[..., 40:], np.repeat(logits[..., :40].mean(-1, keepdims=True), 200, -1), atol=1e-5
    )


def test_a_tied_table_grows_once(rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=True)
    grown, wider = grow.vocabulary(decoder.init(rng, config), config, 43, rng)
    assert grown.head is None
    assert decoder.output_layer(grown).weight.shape == (16, 43)


def test_the_same_size_changes_nothing_and_a_smaller_one_is_refused(rng: np.random.Generator) -> None:
    params = decoder.init(rng, CONFIG)
    assert grow.vocabulary(params, CONFIG, 40, rng) == (params, CONFIG)
    with pytest.raises(UserError, match="39 is smaller than the 40 ids"):
        grow.vocabulary(params, CONFIG, 39, rng)


def test_a_router_that_chooses_by_the_id_is_refused(rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, router="token_hash")
    with pytest.raises(UserError, match="would deal all of them again"):
        grow.vocabulary(decoder.init(rng, config), config, 41, rng)
