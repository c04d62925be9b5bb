"""What this machine computes with: its libraries, cores, memory and GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

import numpy as np

from minimoe.core import resources
from minimoe.core.arrays import gpu_problem
from minimoe.version import __version__


def describe() -> str:
    """Versions, BLAS and its threads, cores, memory, and the GPU or why there is none; one line each."""
    from threadpoolctl import threadpool_info

    lines = [
        f"minimoe   {__version__}",
        f"Python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"NumPy     {np.__version__}",
    ]
    for library in threadpool_info():
        if library["user_api"] == "blas":
            kernel = library.get("architecture") or "unknown"
            lines.append(
                f"BLAS      {library['internal_api']} {library['version']}, {kernel} kernels, {library['num_threads']} "
                "threads; training gives each of its workers one thread"
            )
    lines.append(f"cores     {resources.cores()}")
    memory = resources.memory_bytes()
    if memory is not None:
        lines.append(f"memory    {memory / 1e9:.1f} GB")
    forced = [f"{name}={os.environ[name]}" for name in ("OPENBLAS_CORETYPE",) if os.environ.get(name)]
    if forced:
        lines.append(f"note      {forced[0]} keeps BLAS from choosing this processor's own kernels: unset it for speed")
    problem = gpu_problem()
    if problem is not None and problem.startswith("CuPy is not installed") and not _has_driver():
        problem = "No NVIDIA driver was found, so everything runs on the CPU."
    if problem is None:
        lines.append(f"GPU       {_gpu()}")
    else:
        lines.append(f"GPU       none in use. {problem}")
    return "\n".join(lines)


def _gpu() -> str:
    """The GPU that computes, its memory, and CuPy's version, as far as they are known."""
    import cupy

    told = []
    with contextlib.suppress(Exception):
        told.append(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    with contextlib.suppress(Exception):
        free, total = cupy.cuda.runtime.memGetInfo()
        told.append(f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    return ", ".join([*told, f"CuPy {cupy.__version__}"])


def _has_driver() -> bool:
    """Whether the system has NVIDIA's driver: without it, advice about CuPy would not help."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(library)
            return True
    return False
