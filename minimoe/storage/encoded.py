"""Where each tensor of a model is in the files of its folder, and how its bytes become float32 in the layers' shape.

Three kinds of folders are described in the same way, so that a model can be quantised or run without loading it whole:
a Mixtral or Mistral in Hugging Face's layout, a folder with quantised weights, and a run. Stacks of experts are
described expert by expert, because a token needs only some of the experts.

    located = locate(folder)            names, shapes and places; no weight is read
    values = decode(encoded, bytes)     the numbers that loading the whole model gives, to the bit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import portions, quantize
from minimoe.compression.quantize import Plan
from minimoe.core import tree
from minimoe.core.arrays import Array, placeholder
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.files import open_regular
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.storage import checkpoint, huggingface, huggingface_config, safetensors_file
from minimoe.storage.safetensors_file import Stored

ALIGNMENT = 64
"""Each array of a tensor begins at a multiple of this many bytes."""

ROWS = 32
"""Rows that become float32 at a time."""


class Encoded(NamedTuple):
    """A tensor in its files: a matrix, a stack of matrices, or a vector."""

    name: str  # of the leaf in the parameters
    shape: tuple[int, ...]  # as the layers use it
    arrays: dict[str, Stored]  # the arrays of a quantised matrix, or one of numbers, called ""
    transposed: bool = False  # the file holds (outputs, inputs)
    empty: Any = None  # the blank of a quantised matrix

    @property
    def size(self) -> int:
        """Bytes in memory, in the form of the file."""
        return sum(_aligned(safetensors_file.size_of(stored)) for stored in self.arrays.values())

    @property
    def places(self) -> Iterator[tuple[str, Stored, slice]]:
        """Each array with the bytes that it takes in memory."""
        start = 0
        for field, stored in self.arrays.items():
            size = safetensors_file.size_of(stored)
            yield field, stored, slice(start, start + size)
            start += _aligned(size)


class Located(NamedTuple):
    """A model in its folder."""

    folder: Path
    config: ModelConfig
    shapes: Decoder  # placeholders
    leaves: dict[str, Encoded | list[Encoded]]  # by name: a list for a stack of experts; without what is in no file
    plan: Plan | None = None


def locate(folder: Path) -> Located:
    """Where the tensors of the model in ``folder`` are; only descriptions and tensors that repeat others are read.

    The checksum of a file covers all of its bytes, so it is not compared.

    Raises:
        UserError: the folder holds no model, or its files are damaged or do not belong together.
    """
    if not huggingface.is_folder(folder):
        run, path = checkpoint.describe(folder)
        if run.recipe.dtype == "float64":
            raise UserError(
                f"{folder} has weights of float64, which only a model that is loaded whole can use: leave the bound of "
                "memory out, or train with --dtype float32."
            )
        shapes = decoder.blank(run.config, placeholder)
        leaves = _in_one_file(path, shapes, run.quantization)
        return Located(folder, run.config, shapes, leaves, run.quantization)
    described = huggingface_config.read(folder)
    config, plan = described.config, described.plan
    shapes = decoder.blank(config, placeholder)
    if plan is not None:
        return Located(folder, config, shapes, _in_one_file(folder / huggingface.PACKED, shapes, plan), plan)
    found, repeated = huggingface.locate(folder, config, described.model_type)
    huggingface.check_repeated(folder, repeated, _Places(found), config)
    named = [_Place(name, leaf.shape) for name, leaf in tree.named_leaves(shapes)]
    by_expert = set(tree.marked(shapes, "by_expert"))
    in_layout: dict[str, dict[int, Encoded]] = {}
    for name, place in huggingface.layout(tree.rebuild(shapes, named), config, described.model_type):  # type: ignore[arg-type]
        where: Any = place
        in_layout.setdefault(where.name, {})[where.index or 0] = where.encoded(found[name])
    shape_of = {name: leaf.shape for name, leaf in tree.named_leaves(shapes)}
    whole = {
        # shared experts and dense layers are stacks of one, which are not read one by one
        name: [of[e] for e in range(len(of))] if name in by_expert else of[0]._replace(shape=shape_of[name])
        for name, of in in_layout.items()
    }
    return Located(folder, config, shapes, whole)


def _in_one_file(path: Path, shapes: Decoder, plan: Plan | None) -> dict[str, Encoded | list[Encoded]]:
    """The tensors of a file whose names are those of the code, quantised by ``plan`` if there is one."""
    stored = safetensors_file.describe(path, types=safetensors_file.TYPES)
    schemes = {} if plan is None else quantize.schemes_of(shapes, plan._asdict())
    by_expert = set(tree.marked(shapes, "by_expert"))
    leaves: dict[str, Encoded | list[Encoded]] = {}
    for name, leaf in tree.named_leaves(shapes):
        lead, one = (leaf.shape[:1], leaf.shape[1:]) if name in by_expert else ((), leaf.shape)
        empty, expected = None, {"": placeholder(one)}
        if name in schemes:
            lead, one = leaf.shape[:-2], leaf.shape[-2:]  # one matrix, or a stack
            empty = schemes[name].module.blank(one, **schemes[name].settings)
            quantize.refuse_older(name, stored, path)
            expected = quantize.arrays_of(empty)
        arrays = {
            field: _take(stored, f"{name}.{field}" if field else name, lead + values.shape, values.dtype, path)
            for field, values in expected.items()
        }
        if not lead:
            leaves[name] = Encoded(name, one, arrays, empty=empty)
            continue
        if name not in by_expert:  # shared experts and dense layers: a stack of one, which is not read one by one
            whole = {field: _element(of, 0) for field, of in arrays.items()}
            leaves[name] = Encoded(name, leaf.shape, whole, empty=empty)
            continue
        leaves[name] = [
            Encoded(name, one, {field: _element(of, e) for field, of in arrays.items()}, empty=empty)
            for e in range(lead[0])
        ]
    if stored:
        raise UserError(f"{path} holds the tensor {min(stored)}, which its model does not have: use another copy.")
    return leaves


def _take(stored: dict[str, Stored], name: str, shape: tuple[int, ...], dtype: np.dtype[Any], path: Path) -> Stored:
    found = stored.pop(name, None)
    if found is None:
        raise UserError(f"{path} lacks the tensor {name}: it does not belong to the config.json beside it.")
    if found.shape != shape or np.dtype(safetensors_file.TYPES[found.dtype]) != dtype:
        raise UserError(
            f"{path} holds {name} as {found.dtype} {found.shape}, but the config.json beside it asks for {dtype} "
            f"{shape}: the two do not belong together."
        )
    return found


def _element(stack: Stored, e: int) -> Stored:
    """The array of expert ``e`` in the stacked arrays of all experts."""
    one = stack._replace(shape=stack.shape[1:])
    return one._replace(start=stack.start + e * safetensors_file.size_of(one))


class _Place:
    """A leaf of the parameters, or one matrix of a stack, perhaps transposed: what ``huggingface.layout`` asks for."""

    def __init__(self, name: str, shape: tuple[int, ...], index: int | None = None, transposed: bool = False) -> None:
        self.name, self.shape, self.index, self.transposed = name, shape, index, transposed

    @property
    def T(self) -> _Place:  # noqa: N802 - the name that arrays have for it
        return _Place(self.name, self.shape[::-1], self.index, not self.transposed)

    def __getitem__(self, index: int) -> _Place:
        return _Place(self.name, self.shape[1:], index)

    def __len__(self) -> int:
        return self.shape[0]

    def encoded(self, stored: Stored) -> Encoded:
        """This place, filled from a tensor of a folder."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return Encoded(self.name, shape, {"": stored}, self.transposed)


def views(encoded: Encoded, content: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The arrays of a tensor in ``content``, its bytes; bfloat16 as its bits."""
    return {
        field: content[place].view(safetensors_file.TYPES[stored.dtype]).reshape(stored.shape)
        for field, stored, place in encoded.places
    }


def decode(encoded: Encoded, content: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The tensor in float32, in rows, as a new array: what ``huggingface.load_params`` gives for it, to the bit."""
    arrays = views(encoded, content)
    out = np.empty(encoded.shape, np.float32)
    matrix = out.reshape(out.shape[-2:])  # the only one of a stack of one
    if encoded.empty is not None:
        portions.dequantize_into(encoded.empty._replace(**arrays), matrix)
        return out
    place = matrix.T if encoded.transposed else out
    for start in range(0, len(place), ROWS):  # transposing few rows at a time keeps them in the processor's cache
        place[start : start + ROWS] = widened(encoded, arrays[""][start : start + ROWS])
    return out


def read(encoded: Encoded) -> NDArray[np.float32]:
    """The tensor in float32, read from its file."""
    content = np.empty(encoded.size, np.uint8)
    for _, stored, place in encoded.places:
        with open_regular(stored.path, "rb") as file:
            file.seek(stored.start)
            if file.readinto(content[place].data) < place.stop - place.start:  # type: ignore[attr-defined]
                raise UserError(f"{stored.path} is cut short in the tensor {stored.name}: restore it.")
    return decode(encoded, content)


def widened(encoded: Encoded, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Some of a tensor's numbers in float32."""
    if encoded.arrays[""].dtype == "BF16":  # which NumPy does not have
        return safetensors_file.widen(rows)
    return rows.astype(np.float32, copy=False)


class _Places(Mapping[str, Array]):
    """The tensors of a folder in its own layout, each read when it is asked for: see ``huggingface.check_repeated``."""

    def __init__(self, found: Mapping[str, Stored]) -> None:
        self.found = found

    def __getitem__(self, name: str) -> Array:
        values = np.empty(self.found[name].shape, np.float32)
        safetensors_file.copy(self.found[name], values)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
