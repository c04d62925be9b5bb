"""Training: the same gradient however a batch is cut, the same bits however often a run is interrupted."""

import dataclasses
import io
import math
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
from small_models import gradient_in_a_group
from small_runs import CORPUS, SMALL, lasting, metrics, resume, train
from small_tasks import begun, copying, start

from minimoe.analysis import microscope
from minimoe.core import presets, resources, tree
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.cost import memory
from minimoe.evaluate import text_loss
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.losses import objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import clipping, optimizer, schedule
from minimoe.storage import checkpoint
from minimoe.storage import metrics as metrics_file
from minimoe.storage.checkpoint import RunConfig
from minimoe.text import batches, corpus
from minimoe.training import progress_bar, run_report, step, trainer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures and no waiting for the disk: neither is what these tests are about."""
    monkeypatch.setattr(run_report, "write", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


# One gradient

ALL_LOSSES = Coefficients(0.5, 0.4, 0.3, 0.2)


@pytest.fixture(scope="module")
def batch() -> tuple[RunConfig, decoder.Decoder, batches.Texts]:
    settings = {"dtype": "float64", "batch": 6, "capacity_factor": None}
    chosen = presets.override(SMALL, settings)
    data, source, codec = batches.prepare(CORPUS, chosen.recipe, chosen.config.context)
    run = RunConfig(presets.override(chosen, {"vocab_size": codec.vocab_size}).config, chosen.recipe, codec, source)
    params = decoder.init(np.random.default_rng(1), run.config, "float64")
    for layer in params.blocks:  # at zero, a wrong gradient through the noise could not be told from a right one
        assert layer.moe.router.w_noise is not None
        layer.moe.router.w_noise[...] = np.random.default_rng(2).standard_normal(layer.moe.router.w_noise.shape)
    return run, params, data


def shards_of(
    batch: tuple[RunConfig, decoder.Decoder, batches.Texts], threads: int, accumulate: int = 1
) -> list[Shard]:
    run, params, data = batch
    recipe = presets.override(SMALL, {"dtype": "float64", "batch": 6, "accumulate": accumulate}).recipe
    first = next(data.batches(recipe.batch, run.config.context))
    return step.shard_batch(np.random.default_rng(3), params, *first, run.config, recipe, threads)


def gradient(
    batch: tuple[RunConfig, decoder.Decoder, batches.Texts],
    threads: int,
    accumulate: int = 1,
    coefficients: Coefficients = ALL_LOSSES,
) -> tuple[float, list[np.ndarray]]:
    run, params, _ = batch
    shards, goal = shards_of(batch, threads, accumulate), Objective(coefficients, capacity_factor=1.0)
    totals, found = gradient_in_a_group(threads, params, shards, run.config, goal, accumulate > 1)
    return float(totals.total), tree.leaves(found)


@pytest.mark.parametrize(("threads", "accumulate"), [(2, 1), (3, 1), (5, 1), (1, 2), (1, 6), (2, 3), (3, 2)])
def test_threads_and_accumulation_give_the_gradient_of_one_big_batch(
    batch: tuple[RunConfig, decoder.Decoder, batches.Texts], threads: int, accumulate: int
) -> None:
    loss, whole = gradient(batch, 1)
    cut_loss, parts = gradient(batch, threads, accumulate)
    assert cut_loss == pytest.approx(loss, rel=1e-13)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("accumulate", "kept"), [(1, [True]), (2, [False, False, True, True])])
def test_accumulation_keeps_no_activations_while_it_adds_up_the_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, kept: list[bool]
) -> None:
    """Otherwise working through a batch in parts would save no memory."""
    seen: list[bool] = []
    forward = objective.forward

    def watched(*arguments: Any, keep: bool = True, **others: Any) -> objective.Forward:
        seen.append(keep)
        return forward(*arguments, keep=keep, **others)

    monkeypatch.setattr(objective, "forward", watched)
    monkeypatch.setattr(text_loss, "evaluate", lambda *_: text_loss.Evaluation(0.0, 0, np.zeros((2, 4))))
    train(tmp_path / "run", steps=1, accumulate=accumulate)
    assert seen == kept


@pytest.mark.parametrize("loss", Coefficients._fields)
def test_each_auxiliary_loss_reaches_the_gradient_and_does_not_depend_on_the_cut(
    batch: tuple[RunConfig, decoder.Decoder, batches.Texts], loss: str
) -> None:
    coefficients = Coefficients(**{loss: 1.0})
    without = gradient(batch, 1, coefficients=Coefficients())[1]
    whole = gradient(batch, 1, coefficients=coefficients)[1]
    parts = gradient(batch, 2, 3, coefficients)[1]
    of_loss = [one - other for one, other in zip(whole, without, strict=True)]
    assert max(np.abs(values).max() for values in of_loss) > 1e-3
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("threads", "accumulate"), [(1, 1), (2, 1), (4, 1), (2, 3), (6, 6)])
def test_shards_are_the_batch_cut_in_pieces_noise_included(
    batch: tuple[RunConfig, decoder.Decoder, batches.Texts], threads: int, accumulate: int
) -> None:
    run, _, _ = batch
    (whole,) = shards_of(batch, 1)
    pieces = shards_of(batch, threads, accumulate)
    assert len(pieces) == min(threads * accumulate, 6)
    assert whole.noise is not None
    assert whole.noise.shape == (run.config.layers, 6, run.config.context, run.config.experts)
    assert whole.noise.dtype == np.float64
    for field, axis in (("tokens", 0), ("targets", 0), ("noise", 1)):
        joined = np.concatenate([getattr(piece, field) for piece in pieces], axis)
        np.testing.assert_array_equal(joined, getattr(whole, field))
    np.testing.assert_array_equal(whole.tokens[:, 1:], whole.targets[:, :-1])


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"accumulate": 4, "batch": 4}, {"dtype": "float64"}])
def test_a_run_with_other_threads_or_accumulation_goes_the_same_way(tmp_path: Path, settings: dict[str, Any]) -> None:
    one = train(tmp_path / "one", **{**settings, "accumulate": 1})
    other = train(tmp_path / "other", threads=3, **settings)
    for mine, theirs in zip(tree.leaves(one.model.params), tree.leaves(other.model.params), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=2e-4)
    assert [row["load"] for row in one.metrics[:2]] == [row["load"] for row in other.metrics[:2]]


# What a run leaves behind


def test_metrics_hold_a_line_a_step_with_all_there_is_to_watch(tmp_path: Path) -> None:
    trained = train(tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert trained.metrics == rows
    assert trained.finished
    assert trained.folder == tmp_path / "run"
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [32, 64, 96, 128, 160, 192]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    recipe, config = small_runs.RECIPE, small_runs.CONFIG
    for row in rows:
        auxiliary = sum(
            weight * sum(row["auxiliary"][name])
            for name, weight in (("balance", 0.01), ("importance", 0.1), ("load", 0.1), ("z", 0.001))
        )
        assert row["total"] == pytest.approx(row["loss"] + auxiliary, abs=1e-5)
        assert row["learning_rate"] == schedule.learning_rate(row["step"] - 1, recipe)
        assert row["gradient_norm"] > 0
        assert row["tokens_per_second"] > 0
        assert np.shape(row["load"]) == (config.layers, config.experts)
        np.testing.assert_allclose(np.sum(row["load"], axis=1), 1, atol=1e-4)
        assert len(row["dropped"]) == len(row["router_entropy"]) == config.layers
        assert all(0 < entropy <= math.log(config.experts) + 1e-5 for entropy in row["router_entropy"])
    assert any(sum(row["dropped"]) > 0 for row in rows), "a capacity factor of 1 refuses some"
    assert all(0 <= share < 1 for row in rows for share in row["dropped"])
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_the_dropped_share_is_that_of_all_entries(tmp_path: Path) -> None:
    """With room for one entry in each expert, at most 4 of the K · T = 16 entries of a sequence are kept."""
    trained = train(tmp_path / "run", steps=3, capacity_factor=0.01)
    assert all(0.75 <= share < 1 for row in trained.metrics for share in row["dropped"])


def test_the_dropped_share_of_a_router_that_asks_for_more_than_k_is_a_share(tmp_path: Path) -> None:
    """About 4 of 8 experts are awake at first. With K = 1, a token has four times as many entries as K."""
    config = {"router": "remoe", "experts": 8, "active_experts": 1}
    trained = train(tmp_path / "run", steps=2, capacity_factor=0.01, **config)
    for row in trained.metrics:
        asked = np.array(row["active_experts"]) * small_runs.RECIPE.batch * small_runs.CONFIG.context
        most = small_runs.RECIPE.batch * 8  # one entry of each expert and sequence
        assert (asked > 1.5 * small_runs.RECIPE.batch * small_runs.CONFIG.context).all()
        assert (1 - most / asked - 1e-9 <= np.array(row["dropped"])).all()
        assert (np.array(row["dropped"]) < 1).all()


def test_more_threads_than_sequences_are_as_many_as_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, check = [], memory.check_memory

    def check_memory(config: Any, recipe: Any, threads: int) -> None:
        counted.append(threads)
        check(config, recipe, threads)

    monkeypatch.setattr(memory, "check_memory", check_memory)
    assert train(tmp_path / "run", threads=9).finished
    assert set(counted) == {4}


def test_the_loss_falls(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", steps=60, learning_rate=0.02, evaluate_every=0, save_every=0)
    first, last = trained.metrics[0]["loss"], np.mean([row["loss"] for row in trained.metrics[-5:]])
    assert first == pytest.approx(math.log(trained.model.config.vocab_size), abs=0.2), "at first it knows nothing"
    assert last < first - 0.8


def test_the_same_seed_trains_the_same_model_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("one", 4), ("same", 4), ("other", 5)):
        train(tmp_path / name, seed=seed)
    assert lasting(tmp_path / "one") == lasting(tmp_path / "same")
    assert lasting(tmp_path / "one")["model"] != lasting(tmp_path / "other")["model"]


def test_without_steps_the_untrained_model_is_saved(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", steps=0)
    assert trained.finished
    assert trained.metrics == []
    loaded = checkpoint.load_model(tmp_path / "run").params
    for mine, other in zip(tree.leaves(loaded), tree.leaves(trained.model.params), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_runs_without_a_folder_of_their_own_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = presets.override(SMALL, {"steps": 0})
    for _ in range(2):
        trainer.train(nothing, corpus=CORPUS, device="cpu", progress=False)
    trained = trainer.train(nothing, corpus=CORPUS, name="mine", device="cpu", progress=False)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "run", "run-2"]
    assert trained.folder == Path("runs/mine")


# Interruptions


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, call: int = 1) -> None:
    """Ctrl-C arrives while this function runs for the ``call``-th time."""
    original, calls = getattr(module, function), iter(range(1, 10**6))

    def pressed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, pressed)


@pytest.mark.parametrize(
    ("module", "function", "call", "stops_at"),
    [
        (step, "cut", 1, 1),
        (optimizer, "update_some", 4, 4),
        (text_loss, "evaluate", 1, 3),
        (metrics_file, "append", 2, 2),
        (progress_bar.Bar, "show", 5, 5),
        (checkpoint, "save", 2, 3),  # the first call is at step 0, the second at step 2
    ],
)
def test_ctrl_c_at_any_moment_saves_and_the_resumed_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, call: int, stops_at: int
) -> None:
    train(tmp_path / "whole")
    with monkeypatch.context() as keyboard:
        press_ctrl_c(keyboard, module, function, call)
        stopped = train(tmp_path / "cut")
    assert not stopped.finished
    assert [row["step"] for row in stopped.metrics] == list(range(1, stops_at + 1))
    assert lasting(tmp_path / "cut")["progress"]["step"] == stops_at, "what is reported as saved is saved"
    resumed = resume(tmp_path / "cut")
    assert resumed.finished
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")
    assert resumed.metrics == metrics(tmp_path / "cut")


def test_ctrl_c_in_the_last_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, optimizer, "update_some", 6)
    assert train(tmp_path / "run").finished


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """Python's own handler, which is missing where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listens_to_ctrl_c: None
) -> None:
    with monkeypatch.context() as keyboard:
        press_ctrl_c(keyboard, step, "cut", 3)
        press_ctrl_c(keyboard, clipping, "clip", 3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", save_every=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path / "whole")
    assert resume(tmp_path / "run").finished
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


def test_a_run_interrupted_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", threads=2)
    for attempt in range(6):
        with monkeypatch.context() as keyboard:
            press_ctrl_c(keyboard, step, "cut")
            run = resume(tmp_path / "cut", threads=2) if attempt else train(tmp_path / "cut", threads=2)
    assert run.finished
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw", "noisy_gating": False}, {"accumulate": 2, "dtype": "float64"}]
)
def test_other_recipes_resume_to_the_bit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    train(tmp_path / "whole", **settings)
    press_ctrl_c(monkeypatch, step, "cut", 4)
    train(tmp_path / "cut", **settings)
    resume(tmp_path / "cut")
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


def test_training_works_in_a_thread_where_no_signal_can_be_caught(tmp_path: Path) -> None:
    results: list[trainer.Trained] = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].finished


def test_a_crash_loses_only_the_steps_since_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: Any) -> None:
        raise Crash

    train(tmp_path / "whole")
    with monkeypatch.context() as fault, pytest.raises(Crash):
        fault.setattr(progress_bar.Bar, "show", lambda _, row: crash() if row["step"] == 5 else None)
        train(tmp_path / "cut")
    assert len(metrics(tmp_path / "cut")) == 5
    assert lasting(tmp_path / "cut")["progress"]["step"] == 4
    resume(tmp_path / "cut")
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


# Resuming


def test_a_finished_run_can_be_continued_to_more_steps(tmp_path: Path) -> None:
    train(tmp_path / "run")
    trained = resume(tmp_path / "run", steps=9, save_every=0)
    assert trained.finished
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 10))
    changed = presets.override(SMALL, {"steps": 9, "save_every": 0})
    assert checkpoint.load_config(tmp_path / "run").recipe == changed.recipe
    assert trained.metrics[-1]["learning_rate"] < trained.metrics[6]["learning_rate"]


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = lasting(tmp_path / "run")
    assert resume(tmp_path / "run").finished
    assert lasting(tmp_path / "run") == before


def test_fewer_steps_than_were_taken_are_refused_and_change_nothing(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="has taken 6 steps already"):
        resume(tmp_path / "run", steps=3)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "value"), [("width", 16), ("learning_rate", 0.1), ("seed", 1), ("batch", 8), ("window", 4), ("typo", 1)]
)
def test_a_resumed_run_cannot_become_another_one(tmp_path: Path, setting: str, value: Any) -> None:
    train(tmp_path / "run", steps=0)
    with pytest.raises(UserError, match=f"{setting} was .* when this run began and cannot become {value}"):
        resume(tmp_path / "run", **{setting: value})


def test_the_settings_a_run_has_may_be_given_again(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=0)
    assert resume(tmp_path / "run", width=8, window=None, learning_rate=3e-3).finished


def test_a_text_that_has_changed_or_is_gone_is_not_resumed_with(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(small_runs.PYRAMID, encoding="utf-8")
    train(tmp_path / "run", corpus.read_files(text), steps=0)
    resume(tmp_path / "run", None)
    text.write_text(small_runs.PYRAMID.replace("stones", "stores"), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(text)) + " has changed since this run began"):
        resume(tmp_path / "run", None)
    text.write_text("Ω" + small_runs.PYRAMID, encoding="utf-8")
    with pytest.raises(UserError, match="has changed since this run began"):
        resume(tmp_path / "run", None)
    text.unlink()
    with pytest.raises(UserError, match="does not exist"):
        resume(tmp_path / "run", None)


def test_a_corpus_made_in_python_must_be_given_again(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=0)
    with pytest.raises(UserError, match="corpus 'small'"):
        resume(tmp_path / "run", None)
    with pytest.raises(UserError, match="has changed"):
        resume(tmp_path / "run", corpus.Corpus("small", {"pyramid": small_runs.PYRAMID}))


def test_a_second_training_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=re.escape(f"continue it with --resume {tmp_path / 'run'}")):
        train(tmp_path / "run", seed=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("left", ["metrics.jsonl", "model.safetensors", "resume.safetensors"])
def test_a_folder_with_the_rest_of_a_run_is_not_trained_into(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_bytes(b"precious")
    with pytest.raises(UserError, match="already holds a run"):
        train(tmp_path)
    assert (tmp_path / left).read_bytes() == b"precious"


def test_a_folder_in_use_is_neither_trained_into_nor_resumed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    train(tmp_path / "run", steps=0)
    (tmp_path / "new").mkdir()
    for folder, begin in ((tmp_path / "run", resume), (tmp_path / "new", train)):
        with checkpoint.locked(folder), pytest.raises(UserError, match="another training run is writing"):
            begin(folder)  # type: ignore[operator]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300), Path("/proc/run")):
        with pytest.raises(UserError, match=re.escape(str(out)) + " cannot be written"):
            train(out)


# What can go wrong


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole")
    with monkeypatch.context() as fault:
        fault.setattr(clipping, "clip", poisoned(clipping.clip, call=6))
        with pytest.raises(UserError, match=r"not a finite number at step 6; the checkpoint of step 4 in .* untouched"):
            train(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 5
    assert resume(tmp_path / "run").finished
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


def poisoned(clip: Any, call: int) -> Any:
    """``clip`` that finds a NaN in the gradient at its ``call``-th call."""
    calls = iter(range(1, 10**6))

    def with_nan(gradient: Any, *settings: Any) -> Any:
        if next(calls) == call:
            gradient[0].flat[0] = np.nan
        return clip(gradient, *settings)

    return with_nan


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_explode_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a finite number at step .*checkpoint of step \d .*lower --learning-rate"):
        train(tmp_path / "run", steps=50, learning_rate=10.0, weight_decay=10.0, warmup=0, clip=0.0)
    assert all(np.isfinite(leaf).all() for leaf in tree.leaves(checkpoint.load_model(tmp_path / "run").params))


@pytest.mark.parametrize("clock", [lambda: 5.0, iter(range(10**6, 0, -1)).__next__], ids=["still", "backwards"])
def test_a_clock_that_stands_still_or_runs_backwards_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    train(tmp_path / "right")
    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setattr("time.time", clock)
    trained = train(tmp_path / "wrong")
    assert lasting(tmp_path / "wrong") == lasting(tmp_path / "right")
    assert all(math.isfinite(row["tokens_per_second"]) and row["seconds"] >= 0 for row in trained.metrics)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "memory_bytes", lambda: 64 * 10**9)
    with pytest.raises(UserError, match=r"46,702,792,704 parameters needs .* GB .*this machine has 64.0 GB"):
        trainer.train("mixtral-8x7b", out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_text_too_short_for_the_context_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the text 'pyramid' has .* tokens, too few for a context of 100000"):
        train(tmp_path / "run", context=100_000)
    assert not (tmp_path / "run").exists()


def test_what_is_no_preset_or_no_corpus_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for preset, text, says in (
        (SMALL.config, CORPUS, "is not a preset: give the name of one"),
        (SMALL, "", "The corpus '' is unknown"),
        (SMALL, Path("text.txt"), "is not a corpus: give the name of one"),
    ):
        with pytest.raises(UserError, match=says):
            trainer.train(preset, corpus=text, out=tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"active_experts": 1}, "active_experts 1 with renormalize on"),
        ({"router": "nosy_top_k"}, "there is no router 'nosy_top_k' .did you mean 'noisy_top_k'"),
        ({"expert_kind": "dense"}, "there is no expert_kind 'dense'"),
    ],
)
def test_routers_and_experts_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_a_number_of_threads_that_makes_no_sense_is_refused(tmp_path: Path, threads: int) -> None:
    with pytest.raises(UserError, match=f"threads {threads} is not a number of threads"):
        train(tmp_path / "run", threads=threads)


def test_another_seed_starts_from_other_weights_and_reads_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[np.ndarray] = []
    cut = step.cut

    def watched(rng: Any, params: Any, batch: Shard, *rest: Any) -> Any:
        read.append(batch.tokens)
        return cut(rng, params, batch, *rest)

    monkeypatch.setattr(step, "cut", watched)
    start = [train(tmp_path / f"start-{n}", steps=0, seed=seed).model.params for n, seed in enumerate((0, 1, 0))]
    tables = [params.embedding.table for params in start]
    assert (tables[0] == tables[2]).all() and not (tables[0] == tables[1]).any()
    orders = []
    for number, seed in enumerate((0, 1, 0)):
        read.clear()
        train(tmp_path / f"run-{number}", steps=3, seed=seed)
        orders.append(np.stack(read))
    assert (orders[0] == orders[2]).all() and not (orders[0] == orders[1]).all()


def test_the_norm_in_the_metrics_is_that_before_clipping(tmp_path: Path) -> None:
    """The weights of the first step do not depend on the clip, so neither does the norm of its gradient."""
    norms = [train(tmp_path / f"{clip}", steps=1, clip=clip).metrics[0]["gradient_norm"] for clip in (0.0, 1e-3)]
    assert norms[0] == norms[1] > 1e-2


def test_a_run_ends_with_an_evaluation_even_where_the_steps_do_not_divide(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", steps=5, evaluate_every=3).metrics
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 5]


OTHER = {  # another value for every setting that may not change on the way
    **{"tokenizer": "byte", "batch": 8, "accumulate": 2, "seed": 1, "clip": 0.5, "dtype": "float64"},
    **{"optimizer": "adamw", "learning_rate": 1e-3, "warmup": 3, "schedule": "linear", "final_rate": 0.5},
    **{"weight_decay": 0.3, "beta1": 0.5, "beta2": 0.5, "momentum": 0.5, "newton_schulz_steps": 5},
    **{"balance_loss": 0.5, "pooled_balance": True, "importance_loss": 0.5, "load_loss": 0.5, "z_loss": 0.5},
    "sequence_loss": 0.5,
    "bias_rate": 0.5,
    "capacity_factor": None,
}


def test_no_setting_that_changes_the_bits_may_change_on_the_way(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", steps=0).folder
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields - OTHER.keys() == set(checkpoint.CHANGEABLE) == {"steps", "evaluate_every", "save_every"}
    for name, value in OTHER.items():
        with pytest.raises(UserError, match=f"{name} was .* and cannot become"):
            resume(folder, **{name: value})


# What is only shown loses no run


class Unwilling:
    """A console that fails, as the one of an editor or a closed one does."""

    encoding = "cp1252"

    def write(self, text: str) -> int:
        raise UnicodeEncodeError("charmap", text, 0, 1, "character maps to <undefined>")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


RUSSIAN = corpus.Corpus("ru", {"сказка": "Жил-был старик со старухой у самого синего моря. " * 12})


@pytest.mark.parametrize("stream", [Unwilling(), None, object(), io.TextIOWrapper(io.BytesIO(), encoding="cp1252")])
def test_a_console_that_cannot_show_a_run_loses_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(run_report, "write", small_runs.WRITE)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    done = trainer.train(SMALL, corpus=RUSSIAN, out=tmp_path / "run", device="cpu", threads=1, progress=True)
    monkeypatch.undo()
    assert done.finished and done.problem is None and len(done.metrics) == SMALL.recipe.steps
    assert "старик" in (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no font"), UserError("loss.png cannot be written"), MemoryError(), KeyboardInterrupt()],
    ids=repr,
)
def test_a_report_that_fails_is_told_and_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run_report, "write", fail)
    done = trainer.train(SMALL, corpus=CORPUS, out=tmp_path / "run", device="cpu", threads=1, progress=True)
    assert done.finished and done.model.step == SMALL.recipe.steps
    assert str(error) in str(done.problem) and str(done.problem).startswith("the run is saved, but")
    assert str(done.problem) in capsys.readouterr().err
    assert checkpoint.load_model(tmp_path / "run").step == SMALL.recipe.steps


def test_metrics_that_vanish_during_a_run_lose_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = progress_bar.Bar.show

    def damage(bar: Any, row: dict[str, Any]) -> None:
        show(bar, row)
        if row["step"] == SMALL.recipe.steps:
            (tmp_path / "run" / "metrics.jsonl").write_bytes(b"{}\n")

    monkeypatch.setattr(progress_bar.Bar, "show", damage)
    done = train(tmp_path / "run")
    assert done.finished and done.metrics == [] and "metrics.jsonl is damaged at line 1" in str(done.problem)


@pytest.mark.parametrize("settings", [{}, {"router": "switch", "active_experts": 1, "optimizer": "adamw"}])
def test_a_program_that_stops_at_underflow_is_not_stopped(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Weights far from the largest and squares of small gradients become 0, which is right."""
    with np.errstate(all="raise"):
        done = train(tmp_path / "run", **settings)
        sharp = tree.map(lambda leaf: leaf * np.float32(50) if leaf.ndim > 1 else leaf, done.model.params)
        ids = done.model.tokenizer.encode(small_runs.PYRAMID[:100])
        goal = Objective(Coefficients(0.1, 0.1, 0.1, 0.1))
        for params in (done.model.params, sharp):
            text_loss.evaluate(params, done.model.config, [ids])
            noise = decoder.draw_noise(np.random.default_rng(0), done.model.config, 1, 8, np.float32)
            shard = Shard(ids[None, :8], ids[None, 1:9], noise)
            _, gradient = objective.loss_and_gradient(params, [shard], done.model.config, goal)
            tiny = tree.map(lambda leaf: leaf * np.float32(1e-25), gradient)
            optimizer.update(params, tiny, optimizer.init(params, done.model.run.recipe), done.model.run.recipe, 0)
            written = generation.generate(params, done.model.config, ids[:9], tokens=12, temperature=0.01, top_p=0.9)
            assert len(list(written)) == 12


@pytest.mark.parametrize("name", ["../../x", "/x", "..", ".", "", "a\0b"])
def test_a_name_cannot_lead_out_of_the_folder_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    if name:
        with pytest.raises(UserError, match="is not the name of a folder in runs/"):
            trainer.train(SMALL, corpus=CORPUS, name=name, device="cpu", threads=1, progress=False)
        assert [path.name for path in tmp_path.rglob("*")] == ["work"]
    else:
        done = trainer.train(SMALL, corpus=CORPUS, name=name, device="cpu", threads=1, progress=False)
        assert done.folder == Path("runs/run")


def test_a_run_whose_text_has_moved_remembers_the_new_place(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(small_runs.PYRAMID, encoding="utf-8")
    train(tmp_path / "run", corpus.read_files(text), steps=1)
    new = text.rename(tmp_path / "new.txt")
    with pytest.raises(UserError, match=r"does not exist: .* give that with --text \(in Python, corpus=\)"):
        resume(tmp_path / "run", None)
    resume(tmp_path / "run", corpus.read_files(new), steps=2)
    assert checkpoint.load_config(tmp_path / "run").source.paths == [str(new)]
    assert resume(tmp_path / "run", None, steps=3).finished


def test_a_model_that_reads_single_tokens_is_trained_and_its_routing_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "write", small_runs.WRITE)
    done = train(tmp_path / "run", context=1)
    assert done.problem is None
    with pytest.raises(UserError, match="its context is 1"):
        microscope.look(done.model, {"text": done.model.tokenizer.encode(small_runs.PYRAMID)})


def test_a_resumed_run_that_cannot_have_its_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", steps=1)
    before = lasting(tmp_path / "run")
    monkeypatch.setattr(resources, "memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match="but this machine has 0 MB"):
        resume(tmp_path / "run", steps=2)
    assert lasting(tmp_path / "run") == before


# Tasks: see test_task.py


def test_a_run_begins_with_a_copy_of_the_parameters_that_it_is_given(tmp_path: Path) -> None:
    given, params = begun()
    before = tree.map(np.copy, params)
    done = trainer.start(given, copying(given), params, out=tmp_path / "run", device="cpu", threads=1, progress=False)
    for mine, other in zip(tree.leaves(params), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(mine, other)
    first = start(tmp_path / "still", steps=0).model
    for mine, other in zip(tree.leaves(first.params), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert [row["tokens"] for row in done.metrics[:2]] == [22, 44], "padding is no token"


def test_a_run_with_patience_keeps_its_best_model_on_the_disk(tmp_path: Path) -> None:
    given, params = begun(steps=8)
    made = copying(given, (3.0, 2.0, 2.5, 2.6), patience=4)
    done = trainer.start(given, made, params, out=tmp_path / "run", device="cpu", threads=1, progress=False)
    assert done.finished and done.model.step == checkpoint.load_model(tmp_path / "run").step == 4
    progress = lasting(tmp_path / "run")["progress"]
    assert progress["step"] == 8, "what a resumed run needs is that of the last step"
