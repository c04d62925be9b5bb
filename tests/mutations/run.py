"""Puts every bug of minimoe/exercises/bugs.toml into a copy of the project, and sees the quick tests go red.

    python tests/mutations/run.py             each bug with the test that is known to catch it
    python tests/mutations/run.py --update    the same, and CAUGHT.md is written anew
    python tests/mutations/run.py --update "scale" "cut wire"       these bugs only

CAUGHT.md says which test catches which bug. If it is one of the module's own tests, it is run alone. Only where it lets
the bug pass, where it is in another file, or where a bug is new, are all quick tests run, the module's own first, until
one fails. A bug that none of them notices is a missing test: the command says so and ends with code 1. So it does when
CAUGHT.md is out of date.

A bug counts as caught when a test fails, not when the package cannot be imported: test_bugs.py imports every one.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file is in, whatever is installed

from minimoe.exercises import bugs  # noqa: E402
from minimoe.exercises.bugs import Bug  # noqa: E402

TABLE = Path(__file__).with_name("CAUGHT.md")
NEEDED = ("minimoe", "tests", "lessons", "data", ".ci", "*.toml", "*.yml", "*.md", "*.cff", "Makefile", "LICENSE")
TIMEOUT = 600  # seconds for one run of pytest; a bug that makes a test hang is not caught by it
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["numpy", "matplotlib.pyplot", "pytest", "hypothesis.strategies", "hypothesis.extra.numpy", "xdist.plugin"]
INTRODUCTION = """\
# Who catches which bug

Written by `python tests/mutations/run.py --update`; the same command without `--update` proves it line by line.
The bugs are those of `minimoe/exercises/bugs.toml`, which says what is exchanged for what. Of a bug that public code
really had, the fourth column links to a report.

| bug | in | kind | seen in | caught by |
|---|---|---|---|---|
"""


class Verdict(NamedTuple):
    """What the quick tests said of a package with a bug."""

    test: str | None  # the first that failed
    trouble: str = ""  # what kept the tests from saying anything


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="bugs to try; all if none is named")
    parser.add_argument("--update", action="store_true", help="write CAUGHT.md anew")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="copies at work side by side")
    options = parser.parse_args()

    everything, known = bugs.load(), catchers()
    if unknown := [name for name in options.names if name not in everything]:
        parser.error(f"the list has no bug {unknown[0]!r}")
    chosen = [everything[name] for name in options.names or everything]
    for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: a process a core is enough
        os.environ[f"{library}_NUM_THREADS"] = "1"
    os.environ |= {"MPLBACKEND": "Agg", "COLUMNS": "1000"}
    for sign in ("CI", "BUILD_NUMBER"):  # by which pytest knows where to explain a difference in full, at any cost
        os.environ.pop(sign, None)
    FORKS.set_forkserver_preload(IMPORTED)
    started = time.perf_counter()
    with copies(options.workers) as free, ThreadPoolExecutor(options.workers) as pool:
        verdicts = [pool.submit(on_package_with, bug, known.get(bug.name), free) for bug in chosen]
        found = dict(known)
        for bug, pending in zip(chosen, verdicts, strict=True):
            verdict = pending.result()
            found.pop(bug.name, None)
            if verdict.test is not None:
                found[bug.name] = verdict.test
            print(f"{bug.name:66s} {verdict.test or verdict.trouble or 'NOT CAUGHT: a test is missing'}", flush=True)
            if options.update:  # line by line, so that a long search can be broken off
                TABLE.write_text(table(found), encoding="utf-8")
        intact = on_intact_package(sorted({found[bug.name] for bug in chosen if bug.name in found}), free)

    problems = [f"NOT CAUGHT: {bug.name}" for bug in chosen if bug.name not in found]
    if intact.test or intact.trouble:
        problems.append(f"WITHOUT ANY BUG: {intact.test or intact.trouble} fails too, so it proves nothing")
    if not TABLE.exists() or TABLE.read_text(encoding="utf-8") != table(found):
        problems.append(f"OUT OF DATE: {TABLE.relative_to(ROOT)}; run this again with --update")
    caught, seconds = sum(bug.name in found for bug in chosen), time.perf_counter() - started
    print(f"{len(chosen)} bugs, {caught} caught, in {seconds:.0f} s")
    print("\n".join(problems))
    return 1 if problems else 0


def on_intact_package(tests: list[str], free: queue.Queue[Path]) -> Verdict:
    """The tests that caught a bug where nothing is broken: a test that fails here would catch everything."""
    with borrowed(free) as folder:
        return first_failure(folder, tests) if tests else Verdict(None)


def on_package_with(bug: Bug, known: str | None, free: queue.Queue[Path]) -> Verdict:
    """The known test first, if it is one of the module's own; if it has nothing to say, all of them."""
    with borrowed(free) as folder:
        path = folder / "minimoe" / bug.file
        intact = path.read_text(encoding="utf-8")
        try:
            write(path, bug.put_into(intact))
            if known and known.startswith(f"{mirror(bug)}::"):
                verdict = first_failure(folder, [known])
                if verdict.test is not None:
                    return verdict
            verdict = first_failure(folder, likeliest(folder, bug))
            return verdict if verdict.test or verdict.trouble else first_failure(folder, ["tests"])
        except ValueError as error:
            return Verdict(None, str(error))
        finally:
            write(path, intact)


def first_failure(folder: Path, tests: list[str]) -> Verdict:
    """Runs quick tests in a copy of the project until one fails."""
    output = folder / "output.txt"
    run = FORKS.Process(target=run_pytest, args=(folder, tests, output))
    run.start()
    run.join(TIMEOUT)
    if run.exitcode is None:
        run.kill()
        return Verdict(None, f"no answer within {TIMEOUT} s from {' '.join(tests)}")
    said = output.read_text(encoding="utf-8")
    failed = re.search(r"^FAILED ([^\[\s]+)", said, re.MULTILINE)
    if run.exitcode == 1 and failed:
        return Verdict(failed[1])
    if run.exitcode in (0, 5):  # all passed, or no quick test is left of those that are known
        return Verdict(None)
    return Verdict(None, f"pytest ended with code {run.exitcode}: {' '.join(said.split()[-40:])}")


def run_pytest(folder: Path, tests: list[str], output: Path) -> None:
    """One run, in a process forked from one that has imported all but the package, which saves half of the time."""
    import pytest

    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)  # for processes that tests start
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "minimoe"]:
        del sys.modules[name]
    options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--ignore=tests/mutations"]
    sys.exit(pytest.main([*options, "--hypothesis-profile=no-shrinking", *tests]))


def mirror(bug: Bug) -> str:
    """The file of the module's own tests, in the room of the same name. The checks of the lessons share one."""
    module = Path(bug.file)
    if re.fullmatch(r"exercises/lesson_\d+\.py", bug.file):
        return "tests/exercises/test_engine.py"
    return f"tests/{module.with_name(f'test_{module.name}').as_posix()}"


def likeliest(folder: Path, bug: Bug) -> list[str]:
    """The file of the module's own tests, then those that name the module most often."""
    own, naming = folder / mirror(bug), re.compile(rf"\b{Path(bug.file).stem}\b")
    files = sorted(path for path in (folder / "tests").rglob("test_*.py") if path.parent.name != "mutations")
    mentions = {path: len(naming.findall(path.read_text(encoding="utf-8"))) for path in files}
    likely = sorted((path for path in files if mentions[path] or path == own), key=lambda p: (p != own, -mentions[p]))
    return [str(path.relative_to(folder)) for path in likely[:6]] or ["tests"]


def write(path: Path, source: str) -> None:
    """A new source, and nothing compiled from the old one."""
    path.write_text(source, encoding="utf-8")
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


@contextmanager
def copies(count: int) -> Iterator[queue.Queue[Path]]:
    """Copies of the project, each free or at work."""
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as room:
        for number in range(count):
            folder = Path(room, str(number))
            folder.mkdir()
            for entry in {path for pattern in NEEDED for path in ROOT.glob(pattern)}:
                if entry.is_dir():
                    shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("*.part"))
                else:
                    shutil.copy2(entry, folder)
            free.put(folder)
        yield free


@contextmanager
def borrowed(free: queue.Queue[Path]) -> Iterator[Path]:
    """A copy that is free, until the block ends."""
    folder = free.get()
    try:
        yield folder
    finally:
        free.put(folder)


def catchers() -> dict[str, str]:
    """Bug → the test that catches it, as CAUGHT.md has it."""
    rows = re.findall(r"^\| (.+?) \|.*\| `(tests/[^`]+)` \|$", TABLE.read_text("utf-8") if TABLE.exists() else "", re.M)
    return dict(rows)


def table(found: dict[str, str]) -> str:
    """CAUGHT.md, in the order of the list."""
    lines = []
    for bug in bugs.load().values():
        seen_in = ", ".join(f"[{name}](https://github.com/{name.replace('#', '/issues/')})" for name in bug.seen_in)
        test = f"`{found[bug.name]}`" if bug.name in found else "nothing yet"
        lines.append(f"| {bug.name} | `{bug.file}` | {bug.kind} | {seen_in} | {test} |\n")
    return INTRODUCTION + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
