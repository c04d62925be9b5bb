"""Alignment: other forms of the same function are found again, and the function stays the same in every case."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import assert_close, drawn

from minimoe.compression import alignment, vectors
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts import swiglu
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.moe import MoE

SIZES: dict[str, Any] = {
    "vocab_size": 7,
    "width": 4,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 2,
    "context": 5,
    "experts": 4,
    "expert_width": 5,
}
CONFIG = ModelConfig(**SIZES)
SHARED = ModelConfig(**SIZES, shared_experts=2)


def drawn_expert(rng: np.random.Generator, D: int = 4, F: int = 5) -> Experts:
    return Experts(*rng.standard_normal((2, D, F)), rng.standard_normal((F, D)))


def output(expert: Experts, x: np.ndarray) -> np.ndarray:
    return swiglu.forward(alignment.stack([expert]), x, [len(x)])[0]


def disguised(rng: np.random.Generator, expert: Experts) -> Experts:
    """The same function: neurons in another order, with scales from 0.1 to 10 and signs."""
    F = expert.w_up.shape[1]
    c = 10 ** rng.uniform(-1, 1, F) * rng.choice([-1, 1], F)
    order = rng.permutation(F)
    return Experts(expert.w_gate[:, order], (expert.w_up * c)[:, order], (expert.w_down / c[:, None])[order])


def disguised_mixture(rng: np.random.Generator, moe: MoE) -> MoE:
    E = len(moe.experts.w_up)
    order = rng.permutation(E)
    found = [disguised(rng, alignment.expert(moe.experts, e)) for e in order]
    shared = moe.shared and alignment.stack([disguised(rng, alignment.expert(moe.shared, 0))])
    return MoE(tree.map(lambda leaf: leaf[:, order], moe.router), alignment.stack(found), shared)


def disguised_decoder(rng: np.random.Generator, params: Decoder) -> Decoder:
    return params._replace(
        blocks=[block._replace(moe=disguised_mixture(rng, block.moe)) for block in params.blocks]
    )


@given(seed=st.integers(0, 2**16), width=st.integers(1, 7))
def test_a_disguised_expert_is_found_again(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    expert = drawn_expert(rng, F=width)
    other = disguised(rng, expert)
    x = rng.standard_normal((6, 4))
    np.testing.assert_allclose(output(other, x), output(expert, x), atol=1e-11)
    assert_close(alignment.neurons(expert, other), expert, atol=1e-12)


@given(seed=st.integers(0, 2**16), dead=st.sampled_from(["", "w_gate", "w_up", "w_down", "both"]))
def test_aligning_changes_no_function(seed: int, dead: str) -> None:
    """Nor does it divide by zero at a neuron that has died, in either of the two experts."""
    rng = np.random.default_rng(seed)
    to, other = drawn_expert(rng), drawn_expert(rng)
    for expert in (to, other):
        for name in ("w_up", "w_down") if dead == "both" else ([dead] if dead else []):
            leaf = getattr(expert, name)
            (leaf[2] if name == "w_down" else leaf[:, 2])[...] = 0
    x = rng.standard_normal((6, 4))
    np.testing.assert_allclose(output(alignment.neurons(to, other), x), output(other, x), atol=1e-11)


@given(seed=st.integers(0, 2**16))
def test_no_order_and_no_signs_are_closer(seed: int) -> None:
    """Against every order and every choice of signs, in the balanced form."""
    rng = np.random.default_rng(seed)
    to, other = drawn_expert(rng, 2, 3), drawn_expert(rng, 2, 3)
    a, b = (alignment.scaled(one, alignment.balance(one)) for one in (to, other))
    best = max(
        (a.w_gate * b.w_gate[:, p]).sum()
        + sum(s[i] * (a.w_up[:, i] @ b.w_up[:, p[i]] + a.w_down[i] @ b.w_down[p[i]]) for i in range(3))
        for p in map(list, itertools.permutations(range(3)))
        for s in itertools.product([-1, 1], repeat=3)
    )
    found = alignment.match(to, other)
    assert found.value == pytest.approx(best, rel=1e-12)
    aligned = alignment.neurons(to, other)
    c = alignment.balance(aligned)
    reached = sum((mine * theirs).sum() for mine, theirs in zip(a, alignment.scaled(aligned, c), strict=True))
    assert reached == pytest.approx(best, rel=1e-12)


def test_balanced_neurons_have_equal_norms(rng: np.random.Generator) -> None:
    expert = disguised(rng, drawn_expert(rng))
    up, down = alignment.scaled(expert, alignment.balance(expert))[1:]
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1), rtol=1e-12)


def test_the_scales_become_those_of_the_first(rng: np.random.Generator) -> None:
    to, other = drawn_expert(rng), drawn_expert(rng)
    aligned = alignment.neurons(to, other)
    np.testing.assert_allclose(alignment.balance(aligned), alignment.balance(to), rtol=1e-12)


@pytest.mark.parametrize("config", [CONFIG, SHARED])
def test_copies_in_another_order_merge_to_the_original_after_alignment_and_not_before(config: ModelConfig) -> None:
    rng = np.random.default_rng(3)
    params = drawn(rng, config)
    copy = disguised_decoder(rng, params)
    tokens = rng.integers(7, size=(2, 5))

    def logits(of: Decoder) -> np.ndarray:
        return decoder.forward(of, tokens, config).logits

    np.testing.assert_allclose(logits(copy), logits(params), atol=1e-10)
    aligned = alignment.decoder(params, copy, config)
    assert_close(aligned, params, atol=1e-11)
    assert_close(vectors.merge([params, aligned]), params, atol=1e-11)
    assert abs(logits(vectors.merge([params, copy])) - logits(params)).max() > 0.1


def test_experts_take_their_columns_of_the_router_with_them(rng: np.random.Generator) -> None:
    params, tokens = drawn(rng, CONFIG), rng.integers(7, size=(1, 5))
    other = drawn(rng, CONFIG)
    aligned = alignment.decoder(params, other, CONFIG)
    np.testing.assert_allclose(
        decoder.forward(aligned, tokens, CONFIG).logits, decoder.forward(other, tokens, CONFIG).logits, atol=1e-10
    )
    for mine, theirs in zip(aligned.blocks, other.blocks, strict=True):
        (order,) = np.argwhere((mine.moe.router.w_gate[0][:, None] == theirs.moe.router.w_gate[0]).T).T[1:]
        np.testing.assert_array_equal(mine.moe.router.w_noise[:, order], theirs.moe.router.w_noise)


def test_the_router_decides_between_equal_experts(rng: np.random.Generator) -> None:
    """Upcycled experts start equal: only their columns can tell them apart."""
    moe = drawn(rng, CONFIG).blocks[0].moe
    moe = moe._replace(experts=Experts(*(np.repeat(leaf[:1], 4, axis=0) for leaf in moe.experts)))
    assert_close(alignment.mixture(moe, disguised_mixture(rng, moe)), moe, atol=1e-11)


def test_a_shuffled_mixture_is_another_form_of_the_same_function(rng: np.random.Generator) -> None:
    params, tokens = drawn(rng, SHARED), rng.integers(7, size=(2, 5))
    other = params._replace(
        blocks=[block._replace(moe=alignment.shuffled(rng, block.moe)) for block in params.blocks]
    )
    np.testing.assert_allclose(
        decoder.forward(other, tokens, SHARED).logits, decoder.forward(params, tokens, SHARED).logits, atol=1e-11
    )
    for mine, theirs in zip(other.blocks, params.blocks, strict=True):
        for name in ("w_gate", "w_up", "w_down"):
            assert (getattr(mine.moe.experts, name) != getattr(theirs.moe.experts, name)).mean() > 0.5
        assert (np.sign(mine.moe.experts.w_up).sum() != np.sign(theirs.moe.experts.w_up).sum()).all()
    assert_close(alignment.decoder(params, other, SHARED), params, atol=1e-11)


def test_float32_stays(rng: np.random.Generator) -> None:
    low = [tree.map(lambda leaf: leaf.astype(np.float32), drawn(rng, CONFIG)) for _ in range(2)]
    assert {leaf.dtype for leaf in tree.leaves(alignment.decoder(*low, CONFIG))} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"expert_kind": "zero_computation"}, "experts of kind 'zero_computation' have no neurons to align"),
        ({"router": "cosine"}, "the router 'cosine' does not give each expert a column .* noisy_top_k, switch, gshard"),
    ],
)
def test_what_has_no_order_is_refused(rng: np.random.Generator, changes: dict[str, Any], sentence: str) -> None:
    params = drawn(rng, CONFIG)
    with pytest.raises(UserError, match=sentence):
        alignment.decoder(params, params, ModelConfig(**{**SIZES, **changes}))
