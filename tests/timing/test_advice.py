"""What `minimoe bench` says of a machine that is held back, and that it is silent about one that is not."""

import os

import pytest

from minimoe.core import resources
from minimoe.timing import advice

# before a fixture replaces them
read_kernel, read_avx2 = advice.kernel, advice._has_avx2


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, none withheld, kernels of the processor's own."""
    for name in (advice.FORCED_KERNEL, *advice.THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(resources, "cores", lambda: 4)
    monkeypatch.setattr(resources, "allowed_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(resources, "cpu_quota", lambda: None)
    monkeypatch.setattr(advice, "kernel", lambda: "SkylakeX")
    monkeypatch.setattr(advice, "own_kernel", lambda: "SkylakeX")
    monkeypatch.setattr(advice, "_has_avx2", lambda: True)


def test_a_machine_that_nothing_holds_back_gets_no_sentence() -> None:
    assert advice.found(4) == []


@pytest.mark.parametrize(
    ("threads", "sentence"),
    [
        (1, "1 of 4 cores is at work: give --threads 4."),
        (3, "3 of 4 cores are at work: give --threads 4."),
        (5, "5 workers take turns on 4 cores: give --threads 4."),
    ],
)
def test_too_few_or_too_many_threads_are_pointed_out(threads: int, sentence: str) -> None:
    assert advice.found(threads) == [sentence]


def test_a_forced_kernel_is_pointed_out_only_where_it_is_not_the_processors_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(advice.FORCED_KERNEL, "SkylakeX")
    assert advice.found(4) == []
    monkeypatch.setenv(advice.FORCED_KERNEL, "Haswell")
    monkeypatch.setattr(advice, "kernel", lambda: "Haswell")
    (sentence,) = advice.found(4)
    assert sentence.startswith(
        "OPENBLAS_CORETYPE=Haswell makes BLAS run its Haswell kernels, although it has SkylakeX kernels"
    )


def test_an_old_kernel_is_pointed_out_on_a_newer_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "kernel", lambda: "Prescott")
    (sentence,) = advice.found(4)
    assert sentence.startswith("BLAS runs its Prescott kernels, which are made for processors without AVX2, although")
    monkeypatch.setattr(advice, "_has_avx2", lambda: False)
    assert advice.found(4) == []


def test_withheld_cores_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert advice.found(4) == [
        "This process may use 4 of the machine's 8 cores: taskset or a container sets this limit."
    ]
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(resources, "cpu_quota", lambda: 1.5)
    (sentence,) = advice.found(4)
    assert sentence.startswith("A container's quota gives this process the time of 1.5 of 4 cores")


def test_a_blas_with_too_few_threads_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (sentence,) = advice.found(4)
    assert sentence.startswith("OMP_NUM_THREADS=1 limits BLAS to 1 of 4 threads when a long prompt is read: unset it")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert advice.found(4) == []


def test_blas_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(advice.FORCED_KERNEL, "Prescott")
    assert advice.own_kernel() != "Prescott"


def test_each_variable_that_holds_blas_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in advice.THREADS:
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "0")
        assert advice._short_blas(4) is None
        monkeypatch.setenv(name, "1")
        assert str(advice._short_blas(4)).startswith(f"{name}=1 ")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("flags", "has"), [("flags : fpu avx avx2 bmi2", True), ("flags : fpu avx avx512f", False)])
def test_avx2_is_read_where_linux_tells(monkeypatch: pytest.MonkeyPatch, flags: str, has: bool) -> None:
    monkeypatch.setattr(advice.Path, "read_text", lambda path: flags + "\n")
    assert read_avx2() is has


def test_a_blas_that_does_not_name_its_kernels_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: [{"user_api": "blas", "architecture": None}])
    assert read_kernel() == ""
