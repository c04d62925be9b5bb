"""NumPy or CuPy: finds the module that an array belongs to, and moves arrays between host and GPU.

There is no global choice. A function sets ``xp = array_module(x)`` and computes with ``xp``, so one process can use
both libraries and a test can compare them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minimoe.core.errors import UserError

Array: TypeAlias = NDArray[Any]
"""A NumPy array, or a CuPy array, which has the same methods."""

Device = Literal["cpu", "gpu"]

OLDEST_CUPY = 14
"""The oldest supported version. Earlier ones lack ``put_along_axis`` and promote dtypes by other rules than NumPy 2."""


underflow_is_right = np.errstate(under="ignore")
"""Decorator for functions in which a number that is too small for its dtype becomes 0, as it should: a weight far from
the largest, a squared gradient. A program that has called ``np.seterr(all="raise")`` is not stopped by such numbers.
"""


def array_module(x: Array) -> Any:
    """The module that ``x`` belongs to: ``numpy`` or ``cupy``."""
    return np if isinstance(x, np.ndarray | np.generic) else sys.modules[type(x).__module__.partition(".")[0]]


def to_host(x: Array) -> NDArray[Any]:
    """``x`` as a NumPy array. An array on the GPU is copied, which waits for the GPU; a NumPy array is not copied."""
    return x if isinstance(x, np.ndarray) else cast("NDArray[Any]", cast(Any, x).get())


def to_device(x: Array, device: Device) -> Array:
    """``x`` on ``device``: ``"cpu"`` or ``"gpu"``."""
    if device == "cpu":
        return to_host(x)
    return cast(Array, importlib.import_module("cupy").asarray(x))


def like(x: Array, host: NDArray[Any]) -> Array:
    """The array ``host`` on the device of ``x``: copied if that is the GPU, otherwise ``host`` itself."""
    return host if isinstance(x, np.ndarray) else cast(Array, array_module(x).asarray(host))


def placeholder(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
    """A read-only array of zeros that takes no memory, whatever its shape: to count numbers and compare shapes."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def select_device(wish: str = "auto") -> Device:
    """Turns ``"auto"``, ``"cpu"`` or ``"gpu"`` into the device to use.

    ``"auto"`` chooses the GPU only if it multiplies two small matrices correctly.

    Raises:
        UserError: ``wish`` is none of the three, or it is ``"gpu"`` and the GPU cannot be used; the error says why.
    """
    if wish == "cpu":
        return "cpu"
    if wish not in ("auto", "gpu"):
        raise UserError(f"device {wish!r} is unknown: choose auto, cpu or gpu.")
    problem = gpu_problem()
    if problem is None:
        return "gpu"
    if wish == "gpu":
        raise UserError(problem)
    return "cpu"


def gpu_problem() -> str | None:
    """None if the GPU can compute; otherwise one sentence that says what is missing: CuPy, a GPU or its libraries.

    CuPy can be imported without a GPU, and even with a GPU it may lack cuBLAS or the run-time compiler. Only a
    computation shows whether it works. This function never raises, in whatever state CuPy is: an older CuPy beside a
    newer NumPy, for example, fails with an ``AttributeError`` when it is imported.
    """
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed: run `pip install {_wheel_name()}`, or use --device cpu."
        return (
            f"CuPy is installed, but cannot be imported ({type(error).__name__}: {_first_line(error)}): run `pip "
            f"install --upgrade {_wheel_name()}`, or use --device cpu."
        )
    version = str(getattr(cupy, "__version__", "of no version"))
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < OLDEST_CUPY:
        problem = "is too old" if major.isdecimal() else "is not a whole installation"
        return (
            f"CuPy {version} {problem}: run `pip install --upgrade {_wheel_name()}` for version {OLDEST_CUPY} or "
            "newer, or use --device cpu."
        )
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "CuPy is installed, but no GPU was found: check `nvidia-smi`, or use --device cpu."
    except Exception as error:
        return (
            f"CuPy is installed, but no GPU or driver responds ({_first_line(error)}): check `nvidia-smi`, or use "
            "--device cpu."
        )
    try:
        ones = cupy.ones((2, 2), dtype=np.float32)
        works = float((ones @ ones).sum()) == 8.0
    except Exception as error:  # CuPy's compiler raises exceptions of its own, besides the usual ones
        return (
            f"There is a GPU, but CuPy cannot load its CUDA libraries ({_first_line(error)}): "
            f'run `pip install "{_wheel_name()}[ctk]"`, or use --device cpu.'
        )
    return None if works else "The GPU gives wrong results for a 2×2 product: use --device cpu."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _wheel_name() -> str:
    """The CuPy wheel for the CUDA version that the driver supports; the wheel for 12.x if there is no driver."""
    import ctypes

    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except Exception:  # there is no driver, or it lacks the function
        return "cupy-cuda12x"
    return f"cupy-cuda{min(max(version.value // 1000, 12), 13)}x"
