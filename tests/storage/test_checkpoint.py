"""Checkpoints: whole or absent, checked to the last bit, and open to any program that reads safetensors."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import CORPUS, SMALL, finished, resume, train

from minimoe.compression import quantize
from minimoe.core import files, presets, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.optim import optimizer
from minimoe.storage import checkpoint, metrics
from minimoe.storage.checkpoint import Progress, RunConfig, Tuning
from minimoe.text import corpus, tokenizer
from minimoe.text.corpus import Source


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoiled."""
    return Path(shutil.copytree(finished(), tmp_path / "run"))


def small_run(**settings: Any) -> RunConfig:
    codec = tokenizer.build(settings.get("tokenizer", "char"), CORPUS.text)
    chosen = presets.override(SMALL, {**settings, "vocab_size": codec.vocab_size})
    return RunConfig(chosen.config, chosen.recipe, codec, Source("small", [], "0" * 64))


# What a run leaves behind


def test_a_run_folder_holds_what_its_description_promises() -> None:
    files = {"config.json", "metrics.jsonl", "model.safetensors", "resume.safetensors"}
    files |= {"loss.png", "experts.png", "sample.txt", "routing.html", ".lock"}
    assert {path.name for path in finished().iterdir()} == files
    for name in ("loss.png", "experts.png"):
        assert (finished() / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_plain_safetensors_library_reads_a_model_under_the_names_of_the_code() -> None:
    tensors = load_file(finished() / "model.safetensors")
    model = checkpoint.load_model(finished())
    assert {"embedding.table", "blocks[1].moe.router.w_gate", "blocks[1].moe.experts.w_up"} <= tensors.keys()
    assert tensors.keys() == dict(tree.named_leaves(model.params)).keys()
    for name, values in tensors.items():
        leaf = eval(f"model.params.{name}", {"model": model})  # the name is the way to it in the code
        assert leaf.dtype == values.dtype
        np.testing.assert_array_equal(leaf, values)


def test_a_loaded_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    trained = resume(Path(shutil.copytree(finished(), tmp_path / "run")), None).model
    loaded = checkpoint.load_model(finished())
    assert loaded.config == trained.config
    assert loaded.tokenizer == trained.tokenizer
    assert loaded.step == trained.step == 6
    for mine, other in zip(tree.leaves(loaded.params), tree.leaves(trained.params), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert not loaded.on_gpu
    assert loaded.to("cpu").params.norm.gain is loaded.params.norm.gain


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "float64", "optimizer": "adamw"},
        {"tied_embeddings": True, "noisy_gating": False},
        {"tokenizer": "byte", "active_experts": 1, "renormalize": False},
    ],
    ids=lambda settings: "-".join(settings) or "toy",
)
def test_parameters_moments_and_random_state_survive_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    run, rng = small_run(**settings), np.random.default_rng(5)
    params = decoder.init(rng, run.config, run.recipe.dtype)
    state = {
        name: tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), moments)
        for name, moments in optimizer.init(params, run.recipe).items()
    }
    rng.standard_normal(3, np.float32)  # leaves half a word in the generator, which belongs to its state
    checkpoint.save(tmp_path, run, params, state, Progress(7, 1.5, dict(rng.bit_generator.state)))
    found = checkpoint.load_progress(tmp_path, run)
    assert found is not None
    assert found[2] == Progress(7, 1.5, dict(rng.bit_generator.state))
    assert found[1].keys() == state.keys()
    saved, loaded = (params, list(state.values())), (found[0], list(found[1].values()))
    for mine, other in zip(tree.leaves(saved), tree.leaves(loaded), strict=True):
        assert mine.dtype == other.dtype
        assert other.flags.writeable, "the optimiser works in place"
        np.testing.assert_array_equal(mine, other)


def test_a_config_survives(tmp_path: Path) -> None:
    run = small_run(window=3, capacity_factor=None)._replace(source=Source("né", ["/a/b c.txt", "/ö.txt"], "1" * 64))
    checkpoint.save_config(tmp_path, run)
    assert checkpoint.load_config(tmp_path) == run
    assert "ç" in (tmp_path / "config.json").read_text(encoding="utf-8"), "a person can read which characters it knows"


def test_a_run_that_has_lost_its_file_to_resume_from_is_not_begun_anew(run: Path) -> None:
    (run / "resume.safetensors").unlink()
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"resume\.safetensors is missing, although model\.safetensors has taken 6"):
        checkpoint.load_progress(run, checkpoint.load_config(run))
    assert (run / "model.safetensors").read_bytes() == before


def test_a_model_that_may_not_be_read_is_not_said_to_be_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, **_: Any) -> Any:  # as the library says it
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr("safetensors.safe_open", forbidden)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: check its permissions"):
        checkpoint.load_model(run)


def test_a_text_whose_name_is_not_utf8_is_found_again(tmp_path: Path) -> None:
    source = Source("", [os.fsdecode(b"/texts/caf\xe9 \xc3\xa9.txt")], "0" * 64)
    run = small_run()._replace(source=source)
    checkpoint.save_config(tmp_path, run)
    assert checkpoint.load_config(tmp_path).source == source


def test_there_is_nothing_to_resume_before_the_first_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_progress(tmp_path, small_run()) is None


# Damage


@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(5000)), "something else"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: flip(path, -1), "does not match|do not match its checksum"),
        (lambda path: flip(path, 300), "cut short|checksum"),
        (lambda path: (path.unlink(), path.mkdir()), "cut short or something else"),
    ],
    ids=["cut", "foreign", "empty", "last byte", "header", "folder"],
)
def test_a_spoiled_checkpoint_is_refused_by_name(run: Path, name: str, spoil: Callable[[Path], Any], says: str) -> None:
    spoil(run / name)
    with pytest.raises(UserError, match=says) as error:
        load(run, name)
    assert str(run / name) in str(error.value)
    assert "\n" not in str(error.value)


def load(run: Path, name: str) -> object:
    if name == "model.safetensors":
        return checkpoint.load_model(run)
    return checkpoint.load_progress(run, checkpoint.load_config(run))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_safetensors_file_of_another_program_is_refused(run: Path) -> None:
    from safetensors.numpy import save_file

    save_file(load_file(run / "model.safetensors"), run / "model.safetensors")  # without a checksum
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load_model(run)


def position(**changes: Any) -> str:
    """The metadata of a position, of which something is wrong."""
    right = {"step": 1, "seconds": 2.0, "random_state": np.random.default_rng(0).bit_generator.state}
    return json.dumps(right | changes)


HUGE_WORDS = {"bit_generator": "PCG64", "state": {"state": 10**99, "inc": -1}, "has_uint32": 10**99, "uinteger": 0}


@pytest.mark.parametrize(
    "progress",
    [
        None,
        "{}",
        "no JSON",
        "[" * 100_000,
        "9" * 5000,
        position(random_state={"x": 1}),
        position(random_state=[1]),
        position(random_state=HUGE_WORDS),
        position(step="1"),
        position(step=-1),
        position(step=True),
        position(seconds=float("nan")),
        position(seconds="long"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_without_a_sensible_position_is_not_resumed_from(run: Path, progress: str | None) -> None:
    tensors, metadata = files.read_tensors(run / "resume.safetensors")
    metadata.pop("progress")
    about = metadata | ({} if progress is None else {"progress": progress})
    files.write_tensors(run / "resume.safetensors", tensors, about)
    with pytest.raises(UserError, match="how far the run has come"):
        checkpoint.load_progress(run, checkpoint.load_config(run))


def test_a_run_without_a_model_says_how_to_get_one(run: Path) -> None:
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape(f"--resume {run}")):
        checkpoint.load_model(run)


# config.json


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes config.json as a person does who means it: without the checksum."""
    values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    values.pop("sha256", None)
    change(values)
    (run / "config.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"format": 1, "mod', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1, 2]", "not a run's config"),
        (b"null", "not a run's config"),
        (b'"format"', "not a run's config"),
        (b"{}", "has format None, but this version reads 2"),
        (b'{"model_type": "mixtral"}', "is a Hugging Face model, which has no recipe and no text"),
    ],
)
def test_a_broken_config_is_refused(run: Path, content: bytes, says: str) -> None:
    (run / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        checkpoint.load_config(run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.update(format=1), "format 1, but this version reads 2"),
        (lambda values: values.pop("train"), "'train' is missing"),
        (lambda values: values.update(sha257="0"), "'sha257' is unknown"),
        (lambda values: values.update(model=[1]), "not a run's config"),
        (lambda values: values["model"].update(widht=8), "widht.*did you mean 'width'"),
        (lambda values: values["model"].update(width=-8), "width -8 is too small"),
        (lambda values: values["model"].update(width="8"), "width '8' is not a whole number"),
        (lambda values: values["train"].update(seed=0.5), "seed 0.5 is not a whole number"),
        (lambda values: values["model"].update(vocab_size=5), "vocab_size 5, but its tokenizer has"),
        (lambda values: values.update(tokenizer={"kind": "bpe"}), "tokenizer"),
        (lambda values: values.update(tokenizer=7), "tokenizer"),
        (lambda values: values.update(source=None), "not a run's config"),
        (lambda values: values["source"].update(paths=5), "not a run's config"),
        (lambda values: values["source"].update(sha512=""), "not a run's config"),
        (lambda values: values["source"].pop("sha256"), "not a run's config"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(run: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    rewrite(run, change)
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load_config(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"expert_width": 7}, r"w_\w+ as float32 .*asks for"),
        ({"heads": 4, "head_width": 2}, "not belong to one run"),
        ({"layers": 1}, r"holds the tensor .*blocks\[1\]"),
        ({"layers": 3}, "asks for a model of"),
        ({"noisy_gating": False}, "holds the tensor .*w_noise"),
        ({"tied_embeddings": True}, "holds the tensor head.weight"),
        # These would fill the machine's memory, if it were not seen in time that the file is so much smaller.
        ({"width": 2**20, "layers": 4096}, "asks for a model of"),
        ({"experts": 65536, "expert_width": 2**20}, "asks for a model of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors"])
def test_a_config_that_does_not_match_the_tensors_is_refused(
    run: Path, settings: dict[str, Any], says: str, name: str
) -> None:
    rewrite(run, lambda values: values["model"].update(settings))
    with pytest.raises(UserError, match=says if name.startswith("model") else None) as error:
        load(run, name)
    assert "\n" not in str(error.value)


def test_a_value_that_was_changed_in_the_config_is_noticed_unless_its_checksum_is_taken_out(run: Path) -> None:
    text = (run / "config.json").read_text(encoding="utf-8")
    for old, new in (('"steps": 6', '"steps": 9'), ('"learning_rate": 0.003', '"learning_rate": 0.03'), ("ç", "è")):
        assert old in text
        (run / "config.json").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(UserError, match="was damaged or edited, and does not match its checksum"):
            checkpoint.load_config(run)
    rewrite(run, lambda values: values["train"].update(steps=9))
    assert checkpoint.load_config(run).recipe.steps == 9
    (run / "config.json").write_text(json.dumps(json.loads(text)), encoding="utf-8")
    assert checkpoint.load_config(run).recipe.steps == 6, "how the values are laid out is no matter"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rope_theta": 5000.0}, "made with another rope_theta than config.json says (10000.0, not 5000.0)"),
        ({"window": 3}, "made with another window than config.json says (None, not 3)"),
        ({"learning_rate": 0.1}, "made with another learning_rate than config.json says (0.003, not 0.1)"),
        ({"accumulate": 2}, "made with another accumulate than config.json says (1, not 2)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors"])
def test_tensors_of_the_same_shapes_but_other_settings_are_refused(
    run: Path, settings: dict[str, Any], says: str, name: str
) -> None:
    part = "train" if settings.keys() <= TrainConfig.__dataclass_fields__.keys() else "model"
    rewrite(run, lambda values: values[part].update(settings))
    with pytest.raises(UserError, match=re.escape(says)):
        load(run, name)


@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors"])
def test_tensors_of_another_run_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    other = CORPUS.documents["pyramid"].replace("steps", "stets")  # the same characters, so the same shapes
    text = tmp_path / "other.txt"
    text.write_text(other, encoding="utf-8")
    train(tmp_path / "other", corpus.read_files(text))
    shutil.copy(tmp_path / "other" / name, run / name)
    with pytest.raises(UserError, match="was made with another text than config.json says"):
        load(run, name)


@pytest.mark.parametrize("settings", [None, "[1]", "{}", "no JSON", "[" * 100_000], ids=lambda value: str(value)[:9])
def test_tensors_that_do_not_say_where_they_come_from_are_refused(run: Path, settings: str | None) -> None:
    tensors, metadata = files.read_tensors(run / "model.safetensors")
    del metadata["settings"]
    files.write_tensors(
        run / "model.safetensors", tensors, metadata | ({} if settings is None else {"settings": settings})
    )
    with pytest.raises(UserError, match="does not say with which settings it was made"):
        checkpoint.load_model(run)


def test_a_run_that_is_older_than_some_settings_has_their_defaults(run: Path) -> None:
    """Neither its config.json nor what its tensors say about themselves names these settings."""
    newer = ("shared_experts", "second_expert", "bias_rate")
    rewrite(run, lambda values: [values[part].pop(name, None) for part in ("model", "train") for name in newer])
    for name in ("model.safetensors", "resume.safetensors"):
        tensors, metadata = files.read_tensors(run / name)
        settings = json.loads(metadata["settings"])
        assert newer[0] in settings
        older = {setting: value for setting, value in settings.items() if setting not in newer}
        files.write_tensors(run / name, tensors, metadata | {"settings": json.dumps(older)})
    assert load(run, "model.safetensors") is not None
    assert load(run, "resume.safetensors") is not None
    rewrite(run, lambda values: values["train"].update(bias_rate=0.1))
    with pytest.raises(UserError, match=re.escape("another bias_rate than config.json says (0.003, not 0.1)")):
        load(run, "model.safetensors")


def test_what_a_resumed_run_may_change_does_not_part_it_from_its_checkpoint(run: Path) -> None:
    rewrite(run, lambda values: values["train"].update(steps=9, save_every=1, evaluate_every=0))
    assert checkpoint.load_model(run).run.recipe.steps == 9
    assert checkpoint.load_progress(run, checkpoint.load_config(run)) is not None


@pytest.mark.parametrize(
    ("router", "leaf", "wrong", "right"),
    [
        ("expert_threshold", "threshold", (math.nan, -0.1), 0.0),
        ("remoe", "penalty", (math.inf, -1e-9), 1e-9),
        ("sigmoid_bias", "bias", (math.nan, -math.inf), -0.1),
    ],
)
def test_state_that_no_training_leaves_is_refused(
    tmp_path: Path, router: str, leaf: str, wrong: tuple[float, ...], right: float
) -> None:
    """A loss does not show it: with a threshold that is no number, an expert just gets no token."""
    folder = tmp_path / "run"
    train(folder, steps=1, router=router)
    full = f"blocks[1].moe.router.{leaf}"
    for name in ("model.safetensors", "resume.safetensors"):
        tensors, metadata = files.read_tensors(folder / name)
        for value in (*wrong, right):
            tensors[full] = np.append(tensors[full][:-1], np.float32(value))
            files.write_tensors(folder / name, tensors, metadata)
            if value == right:
                assert load(folder, name) is not None
            else:
                with pytest.raises(UserError, match=re.escape(f"{name} holds {full} with ")):
                    load(folder, name)


def test_another_dtype_or_optimiser_does_not_match_the_tensors(run: Path) -> None:
    rewrite(run, lambda values: values["train"].update(dtype="float64"))
    with pytest.raises(UserError, match="as float32 .*asks for float64"):
        checkpoint.load_model(run)
    rewrite(run, lambda values: values["train"].update(dtype="float32", optimizer="adamw"))
    with pytest.raises(UserError, match="lacks the tensor optimizer.blocks"):
        checkpoint.load_progress(run, checkpoint.load_config(run))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=re.escape(f"{folder} is not a run")):
            checkpoint.load_config(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path / 'file'} is a file: give the folder of a run, perhaps {tmp_path}"):
        checkpoint.load_config(tmp_path / "file")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json cannot be read \(it is not a regular file\)"):
        checkpoint.load_config(tmp_path)


# Writing


def test_the_file_to_resume_from_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two then costs steps that are taken again; the other way round the model would stay old."""
    written: list[str] = []
    monkeypatch.setattr(metrics, "sync", lambda _: written.append("metrics forced to disk"))
    monkeypatch.setattr(files, "write_atomically", lambda path, content: written.append(path.name))
    run = small_run()
    params = decoder.init(np.random.default_rng(0), run.config)
    checkpoint.save(tmp_path, run, params, optimizer.init(params, run.recipe), Progress(1, 0.0, {}))
    assert written == ["metrics forced to disk", "model.safetensors", "resume.safetensors"]


# The lock


def test_a_folder_is_lent_to_one_training_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    refused = pytest.raises(UserError, match="another training run is writing to")
    with checkpoint.locked(tmp_path), refused, checkpoint.locked(tmp_path):
        pass
    with checkpoint.locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with checkpoint.locked(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only some people make links")
@pytest.mark.parametrize("content", ["mine", None])
def test_a_lock_that_is_a_link_is_refused_and_neither_empties_nor_creates_a_file(
    tmp_path: Path, content: str | None
) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    folder.mkdir()
    if content is not None:
        precious.write_text(content)
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock cannot be written \(it is a link"), checkpoint.locked(folder):
        pass
    assert (precious.read_text() if precious.exists() else None) == content


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be written"), checkpoint.locked(tmp_path):
        pass


def test_config_types_are_those_of_the_classes() -> None:
    run = checkpoint.load_config(finished())
    assert isinstance(run.config, ModelConfig)
    assert isinstance(run.recipe, TrainConfig)
    assert run.source.paths == [str(finished().parent / "pyramid.txt")]
    assert len(run.source.sha256) == 64


def test_a_quantised_model_knows_its_scheme_and_is_not_trained_further(tmp_path: Path) -> None:
    model = checkpoint.load_model(finished())
    for scheme in ("rtn2", "hqq2"):  # the same arrays in the same shapes
        checkpoint.save_quantized(tmp_path / scheme, model, quantize.plan(scheme))
    run = checkpoint.load_config(tmp_path / "rtn2")
    assert run == model.run._replace(quantization=quantize.plan("rtn2"))
    with pytest.raises(UserError, match="cannot be trained"):
        checkpoint.load_progress(tmp_path / "rtn2", run)
    shutil.copy(tmp_path / "rtn2" / "model.safetensors", tmp_path / "hqq2" / "model.safetensors")
    with pytest.raises(UserError, match="was made with another quantization than config.json says"):
        checkpoint.load_model(tmp_path / "hqq2")


def test_what_a_run_learns_survives_and_is_part_of_what_it_is(tmp_path: Path) -> None:
    shutil.copytree(finished(), tmp_path / "run")
    run = checkpoint.load_config(tmp_path / "run")
    tuned = run._replace(tuning=Tuning("sft", {"pack": True, "data": None}, ("head.weight", "norm.gain")))
    checkpoint.save_config(tmp_path / "run", tuned)
    stored = checkpoint.load_config(tmp_path / "run")
    assert stored == tuned and stored.frozen == ("head.weight", "norm.gain") and run.frozen == ()
    with pytest.raises(UserError, match="another tuning than config.json says"):
        checkpoint.load_model(tmp_path / "run")
    params = decoder.init(np.random.default_rng(0), run.config)
    moments = optimizer.init(params, run.recipe, tuned.frozen)
    progress = Progress(3, 1.0, dict(np.random.default_rng(0).bit_generator.state))
    checkpoint.save(tmp_path / "run", tuned, params, moments, progress)
    found = checkpoint.load_progress(tmp_path / "run", tuned)
    assert found is not None and found[1].keys() == moments.keys()
    other = tuned._replace(tuning=tuned.tuning._replace(settings={"pack": False, "data": None}))
    checkpoint.save_config(tmp_path / "run", other)
    with pytest.raises(UserError, match="another tuning"):
        checkpoint.load_model(tmp_path / "run")
    checkpoint.save_config(tmp_path / "run", run)
    with pytest.raises(UserError, match="another tuning"):
        checkpoint.load_model(tmp_path / "run")


@pytest.mark.parametrize(
    "tuning", [3, {}, {"kind": 1, "settings": {}, "frozen": []}, {"kind": "sft", "settings": [], "frozen": []},
               {"kind": "sft", "settings": {}, "frozen": [1]}, {"kind": "sft", "settings": {}, "frozen": "head"},
               {"kind": "sft", "settings": {}, "frozen": [], "more": 1}],
)  # fmt: skip
def test_a_tuning_that_is_none_is_refused(tmp_path: Path, tuning: Any) -> None:
    shutil.copytree(finished(), tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    del values["sha256"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(values | {"tuning": tuning}))
    with pytest.raises(UserError, match="is not a run's config"):
        checkpoint.load_config(tmp_path / "run")


def test_a_model_is_saved_without_the_state_of_its_run_and_the_other_way_round(tmp_path: Path) -> None:
    shutil.copytree(finished(), tmp_path / "run")
    run = checkpoint.load_config(tmp_path / "run")
    params = decoder.init(np.random.default_rng(0), run.config)
    state = (tmp_path / "run" / "resume.safetensors").read_bytes()
    checkpoint.save_model(tmp_path / "run", run, params, 4)
    assert checkpoint.load_model(tmp_path / "run").step == 4
    assert (tmp_path / "run" / "resume.safetensors").read_bytes() == state
    progress = Progress(5, 1.0, dict(np.random.default_rng(0).bit_generator.state))
    checkpoint.save(tmp_path / "run", run, params, optimizer.init(params, run.recipe), progress, model=False)
    assert checkpoint.load_model(tmp_path / "run").step == 4
    assert (tmp_path / "run" / "resume.safetensors").read_bytes() != state
