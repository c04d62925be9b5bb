"""M-SMoE: exact for equal experts, groups against a loop, the router untouched."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import assert_close, drawn

from minimoe.compression import alignment, binding
from minimoe.compression.binding import Seen
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts.swiglu import Experts

CONFIG = ModelConfig(
    vocab_size=7, width=4, layers=2, heads=2, kv_heads=1, head_width=2, context=5, experts=5, expert_width=3
)


def with_equal_experts(rng: np.random.Generator, group: list[int]) -> Decoder:
    """A decoder in which the experts of a group are the same function, with neurons in another order, and have similar
    columns of the router."""
    params = drawn(rng, CONFIG)
    for block in params.blocks:
        for e, g in enumerate(group):
            order = rng.permutation(3)
            block.moe.experts.w_gate[e] = block.moe.experts.w_gate[g][:, order]
            block.moe.experts.w_up[e] = -2 * block.moe.experts.w_up[g][:, order]
            block.moe.experts.w_down[e] = block.moe.experts.w_down[g][order] / -2
            block.moe.router.w_gate[:, e] = (1 + 0.1 * e) * block.moe.router.w_gate[:, g]
    return params


def test_binding_is_exact_if_the_experts_were_equal(rng: np.random.Generator) -> None:
    params, tokens = with_equal_experts(rng, [0, 1, 0, 1, 0]), rng.integers(7, size=(6, 5))
    before = decoder.forward(params, tokens, CONFIG).logits
    bound = [
        binding.bind(block.moe, seen, [0, 1, 0, 1, 0])
        for block, seen in zip(params.blocks, binding.look(params, tokens, CONFIG), strict=True)
    ]
    assert [one.experts.w_up.shape for one in bound] == [(2, 4, 3)] * 2
    found = params._replace(
        blocks=[
            block._replace(moe=block.moe._replace(experts=binding.unbound(one)))
            for block, one in zip(params.blocks, bound, strict=True)
        ]
    )
    np.testing.assert_allclose(decoder.forward(found, tokens, CONFIG).logits, before, atol=1e-12)
    # A router with one output for each group computes something else: its softmax is over fewer logits.
    leaders = [0, 1]
    fewer = dataclasses.replace(CONFIG, experts=2)
    small = found._replace(
        blocks=[
            block._replace(
                moe=block.moe._replace(
                    experts=Experts(*(leaf[leaders] for leaf in block.moe.experts)),
                    router=type(block.moe.router)(*(leaf[:, leaders] for leaf in block.moe.router)),
                )
            )
            for block in found.blocks
        ]
    )
    assert abs(decoder.forward(small, tokens, fewer).logits - before).max() > 0.01


def test_the_model_keeps_its_shape_and_its_router(rng: np.random.Generator) -> None:
    params, tokens = drawn(rng, CONFIG), rng.integers(7, size=(2, 5))
    found = binding.merge_experts(params, CONFIG, tokens, 2)
    for block, old, seen in zip(found.blocks, params.blocks, binding.look(params, tokens, CONFIG), strict=True):
        assert_close(block.moe.router, old.moe.router, atol=0)
        assert len(np.unique(block.moe.experts.w_up, axis=0)) == 2
        assert_close(block.moe.experts, binding.unbound(binding.bind(old.moe, seen, binding.groups(seen, 2))), atol=0)


def test_as_many_groups_as_experts_change_nothing(rng: np.random.Generator) -> None:
    params, tokens = drawn(rng, CONFIG), rng.integers(7, size=(2, 5))
    assert_close(binding.merge_experts(params, CONFIG, tokens, 5), params, atol=1e-13)


def test_the_layers_are_seen_as_they_are(rng: np.random.Generator) -> None:
    params, tokens = drawn(rng, CONFIG), rng.integers(7, size=(3, 5))
    for seen, block, cache in zip(
        binding.look(params, tokens, CONFIG),
        params.blocks,
        decoder.forward(params, tokens, CONFIG).cache.blocks,
        strict=True,
    ):
        x = cache.moe.router.gate.x
        logits = x @ block.moe.router.w_gate
        np.testing.assert_allclose(seen.logits, logits, atol=1e-12)
        chosen = np.argsort(-logits, axis=1)[:, :2]
        np.testing.assert_array_equal(seen.counts, np.bincount(chosen.reshape(-1), minlength=5))


@given(experts=st.integers(1, 7), count=st.integers(1, 7), ties=st.booleans(), seed=st.integers(0, 2**16))
def test_the_groups_agree_with_a_loop(experts: int, count: int, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = Seen(rng.standard_normal((9, experts)), rng.integers(0, 3 if ties else 10**6, experts))
    count = min(count, experts)
    leaders = sorted(sorted(range(experts), key=lambda e: (-seen.counts[e], e))[:count])
    expected = []
    for e in range(experts):
        z = seen.logits[:, e]
        alike = [z @ seen.logits[:, lead] / np.linalg.norm(seen.logits[:, lead]) for lead in leaders]
        expected.append(leaders.index(e) if e in leaders else int(np.argmax(alike)))
    assert binding.groups(seen, count).tolist() == expected


def test_groups_by_hand() -> None:
    """Expert 3 is most like 1 in direction, although its product with 0 is larger; equal leaders stay apart."""
    logits = np.array([[10.0, 1, 10, 1], [0, 1, 0, 0.9]])
    seen = Seen(logits, np.array([5, 4, 6, 3]))
    assert binding.groups(seen, 3).tolist() == [0, 1, 2, 1]
    assert binding.groups(seen, 1).tolist() == [0, 0, 0, 0]
    assert binding.groups(Seen(np.zeros((2, 4)), seen.counts), 2).tolist() == [0, 0, 1, 0]


def test_the_average_is_weighted_by_tokens_and_aligned_with_the_leader(rng: np.random.Generator) -> None:
    moe = drawn(rng, CONFIG).blocks[0].moe
    counts = np.array([3, 1, 9, 0, 0])
    bound = binding.bind(moe, Seen(np.zeros((1, 5)), counts), [0, 1, 0, 2, 2])
    lead, other = alignment.expert(moe.experts, 2), alignment.expert(moe.experts, 0)
    expected = [0.75 * a + 0.25 * b for a, b in zip(lead, alignment.neurons(lead, other), strict=True)]
    assert_close(alignment.expert(bound.experts, 0), Experts(*expected))
    assert_close(alignment.expert(bound.experts, 1), alignment.expert(moe.experts, 1), atol=1e-13)
    lead, other = alignment.expert(moe.experts, 3), alignment.expert(moe.experts, 4)
    expected = [(a + b) / 2 for a, b in zip(lead, alignment.neurons(lead, other), strict=True)]
    assert_close(alignment.expert(bound.experts, 2), Experts(*expected))  # a group that nobody used
    assert_close(alignment.expert(binding.unbound(bound), 4), Experts(*expected))
    assert bound.experts.w_up.shape == (3, 4, 3)


@pytest.mark.parametrize("count", [0, 6, -1])
def test_an_impossible_number_is_refused(rng: np.random.Generator, count: int) -> None:
    with pytest.raises(UserError, match=f"{count} experts are not possible, expected 1 to 5"):
        binding.merge_experts(drawn(rng, CONFIG), CONFIG, rng.integers(7, size=(1, 5)), count)
