"""Crashes, full disks and impatient people: none of them can ever cost more than the steps since the last save."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import small_runs
from small_runs import lasting, metrics, options, resume, train

from minimoe import checkpoint, report
from minimoe.errors import UserError

FEW = {"steps": 2, "save_every": 1, "evaluate_every": 0, "layers": 1}


class Crash(BaseException):
    """The process is gone: no handler in the package sees this, and nothing is cleaned up."""


class Disk:
    """Counts what is done to the disk and fails at one such operation: half of a write is done, of all else nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int, failure: BaseException) -> None:
        self.operations, self.fails_at, self.failure = 0, fails_at, failure
        self.renamed: list[str] = []
        path_open, replace = Path.open, Path.replace

        def open_counted(path: Path, mode: str = "r", **options: Any) -> Any:
            if mode not in ("wb", "ab"):
                return path_open(path, mode, **options)
            self.tick()
            return File(self, path_open(path, mode, buffering=0, **options))

        def replace_counted(path: Path, target: Path) -> None:
            self.tick()
            replace(path, target)
            self.renamed.append(target.name)

        monkeypatch.setattr(Path, "open", open_counted)
        monkeypatch.setattr(Path, "replace", replace_counted)
        monkeypatch.setattr(os, "fsync", lambda _: self.tick())

    def tick(self) -> None:
        self.operations += 1
        if self.operations == self.fails_at:
            raise self.failure


class File:
    """An open file on that disk."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        try:
            self.disk.tick()
        except BaseException:
            self.file.write(content[: len(content) // 2])
            raise
        self.file.write(content)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write", lambda *_: None)


@pytest.fixture
def whole(tmp_path: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a run ends with if nothing happens to it."""
    with monkeypatch.context() as quick:
        quick.setattr(os, "fsync", lambda _: None)
        train(tmp_path / "whole", **FEW)
    return lasting(tmp_path / "whole")


def go_on(folder: Path) -> None:
    """What a person does after a crash."""
    if (folder / "config.json").exists():
        resume(folder)
    else:
        train(folder, **FEW)


@pytest.mark.parametrize("failure", [Crash(), OSError(28, "No space left on device")], ids=["crash", "full disk"])
def test_a_failure_at_any_operation_on_the_disk_loses_nothing_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any], failure: BaseException
) -> None:
    for operation in count(1):
        folder = tmp_path / str(operation)
        with monkeypatch.context() as fault:
            disk = Disk(fault, operation, failure)
            try:
                train(folder, **FEW)
            except Crash:
                pass
            except UserError as error:
                assert re.search(r"cannot be written \(No space left on device\)", str(error))
                assert not list(folder.glob("*.part")) + list(folder.glob(".*.part"))
            fault.setattr(os, "fsync", lambda _: None)
            if disk.operations < operation:
                break  # nothing failed: the run had fewer operations
            saves = disk.renamed.count("resume.safetensors")
            found = checkpoint.load_progress(folder, checkpoint.load_config(folder)) if saves else None
            assert saves == 0 or (found is not None and found[2].step == saves - 1)
            if "model.safetensors" in disk.renamed:
                checkpoint.load_model(folder)
        with monkeypatch.context() as quick:
            quick.setattr(os, "fsync", lambda _: None)
            go_on(folder)
        assert lasting(folder) == whole, f"after a failure at operation {operation}"
    assert operation > 40, "config, three checkpoints and the metrics cannot be written with less"


def test_crashes_one_after_the_other_lose_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    chance = random.Random(7)
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        for crash in count():
            with monkeypatch.context() as fault:
                Disk(fault, chance.randint(5, 30), Crash())
                try:
                    go_on(folder)
                except Crash:
                    continue
            assert crash > 0
            break
        assert lasting(folder) == whole


# Real processes


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "pyramid.txt"
    path.write_text(small_runs.PYRAMID, encoding="utf-8")
    return path


def minimoe(*words: str | Path, code: str = "", **settings: Any) -> "subprocess.Popen[str]":
    """``minimoe`` in a process of its own, after some ``code`` that breaks something."""
    start = f"import sys\n{code}\nfrom minimoe.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", start, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **settings,
    )


NO_FIGURES = "from minimoe import report; report.write = lambda *_: None; report.closing = lambda *_: 'done'"
SLOW_STEPS = "from minimoe import report; import time; report.Bar.show = lambda *_: time.sleep(0.05)"


def reference(tmp_path: Path, text: Path, **settings: Any) -> dict[str, Any]:
    """What the run ends with if nothing happens to it."""
    from minimoe import corpus

    train(tmp_path / "whole", corpus.read_files(text), **settings)
    return lasting(tmp_path / "whole")


def wait_for_steps(folder: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    while len(metrics_so_far(folder)) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def metrics_so_far(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def killed_at(call: int) -> str:
    """Code after which the process kills itself as kill -9 does, when something is forced to disk the nth time."""
    return (
        "import os, signal, itertools; calls = itertools.count(1)\n"
        f"os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == {call} else None\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no kill -9")
@pytest.mark.parametrize("call", [9, 11])  # in the midst of model.safetensors and of resume.safetensors of step 1
def test_a_process_killed_while_it_saves_can_be_resumed(
    tmp_path: Path, no_figures: None, text: Path, call: int
) -> None:
    whole = reference(tmp_path, text, **FEW)
    out = tmp_path / "run"
    process = minimoe("train", "--text", text, "--out", out, *options(**FEW), "--threads", "1", code=killed_at(call))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(out.glob(".*.part")), "it did not die while it saved"
    assert len(metrics(out)) == 1
    assert resume(out, None).finished
    assert lasting(out) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGINT from outside")
def test_ctrl_c_saves_says_how_to_go_on_and_the_run_ends_with_the_same_bits(
    tmp_path: Path, no_figures: None, text: Path
) -> None:
    settings = {"steps": 60, "save_every": 0, "evaluate_every": 0}
    whole = reference(tmp_path, text, **settings)
    out = tmp_path / "run"
    process = minimoe("train", "--text", text, "--out", out, *options(**settings), "--threads", "1", code=SLOW_STEPS)
    wait_for_steps(out, 3, process)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate()
    assert process.returncode == 130, complained
    assert "Traceback" not in complained
    reached = len(metrics(out))
    assert 3 <= reached < 60
    assert f"Interrupted at step {reached}; all of it is saved" in said
    assert f"minimoe train --resume {out}" in said
    assert lasting(out)["progress"]["step"] == reached
    process = minimoe("train", "--resume", out, "--threads", "1", code=NO_FIGURES)
    said, complained = process.communicate()
    assert process.returncode == 0, complained
    assert f"continues at step {reached} of 60 steps" in said
    assert lasting(out) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
@pytest.mark.parametrize(
    ("limit", "file"),
    [(0, "metrics.jsonl"), (5000, "model.safetensors"), (20_000, "resume.safetensors"), (50_000, "png")],
)
def test_a_full_disk_is_said_in_one_sentence_and_the_last_checkpoint_stays(
    tmp_path: Path, text: Path, limit: int, file: str
) -> None:
    """The limit on the size of a file stands for a disk that is full while something is being written."""
    from minimoe import corpus

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        train(out, corpus.read_files(text), steps=2)
    before = (out / "resume.safetensors").read_bytes()
    limit = limit or max((out / name).stat().st_size for name in ("config.json", "metrics.jsonl")) + 50
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    _, complained = (process := minimoe("train", "--resume", out, "--steps", "6", code=limited)).communicate()
    assert process.returncode == 2, complained
    sentence = complained.splitlines()[-1]
    assert re.fullmatch(rf"minimoe: .*{file} cannot be written \(File too large\): free space.*", sentence)
    assert "Traceback" not in complained
    assert not list(out.glob(".*.part"))
    if file != "png":
        assert (out / "resume.safetensors").read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        assert resume(out, None).finished


LIFE = 20
"""Steps that a process may finish before it is killed."""


ON_DISK = ("open", "write", "fsync", "replace")


def killed_after(steps: int, calls: int, of: tuple[str, ...] = ()) -> str:
    """Code after which the process kills itself as kill -9 does: so many calls after so many of its steps.

    Calls of any function are counted, or only those ``of`` some built-in ones, so the moment does not depend on the
    machine's speed. A process that makes too few of them dies at the end of the next step.
    """
    return f"""
import os, signal, sys
from minimoe import cli, report

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def count_call(frame, event, argument):
    global left
    if event == "c_call" and argument.__name__ in {of} or event.endswith("call") and not {of}:
        left -= 1
        if left < 0:
            die()

def count_steps():
    global left
    for _ in range({steps}):
        yield
    left = {calls}
    sys.setprofile(count_call)
    yield
    die()

steps = count_steps()
next(steps)
report.Bar.show = lambda *_: next(steps)
"""


def drawn_life(chance: random.Random) -> str:
    """How long a process lives: it dies as it starts, in the midst of a step, or while it writes files."""
    match chance.randrange(4):
        case 0:
            return killed_after(0, chance.randrange(120_000))  # the first step begins after some 100,000
        case 1:
            return killed_after(chance.randint(1, LIFE), chance.randrange(8000))  # a step takes some 8,000
        case _:
            return killed_after(chance.randint(1, LIFE), chance.randrange(12), of=ON_DISK)  # of which 14 are these


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no kill -9")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_killed_at_random_moments_ends_with_the_same_bits(
    tmp_path: Path, no_figures: None, text: Path, seed: int
) -> None:
    settings = {"steps": 80, "save_every": 1, "evaluate_every": 30}
    whole = reference(tmp_path, text, **settings)
    out, chance = tmp_path / "run", random.Random(seed)
    while_saving = 0
    for kills in count():  # noqa: B007 - asserted on below
        new = ["--text", text, "--out", out, *options(**settings)]
        go_on = ["--resume", out] if (out / "config.json").exists() else new
        process = minimoe("train", *go_on, "--threads", "1", code=NO_FIGURES + drawn_life(chance))
        _, complained = process.communicate()
        while_saving += bool(list(out.glob(".*.part")))
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, complained
    print(f"killed {kills} times, {while_saving} of them while saving")
    assert kills >= 3, f"no process finishes more than {LIFE + 1} steps, so 80 take four of them"
    assert while_saving >= 1
    assert lasting(out) == whole
