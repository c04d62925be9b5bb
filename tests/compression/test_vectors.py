"""Merging of vectors: values by hand, identities that are exact, an unbiased draw, and whole decoders."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn

from minimoe.compression import vectors
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.decoder import Decoder

CONFIG = ModelConfig(
    vocab_size=7, width=4, layers=2, heads=2, kv_heads=1, head_width=2, context=5, experts=3, expert_width=3
)


def models(count: int, config: ModelConfig = CONFIG, seed: int = 0) -> list[Decoder]:
    return [drawn(np.random.default_rng(seed + i), config) for i in range(count)]


def assert_equal(ours: Any, theirs: Any, atol: float = 0.0) -> None:
    for (name, a), b in zip(tree.named_leaves(ours), tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def test_an_average_is_weighted_by_shares() -> None:
    found = vectors.average([np.array([1.0, 2]), np.array([5.0, -2])], [3, 1])
    np.testing.assert_array_equal(found, [2, 1])
    np.testing.assert_allclose(vectors.average([np.array([1.0]), np.array([4.0]), np.array([7.0])]), [4], rtol=1e-15)


def test_slerp_by_hand() -> None:
    """A third of a right angle, between vectors of lengths 1 and 2: the lengths are not divided out."""
    found = vectors.slerp(np.array([1.0, 0]), np.array([0.0, 2]), 1 / 3)
    np.testing.assert_allclose(found, [math.sqrt(3) / 2, 1], rtol=1e-14)


@given(n=st.integers(1, 6), t=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_slerp_keeps_the_length_and_divides_the_angle(n: int, t: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, n + 1))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = math.acos(max(-1, min(1, a @ b)))
    found = vectors.slerp(a, b, t)
    if abs(a @ b) < vectors.PARALLEL:
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-9)
        assert a @ found == pytest.approx(math.cos(t * angle), abs=1e-9)
    assert_equal(vectors.slerp(a, b, 0.0), a, atol=1e-12)
    assert_equal(vectors.slerp(a, b, 1.0), b, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("factor", [1, 3, -1])
def test_slerp_of_parallel_vectors_is_on_the_line(size: float, factor: float) -> None:
    """sin 0 / sin 0 would be no number; equal vectors give themselves."""
    a = size * np.array([[1.0, -2, 3]])
    np.testing.assert_allclose(vectors.slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a, rtol=1e-14, atol=0)


def test_slerp_with_a_zero_vector_is_on_the_line() -> None:
    np.testing.assert_array_equal(vectors.slerp(np.zeros(2), np.array([4.0, 8]), 0.25), [1, 2])


def test_trim_keeps_the_largest_by_size() -> None:
    delta = np.array([[0.1, -3], [2, 0.2]])
    np.testing.assert_array_equal(vectors.trim(delta, 0.5), [[0, -3], [2, 0]])
    np.testing.assert_array_equal(vectors.trim(delta, 0.74), [[0, -3], [2, 0]])  # ⌊2.96⌋
    np.testing.assert_array_equal(vectors.trim(delta, 0.01), [[0, -3], [0, 0]])  # one at least
    np.testing.assert_array_equal(vectors.trim(delta, 1), delta)
    np.testing.assert_array_equal(vectors.trim(np.array([2.0, -2, 2]), 0.67), [2, -2, 0])  # the first of equals


def test_ties_by_hand() -> None:
    """Columns: all agree; the larger side wins, alone; two small ones outvote; no sign; trimmed in one, kept in the
    others."""
    deltas = [np.array([1.0, 5, -1, 2, 0]), np.array([3.0, -2, 4, -2, 6]), np.array([2.0, -1, -9, 0, 2])]
    np.testing.assert_array_equal(vectors.ties(deltas, 1), [2, 5, -5, 0, 4])


def test_ties_votes_with_what_the_trimming_left() -> None:
    """Untrimmed, −1 − 1 + 1.5 would elect the minus; in the first two vectors it is trimmed away."""
    deltas = [np.array([9.0, -1]), np.array([9.0, -1]), np.array([0.1, 1.5])]
    np.testing.assert_array_equal(vectors.ties(deltas, 0.5), [9, 1.5])


def test_weights_have_no_part_in_the_vote() -> None:
    """Weighted before the vote, 5·1 − 2·3 would elect the minus."""
    deltas = [np.array([5.0, 4]), np.array([-2.0, 8])]
    np.testing.assert_array_equal(vectors.ties(deltas, 1, [1, 3]), [5, 7])


@given(count=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_ties_of_equal_vectors_is_the_vector(count: int, seed: int) -> None:
    delta = np.random.default_rng(seed).standard_normal((3, 4))
    assert_equal(vectors.ties([delta] * count, 1), delta, atol=1e-15)
    assert_equal(vectors.ties([delta] * count, 0.3), vectors.trim(delta, 0.3), atol=1e-15)


@given(seed=st.integers(0, 2**16), keep=st.floats(0.05, 1))
def test_ties_knows_no_order_and_no_sign(seed: int, keep: float) -> None:
    deltas = list(np.random.default_rng(seed).standard_normal((3, 7)))
    found = vectors.ties(deltas, keep)
    assert_equal(vectors.ties(deltas[::-1], keep), found, atol=1e-15)
    assert_equal(vectors.ties([-delta for delta in deltas], keep), -found, atol=1e-15)


@pytest.mark.parametrize("keep", [0.2, 0.75])
def test_dare_is_unbiased(keep: float) -> None:
    """Over 4000 draws the mean is within five standard errors, whose size is known: √((1/keep − 1)/4000)·|δ|."""
    rng, delta = np.random.default_rng(5), np.array([1.0, -2, 0, 8])
    found = np.stack([vectors.dare(rng, delta, keep) for _ in range(4000)])
    np.testing.assert_array_less(abs(found.mean(0) - delta), 5 * abs(delta) * math.sqrt((1 / keep - 1) / 4000) + 1e-12)
    assert (found[:, 0] != 0).mean() == pytest.approx(keep, abs=0.03)
    assert set(np.round(found[:, 0], 12)) == {0, round(1 / keep, 12)}
    np.testing.assert_array_equal(vectors.dare(rng, delta, 1), delta)


@pytest.mark.parametrize("method", vectors.METHODS)
def test_merging_a_model_with_itself_changes_nothing(method: str) -> None:
    (base, model), count = models(2), 2 if method == "slerp" else 3
    found = vectors.merge([model] * count, method, base=base, keep=1)
    assert_equal(found, model, atol=1e-14)


def test_one_model_through_ties_is_itself() -> None:
    base, model = models(2)
    assert_equal(vectors.merge([model], "ties", base=base, keep=1), model, atol=1e-15)


def test_task_vectors_are_added_to_the_base() -> None:
    base, a, b = models(3)
    found = vectors.merge([a, b], "task", base=base, strength=0.5)
    assert_equal(found, tree.map(lambda o, x, y: o + 0.25 * (x - o) + 0.25 * (y - o), base, a, b), atol=1e-14)
    # at strength 1, the average
    assert_equal(vectors.merge([a, b], "task", base=base), vectors.merge([a, b]), atol=1e-14)
    assert_equal(vectors.merge([a, b], "ties", base=base, strength=0.0), base)


def test_each_matrix_is_merged_by_itself() -> None:
    """An expert's matrix has its own angle and its own share, whatever the other experts of the stack are."""
    base, a, b = models(3)
    by_slerp, by_ties = vectors.merge([a, b], "slerp", t=0.3), vectors.merge([a, b], "ties", base=base, keep=0.4)

    def up(model: Decoder, e: int) -> Any:
        return model.blocks[1].moe.experts.w_up[e]

    for e in range(3):
        assert_equal(up(by_slerp, e), vectors.slerp(up(a, e), up(b, e), 0.3), atol=1e-15)
        deltas = [up(a, e) - up(base, e), up(b, e) - up(base, e)]
        assert_equal(up(by_ties, e), up(base, e) + vectors.ties(deltas, 0.4), atol=1e-15)
    w = [model.blocks[0].attention.query.weight for model in (a, b)]
    assert_equal(by_slerp.blocks[0].attention.query.weight, vectors.slerp(*w, 0.3), atol=1e-15)


def test_dare_draws_from_the_generator() -> None:
    base, a, b = models(3)
    one, same, other = (
        vectors.merge([a, b], "dare", base=base, rng=np.random.default_rng(seed)).embedding.table for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


def test_the_type_stays() -> None:
    low = [tree.map(lambda leaf: leaf.astype(np.float32), model) for model in models(3)]
    for method in vectors.METHODS:
        found = vectors.merge(low[:2], method, base=low[2])
        assert {leaf.dtype for leaf in tree.leaves(found)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("count", "method", "changes", "sentence"),
    [
        (2, "mean", {}, "no method 'mean': choose one of average, slerp, task, ties, dare"),
        (3, "slerp", {}, "slerp merges 2 models, not 3"),
        (1, "average", {}, "1 models are too few to merge: give at least 2"),
        (2, "ties", {"base": None}, "ties merges what models have learned since a common origin: name .*--base"),
        (2, "slerp", {"t": 1.1}, "t 1.1 is not between 0 .* and 1"),
        (2, "ties", {"keep": 0.0}, "keep 0.0 is not a share of the entries"),
        (2, "dare", {"keep": 1.5}, "keep 1.5 is not a share of the entries"),
        (2, "task", {"strength": math.inf}, "strength inf is not a finite number"),
    ],
)
def test_what_cannot_be_merged_is_refused(count: int, method: str, changes: dict[str, Any], sentence: str) -> None:
    base, *others = models(count + 1)
    with pytest.raises(UserError, match=sentence):
        vectors.merge(others, method, **{"base": base, **changes})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"expert_width": 5}, r"blocks\[0\].moe.experts.w_gate has the shape \(3, 4, 3\) in one model and \(3, 4, 5\)"),
        ({"tied_embeddings": True}, "a model has head.weight and another has not"),
    ],
)
def test_other_shapes_are_refused(change: dict[str, Any], sentence: str) -> None:
    mine, other = models(1)[0], models(1, ModelConfig(**{**vars(CONFIG), **change}))[0]
    for pair, base in (([mine, other], mine), ([mine, mine], other)):
        with pytest.raises(UserError, match=sentence):
            vectors.merge(pair, "task", base=base)
