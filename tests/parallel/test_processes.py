"""Workers that are processes: what can go wrong while they start, work and end, and that they end with their caller."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.core.errors import UserError
from minimoe.parallel.group import Group
from minimoe.parallel.processes import can_fork, open_processes, shared

NO_FORK = pytest.mark.skipif(not can_fork(), reason="workers are threads on this system")


def asked(size: int, work: Any) -> Any:
    """What worker 0 of a group of processes answers when everyone is told its own rank."""
    with open_processes(size, work, {}, row_bytes=0) as run:
        return run(range(size))


def test_a_linux_that_hides_its_files_gets_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    assert not can_fork()


@NO_FORK
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_worker_gets_the_sum_of_all(size: int) -> None:
    def work(group: Group, rank: int) -> Any:
        return group.all_gather(group.all_reduce(10**rank))

    assert asked(size, work) == [int("1" * size)] * size


@NO_FORK
def test_rows_that_others_may_still_read_are_not_written_over() -> None:
    """A worker that is ahead writes its next rows while the others read the last ones: so the two lie apart."""

    def work(group: Group, rank: int) -> Any:
        first, second = (group.assemble(np.full((2, 3), turn + rank), 2 * rank, 4) for turn in (10, 20))
        return group.all_gather((first.tolist(), second.tolist(), np.shares_memory(first, second)))

    with open_processes(2, work, {}, row_bytes=4 * 3 * 8) as run:
        for first, second, shared_memory in run(range(2)):
            assert first == [[10] * 3] * 2 + [[11] * 3] * 2
            assert second == [[20] * 3] * 2 + [[21] * 3] * 2
            assert not shared_memory


@NO_FORK
def test_ctrl_c_while_a_worker_is_forked_does_not_make_it_a_second_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def interrupted() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr("os.fork", interrupted)
    assert asked(3, lambda group, rank: group.all_gather(rank)) == [0, 1, 2]


@NO_FORK
def test_a_worker_that_was_killed_is_told_in_a_sentence() -> None:
    def work(group: Group, rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.barrier()

    with pytest.raises(UserError, match="a worker process of this step was stopped"):
        asked(2, work)


@NO_FORK
def test_a_system_without_room_for_workers_says_so_and_those_that_began_end(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[int] = []
    fork = os.fork

    def second_time_refused() -> int:
        if began:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        began.append(fork())
        return began[-1]

    monkeypatch.setattr("os.fork", second_time_refused)
    with pytest.raises(UserError, match=r"no worker process can be started \(Resource .*: give --threads 1"):
        asked(3, lambda group, rank: None)
    with pytest.raises(ProcessLookupError):
        os.kill(began[0], 0)


def test_memory_that_cannot_be_shared_is_told_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refused)
    with pytest.raises(MemoryError, match="800 bytes of shared memory: Cannot allocate memory"):
        shared(np.zeros(100))


@NO_FORK
def test_ctrl_c_is_left_to_the_caller_and_no_worker_outlives_the_group() -> None:
    ids = shared(np.zeros(2, int))

    def work(group: Group, rank: int) -> str:
        ids[rank] = os.getpid()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        group.barrier()
        return "done"

    assert asked(2, work) == "done"
    assert ids[0] == os.getpid() != ids[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(ids[1]), 0)


@NO_FORK
def test_a_worker_holds_no_file_of_the_caller(tmp_path: Path) -> None:
    """A lock on a file lasts as long as someone has the file open."""
    with open(tmp_path / "file", "w") as file:

        def work(group: Group, rank: int) -> Any:
            return group.all_gather(os.listdir("/proc/self/fd"))[1]

        held = asked(3, work)
        assert str(file.fileno()) not in held
    assert len(held) <= 5  # input, output, errors, the pipe, and the list itself


KILLED = """
import os, sys, time
from minimoe.parallel.launch import launch

def work(group, rank):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, so that the words of three do not mix
    group.barrier()
    if rank == 0:
        time.sleep(60)

with launch(3, work, {}) as run:
    run(range(3))
"""


@NO_FORK
def test_workers_end_when_their_caller_is_killed() -> None:
    caller = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, encoding="utf-8")
    assert caller.stdout is not None
    started = [int(caller.stdout.readline()) for _ in range(3)]
    assert caller.pid in started
    caller.kill()
    caller.wait()
    watchdog = threading.Timer(20, lambda: [os.kill(pid, signal.SIGKILL) for pid in started if pid != caller.pid])
    watchdog.start()
    assert caller.stdout.read() == ""  # returns when no one has the pipe's other end
    assert watchdog.is_alive()
    watchdog.cancel()
    caller.stdout.close()


@NO_FORK
def test_a_worker_that_somebody_else_has_waited_for_counts_as_ended() -> None:
    """With SIGCHLD ignored, as some parents leave it, the system forgets a child at once."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert asked(3, lambda group, rank: group.all_gather(rank)) == [0, 1, 2]
    finally:
        signal.signal(signal.SIGCHLD, before)


@NO_FORK
@pytest.mark.parametrize("where", ["the list of files", "a pipe"])
def test_too_few_open_files_are_told_as_that(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A worker that cannot even begin says why before its first message comes."""

    def too_many(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.listdir" if where == "the list of files" else "multiprocessing.Pipe", too_many)
    says = r"no worker process can be started \(Too many open files\): give --threads 1, or"
    gather = open_processes(2, lambda group, rank: group.all_gather(rank), {}, row_bytes=0)
    with pytest.raises(UserError, match=says), gather as run:
        time.sleep(0.2)  # the worker is gone by now
        run(range(2))


@NO_FORK
def test_an_error_that_cannot_be_sent_is_named_all_the_same() -> None:
    class LocalError(Exception):
        pass

    def work(group: Group, rank: int) -> Any:
        if rank:
            raise LocalError("cannot be pickled")
        return group.all_gather(rank)

    with pytest.raises(RuntimeError, match="LocalError: cannot be pickled"):
        asked(2, work)
