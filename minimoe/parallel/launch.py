"""Data parallelism: workers take a step together, each on its own part of the batch.

    with launch(size, work, like=params) as run:
        run([message for each worker])          every worker calls work(group, message); worker 0 is the caller itself

``all_reduce`` adds up small sums and ``reduce_scatter`` adds up gradients. Each worker then has the total gradient of
its own part of the parameters and updates that part for all workers (the first stage of ZeRO). ``assemble`` collects
the rows of tokens that ``parallel.exchange`` sends from worker to worker.

On Linux the workers are processes. Threads would be simpler, and are used on other systems. But only one thread at a
time can run Python code, and in a small model this code, which decides which product comes next, takes most of the
time. On 2 cores a gradient of ``nanogpt-cpu`` took 66 ms alone, 53 ms on two threads and 35 ms in two processes. A step
of ``tiny``, in which there is little to share, took 6 to 7 ms alone, 14 to 19 ms on two threads and 9 ms in two
processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from minimoe.core.arrays import Array
from minimoe.parallel.group import ALONE, Run, Work
from minimoe.parallel.processes import can_fork, open_processes
from minimoe.parallel.thread_pool import one_blas_thread_each
from minimoe.parallel.threads import open_threads


@contextlib.contextmanager
def launch(
    size: int, work: Work, like: Mapping[str, Array], processes: bool | None = None, row_bytes: int = 0
) -> Iterator[Run]:
    """Opens a group of ``size`` workers for ``work(group, message)``.

    The context manager yields a function that takes ``size`` messages, one for each worker, and returns the result of
    worker 0. If any worker fails before its last exchange with the others, that function raises the error, and the
    group ends. BLAS has one thread in each worker.

    ``like`` has the names, shapes and dtypes of the gradients that the workers add up, and ``row_bytes`` is the largest
    number of bytes of rows that they assemble. ``processes`` chooses processes (True) or threads (False); None chooses
    processes if the system can fork.

    Raises:
        UserError: a worker process cannot be started, or was stopped from outside.
    """
    with one_blas_thread_each():
        if size == 1:
            yield lambda messages: work(ALONE, messages[0])
        elif can_fork() if processes is None else processes:
            with open_processes(size, work, like, row_bytes) as run:
                yield run
        else:
            with open_threads(size, work) as run:
                yield run
