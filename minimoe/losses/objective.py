"""The training objective and its gradient, for a batch that is split into any number of shards.

    loss = token loss + Σ_layers (Σ_losses coefficient · auxiliary loss + the router's own loss)

The token loss is the mean cross-entropy, or another function of the logits: ``losses/token_loss.py``. All of these
losses are functions of sums over tokens, so a step has two phases:

    1  forward on every shard; add up the sums (cross-entropy, token count, RouterStats)
    2  compute the gradient with respect to each total; backward on every shard; add up the gradients

Workers, micro-batches and a single batch therefore give the same gradient up to rounding, auxiliary losses included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.summary import brief
from minimoe.layers import decoder, lora, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.exchange import Exchange, LocalExchange
from minimoe.layers.mode import Mode
from minimoe.layers.routing import RouterStats
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients, Losses
from minimoe.losses.token_loss import CrossEntropy, TokenLoss
from minimoe.parallel.group import ALONE, Group


class Objective(NamedTuple):
    """What is minimised, and what happens only in training."""

    coefficients: Coefficients = Coefficients()
    capacity_factor: float | None = None
    pooled_balance: bool = False  # the balance loss over all layers together: ``balance.pooled``
    token_loss: TokenLoss = CrossEntropy()


@brief
class Shard(NamedTuple):
    """Some sequences of a batch."""

    tokens: Array  # (B, T) integers
    targets: Array  # (B, T) integers: the next token
    noise: Array | None = None  # (L, B, T, ·)  from decoder.draw_noise
    mask: Array | None = None  # (B, T)  1 for a token, 0 for padding, which is left out of every loss
    loss_mask: Array | None = None  # (B, T)  how much a target counts in the token loss; the routers see every token
    starts: Array | None = None  # (B, T)  the first position that each query may see, if documents are packed
    dropout: list[Array] | None = None  # what each adapter keeps of its input: ``lora.with_dropout``
    extra: Any = None  # what another token loss needs to know about these sequences


@brief
class Sums(NamedTuple):
    """The sums over tokens from which the losses are computed; the sums of shards add up."""

    loss: Any  # of the token loss; for cross-entropy a LossSum
    stats: list[RouterStats]  # L, less the dense layers: see ``decoder.Routed``
    dropped: list[int]  # as many


@brief
class Forward(NamedTuple):
    """The result of phase 1 for one shard."""

    sums: Sums
    caches: tuple[Any, decoder.Cache] | None  # of the token loss, and of the decoder
    token_loss: TokenLoss
    dropout: list[Array] | None = None  # that of the shard


@brief
class Totals(NamedTuple):
    """The sums of a whole batch, and what is computed from them."""

    loss: Any  # ()  the token loss; for cross-entropy, nats per token
    total: Any  # ()  with the auxiliary losses
    auxiliary: list[Losses]  # L, less the dense layers, as all lists here
    stats: list[RouterStats]
    dropped: list[int]
    sums: Any  # of the token loss
    dloss: Any  # gradient of the token loss with respect to its sums
    dstats: list[RouterStats]  # gradient with respect to the sums of each layer


def forward(
    params: Decoder,
    shard: Shard,
    config: ModelConfig,
    objective: Objective,
    keep: bool = True,
    exchange: Callable[[list[int]], Exchange] = LocalExchange,
) -> Forward:
    """Phase 1 for one shard. Without ``keep``, only the sums are kept and no caches."""
    mode = Mode(
        training=True,
        noise=shard.noise,
        capacity_factor=objective.capacity_factor,
        estimate_load=objective.coefficients.load > 0,
        balance_by_sequence=objective.coefficients.sequence > 0,
        mask=shard.mask,
        starts=shard.starts,
        exchange=exchange,
    )
    logits, routed, cache = decoder.forward(lora.with_dropout(params, shard.dropout), shard.tokens, config, mode)
    loss, loss_cache = objective.token_loss.forward(logits, shard)
    sums = Sums(loss, routed.stats, routed.dropped)
    return Forward(sums, (loss_cache, cache) if keep else None, objective.token_loss, shard.dropout)


def add_up(
    params: Decoder, forwards: Sequence[Forward], config: ModelConfig, objective: Objective, group: Group = ALONE
) -> Totals:
    """Between the phases: sums of all shards of a group → losses, and the gradient with respect to each sum."""
    sums, stats, dropped = group.all_reduce(tree.add(*(one.sums for one in forwards)))
    loss, dloss = objective.token_loss.value(sums)
    total = loss
    coefficients, weights = objective.coefficients, moe.balance_weights(config)
    dpooled: RouterStats | None = None
    if objective.pooled_balance:
        value, dpooled = balance.pooled(stats, coefficients.balance, weights)
        total = total + value * coefficients.balance
        coefficients = coefficients._replace(balance=0.0)
    auxiliary, dstats = [], []
    for of_layer, layer in zip(decoder.mixtures(params), stats, strict=True):
        losses, dlayer = balance.loss(layer, coefficients, weights)
        total = total + balance.weighted(losses, coefficients)
        auxiliary.append(losses)
        own = moe.regulariser(of_layer, layer, config)
        if own is not None:
            total = total + own[0]
            dlayer = tree.add(dlayer, own[1])
        dstats.append(dlayer if dpooled is None else tree.add(dlayer, dpooled))
    return Totals(loss, total, auxiliary, stats, dropped, sums, dloss, dstats)


def backward(params: Decoder, forward: Forward, totals: Totals) -> Decoder:
    """Phase 2 for one shard: its part of the gradient of the loss of the whole batch."""
    assert forward.caches is not None
    loss_cache, cache = forward.caches
    dlogits = forward.token_loss.backward(loss_cache, totals.dloss)
    return decoder.backward(lora.with_dropout(params, forward.dropout), cache, dlogits, totals.dstats)


def loss_and_gradient(
    params: Decoder,
    shards: Sequence[Shard],
    config: ModelConfig,
    objective: Objective,
    *,
    recompute: bool = False,
    group: Group = ALONE,
    exchange: Callable[[list[int]], Exchange] = LocalExchange,
) -> tuple[Totals, Decoder]:
    """Both phases for all shards of a batch → the losses of the batch and the gradient of ``total``.

    With ``recompute``, no cache is kept between the phases and forward runs again: this is a third more work, but each
    worker needs memory for only one shard at a time (gradient accumulation). In a ``group``, each worker passes its own
    shards and gets the losses of the whole batch, and the part of the gradient that flows through its shards. With an
    ``exchange`` between workers, each worker owns some of the experts. With an exchange, all workers must have the same
    number of shards, and each gets the complete gradient of its own experts and none for the others.
    """
    forwards = [forward(params, shard, config, objective, keep=not recompute, exchange=exchange) for shard in shards]
    totals = add_up(params, forwards, config, objective, group)
    gradients = (
        backward(params, forward(params, shard, config, objective, exchange=exchange) if recompute else done, totals)
        for shard, done in zip(shards, forwards, strict=True)
    )
    total = next(gradients)
    for gradient in gradients:
        tree.accumulate(total, gradient)
    return totals, total
