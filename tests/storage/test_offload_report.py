"""The report of a run with a bound of memory: the numbers of the cache, and sentences that they support."""

import re
from pathlib import Path

import mixtral_folders
import numpy as np
import pytest

from minimoe.core import resources
from minimoe.inference import generation
from minimoe.storage import bounded, offload_report
from minimoe.storage.bounded import Bounded
from minimoe.storage.expert_cache import Statistics


@pytest.fixture
def model(tmp_path: Path) -> Bounded:
    opened = bounded.open_folder(mixtral_folders.write(tmp_path / "m"))
    budget = bounded.plan(opened.located, 10**9, 8, 64)
    return opened.load(budget.least + 5 * budget.expert, 8, 64)


def test_a_run_is_reported(model: Bounded) -> None:
    list(generation.generate(model.params, model.config, [1, 2, 3], tokens=9, temperature=0))
    text = offload_report.report(model)
    reading, writing = model.cache.phases["reading"], model.cache.phases["writing"]
    lines = text.splitlines()
    assert [line.split(" ")[0] for line in lines if not line.startswith(" ")] == [
        "memory", "reading", "writing", "mixtral-8x7b",
    ]  # fmt: skip
    assert f"reading  3 tokens, {reading.seconds / 3:.3g} s a token: {reading.hits} of {reading.uses} uses" in text
    assert f"writing  8 tokens, {writing.seconds / 8:.3g} s a token: {writing.hits} of 48 uses" in text
    assert f"({writing.hits / 48:.1%}, by chance 20.0%)" in text  # 5 slots, 2 of them no layer's, 3 of 15 experts
    assert "5 of 15 experts" in text
    assert model.cache.phase == ""


def test_the_longest_part_is_named(model: Bounded) -> None:
    most = "most of the time goes to"
    for phase, named in [
        (
            Statistics(10, 20, 5, 10**9, 4.0, 1.0, 6.0),
            f"files 67%, unpacking 17%, products and all else 17%: {most} files; files came at 250.0 MB/s",
        ),
        (
            Statistics(10, 20, 20, 0, 0.0, 1.0, 1.5),
            f"files 0%, unpacking 67%, products and all else 33%: {most} unpacking",
        ),
        (Statistics(10, 20, 20, 0, 0.0, 1.0, 9.0), f"{most} products and all else"),
    ]:
        lines = offload_report.phase_lines("writing", phase, 0.5)
        assert lines[1].endswith(named)
    assert offload_report.phase_lines("writing", Statistics(), 0.5)[0].startswith("writing  0 tokens, no token: 0 of 0")


def test_a_mixtral_is_computed_from_the_hit_rate_and_the_bandwidth(model: Bounded) -> None:
    """3 layers and 2 experts a token: 10 tokens are 60 uses; a quarter are hits; 2 GB came in 4 s."""
    phase = Statistics(tokens=10, uses=60, hits=15, bytes=2 * 10**9, reading=4.0)
    (line,) = offload_report.example_lines(phase, 16.0, 5, model)
    size = 0.75 * 32 * 2 * 176_160_768 * 2
    assert f"{size / 1e9:.2f} GB and {size / 5e8:.3g} s of reading per token (22.55 GB without a cache)" in line
    assert f"with {5 / 15 * 256 * 176_160_768 * 2 / 1e9:.2f} GB of experts held" in line
    (line,) = offload_report.example_lines(phase._replace(tokens=100), 16.0, 5, model)  # a use serves ten tokens
    assert f"{size / 10 / 1e9:.2f} GB and" in line
    (line,) = offload_report.example_lines(phase._replace(bytes=0, reading=0.0, hits=60), 4.5, 15, model)
    assert line == "mixtral-8x7b at 4.5 bits: 6.34 GB of experts per token without a cache, 0 read here"


def test_bits_and_chance(model: Bounded) -> None:
    assert offload_report.bits_of_expert(model) == 16
    assert offload_report.chance(model) == pytest.approx(3 / 15)
    whole = model._replace(budget=model.budget._replace(slots=15))
    assert offload_report.chance(whole) == 1


def test_without_a_peak_from_the_system_none_is_shown(model: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = offload_report.memory_lines(model)
    assert re.search(r"peak [\d.]+ [KM]B above the [\d.]+ MB of Python and its libraries: \d+% of the bound", shown[1])
    monkeypatch.setattr(resources, "peak_memory_bytes", lambda: None)
    assert len(offload_report.memory_lines(model)) == 1
    assert np.isfinite(model.budget.bound)
