"""Writes a file of tensors that are not all in memory: the header first, then each tensor in its place.

The file is that of ``core.files.write_tensors``, with the same checksum. Its tensors are sorted by their type, and then
by their name. The checksum covers them in the order of their names, so they are made in this order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.core import files

TYPES = {"u1": "U8", "i1": "I8", "f2": "F16", "i4": "I32", "f4": "F32", "f8": "F64"}
"""NumPy's and safetensors' names of types, in safetensors' order; a file begins with the tensors of the last type."""


def write(
    path: Path,
    expected: Mapping[str, NDArray[Any]],
    tensors: Iterable[tuple[str, NDArray[Any]]],
    metadata: Mapping[str, str],
) -> None:
    """Writes the file that ``write_tensors`` writes, but takes the tensors one at a time, in the order of their names.

    ``expected`` has a placeholder for each tensor, because the header, which comes first, states all shapes. Only the
    order of the entries of the metadata may differ: the safetensors library leaves it to chance.

    Raises:
        UserError: the file cannot be written.
    """
    of_type = {np.dtype(name): (code, rank) for rank, (name, code) in enumerate(TYPES.items())}
    order = sorted(expected, key=lambda name: (-of_type[expected[name].dtype][1], name))
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": "0" * 64}}
    end = 0
    for name in order:
        one = expected[name]
        start, end = end, end + math.prod(one.shape) * one.dtype.itemsize
        header[name] = {"dtype": of_type[one.dtype][0], "shape": one.shape, "data_offsets": [start, end]}
    encoded = _header(header)
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.unlink(missing_ok=True)
        with beside.open("xb") as file:
            file.truncate(len(encoded) + end)
            for name, values in tensors:
                content = np.ascontiguousarray(values)
                assert (content.shape, content.dtype) == (tuple(expected[name].shape), expected[name].dtype), name
                file.seek(len(encoded) + header[name]["data_offsets"][0])
                file.write(content.data)
                files.add_to_checksum(digest, name, content)
            header["__metadata__"]["sha256"] = digest.hexdigest()
            file.seek(0)
            file.write(_header(header))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        files.sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise files.unwritable(path, error) from None
        raise


def _header(values: Mapping[str, Any]) -> bytes:
    encoded = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
