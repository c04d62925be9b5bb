"""The safetensors format: what is read is what was written, and a file cannot claim more than it holds."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minimoe.core.errors import UserError
from minimoe.storage import safetensors_file


def file_of(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, whether it makes sense or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def claim(shape: list[Any], start: Any, stop: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def copied(tensor: safetensors_file.Stored) -> np.ndarray:
    place = np.full(tensor.shape, 7, np.float32)
    safetensors_file.copy(tensor, place)
    return place


def test_every_bfloat16_becomes_the_number_it_stands_for() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    sign = np.where(bits >> 15, -1.0, 1.0)
    exponent, fraction = (bits >> 7 & 0xFF).astype(int), (bits & 0x7F) / 128
    normal = (1 + fraction) * 2.0 ** (exponent - 127)
    value = sign * np.where(exponent == 0, fraction * 2.0**-126, normal)
    value[exponent == 255] = np.where(bits & 0x7F, np.nan, sign * np.inf)[exponent == 255]
    np.testing.assert_array_equal(safetensors_file.widen(bits), value)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tensor_that_the_library_wrote_is_copied_into_a_transposed_view(
    tmp_path: Path, rng: np.random.Generator, rows: int, dtype: type
) -> None:
    wanted = {"one": rng.standard_normal((rows, 3)).astype(dtype), "two": rng.standard_normal(rows).astype(dtype)}
    save_file(wanted, tmp_path / "file.safetensors", {"about": "metadata is no tensor"})
    found = safetensors_file.describe(tmp_path / "file.safetensors")
    assert set(found) == {"one", "two"}
    place = np.zeros((3, rows), np.float32)
    safetensors_file.copy(found["one"], place.T)
    np.testing.assert_array_equal(place, wanted["one"].T)
    np.testing.assert_array_equal(copied(found["two"]), wanted["two"])


def test_bfloat16_is_read_at_any_offset(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.15625], np.float32)
    data = b"".join(struct.pack("<f", v)[2:] for v in values)  # the first half, which stands last in little-endian
    path = file_of(tmp_path / "f", {"odd name": claim([3], 0, 6, "BF16")}, data)
    np.testing.assert_array_equal(copied(safetensors_file.describe(path)["odd name"]), values)


def test_the_library_reads_what_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {"a.weight": rng.standard_normal((4, 3)).astype(np.float32).T, "é": np.arange(5, dtype=np.float64)}
    safetensors_file.write(tmp_path / "file", tensors)
    with safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 8 == 0, "numbers lie at multiples of 8"
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], values)


def test_a_file_is_whole_when_it_is_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_size))
    safetensors_file.write(tmp_path / "file", {"a": np.ones(5, np.float32)})
    assert forced == [(tmp_path / "file").stat().st_size]


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut short|not a safetensors file|at byte"):
            safetensors_file.describe(tmp_path / "cut")
    (tmp_path / "long").write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="1 bytes after its last tensor"):
        safetensors_file.describe(tmp_path / "long")


TWICE = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
NONSENSE = {
    "a header that is no object": ([1], b"", "header is a list"),
    "a header that is not JSON": (b"{oops", b"", "not JSON"),
    "a header of deep brackets": (b"[" * 100_000, b"", "not JSON"),
    "a claim that is no object": ({"x": 3}, b"", "tensor x"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", "tensor x"),
    "a negative size": ({"x": claim([-1, -1], 0, 4)}, b"1234", "tensor x"),
    "a size that is no whole number": ({"x": claim([1.0], 0, 4)}, b"1234", "tensor x"),
    "a size that is true": ({"x": claim([True], 0, 4)}, b"1234", "tensor x"),
    "a hundred axes": ({"x": claim([1] * 100, 0, 4)}, b"1234", "tensor x"),
    "offsets the wrong way round": ({"x": claim([1], 4, 0)}, b"1234", "tensor x"),
    "whole numbers": ({"x": claim([1], 0, 8, "I64")}, b"12345678", "tensor x as I64"),
    "more bytes than the shape takes": ({"x": claim([1], 0, 8)}, b"12345678", "8 bytes"),
    "an enormous shape": ({"x": claim([2**40, 2**40], 0, 4)}, b"1234", "tensor x"),
    "an enormous shape, with enormous offsets": ({"x": claim([2**40], 0, 2**42)}, b"1234", "cut short"),
    "a size of 4000 digits": ({"x": claim([10**4000, 10**4000], 0, 4)}, b"1234", "tensor x"),
    "an offset of 4000 digits": ({"x": claim([1], 0, 10**4000)}, b"1234", "tensor x"),
    "two tensors in one place": ({"x": claim([1], 0, 4), "y": claim([1], 0, 4)}, b"1234", "tensor y"),
    "an overlap and a hole of its size": (
        {"x": claim([2], 0, 8), "y": claim([2], 4, 12), "z": claim([1], 16, 20)}, b"12345678901234567890", "tensor y"
    ),
    "an overlap at the end and a hole at the beginning": (
        {"x": claim([2], 4, 12), "y": claim([1], 8, 12)}, b"123456789012", "tensor x"
    ),
    "a hole": ({"x": claim([1], 0, 4), "y": claim([1], 8, 12)}, b"123456789012", "tensor y"),
    "a name twice": (b'{"x": %b, "x": %b}' % (TWICE, TWICE), b"12345678", "4 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_a_header_that_makes_no_sense_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    header, data, words = NONSENSE[case]
    with pytest.raises(UserError, match=words) as error:
        safetensors_file.describe(file_of(tmp_path / "file", header, data))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_tensors_that_are_left_out_may_be_of_any_type_but_must_have_a_place(tmp_path: Path) -> None:
    header = {"whole": claim([1], 0, 8, "I64"), "none": claim([0], 8, 8), "x": claim([1], 8, 12)}
    path = file_of(tmp_path / "file", header, b"123456789012")
    assert list(safetensors_file.describe(path, {"x", "none", "ghost"})) == ["none", "x"]
    with pytest.raises(UserError, match="whole as I64"):
        safetensors_file.describe(path)
    with pytest.raises(UserError, match="1 bytes after"):
        safetensors_file.describe(file_of(path, header, b"1234567890123"), {"x"})
    with pytest.raises(UserError, match="tensor none at byte"):
        safetensors_file.describe(file_of(path, header | {"whole": claim([1], 0, 7, "I64")}, b"123456789012"), {"x"})


def test_equal_means_equal_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32)
    values[0] = np.nan, 0.0
    save_file({"x": values}, tmp_path / "file")
    stored = safetensors_file.describe(tmp_path / "file")["x"]
    assert safetensors_file.equals(stored, np.asfortranarray(values))
    for place in ((0, 1), (299, 1)):
        other = values.copy()
        other[place] = -other[place]
        assert not safetensors_file.equals(stored, other)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written"):
        safetensors_file.write(tmp_path / "file", {})
    assert not (tmp_path / "elsewhere").exists()


def test_a_claim_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(UserError, match="longer than the file"):
        safetensors_file.describe(path)
    with pytest.raises(UserError, match="cut short"):
        safetensors_file.describe(file_of(path, {"x": claim([2**40], 0, 2**42)}))
    with path.open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # a hole, which takes no room on the disk
    with pytest.raises(UserError, match="its header has 1,000,000,000 bytes"):
        safetensors_file.describe(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["missing", ""])
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        safetensors_file.describe(tmp_path / name)


def test_a_folder_that_does_not_exist_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        safetensors_file.write(tmp_path / "no" / "file", {})


@given(place=st.integers(0, 140), byte=st.integers(0, 255))
def test_any_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "file"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}, path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    try:
        found = safetensors_file.describe(path)
    except UserError:
        return
    for tensor in found.values():
        copied(tensor)
