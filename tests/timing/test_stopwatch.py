"""The stopwatch: whom it times, whose time is whose, and that it leaves no trace."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from minimoe.layers import linear, moe
from minimoe.layers.experts import swiglu
from minimoe.timing import stopwatch


def test_every_module_of_the_layers_that_has_both_passes_is_timed_and_so_is_the_cross_entropy() -> None:
    found = stopwatch.components()
    parts = {"embedding", "linear", "rope", "attention", "rmsnorm", "moe", "block", "decoder", "cross_entropy"}
    assert found.keys() >= parts | moe.ROUTERS.keys() | moe.EXPERTS.keys()
    assert all(callable(module.forward) and callable(module.backward) for module in found.values())


def test_a_layer_is_waited_for_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(linear, "forward", lambda: log.append("work"))
    with stopwatch.watch(lambda: log.append("wait")):
        linear.forward()
    assert log == ["wait", "work", "wait"]


def test_a_layer_is_charged_with_no_more_than_the_layers_that_it_calls_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def spends(seconds: float, then: Any = lambda: None) -> Any:
        def forward() -> None:
            nonlocal now
            now += seconds
            then()

        return forward

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    monkeypatch.setattr(linear, "forward", spends(4.0))
    monkeypatch.setattr(swiglu, "forward", spends(2.0, lambda: linear.forward()))
    monkeypatch.setattr(moe, "forward", spends(1.0, lambda: swiglu.forward()))
    with stopwatch.watch(lambda: None) as spent:
        moe.forward()
    assert [spent[layer, "forward"] for layer in ("moe", "swiglu", "linear")] == [1.0, 2.0, 4.0]


def test_a_layers_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner() -> None:
        time.sleep(0.02)

    def outer() -> None:
        linear.forward()
        time.sleep(0.01)
        linear.forward()

    monkeypatch.setattr(linear, "forward", inner)
    monkeypatch.setattr(swiglu, "forward", outer)
    with stopwatch.watch(lambda: None) as seconds, ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(swiglu.forward).result()
        assert not seconds, "another thread is not timed"
        swiglu.forward()
    assert 0.04 <= seconds["linear", "forward"] < 4 * seconds["swiglu", "forward"] + 0.04
    assert 0.01 <= seconds["swiglu", "forward"] < seconds["linear", "forward"]
    assert (linear.forward, swiglu.forward) == (inner, outer), "everything is put back"


def test_everything_is_put_back_after_a_failure() -> None:
    before = linear.forward
    with pytest.raises(ZeroDivisionError), stopwatch.watch(lambda: None):
        assert linear.forward is not before
        raise ZeroDivisionError
    assert linear.forward is before
