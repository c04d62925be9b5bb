"""Workers that share a step: they add up in one order, own each parameter once, and end with whoever called them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from small_models import identical

from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.parallel import exchange, launch, processes
from minimoe.parallel.group import ALONE, Group
from minimoe.training import step

NO_FORK = pytest.mark.skipif(not processes.can_fork(), reason="workers are threads on this system")
KINDS = [pytest.param(True, id="processes", marks=NO_FORK), pytest.param(False, id="threads")]

MODEL = ModelConfig(vocab_size=11, width=8, layers=2, heads=2, head_width=4, context=5, experts=3, expert_width=4)
TOKENS, TARGETS = np.random.default_rng(0).integers(MODEL.vocab_size, size=(2, 6, 5))


def asked(size: int, processes: bool | None, work: Any, like: Any = MappingProxyType({})) -> Any:
    """What worker 0 of a group answers when everyone is told its own rank."""
    with launch.launch(size, work, like, processes) as run:
        return run(range(size))


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_gather_keeps_the_order_and_all_reduce_adds_in_it(size: int, processes: bool) -> None:
    def work(group: Group, rank: int) -> Any:
        assert (group.rank, group.size) == (rank, size)
        terms = group.all_gather((rank, np.full(2, 10.0**rank)))
        return terms, group.all_reduce([np.float32(1e8), np.float32(rank), -np.float32(1e8)])

    terms, total = asked(size, processes, work)
    assert [rank for rank, _ in terms] == list(range(size))
    np.testing.assert_array_equal([numbers for _, numbers in terms], [[10.0**rank] * 2 for rank in range(size)])
    expected = [np.float32(1e8), np.float32(0), -np.float32(1e8)]
    for rank in range(1, size):
        expected = tree.add(expected, [np.float32(1e8), np.float32(rank), -np.float32(1e8)])
    assert total == expected


@pytest.mark.parametrize("processes", KINDS)
def test_no_one_passes_a_barrier_before_all_have_come(processes: bool) -> None:
    came = processes.shared(np.zeros(2))

    def work(group: Group, rank: int) -> float:
        if rank == 1:
            time.sleep(0.1)
        came[rank] = 1
        group.barrier()
        return float(came.sum())

    assert asked(2, processes, work) == 2


def test_each_parameter_has_one_owner_and_owners_have_about_equally_much() -> None:
    params = dict(tree.named_leaves(decoder.init(np.random.default_rng(0), presets.preset("toy").config)))
    groups = [Group() for _ in range(3)]
    for rank, group in enumerate(groups):
        group.rank, group.size = rank, 3
    shares = [group.share(params) for group in groups]
    sizes = {name: leaf.size for name, leaf in params.items()}
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    held = [sum(sizes[name] for name in share) for share in shares]
    assert max(held) < 1.05 * min(held)
    assert sorted(ALONE.share(params)) == sorted(sizes)


def test_the_largest_parameters_are_given_away_first() -> None:
    params = {"a": np.zeros(1), "b": np.zeros(1), "c": np.zeros(1), "d": np.zeros(3)}
    for rank in (0, 1):
        group = Group()
        group.rank, group.size = rank, 2
        sizes = {name: leaf.size for name, leaf in params.items()}
        assert sum(sizes[name] for name in group.share(params)) == 3


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_reduce_scatter_gives_each_owner_the_sum_of_its_arrays(size: int, processes: bool) -> None:
    like = {"a": np.zeros((2, 3)), "b": np.zeros(4), "c": np.zeros(()), "d": np.zeros(0)}

    def work(group: Group, rank: int) -> dict[str, np.ndarray]:
        mine = {name: np.full_like(leaf, 10.0**rank) for name, leaf in like.items()}
        found = group.all_gather(group.reduce_scatter(mine, group.share(like)))
        group.barrier()
        return {name: leaf for one in found for name, leaf in one.items()}

    found = asked(size, processes, work, like)
    assert len(found) == len(like)
    for name, leaf in like.items():
        np.testing.assert_array_equal(found[name], np.full_like(leaf, sum(10.0**rank for rank in range(size))))


@pytest.mark.parametrize("processes", KINDS)
def test_assembled_rows_stay_as_they_are_until_the_next_call(processes: bool) -> None:
    """Worker 0 goes on at once, and is at its next rows while worker 1 still reads."""

    def work(group: Group, rank: int) -> Any:
        rows = np.arange(rank, rank + 2)[:, None] * np.ones(3)  # worker 0 has rows 0 and 1, worker 1 rows 2 and 3
        seen = group.assemble(rows + rank, 2 * rank, 4)
        if rank == 1:
            time.sleep(0.05)
        seen = seen.copy()
        group.assemble(rows + 9, 2 * rank, 4)
        return group.all_gather(seen)

    with launch.launch(2, work, {}, processes, board=4 * 3 * 8) as run:
        for seen in run(range(2)):
            np.testing.assert_array_equal(seen, np.arange(4)[:, None] * np.ones(3))


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
    params = decoder.init(np.random.default_rng(1), MODEL, "float64")
    rng = np.random.default_rng(2)
    with pytest.MonkeyPatch.context() as patch:
        if processes is not None:
            patch.setattr(processes, "can_fork", lambda: processes)
        with step.open_workers(params, optimizer.init(params, recipe), MODEL, recipe, workers) as team:
            for number in range(3):
                team.step(step.shard_batch(rng, team.params, TOKENS, TARGETS, MODEL, recipe, workers), number)
    return team.params, team.moments


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize("travel", [False, True])
def test_a_loss_that_is_no_number_changes_nothing_in_any_worker(
    processes: bool, travel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "can_fork", lambda: processes)
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: travel)
    recipe = TrainConfig(batch=6, warmup=0)
    params = decoder.init(np.random.default_rng(1), MODEL)
    params.norm.gain[0] = np.nan
    with step.open_workers(params, optimizer.init(params, recipe), MODEL, recipe, 2) as team:
        shards = step.shard_batch(np.random.default_rng(2), team.params, TOKENS, TARGETS, MODEL, recipe, 2)
        totals, norm = team.take(shards, 0)
    assert not step.is_finite(totals, norm)
    for one, other in zip(tree.leaves(params), tree.leaves(team.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(leaf.any() for moments in team.moments.values() for leaf in tree.leaves(moments))


# Failures


def test_a_thread_that_cannot_be_started_keeps_no_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def second_time_refused(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_time_refused)
    with pytest.raises(RuntimeError, match="can't start"):
        asked(3, False, lambda group, rank: group.barrier())
    assert not started[0].is_alive()


def test_a_group_of_threads_that_has_ended_is_not_taken_for_one_that_works() -> None:
    def work(group: Group, fails: bool) -> None:
        if fails:
            raise ZeroDivisionError
        group.barrier()

    with launch.launch(2, work, {}, processes=False) as run:
        with pytest.raises(ZeroDivisionError):
            run([False, True])
        with pytest.raises(threading.BrokenBarrierError):
            run([False, False])


@NO_FORK
def test_ctrl_c_while_a_worker_is_forked_does_not_make_it_a_second_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def interrupted() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr("os.fork", interrupted)
    assert asked(3, True, lambda group, rank: group.all_gather(rank)) == [0, 1, 2]


def test_a_linux_that_hides_its_files_gets_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    assert not processes.can_fork()


@pytest.mark.parametrize("processes", KINDS)
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_in_any_worker_reaches_the_caller(culprit: int, when: str, processes: bool) -> None:
    def work(group: Group, rank: int) -> None:
        if when == "after":
            group.all_gather(rank)
        if rank == culprit:
            raise ZeroDivisionError(f"in {rank}")
        group.barrier()

    with pytest.raises(ZeroDivisionError, match=f"in {culprit}"):
        asked(3, processes, work)


@NO_FORK
def test_a_worker_that_was_killed_is_told_in_a_sentence() -> None:
    def work(group: Group, rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.barrier()

    with pytest.raises(UserError, match="a worker process of this step is gone"):
        asked(2, True, work)


@NO_FORK
def test_a_system_without_room_for_workers_says_so_and_those_that_began_end(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []
    fork = os.fork

    def second_time_refused() -> int:
        if began:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        began.append(fork())
        return began[-1]

    monkeypatch.setattr("os.fork", second_time_refused)
    with pytest.raises(UserError, match=r"no worker process can be started \(Resource .*: give --threads 1"):
        asked(3, True, lambda group, rank: None)
    with pytest.raises(ProcessLookupError):
        os.kill(began[0], 0)


def test_memory_that_cannot_be_shared_is_told_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refused)
    with pytest.raises(MemoryError, match="800 bytes to share: Cannot allocate memory"):
        processes.shared(np.zeros(100))


@NO_FORK
def test_ctrl_c_is_left_to_the_caller_and_no_worker_outlives_the_group() -> None:
    processes = processes.shared(np.zeros(2, int))

    def work(group: Group, rank: int) -> str:
        processes[rank] = os.getpid()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        group.barrier()
        return "done"

    assert asked(2, True, work) == "done"
    assert processes[0] == os.getpid() != processes[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(processes[1]), 0)


@NO_FORK
def test_a_worker_holds_no_file_of_the_caller(tmp_path: Path) -> None:
    """A lock on a file lasts as long as someone has the file open."""
    with open(tmp_path / "file", "w") as file:

        def work(group: Group, rank: int) -> Any:
            return group.all_gather(os.listdir("/proc/self/fd"))[1]

        held = asked(3, True, work)
        assert str(file.fileno()) not in held
    assert len(held) <= 5  # input, output, errors, the pipe, and the list itself


KILLED = """
import os, sys, time
from minimoe import data_parallel

def work(group, rank):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, so that the words of three do not mix
    group.barrier()
    if rank == 0:
        time.sleep(60)

with data_parallel.workers(3, work, {}) as run:
    run(range(3))
"""


@NO_FORK
def test_workers_end_when_their_caller_is_killed() -> None:
    caller = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, encoding="utf-8")
    assert caller.stdout is not None
    started = [int(caller.stdout.readline()) for _ in range(3)]
    assert caller.pid in started
    caller.kill()
    caller.wait()
    watchdog = threading.Timer(20, lambda: [os.kill(pid, signal.SIGKILL) for pid in started if pid != caller.pid])
    watchdog.start()
    assert caller.stdout.read() == ""  # returns when no one has the pipe's other end
    assert watchdog.is_alive()
    watchdog.cancel()
    caller.stdout.close()
