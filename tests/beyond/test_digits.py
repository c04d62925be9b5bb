"""The digits: what is in the file, where it is looked for, and what is said when it is missing or damaged."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.beyond import digits
from minimoe.core.errors import UserError

FILE = Path(__file__).parents[2] / "data" / "digits.npz"


def test_the_file_holds_1797_images_of_ten_digits() -> None:
    found = digits.load()
    assert (found.images.shape, found.images.dtype) == ((1797, 8, 8), np.float32)
    assert (found.images.min(), found.images.max()) == (0, 1)
    assert (found.labels.shape, found.labels.dtype) == ((1797,), np.int64)
    assert np.bincount(found.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI counts


def test_an_image_stands_upright() -> None:
    """The first image is a 0: ink around paper. The second is a 1: a stroke from top to bottom."""
    zero, one = digits.load().images[:2]
    assert zero[3:5, 3:5].mean() < 0.1 < zero[1, 2:6].mean()
    assert one[:, 3:5].mean() > 0.7 > 0.2 > one[:, [0, 7]].mean()
    assert digits.load().labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_a_split_cuts_off_the_end_and_loses_nothing() -> None:
    whole = digits.load()
    train, held_out = digits.split(whole, 497)
    assert (len(train.images), len(held_out.images)) == (1300, 497)
    for one, parts in zip(whole, zip(train, held_out, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), one)


@pytest.mark.parametrize("held_out", [0, -1, 1797, 5000])
def test_a_split_leaves_no_part_empty(held_out: int) -> None:
    with pytest.raises(UserError, match=f"held_out {held_out} leaves one part of 1797 digits empty"):
        digits.split(digits.load(), held_out)


def test_an_installed_package_has_the_file_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "minimoe" / "_data"
    inside.mkdir(parents=True)
    np.savez(inside / "digits.npz", images=np.full((1, 8, 8), 16, np.uint8), labels=np.array([7], np.uint8))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits.npz").write_bytes(b"somebody else's")
    monkeypatch.setattr(digits, "__file__", str(tmp_path / "minimoe" / "beyond" / "digits.py"))
    assert digits.load().labels.tolist() == [7]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"digits\.npz do not exist: restore the file"):
        digits.load(tmp_path / "digits.npz")
    with pytest.raises(UserError, match="cannot be read"):
        digits.load(tmp_path)


@given(cut=st.integers(0, FILE.stat().st_size - 1))
def test_a_file_that_is_cut_short_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "digits.npz"
    path.write_bytes(FILE.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"digits\.npz (cannot be read|are damaged)"):
        digits.load(path)


@given(place=st.integers(0, FILE.stat().st_size - 1), bit=st.integers(0, 7))
def test_a_changed_bit_is_refused_or_changes_nothing(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(FILE.read_bytes())
    content[place] ^= 1 << bit
    path = tmp_path_factory.mktemp("changed") / "digits.npz"
    path.write_bytes(content)
    try:
        found = digits.load(path)
    except UserError:
        return
    for mine, theirs in zip(found, digits.load(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


IMAGES, LABELS = np.zeros((3, 8, 8), np.uint8), np.arange(3, dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES[:, :7], LABELS, r"images are uint8 \(3, 7, 8\)"),
        (IMAGES.astype(float), LABELS, "images are float64"),
        (IMAGES[:0], LABELS[:0], r"images are uint8 \(0, 8, 8\)"),
        (IMAGES, LABELS[:2], r"labels are uint8 \(2,\), expected integers \(3,\)"),
        (IMAGES, LABELS / 2, "labels are float64"),
        (IMAGES + 17, LABELS, "a pixel is 17, expected 0 to 16"),
        (IMAGES.astype(int) - 1, LABELS, "a pixel is -1"),
        (IMAGES, LABELS + 8, "a label is 10, expected 0 to 9"),
        (IMAGES, LABELS.astype(int) - 1, "a label is -1"),
        (IMAGES, np.array([{}, 1, 2]), "cannot be read"),
    ],
)
def test_other_contents_are_refused(images: np.ndarray, labels: np.ndarray, words: str, tmp_path: Path) -> None:
    path = tmp_path / "digits.npz"
    np.savez(path, images=images, labels=labels)
    with pytest.raises(UserError, match=words):
        digits.load(path)


def test_an_archive_without_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "digits.npz", images=IMAGES)
    with pytest.raises(UserError, match="labels"):
        digits.load(tmp_path / "digits.npz")
