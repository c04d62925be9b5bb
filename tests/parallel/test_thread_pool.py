"""A pool of threads for work that only reads its input."""

import sys

import pytest

from minimoe.parallel import thread_pool


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
