"""What a machine has to work with: cores and memory."""

from typing import Any

import numpy as np
import pytest

from minimoe.core import resources
from minimoe.core.errors import UserError
from minimoe.parallel.group import Group
from minimoe.parallel.launch import launch
from minimoe.parallel.processes import can_fork, shared


def test_every_core_is_used_unless_told_otherwise() -> None:
    assert resources.thread_count(None) == resources.cores() >= 1
    assert resources.thread_count(3) == 3


@pytest.mark.parametrize("wish", [0, -2, 1025, 1.5, "2"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(wish: int) -> None:
    with pytest.raises(UserError, match=f"threads {wish!r} makes no sense"):
        resources.thread_count(wish)


def test_memory_is_told_in_bytes_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    known = resources.memory_bytes()
    assert known is None or known > 10**8

    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown, raising=False)
    assert resources.memory_bytes() is None


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak()
    held = np.ones(before // 8 + 8_000_000)
    assert peak() > before + 5e7
    del held
    assert peak() > before + 5e7, "a peak does not fall"


@pytest.mark.skipif(not can_fork(), reason="workers are threads on this system")
def test_peak_memory_counts_what_a_worker_process_shares_with_no_one() -> None:
    together = shared(np.zeros(10_000_000))

    def work(group: Group, mine: int) -> Any:
        held = np.ones(mine)
        together[...] = 1
        group.barrier()
        found = peak()
        group.barrier()
        return found, held

    with launch(2, work, {}) as run:
        run([0, 0])
        before, _ = run([0, 0])
        after, _ = run([0, 10_000_000])
    assert 8e7 - 1e6 < after - before < 8e7 + 8e6


def peak() -> int:
    found = resources.peak_memory_bytes()
    if found is None:
        pytest.skip("this system does not tell")
    return found
