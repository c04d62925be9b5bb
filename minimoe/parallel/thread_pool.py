"""A pool of threads, each with a single-threaded BLAS, for work that only reads its input.

NumPy releases the interpreter lock while it computes. Two threads that each read half of a text therefore keep two
cores busy from end to end; a BLAS with two threads does so only inside its products. Training has workers of its own:
see ``launch``.
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
    """A ``map`` over ``threads`` threads, with BLAS held to one thread each while it is open."""
    with one_blas_thread_each(), _handing_over_quickly(), ThreadPoolExecutor(threads) as executor:
        yield executor.map if threads > 1 else map


@contextlib.contextmanager
def one_blas_thread_each() -> Iterator[None]:
    """For work that is already shared out: BLAS shares out nothing more, and memory is kept for reuse."""
    from threadpoolctl import threadpool_limits

    _keep_freed_memory()
    with _SINGLE.held(lambda: threadpool_limits(1, user_api="blas").restore_original_limits):
        yield


class _SharedSetting:
    """A setting of the whole process: the first who needs it makes it, and the last who leaves takes it back.

    Trainings may run beside each other in threads, and end in another order than they began in.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.undo: Callable[[], Any] = lambda: None

    @contextlib.contextmanager
    def held(self, make: Callable[[], Callable[[], Any]]) -> Iterator[None]:
        """``make`` makes the setting, and returns what takes it back."""
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
    """Shortens the time for which a thread may keep the interpreter lock while another one waits.

    Between two products a thread holds the lock for some microseconds only, but it may take it again before the other
    one has woken up, and so starve it for the usual 5 ms. The gain is small: on 2 quiet cores, a step of 768 tokens
    took 70.2 ms with it and 72.4 ms without (medians of 5 alternating rounds).
    """

    def shorten() -> Callable[[], None]:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(HAND_OVER)
        return partial(sys.setswitchinterval, usual)

    with _QUICK.held(shorten):
        yield


def _keep_freed_memory() -> None:
    """Tells the allocator of a Linux system to keep what is freed, since the next step needs the same again.

    Left to itself it returns large arrays to the system and gets them back one page at a time, each a fault and full
    of zeros: some 20,000 faults and an eighth of the time of a step of ``toy``. One arena for all threads lets one
    use what another has freed, so that no more memory is needed than before.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1):
            mallopt(option, value)
