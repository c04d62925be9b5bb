"""CuPy for a machine without a GPU: NumPy's arithmetic under CuPy's rules, with every wait and every upload counted.

    with watch() as seen: ...    seen.waits: what made the host wait for the GPU; seen.uploads: what was copied to it
    install(monkeypatch)         until the end of the test, ``import cupy`` finds the stand-in

What CuPy 14.2 refuses is refused: NumPy arrays and lists as operands, implicit conversion to NumPy, ``where=`` and
``initial=``, most methods of most ufuncs, and every name and parameter that is not in the tables below. What CuPy does
differently is done so: a reduction returns a 0-d array, an index that is out of range wraps silently, ``reduceat``
subtracts running sums. Where CuPy's result depends on chance, the stand-in shows it: ``empty`` holds NaN, and
assigning different values to one place is an error. A few things that CuPy would do at the price of a hidden copy,
such as a list as index, are refused as well.

It cannot show what only a GPU can: its rounding, its speed, its memory, its compiler.
"""

from __future__ import annotations

import contextlib
import numbers
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

# Names of functions with the names of their parameters, as in CuPy 14.2.
REDUCTIONS = {
    "all": "a axis out keepdims",
    "any": "a axis out keepdims",
    "argmax": "a axis dtype out keepdims",
    "argmin": "a axis dtype out keepdims",
    "max": "a axis out keepdims",
    "mean": "a axis dtype out keepdims",
    "min": "a axis out keepdims",
    "prod": "a axis dtype out keepdims",
    "sum": "a axis dtype out keepdims",
}
FUNCTIONS = REDUCTIONS | {
    "broadcast_to": "array shape",
    "clip": "a a_min a_max out",
    "cumsum": "a axis dtype out",
    "diff": "a n axis prepend append",
    "dot": "a b out",
    "expand_dims": "a axis",
    "moveaxis": "a source destination",
    "ones_like": "a dtype order subok shape",
    "outer": "a b out",
    "ravel": "a order",
    "repeat": "a repeats axis",
    "roll": "a shift axis",
    "squeeze": "a axis",
    "swapaxes": "a axis1 axis2",
    "transpose": "a axes",
    "vdot": "a b",
    "zeros_like": "a dtype order subok shape",
}
CREATORS = {
    "arange": "start stop step dtype",
    "eye": "N M k dtype order",
    "full": "shape fill_value dtype order",
    "ones": "shape dtype order",
    "zeros": "shape dtype order",
}
JOINERS = {
    "concatenate": "tup axis out dtype casting",
    "stack": "tup axis out dtype casting",
}
METHODS = {name: parameters.removeprefix("a ") for name, parameters in REDUCTIONS.items()} | {
    "argmax": "axis out dtype keepdims",
    "argmin": "axis out dtype keepdims",
    "argsort": "axis kind",
    "astype": "dtype order casting subok copy",
    "clip": "min max out",
    "copy": "order",
    "cumsum": "axis dtype out",
    "dot": "b out",
    "fill": "value",
    "ravel": "order",
    "repeat": "repeats axis",
    "squeeze": "axis",
    "swapaxes": "axis1 axis2",
}
UFUNCS = """
    abs absolute add arctan bitwise_and bitwise_or bitwise_xor ceil cos divide equal exp expm1 floor
    floor_divide fmax fmin greater greater_equal hypot invert isfinite isinf isnan less less_equal log log1p
    log2 logaddexp logical_and logical_not logical_or maximum minimum multiply negative not_equal power
    remainder rint sign sin sqrt square subtract tanh true_divide
"""
UFUNC_METHODS = {
    "accumulate": ("add", "multiply"),
    "at": ("add", "subtract", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"),
    "reduce": ("add", "multiply"),
    "reduceat": ("add",),
}
CONSTANTS = """
    bool_ float32 float64 inf int32 int64 intp nan newaxis pi
"""
OPERATORS = """
    add sub mul truediv floordiv mod pow and or xor radd rsub rmul rtruediv rfloordiv rmod rpow rand ror rxor
    iadd isub imul itruediv ifloordiv imod ipow iand ior ixor lt le gt ge eq ne matmul neg abs invert
"""


class Seen(NamedTuple):
    """What was noticed while watching: one entry each time, saying how it came about."""

    waits: list[str]
    uploads: list[str]


_watching: list[Seen] = []


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """Notes every wait and every upload until the end of the block."""
    seen = Seen([], [])
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching[:] = [other for other in _watching if other is not seen]


def _waited(how: str) -> None:
    for seen in _watching:
        seen.waits.append(how)


def _uploaded(how: str) -> None:
    for seen in _watching:
        seen.uploads.append(how)


class ndarray:  # noqa: N801 - CuPy's name
    """An array that CuPy might have made."""

    __array_ufunc__ = None  # NumPy leaves the operators to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: Any) -> None:
        self._host = np.asarray(host)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    T = property(lambda self: ndarray(self._host.T))

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def _wait(self, how: str) -> Any:
        _waited(how)
        return self._host

    def get(self) -> Any:
        return self._wait("get").copy()

    def item(self) -> Any:
        return self._wait("item").item()

    def tolist(self) -> Any:
        return self._wait("tolist").tolist()

    def __bool__(self) -> bool:
        return bool(self._wait("bool"))

    def __int__(self) -> int:
        return int(self._wait("int"))

    def __float__(self) -> float:
        return float(self._wait("float"))

    def __index__(self) -> int:
        return self._wait("index").__index__()

    def __repr__(self) -> str:
        return f"strict_cupy {self._wait('repr')!r}"

    def nonzero(self) -> tuple[ndarray, ...]:
        return _back(self._wait("nonzero").nonzero())

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> ndarray:
        assert not any(isinstance(size, ndarray) for size in shape), "a shape is made of numbers"
        return ndarray(self._host.reshape(*shape, order=order))

    def transpose(self, *axes: Any) -> ndarray:
        return ndarray(self._host.transpose(*axes))

    def take(self, indices: ndarray, axis: int | None = None) -> ndarray:
        return ndarray(self._host.take(_operand(indices), axis, mode="wrap"))

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._host[self._key(key)[0]])

    def __setitem__(self, key: Any, value: Any) -> None:
        where, picked = self._key(key)
        values = _operand(value)
        self._host[where] = values
        if picked:
            wanted = np.broadcast_to(values, self._host[where].shape).astype(self.dtype)
            if not np.array_equal(self._host[where], wanted, equal_nan=True):
                raise AssertionError("two different values for one place: which one stays is chance on a GPU")

    def _key(self, key: Any) -> tuple[tuple[Any, ...], bool]:
        """NumPy's form of an index, out-of-range places wrapped, and whether places are picked by an array."""
        items = key if isinstance(key, tuple) else (key,)
        if not any(item is Ellipsis for item in items):
            items = (*items, Ellipsis)  # with it, NumPy too gives a view of a single number
        dims = [_dims(item) for item in items]
        result, axis, picked = [], 0, False
        for item, consumed in zip(items, dims, strict=True):
            if isinstance(item, ndarray):
                if item.dtype.kind == "b":
                    _waited("mask")
                elif item.dtype.kind not in "iu":
                    raise IndexError(f"arrays used as indices must be of integer or boolean type, not {item.dtype}")
                picked = True
                result.append(item._host if item.dtype.kind == "b" else item._host % max(self.shape[axis], 1))
            else:
                result.append(item)
            axis += self.ndim - sum(dims) if item is Ellipsis else consumed
        return tuple(result), picked


def _dims(item: Any) -> int:
    """How many axes one part of an index stands for; refuses what CuPy would have to copy to the GPU first."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, ndarray):
        return item.ndim if item.dtype.kind == "b" else 1
    if isinstance(item, slice) or (isinstance(item, numbers.Integral) and not isinstance(item, bool)):
        return 1
    raise TypeError(f"a {type(item).__name__} as index is a hidden copy to the GPU")


def _operand(x: Any) -> Any:
    """What arithmetic may meet: an array of CuPy's, or a single number."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, numbers.Number | np.generic):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _inside(x: Any) -> Any:
    """An argument of a function: arrays unpacked wherever they stand, NumPy's refused."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, tuple | list):
        return type(x)(_inside(part) for part in x)
    return x


def _back(x: Any) -> Any:
    """A result of NumPy's, with every array and scalar in it turned into an array."""
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(x)
    if isinstance(x, tuple | list):
        return type(x)(_back(part) for part in x)
    return x


def _check(name: str, parameters: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    known = parameters.split()
    unknown = set(kwargs) - set(known)
    if len(args) > len(known) or unknown:
        raise TypeError(f"{name}() takes {', '.join(known)}, not {', '.join(unknown) or f'{len(args)} arguments'}")
    if isinstance((dict(zip(known, args, strict=False)) | kwargs).get("repeats"), ndarray):
        raise ValueError(f"{name}: the host must know the repeats, or it waits for their sum")
    if kwargs.get("kind") not in (None, "stable"):
        raise ValueError(f"{name}: CuPy sorts in one way only, kind='stable'")


def _function(name: str, parameters: str, first_is_array: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(name, parameters, args, kwargs)
        if first_is_array and not (args and isinstance(args[0], ndarray)):
            raise TypeError(f"{name}() needs an array of CuPy's first")
        result = getattr(np, name)(*_inside(args), **{key: _inside(value) for key, value in kwargs.items()})
        return kwargs["out"] if kwargs.get("out") is not None else _back(result)

    return call


def _method(name: str, parameters: str) -> Callable[..., Any]:
    def call(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        _check(name, parameters, args, kwargs)
        kwargs = {key: _inside(value) for key, value in kwargs.items() if key != "subok"}
        return _back(getattr(self._host, name)(*_inside(args), **kwargs))

    return call


def _operator(name: str) -> Callable[..., Any]:
    def call(self: ndarray, *others: Any) -> Any:
        result = getattr(self._host, name)(*(_operand(other) for other in others))
        if result is NotImplemented:
            return NotImplemented
        return self if result is self._host else ndarray(result)

    return call


for _name, _parameters in METHODS.items():
    setattr(ndarray, _name, _method(_name, _parameters))
for _name in OPERATORS.split():
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
ndarray.__module__ = "cupy"  # by which the package finds the module of an array


class Ufunc:
    """An elementwise function, with the few methods that CuPy has for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, out: ndarray | None = None, **kwargs: Any) -> ndarray:
        _check(self.name, "casting dtype", (), kwargs)
        function = getattr(np, self.name)
        result = function(*(_operand(x) for x in args), out=None if out is None else out._host, **kwargs)
        return ndarray(result) if out is None else out

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if self.name not in UFUNC_METHODS.get(method, ()):
            raise NotImplementedError(f"`cupy_{self.name}.{method}` is not supported yet")
        if method == "reduceat":
            return _add_reduceat
        function = getattr(getattr(np, self.name), method)
        return lambda *args, **kwargs: _back(function(*_inside(args), **kwargs))


def _add_reduceat(array: ndarray, indices: ndarray, axis: int = 0, dtype: Any = None) -> ndarray:
    """Differences of running sums, as CuPy computes it: in float32 a short sum inherits the rounding of a long one."""
    assert axis == 0, "the stand-in knows only this axis"
    rows, starts = array._host, _operand(indices)
    running = np.cumsum(rows, axis=0, dtype=dtype)
    running = np.concatenate([np.zeros_like(running[:1]), running])
    stops = np.append(starts[1:], len(rows))
    stray = (stops <= starts).reshape(-1, *[1] * (rows.ndim - 1))
    return ndarray(np.where(stray, rows[starts % len(rows)], running[stops] - running[starts]))


# Functions with a behaviour of their own


def asarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else ndarray(a._host.astype(dtype))
    _uploaded(f"asarray of {type(a).__name__}")
    return ndarray(np.array(a, dtype))


def asnumpy(a: Any) -> Any:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Memory that nobody has written to: no number, or an index far outside."""
    dtype = np.dtype(dtype)
    return ndarray(np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max // 3, dtype))


def empty_like(prototype: ndarray, dtype: Any = None) -> ndarray:
    result = ndarray(np.empty_like(prototype._host, dtype))
    result[...] = empty((), result.dtype)
    return result


def matmul(a: ndarray, b: ndarray, out: ndarray | None = None) -> ndarray:
    if not isinstance(a, ndarray) or not isinstance(b, ndarray):
        raise TypeError(f"Unsupported type {type(a)} or {type(b)}")
    result = np.matmul(a._host, b._host, out=None if out is None else out._host)
    return ndarray(result) if out is None else out


def einsum(subscripts: str, *operands: ndarray) -> ndarray:
    return ndarray(np.einsum(subscripts, *(x._host for x in operands)))


def where(condition: ndarray, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:
        return condition.nonzero()
    if not isinstance(condition, ndarray):
        raise TypeError(f"Unsupported type {type(condition)}")
    return ndarray(np.where(condition._host, _operand(x), _operand(y)))


def argsort(a: ndarray, axis: int = -1, kind: str | None = None) -> ndarray:
    return a.argsort(axis=axis, kind=kind or "stable")


def searchsorted(a: ndarray, v: ndarray, side: str = "left") -> ndarray:
    if not isinstance(a, ndarray) or not isinstance(v, ndarray):
        raise NotImplementedError("Only ndarray are supported for a and v")
    return ndarray(np.searchsorted(a._host, v._host, side))


def take_along_axis(a: ndarray, indices: ndarray, axis: int) -> ndarray:
    return a[_along(a, indices, axis)]


def put_along_axis(arr: ndarray, indices: ndarray, values: Any, axis: int) -> None:
    arr[_along(arr, indices, axis)] = values


def _along(a: ndarray, indices: ndarray, axis: int) -> tuple[ndarray, ...]:
    if a.ndim != indices.ndim:
        raise ValueError("`indices` and `a` must have the same number of dimensions")
    grid = [ndarray(rows) for rows in np.ogrid[tuple(slice(size) for size in a.shape)]]
    grid[axis] = indices
    return tuple(grid)


def bincount(x: ndarray, weights: ndarray | None = None, minlength: int | None = None) -> ndarray:
    _waited("bincount: is any negative?")
    _waited("bincount: which is the largest?")
    return ndarray(np.bincount(x._host, None if weights is None else weights._host, minlength or 0))


def unique(ar: ndarray) -> ndarray:
    return ndarray(np.unique(ar._wait("unique")))


def flatnonzero(a: ndarray) -> ndarray:
    return a.ravel().nonzero()[0]


OWN = (
    argsort, asarray, asnumpy, bincount, einsum, empty, empty_like, flatnonzero, matmul, put_along_axis,
    searchsorted, take_along_axis, unique, where,
)  # fmt: skip


def module() -> types.ModuleType:
    """A module like ``cupy``, with one GPU that always answers."""
    cupy = types.ModuleType("cupy")
    tables = [(FUNCTIONS, True), (CREATORS, False), (JOINERS, False)]
    for table, first_is_array in tables:
        for name, parameters in table.items():
            setattr(cupy, name, _function(name, parameters, first_is_array))
    for name in UFUNCS.split():
        setattr(cupy, name, Ufunc(name))
    for name in CONSTANTS.split():
        setattr(cupy, name, getattr(np, name))
    for function in OWN:
        setattr(cupy, function.__name__, function)
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda device: {"name": b"stand-in"},
        memGetInfo=lambda: (10**9, 2 * 10**9),
    )
    vars(cupy).update(ndarray=ndarray, array=asarray, __version__="14.2.0", cuda=types.SimpleNamespace(runtime=runtime))
    return cupy


def install(monkeypatch: Any) -> types.ModuleType:
    """Puts the stand-in where ``import cupy`` looks, for one test."""
    cupy = module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy
