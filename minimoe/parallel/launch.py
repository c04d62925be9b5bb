"""Data parallelism: workers take a step together, each on its own part of the batch.

    with launch(size, work, like=params) as run:
        run([message for each worker])          every worker does work(group, message); worker 0 is the caller itself

``all_reduce`` adds up small sums and ``reduce_scatter`` gradients, after which each worker has the total of its own
part of the parameters and updates that part for everyone (the first stage of ZeRO). ``assemble`` collects rows of
tokens, which ``exchange`` sends from worker to worker.

On Linux the workers are processes. Threads would be simpler, and other systems get them. But Python lets only one
thread at a time decide which product comes next, and in a small model that is most of the work. On 2 cores a gradient
of ``nanogpt-cpu`` took 66 ms alone, 53 ms on two threads and 35 ms in two processes; a step of ``tiny``, in which there
is little to share, took 6 to 7 ms alone, 14 to 19 ms on two threads and 9 ms in two processes.
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

    ``like`` has the shapes of the gradients that they add up; ``row_bytes`` is how many bytes of rows they assemble at
    most. The context is a function of ``size`` messages, one for each worker, that returns the result of worker 0.
    BLAS has one thread in each worker. If any worker fails before its last exchange with the others, that function
    raises the error, and the group ends. ``processes`` says whether workers are processes or threads; None leaves it
    to the system.

    Raises:
        UserError: a worker process cannot be started, or was stopped by someone else.
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
