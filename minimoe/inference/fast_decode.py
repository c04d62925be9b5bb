"""One token through the decoder: the mathematics of layers/ once more, with nothing but the arithmetic.

The layers sort tokens by expert, mask the future and remember what backward needs. For one token of one sequence there
is nothing to sort, mask or remember, and that bookkeeping takes several times as long as the arithmetic. Leaving it
out makes generation several times faster; the tests hold every line to ``decoder.forward``.
"""

from __future__ import annotations

import math

from minimoe.arrays import Array, array_module, to_host
from minimoe.config import ModelConfig
from minimoe.kv_cache import KVCache, LayerCache
from minimoe.layers import decoder, rope, swiglu
from minimoe.layers.attention import Attention
from minimoe.layers.decoder import Decoder
from minimoe.layers.moe import MoE
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.rope import Rotation


def forward(params: Decoder, cache: KVCache, token: int) -> Array:
    """One token, which joins the cache of one sequence → logits (V,) of what comes next."""
    config = cache.config
    xp = array_module(params.norm.gain)
    position = xp.arange(cache.position, cache.position + 1)
    cos, sin = (angle[0] for angle in rope.init(position, config.head_width, config.rope_theta, params.norm.gain.dtype))
    rotation = Rotation(xp.concatenate((cos, cos), axis=1), xp.concatenate((-sin, sin), axis=1))  # (1, C) each
    x = params.embedding.table[token]  # (D,)
    for block, past in zip(params.blocks, cache.layers, strict=True):
        x = x + _attention(block.attention, _norm(block.attention_norm, x, config.norm_eps), rotation, past)
        x = x + _moe(block.moe, _norm(block.moe_norm, x, config.norm_eps), config)
    cache.position += 1
    return _norm(params.norm, x, config.norm_eps) @ decoder.output_layer(params).weight


def _norm(params: RMSNorm, x: Array, eps: float) -> Array:
    """x (D,) → y (D,)."""
    return x * (params.gain / array_module(x).sqrt(x @ x / len(x) + eps))


def _attention(params: Attention, x: Array, rotation: Rotation, past: LayerCache) -> Array:
    """x (D,) → y (D,). The newest token sees all that is in sight, so nothing is masked."""
    groups, head_width = past.keys.shape[2:]
    qk = array_module(x).concatenate((x @ params.query.weight, x @ params.key.weight))
    qk = _turned(qk.reshape(-1, head_width), rotation)  # (H+G, C): one rotation for both
    v = (x @ params.value.weight).reshape(groups, head_width)
    keys, values = past.append(qk[None, None, -groups:], v[None, None])  # (1, S, G, C)
    q = qk[:-groups].reshape(groups, -1, head_width)  # (G, H/G, C)
    q *= head_width**-0.5
    weights = _softmax(q @ keys[0].transpose(1, 2, 0))  # (G, H/G, S)
    return (weights @ values[0].transpose(1, 0, 2)).reshape(-1) @ params.output.weight


def _turned(x: Array, rotation: Rotation) -> Array:
    """x (heads, C), which is changed, → its pairs turned by one position's angle, as ``rope.forward`` does it."""
    half = x.shape[1] // 2
    partners = array_module(x).concatenate((x[:, half:], x[:, :half]), axis=1)
    partners *= rotation.sin
    x *= rotation.cos
    x += partners
    return x


def _moe(params: MoE, x: Array, config: ModelConfig) -> Array:
    """x (D,) → y (D,)."""
    xp = array_module(x)
    w_gate, w_up, w_down = params.experts
    chosen, weights = _route(to_host(x @ params.router.w_gate).tolist(), config)
    a, b = xp.empty((2, len(chosen), w_gate.shape[2]), x.dtype)  # (K, F)
    for k, e in enumerate(chosen):
        xp.matmul(x, w_gate[e], out=a[k])
        xp.matmul(x, w_up[e], out=b[k])
    a *= swiglu.sigmoid(a)
    a *= b
    y = xp.zeros(len(x), x.dtype)
    for k, e in enumerate(chosen):
        y += weights[k] * (a[k] @ w_down[e])
    return y


def _route(logits: list[float], config: ModelConfig) -> tuple[list[int], list[float]]:
    """The K chosen experts, ties to the lowest index, and their weights. On so few numbers plain Python is quickest."""
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: config.active_experts]
    exp = [math.exp(z - logits[chosen[0]]) for z in logits]
    total = sum(exp[e] for e in chosen) if config.renormalize else sum(exp)
    return chosen, [exp[e] / total for e in chosen]


def _softmax(z: Array) -> Array:
    """Softmax along the last axis."""
    z -= z.max(-1, keepdims=True)
    array_module(z).exp(z, out=z)
    z /= z.sum(-1, keepdims=True)
    return z
