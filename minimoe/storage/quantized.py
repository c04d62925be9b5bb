"""Reads a folder with a model and writes a new one with quantised weights, in the same layout.

Every command opens the new folder as it opens the old one, because the weights become float32 when they are loaded.
Only the file is smaller: a loaded model needs as much memory and time as before, unless ``storage.bounded`` opens it.

A Mixtral may be larger than this machine's memory, so its matrices are read, quantised and written one after the other.
Memory holds one matrix in the numbers of the file and in float64, and the codes of one stack of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import quantize
from minimoe.compression.quantize import Plan, Scheme, Size
from minimoe.core import files, tree
from minimoe.core.arrays import placeholder
from minimoe.core.errors import UserError
from minimoe.core.files import Tensors
from minimoe.storage import checkpoint, encoded, huggingface, huggingface_config, tensor_stream
from minimoe.storage.encoded import Located


def write(source: str | Path, out: str | Path, experts: str, attention: str | None = None) -> list[Size]:
    """Writes the model of the folder ``source`` to the new folder ``out``; returns the size of each part.

    ``experts`` and ``attention`` are schemes of ``compression.quantize``; without ``attention``, ``experts`` is used
    for both.

    Raises:
        UserError: there is no such scheme; ``source`` cannot be loaded or is quantised already; a weight cannot be
            quantised; or ``out`` is not empty or cannot be written.
    """
    plan = quantize.plan(experts, attention)
    source, out = files.user_path(source), files.user_path(out)
    files.refuse_occupied(out)  # before the work, not after it
    if huggingface.is_folder(source) and huggingface_config.read(source).plan is not None:
        raise UserError(f"{source} is quantised already: quantise the model that it came from.")
    if huggingface.is_folder(source):
        return _stream(source, out, plan)
    if checkpoint.load_config(source).recipe.dtype == "float64":
        raise UserError(f"{source} has weights of float64, but float32 is expected: train with --dtype float32.")
    model = checkpoint.load_model(source)
    checkpoint.save_quantized(out, model, plan)
    return quantize.sizes(model.config, plan)


def _stream(source: Path, out: Path, plan: Plan) -> list[Size]:
    """Writes the Mixtral of the folder ``source`` to ``out``, one matrix after the other."""
    described = huggingface_config.read(source)
    tokenizer = huggingface.find_tokenizer(source, described)
    located = encoded.locate(source)
    schemes = quantize.schemes_of(located.shapes, plan._asdict())
    leaf_of: dict[str, str] = {}
    expected: dict[str, NDArray[Any]] = {}
    for name, leaf in tree.named_leaves(located.shapes):
        arrays = {name: leaf}
        if name in schemes:
            empty = schemes[name].module.blank(leaf.shape[-2:], **schemes[name].settings)
            arrays = {
                f"{name}.{field}": placeholder(leaf.shape[:-2] + values.shape, values.dtype)
                for field, values in quantize.arrays_of(empty).items()
            }
        expected |= arrays
        leaf_of |= dict.fromkeys(arrays, name)

    def tensors() -> Iterator[tuple[str, NDArray[Any]]]:
        # the arrays of a leaf follow each other in the order of their names, so each leaf is read once
        for leaf, names in groupby(sorted(expected), key=leaf_of.__getitem__):
            made = _arrays(leaf, located, schemes.get(leaf))
            yield from ((name, made[name]) for name in names)

    def write(path: Path) -> None:
        tensor_stream.write(path, expected, tensors(), {"format": "np"})

    huggingface.save_quantized(out, located.config, tokenizer, described.end_tokens, plan, write)
    return quantize.sizes(located.config, plan)


def _arrays(name: str, located: Located, scheme: Scheme | None) -> Tensors:
    """The arrays of a leaf, quantised if it has a scheme; the experts of a stack are read one by one."""
    of = located.leaves.get(name)
    if of is None:  # the router of a Mistral, which is in no file
        return {name: np.zeros(dict(tree.named_leaves(located.shapes))[name].shape, np.float32)}
    experts = isinstance(of, list)
    parts = (encoded.read(one) for one in of) if isinstance(of, list) else iter([encoded.read(of)])
    if scheme is None:
        return {name: np.stack(list(parts)) if experts else next(parts)}
    done = [quantize.quantize_leaf(name, part, scheme) for part in parts]
    return {
        f"{name}.{field}": np.stack([one[field] for one in done]) if experts else done[0][field] for field in done[0]
    }
