"""A dense layer: one SwiGLU that every token passes through, in place of a router and its experts.

    y_t = W_down (silu(W_gate x_t) ⊙ W_up x_t)

The first ``dense_layers`` layers of a model may be dense. The parameters of a dense layer are those of a mixture
without a router and without routed experts: it has only a shared expert, whose width is a setting of its own. So a
dense layer has no routing to report, no weights of experts and no balancing loss; the optimiser, checkpoints and counts
treat it like any other shared expert.

Dai et al. 2024, arXiv 2401.06066 (DeepSeekMoE, whose first layer is dense); Shazeer 2020, arXiv 2002.05202 (SwiGLU).
Lesson: lessons/06_swiglu_expert.ipynb
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers.experts import swiglu
from minimoe.layers.moe import MoE


def is_dense(params: MoE) -> bool:
    """Whether the parameters of a mixture are those of a dense layer."""
    return params.router is None


def init(
    rng: np.random.Generator, config: ModelConfig, residual: float = 1.0, dtype: DTypeLike = np.float32
) -> MoE:
    """Weights drawn from N(0, 1/inputs); those that write to the residual stream are smaller by ``residual``."""
    output_std = residual * config.width_of_dense**-0.5
    return MoE(None, None, swiglu.init(rng, config_of(config), output_std, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> MoE:
    """The parameters, each made by calling ``array`` with its shape."""
    return MoE(None, None, swiglu.blank(config_of(config), array))


def config_of(config: ModelConfig) -> ModelConfig:
    """The config of a single expert that is as wide as a dense layer."""
    return dataclasses.replace(
        config, experts=1, active_experts=1, expert_width=config.width_of_dense, shared_experts=0, dense_layers=0
    )


def forward(params: MoE, x: Array) -> tuple[Array, swiglu.Cache]:
    """x (B, T, D) → y (B, T, D)."""
    rows = x.reshape(-1, x.shape[-1])
    y, cache = swiglu.forward(params.shared, rows, [len(rows)])  # one expert, and every row is its own
    return y.reshape(x.shape), cache


def backward(params: MoE, cache: swiglu.Cache, dy: Array) -> tuple[Array, MoE]:
    """dy (B, T, D) → dx (B, T, D) and the gradient of the three matrices.

    Nothing weighs the output, so dy is the gradient of the SwiGLU's own output: see ``swiglu.backward``.
    """
    dx, dshared = swiglu.backward(params.shared, cache, dy.reshape(-1, dy.shape[-1]))
    return dx.reshape(dy.shape), MoE(None, None, dshared)
