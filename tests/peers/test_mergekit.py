"""Parity with mergekit: SLERP and TIES of one matrix. The assignment problem is compared with scipy's solver."""

import numpy as np
import pytest
import torch

from minimoe.compression import vectors
from minimoe.compression.assignment import assign

pytestmark = pytest.mark.torch

optimize = pytest.importorskip("scipy.optimize")
arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
slerp = pytest.importorskip("mergekit.merge_methods.slerp").slerp
sparsify = pytest.importorskip("mergekit.sparsify")


def theirs_ties(deltas: list[np.ndarray], keep: float, weights: list[float] | None = None) -> np.ndarray:
    """TIES as mergekit puts it together: its parts, without the classes around them."""
    trimmed = torch.stack(
        [sparsify.sparsify(torch.from_numpy(one), keep, sparsify.SparsificationMethod.magnitude) for one in deltas]
    )
    mask = arithmetic.get_mask(trimmed, "sum")
    shares = torch.tensor(weights or [1.0] * len(deltas), dtype=torch.float64).reshape(-1, 1, 1)
    divisor = (shares * mask).sum(0)
    divisor[divisor == 0] = 1
    return ((trimmed * shares * mask).sum(0) / divisor).numpy()


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["drawn", "equal", "nearly parallel", "opposite"])
def test_slerp(t: float, kind: str) -> None:
    rng = np.random.default_rng(1)
    a, other = rng.standard_normal((2, 7, 5))
    b = {"drawn": 3 * other, "equal": a, "nearly parallel": 2 * a + 0.01 * other, "opposite": -a}[kind]
    one_of_a_batch = (torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    theirs = slerp(torch.tensor(t, dtype=torch.float64), *one_of_a_batch)[0].numpy()
    np.testing.assert_allclose(vectors.slerp(a, b, t), theirs, atol=1e-12)


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_ties(keep: float, weights: list[float] | None) -> None:
    """mergekit's own command multiplies by the weights before the vote; here the vote comes first, as in the paper."""
    deltas = list(np.random.default_rng(2).standard_normal((3, 6, 9)))
    np.testing.assert_allclose(vectors.ties(deltas, keep, weights), theirs_ties(deltas, keep, weights), atol=1e-14)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_the_assignment(n: int) -> None:
    for seed in range(5):
        cost = np.random.default_rng(seed).standard_normal((n, n))
        rows, columns = optimize.linear_sum_assignment(cost)
        np.testing.assert_array_equal(assign(cost).columns, columns)
        assert assign(cost).cost == pytest.approx(cost[rows, columns].sum(), rel=1e-12)
