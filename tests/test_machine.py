"""What `minimoe info` says, on machines of every kind."""

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import minimoe
from minimoe import arrays, machine, workers
from minimoe.errors import UserError


def described() -> dict[str, str]:
    return {line.split()[0]: line.partition(" ")[2].strip() for line in machine.describe().splitlines()}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(machine, "gpu_problem", lambda: "CuPy is not installed: run `pip install x`.")


def test_it_names_versions_cores_memory_and_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "memory_bytes", lambda: 8_000_000_000)
    said = described()
    assert said["minimoe"] == minimoe.__version__
    assert said["NumPy"] == np.__version__
    assert said["cores"] == str(workers.cores())
    assert said["memory"] == "8.0 GB"
    assert said["GPU"] == "none in use. CuPy is not installed: run `pip install x`."
    assert "note" not in said


def test_it_names_the_blas_that_numpy_really_uses() -> None:
    from threadpoolctl import threadpool_info

    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    if not libraries:
        pytest.skip("this NumPy was built with a BLAS that threadpoolctl does not know")
    assert described()["BLAS"].startswith(f"{libraries[0]['internal_api']} {libraries[0]['version']}")


def test_a_forced_kernel_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "generic")
    assert re.match(r"OPENBLAS_CORETYPE=generic keeps BLAS from", described()["note"])


def test_a_system_that_hides_its_memory_is_described_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "memory_bytes", lambda: None)
    assert "memory" not in described()


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(
        getDeviceProperties=lambda number: {"name": b"Imaginary 9000"}, memGetInfo=lambda: (3 * 10**9, 24 * 10**9)
    )
    cupy.__dict__.update(__version__="14.2", cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(machine, "gpu_problem", lambda: None)
    assert described()["GPU"] == "Imaginary 9000, 3.0 of 24.0 GB free, CuPy 14.2"


def test_without_cupy_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # which makes importing it fail
    problem = arrays.gpu_problem()
    assert problem is not None
    assert problem.startswith("CuPy is not installed: run `pip install cupy-cuda")


# Threads


def test_every_core_is_used_unless_told_otherwise() -> None:
    assert workers.count(None) == workers.cores() >= 1
    assert workers.count(3) == 3


@pytest.mark.parametrize("wish", [0, -2, 1025])
def test_a_number_of_threads_that_makes_no_sense_is_refused(wish: int) -> None:
    with pytest.raises(UserError, match=f"threads {wish} makes no sense"):
        workers.count(wish)


def test_memory_is_told_in_bytes_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    known = workers.memory_bytes()
    assert known is None or known > 10**8

    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown, raising=False)
    assert workers.memory_bytes() is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_pool_keeps_the_order_and_holds_blas_to_one_thread_each(threads: int) -> None:
    from threadpoolctl import threadpool_info

    def busy() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    before = busy()
    with workers.pool(threads) as pool:
        assert list(pool(lambda n: n * n, range(50))) == [n * n for n in range(50)]
        assert busy() <= {1}
    assert busy() == before


def test_a_failure_in_a_thread_reaches_the_caller() -> None:
    with workers.pool(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool(lambda n: 1 // n, [1, 0, 1]))
