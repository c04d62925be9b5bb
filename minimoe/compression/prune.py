"""Pruning: which experts of a layer can be left out, and the model without them. Nothing is trained afterwards.

    F'(x) = Σ_k w'_tk · Expert_{S'_tk}(x_t)      the layer with r of its E experts, and a router of r columns

Three methods choose the r experts of each layer:

    reconstruction   of all subsets of r experts, the one with the smallest ‖F'(x) − F(x)‖ on a sample of text
    frequency        the experts that the sample uses most
    random           r experts by chance, as a control

The output of every expert for every token of the sample is computed once. Then each subset costs only a routing and a
weighted sum. Every layer is given the input that it has in the whole model, so the experts of a layer are chosen
independently of the other layers.

A cheaper way keeps all experts but uses fewer: a token leaves out its second expert if the weight of this expert is
small beside that of the first. See ``median_ratios``, ``Mode.skip_below`` and ``routing.skip_second``.

Lu et al. 2024, arXiv 2402.14800.  Lesson: lessons/51_distillation_and_pruning.ipynb
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, placeholder, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError, suggestion
from minimoe.core.ids import checked
from minimoe.core.summary import brief
from minimoe.inference import reading
from minimoe.layers import dense, moe, routing
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.moe import MoE

METHODS = ("reconstruction", "frequency", "random")

SUBSETS = 20_000
"""The largest number of subsets that are compared in a layer."""


@brief
class Layer(NamedTuple):
    """What a layer does on the sample of N tokens; shared experts are left out, because they stay."""

    x: Array  # (B, T, D)  its input
    tokens: Array  # (B, T)
    outputs: Array  # (E, N, D)  of every expert, for every token
    y: Array  # (N, D)  what the chosen experts answer together
    counts: list[int]  # E: how often each expert was chosen


@brief
class Pruned(NamedTuple):
    """A model with fewer experts."""

    params: Decoder
    config: ModelConfig
    kept: list[list[int]]  # L, less the dense layers: the experts that stayed, by their number in the model before
    errors: list[float]  # as many: ‖F'(x) − F(x)‖ / ‖F(x)‖ on the sample; 0 if the layer answers 0


def prune(
    params: Decoder,
    config: ModelConfig,
    tokens: Array,
    keep: int,
    method: str = "reconstruction",
    seed: int = 0,
    report: Callable[[int], None] = lambda layer: None,
) -> Pruned:
    """The model with ``keep`` experts in each layer, chosen on the sample ``tokens`` (B, T) by ``method``.

    ``seed`` is used by the method ``random`` only. ``report`` is called with the number of each layer that is done.

    Raises:
        UserError: there is no such method; experts of this model cannot be removed, or not so many; there are too many
            subsets to compare; or ``tokens`` are not ids of the model's vocabulary.
    """
    check(config, keep, method)
    if seed < 0:
        raise UserError(f"seed {seed} is not a seed: choose a whole number of at least 0.")
    _check_sample(tokens, config)
    rng = np.random.default_rng(seed)
    kept, errors = [], []
    for i, (block, x) in enumerate(zip(params.blocks, inputs(params, config, tokens), strict=True)):
        if dense.is_dense(block.moe):
            continue
        layer = run(block.moe, x, tokens, config)
        best = choose(block.moe, layer, config, keep, method, rng)
        kept.append(best)
        size = _norm(layer.y)
        errors.append(error(block.moe, layer, config, best) / size if size else 0.0)
        report(i)
    return Pruned(*remove(params, config, kept), kept, errors)


def check(config: ModelConfig, keep: int, method: str = "reconstruction") -> None:
    """Raises ``UserError`` unless ``method`` can choose ``keep`` experts of each layer of a model of this config."""
    if method not in METHODS:
        raise UserError(
            f"there is no method {method!r:.40}{suggestion(str(method), METHODS)}: choose one of {', '.join(METHODS)}."
        )
    if config.experts == 1:
        raise UserError("the model is dense and has no experts to remove: prune a mixture.")
    least = max(config.active_experts, 1)
    if not least <= keep <= config.experts:
        raise UserError(
            f"keep {keep} is not possible: the model has {config.experts} experts per layer, of which each token uses "
            f"{config.active_experts}; choose a number from {least} to {config.experts}."
        )
    if getattr(moe.router_of(config), "BY_TABLE", False):
        raise UserError(
            f"the router {config.router!r} finds the experts of a token in a fixed table, from which none can be "
            "removed: prune a model with another router."
        )
    if config.expert_groups > 1:
        raise UserError(
            f"the router divides the experts into {config.expert_groups} groups of equal size, which pruning would "
            "change: prune a model with expert_groups 1."
        )
    if config.expert_kind != "swiglu":
        raise UserError(
            f"experts of the kind {config.expert_kind!r} are not alike, so the config cannot say which of them are "
            "left: prune a model with expert_kind 'swiglu'."
        )
    moe.check_forward(dataclasses.replace(config, experts=keep))
    subsets = math.comb(config.experts, keep)
    if method == "reconstruction" and subsets > SUBSETS:
        raise UserError(
            f"{keep} of {config.experts} experts can be chosen in {subsets:,} ways, and at most {SUBSETS:,} are "
            "compared: choose another number, or the method frequency."
        )


def inputs(params: Decoder, config: ModelConfig, tokens: Array) -> list[Array]:
    """tokens (B, T) → the input (B, T, D) of the mixture of each layer."""
    xp = array_module(params.norm.gain)
    pieces = [
        found.blocks for _, found in reading.read(params, config, tokens, keep=lambda cache: cache.moe_norm.x_hat)
    ]
    return [
        block.moe_norm.gain * xp.concatenate(x_hat, axis=1)
        for block, x_hat in zip(params.blocks, zip(*pieces, strict=True), strict=True)
    ]


def run(params: MoE, x: Array, tokens: Array, config: ModelConfig) -> Layer:
    """x (B, T, D), the input of a layer, and its ``tokens`` (B, T) → every expert's output for every token."""
    xp = array_module(x)
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    outputs = xp.empty((config.experts, *rows.shape), x.dtype)
    for e in range(config.experts):
        counts = [len(rows) if other == e else 0 for other in range(config.experts)]
        outputs[e] = moe.experts_of(config).forward(params.experts, rows, counts)[0]
    made = moe.router_of(config).forward(params.router, x, config, _mode(tokens))[0]
    return Layer(x, tokens, outputs, _answer(made, outputs, range(config.experts)), made.counts)


def choose(
    params: MoE, layer: Layer, config: ModelConfig, keep: int, method: str, rng: np.random.Generator
) -> list[int]:
    """The numbers of ``keep`` experts of one layer, in ascending order; the first of equally good choices."""
    if method == "frequency":
        return sorted(sorted(range(config.experts), key=lambda e: -layer.counts[e])[:keep])
    if method == "random":
        chosen: list[int] = sorted(rng.choice(config.experts, keep, replace=False).tolist())
        return chosen
    subsets = [list(subset) for subset in combinations(range(config.experts), keep)]
    return min(subsets, key=lambda kept: error(params, layer, config, kept))


def error(params: MoE, layer: Layer, config: ModelConfig, kept: Sequence[int]) -> float:
    """‖F'(x) − F(x)‖, the Frobenius norm over all tokens of the sample, if only the experts ``kept`` are left.

    The router chooses among the experts that are left, so a token that loses an expert gets its next best one.
    """
    smaller = dataclasses.replace(config, experts=len(kept))
    router = _router(params.router, config, kept)
    made = moe.router_of(config).forward(router, layer.x, smaller, _mode(layer.tokens))[0]
    return _norm(_answer(made, layer.outputs, kept) - layer.y)


def remove(params: Decoder, config: ModelConfig, kept: Sequence[Sequence[int]]) -> tuple[Decoder, ModelConfig]:
    """The model with only the experts ``kept[i]`` in mixture i, and its config; routers lose the other columns."""
    first = config.dense_layers
    blocks = list(params.blocks[:first])
    for block, of_layer in zip(params.blocks[first:], kept, strict=True):
        experts = tree.map(lambda leaf, which=of_layer: _take(leaf, which, 0), block.moe.experts)
        router = _router(block.moe.router, config, of_layer)
        blocks.append(block._replace(moe=block.moe._replace(router=router, experts=experts)))
    return params._replace(blocks=blocks), dataclasses.replace(config, experts=len(kept[0]))


def median_ratios(params: Decoder, config: ModelConfig, tokens: Array) -> list[float]:
    """β of each layer: the median of w₂/w₁ over the sample ``tokens`` (B, T), w₁ and w₂ a token's two weights.

    With ``Mode.skip_below`` set to these numbers, about half of the tokens use only one expert.

    Raises:
        UserError: a token does not have two experts, or ``tokens`` are not ids of the model's vocabulary.
    """
    if config.active_experts != 2 or getattr(moe.router_of(config), "VARIES", False):
        raise UserError(
            f"a token of this model does not have two experts (router {config.router!r}, active_experts "
            f"{config.active_experts}), so it has no second one to skip: choose a model with two experts per token."
        )
    _check_sample(tokens, config)
    found = []
    for block, x in zip(params.blocks, inputs(params, config, tokens), strict=True):
        if dense.is_dense(block.moe):  # which has no second expert
            found.append(0.0)
            continue
        made = moe.router_of(config).forward(block.moe.router, x, config, _mode(tokens))[0]
        weights = routing.by_token(made.weight, made.place)  # (N, 2)
        found.append(float(np.median(to_host(weights[:, 1] / weights[:, 0]))))
    return found


def _check_sample(tokens: Array, config: ModelConfig) -> None:
    if not checked(tokens, config.vocab_size, axes=(2,), what="The ids of the sample").size:
        raise UserError("the sample is empty: give at least one sequence of one token.")


def _mode(tokens: Array) -> Mode:
    return Mode(estimate_load=False, labels=tokens)


def _answer(made: routing.Routing, outputs: Array, kept: Sequence[int]) -> Array:
    """The weighted sum (N, D) for a routing among the experts ``kept``, from the outputs (E, N, D) of all experts."""
    expert = array_module(outputs).asarray(np.repeat(np.asarray(kept), made.counts))  # (M,)
    return routing.combine(outputs[expert, made.token], made.place, routing.by_token(made.weight, made.place))


def _norm(x: Array) -> float:
    """The Frobenius norm."""
    return float((x * x).sum() ** 0.5)


def _router(router: Any, config: ModelConfig, kept: Sequence[int]) -> Any:
    """The parameters of a router for the experts ``kept`` alone.

    A router states its shapes (``blank``). The axis that becomes shorter with fewer experts is the axis of the experts:
    the columns of w_gate (D, E), for example.
    """
    module = moe.router_of(config)

    def shapes(experts: int) -> Any:
        return module.blank(dataclasses.replace(config, experts=experts), placeholder)

    def cut(leaf: Array, before: Array, one_more: Array) -> Array:
        axes = [axis for axis, size in enumerate(before.shape) if one_more.shape[axis] != size]
        return _take(leaf, kept, axes[0]) if axes else leaf

    return tree.map(cut, router, shapes(config.experts), shapes(config.experts + 1))


def _take(leaf: Array, kept: Sequence[int], axis: int) -> Array:
    return leaf.take(array_module(leaf).asarray(np.asarray(kept)), axis=axis)
