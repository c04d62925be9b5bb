"""The stand-in for CuPy: it refuses what CuPy refuses, differs where CuPy differs, and counts what it should."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import strict_cupy
from strict_cupy import watch

cp = strict_cupy.module()
HOST = np.arange(6.0).reshape(2, 3)


@pytest.fixture
def x() -> Any:
    return cp.asarray(HOST)


def test_arithmetic_is_numpys_and_stays_on_the_device(x: Any) -> None:
    y = 2 * x[:, 1:] @ x.T[1:] - 1 / (x.sum() + 1)
    assert type(y) is strict_cupy.ndarray
    np.testing.assert_array_equal(y.get(), 2 * HOST[:, 1:] @ HOST.T[1:] - 1 / (HOST.sum() + 1))
    assert (np.float32(2) * cp.ones(3, np.float32)).dtype == np.float32


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a NumPy array beside one of CuPy's": lambda x: x + HOST,
    "a NumPy array before one of CuPy's": lambda x: HOST * x,
    "a NumPy array as argument": lambda x: cp.exp(HOST),
    "a NumPy array in a list": lambda x: cp.concatenate([x, HOST]),
    "a NumPy array as value": lambda x: x.__setitem__(0, HOST[0]),
    "a NumPy array as index": lambda x: x[np.array([0])],
    "a NumPy array in a product": lambda x: x @ HOST.T,
    "a list beside an array": lambda x: x + [1.0, 2.0, 3.0],
    "a list as index": lambda x: x[[0, 1]],
    "a list as argument": lambda x: cp.sum([1.0]),
    "conversion to NumPy": np.asarray,
    "a function of NumPy's": lambda x: np.stack([x, x]),
    "a ufunc of NumPy's": np.exp,
    "an array of CuPy's put into one of NumPy's": lambda x: HOST.copy().__setitem__(0, x[0]),
    "where= of a ufunc": lambda x: cp.exp(x, where=True),
    "where= of a reduction": lambda x: x.sum(where=True),
    "initial= of a reduction": lambda x: cp.max(x, initial=0.0),
    "a sort that is not stable": lambda x: cp.argsort(x, kind="quicksort"),
    "a float as index array": lambda x: x[x],
    "an array as repeats": lambda x: cp.repeat(x[0], cp.arange(3)),
    "an array as repeats of a method": lambda x: x[0].repeat(cp.arange(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(x: Any, name: str) -> None:
    with pytest.raises((TypeError, ValueError, IndexError)):
        REFUSED[name](x)


@pytest.mark.parametrize(("ufunc", "method"), [("maximum", "reduce"), ("maximum", "reduceat"), ("logaddexp", "at")])
def test_it_lacks_the_ufunc_methods_that_cupy_lacks(x: Any, ufunc: str, method: str) -> None:
    with pytest.raises(NotImplementedError, match=f"cupy_{ufunc}.{method}"):
        getattr(getattr(cp, ufunc), method)(x)


def test_it_has_no_name_that_is_not_in_its_tables(x: Any) -> None:
    for name in ("nan_to_num", "float128", "errstate", "random"):
        assert not hasattr(cp, name)
    assert not hasattr(x, "byteswap")


def test_a_reduction_and_an_entry_are_arrays_and_not_numbers(x: Any) -> None:
    for y in (x.sum(), cp.max(x), x[1, 2], x[0] @ x[1], cp.vdot(x, x)):
        assert type(y) is strict_cupy.ndarray and y.shape == ()


def test_slices_and_entries_are_views(x: Any) -> None:
    x[0, 1][...] = 7
    x[1:] += 1
    for row in x:
        row *= 2
    np.testing.assert_array_equal(x.get(), [[0, 14, 4], [8, 10, 12]])


def test_an_index_out_of_range_wraps_without_a_word(x: Any) -> None:
    np.testing.assert_array_equal(x[:, cp.asarray(np.array([3, -1, 7]))].get(), HOST[:, [0, 2, 1]])
    np.testing.assert_array_equal(x.take(cp.asarray(np.array([2])), axis=0).get(), HOST[[0]])
    rows, columns = cp.asarray(np.array([2, 3])), cp.asarray(np.array([4, 5]))
    x[rows, columns] = -1
    np.testing.assert_array_equal(x.get(), [[0, -1, 2], [3, 4, -1]])
    with pytest.raises(IndexError):
        x[2]


def test_two_values_for_one_place_are_an_error_and_equal_ones_are_not(x: Any) -> None:
    twice = cp.asarray(np.array([1, 1]))
    x[0, twice] = 5
    with pytest.raises(AssertionError, match="which one stays is chance"):
        x[0, twice] = x[1, 1:]


def test_memory_that_nobody_wrote_to_holds_no_number(x: Any) -> None:
    assert np.isnan(cp.empty((2, 2), np.float32).get()).all()
    assert np.isnan(cp.empty_like(x).get()).all()
    assert (cp.empty(3, np.int64).get() > 10**9).all()


def test_reduceat_subtracts_running_sums_as_cupy_does() -> None:
    rows = cp.asarray(np.array([[1e8], [1.0], [2.0]], np.float32))
    starts = cp.asarray(np.array([0, 1, 1, 2]))
    exact = cp.add.reduceat(rows, starts, axis=0, dtype=np.float64)
    np.testing.assert_array_equal(exact.get(), [[1e8], [1.0], [1.0], [2.0]])
    rounded = cp.add.reduceat(rows, starts, axis=0)
    assert rounded[3].get() != 2.0, "in float32 the last row drowns in the sum before it"
    integers = np.random.default_rng(0).integers(9, size=(20, 2))
    for places in (np.array([0, 3, 3, 9, 19]), np.array([5, 2, 2, 0])):
        ours = cp.add.reduceat(cp.asarray(integers), cp.asarray(places), axis=0)
        np.testing.assert_array_equal(ours.get(), np.add.reduceat(integers, places, axis=0))


WAITS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "get": (lambda x: x.get(), 1),
    "asnumpy": (cp.asnumpy, 1),
    "item": (lambda x: x[0, 0].item(), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "float": (lambda x: float(x.sum()), 1),
    "int": (lambda x: int(x.sum()), 1),
    "bool": (lambda x: bool((x > 0).all()), 1),
    "a slice up to an array": (lambda x: x[: cp.argmax(x[0])], 1),
    "a mask": (lambda x: x[x > 1], 1),
    "assignment through a mask": (lambda x: x.__setitem__(x > 1, 0), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "where with one argument": (lambda x: cp.where(x > 1), 1),
    "unique": (cp.unique, 1),
    "bincount": (lambda x: cp.bincount(x[0].astype(np.int64)), 2),
    "repr": (repr, 1),
    "arithmetic": (lambda x: cp.where(x > 1, x, 0).sum(0) @ x[0] / len(x), 0),
    "a gather": (lambda x: x[cp.arange(2), cp.argmax(x, axis=1)], 0),
    "going through the rows": (lambda x: [row + 1 for row in x], 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_it_counts_the_waits_of(x: Any, name: str) -> None:
    act, waits = WAITS[name]
    with watch() as seen:
        act(x)
    assert len(seen.waits) == waits
    assert seen.uploads == []


def test_it_counts_copies_to_the_device(x: Any) -> None:
    with watch() as seen:
        cp.asarray(HOST)
        cp.asarray(3.0)
        cp.asarray(x)
        cp.full((), 3.0)
    assert len(seen.uploads) == 2
    assert seen.waits == []


def test_watching_ends_with_its_block_and_blocks_may_nest(x: Any) -> None:
    with watch() as outer:
        with watch() as inner:
            float(x.sum())
        float(x.sum())
    float(x.sum())
    assert (len(inner.waits), len(outer.waits)) == (1, 2)


def test_it_is_found_where_cupy_is_looked_for_and_only_during_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.modules.get("cupy")
    with monkeypatch.context() as patch:
        installed = strict_cupy.install(patch)
        import cupy

        assert cupy is installed is sys.modules[type(cupy.ones(1)).__module__]
    assert sys.modules.get("cupy") is before
