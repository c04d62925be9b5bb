"""Merged and upcycled folders: what they compute, what they refuse, and that they train on."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_chats
from small_runs import CORPUS, PYRAMID, SEASONS, SMALL, finished, resume, train

from minimoe.compression import alignment, upcycle, vectors
from minimoe.core import presets, tree
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.storage import checkpoint, first_checkpoint, merged
from minimoe.storage.checkpoint import Tuning
from minimoe.text.corpus import Corpus
from minimoe.training import run_report

DENSE = vars(presets.dense_twin(SMALL).config) | vars(presets.dense_twin(SMALL).recipe)
DENSE = {name: value for name, value in DENSE.items() if name not in ("vocab_size", "steps", "save_every")}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(run_report, "write", lambda *_: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two runs that began from it, all of one text."""
    folder = tmp_path_factory.mktemp("runs")
    made = [folder / name for name in ("base", "one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write", lambda *_: None)
        base = train(made[0], steps=3)
        for seed, out in enumerate(made[1:]):
            run = base.model.run._replace(recipe=dataclasses.replace(base.model.run.recipe, steps=4, seed=seed))
            first_checkpoint.write(out, run, base.model.params)
            resume(out)
    return made


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two dense runs on one text."""
    folder = tmp_path_factory.mktemp("dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write", lambda *_: None)
        for seed in range(2):
            train(folder / str(seed), **{**DENSE, "seed": seed, "steps": 2})
    return [folder / "0", folder / "1"]


def params(folder: Path) -> Any:
    return checkpoint.load_model(folder).params


def same(ours: Any, theirs: Any) -> None:
    for (name, a), b in zip(tree.named_leaves(ours), tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("method", vectors.METHODS)
def test_the_folder_holds_the_merged_model(runs: list[Path], tmp_path: Path, method: str) -> None:
    base, one, two = runs
    origin = base if method in vectors.NEED_A_BASE else None
    numbers: dict[str, Any] = {"t": 0.3} if method == "slerp" else {"strength": 0.7} if origin else {}
    numbers |= {"keep": 0.6} if method in ("ties", "dare") else {}
    made = merged.merge([one, two], tmp_path / "out", method, base=origin, seed=5 * (method == "dare"), **numbers)
    expected = vectors.merge(
        [params(one), params(two)],
        method,
        base=None if origin is None else params(base),
        rng=np.random.default_rng(5),
        **numbers,
    )
    same(params(tmp_path / "out"), expected)
    same(made.params, expected)
    assert checkpoint.load_config(tmp_path / "out") == made.run == checkpoint.load_config(one)


def test_it_trains_on_with_the_recipe_and_the_text_of_the_first(runs: list[Path], tmp_path: Path) -> None:
    merged.merge(runs[1:], tmp_path / "out")
    done = resume(tmp_path / "out")
    assert done.finished
    assert [row["step"] for row in done.metrics] == [1, 2, 3, 4]
    assert not (done.model.params.norm.gain == vectors.merge([params(run) for run in runs[1:]]).norm.gain).all()


def test_alignment_undoes_another_order(runs: list[Path], tmp_path: Path) -> None:
    """A copy with its experts reversed merges to the original, with the first run or with the base as the model."""
    model = checkpoint.load_model(runs[1])
    blocks = []
    for block in model.params.blocks:
        reverse = block.moe._replace(
            experts=tree.map(lambda leaf: leaf[::-1], block.moe.experts),
            router=tree.map(lambda leaf: leaf[:, ::-1], block.moe.router),
        )
        blocks.append(block._replace(moe=reverse))
    first_checkpoint.write(tmp_path / "copy", model.run, model.params._replace(blocks=blocks))
    pair = [runs[1], tmp_path / "copy"]
    before = merged.merge(pair, tmp_path / "plain").params
    after = merged.merge(pair, tmp_path / "aligned", align=True).params
    to_base = merged.merge(pair, tmp_path / "to base", "task", base=runs[0], align=True).params
    largest = {"plain": 0.0, "aligned": 0.0, "to base": 0.0}
    for name, made in (("plain", before), ("aligned", after), ("to base", to_base)):
        aligned = alignment.decoder(params(runs[0]), model.params, model.config) if name == "to base" else model.params
        for a, b in zip(tree.leaves(made), tree.leaves(aligned), strict=True):
            largest[name] = max(largest[name], abs(a - b).max())
    assert largest["aligned"] < 1e-5
    assert largest["to base"] < 1e-5
    assert largest["plain"] > 0.01


def test_an_upcycled_folder_computes_the_same_and_trains_on(dense: list[Path], tmp_path: Path) -> None:
    made = merged.upcycled(dense[:1], tmp_path / "out", experts=4, granularity=2, changes={"steps": 3, "batch": 2})
    before, after = checkpoint.load_model(dense[0]), checkpoint.load_model(tmp_path / "out")
    assert (after.config.experts, after.config.active_experts, after.config.expert_width) == (8, 4, 8)
    same(made.params, after.params)
    ids = np.arange(8)[None] % before.config.vocab_size
    np.testing.assert_allclose(
        decoder.forward(after.params, ids, after.config).logits,
        decoder.forward(before.params, ids, before.config).logits,
        atol=1e-5,
    )
    recipe = after.run.recipe
    assert (recipe.balance_loss, recipe.z_loss, recipe.steps, recipe.batch) == (None, 0.001, 3, 2)
    assert before.run.recipe.balance_loss == 0.0
    assert resume(tmp_path / "out").finished


def test_the_seed_draws_the_router_and_settings_are_kept(dense: list[Path], tmp_path: Path) -> None:
    changes = {"seed": 9, "balance_loss": 0.5}
    settings = {"active": 1, "renormalize": False, "noisy_gating": True, "noise": 0.1}
    made = merged.upcycled(dense[:1], tmp_path / "out", changes=changes, **settings)
    source = checkpoint.load_model(dense[0])
    config = upcycle.config_of(source.config, 8, 1, renormalize=False, noisy_gating=True)
    same(made.params, upcycle.upcycle(np.random.default_rng(9), source.params, config, noise=0.1))
    assert made.run.recipe.balance_loss == 0.5


def test_several_dense_runs_become_the_experts(dense: list[Path], tmp_path: Path) -> None:
    made = merged.upcycled(dense, tmp_path / "out", granularity=2)
    models = [checkpoint.load_model(folder) for folder in dense]
    config = upcycle.config_of(models[0].config, 2, 2, 2)
    same(made.params, upcycle.mix(np.random.default_rng(0), [model.params for model in models], config, 2))
    assert made.config == config


def test_the_next_text_may_be_another_one(runs: list[Path], dense: list[Path], tmp_path: Path) -> None:
    seasons = Corpus("seasons", {"seasons": SEASONS})
    for out, made in (
        ("merged", merged.merge(runs[1:], tmp_path / "merged", corpus=seasons)),
        ("upcycled", merged.upcycled(dense, tmp_path / "upcycled", corpus=seasons)),
    ):
        assert made.run.source.corpus == "seasons"
        assert resume(tmp_path / out, corpus=seasons).finished


@cache
def other_tokenizer(folder: Path) -> Path:
    train(folder, Corpus("small", {"pyramid": PYRAMID, "seasons": SEASONS.replace("w", "W")}), steps=0)
    return folder


def test_other_shapes_and_tokenizers_are_refused(runs: list[Path], dense: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 has experts 1, but .*one has 4: give runs of the same shape"):
        merged.merge([runs[1], dense[0]], tmp_path / "out")
    with pytest.raises(UserError, match="base has experts 4, but .*0 has 1: give runs of the same shape"):
        merged.merge(dense, tmp_path / "out", "ties", base=runs[0])
    with pytest.raises(UserError, match="other has another tokenizer than .*one, .*--tokenizer byte"):
        merged.merge([runs[1], other_tokenizer(tmp_path / "other")], tmp_path / "out")
    train(tmp_path / "theta", steps=0, rope_theta=500.0)
    with pytest.raises(UserError, match="theta has rope_theta 500.0, but .*one has 10000.0"):
        merged.merge([runs[1], tmp_path / "theta"], tmp_path / "out")
    with pytest.raises(UserError, match="one has experts 4, but .*0 has 1"):
        merged.upcycled([dense[0], runs[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_anything_is_read(runs: list[Path], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for arguments, sentence in (
        (([nowhere], tmp_path / "out"), "1 models are too few"),
        (([nowhere] * 2, tmp_path / "out", "ties"), "name that run with --base"),
        (([nowhere] * 2, runs[0]), "is not empty"),
    ):
        with pytest.raises(UserError, match=sentence):
            merged.merge(*arguments)
    with pytest.raises(UserError, match="slerp has no use for a base: leave --base out"):
        merged.merge([nowhere] * 2, tmp_path / "out", "slerp", base=nowhere)
    for given, method in (
        ({"t": 0.3}, "average"),
        ({"keep": 0.5}, "task"),
        ({"strength": 2.0}, "slerp"),
        ({"seed": 1}, "ties"),
    ):
        name, value = next(iter(given.items()))
        with pytest.raises(UserError, match=f"{method} has no use for {name} {value}: leave --{name} out, or choose"):
            merged.merge(
                [nowhere] * 2,
                tmp_path / "out",
                method,
                base=None if method in ("average", "slerp") else nowhere,
                **given,
            )
    with pytest.raises(UserError, match="seed -1 is not a seed"):
        merged.merge([nowhere] * 2, tmp_path / "out", "dare", base=nowhere, seed=-1)
    with pytest.raises(UserError, match="is not a run"):
        merged.merge([runs[0], tmp_path], tmp_path / "out")


def test_tuned_runs_merge_with_each_other_only_and_read_no_text(runs: list[Path], tmp_path: Path) -> None:
    model = small_chats.tuned(base=runs[0], context=8)
    names = ("blocks[0].moe.experts.w_up.base",)
    tuning = Tuning("sft", {"base": "b", "patience": 4, "lora": {"rank": 2}, "freeze": ["router"]}, names)
    folder = tmp_path / "tuned"
    folder.mkdir()
    run = model.run._replace(tuning=tuning)
    checkpoint.save_config(folder, run)
    checkpoint.save_model(folder, run, model.params, 3)
    for pair in ((folder, runs[0]), (runs[0], folder)):
        with pytest.raises(UserError, match=r"tuned was tuned and has tokens of a chat that .*base has not"):
            merged.merge(pair, tmp_path / "out")
    with pytest.raises(UserError, match="a tuned run learns from answers and reads no text"):
        merged.merge([folder, folder], tmp_path / "out", corpus=CORPUS)
    found = merged.merge([folder, folder], tmp_path / "out").run.tuning
    assert found == Tuning("sft", {"base": "b", "patience": 4}), "adapters are merged, so all weights learn"
    assert checkpoint.load_progress(tmp_path / "out", checkpoint.load_config(tmp_path / "out")) is not None


def test_upcycling_refuses_what_does_not_fit(runs: list[Path], dense: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="a model with 4 experts .* is not dense"):
        merged.upcycled(runs[:1], out)
    with pytest.raises(UserError, match="2 runs make 2 experts, not 8: leave --experts out"):
        merged.upcycled(dense, out, experts=8)
    with pytest.raises(UserError, match="noise 0.1 is for copies of one run"):
        merged.upcycled(dense, out, noise=0.1)
    with pytest.raises(UserError, match="is not empty"):
        merged.upcycled(dense, finished())
    assert CORPUS.name == "small"
    assert not out.exists()
