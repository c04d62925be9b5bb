"""Tiny Shakespeare, the only text that is downloaded: once, resumed after a break, and checked by its SHA-256.

The modules that a download needs (urllib, hashlib, tqdm) are imported where they are used: importing them takes longer
than importing all that reads the other texts, and most runs download nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from minimoe.core.errors import UserError
from minimoe.core.files import open_regular, user_path

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30.0  # seconds without a single byte before a download gives up


def download(
    *,
    url: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The path of tiny Shakespeare (1.1 MB), fetched if the cache does not hold it yet.

    The data are collected in a ``.part`` file. An interrupted download leaves it, and the next download continues it.
    The file gets its final name only if its SHA-256 is the expected one.

    Args:
        url: where to fetch it from; None for ``$MINIMOE_SHAKESPEARE_URL``, or else ``URL``.
        cache_dir: where to keep it; None for ``$MINIMOE_CACHE``, or else ``$XDG_CACHE_HOME/minimoe``, or else
            ``~/.cache/minimoe``.
        progress: show a progress bar on standard error.

    Raises:
        UserError: the server cannot be reached, the connection breaks, the cache cannot be written, or the file that
            arrived is not the expected one.
    """
    url = url or os.environ.get("MINIMOE_SHAKESPEARE_URL") or URL
    folder = user_path(cache_dir) if cache_dir is not None else _cache_folder()
    target = folder / "shakespeare.txt"
    part = folder / "shakespeare.txt.part"
    try:
        if _sha256(target) == SHA256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be used ({error}); set MINIMOE_CACHE to a folder that can be written, "
            "or train on any local file with --text PATH."
        ) from error

    try:
        for _ in range(2):
            continued = part.exists()
            if (digest := _sha256(part)) != SHA256:
                _fetch(url, part, progress)
                digest = _sha256(part)
            if digest == SHA256:
                os.replace(part, target)
                return target
            part.unlink(missing_ok=True)
            if not continued:  # only a continued file, whose beginning may be wrong, gets a second attempt
                break
    except (OSError, ValueError) as error:  # every network error is an OSError; a malformed URL is a ValueError
        raise UserError(
            f"The download of 'shakespeare' from {url} failed ({error}); check the network and run again, which "
            "continues where this download stopped, or train on any local file with --text PATH."
        ) from error
    raise UserError(
        f"The file at {url} is not 'shakespeare': expected SHA-256 {SHA256}, got {digest}. "
        "Nothing was kept; run again, or train on any local file with --text PATH."
    )


def _fetch(url: str, part: Path, progress: bool) -> None:
    """Download the rest of ``url`` into ``part``; the bytes that have arrived stay there if the connection breaks.

    If the server has no bytes after the end of ``part``, the file ``part`` stays as it is: its digest shows whether it
    is complete.

    Raises:
        OSError: the server cannot be reached or refuses, the connection breaks, or the disk is full.
        ValueError: the URL is malformed.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            if response.status != 206:  # only a 206 is the requested rest, any other answer is the whole file
                start = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=not progress)
            if not start:
                part.unlink(missing_ok=True)
            with open_regular(part, "ab") as file, bar:
                # read1 returns what has arrived; read waits for a full block, and loses it if the connection breaks.
                while chunk := response.read1(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
                received = file.tell()
            if total is not None and received < total:
                raise OSError(f"the connection closed after {received:,} of {total:,} bytes")
    except HTTPError as error:
        error.close()
        if error.code != 416 or not start:  # 416: the file has no bytes from ``start`` on
            raise
    except HTTPException as error:  # unlike every other network error, not an OSError
        raise OSError(f"{type(error).__name__}: {error}") from error


def _sha256(path: Path) -> str | None:
    """The SHA-256 of a file in hexadecimal, or None if there is no file."""
    import hashlib

    try:
        with open_regular(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except FileNotFoundError:
        return None


def _cache_folder() -> Path:
    if own := os.environ.get("MINIMOE_CACHE"):
        return user_path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return user_path(shared) / "minimoe"
    return Path.home() / ".cache" / "minimoe"
