"""What `minimoe bench` measures and says. Times are the machine's; checked is what they are the times of."""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import small_runs
import strict_cupy

from minimoe.cli import main
from minimoe.core import presets
from minimoe.core.config import ModelConfig
from minimoe.cost import blueprint, costs
from minimoe.optim import clipping
from minimoe.timing import bench, stopwatch

TINY = presets.override(presets.preset("tiny"), {"batch": 4, "optimizer": "adamw"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GEMM", 64)
    monkeypatch.setattr(bench.advice, "found", lambda threads: [f"Only {threads} threads."])


@pytest.fixture(scope="module")
def report() -> bench.Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "GEMM", 64)
        return bench.run(TINY, "cpu", threads=2, seconds=0.05)


def test_every_measure_is_there_and_they_fit_together(report: bench.Report) -> None:
    tokens = TINY.recipe.batch * TINY.config.context
    assert report.training_tokens_per_second == pytest.approx(1000 * tokens / report.step_milliseconds)
    speed = 1000 * report.matrix_operations / report.step_milliseconds
    assert report.share_of_peak == pytest.approx(speed / report.peak_operations_per_second)
    assert report.decoding_tokens_per_second > 0
    assert report.peak_memory_bytes is None or 10**7 < report.peak_memory_bytes < 10**11
    assert (report.device, report.threads, report.batch, report.optimizer) == ("cpu", 2, 4, "adamw")


def test_every_layer_takes_time_forward_and_backward(report: bench.Report) -> None:
    choices = (TINY.config.router, TINY.config.expert_kind)
    at_work = [
        name
        for name, module in stopwatch.components().items()
        if name in choices or not re.search(r"\.(routers|experts)\.|\.(soft_moe|dense|lora)$", module.__name__)
    ]
    assert [one.name for one in report.components] == at_work
    for one in report.components:
        assert one.forward > 0 and one.backward > 0, one.name
    assert report.clip_milliseconds > 0 and report.update_milliseconds > 0


def test_matrix_operations_of_a_model_worked_out_by_hand() -> None:
    config = ModelConfig(
        vocab_size=5, width=4, layers=1, heads=2, kv_heads=1, head_width=2, context=3, experts=3, expert_width=6
    )
    projections = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4
    router = 2 * 4 * 3  # logits, and those of the noise
    experts = 2 * 3 * 4 * 6
    head = 4 * 5
    pairs = 1 + 2 + 3  # query and key
    forward = 2 * 3 * (projections + router + experts + head) + 4 * 2 * 2 * pairs
    assert bench.matrix_operations(config, batch=7) == 3 * 7 * forward
    windowed = dataclasses.replace(config, window=2)
    assert bench.matrix_operations(windowed, batch=7) == 3 * 7 * (forward - 4 * 2 * 2 * 1)


def test_matrix_operations_are_those_of_the_accounting() -> None:
    config = dataclasses.replace(ModelConfig(), noisy_gating=False)
    found = costs.of(blueprint.of_config("toy", config))
    a_token = found.forward_operations + found.backward_operations
    assert bench.matrix_operations(config, batch=1) == a_token * config.context


def test_the_peak_is_measured_in_the_numbers_that_are_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GEMM", 8)
    monkeypatch.setattr(bench, "measure", lambda work, seconds: work() or [0.5, 0.25])
    matmul, seen = np.matmul, []
    monkeypatch.setattr(np, "matmul", lambda a, b, out: seen.append((a.dtype, out.dtype)) or matmul(a, b, out=out))
    assert bench.matrix_peak(np.zeros(1, np.float32), 1, lambda: None, 0) == 2 * 8**3 / 0.25
    assert seen == [(np.float32, np.float32)]


def test_decoding_counts_what_is_written_and_not_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(bench.generation, "generate", lambda *_, tokens, **__: asked.append(tokens) or iter(()))
    monkeypatch.setattr(bench, "measure", lambda work, seconds: work() or [2.0])
    config = presets.preset("tiny").config
    assert bench._decoding(None, config, 1, 0) == asked[0] / 2  # type: ignore[arg-type]
    assert asked == [min(bench.WRITTEN, config.context - bench.PROMPT)]


def test_the_table_has_the_slowest_layer_first_forward_beside_backward(report: bench.Report) -> None:
    layers = [bench.Component("fast", 1, 2), bench.Component("slow", 3, 4.5)]
    lines = bench.table(dataclasses.replace(report, components=layers)).splitlines()
    head = lines.index(next(line for line in lines if line.startswith("ms per step")))
    assert [line.split() for line in lines[head + 1 : head + 3]] == [["slow", "3.00", "4.50"], ["fast", "1.00", "2.00"]]


def test_the_command_prints_a_table_and_what_costs_speed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--preset", "tiny", "--batch", "2", "--seconds", "0", "--device", "cpu", "--threads", "1"]
    assert main.main(words) == 0
    said = capsys.readouterr().out
    for start in ("training ", "matrices ", "decoding ", "memory ", "attention ", "clip, update", "Only 1 threads."):
        assert f"\n{start}" in said, said


def test_the_command_prints_json_and_takes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--preset", "tiny", "--seconds", "0", "--device", "cpu", "--threads", "1", "--json"]
    assert main.main([*words, "--context", "9", "--experts", "5", "--batch", "3", "--vocab-size", "11"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["context"], values["batch"], values["threads"], values["device"]) == (9, 3, 1, "cpu")
    assert values["advice"] == ["Only 1 threads."]


@pytest.mark.parametrize("context", [1, 2, 40])
def test_any_context_can_be_decoded(context: int) -> None:
    chosen = presets.override(small_runs.SMALL, {"context": context, "vocab_size": 3, "batch": 1})
    assert bench.run(chosen, "cpu", 1, seconds=0).decoding_tokens_per_second > 0


def test_layers_are_timed_over_all_steps_that_were_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stopwatch on which every clip takes a second."""
    clip, spent = clipping.clip, {("clip", "after"): 0.0}

    def a_second(*arguments: Any) -> Any:
        spent["clip", "after"] += 1
        return clip(*arguments)

    @contextmanager
    def watch(wait: Any) -> Iterator[Any]:
        spent["clip", "after"] = 0.0
        yield spent

    monkeypatch.setattr(clipping, "clip", a_second)
    monkeypatch.setattr(stopwatch, "watch", watch)
    assert bench.run(TINY, "cpu", threads=1, seconds=0).clip_milliseconds == 1000


def test_the_peak_is_that_of_the_cores_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(bench, "matrix_peak", lambda like, threads, *_: seen.append(threads) or 1.0)
    bench.run(presets.override(TINY, {"batch": 1}), "cpu", threads=2, seconds=0)
    assert seen == [1]


def test_bad_settings_get_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = [["--seconds", wrong] for wrong in ("-1", "nan", "inf")]
    unknown = [["--preset", "toyy"], ["--threads", "0"], ["--preset", "mixtral-8x7b"], ["--device", "tpu"]]
    for words in seconds + unknown:
        assert main.main(["bench", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_it_runs_by_cupys_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy: ModuleType = strict_cupy.install(monkeypatch)
    monkeypatch.setattr(bench, "peak_memory", lambda like: 1 if isinstance(like, cupy.ndarray) else None)
    report = bench.run(TINY, "gpu", seconds=0)
    assert (report.device, report.threads, report.advice, report.peak_memory_bytes) == ("gpu", 1, [], 1)


def test_a_step_takes_the_median_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skewed, so that the median is neither the mean nor an end."""
    monkeypatch.setattr(bench, "measure", lambda work, seconds: work() or [1.0, 2.0, 9.0])
    monkeypatch.setattr(bench, "GEMM", 8)
    report = bench.run(TINY, "cpu", threads=1, seconds=0.0)
    assert report.step_milliseconds == 2000
    assert report.training_tokens_per_second == TINY.recipe.batch * TINY.config.context / 2
    assert report.peak_operations_per_second == 2 * 8**3 / 1.0, "the peak is the best"
