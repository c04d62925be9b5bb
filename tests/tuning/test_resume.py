"""Resuming a run of any kind: the right task is made again, or the run is refused."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import CORPUS, finished, lasting, train

from minimoe.core.errors import UserError
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import Tuning
from minimoe.training import run_report, trainer
from minimoe.tuning import resume, sft


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "write", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


def test_an_ordinary_run_goes_on(tmp_path: Path) -> None:
    train(tmp_path / "whole", steps=8)
    train(tmp_path / "run", steps=8, save_every=2)
    train(tmp_path / "cut", steps=0)
    resume.resume(tmp_path / "cut", corpus=CORPUS, changes={"steps": 6}, device="cpu", threads=1, progress=False)
    assert checkpoint.load_model(tmp_path / "cut").step == 6
    done = resume.resume(tmp_path / "run", corpus=CORPUS, device="cpu", threads=1, progress=False)
    assert done.finished and lasting(tmp_path / "run")["metrics"] == lasting(tmp_path / "whole")["metrics"]


def tuned(folder: Path, kind: str) -> Path:
    train(folder, steps=0)
    checkpoint.save_config(folder, checkpoint.load_config(folder)._replace(tuning=Tuning(kind, {})))
    return folder


def test_a_tuned_run_gets_its_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(trainer, "resume", lambda folder, **given: seen.append((folder, given)))
    folder = tuned(tmp_path / "run", sft.KIND)
    resume.resume(folder, changes={"steps": 3}, threads=2)
    ((where, given),) = seen
    assert where == folder and given["task"] is sft.task_of
    assert (given["changes"], given["threads"], given["corpus"]) == ({"steps": 3}, 2, None)
    resume.resume(finished())
    assert seen[1][1]["task"] is None


def test_what_it_does_not_know_or_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learns 'knitting', which this version does not know"):
        resume.resume(tuned(tmp_path / "other", "knitting"))
    with pytest.raises(UserError, match="reads no text"):
        resume.resume(tuned(tmp_path / "run", sft.KIND), corpus=CORPUS)
