"""Files: old or new and never half, and no damage goes unnoticed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe import files
from minimoe.errors import UserError

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


def test_what_is_written_replaces_a_part_that_a_crash_left(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_bytes(b"half of something, and longer")
    files.write_atomically(tmp_path / "file", b"whole")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"whole")]
