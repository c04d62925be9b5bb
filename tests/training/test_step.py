"""One training step: the noise does not know how the batch is cut, and a loss that is no number changes nothing."""

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.training import step

CONFIG = ModelConfig(vocab_size=11, width=8, layers=2, heads=2, head_width=4, context=5, experts=3, expert_width=4)
RECIPE = TrainConfig(batch=6, warmup=0)
TOKENS, TARGETS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 6, 5))


@pytest.fixture
def params() -> Decoder:
    return decoder.init(np.random.default_rng(1), CONFIG)


@pytest.mark.parametrize("threads", [1, 2, 4, 9])
def test_every_cut_of_a_batch_has_the_same_tokens_and_noise(params: Decoder, threads: int) -> None:
    whole = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, 1)[0]
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, threads)
    assert len(shards) == min(threads, 6)
    np.testing.assert_array_equal(np.concatenate([shard.tokens for shard in shards]), TOKENS)
    np.testing.assert_array_equal(np.concatenate([shard.targets for shard in shards]), TARGETS)
    np.testing.assert_array_equal(np.concatenate([shard.noise for shard in shards], axis=1), whole.noise)


def test_a_step_is_downhill(params: Decoder) -> None:
    moments = optimizer.init(params, RECIPE)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, 2)
    losses = [float(step.train_step(params, moments, shards, CONFIG, RECIPE, number)[0].total) for number in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_a_loss_that_is_no_number_changes_nothing(params: Decoder) -> None:
    params.norm.gain[0] = np.nan
    before = tree.map(np.copy, params)
    moments = optimizer.init(params, RECIPE)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, 2)
    totals, norm = step.train_step(params, moments, shards, CONFIG, RECIPE, 0)
    assert not step.is_finite(totals, norm)
    for one, other in zip(tree.leaves(before), tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(moment.mean.any() for moment in moments.values())
