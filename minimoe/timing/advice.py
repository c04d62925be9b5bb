"""What slows this machine down: settings of BLAS and of the workers, each described in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from minimoe.core import resources

FORCED_KERNEL = "OPENBLAS_CORETYPE"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WITHOUT_AVX2 = {"generic", "prescott", "core2", "penryn", "dunnington", "nehalem", "sandybridge", "atom"}
"""OpenBLAS kernels for processors from before 2013."""

_KERNEL = (
    "import numpy, threadpoolctl; "
    "print(*(one.get('architecture') or '' for one in threadpoolctl.threadpool_info() if one['user_api'] == 'blas'))"
)


def found(threads: int) -> list[str]:
    """One sentence for each setting that slows training with ``threads`` workers; empty if there is none."""
    sentences = [_kernel(), _idle_cores(threads), _withheld_cores(), _short_blas(threads)]
    return [sentence for sentence in sentences if sentence is not None]


def kernel() -> str:
    """The name of the kernels that NumPy's BLAS runs; empty if BLAS does not name them."""
    from threadpoolctl import threadpool_info

    return next((one.get("architecture") or "" for one in threadpool_info() if one["user_api"] == "blas"), "")


def own_kernel() -> str:
    """The kernels that BLAS would choose by itself, read from a process without ``OPENBLAS_CORETYPE``."""
    environment = {name: value for name, value in os.environ.items() if name != FORCED_KERNEL}
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _KERNEL], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (asked.stdout.split() or [""])[0]


def _kernel() -> str | None:
    forced = os.environ.get(FORCED_KERNEL)
    now = kernel()
    if forced:
        own = own_kernel()
        if own and own != now:
            return (
                f"{FORCED_KERNEL}={forced} makes BLAS run its {now or forced} kernels, although it has {own} kernels "
                "for this processor: unset it."
            )
    if now.lower() in WITHOUT_AVX2 and _has_avx2():
        return (
            f"BLAS runs its {now} kernels, which are made for processors without AVX2, although this processor has "
            "AVX2: install NumPy from PyPI or conda-forge, whose BLAS chooses its kernels by the processor."
        )
    return None


def _has_avx2() -> bool:
    """Whether Linux reports AVX2; always False on other systems."""
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _idle_cores(threads: int) -> str | None:
    cores = resources.cores()
    if threads < cores:
        return f"{threads} of {cores} cores {'is' if threads == 1 else 'are'} at work: give --threads {cores}."
    if threads > cores:
        return f"{threads} workers take turns on {cores} core{'s' if cores > 1 else ''}: give --threads {cores}."
    return None


def _withheld_cores() -> str | None:
    cores, all_cores = resources.allowed_cores(), os.cpu_count() or 1
    if cores < all_cores:
        return (
            f"This process may use {cores} of the machine's {all_cores} cores: taskset or a container sets this limit."
        )
    allowed = resources.cpu_quota()
    if allowed is not None and allowed < resources.allowed_cores():
        return (
            f"A container's quota gives this process the time of {round(allowed, 1):g} of {cores} cores: raise its CPU "
            "limit."
        )
    return None


def _short_blas(threads: int) -> str | None:
    for name in THREADS:
        value = os.environ.get(name, "")
        if value.isdecimal() and 0 < int(value) < threads:
            return (
                f"{name}={value} limits BLAS to {value} of {threads} threads when a long prompt is read: unset it "
                "(training is not slowed, because each of its workers has one thread)."
            )
    return None
