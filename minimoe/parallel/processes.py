"""A group of processes, forked from the caller, on one machine.

Forked workers begin with all that the caller has. Parameters and gradients lie in ``shared`` memory; small messages
travel through pipes to worker 0, the caller itself, and back.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.errors import UserError
from minimoe.parallel.group import Group, Run, Work

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Tree = TypeVar("Tree")


def can_fork() -> bool:
    """Whether workers are processes here: not where a system forbids forking, or its BLAS cannot stand it.

    A Linux without /proc, as in a bare sandbox, would not say which files a worker has to close.
    """
    return sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")


def shared(array: Array) -> Array:
    """A copy in memory that this process shares with those that it forks; raises ``MemoryError`` if there is none."""
    copy = np.frombuffer(shared_memory(array.nbytes), array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def shared_memory(size: int) -> mmap.mmap:
    """``size`` bytes, of which the system provides those that are used."""
    try:
        return mmap.mmap(-1, max(1, size))
    except OSError as error:
        raise MemoryError(f"{size:,} bytes to share: {error.strerror}") from None


class ProcessGroup(Group):
    """A worker that is a process, linked to worker 0, or as worker 0 to all others."""

    def __init__(
        self, rank: int, links: Sequence[Connection], slots: Sequence[Mapping[str, Array]], buffers: Sequence[mmap.mmap]
    ) -> None:
        self.rank, self.size = rank, len(slots)
        self.links = links  # worker 0 has one to each other, and each of them one to it
        self.slots = slots  # for each worker, room for the gradient that it lets others read
        self.buffers = list(buffers)  # two, for rows of all: while one is read, someone may already fill the other

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
        self.buffers.reverse()
        whole: Array = np.ndarray((total, *part.shape[1:]), part.dtype, self.buffers[0])
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
def open_processes(size: int, work: Work, like: Mapping[str, Array], row_bytes: int) -> Iterator[Run]:
    from multiprocessing import Pipe

    slots = [{name: shared(np.zeros_like(leaf)) for name, leaf in like.items()} for _ in range(size)]
    buffers = [shared_memory(row_bytes) for _ in range(2)]
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
                _serve(ProcessGroup(rank, [theirs], slots, buffers), theirs, work)
            children.append(child)
            theirs.close()
        group = ProcessGroup(0, links, slots, buffers)

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
