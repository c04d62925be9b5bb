"""A pool of threads, each with a single-threaded BLAS, for work that only reads its input.

NumPy releases the interpreter lock while it computes. Two threads that each read half of a text therefore keep two
cores busy all the time; a BLAS with two threads does so only inside its products. Training uses the workers of
``launch`` instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Applies a function to each item and yields the results in order: ``map``, or the ``map`` of a thread pool."""

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # options of glibc's mallopt

HAND_OVER = 2e-5
"""Seconds after which a waiting thread asks for the interpreter lock."""


@contextlib.contextmanager
def pool(threads: int) -> Iterator[Map]:
    """A ``map`` over ``threads`` threads. While it is open, BLAS is limited to one thread per thread of the pool."""
    with one_blas_thread_each(), _handing_over_quickly(), ThreadPoolExecutor(threads) as executor:
        yield executor.map if threads > 1 else map


@contextlib.contextmanager
def one_blas_thread_each() -> Iterator[None]:
    """Limits BLAS to one thread, for work that is already split between workers. Freed memory is kept for reuse."""
    from threadpoolctl import threadpool_limits

    _keep_freed_memory()
    with _SINGLE.held(lambda: threadpool_limits(1, user_api="blas").restore_original_limits):
        yield


class _SharedSetting:
    """A setting of the whole process: the first user applies it, and the last user undoes it.

    Training runs may run side by side in threads, and end in a different order from the one in which they began.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.undo: Callable[[], Any] = lambda: None

    @contextlib.contextmanager
    def held(self, make: Callable[[], Callable[[], Any]]) -> Iterator[None]:
        """``make`` applies the setting, and returns a function that undoes it."""
        with self.lock:
            if not self.users:
                self.undo = make()
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.undo()


_SINGLE, _QUICK = _SharedSetting(), _SharedSetting()


@contextlib.contextmanager
def _handing_over_quickly() -> Iterator[None]:
    """Shortens the time for which a thread may keep the interpreter lock while another thread waits for it.

    Between two products a thread holds the lock for only some microseconds. But the thread may take the lock again
    before the other thread has woken up; the other thread then waits for the usual 5 ms. The gain is small: on 2 idle
    cores, a step of 768 tokens took 70.2 ms with this setting and 72.4 ms without (medians of 5 alternating rounds).
    """

    def shorten() -> Callable[[], None]:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(HAND_OVER)
        return partial(sys.setswitchinterval, usual)

    with _QUICK.held(shorten):
        yield


def _keep_freed_memory() -> None:
    """Tells the allocator of Linux to keep freed memory, because the next step needs the same amount again.

    By default the allocator returns large arrays to the system and gets them back page by page; each page takes a page
    fault and is filled with zeros. In a step of ``toy`` these are some 20,000 faults and an eighth of the time. One
    arena for all threads lets a thread use what another one has freed, so that no more memory is needed than before.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1):
            mallopt(option, value)
