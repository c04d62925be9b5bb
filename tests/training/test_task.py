"""Tasks: a run learns other data by another loss from given parameters, stops early, and resumes to the bit."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import CORPUS, SMALL, finished, lasting
from small_tasks import begun, copying, start

from minimoe.core import presets, tree
from minimoe.core.errors import UserError
from minimoe.evaluate import text_loss
from minimoe.layers import decoder
from minimoe.losses.objective import Objective, Shard
from minimoe.storage import checkpoint, metrics
from minimoe.storage.checkpoint import RunConfig, Tuning
from minimoe.text import batches
from minimoe.training import run_report, step, task, trainer
from minimoe.training.task import Validation
from minimoe.training.trainer import Trained


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def resume(folder: Path, made: Any = copying, **others: Any) -> Trained:
    return trainer.resume(folder, device="cpu", threads=1, progress=False, task=made, **others)


def test_a_run_learns_another_task_from_given_parameters(tmp_path: Path) -> None:
    done = start(tmp_path / "run")
    rows = metrics.read(tmp_path / "run")
    assert done.finished and rows[-1]["loss"] < rows[0]["loss"]
    assert [row["val_of"] for row in rows if "val_loss" in row] == ["copies"] * 4
    assert (tmp_path / "run" / "report.txt").read_text() == "8 8"
    stored = checkpoint.load_config(tmp_path / "run")
    assert stored.tuning == Tuning("copying", {"told": 3}) and stored.frozen == ()
    base = checkpoint.load_model(finished())
    start(tmp_path / "still", steps=0)
    for mine, other in zip(
        tree.leaves(checkpoint.load_model(tmp_path / "still").params), tree.leaves(base.params), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_given_parameters_are_not_changed(tmp_path: Path) -> None:
    run, params = begun()
    before = tree.map(np.copy, params)
    trainer.start(run, copying(run), params, out=tmp_path / "run", device="cpu", threads=1, progress=False)
    for mine, other in zip(tree.leaves(params), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_tokens_are_those_that_are_no_padding(tmp_path: Path) -> None:
    start(tmp_path / "run", steps=3)
    assert [row["tokens"] for row in metrics.read(tmp_path / "run")] == [22, 44, 66]
    assert all(active == 2 for row in metrics.read(tmp_path / "run") for active in row["active_experts"])


@pytest.mark.parametrize("stops_at", [1, 4, 7])
def test_a_tuned_run_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int) -> None:
    frozen = ("blocks[0].moe.router.w_gate", "head.weight")
    start(tmp_path / "whole", frozen=frozen)
    original, calls = step.cut, iter(range(1, 100))

    def pressed(*arguments: Any) -> Any:
        if next(calls) == stops_at:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as keyboard:
        keyboard.setattr(step, "cut", pressed)
        assert not start(tmp_path / "cut", frozen=frozen).finished
    assert resume(tmp_path / "cut").finished
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


def test_two_workers_learn_the_task_as_one_does(tmp_path: Path) -> None:
    frozen = ("blocks[1].moe.experts.w_up", "embedding.table")
    one, two = (start(tmp_path / f"{n}", threads=n, frozen=frozen, dtype="float32").model.params for n in (1, 2))
    for mine, other in zip(tree.leaves(two), tree.leaves(one), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-4)


def test_a_tuned_run_needs_its_task_to_go_on(tmp_path: Path) -> None:
    start(tmp_path / "run", steps=0)
    with pytest.raises(UserError, match=r"is a tuned run \(copying\)"):
        resume(tmp_path / "run", None)
    (tmp_path / "run" / checkpoint.RESUME).unlink()
    with pytest.raises(UserError, match="stopped before it saved anything"):
        resume(tmp_path / "run")


def test_frozen_leaves_stay_to_the_bit_and_have_no_moments(tmp_path: Path) -> None:
    frozen = ("blocks[0].moe.router.w_gate", "blocks[1].attention.key.weight", "head.weight")
    before = dict(tree.named_leaves(checkpoint.load_model(finished()).params))
    after = dict(tree.named_leaves(start(tmp_path / "run", frozen=frozen).model.params))
    for name, leaf in after.items():
        assert (leaf == before[name]).all() == (name in frozen), name
    assert not any(
        name in stored
        for stored in lasting(tmp_path / "run")["state"]
        for name in (f"optimizer.{one}" for one in frozen)
    )


# Early stopping


def test_a_run_stops_when_its_loss_no_longer_falls_and_keeps_the_best_model(tmp_path: Path) -> None:
    run, params = begun(steps=20)
    losses = (3.0, 2.0, 2.5, 2.0, 2.2, 1.0)
    done = trainer.start(
        run, copying(run, losses, patience=3), params, out=tmp_path / "run", device="cpu", threads=1, progress=False
    )
    assert done.finished and len(done.metrics) == 10, "the fifth validation is the third without a new lowest loss"
    assert done.model.step == checkpoint.load_model(tmp_path / "run").step == 4
    start(tmp_path / "four", steps=4, schedule="linear", final_rate=1.0)
    assert (tmp_path / "run" / "report.txt").read_text() == "4 10"
    again = resume(tmp_path / "run", lambda run: copying(run, (), patience=3))
    assert again.finished and len(again.metrics) == 10, "it is over, and takes no further step"


def test_the_best_model_is_that_of_its_step(tmp_path: Path) -> None:
    run, params = begun(steps=8, final_rate=1.0)
    made = copying(run, (3.0, 2.0, 2.5, 2.6), patience=4)
    best = trainer.start(run, made, params, out=tmp_path / "run", device="cpu", threads=1, progress=False).model
    run, params = begun(steps=8, final_rate=1.0)
    short = run._replace(recipe=dataclasses.replace(run.recipe, steps=8, evaluate_every=4))
    other = trainer.start(
        short,
        copying(short, (1.0, 2.0), patience=4),
        params,
        out=tmp_path / "short",
        device="cpu",
        threads=1,
        progress=False,
    ).model
    assert best.step == other.step == 4
    for mine, theirs in zip(tree.leaves(best.params), tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@given(losses=st.lists(st.integers(0, 5).map(float), max_size=9), patience=st.none() | st.integers(1, 4))
def test_over_is_when_none_of_the_last_losses_is_lower_than_all_before(
    losses: list[float], patience: int | None
) -> None:
    expected = patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
    assert task.is_over(losses, patience) == expected
    if losses:
        assert task.is_best(losses) == (losses[-1] < min([*losses[:-1], 9.0]))


# The ordinary task


def test_the_ordinary_task_reads_validates_and_reports_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = presets.override(SMALL, {"seed": 3})
    data, source, codec = batches.prepare(CORPUS, chosen.recipe, chosen.config.context)
    config = dataclasses.replace(chosen.config, vocab_size=codec.vocab_size)
    run = RunConfig(config, chosen.recipe, codec, source)
    made = task.of_text(run, data)
    tokens, targets = next(data.batches(4, 8, seed=3, first=2))
    shard = next(made.batches(2))
    np.testing.assert_array_equal(shard.tokens, tokens)
    np.testing.assert_array_equal(shard.targets, targets)
    assert shard[2:] == Shard(tokens, targets)[2:]
    assert made.objective == step.objective_of(config, chosen.recipe) != Objective()
    assert (made.together, made.patience) == (1, None)
    params = decoder.init(np.random.default_rng(0), config)
    assert made.validate(params, map) == Validation(text_loss.evaluate(params, config, data.validation).loss, {})
    written: list[Any] = []
    monkeypatch.setattr(run_report, "write", lambda *given: written.append(given))
    made.report(tmp_path, "model", [])  # type: ignore[arg-type]
    assert written == [(tmp_path, "model", data, [])]
    assert made.reads == run_report.about_texts(data)
