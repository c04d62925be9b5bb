"""What a machine has to work with: cores and memory."""

import subprocess
import sys
from pathlib import Path
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
    with pytest.raises(UserError, match=f"threads {wish!r} is not a number of threads"):
        resources.thread_count(wish)


V1, V2 = "3:cpu,cpuacct:/docker/ab\n2:memory:/docker/ab\n0::/\n", "0::/outer/inner\n"


@pytest.mark.parametrize(
    ("mine", "files", "cores", "quota", "limit"),
    [
        (V2, {}, 8, None, None),
        (V2, {"outer/inner/cpu.max": "max 100000", "outer/inner/memory.max": "max"}, 8, None, None),
        (V2, {"outer/inner/cpu.max": "150000 100000", "outer/inner/memory.max": "5000000"}, 2, 1.5, 5_000_000),
        (V2, {"outer/inner/cpu.max": "300000 100000", "outer/cpu.max": "100000 100000"}, 1, 1.0, None),
        (V2, {"cpu.max": "20000 100000", "memory.max": "7000000"}, 1, 0.2, 7_000_000),  # seen from inside
        ("0::/\n", {"memory.max": "nonsense", "cpu.max": ""}, 8, None, None),
        ("0::/\n", {"unified/cpu.max": "200000 100000"}, 2, 2.0, None),
        (V1, {"cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000"}, 8,
         None, None),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2, 2.0, None),
        (V1, {"cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "5", "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "0"}, 8, None,
         None),
        (V1, {"memory/docker/ab/memory.limit_in_bytes": "9223372036854771712"}, 8, None, None),
        (V1, {"memory/docker/ab/memory.limit_in_bytes": "9223372036854771712",
              "memory/memory.limit_in_bytes": "4000000"}, 8, None, 4_000_000),
        ("nonsense\n", {"cpu.max": "100000 100000"}, 8, None, None),
        (None, {"cpu.max": "100000 100000"}, 8, None, None),
    ],
)  # fmt: skip
def test_the_limits_of_control_groups_of_both_versions_bound_cores_and_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mine: str | None,
    files: dict[str, str],
    cores: int,
    quota: float | None,
    limit: int | None,
) -> None:
    if mine is not None:
        (tmp_path / "mine").write_text(mine)
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    monkeypatch.setattr(resources, "GROUPS", str(tmp_path / "groups"))
    monkeypatch.setattr(resources, "MINE", str(tmp_path / "mine"))
    monkeypatch.setattr(resources, "allowed_cores", lambda: 8)
    assert (resources.cpu_quota(), resources.memory_limit()) == (quota, limit)
    assert resources.thread_count(None) == resources.cores() == cores
    assert resources.thread_count(5) == 5, "who asks for more workers gets them"
    if limit is not None:
        assert resources.memory_bytes() == limit


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has this setting")
def test_freed_memory_returns_to_the_system() -> None:
    """In a process of its own: the setting lasts as long as the process. By default, the second array is kept."""
    code = """
import numpy as np
from minimoe.core import resources
resources.return_freed_memory()
before = resources.memory_in_use()
for _ in range(2):
    array = np.ones(3 * 2**20)
    held = resources.memory_in_use()
    del array
print(held - before, resources.memory_in_use() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert held > 24e6
    assert left < 2e6


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
