"""Alignment: the same function has many parameters; choose those that are closest to another model's.

What can be changed in a mixture of SwiGLU experts without any change of its function:

    the order of an expert's F neurons    w_gate[:, π], w_up[:, π], w_down[π]
    the scale and sign of a neuron        w_up[:, f] · c,  w_down[f] / c  for any c ≠ 0; not w_gate: silu is not linear
    the order of the experts              with the columns of the router (where logits tie, the index decides)

``neurons``, ``mixture`` and ``decoder`` return another form of ``other`` with the same function. They choose the orders
that make a sum of products largest: each aligned parameter times the parameter of ``to`` at the same place. They choose
the scales that ``to`` has. The choice of orders is an assignment problem, within one expert and then between the
experts.

The orders of the attention heads and of the channels of the residual stream are left as they are, so two models can be
merged only if these orders already agree.

Ainsworth et al. 2023, arXiv 2209.04836 (Git Re-Basin); Li et al. 2024, arXiv 2310.01334 (M-SMoE).
Lesson: lessons/52_merging_and_upcycling.ipynb
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression.assignment import assign
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import dense
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.moe import MoE

ROUTERS = ("noisy_top_k", "switch", "gshard")
"""The routers whose parameters are columns, one for each expert, so that the experts can be put in another order."""


class Match(NamedTuple):
    """How the neurons of one expert are matched with those of another."""

    order: NDArray[np.int64]  # (F,)  the neuron of the other expert that belongs in each place
    value: float  # the sum of the products of matched parameters: larger is closer


def match(to: Experts, other: Experts) -> Match:
    """Two experts, without the axis of experts → the best order of the other's neurons.

    Both experts are balanced before they are compared, so their scales do not matter. Each pair of neurons gets the
    sign that fits better.
    """
    ours, theirs = scaled(to, balance(to)), scaled(other, balance(other))
    alike = ours.w_gate.T @ theirs.w_gate  # (F, F)
    alike += np.abs(ours.w_up.T @ theirs.w_up + ours.w_down @ theirs.w_down.T)
    found = assign(-alike)
    return Match(found.columns, -found.cost)


def balance(expert: Experts) -> NDArray[Any]:
    """c (F,) such that w_up · c and w_down / c have equal norms in each neuron; 1 where one of the two is zero."""
    into, out = np.linalg.norm(expert.w_up, axis=0), np.linalg.norm(expert.w_down, axis=1)
    alive = (into > 0) & (out > 0)
    c: NDArray[Any] = np.sqrt(np.where(alive, out, 1) / np.where(alive, into, 1))
    return c


def scaled(expert: Experts, c: NDArray[Any]) -> Experts:
    """The expert with w_up · c and w_down / c, for c (F,): the same function."""
    return Experts(expert.w_gate, expert.w_up * c, expert.w_down / c[:, None])


def neurons(to: Experts, other: Experts, order: NDArray[np.int64] | None = None) -> Experts:
    """``other``, one expert, with its neurons in the best or the given order, and with the scales and signs of ``to``.

    The function of the expert stays the same.
    """
    order = match(to, other).order if order is None else order
    ordered = Experts(other.w_gate[:, order], other.w_up[:, order], other.w_down[order])
    ours, theirs = scaled(to, balance(to)), scaled(ordered, balance(ordered))
    agree = (ours.w_up * theirs.w_up).sum(0) + (ours.w_down * theirs.w_down).sum(1)
    # Balanced, with the better sign, and then with the ratio between w_up and w_down that ``to`` has.
    return scaled(ordered, balance(ordered) / balance(to) * np.where(agree < 0, -1, 1).astype(agree.dtype))


def mixture(to: MoE, other: MoE) -> MoE:
    """``other`` with its experts, their neurons and the columns of its router in the order that fits ``to`` best.

    A dense layer has only its neurons to put in order.
    """
    shared = other.shared
    if shared is not None:
        shared = stack([neurons(expert(to.shared, 0), expert(shared, 0))])
    if dense.is_dense(to):
        return MoE(None, None, shared)
    count = len(to.experts.w_up)
    ours, theirs = _columns(to), _columns(other)
    matches = [[match(expert(to.experts, i), expert(other.experts, j)) for j in range(count)] for i in range(count)]
    values = np.array([[one.value for one in row] for row in matches]) + ours.T @ theirs
    chosen = assign(-values).columns
    found = [
        neurons(expert(to.experts, i), expert(other.experts, j), matches[i][j].order)
        for i, j in enumerate(chosen.tolist())
    ]
    router = tree.map(lambda leaf: leaf[:, chosen], other.router)
    return MoE(router, stack(found), shared)


def decoder(to: Decoder, other: Decoder, config: ModelConfig) -> Decoder:
    """``other`` with the mixture of every layer aligned to ``to``: the same function in another order.

    Raises:
        UserError: the experts of these models cannot be put in another order.
    """
    check(config)
    blocks = [
        theirs._replace(moe=mixture(ours.moe, theirs.moe)) for ours, theirs in zip(to.blocks, other.blocks, strict=True)
    ]
    return other._replace(blocks=blocks)


def shuffled(rng: np.random.Generator, moe: MoE) -> MoE:
    """Another form of the same function, drawn at random: order of experts and neurons, scales from ½ to 2, signs.

    Lessons and tests merge this form with the original. The shared experts and dense layers stay as they are.
    """
    if dense.is_dense(moe):
        return moe
    E, _, F = moe.experts.w_up.shape
    order = rng.permutation(E)
    found = []
    for e in order.tolist():
        c = (2 ** rng.uniform(-1, 1, F) * rng.choice([-1, 1], F)).astype(moe.experts.w_up.dtype)
        neuron = rng.permutation(F)
        gate, up, down = scaled(expert(moe.experts, e), c)
        found.append(Experts(gate[:, neuron], up[:, neuron], down[neuron]))
    return MoE(tree.map(lambda leaf: leaf[:, order], moe.router), stack(found), moe.shared)


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` unless models of this config can be aligned."""
    if config.expert_kind != "swiglu":
        raise UserError(f"experts of kind {config.expert_kind!r} have no neurons to align: leave --align out.")
    if config.router not in ROUTERS:
        raise UserError(
            f"the router {config.router!r} does not give each expert a column of its own, expected one of "
            f"{', '.join(ROUTERS)}: leave --align out."
        )


def expert(stacked: Experts, e: int) -> Experts:
    """One expert of a stack, without the axis of experts."""
    return Experts(*(leaf[e] for leaf in stacked))


def stack(found: list[Experts]) -> Experts:
    """A stack of these experts."""
    return Experts(*(np.stack(leaves) for leaves in zip(*found, strict=True)))


def _columns(moe: MoE) -> NDArray[Any]:
    """All parameters of the router in one array (rows, E), with a column for each expert."""
    return np.concatenate(tree.leaves(moe.router))
