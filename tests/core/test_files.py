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
from minimoe.core.arrays import placeholder
from minimoe.core.config import ModelConfig
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


# Files of a stranger, and paths of the user


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes and devices among its files")
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_what_is_not_a_regular_file_is_neither_read_nor_written_nor_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    for mode in ("rb", "ab"):
        with pytest.raises(OSError, match="not a regular file|it is a link"):
            files.open_regular(path, mode)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="not a regular file"):
        files.read_text(path)
    with pytest.raises(UserError, match="not a regular file"):
        files.read_tensors(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only some people make links")
def test_a_link_is_followed_to_be_read_and_never_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to("blob")
    (tmp_path / "dangling").symlink_to("created")
    with files.open_regular(tmp_path / "link", "rb") as file:
        assert file.read() == b"content"
    for name in ("link", "dangling"):
        with pytest.raises(OSError, match="it is a link"):
            files.open_regular(tmp_path / name, "ab")
    assert (tmp_path / "blob").read_bytes() == b"content"
    assert not (tmp_path / "created").exists()


def test_a_file_never_takes_the_number_of_a_closed_standard_stream(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from minimoe.core import files\n"
        "os.close(1)\n"
        "file = files.open_regular(Path(sys.argv[1]), 'ab')\n"
        "sys.exit(file.fileno())"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False).returncode > 2


def test_a_path_of_the_user_is_taken_as_a_shell_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert files.user_path("~/run") == files.user_path(Path("~/run")) == Path("/home/me/run")
    assert files.user_path("a/~/b") == Path("a/~/b")
    assert files.user_path("./~") == Path("~")


@pytest.mark.parametrize("wrong", ["", "a\0b", "\ud800", None, 7, b"bytes", ["a"]])
def test_what_no_path_can_be_is_refused_by_everything_that_takes_one(wrong: Any) -> None:
    from minimoe.draw import figure_parts, plots
    from minimoe.evaluate import suite
    from minimoe.layers import decoder
    from minimoe.storage import checkpoint, huggingface, metrics, open_model, quantized
    from minimoe.text import corpus, huggingface_tokenizer
    from minimoe.training import trainer

    uses: list[Any] = [
        files.user_path,
        files.chosen_place,
        checkpoint.load_config,
        checkpoint.load_model,
        metrics.read,
        open_model.load,
        open_model.shape,
        trainer.resume,
        trainer.train_dense_twin,
        suite.run,
        huggingface.load,
        huggingface.load_params,
        lambda path: huggingface.save(path, decoder.blank(ModelConfig(), placeholder), ModelConfig(noisy_gating=False)),
        huggingface_tokenizer.load,
        lambda path: quantized.write(path, "out", "nf4"),
        lambda path: quantized.write("run", path, "nf4"),
        lambda path: corpus.read_files([path]),
        lambda path: plots.save(figure_parts.figure(1, 1), path),
        lambda path: trainer.train("tiny", out=path) if path is not None else files.user_path(path),
    ]
    for use in uses:
        with pytest.raises(UserError, match="is not a path|is not a valid path"):
            use(wrong)


def test_a_new_folder_is_made_with_those_above_it_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    for _ in range(2):
        files.new_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_holds_something_is_not_new(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".file").write_text("mine")
    for refuse in (files.new_folder, files.refuse_occupied):
        with pytest.raises(UserError, match="hidden is not empty, and nothing in it is overwritten"):
            refuse(tmp_path / "hidden")
        with pytest.raises(UserError, match="cannot be written"):
            refuse(tmp_path / "hidden" / ".file")
    files.refuse_occupied(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
