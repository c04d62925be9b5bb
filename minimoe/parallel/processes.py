"""A group of processes, forked from the caller, on one machine.

A forked worker starts with everything that the caller has. Parameters and gradients are in ``shared`` memory; small
messages go through pipes to worker 0, which is the caller itself, and back.
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
    """Whether workers can be processes here: not if the system cannot fork, or if its BLAS fails after a fork.

    On a Linux without /proc, as in a bare sandbox, a worker cannot find out which files it has to close.
    """
    return sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")


def shared(array: Array) -> Array:
    """A copy in memory that this process shares with its forks; ``MemoryError`` if there is too little memory."""
    copy = np.frombuffer(shared_memory(array.nbytes), array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def shared_memory(size: int) -> mmap.mmap:
    """``size`` bytes of shared memory, or ``MemoryError``. The system provides only the bytes that are used."""
    try:
        return mmap.mmap(-1, max(1, size))
    except OSError as error:
        raise MemoryError(f"{size:,} bytes of shared memory: {error.strerror}") from None


class ProcessGroup(Group):
    """A worker that is a process. Worker 0 is linked to all others, and each of them only to worker 0."""

    def __init__(
        self, rank: int, links: Sequence[Connection], slots: Sequence[Mapping[str, Array]], buffers: Sequence[mmap.mmap]
    ) -> None:
        self.rank, self.size = rank, len(slots)
        self.links = links  # of worker 0: one to each other worker; of the others: one to worker 0
        self.slots = slots  # for each worker, space for the gradient that it lets the others read
        self.buffers = list(buffers)  # two, for the rows of all workers: one may be filled while the other is read

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
        """As in ``Group``, but worker 0 adds up and sends only the sum, which is faster than sending all values."""
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
    """Sent in place of the expected message by a worker that failed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextlib.contextmanager
def open_processes(size: int, work: Work, like: Mapping[str, Array], row_bytes: int) -> Iterator[Run]:
    """``launch`` with processes: worker 0 is the caller, and the others are forked."""
    from multiprocessing import Pipe

    slots = [{name: shared(np.zeros_like(leaf)) for name, leaf in like.items()} for _ in range(size)]
    buffers = [shared_memory(row_bytes) for _ in range(2)]
    links: list[Connection] = []
    children: list[int] = []
    try:
        for rank in range(1, size):
            try:
                ours, theirs = Pipe()
            except OSError as error:
                raise _cannot_start(error) from None
            links.append(ours)
            with warnings.catch_warnings():
                # Python warns that forking is unsafe while there are threads, because the child may find their locks
                # taken forever. Our child needs none of those locks: it computes, uses its pipe and ends by os._exit.
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
                _raise_own_error(links)
                raise UserError(
                    "a worker process of this step was stopped, perhaps because the machine ran out of memory: choose "
                    "a smaller batch, or give --threads 1."
                ) from None

        yield run
    finally:
        for link in links:
            link.close()  # the child ends when it next uses its pipe
        for child in children:
            with contextlib.suppress(ChildProcessError):  # somebody else has waited for it, or nobody needs to
                os.waitpid(child, 0)


def _raise_own_error(links: Sequence[Connection]) -> None:
    """Raises the error that a worker sent before it ended, if any: it may have failed before its first message came."""
    for link in links:
        with contextlib.suppress(EOFError, ConnectionError):
            while link.poll():
                ProcessGroup.receive(link)


def _cannot_start(error: OSError) -> UserError:
    return UserError(
        f"no worker process can be started ({error.strerror or error}): give --threads 1, or raise the limit that "
        "`ulimit -a` shows."
    )


def _fork() -> int:
    """Forks a child that ignores Ctrl-C, which reaches all processes: only worker 0 reacts to it.

    The signal is blocked until the child ignores it; otherwise it could stop the child before that.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return child
    except OSError as error:
        raise _cannot_start(error) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(group: Group, link: Connection, work: Work) -> None:
    """Runs a forked worker until worker 0 ends.

    It first closes the files of the caller: a lock on one of them would otherwise outlast the caller.
    """
    try:
        gc.freeze()  # leaves the caller's objects alone: no finaliser runs twice, and their memory stays shared
        try:
            opened = os.listdir("/proc/self/fd")
        except OSError as error:
            raise _cannot_start(error) from None
        for number in map(int, opened):
            if number > 2 and number != link.fileno():
                with contextlib.suppress(OSError):  # the list itself had one open
                    os.close(number)
        while True:
            work(group, link.recv())
    except (EOFError, ConnectionError):
        pass  # worker 0 has ended
    except BaseException as error:
        with contextlib.suppress(Exception):
            try:
                link.send(_Failure(error))
            except Exception:  # the error cannot be sent as it is
                link.send(_Failure(RuntimeError(f"{type(error).__name__}: {error}")))
    finally:
        os._exit(0)
