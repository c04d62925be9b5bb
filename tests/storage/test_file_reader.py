"""Reading while a model runs: every byte, or one sentence about what happened to the file."""

import os
from pathlib import Path
from typing import Any

import mixtral_folders
import numpy as np
import pytest

from minimoe.core.errors import UserError
from minimoe.storage import encoded
from minimoe.storage.encoded import Encoded
from minimoe.storage.file_reader import FileReader


@pytest.fixture
def tensor(tmp_path: Path) -> Encoded:
    of: Any = encoded.locate(mixtral_folders.write(tmp_path / "m")).leaves["blocks[1].moe.experts.w_up"]
    return of[2]


def read(reader: FileReader, tensor: Encoded) -> np.ndarray:
    content = np.full(tensor.size, 99, np.uint8)
    reader.read(tensor, content)
    return encoded.decode(tensor, content)


def path_of(tensor: Encoded) -> Path:
    return tensor.arrays[""].path


@pytest.mark.parametrize("forget", [False, True])
def test_what_is_read_is_what_is_in_the_file(tensor: Encoded, forget: bool) -> None:
    reader = FileReader(forget)
    for _ in range(2):
        np.testing.assert_array_equal(read(reader, tensor), encoded.read(tensor))
    assert len(reader.files) == 1


def test_a_short_read_is_followed_by_another(tensor: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give fewer bytes than were asked for, as it does above 2 GB."""
    reader = FileReader()
    whole = read(reader, tensor)
    file, seen = reader.files[path_of(tensor)]

    class Hesitant:
        closed = False
        fileno, seek, close = file.fileno, file.seek, file.close

        def readinto(self, place: Any) -> Any:
            return file.readinto(place[:1000])  # type: ignore[attr-defined]

    hesitant: Any = Hesitant()
    reader.files[path_of(tensor)] = hesitant, seen
    np.testing.assert_array_equal(read(reader, tensor), whole)


def test_a_file_that_is_cut_short_is_named(tensor: Encoded) -> None:
    reader = FileReader()
    read(reader, tensor)
    os.truncate(path_of(tensor), 2000)
    with pytest.raises(UserError, match=r"model.safetensors changed while the model was running \(2,000 bytes"):
        read(reader, tensor)


def test_a_file_that_ends_too_early_is_named(tensor: Encoded) -> None:
    os.truncate(path_of(tensor), tensor.arrays[""].start + 10)
    with pytest.raises(UserError, match=r"ends at byte \d+, expected at least \d+: it was cut short"):
        read(FileReader(), tensor)


def test_another_content_of_the_same_size_is_noticed(tensor: Encoded) -> None:
    reader = FileReader()
    read(reader, tensor)
    path = path_of(tensor)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="changed while the model was running"):
        read(reader, tensor)


def test_a_file_that_changes_during_a_read_is_noticed(tensor: Encoded) -> None:
    reader = FileReader()
    read(reader, tensor)
    file, seen = reader.files[path_of(tensor)]

    class Meddling:
        closed = False
        fileno, seek, close = file.fileno, file.seek, file.close

        def readinto(self, place: Any) -> Any:
            os.utime(path_of(tensor), ns=(1, 1))
            return file.readinto(place)  # type: ignore[attr-defined]

    meddling: Any = Meddling()
    reader.files[path_of(tensor)] = meddling, seen
    with pytest.raises(UserError, match="changed while the model was running"):
        read(reader, tensor)


def test_an_open_file_outlives_its_name_and_its_replacement(tensor: Encoded) -> None:
    """Who renames a new file over the old one does not disturb a model that has the old one open."""
    reader = FileReader()
    whole = read(reader, tensor)
    path = path_of(tensor)
    (path.parent / "new").write_bytes(bytes(path.stat().st_size))
    (path.parent / "new").replace(path)
    np.testing.assert_array_equal(read(reader, tensor), whole)
    reader.close()
    with pytest.raises(UserError, match="changed while the model was running"):
        read(reader, tensor)


def test_a_file_that_cannot_be_opened_is_named(tensor: Encoded) -> None:
    path_of(tensor).unlink()
    with pytest.raises(UserError, match=r"model.safetensors cannot be read \(No such file"):
        read(FileReader(), tensor)
