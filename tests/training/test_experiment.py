"""Runs in memory: the same steps as a run in a folder, frozen parts that stay, and the measure of balance."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small_runs

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.losses.distillation import Distillation, Settings
from minimoe.losses.objective import Totals
from minimoe.optim import clipping
from minimoe.text import batches
from minimoe.text.batches import Texts
from minimoe.training import experiment

RECIPE = dataclasses.replace(small_runs.RECIPE, evaluate_every=0, save_every=0)


@pytest.fixture(scope="module")
def prepared() -> tuple[ModelConfig, Texts]:
    data, _, codec = batches.prepare(small_runs.CORPUS, RECIPE, small_runs.CONFIG.context)
    return dataclasses.replace(small_runs.CONFIG, vocab_size=codec.vocab_size), data


def test_it_reaches_the_loss_of_a_run_in_a_folder(prepared: tuple[ModelConfig, Texts], tmp_path: Path) -> None:
    """With the parameters drawn alike; a run draws its noise from the generator that drew its parameters."""
    config, data = prepared
    quiet = dataclasses.replace(config, noisy_gating=False)
    learned = experiment.learn(quiet, RECIPE, data, seed=3)
    run = small_runs.train(tmp_path / "run", noisy_gating=False, seed=3)
    assert learned.loss == pytest.approx(run.metrics[-1]["val_loss"], rel=1e-6)
    assert learned.load.sum(1) == pytest.approx(1)
    assert learned.active == config.active_experts
    assert learned.seconds > 0


def test_what_is_frozen_stays_and_the_rest_moves(prepared: tuple[ModelConfig, Texts]) -> None:
    config, data = prepared
    learned = experiment.learn(config, RECIPE, data, 1, frozen=lambda name: ".router." in name)
    fresh = decoder.init(np.random.default_rng(1), config, RECIPE.dtype)
    for (name, before), after in zip(tree.named_leaves(fresh), tree.leaves(learned.params), strict=True):
        assert (before == after).all() == (".router." in name), name


def test_it_starts_from_a_copy_of_given_parameters(prepared: tuple[ModelConfig, Texts]) -> None:
    """A start that is what the seed would draw changes nothing, and is not changed; another one gives another run."""
    config, data = prepared
    short = dataclasses.replace(RECIPE, steps=3)
    fresh = decoder.init(np.random.default_rng(1), config, RECIPE.dtype)
    kept = tree.map(np.array, fresh)
    losses = [experiment.learn(config, short, data, 1, start=start).loss for start in (None, fresh, fresh)]
    assert losses[0] == losses[1] == losses[2]
    assert all((a == b).all() for a, b in zip(tree.leaves(fresh), tree.leaves(kept), strict=True))
    other = decoder.init(np.random.default_rng(2), config, RECIPE.dtype)
    assert experiment.learn(config, short, data, 1, start=other).loss != losses[0]


def test_a_run_may_have_another_loss(prepared: tuple[ModelConfig, Texts]) -> None:
    config, data = prepared
    teacher = decoder.init(np.random.default_rng(7), config, RECIPE.dtype)
    hard, soft = (
        experiment.learn(config, RECIPE, data, 1, token_loss=Distillation(teacher, config, Settings(1.0, share)))
        for share in (1.0, 0.0)
    )
    assert hard.loss == experiment.learn(config, RECIPE, data, 1).loss
    assert hard.loss != soft.loss


def test_each_step_can_be_watched(prepared: tuple[ModelConfig, Texts]) -> None:
    config, data = prepared
    losses, penalties, active = [], [], []

    def watch(params: decoder.Decoder, totals: Totals) -> None:
        losses.append(float(totals.total))
        penalties.append(float(params.blocks[0].moe.router.penalty[0]))
        active.append(np.mean([layer.assignments.sum() / layer.tokens for layer in totals.stats]))

    remoe = dataclasses.replace(config, router="remoe")
    learned = experiment.learn(remoe, RECIPE, data, 1, watch=watch)
    assert len(set(losses)) == RECIPE.steps
    assert penalties[0] == pytest.approx(1e-8), "the first step is seen before the state moves"
    assert all(before != after for before, after in pairwise(penalties)), "and each step moves it"
    assert learned.active == active[-1] != active[0], "the last tenth of so few steps is one"


def test_what_is_frozen_is_no_part_of_the_norm(
    prepared: tuple[ModelConfig, Texts], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = prepared
    clipped: list[int] = []
    monkeypatch.setattr(clipping, "clip", lambda gradients, limit: clipped.append(len(gradients)))
    experiment.learn(config, RECIPE, data, 1, frozen=lambda name: not name.startswith("norm"))
    assert clipped == [1] * RECIPE.steps


def test_a_router_that_looks_ahead_has_to_be_allowed(prepared: tuple[ModelConfig, Texts]) -> None:
    config, data = prepared
    ahead, short = dataclasses.replace(config, router="expert_choice"), dataclasses.replace(RECIPE, steps=1)
    with pytest.raises(UserError, match="looks at later tokens"):
        experiment.learn(ahead, short, data, 0)
    assert experiment.learn(ahead, short, data, 0, look_ahead=True).loss > 0


def test_seeds_differ_and_repeat(prepared: tuple[ModelConfig, Texts]) -> None:
    config, data = prepared
    losses = [experiment.learn(config, RECIPE, data, seed).loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_name_that_no_router_has_is_refused(prepared: tuple[ModelConfig, Texts]) -> None:
    config, data = prepared
    with pytest.raises(UserError, match="there is no router"):
        experiment.learn(dataclasses.replace(config, router="nobody"), TrainConfig(), data, 0)


def test_a_run_can_begin_with_given_parameters_and_leaves_them_as_they_are(
    prepared: tuple[ModelConfig, Texts],
) -> None:
    config, data = prepared
    start = decoder.init(np.random.default_rng(1), config, RECIPE.dtype)
    before = tree.map(np.copy, start)
    fresh, begun = experiment.learn(config, RECIPE, data, 1), experiment.learn(config, RECIPE, data, 1, start=start)
    assert fresh.loss == begun.loss
    other = experiment.learn(config, RECIPE, data, 1, start=begun.params)
    assert other.loss != begun.loss
    for now, then in zip(tree.leaves(start), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_chosen_documents_alone_are_read_in_the_chosen_order(prepared: tuple[ModelConfig, Texts]) -> None:
    _, data = prepared
    assert data.names == ["pyramid", "seasons"]
    one, both = experiment.only(data, "seasons"), experiment.only(data, "seasons", "pyramid")
    assert one.names == ["seasons"] and both.names == ["seasons", "pyramid"]
    np.testing.assert_array_equal(one.starts, data.starts[data.spans[1]])
    np.testing.assert_array_equal(one.validation[0], data.validation[1])
    for number, name in enumerate(both.names):
        own = data.starts[data.spans[data.names.index(name)]]
        np.testing.assert_array_equal(both.starts[both.spans[number]], own)
    tokens, _ = next(one.batches(4, 8))
    seasons = data.train[data.starts[data.spans[1]][0] :]
    assert all(bytes(row.astype("u1")) in bytes(seasons.astype("u1")) for row in tokens)
    with pytest.raises(KeyError):
        experiment.only(data, "weather")
