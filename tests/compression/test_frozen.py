"""Quantised matrices that stay in a model: the same numbers as the quantisers give, for a matrix and for a stack."""

import numpy as np
import pytest

from minimoe.compression import frozen, int8, nf4
from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.layers import lora
from minimoe.proof.gradcheck import check, failed

MODULES = {"nf4": nf4, "int8": int8}


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scheme", frozen.SCHEMES)
@pytest.mark.parametrize("shape", [(40, 30), (5, 7), (300, 64)])
def test_the_matrix_is_the_one_that_the_quantiser_gives(
    rng: np.random.Generator, scheme: str, shape: tuple[int, int]
) -> None:
    w, module = drawn(rng, *shape), MODULES[scheme]
    base = frozen.freeze(w, scheme)
    dense = base.dense(*shape, np.float32)
    np.testing.assert_array_equal(dense, module.dequantize(module.quantize(w)))  # type: ignore[attr-defined]
    assert dense.dtype == np.float32 and base.dense(*shape, np.float64).dtype == np.float64
    assert 0 < np.abs(dense - w).max() < 0.6


@pytest.mark.parametrize("scheme", frozen.SCHEMES)
def test_a_stack_holds_each_expert_for_itself(rng: np.random.Generator, scheme: str) -> None:
    w = drawn(rng, 3, 12, 10) * np.array([1, 10, 100], np.float32)[:, None, None]
    stack = lora.init(rng, w, 2, 1.0)._replace(base=frozen.freeze(w, scheme))
    for e in range(3):
        alone = frozen.freeze(w[e], scheme).dense(12, 10, np.float32)
        np.testing.assert_array_equal(lora.dense(lora.expert(stack, e)), alone)


@pytest.mark.parametrize("scheme", frozen.SCHEMES)
def test_every_field_is_an_array_and_a_stack_can_be_divided_by_expert(rng: np.random.Generator, scheme: str) -> None:
    for leaf in tree.leaves(frozen.freeze(drawn(rng, 3, 12, 10), scheme)):
        assert isinstance(leaf, np.ndarray) and len(leaf) == 3


@pytest.mark.parametrize("scheme", frozen.SCHEMES)
def test_gradients_flow_through_the_dequantised_matrix(rng: np.random.Generator, scheme: str) -> None:
    w = drawn(rng, 6, 5)
    fresh = lora.init(rng, w, 2, 0.7)
    weight = fresh._replace(base=frozen.freeze(w, scheme), b=rng.standard_normal((2, 5)))

    def forward(params, x):
        return lora.forward(weight._replace(a=params[0].astype(np.float64), b=params[1]), x)

    def backward(params, cache, dy):
        dx, gradient = lora.backward(weight._replace(a=params[0], b=params[1]), cache, dy)
        return dx, (gradient.a, gradient.b)

    assert failed(check("qlora", forward, backward, (weight.a, weight.b), rng.standard_normal((7, 6)))) == []
    dx, _ = lora.backward(
        weight._replace(b=0 * weight.b), lora.Cache(np.ones((4, 6))), dy := rng.standard_normal((4, 5))
    )
    np.testing.assert_allclose(dx, dy @ weight.base.dense(6, 5, np.float64).T, atol=1e-14)


def test_the_sizes_are_the_bytes_of_the_codes(rng: np.random.Generator) -> None:
    w = drawn(rng, 4, 128, 64)
    assert frozen.size(frozen.freeze(w, "nf4")) == 4 * (128 * 64 // 2 + 128 + 4 + 4)
    assert frozen.size(frozen.freeze(w, "int8")) == 4 * (128 * 64 + 4 * 64)


def test_an_unknown_scheme_and_broken_weights_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match=r"cannot be kept in 'nf5' \(did you mean 'nf4'\?\): choose one of nf4, int8"):
        frozen.freeze(drawn(rng, 4, 4), "nf5")
    with pytest.raises(UserError, match="a weight is nan"):
        frozen.freeze(np.full((2, 4, 4), np.nan, np.float32), "nf4")


def lost(rng: np.random.Generator, scheme: str, size: float) -> float:
    """The part of a correction of rank 4 that is lost when it is merged and the sum is quantised again.

    ``size`` is the norm of the correction relative to that of the matrix.
    """
    w = drawn(rng, 128, 128)
    base = frozen.freeze(w, scheme).dense(128, 128, np.float32)
    delta = drawn(rng, 128, 4) @ drawn(rng, 4, 128)
    delta *= size * np.linalg.norm(w) / np.linalg.norm(delta)
    again = frozen.freeze(base + delta, scheme).dense(128, 128, np.float32)
    return float(np.linalg.norm(again - base - delta) / np.linalg.norm(delta))


def test_a_small_correction_is_lost_when_it_is_merged_into_codes() -> None:
    """So merging is done in floating point. A correction as large as the matrix would survive."""
    found = {
        (scheme, size): [lost(np.random.default_rng(seed), scheme, size) for seed in range(3)]
        for scheme, size in (("nf4", 0.01), ("nf4", 0.1), ("nf4", 1.0), ("int8", 0.01), ("int8", 0.1))
    }
    assert min(found["nf4", 0.01]) > 0.9
    assert min(found["nf4", 0.1]) > 0.6 and max(found["nf4", 0.1]) < 0.9
    assert max(found["nf4", 1.0]) < 0.2
    assert min(found["int8", 0.01]) > 0.5 and max(found["int8", 0.1]) < 0.1
