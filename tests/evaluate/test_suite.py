"""The evaluation suite: what it measures is what it says, and what cannot be measured is said, not invented."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_chats
import small_runs

from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.evaluate import suite, suite_table, sums, text_loss, well_formed
from minimoe.evaluate.suite import Marks, Means, Measured, Settings
from minimoe.inference import generation
from minimoe.storage import checkpoint, huggingface, open_model, quantized
from minimoe.text import batches
from minimoe.text.corpus import UNKNOWN, Corpus
from minimoe.training import trainer

EXERCISES = "\n\n".join(
    f"[ ] - {a} = {b}   The box holds {a} + {b} = {a + b}" for a in range(4, 30) for b in (5, 12, 38)
)
CODE = "\n\n\n".join(f"def f{n}(x):\n    return (x, {n})" for n in range(60))
CORPUS = Corpus("school", {"exercises": EXERCISES + "\n", "code": CODE + "\n"})
FEW = Settings(samples=6, questions=9, tokens=12)


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """No figures, no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimoe.training.run_report.write", lambda *_: None)
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def runs(plain: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small runs on one corpus, a mixture and its dense twin, and a third on prose."""
    folder = tmp_path_factory.mktemp("runs")
    small_runs.train(folder / "mixture", CORPUS)
    trainer.train_dense_twin(
        folder / "mixture", corpus=CORPUS, out=folder / "dense", device="cpu", threads=1, progress=False
    )
    small_runs.train(folder / "prose")
    return {path.name: path for path in folder.iterdir()}


def measured(folder: Path, corpus: Corpus = CORPUS, settings: Settings = FEW, **more: Any) -> Measured:
    return suite.run(folder, settings=settings, corpus=corpus, device="cpu", threads=1, **more).models[0]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, int], str]], None]:
    """Lets every model write what a function of the prompt and the seed says."""

    def use(author: Callable[[str, int], str]) -> None:
        monkeypatch.setattr(
            generation, "write", lambda model, prompt, tokens, *, temperature, seed=0: author(prompt, seed)
        )

    return use


# What is measured


def test_losses_are_those_of_evaluation(runs: dict[str, Path]) -> None:
    model = checkpoint.load_model(runs["mixture"])
    data = batches.reload(model.run.source, model.tokenizer, model.config.context, CORPUS)
    found = measured(runs["mixture"])
    assert list(found.losses) == ["exercises", "code"]
    for losses, ids in zip(found.losses.values(), data.validation, strict=True):
        whole = text_loss.evaluate(model.params, model.config, [ids])
        size = model.tokenizer.bytes_of(ids[1:])
        assert losses.sizes.sum() == size
        assert len(losses.sizes) == -(-(len(ids) - 1) // model.config.context)
        assert losses.bits.sum() / size == pytest.approx(text_loss.bits_per_byte(whole, size), rel=1e-5)


def test_chance_of_a_loss_is_the_frequency_of_characters(runs: dict[str, Path]) -> None:
    model = checkpoint.load_model(runs["mixture"])
    data = batches.reload(model.run.source, model.tokenizer, model.config.context, CORPUS)
    text = model.tokenizer.decode(data.train)
    held_out = model.tokenizer.decode(data.validation[1])[1:]
    p = {c: (text.count(c) + 1) / (len(text) + model.config.vocab_size) for c in set(held_out)}
    expected = -sum(np.log2(p[c]) for c in held_out) / len(held_out)
    assert measured(runs["mixture"]).losses["code"].chance == pytest.approx(expected)


def answer(prompt: str) -> str:
    """What a model that can add writes behind a question, and well-formed texts elsewhere."""
    if "The box holds" in prompt:
        left, sign, right = re.findall(r"(\d+) ([+-]) (\d+) = $", prompt)[0]
        return str(int(left) + int(right) if sign == "+" else int(left) - int(right)) + "\n\n["
    if prompt == well_formed.DEFINITION:
        return "f(x):\n    return x\n\n\nx"
    return "(a) [b]\nc ("


def test_a_model_that_can_do_it_is_always_right(runs: dict[str, Path], writes: Any) -> None:
    writes(lambda prompt, seed: answer(prompt))
    marks = measured(runs["mixture"]).marks
    assert list(marks) == ["unseen sums, addition", "unseen sums, subtraction", suite.PYTHON, suite.BRACKETS]
    lengths = [9, 9, 6, 6]
    for mark, length in zip(marks.values(), lengths, strict=True):
        assert isinstance(mark, Marks)
        assert mark.right.all() and len(mark.right) == length


def test_every_attempt_is_marked_by_itself(runs: dict[str, Path], writes: Any) -> None:
    """Each author is right in some cases that can be counted, and in no other."""
    writes(lambda prompt, seed: answer(prompt) if seed % 3 == 0 else "f(x:\n    )\nx" if "def" in prompt else ")\n")
    marks = measured(runs["mixture"]).marks
    for task in (suite.PYTHON, suite.BRACKETS):
        assert marks[task].right.tolist() == [True, False, False, True, False, False]  # type: ignore[union-attr]
    writes(lambda prompt, seed: "20\n" if "box" in prompt else "")
    questions = sums.unseen(EXERCISES, "addition", 10_000)
    found = measured(runs["mixture"], settings=FEW._replace(questions=10_000)).marks["unseen sums, addition"]
    assert isinstance(found, Marks)
    assert found.right.sum() == sum(question.answer == "20" for question in questions) > 0
    assert found.right.mean() <= found.chance, "the commonest answer is the best constant"


def test_a_sum_is_asked_greedily_and_none_is_in_the_training_text(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def write(model: Any, prompt: str, tokens: int, **how: Any) -> str:
        asked.append((prompt, how["temperature"]))
        return ""

    monkeypatch.setattr(generation, "write", write)
    measured(runs["mixture"])
    questions = [(prompt, temperature) for prompt, temperature in asked if "box" in prompt]
    assert len(questions) == 18
    for prompt, temperature in questions:
        assert temperature == 0
        assert prompt.strip() not in EXERCISES[: int(0.9 * len(EXERCISES))]
    asked.clear()
    measured(runs["mixture"], settings=FEW._replace(seed=1))
    assert questions != [pair for pair in asked if "box" in pair[0]], "another seed asks other questions"


def test_by_chance_is_what_was_written_in_disorder(runs: dict[str, Path], writes: Any) -> None:
    writes(lambda prompt, seed: "f():\n    return\n\n\nx" if "def" in prompt else "(" * 9 + ")" * 9 + "\n")
    marks = measured(runs["mixture"], settings=FEW._replace(tokens=60)).marks
    for task in (suite.PYTHON, suite.BRACKETS):
        found = marks[task]
        assert isinstance(found, Marks)
        assert found.right.all()
        assert found.chance < 0.5, "of all orders of nine pairs, one in ten is closed"
        assert found.reachable is not None and found.reachable > 0.5


def test_another_seed_shares_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(generation, "write", lambda *_, temperature, seed: seeds.append(seed) or "")
    for seed in range(3):
        suite._write(None, "x", FEW._replace(samples=6, seed=seed), map)  # type: ignore[arg-type]
    assert len(set(seeds)) == 18


def test_trained_tokens_are_those_of_the_models_own_file(runs: dict[str, Path], tmp_path: Path) -> None:
    """A run that was killed has taken more steps, and written lines about them, than its model has seen."""
    folder = shutil.copytree(runs["mixture"], tmp_path / "run")
    model = checkpoint.load_model(folder)
    seen = model.run.recipe.steps * model.run.recipe.batch * model.config.context
    assert suite._trained_tokens(model) == seen > 0
    (folder / "metrics.jsonl").unlink()
    tensors, metadata = files.read_tensors(folder / "model.safetensors")
    files.write_tensors(folder / "model.safetensors", tensors, {**metadata, "step": "0"})
    assert suite._trained_tokens(checkpoint.load_model(folder)) == 0
    for step in ("", "-1", "many", "9" * 5000):
        files.write_tensors(folder / "model.safetensors", tensors, {**metadata, "step": step})
        with pytest.raises(UserError, match="steps, expected a number"):
            checkpoint.load_model(folder)


def test_a_shuffled_text_keeps_its_brackets_and_quotes(runs: dict[str, Path], writes: Any) -> None:
    """Wherever its line end has gone."""
    text = "()" + 40 * "x" + "\n"
    writes(lambda prompt, seed: text)
    found = measured(runs["mixture"], settings=FEW._replace(tokens=70, samples=30)).marks[suite.BRACKETS]
    assert isinstance(found, Marks)
    assert found.chance == np.mean([well_formed.is_closed(one) for one in suite._shuffled([text] * 30, FEW.seed)])


def test_texts_without_a_bracket_do_not_count(runs: dict[str, Path], writes: Any) -> None:
    writes(lambda prompt, seed: "(a)\n" if seed == 4 else "nothing to close\n")
    found = measured(runs["mixture"]).marks[suite.BRACKETS]
    assert isinstance(found, Marks)
    assert found.right.tolist() == [True]
    writes(lambda prompt, seed: "nothing to close\n")
    assert "none of the 6 texts" in str(measured(runs["mixture"]).marks[suite.BRACKETS])


# What cannot be measured


def test_a_model_of_prose_is_not_asked_for_sums_or_python(runs: dict[str, Path]) -> None:
    marks = measured(runs["prose"], small_runs.CORPUS).marks
    assert "no line like '[ ] - 36 = 21" in str(marks["unseen sums, addition"])
    assert marks[suite.PYTHON] == "not measured: the training text contains no Python"


def test_a_character_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    ones = Corpus("ones", {"ones": "[ ] - 11 = 1   The box holds 11 + 1 = 12\n" * 12})
    small_runs.train(tmp_path / "ones", ones, steps=0)
    reason = str(measured(tmp_path / "ones", ones).marks["unseen sums, addition"])
    assert reason.startswith("not asked: The text contains '") and "knows only the" in reason


def test_without_line_ends_no_text_can_begin(tmp_path: Path) -> None:
    one_line = Corpus("line", {"line": "a (b) c " * 30})
    small_runs.train(tmp_path / "line", one_line, steps=0)
    assert "no line ends" in str(measured(tmp_path / "line", one_line).marks[suite.BRACKETS])


# The same each time


def test_a_seed_repeats_itself_with_any_number_of_threads(runs: dict[str, Path]) -> None:
    said = [
        suite_table.to_json(
            suite.run(
                runs["mixture"], runs["dense"], FEW._replace(seed=seed), corpus=CORPUS, device="cpu", threads=threads
            )
        )
        for seed, threads in ((0, 1), (0, 3), (1, 1))
    ]
    assert said[0] == said[1] != said[2]


# Side by side


def test_the_dense_twin_has_the_active_parameters_of_the_mixture(runs: dict[str, Path]) -> None:
    mixture, dense = (measured(runs[name]) for name in ("mixture", "dense"))
    config = checkpoint.load_config(runs["mixture"]).config
    router = config.layers * config.width * config.experts
    assert dense.active == dense.total == mixture.active - router
    assert mixture.total > mixture.active
    ours, theirs = (checkpoint.load_config(runs[name]) for name in ("mixture", "dense"))
    assert theirs.source == ours.source and theirs.tokenizer == ours.tokenizer
    assert theirs.config == dataclasses.replace(
        ours.config, experts=1, active_experts=1, expert_width=16, noisy_gating=False
    )
    assert (theirs.recipe.steps, theirs.recipe.batch, theirs.recipe.seed) == (6, 4, 0)
    rows = small_runs.metrics(runs["dense"])
    assert all(row["total"] == row["loss"] for row in rows), "a dense model has nothing to balance"


def test_a_twin_can_have_a_recipe_of_its_own_and_refuses_what_makes_no_sense(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def train(folder: Path, out: str, **changes: Any) -> Any:
        return trainer.train_dense_twin(
            folder, corpus=CORPUS, changes=changes, out=tmp_path / out, device="cpu", threads=1, progress=False
        )

    recipe = checkpoint.load_config(train(runs["mixture"], "own", steps=1, learning_rate=0.5).folder).recipe
    assert (recipe.steps, recipe.learning_rate) == (1, 0.5)
    with pytest.raises(UserError, match="dense already"):
        train(runs["dense"], "again")
    with pytest.raises(UserError, match="has changed"):
        train(runs["prose"], "other")
    assert not (tmp_path / "again").exists() and not (tmp_path / "other").exists()


def test_a_tuned_model_is_compared_with_its_base(tmp_path: Path) -> None:
    """Its tokenizer has more tokens, but the text and its ids are the same."""
    base = tmp_path / "base"
    small_runs.train(base, "data", steps=0, context=64)
    text = checkpoint.load_config(base).tokenizer
    folder = small_chats.save(tmp_path / "tuned", small_chats.tuned(64, text, base=base))  # type: ignore[arg-type]
    settings = Settings(samples=1, questions=1, tokens=2)
    one, other = suite.run(folder, base, settings, device="cpu", threads=1).models
    assert list(one.marks) == list(other.marks) and list(one.means) == list(other.means) != []
    assert isinstance(one.marks["held-out instructions, sums"], Marks)
    assert "minimoe sft" in str(other.marks["held-out instructions, sums"])
    assert suite.run(base, folder, settings, device="cpu", threads=1).models[1].marks.keys() == one.marks.keys()
    assert not suite.run(base, None, settings, device="cpu", threads=1).models[0].means


def test_a_model_that_was_trained_elsewhere_is_measured_without_a_text(tmp_path: Path) -> None:
    """It keeps its own tokenizer, which is another object each time that it is read."""
    pytest.importorskip("tokenizers")
    model = small_chats.tuned(64)
    huggingface.save(tmp_path / "base", model.params, model.config, model.tokenizer, model.end_tokens)
    there = open_model.load(tmp_path / "base")
    run = model.run._replace(tokenizer=there.tokenizer, source=UNKNOWN)  # type: ignore[arg-type]
    folder = small_chats.save(tmp_path / "tuned", model._replace(run=run))
    settings = Settings(samples=1, questions=1, tokens=2)
    one, other = suite.run(folder, folder, settings, device="cpu", threads=1).models
    assert not one.losses and "trained elsewhere" in str(one.marks[suite.PYTHON])
    assert isinstance(one.means["praise and blame, nats: he, not she"], Means | str) and other.means.keys()
    assert "trained elsewhere" in suite_table.table(suite.run(folder, None, settings, device="cpu", threads=1))
    with pytest.raises(UserError, match="trained elsewhere, .* give another text"):
        batches.read_source(run.source)


# Mistakes


def test_models_that_cannot_be_compared_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not learn from the same text .* --dense-twin"):
        suite.run(runs["mixture"], runs["prose"], FEW, corpus=CORPUS)
    for name, corpus in (("school", CORPUS), ("other", small_runs.CORPUS)):  # one tokenizer, two texts
        small_runs.train(tmp_path / name, corpus, tokenizer="byte", steps=0, evaluate_every=0)
    with pytest.raises(UserError, match="did not learn from the same text"):
        suite.run(tmp_path / "school", tmp_path / "other", FEW, corpus=CORPUS)
    small_runs.train(tmp_path / "long", CORPUS, context=9, steps=0, evaluate_every=0)
    with pytest.raises(UserError, match="reads 8 tokens at a time and .* 9"):
        suite.run(runs["mixture"], tmp_path / "long", FEW, corpus=CORPUS)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"samples": 0}, "samples 0 leaves nothing"),
        ({"questions": -1}, "questions -1 leaves nothing"),
        ({"tokens": 0}, "tokens 0 leaves nothing"),
        ({"temperature": -0.5}, "temperature -0.5 is not a finite number of at least 0"),
        ({"seed": -1}, "seed -1 is not a seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(runs: dict[str, Path], setting: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        suite.run(runs["mixture"], settings=Settings(**setting), corpus=CORPUS)


def test_what_real_python_reaches_is_measured_on_text_that_was_held_out(tmp_path: Path) -> None:
    """Definitions stand in the training part only, so there is no real text to compare with."""
    code = "\n\n\ndef f(a):\n    return a\n" * 20 + "\n\n\nx = 1\n" * 60
    model = small_runs.train(tmp_path / "run", Corpus("code", {"code": code}), steps=0).model
    data, _, _ = batches.prepare(Corpus("code", {"code": code}), model.run.recipe, model.config.context)
    marks = suite.measure("run", model, data, 0, Settings(samples=2, tokens=5)).marks[suite.PYTHON]
    assert isinstance(marks, Marks) and marks.reachable is None


# Quantised models


def test_the_suite_shows_what_a_quantised_run_lost(tmp_path: Path) -> None:
    dense: dict[str, Any] = {"experts": 1, "active_experts": 1, "capacity_factor": None}
    dense |= {"importance_loss": 0.0, "load_loss": 0.0}
    for name, settings in (("run", {"seed": 1}), ("dense", dense), ("apart", {"seed": 2})):
        small_runs.train(tmp_path / name, **settings)
    for name in ("run", "dense"):
        quantized.write(tmp_path / name, tmp_path / f"{name}-2", "hqq2")

    def of(*names: str) -> suite.Results:
        folders = [tmp_path / name for name in names]
        return suite.run(*folders, settings=FEW, corpus=small_runs.CORPUS, device="cpu", threads=1)

    found = of("run-2", "run")
    lost = found.changes
    assert lost is not None and lost.name.endswith("run-2") and lost.against.endswith("run")
    small, model = (checkpoint.load_model(tmp_path / name) for name in ("run-2", "run"))
    held_out = batches.reload(model.run.source, model.tokenizer, 8, small_runs.CORPUS).validation
    losses = [text_loss.evaluate(one.params, one.config, held_out).loss for one in (small, model)]
    assert lost.nats.value == pytest.approx(losses[0] - losses[1], abs=1e-6)
    table, written = suite_table.table(found), json.loads(suite_table.to_json(found))["quantisation"]
    assert f"against {lost.against}: {lost.nats.value:+.4f} [" in table
    assert f"Changed routings: {100 * lost.share:.1f}%, by layer" in table
    assert written["changed_routings"] == {"share": lost.share, "layers": lost.others.tolist(), "of": lost.tokens}
    turned = of("run", "run-2").changes
    assert turned is not None and turned.nats == lost.nats and turned.share == lost.share, "whichever is first"
    twin = of("dense-2", "dense")
    assert twin.changes is not None and "Changed routings" not in suite_table.table(twin)
    for other in (of("run"), of("run-2"), of("run", "apart"), of("run-2", "apart"), of("run-2", "dense")):
        assert other.changes is None and "nats" not in suite_table.table(other)
        assert json.loads(suite_table.to_json(other))["quantisation"] is None
