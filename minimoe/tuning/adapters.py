"""Adapters of a whole decoder: which weights get one, how several become one, and how they are merged.

    adapted = adapters.add(params, rank=8, rng=rng)                  the same model to the bit, with fresh adapters
    adapters.trainable(adapted)                                      the names of the leaves that training changes
    plain = adapters.merge(adapted)                                  an ordinary decoder again

Adapters go on the four projections of attention and on the three matrices of every expert, shared experts included.
The router, the norms, the embedding and the output layer have none: a router that changes sends tokens to experts that
were not trained for them. Weights are chosen by their place in the tree and not by a pattern of names, in which "gate"
would mean both a router and a matrix of an expert.

Hu et al. 2021, arXiv 2106.09685.  Lesson: lessons/42_lora.ipynb
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from minimoe.compression import frozen
from minimoe.core import tree
from minimoe.core.arrays import Array, array_module
from minimoe.core.errors import UserError
from minimoe.layers import lora
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts import swiglu
from minimoe.layers.linear import Linear
from minimoe.layers.lora import Adapted

PARTS = ("attention", "experts")
"""The parts of a block that can have adapters."""


def add(
    params: Decoder,
    rank: int,
    *,
    rng: np.random.Generator,
    alpha: float | None = None,
    stabilized: bool = False,
    parts: Collection[str] = PARTS,
) -> Decoder:
    """``params`` with a fresh adapter on each weight of ``parts``; the base arrays are the same objects.

    ``alpha`` is 2 · rank unless it is given, and s is alpha/rank, or alpha/√rank if ``stabilized`` (rsLoRA).

    Raises:
        UserError: a part does not exist, the rank does not suit a matrix, alpha is not a positive number, or there are
            adapters already.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(
            f"{unknown[0]!r:.40} is no part that can have adapters: choose from {' and '.join(PARTS)}."
            if unknown
            else f"no part is named, so nothing would be trained: choose from {' and '.join(PARTS)}."
        )
    if adapted_leaves(params):
        raise UserError("the model has adapters already: merge them first, or put two together with concatenate.")
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise UserError(f"rank {rank!r:.40} is not possible: choose a whole number of at least 1.")
    alpha = 2.0 * rank if alpha is None else alpha
    if not (np.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha {alpha} is not possible: choose a positive number, such as {2 * rank}.")
    scale = lora.scaling(rank, alpha, stabilized)

    def adapt(name: str, part: str, weight: Array) -> Any:
        if part not in parts:
            return weight
        try:
            return lora.init(rng, weight, rank, scale)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    return at_each_weight(params, adapt)


def at_each_weight(params: Decoder, change: Callable[[str, str, Any], Any]) -> Decoder:
    """``params`` with ``change(name, part, weight)`` in the place of each weight that can have an adapter.

    ``part`` is one of ``PARTS``; ``weight`` is an array or an ``Adapted``.
    """
    blocks = []
    for i, block in enumerate(params.blocks):
        where = f"blocks[{i}]"

        def experts(branch: Any, name: str) -> Any:
            if isinstance(branch, swiglu.Experts):
                pairs = zip(branch._fields, branch, strict=True)
                return swiglu.Experts(*(change(f"{name}.{field}", "experts", stack) for field, stack in pairs))
            if branch is None:
                return None
            return branch._replace(feed_forward=experts(branch.feed_forward, f"{name}.feed_forward"))

        projections: dict[str, Any] = {  # norms of queries and keys, if there are any, stay as they are
            field: Linear(change(f"{where}.attention.{field}.weight", "attention", projection.weight))
            for field, projection in block.attention._asdict().items()
            if isinstance(projection, Linear)
        }
        moe = block.moe._replace(
            experts=experts(block.moe.experts, f"{where}.moe.experts"),
            shared=experts(block.moe.shared, f"{where}.moe.shared"),
        )
        blocks.append(block._replace(attention=block.attention._replace(**projections), moe=moe))
    return params._replace(blocks=blocks)


def adapted_weights(params: Decoder) -> dict[str, Adapted]:
    """Every adapted weight by its name, such as ``blocks[0].moe.experts.w_up``."""
    found: dict[str, Adapted] = {}

    def collect(name: str, part: str, weight: Any) -> Any:
        if isinstance(weight, Adapted):
            found[name] = weight
        return weight

    at_each_weight(params, collect)
    return found


def adapted_leaves(params: Decoder) -> list[str]:
    """The names of the A and B of all adapters, in the order of the leaves."""
    return [f"{name}.{matrix}" for name in adapted_weights(params) for matrix in ("a", "b")]


def trainable(params: Decoder) -> set[str]:
    """The names of the leaves that training changes: every A and every B, and nothing else."""
    return set(adapted_leaves(params))


def frozen_leaves(params: Decoder) -> set[str]:
    """The names of all other leaves: they get no update, no weight decay and no moments."""
    return {name for name, _ in tree.named_leaves(params)} - trainable(params)


def quantize(params: Decoder, scheme: str) -> Decoder:
    """The same adapters on quantised bases (QLoRA): ``scheme`` is ``"nf4"`` or ``"int8"``.

    Weights without an adapter, such as the router, stay as they are. The model's output changes, because the bases do.

    Raises:
        UserError: there is no such scheme, there are no adapters, or a base is quantised already.
    """
    adapted = adapted_weights(params)
    if not adapted or any(isinstance(weight.base, tuple) for weight in adapted.values()):
        problem = "a base is quantised already" if adapted else "the model has no adapters"
        raise UserError(f"{problem}, and only adapters on a base in floating point can get another base: add them.")
    done: Decoder = lora.replace(params, lambda weight: _on_codes(weight, scheme))
    return done


def _on_codes(weight: Adapted, scheme: str) -> Adapted:
    return weight._replace(base=frozen.freeze(weight.base.astype(np.float32, copy=False), scheme))


def merge(params: Decoder, into: str = "float") -> Decoder:
    """An ordinary decoder with W + s AB in the place of each adapted weight, exact to rounding.

    A quantised base is dequantised first, so the result is larger than the codes. Merging back into codes is refused:
    a correction is small compared with the step between two codes, so most of it would be rounded away.

    Raises:
        UserError: ``into`` is not ``"float"``.
    """
    if into in frozen.SCHEMES:
        raise UserError(
            f"an adapter cannot be merged into {into} codes, because rounding loses much of so small a correction: "
            "merge into float, or keep the adapter beside the codes."
        )
    if into != "float":
        raise UserError(f"{into!r:.40} is not a form that adapters can be merged into: choose float.")
    merged: Decoder = lora.replace(params, lora.merged)
    return merged


def concatenate(models: Sequence[Decoder], weights: Sequence[float] | None = None) -> Decoder:
    """Several adapters of one base as one: the correction is Σ weight · s AB, and the ranks add up.

    A and B are placed side by side, and a weight multiplies s. A sum of the A's times a sum of the B's would also
    contain the product of each A with each other B. The base is that of the first model, so a single adapter with
    weight 1 is returned as it is.

    Raises:
        UserError: there is no model; there is not one weight for each model, or a weight is not finite; or the models
            do not have adapters in the same places.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if not models or len(weights) != len(models) or not np.isfinite(weights).all():
        raise UserError(f"{len(models)} models with the weights {weights!r:.60}: give a finite number for each model.")
    everyones = [adapted_weights(model) for model in models]
    shapes = [{name: (w.a.shape[:-1], w.b.shape[-1]) for name, w in one.items()} for one in everyones]
    if any(shape != shapes[0] for shape in shapes) or not shapes[0]:
        raise UserError("the models do not have adapters on the same weights: choose adapters of one base model.")

    def together(name: str, part: str, weight: Any) -> Any:
        if not isinstance(weight, Adapted):
            return weight
        xp = array_module(weight.a)
        all_of = [one[name] for one in everyones]
        return weight._replace(
            a=xp.concatenate([w.a for w in all_of], axis=-1),
            b=xp.concatenate([w.b for w in all_of], axis=-2),
            scale=xp.concatenate([w.scale * factor for w, factor in zip(all_of, weights, strict=True)], axis=-1),
        )

    return at_each_weight(models[0], together)


def draw_dropout(params: Decoder, rate: float, rng: np.random.Generator) -> list[Array]:
    """The factors of dropout for the input of each adapter in one step: 0 with probability ``rate``, else 1/(1 − rate).

    One mask is drawn for each matrix, (D_in,) or (E, D_in) for a stack, and is the same for all tokens of a step. The
    masks therefore need not be sorted and sent to the experts with the tokens. A mask drops whole rows of A; in peft,
    each token has a mask of its own, and adapters of experts cannot have dropout.

    Raises:
        UserError: the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise UserError(f"dropout {rate} is not possible: choose a rate of at least 0 and below 1.")
    return [
        ((rng.random(w.a.shape[:-1]) >= rate) / (1 - rate)).astype(w.a.dtype) for w in adapted_weights(params).values()
    ]
