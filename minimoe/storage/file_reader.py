"""Reads tensors from files that must not change while a model runs.

Each file is opened once, and every read is checked: whether the file still has the size and the time of change that it
had at first, and whether all bytes came. Files are read into allocated memory and not mapped, which keeps the memory of
the process bounded: the system alone decides how many pages of a mapped file it keeps in memory, and it counts these
pages as memory of the process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError
from minimoe.core.files import open_regular
from minimoe.storage.encoded import Encoded


class FileReader:
    """The open files of a model. ``forget`` asks the system to drop from its file cache what was read."""

    def __init__(self, forget: bool = False) -> None:
        self.files: dict[Path, tuple[BinaryIO, tuple[int, int]]] = {}
        self.forget = forget and hasattr(os, "posix_fadvise")

    def read(self, encoded: Encoded, content: NDArray[np.uint8]) -> None:
        """Fills ``content`` with the bytes of a tensor.

        Raises:
            UserError: its file cannot be read, has changed since it was opened, or is cut short.
        """
        for _, stored, place in encoded.places:
            self._fill(stored.path, stored.start, content[place].data)

    def close(self) -> None:
        """Closes all files; a later read opens its file again, but still refuses the file if it has changed."""
        for file, _ in self.files.values():
            file.close()

    def __del__(self) -> None:
        self.close()

    def _fill(self, path: Path, start: int, place: memoryview) -> None:
        try:
            file, first = self._open(path)
            self._refuse_change(path, file, first)
            file.seek(start)
            done = 0
            while done < len(place):
                count = file.readinto(place[done:])  # type: ignore[attr-defined]
                if not count:
                    raise UserError(
                        f"{path} ends at byte {start + done}, expected at least {start + len(place)}: it was cut short "
                        "while the model was running; restore it and start again."
                    )
                done += count
            self._refuse_change(path, file, first)
            if self.forget:
                os.posix_fadvise(file.fileno(), start, len(place), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be read ({reason}): check the disk, and start again.") from None

    def _open(self, path: Path) -> tuple[BinaryIO, tuple[int, int]]:
        if path not in self.files or self.files[path][0].closed:
            file: Any = open_regular(path, "rb").detach()  # type: ignore[attr-defined]  # without a buffer in between
            seen = self.files[path][1] if path in self.files else _version(file)
            self.files[path] = file, seen
        return self.files[path]

    def _refuse_change(self, path: Path, file: BinaryIO, first: tuple[int, int]) -> None:
        now = _version(file)
        if now != first:
            raise UserError(
                f"{path} changed while the model was running ({now[0]:,} bytes, {first[0]:,} at first), so its "
                "weights may no longer be those of one model: restore it and start again."
            )


def _version(file: BinaryIO) -> tuple[int, int]:
    """The size of a file, and when it was changed."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
