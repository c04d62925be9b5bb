"""The comparison runs from end to end, and refuses to compare what is not the same."""

import re
import subprocess
import sys
from pathlib import Path

import compare
import numpy as np
import pytest
import rows
from rows import Plan

pytestmark = pytest.mark.torch

PLAN = Plan(compare.QUICK, 2, compare.QUICK, 2, threads=1, rounds=2, seconds=0.0)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(compare.__file__)), *arguments], capture_output=True, text=True, timeout=600
    )


def test_a_quick_run_measures_every_row() -> None:
    before = {path: path.read_text() for path in compare.HERE.glob("RESULTS*")}
    done = run("--quick", "--threads", "2")
    assert done.returncode == 0, done.stderr
    found = [re.split("[: ]", line)[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert list(dict.fromkeys(found)) == list(rows.ROWS)
    assert done.stdout.count("proved beforehand") == 2 * 2 + 2  # two twins in two rows; a decoder and the library
    assert {path: path.read_text() for path in compare.HERE.glob("RESULTS*")} == before, "a quick run is no result"


@pytest.mark.parametrize(("who", "work"), [("sorted compiled", "step"), ("cached compiled", "decode")])
def test_compiled_twins_compute_the_same(who: str, work: str) -> None:
    _, proofs = rows.take_turns({name: PLAN.task(name, work) for name in ("minimoe", who)}, PLAN)
    assert len(proofs) == 1


OURS = {"loss": np.array(2.0), "gradient of a": np.array([1.0, -4.0]), "gradient of b": np.array([0.5, 2.0])}


def test_what_is_nearly_the_same_is_told_relative_to_the_largest_entry() -> None:
    theirs = OURS | {"gradient of a": np.array([1.0, -4.0001])}
    assert rows.prove("loop", OURS, theirs) == "loop: loss to 0e+00, all 2 gradients to 2e-05"


@pytest.mark.parametrize(("changed", "words"), [(2.006, "3e-03"), (np.nan, "nan")])
def test_another_computation_is_not_compared(changed: float, words: str) -> None:
    theirs = OURS | {"gradient of b": np.array([0.5, changed])}
    with pytest.raises(SystemExit, match=f"loop: .* all 2 gradients to {words}: this is not the same computation"):
        rows.prove("loop", OURS, theirs)


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "gpu_problem", lambda: "There is no GPU here.")
    assert compare.main(["--device", "gpu"]) == 2
    assert capsys.readouterr().err == "compare: There is no GPU here.\n"


def test_the_command_that_is_told_holds_no_path_of_this_machine() -> None:
    assert compare.command(["--rounds", "5", "--keep", "/tmp/x"]) == "python tests/peers/compare.py --rounds 5"
    assert compare.command([]) == "python tests/peers/compare.py"


def test_ratios_are_of_medians_with_the_range_of_the_rounds() -> None:
    assert rows.ratio([4.0, 6.0, 50.0], [2.0, 2.0, 5.0]) == (3.0, "3.00× (2.00–10.00)")


def test_rows_that_were_kept_are_read_back(tmp_path: Path) -> None:
    known = {"toy": [rows.Row("work", "≥ 2×", "2.1×", True, [rows.Measured("a", "s", [1.0, 2.0])], ["proof"])]}
    assert rows.load(tmp_path / "none.json") == {}
    rows.save(tmp_path / "kept.json", known)
    assert rows.load(tmp_path / "kept.json") == known
