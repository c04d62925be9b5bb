"""The mixture-of-experts layer: dispatch every token to its experts, run the experts, combine their outputs.

    y_t = Σ_k w_tk · Expert_{S_tk}(x_t)  [+ Σ_s Shared_s(x_t)]

A router decides which entries (token, expert, weight) exist. ``routing`` sorts them by expert, each expert processes
its rows, and ``combine`` adds up the weighted rows of each token. Nothing is padded. Tokens are dropped only if the
router has a capacity: see ``capacity``. If workers own different experts, they exchange the sorted rows.

In addition, every token may pass through S shared experts, which are not weighted by a router. They are kept as one
SwiGLU of width S·F: its hidden channels are those of the S experts side by side, and W_down adds up their outputs.

The plain form, a loop over the experts, is in ``minimoe/reference.py``.

Gale et al. 2022, arXiv 2211.15841; Lepikhin et al. 2020, arXiv 2006.16668; Dai et al. 2024, arXiv 2401.06066 (shared
experts).  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError, suggestion
from minimoe.core.summary import brief
from minimoe.layers.exchange import Exchange
from minimoe.layers.experts import swiglu, zero_computation
from minimoe.layers.interfaces import ExpertModule, RouterModule
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import (
    cosine,
    expert_choice,
    expert_threshold,
    gshard,
    noisy_top_k,
    remoe,
    sigmoid_bias,
    switch,
    token_hash,
)
from minimoe.layers.routing import RouterStats, Routing, by_token, combine, skip_second

ROUTERS: dict[str, RouterModule] = {
    "noisy_top_k": noisy_top_k,
    "switch": switch,
    "gshard": gshard,
    "expert_choice": expert_choice,
    "expert_threshold": expert_threshold,
    "sigmoid_bias": sigmoid_bias,
    "token_hash": token_hash,
    "cosine": cosine,
    "remoe": remoe,
}
"""The module for each value of ``ModelConfig.router``."""

EXPERTS: dict[str, ExpertModule] = {
    "swiglu": swiglu,
    "zero_computation": zero_computation,
}
"""The module for each value of ``ModelConfig.expert_kind``."""


@tree.marks(by_expert=("experts",))
@brief
class MoE(NamedTuple):
    router: Any  # the parameters of ROUTERS[config.router]
    experts: Any  # the parameters of EXPERTS[config.expert_kind], stacked by expert
    shared: Any = None  # swiglu.Experts: the shared experts as a stack of one, S·F wide; None if S = 0
    # A dense layer has only ``shared``, and None for the two others: see ``dense``.


@brief
class Cache(NamedTuple):
    routing: Routing
    y_sorted: Array  # (M, D)  before weighting
    router: Any
    experts: Any
    exchange: Exchange
    config: ModelConfig
    shared: Any = None


@brief
class Result(NamedTuple):
    y: Array  # (B, T, D)
    stats: RouterStats
    dropped: Any  # number of routing entries that were refused by a full expert
    cache: Cache


def router_of(config: ModelConfig) -> RouterModule:
    """The module of the config's router; raises ``UserError`` if there is none of that name."""
    return _named(ROUTERS, config.router, "router")


def experts_of(config: ModelConfig) -> ExpertModule:
    """The module of the config's experts; raises ``UserError`` if there is none of that name."""
    return _named(EXPERTS, config.expert_kind, "expert_kind")


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` if the router or the experts do not exist, or do not allow these settings."""
    _check_experts(config)
    router_of(config).check(config)


def check_forward(config: ModelConfig) -> None:
    """Like ``check``, but it allows settings that only training refuses: the model can be loaded, run and written."""
    _check_experts(config)
    router: Any = router_of(config)
    getattr(router, "check_forward", router.check)(config)


def causal_routers() -> list[str]:
    """The names of the routers that a language model can use: those that never look at a later token."""
    return [name for name, module in ROUTERS.items() if not getattr(module, "LOOKS_AHEAD", False)]


def most_experts(config: ModelConfig) -> int:
    """The largest number of experts that a token can have: K, or E if the router lets that number vary."""
    return config.experts if getattr(router_of(config), "VARIES", False) else config.active_experts


def balance_coefficient(config: ModelConfig) -> float:
    """The coefficient of the balance loss for a recipe that names none: 0.01, or what the router states."""
    coefficient: float = getattr(router_of(config), "BALANCE_LOSS", 0.01)
    return coefficient


def balance_weights(config: ModelConfig) -> list[float] | None:
    """The weight of each expert in the balance loss, E numbers; None if all experts are alike."""
    of_experts: Any = getattr(experts_of(config), "balance_weights", None)
    found: list[float] | None = None if of_experts is None else of_experts(config)
    return found


def regulariser(params: MoE, stats: RouterStats, config: ModelConfig) -> tuple[Any, RouterStats] | None:
    """A loss that the router brings itself, and its gradient with respect to the sums; None if it brings none."""
    of_router: Any = getattr(router_of(config), "regulariser", None)
    found: tuple[Any, RouterStats] | None = None if of_router is None else of_router(params.router, stats, config)
    return found


def update_state(layers: Sequence[MoE], stats: Sequence[RouterStats], config: ModelConfig, recipe: TrainConfig) -> None:
    """Changes, in place, what the routers of all layers learn without a gradient, from the sums of a whole step."""
    update: Any = getattr(router_of(config), "next_state", None)
    if update is None:
        return
    routers = [layer.router for layer in layers]
    new = [dict(tree.named_leaves(router)) for router in update(routers, stats, config, recipe)]
    for router, after in zip(routers, new, strict=True):
        for name, leaf in tree.named_leaves(router):
            leaf[...] = after[name]


def init(
    rng: np.random.Generator, config: ModelConfig, output_std: float | None = None, dtype: DTypeLike = np.float32
) -> MoE:
    """Fresh parameters of a router, a stack of experts and the shared experts, in the shapes of ``config``."""
    router = router_of(config).init(rng, config, dtype)
    experts = experts_of(config).init(rng, config, output_std, dtype)
    if not config.shared_experts:
        return MoE(router, experts)
    # One SwiGLU of width S·F, but each of the S experts has F inputs to its output.
    output_std = config.expert_width**-0.5 if output_std is None else output_std
    return MoE(router, experts, swiglu.init(rng, shared_config(config), output_std, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> MoE:
    """The parameters, each made by calling ``array`` with its shape."""
    shared = swiglu.blank(shared_config(config), array) if config.shared_experts else None
    return MoE(router_of(config).blank(config, array), experts_of(config).blank(config, array), shared)


def shared_config(config: ModelConfig) -> ModelConfig:
    """The config of a SwiGLU that is as wide as all shared experts together."""
    width = config.shared_experts * config.expert_width
    return dataclasses.replace(config, experts=1, active_experts=1, expert_width=width, shared_experts=0)


def forward(params: MoE, x: Array, config: ModelConfig, mode: Mode = EVALUATION) -> Result:
    """x (B, T, D) → y (B, T, D), the router's sums, and how many entries were dropped.

    If workers exchange rows, all of them must call this at the same time.
    """
    B, T, D = x.shape
    routing, stats, router_cache = router_of(config).forward(params.router, x, config, mode)
    if mode.skip_below is not None:
        routing = skip_second(routing, mode.skip_below[0])
    exchange = mode.exchange(routing.counts)
    x_sorted = x.reshape(-1, D).take(routing.token, axis=0)  # (M, D)
    y_own, experts_cache = experts_of(config).forward(
        exchange.own(params.experts), exchange.dispatch(x_sorted), exchange.counts
    )
    y_sorted = exchange.return_rows(y_own)
    y = combine(y_sorted, routing.place, by_token(routing.weight, routing.place))
    shared_cache = None
    if params.shared is not None:  # every token, in the order of the text: nothing is sorted, weighted or exchanged
        y_shared, shared_cache = swiglu.forward(params.shared, x.reshape(-1, D), [B * T])
        y += y_shared
    cache = Cache(routing, y_sorted, router_cache, experts_cache, exchange, config, shared_cache)
    return Result(y.reshape(B, T, D), stats, routing.dropped, cache)


def backward(params: MoE, cache: Cache, dy: Array, dstats: RouterStats | None) -> tuple[Array, MoE]:
    """dy (B, T, D), and the gradient with respect to the router's sums → dx (B, T, D) and the parameters' gradients.

    The experts' gradient is that of the experts that this worker owns, for the tokens of all workers.

    In y_t = Σ_k w_tk e_tk, both the weight and the expert's output e depend on parameters, and x_t reaches y_t through
    the router and through its K experts:

        dw_tk = dy_t · e_tk,    de_tk = w_tk dy_t,    dx_t = Σ_k dx of expert S_tk + dx of the router

    The shared experts add their output unweighted: the gradient of their output is dy itself, and their dx is added to
    the sum.
    """
    xp = array_module(dy)
    routing, exchange = cache.routing, cache.exchange
    dy_sorted = dy.reshape(-1, dy.shape[-1]).take(routing.token, axis=0)  # (M, D)
    dweight = xp.einsum("md,md->m", dy_sorted, cache.y_sorted)
    dy_sorted *= routing.weight[:, None]  # now the gradient of each expert's output
    dx_own, dexperts = experts_of(cache.config).backward(
        exchange.own(params.experts), cache.experts, exchange.dispatch(dy_sorted)
    )
    dx = combine(exchange.return_rows(dx_own), routing.place).reshape(dy.shape)
    dx_router, drouter = router_of(cache.config).backward(params.router, cache.router, dweight, dstats)
    dx += dx_router
    if params.shared is None:
        return dx, MoE(drouter, dexperts)
    dx_shared, dshared = swiglu.backward(params.shared, cache.shared, dy.reshape(-1, dy.shape[-1]))
    dx += dx_shared.reshape(dx.shape)
    return dx, MoE(drouter, dexperts, dshared)


def _check_experts(config: ModelConfig) -> None:
    experts: Any = experts_of(config)
    if hasattr(experts, "check"):
        experts.check(config)


def _named(table: dict[str, Any], name: str, setting: str) -> Any:
    if name not in table:
        raise UserError(
            f"there is no {setting} {name!r:.40}{suggestion(name, table)}: choose one of {', '.join(table)}."
        )
    return table[name]
