"""The token loss: what counts in it, and that another one than cross-entropy reaches the gradient."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from small_models import EVERY_LOSS, assert_close, assert_same, batch_of, drawn, split

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers.linear import Linear
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard, loss_and_gradient
from minimoe.losses.token_loss import CrossEntropy, Labelled, TokenLoss, weights


def masked(rng: np.random.Generator, batch: Shard) -> Shard:
    """The same batch, where about half of the targets count, each by a factor of its own."""
    mask = rng.uniform(0.5, 2, batch.tokens.shape) * (rng.random(batch.tokens.shape) < 0.5)
    mask[:, 0] = 1.5
    return batch._replace(loss_mask=mask)


def test_a_loss_mask_weighs_the_targets_and_hides_no_token_from_the_routers(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    params, plain = drawn(rng, small), batch_of(rng, small)
    batch = masked(rng, plain)
    totals, _ = loss_and_gradient(params, [batch], small, Objective(EVERY_LOSS))
    without, _ = loss_and_gradient(params, [plain], small, Objective(EVERY_LOSS))
    assert_close(totals.stats, without.stats)
    assert_close(totals.auxiliary, without.auxiliary)
    assert plain.mask is not None and 0 in plain.mask, "no padding, so the two masks are not told apart"
    nats = [
        loss_and_gradient(params, [plain._replace(loss_mask=one)], small, Objective())[0].loss
        for one in one_at_a_time(batch.tokens.shape)
    ]
    counted = (batch.mask * batch.loss_mask).reshape(-1)  # type: ignore[operator]
    assert totals.loss == pytest.approx(counted @ np.array(nats) / counted.sum(), rel=1e-12)


def one_at_a_time(shape: tuple[int, ...]) -> list[Array]:
    return list(np.eye(int(np.prod(shape))).reshape(-1, *shape))


@pytest.mark.parametrize("sizes", [[4, 2], [1, 2, 3]])
def test_shards_with_unequal_numbers_of_targets_give_the_loss_of_their_batch(
    rng: np.random.Generator, small: ModelConfig, sizes: list[int]
) -> None:
    params, batch = drawn(rng, small), masked(rng, batch_of(rng, small))
    whole = loss_and_gradient(params, [batch], small, Objective(EVERY_LOSS))
    assert_same(loss_and_gradient(params, split(batch, sizes), small, Objective(EVERY_LOSS)), whole)


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_without_a_target_has_no_loss_and_no_gradient(
    rng: np.random.Generator, small: ModelConfig, padded: bool
) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, noisy=False)
    nothing = np.zeros(batch.tokens.shape)
    batch = batch._replace(mask=batch.mask if padded else None, loss_mask=nothing)
    totals, gradient = loss_and_gradient(params, [batch], small, Objective(Coefficients(0, 0, 0, 0)))
    assert totals.loss == 0
    assert all(not leaf.any() for _, leaf in tree.named_leaves(gradient))


class SquaredLogits(NamedTuple):
    """½ Σ z² over the targets that count, divided by the square of their number: no linear function of a sum."""

    def forward(self, logits: Array, shard: Labelled) -> tuple[tuple[Any, Any], Any]:
        counted = weights(shard)
        assert counted is not None
        return ((logits**2 * counted[..., None]).sum() / 2, counted.sum()), (logits, counted)

    def value(self, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        return sums[0] ** 2 / sums[1] ** 2, 2 * sums[0] / sums[1] ** 2

    def backward(self, cache: Any, dsums: Any) -> Array:
        logits, counted = cache
        return (dsums * logits * counted[..., None]).reshape(-1, logits.shape[-1])


@pytest.mark.parametrize("token_loss", [CrossEntropy(), SquaredLogits()])
def test_every_loss_gets_its_own_gradient_however_the_batch_is_split(
    rng: np.random.Generator, small: ModelConfig, token_loss: TokenLoss
) -> None:
    params, batch = drawn(rng, small), masked(rng, batch_of(rng, small))
    goal = Objective(EVERY_LOSS, token_loss=token_loss)
    totals, gradient = loss_and_gradient(params, [batch], small, goal)
    for recompute in (False, True):
        again = loss_and_gradient(params, split(batch, [1, 2, 3]), small, goal, recompute=recompute)
        assert_same(again, (totals, gradient))
    assert params.head is not None and gradient.head is not None
    weight, step = params.head.weight, 1e-6 * np.sign(gradient.head.weight)

    def loss(sign: int) -> float:
        moved = params._replace(head=Linear(weight + sign * step))
        return float(loss_and_gradient(moved, [batch], small, goal)[0].total)

    assert (loss(1) - loss(-1)) / 2e-6 == pytest.approx(np.abs(gradient.head.weight).sum(), rel=1e-6)
