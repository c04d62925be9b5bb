"""What a person sees of a training: words, a progress bar, figures and a sample."""

import dataclasses
import sys
from pathlib import Path

import pytest
from small_runs import CORPUS, SMALL, finished, metrics, resume, train

from minimoe.core import presets
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import Model
from minimoe.text import batches
from minimoe.text.batches import Texts
from minimoe.text.corpus import Corpus
from minimoe.text.tokenizer import with_chat_tokens
from minimoe.training import run_report, trainer


@pytest.fixture(scope="module")
def model() -> Model:
    return checkpoint.load_model(finished())


@pytest.fixture(scope="module")
def data(model: Model) -> Texts:
    return batches.reload(model.run.source, model.tokenizer, model.config.context)


def test_the_opening_tells_model_text_and_work(model: Model, data: Texts) -> None:
    said = run_report.opening(Path("runs/x"), model.run, run_report.about_texts(data), "cpu", threads=3, first=0)
    assert "4 experts, 2 active per token" in said
    assert f"pyramid: {len(data.train):,} tokens for training, {len(data.validation[0])} for validation" in said
    assert "Training takes 6 steps of 32 tokens on 3 CPU cores and writes to runs/x." in said
    said = run_report.opening(Path("runs/x"), model.run, run_report.about_texts(data), "gpu", threads=1, first=4)
    assert "Training continues at step 4 of 6 steps" in said
    assert "on the GPU" in said
    run = model.run._replace(config=dataclasses.replace(model.config, experts=1, active_experts=1))
    run = run._replace(recipe=dataclasses.replace(run.recipe, steps=1))
    said = run_report.opening(Path("runs/x"), run, run_report.about_texts(data), "cpu", threads=1, first=0)
    assert said.startswith("A dense model: ") and "takes 1 step of 32 tokens on 1 CPU core and" in said


def test_the_closing_shows_the_sample_and_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimoe.draw.plots.save", lambda figure, path: path.write_bytes(b"figure"))
    folder = train(tmp_path / "run").folder
    said = run_report.closing(folder, True, metrics(folder))
    assert (folder / "sample.txt").read_text(encoding="utf-8") in said
    assert f"Validation loss {metrics(folder)[-1]['val_loss']:.3f} nats per token after 6 steps" in said
    for name in ("loss.png", "experts.png", "sample.txt", "routing.html"):
        assert str(folder / name) in said
    assert f"minimoe generate {folder} --prompt 'Once" in said


def test_the_commands_it_names_work_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside = Path(sys.executable).with_name("minimoe")
    monkeypatch.setattr("shutil.which", lambda _: str(beside))
    assert run_report.command() == "minimoe"
    monkeypatch.setattr("shutil.which", lambda _: "/elsewhere/bin/minimoe")
    assert run_report.command() == f"{sys.executable} -m minimoe"
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("sys.executable", str(tmp_path / "my env" / "python"))
    assert run_report.command() == "'my env/python' -m minimoe"


def test_a_mixture_gets_the_page_and_a_dense_model_none(tmp_path: Path) -> None:
    assert "Routing of" in (finished() / "routing.html").read_text(encoding="utf-8")
    train(tmp_path / "dense", steps=1, experts=1, active_experts=1)
    assert not (tmp_path / "dense" / "routing.html").exists()


def test_the_closing_of_an_interrupted_run_says_how_to_go_on() -> None:
    said = run_report.closing(Path("runs/x"), False, [{"step": 17}])
    assert "Interrupted at step 17; everything is saved." in said
    assert "minimoe train --resume runs/x" in said


def test_without_a_step_there_are_a_sample_and_no_figures(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", steps=0)
    assert (tmp_path / "run" / "sample.txt").exists()
    assert not (tmp_path / "run" / "loss.png").exists()
    said = run_report.closing(tmp_path / "run", True, trained.metrics)
    assert "Validation loss none" in said
    assert "loss.png" not in said


def test_the_sample_continues_what_was_held_out_of_each_document(tmp_path: Path) -> None:
    model = train(tmp_path / "run", steps=0).model
    data, _, codec = batches.prepare(CORPUS, model.run.recipe, model.config.context)
    sample = run_report.sample(model, data)
    for name, held_out in zip(data.names, data.validation, strict=True):
        begun = codec.decode(held_out[: run_report.PROMPT_TOKENS])
        assert f"--- {name} ---\n{begun}|>" in sample
        written = sample.partition(f"{begun}|>")[2].partition("\n\n--- ")[0].removesuffix("\n")
        assert len(written) == run_report.SAMPLE_TOKENS
    assert run_report.sample(model, data) == sample, "the same seed writes the same text"


def test_a_text_full_of_terminal_commands_is_shown_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The held-out text is shown as it is in the sample, and a model may write what it has read."""
    evil = Corpus("evil", {"\x1b[2Jdoc": "\x1b[31mred\x07\r\x9b2J\u202e bell\n" * 30})
    trainer.train(presets.override(SMALL, {"steps": 0}), corpus=evil, out=tmp_path / "run", device="cpu", threads=1)
    said = capsys.readouterr().out
    assert "\\x1b[31mred" in said
    assert not set("\x1b\x07\x9b\r\u202e") & set(said)
    assert "\x1b[31m" in (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8"), "a file is not a terminal"


def test_figures_are_drawn_again_when_a_finished_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimoe.draw.plots.save", lambda figure, path: path.write_bytes(b"figure"))
    train(tmp_path / "run", steps=1)
    for name in ("loss.png", "experts.png", "sample.txt"):
        (tmp_path / "run" / name).unlink()
    resume(tmp_path / "run")
    for name in ("loss.png", "experts.png", "sample.txt"):
        assert (tmp_path / "run" / name).exists()


def test_a_run_that_stopped_early_tells_of_the_model_that_it_keeps(tmp_path: Path, model: Model) -> None:
    rows = [{"step": 1}, {"step": 2, "val_loss": 1.5}, {"step": 3}, {"step": 4, "val_loss": 1.75}]
    said = run_report.closing(tmp_path, True, rows, 4, model._replace(step=2))
    assert "Validation loss 1.500 nats per token after 2 steps, the lowest of 4; the model of that step is kept" in said
    assert "generate" in said and "chat" not in said
    assert "Validation loss 1.750 nats per token after 4 steps. Look" in run_report.closing(tmp_path, True, rows, 4)
    tuned = model._replace(step=4, tokenizer=with_chat_tokens(model.tokenizer))  # type: ignore[arg-type]
    said = run_report.closing(tmp_path, True, rows, 4, tuned)
    assert "Validation loss 1.750 nats per token after 4 steps. Look" in said
    assert f"minimoe chat {tmp_path}" in said and "generate" not in said
