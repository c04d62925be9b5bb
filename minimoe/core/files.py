"""Files that are whole or not there, and that notice damage.

A file is written beside its place, forced to disk, then renamed: at every moment its name holds the old file or the new
one. Tensors are kept in the safetensors format, which cannot run code, with a checksum of all that they hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError

Tensors = dict[str, NDArray[Any]]


def write_atomically(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path`` so that a reader or a crash sees the old file or the new one, never half of one.

    What stands beside ``path`` from an earlier crash is removed and not opened: in a folder from a stranger it could be
    a link to another file.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.unlink(missing_ok=True)
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise unwritable(path, error) from None


def chosen_place(path: str | Path) -> Path:
    """Where a file goes whose name the person gave: behind a link, to what it names.

    Raises:
        UserError: there is a folder, a device or a pipe, which a file cannot take the place of.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        kind = "a folder" if place.is_dir() else "no regular file"
        raise UserError(f"{path} is {kind}: give the name of a file, new or old.")
    return place


LARGEST_TEXT = 100_000_000
"""Bytes of a file that describes something: more is read into memory for nobody."""


def read_text(path: Path) -> str:
    """A text that describes a model, a run or a tokenizer, in UTF-8.

    Raises:
        OSError: it does not exist, cannot be read, is a device or a pipe, which may have no end, or larger than
            ``LARGEST_TEXT``.
        ValueError: it is not UTF-8.
    """
    size = size_of_regular(path)
    if size > LARGEST_TEXT:
        raise OSError(f"it has {size:,} bytes, expected at most {LARGEST_TEXT:,}")
    return path.read_text(encoding="utf-8")


def size_of_regular(path: Path) -> int:
    """Bytes of a file; ``OSError`` if it does not exist, or is a folder, a device or a pipe."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    return found.st_size


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, atomically, with a checksum of all that it holds in its metadata."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    write_atomically(path, save(contiguous, {**metadata, "sha256": checksum(contiguous, metadata)}))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A safetensors file's tensors and metadata; raises ``UserError`` if it is cut short, damaged or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:  # also if it may not be read
        problem = "cannot be read: check its permissions" if path.exists() else "does not exist: restore it"
        raise UserError(f"{path} {problem}, or train again.") from None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # a type that NumPy lacks
        raise UserError(
            f"{path} is not a whole safetensors file ({error}), but cut short or something else: use another copy, or "
            "train again."
        ) from None
    if metadata.pop("sha256", None) != checksum(tensors, metadata):
        raise UserError(f"{path} is damaged: its contents do not match its checksum; use another copy, or train again.")
    return tensors, metadata


def checksum(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types, shapes and contents."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data.cast("B") if values.size else b"")
    return digest.hexdigest()


def unwritable(path: Path, error: OSError) -> UserError:
    """The sentence for a file or folder that the system does not let us write."""
    return UserError(f"{path} cannot be written ({error.strerror or error}): free space or choose another folder.")


def _sync_folder(folder: Path) -> None:
    """Forces a rename to disk, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
