"""A linear layer whose weight is quantised and does not learn. It is what lies below an adapter in QLoRA.

    y = x Ŵ,    Ŵ = the matrix that the codes stand for

The codes are constants: rounding has no useful derivative, so the weight gets no gradient. The input still gets one,
because layers before this one may learn. Ŵ is made from the codes twice, in forward and in backward, and never kept;
nor is x, which only dW would need. So the layer needs memory for its codes alone.

Dettmers et al. 2023, arXiv 2305.14314.  Lesson: lessons/51_distillation_and_pruning.ipynb
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minimoe.compression.quantize import SCHEMES
from minimoe.core.arrays import Array, like
from minimoe.core.errors import UserError, suggestion


class Frozen(NamedTuple):
    quantized: Any  # the arrays of the scheme's module
    scheme: str  # a name in quantize.SCHEMES


def quantize(weight: Array, scheme: str) -> Frozen:
    """weight (D_in, D_out) in float16 or float32 → the layer.

    Raises:
        UserError: there is no such scheme, or the weight cannot be quantised.
    """
    if scheme not in SCHEMES:
        raise UserError(
            f"there is no scheme {scheme!r:.40}{suggestion(str(scheme), SCHEMES)}: choose one of {', '.join(SCHEMES)}."
        )
    of = SCHEMES[scheme]
    return Frozen(of.module.quantize(weight, **of.settings), scheme)


def forward(params: Frozen, x: Array) -> tuple[Array, None]:
    """x (..., D_in) → y (..., D_out), in the dtype of x; there is no cache."""
    return x @ _weight(params, x), None


def backward(params: Frozen, cache: None, dy: Array) -> tuple[Array, None]:
    """dy (..., D_out) → dx (..., D_in); the weight has no gradient.

    Ŵ is a constant, so only the path to x is left:

        dx = dy Ŵᵀ,    no dW
    """
    return dy @ _weight(params, dy).T, None


def _weight(params: Frozen, x: Array) -> Array:
    """Ŵ (D_in, D_out) on the device and in the dtype of x."""
    matrix = SCHEMES[params.scheme].module.dequantize(params.quantized)
    return like(x, matrix.astype(np.dtype(x.dtype)))
