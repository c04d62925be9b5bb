"""Expert parallelism: rows travel to the owners of the experts and back, and no result depends on it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_close, gradient_in_a_group, identical

from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer
from minimoe.parallel import exchange, launch
from minimoe.parallel.group import ALONE, Group
from minimoe.parallel.processes import can_fork
from minimoe.training import step

NO_FORK = pytest.mark.skipif(not can_fork(), reason="workers are threads on this system")
KINDS = [pytest.param(True, id="processes", marks=NO_FORK), pytest.param(False, id="threads")]

CONFIG = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=2, head_width=4, context=5, experts=5, expert_width=4, shared_experts=2
)
EVERY_LOSS = Objective(Coefficients(0.3, 0.2, 0.1, 0.05, 0.15))


def exchanged(counts: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Each worker's rows, what its experts got of them, and what came back when every owner returned what it got.

    A row is (worker, expert, which of the worker's rows for that expert).
    """

    def rows_of(worker: int) -> np.ndarray:
        rows = [(worker, e, i) for e, count in enumerate(counts[worker]) for i in range(count)]
        return np.array(rows, float).reshape(-1, 3)

    def work(group: Group, rank: int) -> Any:
        rows = rows_of(rank)
        all_to_all = exchange.between(group)(list(counts[rank]))
        arrived = all_to_all.dispatch(rows)
        assert len(arrived) == sum(all_to_all.counts)
        returned = all_to_all.return_rows(arrived.copy())
        return group.all_gather((rows, arrived, returned))

    size = len(counts)
    with launch.launch(size, work, {}, processes=False) as run:
        everyones = run(range(size))
    return tuple(map(list, zip(*everyones, strict=True)))  # type: ignore[return-value]


@given(
    st.integers(2, 4).flatmap(
        lambda size: st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=size, max_size=size)
    )
)
@settings(max_examples=30, deadline=None)
def test_rows_meet_at_the_owner_of_their_expert_and_return(counts: list[list[int]]) -> None:
    sent, arrived, returned = exchanged(counts)
    size = len(counts)
    for rank in range(size):
        own = range(rank * 4 // size, (rank + 1) * 4 // size)
        everything = [tuple(row) for rows in sent for row in rows]
        expected = sorted((e, worker, i) for worker, e, i in everything if e in own)
        assert [(e, worker, i) for worker, e, i in arrived[rank]] == expected
        np.testing.assert_array_equal(returned[rank], sent[rank])


@NO_FORK
@pytest.mark.parametrize("size", [2, 3])
def test_processes_exchange_the_rows_that_threads_exchange(size: int) -> None:
    """Many times in a row, so that a buffer is written again while another worker may still read the other."""
    rng = np.random.default_rng(0)
    counts = rng.integers(4, size=(size, 5))
    rows = [rng.standard_normal((of_one.sum(), 3)).astype("f") for of_one in counts]

    def work(group: Group, rank: int) -> Any:
        all_to_all = exchange.between(group)(counts[rank].tolist())
        seen = []
        for turn in range(20):
            seen.append(all_to_all.dispatch(rows[rank] + turn))
            seen.append(all_to_all.return_rows(2 * seen[-1]))
        return group.all_gather(seen)

    found = []
    for processes in (True, False):
        with launch.launch(size, work, {}, processes, row_bytes=int(counts.sum()) * 3 * 4) as run:
            found.append(run(range(size)))
    assert identical(*found)
    assert all(one.dtype == np.float32 for one in tree.leaves(found))


def test_alone_every_row_stays_where_it_is() -> None:
    rows = np.ones((3, 2))
    all_to_all = exchange.between(ALONE)([2, 0, 1])
    assert all_to_all.dispatch(rows) is rows and all_to_all.return_rows(rows) is rows
    assert all_to_all.counts == [2, 0, 1] and (all_to_all.own(rows) == rows).all()


# Gradients


def batch(rng: np.random.Generator, sizes: Sequence[int], masked: bool) -> list[Shard]:
    """Shards of so many sequences."""
    shards = []
    for size in sizes:
        tokens, targets = rng.integers(CONFIG.vocab_size, size=(2, size, CONFIG.context))
        noise = rng.standard_normal((CONFIG.layers, size, CONFIG.context, CONFIG.experts))
        lengths = rng.integers(1, CONFIG.context + 1, size=size)
        mask = (np.arange(CONFIG.context) < lengths[:, None]).astype(float) if masked else None
        shards.append(Shard(tokens, targets, noise, mask))
    return shards


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize(
    ("size", "sequences", "capacity", "masked", "recompute"),
    [
        (2, [2, 2], None, False, False),
        (2, [3, 1], None, False, False),  # of different sizes
        (2, [1, 2, 2, 1], 0.7, True, True),  # two shards each, full experts, padding, forward twice
        (3, [1, 2, 1], 0.7, False, False),
        (5, [1, 1, 1, 1, 1], None, True, False),  # one expert each
    ],
)
def test_every_gradient_is_the_one_that_a_worker_alone_would_get(
    size: int, sequences: list[int], capacity: float | None, masked: bool, recompute: bool, processes: bool
) -> None:
    rng = np.random.default_rng(1)
    params = decoder.init(rng, CONFIG, "float64")
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)  # no zeros, no ones
    shards = batch(rng, sequences, masked)
    goal = EVERY_LOSS._replace(capacity_factor=capacity)
    alone, expected = objective.loss_and_gradient(params, shards, CONFIG, goal)
    found, gradient = gradient_in_a_group(
        size, params, shards, CONFIG, goal, recompute=recompute, processes=processes, owners=True
    )
    np.testing.assert_allclose(found.total, alone.total, rtol=1e-13)
    assert found.dropped == alone.dropped and (capacity is None or sum(alone.dropped) > 0)
    assert_close(gradient, expected, atol=1e-13)


# Steps


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize(("workers", "accumulate"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_owners_of_experts_take_the_step_that_one_takes_alone(
    workers: int, accumulate: int, processes: bool, optimizer_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TrainConfig(batch=6, warmup=0, accumulate=accumulate, dtype="float64", clip=0.01, optimizer=optimizer_name)
    alone, moments = stepped(recipe, 1, processes, monkeypatch)
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: True)
    assert exchange.worth_exchanging(CONFIG, recipe, workers)
    together, their_moments = stepped(recipe, workers, processes, monkeypatch)
    assert_close(together, alone, atol=1e-10)
    assert_close(their_moments, moments, atol=1e-10)


def stepped(
    recipe: TrainConfig, workers: int, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Decoder, optimizer.State]:
    """A model and the optimiser's memory after three steps."""
    monkeypatch.setattr(launch, "can_fork", lambda: processes)
    rng = np.random.default_rng(2)
    params = decoder.init(rng, CONFIG, "float64")
    tokens, targets = rng.integers(CONFIG.vocab_size, size=(2, recipe.batch, CONFIG.context))
    with step.open_workers(params, optimizer.init(params, recipe), CONFIG, recipe, workers) as opened:
        for number in range(3):
            opened.step(step.shard_batch(rng, opened.params, tokens, targets, CONFIG, recipe, workers), number)
    return opened.params, opened.moments


def test_rows_are_exchanged_only_where_that_is_faster() -> None:
    toy = presets.override(presets.preset("toy"), {"expert_width": 256})
    many = dataclasses.replace(toy.config, experts=64)
    assert exchange.worth_exchanging(many, toy.recipe, 2)
    assert not exchange.worth_exchanging(many, toy.recipe, 1), "alone"
    assert not exchange.worth_exchanging(toy.config, toy.recipe, 2), "few experts"
    few_rows = dataclasses.replace(toy.recipe, accumulate=8)
    assert not exchange.worth_exchanging(toy.config, few_rows, 2), "few experts, and few rows, but again and again"
    rows = 4 * many.width
    most = (3 * many.experts * many.width * many.expert_width - exchange.WAITING_COST) // (2 * rows)
    assert exchange.exchange_is_faster(many, most)
    assert not exchange.exchange_is_faster(many, most + 1)


def test_rows_are_exchanged_only_where_everyone_has_experts_and_equally_many_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda config, rows: asked.append(rows) or True)
    one, K = CONFIG.context, CONFIG.active_experts
    for batch, accumulate, workers, sequences in (
        (5, 1, 5, 5),
        (6, 1, 6, None),  # 5 experts
        (6, 1, 2, 6),
        (6, 2, 2, 4),  # shards of 2, 2, 1 and 1, of which 2 are at work at once
        (7, 1, 2, 8),
        (6, 3, 4, None),  # 6 shards
        (3, 1, 4, None),  # 3 shards
    ):
        recipe = TrainConfig(batch=batch, accumulate=accumulate)
        assert exchange.worth_exchanging(CONFIG, recipe, workers) == (sequences is not None)
        if sequences is not None:
            assert asked.pop() == sequences * one * K
        assert asked == []


def test_where_rows_are_exchanged_no_room_is_kept_for_gradients_of_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = {}
    monkeypatch.setattr(step, "launch", lambda size, work, like, row_bytes=0: opened.update({row_bytes: like}))
    params = decoder.init(np.random.default_rng(0), CONFIG)
    recipe = TrainConfig(batch=6)
    step.launch_for(2, print, params, CONFIG, recipe)
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: True)
    step.launch_for(2, print, params, CONFIG, recipe)
    row_bytes = 6 * CONFIG.context * CONFIG.active_experts * CONFIG.width * 4  # rows in single precision
    everything = dict(tree.named_leaves(params))
    assert opened[0].keys() == everything.keys()
    assert opened[row_bytes].keys() == everything.keys() - set(tree.marked(params, "by_expert"))


def test_every_stack_of_experts_and_nothing_else_is_split_off() -> None:
    params = decoder.init(np.random.default_rng(0), CONFIG)
    experts, others = exchange.split(dict(tree.named_leaves(params)), set(tree.marked(params, "by_expert")))
    assert {id(leaf) for leaf in experts.values()} == {
        id(leaf) for block in params.blocks for leaf in block.moe.experts
    }
    assert len(experts) + len(others) == len(tree.leaves(params))


def test_there_is_room_for_every_expert_of_every_token_if_their_number_varies() -> None:
    recipe = TrainConfig(batch=8)
    for router, most in (("sigmoid_bias", 2), ("remoe", 5), ("expert_threshold", 5)):
        config = dataclasses.replace(CONFIG, router=router)
        assert exchange.most_rows(config, recipe, 2) == 8 * config.context * most, router


def test_experts_of_which_some_have_no_parameters_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda config, rows: True)
    recipe = TrainConfig(batch=8)
    assert exchange.worth_exchanging(CONFIG, recipe, 2)
    assert not exchange.worth_exchanging(dataclasses.replace(CONFIG, expert_kind="zero_computation"), recipe, 2)
