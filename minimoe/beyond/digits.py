"""Handwritten digits: 1,797 grey images of 8 × 8 pixels, each with the digit that it shows.

    found = digits.load()
    found.images    (1797, 8, 8) float32, 0 is paper and 1 is ink
    found.labels    (1797,) integers from 0 to 9

The images are the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI Machine
Learning Repository, doi 10.24432/C50P49, license CC BY 4.0); ``data/README.md`` says more. Neighbours in the file may
be by the same writer, so ``split`` holds out the end of the file and not images drawn at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.errors import UserError
from minimoe.core.summary import brief

SIZE = 8
"""Pixels along each side of an image."""

INK = 16
"""The largest value of a pixel in the file: how many of 4 × 4 finer pixels are black."""


@brief
class Digits(NamedTuple):
    images: Array  # (N, 8, 8) float32 in [0, 1]
    labels: Array  # (N,) int64, the digit


def load(path: Path | None = None) -> Digits:
    """Reads the digits of ``data/``, or those of another file of the same form: ``images`` (N, 8, 8) and ``labels``.

    Raises:
        UserError: the file is missing, cannot be read, is damaged, or holds something else.
    """
    path = _place() if path is None else path
    try:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    except FileNotFoundError:
        raise UserError(f"the digits {path} do not exist: restore the file, or install minimoe again.") from None
    except Exception as error:  # which one a damaged archive raises depends on where it is damaged
        raise UserError(
            f"the digits {path} cannot be read ({error}): restore the file, or install minimoe again."
        ) from None
    problem = _problem(images, labels)
    if problem:
        raise UserError(f"the digits {path} are damaged ({problem}): restore the file, or install minimoe again.")
    return Digits(images.astype(np.float32) / INK, labels.astype(np.int64))


def split(digits: Digits, held_out: int = 497) -> tuple[Digits, Digits]:
    """The images to train on, and the last ``held_out`` images, which no training sees.

    Raises:
        UserError: nothing would be left for one of the two.
    """
    if not 0 < held_out < len(digits.images):
        raise UserError(
            f"held_out {held_out} leaves one part of {len(digits.images)} digits empty: choose a number between."
        )
    first, last = slice(None, -held_out), slice(-held_out, None)
    return Digits(digits.images[first], digits.labels[first]), Digits(digits.images[last], digits.labels[last])


def _place() -> Path:
    # In an installed wheel the file is inside the package; in a checkout it is next to it, as the texts are.
    package = Path(__file__).parent.parent
    inside = package / "_data"
    return (inside if inside.is_dir() else package.parent / "data") / "digits.npz"


def _problem(images: Array, labels: Array) -> str:
    """What is wrong with the contents of the file; empty if nothing is."""
    if images.dtype.kind not in "iu" or images.ndim != 3 or images.shape[1:] != (SIZE, SIZE) or not len(images):
        return f"images are {images.dtype} {images.shape}, expected integers (N, {SIZE}, {SIZE})"
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        return f"labels are {labels.dtype} {labels.shape}, expected integers ({len(images)},)"
    if images.min() < 0 or images.max() > INK:
        return f"a pixel is {images.min() if images.min() < 0 else images.max()}, expected 0 to {INK}"
    if labels.min() < 0 or labels.max() > 9:
        return f"a label is {labels.min() if labels.min() < 0 else labels.max()}, expected 0 to 9"
    return ""
