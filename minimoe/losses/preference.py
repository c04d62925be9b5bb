"""Preferences: of two answers to a prompt, the model should give the chosen one more probability than the rejected one.

Each answer has a score s. The loss of a pair is a function of h, the score of the chosen answer less that of the
rejected one; the loss of a batch is the mean over its P pairs:

    dpo     s = ℓ − ℓ′          −(1 − ε) log σ(βh) − ε log σ(−βh)         how sure the preference is: ε = 0 for certain
    ipo     s = (ℓ − ℓ′)/|y|    (h − 1/2β)²                               h has a target, so h does not grow for ever
    simpo   s = ℓ/|y|           −(1 − ε) log σ(βh − γ) − ε log σ(γ − βh)  needs no reference

ℓ is the log-probability of an answer, summed over the tokens where the loss mask is 1: those of the answer, not those
of the prompt. |y| is the number of these tokens. ℓ′ is what the reference gave to the same answer; the reference is the
model as it was before the first step, and does not change. ``reward`` is β s.

The sums of a shard have a place for each answer of the batch. They are ℓ, |y| and ℓ′ at the places of the shard's own
answers, and 0 at all others. So they add up like all sums over tokens, and even a pair may be split: its two answers
may be in two shards.

Rafailov et al. 2023, arXiv 2305.18290 (DPO); Azar et al. 2023, arXiv 2310.12036 (IPO); Meng et al. 2024, arXiv
2405.14734 (SimPO).  Lesson: lessons/41_preferences.ipynb
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.errors import UserError, suggestion
from minimoe.losses import cross_entropy
from minimoe.losses.token_loss import Labelled, weights

KINDS = ("dpo", "ipo", "simpo")
LARGEST_BETA = 1e6
"""A larger β is most likely a typing error."""


class Answers(NamedTuple):
    """Which answers the sequences of a shard hold; ``Shard.extra`` of a preference loss."""

    place: Array  # (B, 2P) of the whole batch's P pairs: 1 where the sequence belongs, 0 elsewhere; see ``places``
    reference: Array | None = None  # (B,) ℓ′, summed over the same tokens; None if the loss needs no reference


class Sums(NamedTuple):
    """Column 0 is the chosen answer of each pair, column 1 the rejected one."""

    logp: Array  # (P, 2)  ℓ
    length: Array  # (P, 2)  |y|
    reference: Array  # (P, 2)  ℓ′


class Cache(NamedTuple):
    nats: cross_entropy.Cache
    counts: Array  # (B, T)  the loss mask
    place: Array  # (B, 2P)


class Preference(NamedTuple):
    """A token loss (``token_loss.TokenLoss``) over pairs of answers. ``check`` says which values are possible."""

    kind: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0  # ε, the probability that a pair is labelled the wrong way round
    margin: float = 0.0  # γ: simpo asks for βh > γ

    def forward(self, logits: Array, shard: Labelled) -> tuple[Sums, Cache]:
        """logits (B, T, V), and the ``Answers`` of the shard → the sums of its answers at the places of their pairs."""
        xp = array_module(logits)
        answers: Answers = shard.extra
        counts = weights(shard)
        counts = xp.ones(shard.targets.shape, logits.dtype) if counts is None else counts.astype(logits.dtype)
        nats, cache = cross_entropy.by_token(logits, shard.targets)
        logp = -(nats.reshape(counts.shape) * counts).sum(1)  # (B,)
        reference = xp.zeros_like(logp) if answers.reference is None else answers.reference.astype(logp.dtype)
        place = answers.place.astype(logp.dtype)
        placed = (place.T @ xp.stack([logp, counts.sum(1), reference], axis=1)).reshape(-1, 2, 3)
        return Sums(placed[:, :, 0], placed[:, :, 1], placed[:, :, 2]), Cache(cache, counts, place)

    @underflow_is_right
    def value(self, sums: Sums) -> tuple[Any, Sums]:
        """The sums of all shards → the loss (), and its gradient with respect to ℓ; the other sums have none.

        With g = ∂/∂h of a pair's loss, the two scores get g/P and −g/P; ℓ gets the same, divided by |y| if s is a mean:

            dpo    g = β (σ(βh) − 1 + ε)        ipo    g = 2 (h − 1/2β)        simpo    g = β (σ(βh − γ) − 1 + ε)
        """
        xp = array_module(sums.logp)
        score = self.score(sums)
        h = score[:, 0] - score[:, 1]  # (P,)
        if self.kind == "ipo":
            off = h - 1 / (2 * self.beta)
            losses, g = off * off, 2 * off
        else:
            mu = self.beta * h - (self.margin if self.kind == "simpo" else 0.0)
            wrong, right = xp.logaddexp(0, mu), xp.logaddexp(0, -mu)  # −log σ(−μ), −log σ(μ), for any size of μ
            losses = (1 - self.label_smoothing) * right + self.label_smoothing * wrong
            g = self.beta * (self.label_smoothing - xp.exp(-wrong))  # σ(μ) − 1 = −σ(−μ), without cancellation
        dscore = xp.stack([g, -g], axis=1) / len(h)  # (P, 2)
        dlogp = dscore if self.kind == "dpo" else dscore / _at_least_one(sums.length)
        nothing = xp.zeros_like(dlogp)
        return losses.mean(), Sums(dlogp, nothing, nothing)

    def backward(self, cache: Cache, dsums: Sums) -> Array:
        """dsums, of which only the gradient with respect to ℓ counts → dlogits (N, V).

        ℓ = −Σ_t m_t nll_t. If c is the gradient with respect to the ℓ of a token's answer, the way back is that of
        cross-entropy with the mask −c m of real numbers, positive where a token should become likelier:

            dz = −c m ⊙ (softmax(z) − onehot(target))
        """
        c = cache.place @ dsums.logp.reshape(-1)  # (B,)
        return cross_entropy.backward(cache.nats._replace(mask=-(c[:, None] * cache.counts).reshape(-1)), 1.0)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return self.kind != "simpo"

    def score(self, sums: Sums) -> Array:
        """(P, 2): s of the chosen and of the rejected answer of each pair."""
        if self.kind == "simpo":
            return sums.logp / _at_least_one(sums.length)
        change = sums.logp - sums.reference
        return change if self.kind == "dpo" else change / _at_least_one(sums.length)

    def reward(self, sums: Sums) -> Array:
        """(P, 2): β s of both answers of each pair, their implicit rewards."""
        return self.beta * self.score(sums)


def places(count: int) -> NDArray[np.float32]:
    """The rows of ``Answers.place`` for P = ``count`` pairs, (2P, 2P): chosen and rejected answers in turn."""
    return np.eye(2 * count, dtype=np.float32)


def check(loss: Preference) -> None:
    """Raises ``UserError`` for settings that are not possible, or that this kind of loss would ignore."""
    if not isinstance(loss, Preference):
        raise UserError(f"loss {loss!r:.40} is not a Preference: give one, such as Preference('ipo').")
    for name in ("beta", "label_smoothing", "margin"):
        if not isinstance(value := getattr(loss, name), int | float):
            raise UserError(f"{name} {value!r:.40} is not a number: give one.")
    if loss.kind not in KINDS:
        raise UserError(f"there is no preference loss {loss.kind!r:.40}{suggestion(loss.kind, KINDS)}: choose one of "
                        f"{', '.join(KINDS)}.")  # fmt: skip
    if not 0 < loss.beta <= LARGEST_BETA:
        raise UserError(f"beta {loss.beta} is not a strength of the preference: choose a number above 0, such as 0.1.")
    if not 0 <= loss.label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing {loss.label_smoothing} is not the probability of a wrong label: choose a number of at "
            "least 0 and below 0.5."
        )
    if loss.label_smoothing and loss.kind == "ipo":
        raise UserError(
            f"label_smoothing {loss.label_smoothing} has no meaning for ipo, whose target is finite without it: leave "
            "it out, or choose dpo or simpo."
        )
    if not (np.isfinite(loss.margin) and loss.margin >= 0):
        raise UserError(f"margin {loss.margin} is not a distance between rewards: choose a number of at least 0.")
    if loss.margin and loss.kind != "simpo":
        raise UserError(f"margin {loss.margin} belongs to simpo, and {loss.kind} has none: leave it out.")


class Measures(NamedTuple):
    """What is reported of pairs: means over them."""

    loss: float
    reward_chosen: float  # β s
    reward_rejected: float
    margin: float  # of the rewards
    accuracy: float  # share of the pairs whose chosen answer has the larger reward
    logp_chosen: float  # ℓ of the chosen answer: it may fall while the margin grows
    logp_rejected: float


def measures(loss: Preference, sums: Sums) -> Measures:
    """The sums of some pairs → what is reported of them; an equal reward does not count as a right preference."""
    reward = loss.reward(sums)
    value, _ = loss.value(sums)
    chosen, rejected = reward[:, 0], reward[:, 1]
    found = (value, chosen.mean(), rejected.mean(), (chosen - rejected).mean(), (chosen > rejected).mean())
    return Measures(*map(float, (*found, *sums.logp.mean(0))))


def _at_least_one(length: Array) -> Array:
    """An answer without a token has the score 0 and no gradient, rather than 0/0."""
    return array_module(length).maximum(length, 1)
