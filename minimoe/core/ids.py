"""The one check of token ids. Without it, NumPy would read −1 as the last token, and True as token 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.core.arrays import to_host
from minimoe.core.errors import UserError


def checked(
    ids: Any, vocab_size: int, *, axes: tuple[int, ...] = (), what: str = "Token ids"
) -> NDArray[np.integer[Any]]:
    """The ids as an array on the host.

    Args:
        axes: the allowed numbers of axes; any number if empty.
        what: the subject of the error message, in the plural.

    Raises:
        UserError: the ids are not whole numbers in [0, V), are in rows of different lengths, or have other axes.
    """
    try:
        array = to_host(ids) if hasattr(ids, "get") and hasattr(ids, "dtype") else np.asarray(ids)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{what} are in rows of different lengths: give one row, or rows of equal length.") from None
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int32)  # NumPy makes an empty list an array of floats
    if array.dtype.kind not in "iu":
        raise UserError(f"{what} must be integers, got {array.dtype}: pass what the tokenizer's encode returned.")
    if axes and array.ndim not in axes:
        expected = "one row" if axes == (1,) else "one row, or rows of equal length"
        raise UserError(f"{what} must be {expected}, got shape {array.shape}: pass one text at a time.")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise UserError(
            f"Token id {wrong} is not in a vocabulary of {vocab_size}; use ids from 0 to {vocab_size - 1}, as the "
            "model's own tokenizer returns them."
        )
    return array


def check_on_host(ids: Any, vocab_size: int, what: str = "Token ids") -> None:
    """``checked`` for the layers: an array on the GPU is not looked at, because that would wait for the GPU."""
    if isinstance(ids, np.ndarray):
        checked(ids, vocab_size, what=what)
