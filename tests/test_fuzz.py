"""Fuzzing: whatever the settings and whichever bytes are spoiled, the answer is the right one or one sentence.

The quick suite looks at a few cases of each property, always the same. `pytest tests/test_fuzz.py
--hypothesis-profile=fuzz` draws some 4,400 new ones; a case that fails is kept here as an @example.
"""

import contextlib
import copy
import io
import json
import math
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_runs import CORPUS, SMALL, lasting

from minimoe.cli import main
from minimoe.core import config, presets, resources, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.storage import checkpoint, huggingface, open_model
from minimoe.text import corpus, tokenizer
from minimoe.training import run_report, trainer

FUEL = 30.0  # seconds of processor time after which a case hangs


@pytest.fixture(scope="module", autouse=True)
def swift() -> Iterator[None]:
    """No figures, and no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write", lambda folder, *_: (folder / "sample.txt").write_text("A sample."))
        patch.setattr(os, "fsync", lambda _: None)
        yield


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Fails what computes for longer than ``FUEL``; where the system has no such timer, nothing is watched."""

    def hang(*_: Any) -> None:
        raise AssertionError(f"no answer after {FUEL} s of computing")

    if not hasattr(signal, "ITIMER_PROF"):
        yield
        return
    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, FUEL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def assert_is_a_sentence(text: str) -> None:
    assert text.endswith(".") and "\n" not in text and len(text) < 1500 and text.isprintable(), text
    assert "Error(" not in text or "how far" in text, text


def minimoe(*words: str | Path) -> str | None:
    """What a command prints, or None if it refuses with exit code 2 and one sentence."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained), no_hang():
        code = main.main(list(map(str, words)))
    if code == 0:
        return said.getvalue()
    assert code == 2, complained.getvalue()
    assert "Traceback" not in complained.getvalue()
    assert_is_a_sentence(complained.getvalue().removesuffix("\n").split("\n")[-1])
    return None


# Settings


def live(preset: presets.Preset) -> None:
    """init, step, save, load, generate, and resume with one step more: all of it works, or one sentence says why not.

    Raises ``UserError`` if the settings are refused.
    """
    with tempfile.TemporaryDirectory() as folder, no_hang():
        out = Path(folder, "run")
        trained = trainer.train(preset, corpus=CORPUS, out=out, device="cpu", threads=1, progress=False)
        loaded = checkpoint.load_model(out)
        for mine, other in zip(tree.leaves(trained.model.params), tree.leaves(loaded.params), strict=True):
            np.testing.assert_array_equal(mine, other)
        assert [row["step"] for row in trained.metrics] == list(range(1, preset.recipe.steps + 1))
        assert all(math.isfinite(row["total"]) for row in trained.metrics)
        written = generation.write(loaded, "4 s", 12)
        assert written == generation.write(trained.model, "4 s", 12)
        if loaded.config.vocab_size < 256:
            assert len(written) == 12
        resumed = small_runs.resume(out, steps=preset.recipe.steps + 1)
        assert resumed.finished
        assert len(resumed.metrics) == preset.recipe.steps + 1


def powers(most: int) -> st.SearchStrategy[float]:
    """Numbers of every magnitude, from 0 up to ``most``."""
    return st.one_of(st.just(0.0), st.floats(1e-6, most))


@st.composite
def sensible(draw: st.DrawFn) -> presets.Preset:
    """Settings that must work."""
    kv_heads, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    active = draw(st.integers(1, experts))
    accumulate = draw(st.integers(1, 3))
    chosen = {
        "width": draw(st.integers(1, 12)),
        "layers": draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 3)),
        "head_width": 2 * draw(st.integers(1, 4)),
        "context": draw(st.integers(1, 20)),
        "window": draw(st.one_of(st.none(), st.integers(1, 30))),
        "experts": experts,
        "active_experts": active,
        "expert_width": draw(st.integers(1, 12)),
        "renormalize": draw(st.booleans()) and (active > 1 or experts == 1),
        "noisy_gating": draw(st.booleans()),
        "tied_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.floats(1, 1e9)),
        "norm_eps": draw(st.floats(1e-9, 1)),
        "tokenizer": draw(st.sampled_from(["char", "byte"])),
        "steps": draw(st.integers(0, 2)),
        "accumulate": accumulate,
        "batch": accumulate * draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**63)),
        "optimizer": draw(st.sampled_from(["muon", "adamw"])),
        "learning_rate": draw(st.floats(0, 0.01)),
        "warmup": draw(st.integers(0, 3)),
        "schedule": draw(st.sampled_from(["cosine", "linear"])),
        "final_rate": draw(st.floats(0, 1)),
        "weight_decay": draw(st.floats(0, 1)),
        "clip": draw(powers(10)),
        "balance_loss": draw(powers(1)),
        "importance_loss": draw(powers(1)),
        "load_loss": draw(powers(1)),
        "z_loss": draw(powers(1)),
        "capacity_factor": draw(st.one_of(st.none(), st.floats(0.01, 8))),
        "evaluate_every": draw(st.integers(0, 2)),
        "save_every": draw(st.integers(0, 2)),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
    }
    return presets.override(SMALL, chosen)


@given(preset=sensible())
def test_settings_that_make_sense_train_save_load_write_and_resume(preset: presets.Preset) -> None:
    live(preset)


WILD = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**16, 2**20, 2**31, 2**63, 2**64, -(2**63), 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e-300, 1e-38, 1e30, 1e38, 1e300, -1e300]),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
)
FIELDS = sorted({*ModelConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__} - {"vocab_size", "steps"})


@given(wild=st.dictionaries(st.sampled_from(FIELDS), WILD, min_size=1, max_size=4), steps=st.integers(0, 2))
@example(wild={"rope_theta": 10**400}, steps=0)  # is no float
@example(wild={"warmup": 10**400}, steps=1)  # the learning rate divides by it
@example(wild={"window": 10**400}, steps=1)
@example(wild={"capacity_factor": 1e308}, steps=1)  # times K·T is infinite
def test_settings_of_any_kind_work_or_are_refused_in_a_sentence(wild: dict[str, Any], steps: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "memory_bytes", lambda: 4 * 10**6)  # so that what passes is small enough to be tried
        try:
            live(presets.override(SMALL, {**wild, "steps": steps}))
        except UserError as error:
            assert_is_a_sentence(str(error))


@given(name=st.text(max_size=12), value=WILD)
def test_a_setting_of_any_name_is_known_or_refused(name: str, value: Any) -> None:
    for kind in (ModelConfig, TrainConfig):
        try:
            config.from_dict(kind, {name: value})
        except UserError as error:
            assert str(error).endswith(".")
        else:
            assert name in FIELDS or name in ("vocab_size", "steps")


# Spoiled bytes


class Damage(NamedTuple):
    """One thing that can happen to the bytes of a file."""

    kind: str
    place: int
    length: int
    content: bytes

    def of(self, whole: bytes) -> bytes:
        start = self.place % max(len(whole), 1)
        stop = min(start + self.length, len(whole))
        match self.kind:
            case "bit":
                middle = bytes([whole[start] ^ 1 << self.length % 8]) if whole else b""
                return whole[:start] + middle + whole[start + 1 :]
            case "digit":  # the next one becomes another one
                place = next((i for i in range(start, len(whole)) if chr(whole[i]) in "0123456789"), None)
                if place is None:
                    return whole
                other = ord("0") + (whole[place] - ord("0") + 1 + self.length % 9) % 10
                return whole[:place] + bytes([other]) + whole[place + 1 :]
            case "overwrite":
                return whole[:start] + self.content + whole[start + len(self.content) :]
            case "zero":
                return whole[:start] + bytes(stop - start) + whole[stop:]
            case "insert":
                return whole[:start] + self.content + whole[start:]
            case "delete":
                return whole[:start] + whole[stop:]
            case "repeat":
                return whole[:stop] + whole[start:stop] + whole[stop:]
            case "cut":
                return whole[:start]
        raise AssertionError(self.kind)


KINDS = ("bit", "digit", "overwrite", "zero", "insert", "delete", "repeat", "cut")
PLACES = st.one_of(st.integers(0, 600), st.integers(0, 2**20))  # the beginning, where headers are, and everywhere
DAMAGE = st.builds(Damage, st.sampled_from(KINDS), PLACES, st.integers(1, 300), st.binary(min_size=1, max_size=20))


class Room(NamedTuple):
    """A finished run and its text, with all their bytes, and what the commands answer when nothing is spoiled."""

    folder: Path
    whole: dict[str, bytes]
    answers: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def spoil(self, name: str, content: bytes) -> None:
        """Everything as it was, but for one file."""
        for path in self.run.iterdir():
            path.unlink()
        for other, whole in self.whole.items():
            (self.folder / other).write_bytes(whole)
        (self.folder / name).write_bytes(content)

    def generate(self) -> str | None:
        return minimoe("generate", self.run, "--prompt", "4 s", "--tokens", "8", "--temperature", "0")

    def evaluate(self) -> str | None:
        return minimoe("evaluate", self.run, "--threads", "1")

    def resume(self) -> Any:
        if minimoe("train", "--resume", self.run, "--steps", "7", "--threads", "1") is None:
            return None
        return lasting(self.run) | {"config": checkpoint.load_config(self.run)}

    def assert_same_or_refused(self, *actions: str) -> None:
        for action in actions:
            found = getattr(self, action)()
            assert found is None or found == self.answers[action], f"{action} is silently wrong"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, swift: None) -> Room:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "text.txt").write_text(small_runs.PYRAMID, encoding="utf-8")
    small_runs.train(folder / "run", corpus.read_files(folder / "text.txt"))
    names = ["text.txt", *(f"run/{name}" for name in checkpoint.FILES)]
    made = Room(folder, {name: (folder / name).read_bytes() for name in names}, {})
    for action in ("generate", "evaluate", "resume"):
        made.answers[action] = getattr(made, action)()
        assert made.answers[action] is not None
    return made


@pytest.mark.parametrize(
    ("name", "actions"),
    [
        ("run/config.json", ["generate", "evaluate", "resume"]),
        ("run/metrics.jsonl", ["resume"]),
        ("run/model.safetensors", ["generate"]),
        ("run/resume.safetensors", ["resume"]),
        ("text.txt", ["evaluate", "resume"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@given(damage=DAMAGE)
@example(damage=Damage("cut", 0, 1, b""))
@example(damage=Damage("insert", 0, 1, b"[" * 20_000))
def test_a_spoiled_file_is_refused_or_changes_nothing(
    room: Room, name: str, actions: list[str], damage: Damage
) -> None:
    for action in actions:
        room.spoil(name, damage.of(room.whole[name]))
        room.assert_same_or_refused(action)


# A stranger's files, which may be wrong on purpose


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def replaced(values: Any, place: int, new: Any) -> Any:
    """``values`` with one of all its values, at any depth, replaced."""
    values = copy.deepcopy(values)
    found = list(places(values))
    container, key = found[place % len(found)]
    container[key] = new
    return values


JSON = st.one_of(
    WILD,
    st.sampled_from(["../model.safetensors", "/etc/passwd", "a\0b", "\ud800", "<b>", "\x1b[2J", "x" * 400]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=6),
)


@given(place=st.integers(0, 200), new=JSON)
def test_a_config_written_by_a_stranger_runs_or_is_refused(room: Room, place: int, new: Any) -> None:
    values = json.loads(room.whole["run/config.json"])
    del values["sha256"]
    room.spoil("run/config.json", json.dumps(replaced(values, place, new)).encode())
    room.generate()
    room.evaluate()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder in the Hugging Face layout, its weights behind an index."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    characters = tokenizer.build("char", CORPUS.text)
    chosen = presets.override(SMALL, {"vocab_size": characters.vocab_size, "noisy_gating": False}).config
    huggingface.save(folder, decoder.init(np.random.default_rng(0), chosen), chosen, characters)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    tensors = huggingface.safetensors_file.describe(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def open_a_strangers(folder: Path, whole: dict[str, bytes], name: str, content: bytes) -> None:
    """Its numbers are not ours to check, so all that is asked is an answer."""
    pytest.importorskip("tokenizers")
    for other, bytes_of_other in whole.items():
        (folder / other).write_bytes(bytes_of_other)
    (folder / name).write_bytes(content)
    minimoe("generate", folder, "--prompt", "4 s", "--tokens", "3")
    with contextlib.suppress(UserError):
        open_model.shape(folder)


@given(name=st.sampled_from(["config.json", "part.safetensors", "model.safetensors.index.json"]), damage=DAMAGE)
def test_a_spoiled_folder_of_hugging_faces_kind_runs_or_is_refused(
    pretrained: tuple[Path, dict[str, bytes]], name: str, damage: Damage
) -> None:
    folder, whole = pretrained
    open_a_strangers(folder, whole, name, damage.of(whole[name]))


@given(
    name=st.sampled_from(["config.json", "tokenizer.json", "model.safetensors.index.json"]),
    place=st.integers(0, 200),
    new=JSON,
)
@example(name="config.json", place=14, new=10**400)  # rope_theta is no float
@example(name="config.json", place=118, new=3.4028235677973366e38)  # norm_eps, and no square fits beside it
def test_json_of_hugging_faces_kind_written_by_a_stranger_runs_or_is_refused(
    pretrained: tuple[Path, dict[str, bytes]], name: str, place: int, new: Any
) -> None:
    folder, whole = pretrained
    open_a_strangers(folder, whole, name, json.dumps(replaced(json.loads(whole[name]), place, new)).encode())


PROPERTIES: list[Any] = [value for value in list(globals().values()) if hasattr(value, "hypothesis")]


def test_the_long_look_has_two_thousand_cases_and_more() -> None:
    spoiled_files = 5  # one property counts that often
    cases = (len(PROPERTIES) - 1 + spoiled_files) * settings.get_profile("fuzz").max_examples
    assert cases >= 2000
