"""The auxiliary losses, which keep every expert in use: each a function of sums over tokens, each with a coefficient.

    balance      E Σ_e f_e p̄_e,  f the share of assignments, p̄ the mean probability      1 at perfect balance
    importance   CV²(Σ_t w_t)    how unevenly the weights are spread over the experts     0 at perfect balance
    load         CV²(Σ_t P_t)    how unevenly the chance of being chosen is spread        0 at perfect balance
    z            Σ_t lse_t² / N  how large the logits are                                 keeps them small

They are taken for one layer at a time. Pooled over layers, each layer's collapse can hide behind another's: four
layers that each use only a pair of 8 experts, every layer another pair, look perfectly balanced in the sum.

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
    """How much each loss counts beside the language-model loss; 0 switches one off."""

    balance: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    z: float = 0.0


class Losses(NamedTuple):
    """The four losses of one layer before their coefficients."""

    balance: Array  # ()
    importance: Array  # ()
    load: Array  # ()
    z: Array  # ()


def loss(stats: RouterStats, coefficients: Coefficients) -> tuple[Losses, RouterStats]:
    """Sums over all tokens of a step → each loss, and the gradient of their weighted sum by every sum.

    f is made of counts and constant; p̄ = Σp/N, so only Σp carries the balance loss:

        ∂/∂Σp_e = α E f_e / N,    ∂/∂Σlse² = c / N
    """
    xp = array_module(stats.probability)
    experts = stats.probability.shape[0]
    fraction = stats.assignments / xp.maximum(stats.assignments.sum(), 1)  # (E,)
    tokens = xp.maximum(xp.full((), stats.tokens, stats.probability.dtype), 1)
    importance, dimportance = squared_variation(stats.importance)
    load, dload = squared_variation(stats.load)
    losses = Losses(
        balance=experts * (fraction * stats.probability).sum() / tokens,
        importance=importance,
        load=load,
        z=stats.squared_lse / tokens,
    )
    gradient = RouterStats(
        tokens=0,
        assignments=xp.zeros_like(fraction),
        probability=(coefficients.balance * experts / tokens) * fraction,
        importance=coefficients.importance * dimportance,
        load=coefficients.load * dload,
        squared_lse=coefficients.z / tokens,
        entropy=xp.zeros_like(stats.entropy),
    )
    return losses, gradient


def pooled(stats: Sequence[RouterStats], coefficient: float) -> tuple[Array, RouterStats]:
    """The balance loss as the transformers library takes it, and ``coefficient`` times its gradient by each sum.

    There the layers' sums are added up before the product is taken, and f is not divided by K:

        E Σ_e f_e p̄_e,    f_e = Σ_l assignments_le / Σ_l N_l,    p̄_e = Σ_l Σp_le / Σ_l N_l

    So the value is K, not 1, at perfect balance: with one layer it is K times ``Losses.balance``, and its coefficient
    is worth K times as much. And it hides collapse: see above, that model scores the perfect K. It is here to compare
    with models trained elsewhere; ``loss`` is the better one to train with. A sum enters only by way of the total, so
    the gradient is the same for every layer:

        ∂/∂Σp_le = α E f_e / Σ_l N_l
    """
    total = tree.add(*stats)
    xp = array_module(total.probability)
    tokens = xp.maximum(xp.full((), total.tokens, total.probability.dtype), 1)
    fraction = total.assignments / tokens  # (E,)  adds up to K
    scale = len(fraction) / tokens
    gradient = tree.zeros_like(total._replace(tokens=tokens))
    return scale * (fraction * total.probability).sum(), gradient._replace(probability=coefficient * scale * fraction)


def weighted(losses: Losses, coefficients: Coefficients) -> Array:
    """What the four losses add to the training loss."""
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
