"""LoRA: a frozen matrix with a correction of rank r, its gradients and its merging, for one matrix and for stacks."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.layers import lora
from minimoe.layers.linear import Linear
from minimoe.layers.lora import Adapted
from minimoe.proof import of_lora
from minimoe.proof.gradcheck import check, failed


def drawn(rng: np.random.Generator, inputs: int = 6, outputs: int = 5, rank: int = 2) -> Adapted:
    """Every part away from special values, and a scale of its own for each direction."""
    return Adapted(*(rng.standard_normal(s) for s in ((inputs, outputs), (inputs, rank), (rank, outputs), (rank,))))


class InHalves(NamedTuple):
    """A base that is kept as whole numbers of halves."""

    codes: Any

    def dense(self, inputs: int, outputs: int, dtype: Any) -> Any:
        assert self.codes.shape == (inputs, outputs)
        return (self.codes / 2).astype(dtype)


@given(
    tokens=st.integers(1, 4),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    rank=st.integers(1, 3),
    keep=st.sampled_from([None, "features", "tokens"]),
    seed=st.integers(0, 99),
)
def test_gradients_are_right_with_and_without_dropout(
    tokens: int, inputs: int, outputs: int, rank: int, keep: str | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((tokens, inputs)), drawn(rng, inputs, outputs, rank)
    if keep is not None:
        shape = (inputs,) if keep == "features" else (tokens, inputs)
        weight = weight._replace(keep=(rng.random(shape) < 0.6) / 0.6)

    def forward(params: Any, x: Any) -> Any:
        return lora.forward(weight._replace(a=params[0], b=params[1]), x)

    def backward(params: Any, cache: Any, dy: Any) -> Any:
        dx, gradient = lora.backward(weight._replace(a=params[0], b=params[1]), cache, dy)
        return dx, (gradient.a, gradient.b)

    assert failed(check("lora", forward, backward, (weight.a, weight.b), x, entries=8, directions=2)) == []


def test_attention_experts_and_quantised_bases_pass_the_gradient_check(rng: np.random.Generator) -> None:
    rows = of_lora.rows(rng)
    assert failed(rows) == [] and max(row.error for row in rows) < 1e-8
    assert {row.component for row in rows} >= {"lora, attention, dropout", "lora, experts, one idle, dropout"}
    assert min(row.largest for row in rows) > 1e-3


def test_values_worked_out_by_hand() -> None:
    weight = Adapted(np.eye(2), np.array([[1.0], [2.0]]), np.array([[3.0, 5.0]]), np.array([0.5]))
    y, cache = lora.forward(weight, np.array([[1.0, 10.0]]))
    dx, gradient = lora.backward(weight, cache, np.array([[1.0, -1.0]]))
    assert y.tolist() == [[1 + 21 / 2 * 3, 10 + 21 / 2 * 5]]
    assert gradient.b.tolist() == [[21 / 2, -21 / 2]]
    assert gradient.a.tolist() == [[-1.0], [-10.0]]  # dy Bᵀ = −2, times s
    assert dx.tolist() == [[1 - 1, -1 - 2]]


def test_the_gradients_are_projections_of_the_gradient_of_the_whole_matrix(rng: np.random.Generator) -> None:
    weight, x, dy = drawn(rng), rng.standard_normal((7, 6)), rng.standard_normal((7, 5))
    _, gradient = lora.backward(weight, lora.Cache(x), dy)
    whole = x.T @ dy
    np.testing.assert_allclose(gradient.a, whole @ weight.b.T * weight.scale, atol=1e-12)
    np.testing.assert_allclose(gradient.b, (weight.a * weight.scale).T @ whole, atol=1e-12)


def test_what_is_frozen_has_no_gradient(rng: np.random.Generator) -> None:
    weight = drawn(rng)
    for given_ in (weight, weight._replace(base=InHalves(np.ones((6, 5), int)), keep=np.ones(6))):
        _, gradient = lora.backward(given_, lora.Cache(rng.standard_normal((7, 6))), rng.standard_normal((7, 5)))
        assert [name for name, _ in tree.named_leaves(Linear(gradient))] == ["weight.a", "weight.b"]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fresh_adapter_changes_no_bit_and_only_b_has_a_gradient(rng: np.random.Generator, dtype: Any) -> None:
    base = rng.standard_normal((6, 5)).astype(dtype)
    x, dy = rng.standard_normal((7, 6)).astype(dtype), rng.standard_normal((7, 5)).astype(dtype)
    weight = lora.init(rng, base, 2, 3.0)
    y, cache = lora.forward(weight, x)
    dx, gradient = lora.backward(weight, cache, dy)
    np.testing.assert_array_equal(y, x @ base)
    np.testing.assert_array_equal(dx, dy @ base.T)
    assert not gradient.a.any() and gradient.b.all()
    assert {leaf.dtype for leaf in (y, dx, gradient.a, gradient.b, weight.a, weight.scale)} == {np.dtype(dtype)}
    assert weight.base is base


def test_a_starts_uniform_within_the_root_of_the_inputs_and_b_at_zero(rng: np.random.Generator) -> None:
    weight = lora.init(rng, np.zeros((3, 400, 100)), 8, 0.25)
    assert weight.a.shape == (3, 400, 8) and weight.b.shape == (3, 8, 100) and weight.scale.shape == (3, 8)
    assert 0.0495 < np.abs(weight.a).max() <= 0.05 and abs(weight.a.mean()) < 0.002
    assert abs(weight.a.std() - 0.05 / 3**0.5) < 0.001
    assert not weight.b.any() and (weight.scale == 0.25).all()


def test_merging_computes_the_same_for_a_matrix_for_a_stack_and_for_a_quantised_base(rng: np.random.Generator) -> None:
    x = rng.standard_normal((7, 6))
    for weight in (drawn(rng), drawn(rng)._replace(base=InHalves(rng.integers(-5, 5, (6, 5))))):
        np.testing.assert_allclose(x @ lora.merged(weight), lora.forward(weight, x)[0], atol=1e-12)
        np.testing.assert_allclose(lora.merged(weight) - lora.dense(weight), lora.delta(weight), atol=1e-12)
    each = [drawn(rng) for _ in range(3)]
    stack: Adapted = tree.map(lambda *leaves: np.stack(leaves), *each)
    for e, weight in enumerate(each):
        np.testing.assert_array_equal(lora.merged(stack)[e], lora.merged(weight))
        np.testing.assert_allclose(lora.delta(stack)[e], lora.delta(weight), atol=1e-14)
        assert tree.leaves(lora.expert(stack, e))[1] is not weight.a
        np.testing.assert_array_equal(lora.expert(stack, e).a, weight.a)


def test_a_quantised_base_is_used_dequantised_forward_and_backward(rng: np.random.Generator) -> None:
    quantised = drawn(rng)._replace(base=InHalves(rng.integers(-5, 5, (6, 5))))
    plain = quantised._replace(base=quantised.base.codes / 2)
    x, dy = rng.standard_normal((7, 6)), rng.standard_normal((7, 5))
    np.testing.assert_array_equal(lora.forward(quantised, x)[0], lora.forward(plain, x)[0])
    for ours, theirs in zip(
        tree.leaves(lora.backward(quantised, lora.Cache(x), dy)),
        tree.leaves(lora.backward(plain, lora.Cache(x), dy)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_dropout_acts_on_the_path_of_the_adapter_only(rng: np.random.Generator) -> None:
    weight, x, dy = drawn(rng), rng.standard_normal((7, 6)), rng.standard_normal((7, 5))
    nothing = weight._replace(keep=np.zeros(6))
    np.testing.assert_array_equal(lora.forward(nothing, x)[0], x @ weight.base)
    dx, gradient = lora.backward(nothing, lora.Cache(x), dy)
    np.testing.assert_array_equal(dx, dy @ weight.base.T)
    assert not gradient.a.any() and not gradient.b.any()


def test_scaling_is_alpha_over_the_rank_or_over_its_root() -> None:
    assert lora.scaling(16, 8) == 0.5
    assert lora.scaling(16, 8, stabilized=True) == 2.0


def test_the_correction_of_rslora_keeps_its_size_when_the_rank_grows(rng: np.random.Generator) -> None:
    def size(rank: int, stabilized: bool) -> float:
        weight = lora.init(rng, np.zeros((200, 200)), rank, lora.scaling(rank, 8, stabilized))
        return float(np.std(lora.delta(weight._replace(b=rng.standard_normal(weight.b.shape)))))

    assert abs(size(128, True) / size(8, True) - 1) < 0.1
    assert abs(size(128, False) / size(8, False) - 0.25) < 0.03


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_does_not_suit_the_matrix_is_refused(rng: np.random.Generator, rank: int) -> None:
    with pytest.raises(UserError, match=f"rank {rank} does not suit a matrix of 7 × 5: choose one from 1 to 5"):
        lora.init(rng, np.zeros((7, 5)), rank, 1.0)


def test_adapted_weights_are_replaced_in_the_order_of_the_leaves_and_nothing_else(rng: np.random.Generator) -> None:
    a, b, c = drawn(rng), drawn(rng), np.ones(3)
    seen: list[Adapted] = []

    def change(weight: Adapted) -> int:
        seen.append(weight)
        return len(seen)

    changed = lora.replace([Linear(a), (None, c), Linear(b)], change)  # type: ignore[arg-type]
    assert seen[0] is a and seen[1] is b
    assert changed[0] == Linear(1) and changed[1] == (None, c) and changed[2] == Linear(2)  # type: ignore[arg-type]
    assert type(changed[1]) is tuple and changed[1][1] is c
