"""Workers that share a training step: they take the step that one takes alone, as processes or as threads."""

import os

import numpy as np
import pytest
from small_models import identical

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.parallel import exchange, launch
from minimoe.parallel.processes import can_fork
from minimoe.training import step

NO_FORK = pytest.mark.skipif(not can_fork(), reason="workers are threads on this system")
KINDS = [pytest.param(True, id="processes", marks=NO_FORK), pytest.param(False, id="threads")]

CONFIG = ModelConfig(vocab_size=11, width=8, layers=2, heads=2, head_width=4, context=5, experts=3, expert_width=4)
TOKENS, TARGETS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 6, 5))


@pytest.mark.parametrize("processes", KINDS)
def test_the_system_decides_between_processes_and_threads(processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "can_fork", lambda: processes)
    with launch.launch(2, lambda group, _: group.all_gather(os.getpid()), {}) as run:
        assert len(set(run([None, None]))) == (2 if processes else 1)


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize("workers", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_take_the_step_that_one_takes_alone(workers: int, processes: bool, accumulate: int) -> None:
    recipe = TrainConfig(batch=6, warmup=0, accumulate=accumulate, dtype="float64", clip=0.01)
    alone, _ = stepped(recipe, 1, None)
    together, moments = stepped(recipe, workers, processes)
    for (name, one), other in zip(tree.named_leaves(alone), tree.leaves(together), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-10, err_msg=name)
    again, moments_again = stepped(recipe, workers, False)
    assert identical(together, again), "processes and threads round alike"
    assert identical(list(moments.values()), list(moments_again.values()))


def stepped(recipe: TrainConfig, workers: int, processes: bool | None) -> tuple[Decoder, optimizer.State]:
    """A model and the optimiser's memory after three steps."""
    params = decoder.init(np.random.default_rng(1), CONFIG, "float64")
    rng = np.random.default_rng(2)
    with pytest.MonkeyPatch.context() as patch:
        if processes is not None:
            patch.setattr(launch, "can_fork", lambda: processes)
        with step.open_workers(params, optimizer.init(params, recipe), CONFIG, recipe, workers) as opened:
            for number in range(3):
                opened.step(step.shard_batch(rng, opened.params, TOKENS, TARGETS, CONFIG, recipe, workers), number)
    return opened.params, opened.moments


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize("exchanged", [False, True])
def test_a_loss_that_is_no_number_changes_nothing_in_any_worker(
    processes: bool, exchanged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "can_fork", lambda: processes)
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: exchanged)
    recipe = TrainConfig(batch=6, warmup=0)
    params = decoder.init(np.random.default_rng(1), CONFIG)
    params.norm.gain[0] = np.nan
    with step.open_workers(params, optimizer.init(params, recipe), CONFIG, recipe, 2) as opened:
        shards = step.shard_batch(np.random.default_rng(2), opened.params, TOKENS, TARGETS, CONFIG, recipe, 2)
        totals, norm = opened.step(shards, 0)
    assert not step.is_finite(totals, norm)
    for one, other in zip(tree.leaves(params), tree.leaves(opened.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(leaf.any() for moments in opened.moments.values() for leaf in tree.leaves(moments))
