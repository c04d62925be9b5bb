"""Runs that begin with the weights of another run."""

from pathlib import Path

import pytest
from small_runs import CORPUS, SEASONS, train

from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.storage import checkpoint
from minimoe.text.corpus import Corpus
from minimoe.training import continued, run_report


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(run_report, "write", lambda *_: None)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return train(tmp_path / "origin", steps=6).folder


def test_it_begins_with_the_weights_and_counts_its_own_steps(origin: Path, tmp_path: Path) -> None:
    done = continued.train(origin, tmp_path / "new", corpus=CORPUS, changes={"steps": 0}, threads=1, progress=False)
    before = checkpoint.load_model(origin)
    assert all(
        (a == b).all() for a, b in zip(tree.leaves(done.model.params), tree.leaves(before.params), strict=True)
    )
    assert (before.step, done.model.step) == (6, 0)
    further = continued.train(
        origin, tmp_path / "two", corpus=CORPUS, changes={"steps": 2, "learning_rate": 1e-3}, threads=1, progress=False
    )
    assert [row["step"] for row in further.metrics] == [1, 2]
    assert further.model.run.recipe.learning_rate == 1e-3
    still = {"steps": 1, "learning_rate": 0.0}
    done = continued.train(origin, tmp_path / "still", corpus=CORPUS, changes=still, threads=1, progress=False)
    assert all(
        (a == b).all() for a, b in zip(tree.leaves(done.model.params), tree.leaves(before.params), strict=True)
    ), "the step was taken from these weights"


def test_the_text_may_be_another_one_with_the_tokenizer_of_the_origin(origin: Path, tmp_path: Path) -> None:
    seasons = Corpus("seasons", {"seasons": SEASONS})
    done = continued.train(origin, tmp_path / "new", corpus=seasons, threads=1, progress=False)
    assert done.finished
    run = checkpoint.load_config(tmp_path / "new")
    assert (run.source.corpus, run.tokenizer) == ("seasons", checkpoint.load_config(origin).tokenizer)
    assert run.config == checkpoint.load_config(origin).config


@pytest.mark.parametrize("changes", [{"experts": 8}, {"tokenizer": "byte"}, {"dtype": "float64"}])
def test_what_the_origin_determines_cannot_change(origin: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"{name} .* cannot be set here, because the model that it begins with"):
        continued.train(origin, tmp_path / "new", corpus=CORPUS, changes=changes, progress=False)
    assert not (tmp_path / "new").exists()
