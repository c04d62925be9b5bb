"""One token at a time without the layers' bookkeeping: the logits of ``decoder.forward``, whatever the modules are."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.inference import fast_decode, kv_cache
from minimoe.layers import decoder, moe
from minimoe.layers.decoder import Decoder

BASE = ModelConfig(
    vocab_size=11, width=16, layers=3, heads=4, kv_heads=2, head_width=6, context=8, experts=5, expert_width=7
)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-head": {"kv_heads": 4},
    "multi-query": {"kv_heads": 1},
    "a sliding window": {"window": 3},
    "tied embeddings": {"tied_embeddings": True},
    "one active expert": {"active_experts": 1, "renormalize": False},
    "weights not renormalised": {"renormalize": False},
    "every expert at work": {"active_experts": 5},
    "a single expert": {"experts": 1, "active_experts": 1},
    "no noise": {"noisy_gating": False},
    "shared experts": {"shared_experts": 2},
    "normalised queries and keys": {"qk_norm": "whole", "norm_eps": 0.1},
    "normalised heads": {"qk_norm": "per_head", "norm_eps": 0.1, "window": 5},
    "dense layers before the mixtures": {"dense_layers": 2, "dense_width": 9},
    "another epsilon and other wavelengths": {"norm_eps": 0.1, "rope_theta": 100.0},
}
LENGTH = 20
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
TIE = {"float32": 1e-4, "float64": 1e-10}
"""Logits of a router closer than this may swap places by rounding, and then another expert is right too."""


def drawn(config: ModelConfig, dtype: str = "float64") -> tuple[Decoder, np.ndarray]:
    """Random parameters, larger than at the start of training, and a text."""
    rng = np.random.default_rng(1)
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    return tree.map(lambda leaf: leaf.astype(dtype), params), rng.integers(config.vocab_size, size=LENGTH)


def by_the_layers(params: Decoder, config: ModelConfig, tokens: np.ndarray, tie: float) -> np.ndarray:
    """The logits of one full pass (T, V), with the window of generation; no routing may be near a tie."""
    config = dataclasses.replace(config, window=kv_cache.generation_window(config))
    logits, _, cache = decoder.forward(params, tokens[None], config)
    for block, done in zip(params.blocks[config.dense_layers :], cache.blocks[config.dense_layers :], strict=True):
        for scores, k in moe.router_of(config).compared(block.moe.router, done.moe.router):
            ascending = np.sort(scores, axis=1)
            assert k == scores.shape[1] or (ascending[:, -k] - ascending[:, -k - 1]).min() > tie, "choose another seed"
    return logits[0]


def token_by_token(params: Decoder, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    cache, logits = kv_cache.init(params, config), []
    for position, token in enumerate(tokens.tolist()):
        assert cache.position == position
        logits.append(fast_decode.forward(params, cache, token))
    return np.stack(logits)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_token_by_token_equals_the_full_pass(changes: dict[str, Any], dtype: str) -> None:
    """From the first token on, and far beyond the context, where old tokens are out of sight."""
    config = dataclasses.replace(BASE, **changes)
    params, tokens = drawn(config, dtype)
    before = tree.map(np.copy, params)
    logits = token_by_token(params, config, tokens)
    expected = by_the_layers(params, config, tokens, TIE[dtype])
    np.testing.assert_allclose(logits, expected, TOLERANCE[dtype], TOLERANCE[dtype])
    assert logits.dtype == dtype
    assert all((a == b).all() for a, b in zip(tree.leaves(params), tree.leaves(before), strict=True))


@pytest.mark.parametrize("side_by_side", [True, False])
def test_beyond_the_first_angles_and_with_three_products_the_logits_are_those_of_the_full_pass(
    monkeypatch: pytest.MonkeyPatch, side_by_side: bool
) -> None:
    monkeypatch.setattr(fast_decode, "POSITIONS", 7)
    monkeypatch.setattr(fast_decode, "SIDE_BY_SIDE", 10**9 if side_by_side else 0)
    params, tokens = drawn(BASE)
    logits = token_by_token(params, BASE, tokens)
    np.testing.assert_allclose(logits, by_the_layers(params, BASE, tokens, TIE["float64"]), 1e-12, 1e-12)
    products = fast_decode.prepare(params, BASE).layers[0].projections
    assert len(products) == (1 if side_by_side else 3)


def without_decode(module: Any) -> SimpleNamespace:
    return SimpleNamespace(**{name: value for name, value in vars(module).items() if name != "decode"})


@pytest.mark.parametrize("table", ["ROUTERS", "EXPERTS"])
def test_a_module_without_a_form_for_one_token_is_used_as_in_training(
    monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    params, tokens = drawn(BASE)
    passes: list[Any] = []
    forward = moe.forward
    monkeypatch.setattr(moe, "forward", lambda *arguments: passes.append(arguments) or forward(*arguments))
    fast = token_by_token(params, BASE, tokens)
    assert passes == [], "both modules have one, so no layer was used"

    modules, name = getattr(moe, table), BASE.router if table == "ROUTERS" else BASE.expert_kind
    monkeypatch.setitem(modules, name, without_decode(modules[name]))
    np.testing.assert_allclose(token_by_token(params, BASE, tokens), fast, rtol=0, atol=1e-12)
    assert len(passes) == BASE.layers * LENGTH
