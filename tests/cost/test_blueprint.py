"""Blueprints: every part of a real decoder, how much of it one token uses, and what of it is only looked up."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.cost import blueprint
from minimoe.inference import fast_decode, kv_cache
from minimoe.layers import decoder

CHANGES: dict[str, dict[str, Any]] = {
    "a mixture": {},
    "a tied table": {"tied_embeddings": True},
    "one expert for a token": {"active_experts": 1, "renormalize": False},
    "a dense model": {"experts": 1, "active_experts": 1},
    "dense layers, then mixtures": {"layers": 3, "dense_layers": 2, "dense_width": 11, "qk_norm": "whole"},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_blueprint_is_counted_leaf_by_leaf(small: ModelConfig, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(small, **changes)
    total = active = multiplied = 0
    for name, leaf in tree.named_leaves(decoder.init(np.random.default_rng(0), config)):
        if "w_noise" in name or ("router" in name and config.experts == 1):
            continue  # the noise is drawn in training only, and one expert needs no router
        used = leaf.size * config.active_experts // config.experts if "experts" in name else leaf.size
        only_looked_up = name == "embedding.table" and not config.tied_embeddings
        total, active = total + leaf.size, active + used
        multiplied += 0 if only_looked_up or name.endswith("gain") else used
    found = blueprint.of_config("small", config)
    assert (found.total, found.active) == (total, active)
    assert sum(part.active for part in found.parts if part.multiplied) == multiplied
    assert all(part.total > 0 for part in found.parts), "a part that a model does not have is not listed"


def test_the_cache_of_a_token_has_the_numbers_that_are_kept_for_it(small: ModelConfig) -> None:
    params = decoder.init(np.random.default_rng(0), small)
    cache = kv_cache.init(params, small)
    fast_decode.forward(params, cache, 1)
    kept = sum(layer.keys[:, :1].size + layer.values[:, :1].size for layer in cache.layers)
    found = blueprint.of_config("small", dataclasses.replace(small, window=3))
    assert found.cached_numbers == kept
    assert found.attention_width == sum(block.attention.query.weight.shape[1] for block in params.blocks)
    assert (found.context, found.window) == (small.context, 3)
