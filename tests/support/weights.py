"""Weights for quantisers: matrices of many kinds, and what bitsandbytes and hqq made of some."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent.parent / "golden" / "quantized.safetensors"

KINDS = ("normal", "zeros", "constant", "one outlier", "shifted", "tiny", "zero column", "heavy")


@cache
def golden() -> dict[str, NDArray[Any]]:
    return load_file(GOLDEN)


def drawn(kind: str, shape: tuple[int, int], dtype: Any = np.float32, seed: int = 0) -> NDArray[Any]:
    """A matrix (inputs, outputs) of one of the ``KINDS``."""
    rng = np.random.default_rng(seed)
    w = 0.1 * rng.standard_normal(shape)
    match kind:
        case "zeros":
            w[...] = 0
        case "constant":
            w[...] = -0.3
        case "one outlier":
            w[...] = 0
            w[-1, 0] = 50
        case "shifted":
            w += 7
        case "tiny":
            w *= 1e-6
        case "zero column":
            w[:, 0] = 0
        case "heavy":
            w = rng.standard_t(2, shape)
    return w.astype(dtype)


matrices = st.builds(
    drawn,
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    dtype=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 999),
)
