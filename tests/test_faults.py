"""Crashes, full disks and impatient people: none of them can ever cost more than the steps since the last save."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import small_runs
from small_runs import lasting, metrics, options, resume, train

from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.storage import checkpoint
from minimoe.training import run_report

FEW = {"steps": 2, "save_every": 1, "evaluate_every": 0, "layers": 1}


class Crash(BaseException):
    """The process is gone: no handler in the package sees this, and nothing is cleaned up."""


class Disk:
    """Counts what is done to the disk and fails at one such operation: half of a write is done, of all else nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int, failure: BaseException) -> None:
        self.operations, self.fails_at, self.failure = 0, fails_at, failure
        self.renamed: list[str] = []
        path_open, replace, open_regular = Path.open, Path.replace, files.open_regular

        def open_counted(path: Path, mode: str = "r", **options: Any) -> Any:
            if mode != "xb":
                return path_open(path, mode, **options)
            self.tick()
            return File(self, path_open(path, mode, buffering=0, **options))

        def open_regular_counted(path: Path, mode: Literal["rb", "ab"]) -> Any:
            if mode != "ab" or path.name == checkpoint.LOCK:
                return open_regular(path, mode)
            self.tick()
            return File(self, cast(Any, open_regular(path, mode)).detach())

        def replace_counted(path: Path, target: Path) -> None:
            self.tick()
            replace(path, target)
            self.renamed.append(target.name)

        monkeypatch.setattr(Path, "open", open_counted)
        monkeypatch.setattr(files, "open_regular", open_regular_counted)
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
    monkeypatch.setattr(run_report, "write", lambda *_: None)


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
    start = f"import sys\n{code}\nfrom minimoe.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", start, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **settings,
    )


NO_FIGURES = (
    "from minimoe.training import run_report; "
    "run_report.write = lambda *_: None; run_report.closing = lambda *_: 'done'"
)
SLOW_STEPS = (
    "import time; from minimoe.training import progress_bar; progress_bar.Bar.show = lambda *_: time.sleep(0.05)"
)


def reference(tmp_path: Path, text: Path, **settings: Any) -> dict[str, Any]:
    """What the run ends with if nothing happens to it."""
    from minimoe.text import corpus

    train(tmp_path / "whole", corpus.read_files(text), **settings)
    return lasting(tmp_path / "whole")


def wait_for_steps(folder: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    while len(metrics_so_far(folder)) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def metrics_so_far(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


PHASES = ("before write", "after write", "before rename", "after rename")


def killed_in(file: str, phase: str) -> str:
    """Code after which the process kills itself as kill -9 does, in this phase of writing ``file`` after a step."""
    return f"""
import os, signal
from pathlib import Path

from minimoe.core import files

open_path, replace, fsync, about = Path.open, Path.replace, os.fsync, [None]
open_regular = files.open_regular

def reach(path, phase):
    name = path.name.removeprefix(".").removesuffix(".part")
    stepped = (path.parent / "metrics.jsonl").exists() and b'"step": 1,' in (path.parent / "metrics.jsonl").read_bytes()
    if (name, phase) == ("{file}", "{phase}") and (stepped or name == "config.json"):
        os.kill(os.getpid(), signal.SIGKILL)

def open_counted(path, mode="r", **options):
    if mode == "xb":
        reach(path, "before write")
        about[0] = path
    return open_path(path, mode, **options)

def open_regular_counted(path, mode):
    if mode == "ab":
        about[0] = path
    return open_regular(path, mode)

def fsync_counted(number):
    reach(about[0], "after write")

def replace_counted(path, target):
    reach(path, "before rename")
    replace(path, target)
    reach(path, "after rename")

Path.open, Path.replace, os.fsync = open_counted, replace_counted, fsync_counted
files.open_regular = open_regular_counted
"""


def assert_killed_process_can_be_resumed(tmp_path: Path, text: Path, file: str, phase: str) -> None:
    whole = reference(tmp_path, text, **FEW)
    out = tmp_path / "run"
    new = ["train", "--text", text, "--out", out, *options(**FEW), "--threads", "1"]
    process = minimoe(*new, code=killed_in(file, phase))
    _, complained = process.communicate()
    assert process.returncode == -signal.SIGKILL, complained
    assert bool(list(out.glob(".*.part"))) == (phase in ("after write", "before rename"))
    if file != "config.json":
        assert len(metrics(out)) == 1
        assert checkpoint.load_model(out).run == checkpoint.load_config(out), "there always is a model to load"
        kept = lasting(out)["progress"]["step"]
        assert kept == (1 if (file, phase) == ("resume.safetensors", "after rename") else 0)
    if (out / "config.json").exists():
        assert resume(out, None).finished
    else:
        process = minimoe(*new, code=NO_FIGURES)
        assert process.communicate() and process.returncode == 0
    assert lasting(out) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no kill -9")
@pytest.mark.parametrize("file", ["model.safetensors", "resume.safetensors"])
def test_a_process_killed_while_it_saves_can_be_resumed(
    tmp_path: Path, no_figures: None, text: Path, file: str
) -> None:
    assert_killed_process_can_be_resumed(tmp_path, text, file, "before rename")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no kill -9")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "resume.safetensors"])
def test_a_process_killed_in_any_phase_of_saving_any_file_can_be_resumed(
    tmp_path: Path, no_figures: None, text: Path, file: str, phase: str
) -> None:
    assert_killed_process_can_be_resumed(tmp_path, text, file, phase)


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
    assert f"Interrupted at step {reached}; everything is saved" in said
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
    from minimoe.text import corpus

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write", lambda *_: None)
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
        patch.setattr(run_report, "write", lambda *_: None)
        assert resume(out, None).finished


@pytest.mark.slow
def test_a_real_disk_that_is_full_loses_nothing(tmp_path: Path, text: Path) -> None:
    """A small disk in memory, with room for the checkpoints of the run and 16 kB more, filled up before it resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux can mount a disk; the tests above limit the size of files instead")
    try:
        out = disk / "run"
        process = minimoe("train", "--text", text, "--out", out, *options(**FEW), "--threads", "1", code=NO_FIGURES)
        assert process.communicate() and process.returncode == 0
        before = lasting(out)
        left = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(max(0, left.f_bavail * left.f_frsize - 8192)))
        process = minimoe("train", "--resume", out, "--steps", "4", "--threads", "1", code=NO_FIGURES)
        _, complained = process.communicate()
        assert process.returncode == 2, complained
        assert re.search(r"cannot be written \(No space left on device\): free space", complained.splitlines()[-1])
        assert not list(out.glob(".*.part"))
        assert lasting(out)["state"] == before["state"] and lasting(out)["model"] == before["model"]
        assert len(checkpoint.load_model(out).params.blocks) == 1
        (disk / "filler").unlink()
        process = minimoe("train", "--resume", out, "--steps", "4", "--threads", "1", code=NO_FIGURES)
        assert process.communicate() and process.returncode == 0
        assert lasting(out)["progress"]["step"] == 4
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be written: by its permissions or, for root, who needs none, as a read-only disk."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if path.is_dir()}
        for path in modes:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    for mount in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        if subprocess.run(["mount", *map(str, mount)], capture_output=True).returncode:
            pytest.skip("root writes everywhere, and this system does not let it mount a disk that is read-only")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_run_that_may_not_be_written_to_can_be_used_but_not_continued(
    tmp_path: Path, no_figures: None, text: Path
) -> None:
    from minimoe.text import corpus

    home = tmp_path / "home"
    train(home / "run", corpus.read_files(text), **FEW)
    before = lasting(home / "run")
    with read_only(home):
        for words, code, says in (
            (["generate", home / "run", "--prompt", "4", "--tokens", "3"], 0, ""),
            (["evaluate", home / "run"], 0, ""),
            (["train", "--resume", home / "run", "--steps", "3"], 2, "run cannot be written"),
            (["train", "--text", text, "--out", home / "new", *options(**FEW)], 2, "new cannot be written"),
        ):
            process = minimoe(*words)
            _, complained = process.communicate()
            assert process.returncode == code, complained
            assert says in complained and complained.count("\n") == bool(says), complained
    assert lasting(home / "run") == before
    assert resume(home / "run", None, steps=3).finished


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_of_two_trainings_into_one_folder_the_second_is_refused_and_the_first_ends_whole(
    tmp_path: Path, no_figures: None, text: Path
) -> None:
    settings = {**FEW, "steps": 40}
    whole = reference(tmp_path, text, **settings)
    out = tmp_path / "run"
    new = ["train", "--text", text, "--out", out, *options(**settings), "--threads", "1"]
    first = minimoe(*new, code=f"{NO_FIGURES}\n{SLOW_STEPS}")
    wait_for_steps(out, 2, first)
    for words, says in ((new, "already holds a run"), (["train", "--resume", out], "another training run is writing")):
        second = minimoe(*words)
        said, complained = second.communicate()
        assert (second.returncode, said) == (2, "")
        assert says in complained and complained.count("\n") == 1
    assert first.poll() is None, "the first one had ended, and nothing was tested"
    _, complained = first.communicate()
    assert first.returncode == 0, complained
    assert lasting(out) == whole


def test_a_training_that_began_and_ended_before_the_lock_was_ours_is_not_overwritten(
    tmp_path: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = checkpoint.locked

    def late(folder: Path) -> Any:
        monkeypatch.setattr(checkpoint, "locked", locked)
        train(folder, **FEW)
        return locked(folder)

    monkeypatch.setattr(checkpoint, "locked", late)
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        train(tmp_path / "run", **{**FEW, "seed": 1})
    assert checkpoint.load_config(tmp_path / "run").recipe.seed == 0


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
from minimoe.cli import main
from minimoe.training import progress_bar, run_report

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
progress_bar.Bar.show = lambda *_: next(steps)
"""


def drawn_life(chance: random.Random) -> str:
    """How long a process lives: it dies as it starts, in the midst of a step, or while it writes files."""
    match chance.randrange(4):
        case 0:
            return killed_after(0, chance.randrange(120_000))  # the first step begins after some 100,000
        case 1:
            return killed_after(chance.randint(1, LIFE), chance.randrange(8000))  # a step takes some 8,000
        case _:
            return killed_after(chance.randint(1, LIFE), chance.randrange(16), of=ON_DISK)  # of which 18 are these


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
