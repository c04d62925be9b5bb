"""The cores and the memory of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from minimoe.core.errors import UserError


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_count(wish: int | None) -> int:
    """``wish``, or the number of cores if it is None; raises ``UserError`` unless it is from 1 to 1024."""
    if wish is None:
        return cores()
    if type(wish) is not int or not 1 <= wish <= 1024:
        raise UserError(
            f"threads {wish!r} makes no sense: give a whole number from 1 to 1024, ideally the number of cores."
        )
    return wish


def memory_bytes() -> int | None:
    """The memory of this machine in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
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


def _kilobytes(file: str, *lines: str) -> int:
    """The sum of some lines of a file that Linux keeps for a process, in kB."""
    text = Path("/proc", file).read_text()
    return sum(int(text.split(f"{line}:")[1].split()[0]) for line in lines)
