"""One token through the decoder: only the arithmetic of the layers.

The layers sort tokens by expert, mask the future and keep what backward needs. For one token of one sequence there is
nothing to sort, to mask or to keep, and that bookkeeping takes several times as long as the arithmetic. Without it,
generation is several times faster. Routers and experts come from the tables in ``moe``. The plain form is
``decoder.forward``, and tests compare the two.
"""

from __future__ import annotations

from typing import Any

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


@underflow_is_right
def forward(params: Decoder, cache: KVCache, token: int) -> Array:
    """One token, which is added to the cache of one sequence → logits (V,) of the next token."""
    config = cache.config
    xp = array_module(params.norm.gain)
    position = xp.arange(cache.position, cache.position + 1)
    cos, sin = (angle[0] for angle in rope.init(position, config.head_width, config.rope_theta, params.norm.gain.dtype))
    rotation = Rotation(xp.concatenate((cos, cos), axis=1), xp.concatenate((-sin, sin), axis=1))  # (1, C) each
    x = params.embedding.table[token]  # (D,)
    for block, past in zip(params.blocks, cache.layers, strict=True):
        normed = _norm(block.attention_norm, x, config.norm_eps)
        x = x + _attention(block.attention, normed, rotation, past, config.norm_eps)
        x = x + _moe(block.moe, _norm(block.moe_norm, x, config.norm_eps), config, token)
    cache.position += 1
    return _norm(params.norm, x, config.norm_eps) @ decoder.output_layer(params).weight


def _norm(params: RMSNorm, x: Array, eps: float) -> Array:
    """x (D,) → y (D,)."""
    return x * (params.gain / array_module(x).sqrt(x @ x / len(x) + eps))


def _attention(params: Attention, x: Array, rotation: Rotation, past: LayerCache, eps: float) -> Array:
    """x (D,) → y (D,). The newest token sees every position that the cache returns, so nothing is masked."""
    kv_heads, head_width = past.keys.shape[2:]
    q, _ = attention.normalised(params.query_norm, x @ params.query.weight, eps)
    k, _ = attention.normalised(params.key_norm, x @ params.key.weight, eps)
    qk = array_module(x).concatenate((q, k))
    qk = _turned(qk.reshape(-1, head_width), rotation)  # (H+G, C): one rotation for both
    v = (x @ params.value.weight).reshape(kv_heads, head_width)
    keys, values = past.append(qk[None, None, -kv_heads:], v[None, None])  # (1, S, G, C)
    q = qk[:-kv_heads].reshape(kv_heads, -1, head_width)  # (G, H/G, C)
    q *= head_width**-0.5
    weights = _softmax(q @ keys[0].transpose(1, 2, 0))  # (G, H/G, S)
    return (weights @ values[0].transpose(1, 0, 2)).reshape(-1) @ params.output.weight


def _turned(x: Array, rotation: Rotation) -> Array:
    """x (heads, C) → its pairs rotated by the angles of one position, as in ``rope.forward``. Changes x in place."""
    half = x.shape[1] // 2
    partners = array_module(x).concatenate((x[:, half:], x[:, :half]), axis=1)
    partners *= rotation.sin
    x *= rotation.cos
    x += partners
    return x


def _moe(params: MoE, x: Array, config: ModelConfig, token: int) -> Array:
    """x (D,) of a token → y (D,). If the router or the experts have no ``decode``, this calls ``moe.forward``."""
    if dense.is_dense(params):
        alone: Array = swiglu.decode(params.shared, x, [0], [1.0])
        return alone
    router: Any = moe.router_of(config)
    work = getattr(moe.experts_of(config), "decode", None)
    if work is None or not (hasattr(router, "decode") or hasattr(router, "decode_label")):
        y: Array = moe.forward(params, x[None, None], config, Mode(labels=array_module(x).full((1, 1), token))).y[0, 0]
        return y
    if hasattr(router, "decode"):
        chosen, weights = router.decode(params.router, x, config)
    else:
        chosen, weights = router.decode_label(params.router, x, config, token)
    decoded: Array = work(params.experts, x, chosen, weights)
    return decoded if params.shared is None else decoded + swiglu.decode(params.shared, x, [0], [1.0])


def _softmax(z: Array) -> Array:
    """Softmax along the last axis, in place."""
    z -= z.max(-1, keepdims=True)
    array_module(z).exp(z, out=z)
    z /= z.sum(-1, keepdims=True)
    return z
