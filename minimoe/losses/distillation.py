"""Distillation: a student learns the probabilities that a teacher gives to every token, with or without the label.

    p_s = softmax(z_s/τ),  p_t = softmax(z_t/τ)
    loss = Σ_t m_t · (h · CE(label, z_s) + (1 − h) · τ² · KL),      KL = KL(p_t‖p_s), or KL(p_s‖p_t) in reverse

The temperature τ makes both distributions flatter, which shows the student how the teacher ranks unlikely tokens. The
gradient of the KL shrinks like 1/τ², and the factor τ² cancels that. KL(p_t‖p_s) asks the student to cover everything
that the teacher finds possible; KL(p_s‖p_t) asks it to avoid what the teacher finds impossible.

With τ = 1, the loss has the gradient of the cross-entropy with the mixed label h · onehot + (1 − h) · p_t.

Hinton et al. 2015, arXiv 1503.02531; for mixtures, Fedus et al. 2021, arXiv 2101.03961 (section 4.2).
Lesson: lessons/51_distillation_and_pruning.ipynb
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, like, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.losses import cross_entropy
from minimoe.losses.cross_entropy import LossSum
from minimoe.losses.token_loss import CrossEntropy, Labelled, weights


class Settings(NamedTuple):
    """How a student learns from its teacher."""

    temperature: float = 1.0  # τ
    hard_share: float = 0.0  # h: how much the label counts, and 1 − h for the teacher
    reverse: bool = False  # KL(p_s‖p_t) for KL(p_t‖p_s)


class Cache(NamedTuple):
    label: cross_entropy.Cache
    student: Array  # (N, V)  p_s
    teacher: Array  # (N, V)  p_t
    log_ratio: Array  # (N, V)  log p_s − log p_t
    kl: Array  # (N,)
    mask: Array | None  # (N,)
    settings: Settings


@brief
class Distillation(NamedTuple):
    """The token loss of a student. The teacher reads the same shard in evaluation: no noise, and nothing is dropped."""

    teacher: Decoder
    config: ModelConfig  # of the teacher
    settings: Settings = Settings()

    def forward(self, logits: Array, shard: Labelled) -> tuple[LossSum, Cache]:
        mode = Mode(estimate_load=False, mask=shard.mask, starts=shard.starts)
        teacher = tree.map(lambda leaf: like(logits, leaf), self.teacher)  # it may still be on the host
        told = decoder.forward(teacher, shard.tokens, self.config, mode).logits.astype(logits.dtype, copy=False)
        return forward(logits, shard.targets, told, self.settings, weights(shard))

    def value(self, sums: LossSum) -> tuple[Any, Any]:
        return CrossEntropy().value(sums)

    def backward(self, cache: Any, dsums: Any) -> Array:
        return backward(cache, dsums)


def check(settings: Settings) -> None:
    """Raises ``UserError`` unless τ is from 0.001 to 1000, so that τ² keeps its digits, and h is between 0 and 1."""
    if not 1e-3 <= settings.temperature <= 1e3:
        raise UserError(
            f"temperature {settings.temperature} is not possible: give a number from 0.001 to 1000, such as 1 or 2."
        )
    if not 0 <= settings.hard_share <= 1:
        raise UserError(f"hard_share {settings.hard_share} is not a share: give a number from 0 to 1.")


@underflow_is_right
def forward(
    logits: Array, targets: Array, teacher: Array, settings: Settings, mask: Array | None = None
) -> tuple[LossSum, Cache]:
    """logits (..., V) of the student, targets (...), logits (..., V) of the teacher, mask (...) → the summed loss and
    its number of tokens.

    Raises:
        UserError: student and teacher do not give logits for the same tokens, or as for ``check``.
    """
    check(settings)
    if logits.shape != teacher.shape:
        raise UserError(
            f"the student's logits have the shape {logits.shape} and the teacher's {teacher.shape}: let both read the "
            "same tokens, with the same vocabulary."
        )
    xp = array_module(logits)
    label, of_label = cross_entropy.forward(logits, targets, mask)
    z_s, z_t = (z.reshape(-1, z.shape[-1]) / settings.temperature for z in (logits, teacher))
    log_s, log_t = _log_softmax(z_s), _log_softmax(z_t)
    p_s, p_t = xp.exp(log_s), xp.exp(log_t)
    log_ratio = log_s - log_t
    # A probability that underflows to 0 has a finite logarithm here, so 0 · log 0 is 0 without a special case.
    kl = (p_s * log_ratio).sum(-1) if settings.reverse else -(p_t * log_ratio).sum(-1)
    weight = None if mask is None else mask.reshape(-1).astype(kl.dtype)
    soft = kl.sum() if weight is None else (weight * kl).sum()
    h = settings.hard_share
    total = h * label.total + (1 - h) * settings.temperature**2 * soft
    return LossSum(total, label.tokens), Cache(of_label, p_s, p_t, log_ratio, kl, weight, settings)


def backward(cache: Cache, dloss: Array) -> Array:
    """dloss, the gradient with respect to the summed loss → dlogits (N, V) of the student; the teacher gets none.

    With z = z_s/τ, ∂p_s/∂z = diag(p_s) − p_s p_sᵀ, and the chain rule gives another 1/τ:

        τ² ∂KL(p_t‖p_s)/∂z_s = τ² · (p_s − p_t)/τ = τ (p_s − p_t)
        τ² ∂KL(p_s‖p_t)/∂z_s = τ² · p_s ⊙ (log p_s − log p_t − KL)/τ       the +1 of (p log p)' sums to 0
        dz = dloss · m ⊙ (h (softmax(z_s) − onehot) + (1 − h) · one of these)
    """
    _, h, reverse = cache.settings
    towards_teacher = cache.student - cache.teacher
    dsoft = cache.student * (cache.log_ratio - cache.kl[:, None]) if reverse else towards_teacher
    dsoft *= dloss * (1 - h) * cache.settings.temperature
    if cache.mask is not None:
        dsoft *= cache.mask[:, None]
    return dsoft + h * cross_entropy.backward(cache.label, dloss)


def _log_softmax(z: Array) -> Array:
    """z (N, V) → log softmax(z), finite however far apart the logits are."""
    xp = array_module(z)
    z = z - z.max(-1, keepdims=True)
    return z - xp.log(xp.exp(z).sum(-1, keepdims=True))
