"""The cores and the memory of this machine, as far as this process may use them.

A container gets less than the machine has. Linux keeps its limits in the files of its control group and of all groups
around it, in one of two layouts:

    version 2    cpu.max                                     memory.max
    version 1    cpu.cfs_quota_us over cpu.cfs_period_us     memory.limit_in_bytes
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from minimoe.core.errors import UserError

GROUPS, MINE = "/sys/fs/cgroup", "/proc/self/cgroup"
"""Where Linux keeps the control groups, and where it says which of them are this process's."""


def cores() -> int:
    """How many cores this process may use; a part of a core, which a container may be given, counts as a whole one."""
    usable = allowed_cores()
    quota = cpu_quota()
    return usable if quota is None else min(usable, max(1, math.ceil(quota)))


def allowed_cores() -> int:
    """How many cores this process may run on, however small its share of their time is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """The time that the control groups of this process allow, in cores; None without a limit."""
    quotas = [_ratio(folder / "cpu.max") for folder in _group_folders("")]
    quotas += [_ratio(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in _group_folders("cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit() -> int | None:
    """The memory that the control groups of this process allow, in bytes; None without a limit."""
    limits = [_number(folder / "memory.max") for folder in _group_folders("")]
    limits += [_number(folder / "memory.limit_in_bytes") for folder in _group_folders("memory")]
    return min((limit for limit in limits if limit is not None and limit < 2**60), default=None)


def _group_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those around it, of a controller of version 1, or "" for version 2.

    Inside a container, the path that the process is told may be that of the host; of this path, only the end may exist
    in the container, or nothing. So every folder on the way is yielded, whether it exists or not.
    """
    try:
        lines = Path(MINE).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3 or controller not in parts[1].split(","):
            continue
        _, controllers, path = parts
        roots = ("", "unified") if not controller else (controller, controllers)
        for root in roots:
            folder = Path(GROUPS, root)
            yield folder
            for part in Path(path.lstrip("/")).parts:
                folder /= part
                yield folder


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, no number, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _ratio(*paths: Path) -> float | None:
    """A quota over its period, in one file or in two; None without a limit."""
    try:
        quota, period = " ".join(path.read_text() for path in paths).split()
        ratio = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
    return ratio if 0 < ratio < math.inf else None  # version 1 says −1 for no limit


def thread_count(wish: int | None) -> int:
    """``wish``, or the number of cores if it is None; raises ``UserError`` unless it is from 1 to 1024."""
    if wish is None:
        return cores()
    if type(wish) is not int or not 1 <= wish <= 1024:
        raise UserError(
            f"threads {wish!r} is not a number of threads: give a whole number from 1 to 1024, ideally the number of "
            "cores."
        )
    return wish


def memory_bytes() -> int | None:
    """The memory of this machine in bytes, or of its container if that is less; None if it is unknown."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = memory_limit()
    return whole if limit is None else min(whole, limit)


def memory_in_use() -> int:
    """The bytes of memory that this process holds; 0 if the system does not report them."""
    try:
        return 1024 * _kilobytes("self/status", "VmRSS")
    except (OSError, IndexError):
        return 0


def address_space_left() -> int | None:
    """The bytes that this process may still map, by the limit that ``ulimit -v`` shows; None without a limit."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        return max(0, limit - 1024 * _kilobytes("self/status", "VmSize"))
    except (ImportError, OSError, IndexError, AttributeError):
        return None


def peak_memory_bytes() -> int | None:
    """The most bytes of memory that this process has held so far; None if the system does not report them.

    Each running worker process adds the memory that it does not share.
    """
    try:
        # unlike the value of getrusage, VmHWM is reset when a program starts
        peak = _kilobytes("self/status", "VmHWM")
        for worker in " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split():
            # a worker's peak of unshared memory: what it holds now, and how far it has fallen from its peak
            fallen = _kilobytes(f"{worker}/status", "VmHWM") - _kilobytes(f"{worker}/status", "VmRSS")
            peak += fallen + _kilobytes(f"{worker}/smaps_rollup", "Private_Clean", "Private_Dirty")
        return 1024 * peak
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_freed_memory() -> None:
    """Tells the allocator of Linux to give the memory of large arrays back to the system when they are freed.

    By default the allocator does so for the largest arrays only, and keeps up to 64 MB of others for later arrays.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_THRESHOLD, 2**20), (_TRIM_THRESHOLD, 2**20), (_MMAP_MAX, 2**16)):
            mallopt(option, value)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # options of glibc's mallopt


def _kilobytes(file: str, *lines: str) -> int:
    """The sum of some lines of a file that Linux keeps for a process, in kB."""
    text = Path("/proc", file).read_text()
    return sum(int(text.split(f"{line}:")[1].split()[0]) for line in lines)
