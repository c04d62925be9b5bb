"""Upcycling: a dense model becomes a mixture of experts that computes the same, and can learn to compute more.

Every expert is a copy of the dense feed-forward layer, the router is drawn at random, all else is copied.

    w renormalised (Mixtral)      Σ_S w = 1, so MoE(x) = FFN(x) for any router
    w = softmax over all          Σ_S w ≈ K/E near a zero router, so W_down is multiplied by E/K

With a granularity G, each copy is cut into G experts of F/G neurons. Their columns of the router are the same, so a
token that goes to one slice of a copy goes to all of them ("virtual groups"). Each slice then has the weight w/G, so
W_down is multiplied by G.

While all experts are equal and the weights are renormalised, the router gets exactly no gradient from the
language-model loss: dw_k = dy · y is the same for all k, so dh = w ⊙ (dw − Σ w dw) = 0. The experts become different
because they see different tokens; only then does the router learn.

``mix`` is Branch-Train-MiX: the experts come from several dense models that were trained separately, beginning with the
same parameters.

Komatsuzaki et al. 2023, arXiv 2212.05055; He et al. 2024, arXiv 2410.07524 (granularity); Sukhbaatar et al. 2024,
arXiv 2403.07816 (Branch-Train-MiX).  Lesson: lessons/52_merging_and_upcycling.ipynb
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minimoe.compression.vectors import merge
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.moe import MoE
from minimoe.layers.routers import noisy_top_k


def config_of(
    dense: ModelConfig,
    experts: int = 8,
    active: int = 2,
    granularity: int = 1,
    *,
    renormalize: bool = True,
    noisy_gating: bool = False,
) -> ModelConfig:
    """The config of the mixture: ``experts`` copies of a dense layer, of which each token uses ``active``.

    With a granularity G there are G times as many experts and active experts, each a G-th as wide. ``noisy_gating``
    is off by default: the noise is larger than the logits of a fresh router, so tokens would go to copies by chance,
    and copies that see the same tokens stay alike. With a granularity, the noise would also separate the slices of a
    copy.

    Raises:
        UserError: the model is not dense, or the numbers do not fit.
    """
    if dense.experts != 1 or dense.shared_experts or dense.expert_kind != "swiglu":
        raise UserError(
            f"a model with {dense.experts} experts of kind {dense.expert_kind!r} and {dense.shared_experts} shared "
            "experts is not dense: give a model with one SwiGLU, such as `minimoe train --dense-twin` makes."
        )
    if dense.dense_layers:
        raise UserError(
            f"the first {dense.dense_layers} layers of the model have a width of their own and no expert to copy: give "
            "a model with dense_layers 0."
        )
    if experts < 1 or active < 1 or active > experts:
        raise UserError(
            f"active {active} of experts {experts} is not possible: choose experts of at least 1, and active from 1 to "
            "experts."
        )
    if granularity < 1 or dense.expert_width % granularity:
        raise UserError(
            f"granularity {granularity} does not cut {dense.expert_width} neurons into equal parts: choose a divisor."
        )
    if noisy_gating and granularity > 1:
        raise UserError(
            f"noisy gating would separate the {granularity} slices of a copy: leave it out, or set granularity to 1."
        )
    made = dataclasses.replace(
        dense,
        router=ModelConfig.router,
        experts=experts * granularity,
        active_experts=active * granularity,
        expert_width=dense.expert_width // granularity,
        renormalize=renormalize,
        noisy_gating=noisy_gating,
    )
    noisy_top_k.check(made)
    return made


def upcycle(
    rng: np.random.Generator, dense: Decoder, config: ModelConfig, granularity: int = 1, noise: float = 0.0
) -> Decoder:
    """A dense decoder → a mixture in the shapes of ``config``, which ``config_of`` made with this granularity.

    ``noise`` moves each weight of each copy by a random amount, whose standard deviation is this fraction of the
    matrix's own: the experts differ from the start, and the function is only nearly the same.

    Raises:
        UserError: ``noise`` is negative, or ``config`` was not made from this model with this granularity.
    """
    if not 0 <= noise < np.inf:
        raise UserError(f"noise {noise} is not a fraction of the weights: choose a number of at least 0, such as 0.1.")
    copies = config.experts // granularity
    return _with_experts(
        rng, dense, [[block.moe.experts] * copies for block in dense.blocks], config, granularity, noise
    )


def mix(rng: np.random.Generator, models: Sequence[Decoder], config: ModelConfig, granularity: int = 1) -> Decoder:
    """Dense decoders of one shape → a mixture whose experts come from them, in this order; all else is averaged.

    ``config`` is one that ``config_of`` made with as many experts as there are models. The router is drawn at random:
    it must be trained.

    Raises:
        UserError: the models differ in shape, their number is not the number of experts, or ``config`` was not made
            from them with this granularity.
    """
    if len(models) * granularity != config.experts:
        raise UserError(
            f"{len(models)} models make {len(models)} experts, not {config.experts // granularity}: set experts to "
            f"{len(models)}."
        )
    rest = merge(models) if len(models) > 1 else models[0]
    experts = [[model.blocks[layer].moe.experts for model in models] for layer in range(config.layers)]
    return _with_experts(rng, rest, experts, config, granularity)


def _with_experts(
    rng: np.random.Generator,
    dense: Decoder,
    experts: list[list[Experts]],
    config: ModelConfig,
    granularity: int,
    noise: float = 0.0,
) -> Decoder:
    """``dense`` with a router in each layer, and ``experts``, one list for each layer."""
    width = experts[0][0].w_up.shape[2]
    if config.expert_width * granularity != width or config.experts % granularity:
        raise UserError(
            f"granularity {granularity} does not make {config.experts} experts of width {config.expert_width} from "
            f"{width} neurons: take the config from config_of, with the same granularity."
        )
    dtype = dense.norm.gain.dtype
    blocks = []
    for block, layer in zip(dense.blocks, experts, strict=True):
        whole = Experts(*(np.concatenate(leaves) for leaves in zip(*layer, strict=True)))
        made = _sliced(Experts(*(_moved(rng, leaf, noise) for leaf in whole)), granularity)
        made = made._replace(w_down=made.w_down * dtype.type(_scale(config, granularity)))
        one_per_copy = dataclasses.replace(config, experts=config.experts // granularity, active_experts=1)
        router = noisy_top_k.init(rng, one_per_copy, dtype)
        # The slices of a copy are next to each other, so that ties are decided between whole copies.
        columns = tree.map(lambda leaf: np.repeat(leaf, granularity, axis=1), router)
        blocks.append(block._replace(moe=MoE(columns, made)))
    return dense._replace(blocks=blocks)


def _scale(config: ModelConfig, granularity: int) -> float:
    """What W_down is multiplied by, so that the weighted sum over the K experts is the dense layer again.

    If weights are renormalised, each slice has 1/G of the weight of its copy. Otherwise each weight is about 1/E.
    """
    return granularity if config.renormalize else config.experts * granularity / config.active_experts


def _sliced(experts: Experts, granularity: int) -> Experts:
    """Experts (E, D, F) → (E·G, D, F/G): the slices of an expert follow each other."""
    E, D, F = experts.w_up.shape
    inner = F // granularity

    def cut(w: NDArray[np.floating]) -> NDArray[np.floating]:
        return w.reshape(E, D, granularity, inner).swapaxes(1, 2).reshape(E * granularity, D, inner)

    return Experts(cut(experts.w_gate), cut(experts.w_up), experts.w_down.reshape(E * granularity, inner, D))


def _moved(rng: np.random.Generator, w: NDArray[np.floating], noise: float) -> NDArray[np.floating]:
    if not noise:
        return w
    spread = noise * w.std(axis=(1, 2), keepdims=True)
    return (w + spread * rng.standard_normal(w.shape)).astype(w.dtype)
