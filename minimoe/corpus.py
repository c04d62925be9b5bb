"""The texts that a model learns from: four small ones in the repository, Python's own words, Shakespeare, your files.

A corpus is a few named documents. Each document is a domain of its own, so that after training one can ask which
experts prefer fables and which prefer sums:

    corpus = load("data")                                     fables, dialogues, contes, sums
    ids = [tokenizer.encode(text) for text in corpus.documents.values()]
    train, validation = split(ids)                            the last tenth of every document is never trained on

Only 'shakespeare' ever needs the network, and only once.
"""

import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from minimoe.errors import UserError

# Everything that a download needs (urllib, hashlib, tqdm) is imported where it is used: importing them costs more than
# the rest of this module together, and most runs never download.

DATA = ("fables", "dialogues", "contes", "sums")
NAMES = ("data", *DATA, "python-docs", "python-code", "shakespeare")

# Modules of the standard library that are written in Python and pleasant to read: about 1 MB of source.
PYTHON_MODULES = (
    "argparse",
    "bisect",
    "calendar",
    "cmd",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "ipaddress",
    "operator",
    "optparse",
    "pprint",
    "queue",
    "random",
    "sched",
    "selectors",
    "shelve",
    "shutil",
    "socketserver",
    "statistics",
    "subprocess",
    "tempfile",
    "textwrap",
    "threading",
    "tokenize",
    "weakref",
)

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30.0  # seconds without a single byte before a download gives up

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Corpus:
    """Named documents, each of them one domain.

    Attributes:
        name: what the corpus is called in metrics and checkpoints.
        documents: document name → text, in a fixed order.
        paths: the files that the documents came from; none for a built-in corpus.

    Raises:
        UserError: there is no document, or one of them is empty.
    """

    name: str
    documents: dict[str, str]
    paths: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.documents:
            raise UserError(f"The corpus {self.name!r} has no documents; give it at least one text.")
        for document, text in self.documents.items():
            if not (isinstance(document, str) and isinstance(text, str)):
                raise UserError(
                    f"The document {document!r:.40} of the corpus {self.name!r} is {text!r:.40}; give text by a name."
                )
            if not text:
                raise UserError(f"The document {document!r} of the corpus {self.name!r} is empty; give it a text.")

    @property
    def text(self) -> str:
        """All documents joined: what a char tokenizer is built from."""
        return "".join(self.documents.values())


def load(name: str) -> Corpus:
    """A built-in corpus, one of ``NAMES``.

    'data' is the four texts of the repository together; each of them is also a corpus of its own. 'python-docs' and
    'python-code' come with the running Python, so they differ a little from one Python version to the next.
    'shakespeare' is downloaded on first use.

    Raises:
        UserError: the name is unknown, this Python lacks the text, or the download fails.
    """
    if name == "data":
        return Corpus(name, {document: _read_data(document) for document in DATA})
    if name in DATA:
        return Corpus(name, {name: _read_data(name)})
    if name == "python-docs":
        return Corpus(name, {name: _python_docs()})
    if name == "python-code":
        return Corpus(name, {name: _python_code()})
    if name == "shakespeare":
        return Corpus(name, {name: _read(download(name))})

    from difflib import get_close_matches

    close = get_close_matches(name, NAMES, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"The corpus {name!r} is unknown; use one of {', '.join(NAMES)}, or --text PATH for a file.{meant}")


def read_files(paths: Iterable[str | Path] | str | Path) -> Corpus:
    """A corpus of text files, one document a file, named after the file without its ending.

    Windows line ends become ``\\n`` and a byte order mark is dropped. Files that share a name are told apart by a
    number: notes, notes-2.

    Raises:
        UserError: no path is given, or a file is missing, a directory, unreadable, empty or not UTF-8.
    """
    documents: dict[str, str] = {}
    files = [Path(path).absolute() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in files:
        numbered = (path.stem if n == 1 else f"{path.stem}-{n}" for n in count(1))
        documents[next(name for name in numbered if name not in documents)] = _read(path)
    if not documents:
        raise UserError("No text file is given; give at least one path.")
    return Corpus("+".join(documents), documents, tuple(files))


def split(
    ids_per_document: Sequence[npt.NDArray[Scalar]], validation_fraction: float = 0.1
) -> tuple[list[npt.NDArray[Scalar]], list[npt.NDArray[Scalar]]]:
    """Cut every document in two: its beginning to train on, its last tenth to validate on.

    Cutting each document, rather than their concatenation, keeps every domain in both halves. The parts are views:
    nothing is copied. With a ``validation_fraction`` of 0 the validation parts are empty.

    Returns:
        The training parts and the validation parts, in the order of the documents. A document of n tokens trains on
        its first ``int((1 - validation_fraction) · n)``.

    Raises:
        UserError: ``validation_fraction`` is not in [0, 1), or a document is too short to be cut.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction is {validation_fraction}, expected 0 or more and less than 1; 0.1 is usual."
        )
    train: list[npt.NDArray[Scalar]] = []
    validation: list[npt.NDArray[Scalar]] = []
    for number, ids in enumerate(ids_per_document, start=1):
        cut = int((1 - validation_fraction) * len(ids))
        if cut == 0 or (validation_fraction > 0 and cut == len(ids)):
            raise UserError(
                f"Document {number} has {len(ids)} tokens, too few to keep a validation_fraction of "
                f"{validation_fraction} apart; give a longer text."
            )
        train.append(ids[:cut])
        validation.append(ids[cut:])
    return train, validation


def download(
    name: str = "shakespeare",
    *,
    url: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The path of tiny Shakespeare (1.1 MB), fetched if the cache does not hold it yet.

    What arrives is collected in a ``.part`` file, which an interrupted download leaves behind and the next one
    continues. The file takes its final name only once its SHA-256 is the expected one.

    Args:
        name: only 'shakespeare' is downloaded; every other corpus is already here.
        url: where to fetch it, instead of ``$MINIMOE_SHAKESPEARE_URL`` or else ``SHAKESPEARE_URL``.
        cache_dir: where to keep it, instead of ``$MINIMOE_CACHE``, ``$XDG_CACHE_HOME/minimoe`` or ``~/.cache/minimoe``.
        progress: show a progress bar on standard error.

    Raises:
        UserError: the name is not 'shakespeare', the server cannot be reached or breaks off, the cache cannot be
            written, or what arrived is not the expected file.
    """
    if name != "shakespeare":
        if name in NAMES:
            raise UserError(f"The corpus {name!r} is here already: train on it with --corpus {name}.")
        raise UserError(f"The corpus {name!r} is unknown; the one that is downloaded is 'shakespeare'.")
    url = url or os.environ.get("MINIMOE_SHAKESPEARE_URL") or SHAKESPEARE_URL
    folder = Path(cache_dir) if cache_dir is not None else _cache_folder()
    target = folder / "shakespeare.txt"
    part = folder / "shakespeare.txt.part"
    try:
        if _sha256(target) == SHAKESPEARE_SHA256:
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
            if (digest := _sha256(part)) != SHAKESPEARE_SHA256:
                _fetch(url, part, progress)
                digest = _sha256(part)
            if digest == SHAKESPEARE_SHA256:
                os.replace(part, target)
                return target
            part.unlink(missing_ok=True)
            if not continued:  # a continued file may only have begun wrongly, which deserves a second, fresh attempt
                break
    except (OSError, ValueError) as error:  # every network error is an OSError; a malformed URL is a ValueError
        raise UserError(
            f"The download of {name!r} from {url} failed ({error}); check the network and run again, which continues "
            "where this stopped, or train on any local file with --text PATH."
        ) from error
    raise UserError(
        f"The file at {url} is not {name!r}: expected SHA-256 {SHAKESPEARE_SHA256}, got {digest}. "
        "Nothing was kept; run again, or train on any local file with --text PATH."
    )


def _fetch(url: str, part: Path, progress: bool) -> None:
    """Bring the rest of ``url`` into ``part``; what has arrived stays there when the connection breaks.

    When the server has no such rest, ``part`` is left as it was: its digest will tell whether it is already complete.

    Raises:
        OSError: the server cannot be reached, refuses, breaks off, or the disk is full.
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
            if response.status != 206:  # only a 206 is the rest that was asked for, anything else the whole file
                start = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=not progress)
            with open(part, "ab" if start else "wb") as file, bar:
                # read1 hands over whatever has arrived; read would wait for a full block and lose it when cut off.
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
    """The SHA-256 of a file in hexadecimal, or None where there is no file."""
    import hashlib

    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def _cache_folder() -> Path:
    if own := os.environ.get("MINIMOE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "minimoe"
    return Path.home() / ".cache" / "minimoe"


def _read(path: Path) -> str:
    """The text of one file, with ``\n`` line ends and no byte order mark; ``read_files`` says what it refuses."""
    if path.is_dir():
        raise UserError(f"The text {path} is a directory; give the path of a text file in it.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"The text {path} does not exist; check the path.") from None
    except OSError as error:
        raise UserError(f"The text {path} cannot be read ({error.strerror}); check its permissions.") from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise UserError(f"The text {str(path)!r} is no path ({error}); check the path.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The text {path} is not UTF-8: the byte at offset {error.start} is 0x{data[error.start]:02x}; save it as "
            "UTF-8 and try again."
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise UserError(f"The text {path} is empty; give a file with some text in it.")
    return text


def _read_data(name: str) -> str:
    # Installed from a wheel, the texts lie inside the package; in a checkout they lie beside it.
    package = Path(__file__).parent
    inside = package / "_data"
    return _read((inside if inside.is_dir() else package.parent / "data") / f"{name}.txt")


def _python_docs() -> str:
    """What ``help()`` knows about the language, in the order of the topics' titles."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python was installed without pydoc_data, which 'python-docs' is made of; use another corpus."
        ) from None
    # Some topics are one text under two titles. A text that came twice could be trained on and validated on.
    texts = dict.fromkeys(text.strip() for _, text in sorted(topics.items()))
    return "\n\n\n".join(texts) + "\n"


def _python_code() -> str:
    """The source of ``PYTHON_MODULES``, read from their files: nothing is imported, so nothing runs."""
    import tokenize

    library = Path(sysconfig.get_path("stdlib"))
    sources: list[str] = []
    for module in PYTHON_MODULES:
        path = library / f"{module}.py"
        if path.is_file():
            with tokenize.open(path) as file:  # which honours the encoding that a source file declares
                sources.append(file.read().strip())
    if not sources:
        raise UserError(
            f"This Python keeps no source files in {library}, which 'python-code' is made of; use another corpus."
        )
    return "\n\n\n".join(sources) + "\n"
