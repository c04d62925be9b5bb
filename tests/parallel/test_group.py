"""What the workers of a group tell each other, and what each of them owns: the same for processes and threads."""

import time
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import presets, tree
from minimoe.layers import decoder
from minimoe.parallel.group import ALONE, Group
from minimoe.parallel.launch import launch
from minimoe.parallel.processes import can_fork, shared

NO_FORK = pytest.mark.skipif(not can_fork(), reason="workers are threads on this system")
KINDS = [pytest.param(True, id="processes", marks=NO_FORK), pytest.param(False, id="threads")]


def asked(size: int, processes: bool | None, work: Any, like: Any = MappingProxyType({})) -> Any:
    """What worker 0 of a group answers when everyone is told its own rank."""
    with launch(size, work, like, processes) as run:
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
    came = shared(np.zeros(2))

    def work(group: Group, rank: int) -> float:
        if rank == 1:
            time.sleep(0.1)
        came[rank] = 1
        group.barrier()
        return float(came.sum())

    assert asked(2, processes, work) == 2


def groups(size: int) -> list[Group]:
    """What each of so many workers knows of itself."""
    found = [Group() for _ in range(size)]
    for rank, group in enumerate(found):
        group.rank, group.size = rank, size
    return found


@given(count=st.integers(0, 40), size=st.integers(1, 7))
def test_every_item_is_in_the_part_of_one_worker_and_parts_are_about_equally_long(count: int, size: int) -> None:
    parts = [range(count)[group.part(count)] for group in groups(size)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_parameter_has_one_owner_and_owners_have_about_equally_much() -> None:
    params = dict(tree.named_leaves(decoder.init(np.random.default_rng(0), presets.preset("toy").config)))
    shares = [group.share(params) for group in groups(3)]
    sizes = {name: leaf.size for name, leaf in params.items()}
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    held = [sum(sizes[name] for name in share) for share in shares]
    assert max(held) < 1.05 * min(held)
    assert sorted(ALONE.share(params)) == sorted(sizes)


def test_the_largest_parameters_are_given_away_first() -> None:
    params = {"a": np.zeros(1), "b": np.zeros(1), "c": np.zeros(1), "d": np.zeros(3)}
    for group in groups(2):
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

    with launch(2, work, {}, processes, row_bytes=4 * 3 * 8) as run:
        for seen in run(range(2)):
            np.testing.assert_array_equal(seen, np.arange(4)[:, None] * np.ones(3))


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
