"""Cross-entropy: how surprised the model is by the next token, in nats.

    loss = Σ_t m_t · (log Σ_v exp(z_tv) − z_t,target)

m_t is 1, or 0 for a token that does not count. The loss is returned as a sum, together with the number of tokens,
because the sums of the shards of a batch add up and their means do not.  Lesson: lessons/02_backprop_by_hand.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.ids import check_on_host


class Cache(NamedTuple):
    probabilities: Array  # (N, V)  softmax(z)
    targets: Array  # (N,)
    mask: Array | None  # (N,)


class LossSum(NamedTuple):
    total: Array  # ()  nats, summed over the tokens that count
    tokens: Array | int  # ()  the number of those tokens


def forward(logits: Array, targets: Array, mask: Array | None = None) -> tuple[LossSum, Cache]:
    """logits (..., V), targets (...) of integers, mask (...) of 0 and 1 → the summed loss and its number of tokens."""
    nats, cache = by_token(logits, targets)
    if mask is None:
        return LossSum(nats.sum(), len(nats)), cache
    mask = mask.reshape(-1).astype(nats.dtype)
    return LossSum((nats * mask).sum(), mask.sum()), cache._replace(mask=mask)


@underflow_is_right
def by_token(logits: Array, targets: Array) -> tuple[Array, Cache]:
    """logits (..., V), targets (...) of integers → the loss (N,) of each token by itself."""
    xp = array_module(logits)
    check_on_host(targets, logits.shape[-1], what="Targets")
    targets = targets.reshape(-1)
    rows = xp.arange(len(targets))
    z = logits.reshape(len(targets), -1)
    z = z - z.max(-1, keepdims=True)
    z_target = z[rows, targets]
    probabilities = xp.exp(z, out=z)
    sums = probabilities.sum(-1, keepdims=True)
    nats = xp.log(sums[:, 0]) - z_target
    probabilities /= sums
    return nats, Cache(probabilities, targets, None)


def backward(cache: Cache, dloss: Array | float) -> Array:
    """dloss, the gradient with respect to the summed loss (1/tokens, if the mean is minimised) → dlogits (N, V).

    ∂/∂z_v log Σ_u exp(z_u) = softmax(z)_v, and the target's logit has the factor −1 in the loss:

        dz = dloss · m ⊙ (softmax(z) − onehot(target))
    """
    xp = array_module(cache.probabilities)
    dlogits = cache.probabilities * dloss
    dlogits[xp.arange(len(cache.targets)), cache.targets] -= dloss
    if cache.mask is not None:
        dlogits *= cache.mask[:, None]
    return dlogits
