"""Runs that train adapters: what learns, what a folder holds, dropout that knows its step, and resuming to the bit."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import finished, lasting

from minimoe.core import files, tree
from minimoe.core.errors import UserError
from minimoe.inference import generation
from minimoe.layers import lora
from minimoe.losses.objective import Shard
from minimoe.storage import checkpoint, huggingface, open_model
from minimoe.text import chat
from minimoe.text.tokenizer import ChatTokenizer
from minimoe.training import step
from minimoe.training.trainer import Trained
from minimoe.tuning import adapter_files, adapters, grow, lora_run, resume, sft
from minimoe.tuning.lora_run import Lora


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("minimoe.draw.plots.save", lambda figure, path: None)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting, in the letters and within the context of the small runs."""
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    rows = [
        {"kind": "next", "document": f"{n}", "turns": [["user", f"{n % 10}"], ["assistant", f"{(n + 1) % 10}"]]}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


THREE = Lora(3)
QUICK: dict[str, Any] = {"steps": 6, "batch": 2, "evaluate_every": 3, "save_every": 2, "capacity_factor": None}


def tune(out: Path, lines: Path, settings: Lora = THREE, threads: int = 1, **given: Any) -> Trained:
    changes = QUICK | given.pop("changes", {})
    return sft.tune(
        given.pop("folder", finished()),
        data=lines,
        out=out,
        lora=settings,
        changes=changes,
        device="cpu",
        threads=threads,
        progress=False,
        **given,
    )


def test_adapters_learn_and_so_does_the_table_that_has_grown(tmp_path: Path, lines: Path) -> None:
    done = tune(tmp_path / "run", lines, patience=None)
    before, after = checkpoint.load_model(finished()).params, lora_run.of_run(tmp_path / "run")
    start = dict(tree.named_leaves(before))
    weights = adapters.adapted_weights(after)
    assert len(weights) == 2 * 7
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.base, start[name])
        assert weight.b.any() and weight.a.shape[-1] == 3
    for name, leaf in tree.named_leaves(after):
        if name in start:
            grown = name in ("embedding.table", "head.weight")
            assert grown or np.array_equal(leaf, start[name]), f"{name} has changed"
            assert not grown or leaf.shape != start[name].shape
    run = checkpoint.load_config(tmp_path / "run")
    free = {name for name, _ in tree.named_leaves(after)} - set(run.frozen)
    assert free == adapters.trainable(after) | {"embedding.table", "head.weight"}
    for mine, theirs in zip(tree.leaves(adapters.merge(after)), tree.leaves(done.model.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_with_a_frozen_embedding_the_adapters_alone_learn(tmp_path: Path, lines: Path) -> None:
    tune(tmp_path / "run", lines, freeze=["embedding", "experts"])
    params = lora_run.of_run(tmp_path / "run")
    run = checkpoint.load_config(tmp_path / "run")
    assert {name for name, _ in tree.named_leaves(params)} - set(run.frozen) == adapters.trainable(params)
    assert all(".attention." in name for name in adapters.trainable(params))


@pytest.mark.parametrize("scheme", [None, "nf4", "int8"])
def test_a_run_learns_and_opens_as_any_other(tmp_path: Path, lines: Path, scheme: str | None) -> None:
    settings = Lora(4, dropout=0.1, quantize=scheme)
    changes = {"steps": 40, "learning_rate": 0.03, "evaluate_every": 20, "batch": 8}
    done = tune(tmp_path / "run", lines, settings, changes=changes)
    assert done.finished and done.problem is None
    losses = [row["val_loss"] for row in done.metrics if "val_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    model = open_model.load(tmp_path / "run")
    assert not adapters.adapted_leaves(model.params)
    assert len(list(generation.generate(model.params, model.config, [1, 2], tokens=5))) == 5
    kinds = {type(w.base).__name__ for w in adapters.adapted_weights(lora_run.of_run(tmp_path / "run")).values()}
    assert kinds == {{"nf4": "NF4", "int8": "Int8", None: "ndarray"}[scheme]}


@pytest.mark.parametrize("settings", [Lora(2, dropout=0.3), Lora(2, alpha=3, stabilized=True, quantize="nf4")])
def test_it_resumes_to_the_bit(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch, settings: Lora) -> None:
    tune(tmp_path / "whole", lines, settings)
    original, calls = step.cut, iter(range(1, 100))

    def pressed(*arguments: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("minimoe.training.step.cut", pressed)
        assert not tune(tmp_path / "cut", lines, settings).finished
    assert resume.resume(tmp_path / "cut", device="cpu", threads=1, progress=False).finished
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


def test_several_workers_take_the_same_steps(tmp_path: Path, lines: Path) -> None:
    settings = Lora(2, dropout=0.3)
    for threads in (1, 2):
        tune(tmp_path / f"{threads}", lines, settings, threads=threads, patience=None)
    alone, two = (lora_run.of_run(tmp_path / name) for name in "12")
    for (name, mine), theirs in zip(tree.named_leaves(alone), tree.leaves(two), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=name)


def test_dropout_depends_on_the_step_and_nothing_else(tmp_path: Path, lines: Path) -> None:
    tune(tmp_path / "run", lines, Lora(2, dropout=0.5))
    run = checkpoint.load_config(tmp_path / "run")

    def read(first: int) -> Iterator[Shard]:
        while True:
            yield Shard(np.zeros((1, 1), int), np.zeros((1, 1), int))

    def masks(first: int, count: int) -> list[Any]:
        batches = lora_run.with_dropout(read, run, ())(first)
        return [np.concatenate([mask.ravel() for mask in next(batches).dropout or []]) for _ in range(count)]

    all_of, later = masks(0, 6), masks(4, 2)
    np.testing.assert_array_equal(all_of[4:], later)
    assert not np.array_equal(all_of[0], all_of[1])
    shapes = [w.a.shape[:-1] for w in adapters.adapted_weights(lora_run.of_run(tmp_path / "run")).values()]
    assert sum(int(np.prod(shape)) for shape in shapes) == len(all_of[0])
    assert set(np.unique(all_of)) == {0.0, 2.0}
    fewer = next(lora_run.with_dropout(read, run, ["experts"])(0)).dropout
    assert fewer is not None and len(fewer) == 2 * 4


def test_adapters_apart_are_those_of_the_best_model(tmp_path: Path, lines: Path) -> None:
    changes = {"steps": 8, "evaluate_every": 2, "learning_rate": 3.0, "warmup": 4}  # the first steps are small
    done = tune(tmp_path / "run", lines, Lora(2, quantize="nf4"), changes=changes)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 0 < done.model.step < last
    best = lora_run.of_run(tmp_path / "run")
    for mine, theirs in zip(tree.leaves(adapters.merge(best)), tree.leaves(done.model.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    path = tmp_path / "run" / checkpoint.ADAPTERS
    tensors, metadata = files.read_tensors(path)
    files.write_tensors(path, tensors, metadata | {"step": "1"})
    with pytest.raises(UserError, match="is that of step 1, but .* was stopped while it saved them"):
        lora_run.of_run(tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match="adapters.safetensors is missing"):
        lora_run.of_run(tmp_path / "run")


def test_the_adapter_of_a_run_can_be_written_for_peft(tmp_path: Path, lines: Path) -> None:
    tune(tmp_path / "run", lines, patience=None)
    params, config = lora_run.of_run(tmp_path / "run"), checkpoint.load_config(tmp_path / "run").config
    adapter_files.save(tmp_path / "adapter", params, config)
    plain = lora.replace(params, lambda weight: weight.base)
    again = adapter_files.load(tmp_path / "adapter", plain, config)
    for mine, theirs in zip(tree.leaves(params), tree.leaves(again), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_in_a_mixtral_folder_that_has_its_tokens_the_adapters_alone_learn(tmp_path: Path, lines: Path) -> None:
    pytest.importorskip("tokenizers")
    model = checkpoint.load_model(finished())
    codec = ChatTokenizer(model.tokenizer)  # type: ignore[arg-type]
    params, config = grow.vocabulary(model.params, model.config, codec.vocab_size, np.random.default_rng(0))
    huggingface.save(tmp_path / "base", params, config, codec, chat.end_ids(codec))
    tune(tmp_path / "run", lines, folder=tmp_path / "base")
    learned = lora_run.of_run(tmp_path / "run")
    run = checkpoint.load_config(tmp_path / "run")
    assert {name for name, _ in tree.named_leaves(learned)} - set(run.frozen) == adapters.trainable(learned)
    np.testing.assert_array_equal(learned.embedding.table, params.embedding.table)
    assert all(weight.b.any() for weight in adapters.adapted_weights(learned).values())


def test_the_settings_reach_every_adapter(tmp_path: Path, lines: Path) -> None:
    tune(tmp_path / "run", lines, Lora(4, alpha=6, stabilized=True))
    for weight in adapters.adapted_weights(lora_run.of_run(tmp_path / "run")).values():
        assert weight.a.shape[-1] == 4 and (weight.scale == 3).all()


def test_what_is_not_possible_is_refused(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(says: str, settings: Lora = THREE, **given: Any) -> None:
        with pytest.raises(UserError, match=says):
            tune(tmp_path / "run", lines, settings, **given)
        assert not (tmp_path / "run").exists()

    refused("rank 0 is not possible", Lora(0))
    refused("rank 9 does not suit", Lora(9))
    refused(r"dropout 1\.5 is not possible", Lora(2, dropout=1.5))
    refused("alpha -1 is not possible", Lora(2, alpha=-1))
    refused("'nf3'", Lora(2, quantize="nf3"))
    refused("attention and experts are all frozen", freeze=["experts", "attention"])
    monkeypatch.setattr("minimoe.tuning.lora_run.select_device", lambda device: "gpu")
    refused("but the run is on a GPU: give --device cpu", Lora(2, quantize="nf4"))
    with pytest.raises(UserError, match="has no adapters: give the folder of a run that was tuned with --lora"):
        lora_run.of_run(finished())
