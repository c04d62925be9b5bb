"""The texts to learn from: four small ones in the repository, Python's docs and code, Shakespeare, or your own files.

A corpus is a few named documents. Each document is a domain of its own, so that after training you can see which
experts prefer fables and which prefer sums:

    corpus = load("data")                                     fables, dialogues, contes, sums
    ids = [tokenizer.encode(text) for text in corpus.documents.values()]
    train, validation = split(ids)                            the last tenth of every document is never trained on

Only 'shakespeare' needs the network, and only once.
"""

import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from minimoe.core.errors import UserError
from minimoe.core.files import user_path
from minimoe.text import shakespeare

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

Scalar = TypeVar("Scalar", bound=np.generic)


class Source(NamedTuple):
    """Where a run's text came from: a built-in corpus or files, and the checksum of their tokens."""

    corpus: str  # the name
    paths: list[str]  # empty for a built-in corpus
    sha256: str

    @property
    def is_known(self) -> bool:
        """False for a model that was trained elsewhere and only tuned here: its source is ``UNKNOWN``."""
        return bool(self.corpus or self.paths)


UNKNOWN = Source("", [], "")
"""In the place of the text of a model that was trained elsewhere."""


@dataclass(frozen=True, repr=False)
class Corpus:
    """Named documents, each of which is one domain.

    Attributes:
        name: what the corpus is called in metrics and checkpoints.
        documents: document name → text, in a fixed order.
        paths: the files that the documents came from; none for a built-in corpus.

    Raises:
        UserError: there is no document, or one of them is empty or not text.
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
                    f"The document {document!r:.40} of the corpus {self.name!r} is {text!r:.40}; give "
                    "both the name and the text as strings."
                )
            if not text:
                raise UserError(f"The document {document!r} of the corpus {self.name!r} is empty; give it a text.")

    def __repr__(self) -> str:
        sizes = [f"{name} ({len(text):,} characters)" for name, text in self.documents.items()]
        more = len(sizes) - 8
        return f"Corpus({self.name!r:.80}: {', '.join(sizes[:8])}{f' and {more} more' if more > 0 else ''})"

    @property
    def text(self) -> str:
        """All documents joined; a char tokenizer is built from this text."""
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
        return Corpus(name, {name: _read(shakespeare.download())})

    from difflib import get_close_matches

    close = get_close_matches(name, NAMES, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"The corpus {name!r} is unknown; use one of {', '.join(NAMES)}, or --text PATH for a file.{meant}")


def read_files(paths: Iterable[str | Path] | str | Path) -> Corpus:
    """A corpus of text files: one document per file, named after the file without its extension.

    The line ends of Windows and of old Macs become ``\\n``, and a byte order mark is dropped. Documents that would
    share a name are numbered: notes, notes-2.

    Raises:
        UserError: no path is given, or a file is missing, a directory, unreadable, empty or not UTF-8.
    """
    documents: dict[str, str] = {}
    files = [user_path(path).absolute() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in files:
        numbered = (path.stem if n == 1 else f"{path.stem}-{n}" for n in count(1))
        documents[next(name for name in numbered if name not in documents)] = _read(path)
    if not documents:
        raise UserError("No text file is given; give at least one path.")
    return Corpus("+".join(documents), documents, tuple(files))


def split(
    ids_per_document: Sequence[npt.NDArray[Scalar]], validation_fraction: float = 0.1
) -> tuple[list[npt.NDArray[Scalar]], list[npt.NDArray[Scalar]]]:
    """Cut every document in two: its beginning for training, its last tenth for validation.

    Cutting each document, rather than their concatenation, keeps every domain in both parts. The parts are views:
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
                f"Document {number} has {len(ids)} tokens, too few to hold out a validation_fraction of "
                f"{validation_fraction}; give a longer text."
            )
        train.append(ids[:cut])
        validation.append(ids[cut:])
    return train, validation


def _read(path: Path) -> str:
    """The text of one file, with Unix line ends and no byte order mark; raises ``UserError`` like ``read_files``."""
    if path.is_dir():
        raise UserError(f"The text {path} is a directory; give the path of a text file in it.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"The text {path} does not exist; check the path.") from None
    except OSError as error:
        raise UserError(f"The text {path} cannot be read ({error.strerror}); check its permissions.") from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise UserError(f"The text {str(path)!r} is not a valid path ({error}); check the path.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The text {path} is not UTF-8: the byte at offset {error.start} is 0x{data[error.start]:02x}; save it as "
            "UTF-8 and try again."
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"The text {path} is empty; give a file with some text in it.")
    return text


def _read_data(name: str) -> str:
    # In an installed wheel the texts are inside the package; in a checkout they are next to it.
    package = Path(__file__).parent.parent
    inside = package / "_data"
    return _read((inside if inside.is_dir() else package.parent / "data") / f"{name}.txt")


def _python_docs() -> str:
    """The texts that ``help()`` shows about the language, in the order of their titles."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python was installed without pydoc_data, from which 'python-docs' is made; use another corpus."
        ) from None
    # Some topics have one text under two titles. A text that occurs twice could be in training and in validation.
    texts = dict.fromkeys(text.strip() for _, text in sorted(topics.items()))
    return "\n\n\n".join(texts) + "\n"


def _python_code() -> str:
    """The source of ``PYTHON_MODULES``, read from its files: nothing is imported, so nothing runs."""
    import tokenize

    library = Path(sysconfig.get_path("stdlib"))
    sources: list[str] = []
    for module in PYTHON_MODULES:
        path = library / f"{module}.py"
        if path.is_file():
            with tokenize.open(path) as file:  # in the encoding that the file declares
                sources.append(file.read().strip())
    if not sources:
        raise UserError(
            f"This Python has no source files in {library}, from which 'python-code' is made; use another corpus."
        )
    return "\n\n\n".join(sources) + "\n"
