"""A file that is written tensor by tensor is the one that the safetensors library writes at once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.storage import tensor_stream

RNG = np.random.default_rng(0)
TENSORS: dict[str, Any] = {
    "b[10].w.codes": RNG.integers(256, size=(3, 5)).astype(np.uint8),
    "b[2].w": RNG.standard_normal(7).astype(np.float32),
    "b[2].w.step": RNG.standard_normal((2, 3)).astype(np.float16),
    "a.packed": RNG.integers(99, size=(2, 3)).astype(np.int32),
    "z": RNG.integers(-9, 9, size=(1, 3)).astype(np.int8),
    "double": RNG.standard_normal((3, 2)).T,
    "empty": np.empty((0, 4), np.float32),
}
METADATA = {"format": "np", "about": 'é "quoted"'}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def in_order() -> Iterator[tuple[str, Any]]:
    return ((name, TENSORS[name]) for name in sorted(TENSORS))


def parts(path: Path) -> tuple[dict[str, Any], list[str], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, [name for name in header if name != "__metadata__"], content[8 + length :]


def test_the_file_is_that_of_the_library(tmp_path: Path) -> None:
    """But for the order of the metadata, which the library leaves to chance: the same header, order and bytes."""
    tensor_stream.write(tmp_path / "ours", TENSORS, in_order(), METADATA)
    files.write_tensors(tmp_path / "theirs", TENSORS, METADATA)
    assert parts(tmp_path / "ours") == parts(tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs"}


def test_byte_for_byte_if_there_is_one_entry_of_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import save

    tensor_stream.write(tmp_path / "ours", TENSORS, in_order(), {})
    contiguous = {name: np.ascontiguousarray(values).reshape(values.shape) for name, values in TENSORS.items()}
    assert (tmp_path / "ours").read_bytes() == save(contiguous, {"sha256": files.checksum(TENSORS, {})})


def test_what_is_written_can_be_read_with_its_checksum(tmp_path: Path) -> None:
    tensor_stream.write(tmp_path / "ours", TENSORS, in_order(), METADATA)
    tensors, metadata = files.read_tensors(tmp_path / "ours")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], values)
    assert files.read_metadata(tmp_path / "ours").keys() == {*METADATA, "sha256"}


def test_if_a_tensor_cannot_be_made_no_file_is_left(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Any]]:
        yield "a.packed", TENSORS["a.packed"]
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        tensor_stream.write(tmp_path / "ours", TENSORS, broken(), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.* cannot be written"):
        tensor_stream.write(tmp_path / "nowhere" / "ours", TENSORS, in_order(), METADATA)


def test_another_shape_than_the_header_says_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a.packed"):
        tensor_stream.write(tmp_path / "ours", TENSORS, iter([("a.packed", TENSORS["a.packed"][:1])]), METADATA)
