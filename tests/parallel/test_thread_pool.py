"""What a machine has to work with, and a pool of threads for what is only read."""

import sys
from typing import Any

import numpy as np
import pytest

from minimoe.core import resources
from minimoe.core.errors import UserError
from minimoe.parallel import launch, processes, thread_pool
from minimoe.parallel.group import Group


def test_every_core_is_used_unless_told_otherwise() -> None:
    assert resources.thread_count(None) == resources.cores() >= 1
    assert resources.thread_count(3) == 3


@pytest.mark.parametrize("wish", [0, -2, 1025, 1.5, "2"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(wish: int) -> None:
    with pytest.raises(UserError, match=f"threads {wish!r} makes no sense"):
        resources.thread_count(wish)


def test_memory_is_told_in_bytes_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    known = resources.memory_bytes()
    assert known is None or known > 10**8

    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown, raising=False)
    assert resources.memory_bytes() is None


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak()
    held = np.ones(before // 8 + 8_000_000)
    assert peak() > before + 5e7
    del held
    assert peak() > before + 5e7, "a peak does not fall"


@pytest.mark.skipif(not processes.can_fork(), reason="workers are threads on this system")
def test_peak_memory_counts_what_a_worker_process_shares_with_no_one() -> None:
    shared = processes.shared(np.zeros(10_000_000))

    def work(group: Group, mine: int) -> Any:
        held = np.ones(mine)
        shared[...] = 1
        group.barrier()
        found = peak()
        group.barrier()
        return found, held

    with launch.launch(2, work, {}) as run:
        run([0, 0])
        before, _ = run([0, 0])
        after, _ = run([0, 10_000_000])
    assert 8e7 - 1e6 < after - before < 8e7 + 8e6


def peak() -> int:
    found = resources.peak_memory_bytes()
    if found is None:
        pytest.skip("this system does not tell")
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_pool_keeps_the_order_and_holds_blas_to_one_thread_each(threads: int) -> None:
    from threadpoolctl import threadpool_info

    def busy() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    before = busy()
    with thread_pool.pool(threads) as pool:
        assert list(pool(lambda n: n * n, range(50))) == [n * n for n in range(50)]
        assert busy() <= {1}
    assert busy() == before


def test_a_failure_in_a_thread_reaches_the_caller() -> None:
    with thread_pool.pool(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool(lambda n: 1 // n, [1, 0, 1]))


def test_settings_of_the_process_stay_until_the_last_one_has_gone() -> None:
    """Of two trainings in threads, the first to begin may be the first to end."""
    before = sys.getswitchinterval()
    one, other = thread_pool.pool(2), thread_pool.pool(2)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(thread_pool.HAND_OVER)
    other.__exit__(None, None, None)
    assert sys.getswitchinterval() == before
