"""Pruned folders, of runs and in Hugging Face's layout: written, opened by every way in, refused where they must."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import CORPUS, PYRAMID, finished, resume, train

from minimoe.compression import prune
from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.storage import checkpoint, huggingface, open_model, pruned, quantized
from minimoe.text import batches, corpus
from minimoe.text.corpus import Corpus
from minimoe.training import run_report

MIXTRAL = Path(__file__).parent.parent / "golden" / "mixtral"
WORDS = Corpus("words", {"words": "to be or not to be, " * 40})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    finished()  # with its figures, which no other run here needs
    monkeypatch.setattr(run_report, "write", lambda *_: None)


class Ids:
    """A tokenizer for a model that has none."""

    def encode(self, text: str) -> Any:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % 7


@pytest.fixture
def with_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    load = huggingface.load
    monkeypatch.setattr(pruned.open_model, "load", lambda folder: load(folder)._replace(tokenizer=Ids()))
    monkeypatch.setattr(pruned.huggingface, "save", lambda *args: huggingface_save(*args[:3], None, args[4]))


huggingface_save = huggingface.save


def same(ours: Any, theirs: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True))


@pytest.mark.parametrize("method", prune.METHODS)
def test_what_is_opened_is_the_model_after_pruning(tmp_path: Path, method: str) -> None:
    report = pruned.write(finished(), tmp_path / "out", 3, method, tokens=50, seed=4)
    before, after = open_model.load(finished()), open_model.load(tmp_path / "out")
    ids = pruned.sample(before, tokens=50, seed=4)
    done = prune.prune(before.params, before.config, ids, 3, method, 4)
    assert same(after.params, done.params)
    assert after.config == open_model.shape(tmp_path / "out") == dataclasses.replace(before.config, experts=3)
    assert report[:4] == (method, done.kept, done.errors, 48)  # six sequences of 8
    assert report.parameters[1] < report.parameters[0]
    held = sum(leaf.size for leaf in tree.leaves(after.params))
    noise = sum(block.moe.router.w_noise.size for block in after.params.blocks)
    assert report.parameters[1] == held - noise


def test_a_pruned_mixtral_is_a_mixtral(tmp_path: Path, with_tokenizer: None) -> None:
    before, config = huggingface.load_params(MIXTRAL)
    report = pruned.write(MIXTRAL, tmp_path / "out", config.experts - 1, corpus=WORDS, tokens=64)
    after, smaller = huggingface.load_params(tmp_path / "out")
    assert smaller == dataclasses.replace(config, experts=config.experts - 1)
    assert same(after, prune.remove(before, config, report.kept)[0])
    assert huggingface.load(tmp_path / "out").end_tokens == huggingface.load(MIXTRAL).end_tokens


def test_pruning_nothing_writes_the_same_model(tmp_path: Path) -> None:
    pruned.write(finished(), tmp_path / "out", 4)
    assert same(open_model.load(tmp_path / "out").params, open_model.load(finished()).params)


def test_a_pruned_run_keeps_the_rest_of_its_config_and_has_no_run_to_resume(tmp_path: Path) -> None:
    pruned.write(finished(), tmp_path / "out", 3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    before, after = checkpoint.load_model(finished()), checkpoint.load_model(tmp_path / "out")
    assert after.run == before.run._replace(config=after.config)
    assert after.step == before.step
    with pytest.raises(UserError, match=r"made from another one, and no run to resume: .* --from"):
        resume(tmp_path / "out", corpus=None)


def test_the_sample_is_text_that_the_run_was_trained_on(tmp_path: Path) -> None:
    """The marks stand only in the last tenth, which the run held out."""
    held_out = "".join(f"{n} % {n * n}.\n" for n in range(8))
    text = PYRAMID + "# " * 20 + held_out
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    run = train(tmp_path / "run", corpus.read_files(path), steps=1)
    model = checkpoint.load_model(run.folder)
    texts = batches.reload(model.run.source, model.tokenizer, model.config.context)
    for given in (None, corpus.read_files(path)):  # the text of the run, given again, is still the text of the run
        ids = pruned.sample(model, given, tokens=len(text))
        assert ids.shape[1] == model.config.context
        rows = {bytes(row) for row in ids}
        assert rows <= {bytes(texts.train[i : i + 8]) for i in range(len(texts.train) - 7)}
    other = pruned.sample(model, Corpus("other", {"a": "# 3 # 3 # 3 # 3 "}), tokens=16)
    assert sorted(np.unique(other)) == sorted(np.unique(model.tokenizer.encode("# 3")))


def test_a_sample_is_drawn_without_overlap_and_repeats_with_its_seed() -> None:
    model = checkpoint.load_model(finished())
    other = Corpus("other", {"a": PYRAMID, "b": PYRAMID[:5]})
    every = pruned.sample(model, other, tokens=10**6)
    assert every.shape == (len(PYRAMID) // 8, 8)
    assert {bytes(row) for row in every} == {
        bytes(model.tokenizer.encode(PYRAMID)[i : i + 8]) for i in range(0, len(PYRAMID) - 7, 8)
    }
    one, same_again, another = (pruned.sample(model, other, 64, seed) for seed in (0, 0, 1))
    assert one.shape == (8, 8)
    assert (one == same_again).all()
    assert (one != another).any()
    assert pruned.sample(model, Corpus("short", {"a": PYRAMID[:5]}), 64).shape == (1, 5)
    assert pruned.sample(model, other, 3).shape == (1, 3)
    assert pruned.sample(model, None, 64).shape == (8, 8)
    whole = pruned.sample(model, None, 10**12)
    assert whole.size <= len(PYRAMID), "no sequence is taken twice"


def test_the_table_names_every_layer() -> None:
    report = pruned.Report("reconstruction", [[0, 2], [1, 3]], [0.125, 0.0], 2048, (2000, 1500))
    lines = pruned.table(report).splitlines()
    assert lines[1:3] == ["0         12.5%   0 2", "1          0.0%   1 3"]
    assert "1,500 of 2,000 parameters are left (75%)" in lines[-1]
    assert "2,048 tokens" in lines[-1]


def test_what_cannot_be_pruned_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="its text is not known: give a text with --text"):
        pruned.write(MIXTRAL, out, 2)
    with pytest.raises(UserError, match="tokens 0 is too small"):
        pruned.write(finished(), out, 3, tokens=0)
    for method in prune.METHODS:
        with pytest.raises(UserError, match="seed -1 is not a seed"):
            pruned.write(finished(), out, 3, method, seed=-1)
    with pytest.raises(UserError, match="keep 9 is not possible"):
        pruned.write(finished(), out, 9)
    train(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="was made in Python"):
        pruned.write(tmp_path / "run", out, 3)
    train(tmp_path / "hash", steps=1, router="token_hash")
    with pytest.raises(UserError, match="fixed table"):
        pruned.write(tmp_path / "hash", out, 3, corpus=CORPUS)
    for source in (finished(), MIXTRAL):
        small = tmp_path / f"{source.name}-nf4"
        quantized.write(source, small, "nf4")
        with pytest.raises(UserError, match="is quantised: prune the model that it came from"):
            pruned.write(small, out, 2, corpus=WORDS)
    assert not out.exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and nothing in it is overwritten"):
        pruned.write(finished(), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
