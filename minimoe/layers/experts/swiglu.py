"""SwiGLU experts: a stack of E feed-forward networks, each of which processes the tokens that were sent to it.

    a = x W_gate,    b = x W_up,    h = silu(a) ⊙ b,    y = h W_down,    silu(a) = a · sigmoid(a)

Tokens arrive sorted by expert, so the tokens of each expert are one contiguous segment of rows and need three large
matrix products. With one expert and one segment, this is the dense feed-forward layer of Llama and Mistral.

While an adapter is trained, each of the three stacks is a ``lora.Adapted``, and every expert has its own A and B.

Shazeer 2020, arXiv 2002.05202.  Lesson: lessons/06_swiglu_expert.ipynb
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.layers import lora
from minimoe.layers.lora import Adapted


@tree.marks(matrices=("w_gate", "w_up", "w_down"))
class Experts(NamedTuple):
    w_gate: Array  # (E, D, F)
    w_up: Array  # (E, D, F)
    w_down: Array  # (E, F, D)


class Cache(NamedTuple):
    x: Array  # (M, D)  sorted by expert
    a: Array  # (M, F)
    b: Array  # (M, F)
    segments: list[slice]  # E of them: the rows of each expert


def init(
    rng: np.random.Generator, config: ModelConfig, output_std: float | None = None, dtype: DTypeLike = np.float32
) -> Experts:
    """Weights drawn from N(0, 1/inputs); ``output_std`` sets the standard deviation of W_down."""

    def normal(inputs: int, outputs: int, std: float | None = None) -> Array:
        std = inputs**-0.5 if std is None else std
        return (std * rng.standard_normal((config.experts, inputs, outputs))).astype(dtype)

    return Experts(
        w_gate=normal(config.width, config.expert_width),
        w_up=normal(config.width, config.expert_width),
        w_down=normal(config.expert_width, config.width, output_std),
    )


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Experts:
    """The parameters, each made by calling ``array`` with its shape."""
    E, D, F = config.experts, config.width, config.expert_width
    return Experts(w_gate=array((E, D, F)), w_up=array((E, D, F)), w_down=array((E, F, D)))


def active_parameters(config: ModelConfig) -> int:
    """How many parameters of one layer are active for one token: those of K experts."""
    return config.active_experts * 3 * config.width * config.expert_width


@underflow_is_right
def forward(params: Experts, x: Array, counts: Sequence[int]) -> tuple[Array, Cache]:
    """x (M, D), the first ``counts[0]`` rows for expert 0 and so on → y (M, D).

    Rows after the last segment belong to no expert, and their y is zero.
    """
    if isinstance(params.w_gate, Adapted):
        return _adapted_forward(params, x, counts)
    xp = array_module(x)
    width = params.w_gate.shape[2]
    a, b = xp.empty((len(x), width), x.dtype), xp.empty((len(x), width), x.dtype)
    y = xp.empty_like(x)
    segments = segments_of(counts)
    for e, rows in enumerate(segments):
        if rows.start == rows.stop:
            continue
        xp.matmul(x[rows], params.w_gate[e], out=a[rows])
        xp.matmul(x[rows], params.w_up[e], out=b[rows])
        h = sigmoid(a[rows])
        h *= a[rows]
        h *= b[rows]
        xp.matmul(h, params.w_down[e], out=y[rows])
    y[sum(counts) :] = 0
    return y, Cache(x, a, b, segments)


@underflow_is_right
def backward(params: Experts, cache: Cache, dy: Array) -> tuple[Array, Experts]:
    """dy (M, D) → dx (M, D) and the gradient of every expert; zero for an expert without tokens.

    h = a s ⊙ b with s = sigmoid(a) and s' = s(1 − s), so for each expert

        dW_down = hᵀ dy,    dh = dy W_downᵀ
        db = dh ⊙ a s,      da = dh ⊙ b ⊙ s (1 + a (1 − s)) = dh ⊙ (h + s (b − h))
        dW_gate = xᵀ da,    dW_up = xᵀ db,    dx = da W_gateᵀ + db W_upᵀ
    """
    if isinstance(params.w_gate, Adapted):
        return _adapted_backward(params, cache, dy)
    xp = array_module(dy)
    grads = Experts(*(xp.empty_like(weight) for weight in params))
    dx = xp.empty_like(cache.x)
    for e, rows in enumerate(cache.segments):
        if rows.start == rows.stop:
            for gradient in grads:
                gradient[e] = 0
            continue
        x, a, b = cache.x[rows], cache.a[rows], cache.b[rows]
        s = sigmoid(a)
        silu = a * s
        h = silu * b
        xp.matmul(h.T, dy[rows], out=grads.w_down[e])
        dh = dy[rows] @ params.w_down[e].T
        # db is written over silu, and da over s, which are not needed any more.
        db = xp.multiply(dh, silu, out=silu)
        da = xp.multiply(s, b - h, out=s)
        da += h
        da *= dh
        xp.matmul(x.T, da, out=grads.w_gate[e])
        xp.matmul(x.T, db, out=grads.w_up[e])
        xp.matmul(da, params.w_gate[e].T, out=dx[rows])
        dx[rows] += db @ params.w_up[e].T
    dx[cache.segments[-1].stop :] = 0
    return dx, grads


def decode(params: Experts, x: Array, chosen: list[int], weights: list[float]) -> Array:
    """x (D,), one token → y (D,): the weighted sum over its chosen experts, computed one after the other."""
    xp = array_module(x)
    w_gate, w_up, w_down = params
    a, b = xp.empty((2, len(chosen), w_gate.shape[2]), x.dtype)  # (K, F)
    for k, e in enumerate(chosen):
        x.dot(w_gate[e], a[k])  # for one row, dot takes half the time of matmul
        x.dot(w_up[e], b[k])
    h = xp.tanh(0.5 * a)  # sigmoid(a) = (1 + tanh(a/2))/2; the factor 1/2 is taken together with the weight
    h += 1
    h *= a
    h *= b
    y = xp.zeros_like(x)
    for k, e in enumerate(chosen):
        h[k] *= 0.5 * weights[k]
        y += h[k].dot(w_down[e])
    return y


def mixtral_tensors(params: Experts, dense: bool) -> Iterator[tuple[str, Array]]:
    """The names of the parameters within a layer of Mixtral's layout, each with a view in the shape used there.

    ``dense`` chooses the names of Mistral, whose layers have a single expert.
    """
    w_gate, w_up, w_down = params
    if dense:
        yield "mlp.gate_proj.weight", w_gate[0].T
        yield "mlp.up_proj.weight", w_up[0].T
        yield "mlp.down_proj.weight", w_down[0].T
        return
    for e in range(len(w_gate)):
        yield f"block_sparse_moe.experts.{e}.w1.weight", w_gate[e].T
        yield f"block_sparse_moe.experts.{e}.w2.weight", w_down[e].T
        yield f"block_sparse_moe.experts.{e}.w3.weight", w_up[e].T


@underflow_is_right
def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)), computed with tanh, which cannot overflow."""
    xp = array_module(x)
    y = xp.tanh(0.5 * x)
    y += 1
    y *= 0.5
    return y


def segments_of(counts: Sequence[int]) -> list[slice]:
    """Counts of rows → consecutive slices of rows."""
    stops = np.cumsum(counts).tolist()
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _adapted_forward(params: Any, x: Array, counts: Sequence[int]) -> tuple[Array, Cache]:
    """``forward`` with an adapter on each of the three stacks."""
    xp = array_module(x)
    width = params.w_gate.b.shape[2]
    a, b = xp.empty((len(x), width), x.dtype), xp.empty((len(x), width), x.dtype)
    y = xp.zeros_like(x)
    segments = segments_of(counts)
    for e, rows in enumerate(segments):
        if rows.start == rows.stop:
            continue
        w_gate, w_up, w_down = (lora.expert(stack, e) for stack in params)
        a[rows], _ = lora.forward(w_gate, x[rows])
        b[rows], _ = lora.forward(w_up, x[rows])
        y[rows], _ = lora.forward(w_down, sigmoid(a[rows]) * a[rows] * b[rows])
    return y, Cache(x, a, b, segments)


def _adapted_backward(params: Any, cache: Cache, dy: Array) -> tuple[Array, Experts]:
    """``backward`` with the same formulas. An expert without tokens has a gradient of exactly zero."""
    grads: Any = Experts(*(lora.no_gradient(stack) for stack in params))  # type: ignore[arg-type]
    dx = array_module(dy).zeros_like(cache.x)
    for e, rows in enumerate(cache.segments):
        if rows.start == rows.stop:
            continue
        w_gate, w_up, w_down = (lora.expert(stack, e) for stack in params)
        x, a, b = (lora.Cache(cache.x[rows]), cache.a[rows], cache.b[rows])
        s = sigmoid(a)
        h = s * a * b
        dh, d_down = lora.backward(w_down, lora.Cache(h), dy[rows])
        dx_gate, d_gate = lora.backward(w_gate, x, dh * (h + s * (b - h)))
        dx_up, d_up = lora.backward(w_up, x, dh * (s * a))
        dx[rows] = dx_gate + dx_up
        for total, of_expert in zip(grads, (d_gate, d_up, d_down), strict=True):
            total.a[e], total.b[e] = of_expert.a, of_expert.b
    return dx, grads
