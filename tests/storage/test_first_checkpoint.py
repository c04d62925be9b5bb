"""Runs that begin with given parameters: opened, resumed, and never begun anew after a crash."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import CORPUS, SEASONS, finished, lasting, resume, train

from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.storage import checkpoint, first_checkpoint, quantized
from minimoe.storage.checkpoint import Tuning
from minimoe.text.corpus import Corpus
from minimoe.training import run_report


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    finished()  # with its figures, which no other run here needs
    monkeypatch.setattr(run_report, "write", lambda *_: None)


def same(ours: Any, theirs: Any) -> bool:
    return all((a == b).all() for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True))


def test_it_is_opened_with_its_parameters_and_no_step(tmp_path: Path) -> None:
    model = first_checkpoint.load(finished())
    first_checkpoint.write(tmp_path / "new", model.run, model.params)
    again = checkpoint.load_model(tmp_path / "new")
    assert same(again.params, model.params)
    assert (again.step, again.run) == (0, model.run)


def test_from_what_the_seed_draws_it_becomes_the_run_of_that_seed(tmp_path: Path) -> None:
    """Without noise in the router, which a run draws after the weights."""
    whole = train(tmp_path / "whole", noisy_gating=False)
    fresh = train(tmp_path / "fresh", noisy_gating=False, steps=0)
    run = fresh.model.run._replace(recipe=whole.model.run.recipe)
    first_checkpoint.write(tmp_path / "new", run, fresh.model.params)
    resume(tmp_path / "new")
    ours, theirs = lasting(tmp_path / "new"), lasting(tmp_path / "whole")
    assert ours["model"] == theirs["model"]
    assert ours["metrics"] == theirs["metrics"]


def test_a_crash_leaves_no_run_that_would_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = first_checkpoint.load(finished())

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        first_checkpoint.write(tmp_path / "new", model.run, model.params)
    with pytest.raises(UserError, match="is not a run"):
        checkpoint.load_config(tmp_path / "new")


def test_the_parameters_get_the_type_of_the_recipe(tmp_path: Path) -> None:
    model = first_checkpoint.load(finished())
    run = model.run._replace(recipe=dataclasses.replace(model.run.recipe, dtype="float64"))
    first_checkpoint.write(tmp_path / "new", run, model.params)
    assert checkpoint.load_model(tmp_path / "new").params.norm.gain.dtype == np.float64


def test_the_seed_of_the_recipe_draws_what_follows(tmp_path: Path) -> None:
    model = first_checkpoint.load(finished())
    states = []
    for seed in (1, 2):
        run = model.run._replace(recipe=dataclasses.replace(model.run.recipe, seed=seed))
        first_checkpoint.write(tmp_path / str(seed), run, model.params)
        _, _, progress = checkpoint.load_progress(tmp_path / str(seed), run) or pytest.fail("nothing saved")
        states.append(progress.random_state)
    assert states == [dict(np.random.default_rng(seed).bit_generator.state) for seed in (1, 2)]


def test_the_text_may_be_another_one_of_the_same_characters(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=0)
    run = checkpoint.load_config(tmp_path / "run")
    assert first_checkpoint.with_text(run, None) == run
    other = first_checkpoint.with_text(run, Corpus("seasons", {"seasons": SEASONS}))
    assert (other.source.corpus, other.tokenizer) == ("seasons", run.tokenizer)
    assert other.source.sha256 != run.source.sha256
    assert first_checkpoint.with_text(run, CORPUS).source.sha256 == run.source.sha256
    with pytest.raises(UserError, match="Ω"):
        first_checkpoint.with_text(run, Corpus("greek", {"greek": SEASONS + "Ω"}))


def test_a_full_folder_and_a_quantised_run_are_refused(tmp_path: Path) -> None:
    model = first_checkpoint.load(finished())
    with pytest.raises(UserError, match="is not empty"):
        first_checkpoint.write(finished(), model.run, model.params)
    quantized.write(finished(), tmp_path / "small", "int8")
    with pytest.raises(UserError, match="is quantised and cannot be trained further: give the run that it came from"):
        first_checkpoint.load(tmp_path / "small")
    with pytest.raises(UserError, match="mixtral is a Hugging Face model, which has no recipe and no text"):
        first_checkpoint.load(Path(__file__).parent.parent / "golden" / "mixtral")


def test_a_run_that_trained_adapters_is_taken_without_them_and_reads_no_text(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=1)
    model = checkpoint.load_model(tmp_path / "run")
    settings = {"base": "b", "lora": {"rank": 2}, "freeze": ["router"]}
    run = model.run._replace(tuning=Tuning("sft", settings, ("head.weight.base",)))
    checkpoint.save_config(tmp_path / "run", run)
    checkpoint.save_model(tmp_path / "run", run, model.params, 1)
    found = first_checkpoint.load(tmp_path / "run").run
    assert found.tuning == Tuning("sft", {"base": "b"})
    with pytest.raises(UserError, match="a tuned run learns from answers and reads no text: leave the text out"):
        first_checkpoint.with_text(found, CORPUS)
    plain = found._replace(tuning=Tuning("distill", {"teacher": "t"}))
    assert first_checkpoint.with_text(plain, CORPUS).tuning == plain.tuning, "a student reads a text"
