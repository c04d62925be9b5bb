"""Ten thousand steps: nothing grows but the file of metrics, nothing slows down, nothing is lost on the way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import lasting, metrics

from minimoe.core import presets
from minimoe.storage import checkpoint
from minimoe.training import trainer

pytestmark = pytest.mark.slow

STEPS, EVERY = 10_000, 250

# Trains in a process of its own; after every so many steps, the memory that it and its workers hold, in bytes, and the
# processor seconds that they have used, which other programs do not lengthen as they lengthen those of the clock.
WATCHED = """
import json, os, sys, time
from pathlib import Path
from minimoe.core import presets
from minimoe.training import progress_bar, trainer

steps, every, out, threads, settings = json.loads(sys.argv[1])
held, used = [], []

def show(bar, row):
    if row["step"] % every == 0:
        workers = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
        assert len(workers) == threads - 1
        pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in ("self", *workers)]
        ticks = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13] for one in workers]
        held.append(sum(pages) * os.sysconf("SC_PAGE_SIZE"))
        used.append(time.process_time() + sum(int(n) for pair in ticks for n in pair) / os.sysconf("SC_CLK_TCK"))

progress_bar.Bar.show = show
preset = presets.override(presets.preset("tiny"), {"steps": steps, **settings})
trainer.train(preset, out=out, device="cpu", threads=threads, progress=False)
print(json.dumps([held, used]))
"""


def watched(out: Path, threads: int, **settings: Any) -> tuple[list[int], list[float]]:
    words = json.dumps([STEPS, EVERY, str(out), threads, settings])
    done = subprocess.run([sys.executable, "-c", WATCHED, words], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    held, used = json.loads(done.stdout)
    return held, used


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell how much memory is held")
@pytest.mark.parametrize("threads", [1, 2])
def test_ten_thousand_steps_take_no_more_memory_or_time_than_the_first_and_lose_no_line(
    tmp_path: Path, threads: int
) -> None:
    held, used = watched(tmp_path / "run", threads, evaluate_every=1000, save_every=500)
    assert len(held) == STEPS // EVERY
    quarters = np.array_split(held, 4)
    growth = float(np.median(quarters[3]) - np.median(quarters[1]))  # over half of the steps
    print(f"memory: {held[0] / 2**20:.1f} MB after {EVERY} steps, {held[-1] / 2**20:.1f} MB in the end, {growth:+} B")
    assert growth < 0.3 * 1024 * STEPS / 2, "a leak of 1 kB a step would be three times as much"

    rows = metrics(tmp_path / "run")  # every line is parsed
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    seconds = np.array_split(np.diff(used) / EVERY, 4)
    early, late = np.median(seconds[1]), np.median(seconds[3])
    print(f"time: {1e3 * early:.2f} ms of processor a step in the second quarter, {1e3 * late:.2f} ms in the last")
    assert late < 1.5 * early
    assert lasting(tmp_path / "run")["progress"]["step"] == STEPS


def losses(out: Path, threads: int, steps: int) -> list[float]:
    preset = presets.override(presets.preset("tiny"), {"steps": steps, "evaluate_every": 0, "save_every": 0})
    trained = trainer.train(preset, out=out, device="cpu", threads=threads, progress=False)
    return [row["total"] for row in trained.metrics]


def test_the_same_threads_give_the_same_bits_and_other_threads_the_same_to_rounding(tmp_path: Path) -> None:
    one, two, same = (losses(tmp_path / name, n, 300) for name, n in (("1", 1), ("2", 2), ("2 again", 2)))
    assert two == same
    assert lasting(tmp_path / "2") == lasting(tmp_path / "2 again")
    apart = np.abs(np.array(one) - two)
    print(f"1 and 2 threads: {apart.max():.1e} apart in 300 steps")
    assert apart.max() < 1e-4
    assert checkpoint.load_model(tmp_path / "1").config == checkpoint.load_model(tmp_path / "2").config
