"""Attention: every token gathers values from earlier tokens, weighted by how well their keys match its query.

    A = softmax(q kᵀ / √C),    o = A v,    y = o W_o

Attention is causal: query i sees key j only if j ≤ i. With a sliding window w, i − j < w is a second condition. Queries
are grouped: each of the G key/value heads serves H/G of the H query heads, which makes the key/value cache H/G times
smaller.

Several documents may be packed into one sequence. Then j ≥ s_i is one more condition, where s_i is the first position
of the document of query i. Because RoPE depends only on i − j, each document is read as if it were alone, although its
positions do not begin at 0 (Krell et al. 2021).

Queries and keys may pass through an RMSNorm before they are rotated, each with gains of its own. This bounds the
scores, q·k/√C, however large the projections grow. The norm is taken over all heads of a token together (OLMoE) or in
each head separately, with the same C gains for every head (Qwen3).

The T × T weights are never stored for the whole sequence. Queries are processed a few rows at a time, together with
only the keys that they may see, and backward recomputes the weights from the log-sum-exp of each row (Dao et al. 2022).
The plain form, one softmax over all T × T scores, is in ``minimoe/reference.py``.

Vaswani et al. 2017, arXiv 1706.03762; Ainslie et al. 2023, arXiv 2305.13245 (grouped queries); Beltagy et al. 2020,
arXiv 2004.05150 (window); Dao et al. 2022, arXiv 2205.14135; Krell et al. 2021, arXiv 2107.02027 (packing); Dehghani
et al. 2023, arXiv 2302.05442 (norms of queries and keys).  Lesson: lessons/05_attention.ipynb
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import linear, rmsnorm, rope
from minimoe.layers.linear import Linear
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.rope import Rotation

ROWS = 64
"""Queries processed at a time: few enough to skip most of the masked half, enough for efficient matrix products."""


@tree.marks(matrices=("query", "key", "value", "output"))
class Attention(NamedTuple):
    query: Linear  # (D, H·C)
    key: Linear  # (D, G·C)
    value: Linear  # (D, G·C)
    output: Linear  # (H·C, D)
    query_norm: RMSNorm | None = None  # (H·C,) over all heads or (C,) in each head; None for no norm
    key_norm: RMSNorm | None = None  # (G·C,) or (C,)


class KeyValues(NamedTuple):
    """The rotated keys and the values of the positions up to the newest one."""

    keys: Array  # (B, S, G, C)
    values: Array  # (B, S, G, C)

    def append(self, keys: Array, values: Array) -> KeyValues:
        """New arrays: these keys and values, followed by those (B, T, G, C) of T further positions."""
        xp = array_module(keys)
        return KeyValues(xp.concatenate([self.keys, keys], axis=1), xp.concatenate([self.values, values], axis=1))


class Past(Protocol):
    """The keys and values of earlier positions: ``KeyValues``, or a cache that appends in place."""

    def append(self, keys: Array, values: Array) -> KeyValues: ...


class AttendCache(NamedTuple):
    q: Array  # (B, T, H, C)
    k: Array  # (B, S, G, C)
    v: Array  # (B, S, G, C)
    o: Array  # (B, T, H, C)
    log_sum_exp: Array  # (B, G, H/G, T)  of the scores of each query
    window: int | None
    starts: Array | None = None  # (B, T)


class Cache(NamedTuple):
    projected: linear.Cache  # one for query, key and value, which have the same input x
    attended: AttendCache
    merged: linear.Cache
    rotation: Rotation
    query_norm: rmsnorm.Cache | None = None
    key_norm: rmsnorm.Cache | None = None


def init(
    rng: np.random.Generator,
    width: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    output_std: float | None = None,
    dtype: DTypeLike = np.float32,
    qk_norm: str = "none",
) -> Attention:
    """Projections drawn from N(0, 1/inputs); ``output_std`` sets the standard deviation of the output projection.

    ``qk_norm`` is that of ``ModelConfig``; the gains of the norms are one.
    """
    gains = norm_widths(qk_norm, heads, kv_heads, head_width)
    return Attention(
        query=linear.init(rng, width, heads * head_width, dtype=dtype),
        key=linear.init(rng, width, kv_heads * head_width, dtype=dtype),
        value=linear.init(rng, width, kv_heads * head_width, dtype=dtype),
        output=linear.init(rng, heads * head_width, width, output_std, dtype=dtype),
        query_norm=rmsnorm.init(gains[0], dtype) if gains else None,
        key_norm=rmsnorm.init(gains[1], dtype) if gains else None,
    )


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Attention:
    """The parameters, each made by calling ``array`` with its shape."""
    D, queries, keys = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    shapes = ((D, queries), (D, keys), (D, keys), (queries, D))
    query, key, value, output = (Linear(array(shape)) for shape in shapes)
    gains = norm_widths(config.qk_norm, config.heads, config.kv_heads, config.head_width)
    return Attention(query, key, value, output, *(RMSNorm(array((width,))) for width in gains))


def norm_widths(qk_norm: str, heads: int, kv_heads: int, head_width: int) -> tuple[int, ...]:
    """How many gains the norm of the queries and that of the keys have; empty if there are no norms."""
    if qk_norm == "none":
        return ()
    return (head_width, head_width) if qk_norm == "per_head" else (heads * head_width, kv_heads * head_width)


def forward(
    params: Attention,
    x: Array,
    rotation: Rotation,
    head_width: int,
    window: int | None = None,
    past: Past | None = None,
    norm_eps: float = 1e-5,
    starts: Array | None = None,
) -> tuple[Array, Cache]:
    """x (B, T, D) → y (B, T, D).

    ``rotation`` holds the angles of the T positions of x. With ``past``, x continues a sequence whose keys and values
    are already known, and the queries of x see those keys too. ``norm_eps`` is the epsilon of the norms of queries and
    keys. ``starts`` (B, T) holds, for each query, the first position that it may see, which is at most its own; without
    ``starts``, every query may see from position 0 on. ``starts`` and ``past`` cannot be used together.

    Raises:
        UserError: ``starts`` does not let a query see its own position, or is given together with ``past``.
    """
    B, T, _ = x.shape
    heads = (B, T, -1, head_width)
    q, projected = linear.forward(params.query, x)
    k, _ = linear.forward(params.key, x)
    v, _ = linear.forward(params.value, x)
    q, query_norm = normalised(params.query_norm, q, norm_eps)
    k, key_norm = normalised(params.key_norm, k, norm_eps)
    q = rope.forward(rotation, q.reshape(heads))
    k = rope.forward(rotation, k.reshape(heads))
    v = v.reshape(heads)
    if past is not None:
        k, v = past.append(k, v)
    _check_starts(starts, past)
    o, attended = attend(q, k, v, window, starts)
    y, merged = linear.forward(params.output, o.reshape(B, T, -1))
    return y, Cache(projected, attended, merged, rotation, query_norm, key_norm)


def backward(params: Attention, cache: Cache, dy: Array) -> tuple[Array, Attention]:
    """dy (B, T, D) → dx (B, T, D) and the gradient of every projection.

    x is the input of query, key and value, so dx is the sum of their three gradients. A past is constant and gets no
    gradient. With norms, q = R(n ⊙ q̂), so the gradient goes back through the rotation R first, then through the norm.
    """
    B, T, _ = dy.shape
    do, d_output = linear.backward(params.output, cache.merged, dy)
    dq, dk, dv = attend_backward(cache.attended, do.reshape(cache.attended.o.shape))
    dq = rope.backward(cache.rotation, dq)
    dk = rope.backward(cache.rotation, dk[:, -T:])
    dq, d_query_norm = _normalised_backward(params.query_norm, cache.query_norm, dq)
    dk, d_key_norm = _normalised_backward(params.key_norm, cache.key_norm, dk)
    dx, d_query = linear.backward(params.query, cache.projected, dq.reshape(B, T, -1))
    dx_key, d_key = linear.backward(params.key, cache.projected, dk.reshape(B, T, -1))
    dx_value, d_value = linear.backward(params.value, cache.projected, dv[:, -T:].reshape(B, T, -1))
    dx += dx_key
    dx += dx_value
    return dx, Attention(d_query, d_key, d_value, d_output, d_query_norm, d_key_norm)


def normalised(params: RMSNorm | None, x: Array, eps: float) -> tuple[Array, rmsnorm.Cache | None]:
    """Queries or keys, one row of all heads per token (..., H·C) → the same shape, normalised; unchanged if no norm.

    The number of gains says what is normalised: H·C of them, a token's whole row; C of them, each head.
    """
    if params is None:
        return x, None
    y, cache = rmsnorm.forward(params, x.reshape(*x.shape[:-1], -1, len(params.gain)), eps)
    return y.reshape(x.shape), cache


def mixtral_tensors(params: Attention) -> Iterator[tuple[str, Array]]:
    """The names of the parameters within a layer of Mixtral's layout, each with a view in the shape used there.

    A Mixtral has no norms of queries and keys; the layouts that have such norms use the names given here.
    """
    for letter, projection in zip("qkvo", params[:4], strict=True):
        yield f"self_attn.{letter}_proj.weight", projection.weight.T
    for letter, norm in zip("qk", (params.query_norm, params.key_norm), strict=True):
        if norm is not None:
            yield f"self_attn.{letter}_norm.weight", norm.gain


@underflow_is_right
def attend(
    q: Array, k: Array, v: Array, window: int | None = None, starts: Array | None = None
) -> tuple[Array, AttendCache]:
    """q (B, T, H, C), k and v (B, S, G, C) → o (B, T, H, C). The queries belong to the last T of the S positions."""
    xp = array_module(q)
    B, T, H, _ = q.shape
    kv_heads = k.shape[2]
    o = xp.empty_like(q)
    log_sum_exp = xp.empty((B, kv_heads, H // kv_heads, T), q.dtype)
    for rows, columns in _tiles(T, k.shape[1], window, starts):
        scores = _scores(_stack(q[:, rows], kv_heads), k, rows, columns, window, starts)
        peak = scores.max(2, keepdims=True)  # (B, G, 1, H/G·rows)
        scores -= peak  # exp cannot overflow then
        weights = xp.exp(scores, out=scores)
        total = weights.sum(2, keepdims=True)
        o_rows = _transpose(weights) @ _heads_first(v[:, columns])
        o_rows /= _transpose(total)  # after the product, because o usually has fewer numbers than the weights
        o[:, rows] = _unstack(o_rows, H)
        log_sum_exp[..., rows] = (peak + xp.log(total)).reshape(B, kv_heads, H // kv_heads, -1)
    return o, AttendCache(q, k, v, o, log_sum_exp, window, starts)


@underflow_is_right
def attend_backward(cache: AttendCache, do: Array) -> tuple[Array, Array, Array]:
    """do (B, T, H, C) → dq (B, T, H, C), dk and dv (B, S, G, C).

    With Z = q kᵀ/√C and A = softmax(Z), the gradient of a row of Z is dZ = A ⊙ (dA − Σ_j A_j dA_j). Since dA = do vᵀ,
    that sum equals do · o, so A ⊙ dA is never summed:

        dv = Aᵀ do,    dZ = A ⊙ (do vᵀ − do·o),    dq = dZ k/√C,    dk = dZᵀ q/√C

    dk and dv are sums over the H/G query heads that share a key/value head.
    """
    q, k, v, o, log_sum_exp, window, starts = cache
    xp = array_module(q)
    B, T, H, _ = q.shape
    kv_heads = k.shape[2]
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    for rows, columns in _tiles(T, k.shape[1], window, starts):
        q_rows, do_rows, o_rows = (_stack(x[:, rows], kv_heads) for x in (q, do, o))  # (B, G, H/G·rows, C)
        scores = _scores(q_rows, k, rows, columns, window, starts)
        scores -= log_sum_exp[..., rows].reshape(B, kv_heads, 1, -1)
        weights = xp.exp(scores, out=scores)  # already normalised: exp(z − lse) = exp(z) / Σ exp(z)
        dv[:, columns] += _heads_first(weights @ do_rows)
        dscores = _heads_first(v[:, columns]) @ _transpose(do_rows)
        dscores -= xp.einsum("...c,...c->...", do_rows, o_rows)[:, :, None]
        dscores *= weights
        dq[:, rows] = _unstack(_transpose(dscores) @ _heads_first(k[:, columns]), H)
        dk[:, columns] += _heads_first(dscores @ q_rows)
    dq *= scale
    dk *= scale
    return dq, dk, dv


def _check_starts(starts: Array | None, past: Past | None) -> None:
    if starts is None:
        return
    if past is not None:
        raise UserError("a packed sequence (starts) cannot continue a past: read each document alone.")
    if isinstance(starts, np.ndarray) and (starts > np.arange(starts.shape[1])).any():  # elsewhere it would cost a wait
        i = int((starts > np.arange(starts.shape[1])).any(0).argmax())
        raise UserError(
            f"the query at position {i} starts at {int(starts[:, i].max())}, after itself: give each query the first "
            "position of its own document."
        )


def _tiles(queries: int, positions: int, window: int | None, starts: Array | None = None) -> list[tuple[slice, slice]]:
    """Slices of queries, each with the slice of positions that at least one of its queries may see."""
    past = positions - queries
    tiles = []
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        first_seen = 0 if window is None else max(0, past + start - window + 1)
        if starts is not None:
            first_seen = max(first_seen, int(starts[:, start:stop].min()))
        tiles.append((slice(start, stop), slice(first_seen, past + stop)))
    return tiles


def _scores(
    q_rows: Array, k: Array, rows: slice, columns: slice, window: int | None, starts: Array | None = None
) -> Array:
    """The scores k qᵀ/√C of one tile, −∞ where a query may not see a key: (B, G, columns, H/G·rows).

    They are computed transposed, one column per query. The sum and the maximum of a query's scores are then several
    times faster, because NumPy combines whole rows.
    """
    xp = array_module(k)
    scale = k.shape[-1] ** -0.5
    scores = _heads_first(k[:, columns]) @ _transpose(q_rows * scale)
    count = rows.stop - rows.start
    # Only this many keys, counted from the last, can be hidden from a query.
    partly = count if window is None else columns.stop - columns.start
    distance = xp.arange(columns.stop - count, columns.stop) - xp.arange(columns.stop - partly, columns.stop)[:, None]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    mask = xp.where(hidden, -np.inf, 0.0).astype(scores.dtype)  # (partly, rows)
    scores[:, :, -partly:] += xp.concatenate([mask] * (q_rows.shape[2] // count), axis=1)  # the same for every head
    if starts is not None:
        other = xp.arange(columns.start, columns.stop)[:, None] < starts[:, None, rows]  # (B, columns, rows)
        mask = xp.where(other, -np.inf, 0.0).astype(scores.dtype)
        scores += xp.concatenate([mask] * (q_rows.shape[2] // count), axis=2)[:, None]
    return scores


def _stack(x: Array, kv_heads: int) -> Array:
    """n rows (B, n, H, C) → the query heads that share a key/value head, one below the other: (B, G, H/G·n, C).

    They use the same keys and values, so each product with these is a single large one.
    """
    B, n, H, C = x.shape
    return x.reshape(B, n, kv_heads, H // kv_heads, C).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, -1, C)


def _unstack(x: Array, heads: int) -> Array:
    """The inverse of ``_stack``: (B, G, H/G·n, C) → (B, n, H, C)."""
    B, kv_heads, _, C = x.shape
    return x.reshape(B, kv_heads, heads // kv_heads, -1, C).transpose(0, 3, 1, 2, 4).reshape(B, -1, heads, C)


def _normalised_backward(
    params: RMSNorm | None, cache: rmsnorm.Cache | None, dy: Array
) -> tuple[Array, RMSNorm | None]:
    """The gradient of ``normalised``: dy of any shape, its numbers in the same order → dx of that shape, dgain."""
    if params is None or cache is None:
        return dy, None
    dx, dparams = rmsnorm.backward(params, cache, dy.reshape(cache.x_hat.shape))
    return dx.reshape(dy.shape), dparams


def _heads_first(x: Array) -> Array:
    """A view of (B, S, G, C) as (B, G, S, C), or the reverse."""
    return x.swapaxes(1, 2)


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)
