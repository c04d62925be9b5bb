"""How many parameters a model has, in total and active for one token, counted from the shapes of its components.

Lesson: lessons/00_start_here.ipynb
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from minimoe.core import tree
from minimoe.core.arrays import placeholder
from minimoe.core.config import ModelConfig
from minimoe.layers import block, decoder, dense, moe


class Parameters(NamedTuple):
    """Exact counts. The router's noise is used only in training and counted separately, because Mixtral has none.

    The norms include those of queries and keys.
    """

    embedding: int
    attention: int
    experts: int
    shared_experts: int
    dense_layers: int  # their SwiGLUs
    router: int
    norms: int
    head: int
    noise: int
    total: int  # without the noise
    active: int  # the part of ``total`` that is used for one token, at most: K of the E experts, and all the rest


def count(config: ModelConfig) -> Parameters:
    """Counts the parameters for the shapes of ``config``, without making them."""
    L = config.layers - config.dense_layers  # with a mixture
    of = decoder.blank(dataclasses.replace(config, layers=1, dense_layers=0), placeholder)
    layer = of.blocks[0]
    every = layer.attention, layer.attention_norm, layer.moe_norm  # what every layer has
    gains = tree.size([leaf for leaf in tree.leaves(every) if leaf.ndim == 1])
    noise = L * _training_only(layer)
    router = L * tree.size(layer.moe.router) - noise
    experts, shared_experts = L * tree.size(layer.moe.experts), L * tree.size(layer.moe.shared)
    first = config.dense_layers
    dense_layers = first * tree.size(dense.blank(config, placeholder)) if first else 0
    attention = config.layers * (tree.size(every) - gains)
    norms = config.layers * gains + tree.size(of.norm)
    embedding, head = tree.size(of.embedding), tree.size(of.head)
    shared = embedding + head + attention + shared_experts + dense_layers + router + norms
    return Parameters(
        embedding=embedding,
        attention=attention,
        experts=experts,
        shared_experts=shared_experts,
        dense_layers=dense_layers,
        router=router,
        norms=norms,
        head=head,
        noise=noise,
        total=shared + experts,
        active=shared + L * moe.experts_of(config).active_parameters(config),
    )


def by_muon(config: ModelConfig) -> int:
    """How many parameters Muon updates, if it is the optimiser: those that the components mark as matrices."""
    return _over_layers(config, "matrices")


def state(config: ModelConfig) -> int:
    """How many numbers the routers learn without a gradient, so that the optimiser keeps no moments of them."""
    return _over_layers(config, "state")


def _over_layers(config: ModelConfig, mark: str) -> int:
    """How many numbers of the blocks have this mark."""
    first = config.dense_layers
    with_router = (config.layers - first) * _marked(block.blank(config, placeholder), mark)
    if not first:
        return with_router
    return with_router + first * _marked(block.blank(config, placeholder, is_dense=True), mark)


def _training_only(params: Any) -> int:
    return _marked(params, "training_only")


def _marked(params: Any, mark: str) -> int:
    """How many numbers are in the leaves of ``params`` to which a component gives this ``mark``."""
    named = dict(tree.named_leaves(params))
    return sum(named[name].size for name in tree.marked(params, mark))
