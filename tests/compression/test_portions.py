"""A matrix that is dequantised some outputs at a time has the numbers of one that is dequantised whole."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.compression import nf4, portions
from minimoe.compression.quantize import SCHEMES

ALL = [*SCHEMES.values()]


def quantized(scheme: Any, inputs: int, outputs: int, seed: int, **settings: Any) -> tuple[Any, np.ndarray]:
    w = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    q = scheme.quantize(w, **settings)
    return q, scheme.dequantize(q)


@given(
    scheme=st.sampled_from(ALL),
    inputs=st.sampled_from([1, 3, 16, 48, 64, 96, 128, 512]),
    outputs=st.integers(1, 90),
    weights=st.sampled_from([1, 100, 4096, 2**20]),
    seed=st.integers(0, 99),
)
def test_portions_are_the_whole(scheme: Any, inputs: int, outputs: int, weights: int, seed: int) -> None:
    q, whole = quantized(scheme.module, inputs, outputs, seed, **scheme.settings)
    place = np.full((inputs, outputs), np.nan, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portions, "WEIGHTS", weights)
        portions.dequantize_into(q, place)
    np.testing.assert_array_equal(place, whole)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 300), (96, 1100)])
def test_each_scheme_in_many_portions(scheme: Any, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "WEIGHTS", 2048)
    q, whole = quantized(scheme.module, inputs, outputs, 1, **scheme.settings)
    place = np.empty_like(whole)
    portions.dequantize_into(q, place)
    np.testing.assert_array_equal(place, whole)
    assert portions.outputs_at_once(q, inputs) < outputs


@pytest.mark.parametrize("settings", [{"double": False}, {"block": 32}, {"block": 32, "double": False}])
def test_other_settings_of_nf4(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "WEIGHTS", 4096)
    q, whole = quantized(nf4, 256, 300, 0, **settings)
    place = np.empty_like(whole)
    portions.dequantize_into(q, place)
    np.testing.assert_array_equal(place, whole)
    assert portions.outputs_at_once(q, 256) < 300


def test_the_largest_matrix_of_mixtral_is_cut_into_portions_that_begin_with_a_block() -> None:
    for name, scheme in SCHEMES.items():
        for inputs, outputs in ((4096, 14336), (14336, 4096), (4096, 1024)):
            q = scheme.module.blank((inputs, outputs), **scheme.settings)
            step = portions.outputs_at_once(q, inputs)
            assert inputs * step <= portions.WEIGHTS < outputs * inputs, name
            unit = {"int8": 1, "nf4": 64 * 256}.get(name, scheme.settings.get("group", 1))
            assert inputs * step % unit == 0
