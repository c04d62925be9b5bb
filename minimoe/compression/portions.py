"""Dequantises a matrix some outputs at a time, so that the memory for intermediate results stays small.

The blocks of a matrix follow each other output by output. So a few neighbouring outputs are a range of
blocks, provided that their weights together fill whole blocks. The numbers are those of ``dequantize``, to
the bit: every weight is computed from its own code and the numbers of its block, in the same operations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import hqq_meta, int8, layout, nf4, rtn

WEIGHTS = 2**20
"""About how many weights are dequantised at a time: their intermediate results take some 30 MB."""

Quantized = int8.Quantized | nf4.Quantized | rtn.Quantized | hqq_meta.Quantized


def dequantize_into(q: Quantized, place: NDArray[np.float32]) -> None:
    """Writes the matrix ŵ (inputs, outputs) into ``place``, an array of this shape."""
    if isinstance(q, hqq_meta.Quantized):
        q = hqq_meta.expanded(q)  # once, since 128 groups share numbers and a portion has other bounds
    inputs, outputs = place.shape
    step = outputs_at_once(q, inputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        place[:, start:stop] = portion(q, inputs, start, stop)


def outputs_at_once(q: Quantized, inputs: int) -> int:
    """The largest number of outputs that fill whole blocks and have at most ``WEIGHTS`` weights.

    If there is none, the smallest number of outputs that fill whole blocks.
    """
    unit = 1
    if isinstance(q, nf4.Quantized):
        unit = math.lcm(q.block, 2) * (1 if q.nested_absmax is None else nf4.NESTED_BLOCK)
    elif isinstance(q, rtn.Quantized | hqq_meta.Quantized):
        unit = q.codes.shape[1]
    least = unit // math.gcd(unit, inputs)
    return max(1, WEIGHTS // (inputs * least)) * least


def portion(q: Quantized, inputs: int, start: int, stop: int) -> NDArray[np.float32]:
    """The outputs from ``start`` up to ``stop`` of ŵ, (inputs, stop − start). A block must begin at ``start``."""
    first, last, shape = start * inputs, stop * inputs, (inputs, stop - start)  # in weights
    if isinstance(q, int8.Quantized):
        return int8.dequantize(int8.Quantized(q.codes[:, start:stop], q.absmax[start:stop]))
    if isinstance(q, nf4.Quantized):
        blocks = slice(first // q.block, -(-last // q.block))
        nested: Any = q.nested_absmax
        if nested is not None:
            nested = nested[blocks.start // nf4.NESTED_BLOCK : -(-blocks.stop // nf4.NESTED_BLOCK)]
        part = q._replace(codes=q.codes[first // 2 : -(-last // 2)], absmax=q.absmax[blocks], nested_absmax=nested)
        return nf4.dequantize(part._replace(shape=shape))
    q = hqq_meta.expanded(q) if isinstance(q, hqq_meta.Quantized) else q
    group = q.codes.shape[1]
    blocks = slice(first // group, -(-last // group))
    codes = layout.unpack_range(q.codes, q.bits, blocks.start, blocks.stop)
    step, offset = (values[blocks, None].astype(np.float32) for values in (q.step, q.offset))
    return layout.matrix(codes * step + offset, shape)
