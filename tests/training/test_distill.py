"""Distillation runs: the loop of every run with another loss, on the teacher's text, with the teacher's tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import CONFIG, CORPUS, PYRAMID, RECIPE, finished, lasting, train

from minimoe.core import presets, tree
from minimoe.core.errors import UserError
from minimoe.core.presets import Preset
from minimoe.evaluate import suite, suite_table, text_loss
from minimoe.layers import decoder
from minimoe.layers.mode import Mode
from minimoe.losses.distillation import Settings
from minimoe.storage import checkpoint
from minimoe.text import batches, corpus
from minimoe.text.corpus import Corpus
from minimoe.training import distill, run_report, trainer
from minimoe.training import step as steps
from minimoe.tuning import resume as tuned

MIXTRAL = Path(__file__).parent.parent / "golden" / "mixtral"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    finished()  # with its figures, which no other run here needs
    monkeypatch.setattr(run_report, "write", lambda *_: None)


def student(out: Path, name: Any = "teacher", settings: Settings = Settings(), **kwargs: Any) -> trainer.Trained:  # noqa: B008
    kwargs = {"changes": {"steps": 2}, "device": "cpu", "threads": 1, "progress": False, **kwargs}
    return distill.distill(finished(), name, settings, out=out, **kwargs)


def test_with_hard_labels_alone_the_dense_twin_is_that_of_ordinary_training(tmp_path: Path) -> None:
    done = student(tmp_path / "student", "dense-twin", Settings(3.0, 1.0), changes=None)
    twin = trainer.train_dense_twin(finished(), out=tmp_path / "twin", device="cpu", threads=1, progress=False)
    assert done.model.config == twin.model.config
    for ours, theirs in zip(tree.leaves(done.model.params), tree.leaves(twin.model.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["loss"] for row in done.metrics] == [row["loss"] for row in twin.metrics]


def test_the_soft_loss_is_that_of_the_teacher_and_the_validation_loss_is_cross_entropy(tmp_path: Path) -> None:
    done = student(tmp_path / "student", settings=Settings(2.0, 0.0))
    teacher = checkpoint.load_model(finished())
    run = done.model.run
    texts = batches.reload(run.source, run.tokenizer, run.config.context)
    tokens, _ = next(texts.batches(run.recipe.batch, run.config.context, run.recipe.seed))
    rng = np.random.default_rng(run.recipe.seed)
    params = decoder.init(np.random.default_rng(run.recipe.seed), run.config)
    shards = steps.shard_batch(rng, params, tokens, tokens, run.config, run.recipe, 1)
    mode = Mode(training=True, noise=shards[0].noise, capacity_factor=run.recipe.capacity_factor)
    said = decoder.forward(params, tokens, run.config, mode).logits / 2
    told = decoder.forward(teacher.params, tokens, teacher.config).logits / 2
    log_s, log_t = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (said, told))
    expected = 4 * (np.exp(log_t) * (log_t - log_s)).sum(-1).mean()
    assert done.metrics[0]["loss"] == pytest.approx(float(expected), rel=1e-3)
    plain = text_loss.evaluate(done.model.params, run.config, texts.validation).loss
    assert done.metrics[-1]["val_loss"] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "other"),
    [(Settings(2.0), Settings(1.0)), (Settings(1.0, 0.2), Settings(1.0, 0.8)), (Settings(), Settings(reverse=True))],
)
def test_every_setting_reaches_the_loss(tmp_path: Path, settings: Settings, other: Settings) -> None:
    losses = [
        student(tmp_path / name, settings=one).metrics[0]["loss"] for name, one in (("a", settings), ("b", other))
    ]
    assert losses[0] != losses[1]


def test_the_student_begins_with_everything_of_the_teacher_but_its_mixtures(tmp_path: Path) -> None:
    settings = {"changes": {"steps": 0, "experts": 2}}
    done = student(tmp_path / "student", from_teacher=True, **settings)
    teacher = checkpoint.load_model(finished()).params
    fresh = decoder.init(np.random.default_rng(RECIPE.seed), done.model.config)
    before, theirs = dict(tree.named_leaves(fresh)), dict(tree.named_leaves(teacher))
    for name, leaf in tree.named_leaves(done.model.params):
        np.testing.assert_array_equal(leaf, before[name] if ".moe." in name else theirs[name], err_msg=name)
    without = student(tmp_path / "without", **settings)
    for ours, expected in zip(tree.leaves(without.model.params), tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_what_is_taken_over_is_a_copy() -> None:
    teacher = checkpoint.load_model(finished())
    begin = distill.take_over(teacher.params, teacher.params)
    begin.norm.gain[:] = 7
    assert (teacher.params.norm.gain != 7).all()


def test_a_student_of_another_shape_cannot_begin_with_its_teacher(tmp_path: Path) -> None:
    for changes, words in (
        ({"width": 4}, r"embedding.table has the shape .* in the student and the shape .* in the teacher"),
        ({"layers": 1}, "the student has 1 layers and the teacher 2"),
        ({"kv_heads": 2}, "key.weight has the shape"),
    ):
        with pytest.raises(UserError, match=words):
            student(tmp_path / "out", from_teacher=True, changes=changes)
        assert not (tmp_path / "out").exists()
    tied = decoder.init(np.random.default_rng(0), CONFIG)._replace(head=None)
    with pytest.raises(UserError, match="head.weight has the shape .* and none in the teacher"):
        distill.take_over(decoder.init(np.random.default_rng(0), CONFIG), tied)


def test_the_student_is_a_preset_a_twin_or_like_its_teacher_with_the_teachers_vocabulary(tmp_path: Path) -> None:
    teacher = checkpoint.load_model(finished())
    wanted = presets.override(Preset("", CONFIG, RECIPE), {"router": "switch", "active_experts": 1, "steps": 1})
    for name, of, changes in (
        ("tiny", presets.PRESETS["tiny"], {"steps": 1, "width": 8}),
        ("dense-twin", presets.dense_twin(Preset("", teacher.config, teacher.run.recipe)), {"steps": 1}),
        ("teacher", Preset("", teacher.config, teacher.run.recipe), {"steps": 1}),
        (wanted, wanted, {}),
    ):
        folder = tmp_path / str(name if isinstance(name, str) else "own")
        text = Corpus("long", {"a": PYRAMID * 2}) if name == "tiny" else None
        done = student(folder, name, changes=changes, corpus=text)
        expected = presets.override(of, {**changes, "vocab_size": teacher.config.vocab_size})
        assert done.model.config == expected.config
        assert done.model.run.recipe == expected.recipe
        assert done.model.tokenizer.to_dict() == teacher.tokenizer.to_dict()


def test_the_text_is_that_of_the_teacher_or_another_one_of_its_characters(tmp_path: Path) -> None:
    own = student(tmp_path / "own")
    assert own.model.run.source == checkpoint.load_model(finished()).run.source
    other = student(tmp_path / "other", corpus=Corpus("other", {"a": PYRAMID[::-1]}))
    assert other.model.run.source.corpus == "other"
    with pytest.raises(UserError, match="'@'"):
        student(tmp_path / "strange", corpus=Corpus("strange", {"a": "@" * 100}))


def test_an_interrupted_student_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(2.0, 0.3, True)
    student(tmp_path / "whole", settings=settings, changes={"steps": 4})
    monkeypatch.setattr(trainer.steps, "is_finite", lambda totals, norm: len(taken) < 3)
    taken: list[int] = []
    cut = steps.cut
    monkeypatch.setattr(trainer.steps, "cut", lambda *args: (taken.append(1), cut(*args))[1])
    with pytest.raises(UserError, match="not a finite number at step 3"):
        student(tmp_path / "cut", settings=settings, changes={"steps": 4})
    monkeypatch.undo()
    monkeypatch.setattr(run_report, "write", lambda *_: None)
    tuned.resume(tmp_path / "cut", device="cpu", threads=1, progress=False)
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


def test_a_student_does_not_resume_with_another_teacher(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(finished(), teacher)
    distill.distill(
        teacher, "teacher", out=tmp_path / "out", changes={"steps": 1}, device="cpu", threads=1, progress=False
    )
    tuning = json.loads((tmp_path / "out" / "config.json").read_text())["tuning"]
    assert tuning["kind"] == "distill"
    assert tuning["settings"]["teacher"] == str(teacher.resolve())
    shutil.rmtree(teacher)
    train(teacher, CORPUS, steps=1, seed=1)
    with pytest.raises(UserError, match="holds another model than when its student began to learn"):
        tuned.resume(tmp_path / "out", changes={"steps": 2}, device="cpu", threads=1, progress=False)


def test_the_checksum_is_that_of_every_weight() -> None:
    params = decoder.init(np.random.default_rng(0), CONFIG)
    assert distill.checksum(params) == distill.checksum(tree.map(np.copy, params))
    for i, leaf in enumerate(tree.leaves(params)):
        changed = [one.copy() for one in tree.leaves(params)]
        changed[i].reshape(-1)[-1] += 1
        assert distill.checksum(tree.rebuild(params, changed)) != distill.checksum(params), leaf.shape


def test_what_cannot_teach_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is a model of Hugging Face"):
        distill.distill(MIXTRAL, out=out)
    with pytest.raises(UserError, match="there is no student 'tinny': choose one of teacher, dense-twin, toy"):
        student(out, "tinny")
    with pytest.raises(UserError, match="tokenizer 'byte' is not that of the teacher, 'char'"):
        student(out, changes={"tokenizer": "byte"})
    with pytest.raises(UserError, match="temperature -1.0 is not possible"):
        student(out, settings=Settings(-1.0))
    assert not out.exists()


def test_a_teacher_whose_text_has_changed_says_so(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(PYRAMID, encoding="utf-8")
    run = train(tmp_path / "run", corpus.read_files(path), steps=1)
    path.write_text(PYRAMID[::-1], encoding="utf-8")
    with pytest.raises(UserError, match="has changed since this run began"):
        distill.distill(run.folder, "teacher", out=tmp_path / "out", device="cpu", threads=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_student_is_compared_as_a_model_that_was_trained_from_the_start(tmp_path: Path) -> None:
    done = student(tmp_path / "student")
    settings = suite.Settings(samples=1, questions=1, tokens=4)
    results = suite.run(done.folder, finished(), settings, device="cpu", threads=1)
    assert not results.models[0].tuned
    assert not any("tuned" in note for note in suite_table.notes(results))
