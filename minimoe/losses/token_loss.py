"""A loss that is computed from the logits of a batch: its sums, which add up over shards, its value and its gradient.

A loss has three functions, because a batch may be split into shards: the first and the last see one shard, the one
between sees the sums of all shards. Cross-entropy is the loss of ordinary training; others have the same functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from minimoe.core.arrays import Array
from minimoe.losses import cross_entropy
from minimoe.losses.cross_entropy import LossSum


class Labelled(Protocol):
    """What a loss reads of a shard: see ``objective.Shard``."""

    @property
    def tokens(self) -> Array: ...  # (B, T)
    @property
    def targets(self) -> Array: ...  # (B, T)
    @property
    def mask(self) -> Array | None: ...  # (B, T)
    @property
    def starts(self) -> Array | None: ...  # (B, T)
    @property
    def loss_mask(self) -> Array | None: ...  # (B, T)
    @property
    def extra(self) -> Any: ...


class TokenLoss(Protocol):
    def forward(self, logits: Array, shard: Labelled) -> tuple[Any, Any]:
        """logits (B, T, V) of a shard → sums, which is a tuple of numbers and arrays that add up, and a cache."""

    def value(self, sums: Any) -> tuple[Any, Any]:
        """The sums of all shards → the loss (), and its gradient with respect to each of the sums."""

    def backward(self, cache: Any, dsums: Any) -> Array:
        """The gradient with respect to the sums → dlogits (N, V) of the shard."""


class CrossEntropy(NamedTuple):
    """Mean nats per token, or the mean weighted by the loss mask."""

    def forward(self, logits: Array, shard: Labelled) -> tuple[LossSum, cross_entropy.Cache]:
        return cross_entropy.forward(logits, shard.targets, weights(shard))

    def value(self, sums: LossSum) -> tuple[Any, Any]:
        # Without any target the sum is 0; the loss and the gradient are then 0 and not 0/0.
        tokens = max(sums.tokens, 1) if isinstance(sums.tokens, int) else sums.tokens.clip(1)
        return sums.total / tokens, 1 / tokens

    def backward(self, cache: cross_entropy.Cache, dsums: Any) -> Array:
        return cross_entropy.backward(cache, dsums)


def weights(shard: Labelled) -> Array | None:
    """(B, T) how much each target counts: its loss mask, and 0 for padding; None if all count equally."""
    if shard.loss_mask is None or shard.mask is None:
        return shard.mask if shard.loss_mask is None else shard.loss_mask
    return shard.mask * shard.loss_mask
