"""What `minimoe info` says, on machines of every kind."""

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import minimoe
from minimoe.core import arrays, resources
from minimoe.timing import machine


def described() -> dict[str, str]:
    return {line.split()[0]: line.partition(" ")[2].strip() for line in machine.describe().splitlines()}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(machine, "gpu_problem", lambda: "CuPy is not installed: run `pip install x`.")
    monkeypatch.setattr(machine, "_has_driver", lambda: True)


def test_it_names_versions_cores_memory_and_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_bytes", lambda: 8_000_000_000)
    said = described()
    assert said["minimoe"] == minimoe.__version__
    assert said["NumPy"] == np.__version__
    assert said["cores"] == str(resources.cores())
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
    monkeypatch.setattr(resources, "memory_bytes", lambda: None)
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


def test_without_a_driver_nobody_is_told_to_install_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_driver", lambda: False)
    assert described()["GPU"] == "none in use. No NVIDIA driver was found, so everything runs on the CPU."
