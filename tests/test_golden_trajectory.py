"""The loss of every step is the one that was told before, and a run in two parts is the run in one."""

from pathlib import Path

import golden_trajectory
import numpy as np
import pytest
from golden_trajectory import DTYPES, losses, preset, told
from small_runs import lasting

from minimoe.training import run_report, trainer

TOLERANCE = {"float32": 1e-3, "float64": 1e-9}
"""Relative. With OpenBLAS's kernels for Haswell, SkylakeX, Prescott and Zen, NumPy with and without AVX-512 and AVX2,
and one thread or two, losses differed by at most 5e-7 in float32 and 9e-16 in float64: one unit in the last place. But
in float32 rounding may one day decide a near tie between two experts, and what follows from one such choice was seen to
reach 5e-4."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures and no waiting for the disk."""
    monkeypatch.setattr(run_report, "write", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_steps_of_training_go_as_they_went(tmp_path: Path, dtype: str) -> None:
    now = losses(preset(told(), dtype=dtype), tmp_path / "run")
    assert len(now["loss"]) == 50
    for name, expected in told()[dtype].items():
        advice = f"if {name} was meant to change, run {Path(golden_trajectory.__file__).name}"
        np.testing.assert_allclose(now[name], expected, rtol=TOLERANCE[dtype], err_msg=advice)


def test_a_learning_rate_wrong_by_one_in_a_million_is_noticed(tmp_path: Path) -> None:
    """The trajectory can fail."""
    settings = told()
    rate = settings["train"]["learning_rate"] * (1 + 1e-6)
    now = losses(preset(settings, dtype="float64", learning_rate=rate), tmp_path / "run")
    assert np.abs(np.subtract(now["loss"], settings["float64"]["loss"])).max() > 10 * TOLERANCE["float64"]


def test_twenty_steps_are_ten_then_ten_more_to_the_bit(tmp_path: Path) -> None:
    """The rate is constant here, as a decay depends on where it ends; with one, a run is cut in test_trainer."""
    constant = {"final_rate": 1.0, "steps": 20}
    losses(preset(told(), **constant), tmp_path / "whole")
    losses(preset(told(), **constant | {"steps": 10}), tmp_path / "parts")
    trainer.resume(tmp_path / "parts", changes={"steps": 20}, device="cpu", threads=1, progress=False)
    whole, parts = lasting(tmp_path / "whole"), lasting(tmp_path / "parts")
    # a run is evaluated where it ends, and this one ended twice
    assert "val_loss" in parts["metrics"][9]
    for name in set(parts["metrics"][9]) - set(whole["metrics"][9]):
        del parts["metrics"][9][name]
    assert parts == whole
