"""The command line: every command does its work, and every mistake gets one sentence and exit code 2."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_chats
import small_runs
from small_runs import finished, metrics, options

import minimoe
from minimoe.cli import main, parser
from minimoe.cli import options as cli_options
from minimoe.compression import prune, quantize, vectors
from minimoe.core import presets, resources
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import printable
from minimoe.cost import published
from minimoe.evaluate import text_loss
from minimoe.inference import conversation
from minimoe.storage import checkpoint
from minimoe.text import corpus, shakespeare
from minimoe.text.chat import Turn
from minimoe.training import run_report, trainer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, no waiting for the disk."""
    monkeypatch.setattr(run_report, "write", lambda folder, *_: (folder / "sample.txt").write_text("A sample."))
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "pyramid.txt"
    path.write_text(small_runs.PYRAMID, encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoiled."""
    return Path(shutil.copytree(finished(), tmp_path / "run"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns the sentence that it fails with."""

    def run(*words: str | Path) -> str:
        try:
            code = main.main([str(word) for word in words])
        except SystemExit as end:  # from argparse
            code = end.code  # type: ignore[assignment]
        said, complained = capsys.readouterr()
        assert code == 2
        assert said == ""
        assert complained.count("\n") == 1, complained
        assert complained.startswith("minimoe")
        return complained.strip()

    return run


def process(*words: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """``python -m minimoe`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "minimoe", *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        timeout=120,
    )


# train


def test_train_makes_a_run_as_the_options_say(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["--text", str(text), "--out", str(out), *options(seed=3, capacity_factor=1.5), "--threads", "2"]
    assert main.main(["train", *words]) == 0
    run = checkpoint.load_config(out)
    expected = presets.override(
        small_runs.SMALL, {"seed": 3, "capacity_factor": 1.5, "vocab_size": run.config.vocab_size}
    )
    assert (run.config, run.recipe) == (expected.config, expected.recipe)
    assert run.source.paths == [str(text)]
    assert len(metrics(out)) == 6
    said = capsys.readouterr().out
    assert "on 2 CPU cores" in said
    assert "A sample." in said


def test_every_setting_is_an_option_that_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[presets.Preset] = []
    monkeypatch.setattr(trainer, "train", lambda preset, **_: (seen.append(preset), trainer.Trained(*[True] * 4))[1])
    other = {"tokenizer": "byte", "optimizer": "adamw", "dtype": "float64", "window": 3, "capacity_factor": 1.25}
    other["balance_loss"] = 0.5
    other["schedule"] = "linear"
    other["second_expert"] = "all"
    other["qk_norm"] = "whole"
    other["dense_width"] = 8
    other["cosine_form"] = "x-moe"
    other["qk_norm"], other["dense_width"] = "whole", 7
    for kind in (ModelConfig, TrainConfig):
        for field in dataclasses.fields(kind):
            if field.name == "vocab_size":
                continue
            option, value = f"--{field.name.replace('_', '-')}", other.get(field.name)
            words = [option] if isinstance(field.default, bool) else [option, str(value)]
            if isinstance(field.default, bool):
                value = not field.default
                words = [option if value else option.replace("--", "--no-", 1)]
            elif value is None:
                value = field.default * 2 if field.name != "active_experts" else 3
                value = value or 1
                words = [option, str(value)]
            if field.name in ("final_rate", "beta1", "beta2", "momentum"):
                value, words = 0.25, [option, "0.25"]
            assert main.main(["train", *words]) == 0
            preset = seen.pop()
            assert getattr(preset.config if kind is ModelConfig else preset.recipe, field.name) == value, field.name
            changed = presets.override(presets.preset("toy"), {field.name: value})
            assert (preset.config, preset.recipe) == (changed.config, changed.recipe), "and nothing else"


def test_options_of_the_preset_stay_unless_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(trainer, "train", lambda *a, **k: (seen.append((a, k)), trainer.Trained(*[True] * 4))[1])
    assert main.main(["train", "--preset", "tiny", "--layers", "3", "--corpus", "sums"]) == 0
    ((preset,), given) = seen.pop()
    assert preset == presets.override(presets.preset("tiny"), {"layers": 3})
    assert given == {"corpus": "sums", "out": None, "name": "tiny", "device": "auto", "threads": None}


def test_train_resume_continues_with_more_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--resume", str(run), "--steps", "8", "--seed", "0"]) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    assert "continues at step 6 of 8 steps" in capsys.readouterr().out


def test_an_interrupted_training_ends_with_130(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "resume", lambda *_, **__: trainer.Trained(*[None] * 3, finished=False))  # type: ignore[arg-type]
    assert main.main(["train", "--resume", str(run)]) == 130

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "resume", interrupt)
    assert main.main(["train", "--resume", str(run)]) == 130


# evaluate


@pytest.fixture
def moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path, str]:
    """A run whose text has moved, the new place of the text, and what evaluate said before that."""
    text, run = tmp_path / "pyramid.txt", tmp_path / "run"
    text.write_text(small_runs.PYRAMID, encoding="utf-8")
    assert main.main(["train", "--text", str(text), "--out", str(run), *options(steps=2)]) == 0
    capsys.readouterr()
    assert main.main(["evaluate", str(run)]) == 0
    return run, text.rename(tmp_path / "elsewhere.txt"), capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["train", "--resume"], ["evaluate"], ["routing"], ["evaluate", "--suite", "--samples", "2"],
              ["train", "--dense-twin"]], ids=" ".join
)  # fmt: skip
def test_a_text_that_has_moved_is_named_once_and_remembered(
    moved: tuple[Path, Path, str],
    words: list[str],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run, text, before = moved
    more = (
        ["--steps", "3"]
        if "--resume" in words
        else ["--out", str(tmp_path / "twin")]
        if "--dense-twin" in words
        else []
    )
    sentence = refused(*words, run, *more)
    assert "pyramid.txt, which the run names as its text, does not exist" in sentence and "--text" in sentence
    other = tmp_path / "other.txt"
    other.write_text(small_runs.PYRAMID.replace("stones", "stores"), encoding="utf-8")
    if words != ["evaluate"] and words != ["routing"]:  # these two can look at any text
        refused(*words, run, *more, "--text", other)
    assert main.main([*words, str(run), *more, "--text", str(text)]) == 0
    capsys.readouterr()
    if "--dense-twin" not in words:
        assert checkpoint.load_config(run).source.paths == [str(text)]
        assert main.main(["evaluate", str(run)]) == 0
        if "--resume" not in words:
            assert capsys.readouterr().out == before
    else:
        assert checkpoint.load_config(tmp_path / "twin").source.paths == [str(text)]


def test_a_text_that_is_still_in_its_place_is_another_text_when_it_is_given(
    moved: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, text, before = moved
    shutil.copy(text, tmp_path / "pyramid.txt")
    capsys.readouterr()
    assert main.main(["evaluate", str(run), "--text", str(text)]) == 0
    said, noted = capsys.readouterr()
    assert json.loads(said)["tokens"] > json.loads(before)["tokens"] and not noted
    assert checkpoint.load_config(run).source.paths == [str(tmp_path / "pyramid.txt")]


def test_evaluate_prints_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["evaluate", str(finished())]) == 0
    said, complained = capsys.readouterr()
    assert complained == ""
    assert said.count("\n") == 1
    found = json.loads(said)
    assert list(found) == ["loss", "bits_per_byte", "tokens", "load"]
    assert found["loss"] == round(metrics(finished())[-1]["val_loss"], 5), "no more digits than a loss means"
    held_out = small_runs.PYRAMID[int(0.9 * len(small_runs.PYRAMID)) :]
    assert found["tokens"] == len(held_out) - 1
    size = len(held_out[1:].encode())
    assert size > len(held_out), "ç and à are two bytes each"
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2) * found["tokens"] / size, abs=2e-5)
    np.testing.assert_allclose(np.sum(found["load"], axis=1), 1, atol=1e-4)


def test_evaluate_is_the_same_with_any_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    said = set()
    for threads in ("1", "2", "5"):
        assert main.main(["evaluate", str(finished()), "--threads", threads]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_evaluate_reads_other_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("4 steps up")
    (tmp_path / "b.txt").write_text("2")
    model = checkpoint.load_model(finished())
    assert main.main(["evaluate", str(finished()), "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = text_loss.evaluate(model.params, model.config, [model.tokenizer.encode("4 steps up")])
    assert found["tokens"] == 9
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-5)


def test_evaluate_with_the_suite_prints_a_table_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--dense-twin", str(run), "--out", str(run.parent / "dense"), "--device", "cpu"]) == 0
    few = ["--samples", "3", "--questions", "2", "--tokens", "20", "--seed", "5", "--device", "cpu"]
    words = ["evaluate", str(run), "--suite", "--against", str(run.parent / "dense"), *few]
    capsys.readouterr()
    assert main.main(words) == 0
    table, complained = capsys.readouterr()
    assert complained == ""
    for shown in ("held-out text, bits per byte", "pyramid", "difference", "not asked:", "temperature 0.8, seed 5"):
        assert shown in table
    assert main.main([*words, "--json", "--temperature", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"samples": 3, "questions": 2, "tokens": 20, "temperature": 0.5, "seed": 5}
    assert [model["name"] for model in found["models"]] == [str(run), str(run.parent / "dense")]


def test_a_dense_twin_is_called_after_its_mixture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert main.main(["train", "--dense-twin", "run", "--steps", "1", "--learning-rate", "0.5", "--device", "cpu"]) == 0
    twin = checkpoint.load_config(run.parent / "runs/run-dense")
    assert (twin.config.experts, twin.recipe.steps, twin.recipe.learning_rate) == (1, 1, 0.5)


# generate


def test_generate_continues_the_prompt_and_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in ("1", "1", "2"):
        words = ["--prompt", "4 steps up, ça", "--tokens", "30", "--seed", seed, "--top-k", "9", "--top-p", "0.95"]
        assert main.main(["generate", str(finished()), *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("4 steps up, ça")
    assert len(said[0]) == len("4 steps up, ça") + 30 + 1


def test_generate_writes_several_samples_each_by_its_own_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(finished()), "--prompt", "4 steps", "--tokens", "8"]
    alone = []
    for seed in ("3", "4"):
        assert main.main([*words, "--seed", seed]) == 0
        alone.append(capsys.readouterr().out)
    assert main.main([*words, "--seed", "3", "--samples", "2", "--threads", "1"]) == 0
    assert capsys.readouterr().out == f"--- seed 3 ---\n{alone[0]}--- seed 4 ---\n{alone[1]}"
    assert alone[0] != alone[1]


def test_generate_reads_the_prompt_from_standard_input() -> None:
    words = [sys.executable, "-m", "minimoe", "generate", finished(), "--prompt", "-", "--tokens", "0"]
    for piped, said, code in (
        (b"4 steps\n", b"4 steps\n", 0),
        (b"4\n\n", b"4\n\n", 0),  # only the line end that echo adds is dropped
        (b"\xff", b"standard input is not UTF-8", 2),
    ):
        done = subprocess.run(words, input=piped, capture_output=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True)


def test_generate_shows_control_characters_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt may be pasted from anywhere, and a model may have read anything."""
    evil = corpus.Corpus("evil", {"evil": "\x1b[2J\x07\x9b31m\r\u202e ok\n" * 30})
    small_runs.train(tmp_path / "run", evil, steps=1)
    capsys.readouterr()
    assert main.main(["generate", str(tmp_path / "run"), "--prompt", "\x1b[2J", "--tokens", "200"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("\\x1b[2J")
    assert not set("\x1b\x07\x9b\r\u202e") & set(said)
    assert "\\x07" in said, "among 200 tokens of a model that knows nothing there are some"


def test_chat_answers_what_is_piped_in(tmp_path: Path) -> None:
    folder = small_chats.save(tmp_path / "run", small_chats.tuned())
    words = [sys.executable, "-m", "minimoe", "chat", folder, "--system", "be.", "--temperature", "0", "--seed", "3"]
    done = subprocess.run(words, input=b"2 + 2?\n", capture_output=True)
    model = small_chats.tuned()
    turns = [Turn("system", "be."), Turn("user", "2 + 2?")]
    assert (done.returncode, done.stdout.decode()) == (0, conversation.answer(model, turns) + "\n")


def test_chat_with_a_model_that_was_not_tuned_is_refused(refused: Callable[..., str]) -> None:
    assert "tune it to answer with minimoe sft first" in refused("chat", finished())


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        ("Où ?\tOui,\n«\u00a0là\u202f» 🦉 e\u0301", "Où ?\tOui,\n«\u00a0là\u202f» 🦉 e\u0301"),
        (r"\x1b]0;title\x07", "\x1b]0;title\x07"),
        (r"\r\x08\x7f\x00\x9b\u2028", "\r\b\x7f\0\x9b\u2028"),
        (r"\u202e\u2066\u200b\ufeff", "\u202e\u2066\u200b\ufeff"),
        (r"\udcff\U000e0041", "\udcff\U000e0041"),
    ],
)
def test_text_is_shown_as_it_is_unless_it_could_steer_a_terminal(shown: str, text: str) -> None:
    assert printable(text) == shown


def test_a_terminal_that_knows_few_characters_gets_the_others_spelled_out() -> None:
    done = process("generate", finished(), "--prompt", "ça", "--tokens", "0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\xe7a\n"), done.stderr


# The other commands


def test_gradcheck_tells_by_its_exit_code_whether_all_gradients_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimoe.proof import gradcheck

    class Row:
        def __init__(self, passed: bool) -> None:
            self.passed = passed

    seeds: list[int] = []
    monkeypatch.setattr(gradcheck, "table", lambda rows: f"{len(rows)} rows")
    monkeypatch.setattr(gradcheck, "to_json", lambda rows: json.dumps(len(rows)))
    for passed, code in ((True, 0), (False, 1)):
        rows = [Row(True), Row(passed)]
        monkeypatch.setattr(gradcheck, "run", lambda seed, rows=rows: (seeds.append(seed), rows)[1])
        assert main.main(["gradcheck", "--seed", "5"]) == code
        assert main.main(["gradcheck", "--json"]) == code
        assert capsys.readouterr().out == "2 rows\n2\n"
    assert seeds == [5, 0, 5, 0]


def test_info_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info"]) == 0
    assert f"NumPy     {np.__version__}\n" in capsys.readouterr().out


def test_corpus_says_where_the_file_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shakespeare, "download", lambda: Path("/cache") / "shakespeare.txt")
    assert main.main(["corpus", "shakespeare"]) == 0
    assert capsys.readouterr().out == "/cache/shakespeare.txt\n"


def test_quantize_writes_a_folder_that_the_other_commands_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    assert main.main(["quantize", str(finished()), "--scheme", "rtn3", "--attention", "int8", "--out", out]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all ")
    losses = []
    for folder in (str(finished()), out):
        assert main.main(["evaluate", folder, "--threads", "1"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert main.main(["params", out]) == 0
    sizes = quantize.sizes(checkpoint.load_config(out).config, quantize.plan("rtn3", "int8"))
    assert quantize.table(sizes) in capsys.readouterr().out
    assert main.main(["params", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantised"] == [size._asdict() for size in sizes]
    assert main.main(["params", str(finished()), "--json"]) == 0
    assert "quantised" not in json.loads(capsys.readouterr().out)
    for words in (["generate", out, "--prompt", "ça", "--tokens", "3"], ["routing", out], ["params", out]):
        assert main.main(words) == 0
        assert capsys.readouterr().out


def test_quantize_explains_what_it_cannot_do(tmp_path: Path, refused: Callable[..., str]) -> None:
    def said(folder: Path, scheme: str, out: Path) -> str:
        return refused("quantize", folder, "--scheme", scheme, "--out", out)

    assert "did you mean 'int8'" in said(finished(), "int9", tmp_path / "out")
    assert "is not empty" in said(finished(), "nf4", finished())
    assert "is not a run" in said(tmp_path, "nf4", tmp_path / "out")
    assert "required: --scheme" in refused("quantize", finished(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prune_writes_a_folder_that_the_other_commands_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "small")
    assert main.main(["prune", str(finished()), "--keep", "3", "--out", out]) == 0
    assert " parameters are left" in capsys.readouterr().out.splitlines()[-1]
    losses = []
    for folder in (str(finished()), out):
        assert main.main(["evaluate", folder, "--threads", "1"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    for words in (
        ["generate", out, "--prompt", "ça", "--tokens", "3"],
        ["routing", out],
        ["params", out],
        ["quantize", out, "--scheme", "nf4", "--out", str(tmp_path / "smaller")],
        ["prune", out, "--keep", "2", "--method", "frequency", "--out", str(tmp_path / "two")],
    ):
        assert main.main(words) == 0
        assert capsys.readouterr().out


def test_prune_explains_what_it_cannot_do(tmp_path: Path, refused: Callable[..., str]) -> None:
    def said(folder: Path, *words: str, out: Path = tmp_path / "out") -> str:
        return refused("prune", folder, *words, "--out", out)

    assert "did you mean 'frequency'" in said(finished(), "--keep", "3", "--method", "frequenzy")
    assert "choose a number from 2 to 4" in said(finished(), "--keep", "1")
    assert "is not empty" in said(finished(), "--keep", "3", out=finished())
    assert "is not a run" in said(tmp_path, "--keep", "3")
    assert "required: --keep" in said(finished())
    assert not (tmp_path / "out").exists()


def test_merge_and_upcycle_write_runs_that_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, dense, out = str(finished()), str(tmp_path / "dense"), [str(tmp_path / str(n)) for n in range(3)]
    assert main.main(["merge", one, one, "--method", "slerp", "--align", "--out", out[0]]) == 0
    assert "is the merged model" in capsys.readouterr().out
    losses = []
    for folder in (one, out[0]):
        assert main.main(["evaluate", folder, "--threads", "1"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert main.main(["train", "--dense-twin", one, "--steps", "3", "--out", dense, "--threads", "1"]) == 0
    words = ["--experts", "4", "--active", "2", "--granularity", "2", "--steps", "2", "--batch", "2"]
    assert main.main(["upcycle", dense, *words, "--out", out[1]]) == 0
    assert "8 experts of width 8, 4 per token" in capsys.readouterr().out
    assert main.main(["train", "--resume", out[1], "--threads", "1"]) == 0
    assert main.main(["train", "--from", out[1], "--steps", "1", "--out", out[2], "--threads", "1"]) == 0


def test_merge_and_upcycle_explain_what_they_cannot_do(tmp_path: Path, refused: Callable[..., str]) -> None:
    one, out = finished(), tmp_path / "out"
    assert "1 models are too few" in refused("merge", one, "--out", out)
    assert "name that run with --base" in refused("merge", one, one, "--method", "ties", "--out", out)
    assert "choose one of average, slerp" in refused("merge", one, one, "--method", "mean", "--out", out)
    assert "required: --out" in refused("merge", one, one)
    assert "with 4 experts" in refused("upcycle", one, "--out", out)
    assert "is not empty" in refused("upcycle", one, "--out", one)
    assert "give one with --out" in refused("train", "--from", one)
    assert "experts 8 cannot be set here" in refused("train", "--from", one, "--experts", "8", "--out", out)
    assert not out.exists()


def test_distill_trains_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "student")
    words = ["--student", "teacher", "--experts", "2", "--steps", "2", "--from-teacher", "--threads", "1"]
    assert main.main(["distill", str(finished()), *words, "--out", out]) == 0
    assert "A mixture of 2 experts" in capsys.readouterr().out
    for command in (["evaluate", out, "--threads", "1"], ["generate", out, "--prompt", "ça", "--tokens", "3"]):
        assert main.main(command) == 0
        assert capsys.readouterr().out


def test_distill_explains_what_it_cannot_do(tmp_path: Path, refused: Callable[..., str]) -> None:
    def said(folder: Path, *words: str) -> str:
        return refused("distill", folder, *words, "--out", tmp_path / "out")

    assert "there is no student 'tinny'" in said(finished(), "--student", "tinny")
    assert "temperature 0.0 is not possible" in said(finished(), "--temperature", "0")
    assert "hard_share 2.0 is not a share" in said(finished(), "--hard-share", "2")
    assert "is not that of the teacher" in said(finished(), "--student", "tiny", "--tokenizer", "byte")
    assert "is not a run" in said(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_bound_of_memory_changes_no_number_and_no_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized = str(tmp_path / "small")
    assert main.main(["quantize", str(finished()), "--scheme", "nf4", "--out", quantized]) == 0
    capsys.readouterr()
    for folder in (str(finished()), quantized):
        for words in (
            ["evaluate", folder],
            ["generate", folder, "--prompt", "steps", "--tokens", "9", "--samples", "2"],
        ):
            assert main.main([*words, "--threads", "1"]) == 0
            expected = capsys.readouterr().out
            assert main.main([*words, "--threads", "1", "--memory", "9MB"]) == 0
            shown = capsys.readouterr()
            assert (shown.out, shown.err) == (expected, "")
            assert main.main([*words, "--threads", "1", "--memory", "9MB", "--report"]) == 0
            shown = capsys.readouterr()
            assert shown.out == expected
            assert re.search("^memory   bound 9.0 MB.*^mixtral-8x7b ", shown.err, re.DOTALL | re.MULTILINE)


def test_a_bound_of_memory_explains_what_it_cannot_do(refused: Callable[..., str], tmp_path: Path) -> None:
    generate = ["generate", finished(), "--prompt", "a"]
    assert "a bound of 1.0 KB is too small" in refused(*generate, "--memory", "1KB")
    assert "give at least --memory" in refused("evaluate", finished(), "--memory", "1KB")
    assert "memory '8' is not a size" in refused(*generate, "--memory", "8")
    assert "add --memory" in refused(*generate, "--report")
    assert "cannot go with --device gpu" in refused(*generate, "--memory", "8GB", "--device", "gpu")
    assert "cannot go with --suite" in refused("evaluate", finished(), "--suite", "--memory", "8GB")
    assert "is not a run" in refused("evaluate", tmp_path, "--memory", "8GB")


COMMANDS = (
    "train", "sft", "evaluate", "generate", "chat", "routing", "gradcheck", "params", "quantize", "prune", "merge",
    "upcycle", "distill", "dpo", "bench", "corpus", "info",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_can_be_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    _, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(re.split(r" {3,}", line.rpartition("minimoe ")[2])[0])
        assert words[0] == command
        parser.build().parse_args(words)


def test_help_names_every_corpus_every_published_model_every_scheme_and_every_method() -> None:
    assert cli_options.CORPORA == corpus.NAMES
    assert [*quantize.SCHEMES, quantize.FLOAT] == list(cli_options.SCHEMES)
    assert cli_options.PRUNING == prune.METHODS
    assert cli_options.MERGING == vectors.METHODS
    named = {name.partition("-N")[0] for name in cli_options.PUBLISHED}
    assert named == {re.sub(r"(switch-base)-\d+", r"\1", name) for name in published.PUBLISHED}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main([*command.split(), "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: minimoe {command}".strip())
    if command == "train":
        for kind in (ModelConfig, TrainConfig):
            for field in dataclasses.fields(kind):
                assert (f"--{field.name.replace('_', '-')}" in said) == (field.name != "vocab_size")


# Mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--stepz", "5"], "unrecognized arguments: --stepz 5"),
        (["train", "--step", "5"], "unrecognized arguments: --step 5"),  # abbreviations would change their meaning
        (["train", "--steps", "many"], "argument --steps: invalid whole number value: 'many'"),
        (["train", "--learning-rate", "fast"], "argument --learning-rate: invalid number value: 'fast'"),
        (["train", "--threads", "2.5"], "argument --threads: invalid"),
        (["train", "--corpus", "data", "--text", "x"], "not allowed with argument"),
        (["train", "\x1b[2J"], r"unrecognized arguments: \x1b[2J"),
        (["generate", "runs/x"], "the following arguments are required: --prompt"),
        (["train", "--active-experts", "9"], "active_experts 9 is more than experts 8"),
        (["train", "--heads", "6", "--kv-heads", "4"], "heads 6 cannot share kv_heads 4 evenly"),
        (["train", "--head-width", "7"], "head_width 7 is odd"),
        (["train", "--active-experts", "1"], "active_experts 1 with renormalize on"),
        (["train", "--width", "-4"], "width -4 is too small: it must be at least 1"),
        (["train", "--width", "0"], "width 0 is too small"),
        (["train", "--layers", "1000000000"], "layers 1000000000 is too large"),
        (["train", "--width", "1048576", "--layers", "4096"], "this machine has"),
        (["train", "--batch", "1048576", "--context", "4096"], "this machine has"),
        (["train", "--batch", "6", "--accumulate", "4"], "batch 6 cannot be divided into accumulate 4"),
        (["train", "--learning-rate", "nan"], "learning_rate nan is not a finite number"),
        (["train", "--learning-rate", "-1"], "learning_rate -1.0 is too small"),
        (["train", "--optimizer", "sgd"], "optimizer 'sgd' is unknown: choose one of muon, adamw"),
        (["train", "--window", "0"], "window 0 is too small"),
        (["train", "--preset", "tinny"], "there is no preset 'tinny' (did you mean 'tiny'?)"),
        (["train", "--corpus", "fabels"], "The corpus 'fabels' is unknown"),
        (["train", "--device", "tpu"], "device 'tpu' is unknown: choose auto, cpu or gpu"),
        (["train", "--threads", "0"], "threads 0 is not a number of threads"),
        (["train", "--text", "/nowhere/at/all.txt"], "/nowhere/at/all.txt does not exist"),
        (["train", "--text", "/"], "is a directory"),
        (["train", "--text", "x" * 300], "File name too long"),
        (["train", "--resume", "/nowhere"], "/nowhere is not a run: it has no config.json"),
        (["train", "--resume", "x", "--preset", "tiny"], "--preset cannot go with --resume"),
        (["train", "--resume", "x", "--out", "y"], "--out cannot go with --resume"),
        (["train", "--dense-twin", "/nowhere"], "/nowhere is not a run"),
        (["train", "--dense-twin", "x", "--corpus", "data"], "--corpus cannot go with --dense-twin"),
        (["train", "--resume", "x", "--dense-twin", "y"], "--dense-twin cannot go with --resume"),
        (["train", "--resume", "x", "--from", "y"], "--from cannot go with --resume"),
        (["train", "--dense-twin", "x", "--from", "y"], "--from cannot go with --dense-twin"),
        (["train", "--from", "x", "--preset", "tiny"], "--preset cannot go with --from"),
        (["evaluate", "/nowhere"], "/nowhere is not a run"),
        (["evaluate", "/nowhere", "--suite"], "/nowhere is not a run"),
        (["gradcheck", "--seed", "-1"], "seed -1 is not a seed"),
        (["evaluate", "x", "--json"], "--json belongs to the suite: add --suite"),
        (["evaluate", "x", "--against", "y"], "--against belongs to the suite"),
        (["evaluate", "x", "--seed", "0"], "--seed belongs to the suite"),
        (["evaluate", "x", "--suite", "--text", "y"], "--text cannot go with --suite"),
        (["evaluate", "x", "--suite", "--samples", "0"], "samples 0 leaves nothing to measure"),
        (["generate", "/nowhere", "--prompt", "a"], "/nowhere is not a run"),
        (["corpus", "bible"], "'bible' is unknown; the only one to download is 'shakespeare'"),
        (["corpus", "fables"], "'fables' is here already: train on it with --corpus fables"),
        (["train", "--resume", ""], "--resume is empty, expected a value"),
        (["train", "--out", ""], "--out is empty"),
        (["train", "--text", "a", ""], "--text is empty"),
        (["train", "--dense-twin", ""], "--dense-twin is empty"),
        (["evaluate", ""], "the argument folder is empty"),
        (["params", ""], "the argument model is empty"),
        (["params", "toy", "--figure", ""], "--figure is empty"),
        (["generate", "x", "--prompt", "a", "--temprature", "1"], "--temprature 1 (see minimoe generate --help)"),
        (["generate", "x", "--prompt", "a", "--samples", "0"], "samples 0 is too small: generate at least 1 text."),
        (["generate", "x", "--prompt", "a", "--tokens", "1.5"], "invalid whole number value: '1.5'"),
        (["train", "--threads", "1e3"], "invalid whole number value: '1e3'"),
        (["params", "toy", "--figure", "/"], "/ is a folder: give the name of a file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_sentence(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources, "memory_bytes", lambda: 32 * 10**9)
    assert says in refused(*words)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"caf\xe9 au lait", "is not UTF-8: the byte at offset 3 is 0xe9"),
        (b"too short", "has 9 tokens, too few for a context of 128"),
    ],
)
def test_a_text_that_cannot_be_learned_from_is_refused(
    refused: Callable[..., str], tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert says in refused("train", "--text", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named(refused: Callable[..., str], text: Path) -> None:
    for out in (text, text / "below" / "a file", "/proc/minimoe"):
        said = refused("train", "--text", text, "--out", out, *options())
        assert f"{out} cannot be written" in said
        assert "choose another folder with --out" in said


def test_a_second_training_into_a_folder_is_refused(refused: Callable[..., str], run: Path, text: Path) -> None:
    assert f"continue it with --resume {run}" in refused("train", "--text", text, "--out", run, *options())


def test_resume_refuses_a_changed_setting(refused: Callable[..., str], run: Path) -> None:
    said = refused("train", "--resume", run, "--width", "16")
    assert "width was 8 when this run began and cannot become 16" in said
    assert "has taken 6 steps already" in refused("train", "--resume", run, "--steps", "2")


def test_mixtral_is_refused_with_its_size(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_bytes", lambda: 64 * 10**9)
    said = refused("train", "--preset", "mixtral-8x7b")
    assert re.search(r"46,702,792,704 parameters needs [\d,.]+ GB .* this machine has 64.0 GB", said)


def test_a_gpu_that_is_not_there_is_explained(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # which makes importing it fail
    for words in (["train"], ["evaluate", finished()], ["generate", finished(), "--prompt", "4"]):
        assert "CuPy is not installed: run `pip install cupy-cuda" in refused(*words, "--device", "gpu")


def test_a_prompt_with_unseen_characters_names_them(refused: Callable[..., str]) -> None:
    said = refused("generate", finished(), "--prompt", "4 steps Ω\x1b")
    assert "'Ω', '\\x1b'" in said
    assert "--tokenizer byte" in said
    assert "prompt is empty" in refused("generate", finished(), "--prompt", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "-1"], "tokens -1"),
        (["--temperature", "-0.5"], "temperature -0.5"),
        (["--temperature", "nan"], "temperature nan"),
        (["--top-k", "0"], "top_k 0"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--seed", "-3"], "seed -3"),
    ],
)
def test_a_way_of_sampling_that_makes_no_sense_is_refused(
    refused: Callable[..., str], words: list[str], says: str
) -> None:
    assert says in refused("generate", finished(), "--prompt", "4", *words)


def spoil_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def spoil_digit(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    assert '"steps": 6' in content
    path.write_text(content.replace('"steps": 6', '"steps": 9'), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "model.safetensors").write_bytes(b"PK\x03\x04" * 99), "not a whole safetensors file"),
        (lambda run: os.truncate(run / "model.safetensors", 9000), "cut short"),
        (lambda run: spoil_middle(run / "model.safetensors"), "do not match its checksum"),
        (lambda run: (run / "config.json").write_text('{"format": 1,'), "cannot be read as JSON"),
        (lambda run: spoil_digit(run / "config.json"), "does not match its checksum"),
        (lambda run: edit_config(run, lambda values: values.update(format=9)), "has format 9"),
        (lambda run: edit_config(run, lambda values: values["model"].update(depth=3)), "'depth'"),
        (lambda run: edit_config(run, lambda values: values["model"].update(expert_width=9)), "not belong to one run"),
    ],
    ids=["foreign", "cut", "flipped", "broken JSON", "config flipped", "format", "unknown field", "mismatch"],
)
def test_a_spoiled_run_is_refused_by_every_command(
    refused: Callable[..., str], run: Path, spoil: Callable[[Path], Any], says: str
) -> None:
    spoil(run)
    assert says in refused("evaluate", run)
    assert says in refused("generate", run, "--prompt", "4")
    shutil.copy(run / "model.safetensors", run / "resume.safetensors")
    assert says in refused("train", "--resume", run, "--steps", "7")


def edit_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    values.pop("sha256", None)
    change(values)
    (run / "config.json").write_text(json.dumps(values), encoding="utf-8")


def test_evaluate_refuses_texts_it_cannot_read(refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("4")
    (tmp_path / "greek.txt").write_text("λόγος")
    assert "nothing to predict" in refused("evaluate", run, "--text", tmp_path / "one.txt")
    assert "'λ'" in refused("evaluate", run, "--text", tmp_path / "greek.txt")
    assert "does not exist" in refused("evaluate", run, "--text", tmp_path / "none.txt")


def test_memory_that_runs_out_is_said_in_a_sentence(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*_: Any, **__: Any) -> None:
        np.empty(2**60, np.uint8)

    monkeypatch.setattr(trainer, "train", starve)
    assert "there is not enough memory (Unable to allocate" in refused("train")


EVIL = "\x1b[2J\x9b31m\u202e\r\n\x07<script>"


def test_a_sentence_that_quotes_a_file_cannot_steer_a_terminal(refused: Callable[..., str]) -> None:
    assert r"\x1b[2Jrun is not a run" in refused("evaluate", "\x1b[2Jrun")
    for words in (["evaluate", EVIL], ["train", "--text", EVIL], ["train", EVIL], ["train", "--corpus", EVIL]):
        assert r"\x1b[2J\x9b31m\u202e" in refused(*words)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses such names itself")
def test_names_that_are_printed_cannot_steer_a_terminal(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / EVIL
    shutil.copytree(run, evil)
    text = str(tmp_path / f"{EVIL}.txt")
    Path(text).write_text(small_runs.PYRAMID, encoding="utf-8")
    monkeypatch.setattr(shakespeare, "download", lambda: evil)
    for words in (
        ["params", str(evil)],
        ["routing", str(evil), "--text", text],
        ["routing", str(evil), "--text", text, "--json"],
        ["routing", str(evil), "--text", text, "--html", str(tmp_path / f"{EVIL}.html")],
        ["train", "--text", text, "--out", str(tmp_path / f"{EVIL}2"), *options(steps=1)],
        ["train", "--resume", str(evil), "--steps", "7"],
        ["corpus", "shakespeare"],
    ):
        assert main.main(words) == 0
        said, complained = capsys.readouterr()
        assert said
        assert not set("\x1b\x9b\u202e\x07") & set(said + complained), words


def test_a_figure_shows_names_as_they_are(run: Path, tmp_path: Path) -> None:
    """Dollars would set mathematics, which fails where there is none, and an underscore would leave the legend."""
    evil = tmp_path / r"_$\frac$"
    shutil.copytree(run, evil)
    assert main.main(["params", str(evil), "--figure", str(tmp_path / "sizes.png")]) == 0
    assert (tmp_path / "sizes.png").exists()


def test_help_shows_what_the_toy_really_has_and_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.partition("\nexamples:")[0].split())
    for name, value in (vars(presets.preset("toy").config) | vars(presets.preset("toy").recipe)).items():
        if name != "vocab_size":
            shown = re.split(rf" --{name.replace('_', '-')}[ ,]", said)[-1]
            assert shown.partition("(toy: ")[2].startswith(f"{'none' if value is None else value})"), name
    assert "units of text: char or byte (toy: char)" in said


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_page_is_written_through_a_link_and_into_no_folder_or_device(
    run: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    assert main.main(["routing", str(run), "--html", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "page.html").read_text().startswith("<!")
    capsys.readouterr()
    os.mkfifo(tmp_path / "pipe")
    for place, says in ((tmp_path, "is a folder"), (".", "is a folder"), (tmp_path / "pipe", "is not a regular file")):
        assert f"{place} {says}: give the name of a file" in refused("routing", run, "--html", place)


@pytest.mark.parametrize("prompt", ["-5 + 3=", "-5+3=", "- ", "--> ", "-1"])
def test_a_prompt_may_begin_with_a_minus(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "minimoe.inference.generation.stream", lambda model, prompt, *_, **__: asked.append(prompt) or []
    )
    for words in (["--prompt", prompt, "--tokens", "3"], ["--tokens", "3", "--prompt", prompt], [f"--prompt={prompt}"]):
        assert main.main(["generate", str(finished()), *words]) == 0
    assert asked == [prompt] * 3


def test_a_value_that_looks_like_an_option_is_told_the_way_out(refused: Callable[..., str]) -> None:
    assert "one that begins with - is written --out=…" in refused("train", "--out", "-x")
    assert "is written --text=…" in refused("train", "--text", "-x.txt")
    assert "is written --prompt=…" in refused("generate", "x", "--prompt", "--tokens", "3")


def test_a_home_folder_is_understood_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for words in (
        ["train", "--text=~/pyramid.txt", "--out=~/run", *options(steps=1)],
        ["train", "--resume=~/run", "--steps=2"],
        ["train", "--dense-twin=~/run", "--out=~/twin"],
        ["evaluate", "~/run", "--suite", "--against=~/twin", "--samples=1", "--questions=1", "--tokens=9"],
        ["evaluate", "~/run", "--text=~/pyramid.txt"],
        ["generate", "~/run", "--prompt=4", "--tokens=1"],
        ["routing", "~/run", "--html=~/page.html"],
        ["params", "~/run", "--figure=~/parts.png"],
    ):
        assert main.main(words) == 0, words
    assert not list((tmp_path / "work").iterdir())
    assert {"run", "twin", "page.html", "parts.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_command_in_a_notebook_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    before = (
        sys.stdout,
        sys.stderr,
        dict(os.environ),
        np.geterr(),
        str(matplotlib.rcParams["backend"]),
        sys.stdout.errors,
    )
    assert main.main(["params", "toy", "--figure", str(tmp_path / "parts.png")]) == 0
    assert main.main(["evaluate", "/nowhere"]) == 2
    with pytest.raises(SystemExit):
        main.main(["trian"])
    after = (
        sys.stdout,
        sys.stderr,
        dict(os.environ),
        np.geterr(),
        str(matplotlib.rcParams["backend"]),
        sys.stdout.errors,
    )
    assert after == before


def test_the_advice_about_memory_names_options_that_the_command_has(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*_: Any, **__: Any) -> None:
        np.empty(2**60, np.uint8)

    for module in ("storage.open_model.load", "storage.pruned.write", "training.trainer.train", "timing.bench.run"):
        monkeypatch.setattr(f"minimoe.{module}", starve)
    for command in main.MEMORY_ADVICE:
        more = {"generate": ["--prompt", "a"], "prune": ["--keep", "2", "--out", "y"]}
        words = [] if command in ("bench", "train") else ["x", *more.get(command, [])]
        named = re.findall(r"--[a-z-]+", refused(command, *words).partition("):")[2])
        assert named, command
        for option in named:
            parser.build().parse_args([command, *words, option, "1"])


@pytest.mark.parametrize(
    "words",
    [["train", "--out"], ["train", "--resume"], ["evaluate"], ["routing"], ["params"], ["train", "--text"],
     ["evaluate", "x", "--text"], ["generate", "--prompt", "a"], ["params", "toy", "--figure"]], ids=" ".join,
)  # fmt: skip
def test_a_zero_byte_in_a_path_is_refused(refused: Callable[..., str], words: list[str]) -> None:
    assert re.search("is not a valid path|is not a run", refused(*words, "a\0b"))


# Real processes


@pytest.mark.skipif(sys.platform != "linux", reason="limits and closed descriptors are Linux's")
@pytest.mark.parametrize("shell", ["<&- >&- 2>&-", "<&- 2>&-", ">&-"])
def test_a_training_with_closed_descriptors_is_whole(tmp_path: Path, text: Path, shell: str) -> None:
    words = [sys.executable, "-m", "minimoe", "train", "--text", text, "--out", tmp_path / "run", "--threads", "2"]
    command = shlex.join(map(str, [*words, *options(steps=2, experts=1, active_experts=1, noisy_gating=False)]))
    assert subprocess.run(["bash", "-c", f"{command} {shell}"], capture_output=True).returncode == 0
    assert checkpoint.load_model(tmp_path / "run").step == 2
    assert (tmp_path / "run" / ".lock").read_bytes() == b"", "no output went into a file of the run"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently on Windows")
@pytest.mark.parametrize("shown", ["2>&1 | head -c 20", ">/dev/full 2>&1", ">&- 2>&-"])
def test_a_training_whose_output_cannot_be_shown_goes_on_to_its_end(tmp_path: Path, text: Path, shown: str) -> None:
    words = ["-m", "minimoe", "train", "--text", text, "--out", tmp_path / "run", *options(steps=12, save_every=0)]
    command = shlex.join(map(str, [sys.executable, *words]))
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {shown}"], env=environment, capture_output=True, encoding="cp1252"
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|Exception ignored|stops", done.stdout + done.stderr)
    assert checkpoint.load_model(tmp_path / "run").step == 12
    assert (tmp_path / "run" / "experts.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream as only a POSIX shell does")
def test_closed_streams_and_a_wrong_backend_are_no_reason_to_fail(tmp_path: Path) -> None:
    words = f"{sys.executable} -m minimoe params toy --figure {tmp_path / 'parts.png'}"
    done = subprocess.run(["sh", "-c", f"{words} >&- 2>&-"], env=os.environ | {"MPLBACKEND": "nonsense"})
    assert done.returncode == 0
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--active-experts", "9"], "active_experts 9 is more than experts 8"),
        (["train", "--preset", "mixtral-8x7b", "--batch", "1048576"], "46,702,792,704 parameters"),
        (["evaluate", "/nowhere"], "is not a run"),
        (["train", "--steps"], "expected one argument"),
    ],
)
def test_a_mistake_ends_the_process_with_one_sentence_and_code_2(words: list[str], says: str) -> None:
    done = process(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_training_that_overflows_ends_the_process_with_one_sentence(tmp_path: Path, text: Path) -> None:
    wild = options(steps=50, learning_rate=10.0, weight_decay=10.0, warmup=0, clip=0.0)
    done = process("train", "--text", text, "--out", tmp_path / "run", *wild)
    assert done.returncode == 2
    assert "RuntimeWarning" not in done.stderr
    assert "Traceback" not in done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert re.match(
        r"minimoe: the loss or its gradient is not a finite number at step \d+; the checkpoint of", sentence
    )
    assert checkpoint.load_progress(tmp_path / "run", checkpoint.load_config(tmp_path / "run")) is not None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_said_in_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minimoe", "info"], stdout=full, stderr=subprocess.PIPE, encoding="utf-8"
        )
    assert done.returncode == 2
    assert re.fullmatch(r"minimoe: the system refuses the operation \(.*No space left on device\).*\n", done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently on Windows")
def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "minimoe", "generate", finished(), "--prompt", "4", "--tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert started.stdout is not None
    assert started.stdout.read(5)
    started.stdout.close()
    assert started.stderr is not None
    assert started.stderr.read() == b""
    assert started.wait(timeout=60) == 0


HEAVY = ("matplotlib", "tqdm", "safetensors", "threadpoolctl", "cupy", "tokenizers")


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("from minimoe import *", HEAVY),
        ("from minimoe.cli import main", (*HEAVY, "numpy")),
        (
            "from minimoe.training import trainer\nfrom minimoe.storage import checkpoint\n"
            "from minimoe.text import corpus\nfrom minimoe.timing import machine",
            HEAVY,
        ),
    ],
)
def test_an_import_brings_nothing_that_it_does_not_need(statement: str, without: tuple[str, ...]) -> None:
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert set(without) & set(done.stdout.split()) == set()


def test_help_and_import_answer_at_once() -> None:
    """Processor time, measured against Python with NumPy, since a busy machine is slow at everything."""

    def seconds(*words: str) -> float:
        best = float("inf")
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            best = min(best, spent)
        return best

    numpy = seconds("-c", "import numpy")
    assert seconds("-m", "minimoe", "--help") < numpy + 0.1
    assert seconds("-c", "from minimoe import *") < 2 * numpy + 0.15


def test_every_room_can_be_reached_from_the_package() -> None:
    rooms = sorted(path.parent.name for path in (ROOT / "minimoe").glob("*/__init__.py"))
    assert "inference" in rooms and len(rooms) > 10
    code = (
        "import sys, minimoe\n"
        "print(minimoe.train.__module__, hasattr(minimoe, 'inferences'), hasattr(minimoe, 'a.b'))\n"
        "for room in sys.argv[1:]: print(getattr(minimoe, room).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, *rooms], capture_output=True, encoding="utf-8", check=True)
    first, *others = done.stdout.splitlines()
    assert first.split() == ["minimoe.training.trainer", "False", "False"]
    assert others == [f"minimoe.{room}" for room in rooms]
    assert set(dir(minimoe)) >= set(minimoe.__all__)


def test_sft_tunes_a_run_that_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    monkeypatch.setattr("minimoe.draw.plots.save", lambda figure, path: None)
    lines = [{"kind": "copy", "document": f"{n}", "turns": [["user", "ad"], ["assistant", "ad"]]} for n in range(40)]
    told = tmp_path / "told.jsonl"
    told.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["sft", str(finished()), "--instructions", str(told), "--out", str(tmp_path / "tuned"), "--threads", "1"]
    short = ["--steps", "4", "--batch", "2", "--capacity-factor", "none", "--evaluate-every", "2"]
    assert main.main([*words, *short, "--freeze", "router", "experts", "--pad", "--patience", "none"]) == 0
    tuning = checkpoint.load_config(tmp_path / "tuned").tuning
    assert tuning is not None and (tuning.settings["pack"], tuning.settings["patience"]) == (False, None)
    assert tuning.frozen and all(".moe." in name for name in tuning.frozen)
    assert [row["step"] for row in metrics(tmp_path / "tuned")] == [1, 2, 3, 4]
    assert f"minimoe chat {tmp_path / 'tuned'}" in capsys.readouterr().out
    for command in ("sft", "train"):
        steps = 5 if command == "sft" else 6
        assert main.main([command, "--resume", str(tmp_path / "tuned"), "--steps", f"{steps}"]) == 0
        assert metrics(tmp_path / "tuned")[-1]["step"] == steps
    capsys.readouterr()
    assert "there is no model to tune" in refused("sft")
    assert "--freeze cannot go with --resume" in refused("sft", "--resume", tmp_path / "tuned", "--freeze", "router")
    assert "--patience cannot go with" in refused("sft", "--resume", tmp_path / "tuned", "--patience", "none")
    assert "already holds a run" in refused(*words)
    assert "not allowed with argument" in refused("sft", finished(), "--pack", "--pad")


def test_sft_trains_adapters_of_the_given_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def tune(folder: str, **settings: Any) -> Any:
        given.update(settings)
        return types.SimpleNamespace(finished=True, problem=None)

    monkeypatch.setattr("minimoe.tuning.sft.tune", tune)
    assert main.main(["sft", "runs/x", "--lora", "8", "--lora-alpha", "4", "--lora-dropout", "0.1", "--qlora"]) == 0
    assert tuple(given["lora"]) == (8, 4.0, 0.1, False, "nf4")
    assert main.main(["sft", "runs/x", "--lora", "3"]) == 0
    assert tuple(given["lora"]) == (3, None, 0.0, False, None)
    assert main.main(["sft", "runs/x"]) == 0
    assert given["lora"] is None


def test_settings_of_adapters_need_a_rank_and_a_resumed_run_has_its_own(refused: Callable[..., str]) -> None:
    for words in (["--qlora"], ["--lora-alpha", "2"], ["--lora-dropout", "0.1"]):
        assert f"{words[0]} is a setting of adapters: give --lora RANK too" in refused("sft", "runs/x", *words)
    assert "--lora cannot go with --resume" in refused("sft", "--resume", "runs/x", "--lora", "4")
