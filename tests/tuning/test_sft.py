"""Supervised fine-tuning: what is learned, what is frozen, what is validated, and how a run goes on."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import finished, lasting

from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.losses import cross_entropy, objective
from minimoe.losses.objective import Objective, Shard
from minimoe.storage import checkpoint, huggingface, metrics, open_model
from minimoe.text import chat, instructions
from minimoe.text.tokenizer import ChatTokenizer
from minimoe.training import step
from minimoe.training.trainer import Trained
from minimoe.tuning import answers, grow, packing, resume, sft

LETTERS = "adeilmnopst"  # which the small runs know


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("minimoe.draw.plots.save", lambda figure, path: None)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instructions of two kinds that the model of the small runs can read: its context is 8 tokens."""
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    rows = []
    for n in range(60):
        number, word = f"{n % 10}", LETTERS[n % 11] + LETTERS[n % 7]
        turns = [["user", number], ["assistant", f"{(n + 1) % 10}"]]
        rows.append({"kind": "next", "document": f"next {n}", "turns": turns})
        rows.append({"kind": "copy", "document": f"copy {n}", "turns": [["user", word], ["assistant", word]]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


QUICK: dict[str, Any] = {"steps": 6, "batch": 2, "evaluate_every": 3, "save_every": 2, "capacity_factor": None}


def tune(out: Path, lines: Path, **given: Any) -> Trained:
    changes = QUICK | given.pop("changes", {})
    folder = given.pop("folder", finished())
    return sft.tune(folder, data=lines, out=out, changes=changes, device="cpu", threads=1, progress=False, **given)


# The loss


CONFIG = ModelConfig(
    vocab_size=13, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=12, experts=3, expert_width=6,
    router="switch", active_experts=1,
)  # fmt: skip


def conversations(rng: np.random.Generator, lengths: list[int]) -> list[chat.Encoded]:
    made = []
    for length in lengths:
        answer = np.arange(length) >= rng.integers(1, length)
        made.append(chat.Encoded(rng.integers(13, size=length).astype(np.int32), answer))
    return made


def gradient(params: Any, shards: list[Shard], goal: Objective) -> tuple[float, Any]:
    totals, found = objective.loss_and_gradient(params, shards, CONFIG_OF_TEST, goal)
    return float(totals.total), found


CONFIG_OF_TEST = dataclasses.replace(CONFIG, router="noisy_top_k", active_experts=2, noisy_gating=False)


@pytest.fixture
def params(rng: np.random.Generator) -> Any:
    return tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape), decoder.init(rng, CONFIG_OF_TEST, float))


@pytest.mark.parametrize("packed", [True, False])
def test_packed_or_padded_the_loss_and_every_gradient_are_those_of_each_alone(
    rng: np.random.Generator, params: Any, packed: bool
) -> None:
    """With the balance loss, which counts the tokens of all questions and answers, and no padding."""
    goal = step.objective_of(CONFIG_OF_TEST, presets.preset("toy").recipe)
    made = conversations(rng, [4, 7, 3, 9, 2, 5])
    rows = [[0, 1, 2], [3, 4], [5]] if packed else [[n] for n in range(6)]
    together = packing.shard_of([[made[n] for n in row] for row in rows], packed)
    alone = [packing.shard_of([[one]], packed=False) for one in made]
    loss, found = gradient(params, [together], goal)
    expected_loss, expected = gradient(params, alone, goal)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for (name, mine), other in zip(tree.named_leaves(found), tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12, err_msg=name)
    if packed:
        leaking, _ = gradient(params, [together._replace(starts=None)], goal)
        assert abs(leaking - loss) > 1e-4, "without starts, the documents read each other"


def test_only_answers_and_their_ends_are_learned(rng: np.random.Generator, params: Any) -> None:
    made = conversations(rng, [6, 8])
    shard = packing.shard_of([[one] for one in made], packed=False)
    logits = decoder.forward(params, shard.tokens, CONFIG_OF_TEST).logits
    nats = [
        float(cross_entropy.forward(logits[row, place - 1], one.ids[place : place + 1])[0].total)
        for row, one in enumerate(made)
        for place in np.flatnonzero(one.answer)
    ]
    loss, _ = gradient(params, [shard], Objective())
    assert loss == pytest.approx(np.mean(nats), rel=1e-12)


def test_questions_are_balanced_though_they_are_not_learned(rng: np.random.Generator, params: Any) -> None:
    """The loss mask must not reach the routers: the sums over tokens are those of every token but padding."""
    shard = packing.shard_of([[one] for one in conversations(rng, [5, 9])], packed=False)
    done = objective.forward(params, shard, CONFIG_OF_TEST, Objective())
    assert [float(layer.tokens) for layer in done.sums.stats] == [4 + 8] * 2


def test_micro_batches_of_unequal_length_give_the_gradient_of_one_batch(rng: np.random.Generator, params: Any) -> None:
    goal = step.objective_of(CONFIG_OF_TEST, presets.preset("toy").recipe)
    shard = packing.shard_of([[one] for one in conversations(rng, [3, 12, 4, 7])], packed=False)
    whole, expected = gradient(params, [shard], goal)
    parts = [tree.map(lambda leaf, rows=rows: leaf[rows], shard) for rows in ([0], [1, 2], [3])]
    loss, found = gradient(params, parts, goal)
    assert loss == pytest.approx(whole, rel=1e-12)
    for mine, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-13)


def test_a_batch_without_any_target_has_a_gradient_of_zero(rng: np.random.Generator, params: Any) -> None:
    shard = packing.shard_of([[one] for one in conversations(rng, [5, 6])], packed=False)
    assert shard.loss_mask is not None
    loss, found = gradient(params, [shard._replace(loss_mask=0 * shard.loss_mask)], Objective())
    assert loss == 0
    assert all((leaf == 0).all() for leaf in tree.leaves(found))


# Runs


def test_a_tuned_run_is_a_run_that_answers(tmp_path: Path, lines: Path) -> None:
    done = tune(
        tmp_path / "run", lines, changes={"steps": 150, "learning_rate": 0.02, "evaluate_every": 30, "batch": 8}
    )
    assert done.finished and done.problem is None
    model = open_model.load(tmp_path / "run")
    assert isinstance(model.tokenizer, ChatTokenizer)
    assert model.end_tokens == chat.end_ids(model.tokenizer)
    base = checkpoint.load_config(finished())
    assert model.config.vocab_size == base.config.vocab_size + 4
    assert dataclasses.replace(model.config, vocab_size=base.config.vocab_size) == base.config
    rows = metrics.read(tmp_path / "run")
    measured = [row for row in rows if "val_loss" in row]
    assert measured[-1]["val_loss"] < measured[0]["val_loss"]
    assert all(set(row["val_loss_by_kind"]) == {"copy", "next"} for row in measured)
    _, validation = instructions.split(instructions.read(lines))
    following = [item for item in validation if item.kind == "next"]
    score = answers.score(model, following)["next"]
    assert score.right > score.asked / 2
    said = (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")
    assert f"next: {score.right} of {score.asked}" in said


def test_the_validation_is_the_mean_over_the_tokens_of_all_answers(tmp_path: Path, lines: Path) -> None:
    done = tune(tmp_path / "run", lines)
    model, row = done.model, done.metrics[-1]
    _, held_out = instructions.split(instructions.read(lines))
    nats: dict[str, list[float]] = {"next": [], "copy": []}
    for item in held_out:
        ids, answer = chat.encode(model.tokenizer, item.turns)
        logits = decoder.forward(model.params, ids[None, :-1], model.config).logits[0]
        for place in np.flatnonzero(answer):
            loss, _ = cross_entropy.forward(logits[place - 1], ids[place : place + 1])
            nats[item.kind].append(float(loss.total))
    assert row["val_loss"] == pytest.approx(np.mean(nats["next"] + nats["copy"]), rel=1e-5)
    for kind, values in nats.items():
        assert row["val_loss_by_kind"][kind] == pytest.approx(np.mean(values), abs=1e-4)


def test_frozen_parts_stay_to_the_bit(tmp_path: Path, lines: Path) -> None:
    done = tune(tmp_path / "run", lines, freeze=["router", "experts"])
    before = dict(tree.named_leaves(checkpoint.load_model(finished()).params))
    for name, leaf in tree.named_leaves(done.model.params):
        if "embedding" in name or "head" in name:
            continue
        assert (leaf == before[name]).all() == (".moe." in name), name
    assert checkpoint.load_config(tmp_path / "run").frozen == tuple(name for name in before if ".moe." in name)


def test_every_leaf_belongs_to_one_group() -> None:
    shared = dataclasses.replace(CONFIG, shared_experts=2)
    params = decoder.init(np.random.default_rng(0), shared)
    groups = [set(sft.leaves_of(params, [group])) for group in sft.GROUPS]
    names = [name for name, _ in tree.named_leaves(params)]
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert all("norm" in name for name in sft.leaves_of(params, ["norms"]))


@pytest.mark.parametrize("stops_at", [2, 5])
def test_it_resumes_to_the_bit(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int) -> None:
    settings: dict[str, Any] = {"freeze": ["router"], "changes": {"steps": 8}}
    tune(tmp_path / "whole", lines, **settings)
    original, calls = step.cut, iter(range(1, 100))

    def pressed(*arguments: Any) -> Any:
        if next(calls) == stops_at:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as keyboard:
        keyboard.setattr(step, "cut", pressed)
        assert not tune(tmp_path / "cut", lines, **settings).finished
    assert resume.resume(tmp_path / "cut", device="cpu", threads=1, progress=False).finished
    one, other = lasting(tmp_path / "cut"), lasting(tmp_path / "whole")
    assert one == other


def test_a_run_whose_instructions_changed_does_not_go_on(tmp_path: Path, lines: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(lines.read_text())
    tune(tmp_path / "run", mine, changes={"steps": 2})
    mine.write_text(lines.read_text().replace("ad", "da"))
    with pytest.raises(UserError, match="changed since this run began"):
        resume.resume(tmp_path / "run", changes={"steps": 3}, progress=False)


def test_answers_that_the_context_cuts_are_counted(lines: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.jsonl"
    rows = [
        {"kind": "long", "document": f"{n}", "turns": [["user", "a" * length], ["assistant", "ddd"]]}
        for n in range(40)
        for length in (1, 3, 9)  # begin, user, …, assistant, d, d, d, end: 8, 10 and 16 tokens; 9 have room
    ]
    longer.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = checkpoint.load_model(finished())
    codec = ChatTokenizer(model.tokenizer)  # type: ignore[arg-type]
    found = sft.read(codec, model.config, longer)
    assert (found.cut, found.lost) == (40, 40)
    assert len(found.train) + len(found.validation) == 80
    assert len(found.items) == len(found.validation)
    assert max(len(example.ids.ids) for example in found.train) == 9
    said = sft._about(found, packing.Batches([one.ids for one in found.train], 8, 2, True))
    assert "no room for the end of 40 answers, which are cut, and for 40 answers at all" in said


def test_a_mixtral_folder_keeps_its_tokenizer_and_becomes_one_again(tmp_path: Path, lines: Path) -> None:
    pytest.importorskip("tokenizers")
    model = checkpoint.load_model(finished())
    codec = ChatTokenizer(model.tokenizer)  # type: ignore[arg-type]
    params, config = grow.vocabulary(model.params, model.config, codec.vocab_size, np.random.default_rng(0))
    huggingface.save(tmp_path / "base", params, config, codec, chat.end_ids(codec))
    assert tune(tmp_path / "run", lines, folder=tmp_path / "base").problem is None
    here, there = open_model.load(tmp_path / "run"), open_model.load(tmp_path / "run" / sft.MIXTRAL)
    assert here.tokenizer.encode("5 steps").tolist() == codec.encode("5 steps").tolist()
    assert here.config.vocab_size == config.vocab_size, "it has ids for a chat already"
    assert here.end_tokens == there.end_tokens == chat.end_ids(codec)
    for mine, other in zip(tree.leaves(here.params), tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert answers.write(here, [[chat.Turn("user", "5")]]) == answers.write(there, [[chat.Turn("user", "5")]])
    tokenizer = tmp_path / "run" / "tokenizer.json"
    resume.resume(tmp_path / "run", device="cpu", threads=1, changes={"steps": 7}, progress=False)
    assert checkpoint.load_model(tmp_path / "run").step <= 7
    tokenizer.write_text(tokenizer.read_text().replace('"a"', '"z"'))
    with pytest.raises(UserError, match="is not the one that the run began with"):
        open_model.load(tmp_path / "run")


# Mistakes


def test_what_cannot_be_tuned_is_refused(tmp_path: Path, lines: Path) -> None:
    def refused(says: str, **given: Any) -> None:
        with pytest.raises(UserError, match=says):
            tune(tmp_path / "run", lines, **given)
        assert not (tmp_path / "run").exists()

    refused("no part 'routers' to freeze", freeze=["routers"])
    refused("nothing is left to learn", freeze=list(sft.GROUPS))
    refused("patience 0 is not a number", patience=0)
    refused("no setting 'stepz'", changes={"stepz": 3})
    refused("pack 'no' is no answer", pack="no")
    refused("count it per sequence", changes={"capacity_factor": 1.0}, pack=True)
    refused("sequence_loss 0.1 balances .* within each sequence", changes={"sequence_loss": 0.1}, pack=True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="is empty"):
        tune(tmp_path / "run", empty)


def test_experts_with_a_capacity_are_padded_unless_told_otherwise(tmp_path: Path, lines: Path) -> None:
    done = tune(tmp_path / "run", lines, changes={"capacity_factor": 1.0})
    assert done.model.run.tuning is not None and done.model.run.tuning.settings["pack"] is False
    switch = dataclasses.replace(done.model.config, router="switch", active_experts=1)
    recipe = dataclasses.replace(done.model.run.recipe, capacity_factor=None)
    assert not sft._packs(switch, recipe, None) and sft._packs(done.model.config, recipe, None)
    assert not sft._packs(done.model.config, dataclasses.replace(recipe, sequence_loss=0.1), None)


def test_the_defaults_and_the_groups_are_those_of_the_command_line() -> None:
    from minimoe.cli import options

    assert tuple(sft.GROUPS) == options.SFT_GROUPS


def test_a_run_reads_only_what_is_not_held_out(lines: Path) -> None:
    model = checkpoint.load_model(finished())
    codec = ChatTokenizer(model.tokenizer)  # type: ignore[arg-type]
    params, config = grow.vocabulary(model.params, model.config, codec.vocab_size, np.random.default_rng(0))
    found = sft.read(codec, config, lines)
    settings = {"pack": True, "patience": None}
    run = model.run._replace(config=config, tokenizer=codec, tuning=checkpoint.Tuning("sft", settings))
    made, learned = sft._task(run, found), sum(len(example.ids.ids) - 1 for example in found.train)
    rows = packing.Batches([example.ids for example in found.train], 8, 4, True, run.recipe.seed).per_epoch()
    shards = made.batches(0)
    read = [next(shards) for _ in range(int(rows))]
    assert sum(int(shard.mask.sum()) for shard in read) <= learned  # type: ignore[union-attr]
    held_out = {example.ids.ids.tobytes() for example in found.validation if example.kind == "copy"}
    seen = {
        np.append(shard.tokens[b, start : start + 7], shard.targets[b, start + 6]).astype(np.int32).tobytes()
        for shard in read
        for b in range(len(shard.tokens))
        for start in set(shard.starts[b].tolist())  # type: ignore[index]
        if start + 6 < shard.tokens.shape[1]
    }
    assert held_out and not held_out & seen
    assert {example.ids.ids.tobytes() for example in found.train if example.kind == "copy"} & seen
