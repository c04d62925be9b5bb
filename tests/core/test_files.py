"""Files: old or new and never half, and no damage goes unnoticed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.core import files
from minimoe.core.errors import UserError

# Tensors


@pytest.fixture
def tensors_file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "blocks[0].b": np.ones(3), "empty": np.zeros((0, 2))}
    files.write_tensors(path, tensors, {"progress": json.dumps({"step": 25})})
    return path


def test_tensors_and_metadata_come_back(tensors_file: Path) -> None:
    tensors, metadata = files.read_tensors(tensors_file)
    assert {name: (str(values.dtype), values.shape) for name, values in tensors.items()} == {
        "a": ("float32", (2, 3)),
        "blocks[0].b": ("float64", (3,)),
        "empty": ("float64", (0, 2)),
    }
    np.testing.assert_array_equal(tensors["a"], [[0, 1, 2], [3, 4, 5]])
    assert metadata == {"progress": '{"step": 25}'}


def test_a_flipped_bit_in_any_byte_is_noticed(tensors_file: Path) -> None:
    good = tensors_file.read_bytes()
    for place in range(len(good)):
        spoiled = bytearray(good)
        spoiled[place] ^= 1 << place % 8
        tensors_file.write_bytes(spoiled)
        with pytest.raises(UserError):
            files.read_tensors(tensors_file)


def test_a_file_cut_short_anywhere_is_noticed(tensors_file: Path) -> None:
    good = tensors_file.read_bytes()
    for length in range(len(good)):
        tensors_file.write_bytes(good[:length])
        with pytest.raises(UserError, match="cut short"):
            files.read_tensors(tensors_file)


STRANGE = {
    "a type that NumPy lacks": ({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, 4),
    "bfloat16": ({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, 4),
    "complex numbers": ({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, 8),
    "more than there is": ({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, 4),
    "nothing, enormously": ({"x": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, 0),
    "two in one place": ({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "xy"}, 4),
    "a hundred axes": ({"x": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, 4),
    "a negative size": ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
    "numbers as metadata": ({"__metadata__": {"sha256": 5}}, 0),
    "deep brackets": (b"[" * 100_000, 0),
    "an enormous header": (None, 0),
}


def strange_file(path: Path, header: Any, size: int) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = 2**62 if header is None else len(encoded)
    path.write_bytes(length.to_bytes(8, "little") + encoded + bytes(size))
    return path


@pytest.mark.parametrize("case", STRANGE)
def test_a_strangers_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    path = strange_file(tmp_path / "x.safetensors", *STRANGE[case])
    with pytest.raises(UserError) as error:
        files.read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell how much memory was taken")
def test_a_strangers_claims_take_no_memory(tmp_path: Path) -> None:
    paths = [strange_file(tmp_path / f"{i}.safetensors", *STRANGE[case]) for i, case in enumerate(STRANGE)]
    code = """
import contextlib, resource, sys
from pathlib import Path
from minimoe.core import files
def read(path):
    with contextlib.suppress(files.UserError):
        files.read_tensors(Path(path))
read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    read(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 16 * 2**20


# Writing


def disk_full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    with monkeypatch.context() as broken:
        broken.setattr(failing, disk_full)
        with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\): free space"):
            files.write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_is_forced_to_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut could leave the name with an empty file behind it."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("sync"), fsync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda self, other: (events.append("rename"), replace(self, other))[1])
    files.write_atomically(tmp_path / "file", b"content")
    assert events == ["sync", "rename", "sync"], "the file, its name, and the folder that holds the name"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only some people make links")
def test_a_link_in_a_strangers_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    for name in ("file", ".file.part"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_bytes() == b"mine"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_what_is_written_replaces_a_part_that_a_crash_left(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_bytes(b"half of something, and longer")
    files.write_atomically(tmp_path / "file", b"whole")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"whole")]
