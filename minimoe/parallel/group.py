"""Data parallelism: workers take a step together, each on its own part of the batch.

    with workers(size, work, like=params) as run:
        run([message for each worker])          every worker does work(group, message); worker 0 is the caller itself

Each worker runs the same code and knows its ``group``, through which all of them add up what each of them has:
``all_reduce`` for small sums, ``reduce_scatter`` for gradients, after which each worker has the total of its own part
of the parameters and updates that part for everyone (the first stage of ZeRO). Sums are always taken in the same
order, so that their rounding repeats: small ones in the order of the workers, a gradient from its owner's part on.
``assemble`` is for rows of tokens, which expert_parallel.py sends from worker to worker.

On Linux the workers are processes: forked, so that they begin with all that the caller has, and with parameters and
gradients in ``shared`` memory. Threads would be simpler, and are what other systems get; but Python lets only one
thread at a time decide which product comes next, and in a small model that is most of the work. On 2 cores a gradient
of ``nanogpt-cpu`` took 66 ms alone, 53 on two threads and 35 in two processes; a step of ``tiny``, in which there is
little to share, 6 to 7 ms alone, 14 to 19 on two threads and 9 in two processes.

Rajbhandari et al. 2019, arXiv 1910.02054 (ZeRO).
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from minimoe import tree
from minimoe.arrays import Array
from minimoe.errors import UserError
from minimoe.workers import one_blas_thread_each

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Tree = TypeVar("Tree")


class Group:
    """The workers of a step as one of them sees them. This one is alone."""

    rank = 0
    size = 1

    def all_gather(self, mine: Tree) -> list[Tree]:
        """What each worker has, by rank, told to all of them. Everyone must call it, and waits for all others."""
        return [mine]

    def all_reduce(self, mine: Tree) -> Tree:
        """The sum of what all workers have, the same for each of them."""
        return tree.add(*self.all_gather(mine))

    def barrier(self) -> None:
        """Returns when every worker has come this far."""
        self.all_gather(None)

    def part(self, count: int) -> slice:
        """This worker's of ``count`` things in a row, of which every worker has about equally many."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def assemble(self, part: Array, start: int, total: int) -> Array:
        """Everyone's rows (n, ...), worker below worker, this one's from ``start`` on → all of them (total, ...).

        Everyone must call it. The result is for reading, until the next call; until then everyone's rows must stay too.
        """
        return part

    def share(self, params: Mapping[str, Array]) -> list[str]:
        """The names of this worker's parameters: each has one owner, and the owners about equally many numbers."""
        held = [0] * self.size
        mine = []
        for name, leaf in sorted(params.items(), key=lambda named: -named[1].size):
            owner = held.index(min(held))
            held[owner] += leaf.size
            if owner == self.rank:
                mine.append(name)
        return mine

    def reduce_scatter(self, gradient: Mapping[str, Array], names: Collection[str]) -> dict[str, Array]:
        """The sum over all workers of the arrays called ``names``, which no other worker asks for.

        Everyone's ``gradient`` must stay as it is until all are done, up to the arrays that are returned.
        """
        for other in self.exchange(gradient, names):
            for name in names:
                gradient[name][...] += other[name]
        return {name: gradient[name] for name in names}

    def exchange(self, mine: Mapping[str, Array], names: Collection[str]) -> list[Mapping[str, Array]]:
        """Lets the others read all of ``mine`` but ``names`` → what the others have, by rank, for reading ``names``."""
        return []


ALONE = Group()

Work = Callable[[Group, Any], Any]


def forks() -> bool:
    """Whether workers are processes here: not where a system forbids forking, or its BLAS cannot stand it.

    A Linux without /proc, as in a bare sandbox, would not say which files a worker has to close.
    """
    return sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")


def shared(array: Array) -> Array:
    """A copy in memory that this process shares with those that it forks; raises ``MemoryError`` if there is none."""
    copy = np.frombuffer(_shared_memory(array.nbytes), array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def _shared_memory(size: int) -> mmap.mmap:
    """``size`` bytes, of which the system provides those that are used."""
    try:
        return mmap.mmap(-1, max(1, size))
    except OSError as error:
        raise MemoryError(f"{size:,} bytes to share: {error.strerror}") from None


@contextlib.contextmanager
def workers(
    size: int, work: Work, like: Mapping[str, Array], processes: bool | None = None, board: int = 0
) -> Iterator[Callable[[Sequence[Any]], Any]]:
    """Opens a group of ``size`` workers for ``work(group, message)``.

    ``like`` has the shapes of the gradients that they add up, ``board`` is how many bytes they assemble at most. What
    is opened is a function of ``size`` messages, one for each worker, that returns the result of worker 0. BLAS has one
    thread in each. A failure in any worker, up to its last exchange with the others, is raised by it, and is the end of
    the group. ``processes`` says whether workers are processes or threads; None leaves it to the system.

    Raises:
        UserError: a worker process cannot be started, or was stopped by someone else.
    """
    with one_blas_thread_each():
        if size == 1:
            yield lambda messages: work(ALONE, messages[0])
        elif forks() if processes is None else processes:
            with _processes(size, work, like, board) as run:
                yield run
        else:
            with _threads(size, work) as run:
                yield run


# Processes


class _Process(Group):
    """A worker that is a process, linked to worker 0, or as worker 0 to all others."""

    def __init__(
        self, rank: int, links: Sequence[Connection], slots: Sequence[Mapping[str, Array]], boards: Sequence[mmap.mmap]
    ) -> None:
        self.rank, self.size = rank, len(slots)
        self.links = links  # worker 0 has one to each other, and each of them one to it
        self.slots = slots  # for each worker, room for the gradient that it lets others read
        self.boards = list(boards)  # two, for rows of all: while one is read, someone may already fill the other

    def all_gather(self, mine: Tree) -> list[Tree]:
        if self.rank > 0:
            self.links[0].send(mine)
            everyones: list[Tree] = self.links[0].recv()
            return everyones
        everyones = [mine, *(self.receive(link) for link in self.links)]
        for link in self.links:
            link.send(everyones)
        return everyones

    def all_reduce(self, mine: Tree) -> Tree:
        """As for any group, but worker 0 adds and sends the sum only, which is quicker than all its terms."""
        if self.rank > 0:
            self.links[0].send(mine)
            total: Tree = self.links[0].recv()
            return total
        total = tree.add(mine, *(self.receive(link) for link in self.links))
        for link in self.links:
            link.send(total)
        return total

    def assemble(self, part: Array, start: int, total: int) -> Array:
        self.boards.reverse()
        whole: Array = np.ndarray((total, *part.shape[1:]), part.dtype, self.boards[0])
        whole[start : start + len(part)] = part
        self.barrier()
        return whole

    def exchange(self, mine: Mapping[str, Array], names: Collection[str]) -> list[Mapping[str, Array]]:
        for name, leaf in mine.items():
            if name not in names:
                self.slots[self.rank][name][...] = leaf
        self.barrier()
        return [slot for rank, slot in enumerate(self.slots) if rank != self.rank]

    @staticmethod
    def receive(link: Connection) -> Any:
        message = link.recv()
        if isinstance(message, _Failure):
            raise message.error
        return message


class _Failure:
    """Sent instead of what was expected."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextlib.contextmanager
def _processes(
    size: int, work: Work, like: Mapping[str, Array], board: int
) -> Iterator[Callable[[Sequence[Any]], Any]]:
    from multiprocessing import Pipe

    slots = [{name: shared(np.zeros_like(leaf)) for name, leaf in like.items()} for _ in range(size)]
    boards = [_shared_memory(board) for _ in range(2)]
    links: list[Connection] = []
    children: list[int] = []
    try:
        for rank in range(1, size):
            ours, theirs = Pipe()
            links.append(ours)
            with warnings.catch_warnings():
                # Forking is said to be unsafe beside threads, whose locks the child may find taken for ever. Ours
                # needs none of theirs: it computes, speaks through its pipe and leaves by the back door.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = _fork()
            if child == 0:
                _serve(_Process(rank, [theirs], slots, boards), theirs, work)
            children.append(child)
            theirs.close()
        group = _Process(0, links, slots, boards)

        def run(messages: Sequence[Any]) -> Any:
            try:
                for link, message in zip(links, messages[1:], strict=True):
                    link.send(message)
                return work(group, messages[0])
            except (EOFError, ConnectionError):
                raise UserError(
                    "a worker process of this step is gone: it may have been stopped for the memory that it took. "
                    "Try a smaller batch, or --threads 1."
                ) from None

        yield run
    finally:
        for link in links:
            link.close()  # which ends the child at its next word
        for child in children:
            os.waitpid(child, 0)


def _fork() -> int:
    """Ctrl-C reaches all processes, and worker 0 decides: a child is never without its order to ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return child
    except OSError as error:
        raise UserError(f"no worker process can be started ({error.strerror}): give --threads 1.") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(group: Group, link: Connection, work: Work) -> None:
    """The life of a forked worker. It holds no file of the caller's open: a lock would outlive the caller."""
    try:
        gc.freeze()  # what was the caller's stays as it is: no finaliser runs twice, and its memory stays shared
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2 and number != link.fileno():
                with contextlib.suppress(OSError):  # one was open for the list itself
                    os.close(number)
        while True:
            work(group, link.recv())
    except (EOFError, ConnectionError):
        pass  # worker 0 has ended
    except BaseException as error:
        with contextlib.suppress(Exception):
            link.send(_Failure(error))
    finally:
        os._exit(0)


# Threads


class _Thread(Group):
    """A worker that is a thread; all meet at one barrier."""

    def __init__(self, rank: int, board: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self.board, self.meeting = board, meeting

    def all_gather(self, mine: Tree) -> list[Tree]:
        self.board[self.rank] = mine
        self.meeting.wait()
        everyones = list(self.board)
        self.meeting.wait()
        return everyones

    def assemble(self, part: Array, start: int, total: int) -> Array:
        return np.concatenate(self.all_gather(part))

    def exchange(self, mine: Mapping[str, Array], names: Collection[str]) -> list[Mapping[str, Array]]:
        return [other for rank, other in enumerate(self.all_gather(mine)) if rank != self.rank]


@contextlib.contextmanager
def _threads(size: int, work: Work) -> Iterator[Callable[[Sequence[Any]], Any]]:
    board: list[Any] = [None] * size
    meeting = threading.Barrier(size)
    groups = [_Thread(rank, board, meeting) for rank in range(size)]

    def take_part(group: Group, message: Any) -> Any:
        try:
            return work(group, message)
        except BaseException:
            meeting.abort()  # so that no one waits for this worker
            raise

    with ThreadPoolExecutor(size - 1) as executor:

        def run(messages: Sequence[Any]) -> Any:
            others: list[Future[Any]] = []
            try:
                for both in zip(groups[1:], messages[1:], strict=True):
                    others.append(executor.submit(take_part, *both))
                return take_part(groups[0], messages[0])
            except threading.BrokenBarrierError as broken:
                errors = [other.exception() for other in others]
                causes = (one for one in errors if one and not isinstance(one, threading.BrokenBarrierError))
                raise next(causes, broken) from None
            except BaseException:
                meeting.abort()  # for those that were started before one could not be
                raise
            finally:
                wait(others)

        yield run
