"""Runs that learn preferences: where they begin, what their reference is, what is measured, and how they go on."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import finished, lasting
from tokenizer_json import mixtral_like

from minimoe.cli import main
from minimoe.cli import options as cli_options
from minimoe.core import files, presets, tree
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.losses import preference
from minimoe.losses.balance import Coefficients
from minimoe.losses.preference import Preference
from minimoe.storage import checkpoint, huggingface, open_model, quantized
from minimoe.text import instructions
from minimoe.training.trainer import Trained
from minimoe.tuning import dpo, pairs, resume, sft

LETTERS = "adeilmnopst"  # which the small runs know


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("minimoe.draw.plots.save", lambda figure, path: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has begun to answer: its context is 8 tokens."""
    folder = tmp_path_factory.mktemp("base")
    rows = [
        {"kind": "copy", "document": f"{n}", "turns": [["user", LETTERS[n % 11]], ["assistant", LETTERS[n % 11]]]}
        for n in range(60)
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"steps": 2, "batch": 4, "evaluate_every": 0, "save_every": 0, "capacity_factor": None}
    given: dict[str, Any] = {"device": "cpu", "threads": 1, "progress": False}
    sft.tune(finished(), data=folder / "lines.jsonl", out=folder / "run", changes=changes, patience=None, **given)
    return folder / "run"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of pairs: one letter is better than three, and the letter that was asked for better than another."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for n in range(60):
        letter, other = LETTERS[n % 11], LETTERS[(n + 3) % 11]
        asked = [["user", letter]]
        rows.append({"kind": "short", "document": f"{n}", "prompt": asked, "chosen": letter, "rejected": letter * 3})
        rows.append({"kind": "right", "document": f"{n}", "prompt": asked, "chosen": letter, "rejected": other})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


QUICK: dict[str, Any] = {"steps": 6, "batch": 8, "evaluate_every": 3, "save_every": 2, "learning_rate": 1e-2}


def tune(out: Path, lines: Path, folder: Path, **given: Any) -> Trained:
    changes = QUICK | given.pop("changes", {})
    return dpo.tune(folder, data=lines, out=out, changes=changes, device="cpu", threads=1, progress=False, **given)


# Where it begins


@pytest.mark.parametrize("kind", preference.KINDS)
def test_the_first_step_begins_at_the_reference_and_the_last_prefers_what_was_chosen(
    tmp_path: Path, lines: Path, base: Path, kind: str
) -> None:
    loss = Preference(kind, beta=0.5)
    done = tune(tmp_path / "run", lines, base, loss=loss, patience=None, changes={"steps": 40, "save_every": 0})
    assert done.finished and done.problem is None
    first, last = done.metrics[0], done.metrics[-1]
    if kind == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    if kind == "ipo":
        assert first["loss"] == pytest.approx(1.0, abs=1e-4)  # (1/2β)²
    if kind != "simpo":
        assert abs(first["margin"]) < 1e-4
    assert first["gradient_norm"] > 1e-3, "at the reference, the gradient is not zero"
    assert first["total"] == first["loss"], "no auxiliary loss unless it is asked for"
    assert last["loss"] < first["loss"]
    assert last["val_margin"] > 0.1
    assert last["val_accuracy"] > 0.7
    assert (tmp_path / "run" / dpo.REFERENCE).exists() == (kind != "simpo")
    assert "margin" in (tmp_path / "run" / "sample.txt").read_text("utf-8")


def test_the_reference_is_what_the_base_gives_to_every_answer(tmp_path: Path, lines: Path, base: Path) -> None:
    tune(tmp_path / "run", lines, base, changes={"steps": 1})
    stored, about = files.read_tensors(tmp_path / "run" / dpo.REFERENCE)
    model = open_model.load(base)
    found = pairs.read(model.tokenizer, model.config, lines)
    assert about == {"pairs": found.sha256}
    assert {name: part.shape for name, part in stored.items()} == {
        "train": (len(found.train), 2),
        "validation": (len(found.validation), 2),
    }
    for name, examples in (("train", found.train[:7]), ("validation", found.validation)):
        for number, example in enumerate(examples):
            for side, (ids, answer) in enumerate((example.chosen, example.rejected)):
                z = decoder.forward(model.params, ids[None, :-1], model.config).logits[0].astype(np.float64)
                logp = z[np.arange(len(z)), ids[1:]] - np.log(np.exp(z).sum(1))
                assert stored[name][number, side] == pytest.approx(logp[answer[1:]].sum(), rel=1e-4)


def test_neither_noise_nor_a_capacity_part_policy_and_reference(tmp_path: Path, lines: Path, base: Path) -> None:
    """The small runs have noisy routers and a capacity, and a Switch has one of its own."""
    run = checkpoint.load_config(base)
    assert run.config.noisy_gating
    switch = dpo._objective(presets.preset("toy").config, TrainConfig(), Preference())
    assert switch.capacity_factor is None
    for router in ("switch", "gshard"):
        config = type(run.config)(router=router, experts=6, active_experts=1 if router == "switch" else 2)
        assert dpo._objective(config, TrainConfig(), Preference()).capacity_factor == 6
    changes = {"steps": 1, "learning_rate": 0.0}
    done = tune(tmp_path / "run", lines, base, changes=changes)
    assert abs(done.metrics[0]["val_margin"]) < 1e-5
    assert done.metrics[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(UserError, match=r"capacity_factor \(1.5\).*leave it out"):
        tune(tmp_path / "other", lines, base, changes={"capacity_factor": 1.5})


def test_an_auxiliary_loss_is_added_only_if_it_is_asked_for(tmp_path: Path, lines: Path, base: Path) -> None:
    plain = dpo._objective(presets.preset("toy").config, dpo._recipe(TrainConfig(), {}), Preference())
    assert plain.coefficients == Coefficients(), "not even that of the run that it begins with"
    done = tune(tmp_path / "run", lines, base, changes={"steps": 1, "balance_loss": 0.5})
    row = done.metrics[0]
    assert row["total"] == pytest.approx(row["loss"] + 0.5 * sum(row["auxiliary"]["balance"]), rel=1e-5)


# What it measures


def test_measures_are_those_of_the_loss_for_all_and_for_each_kind(tmp_path: Path, lines: Path, base: Path) -> None:
    loss = Preference("dpo", beta=0.3)
    done = tune(tmp_path / "run", lines, base, loss=loss, patience=None)
    found = pairs.read(done.model.tokenizer, done.model.config, lines)
    reference = files.read_tensors(tmp_path / "run" / dpo.REFERENCE)[0]["validation"]
    sums = dpo.sums_of(done.model.params, done.model.config, found.validation, loss, reference)
    expected = preference.measures(loss, sums)
    last = done.metrics[-1]
    for name, value in expected._asdict().items():
        assert last[f"val_{name}"] == pytest.approx(value, abs=2e-5), name
    assert set(expected._fields) <= last.keys()
    by_kind = dpo.by_kind(done.model.params, done.model.config, found.validation, loss, reference)
    counts = {kind: sum(one.kind == kind for one in found.validation) for kind in by_kind}
    assert counts.keys() == {"right", "short"}
    mean = sum(by_kind[kind].margin * count for kind, count in counts.items()) / len(found.validation)
    assert mean == pytest.approx(expected.margin, rel=1e-5)
    assert by_kind["right"].margin != pytest.approx(by_kind["short"].margin, rel=0.01)


def test_sums_come_in_the_order_of_the_pairs(lines: Path, base: Path) -> None:
    model = open_model.load(base)
    some = pairs.read(model.tokenizer, model.config, lines).train[:21]
    whole = dpo.sums_of(model.params, model.config, some)
    for number in (0, 7, 20):
        alone = dpo.sums_of(model.params, model.config, some[number : number + 1])
        np.testing.assert_allclose(whole.logp[number], alone.logp[0], rtol=1e-4)
        np.testing.assert_array_equal(whole.length[number], alone.length[0])


def test_the_best_model_is_kept(tmp_path: Path, lines: Path, base: Path) -> None:
    """A learning rate that is far too high: the loss of the held-out pairs rises after some steps."""
    changes = {"steps": 60, "learning_rate": 0.3, "evaluate_every": 2, "warmup": 0, "schedule": "linear"}
    done = tune(tmp_path / "run", lines, base, patience=3, changes=changes)
    measured = [(row["val_loss"], row["step"]) for row in done.metrics if "val_loss" in row]
    assert done.model.step == min(measured)[1]
    assert checkpoint.load_model(tmp_path / "run").step == done.model.step


# What it refuses


def test_a_model_that_has_not_learned_to_answer_is_refused(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(UserError, match="no tokens for a chat.*minimoe sft"):
        tune(tmp_path / "run", lines, finished())
    assert not (tmp_path / "run").exists()


def test_a_mixtral_is_tuned_with_its_own_tokens_or_says_why_it_cannot_be(tmp_path: Path) -> None:
    config = dataclasses.replace(presets.preset("tiny").config, vocab_size=275, width=8, context=32)
    folder = tmp_path / "mixtral"
    huggingface.save(folder, decoder.init(np.random.default_rng(0), config), config)
    rows = [
        {"kind": "k", "document": f"{n}", "prompt": [["user", "the bread"]], "chosen": "the", "rejected": "bread"}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="tokenizer"):
        tune(tmp_path / "none", tmp_path / "pairs.jsonl", folder)
    (folder / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    done = tune(tmp_path / "run", tmp_path / "pairs.jsonl", folder, changes={"steps": 20})
    assert done.finished and done.metrics[-1]["val_margin"] > done.metrics[0]["margin"]
    assert resumed(tmp_path / "run", steps=21).problem is None
    here, there = open_model.load(tmp_path / "run"), open_model.load(tmp_path / "run" / sft.MIXTRAL)
    for mine, theirs in zip(tree.leaves(here.params), tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_loss_of_another_type_is_refused(tmp_path: Path, lines: Path, base: Path) -> None:
    for loss, says in (("ipo", "loss 'ipo' is not a Preference"), (Preference("dpo", "x"), "beta 'x' is not a number")):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=says):
            tune(tmp_path / "run", lines, base, loss=loss)


def test_a_quantised_model_is_refused(tmp_path: Path, lines: Path, base: Path) -> None:
    quantized.write(base, tmp_path / "small", "int8")
    with pytest.raises(UserError, match="quantised and cannot be tuned"):
        tune(tmp_path / "run", lines, tmp_path / "small")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"changes": {"batch": 7}}, "batch 7 cannot be divided into pairs"),
        ({"changes": {"speed": 7}}, "no setting 'speed'"),
        ({"loss": Preference("dpo", beta=-1.0)}, "beta -1.0"),
        ({"patience": 0}, "patience 0"),
        ({"freeze": ["head"]}, "no part 'head'"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_written(
    tmp_path: Path, lines: Path, base: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        tune(tmp_path / "run", lines, base, **given)
    assert not (tmp_path / "run").exists()


# How it goes on


def test_frozen_parts_stay_as_they_are(tmp_path: Path, lines: Path, base: Path) -> None:
    done = tune(tmp_path / "run", lines, base, freeze=["experts", "embedding"], patience=None)
    before = open_model.load(base).params
    np.testing.assert_array_equal(done.model.params.embedding.table, before.embedding.table)
    np.testing.assert_array_equal(done.model.params.blocks[0].moe.experts.w_up, before.blocks[0].moe.experts.w_up)
    assert (done.model.params.blocks[0].moe.router.w_gate != before.blocks[0].moe.router.w_gate).any()


def resumed(folder: Path, **changes: Any) -> Trained:
    return resume.resume(folder, changes=changes, device="cpu", threads=1, progress=False)


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_a_run_that_was_cut_short_ends_as_if_it_had_not(tmp_path: Path, lines: Path, base: Path, kind: str) -> None:
    constant = {"schedule": "linear", "final_rate": 1.0}  # so that the first steps do not depend on how many follow
    loss = Preference(kind)
    tune(
        tmp_path / "whole", lines, base, loss=loss, patience=None, changes=constant | {"steps": 6, "evaluate_every": 0}
    )
    tune(tmp_path / "cut", lines, base, loss=loss, patience=None, changes=constant | {"steps": 4, "evaluate_every": 0})
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "cut", moved)  # the reference goes with it
    assert resumed(moved, steps=6).finished
    whole, again = lasting(tmp_path / "whole"), lasting(moved)
    assert again["model"] == whole["model"] and again["state"] == whole["state"]


def test_two_workers_take_the_steps_of_one(tmp_path: Path, lines: Path, base: Path) -> None:
    """With an odd number of sequences for one of them, so that a pair is divided between the two."""
    changes = QUICK | {"steps": 3, "batch": 6, "evaluate_every": 0, "optimizer": "adamw", "learning_rate": 1e-4}
    given: dict[str, Any] = {"data": lines, "changes": changes, "device": "cpu", "progress": False}
    one, two = (dpo.tune(base, out=tmp_path / f"{n}", threads=n, **given) for n in (1, 2))
    for mine, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("loss", "margin", "logp_chosen", "logp_rejected", "gradient_norm"):
            assert other[name] == pytest.approx(mine[name], rel=2e-3, abs=1e-4), name


def test_a_run_whose_pairs_or_reference_are_others_is_not_resumed(tmp_path: Path, lines: Path, base: Path) -> None:
    mine = tmp_path / "pairs.jsonl"
    shutil.copy(lines, mine)
    run = tmp_path / "run"
    tune(run, mine, base, changes={"steps": 2})
    text = mine.read_text("utf-8")
    mine.write_text(text.replace('"chosen": "a"', '"chosen": "e"'), encoding="utf-8")
    with pytest.raises(UserError, match="pairs.jsonl changed since this run began"):
        resumed(run, steps=4)
    mine.write_text(text, encoding="utf-8")
    tensors, about = files.read_tensors(run / dpo.REFERENCE)
    for wrong, metadata in ((tensors, {"pairs": "0"}), ({"train": tensors["train"]}, about)):
        files.write_tensors(run / dpo.REFERENCE, wrong, metadata)
        with pytest.raises(UserError, match="is that of other pairs"):
            resumed(run, steps=4)
    files.write_tensors(run / dpo.REFERENCE, {name: part - 1 for name, part in tensors.items()}, about)
    with pytest.raises(UserError, match="is that of another model"):
        resumed(run, steps=4)
    (run / dpo.REFERENCE).unlink()
    with pytest.raises(UserError, match=r"reference.safetensors is missing.*begin a new run with `minimoe dpo "):
        resumed(run, steps=4)


def test_the_pairs_of_data_are_the_default(base: Path) -> None:
    given = instructions.read_pairs()
    assert len(given) > 500
    assert {pair.kind for pair in given} == {"length", "politeness", "truth"}


# The command


def test_the_command_tunes_and_goes_on(
    tmp_path: Path, lines: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["dpo", str(base), "--pairs", str(lines), "--out", str(tmp_path / "run"), "--threads", "1"]
    words += ["--loss", "simpo", "--beta", "2", "--margin", "0.5", "--label-smoothing", "0.1", "--freeze", "router"]
    assert main.main([*words, "--steps", "2", "--batch", "4", "--patience", "none", "--evaluate-every", "0"]) == 0
    run = checkpoint.load_config(tmp_path / "run")
    assert run.tuning is not None
    settings = run.tuning.settings
    assert Preference(*(settings[name] for name in Preference._fields)) == Preference("simpo", 2.0, 0.1, 0.5)
    assert settings["patience"] is None and settings["data"] == str(lines)
    assert all(".moe.router." in name for name in run.tuning.frozen) and run.tuning.frozen
    assert main.main(["dpo", "--resume", str(tmp_path / "run"), "--steps", "3", "--threads", "1"]) == 0
    assert checkpoint.load_model(tmp_path / "run").step == 3
    capsys.readouterr()
    for words, sentence in (
        (["dpo"], "there is no model to tune"),
        (["dpo", str(finished())], "minimoe sft"),
        (["dpo", str(base), "--loss", "kto"], "no preference loss 'kto'"),
        (["dpo", "--resume", str(tmp_path / "run"), "--beta", "1"], "--beta cannot go with --resume"),
        (["dpo", "--resume", str(tmp_path / "run"), "--patience", "3"], "--patience cannot go with --resume"),
        (["dpo", "x", "--resume", str(tmp_path / "run")], "are two models: leave one of the two out"),
        (["dpo", "--resume", str(base)], f"resume it with `minimoe sft --resume {base}`"),
        (["sft", "--resume", str(finished())], f"resume it with `minimoe train --resume {finished()}`"),
    ):
        assert main.main(words) == 2
        assert sentence in capsys.readouterr().err


def test_help_names_the_losses_that_there_are() -> None:
    assert cli_options.PREFERENCES == preference.KINDS
