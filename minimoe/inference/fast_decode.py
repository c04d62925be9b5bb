"""One token through the decoder: only the arithmetic of the layers, with everything else prepared once per text.

The layers sort tokens by expert, mask the future and keep what backward needs. For one token of one sequence there is
nothing to sort, to mask or to keep, and that bookkeeping takes several times as long as the arithmetic. Looking things
up and allocating small arrays, once per token and layer, also takes several times as long. A ``Plan`` does all this
once per text: it holds the matrices of query, key and value side by side, as one product; the buffer that this product
writes to, and views of its parts; the angles of many positions; and the functions of the router and the experts, which
come from the tables in ``moe``.

The plain form is ``decoder.forward``, and tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.inference.kv_cache import KVCache, LayerCache
from minimoe.layers import attention, decoder, dense, moe, rope
from minimoe.layers.attention import Attention
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts import swiglu
from minimoe.layers.mode import Mode
from minimoe.layers.moe import MoE
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.rope import Rotation

SIDE_BY_SIDE = 2**24
"""Up to this many numbers, the matrices of query, key and value are copied to stand side by side. In larger models the
products take most of the time, and a copy would only need memory."""

POSITIONS = 64
"""The angles of so many positions are computed together."""


Matrix = Callable[[], Array]
"""Gives a matrix when it is called: one that is kept in few bits becomes an array at each call, by its ``dense``."""


class Layer(NamedTuple):
    """What one layer needs for a token."""

    attention_gain: Array  # (D,)
    projections: list[tuple[Matrix, Array]]  # of query, key and value: a matrix (D, n), and where its product goes (n,)
    norms: list[tuple[RMSNorm, Array]]  # of queries and keys, if there are any, each with what it normalises (n,)
    output: Matrix  # (H·C, D)
    moe_gain: Array  # (D,)
    mixture: Callable[[Array, int], Array]  # x (D,) and its token → y (D,)


class Plan(NamedTuple):
    layers: list[Layer]
    head: Matrix  # (D, V)
    angles: dict[int, Rotation]  # by the number of a block: (POSITIONS, H+G, 2, C/2) each; only the newest is kept
    pairs: Array  # (H+G, 2, C/2)  queries and key, halved; a view of the buffer of the projections, as are the next
    partners: Array  # (H+G, 2, C/2)  a view with the halves exchanged
    queries: Array  # (G, H/G, C)
    key: Array  # (1, 1, G, C)
    value: Array  # (1, 1, G, C)
    turned: Array  # (H+G, 2, C/2)  for the rotation
    sqrt: Callable[[Any], Any]  # of a number: Python's on the host, and on a GPU one that does not wait for the number


@underflow_is_right
def forward(params: Decoder, cache: KVCache, token: int) -> Array:
    """One token, which is added to the cache of one sequence → logits (V,) of the next token.

    A cache belongs to the parameters that it was first used with.
    """
    config = cache.config
    if cache.plan is None:
        cache.plan = prepare(params, config)
    plan: Plan = cache.plan
    rotation = _angles(plan, config, cache.position)
    x = params.embedding.table[token]  # (D,)
    for layer, past in zip(plan.layers, cache.layers, strict=True):
        normed = _norm(plan, layer.attention_gain, x, config.norm_eps)
        x = x + _attention(plan, layer, normed, rotation, past, config.norm_eps)
        x = x + layer.mixture(_norm(plan, layer.moe_gain, x, config.norm_eps), token)
    cache.position += 1
    logits: Array = _norm(plan, params.norm.gain, x, config.norm_eps).dot(plan.head())
    return logits


def prepare(params: Decoder, config: ModelConfig) -> Plan:
    """The ``Plan``: everything that does not depend on the token."""
    xp, like = array_module(params.norm.gain), params.norm.gain
    heads, kv_heads, head_width = config.heads, config.kv_heads, config.head_width
    buffer = xp.empty((heads + 2 * kv_heads) * head_width, like.dtype)
    by_head = buffer.reshape(-1, head_width)
    queries_keys, value = by_head[: heads + kv_heads], by_head[heads + kv_heads :]
    pairs = queries_keys.reshape(heads + kv_heads, 2, -1)
    alike = sum(weight.size for block in params.blocks for weight in _matrices(block.attention))
    layers = [
        Layer(
            block.attention_norm.gain,
            _projections(block.attention, buffer, alike <= SIDE_BY_SIDE),
            _norms(block.attention, buffer, heads * head_width, kv_heads * head_width),
            _matrix(block.attention.output.weight),
            block.moe_norm.gain,
            _mixture(block.moe, config),
        )
        for block in params.blocks
    ]
    return Plan(
        layers,
        _matrix(decoder.output_layer(params).weight),
        {},
        pairs,
        pairs[:, ::-1],
        queries_keys[:heads].reshape(kv_heads, -1, head_width),
        queries_keys[heads:][None, None],
        value[None, None],
        xp.empty_like(pairs),
        math.sqrt if xp.__name__ == "numpy" else xp.sqrt,
    )


def _matrices(params: Attention) -> list[Array]:
    return [params.query.weight, params.key.weight, params.value.weight]


def prepared_bytes(config: ModelConfig, arrays: bool = True) -> int:
    """The bytes of a plan in float32, beside the parameters: angles, and query, key and value side by side.

    If the matrices are not ``arrays``, each product makes arrays of them, one layer at a time, and copies these arrays
    side by side. This takes twice the size of the matrices of one layer.
    """
    heads = config.heads + config.kv_heads
    of_layer = config.width * (heads + config.kv_heads) * config.head_width
    side_by_side = config.layers * of_layer <= SIDE_BY_SIDE
    copies = (config.layers if arrays else 2) * of_layer if side_by_side else 0
    return 4 * (copies + 2 * POSITIONS * heads * config.head_width)


def _matrix(weight: Any) -> Matrix:
    return weight.dense if hasattr(weight, "dense") else lambda: weight


def _projections(params: Attention, buffer: Array, side_by_side: bool) -> list[tuple[Matrix, Array]]:
    """One matrix for query, key and value or three, each with the part of the buffer that its product fills."""
    matrices = _matrices(params)
    if side_by_side:
        concatenate = array_module(buffer).concatenate
        if any(hasattr(weight, "dense") for weight in matrices):
            return [(lambda: concatenate([_matrix(weight)() for weight in matrices], axis=1), buffer)]
        return [(_matrix(concatenate(matrices, axis=1)), buffer)]
    places, start = [], 0
    for matrix in matrices:
        places.append((_matrix(matrix), buffer[start : start + matrix.shape[1]]))
        start += matrix.shape[1]
    return places


def _norms(params: Attention, buffer: Array, queries: int, keys: int) -> list[tuple[RMSNorm, Array]]:
    places = (buffer[:queries], buffer[queries : queries + keys])
    return [
        (norm, place)
        for norm, place in zip((params.query_norm, params.key_norm), places, strict=True)
        if norm is not None
    ]


def _angles(plan: Plan, config: ModelConfig, position: int) -> Rotation:
    """The cosines and signed sines of a position, (H+G, 2, C/2) each: those of the queries times 1/√C."""
    block, row = divmod(position, POSITIONS)
    if block not in plan.angles:
        xp, like = array_module(plan.pairs), plan.pairs
        positions = xp.arange(block * POSITIONS, (block + 1) * POSITIONS)
        cos, sin = rope.init(positions, config.head_width, config.rope_theta, like.dtype)  # (POSITIONS, 1, C/2)
        scale = xp.ones((len(like), 1, 1), like.dtype)
        scale[: config.heads] = config.head_width**-0.5  # the scores would be divided by √C
        plan.angles.clear()
        plan.angles[block] = Rotation(xp.stack((cos, cos), axis=2) * scale, xp.stack((-sin, sin), axis=2) * scale)
    cos, sin = plan.angles[block]
    return Rotation(cos[row], sin[row])


def _norm(plan: Plan, gain: Array, x: Array, eps: float) -> Array:
    """x (D,) → y (D,)."""
    return x * (gain * (1 / plan.sqrt(x.dot(x) / len(x) + eps)))


def _attention(plan: Plan, layer: Layer, x: Array, rotation: Rotation, past: LayerCache, eps: float) -> Array:
    """x (D,) → y (D,). The newest token sees every position that the cache returns, so nothing is masked."""
    for matrix, place in layer.projections:
        x.dot(matrix(), place)
    for norm, place in layer.norms:
        place[...], _ = attention.normalised(norm, place, eps)
    xp = array_module(x)
    xp.multiply(plan.partners, rotation.sin, out=plan.turned)  # the rotation of ``rope.forward``, of queries and key
    pairs = plan.pairs
    pairs *= rotation.cos
    pairs += plan.turned
    keys, values = past.append(plan.key, plan.value)  # (1, S, G, C)
    weights = plan.queries @ keys[0].transpose(1, 2, 0)  # (G, H/G, S)
    weights -= weights.max(-1, keepdims=True)
    xp.exp(weights, out=weights)
    gathered = weights @ values[0].transpose(1, 0, 2)  # (G, H/G, C)
    gathered /= weights.sum(-1, keepdims=True)  # after the product: a softmax, with fewer divisions
    y: Array = gathered.reshape(-1).dot(layer.output())
    return y


def _mixture(params: MoE, config: ModelConfig) -> Callable[[Array, int], Array]:
    """The MoE layer for one token. If the router or the experts have no ``decode``, it calls ``moe.forward``."""
    if dense.is_dense(params):
        return lambda x, _: swiglu.decode(params.shared, x, [0], [1.0])
    router: Any = moe.router_of(config)
    work = getattr(moe.experts_of(config), "decode", None)
    if work is None or not (hasattr(router, "decode") or hasattr(router, "decode_label")):

        def layer(x: Array, token: int) -> Array:
            mode = Mode(labels=array_module(x).full((1, 1), token))
            y: Array = moe.forward(params, x[None, None], config, mode).y[0, 0]
            return y

        return layer
    by_label = not hasattr(router, "decode")

    def decoded(x: Array, token: int) -> Array:
        if by_label:
            chosen, weights = router.decode_label(params.router, x, config, token)
        else:
            chosen, weights = router.decode(params.router, x, config)
        y: Array = work(params.experts, x, chosen, weights)
        return y if params.shared is None else y + swiglu.decode(params.shared, x, [0], [1.0])

    return decoded
