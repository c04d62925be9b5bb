"""Workers that are threads: a group that cannot begin, or has ended, keeps no one waiting."""

import threading

import pytest

from minimoe.parallel.group import Group
from minimoe.parallel.threads import open_threads


def test_a_thread_that_cannot_be_started_keeps_no_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def second_time_refused(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_time_refused)
    with open_threads(3, lambda group, _: group.barrier()) as run, pytest.raises(RuntimeError, match="can't start"):
        run(range(3))
    assert not started[0].is_alive()


def test_a_group_of_threads_that_has_ended_is_not_taken_for_one_that_works() -> None:
    def work(group: Group, fails: bool) -> None:
        if fails:
            raise ZeroDivisionError
        group.barrier()

    with open_threads(2, work) as run:
        with pytest.raises(ZeroDivisionError):
            run([False, True])
        with pytest.raises(threading.BrokenBarrierError):
            run([False, False])
