"""LoRA: a trained weight matrix stays as it is, and only a correction of rank r is learned.

    y = x W + ((x ⊙ keep) A ⊙ s) B,    A (D_in, r),    B (r, D_out),    s = α/r

W is frozen: it has no gradient and no moments. A and B have r (D_in + D_out) numbers, far fewer than the D_in D_out of
W. B starts at zero, so a fresh adapter changes nothing. ``keep`` is the dropout of this path, 0 or 1/(1 − rate) for
each number; x W sees all of x. s is kept for each of the r directions, so that adapters side by side may have
different s.

An ``Adapted`` stands in the tree of parameters where the array W was, in a ``Linear`` or in a stack of E experts. In a
stack, all its arrays begin with the axis E. The base may also be a quantised matrix (QLoRA), which is dequantised
whenever it is used.

Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA: s = α/√r); Dettmers et al. 2023, arXiv
2305.14314 (QLoRA).  Lesson: lessons/42_lora.ipynb
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, like
from minimoe.core.errors import UserError
from minimoe.core.tree import Tree


class QuantizedBase(Protocol):
    """A frozen matrix, or a stack of them, in few bits: a ``NamedTuple`` whose fields are arrays."""

    def dense(self, inputs: int, outputs: int, dtype: DTypeLike) -> Array:
        """The matrix (inputs, outputs) in floating point."""
        ...


class Adapted(NamedTuple):
    """A frozen weight with an adapter; a stack of experts has one more axis, E, in front of each field."""

    base: Any  # (D_in, D_out), or a QuantizedBase
    a: Array  # (D_in, r)
    b: Array  # (r, D_out)
    scale: Array  # (r,)  s
    keep: Array | None = None  # (D_in,) or (N, D_in)  dropout in this pass; for a stack (E, D_in)


class Cache(NamedTuple):
    x: Array  # (N, D_in)


def init(rng: np.random.Generator, base: Array, rank: int, scale: float) -> Adapted:
    """A fresh adapter of ``base``, a matrix (D_in, D_out) or a stack (E, D_in, D_out).

    A is uniform in ±1/√D_in and B is zero, as in the library peft. With B = 0, the gradient of A is exactly zero in the
    first step, and that of B is not.

    Raises:
        UserError: the rank is not positive, or larger than the rank that a matrix of this shape can have.
    """
    *stack, inputs, outputs = base.shape
    if not 1 <= rank <= min(inputs, outputs):
        raise UserError(
            f"rank {rank} does not suit a matrix of {inputs} × {outputs}: choose one from 1 to {min(inputs, outputs)}."
        )
    a = rng.uniform(-(inputs**-0.5), inputs**-0.5, (*stack, inputs, rank))
    b, s = np.zeros((*stack, rank, outputs)), np.full((*stack, rank), scale)
    return Adapted(base, *(like(base, values.astype(base.dtype)) for values in (a, b, s)))


def scaling(rank: int, alpha: float, stabilized: bool = False) -> float:
    """s = α/r, or α/√r for rsLoRA, with which the size of s AB does not shrink when the rank grows."""
    return alpha / (rank**0.5 if stabilized else rank)


def forward(params: Adapted, x: Array) -> tuple[Array, Cache]:
    """x (N, D_in) → y (N, D_out), for one matrix."""
    y = x @ dense(params)
    y += (_kept(params, x) @ params.a * params.scale) @ params.b
    return y, Cache(x)


def backward(params: Adapted, cache: Cache, dy: Array) -> tuple[Array, Adapted]:
    """dy (N, D_out) → dx (N, D_in) and the gradients of A and B; W and s are frozen and have none.

    With x' = x ⊙ keep and u = x' A ⊙ s, the correction is u B, so du = dy Bᵀ and

        dB = uᵀ dy,    dA = x'ᵀ (du ⊙ s),    dx = dy Wᵀ + ((du ⊙ s) Aᵀ) ⊙ keep

    Without dropout, these are projections of the gradient xᵀ dy that W would have: dA = xᵀ dy Bᵀ s, dB = s Aᵀ xᵀ dy.
    """
    x = _kept(params, cache.x)
    du = dy @ params.b.T * params.scale  # (N, r)  times s, as every use of it is
    db = (x @ params.a * params.scale).T @ dy
    through_adapter = du @ params.a.T
    dx = dy @ dense(params).T
    dx += through_adapter if params.keep is None else through_adapter * params.keep
    return dx, no_gradient(params)._replace(a=x.T @ du, b=db)


def expert(params: Adapted, e: int) -> Adapted:
    """The adapted matrix of expert ``e`` of a stack."""
    chosen: Adapted = tree.map(itemgetter(e), params)
    return chosen


def no_gradient(params: Adapted) -> Adapted:
    """A gradient of zero for A and B, and none for what is frozen."""
    return Adapted(None, *tree.zeros_like((params.a, params.b)), None)  # type: ignore[arg-type]


def dense(params: Adapted) -> Array:
    """W (D_in, D_out) of one matrix, dequantised if it is quantised."""
    if not isinstance(params.base, tuple):
        return params.base
    base: QuantizedBase = params.base  # type: ignore[assignment]
    return base.dense(params.a.shape[-2], params.b.shape[-1], params.a.dtype)


def delta(params: Adapted) -> Array:
    """The correction s AB, (…, D_in, D_out), of one matrix or of a stack."""
    return (params.a * params.scale[..., None, :]) @ params.b


def merged(params: Adapted) -> Array:
    """W + s AB in floating point, (…, D_in, D_out): one array that computes what the adapted weight does.

    Rounding aside, nothing changes. Subtracting the correction again does not bring back the bits of W.
    """
    if params.a.ndim == 2:
        return dense(params) + delta(params)
    return array_module(params.a).stack([merged(expert(params, e)) for e in range(len(params.a))])


def _kept(params: Adapted, x: Array) -> Array:
    """What dropout leaves of the adapter's input."""
    return x if params.keep is None else x * params.keep


def with_dropout(params: Tree, masks: Sequence[Array] | None) -> Tree:
    """The parameters for one pass, with ``masks`` as the ``keep`` of each adapted weight in turn; None: no dropout."""
    if masks is None:
        return params
    supply = iter(masks)
    dropped: Tree = replace(params, lambda weight: weight._replace(keep=next(supply)))
    return dropped


def replace(params: Any, change: Callable[[Adapted], Any]) -> Any:
    """The tree ``params`` with ``change(weight)`` in the place of each adapted weight, in the order of the leaves."""
    if isinstance(params, Adapted):
        return change(params)
    if isinstance(params, list):
        return [replace(branch, change) for branch in params]
    if isinstance(params, tuple):
        branches = [replace(branch, change) for branch in params]
        return type(params)(*branches) if hasattr(params, "_fields") else tuple(branches)
    return params
