"""Trials: the same step as in a run, the same batches for one seed, and true measurements of altered runs."""

import dataclasses

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder
from minimoe.losses.objective import Shard
from minimoe.optim import optimizer
from minimoe.text.chat import Encoded, Turn
from minimoe.text.instructions import Instruction
from minimoe.training import step
from minimoe.tuning import packing, sft, trial
from minimoe.tuning.sft import Data, Example

CONFIG = ModelConfig(
    vocab_size=9, width=8, layers=1, heads=2, kv_heads=1, head_width=4, context=12, experts=3, expert_width=6
)
RECIPE = TrainConfig(steps=4, batch=2, warmup=0, learning_rate=0.02)


def examples(count: int, kind: str, seed: int) -> list[Example]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        n = int(rng.integers(3, 7))
        made.append(Example(kind, Encoded(rng.integers(9, size=n).astype(np.int32), np.arange(n) >= n - 2)))
    return made


@pytest.fixture
def data() -> Data:
    train, held_out = examples(12, "a", 0) + examples(6, "b", 1), examples(3, "a", 2) + examples(2, "b", 3)
    items = [
        Instruction(one.kind, (Turn("user", f"{n}"), Turn("assistant", "x")), "d") for n, one in enumerate(held_out)
    ]
    return Data(train, held_out, items, 0, 0, "")


@pytest.fixture
def params(rng: np.random.Generator) -> decoder.Decoder:
    return decoder.init(rng, CONFIG)


def test_it_takes_the_steps_of_a_run_and_leaves_the_given_parameters_alone(params: decoder.Decoder, data: Data) -> None:
    start = tree.map(np.copy, params)
    course = trial.learn(params, CONFIG, RECIPE, data, seed=5)
    assert all((mine == before).all() for mine, before in zip(tree.leaves(params), tree.leaves(start), strict=True))
    moments, noise = optimizer.init(start, RECIPE), np.random.default_rng(5)
    batches = packing.Batches([example.ids for example in data.train], 12, 2, True, 5).read()
    for number in range(4):
        step.train_step(
            start, moments, step.cut(noise, start, next(batches), CONFIG, RECIPE, 1), CONFIG, RECIPE, number
        )
    for mine, other in zip(tree.leaves(course.params), tree.leaves(start), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_points_are_losses_on_both_parts(params: decoder.Decoder, data: Data) -> None:
    course = trial.learn(params, CONFIG, RECIPE, data, seed=0, every=3)
    assert [point.step for point in course.points] == [3, 4]
    pieces = sft.pieces_of(data.validation, CONFIG)
    assert course.points[-1].validation == sft.validate_on(course.params, CONFIG, pieces, map).loss
    pieces = sft.pieces_of(data.train[::4], CONFIG)
    assert course.points[-1].train == sft.validate_on(course.params, CONFIG, pieces, map).loss
    short = dataclasses.replace(RECIPE, steps=3, schedule="linear")
    assert len(trial.learn(params, CONFIG, short, data, seed=0).points) == 1


def test_only_what_is_learned_is_altered(params: decoder.Decoder, data: Data) -> None:
    seen: list[Shard] = []

    def nothing(shard: Shard) -> Shard:
        seen.append(shard)
        assert shard.loss_mask is not None
        return shard._replace(loss_mask=0 * shard.loss_mask)

    recipe = dataclasses.replace(RECIPE, weight_decay=0.0, balance_loss=0.0, z_loss=0.0)
    course = trial.learn(params, CONFIG, recipe, data, seed=0, pack=False, alter=nothing)
    assert all(
        (mine == before).all() for mine, before in zip(tree.leaves(course.params), tree.leaves(params), strict=True)
    )
    assert len(seen) == 4 and all(shard.starts is None for shard in seen)
    assert course.points[-1].validation > 0


def test_examples_of_some_kinds(data: Data) -> None:
    some = trial.of_kinds(data, ["b"])
    assert some.train == data.train[12:] and some.validation == data.validation[3:] and some.items == data.items[3:]
    few = trial.of_kinds(data, ["a", "b"], 6)
    assert few.train == data.train[::3] and few.validation == data.validation
