"""Files that are either whole or absent, and whose damage is detected.

A file is written under a temporary name in the same folder, forced to disk, then renamed, so that its name always holds
the old file or the new one. Tensors are kept in the safetensors format, which cannot run code, with a checksum.

A folder may come from a stranger. Its files are opened with ``open_regular``, which never waits for a pipe, never reads
a device without end, and never writes through a link. A path that the user gave goes through ``user_path`` first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError

Tensors = dict[str, NDArray[Any]]


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path that the user gave, with ``~`` replaced by the home folder, as a shell does for most arguments.

    Raises:
        UserError: the text is empty or not a path, or it has a character that no path can have.
    """
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{given!r:.60} is not a path, expected the name of a file or folder: give it as a string.")
    text = os.fspath(given)
    if not isinstance(text, str) or not text:
        raise UserError(f"{text!r:.60} is not a path, expected the name of a file or folder: give it as a string.")
    path = Path(os.path.expanduser(text))
    try:
        with contextlib.suppress(OSError):
            os.stat(path)
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise UserError(f"{text!r:.80} is not a valid path ({error}): give the path of a file or folder.") from None
    return path


def open_regular(path: Path, mode: Literal["rb", "ab"]) -> BinaryIO:
    """Opens a file to read, or to append to; a missing file is created if the mode is ``"ab"``.

    A link is followed for reading, because some caches of models consist of links, but nothing is written through one.

    Raises:
        OSError: the file does not exist or cannot be opened; it is a folder, a device or a pipe; or it is a link and
            would be written.
    """
    writing = mode == "ab"
    with contextlib.suppress(FileNotFoundError):
        _refuse_special((os.lstat if writing else os.stat)(path))  # before it is opened, which may act on a device
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT if writing else os.O_RDONLY
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY", *(["O_NOFOLLOW"] if writing else [])):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    if descriptor <= 2:  # the program was started with a closed standard stream, whose number this must not take
        import fcntl

        low, descriptor = descriptor, fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    try:
        _refuse_special(os.fstat(descriptor))  # again: it may have been replaced in the meantime
        return open(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, "it is a link, through which nothing is written")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``. Readers find the old file or the new one, never half of one, even after a crash.

    A temporary file that an earlier crash left is removed, not opened: in a folder from a stranger, it could be a link
    to another file.

    Raises:
        UserError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.unlink(missing_ok=True)
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise unwritable(path, error) from None


def refuse_occupied(folder: Path) -> None:
    """Raises ``UserError`` if the folder exists and holds something, or cannot be looked into."""
    try:
        occupied = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise unwritable(folder, error) from None
    if occupied:
        raise UserError(f"{folder} is not empty, and nothing in it is overwritten: choose a new folder.")


def new_folder(folder: Path) -> None:
    """Makes the folder, and those above it; raises ``UserError`` if it is not empty or cannot be made."""
    refuse_occupied(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def chosen_place(path: str | Path) -> Path:
    """The path to write to, for a file name that the user gave: for a link, the path that it points to.

    Raises:
        UserError: the path is a folder, a device or a pipe, which a file cannot replace.
    """
    place = Path(os.path.realpath(user_path(path)))
    if place.exists() and not place.is_file():
        kind = "a folder" if place.is_dir() else "not a regular file"
        raise UserError(f"{path} is {kind}: give the name of a file, new or existing.")
    return place


LARGEST_TEXT = 100_000_000
"""The size in bytes of the largest description that is read into memory."""


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file that describes a model, a run or a tokenizer.

    Raises:
        OSError: the file does not exist, cannot be read, is larger than ``LARGEST_TEXT``, or is a device or a pipe,
            which may have no end.
        ValueError: the file is not UTF-8.
    """
    with open_regular(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_TEXT:
            raise OSError(f"it has {size:,} bytes, expected at most {LARGEST_TEXT:,}")
        return file.read(size).decode("utf-8").replace("\r\n", "\n")


def size_of_regular(path: Path) -> int:
    """The size of a file in bytes; raises ``OSError`` if it does not exist, or is a folder, a device or a pipe."""
    with open_regular(path, "rb") as file:
        return os.fstat(file.fileno()).st_size


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically, with a checksum in its metadata; raises ``UserError`` if that fails."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    write_atomically(path, save(contiguous, {**metadata, "sha256": checksum(contiguous, metadata)}))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a file that ``write_tensors`` wrote.

    Raises:
        UserError: the file is missing, cannot be read, is cut short or damaged, or comes from elsewhere.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size_of_regular(path)  # the library would wait for a pipe
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (FileNotFoundError, PermissionError):  # the library says the former for both
        problem = "cannot be read: check its permissions" if path.exists() else "does not exist: restore it"
        raise UserError(f"{path} {problem}, or train again.") from None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # a dtype that NumPy lacks
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it is cut short or something else; use another copy, "
            "or train again."
        ) from None
    if metadata.pop("sha256", None) != checksum(tensors, metadata):
        raise UserError(f"{path} is damaged: its contents do not match its checksum; use another copy, or train again.")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises ``UserError`` if it cannot be read. The tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        size_of_regular(path)  # the library would wait for a pipe
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): use another copy.") from None


def checksum(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types, shapes and contents."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        add_to_checksum(digest, name, tensors[name])
    return digest.hexdigest()


def add_to_checksum(digest: Any, name: str, values: NDArray[Any]) -> None:
    """Adds the name, the type, the shape and the contents of a tensor to a checksum."""
    digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
    # a memoryview with a 0 in its shape cannot be cast
    digest.update(np.ascontiguousarray(values).data.cast("B") if values.size else b"")


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a file or folder that the system does not let us write."""
    return UserError(f"{path} cannot be written ({error.strerror or error}): free space or choose another folder.")


def sync_folder(folder: Path) -> None:
    """Forces a rename to disk, on systems where a folder can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
