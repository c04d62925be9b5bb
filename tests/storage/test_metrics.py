"""metrics.jsonl: a crash costs the line it cut short, and any other damage is named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from minimoe.core.errors import UserError
from minimoe.storage import metrics


def row(step: int, **changes: Any) -> metrics.Row:
    """A whole row, of one layer with two experts."""
    numbers: dict[str, Any] = dict.fromkeys(metrics.NUMBERS, 4 / step) | {name: [0.0] for name in metrics.BY_LAYER}
    auxiliary = {name: [0.5] for name in metrics.AUXILIARY}
    others = {"tokens": 8 * step, "load": [[0.25, 0.75]], "auxiliary": auxiliary, "val_loss": 1e-9}
    return {"step": step} | numbers | others | changes


ROWS = [row(step) for step in range(1, 7)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metrics.write(tmp_path, ROWS[:3])
    for row in ROWS[3:]:
        metrics.append(tmp_path, row)
    return tmp_path


def lines(folder: Path) -> list[bytes]:
    return (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def test_what_was_written_is_read_up_to_a_step(folder: Path) -> None:
    assert metrics.read(folder) == ROWS
    assert metrics.read(folder, up_to=4) == ROWS[:4]
    assert metrics.read(folder, up_to=0) == []
    assert metrics.read(folder / "nowhere", up_to=6) == []


def test_any_program_can_read_a_line(folder: Path) -> None:
    for line, row in zip(lines(folder), ROWS, strict=True):
        found = json.loads(line)
        assert found.pop("crc32") == metrics._checksum(row)
        assert found == row


def test_a_line_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    metrics.append(tmp_path, {"step": 1})
    metrics.append(tmp_path, {"step": 2})
    one, two = lines(tmp_path)
    assert one.startswith(b'{"step": 1, "crc32": "') and two.endswith(b'"}\n')


OTHER_ROWS: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": None},
    "a word": {"loss": "abc"},
    "more than a float holds": {"loss": 10**400},
    "a negative count": {"tokens": -1},
    "not a count": {"tokens": 56.0},
    "true": {"loss": True},
    "not finite": {"gradient_norm": float("nan")},
    "an evaluation without a number": {"val_loss": [1.0]},
    "no layer": {"load": []},
    "layers of two widths": {"load": [[0.5, 0.5], [1.0]]},
    "more layers than before": {
        "load": [[0.5, 0.5]] * 2,
        **{name: [0.0, 0.0] for name in metrics.BY_LAYER},
        "auxiliary": {name: [0.5, 0.5] for name in metrics.AUXILIARY},
    },
    "more experts than before": {"load": [[0.5, 0.25, 0.25]]},
    "another number of layers": {"router_entropy": [1.0, 1.0]},
    "an auxiliary loss that is not there": {"auxiliary": {"balance": [1.0]}},
    "a list of auxiliary losses": {"auxiliary": [1.0]},
}


@pytest.mark.parametrize("case", OTHER_ROWS)
def test_a_row_with_a_right_checksum_and_other_fields_is_refused(folder: Path, case: str) -> None:
    metrics.append(folder, row(7, **OTHER_ROWS[case]))
    with pytest.raises(UserError, match=r"metrics\.jsonl was written by another version or by hand: line 7 has"):
        metrics.read(folder)


def test_a_row_may_have_more_fields_and_no_evaluation(folder: Path) -> None:
    new = row(7, new=1)
    del new["val_loss"]
    metrics.append(folder, new)
    assert metrics.read(folder)[-1] == new


def test_a_last_line_that_was_cut_short_anywhere_is_left_out(folder: Path) -> None:
    whole = b"".join(lines(folder))
    for missing in range(1, len(lines(folder)[-1]) + 1):
        (folder / "metrics.jsonl").write_bytes(whole[:-missing])
        assert metrics.read(folder) == ROWS[: 6 if missing == 1 else 5]


def test_a_flipped_bit_in_any_byte_is_noticed_or_changes_nothing(folder: Path) -> None:
    whole = b"".join(lines(folder))
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        (folder / "metrics.jsonl").write_bytes(spoiled)
        try:
            found = metrics.read(folder)
        except UserError as error:
            assert "is damaged at line" in str(error)
        else:
            assert found == (ROWS if place < len(whole) - 1 else ROWS[:5])


def test_a_line_that_is_missing_or_stands_twice_is_named(folder: Path) -> None:
    one, two, three, *rest = lines(folder)
    for wrong, number in (([one, three, *rest], 2), ([one, two, two, three, *rest], 3), ([two, one, three, *rest], 2)):
        (folder / "metrics.jsonl").write_bytes(b"".join(wrong))
        with pytest.raises(UserError, match=f"is damaged at line {number}: restore it, or remove it"):
            metrics.read(folder)


@pytest.mark.parametrize("line", [b"[1]", b"7", b"null", b"{}", b"\xff", b"[" * 100_000, b"9" * 5000, b"", b"\0" * 99])
def test_a_line_that_is_no_row_is_named(folder: Path, line: bytes) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match="is damaged at line 7"):
        metrics.read(folder)


def test_lines_that_end_before_the_checkpoint_are_noticed(folder: Path) -> None:
    with pytest.raises(UserError, match="ends at step 6, but the checkpoint is at step 8: restore it, or remove"):
        metrics.read(folder, up_to=8)
    for spoiled in (b"", b"{"):  # emptied, and half a line, which a crash may leave
        (folder / "metrics.jsonl").write_bytes(spoiled)
        with pytest.raises(UserError, match="ends at step 0"):
            metrics.read(folder, up_to=8)


def test_metrics_that_were_removed_are_missed_neither_at_once_nor_later(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    metrics.write(folder, metrics.read(folder, up_to=6))
    metrics.sync(folder)
    assert metrics.read(folder, up_to=6) == []


def test_what_was_appended_is_on_the_disk_before_a_checkpoint_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: forced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("only Linux says which file a descriptor is")
    metrics.sync(folder)
    assert forced == [str(folder / "metrics.jsonl")]


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read"):
        metrics.read(tmp_path)
    for write in (lambda: metrics.append(tmp_path, ROWS[0]), lambda: metrics.sync(tmp_path)):
        with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
            write()
