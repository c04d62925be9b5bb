"""Text that is only shown, such as a progress bar or a sample. If it cannot be written, the work continues.

A terminal may not know a character, a pipe may have lost its reader, a disk may be full, and a stream may be closed.
None of these is a reason to lose a training run, so nothing here raises. A command whose output is its result, such as
``evaluate``, prints its result in the ordinary way, and fails if the result cannot be written.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from minimoe.core.errors import printable


def show(text: str, stream: TextIO | None = None) -> bool:
    """Writes ``text`` and a line end, to standard output by default. Returns whether that was possible.

    Control characters are made visible, and so are characters that the stream cannot write.
    """
    return Shown(sys.stdout if stream is None else stream).write(printable(text) + "\n", flush=True)


class Shown:
    """A stream that never fails: what cannot be written is dropped. It can stand in for ``file`` in ``tqdm``."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream
        self.works = stream is not None  # a closed standard stream is None

    def write(self, text: str, flush: bool = False) -> bool:
        """Writes ``text`` and returns whether that was possible. After a failure, nothing more is tried."""
        if not self.works:
            return False
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            if flush:
                self._stream.flush()
        except Exception:  # a notebook or an editor may have put any object in the place of the stream
            self.works = False
        return self.works

    def flush(self) -> None:
        if self.works:
            try:
                self._stream.flush()
            except Exception:
                self.works = False

    def isatty(self) -> bool:
        with contextlib.suppress(Exception):
            return self.works and bool(self._stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
