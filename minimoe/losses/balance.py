"""The auxiliary losses, which keep every expert in use. Each is a function of sums over tokens and has a coefficient.

    balance      E Σ_e f_e p̄_e,  f the share of assignments, p̄ the mean probability      1 at perfect balance
    importance   CV²(Σ_t w_t)    how unevenly the weights are spread over the experts     0 at perfect balance
    load         CV²(Σ_t P_t)    how unevenly the probability of being chosen is spread   0 at perfect balance
    z            Σ_t lse_t² / N  how large the logits are                                 keeps them small
    sequence     the balance loss of each sequence by itself, averaged over the tokens    1 at perfect balance

The losses are computed for each layer separately. If the layers' sums were pooled, layers that collapse in different
ways would hide each other: four layers that each use only two of 8 experts, every layer a different pair, look
perfectly balanced in the pooled sum.

Fedus et al. 2021, arXiv 2101.03961 (balance, here with f divided by K so that 1 means balanced for any K); Shazeer et
al. 2017, arXiv 1701.06538 (importance, load); Zoph et al. 2022, arXiv 2202.08906 (z).
Lesson: lessons/08_load_balancing.ipynb
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module
from minimoe.layers.routing import RouterStats


class Coefficients(NamedTuple):
    """The weight of each loss relative to the language-model loss; 0 switches a loss off."""

    balance: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    z: float = 0.0
    sequence: float = 0.0


class Losses(NamedTuple):
    """The losses of one layer, not yet multiplied by their coefficients."""

    balance: Array  # ()
    importance: Array  # ()
    load: Array  # ()
    z: Array  # ()
    sequence: Array  # ()  0 if its coefficient is 0, because then nobody sums it up


def loss(
    stats: RouterStats, coefficients: Coefficients, weights: Sequence[float] | None = None
) -> tuple[Losses, RouterStats]:
    """Sums over all tokens of a step → each loss, and the gradient of the total loss with respect to each of the sums.

    The total weights the losses with their coefficients: α for balance, c for z. f is computed from counts and is
    constant, so the balance loss has a gradient only through p̄ = Σp/N:

        ∂/∂Σp_e = α E f_e / N,    ∂/∂Σlse² = c / N

    The router returns the sum of the balance losses of all sequences. The gradient with respect to this sum is again
    the coefficient of the loss, divided by N.

    ``weights`` are E numbers η if experts differ in cost: f is replaced by η f in the balance loss, and only there.
    """
    xp = array_module(stats.probability)
    experts = stats.probability.shape[0]
    fraction = _weighed(stats.assignments / xp.maximum(stats.assignments.sum(), 1), weights)  # (E,)
    tokens = xp.maximum(xp.full((), stats.tokens, stats.probability.dtype), 1)
    importance, dimportance = squared_variation(stats.importance)
    load, dload = squared_variation(stats.load)
    losses = Losses(
        balance=experts * (fraction * stats.probability).sum() / tokens,
        importance=importance,
        load=load,
        z=stats.squared_lse / tokens,
        sequence=stats.by_sequence / tokens,
    )
    gradient = RouterStats(
        tokens=0,
        assignments=xp.zeros_like(fraction),
        probability=(coefficients.balance * experts / tokens) * fraction,
        importance=coefficients.importance * dimportance,
        load=coefficients.load * dload,
        squared_lse=coefficients.z / tokens,
        by_sequence=coefficients.sequence / tokens,
        entropy=xp.zeros_like(stats.entropy),
    )
    return losses, gradient


def pooled(
    stats: Sequence[RouterStats], coefficient: float, weights: Sequence[float] | None = None
) -> tuple[Array, RouterStats]:
    """The balance loss of the transformers library, and ``coefficient`` times its gradient with respect to each sum.

    That library adds up the sums of all layers before it multiplies them, and it does not divide f by K:

        E Σ_e f_e p̄_e,    f_e = Σ_l assignments_le / Σ_l N_l,    p̄_e = Σ_l Σp_le / Σ_l N_l

    The value at perfect balance is therefore K, not 1. With one layer it is K times ``Losses.balance``, so the same
    coefficient has K times the effect. This loss also hides collapse: for the four layers in the example at the top of
    this file, its value is K, as at perfect balance. Use it to compare with models that were trained elsewhere;
    ``loss`` is better for training. A layer's sums enter only through the total, so the gradient is the same for every
    layer:

        ∂/∂Σp_le = α E f_e / Σ_l N_l

    ``weights`` are those of ``loss``.
    """
    total = tree.add(*stats)
    xp = array_module(total.probability)
    tokens = xp.maximum(xp.full((), total.tokens, total.probability.dtype), 1)
    fraction = _weighed(total.assignments / tokens, weights)  # (E,)  adds up to K if no weights are given
    scale = len(fraction) / tokens
    gradient = tree.zeros_like(total._replace(tokens=tokens))
    return scale * (fraction * total.probability).sum(), gradient._replace(probability=coefficient * scale * fraction)


def weighted(losses: Losses, coefficients: Coefficients) -> Array:
    """What these losses add to the training loss."""
    total = losses.balance * coefficients.balance
    for value, coefficient in zip(losses[1:], coefficients[1:], strict=True):
        total = total + value * coefficient
    return total


def squared_variation(v: Array) -> tuple[Array, Array]:
    """v (E,) → CV²(v) = var(v)/mean(v)² and its gradient (E,); both zero for v = 0.

    With m the mean, CV² = mean(v²)/m² − 1, so

        ∂CV²/∂v_i = 2/(E m²) · (v_i − m (1 + CV²))
    """
    xp = array_module(v)
    mean = v.mean()
    safe = xp.where(mean == 0, 1, mean)
    value = xp.square(v - mean).mean() / xp.square(safe)
    return value, 2 / (len(v) * xp.square(safe)) * (v - mean * (1 + value))


def _weighed(fraction: Array, weights: Sequence[float] | None) -> Array:
    """f (E,) → η f, or f itself if there are no weights."""
    return fraction if weights is None else fraction * array_module(fraction).asarray(weights, fraction.dtype)
