"""A group of threads: for systems where a process cannot be forked safely."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np

from minimoe.core.arrays import Array
from minimoe.parallel.group import Group, Run, Work

Tree = TypeVar("Tree")


class ThreadGroup(Group):
    """A worker that is a thread. All workers wait for each other at one barrier."""

    def __init__(self, rank: int, gathered: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.size = rank, len(gathered)
        self.gathered, self.meeting = gathered, meeting

    def all_gather(self, mine: Tree) -> list[Tree]:
        self.gathered[self.rank] = mine
        self.meeting.wait()
        everyones = list(self.gathered)
        self.meeting.wait()  # nobody may write again before everyone has read
        return everyones

    def assemble(self, part: Array, start: int, total: int) -> Array:
        return np.concatenate(self.all_gather(part))

    def exchange(self, mine: Mapping[str, Array], names: Collection[str]) -> list[Mapping[str, Array]]:
        return [other for rank, other in enumerate(self.all_gather(mine)) if rank != self.rank]


@contextlib.contextmanager
def open_threads(size: int, work: Work) -> Iterator[Run]:
    """``launch`` with threads: worker 0 is the caller's thread."""
    gathered: list[Any] = [None] * size
    meeting = threading.Barrier(size)
    groups = [ThreadGroup(rank, gathered, meeting) for rank in range(size)]

    def take_part(group: Group, message: Any) -> Any:
        try:
            return work(group, message)
        except BaseException:
            meeting.abort()  # so that no other worker waits for this one
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
                meeting.abort()  # frees the workers that started, if a later one could not
                raise
            finally:
                wait(others)

        yield run
