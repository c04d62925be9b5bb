"""Attention against loops over heads, queries and keys; its window to the position; its cache at every split."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import attention, rope
from minimoe.layers.attention import ROWS, Attention, KeyValues
from minimoe.layers.linear import Linear
from minimoe.proof.gradcheck import check, failed


def attend_by_loops(q: Any, k: Any, v: Any, window: int | None) -> np.ndarray:
    """q (B, T, H, C), k and v (B, S, G, C): one head, one query, one key at a time."""
    B, T, H, C = q.shape
    past, share = k.shape[1] - T, H // k.shape[2]
    o = np.zeros_like(q)
    for b, t, h in np.ndindex(B, T, H):
        i = past + t
        seen = [j for j in range(i + 1) if window is None or i - j < window]
        scores = np.array([q[b, t, h] @ k[b, j, h // share] for j in seen]) / np.sqrt(C)
        weights = np.exp(scores - scores.max())
        for weight, j in zip(weights / weights.sum(), seen, strict=True):
            o[b, t, h] += weight * v[b, j, h // share]
    return o


def attend_forward(window: int | None) -> Any:
    def forward(params: None, x: Any) -> tuple[Any, Any]:
        q, k, v = x
        return attention.attend(q, k, v, window)

    return forward


def attend_backward(params: None, cache: Any, do: Any) -> tuple[Any, None]:
    return attention.attend_backward(cache, do), None


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "queries": st.integers(1, 6),
        "past": st.integers(0, 4),
        "kv_heads": st.integers(1, 2),
        "share": st.integers(1, 3),
        "pairs": st.integers(1, 2),
        "window": st.none() | st.integers(1, 11),
        "seed": st.integers(0, 99),
    }
)


def drawn(shape: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(shape["seed"])
    B, T, G, C = shape["batch"], shape["queries"], shape["kv_heads"], 2 * shape["pairs"]
    S = T + shape["past"]
    return (
        rng.standard_normal((B, T, G * shape["share"], C)),
        rng.standard_normal((B, S, G, C)),
        rng.standard_normal((B, S, G, C)),
    )


@given(shape=shapes)
def test_attend_equals_loops_over_heads_queries_and_keys(shape: dict[str, Any]) -> None:
    q, k, v = drawn(shape)
    o, _ = attention.attend(q, k, v, shape["window"])
    np.testing.assert_allclose(o, attend_by_loops(q, k, v, shape["window"]), atol=1e-13)


@given(shape=shapes)
def test_gradient_reaches_queries_keys_and_values_of_the_past_too(shape: dict[str, Any]) -> None:
    qkv = drawn(shape)
    rows = check("attend", attend_forward(shape["window"]), attend_backward, None, qkv, entries=6, directions=2)
    assert failed(rows) == []
    assert [row.tensor for row in rows] == ["x.0", "x.1", "x.2"]


@pytest.mark.parametrize("window", [None, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS])
def test_more_queries_than_one_tile_change_nothing(window: int | None) -> None:
    shape = {"batch": 1, "queries": 2 * ROWS + 3, "past": 5, "kv_heads": 1, "share": 2, "pairs": 2, "seed": 0}
    q, k, v = drawn(shape)
    o, _ = attention.attend(q, k, v, window)
    np.testing.assert_allclose(o, attend_by_loops(q, k, v, window), atol=1e-13)
    rows = check("attend", attend_forward(window), attend_backward, None, (q, k, v), entries=3, directions=3)
    assert failed(rows) == []


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_query_i_sees_key_j_exactly_if_i_minus_j_is_less_than_the_window(window: int) -> None:
    T = 7
    alike = np.zeros((1, T, 1, T))  # equal scores: the weights are 1/(number of keys seen)
    weights = attention.attend(alike, alike, np.eye(T)[None, :, None], window)[0][0, :, 0]
    for i, j in np.ndindex(T, T):
        assert (weights[i, j] > 0) == (0 <= i - j < window)


def test_scores_are_scaled_by_the_width_of_a_head() -> None:
    """q·k = 2 with C = 4 makes scores 1 and 0; the width of the model plays no part."""
    q = np.array([0, 0, 0, 2.0]).reshape(1, 1, 1, 4)
    k = np.array([[0, 0, 0, 1.0], [0, 0, 0, 0]]).reshape(1, 2, 1, 4)
    v = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]).reshape(1, 2, 1, 4)
    weight = attention.attend(q, k, v)[0][0, 0, 0, 0]
    assert abs(weight - np.e / (1 + np.e)) < 1e-15


def test_scores_of_ten_thousand_stay_finite_and_pick_the_best_key(rng: np.random.Generator) -> None:
    for dtype in (np.float32, np.float64):
        q, k, v = (100 * rng.standard_normal((3, 1, 5, 2, 4))).astype(dtype)
        o, cache = attention.attend(q, k, v)
        assert np.isfinite(o).all()
        assert all(np.isfinite(gradient).all() for gradient in attention.attend_backward(cache, np.ones_like(o)))
    q, k, v = np.full((1, 2, 1, 2), 100.0), np.full((1, 2, 1, 2), 100.0), np.array([1.0, 2, 3, 4]).reshape(1, 2, 1, 2)
    k[0, 0] = -100.0
    np.testing.assert_array_equal(attention.attend(q, k, v)[0][0, 1, 0], v[0, 1, 0])


def layer(rng: np.random.Generator, qk_norm: str = "none") -> Attention:
    """D 6, H 4, G 2, C 8: the heads together are wider than the model; every gain of a norm has a value of its own."""
    params = attention.init(rng, 6, heads=4, kv_heads=2, head_width=8, dtype=np.float64, qk_norm=qk_norm)
    for norm in (params.query_norm, params.key_norm):
        if norm is not None:
            norm.gain[:] = rng.uniform(0.5, 1.5, norm.gain.shape)
    return params


def rotation_of(start: int, stop: int) -> rope.Rotation:
    return rope.init(np.arange(start, stop), 8, dtype=np.float64)


@pytest.mark.parametrize(("window", "past"), [(None, 0), (3, 0), (None, 4), (3, 4)])
def test_gradient_reaches_every_projection(rng: np.random.Generator, window: int | None, past: int) -> None:
    earlier = KeyValues(*rng.standard_normal((2, 2, past, 2, 8))) if past else None
    rotation = rotation_of(past, past + 5)

    def forward(params: Attention, x: np.ndarray) -> tuple[Any, Any]:
        return attention.forward(params, x, rotation, 8, window, earlier)

    rows = check("attention", forward, attention.backward, layer(rng), rng.standard_normal((2, 5, 6)))
    assert failed(rows) == []
    assert {row.tensor for row in rows} == {"x", "query.weight", "key.weight", "value.weight", "output.weight"}


@pytest.mark.parametrize("qk_norm", ["whole", "per_head"])
@pytest.mark.parametrize("past", [0, 4])
def test_gradient_passes_the_norms_of_queries_and_keys(rng: np.random.Generator, qk_norm: str, past: int) -> None:
    """An epsilon of the size of the numbers, so that another one would be seen."""
    earlier = KeyValues(*rng.standard_normal((2, 2, past, 2, 8))) if past else None
    rotation = rotation_of(past, past + 5)

    def forward(params: Attention, x: np.ndarray) -> tuple[Any, Any]:
        return attention.forward(params, x, rotation, 8, 3, earlier, norm_eps=0.5)

    rows = check("attention", forward, attention.backward, layer(rng, qk_norm), rng.standard_normal((2, 5, 6)))
    assert failed(rows) == []
    assert {"query_norm.gain", "key_norm.gain"} <= {row.tensor for row in rows}
    assert min(row.largest for row in rows) > 1e-3


def by_heads(params: Attention, x: np.ndarray, eps: float) -> np.ndarray:
    """The whole layer, one token's row and one head at a time: the norms before the rotation, one for q, one for k."""
    B, T, _ = x.shape
    rotation = rotation_of(0, T)

    def rows(projection: Linear, norm: Any) -> np.ndarray:
        made = (x @ projection.weight).reshape(B, T, -1, 8)
        for b, t in np.ndindex(B, T):
            row = made[b, t]  # (heads, C)
            if norm is not None and norm.gain.size == row.size:
                row[:] = row / np.sqrt(np.square(row).sum() / row.size + eps) * norm.gain.reshape(row.shape)
            elif norm is not None:
                for head in row:
                    head[:] = head / np.sqrt(np.square(head).mean() + eps) * norm.gain
        return made

    q, k = rope.forward(rotation, rows(params.query, params.query_norm)), rows(params.key, params.key_norm)
    o = attend_by_loops(q, rope.forward(rotation, k), rows(params.value, None), None)
    return o.reshape(B, T, -1) @ params.output.weight


@pytest.mark.parametrize("qk_norm", ["whole", "per_head"])
def test_norms_of_queries_and_keys_equal_loops_over_tokens_and_heads(rng: np.random.Generator, qk_norm: str) -> None:
    params, x = layer(rng, qk_norm), rng.standard_normal((2, 5, 6))
    y, _ = attention.forward(params, x, rotation_of(0, 5), 8, norm_eps=0.3)
    np.testing.assert_allclose(y, by_heads(params, x, 0.3), atol=1e-13)
    y, _ = attention.forward(params, x, rotation_of(0, 5), 8)
    np.testing.assert_allclose(y, by_heads(params, x, 1e-5), atol=1e-13)


def test_a_norm_makes_the_scale_of_a_projection_irrelevant(rng: np.random.Generator) -> None:
    """Of every head by itself if each has a norm; only of all heads together if they share one."""
    x, rotation = rng.standard_normal((1, 5, 6)), rotation_of(0, 5)

    def change(qk_norm: str, columns: slice) -> float:
        params = layer(np.random.default_rng(1), qk_norm)
        before, _ = attention.forward(params, x, rotation, 8, norm_eps=0.0)
        params.query.weight[:, columns] *= 1e4
        after, _ = attention.forward(params, x, rotation, 8, norm_eps=0.0)
        assert np.isfinite(after).all()
        return float(abs(after - before).max())

    assert change("per_head", slice(8)) < 1e-12
    assert change("whole", slice(None)) < 1e-12
    assert change("whole", slice(8)) > 1e-3
    assert change("none", slice(None)) > 1e-3


def test_with_a_single_head_both_norms_are_the_same(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 5, 6))
    whole, each = (attention.init(np.random.default_rng(0), 6, 1, 1, 8, qk_norm=kind) for kind in ("whole", "per_head"))
    made = [attention.forward(params, x, rotation_of(0, 5), 8)[0] for params in (whole, each)]
    np.testing.assert_array_equal(*made)


def test_a_norm_survives_queries_and_keys_of_zero(rng: np.random.Generator) -> None:
    params = layer(rng, "per_head")
    params.query.weight[:] = params.key.weight[:] = 0
    y, cache = attention.forward(params, rng.standard_normal((1, 5, 6)), rotation_of(0, 5), 8)
    dx, _ = attention.backward(params, cache, np.ones_like(y))
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()


def test_norms_add_no_randomness_and_start_at_one() -> None:
    plain, normed = (attention.init(np.random.default_rng(3), 6, 4, 2, 8, qk_norm=kind) for kind in ("none", "whole"))
    assert (plain.query_norm, plain.key_norm) == (None, None)
    assert (plain.output.weight == normed.output.weight).all()
    assert normed.query_norm is not None
    assert normed.key_norm is not None
    assert (normed.query_norm.gain == np.ones(32)).all()
    assert (normed.key_norm.gain == np.ones(16)).all()
    assert set(tree.marked(normed, "matrices")) == {f"{name}.weight" for name in ("query", "key", "value", "output")}


@pytest.mark.parametrize("window", [None, 3])
def test_the_layer_equals_one_head_after_the_other(rng: np.random.Generator, window: int | None) -> None:
    params, x, rotation = layer(rng), rng.standard_normal((2, 5, 6)), rotation_of(0, 5)

    def head(projection: Linear, h: int) -> np.ndarray:
        return (x @ projection.weight[:, 8 * h : 8 * (h + 1)])[:, :, None]  # (B, T, 1, C)

    expected = np.zeros_like(x)
    for h in range(4):
        q = rope.forward(rotation, head(params.query, h))
        k = rope.forward(rotation, head(params.key, h // 2))
        o = attend_by_loops(q, k, head(params.value, h // 2), window)[:, :, 0]
        expected += o @ params.output.weight[8 * h : 8 * (h + 1)]
    y, _ = attention.forward(params, x, rotation, 8, window)
    np.testing.assert_allclose(y, expected, atol=1e-13)


def test_one_token_attends_to_itself(rng: np.random.Generator) -> None:
    params, x = layer(rng), rng.standard_normal((2, 1, 6))
    y, _ = attention.forward(params, x, rotation_of(0, 1), 8)
    value = (x @ params.value.weight).reshape(2, 1, 2, 8).repeat(2, axis=2).reshape(2, 1, 32)
    np.testing.assert_allclose(y, value @ params.output.weight, atol=1e-14)


@given(
    cuts=st.sets(st.integers(1, 8)),
    window=st.none() | st.integers(1, 10),
    trim=st.booleans(),
    qk_norm=st.sampled_from(["none", "whole", "per_head"]),
    seed=st.integers(0, 99),
)
def test_a_cache_gives_what_one_pass_gives_at_any_split_and_window(
    cuts: set[int], window: int | None, trim: bool, qk_norm: str, seed: int
) -> None:
    """``trim`` forgets the positions that no later query can see, as a rolling cache does."""
    rng = np.random.default_rng(seed)
    params, x = layer(rng, qk_norm), rng.standard_normal((2, 9, 6))
    whole, _ = attention.forward(params, x, rotation_of(0, 9), 8, window)
    past, parts = None, []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 9], strict=True):
        y, cache = attention.forward(params, x[:, start:stop], rotation_of(start, stop), 8, window, past)
        k, v = cache.attended.k, cache.attended.v
        forgotten = max(0, k.shape[1] - (window - 1)) if trim and window is not None else 0
        past = KeyValues(k[:, forgotten:], v[:, forgotten:])
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-13)


def test_a_later_token_changes_nothing_earlier(rng: np.random.Generator) -> None:
    params, x = layer(rng), rng.standard_normal((1, 6, 6))
    other = x.copy()
    other[:, 4] += 1.0
    before, _ = attention.forward(params, x, rotation_of(0, 6), 8)
    after, _ = attention.forward(params, other, rotation_of(0, 6), 8)
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-15)
    assert (abs(after[:, 4:] - before[:, 4:]) > 1e-6).any(axis=-1).all(), "but it changes itself and what follows"


@pytest.mark.parametrize("qk_norm", ["none", "whole", "per_head"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_blank_has_the_shapes_of_fresh_projections(rng: np.random.Generator, kv_heads: int, qk_norm: str) -> None:
    config = ModelConfig(width=6, heads=4, kv_heads=kv_heads, head_width=8, qk_norm=qk_norm)
    fresh = attention.init(rng, 6, 4, kv_heads, 8, qk_norm=qk_norm)
    blank = attention.blank(config, np.zeros)
    assert tree.map(np.shape, blank) == tree.map(np.shape, fresh)


def test_mixtral_s_names_are_views_of_every_projection(rng: np.random.Generator) -> None:
    """Mixtral keeps matrices as outputs × inputs."""
    params = attention.init(rng, 6, 4, 2, 8)
    named = dict(attention.mixtral_tensors(params))
    letters = {"q": params.query, "k": params.key, "v": params.value, "o": params.output}
    assert named.keys() == {f"self_attn.{letter}_proj.weight" for letter in letters}
    for letter, projection in letters.items():
        tensor = named[f"self_attn.{letter}_proj.weight"]
        assert (tensor == projection.weight.T).all()
        assert np.shares_memory(tensor, projection.weight)


def test_the_norms_have_names_only_where_there_are_norms(rng: np.random.Generator) -> None:
    params = layer(rng, "whole")
    named = dict(attention.mixtral_tensors(params))
    assert params.query_norm is not None
    assert params.key_norm is not None
    assert named.pop("self_attn.q_norm.weight") is params.query_norm.gain
    assert named.pop("self_attn.k_norm.weight") is params.key_norm.gain
    assert named.keys() == dict(attention.mixtral_tensors(layer(rng))).keys()


# Packed documents


def starts_of(lengths: list[int]) -> np.ndarray:
    """The first position that each query of a sequence of documents may see, (T,)."""
    ends = np.cumsum(lengths)
    return np.repeat(ends - lengths, lengths)


packings = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda row: sum(row) <= 9), min_size=1)


@given(rows=packings.filter(lambda rows: len(rows) <= 3), window=st.none() | st.integers(1, 9), seed=st.integers(0, 99))
def test_packed_documents_are_read_as_if_each_were_alone(rows: list[list[int]], window: int | None, seed: int) -> None:
    """Outputs, and the gradients of every query, key and value: RoPE depends only on the distance, so that positions
    need not begin again. What is left of a row is one document more."""
    rng, T = np.random.default_rng(seed), 10
    rows = [[*row, T - sum(row)] for row in rows]
    params = layer(rng)
    x, dy = rng.standard_normal((2, len(rows), T, 6))
    starts = np.stack([starts_of(row) for row in rows])
    y, cache = attention.forward(params, x, rotation_of(3, 3 + T), 8, window, starts=starts)
    dx, dparams = attention.backward(params, cache, dy)
    total = tree.zeros_like(params)
    for b, row in enumerate(rows):
        for start, length in zip(np.cumsum([0, *row[:-1]]), row, strict=True):
            place = slice(start, start + length)
            alone, of_one = attention.forward(params, x[b : b + 1, place], rotation_of(0, length), 8, window)
            np.testing.assert_allclose(y[b, place], alone[0], atol=1e-12)
            dx_alone, d_alone = attention.backward(params, of_one, dy[b : b + 1, place])
            np.testing.assert_allclose(dx[b, place], dx_alone[0], atol=1e-12)
            tree.accumulate(total, d_alone)
    for one, other in zip(tree.leaves(dparams), tree.leaves(total), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


@pytest.mark.parametrize("window", [None, 40])
def test_documents_that_cross_the_borders_of_tiles(rng: np.random.Generator, window: int | None) -> None:
    """Two sequences that begin their documents at different places: a tile reads from the earliest of both."""
    rows = [[ROWS - 3, ROWS + 5, 9], [10, 2 * ROWS + 1]]
    T = sum(rows[0])
    q, k, v = rng.standard_normal((3, 2, T, 2, 4))
    o, _ = attention.attend(q, k, v, window, np.stack([starts_of(row) for row in rows]))
    for b, row in enumerate(rows):
        for start, length in zip(np.cumsum([0, *row[:-1]]), row, strict=True):
            place = slice(start, start + length)
            alone = attend_by_loops(*(one[b : b + 1, place] for one in (q, k, v)), window)
            np.testing.assert_allclose(o[b, place], alone[0], atol=1e-13)


def test_the_gradient_of_packed_documents(rng: np.random.Generator) -> None:
    starts = np.stack([starts_of([2, 4, 1]), starts_of([5, 2])])

    def forward(params: Attention, x: np.ndarray) -> tuple[Any, Any]:
        return attention.forward(params, x, rotation_of(0, 7), 8, None, starts=starts)

    assert failed(check("packed", forward, attention.backward, layer(rng), rng.standard_normal((2, 7, 6)))) == []


def test_one_document_per_sequence_changes_no_bit(rng: np.random.Generator) -> None:
    q, k, v = rng.standard_normal((3, 2, ROWS + 7, 4, 8)).astype(np.float32)
    plain, _ = attention.attend(q, k, v)
    np.testing.assert_array_equal(attention.attend(q, k, v, None, np.zeros((2, ROWS + 7), int))[0], plain)


def test_tiles_begin_at_the_smallest_start_of_their_queries() -> None:
    starts = np.stack([starts_of([ROWS, ROWS]), starts_of([ROWS - 2, 2, ROWS])])
    first, second = attention._tiles(2 * ROWS, 2 * ROWS, None, starts)
    assert first[1] == slice(0, ROWS)
    assert second[1] == slice(ROWS, 2 * ROWS), "the first documents are not read again"
    assert attention._tiles(2 * ROWS, 2 * ROWS, 3, starts)[1][1] == slice(ROWS, 2 * ROWS)
    assert attention._tiles(2 * ROWS, 2 * ROWS, 3)[1][1] == slice(ROWS - 2, 2 * ROWS)


def test_starts_that_hide_a_query_from_itself_are_refused(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 4, 6))
    with pytest.raises(UserError, match="position 2 starts at 3, after itself"):
        attention.forward(layer(rng), x, rotation_of(0, 4), 8, starts=np.array([[0, 0, 3, 0]]))
    past = KeyValues(*rng.standard_normal((2, 1, 3, 2, 8)))
    with pytest.raises(UserError, match="cannot continue a past"):
        attention.forward(layer(rng), x, rotation_of(3, 7), 8, past=past, starts=np.zeros((1, 4), int))
