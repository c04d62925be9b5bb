"""Quantised matrices as a part of a model: the frozen base of an adapted weight (QLoRA).

The other modules of this room make codes that are saved in a file; a model that is loaded from such a file is in
floating point again. Here the codes stay in memory, and ``dense`` computes the matrix each time that the matrix is
used, so only one matrix at a time is in floating point. The fields of ``NF4`` and ``Int8`` are arrays, or stacks of
arrays for a stack of experts. The shape of the matrix is not stored: it follows from the adapter of the matrix.

Dettmers et al. 2023, arXiv 2305.14314 (QLoRA).  Lesson: lessons/42_lora.ipynb
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.compression import int8, nf4
from minimoe.core.arrays import Array, placeholder
from minimoe.core.errors import UserError, suggestion


class NF4(NamedTuple):
    """4 bits with double quantisation: see ``nf4``. In a stack, each array has one more axis in front."""

    codes: Array
    absmax: Array
    nested_absmax: Array
    offset: Array

    def dense(self, inputs: int, outputs: int, dtype: DTypeLike) -> Array:
        """The matrix (inputs, outputs)."""
        return nf4.dequantize(nf4.Quantized(*self, (inputs, outputs))).astype(dtype, copy=False)


class Int8(NamedTuple):
    """8 bits: see ``int8``. In a stack, each array has one more axis in front."""

    codes: Array
    absmax: Array

    def dense(self, inputs: int, outputs: int, dtype: DTypeLike) -> Array:
        """The matrix (inputs, outputs)."""
        return int8.dequantize(int8.Quantized(*self)).astype(dtype, copy=False)


SCHEMES: dict[str, type[NF4] | type[Int8]] = {"nf4": NF4, "int8": Int8}
"""What a frozen base can be kept in."""


def freeze(w: Array, scheme: str) -> NF4 | Int8:
    """w (inputs, outputs) or a stack (E, inputs, outputs), on the host in float32 → its codes.

    Raises:
        UserError: there is no such scheme; or a weight cannot be quantised: see ``layout.checked``.
    """
    if scheme not in SCHEMES:
        raise UserError(
            f"a frozen base cannot be kept in {scheme!r:.40}{suggestion(str(scheme), SCHEMES)}: choose one of "
            f"{', '.join(SCHEMES)}."
        )
    if w.ndim == 3:
        each = [freeze(of_expert, scheme) for of_expert in w]
        return SCHEMES[scheme](*(np.stack(arrays) for arrays in zip(*each, strict=True)))
    if scheme == "int8":
        return Int8(*int8.quantize(w))
    q = nf4.quantize(w)
    assert q.nested_absmax is not None and q.offset is not None  # the quantisation is double
    return NF4(q.codes, q.absmax, q.nested_absmax, q.offset)


def blank(shape: tuple[int, ...], scheme: str) -> NF4 | Int8:
    """The codes of a matrix of this shape, or of a stack, without allocating memory."""
    *_, inputs, outputs = shape
    arrays: dict[str, Any] = (nf4 if scheme == "nf4" else int8).blank((inputs, outputs))._asdict()
    kind = SCHEMES[scheme]
    return kind(*(placeholder((*shape[:-2], *arrays[field].shape), arrays[field].dtype) for field in kind._fields))


def size(base: NF4 | Int8) -> int:
    """The bytes that the codes take."""
    return sum(math.prod(values.shape) * values.itemsize for values in base)
