"""Corpora: what load and read_files give, and where split cuts."""

import importlib.util
import lzma
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.text import corpus, shakespeare
from minimoe.text.corpus import Corpus, load, read_files, split

DATA = Path(__file__).parents[2] / "data"


# The data files themselves


@pytest.mark.parametrize(("name", "least"), [("fables", 60_000), ("dialogues", 25_000), ("contes", 25_000)])
def test_prose_is_long_enough_and_does_not_repeat_itself(name: str, least: int) -> None:
    data = (DATA / f"{name}.txt").read_bytes()
    text = data.decode("utf-8")
    assert len(data) >= least
    assert text.endswith("\n")
    assert "\r" not in text
    # A text made of templates compresses far better than prose: every repetition is almost free.
    assert 8 * len(lzma.compress(data, preset=9)) / len(text) >= 2.0


@pytest.fixture(scope="module")
def make_sums() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sums", DATA / "make_sums.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sums_are_what_their_generator_writes(make_sums: ModuleType) -> None:
    data = (DATA / "sums.txt").read_bytes()
    assert len(data) >= 40_000
    assert data == make_sums.make().encode("ascii")
    assert data.endswith(b"\n")
    assert data != make_sums.make(seed=make_sums.SEED + 1).encode("ascii")


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_every_sum_is_right(make_sums: ModuleType, shift: int) -> None:
    text = make_sums.make(seed=make_sums.SEED + shift)
    side = r"\b\d+(?: +[-+x/] +\d+)*"
    # "[ ] - 5 = 20" has no left side that can be worked out: skip its numbers.
    chains = re.findall(rf"(?<!\] [-+] )({side}(?: +[=<>] +{side})+)", text)
    wrong, links = [], 0
    for chain in chains:
        parts = re.split(r" +([=<>]) +", chain)
        for left, sign, right in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
            a, b = (eval(part.replace("x", "*")) for part in (left, right))
            links += 1
            if not {"=": a == b, "<": a < b, ">": a > b}[sign]:
                wrong.append(chain)
    columns = re.findall(r"^ +(\d+)\n\+ +(\d+)\n-+\n +(\d+)$", text, flags=re.MULTILINE)
    wrong += [f"{a} + {b} = {total}" for a, b, total in columns if int(a) + int(b) != int(total)]
    assert wrong == []
    assert links > 1000
    assert len(columns) > 20


def test_every_exercise_appears(make_sums: ModuleType) -> None:
    text = make_sums.make()
    layouts = ["carry 1", "carried\n", "borrow a ten", "table of", "remainder", "True.", "False,", "fewer", "Half of"]
    layouts += ["Count on", "Count back", "The box holds", "o'clock", "Now there are", "left over", "the change is"]
    assert [layout for layout in layouts if layout not in text] == []


# Built-in corpora


def test_data_is_the_four_texts_in_order() -> None:
    data = load("data")
    assert data.name == "data"
    assert list(data.documents) == ["fables", "dialogues", "contes", "sums"]
    for name, text in data.documents.items():
        assert load(name) == Corpus(name, {name: text})
        assert text == (DATA / f"{name}.txt").read_text(encoding="utf-8")
    assert data.text == "".join(data.documents.values())


def test_python_docs_hold_every_topic() -> None:
    from pydoc_data.topics import topics

    text = load("python-docs").documents["python-docs"]
    assert len(text) > 300_000
    assert all(topic.strip() in text for topic in topics.values())


def test_python_docs_are_in_order_and_drop_a_text_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = ModuleType("pydoc_data.topics")
    shuffled.topics = {"b": "loops\n", "a": "\nnames", "c": "names"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", shuffled)
    assert load("python-docs").text == "names\n\n\nloops\n"


def test_python_code_is_about_a_megabyte_that_compiles_without_running() -> None:
    assert sorted(corpus.PYTHON_MODULES) == list(corpus.PYTHON_MODULES)
    text = load("python-code").documents["python-code"]
    assert 700_000 < len(text) < 1_600_000
    assert "def heappush(" in text
    assert text.index("class ArgumentParser") < text.index("def heappush(") < text.index("class WeakValueDictionary")
    assert len(set(text)) < 150  # a module that needs an alphabet of its own would make every char model larger


def test_python_code_skips_modules_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "heapq.py").write_bytes("# -*- coding: latin-1 -*-\n# François\n".encode("latin-1"))
    (tmp_path / "copy.py").write_text("import nothing_that_exists\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert load("python-code").text == "import nothing_that_exists\n\n\n# -*- coding: latin-1 -*-\n# François\n"
    (tmp_path / "heapq.py").unlink()
    (tmp_path / "copy.py").unlink()
    with pytest.raises(UserError, match="no source files"):
        load("python-code")


def test_python_docs_missing_from_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="without pydoc_data"):
        load("python-docs")


@pytest.mark.parametrize("documents", [{1: "text"}, {"a": b"bytes"}, {"a": None}])
def test_documents_are_texts_by_names(documents: dict[str, str]) -> None:
    with pytest.raises(UserError, match="give both the name and the text as strings"):
        Corpus("mine", documents)


def test_an_unknown_name_lists_the_names_and_suggests_one() -> None:
    with pytest.raises(UserError) as caught:
        load("shakespear")
    message = str(caught.value)
    assert all(name in message for name in corpus.NAMES)
    assert "'shakespear' is unknown" in message
    assert message.endswith("Did you mean 'shakespeare'?")
    with pytest.raises(UserError, match="unknown") as caught:
        load("???")
    assert "Did you mean" not in str(caught.value)


def test_every_name_but_shakespeare_loads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "download", lambda: pytest.fail("no corpus but shakespeare may download"))
    assert [load(name).name for name in corpus.NAMES if name != "shakespeare"] == list(corpus.NAMES[:-1])


def test_an_installed_package_carries_its_own_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "minimoe" / "_data"
    inside.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sums.txt").write_text("somebody else's")
    (inside / "sums.txt").write_text("1 + 1 = 2\n")
    monkeypatch.setattr(corpus, "__file__", str(tmp_path / "minimoe" / "text" / "corpus.py"))
    assert load("sums").text == "1 + 1 = 2\n"
    with pytest.raises(UserError, match=r"fables\.txt does not exist"):
        load("fables")


def test_a_corpus_has_documents_and_they_have_text() -> None:
    with pytest.raises(UserError, match="'nothing' has no documents"):
        Corpus("nothing", {})
    with pytest.raises(UserError, match="'b' of the corpus 'hollow' is empty"):
        Corpus("hollow", {"a": "text", "b": ""})


def test_importing_the_module_imports_nothing_slow() -> None:
    # NumPy brings some of these modules along by itself: those are not ours to avoid.
    code = "import sys, numpy; before = set(sys.modules); import minimoe.text.corpus; " + (
        "print([m for m in ('urllib.request', 'http.client', 'ssl', 'tqdm') if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=DATA.parent, check=True)
    assert done.stdout.strip() == "[]"


# Files


def test_a_file_is_a_document_named_after_it(tmp_path: Path) -> None:
    (tmp_path / "été.txt").write_text("Il fait beau.\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("# Notes\n")
    read = read_files([tmp_path / "été.txt", str(tmp_path / "notes.md")])
    paths = (tmp_path / "été.txt", tmp_path / "notes.md")
    assert read == Corpus("été+notes", {"été": "Il fait beau.\n", "notes": "# Notes\n"}, paths)


def test_one_path_need_not_be_in_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    assert read_files(str(path)) == read_files(path) == Corpus("a", {"a": "a"}, (path,))


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    paths = [tmp_path / p for p in ("x/a.txt", "y/a.txt", "z/a-2.txt", "x/a.md")]
    for n, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(n))
    assert read_files(paths).documents == {"a": "0", "a-2": "1", "a-2-2": "2", "a-3": "3"}


def test_line_ends_and_byte_order_mark_are_normalised(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\xef\xbb\xbf")
    assert read_files([path]).text == "one\ntwo\n\ufeff"  # only a leading mark is a byte order mark


def test_files_that_cannot_be_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt does not exist"):
        read_files([tmp_path / "gone.txt"])
    with pytest.raises(UserError, match="is a directory"):
        read_files([tmp_path])
    with pytest.raises(UserError, match="at least one path"):
        read_files([])
    for blank in (b"", b"\xef\xbb\xbf", b" \n"):
        (tmp_path / "blank.txt").write_bytes(blank)
        with pytest.raises(UserError, match=r"blank\.txt is empty"):
            read_files([tmp_path / "blank.txt"])
    (tmp_path / "latin.txt").write_bytes("\r\n\r\ncafé".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: the byte at offset 7 is 0xe9"):
        read_files([tmp_path / "latin.txt"])


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"secret\.txt cannot be read \(Permission denied\)"):
        read_files([tmp_path / "secret.txt"])


# Splitting


def test_shakespeare_is_split_as_everybody_splits_it() -> None:
    path = os.environ.get("MINIMOE_TEST_SHAKESPEARE")
    text = Path(path).read_text(encoding="utf-8") if path else "x" * 1_115_394
    train, validation = split([np.zeros(len(text), dtype=np.int32)])
    assert (len(train[0]), len(validation[0])) == (1_003_854, 111_540)


def test_every_document_is_split_on_its_own() -> None:
    documents = [np.arange(10, dtype=np.int32), np.arange(100, 125, dtype=np.int32)]
    train, validation = split(documents)
    assert [part.tolist() for part in train] == [list(range(9)), list(range(100, 122))]
    assert [part.tolist() for part in validation] == [[9], [122, 123, 124]]
    assert all(np.shares_memory(a, b) for a, b in zip(train, documents, strict=True))
    assert train[0].dtype == np.int32


@given(st.lists(st.integers(2, 500), min_size=1, max_size=5), st.floats(0.01, 0.5))
def test_split_loses_nothing_and_leaves_no_part_empty(lengths: list[int], fraction: float) -> None:
    documents = [np.arange(length, dtype=np.int32) for length in lengths]
    train, validation = split(documents, fraction)
    for ids, first, last in zip(documents, train, validation, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, last]), ids)
        assert len(first) > 0
        assert abs(len(last) - fraction * len(ids)) < 1 + 1e-9
        assert len(last) > 0


def test_split_without_validation() -> None:
    train, validation = split([np.arange(7)], validation_fraction=0)
    assert (len(train[0]), len(validation[0])) == (7, 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 10, float("nan")])
def test_split_refuses_fractions_that_are_none(fraction: float) -> None:
    with pytest.raises(UserError, match=f"validation_fraction is {fraction}"):
        split([np.arange(100)], fraction)


def test_split_refuses_a_fraction_that_validates_on_nothing() -> None:
    with pytest.raises(UserError, match="Document 1 has 100 tokens, too few"):
        split([np.arange(100)], 1e-18)


@pytest.mark.parametrize("length", [0, 1])
def test_split_refuses_documents_that_are_too_short(length: int) -> None:
    with pytest.raises(UserError, match=f"Document 2 has {length} tokens, too few"):
        split([np.arange(10), np.arange(length)])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_has_the_same_lines_whatever_system_wrote_it(tmp_path: Path, end: str) -> None:
    (tmp_path / "lines.txt").write_bytes(f"\ufeffone{end}two{end}{end}three{end}".encode())
    assert read_files([tmp_path / "lines.txt"]).text == "one\ntwo\n\nthree\n"
